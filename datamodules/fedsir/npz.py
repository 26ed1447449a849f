"""A data set in one ``.npz`` file.

Shapes: N samples, C channels, H W image.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fulgurite.data.exclusions import name_some
from fulgurite.datamodules.fedsir.sources import ImageArrays, ImageSource
from fulgurite.errors import DataError
from fulgurite.foreign import read_array_shape, read_arrays, reading
from fulgurite.io import data_path

__all__ = ["Npz"]

_MAX_CLASSES = 1000  # largest number of classes in a file with fewer images
_REWRITE_HINT = "Write the file again with `numpy.savez` (no object arrays)."


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
