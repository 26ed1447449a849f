"""Labels in files: arrays of class numbers, and the meaning of texts as classes.

Shapes: R training images of the source, C classes.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fulgurite.data.exclusions import name_some
from fulgurite.data.names import describe_misspelt
from fulgurite.datamodules.fedsir.samples import UNKNOWN, Listing
from fulgurite.errors import ConfigError, DataError
from fulgurite.foreign import (
    check_tensor_file,
    check_tensors,
    read_array,
    read_arrays,
    reading,
)

__all__ = [
    "MISSING",
    "LabelsAre",
    "array_labels",
    "label_numbers",
    "number_names",
    "quote_some",
    "read_label_arrays",
]

#: The number of a label that is missing in a file.
MISSING = -2

LabelsAre = Literal["auto", "names", "numbers"]

_Integers = npt.NDArray[np.int64]


def quote_some(values: Sequence[object], limit: int = 3) -> str:
    """Quote the first distinct values, and count the others.

    Example:
        >>> quote_some(["a", "b", "a", "c", "d"], limit=2)
        "'a', 'b' and 2 more"
    """
    return name_some([repr(value) for value in dict.fromkeys(values)], limit)


def label_numbers(
    texts: Sequence[str],
    class_names: Sequence[str],
    labels_are: LabelsAre,
    path: Path,
    *,
    option: str,
) -> dict[str, int]:
    """Return the class number of each distinct label.

    Args:
        texts: Names of classes, or their numbers from 0.
        class_names: Names of the C classes.
        labels_are: Whether ``texts`` are names or numbers; ``auto`` takes what fits all of them.
        path: The file, for errors.
        option: Prefix of the file's arguments, as the command line spells them.

    Raises:
        ConfigError: The labels fit both names and numbers, with different meanings.
        DataError: Some labels are neither names nor numbers of classes.

    Example:
        >>> label_numbers(["b", "a", "b"], ("a", "b"), "auto", Path("x.csv"), option="--noise")
        {'b': 1, 'a': 0}
    """
    different = list(dict.fromkeys(texts))
    names = {name: k for k, name in enumerate(class_names)}
    numbers = {str(k): k for k in range(len(class_names))}
    # as pandas writes columns with gaps
    numbers |= {f"{text}.0": k for text, k in numbers.items()}
    names = {f"{name}.0": k for name, k in names.items() if name.isdigit()} | names
    meanings = {"names": names, "numbers": numbers}
    fitting = {
        kind: {text: meaning[text] for text in different}
        for kind, meaning in meanings.items()
        if labels_are in ("auto", kind) and all(text in meaning for text in different)
    }
    if len(fitting) == 2 and fitting["names"] != fitting["numbers"]:
        raise ConfigError(
            f"The labels of {path} ({quote_some(different)}) are both names and numbers of "
            f"classes, and these differ: the class named {class_names[0]!r} has the number 0.",
            f"Set `{option}.labels_are` to names or numbers.",
        )
    if fitting:
        return next(iter(fitting.values()))
    valid: set[str] = set().union(*(m for k, m in meanings.items() if labels_are in ("auto", k)))
    bad = [text for text in different if text not in valid] or different
    raise DataError(
        f"The file {path} has labels that are no class of the source: {quote_some(bad)}."
        f"{describe_misspelt(bad, class_names)}",
        f"The classes are {quote_some(class_names)}, or numbers from 0 to {len(class_names) - 1}.",
    )


def number_names(texts: Iterable[str], origin: str, hint: str) -> tuple[str, ...]:
    """Return class names for labels that are numbers.

    Args:
        texts: All labels.
        origin: Where the labels are from, for errors.
        hint: Hint of the error.

    Raises:
        DataError: The labels are not numbers from 0 without gaps.

    Example:
        >>> number_names(["1", "0", "1"], "a.txt", "")
        ('0', '1')
    """
    different = sorted(set(texts))
    digits = [text for text in different if text.isascii() and text.isdigit() and len(text) < 10]
    numbers = {int(text) for text in digits}
    if numbers != set(range(len(different))):
        raise DataError(
            f"The labels of {origin} are not numbers from 0 without gaps: "
            f"{', '.join(different[:5])}.",
            hint,
        )
    return tuple(str(k) for k in range(len(different)))


def read_label_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Read the arrays of a ``.npy``, ``.npz`` or ``.pt`` file; one without a name is ``""``.

    Only tensors, arrays of numbers, and plain containers of them are unpickled.

    Raises:
        DataError: The file cannot be read, or holds other objects.
    """
    with reading(path, "The labels", "Write the file again, or name another one."):
        if path.suffix == ".npz":
            return read_arrays(path)
        if path.suffix == ".npy":
            with open(path, "rb") as file:
                return {"": read_array(file, os.path.getsize(path))}
        content = _load_arrays(path)
        if not isinstance(content, dict):
            content = {"": content}
        return {str(name): _as_array(value) for name, value in content.items()}


def _as_array(value: Any) -> npt.NDArray[Any]:
    import torch

    if isinstance(value, torch.Tensor):
        return np.asarray(value.numpy())
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufU":
        return value
    if isinstance(value, list) and value and all(type(item) is int for item in value):
        return np.array(value, np.int64)
    raise ValueError(f"it holds a {type(value).__name__} that is no array of labels")


def _empty_array(kind: Any, shape: Any, code: Any) -> npt.NDArray[Any]:
    """Return an empty array, whose pickled state, of a checked size, is set afterwards."""
    if kind is not np.ndarray or shape != (0,):
        raise ValueError("an array in it is none that NumPy pickled")
    return np.ndarray.__new__(np.ndarray, (0,), np.int8)


def _plain_dtype(code: Any, *_: Any) -> np.dtype[Any]:
    kind = np.dtype(str(code)[:32])
    if kind.kind not in "biufU":
        raise ValueError(f"an array in it holds {kind}")
    return np.dtype(kind, copy=True)


def _load_arrays(path: Path) -> Any:
    """Load a file of ``torch.save`` that may hold NumPy arrays, as CIFAR-10N's does."""
    import torch

    check_tensor_file(path)
    dtypes = [type(np.dtype(code)) for code in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4")]
    dtypes += [type(np.dtype(code)) for code in ("u8", "f2", "f4", "f8", "U1")]
    allowed: list[Any] = [np.ndarray, *dtypes, (_plain_dtype, "numpy.dtype")]
    allowed += [
        (_empty_array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")
    ]
    with torch.serialization.safe_globals(allowed):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:  # whose text advises to trust the file
            raise ValueError(
                "it is damaged, or holds other objects than tensors, arrays of numbers, and lists "
                "of whole numbers"
            ) from error
    check_tensors(content, os.path.getsize(path))
    return content


def array_labels(
    arrays: Mapping[str, npt.NDArray[Any]],
    name: str,
    listing: Listing,
    class_names: Sequence[str],
    *,
    path: Path,
    option: str,
    labels_are: LabelsAre = "auto",
    gaps: bool = False,
) -> _Integers:
    """Return one array of labels in the order of the source, as class numbers.

    Whole numbers are the numbers of classes, unless they are names of classes too: then they must
    mean the same, or ``labels_are`` says which.

    Args:
        arrays: Arrays of the file by name.
        name: Name of the array; ignored in a file with one nameless array.
        listing: Training images of the source.
        class_names: Names of the C classes.
        path: The file, for errors.
        option: Argument that names the array, as the command line spells it.
        labels_are: Whether the array has names or numbers of classes.
        gaps: Whether -1 marks an unknown label.

    Shape:
        - (R,) int64.

    Raises:
        ConfigError: The labels fit both names and numbers, with different meanings.
        DataError: The file has no array of this name, or it does not give each image a label of a
            class.
    """
    group = option.partition(".columns.")[0]
    array = arrays.get("" if "" in arrays else name)
    if array is None:
        raise DataError(
            f"The file {path} has no labels {name!r}: it has {', '.join(arrays)}.",
            f"Set `{option}` to one of these.",
        )
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]  # MedMNIST
    if array.ndim != 1 or array.dtype.kind not in "iuU":
        raise DataError(
            f"The labels {name!r} of {path} are {array.dtype} of shape {array.shape}.",
            "Give one class number or name for each image.",
        )
    if len(array) != listing.total:
        raise DataError(
            f"The labels {name!r} of {path} are {len(array)}, and the source has {listing.total} "
            "training images.",
            "Give one for each, in the order of the source, or a table that names the images.",
        )
    if array.dtype.kind == "U":
        texts = [str(text) for text in array]
        number = label_numbers(texts, class_names, "names", path, option=group)
        return np.array([number[text] for text in texts], np.int64)
    values = [int(v) for v in np.unique(array) if not (gaps and v == UNKNOWN)]
    texts = [str(value) for value in values]
    if labels_are == "names" or (labels_are == "auto" and {*texts} <= {*class_names}):
        number = label_numbers(texts, class_names, labels_are, path, option=group)
        by_value = {UNKNOWN: UNKNOWN} | {v: number[t] for v, t in zip(values, texts, strict=True)}
        return np.array([by_value[value] for value in array.tolist()], np.int64)
    low = UNKNOWN if gaps else 0
    bad = np.flatnonzero((array < low) | (array >= len(class_names)))
    if len(bad):
        raise DataError(
            f"The labels {name!r} of {path} give {listing.describe(int(bad[0]))} the class "
            f"{array[bad[0]]} ({len(bad)} are like this).",
            f"The classes are numbered from 0 to {len(class_names) - 1}.",
        )
    return array.astype(np.int64)
