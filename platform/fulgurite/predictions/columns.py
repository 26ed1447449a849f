"""Arrays of an archive that grow batch by batch."""

from __future__ import annotations

import itertools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from fulgurite.errors import ConfigError

__all__ = [
    "KINDS",
    "Array",
    "Column",
    "kind_of",
    "open_member",
    "pad_shape",
    "stack_rows",
    "write_array",
]


Array = npt.NDArray[Any]
KINDS = "biufcmMU"  # what a .npy file holds without pickles
_BLOCK = 2**16  # strings that are in memory at a time


class Column:
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
                f"predict_step returns {kind_of(self.dtype)} and later {kind_of(dtype)} under "
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
            write_array(archive, f"{self.key}.lengths", lengths)
            shape = (int(lengths.sum()), *rests.pop())
        else:
            axes = max(map(len, every))
            table = [np.tile(pad_shape(shape, axes), (n, 1)) for n, shape in self.runs]
            write_array(archive, f"{self.key}.shapes", np.concatenate(table))
            shape = (sum(n * int(np.prod(shape)) for n, shape in self.runs),)
        with open_member(archive, self.key, self._final_dtype, shape) as member:
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


def stack_rows(rows: list[Array]) -> list[Array]:
    """Rows stacked where neighbours have one shape and type."""
    groups = itertools.groupby(
        rows, key=lambda row: (row.shape, row.dtype.kind == "U" or row.dtype)
    )
    return [np.stack([*group]) for _, group in groups]


def kind_of(dtype: np.dtype[Any]) -> str:
    """What errors call values of a type."""
    return "strings" if dtype.kind == "U" else f"{dtype} values"


def pad_shape(shape: tuple[int, ...], axes: int) -> Array:
    """A shape with zeros after it. Shape: (axes,)."""
    return np.array([*shape, *[0] * (axes - len(shape))], np.int64)


def open_member(
    archive: zipfile.ZipFile, key: str, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> IO[bytes]:
    """Begin an array of an ``.npz`` file; its values follow in C order."""
    member = archive.open(f"{key}.npy", "w", force_zip64=True)
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_2_0(member, header)
    return member


def write_array(archive: zipfile.ZipFile, key: str, array: Array) -> None:
    """Write an array into an archive."""
    with open_member(archive, key, array.dtype, array.shape) as member:
        member.write(np.ascontiguousarray(array).tobytes())
