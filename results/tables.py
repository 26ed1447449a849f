"""Render the published tables from their records.

``python results/tables.py`` writes each table of ``results/<system>/tables.yaml`` into the pages
that name it, between ``<!-- table: <system>/<name> -->`` and ``<!-- end of table -->``; with
``--check`` it writes nothing and says which pages differ. ``results/README.md`` tells what an
entry holds.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from fulgurite.compare.stats import holm, mean_std, paired

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "models/*/README.md", "docs/**/*.md")
_TABLE = re.compile(
    r"^(?P<indent> *)<!-- table: (?P<name>\S+) -->\n(?P<body>.*?)^ *<!-- end of table -->$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Column:
    """What one column shows.

    Args:
        metric: Column of the record, or several, shown with " / " between.
        where: Values that the record's rows must have, by column of the record.
        scale: Factor of the values, such as 100 for per cent.
        digits: Decimals.
        show: ``mean`` alone, ``mean_std``, ``percent`` (mean with its sign), ``range`` over seeds.
        best: ``max`` or ``min``: the best mean is bold; the empty word for none.
        tested: Whether differences to the table's baseline are tested in this column.
    """

    metric: str | Sequence[str]
    where: Mapping[str, Any] = field(default_factory=dict)
    scale: float = 1.0
    digits: int = 1
    show: str = "mean_std"
    best: str = ""
    tested: bool = True

    def __post_init__(self) -> None:
        """Refuse words that mean nothing here."""
        if self.show not in ("mean", "mean_std", "percent", "range"):
            raise ValueError(f"show: {self.show!r} is not mean, mean_std, percent or range")
        if self.best not in ("", "max", "min"):
            raise ValueError(f"best: {self.best!r} is not max or min")

    @property
    def metrics(self) -> Sequence[str]:
        """The metrics that a cell shows."""
        return [self.metric] if isinstance(self.metric, str) else self.metric


@dataclass(frozen=True)
class Table:
    """One table.

    Args:
        record: The CSV file with one row for each training or test.
        head: Head of the first column.
        rows: By label, what the record's rows must have; a word alone is a method.
        columns: By head, a :class:`Column`; what all share stands in ``every``.
        every: Values of all columns that do not say otherwise.
        where: What the record's rows must have for every cell.
        baseline: Row against which ▲ and ▼ mark significant differences (paired t-test at 95 %,
            Holm over the table).
        mode: ``max`` where more is better, else ``min``.
    """

    record: str
    rows: Mapping[str, str | Mapping[str, Any]]
    columns: Mapping[str, Mapping[str, Any]]
    head: str = "method"
    every: Mapping[str, Any] = field(default_factory=dict)
    where: Mapping[str, Any] = field(default_factory=dict)
    baseline: str | None = None
    mode: str = "max"

    @classmethod
    def from_mapping(cls, name: str, entry: Mapping[str, Any]) -> Table:
        """Read an entry of ``tables.yaml``.

        Raises:
            ValueError: A key is unknown, or one is missing.
        """
        unknown = entry.keys() - {known.name for known in fields(cls)}
        missing = {"record", "rows", "columns"} - entry.keys()
        if unknown or missing:
            raise ValueError(f"{name}: unknown {sorted(unknown)}, missing {sorted(missing)}")
        return cls(**entry)

    def resolve_columns(self) -> dict[str, Column]:
        """Each column with what all share filled in."""
        shared_where = self.every.get("where", {})
        return {
            head: Column(
                **{**self.every, **spec, "where": {**shared_where, **spec.get("where", {})}}
            )
            for head, spec in self.columns.items()
        }

    def resolve_rows(self) -> dict[str, dict[str, Any]]:
        """What the record's rows must have, by label."""
        return {
            label: {"method": row} if isinstance(row, str) else dict(row)
            for label, row in self.rows.items()
        }


def render(table: Table, folder: Path) -> str:
    """The Markdown of a table.

    Args:
        table: What to show.
        folder: Where its record is.

    Raises:
        ValueError: A cell has no value in the record.
    """
    with (folder / table.record).open(encoding="utf-8", newline="") as file:
        record = list(csv.DictReader(file))
    columns = table.resolve_columns()
    cells = {
        (label, head): [
            _values(record, metric, {**table.where, **row, **column.where})
            for metric in column.metrics
        ]
        for label, row in table.resolve_rows().items()
        for head, column in columns.items()
    }
    tested = {key: values for key, values in cells.items() if columns[key[1]].tested}
    marks = _marks(table, tested)
    texts = {key: _text(columns[key[1]], values, key) for key, values in cells.items()}
    for head, column in columns.items():
        by_label = {label: cells[label, head][0] for label in table.rows}
        for label in _best_labels(column, by_label):
            texts[label, head] = f"**{texts[label, head]}**"
    lines = [f"| {table.head} | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for label in table.rows:
        row = [texts[label, head] + marks.get((label, head), "") for head in columns]
        lines.append(f"| {label} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def _best_labels(column: Column, by_label: Mapping[str, Mapping[int, float]]) -> list[str]:
    """Rows whose mean, as it is printed, is the best of the column."""
    if not column.best:
        return []
    means = {
        label: round(mean_std(list(values.values())).mean * column.scale, column.digits)
        for label, values in by_label.items()
        if values
    }
    best = (max if column.best == "max" else min)(means.values())
    return [label for label, mean in means.items() if mean == best]


def _values(
    record: Sequence[Mapping[str, str]], metric: str, where: Mapping[str, Any]
) -> dict[int, float]:
    """Values by seed of the rows that match."""
    values: dict[int, float] = {}
    for row in record:
        unknown = [name for name in (*where, metric) if name not in row]
        if unknown:
            raise ValueError(f"the record has no column {unknown[0]!r}")
        if all(row[name] == str(value) for name, value in where.items()) and row[metric]:
            seed = int(row.get("seed") or 0)
            if seed in values:
                raise ValueError(f"{metric}: several rows of seed {seed} match {dict(where)}")
            values[seed] = float(row[metric])
    return values


def _text(column: Column, values: Sequence[Mapping[int, float]], key: tuple[str, str]) -> str:
    if not any(values):
        if column.show in ("mean_std", "percent"):  # such as intervals of a method without any
            return ""
        raise ValueError(f"no value for {key[0]!r} in column {key[1]!r}")
    return " / ".join(_one(column, list(by_seed.values())) for by_seed in values)


def _one(column: Column, values: Sequence[float]) -> str:
    scaled = [value * column.scale for value in values]
    summary = mean_std(scaled)
    mean = _number(summary.mean, column.digits)
    if column.show == "percent":
        return f"{mean} %"
    if column.show == "range" and min(scaled) != max(scaled):
        return f"{_number(min(scaled), column.digits)} to {_number(max(scaled), column.digits)}"
    if column.show == "mean_std" and summary.n > 1:
        text = f"{mean} ± {summary.std:.{column.digits}f}"
        return text if any(digit in text for digit in "123456789") else "0"
    return mean


def _number(value: float, digits: int) -> str:
    text = f"{value:,.{digits}f}"
    return text.replace("-", "−") if float(text.replace(",", "")) else "0"


def _marks(
    table: Table, cells: Mapping[tuple[str, str], Sequence[Mapping[int, float]]]
) -> dict[tuple[str, str], str]:
    """▲ or ▼ of each cell that differs significantly from the baseline in its column."""
    if table.baseline is None:
        return {}
    differences = {
        (label, head): paired(values[0], cells[table.baseline, head][0], mode=table.mode)
        for (label, head), values in cells.items()
        if label != table.baseline
    }
    adjusted = holm({key: difference.p for key, difference in differences.items()})
    signs = {"beats": " ▲", "loses": " ▼"}
    return {
        key: signs[verdict]
        for key, difference in differences.items()
        if (verdict := difference.verdict(adjusted[key])) in signs
    }


def tables(root: Path = ROOT) -> dict[str, str]:
    """The Markdown of every table, by ``<system>/<name>``."""
    rendered = {}
    for path in sorted((root / "results").glob("*/tables.yaml")):
        for name, entry in yaml.safe_load(path.read_text(encoding="utf-8")).items():
            key = f"{path.parent.name}/{name}"
            try:
                rendered[key] = render(Table.from_mapping(key, entry), path.parent)
            except (ValueError, TypeError, KeyError, OSError) as error:
                raise ValueError(f"{key}: {error}") from error
    return rendered


def fill(text: str, rendered: Mapping[str, str]) -> str:
    """A page with each table that it names as rendered.

    Raises:
        ValueError: The page names a table that is in no ``tables.yaml``.
    """

    def replace(match: re.Match[str]) -> str:
        name, indent = match["name"], match["indent"]
        if name not in rendered:
            raise ValueError(f"no table {name}; there are {', '.join(sorted(rendered))}")
        body = "".join(indent + line for line in rendered[name].splitlines(keepends=True))
        return f"{indent}<!-- table: {name} -->\n{body}{indent}<!-- end of table -->"

    if text.count("<!-- table: ") != len(_TABLE.findall(text)):
        raise ValueError("a table has no end")
    return _TABLE.sub(replace, text)


def pages(root: Path = ROOT) -> list[Path]:
    """The pages that may name tables."""
    return sorted({path for pattern in PAGES for path in root.glob(pattern)})


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tables, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where a page differs"
    )
    options = parser.parse_args(argv)
    rendered = tables()
    differing = 0
    for path in pages():
        text = path.read_text(encoding="utf-8")
        filled = fill(text, rendered)
        if filled == text:
            continue
        differing += 1
        if options.check:
            name = str(path.relative_to(ROOT))
            diff = difflib.unified_diff(
                text.splitlines(), filled.splitlines(), name, "records", n=0, lineterm=""
            )
            print("\n".join(diff))
        else:
            path.write_text(filled, encoding="utf-8")
    return 1 if options.check and differing else 0


if __name__ == "__main__":
    sys.exit(main())
