"""The data contract: a stack of layers along a flight line, checked when it is built.

Shapes: N traces (nodes), L layers (newest first), P physical fields.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fulgurite.data.exclusions import Exclusion
from fulgurite.datamodules.ice_layers.tracks.resample import Array
from fulgurite.domains.ice_layers.codes import METRES, RANGE_BINS
from fulgurite.domains.ice_layers.details import FlightDetails, LayerLabels
from fulgurite.domains.ice_layers.geodesy import is_in_greenland
from fulgurite.domains.ice_layers.spans import ArraySpans, Spans
from fulgurite.errors import ConfigError, DataError
from fulgurite.extras import optional_import

if TYPE_CHECKING:
    from torch_geometric.data import Data


__all__ = [
    "EXCLUDE",
    "THICKEST",
    "THICKEST_BINS",
    "Array",
    "Flights",
    "LayerStack",
    "OwnSplit",
    "check_plausible",
    "check_thickest",
]

#: The list of what a source leaves out, behind ``--data.init_args.``.
EXCLUDE = "source.init_args.exclude"

#: Medians of a layer's thickness that a unit can have, and what is less, or more, by its looks
#: (inferred).
PLAUSIBLE_THICKNESS = {
    METRES: (0.01, 1_000.0, "kilometres", "millimetres"),
    RANGE_BINS: (2.0, 5_000.0, "metres", "bins that are counted another way"),
}
_CONVERT = {
    METRES: "Convert thicknesses to metres, travel times to seconds.",
    RANGE_BINS: "Convert thicknesses to range bins.",
}

#: Largest median thickness of a source's layers, if it does not say another [m]: a year's firn is
#: thinner, and centimetres of it are more (inferred).
THICKEST = 15.0

#: No ice is thicker [m], and none lies between Antarctica and this latitude [degrees], but that of
#: mountains.
_DEEPEST_ICE, _NORTH_OF_ANTARCTICA = 5_000.0, -60.0

#: Factor between the median thickness of a stack in another unit and that of all (inferred).
_UNITS_APART = 50.0

#: The same in range bins: published layers have 56 in the mean (inferred).
THICKEST_BINS = 500.0


def check_plausible(thickness: Array, subject: str, unit: str = METRES) -> None:
    """Refuse thicknesses that cannot be in their unit.

    Shape:
        - thickness: any, NaN where missing.

    Raises:
        DataError: The median is that of another unit.

    Source: inferred.

    Example:
        >>> check_plausible(np.array([0.8, np.nan]), "a.npz")
    """
    finite = thickness[np.isfinite(thickness)]
    if not finite.size:
        return
    median = float(np.median(finite))
    low, high, less, more = PLAUSIBLE_THICKNESS[unit]
    if not low <= median <= high:
        raise DataError(
            f"The median thickness of a layer in {subject} is {median:g} {unit}, which looks like "
            f"{less if median < low else more}.",
            _CONVERT[unit],
        )


def check_thickest(thickest: float, unit: str = METRES) -> float:
    """Return the limit on a source's median thickness if it is in range.

    Raises:
        ConfigError: The limit is out of range.

    Example:
        >>> check_thickest(300)
        300
    """
    low, high, _, _ = PLAUSIBLE_THICKNESS[unit]
    if not low <= thickest <= high:
        raise ConfigError(
            f"The largest median thickness of layers is {thickest} {unit}.",
            f"Set `--data.init_args.source.init_args.thickest` between {low:g} and {high:g}.",
        )
    return thickest


@dataclass(frozen=True, eq=False)
class LayerStack:
    """One block of traces along a flight line with thickness layers.

    Thicknesses are in ``unit``, which is metres nearly everywhere.

    Attributes:
        name: Unique name, usable in file names.
        segment: Name of the flight segment.
        thickness: Thickness as it lies [m], NaN where missing. Shape: (N, L) float64.
        physics: Physical fields. Shape: (N, L, P) float32.
        physics_flag: 0 interpolated, 1 nearest grid cell. Shape: (N,) uint8.
        pos: Latitude and longitude [degrees]. Shape: (N, 2) float64.
        distance: Along the track from the first trace [m]. Shape: (N,) float64.
        truth: Thickness without noise or gaps [m], of generated data. Shape: (N, L) float64.
        provenance: Of completed stacks: codes of
            :class:`~fulgurite.domains.ice_layers.codes.Provenance`. Shape: (N, L) uint8.
        trained_segments: Of completed stacks: segments that the completing model was trained on.
        unit: Unit of thicknesses, ``m`` or ``range bins``.
        record: Further arrays of the traces, such as time and elevation.
        spans: Measured sums of layers between picked boundaries, if any are known.
        labels: Names and ages of its layers, as far as they may not be those of all stacks.

    Raises:
        DataError: Shapes do not fit, or a value is impossible: a thickness that is not positive,
            infinite or not in its unit, spans that contradict it, a physical field that is not
            finite, a position off the globe, fewer than two traces.

    Example:
        >>> stack = LayerStack("s_0000", "s", np.ones((2, 3)), np.zeros((2, 3, 1), np.float32),
        ...     np.zeros(2, np.uint8), np.array([[70.0, -40.0], [70.0, -40.1]]), np.arange(2.0))
        >>> int(stack.observed.sum())
        6
    """

    name: str
    segment: str
    thickness: Array
    physics: NDArray[np.float32]
    physics_flag: NDArray[np.uint8]
    pos: Array
    distance: Array
    truth: Array | None = None
    provenance: NDArray[np.uint8] | None = None
    trained_segments: tuple[str, ...] = ()
    unit: str = METRES
    record: FlightDetails | None = None
    spans: ArraySpans | None = None
    labels: LayerLabels = LayerLabels()

    def __post_init__(self) -> None:
        if self.thickness.ndim != 2:
            raise DataError(
                f"The thickness of stack {self.name} has {self.thickness.ndim} dimensions.",
                "Give an array of (traces, layers).",
            )
        n, layers = self.thickness.shape
        if n < 2 or not layers:
            raise DataError(
                f"Stack {self.name} has {n} traces of {layers} layers.",
                "A stack needs at least two traces and one layer.",
            )
        shapes: dict[str, tuple[int, ...]] = {
            "physics": (n, layers, self.physics.shape[-1]),
            "physics_flag": (n,),
            "pos": (n, 2),
            "distance": (n,),
            "truth": (n, layers),
            "provenance": (n, layers),
        }
        for key, shape in shapes.items():
            value = getattr(self, key)
            if value is not None and value.shape != shape:
                raise DataError(
                    f"The field {key} of stack {self.name} has shape {value.shape} for "
                    f"{n} traces of {layers} layers.",
                    f"Give {shape}.",
                )
        if (self.thickness <= 0).any() or np.isinf(self.thickness).any():
            bad = self.thickness[(self.thickness <= 0) | np.isinf(self.thickness)]
            raise DataError(
                f"Stack {self.name} has {bad.size} thicknesses that are not positive and finite, "
                f"such as {bad[0]:g} {self.unit}.",
                "Give NaN where a layer is missing, or leave such entries out: "
                "`--data.init_args.source.init_args.exclude+=negative`.",
            )
        if self.unit not in PLAUSIBLE_THICKNESS:
            raise DataError(
                f"The unit of stack {self.name} is {self.unit!r}.",
                f"Give thicknesses in one of {', '.join(PLAUSIBLE_THICKNESS)}.",
            )
        check_plausible(self.thickness, f"stack {self.name}", self.unit)
        if self.unit == METRES and (thick := self.thickness[self.thickness > _DEEPEST_ICE]).size:
            raise DataError(
                f"Stack {self.name} has {thick.size} layers that are thicker than any ice, such as "
                f"{thick[0]:g} m.",
                "Give NaN where a layer is missing, and thicknesses in metres.",
            )
        if self.spans is not None:
            self._check_spans(self.spans)
        if not np.isfinite(self.physics).all():
            raise DataError(
                f"A physical field of stack {self.name} is not finite.",
                "Fill it before, or leave the stack out.",
            )
        if not (np.abs(self.pos) <= (90, 360)).all():
            raise DataError(
                f"A position of stack {self.name} is not on the globe.",
                "Give latitude and longitude in degrees, in this order.",
            )
        latitude, longitude = (float(value) for value in np.median(self.pos, 0))
        if latitude > _NORTH_OF_ANTARCTICA and is_in_greenland(longitude, latitude):
            raise DataError(
                f"Latitude and longitude of stack {self.name} are exchanged ({latitude:g}, "
                f"{longitude:g}).",
                "Give latitude and longitude in degrees, in this order.",
            )
        if not np.isfinite(self.distance).all() or (np.diff(self.distance) < 0).any():
            raise DataError(
                f"The distance of stack {self.name} does not rise along the track.",
                "Sort its traces.",
            )

    def _check_spans(self, spans: ArraySpans) -> None:
        if spans.start.shape != self.thickness.shape or spans.path.shape != self.thickness.shape:
            raise DataError(
                f"The boundaries of stack {self.name} have shape {spans.path.shape} by layers, its "
                f"thickness {self.thickness.shape}.",
                "Give one boundary more than there are layers.",
            )
        if (spans.path <= 0).any():
            raise DataError(
                f"Stack {self.name} has {int((spans.path <= 0).sum())} layers between boundaries "
                "that cross or touch.",
                "Give boundaries from the surface down, and NaN where a pick is wrong.",
            )
        if (wrong := spans.contradicts(self.thickness)).any():
            trace, layer = np.argwhere(wrong)[0]
            raise DataError(
                f"The thickness of stack {self.name} is not what lies between its boundaries at "
                f"{int(wrong.sum())} entries, such as trace {trace}, layer {layer + 1}.",
                "Give boundaries and the thickness between them, or one of both alone.",
            )

    @property
    def observed(self) -> NDArray[np.bool_]:
        """Where the thickness is known. Shape: (N, L) bool."""
        return np.isfinite(self.thickness)

    @property
    def known_spans(self) -> ArraySpans:
        """What was measured between picked boundaries; single layers where no sum is known."""
        return Spans.of_thickness(self.thickness, sums=True) if self.spans is None else self.spans

    def to_data(self, segment: int, stack: int, dropped: NDArray[np.bool_] | None = None) -> Data:
        """Return it as node-major PyG ``Data``.

        Args:
            segment: Number of the flight segment.
            stack: Number of the stack.
            dropped: Layers whose lower boundary is to be hidden from the model: they and the
                layers below are missing then, and what they add up to may be known.
                Shape: (N, L) bool.

        Raises:
            MissingExtraError: torch-geometric is not installed.
        """
        graphs = optional_import("torch_geometric.data", "ice", "Batching stacks")
        spans = self.known_spans if dropped is None else self.known_spans.hide(dropped)
        fields: dict[str, Any] = {
            "thickness": torch.from_numpy(self.thickness),
            "observed": torch.from_numpy(spans.observed),
            "dropped": torch.from_numpy(self.observed & ~spans.observed),
            "physics": torch.from_numpy(self.physics),
            "physics_flag": torch.from_numpy(self.physics_flag),
            "pos": torch.from_numpy(self.pos),
            "distance": torch.from_numpy(self.distance),
            "segment": torch.tensor([segment]),
            "stack": torch.tensor([stack]),
        }
        if self.spans is not None:
            fields |= spans.batch_fields()
        if self.truth is not None:
            fields["truth"] = torch.from_numpy(self.truth)
        if self.provenance is not None:
            fields["provenance"] = torch.from_numpy(self.provenance)
        return graphs.Data(num_nodes=len(self.thickness), **fields)


@dataclass(frozen=True)
class OwnSplit:
    """The split that the files of a source come with, such as by folders.

    Attributes:
        part: Name of each stack -> its part.
        shared: Flight segments that are in several parts because the user says so.
    """

    part: Mapping[str, str]
    shared: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Flights:
    """The stacks of a source, with what all of them share.

    Attributes:
        stacks: At least one.
        physics: Names of the P physical fields, with units.
        layer_names: Names of the L layers, newest first.
        layer_age: Age of each layer's lower boundary at the flight [years]. Shape: (L,) float64.
        excluded: What was left out.
        notes: Further lines of the report.
        thickest: Largest plausible median of all observed thicknesses, in their unit; 15 m or 500
            range bins if not given.
        split: Split that the files come with, if they have one.

    Raises:
        DataError: There is no stack, two have one name, they differ in layers, fields or unit, or
            thicknesses are in another unit.
    """

    stacks: Sequence[LayerStack]
    physics: tuple[str, ...]
    layer_names: tuple[str, ...]
    layer_age: Array
    excluded: Sequence[Exclusion] = field(default_factory=tuple)
    notes: Sequence[str] = field(default_factory=tuple)
    thickest: float | None = None
    split: OwnSplit | None = None

    def __post_init__(self) -> None:
        if not self.stacks:
            why = f" ({self.report()})" if self.excluded else ""
            raise DataError(
                f"The source has no usable stack{why}.",
                "Check `--data.init_args.source`: its paths, times and positions in its files, "
                "`traces`, `spacing`, `min_traces`.",
            )
        names: set[str] = set()
        for stack in self.stacks:
            if stack.name in names:
                raise DataError(
                    f"Two stacks are called {stack.name}.", "Give every stack a name of its own."
                )
            names.add(stack.name)
            if stack.unit != self.unit:
                raise DataError(
                    f"Thicknesses of stack {stack.name} are in {stack.unit}, others in "
                    f"{self.unit}.",
                    "Give all in one unit.",
                )
            for quantity, count, expected in (
                ("layers", stack.thickness.shape[1], len(self.layer_names)),
                ("physical fields", stack.physics.shape[2], len(self.physics)),
            ):
                if count != expected:
                    raise DataError(
                        f"Stack {stack.name} has {count} {quantity}, others have {expected}.",
                        "Give all stacks the same number, or leave such ones out: "
                        "`--data.init_args.source.init_args.exclude+=layer_count`.",
                    )
        thickness = np.concatenate([stack.thickness[stack.observed] for stack in self.stacks])
        thickest = self.thickest or (THICKEST if self.unit == METRES else THICKEST_BINS)
        if thickness.size and (median := float(np.median(thickness))) > thickest:
            looks = (
                "more than a year's firn: it looks like millimetres or centimetres instead of "
                "metres"
                if self.unit == METRES
                else "more than published layers have"
            )
            raise DataError(
                f"The median thickness of all layers is {median:g} {self.unit}, {looks}.",
                f"{_CONVERT[self.unit][:-1]}; if layers are as thick, "
                f"set `--data.init_args.source.init_args.thickest` above {median:.0f} (now "
                f"{thickest:g}) {self.unit}.",
            )
        self._check_one_unit(thickness)

    def _check_one_unit(self, thickness: Array) -> None:
        """Refuse a stack whose thicknesses are in another unit than those of the others.

        Args:
            thickness: Observed thicknesses of all stacks.

        Raises:
            DataError: There is such a stack.
        """
        for stack in self.stacks if thickness.size else ():
            if not stack.observed.any():
                continue
            median, usual = (
                float(np.median(values)) for values in (stack.thickness[stack.observed], thickness)
            )
            if not 1 / _UNITS_APART <= median / usual <= _UNITS_APART:
                raise DataError(
                    f"The median thickness of a layer in stack {stack.name} is {median:g} "
                    f"{self.unit}, that of all stacks {usual:g} {self.unit}: they look like two "
                    "units.",
                    _CONVERT[self.unit],
                )

    @property
    def unit(self) -> str:
        """Unit of thicknesses."""
        return self.stacks[0].unit

    @property
    def segments(self) -> tuple[str, ...]:
        """Names of the flight segments, sorted."""
        return tuple(sorted({stack.segment for stack in self.stacks}))

    def report(self) -> str:
        """Say in one line what there is and what was left out."""
        lines = []
        if self.stacks:
            missing = 1 - float(np.mean(np.concatenate([s.observed.ravel() for s in self.stacks])))
            lines.append(
                f"{len(self.stacks)} stacks of {len(self.layer_names)} layers on "
                f"{len(self.segments)} flight segments, {100 * missing:.1f} % missing"
                f"{'' if self.unit == METRES else f', thickness in {self.unit}'}"
            )
        lines += [f"{e.count} {e.description}" for e in self.excluded]
        return "; ".join([*lines, *self.notes])
