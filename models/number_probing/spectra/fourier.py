"""The Fourier spectrum of number embeddings, and the periods at which it has lines.

Axes: N numbers, D embedding width, K frequencies, T period.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from fulgurite.errors import ConfigError, DataError
from fulgurite.models.number_probing.tables.checks import (
    check_consecutive,
    check_embeddings,
    check_periods,
    list_periods,
)

__all__ = [
    "LOWEST",
    "PERIODS",
    "Spectrum",
    "Spike",
    "class_means",
    "period_power",
    "spectrum",
    "spikes",
]

#: Periods that the paper reports.
PERIODS = tuple(range(2, 11))

#: Below it a smooth drift over n has its power [cycles per number].
LOWEST = 0.09

_WINDOW = 0.02  # surroundings of the local ratio, to each side [cycles per number]
_NEAR = 2  # bins to each side that belong to a line
_SPIKE = 1.4


@dataclass(frozen=True)
class Spectrum:
    """Magnitudes of the unitary DFT over n.

    Attributes:
        frequency: ν = k/N for k = 1 … N/2 [cycles per number]. Shape: (K,).
        magnitude: ‖F_ν‖ over the dimensions, in the unit of the embeddings. Shape: (K,).
        normalised: The magnitude divided by its median over ν [1]. Shape: (K,).
        local_ratio: The magnitude divided by the median of its surroundings, ν ± 0.02 without
            the two nearest bins on each side [1]. Shape: (K,).

    Source: docs/papers/number_probing.md section 1.2, the normalisation and the local ratio
    inferred.
    """

    frequency: Tensor
    magnitude: Tensor
    normalised: Tensor
    local_ratio: Tensor

    def bin(self, frequency: float | Fraction) -> int:
        """Index of the bin nearest to a frequency [cycles per number]."""
        return int((self.frequency - float(frequency)).abs().argmin())


@dataclass(frozen=True)
class Spike:
    """Whether the spectrum has a line at a period.

    Attributes:
        period: T.
        magnitude: The largest normalised magnitude at l/T, l and T without common divisor [1].
        local_ratio: The largest local ratio there [1].
        floor: The largest local ratio off all lines, for frequencies from 0.09 [1].
        verdict: The local ratio is at least 1.4 and above the floor.
    """

    period: int
    magnitude: float
    local_ratio: float
    floor: float

    @property
    def verdict(self) -> bool:
        """Whether there is a spike."""
        return self.local_ratio >= _SPIKE and self.local_ratio > self.floor


def spectrum(
    embeddings: Tensor,
    numbers: Sequence[int] | Tensor | None = None,
    *,
    allow_duplicates: bool = False,
) -> Spectrum:
    """Magnitudes of the unitary DFT over consecutive numbers, each dimension by itself.

    Args:
        embeddings: Row by row. Shape: (N, D).
        numbers: Consecutive and ascending; by default from 0. Shape: (N,).
        allow_duplicates: As in :func:`check_embeddings`.

    Returns:
        The spectrum without ν = 0, float64, on the device of ``embeddings``.

    Raises:
        DataError: See :func:`check_embeddings`; or the numbers are not consecutive, or too few.

    Example:
        >>> n = torch.arange(100.0)
        >>> s = spectrum(torch.stack([9 * torch.cos(n * torch.pi / 5), n], 1))
        >>> [round(float(s.local_ratio[s.bin(v)]), 1) for v in (0.1, 0.3)]
        [3.8, 1.1]

    Source: docs/papers/number_probing.md section 1.2.
    """
    x, n = check_embeddings(embeddings, numbers, allow_duplicates=allow_duplicates)
    check_consecutive(n)
    if (size := len(x)) < 20:
        raise DataError(
            f"A spectrum of {size} numbers has no surroundings to compare a line with.",
            "Give 20 numbers or more, better 100.",
        )
    magnitude = torch.fft.rfft(x - x.mean(0), dim=0, norm="ortho").abs().norm(dim=1)[1:]
    bins = torch.arange(1, len(magnitude) + 1, device=x.device)
    distance = (bins[:, None] - bins).abs()
    is_neighbour = (distance > _NEAR) & (distance <= max(_WINDOW * size, _NEAR + 3))
    # their lower median, by sorting: CUDA refuses nanmedian in deterministic mode
    ordered = magnitude.expand_as(distance).where(is_neighbour, torch.inf).sort(1).values
    surroundings = ordered.gather(1, (is_neighbour.sum(1, keepdim=True) - 1) // 2)[:, 0]
    tiny = torch.finfo(x.dtype).tiny
    return Spectrum(
        bins / size,
        magnitude,
        magnitude / magnitude.median().clamp(min=tiny),
        magnitude / surroundings.clamp(min=tiny),
    )


def _own_lines(period: int) -> list[Fraction]:
    """Frequencies l/T up to 1/2 that no shorter period has."""
    return [Fraction(h, period) for h in range(1, period // 2 + 1) if math.gcd(h, period) == 1]


def spikes(spectrum: Spectrum, periods: Sequence[int] = PERIODS) -> dict[int, Spike]:
    """The spike verdict of each period.

    The lines of a period are those that no shorter period has: of T = 10, 0.1 and 0.3.

    Args:
        spectrum: Spectrum of the embeddings.
        periods: T.

    Returns:
        Spikes by period.

    Raises:
        ConfigError: A period is no whole number of at least 2.

    Example:
        >>> n = torch.arange(1000.0)
        >>> noise = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
        >>> x = torch.cat([torch.sin(n * 0.4 * torch.pi)[:, None], noise], 1)
        >>> by_period = spikes(spectrum(x))
        >>> [t for t in by_period if by_period[t].verdict]
        [5]

    Source: docs/papers/number_probing.md section 1.2, inferred: the text of arXiv 2604.20817 that
    we know gives no number.
    """
    periods = list_periods(periods)
    if min(periods, default=2) < 2:
        raise ConfigError(f"periods={list(periods)} have no lines.", "Give 2 or more.")
    bins = torch.arange(len(spectrum.frequency), device=spectrum.frequency.device)
    off = spectrum.frequency >= LOWEST
    for line in {line for t in periods for line in _own_lines(t)}:
        off &= (bins - spectrum.bin(line)).abs() > _NEAR
    floor = float(spectrum.local_ratio[off].max()) if bool(off.any()) else 0.0
    return {
        t: Spike(
            t,
            max(float(spectrum.normalised[spectrum.bin(line)]) for line in _own_lines(t)),
            max(float(spectrum.local_ratio[spectrum.bin(line)]) for line in _own_lines(t)),
            floor,
        )
        for t in periods
    }


def class_means(embeddings: Tensor, numbers: Tensor, period: int) -> Tensor:
    """Mean embedding of each residue. Shape: (T, D).

    Example:
        >>> class_means(torch.tensor([[1.0], [2.0], [5.0]]), torch.tensor([0, 1, 2]), 2)
        tensor([[3.],
                [2.]])
    """
    residues = numbers % period
    sums = embeddings.new_zeros(period, embeddings.shape[1]).index_add_(0, residues, embeddings)
    return sums / residues.bincount(minlength=period)[:, None]


def period_power(
    embeddings: Tensor,
    period: int,
    numbers: Sequence[int] | Tensor | None = None,
    *,
    allow_duplicates: bool = False,
) -> float:
    """Φ_T: total power on the harmonics of a period, in the squared unit of the embeddings.

    The numbers are cut to whole periods. Φ grows with the scale of the embeddings: compare models
    by η² (:func:`scatter`).

    Args:
        embeddings: Row by row. Shape: (N, D).
        period: T.
        numbers: Consecutive and ascending; by default from 0. Shape: (N,).
        allow_duplicates: As in :func:`check_embeddings`.

    Raises:
        ConfigError: The period does not fit the numbers.
        DataError: See :func:`spectrum`.

    Example:
        >>> n = torch.arange(1000)
        >>> round(period_power((5.0 * (n % 10) + 0.03 * (n // 10))[:, None], 10), 2)
        206250.0

    Source: docs/papers/number_probing.md section 1.2.
    """
    x, n = check_embeddings(embeddings, numbers, allow_duplicates=allow_duplicates)
    check_consecutive(n)
    check_periods([period], len(x))
    size = len(x) // period * period
    means = class_means(x[:size], n[:size], period)
    # F at l/T is the T-point DFT of the class means, times √N; its own norm is 1/√T
    lines = torch.fft.fft(means - means.mean(0), dim=0, norm="ortho")[1:]
    return float(lines.abs().square().sum()) * size / period
