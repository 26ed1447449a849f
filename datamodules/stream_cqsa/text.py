"""The bytes of many files as one memory-mapped text, and windows on it.

Shapes: T bytes of text, D files, N tokens of a sequence.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fulgurite.data.store import ArrayStore, ArrayStream, cached_store
from fulgurite.data.text import UNREADABLE_TEXT, ConsecutiveStarts, FileWindows, pad_window
from fulgurite.errors import DataError
from fulgurite.foreign import reading

__all__ = [
    "IGNORED",
    "ByteText",
    "ConsecutiveWindows",
    "InputWindows",
    "RandomWindows",
    "cached_text",
    "cut_window",
]

#: Target that a loss leaves out: ``ignore_index`` of PyTorch's cross-entropy.
IGNORED = -100


# --- one file of all bytes ----------------------------------------------------------------------


class ByteText(ArrayStore):
    """All files one after the other, memory-mapped.

    Args:
        folder: A folder that :func:`cached_text` has written.

    Shape:
        - starts: (D,) int64, the first byte of each file that is not empty, ascending from 0.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._bytes, self.starts = self["bytes"], self["starts"]

    def __len__(self) -> int:
        return len(self._bytes)

    def read(self, begin: int, count: int) -> Tensor:
        """Return bytes as tokens.

        Shape:
            - (count,) int64.
        """
        return torch.from_numpy(self._bytes[begin : begin + count].astype(np.int64))


def cached_text(files: Sequence[tuple[str, Path]]) -> ByteText:
    """Return the text of files from the cache, after writing it there if it is new.

    The key is a digest of names, sizes and contents. One process of the machine writes at a time;
    if it is killed, the cache has no such entry.

    Args:
        files: (name, path) of each file.

    Raises:
        DataError: A file cannot be read or changes meanwhile, all are empty, or the cache cannot
            be written.
    """
    measured = [_measure(path) for _, path in files]
    total = sum(size for size, _ in measured)
    if not total:
        raise DataError(
            f"All {len(files)} files of text are empty, the first is {files[0][1]}.",
            "Set `--data.init_args.text.paths` to files with text.",
        )
    listing = json.dumps([[name for name, _ in files], measured])  # escapes what is not ASCII
    key = f"bytes-2-{hashlib.sha256(listing.encode()).hexdigest()[:32]}"
    return cached_store(
        key, lambda empty: _write_bytes(empty, files, measured), size=total, store=ByteText
    )


def _chunks(path: Path) -> Iterator[bytes]:
    with reading(path, "The file", UNREADABLE_TEXT), open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            yield chunk


def _measure(path: Path, copy: ArrayStream | None = None) -> tuple[int, str]:
    """Return size and digest of a file, copying it meanwhile if asked."""
    size, digest = 0, hashlib.sha256()
    for chunk in _chunks(path):
        size += len(chunk)
        digest.update(chunk)
        if copy is not None:
            copy.append(np.frombuffer(chunk, np.uint8))
    return size, digest.hexdigest()


def _write_bytes(
    folder: Path, files: Sequence[tuple[str, Path]], measured: Sequence[tuple[int, str]]
) -> dict[str, Any]:
    starts = []
    with ArrayStream(folder / "bytes.npy", np.uint8) as byte_stream:
        for (_, path), expected in zip(files, measured, strict=True):
            if expected[0]:
                starts.append(len(byte_stream))
            if _measure(path, byte_stream) != expected:  # the key would name other bytes
                raise DataError(
                    f"The file {path} changed while it was read.",
                    "Start again when nothing writes to it any more.",
                )
    np.save(folder / "starts.npy", np.array(starts, np.int64))
    return {}


# --- windows ------------------------------------------------------------------------------------


def cut_window(text: ByteText, begin: int, length: int, documents: bool = False) -> dict[str, Any]:
    """Return N inputs and the byte after each of them.

    Args:
        text: The bytes.
        begin: The first input.
        length: N.
        documents: Also return where files begin, and ignore targets in another file than their
            input.

    Returns:
        ``tokens`` and ``targets``; with ``documents`` also ``documents``, the first tokens of the
        files in the window as ascending integers from 0.

    Shape:
        - tokens, targets: (N,) int64.
    """
    window = text.read(begin, length + 1)
    item: dict[str, Any] = {"tokens": window[:-1], "targets": window[1:]}
    if documents:
        first, last = np.searchsorted(text.starts, (begin, begin + length), "right")
        borders = (text.starts[first:last] - begin).tolist()  # from 1 to N
        item["targets"] = item["targets"].clone()  # shares memory with the tokens
        item["targets"][[border - 1 for border in borders]] = IGNORED
        item["documents"] = (0, *(border for border in borders if border < length))
    return item


class RandomWindows(Dataset[dict[str, Any]]):
    """Windows at random positions; the number of the draw decides the position.

    Args:
        text: The bytes.
        part: The bytes that windows are cut from.
        length: N.
        draws: Draws of one epoch; further ones are as good.
        seed: Seed of the positions.
        documents: See :func:`cut_window`.
    """

    def __init__(
        self,
        text: ByteText,
        part: range,
        *,
        length: int,
        draws: int,
        seed: int,
        documents: bool,
    ) -> None:
        self.text, self.part, self.length = text, part, length
        self.draws, self.seed, self.documents = draws, seed, documents

    def __len__(self) -> int:
        return self.draws

    def __getitem__(self, index: int) -> dict[str, Any]:
        count = len(self.part) - self.length
        # a generator for each draw, so that it does not matter which worker makes it
        begin = self.part.start + int(np.random.default_rng([self.seed, index]).integers(count))
        return cut_window(self.text, begin, self.length, self.documents)


class ConsecutiveWindows(Dataset[dict[str, Any]]):
    """Windows one after the other, each byte the target of one of them at most.

    Args:
        text: The bytes.
        part: The bytes that windows are cut from.
        length: N.
        limit: Keep at most this many, spread evenly over the part.
        documents: See :func:`cut_window`.
    """

    def __init__(
        self,
        text: ByteText,
        part: range,
        *,
        length: int,
        documents: bool,
        limit: int | None = None,
    ) -> None:
        self.text, self.length, self.documents = text, length, documents
        self.starts = ConsecutiveStarts(part, length, limit)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        begin = self.starts.begin(np.array([index]))
        return cut_window(self.text, int(begin[0]), self.length, self.documents)


class InputWindows(Dataset[dict[str, Any]]):
    """Windows of files in no split, each with its number as ``index``.

    Args:
        texts: The bytes of each file.
        windows: Where windows begin.
        length: N.
        documents: Also return that a window is of one file; see :func:`cut_window`.
    """

    def __init__(
        self, texts: Sequence[ByteText], windows: FileWindows, length: int, *, documents: bool
    ) -> None:
        self.texts, self.windows = texts, windows
        self.length, self.documents = length, documents

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        text, begin = self.texts[self.windows.file[index]], int(self.windows.begin[index])
        bytes_of_window = text.read(begin, self.length + 1).numpy()
        tokens, targets = pad_window(bytes_of_window, self.length, IGNORED)
        item: dict[str, Any] = {
            "tokens": torch.from_numpy(tokens),
            "targets": torch.from_numpy(targets),
            "index": torch.tensor(index),
        }
        return item | {"documents": (0,)} if self.documents else item
