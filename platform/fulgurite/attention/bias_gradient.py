"""The gradient of what is added to the scores, in a pass of its own, tile by tile.

Axes: B batch, H query heads, G key/value heads, M queries, N keys, E size of a value.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fulgurite.attention.bounds import Range
from fulgurite.attention.execution_plan import ExecutionPlan, Halvings
from fulgurite.attention.kernels import MathKernel, accumulator_dtype
from fulgurite.attention.schedules import Task
from fulgurite.attention.spec import HeadGroup
from fulgurite.attention.steps import KernelCall, Step
from fulgurite.attention.tiles import tiles
from fulgurite.attention.units import AttentionInputs, tile_inputs, with_smaller_tiles

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


def bias_gradient(
    grad: Tensor,
    inputs: AttentionInputs,
    out: Tensor,
    lse: Tensor,
    bias: Tensor,
    plan: ExecutionPlan,
    device: torch.device,
) -> Tensor:
    """Return the gradient of the bias.

    A rectangle of the bias gets its whole gradient, over all batch entries and heads that share
    it, before the next is begun, so that nothing is summed in a half type and only a tile is held
    beside the result. It costs a pass over all scores by matrix products.

    Args:
        grad: Gradient of the result. Shape: (B, H, M, E).
        inputs: Inputs of the forward pass.
        out: The result. Shape: (B, H, M, E).
        lse: Its log-sum-exp. Shape: (B, H, M).
        bias: The learned tensor. Shape: (B or 1, H or 1, M or 1, N or 1).
        plan: Plan of the gradients.
        device: Where kernels run.

    Returns:
        In the shape and type of ``bias``.

    Source: card section 1.7 (dS); the order: inferred.
    """
    spec = plan.spec
    side = _tile_side(plan)
    if spec.is_empty:
        return torch.zeros_like(bias)
    result = torch.zeros_like(bias, memory_format=torch.contiguous_format)
    rows = _ranges(spec.queries, side if bias.shape[2] > 1 else spec.queries)
    columns = _ranges(spec.keys, side if bias.shape[3] > 1 else spec.keys)
    wide = accumulator_dtype(inputs.query.dtype)

    def compute(after: int, halvings: Halvings) -> Iterator[_BiasPiece]:
        places = itertools.product(_sharing_groups(plan, bias), rows, columns)
        for number, (groups, queries, keys) in enumerate(places):
            if number <= after:
                continue
            index = _bias_index(bias, groups[0], queries, keys)
            total = torch.zeros(bias[index].shape, dtype=wide, device=device)
            for group in groups:
                _add_group_(
                    total, grad, inputs, out, lse, bias, plan, group, (queries, keys),
                    (max(1, side >> halvings.queries), max(1, side >> halvings.keys)), device,
                )  # fmt: skip
            yield _BiasPiece(number, index, total)

    tiled = replace(plan, cut=plan.cut._replace(schedule="rect", tile=(side, side)))
    for piece in with_smaller_tiles(compute, tiled):
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


def _sharing_groups(plan: ExecutionPlan, bias: Tensor) -> list[list[HeadGroup]]:
    """Groups of one entry and one key/value head, those together that share a bias."""
    by_bias: dict[tuple[int, int], list[HeadGroup]] = {}
    for group in plan.spec.groups(1, 1):
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


def _add_group_(
    total: Tensor,
    grad: Tensor,
    inputs: AttentionInputs,
    out: Tensor,
    lse: Tensor,
    bias: Tensor,
    plan: ExecutionPlan,
    group: HeadGroup,
    rectangle: tuple[Range, Range],
    sides: tuple[int, int],
    device: torch.device,
) -> None:
    """Add what one group gives to the gradient of a rectangle of the bias."""
    queries, keys = rectangle
    kernel = MathKernel()
    height, width = sides
    for top, first_key in itertools.product(range(*queries, height), range(*keys, width)):
        rows, columns = (
            (top, min(top + height, queries[1])),
            (first_key, min(first_key + width, keys[1])),
        )
        for tile in tiles(rows, columns, group.visible):
            at = group.batch, group.heads, slice(*tile.queries)
            there = group.batch, group.kv_heads, slice(*tile.keys)
            step = Step(
                0,
                group,
                at,
                at,
                tile.queries,
                KernelCall(tile, tile.keys),
                Task(()),
                True,
                True,
                True,
            )
            query = inputs.query[at].to(device)
            key, value = inputs.key[there].to(device), inputs.value[there].to(device)
            record = tile_inputs(step, query, key, value, plan, inputs.biases)
            if record is None:
                continue
            row_lse = lse[at].to(device)
            row_lse = row_lse.masked_fill(row_lse == -math.inf, math.inf)
            part = kernel.bias_gradient(record, grad[at].to(device), out[at].to(device), row_lse)
            shared = [axis for axis in range(4) if bias.shape[axis] == 1]
            part = part.sum(shared, keepdim=True) if shared else part
            inner = (slice(tile.queries[0] - queries[0], tile.queries[1] - queries[0]),
                     slice(tile.keys[0] - keys[0], tile.keys[1] - keys[0]))  # fmt: skip
            total[
                :,
                :,
                inner[0] if bias.shape[2] > 1 else slice(None),
                inner[1] if bias.shape[3] > 1 else slice(None),
            ] += part
