"""The LightningModule of plate classification: network, method, optimizer and metrics wired up.

Axes: L queries, N controls, C channels, H W image, K classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from fulgurite.base import SystemModule, build_network, check_head, save_options, scheduled
from fulgurite.errors import CheckpointError, ConfigError, DataError
from fulgurite.models.cs_arm_bn.adaptation import load_reference, reference_state
from fulgurite.models.cs_arm_bn.batch_statistics import TrainingReference
from fulgurite.models.cs_arm_bn.batchnorm import Context, ContextLayer, use_context
from fulgurite.models.cs_arm_bn.conversion import convert_batchnorm, has_batchnorm
from fulgurite.models.cs_arm_bn.methods import AdaptiveWeight, Method, query_loss
from fulgurite.models.cs_arm_bn.metrics import (
    Predictions,
    gather_predictions,
    scores,
    select_predictions,
    sizes,
)
from fulgurite.sampling import rank_and_world
from fulgurite.tensor_files import read_state_dict

__all__ = ["PlateClassifier"]

_HOST_FIELDS = ("domain", "control_domain")


class PlateClassifier(SystemModule):
    """A classifier of perturbations that adapts to a plate by its control images.

    A batch is one plate's queries and controls, a dict: ``query`` (L, C, H, W), ``control``
    (N, C, H, W), ``label`` (L,), ``index`` (L,), ``domain`` (), ``well`` (L,) and ``kept`` (L,).
    :class:`~fulgurite.callbacks.cs_arm_bn.ControlContext` sets the source of the statistics for
    each step; ``method`` defines it.

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

    Raises:
        ConfigError: A number is below its minimum, or the network has no BatchNorm and the method
            needs it.
        CheckpointError: ``weights`` cannot be read or does not fit.

    Source: arXiv 2604.20824; card sections 1.3 and 7.4.
    """

    monitor = "val/loss"
    mode = "min"

    def __init__(
        self,
        network: Callable[[int, int], nn.Module] | nn.Module,
        method: Method | None = None,
        optimizer: OptimizerCallable = torch.optim.Adam,
        scheduler: LRSchedulerCallable | None = None,
        weights: str | None = None,
        num_classes: int = 8,
        in_channels: int = 5,
    ) -> None:
        super().__init__()
        # Lightning warns for each module that moves its batches that its DataModule does not
        warnings.filterwarnings("ignore", ".*overridden `transfer_batch_to_device` in `Lightning.*")
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
            _load_network(self.network, weights)
        self.method.build(self.network, in_channels, num_classes)
        if self.method.frozen:
            self.network.requires_grad_(False).eval()
        self.optimizer, self.scheduler = optimizer, scheduler
        self.context: Context | None = None
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
            ConfigError: The scheduler needs a metric.
        """
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad])
        return scheduled(optimizer, self.scheduler, "epoch")

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits of a batch's queries. Shape: (L, K).

        Raises:
            ConfigError: No callback has set the context.
        """
        self._prepare_context()
        assert self.context is not None
        return self.method.logits(self.network, batch, self.context)

    def _prepare_context(self) -> None:
        if self.context is None:
            raise ConfigError(
                "Nothing says where PlateClassifier's statistics come from.",
                "Add fulgurite.callbacks.cs_arm_bn.ControlContext to trainer.callbacks.",
            )
        # these methods make one forward pass, in which each layer may be used once
        self.context._passed = set() if self.method.deploys and self.context.record else None

    def _progress(self) -> float:
        """Finished fraction of the training steps; 1 if their number is unknown."""
        if self._trainer is None:
            return 0.0
        total = self._trainer.estimated_stepping_batches
        return min(1.0, self._trainer.global_step / total) if total else 1.0

    def setup(self, stage: str) -> None:
        """Check that the model fits the data, and pass the number of plates to the method."""
        super().setup(stage)
        if stage == "fit":
            domains = getattr(getattr(self.trainer, "datamodule", None), "domains", ())
            self.method.prepare_domains(len(domains))

    # --- training ------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Call the method with the training plates."""
        loader: Any = self.trainer.train_dataloader
        self.method.begin(self.network, loader, training=True)

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Move a batch to the device, except the plate indices, which only Python reads.

        Raises:
            DataError: A training query has no label of a class; the check comes before the move,
                since it would have to wait for the device afterwards.
        """
        if not isinstance(batch, dict):
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        if self.trainer.training and isinstance(batch.get("label"), Tensor):
            self._check_labels(batch["label"])
        moved = {k: v for k, v in batch.items() if k not in _HOST_FIELDS}
        moved = super().transfer_batch_to_device(moved, device, dataloader_idx)
        return {k: moved.get(k, v) for k, v in batch.items()}

    def _check_labels(self, labels: Tensor) -> None:
        """Refuse labels outside the classes; those on a device were checked before the move."""
        if labels.device.type != "cpu":
            return
        if int(labels.min()) < 0 or int(labels.max()) >= self.num_classes:
            raise DataError(
                f"A training batch has labels from {int(labels.min())} to {int(labels.max())}.",
                f"Give labels from 0 to {self.num_classes - 1}.",
            )

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of an episode's queries.

        Raises:
            DataError: A query has no label of a class.
        """
        labels = batch["label"]
        self._check_labels(labels)
        self._prepare_context()
        assert self.context is not None
        logits, penalty = self.method.training_outputs(
            self.network, batch, self.context, self._progress()
        )
        loss = query_loss(logits, labels)
        size = len(labels)
        if penalty is not None:
            self.log("train/penalty", penalty, batch_size=size)
            loss = loss + penalty
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        right = (logits.detach().argmax(1) == labels).float().mean()
        self.log("train/acc", right, batch_size=size)
        return loss

    @torch.no_grad()
    def compare_modes(self, batch: dict[str, Tensor]) -> tuple[float, float]:
        """Loss of one batch as in training, and of the same batch as at test [nats].

        Parameters, running statistics and the generators of the CPU and of this device are
        unchanged afterwards.

        Args:
            batch: A training batch, on the module's device.

        Source: inferred.
        """
        modes = [(module, module.training) for module in self.modules()]
        buffers = [(buffer, buffer.clone()) for buffer in self.buffers()]
        losses = []
        before, devices = self.context, [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            for training in (True, False):
                self.train(training)
                if not training:
                    self.method.begin(self.network, (), training=False)
                context = self.method.context(training=training)
                context.n_query = len(batch["query"])
                with use_context(self.network, context) as self.context:
                    losses.append(float(query_loss(self.logits(batch), batch["label"])))
        self.method.end(self.network)
        self.context = before
        for buffer, value in buffers:
            buffer.copy_(value)
        for module, mode in modes:
            module.training = mode
        return losses[0], losses[1]

    # --- evaluation ----------------------------------------------------------------------------

    def _begin_evaluation(self) -> None:
        # what is logged below is equal on every rank already
        warnings.filterwarnings("ignore", ".*recommended to use.*sync_dist=True.*")
        self._parts = {}
        self._average_over_ranks()
        self.method.begin(self.network, (), training=False)

    def _average_over_ranks(self) -> None:
        """Average running statistics and references over the ranks, which have different plates."""
        world = rank_and_world()[1]
        if world == 1:
            return
        for layer in self.network.modules():
            if not isinstance(layer, ContextLayer):
                continue
            values = [b for b in layer.buffers() if b.is_floating_point()]
            reference = layer.reference and layer.reference.to(self.device)
            if reference is not None:
                numbers = torch.tensor(reference[:2], dtype=torch.float64, device=self.device)
                values += [numbers, *reference[2:]]
            for value in values:
                dist.all_reduce(value)
                value /= world
            if reference is not None:
                plates, weight = numbers.tolist()
                layer.reference = TrainingReference(plates, weight, *reference[2:])

    def on_validation_epoch_start(self) -> None:
        """Start a table of predictions."""
        self._begin_evaluation()

    def on_test_epoch_start(self) -> None:
        """Start a table of predictions for each test set."""
        self._begin_evaluation()

    def on_predict_epoch_start(self) -> None:
        """Prepare the method for prediction."""
        self._begin_evaluation()

    def _add_predictions(self, batch: dict[str, Tensor], number: int) -> None:
        self._parts.setdefault(number, []).append(select_predictions(batch, self.logits(batch)))

    def validation_step(
        self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Predict validation queries."""
        self._add_predictions(batch, dataloader_idx)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
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
        self._parts = {}

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of all validation plates."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics of each test set."""
        self._log_metrics("test")

    def on_predict_epoch_end(self) -> None:
        """Let the method restore the network."""
        self.method.end(self.network)

    def predict_step(
        self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        """Index, plate, well, label (−1: unknown), prediction and probabilities of each query."""
        mask = batch["kept"]
        probabilities = self.logits(batch).float().softmax(1)[mask]
        return {
            "index": batch["index"][mask],
            "domain": batch["domain"].expand(len(mask))[mask.to(batch["domain"].device)],
            "well": batch["well"][mask],
            "label": batch["label"][mask],
            "predicted": probabilities.argmax(1),
            "probabilities": probabilities,
        }

    # --- checkpoint ----------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the training references of the layers."""
        checkpoint["context_reference"] = reference_state(self.network)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the training references of the layers."""
        load_reference(self.network, checkpoint.get("context_reference", {}))


def _load_network(network: nn.Module, path: str) -> None:
    """Load the network of a checkpoint of this module, or a state dict of the network."""
    checkpoint, state = read_state_dict(path, "model.init_args.weights")
    prefix = "network."
    network_state = {
        k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)
    } or state
    try:
        network.load_state_dict(network_state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"model.init_args.weights={path} does not fit the network: {reason}",
            "Use the network and the data of the run.",
        ) from error
    load_reference(network, checkpoint.get("context_reference", {}))
