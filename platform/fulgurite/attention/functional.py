"""Attention in a memory budget, called like PyTorch's."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor

from fulgurite.attention.biases import AlibiBias, DenseBias, TileBias, describe_biases
from fulgurite.attention.budget import Budget, parse_budget
from fulgurite.attention.calibration import agreed_costs, measured_costs
from fulgurite.attention.checks import check_number, kernel_device
from fulgurite.attention.execution_plan import ExecutionPlan
from fulgurite.attention.kernel_choice import kernel_for, kernel_names
from fulgurite.attention.kernels import accumulator_dtype
from fulgurite.attention.masks import (
    Documents,
    Masking,
    Offset,
    as_intervals,
    causal_offset,
    hides_only,
    merge_visible,
)
from fulgurite.attention.planning import make_plan
from fulgurite.attention.request import Placement, PlanRequest, Schedule
from fulgurite.attention.spec import AttentionSpec
from fulgurite.attention.stream import StreamCall, StreamedAttention
from fulgurite.attention.visibility import EntryMasks, Visibility, Window
from fulgurite.errors import ConfigError, DataError
from fulgurite.sampling import rank_and_world

__all__ = [
    "StreamOptions", "attend", "attend_masked", "plan", "spec_of", "stream_attention",
]  # fmt: skip

_MOST_DECIDED = 512  # sizes of calls whose budget is remembered
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class StreamOptions:
    """How attention is computed, whatever it is.

    Args:
        memory_budget: Most that is held at once beside inputs and result: bytes, ``"2GiB"``, a
            fraction of the device, ``"auto"`` for what is free, None for no limit.
        schedule: ``whole``, ``heads``, ``rect`` or ``cqs``; ``auto`` takes the fastest.
        check_finite: Refuse NaN and infinities in the inputs, naming the first.
        device: Where it is computed; where the tensors are by default.
        kernel: ``math`` for matrix products; on a GPU also which of ``flash``, ``cudnn`` and
            ``efficient`` to try first.
        distributed: Deal the work out to the ranks of torch.distributed.
        on_plan: Called with the plan before it is run.
        decided: Budgets that ``"auto"`` was found to be, by the sizes of the call. With it they
            are decided once, so that plans do not follow every change of the free memory.
    """

    memory_budget: Budget = None
    schedule: Schedule = "auto"
    check_finite: bool = False
    device: torch.device | None = None
    kernel: str | None = None
    distributed: bool = False
    on_plan: Callable[[ExecutionPlan], None] | None = None
    decided: dict[Any, int | None] | None = None


@overload
def stream_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    return_lse: Literal[True],
    **options: Any,
) -> tuple[Tensor, Tensor]: ...


@overload
def stream_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    **options: Any,
) -> Tensor: ...


def stream_attention(  # type: ignore[misc]  # overloads leave the names of options to this one
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    memory_budget: Budget = None,
    schedule: Schedule = "auto",
    window: Window | None = None,
    prefix: int | Sequence[int] = 0,
    documents: Documents | None = None,
    chunk: int | None = None,
    query_offset: Offset = None,
    lengths: Sequence[int] | Tensor | None = None,
    starts: Sequence[int] | Tensor | None = None,
    key_mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    check_finite: bool = False,
    device: torch.device | str | None = None,
    kernel: str | None = None,
    distributed: bool = False,
    on_plan: Callable[[ExecutionPlan], None] | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention that holds no more than a budget at once, with gradients.

    The arguments up to ``enable_gqa`` are those of
    :func:`torch.nn.functional.scaled_dot_product_attention`, and are answered as it answers them;
    the masks among the others may be combined with them and with each other. A mask that is a
    tensor is cut tile by tile and lies outside the budget, as the inputs do. Batches of several
    axes that are no view of one, and values of fewer heads than keys, are copied.

    Args:
        query: Shape: (..., H, M, D), or (M, D).
        key: Shape: (..., G, N, D), with G = H, 1, or a divisor of H with ``enable_gqa``.
        value: Shape: (..., G, N, E).
        attn_mask: Boolean, True where a key is seen, or added to the scores, in float32 or the
            type of query; then it may have a gradient. Also a ``CausalBias`` of PyTorch. Shape:
            one that broadcasts to (..., H, M, N).
        dropout_p: Must be 0.
        is_causal: Query i sees keys up to i, or up to its position if ``query_offset`` is given.
        scale: Scale of the scores; 1/√D by default.
        enable_gqa: Allow fewer key/value heads than query heads.
        memory_budget: See :class:`StreamOptions`, as ``schedule``.
        schedule: The way to cut.
        window: A query sees so many keys up to its own position, itself included; or a pair, so
            many before and so many behind it, None for all.
        prefix: With ``is_causal``, all queries see the first so many keys; or a number for each
            batch entry.
        documents: First tokens of the documents in the sequence, those of each batch entry, or
            the ids of documents (B, N); tokens see only their own.
        chunk: Tokens see only their own chunk of so many; chunks begin with the first token that
            is no padding.
        query_offset: Position of the first query among the keys, which masks compare; with a
            cache it is N − M, for which ``"bottom_right"`` may be said.
        lengths: Tokens of each batch entry that are no padding; padding is not seen, and as a
            query it gives zeros.
        starts: First of these tokens; 0 by default, more for padding on the left.
        key_mask: True for keys that are no padding, of any pattern. Shape: (B or 1, N).
        softcap: Scores s become softcap · tanh(s / softcap), before masks and biases.
        sinks: Scores of a key without a value that each query of a head sees; may have a
            gradient. Shape: (H,), (B, H), or (B, H, M) for one of each query.
        alibi_slopes: Each score falls by the slope of its head times the distance of query and
            key. Shape: (H,) or (B, H).
        check_finite: Refuse NaN and infinities in the inputs, naming the first.
        device: Where it is computed; where the tensors are by default. Tensors in host memory
            that a GPU computes stay there, as do the result and the gradients.
        kernel: See :class:`StreamOptions`.
        distributed: Deal the work out to the ranks of torch.distributed, which all give the same
            tensors and all get the whole result and the whole gradients.
        on_plan: Called with the plan before it is run.
        return_lse: Return the log-sum-exp of the scores of each query too.

    Returns:
        Attention in the type of query, shape (..., H, M, E); with ``return_lse`` also the
        log-sum-exp in float32 (float64 for float64), shape (..., H, M), without gradient.

    Raises:
        ConfigError: An option is not supported, or the budget is too small.
        DataError: Shapes, types or devices do not fit together.

    Example:
        >>> q = torch.randn(1, 2, 100, 16, generator=torch.Generator().manual_seed(0))
        >>> out = stream_attention(q, q, q, is_causal=True, memory_budget="16KiB")
        >>> torch.testing.assert_close(
        ...     out, torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        ... )

    Source: Stream-CQSA, arXiv 2604.20819; the choice of schedules: card section 7.
    """
    if check_number("dropout_p", dropout_p):
        raise ConfigError(
            f"stream_attention does no dropout (dropout_p={dropout_p}).",
            "Set the attention dropout of the model to 0.",
        )
    compute_device = None if device is None else kernel_device(device)
    options = StreamOptions(
        memory_budget, schedule, check_finite, compute_device, kernel, distributed, on_plan
    )
    masking = Masking(
        is_causal, window, prefix, documents, chunk, query_offset, lengths, starts, key_mask
    )
    out, lse = attend_masked(
        query, key, value, attn_mask, masking, scale=scale, enable_gqa=enable_gqa,
        softcap=softcap, sinks=sinks, alibi_slopes=alibi_slopes, options=options,
    )  # fmt: skip
    return (out, lse) if return_lse else out


class _Call(NamedTuple):
    """A call whose tensors have four axes and one batch.

    Attributes:
        lead: Axes before the heads.
        query: Shape: (B, H, M, D).
        key: Shape: (B, G, N, D).
        value: Shape: (B, G, N, E).
        visible: For all batch entries, or for each.
        biases: What is added to scores or hides them; that with a gradient first.
        bias: The tensor of the first, if it has a gradient.
    """

    lead: torch.Size
    query: Tensor
    key: Tensor
    value: Tensor
    visible: tuple[Visibility, ...]
    biases: tuple[TileBias, ...]
    bias: Tensor | None


def attend_masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    masking: Masking,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    options: StreamOptions,
) -> tuple[Tensor, Tensor]:
    """Return the attention of :func:`stream_attention` and its log-sum-exp.

    Args:
        query: Queries. Shape: (..., H, M, D).
        key: Keys. Shape: (..., G, N, D).
        value: Values. Shape: (..., G, N, E).
        attn_mask: Mask or bias that broadcasts to the scores.
        masking: What is seen.
        scale: Scale of the scores.
        enable_gqa: Allow fewer key/value heads.
        softcap: Cap of the scores.
        sinks: Scores of a key without a value.
        alibi_slopes: Slopes of the scores.
        options: How it is computed.

    Raises:
        ConfigError: An option is not supported, or the budget is too small.
        DataError: Shapes, types or devices do not fit together.
    """
    _check_tensors(query=query, key=key, value=value)
    masks = {"attn_mask": attn_mask, "key_mask": masking.key_mask, "sinks": sinks}
    masks["alibi_slopes"] = alibi_slopes
    _check_tensors(**{name: mask for name, mask in masks.items() if mask is not None})
    for name, flag in (("is_causal", masking.is_causal), ("enable_gqa", enable_gqa)):
        if not isinstance(flag, bool):
            raise ConfigError(f"{name}={flag!r} is no bool.", "Give True or False.")
    is_matrix = query.ndim == key.ndim == value.ndim == 2
    if is_matrix:
        query, key, value = query[None], key[None], value[None]
    _check_types(query, key, value)
    kind = query.device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if casts and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        is_plain = attn_mask is not None and causal_offset(attn_mask, 0, 0) is None
        if attn_mask is not None and is_plain and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(dtype)
    call = _normalize_inputs(query, key, value, attn_mask, masking, enable_gqa, alibi_slopes)
    out, lse = attend(
        call.query, call.key, call.value, call.visible, scale=scale, softcap=softcap,
        sinks=sinks, biases=call.biases, bias=call.bias, options=options,
    )  # fmt: skip
    out = out.reshape(*call.lead, *out.shape[1:])
    lse = lse.reshape(*call.lead, *lse.shape[1:])
    return (out[0], lse[0]) if is_matrix else (out, lse)


def _normalize_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    masking: Masking,
    enable_gqa: bool,
    alibi_slopes: Tensor | None,
) -> _Call:
    """Broadcast tensors to four axes, and turn masks into intervals where they are such."""
    lead, query, key, value = check_call(query, key, value, enable_gqa)
    entries = math.prod(lead)
    query, key, value = (x.reshape(entries, *x.shape[-3:]) for x in (query, key, value))
    batch, heads, queries = query.shape[:3]
    keys = key.shape[2]
    visible = masking.visibility(batch, queries, keys)
    biases: list[TileBias] = []
    bias: Tensor | None = None
    if masking.key_mask is not None:
        mask = masking.key_mask[:, None, None, :]
        if as_intervals(mask, batch, queries, keys) is None and 0 not in (queries, keys):
            biases.append(DenseBias(mask))
    if attn_mask is not None:
        offset = causal_offset(attn_mask, queries, keys)
        if offset is not None:
            causal = Visibility.of(queries, keys, EntryMasks(is_causal=True, offset=offset))
            visible = merge_visible(visible, (causal,))
        else:
            mask = _four_axes(attn_mask, query, lead, (heads, queries, keys))
            intervals = None
            if not _is_abstract(mask) and hides_only(mask):
                intervals = as_intervals(mask, batch, queries, keys)
            if intervals is not None:
                visible = merge_visible(visible, intervals)
            else:
                biases.insert(0, DenseBias(mask))
                bias = mask if mask.requires_grad else None
    if alibi_slopes is not None:
        biases.append(_alibi(alibi_slopes, masking, query, key))
    return _Call(lead, query, key, value, visible, tuple(biases), bias)


def _alibi(slopes: Tensor, masking: Masking, query: Tensor, key: Tensor) -> AlibiBias:
    (batch, heads, queries), keys = query.shape[:3], key.shape[2]
    slopes = _by_head("alibi_slopes", slopes, batch, heads)
    if slopes.requires_grad:
        raise ConfigError(
            "alibi_slopes require gradients, which streamed attention does not give them.",
            "Detach them, or give attn_mask a tensor that is made of them.",
        )
    offset = masking.offset(queries, keys)
    if offset is None and queries != keys:
        raise ConfigError(
            f"There are {queries} queries and {keys} keys, and alibi_slopes compare their "
            "positions.",
            'Give query_offset; for a cache, "bottom_right".',
        )
    return AlibiBias(slopes, offset or 0)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: tuple[Visibility, ...],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    biases: tuple[TileBias, ...] = (),
    bias: Tensor | None = None,
    options: StreamOptions,
) -> tuple[Tensor, Tensor]:
    """Attention of tensors with four axes, where it is known what is seen.

    Args:
        query: Shape: (B, H, M, D).
        key: Shape: (B, G, N, D).
        value: Shape: (B, G, N, E).
        visible: For all batch entries, or for each.
        scale: Scale of the scores; 1/√D by default.
        softcap: See :func:`stream_attention`.
        sinks: See :func:`stream_attention`.
        biases: What is added to scores or hides them.
        bias: The tensor of the first of them, if it has a gradient.
        options: How it is computed.

    Returns:
        Out (B, H, M, E) and log-sum-exp (B, H, M).

    Raises:
        ConfigError: An option is not supported, or the budget is too small.
        DataError: Inputs are not finite, and ``check_finite`` is set.
    """
    if options.check_finite:
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            refuse_not_finite(name, tensor)
    spec = _spec(query, key, value, visible, scale, softcap, biases, sinks is not None)
    if sinks is not None:
        sinks = _add_sink_axes(sinks, spec)
    compute_device = query.device if options.device is None else options.device
    kernel_for(compute_device, query.dtype, prefer=options.kernel)
    abstract = any(_is_abstract(x) for x in (query, key, value))
    resident = compute_device == query.device
    tensors = (query, key, value, bias, sinks)
    has_gradient = any(x is not None and x.requires_grad for x in tensors)
    backward = torch.is_grad_enabled() and has_gradient
    request = PlanRequest(
        budget=_decide_budget(spec, compute_device, backward, options),
        schedule=options.schedule,
        backward=backward,
        placement=Placement(resident, _packs(query, key, value), not resident, not resident),
        shard=ranks_share(options.distributed),
        kernel=options.kernel,
    )
    if not abstract and not spec.is_empty:
        request = _on_machine(request, spec, compute_device, options)
    plan = make_plan(spec, request)
    if options.on_plan:
        options.on_plan(plan)
    if abstract:
        _refuse_tracing()
        return _abstract_result(query, value, key)
    call = StreamCall(plan, biases, compute_device)
    out, lse = StreamedAttention.apply(call, *tensors)  # type: ignore[no-untyped-call]
    return out, lse


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


def _packs(*tensors: Tensor) -> bool:
    """Whether kernels get copies of tiles, since the last stride is not 1."""
    return any(x.stride(-1) != 1 and x.shape[-1] > 1 for x in tensors)


def _is_abstract(tensor: Tensor) -> bool:
    """Whether a tensor has no numbers."""
    module = sys.modules.get("torch._subclasses.fake_tensor")  # slow to import
    return tensor.is_meta or (module is not None and isinstance(tensor, module.FakeTensor))


def _spec(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: tuple[Visibility, ...],
    scale: float | None,
    softcap: float | None,
    biases: tuple[TileBias, ...],
    has_sinks: bool = False,
) -> AttentionSpec:
    """Sizes and masking.

    Raises:
        ConfigError: The softcap or the scale is no number that scores can have.
    """
    batch, heads, _, head_dim = query.shape
    softcap = None if softcap is None else check_number("softcap", softcap)
    scale = None if scale is None else check_number("scale", scale)
    if softcap is not None and not 0 < softcap < math.inf:
        raise ConfigError(f"softcap={softcap} caps nothing.", "Give a positive number, or None.")
    if scale is None:
        scale = 1 / math.sqrt(head_dim) if head_dim else 1.0
    if not math.isfinite(scale):
        raise ConfigError(f"scale={scale} gives no scores.", "Give a finite number.")
    return AttentionSpec(
        batch, heads, key.shape[1], head_dim, value.shape[-1], query.dtype, visible,
        float(scale), softcap, describe_biases(biases), has_sinks,
    )  # fmt: skip


def spec_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masking: Masking,
    *,
    enable_gqa: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
) -> AttentionSpec:
    """Return the sizes and masking of tensors of four axes that need no broadcasting.

    Args:
        query: Shape: (B, H, M, D).
        key: Shape: (B, G, N, D).
        value: Shape: (B, G, N, E).
        masking: What is seen.
        enable_gqa: Allow fewer key/value heads than query heads.
        scale: Scale of the scores; 1/√D by default.
        softcap: Cap of the scores.

    Raises:
        ConfigError: Options are not supported, or do not fit together.
        DataError: The tensors do not fit together.
    """
    _, *tensors = check_call(query, key, value, enable_gqa)
    for name, before, after in zip(
        ["query", "key", "value"], (query, key, value), tensors, strict=True
    ):
        if before.shape != after.shape:
            raise DataError(
                f"{name} is {tuple(before.shape)}, and would be {tuple(after.shape)} beside the "
                "others.",
                "Give query, key and value of one batch, and as many key as value heads.",
            )
    batch, queries, keys = len(query), query.shape[2], key.shape[2]
    visible = masking.visibility(batch, queries, keys)
    if masking.key_mask is not None and 0 not in (queries, keys):
        mask = masking.key_mask[:, None, None, :]
        if as_intervals(mask, batch, queries, keys) is None:
            raise ConfigError(
                "The keys of key_mask are not side by side, and files take no mask with holes.",
                "Use stream_attention, or move padding to the ends.",
            )
    return _spec(query, key, value, visible, scale, softcap, ())


def _check_tensors(**tensors: object) -> None:
    """Refuse what is no tensor.

    Raises:
        DataError: An argument is not a tensor.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise DataError(f"{name} is of type {type(tensor).__name__}.", "Give a torch.Tensor.")


def _by_head(name: str, numbers: Tensor, batch: int, heads: int) -> Tensor:
    """Give numbers of heads an axis for the batch. Shape: (H,) or (B, H) -> (B or 1, H).

    Raises:
        DataError: The shape does not fit the batch and the heads, or the type is no floating type.
    """
    rows = numbers[None] if numbers.ndim == 1 else numbers
    if rows.ndim != 2 or rows.shape[1] != heads or rows.shape[0] not in (1, batch):
        raise DataError(
            f"{name} is {tuple(numbers.shape)} for {batch} batch entries of {heads} heads.",
            "Give a number for each head, (heads,) or (batch, heads).",
        )
    if not rows.is_floating_point():
        raise DataError(f"{name} is of {numbers.dtype}.", "Give floating numbers.")
    return rows


def _add_sink_axes(sinks: Tensor, spec: AttentionSpec) -> Tensor:
    """Give sinks all axes. Shape: (H,), (B, H) or (B, H, M) -> (B or 1, H, M or 1).

    Raises:
        DataError: The shape does not fit the batch, the heads and the queries.
    """
    if sinks.ndim < 3:
        return _by_head("sinks", sinks, spec.batch, spec.heads)[..., None]
    fits = sinks.ndim == 3 and sinks.shape[0] in (1, spec.batch)
    if not fits or sinks.shape[1] != spec.heads or sinks.shape[2] not in (1, spec.queries):
        raise DataError(
            f"sinks are {tuple(sinks.shape)} for {spec.batch} batch entries of {spec.heads} heads "
            f"and {spec.queries} queries.",
            "Give a number for each head, (heads,), (batch, heads) or (batch, heads, queries).",
        )
    return sinks


def _four_axes(
    mask: Tensor, query: Tensor, lead: torch.Size, sizes: tuple[int, int, int]
) -> Tensor:
    """Give a mask the axes of scores, of size 1 where it does not depend on them.

    Raises:
        DataError: The mask does not broadcast to the scores, or has another type or device.
    """
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise DataError(
            f"attn_mask is of {mask.dtype}, query of {query.dtype}.",
            "Give booleans, True where a key is seen, or numbers in float32 or the type of query.",
        )
    if mask.device != query.device and mask.numel() > 1:
        raise DataError(
            f"attn_mask is on {mask.device}, query on {query.device}.", "Give one device."
        )
    target = (*lead, *sizes)
    shape = (1,) * (len(target) - mask.ndim) + tuple(mask.shape)
    fits = len(shape) == len(target) and mask.ndim >= 2
    if not fits or any(a not in (1, b) for a, b in zip(shape, target, strict=True)):
        raise DataError(
            f"attn_mask is {tuple(mask.shape)}, and scores are {target}.",
            "Give a mask that broadcasts to the scores, with an axis of queries and one of keys.",
        )
    mask = mask.reshape(shape)
    if any(size > 1 for size in shape[:-3]):
        return mask.expand(*lead, *shape[-3:]).reshape(math.prod(lead), *shape[-3:])
    return mask.reshape(1, *shape[-3:])


def refuse_not_finite(name: str, tensor: Tensor) -> None:
    """Name the first number of a tensor that is not finite. Shape: (..., N, D).

    Raises:
        DataError: A number is NaN or infinite.
    """
    for start in range(0, tensor.shape[-2], 4096):  # so that masks of a mapped tensor stay small
        bad = ~tensor[..., start : start + 4096, :].isfinite().all(-1)
        if bool(bad.any()):
            *head, token = (int(i) for i in bad.nonzero()[0])
            raise DataError(
                f"{name} is not finite at token {start + token} of (batch, head) {tuple(head)}.",
                "Correct the input, or leave out check_finite.",
            )


def ranks_share(distributed: bool) -> tuple[int, int]:
    """Rank and number of ranks that share a call."""
    return rank_and_world() if distributed else (0, 1)


def _decide_budget(
    spec: AttentionSpec, device: torch.device, backward: bool, options: StreamOptions
) -> int | None:
    """The budget in bytes; ``"auto"`` as it was for the last call of these sizes."""
    if options.memory_budget != "auto" or options.decided is None:
        return _budget(options.memory_budget, device, options.distributed)
    key = (
        spec.batch, spec.heads, spec.kv_heads, spec.queries, spec.keys, spec.head_dim,
        spec.value_dim, spec.dtype, device, backward,
    )  # fmt: skip
    if key not in options.decided:
        if len(options.decided) >= _MOST_DECIDED:
            options.decided.clear()
        options.decided[key] = _budget("auto", device, options.distributed)
    return options.decided[key]


def _budget(budget: Budget, device: torch.device, distributed: bool) -> int | None:
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

    Ranks plan by the costs that the first of them measured.
    """
    kernels = kernel_names(
        device, spec.dtype, max(spec.head_dim, spec.value_dim), prefer=options.kernel,
        has_wide_bias=spec.has_wide_bias,
    )  # fmt: skip
    if options.memory_budget is None:
        return replace(request, kernels=kernels)
    measure = agreed_costs if request.ranks > 1 else measured_costs
    costs = measure(device, spec.dtype, max(1, spec.head_dim))
    return replace(request, kernels=kernels, costs=costs)


def check_call(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[torch.Size, Tensor, Tensor, Tensor]:
    """Check what fits together, and broadcast it as PyTorch's attention does.

    Args:
        query: Shape: (..., H, M, D).
        key: Shape: (..., G, N, D).
        value: Shape: (..., G, N, E).
        enable_gqa: Allow fewer key/value heads than query heads.

    Returns:
        The axes before the heads, and query, key and value with all of them; key and value have
        the same heads, as many as query or a divisor.

    Raises:
        ConfigError: Attention does not do the type.
        DataError: Types, devices or shapes of the tensors do not fit together.
    """
    tensors = {"query": query, "key": key, "value": value}
    _check_types(query, key, value)
    axes = max(x.ndim for x in tensors.values())
    if min(x.ndim for x in tensors.values()) < 2 or axes < 3:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
        raise DataError(f"{shapes} have too few axes.", "Give (batch, heads, tokens, head size).")
    query, key, value = (
        x.reshape(*(1,) * (max(axes, 3) - x.ndim), *x.shape) for x in (query, key, value)
    )
    if key.shape[-2] != value.shape[-2]:
        raise DataError(
            f"key is {tuple(key.shape)} and value is {tuple(value.shape)}.",
            "Give as many values as keys.",
        )
    if query.shape[-1] != key.shape[-1]:
        raise DataError(
            f"The head size of query is {query.shape[-1]}, that of key is {key.shape[-1]}.",
            "Give one head size.",
        )
    try:
        lead: torch.Size = torch.broadcast_shapes(  # type: ignore[no-untyped-call]
            *(x.shape[:-3] for x in (query, key, value))
        )
    except RuntimeError:
        raise DataError(
            f"query is {tuple(query.shape)}, key is {tuple(key.shape)} and value is "
            f"{tuple(value.shape)}.",
            "Give (batch, heads, tokens, head size) with one batch, or 1 where it is shared.",
        ) from None
    heads, kv_heads = query.shape[-3], _kv_heads(query, key, value, enable_gqa)
    heads = kv_heads if heads == 1 else heads
    return (
        lead,
        query.expand(*lead, heads, -1, -1),
        key.expand(*lead, kv_heads, -1, -1),
        value.expand(*lead, kv_heads, -1, -1),
    )


def _check_types(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Check types and devices, and that the numbers lie in plain memory.

    Raises:
        ConfigError: Attention does not do the type.
        DataError: Types, devices or layouts of the tensors differ.
    """
    tensors = {"query": query, "key": key, "value": value}
    for fact in ("dtype", "device", "layout"):
        if len({getattr(x, fact) for x in tensors.values()}) > 1:
            facts = ", ".join(f"{name} {getattr(x, fact)}" for name, x in tensors.items())
            raise DataError(f"The {fact}s differ: {facts}.", f"Give one {fact}.")
    if query.layout != torch.strided:
        raise ConfigError(f"Attention does not do {query.layout}.", "Give dense tensors.")
    if query.dtype not in _FLOATS:
        raise ConfigError(
            f"Attention does not do {query.dtype}.", "Use float64, float32, bfloat16 or float16."
        )


def _kv_heads(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> int:
    """The heads that key and value have together.

    Raises:
        DataError: The heads of key and value do not fit those of query.
    """
    heads, key_heads, value_heads = (x.shape[-3] for x in (query, key, value))
    if key_heads != value_heads and 1 not in (key_heads, value_heads):
        raise DataError(
            f"key has {key_heads} heads and value has {value_heads}.",
            "Repeat the heads of the one that has fewer.",
        )
    kv_heads = max(key_heads, value_heads) if 0 not in (key_heads, value_heads) else 0
    fits = heads == kv_heads or 1 in (heads, kv_heads)
    if not fits and (not enable_gqa or not kv_heads or heads % kv_heads):
        raise DataError(
            f"There are {heads} query heads and {kv_heads} key/value heads.",
            "Give as many, or set enable_gqa=True where the second divides the first.",
        )
    return kv_heads


def plan(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    memory_budget: Budget = None,
    schedule: Schedule = "auto",
    window: Window | None = None,
    prefix: int | Sequence[int] = 0,
    documents: Documents | None = None,
    chunk: int | None = None,
    query_offset: Offset = None,
    lengths: Sequence[int] | Tensor | None = None,
    starts: Sequence[int] | Tensor | None = None,
    key_mask: Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    backward: bool = False,
) -> ExecutionPlan:
    """Return how :func:`stream_attention` would cut a call; ``.explain()`` says why.

    Tensors on the ``meta`` device and fake tensors do, so calls can be planned that no machine
    could hold.

    Args:
        query: Shape: (..., H, M, D).
        key: Shape: (..., G, N, D).
        value: Shape: (..., G, N, E); as key by default.
        attn_mask: Mask or bias that broadcasts to the scores. Shape: (..., H, M, N).
        is_causal: Query i sees keys up to i.
        scale: Scale of the scores.
        enable_gqa: Allow fewer key/value heads.
        memory_budget: Most that is held at once.
        schedule: The way to cut.
        window: Sliding window.
        prefix: Keys that all queries see.
        documents: Documents of the tokens.
        chunk: Tokens of a chunk.
        query_offset: Position of the first query.
        lengths: Tokens that are no padding.
        starts: First of these tokens.
        key_mask: Keys that are no padding.
        softcap: Cap of the scores.
        alibi_slopes: Slopes of the scores.
        backward: Whether gradients must fit too.

    Raises:
        ConfigError: The budget is too small, or options do not fit together.
        DataError: Shapes, types or devices do not fit together.

    Example:
        >>> q = torch.empty(1, 8, 2**20, 64, device="meta")
        >>> plan(q, q, is_causal=True, memory_budget="256MiB").schedule
        'rect'
    """
    value = key if value is None else value
    _check_tensors(query=query, key=key, value=value)
    options = StreamOptions(memory_budget, schedule)
    masking = Masking(
        is_causal, window, prefix, documents, chunk, query_offset, lengths, starts, key_mask
    )
    call = _normalize_inputs(query, key, value, attn_mask, masking, enable_gqa, alibi_slopes)
    spec = _spec(call.query, call.key, call.value, call.visible, scale, softcap, call.biases)
    tensors = call.query, call.key, call.value
    abstract = any(_is_abstract(x) for x in tensors)
    request = PlanRequest(
        budget=parse_budget(memory_budget, query.device),
        schedule=schedule,
        backward=backward,
        placement=Placement(packs=_packs(*tensors)),
    )
    if not abstract and not spec.is_empty:
        request = _on_machine(request, spec, query.device, options)
    return make_plan(spec, request)
