"""Lists of image files with labels, such as those of Clothing1M.

Shapes: N samples.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fulgurite.data.exclusions import name_some
from fulgurite.data.listing import FileTree
from fulgurite.datamodules.fedsir.annotations import read_lines, read_list
from fulgurite.datamodules.fedsir.cache import cached_arrays
from fulgurite.datamodules.fedsir.decoding import (
    EncodedImages,
    peek_size,
    split_off_test,
    write_image_files,
)
from fulgurite.datamodules.fedsir.label_files import LabelsAre, label_numbers, number_names
from fulgurite.datamodules.fedsir.partition import sort_names
from fulgurite.datamodules.fedsir.samples import Listing
from fulgurite.datamodules.fedsir.sources import ImageArrays
from fulgurite.errors import ConfigError, DataError
from fulgurite.io import data_path
from fulgurite.options import check_options, make_options

__all__ = ["ImageList", "ImageLists"]

_OPTION = "--data.init_args.source.init_args"


@dataclass(frozen=True)
class ImageLists:
    """Files that list images and their labels, absolute or relative to ``FULGURITE_DATA``.

    Args:
        train: List of training images.
        test: List of test images; by default a part of ``train`` becomes the test split.
        root: Folder or zip to which paths of images are relative; by default the folder of the
            list ``train``.
        train_labels: File with labels of training images, if the list has paths only.
        test_labels: File with labels of test images, if the list has paths only.
        class_names: Names of the classes, or a file with one on each line; needed for numbered
            classes if some have no training image.

    Raises:
        ConfigError: ``test_labels`` is set without ``test``.
    """

    train: str
    test: str | None = None
    root: str | None = None
    train_labels: str | None = None
    test_labels: str | None = None
    class_names: list[str] | str | None = None

    def __post_init__(self) -> None:
        check_options(self, f"{_OPTION.removeprefix('--')}.files")
        if self.test is None and self.test_labels is not None:
            raise ConfigError(
                f"There are test_labels={self.test_labels} and no list of test images.",
                f"Set `{_OPTION}.files.test` to it, or `test_labels=null`.",
            )


class ImageList(EncodedImages):
    """Images listed in text files, one path per line, with labels beside it or in other files.

    Lines are ``path label``; or ``path``, and ``train_labels`` and ``test_labels`` are files of
    lines ``path label``, which may label other images too. For example, Clothing1M is ``train:
    noisy_train_key_list.txt``, ``train_labels: noisy_label_kv.txt``, ``test:
    clean_test_key_list.txt``, ``test_labels: clean_label_kv.txt``, ``class_names:
    category_names_eng.txt``. Images are PNG or JPEG, decoded once, in parallel, into the cache
    (``FULGURITE_CACHE``): 150 KB each at 224 x 224 pixels in colour. Its key is the lists, and the
    content of a zip, or the sizes and times of files.

    The order of the source is that of the list ``train``, which also names the images.

    Args:
        files: The lists.
        labels_are: Whether labels are ``names`` or ``numbers`` (from 0) of classes; ``auto`` takes
            what fits all of them.
        image_size: Side to which all images are resized [pixels]; by default they must all have
            one size already.
        channels: Number of channels: 3 for colour or 1 for grey; images are converted.
        test_fraction: Fraction of each class that becomes the test split, if there is none.
        train_limit: Keep at most this many training images, balanced by class.
        test_limit: Keep at most this many test images, balanced by class.
        seed: Seed of the test split and of the images kept under the limits.

    Raises:
        ConfigError: A number is out of range.

    Source: files as in Xiao et al., "Learning from Massive Noisy Labeled Data for Image
    Classification", CVPR 2015 (Clothing1M).
    """

    def __init__(
        self,
        files: ImageLists,
        *,
        labels_are: LabelsAre = "auto",
        image_size: int | None = None,
        channels: Literal[1, 3] = 3,
        test_fraction: float = 0.1,
        train_limit: int | None = None,
        test_limit: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            image_size, channels, test_fraction, train_limit, test_limit=test_limit, seed=seed
        )
        self.files, self.labels_are = make_options(ImageLists, files), labels_are
        self._cached_lists: _SplitLists | None = None
        self._files: FileTree | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self._read_lists().class_names)

    def first_size(self) -> tuple[int, int]:
        """Return the size of the first image: see :meth:`EncodedImages.first_size`."""
        return peek_size(self._open_tree(), self._read_lists().train.names[0], self.channels)

    def _open_tree(self) -> FileTree:
        root = self.files.root
        return FileTree(data_path(self.files.train).parent if root is None else data_path(root))

    def _read_lists(self) -> _SplitLists:
        if self._cached_lists is None:
            files = self.files
            train = _LabelledList.read(files.train, files.train_labels, "train")
            test = None
            if files.test is not None:
                test = _LabelledList.read(files.test, files.test_labels, "test")
                if overlap := sorted(set(train.names) & set(test.names)):
                    raise DataError(
                        f"{len(overlap)} images are both in {train.path} and in {test.path}: "
                        f"{name_some(overlap, 3)}.",
                        "Test on images that are not trained on.",
                    )
            names, labels_are = _choose_class_names(train, files.class_names, self.labels_are)
            self._cached_lists = _SplitLists(
                train,
                train.label_numbers(names, labels_are),
                test,
                None if test is None else test.label_numbers(names, labels_are),
                names,
            )
        return self._cached_lists

    def read(self) -> ImageArrays:
        """Return all images, memory-mapped."""
        lists, tree = self._read_lists(), self._open_tree()
        train, labels = lists.train, lists.train_labels
        all_names = train.names if lists.test is None else train.names + lists.test.names
        _refuse_missing(tree, all_names, lists)
        train_rows = list(range(len(labels)))
        test_rows: list[int] = []
        if lists.test is None or lists.test_labels is None:
            train_rows, test_rows = split_off_test(labels, self.test_fraction, self.seed)
            test_names, test_labels = [train.names[i] for i in test_rows], labels[test_rows]
        else:
            test_names, test_labels = lists.test.names, lists.test_labels
        train_names = [train.names[i] for i in train_rows]
        content = [train_names, labels[train_rows].tolist(), test_names, test_labels.tolist()]
        recipe = json.dumps(
            [tree.fingerprint(all_names), content, lists.class_names, self.side, self.channels]
        )
        key = hashlib.sha256(f"1 {recipe}".encode()).hexdigest()[:32]

        def write(target: Path) -> tuple[str, ...]:
            for split, names, numbers, path in (
                ("train", train_names, labels[train_rows], self.files.train),
                ("test", test_names, test_labels, self.files.test or self.files.train),
            ):
                np.save(target / f"{split}_labels.npy", numbers.numpy())
                write_image_files(
                    tree, names, self, target / f"{split}_images.npy", title=split, path=path
                )
            return lists.class_names

        arrays = cached_arrays(f"list-{key}", write)
        listing = Listing(len(train.names), tuple(train.names))
        return replace(
            arrays, listing=listing, train_rows=torch.tensor(train_rows, dtype=torch.int64)
        )


@dataclass(frozen=True)
class _LabelledList:
    """A list of images.

    Attributes:
        path: File with the list.
        names: Paths of the images.
        labels: Labels of the images as text.
        labels_path: File with the labels.
    """

    path: Path
    names: list[str]
    labels: list[str]
    labels_path: Path

    @classmethod
    def read(cls, path: str, labels: str | None, split: str) -> _LabelledList:
        """Read a list and the labels of its images, which may be in a file of their own."""
        list_path = data_path(path)
        if labels is None:
            hint = (
                f"Write lines of a path and a label, or set `{_OPTION}.files.{split}_labels` to "
                "the file with the labels."
            )
            columns = read_list(list_path, "label", hint)
            names, texts, from_file = columns["path"], columns["label"], list_path
        else:
            names, texts, from_file = read_lines(list_path), [], data_path(labels)
        names = [_normalise_path(name, list_path) for name in names]
        if not names:
            raise DataError(
                f"There are no images in the list {list_path}.", f"Set `{_OPTION}.files.{split}`."
            )
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise DataError(
                f"The list {list_path} names {len(twice)} images more than once: "
                f"{name_some(twice, 3)}.",
                "Give one line for each image.",
            )
        if labels is not None:
            texts = _look_up_labels(names, from_file, list_path, f"{_OPTION}.files.{split}_labels")
        return cls(list_path, names, texts, from_file)

    def label_numbers(self, class_names: Sequence[str], labels_are: LabelsAre) -> Tensor:
        """Return labels as class numbers. Shape: (N,)."""
        number = label_numbers(
            self.labels, class_names, labels_are, self.labels_path, option=_OPTION
        )
        return torch.tensor([number[text] for text in self.labels], dtype=torch.int64)


@dataclass(frozen=True)
class _SplitLists:
    """The lists of both splits, and the labels as numbers of classes."""

    train: _LabelledList
    train_labels: Tensor
    test: _LabelledList | None
    test_labels: Tensor | None
    class_names: tuple[str, ...]


def _normalise_path(name: str, list_path: Path) -> str:
    """Normalise a path: remove redundant parts such as ``./``."""
    normal = posixpath.normpath(name)
    if normal.startswith("/") or normal.split("/")[0] == "..":
        raise DataError(
            f"The path {name!r} in {list_path} does not begin in the folder of images.",
            f"Write paths relative to one folder or zip, and set `{_OPTION}.files.root` to it.",
        )
    return normal


def _look_up_labels(names: Sequence[str], path: Path, list_path: Path, option: str) -> list[str]:
    """Return the labels of images from a file that may label other images too."""
    columns = read_list(path, "label")
    labels: dict[str, str] = {}
    for name, label in zip(columns["path"], columns["label"], strict=True):
        name = _normalise_path(name, path)
        if labels.setdefault(name, label) != label:
            raise DataError(
                f"The file {path} gives {name!r} the labels {labels[name]} and {label}.",
                "Give each image one label.",
            )
    if missing := [name for name in names if name not in labels]:
        raise DataError(
            f"The file {path} has no label for {len(missing)} of {len(names)} images of "
            f"{list_path}: {name_some(missing, 3)}.",
            f"Give each image one, remove these from the list, or set `{option}` to the file that "
            "has them (null if the list itself has).",
        )
    return [labels[name] for name in names]


def _choose_class_names(
    train: _LabelledList, class_names: list[str] | str | None, labels_are: LabelsAre
) -> tuple[tuple[str, ...], LabelsAre]:
    """Return the names of the classes, and whether labels are names or numbers."""
    if class_names is not None:
        names = read_lines(data_path(class_names)) if isinstance(class_names, str) else class_names
        if not names or len(set(names)) < len(names):
            raise DataError(
                f"The class names {class_names} are {len(names)}, of which {len(set(names))} "
                "differ.",
                f"Set `{_OPTION}.files.class_names` to one name for each class.",
            )
        return tuple(names), labels_are
    different = set(train.labels)
    if labels_are == "numbers" or (labels_are == "auto" and all(map(_is_number, different))):
        hint = (
            f"Set `{_OPTION}.files.class_names`, one for each number from 0, or "
            "`labels_are=names` if these are names."
        )
        return number_names(different, str(train.labels_path), hint), "numbers"
    return tuple(sort_names(different)), "names"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text.lower().lstrip("+-") not in ("nan", "inf", "infinity")


def _refuse_missing(tree: FileTree, names: Sequence[str], lists: _SplitLists) -> None:
    """Refuse lists with missing images before any image is decoded."""
    if tree.root.is_dir():
        missing = [name for name in names if not (tree.root / name).is_file()]
    else:
        present = set(tree.names)
        missing = [name for name in names if name not in present]
    if missing:
        paths = (
            lists.train.path if lists.test is None else f"{lists.train.path} and {lists.test.path}"
        )
        raise DataError(
            f"Images that are listed in {paths} are not in {tree.root}: {name_some(missing, 3)}.",
            f"Set `{_OPTION}.files.root` to the folder or zip that their paths begin in, fetch "
            "them, or remove their lines.",
        )
