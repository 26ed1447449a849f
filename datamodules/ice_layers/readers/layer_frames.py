"""One layer file of CReSIS and the Open Polar Radar, and the companion file of its segment.

Shapes: M traces, K boundaries (the surface first).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fulgurite.data.exclusions import name_some
from fulgurite.datamodules.ice_layers.readers.frame_units import check_degrees, check_seconds
from fulgurite.datamodules.ice_layers.readers.matlab import read_mat
from fulgurite.datamodules.ice_layers.stack import Array
from fulgurite.errors import DataError

__all__ = [
    "FRAME_NAME",
    "Frame",
    "Organizer",
    "check_day",
    "parse_day",
    "read_frame",
    "read_mat",
    "read_organizer",
]

#: Name of a layer file: the segment ``YYYYMMDD_SS`` and the number of the frame.
FRAME_NAME = re.compile(r"Data_(\d{8}_\d{2})_(\d{3})\.mat")

_OPTION = "--data.init_args.source.init_args"
_AGAIN = f"Fetch the file again, or leave such files out: `{_OPTION}.exclude+=unreadable`."
_GPS_EPOCH = 315_964_800.0  # 1980-01-06 [s since 1970]
_DAY = 86_400.0  # [s]
_NEAR = 3 * _DAY  # flights last over midnight
_GRADES = (1, 2, 3)  # good, moderate, derived
_KINDS = (1, 2, 3, 4)  # manual, automatic, and two more of the toolbox's
_GOOD, _MANUAL, _AUTOMATIC = 1.0, 1.0, 2.0  # what others count as


@dataclass(frozen=True)
class Frame:
    """Picks of one file.

    Attributes:
        time: Time of each trace [s since 1970]. Shape: (M,).
        pos: Latitude and longitude [degrees]. Shape: (M, 2).
        twtt: Two-way travel time [s], NaN where missing. Shape: (M, K).
        ids: Number of each boundary. Shape: (K,).
        names: Names of boundaries, where the file has them.
        name: Name of the frame, ``YYYYMMDD_SS_FFF``.
        elevation: Elevation of the radar [m], NaN where the file has none. Shape: (M,).
        grades: Quality of each pick: 1 good, 2 moderate, 3 derived. Shape: (M, K).
        kinds: Type of each pick: 1 manual, 2 automatic, or another of the toolbox's. Shape: (M, K).
    """

    time: Array
    pos: Array
    twtt: Array
    ids: tuple[int, ...]
    names: tuple[str, ...] | None = None
    name: str = ""
    elevation: Array | None = None
    grades: Array = field(default_factory=lambda: np.zeros((0, 0)))
    kinds: Array = field(default_factory=lambda: np.zeros((0, 0)))


@dataclass(frozen=True)
class Organizer:
    """Names, order and ages of boundaries: the companion ``layer_YYYYMMDD_SS.mat``.

    Attributes:
        names: Number of a boundary -> its name.
        order: Numbers from the surface down.
        age: Number of a boundary -> its age at the flight [years], where it is known.
        path: The file.
    """

    names: dict[int, str]
    order: tuple[int, ...]
    age: dict[int, float]
    path: Path


# --- days -----------------------------------------------------------------------------------------


def parse_day(segment: str) -> float:
    """Return the beginning of the day that a segment's name says [s since 1970].

    Raises:
        ValueError: There is no such day.

    Example:
        >>> parse_day("19700102_01")
        86400.0
    """
    day = np.datetime64(f"{segment[:4]}-{segment[4:6]}-{segment[6:8]}", "s")
    return float(day.astype(np.int64))


def check_day(time: Array, segment: str, path: Path) -> None:
    """Refuse times that are not of the day in the name of their segment.

    Args:
        time: Time of each trace [s since 1970]. Shape: (M,).
        segment: Name of the segment, which begins with YYYYMMDD.
        path: The file.

    Raises:
        DataError: The median time is more than three days off, or the name is of no day.

    Source: the times are those of a clock that counts from 1970 (toolbox, ``layerdata``).
    """
    try:
        start = parse_day(segment)
    except ValueError:
        raise DataError(
            f"The name of {path} is of no day.", "Call it Data_YYYYMMDD_SS_FFF.mat."
        ) from (None)
    finite = time[np.isfinite(time)]
    if not finite.size or abs(off := float(np.median(finite)) - start) < _NEAR:
        return
    how = "Convert gps_time to seconds since 1970"
    if abs(off + _GPS_EPOCH) < _NEAR:
        how = f"They count from 1980, as GPS does: add {_GPS_EPOCH:.0f} s to gps_time"
    side = "after" if off > 0 else "before"
    raise DataError(
        f"The times in {path} are {abs(off) / _DAY:,.0f} days {side} the day in its name.",
        f"{how}, or leave such files out: `{_OPTION}.exclude+=unreadable`.",
    )


# --- variables ------------------------------------------------------------------------------------


def _find_variable(content: dict[str, Any], names: Sequence[str], path: Path) -> Any:
    for name in names:
        if name in content:
            return content[name]
    raise DataError(
        f"The layer file {path} has no variable {names[0]!r}.",
        "Give files of CSARP_layer or CSARP_layerData. " + _AGAIN,
    )


def _to_numbers(value: Any, name: str, path: Path) -> Array:
    """A variable as an array of real numbers; an empty text is none."""
    try:
        array = np.asarray(() if isinstance(value, str) and not value else value)
        if array.size and array.dtype.kind not in "biufO":
            raise ValueError
        return array.astype(np.float64)
    except (ValueError, TypeError) as error:
        raise DataError(f"The variable {name} of {path} is not made of numbers.", _AGAIN) from error


def _read_vector(content: dict[str, Any], names: Sequence[str], path: Path) -> Array:
    return _to_numbers(_find_variable(content, names, path), names[0], path).ravel()


def _whole_numbers(content: dict[str, Any], name: str, path: Path) -> tuple[int, ...]:
    """Numbers of boundaries."""
    numbers = _read_vector(content, (name,), path)
    if not np.isfinite(numbers).all() or (numbers != np.round(numbers)).any():
        raise DataError(
            f"The numbers {name} of the boundaries in {path} are {name_some(numbers, 12)}: one is "
            "missing or no whole number.",
            "Give every boundary a number of its own, or leave such files out: "
            f"`{_OPTION}.exclude+=unreadable`.",
        )
    return tuple(int(k) for k in numbers)


def _by_boundary(values: Any, traces: int, boundaries: int, path: Path, *, name: str) -> Array:
    """An array of (M, K) out of one of (K, M), which a single boundary or trace has flattened."""
    array = np.atleast_2d(_to_numbers(values, name, path))
    if not boundaries and not array.size:
        return np.zeros((traces, 0))
    if array.shape[-1] != traces and array.shape[0] == traces:
        array = array.T
    if array.ndim != 2 or array.shape[-1] != traces:
        raise DataError(
            f"The variable {name} of {path} has shape {array.shape} for {traces} traces.", _AGAIN
        )
    return array.T


def _to_list(value: Any) -> list[Any]:
    if isinstance(value, np.ndarray):
        return list(value.ravel())
    return value if isinstance(value, list) else [value]


def _to_text(value: Any, subject: str, path: Path) -> str:
    """A name without blanks around it, empty where MATLAB has an empty array.

    Raises:
        DataError: The value is no text that can be read, such as MATLAB's class ``string``.
    """
    if isinstance(value, str):
        return value.strip()  # rows of a matrix of characters are filled up with blanks
    if isinstance(value, np.ndarray) and not value.size:
        return ""
    raise DataError(
        f"{subject} in {path} is no text, or of MATLAB's class string, which stores none that can "
        "be read.",
        "Save names as characters: lyr_name = cellstr(lyr_name).",
    )


# --- frames ---------------------------------------------------------------------------------------


def read_frame(path: Path, quality: int | None = None) -> Frame:
    """Read a CSARP_layer or CSARP_layerData file; one without layers has no boundary (K = 0).

    Args:
        path: ``Data_YYYYMMDD_SS_FFF.mat``, of any version.
        quality: Picks of a worse quality (1 good, 2 moderate, 3 derived) count as missing.

    Raises:
        DataError: The file is damaged, lacks a variable, its arrays do not fit, its times are not
            in seconds or not of the day in its name, or a boundary comes twice with other picks.
        MissingExtraError: The file is of version 7.3 and h5py is not installed.

    Source: the toolbox's ``layerdata``, as docs/papers/ice_layers.md section 3.2 has it.
    """
    content = read_mat(path)
    time = _read_vector(content, ("gps_time", "GPS_time"), path)
    lat, lon = (
        _read_vector(content, ("lat", "Latitude"), path),
        _read_vector(content, ("lon", "Longitude"), path),
    )
    if not len(time):
        raise DataError(f"The layer file {path} holds no trace.", _AGAIN)
    elevation = np.full(len(time), np.nan)
    if elevation_names := [name for name in ("elev", "Elevation") if name in content]:
        elevation = _read_vector(content, elevation_names, path)
    names: tuple[str, ...] | None = None
    if "layerData" in content:
        twtt, grades, kinds, names = _read_old_layers(content, len(time), path)
        ids: tuple[int, ...] = tuple(range(1, twtt.shape[1] + 1))
    else:
        ids = _whole_numbers(content, "id", path)
        twtt = _by_boundary(
            _find_variable(content, ("twtt",), path), len(time), len(ids), path, name="twtt"
        )
        grades = np.full(twtt.shape, _GOOD)
        if "quality" in content:
            grades = _by_boundary(content["quality"], len(time), len(ids), path, name="quality")
        kinds = _read_kinds(content, twtt, path)
    for variable, count, expected in (
        ("lat", len(lat), len(time)),
        ("lon", len(lon), len(time)),
        ("elev", len(elevation), len(time)),
        ("id", len(ids), twtt.shape[1]),
        ("quality", grades.size, twtt.size),
    ):
        if count != expected:
            raise DataError(
                f"The variable {variable} of {path} has {count} values, not {expected}.", _AGAIN
            )
    check_seconds(twtt, path)
    twtt = np.where(np.isfinite(twtt) & (twtt > 0), twtt, np.nan)
    grades = np.where(np.isin(grades, _GRADES), grades, _GOOD)  # as in the toolbox
    kinds = np.where(np.isin(kinds, _KINDS), kinds, _AUTOMATIC)
    if quality is not None:
        twtt = np.where(grades <= quality, twtt, np.nan)
    ids, columns = _join_doubled(ids, twtt, path)
    twtt, grades, kinds = (np.take_along_axis(v, columns, 1) for v in (twtt, grades, kinds))
    check_degrees(lat, lon, path)
    if match := FRAME_NAME.fullmatch(path.name):
        check_day(time, match[1], path)
    name = path.stem.removeprefix("Data_")
    pos = np.stack([lat, lon], 1)
    return Frame(time, pos, twtt, ids, names, name, elevation, grades, kinds)


def _read_kinds(content: dict[str, Any], twtt: Array, path: Path) -> Array:
    """Types of picks, automatic where the file has none that fit: only what is written needs them.

    Shape:
        - twtt: (M, K); the result too.
    """
    unknown: Array = np.full(twtt.shape, _AUTOMATIC)
    values = np.asarray(content.get("type", ()))
    # axes of length one may be gone
    shape, expected = (sorted(n for n in array.shape if n != 1) for array in (values, twtt))
    if values.dtype.kind not in "biuf" or shape != expected:
        return unknown
    return _by_boundary(values, len(twtt), twtt.shape[1], path, name="type")


def _join_doubled(
    ids: tuple[int, ...], twtt: Array, path: Path
) -> tuple[tuple[int, ...], NDArray[np.int64]]:
    """Join columns of boundaries that have one number, where their picks do not contradict.

    Shape:
        - twtt: (M, K).

    Returns:
        The different numbers, and which of the K columns each of them is from (M, their number).

    Raises:
        DataError: Picks of one boundary contradict each other.
    """
    columns: dict[int, NDArray[np.int64]] = {}
    picks: dict[int, Array] = {}
    for number, (k, column) in enumerate(zip(ids, twtt.T, strict=True)):
        indices = np.full(len(column), number)
        before = picks.setdefault(k, column)
        if (np.isfinite(before) & np.isfinite(column) & (before != column)).any():
            raise DataError(
                f"The boundary {k} comes twice in {path}, with different picks.",
                "Give every boundary a number of its own in `id`, or leave such files out: "
                f"`{_OPTION}.exclude+=unreadable`.",
            )
        is_new = np.isnan(before) & np.isfinite(column)
        columns[k] = np.where(is_new, indices, columns.get(k, indices))
        picks[k] = np.where(is_new, column, before)
    empty = np.zeros((len(twtt), 0), np.int64)
    return tuple(columns), np.stack(list(columns.values()), 1) if columns else empty


def _read_old_layers(
    content: dict[str, Any], traces: int, path: Path
) -> tuple[Array, Array, Array, tuple[str, ...] | None]:
    """Picks of the old format: the automatic ones, and manual ones where there are any.

    Returns:
        Travel times (M, K) [s], grades (M, K), types (M, K) and names, if there are any.
    """
    picks, grades, kinds, names = [], [], [], []
    for number, layer in enumerate(_to_list(content["layerData"]), 1):
        if not isinstance(layer, dict):
            raise DataError(f"The boundary {number} of layerData in {path} has no fields.", _AGAIN)
        manual, automatic = _read_pick_sets(layer, traces, number, path)
        is_manual = np.isfinite(manual) & (manual > 0)  # 0 and negative numbers are none
        picks.append(np.where(is_manual, manual, automatic))
        kinds.append(np.where(is_manual, _MANUAL, _AUTOMATIC))
        grade = _to_numbers(layer.get("quality", ()), "quality", path).ravel()
        grades.append(grade if len(grade) == traces else np.ones(traces))
        names.append(_to_text(layer.get("name", ""), f"The name of boundary {number}", path))
    if not picks:
        empty = np.zeros((traces, 0))
        return empty, empty, empty, None
    layer_names = tuple(names) if any(names) else None
    return np.stack(picks, 1), np.stack(grades, 1), np.stack(kinds, 1), layer_names


def _read_pick_sets(layer: dict[str, Any], traces: int, number: int, path: Path) -> list[Array]:
    """Manual and automatic picks of a boundary; either may be absent, as in the toolbox."""
    values = _to_list(layer.get("value", []))
    sets: list[Array] = []
    for value in values:
        if not isinstance(value, dict) or "data" not in value:
            raise DataError(
                f"The boundary {number} of layerData in {path} has a value without data.", _AGAIN
            )
        data = _to_numbers(value["data"], "layerData", path).ravel()
        sets.append(data if data.size else np.full(traces, np.nan))
    if len(sets) > 2 or any(len(picks) != traces for picks in sets):
        counts = " and ".join(str(len(picks)) for picks in sets)
        raise DataError(
            f"The boundary {number} of layerData in {path} has {counts} picks for {traces} traces.",
            _AGAIN,
        )
    return [*sets, *[np.full(traces, np.nan)] * (2 - len(sets))]


# --- companion files ------------------------------------------------------------------------------


def read_organizer(path: Path) -> Organizer:
    """Read the companion file of a segment.

    Raises:
        DataError: The file is damaged, lacks ``lyr_id``, or its lists do not fit the boundaries.

    Source: the toolbox's ``layerdata``, as docs/papers/ice_layers.md section 3.2 has it.
    """
    content = read_mat(path)
    ids = _whole_numbers(content, "lyr_id", path)
    if len(set(ids)) < len(ids):
        raise DataError(
            f"The numbers lyr_id of {path} are {name_some(ids, 12)}: one comes twice.",
            "Give every boundary a number of its own, or leave such files out: "
            f"`{_OPTION}.exclude+=unreadable`.",
        )
    listed = _to_list(content.get("lyr_name", []))
    if len(listed) != len(ids):
        raise DataError(
            f"The companion file {path} has {len(listed)} names lyr_name that can be read for "
            f"{len(ids)} boundaries.",
            "Save one for each, as characters: lyr_name = cellstr(lyr_name).",
        )
    names = [_to_text(name, "A name in lyr_name", path) for name in listed]
    ages, order = (
        _optional_numbers(content, name, len(ids), path) for name in ("lyr_age", "lyr_order")
    )
    return Organizer(
        dict(zip(ids, names, strict=True)),
        tuple(ids[k] for k in np.argsort(order, kind="stable")),  # unknown ones last, as MATLAB's
        {k: float(age) for k, age in zip(ids, ages, strict=True) if np.isfinite(age)},
        path,
    )


def _optional_numbers(content: dict[str, Any], name: str, count: int, path: Path) -> Array:
    """A number for each boundary, NaN where the file has none.

    Raises:
        DataError: The file has numbers of some boundaries alone.
    """
    values: NDArray[np.float64] = _to_numbers(content.get(name, ()), name, path).ravel()
    if values.size not in (0, count):
        raise DataError(
            f"The variable {name} of {path} has {values.size} values for {count} boundaries.",
            _AGAIN,
        )
    return values if values.size else np.full(count, np.nan)
