"""What a run has trained: its module with the weights of a checkpoint, and its DataModule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule

from fulgurite.checkpoints import check_checkpoint, describe_weights
from fulgurite.errors import CheckpointError, ConfigError
from fulgurite.loading import load
from fulgurite.masking import masked_names
from fulgurite.run_folders import (
    find_checkpoint,
    holds_run,
    recorded_config,
    recorded_environment,
    run_folder_of,
)
from fulgurite.tensor_files import load_plain

__all__ = ["TrainedRun", "load_trained_run", "locate_checkpoint"]

_HINT = "Name a run folder that `fulgurite fit` printed, or a checkpoint in one."


@dataclass(frozen=True)
class TrainedRun:
    """What a run has trained.

    Args:
        module: The module with the weights of the checkpoint, in evaluation mode on the CPU.
        data: The DataModule, made and not set up.
        data_state: What the checkpoint holds of it; empty for nothing.
        checkpoint: The file of the weights.
        folder: The run folder.
        epoch: Epoch of the checkpoint.
        step: Optimizer steps of the checkpoint.
        notes: What a user has to know of its weights.
    """

    module: LightningModule
    data: LightningDataModule
    data_state: Mapping[str, Any]
    checkpoint: Path
    folder: Path
    epoch: int
    step: int
    notes: Sequence[str] = ()


def locate_checkpoint(run: Path, which: str | None) -> tuple[Path, Path]:
    """Find the run folder and the checkpoint that a path means.

    Args:
        run: A run folder, or a checkpoint in one.
        which: ``last`` or ``best`` of a folder; None takes ``best`` where there is one.

    Raises:
        CheckpointError: There is no such run or checkpoint.
        ConfigError: A checkpoint is named, and which one of its folder as well; or the folder is of
            an evaluation.
    """
    if run.is_file():
        if which is not None:
            raise ConfigError(
                f"{run} is a checkpoint, and --ckpt_path={which} chooses one of a run folder.",
                "Leave --ckpt_path out, or name the run folder.",
            )
        folder = run_folder_of(run)
        if folder is None:
            raise CheckpointError(
                f"{run} lies in no run folder, so that nothing says what it is of.", _HINT
            )
        return folder, run
    if not holds_run(run):
        raise CheckpointError(f"{run} is no run folder and no checkpoint.", _HINT)
    command = recorded_environment(run).get("command", "fit")
    if command != "fit":
        evaluated = (recorded_environment(run).get("checkpoint") or {}).get("path")
        hint = f"Name {evaluated}, which it read." if evaluated else _HINT
        raise ConfigError(f"{run} is the record of `fulgurite {command}`, not of a training.", hint)
    if which is None:
        which = "best" if (run / "checkpoints" / "best.ckpt").is_file() else "last"
    return run, find_checkpoint(run, which)


def load_trained_run(run: Path, which: str | None = None) -> TrainedRun:
    """Make the module and the DataModule of a run, and load a checkpoint of it.

    Args:
        run: A run folder, or a checkpoint in one.
        which: ``last`` or ``best`` of a folder; None takes ``best`` where there is one.

    Raises:
        CheckpointError: There is no such run or checkpoint, or it does not fit the module.
        ConfigError: The record of the run cannot be used.
    """
    folder, checkpoint = locate_checkpoint(run, which)
    if hidden := masked_names(recorded_config(folder)):
        raise ConfigError(
            f"The value of {', '.join(hidden)} was masked when {folder / 'config.yaml'} was "
            "recorded, and the model cannot be made without it.",
            "Write it into a copy of the run folder.",
        )
    # neither loggers nor callbacks nor the strategy of the training are wanted here
    alone = {"logger": False, "callbacks": None, "strategy": "auto"}
    loaded = load(str(folder / "config.yaml"), trainer=alone)
    stored: dict[str, Any] = load_plain(checkpoint, "--ckpt_path", _HINT)
    check_checkpoint(stored, checkpoint, resumes=False)
    module = loaded.model
    module.on_load_checkpoint(stored)
    try:
        module.load_state_dict(stored["state_dict"])
    except RuntimeError as error:
        problem = " ".join(str(error).split())
        raise CheckpointError(
            f"{checkpoint} does not fit the model of its run: {problem[:300]}",
            f"{folder / 'config.yaml'} must be the record of the run that wrote it.",
        ) from error
    state = stored.get(type(loaded.data).__qualname__)  # Lightning's key
    return TrainedRun(
        module=module.cpu().eval(),
        data=loaded.data,
        data_state=state if isinstance(state, Mapping) else {},
        checkpoint=checkpoint,
        folder=folder,
        epoch=int(stored.get("epoch", 0)),
        step=int(stored.get("global_step", 0)),
        notes=describe_weights(stored, module),
    )
