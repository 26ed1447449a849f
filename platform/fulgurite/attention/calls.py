"""Calls of attention in one form: tensors of four axes, masks as intervals, the rest as biases.

Axes: B batch, H query heads, G key/value heads, M queries, N keys, D size of a query and key,
E size of a value.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fulgurite.attention.biases import AlibiBias, DenseBias, TileBias, describe_biases
from fulgurite.attention.call_options import Scoring
from fulgurite.attention.masks import (
    Masking,
    as_intervals,
    causal_offset,
    hides_only,
    merge_visible,
)
from fulgurite.attention.spec import AttentionSpec
from fulgurite.attention.tensor_checks import (
    add_head_axes,
    broadcast_inputs,
    broadcast_mask,
    is_abstract,
)
from fulgurite.attention.visibility import EntryMasks, Visibility
from fulgurite.errors import ConfigError, DataError

__all__ = ["AttentionCall", "normalize_call", "spec_of"]


class AttentionCall(NamedTuple):
    """A call whose tensors have four axes and one batch, where it is known what is seen.

    Attributes:
        query: Shape: (B, H, M, D).
        key: Shape: (B, G, N, D).
        value: Shape: (B, G, N, E).
        visible: What queries see: one for all batch entries, or one for each.
        biases: What is added to scores or hides them; that with a gradient first.
        bias: The tensor of the first, if it has a gradient.
        scale: Scale of the scores; 1/√D by default.
        softcap: Scores s become softcap · tanh(s / softcap), before masks and biases.
        sinks: Scores of a key without a value, which each query of a head sees.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    visible: tuple[Visibility, ...]
    biases: tuple[TileBias, ...] = ()
    bias: Tensor | None = None
    scale: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def is_abstract(self) -> bool:
        """Whether the tensors have no numbers."""
        return any(is_abstract(x) for x in (self.query, self.key, self.value))

    @property
    def packs(self) -> bool:
        """Whether kernels get copies of tiles, since the last stride is not 1."""
        tensors = self.query, self.key, self.value
        return any(x.stride(-1) != 1 and x.shape[-1] > 1 for x in tensors)

    def spec(self) -> AttentionSpec:
        """Return sizes and masking."""
        batch, heads, _, head_dim = self.query.shape
        scale = self.scale
        if scale is None:
            scale = 1 / math.sqrt(head_dim) if head_dim else 1.0
        return AttentionSpec(
            batch=batch, heads=heads, kv_heads=self.key.shape[1], head_dim=head_dim,
            value_dim=self.value.shape[-1], dtype=self.query.dtype, visible=self.visible,
            scale=float(scale), softcap=self.softcap, mask=describe_biases(self.biases),
            has_sinks=self.sinks is not None,
        )  # fmt: skip


def normalize_call(
    query: Tensor, key: Tensor, value: Tensor, *, masking: Masking, scoring: Scoring
) -> tuple[torch.Size, AttentionCall]:
    """Broadcast tensors to four axes, and turn masks into intervals where they are such.

    Args:
        query: Shape: (..., H, M, D).
        key: Shape: (..., G, N, D).
        value: Shape: (..., G, N, E).
        masking: What is seen.
        scoring: How scores are made.

    Returns:
        The axes before the heads, which the call has as one; and the call.

    Raises:
        ConfigError: An option is not supported.
        DataError: Shapes, types or devices do not fit together.
    """
    lead, query, key, value = broadcast_inputs(query, key, value, scoring.enable_gqa)
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
    if scoring.attn_mask is not None:
        offset = causal_offset(scoring.attn_mask, queries, keys)
        if offset is not None:
            causal = Visibility.of(queries, keys, EntryMasks(is_causal=True, offset=offset))
            visible = merge_visible(visible, (causal,))
        else:
            mask = broadcast_mask(scoring.attn_mask, query, lead, (heads, queries, keys))
            intervals = None
            if not is_abstract(mask) and hides_only(mask):
                intervals = as_intervals(mask, batch, queries, keys)
            if intervals is not None:
                visible = merge_visible(visible, intervals)
            else:
                biases.insert(0, DenseBias(mask))
                bias = mask if mask.requires_grad else None
    if scoring.alibi_slopes is not None:
        biases.append(_alibi_bias(scoring.alibi_slopes, masking, query, key))
    call = AttentionCall(
        query, key, value, visible, biases=tuple(biases), bias=bias, scale=scoring.scale,
        softcap=scoring.softcap, sinks=scoring.sinks,
    )  # fmt: skip
    return lead, call


def _alibi_bias(slopes: Tensor, masking: Masking, query: Tensor, key: Tensor) -> AlibiBias:
    """Slopes as a bias.

    Raises:
        ConfigError: The slopes need gradients, or the position of the queries is not known.
        DataError: The shape or type of the slopes is wrong.
    """
    (batch, heads, queries), keys = query.shape[:3], key.shape[2]
    slopes = add_head_axes("alibi_slopes", slopes, batch, heads)
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


def spec_of(
    query: Tensor, key: Tensor, value: Tensor, *, masking: Masking, scoring: Scoring
) -> AttentionSpec:
    """Return the sizes and masking of tensors of four axes that need no broadcasting.

    Args:
        query: Shape: (B, H, M, D).
        key: Shape: (B, G, N, D).
        value: Shape: (B, G, N, E).
        masking: What is seen.
        scoring: How scores are made, by nothing that has a tensor.

    Raises:
        ConfigError: Options are not supported, or do not fit together.
        DataError: The tensors do not fit together.
    """
    _, *broadcast = broadcast_inputs(query, key, value, scoring.enable_gqa)
    tensors = {"query": query, "key": key, "value": value}
    for (name, before), after in zip(tensors.items(), broadcast, strict=True):
        if before.shape != after.shape:
            raise DataError(
                f"{name} is {tuple(before.shape)}, and would be {tuple(after.shape)} beside the "
                "others.",
                "Give query, key and value of one batch, and as many key as value heads.",
            )
    _, call = normalize_call(query, key, value, masking=masking, scoring=scoring)
    if call.biases:
        raise ConfigError(
            "The keys of key_mask are not side by side, and files take no mask with holes.",
            "Use stream_attention, or move padding to the ends.",
        )
    return call.spec()
