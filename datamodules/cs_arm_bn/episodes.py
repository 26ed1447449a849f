"""Episodes: queries and controls of one plate, as one batch.

Shapes: D plates, L queries, N controls, C channels, H W image, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from fulgurite.datamodules.cs_arm_bn.images import PlateImages
from fulgurite.datamodules.cs_arm_bn.table import Rows
from fulgurite.errors import ConfigError
from fulgurite.sampling import UnrepeatedDistributedSampler

__all__ = [
    "EpisodeSampler",
    "EvaluationBatch",
    "EvaluationEpisodes",
    "ImageTransform",
    "PlateSampler",
    "TrainingEpisodes",
    "draw_shifted_batches",
    "mislabel",
    "pair_wrong_plates",
    "sample_rows",
    "split_into_batches",
]

#: Episode ``e`` of epoch ``k`` is item ``k * EPOCH + e``: the index carries the epoch to workers,
#: other ranks and restarted runs.
EPOCH = 1 << 32


def sample_rows(rows: Rows, count: int, generator: np.random.Generator) -> Rows:
    """Sample ``count`` rows, with replacement only if there are fewer rows.

    Source: arXiv 2604.20824, card section 1.3.

    Example:
        >>> sorted(sample_rows(np.array([3, 5]), 2, np.random.default_rng(0)).tolist())
        [3, 5]
        >>> len(sample_rows(np.array([3, 5]), 7, np.random.default_rng(0)))
        7
    """
    sample: Rows = generator.choice(rows, count, replace=count > len(rows))
    return sample


def split_into_batches(
    rows: Rows, size: int, generator: np.random.Generator
) -> list[tuple[Rows, Any]]:
    """Split a random order of the rows into batches of one size.

    The last batch is padded with rows of the first, which do not count. Fewer rows than ``size``
    are one smaller batch.

    Returns:
        Pairs of rows and a mask of the rows that count.

    Source: arXiv 2604.20824, card sections 1.3 (validation) and 7.7.

    Example:
        >>> batches = split_into_batches(np.arange(3), 2, np.random.default_rng(0))
        >>> [(len(rows), counted.tolist()) for rows, counted in batches]
        [(2, [True, True]), (2, [True, False])]
    """
    if not len(rows):
        return []
    order = generator.permutation(rows)
    size = min(size, len(order))
    count = -(-len(order) // size)
    position = np.arange(count * size)
    counted = position < len(order)
    filled = order[position % len(order)]
    return [(filled[i : i + size], counted[i : i + size]) for i in range(0, len(position), size)]


def draw_shifted_batches(
    labels: NDArray[np.int64], size: int, alpha: float, generator: np.random.Generator
) -> list[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
    """Draw batches of one size and of unbalanced classes from the samples of one plate.

    Class probabilities are drawn from Dirichlet(α), and as many batches as there are classes take
    them rotated through the classes, so that the plate contributes each class equally often. There
    are as many such rounds as the largest class needs. Where a class has fewer samples than its
    batches need, samples are repeated, with frequencies that differ by at most one. Each sample
    counts once: in one of its draws, chosen at random.

    Args:
        labels: Class of each sample. Shape: (n,).
        size: Number L of samples in a batch.
        alpha: Concentration; with small values a batch has one class.
        generator: Generator of the random numbers.

    Returns:
        Indices into ``labels`` and the mask of those that count, for each batch.
        Shapes: (L,), (L,).

    Source: arXiv 2604.20824, card section 2.4 (label shift); drawing again, and that each sample
    counts once, are inferred.

    Example:
        >>> labels = np.repeat([0, 1], 3)
        >>> batches = draw_shifted_batches(labels, 4, 0.01, np.random.default_rng(0))
        >>> [labels[rows].tolist() for rows, _ in batches]
        [[1, 1, 1, 1], [0, 0, 0, 0]]
        >>> sorted(int(row) for rows, counts in batches for row in rows[counts])
        [0, 1, 2, 3, 4, 5]
    """
    pools = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    if not pools:
        return []
    classes = len(pools)
    rounds = -(-max(len(pool) for pool in pools) // size)
    draws = [_draw_with_marks(pool, rounds * size, generator) for pool in pools]
    taken = [0] * classes
    batches = []
    for _ in range(rounds):
        gammas = generator.gamma(alpha, size=classes)
        if gammas.sum() <= 0:  # all underflow at tiny α, where one class has nearly everything
            gammas = np.eye(classes)[generator.integers(classes)]
        counts = generator.multinomial(size, gammas / gammas.sum())
        for turn in range(classes):
            parts = []
            for c in range(classes):
                count = int(counts[(c + turn) % classes])
                parts.append([column[taken[c] : taken[c] + count] for column in draws[c]])
                taken[c] += count
            rows, counted = (np.concatenate(columns) for columns in zip(*parts, strict=True))
            batches.append((rows, counted.astype(np.bool_)))
    return batches


def _draw_with_marks(
    pool: NDArray[np.int64], count: int, generator: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw whole permutations of a pool, and mark one draw of each item.

    Shape:
        - (count,) int64 items, (count,) int64 that are 1 for the draw that counts.
    """
    turns = -(-count // len(pool))
    order = np.concatenate([generator.permutation(pool) for _ in range(turns)])[:count]
    shuffled = generator.permutation(count)
    first = np.unique(order[shuffled], return_index=True)[1]
    counted = np.zeros(count, np.int64)
    counted[shuffled[first]] = 1
    return order, counted


def pair_wrong_plates(domains: Sequence[int], batches: Sequence[str]) -> dict[int, int]:
    """Pair each plate with another plate, of another batch if possible.

    Args:
        domains: Indices of plates.
        batches: Batch of each plate.

    Source: arXiv 2604.20824, card section 6.4 (7).

    Example:
        >>> pair_wrong_plates([0, 1, 2, 3], ["a", "a", "b", "b"])
        {0: 2, 1: 3, 2: 0, 3: 1}
    """
    order = sorted(range(len(domains)), key=lambda i: (batches[i], domains[i]))
    shift = len(order) // 2
    return {
        int(domains[i]): int(domains[order[(position + shift) % len(order)]])
        for position, i in enumerate(order)
    }


def mislabel(
    controls: Rows, queries: Rows, fraction: float, generator: np.random.Generator
) -> Rows:
    """Replace a fraction of the controls by queries, to simulate mislabelled control wells.

    Source: arXiv 2604.20824, card section 6.3 (corrupted controls).

    Example:
        >>> mixed = mislabel(np.zeros(4, int), np.array([7]), 0.5, np.random.default_rng(0))
        >>> sorted(mixed.tolist())
        [0, 0, 7, 7]
    """
    count = round(fraction * len(controls))
    if not count or not len(queries):
        return controls
    changed = controls.copy()
    changed[generator.permutation(len(controls))[:count]] = sample_rows(queries, count, generator)
    return changed


@dataclass(frozen=True)
class ImageTransform:
    """Transform of stored images to network inputs.

    Attributes:
        images: Store of the images.
        size: Side of the crop [pixels]; ``None`` for no crop.
        augment: Whether to crop and mirror at random in training; else the crop is central.
        mean: Mean of each channel, in stored units. Shape: (C,), or (D, C) by plate.
        std: Standard deviation of each channel, in stored units; ``None`` standardises each image
            by its own statistics. Shape: (C,), or (D, C) by plate.
    """

    images: PlateImages
    size: int | None
    augment: bool
    mean: Tensor | None
    std: Tensor | None

    def __call__(self, rows: Rows, generator: np.random.Generator | None) -> Tensor:
        """Return images; without a generator they are neither cropped at random nor mirrored.

        Shape:
            - (len(rows), C, H, W) float32.
        """
        random = generator if self.augment else None
        # drawn at once, so that the random numbers do not depend on how images are read
        uniform = random.random((len(rows), 4)) if random is not None else None
        views = [
            self._crop_flip(self.images[int(row)], None if uniform is None else uniform[i])
            for i, row in enumerate(rows)
        ]
        if not views:
            channels, size = len(self.images.table.channels), self.size or 1
            return torch.zeros(0, channels, size, size)
        if views[0].dtype == np.uint16:  # torch has no arithmetic on uint16
            pixels = torch.from_numpy(np.stack(views).astype(np.float32))
        else:
            pixels = torch.from_numpy(np.stack(views)).to(torch.float32)
        if self.mean is None or self.std is None:
            std, mean = torch.std_mean(pixels, (2, 3), correction=0, keepdim=True)
            return (pixels - mean) / std.clamp_min(1e-6)
        if self.mean.ndim == 2:
            domain = torch.from_numpy(self.images.table.domain[rows])
            mean, std = self.mean[domain], self.std[domain]
            return pixels.sub_(mean[:, :, None, None]).div_(std[:, :, None, None])
        return pixels.sub_(self.mean[:, None, None]).div_(self.std[:, None, None])

    def _crop_flip(self, image: NDArray[Any], uniform: NDArray[Any] | None) -> NDArray[Any]:
        height, width = image.shape[-2:]
        if self.size is not None and (self.size, self.size) != (height, width):
            down, right = height - self.size, width - self.size
            if uniform is None:
                first_row, first_column = down // 2, right // 2
            else:
                first_row, first_column = (
                    int(uniform[0] * (down + 1)),
                    int(uniform[1] * (right + 1)),
                )
            image = image[
                :, first_row : first_row + self.size, first_column : first_column + self.size
            ]
        if uniform is not None:
            if uniform[2] < 0.5:
                image = image[:, ::-1]
            if uniform[3] < 0.5:
                image = image[:, :, ::-1]
        return image


@dataclass(frozen=True)
class EvaluationBatch:
    """Rows of one evaluation batch.

    Attributes:
        domain: Index of the queries' plate.
        queries: Rows of the queries.
        counted: Mask of the queries that count.
        controls: Rows of the controls, possibly of another plate.
    """

    domain: int
    queries: Rows
    counted: NDArray[np.bool_]
    controls: Rows


class _Episodes(Dataset[dict[str, Tensor]]):
    """Base of both kinds of episodes: makes the batch dictionary of a model from rows."""

    transform: ImageTransform

    def _make_batch(
        self,
        domain: int,
        queries: Rows,
        counted: NDArray[np.bool_],
        controls: Rows,
        generator: np.random.Generator | None = None,
    ) -> dict[str, Tensor]:
        table = self.transform.images.table
        query = self.transform(queries, generator)
        control = self.transform(controls, generator)
        if not len(controls):
            control = query.new_zeros(0, *query.shape[1:])
        if not len(queries):
            query = control.new_zeros(0, *control.shape[1:])
        return {
            "query": query,
            "control": control,
            "label": torch.from_numpy(table.label[queries]),
            "index": torch.from_numpy(queries.astype(np.int64)),
            "control_index": torch.from_numpy(controls.astype(np.int64)),
            "domain": torch.tensor(domain),
            "control_domain": torch.from_numpy(table.domain[controls]),
            "query_domain": torch.from_numpy(table.domain[queries]),
            "well": torch.from_numpy(table.well[queries]),
            "kept": torch.from_numpy(np.ascontiguousarray(counted)),
        }


class TrainingEpisodes(_Episodes):
    """Random episodes: item ``k * EPOCH + e`` is episode e of epoch k, the same on every machine.

    Args:
        transform: Makes network inputs from rows.
        queries: Rows of the training queries.
        num_queries: Number L of queries in an episode.
        num_controls: Number N of controls in an episode.
        length: Number of episodes in an epoch.
        seed: Seed of the random numbers.
        mixed: Draw the queries from all plates and no controls, with -1 as domain: ordinary
            mini-batches, for ERM.
        num_plates: Number of plates in a mixed batch, with equally many queries of each (as far as
            they divide); by default queries are drawn from all plates.

    Raises:
        ConfigError: There are fewer training plates than ``num_plates``.

    Source: arXiv 2604.20824, card sections 1.3 and 7.2.
    """

    def __init__(
        self,
        transform: ImageTransform,
        queries: Rows,
        num_queries: int,
        num_controls: int,
        length: int,
        seed: int,
        mixed: bool = False,
        num_plates: int | None = None,
    ) -> None:
        self.transform = transform
        self.num_plates = num_plates
        self.num_queries = num_queries
        self.num_controls = num_controls
        self.length = length
        self.seed = seed
        self.mixed = mixed
        table = transform.images.table
        self.queries = queries
        self.plates = [int(d) for d in np.unique(table.domain[queries])]
        self.by_plate = {d: queries[table.domain[queries] == d] for d in self.plates}
        self.controls = {d: table.rows_of(d, control=True) for d in self.plates}
        if num_plates is not None and num_plates > len(self.plates):
            raise ConfigError(
                f"A batch is to have queries of {num_plates} plates, and there are "
                f"{len(self.plates)} training plates.",
                f"Set `--data.init_args.plates` to {len(self.plates)} or less.",
            )

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        generator = np.random.default_rng((self.seed, 1, *divmod(int(number), EPOCH)))
        counted = np.ones(self.num_queries, np.bool_)
        if self.mixed:
            queries = self._mixed_queries(generator)
            return self._make_batch(-1, queries, counted, self.queries[:0], generator)
        domain = self.plates[int(generator.integers(len(self.plates)))]
        queries = sample_rows(self.by_plate[domain], self.num_queries, generator)
        controls = self.controls[domain][:0]
        if self.num_controls:
            controls = sample_rows(self.controls[domain], self.num_controls, generator)
        return self._make_batch(domain, queries, counted, controls, generator)

    def _mixed_queries(self, generator: np.random.Generator) -> Rows:
        """Draw rows of all plates, or equally many of each of a few plates."""
        if self.num_plates is None:
            return sample_rows(self.queries, self.num_queries, generator)
        plates = generator.choice(self.plates, self.num_plates, replace=False)
        per_plate, remainder = divmod(self.num_queries, self.num_plates)
        return np.concatenate(
            [
                sample_rows(self.by_plate[int(d)], per_plate + (i < remainder), generator)
                for i, d in enumerate(plates)
            ]
        )


class EvaluationEpisodes(_Episodes):
    """Fixed episodes: one for each evaluation batch, in the order of the plates.

    Args:
        transform: Makes network inputs from rows; augmentation is switched off.
        batches: Rows of the evaluation batches.
    """

    def __init__(self, transform: ImageTransform, batches: Sequence[EvaluationBatch]) -> None:
        self.transform = replace(transform, augment=False)
        self.batches = list(batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        part = self.batches[number]
        return self._make_batch(part.domain, part.queries, part.counted, part.controls)


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
