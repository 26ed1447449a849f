"""The command ``fulgurite compare``."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from fulgurite.compare.driver import check_trials, find_folder, run, select_part
from fulgurite.compare.identity import RUNNER
from fulgurite.compare.plan import ComparisonPlan
from fulgurite.compare.plan_file import read_plan
from fulgurite.compare.trial import LAST_CHECKPOINT, Training, Trial

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of ``fulgurite compare``; 1 if a cell failed, 130 if interrupted."""
    parser = argparse.ArgumentParser(
        "fulgurite compare", description="Run what is missing of a grid, and render what is there."
    )
    parser.add_argument("file", help="comparison file: a path or a packaged name")
    parser.add_argument(
        "--workers", type=int, help="processes (default: one per GPU, or per core without any)"
    )
    parser.add_argument("--out", help="folder of records and tables (default: compare_results/…)")
    parser.add_argument("--quick", action="store_true", help="the small form that the file defines")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="ITEM",
        help="run and show a part: method ids, axis=label, seed=0",
    )
    parser.add_argument(
        "--retry-failed", "--retry_failed", action="store_true", help="run failed cells again"
    )
    parser.add_argument(
        "--dry-run",
        "--dry_run",
        action="store_true",
        help="check every option and print the commands that would run",
    )
    parser.add_argument("--runner", default=RUNNER, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.dry_run:
        plan = read_plan(options.file, quick=options.quick)
        part = select_part(plan, options.only or [])
        folder = find_folder(options.file, plan, out=options.out, quick=options.quick)
        trials = check_trials(plan, options.runner)
        selected = {*part.trial_ids}
        for command in _commands([t for t in trials if t.id in selected], plan, folder):
            print("fulgurite", shlex.join(command))
        return 0
    try:
        comparison = run(
            options.file,
            workers=options.workers,
            out=options.out,
            quick=options.quick,
            only=options.only,
            retry_failed=options.retry_failed,
            runner=options.runner,
        )
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on with the cells that are left.")
        return 130
    print(comparison.markdown())
    print(f"Tables and figure: {comparison.folder}")
    if options.only:
        print(f"Of the part that --only names; all: fulgurite report {comparison.folder}")
    return 1 if comparison.failed else 0


def _commands(trials: Sequence[Trial], plan: ComparisonPlan, folder: Path) -> list[list[str]]:
    """What the trials would run: trainings that they share once, then the evaluations."""
    if not plan.shares:
        run_dirs = ((trial, folder / "cells" / trial.id) for trial in trials)
        return [c for trial, run_dir in run_dirs for c in trial.commands(run_dir, plan.after_fit)]
    trainings: dict[str, list[list[str]]] = {}
    tests = []
    for trial in trials:
        for training in _link_origins(trial, plan, folder):
            run_dir = folder / "trainings" / training.key
            checkpoint = ["--ckpt_path", str(run_dir / LAST_CHECKPOINT)]
            training_dir = ["--run.dir", str(run_dir)]
            steps = trainings[training.key] = [["fit", *training.fit, *training_dir]]
            if training.predict is not None:
                steps.append(["predict", *training.predict, *checkpoint, *training_dir])
            if plan.tune:
                steps.append(["validate", *training.validate, *checkpoint, *training_dir])
            cell_dir = ["--run.dir", str(folder / "cells" / trial.id)]
            tests.append([str(plan.after_fit), *training.test, *cell_dir, *checkpoint])
    return [*(step for steps in trainings.values() for step in steps), *tests]


def _link_origins(trial: Trial, plan: ComparisonPlan, folder: Path) -> list[Training]:
    """The trainings of a trial after each one that they may start from."""
    after = plan.methods[trial.method].after
    if trial.origin is None or after is None:
        return [*trial.trainings]
    return [
        training.starting_from(
            f"--{after.key}={folder / 'trainings' / start.key / after.path}", start.key
        )
        for start in _link_origins(trial.origin, plan, folder)
        for training in trial.trainings
    ]
