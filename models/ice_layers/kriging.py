"""Kriging with a physics drift: exact, over all traces and layers of a stack at once.

The drift is a ridge regression on physics, of thickness or of its logarithm, whichever does better
on flight segments that it has not seen. What is left has the covariance, in units of the drift,

    level:  a² + c² exp(−|l−m|/τ) + b² [l=m]                     the whole stack, its layers
    detail: p² exp(−(d/λ_p)^ν) + y² exp(−(d/λ_y)^ν) [l=m]        along the track d

whose standard deviations vary with physics and depth (log-linearly, one factor for level, one for
detail), so that layers with much melt may deviate more. Detail ``p`` is the same in all layers
(topography), ``y`` of one year. A pick has the noise n² + e² (2 [l=m] − [|l−m|=1]): ``e`` is of
boundaries, which adjoining layers share with opposite sign. All parameters are fitted on training
stacks by maximum likelihood. Picks that all others contradict (mis-tracks) are left out.

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
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fulgurite.errors import CheckpointError, DataError
from fulgurite.models.ice_layers.baselines import Ridge, fit_ridge
from fulgurite.models.ice_layers.graph import Track
from fulgurite.models.ice_layers.hiding import held_out
from fulgurite.models.ice_layers.spans import Spans
from fulgurite.models.ice_layers.uncertainty import Z90

__all__ = ["Drift", "Kriging", "KrigingStack", "fit_kriging", "join_stacks", "thinned"]

Drift = Literal["auto", "linear", "log"]

# Where the search begins; [m] for lengths and noise, layers for tau, drift = 1 for the rest.
_START = {
    "a": 0.05, "c": 0.05, "tau": 3.0, "b": 0.05, "p": 0.08, "length_p": 700.0,
    "y": 0.05, "length_y": 700.0, "n": 0.01, "e": 0.01, "nu": 1.0,
}  # fmt: skip
_PRIOR, _SLOPE_PRIOR = 1.5, 0.3  # standard deviations of logarithms; of their slopes on a field
_THINNEST = 0.05  # [m]: least drift that deviations are measured in
_FOLDS = 5
_JUDGED = 4  # times the entries of a fit: of those that intervals are judged on
# Drifts to choose from: a product of accumulation and compaction is additive in logarithms, which
# take more data to know
_DRIFTS: tuple[Mapping[str, Any], ...] = tuple(
    {"log": log, "penalty": penalty} for log in (True, False) for penalty in (1e-3, 1e-2, 1e-1)
)
_Place = tuple[Tensor, ...]
_LEAST = 1e-4  # thickness of a layer [m]
_CHUNK = 2**23  # elements of a cross-covariance that is held at once


class KrigingStack(NamedTuple):
    """What kriging sees of a stack.

    Args:
        thickness: [m]. Shape: (N, L).
        observed: Shape: (N, L), bool.
        physics: Shape: (N, L, P).
        distance: Along the track [m]. Shape: (N,).
        spans: What was measured between picked boundaries; thickness alone if not given.
    """

    thickness: Tensor
    observed: Tensor
    physics: Tensor
    distance: Tensor
    spans: Spans | None = None

    @classmethod
    def of_spans(
        cls, thickness: Tensor, spans: Spans, physics: Tensor, distance: Tensor
    ) -> KrigingStack:
        """With the entries observed that are spans of their own."""
        return cls(thickness, spans.observed, physics, distance, spans)

    @property
    def measured(self) -> Spans:
        """What was measured between picked boundaries."""
        if self.spans is not None:
            return self.spans
        return Spans.of_thickness(self.thickness.where(self.observed, torch.nan))

    def take(self, rows: Any) -> KrigingStack:
        """Some of the traces."""
        spans = None if self.spans is None else self.spans[rows]
        thickness, observed, physics, distance = (x[rows] for x in self[:4])
        return KrigingStack(thickness, observed, physics, distance, spans)

    def show(self, spans: Spans) -> KrigingStack:
        """With only a part of what was measured."""
        return KrigingStack.of_spans(self.thickness, spans, self.physics, self.distance)


class _Spans(NamedTuple):
    """Observed spans of a stack, one after another, and the layers in them.

    Args:
        trace: Of each span. Shape: (n,).
        first: Its first layer. Shape: (n,).
        stop: The layer after its last one. Shape: (n,).
        value: Its length in units of thickness [m]. Shape: (n,).
        span: Which span each layer is in. Shape: (m,).
        layer: Number of each layer. Shape: (m,).
        weight: Of each layer in its span: 1 but for differences of the index of refraction.
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
    def of(cls, spans: Spans) -> _Spans:
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

    def take(self, kept: Tensor) -> _Spans:
        """Some of the spans."""
        renumbered = kept.cumsum(0) - 1
        inside = kept[self.span]
        trace, first, stop, value = (x[kept] for x in self[:4])
        layer, weight = self.layer[inside], self.weight[inside]
        return _Spans(trace, first, stop, value, renumbered[self.span[inside]], layer, weight)

    @property
    def entries(self) -> _Place:
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


class _Geometry(NamedTuple):
    """Of a stack: drift, its unit, features of the units, distances of traces and of layers."""

    drift: Tensor
    unit: Tensor
    features: Tensor
    apart: Tensor
    lag: Tensor


class _Tables(NamedTuple):
    """Covariances of a stack by trace (N, N) and layer (L, L), and their units (N, L)."""

    drift: Tensor
    level: Tensor
    detail: Tensor
    persistent: Tensor
    yearly: Tensor
    layers: Tensor


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
        >>> seen = torch.ones(40, 3, dtype=torch.bool)
        >>> seen[10:20, 1] = False
        >>> stack = KrigingStack(h, seen, physics, at)
        >>> mean, std = fit_kriging([stack] * 2, iterations=10)(stack)
        >>> bool(((mean - h)[10:20, 1].abs() < 0.05).all()), bool((std > 0).all())
        (True, True)

    Source: card sections 4.3 and 5 (kriging with physics drift); the covariance is inferred from
        section 6.2.
    """

    drift: Ridge
    parameters: Tensor
    scale: Tensor

    @property
    def covariance(self) -> dict[str, float]:
        """The covariance's parameters by name; [m] for lengths and noise."""
        return {name: float(value) for name, value in _named(self.parameters).items()}

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
        """See :meth:`state`.

        Raises:
            CheckpointError: A part is missing.
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
        where: Tensor | None = None,
        outlier: float = 4.0,
        trust_all: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Predict the thickness without the noise of picks, and its standard deviation.

        Layers between two picks add up to what was measured of them, exactly.

        Args:
            stack: What is known.
            where: Entries that are asked for; the others are NaN. All by default. Shape: (N, L).
            outlier: Standard deviations from what all other picks say, beyond which a pick is
                left out; infinite keeps all.
            trust_all: Keep also sums that were left out as data: a pick stays where it is, though
                all others contradict it.

        Shape: to (N, L) and (N, L), float64.
        """
        spans = stack.measured
        theta = self.parameters
        tables = _tables(theta, _geometry(self.drift, stack))
        kept, score = _Spans.of(spans), None
        rest, factor = _solve(theta, tables, kept)
        for limit in (outlier + 1, outlier):  # the worst first: they distort the others
            if math.isinf(limit):
                break
            if score is None:
                score = _contradiction(rest, factor)
            if bool((score > limit).any()):
                kept = kept.take(score <= limit)
                rest, factor = _solve(theta, tables, kept)
                score = None
        asked = torch.ones_like(stack.observed) if where is None else where
        if not trust_all:
            left = torch.zeros_like(asked)
            left[kept.entries] = True
            spans = spans.keep(left)
        mean, std = _predict(tables, asked, kept, rest, factor, spans)
        return mean, std * self.scale


def _named(theta: Tensor) -> dict[str, Tensor]:
    """The parameters by name, from their logarithms."""
    values = theta[: len(_START)].clamp(-15, 15)
    found = dict(zip(_START, values.exp(), strict=True))
    found["nu"] = 2 * torch.sigmoid(values[-1])
    return found


def _begin(fields: int) -> Tensor:
    """Where the search begins. Shape: (11 + 2 (P + 1),)."""
    theta = torch.zeros(len(_START) + 2 * (fields + 1), dtype=torch.float64)
    theta[: len(_START)] = torch.tensor([math.log(v) for v in _START.values()])
    theta[len(_START) - 1] = math.log(_START["nu"] / (2 - _START["nu"]))
    return theta


def _geometry(drift: Ridge, stack: KrigingStack) -> _Geometry:
    """What does not depend on the covariance's parameters."""
    trend = drift(stack.physics)
    layers, fields = stack.physics.shape[1:]
    distance = stack.distance.double()
    standard = (stack.physics.to(drift.mean) - drift.mean[:fields]) / drift.std[:fields]
    depth = torch.linspace(-1, 1, layers, dtype=trend.dtype).expand(len(trend), -1)
    number = torch.arange(layers)
    return _Geometry(
        drift=trend,
        unit=trend.clamp_min(_THINNEST),
        features=torch.cat([standard.clamp(-3, 3), depth[..., None]], -1),
        apart=(distance[:, None] - distance).abs() + 1e-9,  # 0^nu has no slope
        lag=(number[:, None] - number).abs().to(trend),
    )


def _tables(theta: Tensor, known: _Geometry) -> _Tables:
    """Units and covariances of a stack under some parameters."""
    named = _named(theta)
    slopes = theta[len(_START) :].view(2, -1)
    level = named["a"] ** 2 + named["c"] ** 2 * torch.exp(-known.lag / named["tau"])
    nu = named["nu"]
    return _Tables(
        drift=known.drift,
        level=known.unit * torch.exp((known.features @ slopes[0]).clamp(-6, 6)),
        detail=known.unit * torch.exp((known.features @ slopes[1]).clamp(-6, 6)),
        persistent=named["p"] ** 2 * torch.exp(-((known.apart / named["length_p"]) ** nu)),
        yearly=named["y"] ** 2 * torch.exp(-((known.apart / named["length_y"]) ** nu)),
        layers=level + named["b"] ** 2 * (known.lag == 0),
    )


def _signal(tables: _Tables, left: _Place, right: _Place) -> Tensor:
    """Covariance between entries without the noise of picks. Shape: (T, n)."""
    (i, k), (j, m) = left, right
    same = k[:, None] == m
    detail = tables.persistent[i][:, j] + torch.where(same, tables.yearly[i][:, j], 0.0)
    return (
        tables.level[i, k][:, None] * tables.level[j, m] * tables.layers[k][:, m]
        + tables.detail[i, k][:, None] * tables.detail[j, m] * detail
    )


def _observations(theta: Tensor, tables: _Tables, spans: _Spans) -> Tensor:
    """Covariance of observed spans, with the noise of their boundaries. Shape: (n, n)."""
    named = _named(theta)
    entries = spans.entries
    signal = spans.sum(spans.sum(_signal(tables, entries, entries)).T)

    def same(left: Tensor, right: Tensor) -> Tensor:
        return 1.0 * (left[:, None] == right)

    first, stop = spans.first, spans.stop
    shared = same(first, first) + same(stop, stop) - same(first, stop) - same(stop, first)
    noise = named["e"] ** 2 * shared + named["n"] ** 2 * same(first, first)
    return signal + torch.where(spans.trace[:, None] == spans.trace, noise, 0.0)


def _factor(matrix: Tensor) -> Tensor:
    """Cholesky factor, with the least jitter that it needs."""
    size = matrix.diagonal().mean().detach() if len(matrix) else 1.0
    eye = torch.eye(len(matrix), dtype=matrix.dtype)
    factor = eye
    for jitter in (1e-10, 1e-7, 1e-4):
        factor, info = torch.linalg.cholesky_ex(matrix + jitter * size * eye)
        if not int(info):
            break
    return factor


def _predict(
    tables: _Tables, asked: Tensor, kept: _Spans, rest: Tensor, factor: Tensor, spans: Spans
) -> tuple[Tensor, Tensor]:
    """Best linear prediction and its standard deviation.

    Args:
        tables: Of the stack.
        asked: Which entries. Shape: (N, L), bool.
        kept: Spans that are not left out.
        rest: What the drift leaves of them. Shape: (n,).
        factor: Of their covariance. Shape: (n, n).
        spans: All that was measured: its sums are kept.

    Shape: to (N, L) and (N, L), float64.
    """
    mean = torch.full(asked.shape, torch.nan, dtype=torch.float64)
    std = mean.clone()
    variance = (
        tables.level.square() * tables.layers.diagonal()
        + tables.detail.square() * (tables.persistent + tables.yearly).diagonal()[:, None]
    )
    white = torch.linalg.solve_triangular(factor, rest[:, None], upper=False)
    # a trace with a sum is needed as a whole
    sums = (spans.between & asked).any(1)
    targets = (asked | sums[:, None]).nonzero()
    count = max(1, _CHUNK // max(1, len(rest)))
    for part in _whole_traces(targets, count):
        to = part.unbind(1)
        cross = kept.sum(_signal(tables, kept.entries, to))
        cross = torch.linalg.solve_triangular(factor, cross, upper=False)
        mean[to] = tables.drift[to] + (cross.T @ white)[:, 0]
        # rounding may leave less than nothing beside a pick
        left = (variance[to] - cross.square().sum(0)).clamp_min(1e-8)
        std[to] = left.sqrt()
        rows: Tensor = torch.unique(part[:, 0])
        if len(rows := rows[sums[rows]]):
            inside = sums[part[:, 0]]
            _divide_sums(mean, std, tables, rows, cross[:, inside], spans[rows])
    nothing = ~asked
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
    mean: Tensor, std: Tensor, tables: _Tables, rows: Tensor, cross: Tensor, spans: Spans
) -> None:
    """Give each span of several layers the length that was measured; in place.

    The difference is divided by the layers' covariance C given all observations: the projection
    ``C a (s - a' h) / (a' C a)``, with indices of refraction ``a`` and the measured length ``s``.

    Args:
        mean: Changed. Shape: (N, L).
        std: Changed. Shape: (N, L).
        tables: Of the stack.
        rows: Traces, all of whose layers are in ``cross``. Shape: (t,).
        cross: Whitened covariance with the observed spans. Shape: (n, t L).
        spans: Of these traces.
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
    kept = mean[rows] + torch.where(spans.between, gain * off / total, 0.0)
    # a layer that would be less than nothing has its share of the sum instead
    thin = (inside & (kept <= _LEAST)[:, None]).any(-1)
    kept = torch.where(thin, spans.constrain(mean[rows]), kept)
    left = (std[rows].square() - torch.where(spans.between, gain.square() / total, 0.0)).clamp_min(
        0
    )
    mean[rows], std[rows] = kept, left.sqrt()


# --- fitting -----------------------------------------------------------------------------------


class _Item(NamedTuple):
    """A part of a training stack: its observed spans, and what is known of it."""

    spans: _Spans
    known: _Geometry


def fit_kriging(
    stacks: Sequence[KrigingStack],
    groups: Sequence[int] | None = None,
    fit_stacks: int = 40,
    fit_entries: int = 240,
    iterations: int = 40,
    outlier: float = 4.0,
    seed: int = 0,
    drift: Drift = "auto",
    validation: Sequence[KrigingStack] = (),
) -> Kriging:
    """Fit the drift on all stacks and the covariance on some of them.

    Drifts are compared on ``validation``, else on groups that they were not fitted on, and the
    covariance is that of such deviations: those from a drift that knows the stack are too small.
    The likelihood is maximised by L-BFGS twice: with deviations clipped, then without the picks
    that all others of their stack contradict.

    Args:
        stacks: Of training.
        groups: A number for each stack: those of one flight segment resemble each other. By
            default each is a group of its own.
        fit_stacks: Stacks that the covariance is fitted on.
        fit_entries: About so many entries of each: half in a window, half spread over the stack.
        iterations: Of L-BFGS the first time; half as many the second time.
        outlier: Standard deviations from what all others say.
        seed: Of the choice of stacks and windows.
        drift: Of thickness (``linear``), of its logarithm (``log``), or whichever does better.
        validation: Stacks of other flights, on which drifts are compared: how a regression goes
            beyond the years and places that it was fitted on does not show in training.

    Raises:
        DataError: There is no stack, or nothing is observed.
    """
    if not stacks:
        raise DataError(
            "There is no training stack to fit kriging on.",
            "Check `data.init_args.source`, `val` and `test`.",
        )
    numbers = range(len(stacks)) if groups is None else groups
    options = [o for o in _DRIFTS if drift == "auto" or o["log"] == (drift == "log")]
    chosen_drift, others = _choose_drift(stacks, numbers, options, validation)
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(stacks), generator=draw)[:fit_stacks].tolist()
    parts = [(_part(stacks[k], fit_entries, draw), others[k]) for k in chosen]
    items = [
        _Item(_Spans.of(s.measured), _geometry(other, s)) for s, other in parts if s.observed.any()
    ]
    start = _begin(stacks[0].physics.shape[-1])
    theta = _maximise(start, start, _clipped(items), iterations)
    kept = [_without_outliers(item, theta, outlier) for item in items]
    theta = _maximise(theta, start, kept, iterations // 2)
    # not all of a large stack, which would take longer than the fit
    judged = [_part(stacks[k], _JUDGED * fit_entries, draw) for k in chosen]
    krigings = [Kriging(others[k], theta, theta.new_ones(())) for k in chosen]
    return Kriging(chosen_drift, theta, _calibrated(list(zip(krigings, judged, strict=True))))


def _choose_drift(
    stacks: Sequence[KrigingStack],
    groups: Sequence[int],
    drifts: Sequence[Mapping[str, Any]],
    validation: Sequence[KrigingStack],
) -> tuple[Ridge, list[Ridge]]:
    """The drift that does best on unseen flights; and one for each stack without its group.

    Mean absolute errors are compared: mis-tracked picks do not decide.
    """
    thin = thinned(stacks)
    numbers = {group: k for k, group in enumerate(dict.fromkeys(groups))}
    folds = [numbers[group] % _FOLDS for group in groups]
    judged = [stack for stack in thinned(validation) if stack.observed.any()]

    def fitted(rows: Iterable[int], options: Mapping[str, Any]) -> Ridge:
        return fit_ridge(*join_stacks([thin[k] for k in rows]), **options)

    def without_each_fold(options: Mapping[str, Any]) -> dict[int, Ridge]:
        if len(numbers) < 2:  # nothing to compare on
            return {0: fitted(range(len(stacks)), options)}
        return {
            fold: fitted([k for k in range(len(stacks)) if folds[k] != fold], options)
            for fold in sorted(set(folds))
        }

    def error(options: Mapping[str, Any]) -> float:
        if judged:
            whole = fitted(range(len(stacks)), options)
            pairs = [(whole, stack) for stack in judged]
        else:
            without = without_each_fold(options)
            pairs = [(without[fold], stack) for fold, stack in zip(folds, thin, strict=True)]
        errors = [(ridge(s.physics) - s.thickness)[s.observed].abs() for ridge, s in pairs]
        return float(torch.cat(errors).mean())

    if len(drifts) == 1 or not (judged or len(numbers) > 1):
        options = drifts[0]
    else:
        options = min(drifts, key=error)
    without = without_each_fold(options)
    chosen = without[0] if len(numbers) < 2 else fitted(range(len(stacks)), options)
    return chosen, [without[fold] for fold in folds]


def _calibrated(krigings: Sequence[tuple[Kriging, KrigingStack]]) -> Tensor:
    """Factor with which 90 % intervals cover 90 % of held-out picks. Shape: ().

    The error that picks have themselves is part of the interval, and is not scaled.
    """
    ratios = []
    for number, (kriging, stack) in enumerate(krigings):
        track, spans = Track.of([len(stack.observed)]), stack.measured
        shown = spans.hide(held_out(spans.picked, track, torch.tensor([number])))
        hidden = stack.observed & ~shown.observed
        mean, std = kriging(stack.show(shown), hidden)
        error, std = (stack.thickness - mean)[hidden], std[hidden]
        # the factor at which this pick lies on the edge of its interval; 0 if it always is inside
        beyond = (error / Z90).square() - kriging.noise**2
        ratios.append(beyond.clamp_min(0).sqrt() / std)
    found = torch.cat(ratios)
    return found.quantile(0.9).clamp(0.5, 2.0) if len(found) else found.new_ones(())


def thinned(stacks: Sequence[KrigingStack], traces: int = 100_000) -> list[KrigingStack]:
    """Every so many-th trace, where there are more in all than a regression needs.

    Example:
        >>> stack = KrigingStack(*(torch.zeros(10, *s) for s in ((2,), (2,), (2, 1), ())))
        >>> [len(s.distance) for s in thinned([stack] * 2, 10)]
        [5, 5]
    """
    step = -(-sum(len(s.distance) for s in stacks) // traces)
    return [s.take(slice(None, None, step)) for s in stacks] if step > 1 else list(stacks)


def join_stacks(stacks: Sequence[KrigingStack]) -> tuple[Tensor, Tensor, Tensor]:
    """Thickness, observed and physics of all traces of stacks."""
    arrays = ((s.thickness, s.observed, s.physics) for s in stacks)
    thickness, observed, physics = (torch.cat(x) for x in zip(*arrays, strict=True))
    return thickness, observed, physics


def _part(stack: KrigingStack, entries: int, draw: torch.Generator) -> KrigingStack:
    """Some traces of a stack: a window, and as many spread over all."""
    traces, layers = stack.observed.shape
    half = max(1, entries // layers // 2)
    if traces > 2 * half:
        first = int(torch.randint(traces - half + 1, (), generator=draw))
        spread = torch.linspace(0, traces - 1, half).long()
        chosen = torch.zeros(traces, dtype=torch.bool)
        chosen[first : first + half] = chosen[spread] = True
        stack = stack.take(chosen)
    return stack._replace(
        thickness=stack.thickness.double(),
        physics=stack.physics.double(),
        distance=stack.distance.double(),
    )


def _clipped(items: Sequence[_Item]) -> list[_Item]:
    """Deviations from the drift, no larger than 7 robust standard deviations."""
    drifts = [item.spans.sum(item.known.drift[item.spans.entries]) for item in items]
    units = [item.spans.sum(item.known.unit[item.spans.entries]) for item in items]
    relative = [
        (item.spans.value - drift) / unit
        for item, drift, unit in zip(items, drifts, units, strict=True)
    ]
    limit = max(7 * 1.4826 * float(torch.cat(relative).abs().median()), 1e-3) if items else 1.0
    return [
        item._replace(spans=item.spans._replace(value=drift + r.clamp(-limit, limit) * unit))
        for item, drift, unit, r in zip(items, drifts, units, relative, strict=True)
    ]


def _solve(theta: Tensor, tables: _Tables, spans: _Spans) -> tuple[Tensor, Tensor]:
    """What the drift leaves of observed spans, and the factor of their covariance."""
    rest = spans.value - spans.sum(tables.drift[spans.entries])
    return rest, _factor(_observations(theta, tables, spans))


def _contradiction(rest: Tensor, factor: Tensor) -> Tensor:
    """Deviation of each pick from what all others say [standard deviations]. Shape: (n,)."""
    inverse = torch.cholesky_inverse(factor)
    return (inverse @ rest).abs() / inverse.diagonal().sqrt()


def _without_outliers(item: _Item, theta: Tensor, outlier: float) -> _Item:
    """An item without the picks that its others contradict."""
    rest, factor = _solve(theta, _tables(theta, item.known), item.spans)
    return item._replace(spans=item.spans.take(_contradiction(rest, factor) <= outlier))


def _negative_log_likelihood(theta: Tensor, items: Sequence[_Item]) -> Tensor:
    """Of all items' picks, without constants. Shape: ()."""
    total = theta.new_zeros(())
    for item in items:
        rest, factor = _solve(theta, _tables(theta, item.known), item.spans)
        white = torch.linalg.solve_triangular(factor, rest[:, None], upper=False)
        total = total + 0.5 * white.square().sum() + factor.diagonal().log().sum()
    return total


def _maximise(theta: Tensor, start: Tensor, items: Sequence[_Item], iterations: int) -> Tensor:
    """Maximum of the posterior: the prior is wide for parameters and narrow for slopes.

    Without it the slopes on fields that vary together run away when stacks are few.
    """
    count = max(1, sum(len(item.spans.trace) for item in items))
    width = torch.full_like(start, _SLOPE_PRIOR)
    width[: len(_START)] = _PRIOR
    with torch.inference_mode(False), torch.enable_grad():
        theta = theta.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [theta], max_iter=iterations, history_size=10, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            prior = 0.5 * ((theta - start) / width).square().sum()
            loss = (_negative_log_likelihood(theta, items) + prior) / count
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call]
    found = theta.detach()
    if not bool(found.isfinite().all()):
        warnings.warn(
            "The likelihood of kriging has no maximum on these training stacks: its covariance "
            "stays as it begins.",
            stacklevel=2,
        )
        return start
    return found
