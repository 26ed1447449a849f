"""A page about a comparison: means with intervals, differences, costs, seeds, failures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from fulgurite.compare.comparison import MARKS, PLAN_FILE, Comparison, Entry, count_digits
from fulgurite.compare.stats import LEVEL, quantile
from fulgurite.html_report.charts import Interval, interval_chart
from fulgurite.html_report.page import (
    Cell,
    Chart,
    Image,
    Page,
    Section,
    Table,
    embed_image,
    texts_of_files,
)

__all__ = ["describe_comparison", "estimate_interval"]

_Setting = tuple[tuple[str, str], ...]


def describe_comparison(comparison: Comparison) -> Page:
    """A page with the tables of a comparison.

    Args:
        comparison: What was read of its folder.
    """
    plan = comparison.plan
    counts = f"{len(comparison.results)} of {len(plan.trial_ids)} finished"
    seeds = ", ".join(map(str, plan.seeds))
    metrics = [plan.metric, *plan.also]
    return Page(
        plan.title or comparison.folder.name,
        f"{comparison.folder} · {counts} · seeds {seeds}",
        [
            *(_metric_section(comparison, metric) for metric in metrics),
            _costs(comparison),
            Section("Figure", images=_figure(comparison)),
            _failures(comparison),
            _trials(comparison),
            Section(
                "Configuration",
                texts=texts_of_files([(PLAN_FILE, comparison.folder / PLAN_FILE)]),
            ),
            _versions(comparison),
        ],
    )


def _name(comparison: Comparison, metric: str) -> str:
    return str(comparison.plan.names.get(metric, metric))


def _label(setting: _Setting) -> str:
    return ", ".join(f"{axis} = {label}" for axis, label in setting)


def estimate_interval(entry: Entry) -> tuple[float, float]:
    """Estimate the confidence interval of a mean, by the t-distribution.

    Args:
        entry: The values of a method in a setting, of which each seed gives one.

    Returns:
        Both ends; NaN below two seeds.
    """
    values = entry.mean_std
    if values.n < 2:
        return math.nan, math.nan
    half = quantile(values.n) * values.error
    return values.mean - half, values.mean + half


def _metric_section(comparison: Comparison, metric: str) -> Section:
    plan, entries = comparison.plan, comparison.entries(metric)
    mode = plan.mode_of(metric)
    better = {"max": "Higher is better.", "min": "Lower is better."}.get(mode, "")
    base = plan.methods[plan.baseline].label if plan.baseline else ""
    named = [f"{axis}: {plan.names[axis]}." for axis in plan.axes if axis in plan.names]
    notes = [
        f"{metric}: mean ± std over seeds. {better} Intervals in the charts hold the mean at "
        f"{LEVEL * 100:.0f} % (t-distribution)."
    ]
    if base and mode != "none":
        notes.append(
            f"▲ better and ▼ worse than {base}: paired t-test over the seeds at {LEVEL * 100:.0f} "
            "% with Holm's correction over the table; ≈ not shown to differ; no mark: not tested."
        )
    notes += [" ".join(named)] if named else []
    tables = [_means(comparison, metric, entries)]
    if base:
        tables.append(_differences(comparison, entries, base))
    charts = []
    for setting in comparison.grid:
        intervals = [
            _as_interval(comparison, method, entries[method, setting]) for method in comparison.rows
        ]
        title = _label(setting) or _name(comparison, metric)
        charts.append(Chart(title, interval_chart(intervals, _name(comparison, metric))))
    return Section(_name(comparison, metric), notes, tables=tables, charts=charts)


def _as_interval(comparison: Comparison, method: str, entry: Entry) -> Interval:
    low, high = estimate_interval(entry)
    plan = comparison.plan
    return Interval(
        plan.methods[method].label,
        entry.mean_std.mean,
        low,
        high,
        MARKS[entry.verdict],
        reference=method == plan.baseline,
    )


def _means(
    comparison: Comparison, metric: str, entries: Mapping[tuple[str, _Setting], Entry]
) -> Table:
    digits = count_digits(entries.values())
    rows = []
    for method in comparison.rows:
        cells = [Cell(comparison.plan.methods[method].label, wide=True)]
        for setting in comparison.grid:
            entry = entries[method, setting]
            values = entry.mean_std
            if not values.n:
                cells.append(Cell(""))
                continue
            text = f"{values.mean:.{digits}f}"
            text += f" ± {values.std:.{digits}f}" if values.n > 1 else ""
            text += f" (n={values.n})" if values.n < len(comparison.plan.seeds) else ""
            seeds = comparison.values(method, setting, metric)
            by_seed = ", ".join(f"{seed}: {value:.5g}" for seed, value in seeds.items())
            p = entry.p_adjusted
            title = f"by seed: {by_seed}" + ("" if math.isnan(p) else f"; p = {p:.2g} (Holm)")
            cells.append(
                Cell(
                    f"{text} {MARKS[entry.verdict]}".strip(),
                    values.mean,
                    title,
                    best=entry.best,
                    verdict=entry.verdict if entry.verdict in ("beats", "loses") else "",
                )
            )
        rows.append(cells)
    heads = [_label(s) or _name(comparison, metric) for s in comparison.grid]
    return Table(["method", *heads], rows)


def _differences(
    comparison: Comparison, entries: Mapping[tuple[str, _Setting], Entry], base: str
) -> Table:
    digits = count_digits(entries.values())
    rows = []
    for method in comparison.rows:
        if method == comparison.plan.baseline:
            continue
        cells = [Cell(comparison.plan.methods[method].label, wide=True)]
        for setting in comparison.grid:
            difference = entries[method, setting].paired
            if difference is None or not difference.n:
                cells.append(Cell(""))
                continue
            text = f"{difference.mean:+.{digits}f}"
            if not math.isnan(difference.error):
                text += f" ± {difference.error:.{digits}f}"
            text += f" (n={difference.n})" if difference.n < len(comparison.plan.seeds) else ""
            cells.append(Cell(text, difference.mean, f"{difference.n} common seeds"))
        rows.append(cells)
    heads = [_label(s) or "difference" for s in comparison.grid]
    title = f"Difference to {base}, mean ± standard error over common seeds"
    return Table(["method", *heads], rows, title)


def _costs(comparison: Comparison) -> Section:
    costs = comparison.plan.costs
    if not costs:
        return Section("Costs")
    rows = []
    for method in comparison.rows:
        cells = [Cell(comparison.plan.methods[method].label, wide=True)]
        for name in costs:
            values = comparison.costs(method, name)
            if not values:
                cells.append(Cell(""))
                continue
            mean = statistics.fmean(values)
            lowest, highest = Cell.of_number(min(values)), Cell.of_number(max(values))
            title = f"{lowest.text} to {highest.text}"
            cells.append(Cell(Cell.of_number(mean).text, mean, title))
        rows.append(cells)
    heads = ["method", *(_name(comparison, name) for name in costs)]
    notes = ["What a training spends: mean over settings and seeds."]
    return Section("Costs", notes, tables=[Table(heads, rows)])


def _trials(comparison: Comparison) -> Section:
    """Every finished trial with its main metric and time."""
    plan = comparison.plan
    axes = list(plan.axes)
    rows = []
    for record in comparison.results.values():
        setting = dict(record["setting"])
        value = record["metrics"].get(plan.metric)
        rows.append(
            [
                Cell(plan.methods[record["method"]].label, wide=True),
                *(_as_cell(setting.get(axis, "")) for axis in axes),
                Cell(str(record["seed"]), float(record["seed"])),
                Cell.of_number(None if value is None else float(value)),
                Cell(f"{record['seconds']:.1f}", float(record["seconds"])),
            ]
        )
    heads = ["method", *axes, "seed"]
    heads += [_name(comparison, plan.metric), "seconds"]
    return Section("Trials", tables=[Table(heads, rows)] if rows else [])


def _as_cell(label: Any) -> Cell:
    try:
        return Cell(str(label), float(label))
    except (TypeError, ValueError):
        return Cell(str(label))


def _failures(comparison: Comparison) -> Section:
    rows = [
        [Cell(name), Cell(str(comparison.failures[name].get("error", "")), wide=True)]
        for name in comparison.failed
    ]
    rows += [[Cell(name), Cell("The record is damaged.")] for name in sorted(comparison.unreadable)]
    return Section("Failures", tables=[Table(["trial", "error"], rows)] if rows else [])


def _figure(comparison: Comparison) -> list[Image]:
    path = comparison.folder / "figure.png"
    return [embed_image(path, comparison.plan.title)] if path.is_file() else []


def _versions(comparison: Comparison) -> Section:
    versions = sorted({str(r.get("version", "")) for r in comparison.results.values()} - {""})
    times = sorted(str(r.get("finished", "")) for r in comparison.results.values())
    if not versions:
        return Section("Versions")
    rows = [
        [Cell("fulgurite"), Cell(", ".join(versions))],
        [Cell("first trial"), Cell(times[0])],
        [Cell("last trial"), Cell(times[-1])],
    ]
    return Section("Versions", tables=[Table(["", "value"], rows)])
