"""Runs a plan on whole tensors, forward and backward, with gradients for autograd.

Axes: B batch, H query heads, G key/value heads, M queries, N keys, D head size.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor

from fulgurite.attention.calls import Step, column_count, row_count, row_steps, spread
from fulgurite.attention.kernels import TileKernel, accumulator_dtype, kernel_for
from fulgurite.attention.planning import Plan, format_bytes, smaller
from fulgurite.attention.progress import LONG, bar
from fulgurite.attention.ranks import (
    broadcast_columns_,
    broadcast_rows_,
    merge_shards_,
    sum_shards_,
)
from fulgurite.attention.transfers import Feed
from fulgurite.attention.units import (
    clear_,
    commit_,
    gradient_units,
    ran_out_of_memory,
    tile_gradients,
    units,
)
from fulgurite.errors import ConfigError

_T = TypeVar("_T")

__all__ = ["StreamedAttention"]


class StreamedAttention(torch.autograd.Function):
    """Exact attention by a plan; backward runs the same tasks against the saved out and lse.

    Source: card sections 1.6 to 1.8.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: Plan,
        scale: float,
        device: torch.device | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return out (B, H, M, D) in the type of query and lse (B, H, M)."""
        device = device or query.device
        (out, lse), plan = _retrying(
            plan, lambda plan: _forward(query, key, value, plan, scale, device)
        )
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.plan, ctx.scale, ctx.device = plan, scale, device
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)  # it would make zeros for the gradient of lse
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value."""
        if grads[0] is None:
            return (None,) * 6
        query, key, value, out, lse = ctx.saved_tensors
        rows = (grads[0].to(query.dtype), query, out, lse)
        found, _ = _retrying(
            ctx.plan, lambda plan: _backward(rows, (key, value), plan, ctx.scale, ctx.device)
        )
        return (*found, None, None, None)


def _retrying(plan: Plan, work: Callable[[Plan], _T]) -> tuple[_T, Plan]:
    """Do work, with a smaller plan if the device runs out of memory; return the plan that did.

    Nothing of a failed attempt is in the result, since results are made anew.
    """
    while True:
        try:
            return work(plan), plan
        except RuntimeError as error:
            try:
                if not ran_out_of_memory(error) or plan.share != (0, 1):
                    raise  # ranks would plan differently and wait for each other forever
                plan = smaller(plan)
            except ConfigError:
                raise error from None
            warnings.warn(
                f"Attention ran out of memory; going on with {plan.schedule}, at most "
                f"{format_bytes(plan.peak_bytes)} at once.",
                stacklevel=2,
            )


def _forward(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Out (B, H, M, D) in the type of query and lse (B, H, M)."""
    is_direct = plan.is_direct and device == query.device
    kernel = kernel_for(device, query.dtype, prefer=plan.kernel)
    is_causal = plan.visible.is_causal
    if is_direct and plan.schedule == "whole":
        return kernel.forward(query, key, value, is_causal=is_causal, scale=scale)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty(query.shape[:-1], dtype=accumulator_dtype(query.dtype))
    if is_direct:
        for batch, heads, shared in plan.head_slices():
            own = query[batch, heads], key[batch, shared], value[batch, shared]
            out[batch, heads], lse[batch, heads] = kernel.forward(
                *own, is_causal=is_causal, scale=scale
            )
        return out, lse
    if plan.merges and plan.share != (0, 1):
        merge_shards_(
            lambda span: units(query, key, value, plan, scale, device=device, within=span),
            plan, out, lse,
        )  # fmt: skip
        return out, lse
    total = out
    if plan.merges and out.dtype != lse.dtype:
        total = torch.empty_like(out, dtype=lse.dtype)
    clear_(total, lse)
    with _bar(plan, row_count) as advance:
        for unit in units(query, key, value, plan, scale, device=device):
            commit_(unit, total, lse, merge=plan.merges)
            advance(unit.out.shape[2])
            del unit  # or it would take memory beside the next
    if plan.share != (0, 1):
        broadcast_rows_(plan, out, lse)
    if total is not out:
        out.copy_(total)
    return out, lse


def _backward(
    rows: tuple[Tensor, ...],
    keys: tuple[Tensor, ...],
    plan: Plan,
    scale: float,
    device: torch.device,
) -> tuple[Tensor, ...]:
    """Gradients of query, key and value, in their types.

    Args:
        rows: Gradient of the result, query, result and log-sum-exp.
        keys: Key and value.
        plan: How it is cut.
        scale: Of the scores.
        device: Where kernels run.
    """
    is_direct = plan.is_direct and device == rows[1].device
    kernel = kernel_for(device, rows[1].dtype, prefer=plan.kernel)
    is_causal = plan.visible.is_causal
    if is_direct and plan.schedule == "whole":
        return kernel.backward(*_in_order(rows, keys), is_causal=is_causal, scale=scale)
    results = tuple(torch.empty_like(x) for x in (rows[1], *keys))
    if is_direct:
        for batch, heads, shared in plan.head_slices():
            own = [x[batch, heads] for x in rows], [x[batch, shared] for x in keys]
            found = kernel.backward(*_in_order(*own), is_causal=is_causal, scale=scale)
            for result, part, at in zip(results, found, (heads, shared, shared), strict=True):
                result[batch, at] = part
            del found, part  # or they would take memory beside the next
    elif plan.passes == 2:
        units_ = gradient_units(*_in_order(rows, keys), plan, scale, device=device)
        with _bar(plan, lambda plan: row_count(plan) + column_count(plan)) as advance:
            for unit in units_:
                for i, part in unit.by_result.items():
                    results[i][unit.at] = part
                advance(part.shape[2])
                del unit, part
        if plan.share != (0, 1):
            broadcast_rows_(plan, results[0])
            broadcast_columns_(plan, *results[1:])
    else:
        _accumulate(rows, keys, results, plan, scale, device)
    return results


def _in_order(
    rows: Sequence[Tensor], keys: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradient, query, key, value, result and log-sum-exp."""
    return rows[0], rows[1], keys[0], keys[1], rows[2], rows[3]


def _accumulate(
    rows: tuple[Tensor, ...],
    keys: tuple[Tensor, ...],
    results: tuple[Tensor, ...],
    plan: Plan,
    scale: float,
    device: torch.device,
) -> None:
    """Gradients in one pass, which adds to those of all keys as it goes along the queries."""
    kernel = kernel_for(device, rows[1].dtype, prefer=plan.kernel)
    in_place = plan.adds_in_place and device == rows[1].device
    feed = Feed.between(rows[1].device, device)
    wide = rows[3].dtype
    with _bar(plan, row_count) as advance:
        for batch, heads, shared in plan.head_slices():
            at = ((batch, heads), (batch, shared), (batch, shared))
            parts = [result[place] for result, place in zip(results, at, strict=True)]
            # a row of tiles has the whole gradient of its queries; only those of keys add up
            sums = [
                x.zero_() if in_place else torch.zeros_like(x, dtype=wide, device=device)
                for x in (parts if plan.merges else parts[1:])
            ]
            own_rows, own_keys = [x[batch, heads] for x in rows], [x[batch, shared] for x in keys]
            steps = row_steps(own_rows, own_keys, plan.of_heads(batch, heads, shared))
            for step, tensors in feed.ahead(steps):
                span = slice(*step.span)
                if step.opens:
                    held, tensors = tensors[:4], tensors[4:]
                    if plan.merges:
                        row_sum = sums[0][:, :, span]
                    else:
                        row_sum = torch.zeros_like(held[1], dtype=wide)
                if tensors:
                    passing = tensors
                if step.call is not None:
                    _add_(row_sum, sums[-2:], held, passing, step, plan, kernel, scale)
                if step.closes:
                    if not plan.merges:
                        parts[0][:, :, span] = row_sum
                    del row_sum
                    advance(span.stop - span.start)
            for result, total in zip(parts[-len(sums) :], sums, strict=True):
                if plan.share != (0, 1):
                    sum_shards_(total, result, plan)
                elif not in_place:
                    result.copy_(total)
            del sums, total  # or they would take memory beside the next
    if plan.share != (0, 1) and not plan.merges:
        broadcast_rows_(plan, results[0])


def _add_(
    row_sum: Tensor,
    key_sums: Sequence[Tensor],
    held: Sequence[Tensor],
    passing: Sequence[Tensor],
    step: Step,
    plan: Plan,
    kernel: TileKernel,
    scale: float,
) -> None:
    """Add the share of one call to the gradients of its row, and of all keys and values."""
    assert step.call is not None
    local = slice(*(q - step.span[0] for q in step.call.queries))
    columns = slice(*step.call.keys) if step.task.loads else slice(None)
    rows, keys = [x[:, :, local] for x in held], [x[:, :, columns] for x in passing]
    found = tile_gradients(kernel, rows, keys, step, plan, scale)
    row_sum[:, :, local] += found[0]
    for start, stop, offset in spread(step.task, step.call.keys):
        for total, part in zip(key_sums, found[1:], strict=True):
            total[:, :, start:stop] += part[:, :, offset : offset + stop - start]


def _bar(plan: Plan, count: Callable[[Plan], int]) -> AbstractContextManager[Callable[[int], None]]:
    show = plan.seconds > LONG  # rows are counted for a bar alone: they can be many
    return bar(f"attention ({plan.schedule})", count(plan) if show else 0, show=show)
