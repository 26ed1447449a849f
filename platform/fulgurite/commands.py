"""What every command does around its work: local modules, one-line errors, exit statuses."""

from __future__ import annotations

import errno
import os
import select
import sys
from collections.abc import Callable, Sequence

from fulgurite.errors import ConfigError, FulguriteError, RunError, Terminated
from fulgurite.ranks import is_first_process

__all__ = ["DISK_ERRORS", "check_filled", "find_local_modules", "run_command"]

DISK_ERRORS = frozenset(
    {
        errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.EIO, errno.EISDIR,
        errno.ENAMETOOLONG, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS,
    }
)  # fmt: skip
"""What a full, read-only or foreign disk answers."""


def find_local_modules() -> None:
    """Let class paths name modules of the current folder, as ``python main.py`` does.

    Last on the path: a file here must not take the place of an installed module.
    """
    folder = os.getcwd()
    if not sys.flags.safe_path and not {"", folder} & {*sys.path}:
        sys.path.append(folder)


def check_filled(argv: Sequence[str]) -> None:
    """Refuse options and arguments without a value, such as those of unset variables of the shell.

    Args:
        argv: The words of a command line, without the command.

    Raises:
        ConfigError: A word is empty, or an option is followed by nothing.

    Example:
        >>> check_filled(["--out=here", "a=b"])
        >>> check_filled(["--out="])
        Traceback (most recent call last):
        fulgurite.errors.ConfigError: --out is empty. Give a value, or leave it out.
    """
    for number, word in enumerate(argv):
        before = argv[number - 1] if number else ""
        name = word[:-1] if word.startswith("--") and word.endswith("=") else ""
        if not word:
            name = before if before.startswith("--") and "=" not in before else "An argument"
        if name and "=" not in name:
            raise ConfigError(f"{name} is empty.", "Give a value, or leave it out.")


def run_command(argv: list[str], execute: Callable[[list[str]], int]) -> int:
    """Run a command line with its errors as one line, or as a traceback with ``--debug``.

    Args:
        argv: The words of the command line.
        execute: What runs them without ``--debug``; returns an exit status.

    Returns:
        The exit status: 0 done, 1 failed, 2 bad input, 130 interrupted, 141 nobody
        reads what it prints, 143 terminated.
    """
    debug = "--debug" in argv or bool(os.environ.get("FULGURITE_DEBUG"))
    try:
        status = execute([word for word in argv if word != "--debug"])
        sys.stdout.flush()
        return status
    except FulguriteError as error:
        if debug:
            raise
        print(f"fulgurite: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, RunError) else 2
    except BrokenPipeError:
        if _has_reader():  # another pipe than that of `| head`
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if debug or error.errno not in DISK_ERRORS:
            raise
        file = error.filename2 or error.filename or "A file"
        print(
            f"fulgurite: error: {file} cannot be written or read ({error.strerror}). Make room, or "
            "name another place.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt as error:
        _report_stop(str(error) or "interrupted")
        return 130
    except Terminated as error:
        _report_stop(error.message)
        return 143


def _has_reader() -> bool:
    """Whether somebody still reads what is printed."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return not any(event & select.POLLERR for _, event in poll.poll(0))


def _report_stop(message: str) -> None:
    """Say once for all ranks, which a launcher stops together, that the command was stopped."""
    if is_first_process():
        print(f"fulgurite: {message}", file=sys.stderr)
