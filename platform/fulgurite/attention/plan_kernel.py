"""Computes the tiles of a plan, under its masks and biases.

Axes: B batch, H query heads, G key/value heads, M queries, N keys, D size of a query and key,
E size of a value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fulgurite.attention.biases import ScoreBlock, TileBias, row_shift, sum_biases
from fulgurite.attention.execution_plan import ExecutionPlan
from fulgurite.attention.kernel_choice import kernel_for
from fulgurite.attention.kernels import MathKernel, TileInputs, TileKernel, accumulator_dtype
from fulgurite.attention.spec import HeadGroup
from fulgurite.attention.tiles import Kind, Tile

__all__ = ["PlanKernel"]


@dataclass(frozen=True)
class PlanKernel:
    """Computes the tiles of a plan, under its masks and biases.

    Args:
        plan: How a call is cut.
        biases: What is added to scores or hides them.
        kernel: Computes tiles; those that it cannot do are computed by matrix products.
    """

    plan: ExecutionPlan
    biases: tuple[TileBias, ...]
    kernel: TileKernel

    @classmethod
    def on(
        cls,
        device: torch.device,
        dtype: torch.dtype,
        plan: ExecutionPlan,
        biases: tuple[TileBias, ...] = (),
    ) -> PlanKernel:
        """Return the kernel of a device for a type.

        Args:
            device: Where tiles are computed.
            dtype: Data type of query, key and value.
            plan: How a call is cut.
            biases: What is added to scores or hides them.
        """
        return cls(plan, biases, kernel_for(device, dtype, prefer=plan.kernel))

    def tile_inputs(
        self, group: HeadGroup, tile: Tile, tensors: Sequence[Tensor]
    ) -> TileInputs | None:
        """Return what a kernel needs for a tile, or None if its keys are all hidden.

        Args:
            group: Batch entries and heads.
            tile: Queries and keys.
            tensors: Query (B', H', M', D), key (B', G', N', D) and value (B', G', N', E), where
                gathered tiles are joined with more keys than the tile.
        """
        spec, (query, key, value) = self.plan.spec, tensors
        dtype, device, is_causal = query.dtype, query.device, tile.kind is Kind.CAUSAL
        block = ScoreBlock(group.batch, group.heads, tile.queries, tile.keys)
        bias, is_hidden = sum_biases(self.biases, block, dtype, device)
        if is_hidden:
            return None
        if tile.kind is Kind.BIAS or (is_causal and bias is not None):
            # a causal tile under a bias may have empty rows
            edge = group.visible.bias(tile.queries, tile.keys, dtype, device)
            bias, is_causal = edge if bias is None else bias + edge, False
        shift = None
        if spec.needs_shift:
            wide = accumulator_dtype(dtype)
            shift = row_shift(self.biases, group, tile.queries, dtype=wide, device=device)
        return TileInputs(
            query, key, value, spec.scale, is_causal=is_causal, bias=bias, softcap=spec.softcap,
            shift=shift,
        )  # fmt: skip

    def forward(self, tile: TileInputs) -> tuple[Tensor, Tensor]:
        """Attention within a tile of :meth:`tile_inputs`, and its log-sum-exp."""
        return self._kernel_of(tile).forward(tile)

    def gradients(
        self, group: HeadGroup, tile: Tile, rows: Sequence[Tensor], keys: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """What a tile adds to the gradients of query, key and value; None if it sees nothing.

        Args:
            group: Batch entries and heads.
            tile: Queries and keys.
            rows: Gradient of the result, query, result and log-sum-exp.
            keys: Key and value.
        """
        grad, query, out, lse = rows
        inputs = self.tile_inputs(group, tile, (query, *keys))
        if inputs is None:
            return None
        if inputs.bias is not None:  # rows without keys take no part
            lse = lse.masked_fill(lse == -math.inf, math.inf)
        grad, out = grad.to(query.dtype), out.to(query.dtype)
        return self._kernel_of(inputs).backward(inputs, grad, out, lse)

    def _kernel_of(self, tile: TileInputs) -> TileKernel:
        """The kernel that computes a tile: a fast one, if it can."""
        needs_math = tile.softcap is not None or tile.scale <= 0 or tile.shift is not None
        if tile.bias is not None and tile.query.device.type != "cpu":
            # fast ones would round a wider bias
            needs_math = needs_math or tile.bias.dtype != tile.query.dtype
        return MathKernel() if needs_math else self.kernel
