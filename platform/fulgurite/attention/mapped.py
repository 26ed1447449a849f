"""Tensors in files: how they are mapped, and whether results may be written into them.

Axes: B batch, H heads, N tokens, D head size.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fulgurite.errors import ConfigError, DataError

__all__ = ["FileRange", "check_targets", "file_range", "flush", "memory_mapped"]

_MAPS = Path("/proc/self/maps")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# of the exact test whether two strided tensors share memory; NumPy's stubs know only its ends
_MOST_WORK: Any = 100_000


def memory_mapped(
    path: str | Path,
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    create: bool = False,
    mode: Literal["r", "r+"] | None = None,
) -> Tensor:
    """Map a raw file (numbers in C order, without a header) into a tensor; nothing is read yet.

    A tensor that is mapped to be read only has no memory behind it that a write could change: a
    write into it ends the process (SIGSEGV), as with read-only maps of NumPy, and is never lost
    without a word. Functions that write results refuse it by name before they begin.

    Args:
        path: The file.
        shape: Shape of the tensor.
        dtype: Data type of its numbers.
        create: Make the file, with all its space reserved; it must not exist.
        mode: ``"r+"`` maps the file to be read and written, ``"r"`` to be read only. By default
            it is ``"r+"`` where the file may be written, else ``"r"``.

    Returns:
        The tensor, of the given shape.

    Raises:
        ConfigError: The mode is none of these, or does not fit ``create``.
        DataError: The file is missing, of another size, exists already, or the disk is full.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     tensor = memory_mapped(Path(folder) / "a", (2, 3), torch.float32, create=True)
        ...     tensor[:] = 1
        ...     memory_mapped(Path(folder) / "a", (6,), torch.float32, mode="r").sum().item()
        6.0
    """
    if mode not in (None, "r", "r+") or (create and mode == "r"):
        raise ConfigError(
            f"A file cannot be mapped with mode={mode!r}, create={create}.",
            'Give mode="r" or "r+", and leave out mode="r" for a file that is created.',
        )
    path, count = Path(path), math.prod(shape)
    size = count * dtype.itemsize
    if create:
        _create(path, size)
    try:
        with _open_writable(path, mode) as file:
            writable, actual = file.writable(), os.fstat(file.fileno()).st_size
            if actual == size > 0 and not writable:
                view = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    except OSError as error:
        raise DataError(
            f"The file {path} cannot be {'written' if mode == 'r+' else 'read'} "
            f"({error.strerror}).",
            "Give the path of a tensor, and change its rights if they forbid this.",
        ) from error
    if actual != size:
        raise DataError(
            f"The file {path} has {actual} bytes; {tuple(shape)} numbers of {dtype} take {size}.",
            "Write it again if it is cut off, or give the shape and type it was written with.",
        )
    if size == 0:  # nothing can be mapped
        return torch.empty(*shape, dtype=dtype)
    if writable:
        flat = torch.from_file(str(path), shared=True, size=count, dtype=dtype)
    else:
        with warnings.catch_warnings():  # it is not writable, and is meant to be so
            warnings.simplefilter("ignore", UserWarning)
            flat = torch.frombuffer(view, dtype=dtype)
    return flat.view(*shape)


def _open_writable(path: Path, mode: str | None) -> Any:
    """Open a file to be read and written where that is asked for, or allowed and not excluded."""
    if mode == "r":
        return open(path, "rb")
    try:
        return open(path, "r+b")
    except OSError:
        if mode == "r+":
            raise
        return open(path, "rb")


def _create(path: Path, size: int) -> None:
    """Make a file with all its space, or none.

    Raises:
        DataError: The file exists already, or the disk is full.
    """
    try:
        with open(path, "xb") as file:
            try:
                if size:
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


class FileRange(NamedTuple):
    """The part of a file that a tensor is mapped from.

    Attributes:
        path: Path of the file.
        device: Device of its file system, as ``/proc/self/maps`` spells it.
        inode: Its number there.
        start: First byte of the tensor in the file.
        stop: Byte behind its last.
        is_shared: Whether writes reach the file.
        is_writable: Whether writes are allowed.
        is_deleted: Whether the file has no name any more, so that nobody can open it again.
    """

    path: str
    device: str
    inode: int
    start: int
    stop: int
    is_shared: bool
    is_writable: bool
    is_deleted: bool


class _Segment(NamedTuple):
    """A line of ``/proc/self/maps``."""

    start: int
    stop: int
    rights: str
    offset: int
    device: str
    inode: int
    path: str


def _segments() -> list[_Segment]:
    """Segments of the memory of this process; none where the system does not tell."""
    segments = []
    try:
        text = os.fsdecode(_MAPS.read_bytes())
    except OSError:
        return []
    for line in text.splitlines():
        span, rights, offset, device, inode, *path = line.split(maxsplit=5)
        start, stop = (int(x, 16) for x in span.split("-"))
        name = path[0].replace("\\012", "\n") if path else ""
        segments.append(_Segment(start, stop, rights, int(offset, 16), device, int(inode), name))
    return segments


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First byte of a tensor in memory, and the byte behind its last."""
    start = tensor.data_ptr()
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def file_range(tensor: Tensor) -> FileRange | None:
    """Return the part of a file that a tensor is mapped from; None if it lies in plain memory.

    Raises:
        ConfigError: The tensor lies in several files.
    """
    return _file_range(tensor, _segments())


def _file_range(tensor: Tensor, segments: Sequence[_Segment]) -> FileRange | None:
    if tensor.numel() == 0 or tensor.device.type != "cpu":
        return None
    start, stop = _extent(tensor)
    inside = [s for s in segments if s.start < stop and s.stop > start]
    if not inside or not any(s.inode for s in inside):
        return None
    first = inside[0]
    if any(s.inode != first.inode or s.device != first.device for s in inside):
        raise ConfigError(
            f"A tensor lies in several files ({', '.join(sorted({s.path for s in inside}))}).",
            "Give tensors that lie in one file each.",
        )
    path = first.path.removesuffix(" (deleted)")
    if path.startswith("/dev/") and not path.startswith("/dev/shm/"):
        return None  # memory that a driver maps, such as pinned memory
    at = start - first.start + first.offset
    return FileRange(
        path, first.device, first.inode, at, at + stop - start,
        is_shared=all(s.rights[3] == "s" for s in inside),
        is_writable=all(s.rights[1] == "w" for s in inside),
        is_deleted=path != first.path,
    )  # fmt: skip


def check_targets(
    targets: Mapping[str, Tensor], inputs: Mapping[str, Tensor], *, in_files: bool = False
) -> dict[str, FileRange | None]:
    """Check that results can be written, to places of their own, before anything is computed.

    Space on the disk is reserved for the results, so that a full disk is an error here and does
    not end the process later.

    Args:
        targets: Tensors that results are written into, by name. Any shape.
        inputs: Tensors that are read, by name.
        in_files: Whether the results must lie in files that outlive the process.

    Returns:
        Where each target lies in a file, by name; None for one in plain memory.

    Raises:
        ConfigError: A target shares memory or bytes of a file with another tensor or with itself,
            is read-only, or lies in no file and must.
        DataError: A file is shorter than its tensor, or the disk is full.
    """
    segments = _segments()
    everything = {**inputs, **targets}
    ranges = {name: _file_range(tensor, segments) for name, tensor in everything.items()}
    for name, mapping in ranges.items():
        if mapping is not None:
            _check_length(name, mapping)
    for name, target in targets.items():
        _check_target(name, target, ranges[name], in_files)
    earlier = dict(inputs)  # and the targets before, so that each pair is compared once
    for name, target in targets.items():
        for other, tensor in earlier.items():
            if _overlap((target, ranges[name]), (tensor, ranges[other])):
                raise ConfigError(
                    f"{name} lies in the same memory or file as {other}, which is "
                    f"{'read' if other in inputs else 'written'} too.",
                    "Give each result a file or memory of its own.",
                )
        earlier[name] = target
    for name in targets:
        mapping = ranges[name]
        if mapping is not None and mapping.is_shared:
            _reserve(name, mapping)
    return {name: ranges[name] for name in targets}


def _check_target(name: str, target: Tensor, mapping: FileRange | None, in_file: bool) -> None:
    """Check that a result can be written.

    Raises:
        ConfigError: The result overlaps itself, is read-only, or would be lost with the process.
    """
    if target.numel() == 0:
        return
    reach = 1  # numbers that the dimensions so far can reach, the smallest stride first
    for stride, size in sorted(zip(target.stride(), target.shape, strict=True)):
        if size > 1 and stride < reach:
            raise ConfigError(
                f"{name} is a view in which several places are one number (strides "
                f"{target.stride()}).",
                "Give a tensor with memory for each number, such as its clone.",
            )
        reach += (size - 1) * stride
    if mapping is not None and not mapping.is_writable:
        raise ConfigError(
            f"{name} is mapped from {mapping.path} to be read only.",
            'Map it with mode="r+", after making the file writable.',
        )
    if in_file and (mapping is None or not mapping.is_shared or mapping.is_deleted):
        location = "in memory of this process alone" if mapping is None else (
            f"in {mapping.path}, which is deleted" if mapping.is_deleted
            else f"in a private copy of {mapping.path}"
        )  # fmt: skip
        raise ConfigError(
            f"{name} lies {location}, and a journal would trust what is lost with the process.",
            "Make it with fulgurite.attention.memory_mapped(..., create=True), or leave out the "
            "journal.",
        )


def _overlap(a: tuple[Tensor, FileRange | None], b: tuple[Tensor, FileRange | None]) -> bool:
    """Whether two tensors have a byte in common, in memory or in a file that is mapped twice."""
    if not a[0].numel() or not b[0].numel():
        return False
    if a[0].device.type != "cpu" or b[0].device.type != "cpu":
        return False
    starts = [x.data_ptr() for x, _ in (a, b)]
    if a[1] is not None and b[1] is not None:
        if (a[1].device, a[1].inode) != (b[1].device, b[1].inode):
            return False
        starts = [a[1].start, b[1].start]
    elif a[1] is not None or b[1] is not None:
        return False
    first, second = _at(starts[0], a[0]), _at(starts[1], b[0])
    try:
        return np.shares_memory(first, second, max_work=_MOST_WORK)
    except np.exceptions.TooHardError:
        return np.may_share_memory(first, second)


class _Address:
    """Bytes at an address, which are never read: NumPy only compares where they are."""

    def __init__(self, start: int, tensor: Tensor) -> None:
        size = tensor.element_size()
        self.__array_interface__ = {
            "version": 3, "typestr": f"|V{size}", "data": (start + 2**20, True),
            "shape": tuple(tensor.shape), "strides": tuple(s * size for s in tensor.stride()),
        }  # fmt: skip


def _at(start: int, tensor: Tensor) -> np.ndarray[Any, Any]:
    return np.asarray(_Address(start, tensor))


def _check_length(name: str, mapping: FileRange) -> None:
    """Check that a mapped file has not been cut since.

    Raises:
        DataError: The file is shorter than the mapping.
    """
    if mapping.is_deleted or not os.path.isfile(
        mapping.path
    ):  # a name from outside a container, say
        return
    actual = os.path.getsize(mapping.path)
    if actual < mapping.stop:
        raise DataError(
            f"{name} is mapped up to byte {mapping.stop} of {mapping.path}, which now has "
            f"{actual}.",
            "Write the file again, and map it again.",
        )


def _reserve(name: str, mapping: FileRange) -> None:
    """Reserve the space of a result on the disk; what it holds stays.

    Raises:
        DataError: The disk is full.
    """
    if mapping.is_deleted or not os.path.isfile(mapping.path):
        return
    try:
        with open(mapping.path, "r+b") as file:
            os.posix_fallocate(file.fileno(), mapping.start, mapping.stop - mapping.start)
    except OSError as error:
        if error.errno not in _NO_ROOM:  # a file system that cannot reserve, say
            return
        raise DataError(
            f"There is no room for {name} in {mapping.path} ({error.strerror}).",
            "Free space on the disk, or give a file on another one.",
        ) from error


def flush(paths: Iterator[str] | Sequence[str]) -> None:
    """Bring what was written into mapped files to the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)
