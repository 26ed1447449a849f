"""Typical variation normalisation: embeddings standardised and aligned by control wells.

Axes: n embeddings, N controls of a plate, D feature dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fulgurite.errors import DataError

__all__ = ["TVNReference", "fit_tvn", "tvn"]


class TVNReference(NamedTuple):
    """What all training plates' controls have in common.

    Args:
        mean: Of the controls. Shape: (D,).
        std: Of the controls. Shape: (D,).
        rotation: Principal axes of the standardised controls, as columns. Shape: (D, D).
        target: Root of the controls' covariance after each plate was standardised. Shape: (D, D).
    """

    mean: Tensor
    std: Tensor
    rotation: Tensor
    target: Tensor


def _scale(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std; the std of directions without variation counts as 1."""
    mean = x.mean(0)
    std = x.std(0, correction=0)
    return mean, torch.where(std > 1e-6 * std.max().clamp_min(1e-12), std, torch.ones_like(std))


def _covariance(x: Tensor, ridge: float) -> Tensor:
    identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    if len(x) < 2:
        return ridge * identity
    return torch.cov(x.T).view_as(identity) + ridge * identity


def _power(matrix: Tensor, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    result: Tensor = (vectors * values.clamp_min(1e-12).pow(power)) @ vectors.T
    return result


def fit_tvn(controls: Tensor, domains: Tensor, ridge: float = 0.5) -> TVNReference:
    """Fit the parts of the normalisation that plates share, on the controls of training plates.

    Args:
        controls: Embeddings of controls. Shape: (n, D).
        domains: Their plates. Shape: (n,).
        ridge: Added to the diagonal of covariances.

    Raises:
        DataError: There are fewer than two controls.

    Example:
        >>> controls = torch.tensor([[0.0, 1.0], [2.0, 5.0], [4.0, 3.0]])
        >>> fit_tvn(controls, torch.tensor([0, 0, 1])).mean
        tensor([2., 3.], dtype=torch.float64)

    Source: card section 1.6, steps 1, 2 and 4.
    """
    if len(controls) < 2:
        raise DataError(
            f"TVN was given {len(controls)} control(s).",
            "Give controls: data.init_args.controls of 2 or more.",
        )
    z = controls.double()
    mean, std = _scale(z)
    _, rotation = torch.linalg.eigh(_covariance((z - mean) / std, 0.0))
    u = ((z - mean) / std) @ rotation
    aligned = torch.empty_like(u)
    for domain in set(domains.tolist()):
        own = domains == domain
        plate_mean, plate_std = _scale(u[own])
        aligned[own] = (u[own] - plate_mean) / plate_std
    return TVNReference(mean, std, rotation, _power(_covariance(aligned, ridge), 0.5))


def tvn(
    reference: TVNReference, embeddings: Tensor, controls: Tensor, ridge: float = 0.5
) -> Tensor:
    """Normalise embeddings of a plate by its controls.

    Args:
        reference: What training plates have in common.
        embeddings: Of one plate. Shape: (n, D).
        controls: Of the same plate. Shape: (N, D).
        ridge: Added to the diagonal of covariances.

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

    Source: card section 1.6, steps 1 to 4.
    """
    if len(controls) == 0:
        raise DataError("TVN was given a plate without controls.", "Give its controls.")
    u, c = (
        ((x.double() - reference.mean) / reference.std) @ reference.rotation
        for x in (embeddings, controls)
    )
    mean, std = _scale(c)
    whiten = _power(_covariance((c - mean) / std, ridge), -0.5)
    return ((u - mean) / std) @ whiten @ reference.target
