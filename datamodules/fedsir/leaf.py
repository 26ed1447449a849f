"""Federations in LEAF's JSON, such as FEMNIST by its writers.

Shapes: N samples, C channels, H W image.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from fulgurite.datamodules.fedsir.cache import cached_arrays
from fulgurite.datamodules.fedsir.samples import Listing
from fulgurite.datamodules.fedsir.sources import ImageArrays, ImageSource
from fulgurite.errors import ConfigError, DataError
from fulgurite.extras import optional_import
from fulgurite.foreign import reading
from fulgurite.io import checksum, data_path
from fulgurite.options import PositiveFloat, PositiveInt, check_options, make_options

__all__ = ["Leaf", "LeafPixels"]

_OPTION = "--data.init_args.source.init_args"
_REWRITE_HINT = "Write it again with LEAF's preprocess.sh, or fetch it again."
_MAX_CLASSES = 1000
_MAX_DIGITS = 400
_LONG_NUMBER = re.compile(rb"[0-9]{%d}" % _MAX_DIGITS)


@dataclass(frozen=True)
class LeafPixels:
    """What the numbers of an image are.

    Args:
        shape: Channels, height and width [pixels] of an image.
        maximum: Pixel value of full scale: 1 in FEMNIST.

    Raises:
        ConfigError: A number is out of range.
    """

    shape: tuple[PositiveInt, PositiveInt, PositiveInt] = (1, 28, 28)
    maximum: PositiveFloat = 1.0

    def __post_init__(self) -> None:
        check_options(self, f"{_OPTION.removeprefix('--')}.pixels")
        if self.shape[0] not in (1, 3):
            raise ConfigError(
                f"Images cannot have the shape {self.shape}.",
                f"Set `{_OPTION}.pixels.shape` to [1, 28, 28] or the like: channels, height and "
                "width.",
            )
        if self.maximum == float("inf"):
            raise ConfigError(
                f"Full scale cannot be {self.maximum}.",
                f"Set `{_OPTION}.pixels.maximum` to 1 or 255.",
            )


class Leaf(ImageSource):
    """Images of users in the JSON of LEAF: ``users``, ``num_samples`` and ``user_data`` (x and y).

    Pixels are numbers from 0 to ``maximum``, one flat list per image, as in FEMNIST. The users
    become the column ``client`` (``Natural``). Files are read once, user by user, into the cache
    (``FULGURITE_CACHE``); its key is their content.

    Args:
        train: JSON file or folder of JSON files of the training split, such as ``data/train`` of
            LEAF, absolute or relative to ``FULGURITE_DATA``.
        test: JSON file or folder of JSON files of the test split.
        pixels: What the numbers of an image are.
        classes: Number of classes; by default one more than the largest label, and each class must
            have a training image.
        users: Number of users to train on, the first ones in the order of the files.
        train_limit: Keep at most this many training images, balanced by class.
        test_limit: Keep at most this many test images, balanced by class.
        seed: Seed of the images kept under the limits.

    Raises:
        ConfigError: ``pixels``, ``classes``, ``users`` or a limit is out of range.

    Source: Caldas et al., LEAF, arXiv 1812.01097.
    """

    def __init__(
        self,
        train: str,
        test: str,
        pixels: LeafPixels = LeafPixels(),
        *,
        classes: int | None = None,
        users: int | None = None,
        train_limit: int | None = None,
        test_limit: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(train_limit, test_limit, seed)
        for name, number in (("classes", classes), ("users", users)):
            if number is not None and number < 1:
                raise ConfigError(
                    f"There cannot be {number} {name}.", f"Set `{_OPTION}.{name}` to 1 or more."
                )
        self.train, self.test = train, test
        pixels = make_options(LeafPixels, pixels)
        self.shape, self.maximum = pixels.shape, pixels.maximum
        self.classes, self.users = classes, users
        self._arrays: ImageArrays | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.classes if self.classes is not None else len(self.read().class_names)

    @property
    def in_channels(self) -> int:
        """Number of channels."""
        return self.shape[0]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width [pixels]."""
        return self.shape[1], self.shape[2]

    def prepare(self) -> None:
        """Fill the cache."""
        self.read()

    def read(self) -> ImageArrays:
        """Return all images, memory-mapped."""
        if self._arrays is not None:
            return self._arrays
        train, test = _find_json_files(self.train, "train"), _find_json_files(self.test, "test")
        files = [[checksum(path) for path in paths] for paths in (train, test)]
        recipe = f"1 {files} {self.shape} {self.maximum} {self.classes} {self.users}"
        key = hashlib.sha256(recipe.encode()).hexdigest()[:32]

        def write(target: Path) -> tuple[str, ...]:
            labels = []
            for split, paths, max_users in (("train", train, self.users), ("test", test, None)):
                images, classes, users = self._concatenate_users(paths, split, max_users)
                if split == "train" and images.max() <= 1:
                    raise DataError(
                        f"The pixels of {self.train} reach 1/255 of their full scale or less.",
                        f"Set `{_OPTION}.pixels.maximum` to 1 where they run from 0 to 1.",
                    )
                np.save(target / f"{split}_images.npy", images)
                np.save(target / f"{split}_labels.npy", classes)
                np.save(target / f"{split}_users.npy", users)
                labels.append(classes)
            return self._number_classes(*labels)

        arrays = cached_arrays(f"leaf-{key}", write)
        users = np.load(_get_cache_entry(f"leaf-{key}") / "train_users.npy")
        listing = Listing(len(users), None, {"client": [str(user) for user in users]})
        self._arrays = replace(arrays, listing=listing)
        return self._arrays

    def _concatenate_users(
        self, paths: list[Path], split: str, max_users: int | None
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.str_]]:
        """Read the images, labels and users of all files, in their order."""
        images, labels, users = [], [], []
        user_files: dict[str, Path] = {}
        for path in paths:
            for user, x, y in _read_users(path):
                if user in user_files:
                    raise DataError(
                        f"The user {user!r} is in {user_files[user]} and in {path}.",
                        "Give each user in one file of a split.",
                    )
                user_files[user] = path
                if max_users is None or len(user_files) <= max_users:
                    with reading(path, "The data of LEAF in", _REWRITE_HINT):
                        images.append(self._scale_pixels(user, x))
                        labels.append(_check_labels(user, y, len(x)))
                        users += [user] * len(x)
        if not users:
            raise DataError(
                f"There are no images in {paths[0].parent}.", f"Set `{_OPTION}.{split}`."
            )
        if max_users is not None and len(user_files) < max_users:
            raise DataError(
                f"There are {len(user_files)} users in {paths[0].parent}, and {max_users} were "
                "asked for.",
                f"Lower `{_OPTION}.users`, or set it to null.",
            )
        return np.concatenate(images), np.concatenate(labels), np.array(users)

    def _scale_pixels(self, user: str, x: Any) -> npt.NDArray[np.uint8]:
        size = int(np.prod(self.shape))
        if not isinstance(x, list) or not x:
            raise ValueError(f"the x of user {user!r} is no list of images")
        if any(isinstance(image, str) for image in x):
            raise ValueError(f"the x of user {user!r} is text, not pixels")
        if any(not isinstance(image, list) or len(image) != size for image in x):
            raise ValueError(
                f"an image of user {user!r} has not {size} numbers, as the shape {self.shape} says"
            )
        pixels = np.array(x)
        if pixels.ndim != 2 or pixels.dtype.kind not in "iuf":
            raise ValueError(f"an image of user {user!r} holds something else than numbers")
        values = pixels.astype(np.float64) / self.maximum
        if not (values.min() >= 0 and values.max() <= 1):  # also refuses NaN
            raise ValueError(
                f"pixels of user {user!r} are not from 0 to {self.maximum}: set "
                f"{_OPTION}.pixels.maximum"
            )
        return np.rint(values * 255).astype(np.uint8).reshape(-1, *self.shape)

    def _number_classes(
        self, train: npt.NDArray[np.int64], test: npt.NDArray[np.int64]
    ) -> tuple[str, ...]:
        max_label = int(max(train.max(), test.max()))
        count = max_label + 1 if self.classes is None else self.classes
        if max_label >= count or count > max(_MAX_CLASSES, len(train)):
            raise DataError(
                f"The labels of {self.train} and {self.test} go up to {max_label}.",
                f"Number the classes from 0, and set `{_OPTION}.classes` to their number.",
            )
        if self.classes is None and len(absent := set(range(count)) - set(train.tolist())):
            raise DataError(
                f"No training image of {self.train} has the class {min(absent)} ({len(absent)} of "
                f"{count} are like this).",
                f"Set `{_OPTION}.classes={count}` if that is right (FEMNIST has 62).",
            )
        return tuple(str(k) for k in range(count))


def _get_cache_entry(key: str) -> Path:
    from fulgurite.data.store import cache_folder

    return cache_folder() / key


def _find_json_files(path: str, split: str) -> list[Path]:
    location = data_path(path)
    files = sorted(location.glob("*.json")) if location.is_dir() else [location]
    if not files:
        raise DataError(f"There is no .json file in {location}.", f"Set `{_OPTION}.{split}`.")
    return files


@contextmanager
def _open_json(path: Path) -> Iterator[IO[bytes]]:
    with reading(path, "The data of LEAF in", _REWRITE_HINT), open(path, "rb") as file:
        yield file


def _read_users(path: Path) -> Iterator[tuple[str, Any, Any]]:
    """Yield each user of a file with x and y; the file need not fit into memory."""
    ijson = optional_import("ijson", "federated", "Reading LEAF's JSON")
    with _open_json(path) as file:
        _refuse_long_numbers(file)
        users = next(ijson.items(file, "users"), None)
        file.seek(0)
        counts = next(ijson.items(file, "num_samples"), None)
        if not isinstance(users, list) or not isinstance(counts, list) or len(users) != len(counts):
            raise ValueError("it has no `users` with a number in `num_samples` each")
        if not all(isinstance(user, str) and user for user in users):
            raise ValueError("a name in its `users` is none")
        number = dict(zip(users, counts, strict=True))
        if len(number) < len(users):
            raise ValueError("it names a user twice in `users`")
        file.seek(0)
        for user, data in ijson.kvitems(file, "user_data", use_float=True):
            if user not in number:
                raise ValueError(f"user {user!r} is twice in `user_data`, or not in `users`")
            if not isinstance(data, dict) or not {"x", "y"} <= data.keys():
                raise ValueError(f"the data of user {user!r} have no x and y")
            if not isinstance(data["x"], list) or number.pop(user) != len(data["x"]):
                raise ValueError(f"user {user!r} has not as many images as `num_samples` says")
            yield user, data["x"], data["y"]
        if number:
            raise ValueError(f"user {next(iter(number))!r} has no data in `user_data`")


def _refuse_long_numbers(file: IO[bytes]) -> None:
    """Refuse integers of more digits than Python can read, on which the parser crashes."""
    tail = b""
    while block := file.read(1 << 20):
        if _LONG_NUMBER.search(tail + block):
            raise ValueError("a number in it has hundreds of digits")
        tail = block[-_MAX_DIGITS:]
    file.seek(0)


def _check_labels(user: str, y: Any, count: int) -> npt.NDArray[np.int64]:
    if not isinstance(y, list) or len(y) != count:
        raise ValueError(f"user {user!r} has not one label in y for each image in x")
    if not all(type(label) is int and 0 <= label < 1 << 31 for label in y):
        raise ValueError(f"a label of user {user!r} is no class number")
    return np.array(y, np.int64)
