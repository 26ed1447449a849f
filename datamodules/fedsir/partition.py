"""Partitions of training samples among clients.

Shapes: N samples, K clients, C classes, N_k samples of client k.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fulgurite.datamodules.fedsir.samples import Samples
from fulgurite.datamodules.fedsir.selection import is_integer_vector
from fulgurite.errors import ConfigError, DataError

__all__ = ["Dirichlet", "Grouped", "Iid", "Natural", "Partition", "Shards", "check_partition"]


class Partition(ABC):
    """A rule that assigns samples to clients."""

    def __call__(
        self, samples: Samples | Tensor, clients: int, num_classes: int, generator: torch.Generator
    ) -> list[Tensor]:
        """Assign all samples to clients.

        Args:
            samples: Samples to assign, or their true labels (N,).
            clients: Number of clients K.
            num_classes: Number of classes C.
            generator: Generator of the random numbers.

        Shape:
            - K tensors (N_k,) int64 of positions, ascending, disjoint, together all of range(N).

        Raises:
            ConfigError: ``clients`` is below 1.
            DataError: There are more clients than samples, or a client has no samples.
        """
        if clients < 1:
            raise ConfigError(
                f"There cannot be {clients} clients.",
                "Set `--data.init_args.clients` to 1 or more.",
            )
        if isinstance(samples, Tensor):
            samples = Samples.of(samples)
        if clients > len(samples):
            raise DataError(
                f"There are {clients} clients but only {len(samples)} training samples.",
                "Lower `--data.init_args.clients` or use more data.",
            )
        owner = self.assign(samples, clients, num_classes, generator)
        if not is_integer_vector(owner, len(samples)) or owner.min() < 0 or owner.max() >= clients:
            raise DataError(
                f"The partition named clients outside 0 to {clients - 1}, or not one per sample.",
                "Correct the `assign` method of `--data.init_args.partition`: it returns an int64 "
                "tensor of clients.",
            )
        sizes = torch.bincount(owner, minlength=clients).tolist()
        parts = list(torch.split(owner.argsort(stable=True), sizes))
        check_partition(parts, len(samples))
        return parts

    @abstractmethod
    def assign(
        self, samples: Samples, clients: int, num_classes: int, generator: torch.Generator
    ) -> Tensor:
        """Return the client of each sample.

        Samples come in a random order; ``samples.rows`` is their order in the source.

        Shape:
            - (N,) int64 in [0, K).
        """


def check_partition(parts: list[Tensor], samples: int) -> None:
    """Check that every sample has exactly one client and that no client is empty.

    Raises:
        DataError: A client is empty, or a sample is missing or assigned twice.

    Example:
        >>> check_partition([torch.tensor([0, 2]), torch.tensor([1])], 3)
    """
    if empty := [k for k, part in enumerate(parts) if not len(part)]:
        raise DataError(
            f"The partition left client {empty[0]} ({len(empty)} of {len(parts)}) without samples.",
            "Lower `--data.init_args.clients`, make the partition more even (a larger `alpha` or "
            "`holding_probability`), or change `--data.init_args.seed`.",
        )
    if not torch.equal(torch.cat(parts).sort().values, torch.arange(samples)):
        raise DataError(
            f"The partition does not hold each of {samples} samples exactly once.",
            "Correct the `assign` method of `--data.init_args.partition`.",
        )


class Iid(Partition):
    """Random parts of equal size (within one sample).

    Source: docs/papers/fedsir.md section 2.

    Example:
        >>> parts = Iid()(torch.zeros(7, dtype=torch.int64), 2, 1, torch.Generator())
        >>> sorted(len(part) for part in parts)
        [3, 4]
    """

    def assign(
        self, samples: Samples, clients: int, num_classes: int, generator: torch.Generator
    ) -> Tensor:
        """Return the client of each sample: see :meth:`Partition.assign`."""
        return torch.randperm(len(samples), generator=generator) % clients


class Dirichlet(Partition):
    """Each class is distributed over its clients with Dirichlet proportions.

    A client may have a class with probability ``holding_probability``; the samples of a class are
    assigned independently to its clients with proportions drawn from Dir(alpha).

    Args:
        alpha: Concentration; small values give uneven partitions.
        holding_probability: Probability that a client may have a class, in (0, 1].

    Raises:
        ConfigError: ``alpha`` is not positive, or ``holding_probability`` is outside (0, 1].

    Source: docs/papers/fedsir.md section 2 (FedCorr's sampler). That a class without a
    client gets one at random is inferred.

    Example:
        >>> labels = torch.arange(1000) % 10
        >>> parts = Dirichlet(2.0)(labels, 4, 10, torch.Generator().manual_seed(0))
        >>> sum(len(part) for part in parts)
        1000
    """

    def __init__(self, alpha: float = 2.0, holding_probability: float = 1.0) -> None:
        if not 0 < alpha < float("inf"):
            raise ConfigError(
                f"The Dirichlet concentration alpha is {alpha}.",
                "Set `--data.init_args.partition.init_args.alpha` to a positive number.",
            )
        if not 0 < holding_probability <= 1:
            raise ConfigError(
                f"The holding probability is {holding_probability}.",
                "Set `--data.init_args.partition.init_args.holding_probability` in (0, 1].",
            )
        self.alpha = alpha
        self.holding_probability = holding_probability

    def assign(
        self, samples: Samples, clients: int, num_classes: int, generator: torch.Generator
    ) -> Tensor:
        """Return the client of each sample: see :meth:`Partition.assign`."""
        # torch draws no Dirichlet from a generator
        rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        holds = rng.random((clients, num_classes)) < self.holding_probability
        while not holds.any(1).all():  # as FedCorr: redraw clients that may hold nothing
            empty = ~holds.any(1)
            holds[empty] = rng.random((empty.sum(), num_classes)) < self.holding_probability
        orphans = np.flatnonzero(~holds.any(0))
        holds[rng.integers(clients, size=len(orphans)), orphans] = True
        truth = samples.classes.numpy()
        owner = np.empty(len(truth), dtype=np.int64)
        for c in range(num_classes):
            holders, members = np.flatnonzero(holds[:, c]), np.flatnonzero(truth == c)
            proportions = rng.dirichlet([self.alpha] * len(holders))
            owner[members] = rng.choice(holders, size=len(members), p=proportions)
        return torch.from_numpy(owner)


class Shards(Partition):
    """Samples sorted by class are divided into equal shards, a few for each client.

    Args:
        shards_per_client: Number of shards of a client, about its number of classes.

    Raises:
        ConfigError: ``shards_per_client`` is below 1.

    Source: McMahan et al., AISTATS 2017 (the usual "pathological" partition).

    Example:
        >>> labels = torch.arange(1000) % 10
        >>> parts = Shards(2)(labels, 5, 10, torch.Generator().manual_seed(0))
        >>> max(len(labels[part].unique()) for part in parts)
        2
    """

    def __init__(self, shards_per_client: int = 2) -> None:
        if shards_per_client < 1:
            raise ConfigError(
                f"There cannot be {shards_per_client} shards per client.",
                "Set `--data.init_args.partition.init_args.shards_per_client` to 1 or more.",
            )
        self.shards_per_client = shards_per_client

    def assign(
        self, samples: Samples, clients: int, num_classes: int, generator: torch.Generator
    ) -> Tensor:
        """Return the client of each sample: see :meth:`Partition.assign`."""
        labels = samples.classes
        shards = clients * self.shards_per_client
        shuffled = torch.randperm(len(labels), generator=generator)
        order = shuffled[labels[shuffled].argsort(stable=True)]
        shard = torch.arange(len(labels)) * shards // len(labels)
        client_of_shard = torch.randperm(shards, generator=generator) % clients
        owner = torch.empty_like(labels)
        owner[order] = client_of_shard[shard]
        return owner


class Natural(Partition):
    """Clients named by the source, such as the writers of LEAF's FEMNIST.

    Clients are numbered in the order of their names, numbers by value.

    Args:
        column: Column of the source with the client of each image.

    Raises:
        DataError: The source lacks the column, it is empty for an image, or the number of clients
            is not ``clients``.

    Source: Caldas et al., LEAF, arXiv 1812.01097 (natural partition by user).

    Example:
        >>> from fulgurite.datamodules.fedsir.samples import Listing
        >>> labels = torch.tensor([0, 1, 0])
        >>> listing = Listing(3, columns={"client": ("w10", "w9", "w10")})
        >>> samples = Samples(labels, labels, torch.arange(3), listing, ("a", "b"))
        >>> [part.tolist() for part in Natural()(samples, 2, 2, torch.Generator())]
        [[0, 2], [1]]
    """

    def __init__(self, column: str = "client") -> None:
        self.column = column

    def assign(
        self, samples: Samples, clients: int, num_classes: int, generator: torch.Generator
    ) -> Tensor:
        """Return the client of each sample: see :meth:`Partition.assign`."""
        names = samples.column(self.column)
        if nameless := [i for i, name in enumerate(names) if not name]:
            raise DataError(
                f"The column {self.column!r} of the source is empty for "
                f"{samples.describe(torch.tensor(nameless))}.",
                "Name a client for each image, or another column in "
                "`--data.init_args.partition.init_args.column`.",
            )
        all_names = set(samples.listing.columns[self.column]) - {""}
        return number_clients(
            names, all_names, clients, f"The column {self.column!r} of the source"
        )


def number_clients(names: Sequence[str], all_names: set[str], clients: int, origin: str) -> Tensor:
    """Return the number of each sample's client, in the order of the clients' names.

    Args:
        names: Client of each sample.
        all_names: All clients, including those without training samples.
        clients: Configured number of clients K.
        origin: Subject of error messages, such as ``The file``.

    Raises:
        DataError: ``all_names`` are not K clients, or a client has no training sample.

    Example:
        >>> number_clients(["10", "9", "10"], {"9", "10"}, 2, "The file").tolist()
        [1, 0, 1]
    """
    if len(all_names) != clients:
        raise DataError(
            f"{origin} names {len(all_names)} clients, and there are to be {clients}.",
            f"Set `--data.init_args.clients={len(all_names)}`.",
        )
    if idle := sorted(all_names - set(names)):
        raise DataError(
            f"{origin} names the client {idle[0]!r}, of whose images none is left for training "
            f"({len(idle)} of {clients} clients are like this).",
            "Lower `--data.init_args.evaluation.val_fraction`, raise `train_limit` of the "
            "source, or leave these clients out of the data.",
        )
    number = {name: k for k, name in enumerate(sort_names(all_names))}
    return torch.tensor([number[name] for name in names], dtype=torch.int64)


def sort_names(names: set[str]) -> list[str]:
    """Sort names, by value if all of them are integers.

    Example:
        >>> sort_names({"10", "9"}), sort_names({"w10", "w9"})
        (['9', '10'], ['w10', 'w9'])
    """
    if all(name.isascii() and name.isdigit() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


class Grouped(Partition):
    """Assigns whole groups by another partition, so that no group is at two clients.

    A group counts as one sample of its most common class.

    Args:
        partition: Partition of the groups.
        column: Column of the source with the group of each image, such as a patient; by default a
            group is an original with its augmented copies.

    Raises:
        DataError: The source lacks the column, or there are fewer groups than clients.

    Source: inferred: as the usual split by patient. Copies of one original at several clients, with
    labels of their own, would let a clean client teach the true labels of a noisy one.

    Example:
        >>> samples = Samples.of(torch.tensor([0, 1])).take(torch.tensor([0, 1, 0, 1]))
        >>> parts = Grouped(Iid())(samples, 2, 2, torch.Generator().manual_seed(0))
        >>> sorted(part.tolist() for part in parts)
        [[0, 2], [1, 3]]
    """

    def __init__(self, partition: Partition, column: str | None = None) -> None:
        self.partition = partition
        self.column = column

    def assign(
        self, samples: Samples, clients: int, num_classes: int, generator: torch.Generator
    ) -> Tensor:
        """Return the client of each sample: see :meth:`Partition.assign`."""
        group = samples.groups(self.column)
        groups = int(group.max()) + 1
        if groups < clients:
            raise DataError(
                f"There are {clients} clients and only {groups} groups of training samples.",
                "Lower `--data.init_args.clients`, or set another `column` in "
                "`--data.init_args.partition.init_args`.",
            )
        counts = torch.bincount(
            group * num_classes + samples.classes, minlength=groups * num_classes
        )
        common = counts.view(groups, num_classes).argmax(1)
        # the first sample of its commonest class stands for a group
        is_common = samples.classes == common[group]
        first = torch.full((groups,), len(samples)).scatter_reduce_(
            0, group[is_common], is_common.nonzero()[:, 0], "amin"
        )
        return self.partition.assign(samples.take(first), clients, num_classes, generator)[group]
