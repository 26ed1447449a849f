"""Models as flat vectors, and sums of them that are the same for any number of ranks.

Axes: P flat state size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fulgurite.devices import move
from fulgurite.errors import ConfigError
from fulgurite.models.fedsir.federation.ranks import all_reduce

__all__ = ["ClientStates", "FlatState", "exact_average"]

ClientStates = dict[int, Tensor]  # client -> flat state (P,); a rank holds those of its clients


class FlatState:
    """Reads and writes all floating tensors of a module as one vector.

    BatchNorm's running statistics are part of it. What no method averages is not: integer buffers
    (BatchNorm's counters) and buffers that are not persistent. Writing a state sets them back to
    what they were at first, since they would otherwise tell which clients this rank happened to
    train. Tensors are looked up by name each time: a forward pass may put new ones in their place.

    Args:
        module: Its parameters and buffers, in ``state_dict`` order.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        states = module.state_dict()
        self.names = [n for n, t in states.items() if _is_averaged(t)]
        self.splits = [states[n].numel() for n in self.names]
        self.size: int = sum(self.splits)
        averaged = set(self.names)
        self.others = [
            (owner, key, tensor.detach().clone())
            for prefix, owner in module.named_modules()
            for key, tensor in owner.named_buffers(recurse=False, remove_duplicate=False)
            if f"{prefix}.{key}".lstrip(".") not in averaged
        ]

    def _tensors(self) -> list[Tensor]:
        states = self.module.state_dict()
        return [states[name] for name in self.names]

    def read(self) -> Tensor:
        """A copy of the module's state. Shape: (P,)."""
        return torch.cat([t.detach().reshape(-1) for t in self._tensors()])

    @torch.no_grad()
    def write(self, state: Tensor) -> None:
        """Set the module's state in place. Shape: (P,)."""
        parts = torch.split(state, self.splits)
        for tensor, part in zip(self._tensors(), parts, strict=True):
            tensor.copy_(part.view_as(tensor))
        for owner, key, first in self.others:
            current = getattr(owner, key)
            if isinstance(current, Tensor) and current.shape == first.shape:
                current.copy_(first)
            else:  # a cache that has grown, or was emptied
                setattr(owner, key, first.clone())


def _is_averaged(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def exact_average(
    states: Mapping[int, Tensor],
    weights: Mapping[int, float],
    splits: Sequence[int],
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Weighted sum of states whose value does not depend on the order or rank of the terms.

    Floating sums depend on their order, so an all-reduce over 3 ranks would differ from one over
    2. Each weighted term is rounded to a multiple of one fixed quantum per tensor (2⁻⁵² of its
    largest term, finer than float32 by far) and the integers are summed, which is exact.

    Args:
        states: Flat states of this rank's clients. Shape of each: (P,).
        weights: Weight of every client, of all ranks.
        splits: Number of entries of each tensor of a state; sums to P.
        device: Device of the result.
        dtype: Type of the result, the same on every rank.

    Returns:
        ``Σ weight · state`` over all ranks. Shape: (P,).

    Raises:
        ConfigError: A state holds NaN or an infinity: training diverged.

    Example:
        >>> states = {0: torch.tensor([1.0, 2.0]), 1: torch.tensor([3.0, 6.0])}
        >>> exact_average(states, {0: 0.5, 1: 0.5}, [2], device=torch.device("cpu"))
        tensor([2., 4.])

    Source: inferred (the paper's simulation runs in one process).
    """
    counts = move(torch.tensor(splits), device)
    peak = torch.zeros(len(splits), dtype=torch.float64, device=device)
    local_clients = [k for k in states if weights.get(k)]
    for client in local_clients:
        term = states[client].to(device).double() * weights[client]
        parts = torch.split(term, list(splits))
        largest = [p.abs().max() if p.numel() else p.new_zeros(()) for p in parts]
        peak = torch.maximum(peak, torch.stack(largest).nan_to_num(torch.inf, torch.inf))
    all_reduce(peak, "max")
    if not bool(peak.isfinite().all()):  # on every rank, so that none waits for another
        bad = [str(k) for k in local_clients if not bool(states[k].isfinite().all())]
        raise ConfigError(
            f"The local training of client {', '.join(bad) or 'of another rank'} diverged (its "
            "model has NaN or infinity).",
            "Lower the learning rate, model.init_args.optimizer.init_args.lr.",
        )
    # 62 bits hold the sum: 52 below the exponent of the largest term, the rest for their number
    bits = min(52, 62 - len(weights).bit_length())
    quantum = torch.exp2(torch.frexp(peak)[1].double() - bits).repeat_interleave(
        counts, output_size=sum(splits)
    )
    total = torch.zeros(sum(splits), dtype=torch.int64, device=device)
    for client in local_clients:
        term = states[client].to(device).double() * weights[client]
        total += (term / quantum).round().long()
    all_reduce(total, "sum")
    return (total.double() * quantum).to(dtype)
