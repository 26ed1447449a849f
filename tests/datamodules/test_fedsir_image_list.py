"""Lists of images, with labels beside them or in files of their own."""

import numpy as np
import pytest
from fakes.options import group
from PIL import Image

from fulgurite.datamodules.fedsir import (
    FederatedDataModule,
    FileLabels,
    Iid,
    ImageList,
    ImageLists,
    SourceLabels,
)
from fulgurite.datamodules.fedsir.options import FederatedEvaluationOptions
from fulgurite.errors import ConfigError, DataError
from fulgurite.testing.files import class_images, write_image_files

LABELS = np.repeat([0, 1, 2], 3)


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(autouse=True)
def data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FULGURITE_DATA", str(tmp_path))


def paths_of(split):
    return [f"{split}/class_{k}/{i:04d}.png" for k in range(3) for i in range(3)]


TRAIN, TEST = paths_of("train"), paths_of("test")
PIXELS = class_images(3, 3, size=8, seed=0)[0]


def write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def pairs(paths, labels):
    return [f"{path} {label}" for path, label in zip(paths, labels, strict=True)]


def image_list(train, **options):
    return ImageList(**group({"train": train, **options}, files=ImageLists))


@pytest.fixture
def clothing(tmp_path):
    """Files as those of Clothing1M: noisy and clean labels of more images than are listed."""
    write_image_files(tmp_path / "images")
    noisy = (LABELS + 1) % 3
    clean = [*pairs(TEST, LABELS), *pairs(TRAIN[:4], LABELS[:4]), "train/elsewhere.jpg 0"]
    return {
        "root": str(tmp_path / "images"),
        "train": write(tmp_path / "noisy_train_key_list.txt", reversed(TRAIN)),
        "train_labels": write(
            tmp_path / "noisy_label_kv.txt", [*pairs(TRAIN, noisy), "train/elsewhere.jpg 1"]
        ),
        "test": write(tmp_path / "clean_test_key_list.txt", TEST),
        "test_labels": write(tmp_path / "clean_label_kv.txt", clean),
        "class_names": write(tmp_path / "category_names_eng.txt", ["T-Shirt", "Down Coat", "Vest"]),
    }


def test_files_of_clothing1m(clothing):
    source = image_list(**clothing)
    assert (source.num_classes, source.in_channels, source.image_size) == (3, 3, (8, 8))
    arrays = source.load()
    assert arrays.class_names == ("T-Shirt", "Down Coat", "Vest")
    np.testing.assert_array_equal(arrays.train_images.numpy(), PIXELS[::-1])
    assert arrays.train_labels.tolist() == ((LABELS + 1) % 3)[::-1].tolist()
    np.testing.assert_array_equal(arrays.test_images.numpy(), class_images(3, 3, size=8, seed=1)[0])
    assert arrays.test_labels.tolist() == LABELS.tolist()
    assert list(arrays.listing.keys) == TRAIN[::-1]


def test_the_true_labels_of_some_images_are_known(clothing):
    noise = SourceLabels(clothing["test_labels"], unknown="ignore")
    data = FederatedDataModule(
        image_list(**clothing), Iid(), noise, clients=2, evaluation=FederatedEvaluationOptions(0.0)
    )
    data.prepare_data()
    data.setup()
    by_path = dict(zip(TRAIN, LABELS.tolist(), strict=True))
    names = [data.samples.listing.keys[row] for row in data.samples.rows.tolist()]
    assert data.samples.true.tolist() == [
        by_path[name] if name in TRAIN[:4] else -1 for name in names
    ]
    assert data.labels.given.tolist() == [(by_path[name] + 1) % 3 for name in names]


@pytest.mark.parametrize("name", ["i.zip", "images"])
def test_labels_beside_paths_of_a_folder_or_zip(tmp_path, name):
    write_image_files(tmp_path / name)
    names = ["cat", "dog", "elk"]
    texts = [names[k] for k in LABELS]
    train = write(
        tmp_path / "lists" / "a.txt", [*pairs(TRAIN, texts)[:-1], "", f"./{TRAIN[-1]}\telk"]
    )
    write(tmp_path / "b.txt", pairs(TRAIN[::-1], ["dog"] * 9))
    arrays = image_list(
        "lists/a.txt", root=name, test_fraction=0.3, channels=1, image_size=4
    ).load()
    assert arrays.class_names == ("cat", "dog", "elk")
    assert tuple(arrays.train_images.shape) == (6, 1, 4, 4)
    assert arrays.test_labels.tolist() == [0, 1, 2]
    assert arrays.samples().listing.total == 9
    assert arrays.train_labels.tolist() == LABELS[arrays.train_rows].tolist()
    samples = FileLabels("b.txt", truth="unknown").annotate(arrays.samples())
    assert set(samples.labels.tolist()) == {1}
    whole = image_list(train, test=train.replace("a.txt", "c.txt"), root=name)
    write(tmp_path / "lists" / "c.txt", pairs(TEST, texts))
    np.testing.assert_array_equal(whole.load().train_images.numpy(), PIXELS)
    swapped = write(tmp_path / "lists" / "c.txt", pairs(TEST[::-1], texts))
    again = image_list(train, test=swapped, root=name).load()  # no stale cache
    np.testing.assert_array_equal(again.test_images.flip(0), whole.load().test_images)


def test_changed_labels_are_read_again(tmp_path):
    write_image_files(tmp_path / "images")
    path = write(tmp_path / "images" / "a.txt", pairs(TRAIN, LABELS))
    before = image_list(path).load()
    write(tmp_path / "images" / "a.txt", pairs(TRAIN, 2 - LABELS))
    assert image_list(path).load().train_labels.tolist() == (2 - before.train_labels).tolist()


def test_names_that_are_numbers(tmp_path):
    write_image_files(tmp_path / "images")
    path = write(tmp_path / "images" / "a.txt", pairs(TRAIN, [(9, 10, 11)[k] for k in LABELS]))
    with pytest.raises(DataError, match=r"not numbers from 0 .* 10, 11, 9.*labels_are=names"):
        image_list(path).load()
    arrays = image_list(path, labels_are="names", test_fraction=0.1).load()
    assert arrays.class_names == ("9", "10", "11")
    assert arrays.test_labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": []}, "There are no images in the list"),
        (
            {"train": [*TRAIN, f"./{TRAIN[1]}"]},
            r"names 1 images more than once: train/class_0/0001",
        ),
        ({"train": [*TRAIN, TEST[0]]}, "has no label for 1 of 10 images of .*test/class_0/0000"),
        ({"train": ["train/elsewhere.jpg"]}, r"are not in .*images: train/elsewhere.*root"),
        ({"train": ["../a.png"]}, r"'../a.png' in .* does not begin in the folder"),
        ({"train": ["/data/a.png"]}, "'/data/a.png' in .* does not begin"),
        ({"test": TRAIN[:4]}, "4 images are both in"),
        ({"train_labels": TRAIN}, "is one field: a path and a label are wanted"),
        ({"train_labels": [*pairs(TRAIN, LABELS), f"{TRAIN[0]} 2"]}, "the labels 0 and 2"),
        ({"train_labels": pairs(TRAIN, LABELS - 1)}, "no class of the source: '-1'"),
        ({"test_labels": pairs(TEST, LABELS * 2)}, "no class of the source: '4'"),
        ({"class_names": ["a", "a", "b"]}, "are 3, of which 2 differ"),
        ({"class_names": ["a", "b"]}, "no class of the source: '2'"),
    ],
)
def test_files_that_do_not_fit_are_one_error(tmp_path, clothing, changes, message):
    for name, lines in changes.items():
        clothing[name] = write(tmp_path / f"{name}.txt", lines)
    with pytest.raises(DataError, match=message):
        image_list(**clothing).load()
    assert not list((tmp_path / "cache").glob("list-*"))


def test_missing_images_are_named_before_any_is_decoded(tmp_path, clothing):
    (tmp_path / "images" / TRAIN[3]).unlink()
    (tmp_path / "images" / TEST[3]).unlink()
    with pytest.raises(DataError, match=f"{TRAIN[3]}, {TEST[3]}"):
        image_list(**clothing).load()


def test_lists_without_labels_say_how_to_give_them(clothing):
    clothing["train_labels"] = None
    with pytest.raises(DataError, match=r"one field.*set `.*train_labels`"):
        image_list(**clothing).load()
    with pytest.raises(ConfigError, match="no list of test images"):
        ImageLists("a.txt", test_labels="b.txt")


def test_images_of_many_sizes_are_resized(tmp_path):
    names = [f"{k}.jpg" for k in range(4)]
    for k, name in enumerate(names):
        pixels = np.full((5 + k, 9 - k, 3), 60 * k, np.uint8)
        Image.fromarray(pixels).save(tmp_path / name, quality=95)
    path = write(tmp_path / "a.txt", pairs(names, [0, 0, 1, 1]))
    with pytest.raises(DataError, match=r"image_size` to resize all"):
        image_list(path, test_fraction=0.4).load()
    arrays = image_list(path, image_size=6, test_fraction=0.4).load()
    kept = arrays.train_rows.tolist()
    assert tuple(arrays.train_images.shape) == (2, 3, 6, 6)
    assert arrays.train_images[:, 0, 3, 3].tolist() == pytest.approx([60 * k for k in kept], abs=2)
