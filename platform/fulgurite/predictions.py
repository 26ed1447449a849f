"""``predictions.npz``: what ``predict_step`` returns, checked at once and written batch by batch.

========================================  ========================================================
what ``predict_step`` returns             what is written
========================================  ========================================================
a tensor                                  the array ``prediction``, all batches one after the other
a dict, a dataclass                       an array for each key; ``a.b`` for nested ones
a tuple, a named tuple                    an array for each part: ``0``, ``1`` …, or by its names
a list                                    a row for each item: tensors, numbers, strings, lists,
                                          or dicts (an array for each of their keys)
a number, a string, a tensor without      a row for each batch
axes
``None``                                  nothing
========================================  ========================================================

Rows of one shape become one array. Rows that differ in their first axis alone (detections, words)
become their concatenation ``key`` and ``key.lengths``, the length of each; rows that differ
otherwise become flat values ``key`` and ``key.shapes``, a shape for each. :func:`read_predictions`
puts rows of both kinds together again. Strings are arrays of fixed width. Nothing is pickled.

Codes get their names beside them, where the DataModule has ``prediction_names``: a mapping of keys
to the names of the numbers 0, 1 …, or to several columns of names by their headings, such as
``{"label": ["cat", "dog"], "index": {"plate": [...], "well": [...]}}``. The names of ``label`` are
the array ``label_name``, empty for other numbers. And all keys with one value in a row are written
as ``predictions.csv``, a line for each row, with names instead of codes and the several columns in
front. Rows of vectors are there too where ``prediction_axes`` of the DataModule names their
components (``{"probabilities": ["cat", "dog"]}``). Read it with ``keep_default_na=False`` where
pandas would take a name such as NA for a missing one.

Axes: N rows.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from fulgurite.errors import ConfigError, DataError
from fulgurite.io import atomic_write
from fulgurite.prediction_csv import Names, PredictionTable, name_codes

__all__ = ["PredictionFile", "PredictionWriter", "read_predictions"]

Array = npt.NDArray[Any]

_ACCEPTED = (
    "Return a tensor, a number, a string, or lists, tuples and dictionaries of these: "
    "fulgurite.predictions says how each is written."
)
_KINDS = "biufcmMU"  # what a .npy file holds without pickles
_BLOCK = 2**16  # strings that are in memory at a time


class _Column:
    """The rows of one key, on disk as they come; only their shapes stay in memory.

    Args:
        key: Its name, for errors.
        path: File of its values.
    """

    def __init__(self, key: str, path: Path) -> None:
        self.key, self.path = key, path
        self.dtype: np.dtype[Any] | None = None
        self.empty_dtype: np.dtype[Any] = np.dtype(
            np.float32
        )  # of rows without values, which fit any
        self.width = 1  # of strings [characters]
        self.runs: list[tuple[int, tuple[int, ...]]] = []  # (rows, shape of each of them)
        self._file: IO[bytes] = path.open("wb")

    def append(self, rows: Array) -> None:
        """Add rows of one shape. Shape: (N, ...)."""
        rows = np.ascontiguousarray(rows)
        self._check(rows)
        if rows.dtype.kind == "U":
            self._append_text(rows)
        else:
            rows.tofile(self._file)
        count, shape = len(rows), rows.shape[1:]
        if self.runs and self.runs[-1][1] == shape:
            count += self.runs.pop()[0]
        if count:
            self.runs.append((count, shape))

    def _check(self, rows: Array) -> None:
        """Refuse rows that cannot lie in one array with those before."""
        dtype = np.dtype("U") if rows.dtype.kind == "U" else rows.dtype
        if not rows.size:
            self.empty_dtype = dtype
            return
        if self.dtype is None:
            self.dtype = dtype
        if dtype != self.dtype:
            raise ConfigError(
                f"predict_step returns {_kind(self.dtype)} and later {_kind(dtype)} under "
                f"'{self.key}'.",
                "Give it one type in all batches, e.g. by making tensors of numbers.",
            )
        axes = {len(shape) for _, shape in self.runs if np.prod(shape)}
        if axes and rows.ndim - 1 not in axes:
            raise ConfigError(
                f"predict_step returns rows with {axes.pop()} axes and later with {rows.ndim - 1} "
                f"under '{self.key}'.",
                "Give rows the same number of axes in all batches.",
            )

    def _append_text(self, rows: Array) -> None:
        for text in rows.ravel().tolist():
            coded = text.encode("utf-32-le", "surrogatepass")
            self.width = max(self.width, len(text))
            self._file.write(len(coded).to_bytes(8, "little") + coded)

    def write(self, archive: zipfile.ZipFile) -> None:
        """Write the values, and the shapes of rows that differ, as members of an archive."""
        self._file.flush()
        rows = sum(count for count, _ in self.runs)
        every = {shape for _, shape in self.runs}
        rests = {shape[1:] for shape in every if np.prod(shape)} or {shape[1:] for shape in every}
        if len(every) <= 1:
            shape = (rows, *next(iter(every), ()))
        elif len(rests) == 1 and all(s and (s[0] == 0 or s[1:] in rests) for s in every):
            lengths = np.concatenate([np.full(n, shape[0], np.int64) for n, shape in self.runs])
            _write_array(archive, f"{self.key}.lengths", lengths)
            shape = (int(lengths.sum()), *rests.pop())
        else:
            axes = max(map(len, every))
            table = [np.tile(_pad_shape(shape, axes), (n, 1)) for n, shape in self.runs]
            _write_array(archive, f"{self.key}.shapes", np.concatenate(table))
            shape = (sum(n * int(np.prod(shape)) for n, shape in self.runs),)
        with _member(archive, self.key, self._final_dtype, shape) as member:
            for block in self._blocks():
                member.write(block)

    @property
    def _final_dtype(self) -> np.dtype[Any]:
        dtype = self.dtype or self.empty_dtype
        return np.dtype(f"<U{self.width}") if dtype.kind == "U" else dtype

    def _blocks(self) -> Iterator[bytes]:
        """The values as they lie in the array."""
        with self.path.open("rb") as file:
            if self.dtype is None or self.dtype.kind != "U":
                while block := file.read(2**20):
                    yield block
                return
            while texts := [
                file.read(int.from_bytes(size, "little")).ljust(4 * self.width, b"\0")
                for size in itertools.takewhile(len, (file.read(8) for _ in range(_BLOCK)))
            ]:
                yield b"".join(texts)

    def close(self) -> None:
        """Close the file of values."""
        self._file.close()


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
        self.columns: dict[str, _Column] = {}
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
                self.columns[key] = _Column(key, self._folder / str(len(self.columns)))
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
                    f"{self.who} returns {_kind(codes.dtype)} under '{key}', and the DataModule's "
                    "prediction_names name its integers.",
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
                yield name, _stack_rows([table[name] for table in tables])
            return
        yield key, _stack_rows([self._array(key, item) for item in items])

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
        if array.dtype.kind not in _KINDS:
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


def _stack_rows(rows: list[Array]) -> list[Array]:
    """Rows stacked where neighbours have one shape and type."""
    groups = itertools.groupby(
        rows, key=lambda row: (row.shape, row.dtype.kind == "U" or row.dtype)
    )
    return [np.stack([*group]) for _, group in groups]


def _kind(dtype: np.dtype[Any]) -> str:
    return "strings" if dtype.kind == "U" else f"{dtype} values"


def _quote_names(keys: Mapping[str, Any]) -> str:
    return ", ".join(f"'{key}'" for key in keys) or "nothing"


def _under(key: str) -> str:
    return f" under '{key}'" if key else ""


def _pad_shape(shape: tuple[int, ...], axes: int) -> Array:
    return np.array([*shape, *[0] * (axes - len(shape))], np.int64)


def _member(
    archive: zipfile.ZipFile, key: str, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> IO[bytes]:
    """Begin an array of an ``.npz`` file; its values follow in C order."""
    member = archive.open(f"{key}.npy", "w", force_zip64=True)
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_2_0(member, header)
    return member


def _write_array(archive: zipfile.ZipFile, key: str, array: Array) -> None:
    with _member(archive, key, array.dtype, array.shape) as member:
        member.write(np.ascontiguousarray(array).tobytes())


def read_predictions(path: str | Path) -> dict[str, Array | list[Array]]:
    """Read a file of predictions: an array for each key, or a list of rows where they differ.

    Raises:
        DataError: The file does not exist, or is damaged.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = PredictionFile(Path(folder) / "predictions.npz")
        ...     file.append({"boxes": [torch.zeros(2, 4), torch.ones(1, 4)], "name": ["a", "b"]})
        ...     _ = file.close()
        ...     found = read_predictions(file.path)
        >>> [boxes.shape for boxes in found["boxes"]], found["name"].tolist()
        ([(2, 4), (1, 4)], ['a', 'b'])
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(
            f"The predictions {path} cannot be read ({error}).",
            "Name a file that `fulgurite predict` wrote.",
        ) from error
    rows: dict[str, Array | list[Array]] = {}
    for key, array in arrays.items():
        base, _, suffix = key.rpartition(".")
        if suffix in ("lengths", "shapes") and base in arrays:
            continue
        if (lengths := arrays.get(f"{key}.lengths")) is not None:
            rows[key] = np.split(array, np.cumsum(lengths))[:-1]
        elif (shapes := arrays.get(f"{key}.shapes")) is not None:
            parts = np.split(array, np.cumsum(shapes.prod(1)))[:-1]
            rows[key] = [p.reshape(s) for p, s in zip(parts, shapes, strict=True)]
        else:
            rows[key] = array
    return rows


class PredictionWriter(Callback):
    """Writes what ``predict_step`` returns to ``predictions.npz``, a file for each data loader.

    One loader and one process write ``predictions.npz``. Of several loaders each has a file
    ``predictions-loader0.npz`` …; of several processes each has ``predictions-0.npz`` … A
    prediction that breaks off leaves what it has in ``predictions.partial.npz``. Tables with names
    are called as these and end in ``.csv``.

    Args:
        folder: Where to; None only checks the outputs.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.files: dict[int, PredictionFile] = {}

    @override
    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write a batch.

        Raises:
            ConfigError: The output is of a kind that cannot be written, or unlike the first.
        """
        if dataloader_idx not in self.files:
            self.files[dataloader_idx] = self._open(trainer, pl_module, dataloader_idx)
        file = self.files[dataloader_idx]
        if self.folder is None:
            list(file.split(outputs))
        else:
            file.append(outputs)

    def _open(self, trainer: Trainer, pl_module: LightningModule, number: int) -> PredictionFile:
        several = trainer.predict_loop.num_dataloaders > 1
        loader = f"-loader{number}" if several else ""
        rank = f"-{trainer.global_rank}" if trainer.world_size > 1 else ""
        data = getattr(trainer, "datamodule", None)
        return PredictionFile(
            (self.folder or Path()) / f"predictions{loader}{rank}.npz",
            getattr(data, "prediction_names", None),
            f"{type(pl_module).__name__}.predict_step",
            getattr(data, "prediction_axes", None),
        )

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish the files, and name them."""
        files, self.files = self.files, {}
        for file in files.values():
            if self.folder is None:
                continue
            if file.close():
                print(f"predict: recorded in {file.path}")
                if file.table is not None and file.table.fault:
                    print(f"predict: there is no table with names: {file.table.fault}")
            else:
                print(f"predict: {file.who} returned nothing to write")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Keep what there is under a name that says that it is not all."""
        files, self.files = self.files, {}
        for file in files.values():
            file.path = file.path.with_name(f"{file.path.stem}.partial.npz")
            with suppress(OSError):  # such as a full disk: the exception itself is what matters
                if file.close():
                    print(
                        f"predict: {file.batches} batches that were done are in {file.path}",
                        file=sys.stderr,
                    )
