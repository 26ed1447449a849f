"""A comparison on disk: the plan, one JSON per finished trial, one per failed trial."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fulgurite.compare.plan import ComparisonMethod, ComparisonPlan
from fulgurite.compare.plan_file import read_plan
from fulgurite.compare.records import Record, read_record
from fulgurite.compare.stats import (
    LEAST_SEEDS,
    LEVEL,
    MeanStd,
    Paired,
    holm,
    mean_std,
    paired,
    quantile,
)
from fulgurite.compare.trial import Setting, setting_label, trial_id
from fulgurite.errors import ConfigError
from fulgurite.io import write_text
from fulgurite.masking import masked

__all__ = ["MARKS", "PLAN_FILE", "Comparison", "Entry", "count_digits"]

PLAN_FILE = "comparison.yaml"
MARKS = {"beats": "▲", "ties": "≈", "loses": "▼", "": ""}


@dataclass(frozen=True)
class Entry:
    """One place of the table: a method in a setting, over its seeds.

    Args:
        mean_std: Mean and standard deviation of its values.
        paired: Difference to the baseline; None for the baseline itself and without one.
        p_adjusted: P-value of that difference after Holm's correction over the table.
        verdict: ``beats``, ``ties``, ``loses``, or empty where nothing was tested.
        best: Whether it has the best mean of its setting.
    """

    mean_std: MeanStd
    paired: Paired | None
    p_adjusted: float
    verdict: str
    best: bool


@dataclass(frozen=True)
class Comparison:
    """ComparisonPlan and records of a comparison.

    Args:
        plan: What was to be run.
        folder: Where the records lie.
        results: Record of each finished trial, by trial id.
        failures: Record of each failed trial, by trial id.
        unreadable: Ids of cells whose record is damaged or something else.
    """

    plan: ComparisonPlan
    folder: Path
    results: Mapping[str, Mapping[str, Any]]
    failures: Mapping[str, Mapping[str, Any]]
    unreadable: frozenset[str] = frozenset()

    @classmethod
    def read(cls, folder: Path, plan: ComparisonPlan | None = None) -> Comparison:
        """Read the records under ``folder``.

        Raises:
            ConfigError: The folder holds no comparison.
        """
        if plan is None:
            if not (folder / PLAN_FILE).is_file():
                raise ConfigError(
                    f"{folder} holds no comparison ({PLAN_FILE} is not there).",
                    "Name the folder that `fulgurite compare` printed.",
                )
            plan = read_plan(folder / PLAN_FILE)
        records: dict[str, dict[str, Record]] = {"results": {}, "failed": {}}
        unreadable = set()
        for kind, read in records.items():
            for name in plan.trial_ids:
                path = folder / kind / f"{name}.json"
                if path.is_file():
                    record = read_record(path)
                    if record is None:
                        unreadable.add(name)
                    else:
                        read[name] = record
        return cls(
            plan, folder, records["results"], records["failed"], unreadable=frozenset(unreadable)
        )

    def save_plan(self) -> None:
        """Write the plan without secrets, so that ``fulgurite report`` needs the folder alone."""
        content = self.plan.to_dict() | masked(self.plan.options_to_dict())
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        write_text(self.folder / PLAN_FILE, text)

    @property
    def failed(self) -> list[str]:
        """Ids of the cells that failed and were not run again with success."""
        return [name for name in self.plan.trial_ids if name in self.failures.keys() - self.results]

    @property
    def rows(self) -> dict[str, ComparisonMethod]:
        """The methods that have a record, by id; all of them if none has."""
        methods = {record["method"] for record in self._records}
        return {m: row for m, row in self.plan.rows.items() if m in methods} or self.plan.rows

    @property
    def grid(self) -> list[Setting]:
        """The settings that have a record; all of them if none has."""
        settings = [record["setting"] for record in self._records]
        return [
            setting for setting in self.plan.grid if dict(setting) in settings
        ] or self.plan.grid

    @property
    def _records(self) -> list[Mapping[str, Any]]:
        return [*self.results.values(), *self.failures.values()]

    def values(self, method: str, setting: Setting, metric: str | None = None) -> dict[int, float]:
        """A metric by seed, of the finished trials; that of the plan by default."""
        metric = metric or self.plan.metric
        by_seed = {}
        for seed in self.plan.seeds:
            record = self.results.get(trial_id(method, setting, seed))
            if record is not None and metric in record["metrics"]:
                by_seed[seed] = float(record["metrics"][metric])
        return by_seed

    def entries(self, metric: str | None = None) -> dict[tuple[str, Setting], Entry]:
        """Statistics of every place of the table of a metric, by method and setting.

        Tests of differences are corrected for one another, so that places cannot be taken alone.
        """
        plan, mode = self.plan, self.plan.mode_of(metric)
        sign, directed = -1.0 if mode == "min" else 1.0, mode != "none"
        keys = [(method, setting) for method in self.rows for setting in self.grid]
        values = {key: self.values(*key, metric) for key in keys}
        summaries = {key: mean_std([*by_seed.values()]) for key, by_seed in values.items()}
        against = {
            (method, setting): paired(
                values[method, setting],
                self.values(plan.baseline, setting, metric),
                mode=mode if directed else "max",
            )
            for method, setting in keys
            if plan.baseline is not None and method != plan.baseline
        }
        adjusted = holm({key: difference.p for key, difference in against.items()})
        best = {
            setting: max(
                (sign * s.mean for (_, at), s in summaries.items() if at == setting and s.n),
                key=lambda mean: -math.inf if math.isnan(mean) else mean,
                default=math.nan,
            )
            for setting in self.grid
        }
        table = {}
        for key in keys:
            difference, p = against.get(key), adjusted.get(key, math.nan)
            verdict = difference.verdict(p) if difference and directed else ""
            is_best = directed and sign * summaries[key].mean == best[key[1]]
            table[key] = Entry(summaries[key], difference, p, verdict, is_best)
        return table

    def markdown(self) -> str:
        """The tables: means, and paired differences to the baseline."""
        plan = self.plan
        lines = [f"# {plan.title}", ""]
        for metric in (plan.metric, *plan.also):
            lines += [f"## {plan.names.get(metric, metric)}", ""] if plan.also else []
            lines += self._tables(metric)
        lines += self._cost_table() if plan.costs else []
        lines += self._open_ends()
        return "\n".join(lines) + "\n"

    def _tables(self, metric: str) -> list[str]:
        plan = self.plan
        mode = plan.mode_of(metric)
        rows, grid = self.rows, self.grid
        entries = self.entries(metric)
        digits = count_digits(entries.values())
        heads = [setting_label(s) or metric for s in grid]
        seeds = ", ".join(map(str, plan.seeds))
        lines = [f"`{metric}` (neither more nor less is better), mean ± std over seeds {seeds}."]
        if mode != "none":
            better = "higher" if mode == "max" else "lower"
            lines = [
                f"`{metric}` ({better} is better), mean ± std over seeds {seeds}, best in bold."
            ]
        base = plan.methods[plan.baseline].label if plan.baseline else ""
        if base and mode != "none":
            lines[-1] += f" {_caption(base, entries.values())}"
        if plan.tune:
            tried = " × ".join(f"{a} {{{', '.join(v)}}}" for a, v in plan.tune.grid.items())
            lines[-1] += (
                f" Each method and seed has the training of {tried} with the best "
                f"`{plan.tune.metric}`."
            )
        body = [
            [m.label, *(_format_entry(entries[m.id, s], digits, len(plan.seeds)) for s in grid)]
            for m in rows.values()
        ]
        body += [
            [plan.names.get(name, name), *(self._size(metric, name, s) for s in grid)]
            for name in plan.sizes
        ]
        lines += ["", *_table(["method", *heads], body)]
        body = [
            [m.label, *(_difference(entries[m.id, s].paired, digits) for s in grid)]
            for m in rows.values()
            if m.id != plan.baseline
        ]
        if base and body:
            lines += ["", f"Difference to {base}, mean ± standard error over common seeds:", ""]
            lines += _table(["method", *heads], body)
        return [*lines, ""]

    def _cost_table(self) -> list[str]:
        plan = self.plan
        body = [
            [method.label, *(_range(self.costs(method.id, name)) for name in plan.costs)]
            for method in self.rows.values()
        ]
        lines = ["What a training spends, mean over settings and seeds (lowest to highest):", ""]
        return [*lines, *_table(["method", *(plan.names.get(c, c) for c in plan.costs)], body), ""]

    def costs(self, method: str, name: str) -> list[float]:
        """A metric of all finished trials of a method."""
        return [v for setting in self.grid for v in self.values(method, setting, name).values()]

    def _size(self, metric: str, name: str, setting: Setting) -> str:
        """What a setting was measured on: one number, or from which to which over all methods."""
        beside = f"{metric.rpartition('/')[0]}/{name}"
        sizes = [v for m in self.rows for v in self.values(m, setting, beside).values()]
        return " to ".join(f"{v:g}" for v in sorted({min(sizes), max(sizes)})) if sizes else "–"

    def _open_ends(self) -> list[str]:
        ids, failed = self.plan.trial_ids, self.failed
        missing = {*ids} - self.results.keys() - self.failures.keys() - self.unreadable
        lines = [f"{len(self.results)} of {len(ids)} cells finished."]
        recorded = {name for record in self.results.values() for name in record["metrics"]}
        unknown = [f"`{m}`" for m in (*self.plan.also, *self.plan.costs) if m not in recorded]
        if recorded and unknown:  # such as one that is misspelt
            names = ", ".join(f"`{name}`" for name in sorted(recorded))
            lines += ["", f"No cell has {', '.join(unknown)}; they have {names}."]
        if failed:
            lines += ["", "Failed (logs under `failed/`; `--retry-failed` runs them again):", ""]
            lines += [f"- `{i}`: {self.failures[i]['error']}" for i in failed]
        if self.unreadable:
            names = ", ".join(f"`{name}`" for name in sorted(self.unreadable))
            lines += ["", f"Records that are damaged or something else, left out: {names}."]
        if missing:
            lines += ["", f"Not run: {len(missing)}."]
            if absent := [m.label for m in self.plan.rows.values() if m.id not in self.rows]:
                lines[-1] += f" Methods without any cell: {', '.join(absent)}."
        return lines


def _caption(base: str, entries: Iterable[Entry]) -> str:
    """What the marks of a table mean."""
    counts = [e.paired.n for e in entries if e.paired and not math.isnan(e.p_adjusted)]
    if not counts:
        return (
            f"Nothing is tested against {base}: that takes {LEAST_SEEDS} common seeds with "
            "differences that vary."
        )
    level = f"{LEVEL * 100:.0f} %"
    needs = ", ".join(f"|t| > {quantile(n):.2f} at n = {n}" for n in sorted({*counts}))
    return (
        f"▲ better and ▼ worse than {base}: paired t-test over the seeds at {level} ({needs} for "
        f"one comparison alone) with Holm's correction over the {len(counts)} comparisons of the "
        f"table; ≈ not shown to differ; no mark: not tested, below {LEAST_SEEDS} common seeds, "
        "without spread, or not finite."
    )


def count_digits(entries: Iterable[Entry]) -> int:
    """How many decimals the means of a table need for four digits of the largest."""
    means = [entry.mean_std.mean for entry in entries]
    largest = max((abs(m) for m in means if math.isfinite(m) and m), default=1.0)
    return max(0, 3 - math.floor(math.log10(largest)))


def _format_entry(entry: Entry, digits: int, seeds: int) -> str:
    values = entry.mean_std
    if not values.n:
        return "–"
    text = f"{values.mean:.{digits}f}"
    if values.n > 1:
        text += f" ± {values.std:.{digits}f}"
    text = f"**{text}**" if entry.best else text
    text += f" (n={values.n})" if values.n < seeds else ""
    return f"{text} {MARKS[entry.verdict]}".strip()


def _range(values: Sequence[float]) -> str:
    """Mean of values, and where they differ the lowest and highest.

    >>> _range([2.0, 2.0]), _range([1e6, 3.5e6]), _range([])
    ('2', '2.25 M (1 M to 3.5 M)', '–')
    """
    if not values:
        return "–"
    mean, low, high = (_short(v) for v in (statistics.fmean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def _short(value: float) -> str:
    """A number with three digits, and a letter for millions and more."""
    for size, letter in ((1e12, " T"), (1e9, " G"), (1e6, " M")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _difference(difference: Paired | None, digits: int) -> str:
    if difference is None or not difference.n:
        return "–"
    error = "" if math.isnan(difference.error) else f" ± {difference.error:.{digits}f}"
    return f"{difference.mean:+.{digits}f}{error} (n={difference.n})"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---", *(["---:"] * (len(head) - 1))], *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
