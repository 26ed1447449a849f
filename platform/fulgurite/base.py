"""The few things that every system's LightningModule shares."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

from lightning.pytorch import LightningModule
from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR, LRScheduler, ReduceLROnPlateau, SequentialLR

from fulgurite.errors import ConfigError

__all__ = ["SystemModule", "save_options", "scheduled"]


class SystemModule(LightningModule):
    """A LightningModule that says which metric its checkpoints are chosen by.

    Attributes:
        monitor: Logged metric by which ``best.ckpt`` is chosen; None keeps only the last one.
        mode: ``min`` or ``max``.

    Any other LightningModule works with the command line as well; it gets ``last.ckpt`` only,
    unless its configuration adds a ``ModelCheckpoint``.
    """

    monitor: str | None = None
    mode: str = "min"


def save_options(owner: HyperparametersMixin, *objects: str, logger: bool = True) -> None:
    """``save_hyperparameters()`` for constructors that are given objects; call it there.

    The command line records how objects are made, as plain values. Objects given from Python are
    left out: they would make the checkpoint unreadable with ``weights_only=True``, and be copied.

    Args:
        owner: The module or DataModule that is being constructed.
        objects: Arguments that may be objects.
        logger: Whether loggers get the values.
    """
    frame = inspect.currentframe()
    constructor = frame.f_back if frame else None
    owner.save_hyperparameters(ignore=objects, frame=constructor, logger=logger)
    if "_instantiator" in owner.hparams:  # by the command line
        owner.save_hyperparameters(frame=constructor, logger=logger)


def scheduled(
    optimizer: Optimizer,
    scheduler: Callable[[Optimizer], LRScheduler | ReduceLROnPlateau] | None,
    interval: Literal["step", "epoch"],
    warmup: int = 0,
) -> Any:
    """What ``configure_optimizers`` returns: the optimizer, with its scheduler if there is one.

    Args:
        optimizer: Made already.
        scheduler: Makes the scheduler, such as a ``LRSchedulerCallable``.
        interval: How often it steps.
        warmup: Intervals in which the rate rises linearly before the scheduler's; 0 for none.

    Raises:
        ConfigError: The scheduler waits for a metric.
    """
    parts: list[LRScheduler] = []
    if warmup:
        parts.append(LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup))
    if scheduler is not None:
        made = scheduler(optimizer)
        if isinstance(made, ReduceLROnPlateau):
            raise ConfigError(
                f"ReduceLROnPlateau waits for a metric, and schedulers step after each {interval}.",
                "Set --model.init_args.scheduler to another one, or to null.",
            )
        parts.append(made)
    if not parts:
        return optimizer
    if len(parts) == 2:
        parts = [SequentialLR(optimizer, parts, [warmup])]
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": parts[0], "interval": interval}}
