"""Interface of image sources, and the sources without files or with one ``.npz``.

Shapes: N samples, C channels, H W image.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fulgurite.data.exclusions import name_some
from fulgurite.datamodules.fedsir.samples import Listing, Samples
from fulgurite.datamodules.fedsir.selection import (
    check_labels,
    choose_per_class,
    class_quota,
    make_generator,
)
from fulgurite.errors import ConfigError, DataError
from fulgurite.foreign import read_array_shape, read_arrays, reading
from fulgurite.io import data_path

__all__ = ["Digits", "ImageArrays", "ImageSource", "Npz"]

_MAX_CLASSES = 1000  # largest number of classes in a file with fewer images
_REWRITE_HINT = "Write the file again with `numpy.savez` (no object arrays)."


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
        DataError: Shapes, types or labels do not fit together.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]
    listing: Listing | None = None
    train_rows: Tensor | None = None

    def __post_init__(self) -> None:
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


class Digits(ImageSource):
    """Scikit-learn's 1,797 real 8×8 images of handwritten digits.

    360 unchanged images are the test split. Each training image becomes ``copies`` copies, each
    with a random shift, rotation and pixel noise.

    Args:
        copies: Number of augmented copies of each training image; 1 keeps the originals unchanged.
        seed: Seed of the test split and of the copies.
        max_shift: Largest shift of a copy along each axis [pixels].
        max_rotation: Largest rotation of a copy [degrees].
        pixel_noise: Standard deviation of the noise [fraction of full scale].
        train_limit: Keep at most this many originals, balanced by class.
        test_limit: Keep at most this many test images, balanced by class.

    Raises:
        ConfigError: ``copies`` is below 1, or a limit is not positive.

    Source: FedSIR, arXiv 2604.20825, card section 3d (toy: digits with 10 augmented copies); the
    kind and size of the augmentation are inferred.

    Example:
        >>> arrays = Digits().load()
        >>> tuple(arrays.train_images.shape), len(arrays.test_labels)
        ((1437, 1, 8, 8), 360)
    """

    def __init__(
        self,
        copies: int = 10,
        seed: int = 0,
        max_shift: float = 1.0,
        max_rotation: float = 10.0,
        pixel_noise: float = 0.05,
        train_limit: int | None = None,
        test_limit: int | None = None,
    ) -> None:
        super().__init__(train_limit, test_limit, seed)
        if copies < 1:
            raise ConfigError(
                f"There cannot be {copies} copies of each digit.",
                "Set `--data.init_args.source.init_args.copies` to 1 or more.",
            )
        self.copies = copies
        self.max_shift = max_shift
        self.max_rotation = max_rotation
        self.pixel_noise = pixel_noise

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return 10

    @property
    def in_channels(self) -> int:
        """Number of channels."""
        return 1

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width [pixels]."""
        return 8, 8

    def read(self) -> ImageArrays:
        """Return the originals; :meth:`copy_images` makes the copies."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))[:, None]
        labels = torch.from_numpy(digits.target.astype(np.int64))
        in_test = torch.zeros(len(labels), dtype=torch.bool)
        quota = class_quota(labels, 10, 360)
        in_test[choose_per_class(labels, quota, make_generator(self.seed, 2))] = True
        return ImageArrays(
            images[~in_test],
            labels[~in_test],
            images[in_test],
            labels[in_test],
            tuple(str(digit) for digit in range(10)),
        )

    def copy_images(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return shifted, rotated and noisy copies: see :meth:`ImageSource.copy_images`."""
        generator = make_generator(self.seed, 3)
        images, labels = super().copy_images(images, labels)
        angle, down, right = torch.rand(3, len(images), generator=generator) * 2 - 1
        angle = angle * math.radians(self.max_rotation)
        height, width = images.shape[-2:]
        affine = torch.stack(
            [
                torch.stack([angle.cos(), -angle.sin(), right * (2 * self.max_shift / width)], -1),
                torch.stack([angle.sin(), angle.cos(), down * (2 * self.max_shift / height)], -1),
            ],
            1,
        )
        grid = F.affine_grid(affine, list(images.shape), align_corners=False)
        moved = F.grid_sample(images.float(), grid, mode="bilinear", align_corners=False)
        moved += torch.randn(moved.shape, generator=generator) * (255 * self.pixel_noise)
        return moved.round_().clamp_(0, 255).byte(), labels


class Npz(ImageSource):
    """A ``.npz`` file with ``train_images``, ``train_labels``, ``test_images``, ``test_labels``.

    Images are (N, H, W), (N, H, W, C) or (N, C, H, W) uint8 with one or three channels; labels are
    integers (N,) or (N, 1). An optional ``class_names`` holds strings. MedMNIST's files can be
    read directly (their validation split is left out).

    Args:
        path: The file, absolute or relative to ``FULGURITE_DATA``.
        train_limit: Keep at most this many training images, balanced by class.
        test_limit: Keep at most this many test images, balanced by class.
        seed: Seed of the images kept under the limits.
    """

    _NAMES = ("train_images", "train_labels", "test_images", "test_labels")

    def __init__(
        self,
        path: str,
        train_limit: int | None = None,
        test_limit: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(train_limit, test_limit, seed)
        self.path = path
        self._sizes: tuple[int, int, tuple[int, int]] | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self._peek_sizes()[0]

    @property
    def in_channels(self) -> int:
        """Number of channels."""
        return self._peek_sizes()[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width [pixels]."""
        return self._peek_sizes()[2]

    def _read_array(self, name: str) -> Any:
        path = data_path(self.path)
        with reading(path, f"The array {name} of", _REWRITE_HINT):
            return read_arrays(path, [name]).get(name)

    def _require_array(self, name: str) -> Any:
        array = self._read_array(name)
        if array is None:
            raise DataError(
                f"There is no array {name} in {self.path}.",
                f"Save the arrays {', '.join(self._NAMES)}.",
            )
        return array

    def _read_class_names(self) -> tuple[str, ...]:
        names = self._read_array("class_names")
        if names is not None:
            if names.ndim != 1 or names.dtype.kind != "U":
                raise DataError(
                    f"The class names of {self.path} are {names.dtype} of shape {names.shape}.",
                    "Save them as one array of text.",
                )
            return tuple(str(name) for name in names)
        labels = self._require_array("train_labels")
        if labels.dtype.kind not in "iu" or not labels.size:
            raise DataError(
                f"The train labels of {self.path} are {labels.size} values of type {labels.dtype}.",
                "Save one integer class number per image.",
            )
        if labels.min() < 0:
            raise DataError(
                f"The train labels of {self.path} go down to {labels.min()}.",
                "Number the classes from 0.",
            )
        if (max_label := int(labels.max())) >= max(_MAX_CLASSES, labels.size):
            raise DataError(
                f"The train labels of {self.path} go up to {max_label} for {labels.size} images.",
                "Number the classes from 0.",
            )
        if absent := np.setdiff1d(np.arange(max_label + 1), labels).tolist():
            raise DataError(
                f"The train labels of {self.path} go up to {max_label}, and no image has "
                f"{name_some(absent)}.",
                "Number the classes from 0 without gaps, or save `class_names`, one for each.",
            )
        return tuple(str(c) for c in range(max_label + 1))

    def _peek_sizes(self) -> tuple[int, int, tuple[int, int]]:
        if self._sizes is None:
            shape = _to_channels_first(self._peek_shape("test_images"), self.path)
            self._sizes = len(self._read_class_names()), shape[1], (shape[2], shape[3])
        return self._sizes

    def _peek_shape(self, name: str) -> tuple[int, ...]:
        """Read only the header of an array."""
        path = data_path(self.path)
        with reading(path, f"The array {name} of", _REWRITE_HINT):
            shape = read_array_shape(path, name)
        return tuple(self._require_array(name).shape) if shape is None else shape

    def read(self) -> ImageArrays:
        """Return all images."""
        arrays = {}
        for name in self._NAMES:
            array = self._require_array(name)
            if name.endswith("images"):
                order = _to_channels_first(array.shape, self.path, axes=True)
                array = array[:, None] if array.ndim == 3 else array.transpose(order)
            elif array.ndim == 2 and array.shape[1] == 1:
                array = array[:, 0]  # MedMNIST
            if array.dtype.kind not in "iuf" or array.dtype == np.uint64:
                raise DataError(
                    f"The array {name} of {self.path} holds {array.dtype}.",
                    "Save images as uint8 and labels as integers.",
                )
            arrays[name] = torch.from_numpy(np.ascontiguousarray(array))
        names = self._read_class_names()
        try:
            return ImageArrays(
                arrays["train_images"],
                arrays["train_labels"],
                arrays["test_images"],
                arrays["test_labels"],
                names,
            )
        except DataError as error:
            raise DataError(
                f"The arrays of {self.path} are unusable: {error.problem}", error.hint
            ) from error


def _to_channels_first(shape: tuple[int, ...], path: str, axes: bool = False) -> tuple[int, ...]:
    """Return a shape as (N, C, H, W), or the axes that transpose an array to it."""
    if len(shape) == 3:
        return (shape[0], 1, shape[1], shape[2])
    if len(shape) == 4 and shape[3] in (1, 3):
        return (0, 3, 1, 2) if axes else (shape[0], shape[3], shape[1], shape[2])
    if len(shape) == 4 and shape[1] in (1, 3):
        return (0, 1, 2, 3) if axes else shape
    raise DataError(
        f"The images of {path} have the shape {shape}.",
        "Save images as (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3 channels.",
    )
