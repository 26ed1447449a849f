"""Masks as users give them, as intervals of keys.

Axes: B batch, H heads, M queries, N keys.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fulgurite.attention.bounds import Bound, Range
from fulgurite.attention.checks import check_integer
from fulgurite.attention.visibility import EntryMasks, Visibility, Window
from fulgurite.errors import ConfigError, DataError

__all__ = [
    "Documents", "Masking", "Offset", "as_intervals", "causal_offset",
    "hides_only", "is_causal_bias", "merge_visible", "row_intervals", "starts_of_ids",
]  # fmt: skip

#: First tokens of documents that all batch entries share; those of each; or ids of the document
#: of each token, (B, N), equal ids side by side.
Documents = Sequence[int] | Sequence[Sequence[int]] | Tensor

#: Position of the first query among the keys.
Offset = int | Literal["bottom_right"] | None

_AT_ONCE = 2**18  # numbers of a mask that are looked through at once


@dataclass(frozen=True)
class Masking:
    """Masks that are intervals of keys, all of which must let a query see a key.

    Args:
        is_causal: A query sees keys up to its own position.
        window: Keys that a query sees before and behind its own position; see
            :data:`~fulgurite.attention.visibility.Window`.
        prefix: Keys that all queries see although later ones are causal; one number, or one for
            each batch entry.
        documents: See :data:`Documents`; tokens see only their own document.
        chunk: Tokens see only their own chunk of so many.
        query_offset: Position of the first query among the keys; ``"bottom_right"`` for the
            number of keys less that of queries. By default 0, as in PyTorch's attention, which
            only ``is_causal`` takes where the numbers differ.
        lengths: Tokens of each batch entry that are no padding.
        starts: First of these tokens; 0 by default.
        key_mask: True for keys that are no padding, of any pattern. Shape: (B or 1, N).
    """

    is_causal: bool = False
    window: Window | None = None
    prefix: int | Sequence[int] = 0
    documents: Documents | None = None
    chunk: int | None = None
    query_offset: Offset = None
    lengths: Sequence[int] | Tensor | None = None
    starts: Sequence[int] | Tensor | None = None
    key_mask: Tensor | None = None

    def __post_init__(self) -> None:
        """Check the kinds of numbers.

        Raises:
            ConfigError: An option has the wrong type.
        """
        if not isinstance(self.is_causal, bool):
            raise ConfigError(f"is_causal={self.is_causal!r} is no bool.", "Give True or False.")
        if self.window is not None:
            sides = self.window if isinstance(self.window, tuple | list) else (self.window,)
            if len(sides) not in (1, 2):
                raise ConfigError(f"window={self.window!r} has no two sides.", "Give a pair.")
            integers = tuple(None if x is None else check_integer("window", x) for x in sides)
            window = integers if len(integers) == 2 else integers[0]
            object.__setattr__(self, "window", window)  # the record is frozen
        if self.chunk is not None:
            object.__setattr__(self, "chunk", check_integer("chunk", self.chunk))

    def visibility(self, batch: int, queries: int, keys: int) -> tuple[Visibility, ...]:
        """Return what is seen: once if all batch entries see the same, else for each.

        Args:
            batch: B.
            queries: M.
            keys: N.

        Raises:
            ConfigError: Masks do not fit together.
            DataError: Masks do not fit the sizes.
        """
        if not batch:
            return (Visibility.of(queries, keys),)
        offset = self.offset(queries, keys)
        prefixes = _by_entry("prefix", self.prefix, batch)
        documents = self._documents(batch, keys)
        ranges = self._ranges(batch, queries, keys)
        entries = batch if len(prefixes) * len(documents) * len(ranges) > 1 else 1
        facts = (_repeat_entries(x, entries) for x in (prefixes, documents, ranges))
        by_fact: dict[Any, Visibility] = {}
        entries_visible = []
        for prefix, starts, tokens in zip(*facts, strict=True):
            fact = prefix, starts, tokens
            if fact not in by_fact:
                by_fact[fact] = Visibility.of(
                    queries,
                    keys,
                    EntryMasks(
                        is_causal=self.is_causal,
                        window=self.window,
                        prefix=prefix,
                        documents=starts,
                        chunk=self.chunk,
                        chunk_start=0 if tokens is None else tokens[0],
                        offset=offset,
                        key_range=tokens,
                        query_range=None if tokens is None else _shift_range(tokens, offset or 0),
                    ),
                )
            entries_visible.append(by_fact[fact])
        visible = _without_repetition(tuple(entries_visible))
        if self.key_mask is not None:
            _check_key_mask(self.key_mask, batch, keys)
            by_keys = as_intervals(self.key_mask[:, None, None, :], batch, queries, keys)
            if by_keys is not None:
                visible = merge_visible(visible, by_keys)
        return visible

    def offset(self, queries: int, keys: int) -> int | None:
        """Return the position of the first query, or None if nothing was said.

        Raises:
            ConfigError: The query offset is not a position.
        """
        if self.query_offset is None:
            return None
        if self.query_offset == "bottom_right":
            return keys - queries
        position: object = self.query_offset
        if isinstance(position, str):
            raise ConfigError(
                f"query_offset={position!r} is no position.",
                'Give the position of the first query among the keys, or "bottom_right".',
            )
        return check_integer("query_offset", position)

    def _documents(self, batch: int, keys: int) -> list[tuple[int, ...] | None]:
        """First tokens of the documents, for all batch entries or for each."""
        documents = self.documents
        if documents is None:
            return [None]
        if isinstance(documents, Tensor) and documents.ndim == 2:
            if documents.is_floating_point() or documents.is_complex():
                raise DataError(
                    f"Ids of documents are of {documents.dtype}.", "Give whole numbers."
                )
            if documents.shape[0] not in (1, batch) or documents.shape[1] != keys:
                raise DataError(
                    f"Ids of documents are {tuple(documents.shape)} for {batch} batch entries of "
                    f"{keys} keys.",
                    "Give an id for each token, (batch, tokens).",
                )
            return [starts_of_ids(row) for row in documents.cpu().numpy()]
        entries = [
            x
            if isinstance(x, Sequence)
            else x.tolist()
            if isinstance(x, Tensor | np.ndarray)
            else x
            for x in _to_list("documents", documents)
        ]
        if entries and isinstance(entries[0], Sequence):
            if len(entries) != batch:
                raise DataError(
                    f"There are documents of {len(entries)} batch entries, of {batch}.",
                    "Give the starts of all of them.",
                )
            return [_integers("documents", starts) for starts in entries]
        return [_integers("documents", entries)]

    def _ranges(self, batch: int, queries: int, keys: int) -> list[Range | None]:
        """Tokens of each batch entry that are no padding."""
        if self.lengths is None:
            if self.starts is not None:
                raise ConfigError("starts says where sequences begin, not where they end.",
                                  "Give lengths too.")  # fmt: skip
            return [None]
        lengths = _integers("lengths", self.lengths)
        starts = (0,) * len(lengths) if self.starts is None else _integers("starts", self.starts)
        if len(lengths) != batch or len(starts) != batch:
            raise DataError(
                f"There are {len(lengths)} lengths and {len(starts)} starts for {batch} batch "
                "entries.",
                "Give one for each batch entry.",
            )
        if queries != keys and self.query_offset is None:
            raise DataError(
                f"lengths are those of sequences that attend to themselves, and there are "
                f"{queries} queries and {keys} keys.",
                "Give key_mask, or query_offset if the queries are tokens of the sequence.",
            )
        for entry, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            if length < 0 or start < 0 or start + length > keys:
                raise DataError(
                    f"Length {length} of batch entry {entry}, from token {start} on, is not within "
                    f"its {keys} tokens.",
                    "Give the number of tokens without padding.",
                )
        return [(start, start + length) for start, length in zip(starts, lengths, strict=True)]


def _check_key_mask(mask: Tensor, batch: int, keys: int) -> None:
    """Check a mask of keys. Shape: (B or 1, N).

    Raises:
        DataError: The mask has another type or shape.
    """
    if mask.is_meta:
        raise ConfigError("key_mask has no numbers (device meta).", "Give a tensor on the CPU.")
    if mask.dtype != torch.bool or mask.ndim != 2 or mask.shape[1] != keys:
        raise DataError(
            f"key_mask is {tuple(mask.shape)} of {mask.dtype} for {batch} batch entries of {keys} "
            "keys.",
            "Give booleans, True for keys that are seen, (batch, keys).",
        )
    if mask.shape[0] not in (1, batch):
        raise DataError(
            f"key_mask has {mask.shape[0]} rows for {batch} batch entries.",
            "Give one row, or one for each.",
        )


def _by_entry(name: str, value: int | Sequence[int], batch: int) -> list[int]:
    """A number for all batch entries, or one for each."""
    if not isinstance(value, Sequence | Tensor | np.ndarray):
        return [check_integer(name, value)]
    numbers = [*_integers(name, value)]
    if len(numbers) != batch:
        raise DataError(
            f"There are {len(numbers)} numbers in {name} for {batch} batch entries.",
            "Give one number, or one for each.",
        )
    return numbers


def _to_list(name: str, values: object) -> list[Any]:
    """Return a list of what a sequence, an array or a tensor holds.

    Raises:
        ConfigError: The value is none of these, or is a tensor on the meta device.
    """
    if isinstance(values, Tensor) and values.is_meta:
        raise ConfigError(f"{name} has no numbers (device meta).", "Give a tensor on the CPU.")
    if isinstance(values, Tensor | np.ndarray):
        return list(values.tolist())
    if isinstance(values, Sequence) and not isinstance(values, str):
        return list(values)
    raise ConfigError(f"{name}={values!r} is no list of numbers.", "Give a list of int.")


def _integers(name: str, values: object) -> tuple[int, ...]:
    """Return whole numbers; those of a tensor may be on any device."""
    return tuple(
        check_integer(name, int(x) if isinstance(x, Tensor) and x.ndim == 0 and not
                      x.is_floating_point() else x)
        for x in _to_list(name, values)
    )  # fmt: skip


def _repeat_entries(facts: list[Any], entries: int) -> list[Any]:
    return facts * entries if len(facts) == 1 else facts


def _shift_range(tokens: Range, offset: int) -> Range:
    """Queries whose positions are within a range."""
    return max(0, tokens[0] - offset), max(0, tokens[1] - offset)


def _without_repetition(visible: tuple[Visibility, ...]) -> tuple[Visibility, ...]:
    return visible[:1] if len(set(visible)) == 1 else visible


def merge_visible(
    first: tuple[Visibility, ...], second: tuple[Visibility, ...]
) -> tuple[Visibility, ...]:
    """Return what both let each batch entry see.

    Args:
        first: One for all batch entries, or one for each.
        second: One for all batch entries, or one for each.
    """
    entries = max(len(first), len(second))
    pairs = zip(
        *(itertools.islice(itertools.cycle(x), entries) for x in (first, second)), strict=True
    )
    return _without_repetition(tuple(a.intersection(b) for a, b in pairs))


def starts_of_ids(ids: NDArray[Any]) -> tuple[int, ...]:
    """First tokens of runs of equal ids.

    Raises:
        DataError: An id comes back after another.
    """
    starts = np.flatnonzero(np.diff(ids, prepend=ids[:1] - 1)) if len(ids) else np.zeros(1, int)
    if len({*ids[starts].tolist()} if len(ids) else ()) != (len(starts) if len(ids) else 0):
        raise DataError(
            "The tokens of a document are not side by side: an id comes back after another.",
            "Sort the tokens of each sequence by document, or give attn_mask.",
        )
    return tuple(int(start) for start in starts)


def is_causal_bias(mask: object) -> bool:
    """Whether a mask is one of PyTorch's own causal biases."""
    module = sys.modules.get("torch.nn.attention.bias")  # a second to import, for nothing else
    return module is not None and isinstance(mask, module.CausalBias)


def causal_offset(mask: Any, queries: int, keys: int) -> int | None:
    """Return the offset of PyTorch's own causal biases; None for anything else.

    Raises:
        DataError: The bias ends at the last key of another call.
    """
    if not is_causal_bias(mask):
        return None
    from torch.nn.attention.bias import CausalVariant

    if mask.variant != CausalVariant.LOWER_RIGHT:
        return 0
    if mask.seq_len_kv - mask.seq_len_q != keys - queries:
        raise DataError(
            f"attn_mask is causal_lower_right({mask.seq_len_q}, {mask.seq_len_kv}), and there are "
            f"{queries} queries and {keys} keys.",
            f"Give causal_lower_right({queries}, {keys}).",
        )
    return keys - queries


def hides_only(mask: Tensor) -> bool:
    """Whether a mask hides keys and does nothing else.

    Args:
        mask: Boolean, or additive: then without a gradient and of nothing but 0 and −inf.
    """
    if mask.dtype == torch.bool:
        return True
    if mask.requires_grad or mask.numel() == 0:
        return False
    rows = mask.reshape(-1, mask.shape[-1]) if mask.is_contiguous() else mask
    for part in torch.split(rows, max(1, _AT_ONCE // max(1, math.prod(rows.shape[1:])))):
        if not bool(((part == 0) | (part == -math.inf)).all()):
            return False
    return True


def as_intervals(
    mask: Tensor, batch: int, queries: int, keys: int
) -> tuple[Visibility, ...] | None:
    """Return a boolean mask as intervals, if in each row the keys that are seen are neighbours.

    Args:
        mask: True, or 0, where a key is seen. Shape: (B or 1, 1, M or 1, N or 1).
        batch: B.
        queries: M.
        keys: N.

    Returns:
        Once if all batch entries see the same, else for each; None if a row is no interval, or
        the intervals go back from a query to the next.
    """
    if mask.shape[1] != 1 or 0 in (batch, queries, keys):
        return None
    visible = []
    for entry in mask[:, 0]:
        bounds = row_intervals(entry, keys)
        if bounds is None:
            return None
        first, end = bounds
        if len(first) == 1:
            bound = Bound.constant(int(first[0])), Bound.constant(int(end[0]))
            visible.append(Visibility(queries, keys, *bound).clipped())
            continue
        intervals = Visibility.from_intervals(keys, first, end)
        if intervals is None:
            return None
        visible.append(intervals)
    return _without_repetition(tuple(visible))


def row_intervals(mask: Tensor, keys: int) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """First key and key behind the last one of each row. Shape: (M or 1, N or 1)."""
    if mask.shape[-1] == 1:
        mask = mask.expand(-1, keys)
    first, end = [], []
    for part in torch.split(mask, max(1, _AT_ONCE // keys)):
        numbers = (part if part.dtype == torch.bool else part == 0).to(torch.uint8)
        begin = numbers.argmax(-1)
        count = numbers.sum(-1, dtype=torch.int64)
        last = keys - numbers.flip(-1).argmax(-1)
        if not bool(((last - begin == count) | (count == 0)).all()):
            return None
        first.append(begin.masked_fill(count == 0, 0))
        end.append(last.masked_fill(count == 0, 0))
    return torch.cat(first).cpu().numpy(), torch.cat(end).cpu().numpy()
