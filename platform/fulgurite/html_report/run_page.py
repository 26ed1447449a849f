"""A page about one run, or several beside each other."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fulgurite.compare.run_config import name_run, read_run_config
from fulgurite.errors import ConfigError
from fulgurite.html_report.charts import line_chart
from fulgurite.html_report.page import (
    Cell,
    Chart,
    Page,
    Section,
    Table,
    embed_image,
    texts_of_files,
)
from fulgurite.run_folders.metrics import STAGES, rank_stage, read_metric_rows, read_metrics

__all__ = ["RunRecords", "describe_runs"]

_EVALUATIONS = ("validate", "test")


@dataclass(frozen=True)
class RunRecords:
    """What a run folder holds.

    Args:
        folder: The folder.
        label: What the run is called beside others.
    """

    folder: Path
    label: str

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The resolved configuration.

        Raises:
            ConfigError: The file is damaged, or is something else.
        """
        return read_run_config(self.folder)

    @cached_property
    def environment(self) -> Mapping[str, Any]:
        """Versions, devices, seed and command line; empty where they are not recorded.

        Raises:
            ConfigError: The file is damaged.
        """
        path = self.folder / "environment.json"
        if not path.is_file():
            return {}
        try:
            environment = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is damaged ({error}).", "Remove it.") from error
        return environment if isinstance(environment, dict) else {}

    @cached_property
    def metrics(self) -> Mapping[str, float]:
        """The last metrics, those of evaluations over those of training."""
        metrics = read_metrics(self.folder)
        for command in _EVALUATIONS:
            metrics.update(read_metrics(self.folder / command))
        return metrics

    @cached_property
    def _logged(self) -> Sequence[Mapping[str, str]]:
        path = self.folder / "metrics.csv"
        if not path.is_file():
            return []
        try:
            return read_metric_rows(path)
        except (ValueError, csv.Error) as error:
            raise ConfigError(f"{path} holds no table of metrics ({error}).") from error

    @cached_property
    def axis(self) -> str:
        """What the curves are drawn against: epochs, or steps where there are few epochs."""
        return "epoch" if len({row.get("epoch") for row in self._logged}) > 2 else "step"

    def curves(self, axis: str) -> Mapping[str, Sequence[tuple[float, float]]]:
        """Points (epoch or step, value) by metric.

        Args:
            axis: ``epoch`` or ``step``.

        Raises:
            ConfigError: The file is damaged.
        """
        curves: dict[str, list[tuple[float, float]]] = {}
        try:
            for row in self._logged:
                position = row.get(axis)
                for name, value in row.items():
                    if name and name not in ("epoch", "step") and value and position:
                        curves.setdefault(name, []).append((float(position), float(value)))
        except (TypeError, ValueError) as error:
            path = self.folder / "metrics.csv"
            raise ConfigError(f"{path} holds no table of metrics ({error}).") from error
        return curves

    @property
    def name(self) -> str:
        """System and name of the run, or its folder's."""
        return name_run(self.config, self.folder)


def describe_runs(folders: Sequence[Path]) -> Page:
    """A page with metrics, curves, figures, configuration and environment of runs.

    Args:
        folders: Run folders.

    Raises:
        ConfigError: A folder holds no run, or a record of it is damaged.
    """
    for folder in folders:
        if not (folder / "config.yaml").is_file():
            raise ConfigError(
                f"{folder} holds no run (config.yaml is not there).",
                "Name a folder that `fulgurite fit` printed.",
            )
    labels = _labels(folders)
    runs = [RunRecords(f, label) for f, label in zip(folders, labels, strict=True)]
    first = runs[0]
    title = (
        first.name
        if len(runs) == 1
        else f"{len(runs)} runs: " + ", ".join(dict.fromkeys(run.name for run in runs))
    )
    return Page(
        title,
        _subtitle(first) if len(runs) == 1 else "Colours tell the runs apart.",
        [
            _metrics(runs),
            *(_figures(run, several=len(runs) > 1) for run in runs),
            _curves(runs),
            _differences(runs),
            _configurations(runs),
            _environments(runs),
        ],
    )


def _labels(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(p[-count:]) for p in parts]
        if len(set(labels)) == len(labels):
            return labels
    raise ConfigError("A run is named twice.", "Name each folder once.")


def _subtitle(run: RunRecords) -> str:
    environment = run.environment
    facts = [str(run.folder), str(environment.get("time", ""))]
    if environment.get("seed") is not None:
        facts.append(f"seed {environment['seed']}")
    versions = environment.get("versions") or {}
    if isinstance(versions, dict) and "fulgurite" in versions:
        facts.append(f"fulgurite {versions['fulgurite']}, torch {versions.get('torch', '?')}")
    return " · ".join(fact for fact in facts if fact)


def _rank(metric: str) -> tuple[int, str]:
    return rank_stage(metric), metric


def _metrics(runs: Sequence[RunRecords]) -> Section:
    names = sorted({name for run in runs for name in run.metrics}, key=_rank)
    heads = ["metric", *(("value",) if len(runs) == 1 else (run.label for run in runs))]
    rows = [
        [Cell(name), *(Cell.of_number(run.metrics.get(name)) for run in runs)] for name in names
    ]
    notes = [] if names else ["No metric is recorded: the run has not ended, or logs none."]
    return Section("Metrics", notes, tables=[Table(heads, rows)] if rows else [])


def _curves(runs: Sequence[RunRecords]) -> Section:
    """A chart for each metric: of one run its stages together, of several one line each."""
    charts: dict[str, dict[str, Sequence[tuple[float, float]]]] = {}
    # one axis for all: epochs of one run beside steps of another would say nothing
    axis = "step" if any(run.axis == "step" for run in runs) else "epoch"
    for run in runs:
        curves = run.curves(axis)
        for name in sorted(curves, key=_rank):
            stage, _, tail = name.partition("/")
            if len(runs) > 1:
                empty: dict[str, Sequence[tuple[float, float]]] = {r.label: [] for r in runs}
                charts.setdefault(name, empty)[run.label] = curves[name]
            else:
                title = tail if stage in STAGES else name
                charts.setdefault(title, {})[name] = curves[name]
    drawn = [
        Chart(
            title if len(runs) > 1 or len(series) > 1 else next(iter(series)),
            line_chart(series, axis, title),
            list(series) if len(runs) == 1 and len(series) > 1 else (),
        )
        for title, series in charts.items()
        if any(len({y for _, y in points}) > 1 for points in series.values())
    ]
    legend = [run.label for run in runs] if len(runs) > 1 and drawn else ()
    return Section("Curves", legend=legend, charts=drawn)


def _figures(run: RunRecords, *, several: bool) -> Section:
    figures = sorted(run.folder.glob("figures/**/*.png"))
    figures += sorted(p for c in _EVALUATIONS for p in run.folder.glob(f"{c}/figures/**/*.png"))
    images = [
        embed_image(path, path.relative_to(run.folder).with_suffix("").as_posix())
        for path in figures
        if path.is_file()
    ]
    return Section(f"Figures of {run.label}" if several else "Figures", images=images)


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Options by their dotted names, with their values as they are written."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, json.dumps(value, default=str)


def _differences(runs: Sequence[RunRecords]) -> Section:
    if len(runs) == 1:
        return Section("Differences")
    options = [dict(_flatten(run.config)) for run in runs]
    names = list(dict.fromkeys(name for run_options in options for name in run_options))
    differing = [
        name for name in names if len({run_options.get(name) for run_options in options}) > 1
    ]
    rows = [
        [
            Cell(name, wide=True),
            *(Cell(run_options.get(name, "–"), wide=True) for run_options in options),
        ]
        for name in differing
    ]
    heads = ["option", *(run.label for run in runs)]
    notes = [] if rows else ["The configurations are the same."]
    return Section("Differences", notes, tables=[Table(heads, rows)] if rows else [])


def _configurations(runs: Sequence[RunRecords]) -> Section:
    files = [(f"config.yaml of {run.label}", run.folder / "config.yaml") for run in runs]
    return Section("Configuration", texts=texts_of_files(files))


def _environments(runs: Sequence[RunRecords]) -> Section:
    names = list(dict.fromkeys(n for run in runs for n, _ in _flatten(dict(run.environment))))
    values = [dict(_flatten(dict(run.environment))) for run in runs]
    rows = [
        [Cell(name), *(Cell(facts.get(name, "").strip('"'), wide=True) for facts in values)]
        for name in names
    ]
    heads = ["", *(("value",) if len(runs) == 1 else (run.label for run in runs))]
    return Section("Environment", tables=[Table(heads, rows)] if rows else [])
