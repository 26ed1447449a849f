"""Input features of the network for each entry.

Axes: B stacks, N traces of all of them, M traces of the longest, L layers, P physical fields,
S length scales, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from fulgurite.models.ice_layers.baselines.interpolation import Ridge, fit_ridge
from fulgurite.models.ice_layers.data.graph import Track
from fulgurite.models.ice_layers.output.completion import picks_around

__all__ = [
    "PhysicsPrior",
    "PriorKind",
    "find_contradicted",
    "input_features",
    "nearby_means",
    "side_features",
]

_SIGMA = torch.tensor([0.1587, 0.8413], dtype=torch.float64)  # one standard deviation
_SAMPLE = 1_000_000  # most entries that a quantile takes
_FOLDS = 5  # parts of the flight segments, without one of which a prior is fitted
_THINNEST = 0.05  # [m]: least expectation that relative deviations are measured in

PriorKind = Literal["ridge", "relative", "log"]


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

    Source: docs/papers/ice_layers.md section 1.1, recommended tensor (inferred).
    """
    visible_thickness = torch.where(visible, thickness, 0.0).to(physics.dtype)
    parts = [torch.stack([visible_thickness, visible.to(physics.dtype)], -1), physics]
    if pos is not None:
        parts.insert(0, pos.to(physics.dtype)[:, None].expand(-1, physics.shape[1], -1))
    return torch.cat(parts, -1)


def nearby_means(
    thickness: Tensor, visible: Tensor, track: Track, distance: Tensor, *, scales: Sequence[float]
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
        >>> nearby_means(torch.ones(2, 1), visible, Track.of([2]), distance, scales=[100.0])[1, 0]
        tensor([0.9238, 0.4741])

    Source: inferred; the issue's idea of distance-weighted means of visible neighbours.
    """
    visible_thickness = torch.where(visible, thickness, 0.0)
    # (B, M, 2 L)
    stacked = track.pad(torch.cat([visible_thickness, visible.to(visible_thickness.dtype)], 1))
    position = track.pad(distance)
    apart = (position[:, :, None] - position[:, None, :]).to(visible_thickness.dtype)
    outs = []
    for scale in scales:
        total, weight = ((-0.5 * (apart / scale).square()).exp() @ stacked).chunk(2, -1)
        outs += [total / (weight + 0.05), weight.log1p()]
    return track.unpad(torch.stack(outs, -1))


def side_features(
    thickness: Tensor, visible: Tensor, track: Track, distance: Tensor, *, reach: Sequence[float]
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
        >>> thickness = torch.tensor([[1.0], [0.0], [2.0]])
        >>> at = torch.tensor([0.0, 100.0, 400.0])
        >>> side_features(thickness, visible, Track.of([3]), at, reach=[100.0])[1, 0]
        tensor([1.0000, 2.0000, 0.8825, 0.6873, 1.2500])

    Source: inferred; along-track interpolation of docs/papers/ice_layers.md section 4.3 as an
    input.
    """
    position = track.pad(distance)
    is_visible = track.pad(visible)
    stacked = torch.cat(
        [track.pad(torch.where(visible, thickness, 0.0)), is_visible.to(thickness.dtype)], 2
    )
    number = torch.arange(position.shape[1], device=position.device)
    earlier = (number[:, None] >= number).to(thickness.dtype)
    toward = torch.stack([earlier, earlier.T], 1)[None]  # (1, M, 2, M)
    apart = (position[:, :, None] - position[:, None, :]).abs().to(thickness.dtype)
    before, after = picks_around(position[..., None], is_visible)
    # (B, M, 2, L)
    away = torch.stack([position[..., None] - before, after - position[..., None]], 2)
    away = away.to(thickness.dtype)
    means = []
    for length in reach:
        weights = (-apart / length).exp()[:, :, None] * toward  # (B, M, 2, M)
        summed = (weights.flatten(1, 2) @ stacked).view(*away.shape[:3], -1)  # (B, M, 2, 2 L)
        total, weight = summed.chunk(2, -1)
        means.append(torch.where(weight > 0, total / weight.clamp_min(1e-37), 0.0))
    near = [(-away / (8 * length)).exp() for length in reach]
    # the nearer side counts more; alone, it counts all
    inverse = 1 / away.clamp_min(1.0)
    line = (inverse / inverse.sum(2, keepdim=True).clamp_min(1e-9) * means[0]).sum(2)
    outs = [x for pair in zip(means, near, strict=True) for side in pair for x in side.unbind(2)]
    return track.unpad(torch.stack([*outs, line], -1))


def find_contradicted(
    thickness: Tensor, visible: Tensor, track: Track, distance: Tensor, *, limit: float
) -> Tensor:
    """Picks that their neighbours in the layer contradict, such as those of another boundary.

    A pick is compared with the mean of the others, weighted by ``exp(-d / (3 spacing))``; where few
    are near, nothing is contradicted.

    Args:
        thickness: Deviations in units of their typical size; finite where not visible, too.
            Shape: (N, L).
        visible: Shape: (N, L), bool.
        track: The stacks.
        distance: Along the track [m]. Shape: (N,).
        limit: Difference beyond which a pick is contradicted.

    Shape: to (N, L), bool.

    Example:
        >>> thickness = torch.tensor([[0.0], [0.1], [8.0], [0.2], [0.1]])
        >>> at = 100.0 * torch.arange(5)
        >>> visible = torch.ones(5, 1, dtype=torch.bool)
        >>> find_contradicted(thickness, visible, Track.of([5]), at, limit=2.0).squeeze()
        tensor([False, False,  True, False, False])

    Source: inferred; kriging leaves out such picks, too.
    """
    visible_thickness = torch.where(visible, thickness, 0.0)
    # one wrong pick must not make its neighbours look wrong
    bounded = visible_thickness.clamp(-3 * limit, 3 * limit)
    stacked = track.pad(torch.cat([bounded, visible.to(visible_thickness.dtype)], 1))
    position = track.pad(distance)
    steps = (track.length_of - 1).clamp_min(1)
    spacing = ((position.amax(1) - position[:, 0]) / steps).clamp_min(1e-3)[:, None, None]
    apart = (position[:, :, None] - position[:, None, :]).abs() / spacing
    number = torch.arange(position.shape[1], device=position.device)
    near = torch.where(number[:, None] != number, (-apart / 3).exp(), 0.0)
    near = near.to(visible_thickness.dtype)
    total, weight = track.unpad(near @ stacked).chunk(2, -1)
    enough = visible & (weight > 0.5)
    return enough & ((visible_thickness - total / weight.clamp_min(0.5)).abs() > limit)


class PhysicsPrior(nn.Module):
    """Ridge regression of thickness on physics, kept in buffers; networks predict what it leaves.

    Besides the regression on all flight segments there are some without a part of them each: what
    a regression leaves of stacks that it was fitted on is less than what it leaves of new ones, so
    training takes deviations from those that do not know the stack.

    Args:
        layers: L.
        physics: P.
        kind: ``ridge``; ``relative``, the same with deviations in units of what is expected; or
            ``log``: of the logarithm of thickness on fields and their logarithms, so that
            deviations are relative and thickness is positive.

    Example:
        >>> x = torch.rand(50, 1, 1, generator=torch.Generator().manual_seed(0))
        >>> prior = PhysicsPrior(1, 1)
        >>> prior.fit(2 + 3 * x[..., 0], x[..., 0] > -1, x, torch.arange(50))
        >>> round(float(prior(torch.tensor([[[0.5]]]))), 2)
        3.5

    Source: inferred; the issue's idea of a residual over a ridge prior.
    """

    mean: Tensor
    std: Tensor
    coefficients: Tensor
    scale: Tensor
    spread: Tensor

    def __init__(self, layers: int, physics: int, kind: PriorKind = "ridge") -> None:
        super().__init__()
        log = kind == "log"
        size = physics * (2 if log else 1)
        self.kind = kind
        shapes = {"mean": (size,), "std": (size,), "coefficients": (layers, size + 1)}
        shapes |= {"scale": (physics if log else 0,)}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.ones(1 + _FOLDS, *shape, dtype=torch.float64))
        self.register_buffer("spread", torch.ones((), dtype=torch.float64))

    def fit(self, thickness: Tensor, observed: Tensor, physics: Tensor, segment: Tensor) -> None:
        """Fit to training stacks.

        Args:
            thickness: [m]. Shape: (N, L).
            observed: Shape: (N, L), bool.
            physics: Shape: (N, L, P).
            segment: Number of each trace's flight segment. Shape: (N,).

        Raises:
            DataError: Nothing is observed.
        """
        expected = physics.new_empty(physics.shape[:-1], dtype=torch.float64)
        part = segment % _FOLDS
        for fold in range(-1, _FOLDS):
            rows = part != fold
            if not observed[rows].any():  # all is of one part
                rows = torch.ones_like(rows)
            log = self.kind == "log"
            ridge = fit_ridge(thickness[rows], observed[rows], physics[rows], log=log)
            for name in ("mean", "std", "coefficients", "scale"):
                getattr(self, name)[1 + fold].copy_(getattr(ridge, name))
            expected[part == fold] = ridge(physics[part == fold])
        residual = self.deviation(thickness, expected)[observed]
        # of the middle two thirds: mis-tracked picks do not count
        low, high = residual[:: 1 + len(residual) // _SAMPLE].quantile(_SIGMA)
        self.spread.fill_(float(0.5 * (high - low)) or 1.0)

    def forward(self, physics: Tensor, segment: Tensor | None = None) -> Tensor:
        """Expected thickness [m].

        Args:
            physics: Shape: (N, L, P).
            segment: Number of each trace's flight segment, whose picks are not to be known; None
                takes what was fitted on all. Shape: (N,).

        Shape: to (N, L), float64.
        """
        if segment is None:
            return self._ridge(0)(physics)
        part = segment % _FOLDS
        expected = physics.new_empty(physics.shape[:-1], dtype=torch.float64)
        for fold in range(_FOLDS):
            rows = part == fold
            if rows.device.type != "cpu":  # which rows these are it would have to wait for
                of_fold = self._ridge(1 + fold)(physics)
                expected = torch.where(rows[:, None], of_fold, expected)
            elif rows.any():
                expected[rows] = self._ridge(1 + fold)(physics[rows])
        return expected

    def _ridge(self, number: int) -> Ridge:
        return Ridge(
            mean=self.mean[number],
            std=self.std[number],
            coefficients=self.coefficients[number],
            scale=self.scale[number],
            log=torch.tensor(self.kind == "log"),
        )

    def deviation(self, thickness: Tensor, expected: Tensor) -> Tensor:
        """How far thickness is from what is expected, in typical deviations. Shape: (N, L).

        Args:
            thickness: [m]; NaN stays NaN. Shape: (N, L).
            expected: Expected thickness [m], from :meth:`forward`. Shape: (N, L).
        """
        if self.kind == "log":
            return (thickness / expected).log() / self.spread
        return (thickness - expected) / (self._unit(expected) * self.spread)

    def metres(self, deviation: Tensor, expected: Tensor) -> Tensor:
        """The inverse of :meth:`deviation` [m]. Shape: (N, L), float64."""
        scaled = deviation.double() * self.spread
        if self.kind == "log":
            # no prediction is a thousand times what is expected; training may pass through any
            return expected * scaled.clamp(-7, 7).exp()
        return expected + scaled * self._unit(expected)

    def _unit(self, expected: Tensor) -> Tensor | float:
        return expected.clamp_min(_THINNEST) if self.kind == "relative" else 1.0
