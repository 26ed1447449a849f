"""Random fields and gaps of generated flights.

Shapes: H W a grid, N traces, K boundaries.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fulgurite.datamodules.ice_layers.stack import Array

__all__ = ["along_line", "gaussian_field", "markov_gaps"]


def gaussian_field(
    shape: tuple[int, int, int], length: float, generator: np.random.Generator
) -> Array:
    """Smooth random fields of mean 0 and variance 1.

    Args:
        shape: Number of fields, and their size.
        length: Correlation length exp(-d²/2ℓ²) [cells].
        generator: Generator of the white noise.

    Shape:
        - result (number, H, W).

    Example:
        >>> field = gaussian_field((2, 40, 30), 3.0, np.random.default_rng(0))
        >>> field.shape, bool(0.5 < field.std() < 1.5)
        ((2, 40, 30), True)
    """
    number, height, width = shape
    pad = int(np.ceil(4 * length))  # the noise is periodic, the field must not be
    h, w = height + pad, width + pad
    fy, fx = np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None, :]
    gain = np.exp(-((np.pi * length) ** 2) * (fx**2 + fy**2))
    weight = np.full(gain.shape, 2.0)
    weight[:, 0] = 1.0
    if w % 2 == 0:
        weight[:, -1] = 1.0
    gain /= np.sqrt((weight * gain**2).sum() / (h * w))
    noise = np.fft.rfft2(generator.standard_normal((number, h, w)))
    field: Array = np.fft.irfft2(noise * gain, s=(h, w))[:, :height, :width]
    return field


def along_line(
    count: int, positions: Array, length: float, generator: np.random.Generator
) -> Array:
    """Gaussian processes of mean 0 and variance 1 along a line.

    Args:
        count: Number of processes.
        positions: Positions along the line [m]. Shape: (N,).
        length: Correlation length exp(-d²/2ℓ²) [m].
        generator: Generator of the white noise.

    Shape:
        - result (count, N).

    Example:
        >>> along_line(3, np.arange(5.0), 2.0, np.random.default_rng(0)).shape
        (3, 5)
    """
    distance = (positions[:, None] - positions[None, :]) / length
    values, vectors = np.linalg.eigh(np.exp(-0.5 * distance**2))
    root = vectors * np.sqrt(np.clip(values, 0.0, None))
    noise: Array = generator.standard_normal((count, len(positions))) @ root.T
    return noise


def markov_gaps(
    fraction: Array, mean_gap: Array, traces: int, generator: np.random.Generator
) -> NDArray[np.bool_]:
    """Runs of missing picks: a two-state Markov chain along the track for each boundary.

    Args:
        fraction: Stationary probability of a missing pick.
        mean_gap: Mean length of a gap [traces].
        traces: Number of traces, N.
        generator: Generator of the chain.

    Shape:
        - fraction, mean_gap: (K,); result (K, N), true where missing.

    Source: docs/papers/ice_layers.md section 6.2.

    Example:
        >>> gaps = markov_gaps(np.array([0.0, 0.5]), np.ones(2) * 10, 2000,
        ...     np.random.default_rng(0))
        >>> gaps.mean(1).round(1)
        array([0. , 0.5])
    """
    leave = np.minimum(1.0 / mean_gap, 1.0)
    enter = np.minimum(leave * fraction / np.maximum(1 - fraction, 1e-9), 1.0)
    random = generator.random((traces, len(fraction)))
    missing = np.zeros((traces, len(fraction)), np.bool_)
    state = random[0] < fraction
    missing[0] = state
    for i in range(1, traces):
        state = np.where(state, random[i] >= leave, random[i] < enter)
        missing[i] = state
    return missing.T
