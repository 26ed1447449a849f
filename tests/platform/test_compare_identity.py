"""What makes the record of a cell stale: configuration, included files, defaults, version, data."""

import importlib
import json
import os
import sys
from pathlib import Path

import pytest
import yaml

from fulgurite.clusters.engines import Engine
from fulgurite.compare import identity
from fulgurite.compare.command import main
from fulgurite.compare.driver import run
from fulgurite.compare.identity import Resolver, data_identity
from fulgurite.compare.plan_file import read_plan
from fulgurite.compare.trials import define_trials
from fulgurite.errors import ConfigError

PAPER = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule


class Data(LightningDataModule):
    def __init__(self, seed: int = 0, noise: float = 0.0, path: str = "", paths: list[str] = []):
        super().__init__()
        self.seed, self.noise = seed, noise

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(2, 1))

    test_dataloader = train_dataloader


class Net(LightningModule):
    def __init__(self, width: int = 4, rate: float = 0.1):
        super().__init__()
        self.layer = torch.nn.Linear(1, width)

    def training_step(self, batch, _):
        return self.layer(batch).sum()

    def test_step(self, batch, _):
        data = self.trainer.datamodule
        self.log("test/acc", data.noise + 0.1 * data.seed)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)
"""

COMPARISON = {
    "config": "top.yaml",
    "baseline": "small",
    "seeds": [0, 1],
    "args": {"trainer.enable_progress_bar": False, "trainer.enable_model_summary": False},
    "methods": {
        "small": {"args": {"model.init_args.width": 8}},
        "big": {"args": {"model.init_args.width": 32}},
    },
}


@pytest.fixture
def paper(tmp_path, monkeypatch):
    """A folder with a module, a configuration that includes three others, and a comparison."""
    (tmp_path / "tiny_paper.py").write_text(PAPER)
    top = {"model": "tiny_paper.Net", "data": "data_part.yaml", "trainer": "trainer_part.yaml"}
    write(tmp_path / "top.yaml", top)
    write(
        tmp_path / "data_part.yaml",
        {"class_path": "tiny_paper.Data", "init_args": {"noise": 0.4}},
    )
    write(tmp_path / "trainer_part.yaml", {"max_epochs": 1, "accelerator": "cpu", "logger": False})
    write(tmp_path / "comparison.yaml", COMPARISON)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("FULGURITE_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    yield tmp_path
    sys.modules.pop("tiny_paper", None)


def write(path: Path, content: object) -> None:
    path.write_text(yaml.safe_dump(content, sort_keys=False))


def parts() -> dict[str, dict[str, str]]:
    cells = define_trials(read_plan("comparison.yaml"), Resolver())
    assert len({cell.digest for cell in cells}) == len(cells)
    return {cell.id: dict(cell.parts) for cell in cells}


def changed(before: dict[str, dict[str, str]]) -> set[str]:
    """What differs now, which must be the same for all cells."""
    after = parts()
    kinds = [frozenset(k for k in b if b[k] != after[cell][k]) for cell, b in before.items()]
    (kind,) = {*kinds}
    return {*kind}


def test_comments_and_the_place_of_files_do_not_count(paper):
    before = parts()
    (paper / "top.yaml").write_text("# a comment\n" + (paper / "top.yaml").read_text())
    os.utime(paper / "data_part.yaml", (1, 1))
    assert changed(before) == set()


def test_an_included_file_counts(paper):
    before = parts()
    for name, old, new in (
        ("data_part", "0.4", "0.95"),
        ("trainer_part", "epochs: 1", "epochs: 2"),
    ):
        path = paper / f"{name}.yaml"
        text = path.read_text()
        path.write_text(text.replace(old, new))
        assert changed(before) == {"configuration"}
        path.write_text(text)
    assert changed(before) == set()


def test_a_changed_default_counts(paper):
    before = parts()
    (paper / "tiny_paper.py").write_text(PAPER.replace("rate: float = 0.1", "rate: float = 1e-9"))
    importlib.invalidate_caches()
    sys.modules.pop("tiny_paper")
    assert changed(before) == {"configuration"}


def test_the_version_counts(paper, monkeypatch):
    before = parts()
    monkeypatch.setattr(identity, "__version__", "99.0")
    assert changed(before) == {"version"}


def test_a_further_seed_leaves_the_others(paper):
    before = parts()
    write(paper / "comparison.yaml", {**COMPARISON, "seeds": [0, 1, 2]})
    after = parts()
    assert {name: after[name] for name in before} == before
    assert len(after) == 6


def test_data_that_the_configuration_names_count(paper, monkeypatch):
    (paper / "data" / "plates").mkdir()
    (paper / "data" / "plates" / "a.csv").write_text("1,2\n")
    (paper / "data" / "table.csv").write_text("3\n")
    arguments = {"path": "table.csv", "paths": ["plates"]}
    write(paper / "data_part.yaml", {"class_path": "tiny_paper.Data", "init_args": arguments})
    before = parts()
    (paper / "data").rename(paper / "moved")  # a copy elsewhere is the same data
    monkeypatch.setenv("FULGURITE_DATA", str(paper / "moved"))
    os.utime(paper / "moved" / "table.csv", (1, 1))
    assert changed(before) == set()
    (paper / "moved" / "table.csv").write_text("4\n")  # as long as before
    assert changed(before) == {"data"}
    (paper / "moved" / "table.csv").write_text("3\n")
    assert changed(before) == set()
    (paper / "moved" / "plates" / "b.csv").touch()
    assert changed(before) == {"data"}


def test_one_parser_for_all_agrees_with_the_command_line(paper):
    resolver, by_command_line = Resolver(), Resolver("fulgurite.cli:run")  # parsed anew
    for options in (
        ["--config", "top.yaml"],
        ["--config", "fedsir/smoke.yaml", "--model.init_args.local.batch_size=3"],
    ):
        ours = resolver(["fit", *options]).configuration
        theirs = by_command_line(["fit", *options]).configuration
        assert ours == json.loads(json.dumps(theirs))
    tested = resolver(["test", "--config", "top.yaml"])
    assert tested.configuration["data"]["init_args"]["noise"] == 0.4
    assert not tested.data
    texts = resolver(["fit", "--config", "stream_cqsa/text.yaml"]).data
    assert texts == {"stdlib": data_identity("stdlib")}


def test_the_content_of_files_to_predict_counts(paper):
    command = ["predict", "--config", "top.yaml"]
    assert "input" not in Resolver()(command).configuration
    Path("new.csv").write_text("1")
    before = Resolver()([*command, "--input=new.csv"])
    assert before.configuration["input"] == "new.csv"
    Path("new.csv").write_text("2")
    assert Resolver()([*command, "--input=new.csv"]).data != before.data != {}


def test_identity_of_files_and_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("FULGURITE_DATA", str(tmp_path))
    large = tmp_path / "large.bin"
    large.touch()
    size = 2**27  # too large to be read whole
    os.truncate(large, size)
    before = data_identity("large.bin")
    sample = (size - 2**16) * 8 // 17  # one of those between the ends
    for place in (0, size - 1, sample):
        with large.open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        assert data_identity("large.bin") != before
        before = data_identity("large.bin")
    assert data_identity("*.bin", "place") == data_identity("lar*.bin", "place") != ""
    assert data_identity("*.bin") == ""
    (tmp_path / "loop").symlink_to(tmp_path)  # leads back
    folder = data_identity(str(tmp_path))
    (tmp_path / ".cache").touch()  # hidden
    assert data_identity(str(tmp_path)) == folder
    (tmp_path / "new").touch()
    assert data_identity(str(tmp_path)) != folder
    for nothing in ("none", "", ".", "a\0b", "x" * 5000, "[", "/dev/null/x"):
        assert data_identity(nothing) == ""
    assert data_identity("stdlib").startswith("Python 3")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words").mkdir()
    monkeypatch.setenv("FULGURITE_DATA", str(tmp_path / "elsewhere"))
    assert data_identity("words") == ""  # as a mode of this name would be
    assert data_identity("words", "place") == data_identity("./words") != ""
    monkeypatch.setenv("FULGURITE_DATA", str(tmp_path))
    # what a run writes is no data of it
    assert data_identity(str(tmp_path / "large.bin"), "trainer") != ""
    monkeypatch.delenv("FULGURITE_DATA")
    assert data_identity(str(tmp_path / "large.bin"), "trainer") == ""


@pytest.mark.parametrize("text", ["a.csv", "words", "texts/*.txt"])
def test_data_here_count_before_those_of_the_folder_of_data(tmp_path, monkeypatch, text):
    for folder in ("here", "there"):
        for name in ("a.csv", "words/b.txt", "texts/c.txt"):
            file = tmp_path / folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(folder)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("FULGURITE_DATA", str(tmp_path / "there"))
    before = data_identity(text, "place")
    for file in Path().rglob("*.*"):
        file.write_text("other")
    assert data_identity(text, "place") != before  # which `data_path` reads
    for file in Path().rglob("*.*"):
        file.write_text("here")
    for file in (tmp_path / "there").rglob("*.*"):
        file.write_text("other")
    assert data_identity(text, "place") == before


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"args": {"trainer.max_epoks": 3}}, "max_epochs"),
        ({"methods": {"small": {}, "big": {"args": {"model.init_args.with": 3}}}}, "width"),
        (
            {
                "methods": {"small": {}},
                "settings": {"w": {"key": "model.init_args.width", "values": [1, "wide"]}},
            },
            "w=wide",
        ),
        ({"tests": {"t": {"none": {}, "bad": {"data.init_args.noize": 1}}}}, "noise"),
        ({"methods": {"small": {"test_args": {"data.init_args.noize": 1}}}}, "noise"),
        ({"methods": {"small": {"predict": {"data.init_args.noize": 1}}}}, "noise"),
        ({"tune": {"grid": {"w": {"key": "model.init_args.widht", "values": [1]}}}}, "width"),
        ({"seed_keys": ["data.init_args.sead"]}, "seed"),
        (
            {"methods": {"small": {}, "big": {"after": {"small": "model.init_args.weights"}}}},
            "weights",
        ),
    ],
)
def test_a_dry_run_checks_every_option(paper, changes, says):
    write(paper / "comparison.yaml", {**COMPARISON, **changes})
    with pytest.raises(ConfigError, match=says):
        main(["comparison.yaml", "--dry-run"])


def test_a_wrong_option_of_one_method_starts_no_cell_of_another(paper):
    methods = {**COMPARISON["methods"], "big": {"args": {"model.init_args.with": 3}}}
    write(paper / "comparison.yaml", {**COMPARISON, "methods": methods})
    with pytest.raises(ConfigError, match=r"methods\.big.*width"):
        run("comparison.yaml", out="out")
    assert not (paper / "out").exists()


@pytest.mark.slow
def test_other_data_make_cells_stale_from_the_command_line_on(paper, capsys):
    write(paper / "comparison.yaml", {**COMPARISON, "seeds": [0]})
    comparison = run("comparison.yaml", out="c", engine=Engine(workers=1))
    assert comparison.values("big", ()) == {0: pytest.approx(0.4)}
    path = paper / "data_part.yaml"
    path.write_text(path.read_text().replace("0.4", "0.95"))
    write(paper / "comparison.yaml", COMPARISON)
    comparison = run("comparison.yaml", out="c", engine=Engine(workers=1))
    assert comparison.values("big", ()) == {0: pytest.approx(0.95), 1: pytest.approx(1.05)}
    assert "outdated: 2 (2 of another configuration)" in capsys.readouterr().out
