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

__all__ = ["MARK", "QUERY", "NeedleTask", "Needles", "place_needles"]

#: Token before the key and the value of a needle.
MARK = 0
#: Token before the key that is asked for.
QUERY = 1

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
class NeedleTask:
    """Sequences ``filler … MARK key value … filler QUERY key`` → value.

    Tokens are numbered MARK, QUERY, keys, values, filler. Keys of one sequence are distinct.

    Args:
        length: N.
        keys: Number of key tokens.
        values: Number of value tokens.
        filler: Number of filler tokens.
        needles: M.
        next_token: Make each target the next token, instead of the answer alone.

    Raises:
        ConfigError: A number is less than 1, the needles do not fit, or there are too few keys.

    Source: inferred; the retrieval test of long-context language models.

    Example:
        >>> task = NeedleTask(length=8, keys=2, values=3, filler=4)
        >>> tokens, targets, depth = task.make(np.random.default_rng(0))
        >>> start = int((tokens == MARK).nonzero())
        >>> bool(tokens[start + 1] == tokens[-1]), bool(tokens[start + 2] == targets[-1])
        (True, True)
    """

    length: int
    keys: int = 16
    values: int = 16
    filler: int = 64
    needles: int = 1
    next_token: bool = False

    def __post_init__(self) -> None:
        for name in ("length", "keys", "values", "filler", "needles"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"The number {name} is {getattr(self, name)}.",
                    f"Set `--data.init_args.{name}` to 1 or more.",
                )
        needed = _NEEDLE * self.needles + _QUESTION
        if needed > self.length:
            raise ConfigError(
                f"There are {self.needles} needles, which need {needed} tokens with the question, "
                f"in a length of {self.length}.",
                f"Set `--data.init_args.length` to {needed} or more, or hide fewer "
                "`--data.init_args.needles`.",
            )
        if self.needles > self.keys:
            raise ConfigError(
                f"There are {self.needles} needles with distinct keys, and {self.keys} keys.",
                f"Set `--data.init_args.keys` to {self.needles} or more, or hide fewer "
                "`--data.init_args.needles`.",
            )

    @property
    def vocab_size(self) -> int:
        """Number of different tokens."""
        return 2 + self.keys + self.values + self.filler

    def make(self, generator: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens, targets, and the depth of the needle that is asked for.

        Shape:
            - tokens, targets: (N,) int64; depth: () float32, from 0 (first) to 1 (just before the
              question).
        """
        haystack_length = self.length - _QUESTION
        starts = place_needles(haystack_length, self.needles, generator)
        keys = torch.from_numpy(generator.choice(self.keys, self.needles, replace=False)) + 2
        values = torch.from_numpy(generator.integers(self.values, size=self.needles))
        values += 2 + self.keys
        query = int(generator.integers(self.needles))
        tokens = torch.from_numpy(generator.integers(self.filler, size=self.length))
        tokens += 2 + self.keys + self.values
        tokens[starts], tokens[starts + 1], tokens[starts + 2] = MARK, keys, values
        tokens[-2], tokens[-1] = QUERY, keys[query]
        targets = tokens.roll(-1) if self.next_token else torch.full_like(tokens, IGNORED)
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
