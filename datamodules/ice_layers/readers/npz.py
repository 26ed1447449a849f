"""Stacks in npz files: one file for each, of plain arrays.

Shapes: N traces, L layers, P physical fields.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fulgurite.data.exclusions import Exclusion, check_exclude
from fulgurite.data.listing import list_files
from fulgurite.datamodules.ice_layers.flights import StackSource
from fulgurite.datamodules.ice_layers.stack import (
    EXCLUDE,
    Array,
    Flights,
    LayerStack,
    check_thickest,
)
from fulgurite.datamodules.ice_layers.tracks.resample import measure_track
from fulgurite.datamodules.ice_layers.tracks.travel_time import remove_crossed
from fulgurite.domains.ice_layers.codes import METRES, Provenance
from fulgurite.domains.ice_layers.details import LayerLabels
from fulgurite.domains.ice_layers.npz import ARRAYS, LISTS, NAMES, read_npz_arrays, read_texts
from fulgurite.domains.ice_layers.spans import Spans
from fulgurite.errors import DataError
from fulgurite.io import data_path

__all__ = ["NpzStacks"]

_OPTION = "--data.init_args.source.init_args"
_AGAIN = f"Write it again, or leave such files out: `{_OPTION}.exclude+=unreadable`."
_KINDS = ("unreadable", "negative", "short", "layer_count")
# Arrays that are read; all others of a file are those of completed stacks alone
_ARRAYS = (
    "thickness", "boundary", "pos", "physics", "physics_flag", "distance", "truth", "layer_age",
    "provenance",
)  # fmt: skip
_APART = 3.0  # factor between two lengths of a track that no way of measuring explains (inferred)


def _refuse_misspelt(path: Path, content: Mapping[str, Any]) -> None:
    """Refuse an array that is not read, and has nearly the name of one that is not there.

    Raises:
        DataError: There is one.
    """
    read = {*_ARRAYS, *NAMES, *LISTS, "unit"}
    for name in content.keys() - {*read, *ARRAYS}:
        if nearest := difflib.get_close_matches(name, read - content.keys(), n=1, cutoff=0.85):
            raise DataError(
                f"The stack {path} has an array {name!r}, which is not read.",
                f"Did you mean {nearest[0]!r}? Else call it otherwise.",
            )


def _count_filled(content: Mapping[str, Any]) -> int:
    """Count entries of a completed stack that a model has filled; 0 of others."""
    thickness, origin = content["thickness"], content.get("provenance")
    if origin is None or origin.shape != thickness.shape:
        return 0
    return int((np.isfinite(thickness) & (origin != Provenance.OBSERVED)).sum())


def _read_labels(content: dict[str, Any], layers: int) -> LayerLabels:
    """Names and ages of the layers of a file, where it has them for each layer."""
    names, age = read_texts(content, "layer_names"), content.get("layer_age")
    return LayerLabels(
        names if len(names) == layers else (),
        age if age is not None and len(age) == layers else None,
        _read_text(content, "age_source", ""),
    )


def _read_text(content: dict[str, Any], name: str, default: str) -> str:
    return str(content[name]) if name in content else default


class NpzStacks(StackSource):
    """Stacks in npz files, in any folder structure under a root.

    Arrays of a file: ``thickness`` (N, L) [m], NaN where missing, or ``boundary`` (N, L + 1), the
    depth of each boundary from the surface down [m], NaN where it is not picked, from which sums
    of layers are known too; ``pos`` (N, 2) latitude and longitude [degrees]; optional ``physics``
    (N, L, P), ``physics_names`` (P,), ``physics_flag`` (N,), ``distance`` (N,) [m], ``truth``
    (N, L) [m], ``layer_age`` (L,) [years], ``layer_names`` (L,), ``segment`` and ``stack`` (names;
    those of the folder and the file if not given), ``unit`` of thicknesses and boundaries (``m``
    if not given, or ``range bins``).

    Args:
        root: Folder, absolute or relative to ``FULGURITE_DATA``.
        count: L, if it must be known before files are read.
        physics: Names of the physical fields, if they must be known before files are read.
        exclude: What to leave out and count instead of stopping: ``unreadable`` files, entries with
            a ``negative`` thickness or boundaries that cross, stacks with a ``short`` track (one
            trace) or with another ``layer_count`` than most.
        thickest: Largest plausible median of all observed thicknesses, above which they are taken
            to be in other units (15 m or 500 range bins if not given); more than a year's firn for
            layers of many years.

    Raises:
        ConfigError: A word in ``exclude`` is unknown.

    Source: docs/papers/ice_layers.md section 7 (names); the layout is inferred.
    """

    def __init__(
        self,
        root: str,
        count: int | None = None,
        physics: list[str] | None = None,
        exclude: list[str] = [],  # noqa: B006  # copied below
        *,
        thickest: float | None = None,
    ) -> None:
        self.root = root
        self.count = count
        self._physics = None if physics is None else tuple(physics)
        self.exclude = check_exclude(exclude, _KINDS, EXCLUDE)
        self.thickest = None if thickest is None else check_thickest(thickest)

    _needs: tuple[str, ...] = ()  # further arrays that a file must have

    @property
    def layers(self) -> int | None:
        """Number of layers, if ``count`` says it."""
        return self.count

    @property
    def physics(self) -> tuple[str, ...]:
        """Names of the physical fields; those of the first file if not given."""
        if self._physics is None:
            first = next((content for _, content in self._contents() if content), {})
            count = first["physics"].shape[-1] if "physics" in first else 0
            unnamed = tuple(f"physics_{k}" for k in range(count))
            self._physics = read_texts(first, "physics_names") or unnamed
        return self._physics

    def folder(self) -> Path:
        """The folder of the files.

        Raises:
            DataError: The folder does not exist.
        """
        return data_path(self.root)

    def paths(self) -> list[Path]:
        """The files, sorted.

        Raises:
            DataError: There is no npz file.
        """
        files = sorted(path for _, path in list_files(self.folder(), (".npz",)))
        if not files:
            raise DataError(
                f"There is no npz file under {self.root}.", f"Set `{_OPTION}.root` to their folder."
            )
        return files

    def _contents(self) -> Iterator[tuple[Path, dict[str, Any] | None]]:
        """Each file and its arrays, numbers as float64; None for one that is to be left out."""
        for path in self.paths():
            try:
                content = self._read_arrays(path)
                for name in ("thickness", "pos", *self._needs):
                    if name not in content and not (name == "thickness" and "boundary" in content):
                        raise DataError(
                            f"The stack {path} has no array {name!r}.",
                            "Give files with thickness (traces, layers) or boundary (traces, "
                            "layers + 1), and pos (traces, 2), those "
                            "of `completed` as `fulgurite predict` writes them. " + _AGAIN,
                        )
                _refuse_misspelt(path, content)
                for name in content.keys() & set(_ARRAYS):
                    array, dimensions = content[name], len(ARRAYS[name].axes)
                    if array.dtype.kind not in "biuf" or array.ndim != dimensions:
                        raise DataError(
                            f"The array {name} of {path} is not made of numbers in "
                            f"{dimensions} dimensions ({array.dtype}, {array.ndim}).",
                            _AGAIN,
                        )
                    content[name] = array.astype(np.float64)
            except DataError:
                if "unreadable" not in self.exclude:
                    raise
                yield path, None
            else:
                yield path, content

    def _read_arrays(self, path: Path) -> dict[str, Any]:
        return read_npz_arrays(path, "The stack", _AGAIN)

    def _add_thickness(self, content: dict[str, Any]) -> int:
        """Add thickness to arrays with boundaries, and return how many of these were left out."""
        if "boundary" not in content:
            return 0
        crossed = 0
        if "negative" in self.exclude:
            content["boundary"], crossed = remove_crossed(content["boundary"])
        if crossed or "thickness" not in content:
            content["thickness"] = np.diff(content["boundary"], axis=1)
        return crossed

    def _stack(self, path: Path, content: dict[str, Any]) -> LayerStack:
        """The stack of a file's arrays."""
        thickness, pos = content["thickness"], content["pos"]
        shape = (*thickness.shape, len(self.physics))
        physics = content.get("physics", np.zeros((*thickness.shape, 0)))
        names = read_texts(content, "physics_names") or self.physics
        if physics.shape == shape and names != self.physics:
            raise DataError(
                f"The physical fields {', '.join(names)} of {path} are not those of others, "
                f"{', '.join(self.physics)}.",
                "Give the same fields in the same order.",
            )
        if physics.shape != shape:
            raise DataError(
                f"The physical fields {', '.join(names)} of {path} have shape {physics.shape}, "
                f"not {shape}.",
                f"Give one field for each of {', '.join(self.physics) or '(none)'}.",
            )
        track = measure_track(pos) if pos.shape == (len(thickness), 2) else np.zeros(len(thickness))
        distance = content.get("distance", track)
        if len(distance) and track[-1] > 0:
            ratio = (distance[-1] - distance[0]) / track[-1]
            if not 1 / _APART <= ratio <= _APART:
                raise DataError(
                    f"The distance of {path} ends at {distance[-1]:g} m, the positions are "
                    f"{track[-1]:g} m apart along the track.",
                    "Give distance in metres, pos as latitude and longitude in degrees.",
                )
        try:
            return LayerStack(
                _read_text(content, "stack", path.stem),
                _read_text(content, "segment", path.parent.name),
                thickness,
                physics.astype(np.float32),
                content.get("physics_flag", np.zeros(len(thickness))).astype(np.uint8),
                pos,
                distance,
                content.get("truth"),
                unit=_read_text(content, "unit", METRES),
                labels=_read_labels(content, thickness.shape[1]),
                **self._extra(content),
            )
        except DataError as error:
            raise DataError(f"The stack {path} is unusable: {error.problem}", error.hint) from error

    def _extra(self, content: dict[str, Any]) -> dict[str, Any]:
        """Further fields of a stack."""
        return {"spans": Spans.of_depth(content["boundary"])} if "boundary" in content else {}

    def load(self) -> Flights:
        """Return the stacks.

        Raises:
            DataError: A file is unusable and not to be left out.
        """
        stacks: list[LayerStack] = []
        paths: dict[str, Path] = {}
        left_out = dict.fromkeys((*_KINDS, "empty"), 0)
        age: Array | None = None
        names: tuple[str, ...] = ()
        unlike = {"ages": 0, "names": 0}
        filled = 0
        for path, content in self._contents():
            if content is None:
                left_out["unreadable"] += 1
                continue
            left_out["negative"] += self._add_thickness(content)
            thickness = content["thickness"]
            filled += 0 if self._needs else _count_filled(content)
            if "short" in self.exclude and len(thickness) == 1:
                left_out["short"] += 1
                continue
            if "negative" in self.exclude:
                bad = (thickness <= 0) | np.isinf(thickness)
                left_out["negative"] += int(bad.sum())
                content["thickness"] = thickness = np.where(bad, np.nan, thickness)
            if thickness.size and np.isnan(thickness).all():
                left_out["empty"] += 1
                continue
            stack = self._stack(path, content)
            if stack.name in paths:
                raise DataError(
                    f"The stacks {paths[stack.name]} and {path} are both called {stack.name}.",
                    "Give every stack a name of its own.",
                )
            stacks.append(stack)
            paths[stack.name] = path
            its_age = content.get("layer_age", np.ones(1))
            if not (np.diff(its_age, prepend=0.0) > 0).all():
                raise DataError(
                    f"The layer_age of {path} does not rise from 0.",
                    "Give the age of each layer's lower boundary [years], newest layer first.",
                )
            age = content.get("layer_age") if age is None else age
            its_names = read_texts(content, "layer_names")
            names = names or its_names
            if age is not None and "layer_age" in content:
                unlike["ages"] += not np.array_equal(content["layer_age"], age)
            unlike["names"] += its_names not in ((), names)
        counts = [stack.thickness.shape[1] for stack in stacks]
        usual = self.count or (max(sorted(set(counts)), key=counts.count) if counts else 1)
        if "layer_count" not in self.exclude and set(counts) - {usual}:
            other = next(stack for stack in stacks if stack.thickness.shape[1] != usual)
            raise DataError(
                f"The stack {paths[other.name]} has {other.thickness.shape[1]} layers, others have "
                f"{usual}.",
                "Give all stacks the same number, or leave such ones out: "
                f"`{_OPTION}.exclude+=layer_count`.",
            )
        usual_stacks = [s for s in stacks if s.thickness.shape[1] == usual]
        left_out["layer_count"], stacks = len(stacks) - len(usual_stacks), usual_stacks
        descriptions = {
            "unreadable": "unreadable files",
            "negative": "entries that are not positive",
            "short": "stacks of one trace",
            "layer_count": "stacks with another number of layers",
            "empty": "stacks without any pick",
        }
        excluded = [
            Exclusion(k, descriptions[k], number) for k, number in left_out.items() if number
        ]
        if age is None or len(age) != usual:
            age = np.arange(1.0, usual + 1)
        if len(names) != usual:
            names = tuple(f"layer_{k:02}" for k in range(1, usual + 1))
        notes = [
            f"{count} stacks have other {what} of layers than the first, which is reported"
            for what, count in unlike.items()
            if count
        ]
        if filled:
            notes.append(f"{filled} entries that a model filled count as observed")
        return Flights(stacks, self.physics, names, age, excluded, notes, self.thickest)
