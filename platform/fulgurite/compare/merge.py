"""Takes over the records of one comparison that were made in several folders."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from fulgurite.compare.comparison import PLAN_FILE, Comparison
from fulgurite.compare.driver import check_trials, find_folder, select_part, select_trials
from fulgurite.compare.folder_lock import lock_folder
from fulgurite.compare.identity import RUNNER
from fulgurite.compare.plan import ComparisonPlan
from fulgurite.compare.plan_file import read_plan
from fulgurite.compare.records import Record, TrialRecords, outdated_name, read_record
from fulgurite.compare.report import render, writing
from fulgurite.compare.trainings import link_origins
from fulgurite.compare.trial import Trial
from fulgurite.errors import ConfigError
from fulgurite.io import atomic_write

__all__ = ["merge"]


def merge(
    file: str,
    folders: Sequence[str],
    *,
    out: str | None = None,
    quick: bool = False,
    only: list[str] | None = None,
    dry_run: bool = False,
    runner: str = RUNNER,
) -> Comparison | None:
    """Take over current records of a comparison from other folders, and render the tables.

    Records of what is no longer run go to ``outdated/``; the other folders stay as they are. The
    call may be killed at any moment and repeated.

    Args:
        file: Comparison file: a path or a packaged name.
        folders: Folders that ``fulgurite compare`` filled, such as by its shards.
        out: Folder of records and tables; the default is under ``compare_results/``.
        quick: Apply the overrides under ``quick`` of the file.
        only: Take over and show only the cells that match.
        dry_run: Only count what would be taken over.
        runner: ``module:function`` that runs a command line (another one in tests).

    Returns:
        The comparison; None for a dry run.

    Raises:
        ConfigError: A folder holds no comparison, is named twice or is in use, or two folders have
            different results of the same.
    """
    plan = read_plan(file, quick=quick)
    part = select_part(plan, only or [])
    folder = find_folder(file, plan, out=out, quick=quick)
    sources = _check_sources(folders, folder)
    trials = check_trials(plan, runner)
    selected = select_trials(trials, part)
    merging = _Merging(plan, TrialRecords(folder, plan.costs), trials)
    if dry_run:
        steps = [*merging.plan_steps(sources, selected)]
        merging.print_counts(would=True)
        return None
    with ExitStack() as stack:
        stack.enter_context(writing(folder))
        stack.enter_context(lock_folder(folder))
        for source in sources:
            if os.access(source, os.W_OK):  # else nothing can be running there from here
                stack.enter_context(lock_folder(source))
        merging.records.archive_outdated(trials)
        # all of it is looked at before anything is copied: a conflict changes nothing
        steps = [*merging.plan_steps(sources, selected)]
        Comparison(plan, folder, {}, {}).save_plan()
        for step in steps:
            step()
        merging.print_counts()
        comparison = Comparison.read(folder, part)
        render(comparison)
    return comparison


def _check_sources(names: Sequence[str], target: Path) -> list[Path]:
    """The folders that are merged.

    Raises:
        ConfigError: One holds no comparison, is named twice, or is the one that receives.
    """
    sources: list[Path] = []
    for name in names:
        source = Path(name).resolve()
        if not (source / PLAN_FILE).is_file():
            raise ConfigError(
                f"--merge names {name}, which holds no comparison ({PLAN_FILE} is not there).",
                "Name folders that `fulgurite compare` printed.",
            )
        if source == target:
            raise ConfigError(
                f"--merge names {name}, the folder that receives the records.",
                "Leave it out, or give another --out.",
            )
        if source in sources:
            raise ConfigError(f"--merge names {name} twice.", "Name each folder once.")
        sources.append(source)
    return sources


Step = Callable[[], None]
"""Copies one record with what it needs."""


@dataclass
class _Merging:
    """What is taken over, counted.

    Args:
        plan: The comparison.
        records: Its records, in the folder that receives.
        trials: All its trials.
    """

    plan: ComparisonPlan
    records: TrialRecords
    trials: Sequence[Trial]
    counts: Counter[str] = field(default_factory=Counter)
    results: dict[str, tuple[Path, str]] = field(default_factory=dict)
    """Where the result of each digest was first seen, and its metrics as text."""

    def plan_steps(self, sources: Sequence[Path], selected: Sequence[Trial]) -> Iterator[Step]:
        """Compare all folders, and yield what is to be copied.

        Raises:
            ConfigError: Two results of the same differ.
        """
        for trial in self.trials:
            self._read_result(self.records.result_path(trial.id), trial)
        own = self.records
        finished = {t.id for t in selected if self._is_current(own.result_path(t.id), t)}
        failed = {t.id for t in selected if self._is_current(own.failed_path(t.id), t)}
        failures: dict[str, tuple[TrialRecords, Trial]] = {}
        for source in sources:
            theirs = TrialRecords(source)
            for trial in selected:
                path = theirs.result_path(trial.id)
                if path.is_file() and self._read_result(path, trial):
                    if trial.id in finished:
                        self.counts["already there"] += 1
                        continue
                    finished.add(trial.id)
                    self.counts["taken over"] += 1
                    yield partial(self._take_result, theirs, trial)
                elif path.is_file():
                    yield from self._set_aside(path, trial)
                failure = theirs.failed_path(trial.id)
                if self._is_current(failure, trial):
                    failures.setdefault(trial.id, (theirs, trial))
                elif failure.is_file():
                    yield from self._set_aside(failure, trial)
            self._count_foreign(source)
        for name, (theirs, trial) in failures.items():
            if name not in finished and name not in failed:  # a result tells more than a failure
                self.counts["of failed cells taken over"] += 1
                yield partial(self._take_failure, theirs, trial)

    def _read_result(self, path: Path, trial: Trial) -> Record | None:
        """A result, if it is one of the trial as it is.

        Raises:
            ConfigError: Another result of the same has other metrics.
        """
        record = read_record(path) if path.is_file() else None
        if record is None or record["digest"] != trial.digest:
            return None
        metrics = json.dumps(record["metrics"], sort_keys=True)
        first, known = self.results.setdefault(trial.digest, (path, metrics))
        if known != metrics:
            differ = sorted(
                name
                for name, value in record["metrics"].items()
                if json.dumps(json.loads(known).get(name)) != json.dumps(value)
            ) or sorted(json.loads(known).keys() - record["metrics"].keys())
            raise ConfigError(
                f"{first} and {path} are results of the same cell, and differ in "
                f"{', '.join(differ)}.",
                "Delete the one that is wrong, or leave its folder out; nothing was taken over.",
            )
        return record

    def _is_current(self, path: Path, trial: Trial) -> bool:
        record = read_record(path) if path.is_file() else None
        return record is not None and record["digest"] == trial.digest

    def _set_aside(self, path: Path, trial: Trial) -> Iterator[Step]:
        record = read_record(path)
        if record is None:
            self.counts["damaged or something else, left where they are"] += 1
            return
        self.counts["of what is no longer run, set aside"] += 1
        target = self.records.folder / "outdated" / outdated_name(trial.id, record["digest"])
        if not target.exists():
            yield partial(_copy, path, target)

    def _count_foreign(self, source: Path) -> None:
        names = {trial.id for trial in self.trials}
        stems = (path.stem for path in (source / "results").glob("*.json"))
        self.counts["of cells that the comparison does not have, left where they are"] += len(
            {*stems} - names
        )

    def _take_result(self, source: TrialRecords, trial: Trial) -> None:
        """Copy a result; its record comes last, so that one that is there has all it needs."""
        folder = self.records.folder
        if self.plan.shares:
            for name in self._training_names(trial):
                self._take_training(source.folder / "trainings", name)
        for relative in (f"cells/{trial.id}", f"logs/{trial.id}.log"):
            _copy(source.folder / relative, folder / relative)
        _copy(source.result_path(trial.id), self.records.result_path(trial.id))
        failed = self.records.failed_path(trial.id)
        for old in (failed, failed.with_suffix(".log")):
            old.unlink(missing_ok=True)

    def _take_failure(self, source: TrialRecords, trial: Trial) -> None:
        record, copy = source.failed_path(trial.id), self.records.failed_path(trial.id)
        _copy(record.with_suffix(".log"), copy.with_suffix(".log"))
        _copy(record, copy)

    def _training_names(self, trial: Trial) -> Iterator[str]:
        """Names of the trainings that a trial may need, and of their validations."""
        step: Trial | None = trial
        while step is not None:
            for training in link_origins(step, self.plan, self.records.folder / "trainings"):
                yield training.key
                yield training.validation_key
            step = step.origin

    def _take_training(self, source: Path, name: str) -> None:
        """Copy a finished training or validation, unless there is one."""
        target = self.records.folder / "trainings"
        if not (source / f"{name}.json").is_file() or (target / f"{name}.json").exists():
            return
        for relative in (name, f"{name}.log", f"{name}.json"):
            _copy(source / relative, target / relative)

    def print_counts(self, *, would: bool = False) -> None:
        """Say what was taken over, or would be, and what was not."""
        self.counts.setdefault("taken over", 0)
        texts = (f"{count} {what}" for what, count in self.counts.items() if count)
        head = "Records that would be merged" if would else "Records merged"
        print(f"{head}: {', '.join(texts) or 'none'}.")


def _copy(source: Path, target: Path) -> None:
    """Copy a file or a folder whole or not at all; what is not there is left out."""
    if source.is_dir():
        if target.exists():  # what an interrupted merge or a run left
            shutil.rmtree(target)
        with atomic_write(target) as temporary:
            shutil.copytree(source, temporary, ignore_dangling_symlinks=True)
    elif source.is_file():
        with atomic_write(target) as temporary:
            shutil.copyfile(source, temporary)
