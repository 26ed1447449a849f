"""What the inputs and outputs of a trained network mean: normalisation and class names.

Axes: C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fulgurite.errors import CheckpointError

__all__ = ["TrainedInputs"]


@dataclass(frozen=True)
class TrainedInputs:
    """What the inputs and outputs of a network mean, apart from the images it was trained on.

    Args:
        scale: Factor of each channel's pixels, 0 to 255. Shape: (C,).
        offset: What is added to each channel then. Shape: (C,).
        class_names: Names of the classes in the order of the logits.
        image_size: Height and width of the images [pixels]; None of older checkpoints.
    """

    scale: Tensor
    offset: Tensor
    class_names: tuple[str, ...]
    image_size: tuple[int, int] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values, for a checkpoint."""
        return {
            "scale": self.scale,
            "offset": self.offset,
            "class_names": list(self.class_names),
            "image_size": None if self.image_size is None else list(self.image_size),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> TrainedInputs:
        """Read what :meth:`state_dict` returned.

        Raises:
            CheckpointError: An entry is missing or has another type.
        """
        keys = ("scale", "offset", "class_names", "image_size")
        scale, offset, names, size = (state.get(key) for key in keys)
        if (
            not isinstance(scale, Tensor)
            or not isinstance(offset, Tensor)
            or scale.ndim != 1
            or scale.shape != offset.shape
            or not isinstance(names, list | tuple)
            or not (size is None or (isinstance(size, list | tuple) and len(size) == 2))
        ):
            raise CheckpointError(
                "The checkpoint holds no normalisation of images.", "Give one of a run of fedsir."
            )
        image_size = None if size is None else (int(size[0]), int(size[1]))
        return cls(scale.float(), offset.float(), tuple(map(str, names)), image_size)

    def describe(self) -> dict[str, list[float]]:
        """Return mean and standard deviation of each channel in fractions of 255.

        Example:
            >>> import torch
            >>> inputs = TrainedInputs(torch.tensor([2 / 255]), torch.tensor([-0.5]), ("a", "b"))
            >>> inputs.describe()
            {'mean': [0.25], 'std': [0.5]}
        """
        std = 1 / (255 * self.scale.double())
        mean = -self.offset.double() * std
        return {
            "mean": [round(value, 6) for value in mean.tolist()],
            "std": [round(value, 6) for value in std.tolist()],
        }
