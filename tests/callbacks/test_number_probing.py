"""When embeddings are probed during training, what is recorded, and that training is unchanged."""

import csv
import json
import math

import pytest
import torch
from fakes.trainers import quiet_trainer
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fulgurite.callbacks.number_probing import EmbeddingRows, ModularProbe
from fulgurite.errors import ConfigError, DataError
from fulgurite.models.number_probing import planted
from fulgurite.models.number_probing.reports.report import ProbeSettings

SIZE, WIDTH = 60, 8


class Residues(LightningModule):
    """Learns n mod 5 through an embedding, with random numbers in every step."""

    def __init__(self, offset=2, dropout=0.2):
        super().__init__()
        torch.manual_seed(1)
        self.offset = offset
        self.embed = nn.Embedding(SIZE + offset, WIDTH)
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(WIDTH, 5))

    def training_step(self, batch, batch_idx):
        (n,) = batch
        loss = nn.functional.cross_entropy(self.head(self.embed(n + self.offset)), n % 5)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.1)


class Asked(Residues):
    """The same, with the method that a probe asks; it draws random numbers, as it must not."""

    calls = 0

    def number_embeddings(self, ns):
        self.calls += 1
        torch.rand(3)
        if missing := [n for n in ns if n >= SIZE]:
            raise KeyError(missing[0])
        return self.embed(torch.tensor(ns) + self.offset)


class Numbers(LightningDataModule):
    number_ids = {n: n + 2 for n in range(SIZE)}  # noqa: RUF012

    def __init__(self, shuffle=True):
        super().__init__()
        self.shuffle = shuffle

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.arange(SIZE)), 20, shuffle=self.shuffle)


def make_probe(**kwargs):
    small = {"periods": (2, 5), "seeds": 1, "blocked": ("contiguous",), "pca": 5}
    rows = {k: kwargs.pop(k) for k in ("embedding", "tokenizer", "first_row") if k in kwargs}
    options = {"rows": EmbeddingRows(**rows), "probe": ProbeSettings(**small)}
    return ModularProbe(**{"numbers": f"0:{SIZE}"} | options | kwargs)


def fit(folder, *callbacks, model=None, data=None, epochs=4, ckpt=None, loggers=(), **kwargs):
    model = Asked() if model is None else model
    torch.manual_seed(0)
    csv_logger = CSVLogger(str(folder), name="", version="run")
    trainer = quiet_trainer(
        max_epochs=epochs, callbacks=[*callbacks], logger=[csv_logger, *loggers],
        log_every_n_steps=1, enable_checkpointing=kwargs.pop("checkpoints", False), **kwargs,
    )  # fmt: skip
    trainer.fit(model, datamodule=data or Numbers(), ckpt_path=ckpt)
    return trainer, model


def rows_of(file):
    with open(file) as lines:
        return list(csv.DictReader(lines))


def test_training_is_bit_for_bit_the_same(tmp_path):
    states = []
    for name, callbacks in (("without", []), ("with", [make_probe(every_n_steps=1)])):
        _, model = fit(tmp_path / name, *callbacks)
        states.append((model.state_dict(), torch.get_rng_state()))
    assert model.calls == 13  # at the start and after each of 12 batches
    for key, value in states[0][0].items():
        assert torch.equal(value, states[1][0][key])
    assert torch.equal(states[0][1], states[1][1])


def test_numbers_that_no_text_has_are_warned_of(tmp_path):
    data = Numbers()
    data.token_counts = torch.ones(SIZE + 2, dtype=torch.int64)
    data.token_counts[[5, 9]] = 0  # of the numbers 3 and 7
    with pytest.warns(UserWarning, match=r"2 of the 60 numbers never occur in the text.*: 3, 7\."):
        fit(tmp_path, make_probe(), data=data, epochs=1)


def test_a_weight_that_counts_its_looks_is_not_changed(tmp_path):
    states = []
    for name, callbacks in (("without", []), ("with", [make_probe(every_n_steps=1)])):
        model = Asked()
        nn.utils.parametrizations.spectral_norm(model.embed)
        fit(tmp_path / name, *callbacks, model=model)
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_what_is_logged(tmp_path):
    probe = make_probe(every_n_steps=5)
    trainer, _ = fit(tmp_path, probe, epochs=4)
    assert sorted({row["step"] for row in probe.history}) == [0, 5, 10, 12]
    assert [row["period"] for row in probe.history[:2]] == [2, 5]
    first, last = probe.history[1], probe.history[-1]
    assert abs(first["kappa"]) < first["band"]
    assert last["kappa"] > last["band"]
    assert trainer.callback_metrics["probe/kappa_5"] == pytest.approx(last["kappa"])
    metrics = [r for r in rows_of(tmp_path / "run" / "metrics.csv") if r["probe/kappa_5"]]
    assert [int(r["step"]) for r in metrics] == [0, 5, 10, 12]
    assert float(metrics[-1]["probe/kappa_5"]) == pytest.approx(last["kappa"])
    for name in ("train_kappa", "kappa_contiguous", "kappa_permuted", "local_ratio", "phi", "cond"):
        assert float(metrics[-1][f"probe/{name}_5"]) == pytest.approx(last[name], rel=1e-4)
    assert "probe/kappa_decade_5" not in metrics[-1]
    table = rows_of(tmp_path / "run" / "probe.csv")
    assert len(table) == len(probe.history)
    assert table[-1]["verdict"] == last["verdict"]
    figures = tmp_path / "run" / "figures"
    drawn = ["kappa.png", "spectrogram.png", "spectrum.png"]
    assert sorted(f.name for f in figures.iterdir()) == drawn
    spectra = rows_of(tmp_path / "run" / "spectrum.csv")
    assert [int(row["step"]) for row in spectra] == [0, 5, 10, 12]
    frequencies = [k / SIZE for k in range(1, SIZE // 2 + 1)]
    assert [float(nu) for nu in list(spectra[0])[1:]] == pytest.approx(frequencies, rel=1e-5)
    lines = max(float(spectra[-1][nu]) for nu in ("0.2", "0.4"))  # of T = 5
    assert lines == pytest.approx(last["magnitude"], rel=1e-3)


def test_an_interrupted_fit_goes_on(tmp_path):
    def run(name, epochs, *callbacks, **kwargs):
        probe = make_probe(every_n_steps=2)
        model, data = Asked(dropout=0.0), Numbers(shuffle=False)
        kwargs = {"epochs": epochs, "model": model, "data": data} | kwargs
        fit(tmp_path / name, probe, *callbacks, checkpoints=bool(callbacks), **kwargs)
        return probe, model

    uninterrupted, expected = run("whole", 4)
    keep = ModelCheckpoint(tmp_path / "kept", filename="last", save_on_train_epoch_end=True)
    run("a", 2, keep)
    file = tmp_path / "kept" / "last.ckpt"
    stored = torch.load(file, weights_only=True)
    state = next(v for k, v in stored["callbacks"].items() if k.startswith("ModularProbe"))
    assert [row["step"] for row in state["history"]][::2] == [0, 2, 3, 4, 6]  # 3: a checkpoint
    resumed, model = run("b", 4, ckpt=str(file))
    assert torch.equal(model.embed.weight, expected.embed.weight)
    assert [row for row in resumed.history if row["step"] != 3] == uninterrupted.history
    assert list(resumed.spectra) == [0, 2, 3, *list(uninterrupted.spectra)[2:]]
    for step, spectrum in uninterrupted.spectra.items():
        assert torch.equal(resumed.spectra[step], spectrum)


def test_checkpoints_are_probed(tmp_path):
    probe = make_probe()
    keep = ModelCheckpoint(tmp_path / "c", save_on_train_epoch_end=True, save_top_k=-1)
    fit(tmp_path, probe, keep, epochs=2, checkpoints=True)
    assert sorted({row["step"] for row in probe.history}) == [0, 3, 6]
    other = make_probe(at_checkpoints=False)
    fit(tmp_path / "other", other, keep, epochs=2, checkpoints=True)
    assert sorted({row["step"] for row in other.history}) == [0, 6]


@pytest.mark.parametrize(
    "rows",
    [
        {"embedding": "embed"},
        {"embedding": "embed.weight"},
        {"embedding": "embed", "first_row": 2},
        {"embedding": "embed", "numbers": None},
        {"numbers": None},
    ],
)
def test_ways_to_find_the_rows(tmp_path, rows):
    probe = make_probe(**rows, figures=False)
    fit(tmp_path, probe, model=Residues() if "embedding" in rows else Asked())
    reference = make_probe(figures=False)
    fit(tmp_path / "reference", reference)
    assert [r["kappa"] for r in probe.history] == [r["kappa"] for r in reference.history]


def test_rows_by_a_tokenizer(tmp_path):
    vocabulary = {"a": 0, "b": 1} | {str(n): n + 2 for n in range(SIZE)}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    probe = make_probe(embedding="embed", tokenizer=str(tmp_path), numbers=None)
    fit(tmp_path, probe, model=Residues(), epochs=1)
    reference = make_probe()
    fit(tmp_path / "reference", reference, epochs=1)
    assert probe.history == reference.history


def test_only_rank_zero_probes(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "is_global_zero", property(lambda self: False))
    probe = make_probe(every_n_steps=1)
    _, model = fit(tmp_path, probe, epochs=1)
    assert probe.history == []
    assert model.calls == 0


def test_other_loggers_get_tables_and_figures(tmp_path):
    logged = {}

    class Wandb(WandbLogger):  # as a user may make one
        def log_table(self, key, columns, data):
            logged[key] = columns, data

        def log_image(self, key, images):
            logged[key] = images

    board = TensorBoardLogger(str(tmp_path), name="board", version="")
    fit(
        tmp_path,
        make_probe(),
        loggers=[board, Wandb(save_dir=str(tmp_path), mode="disabled")],
        epochs=1,
    )
    columns, data = logged["probe"]
    assert columns[:3] == ["step", "period", "verdict"]
    assert len(data) == 4
    assert logged["figures/kappa"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "board")).Reload()
    tags = events.Tags()
    assert "probe/kappa_5" in tags["scalars"]
    assert "figures/spectrum" in tags["images"]
    assert "probe/text_summary" in tags["tensors"]


# --- traps ----------------------------------------------------------------------------------------


def test_traps_stop_the_fit_at_once(tmp_path):
    model = Residues()
    with torch.no_grad():
        model.embed.weight[10] = model.embed.weight[20]
    with pytest.raises(DataError, match="60 numbers have only 59 unique embeddings"):
        fit(tmp_path, make_probe(embedding="embed"), model=model)
    model = Residues()
    with torch.no_grad():
        model.embed.weight[10] = 0
    with pytest.raises(DataError, match="embeddings of 8 are all zero"):
        fit(tmp_path, make_probe(embedding="embed"), model=model)
    with pytest.raises(DataError, match=r"Asked has no embedding of 60.*ModularProbe.numbers"):
        fit(tmp_path, make_probe(numbers="0:61"))
    with pytest.raises(DataError, match=r"DataModule has no token for 60, 61"):
        fit(tmp_path, make_probe(numbers="0:62", embedding="embed"), model=Residues())
    with pytest.raises(DataError, match=r"rows 5 to 64 of 60 numbers do not fit the 62 rows"):
        fit(tmp_path, make_probe(embedding="embed", first_row=5), model=Residues())


def test_a_model_that_diverges_is_named(tmp_path):
    class Broken(Asked):
        def number_embeddings(self, ns):
            return super().number_embeddings(ns) * (math.nan if self.global_step else 1.0)

    with pytest.raises(DataError, match="are not finite"):
        fit(tmp_path, make_probe(every_n_steps=2), model=Broken())


def test_models_without_numbers(tmp_path):
    with pytest.raises(ConfigError, match=r"Residues has no number_embeddings.*embedding=PATH"):
        fit(tmp_path, make_probe(), model=Residues())
    with pytest.raises(ConfigError, match=r"embedding=head is no matrix.*embeddings are embed\."):
        fit(tmp_path, make_probe(embedding="head"), model=Residues())
    with pytest.raises(ConfigError, match="does not know which numbers"):
        fit(tmp_path, make_probe(embedding="embed", first_row=2, numbers=None), model=Residues())


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (ModularProbe, {"every_n_steps": -1}, "every_n_steps=-1 is negative"),
        (EmbeddingRows, {"first_row": 0}, "rows without an embedding"),
        (
            EmbeddingRows,
            {"embedding": "e", "first_row": 0, "tokenizer": "t"},
            "both tokenizer and first_row",
        ),
        (ProbeSettings, {"blocked": ["shuffled"]}, "blocked='shuffled'"),
        (ModularProbe, {"numbers": "x"}, "numbers='x'"),
    ],
)
def test_arguments_out_of_range(make, options, message):
    with pytest.raises(ConfigError, match=message):
        make(**options)


def test_bfloat16_embeddings_are_probed(tmp_path):
    model = Residues().bfloat16()
    with torch.no_grad():
        model.embed.weight[2:] = planted(torch.arange(SIZE), 5, WIDTH)
    probe = make_probe(embedding="embed")
    fit(tmp_path, probe, model=model, epochs=1, precision="bf16-true")
    assert probe.history[1]["kappa"] == 1
