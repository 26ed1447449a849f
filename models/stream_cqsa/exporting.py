"""A language model on its own: from tokens to logits, with PyTorch's attention.

Streamed attention is exact, so that the network is the same; what is streamed in training fits into
memory where the exported network is used, or does not.

Axes: B batch, N tokens, H query heads, G key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite.attention.backend import Documents, InCore, backend_slots
from fulgurite.errors import ConfigError
from fulgurite.export.exportable import ExportableNetwork
from fulgurite.export.tokens import describe_token_network

__all__ = ["export_language_model"]


class WindowedAttention:
    """PyTorch's attention with a dense mask, of causal networks whose tokens see a window.

    Example:
        >>> x = torch.randn(1, 2, 5, 4)
        >>> attend = WindowedAttention()
        >>> whole = attend(x, x, x, is_causal=True, window=5)
        >>> bool(torch.allclose(whole, InCore()(x, x, x, is_causal=True), atol=1e-6))
        True
        >>> bool(torch.allclose(attend(x, x, x, is_causal=True, window=1), x))
        True
    """

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool = False,
        scale: float | None = None,
        window: int | None = None,
        prefix: int = 0,
        documents: Documents | None = None,
    ) -> Tensor:
        """See :class:`~fulgurite.attention.backend.AttentionBackend`."""
        if not is_causal or window is None or prefix or documents is not None:
            raise ConfigError(
                "Only causal attention in a window is exported with a dense mask.",
                "Export a network without prefix and documents.",
            )
        number = torch.arange(query.shape[2], device=query.device)
        back = number[:, None] - number
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=(back >= 0) & (back < window),
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )


class DocumentPredictor(nn.Module):
    """A language network whose logits are those of all tokens.

    Args:
        network: Makes hidden states, and logits of them.

    Shape: (B, N) to (B, N, V).
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of all tokens."""
        return self.network.logits(self.network(tokens))  # type: ignore[no-any-return]


def export_language_model(network: nn.Module, data: Any) -> ExportableNetwork:
    """Describe a language model whose sequences are one document each.

    Args:
        network: The language network; it is copied.
        data: The DataModule.

    Raises:
        ConfigError: The network does not say how many tokens it knows.
    """
    copied: Any = copy.deepcopy(network).eval()
    for part in copied.modules():
        # neither changes the result, and loops over chunks would fix the length
        if hasattr(part, "chunk"):
            part.chunk = None
    slots: list[Any] = list(backend_slots(copied))
    for slot in slots:
        windowed = getattr(slot, "window", None) is not None
        slot.attention_backend = WindowedAttention() if windowed else InCore()
    vocab_size = getattr(copied, "vocab_size", None)
    if not isinstance(vocab_size, int):
        raise ConfigError(
            f"The network {type(network).__name__} has no vocab_size.",
            "Give it an attribute vocab_size, the number of tokens that it predicts.",
        )
    mask = getattr(copied, "mask_token", None)
    facts: dict[str, Any] = {"documents": "one in each sequence", "data": type(data).__name__}
    if mask is not None:
        facts["mask_token"] = mask
    return describe_token_network(
        DocumentPredictor(copied),
        tokens=vocab_size + (mask is not None),
        vocab_size=vocab_size,
        length=None,
        weights=copied,
        facts=facts,
    )
