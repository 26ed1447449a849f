"""Files that annotate each training image with its client, given label or true label.

Shapes: R training images of the source, C classes.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fulgurite.data.exclusions import name_some
from fulgurite.data.names import describe_misspelt, find_repeated
from fulgurite.datamodules.fedsir.label_files import quote_some
from fulgurite.datamodules.fedsir.samples import Listing
from fulgurite.errors import ConfigError, DataError
from fulgurite.extras import optional_import
from fulgurite.foreign import (
    check_parquet,
    is_text_column,
    open_compressed,
    read_json,
    reading,
    refuse_other_formats,
    refuse_other_separator,
)
from fulgurite.io import data_path

__all__ = [
    "AnnotationFile",
    "cell_text",
    "file_kind",
    "is_plain_column",
    "read_indices",
    "read_lines",
    "read_list",
    "read_table",
]

_KINDS = {
    ".csv": "table",
    ".tsv": "table",
    ".parquet": "table",
    ".txt": "list",
    ".npy": "array",
    ".npz": "array",
    ".pt": "array",
    ".pth": "array",
    ".json": "json",
}
_REWRITE_HINT = "Write the file again, or name another one."


def file_kind(path: str, option: str, *kinds: str) -> str:
    """Return the kind of a file from its name: ``table``, ``list``, ``array`` or ``json``.

    Args:
        path: Name of the file; tables and lists may end with ``.gz``, ``.bz2`` or ``.xz``.
        option: Argument that names the file, as the command line spells it.
        kinds: Kinds that the caller can read.

    Raises:
        ConfigError: The kind of the file is not among ``kinds``.

    Example:
        >>> file_kind("a.csv.gz", "--path", "table"), file_kind("b.pt", "--path", "array")
        ('table', 'array')
    """
    name = Path(path).name.lower()
    for suffix in (".gz", ".bz2", ".xz"):
        name = name.removesuffix(suffix)
    kind = _KINDS.get(Path(name).suffix, "")
    if kind not in kinds:
        suffixes = ", ".join(
            suffix for suffix, suffix_kind in _KINDS.items() if suffix_kind in kinds
        )
        raise ConfigError(
            f"The file {path} is none of {suffixes} by its name.",
            f"Set `{option}` to one of these.",
        )
    return kind


# --- tables --------------------------------------------------------------------------------------


def read_table(path: Path) -> dict[str, list[str]]:
    """Read all columns of a CSV, TSV or parquet table as text; empty cells are ``""``.

    Columns of a parquet table other than numbers and text are left out.

    Raises:
        DataError: The table cannot be read, has no header, or has two columns of one name.
        MissingExtraError: The table is parquet, and pyarrow is not installed.
    """
    if path.suffix == ".parquet":
        return _read_parquet(path)
    with reading(path, "The table", _REWRITE_HINT):
        with open_compressed(path) as file:
            content = file.read()
        refuse_other_formats(content)
        text = content.decode("utf-8-sig")
        delimiter = "\t" if ".tsv" in path.suffixes else ","
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        # spreadsheets leave rows of commas alone behind the last one
        rows = [cells for line in lines if any(cells := [cell.strip() for cell in line])]
        if not rows:
            raise ValueError("it is empty")
        header = rows.pop(0)
        refuse_other_separator(header)
        if (twice := find_repeated(header)) is not None:
            raise ValueError(f"it has two columns {twice!r}")
        for number, row in enumerate(rows, 1):
            if len(row) != len(header):
                raise ValueError(f"row {number} has {len(row)} fields and the header {len(header)}")
        return {name: [row[k] for row in rows] for k, name in enumerate(header)}


def _read_parquet(path: Path) -> dict[str, list[str]]:
    pq = optional_import("pyarrow.parquet", "federated", f"The table {path}")
    with reading(path, "The table", _REWRITE_HINT):
        check_parquet(path)
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if len(set(schema.names)) < len(schema.names):
                raise ValueError("it has two columns of one name")
            plain = [field.name for field in schema if is_plain_column(field.type)]
            table = file.read(columns=plain)
            return {name: [cell_text(v) for v in table[name].to_pylist()] for name in plain}


def is_plain_column(kind: Any) -> bool:
    """Tell whether a column of parquet holds numbers or text."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or is_text_column(kind)
        or pa.types.is_boolean(kind)
    )


def cell_text(value: Any) -> str:
    """Return the text of a cell; a whole float, as pandas writes for gaps, becomes an integer."""
    if value is None or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def read_lines(path: Path, hint: str = _REWRITE_HINT) -> list[str]:
    """Read the lines of a text file, stripped and without blank lines.

    Args:
        path: The file; its name may end with ``.gz``, ``.bz2`` or ``.xz``.
        hint: Hint of the error if the file cannot be read.

    Raises:
        DataError: The file cannot be read.
    """
    with reading(path, "The list", hint), open_compressed(path) as file:
        lines = file.read().decode("utf-8-sig").split("\n")
        return [text for line in lines if (text := line.strip())]


def read_list(path: Path, value: str, hint: str = _REWRITE_HINT) -> dict[str, list[str]]:
    """Read lines of a path and a value, with a blank between them; paths may have blanks.

    Args:
        path: The list, such as ``noisy_label_kv.txt`` of Clothing1M.
        value: Name of the second field.
        hint: Hint of the error if the file cannot be read.

    Raises:
        DataError: The file cannot be read, or a line has only one field.
    """
    lines = read_lines(path, hint)
    with reading(path, "The list", hint):
        columns: dict[str, list[str]] = {"path": [], value: []}
        for line in lines:
            parts = line.rsplit(None, 1)
            if len(parts) < 2:
                raise ValueError(f"{line[:80]!r} is one field: a path and a {value} are wanted")
            columns["path"].append(parts[0])
            columns[value].append(parts[1])
        return columns


@dataclass(frozen=True)
class AnnotationFile:
    """A table or list with a row for each training image.

    Args:
        path: The file, absolute or relative to ``FULGURITE_DATA``.
        option: Prefix of the file's arguments, as the command line spells them.
        path_column: Column with the names of images in the source.
        row_column: Column with the index of images in the source, from 0.
        unknown: Action for rows of images that the source does not have.
    """

    path: str
    option: str
    path_column: str = "path"
    row_column: str = "row"
    unknown: Literal["error", "ignore"] = "error"

    def read(
        self, listing: Listing, *names: str, optional: Sequence[str] = ()
    ) -> dict[str, list[str | None]]:
        """Return columns by row of the source; None where the file has no row for an image.

        Args:
            listing: Training images of the source.
            names: Columns to read.
            optional: Columns that may be absent.

        Raises:
            DataError: The file cannot be read or lacks a column, or a row is repeated, names an
                unknown image, or names none.
        """
        path = data_path(self.path)
        if file_kind(self.path, f"{self.option}.path", "table", "list") == "list":
            columns = read_list(path, names[0])
            if listing.keys is None:  # then images have no names, and it counts them
                columns[self.row_column] = columns.pop("path")
            else:
                columns[self.path_column] = columns.pop("path")
        else:
            columns = read_table(path)
        for name in names:
            if name not in columns and name not in optional:
                raise DataError(
                    f"The table {path} has no column {name!r}: it has {', '.join(columns)}.",
                    f"Name the column that is meant under `{self.option}`.",
                )
        rows = self._match_rows(columns, listing, path)
        annotations: dict[str, list[str | None]] = {}
        for name in names:
            if name in columns:
                annotations[name] = [None] * listing.total
                for row, value in zip(rows, columns[name], strict=True):
                    if row >= 0:
                        annotations[name][row] = value
        return annotations

    def _match_rows(
        self, columns: Mapping[str, Sequence[str]], listing: Listing, path: Path
    ) -> list[int]:
        """Match the rows of the file to rows of the source; -1 for those to ignore."""
        by_path, by_row = self.path_column in columns, self.row_column in columns
        if by_path == by_row:
            count_word = "both" if by_path else "neither"
            raise DataError(
                f"The table {path} has {count_word} of the columns {self.path_column!r} and "
                f"{self.row_column!r} to tell images by: it has {', '.join(columns)}.",
                f"Give one of them, or set `{self.option}.path_column` or `row_column` to the name "
                "of the column that does.",
            )
        if by_path:
            names = columns[self.path_column]
            if listing.keys is None:
                raise DataError(
                    f"The table {path} names images by {self.path_column!r}, and the images of the "
                    "source have no names.",
                    f"Count them from 0 in a column {self.row_column!r}.",
                )
            number = {key: row for row, key in enumerate(listing.keys)}
            rows = [number.get(name, -1) for name in names]
            example = f", such as {listing.keys[0]}" if listing.total else ""
            hint = f"Name images as the source does{example}"
        else:
            names = columns[self.row_column]
            rows = [_parse_row(name, listing.total) for name in names]
            hint = f"Count the images of the source from 0 to {listing.total - 1}"
        unknown = [name for name, row in zip(names, rows, strict=True) if row < 0]
        if unknown and (self.unknown == "error" or len(unknown) == len(rows)):
            raise DataError(
                f"The table {path} has rows of images that the source does not train on: "
                f"{quote_some(unknown)}.{describe_misspelt(unknown, listing.keys or ())}",
                f"{hint}, remove these rows, or set `{self.option}.unknown=ignore`.",
            )
        _refuse_repeated([row for row in rows if row >= 0], listing, path)
        return rows


def _parse_row(text: str, total: int) -> int:
    if text.isascii() and text.isdigit() and len(text) < 19 and int(text) < total:
        return int(text)
    return -1


def _refuse_repeated(rows: Sequence[int], listing: Listing, path: Path) -> None:
    if len(set(rows)) == len(rows):
        return
    counts = np.bincount(rows, minlength=listing.total)
    repeated = np.flatnonzero(counts > 1)
    examples = name_some([listing.describe(int(row)) for row in repeated], 3)
    raise DataError(
        f"The file {path} has more than one row for {examples}.",
        "Give one row for each image.",
    )


# --- partitions as indices -----------------------------------------------------------------------


def read_indices(path: Path, listing: Listing) -> list[str | None]:
    """Read a JSON of the rows of each client, and return the client of each row of the source.

    Args:
        path: JSON object of lists by client, or a list of lists with numbered clients.
        listing: Training images of the source.

    Raises:
        DataError: The file cannot be read or has another structure, or a row is repeated or outside
            the source.
    """
    with reading(path, "The partition", _REWRITE_HINT):
        content = read_json(path)
        if isinstance(content, list):
            content = {str(client): rows for client, rows in enumerate(content)}
        if not isinstance(content, dict) or not all(isinstance(v, list) for v in content.values()):
            raise ValueError("it is no object of lists of rows by client")
        owner: list[str | None] = [None] * listing.total
        for client, rows in content.items():
            for row in rows:
                if type(row) is not int or not 0 <= row < listing.total:
                    raise ValueError(
                        f"client {client[:80]!r} has row {str(row)[:80]}, and the source has rows "
                        f"0 to {listing.total - 1}"
                    )
                if owner[row] is not None:
                    raise ValueError(f"it names {listing.describe(row)} more than once")
                owner[row] = client
        return owner
