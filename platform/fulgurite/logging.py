"""Figures to every logger through one helper."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer

from fulgurite.io import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["log_figure"]


def log_figure(trainer: Trainer, name: str, figure: Figure) -> Path | None:
    """Write a figure to the run folder and to each logger that shows pictures.

    Args:
        trainer: The trainer whose loggers are meant; only rank 0 writes.
        name: File name without ending; the loggers show it as ``figures/<name>``.
        figure: The figure.

    Returns:
        The PNG file, or None on other ranks and without a run folder.
    """
    # not trainer.log_dir: that one is broadcast, and only rank 0 comes here
    folder = trainer.logger.log_dir if trainer.logger else None
    if not trainer.is_global_zero or not folder:
        return None
    path = Path(folder) / "figures" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")
    for logger in trainer.loggers:
        kind = type(logger).__name__
        if kind == "WandbLogger":
            logger.log_image(f"figures/{name}", [str(path)])  # type: ignore[attr-defined]
        elif kind == "TensorBoardLogger":
            logger.experiment.add_figure(  # type: ignore[attr-defined]
                f"figures/{name}", figure, global_step=trainer.global_step
            )
    return path
