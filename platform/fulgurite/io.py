"""Files that are safe to write and to name: atomic writes, locks, checksums, data folders."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fulgurite.errors import ConfigError, DataError
from fulgurite.foreign import reading

__all__ = [
    "atomic_write",
    "check_output",
    "checksum",
    "data_path",
    "file_lock",
    "to_file_name",
    "verify_checksum",
    "write_text",
]


_FULL = (errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC)  # errors of writing, without a name
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
    except BaseException as error:
        if isinstance(error, OSError) and (
            error.filename == str(temporary) or (error.filename is None and error.errno in _FULL)
        ):
            error.filename = str(path)  # the name that users know
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with suppress(OSError):
                temporary.unlink()
        raise


def check_output(path: Path, option: str, *suffixes: str) -> None:
    """Refuse a file that the user hardly means, such as a configuration that would be lost.

    Args:
        path: The file that is to be written, or to be replaced.
        option: The option that names it.
        suffixes: What its name may end in; the first is the usual one.

    Raises:
        ConfigError: The path is a folder, or has another suffix.

    Example:
        >>> check_output(Path("a.html"), "--html", ".html", ".htm")
        >>> check_output(Path("config.yaml"), "--html", ".html", ".htm")
        Traceback (most recent call last):
        fulgurite.errors.ConfigError: --html=config.yaml does not end in .html. \
Name a file *.html.
    """
    if path.suffix.lower() not in suffixes:
        raise ConfigError(
            f"{option}={path} does not end in {suffixes[0]}.", f"Name a file *{suffixes[0]}."
        )
    if path.is_dir():
        raise ConfigError(f"{option}={path} is a folder.", f"Name a file *{suffixes[0]} in it.")


def to_file_name(name: str) -> str:
    """Convert a name to one of a file: signs that paths and shells read become underscores.

    Example:
        >>> to_file_name("lab|batch 1|P1")
        'lab_batch_1_P1'
    """
    return re.sub(r"[^\w.+-]", "_", name)


def write_text(path: str | Path, content: str) -> None:
    """Write a text file, in UTF-8, whole or not at all.

    Args:
        path: The file; its folder is created.
        content: The text.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_text(Path(folder) / "a" / "b.txt", "whole")
        ...     (Path(folder) / "a" / "b.txt").read_text()
        'whole'
    """
    with atomic_write(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


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
    with reading(path, "The file", "Give the path of a readable file."), open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


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
    actual = checksum(path, algorithm)
    if actual != expected:
        raise DataError(
            f"The {algorithm} of {path} is {actual}, not {expected}: the file is damaged or "
            "another one.",
            "Fetch it again, or give the checksum of the file that is meant.",
        )


def data_path(path: str | Path, must_exist: bool = True) -> Path:
    """Return where a data file is.

    A relative path is looked for in the current folder, and then in the folder that the
    environment variable ``FULGURITE_DATA`` names. Glob patterns are paths too, absolute or
    relative: they are where something matches them, and come back as they are.

    Raises:
        DataError: Nothing is there or matches, and ``must_exist``; or the path is relative, nothing
            is there in the current folder, and ``FULGURITE_DATA`` is not set.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     data_path(folder) == Path(folder)
        True
    """
    path = Path(path).expanduser()
    if path.is_absolute():
        if must_exist and not _leads_somewhere(path):
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
    if must_exist and not _leads_somewhere(there):
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
