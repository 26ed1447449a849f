"""Trainings that several cells of a comparison are evaluated on, and the choice among them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fulgurite.compare.plan import LAST_CHECKPOINT, Candidate, Cell, ComparisonPlan
from fulgurite.compare.worker import Job, Outcome
from fulgurite.runs import write_json

__all__ = ["Evaluation", "Trainings"]

Step = Literal["training", "validation"]

Runner = Callable[[Sequence[Job], str], Iterator[Outcome]]
"""Runs jobs and yields their outcomes as they come, with progress shown under a title."""


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate for a cell, or why that is impossible.

    Args:
        options: Command-line options, without the run folder.
        folder: Run folder of the chosen training.
        candidate: Label of the choice; empty where there was none.
        key: What defines the chosen training.
        metrics: Metrics of the chosen training.
        error: Why there is no training.
        log: Output of the run that failed.
    """

    options: tuple[str, ...] = ()
    folder: Path = Path()
    candidate: str = ""
    key: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    error: str = ""
    log: Path | None = None

    def command(self, subcommand: str, run_dir: Path) -> list[str]:
        """The command line of the evaluation."""
        run_options = ["--run.dir", str(run_dir), "--ckpt_path", str(_last(self.folder))]
        return [subcommand, *self.options, *run_options]


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

    def evaluations(self, cells: Iterable[Cell]) -> dict[str, Evaluation]:
        """Train and validate what is missing, and choose for each cell.

        Args:
            cells: Cells to evaluate.

        Returns:
            What to evaluate, by the cell's id.
        """
        waiting: dict[str, Cell] = {}
        for cell in cells:
            while cell.id not in waiting:
                waiting[cell.id] = cell
                cell = cell.origin or cell
        evaluated: dict[str, Evaluation] = {}
        while waiting:
            wave = [c for c in waiting.values() if c.origin is None or c.origin.id in evaluated]
            options = {cell.id: self._candidates(cell, evaluated) for cell in wave}
            every = [
                (", ".join(filter(None, [self.plan.label(cell, trained=True), c.label])), c)
                for cell in wave
                for c in options[cell.id]
            ]
            self._complete("training", every)
            if self.plan.tune:
                self._complete("validation", [e for e in every if e[1].key not in self._failed])
            evaluated |= {name: self._choose(candidates) for name, candidates in options.items()}
            for cell in wave:
                del waiting[cell.id]
                if cell.origin and not options[cell.id]:
                    evaluated[cell.id] = evaluated[cell.origin.id]  # with its error
        return evaluated

    def _candidates(self, cell: Cell, evaluated: dict[str, Evaluation]) -> Sequence[Candidate]:
        """The trainings of a cell, with what they start from."""
        after = self.plan.methods[cell.method].after
        if cell.origin is None or after is None:
            return cell.candidates
        start = evaluated[cell.origin.id]
        if start.error:
            return ()
        option = f"--{after.key}={start.folder / after.path}"
        return [candidate.starting_from(option, start.key) for candidate in cell.candidates]

    def _step(self, step: Step, candidate: Candidate) -> tuple[str, list[list[str]]]:
        """Name and command lines of a training or its validation."""
        checkpoint = ["--ckpt_path", str(_last(self.folder / candidate.key))]
        if step == "validation":
            command = ["validate", *candidate.validate, *checkpoint]
            return candidate.validation_key, [command]
        commands = [["fit", *candidate.fit]]
        if candidate.predict is not None:
            commands.append(["predict", *candidate.predict, *checkpoint])
        return candidate.key, commands

    def _record(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _metrics(self, name: str) -> dict[str, float] | None:
        """What the record of a training or validation says; None without a record."""
        try:
            record = json.loads(self._record(name).read_text(encoding="utf-8"))
            return {str(key): float(value) for key, value in record["metrics"].items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return None

    def _complete(self, step: Step, candidates: Iterable[tuple[str, Candidate]]) -> None:
        """Run what has no record yet."""
        metric = self.plan.tune.metric if step == "validation" and self.plan.tune else None
        jobs: dict[str, Job] = {}
        for label, candidate in candidates:
            name, commands = self._step(step, candidate)
            if name in jobs or self._metrics(name) is not None or name in self._failed:
                continue
            run_dir = self.folder / name
            if run_dir.exists():  # what an interrupted or failed attempt left
                shutil.rmtree(run_dir)
            commands_here = [[*command, "--run.dir", str(run_dir)] for command in commands]
            log = self.folder / f"{name}.log"
            jobs[name] = Job(name, commands_here, run_dir, log, metric, label)
        for outcome in self.run(list(jobs.values()), f"{step}s"):
            if outcome.error:
                self._failed[outcome.id] = f"the {step} failed: {outcome.error}"
                continue
            record: dict[str, Any] = {
                "commands": jobs[outcome.id].commands,
                "metrics": outcome.metrics,
                "seconds": round(outcome.seconds, 3),
            }
            write_json(self._record(outcome.id), record)

    def _choose(self, candidates: Sequence[Candidate]) -> Evaluation:
        for candidate in candidates:
            for name in (candidate.key, candidate.validation_key):
                if name in self._failed:
                    return Evaluation(error=self._failed[name], log=self.folder / f"{name}.log")
        best = max(candidates, key=self._score, default=None)
        if best is None:
            return Evaluation()
        metrics = self._metrics(best.key) or {}
        return Evaluation(best.test, self.folder / best.key, best.label, best.key, metrics)

    def _score(self, candidate: Candidate) -> float:
        if self.plan.tune is None:
            return 0.0
        metrics = self._metrics(candidate.validation_key) or {}
        value = metrics.get(self.plan.tune.metric, math.nan)
        if math.isnan(value):
            return -math.inf
        return value if self.plan.tune.mode == "max" else -value


def _last(run_dir: Path) -> Path:
    """The last checkpoint of a run."""
    return run_dir / LAST_CHECKPOINT
