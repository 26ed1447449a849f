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

Packages for kriging know neither components over layers, nor shared noise, nor likelihood over
many stacks; so this one is written out. Where they agree it is tested against scikit-learn.

Axes: N traces, L layers, P physical fields, n observed entries, T entries asked for.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fulgurite.errors import CheckpointError, DataError
from fulgurite.models.ice_layers.baselines import Ridge, fit_ridge
from fulgurite.models.ice_layers.graph import Track
from fulgurite.models.ice_layers.hiding import held_out
from fulgurite.models.ice_layers.uncertainty import Z90

__all__ = ["Drift", "Kriging", "KrigingStack", "fit_kriging"]

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
_CHUNK = 2**23  # elements of a cross-covariance that is held at once


class KrigingStack(NamedTuple):
    """What kriging sees of a stack.

    Args:
        thickness: [m]. Shape: (N, L).
        observed: Shape: (N, L), bool.
        physics: Shape: (N, L, P).
        distance: Along the track [m]. Shape: (N,).
    """

    thickness: Tensor
    observed: Tensor
    physics: Tensor
    distance: Tensor


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
        >>> kriging = fit_kriging([KrigingStack(h, seen, physics, at)] * 2, iterations=10)
        >>> mean, std = kriging(h.where(seen, torch.nan), seen, physics, at)
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
        thickness: Tensor,
        observed: Tensor,
        physics: Tensor,
        distance: Tensor,
        where: Tensor | None = None,
        outlier: float = 4.0,
    ) -> tuple[Tensor, Tensor]:
        """Predict the thickness without the noise of picks, and its standard deviation.

        Args:
            thickness: [m]. Shape: (N, L).
            observed: Shape: (N, L), bool.
            physics: Shape: (N, L, P).
            distance: Along the track [m]. Shape: (N,).
            where: Entries that are asked for; the others are NaN. All by default. Shape: (N, L).
            outlier: Standard deviations from what all other picks say, beyond which a pick is
                left out; infinite keeps all.

        Shape: to (N, L) and (N, L), float64.
        """
        stack = KrigingStack(thickness.double(), observed, physics, distance.double())
        theta = self.parameters
        tables = _tables(theta, _geometry(self.drift, stack))
        kept, score = observed, None
        place, rest, factor = _solve(theta, tables, stack.thickness, kept)
        for limit in (outlier + 1, outlier):  # the worst first: they distort the others
            if math.isinf(limit):
                break
            if score is None:
                score = _contradiction(rest, factor)
            if bool((score > limit).any()):
                kept = kept.clone()
                kept[place] = score <= limit
                place, rest, factor = _solve(theta, tables, stack.thickness, kept)
                score = None
        asked = torch.ones_like(observed) if where is None else where
        mean, std = _predict(theta, tables, asked, place, rest, factor)
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
    standard = (stack.physics.to(drift.mean) - drift.mean[:fields]) / drift.std[:fields]
    depth = torch.linspace(-1, 1, layers, dtype=trend.dtype).expand(len(trend), -1)
    number = torch.arange(layers)
    return _Geometry(
        drift=trend,
        unit=trend.clamp_min(_THINNEST),
        features=torch.cat([standard.clamp(-3, 3), depth[..., None]], -1),
        apart=(stack.distance[:, None] - stack.distance).abs() + 1e-9,  # 0^nu has no slope
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


_Place = tuple[Tensor, ...]


def _signal(tables: _Tables, left: _Place, right: _Place) -> Tensor:
    """Covariance between entries without the noise of picks. Shape: (T, n)."""
    (i, k), (j, m) = left, right
    same = k[:, None] == m
    detail = tables.persistent[i][:, j] + torch.where(same, tables.yearly[i][:, j], 0.0)
    return (
        tables.level[i, k][:, None] * tables.level[j, m] * tables.layers[k][:, m]
        + tables.detail[i, k][:, None] * tables.detail[j, m] * detail
    )


def _observations(theta: Tensor, tables: _Tables, place: _Place) -> Tensor:
    """Covariance of picks, with their noise. Shape: (n, n)."""
    named = _named(theta)
    i, k = place
    same_trace = i[:, None] == i
    lag = (k[:, None] - k).abs()
    shared = named["e"] ** 2 * (2.0 * (lag == 0) - 1.0 * (lag == 1))
    noise = torch.where(same_trace, shared + named["n"] ** 2 * (lag == 0), 0.0)
    return _signal(tables, place, place) + noise


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
    theta: Tensor, tables: _Tables, asked: Tensor, place: _Place, rest: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """Best linear prediction and its standard deviation. Shape: (N, L) each."""
    mean = torch.full(asked.shape, torch.nan, dtype=torch.float64)
    std = mean.clone()
    variance = (
        tables.level.square() * tables.layers.diagonal()
        + tables.detail.square() * (tables.persistent + tables.yearly).diagonal()[:, None]
    )
    white = torch.linalg.solve_triangular(factor, rest[:, None], upper=False)
    targets = asked.nonzero()
    for part in torch.split(targets, max(1, _CHUNK // max(1, len(rest)))):
        to = part.unbind(1)
        cross = torch.linalg.solve_triangular(factor, _signal(tables, place, to), upper=False)
        mean[to] = tables.drift[to] + (cross.T @ white)[:, 0]
        # rounding may leave less than nothing beside a pick
        left = (variance[to] - cross.square().sum(0)).clamp_min(1e-8)
        std[to] = left.sqrt()
    return mean, std


# --- fitting -----------------------------------------------------------------------------------


class _Item(NamedTuple):
    """A part of a training stack: its picks, and what is known of it."""

    thickness: Tensor
    observed: Tensor
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
) -> Kriging:
    """Fit the drift on all stacks and the covariance on some of them.

    Drifts are compared on groups that they were not fitted on, and the covariance is that of such
    deviations: those from a drift that knows the stack are too small. The likelihood is maximised
    by L-BFGS twice: with deviations clipped, then without the picks that all others of their stack
    contradict.

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
    chosen_drift, others = _choose_drift(stacks, numbers, options)
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(stacks), generator=draw)[:fit_stacks].tolist()
    parts = [(_part(stacks[k], fit_entries, draw), others[k]) for k in chosen]
    items = [
        _Item(s.thickness, s.observed, _geometry(other, s))
        for s, other in parts
        if s.observed.any()
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
    stacks: Sequence[KrigingStack], groups: Sequence[int], drifts: Sequence[Mapping[str, Any]]
) -> tuple[Ridge, list[Ridge]]:
    """The drift that does best on groups it has not seen; and one for each stack without its group.

    Mean absolute errors are compared: mis-tracked picks do not decide.
    """
    thin = thinned(stacks)
    numbers = {group: k for k, group in enumerate(dict.fromkeys(groups))}
    folds = [numbers[group] % _FOLDS for group in groups]

    def fitted(rows: Sequence[int], options: Mapping[str, Any]) -> Ridge:
        return fit_ridge(*_joined([thin[k] for k in rows]), **options)

    everything = range(len(stacks))
    if len(numbers) < 2:  # nothing to compare on
        drift = fitted(everything, drifts[0])
        return drift, [drift] * len(stacks)
    best: tuple[float, Mapping[str, Any], dict[int, Ridge]] | None = None
    for options in drifts:
        without = {
            fold: fitted([k for k in everything if folds[k] != fold], options)
            for fold in sorted(set(folds))
        }
        errors = [
            (without[fold](s.physics) - s.thickness)[s.observed].abs()
            for fold, s in zip(folds, thin, strict=True)
        ]
        error = float(torch.cat(errors).mean())
        if best is None or error < best[0]:
            best = error, options, without
    assert best is not None
    _, options, without = best
    return fitted(everything, options), [without[fold] for fold in folds]


def _calibrated(krigings: Sequence[tuple[Kriging, KrigingStack]]) -> Tensor:
    """Factor with which 90 % intervals cover 90 % of held-out picks. Shape: ().

    The error that picks have themselves is part of the interval, and is not scaled.
    """
    ratios = []
    for number, (kriging, stack) in enumerate(krigings):
        track = Track.of([len(stack.observed)])
        hidden = held_out(stack.observed, track, torch.tensor([number]))
        shown = stack.observed & ~hidden
        mean, std = kriging(stack.thickness, shown, stack.physics, stack.distance, hidden)
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
    return [KrigingStack(*(x[::step] for x in s)) for s in stacks] if step > 1 else list(stacks)


def _joined(stacks: Sequence[KrigingStack]) -> tuple[Tensor, Tensor, Tensor]:
    """Thickness, observed and physics of all traces."""
    thickness, observed, physics, _ = (torch.cat(x) for x in zip(*stacks, strict=True))
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
        stack = KrigingStack(*(x[chosen] for x in stack))
    return KrigingStack(*(x.double() if x.is_floating_point() else x for x in stack))


def _clipped(items: Sequence[_Item]) -> list[_Item]:
    """Deviations from the drift, no larger than 7 robust standard deviations."""
    relative = [(i.thickness - i.known.drift) / i.known.unit for i in items]
    seen = [r[item.observed] for r, item in zip(relative, items, strict=True)]
    limit = max(7 * 1.4826 * float(torch.cat(seen).abs().median()), 1e-3) if seen else 1.0
    return [
        i._replace(thickness=i.known.drift + r.clamp(-limit, limit) * i.known.unit)
        for i, r in zip(items, relative, strict=True)
    ]


def _solve(
    theta: Tensor, tables: _Tables, thickness: Tensor, observed: Tensor
) -> tuple[_Place, Tensor, Tensor]:
    """Observed entries, what the drift leaves of them, and the factor of their covariance."""
    place = observed.nonzero(as_tuple=True)
    rest = thickness[place] - tables.drift[place]
    return place, rest, _factor(_observations(theta, tables, place))


def _contradiction(rest: Tensor, factor: Tensor) -> Tensor:
    """Deviation of each pick from what all others say [standard deviations]. Shape: (n,)."""
    inverse = torch.cholesky_inverse(factor)
    return (inverse @ rest).abs() / inverse.diagonal().sqrt()


def _without_outliers(item: _Item, theta: Tensor, outlier: float) -> _Item:
    """An item without the picks that its others contradict."""
    tables = _tables(theta, item.known)
    place, rest, factor = _solve(theta, tables, item.thickness, item.observed)
    kept = item.observed.clone()
    kept[place] = _contradiction(rest, factor) <= outlier
    return item._replace(observed=kept)


def _negative_log_likelihood(theta: Tensor, items: Sequence[_Item]) -> Tensor:
    """Of all items' picks, without constants. Shape: ()."""
    total = theta.new_zeros(())
    for item in items:
        tables = _tables(theta, item.known)
        _, rest, factor = _solve(theta, tables, item.thickness, item.observed)
        white = torch.linalg.solve_triangular(factor, rest[:, None], upper=False)
        total = total + 0.5 * white.square().sum() + factor.diagonal().log().sum()
    return total


def _maximise(theta: Tensor, start: Tensor, items: Sequence[_Item], iterations: int) -> Tensor:
    """Maximum of the posterior: the prior is wide for parameters and narrow for slopes.

    Without it the slopes on fields that vary together run away when stacks are few.
    """
    count = max(1, sum(int(item.observed.sum()) for item in items))
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
