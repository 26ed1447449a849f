"""LightningModules of language models: loss, optimizer and metrics wired up.

Axes: B batch, N tokens, E width.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric

from fulgurite.base import SystemModule, build_network, save_options, scheduled
from fulgurite.errors import ConfigError, DataError
from fulgurite.export.exportable import ExportableNetwork, ExportRequest
from fulgurite.models.stream_cqsa.exporting import export_language_model
from fulgurite.models.stream_cqsa.losses import (
    IGNORED,
    chunked_cross_entropy,
    mask_tokens,
    token_scores,
)
from fulgurite.sampling import sampler_ranks

__all__ = ["LanguageModel", "MaskedLanguageModel"]


class LanguageModel(SystemModule):
    """Predicts targets, such as the next tokens, from tokens.

    A batch is a dict: ``tokens`` (B, N) and ``targets`` (B, N) in int64, -100 where there is
    nothing to predict; optionally ``documents``, the first tokens of the documents packed into each
    sequence of the batch alike. Other entries are left to callbacks.

    Args:
        network: Makes hidden states from tokens, and logits from hidden states, or a function that
            makes it; see
            :class:`~fulgurite.models.stream_cqsa.network.LanguageNetwork`.
        optimizer: Makes the optimizer.
        scheduler: Makes the scheduler, stepped after each optimizer step.
        warmup: Optimizer steps in which the learning rate rises linearly, before the scheduler's.
        loss_chunk: Tokens of each sequence whose logits exist at a time.

    Raises:
        ConfigError: A number is out of range, or the network has no ``logits``.

    Source: Stream-CQSA, arXiv 2604.20819, trains language models; this loop: inferred.
    """

    monitor = "val/loss"

    def __init__(
        self,
        network: nn.Module | Callable[[], nn.Module],
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
        *,
        warmup: int = 0,
        loss_chunk: int = 1024,
    ) -> None:
        super().__init__()
        save_options(self, "network", "optimizer", "scheduler")
        for name, value, minimum in (("warmup", warmup, 0), ("loss_chunk", loss_chunk, 1)):
            if value < minimum:
                raise ConfigError(
                    f"model.init_args.{name}={value} is too small.",
                    f"Give --model.init_args.{name} of at least {minimum}.",
                )
        network = build_network(network)
        if not callable(getattr(network, "logits", None)):
            raise ConfigError(
                f"The network {type(network).__name__} has no `logits` method.",
                "Set --model.init_args.network to one that has, such as "
                "fulgurite.models.stream_cqsa.Decoder.",
            )
        self.network: Any = network  # a LanguageNetwork and a module
        self.optimizer, self.scheduler = optimizer, scheduler
        self.warmup, self.loss_chunk = warmup, loss_chunk
        # metrics, not logged values: Lightning averages values over batches and ranks without the
        # number of targets in them
        self.val_metrics, self.test_metrics = _metrics(), _metrics()

    @property
    def shardable_network(self) -> nn.Module:
        """The network."""
        return self.network  # type: ignore[no-any-return]

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of all tokens, for short sequences. Shape: (B, N) to (B, N, V)."""
        return self.network.logits(self.network(tokens))  # type: ignore[no-any-return]

    def setup(self, stage: str) -> None:
        """Check that the network knows all tokens of the data.

        Raises:
            ConfigError: The data have more tokens than the network.
        """
        data = getattr(self._trainer, "datamodule", None)
        data_size = getattr(data, "vocab_size", 0)
        network_size = getattr(self.network, "vocab_size", 0)
        if network_size and data_size > network_size:
            raise ConfigError(
                f"The data have {data_size} different tokens, and the network knows "
                f"{network_size}.",
                f"Set --model.init_args.network.init_args.vocab_size={data_size}.",
            )

    def export_network(self, request: ExportRequest) -> ExportableNetwork:
        """Hand over the network with PyTorch's attention; a sequence is one document."""
        return export_language_model(self.network, request.data)

    def configure_optimizers(self) -> Any:
        """The optimizer, with its scheduler if there is one.

        Raises:
            ConfigError: The scheduler waits for a metric.
        """
        optimizer = self.optimizer(self.network.parameters())
        return scheduled(optimizer, self.scheduler, "step", self.warmup)

    def examples(
        self, batch: Mapping[str, Any], stage: str, batch_idx: int
    ) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the network. Shapes: (B, N).

        Args:
            batch: A batch.
            stage: ``train``, ``val``, ``test`` or ``predict``.
            batch_idx: Its index in the epoch.
        """
        return batch["tokens"], batch["targets"]

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Loss of a batch."""
        tokens, targets = self.examples(batch, "train", batch_idx)
        hidden = self.network(tokens, _documents(batch))
        loss = chunked_cross_entropy(hidden, self.network.logits, targets, self.loss_chunk)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(tokens))
        return loss

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Loss and accuracy on validation tokens."""
        self._evaluate(batch, "val", batch_idx, self.val_metrics)

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Loss and accuracy on test tokens."""
        self._evaluate(batch, "test", batch_idx, self.test_metrics)

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Target, most likely token and loss [nats] of each token. Shapes: (B, N).

        Where the data number rows, ``index`` is the number of each. Shape: (B,).
        """
        targets, losses, predicted = self._scores(batch, "predict", batch_idx)
        numbered = {"index": batch["index"]} if "index" in batch else {}
        return {**numbered, "targets": targets, "predicted": predicted, "loss": losses}

    def _scores(
        self, batch: Mapping[str, Any], stage: str, batch_idx: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, targets = self.examples(batch, stage, batch_idx)
        hidden = self.network(tokens, _documents(batch))
        return targets, *token_scores(hidden, self.network.logits, targets, self.loss_chunk)

    def _evaluate(
        self, batch: Mapping[str, Any], stage: str, batch_idx: int, metrics: nn.ModuleDict
    ) -> None:
        targets, losses, predicted = self._scores(batch, stage, batch_idx)
        counted = targets != IGNORED
        values = {
            "loss": losses[counted],
            "bits_per_token": losses[counted] / math.log(2),
            "acc": (predicted == targets)[counted].float(),
        }
        for name, value in values.items():
            metrics[name].update(value)  # type: ignore[operator]
            self.log(
                f"{stage}/{name}",
                metrics[name],  # type: ignore[arg-type]
                on_epoch=True,
                prog_bar=name == "loss",
                batch_size=len(targets),
            )


class MaskedLanguageModel(LanguageModel):
    """Predicts hidden tokens from all others; ``targets`` of batches are not used.

    Which tokens are hidden depends on ``seed``, epoch, batch and the rank of the data only; in
    validation and test not on the epoch.

    Args:
        network: As for :class:`LanguageModel`, with a ``mask_token``, such as
            :class:`~fulgurite.models.stream_cqsa.network.Encoder`.
        optimizer: Makes the optimizer.
        scheduler: Makes the scheduler, stepped after each optimizer step.
        warmup: Optimizer steps in which the learning rate rises linearly.
        loss_chunk: Tokens of each sequence whose logits exist at a time.
        mask_share: Fraction of the tokens that is hidden.
        seed: Seed of the choice of hidden tokens.

    Raises:
        ConfigError: A number is out of range, or the network has no ``mask_token``.

    Source: BERT, arXiv 1810.04805, section 3.1.
    """

    def __init__(
        self,
        network: nn.Module | Callable[[], nn.Module],
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
        *,
        warmup: int = 0,
        loss_chunk: int = 1024,
        mask_share: float = 0.15,
        seed: int = 0,
    ) -> None:
        super().__init__(network, optimizer, scheduler, warmup=warmup, loss_chunk=loss_chunk)
        if not 0 < mask_share < 1:
            raise ConfigError(
                f"mask_share={mask_share} is no share.",
                "Give --model.init_args.mask_share between 0 and 1.",
            )
        mask_token = getattr(self.network, "mask_token", None)
        if not isinstance(mask_token, int):
            raise ConfigError(
                f"The network {type(self.network).__name__} has no mask_token.",
                "Set --model.init_args.network to fulgurite.models.stream_cqsa.Encoder.",
            )
        self.mask_share, self.seed, self.mask_token = mask_share, seed, mask_token

    def examples(
        self, batch: Mapping[str, Any], stage: str, batch_idx: int
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`LanguageModel.examples`."""
        epoch = self.current_epoch if stage == "train" else 0
        # not the global generator: its state is in no checkpoint, and a resumed run must hide the
        # same tokens
        rank = sampler_ranks(self._trainer)[0]
        drawn = random.Random(f"{self.seed} {stage} {epoch} {batch_idx} {rank}")
        generator = torch.Generator().manual_seed(drawn.getrandbits(63))
        return mask_tokens(batch["tokens"], self.mask_share, self.mask_token, generator)


def _metrics() -> nn.ModuleDict:
    return nn.ModuleDict({name: MeanMetric() for name in ("loss", "bits_per_token", "acc")})


def _documents(batch: Mapping[str, Any]) -> list[int] | None:
    """First tokens of the documents, from a list or tensor of shape (K,) or (1, K).

    Raises:
        DataError: The sequences of the batch have documents of their own.
    """
    starts = batch.get("documents")
    if starts is None:
        return None
    starts = torch.as_tensor(starts)
    if starts.ndim > 1 and starts.shape[0] == 1:
        starts = starts[0]
    if starts.ndim != 1:
        raise DataError(
            f"The documents of a batch have the shape {tuple(starts.shape)}.",
            "Give one list of first tokens that holds for every sequence, or batches of one.",
        )
    return [int(start) for start in starts.tolist()]
