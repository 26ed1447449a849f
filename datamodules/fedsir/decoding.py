"""Sources of encoded images, which are decoded once into one array on disk.

Shapes: N samples, C channels, H W image.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from fulgurite.arithmetic import ceil_div
from fulgurite.data.images import decode_picture, reading_image, to_channels, to_uint8
from fulgurite.data.listing import FileTree
from fulgurite.data.pool import run_in_processes
from fulgurite.datamodules.fedsir.selection import choose_per_class, make_generator
from fulgurite.datamodules.fedsir.sources import ImageSource
from fulgurite.errors import ConfigError, DataError
from fulgurite.options import check_arguments

__all__ = [
    "CHUNK_BYTES",
    "MAX_SERIAL_IMAGES",
    "EncodedImages",
    "check_range",
    "decode_image_bytes",
    "fit_image",
    "peek_size",
    "split_off_test",
    "write_image_files",
    "write_images",
]

#: Bytes that a worker sends at once through shared memory, of which containers have little.
CHUNK_BYTES = 1 << 19
#: Images decoded in the time that a worker takes to start.
MAX_SERIAL_IMAGES = 2_000
_MIN_VALUES = 4096  # of 16-bit images: below it, 8 bits would leave at most 16 grey values


class EncodedImages(ImageSource):
    """A source of PNG and JPEG images.

    Args:
        image_size: Side to which all images are resized [pixels]; by default they must all have
            one size already.
        channels: Number of channels: 3 for colour or 1 for grey; images are converted.
        test_fraction: Fraction of each class that becomes the test split, if there is none.
        train_limit: Keep at most this many training images, balanced by class.
        test_limit: Keep at most this many test images, balanced by class.
        seed: Seed of the test split and of the images kept under the limits.

    Raises:
        ConfigError: ``image_size``, ``channels`` or ``test_fraction`` is out of range.
    """

    def __init__(
        self,
        image_size: int | None,
        channels: int,
        test_fraction: float,
        train_limit: int | None,
        *,
        test_limit: int | None,
        seed: int,
    ) -> None:
        super().__init__(train_limit, test_limit, seed)
        check_arguments(EncodedImages.__init__, locals(), "data.init_args.source.init_args")
        if (image_size is not None and image_size < 1) or channels not in (1, 3):
            raise ConfigError(
                f"Images cannot have the size {image_size} and {channels} channels.",
                "Set `--data.init_args.source.init_args.image_size` to 1 or more (or null) and "
                "`channels` to 1 or 3.",
            )
        if not 0 < test_fraction < 1:
            raise ConfigError(
                f"The test fraction is {test_fraction}.",
                "Set `--data.init_args.source.init_args.test_fraction` in (0, 1).",
            )
        self.channels = channels
        self.test_fraction = test_fraction
        self.side = image_size
        self._size: tuple[int, int] | None = None if image_size is None else (image_size,) * 2

    @property
    def in_channels(self) -> int:
        """Number of channels."""
        return self.channels

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width [pixels]: those of the first image, unless images are resized."""
        if self._size is None:
            self._size = self.first_size()
        return self._size

    @abstractmethod
    def first_size(self) -> tuple[int, int]:
        """Return the height and width of the first training image [pixels]."""

    def prepare(self) -> None:
        """Fill the cache."""
        self.read()


def split_off_test(labels: Tensor, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Return the indices of the training images and of those of the test split.

    Shape:
        - labels: (N,) int64.
    """
    counts = (torch.bincount(labels) * fraction).ceil().long()
    test_rows = choose_per_class(labels, counts, make_generator(seed, 2)).tolist()
    in_test = set(test_rows)
    return [i for i in range(len(labels)) if i not in in_test], test_rows


def decode_image_bytes(
    content: bytes, name: str, channels: int, otherwise: str = "Or remove it."
) -> tuple[NDArray[np.uint8], int]:
    """Decode the bytes of a PNG or JPEG.

    Args:
        content: Bytes of the file.
        name: Name of the image in errors.
        channels: Number of channels: 3 for colour, 1 for grey.
        otherwise: Alternative that is added to the hint of errors.

    Returns:
        The image, and its highest value if it has 16 bits, else -1.

    Shape:
        - (C, H, W).

    Raises:
        DataError: The image is damaged, or cannot be read as 8 bits.
    """
    with reading_image(name, otherwise):
        pixels = decode_picture(io.BytesIO(content), is_grey=channels == 1)
        highest = int(pixels.max()) if pixels.dtype == np.uint16 else -1
        return to_channels(to_uint8(pixels), channels), highest


def check_range(peaks: Iterable[int], path: str) -> None:
    """Refuse 16-bit training images most of which 8 bits would reduce to few values.

    Args:
        peaks: Highest value of each image of 16 bits, and -1 for others.
        path: Name of the images in errors.

    Raises:
        DataError: The images are too dark.
    """
    deep = sorted(peak for peak in peaks if peak >= 0)
    highest = deep[len(deep) // 2] if deep else _MIN_VALUES  # one bright image proves nothing
    if highest < _MIN_VALUES:
        which = "The" if deep[-1] < _MIN_VALUES else "Most of the"
        highest = deep[-1] if deep[-1] < _MIN_VALUES else highest
        raise DataError(
            f"{which} 16-bit images of {path} reach {highest:,} of 65,535, so that 8 bits would "
            f"keep {highest // 257 + 1} values.",
            "Stretch them to 65,535 (all by one factor), or save them with 8 bits.",
        )


def fit_image(
    image: NDArray[np.uint8], name: str, side: int | None, size: tuple[int, int]
) -> NDArray[np.uint8]:
    """Resize an image to a square, or check that it has the size of the first one.

    Args:
        image: Image to resize or check.
        name: Name of the image in errors.
        side: Side of the square [pixels]; None leaves the size unchanged.
        size: Height and width of the first image [pixels].

    Shape:
        - image: (C, H, W).

    Raises:
        DataError: ``side`` is None and the image has another size.
    """
    if side is not None:
        return _resize(image, side)
    if image.shape[1:] != size:
        raise DataError(
            f"The image {name} has {image.shape[1]} x {image.shape[2]} pixels, the first one "
            f"{size[0]} x {size[1]}.",
            "Set `--data.init_args.source.init_args.image_size` to resize all.",
        )
    return image


def _resize(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    from PIL import Image

    last = image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))
    small = Image.fromarray(last).resize((side, side), Image.Resampling.BILINEAR)
    return to_channels(np.asarray(small), len(image))


def peek_size(tree: FileTree, name: str, channels: int) -> tuple[int, int]:
    """Return the height and width of an image file [pixels].

    Raises:
        DataError: The image is missing or damaged, or cannot be read as 8 bits.
    """
    image, _ = _FileDecoder(tree, [name], channels, None, size=None, chunk=1)[0]
    return image.shape[-2], image.shape[-1]


def write_image_files(
    tree: FileTree,
    names: Sequence[str],
    source: EncodedImages,
    target: Path,
    *,
    title: str,
    path: str,
) -> None:
    """Decode image files into one array on disk, many of them in several processes.

    Args:
        tree: Folder or zip with the images.
        names: Names of the N images.
        source: Source with the size and channels of the images.
        target: The ``.npy`` file to write, (N, C, H, W).
        title: Split, ``train`` or ``test``.
        path: Name of the images in errors.

    Raises:
        DataError: An image is missing or damaged, cannot be read as 8 bits, has another size than
            the first one, or those of ``train`` have 16 bits and are too dark.
    """
    height, width = size = source.image_size
    chunk = max(1, CHUNK_BYTES // (source.channels * height * width))
    decoder = _FileDecoder(tree, names, source.channels, source.side, size=size, chunk=chunk)
    peaks: list[int] = []

    def blocks() -> Iterator[Tensor]:
        many = len(names) > MAX_SERIAL_IMAGES
        for images, block_peaks in run_in_processes(decoder, len(decoder), many):
            peaks.extend(block_peaks)
            yield images

    write_images(blocks(), (len(names), source.channels, height, width), target, title)
    if title == "train":
        check_range(peaks, path)


class _FileDecoder(Dataset[tuple[Tensor, list[int]]]):
    """Blocks of decoded files: jobs for :func:`run_in_processes`."""

    def __init__(
        self,
        tree: FileTree,
        names: Sequence[str],
        channels: int,
        side: int | None,
        *,
        size: tuple[int, int] | None,
        chunk: int,
    ) -> None:
        self.tree, self.names, self.channels = tree, names, channels
        self.side, self.size, self.chunk = side, size, chunk

    def __len__(self) -> int:
        return ceil_div(len(self.names), self.chunk)

    def __getitem__(self, block: int) -> tuple[Tensor, list[int]]:
        """Return images, and the highest value of each that has 16 bits (-1 for others)."""
        names = self.names[block * self.chunk : (block + 1) * self.chunk]
        images, peaks = zip(*map(self._decode_file, names), strict=True)
        return torch.from_numpy(np.stack(images)), list(peaks)

    def _decode_file(self, name: str) -> tuple[NDArray[np.uint8], int]:
        title = f"{name} of {self.tree.root}"
        with reading_image(title, "Or remove it."):
            content = self.tree.read(name)
        image, highest = decode_image_bytes(content, title, self.channels)
        if self.size is not None:
            image = fit_image(image, title, self.side, self.size)
        return image, highest


def write_images(
    blocks: Iterable[Tensor], shape: tuple[int, int, int, int], target: Path, title: str
) -> None:
    """Write blocks of images into one array on disk, with a bar on a terminal.

    Args:
        blocks: Blocks of images, (., C, H, W) uint8.
        shape: Shape of the array, (N, C, H, W).
        target: The ``.npy`` file to write.
        title: Name of the images in the progress bar.
    """
    from rich.console import Console
    from rich.progress import Progress

    images = np.lib.format.open_memmap(target, mode="w+", dtype=np.uint8, shape=shape)
    _reserve_space(target)
    done = 0
    console = Console(stderr=True)
    with Progress(console=console, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(f"Decoding {title} images", total=shape[0])
        for block in blocks:
            images[done : done + len(block)] = block.numpy()
            done += len(block)
            progress.update(task, completed=done)
    images.flush()


def _reserve_space(path: Path) -> None:
    """Reserve the disk space of a mapped file, which would crash the process on a full disk.

    Raises:
        OSError: The disk is full.
    """
    if not hasattr(os, "posix_fallocate"):  # macOS, Windows
        return
    with open(path, "r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise  # other errors: the file system cannot reserve space
