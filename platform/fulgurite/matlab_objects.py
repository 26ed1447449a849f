"""Text of MATLAB's class ``string``, which MATLAB files store as objects.

A variable of this class holds the number of an object; what it says is in a table of all objects of
the file, the ``FileWrapper__``: cells, of which the first are the table's bytes and the others
values of properties. Nothing but numbers and text is looked at.

Shapes: W words of a variable, V values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["decode_strings"]

_MARK = 0xDD000000  # what the words of an object begin with
_HEADER = 40  # bytes of the table's head: version, number of names, eight offsets
_VERSIONS = (2, 3, 4)
_MISSING = 0xFFFF_FFFF_FFFF_FFFF  # length of a string that is missing
_PROPERTY, _IN_CELL = "any", 1  # where the class keeps its text, and how
_FIRST = 2  # cell of the first value
_MOST_AXES = 32


def decode_strings(words: npt.NDArray[Any], cells: Sequence[Any]) -> str | list[str]:
    """Strings of a variable.

    Args:
        words: The variable as it is stored. Shape: (W,).
        cells: The file's table of objects.

    Returns:
        The text of a single string, or those of an array in MATLAB's order; empty where missing.

    Raises:
        ValueError: The variable is not a string, or its layout is unknown.

    Source: the layout is not published; it is that of files which MATLAB R2016b and later write.
    """
    number = _object_number(words)
    table = _bytes(cells[0] if cells else None)
    head = _words(table[:_HEADER])
    if len(head) < _HEADER // 4 or head[0] not in _VERSIONS:
        raise ValueError("its table of objects is of an unknown version")
    names = bytes(table[_HEADER : head[2]]).decode("latin-1").split("\0")
    classes, properties, objects = (_words(table[begin:end]) for begin, end in pairwise(head[2:6]))
    block = objects[6 * number : 6 * number + 6]
    if len(block) < 6:
        raise ValueError("it has no such object")
    of_class = classes[4 * block[0] + 1 : 4 * block[0] + 2]
    if not of_class or _name(names, of_class[0]) != "string":
        raise ValueError("it is an object of another class")
    for name, kind, value in _block(properties, block[3]):
        if _name(names, name) == _PROPERTY and kind == _IN_CELL:
            if value + _FIRST >= len(cells):
                raise ValueError("a string is not in the table of objects")
            return _unpack(cells[value + _FIRST])
    raise ValueError("a string has no text")


def _object_number(words: npt.NDArray[Any]) -> int:
    """Number of the object that a variable is; arrays of strings are one object."""
    flat = [int(word) for word in np.ravel(words).tolist()] if np.size(words) < 100 else []
    if len(flat) < 6 or flat[0] != _MARK or flat[1] != 2 or flat[2:4] != [1, 1] or flat[4] < 1:
        raise ValueError("it is no single object")
    return flat[4]


def _bytes(cell: Any) -> npt.NDArray[np.uint8]:
    if not isinstance(cell, np.ndarray) or cell.dtype != np.uint8:
        raise ValueError("it has no table of objects")
    return np.ravel(cell)


def _words(part: npt.NDArray[np.uint8]) -> list[int]:
    words: list[int] = np.frombuffer(part[: len(part) // 4 * 4].tobytes(), "<u4").tolist()
    return words


def _name(names: Sequence[str], number: int) -> str:
    """A name by its number, counted from 1."""
    return names[number - 1] if 1 <= number <= len(names) else ""


def _block(words: Sequence[int], number: int) -> list[tuple[int, int, int]]:
    """Properties of one block: number of the name, kind and value of each."""
    at = 0
    for _ in range(number):
        if at >= len(words):
            break
        at += 1 + 3 * words[at]
        at += at % 2  # blocks begin at multiples of eight bytes
    count = words[at] if at < len(words) else 0
    if not number or at + 1 + 3 * count > len(words):
        raise ValueError("an object has no properties")
    return [(words[k], words[k + 1], words[k + 2]) for k in range(at + 1, at + 1 + 3 * count, 3)]


def _unpack(cell: Any) -> str | list[str]:
    """The strings in a value: version, axes, lengths, then characters in UTF-16."""
    if not isinstance(cell, np.ndarray | np.generic) or np.asarray(cell).dtype != np.uint64:
        raise ValueError("the text of a string is not stored as such")
    values = np.ravel(np.asarray(cell))
    head = [int(value) for value in values[: 2 + _MOST_AXES].tolist()]
    if len(head) < 2 or head[0] != 1 or not 1 <= head[1] <= _MOST_AXES or len(head) < 2 + head[1]:
        raise ValueError("the text of a string is stored in an unknown way")
    first = 2 + head[1]
    count = math.prod(head[2:first])
    if count > len(values) - first:
        raise ValueError("the lengths of strings are cut off")
    lengths = [int(length) for length in values[first : first + count].tolist()]
    text = values[first + count :].astype("<u8").tobytes()
    strings, at = [], 0
    for length in (0 if length == _MISSING else length for length in lengths):
        if 2 * length > len(text) - at:
            raise ValueError("the text of a string is cut off")
        strings.append(text[at : at + 2 * length].decode("utf-16-le"))
        at += 2 * length
    return strings[0] if count == 1 else strings
