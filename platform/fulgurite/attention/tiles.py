"""Which keys a query may see, and rectangles of such pairs as kernel calls.

Axes: M queries, N keys.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from fulgurite.errors import ConfigError

__all__ = ["MASKED_SIDE", "Kind", "Range", "Tile", "Visibility", "tiles"]

#: Half-open range of tokens.
Range = tuple[int, int]

#: A tile under a bias is cut until it is at most so wide: the rest of the rectangle needs no mask.
MASKED_SIDE = 256


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
class Visibility:
    """Keys that each query sees: one interval, whose ends never decrease with the query.

    Causal, sliding-window, prefix and document masks and any combination of them are such.

    Args:
        queries: M.
        keys: N.
        is_causal: Query i sees keys up to i (``M = N``).
        window: Query i sees no key before i − window + 1.
        prefix: All queries see the first so many keys, although later ones are causal.
        documents: First tokens of the documents, ascending from 0; tokens see only their own.

    Raises:
        ConfigError: The numbers do not fit together.

    Source: causal: card section 1.5; the rest: inferred.
    """

    queries: int
    keys: int
    is_causal: bool = False
    window: int | None = None
    prefix: int = 0
    documents: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        square = self.is_causal or self.window is not None or self.documents is not None
        if square and self.queries != self.keys:
            raise ConfigError(
                f"There are {self.queries} queries and {self.keys} keys, and the mask compares "
                "their positions.",
                "Give as many keys as queries, or leave out is_causal, window and documents.",
            )
        if self.window is not None and self.window < 1:
            raise ConfigError(
                f"A window of {self.window} keys leaves queries without keys.",
                "Give a window of at least 1.",
            )
        if not 0 <= self.prefix <= self.keys or (self.prefix and not self.is_causal):
            raise ConfigError(
                f"A prefix of {self.prefix} tokens does not fit (is_causal={self.is_causal}, "
                f"{self.keys} keys).",
                "Give a prefix within the sequence, and is_causal=True.",
            )
        if self.documents is not None:
            starts = list(self.documents)
            if not starts or starts[0] != 0 or starts != sorted(set(starts)):
                raise ConfigError(
                    f"Document starts {starts[:8]} do not ascend from 0.",
                    "Give the first token of each document, beginning with 0.",
                )
            if self.keys and starts[-1] >= self.keys:
                raise ConfigError(
                    f"A document starts at {starts[-1]}, behind the {self.keys} tokens.",
                    "Give starts within the sequence.",
                )

    @property
    def is_full(self) -> bool:
        """Whether every query sees every key."""
        return not self.is_causal and self.window is None and self.documents is None

    @property
    def is_simple(self) -> bool:
        """Whether one kernel call without a bias can do it: all pairs, or a causal square."""
        return self.is_full or (
            self.is_causal and self.window is None and not self.prefix and self.documents is None
        )

    def first(self, query: int) -> int:
        """First key that a query sees."""
        first = 0 if self.window is None else max(0, query - self.window + 1)
        return max(first, self._document(query)[0])

    def end(self, query: int) -> int:
        """Key behind the last one that a query sees."""
        end = max(query + 1, self.prefix) if self.is_causal else self.keys
        return min(end, self._document(query)[1])

    def _document(self, query: int) -> Range:
        if self.documents is None:
            return 0, self.keys
        at = bisect_right(self.documents, query)
        end = self.documents[at] if at < len(self.documents) else self.keys
        return self.documents[at - 1], end

    def cuts(self, span: Range) -> list[int]:
        """Document and prefix boundaries strictly inside a range of tokens."""
        inside = [self.prefix] if self.prefix else []
        if self.documents is not None:
            first = bisect_right(self.documents, span[0])
            last = bisect_right(self.documents, span[1] - 1)
            inside += self.documents[first:last]
        return [cut for cut in inside if span[0] < cut < span[1]]

    def bias(self, queries: Range, keys: Range, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Additive mask of a rectangle: 0 or −inf. Shape: (1, 1, M', N')."""
        rows = range(*queries)
        first = torch.tensor([self.first(i) for i in rows], device=device)[:, None]
        end = torch.tensor([self.end(i) for i in rows], device=device)[:, None]
        columns = torch.arange(*keys, device=device)
        seen = (columns >= first) & (columns < end)
        bias = torch.zeros(seen.shape, dtype=dtype, device=device)
        return bias.masked_fill_(~seen, -torch.inf)[None, None]

    def pairs(self) -> int:
        """Number of (query, key) pairs."""
        return sum(max(0, self.end(i) - self.first(i)) for i in range(self.queries))


def tiles(queries: Range, keys: Range, visible: Visibility) -> Iterator[Tile]:
    """Cut a rectangle into tiles, without the parts in which nothing is seen.

    Every visible pair of the rectangle is in exactly one tile. Only at the edges of windows are
    there tiles that need a bias.

    Example:
        >>> causal = Visibility(8, 8, is_causal=True)
        >>> [(t.queries, t.keys, t.kind.value) for t in tiles((4, 8), (0, 8), causal)]
        [((4, 8), (0, 4), 'full'), ((4, 8), (4, 8), 'causal')]
    """
    (top, bottom), (left, right) = queries, keys
    if top >= bottom or left >= right:
        return
    if visible.end(bottom - 1) <= left or visible.first(top) >= right:
        return
    if visible.first(bottom - 1) <= left and visible.end(top) >= right:
        yield Tile(queries, keys, Kind.FULL)
        return
    if _is_causal_square(queries, keys, visible):
        yield Tile(queries, keys, Kind.CAUSAL)
        return
    if cuts := [*visible.cuts(queries), *_inside(keys, queries, visible)]:
        cut = _middle(cuts)
        yield from tiles((top, cut), keys, visible)
        yield from tiles((cut, bottom), keys, visible)
    elif cuts := [*visible.cuts(keys), *_inside(queries, keys, visible)]:
        cut = _middle(cuts)
        yield from tiles(queries, (left, cut), visible)
        yield from tiles(queries, (cut, right), visible)
    elif max(bottom - top, right - left) <= MASKED_SIDE:
        yield Tile(queries, keys, Kind.BIAS)
    elif bottom - top >= right - left:
        cut = (top + bottom) // 2
        yield from tiles((top, cut), keys, visible)
        yield from tiles((cut, bottom), keys, visible)
    else:
        cut = (left + right) // 2
        yield from tiles(queries, (left, cut), visible)
        yield from tiles(queries, (cut, right), visible)


def _is_causal_square(queries: Range, keys: Range, visible: Visibility) -> bool:
    """Whether query i of a square sees exactly the keys up to i."""
    top, bottom = queries
    return (
        visible.is_causal
        and queries == keys
        and visible.end(top) == top + 1
        and visible.first(bottom - 1) <= top
    )


def _inside(span: Range, of: Range, visible: Visibility) -> list[int]:
    """Ends of one range strictly inside another, where the diagonal matters."""
    if not visible.is_causal:
        return []
    return [end for end in span if of[0] < end < of[1]]


def _middle(cuts: list[int]) -> int:
    return sorted(cuts)[len(cuts) // 2]
