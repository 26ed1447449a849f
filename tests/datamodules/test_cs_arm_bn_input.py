"""Plates of a table that are in no split, predicted with a trained run."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
import yaml

import fulgurite as package
from fulgurite.errors import CheckpointError, ConfigError, DataError, FulguriteError

COLUMNS = ["source", "batch", "plate", "well", "site", "role", "label"]

pytestmark = pytest.mark.usefixtures("workdir")


@pytest.fixture(scope="module")
def trained(train_once):
    """A run on generated plates, and its DataModule."""
    cli, folder = train_once(
        "fit", "--config", "cs_arm_bn/smoke.yaml", "--trainer.max_epochs=1", "--run.dir=run"
    )
    return folder / "run", cli.datamodule


@pytest.fixture
def tested(trained):
    """A table of the plates of the tests, as a user would write it."""
    data = trained[1]
    rows = np.concatenate([r for n, r in data.assignment.tests.items() if n != "in_domain"])
    frame = data.table.frame[np.isin(data.table.domain, np.unique(data.table.domain[rows]))]
    names = [data.class_names[c] if c >= 0 else "" for c in frame["label"]]
    paths = [f"path_{channel}" for channel in data.source.channels]
    return frame.assign(label=names)[[*COLUMNS, *paths]]


def copy_images(frame, folder):
    """Copy the images of a table, and name them relative to it."""
    frame = frame.copy()
    Path(folder).mkdir()
    for column in [name for name in frame if name.startswith("path_")]:
        for row, path in frame[column].items():
            frame.loc[row, column] = f"{row}_{column}.tiff"
            shutil.copyfile(path, Path(folder) / f"{row}_{column}.tiff")
    frame.to_csv(f"{folder}/plates.csv", index=False)
    return f"{folder}/plates.csv"


def by_site(predictions):
    order = np.lexsort([predictions[n] for n in ("site", "well_name")])
    return {name: values[order] for name, values in predictions.items()}


def test_copies_of_the_test_plates_are_predicted_as_these(trained, tested, predict_split):
    run, data = trained
    split = predict_split(run)
    sites = data.table.frame.loc[split["index"], ["plate", "site"]]
    split |= {name: column.to_numpy(str) for name, column in sites.items()}
    predictions = package.predict(run, copy_images(tested, "new"), "last")
    one, other = by_site(split), by_site(predictions)
    assert len(one["plate"]) == len(tested[tested["role"] == "query"])
    for name in ("plate", "well_name", "site", "label_name", "predicted_name"):
        assert np.array_equal(one[name], other[name]), name
    assert torch.equal(*(torch.from_numpy(p["probabilities"]) for p in (one, other)))
    assert set(predictions["domain_name"]) == set(data.domains) & set(predictions["domain_name"])


def test_labels_are_optional(trained, tested):
    tested.drop(columns="label").to_csv("plates.csv", index=False)
    predictions = package.predict(trained[0], "plates.csv", "last")
    assert set(predictions["label"]) == {-1}
    assert set(predictions["predicted_name"]) <= set(trained[1].class_names)


def test_a_checkpoint_that_says_nothing_leaves_it_to_the_data(trained, tested):
    tested.to_csv("plates.csv", index=False)
    stored = torch.load(trained[0] / "checkpoints/last.ckpt", weights_only=True)
    stored.pop("PlateDataModule"), stored.pop("fulgurite_digest")
    shutil.copytree(trained[0], "older")
    torch.save(stored, "older/checkpoints/last.ckpt")
    older, newer = (package.predict(run, "plates.csv", "last") for run in ("older", trained[0]))
    assert np.array_equal(older["probabilities"], newer["probabilities"])


def spoil(kind, tested):
    """A wrong table; gives the path and words of the error."""
    if kind == "class":
        row = tested.index[tested["role"] == "query"][0]
        tested.loc[row, "label"] = "caffeine"
        words = ("'caffeine'", "classes are those of the training")
    elif kind == "channel":
        tested = tested.rename(columns={"path_DNA": "path_Hoechst"})
        words = ("'path_DNA'", "path_Hoechst")
    elif kind == "controls":
        plate = tested["plate"].iloc[0]
        tested = tested[(tested["plate"] != plate) | (tested["role"] == "query")]
        words = (plate, "(0)", "fewer than 8 controls")
    elif kind == "size":
        site = tested.index[0]
        plate = tested["plate"].iloc[0]
        for row in tested.index[tested["plate"] == plate]:
            for column in [name for name in tested if name.startswith("path_")]:
                image = tifffile.imread(tested.loc[row, column])
                tested.loc[row, column] = str(Path(f"{row}{column}.tiff").absolute())
                tifffile.imwrite(tested.loc[row, column], np.pad(image, 2, "edge"))
        words = (str(tested.loc[site, "plate"]), "28")
    elif kind == "images":
        for column in [name for name in tested if name.startswith("path_")]:
            tested[column] = "absent.tiff"
        tested["path_DNA"] = "other.tiff"
        words = ("file for two channels",)
    elif kind == "absent":
        for column in [name for name in tested if name.startswith("path_")]:
            tested[column] = column + tested.index.astype(str) + ".tiff"
        words = ("has its first image", "relative to the folder of")
    tested.to_csv("plates.csv", index=False)
    return words


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("class", marks=pytest.mark.slow),
        "channel",
        pytest.param("controls", marks=pytest.mark.slow),
        "size",
        pytest.param("images", marks=pytest.mark.slow),
        "absent",
    ],
)
def test_what_does_not_fit_is_refused_by_name(trained, tested, kind):
    words = spoil(kind, tested)
    with pytest.raises(FulguriteError) as caught:
        package.predict(trained[0], "plates.csv", "last")
    assert all(word in str(caught.value) for word in words), caught.value
    assert not [*Path(trained[0]).rglob("*.partial.*")]


def test_a_folder_or_another_file_is_no_table(trained):
    Path("folder").mkdir()
    Path("plates.xlsx").write_text("no table")
    with pytest.raises(DataError, match=r"--input=.*folder is a folder"):
        package.predict(trained[0], "folder", "last")
    with pytest.raises(DataError, match=r"plates\.xlsx ends with none of \.csv"):
        package.predict(trained[0], "plates.xlsx", "last")


def test_plates_of_embeddings_have_no_images_to_read(trained):
    from fulgurite.datamodules.cs_arm_bn import EmbeddedPlates

    data = package.load("cs_arm_bn/smoke").data
    data.source = EmbeddedPlates(data.source, "embeddings.npz")
    with pytest.raises(ConfigError, match="trained on embeddings"):
        data.predict_from(Path("plates.csv"), trained[1].state_dict())


def test_training_plates_need_not_be_there(trained, tested):
    """Classes, channels and statistics are in the checkpoint, sizes of the network too."""
    tested.to_csv("plates.csv", index=False)
    reference = package.predict(trained[0], "plates.csv", "last")
    shutil.copytree(trained[0], "run")
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    config["data"]["init_args"]["source"] = {
        "class_path": "fulgurite.datamodules.cs_arm_bn.CsvPlates",
        "init_args": {
            "path": "gone.csv", "channels": list(trained[1].source.channels),
            "downscale": 1, "intensity": "full",
        },
    }  # fmt: skip
    Path("run/config.yaml").write_text(yaml.safe_dump(config))
    predictions = package.predict("run", "plates.csv", "last")
    assert np.array_equal(predictions["probabilities"], reference["probabilities"])


def test_a_folder_in_the_layout_of_the_training_is_read(trained):
    """Plates of JUMP under another root; those of other classes are refused."""
    from fulgurite.datamodules.cs_arm_bn import JumpPlates
    from fulgurite.datamodules.cs_arm_bn.jump_options import JumpFiles
    from fulgurite.datamodules.cs_arm_bn.prediction import find_input_plates

    run, data = trained
    prefixes = JumpFiles(prefixes={"s3://cellpainting-gallery/": "", "/mnt/bucket/": ""})
    source = JumpPlates("elsewhere", files=prefixes)
    other = find_input_plates(
        data.source.root, source, channels=data.source.channels, classes=data.class_names
    )
    assert source.root == "elsewhere"
    assert other.load().domains == data.table.domains
    fresh = package.load("cs_arm_bn/smoke").data
    fresh.source = source
    state = data.state_dict() | {"class_names": ["a", "b"]}
    with pytest.raises(CheckpointError, match="trained with class names a, b"):
        fresh.predict_from(data.source.root, state)
    assert pd.notna(run)
