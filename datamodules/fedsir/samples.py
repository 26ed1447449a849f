"""Training samples for partitions and label noise: labels, rows of the source, groups.

Shapes: N samples, R training images of a source, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from fulgurite.errors import DataError

__all__ = ["UNKNOWN", "Listing", "Samples"]

#: The number of an unknown true label.
UNKNOWN = -1


@dataclass(frozen=True)
class Listing:
    """The training images of a source in its order, before any of them is left out.

    The order is that of the official archive, of an array, or of the sorted paths of a folder;
    files with one line for each image refer to it.

    Attributes:
        total: Number R of training images.
        keys: Unique names of the R images, such as paths; None if the source has no names.
        columns: Other columns of the source, such as the writer: R texts each, by name.

    Raises:
        DataError: ``keys`` or a column does not have R entries, or a key is repeated.

    Example:
        >>> Listing(2, ("a.png", "b.png"), {"writer": ("w1", "w1")}).total
        2
    """

    total: int
    keys: Sequence[str] | None = None
    columns: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lengths = {name: len(values) for name, values in self.columns.items()}
        if self.keys is not None:
            lengths["key"] = len(self.keys)
        for name, length in lengths.items():
            if length != self.total:
                raise DataError(
                    f"There are {length} values of {name!r} for {self.total} training images.",
                    "Give one for each image.",
                )
        if self.keys is not None and len(set(self.keys)) < self.total:
            raise DataError(
                f"Two training images are called {_first_repeated(self.keys)!r}.",
                "Give each image its own name.",
            )

    def describe(self, row: int) -> str:
        """Return the description of an image in errors.

        Example:
            >>> Listing(2).describe(1), Listing(1, ("a.png",)).describe(0)
            ('row 1', "'a.png'")
        """
        return f"row {row}" if self.keys is None else repr(self.keys[row])


def _first_repeated(keys: Sequence[str]) -> str:
    unique: set[str] = set()
    for key in keys:
        if key in unique:
            return key
        unique.add(key)
    raise ValueError("no key is repeated")


@dataclass(frozen=True)
class Samples:
    """Training samples, with their labels and their rows in the source.

    Attributes:
        labels: Given labels.
        true: True labels, or :data:`UNKNOWN`.
        rows: Row of each sample's original in ``listing``; augmented copies share one.
        listing: The training images of the source in its own order.
        class_names: Names of the C classes.

    Shape:
        - labels, true, rows: (N,) int64.

    Example:
        >>> samples = Samples.of(torch.tensor([1, 0, 1]))
        >>> len(samples), samples.rows.tolist(), samples.classes.tolist()
        (3, [0, 1, 2], [1, 0, 1])
    """

    labels: Tensor
    true: Tensor
    rows: Tensor
    listing: Listing
    class_names: tuple[str, ...]

    @classmethod
    def of(cls, labels: Tensor, class_names: tuple[str, ...] | None = None) -> Samples:
        """Return samples of true labels alone, in the order of their source.

        Shape:
            - labels: (N,) int64.
        """
        if class_names is None:
            class_names = tuple(map(str, range(int(labels.max()) + 1 if len(labels) else 0)))
        rows = torch.arange(len(labels))
        return cls(labels, labels, rows, Listing(len(labels)), class_names)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def classes(self) -> Tensor:
        """The true label where it is known, else the given one; partitions use it.

        Shape:
            - (N,) int64.
        """
        return torch.where(self.true == UNKNOWN, self.labels, self.true)

    def take(self, index: Tensor) -> Samples:
        """Return some of the samples, in the order of ``index``.

        Shape:
            - index: (M,) int64 positions.
        """
        return replace(
            self, labels=self.labels[index], true=self.true[index], rows=self.rows[index]
        )

    def describe(self, positions: Tensor, limit: int = 3) -> str:
        """Return the description of samples in errors: the first originals, and a count of others.

        Shape:
            - positions: (M,) int64, at least one.

        Example:
            >>> Samples.of(torch.zeros(9, dtype=torch.int64)).describe(torch.arange(5))
            'row 0, row 1, row 2 and 2 more'
        """
        rows = sorted(set(self.rows[positions].tolist()))
        text = ", ".join(self.listing.describe(row) for row in rows[:limit])
        return text + (f" and {len(rows) - limit} more" if len(rows) > limit else "")

    def column(self, name: str) -> list[str]:
        """Return the values of a column of the source for each sample.

        Raises:
            DataError: The source has no column of this name.
        """
        if name not in self.listing.columns:
            columns = ", ".join(sorted(self.listing.columns))
            raise DataError(
                f"The source says nothing called {name!r} of its images: "
                + (f"its columns are {columns}." if columns else "it has no columns."),
                "Name one of its columns, or use a source that has it, such as Leaf or Parquet.",
            )
        values = self.listing.columns[name]
        return [values[row] for row in self.rows.tolist()]

    def groups(self, column: str | None = None) -> Tensor:
        """Return the number of each sample's group, from 0 in the order of the samples.

        Args:
            column: Column of the source, such as a patient; by default a group is an original with
                its copies.

        Shape:
            - (N,) int64.

        Raises:
            DataError: The source has no column of this name.

        Example:
            >>> samples = Samples.of(torch.tensor([1, 0, 1])).take(torch.tensor([2, 0, 2]))
            >>> samples.groups().tolist()
            [0, 1, 0]
        """
        names = self.rows.tolist() if column is None else self.column(column)
        number: dict[int | str, int] = {}
        return torch.from_numpy(
            np.array([number.setdefault(name, len(number)) for name in names], np.int64)
        )
