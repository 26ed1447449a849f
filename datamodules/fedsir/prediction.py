"""Images of a user, which are in no split: a folder, a zip, or one file.

Axes: N images, C channels, H, W image.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from fulgurite.arithmetic import ceil_div
from fulgurite.data.exclusions import name_some
from fulgurite.data.images import decode_image, reading_image, to_channels, to_uint8
from fulgurite.data.listing import FileTree
from fulgurite.data.pool import run_in_processes
from fulgurite.data.store import cached_store
from fulgurite.datamodules.fedsir.decoding import (
    CHUNK_BYTES,
    MAX_SERIAL_IMAGES,
    EncodedImages,
    check_range,
    fit_image,
    write_images,
)
from fulgurite.datamodules.fedsir.inputs import TrainedInputs
from fulgurite.datamodules.fedsir.sources import ImageSource
from fulgurite.errors import DataError

__all__ = ["InputImages"]

_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".npy")
_TIFF = (".tif", ".tiff")
_KINDS = "a folder or zip of PNG, JPEG, TIFF or .npy images, or one of these"


class InputImages:
    """Images of files, with the channels and the size of the training images.

    Other images are refused by name, unless the training source converts (``ImageFolder`` and its
    like): then these are converted in the same way. All are decoded into the cache before the
    first one is predicted. Images of 16 bits are scaled to 8.

    Args:
        path: A folder or zip of PNG, JPEG, TIFF and ``.npy`` images in any depth, or one image.
        source: The training source, which says whether images are resized and converted.
        inputs: What the network was trained on; where it does not say the size of images, the
            source does.

    Raises:
        DataError: There is no image at the path.
    """

    def __init__(self, path: Path, source: ImageSource, inputs: TrainedInputs) -> None:
        self.path, self.channels = path, len(inputs.scale)
        self.size = inputs.image_size or source.image_size
        self.converts = isinstance(source, EncodedImages)
        self.side = source.side if isinstance(source, EncodedImages) else None
        is_tree = path.is_dir() or path.suffix.lower() == ".zip"
        if not is_tree and path.suffix.lower() not in _SUFFIXES:
            raise DataError(f"--input={path} is no image that is read.", f"Give {_KINDS}.")
        self.tree = FileTree(path if is_tree else path.parent)
        every = self.tree.names if is_tree else [path.name]
        #: Names of the images, relative to the folder or zip. Length: N.
        self.names = [name for name in every if name.lower().endswith(_SUFFIXES)]
        if not self.names:
            raise DataError(
                f"There is no PNG, JPEG, TIFF or .npy image in --input={path}.", f"Give {_KINDS}."
            )
        if others := sorted(set(every) - set(self.names)):
            warnings.warn(
                f"{len(others)} files of {path} are not predicted, since only PNG, JPEG, TIFF and "
                f".npy are read: {name_some(others, 3)}.",
                stacklevel=2,
            )

    @cached_property
    def images(self) -> Tensor:
        """The images, memory-mapped. Shape: (N, C, H, W) uint8.

        Raises:
            DataError: An image is damaged, or has other channels or another size than the training.
        """
        recipe = (
            f"1 {self.tree.fingerprint(self.names)} {self.names} {self.channels} {self.size} "
            f"{self.side} {self.converts}"
        )
        key = hashlib.sha256(recipe.encode()).hexdigest()[:32]
        return torch.from_numpy(cached_store(f"input-images-{key}", self._write).copy("images"))

    def _write(self, folder: Path) -> Mapping[str, Any]:
        decoder = _Decoder(self)
        shape = (len(self.names), self.channels, *self.size)
        peaks: list[int] = []

        def blocks() -> Iterator[Tensor]:
            many = len(self.names) > MAX_SERIAL_IMAGES
            for images, block_peaks in run_in_processes(decoder, len(decoder), many):
                peaks.extend(block_peaks)
                yield images

        write_images(blocks(), shape, folder / "images.npy", "input")
        check_range(peaks, str(self.path))
        return {}

    def decode(self, name: str) -> tuple[NDArray[np.uint8], int]:
        """Decode an image; returns its highest value too if it has 16 bits, else -1.

        Shape:
            - (C, H, W).

        Raises:
            DataError: It is damaged, or has other channels or another size than the training.
        """
        title, channels = f"{name} of {self.tree.root}", self.channels
        suffix = Path(name).suffix.lower()
        with reading_image(title, "Or remove it."):
            content = self.tree.read(name)
            pixels = decode_image(
                io.BytesIO(content), len(content), suffix,
                is_channel=channels == 1, any_depth=suffix in _TIFF, is_picture=True,
            )  # fmt: skip
            highest = int(pixels.max(initial=0)) if pixels.dtype == np.uint16 else -1
            image = to_uint8(_put_channels_last(pixels, channels))
        image_channels = 1 if image.ndim == 2 else image.shape[-1]
        converts = self.converts and {image_channels, channels} <= {1, 3}
        if image.ndim > 3 or (image_channels != channels and not converts):
            raise DataError(
                f"The image {title} has the shape {pixels.shape} and {image_channels} channels, "
                f"and the network was trained on {channels}.",
                f"Give images of {channels} channels.",
            )
        if converts or image.ndim == 2:
            image = to_channels(image, channels)
        else:
            image = np.ascontiguousarray(image.transpose(2, 0, 1))
        if self.side is None and image.shape[1:] != self.size:
            height, width = self.size
            raise DataError(
                f"The image {title} has {image.shape[1]} x {image.shape[2]} pixels, and the "
                f"network was trained on {height} x {width}.",
                f"Resize it to {height} x {width}.",
            )
        return fit_image(image, title, self.side, self.size), highest


def _put_channels_last(pixels: NDArray[Any], channels: int) -> NDArray[Any]:
    """Return (H, W) or (H, W, C): a ``.npy`` or TIFF may have its channels first."""
    if pixels.ndim == 3 and pixels.shape[-1] != channels == pixels.shape[0]:
        pixels = np.moveaxis(pixels, 0, -1)
    return pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels


class _Decoder(Dataset[tuple[Tensor, list[int]]]):
    """Blocks of decoded files: jobs for :func:`run_in_processes`."""

    def __init__(self, files: InputImages) -> None:
        self.files = files
        height, width = files.size
        self.chunk = max(1, CHUNK_BYTES // (files.channels * height * width))

    def __len__(self) -> int:
        return ceil_div(len(self.files.names), self.chunk)

    def __getitem__(self, block: int) -> tuple[Tensor, list[int]]:
        """Return images, and the highest value of each that has 16 bits (-1 for others)."""
        names = self.files.names[block * self.chunk : (block + 1) * self.chunk]
        images, peaks = zip(*map(self.files.decode, names), strict=True)
        return torch.from_numpy(np.stack(images)), list(peaks)
