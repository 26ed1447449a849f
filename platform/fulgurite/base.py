"""The few things that every system's LightningModule shares."""

from __future__ import annotations

from typing import Any

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

    def log_evaluation(self, values: dict[str, Any], stage: str, batch_size: int) -> None:
        """Log ``{stage}/{name}`` over the epoch, weighted by the batch size.

        Args:
            values: Scalars or torchmetrics by name.
            stage: ``train``, ``val`` or ``test``.
            batch_size: Samples in this batch.
        """
        self.log_dict(
            {f"{stage}/{name}": value for name, value in values.items()},
            on_step=False,
            on_epoch=True,
            prog_bar=True,
            batch_size=batch_size,
            sync_dist=True,
        )
