"""The LightningModule of federated classification: networks, optimizers and metrics wired up.

Axes: B batch, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from fulgurite.base import SystemModule, build_network, check_head, save_options
from fulgurite.errors import ConfigError
from fulgurite.models.fedsir.methods import FedAvg, FederatedMethod
from fulgurite.weights import head_name, load_weights

__all__ = ["FederatedClassifier", "NoOpServerOptimizer"]


class SlotTrainer(Protocol):
    """Interface of the rounds callback to the module."""

    def train_slot(self, slot: int) -> Tensor | None:
        """Train the clients of a slot; after the last slot, the new global state. Shape: (P,)."""


class NoOpServerOptimizer(torch.optim.Optimizer):
    """The server optimizer of FedAvg, which uses the aggregate unchanged.

    The engine has already written the aggregate into the network; a step only counts the round.
    """

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Count a round."""
        return closure() if closure else None


class FederatedClassifier(SystemModule):
    """A classifier trained by clients that keep their data.

    An epoch is a round, and a training batch is a slot: the whole local training of one client
    (or of a group trained in one pass). :class:`~fulgurite.callbacks.fedsir.FederatedRounds`
    schedules the rounds; ``method`` defines what happens in each.

    Args:
        network: The network, or a callable that makes it from (channels, classes), such as a
            class; it must have ``features`` and ``head``.
        optimizer: Makes the optimizer of a client; called in every round.
        method: The federated method: the hooks of a round beyond local training and averaging.
        server_optimizer: Applies the aggregate: ``global − aggregate`` is the gradient it sees
            (FedOpt). By default the aggregate becomes the global model.
        batch_size: Mini-batch size of local training.
        local_epochs: Local epochs of a client in a round.
        max_client_epochs: Training ends before a round in which the local epochs of all clients
            together, identification included, would exceed this number; ``trainer.max_epochs``
            is a limit, too. No limit by default.
        vectorize: Number of clients of a rank that train in one pass where the method's loss
            allows; 0 trains them one after the other.
        resident: Keep a client's images on the device while it trains.
        compile: Compile the network with ``torch.compile``.
        num_classes: Number of classes C; set from the data.
        in_channels: Number of image channels; set from the data.
        weights: A local file that the network starts from, which Stage I of FedSIR trains on at
            each client: ``.safetensors``, or a state dict or checkpoint written by ``torch.save``;
            see :func:`~fulgurite.weights.load_weights`. A head of another size starts untrained.

    Raises:
        ConfigError: A number is below its minimum, the network lacks ``features`` or ``head``, or
            the weights do not fit it.
        CheckpointError: The weights cannot be read.

    Source: FedSIR, arXiv 2604.20825, section 2; server optimizer: Reddi et al., ICLR 2021.
    """

    monitor = "val/acc"
    mode = "max"

    def __init__(
        self,
        network: Callable[[int, int], nn.Module] | nn.Module,
        optimizer: OptimizerCallable = torch.optim.Adam,
        method: FederatedMethod | None = None,
        server_optimizer: OptimizerCallable | None = None,
        batch_size: int = 64,
        local_epochs: int = 1,
        vectorize: int = 0,
        resident: bool = True,
        compile: bool = False,
        max_client_epochs: int | None = None,
        num_classes: int = 10,
        in_channels: int = 1,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        save_options(self, "network", "optimizer", "method", "server_optimizer")
        for name, value, minimum in (
            ("batch_size", batch_size, 1),
            ("local_epochs", local_epochs, 1),
            ("max_client_epochs", max_client_epochs, 1),
            ("num_classes", num_classes, 2),
            ("in_channels", in_channels, 1),
        ):
            if value is not None and value < minimum:
                raise ConfigError(
                    f"model.init_args.{name}={value} is too small.", f"Give {minimum} or more."
                )
        self.automatic_optimization = False
        self.network = build_network(network, in_channels, num_classes)
        if not callable(getattr(self.network, "features", None)) or not hasattr(
            self.network, "head"
        ):
            raise ConfigError(
                f"The network {type(self.network).__name__} has no `features` method or no `head`.",
                "Give it both, so that forward(x) == head(features(x)).",
            )
        check_head(self.network, num_classes)
        if weights is not None:
            load_weights(self.network, weights, head_name(self.network))
        if compile:
            self.network.compile()
        self.optimizer, self.server_optimizer = optimizer, server_optimizer
        self.method = method or FedAvg()
        self.batch_size, self.local_epochs = batch_size, local_epochs
        self.vectorize, self.resident = vectorize, resident
        self.max_client_epochs = max_client_epochs
        self.slot_trainer: SlotTrainer | None = None
        metrics = MetricCollection(
            {
                "acc": MulticlassAccuracy(num_classes, average="micro"),
                "macro_acc": MulticlassAccuracy(num_classes, average="macro"),
                "f1": MulticlassF1Score(num_classes, average="macro"),
            }
        )
        self.val_metrics = metrics.clone(prefix="val/")
        self.test_metrics = metrics.clone(prefix="test/")
        # a metric, not a logged value: Lightning averages values over ranks without their sizes
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()

    def forward(self, images: Tensor) -> Tensor:
        """Logits. Shape: (B, channels, H, W) to (B, C)."""
        return self.network(images)  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The server optimizer."""
        make = self.server_optimizer or NoOpServerOptimizer
        return make(self.network.parameters())

    def training_step(self, batch: Tensor | int, batch_idx: int) -> None:
        """Train a slot's clients; after the last slot of a round, step the server."""
        if self.slot_trainer is None:
            raise ConfigError(
                "FederatedClassifier has no rounds engine.",
                "Add fulgurite.callbacks.fedsir.FederatedRounds to trainer.callbacks.",
            )
        aggregate = self.slot_trainer.train_slot(int(batch))
        if aggregate is not None:
            self._step_server(aggregate)

    def _step_server(self, aggregate: Tensor) -> None:
        from fulgurite.models.fedsir.federation import FlatState

        old_parameters = [p.detach().clone() for p in self.network.parameters()]
        FlatState(self.network).write(aggregate)
        optimizer: Any = self.optimizers()
        if not isinstance(optimizer.optimizer, NoOpServerOptimizer):
            with torch.no_grad():
                for parameter, old in zip(self.network.parameters(), old_parameters, strict=True):
                    parameter.grad = old - parameter
                    parameter.copy_(old)
        optimizer.step()
        optimizer.zero_grad()

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        """Loss and accuracy of the global model on validation images."""
        self._evaluate(batch, "val", self.val_metrics, self.val_loss)

    def test_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        """Loss and accuracy of the global model on test images."""
        self._evaluate(batch, "test", self.test_metrics, self.test_loss)

    def _evaluate(
        self,
        batch: tuple[Tensor, Tensor, Tensor],
        stage: str,
        metrics: MetricCollection,
        loss: MeanMetric,
    ) -> None:
        images, labels, _ = batch
        logits = self(images)
        metrics.update(logits, labels)
        loss.update(F.cross_entropy(logits, labels), weight=len(labels))
        size = len(labels)
        self.log(f"{stage}/loss", loss, on_epoch=True, prog_bar=True, batch_size=size)
        for name, metric in metrics.items(keep_base=False, copy_state=False):
            in_progress_bar = name == self.monitor
            self.log(name, metric, on_epoch=True, prog_bar=in_progress_bar, batch_size=size)

    def predict_step(
        self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int
    ) -> dict[str, Tensor]:
        """Class probabilities (B, C), predicted label and index of each image."""
        images, labels, index = batch
        probabilities = self(images).float().softmax(1)
        return {
            "index": index,
            "label": labels,
            "predicted": probabilities.argmax(1),
            "probabilities": probabilities,
        }
