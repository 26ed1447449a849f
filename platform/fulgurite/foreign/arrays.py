"""Arrays of NumPy that others wrote: ``.npy`` and ``.npz``."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from fulgurite.foreign.archives import check_archive, open_archive

__all__ = ["map_array", "read_array", "read_array_shape", "read_arrays"]

_CHUNK = 1 << 20
_HEADERS: dict[tuple[int, int], Callable[[Any], tuple[tuple[int, ...], bool, Any]]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def _array_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version not in _HEADERS:
        raise ValueError(f"version {version} of the format is not read")
    shape, fortran, kind = _HEADERS[version](stream)
    if kind.kind not in "biufcSU" or not kind.itemsize or kind.itemsize > _CHUNK:
        way = ": write text as `np.array(names, dtype='U')`" if kind.kind == "O" else ""
        raise ValueError(f"it holds {kind}, neither numbers nor text{way}")
    if any(length < 0 for length in shape) or len(shape) > 32:
        raise ValueError(f"its shape is {shape}")
    return shape, fortran, kind


def _read_array(stream: IO[bytes], size: int, limit: int) -> npt.NDArray[Any]:
    """An array in NumPy's format of ``size`` bytes, header included."""
    shape, fortran, kind = _array_header(stream)
    # an empty array has no bytes, whatever its other dimensions are
    if math.prod(length for length in shape if length) > max(limit, 1):
        raise ValueError(f"its shape {shape} is out of proportion to the file")
    expected = math.prod(shape) * kind.itemsize
    if expected > size:
        raise ValueError(f"an array of shape {shape} and type {kind} is cut off")
    content = bytearray(stream.read(expected))
    if len(content) < expected:
        raise ValueError(f"an array of shape {shape} and type {kind} is cut off")
    if stream.read(1):
        raise ValueError(f"bytes follow an array of shape {shape} and type {kind}")
    if kind.kind == "U":
        codes = np.frombuffer(content, np.dtype(np.uint32).newbyteorder(kind.byteorder))
        if (codes > 0x10FFFF).any():
            raise ValueError("it holds text that is none")
    array: npt.NDArray[Any] = np.frombuffer(content, kind)
    if kind.kind == "b":
        array = array.view(np.uint8) != 0  # other bytes are neither true nor false
    array = array.astype(kind.newbyteorder("="), copy=False)  # torch takes no other
    return array.reshape(shape, order="F" if fortran else "C")


def read_arrays(
    path: str | Path, names: Iterable[str] | None = None
) -> dict[str, npt.NDArray[Any]]:
    """Read arrays of numbers and text of an npz file; nothing in it is unpickled.

    Args:
        path: The file.
        names: Names of the arrays to read, where they are there; all by default.

    Raises:
        ValueError: The file is no zip of arrays, holds objects, or they are out of proportion.
        Exception: What ``zipfile``, ``zlib`` and NumPy raise.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(Path(folder) / "a.npz", a=np.arange(3))
        ...     read_arrays(Path(folder) / "a.npz")
        {'a': array([0, 1, 2])}
    """
    with open_archive(path) as (archive, size):
        members = [m for m in archive.infolist() if m.filename.endswith(".npy")]
        if not members and archive.infolist():
            raise ValueError("it holds no array")
        if names is not None:
            filenames = {f"{name}.npy" for name in names}
            members = [member for member in members if member.filename in filenames]
        total = check_archive(
            archive, size, None if names is None else [m.filename for m in members]
        )
        arrays = {}
        for member in members:
            with archive.open(member) as stream:
                arrays[member.filename[:-4]] = _read_array(stream, member.file_size, total)
        return arrays


def read_array_shape(path: str | Path, name: str) -> tuple[int, ...] | None:
    """Read only the shape of an array of an npz file; None if it is not there.

    Raises:
        Exception: What ``zipfile``, ``zlib`` and NumPy raise.
    """
    with open_archive(path) as (archive, size):
        if f"{name}.npy" not in archive.namelist():
            return None
        check_archive(archive, size, [f"{name}.npy"])
        with archive.open(f"{name}.npy") as stream:
            return _array_header(stream)[0]


def read_array(stream: IO[bytes], size: int) -> npt.NDArray[Any]:
    """Read an npy file of ``size`` bytes; nothing in it is unpickled.

    Raises:
        ValueError: The file is none, holds objects, or is cut off.
        Exception: What NumPy raises.

    Example:
        >>> import io
        >>> stream = io.BytesIO()
        >>> np.save(stream, np.arange(3))
        >>> read_array(io.BytesIO(stream.getvalue()), len(stream.getvalue())).tolist()
        [0, 1, 2]
    """
    return _read_array(stream, size, size)


def map_array(path: str | Path) -> npt.NDArray[Any]:
    """Map an array of an npy file, read-only; nothing in it is unpickled.

    Raises:
        ValueError: The file is none, holds objects, or is cut off.
        Exception: What NumPy raises.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(Path(folder) / "a.npy", np.arange(3))
        ...     map_array(Path(folder) / "a.npy").tolist()
        [0, 1, 2]
    """
    with open(path, "rb") as file:
        shape, fortran, kind = _array_header(file)
        begin, size = file.tell(), os.fstat(file.fileno()).st_size
    if math.prod(length for length in shape if length) > size:
        raise ValueError(f"its shape {shape} is out of proportion to the file")
    if begin + math.prod(shape) * kind.itemsize != size:
        raise ValueError(f"{size - begin:,} bytes are no array of shape {shape} and type {kind}")
    order: Any = "F" if fortran else "C"
    if not math.prod(shape):  # no file can be mapped empty
        return np.zeros(shape, kind, order)
    return np.memmap(path, kind, "r", begin, shape, order)
