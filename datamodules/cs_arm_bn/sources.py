"""What a source of plates is: a table, and a way to read the sites it names."""

from __future__ import annotations

from abc import ABC, abstractmethod

from fulgurite.datamodules.cs_arm_bn.images import FileReader, SiteReader
from fulgurite.datamodules.cs_arm_bn.preprocess import Preprocess
from fulgurite.datamodules.cs_arm_bn.table import PlateTable

__all__ = ["PlateSource"]


class PlateSource(ABC):
    """Plates of one or several laboratories, with queries of K classes and controls.

    A subclass gives the names of classes and channels, which must be cheap, and :meth:`load`.
    """

    @property
    @abstractmethod
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the labels."""

    @property
    @abstractmethod
    def channels(self) -> tuple[str, ...]:
        """Names of the channels, in the order of the images."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def in_channels(self) -> int:
        """Number of channels."""
        return len(self.channels)

    @property
    def preprocess(self) -> Preprocess:
        """What is done to these images unless the data module is told otherwise."""
        return Preprocess()

    @property
    def reader(self) -> SiteReader:
        """How a site is read."""
        return FileReader(self.in_channels)

    def prepare(self) -> None:
        """Do once per machine what other processes can then share."""
        return  # most sources have nothing to prepare

    @abstractmethod
    def load(self) -> PlateTable:
        """Return the table of sites.

        Raises:
            DataError: A table is missing or inconsistent.
        """
