"""Measured lengths between picked boundaries, brought from raw traces to those of stacks.

Shapes: M raw traces, N traces of a stack, K = L + 1 boundaries, L layers (newest first).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fulgurite.datamodules.ice_layers.tracks.resample import Array, resample
from fulgurite.datamodules.ice_layers.tracks.travel_time import LIGHT, refractive_index
from fulgurite.domains.ice_layers.spans import ArraySpans, Spans

__all__ = ["find_completed_spans", "resample_spans", "to_optical_lengths"]


def to_optical_lengths(spans: ArraySpans, density: Array) -> ArraySpans:
    """Return spans whose ``path`` was a two-way travel time [s], as optical lengths [m].

    Args:
        spans: Spans of travel time.
        density: Density of the layers [g cm⁻³]. Shape: (N, L).
    """
    return Spans(spans.start, spans.path * LIGHT / 2.0, refractive_index(density))


def find_completed_spans(
    thickness: Array,
    picked: NDArray[np.bool_],
    density: Array | None = None,
    twtt: Array | None = None,
) -> ArraySpans:
    """Find what was measured of a completed stack: lengths between its picked boundaries.

    Args:
        thickness: Completed [m], NaN where left missing. Shape: (N, L).
        picked: Whether each boundary was picked. Shape: (N, K).
        density: Density that travel time became thickness with [g cm⁻³]; None where thickness
            itself was measured. Shape: (N, L).
        twtt: Two-way travel time of each boundary [s], by which lengths are known also where
            layers are left missing. Shape: (N, K).

    Example:
        >>> picked = np.array([[True, False, True, True, False]])
        >>> spans = find_completed_spans(np.array([[0.5, 0.7, 1.0, 0.9]]), picked)
        >>> spans.start, spans.path
        (array([[0, 0, 2, 3]]), array([[1.2, 1.2, 1. , nan]]))
    """
    index = np.ones_like(thickness) if density is None else refractive_index(density)
    rows, numbers = np.arange(len(thickness))[:, None], np.arange(thickness.shape[1])
    counted = Spans.of_depth(np.where(picked, np.arange(picked.shape[1]), np.nan))
    first, stop = counted.start, counted.start + counted.length
    steps = index * thickness
    below = np.zeros(picked.shape)
    below[:, 1:] = np.nan_to_num(steps).cumsum(1)
    unknown = np.zeros(picked.shape)
    unknown[:, 1:] = np.isnan(steps).cumsum(1)
    path = np.where(
        unknown[rows, stop] == unknown[rows, first], below[rows, stop] - below[rows, first], np.nan
    )
    if density is not None and twtt is not None:
        measured = (twtt[rows, stop] - twtt[rows, first]) * LIGHT / 2.0
        path = np.where(np.isfinite(measured), measured, path)
    path = np.where(counted.length == 1, steps, path)  # to the bit
    path = np.where(counted.known, path, np.nan)
    return Spans(np.where(np.isnan(path), numbers, first), path, index)


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
