"""The cells of a comparison as tasks of a Ray cluster, whose nodes may be lost."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fulgurite.compare.engines import Engine
from fulgurite.compare.resources import Resources
from fulgurite.compare.trial import TrialResult
from fulgurite.compare.worker import Job, execute_job
from fulgurite.errors import ConfigError
from fulgurite.extras import optional_import
from fulgurite.io import write_text

__all__ = ["RayCluster", "Site", "Surroundings", "execute_on_node"]

_RETRIES = 3  # of a task whose node or process is lost; an exception in a cell is its result
_POLL = 1.0  # [s]
_HANDED_ON = ("FULGURITE_", "WANDB_")
_TOKEN = ".ray-token"


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


@dataclass(frozen=True)
class Surroundings:
    """What a task needs to run a job as the driver would.

    Args:
        runner: ``module:function`` that runs a command line.
        token_file: A file in the folder of the comparison.
        token: What it says.
        folder: The driver's working folder, from which relative paths are looked up.
        variables: Variables of the driver's environment.
    """

    runner: str
    token_file: Path
    token: str
    folder: str
    variables: Mapping[str, str]


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
        self._ray = optional_import("ray", "ray", "--engine ray")
        self._site, self._engine, self._devices = site, engine, devices
        self._jobs: dict[Any, Job] = {}
        self._task: Any = None
        self._surroundings: Any = None

    def __enter__(self) -> RayCluster:
        address = self._engine.address
        try:
            self._ray.init(address=address, log_to_driver=False, logging_level="warning")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"No Ray cluster answers at {address or 'the default address'} "
                f"({str(error).splitlines()[0]}).",
                "Start one by `ray start --head`, or give its --address=HOST:PORT.",
            ) from error
        try:
            self._prepare()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _prepare(self) -> None:
        """Make the task, and what it looks for in the folder.

        Raises:
            ConfigError: No node has what a job reserves.
        """
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        resources = self._site.resources or Resources()
        gpus = resources.gpus
        if gpus is None:  # of a cluster without any, jobs take cores alone
            most = int(max((node.get("GPU", 0) for node in nodes), default=0))
            gpus = min(self._devices or most, most)
        if not any(
            node.get("CPU", 0) >= resources.cpus and node.get("GPU", 0) >= gpus for node in nodes
        ):
            raise ConfigError(
                f"No node of the Ray cluster has {resources.cpus} CPUs and {gpus} GPUs, "
                "which a cell reserves.",
                "Start a node that has, or lower `resources: {cpus: …, gpus: …}` of the file.",
            )
        token, token_file = uuid.uuid4().hex, self._site.folder / _TOKEN
        write_text(token_file, token)
        variables = {k: v for k, v in os.environ.items() if k.startswith(_HANDED_ON)}
        surroundings = Surroundings(
            self._site.runner, token_file, token, os.getcwd(), {**variables, "MPLBACKEND": "Agg"}
        )
        self._surroundings = self._ray.put(surroundings)
        options = {"num_cpus": resources.cpus, "num_gpus": gpus, "max_retries": _RETRIES}
        self._task = self._ray.remote(**options)(execute_on_node)

    def __exit__(self, *error: object) -> None:
        for reference in self._jobs:
            with suppress(Exception):  # the cluster may be what is gone
                self._ray.cancel(reference, force=True)
        self._jobs.clear()
        self._ray.shutdown()
        (self._site.folder / _TOKEN).unlink(missing_ok=True)

    @property
    def idle(self) -> int:
        """How many more jobs can be taken."""
        return (self._engine.workers or sys.maxsize) - self.busy

    @property
    def busy(self) -> int:
        """How many jobs have no result yet."""
        return len(self._jobs)

    def submit(self, job: Job) -> None:
        """Take a job; Ray starts it where there is room."""
        self._jobs[self._task.remote(job, self._surroundings)] = job

    def wait(self) -> list[TrialResult]:
        """Wait for results, about a second at most; none may have come.

        Raises:
            ConfigError: A node does not see the folder, or cannot import what jobs need.
        """
        ready, _ = self._ray.wait([*self._jobs], num_returns=1, timeout=_POLL)
        return [self._result(reference, self._jobs.pop(reference)) for reference in ready]

    def _result(self, reference: Any, job: Job) -> TrialResult:
        exceptions = self._ray.exceptions
        try:
            result = self._ray.get(reference)
        except exceptions.RayTaskError as error:  # jobs themselves raise nothing
            raise ConfigError(
                f"A node of the Ray cluster cannot run cells ({str(error).splitlines()[-1]}).",
                "Install the same versions of fulgurite and of plug-ins on each node.",
            ) from error
        except exceptions.RayError as error:
            lost = f"the task was lost {_RETRIES + 1} times ({type(error).__name__})"
            return TrialResult(job.id, error=lost)
        if isinstance(result, TrialResult):
            return result
        raise ConfigError(str(result), "Give an --out, and a working folder, that all nodes share.")


def execute_on_node(job: Job, surroundings: Surroundings) -> TrialResult | str:
    """Run a job on a node, as a task of the cluster.

    Args:
        job: The job; what a lost attempt left in its run folder is removed.
        surroundings: What the node needs to run it as the driver would.

    Returns:
        Its result, or a text that says why the node cannot run jobs.
    """
    host = socket.gethostname()
    try:
        token = surroundings.token_file.read_text(encoding="utf-8")
    except OSError:
        token = ""
    if token != surroundings.token:
        return f"Node {host} does not see the comparison's folder {surroundings.token_file.parent}."
    try:
        os.chdir(surroundings.folder)
    except OSError as error:
        return f"Node {host} has no folder {surroundings.folder} ({error.strerror})."
    os.environ.update(surroundings.variables)
    if job.run_dir.exists():  # what a lost attempt left
        shutil.rmtree(job.run_dir)
    return execute_job(job, surroundings.runner)
