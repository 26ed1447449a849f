"""Random choices of rows: batches of queries, label shift, and probes of the controls.

Shapes: L queries, N controls, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fulgurite.arithmetic import ceil_div
from fulgurite.datamodules.cs_arm_bn.table import Rows

__all__ = [
    "draw_shifted_batches",
    "mislabel",
    "pair_wrong_plates",
    "sample_rows",
    "split_into_batches",
]


def sample_rows(rows: Rows, count: int, generator: np.random.Generator) -> Rows:
    """Sample ``count`` rows, with replacement only if there are fewer rows.

    Source: docs/papers/cs_arm_bn.md section 1.3.

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

    Source: docs/papers/cs_arm_bn.md sections 1.3 (validation) and 7.7.

    Example:
        >>> batches = split_into_batches(np.arange(3), 2, np.random.default_rng(0))
        >>> [(len(rows), counted.tolist()) for rows, counted in batches]
        [(2, [True, True]), (2, [True, False])]
    """
    if not len(rows):
        return []
    order = generator.permutation(rows)
    size = min(size, len(order))
    count = ceil_div(len(order), size)
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

    Source: docs/papers/cs_arm_bn.md section 2.4 (label shift); drawing again, and that each sample
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
    rounds = ceil_div(max(len(pool) for pool in pools), size)
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
    turns = ceil_div(count, len(pool))
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

    Source: docs/papers/cs_arm_bn.md section 6.4 (7).

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

    Source: docs/papers/cs_arm_bn.md section 6.3 (corrupted controls).

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
