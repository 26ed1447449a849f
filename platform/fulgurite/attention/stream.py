"""Runs a plan, forward and backward.

Axes: B batch, H query heads, G key/value heads, M queries, N keys, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fulgurite.attention.kernels import accumulator_dtype, kernel_for
from fulgurite.attention.merging import merge_
from fulgurite.attention.planning import Plan
from fulgurite.attention.schedules import Task
from fulgurite.attention.tiles import Kind, Range, Tile, Visibility, tiles

__all__ = ["StreamedAttention"]


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
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        lse = query.new_empty(query.shape[:-1], dtype=accumulator_dtype(query.dtype))
        for batch, heads, kv_heads in plan.head_slices():
            inputs = query[batch, heads], key[batch, kv_heads], value[batch, kv_heads]
            if plan.is_direct:
                causal = plan.visible.is_causal
                parts = kernel_for(query.device, query.dtype).forward(
                    *inputs, is_causal=causal, scale=scale
                )
                out[batch, heads], lse[batch, heads] = parts
            else:
                _forward(*inputs, out[batch, heads], lse[batch, heads], plan, scale)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.plan, ctx.scale = plan, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value."""
        query, key, value, out, lse = ctx.saved_tensors
        results = tuple(torch.empty_like(x) for x in (query, key, value))
        # a row without keys has no share in any gradient: exp(score − inf) = 0
        lse = lse.masked_fill(lse == -math.inf, math.inf)
        grad = grads[0].to(query.dtype)
        for batch, heads, kv_heads in ctx.plan.head_slices():
            own, shared = (batch, heads), (batch, kv_heads)
            parts = _backward(
                *(grad[own], query[own], key[shared], value[shared], out[own], lse[own]),
                ctx.plan,
                ctx.scale,
            )
            for result, part, at in zip(results, parts, (own, shared, shared), strict=True):
                result[at] = part
        return (*results, None, None)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, plan: Plan, scale: float
) -> None:
    """Fill out and lse of some heads."""
    kernel, dtype = kernel_for(query.device, query.dtype), lse.dtype
    total = out.zero_() if out.dtype == dtype else torch.zeros_like(out, dtype=dtype)
    lse.fill_(-math.inf)
    for task in plan.tasks():
        keys, values = _gather(task, key), _gather(task, value)
        for call in _calls(task, plan.visible):
            rows, columns = slice(*call.queries), slice(*call.keys)
            part = kernel.forward(
                query[:, :, rows],
                keys[:, :, columns],
                values[:, :, columns],
                is_causal=call.kind is Kind.CAUSAL,
                scale=scale,
                bias=_bias(call, plan.visible, query),
            )
            merge_(total[:, :, rows], lse[:, :, rows], *part)
    if total is not out:
        out.copy_(total)


def _backward(
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
    for task in plan.tasks():
        keys, values = _gather(task, key), _gather(task, value)
        for call in _calls(task, plan.visible):
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
    """The loaded tokens one after another, or a view of all where keys are streamed."""
    if not task.loads:
        return tensor
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


def _calls(task: Task, visible: Visibility) -> Iterator[_Call]:
    """The kernel calls of a task: tiles that are neighbours once gathered become one."""
    places = dict(_offsets(task))
    for row in task.rows:
        found = [
            _Call(tile.queries, _local(tile, keys, places), tile.kind, tile.keys)
            for keys in row.keys
            for tile in tiles(row.queries, keys, visible)
        ]
        found.sort(key=lambda call: (call.queries, call.keys))  # neighbours side by side
        yield from _joined(found) if task.loads else found


def _local(tile: Tile, keys: Range, places: dict[Range, int]) -> Range:
    shift = places[keys] - keys[0] if places else 0
    return tile.keys[0] + shift, tile.keys[1] + shift


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
