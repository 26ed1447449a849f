"""Encoded images decoded into one array on disk.

Shapes: N samples, C channels, H W image.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fulgurite.data.images import decode_picture, reading_image, to_channels, to_uint8
from fulgurite.datamodules.fedsir.selection import choose_per_class, make_generator
from fulgurite.errors import ConfigError, DataError

__all__ = [
    "check_image_arguments",
    "check_range",
    "decode_image_bytes",
    "fit_image",
    "split_off_test",
    "write_images",
]

_FEWEST_VALUES = 4096  # of 16-bit images: with fewer, 8 bits would leave 16 grey values at most


def check_image_arguments(image_size: int | None, channels: int, test_fraction: float) -> None:
    """Check what readers of image files are asked for.

    Raises:
        ConfigError: An argument is out of range.
    """
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


def split_off_test(labels: Tensor, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Return the numbers of images that train and of those that become the test split.

    Shape:
        - labels: (N,) int64.
    """
    counts = (torch.bincount(labels) * fraction).ceil().long()
    chosen = choose_per_class(labels, counts, make_generator(seed, 2)).tolist()
    tested = set(chosen)
    return [i for i in range(len(labels)) if i not in tested], chosen


def decode_image_bytes(
    content: bytes, name: str, channels: int, otherwise: str = "Or remove it."
) -> tuple[NDArray[np.uint8], int]:
    """Decode the bytes of a PNG or JPEG.

    Args:
        content: The bytes.
        name: What errors call the image.
        channels: 3 for colour, 1 for grey.
        otherwise: What else can be done than what the error says.

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


def check_range(highest: int, path: str) -> None:
    """Refuse 16-bit training images of which 8 bits would keep few values.

    Args:
        highest: The highest value of all 16-bit images, -1 if there are none.
        path: What errors call the images.

    Raises:
        DataError: They are too dark.
    """
    if 0 <= highest < _FEWEST_VALUES:
        raise DataError(
            f"The 16-bit images of {path} reach {highest:,} of 65,535, so that 8 bits would keep "
            f"{highest // 257 + 1} values.",
            "Stretch them to 65,535 (all by one factor), or save them with 8 bits.",
        )


def fit_image(
    image: NDArray[np.uint8], name: str, side: int | None, size: tuple[int, int]
) -> NDArray[np.uint8]:
    """Resize an image to a square, or check that it has the size of the first one.

    Args:
        image: The image.
        name: What errors call it.
        side: Side of the square [pixels]; None leaves the size.
        size: Height and width of the first image [pixels].

    Shape:
        - image: (C, H, W).

    Raises:
        DataError: It has another size.
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


def write_images(
    blocks: Iterable[Tensor], shape: tuple[int, int, int, int], target: Path, title: str
) -> None:
    """Write blocks of images into one array on disk, with a bar on a terminal.

    Args:
        blocks: Images, (., C, H, W) uint8.
        shape: (N, C, H, W).
        target: The ``.npy`` file.
        title: What the bar calls the images.
    """
    from rich.console import Console
    from rich.progress import Progress

    images = np.lib.format.open_memmap(target, mode="w+", dtype=np.uint8, shape=shape)
    done = 0
    console = Console(stderr=True)
    with Progress(console=console, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(f"Decoding {title} images", total=shape[0])
        for block in blocks:
            images[done : done + len(block)] = block
            done += len(block)
            progress.update(task, completed=done)
    images.flush()
