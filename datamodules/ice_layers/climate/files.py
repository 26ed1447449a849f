"""One NetCDF file of a regional climate model.

Shapes: T time steps, C grid cells.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fulgurite.datamodules.ice_layers.stack import Array
from fulgurite.errors import DataError
from fulgurite.extras import optional_import
from fulgurite.foreign import reading
from fulgurite.hdf5 import NetcdfFile, NetcdfVariable, need_package

__all__ = ["ClimateFile"]

_OPTION = "--data.init_args.source.init_args.climate.init_args"
_TIMES = ("TIME", "time", "t")
_FILLS = (999.0, -999.0, 9999.0, -9999.0)


def _to_float(values: Any) -> Array:
    """Values as float64, NaN where the file has none."""
    plain: Array = np.ma.filled(np.ma.asarray(values).astype(np.float64), np.nan)
    return plain


def _decode_days(plain: Array, units: str, calendar: str) -> Array:
    """Decode a CF time axis [days since 1970].

    A year of 360 days, in steps of less than a month, is stretched to the real one, since its
    30 February is no day of ours; months stay months.

    Raises:
        ValueError: A time is missing, or the units are unknown.
    """
    if not np.isfinite(plain).all():
        raise ValueError("a time is missing")
    netcdf = optional_import("netCDF4", "ice", "Reading climate fields")
    dates = np.asarray(netcdf.num2date(plain, units, calendar))
    steps = np.diff(plain.ravel())
    months_apart = steps.size and _month_in(units) <= float(np.median(np.abs(steps)))
    decode = _stretched_day if calendar == "360_day" and not months_apart else _calendar_day
    days = [decode(date) for date in dates.ravel()]
    return np.asarray(days, np.float64).reshape(dates.shape or (1,))


def _month_in(units: str) -> float:
    """About a month, in a unit of time (27 days)."""
    word = units.split()[0].lower() if units.split() else ""
    for name, per_day in (("sec", 86_400.0), ("min", 1440.0), ("h", 24.0), ("month", 1 / 27)):
        if word.startswith(name):
            return 27 * per_day
    return 27.0


def _calendar_day(date: Any) -> float:
    first = np.datetime64(f"{date.year:04}-{date.month:02}-01", "D").astype(np.int64)
    return float(first + date.day - 1 + (date.hour + date.minute / 60) / 24)


def _stretched_day(date: Any) -> float:
    start, end = (
        float(np.datetime64(f"{year:04}-01-01", "D").astype(np.int64))
        for year in (date.year, date.year + 1)
    )
    passed = 30 * (date.month - 1) + date.day - 1 + (date.hour + date.minute / 60) / 24
    return float(start + passed / 360 * (end - start))


def _mask_fill_values(values: Any) -> Array:
    """Values as float64, NaN at every kind of fill value.

    Source: docs/papers/ice_layers.md section 3.3.
    """
    plain = _to_float(values)
    return np.where((np.abs(plain) >= 1e30) | np.isin(plain, _FILLS), np.nan, plain)


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

    def need(self, names: Sequence[str], subject: str) -> NetcdfVariable:
        """The first variable of these names; its absence is an error.

        Raises:
            DataError: There is no such variable.
        """
        variable = self.find(names)
        if variable is None:
            raise DataError(
                f"The climate file {self.path} has no variable for {subject} ({', '.join(names)}).",
                f"Leave the field out of `{_OPTION}.variables`, or give files that have it.",
            )
        return variable

    def read(self, variable: NetcdfVariable, first: bool = False) -> Array:
        """Values of a variable, or of its first time step; NaN at fill values."""
        subject = f"The variable {variable.name} of the climate file"
        with reading(self.path, subject, "The file may be truncated: fetch it again."):
            values = _mask_fill_values(
                self.dataset.read(variable.name, first and variable.ndim > 2)
            )
            if not values.size:
                raise ValueError("it has no values")
            return values

    @property
    def has_time(self) -> bool:
        """Whether it has a time axis, unlike a file of constants."""
        return self.find(_TIMES) is not None

    @cached_property
    def _time_axis(self) -> Array:
        """Values of the time, NaN where one is missing. Shape: all steps of the file."""
        return _mask_fill_values(self.dataset.read(self.need(_TIMES, "time").name)).ravel()

    @property
    def _timed_steps(self) -> int:
        """Number of steps up to the last one that has a time; fields of later ones do not count."""
        timed = np.flatnonzero(np.isfinite(self._time_axis))
        return int(timed[-1]) + 1 if len(timed) else 0

    def times(self) -> tuple[Array, Array]:
        """Stamps (T,) of the steps and their CF bounds (T, 2), NaN without any [days since 1970].

        Missing stamps at the end, as files of a year that is not over have them, are left out.

        Raises:
            DataError: There is no time, or it cannot be understood.
        """
        variable = self.need(_TIMES, "time")
        attributes = variable.attributes
        bounds = self.dataset.variables.get(str(attributes.get("bounds")))
        hint = "Correct its values and its units (days since YYYY-MM-DD)."
        subject = "The time of the climate file"
        with reading(self.path, subject, hint, fault="cannot be understood"):
            if "units" not in attributes:
                raise ValueError("it has no units")
            decode = (str(attributes["units"]), str(attributes.get("calendar", "standard")))
            count = self._timed_steps
            stamps = _decode_days(self._time_axis[:count], *decode)
            if not len(stamps):
                raise ValueError("it has no step")
            edges = np.full((len(stamps), 2), np.nan)
            if bounds is not None:
                edges = _decode_days(_to_float(self.dataset.read(bounds.name))[:count], *decode)
            if edges.shape != (len(stamps), 2) or (np.diff(edges.ravel()) < 0).any():
                raise ValueError(f"its bounds {attributes['bounds']} do not rise")
            if (edges[:, 1] == edges[:, 0]).any():
                raise ValueError(f"its bounds {attributes['bounds']} hold a step of no length")
        return stamps, edges

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
        return values[:steps].reshape(steps, -1)
