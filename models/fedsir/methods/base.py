"""Interface of federated methods to the rounds engine: a few hooks around FedAvg.

A method is a plain object, built by the configuration
(``model.init_args.method.class_path: fulgurite.models.fedsir.methods.FedSIR``). It sees given
labels, features and models, never true labels. Between rounds its state is plain types and
tensors, so that a checkpoint holds it.

Axes: K clients, C classes, B mini-batch, P flat state size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fulgurite.models.fedsir.federation import (
    ClientSide,
    Federation,
    Replies,
    TrainReply,
    TrainRequest,
)

__all__ = ["FederatedMethod"]


class FederatedMethod:
    """FedAvg; other methods override the hooks in which they differ.

    This is the server side, which makes requests to clients and looks at their replies;
    :attr:`client_side` says how a client answers, from its own samples.

    Source: FedAvg, McMahan et al., AISTATS 2017.
    """

    def before_rounds(self, fed: Federation) -> None:
        """Called once before round 0, on every rank."""

    def before_round(self, fed: Federation, round: int) -> None:
        """Called before the clients of a round train, on every rank."""

    def participants(self, fed: Federation, round: int, sampled: Sequence[int]) -> list[int]:
        """Select those of the sampled clients that train in this round."""
        return list(sampled)

    @property
    def client_side(self) -> ClientSide:
        """How clients answer the requests of this method."""
        return ClientSide()

    def training_request(self, fed: Federation, client: int, round: int) -> TrainRequest:
        """What a client is sent at the start of a round."""
        return TrainRequest(model=fed.global_state, epochs=fed.local_epochs, round=round)

    def weights(
        self, fed: Federation, round: int, replies: Replies[TrainReply]
    ) -> dict[int, float]:
        """Weight of each client's model in the new global one; they sum to 1.

        Args:
            fed: The federation.
            round: Index of the round, from 0.
            replies: The clients' models.
        """
        return fed.size_weights(replies.clients)

    def after_round(self, fed: Federation, round: int, replies: Replies[TrainReply]) -> None:
        """Called after aggregation; ``fed.global_state`` is the new model."""

    def local_rounds(self) -> int:
        """Epochs of local training of each client before round 0."""
        return 0

    def client_epochs_before(self, fed: Federation, round: int) -> int:
        """Client-epochs that :meth:`before_round` will spend on this round."""
        return 0

    @property
    def clean(self) -> Tensor | None:
        """Predicted clean mask, bool; None before identification. Shape: (K,)."""
        return None

    def report(self) -> dict[str, float]:
        """Scalars to log after a round."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """State between rounds: plain types and tensors only."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state."""
