"""Baselines that complete one stack of layers by simple rules: means, lines, and ridge on physics.

Kriging is in :mod:`fulgurite.models.ice_layers.baselines.kriging`.

Axes: N traces, L layers, P physical fields, F features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fulgurite.devices import lower_median
from fulgurite.errors import DataError

__all__ = [
    "Ridge",
    "along_then_across",
    "along_track",
    "fit_ridge",
    "layer_means",
    "own_layer_mean",
    "physics_features",
]


def _neighbours(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Last known entry at or before each, and first at or after: −1 and N where there is none.

    Shape: (N, L) to two of (N, L).
    """
    n = len(mask)
    row = torch.arange(n, device=mask.device)[:, None]
    before = torch.where(mask, row, -1).cummax(0).values
    after = torch.where(mask, row, n).flip(0).cummin(0).values.flip(0)
    return before, after


def _between(values: Tensor, mask: Tensor, coordinate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lines between known entries, the nearest one beyond the ends; NaN where a column has none.

    Args:
        values: Shape: (N, L).
        mask: Shape: (N, L), bool.
        coordinate: Coordinate of each row, not decreasing. Shape: (N,).

    Returns:
        The lines; distances to the known entry before and to the one after, infinite where there
        is none. Shape: (N, L) each.
    """
    n = len(values)
    if not n:
        return values, values, values
    before, after = _neighbours(mask)
    none_before, none_after = before < 0, after >= n
    # beyond the ends both neighbours are the one that there is
    low = torch.where(none_before, after, before).clamp(0, n - 1)
    high = torch.where(none_after, before, after).clamp(0, n - 1)
    at = coordinate[:, None].to(values)
    to_low, to_high = at - coordinate.to(values)[low], coordinate.to(values)[high] - at
    width = to_low + to_high
    weight = torch.where(width > 0, to_low / torch.where(width > 0, width, 1.0), 0.0)
    lines = values.gather(0, low) * (1 - weight) + values.gather(0, high) * weight
    lines = torch.where(none_before & none_after, torch.nan, lines)
    return (
        lines,
        torch.where(none_before, torch.inf, to_low),
        torch.where(none_after, torch.inf, to_high),
    )


def layer_means(thickness: Tensor, observed: Tensor) -> Tensor:
    """Mean of the observed entries of each layer; of all layers where a layer has none.

    Args:
        thickness: [m]. Shape: (N, L).
        observed: Shape: (N, L), bool.

    Shape: to (L,).

    Raises:
        DataError: Nothing is observed.

    Example:
        >>> h = torch.tensor([[1.0, torch.nan], [3.0, torch.nan]])
        >>> layer_means(h, h.isfinite())
        tensor([2., 2.])

    Source: docs/papers/ice_layers.md section 4.3 ("train per-layer mean").
    """
    total = torch.where(observed, thickness, 0.0).sum(0)
    count = observed.sum(0)
    if not count.sum():
        raise DataError(
            "Training stacks have no observed thickness at all.",
            "Check the layers that `data.init_args.source` names.",
        )
    return torch.where(count > 0, total / count.clamp_min(1), total.sum() / count.sum())


def own_layer_mean(thickness: Tensor, observed: Tensor, fallback: Tensor) -> Tensor:
    """Each layer's mean in this stack, or ``fallback`` where the layer is wholly absent.

    Args:
        thickness: [m]. Shape: (N, L).
        observed: Shape: (N, L), bool.
        fallback: [m]. Shape: (L,).

    Shape: to (N, L).

    Example:
        >>> h = torch.tensor([[1.0, torch.nan], [3.0, torch.nan]])
        >>> own_layer_mean(h, h.isfinite(), torch.tensor([9.0, 8.0]))
        tensor([[2., 8.],
                [2., 8.]])

    Source: docs/papers/ice_layers.md section 4.3 ("own layer mean, fallback").
    """
    count = observed.sum(0)
    mean = torch.where(observed, thickness, 0.0).sum(0) / count.clamp_min(1)
    return torch.where(count > 0, mean, fallback.to(mean)).expand(thickness.shape)


def along_track(
    thickness: Tensor,
    observed: Tensor,
    distance: Tensor,
    max_gap: float = 300.0,
    *,
    reach: float = 60.0,
    fewest: int = 2,
) -> Tensor:
    """Lines along the track between picks, as the OPR toolbox interpolates layers.

    A gap longer than ``max_gap`` stays missing but for what is within ``reach`` of a pick; so does
    what lies beyond the first and last pick. A layer with fewer than ``fewest`` picks stays missing
    altogether.

    Args:
        thickness: [m]. Shape: (N, L).
        observed: Shape: (N, L), bool.
        distance: Along the track [m], not decreasing. Shape: (N,).
        max_gap: Longest gap that a line crosses [m]; infinite fills all, beyond the ends by the
            nearest pick.
        reach: Distance that a pick fills into a longer gap [m].
        fewest: Least number of picks of a layer that is filled.

    Shape: to (N, L); NaN is missing.

    Example:
        >>> h = torch.tensor([[1.0], [torch.nan], [3.0], [torch.nan]])
        >>> at = torch.tensor([0.0, 100.0, 200.0, 300.0])
        >>> along_track(h, h.isfinite(), at).T
        tensor([[1., 2., 3., nan]])
        >>> along_track(h, h.isfinite(), at, max_gap=150.0).T
        tensor([[1., nan, 3., nan]])

    Source: docs/papers/ice_layers.md section 5 (``opsInterpLayersToMasterGPSTime``,
        ``gaps_dist=[300 60]``); what lies beyond the ends is inferred.
    """
    lines, to_low, to_high = _between(thickness, observed, distance)
    inside = (to_low + to_high) <= max_gap
    near = torch.minimum(to_low, to_high) <= reach
    enough = observed.sum(0) >= fewest
    return torch.where((inside | near) & enough, lines, torch.nan)


def along_then_across(
    thickness: Tensor, observed: Tensor, distance: Tensor, fallback: Tensor
) -> Tensor:
    """Lines along the track without a limit, then across layers, then ``fallback``.

    Beyond the first and last known layer of a trace, the nearest one is taken.

    Args:
        thickness: [m]. Shape: (N, L).
        observed: Shape: (N, L), bool.
        distance: Along the track [m], not decreasing. Shape: (N,).
        fallback: [m], for a stack without a pick. Shape: (L,).

    Shape: to (N, L).

    Example:
        >>> h = torch.tensor([[1.0, torch.nan, 2.0], [torch.nan, torch.nan, 4.0]])
        >>> along_then_across(h, h.isfinite(), torch.tensor([0.0, 100.0]), torch.zeros(3))
        tensor([[1.0000, 1.5000, 2.0000],
                [1.0000, 2.5000, 4.0000]])

    Source: docs/papers/ice_layers.md section 4.3 ("linear along track, then across layers").
    """
    filled = along_track(thickness, observed, distance, torch.inf, reach=torch.inf, fewest=1).T
    layer = torch.arange(len(filled), device=filled.device)
    across, _, _ = _between(filled, filled.isfinite(), layer)
    return torch.where(across.isfinite(), across, fallback.to(across)[:, None]).T


# --- ridge on physics ------------------------------------------------------------------------


def physics_features(physics: Tensor, scale: Tensor | None = None) -> Tensor:
    """Physical fields, and their signed logarithms where a scale of each is given.

    Args:
        physics: Shape: (N, L, P).
        scale: Typical size of each field. Shape: (P,).

    Shape: to (N, L, P) or (N, L, 2P).

    Example:
        >>> physics_features(torch.tensor([[[0.0, 3.0]]]), torch.ones(2))
        tensor([[[0.0000, 3.0000, 0.0000, 1.3863]]])
    """
    if scale is None:
        return physics
    return torch.cat([physics, physics.sign() * torch.log1p(physics.abs() / scale)], -1)


@dataclass(frozen=True)
class Ridge:
    """A linear map of each layer's physics to its thickness, or to the thickness's logarithm.

    Args:
        mean: Means of the features. Shape: (F,).
        std: Standard deviations of the features. Shape: (F,).
        coefficients: Coefficients of each layer, the intercept first. Shape: (L, 1 + F).
        scale: Scale of :func:`physics_features`; empty for the fields alone. Shape: (P,) or (0,).
        log: Whether the logarithm is predicted. Shape: ().
    """

    mean: Tensor
    std: Tensor
    coefficients: Tensor
    scale: Tensor
    log: Tensor

    def __call__(self, physics: Tensor) -> Tensor:
        """Predicted thickness [m]. Shape: (N, L, P) to (N, L)."""
        features = physics_features(physics.to(self.mean), self.scale if len(self.scale) else None)
        slopes = self.coefficients[:, 1:]
        out = ((features - self.mean) / self.std * slopes).sum(-1) + self.coefficients[:, 0]
        return out.exp() if bool(self.log) else out


def fit_ridge(
    thickness: Tensor,
    observed: Tensor,
    physics: Tensor,
    penalty: float = 1e-3,
    *,
    log: bool = False,
    robust: float = 2.0,
) -> Ridge:
    """Fit a ridge regression of thickness on physics for each layer.

    Features are standardised over all observed entries. Mis-tracked picks count less: weights are
    those of a Huber loss, found by iteration. A layer without a pick takes what fits all layers.

    Args:
        thickness: [m], of all training stacks. Shape: (N, L).
        observed: Shape: (N, L), bool.
        physics: Shape: (N, L, P).
        penalty: Penalty on the coefficients for each entry; the intercept is free.
        log: Predict the logarithm of thickness from the fields and their signed logarithms.
        robust: Robust standard deviations beyond which an error counts linearly.

    Raises:
        DataError: Nothing is observed, or ``log`` is set and a thickness is not positive.

    Example:
        >>> physics = torch.arange(20.0).view(10, 2, 1)
        >>> h = 1 + 0.5 * physics[..., 0]
        >>> fit = fit_ridge(h, torch.ones(10, 2, dtype=torch.bool), physics, penalty=0.0)
        >>> bool(torch.allclose(fit(physics).float(), h))
        True

    Source: docs/papers/ice_layers.md section 4.3 ("ridge on physics per layer"); weights and
    logarithms are inferred.
    """
    target = torch.where(observed, thickness, 1.0).double()
    if not observed.any():
        layer_means(thickness, observed)  # raises
    if log and not (target > 0).all():
        raise DataError(
            "Training stacks have an observed thickness of 0 m or less.",
            "Mark these picks as missing: layers cannot cross.",
        )
    target = target.log() if log else target
    physics = physics.double()
    scale = physics.new_zeros(0)
    if log:
        size = lower_median(physics[observed].abs(), 0)
        scale = torch.where(size > 0, size, 1.0)
    features = physics_features(physics, scale if log else None)
    mean = features[observed].mean(0)
    std = (features[observed] - mean).square().mean(0).sqrt()
    std = torch.where(std > 1e-12 * mean.abs().clamp_min(1e-12), std, 1.0)
    features = (features - mean) / std
    features = torch.cat([features.new_ones(*features.shape[:2], 1), features], -1)
    common = _huber_ridge(features[observed], target[observed], penalty, robust)
    layers = [
        _huber_ridge(features[rows, layer], target[rows, layer], penalty, robust)
        if bool(rows.any())
        else common
        for layer, rows in enumerate(observed.T)
    ]
    return Ridge(mean, std, torch.stack(layers), scale, torch.tensor(log))


def _huber_ridge(features: Tensor, target: Tensor, penalty: float, robust: float) -> Tensor:
    """Ridge coefficients under a Huber loss. Shapes: (n, F), (n,) to (F,)."""
    n, width = features.shape
    free = torch.full((width,), n * penalty + 1e-9, dtype=features.dtype)
    free[0] = 1e-9
    weight = torch.ones_like(target)
    coefficients = weight.new_zeros(width)
    for _ in range(5):
        weighted = features * weight[:, None]
        coefficients = torch.linalg.solve(weighted.T @ features + free.diag(), weighted.T @ target)
        error = (target - features @ coefficients).abs()
        limit = robust * 1.4826 * error.median()
        weight = (limit / error.clamp_min(1e-12)).clamp(max=1.0)
        if not limit > 0:
            break
    return coefficients
