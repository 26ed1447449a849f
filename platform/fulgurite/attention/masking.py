"""Which keys each query may see, as intervals, and rectangles of such pairs as kernel calls.

Axes: B batch, M queries, N keys.
"""

from __future__ import annotations

import functools
import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fulgurite.errors import ConfigError

__all__ = [
    "CACHED_MASKS", "GPU_MASKED_SIDE", "MASKED_SIDE", "Bound", "Kind", "Range", "Tile",
    "Visibility", "Window", "tiles",
]  # fmt: skip

#: Half-open range of tokens.
Range = tuple[int, int]

#: How many keys a query sees before and behind its own position, itself counted in the first;
#: None for all. A number alone is the first, as ``sliding_window`` is of causal models.
Window = int | tuple[int | None, int | None]

#: A tile under a bias is cut until it is at most so wide: the rest of the rectangle needs no mask.
MASKED_SIDE = 256

#: The largest of a GPU, where a call costs more than the pairs that a larger tile hides.
GPU_MASKED_SIDE = 2048

#: How many biases a GPU keeps: those of a window's edge are the same all along the sequence.
CACHED_MASKS = 2

# Pieces of an edge from which on the numbers of its rows are copied to the device.
_MOST_PIECES = 8

# Boundaries within a tile of at most MASKED_SIDE from which on one masked call costs less than the
# calls that the boundaries would cut it into.
_MOST_CUTS = 2


class Kind(Enum):
    """What a tile computes: all its pairs, those of a causal square, or those under a bias."""

    FULL = "full"
    CAUSAL = "causal"
    BIAS = "bias"


class Tile(NamedTuple):
    """One kernel call."""

    queries: Range
    keys: Range
    kind: Kind


@dataclass(frozen=True)
class Bound:
    """A function of the query's index that never decreases, in pieces of slope 0 or 1.

    Args:
        starts: First query of each piece, ascending from 0.
        values: Value at the first query of each piece.
        slopes: 0 or 1 for each piece.

    Example:
        >>> causal_end = Bound.diagonal(1).minimum(Bound.constant(3))
        >>> [causal_end(query) for query in range(5)]
        [1, 2, 3, 3, 3]
    """

    starts: tuple[int, ...]
    values: tuple[int, ...]
    slopes: tuple[int, ...]

    @classmethod
    def constant(cls, value: int) -> Bound:
        """Return the bound that is the same for all queries."""
        return cls((0,), (value,), (0,))

    @classmethod
    def diagonal(cls, offset: int) -> Bound:
        """Return the bound that is the query's index plus an offset."""
        return cls((0,), (offset,), (1,))

    @classmethod
    def steps(cls, starts: Sequence[int], values: Sequence[int]) -> Bound:
        """Return the bound that is constant from each start to the next."""
        return cls._merge_pieces(starts, values, [0] * len(starts))

    @classmethod
    def from_values(cls, values: NDArray[np.int64]) -> Bound:
        """Return the bound with these values. Shape: (M,), M of at least 1."""
        steps = np.diff(values)
        edges = [0, *(np.flatnonzero(np.diff(steps)) + 1).tolist(), len(steps)]
        starts: list[int] = []
        slopes: list[int] = []
        begin = 0  # first query that no piece covers yet
        for first, last in itertools.pairwise(edges if len(steps) else []):
            step = int(steps[first])
            if step in (0, 1):
                if begin <= last:
                    starts.append(max(first, begin))
                    slopes.append(step)
                    begin = last + 1
                continue
            jumps = range(max(first, begin), last)
            starts += jumps
            slopes += [0] * len(jumps)
            begin = max(begin, last)
        if begin < len(values):
            starts.append(begin)
            slopes.append(0)
        return cls._merge_pieces(starts, values[starts].tolist(), slopes)

    @classmethod
    def _merge_pieces(
        cls, starts: Sequence[int], values: Sequence[int], slopes: Sequence[int]
    ) -> Bound:
        """Let each piece reach as far as it can, so that equal bounds compare equal."""
        pieces: list[tuple[int, int, int]] = []
        ends = (*starts[1:], 2**62)
        for start, value, slope, behind in zip(starts, values, slopes, ends, strict=True):
            if pieces:
                begin, base, inclination = pieces[-1]
                if value == base + inclination * (start - begin):
                    if slope == inclination:
                        continue
                    start, value = start + 1, value + slope
                    if start >= behind:
                        continue
                elif start == begin + 1 and value == base + slope:
                    pieces[-1] = begin, base, slope  # a single query is on any line
                    continue
            pieces.append((start, value, slope))
        columns = zip(*pieces, strict=True)
        return cls(*(tuple(int(number) for number in column) for column in columns))

    def __call__(self, query: int) -> int:
        """Return the value for a query."""
        index = bisect_right(self.starts, query) - 1
        return self.values[index] + self.slopes[index] * (query - self.starts[index])

    def at(self, queries: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the values for many queries."""
        starts, values, slopes = (np.asarray(x, np.int64) for x in self._columns)
        index = np.searchsorted(starts, queries, side="right") - 1
        return np.asarray(values[index] + slopes[index] * (queries - starts[index]), np.int64)

    @property
    def _columns(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        return self.starts, self.values, self.slopes

    def piece(self, query: int) -> tuple[int, int]:
        """Return the slope at a query, and the first query of the next piece."""
        index = bisect_right(self.starts, query)
        behind = self.starts[index] if index < len(self.starts) else 2**63
        return self.slopes[index - 1], behind

    def shifted(self, positions: int) -> Bound:
        """Return the bound of queries that come so many positions later; at least 0."""
        first = bisect_right(self.starts, positions) - 1
        starts = [max(0, start - positions) for start in self.starts[first:]]
        values = [self(positions), *self.values[first + 1 :]]
        return self._merge_pieces(starts, values, self.slopes[first:])

    def maximum(self, other: Bound) -> Bound:
        """Return the larger of two bounds."""
        return self._combine(other, max)

    def minimum(self, other: Bound) -> Bound:
        """Return the smaller of two bounds."""
        return self._combine(other, min)

    def _combine(self, other: Bound, choose: Callable[[int, int], int]) -> Bound:
        starts: list[int] = []
        values: list[int] = []
        slopes: list[int] = []
        edges = sorted({*self.starts, *other.starts})
        for begin, behind in itertools.pairwise((*edges, 2**62)):
            a, b = self(begin), other(begin)
            slope_a, slope_b = self.piece(begin)[0], other.piece(begin)[0]
            cuts = [begin]
            # lines of slopes 0 and 1 cross at most once
            if slope_a != slope_b and (gap := (b - a) * (slope_a - slope_b)) > 0:
                cuts += [begin + gap] if begin + gap < behind else []
            for cut in cuts:
                value_a, value_b = a + slope_a * (cut - begin), b + slope_b * (cut - begin)
                value = choose(value_a, value_b)
                if value_a != value_b:
                    slope = slope_a if value == value_a else slope_b
                else:  # from here on the steeper line is above
                    slope = choose(slope_a, slope_b)
                starts.append(cut)
                values.append(value)
                slopes.append(slope)
        return self._merge_pieces(starts, values, slopes)


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

    Source: causal: card section 1.5; the rest: inferred.
    """

    queries: int
    keys: int
    first: Bound
    end: Bound

    @classmethod
    def of(
        cls,
        queries: int,
        keys: int,
        *,
        is_causal: bool = False,
        window: Window | None = None,
        prefix: int = 0,
        documents: Sequence[int] | None = None,
        chunk: int | None = None,
        chunk_start: int = 0,
        offset: int | None = None,
        key_range: Range | None = None,
        query_range: Range | None = None,
    ) -> Visibility:
        """Return the intersection of masks.

        Args:
            queries: M.
            keys: N.
            is_causal: A query sees keys up to its own position.
            window: Keys before and behind its own position that a query sees; see
                :data:`Window`.
            prefix: All queries see the first so many keys, although later ones are causal.
            documents: First tokens of the documents, ascending from 0; tokens see only their own.
            chunk: Tokens see only their own chunk of so many.
            chunk_start: First token of a chunk.
            offset: Position of the first query among the keys; 0 by default.
            key_range: Keys that are no padding.
            query_range: Queries that are no padding; others see nothing.

        Raises:
            ConfigError: The numbers do not fit together.

        Example:
            >>> visible = Visibility.of(2, 5, is_causal=True, offset=3)
            >>> [(visible.first(query), visible.end(query)) for query in range(2)]
            [(0, 4), (0, 5)]
        """
        before, after = window if isinstance(window, tuple) else (window, None)
        _check_masks(queries, keys, is_causal, before, after, prefix, documents, chunk, offset)
        position = offset or 0
        first, end = Bound.constant(0), Bound.constant(keys)
        if is_causal:
            end = Bound.diagonal(position + 1).maximum(Bound.constant(prefix))
        if before is not None:
            first = Bound.diagonal(position - before + 1)
        if after is not None:
            end = end.minimum(Bound.diagonal(position + after + 1))
        if documents is not None:
            starts = list(documents)
            first = first.maximum(Bound.steps(starts, starts).shifted(position))
            end = end.minimum(Bound.steps(starts, [*starts[1:], keys]).shifted(position))
        if chunk is not None:
            begin = chunk_start % chunk
            begin -= chunk if begin else 0  # the first chunk may have begun before the sequence
            edges = range(begin, max(position + queries, begin + 1), chunk)
            starts = [max(edge, 0) for edge in edges]
            behind = [edge + chunk for edge in edges]
            first = first.maximum(Bound.steps(starts, starts).shifted(position))
            end = end.minimum(Bound.steps(starts, behind).shifted(position))
        if key_range is not None:
            first = first.maximum(Bound.constant(key_range[0]))
            end = end.minimum(Bound.constant(key_range[1]))
        if query_range is not None:
            first, end = _without_rows(first, end, query_range, keys)
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
        rows = -(-self.queries // height)
        sample = np.unique(np.linspace(0, rows - 1, min(rows, 256)).astype(np.int64))
        top = sample * height
        bottom = np.minimum(top + height, self.queries) - 1
        return float(np.maximum(self.end.at(bottom) - self.first.at(top), 0).mean())

    def bias(self, queries: Range, keys: Range, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the additive mask of a rectangle: 0 or −inf. Shape: (1, 1, M', N').

        On a GPU it is made there, and the last few are kept; it must not be changed.
        """
        if device.type == "cuda":
            edge = self._edge(queries, keys)
            if len(edge.pieces) <= _MOST_PIECES:
                return _cached_bias(edge, dtype, device)
        rows = np.arange(*queries, dtype=np.int64)
        first, end = (
            _to_device(torch.from_numpy(bound.at(rows)), device)[:, None]
            for bound in (self.first, self.end)
        )
        columns = torch.arange(*keys, device=device)
        hidden = (columns < first) | (columns >= end)
        bias = torch.zeros(hidden.shape, dtype=dtype, device=device)
        return bias.masked_fill_(hidden, -torch.inf)[None, None]

    def _edge(self, queries: Range, keys: Range) -> _Edge:
        """What is seen of a rectangle, in its own coordinates."""
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
        return _Edge(bottom - top, width, tuple(pieces))


class _Edge(NamedTuple):
    """What is seen of a rectangle.

    Attributes:
        queries: M'.
        keys: N'.
        pieces: Ranges of rows, each with the slope, and the value at its first row, of the first
            key that is seen and of the key behind the last.
    """

    queries: int
    keys: int
    pieces: tuple[tuple[int, int, tuple[int, int], tuple[int, int]], ...]


@functools.lru_cache(maxsize=CACHED_MASKS)
def _cached_bias(edge: _Edge, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _edge_bias(edge, dtype, device)


def _edge_bias(edge: _Edge, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive mask of a rectangle, made on the device alone. Shape: (1, 1, M', N')."""
    columns = torch.arange(edge.keys, device=device)
    bias = torch.zeros(edge.queries, edge.keys, dtype=dtype, device=device)
    for begin, behind, (first_slope, first), (end_slope, end) in edge.pieces:
        rows = torch.arange(behind - begin, device=device)[:, None]
        hidden = columns < rows * first_slope + first
        hidden |= columns >= rows * end_slope + end
        bias[begin:behind].masked_fill_(hidden, -torch.inf)
    return bias[None, None]


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the host; a GPU does not wait for it."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _without_rows(first: Bound, end: Bound, rows: Range, keys: int) -> tuple[Bound, Bound]:
    """Let queries outside a range see nothing; ends still ascend."""
    start, stop = rows
    if stop <= start:
        return Bound.constant(keys), Bound.constant(0)
    if start > 0:
        end = end.minimum(Bound.steps([0, start], [max(0, first(0)), keys]))
    edge = end(stop - 1)
    return first.maximum(Bound.steps([0, stop], [0, edge])), end.minimum(Bound.constant(edge))


def _check_masks(
    queries: int,
    keys: int,
    is_causal: bool,
    before: int | None,
    after: int | None,
    prefix: int,
    documents: Sequence[int] | None,
    chunk: int | None,
    offset: int | None,
) -> None:
    """Check what fits together.

    Raises:
        ConfigError: An option is out of range, or two options contradict each other.
    """
    compares = before is not None or after is not None or documents is not None or chunk is not None
    if compares and queries != keys and offset is None:
        raise ConfigError(
            f"There are {queries} queries and {keys} keys, and the mask compares their positions.",
            "Give query_offset, the position of the first query among the keys (a cache has "
            "keys − queries), or as many keys as queries.",
        )
    if (before is not None and before < 1) or (after is not None and after < 0):
        raise ConfigError(
            f"A window of {before if after is None else (before, after)} keys leaves queries "
            "without keys.",
            "Give a window of at least 1, or (at least 1, at least 0) for both sides.",
        )
    if not 0 <= prefix <= keys or (prefix and not is_causal):
        raise ConfigError(
            f"A prefix of {prefix} tokens does not fit (is_causal={is_causal}, {keys} keys).",
            "Give a prefix within the sequence, and is_causal=True.",
        )
    if chunk is not None and chunk < 1:
        raise ConfigError(f"A chunk of {chunk} tokens is too small.", "Give a chunk of at least 1.")
    position = offset or 0
    if (documents is not None or chunk is not None) and not (
        position >= 0 and position + queries <= max(keys, 0)
    ):
        raise ConfigError(
            f"Queries {position} to {position + queries} are not among the {keys} keys, whose "
            "documents or chunks they share.",
            "Give a query_offset within the sequence.",
        )
    if documents is not None:
        starts = list(documents)
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


def tiles(
    queries: Range, keys: Range, visible: Visibility, masked_side: int | None = None
) -> Iterator[Tile]:
    """Cut a rectangle into tiles, without the parts in which nothing is seen.

    Every visible pair of the rectangle is in exactly one tile. Only at the edges of windows, and
    where many short documents meet, are there tiles that need a bias.

    Args:
        queries: Rows of the rectangle.
        keys: Columns.
        visible: What is seen.
        masked_side: Side of the largest tiles under a bias; :data:`MASKED_SIDE` by default.

    Example:
        >>> causal = Visibility.of(8, 8, is_causal=True)
        >>> [(t.queries, t.keys, t.kind.value) for t in tiles((4, 8), (0, 8), causal)]
        [((4, 8), (0, 4), 'full'), ((4, 8), (4, 8), 'causal')]
    """
    (top, bottom), (left, right) = queries, keys
    if top >= bottom or left >= right:
        return
    side = MASKED_SIDE if masked_side is None else masked_side
    first, end = visible.first, visible.end
    if end(bottom - 1) <= left or first(top) >= right:
        return
    if first(bottom - 1) <= left and end(top) >= right:
        yield Tile(queries, keys, Kind.FULL)
        return
    if _is_causal_square(queries, keys, visible):
        yield Tile(queries, keys, Kind.CAUSAL)
        return
    is_small = max(bottom - top, right - left) <= side
    cuts = _query_cuts(queries, keys, visible, side)
    if is_small and len(cuts) > _MOST_CUTS:
        yield Tile(queries, keys, Kind.BIAS)
        return
    if cuts:
        cut = cuts[len(cuts) // 2]
        yield from tiles((top, cut), keys, visible, side)
        yield from tiles((cut, bottom), keys, visible, side)
    elif cuts := _key_cuts(queries, keys, visible, side):
        cut = cuts[len(cuts) // 2]
        yield from tiles(queries, (left, cut), visible, side)
        yield from tiles(queries, (cut, right), visible, side)
    elif is_small:
        yield Tile(queries, keys, Kind.BIAS)
    elif bottom - top >= right - left:
        cut = (top + bottom) // 2
        yield from tiles((top, cut), keys, visible, side)
        yield from tiles((cut, bottom), keys, visible, side)
    else:
        cut = (left + right) // 2
        yield from tiles(queries, (left, cut), visible, side)
        yield from tiles(queries, (cut, right), visible, side)


def _is_causal_square(queries: Range, keys: Range, visible: Visibility) -> bool:
    """Whether the i-th query of a square sees exactly its keys up to the i-th."""
    (top, bottom), (left, right) = queries, keys
    if bottom - top != right - left or visible.first(bottom - 1) > left:
        return False
    slope, behind = visible.end.piece(top)
    is_line = bottom - top == 1 or (slope == 1 and behind >= bottom)
    return is_line and visible.end(top) == left + 1


def _query_cuts(queries: Range, keys: Range, visible: Visibility, side: int) -> list[int]:
    """Queries strictly inside a rectangle where a bound bends, or the diagonal enters or leaves."""
    (top, bottom), (left, right) = queries, keys
    cuts: set[int] = set()
    for bound in (visible.first, visible.end):
        begin = bisect_right(bound.starts, top)
        cuts.update(bound.starts[begin : bisect_left(bound.starts, bottom)])
    if cuts:
        return sorted(cuts)
    if visible.end.piece(top)[0] == 1:
        # the first query of a causal square whose keys begin at the edge of the rectangle
        cuts |= {top + edge + 1 - visible.end(top) for edge in (left, right)}
    if visible.first.piece(top)[0] == 1:
        blind = top + right - visible.first(top)  # the first query that sees no key any more
        cuts |= {blind} if bottom - blind > side else set()
    return sorted(cut for cut in cuts if top < cut < bottom)


def _key_cuts(queries: Range, keys: Range, visible: Visibility, side: int) -> list[int]:
    """Keys strictly inside a rectangle between what all, some and no queries of it see."""
    (top, bottom), (left, right) = queries, keys
    # the diagonal's square begins with the last key of its first query
    cuts = {visible.first(top), visible.end(top) - visible.end.piece(top)[0]}
    cuts.add(visible.end(bottom - 1))
    if right - visible.first(bottom - 1) > side:  # else slivers of a window's edge
        cuts.add(visible.first(bottom - 1))
    return sorted(cut for cut in cuts if left < cut < right)
