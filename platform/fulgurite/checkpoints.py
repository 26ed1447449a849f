"""Checkpoints that are whole or not there, and that belong to the run whose folder they lie in."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from fulgurite.errors import CheckpointError, ConfigError
from fulgurite.tensor_files import load_plain, save_plain

__all__ = [
    "CheckpointFiles",
    "RunCheckpoint",
    "batches_done",
    "check_checkpoint",
    "check_file_names",
    "describe_weights",
]

_HINT = "Give a checkpoint of a training, `last` or `best`."


class CheckpointFiles(TorchCheckpointIO):
    """Writes a checkpoint beside its target with a digest, and checks the digest when it reads.

    The target is replaced in one step, so that a process that is killed, or a disk that is full,
    leaves the checkpoint that was there before.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any = None
    ) -> None:
        """Write a checkpoint; places that are no local files are left to Lightning.

        Raises:
            RunError: The checkpoint cannot be written.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        save_plain(checkpoint, path)

    def load_checkpoint(
        self, path: _PATH, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint onto the CPU, without executing anything in it.

        Raises:
            CheckpointError: The file is damaged, or holds other types than tensors and plain ones.
        """
        stored: dict[str, Any] = load_plain(str(path), "--ckpt_path", _HINT)
        return stored


class RunCheckpoint(ModelCheckpoint):
    """A checkpoint of the run's own folder, which may be moved or copied as a whole.

    Its state holds the names of its files without the folder they lie in.

    Args:
        continued: Whether the folder is that of the run that the training goes on with; else the
            best score counts from here on.
        options: Options of ``ModelCheckpoint``, with ``dirpath``.
    """

    def __init__(self, *, continued: bool, **options: Any) -> None:
        super().__init__(**options)
        self.continued = continued

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder, which a resumed run has filled already."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*exists and is not empty")
            super().setup(trainer, pl_module, stage)

    def state_dict(self) -> dict[str, Any]:
        """Scores and file names."""
        state = super().state_dict()
        state["dirpath"] = ""
        for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
            state[key] = Path(state[key]).name
        state["best_k_models"] = {Path(k).name: v for k, v in state["best_k_models"].items()}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the scores of the run, if it is the same run."""
        if not self.continued:
            return
        state, folder = dict(state_dict), Path(str(self.dirpath))
        state["dirpath"] = self.dirpath
        for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
            state[key] = str(folder / state[key]) if state[key] else ""
        state["best_k_models"] = {str(folder / k): v for k, v in state["best_k_models"].items()}
        super().load_state_dict(state)


def check_file_names(callbacks: Sequence[Callback]) -> None:
    """Refuse a checkpoint of the user's that would share its file with that of the last epoch.

    Raises:
        ConfigError: A ``ModelCheckpoint`` writes ``last.ckpt`` into the run folder.
    """
    for callback in callbacks:
        if not isinstance(callback, ModelCheckpoint) or callback.dirpath is not None:
            continue
        if callback.filename == "last":
            raise ConfigError(
                "The ModelCheckpoint of trainer.callbacks has filename=last, where each run writes "
                "its last epoch: what it had kept would be lost.",
                "Give it another filename, or a dirpath.",
            )


def batches_done(checkpoint: Mapping[str, Any]) -> int | None:
    """Training batches that were done when a checkpoint was written; None if it does not say."""
    try:
        return int(
            checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"]
        )
    except (KeyError, TypeError, ValueError):
        return None


def check_checkpoint(stored: Any, path: str | Path, *, resumes: bool) -> None:
    """Whether a file holds what Lightning reads of a checkpoint.

    Args:
        stored: Content of the file.
        path: The file, for errors.
        resumes: Whether a training goes on from it.

    Raises:
        CheckpointError: The content is not that of a checkpoint, or lacks a state to resume from.
    """
    option = f"--ckpt_path={path}"
    if not isinstance(stored, Mapping):
        raise CheckpointError(f"{option} holds a {type(stored).__name__}, no checkpoint.", _HINT)
    weights = stored.get("state_dict")
    if not isinstance(weights, Mapping) or "pytorch-lightning_version" not in stored:
        raise CheckpointError(
            f"{option} is no checkpoint of a Lightning training.",
            f"{_HINT} Weights alone are read by the model's own option for them, if it has one.",
        )
    if not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
        raise CheckpointError(f"{option} has weights that are no tensors.", _HINT)
    for name in ("epoch", "global_step"):
        if not isinstance(stored.get(name, 0), int):
            raise CheckpointError(f"{option} has under '{name}' no whole number.", _HINT)
    if not resumes:
        return
    is_whole = all(isinstance(stored.get(k), list) for k in ("optimizer_states", "lr_schedulers"))
    is_whole &= isinstance(stored.get("callbacks"), Mapping)  # best scores, rounds
    if not is_whole or batches_done(stored) is None:
        raise CheckpointError(
            f"{option} holds weights, but not the state of their training (optimizers, loops, "
            "callbacks): nothing can go on from it.",
            "Give a whole checkpoint, such as last.ckpt.",
        )


def describe_weights(stored: Mapping[str, Any], module: LightningModule) -> list[str]:
    """What a user has to know of the weights that a module takes from a checkpoint.

    Args:
        stored: Content of the checkpoint.
        module: The module that has taken it up.

    Returns:
        Sentences without a full stop: weights that are not a number, and values that are rounded.

    Raises:
        CheckpointError: A weight is complex, and the module's is not.
    """
    sentences = []
    if broken := _nan_tensors(stored, module):
        sentences.append(f"the checkpoint's {', '.join(broken[:3])} is not a number")
    weights = stored.get("state_dict") or {}
    kinds: dict[tuple[torch.dtype, torch.dtype], str] = {}
    for name, tensor in module.state_dict().items():
        if isinstance(tensor, torch.Tensor) and isinstance(weights.get(name), torch.Tensor):
            kinds.setdefault((weights[name].dtype, tensor.dtype), name)
    for (before, now), name in kinds.items():
        if before.is_complex and not now.is_complex:
            raise CheckpointError(
                f"The checkpoint's {name} is complex, and the model's is {now}.", _HINT
            )
        if torch.promote_types(before, now) != now:
            sentences.append(
                f"the checkpoint's weights such as {name} are {before}, and are rounded to {now}"
            )
    return sentences


def _nan_tensors(stored: Mapping[str, Any], module: LightningModule) -> list[str]:
    """Names of the module's parameters that are not a number in a checkpoint.

    Strategies that divide parameters among ranks have put the weights into the module already, and
    leave them out of what is passed on; each rank then looks at its own part.
    """
    weights = stored.get("state_dict")
    if weights is None:
        weights = {
            name: parameter.to_local() if hasattr(parameter, "to_local") else parameter
            for name, parameter in module.named_parameters()
        }
    return [
        name
        for name, _ in module.named_parameters()
        if name in weights and bool(torch.isnan(weights[name]).any())
    ]
