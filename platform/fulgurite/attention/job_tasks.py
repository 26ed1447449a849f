"""Tasks of a plan that are computed apart: which there are, what each reads, and what it gives.

Axes: B batch, H query heads, G key/value heads, M queries, N keys, D head size.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fulgurite.arithmetic import ceil_div
from fulgurite.attention.bounds import Range
from fulgurite.attention.budget import format_bytes
from fulgurite.attention.checks import GRADIENTS, RESULTS
from fulgurite.attention.execution_plan import ExecutionPlan
from fulgurite.attention.inputs import AttentionInputs, GradientInputs
from fulgurite.attention.kernels import accumulator_dtype
from fulgurite.attention.plan_kernel import PlanKernel
from fulgurite.attention.planning import make_plan
from fulgurite.attention.quorums import quorum
from fulgurite.attention.request import PlanRequest, Schedule
from fulgurite.attention.schedules import Task, chunk_ranges, column_tasks
from fulgurite.attention.spec import AttentionSpec, HeadGroup
from fulgurite.attention.steps import Slices, row_steps
from fulgurite.attention.transfers import Prefetcher
from fulgurite.attention.units import gradient_units, units
from fulgurite.attention.visibility import Visibility
from fulgurite.errors import ConfigError

__all__ = [
    "JobTask",
    "compute_task",
    "job_plan",
    "job_tasks",
    "overlapping_blocks",
    "token_blocks",
]

#: A result with where it belongs.
Result = tuple[str, Slices, Tensor]


class JobTask(NamedTuple):
    """A part of a call that is computed apart from all others.

    Attributes:
        number: In the order of the plan, in which results are summed.
        units: Numbers of its units in the plan.
        group: Batch entries, query heads and key/value heads.
        queries: Ranges of queries that it reads.
        keys: Ranges of keys that it reads.
        gives: Names of the results that it has a part of.
        rows: Its rows in the plan; None of a column of tiles.
    """

    number: int
    units: range
    group: HeadGroup
    queries: tuple[Range, ...]
    keys: tuple[Range, ...]
    gives: tuple[str, ...]
    rows: Task | None


class _OneTask(ExecutionPlan):
    """A plan of which only one task is left, so that the others are not gone through for it."""

    remaining: tuple[Task, HeadGroup]

    def tasks(self, visible: Visibility) -> Iterable[Task]:
        """The task that is left."""
        return (self.remaining[0],)

    def groups(self) -> Iterator[HeadGroup]:
        """The group of heads of the task that is left."""
        yield self.remaining[1]


def _one_task(plan: ExecutionPlan, task: JobTask) -> ExecutionPlan:
    one = _OneTask(**{field.name: getattr(plan, field.name) for field in fields(plan)})
    object.__setattr__(one, "remaining", (task.rows, task.group))  # plans are frozen
    return one


class _AllBut(Container[int]):
    """All unit numbers but those of a task: what is left out while that is computed."""

    def __init__(self, numbers: range) -> None:
        self._numbers = numbers

    def __contains__(self, number: object) -> bool:
        return number not in self._numbers


def job_plan(
    spec: AttentionSpec,
    *,
    budget: int | None,
    schedule: Schedule,
    backward: bool,
    least_tasks: int,
    ahead: bool,
    kernel: str | None,
) -> ExecutionPlan:
    """Choose how a job is cut: the fastest way of a schedule whose tasks are small and many enough.

    Args:
        spec: What is computed.
        budget: Most bytes that a task holds at once; None for no limit.
        schedule: ``cqs`` or ``rect``.
        backward: Whether tasks compute gradients.
        least_tasks: Least number of tasks.
        ahead: Whether the next tile is copied to a device while one is computed.
        kernel: Which kernel to prefer.

    Raises:
        ConfigError: No plan has that many tasks within the budget.
    """
    request = PlanRequest.from_host(spec.dtype, on_gpu=ahead, kernel=kernel)
    request = replace(request, schedule=schedule)
    if backward and schedule == "rect":
        request = replace(request, forward=False, passes=2)
    allowed, plan = budget, None
    while True:
        try:
            plan = make_plan(spec, replace(request, budget=allowed))
            if spec.is_empty:
                return plan
        except ConfigError as error:
            if plan is None:
                raise
            raise ConfigError(
                f"schedule={schedule!r} cannot cut this call into {least_tasks} tasks or more that "
                f"hold at most {'any number of bytes' if budget is None else format_bytes(budget)}"
                " each.",
                "Raise memory_budget, or lower least_tasks.",
            ) from error
        few = least_tasks > 1 and sum(1 for _ in job_tasks(plan, backward)) < least_tasks
        peak = _gradient_peak(plan, ahead) if backward and plan.merges else plan.peak_bytes
        if not few and (budget is None or peak <= budget):
            return plan
        allowed = plan.peak_bytes * 3 // 4


def _gradient_peak(plan: ExecutionPlan, ahead: bool) -> int:
    """Most bytes that the gradients of a task of quorums hold at once.

    Gathered keys and values with their sums, a row of queries with what belongs to it and its sum,
    and what the kernel gives.
    """
    spec = plan.spec
    size, wide = spec.dtype.itemsize, accumulator_dtype(spec.dtype).itemsize
    height = ceil_div(spec.keys, plan.chunks)
    loaded, rows = len(quorum(plan.chunks)) * height, height * spec.heads
    width = max(spec.head_dim, spec.value_dim)
    total = 2 * loaded * width * (size * (2 if ahead else 1) + wide)
    total += rows // spec.kv_heads * (width * (3 * size + 3 * wide) + wide)
    total += (rows // spec.kv_heads + 2 * loaded) * width * size
    if plan.request.computes_scores(spec):
        total += 3 * rows // spec.kv_heads * loaded * wide
    return total * plan.head_step[0] * plan.head_step[1]


def job_tasks(plan: ExecutionPlan, backward: bool) -> Iterator[JobTask]:
    """Yield the tasks of a job in the order of the plan.

    With quorums (``cqs``) a task is one of the paper's, forward and backward. With tiles
    (``rect``) it is a row of tiles; gradients of keys and values are tasks of their own, along
    the columns, so that none gives more than a tile.

    Source: docs/papers/stream_cqsa.md section 1.1 (tasks), 1.7 (gradients add up over tasks).
    """
    number = unit = 0
    gives = (GRADIENTS if plan.merges else GRADIENTS[:1]) if backward else RESULTS
    for group in () if plan.spec.is_empty else plan.groups():
        for task in plan.tasks(group.visible):
            if plan.merges:
                queries = keys = tuple(task.loads)
            else:
                queries = tuple(row.queries for row in task.rows)
                keys = tuple(span for row in task.rows for span in row.keys)
            numbers = range(unit, unit + len(task.rows))
            yield JobTask(number, numbers, group, queries, keys, gives, task)
            number, unit = number + 1, unit + len(task.rows)
    if not backward or plan.merges or plan.spec.is_empty:
        return
    for group in plan.groups():
        for start in range(0, plan.spec.keys, plan.tile[1]):
            span = start, min(start + plan.tile[1], plan.spec.keys)
            queries = tuple(r.queries for r in column_tasks(group.visible, span, plan.tile[0]))
            numbers = range(unit, unit + 1)
            yield JobTask(number, numbers, group, queries, (span,), GRADIENTS[1:], None)
            number, unit = number + 1, unit + 1


def token_blocks(plan: ExecutionPlan) -> tuple[list[Range], list[Range]]:
    """Return the ranges of queries and of keys that tasks read as a whole or not at all."""
    if plan.merges:
        chunks = chunk_ranges(plan.spec.keys, plan.chunks)
        return chunks, chunks
    ends = (plan.spec.queries, plan.tile[0]), (plan.spec.keys, plan.tile[1])
    queries, keys = (
        [(at, min(at + step, tokens)) for at in range(0, tokens, max(1, step))]
        for tokens, step in ends
    )
    return queries, keys


def overlapping_blocks(blocks: Sequence[Range], spans: Sequence[Range]) -> list[int]:
    """Return the numbers of the blocks that have a token in a range.

    Args:
        blocks: Ascending and disjoint.
        spans: Ranges of tokens.

    Example:
        >>> overlapping_blocks([(0, 4), (4, 8), (8, 9)], [(5, 9), (0, 0)])
        [1, 2]
    """
    starts, stops = [a for a, _ in blocks], [b for _, b in blocks]
    numbers = set[int]()
    for start, stop in spans:
        numbers.update(range(bisect_right(stops, start), bisect_left(starts, stop)))
    return sorted(i for i in numbers if starts[i] < stops[i])


def compute_task(
    task: JobTask,
    inputs: Sequence[Tensor],
    plan: ExecutionPlan,
    *,
    device: torch.device,
) -> Iterator[Result]:
    """Compute a task; each result comes as soon as it is whole, in the type of accumulators.

    Args:
        task: What is computed.
        inputs: Query, key and value, or for gradients also the gradient of the result before
            them, and the result and its log-sum-exp over all keys behind them.
        plan: How the call is cut.
        device: Where kernels run.

    Yields:
        Name, place and value of a part of a result.
    """
    if len(inputs) == 3:
        tensors = AttentionInputs(inputs[0], inputs[1], inputs[2])
        for unit in units(tensors, _one_task(plan, task), device=device):
            yield "out", unit.at, unit.out.to(unit.lse.dtype)
            yield "lse", unit.at, unit.lse
            del unit  # or it would take memory beside the next
        return
    grad, query, key, value, out, lse = inputs
    saved = GradientInputs(AttentionInputs(query, key, value), grad, out, lse)
    if plan.merges:
        yield from _quorum_gradients(task, saved, plan, device)
        return
    for part in gradient_units(saved, plan, device=device, done=_AllBut(task.units)):
        for i, values in part.by_result.items():
            yield GRADIENTS[i], part.at, values
        del part, values


def _quorum_gradients(
    task: JobTask, saved: GradientInputs, plan: ExecutionPlan, device: torch.device
) -> Iterator[Result]:
    """Share of a task of quorums in the gradients of its queries, then of its keys and values.

    Args:
        task: What is computed.
        saved: What gradients are computed from.
        plan: How the call is cut.
        device: Where kernels run.

    Source: docs/papers/stream_cqsa.md section 1.7.
    """
    query, rows, keys = saved.inputs.query, saved.rows, saved.keys
    wide = accumulator_dtype(query.dtype)
    kernel = PlanKernel.on(device, query.dtype, plan)
    prefetcher = Prefetcher.between(query.device, device)
    sums: list[Tensor] = []
    for step, tensors in prefetcher.prefetch(row_steps(rows, keys, _one_task(plan, task))):
        if step.opens:
            loaded, tensors = tensors[: len(rows)], tensors[len(rows) :]
            row_sum = torch.zeros_like(loaded[1], dtype=wide)
        if tensors:
            gathered = tensors
            sums = [torch.zeros_like(x, dtype=wide) for x in gathered]
        if step.call is not None:
            local = slice(*(query - step.span[0] for query in step.call.tile.queries))
            columns = slice(*step.call.keys)
            parts = kernel.gradients(
                step.group, step.call.tile, [x[:, :, local] for x in loaded],
                [x[:, :, columns] for x in gathered],
            )  # fmt: skip
            assert parts is not None  # nothing but intervals hides keys here
            row_sum[:, :, local] += parts[0]
            for total, part in zip(sums, parts[1:], strict=True):
                total[:, :, columns] += part
            del parts, part  # or they would take memory beside the next
        if step.closes:
            yield "dquery", step.at, row_sum
            del row_sum
    offset = 0
    for start, stop in task.keys if sums else ():
        length = stop - start
        for name, total in zip(GRADIENTS[1:], sums, strict=True):
            part = total[:, :, offset : offset + length]
            yield name, (task.group.batch, task.group.kv_heads, slice(start, stop)), part
        offset += length
