"""Kriging with a physics drift: exact, over all traces and layers of a stack at once.

The drift is a ridge regression on physics, of thickness or of its logarithm, whichever does better
on flights that it has not seen; what it leaves has the covariance of
:mod:`fulgurite.models.ice_layers.baselines.covariance`, all parameters of which are fitted on
training stacks by maximum likelihood
(:mod:`fulgurite.models.ice_layers.baselines.kriging_fit`). Picks that all others contradict
(mis-tracks) are left out.

What is observed is the length of a span between two picked boundaries: of one layer, or the sum of
several where the boundaries between them are missing. Its noise is that of its two boundaries. What
such a sum leaves to its layers is divided by their covariance given everything else, so that they
add up to it exactly (kriging with an exact sum).

Packages for kriging know neither components over layers, nor shared noise, nor likelihood over
many stacks; so this one is written out. Where they agree it is tested against scikit-learn.

Axes: N traces, L layers, P physical fields, n observed spans, m layers in them, T entries asked
for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fulgurite.domains.ice_layers.spans import THINNEST_LAYER, TensorSpans
from fulgurite.errors import CheckpointError
from fulgurite.models.ice_layers.baselines.covariance import (
    KrigingStack,
    ObservedSpans,
    Tables,
    factorise,
    make_tables,
    measure_geometry,
    measure_residual,
    name_parameters,
    score_contradiction,
    signal_covariance,
    span_covariance,
)
from fulgurite.models.ice_layers.baselines.interpolation import Ridge

__all__ = ["Kriging"]

#: Elements of a cross-covariance that is held at once.
CROSS_COVARIANCE_SIZE = 2**23


@dataclass(frozen=True)
class Kriging:
    """A fitted kriging.

    Args:
        drift: Predicts thickness from physics.
        parameters: Logarithms of the covariance's parameters (the logit of ``nu`` between 0 and
            2), in the order a, c, tau, b, p, length_p, y, length_y, n, e, nu; then slopes of the
            logarithm of ``level`` and of ``detail`` on standardised physics and depth.
                Shape: (11 + 2 (P + 1),).
        scale: Factor of standard deviations, from held-out picks of training stacks. Shape: ().

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> physics = torch.rand(40, 3, 1, generator=generator, dtype=torch.float64)
        >>> at = 100.0 * torch.arange(40)
        >>> h = torch.exp(physics[..., 0]) + 0.1 * torch.sin(at / 500)[:, None]
        >>> observed = torch.ones(40, 3, dtype=torch.bool)
        >>> observed[10:20, 1] = False
        >>> from fulgurite.models.ice_layers import KrigingFitOptions, fit_kriging
        >>> stack = KrigingStack(h, observed, physics, at)
        >>> mean, std = fit_kriging([stack] * 2, fit=KrigingFitOptions(iterations=10))(stack)
        >>> bool(((mean - h)[10:20, 1].abs() < 0.05).all()), bool((std > 0).all())
        (True, True)

    Source: docs/papers/ice_layers.md sections 4.3 and 5 (kriging with physics drift); the
        covariance is inferred from section 6.2.
    """

    drift: Ridge
    parameters: Tensor
    scale: Tensor

    @property
    def covariance(self) -> dict[str, float]:
        """The covariance's parameters by name; [m] for lengths and noise."""
        return {name: float(value) for name, value in name_parameters(self.parameters).items()}

    @property
    def noise(self) -> float:
        """Standard deviation of a pick's own error [m]."""
        named = self.covariance
        return math.sqrt(named["n"] ** 2 + 2 * named["e"] ** 2)

    def state(self) -> dict[str, Tensor]:
        """Everything, as tensors for a checkpoint."""
        return {
            "parameters": self.parameters,
            "scale": self.scale,
            **{f"drift.{name}": value for name, value in vars(self.drift).items()},
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Kriging:
        """Restore a kriging from :meth:`state`.

        Raises:
            CheckpointError: A tensor is missing.
        """
        try:
            names = ("mean", "std", "coefficients", "scale", "log")
            drift = Ridge(*(state[f"drift.{name}"] for name in names))
            return cls(drift, state["parameters"], state["scale"])
        except KeyError as error:
            raise CheckpointError(
                f"The checkpoint of kriging lacks {error}.", "Fit again: `fulgurite fit`."
            ) from error

    def __call__(
        self,
        stack: KrigingStack,
        mask: Tensor | None = None,
        outlier: float = 4.0,
        trust_all: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Predict the thickness without the noise of picks, and its standard deviation.

        Layers between two picks add up to what was measured of them, exactly.

        Args:
            stack: What was observed of the stack.
            mask: Entries to predict; the others are NaN. All by default. Shape: (N, L).
            outlier: Standard deviations from what all other picks say, beyond which a pick is
                left out; infinite keeps all.
            trust_all: Whether sums that were left out as data are kept too: a pick stays where it
                is, though all others contradict it.

        Shape: to (N, L) and (N, L), float64.
        """
        spans = stack.measured
        theta = self.parameters
        tables = make_tables(theta, measure_geometry(self.drift, stack))
        observed, score = ObservedSpans.of(spans), None
        residual = measure_residual(tables, observed)
        covariance = span_covariance(theta, tables, observed)
        factor = factorise(covariance)
        for limit in (outlier + 1, outlier):  # the worst first: they distort the others
            if math.isinf(limit):
                break
            if score is None:
                score = score_contradiction(residual, factor)
            if bool((score > limit).any()):
                trusted = score <= limit
                observed, residual = observed.take(trusted), residual[trusted]
                covariance = covariance[trusted][:, trusted]
                factor, score = factorise(covariance), None
        mask = torch.ones_like(stack.observed) if mask is None else mask
        if not trust_all:
            is_kept = torch.zeros_like(mask)
            is_kept[observed.entries] = True
            spans = spans.keep(is_kept)
        mean, std = _predict(tables, mask, observed, residual, factor=factor, spans=spans)
        return mean, std * self.scale


def _predict(
    tables: Tables,
    mask: Tensor,
    observed: ObservedSpans,
    residual: Tensor,
    *,
    factor: Tensor,
    spans: TensorSpans,
) -> tuple[Tensor, Tensor]:
    """Best linear prediction and its standard deviation.

    Args:
        tables: Covariances of the stack.
        mask: Entries to predict. Shape: (N, L), bool.
        observed: Observed spans without outliers.
        residual: Residual of these spans from the drift. Shape: (n,).
        factor: Cholesky factor of their covariance. Shape: (n, n).
        spans: All that was measured: its sums are kept.

    Shape: to (N, L) and (N, L), float64.
    """
    mean = torch.full(mask.shape, torch.nan, dtype=torch.float64)
    std = mean.clone()
    variance = (
        tables.level.square() * tables.layers.diagonal()
        + tables.detail.square() * (tables.persistent + tables.yearly).diagonal()[:, None]
    )
    white = torch.linalg.solve_triangular(factor, residual[:, None], upper=False)
    # a trace with a sum is needed as a whole
    sums = (spans.between & mask).any(1)
    targets = (mask | sums[:, None]).nonzero()
    count = max(1, CROSS_COVARIANCE_SIZE // max(1, len(residual)))
    for part in _whole_traces(targets, count):
        to = part.unbind(1)
        cross = observed.sum(signal_covariance(tables, observed.entries, to))
        cross = torch.linalg.solve_triangular(factor, cross, upper=False)
        mean[to] = tables.drift[to] + (cross.T @ white)[:, 0]
        # rounding may leave less than nothing beside a pick
        posterior = (variance[to] - cross.square().sum(0)).clamp_min(1e-8)
        std[to] = posterior.sqrt()
        rows: Tensor = torch.unique(part[:, 0])
        if len(rows := rows[sums[rows]]):
            inside = sums[part[:, 0]]
            _divide_sums(mean, std, tables, rows, cross=cross[:, inside], spans=spans[rows])
    nothing = ~mask
    return mean.masked_fill(nothing, torch.nan), std.masked_fill(nothing, torch.nan)


def _whole_traces(targets: Tensor, count: int) -> Iterator[Tensor]:
    """About so many entries at a time, sorted by trace, none of which is divided. Shape: (T, 2)."""
    ends = torch.bincount(targets[:, 0]).cumsum(0).tolist()
    first = last = 0
    for end in ends:
        if end - first > count and last > first:
            yield targets[first:last]
            first = last
        last = end
    if last > first:
        yield targets[first:last]


def _divide_sums(
    mean: Tensor, std: Tensor, tables: Tables, rows: Tensor, *, cross: Tensor, spans: TensorSpans
) -> None:
    """Give each span of several layers the length that was measured; in place.

    The difference is divided by the layers' covariance C given all observations: the projection
    ``C a (s - a' h) / (a' C a)``, with indices of refraction ``a`` and the measured length ``s``.
    By how much it moves a layer adds to the layer's uncertainty.

    Args:
        mean: Predicted thickness [m], changed in place. Shape: (N, L).
        std: Standard deviation [m], changed in place. Shape: (N, L).
        tables: Covariances of the stack.
        rows: Traces, all of whose layers are in ``cross``. Shape: (t,).
        cross: Whitened covariance with the observed spans. Shape: (n, t L).
        spans: Measured spans of these traces.
    """
    layers = mean.shape[1]
    part = cross.T.view(len(rows), layers, -1)
    level, detail = tables.level[rows], tables.detail[rows]
    same = torch.eye(layers, dtype=level.dtype)
    lasting, yearly = tables.persistent[0, 0], tables.yearly[0, 0]
    covariance = level[:, :, None] * level[:, None] * tables.layers
    covariance = covariance + detail[:, :, None] * detail[:, None] * (lasting + yearly * same)
    covariance = covariance - part @ part.mT
    inside = (spans.start[:, :, None] == spans.start[:, None]) & spans.between[:, :, None]
    gain = (covariance * inside @ spans.index[..., None])[..., 0]
    total = (inside * (spans.index * gain)[:, None]).sum(-1).clamp_min(1e-12)
    off = spans.path - spans.lengths(mean[rows])
    adjusted = mean[rows] + torch.where(spans.between, gain * off / total, 0.0)
    # a layer that would be less than nothing has its part of the sum instead
    thin = (inside & (adjusted <= THINNEST_LAYER)[:, None]).any(-1)
    adjusted = torch.where(thin, spans.constrain(mean[rows]), adjusted)
    # The sums are among the observations, so that the covariance knows them up to the noise of
    # picks; to meet a sum exactly is to leave the best prediction.
    moved = torch.where(spans.between, adjusted - mean[rows], 0.0)
    mean[rows], std[rows] = adjusted, (std[rows].square() + moved.square()).sqrt()
