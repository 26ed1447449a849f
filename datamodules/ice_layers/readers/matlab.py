"""MATLAB files, read so that damaged bytes are errors and never a crash.

SciPy's reader is compiled and follows lengths and types that the file says, so that one wrong byte
can end the process. The reader of versions 5 to 7.2 knows what layer files hold (numbers, text,
cells, structures), and checks each length against the bytes that are there.

Source: MathWorks, MAT-File Format (level 5).
"""

from __future__ import annotations

import math
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fulgurite.arithmetic import ceil_div
from fulgurite.foreign import expansion_limit, reading
from fulgurite.hdf5 import need_package, read_matlab73
from fulgurite.matlab_objects import decode_strings

__all__ = ["Unread", "parse_mat5", "read_mat"]

_AGAIN = (
    "Fetch the file again, or leave such files out: "
    "`--data.init_args.source.init_args.exclude+=unreadable`."
)
_HEADER = 128
_MATRIX, _COMPRESSED = 14, 15
# Number of a type of stored values -> what they are
_STORED = {
    1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8",
}  # fmt: skip
_ENCODINGS = {1: "latin-1", 2: "latin-1", 16: "utf-8", 17: "utf-16", 18: "utf-32", 4: "utf-16"}
# Number of a class of arrays -> their type in memory
_CLASSES = {
    6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8",
}  # fmt: skip
_CELL, _STRUCT, _OBJECT, _CHAR, _OPAQUE = 1, 2, 3, 4, 17
_DEEPEST = 32  # structures in structures
_COMPLEX = 0x08


@dataclass(frozen=True)
class Unread:
    """A value of a class that this reader does not know, such as a function handle."""

    number: int


class _Object(NamedTuple):
    """An object: its class, and what is stored of it."""

    kind: str
    content: Any


class _Element(NamedTuple):
    """One tagged piece of the file."""

    kind: int
    content: memoryview


class _MatlabReader:
    """Takes tagged elements one after the other."""

    def __init__(self, content: memoryview, order: str, nested: int = 0) -> None:
        self.content, self.order, self.nested, self.at = content, order, nested, 0

    @property
    def remaining(self) -> int:
        """Bytes that are not yet read."""
        return len(self.content) - self.at

    def _word(self, at: int) -> int:
        return int.from_bytes(self.content[at : at + 4], "little" if self.order == "<" else "big")

    def next(self) -> _Element:
        """The next element.

        Raises:
            ValueError: The element is longer than the rest of the file.
        """
        if self.remaining < 8:
            raise ValueError("an element is cut off")
        kind, size, begin = self._word(self.at), self._word(self.at + 4), self.at + 8
        if kind >> 16:  # a small element: its size and content are in the tag
            kind, size, begin = kind & 0xFFFF, kind >> 16, self.at + 4
            if size > 4:
                raise ValueError("a small element is too long")
            end = self.at + 8
        else:
            end = begin + (size if kind == _COMPRESSED else ceil_div(size, 8) * 8)
            if begin + size > len(self.content):
                raise ValueError("an element is cut off")
        self.at = min(end, len(self.content))
        return _Element(kind, self.content[begin : begin + size])

    def numbers(self) -> npt.NDArray[Any]:
        """The values of the next element.

        Raises:
            ValueError: The element does not hold numbers.
        """
        kind, content = self.next()
        if kind not in _STORED:
            raise ValueError(f"numbers are stored as type {kind}")
        stored = np.dtype(self.order + _STORED[kind])
        if len(content) % stored.itemsize:
            raise ValueError("numbers are cut off")
        return np.frombuffer(content, stored)

    def text(self) -> str:
        """The characters of the next element."""
        kind, content = self.next()
        if kind not in _ENCODINGS:
            raise ValueError(f"text is stored as type {kind}")
        encoding = _ENCODINGS[kind]
        if encoding in ("utf-16", "utf-32"):
            encoding += "-le" if self.order == "<" else "-be"
        return bytes(content).decode(encoding)

    def matrix(self) -> Any:
        """The value of the next element, a matrix.

        Raises:
            ValueError: The element is no matrix.
        """
        kind, content = self.next()
        if kind != _MATRIX:
            raise ValueError(f"an element of type {kind} is no array")
        if not len(content):
            return np.zeros(0)
        return _parse_matrix(_MatlabReader(content, self.order, self.nested + 1))[1]


def parse_mat5(content: bytes, limit: int) -> dict[str, Any]:
    """Parse a MATLAB file of version 5 to 7.2.

    Args:
        content: The file.
        limit: Most bytes that compressed parts may expand to.

    Returns:
        Value by variable: arrays without axes of length one (a single number for one value), text,
        lists of a cell's values in MATLAB's order, dictionaries of a structure's fields (a list of
        them for several), :class:`Unread` for what layer files have no use for.

    Raises:
        ValueError: The file is no MATLAB file, or damaged.
    """
    order = {b"IM": "<", b"MI": ">"}.get(content[_HEADER - 2 : _HEADER])
    if order is None:
        raise ValueError("it has no header of MATLAB version 5")
    reader = _MatlabReader(memoryview(content)[_HEADER:], order)
    variables: dict[str, Any] = {}
    hidden: Any = None  # the last variable without a name holds the table of objects
    while reader.remaining >= 8:
        kind, part = reader.next()
        if kind == _COMPRESSED:
            expanded = _expand(part, limit)
            limit -= len(expanded)
            kind, part = _MatlabReader(memoryview(expanded), order).next()
        if kind != _MATRIX:
            raise ValueError(f"an element of type {kind} is no variable")
        name, value = _parse_matrix(_MatlabReader(part, order))
        if name and name not in ("__function_workspace__",):
            variables[name] = value
        elif not name:
            hidden = value
    objects = _parse_objects(hidden)
    return {name: _without_objects(value, objects) for name, value in variables.items()}


def _parse_objects(hidden: Any) -> list[Any]:
    """The table of objects: a file in a variable of bytes, of which it is the field MCOS."""
    if not isinstance(hidden, np.ndarray) or hidden.dtype != np.uint8:
        return []
    content = hidden.tobytes()
    order = {b"IM": "<", b"MI": ">"}.get(content[2:4])
    if order is None:
        return []
    table: Any = None
    with suppress(ValueError):  # what it is for may not be wanted
        table = _MatlabReader(memoryview(content)[8:], order).matrix()
    table = table.get("MCOS") if isinstance(table, dict) else None
    is_table = isinstance(table, _Object) and isinstance(table.content, list)
    return table.content if is_table else []


def _without_objects(value: Any, objects: list[Any]) -> Any:
    """A value with text in place of strings, and nothing of other objects."""
    if isinstance(value, _Object):
        if value.kind == "string" and isinstance(value.content, np.ndarray):
            with suppress(ValueError):
                return decode_strings(value.content, objects)
        return Unread(_OPAQUE)
    if isinstance(value, dict):
        return {name: _without_objects(part, objects) for name, part in value.items()}
    if isinstance(value, list):
        return [_without_objects(part, objects) for part in value]
    return value


def _expand(content: memoryview, limit: int) -> bytes:
    expander = zlib.decompressobj()
    expanded = expander.decompress(content, max(limit, 1))
    if not expander.eof:
        more = "expands too much" if expander.unconsumed_tail else "is cut off"
        raise ValueError(f"a compressed variable {more}")
    return expanded


def _parse_matrix(reader: _MatlabReader) -> tuple[str, Any]:
    """Name and value of an array's elements.

    Raises:
        ValueError: The elements do not fit together.
    """
    if reader.nested > _DEEPEST:
        raise ValueError("it is nested too deeply")
    flags = reader.numbers()
    if len(flags) < 1 or flags.dtype.kind != "u":
        raise ValueError("an array has no class")
    number, attributes = int(flags[0]) & 0xFF, int(flags[0]) >> 8 & 0xFF
    if number == _OPAQUE:  # of newer classes; it has no dimensions
        with suppress(ValueError):
            name, _, kind = (reader.text() for _ in range(3))
            return name, _Object(kind, reader.matrix())
        return "", Unread(number)
    shape = tuple(int(length) for length in reader.numbers())
    if not 2 <= len(shape) <= 32 or min(shape) < 0:
        raise ValueError(f"an array has the shape {shape}")
    name = reader.text()
    if number in _CLASSES:
        return name, _squeeze(_numeric(reader, number, shape, bool(attributes & _COMPLEX)))
    if number == _CHAR:
        return name, _characters(reader, shape)
    if number == _CELL:
        count = math.prod(shape)
        _refuse_many(count, reader)
        return name, [reader.matrix() for _ in range(count)]
    if number in (_STRUCT, _OBJECT):
        return name, _structure(reader, shape, number == _OBJECT)
    return name, Unread(number)


def _refuse_many(count: int, reader: _MatlabReader) -> None:
    if count * 8 > reader.remaining:  # each has a tag at least
        raise ValueError(f"{count:,} values are in {reader.remaining:,} bytes")


def _numeric(
    reader: _MatlabReader, number: int, shape: tuple[int, ...], is_complex: bool
) -> npt.NDArray[Any]:
    parts = []
    for _ in range(1 + is_complex):
        values = reader.numbers()
        if len(values) != math.prod(shape):
            raise ValueError(f"an array of shape {shape} has {len(values)} values")
        with np.errstate(invalid="ignore"):
            parts.append(values.astype(_CLASSES[number]))
    array = parts[0] + 1j * parts[1] if is_complex else parts[0]
    return array.reshape(shape, order="F")


def _squeeze(array: npt.NDArray[Any]) -> Any:
    if not array.size:
        return np.zeros(0, array.dtype)
    return np.squeeze(array)[()]


def _characters(reader: _MatlabReader, shape: tuple[int, ...]) -> Any:
    text = reader.text() if reader.remaining else ""
    if len(text) != math.prod(shape):
        if shape[0] != 1 or len(shape) != 2:  # of one row, characters may take several codes
            raise ValueError(f"text of shape {shape} has {len(text)} characters")
        return text
    if not text or shape[0] == 1:
        return text
    rows = shape[0]  # text of several rows is stored by columns
    return [text[k::rows] for k in range(rows)]


def _structure(reader: _MatlabReader, shape: tuple[int, ...], is_object: bool) -> Any:
    if is_object:
        reader.text()  # its class
    widths = reader.numbers()
    if len(widths) != 1 or not 1 <= int(widths[0]) <= 64:
        raise ValueError("a structure has no names of fields")
    width, names = int(widths[0]), bytes(reader.next().content)
    if len(names) % width:
        raise ValueError("a structure's names of fields are cut off")
    fields = [
        names[at : at + width].split(b"\0")[0].decode("latin-1")
        for at in range(0, len(names), width)
    ]
    if len(set(fields)) < len(fields):
        raise ValueError("a structure has two fields of one name")
    count = math.prod(shape)
    _refuse_many(count * max(1, len(fields)) if count != 1 else len(fields), reader)
    items = [{field: reader.matrix() for field in fields} for _ in range(count)]
    return items[0] if count == 1 else items


def read_mat(path: Path) -> dict[str, Any]:
    """Read a MATLAB file of any version, as MATLAB would show its arrays.

    Structures become dictionaries, cells lists, text strings. Version 7.3 (HDF5) is told by the
    file's content, not by its name.

    Raises:
        DataError: The file is missing, truncated or no MATLAB file.
        MissingExtraError: The file is of version 7.3 and h5py is not installed.
    """
    with reading(path, "The layer file", _AGAIN, fault="cannot be read as MATLAB"):
        with open(path, "rb") as file:
            head = file.read(1024)
            if is_hdf5 := any(head[at : at + 8] == b"\x89HDF\r\n\x1a\n" for at in (0, 512)):
                content = b""
            elif head.startswith(b"MATLAB 7.3"):
                raise ValueError("it says that it is MATLAB 7.3, and holds no HDF5")
            else:
                content = head + file.read()
        try:
            variables = (
                read_matlab73(path)
                if is_hdf5
                else parse_mat5(content, expansion_limit(len(content)))
            )
        except ImportError as error:
            raise need_package(error, f"Reading {path.name} (MATLAB 7.3)") from error
    return variables
