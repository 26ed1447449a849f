"""What a completed stack carries beside its layers: its place in the flight, and what made it.

Axes: N traces, L layers (newest first), K = L + 1 boundaries (the surface first).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fulgurite.errors import DataError

__all__ = ["FlightDetails", "Origin", "gps_to_utc"]

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


@dataclass(frozen=True, eq=False)
class FlightDetails:
    """What is known of the traces of a stack; None where the source does not say it.

    Args:
        time: Time of each trace [s since 1970], as in the files. Shape: (N,), float64.
        time_scale: ``GPS``, or ``unknown``; empty without a time.
        elevation: Elevation of the radar above the ellipsoid [m]. Shape: (N,), float64.
        flight_distance: Distance along the segment's track from its first trace [m].
            Shape: (N,), float64.
        frame: Name of the frame of the nearest trace in the files. Shape: (N,), text.
        trace: Number of that trace in its frame, from 1. Shape: (N,), int64.
        density: Density with which travel time was converted to thickness [g cm⁻³].
            Shape: (N, L), float64.
        twtt: Two-way travel time of each boundary [s]. Shape: (N, K), float64.
        picked: Whether each boundary was picked. Shape: (N, K), bool.
    """

    time: Array | None = None
    time_scale: str = ""
    elevation: Array | None = None
    flight_distance: Array | None = None
    frame: NDArray[np.str_] | None = None
    trace: NDArray[np.int64] | None = None
    density: Array | None = None
    twtt: Array | None = None
    picked: NDArray[np.bool_] | None = None

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays that there are, by name."""
        every = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in every.items() if isinstance(value, np.ndarray)}

    def check(self, stack: str, traces: int, layers: int) -> None:
        """Refuse arrays that do not fit a stack.

        Raises:
            DataError: An array has another shape.
        """
        shapes: dict[str, tuple[int, ...]] = {
            "density": (traces, layers),
            "twtt": (traces, layers + 1),
            "picked": (traces, layers + 1),
        }
        for name, value in self.arrays().items():
            if value.shape != (expected := shapes.get(name, (traces,))):
                raise DataError(
                    f"The completed stack {stack} has {name} of shape {value.shape}, not "
                    f"{expected}.",
                    "Give arrays of one number of traces and layers.",
                )


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
