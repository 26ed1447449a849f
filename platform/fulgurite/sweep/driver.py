"""``fulgurite sweep``: run the trials of a sweep file without a server."""

from __future__ import annotations

import argparse
import math
import shlex
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import OptunaError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from fulgurite.compare.devices import device_groups, visible_devices
from fulgurite.compare.identity import RUNNER, Resolver
from fulgurite.compare.pool import WorkerPool, set_variables
from fulgurite.compare.report import writing
from fulgurite.compare.worker import Job
from fulgurite.errors import ConfigError
from fulgurite.run_folders import leads_out
from fulgurite.sweep.identity import TrialDefinition, claim_folder, define_point
from fulgurite.sweep.pruning import ENDED, STORAGE_VARIABLE
from fulgurite.sweep.report import render, write_best
from fulgurite.sweep.space import Sweep
from fulgurite.sweep.storage import (
    MEMORY,
    check_kept,
    hide_password,
    reaching_storage,
    sqlite_url,
)
from fulgurite.sweep.study import (
    ERROR,
    METRICS,
    RUN_DIR,
    SECONDS,
    Point,
    TrialWatch,
    counted_trials,
    enqueue_grid,
    has_queue,
    next_point,
    open_study,
    retry_failed_trials,
    tell,
)
from fulgurite.sweep.sweep_file import MOST_POINTS, read_sweep
from fulgurite.systems import name_system

__all__ = ["main", "run"]

_REPORTER = "fulgurite.sweep.reporter.TrialReporter"
_BEAT, _POLL = 20.0, 2.0  # [s]


def run(
    file: str,
    *,
    trials: int | None = None,
    workers: int = 1,
    storage: str | None = None,
    out: str | None = None,
    name: str | None = None,
    seed: int = 0,
    retry_failed: bool = False,
    runner: str = RUNNER,
) -> optuna.Study:
    """Run the trials of a sweep that are not finished, and write what came out.

    The call may be killed at any moment and repeated, and several machines may run it at the same
    time with one storage: together they run ``trials`` trials.

    Args:
        file: A sweep file of W&B: a path or a packaged name.
        trials: Number of trials in all; the default is the file's ``run_cap``, or a whole grid.
        workers: Processes on this machine.
        storage: Address of a database; the default is a file in the folder of results.
        out: Folder of results; the default is under ``sweep_results/``.
        name: Name of the study in the storage; the default is the file's system and name.
        seed: Seed of random and Bayesian search.
        retry_failed: Run the points of trials that failed for a reason of their own again.
        runner: ``module:function`` that runs a command line (another one in tests).

    Returns:
        The study, in which Optuna finds all trials.

    Raises:
        ConfigError: The file, an option or the storage is wrong; the storage's study or the folder
            is of another sweep; or a configuration or the data changed since earlier trials.
    """
    for option, text in (("storage", storage), ("out", out), ("name", name)):
        if text == "":  # such as an unset variable of the shell
            raise ConfigError(f"--{option} is empty.", "Give a value, or leave it out.")
    if name is not None and out is None and leads_out(name):
        raise ConfigError(
            f"--name={name} leads out of sweep_results.", "Give a name, or --out=FOLDER as well."
        )
    for option, value in (("workers", workers), ("trials", trials)):
        if value is not None and value < 1:
            raise ConfigError(f"--{option} is {value}.", "Give 1 or more.")
    sweep = read_sweep(file)
    name = name or _default_name(sweep)
    folder = Path(out or Path("sweep_results") / name).resolve()
    url = storage or sqlite_url(folder / "study.db")
    check_kept(url)
    limit = _limit(sweep, trials)
    definition = TrialDefinition(sweep, runner)
    with writing(folder), reaching_storage(url):
        folder.mkdir(parents=True, exist_ok=True)
        study = open_study(sweep, url, name, seed)
        definition.check_study(study, url)
        claim_folder(study, url, folder)
        driver = _Driver(sweep, study, folder, limit, definition)
        with set_variables({STORAGE_VARIABLE: url}), driver.beating():
            if sweep.method == "grid":
                enqueue_grid(study, sweep, limit)
            if retry_failed and (numbers := retry_failed_trials(study)):
                print(f"Trials {', '.join(map(str, numbers))} failed; their points are run again.")
            try:
                groups = device_groups(visible_devices(_gpu_count()), 1)
                with WorkerPool(workers, runner, groups) as pool:
                    driver.run(pool)
            finally:
                render(study, sweep, folder)
        write_best(study, sweep, folder)
    return study


@dataclass
class _Driver:
    """Hands points to workers and tells the study what became of them."""

    sweep: Sweep
    study: optuna.Study
    folder: Path
    limit: int
    definition: TrialDefinition

    def __post_init__(self) -> None:
        self.running: dict[str, Point] = {}
        self.watch = TrialWatch(self.study)
        self.start = time.monotonic()
        self.told = 0

    def run(self, pool: WorkerPool) -> None:
        """Run trials until none is left to begin and none runs, here or on another machine."""
        announced = False
        while True:
            self.repeat_dead_trials()
            self.definition.check_files()
            while pool.idle and (point := self.begin()):
                job = self.job(point)
                self.running[job.id] = point
                pool.submit(job)
            if self.running:
                for result in pool.wait():
                    self.definition.check_files()
                    point = self.running.pop(result.id)
                    self.tell(point, result.metrics, result.error, result.seconds)
                continue
            others = self.watch.running()
            if not others:
                return
            if not announced:
                numbers = ", ".join(str(trial.number) for trial in others)
                print(f"Trials {numbers} run on another machine; waiting for them.", flush=True)
                announced = True
            time.sleep(_POLL)

    def repeat_dead_trials(self) -> None:
        """Queue the points of trials that were cut short."""
        dead = self.watch.fail_dead_trials()
        if dead:
            numbers = ", ".join(map(str, dead))
            print(f"Trials {numbers} were cut short; their points are run again.", flush=True)

    def begin(self) -> Point | None:
        """The next point, or None where the sweep is over."""
        if reached_target(self.study, self.sweep):
            return None
        while len(counted_trials(self.study)) < self.limit:
            if self.sweep.method == "grid" and not has_queue(self.study):
                return None
            point = next_point(self.study, self.sweep, self.limit)
            if point is not None:
                return point
        return None

    def job(self, point: Point) -> Job:
        number = point.trial.number
        run_dir = self.folder / "trials" / f"{number:05d}"
        options = self.sweep.options(point.values)
        if self.sweep.early_terminate is not None:
            reporter = [f"--trainer.callbacks+={_REPORTER}"]
            values = (("study", self.study.study_name), ("number", number))
            reporter += [f"--trainer.callbacks.{key}={value}" for key, value in values]
            options = [*options, *reporter, f"--trainer.callbacks.metric={self.sweep.metric}"]
        point.trial.set_user_attr(RUN_DIR, str(run_dir))
        return Job(
            id=str(number),
            commands=[[*self.sweep.command, *options, f"--run.dir={run_dir}"]],
            run_dir=run_dir,
            log=self.folder / "logs" / f"{number:05d}.log",
            metric=self.sweep.metric,
            label=" ".join(f"{k}={v}" for k, v in point.values.items()),
        )

    def tell(self, point: Point, metrics: Mapping[str, float], error: str, seconds: float) -> None:
        """Record what became of a trial, and say it."""
        trial = point.trial
        value = metrics.get(self.sweep.metric) if self.sweep.metric else 0.0
        if value is not None and value != value:
            error = error or f"{self.sweep.metric} is not a number"
        elif value == (math.inf if self.sweep.maximize else -math.inf):  # else it were the best
            error = error or f"{self.sweep.metric} is {value}, as after an overflow"
        try:
            trial.set_user_attr(SECONDS, round(seconds, 1))
            trial.set_user_attr(METRICS, {k: v for k, v in metrics.items() if v == v})
            ended = self.study.get_trials(deepcopy=False)[trial.number].user_attrs.get(ENDED)
            if error:
                trial.set_user_attr(ERROR, error)
                tell(self.study, trial.number, state=TrialState.FAIL)
            elif ended:
                tell(self.study, trial.number, state=TrialState.PRUNED)
            else:
                tell(self.study, trial.number, value)
        except UpdateFinishedTrialError:
            print(
                f"Trial {trial.number} ended here, but another machine had heard nothing of it for "
                "too long and runs its point again: that result counts.",
                flush=True,
            )
            return
        self.say(point, error or (f"ended after {ended} values" if ended else ""), value, seconds)

    def say(self, point: Point, problem: str, value: float | None, seconds: float) -> None:
        self.told += 1
        done = sum(t.state.is_finished() for t in self.study.get_trials(deepcopy=False))
        settings = " ".join(f"{k.rpartition('.')[2]}={v}" for k, v in point.values.items())
        result = (
            f"{self.sweep.metric} {value:.4g}" if self.sweep.metric and value is not None else ""
        )
        text = ", ".join(part for part in (result, problem) if part) or "done"
        left = (time.monotonic() - self.start) / self.told * max(0, self.limit - done)
        print(
            f"[{min(done, self.limit)}/{self.limit}] trial {point.trial.number} {settings}: {text} "
            f"({seconds:.0f} s), {left / 60:.0f} min left",
            flush=True,
        )

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Tell the storage that the trials of this machine are alive."""
        over = threading.Event()

        def tick() -> None:
            while not over.wait(_BEAT):
                with suppress(SQLAlchemyError, OptunaError):  # the next one may reach it again
                    self.watch.mark([point.trial for point in [*self.running.values()]])

        thread = threading.Thread(target=tick, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(5)


def reached_target(study: optuna.Study, sweep: Sweep) -> bool:
    """Whether a finished trial is as good as the file's ``target``."""
    if sweep.target is None:
        return False
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    sign = 1 if sweep.maximize else -1
    return any(sign * _value(trial) >= sign * sweep.target for trial in done)


def _value(trial: FrozenTrial) -> float:
    assert trial.value is not None
    return trial.value


def _default_name(sweep: Sweep) -> str:
    return f"{name_system(sweep.path)}-{sweep.path.stem}"


def _limit(sweep: Sweep, trials: int | None) -> int:
    """How many trials there are in all.

    Raises:
        ConfigError: Neither the file nor the option says it.
    """
    caps = [cap for cap in (trials, sweep.run_cap) if cap is not None]
    if sweep.method == "grid":
        caps.append(sweep.grid_size)
    if not caps:
        raise ConfigError(
            f"{sweep.path} does not say how many trials to run.", "Give --trials, or run_cap in it."
        )
    if trials is not None and min(caps) < trials:
        what = "the whole grid" if sweep.method == "grid" else "run_cap"
        print(f"note: --trials is {trials}, and {what} of {sweep.path} is {min(caps)}")
    if sweep.method == "grid" and min(caps) > MOST_POINTS:
        raise ConfigError(
            f"{sweep.path} is a grid of {min(caps):,} points, and {MOST_POINTS:,} are the most.",
            "Give --trials or run_cap, or `method: random`.",
        )
    return min(caps)


def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of ``fulgurite sweep``; 1 if a trial failed."""
    parser = argparse.ArgumentParser(
        "fulgurite sweep",
        description="Run a W&B sweep file without a server, by Optuna: grid, random, bayes (TPE).",
    )
    parser.add_argument("file", help="sweep file: a path or a packaged name")
    parser.add_argument("--trials", type=int, help="trials in all (default: run_cap, or the grid)")
    parser.add_argument("--workers", type=int, default=1, help="processes on this machine")
    parser.add_argument("--storage", help="database, such as postgresql+psycopg://HOST/DATABASE")
    parser.add_argument("--out", help="folder of results (default: sweep_results/SYSTEM-FILE)")
    parser.add_argument("--name", help="name of the study in the storage")
    parser.add_argument("--seed", type=int, default=0, help="seed of random and bayes")
    parser.add_argument(
        "--retry-failed", "--retry_failed", action="store_true", help="run failed trials again"
    )
    parser.add_argument("--dry-run", action="store_true", help="check and print ten points")
    parser.add_argument("--runner", default=RUNNER, help=argparse.SUPPRESS)
    options: dict[str, Any] = vars(parser.parse_args(argv))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if options.pop("dry_run"):
        return _print_commands(read_sweep(options["file"]), options["seed"], options["runner"])
    study = run(options.pop("file"), **options)
    url = options["storage"]
    failed = [trial for trial in counted_trials(study) if trial.user_attrs.get(ERROR)]
    for trial in failed[:10]:
        print(f"trial {trial.number} failed: {trial.user_attrs[ERROR]}")
    if failed:
        print("The same command with --retry-failed runs them again.")
    if url:
        print(f"Study: {study.study_name} in {hide_password(url)}")
    return 1 if failed else 0


def _print_commands(sweep: Sweep, seed: int, runner: str) -> int:
    """The first commands of a sweep, from a study in memory; their options are checked."""
    study = open_study(sweep, MEMORY, "dry run", seed)
    resolver = Resolver(runner)
    limit = min(10, sweep.grid_size) if sweep.method == "grid" else 10
    if sweep.method == "grid":
        enqueue_grid(study, sweep, limit)
    for _ in range(limit):
        point = next_point(study, sweep, limit)
        assert point is not None
        define_point(sweep, point.values, resolver)
        print(shlex.join(["fulgurite", *sweep.command, *sweep.options(point.values)]))
    return 0
