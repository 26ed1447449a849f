"""Options of the trainer that Lightning takes without a look at their values."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer

from fulgurite.errors import ConfigError

__all__ = ["check_trainer_options", "describe_limit", "has_run"]

# by which Lightning divides without a look at them
_POSITIVE = ("accumulate_grad_batches", "check_val_every_n_epoch")


def check_trainer_options(config: Mapping[str, Any]) -> None:
    """Refuse options of the trainer that Lightning would fail at, or ignore, in the middle.

    Raises:
        ConfigError: A count is not positive, or nothing is to be recorded.
    """
    if (interval := config.get("val_check_interval")) is not None and interval == 0:
        raise ConfigError(
            "trainer.val_check_interval is 0.",
            "Give a number of batches, or a share of an epoch; trainer.limit_val_batches=0 leaves "
            "validation out.",
        )
    for name in _POSITIVE:
        if (count := config.get(name)) is not None and count < 1:
            raise ConfigError(f"trainer.{name} is {count}.", "Give a whole number from 1 on.")
    if config.get("barebones"):
        raise ConfigError(
            "trainer.barebones=true leaves out all records and checkpoints, which each run has.",
            "Leave it out; trainer.profiler=simple says where the time goes.",
        )


def describe_limit(trainer: Trainer) -> str:
    """What a limit of batches leaves out of an evaluation or a prediction; empty for nothing.

    The limit may be one of the training, whose recorded configuration is taken again.
    """
    command = "" if trainer.state.fn is None else trainer.state.fn.value
    part = {"validate": "val"}.get(command, command)
    loaders = getattr(trainer, f"{part}_dataloaders", None)
    counts = getattr(trainer, f"num_{part}_batches", [])
    sizes = [_count_batches(x) for x in (loaders if isinstance(loaders, list) else [loaders])]
    if len(sizes) != len(counts) or all(map(operator.ge, counts, sizes)):
        return ""
    return (
        f"note: trainer.limit_{part}_batches={getattr(trainer, f'limit_{part}_batches')}: "
        f"{sum(counts)} of {sum(sizes)} batches were taken"
    )


def _count_batches(loader: Any) -> int:
    try:
        return len(loader)
    except TypeError:  # of no known length
        return 0


def has_run(trainer: Trainer) -> bool:
    """Whether the trainer's command had a batch at all."""
    command = "" if trainer.state.fn is None else trainer.state.fn.value
    if command == "fit":
        return trainer.fit_loop.total_batch_idx >= 0
    batches = {
        "validate": trainer.num_val_batches,
        "test": trainer.num_test_batches,
        "predict": trainer.num_predict_batches,
    }
    return any(batches.get(command, []))
