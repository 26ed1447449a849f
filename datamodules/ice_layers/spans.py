"""Measured lengths between picked boundaries: single layers, and sums of layers.

The radar measures boundaries. Where a boundary between two picked ones is missing, the two layers
that it divides are missing, and what they add up to is known.

Shapes: M raw traces, N traces of a stack, K = L + 1 boundaries, L layers (newest first).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fulgurite.datamodules.ice_layers.resample import Array, resample
from fulgurite.datamodules.ice_layers.travel_time import LIGHT, refractive_index

__all__ = ["MeasuredSpans", "resample_spans"]

_TOLERANCE = 1e-6  # relative: files may hold thickness in float32


@dataclass(frozen=True, eq=False)
class MeasuredSpans:
    """Runs of layers between two picked boundaries without a picked one between them.

    Lengths are optical, index of refraction times thickness, since travel time is what is
    measured; where it is thickness, the index is 1.

    Attributes:
        start: Number of the first layer of the span that each layer is in; its own number where
            nothing was measured. Shape: (N, L) int64.
        path: Optical length of that span [m], NaN where nothing was measured.
            Shape: (N, L) float64.
        index: Index of refraction of each layer. Shape: (N, L) float64.

    Source: inferred; the paper masks entries of thickness and has no sums.

    Example:
        >>> spans = MeasuredSpans.of_thickness(np.array([[1.0, 2.0, 3.0]]))
        >>> hidden = spans.hide(np.array([[True, False, False]]))  # the boundary below layer 0
        >>> hidden.start, hidden.path
        (array([[0, 0, 2]]), array([[3., 3., 3.]]))
    """

    start: NDArray[np.int64]
    path: Array
    index: Array

    @classmethod
    def of_thickness(cls, thickness: Array, index: Array | None = None) -> MeasuredSpans:
        """MeasuredSpans of single layers, where nothing is known of sums.

        Args:
            thickness: Thickness [m], NaN where missing. Shape: (N, L).
            index: Index of refraction; 1 if not given. Shape: (N, L).
        """
        index = np.ones(thickness.shape) if index is None else index
        numbers = np.broadcast_to(np.arange(thickness.shape[1]), thickness.shape)
        return cls(numbers.astype(np.int64), np.asarray(index * thickness, np.float64), index)

    @classmethod
    def of_depth(cls, depth: Array) -> MeasuredSpans:
        """MeasuredSpans between boundaries whose depths are known.

        Args:
            depth: Depth of each boundary, in any order of traces [m], NaN where missing.
                Shape: (N, K).

        Example:
            >>> MeasuredSpans.of_depth(np.array([[0.0, np.nan, 3.0, 4.0]])).path
            array([[3., 3., 1.]])
        """
        traces, layers = len(depth), depth.shape[1] - 1
        picked = np.isfinite(depth)
        numbers = np.arange(layers)
        above = np.maximum.accumulate(np.where(picked[:, :-1], numbers, -1), axis=1)
        below = np.where(picked[:, 1:], numbers + 1, layers + 1)[:, ::-1]
        below = np.minimum.accumulate(below, axis=1)[:, ::-1]
        enclosed = (above >= 0) & (below <= layers)
        rows = np.arange(traces)[:, None]
        path = depth[rows, np.minimum(below, layers)] - depth[rows, np.maximum(above, 0)]
        start = np.where(enclosed, above, numbers).astype(np.int64)
        return cls(start, np.where(enclosed, path, np.nan), np.ones((traces, layers)))

    def __getitem__(self, rows: slice) -> MeasuredSpans:
        """Return the spans of some traces."""
        return MeasuredSpans(self.start[rows], self.path[rows], self.index[rows])

    @property
    def known(self) -> NDArray[np.bool_]:
        """Whether something was measured that the layer is in. Shape: (N, L)."""
        return np.isfinite(self.path)

    @property
    def length(self) -> NDArray[np.int64]:
        """Number of layers of each layer's span. Shape: (N, L)."""
        same = self.start[:, :, None] == self.start[:, None, :]
        length: NDArray[np.int64] = same.sum(2)
        return length

    @property
    def observed(self) -> NDArray[np.bool_]:
        """Whether the layer itself was measured. Shape: (N, L)."""
        observed: NDArray[np.bool_] = self.known & (self.length == 1)
        return observed

    @property
    def picked(self) -> NDArray[np.bool_]:
        """Whether the lower boundary of each layer is picked. Shape: (N, L)."""
        numbers = np.arange(self.start.shape[1])
        first = self.start == numbers
        last = np.concatenate([first[:, 1:], np.ones((len(first), 1), np.bool_)], 1)
        below = np.concatenate([(first & self.known)[:, 1:], np.zeros((len(first), 1), bool)], 1)
        picked: NDArray[np.bool_] = (last & self.known) | below
        return picked

    def hide(self, hidden: NDArray[np.bool_]) -> MeasuredSpans:
        """Return the spans that stay known when the lower boundaries of some layers are hidden.

        Two spans that a hidden boundary divides become one, whose length is known if both were.

        Args:
            hidden: Whether the lower boundary of each layer is hidden. Shape: (N, L).
        """
        traces, layers = self.start.shape
        numbers = np.arange(layers)
        first = self.start == numbers
        above = np.concatenate([np.zeros((traces, 1), np.bool_), hidden[:, :-1]], 1)
        start = np.maximum.accumulate(np.where(first & ~above, numbers, 0), axis=1)
        total = np.zeros((traces, layers))
        np.add.at(total, (np.arange(traces)[:, None], start), np.where(first, self.path, 0.0))
        path = np.take_along_axis(total, start, 1)
        # below its last boundary nothing is known of a span
        path[(start == start[:, -1:]) & hidden[:, -1:]] = np.nan
        unknown = np.isnan(path)
        return MeasuredSpans(np.where(unknown, numbers, start), path, self.index)

    def to_metres(self, density: Array) -> MeasuredSpans:
        """Return spans whose ``path`` was a two-way travel time [s], as optical lengths [m].

        Args:
            density: Density of the layers [g cm⁻³]. Shape: (N, L).
        """
        return MeasuredSpans(self.start, self.path * LIGHT / 2.0, refractive_index(density))

    def contradicts(self, thickness: Array) -> NDArray[np.bool_]:
        """Where thickness is measured and is not what the spans say, or only one of them is there.

        Args:
            thickness: Thickness [m], NaN where missing. Shape: (N, L).
        """
        finite = np.isfinite(thickness)
        off = np.abs(self.index * thickness - self.path) > _TOLERANCE * np.abs(self.path)
        wrong: NDArray[np.bool_] = (finite != self.observed) | (finite & off)
        return wrong


def resample_spans(
    distance: Array, boundaries: Array, positions: Array
) -> tuple[Array, MeasuredSpans]:
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
    spans = MeasuredSpans.of_thickness(layers)
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
    return layers, MeasuredSpans(start, path, spans.index)
