"""Which engine runs independent tasks, as the options of commands name it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from fulgurite.errors import ConfigError, near_miss

__all__ = ["ENGINES", "POOL", "Engine", "add_engine_options"]

ENGINES = ("pool", "ray")


@dataclass(frozen=True)
class Engine:
    """How independent tasks are run: the cells of a comparison, or the tasks of an attention job.

    Args:
        name: ``pool`` for processes of this machine, ``ray`` for tasks of a Ray cluster.
        workers: How many run at the same time. The default of ``pool`` is up to the command; that
            of ``ray`` is what the cluster has room for.
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


def add_engine_options(parser: argparse._ActionsContainer, default_workers: str) -> None:
    """Add ``--workers``, ``--engine`` and ``--address``, which make an :class:`Engine`.

    Args:
        parser: Parser of a command, or a group of its options.
        default_workers: How many processes ``pool`` has by default, as its help says it.
    """
    parser.add_argument("--workers", type=int, help=f"processes (default: {default_workers})")
    parser.add_argument(
        "--engine", default="pool", help="pool (processes of this machine) or ray (a cluster)"
    )
    parser.add_argument(
        "--address",
        help="of the Ray cluster, such as auto (default: RAY_ADDRESS, or this machine alone)",
    )
