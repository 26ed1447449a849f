"""Folders and zips of image files, decoded once.

Shapes: N samples, C channels, H W image.
"""

from __future__ import annotations

import hashlib
import io
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from fulgurite.data.exclusions import name_some
from fulgurite.data.images import decode_picture, reading_image, to_channels, to_uint8
from fulgurite.data.listing import FileTree
from fulgurite.data.pool import run_in_processes
from fulgurite.datamodules.fedsir.cache import cached_arrays
from fulgurite.datamodules.fedsir.samples import Listing
from fulgurite.datamodules.fedsir.selection import choose_per_class, make_generator
from fulgurite.datamodules.fedsir.sources import ImageArrays, ImageSource
from fulgurite.errors import ConfigError, DataError
from fulgurite.io import data_path

__all__ = ["ImageFolder"]

_SUFFIXES = (".jpg", ".jpeg", ".png")
# images that are not read, which is said
_OTHER_SUFFIXES = (
    *(".avif", ".bmp", ".dcm", ".gif", ".heic", ".jfif", ".jp2", ".jpe", ".npy", ".pgm", ".ppm"),
    *(".tif", ".tiff", ".webp"),
)
_TEST_SPLITS = ("test", "val", "valid", "validation")
# What a worker sends at once, in shared memory: small, since containers have little of it
_CHUNK_BYTES = 1 << 19
_FEWEST_VALUES = 4096  # of 16-bit images: with fewer, 8 bits would leave 16 grey values at most
_FEW = 2_000  # images that are decoded before a worker has started


class ImageFolder(ImageSource):
    """A folder or zip with ``SPLIT/CLASS/*.jpg`` or ``CLASS/*.jpg`` (also ``.jpeg``, ``.png``).

    Splits are ``train`` and ``test`` (else ``val``; beside ``test``, it is left out with a
    warning). Without a test split, part of the images become one. Links are followed. Images are
    decoded once, in parallel, into the cache (``FULGURITE_CACHE``). Its key is the content of a
    zip, and the names, sizes and times of the files of a folder.

    Images of 16 bits are scaled to 8, so that 65535 becomes 255 (and refused where the training
    images stay below 4096, of which 8 bits would keep nearly nothing); images are turned as their
    EXIF data say; transparency is left out. A colour map is refused for one channel, because its
    grey values may be the indices or the brightness of the colours.

    Args:
        path: The folder or zip, absolute or relative to ``FULGURITE_DATA``.
        image_size: Side to which all images are resized [pixels]; if not given, they must all have
            one size already.
        channels: 3 for colour or 1 for grey; grey images are repeated, colours become their luma.
        test_fraction: Fraction of each class that becomes the test split, if there is none.
        train_limit: Keep at most this many training images, balanced by class.
        test_limit: Keep at most this many test images, balanced by class.
        seed: Seed of these choices.

    Raises:
        ConfigError: An argument is out of range.
    """

    def __init__(
        self,
        path: str,
        image_size: int | None = None,
        channels: Literal[1, 3] = 3,
        test_fraction: float = 0.1,
        train_limit: int | None = None,
        test_limit: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(train_limit, test_limit, seed)
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
        self.path = path
        self.channels = channels
        self.test_fraction = test_fraction
        self._side = image_size
        self._files: _Listing | None = None
        self._size: tuple[int, int] | None = None if image_size is None else (image_size,) * 2

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self._listing().class_names)

    @property
    def in_channels(self) -> int:
        """Number of channels."""
        return self.channels

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width [pixels]: those of the first image, unless images are resized."""
        if self._size is None:
            listing = self._listing()
            decoder = _Decoder(listing.tree, listing.train[:1], None, self.channels, 1)
            image, _ = decoder[0]
            self._size = image.shape[-2], image.shape[-1]
        return self._size

    def _listing(self) -> _Listing:
        if self._files is None:
            self._files = _Listing(data_path(self.path))
        return self._files

    def prepare(self) -> None:
        """Fill the cache."""
        self.read()

    def read(self) -> ImageArrays:
        """Return all images, memory-mapped."""
        listing = self._listing()
        split = None if listing.test else (self.test_fraction, self.seed)
        recipe = f"3 {listing.tree.fingerprint(listing.names)} {self._side} {self.channels} {split}"
        key = hashlib.sha256(recipe.encode()).hexdigest()[:32]
        arrays = cached_arrays(f"images-{key}", self._write)
        kept, _ = self._split_rows()
        # paths also name the images that became the test split: who annotates cannot know which do
        paths = Listing(len(listing.train), tuple(listing.train))
        return replace(arrays, listing=paths, train_rows=torch.tensor(kept, dtype=torch.int64))

    def _split_rows(self) -> tuple[list[int], list[int]]:
        """Files of ``train`` that train and that become the test split, by number."""
        listing = self._listing()
        if listing.test:
            return list(range(len(listing.train))), []
        number = {name: c for c, name in enumerate(listing.class_names)}
        labels = torch.tensor([number[_class_of(name)] for name in listing.train])
        counts = (torch.bincount(labels) * self.test_fraction).ceil().long()
        chosen = choose_per_class(labels, counts, make_generator(self.seed, 2)).tolist()
        tested = set(chosen)
        return [i for i in range(len(listing.train)) if i not in tested], chosen

    def _write(self, target: Path) -> tuple[str, ...]:
        listing = self._listing()
        number = {name: c for c, name in enumerate(listing.class_names)}
        kept, tested = self._split_rows()
        files = {
            "train": [listing.train[i] for i in kept],
            "test": listing.test or [listing.train[i] for i in tested],
        }
        for split, names in files.items():
            labels = torch.tensor([number[_class_of(name)] for name in names])
            np.save(target / f"{split}_labels.npy", labels.numpy())
            self._decode(names, target / f"{split}_images.npy", split)
        return listing.class_names

    def _decode(self, names: Sequence[str], target: Path, title: str) -> None:
        """Decode files into one array on disk."""
        from rich.console import Console
        from rich.progress import track

        height, width = self.image_size
        shape = (len(names), self.channels, height, width)
        images = np.lib.format.open_memmap(target, mode="w+", dtype=np.uint8, shape=shape)
        chunk = max(1, _CHUNK_BYTES // (self.channels * height * width))
        decoder = _Decoder(
            self._listing().tree, names, (self._side, height, width), self.channels, chunk
        )
        blocks = run_in_processes(decoder, len(decoder), len(names) > _FEW)
        done, highest = 0, -1
        for block in track(
            blocks,
            f"Decoding {title} images",
            console=Console(stderr=True),
            total=len(decoder),
            disable=not sys.stderr.isatty(),
        ):
            pixels, peak = block
            images[done : done + len(pixels)] = pixels
            done += len(pixels)
            highest = max(highest, peak)
        images.flush()
        if title == "train" and 0 <= highest < _FEWEST_VALUES:
            raise DataError(
                f"The 16-bit images of {self.path} reach {highest:,} of 65,535, so that 8 bits "
                f"would keep {highest // 257 + 1} values.",
                "Stretch them to 65,535 (all by one factor), or save them with 8 bits.",
            )


class _Listing:
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
        self.class_names = tuple(sorted({_class_of(name) for name in self.train}))
        if unknown := sorted({_class_of(name) for name in self.test} - {*self.class_names}):
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
        for name in held_out[1:]:
            warnings.warn(
                f"The {len(splits[name])} images in {name}/ of {root} are left out: "
                f"{held_out[0]}/ is the test split, and validation images are a part of train/ "
                "(`--data.init_args.val_fraction`).",
                stacklevel=2,
            )

    def _find_splits(self, others: Sequence[str]) -> dict[str, list[str]]:
        """Return the images of each split; all are of ``train`` where there is none.

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
        if depth == 1:
            return {"train": self.names}
        splits: dict[str, list[str]] = {}
        for name in self.names:
            splits.setdefault(name.split("/")[-3], []).append(name)
        known = {"train", *_TEST_SPLITS}
        if len(splits) == 1 and not splits.keys() & known:
            return {"train": self.names}  # CLASS/*, inside one folder
        if unknown := sorted(splits.keys() - known):
            files = [name for split in unknown for name in splits[split]]
            self._refuse(f"{unknown[0]} is neither train nor {' nor '.join(_TEST_SPLITS)}", files)
        if "train" not in splits:
            self._refuse("there is no folder train", self.names)
        folders = sorted({name.rsplit("/", 3)[0] for name in self.names if depth > 2})
        if len(folders) > 1:
            self._refuse(f"train and test are in {len(folders)} folders", folders)
        return splits

    def _refuse(self, reason: str, names: Sequence[str]) -> NoReturn:
        slashes = " (they have backslashes: pack the zip again)" if "\\" in "".join(names) else ""
        raise DataError(
            f"The image files of {self.root} are not laid out by class: {reason}"
            + (f": {name_some(names, 3)}{slashes}." if names else "."),
            "Lay them out as train/CLASS/* and test/CLASS/*, or as CLASS/*, in JPEG or PNG.",
        )


class _Decoder(Dataset[tuple[Tensor, int]]):
    """Blocks of decoded images: jobs for :func:`run_in_processes`."""

    def __init__(
        self,
        tree: FileTree,
        names: Sequence[str],
        sizes: tuple[int | None, int, int] | None,
        channels: int,
        chunk: int,
    ) -> None:
        self.tree, self.names, self.sizes, self.chunk = tree, names, sizes, chunk
        self.channels = channels

    def __len__(self) -> int:
        return -(-len(self.names) // self.chunk)

    def __getitem__(self, block: int) -> tuple[Tensor, int]:
        """Return images, and the highest value of those of 16 bits (-1 if there are none)."""
        names = self.names[block * self.chunk : (block + 1) * self.chunk]
        self._highest = -1
        images = torch.from_numpy(np.stack([self._image(name) for name in names]))
        return images, self._highest

    def _image(self, name: str) -> NDArray[np.uint8]:
        with reading_image(f"{name} of {self.tree.root}", "Or remove it."):
            content = io.BytesIO(self.tree.read(name))
            pixels = decode_picture(content, is_grey=self.channels == 1)
            if pixels.dtype == np.uint16:
                self._highest = max(self._highest, int(pixels.max()))
            image = to_channels(to_uint8(pixels), self.channels)
        if self.sizes is None:
            return image
        side, height, width = self.sizes
        if side is not None:
            return _resize(image, side)
        if image.shape[1:] != (height, width):
            raise DataError(
                f"The image {name} of {self.tree.root} has {image.shape[1]} x {image.shape[2]} "
                f"pixels, the first one {height} x {width}.",
                "Set `--data.init_args.source.init_args.image_size` to resize all.",
            )
        return image


def _resize(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    from PIL import Image

    last = image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))
    small = Image.fromarray(last).resize((side, side), Image.Resampling.BILINEAR)
    return to_channels(np.asarray(small), len(image))


def _class_of(name: str) -> str:
    return name.split("/")[-2]
