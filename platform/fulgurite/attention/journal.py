"""A record on disk of what a run has brought into its results, with which a killed run goes on.

Axes: B batch, H heads, N tokens, D head size.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fulgurite.attention.bounds import Range
from fulgurite.attention.fingerprint import digest_inputs, digest_tensor
from fulgurite.attention.locks import exclusive_lock, writing
from fulgurite.attention.mapped import FileRange, flush
from fulgurite.attention.parts import Part, read_part, write_part
from fulgurite.attention.progress import byte_bar
from fulgurite.attention.steps import Slices
from fulgurite.errors import CheckpointError
from fulgurite.io import atomic_write

__all__ = ["ENTRY_SIZE", "Journal", "JournaledRun", "append_entry", "read_header"]

_FORMAT = 2
_FIELDS = struct.Struct("<qB6q16s16s")  # of an entry; see there
_CHECK = struct.Struct("<I")  # its checksum
#: Size of what the journal says about a unit [bytes].
ENTRY_SIZE = _FIELDS.size + _CHECK.size
_LONG = 2 * 2**30  # bytes of results from which checking them shows a bar


class _Entry(NamedTuple):
    """What the journal says about a unit.

    Attributes:
        number: Number of the unit, in the order of the plan.
        mask: Which results it has written, a bit for each.
        at: Where.
        digests: Digests of what it left there, of each written result in order.
    """

    number: int
    mask: int
    at: Slices
    digests: tuple[bytes, ...]

    def pack(self) -> bytes:
        bounds = [bound for part in self.at for bound in (part.start, part.stop)]
        digests = (*self.digests, b"")[:2]
        data = _FIELDS.pack(self.number, self.mask, *bounds, *digests)
        return data + _CHECK.pack(zlib.crc32(data))

    @classmethod
    def unpack(cls, data: bytes) -> _Entry:
        """Read an entry.

        Raises:
            ValueError: The checksum of the entry is wrong.
        """
        body, check = data[: _FIELDS.size], data[_FIELDS.size :]
        if (zlib.crc32(body),) != _CHECK.unpack(check):
            raise ValueError
        number, mask, *bounds, first, second = _FIELDS.unpack(body)
        batch, heads, tokens = (slice(*bounds[i : i + 2]) for i in (0, 2, 4))
        digests = (first, second)[: mask.bit_count()]
        return cls(number, mask, (batch, heads, tokens), digests)


class JournaledRun(NamedTuple):
    """What tells runs apart.

    Attributes:
        inputs: What is read, by name.
        targets: The results, by name. Shape of each: (B, H, N, ...).
        ranges: Where each result lies in a file.
        plan: What the plan does, see :func:`~fulgurite.attention.fingerprint.plan_facts`.
        budget: What was asked for and what it came to, which the header keeps.
    """

    inputs: Mapping[str, Tensor]
    targets: Mapping[str, Tensor]
    ranges: Mapping[str, FileRange | None]
    plan: Mapping[str, Any] = {}
    budget: Mapping[str, Any] = {}


class Journal:
    """Which units are in the results; on disk, if it has a folder.

    A unit that overwrites its rows is simply computed again if a kill came before its entry was
    written. One that depends on what its rows were must count once: what they become is written
    to a file of its own first, and put in place again after a kill. Before an entry is written,
    the rows are brought to the disk, so that a power cut is no worse than a kill.

    An entry has a checksum of the rows as the unit left them. When a run goes on, all rows that
    the journal calls done are read and compared, so results that were removed, made anew, cut off
    or changed are refused by name, wherever their files lie; a copy of the folder goes on too.

    Args:
        targets: The results by name. Shape of each: (B, H, N, ...).
        folder: Folder of the journal; None to keep none.
        paths: Files of the results.
    """

    def __init__(
        self, targets: Mapping[str, Tensor], folder: Path | None = None, paths: Iterable[str] = ()
    ) -> None:
        self.targets, self.folder = dict(targets), folder
        self.done: set[int] = set()
        self._paths = [path for path in dict.fromkeys(paths) if os.path.isfile(path)]
        self._rows: dict[tuple[int, tuple[Range, ...]], _Entry] = {}  # the last entry of each
        self._file: FileIO | None = None
        self._run = ""

    @classmethod
    @contextmanager
    def opened(
        cls,
        folder: Path | None,
        run: JournaledRun,
        *,
        progress: bool = False,
    ) -> Iterator[Journal]:
        """Open a journal, or begin one, for this process alone.

        Args:
            folder: Folder of the journal; None to keep none.
            run: What the journal is of.
            progress: Whether reading long inputs or results shows a bar.

        Raises:
            CheckpointError: It belongs to other inputs, other results or another plan, another
                process uses it, it is damaged, or it cannot be written.
        """
        if folder is None:
            yield cls(run.targets)
            return
        with writing(f"journal {folder}"):
            if folder.exists() and not folder.is_dir():
                raise CheckpointError(
                    f"The journal {folder} is a file.", "Give the path of a folder."
                )
            folder.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(folder / "lock", f"journal {folder}"):
            paths = [x.path for x in run.ranges.values() if x is not None]
            journal = cls(run.targets, folder, paths)
            journal._begin(run, progress)
            with writing(f"journal {folder}"):
                # unbuffered: what a full disk refuses must not come later
                journal._file = FileIO(folder / "done", "ab")
            with journal._file:
                journal._recover(progress)
                yield journal

    def _begin(self, run: JournaledRun, progress: bool) -> None:
        """Write the header, or compare it."""
        assert self.folder is not None
        facts = dict(run.plan)
        header = read_header(self.folder)
        if header is not None and header["plan"] != facts:
            names = [name for name, fact in facts.items() if header["plan"].get(name) != fact]
            raise CheckpointError(
                f"The journal {self.folder} is of another plan ({', '.join(names)}).",
                "Give the sizes, budget and options of that run, or another folder.",
            )
        read = digest_inputs(run.inputs, progress=progress)
        if header is None:
            header = {"format": _FORMAT, "plan": facts, "inputs": read, "budget": dict(run.budget)}
            with writing(f"journal {self.folder}"), atomic_write(self.folder / "run.json") as path:
                path.write_text(json.dumps(header, indent=1))
        elif header["inputs"] != read:
            names = [name for name, fact in read.items() if header["inputs"].get(name) != fact]
            raise CheckpointError(
                f"The journal {self.folder} is of other tensors ({', '.join(names)} differs).",
                "Give the tensors of that run, unchanged, or another folder.",
            )
        self._run = json.dumps([facts, read])

    def overwrite(self, number: int, at: Slices, rows: Mapping[str, Tensor]) -> None:
        """Write rows of some results that do not depend on what was there.

        Args:
            number: Number of the unit.
            at: Where the rows belong.
            rows: By the name of the result.
        """
        for name, values in rows.items():
            self.targets[name][at] = values
        if self._file is not None:
            self._append(number, at, list(rows))

    def replace(self, number: int, at: Slices, rows: Mapping[str, Tensor]) -> None:
        """Write rows of some results that were made from what was there, once.

        Args:
            number: Number of the unit.
            at: Where the rows belong.
            rows: By the name of the result.
        """
        if self.folder is not None:
            pending = self.folder / f"unit-{number}.part"
            facts = {"run": self._run, "number": number}
            with writing(f"journal {self.folder}"), write_part(pending, facts) as part:
                for name, values in rows.items():
                    part.add(name, at, values)
        self.overwrite(number, at, rows)
        if self.folder is not None:
            with writing(f"journal {self.folder}"):
                pending.unlink()

    def gaps(self, batch: slice, heads: slice, tokens: int) -> Iterator[Slices]:
        """Rows of a group of heads that no unit has written yet.

        Args:
            batch: Batch entries of the group.
            heads: Heads of the group.
            tokens: N.
        """
        group = (batch.start, batch.stop), (heads.start, heads.stop)
        reached = 0
        for start, stop in sorted(at[2] for _, at in self._rows if at[:2] == group):
            if start > reached:
                yield batch, heads, slice(reached, start)
            reached = max(reached, stop)
        if reached < tokens:
            yield batch, heads, slice(reached, tokens)

    def _append(self, number: int, at: Slices, names: list[str]) -> None:
        """Bring rows to the disk, then the entry that says so."""
        assert self._file is not None
        digests = tuple(_digest(self.targets[name][at]) for name in names)
        mask = sum(1 << list(self.targets).index(name) for name in names)
        entry = _Entry(number, mask, at, digests)
        with writing(f"journal {self.folder}"):
            flush(self._paths)
            append_entry(self._file, entry.pack())
        self._enter(entry)

    def _enter(self, entry: _Entry) -> None:
        self.done.add(entry.number)
        self._rows[entry.mask, tuple((s.start, s.stop) for s in entry.at)] = entry

    def _recover(self, progress: bool) -> None:
        """Read what is done, check it, and finish what a kill has interrupted."""
        assert self.folder is not None
        with writing(f"journal {self.folder}"):
            for entry in self._entries(self.folder / "done"):
                self._enter(entry)
            for half in self.folder.glob(".*.tmp-*"):
                half.unlink()
        pending = [self._pending(path) for path in sorted(self.folder.glob("unit-*.part"))]
        open_ = [part for part in pending if part.facts["number"] not in self.done]
        halves = [record.at for part in open_ for record in part.records]
        self._check_rows(halves, progress)
        for part in open_:
            rows = {record.name: part.read(record) for record in part.records}
            self.overwrite(part.facts["number"], part.records[0].at, rows)
        with writing(f"journal {self.folder}"):
            for part in pending:
                part.path.unlink()

    def _entries(self, path: Path) -> Iterator[_Entry]:
        content = path.read_bytes() if path.exists() else b""
        usable_size = len(content) // ENTRY_SIZE * ENTRY_SIZE
        for start in range(0, usable_size, ENTRY_SIZE):
            try:
                yield _Entry.unpack(content[start : start + ENTRY_SIZE])
            except ValueError as error:
                raise CheckpointError(
                    f"The journal {self.folder} is damaged: its file `done` has changed at byte "
                    f"{start}.",
                    "Remove the folder and run again from the start, or give another folder.",
                ) from error
        if usable_size < len(content):
            os.truncate(path, usable_size)  # a kill or a full disk has cut the last entry

    def _pending(self, path: Path) -> Part:
        """A unit whose rows were being replaced.

        Raises:
            CheckpointError: The part is damaged, or belongs to another run.
        """
        part = read_part(path)
        if part.facts.get("run") != self._run or not part.records:
            raise CheckpointError(
                f"{path} is of another run than the journal around it.",
                "Remove the folder and run again from the start, or give another folder.",
            )
        return part

    def _check_rows(self, halves: list[Slices], progress: bool) -> None:
        """Compare all rows that are done with what their last units left there.

        Args:
            halves: Rows that a kill may have left half written.
            progress: Whether to show a bar where this takes long.

        Raises:
            CheckpointError: A row differs from its checksum.
        """
        names = list(self.targets)
        size = sum(x.numel() * x.element_size() for x in self.targets.values())
        show = progress and size >= _LONG and bool(self._rows)
        with byte_bar("checking the results", size, show=show) as advance:
            for entry in self._rows.values():
                if entry.at in halves:
                    continue
                written = [name for i, name in enumerate(names) if entry.mask >> i & 1]
                for name, digest in zip(written, entry.digests, strict=True):
                    rows = self.targets[name][entry.at]
                    if _digest(rows) != digest:
                        tokens = entry.at[2]
                        raise CheckpointError(
                            f"{name} is not the result that the journal {self.folder} is about: "
                            f"it has other numbers at tokens {tokens.start} to {tokens.stop}.",
                            "Give the files that were written with this journal, unchanged, or "
                            "remove its folder to run again from the start.",
                        )
                    advance(rows.numel() * rows.element_size())


def read_header(folder: Path) -> dict[str, Any] | None:
    """Return what a journal says about its run; None if there is none yet.

    Raises:
        CheckpointError: The header cannot be read.
    """
    try:
        text = (folder / "run.json").read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError):
        text = ""
    try:
        header: dict[str, Any] = json.loads(text)
        readable = header["format"] == _FORMAT
        header["plan"].items(), header["inputs"].items(), header["budget"].items()
    except (ValueError, KeyError, TypeError, AttributeError):
        readable = False
    if not readable:
        raise CheckpointError(
            f"The journal {folder} has a run.json that cannot be read.",
            "Remove the folder, or give another one.",
        )
    return header


def _digest(rows: Tensor) -> bytes:
    return bytes.fromhex(digest_tensor(rows))[:16]


def append_entry(file: FileIO, data: bytes) -> None:
    """Write an entry at the end of a journal, and have it brought to the disk.

    Args:
        file: The journal's file of units that are done.
        data: The packed entry.

    Raises:
        OSError: The disk is full, or the file cannot be written.
    """
    if file.write(data) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.fsync(file.fileno())
