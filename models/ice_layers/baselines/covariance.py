"""The covariance of kriging, and what was observed of a stack.

What the drift leaves has the covariance, in units of the drift,

    level:  a² + c² exp(−|l−m|/τ) + b² [l=m]                     the whole stack, its layers
    detail: p² exp(−(d/λ_p)^ν) + y² exp(−(d/λ_y)^ν) [l=m]        along the track d

whose standard deviations vary with physics and depth (log-linearly, one factor for level, one for
detail), so that layers with much melt may deviate more. Detail ``p`` is the same in all layers
(topography), ``y`` of one year. A span between two picks has the noise n² + 2 e², where ``e`` is of
boundaries, which adjoining spans share with opposite sign.

Axes: N traces, L layers, P physical fields, n observed spans, m layers in them, T entries asked
for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fulgurite.arithmetic import ceil_div
from fulgurite.domains.ice_layers.spans import Spans, TensorSpans
from fulgurite.models.ice_layers.baselines.interpolation import Ridge

__all__ = [
    "START",
    "THINNEST",
    "Geometry",
    "KrigingStack",
    "ObservedSpans",
    "Tables",
    "factorise",
    "initial_parameters",
    "join_stacks",
    "make_tables",
    "measure_geometry",
    "measure_residual",
    "name_parameters",
    "score_contradiction",
    "signal_covariance",
    "solve",
    "span_covariance",
    "thin_stacks",
]

# Where the search begins; [m] for lengths and noise, layers for tau, drift = 1 for the rest.
START = {
    "a": 0.05, "c": 0.05, "tau": 3.0, "b": 0.05, "p": 0.08, "length_p": 700.0,
    "y": 0.05, "length_y": 700.0, "n": 0.01, "e": 0.01, "nu": 1.0,
}  # fmt: skip
THINNEST = 0.05  # [m]: least drift that deviations are measured in
Entries = tuple[Tensor, ...]


class KrigingStack(NamedTuple):
    """What kriging sees of a stack.

    Args:
        thickness: [m]. Shape: (N, L).
        observed: Shape: (N, L), bool.
        physics: Shape: (N, L, P).
        distance: Along the track [m]. Shape: (N,).
        spans: Spans measured between picked boundaries; thickness alone by default.
    """

    thickness: Tensor
    observed: Tensor
    physics: Tensor
    distance: Tensor
    spans: TensorSpans | None = None

    @classmethod
    def of_spans(
        cls, thickness: Tensor, spans: TensorSpans, physics: Tensor, distance: Tensor
    ) -> KrigingStack:
        """Return a stack whose observed entries are the spans of one layer."""
        return cls(thickness, spans.observed, physics, distance, spans)

    @property
    def measured(self) -> TensorSpans:
        """What was measured between picked boundaries."""
        if self.spans is not None:
            return self.spans
        return Spans.of_thickness(self.thickness.where(self.observed, torch.nan))

    def take(self, rows: Any) -> KrigingStack:
        """Return the stack of some of the traces."""
        spans = None if self.spans is None else self.spans[rows]
        thickness, observed, physics, distance = (x[rows] for x in self[:4])
        return KrigingStack(thickness, observed, physics, distance, spans)

    def show(self, spans: TensorSpans) -> KrigingStack:
        """Return the stack with only these spans measured."""
        return KrigingStack.of_spans(self.thickness, spans, self.physics, self.distance)


class ObservedSpans(NamedTuple):
    """Observed spans of a stack, one after another, and the layers in them.

    Args:
        trace: Trace of each span. Shape: (n,).
        first: First layer of each span. Shape: (n,).
        stop: Layer after the last one of each span. Shape: (n,).
        value: Length of each span in units of thickness [m]. Shape: (n,).
        span: Which span each layer is in. Shape: (m,).
        layer: Number of each layer. Shape: (m,).
        weight: Weight of each layer in its span: 1 but for differences of the index of refraction.
            Shape: (m,).
    """

    trace: Tensor
    first: Tensor
    stop: Tensor
    value: Tensor
    span: Tensor
    layer: Tensor
    weight: Tensor

    @classmethod
    def of(cls, spans: TensorSpans) -> ObservedSpans:
        """From the spans of a stack."""
        number = torch.arange(spans.start.shape[1])
        is_first = spans.known & (spans.start == number)
        trace, first = is_first.nonzero(as_tuple=True)
        length = spans.length[trace, first]
        row, layer = spans.known.nonzero(as_tuple=True)
        order = torch.zeros(spans.start.shape, dtype=torch.long)
        order[trace, first] = torch.arange(len(trace))
        span = order[row, spans.start[row, layer]]
        index = spans.index[row, layer]
        mean = torch.zeros(len(trace), dtype=index.dtype).index_add(0, span, index) / length
        value = spans.path[trace, first] / mean
        return cls(trace, first, first + length, value, span, layer, index / mean[span])

    def take(self, mask: Tensor) -> ObservedSpans:
        """Return the spans in a mask (n,)."""
        renumbered = mask.cumsum(0) - 1
        inside = mask[self.span]
        trace, first, stop, value = (x[mask] for x in self[:4])
        layer, weight = self.layer[inside], self.weight[inside]
        return ObservedSpans(
            trace, first, stop, value, renumbered[self.span[inside]], layer, weight
        )

    @property
    def entries(self) -> Entries:
        """Trace and layer of all layers in spans. Shape: (m,) each."""
        return self.trace[self.span], self.layer

    def sum(self, values: Tensor) -> Tensor:
        """Sums over the layers of each span. Shape: (m, ...) to (n, ...)."""
        if len(self.span) == len(self.trace):  # of one layer each
            return values
        weighted = values * self.weight.view(-1, *[1] * (values.ndim - 1))
        return values.new_zeros(len(self.trace), *values.shape[1:]).index_add(
            0, self.span, weighted
        )


class Geometry(NamedTuple):
    """Drift of a stack, its unit, features of the units, distances of traces and of layers."""

    drift: Tensor
    unit: Tensor
    features: Tensor
    apart: Tensor
    lag: Tensor


class Tables(NamedTuple):
    """Covariances of a stack by trace (N, N) and layer (L, L), and their units (N, L)."""

    drift: Tensor
    level: Tensor
    detail: Tensor
    persistent: Tensor
    yearly: Tensor
    layers: Tensor


def name_parameters(theta: Tensor) -> dict[str, Tensor]:
    """The parameters by name, from their logarithms."""
    values = theta[: len(START)].clamp(-15, 15)
    parameters = dict(zip(START, values.exp(), strict=True))
    parameters["nu"] = 2 * torch.sigmoid(values[-1])
    return parameters


def initial_parameters(fields: int) -> Tensor:
    """Where the search begins. Shape: (11 + 2 (P + 1),)."""
    theta = torch.zeros(len(START) + 2 * (fields + 1), dtype=torch.float64)
    theta[: len(START)] = torch.tensor([math.log(v) for v in START.values()])
    theta[len(START) - 1] = math.log(START["nu"] / (2 - START["nu"]))
    return theta


def measure_geometry(drift: Ridge, stack: KrigingStack) -> Geometry:
    """What does not depend on the covariance's parameters."""
    trend = drift(stack.physics)
    layers, fields = stack.physics.shape[1:]
    distance = stack.distance.double()
    standard = (stack.physics.to(drift.mean) - drift.mean[:fields]) / drift.std[:fields]
    depth = torch.linspace(-1, 1, layers, dtype=trend.dtype).expand(len(trend), -1)
    number = torch.arange(layers)
    return Geometry(
        drift=trend,
        unit=trend.clamp_min(THINNEST),
        features=torch.cat([standard.clamp(-3, 3), depth[..., None]], -1),
        apart=(distance[:, None] - distance).abs() + 1e-9,  # 0^nu has no slope
        lag=(number[:, None] - number).abs().to(trend),
    )


def make_tables(theta: Tensor, geometry: Geometry) -> Tables:
    """Units and covariances of a stack under some parameters."""
    named = name_parameters(theta)
    slopes = theta[len(START) :].view(2, -1)
    level = named["a"] ** 2 + named["c"] ** 2 * torch.exp(-geometry.lag / named["tau"])
    nu = named["nu"]
    return Tables(
        drift=geometry.drift,
        level=geometry.unit * torch.exp((geometry.features @ slopes[0]).clamp(-6, 6)),
        detail=geometry.unit * torch.exp((geometry.features @ slopes[1]).clamp(-6, 6)),
        persistent=named["p"] ** 2 * torch.exp(-((geometry.apart / named["length_p"]) ** nu)),
        yearly=named["y"] ** 2 * torch.exp(-((geometry.apart / named["length_y"]) ** nu)),
        layers=level + named["b"] ** 2 * (geometry.lag == 0),
    )


def signal_covariance(tables: Tables, rows: Entries, columns: Entries) -> Tensor:
    """Covariance between entries without the noise of picks. Shape: (T, n)."""
    (i, k), (j, m) = rows, columns
    same = k[:, None] == m
    detail = tables.persistent[i][:, j] + torch.where(same, tables.yearly[i][:, j], 0.0)
    return (
        tables.level[i, k][:, None] * tables.level[j, m] * tables.layers[k][:, m]
        + tables.detail[i, k][:, None] * tables.detail[j, m] * detail
    )


def span_covariance(theta: Tensor, tables: Tables, spans: ObservedSpans) -> Tensor:
    """Covariance of observed spans, with the noise of their boundaries. Shape: (n, n)."""
    named = name_parameters(theta)
    entries = spans.entries
    signal = spans.sum(spans.sum(signal_covariance(tables, entries, entries)).T)

    # each span has two boundaries, and spans follow each other by trace and layer
    pick_noise = (named["n"] ** 2 + 2 * named["e"] ** 2).expand(len(spans.trace))
    is_joined = (spans.trace[1:] == spans.trace[:-1]) & (spans.first[1:] == spans.stop[:-1])
    shared = named["e"] ** 2 * is_joined
    return signal + pick_noise.diag() - shared.diag(1) - shared.diag(-1)


def factorise(matrix: Tensor) -> Tensor:
    """Cholesky factor, with the least jitter that it needs."""
    size = matrix.diagonal().mean().detach() if len(matrix) else 1.0
    eye = torch.eye(len(matrix), dtype=matrix.dtype)
    factor = eye
    for jitter in (1e-10, 1e-7, 1e-4):
        factor, info = torch.linalg.cholesky_ex(matrix + jitter * size * eye)
        if not int(info):
            break
    return factor


def measure_residual(tables: Tables, spans: ObservedSpans) -> Tensor:
    """How far observed spans are from the drift [m]. Shape: (n,)."""
    return spans.value - spans.sum(tables.drift[spans.entries])


def solve(theta: Tensor, tables: Tables, spans: ObservedSpans) -> tuple[Tensor, Tensor]:
    """Residual of observed spans from the drift, and the Cholesky factor of their covariance."""
    return measure_residual(tables, spans), factorise(span_covariance(theta, tables, spans))


def score_contradiction(residual: Tensor, factor: Tensor) -> Tensor:
    """Deviation of each pick from what all others say [standard deviations]. Shape: (n,)."""
    inverse = torch.cholesky_inverse(factor)
    return (inverse @ residual).abs() / inverse.diagonal().sqrt()


def thin_stacks(stacks: Sequence[KrigingStack], traces: int = 100_000) -> list[KrigingStack]:
    """Subsample the traces of stacks to about ``traces`` in total.

    Example:
        >>> stack = KrigingStack(*(torch.zeros(10, *s) for s in ((2,), (2,), (2, 1), ())))
        >>> [len(s.distance) for s in thin_stacks([stack] * 2, 10)]
        [5, 5]
    """
    step = ceil_div(sum(len(s.distance) for s in stacks), traces)
    return [s.take(slice(None, None, step)) for s in stacks] if step > 1 else list(stacks)


def join_stacks(stacks: Sequence[KrigingStack]) -> tuple[Tensor, Tensor, Tensor]:
    """Thickness, observed and physics of all traces of stacks."""
    arrays = ((s.thickness, s.observed, s.physics) for s in stacks)
    thickness, observed, physics = (torch.cat(x) for x in zip(*arrays, strict=True))
    return thickness, observed, physics
