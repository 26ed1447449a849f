"""Long sequences for language models: bytes of real text, or needles in a haystack.

Shapes: B mini-batch, N tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler

from fulgurite.base import save_options
from fulgurite.data.datamodules import SequenceDataModule, TextDataModule
from fulgurite.data.text import FileWindows
from fulgurite.data.text_options import TextOptions, TextSplit
from fulgurite.datamodules.stream_cqsa.needle import NeedleOptions, Needles, NeedleSizes, NeedleTask
from fulgurite.datamodules.stream_cqsa.text import (
    ByteText,
    ConsecutiveWindows,
    InputWindows,
    RandomWindows,
    cached_text,
)
from fulgurite.errors import ConfigError
from fulgurite.options import NonNegativeInt, PositiveInt, check_arguments, make_options
from fulgurite.predictions import list_input_files
from fulgurite.sampling import ContinuedSampler, sampler_ranks

__all__ = ["ByteTextDataModule", "NeedleDataModule"]

_TRAIN, _VAL, _TEST = range(3)  # random streams of `seed`


def _batch_one_sequence(batch: list[dict[str, Any]]) -> dict[str, Any]:
    """Give the one sequence an axis B; file starts stay integers."""
    (item,) = batch
    names = ("tokens", "targets", "index")
    return item | {name: item[name][None] for name in names if name in item}


class ByteTextDataModule(TextDataModule):
    """Language modelling on the bytes of files: a token is a byte, the target the next one.

    Batches are ``{"tokens": (B, N) int64, "targets": (B, N) int64}``. The files are written one
    after the other to a memory-mapped cache, and its beginning is training, its end test, what is
    between validation. Training windows lie at random places, which seed, epoch and number
    decide; those of validation and test follow each other.

    Args:
        text: Which files are read. ``documents`` adds ``"documents"``, the first tokens of the
            files in the window as a tuple of integers from 0, and sets targets in another file
            than their input to -100; batches must be of one sequence then, since others would have
            other borders.
        split: How the bytes are split.
        length: Tokens N of a sequence.
        batch_size: Sequences of a batch, on each rank.
        steps_per_epoch: Training batches of one epoch on each rank; as many as cover the text
            about once if not given.
        num_workers: Processes that read; batches do not depend on it.
        seed: Seed of the training windows, apart from the seed of the run.

    Raises:
        ConfigError: An argument is out of range.

    Source: inferred.
    """

    def __init__(
        self,
        text: TextOptions = TextOptions(),
        *,
        split: TextSplit = TextSplit(),
        length: PositiveInt = 1024,
        batch_size: PositiveInt = 8,
        steps_per_epoch: PositiveInt | None = None,
        num_workers: NonNegativeInt = 0,
        seed: NonNegativeInt = 0,
    ) -> None:
        super().__init__()
        check_arguments(ByteTextDataModule.__init__, locals(), "data.init_args")
        save_options(self, logger=False)
        text, split = make_options(TextOptions, text), make_options(TextSplit, split)
        self.set_text_options(text, split, length=length, steps_per_epoch=steps_per_epoch)
        if text.documents and batch_size != 1:
            raise ConfigError(
                f"File borders are asked for in batches of {batch_size} sequences, which would "
                "each have their own.",
                "Set `--data.init_args.batch_size=1`, or `--data.init_args.text.documents=false`.",
            )
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self._prepared: ByteText | None = None
        self._ready = False

    @property
    def vocab_size(self) -> int:
        """Number of different tokens, known before :meth:`setup`."""
        return 256

    def prepare_data(self) -> None:
        """Fill the cache, once per machine.

        Raises:
            DataError: There is no text, or it cannot be read.
        """
        if self._input is not None:
            return
        # only saves this process from reading all files again in `setup`
        self._prepared = cached_text(self.find_text())

    def setup(self, stage: str | None = None) -> None:
        """Map the text and split it; does nothing the second time.

        Raises:
            DataError: There is no text, or less than one sequence of it for a split.
        """
        if self._ready or self._input is not None:
            return
        #: All bytes, mapped.
        self.text = self._prepared or cached_text(self.find_text())
        self.split_text(len(self.text), "bytes")
        train, val, test = self.parts
        windows: dict[str, Any] = {
            "length": self.length, "documents": self.text_options.documents,
        }  # fmt: skip
        draws = self.steps_per_epoch * self.batch_size
        self._train = RandomWindows(self.text, train, draws=draws, seed=self.seed, **windows)
        limit = self.text_split.val_sequences
        self._val = ConsecutiveWindows(self.text, val, limit=limit, **windows)
        self._test = ConsecutiveWindows(self.text, test, **windows)
        self._ready = True

    def predict_from(self, path: Path, trained: Mapping[str, Any]) -> None:
        """Predict the bytes of files, in windows that follow each other.

        Args:
            path: A file, or a folder of files with the suffixes of the options.
            trained: Nothing: a token is a byte.

        Raises:
            DataError: There is no such file, or it is empty or cannot be read.
        """
        files = list_input_files(path, self.text_options.suffixes)
        texts = {name: cached_text([(name, file)]) for name, file in files}
        windows = FileWindows({name: len(text) for name, text in texts.items()}, self.length)
        documents = self.text_options.documents
        self._input = InputWindows([*texts.values()], windows, self.length, documents=documents)
        self._input_names = windows.names

    def collate_function(self) -> Callable[[Any], Any] | None:
        """Keep file starts integers, if they are asked for."""
        return _batch_one_sequence if self.text_options.documents else None


class NeedleDataModule(SequenceDataModule):
    """Retrieval at any length: the value of a key has to be found in random filler.

    Batches are ``{"tokens": (B, N) int64, "targets": (B, N) int64, "depth": (B,) float32}``. A
    sequence hides needles ``MARK key value`` at random places and ends with ``QUERY key``; the
    target at its last token is the value, all others are -100. The depth [0 to 1] is where the
    needle lies. Sequences are generated when they are needed, from seed, split and number.

    Args:
        length: Tokens N of a sequence.
        task: What is hidden and asked for.
        sizes: Number of sequences of each split.
        batch_size: Sequences of a batch, on each rank.
        num_workers: Processes that generate; batches do not depend on it.
        seed: Seed of all sequences, apart from the seed of the run.

    Raises:
        ConfigError: An argument is out of range, or the needles do not fit.

    Source: inferred; the retrieval test of long-context language models.
    """

    def __init__(
        self,
        length: PositiveInt = 1024,
        *,
        task: NeedleOptions = NeedleOptions(),
        sizes: NeedleSizes = NeedleSizes(),
        batch_size: PositiveInt = 8,
        num_workers: NonNegativeInt = 0,
        seed: NonNegativeInt = 0,
    ) -> None:
        super().__init__()
        check_arguments(NeedleDataModule.__init__, locals(), "data.init_args")
        save_options(self, logger=False)
        self.task = NeedleTask(length, make_options(NeedleOptions, task))
        self.length, self.sizes = length, make_options(NeedleSizes, sizes)
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self._train = Needles(self.task, self.sizes.train, seed, _TRAIN)
        self._val = Needles(self.task, self.sizes.val, seed, _VAL)
        self._test = Needles(self.task, self.sizes.test, seed, _TEST)

    @property
    def vocab_size(self) -> int:
        """Number of different tokens, known before :meth:`setup`."""
        return self.task.vocab_size

    def train_dataloader(self) -> DataLoader[Any]:
        """Return batches of all training sequences, in an order of seed and epoch."""
        rank, world = sampler_ranks(self.trainer)
        # not shuffle=True, whose order after a restart is not that of an uninterrupted run
        sampler: DistributedSampler[Any] = DistributedSampler(
            self._train, num_replicas=world, rank=rank, seed=self.seed
        )
        continued = ContinuedSampler(sampler, self.trainer, self.batch_size)
        return self._loader(self._train, continued)
