"""Batches of plates for tests: what a DataModule gives after standardisation."""

from __future__ import annotations

import torch
from torch import Tensor

from fulgurite.domains.cs_arm_bn import PlateBatch

__all__ = ["change_images", "select_rows"]


def change_images(
    batch: PlateBatch, query: Tensor | None = None, control: Tensor | None = None
) -> PlateBatch:
    """Return a batch with other images of its queries or of its controls, or fewer controls.

    Args:
        batch: Batch of one plate.
        query: Shape: (L, C, H, W).
        control: Shape: (n, C, H, W), n of at most N.
    """
    query = batch.query if query is None else query
    control = batch.control if control is None else control
    return batch._replace(
        images=torch.cat([query, control]),
        control_row=batch.control_row[: len(control)],
        control_domain=batch.control_domain[: len(control)],
    )


def select_rows(
    batch: PlateBatch, queries: slice | Tensor, controls: slice = slice(None)
) -> PlateBatch:
    """Return a batch of some of the queries and controls."""
    query, control = batch.query[queries], batch.control[controls]
    columns = ("label", "well", "counted", "row", "query_domain")
    return batch._replace(
        images=torch.cat([query, control]),
        n_query=len(query),
        control_row=batch.control_row[controls],
        control_domain=batch.control_domain[controls],
        **{name: getattr(batch, name)[queries] for name in columns},
    )
