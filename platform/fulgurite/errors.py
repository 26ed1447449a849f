"""The one error family: each error says what is wrong and how to fix it.

A class derives from the builtin exception it refines, so that ``except ValueError`` still works,
and from :class:`FulguriteError`, which the command line prints as one line (``--debug`` shows the
traceback).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "FulguriteError",
    "MissingExtraError",
    "RunError",
    "Terminated",
    "near_miss",
]


class FulguriteError(Exception):
    """Base of all errors that a user can fix.

    Args:
        problem: One sentence: what is wrong, naming the file, field or value.
        hint: One sentence: what to do about it, in the spelling of the command line.
    """

    def __init__(self, problem: str, hint: str = "") -> None:
        super().__init__(problem, hint)
        self.problem = problem
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.problem} {self.hint}".strip()


class ConfigError(FulguriteError, ValueError):
    """A configuration value or name is wrong."""


class DataError(FulguriteError, ValueError):
    """Data on disk or in memory is not what its format promises."""


class CheckpointError(FulguriteError, FileNotFoundError):
    """A checkpoint was asked for that does not exist or does not fit."""


class MissingExtraError(FulguriteError, ImportError):
    """An optional package is needed and not installed."""


class RunError(FulguriteError, RuntimeError):
    """A run failed for a reason outside its options: a disk, another process."""


class Terminated(SystemExit):
    """The process was asked to end by SIGTERM.

    Args:
        message: What to tell the user.
    """

    def __init__(self, message: str = "terminated") -> None:
        super().__init__(143)
        self.message = message


def near_miss(name: object, candidates: Iterable[str]) -> str:
    """A question for the nearest of some names, as a hint; empty where none is near.

    Args:
        name: What was given.
        candidates: What there is.

    Example:
        >>> near_miss("rai", ("pool", "ray"))
        "Did you mean 'ray'?"
    """
    close = difflib.get_close_matches(str(name), list(candidates), n=1)
    return f"Did you mean {close[0]!r}?" if close else ""
