"""Merges attention over different keys.

Axes: D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["merge_"]


def merge_(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Merge attention over some keys into that over others, in place.

    Never forms ``exp(lse)``, so scores of any size are safe. A row without keys has lse −inf.

    Args:
        out: Attention so far. Shape: (..., D).
        lse: Its log-sum-exp. Shape: (...).
        part_out: Attention over other keys, any floating type. Shape: (..., D).
        part_lse: Its log-sum-exp. Shape: (...).

    Example:
        >>> out, lse = torch.zeros(1, 1), torch.tensor([-torch.inf])
        >>> merge_(out, lse, torch.tensor([[2.0]]), torch.tensor([100.0]))
        >>> merge_(out, lse, torch.tensor([[4.0]]), torch.tensor([100.0]))
        >>> out.item(), round(lse.item(), 4)
        (3.0, 100.6931)

    Source: docs/papers/stream_cqsa.md section 1.6, sigmoid form.
    """
    weight = torch.sigmoid(part_lse - lse).nan_to_num_(nan=0.0)  # nan: −inf minus −inf
    out.lerp_(part_out.to(out.dtype), weight[..., None])
    torch.logaddexp(lse, part_lse, out=lse)
