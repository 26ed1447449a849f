"""Batch effects of generated plates: the operators of laboratory, batch and plate on images.

Shapes: R sites, C = 5 channels, S side of an image.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["SHARES", "LabSetting", "PlateEffect", "blur", "draw_effect"]

Floats = NDArray[np.floating[Any]]

_CHANNELS = 5
#: Fractions of the variance between laboratories, between batches of a laboratory, and between
#: plates of a batch: plates of a batch resemble each other.
SHARES = (0.05, 0.65, 0.3)


@dataclass(frozen=True)
class LabSetting:
    """Settings of a laboratory: its instrument, and the variation of its plates.

    Attributes:
        spread: Factor on the standard deviations of the batch effects.
        blur: Range of the standard deviation of the point spread function [pixels].
        scale: Magnification relative to the first laboratory.
        haze: Fraction of a heavily blurred copy that is added (widefield).

    Source: docs/papers/cs_arm_bn.md section 6.3 (lab shift).
    """

    spread: float = 1.0
    blur: tuple[float, float] = (0.25, 1.15)
    scale: float = 1.0
    haze: float = 0.0

    def scale_towards(self, strength: float) -> LabSetting:
        """Interpolate between the first laboratory (0) and this one (1).

        Example:
            >>> LabSetting(scale=0.8, blur=(1.0, 2.0), haze=0.2).scale_towards(0) == LabSetting()
            True
        """
        if strength >= 1:
            return self
        low, high = (
            a + strength * (b - a) for a, b in zip(LabSetting.blur, self.blur, strict=True)
        )
        scale, haze = self.scale**strength, self.haze * strength
        return LabSetting(1 + strength * (self.spread - 1), (low, high), scale, haze)


@dataclass(frozen=True)
class PlateEffect:
    """The operator of one plate, in physical order.

    Attributes:
        bleed: Mixing of stains. Shape: (C, C).
        blur: Standard deviation of the point spread function [pixels].
        haze: Fraction of a heavily blurred copy.
        vignette: Loss of light at the corners, 0 to 1.
        centre: Offset of the brightest point from the middle of the image. Shape: (2,).
        gain: Factor of each channel. Shape: (C,).
        offset: Background of each channel. Shape: (C,).
        tilt: Slope of the background along both axes. Shape: (C, 2).
        gamma: Exponent of the detector.
        noise: Standard deviation of the noise at signal 0.5.
        edge: Loss of cells and light in wells at the edge of the plate, 0 to 1.
    """

    bleed: Floats
    blur: float
    haze: float
    vignette: float
    centre: Floats
    gain: Floats
    offset: Floats
    tilt: Floats
    gamma: float
    noise: float
    edge: float

    def __call__(self, images: Floats, generator: np.random.Generator) -> Floats:
        """Apply the operator to clean images.

        Shape:
            - images: (R, C, S, S) -> the same, 0 or more.
        """
        size = images.shape[-1]
        images = images.astype(np.float32)
        images = np.einsum("cd,rdhw->rchw", self.bleed.astype(np.float32), images)
        if self.haze:
            images = images + self.haze * blur(images, size / 6)
        images = blur(images, self.blur)
        axis = (np.arange(size) + 0.5) / size * 2 - 1
        y, x = axis[:, None], axis[None, :]
        radius = (y - self.centre[0]) ** 2 + (x - self.centre[1]) ** 2
        images = images * np.clip(1 - self.vignette * radius / 2, 0, 1)
        images = images * self.gain[:, None, None] + self.offset[:, None, None]
        images = images + self.tilt[:, 0, None, None] * y + self.tilt[:, 1, None, None] * x
        images = np.clip(images, 0, None) ** self.gamma
        shot = (
            self.noise * np.sqrt(0.5 + images) * generator.standard_normal(images.shape, np.float32)
        )
        read = 0.01 * generator.standard_normal(images.shape, np.float32)
        noisy: Floats = np.clip(images + shot + read, 0, None)
        return noisy


def blur(images: Floats, sigma: float) -> Floats:
    """Blur with a Gaussian of standard deviation ``sigma`` [pixels]; the border is mirrored.

    Shape:
        - images: (R, C, S, S) -> the same.

    Example:
        >>> bool(np.isclose(blur(np.ones((1, 1, 4, 4)), 1.0), 1).all())
        True
    """
    size = images.shape[-1]
    reach = min(int(np.ceil(3 * sigma)), size - 1)
    if reach < 1:
        return images
    tap = np.arange(-reach, reach + 1)
    weight = np.exp(-(tap**2) / (2 * sigma**2))
    source = np.abs(np.arange(size)[:, None] + tap)
    source = np.where(source >= size, 2 * (size - 1) - source, source)
    kernel = np.zeros((size, size), np.float32)
    np.add.at(kernel, (np.arange(size)[:, None], source), weight / weight.sum())
    blurred: Floats = kernel @ images @ kernel.T
    return blurred


def draw_effect(
    seed: int, lab: int, batch: int, plate: int, *, setting: LabSetting, strength: float = 1.0
) -> PlateEffect:
    """Draw the operator of one plate from the seeds of its laboratory, its batch and itself.

    Args:
        seed: Seed of all plates.
        lab: Index of the laboratory.
        batch: Index of the batch in the laboratory.
        plate: Index of the plate in the batch.
        setting: Settings of the laboratory.
        strength: Factor on every effect; at 0 only a common blur and noise remain.

    Source: docs/papers/cs_arm_bn.md section 6.3 (domain operator).

    Example:
        >>> draw_effect(0, 0, 0, 0, setting=LabSetting(), strength=0).gain.tolist()
        [1.0, 1.0, 1.0, 1.0, 1.0]
    """
    keys = ((seed, 1, lab), (seed, 2, lab, batch), (seed, 3, lab, batch, plate))
    generators = [np.random.default_rng(key) for key in keys]

    def normal(*shape: int) -> Any:
        """Draw standard normal numbers: the sum of parts of laboratory, batch and plate."""
        return sum(
            fraction**0.5 * generator.standard_normal(shape)
            for fraction, generator in zip(SHARES, generators, strict=True)
        )

    def uniform(*shape: int) -> Any:
        """Draw uniform numbers in [0, 1], nested in the same way."""
        return np.vectorize(NormalDist().cdf)(normal(*shape))

    deviation = setting.spread * strength
    bleed = 0.12 * strength * uniform(_CHANNELS, _CHANNELS)
    np.fill_diagonal(bleed, 1.0)
    low, high = setting.blur
    return PlateEffect(
        bleed=bleed,
        blur=(low + high) / 2 + strength * (high - low) * (float(uniform()) - 0.5),
        haze=setting.haze,
        vignette=0.35 * strength * float(uniform()),
        centre=0.25 * strength * normal(2),
        gain=np.exp(0.35 * deviation * normal(_CHANNELS)),
        offset=np.abs(0.12 * deviation * normal(_CHANNELS)),
        tilt=0.1 * strength * (2 * uniform(_CHANNELS, 2) - 1),
        gamma=float(np.exp(0.2 * min(deviation, 1.5) * normal())),
        noise=0.055 + 0.025 * strength * (2 * float(uniform()) - 1),
        edge=0.3 * strength * float(uniform()),
    )
