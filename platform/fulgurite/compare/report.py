"""Tables and figure of a comparison, and the summary of a run folder."""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fulgurite.compare.comparison import PLAN_FILE, Comparison
from fulgurite.compare.plan import cell_id, setting_label
from fulgurite.compare.worker import read_metrics
from fulgurite.errors import ConfigError
from fulgurite.io import atomic_write
from fulgurite.plotting import COLORS, new_figure

__all__ = ["main", "render", "run_summary"]


def render(comparison: Comparison) -> None:
    """Write table.md, table.csv, summary.csv and figure.png from the records."""
    _write(comparison.folder / "table.md", comparison.markdown())
    _write(comparison.folder / "table.csv", _cells_csv(comparison))
    _write(comparison.folder / "summary.csv", _summary_csv(comparison))
    _draw(comparison, comparison.folder / "figure.png")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of ``fulgurite report``.

    Raises:
        ConfigError: The folder holds neither a comparison nor a run.
    """
    parser = argparse.ArgumentParser("fulgurite report", description=(__doc__ or "").strip())
    parser.add_argument("folder", help="folder of a comparison or of a run")
    folder = Path(parser.parse_args(argv).folder)
    if (folder / PLAN_FILE).is_file():
        comparison = Comparison.read(folder)
        render(comparison)
        print(comparison.markdown())
        print(f"Tables and figure: {folder}")
    elif (folder / "config.yaml").is_file():
        print(run_summary(folder))
    else:
        raise ConfigError(
            f"{folder} holds neither a comparison ({PLAN_FILE}) nor a run (config.yaml).",
            "Name a folder that `fulgurite compare` or `fulgurite fit` printed.",
        )
    return 0


def run_summary(folder: Path) -> str:
    """What a run folder holds: name, classes, metrics, figures, checkpoints."""
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {}
    run = config.get("run") or {}
    name = "/".join(str(run[key]) for key in ("system", "name") if run.get(key))
    lines = [f"# {name or folder.name}", ""]
    for part in ("model", "data"):
        spec = config.get(part)
        if isinstance(spec, dict) and spec.get("class_path"):
            lines.append(f"{part}: {spec['class_path']}")
    if "seed_everything" in config:
        lines.append(f"seed: {config['seed_everything']}")
    metrics = read_metrics(folder) or _last_metrics(folder / "metrics.csv")
    lines += ["", "| metric | value |", "| --- | ---: |"]
    # as they were recorded: the monitored one first
    stages = sorted(metrics, key=lambda name: not name.startswith("test/"))
    lines += [f"| {name} | {metrics[name]:.5g} |" for name in stages]
    lines += ["", *(str(path) for path in sorted(folder.glob("figures/**/*.png")))]
    lines += [str(path) for path in sorted(folder.glob("checkpoints/*.ckpt"))]
    return "\n".join(lines)


def _last_metrics(path: Path) -> dict[str, float]:
    last: dict[str, float] = {}
    if path.is_file():
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                last.update({k: float(v) for k, v in row.items() if k and v})
    return last


def _write(path: Path, content: str) -> None:
    with atomic_write(path) as draft:
        draft.write_text(content, encoding="utf-8")


def _cells_csv(comparison: Comparison) -> str:
    plan = comparison.plan
    names = sorted({name for record in comparison.results.values() for name in record["metrics"]})
    rows: list[list[Any]] = [["method", *plan.axes, "seed", "status", "seconds", *names]]
    for method in plan.rows:
        for setting in plan.grid:
            for seed in plan.seeds:
                cell = cell_id(method, setting, seed)
                record = comparison.results.get(cell)
                status = (
                    "finished" if record else "failed" if cell in comparison.failures else "open"
                )
                got = [record["metrics"].get(n, "") for n in names] if record else [""] * len(names)
                seconds = record["seconds"] if record else ""
                rows.append([method, *(v for _, v in setting), seed, status, seconds, *got])
    return _csv(rows)


def _summary_csv(comparison: Comparison) -> str:
    plan = comparison.plan
    head = ["n", "mean", "std", "baseline", "n_paired", "difference", "difference_se", "verdict"]
    rows: list[list[Any]] = [["method", "label", *plan.axes, "metric", *head]]
    places = itertools.product((plan.metric, *plan.also), plan.rows.values(), plan.grid)
    for metric, method, setting in places:
        entry = comparison.entry(method.id, setting, metric)
        values, diff = entry.spread, entry.paired
        row: list[Any] = [method.id, method.label, *(v for _, v in setting), metric]
        row += [values.n, _number(values.mean), _number(values.std), plan.baseline or ""]
        if diff is not None:
            row += [diff.n, _number(diff.mean), _number(diff.error), diff.verdict]
        rows.append(row + [""] * (len(rows[0]) - len(row)))
    return _csv(rows)


def _number(value: float) -> float | str:
    return "" if math.isnan(value) else value


def _csv(rows: list[list[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _draw(comparison: Comparison, path: Path) -> None:
    """Lines over the axis with the most labels, one panel for each setting of the others."""
    plan = comparison.plan
    axis = max(plan.axes, key=lambda a: len(plan.axes[a]), default="")
    panels = list(dict.fromkeys(tuple(p for p in s if p[0] != axis) for s in plan.grid))
    labels = list(plan.axes[axis]) if axis else [""]
    places, numeric = _places(labels)
    figure, ((*axes,),) = new_figure(1, len(panels), width=4.2)
    step = min((b - a for a, b in itertools.pairwise(places)), default=1.0)
    for panel, plot in zip(panels, axes, strict=True):
        for rank, method in enumerate(plan.rows.values()):
            # A small shift keeps error bars apart that would lie upon each other.
            shift = 0.02 * step * (rank - (len(plan.rows) - 1) / 2)
            by_axis = {dict(s)[axis] if axis else "": s for s in plan.grid if set(panel) <= set(s)}
            spreads = [comparison.entry(method.id, by_axis[label]).spread for label in labels]
            plot.errorbar(
                [place + shift for place in places],
                [s.mean for s in spreads],
                yerr=[0.0 if math.isnan(s.std) else s.std for s in spreads],
                label=method.label,
                color=COLORS[rank % len(COLORS)],
                marker="osD^vP*X"[rank % 8],
                linestyle="--" if method.id == plan.baseline else "-",
                markersize=4,
                linewidth=1.4,
                capsize=2,
            )
        plot.set_title(setting_label(panel), fontsize=10)
        plot.set_xlabel(axis)
        if not numeric or not axis:
            plot.set_xticks(places, labels)
        plot.sharey(axes[0])
    axes[0].set_ylabel(plan.metric)
    figure.suptitle(plan.title, fontsize=11)
    figure.legend(
        *axes[0].get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside right center"
    )
    with atomic_write(path) as draft:
        figure.savefig(draft, format="png", dpi=150)


def _places(labels: Sequence[str]) -> tuple[list[float], bool]:
    """Positions of labels on an axis: their values where they are ascending numbers.

    >>> _places(["0.3", "0.5"]), _places(["iid", "shards"])
    (([0.3, 0.5], True), ([0.0, 1.0], False))
    """
    try:
        values = [float(label) for label in labels]
    except ValueError:
        values = []
    if values and all(a < b for a, b in itertools.pairwise(values)):
        return values, True
    return [float(i) for i in range(len(labels))], False
