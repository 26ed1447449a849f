"""Features with a known answer, for tests of spectral methods.

Each class has a unit mean; any two means have the same cosine ρ. Around its mean a class spreads
either alike in all directions or within a few directions of its own.

Axes: N samples, K clients, C classes, D feature dim, S subspace dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "Planted",
    "PlantedClients",
    "closed_form_off_mean",
    "planted_clients",
    "symmetric_noise",
]


@dataclass(frozen=True)
class Planted:
    """A distribution of features.

    Attributes:
        means: Unit class means. Shape: (C, D).
        subspaces: Orthonormal rows that a class varies along, or None if it varies along all
            dimensions alike. Shape: (C, S, D).
    """

    means: Tensor
    subspaces: Tensor | None = None

    @classmethod
    def make(
        cls, num_classes: int, dim: int, rho: float, *, subspace: int | None = None, seed: int = 0
    ) -> Planted:
        """Random means with pairwise cosine ``rho``, and subspaces of dimension ``subspace``.

        Example:
            >>> means = Planted.make(3, 8, 0.25).means
            >>> (means @ means.T).round(decimals=4).tolist()[0]
            [1.0, 0.25, 0.25]
        """
        rng = np.random.default_rng((seed, 0))
        basis = np.linalg.qr(rng.standard_normal((dim, num_classes + 1)))[0].T
        means = np.sqrt(rho) * basis[0] + np.sqrt(1 - rho) * basis[1:]
        if subspace is None:
            return cls(torch.from_numpy(means))
        planes = np.linalg.qr(rng.standard_normal((num_classes, dim, subspace)))[0]
        return cls(torch.from_numpy(means), torch.from_numpy(planes).mT.contiguous())

    def sample(self, labels: Tensor, sigma: float, seed: int = 0, floor: float = 0.1) -> Tensor:
        """Features of samples whose true classes are ``labels``.

        Args:
            labels: True classes. Shape: (N,).
            sigma: Root mean square norm of the deviation from the mean.
            seed: Seed of the deviations.
            floor: Root mean square norm of a deviation in all directions, added to that in a
                subspace.

        Returns:
            float64. Shape: (N, D).
        """
        rng = np.random.default_rng((seed, 1))
        means = self.means[labels]
        noise: Tensor = torch.from_numpy(rng.standard_normal(means.shape)) / means.shape[1] ** 0.5
        if self.subspaces is None:
            isotropic: Tensor = means + sigma * noise
            return isotropic
        planes = self.subspaces[labels]
        weights = torch.from_numpy(rng.standard_normal(planes.shape[:2])) / planes.shape[1] ** 0.5
        deviations: Tensor = torch.einsum("ns,nsd->nd", weights, planes)
        features: Tensor = means + sigma * deviations + floor * noise
        return features


def symmetric_noise(labels: Tensor, rate: float, num_classes: int, seed: int = 0) -> Tensor:
    """Move ``round(rate · N_c)`` labels of each class to other classes, uniformly.

    Example:
        >>> int((symmetric_noise(torch.zeros(10).long(), 0.3, 5) != 0).sum())
        3
    """
    rng = np.random.default_rng((seed, 2))
    noisy = labels.clone()
    for c in range(num_classes):
        members = np.flatnonzero(labels.numpy() == c)
        flipped = rng.choice(members, round(rate * len(members)), replace=False)
        shift = rng.integers(1, num_classes, len(flipped))
        noisy[flipped] = torch.from_numpy((c + shift) % num_classes)
    return noisy


def closed_form_off_mean(rho: float, rate: float, num_classes: int = 10) -> float:
    """The off-diagonal mean similarity of a large client with symmetric noise.

    The dominant direction of class c is the top eigenvector of ``(a − b) m_c m_cᵀ + b Σ m_j m_jᵀ``
    with a = 1 − p and b = p / (C − 1); isotropic spread does not change it.

    Example:
        >>> round(closed_form_off_mean(0.4, 0.5), 3), round(closed_form_off_mean(0.2, 0.0), 3)
        (0.66, 0.2)

    Source: docs/papers/fedsir.md section 3a.
    """
    means = Planted.make(num_classes, num_classes + 1, rho).means
    a, b = 1 - rate, rate / (num_classes - 1)
    outer = means[:, :, None] * means[:, None]
    top = torch.linalg.eigh((a - b) * outer + b * outer.sum(0)).eigenvectors[..., -1]
    cosines = (top @ top.T).abs()
    off: float = cosines[~torch.eye(num_classes, dtype=torch.bool)].mean().item()
    return off


@dataclass(frozen=True)
class PlantedClients:
    """Clients with planted features.

    Attributes:
        features: Features of each client. Shape: K tensors (N_k, D).
        labels: Labels as the clients have them. Shape: K tensors (N_k,).
        true: True classes. Shape: K tensors (N_k,).
        noisy: Which clients have noisy labels, bool. Shape: (K,).
    """

    features: list[Tensor]
    labels: list[Tensor]
    true: list[Tensor]
    noisy: Tensor


def planted_clients(
    *,
    rates: Sequence[float],
    alpha: float | None = 2.0,
    rho: float = 0.3,
    dim: int = 64,
    num_classes: int = 10,
    per_client: int = 1000,
    sigma: float = 1.0,
    seed: int = 0,
) -> PlantedClients:
    """Clients that differ in size, class balance and label noise.

    Args:
        rates: Symmetric noise rate of each client; the order is shuffled by ``seed``.
        alpha: Dirichlet concentration of each class over the clients, or None for an even split.
        rho: Cosine of any two class means.
        dim: D.
        num_classes: C.
        per_client: Mean number of samples.
        sigma: Spread within a class, alike in all directions.
        seed: Seed of all random draws.

    Returns:
        The clients.

    Example:
        >>> clients = planted_clients(rates=[0.0, 0.5, 0.5], per_client=100)
        >>> int(clients.noisy.sum()), sum(map(len, clients.labels))
        (2, 300)
    """
    rng = np.random.default_rng((seed, 3))
    count = len(rates)
    planted = Planted.make(num_classes, dim, rho, seed=seed)
    shuffled = rng.permutation(np.asarray(rates, dtype=float))
    labels = rng.permutation(np.arange(count * per_client) % num_classes)
    owner = np.arange(len(labels)) % count
    if alpha is not None:
        for c in range(num_classes):
            members = labels == c
            owner[members] = rng.choice(count, members.sum(), p=rng.dirichlet([alpha] * count))
    true = [torch.from_numpy(labels[owner == k]) for k in range(count)]
    features = [planted.sample(y, sigma, seed=seed * count + k) for k, y in enumerate(true)]
    observed = [
        symmetric_noise(y, float(rate), num_classes, seed=seed * count + k)
        for k, (y, rate) in enumerate(zip(true, shuffled, strict=True))
    ]
    return PlantedClients(features, observed, true, torch.from_numpy(shuffled > 0))
