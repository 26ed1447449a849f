"""Models as flat vectors, and sums of them that are the same for any number of ranks.

Axes: P flat state size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fulgurite.devices import move
from fulgurite.errors import ConfigError
from fulgurite.models.fedsir.federation.ranks import all_reduce

__all__ = ["ClientStates", "FlatState", "exact_average"]

ClientStates = dict[int, Tensor]  # client -> flat state (P,); a rank holds those of its clients


class FlatState:
    """Reads and writes all floating tensors of a module as one vector.

    BatchNorm's running statistics are part of it; integer buffers (its counters), which no method
    averages, are not: writing a state sets them back to what they were at first, since they would
    otherwise tell how many batches this rank happened to train.

    Args:
        module: Its parameters and buffers, in ``state_dict`` order.
    """

    def __init__(self, module: nn.Module) -> None:
        tensors = module.state_dict().values()
        self.tensors = [t for t in tensors if t.is_floating_point()]
        self.counters = [(t, t.clone()) for t in tensors if not t.is_floating_point()]
        self.splits = [t.numel() for t in self.tensors]
        self.size: int = sum(self.splits)

    def read(self) -> Tensor:
        """A copy of the module's state. Shape: (P,)."""
        return torch.cat([t.detach().reshape(-1) for t in self.tensors])

    @torch.no_grad()
    def write(self, state: Tensor) -> None:
        """Set the module's state in place. Shape: (P,)."""
        for tensor, part in zip(self.tensors, torch.split(state, self.splits), strict=True):
            tensor.copy_(part.view_as(tensor))
        for counter, first in self.counters:
            counter.copy_(first)


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
        largest = [part.abs().max() for part in torch.split(term, list(splits))]
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
