"""Computes a plan unit by unit: rows of the result, and of the gradients.

Axes: B batch, H query heads, G key/value heads, M queries, N keys, D head size.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fulgurite.attention.calls import At, Step, bias, column_steps, row_count, row_steps
from fulgurite.attention.kernels import TileKernel, accumulator_dtype, kernel_for
from fulgurite.attention.merging import merge_
from fulgurite.attention.planning import Plan
from fulgurite.attention.tiles import Kind, Range
from fulgurite.attention.transfers import Feed

__all__ = [
    "GradientUnit", "Unit", "clear_", "commit_", "gradient_units", "ran_out_of_memory", "units",
]  # fmt: skip

_SMALLEST = 16  # tokens below which tiles are not halved any more


class Unit(NamedTuple):
    """What one row of one task gives, which can be committed on its own.

    Attributes:
        number: Its place in the order of the plan.
        at: Where its rows belong: slices of batch, heads and queries.
        out: Attention over the keys of the task, in the type of accumulators.
        lse: Its log-sum-exp.
    """

    number: int
    at: At
    out: Tensor
    lse: Tensor


class GradientUnit(NamedTuple):
    """Gradients of some rows of the queries, or of some rows of keys and values.

    Attributes:
        number: Its place in the order of the plan; all of the queries come first.
        at: Where its rows belong: slices of batch, heads and tokens.
        grads: Of the queries, or of keys and values, in the type of accumulators.
    """

    number: int
    at: At
    grads: tuple[Tensor, ...]

    @property
    def by_result(self) -> dict[int, Tensor]:
        """The gradients by their place among those of query, key and value."""
        return dict(enumerate(self.grads, start=0 if len(self.grads) == 1 else 1))


_U = TypeVar("_U", Unit, GradientUnit)


def units(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    scale: float,
    *,
    device: torch.device | None = None,
    done: Container[int] = (),
    within: Range | None = None,
) -> Iterator[Unit]:
    """Compute a plan row by row; only what a task needs is loaded.

    If the device runs out of memory, the units that are left are computed in smaller tiles.

    Args:
        query: Anywhere: on the device, in host memory, or memory-mapped. Shape: (B, H, M, D).
        key: Shape: (B, G, N, D).
        value: Shape: (B, G, N, D).
        plan: How it is cut.
        scale: Of the scores.
        device: Where kernels run; where the tensors are by default.
        done: Units that are left out.
        within: Leave out rows outside these queries.
    """
    device = device or query.device
    kernel = kernel_for(device, query.dtype, prefer=plan.kernel)
    feed = Feed.between(query.device, device)

    def compute(after: int, halvings: int) -> Iterator[Unit]:
        steps = row_steps(
            [query], [key, value], plan,
            done=done, after=after, halvings=halvings, within=within,
        )  # fmt: skip
        for place, found in feed.behind(_rows(feed.ahead(steps), plan, kernel, scale)):
            yield Unit(*place, *found)
            del found  # or it would take memory beside the next

    return _falling_back(compute, plan)


def gradient_units(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Plan,
    scale: float,
    *,
    device: torch.device | None = None,
    done: Container[int] = (),
) -> Iterator[GradientUnit]:
    """Compute gradients in two passes, so that no accumulator is longer than a tile.

    The first pass goes along the queries, the second along the keys; each computes all tiles, so
    together they take twice as long as one that keeps all gradients at hand.

    Args:
        grad: Of the result. Shape: (B, H, M, D).
        query: Shape: (B, H, M, D).
        key: Shape: (B, G, N, D).
        value: Shape: (B, G, N, D).
        out: The result. Shape: (B, H, M, D).
        lse: Its log-sum-exp, +inf for queries without keys. Shape: (B, H, M).
        plan: How it is cut, in tiles.
        scale: Of the scores.
        device: Where kernels run; where the tensors are by default.
        done: Units that are left out.

    Source: card section 1.7; the two passes: inferred.
    """
    device = device or query.device
    kernel = kernel_for(device, query.dtype, prefer=plan.kernel)
    feed = Feed.between(query.device, device)
    rows, keys, first = [grad, query, out, lse], [key, value], row_count(plan)

    def compute(after: int, halvings: int) -> Iterator[GradientUnit]:
        options: dict[str, Any] = {"done": done, "after": after, "halvings": halvings}
        down = row_steps(rows, keys, plan, **options)
        across = column_steps(rows, keys, plan, first=first, **options)
        for steps, own in ((down, 4), (across, 2)):
            found = _gradients(feed.ahead(steps), own, plan, kernel, scale)
            for place, grads in feed.behind(found):
                yield GradientUnit(*place, tuple(grads))
                del grads

    return _falling_back(compute, plan)


def _falling_back(compute: Callable[[int, int], Iterator[_U]], plan: Plan) -> Iterator[_U]:
    """Go on with smaller tiles where the device runs out of memory; no unit is given twice."""
    after, halvings = -1, 0
    longest = max(*plan.tile, plan.visible.keys // max(1, plan.chunks) if plan.chunks else 0)
    while True:
        try:
            for unit in compute(after, halvings):
                number = unit.number
                yield unit
                del unit
                after = number
            return
        except RuntimeError as error:
            if not ran_out_of_memory(error) or longest >> halvings <= _SMALLEST:
                raise
        halvings += 1
        warnings.warn(
            f"Attention ran out of memory; going on with {plan.schedule} in tiles "
            f"1/{1 << halvings} as high and wide.",
            stacklevel=2,
        )


def ran_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed; on the CPU PyTorch has no type of its own for that."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _rows(
    steps: Iterable[tuple[Step, Sequence[Tensor]]], plan: Plan, kernel: TileKernel, scale: float
) -> Iterator[tuple[tuple[int, At], tuple[Tensor, ...]]]:
    """Attention of each unit, in the type of accumulators."""
    parts: list[tuple[Tensor, ...]] = []
    total: tuple[Tensor, Tensor] | None = None
    for step, tensors in steps:
        if step.opens:
            query, total = tensors[0], None
        if len(tensors) >= 2:
            keys, values = tensors[-2:]
        if step.call is not None:
            call = step.call
            rows = slice(call.queries[0] - step.span[0], call.queries[1] - step.span[0])
            columns = slice(*call.keys) if step.task.loads else slice(None)
            out, lse = kernel.forward(
                query[:, :, rows],
                keys[:, :, columns],
                values[:, :, columns],
                is_causal=call.kind is Kind.CAUSAL,
                scale=scale,
                bias=bias(call, plan.visible, query),
            )
            if total is None and call.queries == step.span:
                total = out.to(lse.dtype), lse  # nothing to merge with yet
            else:
                total = total or _nothing(query)
                merge_(total[0][:, :, rows], total[1][:, :, rows], out, lse)
            del out, lse
        if step.closes:
            parts.append(total or _nothing(query))
            total = None
        if step.ends:
            yield (step.number, step.at), _taken(parts)


def _gradients(
    steps: Iterable[tuple[Step, Sequence[Tensor]]],
    own: int,
    plan: Plan,
    kernel: TileKernel,
    scale: float,
) -> Iterator[tuple[tuple[int, At], tuple[Tensor, ...]]]:
    """Gradients of each unit: of its queries if four tensors stay loaded, else of its keys."""
    of_rows = own == 4
    parts: list[tuple[Tensor, ...]] = []
    for step, tensors in steps:
        if step.opens:
            held, tensors = tensors[:own], tensors[own:]
            wide = accumulator_dtype(held[0].dtype)
            kept = held[1:2] if of_rows else held
            totals = tuple(torch.zeros_like(x, dtype=wide) for x in kept)
        if tensors:
            passing = tensors
        if step.call is not None:
            call = step.call
            local = call.queries if of_rows else call.keys
            inner = slice(local[0] - step.span[0], local[1] - step.span[0])
            here = [x[:, :, inner] for x in held]
            rows, keys = (here, passing) if of_rows else (passing, here)
            found = tile_gradients(kernel, rows, keys, step, plan, scale)
            for i, part in enumerate(found[:1] if of_rows else found[1:]):
                totals[i][:, :, inner] += part
            del found, part  # or they would take memory beside the next
        if step.closes:
            parts.append(totals)
            del totals
        if step.ends:
            yield (step.number, step.at), _taken(parts)


def tile_gradients(
    kernel: TileKernel,
    rows: Sequence[Tensor],
    keys: Sequence[Tensor],
    step: Step,
    plan: Plan,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Share of a call in the gradients of query, key and value."""
    assert step.call is not None
    grad, query, out, lse = rows
    key, value = keys
    return kernel.backward(
        grad.to(query.dtype), query, key, value, out.to(query.dtype), lse,
        is_causal=step.call.kind is Kind.CAUSAL, scale=scale,
        bias=bias(step.call, plan.visible, query),
    )  # fmt: skip


def _nothing(query: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over no keys. Shape: (B, H, M, D) -> (B, H, M, D), (B, H, M)."""
    out = torch.empty_like(query, dtype=accumulator_dtype(query.dtype))
    lse = out.new_empty(out.shape[:-1])
    clear_(out, lse)
    return out, lse


def _taken(parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Join the parts of a unit along its tokens, and forget them."""
    joined = parts[0]
    if len(parts) > 1:
        joined = tuple(torch.cat(list(part), dim=2) for part in zip(*parts, strict=True))
    parts.clear()
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
