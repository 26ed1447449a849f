"""Networks from tokens to logits, which several systems hand over.

Axes: B sequences, N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fulgurite.export.exportable import ExportableNetwork, Port

__all__ = ["describe_token_network"]


def describe_token_network(
    network: nn.Module,
    *,
    tokens: int,
    vocab_size: int,
    length: int | None,
    weights: nn.Module | None = None,
    facts: Mapping[str, Any] | None = None,
) -> ExportableNetwork:
    """Describe a network that makes logits (B, N, V) of tokens (B, N).

    Args:
        network: The network.
        tokens: Number of different tokens that it reads.
        vocab_size: Number of different tokens that it predicts, V.
        length: N, where the network is traced for one length; None for any.
        weights: The module whose weights are exported alone.
        facts: What else a user has to know.

    Example:
        >>> network = nn.Embedding(5, 5)
        >>> described = describe_token_network(network, tokens=5, vocab_size=5, length=None)
        >>> print(described.outputs[0])
        logits: float32 (batch, length, 5), of the next token; softmax gives probabilities
    """
    axis: int | str = "length" if length is None else length

    def make_inputs(lengths: Mapping[str, int], generator: torch.Generator) -> tuple[Tensor, ...]:
        shape = (lengths["batch"], length or lengths["length"])
        return (torch.randint(0, tokens, shape, generator=generator),)

    return ExportableNetwork(
        network.eval(),
        inputs=(Port("tokens", torch.int64, ("batch", axis), f"from 0 to {tokens - 1}"),),
        outputs=(
            Port(
                "logits",
                torch.float32,
                ("batch", axis, vocab_size),
                "of the next token; softmax gives probabilities",
            ),
        ),
        axes={"batch": (2, 1, 5)} | ({"length": (7, 1, 33)} if length is None else {}),
        make_inputs=make_inputs,
        weights=weights,
        facts=facts or {},
    )
