"""What is added to scores or hides them, cut tile by tile.

Axes: B batch, H query heads, M queries, N keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fulgurite.arithmetic import ceil_div
from fulgurite.attention.bounds import Range
from fulgurite.attention.spec import HeadGroup, MaskSpec

__all__ = [
    "AT_ONCE", "KEYS_AT_ONCE", "AlibiBias", "DenseBias", "ScoreBlock", "SelectedKeys", "TileBias",
    "describe_biases", "row_shift", "sum_biases",
]  # fmt: skip

# Beside a number as large as this in every score of a row, a log-sum-exp in float32 has lost the
# digits by which tiles of the row are weighed.
_LARGE = 1000.0

#: Numbers of biases that are looked through at once, or so many keys of each row if that is more.
AT_ONCE, KEYS_AT_ONCE = 2**12, 16


class ScoreBlock(NamedTuple):
    """A rectangle of the scores of some batch entries and heads.

    Attributes:
        batch: Batch entries.
        heads: Query heads.
        queries: Rows.
        keys: Columns.
    """

    batch: slice
    heads: slice
    queries: Range
    keys: Range


class TileBias(Protocol):
    """Gives what belongs to a rectangle of scores."""

    @property
    def spec(self) -> MaskSpec:
        """What it depends on."""
        ...

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The user's tensors that it reads, which must not change before the gradients."""
        ...

    def tile(self, block: ScoreBlock) -> Tensor:
        """Return a boolean mask, True where a key is seen, or what is added to scores.

        Args:
            block: Of which scores.

        Returns:
            Shape: (B' or 1, H' or 1, M' or 1, N' or 1).
        """
        ...


class DenseBias:
    """A tensor of the user, which lies outside the budget.

    Args:
        tensor: Boolean, True where a key is seen, or floating, which is added to scores. Shape:
            (B or 1, H or 1, M or 1, N or 1).
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()
        by_batch, by_head, by_query, by_key = (size > 1 for size in tensor.shape)
        self.tensors = (self.tensor,)
        needs_shift = _has_large_numbers(self.tensor)
        itemsize = 0 if self.tensor.dtype == torch.bool else self.tensor.dtype.itemsize
        self.spec = MaskSpec(by_batch, by_head, by_query, by_key, needs_shift, itemsize)

    def tile(self, block: ScoreBlock) -> Tensor:
        """See :class:`TileBias`."""
        index = (block.batch, block.heads, slice(*block.queries), slice(*block.keys))
        sizes = self.tensor.shape
        return self.tensor[
            tuple(
                part if size > 1 else slice(None) for part, size in zip(index, sizes, strict=True)
            )
        ]


class SelectedKeys:
    """Keys, or blocks of keys, that are chosen for each query, as sparse attention chooses them.

    Args:
        indices: Numbers of keys or blocks; those that are none are left aside. I is a divisor of
            the number of heads, of which as many neighbours share a choice. Shape: (B, I, M, K).
        heads: H.
        block: Keys of a block.
    """

    def __init__(self, indices: Tensor, heads: int, block: int = 1) -> None:
        self.indices, self.block = indices.detach(), block
        self.tensors = (self.indices,)
        self.sharing = heads // indices.shape[1]
        self.spec = MaskSpec(True, indices.shape[1] > 1, True, True)

    def tile(self, block: ScoreBlock) -> Tensor:
        """See :class:`TileBias`."""
        batch, heads, queries, keys = block
        first = heads.start // self.sharing
        kv_heads = slice(first, ceil_div(heads.stop, self.sharing))
        begin, end = keys[0] // self.block, ceil_div(keys[1], self.block)
        local = self.indices[batch, kv_heads, slice(*queries)].long() - begin
        outside = (local < 0) | (local >= end - begin)
        shape = (*local.shape[:3], end - begin + 1)
        mask = torch.zeros(shape, dtype=torch.bool, device=local.device)
        # numbers outside the tile go into a column of their own
        mask.scatter_(-1, local.masked_fill(outside, end - begin), True)
        mask = mask[..., :-1]
        if self.block > 1:
            offset = keys[0] - begin * self.block
            mask = mask.repeat_interleave(self.block, -1)[..., offset : offset + keys[1] - keys[0]]
        if self.spec.by_head:
            offset = heads.start - first * self.sharing
            mask = mask.repeat_interleave(self.sharing, 1)
            mask = mask[:, offset : offset + heads.stop - heads.start]
        return mask


class AlibiBias:
    """Scores that fall linearly with the distance of query and key.

    Args:
        slopes: Shape: (B or 1, H).
        offset: Position of the first query among the keys.

    Source: arXiv 2108.12409; the distance without sign, as in FlashAttention.
    """

    def __init__(self, slopes: Tensor, offset: int) -> None:
        self.slopes, self.offset = slopes.detach(), offset
        self.tensors = (self.slopes,)
        self.spec = MaskSpec(len(slopes) > 1, True, True, True, itemsize=self.slopes.dtype.itemsize)

    def tile(self, block: ScoreBlock) -> Tensor:
        """See :class:`TileBias`."""
        batch, heads, queries, keys = block
        slopes = self.slopes[batch if len(self.slopes) > 1 else slice(None), heads]
        # from the first key on, so that no position is too large for float32
        rows, columns = (
            torch.arange(start - keys[0], stop - keys[0], device=slopes.device).to(slopes.dtype)
            for start, stop in ((queries[0] + self.offset, queries[1] + self.offset), keys)
        )
        distance = (rows[:, None] - columns).abs_()
        return slopes.neg()[..., None, None] * distance


def describe_biases(biases: Iterable[TileBias]) -> MaskSpec | None:
    """Return what the sum of biases depends on; None without any."""
    spec = None
    for bias in biases:
        spec = bias.spec.union(spec)
    return spec


def sum_biases(
    biases: Iterable[TileBias], block: ScoreBlock, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor | None, bool]:
    """Return what is added to the scores of a rectangle, and whether it hides all of them.

    Args:
        biases: What is added.
        block: Of which scores.
        dtype: Type of the scores.
        device: Where they are computed.

    Returns:
        Shape: (B' or 1, H' or 1, M' or 1, N' or 1), in ``dtype`` or a wider type that a bias has;
        None where nothing is added.
    """
    total: Tensor | None = None
    for bias in biases:
        part = bias.tile(block)
        if part.dtype == torch.bool:
            if part.device.type == "cpu":  # elsewhere asking would wait for the device
                if bool(part.all()):
                    continue
                if not bool(part.any()):
                    return None, True
            part = part.to(device)
            part = torch.zeros(part.shape, dtype=dtype, device=device).masked_fill_(
                part.logical_not(), -math.inf
            )
        else:
            part = part.to(device, torch.promote_types(part.dtype, dtype))
        total = part if total is None else total + part
    return total, False


def row_shift(
    biases: Iterable[TileBias],
    group: HeadGroup,
    queries: Range,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | None:
    """Return the largest bias of each row where it is so large that digits would be lost.

    Rows in which every key is hidden by a large negative number, as Hugging Face models mask
    padding, are such: PyTorch gives them the plain mean, which tiles would weigh wrongly.

    Args:
        biases: What is added to the scores.
        group: Batch entries and heads.
        queries: Rows.
        dtype: Type of the result.
        device: Where it is computed.

    Returns:
        Zero for all other rows. Shape: (B' or 1, H' or 1, M'); None if all are.

    Source: inferred.
    """
    visible, batch, heads = group.visible, group.batch, group.heads
    first, end = max(0, visible.first(queries[0])), visible.end(queries[1] - 1)
    largest: Tensor | None = None
    rows = (batch.stop - batch.start) * (heads.stop - heads.start) * (queries[1] - queries[0])
    step = max(KEYS_AT_ONCE, AT_ONCE // max(1, rows))
    for begin in range(first, end, step):
        keys = begin, min(begin + step, end)
        bias, hidden = sum_biases(biases, ScoreBlock(batch, heads, queries, keys), dtype, device)
        if hidden:
            continue
        edge = visible.bias(queries, keys, dtype, device)
        part = (edge if bias is None else bias + edge).amax(-1)
        largest = part if largest is None else torch.maximum(largest, part)
    if largest is None:
        return None
    is_large = largest.isfinite() & (largest.abs() > _LARGE)
    return largest.masked_fill(~is_large, 0.0) if bool(is_large.any()) else None


def _has_large_numbers(tensor: Tensor) -> bool:
    """Whether there are finite numbers beside which log-sum-exps lose their precision."""
    if tensor.dtype == torch.bool or tensor.numel() == 0 or tensor.is_meta:
        return False
    low, high = (float(x) for x in torch.aminmax(tensor))
    if low >= -_LARGE and high <= _LARGE:
        return False
    rows = tensor.reshape(-1, tensor.shape[-1])
    for part in torch.split(rows, max(1, 2**18 // tensor.shape[-1])):
        if bool((part.isfinite() & (part.abs() > _LARGE)).any()):
            return True
    return False
