"""Locks of a comparison's folder, which the system drops when a process ends in any way."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import IO

from fulgurite.compare.shards import Shard
from fulgurite.errors import ConfigError
from fulgurite.io import file_lock

__all__ = ["lock_briefly", "lock_folder"]

_BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


@contextmanager
def lock_folder(folder: Path, shard: Shard | None = None, content: str = "") -> Iterator[None]:
    """Hold a comparison's folder: alone, or as a shard together with its other shards.

    Args:
        folder: Folder of the comparison; it is created.
        shard: The part that is run there; None for all of it.
        content: Hash of what all shards together run.

    Raises:
        ConfigError: Another process works there that is no other shard of the same.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with lock_briefly(folder):
            whole = stack.enter_context((folder / ".lock").open("a+"))
            if not _try_lock(whole, exclusive=shard is None):
                raise ConfigError(
                    f"Another comparison is running in {folder}.",
                    "Wait for it, or give another --out.",
                )
            if shard is not None:
                _check_other_shards(folder, shard, content)
                name = f".lock-{shard.number}-of-{shard.count}"
                own = stack.enter_context((folder / name).open("a+"))
                if not _try_lock(own):
                    raise ConfigError(
                        f"Shard {shard} is running in {folder} already.",
                        "Wait for it, or give another --shard or another --out.",
                    )
                own.truncate(0)
                own.write(content)
                own.flush()
                os.fsync(own.fileno())  # other machines read it
        yield


def lock_briefly(folder: Path) -> AbstractContextManager[None]:
    """Hold what the shards of a folder do one after the other: they wait for each other."""
    return file_lock(folder / ".lock-brief")


def _check_other_shards(folder: Path, shard: Shard, content: str) -> None:
    """Check that the shards which are running are parts of the same.

    Raises:
        ConfigError: A running shard is part of another comparison, or divides it otherwise.
    """
    if os.name != "posix":
        raise ConfigError(
            "Shards need the file locks of POSIX, which this system does not have.",
            "Leave --shard out, and run parts of the comparison by --only and --out.",
        )
    for path in sorted(folder.glob(".lock-*-of-*")):
        match = re.fullmatch(r"\.lock-(\d+)-of-(\d+)", path.name)
        if match is None or (int(match[1]), int(match[2])) == (shard.number, shard.count):
            continue
        other = Shard(int(match[1]), int(match[2]))
        with path.open("a+") as file:
            if _try_lock(file):
                continue  # it has ended
            file.seek(0)
            running = file.read()
        if other.count != shard.count:
            raise ConfigError(
                f"Shard {other} is running in {folder}, which {shard} cannot share it with.",
                f"Give a shard of {other.count}, wait for those that run, or give another --out.",
            )
        if running != content:
            raise ConfigError(
                f"Shard {other} is running in {folder}, with other cells than this one would be "
                f"a part of.",
                "All shards need the same file, configurations, data, version, --quick and --only. "
                "Wait for those that run, or give another --out.",
            )


def _try_lock(file: IO[str], *, exclusive: bool = True) -> bool:
    """Lock a file unless another process has; without locks (Windows) it is as if it were free."""
    try:
        import fcntl
    except ImportError:
        return True
    kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _BUSY:
            raise
        return False
    return True
