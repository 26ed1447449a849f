"""Further missing boundaries at test time: nested, structured, seeded.

Shapes: N traces, L layers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["drop_picks"]


def drop_picks(
    picked: NDArray[np.bool_], fraction: float, generator: np.random.Generator
) -> NDArray[np.bool_]:
    """Choose picks to be dropped: runs of traces of a boundary, and whole boundaries.

    The same generator's state gives nested choices: what is dropped at 10 % is dropped at 30 %.

    Args:
        picked: Whether the lower boundary of each layer is picked.
        fraction: Fraction of these picks to drop; rounded to whole picks.
        generator: Generator of the runs.

    Shape:
        - (N, L) bool, in and out.

    Source: docs/papers/ice_layers.md section 6, check 18, and 1.5 for the form of gaps.

    Example:
        >>> picked = np.ones((16, 4), bool)
        >>> few, many = (drop_picks(picked, f, np.random.default_rng(0)) for f in (0.25, 0.5))
        >>> int(few.sum()), int(many.sum()), bool((few & ~many).any())
        (16, 32, False)
    """
    n, layers = picked.shape
    rank = np.full(picked.shape, np.inf)  # when an entry is dropped
    event = 0
    rows = np.arange(n)
    while np.isinf(rank[picked]).any() and event < 64 * layers:
        layer, is_whole = int(generator.integers(layers)), generator.random() < 0.15
        length = int(generator.integers(max(1, n // 8), max(2, n // 2 + 1)))
        first = int(generator.integers(n))
        run = rows if is_whole else (first + np.arange(length)) % n
        late = event + np.arange(len(run)) / (len(run) + 1)
        rank[run, layer] = np.minimum(rank[run, layer], late)
        event += 1
    order = np.argsort(np.where(picked, rank, np.inf), axis=None, kind="stable")
    dropped = np.zeros(picked.size, np.bool_)
    dropped[order[: round(fraction * int(picked.sum()))]] = True
    return dropped.reshape(picked.shape)
