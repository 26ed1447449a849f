"""How many clients train in one pass, measured: one after the other, or in groups of some sizes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

import torch
from lightning.pytorch.utilities import rank_zero_info

from fulgurite.errors import ConfigError
from fulgurite.models.fedsir.federation.federation import Federation
from fulgurite.models.fedsir.federation.objectives import LogitLoss

__all__ = ["choose_group_size", "fastest_group_size", "time_group_sizes"]

_SIZES = (10, 50)  # beyond, weights of a group leave the caches
_LOOPED = 8  # clients that are timed one after the other
_PURPOSE = "group size"  # key of the random numbers


def time_group_sizes(federation: Federation, sizes: Iterable[int]) -> dict[int, float]:
    """Seconds that a client's local training takes, by the number of clients in one pass.

    Clients train one epoch by cross-entropy, twice, of which the second time counts. Nothing that
    a run depends on changes: models are thrown away, and random numbers have a key of their own.

    Args:
        federation: The clients of this process; it counts no costs for these trainings.
        sizes: Numbers of clients in one pass; 0 is one after the other. A size that the network or
            the number of clients does not allow is left out.
    """
    seconds: dict[int, float] = {}
    trained = federation.vectorize
    try:
        for size in sizes:
            clients = range(min(size or _LOOPED, federation.num_clients))
            federation.vectorize = size
            try:
                _train(federation, clients)
                begun = time.perf_counter()
                _train(federation, clients)
            except ConfigError:
                if not size:
                    raise
                continue  # an operation that cannot be mapped over clients
            seconds[size] = (time.perf_counter() - begun) / len(clients)
    finally:
        federation.vectorize = trained
    return seconds


def _train(federation: Federation, clients: Sequence[int]) -> None:
    loss = LogitLoss()
    federation.train_local(clients, lambda client: loss, purpose=_PURPOSE, epochs=1)
    float(federation.loss_sum.sum())  # waits for the device


def fastest_group_size(seconds: Mapping[int, float]) -> int:
    """The size of the shortest time; 0, one after the other, unless another is a tenth faster.

    Example:
        >>> fastest_group_size({0: 1.0, 10: 0.4, 50: 0.3}), fastest_group_size({0: 1.0, 10: 0.95})
        (50, 0)
    """
    size = min(seconds, key=seconds.__getitem__)
    return size if seconds[size] < 0.9 * seconds[0] else 0


def choose_group_size(federation: Federation, clients_per_rank: int) -> int:
    """Measure which number of clients in one pass is fastest here, and say it in one line.

    All ranks take the choice of the first, since they have equally many groups.

    Args:
        federation: The clients of this process.
        clients_per_rank: Clients that a rank trains in a round, which no group exceeds.

    Returns:
        The number of clients in one pass; 0 where one after the other is as fast.

    Source: inferred.
    """
    sizes = sorted({min(size, clients_per_rank) for size in _SIZES} - {0, 1})
    seconds = time_group_sizes(federation, (0, *sizes))
    size = int(federation.broadcast(torch.tensor(fastest_group_size(seconds))))
    times = ", ".join(
        f"{'one after the other' if not n else f'{n} in one pass'} {1e3 * s:.3g} ms"
        for n, s in seconds.items()
    )
    choice = f"{size} in one pass where the method allows it" if size else "one by one"
    rank_zero_info(f"vectorize: auto trains clients {choice} (an epoch of a client: {times}).")
    return size
