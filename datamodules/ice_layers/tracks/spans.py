"""Measured lengths between picked boundaries, brought from raw traces to those of stacks.

Shapes: M raw traces, N traces of a stack, K = L + 1 boundaries, L layers (newest first).
"""

from __future__ import annotations

import numpy as np

from fulgurite.datamodules.ice_layers.tracks.resample import Array, resample
from fulgurite.datamodules.ice_layers.tracks.travel_time import LIGHT, refractive_index
from fulgurite.domains.ice_layers.spans import ArraySpans, Spans

__all__ = ["resample_spans", "to_optical_lengths"]


def to_optical_lengths(spans: ArraySpans, density: Array) -> ArraySpans:
    """Return spans whose ``path`` was a two-way travel time [s], as optical lengths [m].

    Args:
        spans: Spans of travel time.
        density: Density of the layers [g cm⁻³]. Shape: (N, L).
    """
    return Spans(spans.start, spans.path * LIGHT / 2.0, refractive_index(density))


def resample_spans(
    distance: Array, boundaries: Array, positions: Array
) -> tuple[Array, ArraySpans]:
    """Bring what is measured between boundaries to positions along the track.

    Differences of boundaries are resampled, not the boundaries: what all of them share, such as
    the height of the aircraft, varies more than a layer is thick.

    Args:
        distance: Distance of the raw traces along the track, rising [m]. Shape: (M,).
        boundaries: Depths or times in any unit, NaN where missing. Shape: (M, K).
        positions: Positions to resample to, rising [m]. Shape: (N,).

    Returns:
        The layers (N, L), NaN where missing, in the unit of the boundaries, and the spans, of
        which ``path`` is in this unit, and ``index`` 1.

    Source: inferred.

    Example:
        >>> boundaries = np.array([[0.0, 1.0, np.nan, 4.0]] * 3)
        >>> layers, spans = resample_spans(np.arange(3.0), boundaries, np.arange(3.0))
        >>> layers[0], spans.path[0], spans.start[0]
        (array([ 1., nan, nan]), array([1., 3., 3.]), array([0, 1, 1]))
    """
    layers = resample(distance, np.diff(boundaries, axis=1), positions)
    spans = Spans.of_thickness(layers, sums=True)
    start, path = spans.start.copy(), spans.path.copy()
    count, numbers = layers.shape[1], np.arange(layers.shape[1])
    measured_above = np.concatenate([np.zeros((len(layers), 1)), np.isfinite(layers).cumsum(1)], 1)
    free = np.zeros(len(layers), np.int64)  # layers above this one are in a span
    for first in range(count - 1):
        rows = np.flatnonzero(np.isnan(layers[:, first]) & (free <= first))
        if not rows.size:
            continue
        below = boundaries[:, first + 2 :] - boundaries[:, first : first + 1]
        sums = resample(distance, below, positions)[rows]
        measured = np.isfinite(sums)
        nearest = measured.argmax(1)
        stop = first + 2 + nearest
        # a mean over other traces than those of a layer within says nothing about the rest
        usable = measured.any(1) & (measured_above[rows, stop] == measured_above[rows, first])
        rows, stop = rows[usable], stop[usable]
        total = sums[usable, nearest[usable]]
        inside = (numbers >= first) & (numbers < stop[:, None])
        start[rows] = np.where(inside, first, start[rows])
        path[rows] = np.where(inside, total[:, None], path[rows])
        free[rows] = stop
    return layers, Spans(start, path, spans.index)
