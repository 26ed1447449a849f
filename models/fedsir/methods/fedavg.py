"""FedAvg and FedProx."""

from __future__ import annotations

from fulgurite.errors import ConfigError
from fulgurite.models.fedsir.federation import Federation, LogitLoss, Objective
from fulgurite.models.fedsir.methods.base import FederatedMethod

__all__ = ["FedAvg", "FedProx"]


class FedAvg(FederatedMethod):
    """Size-weighted averages of models trained by cross-entropy.

    Source: McMahan et al., AISTATS 2017.
    """


class FedProx(FederatedMethod):
    """FedAvg with a proximal term that holds local models near the global one.

    Args:
        mu: Strength μ of ``μ/2 · ‖w − w_global‖²``.

    Raises:
        ConfigError: ``mu`` is negative.

    Source: Li et al., MLSys 2020; μ = 0.2 as in the FedSIR authors' baseline.
    """

    def __init__(self, mu: float = 0.2) -> None:
        if mu < 0:
            raise ConfigError(
                f"model.init_args.method.init_args.mu={mu} is negative.", "Give 0 or more."
            )
        self.mu = mu

    def objective(self, fed: Federation, client: int, round: int) -> Objective:
        """Cross-entropy plus the proximal term."""
        anchor = {n: p.detach() for n, p in fed.teacher().named_parameters()}
        return LogitLoss(proximal=self.mu, anchor=anchor)
