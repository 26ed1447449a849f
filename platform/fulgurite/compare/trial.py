"""Trials of a comparison: what each cell of its table runs, and what became of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fulgurite.compare.hashing import digest

__all__ = [
    "LAST_CHECKPOINT",
    "Setting",
    "Training",
    "Trial",
    "TrialResult",
    "setting_label",
    "trial_id",
]

LAST_CHECKPOINT = "checkpoints/last.ckpt"
"""Where a run keeps its last checkpoint, relative to its folder."""

Setting = tuple[tuple[str, str], ...]
"""Pairs (axis, label), in the order of the axes."""


@dataclass(frozen=True)
class Training:
    """One training that a trial may be evaluated on.

    Args:
        label: What is tried, e.g. ``lr=0.1``; empty where nothing is.
        fit: Command-line options of ``fit``.
        validate: Command-line options of ``validate``.
        test: Command-line options of the evaluation.
        key: Hash of everything that defines the training.
        predict: Command-line options of the prediction that follows the training, if any does.
        validation: Hash of what defines its validation beside the training.
    """

    label: str
    fit: tuple[str, ...]
    validate: tuple[str, ...]
    test: tuple[str, ...]
    key: str
    predict: tuple[str, ...] | None = None
    validation: str = ""

    @property
    def validation_key(self) -> str:
        """Hash of everything that defines the training's validation."""
        return digest([self.key, self.validation])

    def starting_from(self, option: str, key: str) -> Training:
        """The same training after another.

        Args:
            option: Command-line option that names what is taken from that training.
            key: What defines that training.
        """
        fit, validate, test = ((*o, option) for o in (self.fit, self.validate, self.test))
        predict = None if self.predict is None else (*self.predict, option)
        combined_key = digest([self.key, key])
        return Training(self.label, fit, validate, test, combined_key, predict, self.validation)


@dataclass(frozen=True)
class Trial:
    """One cell of the table: a method in a setting with a seed.

    Args:
        method: Id of the method.
        setting: Pairs (axis, label), in the order of the axes.
        seed: The seed, given to every key of ``seed_keys``.
        trainings: The trainings that it may be evaluated on; several where the plan tunes.
        parts: Hashes of what defines the result: its ``configuration``, its ``data`` and the
            ``version`` of the code.
        origin: The trial whose training this one's starts from.
        devices: Number of accelerators that each of its commands takes; 0 for all that are there.
    """

    method: str
    setting: Setting
    seed: int
    trainings: tuple[Training, ...]
    parts: Mapping[str, str]
    origin: Trial | None = None
    devices: int = 1

    @property
    def digest(self) -> str:
        """Hash of everything that defines the result."""
        return digest(self.parts)

    @property
    def id(self) -> str:
        """Name of the trial in file names."""
        return trial_id(self.method, self.setting, self.seed)

    def commands(self, run_dir: Path, after_fit: str | None) -> list[list[str]]:
        """The command lines of a trial with a training of its own, in the order of their run."""
        options = self.trainings[0].fit
        run_dir_option = ["--run.dir", str(run_dir)]
        commands = [["fit", *options, *run_dir_option]]
        if after_fit:
            commands.append([after_fit, *options, *run_dir_option, "--ckpt_path", "last"])
        return commands


@dataclass(frozen=True)
class TrialResult:
    """What became of a trial, or of a training or validation that it needs: metrics, or an error.

    Args:
        id: Name of what was run.
        metrics: Its metrics.
        error: Why there are none; empty where there are.
        seconds: How long it took [s].
        training: The training that was chosen for the trial; None where it has one of its own.
        log: Output of the run that failed, where it is not the trial's own.
    """

    id: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    error: str = ""
    seconds: float = 0.0
    training: Training | None = None
    log: Path | None = None


def trial_id(method: str, setting: Setting, seed: int) -> str:
    """Name of a trial in file names.

    >>> trial_id("fedavg", (("noise", "30 %"),), 1)
    'fedavg__noise=30--__seed=1'
    """
    parts = [method, *(f"{axis}={label}" for axis, label in setting), f"seed={seed}"]
    return "__".join(re.sub(r"[^\w.=+-]", "-", part) for part in parts)


def setting_label(setting: Setting) -> str:
    """A setting as a column heading.

    >>> setting_label((("p", "0.3"), ("alpha", "2")))
    'p=0.3, alpha=2'
    """
    return ", ".join(f"{axis}={label}" for axis, label in setting)
