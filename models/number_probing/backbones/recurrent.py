"""Backbones whose state is a matrix per head: Gated DeltaNet and Mamba-2.

Axes: B batch, L tokens, D width, H heads, K keys, V values.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite.errors import ConfigError
from fulgurite.models.number_probing.backbones.base import (
    EPS,
    KEY,
    CausalConv,
    MixerBlock,
    check_minimum,
    draw_weights,
)
from fulgurite.models.number_probing.backbones.recurrences import delta_rule, linear_recurrence

__all__ = ["GatedDeltaNetBackbone", "Mamba2Backbone"]


class _Decay(nn.Module):
    """Logarithm of each head's decay, −softplus(x + bias) e^a, and the step softplus(x + bias).

    Shape: (B, L, H) to twice (B, H, L), in float32 at least.

    Source: Mamba-2, arXiv 2405.21060, section 7; initial values as in its code.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.log_rate = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        step = torch.empty(heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # softplus(bias) = step

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # sums of logarithms over a chunk lose too much in half precision
        x = x if x.dtype == torch.float64 else x.float()
        step = F.softplus(x + self.bias).transpose(1, 2)
        return -step * self.log_rate.exp()[:, None], step


class _DeltaMixer(nn.Module):
    """Shape: (B, L, D) to (B, L, D)."""

    def __init__(
        self, width: int, heads: int, *, size: int, expand: int, conv: int, chunk: int
    ) -> None:
        super().__init__()
        self.heads, self.chunk = heads, chunk
        self.sizes = [heads * size, heads * size, heads * size * expand]
        self.qkv = nn.Linear(width, sum(self.sizes), bias=False)
        self.conv = CausalConv(sum(self.sizes), conv)
        self.rates = nn.Linear(width, 2 * heads, bias=False)
        self.decay = _Decay(heads)
        self.gate = nn.Linear(width, self.sizes[2], bias=False)
        self.norm = nn.RMSNorm(size * expand, EPS)
        self.out = nn.Linear(self.sizes[2], width, bias=False)

    def forward(self, x: Tensor, documents: Tensor | None = None) -> Tensor:
        mixed = F.silu(self.conv(self.qkv(x), documents))
        query, key, value = (
            part.view(*x.shape[:2], self.heads, -1).transpose(1, 2)
            for part in torch.split(mixed, self.sizes, -1)
        )
        rate, correct = self.rates(x).chunk(2, -1)
        log_decay, _ = self.decay(rate)
        query = F.normalize(query, dim=-1) / math.sqrt(query.shape[-1])
        key = F.normalize(key, dim=-1)
        beta = correct.sigmoid().transpose(1, 2)
        dtype = log_decay.dtype  # float32 at least: the system is solved in it
        with torch.autocast(x.device.type, enabled=False):
            output = delta_rule(
                query.to(dtype), key.to(dtype), value.to(dtype), log_decay, beta=beta.to(dtype),
                documents=documents, chunk=self.chunk,
            )  # fmt: skip
        output = self.norm(output.transpose(1, 2).to(x.dtype)).flatten(2)
        return cast("Tensor", self.out(output * F.silu(self.gate(x))))


class GatedDeltaNetBackbone(nn.Module):
    """Gated DeltaNet: a state per head that forgets, and corrects what it remembers of a key.

    Args:
        width: D.
        layers: Blocks.
        heads: H.
        head_size: K; D/H by default.
        expand: V in units of K.
        conv: Taps of the short convolution.
        hidden: Width inside the two layers of a block; 0 for none.
        chunk: Tokens that are computed at once; the result does not depend on it.

    Shape: (B, L, D) to (B, L, D).

    Raises:
        ConfigError: The sizes do not fit together.

    Example:
        >>> GatedDeltaNetBackbone(16, layers=1, heads=2)(torch.zeros(2, 5, 16)).shape
        torch.Size([2, 5, 16])

    Source: arXiv 2412.06464, section 3.4 and figure 1; docs/papers/number_probing.md section 6;
    sizes: inferred.
    """

    traces_one_length = True

    def __init__(
        self,
        width: int = 128,
        layers: int = 2,
        heads: int = 4,
        *,
        head_size: int | None = None,
        expand: int = 1,
        conv: int = 4,
        hidden: int | None = None,
        chunk: int = 32,
    ) -> None:
        super().__init__()
        check_minimum(1, width=width, layers=layers, heads=heads, expand=expand, chunk=chunk)
        size = width // heads if head_size is None else head_size
        check_minimum(1, head_size=size)
        self.width = width
        mixers = [
            _DeltaMixer(width, heads, size=size, expand=expand, conv=conv, chunk=chunk)
            for _ in range(layers)
        ]
        blocks = [MixerBlock(width, mixer, hidden) for mixer in mixers]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(width, EPS)
        downs = [block.mlp.down for block in blocks if block.mlp is not None]
        draw_weights(self, [*(mixer.out for mixer in mixers), *downs])

    def forward(self, x: Tensor, documents: Tensor | None = None) -> Tensor:
        """See :class:`~fulgurite.models.number_probing.backbones.base.CausalBackbone`."""
        for block in self.blocks:
            x = block(x, documents)
        return cast("Tensor", self.norm(x))


class _Mamba2Mixer(nn.Module):
    """Shape: (B, L, D) to (B, L, D)."""

    def __init__(
        self, width: int, inner: int, *, size: int, state: int, conv: int, chunk: int
    ) -> None:
        super().__init__()
        self.heads, self.chunk = inner // size, chunk
        self.sizes = [inner, state, state]
        self.inputs = nn.Linear(width, inner + sum(self.sizes), bias=False)
        self.steps = nn.Linear(width, self.heads, bias=False)
        self.conv = CausalConv(sum(self.sizes), conv)
        self.decay = _Decay(self.heads)
        self.skip = nn.Parameter(torch.ones(self.heads))
        self.norm = nn.RMSNorm(inner, EPS)
        self.out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, documents: Tensor | None = None) -> Tensor:
        gate, mixed = self.inputs(x).split([self.sizes[0], sum(self.sizes)], -1)
        mixed = F.silu(self.conv(mixed, documents))
        value, key, query = torch.split(mixed, self.sizes, -1)
        value = value.view(*x.shape[:2], self.heads, -1).transpose(1, 2)
        log_decay, step = self.decay(self.steps(x))
        dtype = log_decay.dtype
        with torch.autocast(x.device.type, enabled=False):
            output = linear_recurrence(
                query[:, None].to(dtype), key[:, None].to(dtype), value.to(dtype) * step[..., None],
                log_decay, documents=documents, chunk=self.chunk,
            )  # fmt: skip
            output = output + value * self.skip[:, None, None]
        output = output.transpose(1, 2).flatten(2).to(x.dtype)
        return cast("Tensor", self.out(self.norm(output * F.silu(gate))))


class Mamba2Backbone(nn.Module):
    """Mamba-2: a state per head that forgets at a rate that each token chooses.

    Args:
        width: D.
        layers: Blocks, without further layers between them.
        expand: Inner width in units of D.
        head_size: V; divides the inner width.
        state_size: K, shared by all heads.
        conv: Taps of the short convolution.
        chunk: Tokens that are computed at once; the result does not depend on it.

    Shape: (B, L, D) to (B, L, D).

    Raises:
        ConfigError: The sizes do not fit together.

    Example:
        >>> Mamba2Backbone(16, layers=1, head_size=8)(torch.zeros(2, 5, 16)).shape
        torch.Size([2, 5, 16])

    Source: arXiv 2405.21060, section 7; sizes: inferred.
    """

    traces_one_length = True

    def __init__(
        self,
        width: int = 128,
        layers: int = 4,
        expand: int = 2,
        *,
        head_size: int = 64,
        state_size: int = 64,
        conv: int = 4,
        chunk: int = 32,
    ) -> None:
        super().__init__()
        check_minimum(1, width=width, layers=layers, expand=expand, head_size=head_size)
        check_minimum(1, state_size=state_size, chunk=chunk)
        inner = width * expand
        if inner % head_size:
            raise ConfigError(
                f"The inner width {inner} cannot be divided into heads of {head_size}.",
                f"Make {KEY}.head_size a divisor of {KEY}.width times expand.",
            )
        self.width = width
        mixers = [
            _Mamba2Mixer(width, inner, size=head_size, state=state_size, conv=conv, chunk=chunk)
            for _ in range(layers)
        ]
        self.blocks = nn.ModuleList(MixerBlock(width, mixer, hidden=0) for mixer in mixers)
        self.norm = nn.RMSNorm(width, EPS)
        draw_weights(self, [mixer.out for mixer in mixers])

    def forward(self, x: Tensor, documents: Tensor | None = None) -> Tensor:
        """See :class:`~fulgurite.models.number_probing.backbones.base.CausalBackbone`."""
        for block in self.blocks:
            x = block(x, documents)
        return cast("Tensor", self.norm(x))
