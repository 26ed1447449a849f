"""Systems that other packages announce: whole ones are used, broken ones are a line."""

import sys
from pathlib import Path

import pytest

from fulgurite.__main__ import main
from fulgurite.systems import config_path, packaged_configs, plug_ins, system_of_config, systems

SYSTEM = """
from fulgurite.systems import Command, System
SYSTEM = System("{name}", "a title", "A Paper", "https://example.org", "{configs}", {commands})
"""


@pytest.fixture
def announce(tmp_path, monkeypatch):
    """Install a package that announces a system, for this test alone."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    before = {*sys.modules}

    def install(package, code, value="SYSTEM"):
        module = package.replace("-", "_")
        (site / module).mkdir()
        (site / module / "__init__.py").write_text(code)
        (site / module / "default.yaml").write_text("trainer: {max_epochs: 1}\n")
        facts = site / f"{module}-0.1.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1\n")
        entry = f"[fulgurite.systems]\n{module} = {module}:{value}\n"
        (facts / "entry_points.txt").write_text(entry)
        plug_ins.cache_clear()

    yield install
    for name in {*sys.modules} - before:
        if str(site) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    plug_ins.cache_clear()


def test_a_plug_in_is_a_system_like_ours(announce, fulgurite):
    announce("good", SYSTEM.format(name="good", configs="good", commands=""))
    assert "good" in systems()
    status, out, error = fulgurite("systems")
    assert (status, error) == (0, "")
    assert "good/default.yaml" in out
    status, out, _ = fulgurite("doctor")
    assert "plug-in: good (good:SYSTEM, of good 0.1)" in out


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import absent_dependency", "No module named 'absent_dependency'"),
        ("def broken(:", "SyntaxError"),
        ("import sys; sys.exit(3)", "SystemExit"),
        ("SYSTEM = 3", "it is a int, not a fulgurite.systems.System"),
        ("", "AttributeError"),
        (SYSTEM.format(name="fedsir", configs="bad", commands=""), "system named 'fedsir' already"),
        (SYSTEM.format(name="bad", configs="bad.absent", commands=""), "No module named"),
        (
            SYSTEM.format(name="bad", configs="bad", commands='(Command("fit", "", "bad:main"),)'),
            "there is a command 'fit' already",
        ),
        (
            SYSTEM.format(
                name="bad",
                configs="bad",
                commands='(Command("a", "", "bad:x"), Command("a", "", "bad:y"))',
            ),
            "there is a command 'a' already",
        ),
        (
            SYSTEM.format(name="bad", configs="bad", commands='(Command("", "", "bad:main"),)'),
            "its command '' is no word",
        ),
        (SYSTEM.format(name="--config", configs="bad", commands=""), "'--config' is no word"),
        ("from fulgurite.systems import System\nSYSTEM = System('x', None, '', '', 'x')", "title"),
        ("class Panic(BaseException): pass\nraise Panic", "Panic"),
    ],
)
def test_a_broken_plug_in_is_one_line_and_the_rest_works(announce, fulgurite, code, words):
    announce("bad", code)
    announce("good", SYSTEM.format(name="good", configs="good", commands=""))
    status, out, error = fulgurite("systems")
    assert status == 0
    assert error.count("\n") == 1, error
    assert "warning: the plug-in 'bad' (bad:SYSTEM, of bad 0.1) cannot be used: " in error
    assert words in error
    assert "good/default.yaml" in out
    assert "fedsir/digits.yaml" in out
    status, out, _ = fulgurite("doctor")
    assert status == 1
    assert "fault: the plug-in 'bad' (bad:SYSTEM, of bad 0.1) cannot be used: " in out
    assert words in out


def test_a_configuration_of_a_broken_plug_in_says_why_it_is_out_of_reach(announce, fulgurite):
    announce("bad", "import absent_dependency")
    status, _, error = fulgurite("fit", "--config", "bad/default.yaml")
    assert status == 2
    assert "'bad/default.yaml' is out of reach" in error
    assert "No module named 'absent_dependency'" in error.splitlines()[-1]


def test_what_a_plug_in_prints_is_not_in_what_commands_print(announce, fulgurite):
    code = SYSTEM.format(name="good", configs="good", commands="")
    announce("good", f"print('Welcome to good')\n{code}")
    status, out, error = fulgurite("systems")
    assert status == 0
    assert "Welcome" not in out
    assert "Welcome" in error


def test_configurations_of_a_folder_that_is_no_package_are_found(announce, tmp_path):
    announce("good", SYSTEM.format(name="good", configs="good.configs", commands=""))
    folder = tmp_path / "site" / "good" / "configs"
    folder.mkdir()
    (folder / "small.yml").write_text("trainer: {max_epochs: 1}\n")
    assert [*packaged_configs(systems()["good"])] == ["good/small.yml"]
    assert config_path("good/small.yml") == folder / "small.yml"
    assert system_of_config(folder / "small.yml") == "good"


@pytest.mark.parametrize("command", ["systems", "doctor"])
def test_words_that_a_command_does_not_take_are_refused(command, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([command, "--quiet"])
    assert "unrecognized arguments: --quiet" in capsys.readouterr().err


def test_a_command_that_cannot_be_loaded_is_one_line(announce, fulgurite):
    commands = '(Command("look", "looks", "good.absent:main"),)'
    announce("good", SYSTEM.format(name="good", configs="good", commands=commands))
    status, _, error = fulgurite("look")
    assert status == 2
    assert "The command 'look' of the system 'good' cannot be loaded" in error


def test_modules_of_the_current_folder_are_found_and_shadow_nothing(workdir, monkeypatch):
    from fulgurite.__main__ import main

    monkeypatch.setattr(sys, "path", [p for p in sys.path if Path(p or ".").resolve() != workdir])
    main(["report", "absent"])
    assert sys.path[-1] == str(workdir)
    main(["report", "absent"])
    assert sys.path.count(str(workdir)) == 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["fit", "--config", "fedsir/compare.yaml"],
            "describes a comparison, not a run. Use `fulg",
        ),
        (
            ["fit", "--config=fedsir/sweep.yaml"],
            "a sweep, not a run. Use `fulgurite sweep fedsir/sweep.yaml`",
        ),
        (["compare", "fedsir/digits.yaml"], "a run, not a comparison. Use `fulgurite fit --config"),
        (["compare", "fedsir/sweep.yaml"], "describes a sweep, not a comparison."),
    ],
)
def test_a_file_of_another_kind_is_recognised(fulgurite, argv, words):
    status, _, error = fulgurite(*argv)
    assert status == 2
    assert words in error
    assert len(error.splitlines()) == 1


def test_systems_tells_kinds_of_files_apart(fulgurite):
    _, out, _ = fulgurite("systems")
    lines = {line.split()[0]: line.strip() for line in out.splitlines() if ".yaml" in line}
    assert lines["fedsir/digits.yaml"] == "fedsir/digits.yaml"
    assert lines["fedsir/compare_cifar10.yaml"] == "fedsir/compare_cifar10.yaml (compare)"
    path = lines["fedsir/sweep.yaml"].rpartition("wandb sweep ")[2].rstrip(")")
    assert Path(path).is_file()
