"""LightningDataModules of number_probing: addition, and text with numbers in it.

Axes: B mini-batch, L tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn

from fulgurite.base import save_options
from fulgurite.data.datamodules import SequenceDataModule, TextDataModule, keep_batch
from fulgurite.data.text import FileWindows
from fulgurite.data.text_options import TextOptions, TextSplit
from fulgurite.datamodules.number_probing.addition import (
    AdditionOptions,
    AdditionTask,
    PairList,
    PairSplit,
    PairStream,
)
from fulgurite.datamodules.number_probing.corpus import (
    TokenCache,
    TokenWindows,
    WindowOptions,
    cached_tokens,
)
from fulgurite.datamodules.number_probing.perturbations import parse_perturbations
from fulgurite.datamodules.number_probing.prediction import (
    InputProblems,
    InputTokens,
    TrainedTokenizer,
)
from fulgurite.datamodules.number_probing.tokenizers import make_tokenizer, number_tokens
from fulgurite.errors import CheckpointError, DataError
from fulgurite.options import (
    NonNegativeInt,
    PositiveInt,
    check_arguments,
    check_options,
    list_options,
    make_options,
)
from fulgurite.predictions import list_input_files

__all__ = [
    "AdditionDataModule", "NumberTextDataModule", "NumberTextOptions", "TokenizerOptions",
]  # fmt: skip

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
        task: The problems.
        split: How pairs are split, and how many are evaluated.
        batch_size: Problems of a batch, on each rank.
        steps_per_epoch: Training batches of one epoch on each rank.
        num_workers: Processes that generate; batches do not depend on it.
        seed: Seed of the split and of all draws, apart from the seed of the run.

    Raises:
        ConfigError: An argument is out of range.
        DataError: A part has no pairs.

    Source: docs/papers/number_probing.md section 2.5; template, split and sizes: inferred.
    """

    def __init__(
        self,
        task: AdditionOptions = AdditionOptions(),
        *,
        split: PairSplit = PairSplit(),
        batch_size: PositiveInt = 512,
        steps_per_epoch: PositiveInt = 100,
        num_workers: NonNegativeInt = 0,
        seed: NonNegativeInt = 0,
    ) -> None:
        super().__init__()
        check_arguments(AdditionDataModule.__init__, locals(), "data.init_args")
        save_options(self, logger=False)
        self.split = make_options(PairSplit, split)
        self.task = AdditionTask(
            **list_options(make_options(AdditionOptions, task)),
            train_fraction=self.split.train_fraction, mirrored=self.split.mirrored, seed=seed,
        )  # fmt: skip
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.steps_per_epoch = steps_per_epoch
        self.number_ids = {n: n for n in range(self.task.base)}
        self._ready = False

    @property
    def vocab_size(self) -> int:
        """Number of different tokens, known before :meth:`setup`."""
        return self.task.vocab_size

    @property
    def sequence_length(self) -> int:
        """L, known before :meth:`setup`."""
        return self.task.sequence_length

    def predict_from(self, path: Path, trained: Mapping[str, Any]) -> None:
        """Predict the sums of problems, a line ``a+b`` for each.

        Args:
            path: A file, or a folder of ``.txt`` files.
            trained: Nothing: the options say what a problem is.

        Raises:
            DataError: There is no such file, or a line is no problem of the training's kind.
        """
        problems = InputProblems(path, self.task)
        self._input, self._input_names = problems, problems.names

    def setup(self, stage: str | None = None) -> None:
        """List or draw the pairs; does nothing the second time.

        Raises:
            DataError: A part has no pairs.
        """
        if self._ready or self._input is not None:
            return
        val, test = self.split.val_size, self.split.test_size
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
                        "Set `--data.init_args.task.base` higher, "
                        "`--data.init_args.split.train_fraction` nearer to one half, or another "
                        "`--data.init_args.seed`.",
                    )
        self._ready = True


@dataclass(frozen=True)
class NumberTextOptions(TextOptions):
    """Which files of text are read, and how they are perturbed.

    Args:
        suffixes: Endings of the names of files that are read in folders.
        column: Column of parquet tables that holds the text.
        perturb: ``context:L``, ``isolate:K``, ``swap``, ``unigram``, or a list of them; ``null``
            for text as it is.

    Raises:
        ConfigError: A value is of another type.
    """

    suffixes: list[str] = field(default_factory=lambda: [".txt", ".md", ".rst", ".py", ".parquet"])
    column: str = "text"
    perturb: list[str] | str | None = None


@dataclass(frozen=True)
class TokenizerOptions:
    """What a token is.

    Args:
        name: ``words``, each number 0 … 999 one token; ``digits``, each digit one; or a
            ``tokenizer.json`` (or its folder).
        vocab_size: Tokens of ``words`` and ``digits``; a file has its own number.

    Raises:
        ConfigError: The number is out of range.
    """

    name: str = "words"
    vocab_size: PositiveInt = 8192

    def __post_init__(self) -> None:
        check_options(self, "data.init_args.tokenizer")


class NumberTextDataModule(_NumberDataModule, TextDataModule):
    """Text whose numbers 0 … 999 are tokens of their own: predict the next token.

    Batches are ``{"tokens": (B, L) int64, "targets": (B, L) int64}``, with ``"documents"`` where
    pieces of a sequence must not see each other. The files are tokenised once into a
    memory-mapped cache; its beginning is training, its end test, what is between validation.
    Training windows lie at random places, which seed, epoch and number decide; those of
    validation and test follow each other.

    Args:
        text: Which files are read, also parquet tables, and how they are perturbed. Validation
            and test text is changed alike.
        tokenizer: What a token is.
        split: How the tokens are split.
        length: Tokens L of a sequence.
        batch_size: Sequences of a batch, on each rank.
        steps_per_epoch: Training batches of one epoch on each rank; as many as cover the text
            about once if not given.
        num_workers: Processes that read; batches do not depend on it.
        seed: Seed of windows and perturbations, apart from the seed of the run.

    Attributes:
        number_ids: Token of each number, after :meth:`setup`. Where a tokenizer has two, alone
            and after a space, those of the spelling that the text has more of.
        number_pieces: Tokens of each number 0 … 999 by itself, after :meth:`setup`.

    Raises:
        ConfigError: An argument is out of range.

    Source: docs/papers/number_probing.md sections 2.2, 2.3 and 6; windows and splits: inferred.
    """

    def __init__(
        self,
        text: NumberTextOptions = NumberTextOptions(),
        *,
        tokenizer: TokenizerOptions = TokenizerOptions(),
        split: TextSplit = TextSplit(),
        length: PositiveInt = 256,
        batch_size: PositiveInt = 16,
        steps_per_epoch: PositiveInt | None = None,
        num_workers: NonNegativeInt = 0,
        seed: NonNegativeInt = 0,
    ) -> None:
        super().__init__()
        check_arguments(NumberTextDataModule.__init__, locals(), "data.init_args")
        save_options(self, logger=False)
        self.number_text = make_options(NumberTextOptions, text)
        split = make_options(TextSplit, split)
        self.set_text_options(
            self.number_text, split, length=length, steps_per_epoch=steps_per_epoch
        )
        self.perturbation = parse_perturbations(self.number_text.perturb)
        tokens = make_options(TokenizerOptions, tokenizer)
        self.tokenizer = make_tokenizer(tokens.name, tokens.vocab_size)
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
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
        return cached_tokens(files, self.tokenizer, self.number_text.column)

    def predict_from(self, path: Path, trained: Mapping[str, Any]) -> None:
        """Predict the tokens of files, in windows that follow each other; numbers stay as they are.

        Args:
            path: A file, or a folder of files with the suffixes of the options.
            trained: What the checkpoint holds of this DataModule: the vocabulary. Where that is
                nothing, the text of the training is read.

        Raises:
            DataError: There is no such file, or it is empty or cannot be read.
            CheckpointError: The checkpoint is of another tokenizer.
        """
        if trained:
            self._restore_tokenizer(trained)
        else:
            self.prepare_data()
            self.setup()
        tokenizer, column = TrainedTokenizer(self.tokenizer), self.number_text.column
        files = list_input_files(path, self.number_text.suffixes)
        caches = {name: cached_tokens([file], tokenizer, column) for name, file in files}
        windows = FileWindows({name: len(cache) for name, cache in caches.items()}, self.length)
        options = self._window_options()
        options = options._replace(perturbation=replace(options.perturbation, numbers=None))
        self._input = InputTokens([*caches.values()], windows, options)
        self._input_names = windows.names

    def _restore_tokenizer(self, trained: Mapping[str, Any]) -> None:
        if trained["key"] != self.tokenizer.key:
            raise CheckpointError(
                f"The checkpoint was trained with the tokenizer {trained['key']}, and "
                f"data.init_args.tokenizer is {self.tokenizer.key}.",
                "Give the options of the run that wrote it, such as by --config RUN/config.yaml.",
            )
        self.tokenizer.restore(trained["state"])

    def state_dict(self) -> dict[str, Any]:
        """Return the vocabulary, by which other text is read as that of the training."""
        if not self._ready:
            return {}
        text = self.cache.folder.name  # a digest of its tokens
        return {"key": self.tokenizer.key, "state": self.tokenizer.state(), "text": text}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse a checkpoint with another vocabulary than that of this text.

        Raises:
            CheckpointError: Its tokens mean other words.
        """
        if not state_dict or not self._ready:
            return
        current = self.state_dict()
        if any(state_dict[name] != current[name] for name in ("key", "state")):
            raise CheckpointError(
                "The checkpoint was trained with another vocabulary than that of this text, so "
                "that its tokens mean other words.",
                "Predict other text with --input PATH, or give a tokenizer.json in "
                "--data.init_args.tokenizer.name.",
            )
        is_training = self.trainer is not None and self.trainer.training
        if is_training and state_dict.get("text", current["text"]) != current["text"]:
            rank_zero_warn("The training goes on with another text than that of the checkpoint.")

    def prepare_data(self) -> None:
        """Fill the cache, once per machine.

        Raises:
            DataError: There is no text, or it cannot be read.
        """
        if self._input is not None:
            return
        # saves this process from reading all files again in `setup`, to know their contents
        self._prepared = self._cache()

    def setup(self, stage: str | None = None) -> None:
        """Map the tokens and split them; does nothing the second time.

        Raises:
            DataError: There is no text, or less than one sequence of it for a split.
        """
        if self._ready or self._input is not None:
            return
        #: All tokens, mapped.
        self.cache = cache = self._prepared or self._cache()
        self.split_text(len(cache), "tokens")
        options = self._window_options()
        limits = None, self.text_split.val_sequences, None
        self._train, self._val, self._test = (
            TokenWindows(cache, part, options, random=split == _TRAIN, limit=limit)
            for split, (part, limit) in enumerate(zip(self.parts, limits, strict=True))
        )
        self.number_ids = number_tokens(self.tokenizer, cache.counts)
        pieces = self.tokenizer.encode([str(n) for n in range(1000)])
        self.number_pieces = {n: tuple(tokens) for n, tokens in enumerate(pieces)}
        self._ready = True

    def _window_options(self) -> WindowOptions:
        is_number = np.zeros(self.vocab_size, np.bool_)
        is_number[[*self.tokenizer.numbers]] = True
        return WindowOptions(
            self.length, self.perturbation, is_number, seed=self.seed,
            documents=self.number_text.documents,
        )  # fmt: skip

    @property
    def token_counts(self) -> torch.Tensor:
        """How often each token occurs in the text as it is. Shape: (V,), int64."""
        return torch.from_numpy(self.cache.counts.copy())
