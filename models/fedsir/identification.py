"""Telling clients with noisy labels from clean ones by two numbers each.

Axes: K clients.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fulgurite.errors import ConfigError, DataError

__all__ = ["ClientSplit", "split_clients"]

_TRIM = 0.1  # share of a group that may lie in the gap: less than one client of ten
_SIMULATIONS = 10_000


@dataclass(frozen=True)
class ClientSplit:
    """Which clients are taken for clean.

    Attributes:
        clean: bool. Shape: (K,).
        p_clean: Posterior of the clean group, float64. Shape: (K,).
        components: 2, or 1 where the clients are all alike.
        gap: Largest gap in ``off_mean`` between two groups of clients.
        p_value: Chance of a split as sharp among clients that are all alike.
        reason: One sentence.
    """

    clean: Tensor
    p_clean: Tensor
    components: int
    gap: float
    p_value: float
    reason: str


def _sharpness(ordered: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Share of the variance that the best split of sorted values explains, and its place."""
    count = ordered.shape[-1]
    centred = ordered - ordered.mean(-1, keepdims=True)
    size = np.arange(1, count)
    between = np.cumsum(centred, -1)[..., :-1] ** 2 * (1 / size + 1 / (count - size))
    total = np.maximum((centred**2).sum(-1), np.finfo(float).tiny)
    return between.max(-1) / total, between.argmax(-1) + 1


def _gap(ordered: NDArray[np.float64], place: int) -> float:
    """Distance between the groups below and from ``place`` on, each trimmed by a tenth."""
    low, high = int(_TRIM * place), int(_TRIM * (len(ordered) - place))
    return float(ordered[place + high] - ordered[place - 1 - low])


def _two_groups(
    off_mean: NDArray[np.float64], small: float, wide: float, level: float
) -> tuple[bool, float, float]:
    """Whether there are two groups; the largest gap; the p-value of the sharpest split."""
    ordered = np.sort(off_mean)
    count = len(ordered)
    if count < 2:
        return False, 0.0, 1.0
    largest = max(_gap(ordered, place) for place in range(1, count))
    sharpness, place = _sharpness(ordered)
    # the statistic knows neither location nor scale, so one simulation per K is exact
    normal = np.random.default_rng(0).standard_normal((_SIMULATIONS, count))
    null = _sharpness(np.sort(normal, -1))[0]
    p_value = float((1 + (null >= sharpness).sum()) / (1 + _SIMULATIONS))
    sharp = p_value <= level and _gap(ordered, int(place)) >= small
    return sharp or largest >= wide, largest, p_value


def _mixture(scores: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Posterior of the component with the lower mean off_mean."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    scaled = (scores - scores.mean(0)) / (scores.std(0) + 1e-12)
    mixture = GaussianMixture(
        2, covariance_type="full", reg_covar=1e-6, n_init=30, max_iter=2000, random_state=seed
    )
    with warnings.catch_warnings():
        # clients with equal scores: k-means finds fewer distinct points than components
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixture.fit(scaled)
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
    """Split clients into clean and noisy by a mixture of two Gaussians."""
    if scores.ndim != 2 or scores.shape[1] != 2:
        raise DataError(
            f"scores of shape {tuple(scores.shape)} are not (K, 2).",
            "Stack client_score of each client.",
        )
    if not 0 < threshold <= 1:
        raise ConfigError(
            f"threshold {threshold} is not a probability.", "Choose one above 0, at most 1."
        )
    table = scores.detach().cpu().double().numpy()
    finite = np.isfinite(table).all(1)
    known = table[finite]
    two, gap, p_value = _two_groups(known[:, 0], small_gap, wide_gap, level)
    evidence = f"largest gap {gap:.3f}, p = {p_value:.2g}"
    if force_two:
        two = len(known) >= 2 and not np.allclose(known, known[:1])
        evidence = "two groups were asked for"
    p_known = np.ones(len(known))
    if two:
        p_known = _mixture(known, seed)
        if not (p_known >= threshold).any():  # an empty group is no reference: take the best
            p_known = np.where(p_known == p_known.max(), threshold, p_known)
        found = int((p_known >= threshold).sum())
        reason = f"{found} of {len(known)} clients are clean ({evidence})"
    elif noisy_above is not None and len(known) and known[:, 0].mean() > noisy_above:
        p_known = np.zeros(len(known))
        reason = f"all clients are alike and above {noisy_above}: all noisy ({evidence})"
    else:
        reason = f"all clients are alike: all clean ({evidence})"
    if not finite.all():
        reason += f"; without a score, so noisy: clients {np.flatnonzero(~finite).tolist()}"
    p_clean = torch.zeros(len(table), dtype=torch.float64)
    p_clean[torch.from_numpy(finite)] = torch.from_numpy(p_known)
    return ClientSplit(p_clean >= threshold, p_clean, 2 if two else 1, gap, p_value, f"{reason}.")
