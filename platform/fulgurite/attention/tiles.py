"""Rectangles of pairs as kernel calls: all pairs, causal squares, and pairs under a bias.

Axes: M queries, N keys.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

from fulgurite.attention.bounds import Range
from fulgurite.attention.visibility import Visibility

__all__ = ["GPU_MASKED_SIDE", "MASKED_SIDE", "Kind", "Tile", "tiles"]

#: A tile under a bias is cut until it is at most so wide: the rest of the rectangle needs no mask.
MASKED_SIDE = 256

#: The largest of a GPU, where a call costs more than the pairs that a larger tile hides.
GPU_MASKED_SIDE = 2048

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
        >>> from fulgurite.attention.visibility import EntryMasks
        >>> causal = Visibility.of(8, 8, EntryMasks(is_causal=True))
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
