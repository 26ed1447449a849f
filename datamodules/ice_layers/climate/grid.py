"""From cells and time steps of a climate model to points and years of layers.

Shapes: M points, L layers (newest first), T time steps, C grid cells, H W rows and columns of them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fulgurite.datamodules.ice_layers.stack import Array
from fulgurite.errors import DataError
from fulgurite.extras import optional_import

__all__ = [
    "PROJECTIONS",
    "Grid",
    "Weights",
    "decode_projection",
    "interval_weights",
    "measure_covers",
    "step_edges",
]

log = logging.getLogger(__name__)

#: Projections, with coordinates in metres: MAR's own over Greenland, and the polar stereographic
#: ones of the north and the south. Source: docs/papers/ice_layers.md section 3.3; the south is
#: inferred.
PROJECTIONS = {
    "mar": "+proj=sterea +lat_0=70.5 +lon_0=-40 +lat_ts=0 +a=6371229 +b=6371229 +units=m",
    "epsg3413": "EPSG:3413",
    "epsg3031": "EPSG:3031",
}

# What single precision leaves of a time's seconds [days]: midnight may be some minutes before
_ROUNDING = 1 / 96
# Least part of a layer's years that files must cover; more than so little is missing of whole years
# not by the rounding of steps alone (inferred)
_LEAST_COVER, _ROUNDED_COVER = 0.95, 0.004
# Barycentric weights below it are none: on an edge of a triangle, whichever of the two it is
_EDGE = 1e-9
# Cells of which more quadrilaterals are folded than this fraction are in no rows and columns
_FOLDED = 0.01
# Quadrilaterals to try, as rows and columns from the one of the nearest middle
_AROUND = sorted(
    ((row, column) for row in range(-2, 3) for column in range(-2, 3)),
    key=lambda step: (max(map(abs, step)), sum(map(abs, step)), step),
)

_OPTION = "--data.init_args.source.init_args.climate.init_args"


def decode_projection(attributes: Mapping[str, Any], path: Path) -> Any:
    """Return the projection that a grid mapping says, as pyproj's CRS.

    Args:
        attributes: Attributes of the grid mapping, by CF.
        path: The climate file.

    Raises:
        DataError: It cannot be understood, or is of no projection.
        MissingExtraError: pyproj is not installed.
    """
    pyproj = optional_import("pyproj", "ice", "Projecting climate grids")
    plain = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in attributes.items()}
    hint = f"Correct it, or set `{_OPTION}.projection` to one of {', '.join(PROJECTIONS)}."
    try:
        projection = pyproj.CRS.from_cf(plain)
    except (pyproj.exceptions.CRSError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise DataError(
            f"The grid mapping of the climate file {path} cannot be understood ({reason}).", hint
        ) from error
    if not projection.is_projected:
        raise DataError(
            f"The grid mapping of the climate file {path} is {projection.name}, which is no "
            "projection in metres.",
            hint,
        )
    return projection


def step_edges(times: Array) -> Array:
    """Edges of the steps whose stamps are given [days since 1970].

    Shape:
        - times: (T,) rising; result (T, 2).

    Stamps that are a month apart and all on the first, or all on the last day of months name the
    calendar month, as MAR's monthly files do, and those that are a year apart likewise the calendar
    year. Others are middles: a step is as long as half the way to its neighbours, but next to a
    hole in the series as the typical one.

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
    day = np.floor(times + _ROUNDING)
    date = day.astype(np.int64).astype("datetime64[D]")
    for unit, shortest, longest in (("M", 27, 32), ("Y", 360, 367)):
        if not shortest <= typical <= longest or (gaps < shortest).any():
            continue
        period = date.astype(f"datetime64[{unit}]")
        start, end = (p.astype("datetime64[D]").astype(np.float64) for p in (period, period + 1))
        if (day == start).all() or (day == end - 1).all():
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


def measure_covers(steps: Array, edges: Sequence[Array], fractions: Sequence[Array]) -> list[Array]:
    """Measure the part of each layer's years that time steps cover, for each flight.

    A warning tells of flights that have layers of which some days are not covered.

    Args:
        steps: Start and end of each step [days since 1970]. Shape: (T, 2).
        edges: Dates of each flight's boundaries, newest first. Shape of each: (L + 1,).
        fractions: What :func:`interval_weights` gives for each flight. Shape of each: (L, T).

    Returns:
        1 where all is covered but for the rounding of steps. Shape of each: (L,).

    Raises:
        DataError: It is less than 95 %.

    Source: inferred.

    Example:
        >>> steps, edges = np.array([[0.0, 100], [100, 200]]), np.array([204.0, 100, 0])
        >>> measure_covers(steps, [edges], [interval_weights(steps, edges)])[0].round(3)
        array([0.962, 1.   ])
    """
    length = steps[:, 1] - steps[:, 0]
    covers: list[Array] = []
    for its_edges, its_fractions in zip(edges, fractions, strict=True):
        cover = (its_fractions * length).sum(1) / -np.diff(its_edges)
        if (cover < _LEAST_COVER).any():
            layer = int((cover < _LEAST_COVER).argmax())
            newer, older = (np.datetime64(int(day), "D") for day in its_edges[layer : layer + 2])
            raise DataError(
                f"The climate files do not cover layer {layer + 1}, {older} to {newer} "
                f"(only {100 * cover[layer]:.0f} %).",
                f"Add the years to `{_OPTION}.files`, or use fewer layers "
                "(`--data.init_args.source.init_args.count`; `layers` of generated flights).",
            )
        covers.append(np.where(cover < 1 - _ROUNDED_COVER, cover, 1.0))
    if partial := sum(bool((cover < 1).any()) for cover in covers):
        log.warning(
            "The climate files lack some days of layers of %d of %d flights: these are taken to be "
            "as the rest of the layer's years.",
            *(partial, len(covers)),
        )
    return covers


@dataclass(frozen=True)
class Weights:
    """How values at points follow from grid cells.

    Attributes:
        cells: The three corners of each point's triangle, or three times the nearest cell; a
            corner without weight is replaced by the one of most weight. Shape: (M, 3) int64.
        weights: Barycentric weights of the corners. Shape: (M, 3).
        flag: 0 interpolated, 1 nearest. Shape: (M,) uint8.
        away: Distance to the nearest cell of ice [m]. Shape: (M,).
    """

    cells: NDArray[np.int64]
    weights: Array
    flag: NDArray[np.uint8]
    away: Array

    def __call__(self, values: Array) -> Array:
        """Interpolate values of cells (C, ...) to the points (M, ...)."""
        weights = self.weights.reshape(*self.weights.shape, *[1] * (values.ndim - 1))
        first, second, third = (values[self.cells[:, k]] * weights[:, k] for k in range(3))
        points: Array = first + second + third  # in this order, whatever the number of points
        return points


class Grid:
    """Cells of a climate model in projected coordinates, and the triangles between them.

    What :meth:`locate` returns for a point depends on the point and the cells alone, to the bit,
    never on other points. Cells in rows and columns are triangulated by their numbers: each
    quadrilateral of neighbours is cut from the corner of its lower row and column to the opposite
    one, or across it where only that leaves three corners of ice. Delaunay's rule would leave the
    diagonals of squares to rounding. Scattered cells are triangulated by it, all at once.

    Args:
        x: Projected coordinate of each cell [m], NaN where a cell has none.
        y: Other projected coordinate of each cell [m].
        ice: Whether each cell is ice with finite values.

    Shape:
        - x, y, ice: (H, W) in rows and columns, or (C,) scattered.

    Raises:
        DataError: No cell is ice, or scattered cells lie on one line.

    Source: docs/papers/ice_layers.md section 3.3 (linear on triangles); the diagonals are inferred.

    Example:
        >>> x, y = np.meshgrid([0.0, 1.0], [0.0, 1.0])
        >>> weights = Grid(x, y, np.ones((2, 2), bool)).locate(np.array([[0.25, 0.5], [3.0, 0.0]]))
        >>> weights(x.ravel()).round(3), weights.flag
        (array([0.25, 1.  ]), array([0, 1], dtype=uint8))
    """

    def __init__(self, x: Array, y: Array, ice: NDArray[np.bool_]) -> None:
        if not ice.any():
            raise DataError(
                "No cell of the climate grid is ice.",
                "Check the ice mask (SRF, MSK or MSK_MAR) and the fill values of the files.",
            )
        self.x, self.y, self.ice = x.ravel(), y.ravel(), ice.ravel()
        self.shape = x.shape
        self._convex = _find_convex(x, y) if x.ndim == 2 and min(x.shape) > 1 else None

    def locate(self, points: Array) -> Weights:
        """Return the barycentric weights of points.

        Shape:
            - points: (M, 2) projected [m].
        """
        from scipy.spatial import cKDTree

        good = np.flatnonzero(self.ice)
        nearest, number = cKDTree(np.stack([self.x[good], self.y[good]], 1)).query(points)
        corners, weights = (
            self._find_scattered(points)
            if self._convex is None
            else self._find_quadrilaterals(points, self._convex)
        )
        usable = (corners >= 0).all(1) & (self.ice[corners] | (weights == 0)).all(1)
        heaviest = np.take_along_axis(corners, weights.argmax(1)[:, None], 1)
        corners = np.where(weights > 0, corners, heaviest)
        cells = np.where(usable[:, None], corners, good[number][:, None])
        weights = np.where(usable[:, None], weights, [1.0, 0.0, 0.0])
        flag = (~usable).astype(np.uint8)
        return Weights(cells.astype(np.int64), weights, flag, np.asarray(nearest, np.float64))

    def _find_quadrilaterals(
        self, points: Array, convex: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], Array]:
        """Corners and weights of each point's triangle, corners -1 outside. Shape: (M, 3) each."""
        from scipy.spatial import cKDTree

        rows, columns = self.shape[0] - 1, self.shape[1] - 1
        corners = np.full((len(points), 3), -1, np.int64)
        weights = np.zeros((len(points), 3))
        ice = self.ice.reshape(self.shape)
        near_ice = ice[:-1, :-1] | ice[:-1, 1:] | ice[1:, :-1] | ice[1:, 1:]
        candidates = np.flatnonzero((convex & near_ice).ravel())
        if not len(candidates):
            return corners, weights
        quads = self._quadrilateral_corners(*np.divmod(candidates, columns))
        middles = np.stack(
            [sum(axis[corner] for corner in quads) / 4 for axis in (self.x, self.y)], 1
        )
        row, column = np.divmod(candidates[cKDTree(middles).query(points)[1]], columns)
        pending = np.arange(len(points))
        for down, right in _AROUND:
            r, c = row[pending] + down, column[pending] + right
            inside = (r >= 0) & (r < rows) & (c >= 0) & (c < columns)
            inside[inside] = convex[r[inside], c[inside]]
            tried = pending[inside]
            for triangle in self._cut(r[inside], c[inside]):
                part = self._weigh(points[tried], triangle)
                contains = (part >= 0).all(1) & (corners[tried, 0] < 0)
                corners[tried[contains]] = triangle[contains]
                weights[tried[contains]] = part[contains]
            pending = pending[corners[pending, 0] < 0]
            if not len(pending):
                break
        return corners, weights

    def _quadrilateral_corners(
        self, row: NDArray[np.int64], column: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], ...]:
        """Cells at the four corners of quadrilaterals, going around them."""
        width = self.shape[1]
        first = row * width + column
        return first, first + 1, first + width + 1, first + width

    def _cut(
        self, row: NDArray[np.int64], column: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The two triangles of each quadrilateral. Shape: (Q, 3) each."""
        a, b, c, d = self._quadrilateral_corners(row, column)
        across = (self.ice[b] & self.ice[d] & (self.ice[a] ^ self.ice[c]))[:, None]
        first = np.where(across, np.stack([a, b, d], 1), np.stack([a, b, c], 1))
        second = np.where(across, np.stack([b, c, d], 1), np.stack([a, c, d], 1))
        return first, second

    def _weigh(self, points: Array, corners: NDArray[np.int64]) -> Array:
        """Barycentric weights, 0 on edges; negative or NaN outside. Shape: (M, 3).

        Products of matrices would round by how many points there are.
        """
        x, y = self.x[corners].T, self.y[corners].T
        x1, x2, px = x[1] - x[0], x[2] - x[0], points[:, 0] - x[0]
        y1, y2, py = y[1] - y[0], y[2] - y[0], points[:, 1] - y[0]
        with np.errstate(divide="ignore", invalid="ignore"):  # triangles without area hold no point
            area = x1 * y2 - x2 * y1
            second, third = (px * y2 - x2 * py) / area, (x1 * py - px * y1) / area
            weights = np.stack([1 - second - third, second, third], 1)
        return np.where(np.abs(weights) < _EDGE, 0.0, weights)

    def _find_scattered(self, points: Array) -> tuple[NDArray[np.int64], Array]:
        """As :meth:`_find_quadrilaterals`, of cells in no rows and columns."""
        from scipy.spatial import Delaunay

        cells = np.flatnonzero(np.isfinite(self.x) & np.isfinite(self.y))
        if len(cells) < 3:
            return np.full((len(points), 3), -1, np.int64), np.zeros((len(points), 3))
        try:
            mesh = Delaunay(
                np.stack([self.x[cells], self.y[cells]], 1), qhull_options="Qbb Qc Qz Q12"
            )
        except Exception as error:  # cells on one line
            raise DataError(
                f"The climate grid cannot be triangulated: {str(error).splitlines()[0]}.",
                "Check LAT and LON, or x and y, of the files.",
            ) from error
        # one by one, since a search begins where the one before ended, which decides on edges
        simplex = np.array([mesh.find_simplex(point) for point in points], np.int64).reshape(-1)
        corners = cells[mesh.simplices[simplex]].astype(np.int64)
        weights = self._weigh(points, corners)
        outside = (simplex < 0) | ~(weights >= 0).all(1)
        return np.where(outside[:, None], -1, corners), np.where(outside[:, None], 0.0, weights)


def _find_convex(x: Array, y: Array) -> NDArray[np.bool_] | None:
    """Which quadrilaterals of neighbours are convex and not turned over; None of scattered cells.

    Shape:
        - x, y: (H, W); result (H - 1, W - 1).
    """
    low, high = slice(0, -1), slice(1, None)
    a, b, c, d = (low, low), (low, high), (high, high), (high, low)
    turns = [
        (x[q] - x[p]) * (y[r] - y[q]) - (y[q] - y[p]) * (x[r] - x[q])
        for p, q, r in ((a, b, c), (b, c, d), (c, d, a), (d, a, b))
    ]
    least, most = np.minimum.reduce(turns), np.maximum.reduce(turns)
    # two corners at a pole are one, but for rounding
    left = (least >= -1e-6 * most) & (most > 0)
    right = (most <= -1e-6 * least) & (least < 0)
    convex: NDArray[np.bool_] = left if left.sum() >= right.sum() else right
    count = int(np.isfinite(least).sum())
    return convex if convex.any() and count - int(convex.sum()) <= _FOLDED * count else None
