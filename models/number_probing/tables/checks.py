"""Checks of a table of number embeddings before anything is measured on it.

Axes: N numbers, D embedding width.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fulgurite.errors import ConfigError, DataError

__all__ = [
    "check_consecutive", "check_embeddings", "check_periods", "describe_numbers", "list_periods",
]  # fmt: skip


def describe_numbers(numbers: Sequence[int], limit: int = 5) -> str:
    """Name the first few of a list of numbers.

    Example:
        >>> describe_numbers([3, 4, 5, 6], limit=2)
        '3, 4 … (4)'
    """
    first_numbers = ", ".join(str(n) for n in numbers[:limit])
    return first_numbers if len(numbers) <= limit else f"{first_numbers} … ({len(numbers)})"


def check_embeddings(
    embeddings: Tensor,
    numbers: Sequence[int] | Tensor | None = None,
    *,
    allow_duplicates: bool = False,
) -> tuple[Tensor, Tensor]:
    """Check a table; return its embeddings in float64 and their numbers.

    Args:
        embeddings: One row for each number, any floating type. Shape: (N, D).
        numbers: The integer of each row, no two alike; by default 0 … N−1. Shape: (N,).
        allow_duplicates: Let equal rows pass, for one-dimensional controls such as histograms.

    Returns:
        Detached embeddings, float64, and numbers, int64, on the device of ``embeddings``.

    Raises:
        DataError: The shapes do not fit, a number comes twice, a row is all zero, not finite, or
            equal to another.

    Example:
        >>> check_embeddings(torch.tensor([[1.0], [2.0]]))[1]
        tensor([0, 1])

    Source: docs/papers/number_probing.md section 5, rows 15 and the traps of 4.1: pruned
    vocabularies share rows.
    """
    if not isinstance(embeddings, Tensor) or embeddings.layout != torch.strided:
        kind = getattr(embeddings, "layout", type(embeddings).__name__)
        raise DataError(
            f"The embeddings are of type {kind}.",
            "Pass a dense tensor; torch.as_tensor makes one of an array or of lists.",
        )
    if embeddings.ndim != 2 or not embeddings.numel() or not embeddings.is_floating_point():
        raise DataError(
            f"The embeddings are {embeddings.dtype} of shape {tuple(embeddings.shape)}.",
            "Pass floating point rows, one for each number: shape (N, D).",
        )
    x = embeddings.detach().double()
    if numbers is None:
        numbers = range(len(x))
    n = _as_tensor(numbers)
    if n.dtype.is_floating_point or n.dtype == torch.bool or n.shape != x.shape[:1]:
        raise DataError(
            f"There are {len(x)} embeddings and {n.dtype} numbers of shape {tuple(n.shape)}.",
            "Pass one integer for each row in `numbers`.",
        )
    n = n.to(x.device, torch.int64)
    values, counts = torch.unique(n, return_counts=True)
    if len(values) < len(n):
        raise DataError(
            f"The numbers {describe_numbers(values[counts > 1].tolist())} come more than once.",
            "Give each number once in `numbers`: either the token '7' or ' 7', not both.",
        )
    finite = x.isfinite().all(1)
    if not bool(finite.all()):
        raise DataError(
            f"The embeddings of {describe_numbers(n[~finite].tolist())} are not finite.",
            "The model has diverged or the file is damaged: use an earlier checkpoint.",
        )
    zero = ~x.any(1) if x.shape[1] > 1 else torch.zeros_like(finite)  # 0 is a value
    if bool(zero.any()) and not allow_duplicates:
        raise DataError(
            f"The embeddings of {describe_numbers(n[zero].tolist())} are all zero.",
            "Leave out what the table does not cover in `numbers`.",
        )
    if not allow_duplicates and (unique := _unique_rows(x)) < len(x):
        raise DataError(
            f"{len(x)} numbers have only {unique} unique embeddings: the table shares rows.",
            "Use a table that was not pruned, or leave the shared ones out in `numbers`.",
        )
    return x, n


def _as_tensor(numbers: Sequence[int] | Tensor) -> Tensor:
    """Numbers as a tensor.

    Raises:
        DataError: They are no numbers.
    """
    try:
        return torch.as_tensor(numbers if isinstance(numbers, Tensor) else list(numbers))
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"The numbers are of type {type(numbers).__name__} and hold no integers.",
            "Pass one integer for each row in `numbers`.",
        ) from error


def _unique_rows(x: Tensor) -> int:
    """Number of different rows; several times as fast as ``torch.unique(x, dim=0)``."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.rand(x.shape[1], generator=generator, dtype=x.dtype).to(x.device)
    ordered = x[(x @ direction).argsort()]  # equal rows come side by side
    return len(x) - int((ordered[1:] == ordered[:-1]).all(1).sum())


def check_consecutive(numbers: Tensor) -> int:
    """Check that numbers are consecutive and ascending, and return the first.

    Raises:
        DataError: The numbers are not consecutive; the error names the first gap.

    Example:
        >>> check_consecutive(torch.tensor([5, 6, 7]))
        5
    """
    steps = numbers.diff() != 1
    if bool(steps.any()):
        at = int(steps.nonzero()[0])
        before, after = int(numbers[at]), int(numbers[at + 1])
        raise DataError(
            f"A spectrum needs consecutive numbers, and {after} follows {before}.",
            f"Pass `numbers` up to {before}, in ascending order.",
        )
    return int(numbers[0])


def check_periods(periods: Sequence[int], size: int) -> tuple[int, ...]:
    """Check that periods can be told from ``size`` numbers, and sort them.

    Raises:
        ConfigError: There is no period, or a period is below 2 or above a quarter of ``size``.

    Example:
        >>> check_periods([10, 2], 100)
        (2, 10)
    """
    periods = list_periods(periods)
    if not periods or min(periods) < 2 or max(periods) > size // 4:
        raise ConfigError(
            f"periods={list(periods)} cannot be probed on {size} numbers.",
            f"Give whole numbers from 2 to {size // 4}, a quarter of the numbers.",
        )
    return tuple(sorted(set(periods)))


def list_periods(periods: Iterable[Any]) -> tuple[int, ...]:
    """Return periods as whole numbers, also those of an array or a tensor.

    Raises:
        ConfigError: They are no whole numbers.

    Example:
        >>> list_periods(torch.tensor([2, 10]))
        (2, 10)
    """
    try:
        return tuple(map(operator.index, periods))
    except TypeError:
        raise ConfigError(
            f"periods={periods!r} are no whole numbers.", "Give a list, such as [2, 5, 10]."
        ) from None
