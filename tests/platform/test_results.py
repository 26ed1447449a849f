"""Published tables come from committed records."""

from __future__ import annotations

import csv
import importlib.util
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from fakes.repository import ROOT


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("result_tables", ROOT / "results" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A record of two methods and two settings over three seeds."""
    values = {
        "fedavg": {"0.5": [0.50, 0.60, 0.70], "0.9": [0.10, 0.20, 0.30]},
        "fedsir": {"0.5": [0.51, 0.60, 0.69], "0.9": [0.60, 0.701, 0.80]},
    }
    rows: list[list[Any]] = [["method", "p", "seed", "test/acc", "cost/rounds"]]
    for method, by_rate in values.items():
        for rate, accuracies in by_rate.items():
            rows += [[method, rate, s, acc, 20 + s] for s, acc in enumerate(accuracies)]
    random.Random(0).shuffle(body := rows[1:])
    with (tmp_path / "compare.csv").open("w", newline="") as file:
        csv.writer(file).writerows([rows[0], *body])
    return tmp_path


TABLE: dict[str, Any] = {
    "record": "compare.csv",
    "baseline": "FedAvg",
    "rows": {
        "FedAvg": "fedavg",
        "FedSIR": "fedsir",
        "FedSIR, seed 1": {"method": "fedsir", "seed": 1},
    },
    "every": {"metric": "test/acc", "scale": 100},
    "columns": {
        "p = 0.5": {"where": {"p": 0.5}},
        "p = 0.9": {"where": {"p": 0.9}, "best": "max"},
        "rounds": {
            "metric": "cost/rounds",
            "where": {"p": 0.9},
            "scale": 1,
            "digits": 0,
            "show": "range",
            "tested": False,
        },
    },
}


def test_cells_are_means_over_seeds_with_marks_of_paired_tests(
    tables: ModuleType, folder: Path
) -> None:
    text = tables.render(tables.Table.from_mapping("x", TABLE), folder)
    assert text.splitlines() == [
        "| method | p = 0.5 | p = 0.9 | rounds |",
        "|---|---:|---:|---:|",
        "| FedAvg | 60.0 ± 10.0 | 20.0 ± 10.0 | 20 to 22 |",
        "| FedSIR | 60.0 ± 9.0 | 70.0 ± 10.0 ▲ | 20 to 22 |",
        "| FedSIR, seed 1 | 60.0 | **70.1** | 21 |",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colums": {}}, "unknown .*colums"),
        ({"where": {"alpha": 0.5}}, "no column 'alpha'"),
        ({"columns": {"f1": {"metric": "test/f1"}}}, "no column 'test/f1'"),
        ({"columns": {"all": {}}}, "several rows of seed"),
        ({"columns": {"p": {"where": {"p": 0.5}, "show": "median"}}}, "median"),
        ({"columns": {"p": {"where": {"p": 0.3}, "show": "mean"}}}, "the record has no p '0.3'"),
        ({"columns": {"p": {"metric": "", "show": "mean"}}}, "only count has no metric"),
        ({"columns": {"all": {"show": "text"}}}, "several rows match"),
    ],
)
def test_a_table_that_its_record_cannot_fill_is_refused(
    tables: ModuleType, folder: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tables.render(tables.Table.from_mapping("x", TABLE | change), folder)


MARKDOWN = """# A benchmark

| pass | mask | time |
| --- | --- | --- |
| forward | plain | 1 [1, 1] |
| forward | causal | 0.646 [0.645, 0.648] |
| backward | plain | 2 [1.9, 2.1] |

Text.
"""


def test_a_table_may_quote_the_table_of_a_benchmark_and_count_its_rows(
    tables: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "masks.md").write_text(MARKDOWN)
    entry: dict[str, Any] = {
        "record": "masks.md",
        "rows": {"causal": {"mask": "causal"}, "any": {"mask": ["plain", "causal"]}},
        "columns": {
            "forward": {"where": {"pass": "forward"}},
            "neither": {"where": {"pass": "sideways"}, "absent": True},
        },
        "every": {"show": "count"},
    }
    counted = tables.render(tables.Table.from_mapping("x", entry), tmp_path)
    assert counted.splitlines()[2:] == ["| causal | 1 | 0 |", "| any | 2 | 0 |"]
    entry |= {
        "rows": {"causal": {"mask": "causal", "metric": "time"}},
        "columns": {
            "forward": {"where": {"pass": "forward"}},
            "backward": {"where": {"pass": "backward"}},
        },
        "every": {"show": "text"},
    }
    quoted = tables.render(tables.Table.from_mapping("x", entry), tmp_path)
    assert quoted.splitlines()[2:] == ["| causal | 0.646 | – |"]


def test_pages_show_what_their_records_say() -> None:
    """What ``make tables`` would change: nothing."""
    done = subprocess.run(
        [sys.executable, "results/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_table_stands_in_a_page_and_each_record_in_a_table(tables: ModuleType) -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in tables.pages())
    for key in tables.tables():
        assert f"<!-- table: {key} -->" in text
    for path in (ROOT / "results").glob("*/tables.yaml"):
        used = {entry["record"] for entry in yaml.safe_load(path.read_text()).values()}
        assert {file.name for file in path.parent.glob("*.csv")} <= used


def test_each_record_tells_how_it_was_made() -> None:
    for path in (ROOT / "results").glob("*/tables.yaml"):
        records = yaml.safe_load((path.parent / "records.yaml").read_text(encoding="utf-8"))
        used = {entry["record"] for entry in yaml.safe_load(path.read_text()).values()}
        assert set(records) == used
        for name, record in records.items():
            assert (path.parent / name).is_file()
            assert {"command", "commit", "seeds", "machine"} <= record.keys()
            assert record["command"].startswith(("fulgurite ", "python "))


def test_a_page_that_names_an_unknown_table_is_refused(tables: ModuleType) -> None:
    page = "<!-- table: fedsir/nothing -->\n<!-- end of table -->\n"
    with pytest.raises(ValueError, match="no table fedsir/nothing; there are"):
        tables.fill(page, {"fedsir/demo": "| a |\n"})
    with pytest.raises(ValueError, match="no end"):
        tables.fill("<!-- table: fedsir/demo -->\n", {"fedsir/demo": "| a |\n"})
