"""Files that are safe to write and safe to read: atomic writes, checksums, restricted pickles."""

from __future__ import annotations

import codecs
import glob
import hashlib
import os
import pickle
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from fulgurite.errors import CheckpointError, DataError

__all__ = [
    "NUMPY_GLOBALS",
    "atomic_write",
    "cache_folder",
    "cached_folder",
    "checksum",
    "data_path",
    "file_lock",
    "load_plain",
    "restricted_load",
    "verify_checksum",
]


class _Dtype:
    """Stands in for ``numpy.dtype``, whose own state could forge pointers."""

    def __init__(self, spec: Any, *_: Any) -> None:
        spec = spec.decode() if isinstance(spec, bytes) else spec
        if not (isinstance(spec, str) and re.fullmatch("[|<>=]?[biuf][0-9]{1,2}", spec)):
            raise pickle.UnpicklingError(f"it holds an array of {spec!r}")
        self.value = np.dtype(spec)

    def __setstate__(self, state: Any) -> None:
        order: Any = state[1].decode() if isinstance(state[1], bytes) else state[1]
        self.value = self.value.newbyteorder(order)


class _Array(np.ndarray[Any, np.dtype[Any]]):
    """An array of numbers that accepts only a checked type."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        if not isinstance(dtype, _Dtype) or not isinstance(raw, bytes):
            raise pickle.UnpicklingError("it holds an array that is not of numbers")
        super().__setstate__((1, shape, dtype.value, fortran, raw))


def _reconstruct(*_: Any) -> _Array:
    return _Array((0,), np.uint8)


#: What a pickle of arrays of numbers needs: (module, name) in the pickle -> what is used for it.
NUMPY_GLOBALS: Mapping[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): codecs.encode,  # bytes, in protocols 0 to 2
}

_DIGEST_BY_LENGTH = {32: "md5", 64: "sha256"}


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path that becomes ``path`` if the block succeeds, and vanishes if not.

    The block may create a file or a folder there. A file replaces what was there before; a folder
    does so only if the old one is empty. Parents are created.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_write(Path(folder) / "a.txt") as temporary:
        ...         _ = temporary.write_text("whole")
        ...     (Path(folder) / "a.txt").read_text()
        'whole'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:12]}")
    try:
        yield temporary
        for file in [temporary, *temporary.rglob("*")] if temporary.is_dir() else [temporary]:
            descriptor = os.open(file, os.O_RDONLY)
            try:  # else a power cut may leave the new name on empty contents
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        temporary.replace(path)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with suppress(OSError):
                temporary.unlink()
        raise


@contextmanager
def file_lock(path: str | Path) -> Iterator[None]:
    """Hold a lock that a killed process loses: others of the machine wait for it.

    Where there are no locks (some network folders, Windows) nobody waits, so what is done under it
    must be safe to do twice.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, file_lock(Path(folder) / "a.lock"):
        ...     pass
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        if os.name == "posix":
            import fcntl

            with suppress(OSError):
                # not `flock`, which a killed process's orphaned workers would go on holding
                fcntl.lockf(file, fcntl.LOCK_EX)
        yield


class _RestrictedUnpickler(pickle.Unpickler):
    """An unpickler that finds only the named globals."""

    def __init__(
        self, file: IO[bytes], allowed: Mapping[tuple[str, str], Any], encoding: str
    ) -> None:
        super().__init__(file, encoding=encoding)
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self._allowed[module, name]


def restricted_load(
    file: IO[bytes],
    *,
    allowed: Mapping[tuple[str, str], Any] = NUMPY_GLOBALS,
    name: str = "",
    encoding: str = "bytes",
) -> Any:
    """Read a pickle that may name only the ``allowed`` globals, so that it can run no other code.

    Args:
        file: The open pickle.
        allowed: (module, name) in the pickle -> the object that is used for it.
        name: What errors call the file; its own name if empty.
        encoding: How Python 2 strings are read (``bytes`` leaves them undecoded).

    Raises:
        DataError: The pickle names another global, is truncated, or is no pickle.

    Example:
        >>> import io
        >>> restricted_load(io.BytesIO(pickle.dumps({"a": [1, 2]})))
        {'a': [1, 2]}
    """
    name = name or str(getattr(file, "name", "the stream"))
    try:
        return _RestrictedUnpickler(file, allowed, encoding).load()
    except Exception as error:  # a damaged pickle raises nearly any exception
        raise DataError(
            f"The pickle {name} was refused: {error or type(error).__name__}.",
            "Fetch the original file again; if it is another format, use the reader made for it.",
        ) from error


def load_plain(
    path: str | Path, where: str, mend: str = "Name a file, or give null.", **options: Any
) -> Any:
    """Read a file that ``torch.save`` wrote: tensors and plain types, onto the CPU.

    Nothing in the file is executed.

    Args:
        path: The file.
        where: Who asks for it, as the user spells it; named in errors.
        mend: What to do where there is no such file.
        options: Of ``torch.load``.

    Raises:
        CheckpointError: There is no such file, it is damaged, or it holds anything else.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     torch.save({"a": torch.ones(2)}, file.name)
        ...     load_plain(file.name, "weights")
        {'a': tensor([1., 1.])}
    """
    import torch

    if not Path(path).is_file():
        raise CheckpointError(f"{where}={path} is not a file.", mend)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, **options)
    except Exception as error:  # a damaged file raises nearly any
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{where}={path} cannot be read as plain tensors ({reason}).",
            "It may be truncated, or written by something else than torch.save: use another.",
        ) from error


def checksum(path: str | Path, algorithm: str = "sha256") -> str:
    """Return the hexadecimal digest of a file.

    Raises:
        DataError: The file cannot be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "a").write_bytes(b"abc")
        ...     checksum(Path(folder) / "a", "md5")
        '900150983cd24fb0d6963f7d28e17f72'
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, algorithm).hexdigest()
    except OSError as error:
        raise DataError(
            f"The file {path} cannot be read ({error.strerror}).",
            "Give the path of a readable file.",
        ) from error


def verify_checksum(path: str | Path, expected: str) -> None:
    """Check a file against a digest, an MD5 or a SHA-256 by its length.

    Raises:
        DataError: The digest differs or has no known length, or the file cannot be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "a").write_bytes(b"abc")
        ...     verify_checksum(Path(folder) / "a", "900150983cd24fb0d6963f7d28e17f72")
    """
    expected = expected.strip().lower()
    algorithm = _DIGEST_BY_LENGTH.get(len(expected))
    if algorithm is None:
        raise DataError(
            f"The checksum {expected!r} is neither an MD5 (32 digits) nor a SHA-256 (64 digits).",
            "Give the hexadecimal digest, or `null` to check nothing.",
        )
    found = checksum(path, algorithm)
    if found != expected:
        raise DataError(
            f"The {algorithm} of {path} is {found}, not {expected}: the file is damaged or another "
            "one.",
            "Fetch it again, or give the checksum of the file that is meant.",
        )


def data_path(path: str | Path, must_exist: bool = True) -> Path:
    """Return where a data file is.

    A relative path is looked for in the current folder, and then in the folder that the
    environment variable ``FULGURITE_DATA`` names. Glob patterns are paths too: they are where
    something matches them.

    Raises:
        DataError: Nothing is there and ``must_exist``, or the path is relative, nothing is there
            in the current folder, and ``FULGURITE_DATA`` is not set.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     data_path(folder) == Path(folder)
        True
    """
    path = Path(path).expanduser()
    if path.is_absolute():
        if must_exist and not path.exists():
            raise DataError(
                f"There is no data at {path}.",
                "Put it there, or point the `path` of the source to it.",
            )
        return path
    here = path.absolute()
    root = os.environ.get("FULGURITE_DATA")
    if not root:
        if _leads_somewhere(here):
            return here
        raise DataError(
            f"There is no data at {here}, and FULGURITE_DATA is not set.",
            "Put it there, set FULGURITE_DATA to the folder that holds the data, or give an "
            "absolute path.",
        )
    there = (Path(root).expanduser() / path).absolute()
    if _leads_somewhere(here):
        if _leads_somewhere(there) and not _is_same(here, there):
            warnings.warn(
                f"{path} is both in the current folder and in FULGURITE_DATA: {here} is read, not "
                f"{there}. An absolute path says which is meant.",
                stacklevel=2,
            )
        return here
    if must_exist and not there.exists():
        raise DataError(
            f"There is no data at {there}, nor at {here}.",
            "Put it there, or point FULGURITE_DATA (or the `path` of the source) to it.",
        )
    return there


def _leads_somewhere(path: Path) -> bool:
    """Whether a path, or a file that it matches as a pattern, exists."""
    if path.exists():
        return True
    return glob.has_magic(str(path)) and any(glob.iglob(str(path), recursive=True))


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:  # patterns
        return one.resolve() == other.resolve()


def cache_folder() -> Path:
    """Return the folder of derived files: ``FULGURITE_CACHE``, else ``~/.cache/fulgurite``.

    Example:
        >>> cache_folder().is_absolute()
        True
    """
    root = os.environ.get("FULGURITE_CACHE")
    return (Path(root).expanduser() if root else Path.home() / ".cache" / "fulgurite").absolute()


def cached_folder(key: str, write: Callable[[Path], None], size: int | None = None) -> Path:
    """Return a folder of the cache, after filling it if the key is new.

    One process of the machine writes at a time; if it is killed, the cache has no such entry.

    Args:
        key: Names the content, so that other content gets another key.
        write: Fills an empty folder.
        size: How large it will be [bytes], where that is known.

    Raises:
        DataError: The cache cannot be written.

    Example:
        >>> import tempfile, unittest.mock
        >>> with tempfile.TemporaryDirectory() as root:
        ...     with unittest.mock.patch.dict(os.environ, FULGURITE_CACHE=root):
        ...         made = cached_folder("a-1", lambda folder: (folder / "x").touch())
        ...     [file.name for file in made.iterdir()]
        ['x']
    """
    folder = cache_folder() / key
    if folder.exists():
        return folder
    try:
        with file_lock(folder.with_name(f"{key}.lock")):
            if not folder.exists():
                for left_over in folder.parent.glob(f".{key}.tmp-*"):
                    shutil.rmtree(left_over, ignore_errors=True)  # of a killed process
                with atomic_write(folder) as temporary:
                    temporary.mkdir()
                    write(temporary)
    except OSError as error:
        if not folder.exists():  # else another rank without a lock was faster
            room = f"{size:,} free bytes" if size else "room"
            raise DataError(
                f"Nothing can be written to the cache {folder.parent} ({error.strerror}).",
                f"Set FULGURITE_CACHE to a folder with {room}.",
            ) from error
    return folder
