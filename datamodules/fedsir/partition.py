"""How training samples are dealt to clients.

Shapes: N samples, K clients, C classes, N_k samples of client k.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from fulgurite.errors import ConfigError, DataError

__all__ = ["Dirichlet", "Iid", "Partition", "Shards", "check_partition"]


class Partition(ABC):
    """A rule that deals samples to clients."""

    def __call__(
        self, labels: Tensor, clients: int, num_classes: int, generator: torch.Generator
    ) -> list[Tensor]:
        """Deal all samples to clients.

        Shape:
            - labels: (N,) int64 true labels -> K tensors (N_k,) int64, ascending, disjoint,
              together all of range(N).

        Raises:
            ConfigError: Fewer than one client.
            DataError: More clients than samples, or a client without samples.
        """
        if clients < 1:
            raise ConfigError(
                f"There cannot be {clients} clients.",
                "Set `--data.init_args.clients` to 1 or more.",
            )
        if clients > len(labels):
            raise DataError(
                f"There are {clients} clients but only {len(labels)} training samples.",
                "Lower `--data.init_args.clients` or use more data.",
            )
        owner = self.assign(labels, clients, num_classes, generator)
        if owner.shape != labels.shape or owner.min() < 0 or owner.max() >= clients:
            raise DataError(
                f"The partition named clients outside 0 to {clients - 1}, or not one per sample.",
                "Mend the `assign` method of `--data.init_args.partition`.",
            )
        sizes = torch.bincount(owner, minlength=clients).tolist()
        parts = list(torch.split(owner.argsort(stable=True), sizes))
        check_partition(parts, len(labels))
        return parts

    @abstractmethod
    def assign(
        self, labels: Tensor, clients: int, num_classes: int, generator: torch.Generator
    ) -> Tensor:
        """Return the client of each sample.

        Shape:
            - labels: (N,) int64 -> (N,) int64 in [0, K).
        """


def check_partition(parts: list[Tensor], samples: int) -> None:
    """Check that clients hold every sample exactly once and that none is empty.

    Raises:
        DataError: An empty client, or a sample that is missing or dealt twice.

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
            "Mend the `assign` method of `--data.init_args.partition`.",
        )


class Iid(Partition):
    """Random parts of equal size (within one sample).

    Source: FedSIR, arXiv 2604.20825, card section 2.

    Example:
        >>> parts = Iid()(torch.zeros(7, dtype=torch.int64), 2, 1, torch.Generator())
        >>> sorted(len(part) for part in parts)
        [3, 4]
    """

    def assign(
        self, labels: Tensor, clients: int, num_classes: int, generator: torch.Generator
    ) -> Tensor:
        """See :meth:`Partition.assign`."""
        return torch.randperm(len(labels), generator=generator) % clients


class Dirichlet(Partition):
    """Each class is spread over its holders with Dirichlet shares.

    A client may hold a class with probability ``holding_probability``; the samples of a class go
    independently to its holders by shares drawn from Dir(alpha).

    Args:
        alpha: Concentration; small is uneven.
        holding_probability: Chance that a client may hold a class, in (0, 1].

    Raises:
        ConfigError: An argument is out of range.

    Source: FedSIR, arXiv 2604.20825, card section 2 (FedCorr's sampler). That a class without a
    holder gets one at random is inferred.

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
        self, labels: Tensor, clients: int, num_classes: int, generator: torch.Generator
    ) -> Tensor:
        """See :meth:`Partition.assign`."""
        # torch draws no Dirichlet from a generator
        rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        holds = rng.random((clients, num_classes)) < self.holding_probability
        while not holds.any(1).all():  # as FedCorr: redraw clients that may hold nothing
            empty = ~holds.any(1)
            holds[empty] = rng.random((empty.sum(), num_classes)) < self.holding_probability
        orphans = np.flatnonzero(~holds.any(0))
        holds[rng.integers(clients, size=len(orphans)), orphans] = True
        truth = labels.numpy()
        owner = np.empty(len(truth), dtype=np.int64)
        for c in range(num_classes):
            holders, samples = np.flatnonzero(holds[:, c]), np.flatnonzero(truth == c)
            shares = rng.dirichlet([self.alpha] * len(holders))
            owner[samples] = rng.choice(holders, size=len(samples), p=shares)
        return torch.from_numpy(owner)


class Shards(Partition):
    """Samples sorted by class are cut into equal shards, of which each client gets a few.

    Args:
        shards_per_client: Shards of each client: about as many classes as it sees.

    Raises:
        ConfigError: Fewer than one shard.

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
        self, labels: Tensor, clients: int, num_classes: int, generator: torch.Generator
    ) -> Tensor:
        """See :meth:`Partition.assign`."""
        shards = clients * self.shards_per_client
        shuffled = torch.randperm(len(labels), generator=generator)
        order = shuffled[labels[shuffled].argsort(stable=True)]
        shard = torch.arange(len(labels)) * shards // len(labels)
        client_of_shard = torch.randperm(shards, generator=generator) % clients
        owner = torch.empty_like(labels)
        owner[order] = client_of_shard[shard]
        return owner
