"""CS-ARM-BN: BatchNorm that adapts to a plate by its control images.

The parts are imported on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulgurite.lazy import lazy_attributes

if TYPE_CHECKING:
    from fulgurite.models.cs_arm_bn.adaptation import adapt, load_statistics, stored_statistics
    from fulgurite.models.cs_arm_bn.batch_statistics import adaptive_weight, merge_groups
    from fulgurite.models.cs_arm_bn.batchnorm import (
        Context,
        ContextBatchNorm1d,
        ContextBatchNorm2d,
        context,
    )
    from fulgurite.models.cs_arm_bn.conversion import convert_batchnorm, revert_batchnorm
    from fulgurite.models.cs_arm_bn.embedding import EmbeddingHead
    from fulgurite.models.cs_arm_bn.methods.adaptive_risk import ARMCML, ARMLL
    from fulgurite.models.cs_arm_bn.methods.alignment import DANN, DeepCORAL
    from fulgurite.models.cs_arm_bn.methods.base import Method
    from fulgurite.models.cs_arm_bn.methods.probes import TVN, LinearProbe
    from fulgurite.models.cs_arm_bn.methods.statistics import (
        ARMBN,
        CSARMBN,
        ERM,
        AdaBN,
        AdaptiveWeight,
        ControlsOnly,
        Weighted,
    )
    from fulgurite.models.cs_arm_bn.methods.tent import TENT
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
    "adaptation": ("adapt", "load_statistics", "stored_statistics"),
    "batch_statistics": ("adaptive_weight", "merge_groups"),
    "batchnorm": ("Context", "ContextBatchNorm1d", "ContextBatchNorm2d", "context"),
    "conversion": ("convert_batchnorm", "revert_batchnorm"),
    "embedding": ("EmbeddingHead",),
    "methods.adaptive_risk": ("ARMCML", "ARMLL"),
    "methods.alignment": ("DANN", "DeepCORAL"),
    "methods.base": ("Method",),
    "methods.probes": ("TVN", "LinearProbe"),
    "methods.statistics": (
        "ARMBN",
        "CSARMBN",
        "ERM",
        "AdaBN",
        "AdaptiveWeight",
        "ControlsOnly",
        "Weighted",
    ),
    "methods.tent": ("TENT",),
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
