"""What the network is told of each entry.

Axes: B stacks, N traces of all of them, M traces of the longest, L layers, P physical fields,
S length scales, F features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fulgurite.models.ice_layers.baselines import Ridge, fit_ridge
from fulgurite.models.ice_layers.graph import Track

__all__ = ["PhysicsPrior", "input_features", "nearby_means", "sides"]

_SIGMA = torch.tensor([0.1587, 0.8413], dtype=torch.float64)  # one standard deviation
_SAMPLE = 1_000_000  # most entries that a quantile takes


def input_features(
    thickness: Tensor, visible: Tensor, physics: Tensor, pos: Tensor | None
) -> Tensor:
    """Position, visible thickness, whether it is visible, and physics, side by side.

    Args:
        thickness: Normalised; anything where it is not visible, NaN too. Shape: (N, L).
        visible: What the network may see. Shape: (N, L), bool.
        physics: Normalised. Shape: (N, L, P).
        pos: Normalised latitude and longitude; None leaves them out. Shape: (N, 2).

    Shape: to (N, L, F), F = 2 + 2 + P.

    Example:
        >>> nan = torch.full((1, 1), float("nan"))
        >>> hidden = torch.zeros(1, 1, dtype=torch.bool)
        >>> input_features(nan, hidden, torch.ones(1, 1, 1), torch.zeros(1, 2))
        tensor([[[0., 0., 0., 0., 1.]]])

    Source: card section 1.1, recommended tensor (inferred).
    """
    shown = torch.where(visible, thickness, 0.0).to(physics.dtype)
    parts = [torch.stack([shown, visible.to(physics.dtype)], -1), physics]
    if pos is not None:
        parts.insert(0, pos.to(physics.dtype)[:, None].expand(-1, physics.shape[1], -1))
    return torch.cat(parts, -1)


def nearby_means(
    thickness: Tensor, visible: Tensor, track: Track, distance: Tensor, scales: Sequence[float]
) -> Tensor:
    """What neighbours along the track show of the same layer, near and far.

    For each length scale the mean of visible thickness with weights ``exp(-(d/s)^2 / 2)``, shrunk
    to 0 where little is visible, and the logarithm of the weights' sum.

    Args:
        thickness: Normalised. Shape: (N, L).
        visible: Shape: (N, L), bool.
        track: The stacks.
        distance: Along the track [m]. Shape: (N,).
        scales: Length scales [m].

    Shape: to (N, L, 2 S).

    Example:
        >>> visible = torch.tensor([[True], [False]])
        >>> distance = torch.tensor([0.0, 100.0])
        >>> nearby_means(torch.ones(2, 1), visible, Track.of([2]), distance, [100.0])[1, 0]
        tensor([0.9238, 0.4741])

    Source: inferred; the issue's idea of distance-weighted means of visible neighbours.
    """
    shown = torch.where(visible, thickness, 0.0)
    both = track.pad(torch.cat([shown, visible.to(shown.dtype)], 1))  # (B, M, 2 L)
    place = track.pad(distance)
    apart = (place[:, :, None] - place[:, None, :]).to(shown.dtype)
    outs = []
    for scale in scales:
        total, weight = ((-0.5 * (apart / scale).square()).exp() @ both).chunk(2, -1)
        outs += [total / (weight + 0.05), weight.log1p()]
    return track.unpad(torch.stack(outs, -1))


def sides(
    thickness: Tensor, visible: Tensor, track: Track, distance: Tensor, reach: Sequence[float]
) -> Tensor:
    """What lies before and after each entry of its layer: what an interpolation needs to know.

    On each side, for each reach, the mean of visible thickness with weights ``exp(-d / reach)`` (so
    of the nearest picks, however far they are; 0 without any) and how near the nearest pick is,
    ``exp(-d / (8 reach))``; then the straight line between both sides at the shortest reach.

    Args:
        thickness: Normalised; finite where not visible, too. Shape: (N, L).
        visible: Shape: (N, L), bool.
        track: The stacks.
        distance: Along the track [m]. Shape: (N,).
        reach: Distances over which picks of a side are averaged [m]. Not far below the spacing of
            traces: weights underflow at 80 times this distance.

    Shape: to (N, L, 4 S + 1).

    Example:
        >>> visible = torch.tensor([[True], [False], [True]])
        >>> shown = torch.tensor([[1.0], [0.0], [2.0]])
        >>> at = torch.tensor([0.0, 100.0, 400.0])
        >>> sides(shown, visible, Track.of([3]), at, [100.0])[1, 0]
        tensor([1.0000, 2.0000, 0.8825, 0.6873, 1.2500])

    Source: inferred; along-track interpolation of card section 4.3 as an input.
    """
    place = track.pad(distance)
    seen = track.pad(visible)
    both = torch.cat([track.pad(torch.where(visible, thickness, 0.0)), seen.to(thickness.dtype)], 2)
    number = torch.arange(place.shape[1], device=place.device)
    earlier = (number[:, None] >= number).to(thickness.dtype)
    toward = torch.stack([earlier, earlier.T], 1)[None]  # (1, M, 2, M)
    apart = (place[:, :, None] - place[:, None, :]).abs().to(thickness.dtype)
    infinite = torch.full((), torch.inf, device=place.device)
    before = torch.where(seen, place[..., None], -infinite).cummax(1).values
    after = torch.where(seen, place[..., None], infinite).flip(1).cummin(1).values.flip(1)
    away = torch.stack([place[..., None] - before, after - place[..., None]], 2)  # (B, M, 2, L)
    away = away.to(thickness.dtype)
    means = []
    for length in reach:
        weights = (-apart / length).exp()[:, :, None] * toward  # (B, M, 2, M)
        total, weight = (weights.flatten(1, 2) @ both).unflatten(1, (-1, 2)).chunk(2, -1)
        means.append(torch.where(weight > 0, total / weight.clamp_min(1e-37), 0.0))
    near = [(-away / (8 * length)).exp() for length in reach]
    # the nearer side counts more; alone, it counts all
    share = (1 / away.clamp_min(1.0)) / (1 / away.clamp_min(1.0)).sum(2, keepdim=True).clamp_min(1e-9)
    line = (share * means[0]).sum(2)
    outs = [x for pair in zip(means, near, strict=True) for both_ in pair for x in both_.unbind(2)]
    return track.unpad(torch.stack([*outs, line], -1))


class PhysicsPrior(nn.Module):
    """Ridge regression of thickness on physics, kept in buffers; networks predict what it leaves.

    Args:
        layers: L.
        physics: P.
        log: Regress the logarithm of thickness on fields and their logarithms: deviations are then
            relative, and thickness is positive.

    Example:
        >>> x = torch.rand(50, 1, 1, generator=torch.Generator().manual_seed(0))
        >>> prior = PhysicsPrior(1, 1, log=False)
        >>> prior.fit(2 + 3 * x[..., 0], x[..., 0] > -1, x)
        >>> round(float(prior(torch.tensor([[[0.5]]]))), 2)
        3.5

    Source: inferred; the issue's idea of a residual over a ridge prior.
    """

    mean: Tensor
    std: Tensor
    coefficients: Tensor
    scale: Tensor
    spread: Tensor

    def __init__(self, layers: int, physics: int, log: bool) -> None:
        super().__init__()
        size = physics * (2 if log else 1)
        self.log = log
        shapes = {"mean": (size,), "std": (size,), "coefficients": (layers, size + 1)}
        shapes |= {"scale": (physics if log else 0,), "spread": ()}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.ones(shape, dtype=torch.float64))

    def fit(self, thickness: Tensor, observed: Tensor, physics: Tensor) -> None:
        """Fit to training stacks.

        Args:
            thickness: [m]. Shape: (N, L).
            observed: Shape: (N, L), bool.
            physics: Shape: (N, L, P).
        """
        ridge = fit_ridge(thickness, observed, physics, log=self.log)
        for name in ("mean", "std", "coefficients", "scale"):
            getattr(self, name).copy_(getattr(ridge, name))
        left = self.deviation(thickness, self(physics))[observed]
        # of the middle two thirds: mis-tracked picks do not count
        low, high = left[:: 1 + len(left) // _SAMPLE].quantile(_SIGMA)
        self.spread.fill_(float(0.5 * (high - low)) or 1.0)

    def forward(self, physics: Tensor) -> Tensor:
        """Expected thickness [m]. Shape: (N, L, P) to (N, L), float64."""
        log = torch.tensor(self.log)
        return Ridge(self.mean, self.std, self.coefficients, self.scale, log)(physics)

    def deviation(self, thickness: Tensor, expected: Tensor) -> Tensor:
        """How far thickness is from what is expected, in typical deviations. Shape: (N, L).

        Args:
            thickness: [m]; NaN stays NaN. Shape: (N, L).
            expected: From :meth:`forward`. Shape: (N, L).
        """
        if self.log:
            return (thickness / expected).log() / self.spread
        return (thickness - expected) / self.spread

    def metres(self, deviation: Tensor, expected: Tensor) -> Tensor:
        """The inverse of :meth:`deviation` [m]. Shape: (N, L), float64."""
        scaled = deviation.double() * self.spread
        # no prediction is a thousand times what is expected; training may pass through any
        return expected * scaled.clamp(-7, 7).exp() if self.log else expected + scaled
