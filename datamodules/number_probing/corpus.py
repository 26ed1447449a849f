"""Text files and parquet tables as one memory-mapped sequence of tokens, and windows on it.

Axes: M tokens, D documents, I number tokens, B windows, L tokens of a window.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fulgurite.data.store import ArrayStore, ArrayStream, cached_store
from fulgurite.data.text import ConsecutiveStarts, read_documents
from fulgurite.datamodules.number_probing.addition import IGNORED
from fulgurite.datamodules.number_probing.batches import BatchDataset
from fulgurite.datamodules.number_probing.draws import Ints, draw_below
from fulgurite.datamodules.number_probing.perturbations import (
    Perturbation,
    block_ids,
    context_starts,
    isolate_starts,
    replacement,
)
from fulgurite.datamodules.number_probing.tokenizers import Tokenizer
from fulgurite.errors import DataError
from fulgurite.io import checksum

__all__ = ["TokenCache", "TokenWindows", "WindowOptions", "cached_tokens"]

_WINDOW = 2  # random stream of a seed
_TOGETHER = 256  # documents tokenised at a time


# --- the cache -----------------------------------------------------------------------------------


class TokenCache(ArrayStore):
    """All documents one after the other, memory-mapped.

    Args:
        folder: A folder that :func:`cached_tokens` has written.

    Attributes:
        tokens: Shape: (M,), uint16 or uint32.
        starts: First token of each document. Shape: (D,), int64.
        positions: Positions of the number tokens, ascending. Shape: (I,), int64.
        counts: How often each token occurs. Shape: (V,), int64.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.tokens, self.positions = self["tokens"], self["places"]
        self.starts, self.counts = self["starts"], self["counts"]

    def __len__(self) -> int:
        return len(self.tokens)


def cached_tokens(files: Sequence[Path], tokenizer: Tokenizer, column: str = "text") -> TokenCache:
    """Return the tokens of files from the cache, after writing them there if they are new.

    The key is a digest of all contents and of the tokenizer. One process of the machine writes at
    a time; if it is killed, the cache has no such entry.

    Args:
        files: Text or parquet, in the order of the tokens.
        tokenizer: Makes the tokens; takes over its vocabulary from the cache.
        column: Column of parquet tables that holds the text.

    Raises:
        DataError: A file cannot be read, there is no text in them, or the cache cannot be written.
    """
    digests = [(path.suffix == ".parquet", checksum(path)) for path in files]
    listing = json.dumps([digests, column, tokenizer.key])
    key = f"tokens-3-{hashlib.sha256(listing.encode()).hexdigest()[:32]}"
    cache = cached_store(
        key, lambda empty: _write_tokens(empty, files, tokenizer, column), store=TokenCache
    )
    tokenizer.restore(cache.facts["tokenizer"])
    return cache


def _write_tokens(
    folder: Path, files: Sequence[Path], tokenizer: Tokenizer, column: str
) -> dict[str, Any]:
    tokenizer.learn(read_documents(files, column))
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    is_number = np.zeros(tokenizer.vocab_size, np.bool_)
    is_number[[*tokenizer.numbers]] = True
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    starts: list[int] = []
    end_ids = [] if tokenizer.end is None else [tokenizer.end]
    with (
        ArrayStream(folder / "tokens.npy", dtype) as token_stream,
        ArrayStream(folder / "places.npy", np.int64) as position_stream,
    ):
        documents = read_documents(files, column)
        while batch := [*islice(documents, _TOGETHER)]:
            for token_ids in tokenizer.encode(batch):
                if not token_ids:
                    continue
                tokens = np.asarray(token_ids + end_ids, dtype)
                starts.append(len(token_stream))
                counts += np.bincount(tokens, minlength=len(counts))
                position_stream.append(np.flatnonzero(is_number[tokens]) + len(token_stream))
                token_stream.append(tokens)
    if not starts:
        raise DataError(
            f"There is no text in {len(files)} files, the first is {files[0]}.",
            "Set `--data.init_args.text.paths` to files with text.",
        )
    np.save(folder / "starts.npy", np.array(starts, np.int64))
    np.save(folder / "counts.npy", counts)
    return {"tokenizer": tokenizer.state()}


# --- windows -------------------------------------------------------------------------------------


class WindowOptions(NamedTuple):
    """What windows of a text are.

    Attributes:
        length: L.
        perturbation: Perturbation of the text.
        is_number: Whether a token stands for a number. Shape: (V,).
        seed: Seed of the positions and of the perturbation.
        documents: Mark documents, which must not see each other.
    """

    length: int
    perturbation: Perturbation
    is_number: npt.NDArray[np.bool_]
    seed: int
    documents: bool


class TokenWindows(BatchDataset):
    """Windows of the text, and the next token of each of their tokens.

    Args:
        cache: All tokens.
        part: The tokens that windows are cut from; swapped numbers come from here too.
        options: What windows are.
        random: Cut at random positions, which the number of the draw decides, instead of one
            after the other.
        limit: Keep at most this many of the consecutive windows, spread evenly.
    """

    def __init__(
        self,
        cache: TokenCache,
        part: range,
        options: WindowOptions,
        *,
        random: bool,
        limit: int | None = None,
    ) -> None:
        self.cache, self.part, self.random = cache, part, random
        self.length, self.perturbation, self.is_number, self.seed, self.documents = options
        self.consecutive = ConsecutiveStarts(part, self.length, limit)
        first, last = np.searchsorted(cache.positions, (part.start, part.stop))
        self.numbers = range(int(first), int(last))  # of the part, among all

    def __len__(self) -> int:
        return len(self.consecutive)

    def begins(self, indices: Sequence[int]) -> Ints:
        """First tokens of windows. Shape: (B,)."""
        numbers = np.asarray(indices, np.int64)
        if self.random:
            places = len(self.part) - self.length
            return self.part.start + draw_below(places, self.seed, _WINDOW, numbers)
        return self.consecutive.begin(numbers)

    def text(self, begin: int, count: int) -> Ints:
        """Read tokens, with numbers replaced if the perturbation replaces them.

        Shape: (count,).
        """
        tokens: Ints = self.cache.tokens[begin : begin + count].astype(np.int64)
        kind = self.perturbation.numbers
        if kind is not None:
            positions = self.cache.positions
            first, last = np.searchsorted(positions, (begin, begin + count))
            if last > first:
                indices = np.arange(first, last) - self.numbers.start
                replacements = replacement(kind, indices, len(self.numbers), self.seed)
                source = positions[self.numbers.start + replacements]
                tokens[positions[first:last] - begin] = self.cache.tokens[source]
        return tokens

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        begins = self.begins(indices)
        rows = np.stack([self.text(int(begin), self.length + 1) for begin in begins])
        tokens, targets = rows[:, :-1], rows[:, 1:].copy()
        batch = {"tokens": torch.from_numpy(tokens.copy()), "targets": torch.from_numpy(targets)}
        starts = np.zeros(rows.shape, np.bool_)  # also of the token that is only predicted
        starts[:, 0] = True
        if self.documents:
            for row, begin in zip(starts, begins, strict=True):
                among = np.searchsorted(self.cache.starts, (begin, begin + rows.shape[1]))
                row[self.cache.starts[slice(*among)] - begin] = True
        if self.perturbation.isolate:
            starts |= isolate_starts(self.is_number[rows], self.perturbation.isolate)
        # the first token of a piece is not predicted from the piece before
        targets[starts[:, 1:]] = IGNORED
        if self.perturbation.context:
            # but the window of the context slides on to its last token's target
            starts |= context_starts((len(rows), rows.shape[1]), self.perturbation.context)
        if self.documents or self.perturbation.isolate or self.perturbation.context:
            batch["documents"] = torch.from_numpy(block_ids(starts[:, :-1]))
        return batch
