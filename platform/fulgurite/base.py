"""The few things that every system's LightningModule shares."""

from __future__ import annotations

from lightning.pytorch import LightningModule

__all__ = ["SystemModule"]


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
