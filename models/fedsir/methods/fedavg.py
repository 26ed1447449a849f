"""FedAvg and FedProx."""

from __future__ import annotations

from fulgurite.models.fedsir.federation import (
    Client,
    ClientSide,
    LogitLoss,
    Objective,
    TrainRequest,
)
from fulgurite.models.fedsir.methods.base import FederatedMethod
from fulgurite.options import NonNegativeFloat, check_arguments

__all__ = ["FedAvg", "FedProx", "ProximalClientSide"]


class FedAvg(FederatedMethod):
    """Size-weighted averages of models trained by cross-entropy.

    Source: McMahan et al., AISTATS 2017.
    """


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
        frozen = client.frozen(request.model)
        anchor = {n: p.detach() for n, p in frozen.named_parameters()}
        return LogitLoss(proximal=self.mu, anchor=anchor)


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
