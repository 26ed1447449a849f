"""From cells and time steps of a climate model to points and years of layers.

Shapes: M points, L layers (newest first), T time steps, C grid cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fulgurite.datamodules.ice_layers.stack import Array
from fulgurite.errors import DataError

__all__ = ["PROJECTIONS", "Grid", "Weights", "interval_weights", "step_edges"]

#: Projections, with coordinates in metres: MAR's own over Greenland, and the polar stereographic
#: ones of the north and the south. Source: docs/papers/ice_layers.md section 3.3; the south is
#: inferred.
PROJECTIONS = {
    "mar": "+proj=sterea +lat_0=70.5 +lon_0=-40 +lat_ts=0 +a=6371229 +b=6371229 +units=m",
    "epsg3413": "EPSG:3413",
    "epsg3031": "EPSG:3031",
}

_OPTION = "--data.init_args.source.init_args.climate.init_args"


def step_edges(times: Array) -> Array:
    """Edges of the steps whose stamps are given [days since 1970].

    Shape:
        - times: (T,) rising; result (T, 2).

    Stamps that are a month apart and all on the first, or all on the last day of months name the
    calendar month, as MAR's monthly files do. Others are middles: a step is as long as half the way
    to its neighbours, but next to a hole in the series as the typical one.

    Raises:
        DataError: A time comes twice.

    Source: inferred.

    Example:
        >>> step_edges(np.array([0.5, 1.5, 2.5, 9.5]))
        array([[ 0.,  1.],
               [ 1.,  2.],
               [ 2.,  3.],
               [ 9., 10.]])
        >>> step_edges(np.array([31.0, 59.0]))  # February and March
        array([[31., 59.],
               [59., 90.]])
    """
    gaps = np.diff(times)
    if (gaps <= 0).any():
        raise DataError(
            "The climate files hold a time step twice.",
            f"Set `{_OPTION}.files` so that each month or day is in one file.",
        )
    typical = float(np.median(gaps)) if len(gaps) else 30.0
    day = np.floor(times)
    month = day.astype(np.int64).astype("datetime64[D]").astype("datetime64[M]")
    start, end = (m.astype("datetime64[D]").astype(np.float64) for m in (month, month + 1))
    monthly = 27 <= typical <= 32 and bool((gaps >= 27).all())
    if monthly and ((day == start).all() or (day == end - 1).all()):
        return np.stack([start, end], 1)
    half = np.where(gaps > 1.6 * typical, typical, gaps) / 2
    ends = np.full(1, typical / 2)
    before, after = np.concatenate([ends, half]), np.concatenate([half, ends])
    return np.stack([times - before, times + after], 1)


def interval_weights(steps: Array, edges: Array) -> Array:
    """What fraction of each time step lies in each layer's years.

    Shape:
        - steps: (T, 2) start and end; edges: (L + 1,) falling dates of boundaries, newest first;
          result (L, T).

    Source: docs/papers/ice_layers.md section 3.3 (sums between layer dates, not calendar years).

    Example:
        >>> interval_weights(np.array([[0.0, 2], [2, 4], [4, 6]]), np.array([5.0, 3, 1]))
        array([[0. , 0.5, 0.5],
               [0.5, 0.5, 0. ]])
    """
    start, end = steps[None, :, 0], steps[None, :, 1]
    overlap = np.minimum(end, edges[:-1, None]) - np.maximum(start, edges[1:, None])
    fractions: Array = np.clip(overlap, 0.0, None) / (end - start)
    return fractions


@dataclass(frozen=True)
class Weights:
    """How values at points follow from grid cells.

    Attributes:
        cells: The three corners of each point's triangle, or three times the nearest cell.
            Shape: (M, 3) int64.
        weights: Barycentric weights of the corners. Shape: (M, 3).
        flag: 0 interpolated, 1 nearest. Shape: (M,) uint8.
        away: Distance to the nearest cell of ice [m]. Shape: (M,).
    """

    cells: NDArray[np.int64]
    weights: Array
    flag: NDArray[np.uint8]
    away: Array

    def __call__(self, values: Array) -> Array:
        """Interpolate values of cells (C, ...) to the points (M, ...).

        Corners without weight do not count, even where they are NaN.
        """
        weights = self.weights.reshape(*self.weights.shape, *[1] * (values.ndim - 1))
        parts = np.where(weights > 0, values[self.cells] * weights, 0.0)
        points: Array = parts.sum(1)
        return points


class Grid:
    """Cells of a climate model in projected coordinates: a triangulation made once.

    Args:
        x: Projected coordinate of each cell [m].
        y: Other projected coordinate of each cell [m].
        ice: Whether each cell is ice with finite values.

    Shape:
        - x, y, ice: (C,).

    Raises:
        DataError: No cell is ice.

    Source: docs/papers/ice_layers.md section 3.3.

    Example:
        >>> x, y = np.array([0.0, 1, 0, 1]), np.array([0.0, 0, 1, 1])
        >>> weights = Grid(x, y, np.ones(4, bool)).locate(np.array([[0.25, 0.5], [3.0, 0.0]]))
        >>> weights(x).round(3), weights.flag
        (array([0.25, 1.  ]), array([0, 1], dtype=uint8))
    """

    def __init__(self, x: Array, y: Array, ice: NDArray[np.bool_]) -> None:
        if not ice.any():
            raise DataError(
                "No cell of the climate grid is ice.",
                "Check the ice mask (SRF, MSK or MSK_MAR) and the fill values of the files.",
            )
        self.points, self.ice = np.stack([x, y], 1), ice

    def locate(self, points: Array) -> Weights:
        """Return the barycentric weights of points.

        Shape:
            - points: (M, 2) projected [m].
        """
        from scipy.spatial import Delaunay, cKDTree

        # the cells around the points are enough, and a fine grid has very many
        away, _ = cKDTree(self.points).query(points)
        steps = np.abs(np.diff(self.points, axis=0)).max(1)
        margin = 3 * float(np.median(steps[steps > 0])) + float(away.max()) * 1.01
        low, high = points.min(0) - margin, points.max(0) + margin
        nearby = np.flatnonzero(((self.points >= low) & (self.points <= high)).all(1))
        good = np.flatnonzero(self.ice)
        nearest, number = cKDTree(self.points[good]).query(points)
        cells = np.repeat(good[number][:, None], 3, 1)
        weights = np.tile(np.array([1.0, 0.0, 0.0]), (len(points), 1))
        flag = np.ones(len(points), np.uint8)
        if len(nearby) >= 3:
            try:
                mesh = Delaunay(self.points[nearby], qhull_options="Qbb Qc Qz Q12")
            except Exception as error:  # cells on one line
                raise DataError(
                    f"The climate grid cannot be triangulated: {str(error).splitlines()[0]}.",
                    "Check LAT and LON, or x and y, of the files.",
                ) from error
            simplex = mesh.find_simplex(points)
            matrix = mesh.transform[simplex]
            first = np.einsum("mij,mj->mi", matrix[:, :2], points - matrix[:, 2])
            barycentric = np.column_stack([first, 1 - first.sum(1)])
            barycentric[np.abs(barycentric) < 1e-9] = 0.0
            corners = nearby[mesh.simplices[simplex]]
            usable = (simplex >= 0) & (self.ice[corners] | (barycentric == 0)).all(1)
            usable &= np.isfinite(barycentric).all(1)
            cells[usable], weights[usable] = corners[usable], barycentric[usable]
            flag[usable] = 0
        return Weights(cells.astype(np.int64), weights, flag, np.asarray(nearest, np.float64))
