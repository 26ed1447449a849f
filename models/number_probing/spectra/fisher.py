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
from fulgurite.models.number_probing.spectra.fourier import class_means, period_power
from fulgurite.models.number_probing.tables.checks import (
    check_consecutive,
    check_embeddings,
    check_periods,
)

__all__ = ["Scatter", "describe_singular", "principal_components", "scatter"]


@dataclass(frozen=True)
class Scatter:
    """Scatter between residues and within them.

    Attributes:
        period: T.
        between: S_B. Shape: (D, D), or (P, P) after PCA to P dimensions.
        within: S_W, without the ridge. Shape: as ``between``.
        phi: Φ_T of all D dimensions, in the squared unit of the embeddings.
        eta2: Fraction of the total variance that lies between residues, Φ_T / (N Tr S) [1].
        fisher: The T − 1 eigenvalues of S_W⁻¹ S_B, largest first [1]; nan where S_W is singular.
            Shape: (T-1,).
        condition: Condition number of S_W, with the ridge [1]; infinite where it is singular.
        bounds: Lower and upper bound of the largest Fisher value [1]; nan where S_W is singular.
        ridge: ρ: ρ Tr(S_W)/D · I was added to S_W.
        pca: Principal components used, or None for all dimensions.
        rank: Rank of S_W, without the ridge.
        regular: Largest number of leading principal components whose S_W is not singular.

    ``fisher``, ``condition`` and ``bounds`` depend on ``ridge`` and ``pca``: report these too.

    Source: docs/papers/number_probing.md section 1.3.
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
    regular: int

    @property
    def is_singular(self) -> bool:
        """Whether S_W, with the ridge, has no inverse."""
        return math.isinf(self.condition)


def describe_singular(singular: Scatter) -> tuple[str, str]:
    """Describe a singular S_W, and how to fix it.

    Example:
        >>> x = torch.arange(1.0, 41.0)[:, None] * torch.tensor([[1.0, 2.0]])
        >>> describe_singular(scatter(x, 2, allow_singular=True))[0]
        'S_W of T = 2 is singular: 2 dimensions, and residues vary in 1 of them.'
    """
    fewer = (
        f" or keep fewer dimensions (`--pca {singular.regular}`; pca: {singular.regular})"
        if singular.regular
        else ""
    )
    return (
        f"S_W of T = {singular.period} is singular: {len(singular.within)} dimensions, and "
        f"residues vary in {singular.rank} of them.",
        f"Set a ridge (`--ridge 0.01`; ridge: 0.01 in YAML){fewer}, and name it beside.",
    )


def _measure_rounding(highest: float, width: int, size: int, total: float) -> float:
    """Return the eigenvalue of S_W up to which one may be rounding.

    Args:
        highest: Largest eigenvalue.
        width: D.
        size: N.
        total: Trace of S_B and S_W, on the rounding of which deviations from means depend.
    """
    eps = torch.finfo(torch.float64).eps
    return max(highest * width * eps, (size * eps) ** 2 * total)


def _count_regular_components(x: Tensor, residues: Tensor, period: int) -> int:
    """Count the leading principal components whose S_W is not singular.

    Args:
        x: Centred rows. Shape: (N, D).
        residues: n mod T of each row. Shape: (N,).
        period: T.
    """
    components = principal_components(x, min(x.shape))
    residuals = components - class_means(components, residues, period)[residues]
    within = residuals.mT @ residuals / len(x)
    total = float(x.square().sum()) / len(x)
    low, high = 0, len(within)
    while low < high:  # eigenvalues interlace: what is singular stays so with more components
        middle = (low + high + 1) // 2
        eigenvalues = torch.linalg.eigvalsh(within[:middle, :middle])
        if float(eigenvalues[0]) > _measure_rounding(float(eigenvalues[-1]), middle, len(x), total):
            low = middle
        else:
            high = middle - 1
    return low


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
    u, singular_values, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    coordinates: Tensor = u[:, :keep] * singular_values[:keep]
    return coordinates


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
        DataError: See :func:`spectrum`; or S_W is singular and ``allow_singular`` is not set.

    Example:
        >>> n = torch.arange(1000).double()
        >>> statistics = scatter((5 * (n % 10) + 0.03 * (n // 10))[:, None], 10)
        >>> round(statistics.phi), round(float(statistics.fisher[0]), 2), statistics.condition
        (206250, 275.03, 1.0)

    Source: docs/papers/number_probing.md section 1.3. How the paper made S_W invertible is unknown.
    """
    if not 0 <= ridge < math.inf or (pca is not None and pca < 1):
        raise ConfigError(
            f"ridge={ridge}, pca={pca} is out of range.", "Give ridge ≥ 0 and pca ≥ 1, or null."
        )
    x, n = check_embeddings(embeddings, numbers, allow_duplicates=allow_duplicates)
    check_consecutive(n)
    check_periods([period], len(x))
    size = len(x) // period * period
    x, n = x[:size], n[:size]
    phi = period_power(x, period, n, allow_duplicates=True)
    total = float((x - x.mean(0)).square().sum())
    centred = (
        principal_components(x, pca) if pca is not None and pca < x.shape[1] else x - x.mean(0)
    )
    means = class_means(centred, n, period)
    between = means.mT @ means / period
    residuals = centred - means[n % period]
    within = residuals.mT @ residuals / size
    width = len(within)
    eigenvalues = torch.linalg.eigvalsh(within)
    shift = ridge * float(eigenvalues.mean())
    low, high = float(eigenvalues[0]) + shift, float(eigenvalues[-1]) + shift
    total_scatter = float(between.trace() + within.trace())
    rounding = _measure_rounding(float(eigenvalues[-1]), width, size, total_scatter)
    rank = int((eigenvalues > rounding).sum())
    pca_dimensions = pca if pca is not None and pca < x.shape[1] else None
    if low <= _measure_rounding(high, width, size, total_scatter):
        undefined = x.new_full((period - 1,), math.nan)
        singular = Scatter(
            period, between, within, phi, phi / total if total else 0.0, undefined, math.inf,
            (math.nan, math.nan), ridge, pca_dimensions, rank,
            _count_regular_components(centred, n % period, period),
        )  # fmt: skip
        if not allow_singular:
            raise DataError(*describe_singular(singular))
        return singular
    root = torch.linalg.cholesky(within + shift * torch.eye(width, dtype=x.dtype, device=x.device))
    whitened_means = torch.linalg.solve_triangular(root, means.mT, upper=False) / period**0.5
    fisher = torch.linalg.svdvals(whitened_means).square()
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
        pca_dimensions,
        rank,
        regular=width,
    )
