"""JSON and compressed text of others."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

from fulgurite.foreign.reading import expansion_limit

__all__ = ["BoundedReader", "open_compressed", "read_json"]

_MOST_TEXT = 48 << 20  # of JSON, which takes twenty times its size in memory [bytes]
_CHUNK = 1 << 20


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it names {twice[:80]!r} twice")
    return content


def read_json(source: str | Path | bytes) -> Any:
    """Read JSON of a file, or its bytes, in UTF-8; an object may have each name once.

    Raises:
        ValueError: The content is not JSON, is larger than 48 MiB, or repeats a name in an object.
        OSError: The file cannot be opened.

    Example:
        >>> read_json(b'{"a": [1, 2]}')
        {'a': [1, 2]}
    """
    if not isinstance(source, bytes):
        with open(source, "rb") as file:
            source = file.read(_MOST_TEXT + 1)
    if len(source) > _MOST_TEXT:
        raise ValueError(f"it is larger than {_MOST_TEXT >> 20} MiB")
    return json.loads(source.decode("utf-8"), object_pairs_hook=_refuse_twice)


class BoundedReader(io.RawIOBase):
    """Reads a stream, and refuses to go on beyond a limit.

    Args:
        stream: What is read.
        limit: Most bytes that it may have.

    Example:
        >>> BoundedReader(io.BytesIO(b"abc"), 3).read(2)
        b'ab'
    """

    def __init__(self, stream: IO[bytes], limit: int) -> None:
        super().__init__()
        self.stream, self.limit, self.count = stream, limit, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer with the next bytes; see ``io.RawIOBase``."""
        chunk = self.stream.read(min(len(buffer), _CHUNK))
        self.count += len(chunk)
        if self.count > self.limit:
            raise ValueError(f"it expands to more than {self.limit >> 20} MiB")
        buffer[: len(chunk)] = chunk
        return len(chunk)


@contextmanager
def open_compressed(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file that may be compressed by gzip, bzip2 or xz, within :func:`expansion_limit`.

    The content decides, not the name.

    Raises:
        ValueError: The content expands too much (raised by ``read``).
        OSError: The file cannot be opened.
    """
    with open(path, "rb") as file:
        start = file.read(6)
        file.seek(0)
        size = os.fstat(file.fileno()).st_size
        stream: Any = file
        if start.startswith(b"\x1f\x8b"):
            stream = gzip.GzipFile(fileobj=file)
        elif start.startswith(b"BZh"):
            stream = bz2.BZ2File(file)
        elif start.startswith(b"\xfd7zXZ\x00"):
            stream = lzma.LZMAFile(file)  # noqa: SIM115  # closed with the file below it
        yield io.BufferedReader(BoundedReader(stream, expansion_limit(size)), _CHUNK)
