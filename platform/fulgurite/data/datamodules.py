"""What DataModules of sequences and of text share: loaders, splits and options.

Loaders leave the run's randomness alone, and count every sample of an evaluation once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from fulgurite.data.listing import find_files
from fulgurite.data.splits import split_ranges
from fulgurite.data.text_options import TextOptions, TextSplit
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

    _input_names: Mapping[str, Sequence[str]]  # of each row of them
    batch_size: int
    num_workers: int
    steps_per_epoch: int
    _train: Dataset[Any]
    _val: Dataset[Any]
    _test: Dataset[Any]
    _input: Dataset[Any] | None = None  # files in no split, which are predicted

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
        """Return the batches of :meth:`test_dataloader`, or those of files in no split."""
        return self.test_dataloader() if self._input is None else self._evaluation(self._input)

    @property
    def prediction_names(self) -> dict[str, Any]:
        """Columns of predictions that say what each row is: of files in no split alone."""
        return {} if self._input is None else {"index": self._input_names}


class TextDataModule(SequenceDataModule):
    """What DataModules of text have in common: files, splits and their options.

    Attributes:
        text_options: Which files are read.
        text_split: How they are split.
        length: Tokens of a sequence.
        parts: The tokens of training, validation and test, after :meth:`split_text`.
    """

    text_options: TextOptions
    text_split: TextSplit
    length: int

    def set_text_options(
        self, text: TextOptions, split: TextSplit, *, length: int, steps_per_epoch: int | None
    ) -> None:
        """Keep options.

        Args:
            text: Which files are read.
            split: How they are split.
            length: Tokens of a sequence.
            steps_per_epoch: Training batches of one epoch on each rank; as many as cover the text
                about once if not given.
        """
        self.text_options, self.text_split = text, split
        self.length, self._steps = length, steps_per_epoch

    def find_text(self) -> list[tuple[str, Path]]:
        """Return (name, path) of each file of text."""
        return find_files(self.text_options.all_paths, self.text_options.suffixes)

    def split_text(self, total: int, unit: str) -> None:
        """Split a text into parts, and set the number of training batches.

        Args:
            total: Tokens of the text.
            unit: What a token is called: ``bytes``.

        Raises:
            DataError: A part that is asked for has less than one sequence.
        """
        fractions = self.text_split.fractions
        self.parts = split_ranges(total, *fractions)
        for name, part, fraction in zip(
            ("training", "validation", "test"), self.parts, (1.0, *fractions), strict=True
        ):
            if fraction and len(part) <= self.length:
                sizes = " + ".join(f"{len(part):,}" for part in self.parts)
                raise DataError(
                    f"The text of {name} has {len(part):,} {unit}, and a sequence of "
                    f"{self.length:,} tokens needs {self.length + 1:,} (the {total:,} {unit} are "
                    f"split into {sizes} for training, validation and test).",
                    "Give more text in `--data.init_args.text.paths`, shorten "
                    "`--data.init_args.length`, or change `--data.init_args.split.val_fraction` "
                    "and `test_fraction` (0 for none).",
                )
        step = self.length * self.batch_size * sampler_ranks(self.trainer)[1]
        self.steps_per_epoch = self._steps or max(1, len(self.parts[0]) // step)
