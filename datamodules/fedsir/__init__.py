"""Federated data with label noise, for FedSIR."""
