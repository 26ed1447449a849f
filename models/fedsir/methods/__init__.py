"""Federated learning methods, all on the same rounds engine."""

from fulgurite.models.fedsir.methods.base import FederatedMethod
from fulgurite.models.fedsir.methods.clean_only import CleanOnly
from fulgurite.models.fedsir.methods.cleaning import LocalCleaning
from fulgurite.models.fedsir.methods.fedavg import FedAvg, FedProx
from fulgurite.models.fedsir.methods.fedcorr import FedCorr
from fulgurite.models.fedsir.methods.fedelc import FedELC
from fulgurite.models.fedsir.methods.fedlsr import FedLSR
from fulgurite.models.fedsir.methods.fednoro import FedNoRo
from fulgurite.models.fedsir.methods.fedsir import FedSIR
from fulgurite.models.fedsir.methods.rofl import RoFL
from fulgurite.models.fedsir.methods.spectral import SpectralIdentification

__all__ = [
    "CleanOnly",
    "FedAvg",
    "FedCorr",
    "FedELC",
    "FedLSR",
    "FedNoRo",
    "FedProx",
    "FedSIR",
    "FederatedMethod",
    "LocalCleaning",
    "RoFL",
    "SpectralIdentification",
]
