"""Plates of a user that are in no split, read with the classes and channels of a training."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from fulgurite.datamodules.cs_arm_bn.embeddings import EmbeddedPlates
from fulgurite.datamodules.cs_arm_bn.jump import JumpPlates
from fulgurite.datamodules.cs_arm_bn.sources import PlateSource
from fulgurite.datamodules.cs_arm_bn.table_files import refuse_misspelt_columns
from fulgurite.datamodules.cs_arm_bn.tables import CsvPlates, ImageFiles, RxRx1Plates
from fulgurite.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["InputPlates", "find_input_plates"]

_SUFFIXES = (".csv", ".csv.gz", ".parquet")


class InputPlates(CsvPlates):
    """A table of plates to predict: that of :class:`CsvPlates`, in which labels are optional.

    Args:
        path: The table. Paths of images are relative to its folder.
        channels: Channels of the training, in its order.
        classes: Classes of the training, in its order.
        files: Of what kind images are.
        exclude: Words for sites to leave out and count, as in training.
    """

    hints = MappingProxyType(
        {
            **CsvPlates.hints,
            "unknown_label": "Leave the label empty: the classes are those of the training",
        }
    )

    def __init__(
        self,
        path: Path,
        channels: Sequence[str],
        classes: Sequence[str],
        *,
        files: ImageFiles,
        exclude: Sequence[str],
    ) -> None:
        super().__init__(
            str(path), list(channels), classes=list(classes), files=files, exclude=list(exclude)
        )

    def read_file(self) -> pd.DataFrame:
        """Return the table, with an empty column of labels if there is none."""
        frame = super().read_file()
        refuse_misspelt_columns(frame, ["label"], self.path)
        return frame if "label" in frame.columns else frame.assign(label=None)

    def describe_fix(self, path: str) -> str:
        """Return a hint for missing images: see :meth:`PlateSource.describe_fix`."""
        return f"Write paths that are relative to the folder of {self.path}, or absolute ones."


def find_input_plates(
    path: Path, source: PlateSource, *, channels: Sequence[str], classes: Sequence[str]
) -> PlateSource:
    """Return the source of the plates that ``--input`` names.

    Args:
        path: A table, as of :class:`CsvPlates`; or a folder in the layout of the training source,
            where that is one of JUMP or RxRx1.
        source: The training source.
        channels: Channels of the training.
        classes: Classes of the training.

    Raises:
        ConfigError: The training read embeddings in place of images.
        DataError: The path is neither.
    """
    if isinstance(source, EmbeddedPlates):
        raise ConfigError(
            f"The network was trained on embeddings, and --input={path} names plates of images.",
            "Leave --input out, and name the table and its embeddings in --data.init_args.source.",
        )
    if path.is_file() and path.name.lower().endswith(_SUFFIXES):
        files, exclude = ImageFiles(), frozenset[str]()
        if isinstance(source, CsvPlates):
            files, exclude = replace(source.files, root=None), source.exclude
        return InputPlates(path, channels, classes, files=files, exclude=sorted(exclude))
    kind = type(source).__name__
    if path.is_dir() and isinstance(source, JumpPlates | RxRx1Plates):
        other = copy.copy(source)
        other.root = str(path)
        if isinstance(other, JumpPlates):
            other.selection = replace(other.selection, sources=None, plates=None)
            other.forget_tables()
        return other
    problem = "is a folder" if path.is_dir() else f"ends with none of {', '.join(_SUFFIXES)}"
    raise DataError(
        f"--input={path} {problem}, and no plates of {kind} can be read from it.",
        "Name a table with a row for each site; `fulgurite plates template` writes an example.",
    )
