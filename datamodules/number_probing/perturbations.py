"""The paper's perturbations of text, which take away one signal about numbers each.

Two of them keep pieces of a sequence apart (``context:l``, ``isolate:k``), two put other numbers
in the text (``swap``, ``unigram``). Replacements are functions of a number's position, so that
nothing is written anew and every draw of a window sees the same text.

Axes: B batch, L tokens, I number tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fulgurite.datamodules.number_probing.draws import Ints, draw_below
from fulgurite.errors import ConfigError

__all__ = [
    "Perturbation",
    "block_ids",
    "context_starts",
    "isolate_starts",
    "parse_perturbations",
    "replacement",
]

Bools = npt.NDArray[np.bool_]

_SWAP, _UNIGRAM = range(100, 102)  # random streams of a seed, apart from those of draws


@dataclass(frozen=True)
class Perturbation:
    """A perturbation of text.

    Args:
        context: Number of consecutive tokens that see each other; 0 for all.
        isolate: Number of consecutive number tokens that see each other; 0 for all.
        numbers: How numbers are replaced: ``swap``, ``unigram``, or None for not at all.
    """

    context: int = 0
    isolate: int = 0
    numbers: str | None = None


def parse_perturbations(perturb: str | Sequence[str] | None) -> Perturbation:
    """Read ``context:64``, ``isolate:8``, ``swap`` or ``unigram``, or several of them.

    Raises:
        ConfigError: A perturbation is unknown, has a wrong size, or excludes another.

    Example:
        >>> parse_perturbations(["swap", "isolate:1"])
        Perturbation(context=0, isolate=1, numbers='swap')

    Source: docs/papers/number_probing.md section 2.3.
    """
    options: dict[str, int | str] = {}
    for text in [perturb] if isinstance(perturb, str) else perturb or []:
        name, _, size = text.partition(":")
        key = name if name in ("context", "isolate") else "numbers"
        takes_size = key == name
        valid = size.isdigit() and int(size) > 0 if takes_size else name in ("swap", "unigram")
        if not valid or (size and not takes_size):
            raise ConfigError(
                f"There is no perturbation {text!r}.",
                "Set `--data.init_args.text.perturb` to context:L, isolate:K, swap or unigram, or "
                "to a list of them.",
            )
        if key in options:
            raise ConfigError(
                f"The perturbation {text!r} excludes one before it.",
                "Give `--data.init_args.text.perturb` one size of each, and swap or unigram.",
            )
        options[key] = int(size) if takes_size else name
    return Perturbation(**options)  # type: ignore[arg-type]


def context_starts(shape: tuple[int, int], length: int) -> Bools:
    """Whether a piece of ``length`` tokens begins at each token. Shape: (B, L).

    Example:
        >>> context_starts((1, 5), 2).astype(int)
        array([[1, 0, 1, 0, 1]])

    Source: docs/papers/number_probing.md sections 2.3 and 6: every l tokens attention and state are
    reset.
    """
    starts = np.zeros(shape, np.bool_)
    starts[:, ::length] = True
    return starts


def isolate_starts(is_number: Bools, k: int) -> Bools:
    """Whether a piece begins at each token, if pieces hold at most k numbers each.

    A piece begins at every k-th number but the first.

    Args:
        is_number: Shape: (B, L).
        k: At least 1.

    Returns:
        Shape: (B, L).

    Example:
        >>> isolate_starts(np.array([[0, 1, 0, 1, 1, 0, 1]], bool), 2).astype(int)
        array([[1, 0, 0, 0, 1, 0, 0]])

    Source: docs/papers/number_probing.md section 2.3; where pieces begin: inferred.
    """
    before = is_number.cumsum(1) - is_number
    starts: Bools = is_number & (before > 0) & (before % k == 0)
    starts[:, 0] = True
    return starts


def block_ids(starts: Bools) -> Ints:
    """Ids of pieces from where they begin, counted from 0 in each row. Shape: (B, L).

    Example:
        >>> block_ids(np.array([[1, 0, 1, 0]], bool))
        array([[0, 0, 1, 1]])

    Source: inferred.
    """
    ids: Ints = starts.cumsum(1, dtype=np.int64)
    return ids - ids[:, :1]


def replacement(kind: str, indices: Ints, count: int, seed: int) -> Ints:
    """Index of the number that replaces each number of a text.

    ``swap`` takes the same sequence of numbers from elsewhere in the text: the order of numbers is
    kept, the text around them is not. ``unigram`` draws each number at random from all.

    Args:
        kind: ``swap`` or ``unigram``.
        indices: Indices of numbers of the text, from 0. Shape: (I,).
        count: Number of numbers in the text.
        seed: Seed of the replacements.

    Returns:
        Shape: (I,).

    Example:
        >>> swapped = replacement("swap", np.arange(8), 8, seed=0)
        >>> np.unique(np.diff(swapped) % 8), bool((swapped == np.arange(8)).any())
        (array([1]), False)

    Source: docs/papers/number_probing.md section 2.3 (what is kept and what is lost); how:
    inferred.
    """
    if kind == "unigram":
        return draw_below(count, seed, _UNIGRAM, indices) if len(indices) else indices
    shift = count // 4 + int(draw_below(max(1, count // 2), seed, _SWAP)[0])
    return (indices + max(1, shift)) % count
