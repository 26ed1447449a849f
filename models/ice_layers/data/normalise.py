"""Batches as networks read them: z-scores with statistics of the training data.

Axes: N traces of all stacks, L layers, P physical fields.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite.domains.ice_layers.spans import THINNEST_LAYER, Spans, TensorSpans
from fulgurite.errors import DataError
from fulgurite.models.ice_layers.data.graph import Track

__all__ = ["Normalised", "Normaliser", "to_positive"]

_BEND = 0.01  # width of the bend that keeps thickness positive [m]


@dataclasses.dataclass(frozen=True)
class Normalised:
    """A batch as networks read it.

    Args:
        thickness: z-scores, or deviations from a prior; NaN where not observed. Shape: (N, L),
            float32.
        observed: Shape: (N, L), bool.
        physics: z-scores. Shape: (N, L, P).
        pos: z-scores of latitude and longitude. Shape: (N, 2).
        degrees: Latitude and longitude. Shape: (N, 2), float64.
        distance: Along the track [m]. Shape: (N,).
        track: The stacks.
        spans: What was measured between picked boundaries.
        expected: What a prior expects [m]. Shape: (N, L).
    """

    thickness: Tensor
    observed: Tensor
    physics: Tensor
    pos: Tensor
    degrees: Tensor
    distance: Tensor
    track: Track
    spans: TensorSpans
    expected: Tensor | None = None


class Normaliser(nn.Module):
    """z-scores with statistics of observed training entries, which the checkpoint holds.

    Args:
        layers: Number of layers, L.
        physics: Number of physical fields, P.
    """

    thickness_mean: Tensor
    thickness_std: Tensor
    physics_mean: Tensor
    physics_std: Tensor
    pos_mean: Tensor
    pos_std: Tensor

    def __init__(self, layers: int, physics: int) -> None:
        super().__init__()
        shapes = {"thickness_mean": (layers,), "thickness_std": (), "physics_mean": (physics,)}
        shapes |= {"physics_std": (physics,), "pos_mean": (2,), "pos_std": (2,)}
        for name, shape in shapes.items():
            fill = torch.zeros if name.endswith("mean") else torch.ones
            self.register_buffer(name, fill(shape, dtype=torch.float64))

    def set_statistics(self, statistics: dict[str, Tensor]) -> None:
        """Copy a DataModule's statistics into the buffers.

        Raises:
            DataError: A statistic is missing or has another shape.
        """
        for name, buffer in self.named_buffers():
            statistic = statistics.get(name)
            if statistic is None or statistic.shape != buffer.shape:
                shape = None if statistic is None else tuple(statistic.shape)
                raise DataError(
                    f"The data's statistics have {name} of {shape}, not {tuple(buffer.shape)}.",
                    "Use data.class_path=fulgurite.datamodules.ice_layers.IceLayerDataModule.",
                )
            buffer.copy_(statistic)

    def forward(self, batch: Any) -> Normalised:
        """Normalise a batch."""
        thickness = self.scores(batch.thickness)
        offset = batch.pos - self.pos_mean
        whole_turns = 360.0 * torch.round(offset[:, 1:] / 360.0)  # across the date line
        offset = torch.cat([offset[:, :1], offset[:, 1:] - whole_turns], 1)
        return Normalised(
            thickness.float(),
            batch.observed,
            ((batch.physics - self.physics_mean) / self.physics_std).float(),
            (offset / self.pos_std).float(),
            batch.pos,
            batch.distance.float(),
            Track.of_batch(batch),
            Spans.of_batch(batch),
        )

    def metres(self, thickness: Tensor) -> Tensor:
        """The inverse for thickness [m]. Shape: (..., L), float64."""
        return thickness.double() * self.thickness_std + self.thickness_mean

    def scores(self, thickness: Tensor) -> Tensor:
        """z-scores of thickness [m]. Shape: (..., L), float64."""
        return (thickness.double() - self.thickness_mean) / self.thickness_std


def to_positive(thickness: Tensor) -> Tensor:
    """Thickness kept above 0, unchanged from some centimetres on [m].

    Example:
        >>> to_positive(torch.tensor([0.3, 0.0, -1.0]))
        tensor([3.0000e-01, 6.9315e-03, 1.0000e-04])

    Source: inferred; docs/papers/ice_layers.md section 1.4 names softplus as an option.
    """
    # at least a tenth of a millimetre: softplus underflows far below 0
    return (_BEND * F.softplus(thickness / _BEND)).clamp_min(THINNEST_LAYER)
