"""What a batch of stacks holds, which segments a checkpoint has seen, and what is refused.

A batch is PyG's, node-major: ``thickness`` (N, L) [m], ``observed`` (N, L), ``physics`` (N, L, P),
``pos`` (N, 2) [degrees], ``distance`` (N,) [m], ``stack`` (B,), ``ptr`` (B + 1,); where boundaries
were measured also ``span_start``, ``span_path`` and ``refraction`` (N, L) of
:class:`~fulgurite.domains.ice_layers.spans.Spans`; of generated data ``truth`` (N, L) [m], and
``dropped`` (N, L) where observed entries were left out.

Axes: B stacks, N traces of all of them, L layers, P physical fields.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from fulgurite.errors import CheckpointError, DataError
from fulgurite.models.ice_layers.data.graph import Track

__all__ = [
    "KeptBoundaries",
    "check_batch",
    "known_truth",
    "read_segments",
    "refuse_seen",
    "segment_of_traces",
]

KeptBoundaries = Literal["all", "trusted", "none"]
"""Which picked boundaries come out where they were picked."""


def read_segments(checkpoint: dict[str, Any]) -> tuple[str, ...]:
    """Names of the segments that a checkpoint's networks have seen.

    Raises:
        CheckpointError: The checkpoint does not name them.
    """
    names = checkpoint.get("ice_segments")
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(
            "The checkpoint does not say which flight segments it has seen.",
            "Give a checkpoint of a run of ice_layers.",
        )
    return tuple(names)


def segment_of_traces(batch: Any) -> Tensor:
    """Number of each trace's flight segment. Shape: (N,)."""
    segment: Tensor = batch.segment[Track.of_batch(batch).stack]
    return segment


def known_truth(batch: Any) -> Tensor:
    """True thickness [m], NaN where nobody knows it. Shape: (N, L)."""
    truth: Tensor | None = getattr(batch, "truth", None)
    return torch.full_like(batch.thickness, torch.nan) if truth is None else truth


def refuse_seen(trained: Collection[str], data: Any, also: str = "") -> None:
    """Refuse a model that was trained or validated on segments of the test.

    Segments that the configuration shares between parts on purpose are not refused.

    Args:
        trained: Names of the flight segments that training or validation has seen.
        data: The DataModule, after its setup.
        also: Further text of the hint.

    Raises:
        DataError: A segment of the test is one of ``trained``.

    Source: docs/papers/ice_layers.md section 2 (leakage rule).
    """
    tested = {s.segment for s in data.stacks_of("test")} if hasattr(data, "stacks_of") else set()
    tested -= getattr(data, "shared_segments", frozenset())
    if overlap := sorted(tested & set(trained)):
        raise DataError(
            f"The checkpoint was trained or validated on flight segments of the test: "
            f"{', '.join(overlap[:3])}{', …' if len(overlap) > 3 else ''}.",
            "Use its run's data options (split and seed of data.init_args, and of the source)"
            f"{also}.",
        )


def check_batch(batch: Any, fields: Iterable[str]) -> None:
    """Refuse a batch of other data.

    Raises:
        DataError: The batch lacks a field.
    """
    if missing := [name for name in fields if getattr(batch, name, None) is None]:
        raise DataError(
            f"A batch lacks {', '.join(missing)}.",
            "Use data.class_path=fulgurite.datamodules.ice_layers.IceLayerDataModule.",
        )
