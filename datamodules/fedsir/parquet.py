"""Parquet tables of images, as Hugging Face stores them.

Shapes: N samples, C channels, H W image.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fulgurite.datamodules.fedsir.annotations import cell_text, is_plain_column, number_names
from fulgurite.datamodules.fedsir.cache import cached_arrays
from fulgurite.datamodules.fedsir.decoding import (
    EncodedImages,
    check_range,
    decode_image_bytes,
    fit_image,
    split_off_test,
    write_images,
)
from fulgurite.datamodules.fedsir.samples import Listing
from fulgurite.datamodules.fedsir.sources import ImageArrays
from fulgurite.errors import ConfigError, DataError, MissingExtraError
from fulgurite.foreign import check_parquet, reading
from fulgurite.io import checksum, data_path

__all__ = ["Parquet"]

_OPTION = "--data.init_args.source.init_args"
_AGAIN = "Fetch the file again, or write it with `Dataset.to_parquet`."
_BATCH = 256  # images that are in memory at once


class Parquet(EncodedImages):
    """Parquet files with a column of encoded images and one of labels, as Hugging Face has them.

    Images are a structure of ``bytes`` and ``path``, or bytes alone: PNG or JPEG. Classes have the
    names that the file's Hugging Face metadata give, else those that the labels are. All other
    columns of numbers and text can name clients (``Natural``) or groups (``Grouped``). Images are
    decoded once, in one process, into the cache (``FULGURITE_CACHE``); its key is the content of
    the files.

    Args:
        train: A file or pattern such as ``femnist/train-*.parquet``, absolute or relative to
            ``FULGURITE_DATA``; files are read in the order of their names.
        test: The same for the test split; if not given, a part of ``train`` becomes it.
        image: The column with images.
        label: The column with labels: numbers from 0, or names.
        class_names: Names of the classes; needed for numbers of which some have no image.
        image_size: Side to which all images are resized [pixels]; if not given, they must all have
            one size already.
        channels: 3 for colour or 1 for grey; images are converted.
        test_fraction: Fraction of each class that becomes the test split, if there is none.
        train_limit: Keep at most this many training images, balanced by class.
        test_limit: Keep at most this many test images, balanced by class.
        seed: Seed of these choices.

    Raises:
        ConfigError: An argument is out of range.
    """

    def __init__(
        self,
        train: str,
        test: str | None = None,
        image: str = "image",
        label: str = "label",
        class_names: list[str] | None = None,
        image_size: int | None = None,
        channels: Literal[1, 3] = 3,
        test_fraction: float = 0.1,
        train_limit: int | None = None,
        test_limit: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(image_size, channels, test_fraction, train_limit, test_limit, seed)
        if class_names is not None and len(set(class_names)) < len(class_names):
            raise ConfigError(
                f"Two classes of {class_names} have one name.", f"Set `{_OPTION}.class_names`."
            )
        self.train, self.test, self.image, self.label = train, test, image, label
        self.given_names = class_names
        self._known: tuple[_Table, _Table | None, tuple[str, ...]] | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self._tables()[2])

    def first_size(self) -> tuple[int, int]:
        """See :meth:`EncodedImages.first_size`."""
        name, content = next(self._tables()[0].images(self.image))
        image, _ = decode_image_bytes(content, name, self.channels, "")
        return image.shape[1], image.shape[2]

    def _tables(self) -> tuple[_Table, _Table | None, tuple[str, ...]]:
        if self._known is None:
            train = _Table(self.train, f"{_OPTION}.train", self.image, self.label)
            test = None
            if self.test is not None:
                test = _Table(self.test, f"{_OPTION}.test", self.image, self.label)
            self._known = train, test, _class_names(train, test, self.given_names)
        return self._known

    def read(self) -> ImageArrays:
        """Return all images, memory-mapped."""
        train, test, names = self._tables()
        labels = train.label_numbers(names)
        kept: list[int] = list(range(len(labels)))
        tested: list[int] = []
        if test is None:
            kept, tested = split_off_test(labels, self.test_fraction, self.seed)
        files = [checksum(path) for table in (train, test) if table for path in table.paths]
        split = None if test else (self.test_fraction, self.seed)
        parts = (len(train.paths), self.image, self.label, names, self.side, self.channels, split)
        key = hashlib.sha256(f"1 {files} {parts}".encode()).hexdigest()[:32]

        def write(target: Path) -> tuple[str, ...]:
            self._write(target / "train_images.npy", train, kept)
            np.save(target / "train_labels.npy", labels[kept].numpy())
            if test is None:
                self._write(target / "test_images.npy", train, tested)
                np.save(target / "test_labels.npy", labels[tested].numpy())
            else:
                every = test.label_numbers(names)
                self._write(target / "test_images.npy", test, list(range(len(every))))
                np.save(target / "test_labels.npy", every.numpy())
            return names

        arrays = cached_arrays(f"parquet-{key}", write)
        listing = Listing(len(labels), None, train.columns)
        return replace(arrays, listing=listing, train_rows=torch.tensor(kept, dtype=torch.int64))

    def _write(self, target: Path, table: _Table, rows: list[int]) -> None:
        size, wanted, peaks = self.image_size, set(rows), [-1]

        def blocks() -> Iterator[Tensor]:
            for row, (name, content) in enumerate(table.images(self.image)):
                if row in wanted:
                    image, highest = decode_image_bytes(content, name, self.channels, "")
                    peaks[0] = max(peaks[0], highest)
                    yield torch.from_numpy(fit_image(image, name, self.side, size)[None].copy())

        title = target.stem.removesuffix("_images")
        write_images(blocks(), (len(rows), self.channels, *size), target, title)
        if title == "train":
            check_range(peaks[0], self.train)


class _Table:
    """The rows of some parquet files, one after the other.

    Args:
        pattern: A file or pattern.
        option: The argument that names it, as the command line spells it.
        image: The column with images.
        label: The column with labels.

    Attributes:
        paths: The files.
        labels: Their labels as text.
        numbered: Whether labels are numbers.
        columns: Other columns, as text.
        class_names: Those of Hugging Face's metadata.
    """

    def __init__(self, pattern: str, option: str, image: str, label: str) -> None:
        try:
            import pyarrow.parquet as pq
        except ImportError as error:
            raise MissingExtraError(
                "Reading parquet needs the package pyarrow.", "pip install 'fulgurite[federated]'"
            ) from error
        place = data_path(pattern, must_exist=False)
        self.paths = (
            [place] if place.is_file() else [Path(p) for p in sorted(glob.glob(str(place)))]
        )
        if not self.paths:
            raise DataError(f"There is no parquet file {place}.", f"Set `{option}`.")
        self.labels: list[str] = []
        self.numbered = True
        self.columns: dict[str, list[str]] = {}
        self.class_names: tuple[str, ...] | None = None
        for number, path in enumerate(self.paths):
            with reading(path, "The table", _AGAIN):
                check_parquet(path)
                with pq.ParquetFile(path) as file:
                    self._add(file, path, image, label, number == 0)
        if not self.labels:
            raise DataError(f"There are no images in {pattern}.", f"Set `{option}`.")

    def _add(self, file: Any, path: Path, image: str, label: str, is_first: bool) -> None:
        import pyarrow as pa

        schema = file.schema_arrow
        for name, option in ((image, "image"), (label, "label")):
            if schema.names.count(name) != 1:
                raise DataError(
                    f"The table {path} has no one column {name!r}: it has "
                    f"{', '.join(schema.names)}.",
                    f"Set `{_OPTION}.{option}` to the column that is meant.",
                )
        plain = [f.name for f in schema if is_plain_column(f.type) and f.name != image]
        if label not in plain:
            raise ValueError(f"its labels {label!r} are {schema.field(label).type}")
        table = file.read(columns=plain)
        texts = {name: [cell_text(v) for v in table[name].to_pylist()] for name in plain}
        names = _metadata_names(schema, label)
        kind = schema.field(label).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        self.numbered &= not (pa.types.is_string(kind) or pa.types.is_large_string(kind))
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
        """Return the name and bytes of each image in turn."""
        import pyarrow.parquet as pq

        for path in self.paths:
            row = 0
            with reading(path, "The table", _AGAIN), pq.ParquetFile(path) as file:
                for batch in file.iter_batches(_BATCH, columns=[column]):
                    for value in batch.column(0).to_pylist():
                        content = value.get("bytes") if isinstance(value, dict) else value
                        if not isinstance(content, bytes):
                            raise ValueError(
                                f"its column {column!r} has no bytes of an image in row {row}"
                            )
                        yield f"of row {row} of {path}", content
                        row += 1


def _metadata_names(schema: Any, label: str) -> tuple[str, ...] | None:
    """Names of classes that Hugging Face's metadata give, if they do."""
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


def _class_names(train: _Table, test: _Table | None, given: list[str] | None) -> tuple[str, ...]:
    """Names of the classes: given ones, those of the metadata, or those that labels are."""
    if given is not None:
        return tuple(given)
    if train.class_names is not None:
        return train.class_names
    different = {text for table in (train, test) if table for text in table.labels} - {""}
    if not train.numbered:
        return tuple(sorted(different))
    hint = f"Set `{_OPTION}.class_names`, one for each number from 0."
    return number_names(different, str(train.paths[0].parent), hint)
