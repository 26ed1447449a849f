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
from fulgurite.datamodules.cs_arm_bn.draws import (
    draw_shifted_batches,
    mislabel,
    pair_wrong_plates,
    sample_rows,
    split_into_batches,
)
from fulgurite.datamodules.cs_arm_bn.episodes import (
    BatchRows,
    EpisodeSampler,
    EvaluationEpisodes,
    PlateSampler,
    TrainingEpisodes,
)
from fulgurite.datamodules.cs_arm_bn.images import IMAGE_EXCLUSIONS, PlateImages
from fulgurite.datamodules.cs_arm_bn.pixels import ImageCrops, Standardisation
from fulgurite.datamodules.cs_arm_bn.preprocess import Preprocess
from fulgurite.datamodules.cs_arm_bn.sources import PlateSource, check_images
from fulgurite.datamodules.cs_arm_bn.splits import Assignment, Split, check_assignment
from fulgurite.datamodules.cs_arm_bn.table import PlateTable, Rows
from fulgurite.devices import pins_memory
from fulgurite.domains.cs_arm_bn import PlateBatch
from fulgurite.errors import CheckpointError, ConfigError, DataError
from fulgurite.sampling import sampler_ranks, training_progress

__all__ = ["PlateDataModule"]

_EXCLUSIONS = ("few_controls", *IMAGE_EXCLUSIONS)
_CHUNKS, _CONTROLS, _SHIFT, _MISLABEL = range(2, 6)  # random streams of `seed`; 1 is training


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
        queries: Number L of queries in a training episode.
        controls: Number N of controls in a training episode; 0 for none.
        eval_queries: Number of queries in an evaluation batch; as in training by default.
        eval_controls: Number of controls in an evaluation batch, one fixed sample per plate (all,
            if a plate has fewer); as in training by default.
        eval_limit: Evaluate at most this many queries of each plate, a random choice.
        steps_per_epoch: Training episodes of an epoch, over all ranks; by default as many as use
            each query once on average.
        mixed: Train on ordinary mini-batches from all plates, without controls (ERM).
        label_shift: Dirichlet concentration α of the classes in a test batch; balanced by default.
            Batches still have ``eval_queries`` queries: those of a class with too few on a plate
            are repeated, and each query counts once.
        control_plate: ``wrong`` gives each test plate the controls of another one: a probe that
            should reduce accuracy.
        mislabelled_controls: Fraction of the test controls that are replaced by queries (a probe).
        min_controls: Smallest number of controls of a plate; by default ``controls`` of the batch,
            at most 8.
        image_size: Side of the crop [pixels], random in training, else central; by default images
            are not cropped.
        augment: Random crops and mirroring in training.
        preprocess: Preprocessing of raw images before storage; the source's by default.
        normalise: Statistics that standardise images: ``dataset`` those of the training queries,
            ``plate`` those of the plate's own controls, ``image`` those of each image and channel.
        mean: Mean of each channel, in fractions of full scale; measured by default.
        std: Standard deviation of each channel, in fractions of full scale; measured by default.
        cache: Store preprocessed images under ``FULGURITE_CACHE``; else files are read each time.
        exclude: Words for data to leave out and count instead of an error: plates with
            ``few_controls``, images that are ``unreadable``, ``constant`` or hold ``nan``.
        predict: Plates to predict: ``test`` for those of the tests and all with unlabelled
            queries, ``all`` for all.
        num_workers: Number of processes that load episodes; batches do not depend on it.
        seed: Seed of episodes and evaluation batches, apart from the seed of the run.
        plates: Number of plates in a mixed batch, with equally many queries of each (DANN,
            DeepCORAL); by default queries come from all plates.

    Raises:
        ConfigError: A number is out of range, an option or word is unknown, or options do not fit
            together.

    Source: arXiv 2604.20824, card sections 1.3, 2.3, 2.4 and 7.2.
    """

    def __init__(
        self,
        source: PlateSource,
        split: Split,
        queries: int = 64,
        controls: int = 128,
        eval_queries: int | None = None,
        eval_controls: int | None = None,
        eval_limit: int | None = None,
        steps_per_epoch: int | None = None,
        mixed: bool = False,
        label_shift: float | None = None,
        control_plate: Literal["own", "wrong"] = "own",
        mislabelled_controls: float = 0.0,
        min_controls: int | None = None,
        image_size: int | None = None,
        augment: bool = True,
        preprocess: Preprocess | None = None,
        normalise: Literal["dataset", "plate", "image"] = "dataset",
        mean: list[float] | None = None,
        std: list[float] | None = None,
        cache: bool = True,
        exclude: list[str] = [],  # noqa: B006  # copied below
        predict: Literal["test", "all"] = "test",
        num_workers: int = 0,
        seed: int = 1234,
        plates: int | None = None,
    ) -> None:
        super().__init__()
        minima = {
            "queries": (queries, 1),
            "controls": (controls, 0),
            "eval_queries": (eval_queries, 1),
            "eval_controls": (eval_controls, 0),
            "eval_limit": (eval_limit, 1),
            "steps_per_epoch": (steps_per_epoch, 1),
            "plates": (plates, 1),
            "min_controls": (min_controls, 0),
            "image_size": (image_size, 1),
            "num_workers": (num_workers, 0),
            "seed": (seed, 0),
        }
        for name, (value, low) in minima.items():
            if value is not None and value < low:
                raise ConfigError(
                    f"The {name} is {value}.", f"Set `--data.init_args.{name}` to {low} or more."
                )
        for name, word, words in (
            ("control_plate", control_plate, ("own", "wrong")),
            ("normalise", normalise, ("dataset", "plate", "image")),
            ("predict", predict, ("test", "all")),
        ):
            if word not in words:
                raise ConfigError(
                    f"The {name} is {word!r}.",
                    f"Set `--data.init_args.{name}` to one of {', '.join(words)}.",
                )
        if label_shift is not None and not label_shift > 0:
            raise ConfigError(
                f"The label shift is {label_shift}.",
                "Set `--data.init_args.label_shift` to a positive number, or null for none.",
            )
        if not 0 <= mislabelled_controls <= 1:
            raise ConfigError(
                f"The fraction of mislabelled controls is {mislabelled_controls}.",
                "Set `--data.init_args.mislabelled_controls` in [0, 1].",
            )
        if (mean is None) != (std is None) or (std is not None and min(std) <= 0):
            raise ConfigError(
                f"The mean is {mean} and the standard deviation {std}.",
                "Give both `--data.init_args.mean` and `--data.init_args.std` (positive), or none.",
            )
        if plates is not None and (not mixed or plates > queries):
            raise ConfigError(
                f"A batch of {queries} queries is to mix {plates} plates, and mixed is {mixed}.",
                "Set `--data.init_args.mixed=true` and `plates` to no more than `queries`, or "
                "`--data.init_args.plates=null`.",
            )
        self.exclude = check_exclude(exclude, _EXCLUSIONS, "exclude")
        if not cache and self.exclude & set(IMAGE_EXCLUSIONS):
            raise ConfigError(
                "Images are to be excluded, and without a cache none is seen before it is used.",
                "Set `--data.init_args.cache=true`.",
            )
        save_options(self, "source", "split", "preprocess", logger=False)
        self.source = source
        self.split = split
        self.queries = queries
        self.controls = controls
        self.eval_queries = queries if eval_queries is None else eval_queries
        self.eval_controls = controls if eval_controls is None else eval_controls
        self.eval_limit = eval_limit
        self.steps_per_epoch = steps_per_epoch
        self.mixed = mixed
        self.plates = plates
        self.label_shift = label_shift
        self.control_plate = control_plate
        self.mislabelled_controls = mislabelled_controls
        num_controls = max(0 if mixed else controls, self.eval_controls)
        self.min_controls = min(num_controls, 8) if min_controls is None else min_controls
        self.crop_size = image_size
        self.augment = augment
        self.preprocess = source.preprocess if preprocess is None else preprocess
        self.normalise = normalise
        self.mean = mean
        self.std = std
        self.cache = cache
        self.predict_split = predict
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
        """Height and width [pixels]; known after :meth:`setup`, before it if it is given.

        Raises:
            ConfigError: It is read before :meth:`setup` and ``image_size`` is not set.
        """
        if self.crop_size is not None:
            return self.crop_size, self.crop_size
        if not self._ready:
            raise ConfigError(
                "The size of the images is not known before they are read.",
                "Set `--data.init_args.image_size`.",
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
        if self.cache:
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
        return PlateImages(table, reader, self.preprocess, self.exclude, self.cache)

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
        if self.cache:
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
        if self.crop_size is None and len(sizes) > 1:
            listed = ", ".join(f"{h} × {w} on {plate}" for (h, w), plate in sizes.items())
            raise DataError(
                f"Plates have images of several sizes: {listed}.",
                "Set `--data.init_args.image_size` to crop all to one size.",
            )
        height, width = min(sizes, key=min)
        if self.crop_size is not None and self.crop_size > min(height, width):
            raise ConfigError(
                f"Crops of {self.crop_size} pixels do not fit images of {height} × {width}.",
                "Lower `--data.init_args.image_size`, or `downscale` of the preprocessing.",
            )

    def _measure_channels(self) -> tuple[Tensor, Tensor] | None:
        if self.mean is not None and self.std is not None:
            for name, values in (("mean", self.mean), ("std", self.std)):
                if len(values) != self.in_channels:
                    raise ConfigError(
                        f"There are {len(values)} values for {self.in_channels} channels.",
                        f"Give one `--data.init_args.{name}` for each channel.",
                    )
            return torch.tensor(self.mean), torch.tensor(self.std)
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
        if self.normalise == "image":
            return Standardisation(None, None)
        if self.normalise == "dataset":
            if self._statistics is None:
                raise DataError(
                    "There are no training queries to measure mean and deviation of the channels.",
                    "Give a checkpoint with `--ckpt_path`, or `--data.init_args.mean` and `std`.",
                )
            unit = self.images.unit(0)
            return Standardisation(*(values * unit for values in self._statistics))
        moments = []
        for d, name in enumerate(self.domains):
            rows = self.table.rows_of(d, control=True)
            if not len(rows):
                raise DataError(
                    f"The plate {name} has no controls to normalise by.",
                    "Set `--data.init_args.normalise=dataset`.",
                )
            moments.append(np.stack(self.images.moments(rows)))
        return Standardisation(*torch.from_numpy(np.stack(moments, 1)).float())

    def _make_crops(self) -> ImageCrops:
        if not self._standardisation:
            self._standardisation = {torch.device("cpu"): self._make_standardisation()}
        return ImageCrops(self.images, self.crop_size, self.augment)

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
        episodes = TrainingEpisodes(
            self._make_crops(),
            rows,
            self.queries,
            self.controls,
            self.steps_per_epoch or max(1, len(rows) // self.queries),
            self.seed,
            self.mixed,
            self.plates,
        )
        epoch, batches = training_progress(self.trainer)
        done = batches * sampler_ranks(self.trainer)[1]  # on all ranks
        return self._make_loader(episodes, EpisodeSampler(episodes, epoch, done))

    def _select_controls(self, domain: int, limit: int | None) -> Rows:
        rows = self.table.rows_of(domain, control=True)
        if limit is None or limit >= len(rows):
            return rows
        name = self.table.domains[domain]
        return np.sort(sample_rows(rows, limit, self._make_generator(_CONTROLS, name)))

    def _make_generator(self, stream: int, name: str) -> np.random.Generator:
        """Return a generator for one plate, independent of the other plates."""
        return np.random.default_rng((self.seed, stream, *name.encode()))

    def evaluation(self, rows: Rows, probes: bool = False) -> EvaluationEpisodes:
        """Return fixed episodes in which each of the queries counts once.

        Args:
            rows: Rows of queries.
            probes: Whether to apply label shift, wrong plates and mislabelled controls.
        """
        table, parts = self.table, []
        plates = [int(d) for d in np.unique(table.domain[rows])]
        wrong = probes and self.control_plate == "wrong"
        control_plates = {d: d for d in plates}
        if wrong:
            if len(plates) < 2:
                raise ConfigError(
                    "There is no second plate whose controls could be given to this one.",
                    "Set `--data.init_args.control_plate=own`, or test on several plates.",
                )
            batch = {int(d): b for d, b in zip(table.domain, _batch_names(table), strict=True)}
            control_plates = pair_wrong_plates(plates, [batch[d] for d in plates])
        for d in plates:
            name = table.domains[d]
            queries = rows[table.domain[rows] == d]
            generator = self._make_generator(_CHUNKS, name)
            if self.eval_limit is not None and self.eval_limit < len(queries):
                queries = sample_rows(queries, self.eval_limit, generator)
            controls = self._select_controls(control_plates[d], self.eval_controls)
            if probes and self.mislabelled_controls:
                controls = mislabel(
                    controls,
                    table.rows_of(d, control=False),
                    self.mislabelled_controls,
                    self._make_generator(_MISLABEL, name),
                )
            if probes and self.label_shift is not None:
                labels = table.label[queries]
                if len(np.unique(labels)) < 2:
                    raise DataError(
                        f"The {len(queries)} queries of plate {name} are of one class: label shift "
                        "changes nothing on it.",
                        "Set `--data.init_args.label_shift=null`, raise `eval_limit`, or test "
                        "plates with several classes.",
                    )
                generator = self._make_generator(_SHIFT, name)
                shifted = draw_shifted_batches(
                    labels, self.eval_queries, self.label_shift, generator
                )
                batches = [(queries[rows], counts) for rows, counts in shifted]
            else:
                batches = split_into_batches(queries, self.eval_queries, generator)
            parts += [BatchRows(d, part, counted, controls) for part, counted in batches]
        return EvaluationEpisodes(self._make_crops(), parts)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return the validation episodes, if there are any."""
        rows = self.assignment.val
        return self._make_loader(self.evaluation(rows)) if len(rows) else []

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Return one loader for each of :attr:`test_sets`."""
        return [
            self._make_loader(self.evaluation(rows, probes=True))
            for rows in self.assignment.tests.values()
        ]

    def plate_episodes(self, plates: Sequence[int]) -> EvaluationEpisodes:
        """Return all controls and queries of plates for prediction.

        The first batch of a plate has all its controls, later ones have none; the last one is not
        padded.
        """
        parts = []
        for d in plates:
            queries = self.table.rows_of(d, control=False)
            controls = self.table.rows_of(d, control=True)
            for first in range(0, max(1, len(queries)), self.eval_queries):
                part = queries[first : first + self.eval_queries]
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
        if self.predict_split == "all":
            plates = list(range(len(self.domains)))
        else:
            rows = [rows for name, rows in self.assignment.tests.items() if name != "in_domain"]
            rows.append(np.flatnonzero(~self.table.control & (self.table.label < 0)))
            plates = [int(d) for d in np.unique(self.table.domain[np.concatenate(rows)])]
        plates = [d for d in plates if len(self.table.rows_of(d, control=False))]
        if not plates:
            raise DataError(
                "The split leaves no plate to predict.", "Set `--data.init_args.predict=all`."
            )
        episodes = self.plate_episodes(plates)
        return self._make_loader(episodes, PlateSampler(episodes, sampler_ranks(self.trainer)))


def _batch_names(table: PlateTable) -> list[str]:
    return [str(name) for name in table.column("source") + "|" + table.column("batch")]
