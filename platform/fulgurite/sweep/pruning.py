"""End runs that fall behind, by the rule of W&B's ``early_terminate``.

Source: L. Li et al., "Hyperband", JMLR 18 (2018), in the form of W&B's sweeps: a run that has
logged as many values as a band says must be among the best 1/eta of all runs that came as far.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import optuna
from optuna.study import StudyDirection

from fulgurite.sweep.space import EarlyTerminate

__all__ = ["ENDED", "STORAGE_VARIABLE", "BandPruner", "falls_behind"]

STORAGE_VARIABLE = "FULGURITE_SWEEP_STORAGE"
"""Environment variable with the address of the storage: it may hold a password, so that it must not
be in a configuration, which is recorded."""

ENDED = "ended_after"
"""Attribute of a trial that was ended: after how many values."""


def falls_behind(
    history: Sequence[float], others: Sequence[Sequence[float]], rule: EarlyTerminate
) -> bool:
    """Whether a run is to be ended.

    Args:
        history: Its logged values so far; less is better.
        others: The values of the other runs, ended ones included.
        rule: Bands, eta and strictness.

    >>> rule = EarlyTerminate(bands=(1, 2), eta=2, strict=True)
    >>> falls_behind([10.0, 10.0], [[10.0, 9.0], [10.0, 8.0], [10.0, 6.0]], rule)
    True
    >>> falls_behind([10.0, 8.0], [[10.0, 9.0], [10.0, 10.0], [10.0, 6.0]], rule)
    False
    """
    passed = [band for band in rule.bands if band <= len(history)]
    if not passed:
        return False
    band = passed[-1]
    at_band = sorted(values[band - 1] for values in [history, *others] if len(values) >= band)
    threshold = at_band[int(len(at_band) / rule.eta)]
    value = history[band - 1] if rule.strict else min(history)
    return value > threshold


class BandPruner(optuna.pruners.BasePruner):
    """The rule as a pruner of Optuna.

    Args:
        rule: Bands, eta and strictness.
    """

    def __init__(self, rule: EarlyTerminate) -> None:
        self.rule = rule

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        """Whether the trial is to be ended now."""
        sign = -1.0 if study.direction == StudyDirection.MAXIMIZE else 1.0

        def history(values: Mapping[int, float]) -> list[float]:
            return [sign * values[step] for step in sorted(values) if math.isfinite(values[step])]

        others = [
            history(other.intermediate_values)
            for other in study.get_trials(deepcopy=False)
            if other.number != trial.number
        ]
        return falls_behind(history(trial.intermediate_values), others, self.rule)
