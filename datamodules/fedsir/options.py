"""Options of a federated data set: the validation split, and how images reach the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fulgurite.errors import ConfigError
from fulgurite.options import PositiveInt, RightOpenUnitInterval, check_options

__all__ = ["FederatedEvaluationOptions", "ImageOptions"]


@dataclass(frozen=True)
class FederatedEvaluationOptions:
    """The validation split, and the batches of evaluation.

    Args:
        val_fraction: Fraction of each class of the training originals that becomes the validation
            split, with true labels.
        batch_size: Batch size of validation, test and prediction.

    Raises:
        ConfigError: A number is out of range.
    """

    val_fraction: RightOpenUnitInterval = 0.1
    batch_size: PositiveInt = 512

    def __post_init__(self) -> None:
        check_options(self, "data.init_args.evaluation")


@dataclass(frozen=True)
class ImageOptions:
    """How images reach the network.

    Args:
        augment: Training augmentation: ``shift`` by at most one pixel, or ``crop_flip`` (padding
            4, mirrored half of the time).
        mean: Mean of each channel [0 to 1]; measured on training images by default.
        std: Standard deviation of each channel, in the same unit; measured on training images by
            default.

    Raises:
        ConfigError: ``augment`` is unknown, or only one of ``mean`` and ``std`` is given, or one
            of them is out of range.
    """

    augment: Literal["none", "shift", "crop_flip"] = "none"
    mean: list[float] | None = None
    std: list[float] | None = None

    def __post_init__(self) -> None:
        check_options(self, "data.init_args.images")
        # written so that NaN is refused too
        if (self.mean is None) != (self.std is None) or not all(
            0 <= mean <= 1 and 0 < std < float("inf")
            for mean, std in zip(self.mean or (), self.std or (), strict=False)
        ):
            raise ConfigError(
                f"The mean is {self.mean} and the standard deviation {self.std}.",
                "Give both `--data.init_args.images.mean` (from 0 to 1: that of pixels from 0 to "
                "255, over 255) and `--data.init_args.images.std` (positive, over 255), or none.",
            )
