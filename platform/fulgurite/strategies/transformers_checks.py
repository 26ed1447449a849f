"""What streamed attention refuses of Hugging Face transformers, by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fulgurite.errors import ConfigError
from fulgurite.strategies.stream_mask import StreamMask

__all__ = ["check_direction", "check_implementation", "refuse_options"]

# What models hand on to every attention implementation and what PyTorch's leaves aside with
# reason: facts of the call that are in the mask, in query and key, or in the model's output.
_HARMLESS = frozenset({
    "cache_position", "config", "cu_seqlens", "deterministic", "hidden_states", "logits_to_keep",
    "max_length_k", "max_length_q", "num_items_in_batch", "output_hidden_states",
    "past_key_value", "past_key_values", "position_embeddings", "position_ids", "return_dict",
    "token_type_ids", "use_cache",
})  # fmt: skip


# Modules of transformers.integrations whose functions compute attention as streamed attention does
_EXACT = frozenset({
    "eager_paged", "flash_attention", "flash_paged", "flex_attention", "sdpa_attention",
    "sdpa_paged",
})  # fmt: skip


def refuse_options(module: nn.Module, others: dict[str, Any]) -> None:
    """Name what streamed attention cannot do.

    Args:
        module: Whose attention it is.
        others: Options that it has no field for.

    Raises:
        ConfigError: The model uses a feature that streamed attention does not support.
    """
    who = type(module).__name__
    dropout = others.pop("dropout", 0.0)
    if dropout:
        raise ConfigError(
            f"{who} drops attention weights (p = {dropout}); streamed attention does not.",
            "Set the attention dropout of the model to 0.",
        )
    config = getattr(module, "config", None)
    if others.pop("output_attentions", None) or getattr(config, "output_attentions", False):
        raise ConfigError(
            f"{who} is to return attention weights (output_attentions), which streamed attention "
            "never has.",
            "Leave out output_attentions, or use --trainer.strategy=auto.",
        )
    unknown = [
        name
        for name, value in others.items()
        if value is not None and value is not False and name not in _HARMLESS
    ]
    if unknown:
        raise ConfigError(
            f"{who} gives its attention {', '.join(sorted(unknown))}, which streamed attention "
            "does not know.",
            "Use --trainer.strategy=auto.",
        )


def check_direction(module: nn.Module, mask: StreamMask) -> None:
    """Refuse a causal mask of a module that says that it is not causal.

    transformers leaves a causal mask out where there is no padding, and such a module then sees
    all keys; where there is padding, it gets the mask. With eager attention the mask always counts.

    Args:
        module: Whose attention it is.
        mask: The mask that it gets.

    Raises:
        ConfigError: The module is not causal, and its mask is.
    """
    if mask.dtype != torch.bool or getattr(module, "is_causal", True):
        return
    visible, *others = mask.source.visible
    is_square = visible.queries == visible.keys > 1
    sees_itself_alone = all(part.end(0) <= 1 for part in (visible, *others))  # the first query
    if mask.source.is_interval and is_square and sees_itself_alone:
        raise ConfigError(
            f"{type(module).__name__} has is_causal=False, and its model asks for a causal mask: "
            "whether queries see later keys depends on padding then.",
            "Load the model with attn_implementation='eager', where the mask counts, or let the "
            "model make a bidirectional mask.",
        )


def check_implementation(config: Any, function: Any) -> None:
    """Refuse to replace an implementation that may compute something else.

    Args:
        config: Configuration of a model.
        function: What is registered as its implementation; None where the model's own code is.

    Raises:
        ConfigError: The implementation is not one of transformers.
    """
    if function is None:
        return
    package, _, module = getattr(function, "__module__", "").rpartition(".")
    if package == "transformers.integrations" and module in _EXACT:
        return
    raise ConfigError(
        f"{type(config).__name__} asks for the attention {config._attn_implementation!r}, which is "
        "not of transformers and may compute something else than streamed attention does.",
        "Use --trainer.strategy=auto, or attn_implementation='sdpa' in the model.",
    )
