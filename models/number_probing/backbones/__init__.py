"""Causal networks between embedding and head; none of them knows tokens."""

from fulgurite.models.number_probing.backbones.base import CausalBackbone
from fulgurite.models.number_probing.backbones.lstm import LSTMBackbone
from fulgurite.models.number_probing.backbones.recurrent import (
    GatedDeltaNetBackbone,
    Mamba2Backbone,
)
from fulgurite.models.number_probing.backbones.transformer import (
    PositionOptions,
    TransformerBackbone,
)

__all__ = [
    "CausalBackbone",
    "GatedDeltaNetBackbone",
    "LSTMBackbone",
    "Mamba2Backbone",
    "PositionOptions",
    "TransformerBackbone",
]
