"""Ice layers: completing broken and absent radar layers, conditioned on climate physics.

The parts are imported on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulgurite.lazy import lazy_attributes

if TYPE_CHECKING:
    from fulgurite.domains.ice_layers.details import FlightDetails
    from fulgurite.domains.ice_layers.geodesy import haversine
    from fulgurite.models.ice_layers.baselines.interpolation import (
        along_then_across,
        along_track,
        fit_ridge,
        layer_means,
        own_layer_mean,
    )
    from fulgurite.models.ice_layers.baselines.kriging import Kriging
    from fulgurite.models.ice_layers.baselines.kriging_fit import fit_kriging
    from fulgurite.models.ice_layers.baselines.options import (
        KrigingFitOptions,
        LineOptions,
        RegressionOptions,
    )
    from fulgurite.models.ice_layers.data.graph import (
        Track,
        adjacency,
        edges,
    )
    from fulgurite.models.ice_layers.data.hiding import (
        StructuredHiding,
        held_out,
    )
    from fulgurite.models.ice_layers.networks.completion_net import (
        CompletionNet,
    )
    from fulgurite.models.ice_layers.networks.features import (
        PhysicsPrior,
        find_contradicted,
        input_features,
        nearby_means,
        side_features,
    )
    from fulgurite.models.ice_layers.networks.options import (
        InputOptions,
        SpatialOptions,
        TransformerOptions,
    )
    from fulgurite.models.ice_layers.networks.spatial import (
        Neighbourhood,
        SageLayer,
        SpatialEncoder,
        TraceAttention,
    )
    from fulgurite.models.ice_layers.networks.temporal import (
        LayerMixing,
        LayerTransformer,
    )
    from fulgurite.models.ice_layers.output.completion import (
        Gaps,
        complete,
        measure_gaps,
        provenance,
    )
    from fulgurite.models.ice_layers.output.netcdf import (
        read_netcdf,
        write_netcdf,
    )
    from fulgurite.models.ice_layers.output.origin import Origin
    from fulgurite.models.ice_layers.output.stacks import (
        CompletedStack,
        StackMetadata,
        read_npz,
        write_npz,
    )
    from fulgurite.models.ice_layers.training.baseline_module import (
        BaselineCompletion,
    )
    from fulgurite.models.ice_layers.training.deep import (
        DeepLayerPredictor,
    )
    from fulgurite.models.ice_layers.training.losses import (
        masked_robust_loss,
    )
    from fulgurite.models.ice_layers.training.metrics import (
        CompletionMetrics,
        MaskedMAE,
        MaskedRMSE,
        Targets,
    )
    from fulgurite.models.ice_layers.training.module import (
        IceCompletion,
    )
    from fulgurite.models.ice_layers.training.options import (
        BaselinePrediction,
        CompletionInputs,
        CompletionLoss,
        CompletionPrediction,
        DeepInputs,
        LossOptions,
        PredictionOptions,
    )
    from fulgurite.models.ice_layers.training.schedule import (
        TwoStageLR,
        two_stage,
    )
    from fulgurite.models.ice_layers.training.uncertainty import (
        Calibration,
        coverage,
    )

_MODULES = {
    "training.baseline_module": ("BaselineCompletion",),
    "baselines.interpolation": (
        "along_then_across",
        "along_track",
        "fit_ridge",
        "layer_means",
        "own_layer_mean",
    ),
    "output.completion": ("Gaps", "complete", "measure_gaps", "provenance"),
    "training.deep": ("DeepLayerPredictor",),
    "output.origin": ("Origin",),
    "networks.features": (
        "PhysicsPrior",
        "find_contradicted",
        "input_features",
        "nearby_means",
        "side_features",
    ),
    "data.graph": ("Track", "adjacency", "edges", "haversine"),
    "data.hiding": ("StructuredHiding", "held_out"),
    "baselines.kriging": ("Kriging",),
    "baselines.kriging_fit": ("fit_kriging",),
    "baselines.options": ("KrigingFitOptions", "LineOptions", "RegressionOptions"),
    "training.losses": ("masked_robust_loss",),
    "training.metrics": ("CompletionMetrics", "MaskedMAE", "MaskedRMSE", "Targets"),
    "training.module": ("IceCompletion",),
    "training.options": (
        "BaselinePrediction",
        "CompletionInputs",
        "CompletionLoss",
        "CompletionPrediction",
        "DeepInputs",
        "LossOptions",
        "PredictionOptions",
    ),
    "output.netcdf": ("read_netcdf", "write_netcdf"),
    "networks.completion_net": ("CompletionNet",),
    "networks.options": ("InputOptions", "SpatialOptions", "TransformerOptions"),
    "output.stacks": (
        "CompletedStack",
        "FlightDetails",
        "StackMetadata",
        "read_npz",
        "write_npz",
    ),
    "training.schedule": ("TwoStageLR", "two_stage"),
    "networks.spatial": ("Neighbourhood", "SageLayer", "SpatialEncoder", "TraceAttention"),
    "networks.temporal": ("LayerMixing", "LayerTransformer"),
    "training.uncertainty": ("Calibration", "coverage"),
}

__all__ = [
    "BaselineCompletion",
    "BaselinePrediction",
    "Calibration",
    "CompletedStack",
    "CompletionInputs",
    "CompletionLoss",
    "CompletionMetrics",
    "CompletionNet",
    "CompletionPrediction",
    "DeepInputs",
    "DeepLayerPredictor",
    "FlightDetails",
    "Gaps",
    "IceCompletion",
    "InputOptions",
    "Kriging",
    "KrigingFitOptions",
    "LayerMixing",
    "LayerTransformer",
    "LineOptions",
    "LossOptions",
    "MaskedMAE",
    "MaskedRMSE",
    "Neighbourhood",
    "Origin",
    "PhysicsPrior",
    "PredictionOptions",
    "RegressionOptions",
    "SageLayer",
    "SpatialEncoder",
    "SpatialOptions",
    "StackMetadata",
    "StructuredHiding",
    "Targets",
    "TraceAttention",
    "Track",
    "TransformerOptions",
    "TwoStageLR",
    "adjacency",
    "along_then_across",
    "along_track",
    "complete",
    "coverage",
    "edges",
    "find_contradicted",
    "fit_kriging",
    "fit_ridge",
    "haversine",
    "held_out",
    "input_features",
    "layer_means",
    "masked_robust_loss",
    "measure_gaps",
    "nearby_means",
    "own_layer_mean",
    "provenance",
    "read_netcdf",
    "read_npz",
    "side_features",
    "two_stage",
    "write_netcdf",
    "write_npz",
]

__getattr__, __dir__ = lazy_attributes(__name__, _MODULES)
