"""The command ``fulgurite compare``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from fulgurite.clusters.engines import Engine, add_engine_options
from fulgurite.compare.comparison import Comparison
from fulgurite.compare.driver import (
    check_trials,
    find_folder,
    run,
    select_part,
    select_trials,
    select_unfinished,
)
from fulgurite.compare.identity import RUNNER
from fulgurite.compare.merge import merge
from fulgurite.compare.plan import ComparisonPlan
from fulgurite.compare.plan_file import read_plan
from fulgurite.compare.shards import parse_shard
from fulgurite.compare.trainings import link_origins, read_metrics
from fulgurite.compare.trial import LAST_CHECKPOINT, Trial
from fulgurite.errors import ConfigError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of ``fulgurite compare``; 1 if a cell failed, 130 if interrupted."""
    parser = argparse.ArgumentParser(
        "fulgurite compare", description="Run what is missing of a grid, and render what is there."
    )
    parser.add_argument("file", help="comparison file: a path or a packaged name")
    add_engine_options(parser, "one per GPU, or per core without any")
    parser.add_argument("--out", help="folder of records and tables (default: compare_results/…)")
    parser.add_argument("--quick", action="store_true", help="the small form that the file defines")
    parser.add_argument(
        "--only",
        nargs="+",
        action="extend",
        metavar="ITEM",
        help="run and show a part: method ids, axis=label, seed=0",
    )
    parser.add_argument(
        "--shard",
        metavar="K/N",
        help="run one of N parts; processes anywhere that see the folder run the others",
    )
    parser.add_argument(
        "--merge",
        nargs="+",
        action="extend",
        metavar="FOLDER",
        help="run nothing, and take over what is current from folders of the same comparison",
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
    engine = Engine(options.engine, options.workers, options.address)
    if options.merge:
        comparison = _merge(options)
        if comparison is None:
            return 0
    elif options.dry_run:
        _print_commands(options)
        return 0
    else:
        try:
            comparison = run(
                options.file,
                engine=engine,
                out=options.out,
                quick=options.quick,
                only=options.only,
                shard=None if options.shard is None else parse_shard(options.shard),
                retry_failed=options.retry_failed,
                runner=options.runner,
            )
        except KeyboardInterrupt:
            print("\nInterrupted. The same command goes on with the cells that are left.")
            return 130
    print(comparison.markdown())
    print(f"Tables and figure: {comparison.folder}")
    if options.only:
        folder = shlex.quote(str(comparison.folder))
        print(f"Of the part that --only names; all: fulgurite report {folder}")
    return 1 if comparison.failed else 0


def _merge(options: argparse.Namespace) -> Comparison | None:
    """Take over what other folders have; None for a dry run.

    Raises:
        ConfigError: An option says how cells are run, or a folder cannot be merged.
    """
    running = {
        "--shard": options.shard is not None,
        "--workers": options.workers is not None,
        "--engine": options.engine != "pool",
        "--retry-failed": options.retry_failed,
    }
    for option, present in running.items():
        if present:
            raise ConfigError(
                f"{option} says how cells are run, and --merge runs none.",
                f"Leave {option} out, and run what is missing by a second command without --merge.",
            )
    return merge(
        options.file,
        options.merge,
        out=options.out,
        quick=options.quick,
        only=options.only,
        dry_run=options.dry_run,
        runner=options.runner,
    )


def _print_commands(options: argparse.Namespace) -> None:
    """Check every option, and print the commands that would run."""
    plan = read_plan(options.file, quick=options.quick)
    part = select_part(plan, options.only or [])
    shard = None if options.shard is None else parse_shard(options.shard)
    folder = find_folder(options.file, plan, out=options.out, quick=options.quick)
    every = check_trials(plan, options.runner)
    trials = select_trials(every, part, shard)
    to_run = select_unfinished(every, trials, folder, options.retry_failed)
    for command in _commands(to_run, plan, folder):
        print("fulgurite", shlex.join(command))
    if len(to_run) < len(trials):
        skipped = f"{len(trials) - len(to_run)} of {len(trials)} cells"
        note = f"note: {skipped} have a result, failed, or equal another cell, and would not run."
        print(note, file=sys.stderr)


def _commands(trials: Sequence[Trial], plan: ComparisonPlan, folder: Path) -> list[list[str]]:
    """What the trials would run: trainings that they share once, then the evaluations."""
    if not plan.shares:
        run_dirs = ((trial, folder / "cells" / trial.id) for trial in trials)
        return [c for trial, run_dir in run_dirs for c in trial.commands(run_dir, plan.after_fit)]
    trainings: dict[str, list[list[str]]] = {}
    tests = []
    root = folder / "trainings"
    for trial in trials:
        for training in link_origins(trial, plan, root):
            run_dir = root / training.key
            checkpoint = ["--ckpt_path", str(run_dir / LAST_CHECKPOINT)]
            training_dir = ["--run.dir", str(run_dir)]
            steps = trainings[training.key] = []
            if read_metrics(root, training.key) is None:
                steps.append(["fit", *training.fit, *training_dir])
                if training.predict is not None:
                    steps.append(["predict", *training.predict, *checkpoint, *training_dir])
            if plan.tune and read_metrics(root, training.validation_key) is None:
                steps.append(["validate", *training.validate, *checkpoint, *training_dir])
            cell_dir = ["--run.dir", str(folder / "cells" / trial.id)]
            tests.append([str(plan.after_fit), *training.test, *cell_dir, *checkpoint])
    return [*(step for steps in trainings.values() for step in steps), *tests]
