"""The rounds of a federated method: who trains when, from which seed, and at what cost.

Axes: K clients, P flat state size.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fulgurite.arithmetic import ceil_div
from fulgurite.errors import CheckpointError, ConfigError
from fulgurite.models.fedsir.federation import (
    Costs,
    Federation,
    Replies,
    Reply,
    TrainReply,
    TrainRequest,
    keyed_generator,
)
from fulgurite.models.fedsir.method_checks import check_participants, check_weights
from fulgurite.models.fedsir.methods import FederatedMethod
from fulgurite.models.fedsir.options import RoundOptions

__all__ = ["FinishedRound", "RoundEngine", "run_seed"]


def run_seed() -> int:
    """The seed of the run, which ``seed_everything`` records; 0 where nothing was seeded."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


@dataclass(frozen=True)
class FinishedRound:
    """What happened in a round.

    Attributes:
        clients: Clients that reported.
        weights: Weight of each client's model in the new global one; 0 for the others. Shape: (K,).
        loss: Mean local loss over the clients that reported.
    """

    clients: list[int]
    weights: list[float]
    loss: float


class RoundEngine:
    """Runs a federated method round by round; owns seed, round counter, groups and federation.

    A round is :meth:`begin_round`, :meth:`train_group` for each of the groups of this rank,
    :meth:`aggregate`, and :meth:`finish_round`. :meth:`start` and :meth:`begin_round` do nothing
    where they have been done already, so that a callback may call them before the module does.

    Args:
        method: The federated method.
        options: Which clients take part, and when the rounds end.

    Source: docs/papers/fedsir.md section 1; participation, dropout and ranks: inferred.
    """

    def __init__(self, method: FederatedMethod, options: RoundOptions | None = None) -> None:
        self.method = method
        self.options = options or RoundOptions()
        self.round = 0  # rounds that are finished, and number of the current one
        self.groups: list[list[int]] = []  # clients of this rank in the current round, by group
        self.clients: list[int] = []  # clients of all ranks in the current round
        self.upcoming = 0  # client-epochs of the next round
        self.exhausted = False  # whether a further round would exceed the limit
        self.finished: FinishedRound | None = None  # the last one
        self._begun = -1  # the last round that was begun
        self._started = False
        self._requests: dict[int, TrainRequest] = {}
        self._replies: dict[int, Reply] = {}  # of this rank's clients
        self._collected: Replies[TrainReply] | None = None
        self._weights: dict[int, float] = {}
        self._saved: dict[str, Any] | None = None
        self._federation: Federation | None = None

    # --- schedule ------------------------------------------------------------------------------

    def clients_per_round(self, num_clients: int) -> int:
        """Number of clients that are sampled in a round.

        Example:
            >>> engine = RoundEngine(FederatedMethod(), RoundOptions(participation=0.25))
            >>> engine.clients_per_round(10)
            3
        """
        return max(1, int(self.options.participation * num_clients + 0.5))

    def groups_per_round(self, num_clients: int, *, ranks: int, group_size: int) -> int:
        """Number of groups of each rank; every rank has equally many, some of which are empty.

        Args:
            num_clients: Number of clients of the federation.
            ranks: Number of ranks.
            group_size: Number of clients that train in one pass.
        """
        per_rank = ceil_div(self.clients_per_round(num_clients), ranks)
        return ceil_div(per_rank, max(1, group_size))

    def sample_clients(self, round: int) -> list[int]:
        """Draw the clients of a round, ascending."""
        number = self.clients_per_round(self.fed.num_clients)
        generator = keyed_generator(self.fed.seed, "participation", round)
        order = torch.randperm(self.fed.num_clients, generator=generator)
        return sorted(order[:number].tolist())

    def draw_reporting(self, clients: Sequence[int], round: int) -> list[int]:
        """Draw those of the sampled clients that report."""
        if not self.options.dropout:
            return list(clients)
        draws = {
            k: float(torch.rand((), generator=keyed_generator(self.fed.seed, "drop", round, k)))
            for k in clients
        }
        return [k for k in clients if draws[k] >= self.options.dropout] or list(clients[:1])

    # --- start ---------------------------------------------------------------------------------

    @property
    def fed(self) -> Federation:
        """The federation, once :meth:`open` has been called."""
        assert self._federation is not None, "the rounds have not been opened"
        return self._federation

    @property
    def is_open(self) -> bool:
        """Whether there is a federation."""
        return self._federation is not None

    def open(self, make_federation: Callable[[int], Federation], first_round: int = 0) -> None:
        """Build the federation, and take up the state that :meth:`load_state_dict` was given.

        Args:
            make_federation: Makes the federation from the seed of the rounds.
            first_round: Number of the first round, where no state was given.

        Raises:
            CheckpointError: The state is of another method, or of other data.
            ConfigError: The limit of client-epochs is below those of the first round.
        """
        seed = run_seed() if self.options.seed is None else self.options.seed
        saved, self._saved = self._saved, None
        self._federation = make_federation(saved["seed"] if saved else seed)
        self.round, self._begun = first_round, -1
        self._started = self.exhausted = False
        if saved:
            self._restore(saved)
        else:
            self._check_limit()

    def start(self) -> None:
        """Do what the method does before round 0, such as to identify clean clients.

        Raises:
            ConfigError: The first round would exceed the limit of client-epochs.
        """
        if self._started:
            return
        fed = self.fed
        # ranks that were not seeded alike would start from different weights
        fed.global_state = fed.broadcast(fed.global_state)
        fed.state.write(fed.global_state)
        self.method.before_rounds(fed)
        fed.state.write(fed.global_state)
        self._started = True
        self.upcoming = self._next_client_epochs()
        if self._exceeds(fed.costs.client_epochs + self.upcoming):
            raise ConfigError(
                f"model.init_args.rounds.max_client_epochs={self.options.max_client_epochs} does "
                f"not suffice for the first round: {fed.costs.client_epochs} client-epochs were "
                f"spent before it, and it needs {self.upcoming}.",
                "Give more, or fewer epochs of identification.",
            )

    def _check_limit(self) -> None:
        limit = self.options.max_client_epochs
        if limit is None:
            return
        before = self.fed.num_clients * self.method.local_rounds()
        if before + self.fed.local_epochs > limit:
            raise ConfigError(
                f"model.init_args.rounds.max_client_epochs={limit} does not suffice: {before} "
                "client-epochs are spent before the first round.",
                f"Give {before + self.fed.num_clients * self.fed.local_epochs} or more, or fewer "
                "epochs of identification.",
            )

    def _exceeds(self, client_epochs: int) -> bool:
        limit = self.options.max_client_epochs
        return limit is not None and client_epochs > limit

    def _next_client_epochs(self) -> int:
        """Client-epochs of the next round; an upper bound if it identifies clients again."""
        fed, round = self.fed, self.round
        before = self.method.client_epochs_before(fed, round)
        clients = self.sample_clients(round)
        if not before:
            clients = self.draw_reporting(self.method.participants(fed, round, clients), round)
        return before + len(clients) * fed.local_epochs

    # --- a round -------------------------------------------------------------------------------

    def begin_round(self) -> None:
        """Let the method act, choose the round's clients and deal them out to groups.

        A method's own exchanges (identification, references) reach all clients, sampled or not.
        """
        if self._begun == self.round:
            return
        fed, method, round = self.fed, self.method, self.round
        fed.round = round
        fed.global_state = fed.state.read()
        method.before_round(fed, round)
        fed.state.write(fed.global_state)
        sampled = self.sample_clients(round)
        participants = method.participants(fed, round, sampled)
        check_participants(method, participants, sampled)
        self.clients = self.draw_reporting(participants, round)
        self._requests = {k: method.training_request(fed, k, round) for k in self.clients}
        fed.send(self._requests)
        clients = fed.local_clients(self.clients)
        size = max(1, fed.vectorize)
        if size > 1:  # clients of a group that end together waste no passes
            clients = sorted(clients, key=lambda k: -int(fed.sizes[k]))
        self.groups = [clients[i : i + size] for i in range(0, len(clients), size)]
        self._replies = {}
        self._begun = round

    def train_group(self, group: int) -> None:
        """Train the clients of a group of this rank; nothing where the group is empty.

        Args:
            group: Number of the group in the round.
        """
        if group < len(self.groups):
            requests = {k: self._requests[k] for k in self.groups[group]}
            self._replies |= self.fed.answer(self.method.client_side, requests)

    def aggregate(self) -> Tensor:
        """Average the clients' models; every rank must take part. Shape: (P,)."""
        fed = self.fed
        self._collected = fed.collect(self.clients, self._replies)
        self.clients = self._collected.clients  # over a network some may be away
        self._weights = self.method.weights(fed, self.round, self._collected)
        check_weights(self.method, self._weights, self.clients)
        aggregate = fed.average(self._collected.models, self._weights)
        fed.costs.rounds += 1
        return aggregate

    def finish_round(self) -> FinishedRound:
        """Let the method look at the round, whose new global model is in the network."""
        fed, replies = self.fed, self._collected
        assert replies is not None, "the round has not been aggregated"
        fed.global_state = fed.state.read()
        self.method.after_round(fed, self.round, replies)
        losses = replies.stack(lambda client, _: fed.loss_sum[client])
        self.finished = FinishedRound(
            self.clients,
            [self._weights.get(k, 0.0) for k in range(fed.num_clients)],
            float(losses.mean()),
        )
        self._replies, self._requests, self._collected = {}, {}, None
        self.round += 1
        self.upcoming = self._next_client_epochs()
        self.exhausted = self._exceeds(fed.costs.client_epochs + self.upcoming)
        return self.finished

    # --- checkpoint ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Rounds so far, labels, method, costs and seed; plain types and tensors."""
        return {
            "name": type(self.method).__name__,
            "seed": self.fed.seed,
            "round": self.round,
            "partition": _digest_partition(self.fed.index),
            "labels": self.fed.labels.state_dict(),
            "clients": self.fed.read_memories(),
            "method": _move_models(self.method.state_dict(), torch.device("cpu")),
            "costs": asdict(self.fed.costs),
            "receivers": sorted(self.fed.receivers),
            "upcoming": self.upcoming,
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Store a checkpoint's state, or none, until :meth:`open` takes it up."""
        self._saved = None if state is None else dict(state)

    def has_spent_limit(self) -> bool:
        """Whether the next round of a state that awaits :meth:`open` would exceed the limit."""
        saved = self._saved
        return saved is not None and self._exceeds(
            int(saved["costs"]["client_epochs"]) + int(saved["upcoming"])
        )

    def _restore(self, saved: dict[str, Any]) -> None:
        if saved["name"] != type(self.method).__name__:
            raise CheckpointError(
                f"The checkpoint is of {saved['name']}, not of {type(self.method).__name__}.",
                "Resume with the method of the run, model.init_args.method.",
            )
        partition = _digest_partition(self.fed.index)
        if saved.get("partition", partition) != partition:  # none: of an older version
            raise CheckpointError(
                "The clients of the checkpoint have other samples than those of these data.",
                "Resume with the partition of the run and the file that it reads, if any, as it "
                "was; or begin anew from its weights, --model.init_args.weights=CHECKPOINT.",
            )
        self.fed.labels.load_state_dict(saved["labels"])
        self.method.load_state_dict(_move_models(saved["method"], self.fed.device))
        self.fed.write_memories(saved["clients"])
        self.fed.costs = Costs(**saved["costs"])
        self.fed.receivers = set(saved["receivers"])
        self.round, self.upcoming = int(saved["round"]), int(saved["upcoming"])
        self._started = True


def _digest_partition(index: Sequence[Tensor]) -> str:
    """SHA-256 of the samples of each client."""
    digest = hashlib.sha256()
    for samples in index:
        digest.update(str(samples.tolist()).encode())
    return digest.hexdigest()


def _move_models(value: Any, device: torch.device) -> Any:
    """Move the flat models (1-D floats) of a method's state; all else stays on the CPU."""
    if isinstance(value, Tensor):
        return value.to(device) if value.is_floating_point() and value.ndim == 1 else value.cpu()
    if isinstance(value, dict):
        return {k: _move_models(v, device) for k, v in value.items()}
    return value
