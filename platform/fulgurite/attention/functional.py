"""Attention in a memory budget, called like PyTorch's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from fulgurite.attention.calibration import measured_costs
from fulgurite.attention.kernels import accumulator_dtype, kernel_for
from fulgurite.attention.planning import (
    Budget,
    Costs,
    Plan,
    Schedule,
    Shape,
    make_plan,
    parse_budget,
)
from fulgurite.attention.stream import StreamedAttention
from fulgurite.attention.tiles import Visibility
from fulgurite.errors import ConfigError, DataError
from fulgurite.sampling import rank_and_world

__all__ = ["plan", "stream_attention"]


@overload
def stream_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    memory_budget: Budget = None,
    schedule: Schedule = "auto",
    window: int | None = None,
    prefix: int = 0,
    documents: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    check_finite: bool = False,
    device: torch.device | str | None = None,
    kernel: str | None = None,
    distributed: bool = False,
    on_plan: Callable[[Plan], None] | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def stream_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    memory_budget: Budget = None,
    schedule: Schedule = "auto",
    window: int | None = None,
    prefix: int = 0,
    documents: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    check_finite: bool = False,
    device: torch.device | str | None = None,
    kernel: str | None = None,
    distributed: bool = False,
    on_plan: Callable[[Plan], None] | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def stream_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    memory_budget: Budget = None,
    schedule: Schedule = "auto",
    window: int | None = None,
    prefix: int = 0,
    documents: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    check_finite: bool = False,
    device: torch.device | str | None = None,
    kernel: str | None = None,
    distributed: bool = False,
    on_plan: Callable[[Plan], None] | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention that holds no more than a budget at once, with gradients.

    The arguments up to ``enable_gqa`` are those of
    :func:`torch.nn.functional.scaled_dot_product_attention`.

    Args:
        query: Shape: (..., H, M, D), or (M, D).
        key: Shape: (..., G, N, D), with G = H, or a divisor of H with ``enable_gqa``.
        value: Shape: as key.
        attn_mask: Must be None; see ``is_causal``, ``window``, ``prefix`` and ``documents``.
        dropout_p: Must be 0.
        is_causal: Query i sees keys up to i.
        scale: Of the scores; 1/√D by default.
        enable_gqa: Allow fewer key/value heads than query heads.
        memory_budget: Most that is held at once beside inputs and result: bytes, ``"2GiB"``, a
            fraction of the device, ``"auto"`` for what is free, None for no limit.
        schedule: ``whole``, ``heads``, ``rect`` or ``cqs``; ``auto`` takes the fastest.
        window: Query i sees no key before i − window + 1.
        prefix: With ``is_causal``, all queries see the first so many keys.
        documents: First tokens of the documents in the sequence; tokens see only their own.
        lengths: Tokens of each batch entry that are no padding, at its end; padding is not seen,
            and as a query it gives zeros.
        check_finite: Refuse NaN and infinities in the inputs, naming the first.
        device: Where it is computed; where the tensors are by default. Tensors in host memory
            that a GPU computes stay there, as do the result and the gradients.
        kernel: On a GPU, which of ``flash``, ``cudnn``, ``efficient`` and ``eager`` to try first.
        distributed: Deal the work out to the ranks of torch.distributed, which all give the same
            tensors and all get the whole result and the whole gradients.
        on_plan: Called with the plan before it is run.
        return_lse: Return the log-sum-exp of the scores of each query too.

    Returns:
        Attention in the type of query, shape (..., H, M, D); with ``return_lse`` also the
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
    if attn_mask is not None:
        raise ConfigError(
            "stream_attention takes no attn_mask: a dense mask would not fit any budget.",
            "Give is_causal, window, prefix or documents.",
        )
    if dropout_p:
        raise ConfigError(
            f"stream_attention does no dropout (dropout_p={dropout_p}).",
            "Set the attention dropout of the model to 0.",
        )
    options = {
        "memory_budget": memory_budget, "schedule": schedule, "window": window, "prefix": prefix,
        "documents": documents, "device": device, "kernel": kernel, "distributed": distributed,
        "on_plan": on_plan,
    }  # fmt: skip
    masks: tuple[Any, ...] = (None, 0.0, is_causal, scale, enable_gqa)
    if check_finite:
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            refuse_not_finite(name, tensor)
    if lengths is not None:
        out, lse = _padded(query, key, value, lengths, masks, options)
        return (out, lse) if return_lse else out
    if query.ndim == 2:
        out, lse = _again(query[None], key[None], value[None], *masks, **options, return_lse=True)
        return (out[0], lse[0]) if return_lse else out[0]
    if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    shape, visible = check_call(query, key, value, enable_gqa, is_causal, window, prefix, documents)
    where = query.device if device is None else torch.device(device)
    kernel_for(where, query.dtype, prefer=kernel)
    lead = query.shape[:-3]
    if query.numel() == 0 or key.numel() == 0:
        lse = query.new_full(query.shape[:-1], -math.inf, dtype=accumulator_dtype(query.dtype))
        return (query * 0, lse) if return_lse else query * 0
    resident = where.type == query.device.type
    chosen = make_plan(
        shape,
        visible,
        _budget(memory_budget, where, distributed),
        schedule,
        backward=torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)),
        resident=resident,
        tiled=not resident,
        ahead=not resident,
        kernel=kernel,
        share=ranks_share(distributed),
        costs=_costs(where, query, memory_budget, distributed),
    )
    if on_plan:
        on_plan(chosen)
    out, lse = StreamedAttention.apply(  # type: ignore[no-untyped-call]
        *(x.reshape(-1, *x.shape[-3:]) for x in (query, key, value)),
        chosen,
        1 / math.sqrt(query.shape[-1]) if scale is None else scale,
        query.device if resident else where,
    )
    out = out.reshape(*lead, *out.shape[1:])
    return (out, lse.reshape(*lead, *lse.shape[1:])) if return_lse else out


# overloads cannot tell what is in a dict of options
_again: Callable[..., tuple[Tensor, Tensor]] = stream_attention


def _padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    masks: tuple[Any, ...],
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Attention of sequences of different lengths: each without its padding.

    Raises:
        DataError: The lengths do not fit the tensors.
    """
    tokens = key.shape[-2]
    if query.ndim != 4 or query.shape[-2] != tokens or len(lengths) != len(query):
        raise DataError(
            f"There are {len(lengths)} lengths for query {tuple(query.shape)} and key "
            f"{tuple(key.shape)}.",
            "Give one length for each batch entry, of self-attention (batch, heads, tokens, size).",
        )
    outs, lses = [], []
    for b, length in enumerate(int(n) for n in lengths):
        if not 0 <= length <= tokens:
            raise DataError(
                f"Length {length} of batch entry {b} is not within its {tokens} tokens.",
                "Give the number of tokens before the padding.",
            )
        own = (x[b : b + 1, :, :length] for x in (query, key, value))
        out, lse = _again(*own, *masks, **options, return_lse=True)
        outs.append(F.pad(out, (0, 0, 0, tokens - length)))
        lses.append(F.pad(lse, (0, tokens - length), value=-math.inf))
    return torch.cat(outs), torch.cat(lses)


def refuse_not_finite(name: str, tensor: Tensor) -> None:
    """Name the first number of a tensor that is not finite. Shape: (..., N, D).

    Raises:
        DataError: There is one.
    """
    for at in range(0, tensor.shape[-2], 4096):  # so that masks of a mapped tensor stay small
        bad = ~tensor[..., at : at + 4096, :].isfinite().all(-1)
        if bool(bad.any()):
            *place, token = (int(i) for i in bad.nonzero()[0])
            raise DataError(
                f"{name} is not finite at token {at + token} of (batch, head) {tuple(place)}.",
                "Mend the input, or leave out check_finite.",
            )


def ranks_share(distributed: bool) -> tuple[int, int]:
    """Rank and number of ranks that share a call."""
    return rank_and_world() if distributed else (0, 1)


def _budget(budget: Budget, device: torch.device, distributed: bool) -> int | None:
    """The budget in bytes; the smallest of all ranks, since they must plan alike."""
    found = parse_budget(budget, device)
    if found is None or isinstance(budget, int) or ranks_share(distributed)[1] == 1:
        return found
    agreed = torch.tensor(found, dtype=torch.int64, device=device)
    dist.all_reduce(agreed, dist.ReduceOp.MIN)
    return int(agreed)


def _costs(device: torch.device, query: Tensor, budget: Budget, distributed: bool) -> Costs | None:
    """Measure the machine only where there is something to choose, and ranks need not agree."""
    if budget is None or distributed:
        return None
    return measured_costs(device, query.dtype, query.shape[-1])


def check_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    enable_gqa: bool,
    is_causal: bool,
    window: int | None,
    prefix: int,
    documents: Sequence[int] | None,
) -> tuple[Shape, Visibility]:
    """Check what fits together, and return the sizes and what is seen.

    Raises:
        ConfigError: The masks do not fit together.
        DataError: The tensors do not.
    """
    names = {"query": query, "key": key, "value": value}
    for fact in ("dtype", "device"):
        if len({getattr(x, fact) for x in names.values()}) > 1:
            found = ", ".join(f"{name} {getattr(x, fact)}" for name, x in names.items())
            raise DataError(f"The {fact}s differ: {found}.", f"Give one {fact}.")
    if key.shape != value.shape:
        raise DataError(
            f"key is {tuple(key.shape)} and value is {tuple(value.shape)}.",
            "Give as many values as keys, of the same size.",
        )
    if query.ndim != key.ndim or query.ndim < 3 or query.shape[:-3] != key.shape[:-3]:
        raise DataError(
            f"query is {tuple(query.shape)} and key is {tuple(key.shape)}.",
            "Give (batch, heads, tokens, head size) with one batch.",
        )
    if query.shape[-1] != key.shape[-1]:
        raise DataError(
            f"The head size of query is {query.shape[-1]}, that of key is {key.shape[-1]}.",
            "Give one head size.",
        )
    heads, kv_heads = query.shape[-3], key.shape[-3]
    if heads != kv_heads and (not enable_gqa or not kv_heads or heads % kv_heads):
        raise DataError(
            f"There are {heads} query heads and {kv_heads} key/value heads.",
            "Give as many, or set enable_gqa=True where the second divides the first.",
        )
    shape = Shape(math.prod(query.shape[:-3]), heads, kv_heads, query.shape[-1], query.dtype)
    starts = None if documents is None else tuple(int(d) for d in documents)
    return shape, Visibility(query.shape[-2], key.shape[-2], is_causal, window, prefix, starts)


def plan(
    query: Tensor,
    key: Tensor,
    *,
    is_causal: bool = False,
    enable_gqa: bool = False,
    memory_budget: Budget = None,
    schedule: Schedule = "auto",
    window: int | None = None,
    prefix: int = 0,
    documents: Sequence[int] | None = None,
    backward: bool = False,
) -> Plan:
    """Return how :func:`stream_attention` would cut a call; ``.explain()`` says why.

    Tensors on the ``meta`` device do, so calls can be planned that no machine could hold.

    Args:
        query: Shape: (..., H, M, D).
        key: Shape: (..., G, N, D).
        is_causal: See :func:`stream_attention`, as the rest.
        enable_gqa: Allow fewer key/value heads than query heads.
        memory_budget: Most that is held at once.
        schedule: The way to cut.
        window: Sliding window.
        prefix: Keys that all queries see.
        documents: First tokens of the documents.
        backward: Whether gradients must fit too.

    Raises:
        ConfigError: The budget is too small, or options do not fit together.
        DataError: Shapes, types or devices do not fit together.

    Example:
        >>> q = torch.empty(1, 8, 2**20, 64, device="meta")
        >>> plan(q, q, is_causal=True, memory_budget="256MiB").schedule
        'rect'
    """
    shape, visible = check_call(query, key, key, enable_gqa, is_causal, window, prefix, documents)
    budget = parse_budget(memory_budget, query.device)
    return make_plan(shape, visible, budget, schedule, backward=backward, resident=False)
