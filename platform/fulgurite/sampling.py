"""Samplers that count every sample once under several ranks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sized
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.utils.data import DistributedSampler

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = [
    "ContinuedSampler",
    "DrawSampler",
    "EveryRankSampler",
    "UnrepeatedDistributedSampler",
    "forget_training_data",
    "list_generators",
    "rank_and_world",
    "restart_training_data",
    "sampler_ranks",
    "training_progress",
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
    options = trainer.distributed_sampler_kwargs if trainer is not None else None
    return (options["rank"], options["num_replicas"]) if options else rank_and_world()


def training_progress(trainer: Trainer | None) -> tuple[int, int]:
    """The epoch of training that comes next, and how many of its batches each rank has done.

    After a restart Lightning makes the first iterator before it calls ``set_epoch``, and skips
    nothing of what an interrupted epoch had done; a sampler that starts there goes on instead.

    Args:
        trainer: Trainer of the DataModule; None gives ``(0, 0)``.
    """
    if trainer is None:
        return 0, 0
    loop = trainer.fit_loop
    epoch: Any = loop.epoch_progress.current
    batches: Any = loop.epoch_loop.batch_progress
    if epoch.started <= epoch.processed:
        return epoch.processed, 0
    if batches.is_last_batch:  # only the end of the epoch is left
        return epoch.processed + 1, 0
    if batches.current.processed:  # Lightning knows only loaders with a state of their own
        warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")
    return epoch.processed, batches.current.processed


def forget_training_data(trainer: Trainer) -> None:
    """Let a trainer make its loader of training batches anew.

    A model that asks for ``estimated_stepping_batches`` has it made before the progress of a
    checkpoint is restored. Call this between both (``on_fit_start``).
    """
    loop: Any = trainer.fit_loop
    if loop._combined_loader is not None:
        loop._data_fetcher.teardown()
        loop._data_fetcher = loop._combined_loader = None


def restart_training_data(trainer: Trainer) -> None:
    """Begin the first epoch after a restart as every other one begins.

    Lightning calls ``set_epoch`` only after it has made the first iterator, whose workers have
    read the samples of epoch 0 by then. Call this in ``on_train_start``.
    """
    from lightning.fabric.utilities.data import _set_sampler_epoch

    loop: Any = trainer.fit_loop
    if loop._combined_loader is None or loop._data_fetcher is None:
        return
    for loader in loop._combined_loader.flattened:
        _set_sampler_epoch(loader, loop.epoch_progress.current.processed)
    iter(loop._data_fetcher)


def list_generators(trainer: Trainer) -> list[torch.Generator]:
    """The random number generators that loaders of training batches and their samplers have."""
    loaders = trainer.fit_loop._combined_loader
    generators: dict[int, torch.Generator] = {}
    for loader in loaders.flattened if loaders is not None else ():
        batch_sampler = getattr(loader, "batch_sampler", None)
        parts = (loader, getattr(loader, "sampler", None), batch_sampler)
        for part in (*parts, getattr(batch_sampler, "sampler", None)):
            generator = getattr(part, "generator", None)
            if isinstance(generator, torch.Generator):
                generators[id(generator)] = generator
    return list(generators.values())


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


class DrawSampler(UnrepeatedDistributedSampler):
    """Numbers draws through all epochs and ranks, so that none comes twice.

    Lightning calls :meth:`set_epoch` and leaves this sampler in place.

    Args:
        draws: Draws of one epoch on one rank.
        ranks: Rank and number of ranks; those of the process group by default.

    Example:
        >>> sampler = DrawSampler(3)
        >>> sampler.set_epoch(2)
        >>> list(sampler)
        [6, 7, 8]
    """

    def __init__(self, draws: int, ranks: tuple[int, int] | None = None) -> None:
        super().__init__(draws, ranks)
        self.draws = draws

    def __iter__(self) -> Iterator[int]:
        size = self.draws * self.num_replicas
        first = self.epoch * size + self.rank
        return iter(range(first, first + size, self.num_replicas))

    def __len__(self) -> int:
        return self.draws


class EveryRankSampler(UnrepeatedDistributedSampler):
    """Gives every rank all of ``0 … length-1``: equal counts, so that no rank waits for another."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.length))

    def __len__(self) -> int:
        return self.length


class ContinuedSampler(UnrepeatedDistributedSampler):
    """Another sampler, which after a restart goes on where the interrupted epoch was.

    Args:
        sampler: Has a ``set_epoch``; gives the items of one rank.
        trainer: Knows how far training is.
        batch_size: Items of a batch.

    Example:
        >>> sampler = ContinuedSampler(UnrepeatedDistributedSampler(5), None, 2)
        >>> list(sampler)
        [0, 1, 2, 3, 4]
        >>> sampler.done = 2
        >>> list(sampler)  # what was done comes last, after the number of batches that is left
        [2, 3, 4, 0, 1]
    """

    def __init__(
        self, sampler: DistributedSampler[int], trainer: Trainer | None, batch_size: int
    ) -> None:
        super().__init__(len(sampler), (sampler.rank, sampler.num_replicas))
        self.sampler, self.trainer, self.batch_size = sampler, trainer, batch_size
        self.done = 0
        self._epoch: int | None = None  # as Lightning says; before it does, the trainer knows

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        # progress is read here: a loader may be made before a checkpoint is restored
        epoch, batches = training_progress(self.trainer)
        if self._epoch not in (None, epoch):
            epoch, batches = int(self._epoch or 0), 0
        self.sampler.set_epoch(epoch)
        done = self.done + batches * self.batch_size
        numbers = list(self.sampler)
        return iter(numbers[done:] + numbers[:done])

    def __len__(self) -> int:
        return self.length
