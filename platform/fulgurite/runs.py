"""Run folders: ``runs/<system>/<name>/<stamp>/`` holds all that a run leaves behind.

========================  ==========================================================
``config.yaml``           the resolved configuration; ``--config`` takes it as it is
``environment.json``      versions, devices, seed, command line
``metrics.csv``           every logged metric
``summary.json``          the last value of each metric of a fit
``test_metrics.json``     the result of ``fulgurite test`` (likewise ``validate``)
``figures/``              every figure as PNG
``checkpoints/``          ``last.ckpt`` and, with a monitored metric, ``best.ckpt``
========================  ==========================================================
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from fulgurite.errors import CheckpointError, ConfigError
from fulgurite.io import atomic_write

__all__ = [
    "RunOptions",
    "environment",
    "find_checkpoint",
    "new_run_folder",
    "run_folder_of",
    "write_json",
]

RUN_DIR_VARIABLE = (
    "FULGURITE_RUN_DIR"  # tells the processes that a strategy launches where to write
)


@dataclass
class RunOptions:
    """Where a run is recorded.

    Args:
        root: Folder of all runs.
        system: First level below it; by default the folder of the first ``--config``.
        name: Second level; by default the stem of the first ``--config``.
        dir: The exact run folder instead of ``root/system/name/<time>``.
    """

    root: str = "runs"
    system: str | None = None
    name: str | None = None
    dir: str | None = None

    @property
    def parent(self) -> Path:
        """The folder in which the runs of this name lie side by side."""
        return Path(self.root) / (self.system or "custom") / (self.name or "run")


def _free(folder: Path) -> Path:
    """``folder`` itself, or the first of ``folder-2``, ``folder-3`` … that does not exist."""
    candidate, number = folder, 1
    while True:
        try:
            candidate.mkdir(parents=True)
            return candidate
        except FileExistsError:
            number += 1
            candidate = folder.with_name(f"{folder.name}-{number}")


def new_run_folder(options: RunOptions, command: str, *, resumes: bool) -> Path:
    """Make the folder of a run; never one that another run has written.

    Processes that a distributed strategy launches get the folder of the process that launched
    them. With an explicit ``dir``, ``fit`` takes that folder (which must be new, unless a fit is
    resumed in it: then the earlier records are kept as ``metrics.1.csv`` and so on), and the
    other commands take a folder of their own inside it.

    Raises:
        ConfigError: If ``dir`` already holds a run, or is missing under torchrun.
    """
    if (inherited := os.environ.get(RUN_DIR_VARIABLE)) and "LOCAL_RANK" in os.environ:
        return Path(inherited)
    if int(os.environ.get("RANK", "0")) and "TORCHELASTIC_RUN_ID" in os.environ:
        if options.dir is None:
            raise ConfigError(
                "Processes that torchrun starts cannot agree on a new run folder.",
                "Name it: --run.dir=FOLDER.",
            )
        return Path(options.dir)  # rank 0 makes it
    if options.dir is None:
        suffix = "" if command == "fit" else f"-{command}"
        folder = _free(options.parent / (time.strftime("%Y%m%d-%H%M%S") + suffix))
    elif command != "fit":
        folder = _free(Path(options.dir) / command)
    else:
        folder = Path(options.dir)
        if (folder / "config.yaml").exists():
            if not resumes:
                raise ConfigError(
                    f"--run.dir={folder} already holds a run.",
                    "Name another folder, or resume it with --ckpt_path=last.",
                )
            _set_aside(folder)
        folder.mkdir(parents=True, exist_ok=True)
    os.environ[RUN_DIR_VARIABLE] = str(folder.resolve())
    return folder


def _set_aside(folder: Path) -> None:
    """Rename the records of an interrupted run so that the resumed one does not replace them."""
    number = 1
    while (folder / f"config.{number}.yaml").exists():
        number += 1
    for name in ("config.yaml", "metrics.csv", "environment.json"):
        if (file := folder / name).exists():
            file.rename(file.with_suffix(f".{number}{file.suffix}"))


def run_folder_of(checkpoint: str | Path) -> Path | None:
    """The run folder that a checkpoint lies in, or None."""
    for folder in Path(checkpoint).resolve().parents:
        if (folder / "config.yaml").is_file():
            return folder
    return None


def find_checkpoint(options: RunOptions, which: str) -> Path:
    """The ``last`` or ``best`` checkpoint of the newest run of this name that has one.

    Raises:
        CheckpointError: If there is none.
    """
    folders = [Path(options.dir)] if options.dir else sorted(options.parent.glob("*"), reverse=True)
    for folder in folders:
        file = folder / "checkpoints" / f"{which}.ckpt"
        if file.is_file():
            return file
    place = options.dir or options.parent
    raise CheckpointError(
        f"--ckpt_path={which}: no run in '{place}' has a checkpoint '{which}.ckpt'.",
        "Run `fulgurite fit` with this configuration first, or give the path of a checkpoint.",
    )


def environment(seed: int | bool | None, command: str) -> dict[str, Any]:
    """What is needed to say under which conditions a run was made."""
    import torch

    names = ("fulgurite", "torch", "lightning", "torchmetrics", "jsonargparse", "numpy", "wandb")
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": command,
        "argv": sys.argv[1:],
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
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        Path(temporary).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
