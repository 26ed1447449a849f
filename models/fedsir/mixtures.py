"""Mixtures of two Gaussians, by which methods split clients or samples.

Axes: N points, D dimensions of a point.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["fit_two_gaussians"]


def fit_two_gaussians(points: NDArray[np.float64], **options: Any) -> Any:
    """Fit a mixture of two Gaussians.

    Args:
        points: Points to split. Shape: (N, D).
        options: Options of scikit-learn's ``GaussianMixture``.

    Returns:
        The fitted ``GaussianMixture``.

    Example:
        >>> points = np.array([[0.1], [0.2], [5.0], [0.15], [5.1]])
        >>> sorted(fit_two_gaussians(points, random_state=0).means_[:, 0].round().tolist())
        [0.0, 5.0]
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    with warnings.catch_warnings():
        # of points that are equal, k-means finds fewer distinct ones than components
        warnings.simplefilter("ignore", ConvergenceWarning)
        return GaussianMixture(2, **options).fit(points)
