"""Plans a call and runs it: budget, machine and ranks are decided here.

Axes: B batch, H query heads, G key/value heads, M queries, N keys, D size of a query and key,
E size of a value.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from fulgurite.attention.budget import Budget, parse_budget
from fulgurite.attention.calibration import agreed_costs, measured_costs
from fulgurite.attention.call_options import Scoring, StreamOptions
from fulgurite.attention.calls import AttentionCall, normalize_call
from fulgurite.attention.execution_plan import ExecutionPlan
from fulgurite.attention.kernel_choice import kernel_for, kernel_names
from fulgurite.attention.kernels import accumulator_dtype
from fulgurite.attention.machine_costs import usual_costs
from fulgurite.attention.masks import Masking, is_causal_bias
from fulgurite.attention.planning import make_plan
from fulgurite.attention.ranks import refuse_different_inputs
from fulgurite.attention.request import Placement, PlanRequest
from fulgurite.attention.spec import AttentionSpec
from fulgurite.attention.stream import StreamCall, StreamedAttention, refuse_transforms
from fulgurite.attention.tensor_checks import (
    add_sink_axes,
    check_tensors,
    check_types,
    refuse_not_finite,
)
from fulgurite.errors import ConfigError
from fulgurite.sampling import rank_and_world

__all__ = ["attend", "attend_masked", "plan_call", "ranks_share"]

_MOST_DECIDED = 512  # sizes of calls whose budget is remembered


def attend_masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    masking: Masking,
    scoring: Scoring,
    options: StreamOptions,
) -> tuple[Tensor, Tensor]:
    """Return the attention of :func:`~fulgurite.attention.stream_attention` and its log-sum-exp.

    Args:
        query: Queries. Shape: (..., H, M, D).
        key: Keys. Shape: (..., G, N, D).
        value: Values. Shape: (..., G, N, E).
        masking: What is seen.
        scoring: How scores are made.
        options: How it is computed.

    Raises:
        ConfigError: An option is not supported, or the budget is too small.
        DataError: Shapes, types or devices do not fit together.
    """
    check_tensors(query=query, key=key, value=value)
    masks = {"attn_mask": scoring.attn_mask, "key_mask": masking.key_mask, "sinks": scoring.sinks}
    masks["alibi_slopes"] = scoring.alibi_slopes
    check_tensors(**{name: mask for name, mask in masks.items() if mask is not None})
    refuse_transforms(query)
    query, key, value = _cast_as_autocast(query, key, value)
    check_types(query, key, value)
    is_matrix = query.ndim == key.ndim == value.ndim == 2
    if is_matrix:
        query, key, value = query[None], key[None], value[None]
    mask = scoring.attn_mask
    if mask is not None and query.dtype != torch.float64 and not is_causal_bias(mask):
        scoring = replace(scoring, attn_mask=_cast_as_autocast(mask)[0])
    lead, call = normalize_call(query, key, value, masking=masking, scoring=scoring)
    out, lse = _attend_checked(call, options)
    out = out.reshape(*lead, *out.shape[1:])
    lse = lse.reshape(*lead, *lse.shape[1:])
    return (out[0], lse[0]) if is_matrix else (out, lse)


def attend(call: AttentionCall, options: StreamOptions) -> tuple[Tensor, Tensor]:
    """Attention of a call.

    Args:
        call: What is computed.
        options: How it is computed.

    Returns:
        Out (B, H, M, E) and log-sum-exp (B, H, M).

    Raises:
        ConfigError: An option is not supported, or the budget is too small.
        DataError: Inputs are not finite, and ``check_finite`` is set; or their types differ.
    """
    refuse_transforms(call.query)
    query, key, value = _cast_as_autocast(*call[:3])
    check_types(query, key, value)
    return _attend_checked(call._replace(query=query, key=key, value=value), options)


def _attend_checked(call: AttentionCall, options: StreamOptions) -> tuple[Tensor, Tensor]:
    """Attention of a call whose tensors are of one type, which autocast has cast."""
    query, key, value = call[:3]
    if options.check_finite:
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            refuse_not_finite(name, tensor)
    sinks = call.sinks
    if sinks is not None:
        sinks = add_sink_axes(sinks, call.spec())
    device = options.device_for(query)
    kernel_for(device, query.dtype, prefer=options.kernel)
    tensors = query, key, value, call.bias, sinks
    has_gradient = any(x is not None and x.requires_grad for x in tensors)
    if ranks_share(options.distributed)[1] > 1 and not call.is_abstract:
        _compare_ranks(call, options)
    plan = plan_call(call, options, backward=torch.is_grad_enabled() and has_gradient)
    if options.on_plan:
        options.on_plan(plan)
    if call.is_abstract:
        _refuse_tracing()
        return _abstract_result(query, value, key)
    stream_call = StreamCall(plan, call.biases, device)
    out, lse = StreamedAttention.apply(stream_call, *tensors)  # type: ignore[no-untyped-call]
    return out, lse


def _compare_ranks(call: AttentionCall, options: StreamOptions) -> None:
    """Refuse ranks that give other inputs; on a GPU, which would wait, once for inputs of a size.

    Raises:
        DataError: They do.
    """
    device = options.device_for(call.query)
    sizes = ("compared", *(tuple(x.shape) for x in call[:3]))
    if device.type != "cpu" and options.decided is not None:
        if sizes in options.decided:
            return
        options.decided[sizes] = None
    refuse_different_inputs(device, query=call.query, key=call.key, value=call.value)


def _cast_as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast tensors as autocast casts those of PyTorch's attention: all but float64."""
    kind = tensors[0].device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    casts = (x.is_floating_point() and x.dtype != torch.float64 for x in tensors)
    return tuple(x.to(dtype) if cast else x for x, cast in zip(tensors, casts, strict=True))


def plan_call(call: AttentionCall, options: StreamOptions, *, backward: bool) -> ExecutionPlan:
    """Plan a call.

    Args:
        call: What is computed.
        options: How it is computed.
        backward: Whether gradients are computed too.

    Raises:
        ConfigError: The budget is too small, or cannot be read.
    """
    spec, device = call.spec(), options.device_for(call.query)
    is_elsewhere = device != call.query.device
    request = PlanRequest(
        budget=_decide_budget(spec, device, options, backward=backward),
        schedule=options.schedule,
        backward=backward,
        placement=Placement(not is_elsewhere, call.packs, tiled=is_elsewhere, ahead=is_elsewhere),
        shard=ranks_share(options.distributed),
        kernel=options.kernel,
    )
    if not call.is_abstract and not spec.is_empty:
        request = _on_machine(request, spec, device, options)
    return make_plan(spec, request)


def ranks_share(distributed: bool) -> tuple[int, int]:
    """Rank and number of ranks that share a call."""
    return rank_and_world() if distributed else (0, 1)


def _decide_budget(
    spec: AttentionSpec, device: torch.device, options: StreamOptions, *, backward: bool
) -> int | None:
    """The budget in bytes; ``"auto"`` as it was for the last call of these sizes."""
    if options.memory_budget != "auto" or options.decided is None:
        return _agree_budget(options.memory_budget, device, options.distributed)
    key = (
        spec.batch, spec.heads, spec.kv_heads, spec.queries, spec.keys, spec.head_dim,
        spec.value_dim, spec.dtype, device, backward,
    )  # fmt: skip
    if key not in options.decided:
        if len(options.decided) >= _MOST_DECIDED:
            options.decided.clear()
        options.decided[key] = _agree_budget("auto", device, options.distributed)
    return options.decided[key]


def _agree_budget(budget: Budget, device: torch.device, distributed: bool) -> int | None:
    """The budget in bytes; the smallest of all ranks, since they must plan alike."""
    size = parse_budget(budget, device)
    if size is None or isinstance(budget, int) or ranks_share(distributed)[1] == 1:
        return size
    agreed = torch.tensor(size, dtype=torch.int64, device=device)
    dist.all_reduce(agreed, dist.ReduceOp.MIN)
    return int(agreed)


def _on_machine(
    request: PlanRequest, spec: AttentionSpec, device: torch.device, options: StreamOptions
) -> PlanRequest:
    """Add the kernels of the machine and, where there is something to choose, its costs.

    Ranks plan by the costs that the first of them measured. Measured times scatter, so that a
    process may cut a call elsewhere than the one before, and round differently: deterministic
    algorithms plan by fixed costs.
    """
    kernels = kernel_names(
        device, spec.dtype, max(spec.head_dim, spec.value_dim), prefer=options.kernel,
        has_wide_bias=spec.has_wide_bias,
    )  # fmt: skip
    if options.memory_budget is None:
        return replace(request, kernels=kernels)
    if torch.are_deterministic_algorithms_enabled():
        return replace(request, kernels=kernels, costs=usual_costs(device.type == "cuda"))
    measure = agreed_costs if request.ranks > 1 else measured_costs
    costs = measure(device, spec.dtype, max(1, spec.head_dim))
    return replace(request, kernels=kernels, costs=costs)


def _refuse_tracing() -> None:
    """Refuse to put a result without numbers into a program.

    Raises:
        ConfigError: A tracer records what is computed.
    """
    module = sys.modules.get("torch.fx.experimental.proxy_tensor")
    if torch.compiler.is_exporting() or (module is not None and module.get_proxy_mode()):
        raise ConfigError(
            "Streamed attention cannot be traced (torch.export, make_fx): it plans by real sizes.",
            "Export the model with PyTorch's attention, --trainer.strategy=auto.",
        )


def _abstract_result(query: Tensor, value: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Tensors without numbers, with the shapes, types and dependencies of the result."""
    lse = query.detach().new_empty(query.shape[:-1], dtype=accumulator_dtype(query.dtype))
    zero = (query.sum() + key.sum()).to(query.dtype)
    group = query.shape[1] // max(1, value.shape[1])
    rows = value.sum(2, keepdim=True).repeat_interleave(group, 1)
    return (rows + zero).expand(*query.shape[:-1], value.shape[-1]).clone(), lse
