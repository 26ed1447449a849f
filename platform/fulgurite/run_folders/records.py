"""The records that a run folder holds."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from fulgurite.errors import ConfigError
from fulgurite.io import write_text

__all__ = [
    "environment",
    "holds_run",
    "recorded_config",
    "recorded_environment",
    "set_records_aside",
    "write_json",
]


def holds_run(folder: Path) -> bool:
    """Whether a command has recorded itself in a folder."""
    return (folder / "config.yaml").is_file() and (folder / "environment.json").is_file()


def recorded_config(folder: Path) -> dict[str, Any]:
    """The resolved configuration that a run has recorded.

    Raises:
        ConfigError: The recorded configuration cannot be read.
    """
    file = folder / "config.yaml"
    try:
        content = yaml.load(file.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"The record {file} cannot be read ({reason}).", "Name another run with --run.dir."
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f"The record {file} is no configuration.", "Name another run.")
    return content


def recorded_environment(folder: Path) -> dict[str, Any]:
    """What ``environment.json`` of a run says; empty if it cannot be read."""
    try:
        content = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def set_records_aside(folder: Path, *, replaced: Iterable[str], ended: Iterable[str]) -> None:
    """Keep records of a run as ``config.1.yaml`` and so on.

    Args:
        folder: The run folder.
        replaced: Records that stay until new ones replace them, so that the folder always has one.
        ended: Records that are not true any more.
    """
    number = 1
    while (folder / f"config.{number}.yaml").exists():
        number += 1
    for name in (*replaced, *ended):
        file = folder / name
        archived = file.with_suffix(f".{number}{file.suffix}")
        if file.exists() and name in replaced:
            shutil.copy2(file, archived)
        elif file.exists():
            file.rename(archived)


def environment(
    seed: int | bool | None, command: str, argv: list[str] | None = None
) -> dict[str, Any]:
    """What is needed to say under which conditions a run was made."""
    from importlib import metadata

    import torch

    names = ("fulgurite", "torch", "lightning", "torchmetrics", "jsonargparse", "numpy", "wandb")
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": command,
        "argv": sys.argv[1:] if argv is None else argv,
        "seed": seed,
        "python": platform.python_version(),
        "system": platform.platform(),
        # torch's own version says which build it is
        "versions": {n: metadata.version(n) for n in names} | {"torch": torch.__version__},
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON so that a reader never sees half of it."""
    write_text(path, json.dumps(content, indent=2) + "\n")
