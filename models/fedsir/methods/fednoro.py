"""FedNoRo: noisy clients are those on which the warmed-up global model has other class losses.

Axes: K clients, N samples, C classes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fulgurite.models.fedsir.federation import (
    Client,
    ClientSide,
    Federation,
    Reply,
    Request,
)
from fulgurite.models.fedsir.methods.noise_aware import NoiseAwareClientSide, NoiseAwareMethod
from fulgurite.models.fedsir.methods.options import (
    AggregationOptions,
    ClientLossOptions,
    DistillationOptions,
)
from fulgurite.models.fedsir.mixtures import fit_two_gaussians
from fulgurite.models.fedsir.wire import on_wire
from fulgurite.options import PositiveInt, check_arguments

__all__ = [
    "ClassLossReply",
    "ClassLossRequest",
    "FedNoRo",
    "FedNoRoClientSide",
    "class_losses",
    "normalise_losses",
    "vote_clean",
]


@dataclass(frozen=True, kw_only=True)
class ClassLossRequest(Request):
    """Measure the global model on your given labels."""

    model: Tensor


@dataclass(frozen=True, kw_only=True)
class ClassLossReply(Reply):
    """Mean losses of a client's classes.

    Attributes:
        losses: Mean cross-entropy per given class, float64; NaN for no sample. Shape: (C,).
    """

    losses: Tensor = field(metadata=on_wire(torch.float32))


class FedNoRoClientSide(NoiseAwareClientSide):
    """Noise-aware clients that report their class losses.

    Source: FedNoRo, IJCAI 2023, stage 1.
    """

    def reply(self, client: Client, request: Request, trained: Tensor | None) -> Reply:
        """Answer with class losses of plain images, or with a trained model."""
        if not isinstance(request, ClassLossRequest):
            return super().reply(client, request, trained)
        labels, classes = client.given_labels, client.trainer.num_classes
        loss = F.cross_entropy(client.logits(request.model).cpu(), labels, reduction="none")
        sums = torch.zeros(classes, dtype=torch.float64).index_add_(0, labels, loss.double())
        return ClassLossReply(losses=sums / labels.bincount(minlength=classes))


def class_losses(fed: Federation, side: ClientSide) -> Tensor:
    """Mean cross-entropy of the global model per client and given class; NaN for no sample.

    Every rank must call it. Images are not augmented.

    Args:
        fed: The federation.
        side: A client side that answers a :class:`ClassLossRequest`.

    Returns:
        Mean losses, float64. Shape: (K, C).

    Source: FedNoRo, IJCAI 2023, stage 1.
    """
    request = ClassLossRequest(model=fed.global_state)
    replies = fed.exchange(side, dict.fromkeys(range(fed.num_clients), request))
    return replies.stack(lambda client, reply: reply.losses).cpu()


def normalise_losses(losses: Tensor) -> Tensor:
    """Scale each class to [0, 1] over clients; a class that a client lacks gets its minimum.

    Args:
        losses: Mean losses from :func:`class_losses`. Shape: (K, C).

    Returns:
        Scaled losses, float64. A class that no client has, or that is equal on all, is 0. Shape:
        (K, C).

    Example:
        >>> normalise_losses(torch.tensor([[1.0, 2.0], [3.0, torch.nan]])).tolist()
        [[0.0, 0.0], [1.0, 0.0]]

    Source: FedNoRo, IJCAI 2023, stage 1, and its authors' code for absent classes.
    """
    losses = losses.double()
    finite = losses.isfinite()
    low = losses.masked_fill(~finite, torch.inf).min(0).values
    high = losses.masked_fill(~finite, -torch.inf).max(0).values
    value_range = (high - low).nan_to_num(0.0, 0.0, 0.0)
    scaled = (losses - low) / value_range.where(value_range > 0, 1.0)
    return scaled.where(finite & (value_range > 0), 0.0)


def vote_clean(vectors: Tensor, votes: int = 9) -> Tensor:
    """Split clients by a mixture of two Gaussians; the most frequent split wins.

    Args:
        vectors: One vector per client; noisy ones have the larger sum. Shape: (K, C).
        votes: Number of fitted mixtures, with random states 0, 1, ….

    Returns:
        Predicted clean mask, bool; all true where all vectors are equal. Shape: (K,).

    Example:
        >>> vectors = torch.rand(10, 4, generator=torch.Generator().manual_seed(0)) / 10
        >>> vectors[6:] += 0.8
        >>> vote_clean(vectors).tolist()
        [True, True, True, True, True, True, False, False, False, False]

    Source: FedNoRo, IJCAI 2023, stage 1.
    """
    table = vectors.double().numpy()
    if len(table) < 2 or np.allclose(table, table[:1]):
        return torch.ones(len(table), dtype=torch.bool)
    ballots = []
    for state in range(votes):
        mixture = fit_two_gaussians(table, random_state=state)
        ballots.append(tuple(mixture.predict(table) != mixture.means_.sum(1).argmax()))
    return torch.tensor(Counter(ballots).most_common(1)[0][0])  # the first one of a tie


class FedNoRo(NoiseAwareMethod):
    """Warm-up by FedAvg with logit adjustment, detection by class losses, noise-aware training.

    The warm-up is part of the rounds: ``trainer.max_epochs`` is the whole budget. In round
    ``warmup`` each client sends its mean loss per class under the global model, the split is
    voted on, and :class:`NoiseAwareMethod` (its paper's stage 2) goes on.

    From the paper and its authors' code: all of it, with the defaults of the code (10 of 100
    rounds of warm-up, ramp to a = 0.8 from round 10 to 49, T = 0.8, 9 votes; a class that a
    client lacks is out of its softmax). Ours: losses are taken on plain images, not augmented
    ones, so that they do not depend on a generator; a class of equal loss on all clients is
    ignored; a round is ``local_epochs`` of the module, 1 by default (theirs: 5).
    The split is always into two groups, as in the paper: all-clean clients are split, too.

    Args:
        warmup: Number of rounds of warm-up.
        votes: Number of mixtures that vote on the split.
        distillation: Distillation from the global model on noisy clients.
        tau: Strength of the logit adjustment; 0 gives plain cross-entropy.
        aggregation: Aggregation rule, ``distance`` (DaAgg) or ``size`` (FedAvg).

    Raises:
        ConfigError: ``warmup`` or ``votes`` is below 1.

    Source: Wu et al., FedNoRo, IJCAI 2023.
    """

    mask_absent = True

    def __init__(
        self,
        warmup: PositiveInt = 10,
        votes: PositiveInt = 9,
        *,
        distillation: DistillationOptions = DistillationOptions(begin=10, end=49, weight=0.8),
        tau: float = 1.0,
        aggregation: Literal["distance", "size"] = "distance",
    ) -> None:
        check_arguments(FedNoRo.__init__, locals(), "model.init_args.method.init_args")
        super().__init__(distillation, ClientLossOptions(tau), AggregationOptions(aggregation))
        self.warmup, self.votes = warmup, votes
        self.reported_losses: Tensor | None = None  # as sent by the clients, (K, C)

    @property
    def client_side(self) -> ClientSide:
        """Noise-aware clients that report their class losses."""
        return FedNoRoClientSide(self)

    def before_round(self, fed: Federation, round: int) -> None:
        """Split the clients once the warm-up is over."""
        if round >= self.warmup and self.is_clean is None:
            self.reported_losses = class_losses(fed, self.client_side)
            self.is_clean = vote_clean(normalise_losses(self.reported_losses), self.votes)

    def state_dict(self) -> dict[str, Any]:
        """The split, and the losses it rests on."""
        return super().state_dict() | {"losses": self.reported_losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state."""
        super().load_state_dict(state)
        self.reported_losses = state["losses"]
