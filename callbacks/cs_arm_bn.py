"""Contexts of plates around the steps of a plate classifier, and records of its tests.

Axes: L queries, N controls, C channels, H W image, S plate statistics.
"""

from __future__ import annotations

import csv
import json
import math
import random
import re
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

import fulgurite
from fulgurite.devices import lower_median
from fulgurite.errors import ConfigError, DataError
from fulgurite.io import atomic_write
from fulgurite.logging import TrainingCurves, log_figure
from fulgurite.models.cs_arm_bn.adaptation import (
    adapt,
    age_references,
    load_statistics,
    stored_statistics,
)
from fulgurite.models.cs_arm_bn.batchnorm import Context, use_context
from fulgurite.models.cs_arm_bn.metrics import (
    Predictions,
    accuracy_by_domain,
    class_scores,
    confusion,
)
from fulgurite.models.cs_arm_bn.module import PlateClassifier
from fulgurite.plotting import heatmap, new_figure
from fulgurite.tensor_files import read_state_dict

#: Smallest number of batches before training and test mode are compared (momentum 0.1: 0.5 % is
#: older), ratio of their losses that gives a warning, and fraction of the chance loss below which
#: losses count as equal.
_MIN_BATCHES, _MAX_MODE_RATIO, _MIN_LOSS = 50, 3.0, 0.1

__all__ = ["ControlContext", "outlier_score", "plate_profile", "read_statistics"]


def plate_profile(controls: Tensor) -> Tensor:
    """Brightness, contrast and sharpness of a plate's control images, by channel.

    Args:
        controls: Control images. Shape: (N, C, H, W).

    Returns:
        Mean, log of the std and, for images wider than a pixel, log of the std of differences of
        neighbours. Shape: (S,), S = 3 C (2 C for embeddings).

    Example:
        >>> plate_profile(torch.ones(2, 1, 4, 4))[0]
        tensor(1.)

    Source: inferred; card section 7.5 suggests a check of the controls.
    """
    x = controls.float()
    dims = (0, 2, 3)
    std = x.std(dims, correction=0)
    parts = [x.mean(dims), (std + 1e-6).log()]
    if x.shape[-1] > 1:
        sharp = (x[..., 1:] - x[..., :-1]).square().mean(dims).sqrt()
        parts.append((sharp + 1e-6).log())
    return torch.cat(parts)


def outlier_score(profile: Tensor, training_profiles: Tensor) -> float:
    """Largest robust z-score of a plate's profile among the training plates [1].

    Args:
        profile: Profile of the plate. Shape: (S,).
        training_profiles: Profiles of the training plates. Shape: (D, S).

    Example:
        >>> known = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0]])
        >>> round(outlier_score(torch.tensor([12.0]), known), 2)  # median 2, scaled MAD 1.48
        6.74

    Source: inferred.
    """
    center = lower_median(training_profiles, 0)
    scale = 1.4826 * lower_median((training_profiles - center).abs(), 0)
    # nearly equal training plates would make every other plate an outlier
    scale = torch.maximum(scale, 0.02 + 0.02 * center.abs())
    return float(((profile - center).abs() / scale).max())


class _CurrentPlate(NamedTuple):
    """The plate in prediction, with its controls."""

    domain: int
    controls: Tensor


class ControlContext(Callback):
    """Sets the source of BatchNorm statistics for every step of a :class:`PlateClassifier`.

    In training, validation and test the source is the method's, independent of ``train()`` and
    ``eval()``. Each batch is checked: its controls must be of its own plate. In prediction, a
    method that uses controls adapts once to each plate's controls, exactly and layer by layer, and
    then predicts query by query; the statistics are written beside the predictions. After training,
    a warning tells if the loss of a batch differs by a factor of three between training mode and
    test mode.

    Args:
        predict_with: Statistics in prediction: ``"controls"`` adapts once to the controls of a
            plate, after which predictions do not depend on each other; ``"test"`` predicts chunks
            as in the test, each joined by the plate's controls.
        statistics: Folder with statistics of an earlier prediction, for plates without controls.
        adapt_chunk: Number of control images in a forward pass of the adaptation.
        record_share: Fraction of an epoch's episodes, its last ones, that update the training
            reference of the adaptive weight.
        record_least: Smallest number of these episodes, or all of a shorter epoch.
        outlier_above: Distance of a plate's controls from the training plates that gives a
            warning, in robust standard deviations; 0 for no warning.
        foreign_controls: Allow controls from other plates (ablation).
        figures: Draw loss and accuracy when training ends, confusion matrices and plates when a
            test ends. The scores of each class are always written (``classes_<set>.csv``).

    Raises:
        ConfigError: An option is unknown, a number is out of range, or the model or trainer does
            not fit.

    Source: arXiv 2604.20824; card sections 7.5 and 7.6.
    """

    def __init__(
        self,
        predict_with: Literal["controls", "test"] = "controls",
        statistics: str | None = None,
        adapt_chunk: int = 256,
        record_share: float = 0.125,
        record_least: int = 64,
        outlier_above: float = 8.0,
        foreign_controls: bool = False,
        figures: bool = True,
    ) -> None:
        if predict_with not in ("controls", "test"):
            raise ConfigError(
                f"ControlContext.predict_with={predict_with!r} is unknown.", "Use controls or test."
            )
        if adapt_chunk < 1:
            raise ConfigError(
                f"ControlContext.adapt_chunk={adapt_chunk} is too small.", "Give 1 or more."
            )
        if not 0 <= record_share <= 1:
            raise ConfigError(
                f"ControlContext.record_share={record_share} is no share.", "Give 0 to 1."
            )
        self.predict_with, self.statistics = predict_with, statistics
        if record_least < 0:
            raise ConfigError(
                f"ControlContext.record_least={record_least} is negative.", "Give 0 or more."
            )
        self.adapt_chunk, self.record_share = adapt_chunk, record_share
        self.record_least = record_least
        self.outlier_above, self.figures = outlier_above, figures
        self.foreign_controls = foreign_controls
        self.profiles: dict[str, Tensor] = {}
        self.outliers: dict[str, float] = {}
        self._stacks: list[tuple[ExitStack, Context | None]] = []
        self._plate: _CurrentPlate | None = None
        self._adapted: set[str] = set()
        self._weights: dict[int, list[Tensor]] = {}
        self._repeated: dict[int, list[Tensor]] = {}  # weights of batches that another rank has too
        self._checked: set[str] = set()
        self._last_batch: Any = None
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

    # --- setup ---------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the model fits and that the ranks do not mix plates."""
        if not isinstance(pl_module, PlateClassifier):
            raise ConfigError(
                f"ControlContext cannot hold the context of a {type(pl_module).__name__}.",
                "Use model.class_path=fulgurite.models.cs_arm_bn.PlateClassifier.",
            )
        synced = getattr(trainer.strategy, "_layer_sync", None) is not None
        if synced or any(isinstance(m, nn.SyncBatchNorm) for m in pl_module.modules()):
            raise ConfigError(
                "SyncBatchNorm would mix the plates of the ranks.",
                "Leave out --trainer.sync_batchnorm.",
            )
        if pl_module.method.own_gradients and str(trainer.precision).startswith("16-"):
            raise ConfigError(
                f"{type(pl_module.method).__name__} takes gradients of its own, which are lost in "
                f"--trainer.precision={trainer.precision}: nothing scales them.",
                "Use bf16-mixed or 32-true.",
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave every context."""
        while self._stacks:
            self._leave_context(pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave every context."""
        self.teardown(trainer, pl_module, "")

    def _enter_context(self, pl_module: LightningModule, *, training: bool) -> None:
        assert isinstance(pl_module, PlateClassifier)
        stack = ExitStack()
        context = stack.enter_context(
            use_context(pl_module.network, pl_module.method.context(training=training))
        )
        self._stacks.append((stack, pl_module.context))
        pl_module.context = context
        self._checked, self._weights, self._repeated = set(), {}, {}

    def _leave_context(self, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PlateClassifier)
        if self._stacks:
            stack, pl_module.context = self._stacks.pop()
            stack.close()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enter the training context."""
        self._enter_context(pl_module, training=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the context."""
        self.curves.end_epoch(trainer)
        self._leave_context(pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enter the test context."""
        self._enter_context(pl_module, training=False)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the context."""
        self._log_query_weight(pl_module, "val")
        self._leave_context(pl_module)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enter the test context."""
        self._enter_context(pl_module, training=False)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the context."""
        self._log_query_weight(pl_module, "test")
        self._leave_context(pl_module)

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enter the test context."""
        self._plate, self._adapted = None, set()
        self._enter_context(pl_module, training=False)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the context."""
        self._leave_context(pl_module)

    # --- batches -------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Check the episode and record the profile of its controls."""
        if not self._stacks:  # a run that was resumed within an epoch does not start it again
            self._enter_context(pl_module, training=True)
        context = self._check_batch(pl_module, batch)
        self._set_recording(trainer, pl_module, context, batch_idx)
        if not (self.outlier_above and len(batch["control"])):
            return
        if (name := self._plate_name(trainer, batch)) not in self.profiles:
            self.profiles[name] = plate_profile(batch["control"]).cpu()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the loss for the figure."""
        self.curves.add_batch(outputs)
        self._trained_batches += 1
        self._last_batch = batch

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the epoch's metrics for the figure."""
        self.curves.end_validation(trainer)

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
            training, test = self.mode_losses = pl_module.compare_modes(batch)
        min_loss = _MIN_LOSS * math.log(pl_module.num_classes)
        low, high = sorted(max(loss, min_loss) for loss in (training, test))
        if high > _MAX_MODE_RATIO * low:
            method = pl_module.method
            warnings.warn(
                f"On one batch, {type(method).__name__} has the loss {training:.2g} in training "
                f"mode (statistics: {method.train_source}) and {test:.2g} in test mode "
                f"({method.test_source}): what is tested is not what was trained. Let the two "
                "agree: training on mixed plates (data.init_args.mixed=true) for running "
                "statistics, or a method whose statistics come from the plate in both.",
                stacklevel=2,
            )

    def _set_recording(
        self, trainer: Trainer, pl_module: LightningModule, context: Context, batch_idx: int
    ) -> None:
        """Record references on the last episodes of an epoch, with the newest weights."""
        assert isinstance(pl_module, PlateClassifier)
        batches = trainer.num_training_batches
        if batches == float("inf"):  # the end of the epoch is unknown
            context.record = random.Random(batch_idx).random() < self.record_share
            return
        # few plates determine the usual shift badly: seven cost 3 points under label shift
        num_recorded = max(math.ceil(self.record_share * batches), self.record_least)
        first = max(0, int(batches) - num_recorded)
        context.record = batch_idx >= first
        if batch_idx == first:
            age_references(pl_module.network)

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Check the batch."""
        context = self._check_batch(pl_module, batch)
        weights = self._weights.setdefault(dataloader_idx, [])
        if _is_repeated(trainer, batch_idx, dataloader_idx):
            weights = self._repeated.setdefault(dataloader_idx, [])
        context.used = weights
        self._check_profile(trainer, batch)

    def on_test_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Check the batch."""
        self.on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_predict_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Adapt to a new plate; its later batches use the stored statistics or controls."""
        assert isinstance(pl_module, PlateClassifier)
        context = self._check_batch(pl_module, batch, may_lack=True)
        self._check_profile(trainer, batch)
        domain = int(batch["domain"])
        if len(batch["control"]):
            self._plate = _CurrentPlate(domain, batch["control"])
        method = pl_module.method
        if method.deploys and self.predict_with == "controls":
            name = self._plate_name(trainer, batch)
            if name not in self._adapted:
                self._adapt_to_plate(trainer, pl_module, batch, name)
                self._adapted.add(name)
            context.source, context.domain = "stored", name
            return
        if (method.needs_controls or method.deploys) and not len(batch["control"]):
            if self._plate is None or self._plate.domain != domain:
                raise self._missing_controls_error(self._plate_name(trainer, batch))
            controls = self._plate.controls
            batch["control"] = controls

    def _check_batch(
        self, pl_module: LightningModule, batch: Any, may_lack: bool = False
    ) -> Context:
        """Refuse controls of another plate, and set the number of queries in the context."""
        assert isinstance(pl_module, PlateClassifier)
        context = pl_module.context
        assert context is not None
        missing = {"query", "control", "label", "index", "domain", "control_domain", "kept"}
        if not isinstance(batch, dict) or (missing := missing - batch.keys()):
            raise DataError(
                f"A batch lacks {', '.join(sorted(missing))}.",
                "Use data.class_path=fulgurite.datamodules.cs_arm_bn.PlateDataModule.",
            )
        foreign = batch["control_domain"] != batch["domain"]
        if not self.foreign_controls and bool(foreign.any()):
            raise DataError(
                f"{int(foreign.sum())} of the {len(foreign)} controls in a batch are not of its "
                f"plate ({int(batch['domain'])}).",
                "Set data.init_args.control_plate=own, or let them pass with "
                "ControlContext.foreign_controls=true.",
            )
        if pl_module.method.needs_controls and not may_lack and not len(batch["control"]):
            raise DataError(
                f"{type(pl_module.method).__name__} was given a batch without controls.",
                "Set data.init_args.controls (eval_controls) to 1 or more, or choose another "
                "model.init_args.method.",
            )
        context.n_query = len(batch["query"])
        return context

    def _plate_name(self, trainer: Trainer, batch: Any) -> str:
        return _get_plate_name(trainer, int(batch["domain"]))

    # --- quality of controls ---------------------------------------------------------------------

    def _check_profile(self, trainer: Trainer, batch: Any) -> None:
        """Warn once for a plate whose controls are unlike those of all training plates."""
        if not (self.outlier_above and len(batch["control"]) and len(self.profiles) >= 4):
            return
        name = self._plate_name(trainer, batch)
        if name in self._checked:
            return
        self._checked.add(name)
        training_profiles = torch.stack([*self.profiles.values()])
        profile = plate_profile(batch["control"]).cpu()
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
            if used or self._repeated.get(number):  # every rank takes part in a mean over ranks
                prefix = pl_module.metric_prefix(stage, number, len(self._weights))
                mean = torch.stack(used or self._repeated[number]).mean()
                name = f"{prefix}/query_weight"
                pl_module.log(name, mean, batch_size=len(used), sync_dist=True)

    # --- deployment ------------------------------------------------------------------------------

    def _adapt_to_plate(
        self, trainer: Trainer, pl_module: PlateClassifier, batch: Any, name: str
    ) -> None:
        """Store a plate's statistics, and write them with their provenance."""
        folder = self._statistics_folder(trainer)
        if not len(batch["control"]):
            if self.statistics is None:
                raise self._missing_controls_error(name)
            tensors = read_statistics(Path(self.statistics), name)
            load_statistics(pl_module.network, name, tensors)
            return
        with trainer.precision_plugin.forward_context():
            weight = pl_module.method.context(training=False).weight
            chunks = batch["control"].split(self.adapt_chunk)
            adapt(pl_module.network, chunks, name, weight=weight)
        if folder is None:
            return
        data = getattr(trainer, "datamodule", None)
        facts = {
            "plate": name,
            "controls": len(batch["control"]),
            "control_index": batch["control_index"].tolist() if "control_index" in batch else None,
            "control_wells": _control_well_names(data, batch),
            "method": type(pl_module.method).__name__,
            "checkpoint": str(trainer.ckpt_path) if trainer.ckpt_path else None,
            "precision": str(trainer.precision),
            "outlier_score": self.outliers.get(name),
            "fulgurite": fulgurite.__version__,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        tensors = {k: v.cpu() for k, v in stored_statistics(pl_module.network, name).items()}
        with atomic_write(folder / f"{_to_file_name(name)}.pt") as temporary:
            torch.save(tensors, temporary)
        with atomic_write(folder / f"{_to_file_name(name)}.json") as temporary:
            temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    def _statistics_folder(self, trainer: Trainer) -> Path | None:
        log_dir = trainer.logger.log_dir if trainer.logger else None
        return Path(log_dir) / "statistics" if log_dir else None

    def _missing_controls_error(self, name: str) -> DataError:
        return DataError(
            f"A chunk of plate {name} came before its controls.",
            "Predict with --trainer.devices=1, or name the folder of an earlier prediction's "
            "statistics in ControlContext.statistics.",
        )

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
                self._draw_results(trainer, name, rows, counts.numpy().astype(float))

    def _draw_results(
        self, trainer: Trainer, name: str, rows: Predictions, counts: NDArray[np.float64]
    ) -> None:
        classes = len(counts)
        rates = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        rates[counts.sum(1) == 0] = np.nan
        figure, axes = new_figure(1, 2, height=3.6)
        heatmap(
            axes[0][0], rates, title=f"{name}: share of each class", xlabel="predicted",
            ylabel="true class", limits=(0, 1), names=_get_class_names(trainer, classes),
        )  # fmt: skip
        plates = sorted(accuracy_by_domain(rows).items(), key=lambda item: item[1])
        labels = [_get_plate_name(trainer, domain) for domain, _ in plates]
        ax = axes[0][1]
        ax.barh(range(len(plates)), [value for _, value in plates])
        if len(plates) <= 30:
            ax.set_yticks(range(len(plates)), labels, fontsize=6)
        ax.set(title="accuracy by plate", xlim=(0, 1), xlabel="accuracy on images")
        log_figure(trainer, f"test_{_to_file_name(name)}", figure)


def _get_plate_name(trainer: Trainer, number: int) -> str:
    """Return the name of a plate in the data, or its index as text."""
    domains = getattr(getattr(trainer, "datamodule", None), "domains", ())
    return str(domains[number]) if 0 <= number < len(domains) else str(number)


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
    path = Path(trainer.logger.log_dir) / f"classes_{_to_file_name(name)}.csv"
    with (
        atomic_write(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(("class", "images", *columns))
        writer.writerows(rows)


def _to_file_name(name: str) -> str:
    """Convert a plate's name to a file name."""
    return re.sub(r"[^\w.+-]", "_", name)


def _control_well_names(data: Any, batch: Any) -> list[str] | None:
    """Return the names of the wells of the controls, if the data have them."""
    numbers = getattr(getattr(data, "table", None), "well", None)
    if numbers is None or "control_index" not in batch:
        return None
    return sorted({str(data.wells[numbers[int(row)]]) for row in batch["control_index"]})


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


def read_statistics(folder: Path, plate: str) -> dict[str, Tensor]:
    """Read the statistics of a plate that a prediction wrote.

    Raises:
        CheckpointError: The file does not exist or cannot be read.
    """
    path = folder / f"{_to_file_name(plate)}.pt"
    hint = f"There are none of plate {plate}: predict with its controls first."
    tensors: dict[str, Tensor] = read_state_dict(path, "ControlContext.statistics", hint)[1]
    return tensors
