"""What a completed stack was made of, and the time of its traces in UTC."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fulgurite.domains.ice_layers.details import FlightDetails

__all__ = ["Origin", "gps_to_utc", "trace_times"]

Array = NDArray[np.float64]

# The days from whose beginning on UTC is one second more behind GPS time, which began in 1980.
# Source: IERS, Bulletin C; there has been none since 2017.
_LEAP_DAYS = (
    "1981-07-01", "1982-07-01", "1983-07-01", "1985-07-01", "1988-01-01", "1990-01-01",
    "1991-01-01", "1992-07-01", "1993-07-01", "1994-07-01", "1996-01-01", "1997-07-01",
    "1999-01-01", "2006-01-01", "2009-01-01", "2012-07-01", "2015-07-01", "2017-01-01",
)  # fmt: skip


def gps_to_utc(time: Array) -> Array:
    """Bring GPS time, counted from 1970 without leap seconds, to UTC [s since 1970].

    Shape: any to the same.

    Source: CReSIS toolbox, whose ``gps_time`` is ahead of UTC by the leap seconds since 1980.

    Example:
        >>> day = float(np.datetime64("2012-03-30", "s").astype(np.int64))
        >>> gps_to_utc(np.array([day + 15.0])) - day
        array([0.])
    """
    days = np.array(_LEAP_DAYS, "datetime64[s]").astype(np.float64)
    edges = days + np.arange(1, len(days) + 1)
    leaps = np.searchsorted(edges, time, side="right")
    return time - np.where(np.isfinite(time), leaps, 0.0)


def trace_times(details: FlightDetails) -> Array:
    """Time of each trace [s since 1970]: in UTC, or as it is where nothing says its scale."""
    assert details.time is not None
    return gps_to_utc(details.time) if details.time_scale == "GPS" else details.time


@dataclass(frozen=True)
class Origin:
    """What a completed stack was made of; empty where it is not known.

    Args:
        source: What the traces are.
        checkpoint: Name of the file of the completing model.
        checkpoint_sha256: SHA-256 of that file.
        age_source: Where ages of layers come from.
        climate_files: Names of the files of the climate model.
        attributes: Further attributes for NetCDF, such as ``license`` or ``institution``.
    """

    source: str = ""
    checkpoint: str = ""
    checkpoint_sha256: str = ""
    age_source: str = ""
    climate_files: tuple[str, ...] = ()
    attributes: Mapping[str, str] | None = None
