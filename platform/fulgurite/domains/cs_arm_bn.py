"""The batch of plate classification: queries and controls of one plate, and what its pixels mean.

Axes: L queries, N controls, M = L + N rows, C channels, H W image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["MIN_STD", "MIXED", "PixelStatistics", "PlateBatch"]

#: Smallest standard deviation of an image by which it is divided, in units of its stored type.
MIN_STD = 1e-6
#: Plate of a batch whose queries are of several.
MIXED = -1


class PlateBatch(NamedTuple):
    """Queries and controls of one plate.

    Images are as they are stored until they are on the device; the DataModule standardises them
    there.

    Args:
        images: Queries first, then controls. Shape: (M, C, H, W), of an unsigned type as it is
            stored, or int32, the bits of float32; standardised float32, or what the trainer's
            precision makes of it, after the DataModule's ``on_after_batch_transfer``.
        n_query: Number L of queries.
        domain: Index of the plate; :data:`MIXED` for queries of several plates without controls.
        label: Class of each query, -1 if unknown. Shape: (L,) int64.
        well: Index of the well of each query, unique over plates. Shape: (L,) int64.
        counted: False where a query only pads the last batch of a plate. Shape: (L,) bool.
        row: Row of each query in the plate table. Shape: (L,) int64.
        query_domain: Index of the plate of each query. Shape: (L,) int64.
        control_row: Row of each control in the plate table. Shape: (N,) int64, on the CPU.
        control_domain: Index of the plate of each control. Shape: (N,) int64, on the CPU.

    Example:
        >>> batch = PlateBatch.from_images(torch.ones(2, 1, 4, 4), torch.zeros(3, 1, 4, 4))
        >>> batch.n_query, batch.query.shape, batch.control.shape
        (2, torch.Size([2, 1, 4, 4]), torch.Size([3, 1, 4, 4]))
    """

    images: Tensor
    n_query: int
    domain: int
    label: Tensor
    well: Tensor
    counted: Tensor
    row: Tensor
    query_domain: Tensor
    control_row: Tensor
    control_domain: Tensor

    @property
    def query(self) -> Tensor:
        """Images of the queries, a view. Shape: (L, C, H, W)."""
        return self.images[: self.n_query]

    @property
    def control(self) -> Tensor:
        """Images of the controls, a view. Shape: (N, C, H, W)."""
        return self.images[self.n_query :]

    def to(self, device: torch.device | str) -> PlateBatch:
        """Return the batch on a device, but for what only Python reads of the controls."""
        non_blocking = torch.device(device).type not in ("cpu", "mps")
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in self._asdict().items()
            if isinstance(value, Tensor) and not name.startswith("control_")
        }
        return self._replace(**moved)

    @classmethod
    def from_images(
        cls, query: Tensor, control: Tensor, label: Tensor | None = None, domain: int = 0
    ) -> PlateBatch:
        """Return the batch of one plate, with rows of the table from 0 and a well for each query.

        Args:
            query: Shape: (L, C, H, W).
            control: Shape: (N, C, H, W).
            label: Class of each query; unknown by default. Shape: (L,) int64.
            domain: Index of the plate.
        """
        rows = torch.arange(len(query) + len(control))
        return cls(
            images=torch.cat([query, control]),
            n_query=len(query),
            domain=domain,
            label=torch.full((len(query),), -1) if label is None else label,
            well=rows[: len(query)],
            counted=torch.ones(len(query), dtype=torch.bool),
            row=rows[: len(query)],
            query_domain=torch.full((len(query),), domain),
            control_row=rows[len(query) :],
            control_domain=torch.full((len(control),), domain),
        )


@dataclass(frozen=True)
class PixelStatistics:
    """How images are standardised, in fractions of the full scale of their stored type.

    Args:
        mean: Mean of each channel; None standardises each image by its own statistics.
            Shape: (C,).
        std: Standard deviation of each channel, as ``mean``. Shape: (C,).
        full_scale: Full scale of the stored type: 255, 65535, or 1 for floating point.

    Example:
        >>> PixelStatistics(torch.tensor([0.5]), torch.tensor([0.25]), 255.0).describe()
        {'mean': [0.5], 'std': [0.25]}
        >>> PixelStatistics(None, None, 255.0).describe()
        {'by': 'image'}
    """

    mean: Tensor | None
    std: Tensor | None
    full_scale: float

    @property
    def smallest(self) -> float:
        """Smallest standard deviation of an image by which it is divided."""
        return MIN_STD / self.full_scale

    def describe(self) -> dict[str, Any]:
        """Return the statistics as plain values."""
        if self.mean is None or self.std is None:
            return {"by": "image"}
        return {
            "mean": [round(value, 6) for value in self.mean.tolist()],
            "std": [round(value, 6) for value in self.std.tolist()],
        }
