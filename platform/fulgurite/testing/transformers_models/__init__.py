"""Tiny models of Hugging Face transformers, and what each computes in a mode.

A mode is how a model is used: trained on whole sequences, on padded ones or on packed documents,
asked to generate, and so on. Everything runs through the Trainer and in double precision, so that
the same model under two strategies can be compared; see :mod:`fulgurite.testing.attention_judge`.

Axes: B batch, N tokens.
"""

from fulgurite.testing.transformers_models.architectures import (
    ARCHITECTURES,
    EXTRA_MODES,
    MODES,
    Architecture,
    select_architectures,
)
from fulgurite.testing.transformers_models.batches import take_modes
from fulgurite.testing.transformers_models.building import build_model
from fulgurite.testing.transformers_models.values import Values, compute_values, measure_influence

__all__ = [
    "ARCHITECTURES",
    "EXTRA_MODES",
    "MODES",
    "Architecture",
    "Values",
    "build_model",
    "compute_values",
    "measure_influence",
    "select_architectures",
    "take_modes",
]
