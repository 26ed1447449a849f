"""Text of files for language models: documents, and where windows begin.

Axes: B windows, L tokens of a window.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fulgurite.errors import DataError
from fulgurite.extras import optional_import
from fulgurite.foreign import check_parquet, decode_text, is_text_column, reading

__all__ = [
    "UNREADABLE_TEXT", "ConsecutiveStarts", "FileWindows", "pad_window", "read_documents",
]  # fmt: skip

#: What to do about a file that cannot be read.
UNREADABLE_TEXT = "Make it readable, or leave it out of `--data.init_args.text.paths`."
_NO_TEXT = "Save it as text in UTF-8, or leave it out of `--data.init_args.text.paths`."
_ROWS = 256  # of a table that are read at a time


# --- documents ------------------------------------------------------------------------------------


def read_documents(files: Sequence[Path], column: str = "text") -> Iterator[str]:
    """Texts: each file is one, and each row of a parquet table.

    Args:
        files: Text in UTF-8, or parquet.
        column: Text column of parquet tables.

    Raises:
        DataError: A file cannot be read, is no text in UTF-8, or has no such column of text.
        MissingExtraError: A file is a parquet table, and pyarrow is not installed.

    Source: FineWeb-Edu's layout, column ``text``, docs/papers/number_probing.md section 2.2.
    """
    for path in files:
        if path.suffix == ".parquet":
            yield from _read_parquet(path, column)
            continue
        with reading(path, "The file", UNREADABLE_TEXT):
            content = path.read_bytes()
        with reading(path, "The file", _NO_TEXT):
            text = decode_text(content)
        yield text


def _read_parquet(path: Path, column: str) -> Iterator[str]:
    pq = optional_import("pyarrow.parquet", "probing-data", f"The table {path}")
    hint = "Fetch it again, or leave it out of `--data.init_args.text.paths`."
    with ExitStack() as stack:
        with reading(path, "The table", hint):
            check_parquet(path)
            table = stack.enter_context(pq.ParquetFile(path))
            schema = table.schema_arrow
            kind = schema.field(column).type if column in schema.names else None
        if kind is None or not is_text_column(kind):
            raise DataError(
                f"The table {path} has no column {column!r} of text (its type is {kind}).",
                "Set `--data.init_args.text.column` to the column that holds the text.",
            )
        batches = table.iter_batches(batch_size=_ROWS, columns=[column])
        while True:
            with reading(path, "The table", hint):  # what is done with texts is not its fault
                rows = next(batches, None)
                texts = (
                    [] if rows is None else [text for text in rows.column(0).to_pylist() if text]
                )
            yield from texts
            if rows is None:
                return


# --- windows --------------------------------------------------------------------------------------


class ConsecutiveStarts:
    """Where windows begin that follow each other, so that no token is a target twice.

    Args:
        part: The tokens that windows are cut from.
        length: Tokens L of a window.
        limit: Keep at most this many, spread evenly over the part.

    Example:
        >>> starts = ConsecutiveStarts(range(100, 131), 10, limit=2)
        >>> len(starts), starts.begin(np.arange(2)).tolist()
        (2, [100, 110])
    """

    def __init__(self, part: range, length: int, limit: int | None = None) -> None:
        self.part, self.length = part, length
        self.windows = max(0, (len(part) - 1) // length)
        self.kept = self.windows if limit is None else min(limit, self.windows)

    def __len__(self) -> int:
        return self.kept

    def begin(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the first token of each window. Shape: (B,) -> (B,)."""
        return self.part.start + numbers * self.windows // self.kept * self.length


class FileWindows:
    """Where the windows of several files begin: each token of a file is in one, the last is padded.

    Args:
        lengths: Tokens of each file, by its name.
        length: Tokens L of a window.

    Attributes:
        file: Index of the file of each window. Shape: (B,).
        begin: First token of each window in its file. Shape: (B,).
        names: Columns that say what each window is, for ``prediction_names``: ``file``, ``window``
            (its number in the file), ``begin`` and ``tokens`` (how many of the file it has).

    Example:
        >>> windows = FileWindows({"a.txt": 5, "b.txt": 2}, 4)
        >>> windows.file.tolist(), windows.begin.tolist(), windows.names["tokens"]
        ([0, 0, 1], [0, 4, 0], ['4', '1', '2'])
    """

    def __init__(self, lengths: Mapping[str, int], length: int) -> None:
        totals = np.array([*lengths.values()], np.int64)
        counts = np.maximum(1, -(-totals // length))
        self.file = np.repeat(np.arange(len(totals)), counts)
        number = np.arange(len(self.file)) - np.repeat(counts.cumsum() - counts, counts)
        self.begin: npt.NDArray[np.int64] = number * length
        tokens = np.minimum(length, totals[self.file] - self.begin)
        files = [*lengths]
        self.names: dict[str, list[str]] = {
            "file": [files[k] for k in self.file],
            "window": [str(k) for k in number],
            "begin": [str(k) for k in self.begin],
            "tokens": [str(k) for k in tokens],
        }

    def __len__(self) -> int:
        return len(self.file)


def pad_window(
    tokens: npt.NDArray[np.int64], length: int, ignored: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the inputs and targets of a window at the end of a text.

    Args:
        tokens: The tokens of the window and the one after it, as far as there are any.
        length: L.
        ignored: Target where the next token is not known.

    Shape:
        - tokens: (L + 1,) or fewer; the results (L,) each.

    Example:
        >>> inputs, targets = pad_window(np.array([5, 6]), 3, -100)
        >>> inputs.tolist(), targets.tolist()
        ([5, 6, 0], [6, -100, -100])
    """
    padding = length + 1 - len(tokens)
    inputs = np.pad(tokens, (0, padding))[:-1]
    return inputs, np.pad(tokens[1:], (0, padding), constant_values=ignored)
