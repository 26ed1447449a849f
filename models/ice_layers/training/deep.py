"""The deep-layer predictor: from a few shallow layers and physics to all deeper ones.

It is the completion network that never sees a deep layer, so that networks trained for one task can
start the other.

Axes: N traces, L layers, P physical fields, K shallow layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from fulgurite.base import save_options
from fulgurite.errors import ConfigError
from fulgurite.models.ice_layers.data.batches import known_truth
from fulgurite.models.ice_layers.data.graph import Track
from fulgurite.models.ice_layers.data.normalise import Normalised
from fulgurite.models.ice_layers.training.ice_module import IceModule
from fulgurite.models.ice_layers.training.metrics import Targets
from fulgurite.models.ice_layers.training.options import (
    DeepInputs,
    PredictionOptions,
    RobustLossOptions,
)
from fulgurite.models.ice_layers.training.uncertainty import mean_and_std
from fulgurite.options import check_arguments

__all__ = ["DeepLayerPredictor"]


class DeepLayerPredictor(IceModule):
    """Predicts deep layers from shallow ones.

    Trained from scratch, or on completed stacks and then on fully traced ones: ``weights`` names
    the checkpoint to start from, whose normalisation it keeps. Which stacks it may see is the
    DataModule's decision.

    Args:
        network: The network, or what makes it from (layers, fields), such as the class
            :class:`~fulgurite.models.ice_layers.CompletionNet`.
        inputs: How many layers networks are shown, and which physics.
        loss: The robust loss.
        prediction: What networks predict, and how many of them; a prior needs
            ``inputs.physics=all``.
        optimizer: Makes the optimizer.
        scheduler: Makes the scheduler, stepped after each step.
        weights: Checkpoint of a run whose networks and statistics are the start.
        allow_seen: Whether ``weights`` may have seen segments of the test.

    Raises:
        ConfigError: Options do not fit together.
        CheckpointError: ``weights`` cannot be read or does not fit.

    Source: arXiv 2604.20783 (pretraining with synthesised stacks); docs/papers/ice_layers.md
        section 2.
    """

    monitor = "val/mae"
    inputs: DeepInputs

    def __init__(
        self,
        network: Callable[[int, int], nn.Module] | nn.Module,
        inputs: DeepInputs = DeepInputs(),
        loss: RobustLossOptions = RobustLossOptions(),
        prediction: PredictionOptions = PredictionOptions(),
        *,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
        weights: str | None = None,
        allow_seen: bool = False,
    ) -> None:
        records = {"inputs": inputs, "loss": loss, "prediction": prediction}
        super().__init__(
            network,
            **check_arguments(DeepLayerPredictor.__init__, records, "model.init_args"),
            optimizer=optimizer,
            scheduler=scheduler,
            weights=weights,
            allow_seen=allow_seen,
        )
        save_options(self, "network", "optimizer", "scheduler")
        if self.prediction.prior != "none" and self.inputs.physics == "shallow":
            raise ConfigError(
                f"model.init_args.prediction.prior={self.prediction.prior} reads the physics of "
                "all layers.",
                "Set model.init_args.inputs.physics=all, or prediction.prior=none.",
            )

    def build(self, layers: int, physics: int) -> None:
        """Make the networks.

        Raises:
            ConfigError: There is no layer below the shallow ones.
        """
        if layers <= self.inputs.shallow:
            raise ConfigError(
                f"model.init_args.inputs.shallow={self.inputs.shallow} leaves none of {layers} "
                "layers to predict.",
                f"Give less than {layers}, or take deeper stacks.",
            )
        super().build(layers, physics)

    def is_deep(self, layers: int, device: torch.device | None = None) -> Tensor:
        """Which layers are predicted. Shape: (L,), bool."""
        return torch.arange(layers, device=device) >= self.inputs.shallow

    def predict(self, x: Normalised) -> tuple[Tensor, Tensor]:
        """Predicted thickness and its standard deviation over members [m]. Shapes: (N, L)."""
        outs = [self.metres(out, x) for out in self._run_all(x)]
        return mean_and_std(torch.stack(outs))

    def _run_all(self, x: Normalised) -> list[Tensor]:
        deep = self.is_deep(x.observed.shape[1], x.observed.device)
        if self.inputs.physics == "shallow":
            x = dataclasses.replace(x, physics=x.physics * ~deep[:, None])
        return [self.forward_member(network, x, x.observed & ~deep) for network in self.networks]

    def forward(self, batch: Any) -> Tensor:
        """Predicted thickness of all layers [m]. Shape: to (N, L), float64."""
        return self.predict(self.normalise(batch))[0]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss over the deep entries whose thickness is observed."""
        x = self.normalise(batch, unseen=True)
        mask = x.observed & self.is_deep(x.observed.shape[1], x.observed.device)
        loss = torch.stack([self.objective(out, x, mask) for out in self._run_all(x)]).mean()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(x.track.sizes))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Reset the metrics."""
        self.metrics.reset()

    def on_test_epoch_start(self) -> None:
        """Reset the metrics."""
        self.metrics.reset()

    def _evaluate(self, batch: Any) -> None:
        """Score deep entries: against the truth where it is known, else where they are observed."""
        x = self.normalise(batch)
        deep = self.is_deep(x.observed.shape[1], x.observed.device)
        truth = known_truth(batch)
        truth = torch.where(
            truth.isfinite(), truth, torch.where(x.observed, batch.thickness, truth)
        )
        # a shallow entry that is missing is not what is asked for
        is_shallow = (~deep).expand_as(x.observed)
        self.metrics.update(self.predict(x)[0], Targets(truth, is_shallow, x.track.stack))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Score a batch."""
        self._evaluate(batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Score a batch."""
        self._evaluate(batch)

    def _finish(self, stage: str) -> None:
        errors = self.metrics.compute()
        values = {k: v for k, v in errors.items() if k.startswith("layer")}
        for name in ("rmse", "mae", "bias"):
            if f"missing_{name}" in errors:
                values[name] = errors[f"missing_{name}"]
        for name, value in values.items():
            metric = f"{stage}/{name}"
            self.log(metric, value, prog_bar=metric == self.monitor, batch_size=1)

    def on_validation_epoch_end(self) -> None:
        """Log the errors of deep layers."""
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        """Log the errors of deep layers."""
        self._finish("test")

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Predicted thickness, its standard deviation over members (``spread``) [m], and stacks."""
        predicted, std = self.predict(self.normalise(batch))
        stack = batch.stack[Track.of_batch(batch).stack]
        return {"predicted": predicted, "spread": std, "stack": stack}
