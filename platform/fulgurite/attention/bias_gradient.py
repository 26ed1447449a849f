"""The gradient of what is added to the scores, in a pass of its own, tile by tile.

Axes: B batch, H query heads, G key/value heads, M queries, N keys, E size of a value.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fulgurite.attention.bounds import Range
from fulgurite.attention.execution_plan import ExecutionPlan, Halvings
from fulgurite.attention.inputs import GradientInputs
from fulgurite.attention.kernels import MathKernel, accumulator_dtype
from fulgurite.attention.plan_kernel import PlanKernel
from fulgurite.attention.recovery import with_smaller_tiles
from fulgurite.attention.spec import AttentionSpec, HeadGroup
from fulgurite.attention.tiles import Tile, tiles

__all__ = ["bias_gradient"]

_DEFAULT_BUDGET = 2**26  # bytes of a tile's scores where there is no budget
_SMALLEST_SIDE = 16
# Scores, their gradient, the weights, the bias with a copy, and the sum
_COPIES = 6


class _BiasPiece(NamedTuple):
    """The gradient of a rectangle of the bias.

    Attributes:
        number: In the order in which they are computed.
        at: Where it belongs.
        total: In the type of accumulators.
    """

    number: int
    at: tuple[slice, slice, slice, slice]
    total: Tensor


@dataclass(frozen=True)
class _BiasGradient:
    """The gradient of a learned bias, piece by piece.

    Attributes:
        saved: What gradients are computed from.
        bias: The learned tensor.
        kernel: Gives the tiles; matrix products compute them.
        device: Where kernels run.
        side: Side of the tiles.
    """

    saved: GradientInputs
    bias: Tensor
    kernel: PlanKernel
    device: torch.device
    side: int

    def pieces(self, after: int, halvings: Halvings) -> Iterator[_BiasPiece]:
        """Yield the gradients of rectangles of the bias behind the one of a number, each whole."""
        spec, bias, side = self.kernel.plan.spec, self.bias, self.side
        rows = _ranges(spec.queries, side if bias.shape[2] > 1 else spec.queries)
        columns = _ranges(spec.keys, side if bias.shape[3] > 1 else spec.keys)
        wide = accumulator_dtype(spec.dtype)
        rectangles = itertools.product(_sharing_groups(spec, bias), rows, columns)
        for number, (groups, queries, keys) in enumerate(rectangles):
            if number <= after:
                continue
            index = _bias_index(bias, groups[0], queries, keys)
            total = torch.zeros(bias[index].shape, dtype=wide, device=self.device)
            sides = max(1, side >> halvings.queries), max(1, side >> halvings.keys)
            for group in groups:
                self._add_group_(total, group, (queries, keys), sides)
            yield _BiasPiece(number, index, total)

    def _add_group_(
        self,
        total: Tensor,
        group: HeadGroup,
        rectangle: tuple[Range, Range],
        sides: tuple[int, int],
    ) -> None:
        """Add what one group gives to the gradient of a rectangle of the bias."""
        (queries, keys), (height, width) = rectangle, sides
        shape = self.bias.shape
        shared = [axis for axis in range(4) if shape[axis] == 1]
        for top, first_key in itertools.product(range(*queries, height), range(*keys, width)):
            rows = top, min(top + height, queries[1])
            columns = first_key, min(first_key + width, keys[1])
            for tile in tiles(rows, columns, group.visible):
                part = self._tile_gradient(group, tile)
                if part is None:
                    continue
                part = part.sum(shared, keepdim=True) if shared else part
                inner_rows = slice(tile.queries[0] - queries[0], tile.queries[1] - queries[0])
                inner_keys = slice(tile.keys[0] - keys[0], tile.keys[1] - keys[0])
                total[
                    :,
                    :,
                    inner_rows if shape[2] > 1 else slice(None),
                    inner_keys if shape[3] > 1 else slice(None),
                ] += part

    def _tile_gradient(self, group: HeadGroup, tile: Tile) -> Tensor | None:
        """Gradient of the scores of a tile; None if all are hidden. Shape: (B', H', M', N')."""
        rows = group.batch, group.heads, slice(*tile.queries)
        columns = group.batch, group.kv_heads, slice(*tile.keys)
        grad, query, out, lse = (x[rows].to(self.device) for x in self.saved.rows)
        key, value = (x[columns].to(self.device) for x in self.saved.keys)
        inputs = self.kernel.tile_inputs(group, tile, (query, key, value))
        if inputs is None:
            return None
        lse = lse.masked_fill(lse == -math.inf, math.inf)
        return MathKernel().bias_gradient(inputs, grad, out, lse)


def bias_gradient(
    saved: GradientInputs, bias: Tensor, plan: ExecutionPlan, device: torch.device | None
) -> Tensor:
    """Return the gradient of the bias.

    A rectangle of the bias gets its whole gradient, over all batch entries and heads that share
    it, before the next is begun, so that nothing is summed in a half type and only a tile is held
    beside the result. It costs a pass over all scores by matrix products.

    Args:
        saved: What gradients are computed from.
        bias: The learned tensor. Shape: (B or 1, H or 1, M or 1, N or 1).
        plan: Plan of the gradients.
        device: Where kernels run; where the tensors are by default.

    Returns:
        In the shape and type of ``bias``.

    Source: docs/papers/stream_cqsa.md section 1.7 (dS); the order: inferred.
    """
    if plan.spec.is_empty:
        return torch.zeros_like(bias)
    query, side = saved.inputs.query, _tile_side(plan)
    device = device or query.device
    kernel = PlanKernel.on(device, query.dtype, plan, saved.inputs.biases)
    gradient = _BiasGradient(saved, bias, kernel, device, side)
    result = torch.zeros_like(bias, memory_format=torch.contiguous_format)
    tiled = replace(plan, cut=plan.cut._replace(schedule="rect", tile=(side, side)))
    for piece in with_smaller_tiles(gradient.pieces, tiled):
        result[piece.at] = piece.total.to(result)
    return result


def _tile_side(plan: ExecutionPlan) -> int:
    """Side of the tiles whose scores fit the budget, for one key/value head."""
    spec, budget = plan.spec, plan.budget or _DEFAULT_BUDGET
    wide = accumulator_dtype(spec.dtype).itemsize
    heads = spec.heads // spec.kv_heads
    side = math.isqrt(budget // (_COPIES * heads * wide))
    return min(max(side, _SMALLEST_SIDE), max(spec.queries, spec.keys, 1))


def _ranges(stop: int, step: int) -> list[Range]:
    return [(begin, min(begin + step, stop)) for begin in range(0, stop, step)]


def _sharing_groups(spec: AttentionSpec, bias: Tensor) -> list[list[HeadGroup]]:
    """Groups of one entry and one key/value head, those together that share a bias."""
    by_bias: dict[tuple[int, int], list[HeadGroup]] = {}
    for group in spec.groups(1, 1):
        entry = group.batch.start if bias.shape[0] > 1 else 0
        head = group.kv_heads.start if bias.shape[1] > 1 else 0
        by_bias.setdefault((entry, head), []).append(group)
    return list(by_bias.values())


def _bias_index(
    bias: Tensor, group: HeadGroup, queries: Range, keys: Range
) -> tuple[slice, slice, slice, slice]:
    full_axis = slice(None)
    return (
        group.batch if bias.shape[0] > 1 else full_axis,
        group.heads if bias.shape[1] > 1 else full_axis,
        slice(*queries) if bias.shape[2] > 1 else full_axis,
        slice(*keys) if bias.shape[3] > 1 else full_axis,
    )
