"""Trainers that write and print nothing, which most tests of modules and callbacks need."""

from typing import Any

from lightning.pytorch import Trainer


def quiet_trainer(**options: Any) -> Trainer:
    """A trainer on one CPU without logger, checkpoints, bar, summary and sanity check.

    Args:
        options: Of the trainer; they count before those.
    """
    quiet = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
    }  # fmt: skip
    return Trainer(**{**quiet, **options})
