"""What a call of attention computes: sizes, what is seen, and how scores are changed.

Axes: B batch, H query heads, G key/value heads, M queries, N keys, D size of a query and key,
E size of a value.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from fulgurite.attention.visibility import Visibility

__all__ = ["AttentionSpec", "HeadGroup", "MaskSpec"]


@dataclass(frozen=True)
class MaskSpec:
    """What is known of a mask or bias that is cut tile by tile.

    Attributes:
        by_batch: Whether batch entries differ.
        by_head: Whether query heads differ.
        by_query: Whether queries differ.
        by_key: Whether keys differ.
        needs_shift: Whether it has numbers beside which log-sum-exps would lose their precision.
        itemsize: Bytes of its widest number; 0 for booleans.
    """

    by_batch: bool
    by_head: bool
    by_query: bool
    by_key: bool
    needs_shift: bool = False
    itemsize: int = 0

    def union(self, other: MaskSpec | None) -> MaskSpec:
        """Return what is known of the sum of two."""
        if other is None:
            return self
        names = self.__dataclass_fields__
        return MaskSpec(*(max(getattr(self, name), getattr(other, name)) for name in names))


class HeadGroup(NamedTuple):
    """Batch entries and heads that are computed together.

    Attributes:
        batch: Batch entries.
        heads: Query heads.
        kv_heads: Their key/value heads.
        visible: What they see.
    """

    batch: slice
    heads: slice
    kv_heads: slice
    visible: Visibility

    def parts(self, batch_step: int, kv_step: int, heads: int) -> list[HeadGroup]:
        """Cut it into groups of at most so many batch entries and key/value heads.

        Args:
            batch_step: Batch entries of each.
            kv_step: Key/value heads of each.
            heads: Query heads of a key/value head.
        """
        return [
            HeadGroup(
                slice(b, min(b + batch_step, self.batch.stop)),
                slice(g * heads, min(g + kv_step, self.kv_heads.stop) * heads),
                slice(g, min(g + kv_step, self.kv_heads.stop)),
                self.visible,
            )
            for b in range(self.batch.start, self.batch.stop, batch_step)
            for g in range(self.kv_heads.start, self.kv_heads.stop, kv_step)
        ]


@dataclass(frozen=True)
class AttentionSpec:
    """Sizes and masking of a call, without its tensors.

    Attributes:
        batch: B.
        heads: H.
        kv_heads: G, a divisor of H.
        head_dim: D.
        value_dim: E.
        dtype: Data type of query, key and value.
        visible: What is seen: one for all batch entries, or one for each.
        scale: Scale of the scores.
        softcap: Scores s become softcap · tanh(s / softcap).
        mask: Properties of what is added to scores, or hides them, tile by tile.
        has_sinks: Whether queries see a key without a value.
    """

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    visible: tuple[Visibility, ...]
    scale: float = 1.0
    softcap: float | None = None
    mask: MaskSpec | None = None
    has_sinks: bool = False

    @property
    def queries(self) -> int:
        """M."""
        return self.visible[0].queries

    @property
    def keys(self) -> int:
        """N."""
        return self.visible[0].keys

    @property
    def is_empty(self) -> bool:
        """Whether there is no query or no key."""
        return 0 in (self.batch, self.heads, self.queries, self.keys)

    @property
    def has_bias(self) -> bool:
        """Whether something is added to the scores of every tile."""
        return self.mask is not None

    @property
    def has_wide_bias(self) -> bool:
        """Whether a bias is wider than query, key and value."""
        return self.mask is not None and self.mask.itemsize > self.dtype.itemsize

    @property
    def needs_shift(self) -> bool:
        """Whether scores are shifted, row by row, so that log-sum-exps keep their precision."""
        return self.mask is not None and self.mask.needs_shift

    @property
    def needs_math(self) -> bool:
        """Whether tiles must be computed by matrix products."""
        return self.softcap is not None or self.scale <= 0 or self.needs_shift

    @cached_property
    def is_simple(self) -> bool:
        """Whether each group of heads is one kernel call without a bias."""
        return not self.has_bias and all(visible.is_simple for visible in self.visible)

    @cached_property
    def slides(self) -> bool:
        """Whether some batch entries see a window."""
        return any(visible.slides for visible in self._samples)

    @cached_property
    def pairs(self) -> int:
        """Pairs of query and key that are computed, over all batch entries."""
        total = sum(visible.pairs() for visible in self.visible)
        return total * self.batch if len(self.visible) == 1 else total

    @cached_property
    def _samples(self) -> tuple[Visibility, ...]:
        """A few of the batch entries."""
        return self.visible[:: max(1, len(self.visible) // 4)]

    def reach(self, height: int) -> float:
        """Return how many keys the rows of tiles of so many queries span, on average."""
        return sum(visible.reach(height) for visible in self._samples) / len(self._samples)

    def runs(self) -> Iterator[tuple[int, int, Visibility]]:
        """Ranges of batch entries that see the same."""
        if len(self.visible) == 1:
            yield 0, self.batch, self.visible[0]
            return
        for visible, run in itertools.groupby(range(self.batch), key=self.visible.__getitem__):
            entries = list(run)
            yield entries[0], entries[-1] + 1, visible

    def groups(self, batch_step: int, kv_step: int) -> Iterator[HeadGroup]:
        """Cut batch entries and heads into groups.

        Args:
            batch_step: Batch entries at once, at most.
            kv_step: Key/value heads at once, each with its query heads.
        """
        for begin, end, visible in self.runs():
            run = HeadGroup(
                slice(begin, end), slice(0, self.heads), slice(0, self.kv_heads), visible
            )
            yield from run.parts(batch_step, kv_step, self.heads // self.kv_heads)
