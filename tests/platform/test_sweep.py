"""Sweeps without a server: W&B's files through Optuna."""

import contextlib
import csv
import json
import math
import os
import signal
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import optuna
import pytest
import yaml
from fakes.runs import wait_until
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState
from scipy import stats

from fulgurite import sweep
from fulgurite.errors import ConfigError
from fulgurite.sweep.driver import main
from fulgurite.sweep.pruning import falls_behind
from fulgurite.sweep.reporter import TrialReporter
from fulgurite.sweep.space import Categorical, Distribution, EarlyTerminate
from fulgurite.sweep.storage import MEMORY, hide_password, open_storage
from fulgurite.sweep.study import TrialWatch, enqueue_grid, next_point, open_study, tell
from fulgurite.testing.postgresql import find_initdb, run_postgresql
from fulgurite.testing.survival import start_call

RUNNER = """
import json, os, pathlib, sys, time


def parse(argv):
    options = dict(word[2:].split("=", 1) for word in argv if word.startswith("--") and "=" in word)
    if "misspelt" in options:
        from fulgurite.errors import ConfigError

        raise ConfigError("There is no option 'misspelt'.")
    options = {key: value for key, value in options.items() if key not in ("lr", "width")}
    return {"model": pathlib.Path("base.yaml").read_text(), "options": options}


def main(argv):
    options = dict(word[2:].split("=", 1) for word in argv if word.startswith("--") and "=" in word)
    run = pathlib.Path(options["run.dir"])
    run.mkdir(parents=True)
    lr, width = float(options.get("lr", 0)), int(options.get("width", 0))
    with open(os.environ["RUNS"], "a") as file:
        print(json.dumps({k: v for k, v in options.items() if k != "run.dir"}), file=file)
    time.sleep(float(os.environ.get("SLEEP", 0)))
    begun = len(open(os.environ["RUNS"]).readlines())
    while begun == int(os.environ.get("WAIT_AT", 0)) and not os.path.exists("gate"):
        time.sleep(0.01)
    unlucky = os.environ.get("LUCKY") is None
    if width == 13 and unlucky:
        print("fulgurite: error: Thirteen is refused.", file=sys.stderr)
        return 2
    if text := os.environ.get("EDIT"):
        pathlib.Path("base.yaml").write_text(text)
    value = -((lr - 0.3) ** 2) + width / 1000
    value = {14: float("nan"), 15: float("inf"), 16: -float("inf")}.get(width, value)
    (run / "summary.json").write_text(json.dumps({"val/acc": value}))
    (run / "config.yaml").write_text(json.dumps({"trainer": {}, "lr": lr, "run": {"name": "x"}}))
    return 0
"""

COMMAND = ["${env}", "fulgurite", "fit", "--config", "base.yaml", "${args}"]
GRID = {
    "method": "grid",
    "metric": {"name": "val/acc", "goal": "maximize"},
    "command": COMMAND,
    "parameters": {"lr": {"values": [0.1, 0.3]}, "width": {"values": [1, 2, 3]}},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a runner and the list of what it ran."""
    (tmp_path / "sweep_runner.py").write_text(RUNNER)
    (tmp_path / "base.yaml").write_text("model: some\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("RUNS", str(tmp_path / "runs.txt"))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    return tmp_path


def write(folder, content, name="sweep.yaml"):
    (folder / name).write_text(yaml.safe_dump(content, sort_keys=False))
    return str(folder / name)


def run(file, **options):
    return sweep.run(file, **{"out": "out", "runner": "sweep_runner:main", **options})


def ran(folder):
    path = folder / "runs.txt"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def read(folder, **changes):
    return sweep.read_sweep(write(folder, {**GRID, **changes}))


@pytest.mark.figures
def test_a_grid_runs_each_point_once_and_writes_what_is_best(folder, capsys):
    study = run(write(folder, GRID), workers=2)
    assert sorted((r["lr"], r["width"]) for r in ran(folder)) == [
        (lr, width) for lr in ("0.1", "0.3") for width in ("1", "2", "3")
    ]
    assert study.best_value == pytest.approx(0.003)
    rows = list(csv.DictReader((folder / "out" / "trials.csv").open()))
    assert [row["state"] for row in rows] == ["complete"] * 6
    # in the order in which W&B's agent takes them
    assert [(row["lr"], row["width"]) for row in rows[:3]] == [
        ("0.1", "1"),
        ("0.1", "2"),
        ("0.1", "3"),
    ]
    best = yaml.safe_load((folder / "out" / "best.yaml").read_text())
    assert best == {"trainer": {}, "lr": 0.3}  # a run of its own, not the trial's
    first = (folder / "out" / "trials.md").read_text().splitlines()[2]
    assert first.startswith("| 5 | 0.003 | 0.3 | 3 | complete |")
    for figure in ("history.png", "importances.png", "slices.png"):
        assert (folder / "out" / figure).stat().st_size > 5000
    assert "fulgurite fit --config" in capsys.readouterr().out


def test_a_finished_sweep_is_not_run_again_and_may_grow(folder):
    file = write(folder, GRID)
    run(file, trials=2)
    assert len(ran(folder)) == 2
    run(file, trials=2)
    assert len(ran(folder)) == 2
    run(file)
    assert len(ran(folder)) == len({json.dumps(r) for r in ran(folder)}) == 6


def test_trials_of_another_configuration_are_not_mixed(folder):
    run(write(folder, GRID), trials=1)
    (folder / "base.yaml").write_text("model: other\n")
    with pytest.raises(ConfigError, match=r"another configuration than fit .*\(model differs\)"):
        run(write(folder, GRID))
    (folder / "base.yaml").write_text("model: some\n")
    run(write(folder, GRID), trials=2)
    assert len(ran(folder)) == 2


def test_a_configuration_that_is_edited_meanwhile_ends_the_sweep(folder, monkeypatch):
    monkeypatch.setenv("EDIT", "model: another\n")
    with pytest.raises(ConfigError, match=r"base\.yaml changed while trials ran.*model differs"):
        run(write(folder, GRID))
    assert len(ran(folder)) == 1


@pytest.mark.parametrize("options", [{"name": "other"}, {"storage": "sqlite:///new.db"}])
def test_a_folder_keeps_the_trials_of_its_own_study(folder, options):
    run(write(folder, GRID), trials=1)
    table = (folder / "out" / "trials.csv").read_text()
    with pytest.raises(ConfigError, match=r"out holds the trials of another study"):
        run(write(folder, GRID), **options)
    assert (folder / "out" / "trials.csv").read_text() == table
    assert len(ran(folder)) == 1


def test_options_are_checked_before_the_first_trial(folder, capsys):
    file = write(folder, {**GRID, "parameters": {"misspelt": {"values": [1]}}})
    with pytest.raises(ConfigError, match="no option 'misspelt'"):
        run(file)
    with pytest.raises(ConfigError, match="no option 'misspelt'"):
        main([file, "--dry-run", "--runner=sweep_runner:main"])
    assert not (folder / "out").exists()


@pytest.mark.parametrize("storage", ["memory", "sqlite://", "sqlite:///", "sqlite:///:memory:"])
def test_a_storage_that_would_not_stay_is_refused(folder, storage):
    with pytest.raises(ConfigError, match="kept in memory"):
        run(write(folder, GRID), storage=storage)


def test_a_storage_of_something_else_is_one_error(folder):
    with contextlib.closing(sqlite3.connect("foreign.db")) as connection:
        connection.execute("create table studies (a int)")
    with pytest.raises(ConfigError, match=r"foreign\.db cannot be used \(.*no.* column"):
        run(write(folder, GRID), storage="sqlite:///foreign.db")


def test_a_folder_may_have_any_name(folder):
    out = folder / "50% of {a}#b?c=é"
    study = run(write(folder, GRID), trials=1, out=str(out))
    assert (out / "study.db").is_file()
    assert len(study.trials) == 1


def test_an_overflow_is_not_the_best(folder, capsys):
    widths = {"lr": {"value": 0.3}, "width": {"values": [15, 16, 2]}}
    study = run(write(folder, {**GRID, "parameters": widths}))
    assert [t.state.name for t in study.trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert "Best: trial 2" in capsys.readouterr().out


def test_another_sweep_in_the_same_folder_is_refused(folder):
    run(write(folder, GRID), trials=1)
    other = {**GRID, "parameters": {"lr": {"values": [0.2]}}}
    with pytest.raises(ConfigError, match=r"another sweep.*parameters differs"):
        run(write(folder, other))
    with pytest.raises(ConfigError, match="seed 0, not 1"):
        run(write(folder, GRID), seed=1)
    run(write(folder, {**GRID, "run_cap": 2, "description": "the same trials"}))
    assert len(ran(folder)) == 2


RANDOM = {
    **GRID,
    "method": "random",
    "run_cap": 4,
    "parameters": {
        "lr": {"min": 0.0, "max": 1.0},
        "width": {"min": 1, "max": 9},
        "a.b": {"value": "x"},
    },
}


@pytest.mark.slow  # points themselves are drawn below
def test_random_points_do_not_depend_on_the_number_of_workers(folder):
    one = run(write(folder, RANDOM), out="one", workers=1)
    two = run(write(folder, RANDOM), out="two", workers=2)
    other = run(write(folder, RANDOM), out="other", seed=1, trials=2)
    params = [[t.params for t in study.trials] for study in (one, two, other)]
    assert params[0] == params[1]
    assert params[0][:2] != params[2]
    assert all(r["a.b"] == "x" for r in ran(folder))
    assert len({t.params["lr"] for t in one.trials}) == 4
    # of one trial: parameters are drawn apart
    assert not np.allclose(
        [t.params["lr"] for t in one.trials],
        [(t.params["width"] - 1) / 8 for t in one.trials],
        atol=0.2,
    )


def test_bayes_comes_nearer_than_random(folder):
    file = {**RANDOM, "run_cap": 30, "parameters": {"lr": {"min": 0.0, "max": 1.0}}}

    def worst_of_last(method, seed):
        content = sweep.read_sweep(write(folder, {**file, "method": method}))
        study = open_study(content, MEMORY, f"{method}{seed}", seed)
        for _ in range(30):
            point = next_point(study, content, 30)
            study.tell(point.trial, -((point.values["lr"] - 0.3) ** 2))
        return np.mean([abs(t.params["lr"] - 0.3) for t in study.trials[15:]])

    bayes, random = ([worst_of_last(m, s) for s in range(2)] for m in ("bayes", "random"))
    assert max(bayes) < 0.7 * min(random)


def test_the_sweep_ends_at_its_target(folder):
    file = {**RANDOM, "run_cap": 50, "metric": {**GRID["metric"], "target": -0.5}}
    run(write(folder, file))
    assert len(ran(folder)) < 10


def test_a_failed_trial_is_told_and_the_others_go_on(folder, capsys):
    file = write(
        folder, {**GRID, "parameters": {"lr": {"value": 0.3}, "width": {"values": [13, 14, 2]}}}
    )
    study = run(file)
    states = [t.state for t in study.trials]
    assert states == [TrialState.FAIL, TrialState.FAIL, TrialState.COMPLETE]
    rows = list(csv.DictReader((folder / "out" / "trials.csv").open()))
    assert "Thirteen is refused." in rows[0]["error"]
    assert "not a number" in rows[1]["error"]
    run(file)  # which failed for a reason of its own is not run again
    assert len(ran(folder)) == 3
    assert "Thirteen is refused." in capsys.readouterr().out


@pytest.mark.parametrize("method", ["grid", "random"])
def test_failed_trials_are_retried_on_demand(folder, capsys, monkeypatch, method):
    lr = {"values": [0.1, 0.3]} if method == "grid" else {"min": 0.1, "max": 0.3}
    parameters = {"lr": lr, "width": {"values": [13, 2] if method == "grid" else [13]}}
    file = write(folder, {**GRID, "method": method, "run_cap": 4, "parameters": parameters})
    study = run(file)
    failed = {t.number for t in study.trials if t.state == TrialState.FAIL}
    assert len(failed) == (2 if method == "grid" else 4)
    monkeypatch.setenv("LUCKY", "1")
    study = run(file, retry_failed=True)
    assert "failed; their points are run again." in capsys.readouterr().out
    points = [t.params for t in study.trials if t.number in failed]
    assert points == [t.params for t in study.trials[4:]]
    rows = list(csv.DictReader((folder / "out" / "trials.csv").open()))
    assert [row["error"] for row in rows] == [""] * 4
    assert not failed & {int(row["trial"]) for row in rows}
    before = len(ran(folder))
    run(file, retry_failed=True)
    assert len(ran(folder)) == before


def start(folder, file, out, storage=None, **environment):
    """A driver in a fork, which need not import Optuna and torch again."""

    def drive():
        os.environ.update(environment)
        run(file, out=out, storage=storage)

    return start_call(drive, folder)


def test_a_killed_sweep_runs_what_was_cut_short_again(folder):
    file = write(folder, GRID)
    driver = start(folder, file, "out", WAIT_AT="2")
    wait_until(lambda: len(ran(folder)) == 2)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    study = run(file)
    done = [t.params for t in study.trials if t.state == TrialState.COMPLETE]
    assert len(done) == len({json.dumps(p) for p in done}) == 6
    assert len(ran(folder)) == 7
    assert sum(t.state == TrialState.FAIL for t in study.trials) == 1
    rows = list(csv.DictReader((folder / "out" / "trials.csv").open()))
    assert len(rows) == 6  # the one that was cut short is none


def test_two_drivers_share_one_storage(folder):
    """As two machines do, each with a folder of its own."""
    file, url = write(folder, GRID), f"sqlite:///{folder / 'shared.db'}"
    drivers = [start(folder, file, f"out{i}", url, SLEEP="0.2") for i in range(2)]
    for driver in drivers:
        ended = driver.wait()
        assert ended.status == 0, ended.output
    assert len(ran(folder)) == len({json.dumps(r) for r in ran(folder)}) == 6
    assert (folder / "out0" / "trials.csv").read_text() == (
        folder / "out1" / "trials.csv"
    ).read_text()


def test_no_two_processes_take_one_trial(folder, monkeypatch):
    """Each reads the queue before the other has written, unless its transaction is alone."""
    content, url = read(folder), f"sqlite:///{folder / 'shared.db'}"
    studies = [open_study(content, url, "x", 0) for _ in range(2)]
    enqueue_grid(studies[0], content, 2)
    check = optuna.storages.RDBStorage.check_trial_is_updatable

    def check_slowly(storage, trial_id, state):
        time.sleep(0.2)  # between reading the state and writing it
        check(storage, trial_id, state)

    monkeypatch.setattr(optuna.storages.RDBStorage, "check_trial_is_updatable", check_slowly)
    with ThreadPoolExecutor(2) as pool:
        numbers = [*pool.map(lambda study: study.ask().number, studies)]
    assert sorted(numbers) == [0, 1]


def test_a_trial_that_another_machine_gave_up_does_not_count(folder):
    file, url = write(folder, GRID), f"sqlite:///{folder / 'shared.db'}"
    driver = start(folder, file, "out", url, WAIT_AT="1")
    wait_until(lambda: len(ran(folder)) == 1)
    study = optuna.load_study(study_name=None, storage=open_storage(url))
    tell(study, 0, state=TrialState.FAIL)
    study.enqueue_trial(study.trials[0].system_attrs["fixed_params"])
    (folder / "gate").touch()
    ended = driver.wait()
    assert ended.status == 0, ended.output
    assert "Trial 0 ended here, but another machine had heard nothing of it" in ended.output
    assert sum(trial.state == TrialState.COMPLETE for trial in study.trials) == 6
    with pytest.raises(UpdateFinishedTrialError):
        tell(study, 0, 0.5)


def test_trials_that_run_stay_marked_beside_one_that_was_given_up(folder):
    content = read(folder)
    study = open_study(content, MEMORY, "x", 0)
    enqueue_grid(study, content, 2)
    trials = [next_point(study, content, 2).trial for _ in range(2)]
    tell(study, 0, state=TrialState.FAIL)
    TrialWatch(study).mark(trials)
    assert ["alive" in trial.user_attrs for trial in study.trials] == [False, True]


def test_a_silent_machine_loses_its_trials(folder):
    content = read(folder)
    study = open_study(content, f"sqlite:///{folder / 'a.db'}", "x", 0)
    study.enqueue_trial({"lr": 0, "width": 1})
    trial = next_point(study, content, 6).trial
    trial.set_user_attr("owner", "elsewhere 1")
    watch = TrialWatch(study, patience=0.2)
    watch.mark([trial])
    assert watch.fail_dead_trials() == []
    time.sleep(0.15)
    watch.mark([trial])  # it is slow, not dead
    assert watch.fail_dead_trials() == []
    time.sleep(0.25)
    assert watch.fail_dead_trials() == [trial.number]
    assert [t.state for t in study.trials] == [TrialState.FAIL, TrialState.WAITING]
    assert next_point(study, content, 6).values == {"lr": 0.1, "width": 2}


def test_the_limit_holds_when_another_machine_took_the_last_trial(folder):
    content = read(folder, method="random")
    study = open_study(content, MEMORY, "x", 0)
    assert next_point(study, content, 1) is not None
    assert next_point(study, content, 1) is None


# Distributions


@pytest.mark.parametrize(
    ("spec", "reference"),
    [
        ({"min": 1.0, "max": 3.0}, stats.uniform(1, 2)),
        (
            {"distribution": "log_uniform", "min": -3, "max": 1},
            stats.loguniform(math.exp(-3), math.e),
        ),
        ({"distribution": "log_uniform_values", "min": 0.01, "max": 5}, stats.loguniform(0.01, 5)),
        (
            {"distribution": "inv_log_uniform", "min": -1, "max": 3},
            stats.loguniform(math.exp(-3), math.e),
        ),
        (
            {"distribution": "inv_log_uniform_values", "min": 0.01, "max": 5},
            stats.loguniform(0.01, 5),
        ),
        ({"distribution": "normal", "mu": 2, "sigma": 0.5}, stats.norm(2, 0.5)),
        ({"distribution": "log_normal"}, stats.lognorm(1)),
        ({"distribution": "beta", "a": 2, "b": 5}, stats.beta(2, 5)),
    ],
    ids=lambda value: value.get("distribution", "uniform") if isinstance(value, dict) else "",
)
def test_drawn_values_follow_the_distribution(folder, spec, reference):
    content = read(folder, method="random", parameters={"x": spec})
    study = open_study(content, MEMORY, "x", 0)
    drawn = [next_point(study, content, 300).values["x"] for _ in range(40)]
    assert stats.kstest(drawn, reference.cdf).pvalue > 0.01
    quantiles = np.linspace(0.001, 0.999, 97)
    ours = [content.parameters["x"].value_at(q) for q in quantiles]
    np.testing.assert_allclose(ours, reference.ppf(quantiles), rtol=1e-9)


@given(
    quantile=st.floats(0, 1, exclude_max=True),
    low=st.integers(-50, 50),
    count=st.integers(1, 20),
)
def test_whole_numbers_are_alike_and_in_range(quantile, low, count):
    value = Distribution("int_uniform", low, low + count).value_at(quantile)
    assert isinstance(value, int)
    assert value == low + math.floor(quantile * (count + 1))


def test_rounded_values_are_multiples_of_q(folder):
    spec = {"distribution": "q_uniform", "min": 0.0, "max": 1.0, "q": 0.1}
    content = read(
        folder,
        method="random",
        parameters={"x": spec, "n": {"distribution": "q_normal", "sigma": 9, "q": 2}},
    )
    study = open_study(content, MEMORY, "x", 0)
    drawn = [next_point(study, content, 99).values for _ in range(30)]
    assert {point["x"] for point in drawn} <= {round(0.1 * i, 1) for i in range(11)}
    assert all(isinstance(point["n"], int) and point["n"] % 2 == 0 for point in drawn)
    # the grid leaves out the end, as W&B's does
    grid = read(folder, parameters={"x": spec})
    assert grid.grid_values["x"] == [round(0.1 * i, 1) for i in range(10)]


@pytest.mark.parametrize(
    ("spec", "low", "high"),
    [
        ({"distribution": "q_uniform", "min": 1, "max": 10, "q": 4}, 4, 8),
        ({"distribution": "q_uniform", "min": 0.05, "max": 0.95, "q": 0.1}, 0.1, 0.9),
        ({"distribution": "q_uniform", "min": 0.3, "max": 0.9, "q": 0.1}, 0.3, 0.9),
        ({"distribution": "q_log_uniform_values", "min": 3, "max": 200, "q": 16}, 16, 192),
        ({"distribution": "q_log_uniform", "min": 1, "max": 3, "q": 5}, 5, 20),
        ({"distribution": "q_beta", "a": 2, "b": 5, "q": 0.4}, 0.0, 0.8),
    ],
)
def test_rounded_values_stay_within_the_bounds(folder, spec, low, high):
    parameter = read(folder, method="random", parameters={"x": spec}).parameters["x"]
    drawn = [parameter.value_at(q) for q in np.linspace(1e-9, 1 - 1e-9, 401)]
    assert (min(drawn), max(drawn)) == (low, high)


def test_nothing_is_spelled_as_null(folder):
    content = read(folder, parameters={"x": {"value": None}, "y": {"values": [None, "None"]}})
    assert content.options({"y": None}) == ["--x=null", "--y=null"]
    within = read(folder, parameters={"x": {"value": [None, {"a": None}]}})
    assert within.options({}) == ['--x=[null, {"a": null}]']


def test_a_study_of_another_program_is_refused(folder):
    storage = "sqlite:///study.db"
    other = optuna.create_study(study_name="mine", storage=storage, direction="minimize")
    with pytest.raises(ConfigError, match=r"The study mine in .* is none of `fulgurite sweep`"):
        open_study(read(folder), storage, "mine", 0)
    other = optuna.create_study(study_name="tried", storage=storage, direction="maximize")
    other.tell(other.ask(), 9.0)
    with pytest.raises(ConfigError, match=r"The study tried in .* is none of `fulgurite sweep`"):
        open_study(read(folder), storage, "tried", 0)


def test_brackets_end_below_one_value(folder):
    rule = {"type": "hyperband", "max_iter": 27, "s": 10**9}
    assert read(folder, early_terminate=rule).early_terminate.bands == (1, 3, 9)


def test_probabilities_are_kept(folder):
    spec = {"values": ["a", "b", "c"], "probabilities": [0.5, 0.0, 0.5]}
    parameter = read(folder, method="random", parameters={"x": spec}).parameters["x"]
    drawn = [parameter.value_at(q) for q in np.linspace(0, 1, 101)]
    assert drawn == ["a"] * 50 + ["c"] * 51
    assert Categorical(("a", "b"), (1.0, 0.0)).value_at(1.0) == "a"


def test_nested_parameters_become_dotted_options(folder):
    nested = {
        "model": {"parameters": {"lr": {"values": [1]}, "net": {"parameters": {"w": {"value": 2}}}}}
    }
    content = read(folder, parameters=nested)
    assert content.options({"model.lr": 1}) == ["--model.lr=1", "--model.net.w=2"]


def test_packaged_sweeps_are_read_and_give_the_agents_commands():
    from importlib import resources

    from fulgurite.testing.sweeps import agent_commands

    files = sorted(Path(str(resources.files("fulgurite.configs"))).glob("*/sweep.yaml"))
    assert files
    for file in files:
        content = sweep.read_sweep(f"{file.parent.name}/{file.name}")
        points = [
            {name: content.grid_values[name][i] for name, i in point.items()}
            for point in content.grid
        ]
        ours = [["fulgurite", *content.command, *content.options(point)] for point in points]
        assert ours == list(agent_commands(file))


# What cannot be honoured

RULE = {"type": "hyperband", "min_iter": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"parameters": {"a": {"distribution": "q_uniform", "min": 0, "max": 1, "q": 1e-12}}},
            "has 1,000,000,000,000 values, and a grid has 100,000 points at most",
        ),
        ({"parameters": {"run.dir": {"values": ["a"]}}}, r"run\.dir is set, and each trial has"),
        (
            {"command": ["fulgurite", "fit", "--run.dir=a", "${args}"]},
            r"run\.dir is set, and each trial has",
        ),
        ({"method": "custom"}, "method is 'custom'.*Give grid, random, bayes"),
        ({"job": "x"}, "the file has 'job'"),
        ({"controller": {"type": "local"}}, "has 'controller'"),
        ({"command": ["python", "train.py"]}, "the command is"),
        (
            {"command": ["${env}", "${interpreter}", "fulgurite", "fit", "${args}"]},
            "the command is",
        ),
        ({"command": ["fulgurite", "test", "${args}"]}, "the command is"),
        ({"metric": {"name": "x", "goal": "up"}}, "metric.goal is 'up'"),
        ({"metric": {"name": "x", "impute": "worst"}}, "metric has 'impute'"),
        ({"method": "bayes", "metric": None}, "bayes has no metric"),
        ({"parameters": {}}, "no parameters"),
        ({"parameters": {"x": {"values": []}}}, r"parameters.x.values is \[\]"),
        ({"parameters": {"x": {"value": 1, "values": [1]}}}, "parameters.x has 'values'"),
        ({"parameters": {"x": {"min": 2, "max": 1}}}, "goes from 2 to 1"),
        ({"parameters": {"x": {"min": 2}}}, "has no 'max'"),
        ({"parameters": {"x": {"distribution": "gauss"}}}, "distribution is 'gauss'"),
        (
            {"parameters": {"x": {"distribution": "int_uniform", "min": 1, "max": 2.5}}},
            "whole numbers",
        ),
        (
            {"parameters": {"x": {"distribution": "log_uniform_values", "min": 0, "max": 1}}},
            "min is 0",
        ),
        (
            {"parameters": {"x": {"distribution": "log_uniform", "min": 1, "max": 1000}}},
            "natural logarithms",
        ),
        ({"parameters": {"x": {"distribution": "normal", "sigma": 0}}}, "sigma is 0"),
        ({"parameters": {"x": {"values": [1, 2], "probabilities": [1]}}}, "one number for each"),
        ({"parameters": {"x": {"values": [1, 2], "probabilities": [1, 1]}}}, "sum to 2"),
        ({"parameters": {"x": {"min": 0.0, "max": 1.0}}}, "no finite list of values for a grid"),
        (
            {"parameters": {"x": {"values": [1, 2], "probabilities": [0.5, 0.5]}}},
            "grid cannot honour",
        ),
        ({"early_terminate": {"type": "envelope"}}, "type is 'envelope'"),
        ({"early_terminate": {**RULE, "eta": 1}}, "eta is 1"),
        ({"early_terminate": {**RULE, "max_iter": 9, "s": 2}}, "both min_iter and max_iter"),
        ({"early_terminate": {"type": "hyperband", "max_iter": 9}}, "early_terminate.s is None"),
        ({"early_terminate": {"type": "hyperband", "max_iter": 2, "s": 1}}, "below 1"),
        ({"early_terminate": {**RULE, "patience": 9}}, "has 'patience'"),
        ({"run_cap": 0}, "run_cap is 0"),
        (
            {"parameters": {"a.b": {"value": 1}, "a": {"parameters": {"b": {"values": [2]}}}}},
            r"parameters\.a\.b is there twice",
        ),
    ],
)
def test_a_sweep_that_cannot_be_honoured_is_refused_by_name(folder, changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        read(folder, **changes)
    assert "sweep.yaml" in str(error.value)


def test_wrong_calls_are_refused(folder):
    with pytest.raises(
        ConfigError, match=r"no configuration 'nothing\.yaml', neither a file nor packaged"
    ):
        sweep.read_sweep("nothing.yaml")
    (folder / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match=r"bad\.yaml is not YAML"):
        sweep.read_sweep("bad.yaml")
    with pytest.raises(ConfigError, match="describes a run, not a sweep"):
        sweep.read_sweep("fedsir/digits.yaml")
    (folder / "twice.yaml").write_text(
        "method: grid\nparameters: {lr: {value: 1}, lr: {value: 2}}\n"
    )
    with pytest.raises(ConfigError, match=r"twice\.yaml, line 2: this gives the key 'lr' again"):
        sweep.read_sweep("twice.yaml")
    file = write(folder, {**RANDOM, "run_cap": None})
    with pytest.raises(ConfigError, match="how many trials"):
        run(file)
    with pytest.raises(ConfigError, match=r"--name=\.\./a leads out of sweep_results"):
        run(file, out=None, name="../a")
    for option in ("storage", "out", "name"):
        with pytest.raises(ConfigError, match=f"--{option} is empty"):
            run(file, **{option: ""})
    for option in ("trials", "workers"):
        with pytest.raises(ConfigError, match=f"--{option} is 0"):
            run(file, **{option: 0})
    with pytest.raises(ConfigError, match="cannot be used"):
        run(file, trials=1, storage="mysterious://x")
    with pytest.raises(ConfigError, match=r"cannot be used.*sqlite:///") as error:
        run(file, trials=1, storage="postgresql+psycopg://me:secret@127.0.0.1:1/x")
    assert "secret" not in str(error.value)


def test_passwords_are_hidden():
    assert (
        hide_password("postgresql+psycopg://me:secret@host/db")
        == "postgresql+psycopg://me:***@host/db"
    )
    assert "secret" not in hide_password("me:secret@host")


# Ending runs early


def test_bands_are_those_of_the_file(folder):
    def bands(**rule):
        return read(folder, early_terminate={"type": "hyperband", **rule}).early_terminate.bands

    assert bands(min_iter=3)[:4] == (3, 9, 27, 81)
    assert bands(min_iter=2, eta=2)[:4] == (2, 4, 8, 16)
    assert bands(max_iter=27, s=2) == (3, 9)
    assert bands(max_iter=27, s=9) == (1, 3, 9)


def test_a_run_is_ended_where_it_is_not_among_the_best(folder):
    rule = EarlyTerminate(bands=(2,), eta=3, strict=True)
    others = [[9, value] for value in (1.0, 2.0, 3.0, 4.0, 5.0)]
    # the third best of six is the last of the best third, as W&B counts
    assert [falls_behind([9, v], others, rule) for v in (2.5, 3.5)] == [False, True]
    assert not falls_behind([99.0], others, rule)
    patient = EarlyTerminate(bands=(2,), eta=3, strict=False)
    assert not falls_behind([0.5, 4.5], others, patient)
    assert falls_behind([0.5, 4.5], others, rule)


class Steady(BoringModel):
    """Logs the same value after each epoch."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def on_validation_epoch_end(self):
        self.log("val/acc", self.value)


def test_the_reporter_ends_a_run_that_falls_behind(folder, monkeypatch):
    rule = {"type": "hyperband", "min_iter": 2, "eta": 2}
    content = read(folder, early_terminate=rule)
    url = f"sqlite:///{folder / 'a.db'}"
    monkeypatch.setenv("FULGURITE_SWEEP_STORAGE", url)
    study = open_study(content, url, "x", 0)
    epochs = []
    for value in (0.9, 0.5, 0.1):
        study.enqueue_trial({"lr": 0, "width": len(epochs)})
        trial = next_point(study, content, 6).trial
        trainer = Trainer(
            max_epochs=4,
            limit_train_batches=1,
            limit_val_batches=1,
            callbacks=[TrialReporter("x", trial.number, "val/acc")],
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Steady(value))
        epochs.append(trainer.current_epoch)
    histories = [list(t.intermediate_values.values()) for t in study.trials]
    # the second of two is kept, as W&B keeps it; the last of three is not
    assert epochs == [4, 4, 2]
    np.testing.assert_allclose(histories[2], [0.1, 0.1], rtol=1e-6)
    assert study.trials[2].user_attrs["ended_after"] == 2


def test_the_reporter_alone_is_refused(monkeypatch):
    monkeypatch.delenv("FULGURITE_SWEEP_STORAGE", raising=False)
    trainer = Trainer(
        max_epochs=1,
        limit_train_batches=1,
        limit_val_batches=1,
        callbacks=[TrialReporter("x", 0, "val/acc")],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
    )
    with pytest.raises(ConfigError, match="belongs to a trial of a sweep"):
        trainer.fit(Steady(0.5))


@pytest.mark.slow
def test_a_packaged_configuration_is_swept_with_early_ends(folder):
    file = write(
        folder,
        {
            "method": "grid",
            "metric": {"name": "val/loss"},
            "command": ["fulgurite", "fit", "--config", "fedsir/smoke.yaml", "${args}"],
            "early_terminate": {"type": "hyperband", "min_iter": 1, "eta": 2},
            "parameters": {
                "model.init_args.optimizer.init_args.lr": {"values": [3.0e-3, 1.0e-3, 1.0e-8]},
                "trainer.max_epochs": {"value": 3},
                "trainer.enable_progress_bar": {"value": False},
            },
        },
    )
    study = sweep.run(file, out="out")
    assert [t.state.name for t in study.trials] == ["COMPLETE", "COMPLETE", "PRUNED"]
    assert [len(t.intermediate_values) for t in study.trials] == [3, 3, 1]
    best = yaml.safe_load((folder / "out" / "best.yaml").read_text())
    assert "TrialReporter" not in str(best)
    assert "sqlite" not in (folder / "out" / "trials" / "00000" / "config.yaml").read_text()
    from fulgurite.cli import parse

    config = parse(["fit", "--config", str(folder / "out" / "best.yaml")])
    assert config.model.init_args.optimizer.init_args.lr in (3e-3, 1e-3)


def test_the_command_line(folder, capsys):
    file = write(folder, GRID)
    assert main([file, "--dry-run", "--runner=sweep_runner:main"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "fulgurite fit --config base.yaml --lr=0.1 --width=1"
    assert len(lines) == 6
    assert not (folder / "sweep_results").exists()


# PostgreSQL


@pytest.fixture
def postgres():
    """A server of its own on a free port; skipped where PostgreSQL is not installed."""
    if find_initdb() is None:
        pytest.skip("PostgreSQL is not installed")
    with run_postgresql() as address:
        yield address


@pytest.mark.slow  # two drivers of one SQLite file, above, are not
def test_two_drivers_share_one_postgresql(folder, postgres):
    """And one of them is killed."""
    file = write(folder, GRID)
    drivers = [start(folder, file, f"out{i}", postgres, SLEEP="0.5") for i in range(2)]
    wait_until(lambda: len(ran(folder)) >= 2)
    os.kill(drivers[0].pid, signal.SIGKILL)
    drivers[0].wait()
    ended = drivers[1].wait()
    assert ended.status == 0, ended.output
    assert "secret" not in ended.output
    study = optuna.load_study(study_name=f"{folder.name}-sweep", storage=postgres)
    done = [t.params for t in study.trials if t.state == TrialState.COMPLETE]
    assert len(done) == len({json.dumps(p) for p in done}) == 6
