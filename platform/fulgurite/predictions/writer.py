"""The callback that writes predictions."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from fulgurite.predictions.file import PredictionFile

__all__ = ["PredictionWriter"]


class PredictionWriter(Callback):
    """Writes what ``predict_step`` returns to ``predictions.npz``, a file for each data loader.

    One loader and one process write ``predictions.npz``. Of several loaders each has a file
    ``predictions-loader0.npz`` …; of several processes each has ``predictions-0.npz`` … A
    prediction that breaks off leaves what it has in ``predictions.partial.npz``. Tables with names
    are called as these and end in ``.csv``.

    Args:
        folder: Where to; None only checks the outputs.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.files: dict[int, PredictionFile] = {}

    @override
    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write a batch.

        Raises:
            ConfigError: The output is of a kind that cannot be written, or unlike the first.
        """
        if dataloader_idx not in self.files:
            self.files[dataloader_idx] = self._open(trainer, pl_module, dataloader_idx)
        file = self.files[dataloader_idx]
        if self.folder is None:
            list(file.split(outputs))
        else:
            file.append(outputs)

    def _open(self, trainer: Trainer, pl_module: LightningModule, number: int) -> PredictionFile:
        several = trainer.predict_loop.num_dataloaders > 1
        loader = f"-loader{number}" if several else ""
        rank = f"-{trainer.global_rank}" if trainer.world_size > 1 else ""
        data = getattr(trainer, "datamodule", None)
        return PredictionFile(
            (self.folder or Path()) / f"predictions{loader}{rank}.npz",
            getattr(data, "prediction_names", None),
            f"{type(pl_module).__name__}.predict_step",
            getattr(data, "prediction_axes", None),
        )

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish the files, and name them."""
        files, self.files = self.files, {}
        for file in files.values():
            if self.folder is None:
                continue
            if file.close():
                print(f"predict: recorded in {file.path}")
                if file.table is not None and file.table.fault:
                    print(f"predict: there is no table with names: {file.table.fault}")
            else:
                print(f"predict: {file.who} returned nothing to write")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Keep what there is under a name that says that it is not all."""
        files, self.files = self.files, {}
        for file in files.values():
            file.path = file.path.with_name(f"{file.path.stem}.partial.npz")
            with suppress(OSError):  # such as a full disk: the exception itself is what matters
                if file.close():
                    print(
                        f"predict: {file.batches} batches that were done are in {file.path}",
                        file=sys.stderr,
                    )
