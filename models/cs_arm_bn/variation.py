"""Typical variation normalisation: embeddings standardised and aligned by control wells.

Axes: n embeddings, N controls of a plate, D feature dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fulgurite.errors import DataError

__all__ = ["TVNReference", "fit_tvn", "measure_spread", "tvn"]


class TVNReference(NamedTuple):
    """Common statistics of the controls of all training plates.

    Args:
        mean: Mean of the controls. Shape: (D,).
        std: Standard deviation of the controls. Shape: (D,).
        rotation: Principal axes of the standardised controls, as columns. Shape: (D, D).
        target: Root of the controls' covariance after each plate was standardised. Shape: (D, D).
    """

    mean: Tensor
    std: Tensor
    rotation: Tensor
    target: Tensor


def measure_spread(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, which is 1 for directions without variation.

    Args:
        x: Embeddings. Shape: (n, D).

    Returns:
        Mean and standard deviation, each of shape (D,).

    Example:
        >>> measure_spread(torch.tensor([[1.0, 7.0], [5.0, 7.0]]))
        (tensor([3., 7.]), tensor([2., 1.]))
    """
    mean = x.mean(0)
    std = x.std(0, correction=0)
    return mean, torch.where(std > 1e-6 * std.max().clamp_min(1e-12), std, torch.ones_like(std))


def _covariance(x: Tensor, ridge: float) -> Tensor:
    identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    if len(x) < 2:
        return ridge * identity
    return torch.cov(x.T).view_as(identity) + ridge * identity


def _matrix_power(matrix: Tensor, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    result: Tensor = (vectors * values.clamp_min(1e-12).pow(power)) @ vectors.T
    return result


def fit_tvn(controls: Tensor, domains: Tensor, ridge: float = 0.5) -> TVNReference:
    """Fit the common parts of the normalisation on the controls of training plates.

    Args:
        controls: Embeddings of controls. Shape: (n, D).
        domains: Plate of each control. Shape: (n,).
        ridge: Constant added to the diagonal of covariances.

    Raises:
        DataError: There are fewer than two controls.

    Example:
        >>> controls = torch.tensor([[0.0, 1.0], [2.0, 5.0], [4.0, 3.0]])
        >>> fit_tvn(controls, torch.tensor([0, 0, 1])).mean
        tensor([2., 3.], dtype=torch.float64)

    Source: docs/papers/cs_arm_bn.md section 1.6, steps 1, 2 and 4.
    """
    if len(controls) < 2:
        raise DataError(
            f"TVN was given {len(controls)} control(s).",
            "Give controls: data.init_args.episodes.controls of 2 or more.",
        )
    z = controls.double()
    mean, std = measure_spread(z)
    _, rotation = torch.linalg.eigh(_covariance((z - mean) / std, 0.0))
    u = ((z - mean) / std) @ rotation
    aligned = torch.empty_like(u)
    for domain in set(domains.tolist()):
        rows = domains == domain
        plate_mean, plate_std = measure_spread(u[rows])
        aligned[rows] = (u[rows] - plate_mean) / plate_std
    return TVNReference(mean, std, rotation, _matrix_power(_covariance(aligned, ridge), 0.5))


def tvn(
    reference: TVNReference, embeddings: Tensor, controls: Tensor, ridge: float = 0.5
) -> Tensor:
    """Normalise embeddings of a plate by its controls.

    Args:
        reference: Common statistics of training plates.
        embeddings: Embeddings of one plate. Shape: (n, D).
        controls: Embeddings of controls of the same plate. Shape: (N, D).
        ridge: Constant added to the diagonal of covariances.

    Returns:
        Normalised embeddings, float64. Shape: (n, D).

    Raises:
        DataError: The plate has no controls.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> controls, images = torch.randn(50, 3, generator=g), torch.randn(4, 3, generator=g)
        >>> reference = fit_tvn(controls, torch.zeros(50))
        >>> here = tvn(reference, images, controls)
        >>> elsewhere = tvn(reference, 3 * images + 7, 3 * controls + 7)  # another plate's scale
        >>> here.shape, bool((here - elsewhere).abs().max() < 2)
        (torch.Size([4, 3]), True)

    Source: docs/papers/cs_arm_bn.md section 1.6, steps 1 to 4.
    """
    if len(controls) == 0:
        raise DataError("TVN was given a plate without controls.", "Give its controls.")
    u, c = (
        ((x.double() - reference.mean) / reference.std) @ reference.rotation
        for x in (embeddings, controls)
    )
    mean, std = measure_spread(c)
    whiten = _matrix_power(_covariance((c - mean) / std, ridge), -0.5)
    return ((u - mean) / std) @ whiten @ reference.target
