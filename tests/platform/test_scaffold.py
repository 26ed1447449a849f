"""``fulgurite new``: a package that runs at once."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fulgurite.__main__ import main
from fulgurite.errors import ConfigError
from fulgurite.scaffold import create_package
from fulgurite.testing.survival import start_call


def run(command, folder, **environment):
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_tests(folder):
    """Run the tests of a package in a fork of this process, which has imported everything."""

    def work():
        os.chdir(folder)
        return pytest.main(["-q", "-p", "no:cacheprovider", "-o", "pythonpath=."])

    ended = start_call(work, folder).wait()
    assert ended.status == 0, ended.output
    return ended.output


def test_a_new_package_passes_its_own_tests_and_ruff(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["new", "my_paper"]) == 0
    assert "fulgurite fit --config my_paper/configs/smoke.yaml" in capsys.readouterr().out
    folder = tmp_path / "my_paper"
    assert "2 passed" in run_tests(folder)
    rules = ["--select=E,F,W,I,B,UP,D1", "--ignore=D107,D104,D103", "--line-length=100"]
    run(["-m", "ruff", "check", "--isolated", *rules, "my_paper"], folder)
    run(["-m", "ruff", "check", "."], folder)  # as users do
    run(["-m", "ruff", "format", "--check", "."], folder)
    for file in (folder / "my_paper" / "configs").glob("*.yaml"):
        assert isinstance(yaml.safe_load(file.read_text()), dict)


@pytest.mark.slow
def test_an_installed_package_is_a_system(tmp_path):
    create_package("my_paper", tmp_path)
    site = tmp_path / "site"
    pip = ["-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", f"--target={site}"]
    run([*pip, "./my_paper"], tmp_path)
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    assert "my_paper/default.yaml" in run(["-m", "fulgurite", "systems"], tmp_path, PYTHONPATH=path)
    command = ["-m", "fulgurite", "compare", "my_paper/compare.yaml", "--quick", "--out=out"]
    assert "2 of 2 cells finished" in run(command, tmp_path, PYTHONPATH=path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("My-Paper", "cannot be the name"),
        ("class", "cannot be the name"),
        ("../x", "cannot be the name"),
        ("fedsir", "a system 'fedsir' already"),
        ("torch", "a module 'torch' already"),
        ("tests", "in a folder 'tests'"),
    ],
)
def test_a_name_that_cannot_be_taken_is_refused(tmp_path, name, words):
    with pytest.raises(ConfigError, match=words):
        create_package(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_package_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write, files = Path.write_text, []

    def fill_disk(self, text, **options):
        files.append(self)
        if len(files) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, text, **options)

    monkeypatch.setattr(Path, "write_text", fill_disk)
    with pytest.raises(OSError, match="No space"):
        create_package("my_paper", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "my_paper").mkdir()
    with pytest.raises(ConfigError, match="is there already"):
        create_package("my_paper", tmp_path)
    assert list((tmp_path / "my_paper").iterdir()) == []
