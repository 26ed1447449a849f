"""Weights of the clients' models in the global one.

Axes: K clients, J clean clients, P flat state size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fulgurite.errors import DataError

__all__ = [
    "distance_aware_weights",
    "distance_to_clean",
    "sample_weights",
]


def sample_weights(sizes: Tensor) -> Tensor:
    """Fraction of all samples that each client has (FedAvg).

    Args:
        sizes: Samples per client. Shape: (K,).

    Returns:
        float64, summing to 1. Shape: (K,).

    Raises:
        DataError: A client size is negative, or all sizes are zero.

    Example:
        >>> sample_weights(torch.tensor([1, 3]))
        tensor([0.2500, 0.7500], dtype=torch.float64)

    Source: FedAvg, McMahan et al. 2017.
    """
    sizes = sizes.double()
    if not bool((sizes >= 0).all() & (sizes.sum() > 0)):
        raise DataError(
            f"client sizes {sizes.tolist()} cannot be weights.",
            "Give each client at least one sample, or lower data.init_args.clients.",
        )
    return sizes / sizes.sum()


def distance_to_clean(state: Tensor, clean_states: Tensor, splits: Sequence[int]) -> Tensor:
    """Distance of a model to the nearest clean one: the sum over tensors of L2 norms.

    Args:
        state: All floating tensors of a model, BatchNorm statistics included, as one vector.
            Shape: (P,).
        clean_states: Flat states of the clean clients' models. Shape: (J, P).
        splits: Number of entries of each tensor, in the order of ``state``; sums to P.

    Returns:
        float64 scalar; 0 where there is no clean model, infinite where ``state`` is not finite.

    Example:
        >>> distance_to_clean(torch.tensor([3.0, 4.0, 1.0]), torch.zeros(1, 3), [2, 1])
        tensor(6., dtype=torch.float64)

    Source: docs/papers/fedsir.md Stage III, DaAgg (FedNoRo's).
    """
    finite = state.isfinite().all()
    if not len(clean_states):
        return torch.where(finite, 0.0, torch.inf).double()
    distances = [
        torch.stack(
            [
                torch.linalg.vector_norm(part, dtype=torch.float64)
                for part in (state - other).split(list(splits))
            ]
        ).sum()
        for other in clean_states
    ]
    nearest = torch.stack(distances).nan_to_num(nan=torch.inf).min()
    return torch.where(finite, nearest, torch.inf)


def distance_aware_weights(sizes: Tensor, distances: Tensor, floor: bool = True) -> Tensor:
    """Weights ``a_k e^{−d_k}``, normalised (DaAgg).

    Args:
        sizes: Samples per client. Shape: (K,).
        distances: From :func:`distance_to_clean`, 0 for clean clients. A client whose distance is
            not finite gets weight 0. Shape: (K,).
        floor: Divide the distances by their maximum, as the paper does: the farthest client then
            keeps exactly e⁻¹ of its weight, and no client can be suppressed further. Without it
            the distances are used unscaled.

    Returns:
        float64, summing to 1. Shape: (K,).

    Raises:
        DataError: The sizes cannot be weights, or no client has a finite distance.

    Example:
        >>> distance_aware_weights(torch.tensor([1, 1]), torch.tensor([0.0, 7.0]))
        tensor([0.7311, 0.2689], dtype=torch.float64)

    Source: docs/papers/fedsir.md Stage III, DaAgg (FedNoRo's); not finite: inferred.
    """
    distances = distances.double()
    finite = distances.isfinite()
    scaled = distances.where(finite, 0.0)
    largest = scaled.max()
    if floor and bool(largest > 0):
        scaled = scaled / largest
    weights = sample_weights(sizes).to(scaled.device) * torch.exp(-scaled) * finite
    if not bool(weights.sum() > 0):
        raise DataError(
            "no client's model is finite.", "Lower the learning rate of local training."
        )
    return weights / weights.sum()
