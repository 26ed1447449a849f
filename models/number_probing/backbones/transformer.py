"""The Transformer backbone: the platform's blocks, with rotary or learned positions.

Axes: B batch, L tokens, D width, H query heads, G key/value heads, E head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor, nn

from fulgurite.errors import ConfigError
from fulgurite.layers.transformer import Transformer, TransformerConfig, initialize
from fulgurite.models.number_probing.backbones.base import KEY, check_minimum
from fulgurite.options import PositiveFloat, PositiveInt, check_options, make_options

__all__ = ["PositionOptions", "TransformerBackbone"]


@dataclass(frozen=True)
class PositionOptions:
    """How tokens know where they are.

    Args:
        kind: ``rotary``, or ``learned``: a table that is added to the embedded tokens.
        max_length: Longest sequence that the table knows.
        rope_base: Base of the rotary wavelengths.

    Raises:
        ConfigError: A value is out of range, or none of the words.
    """

    kind: Literal["rotary", "learned"] = "rotary"
    max_length: PositiveInt = 1024
    rope_base: PositiveFloat = 10000.0

    def __post_init__(self) -> None:
        check_options(self, f"{KEY.removeprefix('--')}.positions")


class TransformerBackbone(nn.Module):
    """RMSNorm, grouped-query attention and SwiGLU blocks.

    Args:
        width: D.
        layers: Blocks.
        heads: H, a divisor of D.
        kv_heads: G, a divisor of H; H by default.
        hidden: Width inside SwiGLU; 8/3 D rounded up to a multiple of 64 by default.
        positions: How tokens know where they are.
        checkpoint: Compute blocks again in backward instead of keeping their activations.

    Shape: (B, L, D) to (B, L, D).

    Raises:
        ConfigError: The sizes do not fit together, or a sequence is longer than a table of
            positions.

    Example:
        >>> import torch
        >>> TransformerBackbone(16, layers=1, heads=4, kv_heads=2)(torch.zeros(2, 5, 16)).shape
        torch.Size([2, 5, 16])

    Source: docs/papers/number_probing.md section 2.2 (LLaMA-style, GQA); learned positions: section
        4.4; widths: inferred.
    """

    def __init__(
        self,
        width: int = 128,
        layers: int = 2,
        heads: int = 4,
        *,
        kv_heads: int | None = None,
        hidden: int | None = None,
        positions: PositionOptions = PositionOptions(),
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        check_minimum(1, width=width)
        positions = make_options(PositionOptions, positions)
        self.width, self.max_length = width, positions.max_length
        base = positions.rope_base if positions.kind == "rotary" else None
        config = TransformerConfig(
            width,
            layers,
            heads,
            kv_heads,
            hidden=hidden,
            checkpoint=checkpoint,
            rope_base=base,
        )
        self.transformer = Transformer(config)
        self.positions: nn.Embedding | None = None
        if positions.kind == "learned":
            self.positions = nn.Embedding(positions.max_length, width)
            initialize(self)

    def forward(self, x: Tensor, documents: Tensor | None = None) -> Tensor:
        """See :class:`~fulgurite.models.number_probing.backbones.base.CausalBackbone`."""
        length = x.shape[1]
        if self.positions is not None:
            if length > self.max_length:
                raise ConfigError(
                    f"A sequence has {length} tokens, and positions are learned for "
                    f"{self.max_length}.",
                    f"Set {KEY}.positions.max_length={length}, or {KEY}.positions.kind=rotary.",
                )
            x = x + self.positions.weight[:length]
        return cast("Tensor", self.transformer(x, documents))
