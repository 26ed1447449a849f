"""Addition of whole numbers whose digits are tokens of a base.

Axes: I problems, K tokens of an operand, L tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fulgurite.datamodules.number_probing.batches import BatchDataset
from fulgurite.datamodules.number_probing.draws import Ints, draw_below, hash_integers
from fulgurite.errors import ConfigError
from fulgurite.options import (
    IntAboveOne,
    NonNegativeInt,
    OpenUnitInterval,
    PositiveInt,
    check_options,
)

__all__ = [
    "IGNORED", "AdditionOptions", "AdditionTask", "PairList", "PairSplit", "PairStream", "Part",
]  # fmt: skip

#: Parts of all pairs; no pair is in two parts.
Part = Literal["train", "val", "test"]

#: Target that a loss leaves out: ``ignore_index`` of PyTorch's cross-entropy.
IGNORED = -100

_SPLIT, _DRAW, _ORDER, _HOLD_OUT = range(4)  # random streams of a seed
Flags = npt.NDArray[np.bool_]
_LARGEST = 2**62  # sums of two numbers below it stay in int64


@dataclass(frozen=True)
class AdditionOptions:
    """Problems ``a + b = c``, each number ``tokens`` digits of a base.

    Args:
        base: Number of digits, which are the numbers that can be probed; 1000 for three decimal
            digits in a token.
        tokens: K, digits of an operand and of the sum.
        order: ``msb`` has the most significant digit first, ``lsb`` the least.
        carry: Carry into the next digit; without, each digit of c is (a_i + b_i) mod base.
        overflow: ``wrap`` drops the carry of the most significant digit; ``bound`` has only
            pairs whose sum has K digits; ``auto`` bounds K = 1 and wraps others.

    Raises:
        ConfigError: A number is out of range, or sums without carries are to be bounded.
    """

    base: IntAboveOne = 100
    tokens: PositiveInt = 2
    order: Literal["msb", "lsb"] = "msb"
    carry: bool = True
    overflow: Literal["auto", "wrap", "bound"] = "auto"

    def __post_init__(self) -> None:
        check_options(self, "data.init_args.task")
        if self.base**self.tokens >= _LARGEST:
            raise ConfigError(
                f"Operands of {self.tokens} tokens in base {self.base} do not fit 62 bits.",
                "Lower `--data.init_args.task.tokens` or `--data.init_args.task.base`.",
            )
        if self.bounded and not self.carry:
            raise ConfigError(
                "Sums without carries cannot be bounded, for they do not grow.",
                "Set `--data.init_args.task.overflow=wrap`, or `--data.init_args.task.carry=true`.",
            )

    @property
    def bounded(self) -> bool:
        """Whether only pairs whose sum has K digits are problems."""
        return self.overflow == "bound" or (self.overflow == "auto" and self.tokens == 1)


@dataclass(frozen=True)
class PairSplit:
    """How all pairs are split once, by the seed, into parts that share none.

    Args:
        train_fraction: Fraction of all pairs that is for training. Half of the remaining
            pairs is for validation, the other half for test.
        mirrored: Keep a + b and b + a in the same part.
        val_size: Problems for validation at most.
        test_size: Problems for test and prediction at most.

    Raises:
        ConfigError: A number is out of range.
    """

    train_fraction: OpenUnitInterval = 0.6
    mirrored: bool = True
    val_size: NonNegativeInt = 2048
    test_size: NonNegativeInt = 8192

    def __post_init__(self) -> None:
        check_options(self, "data.init_args.split")


@dataclass(frozen=True)
class AdditionTask(AdditionOptions):
    """Problems ``a + b = c`` as tokens, each pair in one part.

    Tokens 0 … base-1 are the digits, ``base`` is ``+``, ``base + 1`` is ``=``.

    Args:
        train_fraction: Fraction of all pairs that is for training.
        mirrored: Keep a + b and b + a in the same part.
        seed: Seed of the parts.

    Raises:
        ConfigError: A number is out of range.

    Source: docs/papers/number_probing.md section 2.5 (bases, K, sums, c_i); 0.6/0.2/0.2, mirrored
        pairs and the template: inferred, the paper's are unknown.

    Example:
        >>> task = AdditionTask(base=10, tokens=2)
        >>> task.encode(np.array([17]), np.array([5]))["tokens"]
        tensor([[ 1,  7, 10,  0,  5, 11,  2]])
    """

    train_fraction: OpenUnitInterval = 0.6
    mirrored: bool = True
    seed: NonNegativeInt = 0

    @property
    def size(self) -> int:
        """Number of operands, base**K."""
        return int(self.base**self.tokens)

    @property
    def vocab_size(self) -> int:
        """Number of different tokens."""
        return self.base + 2

    @property
    def sequence_length(self) -> int:
        """L: all tokens but the last, which is only predicted."""
        return 3 * self.tokens + 1

    def digits(self, numbers: Ints) -> Ints:
        """Digits in the order of the task. Shape: (I,) to (I, K)."""
        powers = self.base ** np.arange(self.tokens, dtype=np.int64)
        digits: Ints = numbers[:, None] // powers % self.base
        return digits[:, ::-1] if self.order == "msb" else digits

    def answer(self, a: Ints, b: Ints) -> Ints:
        """Digits of c. Shape: (I,) and (I,) to (I, K)."""
        if self.carry:
            return self.digits((a + b) % self.size)
        return (self.digits(a) + self.digits(b)) % self.base

    def encode(self, a: Ints, b: Ints) -> dict[str, Tensor]:
        """Sequences of problems: tokens, and targets at the answer only. Shapes: (I, L)."""
        plus, equals = (np.full((len(a), 1), self.base + i) for i in range(2))
        sequences = np.concatenate(
            [self.digits(a), plus, self.digits(b), equals, self.answer(a, b)], 1
        ).astype(np.int64)
        targets = sequences[:, 1:].copy()
        targets[:, : -self.tokens] = IGNORED
        return {
            "tokens": torch.from_numpy(sequences[:, :-1].copy()),
            "targets": torch.from_numpy(targets),
        }

    def is_training(self, a: Ints, b: Ints) -> Flags:
        """Whether pairs are for training. Shape: (I,) and (I,) to (I,)."""
        limit = np.uint64(self.train_fraction * 2**53)
        is_training: Flags = (self._hash_pairs(_SPLIT, a, b) >> np.uint64(11)) < limit
        return is_training

    def is_in_part(self, part: Part, a: Ints, b: Ints) -> Flags:
        """Whether pairs are in a part. Shape: (I,) and (I,) to (I,)."""
        is_training = self.is_training(a, b)
        if part == "train":
            return is_training
        in_test_half = (self._hash_pairs(_HOLD_OUT, a, b) >> np.uint64(63)).astype(np.bool_)
        is_in_part: Flags = ~is_training & (in_test_half == (part == "test"))
        return is_in_part

    def _hash_pairs(self, stream: int, a: Ints, b: Ints) -> npt.NDArray[np.uint64]:
        """Random bits of pairs, the same for a + b and b + a if ``mirrored``."""
        if self.mirrored:
            a, b = np.minimum(a, b), np.maximum(a, b)
        return hash_integers(self.seed, stream, a, b)


class PairStream(BatchDataset):
    """An endless sequence of random pairs; the number of the draw decides the pair.

    Args:
        task: The problems.
        part: Part of the pairs that are drawn.
        seed: Seed of the draws.
        size: Draws of an evaluation; a sampler may draw more.
    """

    def __init__(self, task: AdditionTask, part: Part, seed: int, size: int) -> None:
        self.task, self.part, self.seed, self.size = task, part, seed, size

    def __len__(self) -> int:
        return self.size

    def pairs(self, indices: Sequence[int]) -> tuple[Ints, Ints]:
        """Operands of draws. Shapes: (I,)."""
        numbers = np.asarray(indices, np.int64)
        a, b = np.zeros_like(numbers), np.zeros_like(numbers)
        pending, attempt = np.arange(len(numbers)), 0
        while len(pending):  # pairs of another part are drawn again
            key = self.seed, _DRAW, int(self.part == "train"), numbers[pending], attempt
            first, second = (draw_below(self.task.size, *key, i) for i in range(2))
            if self.task.bounded:  # the upper triangle, turned over, is the lower one
                outside = first + second >= self.task.size
                first = np.where(outside, self.task.size - 1 - first, first)
                second = np.where(outside, self.task.size - 1 - second, second)
            fits = self.task.is_in_part(self.part, first, second)
            a[pending[fits]], b[pending[fits]] = first[fits], second[fits]
            pending, attempt = pending[~fits], attempt + 1
        return a, b

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        return self.task.encode(*self.pairs(indices))


class PairList(BatchDataset):
    """All pairs of one part, in a new order in every pass of them.

    Args:
        task: The problems, with base**K of at most a few thousand.
        part: Part of the pairs that are listed.
        seed: Seed of the orders; None to keep the pairs in order.
        limit: Keep at most this many pairs, chosen at random.
    """

    def __init__(
        self, task: AdditionTask, part: Part, seed: int | None, limit: int | None = None
    ) -> None:
        a, b = (x.ravel() for x in np.indices((task.size, task.size), dtype=np.int64))
        in_part = task.is_in_part(part, a, b)
        if task.bounded:
            in_part &= a + b < task.size
        self.task, self.seed = task, seed
        self.a, self.b = a[in_part], b[in_part]
        if limit is not None and limit < len(self.a):
            hashes = hash_integers(task.seed, _ORDER, np.arange(len(self.a)))
            sample = np.sort(hashes.argsort()[:limit])
            self.a, self.b = self.a[sample], self.b[sample]
        self._pass, self._order = -1, np.arange(len(self.a))

    def __len__(self) -> int:
        return len(self.a)

    def rows(self, indices: Sequence[int]) -> Ints:
        """Index of each draw in the list; draw n is in pass n // length. Shape: (I,)."""
        passes, rows = np.divmod(np.asarray(indices, np.int64), len(self.a))
        if self.seed is None:
            return rows
        shuffled_rows = np.empty_like(rows)
        for pass_number in np.unique(passes):
            if pass_number != self._pass:
                key = self.seed, _ORDER, int(pass_number)
                order = hash_integers(*key, np.arange(len(self.a))).argsort()
                self._pass, self._order = int(pass_number), order
            in_pass = passes == pass_number
            shuffled_rows[in_pass] = self._order[rows[in_pass]]
        return shuffled_rows

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        rows = self.rows(indices)
        return self.task.encode(self.a[rows], self.b[rows])
