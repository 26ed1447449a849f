"""Stream-CQSA: language models for sequences whose attention is streamed.

The parts are imported on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulgurite.lazy import lazy_attributes

if TYPE_CHECKING:
    from fulgurite.models.stream_cqsa.losses import (
        chunked_cross_entropy,
        mask_tokens,
        token_scores,
    )
    from fulgurite.models.stream_cqsa.module import LanguageModel, MaskedLanguageModel
    from fulgurite.models.stream_cqsa.network import (
        Decoder,
        Encoder,
        HuggingFaceCausalLM,
        LanguageNetwork,
    )

_MODULES = {
    "losses": ("chunked_cross_entropy", "mask_tokens", "token_scores"),
    "module": ("LanguageModel", "MaskedLanguageModel"),
    "network": ("Decoder", "Encoder", "HuggingFaceCausalLM", "LanguageNetwork"),
}

__all__ = [
    "Decoder",
    "Encoder",
    "HuggingFaceCausalLM",
    "LanguageModel",
    "LanguageNetwork",
    "MaskedLanguageModel",
    "chunked_cross_entropy",
    "mask_tokens",
    "token_scores",
]

__getattr__, __dir__ = lazy_attributes(__name__, _MODULES)
