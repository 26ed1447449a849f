"""Damaged files of every format are read or refused by name; `python -m tests.fuzz` tries more."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from . import harness
from .harness import READ, REFUSED, make_input, report, run, try_input
from .targets import Target, make_targets


@pytest.fixture(scope="module")
def targets():
    return make_targets()


def test_undamaged_files_are_read(targets, tmp_path, cache):
    for target in targets.values():
        for number in range(len(target.seeds)):
            kind, _ = try_input(target, tmp_path / "fuzzed", 0, number)
            assert (target.name, number, kind) == (target.name, number, READ)


def test_inputs_follow_from_their_number(targets):
    target = targets["plates.csv"]
    assert make_input(target, 3, 40) == make_input(target, 3, 40)
    assert make_input(target, 3, 40) != make_input(target, 3, 41)


def test_damaged_files_are_read_or_refused_by_name(targets, tmp_path, cache):
    kinds = []
    for target in targets.values():
        first = len(target.seeds)
        for number in range(first, first + 10):
            kind, what = try_input(target, tmp_path / "fuzzed", 0, number)
            assert kind in (READ, REFUSED), f"{target.name} --input {number}: {what}"
            kinds.append(kind)
    assert {*kinds} == {READ, REFUSED}


def test_a_fault_is_known_by_its_input(capsys, monkeypatch):
    from fulgurite.errors import DataError

    def read(folder):
        content = (folder / "a").read_bytes()
        actions = {
            b"crash": lambda: os.kill(os.getpid(), signal.SIGSEGV),
            b"slow": lambda: time.sleep(9),
            b"unnamed": lambda: 1 / 0,
        }
        actions.get(content, lambda: None)()
        if content != b"good":
            raise DataError(f"{folder} is bad." if content == b"refused" else "It is bad.")

    contents = (b"good", b"refused", b"unnamed", b"nameless", b"crash", b"slow")
    target = Target("made", [{"a": content} for content in contents], read)
    monkeypatch.setattr(harness, "SECONDS", 0.5)
    outcome = run(target, 0, 0, 6)
    assert outcome.counts == {name.decode().replace("good", "read"): 1 for name in contents}
    assert [(n, kind) for n, kind, _ in sorted(outcome.faults)] == [
        (2, "unnamed"), (3, "nameless"), (4, "crash"), (5, "slow"),
    ]  # fmt: skip
    assert report({"made": outcome}).tried == 6
    assert "made --input 2: unnamed: " in capsys.readouterr().out


@pytest.mark.slow
def test_more_damaged_files_are_read_or_refused_by_name():
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--count", "20000", "--seed", "11"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[0].startswith("format")
