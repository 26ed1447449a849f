"""The original CIFAR-10 and CIFAR-100 archives, read without unpickling.

Shapes: N samples.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import numpy as np

from fulgurite.data.download import fetch
from fulgurite.datamodules.fedsir.cache import cached_arrays
from fulgurite.datamodules.fedsir.cifar_pickle import interpret_pickle
from fulgurite.datamodules.fedsir.sources import ImageArrays, ImageSource
from fulgurite.errors import ConfigError, DataError
from fulgurite.foreign import open_compressed, reading
from fulgurite.io import checksum as file_checksum
from fulgurite.io import data_path, verify_checksum

__all__ = ["VARIANTS", "ArchiveLayout", "CifarArchive", "read_members", "write_arrays"]


class ArchiveLayout(NamedTuple):
    """Layout and checksums of one of the two archives."""

    url: str
    sha256: str  # checksum of the archive
    md5: Mapping[str, str]  # checksums of its files, all of which are required
    folder: str
    train: str  # prefix of the training files
    test: str
    meta: str
    names: bytes
    labels: bytes
    classes: int


VARIANTS = {
    "cifar10": ArchiveLayout(
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        {
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
            "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
        },
        "cifar-10-batches-py",
        "data_batch_",
        "test_batch",
        "batches.meta",
        b"label_names",
        b"labels",
        10,
    ),
    "cifar100": ArchiveLayout(
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
        {
            "train": "16019d7e3df5f24257cddd939b257f8d",
            "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
            "meta": "7973b15100ade9c7d40fb424638fde48",
        },
        "cifar-100-python",
        "train",
        "test",
        "meta",
        b"fine_label_names",
        b"fine_labels",
        100,
    ),
}


class CifarArchive(ImageSource):
    """CIFAR-10 or CIFAR-100 as published: the ``python`` archive, or the folder it unpacks to.

    Decoded once into the cache (``FULGURITE_CACHE``).

    Args:
        path: ``cifar-10-python.tar.gz``, ``cifar-100-python.tar.gz`` or the unpacked folder,
            absolute or relative to ``FULGURITE_DATA``.
        variant: Data set of the archive.
        checksum: ``official`` demands the published archive (SHA-256) or files (MD5); an MD5 or
            SHA-256 demands another archive; ``null`` checks nothing.
        download: Fetch the published archive to ``path`` if it does not exist.
        train_limit: Keep at most this many training images, balanced by class.
        test_limit: Keep at most this many test images, balanced by class.
        seed: Seed of the images kept under the limits.

    Raises:
        ConfigError: ``variant`` is unknown.
    """

    def __init__(
        self,
        path: str,
        variant: Literal["cifar10", "cifar100"] = "cifar10",
        checksum: str | None = "official",
        download: bool = False,
        *,
        train_limit: int | None = None,
        test_limit: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(train_limit, test_limit, seed)
        if variant not in VARIANTS:
            raise ConfigError(
                f"There is no CIFAR variant {variant!r}.",
                "Set `--data.init_args.source.init_args.variant` to cifar10 or cifar100.",
            )
        self.path = path
        self.variant = variant
        # a nested option takes `null` from the command line as text
        self.checksum = None if checksum in ("null", "None", "none") else checksum
        self.download = download

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return VARIANTS[self.variant].classes

    @property
    def in_channels(self) -> int:
        """Number of channels."""
        return 3

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width [pixels]."""
        return 32, 32

    def prepare(self) -> None:
        """Fetch the archive if ``download`` is set, and fill the cache."""
        if self.download:
            layout, target = VARIANTS[self.variant], data_path(self.path, must_exist=False)
            if not target.exists():
                fetch(layout.url, target, layout.sha256)
        self.read()

    def read(self) -> ImageArrays:
        """Return all images, memory-mapped."""
        path, layout = data_path(self.path), VARIANTS[self.variant]
        if path.is_dir():
            folder = path / layout.folder if (path / layout.folder).is_dir() else path
            if self.checksum not in (None, "official"):
                raise ConfigError(
                    f"The checksum {self.checksum!r} is of an archive, and {path} is a folder.",
                    "Set `--data.init_args.source.init_args.checksum` to official or null.",
                )
            files = [folder / name for name in sorted(layout.md5) if (folder / name).is_file()]
            _refuse_missing({file.name for file in files}, layout, str(path))
            for file in files if self.checksum else []:
                verify_checksum(file, layout.md5[file.name])
            digest = "".join(file.name + file_checksum(file) for file in files)
        else:
            if self.checksum:
                official = self.checksum == "official"
                verify_checksum(path, layout.sha256 if official else self.checksum)
            folder, digest = None, file_checksum(path)
        key = hashlib.sha256(f"3 {self.variant} {digest}".encode()).hexdigest()[:32]

        def write(target: Path) -> tuple[str, ...]:
            if folder is not None:
                members = {file.name: file.read_bytes() for file in files}
            else:
                members = read_members(path, layout)
            return write_arrays(members, layout, str(path), target)

        return cached_arrays(f"{self.variant}-{key}", write)


def _refuse_missing(names: Collection[str], layout: ArchiveLayout, path: str) -> None:
    """Refuse an archive or folder without all files of the data set."""
    if missing := sorted(layout.md5.keys() - set(names)):
        raise DataError(
            f"{path} lacks {', '.join(missing)} of {layout.folder}/.",
            "Give the whole original archive, and the `variant` that it is.",
        )


def read_members(path: Path, layout: ArchiveLayout) -> dict[str, bytes]:
    """Read the files of the data set into memory; nothing is unpacked on disk.

    Args:
        path: The archive.
        layout: What it should hold.

    Returns:
        Content of each file by its name, without the folder.

    Raises:
        DataError: The archive is damaged, or holds a file twice.
    """
    contents = {}
    with (
        reading(path, "The archive", "Fetch it again.", fault="is damaged or truncated"),
        open_compressed(path) as stream,
        # as a stream: a member of negative size would otherwise be read for ever
        tarfile.open(fileobj=stream, mode="r|") as archive,
    ):
        for member in archive:
            name = PurePosixPath(member.name)
            if (
                member.isfile()
                and name.parent.name == layout.folder
                and name.name in layout.md5
                and (content := archive.extractfile(member)) is not None
            ):
                if name.name in contents:
                    raise ValueError(f"it holds {name.name} twice")
                contents[name.name] = content.read()
        # empty blocks follow, and the checksum at the end of gzip, which is verified by reading
        while stream.read(1 << 20):
            pass
    return contents


def write_arrays(
    members: Mapping[str, bytes], layout: ArchiveLayout, path: str, target: Path
) -> tuple[str, ...]:
    """Write the arrays of all files into a folder and return the class names.

    Args:
        members: Content of each file by its name, as :func:`read_members` gives it.
        layout: What the archive should hold.
        path: What errors call the archive.
        target: The folder.

    Raises:
        DataError: A file is missing, or holds something else than images and labels.
    """
    _refuse_missing(members, layout, path)
    train = sorted(name for name in layout.md5 if name.startswith(layout.train))
    names = _read_field(members, layout.meta, layout.names, path)
    if (
        not isinstance(names, list)
        or len(names) != layout.classes
        or not all(isinstance(name, bytes) and name.isascii() and len(name) < 256 for name in names)
    ):
        raise DataError(
            f"The file {layout.meta} of {path} does not name {layout.classes} classes.",
            "Give the original archive, and the `variant` that it is.",
        )
    for split, files in (("train", train), ("test", [layout.test])):
        images, labels = [], []
        for name in files:
            pixels = _read_field(members, name, b"data", path)
            if (
                not isinstance(pixels, np.ndarray)
                or pixels.dtype != np.uint8
                or pixels.ndim != 2
                or pixels.shape[1] != 3 * 32 * 32
            ):
                raise DataError(
                    f"The file {name} of {path} has no images of 3 x 32 x 32 bytes.",
                    "Give the original archive.",
                )
            images.append(pixels.reshape(-1, 3, 32, 32))
            labels.append(_read_labels(members, name, layout, path))
        np.save(target / f"{split}_images.npy", np.concatenate(images))
        np.save(target / f"{split}_labels.npy", np.concatenate(labels))
    return tuple(name.decode() for name in names)


def _read_labels(
    members: Mapping[str, bytes], name: str, layout: ArchiveLayout, path: str
) -> np.ndarray[Any, np.dtype[np.int64]]:
    labels = _read_field(members, name, layout.labels, path)
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "iu" and labels.ndim == 1:
        labels = labels.tolist()
    if not isinstance(labels, list) or not all(
        type(label) is int and 0 <= label < layout.classes for label in labels
    ):
        raise DataError(
            f"The labels of {name} of {path} are not integers from 0 to {layout.classes - 1}.",
            "Give the original archive, and the `variant` that it is.",
        )
    return np.array(labels, np.int64)


def _read_field(members: Mapping[str, bytes], name: str, field: bytes, path: str) -> Any:
    hint = "Fetch the original archive again; if it is another format, use its reader."
    with reading(f"{name} of {path}", "The pickle", hint, fault="was refused"):
        table = interpret_pickle(members[name])
    if field not in table:
        raise DataError(
            f"The file {name} of {path} has no field {field.decode()!r}.",
            "Give the original archive, and the `variant` that it is.",
        )
    return table[field]
