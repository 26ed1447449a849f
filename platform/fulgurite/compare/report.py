"""Tables and figure of a comparison, and the summary of a run folder."""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fulgurite import plotting
from fulgurite.compare.comparison import PLAN_FILE, Comparison, Entry
from fulgurite.compare.plan import ComparisonPlan
from fulgurite.compare.run_config import name_run, read_run_config
from fulgurite.compare.stats import LEAST_SEEDS, LEVEL, quantile
from fulgurite.compare.trial import Setting, trial_id
from fulgurite.errors import ConfigError
from fulgurite.io import check_output, write_text
from fulgurite.plotting import COLORS, new_figure
from fulgurite.run_folders.metrics import rank_stage, read_metric_rows, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["render", "report_main", "run_summary", "writing"]


def render(comparison: Comparison) -> None:
    """Write table.md, table.csv, summary.csv and figure.png from the records."""
    write_text(comparison.folder / "table.md", comparison.markdown())
    write_text(comparison.folder / "table.csv", _cells_csv(comparison))
    write_text(comparison.folder / "summary.csv", _summary_csv(comparison))
    _draw(comparison, comparison.folder / "figure.png")


@contextmanager
def writing(folder: Path, way_out: str = "name another folder: --out=FOLDER") -> Iterator[None]:
    """Say in one line why nothing can be written.

    Args:
        folder: Where it is written.
        way_out: What else people can do.

    Raises:
        ConfigError: The folder is none, read-only or full.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or isinstance(error, ConnectionError):  # such as a closed terminal
            raise
        raise ConfigError(
            f"{error.filename or folder} cannot be written ({error.strerror}).",
            f"Make room or fix it, or {way_out}. What is recorded stays.",
        ) from error


def report_main(argv: Sequence[str] | None = None) -> int:
    """The command line of ``fulgurite report``.

    Raises:
        ConfigError: A folder holds neither a comparison nor a run, or several are not all runs.
    """
    parser = argparse.ArgumentParser("fulgurite report", description=(__doc__ or "").strip())
    parser.add_argument("folders", nargs="+", type=Path, help="of a comparison, or of runs")
    parser.add_argument(
        "--html",
        nargs="?",
        const=True,
        metavar="FILE",
        help="write one HTML file (default: report.html in the first folder)",
    )
    options = parser.parse_args(argv)
    if options.html:
        from fulgurite.html_report import write_report

        with writing(options.folders[0], "name another file: --html=FILE"):
            out = None if options.html is True else Path(options.html)
            if out is not None and out.is_dir():  # `--html RUN` takes a run for the file
                raise ConfigError(
                    f"--html names {out}, a folder.",
                    "Give --html=FILE, or write --html behind the folders.",
                )
            if out is not None:
                check_output(out, "--html", ".html", ".htm")
            print(f"Report: {write_report(options.folders, out)}")
        return 0
    for folder in options.folders:
        _print_report(folder)
    return 0


def _print_report(folder: Path) -> None:
    if (folder / PLAN_FILE).is_file():
        comparison = Comparison.read(folder)
        print(comparison.markdown())  # also where nothing can be written
        with writing(folder, "report a copy of it"):
            render(comparison)
        print(f"Tables and figure: {folder}")
    elif (folder / "config.yaml").is_file():
        print(run_summary(folder))
    else:
        raise ConfigError(
            f"{folder} holds neither a comparison ({PLAN_FILE}) nor a run (config.yaml).",
            "Name a folder that `fulgurite compare` or `fulgurite fit` printed.",
        )


def run_summary(folder: Path) -> str:
    """What a run folder holds: name, classes, metrics, figures, checkpoints.

    Raises:
        ConfigError: A file of it is damaged.
    """
    config = read_run_config(folder)
    lines = [f"# {name_run(config, folder)}", ""]
    for part in ("model", "data"):
        spec = config.get(part)
        if isinstance(spec, dict) and spec.get("class_path"):
            lines.append(f"{part}: {spec['class_path']}")
    if "seed_everything" in config:
        lines.append(f"seed: {config['seed_everything']}")
    metrics = read_metrics(folder) or _last_metrics(folder / "metrics.csv")
    lines += ["", "| metric | value |", "| --- | ---: |"]
    # within each kind as they were recorded: the monitored one first
    ordered = sorted(metrics, key=rank_stage)
    lines += [f"| {name} | {metrics[name]:.5g} |" for name in ordered]
    lines += ["", *(str(path) for path in sorted(folder.glob("figures/**/*.png")))]
    lines += [str(path) for path in sorted(folder.glob("checkpoints/*.ckpt"))]
    return "\n".join(lines)


def _last_metrics(path: Path) -> dict[str, float]:
    last: dict[str, float] = {}
    if path.is_file():
        try:
            for row in read_metric_rows(path):
                last.update({k: float(v) for k, v in row.items() if k and v})
        except (TypeError, ValueError, csv.Error) as error:
            raise ConfigError(f"{path} holds no table of metrics.") from error
    return last


def _cells_csv(comparison: Comparison) -> str:
    plan = comparison.plan
    names = sorted({name for record in comparison.results.values() for name in record["metrics"]})
    rows: list[list[Any]] = [["method", *plan.axes, "seed", "status", "seconds", *names]]
    for method in plan.rows:
        for setting in plan.grid:
            for seed in plan.seeds:
                cell = trial_id(method, setting, seed)
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
    head = ["n", "mean", "std", "baseline", "n_paired", "difference", "difference_se"]
    head += ["p_value", "p_value_holm", "verdict"]
    rows: list[list[Any]] = [["method", "label", *plan.axes, "metric", *head]]
    for metric in (plan.metric, *plan.also):
        for (name, setting), entry in comparison.entries(metric).items():
            values, diff = entry.mean_std, entry.paired
            row: list[Any] = [name, plan.methods[name].label, *(v for _, v in setting), metric]
            row += [values.n, _number(values.mean), _number(values.std), plan.baseline or ""]
            if diff is not None:
                row += [diff.n, _number(diff.mean), _number(diff.error)]
                row += [_number(diff.p), _number(entry.p_adjusted), entry.verdict]
            rows.append(row + [""] * (len(rows[0]) - len(row)))
    return _csv(rows)


def _number(value: float) -> float | str:
    return "" if math.isnan(value) else value


def _csv(rows: list[list[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _draw(comparison: Comparison, path: Path) -> None:
    """Means over the axis with the most labels, and the paired differences to the baseline.

    There is one panel for each setting of the other axes, and as many for the differences, where
    any is tested.
    """
    plan, grid, entries = comparison.plan, comparison.grid, comparison.entries()
    labels_of = {axis: list(dict.fromkeys(dict(s)[axis] for s in grid)) for axis in plan.axes}
    axis = max(labels_of, key=lambda a: len(labels_of[a]), default="")
    settings = list(dict.fromkeys(tuple(p for p in s if p[0] != axis) for s in grid))
    tested = any(entry.paired and entry.paired.n >= LEAST_SEEDS for entry in entries.values())
    kinds: list[Callable[[Entry], Point | None]] = [_mean, _difference] if tested else [_mean]
    wide = len(settings) == 1
    shape = (1, len(kinds)) if wide else (len(kinds), len(settings))
    figure, plots = new_figure(*shape, width=4.2, height=3.6 if wide else 3.0)
    plots = plots.T if wide else plots
    for kind, row in zip(kinds, plots, strict=True):
        for setting, plot in zip(settings, row, strict=True):
            _draw_panel(
                plot,
                comparison,
                axis=axis,
                labels=labels_of.get(axis, [""]),
                setting=setting,
                kind=kind,
                entries=entries,
            )
            plot.sharey(row[0])
    if tested and not wide:  # one above the other
        for upper, lower in plots.T:
            upper.set_xlabel("")
            lower.set_title("")
    means = [entry.mean_std.mean for entry in entries.values() if entry.mean_std.n]
    if all(mean.is_integer() for mean in means):
        plots[0][0].yaxis.get_major_locator().set_params(integer=True)
    metric = plan.names.get(plan.metric, plan.metric)
    plots[0][0].set_ylabel(f"{metric}\n{_what_bars_are(entries.values())}")
    if tested:
        base = plan.methods[str(plan.baseline)].label
        plots[1][0].set_ylabel(
            f"difference to {base}\n{LEVEL * 100:.0f} % interval, paired by seed"
        )
        for plot in plots[1]:
            plot.axhline(0, color="black", linewidth=0.8, zorder=1)
    width = figure.get_figwidth()
    figure.suptitle(textwrap.fill(plan.title, round(11 * width)), fontsize=11)
    figure.legend(*_by_last_value(plots[0]), fontsize=8, frameon=False, loc="outside right center")
    figure.set_dpi(150)
    plotting.save_figure(figure, path)


Point = tuple[float, float]
"""Height of a point, and half the length of its bar."""


def _mean(entry: Entry) -> Point | None:
    values = entry.mean_std
    return (values.mean, 0.0 if math.isnan(values.std) else values.std) if values.n else None


def _difference(entry: Entry) -> Point | None:
    difference = entry.paired
    if difference is None or difference.n < LEAST_SEEDS:
        return None
    return difference.mean, quantile(difference.n) * difference.error


def _draw_panel(
    plot: Axes,
    comparison: Comparison,
    *,
    axis: str,
    labels: Sequence[str],
    setting: Setting,
    kind: Callable[[Entry], Point | None],
    entries: Mapping[tuple[str, Setting], Entry],
) -> None:
    """The lines of all methods that have a value, with ticks where values are."""
    plan, rows = comparison.plan, comparison.rows
    by_label = {dict(s).get(axis, ""): s for s in comparison.grid if {*setting} <= {*s}}
    xs = _label_positions(labels)
    step = min((b - a for a, b in itertools.pairwise(xs)), default=1.0)
    for rank, name in enumerate(rows):
        # a small shift keeps error bars apart that would lie upon each other
        shift = 0.24 * step * (rank - (len(rows) - 1) / 2) / max(len(rows), 5)
        points = [
            (x + shift, *point)
            for x, label in zip(xs, labels, strict=True)
            if label in by_label and (point := kind(entries[name, by_label[label]]))
        ]
        if points:
            _draw_method(plot, plan, name, rank=rank, points=points)
    plot.set_title(_setting_name(setting, plan), fontsize=10)
    plot.set_xlabel(textwrap.fill(plan.names.get(axis, axis), 40))
    crowded = len("  ".join(labels)) > 45
    turned: dict[str, Any] = {"rotation": 45, "ha": "right", "fontsize": 8} if crowded else {}
    plot.set_xticks(xs, labels, **turned)
    plot.set_xlim(xs[0] - 0.3 * step, xs[-1] + 0.3 * step)


def _draw_method(
    plot: Axes,
    plan: ComparisonPlan,
    name: str,
    *,
    rank: int,
    points: Sequence[tuple[float, float, float]],
) -> None:
    """One line: (position, height, half a bar) of each point."""
    positions, heights, bars = zip(*points, strict=True)
    front = name == plan.highlight
    plot.errorbar(
        positions,
        heights,
        yerr=bars,
        label=plan.methods[name].label,
        color=COLORS[rank % len(COLORS)],
        marker="osD^vP*X"[rank % 8],
        linestyle="--" if name == plan.baseline else "-",
        markersize=7 if front else 4,
        linewidth=3.2 if front else 1.4,
        elinewidth=1.8 if front else 1.0,
        capsize=3 if front else 2,
        alpha=1.0 if front or not plan.highlight else 0.8,
        zorder=4 if front else 2,
    )


def _setting_name(setting: Setting, plan: ComparisonPlan) -> str:
    return ", ".join(f"{plan.names.get(axis, axis)} = {label}" for axis, label in setting)


def _what_bars_are(entries: Iterable[Entry]) -> str:
    counts = sorted({entry.mean_std.n for entry in entries if entry.mean_std.n})
    if not counts or counts == [1]:
        return "one seed"
    span = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"mean ± std over {span} seeds"


def _by_last_value(axes: Sequence[Axes]) -> tuple[list[Any], list[str]]:
    """Handles and labels of a legend in the order in which the lines of the last panel end."""
    drawn: dict[str, tuple[Any, float]] = {}
    handle: Any
    for plot in axes:
        for handle, label in zip(*plot.get_legend_handles_labels(), strict=True):
            heights = [float(y) for y in handle[0].get_ydata() if not math.isnan(y)]
            drawn[label] = (handle, heights[-1] if heights else -math.inf)
    ordered = sorted(drawn.items(), key=lambda item: -item[1][1])
    return [handle for _, (handle, _) in ordered], [label for label, _ in ordered]


def _label_positions(labels: Sequence[str]) -> list[float]:
    """Positions of labels on an axis: their values where these are ascending and fairly even.

    >>> _label_positions(["0.3", "0.5", "0.9"]), _label_positions(["iid", "shards"])
    ([0.3, 0.5, 0.9], [0.0, 1.0])
    >>> _label_positions(["1", "10", "100"])
    [0.0, 1.0, 2.0]
    """
    try:
        values = [float(label) for label in labels]
    except ValueError:
        values = []
    gaps = [b - a for a, b in itertools.pairwise(values)]
    # labels that are closer than a sixth of the widest gap would lie upon each other
    if (
        values
        and all(map(math.isfinite, values))
        and min(gaps, default=1) * 6 > max(gaps, default=1)
    ):
        return values
    return [float(i) for i in range(len(labels))]
