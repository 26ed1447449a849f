"""Which training a command means: resuming, evaluating, records of both."""

import csv
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from fakes.fedsir import FEDAVG
from fakes.options import QUIET
from fakes.trainers import quiet_trainer
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader

from fulgurite.cli import parse
from fulgurite.errors import ConfigError
from fulgurite.masking import masked_arguments
from fulgurite.resuming import TrainingState
from fulgurite.run_folders import RunOptions, find_run, new_run_folder, training_differences
from fulgurite.tensor_files import load_plain, save_plain

SHORT = (*QUIET, FEDAVG, "--trainer.max_epochs=1")
SMOKE = ("--config", "fedsir/smoke.yaml", *SHORT)


def runs(root="runs"):
    return sorted(Path(root).glob("fedsir/smoke/*"))


def error_of(called):
    status, _, error = called
    lines = [line for line in error.splitlines() if line.startswith("fulgurite: error:")]
    assert status == 2, error
    assert len(lines) == 1, error
    return lines[0]


def rows(run):
    with (Path(run) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def trained(train_once):
    """A folder in which one epoch was trained, and a copy of it for each test."""
    _, folder = train_once("fit", *SMOKE)
    return folder / "runs"


@pytest.fixture
def one_run(trained, workdir):
    """The run of that training, in a folder of its own."""
    shutil.copytree(trained, "runs")
    (run,) = runs()
    return run


def test_a_resumed_run_goes_on_in_its_folder(fulgurite, one_run):
    before, first = rows(one_run), (one_run / "environment.json").read_bytes()
    status, out, _ = fulgurite("fit", *SMOKE, "--trainer.max_epochs=2", "--ckpt_path=last")
    assert status == 0
    assert runs() == [one_run]
    assert str(one_run) in out
    assert [row["epoch"] for row in rows(one_run)] == ["0", "0", "1", "1"]
    assert rows(one_run)[: len(before)] == before
    assert (one_run / "environment.1.json").read_bytes() == first
    state = load_plain(one_run / "checkpoints/best.ckpt", "best")
    assert state["epoch"] in (0, 1)
    (score,) = (s["best_model_score"] for k, s in state["callbacks"].items() if "'val/acc'" in k)
    assert float(score) == max(float(row["val/acc"]) for row in rows(one_run) if row["val/acc"])
    record = json.loads((one_run / "environment.json").read_text())["checkpoint"]
    assert record["path"] == str((one_run / "checkpoints/last.ckpt").absolute())


def test_a_moved_run_keeps_its_best_score(fulgurite, one_run):
    shutil.move(one_run, "elsewhere")
    state = load_plain("elsewhere/checkpoints/last.ckpt", "last")
    state["fulgurite"]["conditions"]["threads"] = 77
    save_plain(state, "elsewhere/checkpoints/last.ckpt")
    command = ("fit", *SMOKE, "--run.dir=elsewhere", "--ckpt_path=last", "--trainer.max_epochs=2")
    status, _, error = fulgurite(*command)
    assert status == 0
    assert "dirpath" not in error
    assert "note: the run went on threads 77 (now " in error
    scores = [
        float(s["best_model_score"])
        for k, s in load_plain("elsewhere/checkpoints/last.ckpt", "last")["callbacks"].items()
        if "'val/acc'" in k
    ]
    assert scores == [max(float(row["val/acc"]) for row in rows("elsewhere") if row["val/acc"])]
    stored = Path("elsewhere/checkpoints/last.ckpt").read_bytes()
    assert os.getcwd().encode() not in stored


def test_a_finished_run_is_left_as_it_is(fulgurite, one_run):
    before = {path: path.read_bytes() for path in one_run.rglob("*") if path.is_file()}
    status, out, _ = fulgurite("fit", *SMOKE, "--ckpt_path=last")
    assert status == 0
    assert f"nothing left to do in {one_run}" in out
    assert {p: p.read_bytes() for p in one_run.rglob("*") if p.is_file()} == before


def test_an_early_stopped_run_trains_no_further_epoch(fulgurite, workdir):
    stop = ["--trainer.callbacks+=EarlyStopping"]
    for option in ("monitor=val/acc", "mode=max", "patience=1", "min_delta=2"):
        stop.append(f"--trainer.callbacks.{option}")
    fit = ("fit", "--config", "fedsir/smoke.yaml", *QUIET, FEDAVG, *stop, "--trainer.max_epochs=6")
    assert fulgurite(*fit)[0] == 0
    (run,) = runs()
    before, weights = rows(run), load_plain(run / "checkpoints/last.ckpt", "last")["state_dict"]
    assert before[-1]["epoch"] == "1"
    status, out, _ = fulgurite(*fit, "--ckpt_path=last")
    assert status == 0
    assert "nothing left to do" in out
    (run / "summary.json").unlink()  # as if it had been killed before its end
    assert fulgurite(*fit, "--ckpt_path=last")[0] == 0
    assert rows(run) == before
    assert (run / "summary.json").is_file()
    again = load_plain(run / "checkpoints/last.ckpt", "last")["state_dict"]
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())


def test_a_new_folder_only_when_asked_for(fulgurite, one_run):
    command = ("fit", *SMOKE, "--trainer.max_epochs=2", "--ckpt_path=last", "--run.new=true")
    status, _, error = fulgurite(*command)
    assert status == 0
    assert "a new run goes on from" in error
    assert len(runs()) == 2
    assert len(rows(one_run)) == 2
    assert "new" not in yaml.safe_load((runs()[1] / "config.yaml").read_text())["run"]


def test_a_new_run_takes_the_folder_that_is_named_for_it(workdir, monkeypatch):
    """Where the named folder holds a run, that is the one to begin from."""
    monkeypatch.delenv("FULGURITE_RUN_DIR", raising=False)
    options = RunOptions(dir="second", new=True)
    assert new_run_folder(options, "fit") == Path("second")
    (workdir / "second/config.yaml").touch()
    (workdir / "second/environment.json").touch()
    assert new_run_folder(options, "fit").parent == Path("runs/custom/run")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(ConfigError, match=r"run\.dir=second holds a run.*Name a new folder"):
        new_run_folder(options, "fit")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (
            "--model.init_args.local.batch_size=16",
            "model.init_args.local.batch_size is 32 there and 16 here",
        ),
        pytest.param(
            "--data.init_args.clients=3",
            "data.init_args.clients is 4 there and 3 here",
            marks=pytest.mark.slow,
        ),
        ("--seed_everything=3", "seed_everything is 0 there and 3 here"),
        pytest.param(
            "--trainer.precision=bf16-mixed", "trainer.precision is", marks=pytest.mark.slow
        ),
        pytest.param(
            "--trainer.callbacks.figures=false",
            "FederatedRounds.init_args.figures is True",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_going_on_with_other_options_is_refused_by_name(fulgurite, one_run, option, words):
    named = f"--run.dir={one_run}"
    error = error_of(fulgurite("fit", *SMOKE, named, "--ckpt_path=last", option))
    assert words in error
    assert "--run.new=true" in error


def test_going_on_from_an_earlier_checkpoint_than_the_last_is_refused(fulgurite, one_run):
    shutil.copy(one_run / "checkpoints/last.ckpt", one_run / "checkpoints/early.ckpt")
    assert fulgurite("fit", *SMOKE, "--trainer.max_epochs=2", "--ckpt_path=last")[0] == 0
    early = f"--ckpt_path={one_run}/checkpoints/early.ckpt"
    error = error_of(fulgurite("fit", *SMOKE, "--trainer.max_epochs=3", early))
    assert "its run has gone on to" in error


def test_last_is_of_the_run_that_the_configuration_names(fulgurite, one_run):
    shutil.copytree(one_run, one_run.with_name("20990101-000000"))
    config = one_run / "config.yaml"
    status, out, _ = fulgurite("test", "--config", str(config), *QUIET, "--ckpt_path=best")
    assert status == 0
    assert f"evaluated {one_run.absolute()}/checkpoints/best.ckpt" in out or str(one_run) in out
    (test,) = Path("runs/fedsir/smoke").glob("*-test")
    record = json.loads((test / "environment.json").read_text())["checkpoint"]
    assert record["path"] == str((one_run / "checkpoints/best.ckpt").absolute())
    assert len(record["sha256"]) == 64


def test_last_is_not_of_another_seed_or_of_an_older_run(fulgurite, one_run):
    error = error_of(fulgurite("test", *SMOKE, "--ckpt_path=last", "--seed_everything=5"))
    assert "seed_everything is 0 there and 5 here" in error
    newer = shutil.copytree(one_run, one_run.with_name("20990101-000000"))
    shutil.rmtree(newer / "checkpoints")
    (newer / "summary.json").unlink()
    error = error_of(fulgurite("fit", *SMOKE, "--ckpt_path=last"))
    assert f"the newest run, {newer}, has no checkpoint 'last.ckpt'" in error
    assert f"--run.dir={one_run}" in error


def test_runs_of_one_second_are_ordered_by_their_number(one_run):
    content = yaml.safe_load((one_run / "config.yaml").read_text())
    for number in (*range(2, 13),):
        shutil.copytree(one_run, f"{one_run}-{number}")
    options = RunOptions(system="fedsir", name="smoke")
    assert find_run(options, "last", content).name == f"{one_run.name}-12"


def test_the_environment_names_the_folder_of_all_runs(monkeypatch, tmp_path):
    monkeypatch.setenv("FULGURITE_RUNS", str(tmp_path))
    assert RunOptions(system="fedsir", name="smoke").parent == tmp_path / "fedsir" / "smoke"
    assert parse(["fit", "--config=fedsir/smoke.yaml"]).run.root == str(tmp_path)
    assert parse(["fit", "--config=fedsir/smoke.yaml", "--run.root=here"]).run.root == "here"
    monkeypatch.setenv("FULGURITE_RUNS", "")
    assert RunOptions(system="fedsir", name="smoke").parent == Path("runs/fedsir/smoke")


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_over(fulgurite, one_run):
    shutil.rmtree(one_run / "checkpoints")
    (one_run / "summary.json").unlink()
    error = error_of(fulgurite("fit", *SMOKE, f"--run.dir={one_run}", "--ckpt_path=last"))
    assert f"`fulgurite fit --run.dir={one_run}` without --ckpt_path starts it over" in error
    status, _, error = fulgurite("fit", *SMOKE, f"--run.dir={one_run}")
    assert status == 0
    assert "starts over" in error
    assert len(rows(one_run)) == 2
    assert (one_run / "metrics.1.csv").is_file()


def test_untrained_weights_are_said(fulgurite, workdir):
    status, _, error = fulgurite("test", *SMOKE)
    assert status == 0
    assert "note: no --ckpt_path: test takes the weights that the model is made with" in error


def test_a_run_folder_that_is_a_file_is_one_line(fulgurite, workdir):
    Path("file").touch()
    assert "--run.dir=file is a file" in error_of(fulgurite("fit", *SMOKE, "--run.dir=file"))


def test_secrets_of_the_command_line_are_masked(fulgurite, workdir):
    Path("secret.py").write_text(
        "from lightning.pytorch import Callback\n"
        "class Send(Callback):\n"
        "    def __init__(self, api_key: str = '', address: str = ''):\n"
        "        self.key = api_key\n"
    )
    options = ("--trainer.callbacks+=secret.Send", "--trainer.callbacks.api_key=abc123")
    address = "--trainer.callbacks.address=https://me:word@example.org/x"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(os.getcwd())
        status, _, error = fulgurite("fit", *SMOKE, *options, address, "--run.dir=run")
        assert status == 0, error
        for file in ("environment.json", "config.yaml"):
            text = Path("run", file).read_text()
            assert "abc123" not in text
            assert "me:word" not in text
            assert "***" in text
        error = error_of(fulgurite("fit", "--config", "run/config.yaml", "--run.dir=two"))
        assert "api_key" in error
        assert "was masked" in error


def test_secrets_within_a_value_of_the_command_line_are_masked():
    callback = (
        '{class_path: Send, init_args: {api_key: "abc123", headers: {Authorization: abc123}}}'
    )
    addresses = '["https://me:abc123@example.org", "plain"]'
    argv = ["fit", f"--trainer.callbacks+={callback}", "--data.addresses", addresses]
    hidden = masked_arguments(argv)
    assert "abc123" not in " ".join(hidden)
    assert all(part in hidden[1] for part in ("--trainer.callbacks+={", "Send", "api_key"))
    assert hidden[2:] == ["--data.addresses", '["https://***@example.org", "plain"]']
    for other in ("{a: 1, tokens: [2, 3]}", "[1, 2", "{", "[x]"):
        assert masked_arguments([f"--data.x={other}"]) == [f"--data.x={other}"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "holds a list"),
        ({"state_dict": {}}, "is no checkpoint of a Lightning training"),
        ({"state_dict": {"a": 1}, "pytorch-lightning_version": "2"}, "are no tensors"),
        ({"state_dict": {}, "pytorch-lightning_version": "2"}, "not the state of their training"),
        (
            {"state_dict": {}, "pytorch-lightning_version": "2", "epoch": "x"},
            "under 'epoch' no whole number",
        ),
    ],
)
def test_what_is_no_checkpoint_is_one_line(fulgurite, workdir, content, words):
    torch.save(content, "a.ckpt")
    assert words in error_of(fulgurite("fit", *SMOKE, "--ckpt_path=a.ckpt"))


def test_a_flipped_bit_is_found(fulgurite, one_run):
    file = one_run / "checkpoints/last.ckpt"
    whole = file.read_bytes()
    for place in range(0, len(whole), len(whole) // 200):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        file.write_bytes(damaged)
        with pytest.raises(FileNotFoundError, match="cannot be read as plain tensors"):
            load_plain(file, "--ckpt_path")
    command = ("test", *SMOKE, f"--run.dir={one_run}", "--ckpt_path=last")
    assert "digest" in error_of(fulgurite(*command)) or "cannot be read" in error_of(
        fulgurite(*command)
    )


@pytest.mark.parametrize("options", [{"name": "/a"}, {"name": "../a"}, {"system": "a/../.."}])
def test_a_name_stays_below_the_root(options):
    with pytest.raises(ConfigError, match=r"leads out of --run\.root=runs.*--run\.dir"):
        RunOptions(**options)
    assert RunOptions(name="a/b..c").parent == Path("runs/custom/a/b..c")


def test_weights_of_double_precision_are_taken_up_whole(tmp_path):
    """Lightning makes a model double after it has loaded a checkpoint into it."""
    options = {
        "precision": "64-true", "accelerator": "cpu", "max_epochs": 1, "logger": False,
        "limit_train_batches": 1, "limit_val_batches": 1, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    trainer, model = Trainer(**options, callbacks=[TrainingState()]), BoringModel()
    trainer.fit(model)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = BoringModel()
    Trainer(**options, callbacks=[TrainingState()]).validate(
        again, ckpt_path=str(tmp_path / "a.ckpt"), verbose=False
    )
    assert again.layer.weight.dtype == torch.float64
    assert torch.equal(again.layer.weight, model.layer.weight)


class WithPlateau(BoringModel):
    """Halves its rate each epoch, since no loss is good enough."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def training_step(self, batch, index):
        loss = self.step(batch)
        self.log("train/loss", loss)
        return loss

    def train_dataloader(self):
        rows = torch.arange(8 * 32.0).view(8, 32) / 256
        return DataLoader(rows, batch_size=2, shuffle=True, generator=self.generator)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1)
        options = {"scheduler": scheduler, "monitor": "train/loss"}
        return {"optimizer": optimizer, "lr_scheduler": options}


@pytest.mark.parametrize("at_epoch_end", [True, False])
def test_plateaus_and_generators_of_loaders_go_on(tmp_path, at_epoch_end):
    """Lightning tells the scheduler after the checkpoint is written, or never."""
    saving = ModelCheckpoint(
        tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=at_epoch_end
    )
    torch.manual_seed(0)
    weights = []
    for path in (None, tmp_path / "epoch=1.ckpt"):
        model = WithPlateau()
        state = TrainingState(resumes=path is not None)
        trainer = quiet_trainer(
            max_epochs=4, limit_val_batches=1, callbacks=[state, *([] if path else [saving])],
            enable_checkpointing=path is None,
        )  # fmt: skip
        trainer.fit(model, ckpt_path=path)
        weights.append(model.layer.weight)
    assert torch.equal(*weights)


def test_missing_optimizers_are_refused_and_nan_is_said(fulgurite, one_run, capsys):
    file = one_run / "checkpoints/last.ckpt"
    state = load_plain(file, "last")
    name = next(iter(state["state_dict"]))
    state["state_dict"][name][0] = torch.nan
    save_plain(state, file)
    status, _, error = fulgurite("test", *SMOKE, f"--run.dir={one_run}", "--ckpt_path=last")
    assert status == 0
    assert f"note: the checkpoint's {name} is not a number" in error
    state["optimizer_states"] = [*state["optimizer_states"], {}]
    save_plain(state, file)
    command = ("fit", *SMOKE, f"--run.dir={one_run}", "--ckpt_path=last")
    assert "optimizers, the model has" in error_of(fulgurite(*command, "--trainer.max_epochs=2"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"callbacks": None}, "not the state of their training (optimizers, loops, callbacks)"),
        ({"fulgurite": [1]}, "has a state of its run, 'fulgurite', that cannot be taken up"),
        ({"fulgurite": {"rows": "x"}}, "has a state of its run, 'fulgurite', that cannot be"),
        ({"optimizer_states": [3]}, "The checkpoint cannot be taken up (AttributeError"),
    ],
)
def test_forged_states_of_a_training_are_one_line(fulgurite, one_run, change, words):
    file = one_run / "checkpoints/last.ckpt"
    save_plain({**load_plain(file, "last"), **change}, file)
    assert words in error_of(fulgurite("fit", *SMOKE, "--trainer.max_epochs=2", "--ckpt_path=last"))


def test_a_record_of_metrics_that_is_none_is_one_line(fulgurite, one_run):
    (one_run / "metrics.csv").write_bytes(b"\x80\x81")
    command = ("fit", *SMOKE, "--trainer.max_epochs=2", "--ckpt_path=last")
    error = error_of(fulgurite(*command))
    assert f"The record of metrics {one_run}/metrics.csv cannot be read" in error
    (one_run / "summary.json").unlink(missing_ok=True)
    assert "holds no table of metrics" in error_of(fulgurite("report", str(one_run)))


def test_which_options_make_another_training():
    one = {"model": {"class_path": "A", "init_args": {"lr": 0.1}}, "trainer": {"max_epochs": 1}}
    longer = {**one, "trainer": {"max_epochs": 5, "logger": True, "precision": 16}}
    assert training_differences(one, longer) == []
    other = {**one, "model": {"class_path": "A", "init_args": {"lr": 0.2}}}
    assert training_differences(one, other) == [("model.init_args.lr", 0.1, 0.2)]
    watched = {
        **one,
        "trainer": {"callbacks": [{"class_path": "lightning.pytorch.callbacks.Timer"}]},
    }
    assert training_differences(one, watched) == []
    changed = {**one, "trainer": {"callbacks": {"class_path": "my.Ema"}}}
    assert training_differences(one, changed) == [("trainer.callbacks", None, "my.Ema")]


class _Started(Exception):
    """Ends a run where Weights & Biases would be started."""


def test_a_resumed_run_asks_weights_and_biases_for_its_run(one_run, monkeypatch):
    from fulgurite.cli import run

    ids = []

    def start(**options):
        ids.append(options["id"])
        raise _Started

    monkeypatch.setattr("wandb.init", start)
    record = one_run / "environment.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"wandb_id": "abcd1234"}))
    logger = "--trainer.logger=lightning.pytorch.loggers.WandbLogger"
    with pytest.raises(_Started):
        run(["fit", *SMOKE, logger, "--ckpt_path=last", "--trainer.max_epochs=2"])
    assert ids == ["abcd1234"]


@pytest.mark.slow  # one that is asked for in vain, above, is not
def test_a_resumed_run_keeps_its_run_at_weights_and_biases(fulgurite, workdir):
    logger = "--trainer.logger=lightning.pytorch.loggers.WandbLogger"
    options = (*SMOKE, logger, "--trainer.logger.offline=true", "--run.dir=run")
    import wandb

    ids = []
    for more in ((), ("--ckpt_path=last", "--trainer.max_epochs=2")):
        assert fulgurite("fit", *options, *more)[0] == 0
        ids.append(wandb.run.id)
        wandb.finish()
    assert ids[0] == ids[1]
    assert json.loads(Path("run/environment.json").read_text())["wandb_id"] == ids[0]
