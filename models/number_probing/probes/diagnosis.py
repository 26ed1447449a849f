"""The verdict on a table from its spectrum and its probes, with reasons."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fulgurite.errors import ConfigError
from fulgurite.models.number_probing.probes.controls import ceiling
from fulgurite.models.number_probing.probes.probing import ProbeResult
from fulgurite.models.number_probing.spectra.fourier import Spike

__all__ = ["Diagnosis", "PeriodDiagnosis", "diagnose"]

GEOMETRIC, PARTIAL = "geometric", "parity or roundness only"
DIVISOR, SPECTRAL, NOTHING = "a divisor only", "spectral only", "nothing"


@dataclass(frozen=True)
class PeriodDiagnosis:
    """The verdict on one period.

    Attributes:
        period: T.
        verdict: ``geometric``; ``parity or roundness only``; ``a divisor only``: no more than a
            shorter period explains; ``spectral only``; or ``nothing``.
        reasons: Sentences with the numbers behind it.
    """

    period: int
    verdict: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Diagnosis:
    """The verdict on a table.

    Attributes:
        verdict: ``geometric`` if any period above 2 is (T = 2 is parity); else ``parity or
            roundness only`` if any residue can be read above chance; else ``spectral only`` if
            there is a spike; else ``nothing``.
        periods: The verdict on each period.
        reasons: Sentences with the numbers behind it.
    """

    verdict: str
    periods: dict[int, PeriodDiagnosis]
    reasons: tuple[str, ...]


def _roundness(n: Tensor) -> Tensor:
    """The last digit of n if it is 0 or 5, else -1."""
    return torch.where(n % 5 == 0, n % 10, -1)


def _parity_and_round(n: Tensor) -> Tensor:
    return 100 * (n % 2) + _roundness(n)


def _is_nonround(n: Tensor) -> Tensor:
    return n % 5 != 0


def diagnose(
    probed: Mapping[int, ProbeResult],
    spikes: Mapping[int, Spike],
    blocked: Mapping[int, ProbeResult] | None = None,
) -> Diagnosis:
    """Tell geometry from parity, roundness and mere spikes.

    A period is geometric if κ is above chance and above what parity and roundness together could
    give, if κ stays above chance and above parity's ceiling on numbers that 5 does not divide, and
    if it is more than a shorter period explains.

    Args:
        probed: Results of :func:`probe` on shuffled folds, by period.
        spikes: Results of :func:`spikes`, by period.
        blocked: Results of :func:`probe` on decade or contiguous folds; their κ is named among the
            reasons.

    Raises:
        ConfigError: A period was probed without a spike verdict.

    Example:
        >>> from fulgurite.models.number_probing import planted, probe, spectrum, spikes
        >>> x = planted(torch.arange(1000), 10)
        >>> diagnosis = diagnose(probe(x, [2, 5, 10]), spikes(spectrum(x), [2, 5, 10]))
        >>> diagnosis.verdict, diagnosis.periods[5].verdict
        ('geometric', 'nothing')

    Source: docs/papers/number_probing.md sections 1.6 and 6, inferred.
    """
    if missing := probed.keys() - spikes.keys():
        raise ConfigError(
            f"There is no spike verdict for T = {min(missing)}.",
            "Call spikes() with the same periods as probe().",
        )
    periods = {
        t: _diagnose_period(probed, spikes[t], t, blocked[t] if blocked and t in blocked else None)
        for t in sorted(probed)
    }
    by_verdict = {
        v: [t for t, p in periods.items() if p.verdict == v]
        for v in (GEOMETRIC, PARTIAL, DIVISOR, SPECTRAL)
    }
    real = [t for t in by_verdict[GEOMETRIC] if t > 2]
    readable = sorted(by_verdict[GEOMETRIC] + by_verdict[PARTIAL] + by_verdict[DIVISOR])
    if real:
        verdict, explained = GEOMETRIC, real
    elif readable:
        verdict, explained = PARTIAL, readable
    elif by_verdict[SPECTRAL]:
        verdict, explained = SPECTRAL, by_verdict[SPECTRAL]
    else:
        verdict, explained = NOTHING, list(periods)
    return Diagnosis(
        verdict,
        periods,
        tuple(f"T = {t}: {reason}" for t in explained for reason in periods[t].reasons),
    )


def _diagnose_period(
    probed: Mapping[int, ProbeResult], spike: Spike, t: int, blocked: ProbeResult | None
) -> PeriodDiagnosis:
    shuffled = probed[t]
    kappa, rough = shuffled.kappa, shuffled.kappa_nonround
    above = "above" if spike.verdict else "not above"
    reasons = [
        f"the line is {spike.local_ratio:.2f} times its surroundings, {above} the threshold of a "
        "spike."
    ]

    def conclude(verdict: str, *more: str) -> PeriodDiagnosis:
        if blocked is not None:
            more = (*more, f"held out in blocks, κ = {blocked.kappa:.3f}.")
        return PeriodDiagnosis(t, verdict, (*reasons, *more))

    if kappa <= shuffled.band:
        reasons.append(f"κ = {kappa:.3f} is within chance, ±{shuffled.band:.3f}.")
        if kappa < -shuffled.band:
            reasons[-1] = (
                f"κ = {kappa:.3f}: held-out numbers are answered with their neighbours' residue, "
                "so the embeddings are smooth in n."
            )
        return conclude(SPECTRAL if spike.verdict else NOTHING)
    reasons.append(f"κ = {kappa:.3f} is above chance, {shuffled.band:.3f}.")
    limit = ceiling(t, _parity_and_round if t > 2 else _roundness)
    if kappa <= limit:
        return conclude(PARTIAL, f"parity and roundness alone could give κ = {limit:.3f}.")
    limit = max(shuffled.nonround_band, ceiling(t, lambda n: n % 2, _is_nonround) if t > 2 else 0.0)
    if rough <= limit:
        return conclude(
            PARTIAL,
            f"on numbers that 5 does not divide, κ = {rough:.3f}, no more than chance or parity "
            f"give there ({limit:.3f}).",
        )
    for g in (g for g in sorted(probed) if 2 < g < t and t % g == 0):
        if probed[g].kappa > probed[g].band:
            limit = (g - 1) / (t - 1) * probed[g].kappa
            if kappa <= limit + shuffled.band:
                return conclude(
                    DIVISOR,
                    f"n mod {g}, read with κ = {probed[g].kappa:.3f}, would give {limit:.3f}.",
                )
    nonround = f"on numbers that 5 does not divide κ = {rough:.3f}"
    if math.isnan(rough):
        nonround = "numbers that 5 does not divide were not probed by themselves"
    return conclude(
        GEOMETRIC,
        f"it is more than {'parity and ' if t > 2 else ''}roundness could give, and {nonround}.",
    )
