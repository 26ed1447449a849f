"""Interface of image sources.

Shapes: N samples, C channels, H W image.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fulgurite.data.exclusions import name_some
from fulgurite.data.names import find_alike, find_repeated, quote_names
from fulgurite.datamodules.fedsir.samples import Listing, Samples
from fulgurite.datamodules.fedsir.selection import (
    check_labels,
    choose_per_class,
    class_quota,
    make_generator,
)
from fulgurite.errors import ConfigError, DataError
from fulgurite.options import check_arguments

__all__ = ["ImageArrays", "ImageSource"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageArrays:
    """A whole data set in memory, or memory-mapped.

    Attributes:
        listing: All training images of the source in its order, of which ``train_images`` may be a
            part; by default the listing of ``train_images``, without names.
        train_rows: Row of each training image in ``listing``; by default consecutive rows.

    Shape:
        - train_images, test_images: (N, C, H, W) uint8; train_labels, test_labels: (N,) int64.
        - train_rows: (N,) int64.

    Raises:
        DataError: Shapes, types or labels do not fit together, or two classes have one name.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]
    listing: Listing | None = None
    train_rows: Tensor | None = None

    def __post_init__(self) -> None:
        if (twice := find_repeated(self.class_names)) is not None:
            raise DataError(f"Two classes are called {twice!r}.", "Give each class its own name.")
        self._check_images()
        samples = self.samples()
        check_labels(samples.rows, max(1, samples.listing.total), "row")
        if len(samples.rows) != len(samples.labels):
            raise DataError(
                f"There are {len(samples.rows)} rows of {len(samples.labels)} train images.",
                "Give the row of each image in the listing.",
            )

    def samples(self) -> Samples:
        """Return the training images as samples whose labels are true."""
        listing = Listing(len(self.train_labels)) if self.listing is None else self.listing
        rows = torch.arange(listing.total) if self.train_rows is None else self.train_rows
        return Samples(self.train_labels, self.train_labels, rows, listing, self.class_names)

    def _check_images(self) -> None:
        for name in ("train", "test"):
            images, labels = getattr(self, f"{name}_images"), getattr(self, f"{name}_labels")
            if images.dtype != torch.uint8 or images.ndim != 4:
                raise DataError(
                    f"The {name} images are {images.dtype} of shape {tuple(images.shape)}.",
                    "Images are 8-bit and of one size, (N, channels, height, width).",
                )
            if images.shape[1:] != self.train_images.shape[1:]:
                raise DataError(
                    f"The {name} images are {tuple(images.shape[1:])}, the train images "
                    f"{tuple(self.train_images.shape[1:])}.",
                    "Give both splits one number of channels and one size.",
                )
            if len(images) != len(labels):
                raise DataError(
                    f"There are {len(images)} {name} images and {len(labels)} labels.",
                    "Give one label for each image.",
                )
            checked = check_labels(labels, len(self.class_names), name)
            object.__setattr__(self, f"{name}_labels", checked)


class ImageSource(ABC):
    """A data set of labelled images of one size, with a training and a test split.

    A subclass defines the three sizes, which must be cheap, and :meth:`read`.

    Args:
        train_limit: Keep at most this many training images, as many of each class as possible.
        test_limit: Keep at most this many test images, as many of each class as possible.
        seed: Seed of the images kept under the limits.

    Raises:
        ConfigError: A limit is not positive.
    """

    #: Number of augmented copies of each training image, made by :meth:`copy_images` after the data
    #: module has split off validation images.
    copies: int = 1

    def __init__(
        self, train_limit: int | None = None, test_limit: int | None = None, seed: int = 0
    ) -> None:
        check_arguments(ImageSource.__init__, locals(), "data.init_args.source.init_args")
        for name, limit in (("train_limit", train_limit), ("test_limit", test_limit)):
            if limit is not None and limit < 1:
                raise ConfigError(
                    f"The {name} is {limit}.",
                    f"Set `--data.init_args.source.init_args.{name}` to a positive number or null.",
                )
        self.train_limit = train_limit
        self.test_limit = test_limit
        self.seed = seed

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Number of classes."""

    @property
    @abstractmethod
    def in_channels(self) -> int:
        """Number of channels."""

    @property
    @abstractmethod
    def image_size(self) -> tuple[int, int]:
        """Height and width [pixels]."""

    @abstractmethod
    def read(self) -> ImageArrays:
        """Return all images."""

    def prepare(self) -> None:
        """Prepare data once per machine for all processes, such as by decoding to a cache."""
        return  # most sources have nothing to prepare

    def load(self) -> ImageArrays:
        """Return the images, within the limits.

        Raises:
            DataError: The data are missing, damaged or inconsistent.
        """
        arrays = self.read()
        _refuse_blank(arrays.train_images)
        _warn_of_classes(arrays)
        for stream, (name, limit) in enumerate(
            (("train", self.train_limit), ("test", self.test_limit))
        ):
            labels = getattr(arrays, f"{name}_labels")
            if limit is not None and limit < len(labels):
                quota = class_quota(labels, len(arrays.class_names), limit)
                rows = choose_per_class(labels, quota, make_generator(self.seed, stream))
                changes: dict[str, Any] = {
                    f"{name}_images": getattr(arrays, f"{name}_images")[rows],
                    f"{name}_labels": labels[rows],
                }
                if name == "train":
                    samples = arrays.samples()
                    changes |= {"listing": samples.listing, "train_rows": samples.rows[rows]}
                arrays = replace(arrays, **changes)
        return arrays

    def copy_images(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``copies`` augmented copies of each image with their labels.

        Copy k of image n is at k · N + n, so that copies can be matched to images.

        Shape:
            - images: (N, C, H, W) uint8; labels: (N,) -> the same with copies · N for N.
        """
        return images.repeat(self.copies, 1, 1, 1), labels.repeat(self.copies)


def _warn_of_classes(arrays: ImageArrays) -> None:
    """Warn of classes without a training image, and of those whose names are alike."""
    counts = torch.bincount(arrays.train_labels, minlength=len(arrays.class_names))
    absent = [arrays.class_names[c] for c in (counts == 0).nonzero()[:, 0].tolist()]
    if absent and len(arrays.train_labels):
        log.warning(
            "No training image is of the class %s: are the classes numbered from 0?",
            name_some([repr(name) for name in absent]),
        )
    for names in find_alike(arrays.class_names):
        log.warning(
            "The classes %s are different ones, and their names are alike: is it one?",
            quote_names(names),
        )


def _refuse_blank(images: Tensor) -> None:
    """Refuse images that have one value everywhere, such as clipped ones.

    Shape:
        - images: (N, C, H, W) uint8.
    """
    if not images.numel():
        return
    value = images.flatten()[0]
    if all(
        bool((image == value).all()) for image in images
    ):  # stops at the first image that differs
        raise DataError(
            f"All {len(images)} training images have the value {int(value)} everywhere.",
            "Look at the files: nothing can be learned from them.",
        )
