"""Claims of tasks by processes that share only a folder; those of a dead process run out."""

from __future__ import annotations

import os
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fulgurite.attention.locks import writing
from fulgurite.io import file_lock

__all__ = ["Leases"]


class Leases:
    """Lets each task be computed by one process at a time, as long as that shows signs of life.

    A claim is a file whose time of change its holder renews. It runs out if that stops for as long
    as the lease lasts: the holder died, hangs, or lost the folder. Then another may take the
    task, and if the first comes back both compute it, so work under a claim must be safe to do
    twice. Times are compared as the file system of the folder gives them, so the clocks of the
    machines need not agree.

    Args:
        folder: Folder of the claims; made if it is not there.
        seconds: How long a claim lasts without a sign of life [s].
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self.seconds = folder, seconds
        self._name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"

    @contextmanager
    def claimed(
        self, task: str, is_done: Callable[[], bool], clean: Callable[[], None]
    ) -> Iterator[bool]:
        """Claim a task for the time of a block, and say whether that worked.

        Args:
            task: Name of the task, as a file name.
            is_done: Whether the task needs no computing any more.
            clean: Removes what an earlier holder left behind.

        Yields:
            Whether this process has the claim.
        """
        path = self.folder / task
        with writing(f"folder of claims {self.folder}"), file_lock(self.folder / "lock"):
            free = not is_done() and not self._is_alive(path)
            if free:
                if path.exists():
                    clean()
                path.write_text(self._name)
        if not free:
            yield False
            return
        ended = threading.Event()
        thread = threading.Thread(target=self._renew, args=(path, ended), daemon=True)
        thread.start()
        try:
            yield True
        finally:
            ended.set()
            thread.join()
            with suppress(OSError):
                if path.read_text() == self._name:  # else another has taken it over
                    path.unlink()

    def _is_alive(self, path: Path) -> bool:
        """Whether a claim shows signs of life."""
        try:
            renewed = path.stat().st_mtime
        except FileNotFoundError:
            return False
        clock = self.folder / f".clock-{self._name}"
        clock.write_text("")
        try:
            return clock.stat().st_mtime - renewed < self.seconds
        finally:
            clock.unlink()

    def _renew(self, path: Path, ended: threading.Event) -> None:
        while not ended.wait(self.seconds / 4):
            with suppress(OSError):
                os.utime(path)
