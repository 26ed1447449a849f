"""One error that names the file, whatever its parser raised, and how far a file may expand."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

from fulgurite.errors import DataError, FulguriteError

__all__ = ["describe_error", "expansion_limit", "reading"]

#: What any file may expand to, and how many times its size a larger one may [bytes]: more than
#: real data compress (inferred), and little enough for a bomb to be refused in time.
SMALLEST_LIMIT, LARGEST_RATIO = 64 << 20, 100


def describe_error(error: BaseException) -> str:
    """What an exception says, in one short printable line.

    Example:
        >>> describe_error(ValueError("bad")), describe_error(EOFError())
        ('bad', 'EOFError')
    """
    if isinstance(error, MemoryError):
        return "it asks for more memory than there is"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    lines = text.strip().splitlines()
    line = "".join(c if c.isprintable() else "?" for c in lines[0]) if lines else ""
    return line[:200] or type(error).__name__


def reading(
    path: str | Path,
    subject: str,
    hint: str,
    *,
    error: Callable[[str, str], FulguriteError] = DataError,
    fault: str = "cannot be read",
) -> Reading:
    """Turn whatever a parser raises into one error that names the file.

    Errors of this project pass unchanged, and so does ``ImportError``, which is no fault of the
    file.

    Args:
        path: The file, named in the error; one that is there must be a regular file, since others
            (pipes, devices) may never end.
        subject: What it is, as the beginning of a sentence: ``The stack``.
        hint: What to do about it.
        error: The error to raise.
        fault: What is wrong, as the rest of the sentence.

    Raises:
        FulguriteError: ``error``, if the block raises.

    Example:
        >>> with reading("a.json", "The table", "Fetch it again."):
        ...     raise EOFError("it ends")
        Traceback (most recent call last):
        ...
        fulgurite.errors.DataError: The table a.json cannot be read (it ends). Fetch it again.
    """
    return Reading(path, f"{subject} {path} {fault}", hint, error)


class Reading:
    """The context that :func:`reading` gives."""

    def __init__(
        self, path: str | Path, subject: str, hint: str, error: Callable[[str, str], FulguriteError]
    ) -> None:
        self.path, self.subject, self.hint, self.error = path, subject, hint, error

    def __enter__(self) -> None:
        """Refuse what is no regular file."""
        try:
            _refuse_special(self.path)
        except ValueError as raised:
            raise self._name_file(raised) from raised

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, _: object
    ) -> None:
        """Name the file in what was raised."""
        if raised is None or isinstance(raised, FulguriteError | ImportError):
            return
        # a panic of Rust code (tokenizers) is no Exception, so that few programs catch it
        if isinstance(raised, Exception) or type(raised).__name__ == "PanicException":
            raise self._name_file(raised) from raised

    def _name_file(self, raised: BaseException) -> FulguriteError:
        return self.error(f"{self.subject} ({describe_error(raised)}).", self.hint)


def _refuse_special(path: str | Path) -> None:
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return  # the reader says what is missing
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ValueError("it is no regular file")


def expansion_limit(size: int) -> int:
    """How many bytes a file of ``size`` bytes may expand to.

    Example:
        >>> expansion_limit(1000) == 64 << 20, expansion_limit(10 << 20) == 1000 << 20
        (True, True)
    """
    return max(SMALLEST_LIMIT, LARGEST_RATIO * size)
