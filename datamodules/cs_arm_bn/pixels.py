"""Pixels of a batch: crops of stored images on the host, and their standardisation on the device.

Shapes: D plates, M rows, C channels, H W image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fulgurite.datamodules.cs_arm_bn.images import PlateImages
from fulgurite.datamodules.cs_arm_bn.table import Rows
from fulgurite.domains.cs_arm_bn import MIN_STD, PlateBatch

__all__ = ["ImageCrops", "Standardisation"]


@dataclass(frozen=True)
class ImageCrops:
    """Crops and mirror images of stored images, in their stored type.

    Attributes:
        images: Store of the images.
        size: Side of the crop [pixels]; ``None`` for no crop.
        augment: Whether to crop and mirror at random in training; else the crop is central.
    """

    images: PlateImages
    size: int | None
    augment: bool

    def read(self, rows: Rows, generator: np.random.Generator | None) -> Tensor:
        """Return images; without a generator they are neither cropped at random nor mirrored.

        Shape:
            - (len(rows), C, H, W) uint8, uint16 or float32.
        """
        random = generator if self.augment else None
        # drawn at once, so that the random numbers do not depend on how images are read
        uniform = random.random((len(rows), 4)) if random is not None else None
        views = [
            self._crop_flip(self.images[int(row)], None if uniform is None else uniform[i])
            for i, row in enumerate(rows)
        ]
        if not views:
            channels, size = len(self.images.table.channels), self.size or 1
            return torch.zeros(0, channels, size, size)
        pixels = torch.from_numpy(np.stack(views))
        return pixels.float() if pixels.is_floating_point() else pixels

    def _crop_flip(self, image: NDArray[Any], uniform: NDArray[Any] | None) -> NDArray[Any]:
        height, width = image.shape[-2:]
        if self.size is not None and (self.size, self.size) != (height, width):
            down, right = height - self.size, width - self.size
            if uniform is None:
                first_row, first_column = down // 2, right // 2
            else:
                first_row, first_column = (
                    int(uniform[0] * (down + 1)),
                    int(uniform[1] * (right + 1)),
                )
            image = image[
                :, first_row : first_row + self.size, first_column : first_column + self.size
            ]
        if uniform is not None:
            if uniform[2] < 0.5:
                image = image[:, ::-1]
            if uniform[3] < 0.5:
                image = image[:, :, ::-1]
        return image


@dataclass(frozen=True)
class Standardisation:
    """What pixels become on the device: zero mean and unit standard deviation.

    Attributes:
        mean: Mean of each channel, in stored units; ``None`` standardises each image by its own
            statistics. Shape: (C,), or (D, C) by plate.
        std: Standard deviation of each channel, as ``mean``.
    """

    mean: Tensor | None
    std: Tensor | None

    def to(self, device: torch.device) -> Standardisation:
        """Return the statistics on a device."""
        moved = [
            None if values is None else values.to(device, non_blocking=True)
            for values in (self.mean, self.std)
        ]
        return Standardisation(*moved)

    def apply(self, batch: PlateBatch) -> Tensor:
        """Return the standardised images of a batch on the device of the statistics.

        Shape:
            - (M, C, H, W) float32.
        """
        stored = batch.images
        if stored.dtype == torch.int32:  # the bits of float32
            stored = stored.view(torch.float32)
        pixels = stored.to(torch.float32, copy=True)
        if self.mean is None or self.std is None:
            std, mean = torch.std_mean(pixels, (2, 3), correction=0, keepdim=True)
            return (pixels - mean) / std.clamp_min(MIN_STD)
        mean, std = self.mean, self.std
        if mean.ndim == 2:
            controls = batch.control_domain.to(pixels.device, non_blocking=True)
            domain = torch.cat([batch.query_domain, controls])
            mean, std = mean[domain], std[domain]
        return pixels.sub_(mean[..., None, None]).div_(std[..., None, None])
