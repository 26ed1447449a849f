"""What a client keeps between messages, in a file of its node.

Flower starts a process for each message, and a node may be killed at any moment. The file has the
client's current state, the state at the beginning of the current round, and the last reply. A
server that goes on from its last finished round repeats the current one, so the client goes back
to its beginning; a question that comes twice is answered once.

Axes: N_k samples of the client, P flat state size.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fulgurite.errors import DataError
from fulgurite.extras import optional_import
from fulgurite.io import atomic_write
from fulgurite.models.fedsir.federation import Client
from fulgurite.models.fedsir.flower.records import FlatRecord

__all__ = ["ClientState", "Snapshot", "read_state", "write_state"]

_SUBJECT = "A client of a Flower federation"


@dataclass
class Snapshot:
    """What a client knows of its samples.

    Attributes:
        tensors: Current labels (``labels``), memory (``memory.NAME``) and what the next request
            needs (``intermediate.NAME``). Empty for a client that starts from its given labels.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(client: Client) -> Snapshot:
        """Read it off a client."""
        tensors = {"labels": client.labels}
        tensors |= {f"memory.{name}": value for name, value in client.memory.items()}
        tensors |= {f"intermediate.{name}": value for name, value in client.intermediate.items()}
        return Snapshot({name: value.detach().cpu().clone() for name, value in tensors.items()})

    def restore(self, client: Client) -> None:
        """Bring a client into this state.

        Raises:
            DataError: The labels are not as many as the client's samples.
        """
        labels = self.tensors.get("labels", client.given_labels)
        if len(labels) != len(client):
            raise DataError(
                f"The state of this client is of {len(labels)} samples, and it has {len(client)}.",
                "Take part in a new run, or bring back the samples of this one.",
            )
        client.relabel(labels)
        client.memory, client.intermediate = {}, {}
        for name, value in self.tensors.items():
            kind, _, key = name.partition(".")
            if kind == "memory":
                client.memory[key] = value
            elif kind == "intermediate":
                client.intermediate[key] = value.to(client.trainer.device)


@dataclass
class ClientState:
    """The file's content.

    Attributes:
        round: The current round; -1 before the first.
        session: The server's start that asked last; it counts up.
        question: Name of the last question.
        kind: Class of the last reply.
        loss: Mean local loss of the last reply, if it trained.
        model_hash: Hash of ``model``.
        begin: State at the beginning of the round.
        current: State now.
        reply: Fields of the last reply.
        model: The last global model, which is not sent twice. Shape: (P,).
    """

    round: int = -1
    session: int = 0
    question: str = ""
    kind: str = ""
    loss: float | None = None
    model_hash: str = ""
    begin: Snapshot = field(default_factory=Snapshot)
    current: Snapshot = field(default_factory=Snapshot)
    reply: FlatRecord = field(default_factory=FlatRecord)
    model: Tensor | None = None

    def enter(self, round: int, session: int) -> None:
        """Begin a round, or begin it anew where the server has been started again.

        Raises:
            DataError: The server is in a round that this client has left.
        """
        if round < self.round:
            raise DataError(
                f"The server is in round {round}, and this client was in round {self.round}.",
                "Go on from the server's last checkpoint, or start a new run.",
            )
        if round > self.round:
            self.begin = self.current
        elif session != self.session:
            self.current = self.begin
        if round > self.round or session != self.session:
            self.question = ""
        self.round, self.session = round, session


_NUMBERS = ("round", "session", "question", "kind", "loss", "model_hash")


def read_state(path: Path) -> ClientState | None:
    """Read a client's file, or return None where there is none.

    Args:
        path: The file, ``.safetensors``.

    Raises:
        DataError: The file is damaged.
    """
    if not path.is_file():
        return None
    safetensors = optional_import("safetensors", "flower", _SUBJECT)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["state"])
            tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        state = ClientState(**{name: facts[name] for name in _NUMBERS})
    except (safetensors.SafetensorError, KeyError, ValueError, OSError) as error:
        raise DataError(
            f"{path} is no state of a client ({error}).",
            "Remove it, and start a new run: the client has forgotten what it relabeled.",
        ) from error
    parts: dict[str, dict[str, Tensor]] = {"begin": {}, "current": {}, "reply": {}, "model": {}}
    for key, tensor in tensors.items():
        part, _, name = key.partition("/")
        parts[part][name] = tensor
    state.begin, state.current = Snapshot(parts["begin"]), Snapshot(parts["current"])
    state.reply = FlatRecord(facts["reply"], parts["reply"])
    state.model = parts["model"].get("state")
    return state


def write_state(path: Path, state: ClientState) -> None:
    """Write a client's file, whole or not at all."""
    save_file = optional_import("safetensors.torch", "flower", _SUBJECT).save_file
    facts: dict[str, Any] = {name: getattr(state, name) for name in _NUMBERS}
    facts["reply"] = asdict(state.reply)["scalars"]
    tensors = {f"begin/{k}": v for k, v in state.begin.tensors.items()}
    tensors |= {f"current/{k}": v for k, v in state.current.tensors.items()}
    tensors |= {f"reply/{k}": v for k, v in state.reply.tensors.items()}
    if state.model is not None:
        tensors["model/state"] = state.model
    # copies, since safetensors refuses tensors that share memory
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata={"state": json.dumps(facts)})
