"""The Transformer backbone: the platform's blocks, with documents per sequence and positions.

Axes: B batch, L tokens, D width, H query heads, G key/value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite.attention import InCore
from fulgurite.errors import ConfigError
from fulgurite.layers.transformer import Attention, Transformer, initialize
from fulgurite.models.number_probing.backbones.base import KEY, at_least

__all__ = ["TransformerBackbone"]


class _Packed(InCore):
    """PyTorch's attention that also knows documents of each sequence, as a mask (B, 1, L, L)."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool = False,
        scale: float | None = None,
        window: int | None = None,
        prefix: int = 0,
        documents: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """See :class:`~fulgurite.attention.InCore`."""
        if isinstance(documents, Tensor):
            gqa = query.shape[1] != key.shape[1]
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=documents, scale=scale, enable_gqa=gqa
            )
        return super().__call__(
            query, key, value, is_causal=is_causal, scale=scale, window=window, prefix=prefix,
            documents=documents,
        )  # fmt: skip


class _UnrotatedAttention(Attention):
    """Attention that knows no positions; something before it has to."""

    def project(self, x: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values. Shape: (B, L, D) to (B, L, H, E), then twice (B, L, G, E)."""
        parts = self.qkv(x).unflatten(-1, (-1, self.size))
        query, key, value = parts.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        return query, key, value


class TransformerBackbone(nn.Module):
    """RMSNorm, grouped-query attention and SwiGLU blocks.

    Args:
        width: D.
        layers: Blocks.
        heads: H, a divisor of D.
        kv_heads: G, a divisor of H; H by default.
        hidden: Width inside SwiGLU; 8/3 D rounded up to a multiple of 64 by default.
        positions: ``rotary``, or ``learned``: a table that is added to the embedded tokens.
        max_length: Longest sequence that the table knows.
        rope_base: Base of the rotary wavelengths.
        checkpoint: Compute blocks again in backward instead of keeping their activations.

    Shape: (B, L, D) to (B, L, D).

    Raises:
        ConfigError: The sizes do not fit together, or a sequence is longer than ``max_length``.

    Example:
        >>> TransformerBackbone(16, layers=1, heads=4, kv_heads=2)(torch.zeros(2, 5, 16)).shape
        torch.Size([2, 5, 16])

    Source: arXiv 2604.20817, card section 2.2 (LLaMA-style, GQA); learned positions: card section
        4.4; widths: inferred.
    """

    def __init__(
        self,
        width: int = 128,
        layers: int = 2,
        heads: int = 4,
        kv_heads: int | None = None,
        hidden: int | None = None,
        positions: Literal["rotary", "learned"] = "rotary",
        max_length: int = 1024,
        rope_base: float = 10000.0,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        at_least(1, width=width, max_length=max_length)
        self.width, self.max_length = width, max_length
        self.transformer = Transformer(
            width, layers, heads, kv_heads, hidden, True, None, None, checkpoint, rope_base
        )
        self.positions: nn.Embedding | None = None
        if positions == "learned":
            self.positions = nn.Embedding(max_length, width)
            for block in self.blocks:
                block.attention = _UnrotatedAttention(width, heads, kv_heads)
            initialize(self)
        for block in self.blocks:
            block.attention.attention_backend = _Packed()

    @property
    def blocks(self) -> list[Any]:
        """The blocks, in order."""
        return [*self.transformer.blocks]

    def forward(self, x: Tensor, documents: Tensor | None = None) -> Tensor:
        """See :class:`~fulgurite.models.number_probing.backbones.base.Backbone`."""
        length = x.shape[1]
        if self.positions is not None:
            if length > self.max_length:
                raise ConfigError(
                    f"A sequence has {length} tokens, and positions are learned for "
                    f"{self.max_length}.",
                    f"Set {KEY}.max_length={length}, or {KEY}.positions=rotary.",
                )
            x = x + self.positions.weight[:length]
        if documents is None:
            return cast("Tensor", self.transformer(x))
        if not all(isinstance(b.attention.attention_backend, _Packed) for b in self.blocks):
            raise ConfigError(
                "Streamed attention keeps the documents of all sequences of a batch alike apart, "
                "and these data have others in each.",
                "Use --trainer.strategy=auto.",
            )
        mask = documents[:, :, None] == documents[:, None, :]
        mask = mask & torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        # the blocks only hand it on to the backend, which takes it for a mask
        return cast("Tensor", self.transformer(x, cast("Any", mask[:, None])))
