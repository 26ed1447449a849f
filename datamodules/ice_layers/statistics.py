"""Mean and standard deviation of the training data, by which inputs are normalised.

Shapes: N traces, L layers, P physical fields.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fulgurite.datamodules.ice_layers.stack import Array, LayerStack
from fulgurite.errors import DataError

__all__ = ["fit_statistics", "unwrap_longitudes"]

_LEAST = 1e-6  # below this a field is constant


def fit_statistics(stacks: Sequence[LayerStack]) -> dict[str, Tensor]:
    """Mean of each layer, of physics and positions, from observed entries of training stacks.

    Returns:
        ``thickness_mean`` (L,) and ``thickness_std`` () [m], the deviation from the layer's mean;
        ``physics_mean`` (P,), ``physics_std`` (P,), ``pos_mean`` (2,) and ``pos_std`` (2,); all
        float64. A layer that is never observed has the mean of all.

    Raises:
        DataError: No thickness is observed.

    Source: docs/papers/ice_layers.md section 6, check 9; the form is inferred.

    Example:
        >>> stack = LayerStack("a", "s", np.array([[1.0, np.nan], [2.0, 4.0]]),
        ...     np.zeros((2, 2, 1), np.float32), np.zeros(2, np.uint8), np.zeros((2, 2)),
        ...     np.arange(2.0))
        >>> fit_statistics([stack])["thickness_mean"]
        tensor([1.5000, 4.0000], dtype=torch.float64)
    """
    thickness = (
        np.concatenate([stack.thickness for stack in stacks]) if stacks else np.zeros((0, 0))
    )
    observed = np.isfinite(thickness)
    if not observed.any():
        raise DataError(
            "No thickness is observed in the training segments.",
            "Change `--data.init_args.split.val` and `split.test`, or the source.",
        )
    zero_filled = np.where(observed, thickness, 0.0)
    count = observed.sum(0)
    mean = np.where(
        count > 0, zero_filled.sum(0) / np.maximum(count, 1), zero_filled.sum() / observed.sum()
    )
    apart = np.where(observed, thickness - mean, 0.0)
    physics = np.concatenate([s.physics.reshape(s.thickness.size, -1) for s in stacks])
    physics = physics.astype(np.float64)
    pos = unwrap_longitudes(np.concatenate([stack.pos for stack in stacks]))
    values = {
        "thickness_mean": mean,
        "thickness_std": np.sqrt((apart**2).sum() / observed.sum()),
        "physics_mean": physics.mean(0),
        "physics_std": physics.std(0),
        "pos_mean": pos.mean(0),
        "pos_std": pos.std(0),
    }
    return {
        name: torch.as_tensor(
            np.where(np.asarray(v) > _LEAST, v, 1.0) if name.endswith("_std") else v,
            dtype=torch.float64,
        )
        for name, v in values.items()
    }


def unwrap_longitudes(pos: Array) -> Array:
    """Move longitudes by whole turns to where all lie around their mean direction.

    Without that, the mean of positions on both sides of the date line is on the other side of the
    Earth. Positions that do not lie there stay what they are.

    Shape:
        - pos: (M, 2) latitude and longitude [degrees]; the result too.

    Example:
        >>> unwrap_longitudes(np.array([[70.0, 179.0], [70.0, -178.0]])).tolist()
        [[70.0, -181.0], [70.0, -178.0]]
    """
    longitude = np.radians(pos[:, 1])
    centre = np.degrees(np.arctan2(np.sin(longitude).mean(), np.cos(longitude).mean()))
    turns = np.round((centre - pos[:, 1]) / 360.0)
    unwrapped: Array = pos + turns[:, None] * np.array([0.0, 360.0])
    return unwrapped
