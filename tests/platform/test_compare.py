"""The comparison: its file, its workers, its records and its statistics."""

import csv
import datetime
import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from fakes.comparison import FILE, SHARED, go, runs, write
from fakes.runs import wait_until
from scipy import stats

from fulgurite import compare, systems
from fulgurite.compare.command import main
from fulgurite.compare.devices import device_groups, visible_devices
from fulgurite.compare.plan_file import read_plan
from fulgurite.compare.records import read_record
from fulgurite.compare.stats import holm, mean_std, paired, quantile
from fulgurite.compare.trials import define_trials
from fulgurite.compare.worker import Job, execute_job
from fulgurite.errors import ConfigError
from fulgurite.plotting import new_figure


def test_equal_cells_run_once_and_have_the_same_result(place):
    methods = {**FILE["methods"], "a": {**FILE["methods"]["a"], "ignores": ["p"]}}
    file = write(place, methods=methods, seeds=[0, 1])
    comparison = go(file, only=["p=0.5", "seed=0"])  # the label that stands for the first
    assert len(comparison.results) == 3
    comparison = go(file)
    assert len(comparison.results) == 12
    fits = [name for command, name, *_ in runs(place) if command == "fit"]
    assert len(fits) == len({*fits}) == 12 - 2
    for seed in (0, 1):
        first, second = (
            comparison.results[f"a__p={p}__seed={seed}"] for p in ("0.25", "0.5")
        )  # fmt: skip
        assert first["metrics"] == second["metrics"]
        assert first["setting"] == {"p": "0.25"}
        assert second["setting"] == {"p": "0.5"}
    assert {*(place / "out" / "results").glob("*.json")} == {
        *(place / "out" / "results" / f"{name}.json" for name in comparison.results)
    }
    before = len(runs(place))
    go(file)
    assert len(runs(place)) == before


def test_equal_cells_fail_alike_and_each_keeps_a_log(place):
    trouble = {"method": "a", "trouble": "status"}
    methods = {**FILE["methods"], "a": {"args": trouble, "ignores": ["p"]}}
    comparison = go(write(place, methods=methods, seeds=[0]), only=["a"])
    assert sorted(comparison.failures) == ["a__p=0.25__seed=0", "a__p=0.5__seed=0"]
    for name in comparison.failures:
        assert "moon" in (place / "out" / "failed" / f"{name}.log").read_text()
    assert len([r for r in runs(place) if r[0] == "fit"]) == 1


def test_an_axis_that_is_not_there_cannot_be_ignored(place):
    methods = {**FILE["methods"], "a": {**FILE["methods"]["a"], "ignores": ["q"]}}
    with pytest.raises(ConfigError, match=r"methods\.a\.ignores names 'q'"):
        read_plan(write(place, methods=methods))


def test_what_a_method_sets_itself_holds_on_an_axis_that_it_ignores(place):
    methods = {"a": {"args": {"p": 0}, "ignores": ["p"]}, "b": {}}
    trials = define_trials(read_plan(write(place, methods=methods, baseline="a", quick={})))
    assert {o for t in trials if t.method == "a" for o in t.trainings[0].fit if "p=" in o} == {
        "--p=0"
    }


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"settings": {"seed": {"key": "p", "values": [1]}}}, "An axis is called 'seed'"),
        ({"tests": {"method": {"key": "q", "values": [1]}}}, "An axis is called 'method'"),
        ({"settings": {"p": {1: {"p": 1}, "1": {"p": 2}}}}, r"settings\.p has the label '1' twice"),
        (
            {"settings": {"p": {"<1": {"p": 1}, ">1": {"p": 2}}}},
            r"p=<1 and of \S+ p=>1 .* one fi",
        ),
        (
            {"settings": {**FILE["settings"], "q": {"x": {}, "y": {"p": 0}}}},
            r"settings\.p and settings\.q both set p",
        ),
        (
            {"tune": {"grid": {"rate": {"key": "p", "values": [1, 2]}}}},
            r"settings\.p and tune\.grid\.rate both set p",
        ),
        (
            {"methods": {"a": {"args": {"p": 0}}}},
            r"methods\.a\.args sets p, but each label of settings\.p",
        ),
        (
            {
                "methods": {"a": {"test_args": {"q": 0}}},
                "tests": {"q": {"key": "q", "values": [1, 2]}},
            },
            r"methods\.a\.test_args sets q, but each label of tests\.q",
        ),
        ({"args": {"seed_everything": 5}}, "args sets seed_everything, but seed_keys"),
        (
            {"settings": {"split": {"key": "seed_everything", "values": [1, 2]}}},
            r"settings\.split\.1 sets seed_everything, but seed_keys",
        ),
        ({"seed_keys": []}, "seed_keys is empty, so that 3 seeds would run the same"),
        ({"also": ["test/acc"]}, "also has 'test/acc', which has a table already"),
    ],
)
def test_what_would_count_in_no_cell_is_refused(place, changes, says):
    with pytest.raises(ConfigError, match=says):
        read_plan(write(place, **{"quick": {}, **changes}))


def test_the_small_form_may_select_the_label_that_sets_what_a_method_does(place):
    settings = {"p": {"low": {"p": 0.25}, "own": {}}}
    file = write(
        place,
        settings=settings,
        methods={"a": {"args": {"p": 0.5}}},
        quick={"settings": {"p": ["low"]}},
    )
    assert [*read_plan(file, quick=True).settings["p"]] == ["low"]


def test_the_small_form_may_compare_a_further_metric(place):
    file = write(
        place, also=["test/loss"], modes={"test/loss": "min"}, quick={"metric": "test/loss"}
    )
    plan = read_plan(file, quick=True)
    assert (plan.metric, plan.also, plan.mode_of(None)) == ("test/loss", (), "min")


def test_costs_have_a_table_of_their_own(place):
    names = {"train/loss": "spent"}
    comparison = go(write(place, costs=["train/loss"], names=names, seeds=[0]), only=["a", "b"])
    text = comparison.markdown()
    assert "| method | spent |\n| --- | ---: |\n| Method A | 0.5 |\n| Method B | 0.5 |" in text
    again = compare.Comparison.read(place / "out")
    assert again.plan.costs == ("train/loss",)


def test_a_metric_of_which_neither_more_nor_less_is_better_has_no_best(place):
    comparison = go(write(place, also=["train/loss"], modes={"train/loss": "none"}))
    head, _, loss = comparison.markdown().partition("## train/loss")
    assert "higher is better" in head
    assert "**" in head
    assert "`train/loss` (neither more nor less is better)" in loss
    assert not [mark for mark in ("**", "▲", "▼", "≈") if mark in loss]
    assert not any(e.best or e.verdict for e in comparison.entries("train/loss").values())
    assert compare.Comparison.read(place / "out").plan.modes == {"train/loss": "none"}
    lower = go(write(place, also=["train/loss"], modes={"train/loss": "min"}))
    assert "`train/loss` (lower is better)" in lower.markdown()


def test_grid_runs_once_and_is_rendered(place, capsys):
    comparison = go(write(place))
    assert len(comparison.results) == 18
    assert not comparison.failures
    out = place / "out"
    names = {p.name for p in out.iterdir()}
    assert names >= {
        "table.md",
        "table.csv",
        "summary.csv",
        "figure.png",
    }
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")
    # fit then test, in one folder, in at most two processes
    assert len(runs(place)) == 36
    assert len({pid for *_, pid in runs(place)}) == 2
    record = json.loads((out / "results" / "b__p=0.25__seed=1.json").read_text())
    assert record["metrics"] == {"train/loss": 0.5, "test/acc": pytest.approx(0.95 - 0.25 - 0.024)}
    assert record["commands"][0][0] == "fit"
    assert record["commands"][1][-2:] == ["--ckpt_path", "last"]
    assert "--p=0.25" in record["commands"][0]
    log = (out / "logs" / "b__p=0.25__seed=1.log").read_text()
    assert "hello from fit" in log
    assert "hello from a child" in log
    assert "hello" not in capsys.readouterr().out
    # nothing runs a second time, and the tables come back from the records alone
    before = (out / "table.md").read_text()
    (out / "table.md").unlink()
    go(write(place))
    assert len(runs(place)) == 36
    assert (out / "table.md").read_text() == before


def test_tables_agree_with_numpy(place):
    comparison = go(write(place))
    rows = list(csv.DictReader((place / "out" / "summary.csv").open()))
    cells = list(csv.DictReader((place / "out" / "table.csv").open()))
    assert len(cells) == 18
    assert {cell["status"] for cell in cells} == {"finished"}

    def values(method, p):
        found = {
            int(c["seed"]): float(c["test/acc"])
            for c in cells
            if (c["method"], c["p"]) == (method, p)
        }
        return np.array([found[s] for s in (0, 1, 2)])

    for row in rows:
        ours, base = values(row["method"], row["p"]), values("a", row["p"])
        assert float(row["mean"]) == pytest.approx(ours.mean())
        assert float(row["std"]) == pytest.approx(ours.std(ddof=1))
        if row["method"] == "a":
            assert row["difference"] == ""
            continue
        assert float(row["difference"]) == pytest.approx((ours - base).mean())
        assert float(row["difference_se"]) == pytest.approx(stats.sem(ours - base), abs=1e-12)
        p_value = float(row["p_value"])
        assert p_value == pytest.approx(stats.ttest_rel(ours, base).pvalue)
    tested = [row for row in rows if row["p_value"]]
    adjusted = holm_by_hand([float(row["p_value"]) for row in tested])
    assert [float(row["p_value_holm"]) for row in tested] == pytest.approx(adjusted)
    assert [row["verdict"] for row in tested] == ["beats", "beats", "loses", "loses"]
    text = comparison.markdown()
    assert "| Method B | **0.7080 ± 0.0302** ▲ | **0.4580 ± 0.0302** ▲ |" in text
    assert "| Method A | 0.6567 ± 0.0252 | 0.4067 ± 0.0252 |" in text
    assert "| c | 0.2560 ± 0.0226 ▼ |" in text
    assert "| Method B | +0.0513 ± 0.0029 (n=3) |" in text
    assert "paired t-test over the seeds at 95 %" in text
    assert "|t| > 4.30 at n = 3" in text
    assert "Holm's correction over the 4 comparisons" in text


def holm_by_hand(p_values):
    """Adjusted p-values as the paper says it: reject in order while p ≤ level / (m − i)."""
    order = np.argsort(p_values)
    adjusted = np.empty(len(p_values))
    for i, place in enumerate(order):
        smaller = [(len(p_values) - j) * p_values[order[j]] for j in range(i + 1)]
        adjusted[place] = min(1.0, max(smaller))
    return adjusted


def test_statistics_against_scipy():
    rng = np.random.default_rng(0)
    for n in (3, 4, 7):
        ours, base = rng.normal(size=n), rng.normal(size=n)
        assert mean_std([*ours]).mean == pytest.approx(ours.mean())
        assert mean_std([*ours]).std == pytest.approx(ours.std(ddof=1))
        found = paired(dict(enumerate(ours)), dict(enumerate(base)))
        assert found.mean / found.error == pytest.approx(stats.ttest_rel(ours, base).statistic)
        assert found.p == pytest.approx(stats.ttest_rel(ours, base).pvalue)
        assert quantile(n) == pytest.approx(stats.t.ppf(0.975, n - 1))


@pytest.mark.parametrize("scale", [1.0, 1e200, 1e307, 1e-200])
def test_numbers_of_any_size_have_a_mean_and_a_spread(scale):
    values = mean_std([1.0 * scale, 2.0 * scale, 3.0 * scale])
    assert (values.mean / scale, values.std / scale) == pytest.approx((2.0, 1.0))
    ours, base = ([v * scale for v in values] for values in ([1.0, 3.0, 2.5], [1.0, 2.0, 2.2]))
    found = paired(dict(enumerate(ours)), dict(enumerate(base)))
    assert found.p == pytest.approx(stats.ttest_rel([1.0, 3.0, 2.5], [1.0, 2.0, 2.2]).pvalue)


@pytest.mark.parametrize(
    ("losses", "mean"),
    [([math.inf, 0.2, 0.3], "inf"), ([math.inf, -math.inf, 0.3], "nan"), ([math.nan] * 3, "nan")],
)
def test_a_run_that_diverged_leaves_the_table_of_the_others(place, losses, mean):
    methods, also = {"a": {}, "b": {}}, {"also": ["test/los"], "costs": ["cost"]}
    plan = read_plan(write(place, settings={}, methods=methods, mode="min", **also))
    results = {
        f"{method}__seed={seed}": {"method": method, "setting": {}, "seed": seed, "seconds": 1.0}
        | {"metrics": {"test/acc": value}}
        for method, values in (("a", [0.1, 0.2, 0.4]), ("b", losses))
        for seed, value in enumerate(values)
    }
    comparison = compare.Comparison(plan, place / "out", results, {})
    compare.render(comparison)
    table = (place / "out" / "table.md").read_text()
    assert "No cell has `test/los`, `cost`; they have `test/acc`." in table
    assert "| a | **0.2333 ± 0.1528** |" in table
    assert f"| b | {mean} ± nan |" in table


def test_holm_by_a_published_example():
    # four tests at 5 %: 0.005 <= 0.05/4 and 0.01 <= 0.05/3 are kept, 0.03 > 0.05/2 ends it
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005, "absent": math.nan})
    tested = {name: p for name, p in adjusted.items() if name != "absent"}
    assert tested == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert math.isnan(adjusted["absent"])
    p_values = np.random.default_rng(1).uniform(size=20) ** 3
    assert [*holm(dict(enumerate(p_values))).values()] == pytest.approx(
        sorted(holm_by_hand(p_values))
    )


def test_a_table_of_nothing_has_few_marks():
    """At 95 % for the whole table, at most one table in twenty has any mark."""
    rng = np.random.default_rng(2)
    marked = 0
    for _ in range(400):
        table = {
            k: paired(dict(enumerate(rng.normal(size=3))), dict(enumerate(rng.normal(size=3))))
            for k in range(8)
        }
        adjusted = holm({k: difference.p for k, difference in table.items()})
        marked += any(table[k].verdict(adjusted[k]) != "ties" for k in table)
    assert marked / 400 < 0.08  # three standard errors of a twentieth above it


@pytest.mark.parametrize(
    ("ours", "mode", "verdict"),
    [
        ({0: 1.0, 1: 1.1, 2: 1.2}, "max", "beats"),
        ({0: 1.0, 1: 1.1, 2: 1.2}, "min", "loses"),
        ({0: 0.1, 1: -0.1, 2: 0.0}, "max", "ties"),
        ({0: 1.0, 1: 3.0, 2: 2.0}, "max", "ties"),  # 3.5 standard errors: not 4.3
        ({0: 0.0, 1: 0.0, 2: 0.0}, "max", "ties"),
        ({0: 1.0, 1: 1.1}, "max", ""),  # two seeds, however far
        ({0: 5.0}, "max", ""),
        ({7: 5.0}, "max", ""),
        ({0: 0.5, 1: 0.5, 2: 0.5}, "max", ""),  # the seeds change nothing
        ({0: math.nan, 1: 1.0, 2: 1.0}, "max", ""),
    ],
)
def test_verdicts(ours, mode, verdict):
    difference = paired(ours, {0: 0.0, 1: 0.0, 2: 0.0}, mode=mode)
    assert difference.verdict(difference.p) == verdict


def test_two_seeds_get_no_mark_and_the_caption_says_so(place):
    text = go(write(place, seeds=[0, 1])).markdown()
    assert not {"▲", "▼", "≈"} & {*text}
    assert "Nothing is tested against Method A: that takes 3 common seeds" in text


@pytest.mark.parametrize(
    ("trouble", "says"),
    [
        pytest.param("raise", "ValueError: the loss is a potato", marks=pytest.mark.slow),
        pytest.param("exit", "exit status 2", marks=pytest.mark.slow),
        pytest.param(
            "status", "exit status 3: The moon is made of cheese.", marks=pytest.mark.slow
        ),
        ("kill", "killed by SIGKILL"),
    ],
)
def test_a_failing_cell_harms_no_other(place, monkeypatch, trouble, says):
    bad = {"label": "bad", "args": {"method": "c", "trouble": trouble}}
    file = write(place, methods={**FILE["methods"], "c": bad}, seeds=[0, 1])
    comparison = go(file)
    assert len(comparison.results) == 8
    assert len(comparison.failures) == 4
    assert all(says in failure["error"] for failure in comparison.failures.values())
    failed = place / "out" / "failed"
    log = (failed / "c__p=0.25__seed=0.log").read_text()
    assert "hello from fit" in log
    assert trouble != "raise" or "Traceback" in log
    assert "- `c__p=0.25__seed=0`: " in comparison.markdown()
    # failed cells wait until they are asked for
    count = len(runs(place))
    monkeypatch.setenv("TROUBLE", "off")
    go(file)
    assert len(runs(place)) == count
    corrected = go(file, retry_failed=True)
    assert len(corrected.results) == 12
    assert not corrected.failures
    assert not list(failed.iterdir())


def test_secrets_are_masked_in_records_and_logs(place, monkeypatch):
    methods = {"a": {"args": {"method": "a", "token": "abc123", "trouble": "raise"}}}
    file = write(place, methods=methods, settings=None, args={"p": 0.5}, seeds=[0], quick=None)
    go(file)
    failed = [path.read_text() for path in Path("out").rglob("*.log")]
    assert any("--token=***" in text and "abc123" not in text for text in failed)
    monkeypatch.setenv("TROUBLE", "off")
    go(file, retry_failed=True)
    contents = {path.name: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    assert not [name for name, content in contents.items() if b"abc123" in content]
    assert b"--token=***" in contents["a__seed=0.json"]
    assert compare.Comparison.read(Path("out")).results
    with pytest.raises(ConfigError, match=r"methods\.a\.args\.token was masked when") as error:
        go("out/comparison.yaml", out="again")
    assert str(error.value.hint).endswith(f"fulgurite compare {place / 'compare.yaml'}")


def test_a_missing_metric_is_a_failure(place):
    comparison = go(write(place, metric="test/f1", seeds=[0]), only=["a", "p=0.5"])
    (failure,) = comparison.failures.values()
    assert "no metric 'test/f1'" in failure["error"]
    assert "test/acc" in failure["error"]


def test_a_killed_comparison_goes_on_where_it_was(place):
    file = write(place, args={"sleep": 0.2}, seeds=[0, 1])
    command = [sys.executable, "-m", "fulgurite", "compare", file, "--workers=2", "--out=out"]
    command += ["--runner=fake_runner:main"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        process.kill()
    assert "[3/12]" in lines[2]
    finished = {path.stem for path in (place / "out" / "results").glob("*.json")}
    assert len(finished) >= 3
    workers = {int(pid) for *_, pid in runs(place)}
    wait_until(lambda: not any(map(_alive, workers)), seconds=10)  # they end with their driver
    comparison = go(file)
    assert len(comparison.results) == 12
    fits = [name for command, name, *_ in runs(place) if command == "fit"]
    assert all(fits.count(name) == 1 for name in finished)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.slow  # a cell that kills its worker does, too
def test_a_worker_killed_from_outside_costs_one_cell(place):
    file = write(place, args={"sleep": 0.3}, seeds=[0])
    script = "import sys; from fulgurite.__main__ import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, "compare", file, "--workers=1", "--out=out"]
    command += ["--runner=fake_runner:main"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.1)
        os.kill(int(runs(place)[0][-1]), signal.SIGKILL)
        rest = process.stdout.read()
    assert process.returncode == 1
    assert "killed by SIGKILL" in rest
    assert len(list((place / "out" / "results").glob("*.json"))) == 5
    assert len({pid for *_, pid in runs(place)}) == 2


@pytest.mark.slow
def test_changed_definitions_run_again_and_unchanged_ones_do_not(place):
    file = write(place, seeds=[0])
    go(file)
    assert len(runs(place)) == 12
    go(write(place, seeds=[0, 1]))  # more seeds: the old cells stay
    assert len(runs(place)) == 24
    changed = {**FILE["methods"], "a": {"args": {"method": "a", "lr": 0.5}}}
    go(write(place, seeds=[0, 1], methods=changed))
    assert [name[0] for _, name, *_ in runs(place)[24:]] == ["a"] * 8
    assert len(list((place / "out" / "outdated").iterdir())) == 4
    (place / "base.yaml").write_text("# a comment\nmodel: some\n")
    go(write(place, seeds=[0, 1], methods=changed))
    assert len(runs(place)) == 32
    (place / "base.yaml").write_text("model: another\n")
    go(write(place, seeds=[0, 1], methods=changed))
    assert len(runs(place)) == 56


def test_only_quick_and_dry_run(place, capsys):
    file = write(place)
    options = ["--runner=fake_runner:main", "--workers=2", "--out=out"]
    only = ["--only", "a", "b", "--only", "p=0.5", "--only", "seed=1"]  # all of them count
    assert main([file, *options, "--dry-run", *only]) == 0
    lines = capsys.readouterr().out.splitlines()
    words = f"--config {place}/base.yaml --method=a --p=0.5 --seed_everything=1"
    words += f" --run.dir {place}/out/cells/a__p=0.5__seed=1"
    assert lines[:2] == [f"fulgurite fit {words}", f"fulgurite test {words} --ckpt_path last"]
    assert len(lines) == 4
    assert not (place / "out").exists()
    assert main([file, "--quick", *options]) == 0
    assert "2 of 2 cells finished" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="method=z"):
        go(file, only=["z"])


def would_run(file, capsys, *options, runner="fake_runner:main"):
    """The commands of a dry run, and what it says of the others."""
    capsys.readouterr()
    assert main([file, f"--runner={runner}", "--out=out", "--dry-run", *options]) == 0
    out, note = capsys.readouterr()
    return [line.split()[1] for line in out.splitlines()], note.strip()


def test_a_dry_run_lists_what_would_run(place, monkeypatch, capsys):
    one = {"settings": None, "seeds": [0], "args": {"p": 0.5}, "quick": None}
    methods = {"a": {"args": {"method": "a"}}, "b": {"args": {"method": "b", "trouble": "raise"}}}
    file = write(place, methods=methods, **one)
    assert would_run(file, capsys) == (["fit", "test"] * 2, "")
    go(file)
    note = "note: 2 of 2 cells have a result, failed, or equal another cell, and would not run."
    assert would_run(file, capsys) == ([], note)
    assert would_run(file, capsys, "--retry-failed") == (["fit", "test"], note.replace("2", "1", 1))
    methods["c"] = {"args": {"method": "a"}}  # which equals a
    methods["b"]["args"]["method"] = "c"
    assert would_run(write(place, methods=methods, **one), capsys)[0] == ["fit", "test"]
    (place / "base.yaml").write_text("model: other\n")
    assert len(would_run(file, capsys)[0]) == 4  # a and c run once
    go(file)
    (place / "base.yaml").write_text("model: some\n")
    assert would_run(file, capsys)[0] == ["fit", "test"]  # a's comes back from outdated/
    before = len(runs(place))
    go(file)
    assert len(runs(place)) == before + 1  # its fit fails


def test_a_dry_run_lists_trainings_once(place, shared, capsys):
    shared()
    assert would_run("compare.yaml", capsys, runner="shared_runner:main")[0] == []
    shared_file = write(
        place, **{**SHARED, "tests": {"shift": {"key": "shift", "values": [0, 1, 2, 3]}}}
    )
    assert would_run(shared_file, capsys, runner="shared_runner:main")[0] == ["test"] * 12


def test_two_comparisons_do_not_share_a_folder(place):
    import fcntl

    file = write(place)
    (place / "out").mkdir()
    with (place / "out" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="Another comparison"):
            go(file)


def test_later_layers_win_and_come_last(place):
    methods = {"m": {"args": {"model.method": "B", "model.method.x": 1, "q": [1, 2]}}}
    noise = {"none": {}, "half": {"p": 0.5, "q": None}}
    settings = {"noise": noise, "k": {"key": "k", "values": [1]}}
    file = write(
        place, methods=methods, settings=settings, args={"model.method": "A"}, baseline="m"
    )
    half = define_trials(read_plan(file))[1]
    assert half.id == "m__noise=half__k=1__seed=0"
    assert half.trainings[0].fit[2:] == (
        "--model.method=B",
        "--model.method.x=1",
        "--p=0.5",
        "--q=null",
        "--k=1",
        "--seed_everything=0",
    )


def test_quick_changes(place):
    quick = {
        "methods": {"b": {"args": {"rounds": 2}}},
        "settings": {"p": {"small": {"p": 0.1}}},
        "args": {"epochs": 1},
    }
    plan = read_plan(write(place, quick=quick), quick=True)
    assert plan.methods["b"].args == {"method": "b", "rounds": 2}
    assert plan.methods["b"].label == "Method B"
    assert plan.settings == {"p": {"small": {"p": 0.1}}}
    assert plan.args == {"epochs": 1}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"metods": {}}, "Did you mean 'methods'"),
        ({"methods": {"a": {"arg": {}}}}, "Did you mean 'args'"),
        ({"methods": {}}, "needs 'methods'"),
        ({"methods": {"a b": {}}}, "'a b'"),
        ({"methods": [1]}, "methods is not a mapping"),
        ({"baseline": "bb"}, "Did you mean 'b'"),
        ({"mode": "most"}, "mode is 'most'"),
        ({"after_fit": "fit"}, "after_fit is 'fit'"),
        ({"seeds": [1, 1]}, "seeds is"),
        ({"seeds": "three"}, "seeds is"),
        ({"seed_keys": "seed"}, "seed_keys is not a list"),
        ({"settings": {"p": {}}}, "settings.p has no values"),
        ({"settings": {"p": {"key": "p", "values": 3}}}, "settings.p.values"),
        ({"settings": {"p": {"x y": {"p": 1}, "x-y": {"p": 2}}}}, "would be one file"),
        ({"args": {"--lr": 1}}, "dotted"),
        ({"config": "bas.yaml"}, "bas.yaml"),
        ({"quick": {"sead": 1}}, "Did you mean 'seeds'"),
        ({"quick": {}}, "defines no small form of itself"),
        ({"quick": {"methods": ["zz"]}}, "quick.methods names 'zz'"),
        ({"quick": {"settings": {"p": [0.7]}}}, "quick.settings.p names '0.7'"),
        ({"quick": {"methods": ["b"]}}, "baseline 'a'"),
        ({"tests": {"p": {"key": "q", "values": [1]}}}, "'p' is both under settings and"),
        ({"tests": {"q": {}}}, r"tests\.q has no values"),
        ({"tune": {"grid": {}}}, "tune has no grid"),
        ({"tune": {"grids": {}}}, "Did you mean 'grid'"),
        ({"tune": {"mode": "least", "grid": {"q": {"x": {}}}}}, "tune.mode is 'least'"),
        ({"after_fit": None, "tests": {"q": {"x": {}}}}, "Nothing is evaluated after the fit"),
        ({"methods": {"a": {"after": {"z": "k"}}}}, "names 'z', which is no method"),
        ({"methods": {"a": {"after": {"b": "k", "c": "l"}}}}, "names 2 methods"),
        ({"methods": {"a": {}, "b": {"after": {"a": 3}}}}, r"b\.after\.a"),
        ({"methods": {"a": {}, "b": {"after": {"a": {"k": "../x"}}}}}, r"b\.after\.a is"),
        ({"methods": {"a": {}, "b": {"after": {"a": {"k": "x", "l": "y"}}}}}, r"b\.after\.a is"),
        ({"methods": {"a": {"after": {"b": "k"}}, "b": {"after": {"a": "k"}}}}, "in a circle"),
        ({"methods": {"a": {"listed": False}, "b": {}}}, "baseline 'a'"),
        ({"methods": {"a": {"listed": False}}, "baseline": None}, "No method is listed"),
        ({"methods": {"a": {"listed": "no"}}}, "a.listed is 'no'"),
        ({"methods": {"a": {"predict": ["x"]}}}, "a.predict is not a mapping"),
        ({"highlight": "bb"}, "highlight 'bb' is not one of the methods. Did you mean 'b'"),
        ({"names": {"q": "x"}}, "names has 'q'"),
        ({"modes": {"test/ac": "min"}, "also": ["test/accs"]}, "Did you mean 'test/accs'"),
        ({"modes": {"test/accs": "least"}, "also": ["test/accs"]}, "modes.test/accs is 'least'"),
        ({"modes": ["test/accs"], "also": ["test/accs"]}, "modes is not a mapping"),
        ({"names": {"p": 3}}, r"names\.p is 3"),
        ({"metric": ["a"]}, "metric is"),
        ({"baseline": ["a"]}, "baseline is"),
        ({"quick": {"methods": [["a"]]}}, "quick.methods names"),
        (
            {"quick": {"methods": {"b": {"args": ["x"]}}}},
            r"quick\.methods\.b\.args is not a mapping",
        ),
        ({"methods": {"a": {"listed": None}}}, "a.listed is None. Use true or false"),
        ({"metric": None}, "metric is None"),
        ({"quick": {"mode": "most"}}, "quick.mode is 'most'. Use max or min"),
    ],
)
def test_mistakes_in_the_file_are_one_clear_error(place, changes, says):
    with pytest.raises(ConfigError, match=says):
        define_trials(read_plan(write(place, **changes), quick="quick" in changes))


@pytest.fixture
def shared(place):
    return lambda **changes: go(
        write(place, **{**SHARED, **changes}), runner="shared_runner:main", retry_failed=True
    )


def checkpoint_of(comparison, method, seed):
    (record,) = {
        (tuple(r["commands"][0][-1:]), r["chosen"])
        for r in comparison.results.values()
        if r["method"] == method and r["seed"] == seed
    }
    return Path(record[0][0]).read_text(), record[1]


def test_tests_share_the_training_that_validation_chose(place, shared, capsys):
    comparison = shared()
    told = capsys.readouterr().out
    assert "erm seed=0, lr=0.01: done" in told
    assert "on_top seed=1, lr=0.1: val/acc 0.8" in told
    assert len(comparison.results) == 18
    counts = [line[0] for line in runs(place)]
    # erm and adapted share 2 rates x 2 seeds, on_top has its own; each method validates its own
    assert [counts.count(c) for c in ("fit", "validate", "test")] == [8, 12, 18]
    assert checkpoint_of(comparison, "erm", 0) == ("erm0.01", "lr=0.01")
    assert checkpoint_of(comparison, "erm", 1) == ("erm0.1", "lr=0.1")
    assert checkpoint_of(comparison, "adapted", 0) == ("erm0.1", "lr=0.1")
    assert checkpoint_of(comparison, "on_top", 0) == ("erm0.01>top0.01", "lr=0.01")
    assert checkpoint_of(comparison, "on_top", 1) == ("erm0.1>top0.1", "lr=0.1")
    # the evaluation alone sees the axis, and each further metric has a table
    assert comparison.values("erm", (("shift", "2"),), "test/shift") == {0: 2.0, 1: 2.0}
    text = comparison.markdown()
    assert "## test/shift" in text
    # what each setting was measured on, below the methods
    assert text.count("| shift | 0 | 1 | 2 |\n| images scored | – | – | – |\n") == 2
    assert "lr {0.01, 0.1} with the best `val/acc`" in text
    rows = list(csv.DictReader((place / "out" / "summary.csv").open()))
    assert {(r["metric"], r["shift"]) for r in rows} == {
        (m, s) for m in ("test/acc", "test/shift") for s in "012"
    }
    shared()
    assert len(runs(place)) == 38
    # a further test needs no training; another base configuration needs all
    shared(tests={"shift": {"key": "shift", "values": [0, 1, 2, 3]}})
    assert [line[0] for line in runs(place)[38:]] == ["test"] * 6
    (place / "base.yaml").write_text("model: other\n")
    shared()
    assert [line[0] for line in runs(place)[44:]].count("fit") == 8


@pytest.mark.slow
def test_a_chain_of_trainings_and_what_one_predicts(place, shared):
    fills = {"args": {"method": "fills"}, "predict": {"part": "train"}, "listed": False}
    later = {"args": {"method": "later"}, "after": {"fills": {"start": "predict/filled"}}}
    methods = {
        "tuned": {"args": {"method": "tuned"}, "after": {"later": "start"}},
        "later": later,
        "fills": fills,
    }
    changes = {"methods": methods, "tune": None, "baseline": None, "args": {"lr": 1, "part": "no"}}
    comparison = shared(**changes)
    # three tests share each training; what only serves others is not tested and has no line
    counts = [line[0] for line in runs(place)]
    assert [counts.count(c) for c in ("fit", "predict", "test")] == [6, 2, 12]
    assert {record["method"] for record in comparison.results.values()} == {"tuned", "later"}
    assert "fills" not in comparison.markdown()
    started = {
        r["method"]: Path(r["commands"][0][-1]).read_text() for r in comparison.results.values()
    }
    assert started == {
        "later": "filled(fills1,train)>later1",
        "tuned": "filled(fills1,train)>later1>tuned1",
    }
    again = read_plan(place / "out" / "comparison.yaml")
    assert again.methods == comparison.plan.methods
    # another prediction makes all that comes after it anew
    fills["predict"] = {"part": "all"}
    shared(**changes)
    counts = [line[0] for line in runs(place)[20:]]
    assert [counts.count(c) for c in ("fit", "predict", "test")] == [6, 2, 12]


def test_nothing_is_chosen_from_trainings_without_a_number(place, shared):
    methods = {
        "erm": {"args": {"method": "erm"}},
        "lost": {"args": {"method": "lost", "diverges": True}},
    }
    comparison = shared(
        methods=methods, seeds=[0], tests={"shift": {"key": "shift", "values": [0]}}
    )
    assert [record["method"] for record in comparison.results.values()] == ["erm"]
    (failure,) = comparison.failures.values()
    assert "val/acc of the validation is not a number in any of the 2" in failure["error"]


@pytest.mark.slow  # failing cells harm no other, and tests share trainings, in others
def test_a_failed_training_fails_its_cells_alone(place, shared, monkeypatch):
    methods = {**SHARED["methods"], "bad": {"args": {"method": "bad", "trouble": 0.1}}}
    methods["after_bad"] = {"args": {"method": "top"}, "after": {"bad": "start"}}
    comparison = shared(methods=methods)
    assert len(comparison.results) == 18
    assert {comparison.failures[name]["method"] for name in comparison.failures} == {
        "bad",
        "after_bad",
    }
    for name, record in comparison.failures.items():
        assert "the training failed: ValueError: the loss is a potato" in record["error"]
        assert "potato" in (place / "out" / "failed" / f"{name}.log").read_text()
    monkeypatch.setenv("TROUBLE", "off")
    assert not shared(methods=methods).failures
    assert len(list((place / "out" / "failed").iterdir())) == 0


def test_mistakes_around_the_file(place):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        read_plan("nowhere.yaml")
    (place / "broken.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match="is not YAML"):
        read_plan("broken.yaml")
    with pytest.raises(ConfigError, match="--workers is 0"):
        go(write(place), workers=0)


@pytest.mark.slow  # test_a_figure_has_what_is_there draws, too
@pytest.mark.figures
def test_two_axes_and_no_axis_are_drawn(place):
    splits = {"iid": {}, "shards": {"s": 1}}
    settings = {"p": {"key": "p", "values": [0.1]}, "split": splits}
    go(write(place, settings=settings, seeds=[0]), out="two")
    methods = {m: {"args": {"method": m, "p": 0.1}} for m in "ab"}
    comparison = go(write(place, settings={}, methods=methods, mode="min"), out="none")
    assert (place / "two" / "figure.png").stat().st_size > 5000
    assert (place / "none" / "figure.png").stat().st_size > 5000
    assert "| a | **0.8067 ± 0.0252** |" in comparison.markdown()
    assert "| b | 0.8580 ± 0.0302 ▼ |" in comparison.markdown()


def test_no_table_outlives_its_records(place):
    file = write(place, seeds=[0])
    go(file)
    bad = {m: {"args": {"method": m, "trouble": "raise"}} for m in "abc"}
    assert not go(write(place, seeds=[0], methods=bad)).results
    table = (place / "out" / "table.md").read_text()
    assert "0 of 6 cells finished" in table
    assert "`--retry-failed` runs them again" in table
    assert "0.66" not in table


def test_report(place, capsys):
    go(write(place, seeds=[0, 1]))
    (place / "out" / "figure.png").unlink()
    capsys.readouterr()
    assert compare.report_main(["out"]) == 0
    assert "| Method B |" in capsys.readouterr().out
    assert (place / "out" / "figure.png").is_file()
    run = place / "run"
    (run / "figures").mkdir(parents=True)
    (run / "figures" / "noise.png").touch()
    (run / "config.yaml").write_text(
        "seed_everything: 3\nrun: {system: fedsir, name: digits}\nmodel: {class_path: some.Model}\n"
    )
    (run / "metrics.csv").write_text("epoch,aux/size,val/acc\n0,1,0.5\n1,1,0.75\n")
    assert compare.report_main([str(run)]) == 0
    text = capsys.readouterr().out
    assert "# fedsir/digits" in text
    assert "some.Model" in text
    assert "| --- | ---: |\n| val/acc | 0.75 |\n| epoch | 1 |\n| aux/size | 1 |" in text
    assert "noise.png" in text
    with pytest.raises(ConfigError, match="neither a comparison"):
        compare.report_main([str(place)])


def test_ctrl_c_ends_the_workers_and_keeps_what_is_done(place):
    file = write(place, args={"sleep": 0.4}, seeds=[0])
    command = [sys.executable, "-m", "fulgurite", "compare", file, "--workers=2", "--out=out"]
    command += ["--runner=fake_runner:main"]
    # A shell lets what it starts in the background ignore Ctrl-C, and that is inherited.
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=listen) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
    assert process.returncode == 130
    assert "goes on with the cells that are left" in rest
    assert not any(_alive(int(pid)) for *_, pid in runs(place))
    assert "of 6 cells finished" in (place / "out" / "table.md").read_text()


def test_a_terminal_gets_a_bar(place, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    go(write(place, seeds=[0]))
    text = capsys.readouterr().out
    assert "6/6" in text
    assert "Method A p=0.25 seed=0: test/acc 0.66" in text


def old_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_stale_records_are_counted_set_aside_and_come_back(place, capsys):
    file = write(place, seeds=[0])
    go(file)
    results = place / "out" / "results"
    before = {path.name: path.read_text() for path in results.iterdir()}
    record = json.loads(before["a__p=0.5__seed=0.json"])
    del record["parts"]  # as an earlier version wrote it
    (results / "a__p=0.5__seed=0.json").write_text(json.dumps({**record, "digest": "0123"}))
    (place / "base.yaml").write_text("model: another\n")
    capsys.readouterr()
    go(file)
    told = capsys.readouterr().out
    assert f"Records set aside in {place}/out/outdated: 6 (" in told
    assert "5 of another configuration" in told
    assert "1 of an earlier form" in told
    assert len(old_names(place / "out" / "outdated")) == 6
    (place / "base.yaml").write_text("model: some\n")
    go(file)
    told = capsys.readouterr().out
    assert f"Records taken back from {place}/out/outdated: 5." in told
    kept = {name: text for name, text in before.items() if name != "a__p=0.5__seed=0.json"}
    assert {name: (results / name).read_text() for name in kept} == kept
    assert len(runs(place)) == 2 * (6 + 6 + 1)


def test_a_record_that_is_none_is_counted_and_run_again(place, capsys):
    methods = {m: FILE["methods"][m] for m in "ab"}
    file = write(place, seeds=[0], methods=methods)
    go(file)
    path = place / "out" / "results" / "a__p=0.5__seed=0.json"
    path.write_text("")
    (place / "out" / "results" / "foreign.json").write_text("")
    assert compare.report_main(["out"]) == 0  # rendering leaves it where it is
    assert "left out: `a__p=0.5__seed=0`" in capsys.readouterr().out
    comparison = go(file)
    assert "outdated: 1 (1 damaged or something else)" in capsys.readouterr().out
    assert "a__p=0.5__seed=0.unreadable.json" in old_names(place / "out" / "outdated")
    assert len(comparison.results) == 4
    assert len(runs(place)) == 10


def test_what_is_no_record(tmp_path):
    path = tmp_path / "a__p=1__seed=0.json"
    record = {"digest": "0", "method": "a", "setting": {"p": "1"}, "seed": 0, "seconds": 1.0}
    record["metrics"] = {"test/acc": 0.5}
    path.write_text(json.dumps(record))
    assert read_record(path) == record
    others = ["", "[1", "[]", "{}", "null", "[" * 5000, b"\xff".decode("latin-1")]
    for key, value in record.items():
        others += [json.dumps({k: v for k, v in record.items() if k != key})]
        others += [json.dumps({**record, key: other}) for other in (None, [value], "b")]
    others.remove(json.dumps({**record, "digest": "b"}))  # which is one of another digest
    others += [json.dumps({**record, "metrics": {"test/acc": v}}) for v in ("high", 10**400)]
    for content in others:
        path.write_text(content, encoding="latin-1")
        assert read_record(path) is None, content


@pytest.mark.slow
def test_a_damaged_record_of_a_training_is_made_again(place, shared):
    shared()
    for path in (place / "out" / "trainings").glob("*.json"):
        path.write_text("")
    (place / "out" / "results" / "erm__shift=0__seed=0.json").unlink()
    assert len(shared().results) == 18


def test_a_folder_that_cannot_be_written_is_one_line(place, monkeypatch, capsys):
    from fulgurite.__main__ import main as command

    file = write(place, seeds=[0])
    (place / "taken").write_text("a file")
    options = ["--runner=fake_runner:main", "--workers=1"]

    def says(*words: str) -> str:
        capsys.readouterr()
        assert command(["compare", file, *options, *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "taken" in says("--out=taken")
    assert "taken" in says("--out=taken/below")
    assert (place / "taken").read_text() == "a file"
    (place / "out" / "comparison.yaml").mkdir(parents=True)
    assert "comparison.yaml" in says("--out=out")

    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("fulgurite.compare.records.write_json", full)
    assert "No space left on device" in says("--out=other")


@pytest.mark.parametrize(
    ("log", "says"),
    [("/dev/full", "No space left on device"), ("base.yaml/a.log", "File exists")],
)
def test_a_log_that_cannot_be_written_fails_its_job_alone(place, capfd, log, says):
    job = Job("a", [["fit", "--run.dir=a"]], place / "a", log=Path(log), metric=None)
    stdout = os.fstat(1)
    with capfd.disabled():  # whose sys.stdout is no file that the log replaces
        result = execute_job(job, "fake_runner:main")
    assert result.error == f"its log {log} cannot be written ({says})"
    assert os.fstat(1) == stdout


def test_only_shows_what_it_names(place, capsys):
    file = write(place)
    options = ["--runner=fake_runner:main", "--workers=2", "--out=out"]
    assert main([file, *options, "--only", "a", "b", "p=0.5", "seed=0", "seed=2"]) == 0
    shown = capsys.readouterr().out
    table = (place / "out" / "table.md").read_text()
    for text in (shown, table):
        assert "| method | p=0.5 |" in text
        assert "| c |" not in text
        assert "–" not in text
        assert "over seeds 0, 2" in text
        assert "4 of 4 cells finished" in text
    assert "fulgurite report" in shown
    assert main([file, *options, "--only", "b"]) == 0  # without the baseline
    assert "Difference" not in capsys.readouterr().out
    # all that was run, and what was not is said once
    assert compare.report_main(["out"]) == 0
    whole = capsys.readouterr().out
    assert "| method | p=0.25 | p=0.5 |" in whole
    assert "| c |" not in whole
    assert "Not run: 10. Methods without any cell: c." in whole


def test_a_figure_has_what_is_there(place, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "fulgurite.compare.report.new_figure",
        lambda *shape, **size: drawn.append(new_figure(*shape, **size)) or drawn[-1],
    )
    settings = {"p": {"key": "p", "values": [0.1, 0.2, 0.4]}, "split": {"iid": {}}}
    names = {"p": "rate of noise", "test/acc": "accuracy"}
    file = write(place, settings=settings, names=names, highlight="b")
    go(file, only=["a", "b"])
    figure, axes = drawn[-1]
    means, differences = axes.flat
    assert means.get_xlabel() == "rate of noise"
    assert means.get_ylabel() == "accuracy\nmean ± std over 3 seeds"
    assert "95 % interval" in differences.get_ylabel()
    assert [*means.get_xticks()] == [0.1, 0.2, 0.4]
    assert [label.get_text() for label in means.get_xticklabels()] == ["0.1", "0.2", "0.4"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.texts] == ["Method B", "Method A"]  # as they end
    widths = {c.get_label(): c.lines[0].get_linewidth() for c in means.containers}
    assert widths["Method B"] > 2 * widths["Method A"]
    b = next(c for c in differences.containers if c.get_label() == "Method B")
    assert [*b.lines[0].get_ydata()] == pytest.approx([0.05 + 0.2 * 0.02 / 3] * 3)


def test_workers_are_spread_over_the_gpus(place, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-aa,MIG-bb,2")
    # a worker in place of one that dies takes its GPU, too
    methods = {"a": FILE["methods"]["a"], "c": {"args": {"method": "c", "trouble": "kill"}}}
    file = write(place, methods=methods, seeds=[0, 1], args={"sleep": 0.2})
    go(file, workers=None)
    visible = {pid: device for _, _, device, pid in runs(place)}
    assert {*visible.values()} == {"GPU-aa", "MIG-bb", "2"}
    assert len(visible) > 3
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-aa,MIG-bb,2"


def test_without_a_gpu_nothing_is_set(place, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    go(write(place, seeds=[0]))
    assert {device for _, _, device, _ in runs(place)} == {"None"}


def test_visible_devices_as_cuda_reads_them():
    def seen(text, available=4):
        return visible_devices(available, {} if text is None else {"CUDA_VISIBLE_DEVICES": text})

    assert seen(None) == ["0", "1", "2", "3"]
    assert seen("2, 0", 2) == ["2", "0"]
    assert seen("1,-1,2", 1) == ["1"]  # what comes after an invalid one is hidden
    assert seen("", 0) == seen("-1", 0) == seen(None, 0) == []
    assert seen("MIG-a,MIG-b", 1) == ["MIG-a", "MIG-b"]
    assert device_groups(["0", "1", "2"], 2) == ["0,1"]
    assert device_groups(["0", "1"], 3) == device_groups(["0", "1"], 0) == ["0,1"]


def test_aliases_that_stand_for_billions_are_refused_at_once(place):
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    for i in range(1, 12):
        lines.append(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]")
    merged = ["m0: &m0 {k: 1}"]
    for i in range(1, 30):
        merged.append(f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 10)}], k{i}: 1}}")
    bombs = {
        "aliases": (lines, "more than 100,000 values"),
        "merges": (merged, "more than 100,000 values"),
        "itself": (["args: &x {a: *x}"], "holds itself"),
        "deep": (["args: " + "[" * 400 + "]" * 400], "deep"),
        "deeper": (["args: " + "[" * 100_000], "deep"),
        "twice": (["seeds: [0]", "seeds: [1]"], "'seeds' again"),
        "date": (["methods: {a: {args: {x: 2026-09-01}}}"], "line 1: this is a timestamp"),
        "binary": (["x: \x00"], "not YAML"),
        "large": (["# " + "x" * 2**21], "megabyte"),
    }
    start = time.monotonic()
    for name, (content, says) in bombs.items():
        path = place / f"{name}.yaml"
        path.write_text("\n".join(content))
        with pytest.raises(ConfigError, match=says):
            read_plan(str(path))
    assert time.monotonic() - start < 10
    (place / "latin.yaml").write_bytes(b"title: \xff")
    with pytest.raises(ConfigError, match="UTF-8"):
        read_plan("latin.yaml")
    (place / "base.yaml").write_text("\n".join(lines))  # the configuration, too
    with pytest.raises(ConfigError, match=r"base\.yaml"):
        define_trials(read_plan(write(place)))


@pytest.mark.parametrize("count", [40, pytest.param(150, marks=pytest.mark.slow)])
def test_wrong_types_anywhere_are_named(place, count):
    """Any value of a whole file is replaced by others: it is read, or refused by name."""
    whole = {**FILE, **SHARED, "settings": FILE["settings"], "names": {"p": "rate"}}
    whole |= {"highlight": "erm", "after_fit": "test", "mode": "max"}
    whole["quick"] = {"seeds": [0], "methods": ["erm"], "tune": whole["tune"], "settings": {}}
    others = [None, 5, "x", True, [[1]], {"a": 1}, {"a": [1]}, datetime.date(2026, 1, 1), b"x"]

    def variants(value):
        yield from others
        if isinstance(value, dict):
            for key, item in value.items():
                for other in variants(item):
                    yield {**value, key: other}
        elif isinstance(value, list):
            for other in variants(value[0]):
                yield [other, *value[1:]]

    refused = 0
    for content in random.Random(0).sample([*variants(whole)], count):
        (place / "odd.yaml").write_text(yaml.safe_dump(content))
        try:
            define_trials(read_plan("odd.yaml", quick=True))
        except ConfigError:
            refused += 1
    assert count / 3 < refused < count


def test_a_plugin_has_a_folder_of_its_own(place, monkeypatch):
    packages = {}
    for name in ("mixup", "cutout"):
        folder = place / f"{name}_paper" / "configs"
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").touch()
        (folder / "__init__.py").touch()
        (folder / "base.yaml").write_text("model: some\n")
        (folder / "compare.yaml").write_text(
            yaml.safe_dump({**FILE, "config": f"{name}/base.yaml"})
        )
        packages[name] = systems.System(name, "", "", "", f"{name}_paper.configs")
    monkeypatch.setattr(systems, "systems", lambda: packages)
    for name in packages:
        assert systems.system_of_config(systems.resolve_config(f"{name}/compare.yaml")) == name
        comparison = go(f"{name}/compare.yaml", out=None, only=["a", "p=0.5", "seed=0"])
        assert comparison.folder == place / "compare_results" / name
        assert len(comparison.results) == 1
        saved = comparison.folder / "comparison.yaml"
        lines = saved.read_text().splitlines()
        assert lines.pop().startswith("source: ")
        saved.write_text("\n".join(lines))  # as an earlier version wrote it
        assert len(go(f"{name}/compare.yaml", out=None, only=["a", "seed=0"]).results) == 2
        saved.write_text("")
        assert len(go(f"{name}/compare.yaml", out=None, only=["a", "seed=0"]).results) == 2
    # a file of people is named by its folder; another one of the same name does not take it over
    for folder in ("one", "two"):
        (place / folder / "mixup").mkdir(parents=True)
        file = place / folder / "mixup" / "compare.yaml"
        file.write_text(yaml.safe_dump({**FILE, "config": "mixup/base.yaml"}))
        with pytest.raises(ConfigError, match="comparison of another file"):
            go(str(file), out=None, only=["a", "seed=0"])
    assert go(str(file), only=["a", "p=0.5", "seed=0"]).results


def test_a_script_needs_no_guard(place):
    (place / "script.py").write_text(
        "from fulgurite import compare\n"
        f"compare.run({write(place, seeds=[0])!r}, out='out', runner='fake_runner:main')\n"
    )
    done = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("[6/6]") == 1  # workers do not run it again
    assert (place / "out" / "table.md").is_file()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.yaml", "[1, 2]", "no configuration of a run"),
        ("config.yaml", "a: [", "is not YAML"),
        ("summary.json", "", "holds no metrics"),
        ("test_metrics.json", "[]", "holds no metrics"),
        ("metrics.csv", "a\nb\n", "no table of metrics"),
    ],
)
def test_a_damaged_run_is_named(place, name, content, says):
    (place / "config.yaml").write_text("run: {name: x}\n")
    (place / name).write_text(content)
    with pytest.raises(ConfigError, match=says):
        compare.report_main([str(place)])


def test_an_edit_while_cells_run_ends_the_comparison(place):
    (place / "base.yaml").write_text("model: part.yaml\n")
    (place / "part.yaml").write_text("width: 1\n")
    file = write(place, seeds=[0], args={"sleep": 0.2})

    def edit(out: str, text: str) -> None:
        first = place / out / "results" / "a__p=0.25__seed=0.json"
        while not first.exists():
            time.sleep(0.01)
        (place / "base.yaml").write_text(text)

    comment = threading.Thread(target=edit, args=["same", "# a comment\nmodel: part.yaml\n"])
    comment.start()  # it changes nothing
    assert len(go(file, workers=1, out="same").results) == 6
    comment.join()
    change = threading.Thread(target=edit, args=["out", "model: other\n"])
    change.start()
    with pytest.raises(ConfigError, match=r"base\.yaml changed while cells ran"):
        go(file, workers=1)
    change.join()
    # nothing that ran after the edit is taken for what was asked
    kept = len([*(place / "out" / "results").iterdir()])
    assert kept < 6
    before = len(runs(place))
    assert len(go(file, workers=2).results) == 6
    assert len(runs(place)) == before + 12
