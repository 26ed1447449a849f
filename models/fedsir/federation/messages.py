"""Messages between the server and one client: what goes down, and what comes up.

A message holds models, class statistics, references, counts and distances, never images, labels or
vectors over samples. What a deployment sends, and what is counted, are the tensors marked by
:func:`~fulgurite.models.fedsir.wire.on_wire`; the other fields (a round number, a role, counts,
matrices for figures) are not.

Axes: P flat state size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from fulgurite.models.fedsir.federation.ranks import gather_objects, gather_rows
from fulgurite.models.fedsir.federation.states import ClientStates
from fulgurite.models.fedsir.wire import on_wire

__all__ = [
    "Replies", "Reply", "Request", "TrainReply", "TrainRequest",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the server sends to a client.

    Attributes:
        model: Flat state of a model. A client that has the current global model already is not
            sent it again. Shape: (P,).
        epochs: Local epochs that the client is to train.
    """

    continues: ClassVar[bool] = False
    """Whether the client needs what it kept of the request before."""
    optional: ClassVar[bool] = False
    """Whether the method goes on without the replies of clients that are away."""

    model: Tensor | None = None
    epochs: int = 0


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a client sends back."""


@dataclass(frozen=True, kw_only=True)
class TrainRequest(Request):
    """Train from the global model in a round.

    Attributes:
        round: Index of the round, from 0.
    """

    optional: ClassVar[bool] = True

    model: Tensor
    round: int


@dataclass(frozen=True, kw_only=True)
class TrainReply(Reply):
    """A model after local training.

    Attributes:
        model: Flat state. Shape: (P,).
    """

    model: Tensor = field(metadata=on_wire())


ReplyType = TypeVar("ReplyType", bound=Reply)


@dataclass(frozen=True)
class Replies(Generic[ReplyType]):
    """Replies of several clients, of which a rank holds those of the clients that it simulates.

    Attributes:
        clients: Clients that replied, of all ranks.
        local: Replies that this rank holds.
        device: Device of stacked tensors.
    """

    clients: list[int]
    local: dict[int, ReplyType]
    device: torch.device

    @property
    def models(self) -> ClientStates:
        """Models of the replies that this rank holds, which :meth:`Federation.average` sums."""
        return {k: reply.model for k, reply in self.local.items() if isinstance(reply, TrainReply)}

    def stack(self, compute: Callable[[int, ReplyType], Tensor]) -> Tensor:
        """Stack one tensor per client; every rank must take part, and gets the same.

        Args:
            compute: Gives the tensor of a client and its reply, where that is held.

        Returns:
            One row per client. Shape: (len(clients), …).
        """
        rows = {k: compute(k, reply) for k, reply in self.local.items()}
        return gather_rows(rows, self.clients, self.device)

    def gather(self) -> dict[int, ReplyType]:
        """All replies, on every rank; meant for small ones, with tensors on the CPU."""
        return gather_objects(self.local)
