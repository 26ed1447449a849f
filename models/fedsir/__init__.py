"""FedSIR: spectral client identification and relabeling, and its baselines."""
