"""Data of ice_layers: layer thickness along flight lines, with the climate at each trace."""

from typing import TYPE_CHECKING

from fulgurite.lazy import lazy_attributes

if TYPE_CHECKING:
    from fulgurite.datamodules.ice_layers.climate import MarClimate
    from fulgurite.datamodules.ice_layers.completed import CompletedStacks
    from fulgurite.datamodules.ice_layers.datamodule import IceLayerDataModule
    from fulgurite.datamodules.ice_layers.flights import StackSource
    from fulgurite.datamodules.ice_layers.forcing import ForcedFlights
    from fulgurite.datamodules.ice_layers.generator import SyntheticFlights
    from fulgurite.datamodules.ice_layers.koenig import KoenigPicks
    from fulgurite.datamodules.ice_layers.layer_files import LayerFiles
    from fulgurite.datamodules.ice_layers.npz import NpzStacks
    from fulgurite.datamodules.ice_layers.sred import SredMat
    from fulgurite.datamodules.ice_layers.sred_generator import SyntheticSred
    from fulgurite.datamodules.ice_layers.stack import Flights, LayerStack

_MODULES = {
    "climate": ("MarClimate",),
    "completed": ("CompletedStacks",),
    "datamodule": ("IceLayerDataModule",),
    "flights": ("StackSource",),
    "forcing": ("ForcedFlights",),
    "generator": ("SyntheticFlights",),
    "koenig": ("KoenigPicks",),
    "layer_files": ("LayerFiles",),
    "npz": ("NpzStacks",),
    "sred": ("SredMat",),
    "sred_generator": ("SyntheticSred",),
    "stack": ("Flights", "LayerStack"),
}

__all__ = [
    "CompletedStacks",
    "Flights",
    "ForcedFlights",
    "IceLayerDataModule",
    "KoenigPicks",
    "LayerFiles",
    "LayerStack",
    "MarClimate",
    "NpzStacks",
    "SredMat",
    "StackSource",
    "SyntheticFlights",
    "SyntheticSred",
]

__getattr__, __dir__ = lazy_attributes(__name__, _MODULES)
