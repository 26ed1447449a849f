"""Stacks that a completion model has filled, as training data of the deep-layer predictor.

Shapes: N traces, L layers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fulgurite.data.exclusions import Exclusion, name_some
from fulgurite.datamodules.ice_layers.readers.npz import NpzStacks
from fulgurite.datamodules.ice_layers.stack import Flights, LayerStack
from fulgurite.domains.ice_layers.codes import Provenance
from fulgurite.domains.ice_layers.geodesy import MEAN_EARTH_RADIUS, to_vectors
from fulgurite.domains.ice_layers.npz import read_texts
from fulgurite.errors import DataError
from fulgurite.io import data_path

__all__ = ["CompletedStacks", "drop_overlapping", "refuse_leaks", "refuse_unlike"]


def refuse_unlike(completed: Flights, flights: Flights) -> None:
    """Refuse completed stacks that are not of the kind of others.

    Args:
        completed: The completed stacks.
        flights: The others.

    Raises:
        DataError: They have other layers, physical fields or units.
    """
    for quantity, theirs, mine in (
        ("layers", len(completed.layer_names), len(flights.layer_names)),
        ("physical fields", completed.physics, flights.physics),
        ("unit", completed.unit, flights.unit),
    ):
        if theirs != mine:
            raise DataError(
                f"The completed stacks have the {quantity} {theirs}, the source {mine}.",
                "Give `--data.init_args.completed` stacks that were made of this source.",
            )


def refuse_leaks(stacks: Sequence[LayerStack], test: Collection[str]) -> None:
    """Stop if the model that completed the stacks was trained on a test segment.

    Raises:
        DataError: The model was trained on one of them.

    Source: docs/papers/ice_layers.md section 2 (leakage rule).
    """
    for stack in stacks:
        if leaked := sorted(set(stack.trained_segments) & set(test)):
            raise DataError(
                f"The model that completed {stack.name} was trained on the test segments "
                f"{name_some(leaked)}.",
                "Train it with the same `split` and `seed` of `--data.init_args`.",
            )


def drop_overlapping(
    stacks: Sequence[LayerStack], evaluated: Sequence[LayerStack], reach: float
) -> tuple[list[LayerStack], list[Exclusion]]:
    """Leave out stacks of evaluated segments, and those that come near an evaluated trace.

    Args:
        stacks: Completed stacks.
        evaluated: Stacks of validation and test.
        reach: Distance within which traces overlap [m].

    Source: docs/papers/ice_layers.md section 2 (leakage rule).
    """
    segments = {stack.segment for stack in evaluated}
    usable = [stack for stack in stacks if stack.segment not in segments]
    same = len(stacks) - len(usable)
    crossing = 0
    if evaluated and usable:
        from scipy.spatial import cKDTree

        tree = cKDTree(
            np.concatenate([to_vectors(stack.pos, MEAN_EARTH_RADIUS) for stack in evaluated])
        )
        near = [
            tree.query(to_vectors(stack.pos, MEAN_EARTH_RADIUS))[0].min() <= reach
            for stack in usable
        ]
        crossing = sum(near)
        usable = [stack for stack, close in zip(usable, near, strict=True) if not close]
    exclusions = (
        Exclusion("evaluated", "completed stacks of validation or test segments", same),
        Exclusion("overlap", f"completed stacks within {reach:g} m of evaluated ones", crossing),
    )
    return usable, [exclusion for exclusion in exclusions if exclusion.count]


class CompletedStacks(NpzStacks):
    """Completed stacks that ``fulgurite predict`` wrote: npz files.

    Arrays of a file beside those of :class:`NpzStacks`: ``provenance`` (N, L), codes of
    :class:`~fulgurite.domains.ice_layers.codes.Provenance`, ``trained_segments`` names of the
    segments that the completing model was trained on, which may be none. Filled entries that are
    not positive are missing.

    Args:
        root: Folder, absolute or relative to the working folder, as those of runs are.
        count: L, if it must be known before files are read.
        physics: Names of the physical fields, if they must be known before files are read.
        exclude: What to leave out and count, as of :class:`NpzStacks`.
        thickest: Largest plausible median thickness, as of :class:`NpzStacks`.

    Raises:
        ConfigError: A word in ``exclude`` is unknown.

    Source: docs/papers/ice_layers.md section 2.
    """

    def __init__(
        self,
        root: str,
        count: int | None = None,
        physics: list[str] | None = None,
        exclude: list[str] = [],  # noqa: B006  # copied by the parent
        *,
        thickest: float | None = None,
    ) -> None:
        # a network may predict a thickness of 0 or less: such entries stay missing
        super().__init__(root, count, physics, [*exclude, "negative"], thickest=thickest)

    def folder(self) -> Path:
        """The folder of the files.

        Raises:
            DataError: The folder does not exist.
        """
        return data_path(self.root)

    _needs = ("provenance", "trained_segments")

    def _extra(self, content: dict[str, Any]) -> dict[str, Any]:
        missing = np.isnan(content["thickness"])
        provenance = np.where(missing, Provenance.LEFT_MISSING, content["provenance"])
        return super()._extra(content) | {
            "provenance": provenance.astype(np.uint8),
            "trained_segments": read_texts(content, "trained_segments"),
        }
