"""What spectrum and probe say together, with reasons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fulgurite.errors import ConfigError
from fulgurite.models.number_probing.controls import ceiling
from fulgurite.models.number_probing.fourier import Spike
from fulgurite.models.number_probing.probing import ProbeResult

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


def _round(n: Tensor) -> Tensor:
    """Whether n ends in 0, in 5, or neither."""
    return torch.where(n % 5 == 0, n % 10, -1)


def _parity_and_round(n: Tensor) -> Tensor:
    return 100 * (n % 2) + _round(n)


def _rough(n: Tensor) -> Tensor:
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
        probed: Of :func:`probe`, by period, on shuffled folds.
        spikes: Of :func:`spikes`, by period.
        blocked: Of :func:`probe` on decade or contiguous folds; its κ is named among the reasons.

    Raises:
        ConfigError: A period was probed without a spike verdict.

    Example:
        >>> from fulgurite.models.number_probing import planted, probe, spectrum, spikes
        >>> x = planted(torch.arange(1000), 10)
        >>> found = diagnose(probe(x, [2, 5, 10]), spikes(spectrum(x), [2, 5, 10]))
        >>> found.verdict, found.periods[5].verdict
        ('geometric', 'nothing')

    Source: card sections 1.6 and 6, inferred.
    """
    if missing := probed.keys() - spikes.keys():
        raise ConfigError(
            f"There is no spike verdict for T = {min(missing)}.",
            "Call spikes() with the same periods as probe().",
        )
    periods = {
        t: _period(probed, spikes[t], t, blocked[t] if blocked and t in blocked else None)
        for t in sorted(probed)
    }
    by_verdict = {
        v: [t for t, p in periods.items() if p.verdict == v]
        for v in (GEOMETRIC, PARTIAL, DIVISOR, SPECTRAL)
    }
    real = [t for t in by_verdict[GEOMETRIC] if t > 2]
    readable = sorted(by_verdict[GEOMETRIC] + by_verdict[PARTIAL] + by_verdict[DIVISOR])
    if real:
        verdict, which = GEOMETRIC, real
    elif readable:
        verdict, which = PARTIAL, readable
    elif by_verdict[SPECTRAL]:
        verdict, which = SPECTRAL, by_verdict[SPECTRAL]
    else:
        verdict, which = NOTHING, list(periods)
    return Diagnosis(
        verdict,
        periods,
        tuple(f"T = {t}: {reason}" for t in which for reason in periods[t].reasons),
    )


def _period(
    probed: Mapping[int, ProbeResult], spike: Spike, t: int, blocked: ProbeResult | None
) -> PeriodDiagnosis:
    found = probed[t]
    kappa, rough = found.kappa, found.kappa_nonround
    above = "above" if spike.verdict else "not above"
    reasons = [
        f"the line is {spike.local_ratio:.2f} times its surroundings, {above} the threshold of a "
        "spike."
    ]

    def give(verdict: str, *more: str) -> PeriodDiagnosis:
        if blocked is not None:
            more = (*more, f"held out in blocks, κ = {blocked.kappa:.3f}.")
        return PeriodDiagnosis(t, verdict, (*reasons, *more))

    if kappa <= found.band:
        reasons.append(f"κ = {kappa:.3f} is within chance, ±{found.band:.3f}.")
        if kappa < -found.band:
            reasons[-1] = (
                f"κ = {kappa:.3f}: held-out numbers are answered with their neighbours' residue, "
                "so the embeddings are smooth in n."
            )
        return give(SPECTRAL if spike.verdict else NOTHING)
    reasons.append(f"κ = {kappa:.3f} is above chance, {found.band:.3f}.")
    limit = ceiling(t, _parity_and_round if t > 2 else _round)
    if kappa <= limit:
        return give(PARTIAL, f"parity and roundness alone could give κ = {limit:.3f}.")
    limit = max(found.nonround_band, ceiling(t, lambda n: n % 2, _rough) if t > 2 else 0.0)
    if rough <= limit:
        return give(
            PARTIAL,
            f"on numbers that 5 does not divide, κ = {rough:.3f}, no more than chance or parity "
            f"give there ({limit:.3f}).",
        )
    for g in (g for g in sorted(probed) if 2 < g < t and t % g == 0):
        if probed[g].kappa > probed[g].band:
            limit = (g - 1) / (t - 1) * probed[g].kappa
            if kappa <= limit + found.band:
                return give(
                    DIVISOR,
                    f"n mod {g}, read with κ = {probed[g].kappa:.3f}, would give {limit:.3f}.",
                )
    return give(
        GEOMETRIC,
        f"it is more than {'parity and ' if t > 2 else ''}roundness could give, and on numbers "
        f"that 5 does not divide κ = {rough:.3f}.",
    )
