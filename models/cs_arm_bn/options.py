"""Options of a plate classifier."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fulgurite.options import ClosedUnitInterval, NonNegativeInt, PositiveInt, check_options

__all__ = ["AdaptationOptions"]


@dataclass(frozen=True)
class AdaptationOptions:
    """How a classifier learns its references, and how its prediction adapts to plates.

    Args:
        predict_with: Statistics in prediction: ``"controls"`` adapts once to the controls of a
            plate, after which predictions do not depend on each other; ``"test"`` predicts chunks
            as in the test, each joined by the plate's controls.
        chunk: Number of control images in a forward pass of the adaptation.
        record_fraction: Fraction of an epoch's episodes, its last ones, that update the training
            reference of the adaptive weight.
        min_recorded: Smallest number of these episodes, or all of a shorter epoch.
        foreign_controls: Allow controls from other plates (ablation).

    Raises:
        ConfigError: A value is out of range.

    Source: docs/papers/cs_arm_bn.md sections 7.5 and 7.6.
    """

    predict_with: Literal["controls", "test"] = "controls"
    chunk: PositiveInt = 256
    record_fraction: ClosedUnitInterval = 0.125
    min_recorded: NonNegativeInt = 64
    foreign_controls: bool = False

    def __post_init__(self) -> None:
        check_options(self, "model.init_args.adaptation")

    def find_first_recorded(self, episodes: int) -> int:
        """Return the index of the first episode of an epoch that updates the reference.

        Example:
            >>> AdaptationOptions(record_fraction=0.25, min_recorded=1).find_first_recorded(8)
            6
        """
        # few plates determine the usual shift badly: seven cost 3 points under label shift
        num_recorded = max(math.ceil(self.record_fraction * episodes), self.min_recorded)
        return max(0, episodes - num_recorded)
