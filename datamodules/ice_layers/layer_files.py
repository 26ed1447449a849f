"""Layer files of CReSIS and the Open Polar Radar: CSARP_layer and the older CSARP_layerData.

Shapes: M traces, K boundaries (the surface first), L = K - 1 layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fulgurite.datamodules.ice_layers.climate import MarClimate
from fulgurite.datamodules.ice_layers.flights import (
    Blocks,
    StackSource,
    Track,
    assemble,
    in_order,
    left_out_files,
    left_out_traces,
    read_or_leave,
)
from fulgurite.datamodules.ice_layers.matlab import parse_mat5
from fulgurite.datamodules.ice_layers.stack import (
    THICKEST,
    Array,
    Exclusion,
    Flights,
    check_exclude,
    name_some,
)
from fulgurite.datamodules.ice_layers.travel_time import layer_times
from fulgurite.errors import DataError
from fulgurite.foreign import expansion_limit, reading
from fulgurite.hdf5 import need_package, read_matlab73
from fulgurite.io import data_path

__all__ = ["Frame", "LayerFiles", "Organizer", "read_frame", "read_mat", "read_organizer"]

_OPTION = "--data.init_args.source.init_args"
_AGAIN = f"Fetch the file again, or leave such files out: `{_OPTION}.exclude+=unreadable`."
_Read = TypeVar("_Read")
_FRAME = re.compile(r"Data_(\d{8}_\d{2})_(\d{3})\.mat")


def read_mat(path: Path) -> dict[str, Any]:
    """Read a MATLAB file of any version, as MATLAB would show its arrays.

    Structures become dictionaries, cells lists, text strings. Version 7.3 (HDF5) is told by the
    file's content, not by its name.

    Raises:
        DataError: The file is missing, truncated or no MATLAB file.
        MissingExtraError: It is of version 7.3 and h5py is not installed.
    """
    with reading(path, "The layer file", _AGAIN, fault="cannot be read as MATLAB"):
        with open(path, "rb") as file:
            head = file.read(1024)
            if is_hdf5 := any(head[at : at + 8] == b"\x89HDF\r\n\x1a\n" for at in (0, 512)):
                content = b""
            elif head.startswith(b"MATLAB 7.3"):
                raise ValueError("it says that it is MATLAB 7.3, and holds no HDF5")
            else:
                content = head + file.read()
        try:
            variables = (
                read_matlab73(path)
                if is_hdf5
                else parse_mat5(content, expansion_limit(len(content)))
            )
        except ImportError as error:
            raise need_package(error, f"Reading {path.name} (MATLAB 7.3)") from error
    return variables


@dataclass(frozen=True)
class Frame:
    """Picks of one file.

    Attributes:
        time: [s since 1970]. Shape: (M,).
        pos: Latitude and longitude [degrees]. Shape: (M, 2).
        twtt: Two-way travel time [s], NaN where missing. Shape: (M, K).
        ids: Number of each boundary. Shape: (K,).
        names: Names of boundaries, where the file has them.
    """

    time: Array
    pos: Array
    twtt: Array
    ids: tuple[int, ...]
    names: tuple[str, ...] | None = None


def _need(content: dict[str, Any], names: Sequence[str], path: Path) -> Any:
    for name in names:
        if name in content:
            return content[name]
    raise DataError(
        f"The layer file {path} has no variable {names[0]!r}.",
        "Give files of CSARP_layer or CSARP_layerData. " + _AGAIN,
    )


def _numbers(value: Any, name: str, path: Path) -> Array:
    """A variable as an array of real numbers; an empty text is none."""
    try:
        array = np.asarray(() if isinstance(value, str) and not value else value)
        if array.size and array.dtype.kind not in "biufO":
            raise ValueError
        return array.astype(np.float64)
    except (ValueError, TypeError) as error:
        raise DataError(f"The variable {name} of {path} is not made of numbers.", _AGAIN) from error


def _row(content: dict[str, Any], names: Sequence[str], path: Path) -> Array:
    return _numbers(_need(content, names, path), names[0], path).ravel()


def _ids(content: dict[str, Any], name: str, path: Path) -> tuple[int, ...]:
    """Numbers of boundaries, each once."""
    found = _row(content, (name,), path)
    if not np.isfinite(found).all() or len(np.unique(found)) != len(found):
        raise DataError(
            f"The numbers {name} of the boundaries in {path} are {name_some(found, 12)}: one is "
            "missing or comes twice.",
            "Give every boundary a number of its own, or leave such files out: "
            f"`{_OPTION}.exclude+=unreadable`.",
        )
    return tuple(int(k) for k in found)


def read_frame(path: Path, quality: int | None = None) -> Frame:
    """Read a CSARP_layer or CSARP_layerData file.

    Args:
        path: ``Data_YYYYMMDD_SS_FFF.mat``, of any version.
        quality: Picks of a worse quality (1 good, 2 moderate, 3 derived) count as missing.

    Raises:
        DataError: It is damaged, lacks a variable, its arrays do not fit, or its times are not in
            seconds.
        MissingExtraError: It is of version 7.3 and h5py is not installed.

    Source: arXiv 2604.20783, card section 3.2, items 1 and 2.
    """
    content = read_mat(path)
    old = "layerData" in content
    time = _row(content, ("gps_time", "GPS_time"), path)
    lat, lon = _row(content, ("lat", "Latitude"), path), _row(content, ("lon", "Longitude"), path)
    if not len(time):
        raise DataError(f"The layer file {path} holds no trace.", _AGAIN)
    names: tuple[str, ...] | None = None
    if old:
        twtt, grades, names = _layer_data(content, len(time), path)
        ids: tuple[int, ...] = tuple(range(1, twtt.shape[1] + 1))
    else:
        twtt = _wide(_need(content, ("twtt",), path), len(time), path, "twtt").T
        ids = _ids(content, "id", path)
        grades = np.full(twtt.shape, 1.0)
        if "quality" in content:
            grades = _wide(content["quality"], len(time), path, "quality").T
    for what, count, wanted in (
        ("lat", len(lat), len(time)),
        ("lon", len(lon), len(time)),
        ("id", len(ids), twtt.shape[1]),
        ("quality", grades.size, twtt.size),
    ):
        if count != wanted:
            raise DataError(
                f"The variable {what} of {path} has {count} values, not {wanted}.", _AGAIN
            )
    twtt = np.where(np.isfinite(twtt) & (twtt > 0), twtt, np.nan)
    if quality is not None:
        twtt = np.where(grades <= quality, twtt, np.nan)
    found = twtt[np.isfinite(twtt)]
    if found.size and not 1e-9 < (middle := float(np.median(found))) < 1e-3:
        raise DataError(
            f"The median two-way travel time in {path} is {middle:g} s, which no aircraft "
            "measures.",
            "Convert travel times to seconds.",
        )
    return Frame(time, np.stack([lat, lon], 1), twtt, ids, names)


def _wide(values: Any, traces: int, path: Path, name: str) -> Array:
    """An array of (K, M), which a single boundary or trace may have flattened."""
    array = np.atleast_2d(_numbers(values, name, path))
    if array.shape[-1] != traces and array.shape[0] == traces:
        array = array.T
    if array.ndim != 2 or array.shape[-1] != traces:
        raise DataError(
            f"The variable {name} of {path} has shape {array.shape} for {traces} traces.", _AGAIN
        )
    return array


def _as_list(value: Any) -> list[Any]:
    if isinstance(value, np.ndarray):
        return list(value.ravel())
    return value if isinstance(value, list) else [value]


def _layer_data(
    content: dict[str, Any], traces: int, path: Path
) -> tuple[Array, Array, tuple[str, ...] | None]:
    """Picks of the old format: the automatic ones, and manual ones where there are any."""
    picks, grades, names = [], [], []
    for number, layer in enumerate(_as_list(content["layerData"]), 1):
        try:
            manual, automatic = (
                _numbers(value["data"], "layerData", path).ravel()
                for value in _as_list(layer["value"])
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError(
                f"The boundary {number} of layerData in {path} has no two sets of picks.", _AGAIN
            ) from error
        manual, automatic = (
            np.full(traces, np.nan) if not v.size else v for v in (manual, automatic)
        )
        if len(manual) != traces or len(automatic) != traces:
            raise DataError(
                f"The boundary {number} of layerData in {path} has {len(automatic)} picks for "
                f"{traces} traces.",
                _AGAIN,
            )
        picks.append(np.where(np.isfinite(manual), manual, automatic))
        grade = _numbers(layer.get("quality", np.ones(traces)), "quality", path).ravel()
        grades.append(grade if len(grade) == traces else np.ones(traces))
        names.append(str(layer["name"]) if isinstance(layer.get("name"), str) else "")
    if not picks:
        raise DataError(f"The layerData of {path} is empty.", _AGAIN)
    return np.stack(picks, 1), np.stack(grades, 1), tuple(names) if any(names) else None


@dataclass(frozen=True)
class Organizer:
    """Names, order and ages of boundaries: the companion ``layer_YYYYMMDD_SS.mat``.

    Attributes:
        names: Number of a boundary -> its name.
        order: Numbers from the surface down.
        age: Number of a boundary -> its age at the flight [years], where it is known.
    """

    names: dict[int, str]
    order: tuple[int, ...]
    age: dict[int, float]


def read_organizer(path: Path) -> Organizer:
    """Read the companion file of a segment.

    Raises:
        DataError: It is damaged or lacks ``lyr_id``.

    Source: arXiv 2604.20783, card section 3.2, item 1.
    """
    content = read_mat(path)
    ids = _ids(content, "lyr_id", path)
    names = [str(name) for name in _as_list(content.get("lyr_name", []))]
    ages = _numbers(content.get("lyr_age", []), "lyr_age", path).ravel()
    order = _numbers(content.get("lyr_order", []), "lyr_order", path).ravel()
    if len(order) != len(ids) or not np.isfinite(order).all():
        order = np.arange(len(ids), dtype=np.float64)
    return Organizer(
        dict(zip(ids, names, strict=True)) if len(names) == len(ids) else {},
        tuple(ids[k] for k in np.argsort(order, kind="stable")),
        {k: float(a) for k, a in zip(ids, ages, strict=True) if np.isfinite(a)}
        if len(ages) == len(ids)
        else {},
    )


class LayerFiles(StackSource):
    """Stacks of picked layers in CSARP_layer (new) or CSARP_layerData (old) files.

    Frames of a segment are put together by time, boundaries by their number, in the companion
    file's order where there is one; the first is the surface, and a boundary called ``bottom`` is
    left out. Without ages boundaries are taken to be a year apart.

    Args:
        layers: Folders or glob patterns of ``Data_YYYYMMDD_SS_FFF.mat``, absolute or relative to
            ``FULGURITE_DATA``.
        climate: Where physical fields come from; null for none.
        count: L, number of layers to use, from the surface down; files with fewer lack the deeper
            ones. Null for all, if all files have the same.
        traces: N, traces of a stack.
        spacing: Distance of traces [m]; the median one of the track if not given.
        min_traces: Shorter remainders are left out and counted; half of ``traces`` if not given.
        jump: A step of more than this times the median one ends a block.
        density: Of all layers [g cm⁻³]; if not given, Herron and Langway's for the climate's mass
            balance and temperature.
        quality: Picks of a worse quality (1 good, 2 moderate, 3 derived) count as missing.
        segments: Names of segments to use; all if not given.
        exclude: What to leave out and count instead of stopping: files that are ``unreadable``
            (without its companion, the boundaries of a segment are in the order of their numbers
            and a year apart), stacks ``outside_climate``, files with another ``layer_count``.
        thickest: Largest plausible median of all observed thicknesses [m], above which they are
            taken to be in other units; more than a year's firn for layers of many years.

    Raises:
        ConfigError: An argument is out of range.

    Source: arXiv 2604.20783, card sections 3.2 and 3.3.
    """

    def __init__(
        self,
        layers: list[str],
        climate: MarClimate | None = None,
        count: int | None = None,
        traces: int = 256,
        spacing: float | None = None,
        min_traces: int | None = None,
        jump: float = 5.0,
        density: float | None = None,
        quality: int | None = None,
        segments: list[str] | None = None,
        exclude: list[str] = [],  # noqa: B006  # copied below
        thickest: float = THICKEST,
    ) -> None:
        self.files = list(layers)
        self.climate = climate
        self.count = count
        self.blocks = Blocks(traces, spacing, min_traces, jump, density, thickest)
        self.quality = quality
        self.wanted = None if segments is None else list(segments)
        self.exclude = check_exclude(exclude, ("unreadable", "outside_climate", "layer_count"))

    @property
    def layers(self) -> int | None:
        """Number of layers, if ``count`` says it."""
        return self.count

    @property
    def physics(self) -> tuple[str, ...]:
        """Names of the physical fields."""
        return () if self.climate is None else self.climate.physics

    def paths(self) -> dict[str, list[Path]]:
        """Files of each segment, sorted.

        Raises:
            DataError: There is none, or a wanted segment is not there.
        """
        found: dict[str, set[Path]] = {}
        for given in self.files:
            place = data_path(given, must_exist=False)
            matches = (
                place.glob("**/Data_*.mat")
                if place.is_dir()
                else Path(place.anchor).glob(str(place.relative_to(place.anchor)))
            )
            for path in matches:
                if match := _FRAME.fullmatch(path.name):
                    found.setdefault(match[1], set()).add(path)
        if self.wanted is not None:
            if absent := sorted(set(self.wanted) - set(found)):
                raise DataError(
                    f"There is no flight segment {name_some(absent)} (there are "
                    f"{name_some(sorted(found)) or 'none'}).",
                    f"Set `{_OPTION}.segments` to names of folders in CSARP_layer.",
                )
            found = {name: found[name] for name in self.wanted}
        if not found:
            raise DataError(
                f"There is no layer file Data_YYYYMMDD_SS_FFF.mat at {name_some(self.files)}.",
                f"Set `{_OPTION}.layers` to folders or glob patterns of such files.",
            )
        return {name: sorted(paths, key=lambda p: p.name) for name, paths in sorted(found.items())}

    def tracks(self) -> tuple[list[Track], tuple[str, ...], list[Exclusion], list[str]]:
        """Read all picks: tracks, names of the layers, what was left out, and notes.

        Raises:
            DataError: Files are unusable, or have different numbers of layers.
        """
        read: dict[str, tuple[list[Frame], Organizer | None]] = {}
        damaged: list[str] = []

        def usable(read: Callable[[Path], _Read], path: Path) -> _Read | None:
            return read_or_leave(read, path, self.exclude, damaged)

        for segment, paths in self.paths().items():
            tried = [usable(lambda path: read_frame(path, self.quality), path) for path in paths]
            frames = [frame for frame in tried if frame is not None]
            if frames:
                companion = paths[0].with_name(f"layer_{segment}.mat")
                organizer = usable(read_organizer, companion) if companion.is_file() else None
                read[segment] = frames, organizer
        excluded = left_out_files(damaged)
        orders = {name: _order(frames, organizer) for name, (frames, organizer) in read.items()}
        count, dropped = self._layer_count(orders)
        if dropped:
            what = f"segments with another number of layers ({name_some(dropped)})"
            excluded.append(Exclusion("layer_count", what, len(dropped)))
        tracks, notes = [], []
        crossed = fewer = uneven = 0
        lost = np.zeros(2, np.int64)
        names: tuple[str, ...] = ()
        for segment, (frames, organizer) in read.items():
            if segment in dropped:
                continue
            order = orders[segment][: count + 1]
            fewer += len(order) < count + 1
            uneven += sum(not set(order) <= set(frame.ids) for frame in frames)
            track, its_crossed, its_lost = _track(segment, frames, order, count, organizer)
            crossed, lost = crossed + its_crossed, lost + its_lost
            tracks.append(track)
            if not names or len(order) == count + 1 > len(names):
                names = _layer_names(order, count, organizer)
        excluded += left_out_traces(lost, crossed)
        if uneven:
            notes.append(f"{uneven} files lack layers that others of their segment have: absent")
        if fewer:
            notes.append(f"{fewer} segments have fewer than {count} layers: the others are absent")
        if any(not np.array_equal(t.age, tracks[0].age) for t in tracks):
            notes.append("segments differ in the ages of layers: those of the first are reported")
        return tracks, names, excluded, notes

    def _layer_count(self, orders: dict[str, tuple[int, ...]]) -> tuple[int, set[str]]:
        """Number of layers, and segments that do not have it and are to be left out."""
        if not orders:
            return self.count or 1, set()
        counts = {name: len(order) - 1 for name, order in orders.items()}
        if self.count is not None:
            if self.count < 1:
                raise DataError(
                    f"The number of layers is {self.count}.", f"Set `{_OPTION}.count` to 1 or more."
                )
            return self.count, set()
        values = list(counts.values())
        most = max(sorted(set(values)), key=values.count)
        other = {name for name, found in counts.items() if found != most}
        if other and "layer_count" not in self.exclude:
            name = sorted(other)[0]
            same = next(n for n, found in counts.items() if found == most)
            raise DataError(
                f"The segment {name} has {counts[name]} layers, {same} has {most}.",
                f"Set `{_OPTION}.count` to the number to use, or leave such segments out: "
                f"`{_OPTION}.exclude+=layer_count`.",
            )
        if most < 1:
            raise DataError(
                "The layer files have one boundary, which encloses no layer.",
                f"Set `{_OPTION}.layers` to files with internal layers.",
            )
        return most, other

    def load(self) -> Flights:
        """Return the stacks.

        Raises:
            DataError: Files are missing or damaged and not to be left out.
            MissingExtraError: h5py, netCDF4 or pyproj is not installed.
        """
        return self.assemble(*self.tracks())

    def assemble(
        self,
        tracks: Sequence[Track],
        names: Sequence[str],
        excluded: Sequence[Exclusion] = (),
        notes: Sequence[str] = (),
    ) -> Flights:
        """Cut tracks into stacks, with the climate of this source."""
        words = sorted(self.exclude)
        return assemble(tracks, self.climate, self.blocks, names, words, excluded, notes)


def _order(frames: Sequence[Frame], organizer: Organizer | None) -> tuple[int, ...]:
    """Numbers of the boundaries of a segment from the surface down."""
    present = {k for frame in frames for k in frame.ids}
    names = dict(organizer.names) if organizer else {}
    for frame in frames:
        if frame.names is not None:
            names |= dict(zip(frame.ids, frame.names, strict=True))
    present -= {k for k in present if names.get(k, "").lower() == "bottom"}
    first = [k for k in (organizer.order if organizer else ()) if k in present]
    return (*first, *sorted(present - set(first)))


def _layer_names(order: Sequence[int], count: int, organizer: Organizer | None) -> tuple[str, ...]:
    """A layer is called like its lower boundary."""
    names = organizer.names if organizer else {}
    found = [names.get(k, "") or f"layer_{i:02}" for i, k in enumerate(order[1:], 1)]
    return (*found, *(f"layer_{i:02}" for i in range(len(found) + 1, count + 1)))


def _track(
    segment: str,
    frames: Sequence[Frame],
    order: Sequence[int],
    count: int,
    organizer: Organizer | None,
) -> tuple[Track, int, NDArray[np.int64]]:
    """Put frames together; also how many picks are crossed, and traces left out."""
    place = {k: i for i, k in enumerate(order)}
    parts = []
    for frame in frames:
        twtt = np.full((len(frame.time), count + 1), np.nan)
        for k, column in zip(frame.ids, frame.twtt.T, strict=True):
            if k in place:
                twtt[:, place[k]] = column
        parts.append(twtt)
    time = np.concatenate([frame.time for frame in frames])
    # frames overlap by a few traces
    traces, pos, lost = in_order(time, np.concatenate([frame.pos for frame in frames]))
    times, crossed = layer_times(np.concatenate(parts)[traces])
    return Track(segment, time[traces], pos, times, _ages(order, count, organizer)), crossed, lost


def _ages(order: Sequence[int], count: int, organizer: Organizer | None) -> NDArray[np.float64]:
    """Ages of the layers' lower boundaries [years]; a year apart where they are not known."""
    age = np.arange(1, count + 1, dtype=np.float64)
    known = organizer.age if organizer else {}
    found = np.array([known.get(k, np.nan) for k in order[1 : count + 1]])
    if len(found) and np.isfinite(found).all() and (np.diff(found, prepend=0.0) > 0).all():
        age[: len(found)] = found
        age[len(found) :] = found[-1] + np.arange(1, count - len(found) + 1)
    return age
