"""Random numbers as hashes of whole numbers, without a generator's state.

Axes: I draws.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["draw_below", "hash_integers"]

Ints = npt.NDArray[np.int64]
_Bits = npt.NDArray[np.uint64]


def _mix_bits(z: _Bits) -> _Bits:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def hash_integers(*parts: int | npt.NDArray[Any]) -> _Bits:
    """Hash each combination of whole numbers to 64 random bits.

    Args:
        parts: Scalars or arrays, all 0 or more. Shape of each: one that broadcasts to (I,).

    Returns:
        Shape: (I,), at least one axis, uint64.

    Example:
        >>> a, b = hash_integers(0, np.arange(3)), hash_integers(1, np.arange(3))
        >>> a.shape, bool((a == hash_integers(0, np.arange(3))).all()), bool((a == b).any())
        ((3,), True, False)

    Source: SplitMix64, doi 10.1145/2660193.2660195, chained over the parts.
    """
    state = np.zeros(1, np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        for part in parts:
            word = np.atleast_1d(np.asarray(part)).astype(np.uint64)
            state = _mix_bits((state ^ word) + np.uint64(0x9E3779B97F4A7C15))
    return state


def draw_below(bound: int, *parts: int | npt.NDArray[Any]) -> Ints:
    """Draw a whole number in [0, bound) for each combination; see :func:`hash_integers`.

    Example:
        >>> bool((np.bincount(draw_below(2, 7, np.arange(10_000))) > 4_800).all())
        True

    Source: inferred; the bias is below bound / 2**64.
    """
    return (hash_integers(*parts) % np.uint64(bound)).astype(np.int64)
