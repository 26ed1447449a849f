"""Language models whose number embeddings can be probed.

Axes: B batch, L tokens, D width, V vocabulary, N numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric

from fulgurite.base import SystemModule, build_network, save_options, scheduled
from fulgurite.devices import move, read_clock
from fulgurite.errors import ConfigError, DataError
from fulgurite.export.exportable import ExportableNetwork, ExportRequest
from fulgurite.models.number_probing.language_models.exporting import export_language_model
from fulgurite.models.number_probing.language_models.losses import (
    average_right_rows,
    rows_all_right,
    token_losses,
)
from fulgurite.models.number_probing.language_models.optimizer import MuonAdamW, parameter_groups
from fulgurite.options import PositiveInt, check_options, make_options

__all__ = ["HeadOptions", "NumberLM", "NumberModule"]

_STD = 0.02  # std of initial embeddings, as of the backbones' weights


class NumberModule(SystemModule):
    """A LightningModule that knows which tokens stand for which number.

    The DataModule provides them (``number_ids`` and ``number_pieces``), and checkpoints keep them.

    Args:
        vocab_size: V; taken from the data.

    Attributes:
        number_ids: Token of each number that is a single token.
        number_pieces: Tokens of each number when it stands alone.
    """

    monitor: str | None = "val/loss"

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        if vocab_size < 2:
            raise ConfigError(
                f"vocab_size={vocab_size} is too small.",
                "Give --model.init_args.vocab_size of 2 or more.",
            )
        self.vocab_size = vocab_size
        self.number_ids: dict[int, int] = {}
        self.number_pieces: dict[int, tuple[int, ...]] = {}

    def setup(self, stage: str) -> None:
        """Take the numbers' tokens from the data.

        Raises:
            ConfigError: The data have another number of tokens than the model.
        """
        super().setup(stage)
        data = getattr(self._trainer, "datamodule", None)
        self.number_ids = dict(getattr(data, "number_ids", None) or self.number_ids)
        self.number_pieces = dict(getattr(data, "number_pieces", None) or self.number_pieces)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the numbers' tokens, so that a checkpoint can be probed without its data."""
        checkpoint["number_ids"] = dict(self.number_ids)
        checkpoint["number_pieces"] = dict(self.number_pieces)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See :meth:`on_save_checkpoint`."""
        self.number_ids = dict(checkpoint.get("number_ids", {})) or self.number_ids
        self.number_pieces = dict(checkpoint.get("number_pieces", {})) or self.number_pieces

    def number_tokens(self, ns: Sequence[int]) -> Tensor:
        """Tokens of numbers. Shape: (N,), int64.

        Raises:
            DataError: A number has no token.
        """
        missing = [n for n in map(int, ns) if n not in self.number_ids]
        if missing:
            some = ", ".join(map(str, missing[:5])) + (" …" if len(missing) > 5 else "")
            raise DataError(
                f"{len(missing)} of {len(ns)} numbers have no token of their own: {some}.",
                f"Probe numbers that have one; there are {len(self.number_ids)} of them.",
            )
        return torch.tensor([self.number_ids[int(n)] for n in ns], dtype=torch.int64)


@dataclass(frozen=True)
class HeadOptions:
    """What gives the logits.

    Args:
        tie_embeddings: Use the embedding as head.
        loss_chunk: Tokens whose logits exist at a time.

    Raises:
        ConfigError: A value is out of range.
    """

    tie_embeddings: bool = True
    loss_chunk: PositiveInt = 8192

    def __post_init__(self) -> None:
        check_options(self, "model.init_args.head")


class NumberLM(NumberModule):
    """Predicts targets, such as the next tokens, from tokens.

    A batch is a dict: ``tokens`` and ``targets`` (B, L) in int64, -100 where there is nothing to
    predict; optionally ``documents`` (B, L), ids of pieces that must not see each other.

    Args:
        backbone: Makes hidden states from embedded tokens, or a function that makes it; see
            :class:`~fulgurite.models.number_probing.backbones.CausalBackbone`.
        optimizer: Makes the optimizer from :func:`~.optimizer.parameter_groups`.
        scheduler: Makes the scheduler, stepped after each optimizer step.
        warmup: Optimizer steps in which the learning rate rises linearly, before the scheduler's.
        head: What gives the logits.
        exact_match: Report the fraction of sequences whose targets are all predicted.
        vocab_size: V; taken from the data.
        probed: Embedding of a number in probes: its row of the embedding (``input``) or of the
            head (``output``), or the hidden state after its tokens by themselves (``state``), which
            numbers of several tokens have as well.

    Raises:
        ConfigError: A number is out of range, or the backbone has no width.

    Source: docs/papers/number_probing.md sections 2.2 and 6; warm-up and initial values: inferred.
    """

    def __init__(
        self,
        backbone: nn.Module | Callable[[], nn.Module],
        optimizer: OptimizerCallable = MuonAdamW,
        scheduler: LRSchedulerCallable | None = None,
        warmup: int = 0,
        *,
        head: HeadOptions = HeadOptions(),
        exact_match: bool = False,
        vocab_size: int = 1002,
        probed: Literal["input", "output", "state"] = "input",
    ) -> None:
        super().__init__(vocab_size)
        save_options(self, "backbone", "optimizer", "scheduler")
        if warmup < 0:
            raise ConfigError(
                f"model.init_args.warmup={warmup} is too small.",
                "Give --model.init_args.warmup of at least 0.",
            )
        head = make_options(HeadOptions, head)
        backbone = build_network(backbone, argument="backbone")
        width = getattr(backbone, "width", None)
        if not isinstance(width, int):
            raise ConfigError(
                f"The backbone {type(backbone).__name__} has no `width`.",
                "Set --model.init_args.backbone to one of fulgurite.models.number_probing.backbones"
                ", or give yours an integer attribute `width`.",
            )
        self.backbone = backbone
        self.embedding = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.embedding.weight, std=_STD)
        self.head: nn.Embedding | None = None  # a table too, one row per token
        if not head.tie_embeddings:
            self.head = nn.Embedding(vocab_size, width)
            nn.init.normal_(self.head.weight, std=_STD)
        self.optimizer, self.scheduler = optimizer, scheduler
        self.warmup, self.loss_chunk, self.exact_match = warmup, head.loss_chunk, exact_match
        self.probed: Literal["input", "output", "state"] = probed
        # metrics, not logged values: Lightning averages values over batches and ranks without the
        # number of targets in them
        names = ("loss", "acc", *(("exact",) if exact_match else ()))
        self.val_metrics, self.test_metrics = (
            nn.ModuleDict({name: MeanMetric() for name in names}) for _ in range(2)
        )
        self._since = 0.0
        #: Tokens that were trained on since the speed was logged last.
        self.token_count = 0

    @property
    def shardable_network(self) -> nn.Module:
        """The backbone."""
        return self.backbone

    @property
    def head_weight(self) -> Tensor:
        """Output table: the embedding, where they are tied. Shape: (V, D)."""
        return self.embedding.weight if self.head is None else self.head.weight

    def number_embeddings(
        self, ns: Sequence[int], table: Literal["input", "output", "state"] | None = None
    ) -> Tensor:
        """Rows of numbers. Shape: (N, D).

        Args:
            ns: Numbers.
            table: The embedding, the head, or the state after a number's tokens; by default what
                ``probed`` says.

        Raises:
            DataError: A number has no token.
        """
        table = table or self.probed
        if table == "state":
            return self._number_states(ns)
        weight = self.embedding.weight if table == "input" else self.head_weight
        return weight[move(self.number_tokens(ns), weight.device)]

    def _number_states(self, ns: Sequence[int]) -> Tensor:
        """Hidden states after the tokens of numbers by themselves. Shape: (N, D)."""
        pieces = {n: (token,) for n, token in self.number_ids.items()} | self.number_pieces
        if missing := [n for n in map(int, ns) if not pieces.get(n)]:
            raise DataError(
                f"{len(missing)} of {len(ns)} numbers have no tokens: {missing[0]} is the first.",
                f"Probe numbers that have some; there are {len(pieces)} of them.",
            )
        tokens = [pieces[int(n)] for n in ns]
        states = self.embedding.weight.new_empty(len(tokens), self.embedding.weight.shape[1])
        for length in {len(ids) for ids in tokens}:
            rows = [i for i, ids in enumerate(tokens) if len(ids) == length]
            batch = torch.tensor([tokens[i] for i in rows], dtype=torch.int64)
            states[rows] = self.hidden(move(batch, states.device))[:, -1].to(states)
        return states

    def hidden(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """Hidden states after the last norm. Shape: (B, L) to (B, L, D)."""
        return cast("Tensor", self.backbone(self.embedding(tokens), documents))

    def forward(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """Logits of all tokens, for short sequences. Shape: (B, L) to (B, L, V)."""
        return nn.functional.linear(self.hidden(tokens, documents), self.head_weight)

    def export_network(self, request: ExportRequest) -> ExportableNetwork:
        """Hand over embedding, backbone and head; a sequence is one document."""
        return export_language_model(
            self.embedding, self.backbone, self.head, data=request.data, number_ids=self.number_ids
        )

    def configure_optimizers(self) -> Any:
        """The optimizer, with its scheduler if there is one.

        Raises:
            ConfigError: The scheduler waits for a metric.
        """
        optimizer = self.optimizer(parameter_groups(self, self.backbone))
        return scheduled(optimizer, self.scheduler, "step", self.warmup)

    def _losses(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(batch["tokens"], batch.get("documents"))
        return token_losses(hidden, self.head_weight, batch["targets"], self.loss_chunk)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Mean loss of a batch."""
        losses, hits = self._losses(batch)
        loss = losses.sum() / max(1, len(losses))
        size = len(batch["tokens"])
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        if self.exact_match:
            right = average_right_rows(hits, batch["targets"])
            self.log("train/exact", right, batch_size=size)
        self.token_count += batch["tokens"].numel()
        return loss

    def on_train_epoch_start(self) -> None:
        """Start the clock."""
        self._since, self.token_count = read_clock(self.device), 0

    def on_validation_start(self) -> None:
        """Stop the clock."""
        self._since -= read_clock(self.device)

    def on_validation_end(self) -> None:
        """Start the clock again."""
        self._since += read_clock(self.device)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the speed of all ranks since it was logged last [tokens/s]."""
        every: int = getattr(self.trainer, "log_every_n_steps", 0)
        if every and (batch_idx + 1) % every == 0:
            now = read_clock(self.device)
            speed = self.token_count * self.trainer.world_size / max(now - self._since, 1e-9)
            self.log("train/tokens_per_s", speed, batch_size=1)
            self._since, self.token_count = now, 0

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Log loss, accuracy of tokens, and of whole answers with ``exact_match``."""
        self._evaluate(batch, "val", self.val_metrics)

    def test_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """See :meth:`validation_step`."""
        self._evaluate(batch, "test", self.test_metrics)

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Target and most likely token, and what the data number rows by. Shapes: (B, L), (B,)."""
        hidden = self.hidden(batch["tokens"], batch.get("documents"))
        rows = torch.split(hidden.flatten(0, 1), self.loss_chunk)
        likely = [nn.functional.linear(part, self.head_weight).argmax(-1) for part in rows]
        numbered = {"index": batch["index"]} if "index" in batch else {}
        return {
            **numbered,
            "targets": batch["targets"],
            "predicted": torch.cat(likely).view_as(batch["targets"]),
        }

    def _evaluate(self, batch: Mapping[str, Tensor], stage: str, metrics: nn.ModuleDict) -> None:
        losses, hits = self._losses(batch)
        values = {"loss": losses, "acc": hits.float()}
        if self.exact_match:
            values["exact"] = rows_all_right(hits, batch["targets"]).float()
        for name, value in values.items():
            metric = cast("MeanMetric", metrics[name])
            metric.update(value)
            self.log(
                f"{stage}/{name}", metric, on_epoch=True, prog_bar=name == "loss",
                batch_size=len(batch["tokens"]),
            )  # fmt: skip
