"""Given and current labels of training samples; methods change labels only here.

Shapes: N samples, M written samples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fulgurite.datamodules.fedsir.selection import check_labels
from fulgurite.errors import CheckpointError, DataError

__all__ = ["LabelStore"]


class LabelStore:
    """Given labels and their current overrides.

    Shape:
        - labels: (N,) integers in [0, C).

    Example:
        >>> store = LabelStore(torch.tensor([0, 1, 2]), num_classes=3)
        >>> store.write(torch.tensor([2]), torch.tensor([0]))
        >>> store.current.tolist(), store.given.tolist(), store.changed
        ([0, 1, 0], [0, 1, 2], 1)
    """

    def __init__(self, labels: Tensor, num_classes: int) -> None:
        self.num_classes = num_classes
        # copies, so that changes of the argument do not reach the store, nor the reverse
        self._given = check_labels(labels, num_classes, "given").clone()
        self._current = self._given.clone()

    def __len__(self) -> int:
        return len(self._given)

    @property
    def given(self) -> Tensor:
        """A copy of the given labels, (N,) int64."""
        return self._given.clone()

    @property
    def current(self) -> Tensor:
        """The labels to train on, (N,) int64; change them by :meth:`write` only."""
        return self._current

    @property
    def changed(self) -> int:
        """Number of current labels that differ from the given ones."""
        return int((self._current != self._given).sum())

    def write(self, index: Tensor, labels: Tensor) -> None:
        """Set the current labels of some samples.

        Shape:
            - index: (M,) int64, distinct positions in [0, N); labels: (M,) integers in [0, C).

        Raises:
            DataError: Shapes differ, or an index or a label is out of range.
        """
        index, labels = index.cpu(), check_labels(labels.cpu(), self.num_classes, "written")
        check_labels(index, len(self), "index")
        if index.shape != labels.shape:
            raise DataError(
                f"{len(labels)} labels were written to {len(index)} samples.",
                "Write one label for each sample.",
            )
        self._current[index] = labels

    def reset(self) -> None:
        """Set all current labels to the given ones."""
        self._current.copy_(self._given)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain tensors."""
        return {"given": self._given.clone(), "current": self._current.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the current labels.

        Raises:
            CheckpointError: The state belongs to other data, another split or other noise.
        """
        if not torch.equal(state["given"].cpu(), self._given):
            raise CheckpointError(
                f"The checkpoint's {len(state['given'])} given labels are not the {len(self)} of "
                "this data.",
                "Resume with the source, clients, partition, noise and `--data.init_args.seed` of "
                "the run.",
            )
        self._current.copy_(state["current"])
