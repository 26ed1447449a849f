"""Linear probes of n mod T, their controls, and the verdict on a table."""
