"""Spans of layers between two picked boundaries: what is measured of them, singly or as a sum.

The radar measures boundaries. Where a boundary between two picked ones is missing, the layers that
it divides are missing, and what they add up to is known, which every completion keeps. Data modules
hold spans as arrays of numpy, models as tensors.

Shapes: N traces, of one stack or of all of a batch, K = L + 1 boundaries (the surface first), L
layers (newest first).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["THINNEST_LAYER", "ArraySpans", "Spans", "TensorSpans"]

THINNEST_LAYER = 1e-4
"""Least thickness of a predicted layer [m]: less than nothing has no part of a sum."""

_TOLERANCE = 1e-6  # relative: files may hold thickness in float32

_Array = TypeVar("_Array", NDArray[Any], Tensor)


@dataclass(frozen=True, eq=False)
class Spans(Generic[_Array]):
    """Runs of layers between two picked boundaries without a picked one between them.

    A layer whose two boundaries are picked is a span of its own: it is observed. Where a boundary
    between two picked ones is missing, the layers of the span are missing, but not their sum.
    Lengths are optical, index of refraction times thickness, since travel time is what is
    measured; where it is thickness, the index is 1.

    Attributes:
        start: Number of the first layer of the span that each layer is in; its own number where
            nothing was measured. Shape: (N, L), int64.
        path: Optical length of that span [m]; NaN where nothing was measured.
            Shape: (N, L), float64.
        index: Index of refraction of each layer; 1 where thickness itself was measured.
            Shape: (N, L), float64.
        sums: Whether sums of missing layers are known at all; they are not in data that hold
            thickness alone.

    Source: inferred; the paper masks entries of thickness and has no sums.

    Example:
        >>> spans = Spans.of_thickness(torch.tensor([[1.0, 2.0, 3.0]]), sums=True)
        >>> visible = spans.hide(torch.tensor([[True, False, False]]))  # boundary below layer 0
        >>> visible.observed, visible.between
        (tensor([[False, False,  True]]), tensor([[ True,  True, False]]))
        >>> visible.constrain(torch.tensor([[1.0, 1.0, 1.0]]))
        tensor([[1.5000, 1.5000, 1.0000]], dtype=torch.float64)
        >>> spans = Spans.of_depth(np.array([[0.0, np.nan, 3.0, 4.0]]))
        >>> spans.start, spans.path
        (array([[0, 0, 2]]), array([[3., 3., 1.]]))
    """

    start: _Array
    path: _Array
    index: _Array
    sums: bool = True

    @classmethod
    def of_batch(cls, batch: Any) -> Spans[Tensor]:
        """From a batch; in one that has no spans, thickness alone was measured."""
        if getattr(batch, "span_path", None) is None:
            return Spans.of_thickness(batch.thickness.where(batch.observed, torch.nan))
        return Spans(batch.span_start, batch.span_path, batch.refraction)

    @classmethod
    def of_thickness(cls, thickness: _Array, sums: bool = False) -> Spans[_Array]:
        """Spans of single layers, where nothing is known of sums.

        Args:
            thickness: [m], NaN where missing. Shape: (N, L).
            sums: Whether the sum of two layers stays known when the boundary between them is
                hidden.
        """
        library: Any = _library_of(thickness)
        path = _to_double(thickness)
        numbers = library.zeros_like(path, dtype=library.int64) + _count_layers(path)
        return Spans(numbers, path, library.ones_like(path), sums)

    @classmethod
    def of_depth(cls, depth: NDArray[np.float64]) -> Spans[NDArray[Any]]:
        """Spans between boundaries whose depths are known.

        Args:
            depth: Depth of each boundary, in any order of traces [m], NaN where missing.
                Shape: (N, K).
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
        return Spans(start, np.where(enclosed, path, np.nan), np.ones((traces, layers)))

    def batch_fields(self) -> dict[str, Tensor]:
        """Return the fields of a batch that :meth:`of_batch` reads."""
        arrays = {"span_start": self.start, "span_path": self.path, "refraction": self.index}
        return {name: torch.as_tensor(values) for name, values in arrays.items()}

    @cached_property
    def known(self) -> _Array:
        """Whether something was measured that the layer is in. Shape: (N, L), bool."""
        known: _Array = self._library.isfinite(self.path)
        return known

    @cached_property
    def length(self) -> _Array:
        """Number of layers of each layer's span. Shape: (N, L), int64."""
        return self._sum(self._library.ones_like(self.start))

    @cached_property
    def observed(self) -> _Array:
        """Whether the layer itself was measured. Shape: (N, L), bool."""
        observed: _Array = self.known & (self.length == 1)
        return observed

    @cached_property
    def between(self) -> _Array:
        """Whether the layer is missing, but is a part of a measured sum. Shape: (N, L), bool."""
        between: _Array = self.known & (self.length > 1)
        return between

    @cached_property
    def picked(self) -> _Array:
        """Whether the lower boundary of each layer is picked. Shape: (N, L), bool."""
        first, library = self.first, self._library
        none = library.zeros_like(first[:, :1])
        last = library.concatenate([first[:, 1:], ~none], 1)
        below = library.concatenate([(first & self.known)[:, 1:], none], 1)
        picked: _Array = (last & self.known) | below
        return picked

    @cached_property
    def first(self) -> _Array:
        """Whether the layer is the first one of its span. Shape: (N, L), bool."""
        first: _Array = self.start == self._numbers
        return first

    @property
    def _library(self) -> Any:
        return _library_of(self.start)

    @cached_property
    def _numbers(self) -> _Array:
        return _count_layers(self.start)

    def _sum(self, values: _Array) -> _Array:
        """Sums over spans, at each of their layers. Shape: (N, L) to (N, L)."""
        return _sum_of_equal(self.start, values)

    def lengths(self, thickness: _Array) -> _Array:
        """Optical length [m] that the spans have in a prediction. Shape: (N, L) to (N, L).

        Args:
            thickness: [m]. Shape: (N, L).
        """
        return self._sum(self.index * _to_double(thickness))

    def hide(self, hidden: _Array) -> Spans[_Array]:
        """Return the spans that stay known when the lower boundaries of some layers are hidden.

        Two spans that a hidden boundary divides become one, whose length is known if both were.

        Args:
            hidden: Whether the lower boundary of each layer is hidden. Shape: (N, L), bool.
        """
        library = self._library
        above = library.concatenate([library.zeros_like(hidden[:, :1]), hidden[:, :-1]], 1)
        start = _cumulative_max(library.where(self.first & ~above, self._numbers, 0))
        path = _sum_of_equal(start, library.where(self.first, self.path, 0.0))
        # below its last boundary nothing is known of a span
        path = library.where((start == start[:, -1:]) & hidden[:, -1:], library.nan, path)
        if not self.sums:
            several = _sum_of_equal(start, library.ones_like(start)) > 1
            path = library.where(several, library.nan, path)
        return self._replace_path(start, path)

    def constrain(self, thickness: _Array) -> _Array:
        """Scale predicted thickness so that layers between two picks add up to what was measured.

        They share it in the proportions of the prediction, so that all stay positive; elsewhere
        nothing changes.

        Args:
            thickness: [m]; of such layers it is taken to be 0.1 mm at least. Shape: (N, L).

        Returns:
            [m]. Shape: (N, L), float64.
        """
        library = self._library
        thickness = _to_double(thickness)
        at_least = library.clip(thickness, THINNEST_LAYER, None)
        thickness = library.where(self.between, at_least, thickness)
        factor = library.where(self.between, self.path, 1.0) / self.lengths(thickness)
        constrained: _Array = library.where(self.between, thickness * factor, thickness)
        return constrained

    def project_std(self, std: _Array) -> _Array:
        """Share the uncertainty of layers between two picks, whose errors add up to nothing.

        Independent errors of these sizes are projected on a sum of 0: of variances v of optical
        lengths with the sum V, v (1 - v / V) is left. They are scaled so that the sum of each span
        stays, since ``std`` is of errors under the constraint. So two layers that share a length
        have errors of one size.

        Args:
            std: Standard deviation of each layer's error [m]. Shape: (N, L).

        Returns:
            [m]; as it was elsewhere. Shape: (N, L), float64.

        Source: inferred; conditioning of normal errors on their sum.
        """
        library = self._library
        std = _to_double(std)
        variance = library.where(self.between, (self.index * std) ** 2, 1.0)
        projected = variance * (1 - variance / self._sum(variance))
        divisor = library.where(self.between, self._sum(projected), 1.0)
        scaled = projected * self._sum(variance) / divisor
        shared: _Array = library.where(self.between, scaled**0.5 / self.index, std)
        return shared

    def misfit(self, thickness: _Array) -> _Array:
        """How far the lower boundary of each layer's span is from where it was picked.

        Args:
            thickness: Predicted [m]. Shape: (N, L).

        Returns:
            Predicted less measured [m]; NaN where nothing was measured. Shape: (N, L), float64.
        """
        optical, summed = self.lengths(thickness), self._sum(_to_double(thickness))
        misfit: _Array = summed * (1 - self.path / optical)
        return misfit

    def contradicts(self, thickness: _Array) -> _Array:
        """Where thickness is measured and is not what the spans say, or only one of them is there.

        Args:
            thickness: Thickness [m], NaN where missing. Shape: (N, L).
        """
        finite = self._library.isfinite(thickness)
        off = abs(self.index * thickness - self.path) > _TOLERANCE * abs(self.path)
        wrong: _Array = (finite != self.observed) | (finite & off)
        return wrong

    def keep(self, mask: _Array) -> Spans[_Array]:
        """Spans of which all layers are in a mask; of the others nothing is known.

        Args:
            mask: Layers to keep. Shape: (N, L), bool.
        """
        library = self._library
        missing = library.where(mask, library.zeros_like(self.start), 1)
        path = library.where(self._sum(missing) == 0, self.path, library.nan)
        return self._replace_path(self.start, path)

    def single(self) -> Spans[_Array]:
        """Return the observed layers alone, without sums of several."""
        return replace(self.keep(self.observed), sums=False)

    def _replace_path(self, start: _Array, path: _Array) -> Spans[_Array]:
        """Return spans of other lengths, where those of an unknown one are single layers."""
        library = self._library
        start = library.where(library.isnan(path), self._numbers, start)
        return replace(self, start=start, path=path)

    def __getitem__(self, rows: Any) -> Spans[_Array]:
        """Return the spans of some traces."""
        return Spans(self.start[rows], self.path[rows], self.index[rows], self.sums)

    def to(self: Spans[Tensor], device: torch.device | str) -> Spans[Tensor]:
        """Return spans of tensors on another device."""
        start, path, index = (x.to(device) for x in (self.start, self.path, self.index))
        return Spans(start, path, index, self.sums)


ArraySpans = Spans[NDArray[Any]]
TensorSpans = Spans[Tensor]


def _library_of(array: Any) -> Any:
    """The library of an array, whose functions are called alike: torch or numpy."""
    return torch if isinstance(array, Tensor) else np


def _to_double(values: _Array) -> _Array:
    """Values in float64; those of tensors keep their gradients, which torch.asarray drops."""
    return values.double() if isinstance(values, Tensor) else values.astype(np.float64)


def _count_layers(array: _Array) -> _Array:
    """Numbers of the layers. Shape: (N, L) to (L,)."""
    layers = array.shape[1]
    if isinstance(array, Tensor):
        return torch.arange(layers, device=array.device)
    return np.arange(layers)


def _cumulative_max(values: _Array) -> _Array:
    """Largest value of each layer and all above it. Shape: (N, L) to (N, L)."""
    if isinstance(values, Tensor):
        return values.cummax(1).values
    largest: NDArray[Any] = np.maximum.accumulate(values, axis=1)
    return largest


def _sum_of_equal(start: _Array, values: _Array) -> _Array:
    """Sums over the layers of a trace with equal starts, in one order on every device.

    Shape: (N, L) and (N, L) to (N, L).
    """
    if isinstance(start, Tensor) and start.device.type == "cpu":
        return torch.zeros_like(values).scatter_add(1, start, values).gather(1, start)
    if isinstance(start, Tensor):  # a GPU would add in any order
        same = start[:, :, None] == start[:, None, :]
        return torch.where(same, values[:, None, :], torch.zeros_like(values[:1, :1])).sum(-1)
    total = np.zeros_like(values)
    np.add.at(total, (np.arange(len(start))[:, None], start), values)
    return np.take_along_axis(total, start, 1)
