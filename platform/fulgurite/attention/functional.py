"""Attention in a memory budget, called like PyTorch's.

Axes: B batch, H query heads, G key/value heads, M queries, N keys, D size of a query and key,
E size of a value.
"""

from __future__ import annotations

from typing import Unpack, overload

from torch import Tensor

from fulgurite.attention.call_options import Scoring, StreamOptions
from fulgurite.attention.calls import normalize_call
from fulgurite.attention.checks import check_number
from fulgurite.attention.engine import attend_masked, plan_call
from fulgurite.attention.execution_plan import ExecutionPlan
from fulgurite.attention.keywords import (
    PlanKeywords,
    StreamKeywords,
    StreamKeywordsWithLse,
    StreamKeywordsWithoutLse,
    check_keywords,
    make_record,
    show_keywords,
)
from fulgurite.attention.masks import Masking
from fulgurite.attention.tensor_checks import check_tensors
from fulgurite.errors import ConfigError

__all__ = ["plan", "stream_attention"]


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
    **options: Unpack[StreamKeywordsWithLse],
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
    **options: Unpack[StreamKeywordsWithoutLse],
) -> Tensor: ...


@show_keywords(StreamKeywords, Masking, Scoring, StreamOptions)
def stream_attention(  # noqa: PLR0917 (PyTorch's order)
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    **options: object,
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
        options: Any of the keywords below.

    Keyword Args:
        memory_budget: See :class:`~fulgurite.attention.call_options.StreamOptions`, as
            ``schedule``.
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
        kernel: See :class:`~fulgurite.attention.call_options.StreamOptions`.
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
        >>> import torch
        >>> q = torch.randn(1, 2, 100, 16, generator=torch.Generator().manual_seed(0))
        >>> out = stream_attention(q, q, q, is_causal=True, memory_budget="16KiB")
        >>> torch.testing.assert_close(
        ...     out, torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        ... )

    Source: Stream-CQSA, arXiv 2604.20819; the choice of schedules: docs/papers/stream_cqsa.md
    section 7.
    """
    check_keywords("stream_attention", options, StreamKeywords)
    if check_number("dropout_p", dropout_p):
        raise ConfigError(
            f"stream_attention does no dropout (dropout_p={dropout_p}).",
            "Set the attention dropout of the model to 0.",
        )
    out, lse = attend_masked(
        query, key, value,
        masking=make_record(Masking, options, is_causal=is_causal),
        scoring=make_record(
            Scoring, options, attn_mask=attn_mask, scale=scale, enable_gqa=enable_gqa
        ),
        options=make_record(StreamOptions, options),
    )  # fmt: skip
    return (out, lse) if options.get("return_lse", False) else out


@show_keywords(PlanKeywords, Masking, Scoring, StreamOptions)
def plan(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    backward: bool = False,
    **options: Unpack[PlanKeywords],
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
        backward: Whether gradients must fit too.
        options: Any of the keywords below.

    Keyword Args:
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

    Raises:
        ConfigError: The budget is too small, or options do not fit together.
        DataError: Shapes, types or devices do not fit together.

    Example:
        >>> import torch
        >>> q = torch.empty(1, 8, 2**20, 64, device="meta")
        >>> plan(q, q, is_causal=True, memory_budget="256MiB").schedule
        'rect'
    """
    check_keywords("plan", options, PlanKeywords)
    value = key if value is None else value
    check_tensors(query=query, key=key, value=value)
    scoring = make_record(Scoring, options, attn_mask=attn_mask, scale=scale, enable_gqa=enable_gqa)
    masking = make_record(Masking, options, is_causal=is_causal)
    _, call = normalize_call(query, key, value, masking=masking, scoring=scoring)
    return plan_call(call, make_record(StreamOptions, options), backward=backward)
