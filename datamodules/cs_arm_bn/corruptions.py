"""A benchmark of real images: CIFAR-10 with corruptions as plates and one class as control.

Shapes: H W image, 3 colours.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fulgurite.data.exclusions import BadImage, name_some
from fulgurite.data.images import decode_picture, reading_image, to_channels, to_uint8
from fulgurite.data.listing import FileTree
from fulgurite.datamodules.cs_arm_bn.images import SiteReader
from fulgurite.datamodules.cs_arm_bn.preprocess import Preprocess
from fulgurite.datamodules.cs_arm_bn.sources import PlateSource
from fulgurite.datamodules.cs_arm_bn.table import PlateTable
from fulgurite.errors import ConfigError, DataError
from fulgurite.io import data_path

__all__ = ["CORRUPTIONS", "CorruptedCifar", "corrupt"]

Image = NDArray[np.float64]  # (H, W, 3), 0 to 1
Generator = np.random.Generator


def _gaussian_noise(x: Image, level: float, g: Generator) -> Image:
    return x + g.normal(0, level, x.shape)


def _shot_noise(x: Image, level: float, g: Generator) -> Image:
    return g.poisson(np.clip(x, 0, 1) * level) / level


def _speckle_noise(x: Image, level: float, g: Generator) -> Image:
    return x + x * g.normal(0, level, x.shape)


def _impulse_noise(x: Image, level: float, g: Generator) -> Image:
    dice = g.uniform(size=x.shape)
    return np.where(dice < level / 2, 0.0, np.where(dice < level, 1.0, x))


def _convolve(x: Image, kernel: NDArray[Any]) -> Image:
    from scipy.ndimage import convolve

    blurred: Image = convolve(x, (kernel / kernel.sum())[:, :, None], mode="mirror")
    return blurred


def _gaussian_blur(x: Image, level: float, g: Generator) -> Image:
    from scipy.ndimage import gaussian_filter

    blurred: Image = gaussian_filter(x, (level, level, 0), mode="mirror")
    return blurred


def _defocus_blur(x: Image, level: tuple[float, float], g: Generator) -> Image:
    radius, soft = level
    axis = np.arange(-3, 4)
    # a disc whose border is smooth over a pixel, since CIFAR's radii are below two pixels
    distance = np.hypot(*np.meshgrid(axis, axis))
    return _gaussian_blur(_convolve(x, np.clip(radius + 0.5 - distance, 0, 1)), soft, g)


def _motion_blur(x: Image, level: tuple[float, float], g: Generator) -> Image:
    radius, sigma = level
    angle = math.radians(g.uniform(-45, 45))
    reach = int(radius)
    axis = np.arange(-reach, reach + 1)
    y, x_ = np.meshgrid(axis, axis, indexing="ij")
    along = x_ * math.cos(angle) + y * math.sin(angle)
    across = y * math.cos(angle) - x_ * math.sin(angle)
    line = np.clip(1 - np.abs(across), 0, 1) * np.exp(-(along**2) / (2 * sigma**2)) * (along >= 0)
    return _convolve(x, line)


def _magnify(x: Image, factor: float) -> Image:
    from scipy.ndimage import map_coordinates

    height, width = x.shape[:2]
    y = (np.arange(height) - (height - 1) / 2) / factor + (height - 1) / 2
    x_ = (np.arange(width) - (width - 1) / 2) / factor + (width - 1) / 2
    grid = np.meshgrid(y, x_, indexing="ij")
    return np.stack(
        [map_coordinates(x[..., c], grid, order=1, mode="nearest") for c in range(3)], 2
    )


def _zoom_blur(x: Image, level: float, g: Generator) -> Any:
    factors = np.arange(1, level, 0.02)
    return np.mean([x, *(_magnify(x, float(f)) for f in factors)], axis=0)


def _glass_blur(x: Image, level: tuple[float, int, int], g: Generator) -> Image:
    sigma, reach, times = level
    x = _gaussian_blur(x, sigma, g)
    height, width = x.shape[:2]
    coordinates = np.indices((height, width))
    for _ in range(times):  # all pixels are exchanged with neighbours at once
        moved = coordinates + g.integers(-reach, reach + 1, coordinates.shape)
        x = x[np.clip(moved[0], 0, height - 1), np.clip(moved[1], 0, width - 1)]
    return _gaussian_blur(x, sigma, g)


def _make_clouds(height: int, width: int, decay: float, g: Generator) -> Image:
    """Return a smooth random field in [0, 1]: octaves of noise, each weaker by ``decay``."""
    from scipy.ndimage import zoom

    side = 1 << (max(height, width) - 1).bit_length()
    total, weight, cells = np.zeros((side, side)), 1.0, 2
    while cells <= side:
        total += weight * zoom(g.uniform(-1, 1, (cells, cells)), side / cells, order=1)
        weight, cells = weight / decay, cells * 2
    total -= total.min()
    field: Image = (total / max(total.max(), 1e-9))[:height, :width]
    return field


def _fog(x: Image, level: tuple[float, float], g: Generator) -> Any:
    amount, decay = level
    top = x.max()
    fog = _make_clouds(x.shape[0], x.shape[1], decay, g)[..., None]
    return (x + amount * fog) * top / (top + amount)


def _snow(x: Image, level: tuple[float, float, float], g: Generator) -> Any:
    mean, threshold, keep = level
    flakes = g.normal(mean, 0.3, x.shape[:2])
    flakes = np.where(flakes < threshold, 0, np.clip(flakes, 0, 1))[..., None]
    flakes = _motion_blur(np.repeat(flakes, 3, 2), (4, 2.0), g)
    grey = x.mean(2, keepdims=True)
    whitened = keep * x + (1 - keep) * np.maximum(x, grey * 1.5 + 0.5)
    return whitened + flakes + flakes[::-1, ::-1]


def _brightness(x: Image, level: float, g: Generator) -> Any:
    # adding to V of HSV is scaling the pixel, which keeps hue and saturation
    value = x.max(2, keepdims=True)
    lifted = np.clip(value + level, 0, 1)
    return np.where(value > 0, x * lifted / np.maximum(value, 1e-9), lifted)


def _contrast(x: Image, level: float, g: Generator) -> Any:
    mean = x.mean((0, 1), keepdims=True)
    return (x - mean) * level + mean


def _saturate(x: Image, level: tuple[float, float], g: Generator) -> Any:
    factor, shift = level
    value = x.max(2, keepdims=True)
    saturation = 1 - x.min(2, keepdims=True) / np.maximum(value, 1e-9)
    new_saturation = np.clip(saturation * factor + shift, 0, 1)
    return value - (value - x) * new_saturation / np.maximum(saturation, 1e-9)


def _apply_pil(x: Image, change: Callable[[Any], Any]) -> Image:
    from PIL import Image as Pictures

    picture = Pictures.fromarray(np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8))
    changed: Image = np.asarray(change(picture), np.float64) / 255
    return changed


def _jpeg(x: Image, level: int, g: Generator) -> Image:
    from PIL import Image as Pictures

    def change(picture: Any) -> Any:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=level)
        return Pictures.open(file)

    return _apply_pil(x, change)


def _pixelate(x: Image, level: float, g: Generator) -> Image:
    from PIL import Image as Pictures

    def change(picture: Any) -> Any:
        width, height = picture.size
        small = picture.resize((int(width * level), int(height * level)), Pictures.Resampling.BOX)
        return small.resize((width, height), Pictures.Resampling.NEAREST)

    return _apply_pil(x, change)


def _elastic(x: Image, level: tuple[float, float], g: Generator) -> Image:
    from scipy.ndimage import gaussian_filter, map_coordinates

    amount, sigma = level
    height, width = x.shape[:2]
    shift = g.uniform(-1, 1, (2, height, width))
    shift = np.stack([gaussian_filter(s, sigma, mode="reflect") for s in shift])
    shift *= amount / max(float(np.abs(shift).max()), 1e-9)
    grid = np.indices((height, width)) + shift
    return np.stack([map_coordinates(x[..., c], grid, order=1, mode="mirror") for c in range(3)], 2)


_Function = Callable[[Image, Any, Generator], Any]

#: Families with the parameters of severity 1 to 5. Those of noise, blur, brightness, contrast,
#: saturation, JPEG and pixelation are CIFAR-10-C's; those of motion, zoom, glass, fog, snow and
#: elastic deformation are made for the functions above, from mild to strong.
CORRUPTIONS: Mapping[str, tuple[_Function, Sequence[Any]]] = {
    "gaussian_noise": (_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (_shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": (_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "speckle_noise": (_speckle_noise, (0.06, 0.1, 0.12, 0.16, 0.2)),
    "gaussian_blur": (_gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "defocus_blur": (_defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))),
    "motion_blur": (_motion_blur, ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5))),
    "zoom_blur": (_zoom_blur, (1.06, 1.11, 1.16, 1.21, 1.26)),
    "glass_blur": (
        _glass_blur,
        ((0.05, 1, 1), (0.25, 1, 1), (0.3, 1, 2), (0.4, 1, 3), (0.5, 2, 2)),
    ),
    "fog": (_fog, ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75))),
    "snow": (
        _snow,
        ((0.1, 0.6, 0.95), (0.1, 0.5, 0.9), (0.15, 0.55, 0.9), (0.25, 0.6, 0.85), (0.3, 0.65, 0.8)),
    ),
    "brightness": (_brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "saturate": (_saturate, ((0.3, 0), (0.1, 0), (1.5, 0), (2.0, 0.1), (2.5, 0.2))),
    "jpeg": (_jpeg, (80, 65, 58, 50, 40)),
    "pixelate": (_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "elastic": (_elastic, ((0.6, 2.0), (0.9, 2.0), (1.2, 1.8), (1.6, 1.5), (2.2, 1.5))),
}


def corrupt(
    image: NDArray[np.uint8], family: str, severity: int, generator: np.random.Generator
) -> NDArray[np.uint8]:
    """Return an image with one corruption of the CIFAR-10-C families; ``clean`` changes nothing.

    Frost and spatter of that benchmark are left out: they need photographs.

    Args:
        image: Image to corrupt.
        family: Name in :data:`CORRUPTIONS`, or ``clean``.
        severity: Severity from 1 to 5; 0 for ``clean``.
        generator: Generator of the random numbers.

    Shape:
        - (H, W, 3) uint8 -> the same.

    Source: Hendrycks and Dietterich, arXiv 1903.12261; own implementation.

    Example:
        >>> grey = np.full((8, 8, 3), 100, np.uint8)
        >>> int(corrupt(grey, "brightness", 5, np.random.default_rng(0))[0, 0, 0])
        176
    """
    if family == "clean":
        return image
    function, levels = CORRUPTIONS[family]
    changed = function(image / 255.0, levels[severity - 1], generator)
    result: NDArray[np.uint8] = np.rint(np.clip(changed, 0, 1) * 255).astype(np.uint8)
    return result


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
        train: Families for training, besides ``clean``.
        val: Families for model selection.
        test: Families for testing.
        severities: Severities of each family; each gives a plate.
        queries: Number of queries of each class on a plate.
        controls: Number of controls on a plate.
        in_domain: Fraction of the queries of a training plate that are used for testing only.
        seed: Seed of the choice of pictures and of the corruptions.

    Raises:
        ConfigError: A family or severity is unknown, a family is named twice, or a number is out of
            range.

    Source: arXiv 2604.20824, card section 1.8 (CIFAR-C in ARM); controls from a held-out class
    are inferred.
    """

    def __init__(
        self,
        path: str = "cifar10-images.zip",
        control: str = "frog",
        train: list[str] = [  # noqa: B006  # copied below
            "gaussian_noise",
            "gaussian_blur",
            "fog",
            "brightness",
            "saturate",
            "jpeg",
            "elastic",
        ],
        val: list[str] = ["speckle_noise", "zoom_blur"],  # noqa: B006  # copied below
        test: list[str] = [  # noqa: B006  # copied below
            "shot_noise",
            "impulse_noise",
            "defocus_blur",
            "motion_blur",
            "glass_blur",
            "snow",
            "contrast",
            "pixelate",
        ],
        severities: list[int] = [3, 5],  # noqa: B006  # copied below
        queries: int = 60,
        controls: int = 60,
        in_domain: float = 0.2,
        seed: int = 0,
    ) -> None:
        families = [*train, *val, *test]
        if unknown := sorted(set(families) - set(CORRUPTIONS)):
            raise ConfigError(
                f"There is no corruption {unknown[0]!r}.",
                "Set `--data.init_args.source.init_args.train`, `val` and `test` to some of "
                f"{', '.join(CORRUPTIONS)}.",
            )
        if repeated := sorted(name for name in set(families) if families.count(name) > 1):
            raise ConfigError(
                f"The corruption {repeated[0]} is named twice.",
                "Name it in one of `train`, `val` and `test` of `--data.init_args.source`.",
            )
        if not train or not severities or not set(severities) <= set(range(1, 6)):
            raise ConfigError(
                f"There are {len(train)} families for training, at severities {severities}.",
                "Set `--data.init_args.source.init_args.severities` to numbers from 1 to 5, and "
                "`train` to one family or more.",
            )
        if queries < 1 or controls < 0 or seed < 0 or not 0 <= in_domain < 1:
            raise ConfigError(
                f"A plate cannot have {queries} queries of a class, {in_domain} of them set apart, "
                f"and {controls} controls.",
                "Set `--data.init_args.source.init_args.queries` to 1 or more, `controls` and "
                "`seed` to 0 or more, and `in_domain` in [0, 1).",
            )
        self.path = path
        self.control = control
        self.train = list(train)
        self.val = list(val)
        self.test = list(test)
        self.severities = list(severities)
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
        parts = dict.fromkeys(["clean", *self.train], "train") | dict.fromkeys(self.val, "val")
        parts |= dict.fromkeys(self.test, "new_batch")
        apart = round(self.in_domain * self.queries)
        for split in ("train", "test"):
            plates = [
                (family, severity, part)
                for family, part in parts.items()
                if (part == "new_batch") == (split == "test")
                for severity in ([0] if family == "clean" else self.severities)
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
