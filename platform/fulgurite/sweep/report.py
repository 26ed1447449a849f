"""What a sweep leaves: a table of its trials, figures, and the best configuration."""

from __future__ import annotations

import csv
import io
import shlex
import warnings
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from fulgurite import plotting
from fulgurite.io import write_text
from fulgurite.sweep.space import Categorical, Constant, Sweep
from fulgurite.sweep.study import (
    ERROR,
    METRICS,
    RUN_DIR,
    SECONDS,
    VALUES,
    as_choice,
    counted_trials,
    distribution_of_values,
)

__all__ = ["render", "write_best"]

_FIGURES = {
    "history.png": "plot_optimization_history",
    "importances.png": "plot_param_importances",
    "slices.png": "plot_slice",
}


def render(study: optuna.Study, sweep: Sweep, folder: Path) -> None:
    """Write ``trials.csv``, ``trials.md`` and the figures from what the study holds."""
    trials = counted_trials(study)
    if not trials:
        return
    write_text(folder / "trials.csv", _csv(trials, sweep))
    write_text(folder / "trials.md", _markdown(trials, sweep))
    _draw(trials, sweep, study, folder)


def write_best(study: optuna.Study, sweep: Sweep, folder: Path) -> None:
    """Write ``best.yaml``, which ``fulgurite fit --config`` takes, and say what is best."""
    best = _best(study, sweep)
    if best is None:
        return
    config = Path(best.user_attrs[RUN_DIR]) / "config.yaml"
    if not config.is_file():
        print(f"The best trial, {best.number}, lies on another machine: {config}")
        return
    content = yaml.safe_load(config.read_text(encoding="utf-8"))
    content.pop("run", None)  # a run of its own, with a name of its own
    content.pop("ckpt_path", None)
    callbacks = (content.get("trainer") or {}).get("callbacks")
    if isinstance(callbacks, list):
        content["trainer"]["callbacks"] = [
            callback
            for callback in callbacks
            if not str(callback.get("class_path", "")).endswith(".TrialReporter")
        ] or None
    path = folder / "best.yaml"
    write_text(path, yaml.safe_dump(content, sort_keys=False))
    print(f"Best: trial {best.number}, {sweep.metric} {best.value:.5g}")
    print(shlex.join(["fulgurite", "fit", "--config", str(path)]))


def _best(study: optuna.Study, sweep: Sweep) -> FrozenTrial | None:
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not done or sweep.metric is None:
        return None
    return (max if sweep.maximize else min)(done, key=lambda t: (t.value, -t.number))


def _columns(sweep: Sweep) -> list[str]:
    return [name for name, p in sweep.parameters.items() if not isinstance(p, Constant)]


def _csv(trials: list[FrozenTrial], sweep: Sweep) -> str:
    names = _columns(sweep)
    metrics = sorted({m for t in trials for m in t.user_attrs.get(METRICS, {})})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", "state", "seconds", *names, *metrics, "error", "run"])
    for trial in trials:
        attributes = trial.user_attrs
        values, recorded = attributes.get(VALUES, {}), attributes.get(METRICS, {})
        writer.writerow(
            [
                trial.number,
                trial.state.name.lower(),
                attributes.get(SECONDS, ""),
                *(values.get(name, "") for name in names),
                *(recorded.get(metric, "") for metric in metrics),
                attributes.get(ERROR, ""),
                attributes.get(RUN_DIR, ""),
            ]
        )
    return text.getvalue()


def _markdown(trials: list[FrozenTrial], sweep: Sweep) -> str:
    """The trials, the best first; those that failed or were ended last."""
    names = _columns(sweep)
    sign = -1 if sweep.maximize else 1

    def rank(trial: FrozenTrial) -> tuple[bool, float, int]:
        complete = trial.state == TrialState.COMPLETE
        return not complete, sign * (trial.value or 0.0) if complete else 0.0, trial.number

    metric = sweep.metric or "value"
    lines = [f"| trial | {metric} | {' | '.join(names)} | state | seconds |"]
    lines.append("|---|---:|" + "---|" * len(names) + "---|---:|")
    for trial in sorted(trials, key=rank):
        values = trial.user_attrs.get(VALUES, {})
        value = "" if trial.value is None or sweep.metric is None else f"{trial.value:.5g}"
        settings = " | ".join(_short(values.get(name, "")) for name in names)
        seconds = trial.user_attrs.get(SECONDS, "")
        state = trial.state.name.lower()
        lines.append(f"| {trial.number} | {value} | {settings} | {state} | {seconds} |")
    return "\n".join(lines) + "\n"


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def _draw(trials: list[FrozenTrial], sweep: Sweep, study: optuna.Study, folder: Path) -> None:
    """Optuna's figures of a study that has the values themselves."""
    readable = _make_readable_study(trials, sweep, study)
    if readable is None:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter
    from optuna.visualization import matplotlib as plots

    for file, function in _FIGURES.items():
        if file != "history.png" and len(readable.trials) < 3:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            try:
                drawn = getattr(plots, function)(readable)
            except (ValueError, RuntimeError):  # importances of values that are all the same
                continue
        axes = [drawn] if hasattr(drawn, "figure") else [*drawn.flat]
        figure = axes[0].figure
        figure.set_size_inches(max(6, 3 * len(axes)), 4)
        figure.set_layout_engine("constrained")
        for plot in axes:  # else ticks of a narrow logarithmic axis lie upon each other
            plot.xaxis.set_minor_formatter(NullFormatter())
        plotting.save_figure(figure, folder / file)
        pyplot.close(figure)


def _make_readable_study(
    trials: list[FrozenTrial], sweep: Sweep, study: optuna.Study
) -> optuna.Study | None:
    """The finished trials with the values of parameters instead of quantiles and indices."""
    done = [t for t in trials if t.state == TrialState.COMPLETE]
    if not done or sweep.metric is None:
        return None
    readable = optuna.create_study(direction=study.direction)
    distributions: dict[str, BaseDistribution] = {}
    short = _short_names(_columns(sweep))
    for name in short:
        parameter = sweep.parameters[name]
        values = [t.user_attrs[VALUES][name] for t in done]
        if not isinstance(parameter, Constant) and len(set(map(str, values))) > 1:
            choices = sweep.method == "grid" and not isinstance(parameter, Categorical)
            distributions[short[name]] = distribution_of_values(
                Categorical(tuple(sweep.grid_values[name])) if choices else parameter, values
            )
    for trial in done:
        params = {}
        for name, short_name in short.items():
            if short_name in distributions:
                params[short_name] = as_choice(trial.user_attrs[VALUES][name])
        readable.add_trial(
            optuna.trial.create_trial(params=params, distributions=distributions, value=trial.value)
        )
    return readable


def _short_names(names: list[str]) -> dict[str, str]:
    """The last words of options, as many as tell them apart.

    >>> _short_names(["model.init_args.lr", "data.noise.rate", "data.rate"])
    {'model.init_args.lr': 'lr', 'data.noise.rate': 'noise.rate', 'data.rate': 'data.rate'}
    """
    short = {}
    for name in names:
        words = name.split(".")
        tails = [".".join(words[-count:]) for count in range(1, len(words) + 1)]
        short[name] = next(
            (t for t in tails if sum(f".{n}".endswith(f".{t}") for n in names) == 1), name
        )
    return short
