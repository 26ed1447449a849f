"""Scikit-learn's digits, with augmented copies.

Shapes: N samples, C channels, H W image.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fulgurite.datamodules.fedsir.selection import choose_per_class, class_quota, make_generator
from fulgurite.datamodules.fedsir.sources import ImageArrays, ImageSource
from fulgurite.errors import ConfigError

__all__ = ["Digits"]


class Digits(ImageSource):
    """Scikit-learn's 1,797 real 8×8 images of handwritten digits.

    360 unchanged images are the test split. Each training image becomes ``copies`` copies, each
    with a random shift, rotation and pixel noise.

    Args:
        copies: Number of augmented copies of each training image; 1 keeps the originals unchanged.
        seed: Seed of the test split and of the copies.
        max_shift: Largest shift of a copy along each axis [pixels].
        max_rotation: Largest rotation of a copy [degrees].
        pixel_noise: Standard deviation of the noise [fraction of full scale].
        train_limit: Keep at most this many originals, balanced by class.
        test_limit: Keep at most this many test images, balanced by class.

    Raises:
        ConfigError: ``copies`` is below 1, or a limit is not positive.

    Source: docs/papers/fedsir.md section 3d (toy: digits with 10 augmented copies); the
    kind and size of the augmentation are inferred.

    Example:
        >>> arrays = Digits().load()
        >>> tuple(arrays.train_images.shape), len(arrays.test_labels)
        ((1437, 1, 8, 8), 360)
    """

    def __init__(
        self,
        copies: int = 10,
        seed: int = 0,
        max_shift: float = 1.0,
        max_rotation: float = 10.0,
        *,
        pixel_noise: float = 0.05,
        train_limit: int | None = None,
        test_limit: int | None = None,
    ) -> None:
        super().__init__(train_limit, test_limit, seed)
        if copies < 1:
            raise ConfigError(
                f"There cannot be {copies} copies of each digit.",
                "Set `--data.init_args.source.init_args.copies` to 1 or more.",
            )
        self.copies = copies
        self.max_shift = max_shift
        self.max_rotation = max_rotation
        self.pixel_noise = pixel_noise

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return 10

    @property
    def in_channels(self) -> int:
        """Number of channels."""
        return 1

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width [pixels]."""
        return 8, 8

    def read(self) -> ImageArrays:
        """Return the originals; :meth:`copy_images` makes the copies."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))[:, None]
        labels = torch.from_numpy(digits.target.astype(np.int64))
        in_test = torch.zeros(len(labels), dtype=torch.bool)
        quota = class_quota(labels, 10, 360)
        in_test[choose_per_class(labels, quota, make_generator(self.seed, 2))] = True
        return ImageArrays(
            images[~in_test],
            labels[~in_test],
            images[in_test],
            labels[in_test],
            tuple(str(digit) for digit in range(10)),
        )

    def copy_images(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return shifted, rotated and noisy copies: see :meth:`ImageSource.copy_images`."""
        generator = make_generator(self.seed, 3)
        images, labels = super().copy_images(images, labels)
        angle, down, right = torch.rand(3, len(images), generator=generator) * 2 - 1
        angle = angle * math.radians(self.max_rotation)
        height, width = images.shape[-2:]
        affine = torch.stack(
            [
                torch.stack([angle.cos(), -angle.sin(), right * (2 * self.max_shift / width)], -1),
                torch.stack([angle.sin(), angle.cos(), down * (2 * self.max_shift / height)], -1),
            ],
            1,
        )
        grid = F.affine_grid(affine, list(images.shape), align_corners=False)
        moved = F.grid_sample(images.float(), grid, mode="bilinear", align_corners=False)
        moved += torch.randn(moved.shape, generator=generator) * (255 * self.pixel_noise)
        return moved.round_().clamp_(0, 255).byte(), labels
