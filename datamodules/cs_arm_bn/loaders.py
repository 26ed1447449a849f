"""Batches of plates: training, validation, test and prediction.

Shapes: D plates, L queries, N controls, C channels, H W image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fulgurite.datamodules.cs_arm_bn.episodes import (
    BatchRows,
    EpisodeSampler,
    EvaluationEpisodes,
    PlateSampler,
    TrainingEpisodes,
)
from fulgurite.datamodules.cs_arm_bn.evaluation import EvaluationPlan
from fulgurite.datamodules.cs_arm_bn.images import PlateImages
from fulgurite.datamodules.cs_arm_bn.options import (
    EpisodeOptions,
    PixelOptions,
    PlateEvaluationOptions,
)
from fulgurite.datamodules.cs_arm_bn.pixels import ImageCrops, Standardisation
from fulgurite.datamodules.cs_arm_bn.splits import Assignment
from fulgurite.datamodules.cs_arm_bn.standardising import make_standardisation
from fulgurite.datamodules.cs_arm_bn.table import PlateTable, Rows
from fulgurite.devices import pins_memory
from fulgurite.domains.cs_arm_bn import PlateBatch
from fulgurite.errors import DataError
from fulgurite.sampling import sampler_ranks, training_progress

__all__ = ["PlateLoaders"]


class PlateLoaders(L.LightningDataModule):
    """Serves the plates of a split as episodes; a subclass reads and splits them.

    Attributes:
        table: The table of sites.
        images: Their images.
        assignment: Rows of queries for training, validation and each test.
        episodes: Options of training episodes.
        evaluation: Options of evaluation batches.
        pixels: Options of pixels.
        num_workers: Processes that load episodes.
        seed: Seed of episodes and evaluation batches.
    """

    table: PlateTable
    images: PlateImages
    assignment: Assignment
    episodes: EpisodeOptions
    evaluation: PlateEvaluationOptions
    pixels: PixelOptions
    num_workers: int
    seed: int
    predicts_input: bool = False  # plates in no split, all of which are predicted
    _statistics: tuple[Tensor, Tensor] | None  # fractions of full scale
    _standardisation: dict[torch.device, Standardisation]

    def _make_crops(self) -> ImageCrops:
        if not self._standardisation:
            standardisation = make_standardisation(self.images, self.pixels, self._statistics)
            self._standardisation = {torch.device("cpu"): standardisation}
        return ImageCrops(self.images, self.pixels.crop, self.pixels.augment)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Standardise the images of a batch, on the device that they are on."""
        if not isinstance(batch, PlateBatch):
            return batch
        statistics, device = self._standardisation, batch.images.device
        if device not in statistics:  # moved once: a step would wait for it
            statistics[device] = statistics[torch.device("cpu")].to(device)
        images: Any = statistics[device].apply(batch)
        if self.trainer is not None:
            images = self.trainer.precision_plugin.convert_input(images)
        return batch._replace(images=images)

    def _make_loader(self, episodes: Any, sampler: Any = None) -> DataLoader[Any]:
        return DataLoader(
            episodes,
            batch_size=None,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,  # the epoch travels in the index
            pin_memory=pins_memory(),
            generator=torch.Generator(),  # loading leaves the run's randomness alone
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training episodes.

        Raises:
            DataError: The split has no labelled query for training.
        """
        rows = self.assignment.train
        if not len(rows):
            raise DataError(
                "The split leaves no labelled query for training.",
                "Change `--data.init_args.split`, or give labels.",
            )
        episodes = TrainingEpisodes(self._make_crops(), rows, self.episodes, self.seed)
        epoch, batches = training_progress(self.trainer)
        done = batches * sampler_ranks(self.trainer)[1]  # on all ranks
        return self._make_loader(episodes, EpisodeSampler(episodes, epoch, done))

    def plan_evaluation(self, rows: Rows, probes: bool = False) -> EvaluationEpisodes:
        """Return fixed episodes in which each of the queries counts once.

        Args:
            rows: Rows of queries.
            probes: Whether to apply label shift, wrong plates and mislabelled controls.
        """
        plan = EvaluationPlan(self.table, self.episodes, self.evaluation, self.seed)
        return EvaluationEpisodes(self._make_crops(), plan.batches(rows, probes))

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return the validation episodes, if there are any."""
        rows = self.assignment.val
        return self._make_loader(self.plan_evaluation(rows)) if len(rows) else []

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Return one loader for each of :attr:`test_sets`."""
        return [
            self._make_loader(self.plan_evaluation(rows, probes=True))
            for rows in self.assignment.tests.values()
        ]

    def read_plate_controls(self, plate: int) -> PlateBatch:
        """Return all controls of a plate, standardised, without queries, after :meth:`setup`.

        Args:
            plate: Its number in :attr:`domains`.
        """
        controls = self.table.rows_of(plate, control=True)
        rows = BatchRows(plate, controls[:0], np.zeros(0, np.bool_), controls)
        batch = EvaluationEpisodes(self._make_crops(), [rows])[0]
        return batch._replace(images=self._standardisation[torch.device("cpu")].apply(batch))

    def plate_episodes(self, plates: Sequence[int]) -> EvaluationEpisodes:
        """Return all controls and queries of plates for prediction.

        The first batch of a plate has all its controls, later ones have none; the last one is not
        padded.
        """
        parts = []
        size, _ = self.evaluation.find_sizes(self.episodes)
        for d in plates:
            queries = self.table.rows_of(d, control=False)
            controls = self.table.rows_of(d, control=True)
            for first in range(0, max(1, len(queries)), size):
                part = queries[first : first + size]
                counted = np.ones(len(part), np.bool_)
                parts.append(BatchRows(d, part, counted, controls[:0] if first else controls))
        return EvaluationEpisodes(self._make_crops(), parts)

    def plate_dataloader(self, part: Literal["train", "val"] | str = "train") -> DataLoader[Any]:
        """Return all controls and queries of the plates of one part, plate by plate.

        For methods that fit something on whole plates (TVN), and for statistics of the training
        plates.
        """
        rows = {"train": self.assignment.train, "val": self.assignment.val}
        rows |= dict(self.assignment.tests)
        plates = [int(d) for d in np.unique(self.table.domain[rows[part]])]
        return self._make_loader(self.plate_episodes(plates))

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the plates to predict, in order: first a plate's controls, then its queries.

        Each plate goes to one rank.

        Raises:
            DataError: The split has no plate to predict.
        """
        if self.predicts_input or self.evaluation.predict == "all":
            plates = list(range(len(self.table.domains)))
        else:
            rows = [rows for name, rows in self.assignment.tests.items() if name != "in_domain"]
            rows.append(np.flatnonzero(~self.table.control & (self.table.label < 0)))
            plates = [int(d) for d in np.unique(self.table.domain[np.concatenate(rows)])]
        plates = [d for d in plates if len(self.table.rows_of(d, control=False))]
        if not plates:
            if self.predicts_input:
                raise DataError(
                    "The table has controls alone, and no site to predict.",
                    "Give a row with the role `query` for each site to predict.",
                )
            raise DataError(
                "The split leaves no plate to predict.",
                "Set `--data.init_args.evaluation.predict=all`.",
            )
        episodes = self.plate_episodes(plates)
        return self._make_loader(episodes, PlateSampler(episodes, sampler_ranks(self.trainer)))
