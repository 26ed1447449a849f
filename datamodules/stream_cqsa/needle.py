"""Needles in a haystack: pairs of a key and a value, hidden in random filler of any length.

Shapes: N tokens of a sequence, M needles.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fulgurite.datamodules.stream_cqsa.text import IGNORED
from fulgurite.errors import ConfigError
from fulgurite.options import NonNegativeInt, PositiveInt, check_options

__all__ = [
    "MARK", "QUERY", "NeedleOptions", "NeedleSizes", "NeedleTask", "Needles", "place_needles",
]  # fmt: skip

#: Token before the key and the value of a needle.
MARK = 0
#: Token before the key that is asked for.
QUERY = 1

_KEY = "data.init_args.task"
_NEEDLE, _QUESTION = 3, 2  # tokens of `MARK key value` and of `QUERY key`


def place_needles(length: int, needles: int, generator: np.random.Generator) -> Tensor:
    """Choose first tokens of needles: each placement without overlap is equally likely.

    Args:
        length: Number of tokens, at least three for each needle.
        needles: M.
        generator: Random generator of the choice.

    Shape:
        - (M,) int64, ascending, at least 3 apart, all in [0, length - 3].

    Example:
        >>> place_needles(9, 3, np.random.default_rng(0)).tolist()
        [0, 3, 6]
    """
    # draw as if a needle were one token, then add the two other tokens of each
    slots = length - (_NEEDLE - 1) * needles
    compact_starts = np.sort(generator.choice(slots, needles, replace=False))
    return torch.from_numpy(compact_starts.astype(np.int64) + (_NEEDLE - 1) * np.arange(needles))


@dataclass(frozen=True)
class NeedleOptions:
    """What is hidden in the filler, and asked for.

    Args:
        keys: Number of key tokens.
        values: Number of value tokens.
        filler: Number of filler tokens.
        needles: Needles M in a sequence, with distinct keys; one of them is asked for.
        next_token: Make each target the next token, instead of the answer alone.

    Raises:
        ConfigError: A number is less than 1, or there are too few keys.
    """

    keys: PositiveInt = 16
    values: PositiveInt = 16
    filler: PositiveInt = 64
    needles: PositiveInt = 1
    next_token: bool = False

    def __post_init__(self) -> None:
        check_options(self, _KEY)
        if self.needles > self.keys:
            raise ConfigError(
                f"There are {self.needles} needles with distinct keys, and {self.keys} keys.",
                f"Set `--{_KEY}.keys` to {self.needles} or more, or hide fewer `--{_KEY}.needles`.",
            )


@dataclass(frozen=True)
class NeedleSizes:
    """Number of sequences of each split.

    Args:
        train: Training sequences, in another order in each epoch.
        val: Validation sequences; 0 for none.
        test: Test sequences, also used for prediction; 0 for none.

    Raises:
        ConfigError: A number is out of range.
    """

    train: PositiveInt = 1024
    val: NonNegativeInt = 128
    test: NonNegativeInt = 256

    def __post_init__(self) -> None:
        check_options(self, "data.init_args.sizes")


@dataclass(frozen=True)
class NeedleTask:
    """Sequences ``filler … MARK key value … filler QUERY key`` → value.

    Tokens are numbered MARK, QUERY, keys, values, filler. Keys of one sequence are distinct.

    Args:
        length: N.
        options: What is hidden and asked for.

    Raises:
        ConfigError: The needles do not fit.

    Source: inferred; the retrieval test of long-context language models.

    Example:
        >>> task = NeedleTask(8, NeedleOptions(keys=2, values=3, filler=4))
        >>> tokens, targets, depth = task.make(np.random.default_rng(0))
        >>> start = int((tokens == MARK).nonzero())
        >>> bool(tokens[start + 1] == tokens[-1]), bool(tokens[start + 2] == targets[-1])
        (True, True)
    """

    length: int
    options: NeedleOptions = NeedleOptions()

    def __post_init__(self) -> None:
        needles = self.options.needles
        needed = _NEEDLE * needles + _QUESTION
        if needed > self.length:
            raise ConfigError(
                f"There are {needles} needles, which need {needed} tokens with the question, in a "
                f"length of {self.length}.",
                f"Set `--data.init_args.length` to {needed} or more, or hide fewer "
                f"`--{_KEY}.needles`.",
            )

    @property
    def vocab_size(self) -> int:
        """Number of different tokens."""
        options = self.options
        return 2 + options.keys + options.values + options.filler

    def make(self, generator: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens, targets, and the depth of the needle that is asked for.

        Shape:
            - tokens, targets: (N,) int64; depth: () float32, from 0 (first) to 1 (just before the
              question).
        """
        options = self.options
        haystack_length = self.length - _QUESTION
        starts = place_needles(haystack_length, options.needles, generator)
        keys = torch.from_numpy(generator.choice(options.keys, options.needles, replace=False)) + 2
        values = torch.from_numpy(generator.integers(options.values, size=options.needles))
        values += 2 + options.keys
        query = int(generator.integers(options.needles))
        tokens = torch.from_numpy(generator.integers(options.filler, size=self.length))
        tokens += 2 + options.keys + options.values
        tokens[starts], tokens[starts + 1], tokens[starts + 2] = MARK, keys, values
        tokens[-2], tokens[-1] = QUERY, keys[query]
        targets = tokens.roll(-1) if options.next_token else torch.full_like(tokens, IGNORED)
        targets[-1] = values[query]
        depth = starts[query].to(torch.float32) / max(1, haystack_length - _NEEDLE)
        return tokens, targets, depth


class Needles(Dataset[dict[str, Tensor]]):
    """A fixed number of sequences, each made when it is asked for, from its number.

    Args:
        task: The sequences.
        size: Number of sequences.
        seed: Seed of all sequences.
        split: Number of the split; other splits have other sequences.
    """

    def __init__(self, task: NeedleTask, size: int, seed: int, split: int) -> None:
        self.task, self.size, self.seed, self.split = task, size, seed, split

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = np.random.default_rng([self.seed, self.split, index])
        tokens, targets, depth = self.task.make(generator)
        return {"tokens": tokens, "targets": targets, "depth": depth}
