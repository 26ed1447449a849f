"""The run and the checkpoint that a command goes on with."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fulgurite.errors import CheckpointError
from fulgurite.run_folders.differences import Difference, describe, identity_differences
from fulgurite.run_folders.folders import LAST, RunOptions, run_folder_of
from fulgurite.run_folders.records import holds_run, recorded_config, recorded_environment

__all__ = ["find_checkpoint", "find_run"]


def _order(folder: Path) -> tuple[str, int, str]:
    """Sorts runs by time, and those of one second by their number."""
    time_of_start = re.fullmatch(r"(\d{8}-\d{6})(?:-(\d+))?", folder.name)
    if time_of_start is None:
        return "", 0, folder.name
    return time_of_start[1], int(time_of_start[2] or 1), folder.name


def _fits(options: RunOptions) -> list[Path]:
    """The trainings of a name, newest first."""
    folders = [folder for folder in options.parent.glob("*") if holds_run(folder)]
    fits = [f for f in folders if recorded_environment(f).get("command", "fit") == "fit"]
    return sorted(fits, key=_order, reverse=True)


def _find_run_of_record(config: Path | None) -> Path | None:
    """The run whose record a configuration is.

    Raises:
        CheckpointError: The record is of an evaluation whose checkpoint is not known.
    """
    if config is None or not re.fullmatch(r"config(\.\d+)?\.yaml", config.name):
        return None
    folder = config.parent
    if not holds_run(folder):
        return None
    facts = recorded_environment(folder)
    if facts.get("command", "fit") == "fit":
        return folder
    evaluated = (facts.get("checkpoint") or {}).get("path")
    if evaluated and (run := run_folder_of(evaluated)):
        return run
    raise CheckpointError(
        f"{config} is the record of `fulgurite {facts.get('command')}`, not of a training.",
        "Name the run with --run.dir, or give the path of a checkpoint.",
    )


def find_run(
    options: RunOptions, which: str, now: Mapping[str, Any], config: Path | None = None
) -> Path:
    """The run that ``--ckpt_path=last`` or ``best`` belongs to.

    It is the run that ``--run.dir`` or the configuration's own folder names, else the newest
    training of the same name, model, data and seed.

    Args:
        options: Where runs are.
        which: ``last`` or ``best``.
        now: The resolved configuration of this command.
        config: The first configuration file of the command line.

    Raises:
        CheckpointError: There is no such run, or the newest one has no such checkpoint.
    """
    if options.dir is not None:
        return Path(options.dir)
    if named := _find_run_of_record(config):
        return named
    option = f"--ckpt_path={which}"
    fits = _fits(options)
    if not fits:
        raise CheckpointError(
            f"{option}: there is no run in '{options.parent}'.",
            "Run `fulgurite fit` with this configuration first, or give the path of a checkpoint.",
        )
    others: list[tuple[Path, list[Difference]]] = []
    same = None
    for folder in fits:
        if not (differing := identity_differences(recorded_config(folder), now)):
            same = folder
            break
        others.append((folder, differing))
    if same is None:
        folder, differing = others[0]
        raise CheckpointError(
            f"{option}: no run in '{options.parent}' has this model, data and seed; in the newest, "
            f"{folder}, {describe(differing)}.",
            f"Name a run: --run.dir={folder}, or --ckpt_path={folder / LAST}.",
        )
    if others:
        folder, differing = others[0]
        print(
            f"note: {option} is of {same}; in the newer {folder} {describe(differing)}",
            file=sys.stderr,
        )
    if not _checkpoint(same, which).is_file():
        older = next(
            (
                folder
                for folder in fits[fits.index(same) + 1 :]
                if _checkpoint(folder, which).is_file()
                and not identity_differences(recorded_config(folder), now)
            ),
            None,
        )
        checkpoints = ", ".join(sorted(map(str, same.glob("checkpoints/*.ckpt"))))
        hint = f"There is {checkpoints}" if checkpoints else f"Start it over with --run.dir={same}"
        raise CheckpointError(
            f"{option}: the newest run, {same}, has no checkpoint '{which}.ckpt'.",
            f"{hint}, or name an older one: --run.dir={older}." if older else f"{hint}.",
        )
    return same


def _checkpoint(folder: Path, which: str) -> Path:
    return folder / "checkpoints" / f"{which}.ckpt"


def find_checkpoint(folder: Path, which: str) -> Path:
    """The ``last`` or ``best`` checkpoint of a run.

    Raises:
        CheckpointError: The run has no such checkpoint.
    """
    file = _checkpoint(folder, which)
    if file.is_file():
        return file
    problem = f"--ckpt_path={which}: the run in '{folder}' has no checkpoint '{which}.ckpt'."
    if not holds_run(folder):
        raise CheckpointError(
            f"--ckpt_path={which}: there is no run in '{folder}'.",
            "Run `fulgurite fit` with this configuration first, or give the path of a checkpoint.",
        )
    checkpoints = sorted(folder.glob("checkpoints/*.ckpt"))
    if checkpoints:
        raise CheckpointError(problem, f"There is: {', '.join(map(str, checkpoints))}.")
    raise CheckpointError(
        problem,
        f"It ended before its first one: `fulgurite fit --run.dir={folder}` without --ckpt_path "
        "starts it over.",
    )
