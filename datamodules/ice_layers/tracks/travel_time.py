"""Two-way travel time between picked boundaries, and the thickness between them.

Shapes: M traces, K boundaries, L = K - 1 layers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fulgurite.datamodules.ice_layers.tracks.resample import Array

__all__ = [
    "LIGHT",
    "refractive_index",
    "remove_crossed",
    "thickness_to_time",
    "time_to_thickness",
]

#: Speed of light [m s⁻¹].
LIGHT = 299_792_458.0


def refractive_index(density: Array) -> Array:
    """Index of dry firn of a density [g cm⁻³].

    Source: docs/papers/ice_layers.md section 3.2 (n = 1 + 0.845 ρ).

    Example:
        >>> refractive_index(np.array([0.0, 0.4])).round(3)
        array([1.   , 1.338])
    """
    index: Array = 1.0 + 0.845 * density
    return index


def time_to_thickness(time: Array, density: Array) -> Array:
    """Thickness [m] of layers that a pulse crosses twice in a time [s].

    Shape:
        - time, density [g cm⁻³]: (..., L), broadcast.

    Source: docs/papers/ice_layers.md section 3.2.

    Example:
        >>> time_to_thickness(np.array([8.93e-9]), np.array([0.4])).round(3)
        array([1.])
    """
    thickness: Array = time * LIGHT / (2.0 * refractive_index(density))
    return thickness


def thickness_to_time(thickness: Array, density: Array) -> Array:
    """Two-way travel time [s] through layers; the inverse of :func:`time_to_thickness`.

    Example:
        >>> thickness_to_time(np.array([1.0]), np.array([0.4])).round(12)
        array([8.926e-09])
    """
    time: Array = thickness * 2.0 * refractive_index(density) / LIGHT
    return time


def remove_crossed(picks: Array) -> tuple[Array, int]:
    """Remove both picks of each pair of neighbours that cross or touch, until none is left.

    Neighbours are the picks of a trace that have no other one between them. Which of two crossed
    picks is wrong is not known, so that neither is a measurement, and the layers on both of their
    sides are none either.

    Shape:
        - picks: (M, K), NaN where missing; the result too.

    Returns:
        The picks, and the number of crossed pairs.

    Source: docs/papers/ice_layers.md section 3.2 rejects layers that are not positive; that their
    neighbours go too is inferred.

    Example:
        >>> remove_crossed(np.array([[0.0, 5.0, np.nan, 3.0, 6.0]]))
        (array([[ 0., nan, nan, nan,  6.]]), 1)
    """
    uncrossed, crossed = np.array(picks, np.float64), 0
    while True:
        above, index = _picks_above(uncrossed)
        rows, columns = np.nonzero(uncrossed <= above)
        if not len(rows):
            return uncrossed, crossed
        crossed += len(rows)
        others = index[rows, columns]
        uncrossed[rows, columns] = np.nan
        uncrossed[rows, others] = np.nan


def _picks_above(picks: Array) -> tuple[Array, NDArray[np.int64]]:
    """The nearest pick above each boundary, and the number of its boundary.

    Shape:
        - picks: (M, K); both results (M, K), NaN and -1 where there is none.
    """
    numbers = np.where(np.isfinite(picks), np.arange(picks.shape[1]), -1)
    last = np.maximum.accumulate(numbers, axis=1)
    index = np.concatenate([np.full((len(picks), 1), -1), last[:, :-1]], 1).astype(np.int64)
    above = np.take_along_axis(picks, np.maximum(index, 0), 1)
    return np.where(index >= 0, above, np.nan), index
