"""Random numbers that are a function of their use: the seed, the purpose, the round, the client."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["keyed_generator", "keyed_randomness", "mini_batches"]


def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator whose stream is a function of the key alone.

    Example:
        >>> a, b = (torch.rand(1, generator=keyed_generator(0, "x", k)) for k in (1, 1))
        >>> bool(a == b)
        True
    """
    return torch.Generator().manual_seed(_hash_key(*key))


def _hash_key(*key: int | str) -> int:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") // 2  # manual_seed takes a signed 64-bit integer


@contextmanager
def keyed_randomness(device: torch.device, *key: int | str) -> Iterator[None]:
    """Seed torch's own generators (dropout) by a key, and restore them afterwards.

    Args:
        device: Device whose generator is seeded beside that of the CPU.
        key: Key of the random numbers.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        # torch.manual_seed also queues a call, with its stack trace, for each kind of
        # accelerator that torch knows: slower than a local step, and never freed
        number = _hash_key(*key)
        torch.default_generator.manual_seed(number)
        if devices:
            with torch.cuda.device(device):  # the others' states are not restored
                torch.cuda.manual_seed(number)
        yield


def mini_batches(samples: int, size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Shuffled positions of a local epoch; a last batch of one joins the one before it.

    BatchNorm cannot train on a single sample, so the tail is merged rather than dropped.

    Example:
        >>> [len(b) for b in mini_batches(9, 4, keyed_generator(0))]
        [4, 5]
    """
    order = torch.randperm(samples, generator=generator)
    if samples % size == 1 and samples > 1:
        head, tail = order[: -size - 1], order[-size - 1 :]
        return (*(torch.split(head, size) if len(head) else ()), tail)
    return tuple(torch.split(order, size))
