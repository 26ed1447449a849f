"""RoFL: clients exchange class centroids, which check the labels.

Axes: K clients, N samples, B mini-batch, S selected samples, C classes, D feature dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulgurite.devices import move
from fulgurite.models.fedsir.federation import (
    Client,
    ClientSide,
    Federation,
    MiniBatch,
    Objective,
    Replies,
    Reply,
    Request,
    TrainReply,
    TrainRequest,
)
from fulgurite.models.fedsir.methods.base import FederatedMethod
from fulgurite.models.fedsir.wire import on_wire
from fulgurite.options import (
    NonNegativeFloat,
    NonNegativeInt,
    RightOpenUnitInterval,
    check_arguments,
)

__all__ = [
    "CentroidLoss",
    "RoFL",
    "RoFLClientSide",
    "RoFLTrainReply",
    "RoFLTrainRequest",
    "class_means",
    "merge_centroids",
]


def class_means(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Mean feature of each class; zero for a class without samples.

    Args:
        features: Features of samples. Shape: (N, D).
        labels: Class of each sample. Shape: (N,).
        num_classes: Number of classes C.

    Returns:
        One mean per class. Shape: (C, D).

    Example:
        >>> class_means(torch.tensor([[1.0], [3.0]]), torch.tensor([0, 0]), 2).tolist()
        [[2.0], [0.0]]

    Source: RoFL, IEEE Intelligent Systems 2022, local centroids.
    """
    member = F.one_hot(labels, num_classes).to(features)
    mean: Tensor = member.T @ features / member.sum(0).clamp_min(1)[:, None]
    return mean


def merge_centroids(centroids: Tensor, before: Tensor) -> Tensor:
    """New centroids of the server: those of clients, weighted by their cosine with the old ones.

    Args:
        centroids: Centroids of each client. Shape: (K, C, D).
        before: Old centroids of the server; zero for a class without samples so far.
            Shape: (C, D).

    Returns:
        New centroids. A class that no client supports keeps its centroid, or gets the plain mean if
        it has none yet. Shape: (C, D).

    Example:
        >>> clients = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
        >>> merge_centroids(clients, torch.tensor([[1.0, 0.0]])).tolist()
        [[1.0, 0.0]]

    Source: RoFL, IEEE Intelligent Systems 2022, server; the exceptions: inferred.
    """
    has_samples = centroids.norm(dim=-1) > 0  # (K, C)
    weight = F.cosine_similarity(centroids, before[None], dim=-1).clamp_min(0)
    weight = torch.where(before.norm(dim=-1) > 0, weight, 1.0) * has_samples
    total = weight.sum(0)[:, None]
    merged: Tensor = (weight[..., None] * centroids).sum(0) / total.clamp_min(1e-12)
    return torch.where(total > 0, merged, before)


class CentroidLoss:
    """Loss of the samples with small losses, whose labels the centroids check.

    Of the samples selected, those whose nearest centroid (by cosine) is their label's keep it
    and are pulled to that centroid; the others take the pseudo-label. A call also moves the
    client's centroids towards the batch's.

    Args:
        centroids: Centroids of the client; changed in place by calls. Shape: (C, D).
        pseudo: Pseudo-labels of the global model; None while given labels are used. Shape: (N_k,).
        forget: Fraction of a batch, with the largest losses, that is left out.
        pull: Weight of the distance to the centroid.
        entropy: Weight of the prediction's entropy.

    Source: RoFL, IEEE Intelligent Systems 2022.
    """

    def __init__(
        self,
        centroids: Tensor,
        pseudo: Tensor | None,
        *,
        forget: float,
        pull: float,
        entropy: float,
    ) -> None:
        self.centroids, self.pseudo, self.forget = centroids, pseudo, forget
        self.pull, self.entropy = pull, entropy

    def __call__(self, network: nn.Module, batch: MiniBatch) -> Tensor:
        """The loss; moves the centroids."""
        model: Any = network
        features = model.features(batch.images)
        logits = model.head(features).float()
        features = features.float()
        with torch.no_grad():
            losses = F.cross_entropy(logits, batch.labels, reduction="none")
            number = max(1, int((1 - self.forget) * len(losses)))
            rows = losses.argsort(stable=True)[:number]
            given_labels, row_features = batch.labels[rows], features[rows]
            cosines = F.normalize(row_features, dim=1) @ F.normalize(self.centroids, dim=1).T
            agree = cosines.argmax(1) == given_labels
            labels = given_labels
            if self.pseudo is not None:
                guess = move(self.pseudo[batch.index], given_labels.device)[rows]
                labels = given_labels.where(agree, guess)
            targets = self.centroids[given_labels]
        scores = logits[rows].log_softmax(1)
        distance = (features[rows] - targets).square().mean(1)
        loss: Tensor = (
            F.nll_loss(scores, labels)
            + self.pull * (agree * distance).mean()
            - self.entropy * (scores.exp() * scores).sum(1).mean()
        )
        self._move(row_features, given_labels)
        return loss

    @torch.no_grad()
    def _move(self, features: Tensor, labels: Tensor) -> None:
        means = class_means(features, labels, len(self.centroids))
        # a class absent from the batch has a zero mean, so its cosine and rate are 0
        rate = F.cosine_similarity(self.centroids, means, dim=1)[:, None].square()
        initialised = (self.centroids.norm(dim=1) > 0)[:, None]
        self.centroids.copy_(
            torch.where(initialised, (1 - rate) * self.centroids + rate * means, means)
        )


@dataclass(frozen=True, kw_only=True)
class RoFLTrainRequest(TrainRequest):
    """Train from the global model, with global centroids.

    Attributes:
        centroids: Global centroids; None in the first round. Shape: (C, D).
    """

    centroids: Tensor | None = field(default=None, metadata=on_wire(torch.float32))


@dataclass(frozen=True, kw_only=True)
class RoFLTrainReply(TrainReply):
    """A trained model, and centroids that have moved in its training.

    Attributes:
        centroids: Centroids of the client. Shape: (C, D).
    """

    centroids: Tensor = field(metadata=on_wire(torch.float32))


class RoFLClientSide(ClientSide):
    """Clients that train on the samples with small losses, whose labels centroids check.

    Args:
        method: The method, of which only options are used.

    Source: RoFL, IEEE Intelligent Systems 2022.
    """

    def __init__(self, method: RoFL) -> None:
        self.options = method

    def objective(self, client: Client, request: TrainRequest) -> Objective:
        """The loss of a client, with its own copy of the centroids."""
        assert isinstance(request, RoFLTrainRequest)
        options, round = self.options, request.round
        pseudo = None
        if request.centroids is None or round >= options.pseudo_from:
            batches = list(client.features(request.model))
            if round >= options.pseudo_from:
                pseudo = torch.cat([logits.argmax(1).cpu() for _, logits, _ in batches])
        if request.centroids is None:
            features = torch.cat([f.float() for f, _, _ in batches])
            labels = client.labels.to(features.device)
            centroids = class_means(features, labels, client.trainer.num_classes)
        else:
            centroids = request.centroids.to(client.trainer.device, copy=True)
        client.intermediate["centroids"] = centroids
        ramp = min(1.0, round / options.ramp_rounds) if options.ramp_rounds else 1.0
        pull = options.pull * min(1.0, (round + 1) / max(1, options.pseudo_from))
        return CentroidLoss(
            centroids, pseudo, forget=options.forget * ramp, pull=pull, entropy=options.entropy
        )

    def reply(self, client: Client, request: Request, trained: Tensor | None) -> Reply:
        """Answer with the trained model and the moved centroids."""
        assert trained is not None
        return RoFLTrainReply(model=trained, centroids=client.intermediate.pop("centroids"))


class RoFL(FederatedMethod):
    """FedAvg with exchanged class centroids, sample selection, pseudo-labels and entropy.

    From an unofficial implementation, as the paper's text was not at hand: selection of small
    losses with a fraction ramped up over ``ramp_rounds``, labels checked by the nearest centroid,
    pseudo-labels of the global model from round ``pseudo_from`` on (given labels before), the
    weight of the centroid term rising as ``(round + 1)/pseudo_from`` up to then, entropy weight
    0.8, local centroids that move by the squared cosine, global ones weighted by the cosine.
    Inferred: the distance to a centroid is a mean over features and samples (a sum there), and
    has a gradient; centroids of absent classes are taken up when first seen; models are
    averaged by size.

    Clients are not split: :attr:`clean` stays None.

    Args:
        forget: Fraction of a batch that is left out; meant to be the expected rate of noise.
        ramp_rounds: Number of rounds over which that fraction grows from 0.
        pseudo_from: First round with pseudo-labels.
        pull: Weight of the centroid term.
        entropy: Weight of the entropy term.

    Raises:
        ConfigError: ``forget`` is outside [0, 1), or another number is negative.

    Source: Yang et al., Robust Federated Learning with Noisy Labels, IEEE Intelligent Systems
    2022 (arXiv 2012.01700).
    """

    def __init__(
        self,
        forget: RightOpenUnitInterval = 0.2,
        ramp_rounds: NonNegativeInt = 10,
        pseudo_from: NonNegativeInt = 100,
        *,
        pull: NonNegativeFloat = 1.0,
        entropy: NonNegativeFloat = 0.8,
    ) -> None:
        check_arguments(RoFL.__init__, locals(), "model.init_args.method.init_args")
        self.forget, self.ramp_rounds, self.pseudo_from = forget, ramp_rounds, pseudo_from
        self.pull, self.entropy = pull, entropy
        self.centroids: Tensor | None = None  # global ones, (C, D)

    @property
    def client_side(self) -> ClientSide:
        """Clients that check labels by centroids."""
        return RoFLClientSide(self)

    def training_request(self, fed: Federation, client: int, round: int) -> TrainRequest:
        """The global model and centroids."""
        return RoFLTrainRequest(
            model=fed.global_state,
            epochs=fed.local_epochs,
            round=round,
            centroids=self.centroids,
        )

    def after_round(self, fed: Federation, round: int, replies: Replies[Any]) -> None:
        """Merge the clients' centroids."""
        table = replies.stack(lambda client, reply: reply.centroids)
        before = torch.zeros_like(table[0]) if self.centroids is None else self.centroids
        self.centroids = merge_centroids(table, before.to(table.device)).cpu()

    def state_dict(self) -> dict[str, Any]:
        """The global centroids."""
        return {"centroids": self.centroids}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state."""
        self.centroids = state["centroids"]
