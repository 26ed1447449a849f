"""What is known of the traces of a flight beside their layers, from the reader to the files.

Shapes: N traces, L layers (newest first), K = L + 1 boundaries (the surface first).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fulgurite.errors import DataError

__all__ = ["FlightDetails", "LayerLabels"]

_Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LayerLabels:
    """Names and ages of the layers of one flight segment.

    Attributes:
        names: Names of the L layers; empty where nothing says them.
        age: Age of each layer's lower boundary at the flight [years], None where nothing says
            them. Shape: (L,), float64.
        age_source: Where the ages come from; empty if nothing is known.
    """

    names: tuple[str, ...] = ()
    age: _Array | None = None
    age_source: str = ""


@dataclass(frozen=True, eq=False)
class FlightDetails:
    """Arrays of the traces of a flight segment or a stack; None where nothing says them.

    Attributes:
        time: Time of each trace [s since 1970], as in the files. Shape: (N,), float64.
        time_scale: ``GPS``, or ``unknown``; empty without a time.
        elevation: Elevation of the radar above the ellipsoid [m], NaN where it is unknown.
            Shape: (N,), float64.
        flight_distance: Distance along the segment's track from its first trace [m].
            Shape: (N,), float64.
        frame: Name of the frame of each trace in the files, in a stack of the nearest one.
            Shape: (N,), text.
        trace: Number of that trace in its frame, from 1 as MATLAB counts. Shape: (N,), int64.
        density: Density with which travel time was converted to thickness [g cm⁻³].
            Shape: (N, L), float64.
        twtt: Two-way travel time of each boundary of a completed stack [s], NaN where it is
            unknown. Shape: (N, K), float64.
        picked: Whether each boundary of a completed stack was picked. Shape: (N, K), bool.
        surface: Two-way travel time of the surface [s], NaN where it is not picked; known of what
            was read, and a part of ``twtt`` of what was completed. Shape: (N,), float64.
        run: Number of the uninterrupted part of the segment that a stack lies on.
    """

    time: _Array | None = None
    time_scale: str = ""
    elevation: _Array | None = None
    flight_distance: _Array | None = None
    frame: NDArray[np.str_] | None = None
    trace: NDArray[np.int64] | None = None
    density: _Array | None = None
    twtt: _Array | None = None
    picked: NDArray[np.bool_] | None = None
    surface: _Array | None = None
    run: int | None = None

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays that there are, by name."""
        every = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in every.items() if isinstance(value, np.ndarray)}

    def __getitem__(self, rows: slice) -> FlightDetails:
        """Return what is known of some traces."""
        parts: dict[str, Any] = {name: values[rows] for name, values in self.arrays().items()}
        return replace(self, **parts)

    def check(self, stack: str, traces: int, layers: int) -> None:
        """Refuse arrays that do not fit a stack.

        Args:
            stack: Name of the stack.
            traces: N, its number of traces.
            layers: L, its number of layers.

        Raises:
            DataError: An array has another shape.
        """
        shapes: dict[str, tuple[int, ...]] = {
            "density": (traces, layers),
            "twtt": (traces, layers + 1),
            "picked": (traces, layers + 1),
        }
        for name, value in self.arrays().items():
            if value.shape != (expected := shapes.get(name, (traces,))):
                raise DataError(
                    f"The completed stack {stack} has {name} of shape {value.shape}, not "
                    f"{expected}.",
                    "Give arrays of one number of traces and layers.",
                )
