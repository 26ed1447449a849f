"""Options of local training and of the rounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning.pytorch.cli import OptimizerCallable

from fulgurite.options import (
    LeftOpenUnitInterval,
    NonNegativeInt,
    PositiveInt,
    RightOpenUnitInterval,
    check_options,
)

__all__ = ["LocalTrainingOptions", "RoundOptions"]


@dataclass(frozen=True)
class LocalTrainingOptions:
    """How a client trains in a round.

    Args:
        batch_size: Mini-batch size.
        epochs: Local epochs.
        vectorize: Number of clients of a rank that train in one pass where the method's loss
            allows; 0 trains them one after the other. ``auto`` measures before the first round
            which is faster and says it; a resumed run keeps that choice. With any number but 0,
            weights depend on the number of ranks by rounding, and with ``auto`` on the times.
        resident: Keep a client's images on the device while it trains. Off for clients whose
            images do not fit there.
        compile: Compile the network with ``torch.compile``.

    Raises:
        ConfigError: A number is out of range.
    """

    batch_size: PositiveInt = 64
    epochs: PositiveInt = 1
    vectorize: NonNegativeInt | Literal["auto"] = 0
    resident: bool = True
    compile: bool = False

    def __post_init__(self) -> None:
        check_options(self, "model.init_args.local")


@dataclass(frozen=True)
class RoundOptions:
    """Which clients take part in a round, how the server uses their average, and when it ends.

    Args:
        participation: Fraction of the clients sampled in each round, at least one.
        dropout: Probability that a sampled client fails to report in a round; if all fail, the
            first of them reports after all.
        server_optimizer: Applies the aggregate: ``global − aggregate`` is the gradient it sees
            (FedOpt). By default the aggregate becomes the global model.
        max_client_epochs: Training ends before a round in which the local epochs of all clients
            together, identification included, would exceed this number; ``trainer.max_epochs``
            is a limit, too. No limit by default.
        seed: Seed of client sampling, mini-batches and augmentation; that of the run by default.

    Raises:
        ConfigError: A number is out of range.

    Source: docs/papers/fedsir.md section 1; participation and dropout: inferred; server
    optimizer: Reddi et al., ICLR 2021.
    """

    participation: LeftOpenUnitInterval = 1.0
    dropout: RightOpenUnitInterval = 0.0
    server_optimizer: OptimizerCallable | None = None
    max_client_epochs: PositiveInt | None = None
    seed: NonNegativeInt | None = None

    def __post_init__(self) -> None:
        check_options(self, "model.init_args.rounds")
