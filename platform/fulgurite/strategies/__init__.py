"""Lightning strategies of the systems, registered by name for ``--trainer.strategy``."""

from lightning.pytorch.strategies import StrategyRegistry

from fulgurite.strategies.federated import FederatedStrategy
from fulgurite.strategies.sharded import FullyShardedStrategy
from fulgurite.strategies.stream_cqsa import (
    OffloadOptions,
    StreamCQSADDPStrategy,
    StreamCQSAFullyShardedStrategy,
    StreamCQSAStrategy,
)

__all__ = [
    "FederatedStrategy",
    "FullyShardedStrategy",
    "OffloadOptions",
    "StreamCQSADDPStrategy",
    "StreamCQSAFullyShardedStrategy",
    "StreamCQSAStrategy",
]

StrategyRegistry.register(
    "federated",
    FederatedStrategy,
    description="Ranks train different clients; no gradient leaves a rank.",
)
StrategyRegistry.register(
    "stream_cqsa",
    StreamCQSAStrategy,
    description="Exact attention in a memory budget, for any model.",
)
StrategyRegistry.register(
    "stream_cqsa_ddp",
    StreamCQSADDPStrategy,
    description="Exact attention in a memory budget, its tasks shared by several devices.",
)
StrategyRegistry.register(
    "fsdp2",
    FullyShardedStrategy,
    description="Parameters, gradients and optimizer states divided among ranks.",
)
StrategyRegistry.register(
    "stream_cqsa_fsdp2",
    StreamCQSAFullyShardedStrategy,
    description="The same, and each rank's attention in a memory budget, exactly.",
)
