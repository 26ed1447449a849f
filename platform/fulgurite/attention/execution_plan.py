"""How a call is computed: the end of the chain of specification, request, cut and cost.

Axes: B batch, H query heads, G key/value heads, M queries, N keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from fulgurite.arithmetic import ceil_div
from fulgurite.attention.budget import format_bytes
from fulgurite.attention.cost_model import CostEstimate, Cut, estimate
from fulgurite.attention.kernels import accumulator_dtype
from fulgurite.attention.quorums import quorum
from fulgurite.attention.request import PlanRequest
from fulgurite.attention.schedules import Task, rect_tasks, recursive_tasks
from fulgurite.attention.spec import AttentionSpec, HeadGroup
from fulgurite.attention.visibility import Visibility

__all__ = ["SMALLEST_TILE", "UNHALVED", "ExecutionPlan", "Halvings"]

#: Tokens below which a kernel call costs more than its tile.
SMALLEST_TILE = 16


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
    """How a call is computed.

    Attributes:
        spec: What is computed.
        cut: How it is cut.
        cost: What it is predicted to take.
        request: What was asked of the plan.
        reason: Why this way.
        gradient: How gradients are computed, if they are.
    """

    spec: AttentionSpec
    cut: Cut
    cost: CostEstimate = CostEstimate()
    request: PlanRequest = PlanRequest()
    reason: str = ""
    gradient: ExecutionPlan | None = None

    @property
    def schedule(self) -> str:
        """See :class:`~fulgurite.attention.cost_model.Cut`."""
        return self.cut.schedule

    @property
    def head_step(self) -> tuple[int, int]:
        """Batch entries and key/value heads at once."""
        return self.cut.head_step

    @property
    def tile(self) -> tuple[int, int]:
        """Queries and keys of a tile, for ``rect``."""
        return self.cut.tile

    @property
    def chunks(self) -> int:
        """Number c of chunks, for ``cqs``."""
        return self.cut.chunks

    @property
    def passes(self) -> int:
        """How often gradients go through all tiles."""
        return self.cut.passes

    @property
    def budget(self) -> int | None:
        """What was allowed [bytes]."""
        return self.request.budget

    @property
    def kernel(self) -> str | None:
        """Which kernel to prefer, where there are several."""
        return self.request.kernel

    @property
    def shard(self) -> tuple[int, int]:
        """Rank and number of ranks among which tasks are dealt out."""
        return self.request.shard

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
            return int(self.chunks**self.cut.depth)
        return ceil_div(self.spec.queries, max(1, self.tile[0]))

    @cached_property
    def masked_side(self) -> int | None:
        """Side of the largest tiles under a mask's edge; None for that of CPUs."""
        return self.request.masked_side(self.spec)

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
        if height > SMALLEST_TILE:
            options.append(halvings._replace(queries=halvings.queries + 1))
        if width > SMALLEST_TILE:
            options.append(halvings._replace(keys=halvings.keys + 1))
        return min(options, key=self.peak_of, default=None)

    def peak_of(self, halvings: Halvings) -> int:
        """Most bytes that tiles halved so often hold at once."""
        is_cut = halvings.queries or halvings.keys or self.schedule in ("rect", "cqs")
        cut = self.cut._replace(
            schedule="rect" if is_cut else "heads",
            head_step=self.head_steps(halvings),
            tile=self._sides(halvings),
        )
        return estimate(self.spec, cut, self.request).peak_bytes

    def head_steps(self, halvings: Halvings) -> tuple[int, int]:
        """Batch entries and key/value heads at once when these are halved so often."""
        batch, kv_heads = self.head_step
        for _ in range(halvings.heads):
            if batch > 1:
                batch = ceil_div(batch, 2)
            else:
                kv_heads = ceil_div(kv_heads, 2)
        return batch, kv_heads

    def parts(self, group: HeadGroup, halvings: Halvings) -> list[HeadGroup]:
        """Parts of a group of heads that are computed one after the other."""
        heads = self.spec.heads // self.spec.kv_heads
        return group.parts(*self.head_steps(halvings), heads)

    def _sides(self, halvings: Halvings) -> tuple[int, int]:
        """Queries and keys of tiles halved so often."""
        height, width = self.tile
        if self.schedule == "cqs":
            height = ceil_div(self.spec.keys, max(1, self.chunks))
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
        return replace(self, spec=spec, cut=self.cut._replace(head_step=(batch, kv_heads)))

    def tasks(self, visible: Visibility) -> Iterable[Task]:
        """The tasks of a group of heads, in order."""
        if self.schedule == "cqs":
            return recursive_tasks(visible, self.chunks, self.cut.depth)
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
