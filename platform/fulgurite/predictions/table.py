"""``predictions.csv``: what ``predictions.npz`` holds as single values, with names for codes.

Axes: n rows of a batch.
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from fulgurite.errors import ConfigError
from fulgurite.io import atomic_write

__all__ = ["Names", "PredictionTable", "name_codes"]

Array = npt.NDArray[Any]

#: Names of the codes 0, 1 … of a key; or several columns of them, by their headings.
Names = Sequence[str] | Mapping[str, Sequence[str]]


def name_codes(codes: Array, names: Sequence[str]) -> Array:
    """Return the names of codes, empty for those that have none.

    Example:
        >>> name_codes(np.array([1, -1]), ["cat", "dog"]).tolist()
        ['dog', '']
    """
    labels = [str(names[c]) if 0 <= c < len(names) else "" for c in codes.ravel().tolist()]
    return np.array(labels, np.str_).reshape(codes.shape)


class PredictionTable:
    """Writes the single values of batches as lines, which grow in a file of their own.

    Args:
        path: The file of lines, until :meth:`close`.
        names: Names of the codes of keys.
        axes: Headings of the second axis of keys whose rows are vectors, such as probabilities.
    """

    def __init__(
        self, path: Path, names: Mapping[str, Names], axes: Mapping[str, Sequence[str]]
    ) -> None:
        self.path, self.names, self.axes = path, names, axes
        #: Why there can be no table; empty where there can.
        self.fault = ""
        self.headings: list[str] = []
        self._file: IO[str] | None = None

    def append(self, blocks: Mapping[str, Sequence[Array]]) -> None:
        """Add the rows of a batch.

        Args:
            blocks: For each key its rows, as arrays one after the other.

        Raises:
            ConfigError: ``axes`` name another number of values than rows have.
        """
        rows = {key: list(parts) for key, parts in blocks.items() if sum(map(len, parts))}
        if self.fault or not rows:
            return
        columns = self._columns(rows)
        if not {*rows} & {*self.names}:
            self.fault = f"no key of {', '.join(self.names)} has rows"
        elif len({len(column) for column in columns.values()}) > 1:
            self.fault = "keys differ in their number of rows"
        elif self.headings and [*columns] != self.headings:
            self.fault = "rows of a key are now one value, now several"
        if self.fault:
            return
        if self._file is None:
            self.headings = [*columns]
            self._file = self.path.open("w", encoding="utf-8", newline="")
            csv.writer(self._file, lineterminator="\n").writerow(self.headings)
        lines = zip(*(_as_text(column) for column in columns.values()), strict=True)
        csv.writer(self._file, lineterminator="\n").writerows(lines)

    def _columns(self, rows: Mapping[str, list[Array]]) -> dict[str, Array]:
        """The columns of a batch by heading; names that several columns tell come first."""
        told: dict[str, Array] = {}
        others: dict[str, Array] = {}
        for key, parts in rows.items():
            if len({part.shape[1:] for part in parts}) > 1:
                continue
            values, names = np.concatenate(parts), self.names.get(key)
            if values.ndim == 2 and key in self.axes:
                others |= self._vectors(key, values)
            elif values.ndim != 1:
                continue
            elif isinstance(names, Mapping):
                others[key] = values
                told |= {heading: name_codes(values, column) for heading, column in names.items()}
            else:
                others[key] = values if names is None else name_codes(values, names)
        return told | {heading: c for heading, c in others.items() if heading not in told}

    def _vectors(self, key: str, values: Array) -> dict[str, Array]:
        axis = self.axes[key]
        if len(axis) != values.shape[1]:
            raise ConfigError(
                f"predict_step returns {values.shape[1]} values in a row of '{key}', and the "
                f"DataModule's prediction_axes name {len(axis)}.",
                "Name each, or leave the key out of prediction_axes.",
            )
        return {f"{key}.{name}": values[:, k] for k, name in enumerate(axis)}

    def close(self, path: Path) -> bool:
        """Put the table where it belongs, if there is one; an older one does not stay.

        Args:
            path: Where that is.
        """
        self.discard()
        if self.fault or not self.headings:
            path.unlink(missing_ok=True)
            return False
        with atomic_write(path) as temporary:
            shutil.copyfile(self.path, temporary)
        return True

    def discard(self) -> None:
        """Close the file of lines."""
        if self._file is not None:
            self._file.close()


def _as_text(column: Array) -> list[str]:
    texts: list[str] = column.astype(np.str_).tolist()  # the shortest that reads back
    return texts
