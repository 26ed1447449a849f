"""Runs what is missing of a comparison, and renders what is there."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path

from fulgurite.clusters.engines import POOL, Engine
from fulgurite.compare.comparison import PLAN_FILE, Comparison
from fulgurite.compare.devices import device_groups, visible_devices
from fulgurite.compare.folder_lock import lock_briefly, lock_folder
from fulgurite.compare.hashing import digest
from fulgurite.compare.identity import RUNNER, Resolver
from fulgurite.compare.plan import ComparisonPlan
from fulgurite.compare.plan_file import find_config, read_plan
from fulgurite.compare.pool import WorkerPool, run_jobs
from fulgurite.compare.progress import show_progress
from fulgurite.compare.ray_cluster import RayCluster, Site
from fulgurite.compare.records import TrialRecords
from fulgurite.compare.report import render, writing
from fulgurite.compare.shards import Shard, select_shard
from fulgurite.compare.trainings import Trainings
from fulgurite.compare.trial import Trial, TrialResult
from fulgurite.compare.trials import define_trials
from fulgurite.compare.watch import ConfigWatch
from fulgurite.compare.worker import Job
from fulgurite.compare.workers import Workers
from fulgurite.errors import ConfigError
from fulgurite.masking import masked_names
from fulgurite.systems import name_system

__all__ = [
    "check_trials",
    "find_folder",
    "run",
    "select_part",
    "select_trials",
    "select_unfinished",
]


def run(
    file: str,
    *,
    engine: Engine = POOL,
    out: str | None = None,
    quick: bool = False,
    only: list[str] | None = None,
    shard: Shard | None = None,
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
        engine: Where cells run; the default is processes of this machine.
        out: Folder of records and tables; the default is under ``compare_results/``.
        quick: Apply the overrides under ``quick`` of the file.
        only: Run and show only the cells that match: method ids, ``axis=label``, ``seed=0``. Items
            of the same kind are alternatives; items of different kinds must all hold.
        shard: Run only this part of these cells; other processes may run the other parts in the
            same folder at the same time.
        retry_failed: Run failed cells again.
        runner: ``module:function`` that runs a command line (another one in tests).

    Raises:
        ConfigError: The file or an option in it is wrong, another process works in the same
            folder, the folder cannot be written, or a configuration changes what the cells run
            while they run.
    """
    plan = read_plan(file, quick=quick)
    part = select_part(plan, only or [])
    folder = find_folder(file, plan, out=out, quick=quick)
    trials = check_trials(plan, runner)
    trials_of_part = select_trials(trials, part)
    to_finish = select_trials(trials, part, shard)
    content = digest([(trial.id, trial.digest) for trial in trials_of_part])
    with writing(folder), lock_folder(folder, shard, content):
        records = TrialRecords(folder, plan.costs)
        with lock_briefly(folder):
            Comparison(plan, folder, {}, {}).save_plan()
            records.archive_outdated(trials)
        if shard is not None:
            print(f"Shard {shard}: {len(to_finish)} of {len(trials_of_part)} cells.", flush=True)
        todo = [t for t in to_finish if records.is_open(t, retry_failed)]
        every = _by_digest(trials)  # trials that run the same have the same result
        todo = [t for t in todo if not records.take_equal_result(t, every[t.digest])]
        watch = ConfigWatch(plan, trials, runner)
        pool = _make_workers(engine, trials, Site(folder, runner, plan.resources))

        def run_watched(jobs: Sequence[Job], title: str, done: int = 0) -> Iterator[TrialResult]:
            with closing(run_jobs(jobs, pool)) as results:
                for result in show_progress(results, jobs, title, done):
                    watch.check()
                    yield result

        try:
            with pool:
                trainings = Trainings(folder / "trainings", plan, run_watched)
                _run_trials(todo, trainings, records, finished=len(to_finish) - len(todo))
        finally:
            with lock_briefly(folder):  # the last shard to end draws all
                comparison = Comparison.read(folder, part)
                if comparison.results or (folder / "table.md").exists():  # which may be outdated
                    render(comparison)
    return comparison


def select_trials(
    trials: Sequence[Trial], part: ComparisonPlan, shard: Shard | None = None
) -> list[Trial]:
    """The trials of a part of a comparison, or of a shard of that part.

    Args:
        trials: All trials of the comparison.
        part: What is to be run, as :func:`select_part` gives it.
        shard: Which of its shards; None for all.
    """
    names = {*part.trial_ids}
    selected = [trial for trial in trials if trial.id in names]
    return selected if shard is None else select_shard(selected, shard, part)


def select_unfinished(
    trials: Sequence[Trial], selected: Sequence[Trial], folder: Path, retry_failed: bool
) -> list[Trial]:
    """The trials that :func:`run` would run, each of those that are equal once; nothing is written.

    Args:
        trials: All trials of the comparison.
        selected: Those of them that are to have a result.
        folder: Folder of records and tables.
        retry_failed: Whether failed trials are run again.
    """
    records, every = TrialRecords(folder), _by_digest(trials)
    todo = [t for t in selected if records.will_run(t, every[t.digest], retry_failed)]
    return [same[0] for same in _by_digest(todo).values()]


def _run_trials(
    trials: Sequence[Trial], trainings: Trainings, records: TrialRecords, *, finished: int
) -> None:
    """Run trials, each of those that are equal once, and write a record of each.

    Args:
        trials: What has no record yet.
        trainings: What they are evaluated on where they share trainings.
        records: Where their records go.
        finished: Number of trials that were run before.
    """
    plan, equals = trainings.plan, _by_digest(trials)
    to_run = {same[0].id: same[0] for same in equals.values()}
    chosen: Mapping[str, TrialResult] = {}
    if plan.shares and to_run:
        chosen = trainings.choose(to_run.values())
    jobs = []
    for trial in to_run.values():
        trained = chosen.get(trial.id)
        if trained and trained.error:
            failed = TrialResult(trial.id, error=trained.error)
            for same in equals[trial.digest]:
                records.write(same, failed, [], trained)
        else:
            jobs.append(_make_job(trial, trainings, records.folder, trained))
    commands = {job.id: job.commands for job in jobs}
    for result in trainings.run(jobs, plan.title, finished):
        for same in reversed(equals[to_run[result.id].digest]):  # its own log is moved last
            records.write(same, result, commands[result.id], chosen.get(result.id))


def _make_job(trial: Trial, trainings: Trainings, folder: Path, trained: TrialResult | None) -> Job:
    """What a worker does for a trial: its own training, or the evaluation of a shared one."""
    run_dir, plan = folder / "cells" / trial.id, trainings.plan
    if run_dir.exists():  # what an interrupted or failed attempt left
        shutil.rmtree(run_dir)
    if trained is None:
        commands = trial.commands(run_dir, plan.after_fit)
    else:
        commands = [trainings.evaluation_command(trained, run_dir)]
    log = folder / "logs" / f"{trial.id}.log"
    return Job(trial.id, commands, run_dir, log=log, metric=plan.metric, label=plan.label(trial))


def find_folder(file: str, plan: ComparisonPlan, *, out: str | None, quick: bool) -> Path:
    """Where records and tables lie.

    Raises:
        ConfigError: The default folder is that of another comparison file.
    """
    if out == "":  # such as an unset variable of the shell
        raise ConfigError("--out is empty.", "Name a folder, or leave it out.")
    if out:
        return Path(out).resolve()
    path = find_config(file).resolve()
    system = name_system(path)
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


def check_trials(plan: ComparisonPlan, runner: str) -> list[Trial]:
    """The trials by what they run, which takes some tenths of a second for each command.

    Raises:
        ConfigError: An option of a command is wrong, or its value was masked.
    """
    from rich.console import Console

    if hidden := masked_names(plan.options_to_dict()):
        raise ConfigError(
            f"The value of {', '.join(hidden)} was masked when the comparison was recorded.",
            f"Run the file that it was recorded from: fulgurite compare {plan.source}",
        )

    with Console(stderr=True).status("Checking every option …"):
        return define_trials(plan, Resolver(runner))


def _make_workers(engine: Engine, trials: Sequence[Trial], site: Site) -> Workers:
    """What the trials run on."""
    devices = _devices_each(trials)
    if engine.name == "ray":
        return RayCluster(site, engine, devices)
    groups = device_groups(visible_devices(_gpu_count()), devices)
    cores = len(os.sched_getaffinity(0) if sys.platform == "linux" else [0, 0])
    return WorkerPool(engine.workers or len(groups) or cores, site.runner, groups)


def _gpu_count() -> int:
    """GPUs that torch sees, where the runner has loaded it; asking starts nothing on them."""
    torch = sys.modules.get("torch")
    return torch.cuda.device_count() if torch else 0


def _devices_each(trials: Sequence[Trial]) -> int:
    """How many accelerators a worker needs for any of the trials; 0 for all."""
    needs = [trial.devices for trial in trials]
    return max(needs) if all(needs) else 0


def select_part(plan: ComparisonPlan, only: Sequence[str]) -> ComparisonPlan:
    """The part of a comparison that ``--only`` names; all of it without.

    Raises:
        ConfigError: ``--only`` names a method, setting or seed that the comparison lacks.
    """
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


def _by_digest(trials: Sequence[Trial]) -> dict[str, list[Trial]]:
    """The trials by what they run."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(trial.digest, []).append(trial)
    return groups
