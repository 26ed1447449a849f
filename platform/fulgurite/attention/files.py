"""Attention of tensors that lie in files larger than memory, which a kill does not undo.

Axes: B batch, H query heads, G key/value heads, M queries, N keys, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Unpack

import torch
import torch.distributed as dist
from torch import Tensor

from fulgurite.attention.budget import Budget, parse_budget
from fulgurite.attention.checks import check_beside, host_tensors, kernel_device
from fulgurite.attention.execution_plan import ExecutionPlan
from fulgurite.attention.fingerprint import plan_facts
from fulgurite.attention.functional import ranks_share, refuse_not_finite, spec_of
from fulgurite.attention.inputs import AttentionInputs, GradientInputs
from fulgurite.attention.journal import Journal, read_header
from fulgurite.attention.kernels import accumulator_dtype
from fulgurite.attention.mapped import check_targets
from fulgurite.attention.masks import Masking, MaskOptions
from fulgurite.attention.merging import merge_
from fulgurite.attention.planning import make_plan
from fulgurite.attention.progress import bar
from fulgurite.attention.request import PlanRequest, Schedule, check_schedule
from fulgurite.attention.steps import Slices, column_count, row_count
from fulgurite.attention.units import Unit, clear_, commit_, gradient_units, units
from fulgurite.errors import ConfigError, DataError

__all__ = ["attend_files", "attend_files_backward"]


@torch.no_grad()
def attend_files(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    memory_budget: Budget = "auto",
    schedule: Schedule = "auto",
    softcap: float | None = None,
    device: torch.device | str | None = None,
    kernel: str | None = None,
    journal: str | Path | None = None,
    distributed: bool = False,
    check_finite: bool = False,
    progress: bool = True,
    **masks: Unpack[MaskOptions],
) -> ExecutionPlan:
    """Attention of host tensors, memory-mapped or not, into others, within a budget.

    Only what a task needs is loaded. With a journal a run that was killed at any moment goes on
    where it was, to the same bits as one that was not. When it goes on, all inputs and all rows
    that are done are read and compared with checksums, and it is refused if one bit differs. No
    graph for gradients is made.

    Args:
        query: Shape: (B, H, M, D), or with fewer or more axes before the tokens, as the rest.
        key: Shape: (B, G, N, D).
        value: Shape: (B, G, N, D).
        out: Result, overwritten; float32 (float64) for ``schedule="cqs"``. Shape: (B, H, M, D).
        lse: Log-sum-exp, float32 (float64 for float64), overwritten. Shape: (B, H, M).
        scale: Scale of the scores, as for :func:`~fulgurite.attention.stream_attention`.
        enable_gqa: Allow fewer key/value heads.
        memory_budget: Most that is held at once. A journal keeps what ``"auto"`` found at first.
        schedule: The way to cut.
        softcap: Cap of the scores.
        device: Where kernels run; the CPU by default.
        kernel: On a GPU, which kernel to try first.
        journal: Folder of the journal; made if it is not there. The results must lie in files then
            (see :func:`~fulgurite.attention.memory_mapped`), and one process at a time uses it.
        distributed: Deal the rows out to the ranks of torch.distributed, which map the same files
            and keep a journal each. All wait for the last.
        check_finite: Refuse NaN and infinities, by name, before they spread.
        progress: Show a bar with rows, tokens per second and the time left.
        masks: ``is_causal`` and the other masks that are intervals; see
            :class:`~fulgurite.attention.masks.Masking`.

    Returns:
        The plan that was run.

    Raises:
        ConfigError: An option is not supported, the budget is too small, or a result shares memory
            with another tensor, may not be written, or would not outlive the process.
        DataError: Shapes or types do not fit, numbers are not finite, or the disk is full.
        CheckpointError: The journal is of another run, of other tensors or results, in use,
            damaged, or cannot be written.

    Source: card sections 1.8, 3 and 6.8; the journal: inferred.
    """
    check_schedule(schedule)
    compute_device, shard = kernel_device(device), ranks_share(distributed)
    inputs = host_tensors({"query": query, "key": key, "value": value})
    targets = host_tensors({"out": out, "lse": lse})
    query, key, value, out, lse = *inputs.values(), *targets.values()
    spec = spec_of(
        query, key, value, Masking(**masks), enable_gqa=enable_gqa, scale=scale, softcap=softcap
    )
    if shard != (0, 1) and schedule == "cqs":
        raise ConfigError(
            "Ranks would merge their results of schedule='cqs' into the same rows of the files.",
            'Give schedule="rect", whose rows are apart.',
        )
    wide = accumulator_dtype(query.dtype)
    size = (*query.shape[:-1], spec.value_dim)
    check_beside("out", out, size, wide if schedule == "cqs" else None)
    check_beside("lse", lse, query.shape[:-1], wide)
    ranges = check_targets(targets, inputs, in_files=journal is not None)
    if schedule == "auto" and (out.dtype != wide or shard != (0, 1)):
        schedule = "rect"  # cqs would sum in the result
    folder = _folder(journal, shard)
    request = PlanRequest.from_host(spec.dtype, on_gpu=compute_device.type != "cpu", kernel=kernel)
    budget_bytes = _budget(memory_budget, compute_device, folder)
    plan = make_plan(spec, replace(request, budget=budget_bytes, schedule=schedule, shard=shard))
    if spec.is_empty:
        clear_(out, lse)
        return plan
    facts, budget = plan_facts(plan), {"asked": memory_budget, "bytes": plan.budget}
    with Journal.opened(folder, facts, inputs, targets, ranges, budget, progress=progress) as log:
        if plan.merges:  # rows that no unit has written begin as attention over no keys
            for group in plan.groups():
                for at in log.gaps(group.batch, group.heads, spec.queries):
                    clear_(out[at], lse[at])
        label = f"attention ({plan.schedule})"
        with bar(label, row_count(plan), done=len(log.done), show=progress) as advance:
            tensors = AttentionInputs(query, key, value)
            for unit in units(tensors, plan, device=compute_device, done=log.done):
                if check_finite and not bool(unit.out.isfinite().all()):
                    _refuse(inputs, unit.at)
                _commit(log, unit, plan)
                advance(unit.out.shape[2])
                del unit  # or it would take memory beside the next
    if shard != (0, 1):
        dist.barrier()
    return plan


@torch.no_grad()
def attend_files_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    dquery: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    memory_budget: Budget = "auto",
    softcap: float | None = None,
    device: torch.device | str | None = None,
    kernel: str | None = None,
    journal: str | Path | None = None,
    distributed: bool = False,
    check_finite: bool = False,
    progress: bool = True,
    **masks: Unpack[MaskOptions],
) -> ExecutionPlan:
    """Gradients of :func:`attend_files`, from and into host tensors, memory-mapped or not.

    They are computed in two passes, along the queries and along the keys, so that each part of a
    result is written once and nothing longer than a tile is held.

    Args:
        grad: Gradient of the result. Shape: (B, H, M, D).
        query: Shape: (B, H, M, D).
        key: Shape: (B, G, N, D).
        value: Shape: (B, G, N, D).
        out: What :func:`attend_files` gave. Shape: (B, H, M, D).
        lse: What it gave. Shape: (B, H, M).
        dquery: Gradient, overwritten. Shape: (B, H, M, D).
        dkey: Gradient, overwritten. Shape: (B, G, N, D).
        dvalue: Gradient, overwritten. Shape: (B, G, N, D).
        scale: Scale of the scores.
        enable_gqa: Allow fewer key/value heads.
        memory_budget: Most that is held at once.
        softcap: Cap of the scores.
        device: Where kernels run.
        kernel: On a GPU, which kernel to try first.
        journal: Folder of the journal; another one than that of the forward pass.
        distributed: Deal rows and columns out to the ranks.
        check_finite: Refuse NaN and infinities.
        progress: Show a bar.
        masks: As in the forward pass.

    Returns:
        The plan that was run.

    Raises:
        ConfigError: An option is not supported, the budget is too small, or a result shares memory
            with another tensor, may not be written, or would not outlive the process.
        DataError: Shapes or types do not fit, numbers are not finite, or the disk is full.
        CheckpointError: The journal is of another run, of other tensors or results, in use,
            damaged, or cannot be written.

    Source: card section 1.7; the two passes: inferred.
    """
    compute_device, shard = kernel_device(device), ranks_share(distributed)
    inputs = host_tensors(
        {"grad": grad, "query": query, "key": key, "value": value, "out": out, "lse": lse}
    )
    targets = host_tensors({"dquery": dquery, "dkey": dkey, "dvalue": dvalue})
    grad, query, key, value, out, lse = inputs.values()
    spec = spec_of(
        query, key, value, Masking(**masks), enable_gqa=enable_gqa, scale=scale, softcap=softcap
    )
    for name in ("grad", "out"):
        check_beside(name, inputs[name], (*query.shape[:-1], spec.value_dim))
    check_beside("lse", lse, query.shape[:-1], accumulator_dtype(query.dtype))
    for (name, target), like in zip(targets.items(), (query, key, value), strict=True):
        check_beside(name, target, like.shape)
    ranges = check_targets(targets, inputs, in_files=journal is not None)
    folder = _folder(journal, shard)
    request = PlanRequest.from_host(spec.dtype, on_gpu=compute_device.type != "cpu", kernel=kernel)
    request = replace(request, schedule="rect", forward=False, passes=2, shard=shard)
    budget_bytes = _budget(memory_budget, compute_device, folder)
    plan = make_plan(spec, replace(request, budget=budget_bytes))
    if spec.is_empty:
        for target in targets.values():
            target.zero_()
        return plan
    facts, budget = plan_facts(plan), {"asked": memory_budget, "bytes": plan.budget}
    names = list(targets)
    with Journal.opened(folder, facts, inputs, targets, ranges, budget, progress=progress) as log:
        total = row_count(plan) + column_count(plan)
        with bar("gradients", total, done=len(log.done), show=progress) as advance:
            saved = GradientInputs(AttentionInputs(query, key, value), grad, out, lse)
            for unit in gradient_units(saved, plan, device=compute_device, done=log.done):
                if check_finite and not all(bool(x.isfinite().all()) for x in unit.grads):
                    _refuse(inputs, unit.at)
                rows = {names[i]: part for i, part in unit.by_result.items()}
                log.overwrite(unit.number, unit.at, rows)
                advance(unit.grads[0].shape[2])
                del unit, rows
    if shard != (0, 1):
        dist.barrier()
    return plan


def _folder(journal: str | Path | None, shard: tuple[int, int]) -> Path | None:
    """Where this rank keeps its journal."""
    if journal is None or shard == (0, 1):
        return None if journal is None else Path(journal)
    return Path(journal) / f"rank-{shard[0]}-of-{shard[1]}"


def _budget(budget: Budget, device: torch.device, folder: Path | None) -> int | None:
    """The budget in bytes; what depends on the machine's state is that of the journal's run."""
    header = None if folder is None or isinstance(budget, int) else read_header(folder)
    if header is not None and header["budget"].get("asked") == budget:
        size = header["budget"]["bytes"]
        return None if size is None else int(size)
    return parse_budget(budget, device)


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
