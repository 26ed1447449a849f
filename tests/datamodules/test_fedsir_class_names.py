"""Classes of sources: each has one name and one number, in all files."""

import numpy as np
import pytest

from fulgurite.datamodules.fedsir import ImageFolder, Npz, Parquet, ParquetFiles
from fulgurite.errors import DataError
from fulgurite.testing.files import (
    class_images,
    write_image_files,
    write_image_parquet,
    write_npz,
)

pytestmark = pytest.mark.usefixtures("cache")

LABELS = [0, 0, 1, 1]


@pytest.fixture(scope="module")
def images():
    return class_images(2, 2, size=4)[0]


def test_two_classes_of_one_name_are_refused(tmp_path):
    path = write_npz(tmp_path / "a.npz", class_names=np.array(["a", "b", "a"]))
    with pytest.raises(DataError, match=r"a\.npz are unusable: Two classes are called 'a'"):
        Npz(str(path)).load()


def test_a_class_without_training_images_is_told(tmp_path, log):
    ones = np.repeat([1, 2], 4)  # numbered from 1, and the third has no image
    path = write_npz(
        tmp_path / "a.npz", classes=2, train_labels=ones, class_names=np.array(["a", "b", "c"])
    )
    Npz(str(path)).load()
    assert "No training image is of the class 'a'" in log.text
    log.clear()
    Npz(str(write_npz(tmp_path / "b.npz", classes=2))).load()
    assert log.text == ""


def test_classes_whose_names_are_alike_are_told(tmp_path, log):
    folder = write_image_files(tmp_path / "a", classes=2)
    for split in ("train", "test"):
        (folder / split / "class_0").rename(folder / split / "Class_1")
    assert ImageFolder(str(folder)).load().class_names == ("Class_1", "class_1")
    assert "'Class_1' and 'class_1' are different ones" in log.text


def test_files_of_parquet_number_classes_alike(tmp_path, images):
    train = write_image_parquet(tmp_path / "a.parquet", images, LABELS, ["cat", "dog"])
    test = write_image_parquet(tmp_path / "b.parquet", images, LABELS, ["dog", "cat"])
    with pytest.raises(DataError, match=r"b\.parquet call the class 0 'dog'.* to be 'cat'"):
        Parquet(ParquetFiles(str(train), str(test))).load()
    with pytest.raises(DataError, match=r"a\.parquet call the class 0 'cat'.* to be 'dog'"):
        Parquet(ParquetFiles(str(train)), class_names=["dog", "cat"]).load()
    renamed = Parquet(ParquetFiles(str(train)), class_names=["Katze", "Hund"]).load()
    assert renamed.class_names == ("Katze", "Hund")


def test_labels_by_name_have_the_order_of_the_configuration(tmp_path, images):
    path = str(write_image_parquet(tmp_path / "a.parquet", images, ["cat", "cat", "dog", "dog"]))
    arrays = Parquet(ParquetFiles(path, path), class_names=["dog", "cat"]).load()
    assert arrays.class_names == ("dog", "cat")
    assert arrays.test_labels.tolist() == [1, 1, 0, 0]
