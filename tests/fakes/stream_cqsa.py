"""Small language models and what they learn, which tests of several folders share."""

import torch
from fakes.options import group
from torch.utils.data import DataLoader

from fulgurite.layers.transformer import TransformerConfig
from fulgurite.models.stream_cqsa import Decoder


def small_network(kind=Decoder, **options):
    """A network of 2 layers over 11 tokens, with options of its transformer by name."""
    sizes = {"width": 16, "layers": 2, "heads": 2, "kv_heads": 1, **options}
    return kind(11, **group(sizes, transformer=TransformerConfig))


def repeating_batches(count=2, size=2, tokens=24):
    """A sequence that repeats every 5 tokens, from different starts, and its next tokens."""
    data = []
    for batch in range(count):
        starts = torch.arange(size)[:, None] + batch
        line = (starts + torch.arange(tokens + 1)) % 5
        data.append({"tokens": line[:, :-1], "targets": line[:, 1:].clone()})
    return data


def load_batches(items):
    """A loader of batches that are made already."""
    return DataLoader(items, batch_size=None)
