"""What a trainer must have to run federated rounds."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging

from fulgurite.errors import ConfigError
from fulgurite.models.fedsir.options import RoundOptions
from fulgurite.strategies import FederatedStrategy

__all__ = ["check_trainer"]


def check_trainer(trainer: Trainer, rounds: RoundOptions) -> None:
    """Refuse data, strategies and options of a trainer that federated rounds cannot have.

    Args:
        trainer: Trainer that is about to fit.
        rounds: Options of the rounds.

    Raises:
        ConfigError: The data have no clients; the strategy would mix the gradients of clients; the
            precision is neither 32 bits nor mixed with bfloat16; a callback anneals the learning
            rate; or the trainer's minimum of epochs or steps may exceed the limit of client-epochs.
    """
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    if not hasattr(data, "client_images"):
        raise ConfigError(
            f"{type(data).__name__} is not federated: it has no clients.",
            "Use data.class_path=fulgurite.datamodules.fedsir.FederatedDataModule.",
        )
    if trainer.world_size > 1 and not isinstance(trainer.strategy, FederatedStrategy):
        raise ConfigError(
            f"{type(trainer.strategy).__name__} would average the gradients of different clients.",
            "Use --trainer.strategy=federated.",
        )
    if trainer.precision not in ("32-true", "bf16-mixed"):
        raise ConfigError(
            f"Local training does not do --trainer.precision={trainer.precision}.",
            "Use bf16-mixed or 32-true.",
        )
    if any(isinstance(c, StochasticWeightAveraging) for c in trainer.callbacks):  # type: ignore[attr-defined]
        raise ConfigError(
            "StochasticWeightAveraging anneals the learning rate of the trainer's optimizer, and "
            "in federated rounds that optimizer only takes the clients' average.",
            "Use lightning.pytorch.callbacks.EMAWeightAveraging, which averages the global model "
            "over the rounds, or leave it out.",
        )
    if rounds.max_client_epochs is not None and (trainer.min_epochs or trainer.min_steps):
        raise ConfigError(
            "model.init_args.rounds.max_client_epochs cannot be kept with trainer.min_epochs or "
            "trainer.min_steps.",
            "Leave those out.",
        )
