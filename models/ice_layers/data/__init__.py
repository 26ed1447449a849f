"""What networks and baselines are given: batches, their traces, what is hidden, and scales."""
