"""Profiles of a plate's controls, and their distance from those of the training plates.

Axes: N controls, C channels, H W image, S plate statistics, D plates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fulgurite.devices import lower_median

__all__ = ["outlier_score", "plate_profile"]


def plate_profile(controls: Tensor) -> Tensor:
    """Brightness, contrast and sharpness of a plate's control images, by channel.

    Args:
        controls: Control images. Shape: (N, C, H, W).

    Returns:
        Mean, log of the std and, for images wider than a pixel, log of the std of differences of
        neighbours. Shape: (S,), S = 3 C (2 C for embeddings).

    Example:
        >>> plate_profile(torch.ones(2, 1, 4, 4))[0]
        tensor(1.)

    Source: inferred; docs/papers/cs_arm_bn.md section 7.5 suggests a check of the controls.
    """
    x = controls.float()
    dims = (0, 2, 3)
    std = x.std(dims, correction=0)
    parts = [x.mean(dims), (std + 1e-6).log()]
    if x.shape[-1] > 1:
        sharp = (x[..., 1:] - x[..., :-1]).square().mean(dims).sqrt()
        parts.append((sharp + 1e-6).log())
    return torch.cat(parts)


def outlier_score(profile: Tensor, training_profiles: Tensor) -> float:
    """Largest robust z-score of a plate's profile among the training plates [1].

    Args:
        profile: Profile of the plate. Shape: (S,).
        training_profiles: Profiles of the training plates. Shape: (D, S).

    Example:
        >>> known = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0]])
        >>> round(outlier_score(torch.tensor([12.0]), known), 2)  # median 2, scaled MAD 1.48
        6.74

    Source: inferred.
    """
    center = lower_median(training_profiles, 0)
    scale = 1.4826 * lower_median((training_profiles - center).abs(), 0)
    # nearly equal training plates would make every other plate an outlier
    scale = torch.maximum(scale, 0.02 + 0.02 * center.abs())
    return float(((profile - center).abs() / scale).max())
