"""Picks of Koenig et al. (2016): text tables of up to 30 yearly layers.

Shapes: M traces, K = 30 layers of a table, L layers that are used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fulgurite.data.exclusions import check_exclude, name_some
from fulgurite.data.listing import list_files
from fulgurite.datamodules.ice_layers.climate.mar import MarClimate
from fulgurite.datamodules.ice_layers.flights import (
    FlightTrack,
    StackSource,
    order_traces,
    read_or_leave,
    report_dropped_traces,
    report_unreadable,
)
from fulgurite.datamodules.ice_layers.readers.layer_frames import parse_day
from fulgurite.datamodules.ice_layers.stack import (
    EXCLUDE,
    THICKEST,
    Array,
    Flights,
    check_thickest,
)
from fulgurite.datamodules.ice_layers.tracks.blocks import Blocks, assemble
from fulgurite.datamodules.ice_layers.tracks.travel_time import remove_crossed
from fulgurite.domains.ice_layers.details import FlightDetails
from fulgurite.errors import ConfigError, DataError
from fulgurite.foreign import reading
from fulgurite.io import data_path

__all__ = ["KoenigPicks", "read_picks"]

_OPTION = "--data.init_args.source.init_args"
_HEAD, _PER_LAYER = 6, 5
# a flight of 2009 or 2010 is named by its day alone
_DATE = re.compile(r"(?<!\d)((?:19|20)\d{6}(?:_\d{2})?)(?!\d)")
_FIRST_IS_SURFACE = 0.5  # of the typical distance of the first two picks


def read_picks(path: Path, from_bins: bool = False) -> dict[str, tuple[Array, Array, Array, Array]]:
    """Read a table of picks.

    Columns, between white space or commas: file, trace, latitude, longitude, time
    [s since 1970], range-bin step [s], and for each layer the pick [bin], its depth [m], its water
    equivalent, and depth and water equivalent of another density; -1 is missing, as is any other
    negative number, and 0 below the first pick.

    Args:
        path: ``mapdata*.txt``.
        from_bins: Return two-way travel times from the first bin instead of depths.

    Returns:
        For each segment (the ``YYYYMMDD_SS`` or ``YYYYMMDD`` in the file column) the numbers of
        the traces (M,), times (M,) [s], positions (M, 2) [degrees], and depths (M, K) [m] or times
        [s], NaN where missing.

    Raises:
        DataError: The table is damaged, or a line has another number of columns.

    Source: docs/papers/ice_layers.md section 3.2, item 3.
    """
    return {
        segment: (*_read_traces(table), _read_boundaries(table, from_bins))
        for segment, table in _read_tables(path).items()
    }


def _read_tables(path: Path) -> dict[str, Array]:
    """Columns behind the first one, by segment. Shape of each: (M, 5 + 5 K)."""
    rows: dict[str, list[list[float]]] = {}
    columns = 0
    with reading(path, "The picks", f"Set `{_OPTION}.files`."):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        words = re.split(r"[,\s]+", line.strip().strip(","))
        if not line.strip() or line.lstrip()[0] in "#%":
            continue
        if number == 1 and not _DATE.search(words[0]):
            continue  # names of columns
        columns = columns or len(words)
        layers, remainder = divmod(columns - _HEAD, _PER_LAYER)
        try:
            date = _DATE.search(words[0])
            if date is None or len(words) != columns or layers < 1 or remainder:
                raise ValueError
            values = [float(word) for word in words[1:]]
            if date[1] not in rows:
                parse_day(date[1])
        except ValueError:
            raise DataError(
                f"The line {number} of {path} is no line of picks ({len(words)} columns).",
                "A line has a file name with YYYYMMDD or YYYYMMDD_SS (of a day that exists), "
                f"{_HEAD - 1} numbers and {_PER_LAYER} for each layer: fetch the table again, or "
                f"leave such tables out: `{_OPTION}.exclude+=unreadable`.",
            ) from None
        rows.setdefault(date[1], []).append(values)
    if not rows:
        raise DataError(
            f"The table {path} holds no picks.",
            f"Set `{_OPTION}.files` to others, or `{_OPTION}.exclude+=unreadable`.",
        )
    return {segment: np.asarray(lines, np.float64) for segment, lines in rows.items()}


def _read_traces(table: Array) -> tuple[Array, Array, Array]:
    """Numbers (M,), times (M,) [s] and positions (M, 2) [degrees] of the traces of a table."""
    return table[:, 0], table[:, 3], table[:, 1:3]


def _read_boundaries(table: Array, from_bins: bool) -> Array:
    """Depths [m] or times [s] of the picks of a table, NaN where missing. Shape: (M, K)."""
    picks_of = table[:, _HEAD - 1 :].reshape(len(table), -1, _PER_LAYER)
    bins, depth = picks_of[..., 0], picks_of[..., 1]
    missing = (bins < 0) | (depth < 0) | ~np.isfinite(picks_of[..., :2]).all(-1)
    missing[:, 1:] |= (bins[:, 1:] == 0) | (depth[:, 1:] == 0)  # only the surface is at 0
    return np.where(missing, np.nan, bins * table[:, 4:5] if from_bins else depth)


class KoenigPicks(StackSource):
    """Stacks out of the picks that Koenig et al. published beside their accumulation map.

    Layers are a year apart. Depths are the published ones, or follow from range bins and the
    density of this project (``thickness: bins``).

    Args:
        files: ``mapdata*.txt`` tables, or folders of them, absolute or relative to
            ``FULGURITE_DATA``.
        climate: Source of the physical fields; null for none.
        count: L, number of layers to use, from the surface down.
        thickness: Source of thickness: the published ``depth``, or range ``bins``.
        blocks: How tracks are cut into stacks, and the density of their layers for ``bins``.
        surface: What the first layer begins at: the ``first_pick`` of a trace, as the toolbox's
            own reader of these tables has it, or depth ``zero``. If not given, the first pick is
            the surface where its median depth is less than half of that of the layer below, which
            is reported, and refused where flights differ in it. Range bins know no depth zero, so
            that they are refused where the first pick is not the surface.
        exclude: What to leave out and count instead of stopping: tables that are ``unreadable``,
            stacks ``outside_climate``.
        thickest: Largest plausible median of all observed thicknesses [m], above which they are
            taken to be in other units; more than a year's firn for layers of many years.

    Raises:
        ConfigError: An argument is out of range.

    Source: docs/papers/ice_layers.md section 3.2, item 3.
    """

    def __init__(
        self,
        files: list[str],
        climate: MarClimate | None = None,
        count: int = 20,
        thickness: Literal["depth", "bins"] = "depth",
        *,
        blocks: Blocks = Blocks(),
        exclude: list[str] = [],  # noqa: B006  # copied below
        thickest: float = THICKEST,
        surface: Literal["first_pick", "zero"] | None = None,
    ) -> None:
        if surface not in (None, "first_pick", "zero") or (
            surface == "zero" and thickness == "bins"
        ):
            raise ConfigError(
                f"The surface is {surface!r} for a thickness from {thickness}.",
                f"Set `{_OPTION}.surface` to first_pick, or to zero for a thickness from depth.",
            )
        if thickness not in ("depth", "bins") or count < 1:
            raise ConfigError(
                f"There are no {count} layers whose thickness is from {thickness!r}.",
                f"Set `{_OPTION}.count` to 1 or more, `thickness` to depth or bins.",
            )
        self.files = list(files)
        self.climate = climate
        self.count = count
        self.thickness = thickness
        self.surface = surface
        self.blocks, self.thickest = blocks, check_thickest(thickest)
        self.exclude = check_exclude(exclude, ("unreadable", "outside_climate"), EXCLUDE)

    @property
    def layers(self) -> int:
        """Number of layers."""
        return self.count

    @property
    def physics(self) -> tuple[str, ...]:
        """Names of the physical fields."""
        return () if self.climate is None else self.climate.physics

    @property
    def climate_files(self) -> tuple[str, ...]:
        """Names of the files of the climate model."""
        return () if self.climate is None else tuple(path.name for path in self.climate.paths())

    @property
    def age_source(self) -> str:
        """Where ages of layers come from."""
        return "layers are a year apart"

    @property
    def description(self) -> str:
        """What the traces are."""
        return "radar layer picks of Koenig et al. (2016)"

    def paths(self) -> list[Path]:
        """The tables, sorted.

        Raises:
            DataError: There is no table.
        """
        files: set[Path] = set()
        for name in self.files:
            path = data_path(name)
            if path.is_dir():
                tables = [file for _, file in list_files(path, (".txt",))]
                files |= {file for file in tables if file.name.startswith("mapdata")}
            else:
                files.add(path)
        if not files:
            raise DataError(
                f"There is no table mapdata*.txt at {name_some(self.files)}.",
                f"Set `{_OPTION}.files` to tables of picks or their folder.",
            )
        return sorted(files)

    def load(self) -> Flights:
        """Return the stacks.

        Raises:
            DataError: A table is damaged, has too few layers, or its times are unusable.
        """
        bins = self.thickness == "bins"
        parts: dict[str, list[tuple[Array, Array, Array, Array]]] = {}
        depths: dict[str, list[Array]] = {}
        damaged: list[str] = []
        widths: dict[Path, int] = {}
        for path in self.paths():
            tables = read_or_leave(_read_tables, path, self.exclude, damaged)
            for segment, table in (tables or {}).items():
                picks = _read_boundaries(table, bins)
                parts.setdefault(segment, []).append((*_read_traces(table), picks))
                depths.setdefault(segment, []).append(_read_boundaries(table, from_bins=False))
                widths[path] = picks.shape[1]
        surface, notes = self._choose_surface(depths)
        needed = self.count + (surface == "first_pick")
        for path, boundaries in widths.items():
            if boundaries < needed:
                raise DataError(
                    f"The table {path} has {boundaries} boundaries, not {needed}.",
                    f"Lower `{_OPTION}.count`.",
                )
        tracks: list[FlightTrack] = []
        crossed, lost = 0, np.zeros(2, np.int64)
        age = np.arange(1.0, self.count + 1)
        for segment in sorted(parts):  # which may be in several tables
            cut = [(*trace, picks[:, :needed]) for *trace, picks in parts[segment]]
            number, recorded_time, pos, picks = map(np.concatenate, zip(*cut, strict=True))
            if surface == "zero":
                picks = np.column_stack([np.zeros(len(picks)), picks])
            start, time = parse_day(segment), recorded_time
            is_usable = abs(float(np.median(recorded_time)) - start) < 3 * 86_400
            rows = _order_rows(number, recorded_time if is_usable else None, pos)
            time, recorded_time, pos, picks = (
                values[rows] for values in (time, recorded_time, pos, picks)
            )
            if not is_usable:
                # times of 2009 and 2010 are not usable: the name says the day
                # (docs/papers/ice_layers.md section 3.2)
                time = start + 43_200.0 + np.arange(len(recorded_time), dtype=np.float64)
            traces, pos, its_lost = order_traces(time, pos, recorded_time)
            lost += its_lost
            if len(traces):
                uncrossed, its_crossed = remove_crossed(picks[traces])
                crossed += its_crossed
                recorded = time[traces] if is_usable else None
                record = FlightDetails(time=recorded, time_scale="unknown")
                tracks.append(
                    FlightTrack(
                        segment, time[traces], pos, uncrossed, age, is_time=bins, record=record
                    )
                )
        excluded = [*report_unreadable(damaged), *report_dropped_traces(lost, crossed)]
        names = [f"layer_{k:02}" for k in range(1, self.count + 1)]
        return assemble(
            tracks,
            self.climate,
            self.blocks,
            layer_names=names,
            exclude=sorted(self.exclude),
            excluded=excluded,
            notes=notes,
            thickest=self.thickest,
        )

    def _choose_surface(self, depths: Mapping[str, Sequence[Array]]) -> tuple[str, list[str]]:
        """Choose the surface of the first layer; also notes for the report.

        Each flight says it by itself, so that what is read with it decides nothing.

        Args:
            depths: Segment -> the depths of the picks of its tables. Shape of each: (M, K).

        Raises:
            DataError: Flights say different things, or range bins are to be used where the first
                pick is not the surface.
        """
        if self.surface is not None:
            return self.surface, []
        flights: dict[str, str] = {}
        for segment, tables in sorted(depths.items()):
            if any(np.isfinite(picks).any() for picks in tables):
                first, second = _typical_depths(tables)
                is_surface = first < _FIRST_IS_SURFACE * second
                flights.setdefault("first_pick" if is_surface else "zero", segment)
        if len(flights) > 1:
            raise DataError(
                f"The first picks of flight {flights['first_pick']} are the surface by their "
                f"depth, those of flight {flights['zero']} are not, or nothing is below them.",
                f"Set `{_OPTION}.surface` to first_pick or zero, or read them apart.",
            )
        bins = self.thickness == "bins"
        first, second = _typical_depths([t for tables in depths.values() for t in tables])
        if not np.isfinite(second):  # there is no layer
            return ("first_pick" if bins else next(iter(flights), "zero")), []
        surface = next(iter(flights))
        is_surface = surface == "first_pick"
        if bins and not is_surface:
            raise DataError(
                f"The first picks lie at {first:.2f} m, the layer below is {second:.2f} m thick "
                "(medians): they are not the surface, whose range bin the table does not have.",
                f"Set `{_OPTION}.thickness=depth`, or `{_OPTION}.surface=first_pick` to take them "
                "for it.",
            )
        return surface, [
            f"the first picks lie at {first:.2f} m, the layer below is {second:.2f} m thick "
            f"(medians): they are taken for the {'surface' if is_surface else 'first layer'} "
            f"(surface={surface})"
        ]


def _order_rows(number: Array, time: Array | None, pos: Array) -> NDArray[np.int64]:
    """Order of a flight's lines: by time, in which several traces share a second, and number.

    Without times by number, if every trace has one of its own, and otherwise as the lines are.

    Args:
        number: Number of each trace, as the table has it. Shape: (M,).
        time: Time of each trace [s]. Shape: (M,).
        pos: Latitude and longitude [degrees]. Shape: (M, 2).
    """
    if time is not None:
        return np.lexsort((number, time))
    traces = np.unique(np.column_stack([number, pos]), axis=0)  # lines that come twice are one
    is_known = np.isfinite(number).all() and len(np.unique(number)) == len(traces)
    return np.argsort(number, kind="stable") if is_known else np.arange(len(number))


def _typical_depths(tables: Sequence[Array]) -> tuple[float, float]:
    """Medians of the first picks' depth and of the layer below, NaN where nothing is picked."""
    first = _median_of([picks[:, 0] for picks in tables])
    second = _median_of([picks[:, 1] - picks[:, 0] for picks in tables if picks.shape[1] > 1])
    return first, second


def _median_of(parts: Sequence[Array]) -> float:
    """The median of finite values, NaN where there is none."""
    values = np.concatenate([part[np.isfinite(part)] for part in parts]) if parts else np.zeros(0)
    return float(np.median(values)) if values.size else float("nan")
