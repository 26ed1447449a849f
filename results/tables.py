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
import json
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


Cell = tuple[str, str]  # label of the row, head of the column
SHOWN = ("mean", "mean_std", "percent", "range", "text", "count")


@dataclass(frozen=True)
class Column:
    """What one column shows.

    Args:
        metric: Column of the record, or several, shown with " / " between; the empty word for
            ``count``.
        where: Values that the record's rows must have, by column of the record; of a list, one.
        scale: Factor of the values, such as 100 for per cent.
        digits: Decimals.
        show: ``mean`` alone, ``mean_std``, ``percent`` (mean with its sign), ``range`` over seeds;
            ``text``, the record's own digits without quartiles; ``count``, how many rows match.
        best: ``max`` or ``min``: the best mean is bold; the empty word for none.
        tested: Whether differences to the table's baseline are tested in this column.
        absent: Whether a value of ``where`` may be in no row of the record, as in a count of 0.
    """

    metric: str | Sequence[str] = ""
    where: Mapping[str, Any] = field(default_factory=dict)
    scale: float = 1.0
    digits: int = 1
    show: str = "mean_std"
    best: str = ""
    tested: bool = True
    absent: bool = False

    def __post_init__(self) -> None:
        """Refuse words that mean nothing here."""
        if self.show not in SHOWN:
            raise ValueError(f"show: {self.show!r} is not one of {', '.join(SHOWN)}")
        if (self.show == "count") == bool(self.metric):
            raise ValueError("show: only count has no metric, and needs none")
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
        record: The CSV file with one row for each training or test; or the JSON file (a list of
            flat objects) or the first Markdown table of a benchmark.
        head: Head of the first column.
        rows: By label, what the record's rows must have; a word alone is a method. ``metric`` is
            what the row shows in all columns that name none.
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

    def resolve_cells(self) -> dict[tuple[str, str], Column]:
        """Each cell by label and head: the column with what the row and all cells share."""
        cells = {}
        for label, named in self.rows.items():
            row = {"method": named} if isinstance(named, str) else dict(named)
            of_row = {"metric": row.pop("metric")} if "metric" in row else {}
            for head, spec in self.columns.items():
                options = {**self.every, **of_row, **spec}
                layers = (self.where, row, self.every.get("where", {}), spec.get("where", {}))
                options["where"] = {key: value for one in layers for key, value in one.items()}
                cells[label, head] = Column(**options)
        return cells


def render(table: Table, folder: Path) -> str:
    """The Markdown of a table.

    Args:
        table: What to show.
        folder: Where its record is.

    Raises:
        ValueError: A cell has no value in the record.
    """
    record = read_record(folder / table.record)
    cells = table.resolve_cells()
    words = {key: cell for key, cell in cells.items() if cell.show in ("text", "count")}
    texts = {key: _words(record, cell) for key, cell in words.items()}
    values = {
        key: [_values(record, metric, cell.where) for metric in cell.metrics]
        for key, cell in cells.items()
        if key not in words
    }
    texts |= {key: _text(cells[key], by_seed, key) for key, by_seed in values.items()}
    for key in _best_cells(cells, values):
        texts[key] = f"**{texts[key]}**"
    marks = _marks(table, {key: one for key, one in values.items() if cells[key].tested})
    lines = [f"| {table.head} | " + " | ".join(table.columns) + " |"]
    lines.append("|---|" + "---:|" * len(table.columns))
    for label in table.rows:
        row = [texts[label, head] + marks.get((label, head), "") for head in table.columns]
        lines.append(f"| {label} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def _best_cells(
    cells: Mapping[Cell, Column], values: Mapping[Cell, Sequence[Mapping[int, float]]]
) -> list[Cell]:
    """Cells whose mean, as it is printed, is the best of their column."""
    means: dict[str, dict[Cell, float]] = {}
    for key, (by_seed, *_) in values.items():
        cell = cells[key]
        if cell.best and by_seed:
            mean = round(mean_std(list(by_seed.values())).mean * cell.scale, cell.digits)
            means.setdefault(key[1], {})[key] = mean
    best = []
    for by_cell in means.values():
        first = next(iter(by_cell))
        extreme = (max if cells[first].best == "max" else min)(by_cell.values())
        best += [key for key, mean in by_cell.items() if mean == extreme]
    return best


def read_record(path: Path) -> list[dict[str, str]]:
    """The rows of a record, all values as text.

    Raises:
        ValueError: The file is no CSV, JSON or Markdown, or holds no rows.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        rows = list(csv.DictReader(text.splitlines()))
    elif path.suffix == ".json":
        rows = [{key: str(value) for key, value in row.items()} for row in json.loads(text)]
    elif path.suffix == ".md":
        lines = [line for line in text.splitlines() if line.startswith("|")]
        split = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        rows = [dict(zip(split[0], cells, strict=True)) for cells in split[2:]]
    else:
        raise ValueError(f"{path.name} is no .csv, .json or .md")
    if not rows:
        raise ValueError(f"{path.name} holds no rows")
    return rows


def _matching(
    record: Sequence[Mapping[str, str]], where: Mapping[str, Any], absent: bool = False
) -> list[Mapping[str, str]]:
    """The rows that have all values; a list of values stands for any of them."""
    allowed = {
        name: {str(one) for one in value} if isinstance(value, list) else {str(value)}
        for name, value in where.items()
    }
    unknown = [name for name in allowed if name not in record[0]]
    if unknown:
        raise ValueError(f"the record has no column {unknown[0]!r}")
    for name, values in allowed.items():
        if not absent and (missing := values - {row[name] for row in record}):
            raise ValueError(f"the record has no {name} {sorted(missing)[0]!r}")
    return [row for row in record if all(row[name] in allowed[name] for name in allowed)]


def _words(record: Sequence[Mapping[str, str]], column: Column) -> str:
    """How many rows match, or what the one that matches says without its quartiles."""
    rows = _matching(record, column.where, column.absent)
    if column.show == "count":
        return str(len(rows))
    if len(rows) > 1:
        raise ValueError(f"several rows match {dict(column.where)}")
    if not rows:  # such as a pass that the benchmark does not have
        return "–"
    return " / ".join(rows[0][metric].partition(" [")[0] for metric in column.metrics)


def _values(
    record: Sequence[Mapping[str, str]], metric: str, where: Mapping[str, Any]
) -> dict[int, float]:
    """Values by seed of the rows that match."""
    values: dict[int, float] = {}
    if metric not in record[0]:
        raise ValueError(f"the record has no column {metric!r}")
    for row in _matching(record, where):
        if row[metric]:
            seed = int(row.get("seed") or 0)
            if seed in values:
                raise ValueError(f"{metric}: several rows of seed {seed} match {dict(where)}")
            values[seed] = float(row[metric])
    return values


def _text(column: Column, values: Sequence[Mapping[int, float]], key: Cell) -> str:
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


def _marks(table: Table, cells: Mapping[Cell, Sequence[Mapping[int, float]]]) -> dict[Cell, str]:
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
