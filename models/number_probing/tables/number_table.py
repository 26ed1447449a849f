"""Embeddings of numbers, and the checks that every reader of them shares.

Axes: N numbers, D embedding width.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fulgurite.errors import ConfigError, DataError
from fulgurite.models.number_probing.tables.checks import describe_numbers

__all__ = [
    "DEFAULT_STOP",
    "NumberTable",
    "check_covered",
    "check_numbers",
    "check_tokens",
    "parse_numbers",
    "shorten",
    "to_finite_tensor",
]

#: Numbers 0 … DEFAULT_STOP - 1 are looked for where none are named.
DEFAULT_STOP = 1000

_LONGEST_LIST = 1_000_000  # numbers of a list at most


@dataclass(frozen=True)
class NumberTable:
    """Embeddings of numbers and where they are from.

    Attributes:
        source: Name of the table.
        numbers: Ascending.
        embeddings: One row for each number. Shape: (N, D).
        rank: Rank of each number by frequency from 0, if the table is sorted by it. Shape: (N,).
        note: Choices made in reading, such as the spelling of numbers.
    """

    source: str
    numbers: tuple[int, ...]
    embeddings: Tensor
    rank: Tensor | None = None
    note: str = ""


def parse_numbers(text: str) -> tuple[int, ...]:
    """Numbers from ``first:stop`` or a comma-separated list of numbers and ranges.

    Raises:
        ConfigError: The text is neither, or its numbers are not distinct.

    Example:
        >>> parse_numbers("0:3,7")
        (0, 1, 2, 7)
    """
    numbers: list[int] = []
    try:
        for part in text.split(","):
            first, colon, stop = part.partition(":")
            begin, end = int(first), int(stop) if colon else int(first) + 1
            if len(numbers) + end - begin > _LONGEST_LIST:
                raise ConfigError(
                    f"numbers={text[:80]!r} are more than {_LONGEST_LIST:,} numbers.",
                    "Write e.g. 0:1000.",
                )
            numbers += range(begin, end)
    except ConfigError:
        raise
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise ConfigError(
            f"numbers={text[:80]!r} are no distinct whole numbers.",
            "Write e.g. 0:1000 or 0:10,20,30.",
        )
    return tuple(sorted(numbers))


def check_numbers(numbers: Iterable[Any]) -> tuple[int, ...]:
    """Sort numbers, also those of an array or a tensor.

    Raises:
        ConfigError: They are no distinct whole numbers from 0 on, or there are none.

    Example:
        >>> check_numbers([7, 3])
        (3, 7)
    """
    values = list(numbers)
    try:
        if any(isinstance(n, bool) for n in values):
            raise TypeError
        whole = sorted(map(operator.index, values))
    except TypeError:
        whole = []
    if not whole or whole[0] < 0 or len(set(whole)) < len(whole):
        raise ConfigError(
            f"numbers={shorten(values)} are no distinct whole numbers from 0 on.",
            "Pass e.g. range(1000).",
        )
    return tuple(whole)


def check_tokens(tokens: Mapping[int, Any], source: str) -> None:
    """Refuse tokens that are no row of a table, or that numbers share.

    Raises:
        DataError: A token is no row number, or two numbers share a token.
    """
    number_of: dict[int, int] = {}
    for number, token in tokens.items():
        if type(token) is not int or token < 0:
            raise DataError(
                f"The token of the number {number} in {source} is {shorten(token)}, no "
                "number of a row.",
                "Put the tokenizer that belongs to these weights beside them.",
            )
        if (other := number_of.setdefault(token, number)) != number:
            raise DataError(
                f"The numbers {other} and {number} in {source} have the same token {token}.",
                "Put the tokenizer that belongs to these weights beside them.",
            )


def check_covered(covered: Mapping[int, Any], numbers: Sequence[int] | None, source: str) -> None:
    """Refuse numbers that are not covered, or a table without any."""
    if numbers is None:
        if len(covered) < 20:
            raise DataError(
                f"Only {len(covered)} numbers from 0 on have an entry of their own in {source}.",
                "Use a table whose numbers are single tokens, or name the numbers (--numbers).",
            )
        return
    missing = [n for n in numbers if n not in covered]
    if missing:
        prefix_length = next((i for i, n in enumerate(numbers) if n not in covered), 0)
        hint = (
            f"Use --numbers {numbers[0]}:{numbers[prefix_length - 1] + 1}, which is covered."
            if prefix_length
            else ""
        )
        raise DataError(
            f"{len(missing)} numbers are missing in {source}: {describe_numbers(missing)}.",
            hint or "Leave them out of --numbers.",
        )


def to_finite_tensor(rows: Any, source: str) -> Tensor:
    """Check that embeddings are finite, and make a tensor of float32.

    Raises:
        DataError: A value is not finite, or there is none.
    """
    with np.errstate(over="ignore"):
        single = np.asarray(rows, np.float32)
    if single.ndim != 2 or not single.shape[1] or not np.isfinite(single).all():
        raise DataError(
            f"The embedding of a number in {source} has a value that is not finite, or has none.",
            "Give a table whose values are finite, within the range of float32.",
        )
    return torch.from_numpy(single)


def shorten(value: Any) -> str:
    """Shorten a value of a file for an error; endless numbers have no text."""
    try:
        return repr(value)[:80]
    except ValueError:
        return "a number of thousands of digits"
