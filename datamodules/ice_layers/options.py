"""Options of the data module of ice layers: the split, which stacks are used, and evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fulgurite.datamodules.ice_layers.splits import check_split
from fulgurite.options import (
    ClosedUnitInterval,
    NonNegativeFloat,
    PositiveInt,
    RightOpenUnitInterval,
    check_options,
    restrict_number,
)

__all__ = ["LayerEvaluationOptions", "Part", "SelectionOptions", "SplitOptions"]

Part = Literal["train", "val", "test"]
"""A part of a split."""

_KEY = "data.init_args"
# jsonargparse reads blocks of TYPE_CHECKING, and mypy takes no conditional expression for a type
if not TYPE_CHECKING:  # noqa: SIM108
    Years = restrict_number("Years", float, (">=", 0), ("<=", 1000))
else:
    Years = float


@dataclass(frozen=True)
class SplitOptions:
    """How flight segments are split into training, validation and test.

    Args:
        val: Fraction of flight segments for validation, or names (a beginning is enough: ``2012``);
            if not given, one in seven, or those of a source whose files have a split of their own.
        test: Fraction or names of flight segments for the test, as for ``val``.
        order: ``random``, or by ``name``, which begins with the date: the last flights are the
            test, those before them the validation.
        guard: Training flights within this many years of a validation or test flight are left out:
            layers of flights a year apart are mostly the same years.

    Raises:
        ConfigError: A fraction or number is out of range, or nothing is left for training.

    Source: arXiv 2604.20783, docs/papers/ice_layers.md section 1.8; ``guard`` is inferred.
    """

    val: RightOpenUnitInterval | list[str] | None = None
    test: RightOpenUnitInterval | list[str] | None = None
    order: Literal["random", "name"] = "random"
    guard: Years = 0.0

    def __post_init__(self) -> None:
        check_options(self, f"{_KEY}.split")
        check_split(self.val or 0.0, self.test or 0.0)


@dataclass(frozen=True)
class SelectionOptions:
    """Which stacks of the parts are used.

    Args:
        traced: Parts of which only stacks without any missing entry are used.
        train_stacks: Train on at most this many stacks, a random choice.
        overlap: Completed stacks that are nearer than this to an evaluated trace are not trained
            on [m].

    Raises:
        ConfigError: A number is out of range, or a part is unknown.
    """

    traced: tuple[Part, ...] = ()
    train_stacks: PositiveInt | None = None
    overlap: NonNegativeFloat = 500.0

    def __post_init__(self) -> None:
        check_options(self, f"{_KEY}.selection")


@dataclass(frozen=True)
class LayerEvaluationOptions:
    """The batches of validation, test and prediction.

    Args:
        batch_size: Stacks of a batch; as in training if not given.
        drop: Fraction of the picks that test batches hide from the model, in runs and whole
            boundaries, with the layers on both of their sides; what is dropped at 0.1 is dropped
            at 0.3 too.
        predict: Which stacks are predicted: ``all`` there are, or those of a part. Stacks without
            any pick, which are in no part, are predicted with those of their segment; those that
            ``split.guard``, ``selection.traced`` and ``selection.train_stacks`` leave out, with
            ``all``.

    Raises:
        ConfigError: A number is out of range, or a word is unknown.
    """

    batch_size: PositiveInt | None = None
    drop: ClosedUnitInterval = 0.0
    predict: Literal["train", "val", "test", "all"] = "all"

    def __post_init__(self) -> None:
        check_options(self, f"{_KEY}.evaluation")
