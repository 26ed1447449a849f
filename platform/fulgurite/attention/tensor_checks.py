"""Checks of query, key, value and masks as users give them, and their broadcasting.

Axes: B batch, H query heads, G key/value heads, M queries, N keys, D size of a query and key,
E size of a value.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

from fulgurite.attention.kernel_choice import FLOATS
from fulgurite.attention.spec import AttentionSpec
from fulgurite.errors import ConfigError, DataError

__all__ = [
    "add_head_axes", "add_sink_axes", "broadcast_inputs", "broadcast_mask", "check_tensors",
    "check_types", "is_abstract", "refuse_not_finite",
]  # fmt: skip


def check_tensors(**tensors: object) -> None:
    """Refuse what is no tensor.

    Raises:
        DataError: An argument is not a tensor.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise DataError(f"{name} is of type {type(tensor).__name__}.", "Give a torch.Tensor.")


def is_abstract(tensor: Tensor) -> bool:
    """Whether a tensor has no numbers."""
    module = sys.modules.get("torch._subclasses.fake_tensor")  # slow to import
    return tensor.is_meta or (module is not None and isinstance(tensor, module.FakeTensor))


def check_types(query: Tensor, key: Tensor, value: Tensor) -> None:
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
    nested = "nested tensors, " if any(x.is_nested for x in tensors.values()) else ""
    if nested or query.layout != torch.strided:
        raise ConfigError(f"Attention does not do {nested}{query.layout}.", "Give dense tensors.")
    if query.dtype not in FLOATS:
        raise ConfigError(
            f"Attention does not do {query.dtype}.", "Use float64, float32, bfloat16 or float16."
        )


def broadcast_inputs(
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
    check_types(query, key, value)
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


def broadcast_mask(
    mask: Tensor, query: Tensor, lead: torch.Size, sizes: tuple[int, int, int]
) -> Tensor:
    """Give a mask the axes of scores, of size 1 where it does not depend on them.

    Raises:
        ConfigError: The mask is sparse or nested.
        DataError: The mask does not broadcast to the scores, or has another type or device.
    """
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise DataError(
            f"attn_mask is of {mask.dtype}, query of {query.dtype}.",
            "Give booleans, True where a key is seen, or numbers in float32 or the type of query.",
        )
    if mask.layout != torch.strided or mask.is_nested:
        raise ConfigError(f"attn_mask is of {mask.layout}.", "Give a dense tensor.")
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


def add_head_axes(name: str, numbers: Tensor, batch: int, heads: int) -> Tensor:
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


def add_sink_axes(sinks: Tensor, spec: AttentionSpec) -> Tensor:
    """Give sinks all axes. Shape: (H,), (B, H) or (B, H, M) -> (B or 1, H, M or 1).

    Raises:
        DataError: The shape does not fit the batch, the heads and the queries.
    """
    if sinks.ndim < 3:
        return add_head_axes("sinks", sinks, spec.batch, spec.heads)[..., None]
    fits = sinks.ndim == 3 and sinks.shape[0] in (1, spec.batch)
    if not fits or sinks.shape[1] != spec.heads or sinks.shape[2] not in (1, spec.queries):
        raise DataError(
            f"sinks are {tuple(sinks.shape)} for {spec.batch} batch entries of {spec.heads} heads "
            f"and {spec.queries} queries.",
            "Give a number for each head, (heads,), (batch, heads) or (batch, heads, queries).",
        )
    return sinks


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
