"""Noise-aware training once noisy clients are identified (FedNoRo, and Stage III of FedSIR).

Axes: K clients, N samples, B mini-batch, C classes, P flat state size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fulgurite.devices import move
from fulgurite.models.fedsir.aggregation import distance_aware_weights, distance_to_clean
from fulgurite.models.fedsir.federation import (
    Client,
    ClientSide,
    Federation,
    LogitLoss,
    MiniBatch,
    Objective,
    Replies,
    TrainReply,
    TrainRequest,
)
from fulgurite.models.fedsir.losses import log_prior, ramp, selective_distillation
from fulgurite.models.fedsir.methods.base import FederatedMethod
from fulgurite.models.fedsir.methods.options import (
    AggregationOptions,
    ClientLossOptions,
    DistillationOptions,
)

__all__ = [
    "DistillationLoss",
    "NoiseAwareClientSide",
    "NoiseAwareMethod",
    "NoiseAwareTrainRequest",
]


class DistillationLoss:
    """Prior-adjusted cross-entropy, with distillation from the global model on some samples.

    Args:
        teacher: The frozen global model.
        weight: Weight of the teacher in [0, 1] on the samples that learn from it.
        log_prior: Offsets added to the student's logits. Shape: (C,).
        temperature: Temperature of the teacher.
        distil: Mask of the samples that learn from the teacher, bool; None means all.
            Shape: (N_k,).
        confidence: Weight of each sample's loss; None means 1. Shape: (N_k,).

    Source: docs/papers/fedsir.md Stage III; ``confidence`` is ours.
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        weight: float,
        log_prior: Tensor,
        temperature: float,
        distil: Tensor | None = None,
        confidence: Tensor | None = None,
    ) -> None:
        self.teacher, self.weight, self.log_prior = teacher, weight, log_prior
        self.temperature, self.distil, self.confidence = temperature, distil, confidence

    def __call__(self, network: nn.Module, batch: MiniBatch) -> Tensor:
        """The loss of a mini-batch."""
        with torch.no_grad():
            teacher_logits = self.teacher(batch.images)
        logits = network(batch.images)
        distil = (
            torch.ones_like(batch.labels)
            if self.distil is None
            else move(self.distil[batch.index], logits.device)
        )
        losses = selective_distillation(
            logits,
            batch.labels,
            teacher_logits,
            distil,
            weight=self.weight,
            log_prior=self.log_prior,
            temperature=self.temperature,
            reduction="none",
        )
        if self.confidence is None:
            return losses.mean()
        # divided by the batch size, not by the weights: an uncertain batch makes a small step
        confidence = move(self.confidence[batch.index], logits.device, logits.dtype)
        return (losses * confidence).mean()


@dataclass(frozen=True, kw_only=True)
class NoiseAwareTrainRequest(TrainRequest):
    """Train as a clean client, or as a noisy one.

    Attributes:
        is_clean: Whether the server holds the client for clean.
    """

    is_clean: bool


class NoiseAwareClientSide(ClientSide):
    """Clients that train by what the server holds them for.

    A client may remember of its samples which learn from the teacher (``distil``, bool; all by
    default) and the weight of each loss (``confidence``; 1 by default). Shape of both: (N_k,).

    Args:
        method: The method, of which only options are used.

    Source: FedNoRo (IJCAI 2023) stage 2; docs/papers/fedsir.md Stage III.
    """

    def __init__(self, method: NoiseAwareMethod) -> None:
        self.distillation, self.losses = method.distillation, method.losses
        self.mask_absent = method.mask_absent

    def objective(self, client: Client, request: TrainRequest) -> Objective:
        """By default LA on clean clients, and LA with distillation on noisy ones."""
        losses, distillation = self.losses, self.distillation
        assert isinstance(request, NoiseAwareTrainRequest)
        counts = client.count_labels(current=losses.prior == "current")
        prior = log_prior(counts, losses.tau, mask_absent=self.mask_absent)
        prior = prior.to(client.trainer.device, non_blocking=True)
        if request.is_clean:
            return LogitLoss(prior if losses.clean == "la" else None)
        weight = ramp(request.round, distillation.begin, distillation.end, distillation.weight)
        if losses.noisy in ("ce", "ce_kd"):
            prior = torch.zeros_like(prior)
        if losses.noisy in ("la", "ce"):
            weight = 0.0
        return DistillationLoss(
            client.frozen(request.model),
            weight=weight,
            log_prior=prior,
            temperature=distillation.temperature,
            distil=client.memory.get("distil"),
            confidence=client.memory.get("confidence"),
        )


class NoiseAwareMethod(FederatedMethod):
    """Logit adjustment on clean clients, with distillation on noisy ones, and DaAgg.

    Subclasses set ``self.is_clean`` (bool, (K,)) before training.

    Args:
        distillation: Distillation from the global model on noisy clients.
        losses: Losses of clean and of noisy clients.
        aggregation: Weights of the clients' models.

    Source: FedNoRo (IJCAI 2023) stage 2; docs/papers/fedsir.md Stage III.
    """

    mask_absent = False  # take classes that a client lacks out of its softmax

    def __init__(
        self,
        distillation: DistillationOptions = DistillationOptions(),
        losses: ClientLossOptions = ClientLossOptions(),
        aggregation: AggregationOptions = AggregationOptions(),
    ) -> None:
        self.distillation, self.losses, self.aggregation = distillation, losses, aggregation
        self.is_clean: Tensor | None = None

    @property
    def clean(self) -> Tensor | None:
        """Predicted clean mask, bool; None before identification. Shape: (K,)."""
        return self.is_clean

    def _client_is_clean(self, client: int) -> bool:
        return self.is_clean is None or bool(self.is_clean[client])

    @property
    def client_side(self) -> ClientSide:
        """Clients that train by what the server holds them for."""
        return NoiseAwareClientSide(self)

    def training_request(self, fed: Federation, client: int, round: int) -> TrainRequest:
        """The global model, and what the client is held for."""
        return NoiseAwareTrainRequest(
            model=fed.global_state,
            epochs=fed.local_epochs,
            round=round,
            is_clean=self._client_is_clean(client),
        )

    def weights(
        self, fed: Federation, round: int, replies: Replies[TrainReply]
    ) -> dict[int, float]:
        """DaAgg: noisy clients lose weight with their distance to the nearest clean model.

        FedAvg's weights in a round in which no clean client, or only clean ones, reported.
        """
        clients = replies.clients
        clean = [k for k in clients if self._client_is_clean(k)]
        if self.aggregation.rule == "size" or not clean or len(clean) == len(clients):
            return fed.size_weights(clients)
        references = fed.gather_rows(replies.models, clean)

        def measure(client: int, reply: TrainReply) -> Tensor:
            if self._client_is_clean(client):
                return torch.zeros((), dtype=torch.float64, device=fed.device)
            return distance_to_clean(reply.model, references, fed.state.splits)

        weights = distance_aware_weights(
            fed.sizes[list(clients)], replies.stack(measure).cpu(), floor=self.aggregation.floor
        )
        return dict(zip(clients, weights.tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """The predicted clean clients."""
        return {"split_clean": self.is_clean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state."""
        self.is_clean = state["split_clean"]
