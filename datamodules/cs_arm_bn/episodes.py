"""Episodes: queries and controls of one plate, as one batch.

Shapes: D plates, L queries, N controls, C channels, H W image, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler

from fulgurite.datamodules.cs_arm_bn.draws import sample_rows
from fulgurite.datamodules.cs_arm_bn.options import EpisodeOptions
from fulgurite.datamodules.cs_arm_bn.pixels import ImageCrops
from fulgurite.datamodules.cs_arm_bn.table import Rows
from fulgurite.domains.cs_arm_bn import MIXED, PlateBatch
from fulgurite.errors import ConfigError
from fulgurite.sampling import UnrepeatedDistributedSampler

__all__ = [
    "BatchRows",
    "EpisodeSampler",
    "EvaluationEpisodes",
    "PlateSampler",
    "TrainingEpisodes",
]

#: Episode ``e`` of epoch ``k`` is item ``k * EPOCH + e``: the index carries the epoch to workers,
#: other ranks and restarted runs.
EPOCH = 1 << 32


@dataclass(frozen=True)
class BatchRows:
    """Rows of one batch.

    Attributes:
        domain: Index of the queries' plate; -1 for queries of several.
        queries: Rows of the queries.
        counted: Mask of the queries that count.
        controls: Rows of the controls, possibly of another plate.
    """

    domain: int
    queries: Rows
    counted: NDArray[np.bool_]
    controls: Rows


class _Episodes(Dataset[PlateBatch]):
    """Base of both kinds of episodes: makes the batch of a model from rows."""

    crops: ImageCrops

    def _make_batch(
        self, rows: BatchRows, generator: np.random.Generator | None = None
    ) -> PlateBatch:
        table, queries, controls = self.crops.images.table, rows.queries, rows.controls
        images = self.crops.read(np.concatenate([queries, controls]), generator)
        if images.is_floating_point():  # else a trainer of half precision would round them
            images = images.view(torch.int32)
        return PlateBatch(
            images=images,
            n_query=len(queries),
            domain=rows.domain,
            label=torch.from_numpy(table.label[queries]),
            well=torch.from_numpy(table.well[queries]),
            counted=torch.from_numpy(np.ascontiguousarray(rows.counted)),
            row=torch.from_numpy(queries.astype(np.int64)),
            query_domain=torch.from_numpy(table.domain[queries]),
            control_row=torch.from_numpy(controls.astype(np.int64)),
            control_domain=torch.from_numpy(table.domain[controls]),
        )


class TrainingEpisodes(_Episodes):
    """Random episodes: item ``k * EPOCH + e`` is episode e of epoch k, the same on every machine.

    Args:
        crops: Reads the images of rows.
        queries: Rows of the training queries.
        options: Sizes of the episodes. Mixed ones have queries of all plates, no controls, and
            :data:`~fulgurite.domains.cs_arm_bn.MIXED` as plate.
        seed: Seed of the random numbers.

    Raises:
        ConfigError: There are fewer training plates than are to be mixed in a batch.

    Source: docs/papers/cs_arm_bn.md sections 1.3 and 7.2.
    """

    def __init__(
        self, crops: ImageCrops, queries: Rows, options: EpisodeOptions, seed: int
    ) -> None:
        self.crops = crops
        self.options = options
        self.length = options.steps_per_epoch or max(1, len(queries) // options.queries)
        self.seed = seed
        table = crops.images.table
        self.queries = queries
        self.plates = [int(d) for d in np.unique(table.domain[queries])]
        self.by_plate = {d: queries[table.domain[queries] == d] for d in self.plates}
        self.controls = {d: table.rows_of(d, control=True) for d in self.plates}
        if options.plates is not None and options.plates > len(self.plates):
            raise ConfigError(
                f"A batch is to have queries of {options.plates} plates, and there are "
                f"{len(self.plates)} training plates.",
                f"Set `--data.init_args.episodes.plates` to {len(self.plates)} or less.",
            )

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> PlateBatch:
        generator = np.random.default_rng((self.seed, 1, *divmod(int(number), EPOCH)))
        counted = np.ones(self.options.queries, np.bool_)
        if self.options.mixed:
            queries = self._mixed_queries(generator)
            rows = BatchRows(MIXED, queries, counted, self.queries[:0])
            return self._make_batch(rows, generator)
        domain = self.plates[int(generator.integers(len(self.plates)))]
        queries = sample_rows(self.by_plate[domain], self.options.queries, generator)
        controls = self.controls[domain][:0]
        if self.options.controls:
            controls = sample_rows(self.controls[domain], self.options.controls, generator)
        return self._make_batch(BatchRows(domain, queries, counted, controls), generator)

    def _mixed_queries(self, generator: np.random.Generator) -> Rows:
        """Draw rows of all plates, or equally many of each of a few plates."""
        if self.options.plates is None:
            return sample_rows(self.queries, self.options.queries, generator)
        plates = generator.choice(self.plates, self.options.plates, replace=False)
        per_plate, remainder = divmod(self.options.queries, self.options.plates)
        return np.concatenate(
            [
                sample_rows(self.by_plate[int(d)], per_plate + (i < remainder), generator)
                for i, d in enumerate(plates)
            ]
        )


class EvaluationEpisodes(_Episodes):
    """Fixed episodes: one for each evaluation batch, in the order of the plates.

    Args:
        crops: Reads the images of rows; augmentation is switched off.
        batches: Rows of the evaluation batches.
    """

    def __init__(self, crops: ImageCrops, batches: Sequence[BatchRows]) -> None:
        self.crops = replace(crops, augment=False)
        self.batches = list(batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> PlateBatch:
        return self._make_batch(self.batches[number])


class EpisodeSampler(Sampler[int]):
    """Numbers the episodes of the current epoch.

    Lightning calls :meth:`set_epoch` and shards the numbers over ranks with its own
    ``DistributedSampler``. After a restart it makes the first iterator before it calls
    :meth:`set_epoch`, and does not skip the finished episodes of the interrupted epoch, so both
    are arguments here.

    Args:
        length: Number of episodes in an epoch.
        epoch: Index of the first epoch.
        done: Number of episodes of that epoch finished before a restart; they come last, after the
            remaining ones.

    Example:
        >>> sampler = EpisodeSampler(3, epoch=1, done=1)
        >>> [number - EPOCH for number in sampler]
        [1, 2, 0]
        >>> sampler.set_epoch(2)
        >>> [number - 2 * EPOCH for number in sampler]
        [0, 1, 2]
    """

    def __init__(self, length: int | Sized, epoch: int = 0, done: int = 0) -> None:
        self.length = length if isinstance(length, int) else len(length)
        self.epoch = epoch
        self.done = done

    def set_epoch(self, epoch: int) -> None:
        """Set the next epoch."""
        if epoch != self.epoch:
            self.epoch, self.done = epoch, 0

    def __iter__(self) -> Iterator[int]:
        order = range(self.done, self.done + self.length)
        return iter([self.epoch * EPOCH + number % self.length for number in order])

    def __len__(self) -> int:
        return self.length


class PlateSampler(UnrepeatedDistributedSampler):
    """Assigns whole plates to ranks, since only the first batch of a plate has its controls.

    Args:
        episodes: Evaluation episodes, in the order of the plates.
        ranks: Rank and number of ranks.
    """

    def __init__(self, episodes: EvaluationEpisodes, ranks: tuple[int, int] | None = None) -> None:
        super().__init__(episodes, ranks)
        plates = [part.domain for part in episodes.batches]
        turn = {domain: i for i, domain in enumerate(dict.fromkeys(plates))}
        self.numbers = [i for i, d in enumerate(plates) if turn[d] % self.num_replicas == self.rank]

    def __iter__(self) -> Iterator[int]:
        return iter(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)
