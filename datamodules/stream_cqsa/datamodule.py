"""Long sequences for language models: bytes of real text, or needles in a haystack.

Shapes: B mini-batch, N tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler

from fulgurite.data.datamodules import SequenceDataModule, TextDataModule
from fulgurite.data.splits import check_min
from fulgurite.datamodules.stream_cqsa.needle import Needles, NeedleTask
from fulgurite.datamodules.stream_cqsa.text import (
    ByteText,
    ConsecutiveWindows,
    RandomWindows,
    cached_text,
)
from fulgurite.errors import ConfigError
from fulgurite.sampling import ContinuedSampler, sampler_ranks

__all__ = ["ByteTextDataModule", "NeedleDataModule"]

_TRAIN, _VAL, _TEST = range(3)  # random streams of `seed`


def _batch_one_sequence(batch: list[dict[str, Any]]) -> dict[str, Any]:
    """Give the one sequence an axis B; file starts stay integers."""
    (item,) = batch
    return item | {name: item[name][None] for name in ("tokens", "targets")}


class ByteTextDataModule(TextDataModule):
    """Language modelling on the bytes of files: a token is a byte, the target the next one.

    Batches are ``{"tokens": (B, N) int64, "targets": (B, N) int64}``. The files are written one
    after the other to a memory-mapped cache, and its beginning is training, its end test, what is
    between validation. Training windows lie at random places, which seed, epoch and number
    decide; those of validation and test follow each other.

    Args:
        paths: Files, folders or glob patterns, absolute or relative to ``FULGURITE_DATA``;
            ``stdlib`` or ``null`` for the sources of Python's standard library, about 12 MB of
            real text that is on every machine (but is another one for another Python).
        suffixes: Endings of the names of files that are read in folders.
        length: Tokens N of a sequence.
        batch_size: Sequences of a batch, on each rank.
        val_fraction: Fraction of the bytes for validation; 0 for none.
        test_fraction: Fraction of the bytes for test and prediction; 0 for none.
        num_workers: Processes that read; batches do not depend on it.
        seed: Seed of the training windows, apart from the seed of the run.
        documents: Add ``"documents"``, the first tokens of the files in the window as a tuple of
            integers from 0, and set targets in another file than their input to -100. Batches
            must be of one sequence, since others would have other borders.
        steps_per_epoch: Training batches of one epoch on each rank; as many as cover the text
            about once if not given.
        val_sequences: Keep at most this many validation windows, spread evenly; ``null`` for all.

    Raises:
        ConfigError: An argument is out of range.

    Source: inferred.
    """

    def __init__(
        self,
        paths: list[str] | str | None = None,
        suffixes: list[str] = [".txt", ".md", ".rst", ".py"],  # noqa: B006  # copied below
        length: int = 1024,
        batch_size: int = 8,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        num_workers: int = 0,
        seed: int = 0,
        documents: bool = False,
        steps_per_epoch: int | None = None,
        val_sequences: int | None = None,
    ) -> None:
        super().__init__()
        self.set_text_options(
            paths, suffixes, length, batch_size, (val_fraction, test_fraction), steps_per_epoch,
            val_sequences, num_workers, seed,
        )  # fmt: skip
        if documents and batch_size != 1:
            raise ConfigError(
                f"File borders are asked for in batches of {batch_size} sequences, which would "
                "each have their own.",
                "Set `--data.init_args.batch_size=1`, or `--data.init_args.documents=false`.",
            )
        self.save_hyperparameters(logger=False)
        self.documents = documents
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
        # only saves this process from reading all files again in `setup`
        self._prepared = cached_text(self.find_text())

    def setup(self, stage: str | None = None) -> None:
        """Map the text and split it; does nothing the second time.

        Raises:
            DataError: There is no text, or less than one sequence of it for a split.
        """
        if self._ready:
            return
        #: All bytes, mapped.
        self.text = self._prepared or cached_text(self.find_text())
        self.split_text(len(self.text), "bytes")
        train, val, test = self.parts
        draws = self.steps_per_epoch * self.batch_size
        self._train = RandomWindows(self.text, train, self.length, draws, self.seed, self.documents)
        self._val = ConsecutiveWindows(
            self.text, val, self.length, self.val_sequences, self.documents
        )
        self._test = ConsecutiveWindows(self.text, test, self.length, None, self.documents)
        self._ready = True

    def collate_function(self) -> Callable[[Any], Any] | None:
        """Keep file starts integers, if they are asked for."""
        return _batch_one_sequence if self.documents else None


class NeedleDataModule(SequenceDataModule):
    """Retrieval at any length: the value of a key has to be found in random filler.

    Batches are ``{"tokens": (B, N) int64, "targets": (B, N) int64, "depth": (B,) float32}``. A
    sequence hides needles ``MARK key value`` at random places and ends with ``QUERY key``; the
    target at its last token is the value, all others are -100. The depth [0 to 1] is where the
    needle lies. Sequences are generated when they are needed, from seed, split and number.

    Args:
        length: Tokens N of a sequence.
        keys: Number of key tokens.
        values: Number of value tokens.
        filler: Number of filler tokens.
        needles: Needles in a sequence, with distinct keys; one of them is asked for.
        train_size: Training sequences, in another order in each epoch.
        val_size: Validation sequences; 0 for none.
        test_size: Test sequences, also used for prediction; 0 for none.
        batch_size: Sequences of a batch, on each rank.
        seed: Seed of all sequences, apart from the seed of the run.
        next_token: Make each target the next token, instead of the answer alone.
        num_workers: Processes that generate; batches do not depend on it.

    Raises:
        ConfigError: An argument is out of range, or the needles do not fit.

    Source: inferred; the retrieval test of long-context language models.
    """

    def __init__(
        self,
        length: int = 1024,
        keys: int = 16,
        values: int = 16,
        filler: int = 64,
        needles: int = 1,
        train_size: int = 1024,
        val_size: int = 128,
        test_size: int = 256,
        batch_size: int = 8,
        seed: int = 0,
        next_token: bool = False,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        check_min("train_size", train_size)
        check_min("val_size", val_size, 0)
        check_min("test_size", test_size, 0)
        check_min("batch_size", batch_size)
        check_min("seed", seed, 0)
        check_min("num_workers", num_workers, 0)
        self.task = NeedleTask(length, keys, values, filler, needles, next_token)
        self.save_hyperparameters(logger=False)
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self._train = Needles(self.task, train_size, seed, _TRAIN)
        self._val = Needles(self.task, val_size, seed, _VAL)
        self._test = Needles(self.task, test_size, seed, _TEST)

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
