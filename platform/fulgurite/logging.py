"""Figures to every logger through one helper."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.trainer.states import TrainerFn

from fulgurite import plotting
from fulgurite.plotting import MetricCurves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["TrainingCurves", "is_logger", "log_figure"]


class TrainingCurves:
    """Loss and validation metrics by epoch: a callback feeds it, and draws it at the end of a fit.

    Args:
        titles: Title of a panel by metric, such as ``train/loss`` and ``val/loss``.
    """

    def __init__(self, titles: Mapping[str, str]) -> None:
        self.curves = MetricCurves(titles)
        self._loss = torch.zeros(0)
        self._batches = 0

    def add_batch(self, outputs: Any) -> None:
        """Add the loss of a training batch; it stays on its device."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, torch.Tensor):
            loss = loss.detach().float()
            self._loss = loss if not self._batches else self._loss + loss
            self._batches += 1

    def end_epoch(self, trainer: Trainer) -> None:
        """Keep the mean loss of the epoch's batches on this rank."""
        if self._batches:
            mean = float(self._loss) / self._batches
            self.curves.add(trainer.current_epoch, {"train/loss": mean})
        self._batches = 0

    def end_validation(self, trainer: Trainer) -> None:
        """Keep the validation metrics of the epoch."""
        if not trainer.sanity_checking and trainer.state.fn == TrainerFn.FITTING:
            logged = trainer.callback_metrics
            validation = {name: value for name, value in logged.items() if name.startswith("val/")}
            self.curves.add(trainer.current_epoch, validation)

    def draw(self, trainer: Trainer) -> Path | None:
        """Write ``figures/training.png``."""
        if trainer.is_global_zero and (figure := self.curves.figure()):
            return log_figure(trainer, "training", figure)
        return None

    def state_dict(self) -> dict[str, Any]:
        """The curves of the epochs that have ended."""
        return self.curves.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them up again."""
        self.curves.load_state_dict(state_dict)


def is_logger(logger: Logger, kind: str) -> bool:
    """Whether a logger is of a kind, or a user's subclass of it; its package need not be there.

    Args:
        logger: One of the trainer's.
        kind: Name of a class of Lightning's, such as ``WandbLogger``.
    """
    return any(base.__name__ == kind for base in type(logger).__mro__)


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
    plotting.save_figure(figure, path)
    for logger in trainer.loggers:
        if is_logger(logger, "WandbLogger"):
            logger.log_image(f"figures/{name}", [str(path)])  # type: ignore[attr-defined]
        elif is_logger(logger, "TensorBoardLogger"):
            logger.experiment.add_figure(  # type: ignore[attr-defined]
                f"figures/{name}", figure, global_step=trainer.global_step
            )
    return path
