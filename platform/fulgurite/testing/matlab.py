"""MATLAB files with text of the class ``string``, as MATLAB R2016b and later write them.

Shapes: V values.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

__all__ = ["pack_strings", "string_table", "string_words", "write_strings"]

_HEAD = b"MATLAB 7.3 MAT-file, Platform: GLNXA64, Created by: fulgurite HDF5 schema 1.00 ."


def pack_strings(texts: Sequence[str | None], columns: int = 1) -> npt.NDArray[np.uint64]:
    """The value that holds an array of strings; None is a missing one. Shape: (V,).

    Example:
        >>> pack_strings(["a"]).tolist()
        [1, 2, 1, 1, 1, 97]
    """
    codes = [None if text is None else text.encode("utf-16-le") for text in texts]
    lengths = [0xFFFF_FFFF_FFFF_FFFF if code is None else len(code) // 2 for code in codes]
    content = b"".join(code for code in codes if code is not None)
    content += b"\0" * (-len(content) % 8)
    head = [1, 2, len(texts) // columns, columns, *lengths]
    return np.concatenate([np.array(head, np.uint64), np.frombuffer(content, "<u8")])


def string_table(count: int) -> npt.NDArray[np.uint8]:
    """The table of so many objects, all strings."""
    names = b"any\0string\0"
    names += b"\0" * (-len(names) % 8)
    classes = struct.pack("<8I", *[0] * 4, 0, 2, 0, 0)
    properties = struct.pack("<2I", 0, 0)
    objects = struct.pack("<6I", *[0] * 6)
    for number in range(1, count + 1):
        properties += struct.pack("<4I", 1, 1, 1, number - 1)
        objects += struct.pack("<6I", 1, 0, 0, number, 0, number)
    tail = [struct.pack("<2I", 0, 0) * (count + 1), b"", b"\0" * 8]
    parts = [classes, properties, objects, struct.pack("<2I", 0, 0), *tail[:1]]
    offsets = [40 + len(names)]
    for part in parts:
        offsets.append(offsets[-1] + len(part))
    offsets += [offsets[-1], offsets[-1] + 8]
    head = struct.pack("<10I", 4, 2, *offsets[:8])
    return np.frombuffer(head + names + b"".join(parts) + b"\0" * 8, np.uint8)


def string_words(number: int) -> npt.NDArray[np.uint32]:
    """What a variable holds whose strings are an object of the table. Shape: (6,)."""
    return np.array([0xDD000000, 2, 1, 1, number, 1], np.uint32)


def write_strings(
    path: Path,
    arrays: Mapping[str, npt.NDArray[Any]],
    texts: Mapping[str, Sequence[str | None]],
    version: Literal["5", "7.3"] = "7.3",
) -> None:
    """Write a file of numbers and strings.

    Args:
        path: The file.
        arrays: Rows of numbers by name.
        texts: Strings by name.
        version: Version of the format.
    """
    (_write_hdf5 if version == "7.3" else _write_level5)(path, arrays, texts)


def _write_hdf5(
    path: Path,
    arrays: Mapping[str, npt.NDArray[Any]],
    texts: Mapping[str, Sequence[str | None]],
) -> None:
    import h5py

    with h5py.File(path, "w", userblock_size=512) as file:
        refs = file.create_group("#refs#")

        def add(group: Any, name: str, values: Any, kind: str) -> Any:
            dataset = group.create_dataset(name, data=values)
            dataset.attrs["MATLAB_class"] = np.bytes_(kind)
            return dataset

        cells = [add(refs, "a", string_table(len(texts))[None], "uint8")]
        cells.append(add(refs, "b", np.zeros(2, np.uint64), "canonical empty"))
        cells[1].attrs["MATLAB_empty"] = np.int32(1)
        for number, (name, strings) in enumerate(texts.items(), 1):
            cells.append(add(refs, f"c{number}", pack_strings(strings)[:, None], "uint64"))
            words = add(file, name, string_words(number)[None], "string")
            words.attrs["MATLAB_object_decode"] = np.int32(3)
        for name, values in arrays.items():
            add(file, name, np.atleast_2d(values).T, "double")
        table = np.array([[cell.ref for cell in cells]], h5py.ref_dtype)
        add(file.create_group("#subsystem#"), "MCOS", table, "FileWrapper__")
    with open(path, "r+b") as raw:
        raw.write(_HEAD.ljust(124) + b"\x00\x02IM")


def _element(kind: int, content: bytes) -> bytes:
    return struct.pack("<2I", kind, len(content)) + content + b"\0" * (-len(content) % 8)


def _matrix(number: int, shape: tuple[int, int], name: str, content: bytes) -> bytes:
    flags = _element(6, struct.pack("<2I", number, 0)) + _element(5, struct.pack("<2i", *shape))
    return _element(14, flags + _element(1, name.encode()) + content)


def _row(values: npt.NDArray[Any], name: str = "") -> bytes:
    number, stored = {"f8": (6, 9), "u1": (9, 2), "u4": (13, 6), "u8": (15, 13)}[
        values.dtype.str[1:]
    ]
    return _matrix(number, (1, values.size), name, _element(stored, values.tobytes()))


def _object(name: str, kind: str, content: bytes) -> bytes:
    texts = b"".join(_element(1, text.encode()) for text in (name, "MCOS", kind))
    return _element(14, _element(6, struct.pack("<2I", 17, 0)) + texts + content)


def _write_level5(
    path: Path,
    arrays: Mapping[str, npt.NDArray[Any]],
    texts: Mapping[str, Sequence[str | None]],
) -> None:
    content = b"".join(_row(np.float64(values).ravel(), name) for name, values in arrays.items())
    for number, name in enumerate(texts, 1):
        content += _object(name, "string", _row(string_words(number)))
    cells = [_row(string_table(len(texts))), _row(np.zeros(0))]
    cells += [_row(pack_strings(strings)) for strings in texts.values()]
    wrapper = _object("", "FileWrapper__", _matrix(1, (len(cells), 1), "", b"".join(cells)))
    field = _element(5, struct.pack("<i", 5)) + _element(1, b"MCOS\0")
    table = _matrix(2, (1, 1), "", field + wrapper)
    hidden = np.frombuffer(b"\x00\x01IM\0\0\0\0" + table, np.uint8)
    head = b"MATLAB 5.0 MAT-file".ljust(116) + struct.pack("<Q", 128 + len(content)) + b"\x00\x01IM"
    path.write_bytes(head + content + _row(hidden))
