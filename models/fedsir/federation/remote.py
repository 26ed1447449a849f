"""Clients that answer over a network, in place of simulated ones.

The server runs the same rounds; what :class:`Federation` lets a simulated client answer is asked of
:class:`RemoteClients`. The transport is another matter: see :mod:`fulgurite.models.fedsir.flower`.

Axes: K clients, P flat state size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import Any, Protocol

from torch import Tensor

from fulgurite.errors import RunError
from fulgurite.models.fedsir.federation.clients import ClientSide
from fulgurite.models.fedsir.federation.federation import Federation
from fulgurite.models.fedsir.federation.messages import Replies, Reply, Request

__all__ = [
    "Answer", "Question", "RemoteClients", "RemoteFederation", "connect_clients",
    "connected_clients",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Question:
    """A request to one client, and what it needs to know beside it.

    Attributes:
        request: The request of the method.
        seed: Seed of all random numbers in local training.
        round: Number of the current round; -1 before the first.
        has_model: Whether the client has been sent the model of the request already.
    """

    request: Request
    seed: int
    round: int
    has_model: bool


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a client answers.

    Attributes:
        reply: The reply to the request.
        loss: Mean local loss, where the client has trained; else None.
    """

    reply: Reply
    loss: float | None


class RemoteClients(Protocol):
    """The clients of a federation over a network."""

    @property
    def sizes(self) -> Tensor:
        """Number of samples of each client. Shape: (K,)."""

    def ask(self, questions: Mapping[int, Question]) -> dict[int, Answer]:
        """Ask some clients, all at once, and wait for what they answer.

        Args:
            questions: A question to each client, all of one class of requests.

        Returns:
            The answers. Clients that are away are left out if the request is optional.

        Raises:
            RunError: A client whose answer the method needs is away.
        """


class RemoteFederation(Federation):
    """The federation of a server whose clients are elsewhere.

    Args of :meth:`of`: those of the simulation, whose data need not hold any training sample, and
    the clients.
    """

    remote: RemoteClients

    @classmethod
    def of(cls, federation: Federation, remote: RemoteClients) -> RemoteFederation:
        """Take the place of a simulation.

        Args:
            federation: The simulation, before its first round.
            remote: The clients.
        """
        values = {f.name: getattr(federation, f.name) for f in fields(federation) if f.init}
        result = cls(**values)
        result.remote = remote
        result.sizes = remote.sizes
        return result

    def __post_init__(self) -> None:
        super().__post_init__()
        self._have_model: set[int] = set()  # clients that were sent the model of the last requests

    def send(self, requests: Mapping[int, Request]) -> None:
        """Note which clients have the model already, and count what goes down."""
        self._have_model = {
            k
            for k, request in requests.items()
            if k in self.receivers and request.model is not None and self._is_global(request.model)
        }
        super().send(requests)

    def answer(self, side: ClientSide, requests: Mapping[int, Request]) -> dict[int, Reply]:
        """Ask the clients.

        Raises:
            RunError: No client answered, or one whose answer the method needs is away.
        """
        questions = {
            k: Question(
                request=request,
                seed=self.seed,
                round=self.round,
                has_model=k in self._have_model,
            )
            for k, request in requests.items()
        }
        answers = self.remote.ask(questions)
        for client, answer in answers.items():
            if answer.loss is not None:
                self.loss_sum[client] = answer.loss
        away = set(requests) - set(answers)
        self.receivers -= away  # nobody knows whether the model has reached them
        return {k: answers[k].reply for k in requests if k in answers}

    def collect(self, clients: Sequence[int], replies: dict[int, Any]) -> Replies[Any]:
        """Count what came up from the clients that replied.

        Raises:
            RunError: None of them did in a round.
        """
        present = [k for k in clients if k in replies]
        if clients and not present:
            raise RunError(
                f"None of the {len(clients)} clients of round {self.round} replied.",
                "Start their nodes again, and the run again: it goes on from its last round.",
            )
        return super().collect(present, replies)


_REMOTE: ContextVar[RemoteClients | None] = ContextVar("remote_clients", default=None)


@contextmanager
def connect_clients(remote: RemoteClients) -> Iterator[None]:
    """Let clients over a network answer the rounds that are opened within the block.

    Args:
        remote: The clients, numbered from 0.
    """
    token = _REMOTE.set(remote)
    try:
        yield
    finally:
        _REMOTE.reset(token)


def connected_clients() -> RemoteClients | None:
    """The clients of the innermost :func:`connect_clients`, or None for a simulation."""
    return _REMOTE.get()
