"""Plates as episodes: the data module of control-sample BatchNorm adaptation.

Shapes: D plates, L queries, N controls, C channels, H W image, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from fulgurite.base import save_options
from fulgurite.data.exclusions import check_exclude, name_some
from fulgurite.datamodules.cs_arm_bn.episodes import (
    BatchRows,
    EpisodeSampler,
    EvaluationEpisodes,
    PlateSampler,
    TrainingEpisodes,
)
from fulgurite.datamodules.cs_arm_bn.evaluation import EvaluationPlan
from fulgurite.datamodules.cs_arm_bn.images import IMAGE_EXCLUSIONS, PlateImages
from fulgurite.datamodules.cs_arm_bn.options import (
    EpisodeOptions,
    EvaluationOptions,
    PixelOptions,
    find_min_controls,
)
from fulgurite.datamodules.cs_arm_bn.pixels import ImageCrops, Standardisation
from fulgurite.datamodules.cs_arm_bn.sources import PlateSource, check_images
from fulgurite.datamodules.cs_arm_bn.splits import Assignment, Split, check_assignment
from fulgurite.datamodules.cs_arm_bn.table import PlateTable, Rows
from fulgurite.devices import pins_memory
from fulgurite.domains.cs_arm_bn import PlateBatch
from fulgurite.errors import CheckpointError, ConfigError, DataError
from fulgurite.options import NonNegativeInt, check_arguments, make_options
from fulgurite.sampling import sampler_ranks, training_progress

__all__ = ["PlateDataModule"]

_EXCLUSIONS = ("few_controls", *IMAGE_EXCLUSIONS)


class PlateDataModule(L.LightningDataModule):
    """Splits the plates of a source and serves episodes: queries and controls of one plate.

    A batch is a :class:`~fulgurite.domains.cs_arm_bn.PlateBatch`, whose rows are those of
    :attr:`table`, plates those of :attr:`domains` and wells those of :attr:`wells`. Its images are
    in their stored type until they are on the device, where :meth:`on_after_batch_transfer`
    standardises them.

    Seed, epoch and episode number determine a training episode. Mean and standard deviation of the
    channels are measured on the training queries and stored in checkpoints, whose values take
    precedence.

    Args:
        source: Source of the plates.
        split: Split into training, validation and tests.
        episodes: Training episodes.
        evaluation: Evaluation batches, and probes of the test.
        pixels: Preprocessing, crops and standardisation of the images.
        exclude: Words for data to leave out and count instead of an error: plates with
            ``few_controls``, images that are ``unreadable``, ``constant`` or hold ``nan``.
        num_workers: Number of processes that load episodes; batches do not depend on it.
        seed: Seed of episodes and evaluation batches, apart from the seed of the run.

    Raises:
        ConfigError: A number is out of range, an option or word is unknown, or options do not fit
            together.

    Source: arXiv 2604.20824, card sections 1.3, 2.3, 2.4 and 7.2.
    """

    def __init__(
        self,
        source: PlateSource,
        split: Split,
        *,
        episodes: EpisodeOptions = EpisodeOptions(),
        evaluation: EvaluationOptions = EvaluationOptions(),
        pixels: PixelOptions = PixelOptions(),
        exclude: list[str] = [],  # noqa: B006  # copied below
        num_workers: NonNegativeInt = 0,
        seed: NonNegativeInt = 1234,
    ) -> None:
        super().__init__()
        check_arguments(PlateDataModule.__init__, locals(), "data.init_args")
        save_options(self, "source", "split")
        self.episodes = make_options(EpisodeOptions, episodes)
        self.evaluation = make_options(EvaluationOptions, evaluation)
        self.pixels = make_options(PixelOptions, pixels)
        self.exclude = check_exclude(exclude, _EXCLUSIONS, "exclude")
        if not self.pixels.cache and self.exclude & set(IMAGE_EXCLUSIONS):
            raise ConfigError(
                "Images are to be excluded, and without a cache none is seen before it is used.",
                "Set `--data.init_args.pixels.cache=true`.",
            )
        self.source = source
        self.split = split
        self.min_controls = find_min_controls(self.episodes, self.evaluation)
        self.preprocess = self.pixels.preprocess or source.preprocess
        self.num_workers = num_workers
        self.seed = seed
        self._ready = False
        self._opened_images: PlateImages | None = None
        # mean and deviation in fractions of full scale: measured, given, or from a checkpoint
        self._statistics: tuple[Tensor, Tensor] | None = None
        self._standardisation: dict[torch.device, Standardisation] = {}

    @property
    def num_classes(self) -> int:
        """Number of classes, known before :meth:`setup`."""
        return self.source.num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, known before :meth:`setup`."""
        return self.source.class_names

    @property
    def in_channels(self) -> int:
        """Number of channels, known before :meth:`setup`."""
        return self.source.in_channels

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width [pixels]; known after :meth:`setup`, before it if it is cropped.

        Raises:
            ConfigError: It is read before :meth:`setup` and ``pixels.crop`` is not set.
        """
        if self.pixels.crop is not None:
            return self.pixels.crop, self.pixels.crop
        if not self._ready:
            raise ConfigError(
                "The size of the images is not known before they are read.",
                "Set `--data.init_args.pixels.crop`.",
            )
        height, width = self.images[0].shape[-2:]
        return int(height), int(width)

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the plates, by the number in a batch."""
        return self.table.domains

    @property
    def wells(self) -> tuple[str, ...]:
        """Names of the wells, by the number in a batch."""
        return self.table.wells

    @property
    def prediction_names(self) -> dict[str, Any]:
        """Names of the codes in predictions, after :meth:`setup`; images by their first file."""
        frame = self.table.frame
        names = {name: frame[name] for name in ("source", "batch", "plate", "well", "site")}
        names["path"] = frame[self.table.path_columns[0]]
        return {
            "label": self.class_names,
            "predicted": self.class_names,
            "domain": self.domains,
            "well": self.wells,
            # millions: not copied
            "index": {name: column.to_numpy(dtype=object) for name, column in names.items()},
        }

    @property
    def prediction_axes(self) -> dict[str, tuple[str, ...]]:
        """Names of the components of vectors in predictions."""
        return {"probabilities": self.class_names}

    @property
    def test_sets(self) -> tuple[str, ...]:
        """Names of the tests, one for each loader of :meth:`test_dataloader`."""
        return tuple(self.assignment.tests)

    def prepare_data(self) -> None:
        """Let the source write its files and fill the cache of images, once per machine.

        Raises:
            DataError: The data are unusable.
        """
        self.source.prepare()
        if self.pixels.cache:
            # `setup` of this process need not read them again
            self._opened_images = self._open_images()
            self._opened_images.prepare()

    def _open_images(self) -> PlateImages:
        table = self.source.load()
        table = table.require_controls(self.min_controls, self.exclude)
        check_images(table, self.source)
        return self._make_images(table)

    def _make_images(self, table: PlateTable) -> PlateImages:
        reader = self.source.reader
        return PlateImages(table, reader, self.preprocess, self.exclude, cache=self.pixels.cache)

    def _drop_unusable(self, images: PlateImages) -> tuple[PlateTable, PlateImages]:
        """Drop unusable images, and plates that then have too few controls."""
        table, usable = images.drop_unreadable()
        if len(table) == len(images.table):
            return table, usable
        enough = table.require_controls(self.min_controls, self.exclude)
        if enough is table:
            return table, usable
        lost = [name not in enough.domains for name in images.table.domains]
        remaining = images.table.drop(np.array(lost)[images.table.domain], enough.excluded[-1])
        return self._make_images(remaining).drop_unreadable()

    def setup(self, stage: str | None = None) -> None:
        """Load the table, split it and map the images; a second call does nothing.

        Raises:
            DataError: The data are unusable, or the split does not fit them.
        """
        if self._ready:
            return
        images = self._opened_images or self._open_images()
        if self.pixels.cache:
            images.prepare()  # what `prepare_data` did, unless it was not called
        #: The table of sites without what was excluded, and its images.
        self.table: PlateTable
        self.images: PlateImages
        self.table, self.images = self._drop_unusable(images)
        #: Rows of queries for training, validation and each test.
        self.assignment: Assignment = check_assignment(self.table, self.split.assign(self.table))
        self._check_image_sizes()
        self._ready = True
        if self._statistics is None:
            self._statistics = self._measure_channels()
        rank_zero_info(f"Plates: {self.table.report()}\n{self._describe_split()}")

    def _describe_split(self) -> str:
        parts = {"training": self.assignment.train, "validation": self.assignment.val}
        parts |= dict(self.assignment.tests)
        return "split: " + ", ".join(
            f"{name} {len(rows)} queries on {len(np.unique(self.table.domain[rows]))} plates"
            for name, rows in parts.items()
        )

    def _check_image_sizes(self) -> None:
        sizes = self.images.sizes()
        if self.pixels.crop is None and len(sizes) > 1:
            listed = ", ".join(f"{h} × {w} on {plate}" for (h, w), plate in sizes.items())
            raise DataError(
                f"Plates have images of several sizes: {listed}.",
                "Set `--data.init_args.pixels.crop` to crop all to one size.",
            )
        height, width = min(sizes, key=min)
        if self.pixels.crop is not None and self.pixels.crop > min(height, width):
            raise ConfigError(
                f"Crops of {self.pixels.crop} pixels do not fit images of {height} × {width}.",
                "Lower `--data.init_args.pixels.crop`, or `downscale` of the preprocessing.",
            )

    def _measure_channels(self) -> tuple[Tensor, Tensor] | None:
        if self.pixels.mean is not None and self.pixels.std is not None:
            for name, values in (("mean", self.pixels.mean), ("std", self.pixels.std)):
                if len(values) != self.in_channels:
                    raise ConfigError(
                        f"There are {len(values)} values for {self.in_channels} channels.",
                        f"Give one `--data.init_args.pixels.{name}` for each channel.",
                    )
            return torch.tensor(self.pixels.mean), torch.tensor(self.pixels.std)
        rows = self.assignment.train
        if not len(rows):
            return None  # a checkpoint's
        mean, std = self.images.moments(rows)
        unit = self.images.unit(int(rows[0]))
        return torch.from_numpy(mean / unit).float(), torch.from_numpy(std / unit).float()

    def state_dict(self) -> dict[str, Any]:
        """Return the state for runs on other plates: statistics, class names and channels."""
        if self._statistics is None:
            return {}
        mean, std = self._statistics
        return {
            "mean": mean,
            "std": std,
            "class_names": list(self.class_names),
            "channels": list(self.source.channels),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the statistics of the training run.

        Raises:
            CheckpointError: The checkpoint was trained with other classes or channels.
        """
        if not state_dict:
            return
        for name, mine in (("class_names", self.class_names), ("channels", self.source.channels)):
            if tuple(state_dict[name]) != tuple(mine):
                raise CheckpointError(
                    f"The checkpoint was trained with {name.replace('_', ' ')} "
                    f"{name_some(state_dict[name])}, these data have {name_some(mine)}.",
                    "Give data with the same ones in the same order.",
                )
        self._statistics = state_dict["mean"], state_dict["std"]
        self._standardisation = {}

    def _make_standardisation(self) -> Standardisation:
        if self.pixels.normalise == "image":
            return Standardisation(None, None)
        if self.pixels.normalise == "dataset":
            if self._statistics is None:
                raise DataError(
                    "There are no training queries to measure mean and deviation of the channels.",
                    "Give a checkpoint with `--ckpt_path`, or `--data.init_args.pixels.mean` and "
                    "`std`.",
                )
            unit = self.images.unit(0)
            return Standardisation(*(values * unit for values in self._statistics))
        moments = []
        for d, name in enumerate(self.domains):
            rows = self.table.rows_of(d, control=True)
            if not len(rows):
                raise DataError(
                    f"The plate {name} has no controls to normalise by.",
                    "Set `--data.init_args.pixels.normalise=dataset`.",
                )
            moments.append(np.stack(self.images.moments(rows)))
        return Standardisation(*torch.from_numpy(np.stack(moments, 1)).float())

    def _make_crops(self) -> ImageCrops:
        if not self._standardisation:
            self._standardisation = {torch.device("cpu"): self._make_standardisation()}
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
        if self.evaluation.predict == "all":
            plates = list(range(len(self.domains)))
        else:
            rows = [rows for name, rows in self.assignment.tests.items() if name != "in_domain"]
            rows.append(np.flatnonzero(~self.table.control & (self.table.label < 0)))
            plates = [int(d) for d in np.unique(self.table.domain[np.concatenate(rows)])]
        plates = [d for d in plates if len(self.table.rows_of(d, control=False))]
        if not plates:
            raise DataError(
                "The split leaves no plate to predict.",
                "Set `--data.init_args.evaluation.predict=all`.",
            )
        episodes = self.plate_episodes(plates)
        return self._make_loader(episodes, PlateSampler(episodes, sampler_ranks(self.trainer)))
