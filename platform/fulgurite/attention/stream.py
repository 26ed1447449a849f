"""Runs a plan, forward and backward.

Axes: B batch, H query heads, G key/value heads, M queries, N keys, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from fulgurite.attention.kernels import TileKernel, accumulator_dtype, kernel_for
from fulgurite.attention.merging import merge_
from fulgurite.attention.planning import Plan, format_bytes, smaller
from fulgurite.attention.schedules import Task
from fulgurite.attention.tiles import Kind, Range, Tile, Visibility, tiles
from fulgurite.errors import ConfigError

_T = TypeVar("_T")

__all__ = ["StreamedAttention", "Unit", "clear_", "commit_", "units"]


class _Call(NamedTuple):
    """A tile in the coordinates of what is loaded."""

    queries: Range  # global
    keys: Range  # among the gathered keys, or global where nothing is gathered
    kind: Kind
    seen: Range  # keys in global coordinates, of a tile under a bias


class StreamedAttention(torch.autograd.Function):
    """Exact attention by a plan; backward runs the same tasks against the saved out and lse.

    Source: card sections 1.6 to 1.8.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Return out (B, H, M, D) in the type of query and lse (B, H, M)."""
        (out, lse), plan = _retrying(plan, lambda plan: _forward(query, key, value, plan, scale))
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.plan, ctx.scale = plan, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value."""
        query, key, value, out, lse = ctx.saved_tensors
        # a row without keys has no share in any gradient: exp(score − inf) = 0
        lse = lse.masked_fill(lse == -math.inf, math.inf)
        grad = grads[0].to(query.dtype)
        grads, _ = _retrying(
            ctx.plan,
            lambda plan: _backward(grad, query, key, value, out, lse, plan, ctx.scale),
        )
        return (*grads, None, None)


def _retrying(plan: Plan, work: Callable[[Plan], _T]) -> tuple[_T, Plan]:
    """Do work, with a smaller plan if the device runs out of memory; return the plan that did.

    Nothing of a failed attempt is in the result, since results are made anew.
    """
    while True:
        try:
            return work(plan), plan
        except torch.OutOfMemoryError as error:
            try:
                if plan.share != (0, 1):
                    raise  # ranks would plan differently and wait for each other forever
                plan = smaller(plan)
            except ConfigError:
                raise error from None
            rank_zero_warn(
                f"Attention ran out of memory; going on with {plan.schedule}, at most "
                f"{format_bytes(plan.peak_bytes)} at once."
            )


def _forward(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float
) -> tuple[Tensor, Tensor]:
    """Out (B, H, M, D) in the type of query and lse (B, H, M)."""
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty(query.shape[:-1], dtype=accumulator_dtype(query.dtype))
    if plan.is_direct:
        kernel = kernel_for(query.device, query.dtype)
        for batch, heads, shared in plan.head_slices():
            out[batch, heads], lse[batch, heads] = kernel.forward(
                query[batch, heads],
                key[batch, shared],
                value[batch, shared],
                is_causal=plan.visible.is_causal,
                scale=scale,
            )
    else:
        total = out
        if plan.merges and out.dtype != lse.dtype:
            total = torch.empty_like(out, dtype=lse.dtype)
        clear_(total, lse)
        for unit in units(query, key, value, plan, scale):
            commit_(unit, total, lse, merge=plan.merges)
        if plan.share != (0, 1):
            _reduce_(total, lse, merge=plan.merges)
        if total is not out:
            out.copy_(total)
    return out, lse


class Unit(NamedTuple):
    """What one row of one task gives, which can be committed on its own.

    Attributes:
        number: Its place in the order of the plan.
        at: Where its rows belong: slices of batch, heads and queries.
        out: Attention over the keys of the task, in the type of accumulators.
        lse: Its log-sum-exp.
    """

    number: int
    at: tuple[slice, slice, slice]
    out: Tensor
    lse: Tensor


def units(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    scale: float,
    *,
    device: torch.device | None = None,
    done: Container[int] = (),
) -> Iterator[Unit]:
    """Compute a plan row by row; only what a task needs is loaded.

    Args:
        query: Anywhere: on the device, in host memory, or memory-mapped. Shape: (B, H, M, D).
        key: Shape: (B, G, N, D).
        value: Shape: (B, G, N, D).
        plan: How it is cut.
        scale: Of the scores.
        device: Where kernels run; where the tensors are by default.
        done: Units that are left out.
    """
    device = device or query.device
    kernel = kernel_for(device, query.dtype)
    number = 0
    for batch, heads, kv_heads in plan.head_slices():
        own_key, own_value = key[batch, kv_heads], value[batch, kv_heads]
        for index, task in enumerate(plan.tasks()):
            mine = plan.is_mine(index)
            wanted = [i for i in range(len(task.rows)) if mine and number + i not in done]
            keys, values = own_key, own_value
            if task.loads and wanted:
                keys, values = _gather(task, own_key), _gather(task, own_value)
                keys, values = keys.to(device), values.to(device)
            for i in wanted:
                rows = slice(*task.rows[i].queries)
                own = query[batch, heads, rows].to(device)
                out, lse = _row(own, keys, values, task, i, plan, kernel, scale)
                yield Unit(number + i, (batch, heads, rows), out, lse)
            number += len(task.rows)


def _reduce_(out: Tensor, lse: Tensor, *, merge: bool) -> None:
    """Merge the shares of all ranks into the result on every rank.

    Source: card section 1.10.
    """
    if not merge:  # each row was computed by one rank; the others have zeros and −inf
        dist.all_reduce(out)
        dist.all_reduce(lse, dist.ReduceOp.MAX)
        return
    largest = lse.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    weight = torch.exp(lse - largest).nan_to_num_(nan=0.0)  # nan: a row that nobody sees
    out.mul_(weight[..., None])
    dist.all_reduce(out)
    dist.all_reduce(weight)
    out.div_(weight[..., None].clamp_min(torch.finfo(weight.dtype).tiny))
    lse.copy_(largest + weight.log())


def _row(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    task: Task,
    index: int,
    plan: Plan,
    kernel: TileKernel,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of a row of a task: out and lse in the type of accumulators."""
    top, bottom = task.rows[index].queries
    dtype = accumulator_dtype(query.dtype)
    total = torch.empty_like(query, dtype=dtype)
    total_lse = total.new_empty(total.shape[:-1])
    clear_(total, total_lse)
    for number, call in enumerate(_calls(task, index, plan.visible)):
        columns = slice(*call.keys)
        rows = slice(call.queries[0] - top, call.queries[1] - top)
        out, lse = kernel.forward(
            query[:, :, rows],
            keys[:, :, columns].to(query.device),
            values[:, :, columns].to(query.device),
            is_causal=call.kind is Kind.CAUSAL,
            scale=scale,
            bias=_bias(call, plan.visible, query),
        )
        if number == 0 and call.queries == (top, bottom):
            total, total_lse = out.to(dtype), lse  # nothing to merge with yet
        else:
            merge_(total[:, :, rows], total_lse[:, :, rows], out, lse)
    return total, total_lse


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
        out[unit.at], lse[unit.at] = unit.out.to(out.device, out.dtype), unit.lse.to(lse.device)


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Plan,
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of query, key and value, in their types."""
    results = tuple(torch.empty_like(x) for x in (query, key, value))
    for batch, heads, kv_heads in plan.head_slices():
        own, shared = (batch, heads), (batch, kv_heads)
        parts = _backward_heads(
            *(grad[own], query[own], key[shared], value[shared], out[own], lse[own]), plan, scale
        )
        for result, part, at in zip(results, parts, (own, shared, shared), strict=True):
            if plan.share != (0, 1):
                dist.all_reduce(part)
            result[at] = part
    return results


def _backward_heads(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Plan,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of some heads, in the types of accumulators."""
    kernel = kernel_for(query.device, query.dtype)
    if plan.is_direct:
        return kernel.backward(
            grad, query, key, value, out, lse, is_causal=plan.visible.is_causal, scale=scale
        )
    dquery, dkey, dvalue = (torch.zeros_like(x, dtype=lse.dtype) for x in (query, key, value))
    for index, task in enumerate(plan.tasks()):
        if not plan.is_mine(index):
            continue
        keys, values = (_gather(task, x) if task.loads else x for x in (key, value))
        for call in (c for i in range(len(task.rows)) for c in _calls(task, i, plan.visible)):
            rows, columns = slice(*call.queries), slice(*call.keys)
            parts = kernel.backward(
                grad[:, :, rows],
                query[:, :, rows],
                keys[:, :, columns],
                values[:, :, columns],
                out[:, :, rows],
                lse[:, :, rows],
                is_causal=call.kind is Kind.CAUSAL,
                scale=scale,
                bias=_bias(call, plan.visible, query),
            )
            dquery[:, :, rows] += parts[0]
            for start, stop, at in _spread(task, call.keys):
                dkey[:, :, start:stop] += parts[1][:, :, at : at + stop - start]
                dvalue[:, :, start:stop] += parts[2][:, :, at : at + stop - start]
    return dquery, dkey, dvalue


def _gather(task: Task, tensor: Tensor) -> Tensor:
    """The loaded tokens one after another."""
    return torch.cat([tensor[:, :, slice(*tokens)] for tokens in task.loads], dim=2)


def _offsets(task: Task) -> Iterator[tuple[Range, int]]:
    """Each loaded range with the place of its first token among the gathered ones."""
    at = 0
    for tokens in task.loads:
        yield tokens, at
        at += tokens[1] - tokens[0]


def _spread(task: Task, keys: Range) -> Iterator[tuple[int, int, int]]:
    """Global ranges of gathered keys, with their place in the call."""
    if not task.loads:
        yield (*keys, 0)
        return
    for (start, stop), at in _offsets(task):
        left, right = max(keys[0], at), min(keys[1], at + stop - start)
        if left < right:
            yield start + left - at, start + right - at, left - keys[0]


def _calls(task: Task, index: int, visible: Visibility) -> Iterator[_Call]:
    """The kernel calls of a row: tiles that are neighbours once gathered become one."""
    places = dict(_offsets(task))
    row = task.rows[index]
    top, bottom = row.queries
    first, end = visible.first(bottom - 1), visible.end(top)  # keys that all queries see
    found = []
    for keys in row.keys:
        shift = places[keys] - keys[0] if places else 0
        if first <= keys[0] and keys[1] <= end:  # most keys, found without cutting
            parts = [Tile(row.queries, keys, Kind.FULL)]
        else:
            parts = list(tiles(row.queries, keys, visible))
        for tile in parts:
            local = tile.keys[0] + shift, tile.keys[1] + shift
            found.append(_Call(tile.queries, local, tile.kind, tile.keys))
    found.sort(key=lambda call: (call.queries, call.keys))  # neighbours side by side
    yield from _joined(found) if task.loads else found


def _joined(calls: list[_Call]) -> Iterator[_Call]:
    """Join full tiles of the same queries whose gathered keys touch."""
    if not calls:
        return
    last = calls[0]
    for _, call in pairwise(calls):
        touches = last.queries == call.queries and last.keys[1] == call.keys[0]
        if touches and last.kind is call.kind is Kind.FULL:
            last = last._replace(keys=(last.keys[0], call.keys[1]))
        else:
            yield last
            last = call
    yield last


def _bias(call: _Call, visible: Visibility, query: Tensor) -> Tensor | None:
    if call.kind is not Kind.BIAS:
        return None
    return visible.bias(call.queries, call.seen, query.dtype, query.device)
