"""Computes a plan unit by unit: rows of the result, and of the gradients.

Axes: B batch, H query heads, G key/value heads, M queries, N keys, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fulgurite.attention.bounds import Range
from fulgurite.attention.execution_plan import ExecutionPlan, Halvings
from fulgurite.attention.inputs import AttentionInputs, GradientInputs
from fulgurite.attention.kernels import accumulator_dtype
from fulgurite.attention.merging import merge_
from fulgurite.attention.plan_kernel import PlanKernel
from fulgurite.attention.recovery import with_smaller_tiles
from fulgurite.attention.row_terms import RowTerms
from fulgurite.attention.steps import Slices, Step, column_steps, row_count, row_steps
from fulgurite.attention.transfers import Prefetcher

__all__ = ["GradientUnit", "Unit", "clear_", "commit_", "gradient_units", "units"]


class Unit(NamedTuple):
    """What one row of one task gives, which can be committed on its own.

    Attributes:
        number: Its position in the order of the plan.
        at: Where its rows belong: slices of batch, heads and queries.
        out: Attention over the keys of the task, in the type of accumulators, or in that of the
            inputs where one kernel call gave it.
        lse: Its log-sum-exp.
    """

    number: int
    at: Slices
    out: Tensor
    lse: Tensor


class GradientUnit(NamedTuple):
    """Gradients of some rows of the queries, or of some rows of keys and values.

    Attributes:
        number: Its position in the order of the plan; all of the queries come first.
        at: Where its rows belong: slices of batch, heads and tokens.
        grads: Gradients of the queries, or of keys and values, in the type of accumulators.
    """

    number: int
    at: Slices
    grads: tuple[Tensor, ...]

    @property
    def by_result(self) -> dict[int, Tensor]:
        """The gradients by their position among those of query, key and value."""
        return dict(enumerate(self.grads, start=0 if len(self.grads) == 1 else 1))


def units(
    inputs: AttentionInputs,
    plan: ExecutionPlan,
    *,
    device: torch.device | None = None,
    done: Container[int] = (),
    within: Range | None = None,
    narrow_to: torch.dtype | None = None,
) -> Iterator[Unit]:
    """Compute a plan row by row; only what a task needs is loaded.

    If the device runs out of memory, the units that are left are computed in smaller tiles.

    Args:
        inputs: Anywhere: on the device, in host memory, or memory-mapped.
        plan: How it is cut.
        device: Where kernels run; where the tensors are by default.
        done: Units that are left out.
        within: Leave out rows outside these queries.
        narrow_to: Type in which results leave another device, where nothing is merged with them
            any more; that of accumulators by default.
    """
    query, key, value = inputs[:3]
    device = device or query.device
    kernel = PlanKernel.on(device, query.dtype, plan, inputs.biases)
    prefetcher = Prefetcher.between(query.device, device)

    def compute(after: int, halvings: Halvings) -> Iterator[Unit]:
        steps = row_steps(
            [query], [key, value], plan,
            done=done, after=after, halvings=halvings, within=within,
        )  # fmt: skip
        rows = _rows(prefetcher.prefetch(steps), inputs, kernel)
        if narrow_to is not None and prefetcher.lanes is not None:
            rows = ((unit, (out.to(narrow_to), lse)) for unit, (out, lse) in rows)
        for (number, at), tensors in prefetcher.write_back(rows):
            yield Unit(number, at, *tensors)
            del tensors  # or it would take memory beside the next

    return with_smaller_tiles(compute, plan)


def gradient_units(
    saved: GradientInputs,
    plan: ExecutionPlan,
    *,
    device: torch.device | None = None,
    done: Container[int] = (),
    narrow_to: torch.dtype | None = None,
) -> Iterator[GradientUnit]:
    """Compute gradients in two passes, so that no accumulator is longer than a tile.

    The first pass goes along the queries, the second along the keys; each computes all tiles, so
    together they take twice as long as one that keeps all gradients at hand.

    Args:
        saved: What they are computed from.
        plan: How it is cut, in tiles.
        device: Where kernels run; where the tensors are by default.
        done: Units that are left out.
        narrow_to: Type in which gradients leave another device; that of accumulators by default.

    Source: docs/papers/stream_cqsa.md section 1.7; the two passes: inferred.
    """
    query = saved.inputs.query
    device = device or query.device
    kernel = PlanKernel.on(device, query.dtype, plan, saved.inputs.biases)
    prefetcher = Prefetcher.between(query.device, device)
    rows, keys, first = saved.rows, saved.keys, row_count(plan)

    def compute(after: int, halvings: Halvings) -> Iterator[GradientUnit]:
        options: dict[str, Any] = {"done": done, "after": after, "halvings": halvings}
        down = row_steps(rows, keys, plan, **options)
        across = column_steps(rows, keys, plan, first=first, **options)
        for steps, resident in ((down, len(rows)), (across, len(keys))):
            results = _gradients(prefetcher.prefetch(steps), resident, kernel)
            if narrow_to is not None and prefetcher.lanes is not None:
                results = ((at, tuple(x.to(narrow_to) for x in grads)) for at, grads in results)
            for (number, at), grads in prefetcher.write_back(results):
                yield GradientUnit(number, at, tuple(grads))
                del grads

    return with_smaller_tiles(compute, plan)


def _rows(
    steps: Iterable[tuple[Step, Sequence[Tensor]]], inputs: AttentionInputs, kernel: PlanKernel
) -> Iterator[tuple[tuple[int, Slices], tuple[Tensor, ...]]]:
    """Attention of each unit."""
    terms = RowTerms(inputs, kernel.plan)
    adds_sinks = inputs.sinks is not None and not kernel.plan.merges
    joined: tuple[Tensor, ...] | None = None
    total: tuple[Tensor, Tensor] | None = None
    size = inputs.value.shape[-1]
    loaded: Sequence[Tensor] = ()
    for step, tensors in steps:
        if step.opens:
            query, total = tensors[0], None
        if len(tensors) >= 2:
            loaded = tensors[-2:]
        tile = None
        if step.call is not None:
            queries = step.call.tile.queries
            rows = slice(queries[0] - step.span[0], queries[1] - step.span[0])
            columns = slice(*step.call.keys) if step.task.loads else slice(None)
            tensors_of_tile = query[:, :, rows], *(x[:, :, columns] for x in loaded)
            tile = kernel.tile_inputs(step.group, step.call.tile, tensors_of_tile)
            del tensors_of_tile
        if tile is not None:
            out, lse = kernel.forward(tile)
            if total is None and queries == step.span:
                # nothing to merge with yet, and if it is the last, nothing to widen
                total = out if step.closes else out.to(lse.dtype), lse
            else:
                total = total or _no_keys(query, size)
                merge_(total[0][:, :, rows], total[1][:, :, rows], out, lse)
            del out, lse
        if step.closes:
            total = total or _no_keys(query, size)
            if adds_sinks:
                total = terms.add_sinks_(step.group, step.span, *total)
            joined = _with_part(joined, total, step)
            total = None
        if step.releases:  # or these would be in memory beside those of the next task
            loaded, tile = (), None
            del tensors
        if step.ends:
            assert joined is not None
            result, joined = joined, None
            yield (step.number, step.at), result
            del result


def _gradients(
    steps: Iterable[tuple[Step, Sequence[Tensor]]], resident: int, kernel: PlanKernel
) -> Iterator[tuple[tuple[int, Slices], tuple[Tensor, ...]]]:
    """Gradients of each unit: of its queries if four tensors stay loaded, else of its keys."""
    of_rows = resident == 4
    joined: tuple[Tensor, ...] | None = None
    for step, tensors in steps:
        if step.opens:
            loaded, tensors = tensors[:resident], tensors[resident:]
            wide = accumulator_dtype(loaded[0].dtype)
            sources = loaded[1:2] if of_rows else loaded
            totals = tuple(torch.zeros_like(x, dtype=wide) for x in sources)
        if tensors:
            passing = tensors
        if step.call is not None:
            local = step.call.tile.queries if of_rows else step.call.keys
            inner = slice(local[0] - step.span[0], local[1] - step.span[0])
            of_span = [x[:, :, inner] for x in loaded]
            rows, keys = (of_span, passing) if of_rows else (passing, of_span)
            grads = kernel.gradients(step.group, step.call.tile, rows, keys)
            if grads is not None:
                for i, part in enumerate(grads[:1] if of_rows else grads[1:]):
                    totals[i][:, :, inner] += part
                del part
            del grads  # or they would take memory beside the next
        if step.closes:
            joined = _with_part(joined, totals, step)
            del totals
        if step.ends:
            assert joined is not None
            result, joined = joined, None
            yield (step.number, step.at), result
            del result


def _no_keys(query: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Attention over no keys. Shape: (B, H, M, D) -> (B, H, M, E), (B, H, M)."""
    out = query.new_empty((*query.shape[:-1], size), dtype=accumulator_dtype(query.dtype))
    lse = out.new_empty(out.shape[:-1])
    clear_(out, lse)
    return out, lse


def _with_part(
    joined: tuple[Tensor, ...] | None, part: tuple[Tensor, ...], step: Step
) -> tuple[Tensor, ...]:
    """Put a part of a unit beside those before it, so that only one is in memory twice."""
    if step.part == step.at:
        return part
    if joined is None:
        sizes = [axis.stop - axis.start for axis in step.at]
        joined = tuple(
            x.new_empty((*sizes, *x.shape[3:]), dtype=accumulator_dtype(x.dtype)) for x in part
        )
    inner = tuple(
        slice(axis.start - total.start, axis.stop - total.start)
        for axis, total in zip(step.part, step.at, strict=True)
    )
    for total, x in zip(joined, part, strict=True):
        total[inner] = x
    return joined


def clear_(out: Tensor, lse: Tensor) -> None:
    """Set attention over no keys: zeros, with log-sum-exp −inf."""
    out.zero_()
    lse.fill_(-math.inf)


def commit_(unit: Unit, out: Tensor, lse: Tensor, *, merge: bool) -> None:
    """Bring a unit into the result.

    Args:
        unit: What was computed.
        out: Result so far. Shape: (B, H, M, D).
        lse: Its log-sum-exp. Shape: (B, H, M).
        merge: Whether other units have keys for the same rows; else the rows are overwritten.
    """
    if merge:
        part = unit.out.to(out.device), unit.lse.to(lse.device)
        merge_(out[unit.at], lse[unit.at], *part)
    else:
        out[unit.at], lse[unit.at] = unit.out, unit.lse
