"""FedSIR: spectral client identification and relabeling, and its baselines.

The pure functions are imported on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulgurite.lazy import lazy_attributes

if TYPE_CHECKING:
    from fulgurite.models.fedsir.aggregation import (
        distance_aware_weights,
        distance_to_clean,
        sample_weights,
    )
    from fulgurite.models.fedsir.identification import ClientSplit, split_clients
    from fulgurite.models.fedsir.losses import (
        adjusted_distillation,
        log_prior,
        logit_adjusted_cross_entropy,
        ramp,
        selective_distillation,
    )
    from fulgurite.models.fedsir.module import FederatedClassifier
    from fulgurite.models.fedsir.network import (
        DigitsNet,
        FeatureNetwork,
        ResNet18,
        ResNet34,
        ResNet50,
        SmallCNN,
    )
    from fulgurite.models.fedsir.relabeling import (
        ClientReference,
        References,
        Relabeling,
        aggregate_references,
        choose_k,
        client_reference,
        relabel,
    )
    from fulgurite.models.fedsir.spectra import (
        ClassSpectra,
        SpectraAccumulator,
        class_spectra,
        client_score,
        similarity,
    )

_MODULES = {
    "aggregation": (
        "distance_aware_weights",
        "distance_to_clean",
        "sample_weights",
    ),
    "identification": ("ClientSplit", "split_clients"),
    "losses": (
        "adjusted_distillation",
        "log_prior",
        "logit_adjusted_cross_entropy",
        "ramp",
        "selective_distillation",
    ),
    "module": ("FederatedClassifier",),
    "network": ("DigitsNet", "FeatureNetwork", "ResNet18", "ResNet34", "ResNet50", "SmallCNN"),
    "relabeling": (
        "ClientReference",
        "References",
        "Relabeling",
        "aggregate_references",
        "choose_k",
        "client_reference",
        "relabel",
    ),
    "spectra": (
        "ClassSpectra",
        "SpectraAccumulator",
        "class_spectra",
        "client_score",
        "similarity",
    ),
}

__all__ = [
    "ClassSpectra",
    "ClientReference",
    "ClientSplit",
    "DigitsNet",
    "FeatureNetwork",
    "FederatedClassifier",
    "References",
    "Relabeling",
    "ResNet18",
    "ResNet34",
    "ResNet50",
    "SmallCNN",
    "SpectraAccumulator",
    "adjusted_distillation",
    "aggregate_references",
    "choose_k",
    "class_spectra",
    "client_reference",
    "client_score",
    "distance_aware_weights",
    "distance_to_clean",
    "log_prior",
    "logit_adjusted_cross_entropy",
    "ramp",
    "relabel",
    "sample_weights",
    "selective_distillation",
    "similarity",
    "split_clients",
]

__getattr__, __dir__ = lazy_attributes(__name__, _MODULES)
