"""Means, spreads and tests of paired differences over seeds.

A method is better or worse than the baseline where a paired t-test over the common seeds says so
at 95 %, after Holm's correction for the number of comparisons in the table.

Source: Student, "The probable error of a mean", Biometrika 6 (1908), for the paired t-test;
S. Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of
Statistics 6 (1979), 65–70, for the correction.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["LEAST_SEEDS", "LEVEL", "MeanStd", "Paired", "holm", "mean_std", "paired", "quantile"]

LEVEL = 0.95
"""Confidence of the tests, that of a whole table."""

LEAST_SEEDS = 3
"""With fewer common seeds nothing is tested: two say next to nothing about their spread."""

_SQUARABLE = 2.0**450
"""Larger values, and those below its inverse, are scaled before they are squared."""

_K = TypeVar("_K", bound=Hashable)


@dataclass(frozen=True)
class MeanStd:
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
        p: Two-sided p-value of the paired t-test; NaN below three seeds, and where the difference
            is the same for every seed: then the seeds are no repetitions to learn a spread from.
        gain: Mean difference in the direction in which more is better.
    """

    n: int
    mean: float
    error: float
    p: float
    gain: float

    def verdict(self, p_adjusted: float) -> str:
        """``beats``, ``ties`` or ``loses``; empty where nothing was tested.

        Args:
            p_adjusted: The p-value after the correction for the whole table.
        """
        if self.n >= LEAST_SEEDS and self.mean == 0:
            return "ties"
        if math.isnan(p_adjusted):
            return ""
        if p_adjusted > 1 - LEVEL:
            return "ties"
        return "beats" if self.gain > 0 else "loses"


def mean_std(values: Sequence[float]) -> MeanStd:
    """Mean and sample standard deviation (n − 1 in the denominator).

    Of values that are not all finite, such as those of a run that diverged, ``std`` is NaN.

    >>> mean_std([1.0, 2.0, 3.0])
    MeanStd(n=3, mean=2.0, std=1.0)
    >>> mean_std([1.0, math.inf])
    MeanStd(n=2, mean=inf, std=nan)
    """
    n = len(values)
    if not all(map(math.isfinite, values)):
        return MeanStd(n, sum(values) / n, math.nan)
    largest = max(map(abs, values), default=0.0)
    if largest > _SQUARABLE or 0 < largest < 1 / _SQUARABLE:  # whose squares are no numbers
        scale = _SQUARABLE**2 if largest > 1 else _SQUARABLE**-2
        scaled = mean_std([value / scale for value in values])
        return MeanStd(n, scaled.mean * scale, scaled.std * scale)
    mean = math.fsum(values) / n if n else math.nan
    if n < 2:
        return MeanStd(n, mean, math.nan)
    return MeanStd(n, mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1)))


def paired(ours: Mapping[int, float], base: Mapping[int, float], *, mode: str = "max") -> Paired:
    """Differences seed by seed, in which the seed's own difficulty cancels, and their t-test.

    Args:
        ours: Values by seed of the method.
        base: Values by seed of the baseline.
        mode: ``max`` where more is better, else ``min``.

    >>> difference = paired({0: 3.0, 1: 4.0, 2: 5.0}, {0: 1.0, 1: 1.0, 2: 1.0, 3: 9.0})
    >>> difference.n, difference.mean, round(difference.p, 4)
    (3, 3.0, 0.0351)
    """
    common = sorted(ours.keys() & base.keys())
    differences = mean_std([ours[seed] - base[seed] for seed in common])
    size = max((abs(v) for seed in common for v in (ours[seed], base[seed])), default=0.0)
    p = math.nan
    if differences.n >= LEAST_SEEDS and differences.std > 1e-12 * size:  # else rounding alone
        from scipy.special import stdtr

        t = differences.mean / differences.error
        p = 2 * float(stdtr(differences.n - 1, -abs(t)))
    gain = differences.mean if mode == "max" else -differences.mean
    return Paired(differences.n, differences.mean, differences.error, p, gain)


def quantile(n: int) -> float:
    """How many standard errors a single paired difference of ``n`` seeds needs.

    >>> round(quantile(3), 2), round(quantile(6), 2)
    (4.3, 2.57)
    """
    from scipy.special import stdtrit

    return float(stdtrit(n - 1, (1 + LEVEL) / 2))


def holm(p_values: Mapping[_K, float]) -> dict[_K, float]:
    """Holm's adjusted p-values: at most as many false alarms in a whole table as in one test.

    The i-th smallest of m p-values counts m + 1 − i times, but never less than a smaller one.

    Args:
        p_values: P-values by key; NaN where nothing was tested, which counts for nothing.

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": math.nan})
    {'a': 0.03, 'c': 0.06, 'b': 0.06, 'd': nan}
    """
    tested = sorted(
        (key for key, p in p_values.items() if not math.isnan(p)), key=p_values.__getitem__
    )
    adjusted: dict[_K, float] = {}
    largest = 0.0
    for rank, key in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p_values[key]))
        adjusted[key] = largest
    return adjusted | {key: math.nan for key in p_values if key not in adjusted}
