"""Plates as episodes: the data module of control-sample BatchNorm adaptation.

Shapes: D plates, L queries, N controls, C channels, H W image, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from fulgurite.base import save_options
from fulgurite.data.exclusions import check_exclude, name_some
from fulgurite.datamodules.cs_arm_bn.images import IMAGE_EXCLUSIONS, PlateImages
from fulgurite.datamodules.cs_arm_bn.loaders import PlateLoaders
from fulgurite.datamodules.cs_arm_bn.options import (
    EpisodeOptions,
    PixelOptions,
    PlateEvaluationOptions,
    find_min_controls,
)
from fulgurite.datamodules.cs_arm_bn.pixels import Standardisation
from fulgurite.datamodules.cs_arm_bn.prediction import find_input_plates
from fulgurite.datamodules.cs_arm_bn.sources import PlateSource, check_images
from fulgurite.datamodules.cs_arm_bn.splits import Assignment, Split, check_assignment
from fulgurite.datamodules.cs_arm_bn.standardising import (
    find_other_scales,
    find_pixel_statistics,
    measure_channels,
)
from fulgurite.datamodules.cs_arm_bn.table import PlateTable
from fulgurite.domains.cs_arm_bn import PixelStatistics
from fulgurite.errors import CheckpointError, ConfigError, DataError
from fulgurite.options import NonNegativeInt, check_arguments, make_options

__all__ = ["PlateDataModule"]

_EXCLUSIONS = ("few_controls", *IMAGE_EXCLUSIONS)


class PlateDataModule(PlateLoaders):
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

    Source: docs/papers/cs_arm_bn.md sections 1.3, 2.3, 2.4 and 7.2.
    """

    def __init__(
        self,
        source: PlateSource,
        split: Split,
        *,
        episodes: EpisodeOptions = EpisodeOptions(),
        evaluation: PlateEvaluationOptions = PlateEvaluationOptions(),
        pixels: PixelOptions = PixelOptions(),
        exclude: list[str] = [],  # noqa: B006  # copied below
        num_workers: NonNegativeInt = 0,
        seed: NonNegativeInt = 1234,
    ) -> None:
        super().__init__()
        check_arguments(PlateDataModule.__init__, locals(), "data.init_args")
        save_options(self, "source", "split")
        self.episodes = make_options(EpisodeOptions, episodes)
        self.evaluation = make_options(PlateEvaluationOptions, evaluation)
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
        #: Height, width and full scale of the images of the checkpoint that was loaded.
        self._trained_size: tuple[tuple[int, int], float] | None = None

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
        """Height and width [pixels], known after :meth:`setup`, or by a crop or a checkpoint.

        Raises:
            ConfigError: It is read before :meth:`setup`, and neither is there.
        """
        if self.pixels.crop is not None:
            return self.pixels.crop, self.pixels.crop
        if not self._ready and self._trained_size is not None:
            return self._trained_size[0]
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
        names["well"] = self.table.written_wells
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
        assignment = Assignment() if self.predicts_input else self.split.assign(self.table)
        self.assignment: Assignment = check_assignment(self.table, assignment)
        _warn_of_untrained_classes(self.table, self.assignment)
        self._check_image_sizes()
        if self.predicts_input:
            self._check_trained_size()
        self._ready = True
        if self._statistics is None:
            self._statistics = measure_channels(self.images, self.assignment.train, self.pixels)
        self._warn_of_other_scales()
        rank_zero_info(f"Plates: {self.table.report()}\n{self._describe_split()}")

    def _warn_of_other_scales(self) -> None:
        is_measured = self.pixels.normalise == "dataset" and self.pixels.mean is None
        if not is_measured or self._statistics is None:
            return
        if scales := find_other_scales(self.images, self._statistics):
            named = name_some([f"{name} ({times:.3g} times)" for name, times in scales.items()])
            rank_zero_warn(
                f"The values of {len(scales)} plates are of another scale than those of training: "
                f"{named}. Bring all plates to one, or standardise each by its own controls: "
                "--data.init_args.pixels.normalise=plate."
            )

    def _describe_split(self) -> str:
        if self.predicts_input:
            return f"input: {len(self.table.domains)} plates to predict"
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

    def _check_trained_size(self) -> None:
        """Refuse images that are unlike those of the training in size or full scale.

        Raises:
            DataError: The size or the full scale of the images differs.
        """
        if self._trained_size is None:  # of an older checkpoint
            return
        trained_size, full_scale = self._trained_size
        for size, plate in self.images.sizes().items() if self.pixels.crop is None else ():
            if size != trained_size:
                raise DataError(
                    f"The images of the plate {plate} have {size[0]} × {size[1]} pixels after "
                    f"preprocessing, those of the training {trained_size[0]} × {trained_size[1]}.",
                    "Give images of the size of the training images.",
                )
        if (unit := self.images.unit(0)) != full_scale:
            raise DataError(
                f"The images of the plate {self.table.domains[0]} are stored with a full scale of "
                f"{unit:g}, those of the training with {full_scale:g}.",
                "Save them in the type of the training images.",
            )

    def predict_from(self, path: Path, trained: Mapping[str, Any]) -> None:
        """Predict all plates of a table or folder, each adapted to by its own controls.

        Args:
            path: See :func:`~fulgurite.datamodules.cs_arm_bn.prediction.find_input_plates`.
            trained: What the checkpoint holds of this DataModule; where that is nothing, the plates
                of the training are read.

        Raises:
            DataError: There are no plates at the path.
            CheckpointError: They have other classes or channels than the training.
        """
        if not trained:
            self.prepare_data()
            self.setup()
            trained = self.state_dict()
            self._ready, self._opened_images = False, None
        self.source = find_input_plates(
            path, self.source, channels=trained["channels"], classes=trained["class_names"]
        )
        self.load_state_dict(dict(trained))
        self.predicts_input = True

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
            "image_size": list(self.image_size),
            "full_scale": self.images.unit(0),
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
        measured = self._statistics
        self._statistics = state_dict["mean"], state_dict["std"]
        if measured is not None and self.trainer is not None and self.trainer.training:
            _warn_of_other_data(measured, self._statistics)
        self._standardisation = {}
        if "image_size" in state_dict:
            height, width = state_dict["image_size"]
            self._trained_size = (height, width), state_dict["full_scale"]

    def pixel_statistics(self, plate: int | None = None) -> PixelStatistics:
        """Return how the images of a plate are standardised for the network.

        Without images, where options or a loaded checkpoint say it.

        Args:
            plate: Number of the plate, after :meth:`setup`; None for one that may be any.

        Raises:
            ConfigError: Plates are standardised by their own controls, and none is named.
        """
        if self._trained_size is None:
            self.prepare_data()
            self.setup()
            self._trained_size = self.image_size, self.images.unit(0)
        return find_pixel_statistics(
            self.images if self._ready else None, self.pixels, self._statistics,
            plate=plate, full_scale=self._trained_size[1],
        )  # fmt: skip


def _warn_of_other_data(measured: tuple[Tensor, Tensor], trained: tuple[Tensor, Tensor]) -> None:
    """Warn where a training goes on with other images than those of its checkpoint."""
    pairs = zip(measured, trained, strict=True)
    if not all(torch.allclose(a, b, rtol=1e-4, atol=1e-6 * float(b.abs().max())) for a, b in pairs):
        rank_zero_warn(
            "The training images have another mean or standard deviation than those of the "
            "checkpoint, by which they are standardised: the training goes on with other data."
        )


def _warn_of_untrained_classes(table: PlateTable, assignment: Assignment) -> None:
    """Warn of classes that are scored in a test or validation, and that no training query has."""
    trained = np.unique(table.label[assignment.train])
    if not len(trained):
        return
    untrained: set[int] = set()
    affected = []
    for name, rows in {"validation": assignment.val, **assignment.tests}.items():
        unseen = ~np.isin(table.label[rows], trained)
        if unseen.any():
            untrained.update(table.label[rows][unseen].tolist())
            affected.append(f"{name} ({int(unseen.sum())} of {len(rows)} queries)")
    if untrained:
        named = name_some([repr(table.class_names[c]) for c in sorted(untrained)])
        rank_zero_warn(
            f"{len(untrained)} classes have no query for training, and count as wrong in "
            f"{', '.join(affected)}: {named}. Choose another split, or leave them out of the table."
        )
