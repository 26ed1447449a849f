"""Datasets that read a batch at once.

Axes: B items.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["BatchDataset"]


class BatchDataset(Dataset[dict[str, Tensor]]):
    """A dataset that reads batches; an item is a batch of one."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of items."""

    @abstractmethod
    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return a batch, which PyTorch's loaders ask for by this name. Shapes: (B, ...)."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: x[0] for name, x in self.__getitems__([index]).items()}
