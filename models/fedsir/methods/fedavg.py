"""FedAvg and FedProx.

Axes: P flat state size.
"""

from __future__ import annotations

from torch import Tensor

from fulgurite.models.fedsir.federation import (
    Client,
    ClientSide,
    LogitLoss,
    Objective,
    TrainRequest,
)
from fulgurite.models.fedsir.methods.base import FederatedMethod
from fulgurite.options import NonNegativeFloat, check_arguments

__all__ = ["FedAvg", "FedProx", "ProximalClientSide", "proximal_loss"]


class FedAvg(FederatedMethod):
    """Size-weighted averages of models trained by cross-entropy.

    Source: McMahan et al., AISTATS 2017.
    """


def proximal_loss(client: Client, model: Tensor, strength: float) -> LogitLoss:
    """Cross-entropy, with a term that holds a client's parameters near those of a model.

    Args:
        client: Client that trains.
        model: Flat state of the model. Shape: (P,).
        strength: Strength μ of ``μ/2 · ‖w − w_model‖²``.

    Source: Li et al., MLSys 2020.
    """
    anchor = {n: p.detach() for n, p in client.frozen(model).named_parameters()}
    return LogitLoss(proximal=strength, anchor=anchor)


class ProximalClientSide(ClientSide):
    """Clients whose models are held near the global one.

    Args:
        mu: Strength μ of ``μ/2 · ‖w − w_global‖²``.

    Source: Li et al., MLSys 2020.
    """

    def __init__(self, mu: float) -> None:
        self.mu = mu

    def objective(self, client: Client, request: TrainRequest) -> Objective:
        """Cross-entropy plus the proximal term."""
        return proximal_loss(client, request.model, self.mu)


class FedProx(FederatedMethod):
    """FedAvg with a proximal term that holds local models near the global one.

    Args:
        mu: Strength μ of ``μ/2 · ‖w − w_global‖²``.

    Raises:
        ConfigError: ``mu`` is negative.

    Source: Li et al., MLSys 2020; μ = 0.2 as in the FedSIR authors' baseline.
    """

    def __init__(self, mu: NonNegativeFloat = 0.2) -> None:
        check_arguments(FedProx.__init__, locals(), "model.init_args.method.init_args")
        self.mu = mu

    @property
    def client_side(self) -> ClientSide:
        """Clients that train with the proximal term."""
        return ProximalClientSide(self.mu)
