"""Fetch a file whose SHA-256 is known: resumable, and complete or absent."""

from __future__ import annotations

import shutil
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

from fulgurite.errors import ConfigError, DataError
from fulgurite.io import checksum, verify_checksum

__all__ = ["fetch"]


def fetch(url: str, target: str | Path, sha256: str, *, timeout: float = 60.0) -> Path:
    """Download a file unless it is already there, and check it before it gets its name.

    What arrived stays in ``TARGET.part`` if the connection breaks, and the next call goes on from
    there if the server can.

    Args:
        url: An ``https:``, ``http:`` or ``file:`` address.
        target: Where the file goes.
        sha256: The digest that it must have.
        timeout: How long to wait for an answer [s].

    Returns:
        The target.

    Raises:
        ConfigError: The address is of another kind.
        DataError: The digest is no SHA-256, the connection failed or broke, or the digest is
            wrong (then nothing is kept).

    Example:
        >>> import tempfile
        >>> from fulgurite.io import checksum
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     source = Path(folder) / "a"
        ...     _ = source.write_bytes(b"abc")
        ...     fetch(source.as_uri(), Path(folder) / "b", checksum(source)).read_bytes()
        b'abc'
    """
    target, sha256 = Path(target), sha256.strip().lower()
    if not url.startswith(("https://", "http://", "file://")):
        raise ConfigError(f"The address {url!r} cannot be fetched.", "Give an https: address.")
    if len(sha256) != 64:
        raise DataError(
            f"The checksum {sha256!r} is no SHA-256 (64 hexadecimal digits).",
            "Give the SHA-256 of the file.",
        )
    if target.exists() and checksum(target) == sha256:
        return target
    part = target.with_name(f"{target.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    if not (part.exists() and checksum(part) == sha256):  # else all of it came the last time
        _append(url, part, timeout)
    try:
        verify_checksum(part, sha256)
    except DataError:
        part.unlink()  # going on from wrong bytes can never succeed
        raise
    part.replace(target)
    return target


def _append(url: str, part: Path, timeout: float) -> None:
    """Add to the part what is missing, or start again if the server sends the whole."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "fulgurite", **({"Range": f"bytes={have}-"} if have else {})}
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            resumed = getattr(answer, "status", None) == 206
            with part.open("ab" if resumed else "wb") as file:
                shutil.copyfileobj(answer, file, 1 << 20)
            expected = answer.headers.get("Content-Length")
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the part is longer than the file: another version of it
            part.unlink()
            return _append(url, part, timeout)
        raise _download_error(url, str(error)) from error
    except (OSError, HTTPException) as error:
        raise _download_error(url, str(error)) from error
    # `copyfileobj` ends quietly when the connection is closed early
    if expected is not None and part.stat().st_size < int(expected) + (have if resumed else 0):
        raise _download_error(url, f"it ended after {part.stat().st_size} bytes")
    return None


def _download_error(url: str, reason: str) -> DataError:
    return DataError(
        f"The download of {url} failed: {reason}.",
        "Run the command again to go on where it stopped, or fetch the file by other means.",
    )
