"""Samplers that count every sample once under several ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch.utils.data import DistributedSampler

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = [
    "EveryRankSampler",
    "UnrepeatedDistributedSampler",
    "rank_and_world",
    "sampler_ranks",
]


def rank_and_world() -> tuple[int, int]:
    """The rank of this process and the number of ranks; ``(0, 1)`` without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def sampler_ranks(trainer: Trainer | None) -> tuple[int, int]:
    """Rank and number of ranks as data are dealt out: what the strategy says, if there is one.

    Strategies whose ranks work on one batch together give every rank the data of rank 0 of 1.
    """
    wanted = trainer.distributed_sampler_kwargs if trainer is not None else None
    return (wanted["rank"], wanted["num_replicas"]) if wanted else rank_and_world()


class UnrepeatedDistributedSampler(DistributedSampler[int]):
    """Deals ``0 … length-1`` out to the ranks in turn, without padding.

    torch's own sampler repeats samples until every rank has equally many, which counts some of
    them twice in an evaluation (torch issue 25162). Lightning leaves a ``DistributedSampler``
    in place, so it is used exactly as written.

    Args:
        length: Number of items to deal out, or anything with a length.
        ranks: Rank and number of ranks; those of the process group by default.

    Example:
        >>> list(UnrepeatedDistributedSampler(3))
        [0, 1, 2]
    """

    def __init__(self, length: int | Sized, ranks: tuple[int, int] | None = None) -> None:
        self.length = length if isinstance(length, int) else len(length)
        self.rank, self.num_replicas = ranks or rank_and_world()
        self.shuffle = False
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self.length, self.num_replicas))

    def __len__(self) -> int:
        return len(range(self.rank, self.length, self.num_replicas))


class EveryRankSampler(UnrepeatedDistributedSampler):
    """Gives every rank all of ``0 … length-1``: equal counts, so that no rank waits for another."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.length))

    def __len__(self) -> int:
        return self.length
