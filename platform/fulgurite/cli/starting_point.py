"""The checkpoint that a command begins with, and the run that it goes on with."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from fulgurite.checkpoints import batches_done, check_checkpoint
from fulgurite.errors import ConfigError
from fulgurite.io import checksum
from fulgurite.ranks import is_first_process
from fulgurite.resuming import ENDED, has_stopped
from fulgurite.run_folders import (
    CHECKPOINT_VARIABLE,
    LAST,
    LINKS,
    RunOptions,
    describe,
    differences,
    find_checkpoint,
    find_run,
    holds_run,
    identity_differences,
    recorded_config,
    run_folder_of,
    training_differences,
)
from fulgurite.tensor_files import load_plain

__all__ = ["StartFinder", "StartingPoint"]


@dataclass(frozen=True)
class StartingPoint:
    """The checkpoint that a command begins with.

    Args:
        path: The file; None where there is none.
        run: Its run folder, if it lies in one.
        continued: Whether ``fit`` goes on in that folder.
        ended: Whether that training has ended, with all of its records.
        facts: What is recorded of the checkpoint.
        sizes: What the data of its training determined of the model, as far as it says.
    """

    path: Path | None = None
    run: Path | None = None
    continued: bool = False
    ended: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, Any] = field(default_factory=dict)


def _trained_sizes(stored: Mapping[str, Any]) -> dict[str, Any]:
    """What the data of a training determined of the model, as far as its checkpoint says."""
    values = stored.get("hyper_parameters")
    return {k: values[k] for k in LINKS if k in values} if isinstance(values, Mapping) else {}


@dataclass(frozen=True)
class StartFinder:
    """Finds the checkpoint that a command begins with.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        section: Configuration of the command.
        options: Where its run is recorded.
        first_config: The first configuration file that it names.
    """

    command: str
    section: Namespace
    options: RunOptions
    first_config: Path | None

    def find(self, now: Mapping[str, Any]) -> StartingPoint:
        """The checkpoint that the command begins with, and whose it is.

        Args:
            now: The resolved configuration.

        Raises:
            CheckpointError: There is no such checkpoint, or nothing can go on from it.
            ConfigError: The checkpoint is of a training with other options.
        """
        checkpoint, command = self.section.get("ckpt_path"), self.command
        if checkpoint == "":  # of an unset variable of the shell
            raise ConfigError("--ckpt_path is empty.", "Name a checkpoint, or leave it out.")
        if not checkpoint:
            if command != "fit" and is_first_process():
                print(
                    f"note: no --ckpt_path: {command} takes the weights that the model is made "
                    "with, which are untrained unless its options name some",
                    file=sys.stderr,
                )
            return StartingPoint()
        options, fits = self.options, command == "fit"
        if checkpoint in ("last", "best"):
            inherited = os.environ.get(CHECKPOINT_VARIABLE) if "LOCAL_RANK" in os.environ else None
            if inherited:
                path = Path(inherited)
                run = run_folder_of(path)
            else:
                run = find_run(options, checkpoint, now, self.first_config)
                path = find_checkpoint(run, checkpoint)
        else:
            path = Path(checkpoint)
            run = run_folder_of(path) if path.is_file() else None
        stored = load_plain(path, "--ckpt_path", "Give a checkpoint, `last` or `best`.", mmap=True)
        check_checkpoint(stored, path, resumes=fits)
        self._say_differences(run, stored, now)
        facts = {
            "path": str(path.resolve()),
            "sha256": checksum(path),
            "epoch": int(stored.get("epoch", 0)),
            "step": int(stored.get("global_step", 0)),
        }
        if not fits:
            return StartingPoint(path, run, facts=facts, sizes=_trained_sizes(stored))
        target = self._resumed_folder(path, run)
        if target is None:
            return StartingPoint(path, run, facts=facts)
        self._check_same_training(target, path, stored, now)
        ended = (target / "summary.json").is_file() and self._nothing_left(stored)
        return StartingPoint(path, target, continued=True, ended=ended, facts=facts)

    def _resumed_folder(self, path: Path, run: Path | None) -> Path | None:
        """The folder in which a fit goes on, or None for a new one.

        Raises:
            ConfigError: ``--run.dir`` holds another run than that of the checkpoint.
        """
        options = self.options
        if options.new:
            return None
        if options.dir is None:
            if run is None:
                return None
            with suppress(ValueError):  # as the user would spell it
                return run.relative_to(Path.cwd().resolve())
            return run
        explicit = Path(options.dir)
        if not holds_run(explicit):
            return None
        if run is not None and run.resolve() != explicit.resolve():
            raise ConfigError(
                f"--run.dir={explicit} holds another run than that of --ckpt_path={path}.",
                "Leave --run.dir out to go on in the checkpoint's run, or name a new folder.",
            )
        return explicit

    def _check_same_training(
        self, run: Path, path: Path, stored: Mapping[str, Any], now: Mapping[str, Any]
    ) -> None:
        """Whether a fit may go on in the folder of a run.

        Raises:
            ConfigError: The run has other options, or has gone further than the checkpoint.
        """
        new = f"--ckpt_path={path} --run.new=true goes on in a new folder."
        if differing := training_differences(recorded_config(run), now):
            raise ConfigError(
                f"--ckpt_path={path} is of a training with other options: {describe(differing)}.",
                f"Resume with the options of the run, --config {run / 'config.yaml'}; with other "
                f"ones on purpose, {new}",
            )
        last = run / LAST
        if not last.is_file() or last.resolve() == path.resolve():
            return
        newest = load_plain(last, "--ckpt_path", mmap=True)
        reached, here = batches_done(newest), batches_done(stored)
        if reached is not None and here is not None and reached > here:
            raise ConfigError(
                f"--ckpt_path={path} was written after {here} batches, and its run has gone on to "
                f"{reached}: resuming it would lose them.",
                f"Resume with --ckpt_path={last}, or {new}",
            )

    def _nothing_left(self, stored: Mapping[str, Any]) -> bool:
        """Whether a checkpoint is of a stopped training, or of what the trainer's limits allow."""
        trainer = self.section.trainer
        epochs, steps = trainer.get("max_epochs"), trainer.get("max_steps")
        if epochs is None and steps in (None, -1):
            epochs = 1000  # Lightning's default
        loop = stored["loops"]["fit_loop"]
        done = int(loop["epoch_progress"]["current"]["processed"])
        callbacks = stored.get("callbacks") or {}
        stops = [state for name, state in callbacks.items() if name.startswith("EarlyStopping")]
        ended = any(isinstance(s, Mapping) and s.get(ENDED) is True for s in callbacks.values())
        if ended or any(map(has_stopped, stops)):
            return True
        in_epochs = epochs is not None and epochs >= 0 and done >= epochs
        in_steps = steps is not None and steps >= 0 and int(stored.get("global_step", 0)) >= steps
        return bool(in_epochs or in_steps)

    def _say_differences(
        self, run: Path | None, stored: Mapping[str, Any], now: Mapping[str, Any]
    ) -> None:
        """Print a line for each option that is not the one of the checkpoint's training."""
        if not is_first_process():
            return
        if run is not None:
            differing = identity_differences(recorded_config(run), now)
        else:
            model = dict((now.get("model") or {}).get("init_args") or {})
            hyper_parameters = dict(stored.get("hyper_parameters") or {})
            shared = [key for key in model if key in hyper_parameters and key not in LINKS]
            pairs = [{key: values[key] for key in shared} for values in (hyper_parameters, model)]
            differing = list(differences(pairs[0], pairs[1], "model.init_args"))
        for key, before, here in differing:
            print(
                f"note: the checkpoint was trained with {key}={before}; this run uses {here}",
                file=sys.stderr,
            )
