"""Traces along a flight line: distances, breaks at jumps, blocks, resampling.

Shapes: M raw traces, N resampled traces, `...` any.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "EARTH",
    "along_track",
    "break_at_jumps",
    "cut",
    "haversine",
    "in_hole",
    "interpolate_positions",
    "resample",
]

Array = NDArray[np.float64]

#: Mean radius of the Earth [m].
EARTH = 6_371_008.8


def haversine(first: Array, second: Array) -> Array:
    """Distance on the sphere [m], in float64 as it must be.

    Shape:
        - first, second: (..., 2) latitude and longitude [degrees].

    Source: arXiv 2604.20783, card section 1.2.

    Example:
        >>> haversine(np.array([70.0, -40.0]), np.array([71.0, -40.0])).round(-1)
        np.float64(111200.0)
    """
    a, b = np.radians(np.float64(first)), np.radians(np.float64(second))
    half = np.sin((b - a) / 2) ** 2
    inner = half[..., 0] + np.cos(a[..., 0]) * np.cos(b[..., 0]) * half[..., 1]
    distance: Array = 2 * EARTH * np.arcsin(np.sqrt(np.minimum(inner, 1.0)))
    return distance


def along_track(pos: Array) -> Array:
    """Distance of each trace from the first one, along the track [m].

    Shape:
        - pos: (M, 2) latitude and longitude [degrees]; result (M,).

    Example:
        >>> along_track(np.array([[70.0, 0.0], [70.0, 0.0], [70.001, 0.0]])).round(1)
        array([  0. ,   0. , 111.2])
    """
    steps = haversine(pos[:-1], pos[1:])
    return np.concatenate([[0.0], np.cumsum(steps)])


def interpolate_positions(distance: Array, pos: Array, places: Array) -> Array:
    """Positions at places along the track, on the great circle between neighbouring traces.

    So they are right across the date line and over a pole.

    Args:
        distance: Of the traces along the track, rising [m].
        pos: Their latitude and longitude [degrees].
        places: Where positions are wanted, between the first and the last trace [m].

    Shape:
        - distance: (M,); pos: (M, 2); places: (N,); result (N, 2), longitudes from -180 to 180.

    Source: inferred.

    Example:
        >>> pos = np.array([[0.0, 179.0], [0.0, -179.0]])
        >>> interpolate_positions(np.array([0.0, 1.0]), pos, np.array([0.0, 0.75])).round(6)
        array([[   0. ,  179. ],
               [   0. , -179.5]])
    """
    right = np.clip(np.searchsorted(distance, places), 1, len(distance) - 1)
    left = right - 1
    gap = distance[right] - distance[left]
    share = np.clip((places - distance[left]) / np.where(gap > 0, gap, 1.0), 0.0, 1.0)[:, None]
    a, b = _to_vectors(pos[left]), _to_vectors(pos[right])
    angle = np.linalg.norm(np.cross(a, b), axis=1, keepdims=True)
    angle = np.arctan2(angle, (a * b).sum(1, keepdims=True))
    safe = np.where(angle > 1e-8, angle, 1.0)
    weights = [
        np.where(angle > 1e-8, np.sin(part * safe) / np.sin(safe), part)
        for part in (1 - share, share)
    ]
    x, y, z = (weights[0] * a + weights[1] * b).T
    between = np.degrees(np.stack([np.arctan2(z, np.hypot(x, y)), np.arctan2(y, x)], 1))
    # traces themselves stay what they are, to the bit
    return np.where(share <= 0, pos[left], np.where(share >= 1, pos[right], between))


def _to_vectors(pos: Array) -> Array:
    """Points on the unit sphere. Shape: (M, 2) [degrees] -> (M, 3)."""
    latitude, longitude = np.radians(pos).T
    cos = np.cos(latitude)
    return np.stack([cos * np.cos(longitude), cos * np.sin(longitude), np.sin(latitude)], 1)


def break_at_jumps(distance: Array, factor: float = 5.0) -> list[slice]:
    """Cut a track where a step is longer than ``factor`` times the median one.

    Shape:
        - distance: (M,) along the track [m].

    Source: arXiv 2604.20783, card section 3.2 [I].

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


def cut(length: float, traces: int, spacing: float) -> list[Array]:
    """Places of the traces of each block that a run of some length is cut into [m].

    Blocks have ``traces`` traces, ``spacing`` apart; the last one has what is left.

    Example:
        >>> [block.tolist() for block in cut(4.0, 3, 1.0)]
        [[0.0, 1.0, 2.0], [3.0, 4.0]]
    """
    total = math.floor(length / spacing + 0.05) + 1  # real traces are not quite equally far apart
    places = np.minimum(np.arange(total) * spacing, length)
    return [places[first : first + traces] for first in range(0, total, traces)]


def _steps(distance: Array, places: Array) -> tuple[float, float]:
    """The typical step of raw traces and that of places [m]; a standing aircraft does not count."""
    steps = np.diff(distance)
    moving = steps[steps > 0]
    raw = float(np.median(moving)) if moving.size else 0.0
    return raw, float(np.median(np.diff(places))) if len(places) > 1 else raw


def in_hole(distance: Array, places: Array) -> NDArray[np.bool_]:
    """Whether a place has no raw trace near enough to say anything about it.

    That is: the raw traces around it are more than 1.5 steps apart, and the nearer one is farther
    than half the way to the next place. A step is the typical one of raw traces or of places,
    whichever is longer, so that finer places between neighbouring raw traces are in no hole.

    Shape:
        - distance: (M,) rising [m]; places: (N,) [m]; result (N,).

    Source: inferred.

    Example:
        >>> in_hole(np.array([0.0, 1, 2, 6, 7]), np.array([0.5, 2.4, 4.0, 5.6]))
        array([False, False,  True, False])
    """
    raw, wanted = _steps(distance, places)
    right = np.clip(np.searchsorted(distance, places), 1, len(distance) - 1)
    before, after = np.abs(places - distance[right - 1]), np.abs(distance[right] - places)
    found: NDArray[np.bool_] = distance[right] - distance[right - 1] > 1.5 * max(raw, wanted)
    return found & (np.minimum(before, after) > wanted / 2)


def resample(distance: Array, values: Array, places: Array) -> Array:
    """Bring values of raw traces to places along the track; NaN stays where nothing is near.

    Where places are at least twice as far apart as raw traces, the mean of the finite values that
    are nearer to this place than to another, if they are at least half; else linear between
    neighbours. Nothing is invented: where one of these is missing or beyond a hole of the track
    (see :func:`in_hole`), the nearer one within half the way to the next place, or nothing.

    Args:
        distance: Of the raw traces, rising.
        values: NaN where missing.
        places: Where values are wanted, rising.

    Shape:
        - distance: (M,) [m]; values: (M, ...); places: (N,) [m]; result (N, ...).

    Source: inferred (card section 3.2 says "on cumulative distance").

    Example:
        >>> resample(np.arange(4.0), np.array([0.0, np.nan, 4, 6]), np.array([0.4, 1.4, 2.5]))
        array([ 0., nan,  5.])
        >>> resample(np.arange(6.0), np.arange(6.0), np.array([0.0, 2.0, 4.0]))
        array([0.5, 2. , 4. ])
        >>> resample(np.array([0.0, 1, 5, 6]), np.array([0.0, 1, 5, 6]), np.arange(0.4, 6))
        array([0.4, 1. , nan, nan, nan, 5.4])
    """
    values = np.asarray(values, np.float64)
    raw, wanted = _steps(distance, places)
    if len(places) > 1 and wanted >= 2 * raw:
        return _means(distance, values, places, wanted)
    right = np.clip(np.searchsorted(distance, places), 1, len(distance) - 1)
    left = right - 1
    gap = distance[right] - distance[left]
    share = np.clip((places - distance[left]) / np.where(gap > 0, gap, 1.0), 0.0, 1.0)
    tail = (-1, *[1] * (values.ndim - 1))
    copied = (np.minimum(share, 1 - share) * gap <= wanted / 2).reshape(tail)
    share, wide = share.reshape(tail), (gap > 1.5 * max(raw, wanted)).reshape(tail)
    a, b = values[left], values[right]
    linear = (1 - share) * a + share * b
    near = np.where(copied, np.where(share < 0.5, a, b), np.nan)
    return np.where(np.isfinite(linear) & ~wide, linear, near)


def _means(distance: Array, values: Array, places: Array, wanted: float) -> Array:
    cell = np.rint((distance - places[0]) / wanted).astype(np.int64)
    inside = (cell >= 0) & (cell < len(places))
    cell, values = cell[inside], values[inside]
    finite = np.isfinite(values)
    shape = (len(places), *values.shape[1:])
    total, count, all_ = np.zeros(shape), np.zeros(shape), np.zeros(len(places))
    np.add.at(total, cell, np.where(finite, values, 0.0))
    np.add.at(count, cell, finite)
    np.add.at(all_, cell, 1.0)
    enough = (count > 0) & (2 * count >= all_.reshape(-1, *[1] * (values.ndim - 1)))
    return np.where(enough, total / np.maximum(count, 1), np.nan)
