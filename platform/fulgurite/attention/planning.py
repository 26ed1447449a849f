"""Chooses how attention is cut so that what it holds at once fits a budget.

Axes: B batch, H query heads, G key/value heads, M queries, N keys.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from fulgurite.attention.budget import format_bytes
from fulgurite.attention.cost_model import CostEstimate, Cut, MachineCosts, Setting, estimate
from fulgurite.attention.edges import CACHED_MASKS
from fulgurite.attention.kernels import TileKernelNames, accumulator_dtype
from fulgurite.attention.quorums import perfect_sizes, quorum
from fulgurite.attention.schedules import Task, rect_tasks, recursive_tasks
from fulgurite.attention.spec import AttentionSpec, HeadGroup
from fulgurite.attention.tiles import GPU_MASKED_SIDE, MASKED_SIDE
from fulgurite.attention.visibility import Visibility
from fulgurite.errors import ConfigError

__all__ = [
    "SCHEDULES", "UNHALVED", "ExecutionPlan", "Halvings", "Schedule", "check_schedule",
    "make_plan",
]  # fmt: skip

Schedule = Literal["auto", "whole", "heads", "rect", "cqs"]

#: What ``schedule`` may be.
SCHEDULES = ("auto", "whole", "heads", "rect", "cqs")

_SMALLEST_TILE = 16  # tokens; below it a kernel call costs more than its tile
_MOST_CHUNKS = 2500
# What tiles hold whose scores or biases lie in memory, where no budget says more [bytes].
_DENSE_BUDGET = 2**26


class Halvings(NamedTuple):
    """How often what is computed at once is halved after memory ran out.

    Attributes:
        heads: Halvings of the batch entries and heads at once.
        queries: Halvings of the queries of a tile.
        keys: Halvings of its keys.
    """

    heads: int = 0
    queries: int = 0
    keys: int = 0


#: Tiles as they were planned.
UNHALVED = Halvings()


@dataclass(frozen=True)
class ExecutionPlan:
    """How a call is cut.

    Attributes:
        spec: What is computed.
        schedule: ``whole`` (one call), ``heads`` (one call per group of heads), ``rect`` (tiles of
            queries past which keys are streamed) or ``cqs`` (quorums of chunks).
        head_step: Batch entries and key/value heads at once; each of these brings its query heads.
        tile: Queries and keys of a tile, for ``rect``.
        chunks: c, for ``cqs``.
        cost: What it is predicted to take.
        depth: How often the sequence is divided, for ``cqs``.
        passes: How often gradients go through all tiles: 2 where sums over all keys do not fit.
        shard: Rank and number of ranks among which tasks are dealt out.
        kernel: Which kernel to prefer, where there are several.
        budget: What was allowed [bytes].
        reason: Why this way.
        gradient: How gradients are computed, if they are.
        setting: What it was chosen for.
    """

    spec: AttentionSpec
    schedule: Schedule
    head_step: tuple[int, int]
    tile: tuple[int, int]
    chunks: int
    cost: CostEstimate
    depth: int = 1
    passes: int = 1
    shard: tuple[int, int] = (0, 1)
    kernel: str | None = None
    budget: int | None = None
    reason: str = ""
    gradient: ExecutionPlan | None = None
    setting: Setting = field(default_factory=Setting)

    @property
    def peak_bytes(self) -> int:
        """Most bytes held at once, forward or backward."""
        return max(self.cost.peak_bytes, self.gradient.peak_bytes if self.gradient else 0)

    @property
    def adds_in_place(self) -> bool:
        """Whether gradients can be summed where they are returned."""
        return self.spec.dtype == accumulator_dtype(self.spec.dtype)

    @property
    def merges(self) -> bool:
        """Whether several tasks have keys for the same queries."""
        return self.schedule == "cqs"

    @property
    def is_shared(self) -> bool:
        """Whether several ranks compute it."""
        return self.shard[1] > 1

    @property
    def task_count(self) -> int:
        """Tasks of a group of heads, about."""
        if self.schedule == "cqs":
            return int(self.chunks**self.depth)
        return -(-self.spec.queries // max(1, self.tile[0]))

    @property
    def masked_side(self) -> int | None:
        """Side of the largest tiles under a mask's edge; None for that of CPUs."""
        return self.setting.masked_side

    def smaller_tiles(self, halvings: Halvings) -> Halvings | None:
        """Return how to cut on when tiles halved so often are too large; None at the smallest.

        Heads or one side are halved, whichever leaves least memory in use; so calls about double.
        Only where one call becomes several, which must be merged, it may take two halvings until
        less is in use. Where keys were gathered, they are streamed in chunks from then on.
        """
        smaller = self._halved_once(halvings)
        while smaller is not None and self.peak_of(smaller) >= self.peak_of(halvings):
            further = self._halved_once(smaller)
            if further is None:
                break
            smaller = further
        return smaller

    def _halved_once(self, halvings: Halvings) -> Halvings | None:
        """One more halving, of what leaves least memory in use; None at the smallest tiles."""
        height, width = self._sides(halvings)
        options = []
        if self.head_steps(halvings) != (1, 1):
            options.append(halvings._replace(heads=halvings.heads + 1))
        if height > _SMALLEST_TILE:
            options.append(halvings._replace(queries=halvings.queries + 1))
        if width > _SMALLEST_TILE:
            options.append(halvings._replace(keys=halvings.keys + 1))
        return min(options, key=self.peak_of, default=None)

    def peak_of(self, halvings: Halvings) -> int:
        """Most bytes that tiles halved so often hold at once."""
        is_cut = halvings.queries or halvings.keys or self.schedule in ("rect", "cqs")
        cut = Cut(
            "rect" if is_cut else "heads", self.head_steps(halvings), self._sides(halvings),
            passes=self.passes,
        )  # fmt: skip
        return estimate(self.spec, cut, self.setting).peak_bytes

    def head_steps(self, halvings: Halvings) -> tuple[int, int]:
        """Batch entries and key/value heads at once when these are halved so often."""
        batch, kv_heads = self.head_step
        for _ in range(halvings.heads):
            if batch > 1:
                batch = -(-batch // 2)
            else:
                kv_heads = -(-kv_heads // 2)
        return batch, kv_heads

    def parts(self, group: HeadGroup, halvings: Halvings) -> list[HeadGroup]:
        """Parts of a group of heads that are computed one after the other."""
        heads = self.spec.heads // self.spec.kv_heads
        return group.parts(*self.head_steps(halvings), heads)

    def _sides(self, halvings: Halvings) -> tuple[int, int]:
        """Queries and keys of tiles halved so often."""
        height, width = self.tile
        if self.schedule == "cqs":
            height = -(-self.spec.keys // max(1, self.chunks))
            width = height * len(quorum(max(self.chunks, 1)))
        return max(1, height >> halvings.queries), max(1, width >> halvings.keys)

    def is_mine(self, index: int) -> bool:
        """Whether this rank computes the task of this index.

        Causal rows get longer along the sequence, so rows are dealt to ranks in boustrophedon
        order, which balances the load.
        """
        return self.owner(index) == self.shard[0]

    def owner(self, index: int) -> int:
        """The rank that computes the task of this index."""
        turn, offset = divmod(index, self.shard[1])
        return offset if turn % 2 == 0 else self.shard[1] - 1 - offset

    def groups(self) -> Iterator[HeadGroup]:
        """Batch entries and heads that are computed together, in order."""
        return self.spec.groups(*self.head_step)

    def of_group(self, group: HeadGroup) -> ExecutionPlan:
        """The same for one of :meth:`groups` alone."""
        batch = group.batch.stop - group.batch.start
        heads = group.heads.stop - group.heads.start
        kv_heads = group.kv_heads.stop - group.kv_heads.start
        spec = replace(
            self.spec, batch=batch, heads=heads, kv_heads=kv_heads, visible=(group.visible,)
        )
        return replace(self, spec=spec, head_step=(batch, kv_heads))

    def tasks(self, visible: Visibility) -> Iterable[Task]:
        """The tasks of a group of heads, in order."""
        if self.schedule == "cqs":
            return recursive_tasks(visible, self.chunks, self.depth)
        return rect_tasks(visible, *self.tile)

    def explain(self) -> str:
        """What is done, what it costs, and why, in a few lines."""
        spec, cost = self.spec, self.cost
        limit = "none" if self.budget is None else format_bytes(self.budget)
        sizes = f"D = {spec.head_dim}"
        if spec.value_dim != spec.head_dim:
            sizes += f" (values {spec.value_dim})"
        lines = [
            f"attention of {spec.queries} queries x {spec.keys} keys, {spec.batch} x "
            f"{spec.heads} heads ({spec.kv_heads} key/value), {sizes}, "
            f"{str(spec.dtype).removeprefix('torch.')}",
            f"schedule  {self.schedule}: {self._describe_cut()}",
            f"tasks     {self.task_count * sum(1 for _ in self.groups())}",
            f"budget    {limit}",
            f"peak      {format_bytes(self.peak_bytes)}",
            f"moved     {format_bytes(cost.moved_bytes)}, if the tensors are elsewhere",
            f"calls     about {cost.calls}",
            f"time      {cost.seconds:.3g} s forward, predicted",
        ]
        if self.gradient is not None:
            lines.append(
                f"gradient  {self.gradient.schedule}: {self.gradient._describe_cut()}; "
                f"{self.gradient.cost.seconds:.3g} s"
            )
        return "\n".join([*lines, f"why       {self.reason}"])

    def _describe_cut(self) -> str:
        text = {
            "whole": "one kernel call",
            "heads": f"{self.head_step[0]} x {self.head_step[1]} key/value heads at a time",
            "rect": "tiles of {} queries x {} keys".format(*self.tile),
            "cqs": f"{self.chunks} tasks of {len(quorum(max(self.chunks, 1)))} chunks",
        }[self.schedule]
        return text + (", in two passes" if self.passes == 2 else "")


def check_schedule(schedule: str, allowed: Sequence[str] = SCHEDULES) -> None:
    """Check the name of a schedule.

    Args:
        schedule: As the user gave it.
        allowed: Names that may be given.

    Raises:
        ConfigError: The schedule is not among the allowed ones.
    """
    if schedule not in allowed:
        raise ConfigError(
            f"There is no schedule {schedule!r} here.", f"Use one of {', '.join(allowed)}."
        )


@functools.lru_cache(maxsize=512)  # a model asks for the same plan in every layer and step
def make_plan(
    spec: AttentionSpec,
    budget: int | None = None,
    schedule: Schedule = "auto",
    *,
    forward: bool = True,
    backward: bool = False,
    resident: bool = True,
    packs: bool = False,
    tiled: bool = False,
    ahead: bool = False,
    passes: int | None = None,
    kernel: str | None = None,
    shard: tuple[int, int] = (0, 1),
    costs: MachineCosts | None = None,
    kernels: TileKernelNames | None = None,
) -> ExecutionPlan:
    """Choose the fastest way that fits.

    Args:
        spec: What is computed.
        budget: Bytes that may be held at once; None for no limit.
        schedule: Consider only this one.
        forward: Whether the result is computed; else the plan is that of gradients alone.
        backward: Whether gradients are computed too, and must fit.
        resident: Whether the tensors lie on the device, so that nothing is copied.
        packs: Whether tiles are copied there, since the last stride of the tensors is not 1.
        tiled: Write the result tile by tile, even with ``schedule="whole"``.
        ahead: Whether the next tile is copied to the device while one is computed.
        passes: Consider only gradients in so many passes.
        kernel: Which kernel to prefer.
        shard: Rank and number of ranks among which tasks are dealt out.
        costs: Measured costs of the machine.
        kernels: Which compute the tiles; by default those of CPUs.

    Raises:
        ConfigError: There is no such schedule, nothing fits, or the schedule does not do these
            sizes.

    Source: card section 1.9 (model of memory and time) and 7 (order of the choice).
    """
    check_schedule(schedule)
    if spec.is_empty:  # there is nothing to compute, by whatever schedule
        return ExecutionPlan(
            spec, "whole", (max(1, spec.batch), max(1, spec.kv_heads)), (1, 1), 0,
            CostEstimate(0, 0, 0, 0.0, 0.0), budget=budget, reason="there are no pairs",
        )  # fmt: skip
    kernels = kernels or TileKernelNames()
    setting = Setting(
        False, resident, packs, tiled, ahead, shard[1], costs or MachineCosts(), kernels
    )  # fmt: skip
    if "efficient" in kernels.masked:
        side = _masked_side(spec, budget)
        setting = setting._replace(masked_side=side, cached_masks=CACHED_MASKS)
    plans: list[ExecutionPlan] = []
    smallest = 0
    for gradients in [True] * (backward or not forward) + [False] * forward:
        way, required = _choose(
            spec, budget, schedule, setting._replace(gradients=gradients),
            passes if gradients else None,
        )  # fmt: skip
        smallest = max(smallest, required)
        if way is not None:
            plans.append(replace(way, shard=shard, kernel=kernel))
    if len(plans) < (backward or not forward) + forward:
        raise ConfigError(
            f"A memory budget of {format_bytes(budget or 0)} ({budget} bytes) is too small for "
            f"schedule={schedule!r}; the smallest that works is {smallest} bytes.",
            "Raise memory_budget.",
        )
    return plans[0] if len(plans) == 1 else replace(plans[1], gradient=plans[0])


def _choose(
    spec: AttentionSpec,
    budget: int | None,
    schedule: Schedule,
    setting: Setting,
    passes: int | None,
) -> tuple[ExecutionPlan | None, int]:
    """The fastest way to compute the result, or the gradients, that fits; and the least budget.

    Raises:
        ConfigError: The schedule does not do these sizes.
    """
    is_dense = setting.computes_scores(spec) or spec.has_bias
    limit = _DENSE_BUDGET if budget is None and is_dense else budget
    fits: list[tuple[Cut, CostEstimate]] = []
    smallest: tuple[Cut, CostEstimate] | None = None
    for cut in _candidates(spec, schedule, setting):
        if passes is not None and cut.passes != passes:
            continue
        if _task_count(spec, cut) < setting.ranks:
            continue  # a rank would have nothing to do
        cost = estimate(spec, cut, setting)
        if smallest is None or cost.peak_bytes < smallest[1].peak_bytes:
            smallest = cut, cost
        if limit is None or cost.peak_bytes <= limit:
            fits.append((cut, cost))
            if cut.schedule == "whole" and not is_dense:
                break  # nothing is faster than one call
    if smallest is None:
        raise ConfigError(
            f"schedule={schedule!r} does not do {spec.queries} queries and {spec.keys} keys "
            f"on {setting.ranks} rank(s).",
            'Use schedule="auto", or fewer ranks.',
        )
    if not fits and budget is None:
        fits = [smallest]
    if not fits:
        return None, smallest[1].peak_bytes
    best = min(fits, key=lambda way: (way[1].seconds, way[1].peak_bytes))
    near = [way for way in fits if way[1].seconds <= 1.005 * best[1].seconds]
    cut, cost = min(near, key=lambda way: way[1].peak_bytes)
    if best[0].schedule == "whole":
        cut, cost = best
    reason = "everything fits at once"
    if cut.schedule != "whole":
        fastest: dict[str, float] = {}
        for way, predicted in sorted(fits, key=lambda way: way[1].seconds, reverse=True):
            fastest[way.schedule] = predicted.seconds
        times = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in fastest.items())
        reason = f"fastest of {len(fits)} ways that fit, or as fast and smaller ({times})"
    plan = ExecutionPlan(
        spec, cut.schedule, cut.head_step, cut.tile, cut.chunks, cost,
        passes=cut.passes, budget=budget, reason=reason, setting=setting,
    )  # fmt: skip
    return plan, smallest[1].peak_bytes


def _masked_side(spec: AttentionSpec, budget: int | None) -> int:
    """Side of the tiles at the edges of masks on a GPU: the largest that leaves most of the budget.

    What is kept counts too, and what their making takes.
    """
    side = GPU_MASKED_SIDE
    bytes_of_pair = spec.dtype.itemsize * (1 + CACHED_MASKS) + 2
    while budget is not None and side > MASKED_SIDE and 4 * side**2 * bytes_of_pair > budget:
        side //= 2
    return side


def _task_count(spec: AttentionSpec, cut: Cut) -> int:
    return cut.chunks if cut.schedule == "cqs" else -(-spec.queries // max(1, cut.tile[0]))


def _candidates(spec: AttentionSpec, schedule: Schedule, setting: Setting) -> Iterator[Cut]:
    """Ways to cut a call, the whole first."""
    queries, keys = spec.queries, spec.keys
    steps = [
        *((b, spec.kv_heads) for b in _halvings(spec.batch)),
        *((1, g) for g in _halvings(spec.kv_heads)[1:]),
    ]
    if schedule in ("auto", "whole"):
        yield Cut("whole", (spec.batch, spec.kv_heads), (queries, keys))
    if schedule in ("auto", "heads"):
        for step in steps[1:] if schedule == "auto" else steps:
            yield Cut("heads", step, (queries, keys))
    if schedule in ("auto", "rect"):
        # keys that are read where they lie take no memory, however many
        keys_cost = setting.gradients or setting.packs or not setting.resident
        keys_cost = keys_cost or spec.has_bias or setting.computes_scores(spec)
        sides = [] if keys_cost else [(min(side, queries), keys) for side in _sides(queries)]
        if keys_cost or not spec.is_simple:  # edges of masks take memory too
            sides += _tiles(queries, keys)
        tiles = list(dict.fromkeys(sides))
        for step in dict.fromkeys((steps[0], steps[-1])):
            for tile in tiles:
                for passes in (1, 2) if setting.gradients else (1,):
                    yield Cut("rect", step, tile, passes=passes)
    if schedule in ("auto", "cqs") and queries == keys and keys > 1:
        for chunks in perfect_sizes(min(keys, _MOST_CHUNKS)) or [keys]:
            for step in dict.fromkeys((steps[0], steps[-1])):
                yield Cut("cqs", step, (0, 0), chunks)


def _halvings(number: int) -> list[int]:
    """The number and its halves, rounded up, down to 1."""
    numbers = [number]
    while numbers[-1] > 1:
        numbers.append(-(-numbers[-1] // 2))
    return numbers


def _tiles(queries: int, keys: int) -> Iterator[tuple[int, int]]:
    sides = _sides(max(queries, keys))
    for width in sides:
        for height in sides:
            if height >= width and (height <= queries or height == sides[0]):
                yield min(height, max(queries, 1)), min(width, max(keys, 1))


def _sides(stop: int) -> list[int]:
    """Sides of tiles: powers of two and what lies halfway between them."""
    sides = [_SMALLEST_TILE]
    while sides[-1] * 2 <= stop:
        sides += [sides[-1] * 3 // 2, sides[-1] * 2]
    return sides
