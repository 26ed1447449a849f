"""Traces along a flight line: distances, breaks at jumps, blocks, resampling.

Shapes: M raw traces, N resampled traces, `...` any.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fulgurite.domains.ice_layers.geodesy import MEAN_EARTH_RADIUS, haversine, to_vectors

__all__ = [
    "Array",
    "break_at_jumps",
    "cut_blocks",
    "great_circle_distance",
    "interpolate_positions",
    "is_in_hole",
    "measure_track",
    "resample",
]

Array = NDArray[np.float64]


def great_circle_distance(first: Array, second: Array) -> Array:
    """Distance on the sphere with the mean radius of the Earth [m].

    Shape:
        - first, second: (..., 2) latitude and longitude [degrees].

    Source: docs/papers/ice_layers.md section 1.2.

    Example:
        >>> great_circle_distance(np.array([70.0, -40.0]), np.array([71.0, -40.0])).round(-1)
        np.float64(111200.0)
    """
    return haversine(first, second, MEAN_EARTH_RADIUS)


def measure_track(pos: Array) -> Array:
    """Distance of each trace from the first one, along the track [m].

    Shape:
        - pos: (M, 2) latitude and longitude [degrees]; result (M,).

    Example:
        >>> measure_track(np.array([[70.0, 0.0], [70.0, 0.0], [70.001, 0.0]])).round(1)
        array([  0. ,   0. , 111.2])
    """
    steps = great_circle_distance(pos[:-1], pos[1:])
    return np.concatenate([[0.0], np.cumsum(steps)])


def interpolate_positions(distance: Array, pos: Array, positions: Array) -> Array:
    """Interpolate latitudes and longitudes on the great circle between neighbouring traces.

    So they are right across the date line and over a pole.

    Args:
        distance: Distance of the traces along the track, rising [m].
        pos: Latitude and longitude of the traces [degrees].
        positions: Distances to interpolate at, between the first and the last trace [m].

    Shape:
        - distance: (M,); pos: (M, 2); positions: (N,); result (N, 2), longitudes from -180 to 180.

    Source: inferred.

    Example:
        >>> pos = np.array([[0.0, 179.0], [0.0, -179.0]])
        >>> interpolate_positions(np.array([0.0, 1.0]), pos, np.array([0.0, 0.75])).round(6)
        array([[   0. ,  179. ],
               [   0. , -179.5]])
    """
    after = np.clip(np.searchsorted(distance, positions), 1, len(distance) - 1)
    before = after - 1
    gap = distance[after] - distance[before]
    weight = np.clip((positions - distance[before]) / np.where(gap > 0, gap, 1.0), 0.0, 1.0)[
        :, None
    ]
    a, b = to_vectors(pos[before]), to_vectors(pos[after])
    angle = np.linalg.norm(np.cross(a, b), axis=1, keepdims=True)
    angle = np.arctan2(angle, (a * b).sum(1, keepdims=True))
    safe = np.where(angle > 1e-8, angle, 1.0)
    weights = [
        np.where(angle > 1e-8, np.sin(part * safe) / np.sin(safe), part)
        for part in (1 - weight, weight)
    ]
    x, y, z = (weights[0] * a + weights[1] * b).T
    between = np.degrees(np.stack([np.arctan2(z, np.hypot(x, y)), np.arctan2(y, x)], 1))
    # traces themselves stay what they are, to the bit
    return np.where(weight <= 0, pos[before], np.where(weight >= 1, pos[after], between))


def break_at_jumps(distance: Array, factor: float = 5.0) -> list[slice]:
    """Cut a track where a step is longer than ``factor`` times the median one.

    Shape:
        - distance: (M,) along the track [m].

    Source: docs/papers/ice_layers.md section 3.2 [I].

    Example:
        >>> break_at_jumps(np.array([0.0, 1, 2, 3, 90, 91]))
        [slice(0, 4, None), slice(4, 6, None)]
    """
    steps = np.diff(distance)
    moving = steps[steps > 0]
    if not moving.size:
        return [slice(0, len(distance))]
    at = np.flatnonzero(steps > factor * np.median(moving)) + 1
    edges = [0, *at.tolist(), len(distance)]
    return [slice(a, b) for a, b in pairwise(edges)]


def cut_blocks(length: float, traces: int, spacing: float) -> list[Array]:
    """Positions of the traces of each block that a run of some length is cut into [m].

    Blocks have ``traces`` traces, ``spacing`` apart; the last one has what is left.

    Example:
        >>> [block.tolist() for block in cut_blocks(4.0, 3, 1.0)]
        [[0.0, 1.0, 2.0], [3.0, 4.0]]
    """
    total = math.floor(length / spacing + 0.05) + 1  # real traces are not quite equally far apart
    positions = np.minimum(np.arange(total) * spacing, length)
    return [positions[first : first + traces] for first in range(0, total, traces)]


def _steps(distance: Array, positions: Array) -> tuple[float, float]:
    """The typical steps of raw traces and of positions [m]; a standing aircraft does not count."""
    steps = np.diff(distance)
    moving = steps[steps > 0]
    raw = float(np.median(moving)) if moving.size else 0.0
    return raw, float(np.median(np.diff(positions))) if len(positions) > 1 else raw


def is_in_hole(distance: Array, positions: Array) -> NDArray[np.bool_]:
    """Whether a position has no raw trace near enough to say anything about it.

    That is: the raw traces around it are more than 1.5 steps apart, and the nearer one is farther
    than half the way to the next position. A step is the typical one of raw traces or of positions,
    whichever is longer, so that finer positions between neighbouring raw traces are in no hole.

    Shape:
        - distance: (M,) rising [m]; positions: (N,) [m]; result (N,).

    Source: inferred.

    Example:
        >>> is_in_hole(np.array([0.0, 1, 2, 6, 7]), np.array([0.5, 2.4, 4.0, 5.6]))
        array([False, False,  True, False])
    """
    raw, step = _steps(distance, positions)
    following = np.clip(np.searchsorted(distance, positions), 1, len(distance) - 1)
    before, after = (
        np.abs(positions - distance[following - 1]),
        np.abs(distance[following] - positions),
    )
    is_wide: NDArray[np.bool_] = distance[following] - distance[following - 1] > 1.5 * max(
        raw, step
    )
    return is_wide & (np.minimum(before, after) > step / 2)


def resample(distance: Array, values: Array, positions: Array) -> Array:
    """Bring values of raw traces to positions along the track; NaN stays where nothing is near.

    Where positions are at least twice as far apart as raw traces, the mean of the finite values
    that are nearer to this position than to another, if they are at least half; else linear between
    neighbours. Nothing is invented: where one of these is missing or beyond a hole of the track
    (see :func:`is_in_hole`), the nearer one within half the way to the next position, or nothing.

    Args:
        distance: Distance of the raw traces along the track, rising.
        values: Values of the raw traces, NaN where missing.
        positions: Positions to resample to, rising.

    Shape:
        - distance: (M,) [m]; values: (M, ...); positions: (N,) [m]; result (N, ...).

    Source: inferred (docs/papers/ice_layers.md section 3.2 says "on cumulative distance").

    Example:
        >>> resample(np.arange(4.0), np.array([0.0, np.nan, 4, 6]), np.array([0.4, 1.4, 2.5]))
        array([ 0., nan,  5.])
        >>> resample(np.arange(6.0), np.arange(6.0), np.array([0.0, 2.0, 4.0]))
        array([0.5, 2. , 4. ])
        >>> resample(np.array([0.0, 1, 5, 6]), np.array([0.0, 1, 5, 6]), np.arange(0.4, 6))
        array([0.4, 1. , nan, nan, nan, 5.4])
    """
    values = np.asarray(values, np.float64)
    raw, step = _steps(distance, positions)
    if len(positions) > 1 and step >= 2 * raw:
        return _means(distance, values, positions, step)
    after = np.clip(np.searchsorted(distance, positions), 1, len(distance) - 1)
    before = after - 1
    gap = distance[after] - distance[before]
    weight = np.clip((positions - distance[before]) / np.where(gap > 0, gap, 1.0), 0.0, 1.0)
    tail = (-1, *[1] * (values.ndim - 1))
    copied = (np.minimum(weight, 1 - weight) * gap <= step / 2).reshape(tail)
    weight, wide = weight.reshape(tail), (gap > 1.5 * max(raw, step)).reshape(tail)
    a, b = values[before], values[after]
    linear = (1 - weight) * a + weight * b
    near = np.where(copied, np.where(weight < 0.5, a, b), np.nan)
    return np.where(np.isfinite(linear) & ~wide, linear, near)


def _means(distance: Array, values: Array, positions: Array, step: float) -> Array:
    cell = np.rint((distance - positions[0]) / step).astype(np.int64)
    inside = (cell >= 0) & (cell < len(positions))
    cell, values = cell[inside], values[inside]
    finite = np.isfinite(values)
    shape = (len(positions), *values.shape[1:])
    total, count, all_ = np.zeros(shape), np.zeros(shape), np.zeros(len(positions))
    np.add.at(total, cell, np.where(finite, values, 0.0))
    np.add.at(count, cell, finite)
    np.add.at(all_, cell, 1.0)
    enough = (count > 0) & (2 * count >= all_.reshape(-1, *[1] * (values.ndim - 1)))
    return np.where(enough, total / np.maximum(count, 1), np.nan)
