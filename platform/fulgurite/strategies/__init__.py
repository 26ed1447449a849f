"""Lightning strategies of the systems, registered by name for ``--trainer.strategy``."""

from lightning.pytorch.strategies import StrategyRegistry

from fulgurite.strategies.federated import FederatedStrategy

__all__ = ["FederatedStrategy"]

StrategyRegistry.register(
    "federated",
    FederatedStrategy,
    description="Ranks train different clients; no gradient leaves a rank.",
)
