"""``fulgurite compare``: run what is missing of a grid, and render what is there."""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shlex
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from fulgurite import __version__
from fulgurite.compare.comparison import PLAN_FILE, Comparison, read_record
from fulgurite.compare.devices import device_groups, visible_devices
from fulgurite.compare.identity import RUNNER, Resolver
from fulgurite.compare.plan import (
    LAST_CHECKPOINT,
    Candidate,
    Cell,
    ComparisonPlan,
    find_config,
    read_plan,
)
from fulgurite.compare.pool import run_jobs
from fulgurite.compare.report import render, writing
from fulgurite.compare.trainings import Evaluation, Trainings
from fulgurite.compare.watch import ConfigWatch
from fulgurite.compare.worker import Job, Outcome
from fulgurite.errors import ConfigError
from fulgurite.runs import write_json
from fulgurite.systems import system_of_config

__all__ = ["main", "run"]


def run(
    file: str,
    *,
    workers: int | None = None,
    out: str | None = None,
    quick: bool = False,
    only: list[str] | None = None,
    retry_failed: bool = False,
    runner: str = RUNNER,
) -> Comparison:
    """Run the cells of a comparison that are not finished, and render the tables.

    A finished cell is never run twice unless what it runs changed: its resolved configuration, the
    version of the code, or the data. Its old record then moves to ``outdated/``, and comes back
    when the change is undone. A failed cell is run again only with ``retry_failed``. The call may
    be killed at any moment and repeated.

    Args:
        file: Comparison file: a path or a packaged name.
        workers: Processes; the default is one per GPU, or per core where there is none.
        out: Folder of records and tables; the default is under ``compare_results/``.
        quick: Apply the overrides under ``quick`` of the file.
        only: Run and show only the cells that match: method ids, ``axis=label``, ``seed=0``. Items
            of the same kind are alternatives; items of different kinds must all hold.
        retry_failed: Run failed cells again.
        runner: ``module:function`` that runs a command line (another one in tests).

    Raises:
        ConfigError: The file or an option in it is wrong, another process works in the same
            folder, the folder cannot be written, or a configuration changes what the cells run
            while they run.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers is {workers}.", "Give 1 or more.")
    plan = read_plan(file, quick=quick)
    part = _select_part(plan, only or [])
    folder = _folder(file, plan, out, quick)
    cells = _define_cells(plan, runner)
    selected = {*part.cell_ids}
    groups = device_groups(visible_devices(_gpu_count()), _devices_each(cells))
    worker_count = (
        workers
        or len(groups)
        or len(os.sched_getaffinity(0) if sys.platform == "linux" else [0, 0])
    )
    with writing(folder), _lock_folder(folder):
        Comparison(plan, folder, {}, {}).save_plan()
        _archive_outdated(folder, cells)
        todo = [c for c in cells if c.id in selected and _is_open(folder, c, retry_failed)]
        every = _by_digest(cells)  # cells that run the same have the same result
        todo = [c for c in todo if not _take_equal_result(folder, c, every[c.digest])]
        equals = _by_digest(todo)
        to_run = [same[0] for same in equals.values()]

        watch = ConfigWatch(plan, cells, runner)

        def work(jobs: Sequence[Job], title: str, done: int = 0) -> Iterator[Outcome]:
            running = run_jobs(jobs, workers=worker_count, runner=runner, visible=groups)
            with closing(running) as outcomes:
                for outcome in _with_progress(outcomes, jobs, title, done):
                    watch.check()
                    yield outcome

        try:
            by_id = {cell.id: cell for cell in to_run}
            evaluations: dict[str, Evaluation] = {}
            if plan.shares and to_run:
                evaluations = Trainings(folder / "trainings", plan, work).evaluations(to_run)
            jobs = []
            for cell in to_run:
                evaluation = evaluations.get(cell.id)
                if evaluation and evaluation.error:
                    failed = Outcome(cell.id, error=evaluation.error)
                    for same in equals[cell.digest]:
                        _record(folder, plan, same, [], failed, evaluation)
                else:
                    jobs.append(_job(folder, plan, cell, evaluation))
            commands = {job.id: job.commands for job in jobs}
            for outcome in work(jobs, plan.title, len(selected) - len(todo)):
                cell, evaluation = by_id[outcome.id], evaluations.get(outcome.id)
                for same in reversed(equals[cell.digest]):  # its own log is moved last
                    _record(folder, plan, same, commands[cell.id], outcome, evaluation)
        finally:
            comparison = Comparison.read(folder, part)
            if comparison.results or (folder / "table.md").exists():  # which may be out of date
                render(comparison)
    return comparison


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
        part = _select_part(plan, options.only or [])
        folder = _folder(options.file, plan, options.out, options.quick)
        cells = _define_cells(plan, options.runner)
        selected = {*part.cell_ids}
        for command in _commands([cell for cell in cells if cell.id in selected], plan, folder):
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


def _folder(file: str, plan: ComparisonPlan, out: str | None, quick: bool) -> Path:
    """Where records and tables lie.

    Raises:
        ConfigError: The default folder is that of another comparison file.
    """
    if out:
        return Path(out).resolve()
    path = find_config(file).resolve()
    system = system_of_config(path) or path.parent.name
    name = system if path.stem == "compare" else f"{system}-{path.stem}"
    folder = (Path("compare_results") / (f"{name}-quick" if quick else name)).resolve()
    saved = folder / PLAN_FILE
    if saved.is_file():
        source = plan.source
        with suppress(ConfigError):  # a damaged one is written again
            source = read_plan(saved).source
        # an earlier version wrote no source, and is read as if it were one itself
        if source not in (plan.source, str(saved)) and Path(source).is_file():
            raise ConfigError(
                f"{folder} holds the comparison of another file, {source}.",
                "Give this one a folder of its own: --out=FOLDER.",
            )
    return folder


def _define_cells(plan: ComparisonPlan, runner: str) -> list[Cell]:
    """The cells by what they run, which takes some tenths of a second for each command."""
    from rich.console import Console

    with Console(stderr=True).status("Checking every option …"):
        return plan.cells(Resolver(runner))


def _gpu_count() -> int:
    """GPUs that torch sees, where the runner has loaded it; asking starts nothing on them."""
    torch = sys.modules.get("torch")
    return torch.cuda.device_count() if torch else 0


def _devices_each(cells: Sequence[Cell]) -> int:
    """How many accelerators a worker needs for any of the cells; 0 for all."""
    needs = [cell.devices for cell in cells]
    return max(needs) if all(needs) else 0


def _commands(cells: Sequence[Cell], plan: ComparisonPlan, folder: Path) -> list[list[str]]:
    """What the cells would run: trainings that they share once, then the evaluations."""
    if not plan.shares:
        run_dirs = ((cell, folder / "cells" / cell.id) for cell in cells)
        return [c for cell, run_dir in run_dirs for c in cell.commands(run_dir, plan.after_fit)]
    trainings: dict[str, list[list[str]]] = {}
    tests = []
    for cell in cells:
        for candidate in _link_origins(cell, plan, folder):
            run_dir = folder / "trainings" / candidate.key
            checkpoint = ["--ckpt_path", str(run_dir / LAST_CHECKPOINT)]
            training_dir = ["--run.dir", str(run_dir)]
            steps = trainings[candidate.key] = [["fit", *candidate.fit, *training_dir]]
            if candidate.predict is not None:
                steps.append(["predict", *candidate.predict, *checkpoint, *training_dir])
            if plan.tune:
                steps.append(["validate", *candidate.validate, *checkpoint, *training_dir])
            cell_dir = ["--run.dir", str(folder / "cells" / cell.id)]
            tests.append([str(plan.after_fit), *candidate.test, *cell_dir, *checkpoint])
    return [*(step for steps in trainings.values() for step in steps), *tests]


def _link_origins(cell: Cell, plan: ComparisonPlan, folder: Path) -> list[Candidate]:
    """The candidates of a cell after each training that they may start from."""
    after = plan.methods[cell.method].after
    if cell.origin is None or after is None:
        return [*cell.candidates]
    return [
        candidate.starting_from(
            f"--{after.key}={folder / 'trainings' / start.key / after.path}", start.key
        )
        for start in _link_origins(cell.origin, plan, folder)
        for candidate in cell.candidates
    ]


def _select_part(plan: ComparisonPlan, only: Sequence[str]) -> ComparisonPlan:
    """The part of a comparison that ``--only`` names; all of it without."""
    if not only:
        return plan
    selected: dict[str, set[str]] = {}
    for item in only:
        kind, _, label = item.rpartition("=")
        selected.setdefault(kind or "method", set()).add(label)
    labels_by_kind = {
        "method": [*plan.rows],
        "seed": [str(seed) for seed in plan.seeds],
        **{axis: [*labels] for axis, labels in plan.axes.items()},
    }
    for kind, labels in selected.items():
        for label in sorted(labels - {*labels_by_kind.get(kind, [])}):
            raise ConfigError(
                f"--only names {kind}={label}, which is not in the comparison.",
                f"Known are {', '.join(f'{k}: {v}' for k, v in labels_by_kind.items())}.",
            )
    seeds = {int(seed) for seed in selected.pop("seed", labels_by_kind["seed"])}
    return plan.only(selected.pop("method", plan.rows), selected, seeds)


@contextmanager
def _lock_folder(folder: Path) -> Iterator[None]:
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


def _archive_outdated(folder: Path, cells: Sequence[Cell]) -> None:
    """Move records of what is no longer run to ``outdated/``, and back what is run again."""
    reasons: Counter[str] = Counter()
    returned = 0
    aside = folder / "outdated"
    for cell in cells:
        for kind in ("results", "failed"):
            path = folder / kind / f"{cell.id}.json"
            if not path.exists():
                continue
            record = read_record(path)
            if record is not None and record["digest"] == cell.digest:
                continue
            aside.mkdir(exist_ok=True)
            mark = record["digest"] if record else "unreadable"
            path.replace(_find_free_path(aside / f"{cell.id}.{_file_name(mark)}.json"))
            reasons[_reason(record, cell)] += 1
        back = aside / f"{cell.id}.{cell.digest}.json"
        result_path = folder / "results" / f"{cell.id}.json"
        record = read_record(back, cell.id) if back.is_file() else None
        valid = record and "error" not in record and record["digest"] == cell.digest
        if valid and not result_path.exists():
            result_path.parent.mkdir(exist_ok=True)
            back.replace(result_path)
            returned += 1
    if reasons:
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        print(f"Records set aside in {aside}: {reasons.total()} ({why}).")
    if returned:
        print(f"Records taken back from {aside}: {returned}.")


def _reason(record: dict[str, Any] | None, cell: Cell) -> str:
    """Why a record is not one of this cell as it is now."""
    if record is None:
        return "damaged or something else"
    parts = record.get("parts")
    if not isinstance(parts, dict) or parts.keys() != cell.parts.keys():
        return "of an earlier form"
    differ = [kind for kind, value in cell.parts.items() if parts[kind] != value]
    return f"of another {' and '.join(differ)}"


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]", "-", text)[:40]


def _find_free_path(path: Path) -> Path:
    """The path itself, or with a number where something is there."""
    numbered = (path.with_name(f"{path.stem}.{i}{path.suffix}") for i in itertools.count(2))
    return next(p for p in itertools.chain([path], numbered) if not p.exists())


def _is_open(folder: Path, cell: Cell, retry_failed: bool) -> bool:
    if (folder / "results" / f"{cell.id}.json").is_file():
        return False
    return retry_failed or not (folder / "failed" / f"{cell.id}.json").is_file()


def _by_digest(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """The cells by what they run."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.digest, []).append(cell)
    return groups


def _take_equal_result(folder: Path, cell: Cell, same: Sequence[Cell]) -> bool:
    """Give a cell the result of a finished one of those that run the same, if there is one."""
    for other in same:
        path = folder / "results" / f"{other.id}.json"
        record = read_record(path) if other.id != cell.id and path.is_file() else None
        if record is not None and record["digest"] == cell.digest:
            _write_result(folder, cell, {**record, **_identify_cell(cell)})
            return True
    return False


def _identify_cell(cell: Cell) -> dict[str, Any]:
    """The fields of a record that name its cell."""
    return {
        "id": cell.id,
        "method": cell.method,
        "setting": dict(cell.setting),
        "seed": cell.seed,
    }


def _write_result(folder: Path, cell: Cell, record: Mapping[str, Any]) -> None:
    write_json(folder / "results" / f"{cell.id}.json", record)
    failed = folder / "failed" / f"{cell.id}.json"
    for old in (failed, failed.with_suffix(".log")):
        old.unlink(missing_ok=True)


def _job(folder: Path, plan: ComparisonPlan, cell: Cell, evaluation: Evaluation | None) -> Job:
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
    plan: ComparisonPlan,
    cell: Cell,
    commands: list[list[str]],
    outcome: Outcome,
    evaluation: Evaluation | None,
) -> None:
    training = evaluation.metrics if evaluation else {}
    spent = {name: training[name] for name in plan.costs if name in training}
    record: dict[str, Any] = {
        **_identify_cell(cell),
        "digest": cell.digest,
        "parts": dict(cell.parts),
        "commands": commands,
        "metrics": {**spent, **outcome.metrics},
        "seconds": round(outcome.seconds, 3),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "version": __version__,
    }
    if evaluation and evaluation.candidate:
        record["chosen"] = evaluation.candidate
    failed = folder / "failed" / f"{cell.id}.json"
    if outcome.error:
        write_json(failed, {**record, "error": outcome.error})
        with suppress(FileNotFoundError):
            if evaluation and evaluation.log:  # of a training: other cells show it as well
                shutil.copyfile(evaluation.log, failed.with_suffix(".log"))
            else:
                log = folder / "logs" / f"{outcome.id}.log"
                shutil.copyfile(log, failed.with_suffix(".log"))
                if outcome.id == cell.id:
                    log.unlink()
        return
    _write_result(folder, cell, record)


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
            remaining = (time.monotonic() - start) / count * (total - count)
            yield outcome  # recorded before it is told: an interrupt in between loses nothing
            print(f"[{count}/{total}] {line(outcome)}, {_clock(remaining)} left", flush=True)
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
