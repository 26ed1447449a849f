"""Gradients in one pass over all tiles, which keeps the sums of all keys at hand.

Axes: B batch, H query heads, G key/value heads, M queries, N keys, D size of a query and key,
E size of a value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fulgurite.attention.execution_plan import ExecutionPlan, Halvings
from fulgurite.attention.inputs import GradientInputs
from fulgurite.attention.plan_kernel import PlanKernel
from fulgurite.attention.ranks import sum_shards_
from fulgurite.attention.recovery import with_smaller_tiles
from fulgurite.attention.spec import HeadGroup
from fulgurite.attention.steps import Step, row_steps, source_ranges
from fulgurite.attention.transfers import Prefetcher

__all__ = ["OnePassGradients"]


class _GroupDone(NamedTuple):
    """A group of heads whose gradients are complete, by its number."""

    number: int


@dataclass(frozen=True)
class OnePassGradients:
    """Gradients of query, key and value in one pass.

    Args:
        saved: What they are computed from.
        results: Gradients of query, key and value, overwritten.
        plan: How they are cut.
        device: Where kernels run; where the tensors are by default.
    """

    saved: GradientInputs
    results: Sequence[Tensor]
    plan: ExecutionPlan
    device: torch.device | None = None

    def compute_(self, advance: Callable[[int], None]) -> None:
        """Compute the gradients of all heads, in smaller tiles where memory runs out.

        Args:
            advance: Called with the number of queries after each row of tiles.
        """
        for _ in with_smaller_tiles(partial(self._groups, advance=advance), self.plan):
            pass

    def _groups(
        self, after: int, halvings: Halvings, *, advance: Callable[[int], None]
    ) -> Iterator[_GroupDone]:
        plan, query = self.plan, self.saved.inputs.query
        device = self.device or query.device
        is_direct = plan.schedule in ("whole", "heads") and plan.spec.is_simple
        is_direct = is_direct and not plan.is_shared and device == query.device
        is_direct = is_direct and not halvings.queries and not halvings.keys
        kernel = PlanKernel.on(device, query.dtype, plan, self.saved.inputs.biases)
        for number, group in enumerate(plan.groups()):
            if number <= after:
                continue
            for part in plan.parts(group, halvings):
                if is_direct:
                    self._write_one_call(part, kernel)
                else:
                    # by no name: sums of two groups are never in memory together
                    _GroupSums.begin(self, part, device).compute_(
                        kernel, halvings._replace(heads=0), advance
                    )
            yield _GroupDone(number)

    def _write_one_call(self, group: HeadGroup, kernel: PlanKernel) -> None:
        """Write the gradients of a group of heads that one kernel call gives."""
        rows, keys = self.saved.rows, self.saved.keys
        ((step, views),) = row_steps(rows, keys, self.plan, groups=[group])
        tensors = [parts[0] for parts in views]
        assert step.call is not None
        tile = step.call.tile
        grads = kernel.gradients(step.group, tile, tensors[: len(rows)], tensors[len(rows) :])
        assert grads is not None  # the spec is simple: every query sees a key
        self.results[0][group.batch, group.heads] = grads[0]
        begin, end = tile.keys
        for result, part in zip(self.results[1:], grads[1:], strict=True):
            of_group = result[group.batch, group.kv_heads]
            of_group[:, :, begin:end] = part
            if end < of_group.shape[2]:  # keys behind the last query of a causal mask
                of_group[:, :, end:] = 0


@dataclass(frozen=True)
class _GroupSums:
    """Gradients of a group of heads, which add up over its tiles.

    Attributes:
        gradients: Whose part it is.
        group: The heads.
        device: Where kernels run.
        targets: The rows of the results that belong to the group.
        sums: Sums of the gradients of keys and values; of queries before them, where several tasks
            have keys for the same ones. A row of tiles has the whole gradient of its queries.
        in_place: Whether the sums are the targets.
    """

    gradients: OnePassGradients
    group: HeadGroup
    device: torch.device
    targets: list[Tensor]
    sums: list[Tensor]
    in_place: bool

    @classmethod
    def begin(
        cls, gradients: OnePassGradients, group: HeadGroup, device: torch.device
    ) -> _GroupSums:
        """Begin with zeros."""
        plan, saved = gradients.plan, gradients.saved
        in_place = plan.adds_in_place and device == saved.inputs.query.device
        heads = group.heads, group.kv_heads, group.kv_heads
        results = zip(gradients.results, heads, strict=True)
        targets = [result[group.batch, part] for result, part in results]
        sums = [
            x.zero_() if in_place else torch.zeros_like(x, dtype=saved.lse.dtype, device=device)
            for x in (targets if plan.merges else targets[1:])
        ]
        return cls(gradients, group, device, targets, sums, in_place)

    def compute_(
        self, kernel: PlanKernel, halvings: Halvings, advance: Callable[[int], None]
    ) -> None:
        """Add what all tiles give, and bring the sums into the results.

        Args:
            kernel: Computes the tiles.
            halvings: How often they are halved.
            advance: Called with the number of queries after each row of tiles.
        """
        self._add_tiles_(kernel, halvings, advance)
        for result, total in zip(self.targets[-len(self.sums) :], self.sums, strict=True):
            if self.gradients.plan.is_shared:
                sum_shards_(total, result, self.gradients.plan)
            elif not self.in_place:
                result.copy_(total)

    def _add_tiles_(
        self, kernel: PlanKernel, halvings: Halvings, advance: Callable[[int], None]
    ) -> None:
        plan, saved = self.gradients.plan, self.gradients.saved
        rows, keys = saved.rows, saved.keys
        prefetcher = Prefetcher.between(saved.inputs.query.device, self.device)
        steps = row_steps(rows, keys, plan, groups=[self.group], halvings=halvings)
        for step, tensors in prefetcher.prefetch(steps):
            span = slice(*step.span)
            if step.opens:
                row_tensors, tensors = tensors[: len(rows)], tensors[len(rows) :]
                if plan.merges:
                    row_sum = self.sums[0][:, :, span]
                else:
                    row_sum = torch.zeros_like(row_tensors[1], dtype=saved.lse.dtype)
            if tensors:
                key_tensors = tensors
            if step.call is not None:
                self._add_call_(step, row_sum, kernel, (row_tensors, key_tensors))
            if step.closes:
                if not plan.merges:
                    self.targets[0][:, :, span] = row_sum
                del row_sum
                advance(span.stop - span.start)
            if step.releases:  # or these would be in memory beside those of the next task
                key_tensors = None
                del tensors

    def _add_call_(
        self,
        step: Step,
        row_sum: Tensor,
        kernel: PlanKernel,
        tensors: tuple[Sequence[Tensor], Sequence[Tensor]],
    ) -> None:
        """Add what one call gives to the gradients of its row, and of all keys and values."""
        assert step.call is not None
        local = slice(*(query - step.span[0] for query in step.call.tile.queries))
        columns = slice(*step.call.keys) if step.task.loads else slice(None)
        rows, keys = [x[:, :, local] for x in tensors[0]], [x[:, :, columns] for x in tensors[1]]
        grads = kernel.gradients(step.group, step.call.tile, rows, keys)
        if grads is None:
            return
        row_sum[:, :, local] += grads[0]
        for start, stop, offset in source_ranges(step.task, step.call.keys):
            for total, part in zip(self.sums[-2:], grads[1:], strict=True):
                total[:, :, start:stop] += part[:, :, offset : offset + stop - start]
