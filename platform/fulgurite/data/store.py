"""The cache of what was read: folders of memory-mapped arrays, each written once and whole.

Axes: N entries of a stream.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt
import platformdirs

from fulgurite.errors import DataError, FulguriteError
from fulgurite.io import atomic_write, file_lock

__all__ = ["ArrayStore", "ArrayStream", "cache_folder", "cached_folder", "cached_store"]

_FACTS = "facts.json"


def cache_folder() -> Path:
    """Return the folder of derived files: ``FULGURITE_CACHE``, else the system's for caches.

    That is ``~/.cache/fulgurite`` on Linux, or in ``XDG_CACHE_HOME`` if it is set.

    Example:
        >>> cache_folder().is_absolute()
        True
    """
    root = os.environ.get("FULGURITE_CACHE")
    folder = Path(root).expanduser() if root else platformdirs.user_cache_path("fulgurite")
    return folder.absolute()


def cached_folder(key: str, write: Callable[[Path], None], size: int | None = None) -> Path:
    """Return a folder of the cache, after filling it if the key is new.

    One process of the machine writes at a time; if it is killed, the cache has no such entry.

    Args:
        key: Names the content, so that other content gets another key; may have slashes.
        write: Fills an empty folder.
        size: How large it will be [bytes], where that is known.

    Raises:
        DataError: The cache cannot be written.

    Example:
        >>> import tempfile, unittest.mock
        >>> with tempfile.TemporaryDirectory() as root:
        ...     with unittest.mock.patch.dict(os.environ, FULGURITE_CACHE=root):
        ...         folder = cached_folder("a-1", lambda folder: (folder / "x").touch())
        ...     [file.name for file in folder.iterdir()]
        ['x']
    """
    folder = cache_folder() / key
    if folder.exists():
        return folder
    try:
        with file_lock(folder.with_name(f"{folder.name}.lock")):
            if not folder.exists():
                for left_over in folder.parent.glob(f".{folder.name}.tmp-*"):
                    shutil.rmtree(left_over, ignore_errors=True)  # of a killed process
                with atomic_write(folder) as temporary:
                    temporary.mkdir()
                    _fill(temporary, write)
    except OSError as error:
        if not folder.exists():  # else another rank without a lock was faster
            room = f"{size:,} free bytes" if size else "room"
            raise DataError(
                f"Nothing can be written to the cache {folder.parent} ({error.strerror}).",
                f"Set FULGURITE_CACHE to a folder with {room}.",
            ) from error
    return folder


_FULL = 2**20  # [bytes]; less than any file of a cache is written with


def _fill(folder: Path, write: Callable[[Path], None]) -> None:
    """Write into a folder; HDF5 gives no reason where its disk is full."""
    try:
        write(folder)
    except RuntimeError as error:
        if isinstance(error, FulguriteError) or shutil.disk_usage(folder).free > _FULL:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error


class ArrayStore:
    """Arrays ``NAME.npy`` and facts in a folder; other processes are sent its name alone.

    Args:
        folder: What :func:`cached_store` has written.

    Attributes:
        facts: What is known beside the arrays.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts: dict[str, Any] = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        self._arrays: dict[str, npt.NDArray[Any]] = {}

    def __reduce__(self) -> tuple[type[Self], tuple[Path]]:
        return type(self), (self.folder,)  # else a worker would be sent all arrays

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        """Return an array, memory-mapped and read-only."""
        if name not in self._arrays:
            self._arrays[name] = _map(self.folder / f"{name}.npy", "r")
        return self._arrays[name]

    def copy(self, name: str) -> npt.NDArray[Any]:
        """Return an array whose changed pages are copied: torch wants memory it could write to."""
        return _map(self.folder / f"{name}.npy", "c")


def _map(path: Path, mode: Any) -> npt.NDArray[Any]:
    array: npt.NDArray[Any]
    try:
        array = np.load(path, mmap_mode=mode)
    except ValueError:  # no file can be mapped empty
        array = np.load(path)
        if array.size:
            raise
    return array


_Store = TypeVar("_Store", bound=ArrayStore)


def cached_store(
    key: str,
    write: Callable[[Path], Mapping[str, Any]],
    *,
    size: int | None = None,
    check: Callable[[_Store], object] | None = None,
    store: type[_Store] = ArrayStore,  # type: ignore[assignment]  # of no argument, it is that
) -> _Store:
    """Return a store of the cache, after writing it if the key is new: see :func:`cached_folder`.

    Args:
        key: Names the content.
        write: Writes arrays ``NAME.npy`` into an empty folder and returns the facts.
        size: How large it will be [bytes], where that is known.
        check: Raises an error if what was written is not to be kept.
        store: Class of the store.

    Raises:
        DataError: The cache cannot be written.
    """

    def fill(empty: Path) -> None:
        facts = json.dumps(write(empty))
        (empty / _FACTS).write_text(facts, encoding="utf-8")
        if check is not None:
            check(store(empty))

    return store(cached_folder(key, fill, size))


class ArrayStream:
    """An array of one axis that is written piece by piece, as a file ``.npy``.

    Args:
        path: The file.
        dtype: Data type of the entries.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with ArrayStream(Path(folder) / "a.npy", np.uint16) as stream:
        ...         stream.append(np.arange(3))
        ...         stream.append(np.arange(2))
        ...     np.load(Path(folder) / "a.npy").tolist()
        [0, 1, 2, 0, 1]
    """

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self.dtype = np.dtype(dtype)
        self.count = 0
        self._file = open(path, "wb")  # noqa: SIM115  # closed by __exit__
        self._write_header()

    def __len__(self) -> int:
        return self.count

    def __enter__(self) -> ArrayStream:
        return self

    def append(self, values: npt.NDArray[Any]) -> None:
        """Write entries. Shape: (N,)."""
        self._file.write(np.ascontiguousarray(values, self.dtype).data)
        self.count += len(values)

    def __exit__(self, *_: object) -> None:
        with self._file:
            self._file.seek(0)
            self._write_header()

    def _write_header(self) -> None:
        # NumPy pads headers so that the first axis can grow in place
        descr = np.lib.format.dtype_to_descr(self.dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (self.count,)}
        np.lib.format.write_array_header_1_0(self._file, header)
