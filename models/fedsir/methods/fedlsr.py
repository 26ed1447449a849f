"""FedLSR: every client regularises itself by two views of its images.

Axes: N samples, N_k samples of client k, B mini-batch, C classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulgurite.models.fedsir.federation import (
    Client,
    ClientSide,
    MiniBatch,
    Objective,
    TrainRequest,
)
from fulgurite.models.fedsir.methods.base import FederatedMethod
from fulgurite.options import NonNegativeFloat, NonNegativeInt, check_arguments

__all__ = ["FedLSR", "FedLSRClientSide", "SelfRegularizedLoss", "jensen_shannon", "sharpen"]


def sharpen(probabilities: Tensor) -> Tensor:
    """Squared and normalised probabilities. Shape: (B, C) to (B, C).

    Example:
        >>> sharpen(torch.tensor([[0.75, 0.25]])).tolist()
        [[0.8999999761581421, 0.10000000149011612]]

    Source: FedLSR, CIKM 2022.
    """
    squared = probabilities.square()
    return squared / squared.sum(-1, keepdim=True)


def jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    """Jensen-Shannon divergence of each pair of distributions [nat]. Shapes: (B, C) to (B,).

    Example:
        >>> round(float(jensen_shannon(torch.eye(2)[:1], torch.eye(2)[1:])), 4)
        0.6931

    Source: FedLSR, CIKM 2022.
    """
    middle = (first + second) / 2
    parts = [torch.xlogy(p, p) - torch.xlogy(p, middle) for p in (first, second)]
    return (parts[0] + parts[1]).sum(-1) / 2


class SelfRegularizedLoss:
    """Loss of a mini-batch and a second view of its images.

    With the predictions p_1 and p_2 of the views, and a mixing weight λ drawn uniformly for the
    batch: cross-entropy of ``sharpen(λ p_1 + (1 − λ) p_2)``, plus ``consistency`` times the
    Jensen-Shannon divergence (divided by C) and ``entropy`` times the mean entropy of
    ``softmax(temperature · logits)``. Draws from torch's CPU generator, which the federation seeds
    for each client.

    Args:
        second_view: Makes the network input of samples from their positions among the client's.
        consistency: Weight of the divergence.
        entropy: Weight of the entropy.
        temperature: Factor of the logits in the regularisation.

    Source: FedLSR, CIKM 2022.
    """

    def __init__(
        self,
        second_view: Callable[[Tensor], Tensor],
        consistency: float,
        entropy: float,
        temperature: float,
    ) -> None:
        self.second_view, self.consistency = second_view, consistency
        self.entropy, self.temperature = entropy, temperature

    def __call__(self, network: nn.Module, batch: MiniBatch) -> Tensor:
        """The loss of a mini-batch."""
        views = [network(batch.images).float(), network(self.second_view(batch.index)).float()]
        mix_weight = float(torch.rand(()))
        mixed = sharpen(mix_weight * views[0].softmax(1) + (1 - mix_weight) * views[1].softmax(1))
        loss = F.nll_loss(mixed.clamp_min(1e-12).log(), batch.labels)
        first, second = ((self.temperature * logits).softmax(1) for logits in views)
        divergence = jensen_shannon(first, second).mean() / first.shape[1]
        entropy = -(torch.xlogy(first, first) + torch.xlogy(second, second)).sum(1).mean() / 2
        total: Tensor = loss + self.consistency * divergence + self.entropy * entropy
        return total


class FedLSR(FederatedMethod):
    """FedAvg with local self-regularisation; clients are not split and labels stay as given.

    From the authors' benchmark code (FNBench): both regularisers with their weights 0.4 and 0.3,
    temperature 3, the divergence as a mean over samples and classes, its weight rising linearly
    over the first fifth of the rounds (``ramp_rounds``). Ours: the second view is the training
    augmentation drawn anew (there: flip, colour jitter and grey scale, which digits of one channel
    do not have); the cross-entropy is of the mixed probabilities (the code takes them for
    logits); the entropy is that of both views (the code takes the first one twice, and the softmax
    of probabilities). A local epoch has two passes forward and back, and counts once.

    Args:
        consistency: Weight of the Jensen-Shannon divergence of the views.
        entropy: Weight of the prediction's entropy.
        temperature: Factor of the logits in both regularisers.
        ramp_rounds: Number of rounds over which ``consistency`` rises from 0.

    Raises:
        ConfigError: A weight, the temperature or ``ramp_rounds`` is negative.

    Source: Jiang et al., Towards Federated Learning against Noisy Labels via Local
    Self-Regularization, CIKM 2022.
    """

    def __init__(
        self,
        consistency: NonNegativeFloat = 0.4,
        entropy: NonNegativeFloat = 0.3,
        temperature: NonNegativeFloat = 3.0,
        ramp_rounds: NonNegativeInt = 5,
    ) -> None:
        check_arguments(FedLSR.__init__, locals(), "model.init_args.method.init_args")
        self.consistency, self.entropy = consistency, entropy
        self.temperature, self.ramp_rounds = temperature, ramp_rounds

    @property
    def client_side(self) -> ClientSide:
        """Clients that regularise themselves."""
        return FedLSRClientSide(self)


class FedLSRClientSide(ClientSide):
    """Clients that regularise themselves by a second view of their images.

    Args:
        method: The method, of which only options are used.

    Source: FedLSR, CIKM 2022.
    """

    def __init__(self, method: FedLSR) -> None:
        self.options = method

    def objective(self, client: Client, request: TrainRequest) -> Objective:
        """The self-regularised loss of a client."""
        options = self.options
        rise = min(1.0, request.round / options.ramp_rounds) if options.ramp_rounds else 1.0
        return SelfRegularizedLoss(
            _second_view(client), options.consistency * rise, options.entropy, options.temperature
        )


def _second_view(client: Client) -> Callable[[Tensor], Tensor]:
    """Another augmentation of a client's samples, by their positions among these."""
    images = client.images

    def view(rows: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        return client.augment(images[rows], generator)

    return view
