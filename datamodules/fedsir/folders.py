"""Folders and zips of image files, by class."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Literal, NoReturn

import numpy as np
import torch

from fulgurite.data.exclusions import name_some
from fulgurite.data.listing import FileTree
from fulgurite.datamodules.fedsir.cache import cached_arrays
from fulgurite.datamodules.fedsir.decoding import (
    EncodedImages,
    peek_size,
    split_off_test,
    write_image_files,
)
from fulgurite.datamodules.fedsir.samples import Listing
from fulgurite.datamodules.fedsir.sources import ImageArrays
from fulgurite.errors import DataError
from fulgurite.io import data_path

__all__ = ["ImageFolder"]

_SUFFIXES = (".jpg", ".jpeg", ".png")
# images that are not read; a warning names them
_OTHER_SUFFIXES = (
    *(".avif", ".bmp", ".dcm", ".gif", ".heic", ".jfif", ".jp2", ".jpe", ".npy", ".pgm", ".ppm"),
    *(".tif", ".tiff", ".webp"),
)
_ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".7z", ".rar")
_TEST_SPLITS = ("test", "val", "valid", "validation")


class ImageFolder(EncodedImages):
    """A folder or zip with ``SPLIT/CLASS/*.jpg`` or ``CLASS/*.jpg`` (also ``.jpeg``, ``.png``).

    Splits are ``train`` and ``test``. ``val`` is the test split if there is no ``test``, and is
    left out with a warning otherwise. Without either, a part of the images becomes the test split.
    Links are followed; a folder without images is no class, and a warning names it, as it does
    archives inside. Images are decoded once, in parallel, into the cache (``FULGURITE_CACHE``). Its
    key is the content of a zip, and the names, sizes and times of the files of a folder.

    Images of 16 bits are scaled to 8, so that 65535 becomes 255 (and refused if most training
    images stay below 4096, since 8 bits would keep few values); images are rotated by their EXIF
    orientation; transparency is left out. A colour map is refused for one channel, because its
    grey values may be the indices or the brightness of the colours.

    Args:
        path: The folder or zip, absolute or relative to ``FULGURITE_DATA``.
        image_size: Side to which all images are resized [pixels]; by default they must all have
            one size already.
        channels: Number of channels: 3 for colour or 1 for grey; grey images are repeated, colours
            become their luma.
        test_fraction: Fraction of each class that becomes the test split, if there is none.
        train_limit: Keep at most this many training images, balanced by class.
        test_limit: Keep at most this many test images, balanced by class.
        seed: Seed of the test split and of the images kept under the limits.

    Raises:
        ConfigError: ``image_size``, ``channels``, ``test_fraction`` or a limit is out of range.
    """

    def __init__(
        self,
        path: str,
        image_size: int | None = None,
        channels: Literal[1, 3] = 3,
        test_fraction: float = 0.1,
        *,
        train_limit: int | None = None,
        test_limit: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            image_size, channels, test_fraction, train_limit, test_limit=test_limit, seed=seed
        )
        self.path = path
        self._files: _SplitFiles | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self._list_files().class_names)

    def first_size(self) -> tuple[int, int]:
        """Return the size of the first image: see :meth:`EncodedImages.first_size`."""
        listing = self._list_files()
        return peek_size(listing.tree, listing.train[0], self.channels)

    def _list_files(self) -> _SplitFiles:
        if self._files is None:
            self._files = _SplitFiles(data_path(self.path))
        return self._files

    def read(self) -> ImageArrays:
        """Return all images, memory-mapped."""
        listing = self._list_files()
        split = None if listing.test else (self.test_fraction, self.seed)
        recipe = f"3 {listing.tree.fingerprint(listing.names)} {self.side} {self.channels} {split}"
        key = hashlib.sha256(recipe.encode()).hexdigest()[:32]
        arrays = cached_arrays(f"images-{key}", self.write_arrays)
        train_rows, _ = self._split_rows()
        # the listing keeps the images of the test split: annotation files may name them
        paths = Listing(len(listing.train), tuple(listing.train))
        return replace(
            arrays, listing=paths, train_rows=torch.tensor(train_rows, dtype=torch.int64)
        )

    def _split_rows(self) -> tuple[list[int], list[int]]:
        """Return the indices of the files of ``train`` that train and of those that become test."""
        listing = self._list_files()
        if listing.test:
            return list(range(len(listing.train))), []
        number = {name: c for c, name in enumerate(listing.class_names)}
        labels = torch.tensor([number[_get_class_name(name)] for name in listing.train])
        return split_off_test(labels, self.test_fraction, self.seed)

    def write_arrays(self, target: Path) -> tuple[str, ...]:
        """Decode the images of both splits into a folder and return the class names.

        Raises:
            DataError: An image cannot be decoded.
        """
        listing = self._list_files()
        number = {name: c for c, name in enumerate(listing.class_names)}
        train_rows, test_rows = self._split_rows()
        files = {
            "train": [listing.train[i] for i in train_rows],
            "test": listing.test or [listing.train[i] for i in test_rows],
        }
        for split, names in files.items():
            labels = torch.tensor([number[_get_class_name(name)] for name in names])
            np.save(target / f"{split}_labels.npy", labels.numpy())
            images = target / f"{split}_images.npy"
            write_image_files(listing.tree, names, self, images, title=split, path=self.path)
        return listing.class_names


class _SplitFiles:
    """The image files of a folder or zip by split, and their classes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tree = FileTree(root)
        self.names = [name for name in self.tree.names if name.lower().endswith(_SUFFIXES)]
        others = [name for name in self.tree.names if name.lower().endswith(_OTHER_SUFFIXES)]
        splits = self._find_splits(others)
        self.train = splits.pop("train")
        held_out = [name for name in _TEST_SPLITS if name in splits]
        self.test = splits[held_out[0]] if held_out else []
        self.class_names = tuple(sorted({_get_class_name(name) for name in self.train}))
        if unknown := sorted({_get_class_name(name) for name in self.test} - {*self.class_names}):
            raise DataError(
                f"The test split of {root} has the class {unknown[0]!r}, the train split does not.",
                "Give each test class a folder of training images.",
            )
        if others:
            warnings.warn(
                f"{len(others)} images of {root} are left out, since only JPEG and PNG are read: "
                f"{name_some(others, 3)}.",
                stacklevel=2,
            )
        # one beside the folders is where they came from
        inside = [name for name in self.tree.names if "/" in name]
        if packed := [name for name in inside if name.lower().endswith(_ARCHIVE_SUFFIXES)]:
            warnings.warn(
                f"{len(packed)} archives in {root} are left out, whose images are not read: "
                f"{name_some(packed, 3)}. Unpack them, if their images belong to the data.",
                stacklevel=2,
            )
        if empty := self._find_empty_folders():
            warnings.warn(
                f"{len(empty)} folders of {root} hold no .jpg, .jpeg or .png file, and are no "
                f"classes: {name_some(empty, 3)}.",
                stacklevel=2,
            )
        for name in held_out[1:]:
            warnings.warn(
                f"The {len(splits[name])} images in {name}/ of {root} are left out: "
                f"{held_out[0]}/ is the test split, and validation images are a part of train/ "
                "(`--data.init_args.evaluation.val_fraction`).",
                stacklevel=2,
            )

    def _find_splits(self, others: Sequence[str]) -> dict[str, list[str]]:
        """Return the images of each split; without splits all are of ``train``.

        Raises:
            DataError: The files are not laid out by class.
        """
        if not self.names:
            self._refuse("there is no .jpg, .jpeg or .png file in it", others)
        depths = Counter(name.count("/") for name in self.names)
        depth = max(depths, key=lambda count: (depths[count], count))
        elsewhere = [name for name in self.names if name.count("/") != depth]
        if depth == 0:
            self._refuse("files are in no folder of a class", self.names)
        if elsewhere:
            usual = next(name for name in self.names if name.count("/") == depth)
            self._refuse(f"most files lie as {usual} does, others elsewhere", elsewhere)
        split_names = {"train", *_TEST_SPLITS}
        if depth == 1 and {_get_class_name(name) for name in self.names} <= split_names:
            self._refuse("a split has no folders of classes", self.names)
        if depth == 1:
            return {"train": self.names}
        splits: dict[str, list[str]] = {}
        for name in self.names:
            splits.setdefault(name.split("/")[-3], []).append(name)
        if len(splits) == 1 and not splits.keys() & split_names:
            return {"train": self.names}  # CLASS/*, inside one folder
        if unknown := sorted(splits.keys() - split_names):
            files = [name for split in unknown for name in splits[split]]
            self._refuse(f"{unknown[0]} is neither train nor {' nor '.join(_TEST_SPLITS)}", files)
        if "train" not in splits:
            self._refuse("there is no folder train", self.names)
        folders = sorted({name.rsplit("/", 3)[0] for name in self.names if depth > 2})
        if len(folders) > 1:
            self._refuse(f"train and test are in {len(folders)} folders", folders)
        return splits

    def _find_empty_folders(self) -> list[str]:
        """Return the folders beside those of classes that hold no image; of zips, none."""
        if not self.root.is_dir():
            return []
        classes = {PurePosixPath(folder) for folder in {n.rsplit("/", 1)[0] for n in self.names}}
        beside = {
            parent / path.name
            for parent in {folder.parent for folder in classes}
            for path in (self.root / parent).iterdir()
            if path.is_dir() and not path.name.startswith(".")
        }
        return sorted(map(str, beside.difference(classes, *(folder.parents for folder in classes))))

    def _refuse(self, reason: str, names: Sequence[str]) -> NoReturn:
        slashes = " (they have backslashes: pack the zip again)" if "\\" in "".join(names) else ""
        raise DataError(
            f"The image files of {self.root} are not laid out by class: {reason}"
            + (f": {name_some(names, 3)}{slashes}." if names else "."),
            "Lay them out as train/CLASS/* and test/CLASS/*, or as CLASS/*, in JPEG or PNG.",
        )


def _get_class_name(name: str) -> str:
    return name.split("/")[-2]
