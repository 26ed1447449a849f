"""A data set that is partitioned among clients, some of which have wrong labels.

Shapes: N training samples, K clients, N_k samples of client k, B mini-batch, C channels, H W image.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fulgurite.base import save_options
from fulgurite.datamodules.fedsir.augment import shift_crop
from fulgurite.datamodules.fedsir.batches import ImageBatches, keep_batch
from fulgurite.datamodules.fedsir.inputs import TrainedInputs
from fulgurite.datamodules.fedsir.labels import LabelStore
from fulgurite.datamodules.fedsir.noise import LabelNoise
from fulgurite.datamodules.fedsir.noisy_clients import Corruption, FederationNoise
from fulgurite.datamodules.fedsir.options import FederatedEvaluationOptions, ImageOptions
from fulgurite.datamodules.fedsir.partition import Partition, check_partition
from fulgurite.datamodules.fedsir.prediction import InputImages
from fulgurite.datamodules.fedsir.samples import UNKNOWN, Samples
from fulgurite.datamodules.fedsir.selection import choose_per_class, make_generator
from fulgurite.datamodules.fedsir.sources import ImageArrays, ImageSource
from fulgurite.devices import pins_memory
from fulgurite.domains.fedsir import RoundSchedule
from fulgurite.errors import ConfigError, DataError
from fulgurite.options import PositiveInt, check_arguments, list_options, make_options
from fulgurite.sampling import EveryRankSampler, UnrepeatedDistributedSampler

__all__ = ["EvaluationLabels", "FederatedDataModule"]

log = logging.getLogger(__name__)

_SPLIT, _ORDER, _PARTITION, _NOISE = range(4)  # random streams of `seed`
_PADDING = {"none": 0, "shift": 1, "crop_flip": 4}


@dataclass(frozen=True)
class EvaluationLabels:
    """True labels and noise rates for evaluation; training never receives this object.

    Unknown true labels are -1. A client is noisy if a known true label differs from the given one;
    its rate is the fraction of such labels, NaN where no true label is known.

    Shape:
        - true: (N,) int64; noisy_clients: (K,) bool; noise_rates: (K,) float64.
    """

    true: Tensor
    noisy_clients: Tensor
    noise_rates: Tensor


def _refuse_parts(partition: Any, noise: Any) -> None:
    """Refuse a class in place of its object, and a kind of noise without clients that have it."""
    for name, part in (("partition", partition), ("noise", noise)):
        if isinstance(part, type):
            raise ConfigError(
                f"The {name} is the class {part.__name__}.", f"Give an object: {part.__name__}(…)."
            )
    if isinstance(noise, LabelNoise):
        kind = type(noise).__name__
        raise ConfigError(
            f"The noise is {kind}, which does not say which clients have it, and at which rate.",
            f"Give NoisyClients({kind}(…), rate) for `--data.init_args.noise`.",
        )


class FederatedDataModule(L.LightningDataModule):
    """Splits, partitions and corrupts a data set, with a seed apart from that of the run.

    Training samples are numbered in a random order, so that numbers do not reveal classes. A method
    sees :attr:`labels`, :meth:`client_index` and :meth:`client_images`; true labels are only in
    :attr:`evaluation`.

    Args:
        source: Source of the images and labels.
        partition: Rule that assigns training samples to clients.
        noise: Labels of the clients: synthetic noise at some clients (``NoisyClients``), or the
            labels of a file; ``null`` for the labels of the source, taken as true.
        clients: Number of clients.
        evaluation: The validation split, and the batches of evaluation.
        images: How images reach the network.
        seed: Seed of split, partition and noise, apart from the seed of the run.
        reveal_true_labels: Train on the true labels instead of the noisy ones (oracle); all of
            them must be known.

    Raises:
        ConfigError: ``clients`` is not positive, or ``noise`` is one without clients.

    Source: docs/papers/fedsir.md sections 2 and 6.
    """

    def __init__(
        self,
        source: ImageSource,
        partition: Partition,
        noise: FederationNoise | None = None,
        clients: PositiveInt = 10,
        *,
        evaluation: FederatedEvaluationOptions = FederatedEvaluationOptions(),
        images: ImageOptions = ImageOptions(),
        seed: int = 0,
        reveal_true_labels: bool = False,
    ) -> None:
        super().__init__()
        save_options(self, "source", "partition", "noise", "evaluation", "images", logger=False)
        check_arguments(FederatedDataModule.__init__, locals(), "data.init_args")
        _refuse_parts(partition, noise)
        self.source = source
        self.partition = partition
        self.noise = noise
        self.num_clients = clients
        #: Options of the validation split and of images.
        self.evaluation_options = make_options(FederatedEvaluationOptions, evaluation)
        self.image_options = make_options(ImageOptions, images)
        records = {"evaluation": self.evaluation_options, "images": self.image_options}
        for name, record in records.items():
            if name not in self.hparams:  # from Python; checkpoints hold plain values
                self.save_hyperparameters({name: list_options(record)}, logger=False)
        self.seed = seed
        self.reveal_true_labels = reveal_true_labels
        self._ready = False
        self._affine: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._trained: TrainedInputs | None = None  # of the checkpoint that was loaded
        self._input: InputImages | None = None  # files in no split, which are predicted

    @property
    def num_classes(self) -> int:
        """Number of classes, known before :meth:`setup`."""
        return self.source.num_classes if self._input is None else len(self.class_names)

    @property
    def in_channels(self) -> int:
        """Number of channels, known before :meth:`setup`."""
        return self.source.in_channels if self._input is None else self._input.channels

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width [pixels], known before :meth:`setup`."""
        return self.source.image_size

    @property
    def prediction_names(self) -> dict[str, Any]:
        """Names of the codes in predictions, after :meth:`setup`; files by their names."""
        names: dict[str, Any] = {"label": self.class_names, "predicted": self.class_names}
        if self._input is not None:
            names["index"] = {"file": self._input.names}
        return names

    @property
    def prediction_axes(self) -> dict[str, tuple[str, ...]]:
        """Names of the components of vectors in predictions."""
        return {"probabilities": self.class_names}

    @property
    def num_samples(self) -> int:
        """Number N of training samples of all clients."""
        return len(self.labels)

    def state_dict(self) -> dict[str, Any]:
        """Return what the network's inputs and outputs mean, for other images than these."""
        return self._describe_inputs().state_dict() if self._ready else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what inputs and outputs of the checkpoint's network mean; these data stay theirs."""
        self._trained = TrainedInputs.from_state_dict(state_dict) if state_dict else None

    def trained_inputs(self) -> TrainedInputs:
        """What inputs and outputs of the network mean.

        As the loaded checkpoint says; one that does not is taken to be of these data, which are
        read.
        """
        if self._trained is not None:
            return self._trained
        self.prepare_data()
        self.setup()
        return self._describe_inputs()

    def _describe_inputs(self) -> TrainedInputs:
        scale, offset = self._affine[torch.device("cpu")]
        height, width = self._images.shape[-2:]
        names = tuple(self.class_names)
        return TrainedInputs(scale.flatten(), offset.flatten(), names, (height, width))

    def predict_from(self, path: Path, trained: Mapping[str, Any]) -> None:
        """Predict the images of files, whose labels are unknown (-1).

        Args:
            path: See :class:`~fulgurite.datamodules.fedsir.prediction.InputImages`.
            trained: What the checkpoint holds of this DataModule; where that is nothing, the
                training images are read.

        Raises:
            DataError: There is no image at the path, or one is not like those of the training.
        """
        self.load_state_dict(dict(trained))
        inputs = self.trained_inputs()
        files = InputImages(path, self.source, inputs)
        labels = torch.full((len(files.names),), UNKNOWN)
        scale, offset = (values.view(-1, 1, 1) for values in (inputs.scale, inputs.offset))
        self._affine = {torch.device("cpu"): (scale, offset)}
        self._predicted = ImageBatches(files.images, labels, None, self.plain_batch)
        self.class_names, self._input = inputs.class_names, files

    def prepare_data(self) -> None:
        """Let the source fill its cache, once per machine."""
        if self._input is None:
            self.source.prepare()

    def setup(self, stage: str | None = None) -> None:
        """Load, split, partition and corrupt the data; a second call does nothing.

        Raises:
            DataError: The data are unusable, the clients do not fit them, or true labels are to be
                revealed and some are unknown.
            ConfigError: The noise does not fit the clients or classes.
        """
        if self._ready or self._input is not None:
            return
        arrays = self.source.load()
        self._split_samples(arrays)
        self._measure_channels(arrays.train_images)
        self.class_names = arrays.class_names
        classes = len(arrays.class_names)
        samples = self.samples
        self._parts = self.partition(
            samples, self.num_clients, classes, make_generator(self.seed, _PARTITION)
        )
        check_partition(self._parts, len(samples))
        corruption = Corruption(
            samples.labels,
            torch.zeros(self.num_clients, dtype=torch.bool),
            torch.zeros(self.num_clients, dtype=torch.float64),
        )
        if self.noise is not None:
            corruption = self.noise(
                samples,
                self._parts,
                classes,
                make_generator(self.seed, _NOISE),
                images=self.client_images,
            )
        self._check_true_labels(samples)
        training_labels = samples.true if self.reveal_true_labels else corruption.labels
        #: Given and current labels, which training uses.
        self.labels = LabelStore(training_labels, classes)
        #: True labels, for evaluation only; None if no true label is known.
        self.evaluation: EvaluationLabels | None = None
        if bool((samples.true != UNKNOWN).any()):
            self.evaluation = EvaluationLabels(samples.true, corruption.noisy, corruption.rates)
        self._ready = True

    def _check_true_labels(self, samples: Samples) -> None:
        """Warn of metrics that are left out where true labels are unknown.

        Raises:
            DataError: True labels are to be revealed, and some are unknown.
        """
        unknown = (samples.true == UNKNOWN).nonzero()[:, 0]
        if not len(unknown):
            return
        if self.reveal_true_labels:
            raise DataError(
                f"The true labels of {len(unknown)} of {len(samples)} training samples are unknown "
                f"({samples.describe(unknown)}), and the oracle needs them.",
                "Set `--data.init_args.reveal_true_labels=false`, or name them in the file of "
                "`--data.init_args.noise`.",
            )
        log.warning(
            "The true labels of %d of %d training samples are unknown: fed/label_noise is of the "
            "others, and precision and recall of noisy clients are left out.",
            len(unknown),
            len(samples),
        )

    def _split_samples(self, arrays: ImageArrays) -> None:
        """Split off validation, make the copies of the source, and shuffle the training samples."""
        samples = arrays.samples()
        if not len(samples):
            raise DataError("There are no training images.", "Give a source with training images.")
        if self.noise is not None:
            samples = self.noise.annotate(samples)
        labels = samples.classes
        sizes = torch.bincount(labels, minlength=len(arrays.class_names))
        val_rows = choose_per_class(
            labels,
            (sizes.double() * self.evaluation_options.val_fraction).round().long(),
            make_generator(self.seed, _SPLIT),
        )
        if self.evaluation_options.val_fraction:
            self._warn_of_classes_without_validation(sizes, labels[val_rows])
        is_train = torch.ones(len(labels), dtype=torch.bool)
        is_train[val_rows] = False
        rows = is_train.nonzero()[:, 0]
        self._images, trained = arrays.train_images, samples.take(rows)
        if self.source.copies > 1:
            self._images, trained = self._copy_originals(self._images[rows], trained)
            rows = torch.arange(len(trained))
        order = torch.randperm(len(rows), generator=make_generator(self.seed, _ORDER))
        self._rows = rows[order]
        #: The training samples in the order of :attr:`labels`, for evaluation only: they know true
        #: labels.
        self.samples = trained.take(order)
        if unverified := int((samples.true[val_rows] == UNKNOWN).sum()):
            log.warning(
                "%d of %d validation labels are the given ones, which may be wrong: the true ones "
                "are unknown.",
                unverified,
                len(val_rows),
            )
        self._val = ImageBatches(arrays.train_images, labels[val_rows], val_rows, self.plain_batch)
        self._test = ImageBatches(arrays.test_images, arrays.test_labels, None, self.plain_batch)

    @staticmethod
    def _warn_of_classes_without_validation(sizes: Tensor, val_labels: Tensor) -> None:
        validated = torch.bincount(val_labels, minlength=len(sizes)) > 0
        if missing := int(((sizes > 0) & ~validated).sum()):
            log.warning(
                "%d of %d classes have no validation image, since `val_fraction` of theirs rounds "
                "to none: raise --data.init_args.evaluation.val_fraction.",
                missing,
                int((sizes > 0).sum()),
            )

    def _copy_originals(self, images: Tensor, samples: Samples) -> tuple[Tensor, Samples]:
        """Make the copies of the source, with the sample of which each is a copy."""
        copies, labels = self.source.copy_images(images, samples.labels)
        repeated = samples.take(torch.arange(len(samples)).repeat(self.source.copies))
        if not torch.equal(labels, repeated.labels):
            raise DataError(
                f"{type(self.source).__name__} does not say which copy is of which image.",
                "Let `copy_images` put copy k of image n at k · N + n.",
            )
        return copies, repeated

    def _measure_channels(self, images: Tensor) -> None:
        """Measure mean and standard deviation of each channel on at most 10,000 images."""
        channels = images.shape[1]
        options = self.image_options
        if options.mean is None or options.std is None:
            sample = self._images[self._rows[:10_000]].transpose(0, 1).reshape(channels, -1)
            counts = torch.stack([torch.bincount(c, minlength=256) for c in sample]).double()
            frequencies = counts / counts.sum(1, keepdim=True)
            levels = torch.arange(256, dtype=torch.float64) / 255
            mean = frequencies @ levels
            std = (frequencies @ levels**2 - mean**2).clamp_min(1e-8).sqrt()
            # one that is the same everywhere stays harmless in images where it is not
            std[frequencies.max(1).values == 1] = 1
        else:
            mean, std = torch.tensor(options.mean), torch.tensor(options.std)
            if len(mean) != channels or len(std) != channels:
                raise ConfigError(
                    f"There are {len(mean)} means and {len(std)} standard deviations for "
                    f"{channels} channels.",
                    "Give one `--data.init_args.images.mean` and one `std` for each channel.",
                )
        scale, offset = 1 / (255 * std), -mean / std
        self._affine = {
            torch.device("cpu"): (scale.float().view(-1, 1, 1), offset.float().view(-1, 1, 1))
        }

    def client_index(self, client: int) -> Tensor:
        """Return the indices of a client's samples in :attr:`labels`, ascending.

        Shape:
            - (N_k,) int64.
        """
        return self._parts[client]

    def client_images(self, client: int) -> Tensor:
        """Return a client's images in the order of :meth:`client_index`.

        Shape:
            - (N_k, C, H, W) uint8.
        """
        return self._images[self._rows[self._parts[client]]]

    def plain_batch(self, images: Tensor) -> Tensor:
        """Normalise a batch.

        Shape:
            - images: (B, C, H, W) uint8 -> float32, on the same device.
        """
        if images.device not in self._affine:
            scale, offset = self._affine[torch.device("cpu")]
            self._affine[images.device] = scale.to(images.device), offset.to(images.device)
        scale, offset = self._affine[images.device]
        return images.to(torch.float32).mul_(scale).add_(offset)

    def augment_batch(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augment and normalise a batch, with a generator on the CPU.

        Shape:
            - images: (B, C, H, W) uint8 -> float32, on the same device.
        """
        if pad := _PADDING[self.image_options.augment]:
            images = shift_crop(
                images, pad, generator, flip=self.image_options.augment == "crop_flip"
            )
        return self.plain_batch(images)

    def _make_loader(self, data: ImageBatches) -> DataLoader[Any]:
        return DataLoader(
            data,
            batch_size=self.evaluation_options.batch_size,
            sampler=UnrepeatedDistributedSampler(len(data)),
            collate_fn=keep_batch,
            pin_memory=pins_memory(),
            generator=torch.Generator(),  # evaluation leaves the run's randomness alone
        )

    def train_dataloader(self) -> Any:
        """Return a loader of the numbers of client groups: one batch per group of a round.

        The clients and labels of a group are chosen when it is consumed. Every rank has equally
        many groups, since ranks with unequal batch counts would wait for each other. The model
        says how many there are (:class:`~fulgurite.domains.fedsir.RoundSchedule`); without one
        there is a group for each client.
        """
        groups = self.num_clients
        if self.trainer is not None and isinstance(self.trainer.lightning_module, RoundSchedule):
            model: RoundSchedule = self.trainer.lightning_module
            groups = model.groups_per_round(self.num_clients, self.trainer.world_size)
        return DataLoader(
            range(groups),  # type: ignore[arg-type]
            batch_size=None,
            sampler=EveryRankSampler(groups),
        )

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return (images, true labels, index) batches of the validation split, if there is one."""
        return self._make_loader(self._val) if len(self._val) else []

    def test_dataloader(self) -> DataLoader[Any]:
        """Return (images, labels, index) batches of the test split."""
        return self._make_loader(self._test)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the batches of :meth:`test_dataloader`, or those of files in no split."""
        return self.test_dataloader() if self._input is None else self._make_loader(self._predicted)
