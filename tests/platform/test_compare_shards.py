"""Shards of a comparison, in one folder and in several that are merged."""

import csv
import json
import shutil
import subprocess
import sys
import time
from collections import Counter

import pytest
import yaml
from fakes.comparison import FILE, SHARED, go, prepare, runs, write

from fulgurite.compare.command import main
from fulgurite.compare.folder_lock import lock_folder
from fulgurite.compare.merge import merge
from fulgurite.compare.plan_file import read_plan
from fulgurite.compare.shards import Shard, parse_shard, select_shard
from fulgurite.compare.trials import define_trials
from fulgurite.compare.worker import execute_job
from fulgurite.errors import ConfigError

SMALL = {"methods": {name: FILE["methods"][name] for name in "ab"}, "seeds": [0, 1]}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The folder of a test, whose comparisons run in its own process: that takes no time."""

    def run_here(jobs, pool):
        yield from (execute_job(job, pool.runner) for job in jobs)

    monkeypatch.setattr("fulgurite.compare.driver.run_jobs", run_here)
    monkeypatch.setattr("fulgurite.compare.worker.gc.collect", lambda: 0)
    return prepare(tmp_path, monkeypatch)


def join(file, *folders, **options):
    return merge(file, folders, **{"out": "out", "runner": "fake_runner:main", **options})


def tables(place, folder):
    """The tables of a folder, without how long each cell took."""
    cells = [*csv.DictReader((place / folder / "table.csv").open())]
    texts = [(place / folder / name).read_bytes() for name in ("table.md", "summary.csv")]
    return [*texts, [{**cell, "seconds": ""} for cell in cells]]


@pytest.mark.parametrize("text", ["0/4", "5/4", "1/0", "1", "a/b", "-1/4", "1/4/2", "1.0/2", ""])
def test_what_is_no_shard_is_refused_by_name(place, text):
    with pytest.raises(ConfigError, match=r"--shard is '.*--shard 1/16"):
        main([write(place), f"--shard={text}", "--runner=fake_runner:main"])
    assert not (place / "compare_results").exists()


def test_each_cell_is_in_one_shard_and_they_are_even(place):
    plan = read_plan(write(place))
    trials = define_trials(plan)
    assert select_shard(trials, Shard(10**12, 10**12), plan) == []
    for count in (1, 2, 4, 5, 18, 30):
        parts = [select_shard(trials, Shard(k + 1, count), plan) for k in range(count)]
        assert sorted(t.id for part in parts for t in part) == sorted(t.id for t in trials)
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert parts == [select_shard(trials, Shard(k + 1, count), plan) for k in range(count)]


def test_cells_with_common_trainings_or_results_are_in_one_shard(place):
    plan = read_plan(write(place, **SHARED))
    trials = define_trials(plan)
    parts = [select_shard(trials, Shard(k, 3), plan) for k in (1, 2, 3)]
    assert sorted(map(len, parts)) == [0, 9, 9]  # all of a seed hangs together by `after`
    keys = [{training.key for t in part for training in t.trainings} for part in parts]
    assert not keys[0] & keys[1]
    methods = {**FILE["methods"], "a": {**FILE["methods"]["a"], "ignores": ["p"]}}
    plan = read_plan(write(place, methods=methods))
    trials = define_trials(plan)
    owners = Counter(
        (k, trial.digest)
        for k in range(1, 6)
        for trial in select_shard(trials, Shard(k, 5), plan)
        if trial.method == "a"
    )
    assert [*owners.values()] == [2, 2, 2]


def test_shards_of_one_folder_make_the_same_table(place, capsys):
    file = write(place, **SMALL)
    go(file, out="alone")
    before = len(runs(place))
    first = go(file, shard=Shard(2, 2))
    assert len(first.results) == 4
    assert "Shard 2/2: 4 of 8 cells." in capsys.readouterr().out
    assert "4 of 8 cells finished." in (place / "out" / "table.md").read_text()
    assert len(go(file, shard=Shard(1, 2)).results) == 8
    assert tables(place, "out") == tables(place, "alone")
    go(file, shard=Shard(2, 2))  # nothing twice, whoever comes
    go(file)
    assert len(runs(place)) - before == 16


@pytest.mark.slow
def test_shards_run_at_the_same_time(place):
    file = write(place, args={"sleep": 0.1}, seeds=[0, 1])
    command = [sys.executable, "-m", "fulgurite", "compare", file, "--workers=1", "--out=out"]
    shards = [
        subprocess.Popen([*command, "--runner=fake_runner:main", f"--shard={k}/2"]) for k in (1, 2)
    ]
    assert [process.wait(120) for process in shards] == [0, 0]
    fits = Counter(name for word, name, *_ in runs(place) if word == "fit")
    assert len(fits) == 12
    assert {*fits.values()} == {1}
    assert len(go(file, out="alone").results) == 12
    assert tables(place, "out") == tables(place, "alone")


def test_only_and_dry_run_of_a_shard(place, capsys):
    file = write(place)
    options = ["--runner=fake_runner:main", "--out=out", "--only", "a", "seed=0", "seed=1"]
    lines = []
    for k in (1, 2):
        assert main([file, *options, "--dry-run", f"--shard={k}/2"]) == 0
        lines.append(capsys.readouterr().out.splitlines())
    assert [len(part) for part in lines] == [4, 4]
    assert main([file, *options, "--dry-run"]) == 0
    assert sorted(lines[0] + lines[1]) == sorted(capsys.readouterr().out.splitlines())
    assert not (place / "out").exists()


def test_what_cannot_share_a_folder_is_refused(place):
    file, out = write(place), place / "out"
    with lock_folder(out, Shard(1, 2), "content"):
        with pytest.raises(ConfigError, match=r"Shard 1/2 is running in .*/out already"):
            go(file, shard=Shard(1, 2))
        with pytest.raises(ConfigError, match=r"Shard 1/2 is running in .*, which 1/3 cannot"):
            go(file, shard=Shard(1, 3))
        with pytest.raises(ConfigError, match=r"Shard 1/2 .* with other cells"):
            go(file, shard=Shard(2, 2))
        with pytest.raises(ConfigError, match="Another comparison is running"):
            go(file)
        with lock_folder(out, Shard(2, 2), "content"):
            pass
    with lock_folder(out), pytest.raises(ConfigError, match="Another comparison is running"):
        go(file, shard=Shard(1, 2))
    assert not (place / "runs.txt").exists()
    assert parse_shard("2/2") == Shard(2, 2)
    assert len(go(file, shard=Shard(1, 3), only=["seed=0"]).results) == 2  # the locks are free


@pytest.mark.slow
def test_a_killed_shard_goes_on_where_it_was(place):
    file = write(place, args={"sleep": 0.3}, seeds=[0, 1])
    command = [sys.executable, "-m", "fulgurite", "compare", file, "--workers=1", "--out=out"]
    command += ["--runner=fake_runner:main", "--shard=1/2"]
    with subprocess.Popen(command) as process:
        while not [*(place / "out" / "results").glob("*.json")]:
            time.sleep(0.02)
        process.kill()
    finished = {path.stem for path in (place / "out" / "results").glob("*.json")}
    go(file, shard=Shard(1, 2))
    assert len(go(file, shard=Shard(2, 2)).results) == 12
    fits = Counter(name for word, name, *_ in runs(place) if word == "fit")
    assert {fits[name] for name in finished} == {1}


def test_merged_folders_make_the_same_table(place, capsys):
    file = write(place, **SMALL)
    go(file, out="alone")
    for k in (1, 2):
        go(file, out=f"part{k}", shard=Shard(k, 2))
    capsys.readouterr()
    assert join(file, "part1", "part2", dry_run=True) is None
    assert capsys.readouterr().out == "Records that would be merged: 8 taken over.\n"
    assert not (place / "out").exists()
    before = len(runs(place))
    assert len(join(file, "part1", only=["a"]).results) == 2 * 2
    capsys.readouterr()
    assert len(join(file, "part1", "part2").results) == 8
    assert "Records merged: 4 already there, 4 taken over.\n" in capsys.readouterr().out
    assert tables(place, "out") == tables(place, "alone")
    go(file)  # all has been run
    assert len(runs(place)) == before
    run_dir = place / "out" / "cells" / "b__p=0.25__seed=1"
    assert json.loads((run_dir / "test_metrics.json").read_text())
    assert (place / "out" / "logs" / "b__p=0.25__seed=1.log").exists()
    options = [file, "--out=out", "--runner=fake_runner:main"]
    assert main([*options, "--merge", "part1", "part2"]) == 0
    assert "Records merged: 8 already there." in capsys.readouterr().out


@pytest.mark.slow
def test_merged_trainings_serve_further_tests(place):
    file = write(place, **SHARED)
    for k in (1, 2):
        go(file, out=f"part{k}", shard=Shard(k, 2), runner="shared_runner:main")
    before = len(runs(place))
    assert len(join(file, "part1", "part2", runner="shared_runner:main").results) == 18
    more = write(place, **{**SHARED, "tests": {"shift": {"key": "shift", "values": [0, 3]}}})
    for folder in ("part1", "part2"):  # what is merged needs nothing of where it comes from
        (place / folder).rename(place / f"old-{folder}")
    comparison = go(more, runner="shared_runner:main")
    assert len(comparison.results) == 12
    assert [line[0] for line in runs(place)[before:]] == ["test"] * 6


def test_stale_records_are_counted_and_come_back_with_their_change(place, capsys):
    methods = {name: FILE["methods"][name] for name in "ab"}
    file = write(place, methods=methods, seeds=[0])
    go(file, out="part")
    changed = {**methods, "b": {"args": {"method": "b", "lr": 1}}}
    file = write(place, methods=changed, seeds=[0])
    capsys.readouterr()
    assert len(join(file, "part").results) == 2
    told = capsys.readouterr().out
    assert "Records merged: 2 taken over, 2 of what is no longer run, set aside." in told
    assert len([*(place / "part" / "results").iterdir()]) == 4  # as it was
    file = write(place, methods=methods, seeds=[0])
    before = len(runs(place))
    assert len(go(file).results) == 4
    assert len(runs(place)) == before
    (place / "part" / "results" / "a__p=0.5__seed=0.json").write_text("{}")
    fewer = write(place, methods={"a": methods["a"]}, seeds=[0], quick=None)
    capsys.readouterr()
    join(fewer, "part", out="other")
    told = capsys.readouterr().out
    assert "1 damaged or something else, left where they are" in told
    assert "2 of cells that the comparison does not have, left where they are" in told


def test_results_that_differ_are_refused_and_nothing_is_taken(place):
    methods = {name: FILE["methods"][name] for name in "ab"}
    file = write(place, methods=methods, seeds=[0])
    go(file, out="part1")
    shutil.copytree(place / "part1", place / "part2")
    path = place / "part2" / "results" / "b__p=0.5__seed=0.json"
    record = json.loads(path.read_text())
    record["metrics"]["test/acc"] += 0.25
    path.write_text(json.dumps(record))
    says = r"part1/results/b__p=0\.5__seed=0\.json and .*part2/.* differ in test/acc"
    with pytest.raises(ConfigError, match=says):
        join(file, "part1", "part2")
    assert not (place / "out" / "results").exists()


def test_a_result_tells_more_than_a_failure(place, monkeypatch, capsys):
    trouble = {"args": {"method": "a", "trouble": "status"}}
    file = write(place, methods={"a": trouble}, seeds=[0], quick=None)
    go(file, out="part1")
    comparison = join(file, "part1")
    assert len(comparison.failures) == 2
    assert "2 of failed cells taken over" in capsys.readouterr().out
    assert "hello" in (place / "out" / "failed" / "a__p=0.5__seed=0.log").read_text()
    monkeypatch.setenv("TROUBLE", "off")
    go(file, out="part2")
    comparison = join(file, "part1", "part2")
    assert len(comparison.results) == 2
    assert not [*(place / "out" / "failed").iterdir()]


def test_what_cannot_be_merged_is_refused_by_name(place):
    file = write(place, seeds=[0])
    (place / "part").mkdir()
    with pytest.raises(ConfigError, match="--merge names part, which holds no comparison"):
        join(file, "part")
    (place / "part" / "comparison.yaml").write_text(yaml.safe_dump(FILE))
    with pytest.raises(ConfigError, match="--merge names part, the folder that receives"):
        join(file, "part", out="part")
    with pytest.raises(ConfigError, match="--merge names part/ twice"):
        join(file, "part", "part/")
    with (
        lock_folder(place / "part", Shard(1, 2), ""),
        pytest.raises(ConfigError, match=r"running in .*/part"),
    ):
        join(file, "part")
    for option in ("--workers=1", "--retry-failed", "--shard=1/2"):
        with pytest.raises(ConfigError, match=f"{option.partition('=')[0]} says how cells are run"):
            main([file, "--merge", "part", option])
