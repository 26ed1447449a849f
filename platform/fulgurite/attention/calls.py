"""Kernel calls of a task, and pieces of tensors that they need, in order.

Axes: B batch, H query heads, G key/value heads, M queries, N keys, D head size.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fulgurite.attention.planning import Plan
from fulgurite.attention.schedules import Row, Task, column_tasks
from fulgurite.attention.tiles import Kind, Range, Tile, Visibility, tiles
from fulgurite.attention.transfers import Views

__all__ = [
    "At",
    "Call",
    "Step",
    "bias",
    "column_count",
    "column_steps",
    "row_count",
    "row_steps",
    "spread",
]

#: Slices of batch, heads and tokens.
At = tuple[slice, slice, slice]


class Call(NamedTuple):
    """A tile in the coordinates of what is loaded.

    Attributes:
        queries: In the sequence.
        keys: Among the gathered keys; in the sequence where nothing is gathered.
        kind: What the tile computes.
        seen: The keys in the sequence, of a tile under a bias.
    """

    queries: Range
    keys: Range
    kind: Kind
    seen: Range


class Step(NamedTuple):
    """One kernel call of a unit, or none where nothing is seen.

    Attributes:
        number: Of the unit, in the order of the plan.
        at: Where the result of the unit belongs.
        span: Tokens that stay loaded meanwhile: queries of a row, keys of a column.
        call: What is computed.
        task: Whose gathered keys are used.
        opens: Whether it is the first of its span.
        closes: Whether it is the last of its span.
        ends: Whether it is the last of its unit.
    """

    number: int
    at: At
    span: Range
    call: Call | None
    task: Task
    opens: bool
    closes: bool
    ends: bool


def row_steps(
    rows: Sequence[Tensor],
    keys: Sequence[Tensor],
    plan: Plan,
    *,
    done: Container[int] = (),
    after: int = -1,
    halvings: int = 0,
    within: Range | None = None,
) -> Iterator[tuple[Step, list[Views]]]:
    """Go through a plan row by row, past each of which keys are brought.

    A unit is one row of one task. What a step needs beyond the step before comes with it: first
    the rows of ``rows`` if it opens a row, then the keys if they change.

    Args:
        rows: Tensors over queries. Shape of each: (B, H, M, ...).
        keys: Tensors over keys. Shape of each: (B, G, N, D).
        plan: How it is cut.
        done: Units that are left out.
        after: Units up to this one are left out.
        halvings: How often rows and keys of each unit are halved.
        within: Leave out rows outside these queries.
    """
    number = 0
    for batch, heads, kv_heads in plan.head_slices():
        own_rows, own_keys = [x[batch, heads] for x in rows], [x[batch, kv_heads] for x in keys]
        for index, task in enumerate(plan.tasks()):
            loaded = False
            for i, row in enumerate(task.rows):
                unit = number + i
                if unit <= after or unit in done or not plan.is_mine(index):
                    continue
                if within and not (within[0] <= row.queries[0] and row.queries[1] <= within[1]):
                    continue
                at = batch, heads, slice(*row.queries)
                parts = _halved(task, i, halvings)
                for part, (small, place) in enumerate(parts):
                    span = small.rows[place].queries
                    found: list[Call | None] = list(_calls(small, place, plan.visible))
                    found = found or [None]  # queries that see nothing
                    for j, call in enumerate(found):
                        opens, closes = j == 0, j == len(found) - 1
                        ends = closes and part == len(parts) - 1
                        step = Step(unit, at, span, call, small, opens, closes, ends)
                        views: list[Views] = []
                        if opens:
                            views += [[x[:, :, slice(*span)]] for x in own_rows]
                        if call is not None and not small.loads:
                            views += [[x[:, :, slice(*call.keys)]] for x in own_keys]
                        elif call is not None and not loaded:
                            views += [[x[:, :, slice(*r)] for r in small.loads] for x in own_keys]
                            loaded = True
                        yield step, views
            number += len(task.rows)


def column_steps(
    rows: Sequence[Tensor],
    keys: Sequence[Tensor],
    plan: Plan,
    *,
    done: Container[int] = (),
    after: int = -1,
    halvings: int = 0,
    first: int = 0,
) -> Iterator[tuple[Step, list[Views]]]:
    """Go through the tiles of a plan column by column, past each of which queries are brought.

    A unit is one column of tiles. Each step brings first the keys, if it opens a column, then the
    rows of its call.

    Args:
        rows: Tensors over queries. Shape of each: (B, H, M, ...).
        keys: Tensors over keys. Shape of each: (B, G, N, D).
        plan: How it is cut, in tiles.
        done: Units that are left out.
        after: Units up to this one are left out.
        halvings: How often tiles are halved.
        first: Number of the first unit.
    """
    number = first
    height, width = (max(1, side >> halvings) for side in plan.tile)
    for batch, heads, kv_heads in plan.head_slices():
        own_rows, own_keys = [x[batch, heads] for x in rows], [x[batch, kv_heads] for x in keys]
        for index, left in enumerate(range(0, plan.visible.keys, plan.tile[1])):
            unit, number = number, number + 1
            if unit <= after or unit in done or not plan.is_mine(index):
                continue
            right = min(left + plan.tile[1], plan.visible.keys)
            at = batch, kv_heads, slice(left, right)
            columns = [(x, min(x + width, right)) for x in range(left, right, width)]
            for span in columns:
                task = Task(tuple(column_tasks(plan.visible, span, height)))
                found: list[Call | None] = [
                    call for i in range(len(task.rows)) for call in _calls(task, i, plan.visible)
                ]
                found = found or [None]  # keys that nobody sees
                for j, call in enumerate(found):
                    opens, closes = j == 0, j == len(found) - 1
                    ends = closes and span == columns[-1]
                    views: list[Views] = []
                    if opens:
                        views += [[x[:, :, slice(*span)]] for x in own_keys]
                    if call is not None:
                        views += [[x[:, :, slice(*call.queries)]] for x in own_rows]
                    yield Step(unit, at, span, call, task, opens, closes, ends), views


def column_count(plan: Plan) -> int:
    """Units of :func:`column_steps`."""
    return -(-plan.visible.keys // plan.tile[1]) * sum(1 for _ in plan.head_slices())


def row_count(plan: Plan) -> int:
    """Units of :func:`row_steps`."""
    # a tile of queries is one row; how many a quorum has depends on what is seen
    rows = sum(len(t.rows) for t in plan.tasks()) if plan.merges else plan.task_count
    return rows * sum(1 for _ in plan.head_slices())


def _halved(task: Task, index: int, halvings: int) -> list[tuple[Task, int]]:
    """A row, or rows and keys half, a quarter, … as long that are streamed, never gathered."""
    if not halvings:
        return [(task, index)]
    row = task.rows[index]
    keys = tuple(part for whole in row.keys for part in _parts(whole, halvings))
    return [(Task((Row(part, keys),)), 0) for part in _parts(row.queries, halvings)]


def _parts(span: Range, halvings: int) -> list[Range]:
    step = max(1, (span[1] - span[0]) >> halvings)
    return [(at, min(at + step, span[1])) for at in range(*span, step)]


def _calls(task: Task, index: int, visible: Visibility) -> Iterable[Call]:
    """The kernel calls of a row: tiles that are neighbours once gathered become one."""
    places = dict(_offsets(task))
    row = task.rows[index]
    top, bottom = row.queries
    first, end = visible.first(bottom - 1), visible.end(top)  # keys that all queries see
    found = []
    for keys in row.keys:
        shift = places[keys] - keys[0] if places else 0
        if first <= keys[0] and keys[1] <= end:  # most keys, found without cutting
            parts = [Tile(row.queries, keys, Kind.FULL)]
        else:
            parts = list(tiles(row.queries, keys, visible))
        for tile in parts:
            local = tile.keys[0] + shift, tile.keys[1] + shift
            found.append(Call(tile.queries, local, tile.kind, tile.keys))
    found.sort(key=lambda call: (call.queries, call.keys))  # neighbours side by side
    return _joined(found) if task.loads else found


def _joined(calls: list[Call]) -> Iterator[Call]:
    """Join full tiles of the same queries whose gathered keys touch."""
    if not calls:
        return
    last = calls[0]
    for _, call in pairwise(calls):
        touches = last.queries == call.queries and last.keys[1] == call.keys[0]
        if touches and last.kind is call.kind is Kind.FULL:
            last = last._replace(keys=(last.keys[0], call.keys[1]))
        else:
            yield last
            last = call
    yield last


def _offsets(task: Task) -> Iterator[tuple[Range, int]]:
    """Each loaded range with the place of its first token among the gathered ones."""
    at = 0
    for tokens in task.loads:
        yield tokens, at
        at += tokens[1] - tokens[0]


def spread(task: Task, keys: Range) -> Iterator[tuple[int, int, int]]:
    """Ranges of the sequence that gathered keys come from, with their place in the call."""
    if not task.loads:
        yield (*keys, 0)
        return
    for (start, stop), at in _offsets(task):
        left, right = max(keys[0], at), min(keys[1], at + stop - start)
        if left < right:
            yield start + left - at, start + right - at, left - keys[0]


def bias(call: Call, visible: Visibility, query: Tensor) -> Tensor | None:
    """Additive mask of a call, if its kind has one. Shape: (1, 1, M', N')."""
    if call.kind is not Kind.BIAS:
        return None
    return visible.bias(call.queries, call.seen, query.dtype, torch.device(query.device))
