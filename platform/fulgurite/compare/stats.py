"""Means, spreads and paired differences over seeds, in plain Python."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Paired", "Spread", "paired", "spread"]


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of ``n`` values; ``std`` is NaN below two values."""

    n: int
    mean: float
    std: float

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return self.std / math.sqrt(self.n) if self.n else math.nan


@dataclass(frozen=True)
class Paired:
    """Difference to the baseline over the seeds that both have.

    Args:
        n: Number of common seeds.
        mean: Mean difference (method − baseline).
        error: Its standard error; NaN below two seeds.
        verdict: ``beats``, ``ties`` or ``loses`` at two standard errors; empty below two seeds.
    """

    n: int
    mean: float
    error: float
    verdict: str


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation (n − 1 in the denominator).

    >>> spread([1.0, 2.0, 3.0])
    Spread(n=3, mean=2.0, std=1.0)
    """
    n = len(values)
    mean = math.fsum(values) / n if n else math.nan
    if n < 2:
        return Spread(n, mean, math.nan)
    return Spread(n, mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1)))


def paired(ours: Mapping[int, float], base: Mapping[int, float], *, mode: str = "max") -> Paired:
    """Differences seed by seed: the seed's own difficulty cancels.

    Args:
        ours: Values by seed of the method.
        base: Values by seed of the baseline.
        mode: ``max`` where more is better, else ``min``.

    >>> paired({0: 3.0, 1: 4.0, 2: 5.5}, {0: 1.0, 1: 2.0, 3: 9.0})
    Paired(n=2, mean=2.0, error=0.0, verdict='beats')
    """
    differences = spread([ours[seed] - base[seed] for seed in sorted(ours.keys() & base.keys())])
    gain = differences.mean if mode == "max" else -differences.mean
    error = differences.error
    if math.isnan(gain) or math.isnan(error):
        verdict = ""
    elif abs(gain) <= 2 * error:
        verdict = "ties"
    else:
        verdict = "ties" if gain == 0 else "beats" if gain > 0 else "loses"
    return Paired(differences.n, differences.mean, error, verdict)
