"""Where a run is recorded, and who may write there."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from fulgurite.errors import ConfigError
from fulgurite.run_folders.records import holds_run

__all__ = [
    "CHECKPOINT_VARIABLE",
    "LAST",
    "NO_NAME",
    "NO_SYSTEM",
    "RUNS_VARIABLE",
    "RUN_DIR_VARIABLE",
    "RunLock",
    "RunOptions",
    "leads_out",
    "new_run_folder",
    "run_folder_of",
]


RUNS_VARIABLE = "FULGURITE_RUNS"  # where users keep their runs
RUN_DIR_VARIABLE = (
    "FULGURITE_RUN_DIR"  # tells the processes that a strategy launches where to write
)
CHECKPOINT_VARIABLE = "FULGURITE_CHECKPOINT"  # and which checkpoint the first of them has found
LAST = Path("checkpoints") / "last.ckpt"
NO_SYSTEM, NO_NAME = "custom", "run"  # of a command line without a configuration


def _find_root() -> str:
    """The folder that ``FULGURITE_RUNS`` names, else ``runs`` in the current one."""
    value = os.environ.get(RUNS_VARIABLE)
    return os.path.expanduser(value) if value else "runs"


def leads_out(name: str) -> bool:
    """Whether a name is the path of something that does not lie below where it is given.

    Example:
        >>> [leads_out(name) for name in ("digits", "a/b", "a..b", "../a", "/a")]
        [False, False, False, True, True]
    """
    path = Path(name)
    return path.is_absolute() or ".." in path.parts


@dataclass
class RunOptions:
    """Where a run is recorded.

    Args:
        root: Folder of all runs; by default the one that the environment variable
            ``FULGURITE_RUNS`` names, else ``runs``.
        system: First level below it; by default the system of the first ``--config``, or the
            folder that it lies in.
        name: Second level; by default the stem of the first ``--config``.
        dir: The exact run folder instead of ``root/system/name/<time>``; with ``--ckpt_path`` the
            run that is meant.
        new: Go on from ``--ckpt_path`` in a new folder, which may be with other options: in
            ``dir``, unless that is the run that is meant.
    """

    root: str = field(default_factory=_find_root)
    system: str | None = None
    name: str | None = None
    dir: str | None = None
    new: bool = False

    def __post_init__(self) -> None:
        """Refuse empty names, as of unset variables of the shell, and names that leave the root.

        Raises:
            ConfigError: A folder or a name is empty, or a name is a path to somewhere else.
        """
        for name in ("root", "system", "name", "dir"):
            if getattr(self, name) == "":
                raise ConfigError(f"--run.{name} is empty.", "Name a folder, or leave it out.")
        for name in ("system", "name"):
            value = getattr(self, name)
            if value is not None and leads_out(value):
                raise ConfigError(
                    f"--run.{name}={value} leads out of --run.root={self.root}.",
                    "Give a name, or the whole path of the run folder by --run.dir.",
                )

    @property
    def parent(self) -> Path:
        """The folder in which the runs of this name lie side by side."""
        return Path(self.root) / (self.system or NO_SYSTEM) / (self.name or NO_NAME)


def _find_free_dir(folder: Path) -> Path:
    """``folder`` itself, or the first of ``folder-2``, ``folder-3`` … that does not exist."""
    candidate, number = folder, 1
    while True:
        try:
            candidate.mkdir(parents=True)
            return candidate
        except FileExistsError:
            if not folder.parent.is_dir():
                raise
            number += 1
            candidate = folder.with_name(f"{folder.name}-{number}")


def new_run_folder(options: RunOptions, command: str, *, resumed: Path | None = None) -> Path:
    """Make the folder of a command; never one that another run has written.

    Processes that a distributed strategy launches get the folder of the process that launched
    them. ``fit`` takes the folder of the run that it resumes, else an explicit ``dir``, which
    must be new or hold a run that was ended before its first checkpoint; the other commands take
    a folder of their own inside an explicit ``dir``.

    Args:
        options: Where.
        command: Which.
        resumed: The run that ``fit`` goes on with, in its folder.

    Raises:
        ConfigError: If ``dir`` already holds a run, or is missing or not new under torchrun.
    """
    if (inherited := os.environ.get(RUN_DIR_VARIABLE)) and "LOCAL_RANK" in os.environ:
        return Path(inherited)
    explicit = None if options.dir is None else Path(options.dir)
    is_launched = "TORCHELASTIC_RUN_ID" in os.environ
    if is_launched and int(os.environ.get("RANK", "0")):
        if resumed is None and explicit is None:
            raise ConfigError(
                "Processes that torchrun starts cannot agree on a new run folder.",
                "Name it: --run.dir=FOLDER.",
            )
        return resumed or explicit or Path()  # rank 0 makes it
    if options.new and explicit is not None and holds_run(explicit):  # the run to begin from
        if is_launched:
            raise ConfigError(
                f"--run.dir={explicit} holds a run, and --run.new=true begins another one.",
                "Name a new folder by --run.dir, and the checkpoint by its path.",
            )
        explicit = None
    if explicit is not None and explicit.exists() and not explicit.is_dir():
        raise ConfigError(f"--run.dir={explicit} is a file.", "Name a folder.")
    if resumed is not None:
        folder = resumed
    elif explicit is None:
        suffix = "" if command == "fit" else f"-{command}"
        folder = _find_free_dir(options.parent / (time.strftime("%Y%m%d-%H%M%S") + suffix))
    elif command != "fit":
        folder = _find_free_dir(explicit / command)
    else:
        folder = explicit
        if (folder / "config.yaml").exists():
            _check_restart(folder)
        folder.mkdir(parents=True, exist_ok=True)
    os.environ[RUN_DIR_VARIABLE] = str(folder.resolve())
    return folder


def _check_restart(folder: Path) -> None:
    """Whether a fit may start over in a folder: nothing of the first one can be lost.

    Raises:
        ConfigError: The folder holds a run with a checkpoint, or a run that has ended.
    """
    if (folder / LAST).is_file():
        raise ConfigError(
            f"--run.dir={folder} already holds a run.",
            "Name another folder, or resume it with --ckpt_path=last.",
        )
    if (folder / "summary.json").exists() or any(folder.glob("checkpoints/*.ckpt")):
        raise ConfigError(
            f"--run.dir={folder} already holds a run, which has no last.ckpt to resume.",
            "Name another folder.",
        )
    print(
        f"note: the run in {folder} ended before its first checkpoint; it starts over",
        file=sys.stderr,
    )


class RunLock:
    """Keeps a second training out of a run folder, as long as the process of the first lives.

    Where there are no locks (some network folders, Windows) none is kept out.

    Args:
        folder: The run folder.

    Raises:
        ConfigError: Another process trains there.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        while True:
            self._file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115
            self._take(folder)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path)):
                    break
            self._file.close()  # its owner removed it after it was opened here
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()

    def __deepcopy__(self, _: object) -> RunLock:
        """Return the lock itself: a copy of a model reaches it through its trainer."""
        return self

    def _take(self, folder: Path) -> None:
        if os.name != "posix":
            return
        import fcntl

        try:
            # not `flock`, which a killed process's orphaned workers would go on holding
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            self._file.seek(0)
            owner = self._file.read().strip() or "unknown"
            self._file.close()
            raise ConfigError(
                f"Another process (PID {owner}) trains in {folder}.",
                "Wait for it, or name another folder with --run.dir.",
            ) from error
        except OSError:
            return

    def release(self) -> None:
        """Let others train there."""
        if not self._file.closed:
            with suppress(OSError):
                self.path.unlink()
            self._file.close()


def run_folder_of(checkpoint: str | Path) -> Path | None:
    """The run folder that a checkpoint lies in, or None."""
    for folder in Path(checkpoint).resolve().parents:
        if holds_run(folder):
            return folder
    return None
