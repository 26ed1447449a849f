"""Stream-CQSA: language models for sequences whose attention is streamed.

The parts are imported on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

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
_WHERE = {name: module for module, names in _MODULES.items() for name in names}

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


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
