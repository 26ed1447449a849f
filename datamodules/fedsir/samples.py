"""Training samples as partitions and label noise see them: labels, rows of the source, groups.

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

#: The number that stands for a true label which nobody knows.
UNKNOWN = -1


@dataclass(frozen=True)
class Listing:
    """The training images of a source in its own order, before any of them is left out.

    That order is the one of the official archive, of an array, or of the sorted paths of a folder;
    files with one line for each image refer to it.

    Attributes:
        total: Number R of training images.
        keys: Their names, such as paths, R different ones; None if the source has no names.
        columns: What else the source says of each image, such as its writer: R texts by name.

    Raises:
        DataError: Keys or columns are not R, or a key is there twice.

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
        """Return what an error calls an image.

        Example:
            >>> Listing(2).describe(1), Listing(1, ("a.png",)).describe(0)
            ('row 1', "'a.png'")
        """
        return f"row {row}" if self.keys is None else repr(self.keys[row])


def _first_repeated(keys: Sequence[str]) -> str:
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            return key
        seen.add(key)
    raise ValueError("no key is repeated")


@dataclass(frozen=True)
class Samples:
    """Training samples: what is known of each when it is dealt to a client or gets a wrong label.

    Attributes:
        labels: Labels as given.
        true: True labels, :data:`UNKNOWN` where nobody knows them.
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
        """The true label where it is known, else the given one: what samples are dealt by.

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

    def describe(self, positions: Tensor, most: int = 3) -> str:
        """Return what an error calls some samples: the first few originals, and how many more.

        Shape:
            - positions: (M,) int64, at least one.

        Example:
            >>> Samples.of(torch.zeros(9, dtype=torch.int64)).describe(torch.arange(5))
            'row 0, row 1, row 2 and 2 more'
        """
        rows = sorted(set(self.rows[positions].tolist()))
        shown = ", ".join(self.listing.describe(row) for row in rows[:most])
        return shown + (f" and {len(rows) - most} more" if len(rows) > most else "")

    def column(self, name: str) -> list[str]:
        """Return what the source says of each sample in one of its columns.

        Raises:
            DataError: The source has no such column.
        """
        if name not in self.listing.columns:
            known = ", ".join(sorted(self.listing.columns))
            raise DataError(
                f"The source says nothing called {name!r} of its images: "
                + (f"its columns are {known}." if known else "it has no columns."),
                "Name one of its columns, or use a source that has it, such as Leaf or Parquet.",
            )
        values = self.listing.columns[name]
        return [values[row] for row in self.rows.tolist()]

    def groups(self, column: str | None = None) -> Tensor:
        """Return the number of each sample's group, from 0 in the order of the samples.

        Args:
            column: A column of the source, such as a patient; if not given, a group is an original
                with its copies.

        Shape:
            - (N,) int64.

        Raises:
            DataError: The source has no such column.

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
