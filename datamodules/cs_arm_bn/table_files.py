"""Tables of others in CSV or parquet files, read as text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fulgurite.data.names import find_misspelt
from fulgurite.errors import DataError
from fulgurite.extras import optional_import
from fulgurite.foreign import check_parquet, read_csv, reading

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["find_other_plate", "find_table", "read_table", "refuse_misspelt_columns"]

#: Ends of the names of tables, in the order in which they are looked for.
_SUFFIXES = (".csv", ".csv.gz", ".parquet")


def _convert_to_text(column: pd.Series) -> pd.Series:
    """Convert numbers back to names: 1.0 becomes "1", and an empty name is missing.

    Raises:
        ValueError: A cell is not a name or number.
    """
    import pandas as pd

    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column.astype(column.cat.categories.dtype)
    if column.dtype.kind == "f":
        rounded = column.round()
        if ((rounded == column) & (column.abs() < 2**63))[column.notna()].all():
            column = rounded.astype("Int64")
    text: pd.Series = column.astype("object").where(column.notna(), None).map(_convert_cell)
    return text if len(text) else pd.Series(dtype="object")


def _convert_cell(value: object) -> str | None:
    if isinstance(value, bytes):
        value = value.decode("utf-8")
    elif isinstance(value, np.ndarray | list | tuple | dict):
        raise ValueError(f"a cell holds a {type(value).__name__}, not a name")
    return None if value is None else str(value) or None


def find_table(path: Path) -> Path | None:
    """Return the first existing file of a table that is named without its suffix, if any."""
    files = (path.with_name(path.name + suffix) for suffix in _SUFFIXES)
    return next((file for file in files if file.is_file()), None)


def read_table(path: Path, columns: Sequence[str] = ()) -> pd.DataFrame:
    """Read a CSV (also ``.csv.gz``) or parquet file as text, numbers included.

    Args:
        path: Path of the file, with its suffix or without (the first existing one of ``.csv``,
            ``.csv.gz`` and ``.parquet``).
        columns: Required columns.

    Raises:
        DataError: The file does not exist or is damaged, or a column is missing.
        MissingExtraError: The file is parquet, and pyarrow is not installed.

    Source: docs/papers/cs_arm_bn.md section 4.1 (plate names that are numbers come back as
    numbers).
    """
    import pandas as pd

    if not path.is_file():
        file = find_table(path)
        if file is None and path.is_dir():
            raise DataError(f"{path} is a folder, and no table.", "Name the file of the table.")
        if file is None:
            raise DataError(
                f"There is no table {path}.csv, .csv.gz or .parquet.",
                "Put it there, or point `--data.init_args.source.init_args.root` to the data.",
            )
        path = file
    if path.suffix == ".parquet":
        optional_import("pyarrow", "plates", f"The table {path}", "export it as CSV")
    hint = "Export it as comma-separated values in UTF-8, or fetch it again."
    with reading(path, "The table", hint):
        if path.suffix == ".parquet":
            check_parquet(path)
            table = pd.read_parquet(path)
            if names := [name for name in table.index.names if name is not None]:
                table = table.reset_index(names)  # pandas' index is a column of the file
            table = table.apply(_convert_to_text)
        else:
            table = read_csv(path, dtype=str)
    table = table.dropna(how="all").reset_index(drop=True)  # spreadsheets leave such rows
    refuse_misspelt_columns(table, columns, path)
    if missing := [name for name in columns if name not in table.columns]:
        raise DataError(
            f"The table {path} has no column {missing[0]!r}.",
            f"It needs the columns {', '.join(columns)}.",
        )
    return table


def refuse_misspelt_columns(table: pd.DataFrame, known: Sequence[str], path: Path | str) -> None:
    """Refuse a table with a column that is known but for case and blanks.

    Unknown columns are not used, so that this one, which may be optional, would be lost.

    Args:
        table: The table.
        known: Names of the columns that are read if they are there.
        path: Its file, for the error.

    Raises:
        DataError: It has such a column, and lacks the one that is known.
    """
    if pair := find_misspelt(map(str, table.columns), known):
        raise DataError(
            f"The table {path} has a column {pair[0]!r}, which is not read: {pair[1]!r} would be.",
            "Rename it, or give it another name if it is something else.",
        )


def find_other_plate(table: pd.DataFrame, plate: tuple[str, str, str]) -> str:
    """Describe the plate that a table of JUMP names, if it is not that of its folder.

    Args:
        table: Table with ``Metadata_Source``, ``Metadata_Batch`` and ``Metadata_Plate``, or some.
        plate: Source, batch and plate of the folder.
    """
    for name, value in zip(("Source", "Batch", "Plate"), plate, strict=True):
        column = table.get(f"Metadata_{name}")
        if column is not None and (wrong := column.ne(value)).any():
            other = column[wrong].iloc[0]
            return f"the {name.lower()} {other if isinstance(other, str) else '(none)'}"
    return ""
