"""Data of stream_cqsa: long sequences, of real bytes or with needles hidden in them."""

from typing import TYPE_CHECKING

from fulgurite.datamodules.stream_cqsa.needle import NeedleOptions, NeedleSizes, NeedleTask
from fulgurite.datamodules.stream_cqsa.text import ByteText, cached_text
from fulgurite.lazy import lazy_attributes

if TYPE_CHECKING:
    from fulgurite.datamodules.stream_cqsa.datamodule import ByteTextDataModule, NeedleDataModule

# Lightning costs seconds, which finding and reading text alone need not pay
_MODULES = {"datamodule": ("ByteTextDataModule", "NeedleDataModule")}

__all__ = [
    "ByteText",
    "ByteTextDataModule",
    "NeedleDataModule",
    "NeedleOptions",
    "NeedleSizes",
    "NeedleTask",
    "cached_text",
]

__getattr__, __dir__ = lazy_attributes(__name__, _MODULES)
