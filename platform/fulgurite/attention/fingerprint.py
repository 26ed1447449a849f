"""Digests of whole tensors and of ranges of their tokens, read in pieces.

The digest is SHA-256 over the digests of pieces of 1 MiB, which threads compute side by side: as
many as PyTorch uses. One thread of a Xeon with SHA instructions reads 1.2 GB/s, which compares with
BLAKE2b (1.0 GB/s), MD5 (0.8 GB/s) and CRC-32 (2.3 GB/s, of which 32 bits are too few); what is
faster needs another package (xxHash, 15 GB/s). Every bit counts, and so does the order.

Axes: B batch, H heads, N tokens, D head size.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from fulgurite.attention.bounds import Range
from fulgurite.attention.execution_plan import ExecutionPlan
from fulgurite.attention.progress import byte_bar

__all__ = ["digest_blocks", "digest_inputs", "digest_tensor", "pieces", "plan_facts"]

_T = TypeVar("_T")
_R = TypeVar("_R")

_PIECE = 2**20  # bytes that are read at once
_LONG = 2 * 2**30  # bytes from which a bar is shown


def digest_tensor(tensor: Tensor, advance: Callable[[int], None] | None = None) -> str:
    """Return the SHA-256 digest of what a tensor holds, whatever its strides and its place.

    At most a piece of 1 MiB for each thread is copied, and only where the tensor is strided.

    Args:
        tensor: In host memory. Any shape; N is its last axis but one.
        advance: Called with the number of bytes after each piece.

    Returns:
        Hexadecimal digest of the shape, the type and all numbers in C order.

    Example:
        >>> a = torch.arange(6.0).view(2, 3)
        >>> digest_tensor(a) == digest_tensor(a.T.contiguous().T)
        True
        >>> digest_tensor(a) == digest_tensor(a.flip(0))
        False
    """
    hasher = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    for digest, size in _in_order(pieces(tensor), _digest_piece):
        hasher.update(digest)
        if advance is not None:
            advance(size)
    return hasher.hexdigest()


def digest_blocks(
    tensor: Tensor, blocks: Iterable[Range], advance: Callable[[int], None] | None = None
) -> list[str]:
    """Return the digests of ranges of tokens, each over all batch entries and heads.

    Args:
        tensor: In host memory. Shape: (B, H, N, ...).
        blocks: Ranges of tokens.
        advance: Called with the number of bytes after each range.

    Example:
        >>> a = torch.zeros(1, 1, 6, 2)
        >>> first, second, third = digest_blocks(a, [(0, 2), (2, 4), (4, 5)])
        >>> first == second, second == third
        (True, False)
    """

    def digest(block: Range) -> tuple[str, int]:
        part = tensor[:, :, slice(*block)]
        hasher = hashlib.sha256(f"{tuple(part.shape)} {part.dtype}".encode())
        for piece in pieces(part):
            hasher.update(_digest_piece(piece)[0])
        return hasher.hexdigest(), part.numel() * part.element_size()

    digests = []
    for text, size in _in_order(blocks, digest):
        digests.append(text)
        if advance is not None:
            advance(size)
    return digests


def digest_inputs(
    inputs: Mapping[str, Tensor], *, blocks: Mapping[str, Sequence[Range]] | None = None,
    progress: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Return what tells inputs apart, by name: shape, type and digest.

    Each input is read whole at every call: neither the time nor the number of a file changes
    reliably with what is written through a map of it.

    Args:
        inputs: In host memory. Shape of each: (B, H, N, ...).
        blocks: Ranges of tokens by the name of the input, whose digests take the place of that of
            the whole input.
        progress: Whether to show a bar, from 2 GiB on.

    Returns:
        For each input ``shape``, ``dtype`` and ``sha256``, a digest or a list of digests.
    """
    total = sum(x.numel() * x.element_size() for x in inputs.values())
    facts = {}
    with byte_bar("reading the inputs", total, show=progress and total >= _LONG) as advance:
        for name, tensor in inputs.items():
            digest: str | list[str]
            if blocks is None:
                digest = digest_tensor(tensor, advance)
            else:
                digest = digest_blocks(tensor, blocks[name], advance)
            facts[name] = {
                "shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch."),
                "sha256": digest,
            }  # fmt: skip
    return facts


def plan_facts(plan: ExecutionPlan) -> dict[str, Any]:
    """Return what a plan does that decides the bits of a result, in types that JSON knows."""
    spec = {field.name: repr(getattr(plan.spec, field.name)) for field in fields(plan.spec)}
    return spec | {
        "schedule": plan.schedule, "head_step": list(plan.head_step),
        "tile": list(plan.tile), "chunks": plan.chunks, "depth": plan.cut.depth,
        "passes": plan.passes, "shard": list(plan.shard),
    }  # fmt: skip


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Cut a tensor into pieces in C order, at places that its shape alone decides."""
    size = tensor.numel() * tensor.element_size()
    if size <= _PIECE:
        yield tensor.detach()
    elif len(tensor) == 1:
        yield from pieces(tensor[0])
    else:
        step = max(1, _PIECE * len(tensor) // size)
        for at in range(0, len(tensor), step):
            yield from pieces(tensor[at : at + step])


def _digest_piece(piece: Tensor) -> tuple[bytes, int]:
    """Digest of a piece, and its bytes."""
    data = piece.contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data.data).digest(), data.nbytes


def _in_order(items: Iterable[_T], work: Callable[[_T], _R]) -> Iterator[_R]:
    """Do work on items in threads, as many as PyTorch uses, and give the results in order."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[_R]] = deque()
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 2 * threads:  # else all pieces would be cut at once
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
