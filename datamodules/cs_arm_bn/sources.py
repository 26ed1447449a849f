"""Interface of plate sources: a table of sites, and a reader of their images."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fulgurite.datamodules.cs_arm_bn.preprocess import Preprocess
from fulgurite.datamodules.cs_arm_bn.site_names import is_address, simplify_paths
from fulgurite.datamodules.cs_arm_bn.site_readers import FileReader, SiteReader
from fulgurite.datamodules.cs_arm_bn.table import PlateTable
from fulgurite.errors import ConfigError, DataError

__all__ = ["PlateSource", "check_channels", "check_images", "locate", "refuse_shared_files"]


class PlateSource(ABC):
    """Plates of one or several laboratories, with queries of K classes and controls.

    A subclass defines the names of classes and channels, which must be cheap, and :meth:`load`.
    """

    @property
    @abstractmethod
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels."""

    @property
    @abstractmethod
    def channels(self) -> tuple[str, ...]:
        """Names of the channels, in the order of the images."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def in_channels(self) -> int:
        """Number of channels."""
        return len(self.channels)

    @property
    def preprocess(self) -> Preprocess:
        """Default preprocessing of these images."""
        return Preprocess()

    @property
    def reader(self) -> SiteReader:
        """Reader of sites."""
        return FileReader(self.in_channels)

    def prepare(self) -> None:
        """Prepare data once per machine for all processes."""
        return  # most sources have nothing to prepare

    def describe_fix(self, path: str) -> str:
        """Return the hint of an error for images that do not exist.

        Args:
            path: Path of one of them.
        """
        return f"Put the images where the table says, or correct the table: {path}."

    @abstractmethod
    def load(self) -> PlateTable:
        """Return the table of sites.

        Raises:
            DataError: A table is missing or inconsistent.
        """


def check_channels(channels: Sequence[str]) -> tuple[str, ...]:
    """Return the names of channels, of which there must be one, each once.

    Raises:
        ConfigError: There is none, or one comes twice.
    """
    if not channels or len(set(channels)) < len(channels):
        raise ConfigError(
            f"The channels are {', '.join(channels) or 'none'}.",
            "Set `--data.init_args.source.init_args.channels` to the name of each channel, once.",
        )
    return tuple(channels)


def check_images(table: PlateTable, source: PlateSource) -> None:
    """Refuse a table if no plate's first image exists, or if it names a file for two sites.

    The reader reports or excludes single missing files; here the paths are of another machine or
    relative to another folder. Addresses (``s3://``) are not looked for.

    Raises:
        DataError: No plate's first image exists, or two sites have one file.
    """
    if not isinstance(source.reader, FileReader):
        return
    first = np.unique(table.domain, return_index=True)[1]
    files = [paths[0] for paths in table.paths(first.astype(np.int64))]
    if not any(is_address(f) or _is_there(f) for f in files):
        raise DataError(
            f"None of the {len(files)} plates has its first image where the plate table says, "
            f"first {files[0]}.",
            source.describe_fix(files[0]),
        )
    refuse_shared_files(table)


def refuse_shared_files(table: PlateTable) -> None:
    """Refuse a file of two sites, one of which it is not the image of.

    Raises:
        DataError: Two sites have one file.
    """
    for name in table.path_columns:
        paths = simplify_paths(table.frame[name])
        if (repeated := paths.duplicated(keep=False)).any():
            path = paths[repeated].iloc[0]
            sites = table.frame[paths == path]
            named = [
                f"{site.domain} {site.well} site {site.site}" for site in sites[:2].itertuples()
            ]
            raise DataError(
                f"The plate table names {path} for {' and for '.join(named)} "
                f"({int(repeated.sum())} sites share a file of the column {name!r}).",
                "Give each site its own image: with one for two, labels of one of them are wrong.",
            )


def _is_there(path: str) -> bool:
    try:
        return os.path.exists(path)
    except ValueError:  # a zero character
        return False


def locate(path: str, root: Path, prefixes: Mapping[str, str]) -> str:
    r"""Return the location of a file that a table names.

    Args:
        path: Path in the table: relative to ``root``, absolute, or an address. Backslashes
            separate folders, as on Windows.
        root: Folder to which relative paths are relative.
        prefixes: Replacements of the beginnings of paths; the first that fits is used.

    Example:
        >>> locate("D:\\plates\\a.tif", Path("/data"), {"D:\\plates": "."})
        '/data/./a.tif'
        >>> locate("s3://bucket/a.tif", Path("/data"), {})
        's3://bucket/a.tif'
    """
    for prefix, replacement in prefixes.items():
        if path.startswith(prefix):
            path = replacement + path[len(prefix) :]
            break
    return path if is_address(path) else os.path.join(root, path.replace("\\", "/"))
