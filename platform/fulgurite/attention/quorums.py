"""Cyclic quorum sets: which chunks of a sequence meet in which task.

A sequence is cut into c chunks. A quorum I ⊂ Z_c gives task i the chunks ``i + I mod c``. If every
difference d mod c is one of two elements of I, every ordered pair of chunks meets in some task, and
a rule of ownership makes it exactly one.

Axes: c chunks and tasks, l chunks of a task.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from fulgurite.arithmetic import ceil_div
from fulgurite.errors import ConfigError

__all__ = [
    "check_quorum",
    "is_perfect",
    "owned_differences",
    "perfect_sizes",
    "quorum",
    "task_chunks",
    "task_pairs",
]

_Vector = NDArray[np.int64]


def quorum(chunks: int) -> tuple[int, ...]:
    """Return a quorum of Z_c that starts at 0.

    It is perfect (every difference occurs once, l ≈ √c) where c = q² + q + 1 with a prime power q,
    by Singer's theorem; elsewhere a cover from Wichmann's sparse rulers, l ≈ 1.22 √c.

    Args:
        chunks: c, at least 1.

    Returns:
        l increasing residues.

    Raises:
        ConfigError: c is not positive.

    Example:
        >>> quorum(7), quorum(13), quorum(8)
        ((0, 1, 3), (0, 1, 3, 9), (0, 1, 4, 6))

    Source: Stream-CQSA, arXiv 2604.20819 (quorums); Singer 1938; the covers: inferred.
    """
    if chunks < 1:
        raise ConfigError(
            f"A sequence cannot be cut into {chunks} chunks.", "Give a positive number of chunks."
        )
    return _quorum(chunks)


@cache
def _quorum(chunks: int) -> tuple[int, ...]:
    order = _plane_order(chunks)
    elements = _singer(order) if order else _cover(chunks)
    check_quorum(chunks, elements)
    return elements


def is_perfect(chunks: int, elements: Sequence[int]) -> bool:
    """Whether every nonzero difference occurs exactly once: c = l² − l + 1 and a cover.

    Example:
        >>> is_perfect(7, (0, 1, 3)), is_perfect(8, (0, 1, 4, 6))
        (True, False)
    """
    size = len(elements)
    return chunks == size * size - size + 1 and not _missing(chunks, elements)


def check_quorum(chunks: int, elements: Sequence[int]) -> None:
    """Check that a set is a quorum: distinct residues with 0, whose differences are all of Z_c.

    Raises:
        ConfigError: The set lacks 0, repeats a residue, or lacks a difference.

    Example:
        >>> check_quorum(7, (0, 1, 3))
    """
    if 0 not in elements or len({a % chunks for a in elements}) != len(elements):
        raise ConfigError(
            f"The set {tuple(elements)} does not have 0 or repeats a residue mod {chunks}.",
            "Give distinct residues, 0 among them.",
        )
    if missing := _missing(chunks, elements):
        raise ConfigError(
            f"The set {tuple(elements)} has no difference {missing[0]} mod {chunks}, so "
            "chunks that far apart would never meet.",
            "Take the set that `fulgurite.attention.quorum` gives.",
        )


def _missing(chunks: int, elements: Sequence[int]) -> list[int]:
    differences = {(a - b) % chunks for a in elements for b in elements}
    return [d for d in range(chunks) if d not in differences]


def task_chunks(chunks: int, task: int, elements: Sequence[int] | None = None) -> list[int]:
    """Return the chunks that a task loads, in ascending order.

    Example:
        >>> task_chunks(7, 5)
        [1, 5, 6]

    Source: docs/papers/stream_cqsa.md section 1.1, S_i; the order: 1.5.
    """
    elements = quorum(chunks) if elements is None else elements
    return sorted((task + a) % chunks for a in elements)


def owned_differences(
    chunks: int, elements: Sequence[int] | None = None
) -> dict[int, tuple[int, int]]:
    """Return for each difference d the pair (a, b) of the quorum with a − b = d that computes it.

    Task i computes queries of chunk i + a against keys of chunk i + b. In a perfect quorum there
    is no choice; elsewhere the first pair in lexicographic order is taken, and the diagonal
    d = 0 belongs to (0, 0).

    Returns:
        c entries, d -> (a, b).

    Example:
        >>> owned_differences(3)
        {0: (0, 0), 2: (0, 1), 1: (1, 0)}

    Source: docs/papers/stream_cqsa.md section 1.1 (owner of the diagonal); 1.3, the rule for
    covers: inferred.
    """
    elements = quorum(chunks) if elements is None else elements
    owned: dict[int, tuple[int, int]] = {}
    for a in elements:
        for b in elements:
            owned.setdefault((a - b) % chunks, (a, b))
    return owned


def task_pairs(
    chunks: int, task: int, elements: Sequence[int] | None = None, is_causal: bool = False
) -> list[tuple[int, int]]:
    """Return the (query chunk, key chunk) pairs that a task computes, by query chunk.

    Over all tasks every ordered pair occurs exactly once.

    Args:
        chunks: c.
        task: i in [0, c).
        elements: The quorum; that of :func:`quorum` by default.
        is_causal: Leave out pairs whose keys all come after the queries.

    Example:
        >>> task_pairs(3, 0)
        [(0, 0), (0, 1), (1, 0)]
        >>> task_pairs(3, 0, is_causal=True)
        [(0, 0), (1, 0)]

    Source: docs/papers/stream_cqsa.md section 1.1, T_i.
    """
    pairs = (
        ((task + a) % chunks, (task + b) % chunks)
        for a, b in owned_differences(chunks, elements).values()
    )
    return sorted((x, y) for x, y in pairs if x >= y or not is_causal)


def perfect_sizes(limit: int) -> list[int]:
    """Return the numbers of chunks up to a limit that have a perfect quorum.

    Example:
        >>> perfect_sizes(100)
        [3, 7, 13, 21, 31, 57, 73, 91]
    """
    sizes = (q * q + q + 1 for q in range(1, int(limit**0.5) + 1) if q == 1 or _prime_power(q))
    return [c for c in sizes if c <= limit]


# --- Singer difference sets ----------------------------------------------------------------------


def _plane_order(chunks: int) -> int | None:
    """The q with c = q² + q + 1 if it is 1 or a prime power."""
    q = int((chunks - 0.75) ** 0.5)
    if q < 1 or q * q + q + 1 != chunks:
        return None
    return q if q == 1 or _prime_power(q) else None


def _prime_power(number: int) -> tuple[int, int] | None:
    """(p, m) if the number is pᵐ."""
    factors = _prime_factors(number)
    if len(factors) != 1:
        return None
    (prime,) = factors
    exponent = 0
    while number > 1:
        number //= prime
        exponent += 1
    return prime, exponent


def _prime_factors(number: int) -> list[int]:
    factors, divisor = [], 2
    while divisor * divisor <= number:
        if number % divisor == 0:
            factors.append(divisor)
            while number % divisor == 0:
                number //= divisor
        divisor += 1
    return [*factors, number] if number > 1 else factors


def _singer(order: int) -> tuple[int, ...]:
    """The exponents i < q² + q + 1 for which x^i has trace 0 from GF(q³) to GF(q), x primitive.

    They are the points of a line of the projective plane over GF(q).
    """
    chunks = order * order + order + 1
    if order == 1:
        return (0, 1)
    power = _prime_power(order)
    assert power is not None
    prime, degree = power[0], 3 * power[1]
    field = _primitive_field(prime, degree)
    # y -> y^q is linear over GF(p): its columns are the images of the basis 1, x, x², …
    base = field.power(order)
    columns = [field.one]
    for _ in range(degree - 1):
        columns.append(field.times(columns[-1], base))
    frobenius = np.stack(columns, axis=1)
    trace = np.eye(degree, dtype=np.int64) + frobenius + frobenius @ frobenius % prime
    element, line = field.one, []
    for i in range(chunks):
        if not (trace @ element % prime).any():
            line.append(i)
        element = field.times_x(element)
    # 1 is the difference of exactly one pair; that pair goes to 0 and 1
    members = set(line)
    first = next(i for i in line if (i + 1) % chunks in members)
    return tuple(sorted((i - first) % chunks for i in line))


class _Field:
    """GF(p)[x] modulo x^n − Σ tail_k x^k; elements are coefficient vectors. Shape: (n,)."""

    def __init__(self, prime: int, tail: _Vector) -> None:
        self.prime, self.tail, self.degree = prime, tail, len(tail)
        self.one: _Vector = np.eye(1, self.degree, dtype=np.int64)[0]

    def times_x(self, element: _Vector) -> _Vector:
        shifted = np.concatenate([[0], element[:-1]])
        return np.asarray((shifted + element[-1] * self.tail) % self.prime)

    def times(self, multiplier: _Vector, multiplicand: _Vector) -> _Vector:
        total = np.zeros(self.degree, dtype=np.int64)
        for coefficient in multiplier[::-1]:
            total = (self.times_x(total) + coefficient * multiplicand) % self.prime
        return total

    def power(self, exponent: int) -> _Vector:
        """Return x to a power."""
        result, square = self.one, self.times_x(self.one)
        while exponent:
            if exponent & 1:
                result = self.times(result, square)
            square = self.times(square, square)
            exponent >>= 1
        return result


def _primitive_field(prime: int, degree: int) -> _Field:
    """A field of pⁿ elements in which x generates all but 0.

    If x has order pⁿ − 1 in the ring, all elements but 0 are units, so the ring is a field.
    """
    order = prime**degree - 1
    factors = _prime_factors(order)
    for code in range(1, prime**degree):
        tail = np.array([code // prime**k % prime for k in range(degree)], dtype=np.int64)
        if not tail[0]:
            continue
        field = _Field(prime, tail)
        if (field.power(order) == field.one).all() and not any(
            (field.power(order // r) == field.one).all() for r in factors
        ):
            return field
    raise AssertionError("every finite field has a primitive polynomial")


# --- covers from rulers --------------------------------------------------------------------------


def _cover(chunks: int) -> tuple[int, ...]:
    """A ruler that measures every distance up to ⌊c/2⌋, without marks that it does not need."""
    elements = sorted({mark % chunks for mark in _ruler(chunks // 2)})
    for mark in elements[:0:-1]:
        fewer = [a for a in elements if a != mark]
        if not _missing(chunks, fewer):
            elements = fewer
    return tuple(elements)


def _ruler(length: int) -> list[int]:
    """Wichmann's ruler of fewest marks that is at least so long; it measures all distances.

    Source: Wichmann 1963: segments 1ʳ, r+1, (2r+1)ʳ, (4r+3)ˢ, (2r+2)ʳ⁺¹, 1ʳ.
    """
    best: list[int] | None = None
    for r in range(int(length**0.5) + 1):
        remainder = length - 4 * r * (r + 2) - 3
        s = max(0, ceil_div(remainder, 4 * r + 3))
        segments = [1] * r + [r + 1] + [2 * r + 1] * r + [4 * r + 3] * s
        segments += [2 * r + 2] * (r + 1) + [1] * r
        if best is None or len(segments) < len(best):
            best = segments
    assert best is not None
    return [0, *np.cumsum(best).tolist()]
