"""Runs a plan on whole tensors, forward and backward, with gradients for autograd.

Axes: B batch, H query heads, G key/value heads, M queries, N keys, D size of a query and key,
E size of a value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fulgurite.attention.bias_gradient import bias_gradient
from fulgurite.attention.biases import TileBias
from fulgurite.attention.execution_plan import ExecutionPlan, Halvings
from fulgurite.attention.kernel_choice import kernel_for
from fulgurite.attention.kernels import TileKernel, accumulator_dtype
from fulgurite.attention.progress import LONG, bar
from fulgurite.attention.ranks import (
    broadcast_columns_,
    broadcast_rows_,
    merge_shards_,
    sum_shards_,
)
from fulgurite.attention.spec import HeadGroup
from fulgurite.attention.steps import Step, column_count, row_count, row_steps, source_ranges
from fulgurite.attention.transfers import Prefetcher
from fulgurite.attention.units import (
    AttentionInputs,
    add_sinks_,
    clear_,
    commit_,
    gradient_units,
    shift_of,
    sink_scores,
    sinks_of,
    tile_gradients,
    units,
    with_smaller_tiles,
)
from fulgurite.errors import ConfigError, DataError

__all__ = ["StreamedAttention"]

_LARGE_SHIFT = 1e6  # a shifted log-sum-exp beyond it is that of a sink beside hidden keys
_ROWS = 4096  # queries at a time where each is treated on its own


class StreamedAttention(torch.autograd.Function):
    """Exact attention by a plan; backward runs its own plan against the saved out and lse.

    Source: card sections 1.6 to 1.8.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        sinks: Tensor | None,
        plan: ExecutionPlan,
        biases: tuple[TileBias, ...] = (),
        device: torch.device | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return out (B, H, M, E) in the type of query and lse (B, H, M).

        Args:
            ctx: Context of autograd.
            query: Shape: (B, H, M, D).
            key: Shape: (B, G, N, D).
            value: Shape: (B, G, N, E).
            bias: The tensor of the first of ``biases``, if that has a gradient.
            sinks: Shape: (B or 1, H, M or 1).
            plan: How it is cut.
            biases: What is added to scores or hides them.
            device: Where kernels run; where the tensors are by default.
        """
        device = device or query.device
        inputs = AttentionInputs(query, key, value, biases, sinks)
        out, lse = _forward(inputs, plan, device)
        ctx.save_for_backward(query, key, value, bias, sinks, out, lse)
        ctx.plan, ctx.biases, ctx.device = plan, biases, device
        ctx.versions = _versions(biases)
        whole_lse = _undo_shift(lse, inputs, plan)
        ctx.mark_non_differentiable(whole_lse)
        ctx.set_materialize_grads(False)  # it would make zeros for the gradient of lse
        return out, whole_lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of query, key, value, bias and sinks.

        Raises:
            ConfigError: Gradients of these are asked for.
            DataError: A mask has changed since.
        """
        if torch.is_grad_enabled():
            raise ConfigError(
                "Streamed attention has no gradients of its gradients (create_graph=True).",
                "Use PyTorch's attention, --trainer.strategy=auto, for second derivatives.",
            )
        if grads[0] is None:
            return (None,) * 8
        query, key, value, bias, sinks, out, lse = ctx.saved_tensors
        if ctx.versions != _versions(ctx.biases):
            raise DataError(
                "A mask or bias was changed in place between the forward pass and its gradients.",
                "Change a copy of it, or do so after backward.",
            )
        inputs, grad = AttentionInputs(query, key, value, ctx.biases, sinks), grads[0]
        plan = ctx.plan.gradient or ctx.plan
        results: list[Tensor | None] = [None] * 5
        if any(ctx.needs_input_grad[:3]):
            results[:3] = _backward(grad, inputs, out, lse, plan, ctx.device)
        if ctx.needs_input_grad[3]:
            results[3] = bias_gradient(grad, inputs, out, lse, bias, plan, ctx.device)
        if ctx.needs_input_grad[4]:
            results[4] = _sink_gradient(grad, inputs, out, lse, plan)
        needed = zip(results, ctx.needs_input_grad, strict=False)
        return (*(result if needs else None for result, needs in needed), None, None, None)


def _versions(biases: tuple[TileBias, ...]) -> list[int]:
    """How often the tensors of biases were changed in place, as autograd counts it."""
    tensors = (tensor for bias in biases for tensor in bias.tensors)
    return [tensor._version for tensor in tensors if not tensor.is_inference()]


def _forward(
    inputs: AttentionInputs, plan: ExecutionPlan, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Out (B, H, M, E) in the type of query and lse (B, H, M)."""
    query, size = inputs.query, inputs.value.shape[-1]
    wide = accumulator_dtype(query.dtype)
    is_whole = plan.schedule == "whole" and len(plan.spec.visible) == 1 and not plan.is_shared
    if is_whole and device == query.device and not plan.spec.is_empty:
        (unit,) = units(inputs, plan, device=device)
        return unit.out.to(query.dtype), unit.lse
    out = query.new_empty((*query.shape[:-1], size))
    lse = query.new_empty(query.shape[:-1], dtype=wide)
    if plan.spec.is_empty:
        clear_(out, lse)
        _add_all_sinks_(out, lse, inputs, plan)
        return out, lse
    if plan.merges and plan.is_shared:
        merge_shards_(lambda span: units(inputs, plan, device=device, within=span), plan, out, lse)
        _add_all_sinks_(out, lse, inputs, plan)
        return out, lse
    total = out
    if plan.merges and out.dtype != wide:
        total = torch.empty_like(out, dtype=wide)
    if plan.merges or plan.is_shared:  # else each row is written once
        clear_(total, lse)
    with _bar(plan, row_count) as advance:
        narrow_to = None if plan.merges else query.dtype
        for unit in units(inputs, plan, device=device, narrow_to=narrow_to):
            commit_(unit, total, lse, merge=plan.merges)
            advance(unit.out.shape[2])
            del unit  # or it would take memory beside the next
    if plan.is_shared:
        broadcast_rows_(plan, out, lse)
    if plan.merges:
        _add_all_sinks_(total, lse, inputs, plan)
    if total is not out:
        out.copy_(total)
    return out, lse


def _row_ranges(plan: ExecutionPlan) -> Iterator[tuple[HeadGroup, tuple[int, int]]]:
    """Pieces of the rows of all batch entries and heads, of which each is treated on its own."""
    for group in plan.groups():
        for top in range(0, plan.spec.queries, _ROWS):
            yield group, (top, min(top + _ROWS, plan.spec.queries))


def _add_all_sinks_(out: Tensor, lse: Tensor, inputs: AttentionInputs, plan: ExecutionPlan) -> None:
    """Let all rows see their sinks, in place."""
    if inputs.sinks is None:
        return
    for group, queries in _row_ranges(plan):
        at = group.batch, group.heads, slice(*queries)
        out[at], lse[at] = add_sinks_(out[at], lse[at], inputs, group, queries, plan)


def _undo_shift(lse: Tensor, inputs: AttentionInputs, plan: ExecutionPlan) -> Tensor:
    """The log-sum-exp with what was subtracted from scores."""
    if plan.spec.mask is None or not plan.spec.mask.needs_shift or plan.spec.is_empty:
        return lse.view_as(lse)
    lse = lse.clone()
    for group, queries in _row_ranges(plan):
        shift = shift_of(inputs, group, queries, plan, lse)
        if shift is None:
            continue
        part = lse[group.batch, group.heads, slice(*queries)]
        shifted = part + shift
        if inputs.sinks is not None:  # a sink beside large negative scores is all there is
            shifted = torch.where(
                part > _LARGE_SHIFT, sinks_of(inputs, group, queries, part), shifted
            )
        part.copy_(shifted)
    return lse


def _sink_gradient(
    grad: Tensor, inputs: AttentionInputs, out: Tensor, lse: Tensor, plan: ExecutionPlan
) -> Tensor:
    """Gradient of the sinks. Shape: (B or 1, H, M or 1).

    Source: inferred: a sink has the weight exp(score − lse) and no value.
    """
    assert inputs.sinks is not None
    total = torch.zeros_like(inputs.sinks, dtype=lse.dtype)
    for group, queries in _row_ranges(plan):
        at = group.batch, group.heads, slice(*queries)
        scores = sink_scores(inputs, group, queries, plan, lse)
        inner = (grad[at].to(lse.dtype) * out[at].to(lse.dtype)).sum(-1)
        # nan: neither keys nor a sink
        weight = (scores - lse[at]).exp().nan_to_num_(nan=0.0)
        part = (weight * inner).to(total.device)
        by_batch, by_query = total.shape[0] > 1, total.shape[2] > 1
        part = part if by_query else part.sum(2, keepdim=True)
        part = part if by_batch else part.sum(0, keepdim=True)
        rows = slice(*queries) if by_query else slice(None)
        total[group.batch if by_batch else slice(None), group.heads, rows] -= part
    return total.to(inputs.sinks.dtype)


def _backward(
    grad: Tensor,
    inputs: AttentionInputs,
    out: Tensor,
    lse: Tensor,
    plan: ExecutionPlan,
    device: torch.device,
) -> tuple[Tensor, ...]:
    """Gradients of query, key and value, in their types.

    Args:
        grad: Gradient of the result.
        inputs: Inputs of the forward pass.
        out: The result.
        lse: Its log-sum-exp.
        plan: How gradients are cut.
        device: Where kernels run.
    """
    if plan.spec.is_empty:
        return tuple(torch.zeros_like(x) for x in inputs[:3])
    results = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs[:3])
    if plan.passes == 2:
        with _bar(plan, lambda plan: row_count(plan) + column_count(plan)) as advance:
            for unit in gradient_units(
                grad, inputs, out, lse, plan, device=device, narrow_to=out.dtype
            ):
                for i, part in unit.by_result.items():
                    results[i][unit.at] = part
                advance(part.shape[2])
                del unit, part
        if plan.is_shared:
            broadcast_rows_(plan, results[0])
            broadcast_columns_(plan, *results[1:])
        return results
    rows, keys = (grad, inputs.query, out, lse), (inputs.key, inputs.value)
    is_direct = plan.schedule in ("whole", "heads") and plan.spec.is_simple
    is_direct = is_direct and not plan.is_shared and device == grad.device

    with _bar(plan, row_count) as advance:

        def compute(after: int, halvings: Halvings) -> Iterator[_Group]:
            for number, group in enumerate(plan.groups()):
                if number <= after:
                    continue
                for part in plan.parts(group, halvings):
                    if is_direct and not halvings.queries and not halvings.keys:
                        _write_one_call(rows, keys, results, inputs.biases, part, plan)
                    else:
                        _accumulate_group(
                            rows, keys, results, inputs.biases, part, plan, device,
                            halvings._replace(heads=0), advance,
                        )  # fmt: skip
                yield _Group(number)

        for _ in with_smaller_tiles(compute, plan):
            pass
    if plan.is_shared and not plan.merges:
        broadcast_rows_(plan, results[0])
    return results


class _Group(NamedTuple):
    """A group of heads whose gradients are complete."""

    number: int


def _write_one_call(
    rows: Sequence[Tensor],
    keys: Sequence[Tensor],
    results: Sequence[Tensor],
    biases: tuple[TileBias, ...],
    group: HeadGroup,
    plan: ExecutionPlan,
) -> None:
    """Gradients of a group of heads by one kernel call."""
    kernel = kernel_for(rows[1].device, rows[1].dtype, prefer=plan.kernel)
    ((step, views),) = row_steps(rows, keys, plan, groups=[group])
    tensors = [parts[0] for parts in views]
    grads = tile_gradients(kernel, tensors[:4], tensors[4:], step, plan, biases)
    assert grads is not None  # the spec is simple: every query sees a key
    assert step.call is not None
    results[0][group.batch, group.heads] = grads[0]
    begin, end = step.call.tile.keys
    for result, part in zip(results[1:], grads[1:], strict=True):
        of_group = result[group.batch, group.kv_heads]
        of_group[:, :, begin:end] = part
        if end < of_group.shape[2]:  # keys behind the last query of a causal mask
            of_group[:, :, end:] = 0


def _accumulate_group(
    rows: Sequence[Tensor],
    keys: Sequence[Tensor],
    results: Sequence[Tensor],
    biases: tuple[TileBias, ...],
    group: HeadGroup,
    plan: ExecutionPlan,
    device: torch.device,
    halvings: Halvings,
    advance: Callable[[int], None],
) -> None:
    """Gradients of a group in one pass, which adds to those of all keys along the queries."""
    kernel = kernel_for(device, rows[1].dtype, prefer=plan.kernel)
    in_place = plan.adds_in_place and device == rows[1].device
    prefetcher = Prefetcher.between(rows[1].device, device)
    wide = rows[3].dtype
    heads = group.heads, group.kv_heads, group.kv_heads
    parts = [result[group.batch, at] for result, at in zip(results, heads, strict=True)]
    # a row of tiles has the whole gradient of its queries; only those of keys add up
    sums = [
        x.zero_() if in_place else torch.zeros_like(x, dtype=wide, device=device)
        for x in (parts if plan.merges else parts[1:])
    ]
    steps = row_steps(rows, keys, plan, groups=[group], halvings=halvings)
    for step, tensors in prefetcher.prefetch(steps):
        span = slice(*step.span)
        if step.opens:
            row_tensors, tensors = tensors[:4], tensors[4:]
            if plan.merges:
                row_sum = sums[0][:, :, span]
            else:
                row_sum = torch.zeros_like(row_tensors[1], dtype=wide)
        if tensors:
            key_tensors = tensors
        if step.call is not None:
            _add_call_(row_sum, sums[-2:], row_tensors, key_tensors, step, plan, kernel, biases)
        if step.closes:
            if not plan.merges:
                parts[0][:, :, span] = row_sum
            del row_sum
            advance(span.stop - span.start)
        if step.releases:  # or these would be in memory beside those of the next task
            key_tensors = None
            del tensors
    for result, total in zip(parts[-len(sums) :], sums, strict=True):
        if plan.is_shared:
            sum_shards_(total, result, plan)
        elif not in_place:
            result.copy_(total)


def _add_call_(
    row_sum: Tensor,
    key_sums: Sequence[Tensor],
    row_tensors: Sequence[Tensor],
    key_tensors: Sequence[Tensor],
    step: Step,
    plan: ExecutionPlan,
    kernel: TileKernel,
    biases: tuple[TileBias, ...],
) -> None:
    """Add the share of one call to the gradients of its row, and of all keys and values."""
    assert step.call is not None
    local = slice(*(query - step.span[0] for query in step.call.tile.queries))
    columns = slice(*step.call.keys) if step.task.loads else slice(None)
    rows, keys = [x[:, :, local] for x in row_tensors], [x[:, :, columns] for x in key_tensors]
    grads = tile_gradients(kernel, rows, keys, step, plan, biases)
    if grads is None:
        return
    row_sum[:, :, local] += grads[0]
    for start, stop, offset in source_ranges(step.task, step.call.keys):
        for total, part in zip(key_sums, grads[1:], strict=True):
            total[:, :, start:stop] += part[:, :, offset : offset + stop - start]


def _bar(
    plan: ExecutionPlan, count: Callable[[ExecutionPlan], int]
) -> AbstractContextManager[Callable[[int], None]]:
    show = plan.cost.seconds > LONG  # rows are counted for a bar alone: they can be many
    return bar(f"attention ({plan.schedule})", count(plan) if show else 0, show=show)
