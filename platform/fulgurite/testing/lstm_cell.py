"""The fused cell of an LSTM, which torch has on a GPU alone, for the emulated device."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["lstm_cell", "lstm_cell_backward"]


def lstm_cell(
    inputs: Tensor, hidden: Tensor, cell: Tensor, *bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden state, cell and the gates for the backward pass, of the terms of the gates."""
    gates = inputs + hidden
    for term in bias:
        gates = gates if term is None else gates + term
    i, f, c, o = gates.chunk(4, 1)
    i, f, c, o = i.sigmoid(), f.sigmoid(), c.tanh(), o.sigmoid()
    after = f * cell + i * c
    return o * after.tanh(), after, torch.cat([i, f, c, o], 1)


def lstm_cell_backward(  # noqa: PLR0917  # as torch calls it
    of_hidden: Tensor | None, of_cell: Tensor | None, cell: Tensor, after: Tensor,
    workspace: Tensor, bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the gates, the cell and the biases."""
    i, f, c, o = workspace.chunk(4, 1)
    cell_output = after.tanh()
    of_hidden = torch.zeros_like(after) if of_hidden is None else of_hidden
    total = of_hidden * o * (1 - cell_output * cell_output) + (0 if of_cell is None else of_cell)
    of_gates = [
        total * c * i * (1 - i), total * cell * f * (1 - f), total * i * (1 - c * c),
        of_hidden * cell_output * o * (1 - o),
    ]  # fmt: skip
    gates = torch.cat(of_gates, 1)
    return gates, total * f, gates.sum(0) if bias else gates.new_zeros(0)
