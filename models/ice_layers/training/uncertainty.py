"""Uncertainty of filled values: the spread of several predictions, calibrated on held-out data.

The spread of an ensemble or of MC dropout says what the network is unsure of, not what no network
could know. So the error is modelled from the spread and from where an entry lies, on observed
entries that the network did not see, and scaled until its 90 % interval covers 90 % of them.

Axes: S predictions, N traces, L layers, K residuals, F features of an entry.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fulgurite.models.ice_layers.output.completion import Gaps

__all__ = ["Z90", "Calibration", "coverage", "entry_features", "mean_and_std"]

Z90 = 1.6448536269514722
"""Half width of a 90 % interval of a normal distribution [standard deviations]."""
_LEAST = 1e-4  # of a spread [m]
_FEATURES = 6


def mean_and_std(predictions: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of several predictions, and their standard deviation; 0 for one alone.

    Args:
        predictions: Shape: (S, N, L).

    Example:
        >>> mean_and_std(torch.tensor([[1.0], [3.0]]))
        (tensor([2.]), tensor([1.4142]))
    """
    if len(predictions) == 1:
        return predictions[0], torch.zeros_like(predictions[0])
    return predictions.mean(0), predictions.std(0)


def entry_features(gaps: Gaps, ensemble_std: Tensor, between: Tensor) -> Tensor:
    """What the error of an entry depends on, for :class:`Calibration`.

    Args:
        gaps: Gaps around the entries.
        ensemble_std: Standard deviation of several predictions [m]. Shape: (N, L).
        between: Whether the entry is a part of a measured sum. Shape: (N, L), bool.

    Returns:
        One; depth; wholly absent layer or not; log of the distance to the nearest pick elsewhere;
        log of that standard deviation; part of a measured sum or not. Shape: (N, L, F).

    Source: inferred.
    """
    absent = gaps.absent.double()
    near = torch.where(gaps.absent, 0.0, gaps.nearest.double().clamp_max(1e6))
    depth = torch.linspace(
        0, 1, ensemble_std.shape[1], dtype=torch.float64, device=ensemble_std.device
    )
    return torch.stack(
        [
            torch.ones_like(absent),
            depth.expand_as(absent),
            absent,
            (near / 100.0).log1p(),
            ensemble_std.double().clamp_min(_LEAST).log(),
            between.double(),
        ],
        -1,
    )


def coverage(residual: Tensor, std: Tensor, half_width: float = Z90) -> Tensor:
    """Fraction of residuals within an interval of so many standard deviations on each side.

    Example:
        >>> coverage(torch.tensor([0.5, -3.0]), torch.ones(2))
        tensor(0.5000)
    """
    return (residual.abs() <= half_width * std).double().mean().float()


class Calibration(nn.Module):
    """The standard deviation of the error, learned from held-out residuals.

    The variance is log-linear in the features, fitted as a gamma regression of squared residuals,
    which are clipped since mis-tracked picks are not errors of the network; then all of it is
    scaled so that the 90 % interval covers 90 %.

    Attributes:
        weight: Coefficients of the log variance. Shape: (F,).
        fitted: Whether :meth:`fit` was called with enough residuals.

    Example:
        >>> calibration = Calibration()
        >>> g = torch.Generator().manual_seed(0)
        >>> features = torch.rand(2000, 6, generator=g).double()
        >>> features[:, 0] = 1
        >>> std = features[:, 1] + 0.1
        >>> residual = std * torch.randn(2000, generator=g)
        >>> calibration.fit(residual, features)
        >>> round(float(coverage(residual, calibration(features))), 2)
        0.9

    Source: inferred; the issue asks for calibration on held-out observed segments.
    """

    weight: Tensor
    fitted: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(_FEATURES, dtype=torch.float64))
        self.register_buffer("fitted", torch.tensor(False))

    @torch.no_grad()
    def fit(self, residual: Tensor, features: Tensor, steps: int = 30) -> None:
        """Fit to held-out residuals; fewer than 50 leave it as it was.

        Args:
            residual: Held-out residuals [m]. Shape: (K,).
            features: Features of their entries, from :func:`entry_features`. Shape: (K, F).
            steps: Largest number of Newton steps.
        """
        residual, x = residual.double().cpu(), features.double().cpu()
        if len(residual) < 50:
            return
        size = residual.abs().clamp_min(1e-6)
        # 1.4826 times the median is the standard deviation without mis-tracked picks
        clipped = size.clamp_max(4 * 1.4826 * float(size.median()))
        squares = clipped.square()
        weight = torch.zeros(_FEATURES, dtype=torch.float64)
        weight[0] = squares.mean().log()
        penalty = 1e-3 * len(x) * torch.eye(_FEATURES, dtype=torch.float64)
        penalty[0, 0] = 1e-9
        for _ in range(steps):
            ratio = (squares.log() - x @ weight).exp().clamp_max(1e4)
            gradient = x.T @ (ratio - 1) - penalty @ weight
            # Fisher's information of a gamma regression with a log link does not depend on it
            step = torch.linalg.solve(x.T @ x + penalty, gradient)
            weight += step.clamp(-2, 2)
            if float(step.abs().max()) < 1e-6:
                break
        std = (0.5 * (x @ weight)).exp()
        scale = float((residual.abs() / std).quantile(0.9)) / Z90
        weight[0] += 2 * math.log(max(scale, 1e-6))
        self.weight.copy_(weight)
        self.fitted.fill_(True)

    def forward(self, features: Tensor) -> Tensor:
        """Standard deviation [m]; NaN before :meth:`fit`. Shape: (..., F) to (...), float32."""
        std = (0.5 * (features @ self.weight)).exp()
        return torch.where(self.fitted, std, torch.nan).float()
