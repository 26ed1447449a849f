"""Federated learning methods with noisy labels."""
