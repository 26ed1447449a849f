"""The tensors of a call, and what its gradients are computed from.

Axes: B batch, H query heads, G key/value heads, M queries, N keys, D size of a query and key,
E size of a value.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fulgurite.attention.biases import TileBias

__all__ = ["AttentionInputs", "GradientInputs"]


class AttentionInputs(NamedTuple):
    """The tensors of a call.

    Attributes:
        query: Shape: (B, H, M, D).
        key: Shape: (B, G, N, D).
        value: Shape: (B, G, N, E).
        biases: What is added to scores or hides them.
        sinks: Scores of a key without a value that queries see. Shape: (B or 1, H, M or 1).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    biases: tuple[TileBias, ...] = ()
    sinks: Tensor | None = None


class GradientInputs(NamedTuple):
    """What gradients are computed from.

    Attributes:
        inputs: Inputs of the forward pass.
        grad: Gradient of the result. Shape: (B, H, M, E).
        out: The result. Shape: (B, H, M, E).
        lse: Its log-sum-exp. Shape: (B, H, M).
    """

    inputs: AttentionInputs
    grad: Tensor
    out: Tensor
    lse: Tensor

    @property
    def rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What tiles need of queries: gradient, query, result and log-sum-exp."""
        return self.grad, self.inputs.query, self.out, self.lse

    @property
    def keys(self) -> tuple[Tensor, Tensor]:
        """What tiles need of keys: key and value."""
        return self.inputs.key, self.inputs.value
