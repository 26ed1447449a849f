"""A benchmark of real images: CIFAR-10 with corruptions as plates and one class as control.

Shapes: H W image, 3 colours.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fulgurite.data.exclusions import BadImage, name_some
from fulgurite.data.images import decode_picture, reading_image, to_channels, to_uint8
from fulgurite.data.listing import FileTree
from fulgurite.datamodules.cs_arm_bn.corruptions import CORRUPTIONS, corrupt
from fulgurite.datamodules.cs_arm_bn.preprocess import Preprocess
from fulgurite.datamodules.cs_arm_bn.site_readers import SiteReader
from fulgurite.datamodules.cs_arm_bn.sources import PlateSource
from fulgurite.datamodules.cs_arm_bn.table import PlateTable
from fulgurite.errors import ConfigError, DataError
from fulgurite.io import data_path
from fulgurite.options import (
    NonNegativeInt,
    PositiveInt,
    RightOpenUnitInterval,
    check_arguments,
    check_options,
    make_options,
)

__all__ = ["CorruptedCifar", "CorruptionFamilies"]

_OPTION = "data.init_args.source.init_args.families"
_TRAIN = ("gaussian_noise", "gaussian_blur", "fog", "brightness", "saturate", "jpeg", "elastic")
_TEST = (
    *("shot_noise", "impulse_noise", "defocus_blur", "motion_blur", "glass_blur", "snow"),
    *("contrast", "pixelate"),
)


class _CorruptingReader(SiteReader):
    """Reads ``SPLIT/CLASS/NAME#family#severity`` from a zip and corrupts the picture.

    The random numbers depend on the picture's name and the corruption.
    """

    def __init__(self, path: Path, seed: int) -> None:
        self.tree = FileTree(path)
        self.seed = seed
        status = path.stat()
        self.recipe = f"corrupted 1 {seed} {status.st_size} {status.st_mtime_ns}"

    def fingerprint(self, paths: Sequence[str]) -> Any:
        """Yield the paths; size and time of the zip are in the recipe."""
        yield from paths

    def __call__(self, paths: Sequence[str]) -> NDArray[Any]:
        """Return a corrupted picture: see :meth:`SiteReader.__call__`."""
        member, family, severity = paths[0].rsplit("#", 2)
        otherwise = "Or leave such sites out: `--data.init_args.exclude+=unreadable`."
        name = f"{member} of {self.tree.root}"
        with reading_image(name, otherwise, BadImage, "Fetch the zip again."):
            picture = decode_picture(io.BytesIO(self.tree.read(member)))
            image = to_channels(to_uint8(picture), 3)
        generator = np.random.default_rng((self.seed, *paths[0].encode()))
        return np.moveaxis(
            corrupt(np.moveaxis(image, 0, 2), family, int(severity), generator), 2, 0
        )


@dataclass(frozen=True)
class CorruptionFamilies:
    """Corruption families of training, validation and test, each at several severities.

    Args:
        train: Families for training, besides ``clean``.
        val: Families for model selection.
        test: Families for testing.
        severities: Severities of each family, from 1 to 5; each gives a plate.

    Raises:
        ConfigError: A family or severity is unknown, or a family is named twice.
    """

    train: tuple[str, ...] = _TRAIN
    val: tuple[str, ...] = ("speckle_noise", "zoom_blur")
    test: tuple[str, ...] = _TEST
    severities: tuple[PositiveInt, ...] = (3, 5)

    def __post_init__(self) -> None:
        check_options(self, _OPTION)
        families = [*self.train, *self.val, *self.test]
        if unknown := sorted(set(families) - set(CORRUPTIONS)):
            raise ConfigError(
                f"There is no corruption {unknown[0]!r}.",
                f"Set `--{_OPTION}.train`, `val` and `test` to some of {', '.join(CORRUPTIONS)}.",
            )
        if repeated := sorted(name for name in set(families) if families.count(name) > 1):
            raise ConfigError(
                f"The corruption {repeated[0]} is named twice.",
                f"Name it in one of `train`, `val` and `test` of `--{_OPTION}`.",
            )
        if not self.train or not self.severities or not set(self.severities) <= set(range(1, 6)):
            raise ConfigError(
                f"There are {len(self.train)} families for training, at severities "
                f"{list(self.severities)}.",
                f"Set `--{_OPTION}.severities` to numbers from 1 to 5, and `train` to one family "
                "or more.",
            )


class CorruptedCifar(PlateSource):
    """CIFAR-10 as plates: each plate is a corruption of one severity, one class is the control.

    The pictures are real, the shift is synthetic. Plates have different pictures, and corruption
    families of training, validation and test differ; test families use pictures of CIFAR's test
    split. ``OfficialSplit`` is made for it: ``new_batch`` tests new corruptions, ``in_domain``
    other pictures on the training plates.

    Args:
        path: Zip with ``SPLIT/CLASS/*.jpg`` (or ``.png``), absolute or relative to
            ``FULGURITE_DATA``.
        control: Class that becomes the negative control and is not a label.
        families: Corruptions of training, validation and test, and their severities.
        queries: Number of queries of each class on a plate.
        controls: Number of controls on a plate.
        in_domain: Fraction of the queries of a training plate that are used for testing only.
        seed: Seed of the choice of pictures and of the corruptions.

    Raises:
        ConfigError: A number is out of range.

    Source: docs/papers/cs_arm_bn.md section 1.8 (CIFAR-C in ARM); controls from a held-out class
    are inferred.
    """

    def __init__(
        self,
        path: str = "cifar10-images.zip",
        control: str = "frog",
        *,
        families: CorruptionFamilies = CorruptionFamilies(),
        queries: PositiveInt = 60,
        controls: NonNegativeInt = 60,
        in_domain: RightOpenUnitInterval = 0.2,
        seed: NonNegativeInt = 0,
    ) -> None:
        check_arguments(CorruptedCifar.__init__, locals(), "data.init_args.source.init_args")
        self.path = path
        self.control = control
        self.families = make_options(CorruptionFamilies, families)
        self.queries = queries
        self.controls = controls
        self.in_domain = in_domain
        self.seed = seed
        self._pictures: dict[tuple[str, str], list[str]] | None = None

    def _list_pictures(self) -> dict[tuple[str, str], list[str]]:
        """List the pictures of each (split, class)."""
        if self._pictures is None:
            path = data_path(self.path)
            members: dict[tuple[str, str], list[str]] = {}
            for name in FileTree(path).names:
                parts = name.split("/")
                if len(parts) == 3 and parts[2].lower().endswith((".jpg", ".jpeg", ".png")):
                    members.setdefault((parts[0], parts[1]), []).append(name)
            splits, classes = {s for s, _ in members}, {c for _, c in members}
            if not {"train", "test"} <= splits or self.control not in classes:
                raise DataError(
                    f"The zip {path} has the splits {name_some(sorted(splits))} and the classes "
                    f"{name_some(sorted(classes), 10)}.",
                    "It needs train and test; set `--data.init_args.source.init_args.control` to a "
                    "class.",
                )
            self._pictures = members
        return self._pictures

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes without the control."""
        return tuple(sorted({c for _, c in self._list_pictures()} - {self.control}))

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the channels."""
        return ("R", "G", "B")

    @property
    def preprocess(self) -> Preprocess:
        """Keep pictures unchanged."""
        return Preprocess(downscale=1, intensity="full", constant="image")

    @property
    def reader(self) -> SiteReader:
        """Reader that corrupts pictures of the zip."""
        return _CorruptingReader(data_path(self.path), self.seed)

    def load(self) -> PlateTable:
        """Return the table of sites; the "well" is the picture.

        Raises:
            DataError: The zip has too few pictures.
        """
        import pandas as pd

        listing = self._list_pictures()
        rows: list[tuple[str | int, ...]] = []
        families = self.families
        parts = dict.fromkeys(["clean", *families.train], "train")
        parts |= dict.fromkeys(families.val, "val") | dict.fromkeys(families.test, "new_batch")
        apart = round(self.in_domain * self.queries)
        for split in ("train", "test"):
            plates = [
                (family, severity, part)
                for family, part in parts.items()
                if (part == "new_batch") == (split == "test")
                for severity in ([0] if family == "clean" else families.severities)
            ]
            for label, name in [*enumerate(self.class_names), (-1, self.control)]:
                count = self.queries if label >= 0 else self.controls
                pictures = listing.get((split, name), [])
                if len(pictures) < count * len(plates):
                    raise DataError(
                        f"There are {len(pictures)} {split} pictures of {name} for {len(plates)} "
                        f"plates of {count}.",
                        "Lower `--data.init_args.source.init_args.queries`, `controls` or the "
                        "number of corruptions.",
                    )
                key = (self.seed, *f"{split}/{name}".encode())
                order = np.random.default_rng(key).permutation(len(pictures))
                role = "query" if label >= 0 else "control"
                for p, (family, severity, part) in enumerate(plates):
                    for k, i in enumerate(order[p * count : (p + 1) * count]):
                        member = pictures[int(i)]
                        well = f"{name}/{Path(member).stem}"
                        path = f"{member}#{family}#{severity}"
                        official = "in_domain" if part == "train" and k < apart else part
                        plate = f"{family}-{severity}"
                        rows.append((family, plate, well, role, label, path, official))
        names = ["batch", "plate", "well", "role", "label", "path", "official"]
        frame = pd.DataFrame(rows, columns=names).assign(source="cifar10", site="1")
        return PlateTable(frame, self.class_names, self.channels)
