"""Adaptation of a plate classifier to each plate's controls, and records of its tests.

Axes: L queries, N controls, C channels, H W image, S plate statistics.
"""

from __future__ import annotations

import csv
import math
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DistributedSampler
from typing_extensions import override

import fulgurite
from fulgurite.domains.cs_arm_bn import PlateBatch
from fulgurite.errors import ConfigError
from fulgurite.io import atomic_write, to_file_name
from fulgurite.logging import TrainingCurves, log_figure
from fulgurite.models.cs_arm_bn.metrics import (
    Predictions,
    accuracy_by_domain,
    class_scores,
    confusion,
)
from fulgurite.models.cs_arm_bn.modes import compare_modes
from fulgurite.models.cs_arm_bn.module import PlateClassifier
from fulgurite.models.cs_arm_bn.profiles import outlier_score, plate_profile
from fulgurite.models.cs_arm_bn.statistics_files import locate_statistics, read_statistics
from fulgurite.options import NonNegativeFloat, check_arguments
from fulgurite.plotting import heatmap, new_figure
from fulgurite.run_folders import write_json

#: Smallest number of batches before training and test mode are compared (momentum 0.1: 0.5 % is
#: older), ratio of their losses that gives a warning, and fraction of the chance loss below which
#: losses count as equal.
_MIN_BATCHES, _MAX_MODE_RATIO, _MIN_LOSS = 50, 3.0, 0.1

__all__ = ["ControlContext", "read_statistics"]


class ControlContext(Callback):
    """Adapts a :class:`PlateClassifier` to each plate's controls, and tells which plates to doubt.

    Before the first batch of a plate in prediction, a method that uses controls adapts to them once
    (see :class:`~fulgurite.models.cs_arm_bn.AdaptationOptions`), and the statistics are written
    beside the predictions, with their provenance. Controls that are unlike those of all training
    plates give a warning. After training, another one tells if the loss of a batch differs by a
    factor of three between training mode and test mode.

    Args:
        statistics: Folder with statistics of an earlier prediction, for plates without controls.
        outlier_above: Distance of a plate's controls from the training plates that gives a
            warning, in robust standard deviations; 0 for no warning.
        figures: Draw loss and accuracy when training ends, confusion matrices and plates when a
            test ends. The scores of each class are always written (``classes_<set>.csv``).

    Raises:
        ConfigError: A number is out of range, or the model does not fit.

    Source: docs/papers/cs_arm_bn.md sections 7.5 and 7.6.
    """

    def __init__(
        self,
        statistics: str | None = None,
        outlier_above: NonNegativeFloat = 8.0,
        figures: bool = True,
    ) -> None:
        check_arguments(ControlContext.__init__, locals(), "trainer.callbacks")
        self.statistics = statistics
        self.outlier_above, self.figures = outlier_above, figures
        self.profiles: dict[str, Tensor] = {}
        self.outliers: dict[str, float] = {}
        self._checked: set[str] = set()
        self._weights: dict[int, list[Tensor]] = {}
        self._repeated: dict[int, list[Tensor]] = {}  # weights of batches that another rank has too
        self._last_batch: PlateBatch | None = None
        self._trained_batches = 0
        #: Loss of the last training batch in training mode and in test mode, after training.
        self.mode_losses: tuple[float, float] | None = None
        self.curves = TrainingCurves(
            {
                "train/loss": "mean loss of training batches",
                "val/loss": "validation loss",
                "val/acc": "validation accuracy",
            }
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the model fits."""
        if not isinstance(pl_module, PlateClassifier):
            raise ConfigError(
                f"ControlContext cannot adapt a {type(pl_module).__name__}.",
                "Use model.class_path=fulgurite.models.cs_arm_bn.PlateClassifier.",
            )

    # --- training ------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check each plate once in an epoch."""
        self._start_epoch()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Record the profile of the plate's controls."""
        assert isinstance(pl_module, PlateClassifier)
        if not (self.outlier_above and len(batch.control_row)):
            return
        if (name := pl_module.plate_name(batch.domain)) not in self.profiles:
            self.profiles[name] = plate_profile(batch.control).cpu()

    def on_train_batch_end(  # noqa: PLR0917 (Lightning's hook)
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the loss for the figure."""
        self.curves.add_batch(outputs)
        self._trained_batches += 1
        self._last_batch = batch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the epoch's loss for the figure."""
        self.curves.end_epoch(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw loss and accuracy by epoch; compare the losses in training and test mode."""
        if self.figures:
            self.curves.draw(trainer)
        self._compare_modes(trainer, pl_module)

    def _compare_modes(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if a batch has very different losses in training and test mode."""
        assert isinstance(pl_module, PlateClassifier)
        batch, self._last_batch = self._last_batch, None
        if batch is None or self._trained_batches < _MIN_BATCHES:
            return  # too few batches for running statistics
        with trainer.precision_plugin.forward_context():
            training, test = self.mode_losses = compare_modes(pl_module, batch)
        min_loss = _MIN_LOSS * math.log(pl_module.num_classes)
        low, high = sorted(max(loss, min_loss) for loss in (training, test))
        if high > _MAX_MODE_RATIO * low:
            method = pl_module.method
            warnings.warn(
                f"On one batch, {type(method).__name__} has the loss {training:.2g} in training "
                f"mode (statistics: {method.train_source}) and {test:.2g} in test mode "
                f"({method.test_source}): what is tested is not what was trained. Let the two "
                "agree: training on mixed plates (data.init_args.episodes.mixed=true) for running "
                "statistics, or a method whose statistics come from the plate in both.",
                stacklevel=2,
            )

    # --- evaluation ----------------------------------------------------------------------------

    def _start_epoch(self) -> None:
        self._checked, self._weights, self._repeated = set(), {}, {}

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check each plate once in an epoch."""
        self._start_epoch()

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check each plate once in an epoch."""
        self._start_epoch()

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check each plate once in a prediction."""
        self._start_epoch()

    @override
    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Check the controls of the batch."""
        self._check_profile(pl_module, batch)

    @override
    def on_test_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Check the controls of the batch."""
        self._check_profile(pl_module, batch)

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Record the query weights of the batch."""
        assert isinstance(pl_module, PlateClassifier)
        assert pl_module.context is not None
        weights = self._weights.setdefault(dataloader_idx, [])
        if _is_repeated(trainer, batch_idx, dataloader_idx):
            weights = self._repeated.setdefault(dataloader_idx, [])
        weights += pl_module.context.used

    @override
    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Record the query weights of the batch."""
        self.on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the mean query weight."""
        self._log_query_weight(pl_module, "val")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the epoch's metrics for the figure."""
        self.curves.end_validation(trainer)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the mean query weight of each test set."""
        self._log_query_weight(pl_module, "test")

    # --- quality of controls ---------------------------------------------------------------------

    def _check_profile(self, pl_module: LightningModule, batch: PlateBatch) -> None:
        """Warn once for a plate whose controls are unlike those of all training plates."""
        assert isinstance(pl_module, PlateClassifier)
        if not (self.outlier_above and len(batch.control_row) and len(self.profiles) >= 4):
            return
        name = pl_module.plate_name(batch.domain)
        if name in self._checked:
            return
        self._checked.add(name)
        training_profiles = torch.stack([*self.profiles.values()])
        profile = plate_profile(batch.control).cpu()
        if profile.shape != training_profiles.shape[1:]:
            return
        score = outlier_score(profile, training_profiles)
        if score > self.outlier_above and name not in self.outliers:
            self.outliers[name] = score
            warnings.warn(
                f"The controls of plate {name} are unlike those of all training plates "
                f"({score:.1f} robust standard deviations): look at its images before you trust "
                "its predictions.",
                stacklevel=2,
            )

    def _log_query_weight(self, pl_module: LightningModule, stage: str) -> None:
        """Log the mean adaptive query weight, if there is one."""
        assert isinstance(pl_module, PlateClassifier)
        for number, used in self._weights.items():
            repeated = self._repeated.get(number, [])
            if not (used or repeated):
                continue
            # summed here, on every rank: Lightning divides sums of batch sizes without remainder
            total = torch.stack(used).sum() if used else torch.zeros_like(repeated[0])
            sums = torch.stack([total, torch.full_like(total, len(used))])
            total, count = pl_module.trainer.strategy.reduce(sums, reduce_op="sum")
            prefix = pl_module.metric_prefix(stage, number, len(self._weights))
            pl_module.log(f"{prefix}/query_weight", total / count, sync_dist=True)

    # --- deployment ------------------------------------------------------------------------------

    @override
    def on_predict_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Adapt to a new plate, and write its statistics with their provenance."""
        assert isinstance(pl_module, PlateClassifier)
        self._check_profile(pl_module, batch)
        if not pl_module.adapts_once or pl_module.is_adapted(batch.domain):
            return
        name = pl_module.plate_name(batch.domain)
        if not len(batch.control_row) and self.statistics is not None:
            pl_module.load_plate(batch.domain, read_statistics(Path(self.statistics), name))
            return
        with trainer.precision_plugin.forward_context():
            tensors = pl_module.adapt_to_plate(batch)
        log_dir = trainer.logger.log_dir if trainer.logger else None
        if not log_dir:
            return
        facts = self._describe_adaptation(trainer, pl_module, batch)
        path = locate_statistics(Path(log_dir) / "statistics", name)
        with atomic_write(path.with_name(f"{path.name}.pt")) as temporary:
            torch.save({key: value.cpu() for key, value in tensors.items()}, temporary)
        write_json(path.with_name(f"{path.name}.json"), facts)

    def _describe_adaptation(
        self, trainer: Trainer, pl_module: PlateClassifier, batch: PlateBatch
    ) -> dict[str, Any]:
        """Return what a plate's statistics were computed of, and by what."""
        name = pl_module.plate_name(batch.domain)
        return {
            "plate": name,
            "controls": len(batch.control_row),
            "control_index": batch.control_row.tolist(),
            "control_wells": _control_well_names(getattr(trainer, "datamodule", None), batch),
            "method": type(pl_module.method).__name__,
            "checkpoint": str(trainer.ckpt_path) if trainer.ckpt_path else None,
            "precision": str(trainer.precision),
            "outlier_score": self.outliers.get(name),
            "fulgurite": fulgurite.__version__,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    # --- checkpoint and figures ------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Profiles of the training plates' controls, loss and accuracy by epoch."""
        return {"profiles": dict(self.profiles), "curves": self.curves.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore profiles and curves."""
        self.profiles = dict(state_dict["profiles"])
        self.curves.load_state_dict(state_dict.get("curves", {}))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write each class's scores; draw the confusion matrix and the plates of each test set."""
        assert isinstance(pl_module, PlateClassifier)
        if not trainer.is_global_zero:
            return
        classes = pl_module.num_classes
        for name, rows in pl_module.results.items():
            if not len(rows.row):
                continue
            counts = confusion(rows.label, rows.log_probs.argmax(1), classes)
            _write_class_scores(trainer, name, counts)
            if self.figures:
                figure = self._draw_results(pl_module, name, rows, counts.numpy().astype(float))
                log_figure(trainer, f"test_{to_file_name(name)}", figure)

    def _draw_results(
        self, pl_module: PlateClassifier, name: str, rows: Predictions, counts: NDArray[np.float64]
    ) -> Any:
        classes = len(counts)
        rates = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        rates[counts.sum(1) == 0] = np.nan
        figure, axes = new_figure(1, 2, height=3.6)
        class_names = _get_class_names(pl_module.trainer, classes)
        heatmap(axes[0][0], rates, limits=(0, 1), names=class_names)
        title = f"{name}: share of each class"
        axes[0][0].set(title=title, xlabel="predicted", ylabel="true class")
        plates = sorted(accuracy_by_domain(rows).items(), key=lambda item: item[1])
        labels = [pl_module.plate_name(domain) for domain, _ in plates]
        ax = axes[0][1]
        ax.barh(range(len(plates)), [value for _, value in plates])
        if len(plates) <= 30:
            ax.set_yticks(range(len(plates)), labels, fontsize=6)
        ax.set(title="accuracy by plate", xlim=(0, 1), xlabel="accuracy on images")
        return figure


def _get_class_names(trainer: Trainer, classes: int) -> Sequence[str]:
    """Return the names of the classes in the data, if there are any."""
    names = getattr(getattr(trainer, "datamodule", None), "class_names", ())
    return [str(name) for name in names] if len(names) == classes else ()


def _write_class_scores(trainer: Trainer, name: str, counts: Tensor) -> None:
    """Write ``classes_<set>.csv``: images, precision, recall and F1 of each class of a test set."""
    if not trainer.logger or not trainer.logger.log_dir:
        return
    names = _get_class_names(trainer, len(counts)) or [str(k) for k in range(len(counts))]
    columns = {name: values.tolist() for name, values in class_scores(counts).items()}
    rows = zip(names, counts.sum(1).tolist(), *columns.values(), strict=True)
    path = Path(trainer.logger.log_dir) / f"classes_{to_file_name(name)}.csv"
    with (
        atomic_write(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(("class", "images", *columns))
        writer.writerows(rows)


def _control_well_names(data: Any, batch: PlateBatch) -> list[str] | None:
    """Return the names of the wells of the controls, if the data have them."""
    numbers = getattr(getattr(data, "table", None), "well", None)
    if numbers is None:
        return None
    return sorted({str(data.wells[numbers[int(row)]]) for row in batch.control_row})


def _is_repeated(trainer: Trainer, batch_idx: int, dataloader_idx: int) -> bool:
    """Tell whether an evaluation batch only pads this rank's batches to those of the others."""
    loaders: Any = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
    loader = loaders[dataloader_idx] if isinstance(loaders, list | tuple) else loaders
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler):
        return False
    length = getattr(sampler, "dataset", None)
    if length is None or len(sampler) * sampler.num_replicas <= len(length):
        return False
    return batch_idx * sampler.num_replicas + sampler.rank >= len(length)
