"""A language model of numbers on its own: from tokens to logits.

Axes: B batch, L tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite.errors import ConfigError
from fulgurite.export.exportable import ExportableNetwork
from fulgurite.export.tokens import describe_token_network

__all__ = ["export_language_model"]


class TokenPredictor(nn.Module):
    """Embedding, backbone and head, of sequences that are one document each.

    Args:
        embedding: The input table.
        backbone: Makes hidden states from embedded tokens.
        head: The output table; None where it is the embedding.

    Shape: (B, L) to (B, L, V).
    """

    def __init__(
        self, embedding: nn.Embedding, backbone: nn.Module, head: nn.Embedding | None
    ) -> None:
        super().__init__()
        self.embedding, self.backbone, self.head = embedding, backbone, head

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of all tokens."""
        table = self.embedding if self.head is None else self.head
        return F.linear(cast("Tensor", self.backbone(self.embedding(tokens))), table.weight)


def export_language_model(
    embedding: nn.Embedding,
    backbone: nn.Module,
    head: nn.Embedding | None,
    *,
    data: Any,
    number_ids: Mapping[int, int],
) -> ExportableNetwork:
    """Describe a language model of numbers.

    Backbones that go through a sequence chunk by chunk are traced for the length of the training
    sequences, others for any.

    Args:
        embedding: The input table; copied, as are the others.
        backbone: The backbone.
        head: The output table; None where it is the embedding.
        data: The DataModule.
        number_ids: Token of each number.

    Raises:
        ConfigError: The backbone needs a length, and the DataModule has no ``sequence_length``.
    """
    network = TokenPredictor(*copy.deepcopy((embedding, backbone, head))).eval()
    length: int | None = None
    if getattr(backbone, "traces_one_length", False):
        length = getattr(data, "sequence_length", None)
        if length is None:
            raise ConfigError(
                f"{type(backbone).__name__} is exported for one length of sequences, which "
                f"{type(data).__name__} does not tell.",
                "Give it an attribute sequence_length.",
            )
    vocab_size = embedding.num_embeddings
    facts: dict[str, Any] = {
        "numbers": {str(number): token for number, token in sorted(number_ids.items())},
        "documents": "one in each sequence",
    }
    if tokenizer := getattr(data, "hparams", {}).get("tokenizer"):
        facts["tokenizer"] = tokenizer
    return describe_token_network(
        network, tokens=vocab_size, vocab_size=vocab_size, length=length, facts=facts
    )
