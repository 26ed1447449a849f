"""The bytes of many files as one memory-mapped text, and windows on it.

Shapes: T bytes of text, D files, N tokens of a sequence.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fulgurite.errors import DataError
from fulgurite.io import atomic_write, cache_folder, data_path, file_lock

__all__ = [
    "IGNORED",
    "STDLIB",
    "ByteText",
    "ConsecutiveWindows",
    "RandomWindows",
    "cached_text",
    "cut_window",
    "find_files",
    "split_ranges",
]

#: Target that a loss leaves out: ``ignore_index`` of PyTorch's cross-entropy.
IGNORED = -100
#: The path that means the sources of Python's standard library.
STDLIB = "stdlib"

# what is in the folder of the standard library and is not the library
_NOT_STDLIB = frozenset(("site-packages", "dist-packages", "test", "tests", "idle_test"))


# --- finding files ------------------------------------------------------------------------------


def find_files(paths: Sequence[str], suffixes: Sequence[str]) -> list[tuple[str, Path]]:
    """Return the files that paths stand for, each once, in an order that never changes.

    A path is a file, a folder (searched to the bottom for files with one of the suffixes; names
    that begin with a dot are skipped), a glob pattern (each match counts as if it were given
    itself), or ``stdlib``.

    Args:
        paths: Absolute, or relative to ``FULGURITE_DATA``.
        suffixes: What names of files in folders end with.

    Returns:
        (name, path) of each file, in the order of ``paths``, inside a folder by name. The name is
        relative to the folder.

    Raises:
        DataError: Nothing is there, or a folder cannot be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("b.txt", "a.txt", "c.png"):
        ...         _ = (Path(folder) / name).write_bytes(b"text")
        ...     [name for name, _ in find_files([folder], [".txt"])]
        ['a.txt', 'b.txt']
    """
    found: dict[Path, tuple[str, Path]] = {}  # a file given twice would be in two splits
    for given in paths:
        for name, path in _find(given, tuple(suffixes)):
            found.setdefault(path.resolve(), (name, path))
    if not found:
        raise DataError(
            f"There is no file at {', '.join(paths) or 'no path'} with the suffix "
            f"{' or '.join(suffixes) or '(none is allowed)'}.",
            "Set `--data.init_args.paths` to files, folders or glob patterns, and "
            "`--data.init_args.suffixes` to the suffixes of files in these folders.",
        )
    return list(found.values())


def _find(given: str, suffixes: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    if given == STDLIB:
        yield from _walk(Path(sysconfig.get_path("stdlib")), (".py",), _NOT_STDLIB)
        return
    path = data_path(given, must_exist=False)
    if not path.exists() and glob.has_magic(given):
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    else:
        matches = [data_path(given)]
    for match in matches:
        if match.is_dir():
            yield from _walk(match, suffixes)
        else:
            yield match.name, match


def _walk(
    folder: Path, suffixes: tuple[str, ...], skipped: frozenset[str] = frozenset()
) -> Iterator[tuple[str, Path]]:
    def refuse(error: OSError) -> None:
        raise DataError(
            f"The folder {error.filename} cannot be read ({error.strerror}).",
            "Make it readable, or leave it out of `--data.init_args.paths`.",
        ) from error

    files = []
    for root, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if name[0] != "." and name not in skipped]
        files += [Path(root, name) for name in names if name[0] != "." and name.endswith(suffixes)]
    yield from sorted((path.relative_to(folder).as_posix(), path) for path in files)


# --- one file of all bytes ----------------------------------------------------------------------


class ByteText:
    """All files one after the other, memory-mapped.

    Args:
        folder: What :func:`cached_text` has written.

    Shape:
        - starts: (D,) int64, the first byte of each file that is not empty, ascending from 0.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._bytes = np.memmap(folder / "text.bin", np.uint8, "r")
        self.starts = np.load(folder / "starts.npy")

    def __reduce__(self) -> tuple[type[ByteText], tuple[Path]]:
        return ByteText, (self.folder,)  # else a worker would be sent all bytes

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
            "Set `--data.init_args.paths` to files with text.",
        )
    listing = json.dumps([[name for name, _ in files], measured])  # escapes what is not ASCII
    key = f"bytes-{hashlib.sha256(listing.encode()).hexdigest()[:32]}"
    folder = cache_folder() / key
    if not folder.exists():
        try:
            with file_lock(folder.with_name(f"{key}.lock")):
                if not folder.exists():
                    for left_over in folder.parent.glob(f".{key}.tmp-*"):
                        shutil.rmtree(left_over, ignore_errors=True)  # of a killed process
                    with atomic_write(folder) as temporary:
                        temporary.mkdir()
                        _write(temporary, files, measured)
        except OSError as error:
            if not folder.exists():  # else another rank without a lock was faster
                raise DataError(
                    f"The text cannot be written to {folder.parent} ({error.strerror}).",
                    f"Set FULGURITE_CACHE to a folder with {total:,} free bytes.",
                ) from error
    return ByteText(folder)


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                yield chunk
    except OSError as error:
        raise DataError(
            f"The file {path} cannot be read ({error.strerror}).",
            "Make it readable, or leave it out of `--data.init_args.paths`.",
        ) from error


def _measure(path: Path, copy: IO[bytes] | None = None) -> tuple[int, str]:
    """Return size and digest of a file, copying it meanwhile if asked."""
    size, digest = 0, hashlib.sha256()
    for chunk in _chunks(path):
        size += len(chunk)
        digest.update(chunk)
        if copy is not None:
            copy.write(chunk)
    return size, digest.hexdigest()


def _write(
    folder: Path, files: Sequence[tuple[str, Path]], measured: Sequence[tuple[int, str]]
) -> None:
    starts, begin = [], 0
    with open(folder / "text.bin", "wb") as whole:
        for (_, path), expected in zip(files, measured, strict=True):
            if _measure(path, whole) != expected:  # the key would name other bytes
                raise DataError(
                    f"The file {path} changed while it was read.",
                    "Start again when nothing writes to it any more.",
                )
            if expected[0]:
                starts.append(begin)
            begin += expected[0]
    np.save(folder / "starts.npy", np.array(starts, np.int64))


# --- windows ------------------------------------------------------------------------------------


def split_ranges(
    total: int, val_fraction: float, test_fraction: float
) -> tuple[range, range, range]:
    """Return the bytes of training, validation and test: contiguous, in this order, disjoint.

    Example:
        >>> split_ranges(100, 0.1, 0.2)
        (range(0, 70), range(70, 80), range(80, 100))
    """
    val, test = int(total * val_fraction), int(total * test_fraction)
    first, second = total - val - test, total - test
    return range(first), range(first, second), range(second, total)


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
    """Windows at random places; the number of the draw decides the place.

    Args:
        text: The bytes.
        part: The bytes that windows are cut from.
        length: N.
        draws: Draws of one epoch; further ones are as good.
        seed: Seed of the places.
        documents: See :func:`cut_window`.
    """

    def __init__(
        self, text: ByteText, part: range, length: int, draws: int, seed: int, documents: bool
    ) -> None:
        self.text, self.part, self.length = text, part, length
        self.draws, self.seed, self.documents = draws, seed, documents

    def __len__(self) -> int:
        return self.draws

    def __getitem__(self, index: int) -> dict[str, Any]:
        places = len(self.part) - self.length
        # a generator for each draw, so that it does not matter which worker makes it
        begin = self.part.start + int(np.random.default_rng([self.seed, index]).integers(places))
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
        self, text: ByteText, part: range, length: int, limit: int | None, documents: bool
    ) -> None:
        self.text, self.part, self.length, self.documents = text, part, length, documents
        self.windows = max(0, (len(part) - 1) // length)
        self.kept = self.windows if limit is None else min(limit, self.windows)

    def __len__(self) -> int:
        return self.kept

    def __getitem__(self, index: int) -> dict[str, Any]:
        begin = self.part.start + index * self.windows // self.kept * self.length
        return cut_window(self.text, begin, self.length, self.documents)
