"""Folders that one process writes at a time, and errors that say what could not be written."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fulgurite.errors import CheckpointError

__all__ = ["exclusive_lock", "writing"]

_guard = threading.Lock()
_locked: set[str] = set()  # by this process, which the lock of the system does not keep out


@contextmanager
def writing(subject: str) -> Iterator[None]:
    """Turn errors of the file system into one that names what was being written.

    Raises:
        CheckpointError: The file system raised an error.
    """
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"The {subject} cannot be written ({error.strerror or error}).",
            "Free space on the disk or change the rights, and run again: it goes on where it was.",
        ) from error


@contextmanager
def exclusive_lock(path: Path, subject: str) -> Iterator[None]:
    """Hold a lock that a second holder is refused; the system takes it from a killed process.

    Args:
        path: Path of the lock file.
        subject: What it is for, as errors call it.

    Raises:
        CheckpointError: Another process, or another thread of this one, holds it, or the file
            cannot be written.
    """
    import fcntl

    name = os.path.realpath(path)
    with _guard:
        if name in _locked:  # by this process: even to open the file here would undo its lock
            raise _busy(subject, "")
        _locked.add(name)
    try:
        with writing(subject):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # not `flock`, which a killed process's orphaned workers would go on holding
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = os.pread(descriptor, 100, 0).decode(errors="replace")
            os.close(descriptor)
            raise _busy(subject, f" ({holder})" if holder else "") from None
        except OSError as error:
            os.close(descriptor)
            raise CheckpointError(
                f"The {subject} cannot be locked against other processes ({error.strerror}).",
                "Give a folder on a file system with locks.",
            ) from error
        try:
            with suppress(OSError):  # the disk is full: the lock holds all the same
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()} on {socket.gethostname()}".encode(), 0)
            yield
        finally:
            os.close(descriptor)
    finally:
        _locked.discard(name)


def _busy(subject: str, holder: str) -> CheckpointError:
    return CheckpointError(
        f"The {subject} is in use by another process{holder}.",
        "Wait until that has ended, or give another folder.",
    )
