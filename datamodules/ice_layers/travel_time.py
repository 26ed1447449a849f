"""Two-way travel time between picked boundaries, and the thickness between them.

Shapes: M traces, K boundaries, L = K - 1 layers.
"""

from __future__ import annotations

import numpy as np

from fulgurite.datamodules.ice_layers.stack import Array

__all__ = ["LIGHT", "layer_times", "refractive_index", "thickness_to_time", "time_to_thickness"]

#: Speed of light [m s⁻¹].
LIGHT = 299_792_458.0


def refractive_index(density: Array) -> Array:
    """Index of dry firn of a density [g cm⁻³].

    Source: arXiv 2604.20783, card section 3.2 (n = 1 + 0.845 ρ).

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

    Source: arXiv 2604.20783, card section 3.2.

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


def layer_times(picks: Array) -> tuple[Array, int]:
    """Differences of neighbouring boundaries; crossed and touching picks give no layer.

    Args:
        picks: Boundaries from the surface down, in any unit, NaN where missing.

    Shape:
        - picks: (M, K).

    Returns:
        The (M, L) differences, NaN where a boundary is missing or the pair is crossed, and the
        number of crossed pairs.

    Source: arXiv 2604.20783, card section 3.2.

    Example:
        >>> layer_times(np.array([[0.0, 2.0, 1.0, 3.0]]))
        (array([[ 2., nan,  2.]]), 1)
    """
    difference = np.diff(picks, axis=1)
    crossed = difference <= 0
    return np.where(crossed, np.nan, difference), int(crossed.sum())
