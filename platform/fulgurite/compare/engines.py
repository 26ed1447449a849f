"""Where the cells of a comparison run: processes of this machine, or tasks of a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fulgurite.compare.schema import near_miss
from fulgurite.compare.trial import TrialResult
from fulgurite.compare.worker import Job
from fulgurite.errors import ConfigError

__all__ = ["ENGINES", "POOL", "Engine", "Workers"]

ENGINES = ("pool", "ray")


class Workers(Protocol):
    """What takes jobs and returns their results; all that runs ends when it is left."""

    def __enter__(self) -> Any:
        """Begin."""

    def __exit__(self, *error: object) -> None:
        """End what still runs."""

    @property
    def idle(self) -> int:
        """How many more jobs can be taken."""

    @property
    def busy(self) -> int:
        """How many jobs have no result yet."""

    def submit(self, job: Job) -> None:
        """Take a job."""

    def wait(self) -> Sequence[TrialResult]:
        """Wait for results, about a second at most; none may have come."""


@dataclass(frozen=True)
class Engine:
    """How the cells of a comparison are run.

    Args:
        name: ``pool`` for processes of this machine, ``ray`` for tasks of a Ray cluster.
        workers: How many run at the same time. The default of ``pool`` is one per GPU, or per core
            where there is none; that of ``ray`` is what the cluster has room for.
        address: Address of the cluster, such as ``auto``; the default is the one that
            ``RAY_ADDRESS`` names, or else a cluster of this machine alone.

    Raises:
        ConfigError: There is no such engine, or an option is not one of it.
    """

    name: str = "pool"
    workers: int | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        if self.name not in ENGINES:
            raise ConfigError(
                f"--engine is {self.name!r}.",
                near_miss(self.name, ENGINES) or f"There are {' and '.join(ENGINES)}.",
            )
        if self.address is not None and self.name != "ray":
            raise ConfigError(
                f"--address is {self.address!r}, and --engine is {self.name!r}.",
                "An address is one of a Ray cluster: give --engine ray, or leave --address out.",
            )
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"--workers is {self.workers}.", "Give 1 or more.")


POOL = Engine()
"""Processes of this machine."""
