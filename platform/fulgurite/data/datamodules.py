"""What DataModules of sequences and of text share: loaders, splits and options.

Loaders leave the run's randomness alone, and count every sample of an evaluation once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from fulgurite.data.listing import STDLIB, find_files
from fulgurite.data.splits import check_fractions, check_min, split_ranges
from fulgurite.devices import pins_memory
from fulgurite.errors import DataError
from fulgurite.sampling import (
    ContinuedSampler,
    DrawSampler,
    UnrepeatedDistributedSampler,
    sampler_ranks,
)

__all__ = ["SequenceDataModule", "TextDataModule", "keep_batch"]


def keep_batch(batch: Any) -> Any:
    """Return a batch as the data set gives it: the ``collate_fn`` of data sets of batches."""
    return batch


class SequenceDataModule(L.LightningDataModule):
    """A DataModule of sequences: its loaders.

    A subclass sets the attributes, those with an underscore in ``setup``.

    Attributes:
        batch_size: Sequences of a batch, on each rank.
        num_workers: Processes that read.
        steps_per_epoch: Training batches of one epoch on each rank.
    """

    batch_size: int
    num_workers: int
    steps_per_epoch: int
    _train: Dataset[Any]
    _val: Dataset[Any]
    _test: Dataset[Any]

    def collate_function(self) -> Callable[[Any], Any] | None:
        """What makes a batch of samples; None for torch's own."""
        return None

    def _loader(self, data: Dataset[Any], sampler: Sampler[int]) -> DataLoader[Any]:
        return DataLoader(
            data,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=self.collate_function(),
            generator=torch.Generator(),  # else each epoch would draw from the global one
            pin_memory=pins_memory(),
            persistent_workers=self.num_workers > 0,
        )

    def _evaluation(self, data: Any) -> DataLoader[Any] | list[Any]:
        if not len(data):
            return []
        return self._loader(data, UnrepeatedDistributedSampler(data, sampler_ranks(self.trainer)))

    def train_dataloader(self) -> DataLoader[Any]:
        """Return batches of draws, other ones in each epoch and on each rank."""
        draws = self.steps_per_epoch * self.batch_size
        sampler = DrawSampler(draws, sampler_ranks(self.trainer))
        return self._loader(self._train, ContinuedSampler(sampler, self.trainer, self.batch_size))

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return batches of the validation split, if there is one."""
        return self._evaluation(self._val)

    def test_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return batches of the test split, if there is one."""
        return self._evaluation(self._test)

    def predict_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return the batches of :meth:`test_dataloader`."""
        return self.test_dataloader()


class TextDataModule(SequenceDataModule):
    """What DataModules of text have in common: files, splits and their options.

    Attributes:
        parts: The tokens of training, validation and test, after :meth:`split_text`.
    """

    def set_text_options(
        self,
        paths: list[str] | str | None,
        suffixes: list[str],
        length: int,
        batch_size: int,
        fractions: tuple[float, float],
        steps_per_epoch: int | None,
        val_sequences: int | None,
        num_workers: int,
        seed: int,
    ) -> None:
        """Check and keep options; ``fractions`` are those of validation and test.

        Raises:
            ConfigError: An option is out of range.
        """
        check_min("length", length)
        check_min("batch_size", batch_size)
        check_min("num_workers", num_workers, 0)
        check_min("seed", seed, 0)
        if steps_per_epoch is not None:
            check_min("steps_per_epoch", steps_per_epoch)
        if val_sequences is not None:
            check_min("val_sequences", val_sequences)
        check_fractions(*fractions)
        self.paths = [paths or STDLIB] if isinstance(paths, str | None) else list(paths)
        self.suffixes = list(suffixes)
        self.length, self.batch_size, self.fractions = length, batch_size, fractions
        self.num_workers, self.seed = num_workers, seed
        self.val_sequences = val_sequences
        self._steps = steps_per_epoch

    def find_text(self) -> list[tuple[str, Path]]:
        """Return (name, path) of each file of text."""
        return find_files(self.paths, self.suffixes)

    def split_text(self, total: int, unit: str) -> None:
        """Split a text into parts, and set the number of training batches.

        Args:
            total: Tokens of the text.
            unit: What a token is called: ``bytes``.

        Raises:
            DataError: A part that is asked for has less than one sequence.
        """
        self.parts = split_ranges(total, *self.fractions)
        for name, part, fraction in zip(
            ("training", "validation", "test"), self.parts, (1.0, *self.fractions), strict=True
        ):
            if fraction and len(part) <= self.length:
                sizes = " + ".join(f"{len(part):,}" for part in self.parts)
                raise DataError(
                    f"The text of {name} has {len(part):,} {unit}, and a sequence of "
                    f"{self.length:,} tokens needs {self.length + 1:,} (the {total:,} {unit} are "
                    f"split into {sizes} for training, validation and test).",
                    "Give more text in `--data.init_args.paths`, shorten `--data.init_args.length`,"
                    " or change `--data.init_args.val_fraction` and `test_fraction` (0 for none).",
                )
        step = self.length * self.batch_size * sampler_ranks(self.trainer)[1]
        self.steps_per_epoch = self._steps or max(1, len(self.parts[0]) // step)
