"""Identification of clients with noisy labels from two scores per client.

Axes: K clients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fulgurite.errors import ConfigError, DataError
from fulgurite.models.fedsir.mixtures import fit_two_gaussians

__all__ = ["ClientSplit", "split_clients"]

_TRIM = 0.1  # fraction of a group that may lie in the gap: less than one client of ten
_SIMULATIONS = 10_000


@dataclass(frozen=True)
class ClientSplit:
    """Split of the clients into clean and noisy ones.

    Attributes:
        clean: Predicted clean mask, bool. Shape: (K,).
        p_clean: Posterior of the clean group, float64. Shape: (K,).
        components: 2, or 1 where the clients are all alike.
        gap: Largest gap in ``off_mean`` between two groups of clients.
        p_value: Chance of a split as sharp among clients that are all alike.
        reason: One sentence that explains the split.
    """

    clean: Tensor
    p_clean: Tensor
    components: int
    gap: float
    p_value: float
    reason: str


def _split_sharpness(ordered: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Fraction of the variance that the best split of sorted values explains, and its index."""
    count = ordered.shape[-1]
    centred = ordered - ordered.mean(-1, keepdims=True)
    size = np.arange(1, count)
    between = np.cumsum(centred, -1)[..., :-1] ** 2 * (1 / size + 1 / (count - size))
    total = np.maximum((centred**2).sum(-1), np.finfo(float).tiny)
    return between.max(-1) / total, between.argmax(-1) + 1


def _trimmed_gap(ordered: NDArray[np.float64], index: int) -> float:
    """Distance between the groups below ``index`` and from it on, each trimmed by a tenth."""
    low, high = int(_TRIM * index), int(_TRIM * (len(ordered) - index))
    return float(ordered[index + high] - ordered[index - 1 - low])


class _Gap(NamedTuple):
    """The largest gap between two groups, and the largest value below it."""

    gap: float
    below: float


def _find_widest_gap(off_mean: NDArray[np.float64]) -> _Gap:
    ordered = np.sort(off_mean)
    gaps = [
        _Gap(_trimmed_gap(ordered, index), ordered[index - 1]) for index in range(1, len(ordered))
    ]
    return max(gaps, default=_Gap(0.0, np.inf))


def _find_sharpest_split(off_mean: NDArray[np.float64]) -> tuple[float, float]:
    """Gap of the split that explains most variance, and its p-value among alike clients."""
    ordered = np.sort(off_mean)
    if len(ordered) < 2:
        return 0.0, 1.0
    sharpness, index = _split_sharpness(ordered)
    # the statistic knows neither location nor scale, so one simulation per K is enough
    normal = np.random.default_rng(0).standard_normal((_SIMULATIONS, len(ordered)))
    null = _split_sharpness(np.sort(normal, -1))[0]
    return _trimmed_gap(ordered, int(index)), float(
        (1 + (null >= sharpness - 1e-12).sum()) / (1 + _SIMULATIONS)
    )


def _fit_clean_posterior(scores: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Posterior of the component with the lower mean off_mean."""
    scaled = (scores - scores.mean(0)) / (scores.std(0) + 1e-12)
    mixture = fit_two_gaussians(
        scaled, covariance_type="full", reg_covar=1e-6, n_init=30, max_iter=2000, random_state=seed
    )
    posterior: NDArray[np.float64] = mixture.predict_proba(scaled)
    return posterior[:, int(mixture.means_[:, 0].argmin())]


def split_clients(
    scores: Tensor,
    *,
    seed: int = 0,
    threshold: float = 0.5,
    force_two: bool = False,
    small_gap: float = 0.02,
    wide_gap: float = 0.06,
    level: float = 0.05,
    noisy_above: float | None = None,
) -> ClientSplit:
    """Tell clean clients from noisy ones.

    First, are there two groups at all? The authors' mixture always finds two, also where every
    client is clean. Here there are two groups where the largest gap between neighbours in
    ``off_mean`` is at least ``wide_gap``, or where the sharpest split explains more of the
    variance than it would among clients drawn from one normal distribution (``level``) and has a
    gap of at least ``small_gap``. Then a mixture of two Gaussians, as in the paper, says which
    clients belong to the group with the lower ``off_mean``, the clean one.

    If all clients are alike they are called clean: the scores alone cannot tell ten clean clients
    from ten equally noisy ones, because the level of a clean score depends on the network and the
    data. Set ``noisy_above`` where that level is known.

    In a clean group that is itself torn, by a gap of ``wide_gap`` that is wider than the one to the
    noisy clients, only the clients below count as clean: the mixture likes to add the mildest noisy
    client.

    Measured on planted features (10 clients, ρ = .3, D = 64, 1000 samples each, 20 seeds beside
    those the gaps were chosen on; "exact" means every client is right):

    =============================  ==========  =========  =========
    noisy clients, rate            even split  α = 2      α = .5
    =============================  ==========  =========  =========
    0: exact                       20/20       20/20      20/20
    1 to 9, p = .3: exact          ≥ 19/20     20/20      ≥ 19/20
    1 to 9, p = .5 to .9: exact    20/20       20/20      20/20
    1, 6 or 9, p = .1: exact       ≤ 2/20      ≤ 8/20     ≤ 7/20
    10, p = .3 to .9: one group    20/20       ≥ 18/20    ≥ 9/20
    =============================  ==========  =========  =========

    All errors there but those of the last row are noisy clients called clean. At p = .1 mostly
    one group is found, where ``force_two`` would be exact in 14/20 (even split, 6 noisy). With
    networks trained on digits (10 clients, 10 seeds), noise of p = .3 to .7 was found exactly in
    10/10 for α = 2 and α = .5; without any noise, one group was found in 9/10 for α = 2 and 7/10
    for α = .5, where clean clients differ most.

    Args:
        scores: ``(off_mean, off_energy)`` of each client. A client whose score is not finite has
            fewer than two classes to compare and is taken for noisy. Shape: (K, 2).
        seed: Seed of the mixture's initialisation.
        threshold: Smallest posterior of a clean client.
        force_two: Always split, as the paper does (unless all scores are equal).
        small_gap: Smallest gap of a significant split.
        wide_gap: Gap that needs no test.
        level: Significance level of the test.
        noisy_above: Mean ``off_mean`` above which clients that are all alike are all noisy.

    Returns:
        The split, with tensors on the CPU.

    Raises:
        DataError: ``scores`` does not have shape (K, 2).
        ConfigError: ``threshold`` is not in (0, 1], or ``wide_gap`` is not positive.

    Example:
        >>> off_mean = torch.tensor([0.30, 0.31, 0.60, 0.62, 0.59])
        >>> split = split_clients(torch.stack([off_mean, off_mean**2], 1))
        >>> split.clean.tolist(), split.components
        ([True, True, False, False, False], 2)
        >>> split_clients(torch.tensor([[0.30, 0.09], [0.31, 0.10]])).reason
        'all clients are alike: all clean (largest gap 0.010, p = 1).'

    Source: docs/papers/fedsir.md Stage I, step 7; one group, gap rule: inferred.
    """
    if scores.ndim != 2 or scores.shape[1] != 2:
        raise DataError(
            f"scores of shape {tuple(scores.shape)} are not (K, 2).",
            "Stack client_score of each client.",
        )
    if not 0 < threshold <= 1:
        raise ConfigError(
            f"threshold {threshold} is not a probability.", "Choose one above 0, at most 1."
        )
    if wide_gap <= 0:
        raise ConfigError(f"wide_gap {wide_gap} is not positive.", "Set it to 0.06, the default.")
    table = scores.detach().cpu().double().numpy()
    finite = np.isfinite(table).all(1)
    scored = table[finite]
    widest = _find_widest_gap(scored[:, 0])
    sharp_gap, p_value = _find_sharpest_split(scored[:, 0])
    statistics = f"largest gap {widest.gap:.3f}, p = {p_value:.2g}"
    if force_two:
        two = len(scored) >= 2 and not np.allclose(scored, scored[:1])
        statistics += ", two groups were asked for"
    else:
        two = widest.gap >= wide_gap or (p_value <= level and sharp_gap >= small_gap)
    p_scored = np.ones(len(scored))
    if two:
        p_scored = _fit_clean_posterior(scored, seed)
        if not (p_scored >= threshold).any():  # no client would be left to refer to
            p_scored = np.where(p_scored == p_scored.max(), threshold, p_scored)
        while not force_two:  # a mildly noisy client joins the clean ones across the widest gap
            inner_clean = p_scored >= threshold
            inner = _find_widest_gap(scored[inner_clean, 0])
            outer = scored[~inner_clean, 0].min(initial=np.inf) - scored[inner_clean, 0].max()
            if inner.gap < max(wide_gap, outer):
                break
            p_scored = np.where(scored[:, 0] > inner.below, 0.0, p_scored)
    elif noisy_above is not None and len(scored) and scored[:, 0].mean() > noisy_above:
        p_scored = np.zeros(len(scored))
    if two:
        clean = int((p_scored >= threshold).sum())
        reason = f"{clean} of {len(scored)} clients are clean ({statistics})"
    else:
        which = "clean" if p_scored.all() else f"noisy, being above {noisy_above}"
        reason = f"all clients are alike: all {which} ({statistics})"
    if not finite.all():
        reason += f"; clients without a score count as noisy: {np.flatnonzero(~finite).tolist()}"
    p_clean = torch.zeros(len(table), dtype=torch.float64)
    p_clean[torch.from_numpy(finite)] = torch.from_numpy(p_scored)
    return ClientSplit(
        clean=p_clean >= threshold,
        p_clean=p_clean,
        components=2 if two else 1,
        gap=widest.gap,
        p_value=p_value,
        reason=f"{reason}.",
    )
