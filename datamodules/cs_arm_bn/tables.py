"""Readers of plate tables as CSV, and of RxRx1 in the version of WILDS."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from fulgurite.data.exclusions import Exclusion, check_exclude, exclude_hint, name_some
from fulgurite.data.names import find_repeated
from fulgurite.datamodules.cs_arm_bn.preprocess import Preprocess
from fulgurite.datamodules.cs_arm_bn.site_names import find_same_channel
from fulgurite.datamodules.cs_arm_bn.site_readers import FileReader, SiteReader
from fulgurite.datamodules.cs_arm_bn.sources import PlateSource, check_channels, locate
from fulgurite.datamodules.cs_arm_bn.table import PlateTable
from fulgurite.datamodules.cs_arm_bn.table_files import read_table, refuse_misspelt_columns
from fulgurite.errors import ConfigError, DataError
from fulgurite.io import data_path
from fulgurite.options import PositiveInt, check_arguments, check_options, make_options

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["CsvPlates", "ImageFiles", "RxRx1Plates"]

_EXCLUSIONS = ("unknown_label", "missing_channel", "same_channel")
_OPTION = "--data.init_args.source.init_args"
_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_NAMES = (
    *("source", "batch", "plate", "well", "site", "role", "label"),
    *("domain", "lab", "official"),
)


@dataclass(frozen=True)
class ImageFiles:
    """Where the images of a plate table are, and of what kind.

    Args:
        root: Folder to which image paths are relative; by default that of the table.
        any_depth: Accept TIFFs that are not 16-bit with one channel.
        remote: Beginnings of allowed addresses (such as ``s3://my-bucket/``) in the table; others
            are refused.
        prefixes: Replacements of the beginnings of paths in the table, for tables of another
            machine.
    """

    root: str | None = None
    any_depth: bool = False
    remote: tuple[str, ...] = ()
    prefixes: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_options(self, "data.init_args.source.init_args.files")


class CsvPlates(PlateSource):
    """Plates of your own, from a table with one row for each site (CSV, ``.csv.gz`` or parquet).

    Columns: ``source``, ``batch``, ``plate``, ``well``, ``site``, ``role`` (query or control),
    ``label`` (name of the class; empty if unknown or a control) and ``path``, or
    ``path_<channel>`` for each channel; see :class:`PlateTable` for optional ones. Only an empty
    cell is missing: ``NA`` and ``None`` are names. Other columns are not used.

    Args:
        path: Path of the table, absolute or relative to ``FULGURITE_DATA``.
        channels: Names of the channels, in the order of the images.
        classes: Names of the classes, in the order of their numbers; by default those in the
            table, sorted. Other labels are an error or excluded.
        files: Where the images are, and of what kind.
        downscale: Keep every n-th pixel along each axis.
        intensity: Mapping of intensities; see :class:`Preprocess`.
        exclude: Words for sites to leave out and count instead of an error: sites with an
            ``unknown_label``, a ``missing_channel`` or one file for two channels
            (``same_channel``).

    Raises:
        ConfigError: ``channels`` is empty or has duplicates, ``classes`` has duplicates, or a word
            in ``exclude`` is unknown.
    """

    #: What to do about sites that ``exclude`` would leave out.
    hints: Mapping[str, str] = MappingProxyType(
        {
            "unknown_label": f"Add the class to `{_OPTION}.classes`",
            "missing_channel": "Give each path",
            "same_channel": "Give each channel its file",
        }
    )

    def __init__(
        self,
        path: str,
        channels: list[str],
        *,
        classes: list[str] | None = None,
        files: ImageFiles = ImageFiles(),
        downscale: PositiveInt = 1,
        intensity: Literal["percentile", "full"] = "percentile",
        exclude: list[str] = [],  # noqa: B006  # copied below
    ) -> None:
        check_arguments(CsvPlates.__init__, locals(), _OPTION.removeprefix("--"))
        if (name := find_repeated(classes or ())) is not None:
            raise ConfigError(
                f"The class {name!r} comes twice.", f"Name each class in `{_OPTION}.classes` once."
            )
        self.path = path
        self.classes = classes
        self.files = make_options(ImageFiles, files)
        self.exclude = check_exclude(exclude, _EXCLUSIONS, "source.init_args.exclude")
        self._channels = check_channels(channels)
        self._preprocess = Preprocess(downscale, intensity)
        self._frame: pd.DataFrame | None = None

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the channels."""
        return self._channels

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes."""
        if self.classes is not None:
            return tuple(self.classes)
        frame = self._read_frame()
        labels = frame["label"][frame["role"] != "control"].dropna()
        return tuple(sorted(set(labels)))

    @property
    def preprocess(self) -> Preprocess:
        """Preprocessing with the configured ``downscale`` and ``intensity``."""
        return self._preprocess

    @property
    def reader(self) -> SiteReader:
        """Reader of 16-bit TIFF, PNG, JPEG and ``.npy``."""
        return FileReader(self.in_channels, self.files.any_depth, self.files.remote)

    def read_file(self) -> pd.DataFrame:
        """Return the table as it is."""
        return read_table(data_path(self.path))

    def _read_frame(self) -> pd.DataFrame:
        if self._frame is None:
            frame = self.read_file()
            channels = ["path", *(f"path_{channel}" for channel in self._channels)]
            refuse_misspelt_columns(frame, [*_NAMES, *channels], self.path)
            for name in ("role", "label"):
                if name not in frame.columns:
                    raise DataError(
                        f"The table {self.path} has no column {name!r}.",
                        "Add the role (query or control) of each site."
                        if name == "role"
                        else "Add the class of each site, empty if it is unknown.",
                    )
            if not len(frame):
                raise DataError(
                    f"The table {self.path} has a header and no site.", "Give a row for each site."
                )
            for name in _NAMES:
                if name in frame.columns:
                    self._check_names(frame[name])
            self._frame = frame
        return self._frame

    def _check_names(self, column: pd.Series) -> None:
        names = column.dropna().unique()
        if wrong := [name for name in names if name != name.strip()]:
            raise DataError(
                f"The column {column.name!r} of {self.path} holds {wrong[0]!r}, with a blank at an "
                "end.",
                "Remove such blanks: with them it is another name.",
            )
        if wrong := [name for name in names if _CONTROL_CHARACTER.search(name)]:
            raise DataError(
                f"The column {column.name!r} of {self.path} holds {wrong[0][:80]!r}, which is no "
                "name: a line ends in it, or it has a tab or another control character.",
                "Look for a quote that is not closed where the name begins.",
            )

    def describe_fix(self, path: str) -> str:
        """Return a hint for missing images: see :meth:`PlateSource.describe_fix`."""
        prefixes = self.files.prefixes | {"/home/USER/plates/": ""}
        return (
            f"Set `{_OPTION}.files.root` to the folder where relative paths start, or, where the "
            "table is of another machine, say what takes the place of the beginning of its paths: "
            f"`{_OPTION}.files.prefixes={prefixes}`."
        )

    def load(self) -> PlateTable:
        """Return the table of sites.

        Raises:
            DataError: A column is missing, or a site has an unknown label, a missing path or one
                file for two channels and is not to be excluded.
        """
        import pandas as pd

        frame = self._read_frame().copy()
        numbers = {name: c for c, name in enumerate(self.class_names)}
        excluded: list[Exclusion] = []
        query = frame["role"] != "control"
        unknown = query & frame["label"].notna() & ~frame["label"].isin(list(numbers))
        problem = f"with a label that is no class (classes are {name_some(list(numbers))})"
        frame = self._drop_or_raise(
            frame, unknown, excluded, kind="unknown_label", problem=problem, column="label"
        )
        paths = self._path_columns(frame)
        missing = frame[paths].isna()
        broken = missing.any(axis=1)
        column = paths[int(missing.to_numpy()[int(broken.to_numpy().argmax())].argmax())]
        problem = "without a path for a channel"
        frame = self._drop_or_raise(
            frame, broken, excluded, kind="missing_channel", problem=problem, column=column
        )
        if len(paths) > 1:
            same, pair = find_same_channel(frame, self._channels)
            problem = f"with one file for two channels, {' and '.join(pair)}"
            wrong = pd.Series(same, frame.index)
            frame = self._drop_or_raise(
                frame,
                wrong,
                excluded,
                kind="same_channel",
                problem=problem,
                column=f"path_{pair[0]}",
            )
        folder = self.files.root
        root = data_path(self.path).parent if folder is None else data_path(folder)
        for name in paths:
            frame[name] = [locate(path, root, self.files.prefixes) for path in frame[name]]
        frame["label"] = frame["label"].map(numbers).fillna(-1)
        return PlateTable(frame, self.class_names, self._channels, excluded)

    def _path_columns(self, frame: pd.DataFrame) -> list[str]:
        """Return ``path``, or the column of each channel; other path columns are ignored."""
        columns = [f"path_{channel}" for channel in self._channels]
        there = [name for name in columns if name in frame.columns]
        if "path" not in frame.columns:
            if absent := [name for name in columns if name not in there]:
                named = [name for name in frame.columns if name.startswith("path_")]
                raise DataError(
                    f"The table {self.path} has neither the column 'path' nor {absent[0]!r} (it "
                    f"has {', '.join(named) or 'no column of paths'}).",
                    f"Give a column of paths for each of `{_OPTION}.channels`, or one for all.",
                )
            return columns
        if there:
            raise DataError(
                f"The table {self.path} has the columns 'path' and {there[0]!r}: it is not clear "
                "which one holds the images.",
                "Keep `path` for images of all channels, or a column for each channel.",
            )
        return ["path"]

    def _drop_or_raise(
        self,
        frame: pd.DataFrame,
        wrong: pd.Series,
        excluded: list[Exclusion],
        *,
        kind: str,
        problem: str,
        column: str,
    ) -> pd.DataFrame:
        """Drop sites and record them, or raise if their word is not in ``exclude``."""
        if not wrong.any():
            return frame
        row = frame[wrong].iloc[0]
        site = ", ".join(f"{k} {row[k]}" for k in ("plate", "well", "site") if k in frame.columns)
        value = f" {row[column]!r}" if isinstance(row[column], str) else ""
        problem = f"{int(wrong.sum())} sites {problem}; first {column}{value} of {site}"
        if kind not in self.exclude:
            raise DataError(
                f"The table {self.path} has {problem}.",
                f"{self.hints[kind]}, or "
                + exclude_hint("such sites", kind, self.exclude, "source.init_args.exclude"),
            )
        excluded.append(Exclusion(kind, problem, int(wrong.sum())))
        return frame[~wrong]


class RxRx1Plates(PlateSource):
    """RxRx1 in the version of WILDS (v1.0): ``metadata.csv`` and ``images/``, 3 channels, 256².

    A plate of RxRx1 has about one untreated well, so negative controls are few. The 30
    positive-control siRNAs are on every plate and can serve as controls, since a fixed mixture is
    the same reference on every plate.

    Args:
        root: Folder ``rxrx1_v1.0``, absolute or relative to ``FULGURITE_DATA``.
        controls: Control wells: ``positive`` (siRNA 1108 to 1137), ``negative`` (1138) or ``both``.
        domain: Unit with common controls and statistics: a plate, or an experiment of four plates.
        cell_types: Cell types to use; by default all.

    Raises:
        ConfigError: ``controls`` or ``domain`` is unknown.

    Source: docs/papers/cs_arm_bn.md section 4.2; WILDS' own split is ``OfficialSplit``.
    """

    _TREATMENTS, _NEGATIVE = 1108, 1138

    def __init__(
        self,
        root: str,
        controls: Literal["positive", "negative", "both"] = "positive",
        domain: Literal["plate", "experiment"] = "plate",
        cell_types: list[str] | None = None,
    ) -> None:
        if controls not in ("positive", "negative", "both") or domain not in (
            "plate",
            "experiment",
        ):
            raise ConfigError(
                f"The controls are {controls!r} and a domain is a {domain!r}.",
                "Set `--data.init_args.source.init_args.controls` to positive, negative or both, "
                "and `domain` to plate or experiment.",
            )
        self.root = root
        self.controls = controls
        self.domain = domain
        self.cell_types = cell_types

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the channels: those of the PNG."""
        return ("R", "G", "B")

    @property
    def class_names(self) -> tuple[str, ...]:
        """The siRNAs that are not controls."""
        count = self._TREATMENTS if self.controls != "negative" else self._NEGATIVE
        return tuple(f"sirna_{c}" for c in range(count))

    @property
    def preprocess(self) -> Preprocess:
        """Keep images unchanged: they are small and have 8 bits."""
        return Preprocess(downscale=1, intensity="full")

    def describe_fix(self, path: str) -> str:
        """Return a hint for missing images: see :meth:`PlateSource.describe_fix`."""
        if Path(path.removesuffix(".png") + "_w1.png").is_file():
            return (
                "These are the files of RxRx1 as Recursion gives them, one for each channel "
                "(_w1.png to _w6.png): fetch the version of WILDS, or name the six files in a "
                "table with the columns path_w1 to path_w6 and read it by CsvPlates."
            )
        return f"Set `{_OPTION}.root` to the folder rxrx1_v1.0, which holds images/."

    def load(self) -> PlateTable:
        """Return the table of sites.

        Raises:
            DataError: ``metadata.csv`` is missing, or a siRNA is unknown.
        """
        import pandas as pd

        root = data_path(self.root)
        needed = ("cell_type", "dataset", "experiment", "plate", "well", "site", "sirna_id")
        frame = read_table(root / "metadata.csv", needed)
        if self.cell_types is not None:
            if absent := sorted(set(self.cell_types) - set(frame["cell_type"])):
                raise DataError(
                    f"RxRx1 has no cell type {name_some(absent)}.",
                    "Set `--data.init_args.source.init_args.cell_types` to some of "
                    f"{name_some(sorted(set(frame['cell_type'])))}.",
                )
            frame = frame[frame["cell_type"].isin(self.cell_types)].reset_index(drop=True)
        sirna = pd.to_numeric(frame["sirna_id"], errors="coerce")
        wrong = sirna.isna() | (sirna < 0) | (sirna > self._NEGATIVE) | (sirna % 1 != 0)
        if wrong.any():
            raise DataError(
                f"The metadata of RxRx1 name the siRNA {frame['sirna_id'][wrong].iloc[0]!r}.",
                f"They are numbered from 0 to {self._NEGATIVE}.",
            )
        positive = (sirna >= self._TREATMENTS) & (sirna < self._NEGATIVE)
        negative = sirna == self._NEGATIVE
        control = {"positive": positive, "negative": negative, "both": positive | negative}[
            self.controls
        ]
        used = control | (sirna < self.num_classes)
        plate = frame["plate"].str.removeprefix("Plate")
        domain = "rxrx1|" + frame["experiment"]
        if self.domain == "plate":
            domain = domain + "|" + plate
        path = "images/" + frame["experiment"] + "/Plate" + plate + "/" + frame["well"]
        path = path + "_s" + frame["site"] + ".png"
        official = frame["dataset"].map({"train": "train", "val": "val", "test": "new_batch"})
        second = (frame["dataset"] == "train") & (frame["site"] == "2")
        well = "P" + plate + frame["well"] if self.domain == "experiment" else frame["well"]
        table = pd.DataFrame(
            {
                "domain": domain,
                "source": "rxrx1",
                "batch": frame["experiment"],
                "plate": plate if self.domain == "plate" else frame["experiment"],
                "well": well,
                "site": frame["site"],
                "role": control.map({True: "control", False: "query"}),
                "label": sirna.where(~control, -1),
                "path": str(root) + "/" + path,
                "official": official.mask(second, "in_domain"),
            }
        )[used]
        note = f"{int((~used).sum())} sites of controls that are not used"
        return PlateTable(table, self.class_names, self.channels, notes=(note,))
