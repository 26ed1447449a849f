"""Modules, callbacks and configurations of users, which know nothing of this project."""

from pathlib import Path

import pytest
import torch
import yaml

CODE = """
import enum
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch.utils.data import DataLoader

class Rows(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(torch.ones(4, 2), batch_size=2)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader

class Net(LightningModule):
    def __init__(self, lr: float = 0.1, vector: bool = False, **options):
        super().__init__()
        self.layer, self.lr, self.vector = torch.nn.Linear(2, 1), lr, vector

    def forward(self, batch):
        return self.layer(batch)

    def training_step(self, batch, index):
        self.log("train/loss", torch.ones(3) if self.vector else 1.0)
        return self.layer(batch).mean()

    def test_step(self, batch, index):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)

class Color(enum.Enum):
    RED = 1

class Paths(Callback):
    def state_dict(self):
        return {"files": [Path("a"), Color.RED]}
"""
OPTIONS = (
    "--model=users_code.Net",
    "--data=users_code.Rows",
    "--trainer.enable_progress_bar=false",
)
SHORT = (*OPTIONS, "--trainer.max_epochs=1", "--trainer.enable_model_summary=false")


@pytest.fixture
def users_code(workdir, monkeypatch):
    """A module of the user's in the current folder."""
    Path("users_code.py").write_text(CODE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(Path.cwd()))


def check_refused(fulgurite, argv, parts):
    status, _, error = fulgurite(*argv)
    assert status == 2, error
    line = error.strip().splitlines()[-1]
    assert line.startswith("fulgurite: error: ")
    assert [part for part in parts if part not in line] == []
    return line


@pytest.mark.usefixtures("users_code")
@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--ckpt_path="], ["--ckpt_path is empty"]),
        (["--run.dir="], ["--run.dir is empty"]),
        (["--run.name="], ["--run.name is empty"]),
        (["--trainer.accumulate_grad_batches=0"], ["trainer.accumulate_grad_batches is 0"]),
        (["--trainer.accumulate_grad_batches=-1"], ["accumulate_grad_batches is -1"]),
        (["--trainer.check_val_every_n_epoch=0"], ["trainer.check_val_every_n_epoch is 0"]),
        (["--trainer.val_check_interval=0"], ["trainer.val_check_interval is 0"]),
        (["--trainer.val_check_interval=5"], ["`val_check_interval` (5)", "batches (2)"]),
        (["--trainer.barebones=true"], ["trainer.barebones=true leaves out all records"]),
        (["--model.vector=true"], ["self.log(train/loss", "single element"]),
        (["--seed_everything=-1"], ["-1 is not in bounds"]),
        (
            ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/nothing"],
            ["`val/nothing` which is not available", "`train/loss`"],
        ),
        (
            ["--trainer.callbacks+=users_code.Paths", "--trainer.callbacks+=users_code.Paths"],
            ["more than one stateful callback of type `Paths`"],
        ),
        (
            ["--trainer.callbacks+=users_code.Paths", "--trainer.callbacks.files=3"],
            ["users_code.Paths has no option 'files'. It has no options of its own."],
        ),
        (
            ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.filename=last"],
            ["filename=last", "Give it another filename"],
        ),
        (["--model.optoins=3"], ["users_code.Net has no option 'optoins'. It has: lr, vector."]),
        (["--trainer.logger=Nope"], ["'Nope' is no class", "package.module.Nope"]),
    ],
)
def test_what_lightning_would_refuse_late_is_one_line(fulgurite, options, parts):
    check_refused(fulgurite, ["fit", *SHORT, *options], parts)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("modle: a.B", ["no option 'modle'. Did you mean 'model'?"]),
        ("trainers: {max_epochs: 1}", ["'trainers.max_epochs'. Did you mean 'trainer.max_epochs'"]),
        ("trainer: {max_epoch: 1}", ["'trainer.max_epoch'. Did you mean 'trainer.max_epochs'?"]),
        ("mine: {lr: 1}", ["no option 'mine.lr'. See `fulgurite fit --help`."]),
        ("fit: {seed_everything: 1}", ["no option 'fit.seed_everything'. Move", "`fit:`"]),
        ("", ["mine.yaml holds no options"]),
        ("- a", ["mine.yaml holds no options"]),
        ("trainer: [", ["mine.yaml cannot be read in line"]),
        (
            "trainer:\n  max_epochs: 1\n  max_epochs: 2",
            ["mine.yaml", "line 3", "'max_epochs' again"],
        ),
    ],
)
def test_a_faulty_configuration_is_named(fulgurite, content, parts):
    Path("mine.yaml").write_text(content, encoding="utf-8")
    check_refused(fulgurite, ["fit", "--config=mine.yaml"], parts)


@pytest.mark.usefixtures("workdir")
def test_an_included_file_that_gives_a_key_twice_is_refused(fulgurite):
    Path("part.yaml").write_text("max_epochs: 1\nmax_epochs: 2\n", encoding="utf-8")
    Path("mine.yaml").write_text("trainer: part.yaml\n", encoding="utf-8")
    check_refused(
        fulgurite,
        ["fit", "--config=mine.yaml"],
        ["trainer", "'part.yaml'", "gives 'max_epochs' again", "line 2"],
    )


@pytest.mark.usefixtures("users_code")
def test_a_record_without_a_configuration_is_run_again_under_its_own_name(fulgurite):
    status, _, error = fulgurite("fit", *SHORT)
    assert status == 0, error
    (folder,) = Path("runs/custom/run").iterdir()
    run = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["run"]
    assert (run["system"], run["name"]) == ("custom", "run")
    assert fulgurite("fit", "--config", str(folder / "config.yaml"))[0] == 0
    assert len([*Path("runs/custom/run").iterdir()]) == 2
    assert [path.name for path in Path("runs").iterdir()] == ["custom"]


@pytest.mark.usefixtures("users_code")
def test_a_checkpoint_that_could_not_be_resumed_is_refused_when_it_is_written(fulgurite):
    parts = [
        "last.ckpt would be one that cannot be read again",
        "callbacks.Paths.files[0] holds a pathlib.",
        "str(path)",
    ]
    check_refused(fulgurite, ["fit", *SHORT, "--trainer.callbacks+=users_code.Paths"], parts)
    assert not [*Path("runs").rglob("*.ckpt")]


@pytest.mark.usefixtures("users_code")
def test_what_a_checkpoint_of_another_program_holds_is_named(fulgurite):
    torch.save({"state_dict": {}, "hyper_parameters": {"file": Path("a")}}, "other.ckpt")
    parts = ["other.ckpt holds pathlib.PosixPath", "only tensors and plain types are read"]
    check_refused(fulgurite, ["fit", *SHORT, "--ckpt_path=other.ckpt"], parts)


@pytest.mark.usefixtures("users_code")
@pytest.mark.parametrize(
    ("command", "option", "words"),
    [
        ("fit", "limit_train_batches=0", "there was no batch"),
        ("test", "limit_test_batches=0", "there was no batch"),
        ("predict", "limit_predict_batches=0", "there was no batch to predict"),
        ("test", "limit_test_batches=1", "the model logged no metric"),
    ],
)
def test_a_command_without_batches_says_so(fulgurite, command, option, words):
    status, out, error = fulgurite(command, *SHORT, f"--trainer.{option}")
    assert status == 0, error
    assert words in out


@pytest.mark.usefixtures("users_code")
@pytest.mark.parametrize("command", ["test", "predict"])
def test_what_a_limit_leaves_out_is_told(fulgurite, command):
    """A recorded configuration may have it from its training."""
    limit = f"--trainer.limit_{command}_batches"
    _, _, error = fulgurite(command, *SHORT, f"{limit}=1")
    assert f"note: {limit.removeprefix('--')}=1: 1 of 2 batches were taken" in error
    _, _, error = fulgurite(command, *SHORT, f"{limit}=2")
    assert "batches were taken" not in error


@pytest.mark.usefixtures("users_code")
@pytest.mark.parametrize(
    ("options", "until", "is_cut"),
    [
        ([], "--trainer.max_steps=1", True),
        ([], "--trainer.max_epochs=1", False),
        (["--trainer.limit_train_batches=1"], "--trainer.max_epochs=1", False),
    ],
)
def test_an_epoch_that_max_steps_has_cut_is_told(fulgurite, options, until, is_cut):
    common = (*OPTIONS, "--run.dir=cut", "--trainer.enable_model_summary=false", *options)
    status, _, error = fulgurite("fit", *common, until)
    assert status == 0, error
    status, _, error = fulgurite("fit", *common, "--trainer.max_epochs=3", "--ckpt_path=last")
    assert status == 0, error
    assert ("note: the run ended within epoch 0, after 1 of its batches" in error) == is_cut
