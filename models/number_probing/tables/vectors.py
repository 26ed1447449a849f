"""Tables of word vectors: GloVe of a package, ``.npy``, and text of GloVe or word2vec.

Axes: D embedding width, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from fulgurite.errors import DataError
from fulgurite.extras import optional_import
from fulgurite.foreign import map_array, reading
from fulgurite.models.number_probing.tables.number_table import (
    DEFAULT_STOP,
    NumberTable,
    check_covered,
    shorten,
    to_finite_tensor,
)
from fulgurite.models.number_probing.tables.tokens import Spelling, find_word_rows, read_lines

__all__ = ["read_glove", "read_npy", "read_text"]

_REINSTALL = "Install the package again."
_LINE = "Each line must be a word and its vector, separated by spaces or tabs."
_LONGEST_LINE = 1 << 20  # characters


def _copy_rows(array: Any, ids: Sequence[int], source: str) -> Tensor:
    """Copy rows of a memory-mapped matrix."""
    if array.ndim != 2 or array.dtype.kind != "f":
        raise DataError(
            f"{source} holds {array.dtype} of shape {array.shape}.",
            "Give a matrix of floating point numbers with one row for each word.",
        )
    if max(ids) >= len(array):
        raise DataError(
            f"{source} has {len(array)} rows, and row {max(ids)} is asked for.",
            "The words and the matrix are not of one table: give those that belong together.",
        )
    return to_finite_tensor(np.ascontiguousarray(array[np.asarray(ids)], dtype=np.float64), source)


def read_glove(folder: Path, numbers: Sequence[int] | None) -> NumberTable:
    """GloVe 6B in 50 dimensions, from the folder of its package.

    Raises:
        DataError: A file is damaged, or does not cover the numbers.
        MissingExtraError: pyarrow is not installed.
    """
    import pandas as pd

    index_file = folder / "data" / "glove_6B_index.parquet"
    optional_import("pyarrow", "probing-data", "The index of the table 'glove', a parquet file,")
    with reading(index_file, "The index", _REINSTALL):
        index = pd.read_parquet(index_file)["index"]
    row_of = find_word_rows(index.tolist(), numbers, str(index_file))
    ids = list(row_of.values())
    vectors = folder / "data" / "glove_6B_50d_emb.npy"
    with reading(vectors, "The table", _REINSTALL):
        array = map_array(vectors)
    return NumberTable(
        "glove",
        tuple(row_of),
        _copy_rows(array, ids, "glove"),
        torch.tensor(ids),
        "GloVe 6B, 50 numbers",
    )


def read_npy(
    path: Path, numbers: Sequence[int] | None, words: Path | None, spelling: Spelling = "auto"
) -> NumberTable:
    """A matrix of ``numpy.save`` whose rows are words of a list, or numbers without one.

    Raises:
        DataError: A file is damaged, the two do not fit, or they do not cover the numbers.
    """
    with reading(path, "The table", "Write it with numpy.save.", fault="cannot be read as .npy"):
        array = map_array(path)
        if array.ndim != 2:
            raise ValueError(f"its shape is {array.shape}, not that of a matrix")
    if words is None:
        row_of = {n: n for n in (numbers or range(min(DEFAULT_STOP, len(array))))}
        check_covered({n: n for n in row_of if n < len(array)}, numbers, str(path))
        embeddings = _copy_rows(array, list(row_of), str(path))
        note = f"row n of {len(array)} as the number n"
        return NumberTable(path.stem, tuple(row_of), embeddings, None, note)
    word_list = read_lines(words)
    if len(word_list) != len(array):
        raise DataError(
            f"{words} has {len(word_list)} words, and {path} has {len(array)} rows.",
            "Give the words that belong to the matrix, one a line.",
        )
    row_of = find_word_rows(word_list, numbers, str(words), spelling)
    return NumberTable(
        path.stem, tuple(row_of), _copy_rows(array, list(row_of.values()), str(path))
    )


def read_text(path: Path, numbers: Sequence[int] | None) -> NumberTable:
    """Vectors of GloVe or word2vec: a word and D numbers a line; the latter begin with V and D."""
    number_of = {str(n): n for n in (range(DEFAULT_STOP) if numbers is None else numbers)}
    rows: dict[int, list[float]] = {}
    first, declared, width, number = "", 0, 0, 0
    with (
        reading(path, "The table", _LINE),
        open(path, encoding="utf-8-sig", errors="replace") as file,
    ):
        for number, line in enumerate(_bounded_lines(file), 1):
            word, *parts = re.split(r"[ \t]+", line.rstrip(), maxsplit=1)
            vector = parts[0] if parts else ""
            first = first or line
            # "V D" of word2vec; a vector of one number is hardly ever whole
            is_header = number == 1 and word.isdecimal() and vector.strip().isdecimal()
            declared, width = (int(word), int(vector)) if is_header else (declared, width)
            if word not in number_of or is_header:
                continue
            row = _parse_vector(vector, width, f"Line {number} of {path}", word)
            if number_of[word] in rows:
                raise DataError(
                    f"The word '{word}' comes twice in {path}, again on line {number}.",
                    "Keep one line for each word.",
                )
            rows[number_of[word]], width = row, len(row)
    if declared and number <= declared:
        raise DataError(
            f"{path} begins with {declared} words and ends after {number - 1}.",
            "Fetch it again if it is cut off, or correct its first line.",
        )
    if not rows:
        raise DataError(
            f"No line of {path} begins with a number that is asked for; the first is "
            f"{shorten(first)}.",
            f"{_LINE} Give the file in UTF-8.",
        )
    if numbers is None:
        first_gap = next((n for n in range(DEFAULT_STOP) if n not in rows), DEFAULT_STOP)
        rows = {n: rows[n] for n in range(first_gap)}
    check_covered(rows, numbers, str(path))
    order = sorted(rows)
    return NumberTable(
        path.stem, tuple(order), to_finite_tensor([rows[n] for n in order], str(path))
    )


def _bounded_lines(file: IO[str]) -> Iterator[str]:
    """Yield the lines of a file.

    Raises:
        ValueError: A line is longer than any vector.
    """
    while line := file.readline(_LONGEST_LINE):
        if len(line) == _LONGEST_LINE:
            raise ValueError(f"a line has more than {_LONGEST_LINE:,} characters")
        yield line


def _parse_vector(text: str, width: int, location: str, word: str) -> list[float]:
    """Parse the numbers of a line.

    Raises:
        DataError: A part is no number, or there are not ``width`` of them (if it is not 0).
    """
    try:
        row = [float(x) for x in text.split()]
    except ValueError:
        row = []
    if not row or (width and len(row) != width):
        raise DataError(
            f"{location} holds {len(row)} numbers after '{word}', not {width or 'one or more'}.",
            _LINE,
        )
    return row
