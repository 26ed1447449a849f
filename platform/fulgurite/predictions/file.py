"""An archive of predictions: what a step returned, checked and split into arrays."""

from __future__ import annotations

import dataclasses
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fulgurite.errors import ConfigError
from fulgurite.io import atomic_write
from fulgurite.predictions.columns import KINDS, Array, Column, kind_of, stack_rows
from fulgurite.predictions.table import Names, PredictionTable, name_codes

__all__ = ["PredictionFile"]


_ACCEPTED = (
    "Return a tensor, a number, a string, or lists, tuples and dictionaries of these: "
    "fulgurite.predictions says how each is written."
)


class PredictionFile:
    """Collects the outputs of ``predict_step`` and writes them as one ``.npz`` file.

    The file appears when :meth:`close` has written all of it; until then the values grow in a
    hidden folder beside it, and memory holds no more than a batch.

    Args:
        path: The file.
        names: Names of the codes 0, 1 … of keys, or columns of such names by their headings.
        who: What returns the outputs, for errors.
        axes: Names of the components of keys whose rows are vectors.
    """

    def __init__(
        self,
        path: Path,
        names: Mapping[str, Names] | None = None,
        who: str = "predict_step",
        axes: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.path, self.who = path, who
        every = dict(names or {})
        #: Names of keys that have one column of them, which the file holds too.
        self.names = {key: n for key, n in every.items() if not isinstance(n, Mapping)}
        self._coded = {*every}
        self.columns: dict[str, Column] = {}
        self.batches = 0
        self._folder = path.with_name(f".{path.name}.parts")
        self.table = PredictionTable(self._folder / "table", every, axes or {}) if every else None

    def append(self, output: Any) -> None:
        """Add a batch's output.

        Raises:
            ConfigError: The output cannot be written, or its keys differ from those of the first
                batch.
        """
        blocks = dict(self.split(output))
        if self.batches and blocks.keys() != self.columns.keys():
            raise ConfigError(
                f"{self.who} returns {_quote_names(blocks)} in batch {self.batches}, and "
                f"{_quote_names(self.columns)} in the first.",
                "Return the same keys in all batches.",
            )
        if blocks:
            self._folder.mkdir(parents=True, exist_ok=True)
        if self.table is not None:
            added = {f"{key}_name" for key in self.names if key in blocks}
            self.table.append({key: rows for key, rows in blocks.items() if key not in added})
        for key, rows in blocks.items():
            if key not in self.columns:
                self.columns[key] = Column(key, self._folder / str(len(self.columns)))
            for part in rows:
                self.columns[key].append(part)
        self.batches += 1

    def split(self, output: Any) -> Iterator[tuple[str, list[Array]]]:
        """The keys of an output, each with arrays whose first axis is rows.

        Raises:
            ConfigError: The output is of a type that cannot be written.
        """
        if output is None:
            return
        keys: set[str] = set()
        for key, rows in self._flat("", output):
            key = key or "prediction"
            for other in (key, *((f"{key}_name",) if key in self.names else ())):
                if other in keys:
                    raise ConfigError(
                        f"{self.who} returns '{other}' twice.", "Name each output differently."
                    )
                keys.add(other)
            if key in self._coded:
                self._check_codes(key, rows)
            yield key, rows
            if key in self.names:
                yield f"{key}_name", [name_codes(part, self.names[key]) for part in rows]
        for key in keys:
            base, _, suffix = key.rpartition(".")
            if suffix in ("lengths", "shapes") and base in keys:
                raise ConfigError(
                    f"{self.who} returns '{key}' beside '{base}'.",
                    f"Name it differently: '{key}' tells where the rows of '{base}' begin.",
                )

    def _check_codes(self, key: str, rows: Sequence[Array]) -> None:
        for codes in rows:
            if codes.size and codes.dtype.kind not in "iu":
                raise ConfigError(
                    f"{self.who} returns {kind_of(codes.dtype)} under '{key}', and the "
                    "DataModule's prediction_names name its integers.",
                    "Return integers, or leave the key out of prediction_names.",
                )

    def _flat(self, key: str, value: Any) -> Iterator[tuple[str, list[Array]]]:
        """Leaves of an output."""
        value = _as_mapping(value)
        if isinstance(value, Mapping):
            for name, part in value.items():
                if not isinstance(name, str | int):
                    raise self._refuse(key, name, "a key of type")
                yield from self._flat(f"{key}.{name}" if key else str(name), part)
        elif isinstance(value, list):
            yield from self._rows(key, value)
        else:
            array = self._array(key, value)
            yield key, [array[None] if array.ndim == 0 else array]

    def _rows(self, key: str, items: list[Any]) -> Iterator[tuple[str, list[Array]]]:
        """Rows of a list: of each key, where its items are dictionaries."""
        if not items:
            yield key, []
            return
        if all(isinstance(item, int | float) for item in items):
            yield key, [self._array(key, np.asarray(items))]  # of one type
            return
        if any(isinstance(_as_mapping(item), Mapping) and not _is_row(item) for item in items):
            tables = [dict(self._leaves(key, item)) for item in items]
            for table in tables:
                if table.keys() != tables[0].keys():
                    raise ConfigError(
                        f"{self.who} returns a list with {_quote_names(tables[0])} and "
                        f"{_quote_names(table)}.",
                        "Give all items of a list the same keys.",
                    )
            for name in tables[0]:
                yield name, stack_rows([table[name] for table in tables])
            return
        yield key, stack_rows([self._array(key, item) for item in items])

    def _leaves(self, key: str, item: Any) -> Iterator[tuple[str, Array]]:
        """Arrays of one row: of each key, where it is a dictionary."""
        item = item if _is_row(item) else _as_mapping(item)
        if not isinstance(item, Mapping):
            yield key, self._array(key, item)
            return
        for name, part in item.items():
            yield from self._leaves(f"{key}.{name}" if key else str(name), part)

    def _array(self, key: str, value: Any) -> Array:
        """A tensor, array, number, string or nested list of these, as an array."""
        if isinstance(value, Tensor):
            if value.layout is not torch.strided or value.is_quantized:
                raise self._refuse(key, value, f"a {value.layout} or quantised")
            value = value.detach().cpu().resolve_conj().resolve_neg()
            if value.dtype == torch.bfloat16 or "float8" in str(value.dtype):
                value = value.float()  # exact; numpy has no such types
            try:
                array = np.asarray(value)
            except TypeError as error:
                raise self._refuse(key, value, f"a {value.dtype}") from error
        elif isinstance(value, np.ndarray | np.generic | bool | int | float | complex | str):
            array = np.asarray(value)
        elif isinstance(value, list | tuple):
            parts = [self._array(key, item) for item in value]
            if len({(part.shape, part.dtype.kind) for part in parts}) > 1:
                raise ConfigError(
                    f"{self.who} returns{_under(key)} a list of lists that differ in length or "
                    "type.",
                    "Return a list with one tensor for each row.",
                )
            array = np.stack(parts) if parts else np.zeros(0, np.float32)
        else:
            raise self._refuse(key, value, "a")
        if array.dtype.kind not in KINDS:
            raise self._refuse(key, value, f"{array.dtype} in a")
        if array.dtype.kind == "U" and isinstance(value, str) and value.endswith("\0"):
            raise self._refuse(key, value, "a zero character at the end of a")
        return array

    def _refuse(self, key: str, value: Any, kind: str) -> ConfigError:
        return ConfigError(
            f"{self.who} returns{_under(key)} {kind} {type(value).__name__}, which cannot be "
            "written.",
            _ACCEPTED,
        )

    def close(self) -> bool:
        """Write the file, and remove what it was collected in; says whether there was anything."""
        try:
            if self.columns:
                self._write(self.path)
                if self.table is not None:
                    self.table.close(self.path.with_suffix(".csv"))
        finally:
            self.discard()
        return bool(self.columns)

    def _write(self, path: Path) -> None:
        with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            for column in self.columns.values():
                column.write(archive)

    def discard(self) -> None:
        """Remove what was collected."""
        for column in self.columns.values():
            column.close()
        if self.table is not None:
            self.table.discard()
        shutil.rmtree(self._folder, ignore_errors=True)


def _as_mapping(value: Any) -> Any:
    """The parts of a dataclass or tuple by name; anything else as it is."""
    if isinstance(value, Mapping):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return dict(zip(getattr(value, "_fields", range(len(value))), value, strict=True))
    return value


def _is_row(item: Any) -> bool:
    """Whether an item of a list is a plain tuple, which is a row as a list is."""
    return isinstance(item, tuple) and not hasattr(item, "_fields")


def _quote_names(keys: Mapping[str, Any]) -> str:
    return ", ".join(f"'{key}'" for key in keys) or "nothing"


def _under(key: str) -> str:
    return f" under '{key}'" if key else ""
