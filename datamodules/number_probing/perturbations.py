"""The paper's perturbations of text, which take away one signal about numbers each.

Two of them keep pieces of a sequence apart (``context:l``, ``isolate:k``), two put other numbers
in the text (``swap``, ``unigram``). Replacements are functions of where a number is, so that
nothing is written anew and every draw of a window sees the same text.

Axes: B batch, L tokens, I number tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fulgurite.datamodules.number_probing.draws import Ints, below
from fulgurite.errors import ConfigError

__all__ = [
    "Perturbation",
    "blocks_of",
    "context_starts",
    "isolate_starts",
    "parse_perturbations",
    "replacement",
]

Bools = npt.NDArray[np.bool_]

_SWAP, _UNIGRAM = range(100, 102)  # random streams of a seed, apart from those of draws


@dataclass(frozen=True)
class Perturbation:
    """What is done to text.

    Args:
        context: Tokens that may see each other; 0 for all.
        isolate: Number tokens that may see each other; 0 for all.
        numbers: What stands in the place of numbers: ``swap``, ``unigram``, or themselves.
    """

    context: int = 0
    isolate: int = 0
    numbers: str | None = None


def parse_perturbations(given: str | Sequence[str] | None) -> Perturbation:
    """Read ``context:64``, ``isolate:8``, ``swap`` or ``unigram``, or several of them.

    Raises:
        ConfigError: One is unknown, has a wrong size, or excludes another.

    Example:
        >>> parse_perturbations(["swap", "isolate:1"])
        Perturbation(context=0, isolate=1, numbers='swap')

    Source: arXiv 2604.20817, card section 2.3.
    """
    found: dict[str, int | str] = {}
    for one in [given] if isinstance(given, str) else given or []:
        name, _, size = one.partition(":")
        key = name if name in ("context", "isolate") else "numbers"
        sized = key == name
        right = size.isdigit() and int(size) > 0 if sized else name in ("swap", "unigram")
        if not right or (size and not sized):
            raise ConfigError(
                f"There is no perturbation {one!r}.",
                "Set `--data.init_args.perturb` to context:L, isolate:K, swap or unigram, or to a "
                "list of them.",
            )
        if key in found:
            raise ConfigError(
                f"The perturbation {one!r} excludes one before it.",
                "Give `--data.init_args.perturb` one size of each, and swap or unigram.",
            )
        found[key] = int(size) if sized else name
    return Perturbation(**found)  # type: ignore[arg-type]


def context_starts(shape: tuple[int, int], length: int) -> Bools:
    """Where pieces of so many tokens begin. Shape: (B, L).

    Example:
        >>> context_starts((1, 5), 2).astype(int)
        array([[1, 0, 1, 0, 1]])

    Source: arXiv 2604.20817, card sections 2.3 and 6: every l tokens attention and state are reset.
    """
    starts = np.zeros(shape, np.bool_)
    starts[:, ::length] = True
    return starts


def isolate_starts(is_number: Bools, k: int) -> Bools:
    """Where pieces begin that hold at most k numbers each: at each k-th number but the first.

    Args:
        is_number: Shape: (B, L).
        k: At least 1.

    Returns:
        Shape: (B, L).

    Example:
        >>> isolate_starts(np.array([[0, 1, 0, 1, 1, 0, 1]], bool), 2).astype(int)
        array([[1, 0, 0, 0, 1, 0, 0]])

    Source: arXiv 2604.20817, card section 2.3; where pieces begin: inferred.
    """
    before = is_number.cumsum(1) - is_number
    starts: Bools = is_number & (before > 0) & (before % k == 0)
    starts[:, 0] = True
    return starts


def blocks_of(starts: Bools) -> Ints:
    """Ids of pieces from where they begin, counted from 0 in each row. Shape: (B, L).

    Example:
        >>> blocks_of(np.array([[1, 0, 1, 0]], bool))
        array([[0, 0, 1, 1]])

    Source: inferred.
    """
    found: Ints = starts.cumsum(1, dtype=np.int64)
    return found - found[:, :1]


def replacement(kind: str, places: Ints, count: int, seed: int) -> Ints:
    """Which number of a text stands in the place of another.

    ``swap`` goes on with the same sequence of numbers from elsewhere in the text: what follows
    what stays, with what text it stands does not. ``unigram`` draws each anew from all.

    Args:
        kind: ``swap`` or ``unigram``.
        places: Which numbers of the text are asked for, from 0. Shape: (I,).
        count: Numbers of the text.
        seed: Of the choice.

    Returns:
        Shape: (I,).

    Example:
        >>> swapped = replacement("swap", np.arange(8), 8, seed=0)
        >>> np.unique(np.diff(swapped) % 8), bool((swapped == np.arange(8)).any())
        (array([1]), False)

    Source: arXiv 2604.20817, card section 2.3 (what is kept and what is lost); how: inferred.
    """
    if kind == "unigram":
        return below(count, seed, _UNIGRAM, places) if len(places) else places
    shift = count // 4 + int(below(max(1, count // 2), seed, _SWAP)[0])
    return (places + max(1, shift)) % count
