"""Readers of embedding tables on disk; only the rows of numbers are read."""

from fulgurite.models.number_probing.tables.number_table import NumberTable, parse_numbers
from fulgurite.models.number_probing.tables.sources import PACKAGES, read_table
from fulgurite.models.number_probing.tables.tokens import (
    Encoder,
    Spelling,
    number_tokens,
    read_encoder,
    vocabulary,
)

__all__ = [
    "PACKAGES",
    "Encoder",
    "NumberTable",
    "Spelling",
    "number_tokens",
    "parse_numbers",
    "read_encoder",
    "read_table",
    "vocabulary",
]
