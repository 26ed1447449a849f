"""Trainings that several cells of a comparison are evaluated on, and the choice among them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fulgurite.compare.plan import Candidate, Cell, Plan
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
        checkpoint: The chosen training's last checkpoint.
        chosen: Label of the choice; empty where there was none.
        key: What defines the chosen training.
        error: Why there is no training.
        log: Output of the run that failed.
    """

    options: tuple[str, ...] = ()
    checkpoint: Path = Path()
    chosen: str = ""
    key: str = ""
    error: str = ""
    log: Path | None = None

    def command(self, subcommand: str, run_dir: Path) -> list[str]:
        """The command line of the evaluation."""
        place = ["--run.dir", str(run_dir), "--ckpt_path", str(self.checkpoint)]
        return [subcommand, *self.options, *place]


class Trainings:
    """The trainings of a comparison, each run once and kept by the hash of what defines it.

    Args:
        folder: Where they are kept.
        plan: The comparison.
        run: Runs jobs.
    """

    def __init__(self, folder: Path, plan: Plan, run: Runner) -> None:
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
        cells = list(cells)
        origins = {cell.origin.id: cell.origin for cell in cells if cell.origin}
        first = origins | {cell.id: cell for cell in cells if not cell.origin}
        found: dict[str, Evaluation] = {}
        for wave in (list(first.values()), [cell for cell in cells if cell.origin]):
            options = {cell.id: self._candidates(cell, found) for cell in wave}
            every = [
                (", ".join(filter(None, [self.plan.label(cell, trained=True), c.label])), c)
                for cell in wave
                for c in options[cell.id]
            ]
            self._complete("training", every)
            if self.plan.tune:
                self._complete("validation", [e for e in every if e[1].key not in self._failed])
            found |= {name: self._choose(candidates) for name, candidates in options.items()}
            for cell in wave:
                if cell.origin and not options[cell.id]:
                    found[cell.id] = found[cell.origin.id]  # with its error
        return found

    def _candidates(self, cell: Cell, found: dict[str, Evaluation]) -> Sequence[Candidate]:
        """The trainings of a cell, with the checkpoint that they start from."""
        after = self.plan.methods[cell.method].after
        if cell.origin is None or after is None:
            return cell.candidates
        start = found[cell.origin.id]
        if start.error:
            return ()
        option = f"--{after[1]}={start.checkpoint}"
        return [candidate.starting_from(option, start.key) for candidate in cell.candidates]

    def _step(self, what: Step, candidate: Candidate) -> tuple[str, list[str]]:
        """Name and command line of a training or its validation."""
        if what == "training":
            return candidate.key, ["fit", *candidate.fit]
        checkpoint = ["--ckpt_path", str(self._checkpoint(candidate))]
        return candidate.validation_key, ["validate", *candidate.validate, *checkpoint]

    def _checkpoint(self, candidate: Candidate) -> Path:
        return self.folder / candidate.key / "checkpoints" / "last.ckpt"

    def _record(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _complete(self, what: Step, candidates: Iterable[tuple[str, Candidate]]) -> None:
        """Run what has no record yet."""
        metric = self.plan.tune.metric if what == "validation" and self.plan.tune else None
        jobs: dict[str, Job] = {}
        for label, candidate in candidates:
            name, command = self._step(what, candidate)
            if name in jobs or self._record(name).is_file() or name in self._failed:
                continue
            place = self.folder / name
            if place.exists():  # what an interrupted or failed attempt left
                shutil.rmtree(place)
            commands = [[*command, "--run.dir", str(place)]]
            log = self.folder / f"{name}.log"
            jobs[name] = Job(name, commands, place, log, metric, label)
        for outcome in self.run(list(jobs.values()), f"{what}s"):
            if outcome.error:
                self._failed[outcome.id] = f"the {what} failed: {outcome.error}"
                continue
            record: dict[str, Any] = {
                "command": jobs[outcome.id].commands[0],
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
        return Evaluation(best.test, self._checkpoint(best), best.label, best.key)

    def _score(self, candidate: Candidate) -> float:
        if self.plan.tune is None:
            return 0.0
        record = json.loads(self._record(candidate.validation_key).read_text(encoding="utf-8"))
        value = float(record["metrics"][self.plan.tune.metric])
        if math.isnan(value):
            return -math.inf
        return value if self.plan.tune.mode == "max" else -value
