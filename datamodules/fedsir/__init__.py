"""Data of fedsir: image data sets dealt to clients, some of which have wrong labels."""

from typing import TYPE_CHECKING

from fulgurite.datamodules.fedsir.archives import CifarArchive
from fulgurite.datamodules.fedsir.digits import Digits
from fulgurite.datamodules.fedsir.file_labels import FileLabels, LabelColumns, SourceLabels
from fulgurite.datamodules.fedsir.file_partition import FilePartition
from fulgurite.datamodules.fedsir.folders import ImageFolder
from fulgurite.datamodules.fedsir.image_list import ImageList, ImageLists
from fulgurite.datamodules.fedsir.labels import LabelStore
from fulgurite.datamodules.fedsir.leaf import Leaf, LeafPixels
from fulgurite.datamodules.fedsir.noise import (
    AsymmetricMap,
    InstanceDependent,
    LabelNoise,
    Pair,
    Symmetric,
)
from fulgurite.datamodules.fedsir.noisy_clients import FederationNoise, NoisyClients
from fulgurite.datamodules.fedsir.npz import Npz
from fulgurite.datamodules.fedsir.parquet import Parquet, ParquetFiles
from fulgurite.datamodules.fedsir.partition import (
    Dirichlet,
    Grouped,
    Iid,
    Natural,
    Partition,
    Shards,
)
from fulgurite.datamodules.fedsir.samples import UNKNOWN, Listing, Samples
from fulgurite.datamodules.fedsir.sources import ImageArrays, ImageSource
from fulgurite.lazy import lazy_attributes

if TYPE_CHECKING:
    from fulgurite.datamodules.fedsir.datamodule import EvaluationLabels, FederatedDataModule
    from fulgurite.datamodules.fedsir.server_data import ServerDataModule

__all__ = [
    "UNKNOWN",
    "AsymmetricMap",
    "CifarArchive",
    "Digits",
    "Dirichlet",
    "EvaluationLabels",
    "FederatedDataModule",
    "FederationNoise",
    "FileLabels",
    "FilePartition",
    "Grouped",
    "Iid",
    "ImageArrays",
    "ImageFolder",
    "ImageList",
    "ImageLists",
    "ImageSource",
    "InstanceDependent",
    "LabelColumns",
    "LabelNoise",
    "LabelStore",
    "Leaf",
    "LeafPixels",
    "Listing",
    "Natural",
    "NoisyClients",
    "Npz",
    "Pair",
    "Parquet",
    "ParquetFiles",
    "Partition",
    "Samples",
    "ServerDataModule",
    "Shards",
    "SourceLabels",
    "Symmetric",
]


# Lightning costs seconds, which noise and partitions alone need not pay
__getattr__, _ = lazy_attributes(
    __name__,
    {
        "datamodule": ("EvaluationLabels", "FederatedDataModule"),
        "server_data": ("ServerDataModule",),
    },
)
