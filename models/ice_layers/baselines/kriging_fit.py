"""Fitting kriging: its drift, its covariance by maximum likelihood, and the scale of intervals.

Axes: N traces, L layers, P physical fields, n observed spans.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fulgurite.errors import DataError
from fulgurite.models.ice_layers.baselines.covariance import (
    START,
    Geometry,
    KrigingStack,
    ObservedSpans,
    initial_parameters,
    join_stacks,
    make_tables,
    measure_geometry,
    name_parameters,
    score_contradiction,
    solve,
    thin_stacks,
)
from fulgurite.models.ice_layers.baselines.interpolation import Ridge, fit_ridge
from fulgurite.models.ice_layers.baselines.kriging import Kriging
from fulgurite.models.ice_layers.baselines.options import Drift, KrigingFitOptions
from fulgurite.models.ice_layers.data.graph import Track
from fulgurite.models.ice_layers.data.hiding import held_out
from fulgurite.models.ice_layers.training.uncertainty import Z90

__all__ = ["DRIFTS", "choose_drift", "fit_kriging"]

_PRIOR, _SLOPE_PRIOR = 1.5, 0.3  # standard deviations of logarithms; of their slopes on a field
_FOLDS = 5
_JUDGED = 4  # times the entries of a fit: of those that intervals are judged on
# Drifts to choose from: a product of accumulation and compaction is additive in logarithms, which
# take more data to know
DRIFTS: tuple[Mapping[str, Any], ...] = tuple(
    {"log": log, "penalty": penalty} for log in (True, False) for penalty in (1e-3, 1e-2, 1e-1)
)


class _FitStack(NamedTuple):
    """A part of a training stack: its observed spans, and its geometry."""

    spans: ObservedSpans
    geometry: Geometry


def fit_kriging(
    stacks: Sequence[KrigingStack],
    groups: Sequence[int] | None = None,
    *,
    fit: KrigingFitOptions = KrigingFitOptions(),
    outlier: float = 4.0,
    drift: Drift = "auto",
    validation: Sequence[KrigingStack] = (),
) -> Kriging:
    """Fit the drift on all stacks and the covariance on some of them.

    Drifts are compared on ``validation``, else on groups that they were not fitted on, and the
    covariance is that of such deviations: those from a drift that knows the stack are too small.
    The likelihood is maximised by L-BFGS twice: with deviations clipped, then without the picks
    that all others of their stack contradict.

    Args:
        stacks: Training stacks.
        groups: A number for each stack: those of one flight segment resemble each other. By
            default each is a group of its own.
        fit: Stacks that the covariance is fitted on, entries of each, and iterations.
        outlier: Standard deviations from what all other picks say, beyond which one is left out.
        drift: Regression of thickness (``linear``), of its logarithm (``log``), or the better
            one of both (``auto``).
        validation: Stacks of other flights, on which drifts are compared: how a regression goes
            beyond the years and places that it was fitted on does not show in training.

    Raises:
        DataError: There is no stack, or nothing is observed.
    """
    if not stacks:
        raise DataError(
            "There is no training stack to fit kriging on.",
            "Check `data.init_args.source` and `split`.",
        )
    numbers = range(len(stacks)) if groups is None else groups
    drifts = [o for o in DRIFTS if drift == "auto" or o["log"] == (drift == "log")]
    chosen_drift, others = choose_drift(stacks, numbers, drifts, validation)
    draw = torch.Generator().manual_seed(fit.seed)
    indices = torch.randperm(len(stacks), generator=draw)[: fit.stacks].tolist()
    parts = [(_sample_traces(stacks[k], fit.entries, draw), others[k]) for k in indices]
    items = [
        _FitStack(ObservedSpans.of(s.measured), measure_geometry(other, s))
        for s, other in parts
        if s.observed.any()
    ]
    start = initial_parameters(stacks[0].physics.shape[-1])
    theta = _maximise(start, start, _clip_deviations(items), fit.iterations)
    trusted = [_drop_outliers(item, theta, outlier) for item in items]
    theta = _maximise(theta, start, trusted, fit.iterations // 2)
    # not all of a large stack, which would take longer than the fit
    judged = [_sample_traces(stacks[k], _JUDGED * fit.entries, draw) for k in indices]
    krigings = [Kriging(others[k], theta, theta.new_ones(())) for k in indices]
    return Kriging(chosen_drift, theta, _fit_interval_scale(theta, krigings, judged))


def choose_drift(
    stacks: Sequence[KrigingStack],
    groups: Sequence[int],
    drifts: Sequence[Mapping[str, Any]],
    validation: Sequence[KrigingStack],
) -> tuple[Ridge, list[Ridge]]:
    """The drift that does best on unseen flights; and one for each stack without its group.

    Mean absolute errors are compared: mis-tracked picks do not decide.
    """
    thin = thin_stacks(stacks)
    numbers = {group: k for k, group in enumerate(dict.fromkeys(groups))}
    folds = [numbers[group] % _FOLDS for group in groups]
    judged = [stack for stack in thin_stacks(validation) if stack.observed.any()]

    def fit(rows: Iterable[int], options: Mapping[str, Any]) -> Ridge:
        return fit_ridge(*join_stacks([thin[k] for k in rows]), **options)

    def fit_without_each_fold(options: Mapping[str, Any]) -> dict[int, Ridge]:
        if len(numbers) < 2:  # nothing to compare on
            return {0: fit(range(len(stacks)), options)}
        return {
            fold: fit([k for k in range(len(stacks)) if folds[k] != fold], options)
            for fold in sorted(set(folds))
        }

    def error(options: Mapping[str, Any]) -> float:
        if judged:
            drift = fit(range(len(stacks)), options)
            pairs = [(drift, stack) for stack in judged]
        else:
            without = fit_without_each_fold(options)
            pairs = [(without[fold], stack) for fold, stack in zip(folds, thin, strict=True)]
        errors = [(ridge(s.physics) - s.thickness)[s.observed].abs() for ridge, s in pairs]
        return float(torch.cat(errors).mean())

    if len(drifts) == 1 or not (judged or len(numbers) > 1):
        options = drifts[0]
    else:
        options = min(drifts, key=error)
    without = fit_without_each_fold(options)
    best = without[0] if len(numbers) < 2 else fit(range(len(stacks)), options)
    return best, [without[fold] for fold in folds]


def _fit_interval_scale(
    theta: Tensor, krigings: Sequence[Kriging], stacks: Sequence[KrigingStack]
) -> Tensor:
    """Factor with which 90 % intervals cover 90 % of held-out picks. Shape: ().

    The error that picks have themselves is part of the interval, and is not scaled. Of a layer
    between two seen picks, these have a part of it in common with what is predicted: of n layers
    that share a sum, about 1/n of the noise of both. Intervals are only ever widened: where the
    noise explains all that is left of held-out picks, these say nothing of the rest.
    """
    noise = name_parameters(theta)
    ratios = []
    for number, (kriging, stack) in enumerate(zip(krigings, stacks, strict=True)):
        track, spans = Track.of([len(stack.observed)]), stack.measured
        visible_spans = spans.hide(held_out(spans.picked, track, torch.tensor([number])))
        hidden = stack.observed & ~visible_spans.observed
        mean, std = kriging(stack.show(visible_spans), hidden)
        error, std = (stack.thickness - mean)[hidden], std[hidden]
        # the factor at which this pick lies on the edge of its interval; 0 if it always is inside
        length = visible_spans.length.where(visible_spans.between, torch.inf)[hidden]
        of_pick = noise["n"] ** 2 + 2 * noise["e"] ** 2 * (1 - 1 / length)
        beyond = (error / Z90).square() - of_pick
        ratios.append(beyond.clamp_min(0).sqrt() / std)
    factors = torch.cat(ratios)
    return factors.quantile(0.9).clamp(1.0, 2.0) if len(factors) else factors.new_ones(())


def _sample_traces(stack: KrigingStack, entries: int, draw: torch.Generator) -> KrigingStack:
    """Some traces of a stack: a window, and as many evenly over all."""
    traces, layers = stack.observed.shape
    half = max(1, entries // layers // 2)
    if traces > 2 * half:
        first = int(torch.randint(traces - half + 1, (), generator=draw))
        evenly = torch.linspace(0, traces - 1, half).long()
        rows = torch.zeros(traces, dtype=torch.bool)
        rows[first : first + half] = rows[evenly] = True
        stack = stack.take(rows)
    return stack._replace(
        thickness=stack.thickness.double(),
        physics=stack.physics.double(),
        distance=stack.distance.double(),
    )


def _clip_deviations(items: Sequence[_FitStack]) -> list[_FitStack]:
    """Deviations from the drift, no larger than 7 robust standard deviations."""
    drifts = [item.spans.sum(item.geometry.drift[item.spans.entries]) for item in items]
    units = [item.spans.sum(item.geometry.unit[item.spans.entries]) for item in items]
    relative = [
        (item.spans.value - drift) / unit
        for item, drift, unit in zip(items, drifts, units, strict=True)
    ]
    limit = max(7 * 1.4826 * float(torch.cat(relative).abs().median()), 1e-3) if items else 1.0
    return [
        item._replace(spans=item.spans._replace(value=drift + r.clamp(-limit, limit) * unit))
        for item, drift, unit, r in zip(items, drifts, units, relative, strict=True)
    ]


def _drop_outliers(item: _FitStack, theta: Tensor, outlier: float) -> _FitStack:
    """Return a stack without the picks that all others contradict."""
    residual, factor = solve(theta, make_tables(theta, item.geometry), item.spans)
    return item._replace(spans=item.spans.take(score_contradiction(residual, factor) <= outlier))


def _negative_log_likelihood(theta: Tensor, items: Sequence[_FitStack]) -> Tensor:
    """Negative log likelihood of all stacks' picks, without constants. Shape: ()."""
    total = theta.new_zeros(())
    for item in items:
        residual, factor = solve(theta, make_tables(theta, item.geometry), item.spans)
        white = torch.linalg.solve_triangular(factor, residual[:, None], upper=False)
        total = total + 0.5 * white.square().sum() + factor.diagonal().log().sum()
    return total


def _maximise(theta: Tensor, start: Tensor, items: Sequence[_FitStack], iterations: int) -> Tensor:
    """Maximum of the posterior: the prior is wide for parameters and narrow for slopes.

    Without it the slopes on fields that vary together run away when stacks are few.
    """
    count = max(1, sum(len(item.spans.trace) for item in items))
    width = torch.full_like(start, _SLOPE_PRIOR)
    width[: len(START)] = _PRIOR
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
    maximum = theta.detach()
    if not bool(maximum.isfinite().all()):
        warnings.warn(
            "The likelihood of kriging has no maximum on these training stacks: its covariance "
            "stays as it begins.",
            stacklevel=2,
        )
        return start
    return maximum
