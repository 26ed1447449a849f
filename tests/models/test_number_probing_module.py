"""NumberLM: losses, metrics, probing access, and training under Lightning."""

import copy
import csv
import json
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from fakes.runs import read_weights
from fakes.trainers import quiet_trainer
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from fulgurite.errors import ConfigError, DataError
from fulgurite.models.number_probing.backbones import LSTMBackbone, TransformerBackbone
from fulgurite.models.number_probing.language_models.losses import rows_all_right, token_losses
from fulgurite.models.number_probing.language_models.module import HeadOptions, NumberLM
from fulgurite.models.number_probing.language_models.optimizer import AdamWOptions, MuonAdamW

VOCABULARY = 12


pytestmark = pytest.mark.usefixtures("seeded")


class Counting(LightningDataModule):
    """Sequences that count up, modulo 10; token n + 2 is number n."""

    vocab_size = VOCABULARY
    number_ids: ClassVar = {n: n + 2 for n in range(10)}

    def __init__(self, batches=4, documents=False):
        super().__init__()
        self.items = []
        for i in range(batches):
            line = (torch.arange(3)[:, None] + i + torch.arange(9)) % 10 + 2
            targets = line[:, 1:].clone()
            targets[:, :2] = -100
            self.items.append({"tokens": line[:, :-1], "targets": targets})
            if documents:
                self.items[-1]["documents"] = (torch.arange(8) // 4).expand(3, 8)

    def train_dataloader(self):
        return DataLoader(self.items, batch_size=None)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def model(**options):
    options = {"optimizer": partial(MuonAdamW, lr=0.02), **options}
    backbone = options.pop("backbone", None) or TransformerBackbone(16, 1, 2)
    return NumberLM(backbone, vocab_size=VOCABULARY, **options)


def trainer(tmp_path, **options):
    return quiet_trainer(default_root_dir=tmp_path, **{"log_every_n_steps": 1, **options})


# --- losses --------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_chunks_equal_the_whole_loss(chunk):
    hidden = torch.randn(3, 7, 4).double().requires_grad_()
    weight = torch.randn(9, 4).double().requires_grad_()
    targets = torch.randint(9, (3, 7))
    targets[torch.rand(3, 7) < 0.4] = -100
    losses, hits = token_losses(hidden, weight, targets, chunk)
    logits = (hidden @ weight.T).flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten())
    torch.testing.assert_close(losses.mean(), expected)
    counted = targets.flatten() != -100
    assert torch.equal(hits, (logits.argmax(1) == targets.flatten())[counted])
    for a, b in zip(
        torch.autograd.grad(losses.mean(), [hidden, weight]),
        torch.autograd.grad(expected, [hidden, weight]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_a_row_without_targets_is_no_answer():
    targets = torch.tensor([[1, -100], [-100, -100], [2, 3]])
    assert rows_all_right(torch.tensor([True, True, False]), targets).tolist() == [True, False]


# --- embeddings ----------------------------------------------------------------------------------


def test_number_embeddings_are_rows_of_the_tables():
    for tie in (True, False):
        lm = model(head=HeadOptions(tie_embeddings=tie))
        lm.number_ids = Counting.number_ids
        rows = lm.number_embeddings([3, 0])
        assert torch.equal(rows, lm.embedding.weight[[5, 2]])
        out = lm.number_embeddings([3, 0], table="output")
        assert torch.equal(out, rows) is tie
        assert torch.equal(out, lm.head_weight[[5, 2]])


@pytest.mark.parametrize("backbone", [TransformerBackbone(16, 1, 2), LSTMBackbone(16, 1)])
def test_the_state_of_a_number_is_that_after_its_tokens(backbone):
    lm = model(backbone=backbone, probed="state")
    lm.number_ids = {n: n + 2 for n in range(10)}
    lm.number_pieces = {n: tuple(int(digit) + 2 for digit in str(n)) for n in (7, 42, 105, 24)}
    numbers = [42, 7, 105, 3, 24]  # of several lengths; 3 has a token alone
    states = lm.number_embeddings(numbers)
    for n, state in zip(numbers, states, strict=True):
        tokens = torch.tensor([[int(digit) + 2 for digit in str(n)]])
        torch.testing.assert_close(state, lm.hidden(tokens)[0, -1])
    assert torch.equal(lm.number_embeddings([7], "input"), lm.embedding.weight[[9]])
    with pytest.raises(DataError, match=r"1 of 2 numbers have no tokens: 11 is the first"):
        lm.number_embeddings([7, 11])


def test_a_checkpoint_keeps_the_tokens_of_numbers():
    saved, loaded = model(probed="state"), model(probed="state")
    saved.number_pieces = {12: (3, 4)}
    checkpoint = {}
    saved.on_save_checkpoint(checkpoint)
    loaded.on_load_checkpoint(checkpoint)
    assert loaded.number_pieces == {12: (3, 4)}


def test_numbers_without_a_token_are_named():
    lm = model()
    lm.number_ids = Counting.number_ids
    with pytest.raises(DataError, match=r"3 of 5 numbers .*: 10, 11, 99"):
        lm.number_embeddings([1, 10, 2, 11, 99])


def test_a_tied_head_is_the_embedding():
    tokens = torch.randint(VOCABULARY, (2, 5))
    for tie in (True, False):
        lm = model(head=HeadOptions(tie_embeddings=tie))
        tables = [p for p in lm.parameters() if p.shape == (VOCABULARY, 16)]
        assert len(tables) == (1 if tie else 2)
        torch.testing.assert_close(lm(tokens), lm.hidden(tokens) @ tables[-1].T)


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "backbone",
    [TransformerBackbone(16, 1, 2), pytest.param(LSTMBackbone(16, 1), marks=pytest.mark.slow)],
)
def test_it_learns_to_count(tmp_path, backbone):
    lm = model(backbone=copy.deepcopy(backbone), exact_match=True, warmup=2)
    run = trainer(tmp_path, max_epochs=25, gradient_clip_val=1.0)
    data = Counting(documents=True)
    run.fit(lm, datamodule=data)
    assert run.global_step == 100  # one per batch, although there are two optimizers inside
    assert lm.number_ids == data.number_ids
    (metrics,) = run.test(lm, datamodule=data, verbose=False)
    assert metrics["test/exact"] == 1
    assert metrics["test/acc"] == 1
    assert metrics["test/loss"] < 0.3
    batches = run.predict(lm, datamodule=data)
    counted = batches[0]["targets"] != -100
    assert torch.equal(batches[0]["predicted"][counted], batches[0]["targets"][counted])


def test_it_logs_the_speed(tmp_path):
    lm = model()
    run = trainer(tmp_path, max_epochs=1, log_every_n_steps=2)
    run.fit(lm, datamodule=Counting())
    assert run.callback_metrics["train/tokens_per_s"] > 0


class Stop(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "part.ckpt")


def test_a_resumed_run_has_the_weights_of_an_uninterrupted_one(tmp_path):
    schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5)
    torch.manual_seed(1)
    first = model(scheduler=schedule, warmup=3)
    second = copy.deepcopy(first)
    options = {"max_epochs": 4, "gradient_clip_val": 0.5}
    uninterrupted = trainer(tmp_path, **options, callbacks=[Stop(8)])
    uninterrupted.fit(first, datamodule=Counting())
    path = tmp_path / "part.ckpt"
    state = torch.load(path, weights_only=True)
    assert state["number_ids"] == Counting.number_ids
    trainer(tmp_path, **options).fit(
        second, datamodule=Counting(), ckpt_path=path, weights_only=True
    )
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_can_be_probed_without_its_data(tmp_path):
    lm = model()
    run = trainer(tmp_path, max_epochs=1)
    run.fit(lm, datamodule=Counting())
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = NumberLM.load_from_checkpoint(
        tmp_path / "a.ckpt", backbone=TransformerBackbone(16, 1, 2), weights_only=True
    )
    assert torch.equal(again.number_embeddings(range(10)), lm.number_embeddings(range(10)))


def test_the_learning_rates_warm_up(tmp_path):
    lm = model(optimizer=partial(MuonAdamW, lr=0.4, adamw=AdamWOptions(lr=0.2)), warmup=3)
    rates = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    trainer(tmp_path, max_epochs=2, callbacks=[Watch()]).fit(lm, datamodule=Counting())
    expected = [0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4, 0.4]
    assert [lr for lr, *_ in rates] == pytest.approx(expected)
    assert [lr for _, lr, _ in rates] == pytest.approx([x / 2 for x in expected])


def test_wrong_options_name_their_key(tmp_path):
    for options, named in (
        ({"warmup": -1}, "warmup"),
        ({"head": {"loss_chunk": 0}}, "loss_chunk"),
        ({"backbone": nn.Linear(3, 3)}, "backbone"),
    ):
        with pytest.raises(ConfigError, match=named):
            model(**options)
    with pytest.raises(ConfigError, match="vocab_size"):
        NumberLM(LSTMBackbone(8, 1), vocab_size=1)
    small = NumberLM(LSTMBackbone(8, 1), vocab_size=5)
    with pytest.raises(ConfigError, match="vocab_size=12"):
        trainer(tmp_path, max_epochs=1).fit(small, datamodule=Counting())
    plateau = model(scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)
    with pytest.raises(ConfigError, match="scheduler"):
        trainer(tmp_path, max_epochs=1).fit(plateau, datamodule=Counting())


def test_the_command_line_makes_it_and_its_optimizer(tmp_path):
    cli = LightningCLI(
        LightningModule, subclass_mode_model=True, run=False, auto_configure_optimizers=False,
        save_config_callback=None,
        args=[
            "--model=fulgurite.models.number_probing.NumberLM",
            "--model.backbone=fulgurite.models.number_probing.backbones.LSTMBackbone",
            "--model.backbone.width=8",
            "--model.optimizer=fulgurite.models.number_probing.MuonAdamW",
            "--model.optimizer.lr=0.5",
            "--model.optimizer.adamw.lr=0.25",
            "--model.scheduler=torch.optim.lr_scheduler.CosineAnnealingLR",
            "--model.scheduler.T_max=7",
            "--trainer.logger=false",
        ],
    )  # fmt: skip
    optimizers = cli.model.configure_optimizers()
    assert isinstance(optimizers["optimizer"], MuonAdamW)
    assert [g["lr"] for g in optimizers["optimizer"].param_groups] == [0.5, 0.25, 0.25]
    assert optimizers["lr_scheduler"]["interval"] == "step"


# --- the smallest configuration ------------------------------------------------------------------

SMOKE = "number_probing/smoke.yaml"


@pytest.mark.slow  # tests/survival does it in the default suite, by kills
def test_a_resumed_command_has_the_weights_of_an_uninterrupted_one(fit):
    fit("--run.dir=whole", config=SMOKE)
    fit("--run.dir=part", "--trainer.max_epochs=1", config=SMOKE)
    fit("--run.dir=part", "--ckpt_path=last", config=SMOKE)
    uninterrupted, resumed = (read_weights(run) for run in ("whole", "part"))
    assert all(torch.equal(resumed[key], uninterrupted[key]) for key in uninterrupted)
    fit("--run.dir=whole", "--ckpt_path=last", config=SMOKE, command="test")
    assert "test/exact" in json.loads(Path("whole/test_metrics.json").read_text())


@pytest.mark.slow  # fedsir has two ranks in the default suite
def test_two_processes_train_and_probe_as_one(fit, run_two):
    fit("--data.init_args.batch_size=128", "--run.dir=one", config=SMOKE)
    run_two("fit", "--config", SMOKE, "--run.dir=two")
    one, two = (read_weights(run) for run in ("one", "two"))
    for key in one:  # Muon rounds its matrices to bfloat16; ten steps move weights by 0.03
        torch.testing.assert_close(two[key], one[key], atol=2e-3, rtol=0)
    texts = [Path(run, "probe.csv").read_text().splitlines() for run in ("one", "two")]
    tables = [list(csv.DictReader(lines)) for lines in texts]
    for single, paired in zip(*tables, strict=True):
        assert (paired["step"], paired["period"]) == (single["step"], single["period"])
        assert float(paired["local_ratio"]) == pytest.approx(float(single["local_ratio"]), abs=1e-3)
