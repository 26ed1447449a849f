"""Attention of tensors that lie in files larger than memory, which a kill does not undo.

Axes: B batch, H query heads, G key/value heads, M queries, N keys, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import torch
import torch.distributed as dist
from torch import Tensor

from fulgurite.attention.budget import parse_budget
from fulgurite.attention.call_options import Scoring, StreamOptions
from fulgurite.attention.calls import spec_of
from fulgurite.attention.checks import (
    GRADIENTS,
    INPUTS,
    RESULTS,
    SAVED,
    check_beside,
    host_tensors,
    kernel_device,
    name_tensors,
)
from fulgurite.attention.engine import ranks_share
from fulgurite.attention.execution_plan import ExecutionPlan
from fulgurite.attention.fingerprint import plan_facts
from fulgurite.attention.inputs import AttentionInputs, GradientInputs
from fulgurite.attention.journal import Journal, JournaledRun, read_header
from fulgurite.attention.kernels import accumulator_dtype
from fulgurite.attention.keywords import (
    FileKeywords,
    GradientFileKeywords,
    check_keywords,
    make_record,
)
from fulgurite.attention.mapped import check_targets
from fulgurite.attention.masks import Masking
from fulgurite.attention.merging import merge_
from fulgurite.attention.planning import make_plan
from fulgurite.attention.progress import bar
from fulgurite.attention.request import PlanRequest
from fulgurite.attention.spec import AttentionSpec
from fulgurite.attention.steps import Slices, column_count, row_count
from fulgurite.attention.tensor_checks import refuse_not_finite
from fulgurite.attention.units import Unit, clear_, commit_, gradient_units, units
from fulgurite.errors import ConfigError, DataError

__all__ = ["attend_files", "attend_files_backward"]


@torch.no_grad()
def attend_files(
    inputs: Sequence[Tensor],
    results: Sequence[Tensor],
    *,
    journal: str | Path | None = None,
    progress: bool = True,
    **options: Unpack[FileKeywords],
) -> ExecutionPlan:
    """Attention of host tensors, memory-mapped or not, into others, within a budget.

    Only what a task needs is loaded. With a journal a run that was killed at any moment goes on
    where it was, to the same bits as one that was not. When it goes on, all inputs and all rows
    that are done are read and compared with checksums, and it is refused if one bit differs. No
    graph for gradients is made.

    Args:
        inputs: Query (B, H, M, D), key and value (B, G, N, D), or all with fewer or more axes
            before the tokens, as the results.
        results: The result (B, H, M, D) and its log-sum-exp (B, H, M), overwritten. The first is
            float32 (float64 for float64) with ``schedule="cqs"``, the second always.
        journal: Folder of the journal; made if it is not there. The results must lie in files then
            (see :func:`~fulgurite.attention.memory_mapped`), and one process at a time uses it.
        progress: Show a bar with rows, tokens per second and the time left.
        options: Any of the keywords below, and ``is_causal`` and the other masks that are
            intervals; see :class:`~fulgurite.attention.masks.Masking`.

    Keyword Args:
        scale: Scale of the scores, as for :func:`~fulgurite.attention.stream_attention`.
        enable_gqa: Allow fewer key/value heads.
        softcap: Cap of the scores.
        memory_budget: Most that is held at once, ``"auto"`` by default. A journal keeps what that
            came to at first.
        schedule: The way to cut.
        check_finite: Refuse NaN and infinities, by name, before they spread.
        device: Where kernels run; the CPU by default.
        kernel: On a GPU, which kernel to try first.
        distributed: Deal the rows out to the ranks of torch.distributed, which map the same files
            and keep a journal each. All wait for the last.

    Returns:
        The plan that was run.

    Raises:
        ConfigError: An option is not supported, the budget is too small, or a result shares memory
            with another tensor, may not be written, or would not outlive the process.
        DataError: Shapes or types do not fit, numbers are not finite, or the disk is full.
        CheckpointError: The journal is of another run, of other tensors or results, in use,
            damaged, or cannot be written.

    Source: docs/papers/stream_cqsa.md sections 1.8, 3 and 6.8; the journal: inferred.
    """
    check_keywords("attend_files", options, FileKeywords)
    run = _FileRun.of(options, journal, progress=progress)
    tensors = host_tensors(name_tensors(INPUTS, inputs))
    targets = host_tensors(name_tensors(RESULTS, results))
    spec, schedule = run.spec(tensors), run.stream.schedule
    if run.is_shared and schedule == "cqs":
        raise ConfigError(
            "Ranks would merge their results of schedule='cqs' into the same rows of the files.",
            'Give schedule="rect", whose rows are apart.',
        )
    wide, rows = accumulator_dtype(spec.dtype), tensors["query"].shape[:-1]
    size = *rows, spec.value_dim
    check_beside("out", targets["out"], size, wide if schedule == "cqs" else None)
    check_beside("lse", targets["lse"], rows, wide)
    if schedule == "auto" and (targets["out"].dtype != wide or run.is_shared):
        schedule = "rect"  # cqs would sum in the result
    ranges = check_targets(targets, tensors, in_files=journal is not None)
    plan = run.plan(spec, PlanRequest(schedule=schedule))
    if spec.is_empty:
        clear_(**targets)
        return plan
    with run.journal(plan, JournaledRun(tensors, targets, ranges)) as log:
        if plan.merges:  # rows that no unit has written begin as attention over no keys
            for group in plan.groups():
                for at in log.gaps(group.batch, group.heads, spec.queries):
                    clear_(targets["out"][at], targets["lse"][at])
        attention_inputs: dict[str, Any] = dict(tensors)
        label = f"attention ({plan.schedule})"
        with bar(label, row_count(plan), done=len(log.done), show=progress) as advance:
            for unit in units(
                AttentionInputs(**attention_inputs), plan, device=run.device, done=log.done
            ):
                if run.stream.check_finite and not _are_finite((unit.out,)):
                    _refuse(tensors, unit.at)
                _commit(log, unit, plan)
                advance(unit.out.shape[2])
                del unit  # or it would take memory beside the next
    run.wait_for_ranks()
    return plan


@torch.no_grad()
def attend_files_backward(
    grad: Tensor,
    inputs: Sequence[Tensor],
    results: Sequence[Tensor],
    gradients: Sequence[Tensor],
    *,
    journal: str | Path | None = None,
    progress: bool = True,
    **options: Unpack[GradientFileKeywords],
) -> ExecutionPlan:
    """Gradients of :func:`attend_files`, from and into host tensors, memory-mapped or not.

    They are computed in two passes, along the queries and along the keys, so that each part of a
    result is written once and nothing longer than a tile is held.

    Args:
        grad: Gradient of the result. Shape: (B, H, M, D).
        inputs: Query (B, H, M, D), key and value (B, G, N, D) of the forward pass.
        results: What :func:`attend_files` gave: out (B, H, M, D) and lse (B, H, M).
        gradients: Gradients of query, key and value, overwritten. Shapes: as these.
        journal: Folder of the journal; another one than that of the forward pass.
        progress: Show a bar.
        options: The keywords of :func:`attend_files`, with the masks of the forward pass; there is
            no ``schedule``, and ``distributed`` deals out rows and columns.

    Returns:
        The plan that was run.

    Raises:
        ConfigError: An option is not supported, the budget is too small, or a result shares memory
            with another tensor, may not be written, or would not outlive the process.
        DataError: Shapes or types do not fit, numbers are not finite, or the disk is full.
        CheckpointError: The journal is of another run, of other tensors or results, in use,
            damaged, or cannot be written.

    Source: docs/papers/stream_cqsa.md section 1.7; the two passes: inferred.
    """
    check_keywords("attend_files_backward", options, GradientFileKeywords)
    run = _FileRun.of(options, journal, progress=progress)
    tensors = host_tensors(name_tensors(SAVED, (grad, *inputs, *results)))
    targets = host_tensors(name_tensors(GRADIENTS, gradients))
    spec, rows = run.spec(tensors), tensors["query"].shape[:-1]
    for name in ("grad", "out"):
        check_beside(name, tensors[name], (*rows, spec.value_dim))
    check_beside("lse", tensors["lse"], rows, accumulator_dtype(spec.dtype))
    for name, target in targets.items():
        check_beside(name, target, tensors[name.removeprefix("d")].shape)
    ranges = check_targets(targets, tensors, in_files=journal is not None)
    plan = run.plan(spec, PlanRequest(schedule="rect", forward=False, passes=2))
    if spec.is_empty:
        for target in targets.values():
            target.zero_()
        return plan
    with run.journal(plan, JournaledRun(tensors, targets, ranges)) as log:
        total = row_count(plan) + column_count(plan)
        with bar("gradients", total, done=len(log.done), show=progress) as advance:
            query, key, value = (tensors[name] for name in INPUTS)
            saved = GradientInputs(
                AttentionInputs(query, key, value), tensors["grad"], tensors["out"], tensors["lse"]
            )
            for unit in gradient_units(saved, plan, device=run.device, done=log.done):
                if run.stream.check_finite and not _are_finite(unit.grads):
                    _refuse(tensors, unit.at)
                parts = {GRADIENTS[i]: part for i, part in unit.by_result.items()}
                log.overwrite(unit.number, unit.at, parts)
                advance(unit.grads[0].shape[2])
                del unit, parts
    run.wait_for_ranks()
    return plan


@dataclass(frozen=True)
class _FileRun:
    """Options of a run over files.

    Attributes:
        masking: What is seen.
        scoring: How scores are made.
        stream: How it is computed.
        folder: Where this rank keeps its journal; None for none.
        progress: Whether bars are shown.
    """

    masking: Masking
    scoring: Scoring
    stream: StreamOptions
    folder: Path | None
    progress: bool

    @classmethod
    def of(
        cls, options: Mapping[str, Any], journal: str | Path | None, *, progress: bool
    ) -> _FileRun:
        """Read the keywords of a call."""
        stream = make_record(StreamOptions, {"memory_budget": "auto", **options})
        folder = None if journal is None else Path(journal)
        rank, ranks = ranks_share(stream.distributed)
        if folder is not None and ranks > 1:
            folder /= f"rank-{rank}-of-{ranks}"
        masking, scoring = make_record(Masking, options), make_record(Scoring, options)
        return cls(masking, scoring, stream, folder, progress)

    @property
    def device(self) -> torch.device:
        """Where kernels run."""
        return kernel_device(self.stream.device)

    @property
    def is_shared(self) -> bool:
        """Whether several ranks compute it."""
        return ranks_share(self.stream.distributed)[1] > 1

    def spec(self, tensors: Mapping[str, Tensor]) -> AttentionSpec:
        """Sizes and masking of query, key and value."""
        query, key, value = (tensors[name] for name in INPUTS)
        return spec_of(query, key, value, masking=self.masking, scoring=self.scoring)

    def plan(self, spec: AttentionSpec, request: PlanRequest) -> ExecutionPlan:
        """Plan what a request asks, for tensors on the host."""
        host = PlanRequest.from_host(
            spec.dtype, on_gpu=self.device.type != "cpu", kernel=self.stream.kernel
        )
        return make_plan(
            spec,
            replace(
                host, schedule=request.schedule, forward=request.forward, passes=request.passes,
                budget=self._budget(), shard=ranks_share(self.stream.distributed),
            ),
        )  # fmt: skip

    def _budget(self) -> int | None:
        """The budget in bytes; what depends on the machine's state is that of the journal's run."""
        budget = self.stream.memory_budget
        header = None
        if self.folder is not None and not isinstance(budget, int):
            header = read_header(self.folder)
        if header is not None and header["budget"].get("asked") == budget:
            size = header["budget"]["bytes"]
            return None if size is None else int(size)
        return parse_budget(budget, self.device)

    def journal(self, plan: ExecutionPlan, run: JournaledRun) -> Any:
        """Open the journal of a plan."""
        budget = {"asked": self.stream.memory_budget, "bytes": plan.budget}
        run = run._replace(plan=plan_facts(plan), budget=budget)
        return Journal.opened(self.folder, run, progress=self.progress)

    def wait_for_ranks(self) -> None:
        """Wait until all ranks are done."""
        if self.is_shared:
            dist.barrier()


def _are_finite(tensors: Sequence[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _refuse(inputs: Mapping[str, Tensor], at: Slices) -> None:
    """Say why a result is not finite.

    Raises:
        DataError: In every case; the message names the tokens.
    """
    for name, tensor in inputs.items():
        refuse_not_finite(name, tensor)
    rows = at[2]
    raise DataError(
        f"The scores of tokens {rows.start} to {rows.stop} overflow their type.",
        "Scale query and key down, or use a type with a larger range.",
    )


def _commit(log: Journal, unit: Unit, plan: ExecutionPlan) -> None:
    """Bring a unit into the result, once."""
    out, lse = log.targets["out"], log.targets["lse"]
    if log.folder is None:
        commit_(unit, out, lse, merge=plan.merges)
    elif plan.merges:
        merged, merged_lse = out[unit.at].clone(), lse[unit.at].clone()
        merge_(merged, merged_lse, unit.out.to(out.device), unit.lse.to(lse.device))
        log.replace(unit.number, unit.at, {"out": merged, "lse": merged_lse})
    else:
        log.overwrite(unit.number, unit.at, {"out": unit.out, "lse": unit.lse})
