"""Which numbers standardise images: measured, given, of a plate's controls, or of each image.

Shapes: D plates, C channels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fulgurite.datamodules.cs_arm_bn.images import PlateImages
from fulgurite.datamodules.cs_arm_bn.options import PixelOptions
from fulgurite.datamodules.cs_arm_bn.pixels import Standardisation
from fulgurite.datamodules.cs_arm_bn.table import Rows
from fulgurite.domains.cs_arm_bn import MIN_STD, PixelStatistics
from fulgurite.errors import ConfigError, DataError

__all__ = [
    "find_other_scales",
    "find_pixel_statistics",
    "make_standardisation",
    "measure_channels",
]

Statistics = tuple[Tensor, Tensor]

_OTHER_SCALE = 100.0  # times larger or smaller: no stain or exposure does it (inferred)


def measure_channels(images: PlateImages, rows: Rows, pixels: PixelOptions) -> Statistics | None:
    """Mean and standard deviation of the channels, in fractions of full scale.

    Args:
        images: The images.
        rows: Rows that are measured, where the options do not say it.
        pixels: Options of pixels.

    Returns:
        Both, each of shape (C,); None without rows, which leaves it to a checkpoint.

    Raises:
        ConfigError: The options have another number of channels.
    """
    if pixels.mean is not None and pixels.std is not None:
        channels = len(images.table.channels)
        for name, values in (("mean", pixels.mean), ("std", pixels.std)):
            if len(values) != channels:
                raise ConfigError(
                    f"There are {len(values)} values for {channels} channels.",
                    f"Give one `--data.init_args.pixels.{name}` for each channel.",
                )
        return torch.tensor(pixels.mean), torch.tensor(pixels.std)
    if not len(rows):
        return None
    mean, std = images.moments(rows)
    unit = images.unit(int(rows[0]))
    return torch.from_numpy(mean / unit).float(), torch.from_numpy(std / unit).float()


def find_other_scales(images: PlateImages, statistics: Statistics) -> dict[str, float]:
    """Find plates of floating point whose values are of another scale than those of training.

    Args:
        images: The images; integers have the scale of their type.
        statistics: Mean and standard deviation of the channels of training.

    Returns:
        How many times as large the values are (root mean square), by the name of the plate.
    """
    table = images.table
    if images.unit(0) != 1:
        return {}
    mean, std = (values.double().numpy() for values in statistics)
    trained = float(np.sqrt((mean**2 + std**2).mean()))
    scales = {}
    for plate, name in enumerate(table.domains):
        # a few images tell it where none are stored
        moments = np.stack(images.moments(np.flatnonzero(table.domain == plate), limit=4))
        ratio = float(np.sqrt((moments**2).sum(0).mean())) / max(trained, MIN_STD)
        if not 1 / _OTHER_SCALE < ratio < _OTHER_SCALE:
            scales[name] = ratio
    return scales


def _measure_controls(
    images: PlateImages, plate: int
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Mean and standard deviation of a plate's controls, in stored units. Shape: (2, C).

    Raises:
        DataError: The plate has none.
    """
    rows = images.table.rows_of(plate, control=True)
    if not len(rows):
        raise DataError(
            f"The plate {images.table.domains[plate]} has no controls to normalise by.",
            "Set `--data.init_args.pixels.normalise=dataset`.",
        )
    return np.stack(images.moments(rows))


def make_standardisation(
    images: PlateImages, pixels: PixelOptions, statistics: Statistics | None
) -> Standardisation:
    """What pixels become, by the option ``normalise``.

    Args:
        images: The images.
        pixels: Options of pixels.
        statistics: Mean and standard deviation of the channels in fractions of full scale.

    Raises:
        DataError: Statistics or controls are missing.
    """
    if pixels.normalise == "image":
        return Standardisation(None, None)
    if pixels.normalise == "dataset":
        unit = images.unit(0)
        return Standardisation(*(values * unit for values in _require(statistics)))
    moments = [_measure_controls(images, plate) for plate in range(len(images.table.domains))]
    return Standardisation(*torch.from_numpy(np.stack(moments, 1)).float())


def _require(statistics: Statistics | None) -> Statistics:
    if statistics is None:
        raise DataError(
            "There are no training queries to measure mean and deviation of the channels.",
            "Give a checkpoint with `--ckpt_path`, or `--data.init_args.pixels.mean` and `std`.",
        )
    return statistics


def find_pixel_statistics(
    images: PlateImages | None,
    pixels: PixelOptions,
    statistics: Statistics | None,
    *,
    plate: int | None,
    full_scale: float,
) -> PixelStatistics:
    """How the images of a plate are standardised, in fractions of full scale.

    Args:
        images: The images, where they were read.
        pixels: Options of pixels.
        statistics: Mean and standard deviation of the channels in fractions of full scale.
        plate: Number of the plate; None for one that may be any.
        full_scale: Full scale of the stored type.

    Raises:
        ConfigError: Plates are standardised by their own controls, and none is named.
        DataError: Statistics or controls are missing.
    """
    if pixels.normalise == "image":
        return PixelStatistics(None, None, full_scale)
    if pixels.normalise == "dataset":
        return PixelStatistics(*_require(statistics), full_scale)
    if plate is None or images is None:
        raise ConfigError(
            "Each plate is standardised by its own controls (data.init_args.pixels.normalise="
            "plate), and no plate is named.",
            "Name one with --plate, where the method takes it, or train with normalise=dataset.",
        )
    mean, std = torch.from_numpy(_measure_controls(images, plate) / full_scale).float()
    return PixelStatistics(mean, std, full_scale)
