"""What federated data and the rounds of a federated model ask of each other.

Axes: N samples, N_k samples of client k, B mini-batch.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = ["FederatedData", "Labels", "RoundSchedule"]


class Labels(Protocol):
    """The labels that training sees: the given ones, and the current ones after relabeling."""

    given: Tensor
    current: Tensor

    def write(self, index: Tensor, labels: Tensor) -> None:
        """Replace the current labels of some samples."""

    def state_dict(self) -> dict[str, Any]:
        """The labels as plain tensors."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the current labels."""


class FederatedData(Protocol):
    """The members of a DataModule that the engine uses; true labels are not among them."""

    num_classes: int

    @property
    def num_clients(self) -> int:
        """Number of clients."""

    @property
    def labels(self) -> Labels:
        """The label store."""

    def client_index(self, client: int) -> Tensor:
        """Positions of the client's samples in the label store. Shape: (N_k,)."""

    def client_images(self, client: int) -> Tensor:
        """The client's images as stored. Shape: (N_k, channels, height, width)."""

    def augment_batch(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Network input for training. Shape: (B, channels, height, width)."""

    def plain_batch(self, images: Tensor) -> Tensor:
        """Network input for evaluation. Shape: (B, channels, height, width)."""


@runtime_checkable
class RoundSchedule(Protocol):
    """What a DataModule asks of the model: how many training batches make a round.

    A training batch is the number of a client group: the clients that train in one pass. Which
    clients those are is decided when the batch is consumed.
    """

    def groups_per_round(self, num_clients: int, ranks: int) -> int:
        """Number of client groups that each rank trains in a round.

        Args:
            num_clients: Number of clients of the federation.
            ranks: Number of ranks that train together.
        """
