"""Rotary position embeddings.

Axes: N tokens, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["apply_rotary", "rotary"]


def rotary(
    positions: Tensor, size: int, base: float = 10000.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary position embeddings.

    Args:
        positions: Shape: (N,).
        size: D, even.
        base: Base of the wavelengths; larger for longer contexts.
        dtype: Type of the results.

    Returns:
        Each of shape (N, D/2).

    Example:
        >>> cos, sin = rotary(torch.tensor([0, 1]), 4)
        >>> cos
        tensor([[1.0000, 1.0000],
                [0.5403, 0.9999]])

    Source: RoFormer, arXiv 2104.09864, section 3.4.2.
    """
    # float64: at token 2**20, a float32 angle is already wrong by up to 0.06
    exponents = torch.arange(0, size, 2, device=positions.device, dtype=torch.float64) / size
    angles = positions.double()[:, None] * base**-exponents
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (d, d + D/2) of each head, in the type of the cosines.

    Args:
        x: Queries or keys. Shape: (..., D).
        cos: From :func:`rotary`. Shape: one that broadcasts to (..., D/2).
        sin: As cos.

    Returns:
        In the type of x. Shape: (..., D).

    Example:
        >>> apply_rotary(torch.tensor([[1.0, 0.0]]), *rotary(torch.tensor([1]), 2))
        tensor([[0.5403, 0.8415]])

    Source: RoFormer, arXiv 2104.09864, equation 34; halves instead of neighbours, as in GPT-NeoX.
    """
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
