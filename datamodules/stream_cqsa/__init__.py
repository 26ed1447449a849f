"""Data of stream_cqsa: long sequences, of real bytes or with needles hidden in them."""

from typing import TYPE_CHECKING, Any

from fulgurite.datamodules.stream_cqsa.needle import NeedleTask
from fulgurite.datamodules.stream_cqsa.text import ByteText, cached_text

if TYPE_CHECKING:
    from fulgurite.datamodules.stream_cqsa.datamodule import ByteTextDataModule, NeedleDataModule

__all__ = [
    "ByteText",
    "ByteTextDataModule",
    "NeedleDataModule",
    "NeedleTask",
    "cached_text",
]


def __getattr__(name: str) -> Any:
    # Lightning costs seconds, which finding and reading text alone need not pay
    if name in ("ByteTextDataModule", "NeedleDataModule"):
        from fulgurite.datamodules.stream_cqsa import datamodule

        return getattr(datamodule, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
