"""The files and figures of completed stacks, and the figures of their errors."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray
from typing_extensions import override

from fulgurite.domains.ice_layers.codes import METRES
from fulgurite.errors import ConfigError
from fulgurite.io import checksum
from fulgurite.logging import TrainingCurves, log_figure
from fulgurite.models.ice_layers.output.figures import (
    calibration_figure,
    depth_figure,
    layers_figure,
)
from fulgurite.models.ice_layers.output.netcdf import check_attributes, write_netcdf
from fulgurite.models.ice_layers.output.origin import Origin
from fulgurite.models.ice_layers.output.stacks import (
    CompletedStack,
    StackMetadata,
    completed_stacks,
    file_names,
    read_npz,
    write_npz,
)
from fulgurite.models.ice_layers.training.metrics import CompletionMetrics
from fulgurite.sampling import rank_and_world

__all__ = ["CompletionWriter", "DrawnStack", "choose_drawn_stacks"]

_FILLED = {"thickness", "provenance", "std"}


class DrawnStack(NamedTuple):
    """A stack that may be drawn, and its true thickness (N, L) [m], where it is known."""

    stack: CompletedStack
    truth: NDArray[np.float64] | None

    @property
    def rank(self) -> tuple[bool, int, str]:
        """Those that lack most come first; without any pick there is nothing to compare."""
        observed = self.stack.observed
        return not observed.any(), -int((~observed).sum()), self.stack.stack


def choose_drawn_stacks(stacks: Sequence[DrawnStack], count: int) -> list[DrawnStack]:
    """Choose the stacks that lack most, the same ones in whatever order they come.

    Args:
        stacks: Those that may be drawn.
        count: How many are chosen at most.
    """
    return sorted(stacks, key=lambda drawn: drawn.rank)[:count]


class CompletionWriter(Callback):
    """Writes each stack that ``fulgurite predict`` completes, and figures of all commands.

    A stack is written as soon as its batch is done, to ``completed/`` in the run folder, as npz
    and NetCDF. It names the flight segments that the model has seen, so that a downstream test
    can refuse them. Drawn are the stacks that lack most, of those that have a pick.

    Args:
        netcdf: Whether to write NetCDF files with CF attributes.
        npz: Whether to write npz files, as read by
            :class:`~fulgurite.datamodules.ice_layers.CompletedStacks`.
        folder: Folder of the files, relative to the run folder.
        figures: Stacks that are drawn; 0 for no figure at all.
        csarp_layer: Write the CSARP_layer files that were read again, with completed boundaries
            where none was picked, into ``CSARP_layer`` beside the other files. Picks stay what
            they were, to the bit; completed boundaries are of type 2 (automatic) and quality 3
            (derived). Needs ``npz``.
        attributes: Further attributes of NetCDF files that only you know, such as ``license``,
            ``institution`` and ``creator_name``.

    Raises:
        ConfigError: A number is out of range, the model completes nothing, or the source reads no
            layer files.

    Source: docs/papers/ice_layers.md sections 1.7 and 5 (a flag for every filled value).
    """

    def __init__(
        self,
        netcdf: bool = True,
        npz: bool = True,
        folder: str = "completed",
        figures: int = 4,
        *,
        csarp_layer: bool = False,
        attributes: dict[str, str] = {},  # noqa: B006  # copied below
    ) -> None:
        if figures < 0:
            raise ConfigError(
                f"CompletionWriter.figures={figures} is negative.", "Give 0 or more stacks."
            )
        if csarp_layer and not npz:
            raise ConfigError(
                "CompletionWriter.csarp_layer=true, and npz=false, of which layer files are made.",
                "Set npz=true.",
            )
        self.csarp_layer = csarp_layer
        self.netcdf, self.npz, self.folder, self.figures = netcdf, npz, folder, figures
        self.attributes = check_attributes(attributes)
        self.written = 0
        self._origin = Origin()
        self._drawn: list[DrawnStack] = []
        self._numbers: list[int] = []
        self._file_names: list[str] = []  # by the number of the stack
        self._folder: Path | None = None
        self.curves = TrainingCurves(
            {
                "train/loss": "mean loss of training batches",
                "val/heldout_mae": "error of held-out entries",
                "val/mae": "error of deep layers",
            }
        )

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the loss for the figure."""
        self.curves.add_batch(outputs)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the loss of the epoch for the figure."""
        self.curves.end_epoch(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the errors of the epoch for the figure."""
        self.curves.end_validation(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw loss and errors by epoch, unless nothing is learned by gradients."""
        if self.figures and getattr(pl_module, "monitor", None):
            titles = self.curves.curves.titles  # the unit is known when the data are
            for name in titles.keys() & {"val/heldout_mae", "val/mae"}:
                titles[name] = f"{titles[name].split(' [')[0]} [{_unit(trainer)}]"
            self.curves.draw(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Loss and errors by epoch."""
        return {"curves": self.curves.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the curves."""
        self.curves.load_state_dict(state_dict.get("curves", {}))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the counters and note what the stacks are made of."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        source = getattr(data, "source", None)
        made_by = trainer.ckpt_path or getattr(pl_module, "weights", None)
        self._origin = Origin(
            source=getattr(source, "description", ""),
            checkpoint=Path(made_by).name if made_by else "",
            checkpoint_sha256=checksum(made_by) if made_by else "",
            age_source=getattr(source, "age_source", ""),
            climate_files=tuple(getattr(source, "climate_files", ())),
            attributes=self.attributes,
        )
        self.written, self._drawn, self._numbers = 0, [], []
        self._file_names = file_names(getattr(data, "stacks", ()))
        log_dir = trainer.logger.log_dir if trainer.logger else None
        # ranks that start later see another one as free
        log_dir = trainer.strategy.broadcast(log_dir)
        self._folder = None if log_dir is None else Path(log_dir) / self.folder
        if self.csarp_layer and self._folder is not None:
            data.check_write_back(self._folder / "CSARP_layer")

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
        """Write and draw the stacks of a batch."""
        if (folder := self._folder) is None:
            return
        self._numbers += batch.stack.tolist()
        truth = getattr(batch, "truth", None)
        first = 0
        stacks = self._stacks(trainer, pl_module, outputs, batch)
        for number, stack in zip(batch.stack.tolist(), stacks, strict=True):
            rows = slice(first, first := first + len(stack.distance))
            path = folder / self._file_names[number]
            if self.npz:
                write_npz(path.with_name(f"{path.name}.npz"), stack)
            if self.netcdf:
                write_netcdf(path.with_name(f"{path.name}.nc"), stack)
            self.written += 1
            if self.figures:
                stack_truth = None if truth is None else truth[rows].cpu().numpy()
                self._drawn = choose_drawn_stacks(
                    [*self._drawn, DrawnStack(stack, stack_truth)], self.figures
                )

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the stacks that lack most, and write layer files, of all ranks."""
        drawn, numbers = self._drawn, self._numbers
        if (world := rank_and_world()[1]) > 1:
            everyone: list[Any] = [None] * world
            dist.all_gather_object(everyone, (drawn, numbers))
            drawn = choose_drawn_stacks(
                [stack for part, _ in everyone for stack in part], self.figures
            )
            numbers = [number for _, part in everyone for number in part]
        if self.csarp_layer and trainer.is_global_zero and (folder := self._folder):
            data: Any = trainer.datamodule  # type: ignore[attr-defined]

            def read(number: int) -> NDArray[np.float64]:
                return read_npz(folder / f"{self._file_names[number]}.npz").thickness

            rank_zero_info(data.write_back(folder / "CSARP_layer", numbers, read))
        names = file_names([stack.stack for stack, _ in drawn])
        for name, (stack, truth) in zip(names, drawn, strict=True):
            log_figure(trainer, f"completed_{name}", layers_figure(stack, truth))
        self._drawn = []

    def _stacks(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any
    ) -> list[CompletedStack]:
        if not isinstance(outputs, dict) or not outputs.keys() >= _FILLED:
            raise ConfigError(
                f"{type(pl_module).__name__} completes no stacks, so CompletionWriter has nothing "
                "to write.",
                "Leave fulgurite.callbacks.ice_layers.CompletionWriter out of trainer.callbacks.",
            )
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        trained_segments = getattr(pl_module, "trained_segments", None)
        metadata = StackMetadata(
            data.segments,
            data.stacks,
            physics_names=data.physics,
            layer_names=data.layer_names,
            layer_age=data.layer_age,
            unit=_unit(trainer),
        )
        return completed_stacks(
            batch,
            outputs,
            metadata,
            trained_segments=trained_segments or _name_segments(data),
            details=data.describe_traces,
            labels=getattr(data, "describe_layers", None),
            origin=self._origin,
        )

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the error by depth, and how often intervals hold what they promise."""
        metrics = getattr(pl_module, "metrics", None)
        if not (self.figures and trainer.is_global_zero and isinstance(metrics, CompletionMetrics)):
            return
        name = type(pl_module).__name__
        if by_depth := metrics.by_depth():
            log_figure(trainer, "test_depth", depth_figure({name: by_depth}, _unit(trainer)))
        if coverage := metrics.calibration():
            log_figure(trainer, "test_calibration", calibration_figure({name: coverage}))


def _unit(trainer: Trainer) -> str:
    """Unit of the data's thicknesses."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    return getattr(data, "unit", METRES)


def _name_segments(data: Any) -> tuple[str, ...]:
    """Segments of the data's training and validation stacks; none where they are not known."""
    segments: set[str] = set()
    with suppress(AttributeError, KeyError):
        segments = {s.segment for part in ("train", "val") for s in data.stacks_of(part)}
    return tuple(sorted(segments))
