"""Orders in which the score matrix is computed, as independent tasks.

A task has rows: a range of queries with the ranges of keys that it computes them against. Over all
tasks every visible pair of tokens is computed exactly once, so results merge exactly in any order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from fulgurite.attention.bounds import Range
from fulgurite.attention.quorums import owned_differences, quorum, task_chunks
from fulgurite.attention.visibility import Visibility
from fulgurite.errors import ConfigError

__all__ = [
    "Row",
    "Task",
    "chunk_ranges",
    "column_tasks",
    "cqs_tasks",
    "rect_tasks",
    "recursive_tasks",
]


class Row(NamedTuple):
    """Queries and the keys that a task computes them against."""

    queries: Range
    keys: tuple[Range, ...]


class Task(NamedTuple):
    """Rows that share what is loaded.

    Attributes:
        rows: In ascending order of queries.
        loads: Ranges of tokens that are loaded at once, ascending and disjoint; empty if keys are
            streamed past one row.
    """

    rows: tuple[Row, ...]
    loads: tuple[Range, ...] = ()


def chunk_ranges(tokens: int, chunks: int) -> list[Range]:
    """Cut a sequence into chunks whose lengths differ by at most one.

    Example:
        >>> chunk_ranges(7, 3)
        [(0, 2), (2, 4), (4, 7)]
    """
    ends = [i * tokens // chunks for i in range(chunks + 1)]
    return list(itertools.pairwise(ends))


def rect_tasks(visible: Visibility, queries: int, keys: int) -> Iterator[Task]:
    """Query-stationary: one task per tile of queries, past which keys are streamed.

    Args:
        visible: What is seen.
        queries: Queries of a tile.
        keys: Keys of a tile.

    Source: the outer loop of FlashAttention; as a schedule: docs/papers/stream_cqsa.md section 3.
    """
    for top in range(0, visible.queries, queries):
        bottom = min(top + queries, visible.queries)
        first, end = visible.first(top), visible.end(bottom - 1)
        first -= first % keys  # tiles of all rows end at the same keys
        ranges = tuple((start, min(start + keys, end)) for start in range(first, end, keys))
        yield Task((Row((top, bottom), ranges),))


def column_tasks(visible: Visibility, keys: Range, queries: int) -> Iterator[Row]:
    """Key-stationary: the tiles of queries that see some of a range of keys.

    Args:
        visible: What is seen.
        keys: The keys.
        queries: Queries of a tile.

    Source: the outer loop of FlashAttention's backward pass.
    """
    for top in range(0, visible.queries, queries):
        bottom = min(top + queries, visible.queries)
        first, end = max(keys[0], visible.first(top)), min(keys[1], visible.end(bottom - 1))
        if first < end:
            yield Row((top, bottom), (keys,))


def cqs_tasks(visible: Visibility, chunks: int) -> Iterator[Task]:
    """One independent task per chunk: a cyclic quorum of chunks, and the pairs that it owns.

    Args:
        visible: What is seen; as many queries as keys.
        chunks: c.

    Raises:
        ConfigError: Queries and keys are not the same tokens.

    Source: docs/papers/stream_cqsa.md section 1.1; as block pairs without a mask: 1.8.
    """
    return recursive_tasks(visible, chunks, depth=1)


def _partners(chunks: int) -> dict[int, set[int]]:
    """For each element of the quorum those with which it makes a pair that a task owns."""
    partners: dict[int, set[int]] = {}
    for a, b in owned_differences(chunks).values():
        partners.setdefault(a, set()).add(b)
    return {a: partners.get(a, set()) for a in quorum(chunks)}


class _Piece(NamedTuple):
    """A range of tokens of a gathered subsequence, with its chunk at each level."""

    tokens: Range
    labels: tuple[int, ...]


def recursive_tasks(visible: Visibility, chunks: int, depth: int) -> Iterator[Task]:
    """CQS Divide applied to the gathered subsequences again: c^depth tasks.

    Kept for completeness: more chunks at depth 1 are better in every respect
    (docs/papers/stream_cqsa.md section 1.4).

    Args:
        visible: What is seen; as many queries as keys.
        chunks: c.
        depth: How often the sequence is divided.

    Raises:
        ConfigError: Queries and keys are not the same tokens, or the depth is not positive.

    Source: docs/papers/stream_cqsa.md section 1.4.
    """
    if visible.queries != visible.keys:
        raise ConfigError(
            f"Quorums pair chunks of one sequence, and there are {visible.queries} queries and "
            f"{visible.keys} keys.",
            'Use schedule="rect" for cross-attention.',
        )
    if depth < 1:
        raise ConfigError(f"A depth of {depth} divides nothing.", "Give a depth of at least 1.")
    owned = _partners(chunks)
    for path in itertools.product(range(chunks), repeat=depth):
        pieces = [_Piece((0, visible.keys), ())]
        for task in path:
            pieces = _divide(pieces, chunks, task)
        rows = []
        for query in pieces:
            allowed = [
                owned[(label - task) % chunks]
                for label, task in zip(query.labels, path, strict=True)
            ]
            first, end = visible.first(query.tokens[0]), visible.end(query.tokens[1] - 1)
            keys = tuple(
                key.tokens
                for key in pieces
                if key.tokens[0] < end
                and key.tokens[1] > first
                and all(
                    (label - task) % chunks in partners
                    for label, task, partners in zip(key.labels, path, allowed, strict=True)
                )
            )
            if keys:
                rows.append(Row(query.tokens, keys))
        if rows:
            yield Task(tuple(rows), tuple(piece.tokens for piece in pieces))


def _divide(pieces: list[_Piece], chunks: int, task: int) -> list[_Piece]:
    """Cut a gathered subsequence into chunks and keep those of a task, in the order of tokens."""
    length = sum(stop - start for (start, stop), _ in pieces)
    bounds = chunk_ranges(length, chunks)
    gathered, labels_of_task = [], task_chunks(chunks, task)
    for label in labels_of_task:
        at = 0
        for (start, stop), labels in pieces:
            first = max(bounds[label][0], at)
            end = min(bounds[label][1], at + stop - start)
            if first < end:
                gathered.append(_Piece((start + first - at, start + end - at), (*labels, label)))
            at += stop - start
    return gathered
