"""Batched augmentation by indexing: no loop over images, any device.

Shapes: B mini-batch, C channels, H W image.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fulgurite.devices import move

__all__ = ["shift_crop"]


def shift_crop(
    images: Tensor, pad: int, generator: torch.Generator, *, flip: bool = False
) -> Tensor:
    """Pad with zeros, crop at a random offset and optionally mirror half of the images at random.

    The random numbers are drawn on the CPU, so that they do not depend on the images' device.

    Shape:
        - images: (B, C, H, W) of any type on any device -> the same.

    Source: docs/papers/fedsir.md section 2 (random crop with padding 4, horizontal flip).

    Example:
        >>> image = torch.arange(4, dtype=torch.uint8).view(1, 1, 2, 2)
        >>> shift_crop(image, 0, torch.Generator()).equal(image)
        True
    """
    batch, channels, height, width = images.shape
    down, right = torch.randint(0, 2 * pad + 1, (2, batch, 1), generator=generator)
    mirror = torch.randint(0, 2, (batch, 1), generator=generator) if flip else torch.tensor([[0]])
    across = torch.arange(width)
    rows = down + torch.arange(height)
    columns = right + torch.where(mirror == 1, width - 1 - across, across)
    padded_width = width + 2 * pad
    flat_index = move(rows[:, :, None] * padded_width + columns[:, None, :], images.device)
    padded = F.pad(images, (pad, pad, pad, pad)).view(batch, channels, -1)
    index = flat_index.view(batch, 1, -1).expand(-1, channels, -1)
    return padded.gather(2, index).view(batch, channels, height, width)
