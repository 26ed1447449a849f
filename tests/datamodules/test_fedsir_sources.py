"""Sources through their real readers, and the cache of decoded images."""

import errno
import io
import os
import pickle
import shutil
import tarfile
import textwrap
import warnings
import zipfile

import numpy as np
import pytest
import torch
from fakes.forks import start_script
from PIL import Image

from fulgurite.datamodules.fedsir import (
    CifarArchive,
    Digits,
    ImageArrays,
    ImageFolder,
    Npz,
    archives,
)
from fulgurite.datamodules.fedsir.cifar_pickle import interpret_pickle
from fulgurite.errors import ConfigError, DataError
from fulgurite.io import checksum
from fulgurite.testing.files import (
    class_images,
    png16,
    python2_pickle,
    write_cifar_archive,
    write_image_files,
    write_npz,
)

pytestmark = pytest.mark.usefixtures("cache")


def entries(cache):
    return sorted(p.name for p in cache.iterdir() if p.is_dir()) if cache.exists() else []


# --- digits


def test_digits_keep_360_untouched_test_images():
    from sklearn.datasets import load_digits

    arrays = Digits().load()
    assert tuple(arrays.train_images.shape) == (1437, 1, 8, 8)
    assert torch.bincount(arrays.test_labels).tolist() == [36] * 10
    real = {tuple(row) for row in load_digits().data.astype(int).tolist()}
    for images in (arrays.train_images, arrays.test_images):
        back = (images.float() * 16 / 255).round().int().flatten(1).tolist()
        assert {tuple(row) for row in back} <= real


def test_digit_copies_repeat_and_look_like_their_originals():
    source = Digits(copies=3)
    arrays = source.load()
    images, labels = source.copy_images(arrays.train_images, arrays.train_labels)
    assert len(images) == len(labels) == 3 * 1437
    assert images.dtype == torch.uint8
    assert images.equal(source.copy_images(arrays.train_images, arrays.train_labels)[0])
    assert labels.equal(arrays.train_labels.repeat(3))
    originals = arrays.train_images.repeat(3, 1, 1, 1)
    distance = (images.float() - originals.float()).square().mean((1, 2, 3)).sqrt()
    assert (distance > 0).all()
    strangers = (images.float() - originals.roll(100, 0).float()).square().mean((1, 2, 3)).sqrt()
    assert distance.mean() < 0.8 * strangers.mean()
    other = Digits(copies=3, seed=1).copy_images(arrays.train_images, arrays.train_labels)[0]
    assert not images.equal(other)


def test_a_copy_without_augmentation_is_the_original():
    source = Digits(copies=2, max_shift=0, max_rotation=0, pixel_noise=0)
    images = source.load().train_images
    copies, _ = source.copy_images(images, torch.zeros(len(images)))
    assert copies.equal(images.repeat(2, 1, 1, 1))


def test_a_shift_moves_by_whole_pixels_at_most():
    source = Digits(copies=50, max_shift=1.0, max_rotation=0, pixel_noise=0)
    image = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    image[0, 0, 3, 3] = 240
    copies, _ = source.copy_images(image, torch.zeros(1))
    touched = (copies > 0).any(0)[0].nonzero()
    assert touched.min() == 2
    assert touched.max() == 4
    assert (copies.sum((1, 2, 3), dtype=torch.int64) - 240).abs().max() <= 2  # only rounding


# --- limits, labels


def test_limits_are_balanced_and_repeat():
    arrays = Digits(train_limit=105, test_limit=20).load()
    assert torch.bincount(arrays.train_labels).tolist() == [11] * 5 + [10] * 5
    assert torch.bincount(arrays.test_labels).tolist() == [2] * 10
    again = Digits(train_limit=105, test_limit=20).load()
    assert arrays.train_images.equal(again.train_images)
    with pytest.raises(DataError, match="limit of 5 images"):
        Digits(train_limit=5).load()
    with pytest.raises(ConfigError, match="train_limit"):
        Digits(train_limit=0)


def images_of(n, size=4):
    return torch.zeros(n, 1, size, size, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("train", "labels", "message"),
    [
        (images_of(2), torch.tensor([0, 2]), "run from 0 to 2, outside 0 to 1"),
        (images_of(2), torch.tensor([-1, 0]), "run from -1"),
        (images_of(2), torch.tensor([0.0, 1.0]), "float32"),
        (images_of(2), torch.tensor([0]), "2 train images and 1 labels"),
        (images_of(2).float(), torch.tensor([0, 1]), "8-bit"),
        (images_of(2, 5), torch.tensor([0, 1]), r"test images are \(1, 4, 4\)"),
    ],
)
def test_inconsistent_arrays_are_refused(train, labels, message):
    with pytest.raises(DataError, match=message):
        ImageArrays(train, labels, images_of(1), torch.tensor([0]), ("a", "b"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"image_size": [32, 32]}, "image_size is"),
        ({"image_size": 4.0}, "image_size is 4.0"),
        ({"channels": True}, "channels is True"),
        ({"train_limit": 7.0}, "train_limit is 7.0"),
        ({"test_fraction": "0.1"}, "test_fraction is '0.1'"),
        ({"seed": None}, "seed is None"),
    ],
)
def test_arguments_of_another_type_are_refused(arguments, words):
    with pytest.raises(ConfigError, match=words) as error:
        ImageFolder("nowhere", **arguments)
    assert f"source.init_args.{words.split()[0]}" in error.value.hint


# --- CIFAR archives


@pytest.mark.parametrize(("variant", "classes"), [("cifar10", 10), ("cifar100", 100)])
@pytest.mark.parametrize("unpacked", [False, True])
def test_cifar_archives_and_their_folders(tmp_path, variant, classes, unpacked):
    path = write_cifar_archive(tmp_path / "c.tar.gz", variant, per_class=2)
    if unpacked:
        with tarfile.open(path) as archive:
            archive.extractall(tmp_path / "c", filter="data")
        path = tmp_path / "c"
    source = CifarArchive(str(path), variant, checksum=None)
    assert (source.num_classes, source.in_channels, source.image_size) == (classes, 3, (32, 32))
    arrays = source.load()
    expected, labels = class_images(2, classes)
    assert torch.bincount(arrays.train_labels).tolist() == [2] * classes
    order = arrays.train_labels.argsort(stable=True)
    found = {image.tobytes() for image in arrays.train_images[order].numpy()}
    assert found == {image.tobytes() for image in expected}
    for label in (0, classes - 1):  # images and labels belong together
        mine = arrays.train_images[arrays.train_labels == label].numpy()
        theirs = expected[labels == label]
        assert {i.tobytes() for i in mine} == {i.tobytes() for i in theirs}
    assert arrays.test_images.numpy().tobytes() == class_images(1, classes, seed=1)[0].tobytes()
    assert arrays.class_names[0] == ("airplane" if classes == 10 else "class_00")
    assert source.load().train_images.equal(arrays.train_images)  # now from the cache


def test_cifar_checksums(tmp_path, cache):
    path = write_cifar_archive(tmp_path / "c.tar.gz")
    with pytest.raises(DataError, match=r"sha256 of .*c\.tar\.gz is .* not 6d958be0"):
        CifarArchive(str(path)).load()
    with pytest.raises(DataError, match="md5"):
        CifarArchive(str(path), checksum="0" * 32).load()
    assert entries(cache) == []
    CifarArchive(str(path), checksum=checksum(path)).load()
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path, filter="data")
    with pytest.raises(DataError, match=r"md5 of .*batches\.meta"):
        CifarArchive(str(tmp_path)).load()
    with pytest.raises(ConfigError, match="is a folder"):
        CifarArchive(str(tmp_path), checksum="0" * 64).load()


def test_cifar_is_downloaded_when_asked(tmp_path, monkeypatch):
    published = write_cifar_archive(tmp_path / "published.tar.gz")
    layout = archives.VARIANTS["cifar10"]
    assert layout.url.startswith("https://")
    monkeypatch.setitem(
        archives.VARIANTS,
        "cifar10",
        layout._replace(url=published.as_uri(), sha256=checksum(published)),
    )
    target = tmp_path / "data" / "cifar-10-python.tar.gz"
    with pytest.raises(DataError, match="no data at"):
        CifarArchive(str(target)).prepare()
    source = CifarArchive(str(target), download=True)
    source.prepare()
    assert target.read_bytes() == published.read_bytes()
    published.unlink()
    source.prepare()  # it is there already
    assert len(source.load().test_labels) == 10
    monkeypatch.setitem(archives.VARIANTS, "cifar10", layout._replace(url=target.as_uri()))
    other = tmp_path / "other.tar.gz"
    with pytest.raises(DataError, match="sha256"):
        CifarArchive(str(other), download=True).prepare()
    assert not other.exists()


def test_a_truncated_archive_is_one_data_error(tmp_path, cache):
    path = write_cifar_archive(tmp_path / "c.tar.gz")
    whole = path.read_bytes()
    for length in (0, 50, len(whole) // 2, len(whole) - 20):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"c\.tar\.gz"):
            CifarArchive(str(path), checksum=None).load()
    path.write_bytes(whole[:2000] + bytes(1000) + whole[3000:])
    with pytest.raises(DataError, match="damaged"):
        CifarArchive(str(path), checksum=None).load()
    assert entries(cache) == []


@pytest.mark.parametrize("variant", ["cifar10", "cifar100"])
@pytest.mark.parametrize("unpacked", [False, True])
def test_a_missing_batch_is_named_whatever_the_checksum(tmp_path, monkeypatch, variant, unpacked):
    path = write_cifar_archive(tmp_path / "c.tar.gz", variant)
    layout = archives.VARIANTS[variant]
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / layout.folder
    md5 = {file.name: checksum(file, "md5") for file in folder.iterdir()}
    monkeypatch.setitem(archives.VARIANTS, variant, layout._replace(md5=md5))
    (folder / f"{layout.train}_1.bak").write_bytes(b"no batch of it")
    whole = len(CifarArchive(str(folder), variant).load().train_labels)
    assert whole == 5 * layout.classes
    for missing in sorted(md5):
        content = (folder / missing).read_bytes()
        (folder / missing).unlink()
        target = folder
        if not unpacked:
            target = tmp_path / "less.tar.gz"
            with tarfile.open(target, "w:gz") as archive:
                archive.add(folder, layout.folder)
        for digest in ("official", None) if unpacked else (None,):
            with pytest.raises(DataError, match=f"lacks {missing} of {layout.folder}"):
                CifarArchive(str(target), variant, checksum=digest).load()
        (folder / missing).write_bytes(content)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("order", ["C", "F"])
def test_batches_of_every_protocol_are_read(protocol, order):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6), np.uint8)
    table = {b"data": np.asarray(pixels, order=order), b"labels": np.arange(4, dtype=np.int64)}
    table[b"data"].flags.writeable = protocol % 2 == 0
    content = interpret_pickle(pickle.dumps(table, protocol))
    np.testing.assert_array_equal(content[b"data"], pixels)
    np.testing.assert_array_equal(content[b"labels"], np.arange(4))
    labels = [np.int64(3), np.uint8(200), np.int32(-1)]
    assert interpret_pickle(pickle.dumps({"labels": labels}, protocol))[b"labels"] == [3, 200, -1]


def test_a_pickle_holds_few_arrays():
    many = {b"data": [], **{b"%d" % k: np.arange(3) for k in range(20)}}
    for protocol in (2, 5):
        with pytest.raises(ValueError, match="too many arrays"):
            interpret_pickle(pickle.dumps(many, protocol))


class _Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


PIXELS = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({b"labels": [0, 1]}, "no field 'data'"),
        ({b"data": PIXELS}, "no field 'labels'"),
        ({b"data": PIXELS[:, :3000], b"labels": [0, 1]}, "no images of 3 x 32 x 32"),
        ({b"data": PIXELS.astype(float), b"labels": [0, 1]}, "refused .it holds an array of 'f8'"),
        ({b"data": PIXELS, b"labels": [0, 10]}, "not integers from 0 to 9"),
        ({b"data": PIXELS, b"labels": [0.5, 1.0]}, "refused .it uses the opcode BINFLOAT"),
        ({b"data": PIXELS, b"labels": [0]}, "images and"),
        ([1, 2], "refused .it is not one dictionary"),
    ],
)
def test_bad_fields_of_an_archive_are_one_data_error(tmp_path, cache, table, message):
    extra = {"data_batch_3": python2_pickle(table)}
    path = write_cifar_archive(tmp_path / "c.tar.gz", extra=extra)
    with pytest.raises(DataError, match=message):
        CifarArchive(str(path), checksum=None).load()
    assert entries(cache) == []


def test_a_malicious_archive_is_not_run(tmp_path):
    mark = tmp_path / "mark"
    extra = {"data_batch_1": pickle.dumps({b"data": _Evil(mark)}, protocol=2)}
    path = write_cifar_archive(tmp_path / "c.tar.gz", extra=extra)
    with pytest.raises(DataError, match=r"data_batch_1 of .* asks for"):
        CifarArchive(str(path), checksum=None).load()
    assert not mark.exists()


def test_the_wrong_variant_is_named(tmp_path):
    path = write_cifar_archive(tmp_path / "c.tar.gz")
    with pytest.raises(DataError, match=r"lacks meta, test, train of cifar-100-python"):
        CifarArchive(str(path), "cifar100", checksum=None).load()
    with pytest.raises(ConfigError, match="cifar11"):
        CifarArchive(str(path), "cifar11")


# --- folders and zips of images


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("name", ["i.zip", "i"])
def test_image_folders_and_zips(tmp_path, monkeypatch, name, suffix):
    write_image_files(tmp_path / name, suffix=suffix)
    monkeypatch.setenv("FULGURITE_DATA", str(tmp_path))
    source = ImageFolder(name)
    assert (source.num_classes, source.in_channels, source.image_size) == (3, 3, (8, 8))
    arrays = source.load()
    assert arrays.class_names == ("class_0", "class_1", "class_2")
    assert (
        arrays.train_labels.tolist() == arrays.test_labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    )
    for stream, images in enumerate((arrays.train_images, arrays.test_images)):
        expected = class_images(3, 3, size=8, seed=stream)[0]
        if suffix == "png":
            np.testing.assert_array_equal(images.numpy(), expected)
        else:
            assert np.abs(images.numpy().astype(int) - expected).mean() < 40


def test_images_by_class_without_splits(tmp_path, cache):
    write_image_files(tmp_path / "i.zip", splits=(), per_class=10)
    arrays = ImageFolder(str(tmp_path / "i.zip"), test_fraction=0.2).load()
    assert torch.bincount(arrays.test_labels).tolist() == [2] * 3
    assert torch.bincount(arrays.train_labels).tolist() == [8] * 3
    both = np.concatenate([arrays.train_images.numpy(), arrays.test_images.numpy()])
    expected = class_images(10, 3, size=8)[0]
    assert {i.tobytes() for i in both} == {i.tobytes() for i in expected}
    other = ImageFolder(str(tmp_path / "i.zip"), test_fraction=0.2, seed=1).load()
    assert not other.test_images.equal(arrays.test_images)
    assert len(entries(cache)) == 2


def test_grey_and_resized_images(tmp_path):
    write_image_files(tmp_path / "i.zip")
    source = ImageFolder(str(tmp_path / "i.zip"), image_size=6, channels=1)
    assert (source.in_channels, source.image_size) == (1, (6, 6))
    assert tuple(source.load().train_images.shape) == (9, 1, 6, 6)


def add(path, name, size):
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, "PNG")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, buffer.getvalue())


def test_mixed_sizes_need_a_size(tmp_path, cache):
    path = write_image_files(tmp_path / "i.zip")
    add(path, "train/class_1/9999.png", (5, 8))
    with pytest.raises(DataError, match=r"class_1/9999.png .* 8 x 5 pixels, the first one 8 x 8"):
        ImageFolder(str(path)).load()
    assert entries(cache) == []
    assert ImageFolder(str(path), image_size=8).load().train_images.shape[0] == 10


def test_what_is_no_image_is_ignored_and_what_is_broken_is_named(tmp_path):
    path = write_image_files(tmp_path / "i.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("README.md", "text")
        archive.writestr("__MACOSX/train/class_0/._0000.png", "junk")
        archive.writestr("train/class_0/.hidden.png", "junk")
    assert len(ImageFolder(str(path)).load().train_labels) == 9
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("train/class_0/zz.png", b"not an image")
    with pytest.raises(DataError, match=r"train/class_0/zz\.png .* is damaged .*neither a PNG"):
        ImageFolder(str(path)).load()


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_images_keep_their_content(tmp_path, channels):
    grey = np.random.default_rng(0).integers(300, 60_000, (8, 8)).astype(np.uint16)
    for split in ("train", "test"):
        for name in ("no", "yes"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(grey).save(tmp_path / split / name / "a.png")
    (tmp_path / "train" / "no" / "b.png").write_bytes(png16(np.dstack([grey] * 3)))
    images = ImageFolder(str(tmp_path), channels=channels).load().train_images
    expected = np.rint(grey / 257)
    assert tuple(images.shape) == (3, channels, 8, 8)
    assert np.abs(images.numpy() - expected).max() <= (channels == 1)  # luma may round down


def test_16_bit_images_that_use_few_values_are_refused(tmp_path, cache):
    for split, top in (("train", 4095), ("test", 60_000)):
        grey = np.random.default_rng(0).integers(0, top, (8, 8), endpoint=True).astype(np.uint16)
        grey[0, 0] = top
        for name in ("no", "yes"):
            (tmp_path / "i" / split / name).mkdir(parents=True)
            Image.fromarray(grey).save(tmp_path / "i" / split / name / "a.png")
    with pytest.raises(DataError, match="reach 4,095 of 65,535, so that 8 bits would keep 16"):
        ImageFolder(str(tmp_path / "i"), channels=1).load()
    Image.fromarray(grey).save(tmp_path / "i" / "train" / "no" / "bright.png")  # a saturated one
    with pytest.raises(DataError, match=r"Most of the 16-bit images .* reach 4,095 of 65,535"):
        ImageFolder(str(tmp_path / "i"), channels=1).load()
    (tmp_path / "i" / "train" / "no" / "bright.png").unlink()
    assert entries(cache) == []
    grey[:] = 0
    grey[0] = 4096
    for name in ("no/b.png", "yes/b.png"):
        Image.fromarray(grey).save(tmp_path / "i" / "train" / name)
    assert len(ImageFolder(str(tmp_path / "i"), channels=1).load().train_labels) == 4


def test_a_colour_map_is_refused_for_grey_images(tmp_path):
    path = write_image_files(tmp_path / "i.zip")
    buffer = io.BytesIO()
    Image.fromarray(class_images(1, 1, size=8)[0][0].transpose(1, 2, 0)).quantize(8).save(
        buffer, "PNG"
    )
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("train/class_0/map.png", buffer.getvalue())
    assert len(ImageFolder(str(path)).load().train_labels) == 10
    with pytest.raises(DataError, match=r"map\.png .*colour map"):
        ImageFolder(str(path), channels=1).load()


def test_blank_training_images_are_refused(tmp_path):
    blank = np.full((12, 8, 8), 255, np.uint8)
    path = write_npz(tmp_path / "a.npz", train_images=blank)
    with pytest.raises(DataError, match="12 training images have the value 255 everywhere"):
        Npz(str(path)).load()
    blank[-1, 0, 0] = 254
    write_npz(path, train_images=blank)
    assert len(Npz(str(path)).load().train_labels) == 12


def test_damaged_zips_are_data_errors(tmp_path, cache):
    path = write_image_files(tmp_path / "i.zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="damaged or truncated"):
        ImageFolder(str(path)).load()
    position = whole.index(b"IDAT") + 10
    path.write_bytes(whole[:position] + b"\0\0\0" + whole[position + 3 :])  # content against CRC
    with pytest.raises(DataError, match="is damaged or none"):
        ImageFolder(str(path)).load()
    assert entries(cache) == []


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "no .jpg, .jpeg or .png file in it"),
        (["train/c/a.webp", "train/d/b.webp"], "in it: train/c/a.webp, train/d/b.webp"),
        (["a.png", "b.png"], "no folder of a class: a.png, b.png"),
        (["c/a.png", "d/a.png", "logo.png"], "as c/a.png does, others elsewhere: logo.png"),
        (["train/c/a.png", "train/c/b.png", "train/c/sub/d.png"], "elsewhere: train/c/sub/d.png"),
        (["train/c/a.png", "other/c/a.png"], "other is neither train nor test"),
        (["training/c/a.png", "test/c/a.png"], "training is neither .*: training/c/a.png"),
        (["test/c/a.png"], "no folder train: test/c/a.png"),
        (["train\\c\\a.png", "train\\c\\b.png"], "backslashes: pack the zip again"),
        (["x/train/c/a.png", "y/test/c/a.png"], "train and test are in 2 folders: x, y"),
        (["train/a.png", "test/a.png"], "no folders of classes: test/a.png, train/a.png"),
    ],
)
def test_layouts_that_are_none(tmp_path, names, words):
    path = tmp_path / "i.zip"
    with zipfile.ZipFile(path, "w"):
        pass
    for name in names:
        add(path, name, (4, 4))
    with pytest.raises(DataError, match=f"not laid out by class.*{words}"):
        ImageFolder(str(path)).load()


def test_a_class_that_is_only_tested_is_named(tmp_path):
    path = write_image_files(tmp_path / "i.zip")
    add(path, "test/unknown/a.png", (8, 8))
    with pytest.raises(DataError, match="class 'unknown'"):
        ImageFolder(str(path)).load()


def test_what_is_left_out_is_said(tmp_path):
    path = write_image_files(tmp_path / "i.zip", splits=("train", "val", "test"))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("train/class_0/b.webp", b"")
        archive.writestr("labels.csv", b"")
        archive.writestr("images.zip", b"")
        archive.writestr("train/class_1/more.tar.gz", b"")
    with (
        pytest.warns(
            UserWarning,
            match=r"9 images in val/ .* left out.*data.init_args.evaluation.val_fraction",
        ),
        pytest.warns(UserWarning, match=r"1 images of .* left out.*: train/class_0/b\.webp"),
        pytest.warns(UserWarning, match=r"1 archives in .*: train/class_1/more\.tar\.gz\. Unpack"),
    ):
        arrays = ImageFolder(str(path)).load()
    expected = class_images(3, 3, size=8, seed=2)[0]
    np.testing.assert_array_equal(arrays.test_images.numpy(), expected)
    write_image_files(tmp_path / "v.zip", splits=("train", "val"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ImageFolder(str(tmp_path / "v.zip")).load()


def test_linked_classes_and_splits_are_read(tmp_path):
    plain = write_image_files(tmp_path / "plain")
    linked = tmp_path / "linked"
    (linked / "train").mkdir(parents=True)
    (linked / "test").symlink_to(plain / "test")
    for name in ("class_0", "class_1"):
        shutil.copytree(plain / "train" / name, linked / "train" / name)
    (linked / "train" / "class_2").symlink_to(plain / "train" / "class_2")
    first, second = ImageFolder(str(plain)).load(), ImageFolder(str(linked)).load()
    assert second.class_names == first.class_names
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        assert getattr(first, name).equal(getattr(second, name))
    (linked / "train" / "class_3" / "deep").mkdir(parents=True)
    with pytest.warns(UserWarning, match=r"1 folders of .* hold no .*no classes: train/class_3\."):
        assert ImageFolder(str(linked)).num_classes == 3
    (linked / "train" / "class_0" / "lost.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match=r"lost\.png leads nowhere"):
        ImageFolder(str(linked)).load()


def test_missing_data_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("FULGURITE_DATA", raising=False)
    for source in (ImageFolder("i.zip"), Npz("i.npz"), CifarArchive("i.tar.gz")):
        with pytest.raises(DataError, match="FULGURITE_DATA is not set"):
            source.load()
    with pytest.raises(DataError, match="no data at"):
        ImageFolder(str(tmp_path / "i.zip")).load()


# --- the cache


def test_a_changed_zip_is_decoded_again_and_the_same_content_is_not(tmp_path, cache):
    path = write_image_files(tmp_path / "i.zip")
    first = ImageFolder(str(path)).load()
    assert len(entries(cache)) == 1
    stamp = (cache / entries(cache)[0]).stat().st_mtime_ns
    write_image_files(tmp_path / "copy.zip")
    copy = ImageFolder(str(tmp_path / "copy.zip")).load()
    assert copy.train_images.equal(first.train_images)
    if checksum(path) == checksum(tmp_path / "copy.zip"):  # zips note the second they were made in
        assert (cache / entries(cache)[0]).stat().st_mtime_ns == stamp
    times = path.stat()
    write_image_files(path, seed=1)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # only the content tells
    second = ImageFolder(str(path)).load()
    assert not second.train_images.equal(first.train_images)


def test_a_changed_folder_is_decoded_again(tmp_path):
    path = write_image_files(tmp_path / "i")
    first = ImageFolder(str(path)).load()
    write_image_files(path, seed=1)
    assert not ImageFolder(str(path)).load().train_images.equal(first.train_images)


def test_training_cannot_write_to_the_cache(tmp_path):
    path = str(write_image_files(tmp_path / "i.zip"))
    images = ImageFolder(path).load().train_images
    before = images.clone()
    images.zero_()
    assert ImageFolder(path).load().train_images.equal(before)


@pytest.mark.parametrize("workers", [False, True])
def test_a_kill_in_the_middle_leaves_no_half_cache(tmp_path, cache, workers):
    path = write_image_files(tmp_path / "i.zip")
    program = f"""
        import os, signal
        from torch.utils.data import get_worker_info
        from fulgurite.datamodules.fedsir import ImageFolder, decoding
        decode, calls = decoding.decode_image_bytes, []
        def die_at_the_sixth(content, title, channels):
            calls.append(title)
            if len(calls) == 6:
                in_worker = get_worker_info() is not None
                assert in_worker == {workers}
                os.kill(os.getppid() if in_worker else os.getpid(), signal.SIGKILL)
            return decode(content, title, channels)
        decoding.decode_image_bytes = die_at_the_sixth
        if {workers}:
            decoding.MAX_SERIAL_IMAGES, os.sched_getaffinity = 0, lambda _: {{0, 1}}
            decoding.CHUNK_BYTES = 3 * 3 * 8 * 8  # three images: some jobs for each worker
        ImageFolder({str(path)!r}).load()
    """
    ended = start_script(textwrap.dedent(program), folder=tmp_path).wait()
    assert ended.status == -9, ended.output
    assert [name[0] for name in entries(cache)] == ["."]  # only a temporary name
    arrays = ImageFolder(str(path)).load()
    np.testing.assert_array_equal(arrays.test_images.numpy(), class_images(3, 3, size=8, seed=1)[0])
    assert [name[:7] for name in entries(cache)] == ["images-"]  # and the rest was swept


def test_a_full_disk_is_one_data_error(tmp_path, cache, monkeypatch):
    path = write_image_files(tmp_path / "i.zip")

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(DataError, match=r"cache .* \(No space left on device\)"):
        ImageFolder(str(path)).load()
    assert entries(cache) == []


def test_many_images_are_decoded_in_order_by_workers(tmp_path):
    path = write_image_files(tmp_path / "i.zip", per_class=1100, classes=2, size=4)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    arrays = ImageFolder(str(path)).load()
    assert torch.get_rng_state().equal(state)
    expected = class_images(1100, 2, size=4)[0]
    np.testing.assert_array_equal(arrays.train_images.numpy(), expected)


# --- npz


@pytest.mark.parametrize("channels", [1, 3])
def test_npz(tmp_path, channels):
    path = write_npz(tmp_path / "a.npz", channels=channels)
    source = Npz(str(path))
    assert (source.num_classes, source.in_channels, source.image_size) == (3, channels, (8, 8))
    arrays = source.load()
    expected = class_images(4, 3, size=8, channels=channels)
    np.testing.assert_array_equal(arrays.train_images.numpy(), expected[0])
    np.testing.assert_array_equal(arrays.train_labels.numpy(), expected[1])
    assert arrays.class_names == ("0", "1", "2")


def test_npz_with_channels_first_and_names(tmp_path):
    images, labels = class_images(4, 3, size=8)
    names = np.array(["a", "b", "c", "d"])
    path = write_npz(
        tmp_path / "a.npz",
        train_images=images,
        test_images=images,
        train_labels=labels,
        test_labels=labels,
        class_names=names,
    )
    source = Npz(str(path))
    assert (source.num_classes, source.in_channels) == (4, 3)
    np.testing.assert_array_equal(source.load().train_images.numpy(), images)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"train_labels": np.full(12, 0.5)}, "float64"),
        ({"test_labels": np.full(12, 7)}, "run from 7 to 7"),
        ({"test_images": np.zeros((12, 9, 9), np.uint8)}, "test images are"),
        ({"train_images": np.zeros((12, 8, 8, 5), np.uint8)}, "have the shape"),
        ({"train_images": np.zeros((12, 8, 8))}, "float64"),
        ({"train_labels": np.array([None] * 12)}, "cannot be read"),
        ({"train_labels": np.arange(12) % 3 + 1}, "go up to 3, and no image has 0"),
        ({"train_labels": np.arange(12) % 3 * 2}, "no image has 1, 3. .*class_names"),
    ],
)
def test_bad_npz_is_one_data_error(tmp_path, arrays, message):
    path = write_npz(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message):
        Npz(str(path)).load()


def test_npz_that_is_none(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(DataError, match="cannot be read"):
        Npz(str(tmp_path / "a.npz")).load()
    np.savez(tmp_path / "b.npz", train_images=np.zeros((1, 2, 2), np.uint8))
    with pytest.raises(DataError, match="no array"):
        Npz(str(tmp_path / "b.npz")).load()


# --- the real thing


@pytest.mark.realdata
@pytest.mark.slow
@pytest.mark.skipif("FULGURITE_DATA" not in os.environ, reason="FULGURITE_DATA is not set")
def test_cifar10_as_jpeg():
    source = ImageFolder("cifar10-images.zip")
    assert (source.num_classes, source.in_channels, source.image_size) == (10, 3, (32, 32))
    arrays = source.load()
    assert torch.bincount(arrays.train_labels).tolist() == [5_000] * 10
    assert torch.bincount(arrays.test_labels).tolist() == [1_000] * 10
    assert arrays.class_names[:3] == ("airplane", "automobile", "bird")
    mean = arrays.train_images[::10].float().mean((0, 2, 3)) / 255
    # the published channel means of CIFAR-10
    torch.testing.assert_close(mean, torch.tensor([0.4914, 0.4822, 0.4465]), atol=0.006, rtol=0)
