"""Data of cs_arm_bn: plates of microscope images as episodes of queries and controls."""

from typing import TYPE_CHECKING, Any

from fulgurite.datamodules.cs_arm_bn.cifar import CorruptedCifar, CorruptionFamilies
from fulgurite.datamodules.cs_arm_bn.embeddings import EmbeddedPlates
from fulgurite.datamodules.cs_arm_bn.jump import JumpPlates
from fulgurite.datamodules.cs_arm_bn.jump_options import JumpFiles, Perturbations, PlateSelection
from fulgurite.datamodules.cs_arm_bn.options import (
    EpisodeOptions,
    EvaluationOptions,
    PixelOptions,
)
from fulgurite.datamodules.cs_arm_bn.preprocess import Preprocess
from fulgurite.datamodules.cs_arm_bn.sources import PlateSource
from fulgurite.datamodules.cs_arm_bn.splits import GroupFolds, HoldOut, OfficialSplit, Split
from fulgurite.datamodules.cs_arm_bn.synthetic import PlateWorld, SyntheticPlates
from fulgurite.datamodules.cs_arm_bn.table import PlateTable
from fulgurite.datamodules.cs_arm_bn.tables import CsvPlates, ImageFiles, RxRx1Plates

if TYPE_CHECKING:
    from fulgurite.datamodules.cs_arm_bn.datamodule import PlateDataModule

__all__ = [
    "CorruptedCifar",
    "CorruptionFamilies",
    "CsvPlates",
    "EmbeddedPlates",
    "EpisodeOptions",
    "EvaluationOptions",
    "GroupFolds",
    "HoldOut",
    "ImageFiles",
    "JumpFiles",
    "JumpPlates",
    "OfficialSplit",
    "Perturbations",
    "PixelOptions",
    "PlateDataModule",
    "PlateSelection",
    "PlateSource",
    "PlateTable",
    "PlateWorld",
    "Preprocess",
    "RxRx1Plates",
    "Split",
    "SyntheticPlates",
]


def __getattr__(name: str) -> Any:
    # Lightning costs seconds, which tables and splits alone need not pay
    if name == "PlateDataModule":
        from fulgurite.datamodules.cs_arm_bn import datamodule

        return getattr(datamodule, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
