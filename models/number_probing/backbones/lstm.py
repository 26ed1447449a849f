"""The LSTM backbone.

Axes: B batch, L tokens, D width, M tokens of all sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fulgurite.devices import move
from fulgurite.models.number_probing.backbones.base import EPS, check_minimum

__all__ = ["LSTMBackbone", "pack_documents"]


def pack_documents(documents: Tensor) -> tuple[Tensor, Tensor]:
    """The order in which an LSTM reads documents side by side, without padding.

    Args:
        documents: Shape: (B, L), equal ids neighbours.

    Returns:
        Index of each token among the B·L, first tokens of all documents first, longest document
        first; and for each step the number of documents that have a token there. Shapes: (M,),
        (longest,), both int64; the second on the CPU, where PyTorch needs it. Both are computed
        there, so that a device is waited for once.

    Example:
        >>> pack_documents(torch.tensor([[0, 0, 1, 1, 1]]))
        (tensor([2, 0, 3, 1, 4]), tensor([2, 2, 1]))

    Source: inferred; :class:`torch.nn.utils.rnn.PackedSequence`.
    """
    device, documents = documents.device, documents.cpu()
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    document = starts.flatten().cumsum(0) - 1  # counted through all sequences
    first = starts.flatten().nonzero()[:, 0]
    lengths = torch.diff(first, append=first.new_tensor([documents.numel()]))
    step = torch.arange(documents.numel()) - first[document]
    by_length = lengths.argsort(descending=True, stable=True)
    rank = torch.empty_like(by_length)
    rank[by_length] = torch.arange(len(lengths))
    order = (step * len(lengths) + rank[document]).argsort()
    return move(order, device), torch.bincount(step)


class LSTMBackbone(nn.Module):
    """LSTM layers, each behind a norm and beside a shortcut, or simply stacked.

    Args:
        width: D, also the width of the state.
        layers: LSTM layers.
        residual: Use norms and shortcuts; deep stacks need them.

    Shape: (B, L, D) to (B, L, D).

    Raises:
        ConfigError: A size is too small.

    Example:
        >>> LSTMBackbone(16, layers=2)(torch.zeros(2, 5, 16)).shape
        torch.Size([2, 5, 16])

    Source: docs/papers/number_probing.md section 2.2 (12 or 4 layers); widths, norms and shortcuts:
        inferred.
    """

    traces_one_length = True

    def __init__(self, width: int = 128, layers: int = 2, residual: bool = True) -> None:
        super().__init__()
        check_minimum(1, width=width, layers=layers)
        self.width, self.residual = width, residual
        lstms = [nn.LSTM(width, width, batch_first=True) for _ in range(layers)]
        self.layers = nn.ModuleList(lstms)
        self.norms = nn.ModuleList(
            nn.RMSNorm(width, EPS) if residual else nn.Identity() for _ in range(layers)
        )
        self.norm = nn.RMSNorm(width, EPS)
        for layer in lstms:
            for name, parameter in layer.named_parameters():
                if "bias" in name:
                    nn.init.zeros_(parameter)
                if name == "bias_ih_l0":  # remember at first: input, forget, cell, output gate
                    nn.init.ones_(parameter[width : 2 * width])

    def forward(self, x: Tensor, documents: Tensor | None = None) -> Tensor:
        """See :class:`~fulgurite.models.number_probing.backbones.base.CausalBackbone`."""
        if documents is None:
            return self._stack(x, None)
        order, sizes = pack_documents(documents)
        rows = self._stack(x.flatten(0, 1)[order], sizes)
        return torch.empty_like(rows).index_copy(0, order, rows).view_as(x)

    def _stack(self, x: Tensor, sizes: Tensor | None) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            normed = norm(x)
            output = (
                layer(normed)[0] if sizes is None else layer(PackedSequence(normed, sizes))[0].data
            )
            x = x + output if self.residual else output
        return self.norm(x)  # type: ignore[no-any-return]
