"""Number embeddings without a language model: PPMI with SVD, and skip-gram with negatives.

Both read the batches of a language model, so that they see the same text with the same
perturbations and can be probed by the same callback.

Axes: B batch, L tokens, V vocabulary, D width, N numbers, C contexts, P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite.base import save_options
from fulgurite.devices import move
from fulgurite.errors import ConfigError, DataError
from fulgurite.export.exportable import ExportableNetwork, ExportRequest, no_network_error
from fulgurite.models.number_probing.classical.counting import (
    cooccurrences,
    ppmi,
    save_vectors,
    svd_embeddings,
)
from fulgurite.models.number_probing.language_models.module import NumberModule
from fulgurite.sampling import sampler_ranks

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

__all__ = ["PPMI", "SkipGram"]

_MERGE_EVERY = 64  # batches whose counts are added at once, since each addition copies all counts

Floats = npt.NDArray[np.float64]


class _VectorFileModule(NumberModule):
    """Writes its number embeddings beside the run's metrics when training ends."""

    monitor = None

    def number_embeddings(self, ns: Sequence[int]) -> Tensor:
        raise NotImplementedError

    def export_network(self, request: ExportRequest) -> ExportableNetwork:
        """Refuse: there are vectors, and no network.

        Raises:
            ConfigError: Always.
        """
        raise no_network_error(self, "but vectors, which numbers.txt in its run folder holds")

    def on_train_end(self) -> None:
        """Write ``numbers.txt``, for ``fulgurite probe``."""
        logger = self.trainer.logger
        folder = logger.log_dir if logger else None
        if folder and self.trainer.is_global_zero and self.number_ids:
            numbers = sorted(self.number_ids)
            save_vectors(Path(folder) / "numbers.txt", numbers, self.number_embeddings(numbers))


class PPMI(_VectorFileModule):
    """Counts in one epoch; positive pointwise mutual information, then singular directions.

    Nothing is trained by gradients: an optimizer step never happens, and ``global_step`` stays 0.

    Args:
        width: D.
        window: Largest distance of two tokens of a pair.
        smoothing: See :func:`ppmi`.
        power: See :func:`svd_embeddings`.
        contexts: Number of contexts C: the most frequent tokens.
        all_rows: Take the singular directions of all tokens, instead of the numbers alone.
        vocab_size: V; taken from the data.

    Raises:
        ConfigError: A number is out of range.

    Source: docs/papers/number_probing.md section 4.3 (window, smoothing, 20k contexts, 100
        directions); the paper's settings are unknown; rows: inferred.
    """

    def __init__(
        self,
        width: int = 100,
        window: int = 5,
        *,
        smoothing: float = 0.75,
        power: float = 0.5,
        contexts: int = 20000,
        all_rows: bool = False,
        vocab_size: int = 1002,
    ) -> None:
        super().__init__(vocab_size)
        self.save_hyperparameters()
        for name, value in (("width", width), ("window", window), ("contexts", contexts)):
            if value < 1:
                raise ConfigError(
                    f"model.init_args.{name}={value} is too small.",
                    f"Give --model.init_args.{name} of at least 1.",
                )
        self.automatic_optimization = False
        self.width, self.window, self.contexts = width, window, contexts
        self.smoothing, self.power, self.all_rows = smoothing, power, all_rows
        # Lightning moves and counts parameters; this one is never trained
        self.anchor = nn.Parameter(torch.zeros(0), requires_grad=False)
        self._counts: csr_matrix | None = None
        self._pending: list[csr_matrix] = []  # counts of the last batches
        self._rows: tuple[list[int], Tensor] | None = None  # tokens and their embeddings

    @property
    def counts(self) -> csr_matrix:
        """Pairs so far. Shape: (V, V)."""
        from scipy.sparse import csr_matrix

        if self._counts is None:
            self._counts = csr_matrix((self.vocab_size, self.vocab_size))
        if self._pending:
            self._counts, self._pending = sum(self._pending, self._counts), []
        return self._counts

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the counts, as tensors."""
        super().on_save_checkpoint(checkpoint)
        table = self.counts
        checkpoint["counts"] = {
            name: torch.from_numpy(np.asarray(getattr(table, name)).copy())
            for name in ("data", "indices", "indptr")
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See :meth:`on_save_checkpoint`."""
        from scipy.sparse import csr_matrix

        super().on_load_checkpoint(checkpoint)
        parts = tuple(checkpoint["counts"][name].numpy() for name in ("data", "indices", "indptr"))
        self._counts = csr_matrix(parts, (self.vocab_size, self.vocab_size))
        self._pending, self._rows = [], None

    def configure_optimizers(self) -> None:
        """Return no optimizer: nothing is trained."""

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Count the pairs of a batch.

        Raises:
            ConfigError: There are several ranks, each of which would count a part of the text.
        """
        if self.trainer.world_size > 1:
            raise ConfigError(
                "Each rank would count a part of the text.", "Use --trainer.devices=1."
            )
        documents = batch.get("documents")
        counts = cooccurrences(
            batch["tokens"].cpu().numpy(),
            self.vocab_size,
            self.window,
            None if documents is None else documents.cpu().numpy(),
        )
        self._pending.append(counts)
        self._rows = None
        if len(self._pending) >= _MERGE_EVERY:
            _ = self.counts
        self.log("train/pairs", float(counts.sum()), batch_size=len(batch["tokens"]))

    def number_embeddings(self, ns: Sequence[int]) -> Tensor:
        """Rows of numbers, from what has been counted so far. Shape: (N, D), float64.

        Before anything is counted they are random, as those of an untrained network.

        Raises:
            DataError: A number has no token.
        """
        tokens = self.number_tokens(ns).tolist()
        if not self.counts.nnz:
            generator = torch.Generator().manual_seed(0)
            shape = self.vocab_size, self.width
            return torch.randn(shape, generator=generator, dtype=torch.float64)[tokens]
        if self._rows is None:
            row_tokens = (
                [*range(self.vocab_size)] if self.all_rows else sorted(self.number_ids.values())
            )
            frequent = np.asarray(self.counts.sum(0)).ravel().argsort(kind="stable")[::-1]
            columns = np.sort(frequent[: self.contexts])
            table = ppmi(self.counts[row_tokens][:, columns], self.smoothing)
            rows = svd_embeddings(table, self.width, self.power)
            self._rows = row_tokens, torch.from_numpy(rows)
        row_tokens, embeddings = self._rows
        row_of = {token: i for i, token in enumerate(row_tokens)}
        return embeddings[torch.tensor([row_of[token] for token in tokens])]


class SkipGram(_VectorFileModule):
    """Each token predicts the tokens near it, against random ones.

    Random tokens come from the counts of the data to a power. A token's nearer neighbours weigh
    more, as if the window had a random length.

    Args:
        width: D.
        window: Largest distance of two tokens of a pair.
        negatives: Random tokens for each pair.
        power: Exponent of the counts from which random tokens are drawn.
        subsample: Tokens of a higher relative frequency are left out at random, the more the
            more frequent; 0 for none.
        optimizer: Makes the optimizer.
        seed: Seed of random tokens and of the tokens left out.
        vocab_size: V; taken from the data.

    Raises:
        ConfigError: A number is out of range.
        DataError: The data give no ``token_counts``.

    Source: word2vec, arXiv 1310.4546, sections 2.2 and 2.3; the paper's settings are unknown.
    """

    def __init__(
        self,
        width: int = 100,
        window: int = 5,
        *,
        negatives: int = 5,
        power: float = 0.75,
        subsample: float = 1e-3,
        optimizer: OptimizerCallable = torch.optim.Adam,
        seed: int = 0,
        vocab_size: int = 1002,
    ) -> None:
        super().__init__(vocab_size)
        save_options(self, "optimizer")
        for name, value in (("width", width), ("window", window), ("negatives", negatives)):
            if value < 1:
                raise ConfigError(
                    f"model.init_args.{name}={value} is too small.",
                    f"Give --model.init_args.{name} of at least 1.",
                )
        self.window, self.negatives, self.power = window, negatives, power
        self.subsample, self.optimizer, self.seed = subsample, optimizer, seed
        self.embedding = nn.Embedding(vocab_size, width)
        self.contexts = nn.Embedding(vocab_size, width)
        nn.init.uniform_(self.embedding.weight, -0.5 / width, 0.5 / width)
        nn.init.zeros_(self.contexts.weight)
        self._cumulative_weights = torch.zeros(0)
        #: Probability that a token is no frequent one that is left out. Shape: (V,).
        self.keep_probability = torch.zeros(0)

    def setup(self, stage: str) -> None:
        """Take the tokens' counts from the data.

        Raises:
            DataError: The data give no ``token_counts``.
        """
        super().setup(stage)
        if stage != "fit":
            return
        counts = getattr(getattr(self._trainer, "datamodule", None), "token_counts", None)
        if counts is None:
            raise DataError(
                "Skip-gram needs how often each token occurs, and the data do not say it.",
                "Use fulgurite.datamodules.number_probing.NumberTextDataModule.",
            )
        self.set_token_counts(counts)

    def set_token_counts(self, counts: Tensor) -> None:
        """Say how often each token occurs, by which others are drawn and frequent ones left out.

        Args:
            counts: Of the first tokens; the others do not occur.

        Shape:
            - counts: (at most V,).
        """
        frequency = torch.zeros(self.vocab_size, dtype=torch.float64)
        frequency[: len(counts)] = counts / counts.sum()
        self._cumulative_weights = frequency.pow(self.power).cumsum(0)
        self.keep_probability = torch.ones_like(frequency)
        if self.subsample:
            self.keep_probability = (
                (self.subsample / frequency.clamp(min=1e-30)).sqrt().clamp(max=1)
            )

    def number_embeddings(self, ns: Sequence[int]) -> Tensor:
        """Rows of numbers. Shape: (N, D).

        Raises:
            DataError: A number has no token.
        """
        return self.embedding.weight[self.number_tokens(ns).to(self.embedding.weight.device)]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer."""
        return self.optimizer(self.parameters())

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Mean loss of the pairs of a batch [nats per pair and side]."""
        tokens, documents = batch["tokens"], batch.get("documents")
        # not the global generator, whose state is in no checkpoint
        rank = sampler_ranks(self._trainer)[0]
        generator = torch.Generator().manual_seed(
            ((self.seed * 1_000_003 + self.global_step) * 1009 + rank) % 2**63
        )
        keep = torch.rand(tokens.shape, generator=generator) < self.keep_probability[tokens.cpu()]
        shape = (*tokens.shape, self.negatives)
        uniform = (
            torch.rand(shape, generator=generator, dtype=torch.float64)
            * self._cumulative_weights[-1]
        )
        # right: a token without counts is never drawn
        negatives = torch.searchsorted(self._cumulative_weights, uniform, right=True)
        negatives = move(negatives.clamp(max=self.vocab_size - 1), tokens.device)
        weights, weight_sums = _weigh_pairs(move(keep, tokens.device), documents, self.window)
        center, context = self.embedding(tokens), self.contexts(tokens)
        total = center.new_zeros(())
        for lag, weight in enumerate(weights, 1):
            for a, b in ((center, context), (context, center)):
                score = (a[:, :-lag] * b[:, lag:]).sum(-1)
                total = total - (F.logsigmoid(score) * weight).sum()
        noise = F.logsigmoid(-torch.einsum("bld,blkd->blk", center, self.contexts(negatives)))
        total = total - (noise.sum(-1) * weight_sums).sum()
        loss: Tensor = total / weight_sums.sum().clamp(min=1e-9)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(tokens))
        return loss


def _weigh_pairs(
    keep: Tensor, documents: Tensor | None, window: int
) -> tuple[list[Tensor], Tensor]:
    """Weights of the pairs at each distance, and their sum for each token.

    Args:
        keep: Whether a token takes part. Shape: (B, L), bool.
        documents: Shape: (B, L).
        window: Largest distance of two tokens of a pair.

    Returns:
        Shapes: (B, L - distance) each, and (B, L).

    Example:
        >>> weights, weight_sums = _weigh_pairs(torch.ones(1, 3, dtype=torch.bool), None, 2)
        >>> weights, weight_sums
        ([tensor([[1., 1.]]), tensor([[0.5000]])], tensor([[1.5000, 2.0000, 1.5000]]))
    """
    weights = []
    weight_sums = torch.zeros(keep.shape, device=keep.device)
    for lag in range(1, min(window, keep.shape[1] - 1) + 1):
        pairs = keep[:, :-lag] & keep[:, lag:]
        if documents is not None:
            pairs = pairs & (documents[:, :-lag] == documents[:, lag:])
        weight = pairs * (1 - (lag - 1) / window)
        weight_sums[:, :-lag] += weight
        weight_sums[:, lag:] += weight
        weights.append(weight)
    return weights, weight_sums
