"""Kernel calls of a task, and pieces of tensors that they need, in order.

Axes: B batch, H query heads, G key/value heads, M queries, N keys, D head size.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from fulgurite.arithmetic import ceil_div
from fulgurite.attention.bounds import Range
from fulgurite.attention.execution_plan import UNHALVED, ExecutionPlan, Halvings
from fulgurite.attention.schedules import Row, Task, column_tasks
from fulgurite.attention.spec import HeadGroup
from fulgurite.attention.tiles import Kind, Tile, tiles
from fulgurite.attention.transfers import Views
from fulgurite.attention.visibility import Visibility

__all__ = [
    "KernelCall",
    "Slices",
    "Step",
    "column_count",
    "column_steps",
    "row_count",
    "row_steps",
    "source_ranges",
]

#: Slices of batch, heads and tokens.
Slices = tuple[slice, slice, slice]


class KernelCall(NamedTuple):
    """A tile in the coordinates of what is loaded.

    Attributes:
        tile: In the sequence; where gathered tiles are joined, the first of them.
        keys: Among the gathered keys; in the sequence where nothing is gathered.
    """

    tile: Tile
    keys: Range


class Step(NamedTuple):
    """One kernel call of a unit, or none where nothing is seen.

    Attributes:
        number: Number of the unit, in the order of the plan.
        group: Batch entries and heads, all of the unit or some.
        at: Where the result of the unit belongs.
        part: Where that of the span belongs, within the unit.
        span: Tokens that stay loaded meanwhile: queries of a row, keys of a column.
        call: What is computed.
        task: Whose gathered keys are used.
        opens: Whether it is the first of its span.
        closes: Whether it is the last of its span.
        ends: Whether it is the last of its unit.
        releases: Whether it is the last that uses the gathered keys, which may be forgotten.
    """

    number: int
    group: HeadGroup
    at: Slices
    part: Slices
    span: Range
    call: KernelCall | None
    task: Task
    opens: bool
    closes: bool
    ends: bool
    releases: bool = False


def row_steps(
    rows: Sequence[Tensor],
    keys: Sequence[Tensor],
    plan: ExecutionPlan,
    *,
    done: Container[int] = (),
    after: int = -1,
    halvings: Halvings = UNHALVED,
    within: Range | None = None,
    groups: Iterable[HeadGroup] | None = None,
) -> Iterator[tuple[Step, list[Views]]]:
    """Iterate over the query rows of a plan; for each row, stream the blocks of keys.

    A unit is one row of one task. What a step needs beyond the step before comes with it: first
    the rows of ``rows`` if it opens a row, then the keys if they change.

    Args:
        rows: Tensors over queries. Shape of each: (B, H, M, ...).
        keys: Tensors over keys. Shape of each: (B, G, N, D).
        plan: How it is cut.
        done: Units that are left out.
        after: Units up to this one are left out.
        halvings: How often heads, queries and keys of each unit are halved.
        within: Leave out rows outside these queries.
        groups: Only these groups of heads; all by default.
    """
    number = 0
    for group in plan.groups() if groups is None else groups:
        head_parts = _head_parts(plan.parts(group, halvings), rows, keys)
        for index, task in enumerate(plan.tasks(group.visible)):
            is_loaded = False
            low, high = within or (0, plan.spec.queries)
            indices = [
                i
                for i, row in enumerate(task.rows)
                if number + i > after
                and number + i not in done
                and plan.is_mine(index)
                and low <= row.queries[0]
                and row.queries[1] <= high
            ]
            for i in indices:
                unit, row = number + i, task.rows[i]
                at = group.batch, group.heads, slice(*row.queries)
                parts = [
                    (*heads, *halved)
                    for heads in head_parts
                    for halved in _halve_row(task, i, halvings)
                ]
                for turn, (part, part_rows, part_keys, small, position) in enumerate(parts):
                    span = small.rows[position].queries
                    calls: list[KernelCall | None] = [
                        *_kernel_calls(small, position, group.visible, plan)
                    ]
                    calls = calls or [None]  # queries that see nothing
                    for j, call in enumerate(calls):
                        opens, closes = j == 0, j == len(calls) - 1
                        ends = closes and turn == len(parts) - 1
                        step = Step(
                            number=unit, group=part, at=at,
                            part=(part.batch, part.heads, slice(*span)),
                            span=span, call=call, task=small, opens=opens, closes=closes,
                            ends=ends, releases=ends and i == indices[-1],
                        )  # fmt: skip
                        views: list[Views] = []
                        if opens:
                            views += [[x[:, :, slice(*span)]] for x in part_rows]
                        if call is not None and not small.loads:
                            views += [[x[:, :, slice(*call.keys)]] for x in part_keys]
                        elif call is not None and not is_loaded:
                            views += [[x[:, :, slice(*r)] for r in small.loads] for x in part_keys]
                            is_loaded = True
                        yield step, views
            number += len(task.rows)


def column_steps(
    rows: Sequence[Tensor],
    keys: Sequence[Tensor],
    plan: ExecutionPlan,
    *,
    done: Container[int] = (),
    after: int = -1,
    halvings: Halvings = UNHALVED,
    first: int = 0,
) -> Iterator[tuple[Step, list[Views]]]:
    """Iterate over the key columns of a plan; for each column, stream the blocks of queries.

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
    height = max(1, plan.tile[0] >> halvings.queries)
    width = max(1, plan.tile[1] >> halvings.keys)
    count = plan.spec.keys
    for group in plan.groups():
        head_parts = _head_parts(plan.parts(group, halvings), rows, keys)
        for index, first_key in enumerate(range(0, count, plan.tile[1])):
            unit, number = number, number + 1
            if unit <= after or unit in done or not plan.is_mine(index):
                continue
            end_key = min(first_key + plan.tile[1], count)
            at = group.batch, group.kv_heads, slice(first_key, end_key)
            columns = [(x, min(x + width, end_key)) for x in range(first_key, end_key, width)]
            parts = [(*heads, span) for heads in head_parts for span in columns]
            for turn, (part, part_rows, part_keys, span) in enumerate(parts):
                task = Task(tuple(column_tasks(group.visible, span, height)))
                calls: list[KernelCall | None] = [
                    call
                    for i in range(len(task.rows))
                    for call in _kernel_calls(task, i, group.visible, plan)
                ]
                calls = calls or [None]  # keys that nobody sees
                for j, call in enumerate(calls):
                    opens, closes = j == 0, j == len(calls) - 1
                    ends = closes and turn == len(parts) - 1
                    views: list[Views] = []
                    if opens:
                        views += [[x[:, :, slice(*span)]] for x in part_keys]
                    if call is not None:
                        views += [[x[:, :, slice(*call.tile.queries)]] for x in part_rows]
                    step = Step(
                        number=unit, group=part, at=at,
                        part=(part.batch, part.kv_heads, slice(*span)),
                        span=span, call=call, task=task, opens=opens, closes=closes, ends=ends,
                    )  # fmt: skip
                    yield step, views


class _HeadPart(NamedTuple):
    """Heads of a group that are computed together, with their tensors."""

    group: HeadGroup
    rows: list[Tensor]
    keys: list[Tensor]


def _head_parts(
    parts: Iterable[HeadGroup], rows: Sequence[Tensor], keys: Sequence[Tensor]
) -> list[_HeadPart]:
    """The parts of a group of heads, with their tensors."""
    return [
        _HeadPart(
            part,
            [x[part.batch, part.heads] for x in rows],
            [x[part.batch, part.kv_heads] for x in keys],
        )
        for part in parts
    ]


def column_count(plan: ExecutionPlan) -> int:
    """Units of :func:`column_steps`."""
    return ceil_div(plan.spec.keys, plan.tile[1]) * sum(1 for _ in plan.groups())


def row_count(plan: ExecutionPlan) -> int:
    """Units of :func:`row_steps`."""
    if not plan.merges:  # a tile of queries is one row
        return plan.task_count * sum(1 for _ in plan.groups())
    return sum(len(task.rows) for group in plan.groups() for task in plan.tasks(group.visible))


def _halve_row(task: Task, index: int, halvings: Halvings) -> list[tuple[Task, int]]:
    """A row, or rows and keys as long or shorter that are streamed, never gathered."""
    if not any(halvings):
        return [(task, index)]
    row = task.rows[index]
    keys = tuple(part for span in row.keys for part in _parts(span, halvings.keys))
    return [(Task((Row(part, keys),)), 0) for part in _parts(row.queries, halvings.queries)]


def _parts(span: Range, halvings: int) -> list[Range]:
    step = max(1, (span[1] - span[0]) >> halvings)
    return [(begin, min(begin + step, span[1])) for begin in range(*span, step)]


def _kernel_calls(
    task: Task, index: int, visible: Visibility, plan: ExecutionPlan
) -> Iterable[KernelCall]:
    """The kernel calls of a row; tiles that are neighbours once gathered may become one."""
    offsets = dict(_offsets(task))
    row = task.rows[index]
    top, bottom = row.queries
    first, end = visible.first(bottom - 1), visible.end(top)  # keys that all queries see
    calls = []
    for keys in row.keys:
        shift = offsets[keys] - keys[0] if offsets else 0
        if first <= keys[0] and keys[1] <= end:  # most keys, without cutting
            parts = [Tile(row.queries, keys, Kind.FULL)]
        else:
            parts = list(tiles(row.queries, keys, visible, plan.masked_side))
        calls += [KernelCall(tile, (tile.keys[0] + shift, tile.keys[1] + shift)) for tile in parts]
    calls.sort(key=lambda call: (call.tile.queries, call.keys))  # neighbours side by side
    # a bias is made for each tile, so that tiles under one stay apart
    return _join_calls(calls) if task.loads and not plan.spec.has_bias else calls


def _join_calls(calls: list[KernelCall]) -> Iterator[KernelCall]:
    """Join full tiles of the same queries whose gathered keys touch."""
    if not calls:
        return
    last = calls[0]
    for _, call in pairwise(calls):
        touches = last.tile.queries == call.tile.queries and last.keys[1] == call.keys[0]
        if touches and last.tile.kind is call.tile.kind is Kind.FULL:
            last = last._replace(keys=(last.keys[0], call.keys[1]))
        else:
            yield last
            last = call
    yield last


def _offsets(task: Task) -> Iterator[tuple[Range, int]]:
    """Each loaded range with the offset of its first token among the gathered ones."""
    offset = 0
    for tokens in task.loads:
        yield tokens, offset
        offset += tokens[1] - tokens[0]


def source_ranges(task: Task, keys: Range) -> Iterator[tuple[int, int, int]]:
    """Ranges of the sequence that gathered keys come from, with their offset in the call."""
    if not task.loads:
        yield (*keys, 0)
        return
    for (start, stop), offset in _offsets(task):
        first, end = max(keys[0], offset), min(keys[1], offset + stop - start)
        if first < end:
            yield start + first - offset, start + end - offset, first - keys[0]
