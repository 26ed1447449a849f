"""The callback that tells a sweep's study how a run goes."""

from __future__ import annotations

import os
from typing import Any

import optuna
from lightning.pytorch import Callback, LightningModule, Trainer

from fulgurite.errors import ConfigError
from fulgurite.sweep.pruning import ENDED, STORAGE_VARIABLE
from fulgurite.sweep.study import load_study

__all__ = ["TrialReporter"]


class TrialReporter(Callback):
    """Tell the study each value of the metric, and end the run when the study says so.

    ``fulgurite sweep`` adds it to the runs of a sweep with ``early_terminate``.

    Args:
        study: Name of the study, in the storage that FULGURITE_SWEEP_STORAGE names.
        number: Number of the trial.
        metric: The metric that is reported after each validation, or each epoch of training.
    """

    def __init__(self, study: str, number: int, metric: str) -> None:
        self.study, self.number, self.metric = study, number, metric
        self._trial: optuna.Trial | None = None
        self._reported = 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report a metric of the validation."""
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._report(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report a metric of the training, where no validation logs it."""
        if self.metric.startswith("train"):
            self._report(trainer)

    def _report(self, trainer: Trainer) -> None:
        ended = False
        if trainer.is_global_zero and self.metric in trainer.callback_metrics:
            value = float(trainer.callback_metrics[self.metric])
            trial = self._open_trial()
            self._reported += 1
            trial.report(value, self._reported)
            if trial.should_prune():
                trial.set_user_attr(ENDED, self._reported)
                ended = True
        # all ranks leave together
        if trainer.strategy.reduce_boolean_decision(ended, all=False):
            trainer.should_stop = True

    def _open_trial(self) -> optuna.Trial:
        if self._trial is None:
            storage = os.environ.get(STORAGE_VARIABLE)
            if not storage:
                raise ConfigError(
                    f"{type(self).__name__} belongs to a trial of a sweep.",
                    "Start it by `fulgurite sweep`, or leave this callback out.",
                )
            study = load_study(storage, self.study)
            trial_id = study._storage.get_trial_id_from_study_id_trial_number(
                study._study_id, self.number
            )
            self._trial = optuna.Trial(study, trial_id)
        return self._trial

    def state_dict(self) -> dict[str, Any]:
        """How many values were reported, so that a resumed run goes on counting."""
        return {"reported": self._reported}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._reported = state_dict["reported"]
