"""A comparison on disk: the plan, one JSON per finished cell, one per failed cell."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fulgurite.compare.plan import Plan, Setting, cell_id, read_plan, setting_label
from fulgurite.compare.stats import Paired, Spread, paired, spread
from fulgurite.errors import ConfigError

__all__ = ["PLAN_FILE", "Comparison", "Entry"]

PLAN_FILE = "comparison.yaml"
_MARKS = {"beats": "▲", "ties": "≈", "loses": "▼", "": ""}


@dataclass(frozen=True)
class Entry:
    """One place of the table: a method in a setting, over its seeds."""

    spread: Spread
    paired: Paired | None
    best: bool


@dataclass(frozen=True)
class Comparison:
    """Plan and records of a comparison.

    Args:
        plan: What was to be run.
        folder: Where the records lie.
        results: Record of each finished cell, by cell id.
        failures: Record of each failed cell, by cell id.
    """

    plan: Plan
    folder: Path
    results: Mapping[str, Mapping[str, Any]]
    failures: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, folder: Path, plan: Plan | None = None) -> Comparison:
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
        records = {
            kind: {path.stem: _record(path) for path in sorted((folder / kind).glob("*.json"))}
            for kind in ("results", "failed")
        }
        return cls(plan, folder, records["results"], records["failed"])

    def save_plan(self) -> None:
        """Write the plan, so that ``fulgurite report`` needs nothing but the folder."""
        text = yaml.safe_dump(self.plan.to_dict(), sort_keys=False, allow_unicode=True)
        (self.folder / PLAN_FILE).write_text(text, encoding="utf-8")

    def values(self, method: str, setting: Setting, metric: str | None = None) -> dict[int, float]:
        """A metric by seed, of the finished cells; that of the plan by default."""
        metric = metric or self.plan.metric
        found = {}
        for seed in self.plan.seeds:
            record = self.results.get(cell_id(method, setting, seed))
            if record is not None and metric in record["metrics"]:
                found[seed] = float(record["metrics"][metric])
        return found

    def entry(self, method: str, setting: Setting, metric: str | None = None) -> Entry:
        """Statistics of one place of the table."""
        values = {m: self.values(m, setting, metric) for m in self.plan.rows}
        sign = 1.0 if self.plan.mode == "max" else -1.0
        means = {m: sign * spread(list(v.values())).mean for m, v in values.items()}
        real = [mean for mean in means.values() if not math.isnan(mean)]
        against = None
        if self.plan.baseline is not None and method != self.plan.baseline:
            against = paired(values[method], values[self.plan.baseline], mode=self.plan.mode)
        best = bool(real) and means[method] == max(real)
        return Entry(spread(list(values[method].values())), against, best)

    def markdown(self) -> str:
        """The tables: means, and paired differences to the baseline."""
        plan = self.plan
        lines = [f"# {plan.title}", ""]
        for metric in (plan.metric, *plan.also):
            lines += [f"## {metric}", ""] if plan.also else []
            lines += self._tables(metric)
        lines += self._open_ends()
        return "\n".join(lines) + "\n"

    def _tables(self, metric: str) -> list[str]:
        plan = self.plan
        better = "higher" if plan.mode == "max" else "lower"
        entries = {(m, s): self.entry(m, s, metric) for m in plan.rows for s in plan.grid}
        digits = _digits(e.spread.mean for e in entries.values())
        heads = [setting_label(s) or metric for s in plan.grid]
        seeds = ", ".join(map(str, plan.seeds))
        lines = [f"`{metric}` ({better} is better), mean ± std over seeds {seeds}, best in bold."]
        base = plan.methods[plan.baseline].label if plan.baseline else ""
        if base:
            lines[-1] += (
                f" Against {base}, paired by seed: ▲ better, ▼ worse by more than two standard"
                " errors, ≈ within two."
            )
        if plan.tune:
            tried = " × ".join(f"{a} {{{', '.join(v)}}}" for a, v in plan.tune.grid.items())
            lines[-1] += (
                f" Each method and seed has the training of {tried} with the best "
                f"`{plan.tune.metric}`."
            )
        rows = [
            [m.label, *(_place(entries[m.id, s], digits, len(plan.seeds)) for s in plan.grid)]
            for m in plan.rows.values()
        ]
        lines += ["", *_table(["method", *heads], rows)]
        if base:
            rows = [
                [m.label, *(_difference(entries[m.id, s].paired, digits) for s in plan.grid)]
                for m in plan.rows.values()
                if m.id != plan.baseline
            ]
            lines += ["", f"Difference to {base}, mean ± standard error over common seeds:", ""]
            lines += _table(["method", *heads], rows)
        return [*lines, ""]

    def _open_ends(self) -> list[str]:
        ids = [
            cell_id(m, s, seed)
            for m in self.plan.rows
            for s in self.plan.grid
            for seed in self.plan.seeds
        ]
        failed = [i for i in ids if i in self.failures and i not in self.results]
        missing = [i for i in ids if i not in self.results and i not in self.failures]
        lines = [f"{sum(i in self.results for i in ids)} of {len(ids)} cells finished."]
        if failed:
            lines += ["", "Failed (logs under `failed/`):", ""]
            lines += [f"- `{i}`: {self.failures[i]['error']}" for i in failed]
        if missing:
            lines += ["", f"Not run: {len(missing)}."]
        return lines


def _record(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def _digits(means: Any) -> int:
    largest = max((abs(m) for m in means if not math.isnan(m) and m), default=1.0)
    return max(0, 3 - math.floor(math.log10(largest)))


def _place(entry: Entry, digits: int, seeds: int) -> str:
    values = entry.spread
    if not values.n:
        return "–"
    text = f"{values.mean:.{digits}f}"
    if values.n > 1:
        text += f" ± {values.std:.{digits}f}"
    text = f"**{text}**" if entry.best else text
    text += f" (n={values.n})" if values.n < seeds else ""
    mark = _MARKS[entry.paired.verdict] if entry.paired else ""
    return f"{text} {mark}".strip()


def _difference(difference: Paired | None, digits: int) -> str:
    if difference is None or not difference.n:
        return "–"
    error = "" if math.isnan(difference.error) else f" ± {difference.error:.{digits}f}"
    return f"{difference.mean:+.{digits}f}{error} (n={difference.n})"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---", *(["---:"] * (len(head) - 1))], *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
