"""The commands and code of README and site do what the pages say."""

import ast
import contextlib
import pkgutil
import re

import pytest
from fakes.pages import PAGES, RUN, blocks, commands, imported_names, run_page
from fakes.repository import ROOT

from fulgurite.__main__ import main
from fulgurite.cli import parse
from fulgurite.compare import read_plan

#: Pages that a test of their own runs, on data that it makes.
ELSEWHERE = {"docs/complete_your_own_flight.md": "tests/configs/test_own_flight.py"}
#: A page that runs in seconds; the others are slow tests.
QUICK = {"docs/start.md"}

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="needs the repository")

NAMES = {str(page.relative_to(ROOT)): page for page in PAGES}
RUNNABLE = [
    pytest.param(page, id=name, marks=[] if name in QUICK else [pytest.mark.slow])
    for name, page in NAMES.items()
    if name not in ELSEWHERE and any(block.is_run for block in blocks(page))
]
NOT_RUN = [block for page in PAGES for block in blocks(page) if block.reason]


@pytest.mark.parametrize("page", RUNNABLE)
def test_the_blocks_of_a_page_run(page, workdir, fulgurite, monkeypatch):
    monkeypatch.syspath_prepend(str(workdir))
    monkeypatch.setenv("PYTHONPATH", "")

    def call(words):
        is_training = words[0] in ("fit", "test", "validate", "predict")
        more = ["--trainer.enable_progress_bar=false"] if is_training else []
        status, out, err = fulgurite(*words, *more)
        print(out[-2000:], err[-2000:])
        return status

    assert run_page(page, workdir, call) > 0


def test_each_block_of_commands_runs_or_says_why_not():
    for page in PAGES:
        for block in blocks(page):
            if block.language in RUN:
                continue
            first = [line.split(" ")[0].removeprefix("$") for line in block.text.splitlines()]
            named = {"fulgurite", "pip", "python", "wandb", "make"} & set(first)
            assert not named, f"{block}: a block of {named} is ```bash, run or `# not run: reason`"


def test_pages_that_are_run_elsewhere_are_named_there():
    for page, test in ELSEWHERE.items():
        assert page in (ROOT / test).read_text()


def find_missing(names):
    """Those of dotted names that cannot be imported."""
    missing = []
    for name in names:
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            missing.append(name)
    return missing


@pytest.mark.parametrize("block", [b for b in NOT_RUN if b.language == "python"], ids=str)
def test_code_that_is_not_run_imports_what_exists(block):
    ast.parse(block.text)
    assert find_missing(imported_names(block.text)) == []


@pytest.mark.slow
@pytest.mark.parametrize("block", [b for b in NOT_RUN if b.language == "bash"], ids=str)
def test_commands_that_are_not_run_have_options_that_exist(block, workdir):
    """Of trainings the options are parsed, of comparisons the plan is read."""
    for command in commands(block):
        words = command.words
        if words[0] != "fulgurite":
            continue
        configs = re.findall(r"[\w-]+/[\w-]+\.yaml", command.line)
        is_packaged = bool(configs) and (ROOT / "configs" / configs[0]).is_file()
        if words[1] in ("fit", "test", "validate", "predict") and is_packaged:
            options = [word for word in words[1:] if not word.startswith("--print_config")]
            assert parse(options).model.class_path
        elif words[1] == "compare" and is_packaged:
            assert read_plan(configs[0]).methods


def list_other_commands():
    """Words behind ``fulgurite`` of commands that are not run and train nothing, by command."""
    lines = {}
    for command in (c for block in NOT_RUN if block.language == "bash" for c in commands(block)):
        words = command.words
        if words[0] == "fulgurite" and words[1] not in ("fit", "test", "validate", "predict"):
            lines.setdefault(words[1], []).append(words[2:])
    return lines


@pytest.mark.slow
@pytest.mark.parametrize(("name", "lines"), list_other_commands().items())
def test_other_commands_that_are_not_run_have_options_that_exist(name, lines, capsys):
    for words in lines:
        part = [word for word in words[:1] if name in ("federate", "plates")]
        with contextlib.suppress(SystemExit):  # of argparse, when it has printed
            main([name, *part, "--help"])
        text = capsys.readouterr().out
        options = {word.partition("=")[0] for word in words if re.match("--[a-z]", word)}
        for option in (option for option in options if "." not in option):
            assert re.search(rf"{option}(?![\w-])", text), f"fulgurite {name} {option}"


def test_dotted_names_of_the_pages_exist():
    """``fulgurite.models.…`` in code spans and blocks, files and configurations included."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        names = sorted(set(re.findall(r"(?<![\w./-])fulgurite(?:\.\w+)+", text)))
        files = ("systems", "yaml", "log", "toml", "json")
        assert find_missing(n for n in names if n.rpartition(".")[2] not in files) == [], page


def test_variables_of_the_environment_are_on_their_page():
    """Those that users set; processes of one run tell each other more."""
    page = (ROOT / "docs" / "reference" / "environment.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `(FULGURITE_\w+)`", page, re.MULTILINE))
    internal = {"FULGURITE_RUN_DIR", "FULGURITE_CHECKPOINT"}
    sources = [
        path
        for folder in ("platform", "datamodules", "models", "callbacks")
        for path in (ROOT / folder).rglob("*.py")
    ]
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    assert listed == set(re.findall(r"FULGURITE_[A-Z_]*[A-Z]\b", text)) - internal
