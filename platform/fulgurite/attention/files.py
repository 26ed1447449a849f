"""Attention of tensors that lie in files larger than memory, which a kill does not undo.

Axes: B batch, H query heads, G key/value heads, M queries, N keys, D head size.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor

from fulgurite.attention.calls import At, column_count, row_count
from fulgurite.attention.functional import check_call, ranks_share, refuse_not_finite
from fulgurite.attention.kernels import accumulator_dtype
from fulgurite.attention.merging import merge_
from fulgurite.attention.planning import Budget, Plan, Schedule, make_plan, parse_budget
from fulgurite.attention.progress import bar
from fulgurite.attention.units import Unit, clear_, commit_, gradient_units, units
from fulgurite.errors import CheckpointError, ConfigError, DataError
from fulgurite.io import atomic_write

__all__ = ["attend_files", "attend_files_backward", "memory_mapped"]

_SAMPLES = 64  # places of a tensor that its fingerprint reads


def memory_mapped(
    path: str | Path, shape: Sequence[int], dtype: torch.dtype, *, create: bool = False
) -> Tensor:
    """Map a raw file (numbers in C order, without a header) into a tensor; nothing is read yet.

    Args:
        path: The file.
        shape: Of the tensor.
        dtype: Of its numbers.
        create: Make the file, with all its space reserved; it must not exist.

    Raises:
        DataError: The file is missing, of another size, exists already, or the disk is full.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made = memory_mapped(Path(folder) / "a", (2, 3), torch.float32, create=True)
        ...     made[:] = 1
        ...     memory_mapped(Path(folder) / "a", (6,), torch.float32).sum().item()
        6.0
    """
    path, count = Path(path), math.prod(shape)
    size = count * dtype.itemsize
    if create:
        _reserve(path, size)
    try:
        found = path.stat().st_size
    except OSError as error:
        raise DataError(
            f"The file {path} cannot be read ({error.strerror}).", "Give the path of the tensor."
        ) from error
    if found != size:
        raise DataError(
            f"The file {path} has {found} bytes; {tuple(shape)} numbers of {dtype} take {size}.",
            "Write it again if it is cut off, or give the shape and type it was written with.",
        )
    return torch.from_file(str(path), shared=True, size=count, dtype=dtype).view(*shape)


def _reserve(path: Path, size: int) -> None:
    """Make a file with all its space, or none.

    Raises:
        DataError: It exists, or the disk is full.
    """
    try:
        with open(path, "xb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError:
                path.unlink()
                raise
    except FileExistsError as error:
        raise DataError(
            f"The file {path} exists already.", "Remove it, or give another path."
        ) from error
    except OSError as error:
        raise DataError(
            f"The file {path} of {size} bytes cannot be made ({error.strerror}).",
            "Free space on the disk, or give a path on another one.",
        ) from error


def attend_files(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    memory_budget: Budget = "auto",
    schedule: Schedule = "auto",
    window: int | None = None,
    prefix: int = 0,
    documents: Sequence[int] | None = None,
    device: torch.device | str | None = None,
    kernel: str | None = None,
    journal: str | Path | None = None,
    distributed: bool = False,
    check_finite: bool = False,
    progress: bool = True,
) -> Plan:
    """Attention of host tensors, memory-mapped or not, into others, within a budget.

    Only what a task needs is loaded. With a journal a run that was killed at any moment goes on
    where it was, to the same bits as one that was not.

    Args:
        query: Shape: (B, H, M, D).
        key: Shape: (B, G, N, D).
        value: Shape: (B, G, N, D).
        out: Result, overwritten; float32 (float64) for ``schedule="cqs"``. Shape: (B, H, M, D).
        lse: Log-sum-exp, float32 (float64 for float64), overwritten. Shape: (B, H, M).
        is_causal: See :func:`~fulgurite.attention.stream_attention`, as the rest.
        scale: Of the scores.
        enable_gqa: Allow fewer key/value heads.
        memory_budget: Most that is held at once. A journal keeps what ``"auto"`` found at first.
        schedule: The way to cut.
        window: Sliding window.
        prefix: Keys that all queries see.
        documents: First tokens of the documents.
        device: Where kernels run; the CPU by default.
        kernel: On a GPU, which kernel to try first.
        journal: Folder of the journal; made if it is not there.
        distributed: Deal the rows out to the ranks of torch.distributed, which map the same files
            and keep a journal each. All wait for the last.
        check_finite: Refuse NaN and infinities, by name, before they spread.
        progress: Show a bar with rows, tokens per second and the time left.

    Returns:
        The plan that was run.

    Raises:
        ConfigError: An option is not supported, or the budget is too small.
        DataError: Shapes or types do not fit, or numbers are not finite.
        CheckpointError: The journal is of another run.

    Source: card sections 1.8, 3 and 6.8; the journal: inferred.
    """
    shape, visible = check_call(query, key, value, enable_gqa, is_causal, window, prefix, documents)
    where, share = torch.device(device or "cpu"), ranks_share(distributed)
    if share != (0, 1) and schedule == "cqs":
        raise ConfigError(
            "Ranks would merge their results of schedule='cqs' into the same rows of the files.",
            'Give schedule="rect", whose rows are apart.',
        )
    wide = accumulator_dtype(query.dtype)
    if schedule == "auto" and (out.dtype != wide or share != (0, 1)):
        schedule = "rect"  # cqs would sum in the result
    folder = _folder(journal, share)
    plan = make_plan(
        shape, visible, _budget(memory_budget, where, folder), schedule,
        resident=False, tiled=True, ahead=where.type != "cpu", kernel=kernel, share=share,
    )  # fmt: skip
    _check("out", out, query.shape, wide if plan.merges else None)
    _check("lse", lse, query.shape[:-1], wide)
    scale = 1 / math.sqrt(shape.head_dim) if scale is None else scale
    inputs = {"query": query, "key": key, "value": value}
    with _Journal.opened(folder, plan, scale, inputs.values(), (out, lse), memory_budget) as log:
        if plan.merges and not log.done:
            clear_(out, lse)
        label = f"attention ({plan.schedule})"
        with bar(label, row_count(plan), done=len(log.done), show=progress) as advance:
            for unit in units(query, key, value, plan, scale, device=where, done=log.done):
                if check_finite and not bool(unit.out.isfinite().all()):
                    _refuse(inputs, unit.at)
                _commit(log, unit, plan)
                advance(unit.out.shape[2])
                del unit  # or it would take memory beside the next
    if share != (0, 1):
        dist.barrier()
    return plan


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
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    memory_budget: Budget = "auto",
    window: int | None = None,
    prefix: int = 0,
    documents: Sequence[int] | None = None,
    device: torch.device | str | None = None,
    kernel: str | None = None,
    journal: str | Path | None = None,
    distributed: bool = False,
    check_finite: bool = False,
    progress: bool = True,
) -> Plan:
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
        is_causal: See :func:`attend_files`, as the rest; as in the forward pass.
        scale: Of the scores.
        enable_gqa: Allow fewer key/value heads.
        memory_budget: Most that is held at once.
        window: Sliding window.
        prefix: Keys that all queries see.
        documents: First tokens of the documents.
        device: Where kernels run.
        kernel: On a GPU, which kernel to try first.
        journal: Folder of the journal; another one than that of the forward pass.
        distributed: Deal rows and columns out to the ranks.
        check_finite: Refuse NaN and infinities.
        progress: Show a bar.

    Returns:
        The plan that was run.

    Raises:
        ConfigError: An option is not supported, or the budget is too small.
        DataError: Shapes or types do not fit, or numbers are not finite.
        CheckpointError: The journal is of another run.

    Source: card section 1.7; the two passes: inferred.
    """
    shape, visible = check_call(query, key, value, enable_gqa, is_causal, window, prefix, documents)
    where, share = torch.device(device or "cpu"), ranks_share(distributed)
    folder = _folder(journal, share)
    plan = make_plan(
        shape, visible, _budget(memory_budget, where, folder), "rect", backward=True,
        passes=2, resident=False, tiled=True, ahead=where.type != "cpu", kernel=kernel, share=share,
    )  # fmt: skip
    wide = accumulator_dtype(query.dtype)
    for name, tensor, like in (
        ("grad", grad, query), ("out", out, query),
        ("dquery", dquery, query), ("dkey", dkey, key), ("dvalue", dvalue, value),
    ):  # fmt: skip
        _check(name, tensor, like.shape, None)
    _check("lse", lse, query.shape[:-1], wide)
    scale = 1 / math.sqrt(shape.head_dim) if scale is None else scale
    inputs = {"grad": grad, "query": query, "key": key, "value": value, "out": out}
    results = dquery, dkey, dvalue
    with _Journal.opened(
        folder, plan, scale, (*inputs.values(), lse), results, memory_budget
    ) as log:
        total = row_count(plan) + column_count(plan)
        with bar("gradients", total, done=len(log.done), show=progress) as advance:
            for unit in gradient_units(
                grad, query, key, value, out, lse, plan, scale, device=where, done=log.done
            ):
                if check_finite and not all(bool(x.isfinite().all()) for x in unit.grads):
                    _refuse(inputs, unit.at)
                log.overwrite(unit.number, unit.at, unit.by_result)
                advance(unit.grads[0].shape[2])
                del unit
    if share != (0, 1):
        dist.barrier()
    return plan


def _folder(journal: str | Path | None, share: tuple[int, int]) -> Path | None:
    """Where this rank keeps its journal."""
    if journal is None or share == (0, 1):
        return None if journal is None else Path(journal)
    return Path(journal) / f"rank-{share[0]}-of-{share[1]}"


def _budget(budget: Budget, device: torch.device, folder: Path | None) -> int | None:
    """The budget in bytes; what depends on the machine's state is that of the journal's run."""
    if folder is not None and (folder / "run.json").exists() and not isinstance(budget, int):
        kept = _header(folder).get("budget")
        if kept is not None and budget == kept["given"]:
            return int(kept["bytes"])
    return parse_budget(budget, device)


def _check(name: str, tensor: Tensor, size: Sequence[int], dtype: torch.dtype | None) -> None:
    """Check a tensor that is given beside query, key and value.

    Raises:
        DataError: It does not fit.
    """
    wanted = dtype or tensor.dtype
    if tuple(tensor.shape) != tuple(size) or tensor.dtype != wanted or not wanted.is_floating_point:
        kind = str(dtype) if dtype else "a floating type"
        raise DataError(
            f"{name} is {tuple(tensor.shape)} of {tensor.dtype}; it must be {tuple(size)} of "
            f"{kind}.",
            "Make it with fulgurite.attention.memory_mapped(..., create=True).",
        )


def _refuse(inputs: Mapping[str, Tensor], at: At) -> None:
    """Say why a result is not finite.

    Raises:
        DataError: Always.
    """
    for name, tensor in inputs.items():
        refuse_not_finite(name, tensor)
    rows = at[2]
    raise DataError(
        f"The scores of tokens {rows.start} to {rows.stop} overflow their type.",
        "Scale query and key down, or use a type with a larger range.",
    )


def _commit(log: _Journal, unit: Unit, plan: Plan) -> None:
    """Bring a unit into the result, once."""
    out, lse = log.targets
    if log.folder is None:
        commit_(unit, out, lse, merge=plan.merges)
    elif plan.merges:
        whole, whole_lse = out[unit.at].clone(), lse[unit.at].clone()
        merge_(whole, whole_lse, unit.out.to(out.device), unit.lse.to(lse.device))
        log.replace(unit.number, unit.at, (whole, whole_lse))
    else:
        log.overwrite(unit.number, unit.at, {0: unit.out, 1: unit.lse})


class _Journal:
    """Which units are in the result; on disk, if it has a folder.

    A unit that overwrites its rows is simply computed again if a kill came before its number was
    written. One that depends on what its rows were must count once: what they become is written
    to a file of its own first, and put in place again after a kill.
    """

    def __init__(self, targets: tuple[Tensor, ...], folder: Path | None = None) -> None:
        self.targets, self.folder = targets, folder
        self.done: set[int] = set()
        self.file: BinaryIO | None = None

    @classmethod
    @contextmanager
    def opened(
        cls,
        folder: Path | None,
        plan: Plan,
        scale: float,
        inputs: Iterable[Tensor],
        targets: tuple[Tensor, ...],
        given: Budget = None,
    ) -> Iterator[_Journal]:
        """Open a journal, or begin one.

        Raises:
            CheckpointError: It belongs to other inputs or another plan.
        """
        if folder is None:
            yield cls(targets)
            return
        folder.mkdir(parents=True, exist_ok=True)
        journal = cls(targets, folder)
        mark = _fingerprint(plan, scale, inputs)
        if not (folder / "run.json").exists():
            content = {"fingerprint": mark, "budget": {"given": given, "bytes": plan.budget}}
            with atomic_write(folder / "run.json") as temporary:
                temporary.write_text(json.dumps(content))
        elif _header(folder)["fingerprint"] != mark:
            raise CheckpointError(
                f"The journal {folder} is of other tensors or another plan.",
                "Give the tensors, budget and options of that run, or another folder.",
            )
        journal._recover()
        with open(folder / "done", "ab") as file:
            journal.file = file
            yield journal

    def _recover(self) -> None:
        assert self.folder is not None
        path = self.folder / "done"
        if path.exists():
            content = path.read_bytes()
            whole = len(content) // 8 * 8
            self.done = {number for (number,) in struct.iter_unpack("<q", content[:whole])}
            os.truncate(path, whole)  # a kill may have cut the last number
        for half in self.folder.glob(".unit-*"):
            half.unlink()
        for pending in self.folder.glob("unit-*.pt"):
            kept = torch.load(pending, weights_only=True, mmap=False)
            if kept["number"] not in self.done:
                at = tuple(slice(*bounds) for bounds in kept["at"])
                for target, values in zip(self.targets, kept["values"], strict=True):
                    target[at] = values
                with open(path, "ab") as file:
                    _append(file, kept["number"])
                self.done.add(kept["number"])
            pending.unlink()

    def overwrite(self, number: int, at: At, values: Mapping[int, Tensor]) -> None:
        """Write rows of some targets that do not depend on what was there."""
        for i, rows in values.items():
            self.targets[i][at] = rows
        if self.file is not None:
            _append(self.file, number)

    def replace(self, number: int, at: At, values: Sequence[Tensor]) -> None:
        """Write rows of all targets that were made from what was there, once."""
        assert self.folder is not None
        assert self.file is not None
        pending = self.folder / f"unit-{number}.pt"
        kept = {"number": number, "at": [(s.start, s.stop) for s in at], "values": list(values)}
        with atomic_write(pending) as temporary:
            torch.save(kept, temporary)
        for target, rows in zip(self.targets, values, strict=True):
            target[at] = rows
        _append(self.file, number)
        pending.unlink()


def _header(folder: Path) -> dict[str, Any]:
    """What a journal says about its run.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        found: dict[str, Any] = json.loads((folder / "run.json").read_text())
        found["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"The journal {folder} has a run.json that cannot be read.",
            "Remove the folder, or give another one.",
        ) from error
    return found


def _append(file: BinaryIO, number: int) -> None:
    file.write(struct.pack("<q", number))
    file.flush()
    os.fsync(file.fileno())


def _fingerprint(plan: Plan, scale: float, inputs: Iterable[Tensor]) -> str:
    """Digest of the plan and of samples of the inputs; reading all of them would take too long."""
    facts = (
        plan.shape, plan.visible, plan.schedule, plan.head_step, plan.tile, plan.chunks,
        plan.passes, plan.share, scale,
    )  # fmt: skip
    digest = hashlib.sha256(repr(facts).encode())
    for tensor in inputs:
        flat = tensor.detach().reshape(-1)
        digest.update(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
        for i in range(_SAMPLES):
            at = i * max(0, flat.numel() - 512) // (_SAMPLES - 1)
            digest.update(flat[at : at + 512].view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
