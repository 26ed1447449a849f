"""FedAvg over the clients that are predicted to be clean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fulgurite.models.fedsir.federation import ClientSide, Federation
from fulgurite.models.fedsir.methods.base import FederatedMethod
from fulgurite.models.fedsir.methods.spectral import SpectralClientSide, SpectralIdentification

__all__ = ["CleanOnly"]


class CleanOnly(FederatedMethod):
    """FedAvg over the clients that spectral identification predicts to be clean.

    The global model starts from the average of their models, as in FedSIR. Where no client is
    predicted clean, all take part.

    Args:
        identification: Stage I, spectral identification of clean clients.

    Source: the authors' "pruning" baseline, with identified instead of true clean clients.
    """

    def __init__(self, identification: SpectralIdentification | None = None) -> None:
        self.identification = identification or SpectralIdentification()
        self.is_clean: Tensor | None = None
        self.evidence: dict[str, Any] = {}

    @property
    def clean(self) -> Tensor | None:
        """Predicted clean mask, bool; None before identification. Shape: (K,)."""
        return self.is_clean

    @property
    def client_side(self) -> ClientSide:
        """Clients that score themselves, and train by cross-entropy."""
        return SpectralClientSide(self.identification)

    def local_rounds(self) -> int:
        """Epochs of Stage I."""
        return self.identification.epochs

    def before_rounds(self, fed: Federation) -> None:
        """Identify, and start from the clean clients' average."""
        identification = self.identification(fed)
        self.is_clean = identification.split.clean
        self.evidence = identification.evidence
        fed.global_state = identification.clean_state

    def participants(self, fed: Federation, round: int, sampled: Sequence[int]) -> list[int]:
        """The clean ones of the sampled clients, or all where none is clean."""
        assert self.is_clean is not None
        clean_clients = [k for k in sampled if bool(self.is_clean[k])]
        return clean_clients or list(sampled)

    def state_dict(self) -> dict[str, Any]:
        """The predicted clean clients, and the evidence."""
        return {"split_clean": self.is_clean, "found": self.evidence}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state."""
        self.is_clean, self.evidence = state["split_clean"], state["found"]
