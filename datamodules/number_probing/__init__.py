"""Data of number_probing: addition of tokens, and text with numbers in it."""

from typing import TYPE_CHECKING

from fulgurite.lazy import lazy_attributes

if TYPE_CHECKING:
    from fulgurite.datamodules.number_probing.addition import (
        AdditionOptions,
        AdditionTask,
        PairSplit,
    )
    from fulgurite.datamodules.number_probing.corpus import TokenCache, cached_tokens
    from fulgurite.datamodules.number_probing.datamodule import (
        AdditionDataModule,
        NumberTextDataModule,
        NumberTextOptions,
        TokenizerOptions,
    )
    from fulgurite.datamodules.number_probing.tokenizers import (
        DigitTokenizer,
        FileTokenizer,
        WordTokenizer,
    )

_MODULES = {
    "addition": ("AdditionOptions", "AdditionTask", "PairSplit"),
    "corpus": ("TokenCache", "cached_tokens"),
    "datamodule": (
        "AdditionDataModule",
        "NumberTextDataModule",
        "NumberTextOptions",
        "TokenizerOptions",
    ),
    "tokenizers": ("DigitTokenizer", "FileTokenizer", "WordTokenizer"),
}

__all__ = [
    "AdditionDataModule",
    "AdditionOptions",
    "AdditionTask",
    "DigitTokenizer",
    "FileTokenizer",
    "NumberTextDataModule",
    "NumberTextOptions",
    "PairSplit",
    "TokenCache",
    "TokenizerOptions",
    "WordTokenizer",
    "cached_tokens",
]

__getattr__, __dir__ = lazy_attributes(__name__, _MODULES)
