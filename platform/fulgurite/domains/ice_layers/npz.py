"""The schema of stacks in npz files, given ones and completed ones, and how they are read.

Shapes: N traces, L layers (newest first), K = L + 1 boundaries (the surface first), P physical
fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fulgurite.foreign import read_arrays, reading
from fulgurite.io import atomic_write

__all__ = [
    "ARRAYS",
    "COMPLETED_ARRAYS",
    "DETAIL_ARRAYS",
    "LISTS",
    "NAMES",
    "ArrayField",
    "convert",
    "read_npz_arrays",
    "read_texts",
    "write_npz_arrays",
]


class ArrayField(NamedTuple):
    """An array of a stack.

    Attributes:
        kind: Type of its numbers, or text.
        axes: Its axes, one letter for each.
        unit: Unit of its values; ``unit`` where that of thicknesses is meant.
    """

    kind: type[np.generic]
    axes: str
    unit: str = ""


ARRAYS: Mapping[str, ArrayField] = {
    "thickness": ArrayField(np.float64, "NL", "unit"),
    "boundary": ArrayField(np.float64, "NK", "unit"),
    "provenance": ArrayField(np.uint8, "NL"),
    "std": ArrayField(np.float32, "NL", "unit"),
    "observed": ArrayField(np.bool_, "NL"),
    "physics": ArrayField(np.float32, "NLP"),
    "physics_flag": ArrayField(np.uint8, "N"),
    "pos": ArrayField(np.float64, "N2", "degrees"),
    "distance": ArrayField(np.float64, "N", "m"),
    "truth": ArrayField(np.float64, "NL", "unit"),
    "layer_age": ArrayField(np.float64, "L", "years"),
    "time": ArrayField(np.float64, "N", "s since 1970"),
    "elevation": ArrayField(np.float64, "N", "m"),
    "flight_distance": ArrayField(np.float64, "N", "m"),
    "frame": ArrayField(np.str_, "N"),
    "trace": ArrayField(np.int64, "N"),
    "density": ArrayField(np.float64, "NL", "g cm-3"),
    "twtt": ArrayField(np.float64, "NK", "s"),
    "picked": ArrayField(np.bool_, "NK"),
}
"""Every array of a stack that has a meaning, by its name in files."""

COMPLETED_ARRAYS = (
    "thickness", "provenance", "std", "observed", "physics", "pos", "distance", "layer_age",
)  # fmt: skip
"""Arrays that every completed stack has."""

DETAIL_ARRAYS = (
    "time", "elevation", "flight_distance", "frame", "trace", "density", "twtt", "picked",
)  # fmt: skip
"""Arrays of the flight that a completed stack may have."""

NAMES = ("segment", "stack")
"""Texts of a stack: names of the flight segment and of itself."""

LISTS = ("trained_segments", "physics_names", "layer_names")
"""Lists of names."""


def read_npz_arrays(path: str | Path, subject: str, hint: str) -> dict[str, NDArray[Any]]:
    """Read all arrays of a file, without unpickling anything.

    Args:
        path: The file.
        subject: What the file is, for the error.
        hint: What to do if it cannot be read.

    Raises:
        DataError: The file is missing, truncated or no npz, or holds objects.
    """
    with reading(path, subject, hint):
        return read_arrays(path)


def write_npz_arrays(path: Path, arrays: Mapping[str, Any]) -> Path:
    """Write arrays of numbers and texts, atomically, and return the path.

    Args:
        path: The file.
        arrays: The arrays by name.
    """
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)
    return path


def read_texts(content: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """The texts of a list, none where it is not there.

    Args:
        content: Arrays of a file by name.
        name: Name of the list.
    """
    return tuple(str(v) for v in np.atleast_1d(content[name])) if name in content else ()


def convert(name: str, values: Any) -> NDArray[Any]:
    """Values of an array in the type of the schema, none of them changed.

    Args:
        name: Name of the array in :data:`ARRAYS`.
        values: Its values.

    Raises:
        ValueError: They are no such numbers or texts.
    """
    array: NDArray[Any] = np.asarray(values)
    kind = ARRAYS[name].kind
    if kind is np.str_:
        if array.dtype.kind not in "U":
            raise ValueError(f"{name} is not made of texts")
        return array
    if array.dtype.kind not in "biuf" and array.size:
        raise ValueError(f"{name} is not made of numbers")
    with np.errstate(invalid="ignore", over="ignore"):
        converted = array.astype(kind)
    if np.dtype(kind).kind in "bui" and (converted != array).any():
        raise ValueError(f"{name} holds other values than {np.dtype(kind)}")
    return converted
