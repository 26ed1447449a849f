"""Text and problems in no split, predicted with trained runs of number_probing."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import fulgurite as package
from fulgurite.datamodules.number_probing import AdditionDataModule, AdditionOptions
from fulgurite.datamodules.number_probing.tokenizers import WordTokenizer
from fulgurite.errors import CheckpointError, DataError

LENGTH = 16
pytestmark = pytest.mark.usefixtures("workdir")


@pytest.fixture(scope="module")
def text_run(train_once, tmp_path_factory):
    """A run on a small text whose numbers are exchanged, and the text."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("".join(f"room {n} of {n % 7} is open . " for n in range(300)))
    _, folder = train_once(
        "fit", "--config", "number_probing/text.yaml", "--trainer.max_epochs=1", "--run.dir=run",
        f"--data.init_args.text.paths={text}", f"--data.init_args.length={LENGTH}",
        "--data.init_args.tokenizer.vocab_size=1020", "--data.init_args.steps_per_epoch=2",
        "--data.init_args.batch_size=4", "--model.init_args.backbone.init_args.width=16",
        "--model.init_args.backbone.init_args.layers=1", "--trainer.callbacks=null",
    )  # fmt: skip
    return folder / "run", text


def test_a_copy_of_the_test_split_is_predicted_as_the_split(text_run, predict_split):
    run, text = text_run
    split = predict_split(run)
    words = text.read_text().split()
    first = len(words) + 1 - round(0.05 * (len(words) + 1))
    Path("copy.txt").write_text(" ".join(words[first:]))
    predictions = package.predict(run, "copy.txt", "last")
    rows = len(split["targets"])
    assert rows
    for name in ("targets", "predicted"):
        assert np.array_equal(predictions[name][:rows], split[name])


def test_the_vocabulary_is_that_of_the_training(text_run):
    """Words of another text that the training has not are unknown; its text need not be there."""
    trained, text = text_run
    run = Path("run")
    shutil.copytree(trained, run)
    config = (run / "config.yaml").read_text()
    assert str(text) in config
    (run / "config.yaml").write_text(config.replace(str(text), "gone.txt"))
    tokenizer = WordTokenizer(1020)
    tokenizer.learn([text.read_text()])
    Path("texts").mkdir()
    Path("texts/a.txt").write_text("zebra room 7 zebra zebra zebra")
    Path("texts/b.md").write_text("open " * (2 * LENGTH))
    predictions = package.predict(run, "texts", "last")
    assert predictions["file"].tolist() == ["a.txt", "b.md", "b.md", "b.md"]
    assert predictions["tokens"].tolist() == ["7", "16", "16", "1"]
    expected = [tokenizer.words["room"], tokenizer.words["7"], 0, 0, 0, tokenizer.end]
    assert predictions["targets"][0].tolist() == expected + [-100] * (LENGTH - 6)


def test_a_checkpoint_that_says_nothing_leaves_it_to_the_text(text_run):
    run = text_run[0]
    stored = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    stored.pop("NumberTextDataModule"), stored.pop("fulgurite_digest")
    shutil.copytree(run, "older")
    torch.save(stored, "older/checkpoints/last.ckpt")
    Path("a.txt").write_text("room 7 of 9 is open")
    older, newer = (package.predict(folder, "a.txt", "last") for folder in ("older", run))
    assert np.array_equal(older["targets"], newer["targets"])
    assert np.array_equal(older["predicted"], newer["predicted"])


def test_another_text_as_the_split_is_refused(text_run, fulgurite):
    """Its vocabulary would give the tokens of the network other meanings."""
    run = text_run[0]
    Path("other.txt").write_text("quite another text with 3 words . " * 200)
    options = (
        *("--config", str(run / "config.yaml"), f"--ckpt_path={run}/checkpoints/last.ckpt"),
        "--data.init_args.text.paths=other.txt",
    )
    status, _, err = fulgurite("predict", *options)
    assert status == 2
    assert "another vocabulary" in err
    assert "--input PATH" in err
    status, _, err = fulgurite(
        "predict", *options, "--data.init_args.tokenizer.name=digits", "--input=other.txt"
    )
    assert status == 2
    assert "trained with the tokenizer words" in err


@pytest.fixture(scope="module")
def addition_run(train_once):
    """A run on addition, and its DataModule."""
    cli, folder = train_once(
        "fit", "--config", "number_probing/smoke.yaml", "--trainer.max_epochs=1", "--run.dir=run"
    )
    return folder / "run", cli.datamodule


def test_problems_of_the_test_split_are_predicted_as_the_split(addition_run, predict_split):
    run, data = addition_run
    split = predict_split(run)
    problems = data.test_dataloader().dataset
    lines = [f"{a}+{b}" for a, b in zip(problems.a, problems.b, strict=True)]
    Path("problems.txt").write_text("\n\n".join(lines) + "\n")
    predictions = package.predict(run, "problems.txt", "last")
    for name in ("targets", "predicted"):
        assert np.array_equal(predictions[name], split[name])
    assert predictions["problem"].tolist() == lines
    assert predictions["line"][:2].tolist() == ["1", "3"]
    assert set(predictions["file"]) == {"problems.txt"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("1+2\n3-4\n", "line 2 of .*problems.txt is no problem a\\+b: '3-4'"),
        ("1+2=3\n", "line 1 of .*problems.txt is no problem"),
        (f"{'9' * 5000}+1\n", "line 1 of .*problems.txt is no problem"),
        ("900+1\n", "has the number 900, and the network was trained on numbers below 900"),
        ("\n \n", "problems.txt holds no problem"),
        ("", "problems.txt is empty"),
    ],
)
def test_a_line_that_is_no_problem_is_named(content, words):
    Path("problems.txt").write_text(content)
    data = AdditionDataModule(AdditionOptions(base=30, tokens=2))
    with pytest.raises(DataError, match=words):
        data.predict_from(Path("problems.txt"), {})


def test_sums_stay_within_those_of_the_training():
    Path("problems.txt").write_text("20+9\n 20 + 10 \n")
    data = AdditionDataModule(AdditionOptions(base=30, tokens=1))
    with pytest.raises(DataError, match=r"line 2 of .* has the sum 30"):
        data.predict_from(Path("problems.txt"), {})


def test_the_vocabulary_of_another_checkpoint_is_refused():
    from fulgurite.datamodules.number_probing import NumberTextDataModule

    data = NumberTextDataModule()
    Path("a.txt").write_text("a")
    with pytest.raises(CheckpointError, match="the tokenizer digits-1-20"):
        data.predict_from(Path("a.txt"), {"key": "digits-1-20", "state": {"words": []}})
