"""The cells of a comparison as tasks of a Ray cluster, whose nodes may be lost."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fulgurite.clusters.engines import Engine
from fulgurite.clusters.ray_tasks import RayTasks, Reservation, TaskLabels
from fulgurite.compare.resources import Resources
from fulgurite.compare.trial import TrialResult
from fulgurite.compare.worker import Job, execute_job

__all__ = ["RayCluster", "Site", "execute_anew"]

_LABELS = TaskLabels(
    task="cell",
    folder="the comparison's folder",
    folder_option="an --out",
    resources="lower `resources: {cpus: …, gpus: …}` of the file",
)


@dataclass(frozen=True)
class Site:
    """Where and by what jobs are run.

    Args:
        folder: Folder of the comparison, which every node must see.
        runner: ``module:function`` that runs a command line.
        resources: What each job reserves; None for what it takes.
    """

    folder: Path
    runner: str
    resources: Resources | None = None


class RayCluster:
    """Workers that are tasks of a Ray cluster.

    A task whose node or process is lost is run again, three times at most; one that still is lost
    fails its own cell only. Leaving it cancels what runs.

    Args:
        site: Where and by what jobs are run.
        engine: Address of the cluster, and how many tasks it gets at a time.
        devices: Number of accelerators that a job takes; 0 for all of a node.

    Raises:
        MissingExtraError: Ray is not installed.
    """

    def __init__(self, site: Site, engine: Engine, devices: int) -> None:
        resources = site.resources or Resources()
        self._tasks: RayTasks[Job, TrialResult] = RayTasks(
            partial(execute_anew, runner=site.runner),
            site.folder,
            engine,
            reservation=Reservation(resources.cpus, resources.gpus, devices),
            labels=_LABELS,
        )

    def __enter__(self) -> RayCluster:
        self._tasks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._tasks.__exit__(*error)

    @property
    def idle(self) -> int:
        """How many more jobs can be taken."""
        return self._tasks.idle

    @property
    def busy(self) -> int:
        """How many jobs have no result yet."""
        return self._tasks.busy

    def submit(self, job: Job) -> None:
        """Take a job; Ray starts it where there is room."""
        self._tasks.submit(job)

    def wait(self) -> list[TrialResult]:
        """Wait for results, about a second at most; none may have come.

        Raises:
            ConfigError: A node does not see the folder, or cannot import what jobs need.
        """
        return [
            outcome.result or TrialResult(outcome.task.id, error=outcome.loss)
            for outcome in self._tasks.wait()
        ]


def execute_anew(job: Job, runner: str) -> TrialResult:
    """Run a job from its beginning: what a lost attempt left in its run folder is removed.

    Args:
        job: The job.
        runner: ``module:function`` that runs a command line.
    """
    if job.run_dir.exists():
        shutil.rmtree(job.run_dir)
    return execute_job(job, runner)
