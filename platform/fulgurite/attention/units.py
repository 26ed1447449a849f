"""Computes a plan unit by unit: rows of the result, and of the gradients.

Axes: B batch, H query heads, G key/value heads, M queries, N keys, D head size.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from fulgurite.attention.biases import TileBias, row_shift, sum_biases
from fulgurite.attention.bounds import Range
from fulgurite.attention.execution_plan import ExecutionPlan, Halvings
from fulgurite.attention.kernel_choice import kernel_for
from fulgurite.attention.kernels import MathKernel, TileInputs, TileKernel, accumulator_dtype
from fulgurite.attention.merging import merge_
from fulgurite.attention.spec import HeadGroup
from fulgurite.attention.steps import Slices, Step, column_steps, row_count, row_steps
from fulgurite.attention.tiles import Kind
from fulgurite.attention.transfers import Prefetcher

__all__ = [
    "AttentionInputs", "GradientUnit", "Unit", "add_sinks_", "clear_", "commit_", "gradient_units",
    "ran_out_of_memory", "shift_of", "sink_scores", "sinks_of", "tile_gradients", "tile_inputs",
    "units", "with_smaller_tiles",
]  # fmt: skip


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


class _Numbered(Protocol):
    @property
    def number(self) -> int: ...


_U = TypeVar("_U", bound=_Numbered)


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
    kernel = kernel_for(device, query.dtype, prefer=plan.kernel)
    prefetcher = Prefetcher.between(query.device, device)

    def compute(after: int, halvings: Halvings) -> Iterator[Unit]:
        steps = row_steps(
            [query], [key, value], plan,
            done=done, after=after, halvings=halvings, within=within,
        )  # fmt: skip
        rows = _rows(prefetcher.prefetch(steps), inputs, plan, kernel)
        if narrow_to is not None and prefetcher.lanes is not None:
            rows = ((unit, (out.to(narrow_to), lse)) for unit, (out, lse) in rows)
        for (number, at), tensors in prefetcher.write_back(rows):
            yield Unit(number, at, *tensors)
            del tensors  # or it would take memory beside the next

    return with_smaller_tiles(compute, plan)


def gradient_units(
    grad: Tensor,
    inputs: AttentionInputs,
    out: Tensor,
    lse: Tensor,
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
        grad: Gradient of the result. Shape: (B, H, M, E).
        inputs: Inputs of the forward pass.
        out: The result. Shape: (B, H, M, E).
        lse: Its log-sum-exp. Shape: (B, H, M).
        plan: How it is cut, in tiles.
        device: Where kernels run; where the tensors are by default.
        done: Units that are left out.
        narrow_to: See :func:`units`.

    Source: card section 1.7; the two passes: inferred.
    """
    query, key, value = inputs[:3]
    device = device or query.device
    kernel = kernel_for(device, query.dtype, prefer=plan.kernel)
    prefetcher = Prefetcher.between(query.device, device)
    rows, keys, first = [grad, query, out, lse], [key, value], row_count(plan)

    def compute(after: int, halvings: Halvings) -> Iterator[GradientUnit]:
        options: dict[str, Any] = {"done": done, "after": after, "halvings": halvings}
        down = row_steps(rows, keys, plan, **options)
        across = column_steps(rows, keys, plan, first=first, **options)
        for steps, resident in ((down, 4), (across, 2)):
            results = _gradients(prefetcher.prefetch(steps), resident, inputs.biases, plan, kernel)
            if narrow_to is not None and prefetcher.lanes is not None:
                results = ((at, tuple(x.to(narrow_to) for x in grads)) for at, grads in results)
            for (number, at), grads in prefetcher.write_back(results):
                yield GradientUnit(number, at, tuple(grads))
                del grads

    return with_smaller_tiles(compute, plan)


def with_smaller_tiles(
    compute: Callable[[int, Halvings], Iterator[_U]], plan: ExecutionPlan
) -> Iterator[_U]:
    """Go on with smaller tiles where the device runs out of memory; no unit is given twice.

    Args:
        compute: Gives what comes after the unit of a number, with tiles halved so often.
        plan: What is computed.
    """
    after, halvings = -1, Halvings()
    while True:
        try:
            for unit in compute(after, halvings):
                number = unit.number
                yield unit
                del unit
                after = number
            return
        except RuntimeError as error:
            smaller = plan.smaller_tiles(halvings) if ran_out_of_memory(error) else None
            if smaller is None:
                raise
        halvings = smaller
        shares = [f"1/{1 << n} of the {name}" for name, n in halvings._asdict().items() if n]
        warnings.warn(
            f"Attention ran out of memory; going on with {plan.schedule}, at once "
            f"{' and '.join(shares)}.",
            stacklevel=2,
        )


def ran_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed; only those of a GPU's memory have a type of their own."""
    messages = ("DefaultCPUAllocator", "CUDA error: out of memory")  # the second: of pinned memory
    return isinstance(error, torch.OutOfMemoryError) or any(x in str(error) for x in messages)


def tile_inputs(
    step: Step,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: ExecutionPlan,
    biases: tuple[TileBias, ...],
) -> TileInputs | None:
    """Return what a kernel needs for a step, or None if its keys are all hidden.

    Args:
        step: With a call.
        query: Query of the call. Shape: (B', H', M', D).
        key: Shape: (B', G', N', D).
        value: Shape: (B', G', N', E).
        plan: How it is cut.
        biases: Biases of all scores.
    """
    assert step.call is not None
    spec, group, (queries, keys, kind) = plan.spec, step.group, step.call.tile
    dtype, device, is_causal = query.dtype, query.device, kind is Kind.CAUSAL
    rows = group.batch, group.heads, queries
    bias, is_hidden = sum_biases(biases, *rows, keys, dtype, device)
    if is_hidden:
        return None
    if kind is Kind.BIAS or (is_causal and bias is not None):  # together they may empty a row
        edge = group.visible.bias(queries, keys, dtype, device)
        bias, is_causal = edge if bias is None else bias + edge, False
    shift = None
    if spec.mask is not None and spec.mask.needs_shift:
        wide = accumulator_dtype(dtype)
        shift = row_shift(biases, *rows, group.visible, wide, device)
    return TileInputs(query, key, value, spec.scale, is_causal, bias, spec.softcap, shift)


def _kernel_of(tile: TileInputs, kernel: TileKernel) -> TileKernel:
    """The kernel that computes a tile: a fast one, if it can."""
    needs_math = tile.softcap is not None or tile.scale <= 0 or tile.shift is not None
    if tile.bias is not None and tile.query.device.type != "cpu":
        needs_math = needs_math or tile.bias.dtype != tile.query.dtype  # fast ones would round it
    return MathKernel() if needs_math else kernel


def _rows(
    steps: Iterable[tuple[Step, Sequence[Tensor]]],
    inputs: AttentionInputs,
    plan: ExecutionPlan,
    kernel: TileKernel,
) -> Iterator[tuple[tuple[int, Slices], tuple[Tensor, ...]]]:
    """Attention of each unit."""
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
            tile = tile_inputs(
                step, query[:, :, rows], loaded[0][:, :, columns], loaded[1][:, :, columns], plan,
                inputs.biases,
            )  # fmt: skip
        if tile is not None:
            out, lse = _kernel_of(tile, kernel).forward(tile)
            if total is None and queries == step.span:
                # nothing to merge with yet, and if it is the last, nothing to widen
                total = out if step.closes else out.to(lse.dtype), lse
            else:
                total = total or _no_keys(query, size)
                merge_(total[0][:, :, rows], total[1][:, :, rows], out, lse)
            del out, lse
        if step.closes:
            total = total or _no_keys(query, size)
            if inputs.sinks is not None and not plan.merges:
                total = add_sinks_(*total, inputs, step.group, step.span, plan)
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
    steps: Iterable[tuple[Step, Sequence[Tensor]]],
    resident: int,
    biases: tuple[TileBias, ...],
    plan: ExecutionPlan,
    kernel: TileKernel,
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
            here = [x[:, :, inner] for x in loaded]
            rows, keys = (here, passing) if of_rows else (passing, here)
            grads = tile_gradients(kernel, rows, keys, step, plan, biases)
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


def tile_gradients(
    kernel: TileKernel,
    rows: Sequence[Tensor],
    keys: Sequence[Tensor],
    step: Step,
    plan: ExecutionPlan,
    biases: tuple[TileBias, ...],
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Share of a call in the gradients of query, key and value; None if it sees nothing."""
    grad, query, out, lse = rows
    tile = tile_inputs(step, query, keys[0], keys[1], plan, biases)
    if tile is None:
        return None
    if tile.bias is not None:  # rows without keys take no part
        lse = lse.masked_fill(lse == -math.inf, math.inf)
    return _kernel_of(tile, kernel).backward(tile, grad.to(query.dtype), out.to(query.dtype), lse)


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


def add_sinks_(
    out: Tensor,
    lse: Tensor,
    inputs: AttentionInputs,
    group: HeadGroup,
    queries: Range,
    plan: ExecutionPlan,
) -> tuple[Tensor, Tensor]:
    """Let each row see its sink too, a key without a value; in place where types allow it.

    Args:
        out: Attention over all keys. Shape: (B', H', M', E).
        lse: Its log-sum-exp. Shape: (B', H', M').
        inputs: With sinks.
        group: Batch entries and heads.
        queries: Rows.
        plan: What is computed.

    Returns:
        Both, in the type of accumulators.

    Source: inferred; the sinks are those of arXiv 2508.10925.
    """
    scores = sink_scores(inputs, group, queries, plan, lse)
    weight = torch.sigmoid(lse - scores).nan_to_num_(nan=0.0)  # nan: neither keys nor a sink
    out = out.to(lse.dtype)
    out.mul_(weight[..., None])
    return out, torch.logaddexp(lse, scores, out=lse)


def sink_scores(
    inputs: AttentionInputs, group: HeadGroup, queries: Range, plan: ExecutionPlan, like: Tensor
) -> Tensor:
    """Scores of the sinks of some rows, shifted as theirs are. Shape: (B' or 1, H', M' or 1)."""
    scores = sinks_of(inputs, group, queries, like)
    shift = shift_of(inputs, group, queries, plan, like)
    return scores if shift is None else scores - shift


def sinks_of(inputs: AttentionInputs, group: HeadGroup, queries: Range, like: Tensor) -> Tensor:
    """Sinks of some rows as the user gave them. Shape: (B' or 1, H', M' or 1)."""
    assert inputs.sinks is not None
    batch = group.batch if inputs.sinks.shape[0] > 1 else slice(None)
    rows = slice(*queries) if inputs.sinks.shape[2] > 1 else slice(None)
    return inputs.sinks[batch, group.heads, rows].to(like)


def shift_of(
    inputs: AttentionInputs, group: HeadGroup, queries: Range, plan: ExecutionPlan, like: Tensor
) -> Tensor | None:
    """What was subtracted from the scores of some rows; None if nothing was."""
    if plan.spec.mask is None or not plan.spec.mask.needs_shift:
        return None
    rows = group.batch, group.heads, queries
    return row_shift(inputs.biases, *rows, group.visible, like.dtype, like.device)


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
