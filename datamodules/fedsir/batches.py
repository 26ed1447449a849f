"""Images that are looked up a whole batch at a time.

Shapes: B mini-batch, N samples, C channels, H W image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["ImageBatches", "keep_batch"]


class ImageBatches(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Images that are indexed and normalised a whole batch at a time.

    Args:
        images: Images, (., C, H, W) uint8.
        labels: Class of each sample, (N,) int64.
        rows: Row of each sample in ``images``, (N,) int64; ``None`` for all rows.
        transform: Makes the network input from images, (B, C, H, W) uint8 -> float.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        rows: Tensor | None,
        transform: Callable[[Tensor], Tensor],
    ) -> None:
        self.images, self.labels, self.rows, self.transform = images, labels, rows, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        images, labels, indices = self.__getitems__([index])
        return images[0], labels[0], indices[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        index = torch.as_tensor(indices)
        rows = index if self.rows is None else self.rows[index]
        return self.transform(self.images[rows]), self.labels[index], index


def keep_batch(batch: Any) -> Any:
    """Return a batch as it is; for loaders whose data set collates."""
    return batch
