"""Attention of tensors that lie in files larger than memory, which a kill does not undo.

Axes: B batch, H query heads, G key/value heads, M queries, N keys, D head size.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from fulgurite.attention.functional import check_call, refuse_not_finite
from fulgurite.attention.kernels import accumulator_dtype
from fulgurite.attention.merging import merge_
from fulgurite.attention.planning import Budget, Plan, Schedule, make_plan, parse_budget
from fulgurite.attention.stream import Unit, clear_, commit_, units
from fulgurite.errors import CheckpointError, DataError
from fulgurite.io import atomic_write

__all__ = ["attend_files", "memory_mapped"]

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
    journal: str | Path | None = None,
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
        memory_budget: Most that is held at once.
        schedule: The way to cut.
        window: Sliding window.
        prefix: Keys that all queries see.
        documents: First tokens of the documents.
        device: Where kernels run; the CPU by default.
        journal: Folder of the journal; made if it is not there.
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
    where = torch.device(device or "cpu")
    plan = make_plan(
        shape, visible, parse_budget(memory_budget, where), schedule,
        resident=False, tiled=True,
    )  # fmt: skip
    wide = accumulator_dtype(query.dtype)
    wanted = wide if plan.merges else out.dtype
    for name, tensor, size, dtype in (
        ("out", out, query.shape, wanted),
        ("lse", lse, query.shape[:-1], wide),
    ):
        if tensor.shape != size or tensor.dtype != dtype or not dtype.is_floating_point:
            raise DataError(
                f"{name} is {tuple(tensor.shape)} of {tensor.dtype}; it must be {tuple(size)} of "
                f"{dtype}.",
                "Make it with fulgurite.attention.memory_mapped(..., create=True).",
            )
    scale = 1 / math.sqrt(shape.head_dim) if scale is None else scale
    total = sum(len(t.rows) for t in plan.tasks()) * sum(1 for _ in plan.head_slices())
    with _Journal.opened(journal, plan, scale, (query, key, value), out, lse) as log:
        if not log.done:
            clear_(out, lse)
        with _bar(total, len(log.done), plan, progress) as advance:
            for unit in units(query, key, value, plan, scale, device=where, done=log.done):
                if check_finite and not bool(unit.out.isfinite().all()):
                    _refuse(query, key, value, unit)
                log.commit(unit, merge=plan.merges)
                advance(unit)
    return plan


def _refuse(query: Tensor, key: Tensor, value: Tensor, unit: Unit) -> None:
    """Say why a result is not finite.

    Raises:
        DataError: Always.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        refuse_not_finite(name, tensor)
    rows = unit.at[2]
    raise DataError(
        f"The scores of queries {rows.start} to {rows.stop} overflow their type.",
        "Scale query and key down, or use a type with a larger range.",
    )


@contextmanager
def _bar(total: int, done: int, plan: Plan, progress: bool) -> Iterator[Callable[[Unit], None]]:
    """Show a bar, and give what moves it."""
    if not progress:
        yield lambda unit: None
        return
    from tqdm.auto import tqdm

    tokens, begun = 0, time.monotonic()
    with tqdm(total=total, initial=done, unit=" rows", desc=f"attention ({plan.schedule})") as bar:

        def advance(unit: Unit) -> None:
            nonlocal tokens
            tokens += unit.out.shape[2]
            speed = tokens / max(time.monotonic() - begun, 1e-9)
            bar.set_postfix_str(f"{speed:.0f} tokens/s", refresh=False)
            bar.update()

        yield advance


class _Journal:
    """Which units are in the result; on disk, if it has a folder.

    A unit that overwrites its rows is simply computed again if a kill came before its number was
    written. One that is merged must count once: what its rows become is written to a file of its
    own first, and put in place again after a kill.
    """

    def __init__(self, out: Tensor, lse: Tensor, folder: Path | None = None) -> None:
        self.out, self.lse, self.folder = out, lse, folder
        self.done: set[int] = set()
        self.file: BinaryIO | None = None

    @classmethod
    @contextmanager
    def opened(
        cls,
        folder: str | Path | None,
        plan: Plan,
        scale: float,
        inputs: Sequence[Tensor],
        out: Tensor,
        lse: Tensor,
    ) -> Iterator[_Journal]:
        """Open a journal, or begin one.

        Raises:
            CheckpointError: It belongs to other inputs or another plan.
        """
        if folder is None:
            yield cls(out, lse)
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        journal = cls(out, lse, folder)
        mark = _fingerprint(plan, scale, inputs)
        head = folder / "run.json"
        if not head.exists():
            with atomic_write(head) as temporary:
                temporary.write_text(json.dumps({"fingerprint": mark}))
        elif json.loads(head.read_text())["fingerprint"] != mark:
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
                self.out[at], self.lse[at] = kept["out"], kept["lse"]
                with open(path, "ab") as file:
                    _append(file, kept["number"])
                self.done.add(kept["number"])
            pending.unlink()

    def commit(self, unit: Unit, *, merge: bool) -> None:
        """Bring a unit into the result, once."""
        if self.file is None or self.folder is None:
            commit_(unit, self.out, self.lse, merge=merge)
            return
        pending = self.folder / f"unit-{unit.number}.pt"
        if merge:
            out, lse = self.out[unit.at].clone(), self.lse[unit.at].clone()
            merge_(out, lse, unit.out.to(out.device), unit.lse.to(lse.device))
            kept = {
                "number": unit.number,
                "at": [(s.start, s.stop) for s in unit.at],
                "out": out,
                "lse": lse,
            }
            with atomic_write(pending) as temporary:
                torch.save(kept, temporary)
            self.out[unit.at], self.lse[unit.at] = out, lse
        else:
            commit_(unit, self.out, self.lse, merge=False)
        _append(self.file, unit.number)
        if merge:
            pending.unlink()


def _append(file: BinaryIO, number: int) -> None:
    file.write(struct.pack("<q", number))
    file.flush()
    os.fsync(file.fileno())


def _fingerprint(plan: Plan, scale: float, inputs: Sequence[Tensor]) -> str:
    """Digest of the plan and of samples of the inputs; reading all of them would take too long."""
    digest = hashlib.sha256(
        repr((
            plan.shape, plan.visible, plan.schedule, plan.head_step, plan.tile, plan.chunks, scale,
        )).encode()
    )  # fmt: skip
    for tensor in inputs:
        flat = tensor.detach().reshape(-1)
        digest.update(repr((tuple(tensor.shape), str(tensor.dtype))).encode())
        for i in range(_SAMPLES):
            at = i * max(0, flat.numel() - 512) // (_SAMPLES - 1)
            digest.update(flat[at : at + 512].view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
