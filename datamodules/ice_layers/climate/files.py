"""One NetCDF file of a regional climate model.

Shapes: T time steps, C grid cells.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fulgurite.data.exclusions import name_some
from fulgurite.datamodules.ice_layers.climate.grid import step_edges
from fulgurite.datamodules.ice_layers.stack import Array
from fulgurite.errors import DataError
from fulgurite.extras import optional_import
from fulgurite.foreign import reading
from fulgurite.hdf5 import NetcdfFile, NetcdfVariable, need_package

__all__ = ["ClimateFile", "check_same_grid", "read_steps"]

_OPTION = "--data.init_args.source.init_args.climate.init_args"
_TIMES = ("TIME", "time", "t")
_LEAVE_FIELD_OUT = f"Leave the field out of `{_OPTION}.variables`, or give files that have it."
_NAME_TIME = (
    f"Call the time of its steps {_TIMES[0]} or {_TIMES[1]}, or leave the file out of "
    f"`{_OPTION}.files`."
)
_COORDINATES = {"LAT": ("LAT", "latitude"), "LON": ("LON", "longitude"), "x": ("x",), "y": ("y",)}
_SAME = 1e-5  # of the largest coordinate: single precision has less
_FILLS = (999.0, -999.0, 9999.0, -9999.0)
# Calendars with days that are none of ours, and their days in a year
_STRETCHED = {"360_day": 360, "all_leap": 366, "366_day": 366}


def _to_float(values: Any) -> Array:
    """Values as float64, NaN where the file has none."""
    plain: Array = np.ma.filled(np.ma.asarray(values).astype(np.float64), np.nan)
    return plain


def _decode_days(plain: Array, units: str, calendar: str, *, is_monthly: bool) -> Array:
    """Decode a CF time axis [days since 1970].

    The last day of a month stays that where steps are months, though it be the 28th or the 30th of
    every February. Years of 360 or 366 days, in steps of less than a month, are stretched to the
    real one, since some of their days are none of ours.

    Raises:
        ValueError: A time is missing, or the units are unknown.
    """
    if not np.isfinite(plain).all():
        raise ValueError("a time is missing")
    netcdf = optional_import("netCDF4", "ice", "Reading climate fields")
    dates = np.asarray(netcdf.num2date(plain, units, calendar))
    decode = _calendar_day
    if is_monthly:
        decode = _day_of_month
    elif calendar.lower() in _STRETCHED:
        decode = _stretched_day
    days = [decode(date) for date in dates.ravel()]
    return np.asarray(days, np.float64).reshape(dates.shape or (1,))


def _is_monthly(steps: Array, units: str) -> bool:
    """Whether steps of a time axis are months or longer; that of a file of one step is."""
    return not steps.size or _month_in(units) <= float(np.median(np.abs(steps)))


def _month_in(units: str) -> float:
    """About a month, in a unit of time (27 days)."""
    word = units.split()[0].lower() if units.split() else ""
    for name, per_day in (("sec", 86_400.0), ("min", 1440.0), ("h", 24.0), ("month", 1 / 27)):
        if word.startswith(name):
            return 27 * per_day
    return 27.0


def _calendar_day(date: Any) -> float:
    first = np.datetime64(f"{date.year:04}-{date.month:02}-01", "D").astype(np.int64)
    return float(first + date.day - 1 + _part_of_day(date))


def _day_of_month(date: Any) -> float:
    """As :func:`_calendar_day`, but the last day of a month is that of ours."""
    month = np.datetime64(f"{date.year:04}-{date.month:02}", "M")
    last = float((month + 1).astype("datetime64[D]").astype(np.int64) - 1)
    if date.day == date.daysinmonth:
        return last + _part_of_day(date)
    return min(_calendar_day(date), last + _part_of_day(date))


def _stretched_day(date: Any) -> float:
    start, end = (
        float(np.datetime64(f"{year:04}-01-01", "D").astype(np.int64))
        for year in (date.year, date.year + 1)
    )
    passed = date.dayofyr - 1 + _part_of_day(date)
    return float(start + passed / _STRETCHED[date.calendar] * (end - start))


def _part_of_day(date: Any) -> float:
    return float((date.hour + (date.minute + date.second / 60) / 60) / 24)


def _mask_fill_values(values: Any, is_axis: bool = False) -> Array:
    """Values as float64, NaN at every kind of fill value; on an axis 999 is a value as any.

    Source: docs/papers/ice_layers.md section 3.3.
    """
    plain = _to_float(values)
    is_fill = np.abs(plain) >= 1e30
    return np.where(is_fill if is_axis else is_fill | np.isin(plain, _FILLS), np.nan, plain)


class ClimateFile:
    """One NetCDF file; in its context it is opened once for all readings."""

    def __init__(self, path: Path) -> None:
        self.path = path
        again = f"Fetch it again, or set `{_OPTION}.files` to others."
        with reading(path, "The climate file", again):
            try:
                self.dataset = NetcdfFile(path)
            except ImportError as error:
                raise need_package(error, "Reading climate fields") from error

    def __enter__(self) -> ClimateFile:
        self.dataset.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.dataset.__exit__(*error)

    def find(self, names: Iterable[str]) -> NetcdfVariable | None:
        """The first variable of these names (capitals do not matter), or None."""
        variables = {name.lower(): v for name, v in self.dataset.variables.items()}
        return next((variables[name.lower()] for name in names if name.lower() in variables), None)

    def need(
        self, names: Sequence[str], subject: str, hint: str = _LEAVE_FIELD_OUT
    ) -> NetcdfVariable:
        """The first variable of these names; its absence is an error.

        Args:
            names: The names; capitals do not matter.
            subject: What the variable is of, for the error.
            hint: What to do about its absence.

        Raises:
            DataError: There is no such variable.
        """
        variable = self.find(names)
        if variable is None:
            raise DataError(
                f"The climate file {self.path} has no variable for {subject} ({', '.join(names)}).",
                hint,
            )
        return variable

    def read(
        self, variable: NetcdfVariable, first: bool = False, *, is_axis: bool = False
    ) -> Array:
        """Values of a variable, or of its first time step; NaN at fill values."""
        subject = f"The variable {variable.name} of the climate file"
        with reading(self.path, subject, "The file may be truncated: fetch it again."):
            values = _mask_fill_values(
                self.dataset.read(variable.name, first and variable.ndim > 2), is_axis
            )
            if not values.size:
                raise ValueError("it has no values")
            return values

    @property
    def has_time(self) -> bool:
        """Whether it has a time axis with a step, unlike a file of constants."""
        variable = self.find(_TIMES)
        return variable is not None and all(variable.shape)

    @cached_property
    def _time_axis(self) -> Array:
        """Values of the time, NaN where one is missing. Shape: all steps of the file."""
        return _mask_fill_values(
            self.dataset.read(self.need(_TIMES, "time", _NAME_TIME).name), True
        ).ravel()

    @property
    def _timed_steps(self) -> int:
        """Number of steps up to the last one that has a time; fields of later ones do not count."""
        timed = np.flatnonzero(np.isfinite(self._time_axis))
        return int(timed[-1]) + 1 if len(timed) else 0

    def times(self) -> tuple[Array, Array]:
        """Stamps (T,) of the steps and their CF bounds (T, 2), NaN without any [days since 1970].

        They rise, however the file has them, and values of :meth:`field` are in the same order.
        Missing stamps at the end, as files of a year that is not over have them, are left out.

        Raises:
            DataError: There is no time, or it cannot be understood.
        """
        stamps, edges = self._decoded_times
        return stamps[self._order], edges[self._order]

    @cached_property
    def _order(self) -> NDArray[np.int64]:
        """Numbers of the file's steps, by their time."""
        return np.argsort(self._decoded_times[0], kind="stable")

    @cached_property
    def _decoded_times(self) -> tuple[Array, Array]:
        """Stamps and bounds as in :meth:`times`, in the order of the file."""
        variable = self.need(_TIMES, "time", _NAME_TIME)
        attributes = variable.attributes
        bounds = self.dataset.variables.get(str(attributes.get("bounds")))
        hint = "Correct its values and its units (days since YYYY-MM-DD)."
        subject = "The time of the climate file"
        with reading(self.path, subject, hint, fault="cannot be understood"):
            if "units" not in attributes:
                raise ValueError("it has no units")
            decode = (str(attributes["units"]), str(attributes.get("calendar", "standard")))
            count = self._timed_steps
            plain = self._time_axis[:count]
            is_monthly = _is_monthly(np.diff(plain), decode[0])
            edges = np.full((count, 2), np.nan)
            if bounds is not None and count:
                # in the units of the time by CF, but some writers give them their own
                decode_bounds = (
                    str(bounds.attributes.get("units", decode[0])),
                    str(bounds.attributes.get("calendar", decode[1])),
                )
                plain_edges = _to_float(self.dataset.read(bounds.name))[:count]
                is_monthly = _is_monthly(np.diff(plain_edges), decode_bounds[0])
                edges = _decode_days(plain_edges, *decode_bounds, is_monthly=is_monthly)
            stamps = _decode_days(plain, *decode, is_monthly=is_monthly)
            if not len(stamps):
                raise ValueError("it has no step")
            name = attributes.get("bounds")
            if edges.shape != (len(stamps), 2):
                raise ValueError(f"its bounds {name} have the shape {edges.shape}")
            if (np.diff(edges[np.argsort(stamps, kind="stable")].ravel()) < 0).any():
                raise ValueError(f"its bounds {name} do not rise")
            if (edges[:, 1] == edges[:, 0]).any():
                raise ValueError(f"its bounds {name} hold a step of no length")
            if (np.abs(edges.mean(1) - stamps) > edges[:, 1] - edges[:, 0]).any():
                raise ValueError(f"its bounds {name} are of other times than its values")
        return stamps, edges

    @property
    def grid_mapping(self) -> Mapping[str, Any] | None:
        """Attributes by which CF says what projection ``x`` and ``y`` are of; None without any."""
        names = {"grid_mapping_name", "crs_wkt", "spatial_ref"}
        every = (variable.attributes for variable in self.dataset.variables.values())
        return next((attributes for attributes in every if names & set(attributes)), None)

    @cached_property
    def _axes(self) -> Mapping[str, NetcdfVariable]:
        """Variables that say where cells are: 2-D latitude and longitude, else ``x`` and ``y``."""
        axes = {name: self.find(names) for name, names in _COORDINATES.items()}
        known = {name: axis for name, axis in axes.items() if axis is not None}
        two_d: dict[str, NetcdfVariable] = {
            name: known[name] for name in ("LAT", "LON") if name in known
        }
        if len(two_d) == 2 and all(axis.ndim == 2 for axis in two_d.values()):
            return two_d
        return {name: known[name] for name in ("x", "y") if name in known}

    @cached_property
    def coordinates(self) -> Mapping[str, Array]:
        """Values of the variables that say where cells are, by ``LAT`` and ``LON`` or by axis."""
        return {name: self.read(axis, is_axis=True) for name, axis in self._axes.items()}

    def check_grid(self) -> None:
        """Refuse a file that does not say where its cells are.

        Raises:
            DataError: It has neither 2-D latitudes and longitudes nor ``x`` and ``y``.
        """
        if self._axes.keys() >= {"LAT", "LON"} or self._axes.keys() >= {"x", "y"}:
            return
        lat = self.find(_COORDINATES["LAT"])
        if lat is not None and lat.ndim == 1:
            raise DataError(
                f"The grid of the climate file {self.path} is one of latitudes and longitudes in "
                f"one dimension each ({lat.name}), not in two.",
                "Give each cell its own: `cdo setgridtype,curvilinear IN.nc OUT.nc`.",
            )
        raise DataError(
            f"The climate file {self.path} does not say where its cells are: it has no 2-D LAT and "
            "LON, and no x and y.",
            "Give files with these, such as MAR's and RACMO's own.",
        )

    def check_axes(self, variable: NetcdfVariable) -> None:
        """Refuse a field whose last two dimensions are those of the grid the other way round.

        Raises:
            DataError: They are, which its shape does not show on a square grid.
        """
        axes: tuple[str, ...] = ()
        if "LAT" in self._axes:
            axes = self._axes["LAT"].dimensions
        elif len(self._axes) == 2:
            axes = (*self._axes["y"].dimensions, *self._axes["x"].dimensions)
        if len(axes) == 2 and axes[0] != axes[1] and variable.dimensions[-2:] == axes[::-1]:
            raise DataError(
                f"The variable {variable.name} of {self.path} has the axes "
                f"{', '.join(variable.dimensions)}, and the grid {', '.join(axes)}.",
                "Give fields of time, y and x, or of time, sector, y and x.",
            )

    def field(self, variable: NetcdfVariable) -> Array:
        """Values (T, C); sectors (ice, tundra) are combined by their fractions.

        Source: docs/papers/ice_layers.md section 3.3.
        """
        values = self.read(variable)
        if values.ndim == 2:  # one field for all times
            return values.reshape(1, -1)
        if values.ndim == 4:
            fractions = self.find(("FRA",)) if values.shape[1] > 1 else None
            if (
                fractions is not None
                and fractions.ndim == 4
                and fractions.shape[1] == values.shape[1]
                and fractions.dimensions[1] == variable.dimensions[1]  # not levels of the air
            ):
                parts = np.where(np.isfinite(values), np.nan_to_num(self.read(fractions)), 0.0)
                total = parts.sum(1)
                mixed = (parts * np.nan_to_num(values)).sum(1)
                values = np.where(total > 0, mixed / np.where(total > 0, total, 1), np.nan)
            else:
                values = values[:, 0]  # the first sector is ice
        if values.ndim != 3:
            raise DataError(
                f"The variable {variable.name} of {self.path} has {variable.ndim} dimensions.",
                "Give fields of time, y and x, or of time, sector, y and x.",
            )
        steps = len(values) - (len(self._time_axis) - self._timed_steps)
        values = values[:steps].reshape(steps, -1)
        return values[self._order] if steps == len(self._order) else values


def read_steps(
    paths: list[Path], files: Mapping[Path, ClimateFile], names: Sequence[str]
) -> tuple[Array, NDArray[np.int64]]:
    """Read start and end of all steps in order [days], and each one's file, as ordered here.

    Args:
        paths: The files, which are put into the order of their steps; files of constants, without
            any time or any of the variables, are taken out.
        files: The opened file of each path.
        names: Variables of which a file has one at least.

    Returns:
        The steps (T, 2) and the number of each one's file (T,).

    Raises:
        DataError: A time cannot be understood, or files overlap.
    """
    parts, step_bounds = [], []
    timed = [path for path in paths if files[path].has_time]
    if not timed:
        files[paths[0]].times()  # raises the error that names what is missing
    # if no file has a variable, the error that names what is missing comes later
    usable = [path for path in timed if files[path].find(names) is not None] or timed
    if constants := [path for path in paths if path not in usable]:
        from lightning.pytorch.utilities import rank_zero_info

        rank_zero_info(
            "Climate files without time, or without any field of MAR, are left out: "
            f"{name_some(constants)}"
        )
        paths[:] = usable
    for path in paths:
        with files[path] as file:
            stamps, bounds = file.times()
        parts.append(stamps)
        step_bounds.append(bounds)
    times = np.concatenate(parts)
    order = np.argsort(times, kind="stable")
    of_step = np.repeat(np.arange(len(paths)), [len(part) for part in parts])[order]
    _check_apart(times[order], of_step, paths)
    first_steps = dict.fromkeys(of_step.tolist())  # files by name, steps by time
    rank = {number: i for i, number in enumerate(first_steps)}
    paths[:] = [paths[number] for number in rank]
    edges = np.concatenate(step_bounds)[order]
    steps = np.where(np.isfinite(edges), edges, step_edges(times[order]))
    return steps, np.array([rank[number] for number in of_step.tolist()])


def _check_apart(times: Array, of_step: NDArray[np.int64], paths: Sequence[Path]) -> None:
    """Refuse a step that comes twice, and files that have steps between those of another one.

    Args:
        times: Stamps in order [days since 1970]. Shape: (T,).
        of_step: Number of each step's file. Shape: (T,).
        paths: The files.

    Raises:
        DataError: There are such steps.
    """
    hint = (
        f"Set `{_OPTION}.files` so that each step is in one file, with all variables (`cdo merge` "
        "joins files of one variable each)."
    )
    if (twice := np.flatnonzero(np.diff(times) <= 0)).size:
        date = np.datetime64(int(times[twice[0]]), "D")
        first, second = (paths[int(number)] for number in of_step[twice[0] : twice[0] + 2])
        holders = f"file {first} holds" if first == second else f"files {first} and {second} hold"
        raise DataError(f"The climate {holders} the time step {date} twice.", hint)
    changes = np.flatnonzero(np.diff(of_step)) + 1
    started: set[int] = set()
    for step in [0, *changes.tolist()]:
        if int(of_step[step]) in started:
            pair = f"{paths[int(of_step[step - 1])]} and {paths[int(of_step[step])]}"
            raise DataError(f"The climate files {pair} overlap in time.", hint)
        started.add(int(of_step[step]))


def check_same_grid(file: ClimateFile, first: ClimateFile) -> None:
    """Refuse a file whose cells lie elsewhere than those of the first one.

    Args:
        file: An open file.
        first: The file that the grid was read from.

    Raises:
        DataError: Coordinates that both have differ, such as in their order.
    """
    for name in filter(first.coordinates.__contains__, file.coordinates):
        here, there = file.coordinates[name], first.coordinates[name]
        if here.shape == there.shape:
            scale = float(np.nanmax(np.abs(there), initial=0.0))
            if np.allclose(here, there, rtol=0.0, atol=_SAME * scale, equal_nan=True):
                continue
        raise DataError(
            f"The coordinate {name} of {file.path} is not that of {first.path}: the cells of "
            "their grids differ, or the order of these.",
            f"Set `{_OPTION}.files` to files of one grid.",
        )
