"""Scatter between and within residues, and the Fisher values that the paper bounds by Φ_T.

Axes: N numbers, D embedding width, T period.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fulgurite.errors import ConfigError, DataError
from fulgurite.models.number_probing.checks import check_embeddings, check_periods, consecutive
from fulgurite.models.number_probing.fourier import class_means, period_power

__all__ = ["Scatter", "principal_components", "scatter", "singular_words"]


@dataclass(frozen=True)
class Scatter:
    """How far residues lie apart, and how wide each is.

    Attributes:
        period: T.
        between: S_B. Shape: (D, D), or (P, P) after PCA to P dimensions.
        within: S_W, without the ridge. Shape: as ``between``.
        phi: Φ_T of all D dimensions, in the squared unit of the embeddings.
        eta2: Share of the total variance that lies between residues, Φ_T / (N Tr S) [1].
        fisher: The T − 1 eigenvalues of S_W⁻¹ S_B, largest first [1]; nan where S_W is singular.
            Shape: (T-1,).
        condition: Of S_W, with the ridge [1]; infinite where it is singular.
        bounds: Lower and upper bound of the largest Fisher value [1]; nan where S_W is singular.
        ridge: ρ: ρ Tr(S_W)/D · I was added to S_W.
        pca: Dimensions kept, or None for all.
        rank: Of S_W, without the ridge.

    ``fisher``, ``condition`` and ``bounds`` depend on ``ridge`` and ``pca``: name them beside.

    Source: arXiv 2604.20817; card section 1.3.
    """

    period: int
    between: Tensor
    within: Tensor
    phi: float
    eta2: float
    fisher: Tensor
    condition: float
    bounds: tuple[float, float]
    ridge: float
    pca: int | None
    rank: int

    @property
    def is_singular(self) -> bool:
        """Whether S_W, with the ridge, has no inverse."""
        return math.isinf(self.condition)


def singular_words(found: Scatter) -> tuple[str, str]:
    """What a singular S_W is, and how to fix it.

    Example:
        >>> x = torch.arange(1.0, 41.0)[:, None] * torch.tensor([[1.0, 2.0]])
        >>> singular_words(scatter(x, 2, allow_singular=True))[0]
        'S_W of T = 2 is singular: 2 dimensions, and residues vary in 1 of them.'
    """
    fewer = max(1, found.rank)
    return (
        f"S_W of T = {found.period} is singular: {len(found.within)} dimensions, and residues vary "
        f"in {found.rank} of them.",
        f"Set a ridge (`--ridge 0.01`; ridge: 0.01 in YAML) or keep fewer dimensions "
        f"(`--pca {fewer}`; pca: {fewer}), and name it beside.",
    )


def principal_components(x: Tensor, keep: int) -> Tensor:
    """Coordinates of centred rows along their principal components.

    Args:
        x: Rows. Shape: (N, D).
        keep: P, number of components; all where there are fewer.

    Returns:
        Coordinates, by descending variance. Shape: (N, P).

    Example:
        >>> principal_components(torch.tensor([[0.0, 1.0], [0.0, 3.0]]), 1).abs().round().tolist()
        [[1.0], [1.0]]
    """
    left, values, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    kept: Tensor = left[:, :keep] * values[:keep]
    return kept


def scatter(
    embeddings: Tensor,
    period: int,
    numbers: Sequence[int] | Tensor | None = None,
    *,
    ridge: float = 0.0,
    pca: int | None = None,
    allow_duplicates: bool = False,
    allow_singular: bool = False,
) -> Scatter:
    """Scatter matrices of the residues and the generalised Fisher eigenvalues.

    The numbers are cut to whole periods, so that Tr S_B = Φ_T / N holds exactly. The rank of S_W is
    at most N − T: with more dimensions it is singular and needs a ``ridge`` or ``pca``.

    Args:
        embeddings: Row by row. Shape: (N, D).
        period: T.
        numbers: Consecutive and ascending; by default from 0. Shape: (N,).
        ridge: ρ, in units of the mean eigenvalue of S_W.
        pca: Keep that many principal components first.
        allow_duplicates: As in :func:`check_embeddings`.
        allow_singular: Where S_W is singular, give nan for what needs its inverse.

    Raises:
        ConfigError: The period does not fit, or ``ridge`` or ``pca`` is out of range.
        DataError: As :func:`spectrum`; or S_W is singular and ``allow_singular`` is not set.

    Example:
        >>> n = torch.arange(1000).double()
        >>> found = scatter((5 * (n % 10) + 0.03 * (n // 10))[:, None], 10)
        >>> round(found.phi), round(float(found.fisher[0]), 2), found.condition
        (206250, 275.03, 1.0)

    Source: arXiv 2604.20817; card section 1.3. How the paper made S_W invertible is unknown.
    """
    if ridge < 0 or (pca is not None and pca < 1):
        raise ConfigError(
            f"ridge={ridge}, pca={pca} is out of range.", "Give ridge ≥ 0 and pca ≥ 1, or null."
        )
    x, n = check_embeddings(embeddings, numbers, allow_duplicates=allow_duplicates)
    consecutive(n)
    check_periods([period], len(x))
    size = len(x) // period * period
    x, n = x[:size], n[:size]
    phi = period_power(x, period, n, allow_duplicates=True)
    total = float((x - x.mean(0)).square().sum())
    kept = principal_components(x, pca) if pca is not None and pca < x.shape[1] else x - x.mean(0)
    means = class_means(kept, n, period)
    between = means.mT @ means / period
    rest = kept - means[n % period]
    within = rest.mT @ rest / size
    width = len(within)
    values = torch.linalg.eigvalsh(within)
    shift = ridge * float(values.mean())
    low, high = float(values[0]) + shift, float(values[-1]) + shift
    rounding = float(values[-1]) * width * torch.finfo(x.dtype).eps
    rank = int((values > rounding).sum())
    kept_dimensions = pca if pca is not None and pca < x.shape[1] else None
    if low <= high * width * torch.finfo(x.dtype).eps:
        nothing = x.new_full((period - 1,), math.nan)
        singular = Scatter(
            period, between, within, phi, phi / total if total else 0.0, nothing, math.inf,
            (math.nan, math.nan), ridge, kept_dimensions, rank,
        )  # fmt: skip
        if not allow_singular:
            raise DataError(*singular_words(singular))
        return singular
    root = torch.linalg.cholesky(within + shift * torch.eye(width, dtype=x.dtype, device=x.device))
    spread = torch.linalg.solve_triangular(root, means.mT, upper=False) / period**0.5
    fisher = torch.linalg.svdvals(spread).square()
    fisher = torch.nn.functional.pad(fisher, (0, max(0, period - 1 - len(fisher))))[: period - 1]
    power = float(between.trace())
    return Scatter(
        period,
        between,
        within,
        phi,
        phi / total,
        fisher,
        high / low,
        (power / (period - 1) / high, power / low),
        ridge,
        kept_dimensions,
        rank,
    )
