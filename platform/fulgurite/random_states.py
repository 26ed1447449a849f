"""States of random number generators, which a run that goes on takes up."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

__all__ = ["gather_random_states", "set_random_state"]


def gather_random_states(generators: Sequence[torch.Generator]) -> list[dict[str, Any]]:
    """The states of each rank, as tensors and plain types.

    Args:
        generators: Further ones than the global ones of torch, Python and NumPy.
    """
    version, keys, gauss = random.getstate()
    name, words, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    on_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    state = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if on_gpu else [],
        "python": [version, list(keys), gauss],
        "numpy": [name, [int(w) for w in words], int(position), int(has_gauss), float(cached)],
        "loaders": [generator.get_state() for generator in generators],
    }
    if not (dist.is_available() and dist.is_initialized()):
        return [state]
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, state)
    return states


def set_random_state(state: Mapping[str, Any], generators: Sequence[torch.Generator]) -> None:
    """Set all generators to a state of :func:`gather_random_states`.

    Args:
        state: That of one rank.
        generators: As when it was gathered; left as they are if they are fewer or more now.
    """
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, words, *gauss_state = state["numpy"]
    np.random.set_state((name, np.array(words, np.uint32), *gauss_state))  # noqa: NPY002
    states = state.get("loaders", [])  # not in older checkpoints
    if len(states) == len(generators):
        for generator, loader_state in zip(generators, states, strict=True):
            generator.set_state(loader_state)
