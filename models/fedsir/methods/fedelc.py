"""FedELC: noisy clients learn the labels of their samples along with the model.

Axes: N samples, N_k samples of client k, B mini-batch, C classes.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from fulgurite.devices import move
from fulgurite.models.fedsir.federation import (
    Client,
    ClientSide,
    MiniBatch,
    Objective,
    Reply,
    Request,
    TrainRequest,
)
from fulgurite.models.fedsir.methods.fednoro import FedNoRo, FedNoRoClientSide
from fulgurite.models.fedsir.methods.noise_aware import NoiseAwareTrainRequest
from fulgurite.options import NonNegativeFloat, PositiveInt, check_arguments

__all__ = ["FedELC", "FedELCClientSide", "SoftLabelLoss"]


class SoftLabelLoss:
    """Loss of model and label distributions together; a call also steps the distributions.

    With p the prediction, y = softmax(ỹ) the label distribution and ŷ the given label:
    ``KL(p ‖ y)/C + α · (−log y[ŷ]) + β · H(p)/C``, mean over the batch. The gradient in ỹ is
    ``((y − p)/C + α (y − onehot(ŷ)))/B``; as an epoch visits a sample once, stepping at the
    visit equals stepping all at the end of the epoch.

    Args:
        soft: Logits ỹ of the label distributions, of a client's samples; changed in place by
            calls. Shape: (N_k, C).
        given_labels: Given labels ŷ. Shape: (N_k,).
        compatibility: Weight α of the given label.
        entropy: Weight β of the prediction's entropy.
        rate: Step size λ of ỹ.

    Source: FedELC, CIKM 2024, stage 2; the loss is PENCIL's (Yi and Wu, CVPR 2019).
    """

    def __init__(
        self,
        soft: Tensor,
        given_labels: Tensor,
        compatibility: float,
        entropy: float,
        *,
        rate: float,
    ) -> None:
        self.soft, self.given_labels, self.rate = soft, given_labels, rate
        self.compatibility, self.entropy = compatibility, entropy

    def __call__(self, network: nn.Module, batch: MiniBatch) -> Tensor:
        """The loss; steps the distributions of the batch's samples."""
        scores = network(batch.images).float().log_softmax(1)
        log_labels = move(self.soft[batch.index], scores.device, scores.dtype).log_softmax(1)
        given_labels = move(self.given_labels[batch.index], scores.device)
        samples, classes = scores.shape
        predicted = scores.exp()
        entropy = -(predicted * scores).sum(1)
        loss: Tensor = (
            ((predicted * (scores - log_labels)).sum(1) + self.entropy * entropy) / classes
            - self.compatibility * log_labels.gather(1, given_labels[:, None]).squeeze(1)
        ).mean()  # fmt: skip
        labels = log_labels.exp()
        gradient = (labels - predicted.detach()) / classes + self.compatibility * (
            labels - F.one_hot(given_labels, classes)
        )
        self.soft[batch.index] -= (self.rate / samples * gradient).to(self.soft)
        return loss


class FedELCClientSide(FedNoRoClientSide):
    """Clients that learn label distributions where they are held for noisy.

    Such a client remembers the logits of its distributions (``soft``), which start at the given
    labels. Shape: (N_k, C).

    Args:
        method: The method, of which only options are used.

    Source: FedELC, CIKM 2024, stage 2.
    """

    def __init__(self, method: FedELC) -> None:
        super().__init__(method)
        self.scale = method.scale
        self.compatibility, self.entropy = method.compatibility, method.entropy
        self.label_rate = method.label_rate

    def objective(self, client: Client, request: TrainRequest) -> Objective:
        """Logit adjustment in the warm-up and on clean clients, soft labels on noisy ones."""
        if _is_clean(request):
            return super().objective(client, request)
        labels = client.given_labels
        if "soft" not in client.memory:
            one_hot = F.one_hot(labels, client.trainer.num_classes).float()
            client.remember(soft=self.scale * one_hot)
        return SoftLabelLoss(
            client.memory["soft"], labels, self.compatibility, self.entropy, rate=self.label_rate
        )

    def reply(self, client: Client, request: Request, trained: Tensor | None) -> Reply:
        """Merge the learned distributions with the predictions of the local model."""
        if isinstance(request, TrainRequest) and not _is_clean(request) and trained is not None:
            predicted = client.logits(trained).softmax(1).cpu()
            merged = (client.memory["soft"].softmax(1) + predicted) / 2
            client.remember(soft=self.scale * merged)
            client.relabel(merged.argmax(1))
        return super().reply(client, request, trained)


def _is_clean(request: TrainRequest) -> bool:
    assert isinstance(request, NoiseAwareTrainRequest)
    return request.is_clean


class FedELC(FedNoRo):
    """Detection as in FedNoRo; then noisy clients learn label distributions by backpropagation.

    After a round, a noisy client's distributions become the mean of the learned ones and of its
    local model's predictions. Their largest entries are written as its current labels, which are
    reported but not trained on: the compatibility term keeps to the given ones.

    From the paper and its authors' code: detection, losses, step size 1000, scale 10, α = 0.5,
    β = 0.2 (of the code's options for CIFAR; the unit of the step size is per mini-batch of 64),
    merging with predictions, DaAgg, 20 of 120 rounds of warm-up. Ours: predictions for merging
    are taken on plain images in evaluation mode, where the code keeps augmenting and BatchNorm
    training; soft labels outlive rounds in which a client does not take part, as in the code.

    Args:
        warmup: Rounds of FedAvg with logit adjustment before detection; part of the budget.
        votes: Number of mixtures that vote on the split.
        compatibility: Weight α of the given label.
        entropy: Weight β of the prediction's entropy.
        label_rate: Step size λ of the label distributions.
        scale: Logit of the given label at the start, and factor of merged distributions.
        tau: Strength of the logit adjustment of warm-up and clean clients.
        aggregation: Aggregation rule, ``distance`` (DaAgg) or ``size`` (FedAvg).

    Raises:
        ConfigError: A weight, rate or scale is negative, or ``warmup`` or ``votes`` is below 1.

    Source: Jiang et al., FedELC, CIKM 2024 (arXiv 2408.04301).
    """

    def __init__(
        self,
        warmup: PositiveInt = 20,
        votes: PositiveInt = 9,
        *,
        compatibility: NonNegativeFloat = 0.5,
        entropy: NonNegativeFloat = 0.2,
        label_rate: NonNegativeFloat = 1000.0,
        scale: NonNegativeFloat = 10.0,
        tau: float = 1.0,
        aggregation: Literal["distance", "size"] = "distance",
    ) -> None:
        check_arguments(FedELC.__init__, locals(), "model.init_args.method.init_args")
        super().__init__(warmup, votes, tau=tau, aggregation=aggregation)
        self.compatibility, self.entropy = compatibility, entropy
        self.label_rate, self.scale = label_rate, scale

    @property
    def client_side(self) -> ClientSide:
        """Clients that learn label distributions where they are held for noisy."""
        return FedELCClientSide(self)
