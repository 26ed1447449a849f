"""Preprocessing of raw microscope pixels before storage.

Shapes: C channels, H W raw image, h w stored image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fulgurite.data.exclusions import BadImage
from fulgurite.options import PositiveInt, RightOpenUnitInterval, check_options

__all__ = ["Preprocess", "display_max"]


def display_max(pixels: NDArray[Any], fraction: float) -> float:
    """Return the smallest value of the brightest ``fraction`` of the pixels (at least one pixel).

    Source: docs/papers/cs_arm_bn.md section 2.3 (2).

    Example:
        >>> display_max(np.arange(100), 0.05)
        95.0
    """
    count = max(1, int(pixels.size * fraction))
    if pixels.dtype in (np.uint8, np.uint16):  # counting is several times faster than sorting
        above = np.bincount(pixels.reshape(-1))[::-1].cumsum()
        return float(len(above) - 1 - int(np.searchsorted(above, count)))
    index = pixels.size - count
    return float(np.partition(pixels, index, axis=None)[index])


_MOST_BELOW = 0.1  # of the peak: noise about a background that was subtracted stays within


@dataclass(frozen=True, repr=False)
class Preprocess:
    """Downscales a raw site and maps its intensities for storage.

    Args:
        downscale: Keep every n-th pixel along each axis (nearest neighbour).
        intensity: Mapping of intensities: ``percentile`` maps black to 0 and the 99.99th percentile
            of each image and channel to 255, in 8 bit, which cancels most of a plate's gain;
            ``full`` keeps the values, as fractions of the full scale of their type.
        saturate: Fraction of the pixels at 255 under ``percentile``.
        constant: Images to refuse as constant: those with a constant ``channel``, or only those
            with all channels constant (``image``; a colour photograph may lack a colour).

    Raises:
        ConfigError: A number is out of range, or a word is unknown.

    Source: docs/papers/cs_arm_bn.md section 2.3; rounding down is inferred.

    Example:
        >>> site = np.arange(32, dtype=np.uint16).reshape(2, 4, 4)
        >>> Preprocess(downscale=2)(site)[1].tolist()
        [[156, 176], [235, 255]]
    """

    downscale: PositiveInt = 2
    intensity: Literal["percentile", "full"] = "percentile"
    saturate: RightOpenUnitInterval = 1e-4
    constant: Literal["channel", "image"] = "channel"

    def __post_init__(self) -> None:
        check_options(self, "data.init_args.pixels.preprocess")

    def __repr__(self) -> str:
        # a part of the keys of the cache
        return (
            f"Preprocess({self.downscale}, {self.intensity!r}, {self.saturate}, {self.constant!r})"
        )

    def __call__(self, site: NDArray[Any]) -> NDArray[Any]:
        """Return the stored form of a site.

        Shape:
            - site: (C, H, W) uint8, uint16 or float -> (C, h, w) uint8, or of the same type.

        Raises:
            BadImage: A channel is constant, has values that are not finite, or ones far below 0
                that would be lost.
        """
        site = np.ascontiguousarray(site[:, :: self.downscale, :: self.downscale])
        if site.dtype.kind == "f" and not np.isfinite(site).all():
            raise BadImage("It holds values that are not finite.", kind="nan")
        flat = site.max((1, 2)) == site.min((1, 2))
        peaks = site.max((1, 2)).astype(np.float64)
        if self.intensity == "percentile":
            peaks = np.array([display_max(channel, self.saturate) for channel in site])
            flat |= peaks <= 0
        if flat.any() if self.constant == "channel" else flat.all():
            c = int(flat.argmax())
            raise BadImage(f"Channel {c} is {site[c].flat[0]} nearly everywhere.", kind="constant")
        if self.intensity == "full":
            return site
        lows = np.zeros(len(site)) if site.dtype.kind == "u" else site.min((1, 2)).astype(float)
        if (below := lows < -_MOST_BELOW * peaks).any():
            c = int(below.argmax())
            raise BadImage(
                f"Channel {c} reaches from {lows[c]:.3g} to {peaks[c]:.3g}, and "
                "`intensity: percentile` would make all below 0 black (`full` keeps it)."
            )
        mapped = np.empty(site.shape, np.uint8)
        for channel, peak, target in zip(site, peaks, mapped, strict=True):
            factor = 255 / max(float(peak), 1e-9)
            if channel.dtype in (np.uint8, np.uint16):
                target[:] = _to_byte(np.arange(int(channel.max()) + 1), factor)[channel]
            else:
                target[:] = _to_byte(channel, factor)
        return mapped


def _to_byte(values: NDArray[Any], factor: float) -> NDArray[np.uint8]:
    # the peak itself must not round down to 254
    return np.clip(values.astype(np.float64) * factor + 1e-3, 0, 255).astype(np.uint8)
