"""Independent tasks on a Ray cluster, whose nodes may be lost."""

from __future__ import annotations

import os
import socket
import sys
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from fulgurite.clusters.engines import Engine
from fulgurite.errors import ConfigError, FulguriteError
from fulgurite.extras import optional_import
from fulgurite.io import write_text

__all__ = [
    "NodeFault",
    "Outcome",
    "RayTasks",
    "Reservation",
    "Surroundings",
    "TaskLabels",
    "run_on_node",
]

Task = TypeVar("Task")
Result = TypeVar("Result")

_RETRIES = 3  # of a task whose node or process is lost; an exception within it is no loss
_POLL = 1.0  # [s]
_PATIENCE = 10.0  # with an address that does not answer [s]
_HANDED_ON = ("FULGURITE_", "WANDB_")
_TOKEN = ".ray-token"


@dataclass(frozen=True)
class Reservation:
    """What a task reserves on a node.

    Args:
        cpus: Number of cores.
        gpus: Number of GPUs; None for ``devices`` where the cluster has GPUs, and for 0 elsewhere.
        devices: Number of accelerators that a task takes where there are some; 0 for all of a node.
    """

    cpus: int = 1
    gpus: int | None = None
    devices: int = 1


@dataclass(frozen=True)
class TaskLabels:
    """What errors call the tasks of a command.

    Args:
        task: One of them: ``cell``.
        folder: The folder that all nodes must see: ``the comparison's folder``.
        folder_option: The option that names it: ``an --out``.
        resources: How less is reserved: ``lower …``, as the rest of a sentence.
    """

    task: str
    folder: str
    folder_option: str
    resources: str


@dataclass(frozen=True)
class Surroundings:
    """What a node needs to run a task as the driver would.

    Args:
        token_file: A file in the folder that all nodes must see.
        token: What it says.
        folder: The driver's working folder, from which relative paths are looked up.
        variables: Variables of the driver's environment.
        folder_label: What errors call the folder that all nodes must see.
    """

    token_file: Path
    token: str
    folder: str
    variables: Mapping[str, str]
    folder_label: str


@dataclass(frozen=True)
class NodeFault:
    """Why a node cannot run tasks.

    Args:
        reason: A sentence.
    """

    reason: str


class Outcome(NamedTuple, Generic[Task, Result]):
    """What became of a task.

    Attributes:
        task: The task.
        result: What its function returned; None where the task was lost.
        loss: How it was lost; empty where it was not.
    """

    task: Task
    result: Result | None
    loss: str = ""


def _reach(address: str) -> None:
    """Open a connection to a cluster and close it: Ray itself would try for many minutes.

    Args:
        address: ``HOST:PORT``; others are left to Ray.

    Raises:
        OSError: Nothing answers there.
    """
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE):
            pass


class RayTasks(Generic[Task, Result]):
    """Runs a function on tasks, each as a task of a Ray cluster.

    A task whose node or process is lost is run again, three times at most. Leaving it cancels what
    runs. What the function raises ends all: errors of :mod:`fulgurite.errors` as they are.

    Args:
        function: What is run on each task; picklable, as are tasks and results.
        folder: A folder that every node must see.
        engine: Address of the cluster, and how many tasks it gets at a time.
        reservation: What each task reserves.
        labels: What errors call the tasks.

    Raises:
        MissingExtraError: Ray is not installed.
    """

    def __init__(
        self,
        function: Callable[[Task], Result],
        folder: Path,
        engine: Engine,
        *,
        reservation: Reservation,
        labels: TaskLabels,
    ) -> None:
        self._ray = optional_import("ray", "ray", "--engine ray")
        self._function, self._folder, self._engine = function, folder, engine
        self._reservation, self._labels = reservation, labels
        self._tasks: dict[Any, Task] = {}
        self._remote: Any = None
        self._surroundings: Any = None

    def __enter__(self) -> RayTasks[Task, Result]:
        address = self._engine.address
        try:
            _reach(address or os.environ.get("RAY_ADDRESS") or "")
            self._ray.init(address=address, log_to_driver=False, logging_level="warning")
        except (OSError, ValueError, RuntimeError) as error:
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
        """Make the remote function, and what it looks for in the folder.

        Raises:
            ConfigError: No node has what a task reserves.
        """
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        cpus, gpus = self._reservation.cpus, self._reservation.gpus
        if gpus is None:  # of a cluster without any, tasks take cores alone
            most = int(max((node.get("GPU", 0) for node in nodes), default=0))
            gpus = min(self._reservation.devices or most, most)
        if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
            raise ConfigError(
                f"No node of the Ray cluster has {cpus} CPUs and {gpus} GPUs, "
                f"which a {self._labels.task} reserves.",
                f"Start a node that has, or {self._labels.resources}.",
            )
        token, token_file = uuid.uuid4().hex, self._folder / _TOKEN
        write_text(token_file, token)
        variables = {k: v for k, v in os.environ.items() if k.startswith(_HANDED_ON)}
        surroundings = Surroundings(
            token_file,
            token,
            os.getcwd(),
            {**variables, "MPLBACKEND": "Agg"},
            folder_label=self._labels.folder,
        )
        self._surroundings = self._ray.put(surroundings)
        options = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": _RETRIES}
        self._remote = self._ray.remote(**options)(run_on_node)

    def __exit__(self, *error: object) -> None:
        for reference in self._tasks:
            with suppress(Exception):  # the cluster may be what is gone
                self._ray.cancel(reference, force=True)
        self._tasks.clear()
        self._ray.shutdown()
        (self._folder / _TOKEN).unlink(missing_ok=True)

    @property
    def idle(self) -> int:
        """How many more tasks can be taken."""
        return (self._engine.workers or sys.maxsize) - self.busy

    @property
    def busy(self) -> int:
        """How many tasks have no outcome yet."""
        return len(self._tasks)

    def submit(self, task: Task) -> None:
        """Take a task; Ray starts it where there is room."""
        self._tasks[self._remote.remote(self._function, task, self._surroundings)] = task

    def wait(self) -> list[Outcome[Task, Result]]:
        """Wait for outcomes, about a second at most; none may have come.

        Raises:
            ConfigError: A node does not see the folder, or cannot import what tasks need.
            FulguriteError: What the function raised.
        """
        ready, _ = self._ray.wait([*self._tasks], num_returns=1, timeout=_POLL)
        return [self._read_outcome(reference, self._tasks.pop(reference)) for reference in ready]

    def _read_outcome(self, reference: Any, task: Task) -> Outcome[Task, Result]:
        exceptions = self._ray.exceptions
        try:
            result = self._ray.get(reference)
        except exceptions.RayTaskError as error:
            if isinstance(error.cause, FulguriteError):
                raise error.cause from error
            raise ConfigError(
                f"A node of the Ray cluster cannot run {self._labels.task}s "
                f"({str(error).splitlines()[-1]}).",
                "Install the same versions of fulgurite and of plug-ins on each node.",
            ) from error
        except exceptions.RayError as error:
            lost = f"the task was lost {_RETRIES + 1} times ({type(error).__name__})"
            return Outcome(task, None, lost)
        if isinstance(result, NodeFault):
            raise ConfigError(
                result.reason,
                f"Give {self._labels.folder_option}, and a working folder, that all nodes share.",
            )
        return Outcome(task, result)


def run_on_node(
    function: Callable[[Task], Result], task: Task, surroundings: Surroundings
) -> Result | NodeFault:
    """Run a function on a task on a node, as a task of the cluster.

    Args:
        function: What is run.
        task: What it is run on.
        surroundings: What the node needs to run it as the driver would.

    Returns:
        What the function returns, or why the node cannot run tasks.
    """
    host = socket.gethostname()
    try:
        token = surroundings.token_file.read_text(encoding="utf-8")
    except OSError:
        token = ""
    if token != surroundings.token:
        folder = surroundings.token_file.parent
        return NodeFault(f"Node {host} does not see {surroundings.folder_label} {folder}.")
    try:
        os.chdir(surroundings.folder)
    except OSError as error:
        return NodeFault(f"Node {host} has no folder {surroundings.folder} ({error.strerror}).")
    os.environ.update(surroundings.variables)
    return function(task)
