"""Zip archives of others."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fulgurite.foreign.reading import expansion_limit

__all__ = ["check_archive", "open_archive", "read_member"]

_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def check_archive(archive: zipfile.ZipFile, size: int, names: Iterable[str] | None = None) -> int:
    """Check what an archive says of its members, and return how many bytes they are in all.

    Args:
        archive: The open zip.
        size: Size of its file [bytes].
        names: Names of the members to check; all by default.

    Raises:
        ValueError: A member is encrypted, compressed in an unusual way or named twice, or they
            expand too much.
        KeyError: The archive has no member of that name.
    """
    members = archive.infolist() if names is None else [archive.getinfo(name) for name in names]
    if len({member.filename for member in members}) < len(members):
        raise ValueError("it holds two members of one name")
    for member in members:
        if member.flag_bits & 0x1:
            raise ValueError(f"{member.filename} is encrypted")
        if member.compress_type not in _METHODS:
            raise ValueError(
                f"{member.filename} is compressed by method {member.compress_type}: only stored "
                "and deflated members are read"
            )
    total = sum(member.file_size for member in members)
    if total > expansion_limit(size):
        raise ValueError(f"{size:,} bytes expand to {total:,}")
    return total


@contextmanager
def open_archive(path: str | Path) -> Iterator[tuple[zipfile.ZipFile, int]]:
    """Open a zip; gives it and the size of its file [bytes]."""
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        yield archive, os.fstat(file.fileno()).st_size


def read_member(archive: zipfile.ZipFile, name: str, size: int) -> bytes:
    """Read one member of a zip whole.

    Args:
        archive: The open zip.
        name: Name of the member.
        size: Size of the zip's file [bytes].

    Raises:
        ValueError: The member fails :func:`check_archive`.
        Exception: What ``zipfile`` and ``zlib`` raise.
    """
    check_archive(archive, size, [name])
    return archive.read(name)
