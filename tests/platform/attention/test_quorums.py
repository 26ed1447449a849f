"""Quorums: every pair of chunks meets in exactly one task."""

import itertools
from collections import Counter

import pytest

from fulgurite.attention.quorums import (
    check_quorum,
    is_perfect,
    perfect_sizes,
    quorum,
    task_chunks,
    task_pairs,
)
from fulgurite.errors import ConfigError


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("chunks", [*range(1, 60), 91, 100, 111, 133])
def test_every_pair_is_in_exactly_one_task(chunks, causal):
    pairs = Counter(
        itertools.chain.from_iterable(
            task_pairs(chunks, task, is_causal=causal) for task in range(chunks)
        )
    )
    wanted = {(x, y) for x, y in itertools.product(range(chunks), repeat=2) if x >= y or not causal}
    assert set(pairs) == wanted
    assert set(pairs.values()) == {1}
    for task in range(chunks):
        inside = set(task_chunks(chunks, task))
        assert all({x, y} <= inside for x, y in task_pairs(chunks, task))


def test_prime_power_orders_give_perfect_quorums():
    sizes = perfect_sizes(1100)
    assert sizes == [
        3, 7, 13, 21, 31, 57, 73, 91, 133, 183, 273, 307, 381, 553, 651, 757, 871, 993, 1057,
    ]  # fmt: skip
    for chunks in sizes:
        elements = quorum(chunks)
        assert is_perfect(chunks, elements)
        assert elements[:2] == (0, 1)


@pytest.mark.parametrize("chunks", [7, 13, 31, 73])
def test_perfect_tasks_are_balanced_and_share_one_chunk(chunks):
    size = len(quorum(chunks))
    for task in range(chunks):
        assert len(task_pairs(chunks, task)) == chunks
        assert len(task_pairs(chunks, task, is_causal=True)) == size * (size - 1) // 2 + 1
        for other in range(task):
            assert len({*task_chunks(chunks, task)} & {*task_chunks(chunks, other)}) == 1


def test_covers_exist_for_every_number_and_are_small():
    """No perfect set of order 6 exists; an exhaustive search found 8 for c = 42 to 44."""
    for chunks in range(1, 320):
        elements = quorum(chunks)
        check_quorum(chunks, elements)
        assert len(elements) <= 1.25 * chunks**0.5 + 1
    assert [len(quorum(c)) for c in (8, 42, 43, 44, 100)] == [4, 8, 8, 8, 12]


def test_sets_that_are_no_quorum_are_refused():
    with pytest.raises(ConfigError, match=r"no difference 3 mod 7"):
        check_quorum(7, (0, 1, 2))
    with pytest.raises(ConfigError, match="repeats a residue"):
        check_quorum(7, (0, 1, 3, 7))
    with pytest.raises(ConfigError, match="0 chunks"):
        quorum(0)
