"""The transformer over the layers of each trace.

Axes: N traces, L layers, D width, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from fulgurite.errors import ConfigError
from fulgurite.layers.transformer import Attention

__all__ = ["LayerMixing", "LayerTransformer", "positions"]


def positions(layers: int, width: int) -> Tensor:
    """Sines and cosines of the layer's number, at wavelengths from 2 pi to 10,000 times that.

    Shape: to (L, D).

    Example:
        >>> positions(2, 2)
        tensor([[0.0000, 1.0000],
                [0.8415, 0.5403]])

    Source: arXiv 1706.03762, section 3.5.
    """
    even = torch.arange(0, width, 2)
    angles = torch.arange(layers)[:, None] * 10_000.0 ** (-even / width)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :width]


class LayerMixing(nn.Module):
    """Attention between layers whose weights do not depend on who looks.

    A layer's weight is a gate of its own times a learned weight for each pair of layers and head.
    So all traces need one matrix product, and no softmax over pairs of layers: with ten layers
    that is several times faster on a CPU.

    Args:
        layers: Number of layers, L.
        width: Width, D.
        heads: Number of heads, H.

    Shape: (N, L, D), kept.

    Example:
        >>> LayerMixing(6, 16, heads=4)(torch.zeros(3, 6, 16)).shape
        torch.Size([3, 6, 16])

    Source: inferred; the attention-free transformer (arXiv 2105.14103).
    """

    def __init__(self, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.sizes = [width, width, heads]
        self.project, self.out = nn.Linear(width, sum(self.sizes)), nn.Linear(width, width)
        number = torch.arange(layers)
        lag = (number[:, None] - number).abs()
        # heads look at first over one layer to all of them
        reach = torch.logspace(0, math.log10(max(2, layers)), heads)
        self.bias = nn.Parameter(-lag / reach[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """Let the layers of each trace look at each other."""
        traces, layers, width = x.shape
        value, query, logit = self.project(x).split(self.sizes, -1)
        heads = logit.shape[-1]
        # bounded: weights may differ by a factor of e^16, and never overflow
        gate = (8 * torch.tanh(logit / 8)).exp()[..., None]  # (N, L, H, 1)
        parts = torch.cat([value.unflatten(-1, (heads, -1)) * gate, gate], -1)
        parts = parts.permute(2, 1, 0, 3).flatten(2)  # (H, L, N (D/H + 1))
        mixed = (self.bias.exp() @ parts).view(heads, layers, traces, -1)
        total = mixed[..., :-1] / mixed[..., -1:].clamp_min(1e-12)
        looked = total.permute(2, 1, 0, 3).reshape(traces, layers, width)
        return self.out(looked * query.sigmoid())  # type: ignore[no-any-return]


class _Block(nn.Module):
    """Pre-norm attention and feed-forward, each with its residual."""

    def __init__(self, attention: nn.Module, width: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = attention
        self.feed = nn.Sequential(
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(2 * width, width),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.feed(self.norm(x)))  # type: ignore[no-any-return]


class LayerTransformer(nn.Module):
    """An encoder over the layers of each trace; missing layers are tokens too.

    They carry their physics and are to be predicted, so nothing is masked.

    Args:
        layers: Number of layers, L.
        width: Width, D.
        depth: Number of blocks.
        heads: Number of attention heads.
        dropout: Dropout of attention's and the feed-forward's outputs.
        encoding: How a token knows its layer: ``sin``, ``learned``, or ``none``, which makes the
            network blind to the order of the layers.
        skip: ``long_range`` adds each block of the first half to its mirror in the second.
        mixing: How layers look at each other: ``softmax`` attention, as in the paper, or ``free``
            of it, see :class:`LayerMixing`.

    Shape: (N, L, D), kept.

    Raises:
        ConfigError: The sizes do not fit together, or a name is unknown.

    Example:
        >>> LayerTransformer(6, 16)(torch.zeros(3, 6, 16)).shape
        torch.Size([3, 6, 16])

    Source: arXiv 2604.20783 (a transformer encoder across layers); docs/papers/ice_layers.md
        section 1.4, numbers inferred; ``long_range`` after GRIT-LP (arXiv 2511.18716).
    """

    def __init__(
        self,
        layers: int,
        width: int,
        depth: int = 2,
        heads: int = 4,
        *,
        dropout: float = 0.0,
        encoding: Literal["sin", "learned", "none"] = "sin",
        skip: Literal["none", "long_range"] = "none",
        mixing: Literal["softmax", "free"] = "softmax",
    ) -> None:
        super().__init__()
        prefix = "model.init_args.network.init_args.transformer"
        if encoding not in ("sin", "learned", "none"):
            raise ConfigError(
                f"{prefix}.encoding={encoding} is unknown.", "Use sin, learned, none."
            )
        if skip not in ("none", "long_range"):
            raise ConfigError(f"{prefix}.skip={skip} is unknown.", "Use none or long_range.")
        if mixing not in ("softmax", "free"):
            raise ConfigError(f"{prefix}.mixing={mixing} is unknown.", "Use softmax or free.")
        if width % heads:
            raise ConfigError(
                f"{prefix}.heads={heads} does not divide width={width}.", "Give a divisor."
            )
        self.skip, self.encoding = skip, encoding
        self.order: Tensor | None
        if encoding == "learned":
            self.order = nn.Parameter(0.02 * torch.randn(layers, width))
        else:
            encodings = positions(layers, width) if encoding == "sin" else None
            self.register_buffer("order", encodings, persistent=False)

        def attention() -> nn.Module:
            if mixing == "free":
                return LayerMixing(layers, width, heads)
            return Attention(width, heads, is_causal=False, rope_base=None)

        self.blocks = nn.ModuleList(_Block(attention(), width, dropout) for _ in range(depth))

    def forward(self, x: Tensor, before: Sequence[Callable[[Tensor], Tensor]] = ()) -> Tensor:
        """Let the layers of each trace look at each other.

        Args:
            x: Shape: (N, L, D).
            before: Functions that are applied before the first blocks, one for each.
                Shape: (N, L, D), kept.
        """
        if self.order is not None:
            x = x + self.order
        skips: list[Tensor] = []
        half = len(self.blocks) // 2
        for number, block in enumerate(self.blocks):
            if self.skip == "long_range" and number >= len(self.blocks) - half:
                x = x + skips.pop()
            x = block(before[number](x) if number < len(before) else x)
            if number < half:
                skips.append(x)
        return x
