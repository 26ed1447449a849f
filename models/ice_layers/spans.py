"""Spans of layers between two picked boundaries, whose measured length every completion keeps.

Axes: N traces of all stacks, L layers (newest first).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

__all__ = ["THINNEST_LAYER", "Spans"]

THINNEST_LAYER = 1e-4
"""Least thickness of a predicted layer [m]: less than nothing has no part of a sum."""


@dataclass(frozen=True)
class Spans:
    """Runs of layers between two picked boundaries without a picked one between them.

    A layer whose two boundaries are picked is a span of its own: it is observed. Where a boundary
    between two picked ones is missing, the layers of the span are missing, but not their sum.

    Args:
        start: Number of the first layer of the span that each layer is in; its own number where
            nothing was measured. Shape: (N, L), int64.
        path: Optical length of that span, index of refraction times thickness [m]; NaN where
            nothing was measured. Shape: (N, L), float64.
        index: Index of refraction of each layer; 1 where thickness itself was measured.
            Shape: (N, L), float64.
        sums: Whether sums of missing layers are known at all; they are not in data that hold
            thickness alone.

    Source: inferred; the paper masks entries of thickness and has no sums.

    Example:
        >>> spans = Spans.of_thickness(torch.tensor([[1.0, 2.0, 3.0]]), sums=True)
        >>> visible = spans.hide(torch.tensor([[True, False, False]]))
        >>> visible.observed, visible.between
        (tensor([[False, False,  True]]), tensor([[ True,  True, False]]))
        >>> visible.constrain(torch.tensor([[1.0, 1.0, 1.0]]))
        tensor([[1.5000, 1.5000, 1.0000]], dtype=torch.float64)
    """

    start: Tensor
    path: Tensor
    index: Tensor
    sums: bool = True

    @classmethod
    def of_batch(cls, batch: Any) -> Spans:
        """From a batch; in one that has no spans, thickness alone was measured."""
        if getattr(batch, "span_path", None) is None:
            return cls.of_thickness(batch.thickness.where(batch.observed, torch.nan))
        return cls(batch.span_start, batch.span_path, batch.refraction)

    @classmethod
    def of_thickness(cls, thickness: Tensor, sums: bool = False) -> Spans:
        """Spans of single layers, where nothing is known of sums.

        Args:
            thickness: [m], NaN where missing. Shape: (N, L).
            sums: Whether the sum of two layers stays known when the boundary between them is
                hidden.
        """
        number = torch.arange(thickness.shape[1], device=thickness.device)
        path = thickness.double()
        return cls(number.expand(thickness.shape).clone(), path, torch.ones_like(path), sums)

    @cached_property
    def known(self) -> Tensor:
        """Whether something was measured that the layer is in. Shape: (N, L), bool."""
        return self.path.isfinite()

    @cached_property
    def length(self) -> Tensor:
        """Number of layers of each layer's span. Shape: (N, L), int64."""
        return self._sum(torch.ones_like(self.start))

    @cached_property
    def observed(self) -> Tensor:
        """Whether the layer itself was measured. Shape: (N, L), bool."""
        return self.known & (self.length == 1)

    @cached_property
    def between(self) -> Tensor:
        """Whether the layer is missing, but is a part of a measured sum. Shape: (N, L), bool."""
        return self.known & (self.length > 1)

    @cached_property
    def picked(self) -> Tensor:
        """Whether the lower boundary of each layer is picked. Shape: (N, L), bool."""
        first = self.first
        none = torch.zeros_like(first[:, :1])
        last = torch.cat([first[:, 1:], ~none], 1)
        return (last & self.known) | torch.cat([(first & self.known)[:, 1:], none], 1)

    @cached_property
    def first(self) -> Tensor:
        """Whether the layer is the first one of its span. Shape: (N, L), bool."""
        return self.start == self._number

    @cached_property
    def _number(self) -> Tensor:
        return torch.arange(self.start.shape[1], device=self.start.device)

    def _sum(self, values: Tensor) -> Tensor:
        """Sums over spans, at each of their layers. Shape: (N, L) to (N, L)."""
        return _sum_of_equal(self.start, values)

    def lengths(self, thickness: Tensor) -> Tensor:
        """Optical length [m] that the spans have in a prediction. Shape: (N, L) to (N, L).

        Args:
            thickness: [m]. Shape: (N, L).
        """
        return self._sum(self.index * thickness.double())

    def hide(self, hidden: Tensor) -> Spans:
        """Return the spans that stay known when the lower boundaries of some layers are hidden.

        Two spans that a hidden boundary divides become one, whose length is known if both were.

        Args:
            hidden: Whether the lower boundary of each layer is hidden. Shape: (N, L), bool.
        """
        above = torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], 1)
        start = torch.where(self.first & ~above, self._number, 0).cummax(1).values
        path = _sum_of_equal(start, torch.where(self.first, self.path, 0.0))
        # below its last boundary nothing is known of a span
        path = torch.where((start == start[:, -1:]) & hidden[:, -1:], torch.nan, path)
        if not self.sums:
            several = _sum_of_equal(start, torch.ones_like(start)) > 1
            path = torch.where(several, torch.nan, path)
        return self._replace_path(start, path)

    def constrain(self, thickness: Tensor) -> Tensor:
        """Scale predicted thickness so that layers between two picks add up to what was measured.

        They share it in the proportions of the prediction, so that all stay positive; elsewhere
        nothing changes.

        Args:
            thickness: [m]; of such layers it is taken to be 0.1 mm at least. Shape: (N, L).

        Returns:
            [m]. Shape: (N, L), float64.
        """
        thickness = thickness.double()
        thickness = torch.where(self.between, thickness.clamp_min(THINNEST_LAYER), thickness)
        factor = torch.where(self.between, self.path, 1.0) / self.lengths(thickness)
        return torch.where(self.between, thickness * factor, thickness)

    def misfit(self, thickness: Tensor) -> Tensor:
        """How far the lower boundary of each layer's span is from where it was picked.

        Args:
            thickness: Predicted [m]. Shape: (N, L).

        Returns:
            Predicted less measured [m]; NaN where nothing was measured. Shape: (N, L), float64.
        """
        optical, summed = self.lengths(thickness), self._sum(thickness.double())
        return summed * (1 - self.path / optical)

    def keep(self, mask: Tensor) -> Spans:
        """Spans of which all layers are in a mask; of the others nothing is known.

        Args:
            mask: Layers to keep. Shape: (N, L), bool.
        """
        complete = self._sum((~mask).long()) == 0
        return self._replace_path(self.start, torch.where(complete, self.path, torch.nan))

    def single(self) -> Spans:
        """Return the observed layers alone, without sums of several."""
        return replace(self.keep(self.observed), sums=False)

    def _replace_path(self, start: Tensor, path: Tensor) -> Spans:
        """Return spans of other lengths, where those of an unknown one are single layers."""
        return replace(self, start=torch.where(path.isnan(), self._number, start), path=path)

    def __getitem__(self, rows: Any) -> Spans:
        """Return the spans of some traces."""
        return Spans(self.start[rows], self.path[rows], self.index[rows], self.sums)

    def to(self, device: torch.device | str) -> Spans:
        """Return the spans on another device."""
        start, path, index = (x.to(device) for x in (self.start, self.path, self.index))
        return Spans(start, path, index, self.sums)


def _sum_of_equal(start: Tensor, values: Tensor) -> Tensor:
    """Sums over the layers of a trace with equal starts, in one order on every device.

    Shape: (N, L) and (N, L) to (N, L).
    """
    same = start[:, :, None] == start[:, None, :]
    return torch.where(same, values[:, None, :], torch.zeros_like(values[:1, :1])).sum(-1)
