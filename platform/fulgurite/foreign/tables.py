"""Tables of others: CSV and parquet.

Axes: R rows.
"""

from __future__ import annotations

import codecs
import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fulgurite.foreign.reading import expansion_limit
from fulgurite.foreign.text import open_compressed

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "check_parquet",
    "decode_text",
    "is_text_column",
    "read_csv",
    "refuse_other_formats",
    "refuse_other_separator",
]

_MOST_FIELDS = 10_000  # of a line of a table
_CHUNK = 1 << 20


def read_csv(path: str | Path, **options: Any) -> pd.DataFrame:
    """Read a table of comma-separated values, also compressed, with pandas.

    Only an empty cell is missing: ``NA``, ``None``, ``null`` and the like are names, as they are in
    any other format.

    Args:
        path: The file.
        options: Options of ``pandas.read_csv``.

    Raises:
        ValueError: The file is of another format, a line has more than 10,000 fields or more of
            them than the header, the header names a column twice, or quotes do not enclose fields.
        Exception: What pandas raises.
    """
    import pandas as pd

    with open_compressed(path) as file:
        content = file.read()
    refuse_other_formats(content)
    widest = max((line.count(b",") for line in content.splitlines()), default=0)
    if widest > _MOST_FIELDS:
        raise ValueError(f"a line has {widest:,} fields")
    _refuse_stray_quotes(content)
    table: pd.DataFrame = pd.read_csv(
        io.BytesIO(content), compression=None, keep_default_na=False, na_values=[""], **options
    )
    _refuse_unclear_header(content, list(table.columns))
    if "index_col" not in options and not isinstance(table.index, pd.RangeIndex):
        raise ValueError("lines have more fields than the header")
    return table


#: How files begin that are often given instead of a table of comma-separated values.
_OTHER_FORMATS = {
    b"PK\x03\x04": "a spreadsheet (.xlsx, .ods) or another zip",
    b"\xd0\xcf\x11\xe0": "a spreadsheet (.xls)",
    b"PAR1": "parquet, which needs the ending .parquet",
    codecs.BOM_UTF16_LE: "text in UTF-16",
    codecs.BOM_UTF16_BE: "text in UTF-16",
    b"\x1f\x8b": "compressed by gzip",
    b"%PDF-": "a PDF",
}


def refuse_other_formats(content: bytes, expected: str = "comma-separated values in UTF-8") -> None:
    """Refuse what is no text in UTF-8, by how it begins.

    Args:
        content: Of the file, or its beginning.
        expected: What the error says that it is not.

    Raises:
        ValueError: It is a spreadsheet, a zip, parquet, gzip, a PDF or text in UTF-16.
    """
    for start, name in _OTHER_FORMATS.items():
        if content.startswith(start):
            raise ValueError(f"it is {name}, not {expected}")


def decode_text(content: bytes) -> str:
    r"""Decode text in UTF-8, with or without a mark of byte order; lines end with ``\n``.

    Raises:
        ValueError: It is something else, whose characters would be others.

    Example:
        >>> decode_text(b"\xef\xbb\xbf7\r\n8")
        '7\n8'
    """
    refuse_other_formats(content, "text in UTF-8")
    if b"\0" in content:
        raise ValueError("it has zero bytes, as text in UTF-16 and data have, not text in UTF-8")
    return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def _refuse_stray_quotes(content: bytes) -> None:
    """Refuse a field that goes on behind its closing quote, which pandas would take.

    Two forgotten quotes otherwise make one field of all lines between them.

    Raises:
        ValueError: There is such a field.
    """
    if b'"' not in content:
        return
    lines = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
    try:
        for _ in lines:
            pass
    except csv.Error as error:
        raise ValueError(
            f"a quote is not closed or not doubled up to line {lines.line_num}: {error}"
        ) from error


def _refuse_unclear_header(content: bytes, columns: list[Any]) -> None:
    """Refuse a header that names a column twice, or whose fields another sign separates."""
    start = content[:_CHUNK].removeprefix(codecs.BOM_UTF8).decode("utf-8", "replace")
    lines = start.splitlines()
    names = next((row for row in csv.reader(lines) if any(row)), [])
    if twice := next((name for name in names if name and names.count(name) > 1), None):
        raise ValueError(f"it has two columns {twice[:80]!r}")
    refuse_other_separator(columns)


def refuse_other_separator(columns: Sequence[Any]) -> None:
    """Refuse a table of one column whose name holds another separator than a comma.

    Raises:
        ValueError: The name holds tabs or semicolons.
    """
    for sign, word in (("\t", "tabs"), (";", "semicolons")):
        if len(columns) == 1 and sign in str(columns[0]):
            raise ValueError(f"its fields are separated by {word}: separate them by commas")


def is_text_column(kind: Any) -> bool:
    """Tell whether a column of parquet of this Arrow type holds text, in any of Arrow's layouts."""
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return str(kind) in ("string", "large_string", "string_view")


def check_parquet(path: str | Path) -> None:
    """Refuse a parquet table whose rows are out of proportion to the file.

    Raises:
        ValueError: The rows are out of proportion to the file.
        Exception: What pyarrow raises.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as table:
        facts, size = table.metadata, os.path.getsize(path)
        cells = facts.num_rows * max(1, facts.num_columns)
        groups = [facts.row_group(k).total_byte_size for k in range(facts.num_row_groups)]
        limit = expansion_limit(size)
        if (
            facts.num_rows < 0
            or 8 * cells > limit
            or sum(groups) > limit
            or min(groups, default=0) < 0
        ):
            raise ValueError(f"{size:,} bytes say that they hold {facts.num_rows:,} rows")
