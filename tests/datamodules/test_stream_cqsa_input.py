"""Files of text in no split, predicted with a trained run of stream_cqsa."""

from pathlib import Path

import numpy as np
import pytest

import fulgurite as package
from fulgurite.errors import ConfigError, DataError

LENGTH = 32
pytestmark = pytest.mark.usefixtures("workdir")


@pytest.fixture(scope="module")
def trained(train_once, tmp_path_factory):
    """A run on a small text, and the text."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("".join(f"{n} streams flow to {n * n} seas. " for n in range(200)))
    _, folder = train_once(
        "fit", "--config", "stream_cqsa/smoke.yaml", "--trainer.max_epochs=1", "--run.dir=run",
        f"--data.init_args.text.paths={text}", f"--data.init_args.length={LENGTH}",
    )  # fmt: skip
    return folder / "run", text


def test_a_copy_of_the_test_split_is_predicted_as_the_split(trained, predict_split):
    run, text = trained
    split = predict_split(run)
    content = text.read_bytes()
    tail = content[len(content) - round(0.05 * len(content)) :]
    begin = tail.index(bytes(split["targets"][0].tolist()[:-1])) - 1
    Path("copy.md").write_bytes(tail[begin:])
    predictions = package.predict(run, "copy.md", "last")
    rows = len(split["targets"])
    assert len(predictions["targets"]) in (rows, rows + 1)
    for name in ("targets", "predicted"):
        assert np.array_equal(predictions[name][:rows], split[name])
    assert np.allclose(predictions["loss"][:rows], split["loss"], atol=1e-5)


def test_each_token_of_each_file_is_in_one_window(trained):
    contents = {"a.txt": "x" * (LENGTH + 3), "deep/b.txt": "yz", "c.txt": "w" * LENGTH}
    for name, content in contents.items():
        Path("texts", name).parent.mkdir(parents=True, exist_ok=True)
        Path("texts", name).write_text(content)
    Path("texts/ignored.png").write_text("no text")
    predictions = package.predict(trained[0], "texts", "last")
    assert predictions["file"].tolist() == ["a.txt", "a.txt", "c.txt", "deep/b.txt"]
    assert predictions["window"].tolist() == ["0", "1", "0", "0"]
    assert predictions["begin"].tolist() == ["0", str(LENGTH), "0", "0"]
    assert predictions["tokens"].tolist() == [str(LENGTH), "3", str(LENGTH), "2"]
    targets = predictions["targets"]
    for name, content in contents.items():
        of_file = targets[predictions["file"] == name].ravel()
        assert bytes(of_file[of_file >= 0].tolist()).decode() == content[1:]
    # what comes after a file is predicted, and nobody knows it
    assert targets[3].tolist() == [ord("z")] + [-100] * (LENGTH - 1)


def test_files_that_are_no_text_are_refused(trained):
    Path("empty").mkdir()
    Path("empty.txt").touch()
    with pytest.raises(DataError, match=r"--input=.*empty holds no file"):
        package.predict(trained[0], "empty", "last")
    with pytest.raises(DataError, match=r"empty\.txt is empty"):
        package.predict(trained[0], "empty.txt", "last")


def test_generated_needles_have_no_files():
    from fulgurite.datamodules.stream_cqsa import NeedleDataModule
    from fulgurite.predictions import serve_input

    Path("a.txt").write_text("a")
    with pytest.raises(ConfigError, match="NeedleDataModule predicts its own data alone"):
        serve_input(NeedleDataModule(), "a.txt")


def test_borders_of_files_are_marked_where_they_are_asked_for():
    from fulgurite.data.text_options import TextOptions
    from fulgurite.datamodules.stream_cqsa import ByteTextDataModule

    Path("a.txt").write_text("abc")
    data = ByteTextDataModule(TextOptions(documents=True), length=4, batch_size=1)
    data.predict_from(Path("a.txt"), {})
    data.prepare_data()
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert batch["documents"] == (0,)
    assert batch["tokens"].tolist() == [[97, 98, 99, 0]]
    assert batch["targets"].tolist() == [[98, 99, -100, -100]]
    assert batch["index"].tolist() == [0]
