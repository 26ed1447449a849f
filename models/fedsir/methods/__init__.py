"""Federated learning methods, all on the same rounds engine."""

from fulgurite.models.fedsir.methods.base import FederatedMethod
from fulgurite.models.fedsir.methods.fedavg import FedAvg, FedProx
from fulgurite.models.fedsir.methods.fedsir import CleanOnly, FedSIR
from fulgurite.models.fedsir.methods.spectral import SpectralIdentification

__all__ = [
    "CleanOnly",
    "FedAvg",
    "FedProx",
    "FedSIR",
    "FederatedMethod",
    "SpectralIdentification",
]
