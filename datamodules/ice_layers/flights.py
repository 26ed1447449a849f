"""Sources of stacks, and the tracks that they read: ordered traces, and what was left out.

Shapes: M raw traces, N traces of a stack, K boundaries, L layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fulgurite.data.exclusions import Exclusion, name_some
from fulgurite.datamodules.ice_layers.stack import Array, Flights
from fulgurite.domains.ice_layers.details import FlightDetails, LayerLabels
from fulgurite.errors import ConfigError, DataError

__all__ = [
    "FlightTrack",
    "StackSource",
    "order_traces",
    "read_or_leave",
    "report_dropped_traces",
    "report_unreadable",
]

_Read = TypeVar("_Read")


class StackSource(ABC):
    """Stacks of one data set.

    A subclass gives the number of layers and the names of physical fields, as far as they are
    cheap to know, and :meth:`load`.
    """

    @property
    def layers(self) -> int | None:
        """Number of layers, where it is known before the files are read."""
        return None

    @property
    @abstractmethod
    def physics(self) -> tuple[str, ...]:
        """Names of the physical fields."""

    @property
    def climate_files(self) -> tuple[str, ...]:
        """Names of the files of the climate model."""
        return ()

    @property
    def age_source(self) -> str:
        """Where ages of layers come from, once they are read; empty if nothing is known."""
        return ""

    @property
    def description(self) -> str:
        """What the traces are, for whoever reads completed stacks; empty if nothing is known."""
        return ""

    def check_write_back(
        self, folder: Path, records: Mapping[str, Sequence[FlightDetails]]
    ) -> None:
        """Refuse to write completed layers back into files of the kind that was read.

        Args:
            folder: Folder to write to.
            records: Records of the stacks of each segment.

        Raises:
            ConfigError: The source reads no such files.
        """
        raise ConfigError(
            f"{type(self).__name__} reads no CSARP_layer files, so completed layers cannot be "
            "written back into such.",
            "Set `--trainer.callbacks.csarp_layer=false`.",
        )

    def write_back(
        self, folder: Path, segment: str, stacks: Sequence[tuple[FlightDetails, Array]]
    ) -> Any:
        """Write the files of a segment again, with completed boundaries.

        Args:
            folder: Folder to write to.
            segment: Name of the segment.
            stacks: Record of each completed stack, and the times of its boundaries below the
                surface (N, K) [s].
        """
        raise NotImplementedError

    def prepare(self) -> None:
        """Do once per machine what other processes then share, such as writing files."""
        return  # most sources have nothing to prepare

    @abstractmethod
    def load(self) -> Flights:
        """Return the stacks.

        Raises:
            DataError: The data are unusable.
        """


@dataclass
class FlightTrack:
    """One flight segment: boundaries at each raw trace.

    Attributes:
        segment: Name of the segment, which begins with the date.
        time: Time of each trace [s since 1970]. Shape: (M,).
        pos: Latitude and longitude [degrees]. Shape: (M, 2).
        boundaries: Two-way travel time to each boundary from the surface down [s], or its depth
            [m], NaN where missing; none cross. Shape: (M, K).
        age: Age of each layer's lower boundary at the flight [years]. Shape: (L,).
        is_time: Whether ``boundaries`` is a time.
        truth: True thickness of generated data [m]. Shape: (M, L).
        record: Further arrays of the traces, such as time and elevation.
        names: Names of the layers; those of other segments if empty.
        age_source: Where ages come from; empty if nothing is known.
    """

    segment: str
    time: Array
    pos: Array
    boundaries: Array
    age: Array
    is_time: bool = True
    truth: Array | None = None
    record: FlightDetails = field(default_factory=FlightDetails)
    names: tuple[str, ...] = ()
    age_source: str = ""

    @property
    def labels(self) -> LayerLabels:
        """Names and ages of its layers."""
        return LayerLabels(self.names, self.age, self.age_source)


def order_traces(
    time: Array, pos: Array, recorded_time: Array | None = None
) -> tuple[NDArray[np.int64], Array, NDArray[np.int64]]:
    """Order the usable traces of a segment by time, each once.

    Args:
        time: Time of each trace.
        pos: Latitude and longitude; longitudes are wrapped to -180 to 180.
        recorded_time: Original times, if ``time`` was reconstructed; traces of equal recorded time
            and position are dropped but for the first.

    Shape:
        - time, recorded_time: (M,); pos: (M, 2) [degrees].

    Returns:
        Numbers of the traces (N,), their positions (N, 2), and how many were left out: without
        position or time, and coming twice (2,).

    Example:
        >>> pos = np.array([[70.0, 320.0], [70.0, 320.0], [70.1, 320.0], [99.0, 320.0]])
        >>> order_traces(np.array([5.0, 5.0, 5.0, 1.0]), pos)
        (array([0, 2]), array([[ 70. , -40. ],
               [ 70.1, -40. ]]), array([1, 1]))
    """
    usable = np.flatnonzero(np.isfinite(time) & (np.abs(pos) <= (90, 360)).all(1))
    pos = pos - [0.0, 360.0] * (pos[:, 1:] > 180) + [0.0, 360.0] * (pos[:, 1:] < -180)
    rows = np.column_stack([time if recorded_time is None else np.nan_to_num(recorded_time), pos])[
        usable
    ]
    once = usable[np.sort(np.unique(rows, axis=0, return_index=True)[1])]
    order = once[np.argsort(time[once], kind="stable")]
    return order, pos[order], np.array([len(time) - len(usable), len(usable) - len(once)])


def read_or_leave(
    read: Callable[[Path], _Read], path: Path, exclude: Collection[str], damaged: list[str]
) -> _Read | None:
    """Read a file, or return None if it is unusable and such files are to be left out.

    Args:
        read: Function that reads a file.
        path: The file.
        exclude: Words of ``exclude``; ``unreadable`` leaves the file out.
        damaged: Receives the file's name.

    Raises:
        DataError: The file cannot be used, and is not to be left out.
    """
    try:
        return read(path)
    except DataError:
        if "unreadable" not in exclude:
            raise
        damaged.append(path.name)
        return None


def report_unreadable(damaged: Sequence[str]) -> list[Exclusion]:
    """Report the files that :func:`read_or_leave` left out."""
    description = f"unreadable files ({name_some(damaged)})"
    return [Exclusion("unreadable", description, len(damaged))] if damaged else []


def report_dropped_traces(counts: NDArray[np.int64], crossed: int) -> list[Exclusion]:
    """Report the traces that :func:`order_traces` dropped from all segments, and crossed picks."""
    exclusions = (
        Exclusion("crossed", "crossed picks", crossed),
        Exclusion("position", "traces without position or time", int(counts[0])),
        Exclusion("repeated", "traces that come twice", int(counts[1])),
    )
    return [exclusion for exclusion in exclusions if exclusion.count]
