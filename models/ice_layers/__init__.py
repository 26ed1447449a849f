"""Ice layers: completing broken and absent radar layers, conditioned on climate physics.

The parts are imported on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulgurite.lazy import lazy_attributes

if TYPE_CHECKING:
    from fulgurite.domains.ice_layers.details import FlightDetails
    from fulgurite.domains.ice_layers.geodesy import haversine
    from fulgurite.models.ice_layers.baseline_module import (
        BaselineCompletion,
    )
    from fulgurite.models.ice_layers.baselines import (
        along_then_across,
        along_track,
        fit_ridge,
        layer_means,
        own_layer_mean,
    )
    from fulgurite.models.ice_layers.completion import (
        Gaps,
        complete,
        measure_gaps,
        provenance,
    )
    from fulgurite.models.ice_layers.deep import (
        DeepLayerPredictor,
    )
    from fulgurite.models.ice_layers.details import Origin
    from fulgurite.models.ice_layers.features import (
        PhysicsPrior,
        find_contradicted,
        input_features,
        nearby_means,
        side_features,
    )
    from fulgurite.models.ice_layers.graph import (
        Track,
        adjacency,
        edges,
    )
    from fulgurite.models.ice_layers.hiding import (
        StructuredHiding,
        held_out,
    )
    from fulgurite.models.ice_layers.kriging import Kriging
    from fulgurite.models.ice_layers.kriging_fit import fit_kriging
    from fulgurite.models.ice_layers.losses import (
        masked_robust_loss,
    )
    from fulgurite.models.ice_layers.metrics import (
        CompletionMetrics,
        MaskedMAE,
        MaskedRMSE,
    )
    from fulgurite.models.ice_layers.module import (
        IceCompletion,
    )
    from fulgurite.models.ice_layers.netcdf import (
        read_netcdf,
        write_netcdf,
    )
    from fulgurite.models.ice_layers.network import (
        CompletionNet,
    )
    from fulgurite.models.ice_layers.output import (
        CompletedStack,
        read_npz,
        write_npz,
    )
    from fulgurite.models.ice_layers.schedule import (
        TwoStageLR,
        two_stage,
    )
    from fulgurite.models.ice_layers.spatial import (
        Neighbourhood,
        SageLayer,
        SpatialEncoder,
        TraceAttention,
    )
    from fulgurite.models.ice_layers.temporal import (
        LayerMixing,
        LayerTransformer,
    )
    from fulgurite.models.ice_layers.uncertainty import (
        Calibration,
        coverage,
    )

_MODULES = {
    "baseline_module": ("BaselineCompletion",),
    "baselines": (
        "along_then_across",
        "along_track",
        "fit_ridge",
        "layer_means",
        "own_layer_mean",
    ),
    "completion": ("Gaps", "complete", "measure_gaps", "provenance"),
    "deep": ("DeepLayerPredictor",),
    "details": ("Origin",),
    "features": (
        "PhysicsPrior",
        "find_contradicted",
        "input_features",
        "nearby_means",
        "side_features",
    ),
    "graph": ("Track", "adjacency", "edges", "haversine"),
    "hiding": ("StructuredHiding", "held_out"),
    "kriging": ("Kriging",),
    "kriging_fit": ("fit_kriging",),
    "losses": ("masked_robust_loss",),
    "metrics": ("CompletionMetrics", "MaskedMAE", "MaskedRMSE"),
    "module": ("IceCompletion",),
    "netcdf": ("read_netcdf", "write_netcdf"),
    "network": ("CompletionNet",),
    "output": ("CompletedStack", "FlightDetails", "read_npz", "write_npz"),
    "schedule": ("TwoStageLR", "two_stage"),
    "spatial": ("Neighbourhood", "SageLayer", "SpatialEncoder", "TraceAttention"),
    "temporal": ("LayerMixing", "LayerTransformer"),
    "uncertainty": ("Calibration", "coverage"),
}

__all__ = [
    "BaselineCompletion",
    "Calibration",
    "CompletedStack",
    "CompletionMetrics",
    "CompletionNet",
    "DeepLayerPredictor",
    "FlightDetails",
    "Gaps",
    "IceCompletion",
    "Kriging",
    "LayerMixing",
    "LayerTransformer",
    "MaskedMAE",
    "MaskedRMSE",
    "Neighbourhood",
    "Origin",
    "PhysicsPrior",
    "SageLayer",
    "SpatialEncoder",
    "StructuredHiding",
    "TraceAttention",
    "Track",
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
