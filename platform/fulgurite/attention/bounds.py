"""Bounds of what queries see: functions of the query's index that never decrease.

Axes: M queries.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Bound", "Range"]

#: Half-open range of tokens.
Range = tuple[int, int]


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
