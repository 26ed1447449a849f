"""Data of number_probing: addition of tokens, and text with numbers in it."""

from typing import TYPE_CHECKING

from fulgurite.lazy import lazy_attributes

if TYPE_CHECKING:
    from fulgurite.datamodules.number_probing.addition import AdditionTask
    from fulgurite.datamodules.number_probing.corpus import TokenCache, cached_tokens
    from fulgurite.datamodules.number_probing.datamodule import (
        AdditionDataModule,
        NumberTextDataModule,
    )
    from fulgurite.datamodules.number_probing.tokenizers import (
        DigitTokenizer,
        FileTokenizer,
        WordTokenizer,
    )

_MODULES = {
    "addition": ("AdditionTask",),
    "corpus": ("TokenCache", "cached_tokens"),
    "datamodule": ("AdditionDataModule", "NumberTextDataModule"),
    "tokenizers": ("DigitTokenizer", "FileTokenizer", "WordTokenizer"),
}

__all__ = [
    "AdditionDataModule",
    "AdditionTask",
    "DigitTokenizer",
    "FileTokenizer",
    "NumberTextDataModule",
    "TokenCache",
    "WordTokenizer",
    "cached_tokens",
]

__getattr__, __dir__ = lazy_attributes(__name__, _MODULES)
