"""What is known of traces beside their layers, brought from raw traces to those of stacks.

Shapes: M raw traces, N traces of a stack, K = L + 1 boundaries (the surface first), L layers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from fulgurite.datamodules.ice_layers.tracks.resample import Array, resample
from fulgurite.datamodules.ice_layers.tracks.travel_time import LIGHT, thickness_to_time
from fulgurite.domains.ice_layers.details import FlightDetails
from fulgurite.domains.ice_layers.spans import ArraySpans

__all__ = ["describe_completed", "resample_details", "times_below"]


def resample_details(
    details: FlightDetails, distance: Array, rows: slice, positions: Array
) -> FlightDetails:
    """Resample what is known of raw traces to positions along an uninterrupted part of the track.

    Time and elevation are linear between raw traces, the surface is resampled as layers are, and
    the frame is that of the nearest raw trace.

    Args:
        details: What is known of the raw traces of the segment.
        distance: Distance of the part's raw traces from its first one [m]. Shape: (M,).
        rows: The part's raw traces.
        positions: Positions along the part [m]. Shape: (N,).
    """
    right = np.clip(np.searchsorted(distance, positions), 1, len(distance) - 1)
    is_left = positions - distance[right - 1] <= distance[right] - positions
    nearest = rows.start + np.where(is_left, right - 1, right)

    def linear(values: Array | None) -> Array | None:
        return None if values is None else np.interp(positions, distance, values[rows])

    surface = details.surface
    return FlightDetails(
        time=linear(details.time),
        time_scale=details.time_scale,
        elevation=linear(details.elevation),
        surface=None if surface is None else resample(distance, surface[rows], positions),
        frame=None if details.frame is None else details.frame[nearest],
        trace=None if details.trace is None else details.trace[nearest],
    )


def times_below(details: FlightDetails, thickness: Array, spans: ArraySpans) -> Array:
    """Two-way travel time from the surface to each boundary of a completed stack [s].

    Between two picked boundaries it is what was measured, also where layers between them are left
    missing.

    Args:
        details: What is known of the stack, with its density.
        thickness: Completed thickness [m], NaN where it is left missing. Shape: (N, L).
        spans: Measured spans.

    Returns:
        NaN where it is unknown. Shape: (N, K).
    """
    assert details.density is not None
    rows, layers = np.arange(len(thickness)), thickness.shape[1]
    steps = thickness_to_time(thickness, details.density)
    below = np.zeros((len(thickness), layers + 1))
    for k in range(layers):
        below[:, k + 1] = below[:, k] + steps[:, k]
        start = spans.start[:, k]
        is_last = np.ones(len(rows), np.bool_) if k + 1 == layers else spans.start[:, k + 1] > k
        measured = below[rows, start] + spans.path[:, k] * 2.0 / LIGHT
        below[:, k + 1] = np.where(is_last & spans.known[:, k], measured, below[:, k + 1])
    return below


def describe_completed(
    details: FlightDetails, thickness: Array, spans: ArraySpans
) -> FlightDetails:
    """What is known of the traces of a completed stack.

    Args:
        details: What is known of the stack as it was read.
        thickness: Completed thickness [m], NaN where it is left missing. Shape: (N, L).
        spans: Measured spans.

    Returns:
        The arrays of which anything is known, with the travel time of each boundary instead of the
        surface's.
    """
    unknown: dict[str, Any] = {
        name: None
        for name, values in details.arrays().items()
        if values.dtype.kind != "U" and not np.isfinite(values).any()
    }
    twtt = None
    if details.surface is not None and details.density is not None and "surface" not in unknown:
        twtt = details.surface[:, None] + times_below(details, thickness, spans)
    known = replace(replace(details, **unknown), surface=None, run=None, twtt=twtt)
    return replace(known, time_scale="" if known.time is None else known.time_scale)
