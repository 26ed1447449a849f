"""What each row of scores has beside its keys: a sink, and a shift where numbers are large.

Axes: B batch, H query heads, M queries, E size of a value.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fulgurite.attention.biases import row_shift
from fulgurite.attention.bounds import Range
from fulgurite.attention.execution_plan import ExecutionPlan
from fulgurite.attention.inputs import AttentionInputs, GradientInputs
from fulgurite.attention.spec import HeadGroup

__all__ = ["RowTerms", "sink_gradient"]

_LARGE_SHIFT = 1e6  # a shifted log-sum-exp beyond it is that of a sink beside hidden keys
_ROWS = 4096  # queries at a time where each is treated on its own


@dataclass(frozen=True)
class RowTerms:
    """Sinks and shifts of the rows of a call.

    A sink is the score of a key without a value. A shift is subtracted from the scores of a row.

    Args:
        inputs: The tensors of the call.
        plan: What is computed.

    Source: inferred; the sinks are those of arXiv 2508.10925.
    """

    inputs: AttentionInputs
    plan: ExecutionPlan

    def row_ranges(self) -> Iterator[tuple[HeadGroup, Range]]:
        """Pieces of the rows of all batch entries and heads, which are treated one by one."""
        queries = self.plan.spec.queries
        for group in self.plan.groups():
            for top in range(0, queries, _ROWS):
                yield group, (top, min(top + _ROWS, queries))

    def sinks(self, group: HeadGroup, queries: Range, like: Tensor) -> Tensor:
        """Sinks of some rows as the user gave them. Shape: (B' or 1, H', M' or 1).

        Args:
            group: Batch entries and heads.
            queries: Rows.
            like: A tensor of the type and on the device of the result.
        """
        sinks = self.inputs.sinks
        assert sinks is not None
        batch = group.batch if sinks.shape[0] > 1 else slice(None)
        rows = slice(*queries) if sinks.shape[2] > 1 else slice(None)
        return sinks[batch, group.heads, rows].to(like)

    def shift(self, group: HeadGroup, queries: Range, like: Tensor) -> Tensor | None:
        """What was subtracted from the scores of some rows; None if nothing was."""
        if not self.plan.spec.needs_shift:
            return None
        return row_shift(self.inputs.biases, group, queries, dtype=like.dtype, device=like.device)

    def sink_scores(self, group: HeadGroup, queries: Range, like: Tensor) -> Tensor:
        """Scores of sinks, shifted as those of their rows are. Shape: (B' or 1, H', M' or 1)."""
        scores = self.sinks(group, queries, like)
        shift = self.shift(group, queries, like)
        return scores if shift is None else scores - shift

    def add_sinks_(
        self, group: HeadGroup, queries: Range, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Let each row see its sink too; in place where types allow it.

        Args:
            group: Batch entries and heads.
            queries: Rows.
            out: Attention over all keys. Shape: (B', H', M', E).
            lse: Its log-sum-exp. Shape: (B', H', M').

        Returns:
            Both, in the type of accumulators.
        """
        scores = self.sink_scores(group, queries, lse)
        weight = torch.sigmoid(lse - scores).nan_to_num_(nan=0.0)  # nan: neither keys nor a sink
        out = out.to(lse.dtype)
        out.mul_(weight[..., None])
        return out, torch.logaddexp(lse, scores, out=lse)

    def add_all_sinks_(self, out: Tensor, lse: Tensor) -> None:
        """Let all rows see their sinks, if there are any, in place."""
        if self.inputs.sinks is None:
            return
        for group, queries in self.row_ranges():
            at = group.batch, group.heads, slice(*queries)
            out[at], lse[at] = self.add_sinks_(group, queries, out[at], lse[at])

    def undo_shift(self, lse: Tensor) -> Tensor:
        """The log-sum-exp with what was subtracted from scores. Shape: (B, H, M)."""
        if not self.plan.spec.needs_shift or self.plan.spec.is_empty:
            return lse.view_as(lse)
        lse = lse.clone()
        for group, queries in self.row_ranges():
            shift = self.shift(group, queries, lse)
            if shift is None:
                continue
            part = lse[group.batch, group.heads, slice(*queries)]
            shifted = part + shift
            if self.inputs.sinks is not None:  # beside large negative scores a sink is all there is
                sinks = self.sinks(group, queries, part)
                shifted = torch.where(part > _LARGE_SHIFT, sinks, shifted)
            part.copy_(shifted)
        return lse


def sink_gradient(saved: GradientInputs, plan: ExecutionPlan) -> Tensor:
    """Gradient of the sinks. Shape: (B or 1, H, M or 1).

    Args:
        saved: What gradients are computed from; with sinks.
        plan: What is computed.

    Source: inferred: a sink has the weight exp(score − lse) and no value.
    """
    sinks, lse = saved.inputs.sinks, saved.lse
    assert sinks is not None
    terms = RowTerms(saved.inputs, plan)
    total = torch.zeros_like(sinks, dtype=lse.dtype)
    for group, queries in terms.row_ranges():
        at = group.batch, group.heads, slice(*queries)
        scores = terms.sink_scores(group, queries, lse)
        inner = (saved.grad[at].to(lse.dtype) * saved.out[at].to(lse.dtype)).sum(-1)
        # nan: neither keys nor a sink
        weight = (scores - lse[at]).exp().nan_to_num_(nan=0.0)
        part = (weight * inner).to(total.device)
        by_batch, by_query = total.shape[0] > 1, total.shape[2] > 1
        part = part if by_query else part.sum(2, keepdim=True)
        part = part if by_batch else part.sum(0, keepdim=True)
        rows = slice(*queries) if by_query else slice(None)
        total[group.batch if by_batch else slice(None), group.heads, rows] -= part
    return total.to(sinks.dtype)
