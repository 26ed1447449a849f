"""Trainings that several cells of a comparison are evaluated on, and the choice among them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from fulgurite.compare.plan import ComparisonPlan
from fulgurite.compare.records import UNREADABLE
from fulgurite.compare.trial import LAST_CHECKPOINT, Training, Trial, TrialResult
from fulgurite.compare.worker import Job
from fulgurite.masking import masked_arguments
from fulgurite.run_folders import write_json

__all__ = ["Trainings", "link_origins", "read_metrics"]

Step = Literal["training", "validation"]

Runner = Callable[[Sequence[Job], str, int], Iterator[TrialResult]]
"""Runs jobs and yields their results as they come.

Progress is shown under a title, with a number of jobs that were run before.
"""


class Trainings:
    """The trainings of a comparison, each run once and kept by the hash of what defines it.

    Args:
        folder: Where they are kept.
        plan: The comparison.
        run: Runs jobs.
    """

    def __init__(self, folder: Path, plan: ComparisonPlan, run: Runner) -> None:
        self.folder = folder
        self.plan = plan
        self.run = run
        self._failed: dict[str, str] = {}

    def choose(self, trials: Iterable[Trial]) -> dict[str, TrialResult]:
        """Train and validate what is missing, and choose a training for each trial.

        Args:
            trials: Trials to evaluate.

        Returns:
            Result of the chosen training, or why there is none, by the trial's id.
        """
        waiting: dict[str, Trial] = {}
        for trial in trials:
            while trial.id not in waiting:
                waiting[trial.id] = trial
                trial = trial.origin or trial
        chosen: dict[str, TrialResult] = {}
        while waiting:
            wave = [t for t in waiting.values() if t.origin is None or t.origin.id in chosen]
            trainings = {trial.id: self._linked(trial, chosen) for trial in wave}
            every = [
                (", ".join(filter(None, [self.plan.label(trial, trained=True), t.label])), t)
                for trial in wave
                for t in trainings[trial.id]
            ]
            self._complete("training", every)
            if self.plan.tune:
                self._complete("validation", [e for e in every if e[1].key not in self._failed])
            for trial in wave:
                del waiting[trial.id]
                chosen[trial.id] = self._choose(trial.id, trainings[trial.id])
                if trial.origin and not trainings[trial.id]:
                    chosen[trial.id] = chosen[trial.origin.id]  # with its error
        return chosen

    def evaluation_command(self, trained: TrialResult, run_dir: Path) -> list[str]:
        """The command line that evaluates a chosen training.

        Args:
            trained: Its result.
            run_dir: Run folder of the evaluation.
        """
        assert trained.training is not None
        checkpoint = _last_checkpoint(self.folder / trained.training.key)
        options = [*trained.training.test, "--run.dir", str(run_dir)]
        return [str(self.plan.after_fit), *options, "--ckpt_path", str(checkpoint)]

    def _linked(self, trial: Trial, chosen: Mapping[str, TrialResult]) -> Sequence[Training]:
        """The trainings of a trial, with what they start from."""
        after = self.plan.methods[trial.method].after
        if trial.origin is None or after is None:
            return trial.trainings
        start = chosen[trial.origin.id].training
        if start is None:
            return ()
        option = f"--{after.key}={self.folder / start.key / after.path}"
        return [training.starting_from(option, start.key) for training in trial.trainings]

    def _step(self, step: Step, training: Training) -> tuple[str, list[list[str]]]:
        """Name and command lines of a training or its validation."""
        checkpoint = ["--ckpt_path", str(_last_checkpoint(self.folder / training.key))]
        if step == "validation":
            command = ["validate", *training.validate, *checkpoint]
            return training.validation_key, [command]
        commands = [["fit", *training.fit]]
        if training.predict is not None:
            commands.append(["predict", *training.predict, *checkpoint])
        return training.key, commands

    def _metrics(self, name: str) -> dict[str, float] | None:
        return read_metrics(self.folder, name)

    def _complete(self, step: Step, trainings: Iterable[tuple[str, Training]]) -> None:
        """Run what has no record yet."""
        metric = self.plan.tune.metric if step == "validation" and self.plan.tune else None
        jobs: dict[str, Job] = {}
        for label, training in trainings:
            name, commands = self._step(step, training)
            if name in jobs or self._metrics(name) is not None or name in self._failed:
                continue
            run_dir = self.folder / name
            if run_dir.exists():  # what an interrupted or failed attempt left
                shutil.rmtree(run_dir)
            commands_here = [[*command, "--run.dir", str(run_dir)] for command in commands]
            log = self.folder / f"{name}.log"
            jobs[name] = Job(name, commands_here, run_dir, log=log, metric=metric, label=label)
        for result in self.run(list(jobs.values()), f"{step}s", 0):
            if result.error:
                self._failed[result.id] = f"the {step} failed: {result.error}"
                continue
            record: dict[str, Any] = {
                "commands": [masked_arguments(c) for c in jobs[result.id].commands],
                "metrics": result.metrics,
                "seconds": round(result.seconds, 3),
            }
            write_json(_record_path(self.folder, result.id), record)

    def _choose(self, name: str, trainings: Sequence[Training]) -> TrialResult:
        """The best of a trial's trainings, or why there is none."""
        for training in trainings:
            for key in (training.key, training.validation_key):
                if key in self._failed:
                    log = self.folder / f"{key}.log"
                    return TrialResult(name, error=self._failed[key], log=log)
        best = max(trainings, key=self._score, default=None)
        if best is None:
            return TrialResult(name)
        if self.plan.tune is not None and self._score(best) == -math.inf:
            error = (
                f"{self.plan.tune.metric} of the validation is not a number in any of the "
                f"{len(trainings)} trainings to choose from"
            )
            return TrialResult(name, error=error, log=self.folder / f"{best.validation_key}.log")
        return TrialResult(name, self._metrics(best.key) or {}, training=best)

    def _score(self, training: Training) -> float:
        return _score(training, self.plan, self.folder)


def read_metrics(folder: Path, name: str) -> dict[str, float] | None:
    """What the record of a training or validation says; None without a record.

    Args:
        folder: Where trainings are kept.
        name: Key of the training or of its validation.
    """
    try:
        record = json.loads(_record_path(folder, name).read_text(encoding="utf-8"))
        return {str(key): float(value) for key, value in record["metrics"].items()}
    except UNREADABLE:
        return None


def _record_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def link_origins(trial: Trial, plan: ComparisonPlan, folder: Path) -> list[Training]:
    """The trainings of a trial, after the one that they start from, or each that may be chosen.

    Args:
        trial: The trial.
        plan: The comparison.
        folder: Where trainings are kept.
    """
    after = plan.methods[trial.method].after
    if trial.origin is None or after is None:
        return [*trial.trainings]
    starts = link_origins(trial.origin, plan, folder)
    records = {key for start in starts for key in _record_keys(start, plan)}
    if all(read_metrics(folder, key) is not None for key in records):
        starts = [max(starts, key=lambda start: _score(start, plan, folder))]
    return [
        training.starting_from(f"--{after.key}={folder / start.key / after.path}", start.key)
        for start in starts
        for training in trial.trainings
    ]


def _record_keys(training: Training, plan: ComparisonPlan) -> list[str]:
    """Under what the training is recorded, and its validation where one decides."""
    return [training.key, training.validation_key] if plan.tune else [training.key]


def _score(training: Training, plan: ComparisonPlan, folder: Path) -> float:
    """How good the validation of a training was; what is higher is chosen."""
    if plan.tune is None:
        return 0.0
    metrics = read_metrics(folder, training.validation_key) or {}
    value = metrics.get(plan.tune.metric, math.nan)
    if math.isnan(value):
        return -math.inf
    return value if plan.tune.mode == "max" else -value


def _last_checkpoint(run_dir: Path) -> Path:
    """The last checkpoint of a run."""
    return run_dir / LAST_CHECKPOINT
