"""Corruptions of photographs: the families of CIFAR-10-C that need no photographs of their own.

Shapes: H W image, 3 colours.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["CORRUPTIONS", "corrupt"]

Image = NDArray[np.float64]  # (H, W, 3), 0 to 1
Generator = np.random.Generator


def _gaussian_noise(x: Image, level: float, g: Generator) -> Image:
    return x + g.normal(0, level, x.shape)


def _shot_noise(x: Image, level: float, g: Generator) -> Image:
    return g.poisson(np.clip(x, 0, 1) * level) / level


def _speckle_noise(x: Image, level: float, g: Generator) -> Image:
    return x + x * g.normal(0, level, x.shape)


def _impulse_noise(x: Image, level: float, g: Generator) -> Image:
    dice = g.uniform(size=x.shape)
    return np.where(dice < level / 2, 0.0, np.where(dice < level, 1.0, x))


def _convolve(x: Image, kernel: NDArray[Any]) -> Image:
    from scipy.ndimage import convolve

    blurred: Image = convolve(x, (kernel / kernel.sum())[:, :, None], mode="mirror")
    return blurred


def _gaussian_blur(x: Image, level: float, g: Generator) -> Image:
    from scipy.ndimage import gaussian_filter

    blurred: Image = gaussian_filter(x, (level, level, 0), mode="mirror")
    return blurred


def _defocus_blur(x: Image, level: tuple[float, float], g: Generator) -> Image:
    radius, soft = level
    axis = np.arange(-3, 4)
    # a disc whose border is smooth over a pixel, since CIFAR's radii are below two pixels
    distance = np.hypot(*np.meshgrid(axis, axis))
    return _gaussian_blur(_convolve(x, np.clip(radius + 0.5 - distance, 0, 1)), soft, g)


def _motion_blur(x: Image, level: tuple[float, float], g: Generator) -> Image:
    radius, sigma = level
    angle = math.radians(g.uniform(-45, 45))
    reach = int(radius)
    axis = np.arange(-reach, reach + 1)
    y, x_ = np.meshgrid(axis, axis, indexing="ij")
    along = x_ * math.cos(angle) + y * math.sin(angle)
    across = y * math.cos(angle) - x_ * math.sin(angle)
    line = np.clip(1 - np.abs(across), 0, 1) * np.exp(-(along**2) / (2 * sigma**2)) * (along >= 0)
    return _convolve(x, line)


def _magnify(x: Image, factor: float) -> Image:
    from scipy.ndimage import map_coordinates

    height, width = x.shape[:2]
    y = (np.arange(height) - (height - 1) / 2) / factor + (height - 1) / 2
    x_ = (np.arange(width) - (width - 1) / 2) / factor + (width - 1) / 2
    grid = np.meshgrid(y, x_, indexing="ij")
    return np.stack(
        [map_coordinates(x[..., c], grid, order=1, mode="nearest") for c in range(3)], 2
    )


def _zoom_blur(x: Image, level: float, g: Generator) -> Any:
    factors = np.arange(1, level, 0.02)
    return np.mean([x, *(_magnify(x, float(f)) for f in factors)], axis=0)


def _glass_blur(x: Image, level: tuple[float, int, int], g: Generator) -> Image:
    sigma, reach, times = level
    x = _gaussian_blur(x, sigma, g)
    height, width = x.shape[:2]
    coordinates = np.indices((height, width))
    for _ in range(times):  # all pixels are exchanged with neighbours at once
        moved = coordinates + g.integers(-reach, reach + 1, coordinates.shape)
        x = x[np.clip(moved[0], 0, height - 1), np.clip(moved[1], 0, width - 1)]
    return _gaussian_blur(x, sigma, g)


def _make_clouds(height: int, width: int, decay: float, g: Generator) -> Image:
    """Return a smooth random field in [0, 1]: octaves of noise, each weaker by ``decay``."""
    from scipy.ndimage import zoom

    side = 1 << (max(height, width) - 1).bit_length()
    total, weight, cells = np.zeros((side, side)), 1.0, 2
    while cells <= side:
        total += weight * zoom(g.uniform(-1, 1, (cells, cells)), side / cells, order=1)
        weight, cells = weight / decay, cells * 2
    total -= total.min()
    field: Image = (total / max(total.max(), 1e-9))[:height, :width]
    return field


def _fog(x: Image, level: tuple[float, float], g: Generator) -> Any:
    amount, decay = level
    top = x.max()
    fog = _make_clouds(x.shape[0], x.shape[1], decay, g)[..., None]
    return (x + amount * fog) * top / (top + amount)


def _snow(x: Image, level: tuple[float, float, float], g: Generator) -> Any:
    mean, threshold, keep = level
    flakes = g.normal(mean, 0.3, x.shape[:2])
    flakes = np.where(flakes < threshold, 0, np.clip(flakes, 0, 1))[..., None]
    flakes = _motion_blur(np.repeat(flakes, 3, 2), (4, 2.0), g)
    grey = x.mean(2, keepdims=True)
    whitened = keep * x + (1 - keep) * np.maximum(x, grey * 1.5 + 0.5)
    return whitened + flakes + flakes[::-1, ::-1]


def _brightness(x: Image, level: float, g: Generator) -> Any:
    # adding to V of HSV is scaling the pixel, which keeps hue and saturation
    value = x.max(2, keepdims=True)
    lifted = np.clip(value + level, 0, 1)
    return np.where(value > 0, x * lifted / np.maximum(value, 1e-9), lifted)


def _contrast(x: Image, level: float, g: Generator) -> Any:
    mean = x.mean((0, 1), keepdims=True)
    return (x - mean) * level + mean


def _saturate(x: Image, level: tuple[float, float], g: Generator) -> Any:
    factor, shift = level
    value = x.max(2, keepdims=True)
    saturation = 1 - x.min(2, keepdims=True) / np.maximum(value, 1e-9)
    new_saturation = np.clip(saturation * factor + shift, 0, 1)
    return value - (value - x) * new_saturation / np.maximum(saturation, 1e-9)


def _apply_pil(x: Image, change: Callable[[Any], Any]) -> Image:
    from PIL import Image as Pictures

    picture = Pictures.fromarray(np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8))
    changed: Image = np.asarray(change(picture), np.float64) / 255
    return changed


def _jpeg(x: Image, level: int, g: Generator) -> Image:
    from PIL import Image as Pictures

    def change(picture: Any) -> Any:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=level)
        return Pictures.open(file)

    return _apply_pil(x, change)


def _pixelate(x: Image, level: float, g: Generator) -> Image:
    from PIL import Image as Pictures

    def change(picture: Any) -> Any:
        width, height = picture.size
        small = picture.resize((int(width * level), int(height * level)), Pictures.Resampling.BOX)
        return small.resize((width, height), Pictures.Resampling.NEAREST)

    return _apply_pil(x, change)


def _elastic(x: Image, level: tuple[float, float], g: Generator) -> Image:
    from scipy.ndimage import gaussian_filter, map_coordinates

    amount, sigma = level
    height, width = x.shape[:2]
    shift = g.uniform(-1, 1, (2, height, width))
    shift = np.stack([gaussian_filter(s, sigma, mode="reflect") for s in shift])
    shift *= amount / max(float(np.abs(shift).max()), 1e-9)
    grid = np.indices((height, width)) + shift
    return np.stack([map_coordinates(x[..., c], grid, order=1, mode="mirror") for c in range(3)], 2)


_Function = Callable[[Image, Any, Generator], Any]

#: Families with the parameters of severity 1 to 5. Those of noise, blur, brightness, contrast,
#: saturation, JPEG and pixelation are CIFAR-10-C's; those of motion, zoom, glass, fog, snow and
#: elastic deformation are made for the functions above, from mild to strong.
CORRUPTIONS: Mapping[str, tuple[_Function, Sequence[Any]]] = {
    "gaussian_noise": (_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (_shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": (_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "speckle_noise": (_speckle_noise, (0.06, 0.1, 0.12, 0.16, 0.2)),
    "gaussian_blur": (_gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "defocus_blur": (_defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))),
    "motion_blur": (_motion_blur, ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5))),
    "zoom_blur": (_zoom_blur, (1.06, 1.11, 1.16, 1.21, 1.26)),
    "glass_blur": (
        _glass_blur,
        ((0.05, 1, 1), (0.25, 1, 1), (0.3, 1, 2), (0.4, 1, 3), (0.5, 2, 2)),
    ),
    "fog": (_fog, ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75))),
    "snow": (
        _snow,
        ((0.1, 0.6, 0.95), (0.1, 0.5, 0.9), (0.15, 0.55, 0.9), (0.25, 0.6, 0.85), (0.3, 0.65, 0.8)),
    ),
    "brightness": (_brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "saturate": (_saturate, ((0.3, 0), (0.1, 0), (1.5, 0), (2.0, 0.1), (2.5, 0.2))),
    "jpeg": (_jpeg, (80, 65, 58, 50, 40)),
    "pixelate": (_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "elastic": (_elastic, ((0.6, 2.0), (0.9, 2.0), (1.2, 1.8), (1.6, 1.5), (2.2, 1.5))),
}


def corrupt(
    image: NDArray[np.uint8], family: str, severity: int, generator: np.random.Generator
) -> NDArray[np.uint8]:
    """Return an image with one corruption of the CIFAR-10-C families; ``clean`` changes nothing.

    Frost and spatter of that benchmark are left out: they need photographs.

    Args:
        image: Image to corrupt.
        family: Name in :data:`CORRUPTIONS`, or ``clean``.
        severity: Severity from 1 to 5; 0 for ``clean``.
        generator: Generator of the random numbers.

    Shape:
        - (H, W, 3) uint8 -> the same.

    Source: Hendrycks and Dietterich, arXiv 1903.12261; own implementation.

    Example:
        >>> grey = np.full((8, 8, 3), 100, np.uint8)
        >>> int(corrupt(grey, "brightness", 5, np.random.default_rng(0))[0, 0, 0])
        176
    """
    if family == "clean":
        return image
    function, levels = CORRUPTIONS[family]
    changed = function(image / 255.0, levels[severity - 1], generator)
    result: NDArray[np.uint8] = np.rint(np.clip(changed, 0, 1) * 255).astype(np.uint8)
    return result
