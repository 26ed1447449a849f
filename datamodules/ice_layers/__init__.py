"""Data of ice_layers: layer thickness along flight lines, with the climate at each trace."""

from typing import TYPE_CHECKING

from fulgurite.lazy import lazy_attributes

if TYPE_CHECKING:
    from fulgurite.datamodules.ice_layers.blocks import Blocks
    from fulgurite.datamodules.ice_layers.climate import MarClimate
    from fulgurite.datamodules.ice_layers.completed import CompletedStacks
    from fulgurite.datamodules.ice_layers.datamodule import IceLayerDataModule
    from fulgurite.datamodules.ice_layers.flights import StackSource
    from fulgurite.datamodules.ice_layers.forcing import ForcedFlights, ForcedWorld
    from fulgurite.datamodules.ice_layers.generator import SyntheticFlights
    from fulgurite.datamodules.ice_layers.koenig import KoenigPicks
    from fulgurite.datamodules.ice_layers.layer_files import (
        LayerFiles,
        PickOptions,
        SegmentSelection,
    )
    from fulgurite.datamodules.ice_layers.npz import NpzStacks
    from fulgurite.datamodules.ice_layers.sred import SredMat
    from fulgurite.datamodules.ice_layers.sred_generator import SredWorld, SyntheticSred
    from fulgurite.datamodules.ice_layers.sred_options import SredBins, SredFields, SredFolders
    from fulgurite.datamodules.ice_layers.stack import Flights, LayerStack
    from fulgurite.datamodules.ice_layers.world import World

_MODULES = {
    "blocks": ("Blocks",),
    "climate": ("MarClimate",),
    "completed": ("CompletedStacks",),
    "datamodule": ("IceLayerDataModule",),
    "flights": ("StackSource",),
    "forcing": ("ForcedFlights", "ForcedWorld"),
    "generator": ("SyntheticFlights",),
    "koenig": ("KoenigPicks",),
    "layer_files": ("LayerFiles", "PickOptions", "SegmentSelection"),
    "npz": ("NpzStacks",),
    "sred": ("SredMat",),
    "sred_generator": ("SredWorld", "SyntheticSred"),
    "sred_options": ("SredBins", "SredFields", "SredFolders"),
    "stack": ("Flights", "LayerStack"),
    "world": ("World",),
}

__all__ = [
    "Blocks",
    "CompletedStacks",
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
