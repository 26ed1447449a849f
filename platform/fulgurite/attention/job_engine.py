"""Runs the tasks of an attention job side by side: in processes, or on the nodes of a cluster."""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fulgurite.attention.call_files import map_tensors
from fulgurite.attention.checks import INPUTS, SAVED
from fulgurite.attention.jobs import AttentionJob
from fulgurite.attention.progress import bar
from fulgurite.clusters.engines import Engine
from fulgurite.clusters.ray_tasks import RayTasks, Reservation, TaskLabels
from fulgurite.errors import FulguriteError, RunError

__all__ = ["JobSite", "compute_task_of", "run_job"]

_LABELS = TaskLabels(
    task="task",
    folder="the job's folder",
    folder_option="an --out",
    resources="lower --cpus or --gpus",
)
_AHEAD = 4096  # tasks that a cluster has waiting at most


@dataclass(frozen=True)
class JobSite:
    """Where a job and its inputs lie, and where its kernels run.

    Args:
        folder: Folder of the job.
        source: What :func:`~fulgurite.attention.call_files.map_tensors` reads.
        device: Where kernels run.
    """

    folder: Path
    source: Path
    device: str = "cpu"

    def open(self) -> tuple[AttentionJob, list[torch.Tensor]]:
        """Open the job, and map its inputs.

        Raises:
            CheckpointError: There is no job, or it is damaged.
            DataError: An input is missing or cannot be read.
        """
        job = AttentionJob.open(self.folder)
        names = SAVED if job.is_backward else INPUTS
        return job, [*map_tensors(self.source, names).values()]


def run_job(
    site: JobSite, engine: Engine, *, reservation: Reservation, progress: bool = False
) -> None:
    """Compute the tasks of a job that have no file yet; none is missing afterwards.

    Args:
        site: Where the job lies.
        engine: Where tasks run. ``pool`` runs one process by default, since each may hold the
            budget of the job.
        reservation: What each task reserves on a node of a cluster.
        progress: Show a bar.

    Raises:
        ConfigError: The cluster does not answer or cannot run tasks.
        DataError: The inputs are not those of the job.
        CheckpointError: The folder cannot be written.
        RunError: Tasks were lost with their nodes, again and again.
    """
    job, inputs = site.open()
    if engine.name == "ray":
        _run_on_cluster(site, job.missing(), engine, reservation, progress=progress)
        return
    workers = engine.workers or 1
    with _helpers(site, workers - 1):
        job.run(*inputs, device=_nth_device(site.device, 0), progress=progress)


def compute_task_of(task: tuple[JobSite, int]) -> None:
    """Compute one task of a job, as a task of a cluster.

    Args:
        task: Where the job lies, and the number of the task.

    Raises:
        FulguriteError: What :meth:`~fulgurite.attention.AttentionJob.run_task` raises.
    """
    site, number = task
    job, inputs = _open_once(site)
    job.run_task(number, *inputs, device=site.device)


@functools.lru_cache(maxsize=1)
def _open_once(site: JobSite) -> tuple[AttentionJob, list[torch.Tensor]]:
    """The job and its inputs; planning it anew takes as long as a small task."""
    return site.open()


def _run_on_cluster(
    site: JobSite,
    missing: Sequence[int],
    engine: Engine,
    reservation: Reservation,
    *,
    progress: bool,
) -> None:
    """Compute tasks on a Ray cluster.

    Raises:
        RunError: Tasks were lost with their nodes.
    """
    if not missing:
        return
    waiting, lost = list(reversed(missing)), dict[int, str]()
    cluster: RayTasks[tuple[JobSite, int], None] = RayTasks(
        compute_task_of, site.folder, engine, reservation=reservation, labels=_LABELS
    )
    with cluster, bar("tasks", len(missing), show=progress) as advance:
        while waiting or cluster.busy:
            while waiting and cluster.idle and cluster.busy < _AHEAD:
                cluster.submit((site, waiting.pop()))
            for outcome in cluster.wait():
                advance(1)
                if outcome.loss:
                    lost[outcome.task[1]] = outcome.loss
    if lost:
        number, loss = next(iter(lost.items()))
        raise RunError(
            f"{len(lost)} of {len(missing)} tasks of the job {site.folder} were lost with their "
            f"nodes; of task {number}, {loss}.",
            "The same command goes on with them, on nodes with more memory or with a smaller "
            "--memory-budget and another --out.",
        )


@contextmanager
def _helpers(site: JobSite, count: int) -> Iterator[None]:
    """Let further processes take tasks meanwhile.

    One that dies costs time alone: whoever is left takes its tasks over, this process at last.
    """
    if not count:
        yield
        return
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // (count + 1))
    processes = [
        context.Process(target=_help, args=(site, number, threads), daemon=True)
        for number in range(1, count + 1)
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for process in processes:
            process.start()
        yield
        for process in processes:
            process.join()
    finally:
        torch.set_num_threads(before)
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


def _help(site: JobSite, number: int, threads: int) -> None:
    """Take tasks of a job until none is left."""
    torch.set_num_threads(threads)
    try:
        job, inputs = site.open()
        job.run(*inputs, device=_nth_device(site.device, number), wait=False)
    except FulguriteError as error:  # the first process meets it too, or does without this one
        print(f"fulgurite: process {os.getpid()} takes no tasks: {error}", file=sys.stderr)


def _nth_device(device: str, number: int) -> Any:
    """The device of a process: of ``cuda`` the GPUs in turn."""
    if device == "cuda" and torch.cuda.is_available():
        return f"cuda:{number % torch.cuda.device_count()}"
    return device
