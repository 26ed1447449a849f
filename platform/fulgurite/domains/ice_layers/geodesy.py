"""Distances on the sphere, of arrays of numpy and of torch."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["EARTH_RADIUS", "MEAN_EARTH_RADIUS", "haversine", "is_in_greenland", "to_vectors"]

EARTH_RADIUS = 6_371_000.0
"""Radius of the Earth in graphs of traces [m], rounded as the paper's family has it."""

MEAN_EARTH_RADIUS = 6_371_008.8
"""Mean radius of the Earth by the IUGG [m], which distances along tracks are measured with."""

_GREENLAND = (58.0, 85.0, -76.0, -8.0)  # latitudes and longitudes [degrees]

_Array = TypeVar("_Array", NDArray[np.float64], Tensor)


def haversine(start: _Array, end: _Array, radius: float = EARTH_RADIUS) -> _Array:
    """Distance on a sphere [m], in float64: float32 degrees are a metre wide.

    Args:
        start: Latitude and longitude [degrees]. Shape: (..., 2).
        end: Latitude and longitude [degrees]. Shape: (..., 2).
        radius: Radius of the sphere [m].

    Shape: to (...).

    Example:
        >>> round(float(haversine(torch.tensor([70.0, 0.0]), torch.tensor([71.0, 0.0]))))
        111195
        >>> haversine(np.array([70.0, -40.0]), np.array([71.0, -40.0])).round(-1)
        np.float64(111190.0)

    Source: docs/papers/ice_layers.md sections 1.2 and 6, check 10.
    """
    library: Any = torch if isinstance(start, Tensor) else np
    a, b = (library.deg2rad(_to_double(degrees)) for degrees in (start, end))
    half = library.square(library.sin((b - a) / 2))
    inside = half[..., 0] + library.cos(a[..., 0]) * library.cos(b[..., 0]) * half[..., 1]
    distance: _Array = 2 * radius * library.arcsin(library.sqrt(library.clip(inside, 0, 1)))
    return distance


def _to_double(values: _Array) -> _Array:
    return values.double() if isinstance(values, Tensor) else np.asarray(values, np.float64)


def is_in_greenland(latitude: float, longitude: float) -> bool:
    """Whether a position lies in the box of latitudes and longitudes around Greenland.

    Args:
        latitude: [degrees]
        longitude: From -180 to 180 [degrees].

    Example:
        >>> is_in_greenland(72.0, -40.0), is_in_greenland(-40.0, 72.0)
        (True, False)
    """
    south, north, west, east = _GREENLAND
    return south <= latitude <= north and west <= longitude <= east


def to_vectors(pos: NDArray[np.float64], radius: float = 1.0) -> NDArray[np.float64]:
    """Positions as points of space, in the unit of the radius.

    Args:
        pos: Latitude and longitude [degrees]. Shape: (N, 2).
        radius: Radius of the sphere.

    Shape: to (N, 3).
    """
    latitude, longitude = np.radians(pos).T
    x = np.cos(latitude) * np.cos(longitude)
    points: NDArray[np.float64] = radius * np.stack(
        [x, np.cos(latitude) * np.sin(longitude), np.sin(latitude)], 1
    )
    return points
