"""The federation that a method sees: clients, local training, exchange between ranks.

Pure torch. Clients are simulated; each rank trains the clients dealt out to it, and whatever is
exchanged is exchanged through the few collectives below, so that one process and several give
the same result bit for bit: random numbers come from generators keyed by their use
(seed, purpose, round, client), and sums over clients are exact integers (:func:`exact_average`).
(Not so with ``vectorize``: which clients share a pass depends on the ranks, and so does rounding.)

Axes: K clients, N samples, B mini-batch, C classes, D feature dimension, P flat state size.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from fulgurite.devices import move
from fulgurite.errors import ConfigError
from fulgurite.models.fedsir.aggregation import sample_weights
from fulgurite.sampling import rank_and_world

__all__ = [
    "ClientStates",
    "Costs",
    "FederatedData",
    "Federation",
    "FlatState",
    "Labels",
    "MiniBatch",
    "Objective",
    "VisibleData",
    "balanced_assignment",
    "exact_average",
    "keyed_generator",
    "mini_batches",
]

OptimizerFactory = Callable[[Any], Optimizer]
ClientStates = dict[int, Tensor]  # client -> flat state (P,); a rank holds those of its clients


class Labels(Protocol):
    """The labels that training sees: the given ones, and the current ones after relabeling."""

    given: Tensor
    current: Tensor

    def write(self, index: Tensor, labels: Tensor) -> None:
        """Replace the current labels of some samples."""


class FederatedData(Protocol):
    """The members of a DataModule that the engine uses; true labels are not among them."""

    num_classes: int

    @property
    def num_clients(self) -> int:
        """Number of clients."""

    @property
    def labels(self) -> Labels:
        """The label store."""

    def client_index(self, client: int) -> Tensor:
        """Positions of the client's samples in the label store. Shape: (N_k,)."""

    def client_images(self, client: int) -> Tensor:
        """The client's images as stored. Shape: (N_k, channels, height, width)."""

    def augment_batch(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Network input for training. Shape: (B, channels, height, width)."""

    def plain_batch(self, images: Tensor) -> Tensor:
        """Network input for evaluation. Shape: (B, channels, height, width)."""


class VisibleData:
    """View of a DataModule that has the members of :class:`FederatedData` and no others.

    Args:
        data: The DataModule, whose true labels stay out of reach.
    """

    def __init__(self, data: FederatedData) -> None:
        self.num_classes, self.num_clients = data.num_classes, data.num_clients
        self.labels = data.labels
        # functions, not bound methods: those would carry the DataModule along
        self.client_index = lambda client: data.client_index(client)
        self.client_images = lambda client: data.client_images(client)
        self.augment_batch = lambda images, generator: data.augment_batch(images, generator)
        self.plain_batch = lambda images: data.plain_batch(images)


@dataclass(frozen=True)
class MiniBatch:
    """A mini-batch of one client.

    Attributes:
        images: Network input. Shape: (B, channels, height, width).
        labels: Current labels. Shape: (B,).
        index: Positions in the label store. Shape: (B,).
    """

    images: Tensor
    labels: Tensor
    index: Tensor


class Objective(Protocol):
    """A local loss, which a client minimises on each mini-batch."""

    def __call__(self, network: nn.Module, batch: MiniBatch) -> Tensor:
        """The scalar to minimise."""


def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator whose stream is a function of the key alone.

    Example:
        >>> a, b = (torch.rand(1, generator=keyed_generator(0, "x", k)) for k in (1, 1))
        >>> bool(a == b)
        True
    """
    return torch.Generator().manual_seed(_hash_key(*key))


def _hash_key(*key: int | str) -> int:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") // 2  # manual_seed takes a signed 64-bit integer


class FlatState:
    """Reads and writes all floating tensors of a module as one vector.

    BatchNorm's running statistics are part of it; integer buffers (its counters), which no method
    averages, are not: writing a state sets them back to what they were at first, since they would
    otherwise tell how many batches this rank happened to train.

    Args:
        module: Its parameters and buffers, in ``state_dict`` order.
    """

    def __init__(self, module: nn.Module) -> None:
        tensors = module.state_dict().values()
        self.tensors = [t for t in tensors if t.is_floating_point()]
        self.counters = [(t, t.clone()) for t in tensors if not t.is_floating_point()]
        self.splits = [t.numel() for t in self.tensors]
        self.size: int = sum(self.splits)

    def read(self) -> Tensor:
        """A copy of the module's state. Shape: (P,)."""
        return torch.cat([t.detach().reshape(-1) for t in self.tensors])

    @torch.no_grad()
    def write(self, state: Tensor) -> None:
        """Set the module's state in place. Shape: (P,)."""
        for tensor, part in zip(self.tensors, torch.split(state, self.splits), strict=True):
            tensor.copy_(part.view_as(tensor))
        for counter, first in self.counters:
            counter.copy_(first)


def exact_average(
    states: Mapping[int, Tensor],
    weights: Mapping[int, float],
    splits: Sequence[int],
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Weighted sum of states whose value does not depend on the order or rank of the terms.

    Floating sums depend on their order, so an all-reduce over 3 ranks would differ from one over
    2. Each weighted term is rounded to a multiple of one fixed quantum per tensor (2⁻⁵² of its
    largest term, finer than float32 by far) and the integers are summed, which is exact.

    Args:
        states: Flat states of this rank's clients. Shape of each: (P,).
        weights: Weight of every client, of all ranks.
        splits: Number of entries of each tensor of a state; sums to P.
        device: Device of the result.
        dtype: Type of the result, the same on every rank.

    Returns:
        ``Σ weight · state`` over all ranks. Shape: (P,).

    Raises:
        ConfigError: A state holds NaN or an infinity: training diverged.

    Example:
        >>> states = {0: torch.tensor([1.0, 2.0]), 1: torch.tensor([3.0, 6.0])}
        >>> exact_average(states, {0: 0.5, 1: 0.5}, [2], device=torch.device("cpu"))
        tensor([2., 4.])

    Source: inferred (the paper's simulation runs in one process).
    """
    counts = move(torch.tensor(splits), device)
    peak = torch.zeros(len(splits), dtype=torch.float64, device=device)
    local_clients = [k for k in states if weights.get(k)]
    for client in local_clients:
        term = states[client].to(device).double() * weights[client]
        largest = [part.abs().max() for part in torch.split(term, list(splits))]
        peak = torch.maximum(peak, torch.stack(largest).nan_to_num(torch.inf, torch.inf))
    _all_reduce(peak, "max")
    if not bool(peak.isfinite().all()):  # on every rank, so that none waits for another
        bad = [str(k) for k in local_clients if not bool(states[k].isfinite().all())]
        raise ConfigError(
            f"The local training of client {', '.join(bad) or 'of another rank'} diverged (its "
            "model has NaN or infinity).",
            "Lower the learning rate, model.init_args.optimizer.init_args.lr.",
        )
    # 62 bits hold the sum: 52 below the exponent of the largest term, the rest for their number
    bits = min(52, 62 - len(weights).bit_length())
    quantum = torch.exp2(torch.frexp(peak)[1].double() - bits).repeat_interleave(
        counts, output_size=sum(splits)
    )
    total = torch.zeros(sum(splits), dtype=torch.int64, device=device)
    for client in local_clients:
        term = states[client].to(device).double() * weights[client]
        total += (term / quantum).round().long()
    _all_reduce(total, "sum")
    return (total.double() * quantum).to(dtype)


def _all_reduce(tensor: Tensor, operation: str) -> None:
    if rank_and_world()[1] > 1:
        dist.all_reduce(tensor, dist.ReduceOp.SUM if operation == "sum" else dist.ReduceOp.MAX)


def balanced_assignment(sizes: Mapping[int, int], ranks: int) -> list[list[int]]:
    """Deal clients out to ranks: equal counts (up to one), sizes balanced greedily.

    Example:
        >>> balanced_assignment({0: 9, 1: 5, 2: 4, 3: 1}, 2)
        [[0, 3], [1, 2]]
    """
    capacity = math.ceil(len(sizes) / ranks)
    groups: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for client in sorted(sizes, key=lambda k: (-sizes[k], k)):
        rank = min(
            (r for r in range(ranks) if len(groups[r]) < capacity), key=lambda r: (loads[r], r)
        )
        groups[rank].append(client)
        loads[rank] += sizes[client]
    return [sorted(group) for group in groups]


def mini_batches(samples: int, size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Shuffled positions of a local epoch; a last batch of one joins the one before it.

    BatchNorm cannot train on a single sample, so the tail is merged rather than dropped.

    Example:
        >>> [len(b) for b in mini_batches(9, 4, keyed_generator(0))]
        [4, 5]
    """
    order = torch.randperm(samples, generator=generator)
    if samples % size == 1 and samples > 1:
        head, tail = order[: -size - 1], order[-size - 1 :]
        return (*(torch.split(head, size) if len(head) else ()), tail)
    return tuple(torch.split(order, size))


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
class Federation:
    """Clients, their local training, and the exchange between ranks, for the hooks of a method.

    Args:
        data: The federated data.
        network: Network trained in place; it holds the global model between rounds.
        optimizer: Makes a client's local optimizer from its parameters.
        seed: Seed of all random numbers in local training.
        batch_size: Mini-batch size of local training.
        local_epochs: Epochs a client trains in a round.
        evaluation_batch_size: Batch size of feature extraction.
        autocast: Makes the context of forward passes (mixed precision).
        resident: Keep a client's images on the device while it trains. Off for clients whose
            images do not fit there.
        vectorize: Number of clients trained in one pass where their objective allows; 0 is off.
        on_step: Called after every local step, to show progress.
    """

    data: FederatedData
    network: nn.Module
    optimizer: OptimizerFactory
    seed: int = 0
    batch_size: int = 64
    local_epochs: int = 1
    evaluation_batch_size: int = 512
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    resident: bool = True
    vectorize: int = 0
    on_step: Callable[[], None] = lambda: None
    costs: Costs = field(default_factory=Costs)

    def __post_init__(self) -> None:
        self.state = FlatState(self.network)
        self.receivers: set[int] = set()  # clients that have the current global model
        self._global_state = self.state.read()
        self.num_clients = self.data.num_clients
        self.num_classes = self.data.num_classes
        self.labels = self.data.labels
        self.index = [self.data.client_index(k) for k in range(self.num_clients)]
        self.sizes = torch.tensor([len(i) for i in self.index])
        self.device = next(self.network.parameters()).device
        self.loss_sum = torch.zeros(self.num_clients, device=self.device)
        self._teacher: nn.Module | None = None

    # --- facts known to every rank ---------------------------------------------------------------

    def local_clients(self, clients: Sequence[int]) -> list[int]:
        """Select the clients that this rank simulates."""
        rank, world = rank_and_world()
        sizes = {k: int(self.sizes[k]) for k in clients}
        return balanced_assignment(sizes, world)[rank]

    def client_labels(self, client: int) -> Tensor:
        """Current labels of a client. Shape: (N_k,)."""
        return self.labels.current[self.index[client]]

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
            from fulgurite.models.fedsir.vectorized import train_group, vectorizable

            fit = [k for k in clients if vectorizable(objectives[k])]
            for i in range(0, len(fit), self.vectorize):
                group = fit[i : i + self.vectorize]
                get_objective = objectives.__getitem__
                done |= train_group(self, group, get_objective, purpose, start, epochs, make)
        for client in clients:
            if client not in done:
                done[client] = self._train_one(
                    client, objectives[client], purpose, start, epochs, make
                )
        self.state.write(self.global_state)
        return done

    def batches(self, client: int, purpose: int | str, epochs: int) -> Iterator[MiniBatch]:
        """The mini-batches of a client's local training, augmented, on the device."""
        images = self.data.client_images(client)
        index, labels = self.index[client], move(self.client_labels(client), self.device)
        if self.resident:
            images = move(images, self.device)
        for epoch in range(epochs):
            generator = keyed_generator(self.seed, "batches", purpose, client, epoch)
            batches = mini_batches(len(index), self.batch_size, generator)
            # one copy for the epoch
            device_batches = torch.split(
                move(torch.cat(batches), self.device), [len(b) for b in batches]
            )
            for rows, device_rows in zip(batches, device_batches, strict=True):
                batch_images = move(images[device_rows if self.resident else rows], self.device)
                yield MiniBatch(
                    self.data.augment_batch(batch_images, generator),
                    labels[device_rows],
                    index[rows],
                )

    def _train_one(
        self,
        client: int,
        objective: Objective,
        purpose: int | str,
        start: Tensor,
        epochs: int,
        make: OptimizerFactory,
    ) -> Tensor:
        self.state.write(start)
        optimizer = make(self.network.parameters())
        self.network.train()
        total = torch.zeros((), device=self.device)
        steps = 0
        with self.keyed_randomness("network", purpose, client):
            for batch in self.batches(client, purpose, epochs):
                if len(batch.labels) == 1:
                    self.network.eval()  # BatchNorm has no variance of one sample
                optimizer.zero_grad()
                with self.autocast():
                    loss = objective(self.network, batch)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                total += loss.detach()
                steps += 1
                self.on_step()
        self.network.train()
        self.loss_sum[client] = total / max(steps, 1)
        return self.state.read()

    @contextmanager
    def keyed_randomness(self, *key: int | str) -> Iterator[None]:
        """Seed torch's own generators (dropout) for one client, and restore them afterwards."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            # torch.manual_seed also queues a call, with its stack trace, for each kind of
            # accelerator that torch knows: slower than a local step, and never freed
            number = _hash_key(self.seed, *key)
            torch.default_generator.manual_seed(number)
            if devices:
                with torch.cuda.device(self.device):  # the others' states are not restored
                    torch.cuda.manual_seed(number)
            yield

    # --- features and logits of a client's data -------------------------------------------------

    @torch.no_grad()
    def features(
        self, client: int, state: Tensor, *, augmented: str | None = None
    ) -> Iterator[tuple[Tensor, Tensor, slice]]:
        """Penultimate features and logits of a client's samples, in their order.

        Args:
            client: Client whose samples are used.
            state: Flat state of the model that computes the features. Shape: (P,).
            augmented: Key of the random numbers for training augmentation; None for plain images.

        Yields:
            Features (B, D), logits (B, C), and the slice of the client's samples.
        """
        self.state.write(state)
        self.network.eval()
        images = self.data.client_images(client)
        generator = keyed_generator(self.seed, "features", augmented or "", client)
        network: Any = self.network
        for begin in range(0, len(images), self.evaluation_batch_size):
            part = slice(begin, begin + self.evaluation_batch_size)
            picked = move(images[part], self.device)
            inputs = (
                self.data.augment_batch(picked, generator)
                if augmented
                else self.data.plain_batch(picked)
            )
            with self.autocast():
                features = network.features(inputs)
                logits = network.head(features)
            yield features, logits, part
        self.network.train()

    def logits(self, client: int, state: Tensor) -> Tensor:
        """Logits of all samples of a client under a model. Shape: (N_k, C)."""
        return torch.cat([logits.float() for _, logits, _ in self.features(client, state)])

    def teacher(self) -> nn.Module:
        """A frozen copy of the current global model, in evaluation mode."""
        if self._teacher is None:
            self._teacher = copy.deepcopy(self.network).requires_grad_(False).eval()
        FlatState(self._teacher).write(self.global_state)
        return self._teacher

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
        _, world = rank_and_world()
        if world == 1:
            return dict(entries)
        parts: list[Any] = [None] * world
        dist.all_gather_object(parts, dict(entries))
        merged = {k: v for part in parts for k, v in part.items()}
        return {k: merged[k] for k in sorted(merged)}

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
