"""The federation that a method sees: clients, local training, exchange between ranks.

Axes: K clients, N samples, B mini-batch, C classes, D feature dimension, P flat state size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fulgurite.models.fedsir.aggregation import sample_weights
from fulgurite.models.fedsir.federation.objectives import Objective
from fulgurite.models.fedsir.federation.ranks import balanced_assignment, gather_objects
from fulgurite.models.fedsir.federation.states import ClientStates, exact_average
from fulgurite.models.fedsir.federation.training import LocalTrainer, OptimizerFactory
from fulgurite.models.fedsir.federation.vectorized import train_group, vectorizable
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

    Its arguments are those of :class:`LocalTrainer`, and the costs so far.
    """

    costs: Costs = field(default_factory=Costs)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.receivers: set[int] = set()  # clients that have the current global model
        self._global_state = self.state.read()

    # --- facts known to every rank ---------------------------------------------------------------

    def local_clients(self, clients: Sequence[int]) -> list[int]:
        """Select the clients that this rank simulates."""
        rank, world = rank_and_world()
        sizes = {k: int(self.sizes[k]) for k in clients}
        return balanced_assignment(sizes, world)[rank]

    def label_counts(self, *, current: bool = False) -> Tensor:
        """Labels per client and class, of the given labels or the current ones. Shape: (K, C)."""
        labels = self.labels.current if current else self.labels.given
        return torch.stack([labels[i].bincount(minlength=self.num_classes) for i in self.index])

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

    # --- local training ------------------------------------------------------------------------

    def train(
        self,
        clients: Sequence[int],
        objective: Callable[[int], Objective],
        *,
        purpose: int | str,
        start: Tensor | None = None,
        epochs: int | None = None,
        optimizer: OptimizerFactory | None = None,
    ) -> ClientStates:
        """Train each client from the same start, alone.

        Args:
            clients: Clients to train; every rank trains those it simulates.
            objective: Gives the local loss of a client.
            purpose: Key of the random numbers: the round, or the name of a stage.
            start: Flat state to start from; the global model by default. Shape: (P,).
            epochs: Local epochs; ``local_epochs`` by default.
            optimizer: Local optimizer; the federation's by default.

        Returns:
            Flat states after training, of this rank's clients.
        """
        self.costs.client_epochs += len(clients) * (self.local_epochs if epochs is None else epochs)
        return self.train_local(
            self.local_clients(clients),
            objective,
            purpose=purpose,
            start=start,
            epochs=epochs,
            optimizer=optimizer,
        )

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
        """Train clients of this rank as :meth:`train` does, without counting their epochs.

        (A rank does not know how many clients the others train.)
        """
        start = self.global_state if start is None else start
        epochs = self.local_epochs if epochs is None else epochs
        make = optimizer or self.optimizer
        objectives = {client: objective(client) for client in clients}
        done: ClientStates = {}
        if self.vectorize > 1:
            fit = [k for k in clients if vectorizable(objectives[k])]
            for i in range(0, len(fit), self.vectorize):
                group = fit[i : i + self.vectorize]
                get_objective = objectives.__getitem__
                done |= train_group(self, group, get_objective, purpose, start, epochs, make)
        for client in clients:
            if client not in done:
                done[client] = self.train_one(
                    client, objectives[client], purpose, start, epochs, make
                )
        self.state.write(self.global_state)
        return done

    def teacher(self) -> nn.Module:
        """A frozen copy of the current global model, in evaluation mode."""
        return self.frozen(self.global_state)

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
        if rank_and_world()[1] == 1:
            return torch.stack([rows[k] for k in clients])
        gathered = self.gather_objects({k: rows[k].cpu() for k in clients if k in rows})
        return torch.stack([gathered[k] for k in clients]).to(self.device)

    def gather_objects(self, entries: Mapping[int, Any]) -> dict[int, Any]:
        """Merge the dictionaries of all ranks; meant for small objects."""
        return gather_objects(entries)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Broadcast a tensor of rank 0 to every rank."""
        if rank_and_world()[1] > 1:
            tensor = tensor.to(self.device)
            dist.broadcast(tensor, 0)
        return tensor

    def relabel(self, labels: Mapping[int, Tensor]) -> None:
        """Write new labels of whole clients, those of other ranks included.

        Args:
            labels: New labels of this rank's clients. Shape of each: (N_k,).
        """
        for client, new in self.gather_objects({k: v.cpu() for k, v in labels.items()}).items():
            self.labels.write(self.index[client], new)
