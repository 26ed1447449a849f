"""What ``wandb agent`` would run: the commands of every point of a sweep file.

Plug-in authors use it to test that each point of their ``sweep.yaml`` parses.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from fulgurite.errors import ConfigError

__all__ = ["agent_commands", "sweep_points"]

# What the agent replaces in `command`; the others of its macros are for programs that are scripts.
_ENV, _ARGS = "${env}", "${args}"


def agent_commands(sweep: Path | Mapping[str, Any]) -> Iterator[list[str]]:
    """The command line of each point, as the agent starts it, without ``/usr/bin/env``.

    Args:
        sweep: A sweep file or its content.

    Raises:
        ConfigError: The sweep has no ``command`` with ``${args}``, or uses another macro.

    >>> parameters = {"model.lr": {"values": [0.1, 0.2]}, "seed_everything": {"value": 1}}
    >>> command = ["${env}", "fulgurite", "fit", "${args}"]
    >>> for command in agent_commands({"command": command, "parameters": parameters}):
    ...     print(*command)
    fulgurite fit --model.lr=0.1 --seed_everything=1
    fulgurite fit --model.lr=0.2 --seed_everything=1
    """
    if isinstance(sweep, Path):
        sweep = yaml.safe_load(sweep.read_text(encoding="utf-8"))
    assert not isinstance(sweep, Path)
    command = sweep.get("command") or []
    macros = [str(part) for part in command if "${" in str(part)]
    if _ARGS not in macros or set(macros) - {_ENV, _ARGS}:
        raise ConfigError(
            f"The sweep's command is {command}.",
            "Write it as [${env}, fulgurite, fit, --config, FILE, ${args}].",
        )
    for point in sweep_points(sweep):
        args = [f"--{name}={value}" for name, value in point.items()]
        parts = [args if part == _ARGS else [str(part)] for part in command if part != _ENV]
        yield list(itertools.chain.from_iterable(parts))


def sweep_points(sweep: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """All points of a grid; of a range (``min``, ``max``) its two ends.

    Args:
        sweep: Content of a sweep file.

    Raises:
        ConfigError: A parameter has neither ``value``, ``values`` nor ``min`` and ``max``.

    >>> list(sweep_points({"parameters": {"lr": {"min": 0.1, "max": 1.0}}}))
    [{'lr': 0.1}, {'lr': 1.0}]
    """
    choices: dict[str, list[Any]] = {}
    for name, spec in (sweep.get("parameters") or {}).items():
        if "value" in spec:
            choices[name] = [spec["value"]]
        elif spec.get("values"):
            choices[name] = list(spec["values"])
        elif "min" in spec and "max" in spec:
            choices[name] = [spec["min"], spec["max"]]
        else:
            raise ConfigError(
                f"The sweep's parameter {name!r} has no values.",
                "Give it `value`, `values`, or `min` and `max`.",
            )
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True))
