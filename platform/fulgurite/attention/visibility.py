"""Which keys each query may see, as intervals.

Axes: M queries, N keys.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fulgurite.arithmetic import ceil_div
from fulgurite.attention.bounds import Bound, Range
from fulgurite.attention.edges import MOST_PIECES, Edge, cached_edge_bias, copy_to_device
from fulgurite.errors import ConfigError

__all__ = ["EntryMasks", "Visibility", "Window"]

#: How many keys a query sees before and behind its own position, itself counted in the first;
#: None for all. A number alone is the first, as ``sliding_window`` is of causal models.
Window = int | tuple[int | None, int | None]


@dataclass(frozen=True)
class EntryMasks:
    """Masks of one batch entry, each of which must let a query see a key.

    Args:
        is_causal: A query sees keys up to its own position.
        window: Keys before and behind its own position that a query sees; see :data:`Window`.
        prefix: All queries see the first so many keys, although later ones are causal.
        documents: First tokens of the documents, ascending from 0; tokens see only their own.
        chunk: Tokens see only their own chunk of so many.
        chunk_start: First token of a chunk.
        offset: Position of the first query among the keys; 0 by default.
        key_range: Keys that are no padding.
        query_range: Queries that are no padding; others see nothing.
    """

    is_causal: bool = False
    window: Window | None = None
    prefix: int = 0
    documents: Sequence[int] | None = None
    chunk: int | None = None
    chunk_start: int = 0
    offset: int | None = None
    key_range: Range | None = None
    query_range: Range | None = None

    @property
    def sides(self) -> tuple[int | None, int | None]:
        """The window before and behind a query's own position."""
        return self.window if isinstance(self.window, tuple) else (self.window, None)

    def check(self, queries: int, keys: int) -> None:
        """Check what fits together.

        Args:
            queries: M.
            keys: N.

        Raises:
            ConfigError: An option is out of range, or two options contradict each other.
        """
        before, after = self.sides
        compares = (before, after, self.documents, self.chunk) != (None,) * 4
        if compares and queries != keys and self.offset is None:
            raise ConfigError(
                f"There are {queries} queries and {keys} keys, and the mask compares their "
                "positions.",
                "Give query_offset, the position of the first query among the keys (a cache has "
                "keys − queries), or as many keys as queries.",
            )
        if (before is not None and before < 1) or (after is not None and after < 0):
            raise ConfigError(
                f"A window of {before if after is None else (before, after)} keys leaves queries "
                "without keys.",
                "Give a window of at least 1, or (at least 1, at least 0) for both sides.",
            )
        if not 0 <= self.prefix <= keys or (self.prefix and not self.is_causal):
            raise ConfigError(
                f"A prefix of {self.prefix} tokens does not fit (is_causal={self.is_causal}, "
                f"{keys} keys).",
                "Give a prefix within the sequence, and is_causal=True.",
            )
        if self.chunk is not None and self.chunk < 1:
            raise ConfigError(
                f"A chunk of {self.chunk} tokens is too small.", "Give a chunk of at least 1."
            )
        position = self.offset or 0
        if (self.documents is not None or self.chunk is not None) and not (
            position >= 0 and position + queries <= max(keys, 0)
        ):
            raise ConfigError(
                f"Queries {position} to {position + queries} are not among the {keys} keys, whose "
                "documents or chunks they share.",
                "Give a query_offset within the sequence.",
            )
        if self.documents is not None:
            _check_documents(list(self.documents), keys)


def _check_documents(starts: list[int], keys: int) -> None:
    """Check first tokens of documents.

    Raises:
        ConfigError: The tokens do not ascend from 0, or one lies behind the sequence.
    """
    if not starts or starts[0] != 0 or starts != sorted(set(starts)):
        raise ConfigError(
            f"Document starts {starts[:8]} do not ascend from 0.",
            "Give the first token of each document, beginning with 0.",
        )
    if keys and starts[-1] >= keys:
        raise ConfigError(
            f"A document starts at {starts[-1]}, behind the {keys} tokens.",
            "Give starts within the sequence.",
        )


@dataclass(frozen=True)
class Visibility:
    """Keys that each query sees: one interval, whose ends never decrease with the query.

    Causal, windowed, chunked, prefix, document and padding masks and any combination of them are
    such. Use :meth:`of` to make one from these.

    Args:
        queries: M.
        keys: N.
        first: First key that each query sees.
        end: Key behind the last one; a query whose end is not behind its first sees nothing.

    Source: causal: docs/papers/stream_cqsa.md section 1.5; the rest: inferred.
    """

    queries: int
    keys: int
    first: Bound
    end: Bound

    @classmethod
    def of(cls, queries: int, keys: int, masks: EntryMasks = EntryMasks()) -> Visibility:
        """Return the intersection of masks.

        Args:
            queries: M.
            keys: N.
            masks: What hides keys; nothing by default.

        Raises:
            ConfigError: The masks do not fit together, or not to the sizes.

        Example:
            >>> visible = Visibility.of(2, 5, EntryMasks(is_causal=True, offset=3))
            >>> [(visible.first(query), visible.end(query)) for query in range(2)]
            [(0, 4), (0, 5)]
        """
        masks.check(queries, keys)
        position = masks.offset or 0
        before, after = masks.sides
        first, end = Bound.constant(0), Bound.constant(keys)
        if masks.is_causal:
            end = Bound.diagonal(position + 1).maximum(Bound.constant(masks.prefix))
        if before is not None:
            first = Bound.diagonal(position - before + 1)
        if after is not None:
            end = end.minimum(Bound.diagonal(position + after + 1))
        if masks.documents is not None:
            starts = list(masks.documents)
            first = first.maximum(Bound.steps(starts, starts).shifted(position))
            end = end.minimum(Bound.steps(starts, [*starts[1:], keys]).shifted(position))
        if masks.chunk is not None:
            begin = masks.chunk_start % masks.chunk
            begin -= masks.chunk if begin else 0  # the first may have begun before the sequence
            edges = range(begin, max(position + queries, begin + 1), masks.chunk)
            starts = [max(edge, 0) for edge in edges]
            behind = [edge + masks.chunk for edge in edges]
            first = first.maximum(Bound.steps(starts, starts).shifted(position))
            end = end.minimum(Bound.steps(starts, behind).shifted(position))
        if masks.key_range is not None:
            first = first.maximum(Bound.constant(masks.key_range[0]))
            end = end.minimum(Bound.constant(masks.key_range[1]))
        if masks.query_range is not None:
            first, end = _without_rows(first, end, masks.query_range, keys)
        return cls(queries, keys, first, end).clipped()

    @classmethod
    def from_intervals(
        cls, keys: int, first: NDArray[np.int64], end: NDArray[np.int64]
    ) -> Visibility | None:
        """Return what is seen if each query sees an interval, or None if their ends decrease.

        Args:
            keys: N.
            first: First key of each query; what it is for queries without keys does not matter.
                Shape: (M,).
            end: Key behind the last one. Shape: (M,).
        """
        queries = len(first)
        if not queries:
            return cls(0, keys, Bound.constant(0), Bound.constant(keys))
        empty = end <= first
        # rows without keys begin and end where the rows before them ended
        end = np.maximum.accumulate(np.where(empty, 0, end)) if empty.any() else end
        first = np.where(empty, end, first)
        if (np.diff(first) < 0).any() or (np.diff(end) < 0).any():
            return None
        return cls(queries, keys, Bound.from_values(first), Bound.from_values(end)).clipped()

    def clipped(self) -> Visibility:
        """Return the same with ends within the keys."""
        low, high = Bound.constant(0), Bound.constant(self.keys)
        first = self.first.maximum(low).minimum(high)
        return Visibility(self.queries, self.keys, first, self.end.maximum(low).minimum(high))

    def intersection(self, other: Visibility) -> Visibility:
        """Return what both let a query see."""
        first, end = self.first.maximum(other.first), self.end.minimum(other.end)
        return Visibility(self.queries, self.keys, first, end)

    @cached_property
    def is_full(self) -> bool:
        """Whether every query sees every key."""
        last = max(self.queries - 1, 0)
        return self.first(last) <= 0 and self.end(0) >= self.keys

    @cached_property
    def is_causal(self) -> bool:
        """Whether query i sees exactly the keys up to i, as PyTorch's ``is_causal`` has it."""
        causal = Bound.diagonal(1).minimum(Bound.constant(self.keys))
        return self.first(max(self.queries - 1, 0)) <= 0 and self.end == causal

    @cached_property
    def is_simple(self) -> bool:
        """Whether one kernel call without a bias can do it: all pairs, or a causal square."""
        return self.is_full or (self.is_causal and self.queries <= self.keys)

    @cached_property
    def slides(self) -> bool:
        """Whether the first key that is seen moves with the query, as in a window."""
        starts = (*self.first.starts, self.queries)
        lengths = (b - a for a, b in itertools.pairwise(starts))
        return any(
            slope and length > 1 for slope, length in zip(self.first.slopes, lengths, strict=True)
        )

    def _linear_ranges(self) -> Iterator[Range]:
        """Ranges of queries within which both ends are straight lines."""
        edges = {*self.first.starts, *self.end.starts, 0}
        inside = sorted(edge for edge in edges if edge < self.queries)
        yield from itertools.pairwise((*inside, self.queries))

    def pairs(self) -> int:
        """Return the number of (query, key) pairs."""
        total = 0
        for start, stop in self._linear_ranges():
            count = stop - start
            width = self.end(start) - self.first(start)
            slope = self.end.piece(start)[0] - self.first.piece(start)[0]
            if slope > 0:  # queries before the first that sees a key
                count, width = (count, width) if width > 0 else (count + width, 0)
            elif slope < 0:
                count = min(count, max(width, 0))
            elif width <= 0:
                count = 0
            if count > 0:
                total += count * width + slope * count * (count - 1) // 2
        return total

    def reach(self, height: int) -> float:
        """Return how many keys the rows of tiles of so many queries span, on average."""
        if not self.queries:
            return 0.0
        rows = ceil_div(self.queries, height)
        sample = np.unique(np.linspace(0, rows - 1, min(rows, 256)).astype(np.int64))
        top = sample * height
        bottom = np.minimum(top + height, self.queries) - 1
        return float(np.maximum(self.end.at(bottom) - self.first.at(top), 0).mean())

    def bias(self, queries: Range, keys: Range, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the additive mask of a rectangle: 0 or −inf. Shape: (1, 1, M', N').

        On a GPU it is made there, and the last few are kept; it must not be changed.
        """
        if device.type == "cuda":
            edge = self.edge(queries, keys)
            if len(edge.pieces) <= MOST_PIECES:
                return cached_edge_bias(edge, dtype, device)
        rows = np.arange(*queries, dtype=np.int64)
        first, end = (
            copy_to_device(torch.from_numpy(bound.at(rows)), device)[:, None]
            for bound in (self.first, self.end)
        )
        columns = torch.arange(*keys, device=device)
        hidden = (columns < first) | (columns >= end)
        bias = torch.zeros(hidden.shape, dtype=dtype, device=device)
        return bias.masked_fill_(hidden, -torch.inf)[None, None]

    def edge(self, queries: Range, keys: Range) -> Edge:
        """Return what is seen of a rectangle, in its own coordinates."""
        (top, bottom), width = queries, keys[1] - keys[0]
        inside = {edge for edge in (*self.first.starts, *self.end.starts) if top < edge < bottom}

        def line(bound: Bound, row: int) -> tuple[int, int]:
            slope, value = bound.piece(row)[0], bound(row) - keys[0]
            # a constant outside the rectangle is as good as one at its border
            return slope, value if slope else min(max(value, 0), width)

        pieces = [
            (begin - top, behind - top, line(self.first, begin), line(self.end, begin))
            for begin, behind in itertools.pairwise((top, *sorted(inside), bottom))
        ]
        return Edge(bottom - top, width, tuple(pieces))


def _without_rows(first: Bound, end: Bound, rows: Range, keys: int) -> tuple[Bound, Bound]:
    """Let queries outside a range see nothing; ends still ascend."""
    start, stop = rows
    if stop <= start:
        return Bound.constant(keys), Bound.constant(0)
    if start > 0:
        end = end.minimum(Bound.steps([0, start], [max(0, first(0)), keys]))
    edge = end(stop - 1)
    return first.maximum(Bound.steps([0, stop], [0, edge])), end.minimum(Bound.constant(edge))
