"""``fulgurite compare``: run what is missing of a grid, and render what is there."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from fulgurite import __version__
from fulgurite.compare.comparison import Comparison
from fulgurite.compare.plan import Cell, Plan, find_config, read_plan
from fulgurite.compare.pool import run_jobs
from fulgurite.compare.report import render
from fulgurite.compare.trainings import Evaluation, Trainings
from fulgurite.compare.worker import Job, Outcome
from fulgurite.errors import ConfigError
from fulgurite.runs import write_json

__all__ = ["main", "run"]

_RUNNER = "fulgurite.cli:main"


def run(
    file: str,
    *,
    workers: int | None = None,
    out: str | None = None,
    quick: bool = False,
    only: list[str] | None = None,
    retry_failed: bool = False,
    runner: str = _RUNNER,
) -> Comparison:
    """Run the cells of a comparison that are not finished, and render the tables.

    A finished cell is never run twice unless its definition changed (its old record then moves to
    ``outdated/``); a failed one only with ``retry_failed``. The call may be killed at any moment
    and repeated.

    Args:
        file: Comparison file: a path or a packaged name.
        workers: Processes; the default is one per core.
        out: Folder of records and tables; the default is under ``compare_results/``.
        quick: Apply the overrides under ``quick`` of the file.
        only: Run only the cells that match: method ids, ``axis=label``, ``seed=0``. Items of the
            same kind are alternatives; items of different kinds must all hold.
        retry_failed: Run failed cells again.
        runner: ``module:function`` that runs a command line (another one in tests).

    Raises:
        ConfigError: The file is wrong, or another process works in the same folder.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers is {workers}.", "Give 1 or more.")
    plan = read_plan(file, quick=quick)
    cells = plan.cells()
    chosen = _chosen(cells, plan, only or [])
    folder = Path(out) if out else Path("compare_results") / _default_name(file, quick)
    folder = folder.resolve()
    with _alone_in(folder):
        Comparison(plan, folder, {}, {}).save_plan()
        _put_aside_outdated(folder, cells)
        todo = [cell for cell in chosen if _is_open(folder, cell, retry_failed)]
        crew = workers or len(os.sched_getaffinity(0) if sys.platform == "linux" else [0, 0])

        def work(jobs: Sequence[Job], title: str, done: int = 0) -> Iterator[Outcome]:
            with closing(run_jobs(jobs, workers=crew, runner=runner)) as outcomes:
                yield from _with_progress(outcomes, jobs, title, done)

        try:
            by_id = {cell.id: cell for cell in todo}
            evaluations: dict[str, Evaluation] = {}
            if plan.shares and todo:
                evaluations = Trainings(folder / "trainings", plan, work).evaluations(todo)
            jobs = []
            for cell in todo:
                found = evaluations.get(cell.id)
                if found and found.error:
                    _record(folder, plan, cell, [], Outcome(cell.id, error=found.error), found)
                else:
                    jobs.append(_job(folder, plan, cell, found))
            commands = {job.id: job.commands for job in jobs}
            for outcome in work(jobs, plan.title, len(chosen) - len(todo)):
                cell, found = by_id[outcome.id], evaluations.get(outcome.id)
                _record(folder, plan, cell, commands[cell.id], outcome, found)
        finally:
            comparison = Comparison.read(folder, plan)
            if comparison.results:
                render(comparison)
    return comparison


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of ``fulgurite compare``; 1 if a cell failed, 130 if interrupted."""
    parser = argparse.ArgumentParser(
        "fulgurite compare", description="Run what is missing of a grid, and render what is there."
    )
    parser.add_argument("file", help="comparison file: a path or a packaged name")
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    parser.add_argument("--out", help="folder of records and tables (default: compare_results/…)")
    parser.add_argument("--quick", action="store_true", help="the small form that the file defines")
    parser.add_argument("--only", nargs="+", metavar="ITEM", help="method ids, axis=label, seed=0")
    parser.add_argument(
        "--retry-failed", "--retry_failed", action="store_true", help="run failed cells again"
    )
    parser.add_argument(
        "--dry-run", "--dry_run", action="store_true", help="print the commands only"
    )
    parser.add_argument("--runner", default=_RUNNER, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.dry_run:
        plan = read_plan(given.file, quick=given.quick)
        cells = _chosen(plan.cells(), plan, given.only or [])
        fits = (candidate.fit for cell in cells for candidate in cell.candidates)
        for options in dict.fromkeys(fits):
            print("fulgurite fit", *options)
        return 0
    try:
        comparison = run(
            given.file,
            workers=given.workers,
            out=given.out,
            quick=given.quick,
            only=given.only,
            retry_failed=given.retry_failed,
            runner=given.runner,
        )
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on with the cells that are left.")
        return 130
    print(comparison.markdown())
    print(f"Tables and figure: {comparison.folder}")
    failed = [cell for cell in comparison.plan.cells() if cell.id in comparison.failures]
    return 1 if failed else 0


def _default_name(file: str, quick: bool) -> str:
    path = find_config(file)
    name = path.parent.name if path.stem == "compare" else f"{path.parent.name}-{path.stem}"
    return f"{name}-quick" if quick else name


def _chosen(cells: Sequence[Cell], plan: Plan, only: Sequence[str]) -> list[Cell]:
    wanted: dict[str, set[str]] = {}
    for item in only:
        kind, _, label = item.rpartition("=")
        wanted.setdefault(kind or "method", set()).add(label)
    known = {
        "method": set(plan.rows),
        "seed": {str(seed) for seed in plan.seeds},
        **{axis: set(labels) for axis, labels in plan.axes.items()},
    }
    for kind, labels in wanted.items():
        for label in sorted(labels - known.get(kind, set())):
            raise ConfigError(
                f"--only names {kind}={label}, which is not in the comparison.",
                f"Known are {', '.join(f'{k}: {sorted(v)}' for k, v in known.items())}.",
            )
    return [
        cell
        for cell in cells
        if all(
            {"method": cell.method, "seed": str(cell.seed), **dict(cell.setting)}[kind] in labels
            for kind, labels in wanted.items()
        )
    ]


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system drops when the process ends in any way."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        with suppress(ImportError):
            import fcntl

            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ConfigError(
                    f"Another comparison is running in {folder}.",
                    "Wait for it, or give another --out.",
                ) from error
        yield


def _put_aside_outdated(folder: Path, cells: Sequence[Cell]) -> None:
    for cell in cells:
        for kind in ("results", "failed"):
            path = folder / kind / f"{cell.id}.json"
            if not path.is_file():
                continue
            digest = json.loads(path.read_text(encoding="utf-8"))["digest"]
            if digest != cell.digest:
                (folder / "outdated").mkdir(exist_ok=True)
                path.replace(folder / "outdated" / f"{cell.id}.{digest}.json")


def _is_open(folder: Path, cell: Cell, retry_failed: bool) -> bool:
    if (folder / "results" / f"{cell.id}.json").is_file():
        return False
    return retry_failed or not (folder / "failed" / f"{cell.id}.json").is_file()


def _job(folder: Path, plan: Plan, cell: Cell, evaluation: Evaluation | None) -> Job:
    run_dir = folder / "cells" / cell.id
    if run_dir.exists():  # what an interrupted or failed attempt left
        shutil.rmtree(run_dir)
    if evaluation is None:
        commands = cell.commands(run_dir, plan.after_fit)
    else:
        commands = [evaluation.command(str(plan.after_fit), run_dir)]
    log = folder / "logs" / f"{cell.id}.log"
    return Job(cell.id, commands, run_dir, log, plan.metric, plan.label(cell))


def _record(
    folder: Path,
    plan: Plan,
    cell: Cell,
    commands: list[list[str]],
    outcome: Outcome,
    evaluation: Evaluation | None,
) -> None:
    record: dict[str, Any] = {
        "id": cell.id,
        "method": cell.method,
        "setting": dict(cell.setting),
        "seed": cell.seed,
        "digest": cell.digest,
        "commands": commands,
        "metrics": outcome.metrics,
        "seconds": round(outcome.seconds, 3),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "version": __version__,
    }
    if evaluation and evaluation.chosen:
        record["chosen"] = evaluation.chosen
    failed = folder / "failed" / f"{cell.id}.json"
    if outcome.error:
        write_json(failed, {**record, "error": outcome.error})
        with suppress(FileNotFoundError):
            if evaluation and evaluation.log:  # of a training: other cells show it as well
                shutil.copyfile(evaluation.log, failed.with_suffix(".log"))
            else:
                (folder / "logs" / f"{cell.id}.log").replace(failed.with_suffix(".log"))
        return
    write_json(folder / "results" / f"{cell.id}.json", record)
    for old in (failed, failed.with_suffix(".log")):
        old.unlink(missing_ok=True)


def _with_progress(
    outcomes: Iterator[Outcome], jobs: Sequence[Job], title: str, done: int
) -> Iterator[Outcome]:
    """Pass outcomes on, with a bar on a terminal and plain lines elsewhere."""
    from rich.console import Console

    console, start = Console(), time.monotonic()
    by_id, total = {job.id: job for job in jobs}, len(jobs)
    if done:
        console.print(f"{done} of {done + total} cells were run before.", highlight=False)

    def line(outcome: Outcome) -> str:
        job, result = by_id[outcome.id], "done"
        if job.metric:
            result = f"{job.metric} {outcome.metrics.get(job.metric, float('nan')):.4g}"
        return f"{job.label}: {outcome.error or result} ({outcome.seconds:.0f} s)"

    if not console.is_terminal:
        for count, outcome in enumerate(outcomes, 1):
            left = (time.monotonic() - start) / count * (total - count)
            yield outcome  # recorded before it is told: an interrupt in between loses nothing
            print(f"[{count}/{total}] {line(outcome)}, {_clock(left)} left", flush=True)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    # A wide window: with two cells at a time, the speed of the last few says little.
    with Progress(*columns, console=console, speed_estimate_period=1e9) as progress:
        task = progress.add_task(title, total=total)
        for outcome in outcomes:
            yield outcome
            progress.console.print(line(outcome), highlight=False, markup=False)
            progress.advance(task)


def _clock(seconds: float) -> str:
    """Minutes and seconds.

    >>> _clock(75), _clock(3675)
    ('1:15', '1:01:15')
    """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
