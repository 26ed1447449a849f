"""LightningDataModules of number_probing: addition, and text with numbers in it.

Axes: B mini-batch, L tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch

from fulgurite.data.datamodules import SequenceDataModule, TextDataModule, keep_batch
from fulgurite.data.splits import check_min
from fulgurite.datamodules.number_probing.addition import AdditionTask, PairList, PairStream
from fulgurite.datamodules.number_probing.corpus import (
    TokenCache,
    TokenWindows,
    cached_tokens,
)
from fulgurite.datamodules.number_probing.perturbations import parse_perturbations
from fulgurite.datamodules.number_probing.tokenizers import make_tokenizer, number_tokens
from fulgurite.errors import DataError

__all__ = ["AdditionDataModule", "NumberTextDataModule"]

_TRAIN, _VAL, _TEST = range(3)  # random streams of `seed`
_LISTED = 2048  # operands up to which all pairs are listed


class _NumberDataModule(SequenceDataModule):
    """Base of both DataModules: their data sets give whole batches.

    Attributes:
        number_ids: Token of each number; complete after :meth:`setup`.
    """

    number_ids: dict[int, int]

    def collate_function(self) -> Callable[[Any], Any]:
        """Return the collation that keeps the batches of data sets."""
        return keep_batch


class AdditionDataModule(_NumberDataModule):
    """Addition a + b = c of numbers that are ``tokens`` digits of a base.

    Batches are ``{"tokens": (B, L) int64, "targets": (B, L) int64}`` with L = 3 tokens + 1 and
    targets at the answer only. All pairs are split once, by ``seed``, into those for training, for
    validation and for test, which share none, so that neither memorisation nor the choice of a
    checkpoint helps in the test. Small tasks are enumerated and reshuffled in every pass; large
    ones are sampled without end.

    Args:
        base: Number of digits, which are the numbers that can be probed.
        tokens: Digits of an operand and of the sum.
        order: ``msb`` has the most significant digit first, ``lsb`` the least.
        carry: Carry into the next digit; without, each digit of c is (a_i + b_i) mod base.
        overflow: ``wrap`` leaves out the carry of the most significant digit; ``bound`` has only
            pairs whose sum has no further digit; ``auto`` bounds one token and wraps several.
        train_fraction: Fraction of all pairs that is for training. Half of the remaining
            pairs is for validation, the other half for test.
        mirrored: Keep a + b and b + a in the same part.
        batch_size: Problems of a batch, on each rank.
        steps_per_epoch: Training batches of one epoch on each rank.
        val_size: Problems for validation at most.
        test_size: Problems for test and prediction at most.
        num_workers: Processes that generate; batches do not depend on it.
        seed: Seed of the split and of all draws, apart from the seed of the run.

    Raises:
        ConfigError: An argument is out of range.
        DataError: A part has no pairs.

    Source: arXiv 2604.20817, card section 2.5; template, split and sizes: inferred.
    """

    def __init__(
        self,
        base: int = 100,
        tokens: int = 2,
        *,
        order: Literal["msb", "lsb"] = "msb",
        carry: bool = True,
        overflow: Literal["auto", "wrap", "bound"] = "auto",
        train_fraction: float = 0.6,
        mirrored: bool = True,
        batch_size: int = 512,
        steps_per_epoch: int = 100,
        val_size: int = 2048,
        test_size: int = 8192,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_min("batch_size", batch_size)
        check_min("steps_per_epoch", steps_per_epoch)
        check_min("val_size", val_size, 0)
        check_min("test_size", test_size, 0)
        check_min("num_workers", num_workers, 0)
        self.task = AdditionTask(
            base, tokens, order, carry, overflow, train_fraction, mirrored, seed
        )
        self.save_hyperparameters(logger=False)
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.steps_per_epoch, self.sizes = steps_per_epoch, (val_size, test_size)
        self.number_ids = {n: n for n in range(base)}
        self._ready = False

    @property
    def vocab_size(self) -> int:
        """Number of different tokens, known before :meth:`setup`."""
        return self.task.vocab_size

    @property
    def sequence_length(self) -> int:
        """L, known before :meth:`setup`."""
        return self.task.sequence_length

    def setup(self, stage: str | None = None) -> None:
        """List or draw the pairs; does nothing the second time.

        Raises:
            DataError: A part has no pairs.
        """
        if self._ready:
            return
        val, test = self.sizes
        seeds = [self.seed * 3 + stream for stream in (_TRAIN, _VAL, _TEST)]
        if self.task.size > _LISTED:
            self._train = PairStream(self.task, "train", seeds[_TRAIN], 0)
            self._val = PairStream(self.task, "val", seeds[_VAL], val)
            self._test = PairStream(self.task, "test", seeds[_TEST], test)
        else:
            self._train = PairList(self.task, "train", seeds[_TRAIN])
            self._val = PairList(self.task, "val", None, val)
            self._test = PairList(self.task, "test", None, test)
            for name, size, data in (
                ("training", 1, self._train),
                ("validation", val, self._val),
                ("test", test, self._test),
            ):
                if size and not len(data):
                    raise DataError(
                        f"Of the pairs of base {self.task.base}, none is for {name}.",
                        "Set `--data.init_args.base` higher, `--data.init_args.train_fraction` "
                        "nearer to one half, or another `--data.init_args.seed`.",
                    )
        self._ready = True


class NumberTextDataModule(_NumberDataModule, TextDataModule):
    """Text whose numbers 0 … 999 are tokens of their own: predict the next token.

    Batches are ``{"tokens": (B, L) int64, "targets": (B, L) int64}``, with ``"documents"`` where
    pieces of a sequence must not see each other. The files are tokenised once into a
    memory-mapped cache; its beginning is training, its end test, what is between validation.
    Training windows lie at random places, which seed, epoch and number decide; those of
    validation and test follow each other.

    Args:
        paths: Text files and parquet tables, folders or glob patterns, absolute or relative to
            ``FULGURITE_DATA``; ``stdlib`` or ``null`` for the sources of Python's standard
            library, about 12 MB of real text that is on every machine (but is another one for
            another Python).
        suffixes: Endings of the names of files that are read in folders.
        column: Column of parquet tables that holds the text.
        tokenizer: ``words``, each number 0 … 999 one token; ``digits``, each digit one; or a
            ``tokenizer.json`` (or its folder).
        vocab_size: Tokens of ``words`` and ``digits``; a file has its own number.
        perturb: ``context:L``, ``isolate:K``, ``swap``, ``unigram``, or a list of them; ``null``
            for text as it is. Validation and test text is changed alike.
        length: Tokens L of a sequence.
        batch_size: Sequences of a batch, on each rank.
        val_fraction: Fraction of the tokens for validation; 0 for none.
        test_fraction: Fraction of the tokens for test and prediction; 0 for none.
        documents: Mark the documents of a sequence, which must not see each other.
        steps_per_epoch: Training batches of one epoch on each rank; as many as cover the text
            about once if not given.
        val_sequences: Keep at most this many validation windows, spread evenly; ``null`` for all.
        num_workers: Processes that read; batches do not depend on it.
        seed: Seed of windows and perturbations, apart from the seed of the run.

    Attributes:
        number_ids: Token of each number, after :meth:`setup`. Where a tokenizer has two, alone
            and after a space, those of the spelling that the text has more of.
        number_pieces: Tokens of each number 0 … 999 by itself, after :meth:`setup`.

    Raises:
        ConfigError: An argument is out of range.

    Source: arXiv 2604.20817, card sections 2.2, 2.3 and 6; windows and splits: inferred.
    """

    def __init__(
        self,
        paths: list[str] | str | None = None,
        *,
        suffixes: list[str] = [".txt", ".md", ".rst", ".py", ".parquet"],  # noqa: B006  # copied
        column: str = "text",
        tokenizer: str = "words",
        vocab_size: int = 8192,
        perturb: list[str] | str | None = None,
        length: int = 256,
        batch_size: int = 16,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        documents: bool = False,
        steps_per_epoch: int | None = None,
        val_sequences: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.set_text_options(
            paths, suffixes, length, batch_size, (val_fraction, test_fraction), steps_per_epoch,
            val_sequences, num_workers, seed,
        )  # fmt: skip
        self.perturbation = parse_perturbations(perturb)
        self.tokenizer = make_tokenizer(tokenizer, vocab_size)
        self.save_hyperparameters(logger=False)
        self.column, self.documents = column, documents
        self.number_ids = {}
        self.number_pieces: dict[int, tuple[int, ...]] = {}
        self._prepared: TokenCache | None = None
        self._ready = False

    @property
    def vocab_size(self) -> int:
        """Number of different tokens, known before :meth:`setup`."""
        return self.tokenizer.vocab_size

    @property
    def sequence_length(self) -> int:
        """L, known before :meth:`setup`."""
        return self.length

    def _cache(self) -> TokenCache:
        files = [path for _, path in self.find_text()]
        return cached_tokens(files, self.tokenizer, self.column)

    def prepare_data(self) -> None:
        """Fill the cache, once per machine.

        Raises:
            DataError: There is no text, or it cannot be read.
        """
        # saves this process from reading all files again in `setup`, to know their contents
        self._prepared = self._cache()

    def setup(self, stage: str | None = None) -> None:
        """Map the tokens and split them; does nothing the second time.

        Raises:
            DataError: There is no text, or less than one sequence of it for a split.
        """
        if self._ready:
            return
        #: All tokens, mapped.
        self.cache = cache = self._prepared or self._cache()
        self.split_text(len(cache), "tokens")
        is_number = np.zeros(self.vocab_size, np.bool_)
        is_number[[*self.tokenizer.numbers]] = True
        limits = None, self.val_sequences, None
        self._train, self._val, self._test = (
            TokenWindows(
                cache, part, length=self.length, perturbation=self.perturbation,
                is_number=is_number, seed=self.seed, random=split == _TRAIN,
                documents=self.documents, limit=limit,
            )
            for split, (part, limit) in enumerate(zip(self.parts, limits, strict=True))
        )  # fmt: skip
        self.number_ids = number_tokens(self.tokenizer, cache.counts)
        pieces = self.tokenizer.encode([str(n) for n in range(1000)])
        self.number_pieces = {n: tuple(tokens) for n, tokens in enumerate(pieces)}
        self._ready = True

    @property
    def token_counts(self) -> torch.Tensor:
        """How often each token occurs in the text as it is. Shape: (V,), int64."""
        return torch.from_numpy(self.cache.counts.copy())
