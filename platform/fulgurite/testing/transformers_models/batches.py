"""Batches that a mode feeds to a model.

Axes: B batch, N tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fulgurite.testing.transformers_models.architectures import (
    _MASKS_4D,
    BATCH,
    DECODED,
    TOKENS,
    VOCABULARY,
    Architecture,
)

__all__ = ["Batch", "make_batch", "take_modes"]


@dataclass(frozen=True)
class Batch:
    """Inputs of a forward call.

    Attributes:
        inputs: Keywords of the model.
        real: Which tokens of the output are no padding; None for all. Shape: (B, N).
    """

    inputs: dict[str, Any]
    real: Tensor | None = None


def take_modes(architecture: Architecture, model: Any) -> list[str]:
    """Return the modes that can be asked of an architecture.

    Args:
        architecture: Which.
        model: Its model.
    """
    parameters = inspect.signature(model.forward).parameters
    kind = architecture.kind
    modes = ["plain"]
    if kind in ("causal", "masked", "text", "seq2seq", "speech") and "attention_mask" in parameters:
        modes.append("right_padding")
    if kind in ("causal", "masked", "text", "seq2seq") and "attention_mask" in parameters:
        modes.append("left_padding")
    if kind == "causal" and "position_ids" in parameters:
        modes.append("packed")
    if kind in ("causal", "seq2seq", "speech2seq") and hasattr(model, "generate"):
        modes.append("generate")
        if kind != "speech2seq":
            modes.append("generate_left_padding")
        if kind == "seq2seq":
            modes.append("generate_right_padding")
    if kind in ("causal", "seq2seq", "speech2seq"):
        modes.append("causality")
    return [x for x in (*modes, *architecture.extra_modes) if x not in architecture.ambiguous]


def _draw_tokens(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, shape, generator=generator)  # 0 to 2 are special


def _draw_numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _mask_padding(side: str, tokens: int, row: int = 1) -> Tensor:
    mask = torch.ones(BATCH, tokens, dtype=torch.int64)
    mask[row, tokens * 2 // 3 :] = 0
    return mask.flip(1) if side == "left" else mask


def _mark_first_real(mask: Tensor) -> Tensor:
    # the label of the first real token is predicted from what is left of it, which is padding
    return (mask.cumsum(1) == 1) & mask.bool()


def _make_text_batch(architecture: Architecture, mode: str) -> Batch:
    tokens = _draw_tokens(BATCH, TOKENS)
    inputs: dict[str, Any] = {"input_ids": tokens}
    real, side = torch.ones_like(tokens, dtype=torch.bool), "right"
    if mode != "right_padding":
        side = "left"
    if mode in ("right_padding", "left_padding", "checkpointing"):
        mask = _mask_padding(side, TOKENS)
        real = mask.bool()
        inputs |= {"input_ids": tokens.where(real, 0), "attention_mask": mask}
    if architecture.kind == "causal":
        labeled = real & ~_mark_first_real(mask) if "attention_mask" in inputs else real
        inputs["labels"] = tokens.where(labeled, -100)
    elif architecture.kind == "masked":
        inputs["labels"] = _draw_tokens(BATCH, TOKENS, seed=1).where(real, -100)
    elif architecture.kind == "seq2seq":
        decoder, labels = (_draw_tokens(BATCH, DECODED, seed=seed) for seed in (1, 2))
        real = torch.ones_like(decoder, dtype=torch.bool)
        if "attention_mask" in inputs:
            mask = _mask_padding(side, DECODED, row=0)
            real = mask.bool()
            inputs["decoder_attention_mask"] = mask
        inputs |= {"decoder_input_ids": decoder.where(real, 0), "labels": labels.where(real, -100)}
    if mode == "packed":
        # each sequence has documents of its own
        starts = ([0, 20, 33], [0, 11, 40])
        positions = torch.stack([_restart_positions(row, TOKENS) for row in starts])
        inputs |= {"position_ids": positions, "use_cache": False}
    if mode == "prefix" or architecture.needs_token_types:
        # the first tokens see each other both ways; whether 0 or 1 says so is the model's matter
        types = torch.ones(BATCH, TOKENS, dtype=torch.int64)
        types[0, :20] = types[1, :33] = 0
        inputs["token_type_ids"] = types
    if mode in _MASKS_4D:
        inputs["attention_mask"] = _draw_mask_4d(mode)
    return Batch(inputs, real)


def _restart_positions(starts: Sequence[int], tokens: int) -> Tensor:
    stops = [*starts[1:], tokens]
    return torch.cat([torch.arange(b - a) for a, b in zip(starts, stops, strict=True)])


def _draw_mask_4d(mode: str) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    shape = (BATCH, 1, TOKENS, TOKENS)
    visible = (torch.rand(shape, generator=generator) < 0.6).tril() | torch.eye(TOKENS).bool()
    if mode == "mask_4d_bool":
        return visible
    lowest = torch.finfo(torch.float64).min
    bias = _draw_numbers(*shape) if mode == "bias_4d" else torch.zeros(shape).double()
    return bias.masked_fill(~visible, lowest)


def make_batch(architecture: Architecture, model: Any, mode: str) -> Batch:
    """The batch that a model of an architecture gets in a mode."""
    kind, config = architecture.kind, model.config
    if kind == "vision":
        size = (config.num_channels, config.image_size, config.image_size)
        return Batch({"pixel_values": _draw_numbers(BATCH, *size)})
    if kind == "speech":
        samples = 768
        wave = _draw_numbers(BATCH, samples)
        if mode != "right_padding":
            return Batch({"input_values": wave})
        mask = _mask_padding("right", samples)
        frames = model._get_feat_extract_output_lengths(mask.sum(1))
        real = torch.arange(int(frames.max())) < frames[:, None]
        return Batch({"input_values": wave * mask, "attention_mask": mask}, real)
    if kind == "speech2seq":
        features = _draw_numbers(BATCH, 8, 2 * config.max_source_positions)
        if architecture.name == "speech_to_text":
            features = features.mT.contiguous()  # time first
        decoder, labels = (_draw_tokens(BATCH, DECODED, seed=seed) for seed in (1, 2))
        return Batch({"input_features": features, "decoder_input_ids": decoder, "labels": labels})
    return _make_text_batch(architecture, mode)
