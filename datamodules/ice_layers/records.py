"""Arrays of the traces of a flight beside its layers, which completed stacks carry on.

Shapes: M raw traces, N traces of a stack, K = L + 1 boundaries (the surface first), L layers.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fulgurite.datamodules.ice_layers.resample import Array, resample
from fulgurite.datamodules.ice_layers.spans import MeasuredSpans
from fulgurite.datamodules.ice_layers.travel_time import LIGHT, thickness_to_time

__all__ = ["TraceRecord", "TrackRecord"]


@dataclass(frozen=True, eq=False)
class TrackRecord:
    """Further arrays of the raw traces of a flight segment; None where the files have none.

    Attributes:
        time: Time of each trace [s since 1970], as in the files. Shape: (M,).
        time_scale: ``GPS``, or ``unknown``.
        elevation: Elevation of the radar [m], NaN where it is unknown. Shape: (M,).
        surface: Two-way travel time of the surface [s], NaN where it is not picked. Shape: (M,).
        frames: Names of the frames.
        frame: Number of each trace's frame. Shape: (M,).
        trace: Number of the trace in its frame, from 1 as MATLAB counts. Shape: (M,).
    """

    time: Array | None = None
    time_scale: str = "unknown"
    elevation: Array | None = None
    surface: Array | None = None
    frames: tuple[str, ...] = ()
    frame: NDArray[np.int64] | None = None
    trace: NDArray[np.int64] | None = None

    def resample(
        self, distance: Array, rows: slice, positions: Array, first: float, run: int
    ) -> TraceRecord:
        """Resample the arrays to positions along an uninterrupted part of the track.

        Time and elevation are linear between raw traces, the surface is resampled as layers are,
        and the frame is that of the nearest raw trace.

        Args:
            distance: Distance of the part's raw traces from its first one [m]. Shape: (M,).
            rows: The part's raw traces.
            positions: Positions along the part [m]. Shape: (N,).
            first: Where the part begins along the segment's track [m].
            run: Number of the part.
        """
        right = np.clip(np.searchsorted(distance, positions), 1, len(distance) - 1)
        is_left = positions - distance[right - 1] <= distance[right] - positions
        nearest = rows.start + np.where(is_left, right - 1, right)

        def linear(values: Array | None) -> Array | None:
            return None if values is None else np.interp(positions, distance, values[rows])

        return TraceRecord(
            run=run,
            flight_distance=first + positions,
            time=linear(self.time),
            time_scale=self.time_scale,
            elevation=linear(self.elevation),
            surface=None
            if self.surface is None
            else resample(distance, self.surface[rows], positions),
            frame=None if self.frame is None else np.array(self.frames)[self.frame[nearest]],
            trace=None if self.trace is None else self.trace[nearest],
        )


@dataclass(frozen=True, eq=False)
class TraceRecord:
    """Further arrays of the traces of a stack; None where the source has none.

    Attributes:
        run: Number of the uninterrupted part of the segment that the stack lies on.
        flight_distance: Distance along the segment's track from its first trace [m]. Shape: (N,).
        time: Time of each trace [s since 1970], as in the files. Shape: (N,).
        time_scale: ``GPS``, or ``unknown``.
        elevation: Elevation of the radar [m]. Shape: (N,).
        surface: Two-way travel time of the surface [s], NaN where it is not picked. Shape: (N,).
        frame: Name of the frame of the nearest raw trace. Shape: (N,), text.
        trace: Number of that trace in its frame, from 1. Shape: (N,).
        density: Density with which travel time was converted to thickness [g cm⁻³].
            Shape: (N, L).
    """

    run: int
    flight_distance: Array
    time: Array | None = None
    time_scale: str = "unknown"
    elevation: Array | None = None
    surface: Array | None = None
    frame: NDArray[np.str_] | None = None
    trace: NDArray[np.int64] | None = None
    density: Array | None = None

    def __getitem__(self, rows: slice) -> TraceRecord:
        """Return the record of some traces."""
        parts: dict[str, Any] = {name: values[rows] for name, values in self._arrays().items()}
        return replace(self, **parts)

    def _arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays that there are, by name."""
        every = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: values for name, values in every.items() if isinstance(values, np.ndarray)}

    def times_below(self, thickness: Array, spans: MeasuredSpans) -> Array:
        """Two-way travel time from the surface to each boundary of a completed stack [s].

        Between two picked boundaries it is what was measured, also where layers between them are
        left missing.

        Args:
            thickness: Completed thickness [m], NaN where it is left missing. Shape: (N, L).
            spans: Measured spans.

        Returns:
            NaN where it is unknown. Shape: (N, K).
        """
        assert self.density is not None
        rows, layers = np.arange(len(thickness)), thickness.shape[1]
        steps = thickness_to_time(thickness, self.density)
        below = np.zeros((len(thickness), layers + 1))
        for k in range(layers):
            below[:, k + 1] = below[:, k] + steps[:, k]
            start = spans.start[:, k]
            is_last = np.ones(len(rows), np.bool_) if k + 1 == layers else spans.start[:, k + 1] > k
            measured = below[rows, start] + spans.path[:, k] * 2.0 / LIGHT
            below[:, k + 1] = np.where(is_last & spans.known[:, k], measured, below[:, k + 1])
        return below

    def describe(self, thickness: Array, spans: MeasuredSpans) -> dict[str, Any]:
        """What is known of the traces of a completed stack, by name.

        Args:
            thickness: Completed thickness [m], NaN where it is left missing. Shape: (N, L).
            spans: Measured spans.

        Returns:
            The arrays of this record of which anything is known, but for ``surface``, with
            ``time_scale`` if there is a time, and ``twtt``, the two-way travel time of each
            boundary [s], NaN where it is unknown (N, K).
        """
        described: dict[str, Any] = {
            name: values
            for name, values in self._arrays().items()
            if values.dtype.kind == "U" or np.isfinite(values).any()
        }
        if "time" in described:
            described["time_scale"] = self.time_scale
        surface = described.pop("surface", None)
        if surface is not None and self.density is not None:
            described["twtt"] = surface[:, None] + self.times_below(thickness, spans)
        return described
