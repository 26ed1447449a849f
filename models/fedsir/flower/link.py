"""The server's link to the clients of a Flower federation.

A client is known by its name, not by its node, which gets another number when it is started again.

Axes: K clients.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fulgurite.errors import RunError
from fulgurite.models.fedsir.federation import Answer, Question, Reply
from fulgurite.models.fedsir.flower.records import (
    FlatRecord,
    class_name,
    flatten_message,
    message_class,
    restore_message,
)
from fulgurite.models.fedsir.flower.wire import hash_model, pack, unpack

__all__ = ["ClientFacts", "GridClients", "LinkOptions"]

log = logging.getLogger(__name__)

_POLL = 0.1  # seconds between two looks at what has arrived
_NO_MODEL = frozenset({"model"})


@dataclass(frozen=True)
class LinkOptions:
    """How long the server waits.

    Attributes:
        clients: Number of clients that the server waits for before it begins.
        min_clients: Number of clients with which it begins when ``start_timeout`` is over.
        start_timeout: How long it waits for them [s].
        round_timeout: How long it waits for the answers to a question [s]. Clients that are away
            then are left out of the round; where the method needs them, the run ends.
    """

    clients: int
    min_clients: int = 1
    start_timeout: float = 600.0
    round_timeout: float = 600.0


@dataclass(frozen=True)
class ClientFacts:
    """What all clients must have in common with the server.

    Attributes:
        classes: Names of the classes, in order.
        channels: Number of channels of an image.
        size: Height and width [pixels].
    """

    classes: tuple[str, ...]
    channels: int
    size: tuple[int, int]

    def find_misfit(self, envelope: Mapping[str, Any]) -> str | None:
        """Say why a client does not fit, or return None."""
        if "error" in envelope:
            return str(envelope["error"])
        classes = tuple(str(envelope["classes"]).split("\n"))
        if classes != self.classes:
            return (
                f"its classes are {', '.join(classes)}, and the server's {', '.join(self.classes)}"
            )
        shape = tuple(int(envelope[name]) for name in ("channels", "height", "width"))
        if shape != (self.channels, *self.size):
            return f"its images are {shape}, and the server's {(self.channels, *self.size)}"
        return None


@dataclass
class GridClients:
    """Clients behind Flower's grid.

    Args:
        grid: Carries messages to nodes.
        facts: What clients must have in common with the server.
        options: How long the server waits.
        run: Name of the run, under which clients keep their state.
        session: Number of this start of the server; it counts up.
        names: Names of the clients in the order of their numbers; empty before the first start.
    """

    grid: Grid
    facts: ClientFacts
    options: LinkOptions
    run: str
    session: int
    names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.samples: dict[str, int] = {}  # of each client that has joined, by name
        self.refused: dict[str, str] = {}  # why, by name
        self._nodes: dict[str, int] = {}  # node of each client, by name
        self._described: set[int] = set()  # nodes that have said who they are
        self._questions = 0
        self._started_at: dict[str, bool] = {}

    # --- who is there --------------------------------------------------------------------------

    def gather_clients(self) -> None:
        """Wait for the clients, and number them by name.

        Where there are names already, it waits for those clients alone. Clients whose data do not
        fit are refused by name, and the others go on.

        Raises:
            RunError: Too few have come.
        """
        known = list(self.names)
        expected = len(known) or self.options.clients
        begin = time.monotonic()
        while True:
            self._describe_new_nodes()
            joined = [name for name in known or self._nodes if name in self._nodes]
            if len(joined) + (0 if known else len(self.refused)) >= expected:
                break
            if time.monotonic() - begin > self.options.start_timeout:
                if len(joined) >= max(1, self.options.min_clients):
                    break
                raise RunError(
                    f"{len(joined)} of {expected} clients have come in "
                    f"{self.options.start_timeout:g} s.",
                    "Start more nodes, or set the app's `min-clients` or `start-timeout`.",
                )
            time.sleep(_POLL)
        if not known:
            self.names = sorted(joined, key=_natural_key)
        if not self.names:
            raise RunError(
                "No client fits the federation: "
                + "; ".join(f"client {name}: {why}" for name, why in self.refused.items()),
                "Give the nodes data with the server's classes and image size.",
            )

    @property
    def sizes(self) -> Tensor:
        """Number of samples of each client. Shape: (K,)."""
        return torch.tensor([self.samples.get(name, 0) for name in self.names])

    def _describe_new_nodes(self) -> None:
        """Ask nodes that have come who they are."""
        nodes = set(self.grid.get_node_ids())
        self._nodes = {name: node for name, node in self._nodes.items() if node in nodes}
        self._described &= nodes
        new = nodes - self._described
        if not new:
            return
        messages = {node: self._make_message(pack({}), "query.describe", node) for node in new}
        for node, reply in self._wait(messages, time.monotonic() + self.options.round_timeout):
            if reply is None:
                continue
            self._described.add(node)
            self._join(node, unpack(reply)[0])

    def _join(self, node: int, envelope: Mapping[str, Any]) -> None:
        name = str(envelope["name"])
        reason = self.facts.find_misfit(envelope)
        if reason is None and name in self._nodes:
            reason = "there is a client of this name already"
            log.warning("A second client %s is refused: %s.", name, reason)
            self.refused[f"{name} (node {node})"] = reason
            return
        if reason is None and self.names and name not in self.names:
            reason = "the run began without it"
        if reason is not None:
            if name not in self.refused:
                log.warning("Client %s is refused: %s", name, reason)
            self.refused[name] = reason
            return
        self.refused.pop(name, None)
        self._nodes[name] = node
        self.samples[name] = int(envelope["samples"])
        log.info("Client %s has joined with %d samples.", name, self.samples[name])

    # --- questions -----------------------------------------------------------------------------

    def ask(self, questions: Mapping[int, Question]) -> dict[int, Answer]:
        """Ask some clients, all at once, and wait for what they answer.

        Args:
            questions: A question to each client, by its number.

        Raises:
            RunError: A client whose answer the method needs is away, or cannot answer.
        """
        self._questions += 1
        pending, answers = dict(questions), dict[int, Answer]()
        optional = all(question.request.optional for question in questions.values())
        deadline = time.monotonic() + self.options.round_timeout
        while pending and time.monotonic() < deadline:
            self._describe_new_nodes()
            present = {k: q for k, q in pending.items() if self.names[k] in self._nodes}
            if not present and not optional:
                time.sleep(_POLL)
                continue
            for number, answer in self._ask_once(present, deadline):
                if answer is not None:
                    answers[number] = answer
                    del pending[number]
            if optional:
                break
        if pending:
            self._report_absent(sorted(pending), optional)
        return answers

    def _ask_once(
        self, questions: Mapping[int, Question], deadline: float
    ) -> Iterable[tuple[int, Answer | None]]:
        """Ask clients that are there; those that lack the model are asked again, with it."""
        numbers = {self._nodes[self.names[k]]: k for k in questions}
        sent = {node: self._pack_question(k, questions[k], node) for node, k in numbers.items()}
        lacking = {}
        for node, reply in self._wait(sent, deadline):
            number = numbers[node]
            if reply is None:
                self._nodes.pop(self.names[number], None)
                self._described.discard(node)
                yield number, None
                continue
            envelope, kind, flat = unpack(reply)
            if envelope.get("needs_model"):
                lacking[node] = self._pack_question(number, questions[number], node, model=True)
            else:
                yield number, self._read_answer(number, envelope, kind, flat)
        for node, reply in self._wait(lacking, deadline):
            answer = None if reply is None else self._read_answer(numbers[node], *unpack(reply))
            yield numbers[node], answer

    def _pack_question(
        self, number: int, question: Question, node: int, model: bool = False
    ) -> Message:
        request = question.request
        envelope: dict[str, Any] = {
            "run": self.run,
            "session": self.session,
            "round": question.round,
            "question": f"{self.session}.{self._questions}",
            "seed": str(question.seed),
            "number": number,
            "clients": len(self.names),
        }
        if request.model is not None:
            envelope["model_hash"] = hash_model(request.model)
        leave_out = question.has_model and not model
        flat = flatten_message(request, without=_NO_MODEL if leave_out else frozenset())
        content = pack(envelope, class_name(type(request)), flat)
        return self._make_message(content, "train", node)

    def _read_answer(
        self, number: int, envelope: Mapping[str, Any], kind: str, flat: FlatRecord
    ) -> Answer:
        """Read a reply.

        Raises:
            RunError: The client says that it cannot answer.
        """
        name = self.names[number]
        if "error" in envelope:
            raise RunError(
                f"Client {name} cannot answer: {envelope['error']}", "Mend what it names."
            )
        if envelope["is_new"] and self._started_at.get(name):
            log.warning(
                "Client %s has lost its state: it goes on from its given labels. Keep the folder "
                "`state` of its node.",
                name,
            )
        self._started_at[name] = True
        reply: Reply = restore_message(message_class(kind, Reply), flat)
        loss = envelope.get("loss")
        return Answer(reply=reply, loss=None if loss is None else float(loss))

    def _report_absent(self, numbers: list[int], optional: bool) -> None:
        names = ", ".join(self.names[k] for k in numbers)
        if optional:
            log.warning("Away in this round: client %s.", names)
            return
        raise RunError(
            f"Client {names} did not answer in {self.options.round_timeout:g} s, and the method "
            "needs it before it goes on.",
            "Start its node again, and the run again: it goes on from its last round.",
        )

    # --- messages ------------------------------------------------------------------------------

    def _make_message(self, content: RecordDict, message_type: str, node: int) -> Message:
        return Message(
            content,
            dst_node_id=node,
            message_type=message_type,
            ttl=self.options.round_timeout + self.options.start_timeout,
            group_id=f"{self.session}.{self._questions}",
        )

    def _wait(
        self, messages: Mapping[int, Message], deadline: float
    ) -> Iterable[tuple[int, RecordDict | None]]:
        """Send messages, and yield what nodes reply as it arrives; None for those that do not."""
        if not messages:
            return
        nodes = list(messages)
        names = self.grid.push_messages(messages.values())
        pending = dict(zip(names, nodes, strict=True))
        while pending and time.monotonic() < deadline:
            for reply in self.grid.pull_messages(list(pending)):
                node = pending.pop(reply.metadata.reply_to_message_id)
                if reply.has_error():
                    log.warning("Node %d: %s", node, reply.error.reason or reply.error)
                    yield node, None
                else:
                    yield node, reply.content
            if pending:
                time.sleep(_POLL)
        for node in pending.values():
            yield node, None


def _natural_key(name: str) -> tuple[int, int, str]:
    """Numbers by value, before words."""
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)
