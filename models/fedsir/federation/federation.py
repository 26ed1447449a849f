"""The federation that a method sees: clients, local training, exchange between ranks.

Axes: K clients, N samples, B mini-batch, C classes, D feature dimension, P flat state size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fulgurite.models.fedsir.aggregation import sample_weights
from fulgurite.models.fedsir.federation.clients import Client, ClientSide
from fulgurite.models.fedsir.federation.messages import Replies, Reply, Request
from fulgurite.models.fedsir.federation.objectives import Objective
from fulgurite.models.fedsir.federation.ranks import (
    balanced_assignment,
    gather_objects,
    gather_rows,
)
from fulgurite.models.fedsir.federation.states import ClientStates, exact_average
from fulgurite.models.fedsir.federation.training import LocalTrainer, OptimizerFactory
from fulgurite.models.fedsir.federation.vectorized import train_group, vectorizable
from fulgurite.models.fedsir.wire import count_payload
from fulgurite.sampling import rank_and_world

__all__ = ["Costs", "Federation"]


@dataclass
class Costs:
    """Costs of a real deployment; the simulation itself sends fewer bytes.

    Attributes:
        rounds: Rounds of aggregation.
        client_epochs: Local epochs, summed over the clients that train them; those before round 0
            count too.
        bytes_up: Bytes that clients send.
        bytes_down: Bytes that clients receive.
    """

    rounds: int = 0
    client_epochs: int = 0
    bytes_up: int = 0
    bytes_down: int = 0


@dataclass
class Federation(LocalTrainer):
    """Clients, their local training, and the exchange between ranks, for the hooks of a method.

    Its arguments are those of :class:`LocalTrainer`, the costs so far, and the number of the
    current round, which is -1 before the first.
    """

    costs: Costs = field(default_factory=Costs)
    round: int = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.clients = [Client(self, k) for k in range(self.num_clients)]
        self.receivers: set[int] = set()  # clients that have the current global model
        self._ranks: dict[int, int] = {}  # rank that simulated a client last
        self._global_state = self.state.read()

    # --- facts known to every rank ---------------------------------------------------------------

    def local_clients(self, clients: Sequence[int]) -> list[int]:
        """Select the clients that this rank simulates."""
        rank, world = rank_and_world()
        sizes = {k: int(self.sizes[k]) for k in clients}
        groups = balanced_assignment(sizes, world)
        self._ranks |= {k: r for r, group in enumerate(groups) for k in group}
        return groups[rank]

    @property
    def global_state(self) -> Tensor:
        """The global model. Shape: (P,)."""
        return self._global_state

    @global_state.setter
    def global_state(self, state: Tensor) -> None:
        if not torch.equal(state, self._global_state):
            self.receivers.clear()  # what clients have is not the global model any more
        self._global_state = state

    @property
    def state_bytes(self) -> int:
        """Size of one model on the wire [bytes]."""
        return self.state.size * int(self.global_state.element_size())

    def send_global(self, clients: Sequence[int]) -> None:
        """Count the global model as sent to those clients that do not have it yet."""
        missing = set(clients) - self.receivers
        self.costs.bytes_down += len(missing) * self.state_bytes
        self.receivers |= missing

    # --- messages ------------------------------------------------------------------------------

    def exchange(self, side: ClientSide, requests: Mapping[int, Request]) -> Replies[Any]:
        """Send a request to each of some clients, and collect their replies.

        Every rank passes the same requests, and answers those of the clients that it simulates.

        Args:
            side: The client side of the method.
            requests: A request, all of one class, to each client.
        """
        clients = list(requests)
        self.send(requests)
        continues = all(request.continues for request in requests.values())
        if continues and set(clients) <= set(self._ranks):
            local = [k for k in clients if self._ranks[k] == rank_and_world()[0]]
        else:
            local = self.local_clients(clients)
        return self.collect(clients, self.answer(side, {k: requests[k] for k in local}))

    def send(self, requests: Mapping[int, Request]) -> None:
        """Count what goes down to clients, and the epochs that they are asked to train."""
        models = {k: r.model for k, r in requests.items() if r.model is not None}
        others = {k: model for k, model in models.items() if not self._is_global(model)}
        self.send_global([k for k in models if k not in others])
        self.costs.bytes_down += sum(model.numel() * model.itemsize for model in others.values())
        self.costs.bytes_down += sum(map(count_payload, requests.values()))
        self.costs.client_epochs += sum(request.epochs for request in requests.values())

    def _is_global(self, model: Tensor) -> bool:
        return model is self._global_state or torch.equal(model, self._global_state)

    def answer(self, side: ClientSide, requests: Mapping[int, Request]) -> dict[int, Reply]:
        """Let clients of this rank answer; those with a training task train first."""
        for client, request in requests.items():
            if not request.continues:
                self.clients[client].intermediate = {}
        tasks = {k: side.task(self.clients[k], request) for k, request in requests.items()}
        trained: ClientStates = {}
        training = {k: task for k, task in tasks.items() if task is not None}
        if training:
            first, task = next(iter(training.items()))
            request = requests[first]
            trained = self.train_local(
                list(training),
                lambda client: training[client].objective,
                purpose=task.purpose,
                start=request.model,
                epochs=request.epochs,
                optimizer=task.optimizer,
            )
        replies = {k: side.reply(self.clients[k], r, trained.get(k)) for k, r in requests.items()}
        self.state.write(self.global_state)
        return replies

    def collect(self, clients: Sequence[int], replies: dict[int, Any]) -> Replies[Any]:
        """Count what comes up from clients, and let the ranks share what their clients changed.

        Args:
            clients: Clients that replied, of all ranks.
            replies: Replies of the clients of this rank.
        """
        sent = gather_objects({k: count_payload(reply) for k, reply in replies.items()})
        self.costs.bytes_up += sum(sent.values())
        if rank_and_world()[1] > 1:
            changed = {c.number: (c.labels, c.memory) for c in self.clients if c.has_changed}
            for number, (labels, memory) in gather_objects(changed).items():
                client = self.clients[number]
                self.labels.write(client.index, labels)
                client.memory = memory
        for client in self.clients:
            client.has_changed = False
        return Replies(list(clients), replies, self.device)

    def read_memories(self) -> dict[int, dict[str, Tensor]]:
        """What clients remember of their samples, for a checkpoint."""
        return {c.number: c.memory for c in self.clients if c.memory}

    def write_memories(self, memories: Mapping[int, dict[str, Tensor]]) -> None:
        """Restore what clients remember."""
        for client in self.clients:
            client.memory = dict(memories.get(client.number, {}))

    # --- local training ------------------------------------------------------------------------

    def train_local(
        self,
        clients: Sequence[int],
        objective: Callable[[int], Objective],
        *,
        purpose: int | str,
        start: Tensor | None = None,
        epochs: int | None = None,
        optimizer: OptimizerFactory | None = None,
    ) -> ClientStates:
        """Train each of some clients of this rank from the same start, alone.

        Args:
            clients: Clients to train.
            objective: Gives the local loss of a client.
            purpose: Key of the random numbers: the round, or the name of a stage.
            start: Flat state to start from; the global model by default. Shape: (P,).
            epochs: Local epochs; ``local_epochs`` by default.
            optimizer: Local optimizer; the federation's by default.

        Returns:
            Flat states after training.
        """
        start = self.global_state if start is None else start
        epochs = self.local_epochs if epochs is None else epochs
        make = optimizer or self.optimizer
        objectives = {client: objective(client) for client in clients}
        done: ClientStates = {}
        if self.vectorize > 1:
            fit = [k for k in clients if vectorizable(objectives[k])]
            for i in range(0, len(fit), self.vectorize):
                done |= train_group(
                    self,
                    fit[i : i + self.vectorize],
                    objectives.__getitem__,
                    purpose,
                    start=start,
                    epochs=epochs,
                    make_optimizer=make,
                )
        for client in clients:
            if client not in done:
                done[client] = self.train_one(
                    client, objectives[client], purpose, start, epochs=epochs, make=make
                )
        self.state.write(self.global_state)
        return done

    # --- exchange between ranks; every rank must take part -------------------------------------

    def average(self, states: ClientStates, weights: Mapping[int, float]) -> Tensor:
        """Weighted sum of client models, equal on every rank. Shape: (P,)."""
        return exact_average(
            states, weights, self.state.splits, device=self.device, dtype=self.global_state.dtype
        )

    def size_weights(self, clients: Sequence[int]) -> dict[int, float]:
        """Fraction of the samples of these clients that each has (FedAvg's weights)."""
        fractions = sample_weights(self.sizes[list(clients)]).tolist()
        return dict(zip(clients, fractions, strict=True))

    def gather_rows(self, rows: Mapping[int, Tensor], clients: Sequence[int]) -> Tensor:
        """Stack one tensor per client, each known to the rank that simulated it.

        Args:
            rows: This rank's tensors, all of one shape and dtype.
            clients: All clients, of all ranks, in the order of the result.

        Returns:
            One row per client, equal on every rank. Shape: (len(clients), …).
        """
        return gather_rows(rows, clients, self.device)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Broadcast a tensor of rank 0 to every rank."""
        if rank_and_world()[1] > 1:
            tensor = tensor.to(self.device)
            dist.broadcast(tensor, 0)
        return tensor
