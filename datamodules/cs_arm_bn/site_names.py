"""Names of wells, sites and files of a plate table, of which several may mean one thing.

Shapes: R rows (sites) of the table.
"""

from __future__ import annotations

import itertools
import posixpath
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fulgurite.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "find_same_channel",
    "is_address",
    "name_wells",
    "refuse_alike_sites",
    "simplify_paths",
    "well_name",
]

# the scheme of an address has two characters or more: one is a drive of Windows
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_SITE = re.compile(r"0*(\d+?)(?:\.0+)?")
_WELL = re.compile(r"([A-Za-z]{1,2})0*([1-9]\d?)")


def well_name(text: str) -> str:
    """Return the name of a well with an upper-case row and a column of two digits.

    Names that are not a row and column are unchanged.

    Example:
        >>> [well_name(text) for text in ("A1", "a01", "AF048", "P24", "picture7", "A0")]
        ['A01', 'A01', 'AF48', 'P24', 'picture7', 'A0']
    """
    if match := _WELL.fullmatch(text):
        return f"{match[1].upper()}{int(match[2]):02}"
    return text


def name_wells(frame: pd.DataFrame, plate: Sequence[str], origin: str) -> pd.Series:
    """Return the column ``well`` with one spelling of each well (:func:`well_name`).

    Args:
        frame: One row for each site or well.
        plate: Columns that together name a plate.
        origin: Subject of the error message, such as ``The plate table``.

    Raises:
        DataError: A plate spells one well in two ways.
    """
    spelled = frame["well"]
    names = {text: well_name(text) for text in spelled.dropna().unique()}
    if all(text == name for text, name in names.items()):
        return spelled
    wells: pd.Series = spelled.map(names)
    pairs = frame[[*plate]].assign(well=wells, spelled=spelled).dropna().drop_duplicates()
    same = _find_equal_rows(pairs, [*plate, "well"])
    if len(same):
        raise DataError(
            f"{origin} spells one well of plate {'|'.join(same.iloc[0][[*plate]])} in two ways: "
            f"{' and '.join(same['spelled'])}.",
            "Spell each well of a plate in one way, A01 for example.",
        )
    return wells


def is_address(path: str) -> bool:
    r"""Tell whether a path is an address; a drive of Windows is none.

    Example:
        >>> is_address("s3://bucket/a.tif"), is_address("C://plates//a.tif"), is_address("/a://b")
        (True, False, False)
    """
    return _ADDRESS.match(path) is not None


def simplify_paths(paths: pd.Series) -> pd.Series:
    r"""Return paths in one spelling: ``a/./b``, ``a//b`` and ``a\\b`` are ``a/b``.

    Addresses (``s3://``) and empty cells are unchanged.

    Shape:
        - paths: (R,) -> (R,).
    """
    unusual = paths.str.contains(r"\\|//|(?:^|/)\.", na=False) & ~paths.str.match(
        _ADDRESS.pattern, na=False
    )
    if not unusual.any():
        return paths
    return paths.mask(
        unusual, paths[unusual].map(lambda path: posixpath.normpath(path.replace("\\", "/")))
    )


def refuse_alike_sites(frame: pd.DataFrame) -> None:
    """Refuse a well with one site under two names, such as 1 and 1.0 or 01.

    Args:
        frame: One row for each site, with the columns ``domain``, ``well`` and ``site``.

    Raises:
        DataError: A well has such sites.
    """
    numbers = {text: _simplify_site(text) for text in frame["site"].unique()}
    if len(set(numbers.values())) == len(numbers):
        return
    alike = frame.assign(number=frame["site"].map(numbers))
    same = _find_equal_rows(alike, ["domain", "well", "number"])
    if len(same):
        first = same.iloc[0]
        raise DataError(
            f"Well {first['well']} of plate {first['domain']} has the sites "
            f"{' and '.join(map(repr, same['site']))}, which are one.",
            "Keep one row for each site, and write its number in one way.",
        )


def _find_equal_rows(frame: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Return the first row that others equal in some columns, with these; empty for none."""
    repeated = frame[frame.duplicated(keys, keep=False)]
    if repeated.empty:
        return repeated
    return repeated[(repeated[keys] == repeated[keys].iloc[0]).all(axis=1)]


def _simplify_site(text: str) -> str:
    match = _SITE.fullmatch(text)
    return match[1] if match else text


def find_same_channel(
    frame: pd.DataFrame, channels: Sequence[str]
) -> tuple[NDArray[np.bool_], tuple[str, str]]:
    """Mark the sites that have one file for two channels.

    Returns:
        The mask of these sites, and the two channels of the first one.

    Shape:
        - (R,) bool.
    """
    paths = [
        simplify_paths(frame[f"path_{channel}"]).to_numpy(dtype=object) for channel in channels
    ]
    marked, pair, earliest = np.zeros(len(frame), np.bool_), ("", ""), len(frame)
    for (i, first), (k, second) in itertools.combinations(enumerate(paths), 2):
        same = np.asarray(first == second, np.bool_)
        marked |= same
        if same.any() and (row := int(same.argmax())) < earliest:
            earliest, pair = row, (channels[i], channels[k])
    return marked, pair
