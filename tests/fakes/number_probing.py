"""Tables of embeddings and runs, which several test files of number probing start from."""

import torch


def draw_normal(size, width, seed=0):
    """Embeddings without any structure, in double precision. Shape: (N, D)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, width, generator=generator, dtype=torch.float64)
