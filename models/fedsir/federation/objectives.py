"""Local losses: what a client minimises on each mini-batch.

Axes: B mini-batch, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulgurite.models.fedsir.losses import logit_adjusted_cross_entropy

__all__ = ["LogitLoss", "MiniBatch", "Objective"]


@dataclass(frozen=True)
class MiniBatch:
    """A mini-batch of one client.

    Attributes:
        images: Network input. Shape: (B, channels, height, width).
        labels: Current labels. Shape: (B,).
        index: Positions among the client's samples. Shape: (B,).
    """

    images: Tensor
    labels: Tensor
    index: Tensor


class Objective(Protocol):
    """A local loss, which a client minimises on each mini-batch."""

    def __call__(self, network: nn.Module, batch: MiniBatch) -> Tensor:
        """The scalar to minimise."""


class LogitLoss:
    """Cross-entropy with an optional log-prior and proximal term.

    Args:
        log_prior: Offsets added to the logits. Shape: (C,).
        proximal: Strength μ of ``μ/2 · ‖w − anchor‖²`` over the parameters.
        anchor: The parameters at the start of the round, by name.
    """

    def __init__(
        self,
        log_prior: Tensor | None = None,
        proximal: float = 0.0,
        anchor: dict[str, Tensor] | None = None,
    ) -> None:
        self.log_prior, self.proximal, self.anchor = log_prior, proximal, anchor

    def of_logits(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The part of the loss that depends on logits only. Shapes: (B, C), (B,)."""
        if self.log_prior is None:
            return F.cross_entropy(logits, labels)
        return logit_adjusted_cross_entropy(logits, labels, self.log_prior)

    def __call__(self, network: nn.Module, batch: MiniBatch) -> Tensor:
        """The loss of a mini-batch."""
        loss = self.of_logits(network(batch.images), batch.labels)
        if self.proximal and self.anchor is not None:
            drift = [(p - self.anchor[n]).square().sum() for n, p in network.named_parameters()]
            loss = loss + self.proximal / 2 * torch.stack(drift).sum()
        return loss
