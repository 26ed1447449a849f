"""Options of baselines: lines along the track, regression on physics, and the fit of kriging."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fulgurite.options import NonNegativeFloat, NonNegativeInt, PositiveInt, check_options

__all__ = ["Drift", "KrigingFitOptions", "LineOptions", "RegressionOptions"]

Drift = Literal["auto", "linear", "log"]
"""What a regression on physics predicts: thickness, its logarithm, or the better one of both."""

_KEY = "model.init_args"


@dataclass(frozen=True)
class LineOptions:
    """How far lines along the track reach, in the baseline ``along``.

    Args:
        max_length: Longest gap that a line crosses [m]; null for any.
        reach: How far a line reaches into a longer gap [m].

    Raises:
        ConfigError: A length is negative.

    Source: docs/papers/ice_layers.md section 5 (``gaps_dist=[300 60]``).
    """

    max_length: NonNegativeFloat | None = 300.0
    reach: NonNegativeFloat = 60.0

    def __post_init__(self) -> None:
        check_options(self, f"{_KEY}.lines")


@dataclass(frozen=True)
class RegressionOptions:
    """The regression on physics, in the baselines ``ridge`` and ``kriging``.

    Args:
        kind: ``linear`` regresses thickness, ``log`` its logarithm; ``auto`` is linear for
            ``ridge``, and lets ``kriging`` choose on the validation flights, or on training
            segments where there are none.
        penalty: Penalty of ``ridge`` for each entry; ``kriging`` chooses that of its drift.

    Raises:
        ConfigError: ``kind`` is unknown, or ``penalty`` is negative.
    """

    kind: Drift = "auto"
    penalty: NonNegativeFloat = 1e-3

    def __post_init__(self) -> None:
        check_options(self, f"{_KEY}.regression")


@dataclass(frozen=True)
class KrigingFitOptions:
    """The fit of kriging's covariance.

    Args:
        stacks: Training stacks that it is fitted on.
        entries: Entries of each of them, about: half in a window, half spread evenly.
        iterations: Iterations of L-BFGS the first time; half as many the second time.
        seed: Seed of the choice of stacks and windows.

    Raises:
        ConfigError: A number is out of range.
    """

    stacks: PositiveInt = 40
    entries: PositiveInt = 240
    iterations: PositiveInt = 40
    seed: NonNegativeInt = 0

    def __post_init__(self) -> None:
        check_options(self, f"{_KEY}.fit")
