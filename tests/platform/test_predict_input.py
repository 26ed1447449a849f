"""``fulgurite predict --input``: files in no split, with a run of fedsir, and what is refused."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import fulgurite as package
from fulgurite.datamodules.fedsir import Digits
from fulgurite.predictions import read_predictions

SAVE = {
    ".png": lambda image, file: Image.fromarray(image).save(file),
    ".tif": lambda image, file: tifffile.imwrite(file, image),
    ".npy": lambda image, file: np.save(file, image),
}


@pytest.fixture(scope="module")
def digits():
    """The images of the test split, (N, 8, 8) uint8."""
    return Digits(copies=1).load().test_images[:, 0].numpy()


def write(folder, images, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        SAVE[suffix](image, folder / f"{number:04}{suffix}")
    return folder


@pytest.fixture
def predict(fulgurite, short_run, workdir):
    """Predict with the run; gives the status, what was printed, and the new folders."""

    def call(*options):
        status, out, err = fulgurite(
            "predict", "--config", str(short_run / "config.yaml"), "--ckpt_path=last",
            "--run.root=runs", *options,
        )  # fmt: skip
        return status, out + err, sorted(workdir.glob("runs/*/*/*"))

    return call


@pytest.fixture(scope="module")
def images(digits, tmp_path_factory):
    """The test split as a folder of PNGs."""
    return write(tmp_path_factory.mktemp("files") / "images", digits)


@pytest.fixture(scope="module")
def predicted(train_once, short_run, images):
    """The folder in which the PNGs were predicted."""
    options = ("--config", str(short_run / "config.yaml"), f"--run.dir={short_run}")
    cli, _ = train_once("predict", *options, "--ckpt_path=last", f"--input={images}")
    return cli.folder


@pytest.fixture
def reference(predicted):
    """The predictions of the PNGs."""
    return read_predictions(predicted / "predictions.npz")


def test_copies_of_the_test_split_are_predicted_as_the_split(predict, predicted, images, reference):
    status, out, (folder,) = predict()
    assert status == 0, out
    split = read_predictions(folder / "predictions.npz")
    for name in ("index", "predicted", "probabilities", "predicted_name"):
        assert np.array_equal(split[name], reference[name]), name
    assert set(reference["label"]) == {-1}
    rows = [*csv.DictReader((predicted / "predictions.csv").open())]
    assert [row["file"] for row in rows[:2]] == ["0000.png", "0001.png"]
    assert rows[0]["predicted"] == reference["predicted_name"][0]
    assert float(rows[0]["probabilities.3"]) == pytest.approx(reference["probabilities"][0, 3])
    facts = json.loads((predicted / "environment.json").read_text())
    assert facts["input"] == str(images)
    # the record says what was trained, as that of any prediction
    assert (folder / "config.yaml").read_text() == (predicted / "config.yaml").read_text()


@pytest.mark.parametrize(
    "suffix",
    [
        pytest.param(".tif", marks=pytest.mark.slow),
        ".npy",
        ".zip",
        pytest.param("one", marks=pytest.mark.slow),
        pytest.param("deep", marks=pytest.mark.slow),
    ],
)
def test_every_format_gives_the_same(short_run, digits, workdir, reference, suffix):
    few, names = digits[:3], [f"{n:04}" for n in range(3)]
    kind = suffix if suffix in SAVE else ".png"
    path = write(workdir / "images", few, kind)
    if suffix == ".zip":
        path = shutil.make_archive("images", "zip", path)
    elif suffix == "one":
        path, names = path / "0000.png", names[:1]
    elif suffix == "deep":
        shutil.move(path, workdir / "a/b/images")
        path, names = workdir / "a", [f"b/images/{name}" for name in names]
    predictions = package.predict(short_run, path, "last")
    assert predictions["file"].tolist() == [f"{name}{kind}" for name in names]
    expected = reference["probabilities"][: len(names)]
    assert np.allclose(predictions["probabilities"], expected, atol=1e-6)


def test_statistics_are_those_of_the_training(short_run, digits, workdir, reference):
    """Darker images stay darker: nothing is measured on them."""
    dark = package.predict(short_run, write(workdir / "dark", digits[:3] // 4), "last")
    assert not np.allclose(dark["probabilities"], reference["probabilities"][:3], atol=1e-3)


def test_a_checkpoint_that_says_nothing_leaves_it_to_the_data(
    short_run, images, workdir, reference
):
    stored = torch.load(short_run / "checkpoints/last.ckpt", weights_only=True)
    stored.pop("FederatedDataModule"), stored.pop("fulgurite_digest")
    shutil.copytree(short_run, "older")
    torch.save(stored, "older/checkpoints/last.ckpt")
    older = package.predict("older", images, "last")
    assert np.array_equal(older["probabilities"], reference["probabilities"])


def test_training_data_need_not_be_there(train_once, digits, workdir, fulgurite):
    """A run on a folder predicts colours of another size after that folder is gone."""
    _, folder = train_once("fit", "--config", write_federation(workdir, digits), "--run.dir=run")
    shutil.rmtree(workdir / "own")
    Image.fromarray(digits[0]).resize((12, 12)).convert("RGB").save("new.png")
    predictions = package.predict(folder / "run", "new.png", "last")
    assert predictions["predicted_name"][0] in ("cat", "dog")
    status, _, err = fulgurite(
        "predict", "--config", str(folder / "run/config.yaml"), "--ckpt_path=last"
    )
    assert status == 2
    assert "own" in err  # without other files the training's are needed


def write_federation(workdir, digits):
    """A configuration of grey digits in two folders, resized."""
    write(workdir / "own/cat", digits[:20])
    write(workdir / "own/dog", digits[20:40])
    (workdir / "own.yaml").write_text(f"""
model:
  class_path: fulgurite.models.fedsir.FederatedClassifier
  init_args:
    network: {{class_path: fulgurite.models.fedsir.network.DigitsNet}}
data:
  class_path: fulgurite.datamodules.fedsir.FederatedDataModule
  init_args:
    source:
      class_path: fulgurite.datamodules.fedsir.ImageFolder
      init_args: {{path: {workdir}/own, image_size: 8, channels: 1}}
    partition: {{class_path: fulgurite.datamodules.fedsir.Iid}}
    clients: 2
trainer:
  max_epochs: 1
  callbacks: [{{class_path: fulgurite.callbacks.fedsir.FederatedRounds}}]
""")
    return str(workdir / "own.yaml")


def make_wrong_inputs(digits):
    """Options and words that the one line of the error has."""
    write(Path("good"), digits[:2])
    Path("empty").mkdir()
    shutil.copytree("good", "damaged")
    Path("damaged/0001.png").write_bytes(b"no picture")
    shutil.copytree("good", "large")
    Image.fromarray(np.zeros((9, 8), np.uint8)).save("large/0001.png")
    shutil.copytree("good", "colours")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save("colours/0001.png")
    Path("notes.txt").write_text("no image")
    np.save("floats.npy", np.zeros((8, 8)))
    return {
        "absent": ("--input=absent", "There is no data at"),
        "": ("--input is empty",),
        "g*d": ("--input=g*d is a pattern",),
        "empty": ("--input=empty", "no PNG, JPEG"),
        "damaged": ("0001.png of ", "is damaged or none"),
        "large": ("0001.png of ", "9 x 8 pixels", "8 x 8"),
        "colours": ("0001.png of ", "3 channels", "trained on 1"),
        "notes.txt": ("notes.txt is no image",),
        "floats.npy": ("floats.npy of ", "holds float64"),
    }


@pytest.mark.parametrize(
    "path", ["absent", "", "g*d", "empty", "damaged", "large", "colours", "notes.txt", "floats.npy"]
)
def test_a_wrong_input_is_one_error_and_nothing_is_written(predict, digits, path):
    words = make_wrong_inputs(digits)[path]
    status, out, folders = predict(f"--input={path}")
    assert status == 2
    line = out.strip().splitlines()[-1]
    assert all(word in line.replace(f"{Path.cwd()}/", "") for word in words), line
    assert not folders


def test_other_files_of_a_folder_are_named(short_run, digits, workdir):
    write(workdir / "images", digits[:2])
    (workdir / "images/notes.txt").write_text("")
    with pytest.warns(UserWarning, match=r"1 files of .* are not predicted.*notes\.txt"):
        predictions = package.predict(short_run, workdir / "images", "last")
    assert len(predictions["index"]) == 2


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_other_commands_have_no_input(fulgurite, command):
    status, _, err = fulgurite(command, "--config", "fedsir/smoke.yaml", "--input=images")
    assert status == 2
    assert "of `fulgurite predict` alone" in err


OTHER = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule


class Data(LightningDataModule):
    def predict_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(2, 1))


class Model(LightningModule):
    def predict_step(self, batch, batch_idx):
        return batch
"""


def test_a_datamodule_without_the_method_is_told_which(fulgurite, workdir):
    (workdir / "other.py").write_text(OTHER)
    (workdir / "file.txt").touch()
    status, _, err = fulgurite(
        "predict", "--model=other.Model", "--data=other.Data", "--input=file.txt"
    )
    assert status == 2
    assert "Data predicts its own data alone" in err
    assert "predict_from(path, trained)" in err


def test_a_datamodule_of_ones_own_reads_files(fulgurite, workdir):
    method = "\n    def predict_from(self, path, trained):\n        self.trained = trained\n"
    content = OTHER.replace("\n\n\nclass Model", f"\n{method}\n\nclass Model")
    (workdir / "other.py").write_text(content)
    (workdir / "file.txt").touch()
    status, _, err = fulgurite(
        "predict", "--model=other.Model", "--data=other.Data", "--input=file.txt"
    )
    assert status == 0, err
