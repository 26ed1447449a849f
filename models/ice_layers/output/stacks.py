"""Completed stacks, and how they lie in npz files; NetCDF is :mod:`.netcdf`.

Axes: N traces, L layers (newest first), P physical fields.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fulgurite.domains.ice_layers.codes import METRES, UNITS, Provenance
from fulgurite.domains.ice_layers.details import FlightDetails, LayerLabels
from fulgurite.domains.ice_layers.npz import (
    ARRAYS,
    COMPLETED_ARRAYS,
    DETAIL_ARRAYS,
    LISTS,
    NAMES,
    convert,
    read_texts,
    write_npz_arrays,
)
from fulgurite.errors import DataError
from fulgurite.foreign import read_arrays, reading
from fulgurite.io import to_file_name
from fulgurite.models.ice_layers.output.origin import Origin

__all__ = [
    "CompletedStack",
    "FlightDetails",
    "StackMetadata",
    "completed_stacks",
    "file_name",
    "file_names",
    "make_stack",
    "read_npz",
    "write_npz",
]

AGAIN = "Write it again with `fulgurite predict`."


@dataclass(frozen=True, eq=False)
class CompletedStack:
    """One stack with every gap filled or marked, and what says where each value is from.

    Args:
        thickness: Completed [m]; NaN where left missing. Shape: (N, L), float64.
        provenance: Codes of :class:`~fulgurite.domains.ice_layers.codes.Provenance`.
            Shape: (N, L), uint8.
        std: Standard deviation of filled values [m], NaN elsewhere. Shape: (N, L), float32.
        observed: Shape: (N, L), bool.
        physics: Shape: (N, L, P), float32.
        pos: Latitude and longitude [degrees]. Shape: (N, 2), float64.
        distance: Along the track from the first trace [m]. Shape: (N,), float64.
        segment: Name of the flight segment.
        stack: Name of the stack.
        trained_segments: Names of the segments that the completing model was trained on.
        physics_names: Names of the P physical fields.
        layer_names: Names of the L layers; numbered if empty.
        layer_age: Age of each layer's lower boundary [years]; empty if unknown. Shape: (L,).
        unit: Unit of thicknesses, ``m`` or ``range bins``.
        details: What is known of the traces beside their layers.
        origin: What made it.

    Raises:
        DataError: Shapes or provenance do not fit together.
    """

    thickness: NDArray[np.float64]
    provenance: NDArray[np.uint8]
    std: NDArray[np.float32]
    observed: NDArray[np.bool_]
    physics: NDArray[np.float32]
    pos: NDArray[np.float64]
    distance: NDArray[np.float64]
    segment: str
    stack: str
    trained_segments: tuple[str, ...]
    physics_names: tuple[str, ...]
    layer_names: tuple[str, ...] = ()
    layer_age: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    unit: str = METRES
    details: FlightDetails = field(default_factory=FlightDetails)
    origin: Origin = field(default_factory=Origin)

    def __post_init__(self) -> None:
        n, layers = self.observed.shape
        expected = {"physics": (n, layers, len(self.physics_names)), "pos": (n, 2)}
        expected |= {"thickness": (n, layers), "provenance": (n, layers), "std": (n, layers)}
        expected |= {"distance": (n,)}
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise DataError(
                    f"The completed stack {self.stack} has {name} of shape "
                    f"{getattr(self, name).shape}, not {shape}.",
                    "Give arrays of one number of traces and layers.",
                )
        for name in ("layer_names", "layer_age"):
            if len(getattr(self, name)) not in (0, layers):
                raise DataError(
                    f"The completed stack {self.stack} has {len(getattr(self, name))} {name} for "
                    f"{layers} layers.",
                    "Give one for each layer, or none.",
                )
        if self.unit not in UNITS:
            raise DataError(
                f"The completed stack {self.stack} is in {self.unit!r}.",
                f"Use {' or '.join(UNITS)}.",
            )
        is_observed = self.provenance == Provenance.OBSERVED
        if (is_observed != self.observed).any() or (self.provenance > max(Provenance)).any():
            raise DataError(
                f"The provenance of the completed stack {self.stack} contradicts what is observed.",
                "Take it from fulgurite.models.ice_layers.provenance.",
            )
        if (~np.isfinite(self.thickness) != (self.provenance == Provenance.LEFT_MISSING)).any():
            raise DataError(
                f"The completed stack {self.stack} has values where it was left missing, or none "
                "where it was filled.",
                "Take them from fulgurite.models.ice_layers.complete.",
            )
        self.details.check(self.stack, n, layers)

    @property
    def depth(self) -> NDArray[np.float64]:
        """Depth of each boundary below the surface [m], the surface first. Shape: (N, L + 1).

        It is unknown below the first layer that was left missing.
        """
        below = np.cumsum(self.thickness, axis=1)
        return np.concatenate([np.zeros((len(below), 1)), below], axis=1)

    @property
    def picked(self) -> NDArray[np.bool_]:
        """Whether each boundary was picked, the surface first. Shape: (N, L + 1).

        Where nothing else is known, those are picked above which every layer was observed.
        """
        if self.details.picked is not None:
            return self.details.picked
        surface = np.ones((len(self.observed), 1), np.bool_)
        return np.concatenate([surface, np.logical_and.accumulate(self.observed, axis=1)], axis=1)


@dataclass(frozen=True, eq=False)
class StackMetadata:
    """What the data say of their stacks, which completed ones carry.

    Args:
        segments: Names of the segments, by number.
        stacks: Names of the stacks, by number.
        physics_names: Names of the P physical fields.
        layer_names: Names of the L layers.
        layer_age: Age of each layer's lower boundary [years]. Shape: (L,) or (0,).
        unit: Unit of thicknesses.
    """

    segments: Sequence[str]
    stacks: Sequence[str]
    physics_names: Sequence[str]
    layer_names: Sequence[str] = ()
    layer_age: Any = ()
    unit: str = METRES


def file_name(name: str) -> str:
    """A stack's name as the name of a file without ending.

    Example:
        >>> file_name("20120330_01/003")
        '20120330_01_003'
    """
    return to_file_name(name) or "stack"


def file_names(names: Sequence[str]) -> list[str]:
    """Names of the files of stacks without ending, all different, also where case is ignored.

    Example:
        >>> file_names(["a/1", "a_1", "A/1", "b"])
        ['a_1', 'a_1-2', 'A_1-3', 'b']
    """
    taken: set[str] = set()
    unique: list[str] = []
    for name in names:
        plain = file_name(name)
        numbered = (f"{plain}-{number}" for number in itertools.count(2))
        free = next(c for c in itertools.chain([plain], numbered) if c.casefold() not in taken)
        taken.add(free.casefold())
        unique.append(free)
    return unique


def _to_numpy(value: Any) -> NDArray[Any]:
    return np.asarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value)


def completed_stacks(
    batch: Any,
    filled: Any,
    metadata: StackMetadata,
    *,
    trained_segments: Sequence[str],
    details: Callable[[int, NDArray[np.float64]], FlightDetails] | None = None,
    labels: Callable[[int], LayerLabels] | None = None,
    origin: Origin | None = None,
) -> list[CompletedStack]:
    """Take the stacks of a predicted batch apart.

    Args:
        batch: A batch of PyG, with ``observed``, ``physics``, ``pos``, ``distance``, ``segment``,
            ``stack`` and ``ptr``.
        filled: ``thickness``, ``provenance`` and ``std`` of the batch, as ``predict_step`` gives.
        metadata: What the data say of their stacks.
        trained_segments: Names of the segments that the model was trained on.
        details: Gives what is known of a stack's traces from its number and completed thickness.
        labels: Gives the names and ages of a stack's layers from its number, where these are not
            those of all.
        origin: What made the stacks.
    """
    arrays = {name: _to_numpy(filled[name]) for name in ("thickness", "provenance", "std")}
    arrays |= {n: _to_numpy(getattr(batch, n)) for n in ("observed", "physics", "pos", "distance")}
    arrays = {name: value.astype(ARRAYS[name].kind) for name, value in arrays.items()}
    bounds = _to_numpy(batch.ptr).tolist()
    which = zip(_to_numpy(batch.segment).tolist(), _to_numpy(batch.stack).tolist(), strict=True)
    common = LayerLabels(tuple(metadata.layer_names), np.asarray(metadata.layer_age, np.float64))
    labels, origin = labels or (lambda _: common), origin or Origin()
    return [
        CompletedStack(
            **{name: value[start:stop] for name, value in arrays.items()},
            segment=metadata.segments[segment],
            stack=metadata.stacks[stack],
            trained_segments=tuple(trained_segments),
            physics_names=tuple(metadata.physics_names),
            layer_names=its.names,
            layer_age=np.zeros(0) if its.age is None else np.asarray(its.age, np.float64),
            unit=metadata.unit,
            details=FlightDetails()
            if details is None
            else details(stack, arrays["thickness"][start:stop]),
            origin=replace(origin, age_source=its.age_source or origin.age_source),
        )
        for start, stop, (segment, stack) in zip(bounds, bounds[1:], which, strict=False)
        for its in [labels(stack)]
    ]


# --- npz ---------------------------------------------------------------------------------------


def write_npz(path: str | Path, stack: CompletedStack) -> Path:
    """Write a stack as arrays of numbers and Unicode, atomically.

    Args:
        path: The file.
        stack: The stack to write.

    Example:
        >>> import tempfile
        >>> one = np.ones((2, 1))
        >>> stack = CompletedStack(one, np.zeros((2, 1), np.uint8), np.float32(one * np.nan),
        ...     one > 0, np.zeros((2, 1, 0), np.float32), np.zeros((2, 2)), np.arange(2.0),
        ...     "20120330_01", "20120330_01_0000", ("20110401_02",), ())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     read_npz(write_npz(Path(folder) / "a.npz", stack)).trained_segments
        ('20110401_02',)
    """
    path = Path(path)
    content: dict[str, Any] = {name: getattr(stack, name) for name in COMPLETED_ARRAYS}
    content |= {name: np.array(getattr(stack, name)) for name in NAMES}
    content |= {name: np.array(getattr(stack, name), dtype=np.str_) for name in LISTS}
    known = stack.details.arrays()
    content |= {name: known[name] for name in DETAIL_ARRAYS if name in known}
    origin = stack.origin
    texts = {"time_scale": stack.details.time_scale, "source": origin.source, "unit": stack.unit}
    texts |= {"checkpoint": origin.checkpoint, "checkpoint_sha256": origin.checkpoint_sha256}
    texts |= {"age_source": origin.age_source}
    content |= {name: np.array(text) for name, text in texts.items() if text}
    if origin.climate_files:
        content["climate_files"] = np.array(origin.climate_files, dtype=np.str_)
    return write_npz_arrays(path, content)


def read_npz(path: str | Path) -> CompletedStack:
    """Read what :func:`write_npz` wrote; nothing in the file is executed.

    Raises:
        DataError: The file is damaged, or no completed stack.
    """
    with reading(path, "The completed stack", AGAIN):
        return make_stack(path, read_arrays(path))


def make_stack(path: str | Path, content: dict[str, Any]) -> CompletedStack:
    """Make a stack of what a file holds.

    Args:
        path: The file.
        content: Arrays and texts by name; those of the flight and the origin may be absent.

    Raises:
        ValueError: An array or text is missing, or of another type.
        DataError: The arrays do not fit together.
    """
    required = [*COMPLETED_ARRAYS, *NAMES, *LISTS]
    if missing := [name for name in required if name not in content]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    values_of: dict[str, Any] = {name: convert(name, content[name]) for name in COMPLETED_ARRAYS}
    values_of |= {name: str(content[name]) for name in NAMES}
    values_of |= {name: read_texts(content, name) for name in LISTS}
    details: dict[str, Any] = {
        name: convert(name, content[name]) for name in DETAIL_ARRAYS if name in content
    }
    texts: dict[str, Any] = {
        name: str(content.get(name, ""))
        for name in ("time_scale", "source", "age_source", "checkpoint", "checkpoint_sha256")
    }
    climate_files = read_texts(content, "climate_files")
    try:
        return CompletedStack(
            **values_of,
            unit=str(content.get("unit", METRES)),
            details=FlightDetails(time_scale=texts.pop("time_scale"), **details),
            origin=Origin(**texts, climate_files=climate_files),
        )
    except DataError as error:
        raise DataError(f"The file {path} is unusable: {error.problem}", error.hint) from error
