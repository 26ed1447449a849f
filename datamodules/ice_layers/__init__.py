"""Data of ice_layers: layer thickness along flight lines, with the climate at each trace."""

from typing import TYPE_CHECKING

from fulgurite.lazy import lazy_attributes

if TYPE_CHECKING:
    from fulgurite.datamodules.ice_layers.climate.mar import MarClimate
    from fulgurite.datamodules.ice_layers.datamodule import IceLayerDataModule
    from fulgurite.datamodules.ice_layers.flights import StackSource
    from fulgurite.datamodules.ice_layers.generator.forcing import ForcedFlights, ForcedWorld
    from fulgurite.datamodules.ice_layers.generator.sred import SredWorld, SyntheticSred
    from fulgurite.datamodules.ice_layers.generator.synthetic import SyntheticFlights
    from fulgurite.datamodules.ice_layers.generator.world import World
    from fulgurite.datamodules.ice_layers.options import (
        EvaluationOptions,
        SelectionOptions,
        SplitOptions,
    )
    from fulgurite.datamodules.ice_layers.readers.completed import CompletedStacks
    from fulgurite.datamodules.ice_layers.readers.koenig import KoenigPicks
    from fulgurite.datamodules.ice_layers.readers.layer_files import (
        LayerFiles,
        PickOptions,
        SegmentSelection,
    )
    from fulgurite.datamodules.ice_layers.readers.npz import NpzStacks
    from fulgurite.datamodules.ice_layers.readers.sred import SredMat
    from fulgurite.datamodules.ice_layers.readers.sred_options import (
        SredBins,
        SredFields,
        SredFolders,
    )
    from fulgurite.datamodules.ice_layers.stack import Flights, LayerStack
    from fulgurite.datamodules.ice_layers.tracks.blocks import Blocks

_MODULES = {
    "tracks.blocks": ("Blocks",),
    "climate.mar": ("MarClimate",),
    "readers.completed": ("CompletedStacks",),
    "datamodule": ("IceLayerDataModule",),
    "flights": ("StackSource",),
    "generator.forcing": ("ForcedFlights", "ForcedWorld"),
    "generator.synthetic": ("SyntheticFlights",),
    "readers.koenig": ("KoenigPicks",),
    "readers.layer_files": ("LayerFiles", "PickOptions", "SegmentSelection"),
    "readers.npz": ("NpzStacks",),
    "readers.sred": ("SredMat",),
    "generator.sred": ("SredWorld", "SyntheticSred"),
    "readers.sred_options": ("SredBins", "SredFields", "SredFolders"),
    "stack": ("Flights", "LayerStack"),
    "generator.world": ("World",),
    "options": ("EvaluationOptions", "SelectionOptions", "SplitOptions"),
}

__all__ = [
    "Blocks",
    "CompletedStacks",
    "EvaluationOptions",
    "Flights",
    "ForcedFlights",
    "ForcedWorld",
    "IceLayerDataModule",
    "KoenigPicks",
    "LayerFiles",
    "LayerStack",
    "MarClimate",
    "NpzStacks",
    "PickOptions",
    "SegmentSelection",
    "SelectionOptions",
    "SplitOptions",
    "SredBins",
    "SredFields",
    "SredFolders",
    "SredMat",
    "SredWorld",
    "StackSource",
    "SyntheticFlights",
    "SyntheticSred",
    "World",
]

__getattr__, __dir__ = lazy_attributes(__name__, _MODULES)
