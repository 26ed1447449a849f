"""Completed stacks: what was observed stays bit for bit, and every entry says where it is from.

Axes: N traces of all stacks, M traces of the longest, L layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fulgurite.domains.ice_layers.codes import Provenance
from fulgurite.errors import DataError
from fulgurite.models.ice_layers.data.graph import Track

__all__ = [
    "Gaps",
    "complete",
    "fill",
    "measure_gaps",
    "picks_around",
    "provenance",
]


def complete(observed: Tensor, mask: Tensor, predicted: Tensor) -> Tensor:
    """Observed values where there are any, predictions elsewhere.

    Values are selected, never computed with: a sum of products would spread NaN and round.

    Args:
        observed: The original array [m]; anything where the mask is False. Shape: (N, L).
        mask: True where observed. Shape: (N, L), bool.
        predicted: Predicted thickness [m]. Shape: (N, L).

    Returns:
        In the type of ``observed``. Shape: (N, L).

    Raises:
        DataError: Shapes differ, or the mask is not of truth values.

    Example:
        >>> observed = torch.tensor([0.1, float("nan")])
        >>> complete(observed, torch.tensor([True, False]), torch.tensor([0.9, 0.2]))
        tensor([0.1000, 0.2000])

    Source: arXiv 2604.20783 (observed thickness is preserved); docs/papers/ice_layers.md section
    1.7.
    """
    if mask.dtype != torch.bool or not observed.shape == mask.shape == predicted.shape:
        raise DataError(
            f"complete() got observed {tuple(observed.shape)}, a {mask.dtype} mask "
            f"{tuple(mask.shape)} and predicted {tuple(predicted.shape)}.",
            "Give three arrays of one shape, the mask of truth values.",
        )
    return torch.where(mask, observed, predicted.to(observed.dtype))


class Gaps:
    """Where missing entries lie between picks of their layer.

    Args:
        length: Distance between the picks on both sides [m]; at the end of a stack, from the last
            pick to the end; infinite in a layer without picks. Shape: (N, L).
        nearest: Distance to the nearest pick [m]; infinite without any. Shape: (N, L).
        absent: Whether the layer of the stack has no pick. Shape: (N, L), bool.
    """

    def __init__(self, length: Tensor, nearest: Tensor, absent: Tensor) -> None:
        self.length, self.nearest, self.absent = length, nearest, absent


def picks_around(position: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
    """Where the last pick up to each entry of its layer lies, and the next one from it on.

    Args:
        position: Distance along the track of padded stacks [m]. Shape: (B, M, 1).
        observed: True where observed. Shape: (B, M, L), bool.

    Returns:
        Both distances [m], minus and plus infinity where there is none. Shapes: (B, M, L).

    Example:
        >>> observed = torch.tensor([[[False], [True], [False]]])
        >>> before, after = picks_around(torch.tensor([[[0.0], [1.0], [2.0]]]), observed)
        >>> before.flatten(), after.flatten()
        (tensor([-inf, 1., 1.]), tensor([1., 1., inf]))
    """
    infinite = torch.full((), torch.inf, dtype=position.dtype, device=position.device)
    before = torch.where(observed, position, -infinite).cummax(1).values
    return before, torch.where(observed, position, infinite).flip(1).cummin(1).values.flip(1)


def measure_gaps(mask: Tensor, distance: Tensor, track: Track) -> Gaps:
    """Measure the gap around every entry; that of an observed entry has length 0.

    Args:
        mask: True where observed. Shape: (N, L), bool.
        distance: Along the track [m]. Shape: (N,).
        track: The stacks.

    Example:
        >>> mask = torch.tensor([[True], [False], [False], [True], [False]])
        >>> gaps = measure_gaps(mask, 10.0 * torch.arange(5), Track.of([5]))
        >>> gaps.length.squeeze(), gaps.nearest.squeeze()
        (tensor([ 0., 30., 30.,  0., 10.]), tensor([ 0., 10., 10.,  0., 10.]))
    """
    position = track.pad(distance)[..., None]  # (B, M, 1)
    observed = track.pad(mask)
    before, after = picks_around(position, observed)
    first = position[:, :1]
    last = torch.where(track.valid[..., None], position, -torch.inf).amax(1, keepdim=True)
    length = torch.minimum(after, last) - torch.maximum(before, first)
    absent = ~observed.any(1, keepdim=True).expand(observed.shape)
    length = torch.where(observed, 0.0, torch.where(absent, torch.inf, length))
    nearest = torch.minimum(position - before, after - position)
    return Gaps(*(track.unpad(x) for x in (length, nearest, absent)))


def provenance(mask: Tensor, gaps: Gaps, max_gap: float | None = None) -> Tensor:
    """Where each entry of a completed stack is from.

    Args:
        mask: True where observed. Shape: (N, L), bool.
        gaps: Gaps around the entries, from :func:`measure_gaps`.
        max_gap: Leave gaps missing that are longer [m], wholly absent layers among them; None
            fills all.

    Returns:
        Codes of :class:`~fulgurite.domains.ice_layers.codes.Provenance`. Shape: (N, L), uint8.

    Example:
        >>> mask = torch.tensor([[True, False], [False, False]])
        >>> gaps = measure_gaps(mask, torch.tensor([0.0, 400.0]), Track.of([2]))
        >>> provenance(mask, gaps)
        tensor([[0, 2],
                [1, 2]], dtype=torch.uint8)
        >>> provenance(mask, gaps, max_gap=300.0)
        tensor([[0, 3],
                [3, 3]], dtype=torch.uint8)

    Source: docs/papers/ice_layers.md section 1.7; ``max_gap``: section 5, what users ask for.
    """
    kind = torch.full_like(mask, Provenance.FILLED, dtype=torch.uint8)
    kind[gaps.absent] = Provenance.WHOLE_LAYER_FILLED
    if max_gap is not None:
        kind[gaps.length > max_gap] = Provenance.LEFT_MISSING
    kind[mask] = Provenance.OBSERVED
    return kind


def fill(
    thickness: Tensor,
    mask: Tensor,
    gaps: Gaps,
    predicted: Tensor,
    *,
    std: Tensor,
    max_gap: float | None = None,
) -> dict[str, Tensor]:
    """Completed stacks with provenance and uncertainty.

    Args:
        thickness: The original array [m]. Shape: (N, L).
        mask: True where observed. Shape: (N, L), bool.
        gaps: Gaps around the entries, from :func:`measure_gaps`.
        predicted: Predicted thickness [m]. Shape: (N, L).
        std: Standard deviation of the predictions [m]. Shape: (N, L).
        max_gap: Leave gaps missing that are longer [m]; see :func:`provenance`.

    Returns:
        ``predicted`` [m]; ``thickness`` [m], completed, NaN where left missing; ``provenance``;
        ``std`` [m], NaN where observed or left missing. Shape of each: (N, L).

    Example:
        >>> mask = torch.tensor([[True], [False]])
        >>> gaps = measure_gaps(mask, torch.tensor([0.0, 1.0]), Track.of([2]))
        >>> ones = torch.ones(2, 1)
        >>> fill(2 * ones, mask, gaps, ones, std=ones)["thickness"].flatten()
        tensor([2., 1.])

    Source: docs/papers/ice_layers.md section 1.7.
    """
    kind = provenance(mask, gaps, max_gap)
    left_missing = kind == Provenance.LEFT_MISSING
    return {
        "predicted": predicted,
        "thickness": complete(thickness, mask, torch.where(left_missing, torch.nan, predicted)),
        "provenance": kind,
        "std": torch.where(left_missing | mask, torch.nan, std),
    }
