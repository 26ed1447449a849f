"""Readers of federations: parquet as Hugging Face stores images, LEAF's JSON."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from fakes.options import group

from fulgurite.datamodules.fedsir import (
    FederatedDataModule,
    FilePartition,
    Grouped,
    Iid,
    Leaf,
    LeafPixels,
    Natural,
    Parquet,
    ParquetFiles,
)
from fulgurite.datamodules.fedsir.options import FederatedEvaluationOptions
from fulgurite.errors import ConfigError, DataError
from fulgurite.testing.files import class_images, write_image_parquet

COUNT = 30


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def images():
    return class_images(10, 3, size=6)[0]


LABELS = np.repeat([0, 1, 2], 10)
WRITERS = [f"w{i % 4}" for i in range(COUNT)]


def build(source, partition, **options):
    data = FederatedDataModule(source, partition, **options)
    data.prepare_data()
    data.setup()
    return data


def check_clients(data, images, labels, writers):
    """Each client has the images of its writer, with their labels."""
    number = {image.tobytes(): row for row, image in enumerate(images)}
    every = sorted(set(writers))
    for k in range(data.num_clients):
        rows = [number[image.tobytes()] for image in data.client_images(k).numpy()]
        assert {writers[row] for row in rows} == {every[k]}
        assert data.labels.given[data.client_index(k)].tolist() == [labels[row] for row in rows]


# --- parquet


@pytest.mark.parametrize("split", [True, False])
def test_natural_clients_of_a_parquet_table(tmp_path, images, split):
    names = ["cat", "dog", "elk"]
    for part in range(2):  # of several files
        rows = slice(15 * part, 15 * part + 15)
        write_image_parquet(
            tmp_path / f"train-{part}.parquet", images[rows], LABELS[rows].tolist(), names,
            writer_id=WRITERS[rows], age=[*range(15)],
        )  # fmt: skip
    test = None
    if split:
        test = str(
            write_image_parquet(tmp_path / "t.parquet", images[::3], LABELS[::3].tolist(), names)
        )
    source = Parquet(ParquetFiles(str(tmp_path / "train-*.parquet"), test))
    assert (source.num_classes, source.in_channels, source.image_size) == (3, 3, (6, 6))
    data = build(source, Natural("writer_id"), clients=4)
    assert data.class_names == ("cat", "dog", "elk")
    check_clients(data, images, LABELS, WRITERS)
    samples = len(data.val_dataloader().dataset) + data.num_samples
    assert (samples, len(data.test_dataloader().dataset)) == ((30, 10) if split else (27, 3))
    again = build(
        Parquet(ParquetFiles(str(tmp_path / "train-*.parquet"), test)),
        Grouped(Iid(), "writer_id"),
        clients=2,
    )
    assert again.num_samples == data.num_samples


def test_rows_of_a_parquet_table_count_through_its_files(tmp_path, images):
    path = write_image_parquet(tmp_path / "a.parquet", images, LABELS.tolist())
    frame = pd.DataFrame({"row": range(COUNT), "client": WRITERS})
    frame.to_csv(tmp_path / "a.csv", index=False)
    data = build(
        Parquet(ParquetFiles(str(path))), FilePartition(str(tmp_path / "a.csv")), clients=4
    )
    check_clients(data, images, LABELS, WRITERS)


def test_labels_that_are_names_and_images_that_are_resized_or_grey(tmp_path, images):
    labels = [["b", "a", "c"][k] for k in LABELS]
    path = str(write_image_parquet(tmp_path / "a.parquet", images, labels))
    source = Parquet(ParquetFiles(path, path), image_size=4, channels=1)
    arrays = source.load()
    assert arrays.class_names == ("a", "b", "c")
    assert arrays.train_labels.tolist() == [[1, 0, 2][k] for k in LABELS]
    assert tuple(arrays.train_images.shape) == (COUNT, 1, 4, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label": "y"}, "no one column 'y': it has image, label, client"),
        ({"image": "img"}, "no one column 'img'"),
        ({"image": "client"}, "its column 'client' has no bytes of an image in row 0"),
        ({"class_names": ["a", "b"]}, "label '2' of .* is none of the 2 classes"),
        ({"train": "/nowhere/*.parquet"}, "There is no parquet file /nowhere"),
    ],
)
def test_parquet_that_does_not_fit_is_one_error(tmp_path, images, arguments, message):
    path = write_image_parquet(tmp_path / "a.parquet", images, LABELS.tolist(), client=WRITERS)
    with pytest.raises(DataError, match=message):
        Parquet(**group({"train": str(path)} | arguments, files=ParquetFiles)).load()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([3] * COUNT, "not numbers from 0 without gaps: 3"),
        ([-1, *LABELS[1:].tolist()], "not numbers from 0 without gaps: -1, 0"),
        ([None, *LABELS[1:].tolist()], "Row 0 of .* has no label"),
    ],
)
def test_labels_of_parquet_are_checked(tmp_path, images, labels, message):
    path = write_image_parquet(tmp_path / "a.parquet", images, labels)
    with pytest.raises(DataError, match=message):
        Parquet(ParquetFiles(str(path))).load()


def test_an_image_of_another_size_or_a_damaged_one_is_named(tmp_path, images):
    path = write_image_parquet(tmp_path / "a.parquet", images, LABELS.tolist())
    frame = pd.read_parquet(path)
    frame.at[7, "image"] = {"bytes": b"\x89PNG damaged", "path": "x"}
    frame.to_parquet(tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"of row 7 of .*b\.parquet"):
        Parquet(ParquetFiles(str(tmp_path / "b.parquet"))).load()
    other = write_image_parquet(
        tmp_path / "c.parquet", class_images(10, 3, size=5)[0], LABELS.tolist()
    )
    with pytest.raises(DataError, match=r"of row 0 of .*c\.parquet has 5 x 5 pixels.*image_size"):
        Parquet(ParquetFiles(str(path), str(other))).load()
    with pytest.raises(ConfigError, match="2 channels"):
        Parquet(ParquetFiles(str(path)), channels=2)


# --- LEAF


def leaf(users, scale=1.0):
    """LEAF's content of pixels (N_u, D) and labels by user."""
    return {
        "users": [*users],
        "num_samples": [len(y) for _, y in users.values()],
        "user_data": {u: {"x": (x * scale).tolist(), "y": list(y)} for u, (x, y) in users.items()},
    }


def write_leaf(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return str(path)


def of_writers(images, labels, writers, kept):
    pixels = images.reshape(len(images), -1) / 255
    found = {}
    for writer in kept:
        rows = [row for row, name in enumerate(writers) if name == writer]
        found[writer] = (pixels[rows], [int(labels[row]) for row in rows])
    return found


@pytest.mark.parametrize("scale", [1.0, 255.0])
def test_writers_of_leaf_are_clients(tmp_path, scale):
    images = class_images(20, 2, size=5, channels=1)[0]
    labels, writers = np.repeat([0, 1], 20), [f"f{i % 4}_{i % 4}" for i in range(40)]
    every = sorted(set(writers))
    for part, kept in enumerate((every[2:], every[:2])):
        content = leaf(of_writers(images, labels, writers, kept), scale)
        write_leaf(tmp_path / "train" / f"all_data_{part}.json", content)
    test = write_leaf(
        tmp_path / "t.json", leaf({"x": (images[::9].reshape(5, -1) / 255, [0, 0, 0, 1, 1])}, scale)
    )
    source = Leaf(str(tmp_path / "train"), test, pixels=LeafPixels((1, 5, 5), maximum=scale))
    data = build(source, Natural(), clients=4, evaluation=FederatedEvaluationOptions(0.1))
    check_clients(data, images, labels, writers)
    assert (data.num_classes, data.in_channels, data.image_size) == (2, 1, (5, 5))
    few = build(
        Leaf(str(tmp_path / "train"), test, pixels=LeafPixels((1, 5, 5), maximum=scale), users=1),
        Natural(),
        clients=1,
    )
    assert set(few.samples.column("client")) == {"f2_2"}


def good():
    x = np.array([[0.0, 1.0, 0.5, 1.0]] * 2)
    return leaf({"a": (x, [0, 1]), "b": (x, [1, 0])})


def without(key):
    return lambda c: c.pop(key)


FAULTS = [
    (without("users"), "no `users` with a number"),
    (without("num_samples"), "no `users` with a number"),
    (without("user_data"), "user 'a' has no data"),
    (lambda c: c["users"].append("c"), "no `users` with a number"),
    (lambda c: c.update(users=["a", "a"]), "names a user twice"),
    (lambda c: c.update(num_samples=[2, 3]), "user 'b' has not as many images"),
    (lambda c: c["user_data"].update(c=c["user_data"]["a"]), "user 'c' is twice .* or not in"),
    (lambda c: c["user_data"]["a"].pop("y"), "user 'a' have no x and y"),
    (lambda c: c["user_data"]["a"]["y"].pop(), "user 'a' has not one label in y"),
    (lambda c: c["user_data"]["a"].update(y=[0, -1]), "label of user 'a' is no class number"),
    (lambda c: c["user_data"]["a"].update(y=[0, "x"]), "label of user 'a' is no class number"),
    (lambda c: c["user_data"]["a"].update(y=[0, 3000]), "go up to 3000"),
    (lambda c: c["user_data"]["a"].update(y=[0, 3]), r"has the class 2 .*classes=4` if that"),
    (lambda c: c["user_data"]["a"].update(x=["1.png", "2.png"]), "x of user 'a' is text"),
    (lambda c: c["user_data"]["a"]["x"][0].pop(), r"has not 4 numbers, as the shape \(1, 2, 2\)"),
    (lambda c: c["user_data"]["a"]["x"].__setitem__(0, [None] * 4), "something else than numbers"),
    (
        lambda c: c["user_data"]["a"]["x"].__setitem__(0, [0, 0, 0, 255]),
        "not from 0 to 1.0: set .*maximum",
    ),
    (lambda c: c["user_data"]["a"]["x"].__setitem__(0, [0, 0, 0, float("nan")]), "cannot be read"),
]


@pytest.mark.parametrize(("damage", "message"), FAULTS)
def test_leaf_that_does_not_fit_is_one_error(tmp_path, damage, message):
    test = write_leaf(tmp_path / "t" / "t.json", good())
    content = good()
    damage(content)
    path = write_leaf(tmp_path / "a" / "a.json", content)
    with pytest.raises(DataError, match=message):
        Leaf(path, test, pixels=LeafPixels((1, 2, 2))).load()
    assert Leaf(test, test, pixels=LeafPixels((1, 2, 2))).load().train_images.unique().tolist() == [
        0,
        128,
        255,
    ]


def test_a_number_that_would_crash_the_parser_is_refused(tmp_path):
    content = json.dumps(good()).replace("0.5", "9" * 5000)
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match="hundreds of digits"):
        Leaf(
            str(tmp_path / "a.json"), str(tmp_path / "a.json"), pixels=LeafPixels((1, 2, 2))
        ).load()


def test_pixels_of_another_scale_than_said_are_refused(tmp_path):
    images, labels = class_images(4, 2, size=5, channels=1)
    path = write_leaf(
        tmp_path / "t.json", leaf({"a": (images.reshape(8, -1) / 255, labels.tolist())}, 1.0)
    )
    with pytest.raises(DataError, match=r"1/255 of their full scale.*pixels\.maximum` to 1"):
        Leaf(path, path, pixels=LeafPixels((1, 5, 5), maximum=255)).load()


def test_users_of_leaf_are_in_one_file_and_as_many_as_asked(tmp_path):
    for name in ("a", "b"):
        write_leaf(tmp_path / "train" / f"{name}.json", good())
    path, test = str(tmp_path / "train"), str(tmp_path / "train" / "a.json")
    with pytest.raises(DataError, match=r"user 'a' is in .*a\.json and in .*b\.json"):
        Leaf(path, test, pixels=LeafPixels((1, 2, 2))).load()
    with pytest.raises(DataError, match=r"2 users in .* and 3 were asked for"):
        Leaf(test, test, pixels=LeafPixels((1, 2, 2)), users=3).load()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no \.json file"):
        Leaf(str(tmp_path / "empty"), test, pixels=LeafPixels((1, 2, 2))).load()


@pytest.mark.parametrize(
    "arguments",
    [{"shape": (2, 2, 2)}, {"shape": (1, 0, 2)}, {"maximum": 0.0}, {"users": 0}, {"classes": 0}],
)
def test_arguments_of_leaf_are_checked(arguments):
    with pytest.raises(ConfigError):
        Leaf("a", "b", **group(arguments, pixels=LeafPixels))


def test_a_class_without_images_is_right_where_it_is_said(tmp_path):
    path = write_leaf(tmp_path / "a.json", good())
    source = Leaf(path, path, pixels=LeafPixels((1, 2, 2)), classes=62)
    assert source.num_classes == len(source.load().class_names) == 62
    assert torch.equal(source.load().train_labels, torch.tensor([0, 1, 1, 0]))
