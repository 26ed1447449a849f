"""Chooses how attention is cut so that what it holds at once fits a budget.

Axes: B batch, H query heads, G key/value heads, M queries, N keys, D head size.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

from fulgurite.attention.device_memory import device_memory
from fulgurite.attention.kernels import accumulator_dtype
from fulgurite.attention.quorums import perfect_sizes, quorum
from fulgurite.attention.schedules import Task, rect_tasks, recursive_tasks
from fulgurite.attention.tiles import MASKED_SIDE, Visibility
from fulgurite.errors import ConfigError

__all__ = [
    "Budget",
    "Costs",
    "Plan",
    "Schedule",
    "Shape",
    "format_bytes",
    "make_plan",
    "parse_budget",
    "smaller",
]

Schedule = Literal["auto", "whole", "heads", "rect", "cqs"]
Budget = int | float | str | None

_UNITS = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?\s*", re.IGNORECASE)
_SMALLEST_TILE = 16  # tokens; below it a kernel call costs more than its tile
_MOST_CHUNKS = 2500
_BACKWARD = 2.5  # time of the backward pass by that of the forward pass (card section 3.5)


def parse_budget(budget: Budget, device: torch.device) -> int | None:
    """Return a budget in bytes, or None for no limit.

    Args:
        budget: Bytes, a size such as ``"2GiB"`` (binary units, with or without the i), a fraction
            of the device's memory in (0, 1], ``"auto"`` for what is free on it, or None.
        device: Where attention is computed.

    Raises:
        ConfigError: It is none of these, or not positive.

    Example:
        >>> parse_budget("1.5 GiB", torch.device("cpu")), parse_budget(4096, torch.device("cpu"))
        (1610612736, 4096)
    """
    if budget is None:
        return None
    if budget == "auto":
        free = device_memory(device)[0]
        # in steps of a sixteenth, so that plans are the same while little changes
        step = max(1, 1 << max(0, free.bit_length() - 5))
        return free // step * step
    try:
        if isinstance(budget, str) and (match := _SIZE.fullmatch(budget)):
            number, unit = float(match[1]), match[2].lower()
            is_size = bool(unit) or budget.strip().lower().endswith("b")
        else:
            number, unit, is_size = float(budget), "", isinstance(budget, int)
        if isinstance(budget, bool) or not 0 < number < float("inf"):
            raise ValueError
    except (ValueError, TypeError):
        raise ConfigError(
            f"A memory budget of {budget!r} cannot be read.",
            'Give bytes, a size such as "2GiB", a fraction of the device in (0, 1], or "auto".',
        ) from None
    if not is_size and number <= 1 and not (isinstance(budget, int) and budget == 1):
        return int(number * device_memory(device)[1])
    return int(number * _UNITS[unit])


def format_bytes(number: float) -> str:
    """A size in binary units.

    Example:
        >>> format_bytes(3 * 2**30), format_bytes(100)
        ('3 GiB', '100 B')
    """
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if number < 1024 or unit == "TiB":
            return f"{number:.3g} {unit}" if number < 1000 else f"{number:.0f} {unit}"
        number /= 1024
    raise AssertionError


@dataclass(frozen=True)
class Shape:
    """Sizes of a call: B, H, G, D and the type of query, key and value."""

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Costs:
    """What work costs on a machine.

    Args:
        flops: Floating operations of a large tile [1/s].
        bandwidth: Of copies between where tensors lie and the device [bytes/s].
        call: Overhead of a kernel call and the merge of its result [s].
        merge: What each number of a result costs beside its pairs [s].
    """

    flops: float = 5e10
    bandwidth: float = 5e9
    call: float = 3e-5
    merge: float = 1e-9


@dataclass(frozen=True)
class Plan:
    """How a call is cut.

    Attributes:
        schedule: ``whole`` (one call), ``heads`` (one call per group of heads), ``rect`` (tiles of
            queries past which keys are streamed) or ``cqs`` (quorums of chunks).
        head_step: Batch entries and key/value heads at once; each of these brings its query heads.
        tile: Queries and keys of a tile, for ``rect``.
        chunks: c, for ``cqs``.
        peak_bytes: Most bytes held at once: inputs of a tile, accumulators, results of kernels.
        moved_bytes: Bytes copied between where the tensors lie and the device, if not there.
        calls: Kernel calls, about.
        seconds: Predicted time of the forward pass, of one rank alone.
        budget: What was allowed [bytes].
        reason: Why this way.
        depth: How often the sequence is divided, for ``cqs``.
        share: Rank and number of ranks among which tasks are dealt out.
        backward: Whether the peak is that of gradients too.
        passes: How often gradients go through all tiles: 2 where sums over all keys do not fit.
        kernel: Which kernel to prefer, where there are several.
    """

    shape: Shape
    visible: Visibility
    schedule: Schedule
    head_step: tuple[int, int]
    tile: tuple[int, int]
    chunks: int
    peak_bytes: int
    moved_bytes: int
    calls: int
    flops: float
    seconds: float
    budget: int | None = None
    reason: str = ""
    depth: int = 1
    share: tuple[int, int] = (0, 1)
    backward: bool = False
    passes: int = 1
    kernel: str | None = None

    @property
    def adds_in_place(self) -> bool:
        """Whether gradients can be summed where they are returned."""
        return self.shape.dtype == accumulator_dtype(self.shape.dtype)

    @property
    def is_direct(self) -> bool:
        """Whether each group of heads is one kernel call, whose result is the result."""
        alone = self.share == (0, 1)
        return self.schedule in ("whole", "heads") and self.visible.is_simple and alone

    @property
    def merges(self) -> bool:
        """Whether several tasks have keys for the same queries."""
        return self.schedule == "cqs"

    @property
    def task_count(self) -> int:
        """Tasks of a group of heads, about."""
        if self.schedule == "cqs":
            return int(self.chunks**self.depth)
        return -(-self.visible.queries // max(1, self.tile[0]))

    def is_mine(self, index: int) -> bool:
        """Whether this rank computes the task of this index.

        Causal tasks of queries grow along the sequence, so ranks take turns there and back.
        """
        return self.owner(index) == self.share[0]

    def owner(self, index: int) -> int:
        """The rank that computes the task of this index."""
        turn, place = divmod(index, self.share[1])
        return place if turn % 2 == 0 else self.share[1] - 1 - place

    def of_heads(self, batch: slice, heads: slice, kv_heads: slice) -> Plan:
        """The same for one of :meth:`head_slices` alone."""
        size = batch.stop - batch.start, heads.stop - heads.start, kv_heads.stop - kv_heads.start
        shape = Shape(*size, self.shape.head_dim, self.shape.dtype)
        return replace(self, shape=shape, head_step=(size[0], size[2]))

    def tasks(self) -> Iterable[Task]:
        """The tasks of a group of heads, in order."""
        if self.schedule == "cqs":
            return recursive_tasks(self.visible, self.chunks, self.depth)
        return rect_tasks(self.visible, *self.tile)

    def head_slices(self) -> Iterator[tuple[slice, slice, slice]]:
        """Slices of batch, query heads and key/value heads that are computed together."""
        batch, kv_heads = self.head_step
        group = self.shape.heads // self.shape.kv_heads
        for b in range(0, self.shape.batch, batch):
            for g in range(0, self.shape.kv_heads, kv_heads):
                stop = min(g + kv_heads, self.shape.kv_heads)
                rows = slice(b, min(b + batch, self.shape.batch))
                yield rows, slice(g * group, stop * group), slice(g, stop)

    def explain(self) -> str:
        """What is done, what it costs, and why, in a few lines."""
        shape, visible = self.shape, self.visible
        how = {
            "whole": "one kernel call",
            "heads": f"{self.head_step[0]} x {self.head_step[1]} key/value heads at a time",
            "rect": "tiles of {} queries x {} keys".format(*self.tile),
            "cqs": f"{self.chunks} tasks of {len(quorum(max(self.chunks, 1)))} chunks",
        }[self.schedule]
        limit = "none" if self.budget is None else format_bytes(self.budget)
        return "\n".join(
            [
                f"attention of {visible.queries} queries x {visible.keys} keys, {shape.batch} x "
                f"{shape.heads} heads ({shape.kv_heads} key/value), D = {shape.head_dim}, "
                f"{str(shape.dtype).removeprefix('torch.')}",
                f"schedule  {self.schedule}: {how}",
                f"tasks     {self.task_count * sum(1 for _ in self.head_slices())}",
                f"budget    {limit}",
                f"peak      {format_bytes(self.peak_bytes)}",
                f"moved     {format_bytes(self.moved_bytes)}, if the tensors are elsewhere",
                f"calls     about {self.calls}",
                f"time      {self.seconds:.3g} s forward, predicted",
                f"why       {self.reason}",
            ]
        )


@functools.lru_cache(maxsize=512)  # a model asks for the same plan in every layer and step
def make_plan(
    shape: Shape,
    visible: Visibility,
    budget: int | None = None,
    schedule: Schedule = "auto",
    *,
    backward: bool = False,
    resident: bool = True,
    tiled: bool = False,
    ahead: bool = False,
    passes: int | None = None,
    kernel: str | None = None,
    share: tuple[int, int] = (0, 1),
    costs: Costs | None = None,
) -> Plan:
    """Choose the fastest way that fits.

    Args:
        shape: Sizes and type.
        visible: What is seen.
        budget: Bytes that may be held at once; None for no limit.
        schedule: Consider only this one.
        backward: Whether gradients must fit too.
        resident: Whether the tensors lie on the device, so that nothing is copied.
        tiled: Whether the result is written tile by tile, so that even a whole is one of tiles.
        ahead: Whether the next tile is copied to the device while one is computed.
        passes: Consider only gradients in so many passes.
        kernel: Which kernel to prefer.
        share: Rank and number of ranks among which tasks are dealt out.
        costs: Of the machine.

    Raises:
        ConfigError: Nothing fits, or the schedule does not do these sizes.

    Source: card section 1.9 (model of memory and time) and 7 (order of the choice).
    """
    setting = _Setting(backward, resident, tiled, ahead, share, costs or Costs())
    fits: list[Plan] = []
    smallest: Plan | None = None
    for make in _candidates(shape, visible, schedule, backward):
        plan = make(setting)
        if plan.task_count < share[1] or plan.passes != (passes or plan.passes):
            continue  # a rank would have nothing to do
        if smallest is None or plan.peak_bytes < smallest.peak_bytes:
            smallest = plan
        if budget is None or plan.peak_bytes <= budget:
            fits.append(plan)
            if plan.schedule == "whole":
                break  # nothing is faster than one call
    if smallest is None:
        raise ConfigError(
            f"schedule={schedule!r} does not do {visible.queries} queries and {visible.keys} keys "
            f"on {share[1]} rank(s).",
            'Use schedule="auto", or fewer ranks.',
        )
    if not fits:
        raise ConfigError(
            f"A memory budget of {format_bytes(budget or 0)} ({budget} bytes) is too small for "
            f"schedule={schedule!r}; the smallest that works is {smallest.peak_bytes} bytes.",
            "Raise memory_budget.",
        )

    def time(plan: Plan) -> float:
        return plan.seconds * (1 + _BACKWARD * plan.passes) if backward else plan.seconds

    best = min(fits, key=lambda p: (time(p), p.peak_bytes))
    near = [p for p in fits if time(p) <= 1.02 * time(best)]
    chosen = min(near, key=lambda p: p.peak_bytes) if best.schedule != "whole" else best
    reason = "everything fits at once"
    if chosen.schedule != "whole":
        fastest: dict[str, float] = {}
        for p in sorted(fits, key=time, reverse=True):
            fastest[p.schedule] = time(p)
        times = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in fastest.items())
        reason = f"fastest of {len(fits)} ways that fit, or as fast and smaller ({times})"
    return replace(chosen, budget=budget, reason=reason, kernel=kernel)


def smaller(plan: Plan) -> Plan:
    """Return a plan that holds at most half of what another does.

    Raises:
        ConfigError: There is none.
    """
    return make_plan(
        plan.shape, plan.visible, plan.peak_bytes // 2,
        backward=plan.backward, share=plan.share, kernel=plan.kernel,
    )  # fmt: skip


class _Setting(NamedTuple):
    """What all candidates for a call have in common; see :func:`make_plan`."""

    backward: bool
    resident: bool
    tiled: bool
    ahead: bool
    share: tuple[int, int]
    costs: Costs


_Maker = Callable[[_Setting], Plan]


def _candidates(
    shape: Shape, visible: Visibility, schedule: Schedule, backward: bool
) -> Iterator[_Maker]:
    """Ways to cut a call, the whole first."""
    queries, keys = visible.queries, visible.keys
    every = (shape.batch, shape.kv_heads)
    steps = [
        *((b, shape.kv_heads) for b in _halvings(shape.batch)),
        *((1, g) for g in _halvings(shape.kv_heads)[1:]),
    ]

    def maker(
        kind: Schedule,
        step: tuple[int, int],
        tile: tuple[int, int],
        chunks: int = 0,
        passes: int = 1,
    ) -> _Maker:
        return functools.partial(_plan, shape, visible, kind, step, tile, chunks, passes)

    if schedule in ("auto", "whole"):
        yield maker("whole", every, (queries, keys))
    if schedule in ("auto", "heads"):
        for step in steps[1:] if schedule == "auto" else steps:
            yield maker("heads", step, (queries, keys))
    if schedule in ("auto", "rect"):
        for step in dict.fromkeys((steps[0], steps[-1])):
            for tile in _tiles(queries, keys):
                for passes in (1, 2) if backward else (1,):
                    yield maker("rect", step, tile, passes=passes)
    if schedule in ("auto", "cqs") and queries == keys and keys > 1:
        for chunks in perfect_sizes(min(keys, _MOST_CHUNKS)) or [keys]:
            for step in dict.fromkeys((steps[0], steps[-1])):
                yield maker("cqs", step, (0, 0), chunks)


def _halvings(number: int) -> list[int]:
    """The number and its halves, rounded up, down to 1."""
    found = [number]
    while found[-1] > 1:
        found.append(-(-found[-1] // 2))
    return found


def _tiles(queries: int, keys: int) -> Iterator[tuple[int, int]]:
    sides = list(_powers(_SMALLEST_TILE, max(queries, keys)))
    for width in sides:
        for height in sides:
            if height >= width and (height <= queries or height == sides[0]):
                yield min(height, max(queries, 1)), min(width, max(keys, 1))


def _powers(start: int, stop: int) -> list[int]:
    found = [start]
    while found[-1] * 2 <= stop:
        found += [found[-1] * 3 // 2, found[-1] * 2]
    return found


def _plan(
    shape: Shape,
    visible: Visibility,
    schedule: Schedule,
    step: tuple[int, int],
    tile: tuple[int, int],
    chunks: int,
    passes: int,
    setting: _Setting,
) -> Plan:
    """A way to cut a call with what it costs."""
    size, wide = shape.dtype.itemsize, accumulator_dtype(shape.dtype).itemsize
    costs = setting.costs
    group = shape.heads // shape.kv_heads
    together = step[0] * step[1]  # key/value heads at once
    groups = -(-shape.batch // step[0]) * -(-shape.kv_heads // step[1])
    queries, keys = visible.queries, visible.keys
    if schedule == "cqs":
        members = len(quorum(chunks))
        height = -(-keys // chunks)
        loaded, rows = members * height, chunks * members
        calls = rows * 2 * groups
        passed = chunks * loaded  # tokens loaded over all tasks
    else:
        height, loaded = tile
        rows = -(-queries // height)
        # keys of a row, on average; the first causal row sees one tile, the last sees all
        reach = keys * ((rows + 1) / (2 * rows) if visible.is_causal else 1.0)
        if visible.window is not None:
            reach = min(reach, visible.window + height)
        calls = int(rows * -(-reach // loaded) + 1) * groups
        passed = int(rows * reach)
    pairs = float(queries) * keys * (0.5 if visible.is_causal else 1.0)
    if visible.window is not None:
        pairs = min(pairs, float(queries) * visible.window)
    direct = schedule in ("whole", "heads") and visible.is_simple and not setting.tiled
    peak = together * _tile_peak(
        height * group, loaded, shape.head_dim, size, wide,
        direct=direct, backward=setting.backward, passes=passes,
        copies_rows=not setting.resident, copies_keys=not setting.resident or schedule == "cqs",
        ahead=setting.ahead,
    )  # fmt: skip
    if not visible.is_simple:  # the mask of a tile at an edge, its booleans and positions
        side = min(height, MASKED_SIDE) * min(loaded, MASKED_SIDE)
        peak += side * (size + 2)
    peak += _accumulators(shape, visible, schedule, together, passes, direct, setting)
    heads = shape.batch * shape.kv_heads
    writes = shape.batch * shape.heads * queries * (2 * shape.head_dim * size + wide)
    if schedule == "cqs":  # results are read, merged and written by each task of a chunk
        writes += 2 * len(quorum(chunks)) * heads * group * queries * (shape.head_dim + 1) * wide
    moved = writes + 2 * heads * passed * shape.head_dim * size
    flops = 4.0 * pairs * shape.head_dim * shape.batch * shape.heads
    copied = moved if not setting.resident else (moved - writes if schedule == "cqs" else 0)
    seconds = flops / costs.flops + copied / costs.bandwidth + calls * costs.call
    if not direct:  # each call is merged into its row, each row of cqs into the result
        merges = calls + (rows * groups if schedule == "cqs" else 0)
        seconds += costs.merge * merges * height * group * together * shape.head_dim
    return Plan(
        shape, visible, schedule, step, tile, chunks, int(peak), int(moved), calls, flops, seconds,
        share=setting.share, backward=setting.backward, passes=passes,
    )  # fmt: skip


def _tile_peak(
    rows: int,
    keys: int,
    head_dim: int,
    size: int,
    wide: int,
    *,
    direct: bool,
    backward: bool,
    passes: int,
    copies_rows: bool,
    copies_keys: bool,
    ahead: bool,
) -> int:
    """Bytes of one key/value head for a tile: ``rows`` counts the rows of all its query heads.

    Forward: query, key and value where they are copied; result and log-sum-exp of the kernel;
    accumulators of both unless the kernel's are the result. Backward: query, out, its gradient,
    key and value where they are copied; what the kernel gives; accumulators of what stays while
    tiles pass. What is copied ahead counts twice.
    """
    passing = 2 if ahead else 1
    row, key = head_dim * size * copies_rows, 2 * head_dim * size * copies_keys
    forward = rows * row + keys * key * passing + rows * (head_dim * size + wide)
    if not direct:  # and what merging takes for a moment
        forward += rows * (head_dim + 1) * wide * passing
        forward += rows * (head_dim * (size < wide) + 1) * wide
    if not backward:
        return forward
    row = (3 * head_dim * size + wide) * copies_rows
    inputs = rows * row + keys * key * passing
    if passes == 2:
        inputs = max(inputs, rows * row * passing + keys * key)
    grads = (rows + 2 * keys) * head_dim * size
    kept = max(rows, 2 * keys if passes == 2 else 0) * head_dim * (0 if direct else wide)
    return max(forward, inputs + grads + kept)


def _accumulators(
    shape: Shape,
    visible: Visibility,
    schedule: Schedule,
    together: int,
    passes: int,
    direct: bool,
    setting: _Setting,
) -> int:
    """Bytes of what is summed over a whole sequence, beside the result."""
    if direct:
        return 0
    size, wide = shape.dtype.itemsize, accumulator_dtype(shape.dtype).itemsize
    ranks, group = setting.share[1], shape.heads // shape.kv_heads
    found = 0
    if schedule == "cqs" and (size < wide or ranks > 1) and not setting.tiled:
        tokens = -(-visible.queries // ranks)
        found = shape.batch * shape.heads * tokens * (shape.head_dim + 1) * wide
    if setting.backward and passes == 1:
        numbers = 0
        queries = visible.queries * group if schedule == "cqs" else 0  # else tile by tile
        if size < wide or not setting.resident:
            numbers = (queries + 2 * visible.keys) * wide
        if ranks > 1:  # the shard that is being summed
            numbers += max(queries, visible.keys) // ranks * (wide + size)
        found = max(found, together * numbers * shape.head_dim)
    return found
