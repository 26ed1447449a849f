"""What is left out of a data set because the user says so, by word and with its count."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fulgurite.errors import ConfigError, DataError

__all__ = ["BadImage", "Exclusion", "check_exclude", "exclude_hint", "name_some"]


@dataclass(frozen=True)
class Exclusion:
    """What was left out of the data, and why.

    Attributes:
        kind: One word: that in ``exclude`` which asked for it, or the rule of the reader.
        description: What was wrong with which plates, wells, files or traces.
        count: Number of samples, stacks, traces or picks.
    """

    kind: str
    description: str
    count: int


def check_exclude(exclude: Iterable[str], kinds: Sequence[str], option: str) -> frozenset[str]:
    """Return ``exclude`` as a set, after checking that each word is one of ``kinds``.

    Raises:
        ConfigError: A word is unknown.

    Example:
        >>> sorted(check_exclude(["nan"], ("nan", "constant"), "exclude"))
        ['nan']
    """
    words = frozenset(exclude)
    if unknown := sorted(words - set(kinds)):
        raise ConfigError(
            f"There is nothing called {unknown[0]!r} to exclude.",
            f"Set `--data.init_args.{option}` to words of {', '.join(kinds)}.",
        )
    return words


def name_some(names: Collection[Any], limit: int = 5) -> str:
    """Return the first few names and how many there are beyond.

    Example:
        >>> name_some(["a", "b", "c"], 2)
        'a, b and 1 more'
    """
    first = [str(name) for name in list(names)[:limit]]
    remaining = len(names) - len(first)
    return ", ".join(first) + (f" and {remaining} more" if remaining else "")


def exclude_hint(subject: str, kind: str, exclude: Iterable[str], option: str) -> str:
    """Say how to leave something out besides what is left out already.

    Args:
        subject: What to leave out: ``such sites``.
        kind: The word to add.
        exclude: The words that are in force.
        option: Key of the list, behind ``--data.init_args.``.

    Example:
        >>> exclude_hint("such sites", "nan", ["constant"], "exclude")
        'leave such sites out: `--data.init_args.exclude=[constant,nan]`.'
    """
    words = ",".join(sorted({*exclude, kind}))
    return f"leave {subject} out: `--data.init_args.{option}=[{words}]`."


class BadImage(DataError):
    """One image cannot be used; ``kind`` is the word in ``exclude`` that leaves such images out."""

    def __init__(self, problem: str, hint: str = "", kind: str = "unreadable") -> None:
        super().__init__(problem, hint)
        self.kind = kind

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problem, self.hint, self.kind)
