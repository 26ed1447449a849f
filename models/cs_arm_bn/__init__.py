"""CS-ARM-BN: BatchNorm that adapts to a plate by its control images.

The parts are imported on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulgurite.lazy import lazy_attributes

if TYPE_CHECKING:
    from fulgurite.models.cs_arm_bn.adaptation import adapt, load_statistics, stored_statistics
    from fulgurite.models.cs_arm_bn.alignment import DANN, DeepCORAL
    from fulgurite.models.cs_arm_bn.batch_statistics import adaptive_weight, merge_groups
    from fulgurite.models.cs_arm_bn.batchnorm import (
        Context,
        ContextBatchNorm1d,
        ContextBatchNorm2d,
        context,
    )
    from fulgurite.models.cs_arm_bn.conversion import convert_batchnorm, revert_batchnorm
    from fulgurite.models.cs_arm_bn.embedding import EmbeddingHead
    from fulgurite.models.cs_arm_bn.methods import (
        ARMBN,
        ARMCML,
        ARMLL,
        CSARMBN,
        ERM,
        TENT,
        TVN,
        AdaBN,
        AdaptiveWeight,
        ControlsOnly,
        LinearProbe,
        Method,
        Weighted,
    )
    from fulgurite.models.cs_arm_bn.metrics import (
        Predictions,
        confusion,
        scores,
    )
    from fulgurite.models.cs_arm_bn.module import (
        PlateClassifier,
    )
    from fulgurite.models.cs_arm_bn.network import (
        Backbone,
        ResNet18,
        ResNet50,
        SmallResNet,
    )
    from fulgurite.models.cs_arm_bn.options import AdaptationOptions
    from fulgurite.models.cs_arm_bn.variation import (
        fit_tvn,
        tvn,
    )

_MODULES = {
    "alignment": ("DANN", "DeepCORAL"),
    "adaptation": ("adapt", "load_statistics", "stored_statistics"),
    "batch_statistics": ("adaptive_weight", "merge_groups"),
    "batchnorm": ("Context", "ContextBatchNorm1d", "ContextBatchNorm2d", "context"),
    "conversion": ("convert_batchnorm", "revert_batchnorm"),
    "embedding": ("EmbeddingHead",),
    "methods": (
        "ARMBN",
        "ARMCML",
        "ARMLL",
        "CSARMBN",
        "ERM",
        "TENT",
        "TVN",
        "AdaBN",
        "AdaptiveWeight",
        "ControlsOnly",
        "LinearProbe",
        "Method",
        "Weighted",
    ),
    "metrics": (
        "Predictions",
        "confusion",
        "scores",
    ),
    "module": ("PlateClassifier",),
    "options": ("AdaptationOptions",),
    "network": (
        "Backbone",
        "ResNet18",
        "ResNet50",
        "SmallResNet",
    ),
    "variation": (
        "fit_tvn",
        "tvn",
    ),
}

__all__ = [
    "ARMBN",
    "ARMCML",
    "ARMLL",
    "CSARMBN",
    "DANN",
    "ERM",
    "TENT",
    "TVN",
    "AdaBN",
    "AdaptationOptions",
    "AdaptiveWeight",
    "Backbone",
    "Context",
    "ContextBatchNorm1d",
    "ContextBatchNorm2d",
    "ControlsOnly",
    "DeepCORAL",
    "EmbeddingHead",
    "LinearProbe",
    "Method",
    "PlateClassifier",
    "Predictions",
    "ResNet18",
    "ResNet50",
    "SmallResNet",
    "Weighted",
    "adapt",
    "adaptive_weight",
    "confusion",
    "context",
    "convert_batchnorm",
    "fit_tvn",
    "load_statistics",
    "merge_groups",
    "revert_batchnorm",
    "scores",
    "stored_statistics",
    "tvn",
]

__getattr__, __dir__ = lazy_attributes(__name__, _MODULES)
