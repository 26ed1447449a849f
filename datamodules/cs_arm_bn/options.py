"""Options of the plate data module: training episodes, evaluation, and pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fulgurite.datamodules.cs_arm_bn.preprocess import Preprocess
from fulgurite.errors import ConfigError
from fulgurite.options import (
    ClosedUnitInterval,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    check_options,
)

__all__ = ["EpisodeOptions", "PixelOptions", "PlateEvaluationOptions", "find_min_controls"]

_DEFAULT_MIN_CONTROLS = 8


@dataclass(frozen=True)
class EpisodeOptions:
    """Training episodes: queries and controls of one plate, or mixed mini-batches.

    Args:
        queries: Number L of queries in a training episode.
        controls: Number N of controls in a training episode; 0 for none.
        steps_per_epoch: Training episodes of an epoch, over all ranks; by default as many as use
            each query once on average.
        mixed: Train on ordinary mini-batches from all plates, without controls (ERM).
        plates: Number of plates in a mixed batch, with equally many queries of each (DANN,
            DeepCORAL); by default queries come from all plates.
        min_controls: Smallest number of controls of a plate; by default ``controls`` of the batch,
            at most 8.

    Raises:
        ConfigError: A number is out of range, or ``plates`` are to be mixed in batches that are
            not, or are smaller.
    """

    queries: PositiveInt = 64
    controls: NonNegativeInt = 128
    steps_per_epoch: PositiveInt | None = None
    mixed: bool = False
    plates: PositiveInt | None = None
    min_controls: NonNegativeInt | None = None

    def __post_init__(self) -> None:
        check_options(self, "data.init_args.episodes")
        if self.plates is not None and (not self.mixed or self.plates > self.queries):
            raise ConfigError(
                f"A batch of {self.queries} queries is to mix {self.plates} plates, and mixed is "
                f"{self.mixed}.",
                "Set `--data.init_args.episodes.mixed=true` and `plates` to no more than "
                "`queries`, or `--data.init_args.episodes.plates=null`.",
            )


@dataclass(frozen=True)
class PlateEvaluationOptions:
    """Evaluation batches, and probes of the test: label shift, wrong and mislabelled controls.

    Args:
        queries: Number of queries in an evaluation batch; as in training by default.
        controls: Number of controls in an evaluation batch, one fixed sample per plate (all, if a
            plate has fewer); as in training by default.
        limit: Evaluate at most this many queries of each plate, a random choice.
        label_shift: Dirichlet concentration α of the classes in a test batch; balanced by default.
            Batches still have ``queries`` queries: those of a class with too few on a plate are
            repeated, and each query counts once.
        control_plate: ``wrong`` gives each test plate the controls of another one: a probe that
            should reduce accuracy.
        mislabelled_controls: Fraction of the test controls that are replaced by queries (a probe).
        predict: Plates to predict: ``test`` for those of the tests and all with unlabelled
            queries, ``all`` for all.

    Raises:
        ConfigError: A number is out of range, or a word is unknown.

    Source: docs/papers/cs_arm_bn.md sections 1.3, 2.4 and 6.4.
    """

    queries: PositiveInt | None = None
    controls: NonNegativeInt | None = None
    limit: PositiveInt | None = None
    label_shift: PositiveFloat | None = None
    control_plate: Literal["own", "wrong"] = "own"
    mislabelled_controls: ClosedUnitInterval = 0.0
    predict: Literal["test", "all"] = "test"

    def __post_init__(self) -> None:
        check_options(self, "data.init_args.evaluation")

    def find_sizes(self, episodes: EpisodeOptions) -> tuple[int, int]:
        """Return the numbers of queries and controls in a batch, as in training by default."""
        controls = episodes.controls if self.controls is None else self.controls
        return self.queries or episodes.queries, controls


@dataclass(frozen=True)
class PixelOptions:
    """Pixels of a batch: preprocessing before storage, crops, and standardisation.

    Args:
        crop: Side of the crop [pixels], random in training, else central; by default images are
            not cropped.
        augment: Random crops and mirroring in training.
        preprocess: Preprocessing of raw images before storage; the source's by default.
        normalise: Statistics that standardise images: ``dataset`` those of the training queries,
            ``plate`` those of the plate's own controls, ``image`` those of each image and channel.
        mean: Mean of each channel, in fractions of full scale; measured by default.
        std: Standard deviation of each channel, in fractions of full scale; measured by default.
        cache: Store preprocessed images under ``FULGURITE_CACHE``; else files are read each time.

    Raises:
        ConfigError: A number is out of range, a word is unknown, or ``mean`` is given without
            ``std``.

    Source: docs/papers/cs_arm_bn.md section 2.3.
    """

    crop: PositiveInt | None = None
    augment: bool = True
    preprocess: Preprocess | None = None
    normalise: Literal["dataset", "plate", "image"] = "dataset"
    mean: list[float] | None = None
    std: list[PositiveFloat] | None = None
    cache: bool = True

    def __post_init__(self) -> None:
        check_options(self, "data.init_args.pixels")
        if (self.mean is None) != (self.std is None):
            raise ConfigError(
                f"The mean is {self.mean} and the standard deviation {self.std}.",
                "Give both `--data.init_args.pixels.mean` and `--data.init_args.pixels.std`, or "
                "none.",
            )


def find_min_controls(episodes: EpisodeOptions, evaluation: PlateEvaluationOptions) -> int:
    """Return the smallest number of controls that a plate must have."""
    if episodes.min_controls is not None:
        return episodes.min_controls
    trained = 0 if episodes.mixed else episodes.controls
    _, tested = evaluation.find_sizes(episodes)
    return min(max(trained, tested), _DEFAULT_MIN_CONTROLS)
