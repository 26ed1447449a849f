"""Parquet tables of images, as Hugging Face stores them.

Shapes: N samples, C channels, H W image.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fulgurite.datamodules.fedsir.annotations import cell_text, is_plain_column
from fulgurite.datamodules.fedsir.cache import cached_arrays
from fulgurite.datamodules.fedsir.decoding import (
    EncodedImages,
    check_range,
    decode_image_bytes,
    fit_image,
    split_off_test,
    write_images,
)
from fulgurite.datamodules.fedsir.label_files import number_names
from fulgurite.datamodules.fedsir.samples import Listing
from fulgurite.datamodules.fedsir.sources import ImageArrays
from fulgurite.errors import ConfigError, DataError
from fulgurite.extras import optional_import
from fulgurite.foreign import check_parquet, is_text_column, reading
from fulgurite.io import checksum, data_path
from fulgurite.options import check_options, make_options

__all__ = ["Parquet", "ParquetFiles"]

_OPTION = "--data.init_args.source.init_args"
_REFETCH_HINT = "Fetch the file again, or write it with `Dataset.to_parquet`."
_BATCH = 256  # images in memory at once


@dataclass(frozen=True)
class ParquetFiles:
    """Parquet files, and their columns.

    Args:
        train: File or pattern such as ``femnist/train-*.parquet``, absolute or relative to
            ``FULGURITE_DATA``; files are read in the order of their names.
        test: File or pattern of the test split; by default a part of ``train`` becomes it.
        image: Column with images.
        label: Column with labels: numbers from 0, or names.

    Raises:
        ConfigError: A value is of another type.
    """

    train: str
    test: str | None = None
    image: str = "image"
    label: str = "label"

    def __post_init__(self) -> None:
        check_options(self, f"{_OPTION.removeprefix('--')}.files")


class Parquet(EncodedImages):
    """Parquet files with a column of encoded images and one of labels, as of Hugging Face.

    Images are a structure of ``bytes`` and ``path``, or bytes alone: PNG or JPEG. Class
    names are those of the file's Hugging Face metadata, else those of the labels. All other
    columns of numbers and text can name clients (``Natural``) or groups (``Grouped``). Images are
    decoded once, in one process, into the cache (``FULGURITE_CACHE``); its key is the content of
    the files.

    Args:
        files: The files.
        class_names: Names of the classes; needed for numbered classes if some have no image.
        image_size: Side to which all images are resized [pixels]; by default they must all have
            one size already.
        channels: Number of channels: 3 for colour or 1 for grey; images are converted.
        test_fraction: Fraction of each class that becomes the test split, if there is none.
        train_limit: Keep at most this many training images, balanced by class.
        test_limit: Keep at most this many test images, balanced by class.
        seed: Seed of the test split and of the images kept under the limits.

    Raises:
        ConfigError: A number is out of range, or ``class_names`` has duplicates or orders the
            classes of the metadata anew.
    """

    def __init__(
        self,
        files: ParquetFiles,
        *,
        class_names: list[str] | None = None,
        image_size: int | None = None,
        channels: Literal[1, 3] = 3,
        test_fraction: float = 0.1,
        train_limit: int | None = None,
        test_limit: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            image_size, channels, test_fraction, train_limit, test_limit=test_limit, seed=seed
        )
        if class_names is not None and len(set(class_names)) < len(class_names):
            raise ConfigError(
                f"Two classes of {class_names} have one name.", f"Set `{_OPTION}.class_names`."
            )
        self.files = make_options(ParquetFiles, files)
        self.given_names = class_names
        self._cached_tables: tuple[_ParquetTable, _ParquetTable | None, tuple[str, ...]] | None = (
            None
        )

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self._read_tables()[2])

    def first_size(self) -> tuple[int, int]:
        """Return the size of the first image: see :meth:`EncodedImages.first_size`."""
        name, content = next(self._read_tables()[0].images(self.files.image))
        image, _ = decode_image_bytes(content, name, self.channels, "")
        return image.shape[1], image.shape[2]

    def _read_tables(self) -> tuple[_ParquetTable, _ParquetTable | None, tuple[str, ...]]:
        if self._cached_tables is None:
            files, option = self.files, f"{_OPTION}.files"
            train = _ParquetTable(files.train, f"{option}.train", files.image, files.label)
            test = None
            if files.test is not None:
                test = _ParquetTable(files.test, f"{option}.test", files.image, files.label)
            self._cached_tables = train, test, _choose_class_names(train, test, self.given_names)
        return self._cached_tables

    def read(self) -> ImageArrays:
        """Return all images, memory-mapped."""
        train, test, names = self._read_tables()
        labels = train.label_numbers(names)
        train_rows: list[int] = list(range(len(labels)))
        test_rows: list[int] = []
        if test is None:
            train_rows, test_rows = split_off_test(labels, self.test_fraction, self.seed)
        files = [checksum(path) for table in (train, test) if table for path in table.paths]
        split = None if test else (self.test_fraction, self.seed)
        parts = (
            len(train.paths),
            self.files.image,
            self.files.label,
            names,
            self.side,
            self.channels,
            split,
        )
        key = hashlib.sha256(f"1 {files} {parts}".encode()).hexdigest()[:32]

        def write(target: Path) -> tuple[str, ...]:
            self._write_images(target / "train_images.npy", train, train_rows)
            np.save(target / "train_labels.npy", labels[train_rows].numpy())
            if test is None:
                self._write_images(target / "test_images.npy", train, test_rows)
                np.save(target / "test_labels.npy", labels[test_rows].numpy())
            else:
                test_labels = test.label_numbers(names)
                self._write_images(target / "test_images.npy", test, list(range(len(test_labels))))
                np.save(target / "test_labels.npy", test_labels.numpy())
            return names

        arrays = cached_arrays(f"parquet-{key}", write)
        listing = Listing(len(labels), None, train.columns)
        return replace(
            arrays, listing=listing, train_rows=torch.tensor(train_rows, dtype=torch.int64)
        )

    def _write_images(self, target: Path, table: _ParquetTable, rows: list[int]) -> None:
        size, row_set = self.image_size, set(rows)
        peaks: list[int] = []

        def blocks() -> Iterator[Tensor]:
            for row, (name, content) in enumerate(table.images(self.files.image)):
                if row in row_set:
                    image, highest = decode_image_bytes(content, name, self.channels, "")
                    peaks.append(highest)
                    yield torch.from_numpy(fit_image(image, name, self.side, size)[None].copy())

        title = target.stem.removesuffix("_images")
        write_images(blocks(), (len(rows), self.channels, *size), target, title)
        if title == "train":
            check_range(peaks, self.files.train)


class _ParquetTable:
    """Concatenated rows of parquet files.

    Args:
        pattern: File or pattern.
        option: Argument that names the pattern, as the command line spells it.
        image: Column with images.
        label: Column with labels.

    Attributes:
        paths: Paths of the files.
        labels: Labels as text.
        numbered: Whether labels are numbers.
        columns: Other columns, as text.
        class_names: Class names of Hugging Face's metadata, if any.
    """

    def __init__(self, pattern: str, option: str, image: str, label: str) -> None:
        pq = optional_import("pyarrow.parquet", "federated", f"{option}={pattern}")
        location = data_path(pattern, must_exist=False)
        self.paths = (
            [location]
            if location.is_file()
            else [Path(p) for p in sorted(glob.glob(str(location)))]
        )
        if not self.paths:
            raise DataError(f"There is no parquet file {location}.", f"Set `{option}`.")
        self.labels: list[str] = []
        self.numbered = True
        self.columns: dict[str, list[str]] = {}
        self.class_names: tuple[str, ...] | None = None
        for number, path in enumerate(self.paths):
            with reading(path, "The table", _REFETCH_HINT):
                check_parquet(path)
                with pq.ParquetFile(path) as file:
                    self._add_file(file, path, image, label, is_first=number == 0)
        if not self.labels:
            raise DataError(f"There are no images in {pattern}.", f"Set `{option}`.")

    def _add_file(self, file: Any, path: Path, image: str, label: str, *, is_first: bool) -> None:
        schema = file.schema_arrow
        for name, option in ((image, "image"), (label, "label")):
            if schema.names.count(name) != 1:
                raise DataError(
                    f"The table {path} has no one column {name!r}: it has "
                    f"{', '.join(schema.names)}.",
                    f"Set `{_OPTION}.files.{option}` to the column that is meant.",
                )
        plain = [f.name for f in schema if is_plain_column(f.type) and f.name != image]
        if label not in plain:
            raise ValueError(f"its labels {label!r} are {schema.field(label).type}")
        table = file.read(columns=plain)
        texts = {name: [cell_text(v) for v in table[name].to_pylist()] for name in plain}
        names = _read_metadata_names(schema, label)
        self.numbered &= not is_text_column(schema.field(label).type)
        labels = texts.pop(label)
        if is_first:
            self.columns, self.class_names = texts, names
        elif texts.keys() != self.columns.keys() or names != self.class_names:
            raise ValueError(f"its columns or classes are not those of {self.paths[0].name}")
        else:
            for name, values in texts.items():
                self.columns[name] = self.columns[name] + values
        self.labels += labels

    def label_numbers(self, names: Sequence[str]) -> Tensor:
        """Return labels as class numbers. Shape: (N,)."""
        number = {name: k for k, name in enumerate(names)}
        if self.numbered:
            number = {str(k): k for k in range(len(names))}
        if bad := next((text for text in self.labels if text not in number), None):
            raise DataError(
                f"The label {bad!r} of {self.paths[0].parent} is none of the {len(names)} classes.",
                f"Number classes from 0, or set `{_OPTION}.class_names`.",
            )
        if "" in self.labels:
            raise DataError(
                f"Row {self.labels.index('')} of {self.paths[0].parent} has no label.",
                "Give each image one.",
            )
        return torch.tensor([number[text] for text in self.labels], dtype=torch.int64)

    def images(self, column: str) -> Iterator[tuple[str, bytes]]:
        """Yield the name and bytes of each image."""
        import pyarrow.parquet as pq

        for path in self.paths:
            row = 0
            with reading(path, "The table", _REFETCH_HINT), pq.ParquetFile(path) as file:
                for batch in file.iter_batches(_BATCH, columns=[column]):
                    for value in batch.column(0).to_pylist():
                        content = value.get("bytes") if isinstance(value, dict) else value
                        if not isinstance(content, bytes):
                            raise ValueError(
                                f"its column {column!r} has no bytes of an image in row {row}"
                            )
                        yield f"of row {row} of {path}", content
                        row += 1


def _read_metadata_names(schema: Any, label: str) -> tuple[str, ...] | None:
    """Read the class names of Hugging Face's metadata, if any."""
    content = (schema.metadata or {}).get(b"huggingface")
    if content is None:
        return None
    features = json.loads(content).get("info", {}).get("features", {})
    names = features.get(label, {}).get("names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    if len(set(names)) < len(names):
        raise ValueError("its metadata name two classes alike")
    return tuple(names)


def _choose_class_names(
    train: _ParquetTable, test: _ParquetTable | None, class_names: list[str] | None
) -> tuple[str, ...]:
    """Choose the class names: configured ones, those of the metadata, or those of labels.

    Raises:
        DataError: Labels are numbers, and the metadata of a table number the classes otherwise.
    """
    numbered = [table for table in (train, test) if table and table.numbered]
    if class_names is not None:
        for table in numbered:  # other names are other words for the same classes
            if sorted(table.class_names or ()) == sorted(class_names):
                _refuse_other_numbers(table, class_names)
        return tuple(class_names)
    if train.class_names is not None:
        for table in numbered:
            _refuse_other_numbers(table, train.class_names)
        return train.class_names
    different = {text for table in (train, test) if table for text in table.labels} - {""}
    if not train.numbered:
        return tuple(sorted(different))
    hint = f"Set `{_OPTION}.class_names`, one for each number from 0."
    return number_names(different, str(train.paths[0].parent), hint)


def _refuse_other_numbers(table: _ParquetTable, class_names: Sequence[str]) -> None:
    for number, (own, name) in enumerate(zip(table.class_names or (), class_names, strict=False)):
        if own != name:
            raise DataError(
                f"The metadata of {table.paths[0]} call the class {number} {own!r}, and it is to "
                f"be {name!r}.",
                "Number the classes of all files alike, and leave out "
                f"`{_OPTION}.class_names` or give them in the order of the metadata.",
            )
