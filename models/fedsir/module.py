"""The LightningModule of federated classification: networks, optimizers and metrics wired up.

Axes: B batch, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from fulgurite.base import SystemModule, build_network, check_head, save_options
from fulgurite.errors import CheckpointError, ConfigError
from fulgurite.export.exportable import ExportableNetwork, ExportRequest
from fulgurite.models.fedsir.engine import RoundEngine
from fulgurite.models.fedsir.exporting import export_classifier
from fulgurite.models.fedsir.federation import (
    Federation,
    FlatState,
    RemoteFederation,
    VisibleData,
    choose_group_size,
    connected_clients,
)
from fulgurite.models.fedsir.methods import FedAvg, FederatedMethod
from fulgurite.models.fedsir.network_checks import check_forward, check_layers
from fulgurite.models.fedsir.options import LocalTrainingOptions, RoundOptions
from fulgurite.models.fedsir.trainer_checks import check_trainer
from fulgurite.options import IntAboveOne, PositiveInt, check_arguments, list_options, make_options
from fulgurite.weights import head_name, load_weights

__all__ = ["FederatedClassifier", "NoOpServerOptimizer"]

_ROUNDS = "federated_rounds"  # key of the rounds' state in a checkpoint
_GROUP_SIZE = "clients_in_one_pass"  # key of what `vectorize: auto` has chosen


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

    An epoch is a round, and a training batch is the number of a client group: the whole local
    training of one client, or of several that train in one pass. A plain ``Trainer`` runs the
    rounds; :class:`~fulgurite.callbacks.fedsir.FederatedRounds` logs and draws them.

    Under ``--trainer.strategy=federated`` the clients are distributed over the ranks; the global
    weights are the same bit for bit for any number of ranks (unless clients train in vectorised
    groups, whose composition depends on the ranks). The whole state of the rounds is in the
    checkpoint, so that an interrupted run resumes without a difference in results.

    Args:
        network: The network, or a callable that makes it from (channels, classes), such as a
            class; it must have ``features`` and ``head``.
        optimizer: Makes the optimizer of a client; called in every round.
        method: The federated method: the hooks of a round beyond local training and averaging.
        local: Local training of a client.
        rounds: Which clients take part in a round, and when training ends.
        num_classes: Number of classes C; set from the data.
        in_channels: Number of image channels; set from the data.
        weights: A local file that the network starts from, which Stage I of FedSIR trains on at
            each client: ``.safetensors``, or a state dict or checkpoint written by ``torch.save``;
            see :func:`~fulgurite.weights.load_weights`. A head of another size starts untrained.

    Raises:
        ConfigError: A number is below its minimum, the network lacks ``features`` or ``head``, or
            the weights do not fit it.
        CheckpointError: The weights cannot be read.

    Source: docs/papers/fedsir.md section 2; server optimizer: Reddi et al., ICLR 2021.
    """

    monitor = "val/acc"
    mode = "max"

    def __init__(
        self,
        network: Callable[[int, int], nn.Module] | nn.Module,
        optimizer: OptimizerCallable = torch.optim.Adam,
        method: FederatedMethod | None = None,
        *,
        local: LocalTrainingOptions = LocalTrainingOptions(),
        rounds: RoundOptions = RoundOptions(),
        num_classes: IntAboveOne = 10,
        in_channels: PositiveInt = 1,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        save_options(self, "network", "optimizer", "method", "local", "rounds")
        check_arguments(FederatedClassifier.__init__, locals(), "model.init_args")
        self.local = make_options(LocalTrainingOptions, local)
        if "local" not in self.hparams:  # a record from Python; checkpoints hold plain values
            self.save_hyperparameters({"local": list_options(self.local)})
        self.rounds = make_options(RoundOptions, rounds)
        self.automatic_optimization = False
        self.network = build_network(network, in_channels, num_classes)
        check_layers(self.network)
        check_head(self.network, num_classes)
        if weights is not None:
            load_weights(self.network, weights, head_name(self.network))
        if self.local.compile:
            self.network.compile()
        self.optimizer = optimizer
        self.engine = RoundEngine(method or FedAvg(), self.rounds)
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
        self._rounds_are_open = False
        self._group_size: int | None = None  # what `vectorize: auto` has chosen
        self._resumed: dict[str, Any] | None = None  # rounds of the loaded checkpoint

    def forward(self, images: Tensor) -> Tensor:
        """Logits. Shape: (B, channels, H, W) to (B, C)."""
        return self.network(images)  # type: ignore[no-any-return]

    @property
    def method(self) -> FederatedMethod:
        """The federated method."""
        return self.engine.method

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The server optimizer."""
        make = self.rounds.server_optimizer or NoOpServerOptimizer
        return make(self.network.parameters())

    def export_network(self, request: ExportRequest) -> ExportableNetwork:
        """Hand over the global network, which takes pixels and normalises them itself.

        Raises:
            ConfigError: The DataModule does not say what the network's inputs mean.
        """
        request.restore_data()
        return export_classifier(
            self.network, request.data, num_classes=self.hparams["num_classes"],
            in_channels=self.hparams["in_channels"],
        )  # fmt: skip

    # --- rounds --------------------------------------------------------------------------------

    def groups_per_round(self, num_clients: int, ranks: int) -> int:
        """Number of client groups that each rank trains in a round.

        Args:
            num_clients: Number of clients of the federation.
            ranks: Number of ranks that train together.
        """
        return self.engine.groups_per_round(
            num_clients, ranks=ranks, group_size=self._clients_in_one_pass(num_clients, ranks)
        )

    def _clients_in_one_pass(self, num_clients: int, ranks: int) -> int:
        """Number of clients that train in one pass; measured where it is ``auto``."""
        size = self.local.vectorize
        if size != "auto":
            return size
        if self._group_size is None:
            per_rank = self.engine.groups_per_round(num_clients, ranks=ranks, group_size=1)
            self._group_size = choose_group_size(self._make_federation(0, 0), per_rank)
        return self._group_size

    def setup(self, stage: str) -> None:
        """Check that data, strategy and trainer fit federated rounds.

        Raises:
            ConfigError: The data, the strategy or the trainer does not fit.
        """
        super().setup(stage)
        if stage == "fit":
            check_trainer(self.trainer, self.rounds)

    def on_fit_start(self) -> None:
        """Try the network, and end a resumed training that has spent its limit already.

        Raises:
            CheckpointError: The checkpoint has no record of its rounds.
            ConfigError: The network's logits are not those of its head on its features.
        """
        self._rounds_are_open = False  # each fit has rounds of its own
        check_forward(self._make_federation(0, 0))
        resumes = bool(self.trainer.ckpt_path)
        self.engine.load_state_dict(self._resumed if resumes else None)
        if resumes and self._resumed is None:
            raise CheckpointError(
                "The checkpoint has no record of its rounds.",
                "Train anew, or go on with the version that wrote it.",
            )
        self._resumed = None
        if self.engine.has_spent_limit():
            self.trainer.should_stop = True

    def on_train_start(self) -> None:
        """Open the rounds, and let the method act before round 0 unless a checkpoint has that."""
        self.open_rounds()
        self.engine.start()

    def open_rounds(self) -> None:
        """Build the federation of the trainer's data; nothing where this fit has one.

        Raises:
            ConfigError: The trainer does not train whole rounds, or the optimizer cannot be made.
        """
        if self._rounds_are_open:
            return
        trainer, data = self.trainer, VisibleData(self.trainer.datamodule)  # type: ignore[attr-defined]
        number = self.groups_per_round(data.num_clients, trainer.world_size)
        if trainer.num_training_batches != number:
            raise ConfigError(
                f"A round has {number} client groups, and the trainer allows "
                f"{trainer.num_training_batches}.",
                "Leave out limit_train_batches, overfit_batches and fast_dev_run; a quick run is "
                "--config fedsir/smoke.yaml --trainer.max_epochs=1.",
            )
        try:
            self.optimizer(list(self.network.parameters()))
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"The clients' optimizer cannot be made: {error}.",
                "Change model.init_args.optimizer.init_args.",
            ) from error

        size = self._clients_in_one_pass(data.num_clients, trainer.world_size)

        def connect_federation(seed: int) -> Federation:
            federation, remote = self._make_federation(seed, size), connected_clients()
            return federation if remote is None else RemoteFederation.of(federation, remote)

        self.engine.open(connect_federation, trainer.current_epoch)
        self._rounds_are_open = True

    def _make_federation(self, seed: int, vectorize: int) -> Federation:
        return Federation(
            VisibleData(self.trainer.datamodule),  # type: ignore[attr-defined]
            self.network,
            self.optimizer,
            seed=seed,
            batch_size=self.local.batch_size,
            local_epochs=self.local.epochs,
            autocast=self.trainer.precision_plugin.forward_context,
            resident=self.local.resident,
            vectorize=vectorize,
        )

    def on_train_epoch_start(self) -> None:
        """Begin a round."""
        self.engine.begin_round()

    def training_step(self, batch: Tensor | int, batch_idx: int) -> None:
        """Train a group of clients; after the last group of a round, step the server."""
        self.engine.train_group(int(batch))
        if batch_idx + 1 == self.trainer.num_training_batches:
            self._step_server(self.engine.aggregate())
            self.engine.finish_round()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End the training where a further round would exceed the limit of client-epochs."""
        if self.engine.exhausted:
            self.trainer.should_stop = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the state of the rounds to a checkpoint that can be resumed."""
        if self.engine.is_open and "callbacks" in checkpoint:
            checkpoint[_ROUNDS] = self.engine.state_dict()
            checkpoint[_GROUP_SIZE] = self._group_size

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the state of the rounds until a fit resumes them."""
        self._resumed = checkpoint.get(_ROUNDS)
        self._group_size = checkpoint.get(_GROUP_SIZE)

    def _step_server(self, aggregate: Tensor) -> None:
        old_parameters = [p.detach().clone() for p in self.network.parameters()]
        FlatState(self.network).write(aggregate)
        optimizer: Any = self.optimizers()
        if not isinstance(optimizer.optimizer, NoOpServerOptimizer):
            with torch.no_grad():
                for parameter, old in zip(self.network.parameters(), old_parameters, strict=True):
                    if parameter.requires_grad:  # else a decay of weights would move it
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
