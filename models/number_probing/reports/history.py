"""``fulgurite probe-history FOLDER``: the probes of several runs by training step."""

from __future__ import annotations

import argparse
import csv
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fulgurite import plotting
from fulgurite.commands import check_filled
from fulgurite.errors import ConfigError, DataError
from fulgurite.foreign import read_json, reading
from fulgurite.io import write_text
from fulgurite.models.number_probing.reports.options import OneLineParser, parse_integers
from fulgurite.models.number_probing.reports.report import to_csv, to_markdown
from fulgurite.plotting import COLORS, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["RunHistory", "find_runs", "history_figure", "main", "read_run", "summary"]

_FOLDS = {"kappa": "shuffled folds", "kappa_contiguous": "contiguous folds"}
_SCORES = ("val/exact", "val/acc")  # what shows that a run learned its task, the first it has


@dataclass(frozen=True)
class RunHistory:
    """Records of one run.

    Attributes:
        folder: Folder of the run.
        probes: Values by column, period and step, such as ``probes["kappa", 10][800]``.
        score_name: Metric that shows whether the task was learned; empty if there is none.
        score: Its value by step.
    """

    folder: Path
    probes: Mapping[tuple[str, int], Mapping[int, float]]
    score_name: str
    score: Mapping[int, float]

    def series(self, column: str, period: int) -> Mapping[int, float]:
        """Values of a column by step; empty if it was not probed."""
        return self.probes.get((column, period), {})


def read_run(folder: Path) -> RunHistory:
    """Read ``probe.csv`` and ``metrics.csv`` of a run.

    Raises:
        DataError: ``probe.csv`` is missing or no table of ModularProbe.
    """
    probes: dict[tuple[str, int], dict[int, float]] = {}
    table = folder / "probe.csv"
    rows = _read_csv_rows(table)
    hint = "Name folders of runs, or of a comparison of them."
    with reading(table, "The table", hint, fault="is no table of ModularProbe"):
        for row in rows:
            step, period = int(_require_field(row, "step")), int(_require_field(row, "period"))
            for column, value in row.items():
                if column not in ("step", "period", "verdict") and value:
                    probes.setdefault((column, period), {})[step] = float(value)
        if not probes:
            raise ValueError("it holds no value")
    table = folder / "metrics.csv"
    metrics = _read_csv_rows(table) if table.is_file() else []
    with reading(table, "The table", hint, fault="is no table of metrics"):
        for name in _SCORES:
            # Lightning counts from 0, the probe counts what was trained on
            score = {
                int(_require_field(row, "step")) + 1: float(row[name])
                for row in metrics
                if row.get(name)
            }
            if score:
                return RunHistory(folder, probes, name, score)
    return RunHistory(folder, probes, "", {})


def _require_field(row: Mapping[str, str], name: str) -> str:
    if not row.get(name):
        raise ValueError(f"a row has no {name}")
    return row[name]


def find_runs(folder: Path) -> dict[str, list[Path]]:
    """Folders of runs with a ``probe.csv``, by method.

    Args:
        folder: Folder of a run, of several runs, or of a comparison, whose methods have several
            seeds.

    Raises:
        DataError: The folder holds no ``probe.csv``.
    """
    records = sorted((folder / "results").glob("*.json"))
    if records:
        runs: dict[str, list[Path]] = {}
        for path in records:
            hint = "Name a run, or the folder of a comparison."
            with reading(path, "The record", hint, fault="is none of a comparison"):
                record = read_json(path)
                label = " ".join([record["method"], *map(str, record["setting"].values())])
                cell = folder / "cells" / Path(record["id"]).name
                if (cell / "probe.csv").is_file():
                    runs.setdefault(label, []).append(cell)
    else:
        runs = {
            str(path.parent.relative_to(folder)): [path.parent]
            for path in sorted(folder.rglob("probe.csv"))
        }
    if not runs:
        raise DataError(
            f"There is no probe.csv in {folder}.",
            "Name a run, runs, or a finished comparison with the callback ModularProbe.",
        )
    return runs


def summary(
    runs: Mapping[str, Sequence[RunHistory]], periods: Sequence[int]
) -> list[dict[str, Any]]:
    """Summarise each method in a row: mean and std over its runs of their last probes."""
    rows = []
    for label, histories in runs.items():
        row: dict[str, Any] = {"method": label, "runs": len(histories)}
        row["steps"] = max(step for h in histories for step in next(iter(h.probes.values())))
        row["score"] = _format_mean_std([_last_value(h.score) for h in histories])
        for column in (*_FOLDS, "local_ratio", "eta2"):
            for t in periods:
                values = [_last_value(h.series(column, t)) for h in histories]
                row[f"{column}_{t}"] = _format_mean_std(values)
        rows.append(row)
    return rows


def history_figure(runs: Mapping[str, Sequence[RunHistory]], periods: Sequence[int]) -> Figure:
    """Draw held-out κ of both kinds of folds and the line's height by period, and the score.

    Lines are means over runs, shades lie between the lowest and the highest.
    """
    figure, axes = new_figure(len(periods) + 1, 3, width=4.2, height=2.3)
    for ax, t in zip(axes[:-1], periods, strict=True):
        for column, (kind, folds) in enumerate(_FOLDS.items()):
            _plot_curves(ax[column], {k: [h.series(kind, t) for h in hs] for k, hs in runs.items()})
            ax[column].set(title=f"T = {t}, {folds}", ylabel="held-out κ", ylim=(-1.05, 1.05))
            ax[column].axhline(0, color="0.6", linewidth=0.6)
        _plot_curves(ax[2], {k: [h.series("local_ratio", t) for h in hs] for k, hs in runs.items()})
        ax[2].set(title=f"spectral line of T = {t}", ylabel="local ratio")
    task, legend, empty = axes[-1]
    names = {h.score_name for hs in runs.values() for h in hs} - {""}
    _plot_curves(task, {k: [h.score for h in hs] for k, hs in runs.items()})
    task.set(title="the task", xlabel="step", ylabel=", ".join(sorted(names)))
    names_of = task.get_legend_handles_labels()
    legend.legend(*names_of, loc="upper left", fontsize=7).set_in_layout(False)
    legend.set_axis_off()
    empty.set_axis_off()
    return figure


def main(argv: list[str]) -> int:
    """Print a table of runs, and draw κ, spectral lines and score against the steps.

    Args:
        argv: The command line after ``fulgurite probe-history``.

    Returns:
        0.

    Raises:
        FulguriteError: There is no run, or an option is invalid.
    """
    check_filled(argv)
    args = _make_parser().parse_args(argv)
    folder = Path(args.folder)
    periods = parse_integers(args.periods, "--periods")
    runs = find_runs(folder)
    if unknown := [name for name in args.only or () if name not in runs]:
        raise ConfigError(
            f"--only names {unknown[0]}, which is not in {folder}.",
            f"There are {', '.join(runs)}.",
        )
    histories = {k: [read_run(f) for f in fs] for k, fs in runs.items() if k in (args.only or runs)}
    for method_histories in histories.values():
        for history in method_histories:
            if lacking := [t for t in periods if not history.series("kappa", t)]:
                print(f"{history.folder.name} was not probed at T = {lacking}")
    rows = summary(histories, periods)
    print(to_markdown(rows, list(rows[0])))
    out = Path(args.out) if args.out else folder / "history"
    write_text(out / "history.csv", to_csv(rows))
    plotting.save_figure(history_figure(histories, periods), out / "history.png")
    print(f"probe-history: recorded in {out}")
    return 0


def _make_parser() -> argparse.ArgumentParser:
    p = OneLineParser(
        prog="fulgurite probe-history",
        description="What ModularProbe saw of runs: kappa, spectral lines and the score of the "
        "task against the steps, mean over the runs of a method.",
    )
    add = p.add_argument
    add("folder", help="of a run, of runs, or of a comparison")
    add("--periods", default="2,5,10", help="default: %(default)s")
    add("--only", nargs="+", action="extend", metavar="METHOD", help="these methods only")
    add("--out", help="folder of the figure and the table; default: FOLDER/history")
    return p


def _read_csv_rows(file: Path) -> list[dict[str, str]]:
    with reading(file, "The table", "Name folders of runs."):
        with file.open(newline="", encoding="utf-8") as lines:
            table = csv.DictReader(lines)
            names = table.fieldnames or []
            rows = list(table)
        if not names:
            raise ValueError("it is empty")
        if len(set(names)) < len(names):
            raise ValueError("two columns have one name")
        if any(None in row for row in rows):
            raise ValueError("a line has more fields than the header")
    return rows


def _last_value(values: Mapping[int, float]) -> float:
    return values[max(values)] if values else math.nan


def _format_mean_std(values: Sequence[float]) -> str:
    """Format mean ± standard deviation; a single value has no deviation.

    >>> _format_mean_std([0.25, 0.75]), _format_mean_std([0.5, math.nan])
    ('0.50 ± 0.35', '0.50')
    """
    finite = [v for v in values if not math.isnan(v)]
    if not finite:
        return ""
    std = f" ± {np.std(finite, ddof=1):.2f}" if len(finite) > 1 else ""
    return f"{np.mean(finite):.2f}{std}"


def _plot_curves(ax: Any, curves: Mapping[str, Sequence[Mapping[int, float]]]) -> None:
    for (label, runs), color in zip(curves.items(), itertools.cycle(COLORS), strict=False):
        # runs that were stopped elsewhere share only a part of the steps
        steps = sorted(set.intersection(*(set(run) for run in runs)))
        values = np.array([[run[step] for step in steps] for run in runs])
        ax.plot(steps, values.mean(0), label=label, color=color, linewidth=1.2)
        if len(runs) > 1:
            ax.fill_between(
                steps, values.min(0), values.max(0), color=color, alpha=0.2, linewidth=0
            )
