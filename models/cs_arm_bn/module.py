"""The LightningModule of plate classification: network, method, optimizer and metrics wired up.

Axes: L queries, N controls, C channels, H W image, K classes.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from fulgurite.base import SystemModule, build_network, check_head, save_options, scheduled
from fulgurite.domains.cs_arm_bn import PlateBatch
from fulgurite.errors import ConfigError, DataError
from fulgurite.export.exportable import ExportableNetwork, ExportRequest
from fulgurite.models.cs_arm_bn.adaptation import (
    adapt,
    load_statistics,
    missing_controls_error,
)
from fulgurite.models.cs_arm_bn.batchnorm import Context, use_context
from fulgurite.models.cs_arm_bn.checks import check_labels, check_logits, check_trainer
from fulgurite.models.cs_arm_bn.conversion import convert_batchnorm, has_batchnorm
from fulgurite.models.cs_arm_bn.exporting import EXPORT_OPTIONS, export_classifier
from fulgurite.models.cs_arm_bn.methods.base import Method, query_loss
from fulgurite.models.cs_arm_bn.methods.statistics import AdaptiveWeight
from fulgurite.models.cs_arm_bn.metrics import (
    Predictions,
    gather_predictions,
    scores,
    select_predictions,
    sizes,
)
from fulgurite.models.cs_arm_bn.options import AdaptationOptions
from fulgurite.models.cs_arm_bn.references import (
    age_references,
    average_over_ranks,
    load_reference,
    reference_state,
)
from fulgurite.models.cs_arm_bn.weights import load_network
from fulgurite.options import make_options

__all__ = ["PlateClassifier"]


class PlateClassifier(SystemModule):
    """A classifier of perturbations that adapts to a plate by its control images.

    A batch is one plate's queries and controls, a
    :class:`~fulgurite.domains.cs_arm_bn.PlateBatch` with standardised images. In each step the
    source of BatchNorm statistics is that of ``method``, independent of ``train()`` and ``eval()``.
    In prediction, a method that uses controls adapts once to each plate's controls, exactly and
    layer by layer, and then predicts query by query;
    :class:`~fulgurite.callbacks.cs_arm_bn.ControlContext` writes these statistics beside the
    predictions, and warns of plates unlike those of training.

    Args:
        network: The network, or a callable that makes it from (channels, classes), such as a
            class; its BatchNorm layers are converted.
        method: Adaptation method; by default CS-ARM-BN with the query weight estimated for each
            plate at test.
        optimizer: Makes the optimizer.
        scheduler: Makes the scheduler, stepped after each epoch.
        weights: Checkpoint of a run (or a state dict) from which the network starts.
        num_classes: Number of classes K; set from the data.
        in_channels: Number of channels C; set from the data.
        adaptation: How references are learned, and how prediction adapts to plates.

    Attributes:
        context: Source of the statistics in the last step; None before the first one of an epoch.

    Raises:
        ConfigError: A number is below its minimum, or the network has no BatchNorm and the method
            needs it.
        CheckpointError: ``weights`` cannot be read or does not fit.

    Source: docs/papers/cs_arm_bn.md sections 1.3 and 7.4.
    """

    monitor = "val/loss"
    mode = "min"
    export_options = EXPORT_OPTIONS

    def __init__(
        self,
        network: Callable[[int, int], nn.Module] | nn.Module,
        method: Method | None = None,
        optimizer: OptimizerCallable = torch.optim.Adam,
        *,
        scheduler: LRSchedulerCallable | None = None,
        weights: str | None = None,
        num_classes: int = 8,
        in_channels: int = 5,
        adaptation: AdaptationOptions = AdaptationOptions(),
    ) -> None:
        super().__init__()
        # Lightning says that it takes this hook from the module, not the DataModule, as is meant
        warnings.filterwarnings("ignore", ".*overridden `on_before_batch_transfer` in `Lightning.*")
        save_options(self, "network", "method", "optimizer", "scheduler")
        for name, value, minimum in (
            ("num_classes", num_classes, 2),
            ("in_channels", in_channels, 1),
        ):
            if value < minimum:
                raise ConfigError(
                    f"model.init_args.{name}={value} is too small.", f"Give {minimum} or more."
                )
        self.num_classes = num_classes
        self.method = method or AdaptiveWeight()
        model = build_network(network, in_channels + self.method.extra_channels, num_classes)
        check_head(model, num_classes)
        is_converted = self.method.needs_batchnorm or has_batchnorm(model)
        self.network = convert_batchnorm(model) if is_converted else model
        if weights is not None:
            load_network(self.network, weights)
        self.method.build(self.network, in_channels, num_classes)
        if self.method.frozen:
            for parameter in self.network.parameters():
                parameter.requires_grad = False  # requires_grad_ refuses those of lazy layers
            self.network.eval()
        self.optimizer, self.scheduler = optimizer, scheduler
        self.adaptation = make_options(AdaptationOptions, adaptation)
        self.context: Context | None = None
        self._adapted: set[str] = set()  # plates of this prediction
        self._controls: tuple[int, Tensor] | None = None  # the plate in prediction
        self.results: dict[str, Predictions] = {}
        self._parts: dict[int, list[Predictions]] = {}

    def train(self, mode: bool = True) -> PlateClassifier:
        """Set the mode; a frozen network stays in evaluation mode, without dropout."""
        super().train(mode)
        if self.method.frozen:
            self.network.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits of all rows under the current context. Shape: (M, C, H, W) to (M, K)."""
        return self.network(images)  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        """The optimizer of all trainable parameters, with its scheduler if there is one.

        Raises:
            ConfigError: There is nothing to train, or the scheduler needs a metric.
        """
        trained = [p for p in self.parameters() if p.requires_grad]
        if not trained:
            raise ConfigError(
                f"No parameter of the network {type(self.network).__name__} is trained by "
                f"{type(self.method).__name__}.",
                "Leave some with requires_grad=True, or train a linear classifier on its "
                "embeddings: model.init_args.method=fulgurite.models.cs_arm_bn.LinearProbe.",
            )
        optimizer = self.optimizer(trained)
        return scheduled(optimizer, self.scheduler, "epoch")

    @contextmanager
    def plate_context(self, batch: PlateBatch, *, training: bool) -> Iterator[Context]:
        """Let the statistics of a batch come from the method's source until the block ends.

        Args:
            batch: Batch of one plate.
            training: Whether the source is that of training, else that of the test.
        """
        context = self.method.context(training=training)
        context.n_query = batch.n_query
        with use_context(self.network, context):
            self.context = context
            yield context

    def logits(self, batch: PlateBatch, *, training: bool = False) -> Tensor:
        """Logits of a batch's queries. Shape: (L, K).

        Args:
            batch: Batch of one plate.
            training: Whether statistics come from the source of training, else of the test.
        """
        with self.plate_context(batch, training=training) as context:
            logits = self.method.logits(self.network, batch, context)
        check_logits(logits, self.network, batch.n_query, self.num_classes)
        return logits

    def _check_controls(self, batch: PlateBatch, may_lack: bool = False) -> None:
        """Refuse controls of another plate, and a batch without controls where they are needed."""
        foreign = batch.control_domain != batch.domain
        if not self.adaptation.foreign_controls and bool(foreign.any()):
            raise DataError(
                f"{int(foreign.sum())} of the {len(foreign)} controls in a batch are not of its "
                f"plate ({batch.domain}).",
                "Set data.init_args.evaluation.control_plate=own, or let them pass with "
                "model.init_args.adaptation.foreign_controls=true.",
            )
        if self.method.needs_controls and not may_lack and not len(batch.control_row):
            raise DataError(
                f"{type(self.method).__name__} was given a batch without controls.",
                "Set data.init_args.episodes.controls (evaluation.controls) to 1 or more, or "
                "choose another model.init_args.method.",
            )

    def _progress(self) -> float:
        """Finished fraction of the training steps; 1 if their number is unknown."""
        if self._trainer is None:
            return 0.0
        total = self._trainer.estimated_stepping_batches
        return min(1.0, self._trainer.global_step / total) if total else 1.0

    def setup(self, stage: str) -> None:
        """Check that the model fits data and trainer; tell the method the number of plates.

        Raises:
            ConfigError: The sizes of model and data differ, the ranks would mix their plates, or
                the precision would lose the method's own gradients.
        """
        super().setup(stage)
        check_trainer(self.trainer, self, self.method)
        if stage == "fit":
            domains = getattr(getattr(self.trainer, "datamodule", None), "domains", ())
            self.method.prepare_domains(len(domains))

    def on_train_start(self) -> None:
        """Call the method with the training plates."""
        loader: Any = self.trainer.train_dataloader
        move = self.trainer.strategy.batch_to_device
        batches: Any = (move(batch) for batch in loader)
        self.method.begin(self.network, batches, training=True)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Check a batch before the move, since afterwards it would have to wait for the device.

        Raises:
            DataError: It is no batch of a plate, or a training query has no label of a class.
        """
        if not isinstance(batch, PlateBatch):
            raise DataError(
                f"A batch is a {type(batch).__name__}, not a PlateBatch.",
                "Use data.class_path=fulgurite.datamodules.cs_arm_bn.PlateDataModule, or let your "
                "DataModule give fulgurite.domains.cs_arm_bn.PlateBatch.",
            )
        if self.trainer.training:
            check_labels(batch.label, self.num_classes)
        return batch

    def training_step(self, batch: PlateBatch, batch_idx: int) -> Tensor:
        """Loss of an episode's queries.

        Raises:
            DataError: A query has no label of a class.
        """
        labels = batch.label
        check_labels(labels, self.num_classes)
        self._check_controls(batch)
        with self.plate_context(batch, training=True) as context:
            context.record = self._is_recorded(batch_idx)
            # these methods make one forward pass, in which each layer may be used once
            context._passed = set() if self.method.deploys and context.record else None
            logits, penalty = self.method.training_outputs(
                self.network, batch, context, self._progress()
            )
        check_logits(logits, self.network, batch.n_query, self.num_classes)
        loss = query_loss(logits, labels)
        size = len(labels)
        if penalty is not None:
            self.log("train/penalty", penalty, batch_size=size)
            loss = loss + penalty
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        right = (logits.detach().argmax(1) == labels).float().mean()
        self.log("train/acc", right, batch_size=size)
        return loss

    def _is_recorded(self, batch_idx: int) -> bool:
        """Whether an episode updates the references: the last ones, with the newest weights."""
        if self._trainer is None:
            return False
        batches = self._trainer.num_training_batches
        if batches == float("inf"):  # the end of the epoch is unknown
            return random.Random(batch_idx).random() < self.adaptation.record_fraction
        first = self.adaptation.find_first_recorded(int(batches))
        if batch_idx == first:
            age_references(self.network)
        return batch_idx >= first

    def _begin_evaluation(self) -> None:
        # what is logged below is equal on every rank already
        warnings.filterwarnings("ignore", ".*recommended to use.*sync_dist=True.*")
        self._parts = {}
        average_over_ranks(self.network, self.device)
        self.method.begin(self.network, (), training=False)

    def on_validation_epoch_start(self) -> None:
        """Start a table of predictions."""
        self._begin_evaluation()

    def on_test_epoch_start(self) -> None:
        """Start a table of predictions for each test set."""
        self._begin_evaluation()

    def on_predict_epoch_start(self) -> None:
        """Prepare the method for prediction, which has adapted to no plate yet."""
        self._begin_evaluation()
        self._adapted, self._controls = set(), None

    def _add_predictions(self, batch: PlateBatch, number: int) -> None:
        self._check_controls(batch)
        self._parts.setdefault(number, []).append(select_predictions(batch, self.logits(batch)))

    def validation_step(self, batch: PlateBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Predict validation queries."""
        self._add_predictions(batch, dataloader_idx)

    def test_step(self, batch: PlateBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Predict test queries."""
        self._add_predictions(batch, dataloader_idx)

    def metric_prefix(self, stage: str, number: int, sets: int) -> str:
        """Return ``test``, or ``test/<name>`` if there are several test sets.

        Args:
            stage: Stage, ``val`` or ``test``.
            number: Index of the set.
            sets: Number of sets.
        """
        data = getattr(self.trainer, "datamodule", None)
        names = tuple(getattr(data, "test_sets", ())) if stage == "test" else ()
        if max(sets, len(names)) < 2:
            return stage
        return f"{stage}/{names[number] if number < len(names) else number}"

    def _log_metrics(self, stage: str) -> None:
        self.method.end(self.network)
        self.results = {}
        for number in sorted(self._parts):
            prefix = self.metric_prefix(stage, number, len(self._parts))
            rows = gather_predictions(self._parts[number], self.num_classes)
            self.results[prefix.removeprefix("test/")] = rows
            metrics = scores(rows) | (sizes(rows) if stage == "test" else {})
            values = {f"{prefix}/{k}": v for k, v in metrics.items()}
            for metric, value in values.items():
                in_progress_bar = metric == self.monitor
                self.log(metric, value, batch_size=max(1, len(rows.row)), prog_bar=in_progress_bar)
        self._parts, self.context = {}, None

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of all validation plates."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics of each test set."""
        self._log_metrics("test")

    def on_predict_epoch_end(self) -> None:
        """Let the method restore the network."""
        self.method.end(self.network)
        self.context = None

    @property
    def adapts_once(self) -> bool:
        """Whether prediction adapts once to a plate's controls, and then predicts each query."""
        return self.method.deploys and self.adaptation.predict_with == "controls"

    def plate_name(self, domain: int) -> str:
        """Return the name of a plate in the data, or its index as text."""
        domains = getattr(getattr(self._trainer, "datamodule", None), "domains", ())
        return str(domains[domain]) if 0 <= domain < len(domains) else str(domain)

    def is_adapted(self, domain: int) -> bool:
        """Whether this prediction has adapted to a plate already."""
        return self.plate_name(domain) in self._adapted

    def adapt_to_plate(self, batch: PlateBatch) -> dict[str, Tensor]:
        """Store the statistics of a plate's controls, once in a prediction, and return them.

        Raises:
            DataError: The batch has no controls.
        """
        name = self.plate_name(batch.domain)
        if not len(batch.control_row):
            raise missing_controls_error(name)
        chunks = torch.split(batch.control, self.adaptation.chunk)
        weight = self.method.context(training=False).weight
        statistics = adapt(self.network, chunks, name, weight=weight)
        self._adapted.add(name)
        return statistics

    def export_network(self, request: ExportRequest) -> ExportableNetwork:
        """Hand over an ordinary network, with a plate's statistics where the method has them.

        Raises:
            ConfigError: The method's predictions depend on each other, or no plate is named.
        """
        return export_classifier(self.network, self.method, request, chunk=self.adaptation.chunk)

    def load_plate(self, domain: int, tensors: Mapping[str, Tensor]) -> None:
        """Use a plate's statistics from an earlier prediction in this one.

        Raises:
            CheckpointError: The statistics are of another network.
        """
        name = self.plate_name(domain)
        load_statistics(self.network, name, tensors)
        self._adapted.add(name)

    def _predict_logits(self, batch: PlateBatch) -> Tensor:
        """Logits of a batch's queries, from stored statistics or with the plate's controls."""
        self._check_controls(batch, may_lack=True)
        if self.adapts_once:
            if not self.is_adapted(batch.domain):
                self.adapt_to_plate(batch)
            with self.plate_context(batch, training=False) as context:
                context.source, context.domain = "stored", self.plate_name(batch.domain)
                return self.method.logits(self.network, batch, context)
        if len(batch.control_row):
            self._controls = batch.domain, batch.control
        elif self.method.needs_controls or self.method.deploys:
            if self._controls is None or self._controls[0] != batch.domain:
                raise missing_controls_error(self.plate_name(batch.domain))
            batch = batch._replace(images=torch.cat([batch.images, self._controls[1]]))
        return self.logits(batch)

    def predict_step(
        self, batch: PlateBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        """Index, plate, well, label (−1: unknown), prediction and probabilities of each query."""
        mask = batch.counted
        probabilities = self._predict_logits(batch).float().softmax(1)[mask]
        return {
            "index": batch.row[mask],
            "domain": torch.full((len(probabilities),), batch.domain),
            "well": batch.well[mask],
            "label": batch.label[mask],
            "predicted": probabilities.argmax(1),
            "probabilities": probabilities,
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the training references of the layers."""
        checkpoint["context_reference"] = reference_state(self.network)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the training references of the layers."""
        load_reference(self.network, checkpoint.get("context_reference", {}))
