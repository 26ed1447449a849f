"""Runs a plan on whole tensors, forward and backward, with gradients for autograd.

Axes: B batch, H query heads, G key/value heads, M queries, N keys, D size of a query and key,
E size of a value.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fulgurite.attention.bias_gradient import bias_gradient
from fulgurite.attention.biases import TileBias
from fulgurite.attention.execution_plan import ExecutionPlan
from fulgurite.attention.inputs import AttentionInputs, GradientInputs
from fulgurite.attention.kernels import accumulator_dtype
from fulgurite.attention.one_pass import OnePassGradients
from fulgurite.attention.progress import LONG, bar
from fulgurite.attention.ranks import broadcast_columns_, broadcast_rows_, merge_shards_
from fulgurite.attention.row_terms import RowTerms, sink_gradient
from fulgurite.attention.steps import column_count, row_count
from fulgurite.attention.units import clear_, commit_, gradient_units, units
from fulgurite.errors import ConfigError, DataError

__all__ = ["StreamCall", "StreamedAttention", "refuse_transforms"]


def refuse_transforms(tensor: Tensor) -> None:
    """Refuse tensors that stand for many, as those within ``torch.func`` do.

    Args:
        tensor: One of a call.

    Raises:
        ConfigError: A transformation such as ``vmap`` or ``grad`` of ``torch.func`` is active, or
            gradients are batched.
    """
    is_batched = torch._C._functorch.is_legacy_batchedtensor(tensor)
    if is_batched or torch._C._are_functorch_transforms_active():
        raise ConfigError(
            "Streamed attention has no torch.func (vmap, grad, vjp, jvp) and no batched gradients "
            "(is_grads_batched, vectorize).",
            "Use PyTorch's attention, --trainer.strategy=auto, or loop and call backward.",
        )


class StreamCall(NamedTuple):
    """How a call is computed, beside its tensors.

    Attributes:
        plan: How it is cut.
        biases: What is added to scores or hides them.
        device: Where kernels run; where the tensors are by default.
    """

    plan: ExecutionPlan
    biases: tuple[TileBias, ...] = ()
    device: torch.device | None = None

    @property
    def gradient_plan(self) -> ExecutionPlan:
        """How its gradients are cut."""
        return self.plan.gradient or self.plan


class StreamedAttention(torch.autograd.Function):
    """Exact attention by a plan; backward runs its own plan against the saved out and lse.

    Source: docs/papers/stream_cqsa.md sections 1.6 to 1.8.
    """

    @staticmethod
    def forward(ctx: Any, call: StreamCall, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return out (B, H, M, E) in the type of query and lse (B, H, M).

        Args:
            ctx: Context of autograd.
            call: How it is computed.
            tensors: Query (B, H, M, D), key (B, G, N, D), value (B, G, N, E); the tensor of the
                first bias if that has a gradient, or None; sinks (B or 1, H, M or 1), or None.
        """
        query, key, value, bias, sinks = tensors
        assert query is not None
        assert key is not None
        assert value is not None
        call = call._replace(device=call.device or query.device)
        inputs = AttentionInputs(query, key, value, call.biases, sinks)
        out, lse = _forward(inputs, call)
        ctx.save_for_backward(query, key, value, bias, sinks, out, lse)
        ctx.call, ctx.versions = call, _versions(call.biases)
        whole_lse = RowTerms(inputs, call.plan).undo_shift(lse)
        ctx.mark_non_differentiable(whole_lse)
        ctx.set_materialize_grads(False)  # it would make zeros for the gradient of lse
        return out, whole_lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of query, key, value, bias and sinks, behind that of the call, which has none.

        Raises:
            ConfigError: Gradients of these are asked for.
            DataError: A mask has changed since.
        """
        if grads[0] is not None:
            refuse_transforms(grads[0])
        if torch.is_grad_enabled():
            raise ConfigError(
                "Streamed attention has no gradients of its gradients (create_graph=True).",
                "Use PyTorch's attention, --trainer.strategy=auto, for second derivatives.",
            )
        if grads[0] is None:
            return (None,) * 6
        query, key, value, bias, sinks, out, lse = ctx.saved_tensors
        call: StreamCall = ctx.call
        if ctx.versions != _versions(call.biases):
            raise DataError(
                "A mask or bias was changed in place between the forward pass and its gradients.",
                "Change a copy of it, or do so after backward.",
            )
        inputs = AttentionInputs(query, key, value, call.biases, sinks)
        saved, needs = GradientInputs(inputs, grads[0], out, lse), ctx.needs_input_grad[1:]
        results: list[Tensor | None] = [None] * 5
        if any(needs[:3]):
            results[:3] = _backward(saved, call)
        if needs[3]:
            results[3] = bias_gradient(saved, bias, call.gradient_plan, call.device)
        if needs[4]:
            results[4] = sink_gradient(saved, call.gradient_plan)
        needed = zip(results, needs, strict=True)
        return (None, *(result if is_needed else None for result, is_needed in needed))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Refuse derivatives in forward mode.

        Raises:
            ConfigError: In every case.
        """
        raise ConfigError(
            "Streamed attention has no derivatives in forward mode (torch.autograd.forward_ad).",
            "Use backward, or PyTorch's attention, --trainer.strategy=auto.",
        )


def _versions(biases: tuple[TileBias, ...]) -> list[int]:
    """How often the tensors of biases were changed in place, as autograd counts it."""
    tensors = (tensor for bias in biases for tensor in bias.tensors)
    return [tensor._version for tensor in tensors if not tensor.is_inference()]


def _forward(inputs: AttentionInputs, call: StreamCall) -> tuple[Tensor, Tensor]:
    """Out (B, H, M, E) in the type of query and lse (B, H, M)."""
    plan, device, terms = call.plan, call.device, RowTerms(inputs, call.plan)
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
        terms.add_all_sinks_(out, lse)
        return out, lse
    if plan.merges and plan.is_shared:
        merge_shards_(lambda span: units(inputs, plan, device=device, within=span), plan, out, lse)
        terms.add_all_sinks_(out, lse)
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
        terms.add_all_sinks_(total, lse)
    if total is not out:
        out.copy_(total)
    return out, lse


def _backward(saved: GradientInputs, call: StreamCall) -> tuple[Tensor, ...]:
    """Gradients of query, key and value, in their types."""
    tensors, plan = saved.inputs[:3], call.gradient_plan
    if plan.spec.is_empty:
        return tuple(torch.zeros_like(x) for x in tensors)
    results = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)
    if plan.passes == 2:
        with _bar(plan, lambda plan: row_count(plan) + column_count(plan)) as advance:
            for unit in gradient_units(saved, plan, device=call.device, narrow_to=saved.out.dtype):
                for i, part in unit.by_result.items():
                    results[i][unit.at] = part
                advance(part.shape[2])
                del unit, part
        if plan.is_shared:
            broadcast_rows_(plan, results[0])
            broadcast_columns_(plan, *results[1:])
        return results
    with _bar(plan, row_count) as advance:
        OnePassGradients(saved, results, plan, call.device).compute_(advance)
    if plan.is_shared and not plan.merges:
        broadcast_rows_(plan, results[0])
    return results


def _bar(
    plan: ExecutionPlan, count: Callable[[ExecutionPlan], int]
) -> AbstractContextManager[Callable[[int], None]]:
    show = plan.cost.seconds > LONG  # rows are counted for a bar alone: they can be many
    return bar(f"attention ({plan.schedule})", count(plan) if show else 0, show=show)
