"""Echograms of SRED by the folders that they are in: doubled ones, shared segments, completeness.

Shapes: N traces, K boundaries (the surface first), L = K - 1 layers (newest first).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from fulgurite.data.exclusions import Exclusion, name_some
from fulgurite.datamodules.ice_layers.readers.sred_file import SredFile
from fulgurite.datamodules.ice_layers.splits import PARTS
from fulgurite.datamodules.ice_layers.stack import Array
from fulgurite.errors import DataError

__all__ = [
    "Echogram",
    "Shared",
    "count_complete",
    "describe_parts",
    "keep_each_once",
    "settle_shared",
]

#: What to do with flight segments that are in several parts.
Shared = Literal["refuse", "drop", "keep"]

_OPTION = "--data.init_args.source.init_args"
_STATES = ("complete", "with gaps", "without their deepest layers")


@dataclass(frozen=True, eq=False)
class Echogram:
    """A file and the part that its folder is."""

    file: SredFile
    part: str


def keep_each_once(
    echograms: Sequence[Echogram], excluded: list[Exclusion], is_left_out: bool
) -> list[Echogram]:
    """Refuse files of one name or one content, or leave out all but the most evaluated one.

    Args:
        echograms: All echograms.
        excluded: Receives the number of those left out.
        is_left_out: Whether doubled files are left out.

    Raises:
        DataError: Files are doubled, and are not to be left out.
    """
    unique: list[Echogram] = []
    files: dict[str, Path] = {}
    for echogram in sorted(echograms, key=lambda e: -PARTS.index(e.part)):
        file = echogram.file
        digest = hashlib.sha256(file.boundaries.tobytes() + file.pos.tobytes()).hexdigest()
        keys = (f"name {file.path.stem}", f"content {digest}")
        other = next((files[key] for key in keys if key in files), None)
        if other is not None and not is_left_out:
            raise DataError(
                f"The files {other} and {file.path} are of one name or have the same layers.",
                "Remove one, or keep that of the test before that of validation and training: "
                f"`{_OPTION}.exclude+=duplicate`.",
            )
        if other is None:
            unique.append(echogram)
        for key in keys:
            files.setdefault(key, file.path)
    if repeated := len(echograms) - len(unique):
        excluded.append(Exclusion("duplicate", "files that are there twice", repeated))
    return sorted(unique, key=lambda e: (PARTS.index(e.part), e.file.path))


def settle_shared(
    echograms: list[Echogram], shared: Shared, excluded: list[Exclusion], notes: list[str]
) -> tuple[list[Echogram], frozenset[str]]:
    """Apply ``shared`` to flight segments that are in several parts.

    Args:
        echograms: All echograms.
        shared: What to do with these segments.
        excluded: Receives how many echograms were left out.
        notes: Receives what was kept.

    Returns:
        The echograms to use, and the segments that stay in several parts.

    Raises:
        DataError: Segments are in several parts, and are to be refused.

    Source: docs/papers/ice_layers.md section 2 (leakage rule); that the authors' folders share
    segments, or not, is not known.
    """
    segments = {part: {e.file.segment for e in echograms if e.part == part} for part in PARTS}
    later = {
        "train": segments["val"] | segments["test"],
        "val": segments["test"],
        "test": set[str](),
    }
    leaking = [e for e in echograms if e.file.segment in later[e.part]]
    if not leaking:
        return echograms, frozenset()
    shared_segments = frozenset(e.file.segment for e in leaking)
    count = {part: sum(e.part == part for e in leaking) for part in ("train", "val")}
    description = (
        f"{len(shared_segments)} flight segments ({name_some(sorted(shared_segments))}) are in "
        "several parts: "
        f"{count['train']} training stacks are of validated or tested segments, "
        f"{count['val']} validation stacks of tested ones"
    )
    if shared == "refuse":
        raise DataError(
            f"{description}, whose neighbouring echograms leak.",
            f"Set `{_OPTION}.folders.shared=drop` to leave those stacks out, "
            f"`{_OPTION}.folders.shared=keep` to use the folders as they are, or "
            f"`{_OPTION}.folders.split=segments` for another split.",
        )
    if shared == "drop":
        description = "training and validation stacks of segments that are evaluated later"
        excluded.append(Exclusion("shared", description, len(leaking)))
        return [e for e in echograms if e.file.segment not in later[e.part]], frozenset()
    notes.append(description)
    return echograms, shared_segments


def count_complete(boundaries: Sequence[Array], count: int) -> tuple[int, int, int]:
    """How many stacks are complete, have gaps, or lack their deepest boundaries.

    A stack whose deepest boundaries are nowhere picked lacks them, whether or not the file has a
    row for them.

    Args:
        boundaries: Boundaries of each stack, NaN where missing. Shape of each: (N, K).
        count: L, layers of a complete stack.

    Source: docs/papers/ice_layers.md section 3.5 ("complete" is L + 1 boundaries without NaN).

    Example:
        >>> gap = np.array([[0.0, 1.0, 2.0], [0.0, np.nan, 2.0]])
        >>> count_complete([np.ones((2, 3)), gap, np.ones((2, 2))], 2)
        (1, 1, 1)
    """
    states = [0, 0, 0]
    for picks in boundaries:
        picked = np.isfinite(picks[:, : count + 1])
        rows = np.flatnonzero(picked.any(0))
        if not len(rows) or rows[-1] < count:
            states[2] += 1
        else:
            states[0 if picked.all() else 1] += 1
    return states[0], states[1], states[2]


def describe_parts(echograms: Sequence[Echogram], count: int, by_folder: bool) -> list[str]:
    """How many stacks are complete, for each part or for all files.

    Args:
        echograms: All echograms.
        count: L, layers of a complete stack.
        by_folder: Whether folders are parts.
    """
    groups = {f"folders of {part}": [e for e in echograms if e.part == part] for part in PARTS}
    if not by_folder:
        groups = {"files": list(echograms)}
    lines = []
    for name, group in groups.items():
        states = count_complete([e.file.boundaries for e in group], count)
        if group:
            counted = ", ".join(f"{n} {s}" for n, s in zip(states, _STATES, strict=True))
            lines.append(f"{name}: {counted}")
    return lines
