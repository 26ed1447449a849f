"""The recipe of generated flights: what, where and when, and its random streams.

Shapes: H W climate grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fulgurite.datamodules.ice_layers.climate.grid import PROJECTIONS
from fulgurite.datamodules.ice_layers.stack import Array
from fulgurite.errors import ConfigError
from fulgurite.extras import optional_import
from fulgurite.options import (
    ClosedUnitInterval,
    PositiveFloat,
    PositiveInt,
    check_options,
    restrict_number,
)

__all__ = [
    "CLIMATE",
    "PICKS",
    "SHUFFLE",
    "SNOW",
    "TRACK",
    "YEAR",
    "Flight",
    "LayerCount",
    "StackCount",
    "TraceCount",
    "TraceSpacing",
    "World",
    "flight_names",
    "make_grid",
    "make_transformers",
]

#: Random streams of ``seed``.
CLIMATE, TRACK, SNOW, PICKS, SHUFFLE = range(5)

#: Length of a year [days].
YEAR = 365.25

_OPTION = "data.init_args.source.init_args.world"
_BOX = (66.0, 79.0, -48.0, -32.0)  # latitudes and longitudes of flights [degrees]


if not TYPE_CHECKING:  # in this order: jsonargparse reads blocks of TYPE_CHECKING
    StackCount = restrict_number("StackCount", int, (">=", 1), ("<=", 1_000_000))
    TraceCount = restrict_number("TraceCount", int, (">=", 2), ("<=", 100_000))
    LayerCount = restrict_number("LayerCount", int, (">=", 2), ("<=", 60))
    Seed = restrict_number("Seed", int, (">=", 0), ("<=", 2**63))
    TraceSpacing = restrict_number("TraceSpacing", float, (">=", 1.0), ("<=", 5_000.0))
    RateFactor = restrict_number("RateFactor", float, (">=", 0.0), ("<=", 2.0))
else:
    StackCount = int
    TraceCount = int
    LayerCount = int
    Seed = int
    TraceSpacing = float
    RateFactor = float


@dataclass(frozen=True)
class World:
    """Parameters that decide every number of generated flights.

    Attributes:
        stacks: Number of blocks, over all segments.
        traces: N, traces of a block.
        layers: L, layers.
        segments: Flight segments, at most as many as blocks; splits keep them whole.
        spacing: Distance of traces [m].
        first_year: Calendar year of the first flights.
        last_year: Calendar year of the last flights.
        mistracks: Fraction of picks that are on the next boundary, which is then not picked: two
            reflectors are taken for one.
        missing: Factor on the rates of gaps, absent layers and drop-outs; 1 has the source's, 0
            none.
        noise: Standard deviation of a pick [m].
        traced: Fraction of blocks whose layers are fully traced.
        cell: Size of a cell of the climate grid [m].
        seed: Seed of everything.
        blocks_per_frame: Blocks of a file.
        box: Southern and northern latitude, western and eastern longitude of flights [degrees].

    Raises:
        ConfigError: A number is out of range.

    Source: docs/papers/ice_layers.md section 6.2; where years and places are correlated over the
    ice sheet instead of drawn for each stack, that is inferred.
    """

    stacks: StackCount = 560
    traces: TraceCount = 48
    layers: LayerCount = 10
    segments: PositiveInt = 28
    spacing: TraceSpacing = 100.0
    first_year: int = 2009
    last_year: int = 2017
    mistracks: ClosedUnitInterval = 0.01
    missing: RateFactor = 1.0
    noise: ClosedUnitInterval = 0.012
    traced: ClosedUnitInterval = 0.0
    cell: PositiveFloat = 20_000.0
    seed: Seed = 0
    blocks_per_frame: PositiveInt = 10
    box: tuple[float, float, float, float] = _BOX

    def __post_init__(self) -> None:
        check_options(self, _OPTION)
        if self.segments > self.stacks:
            raise ConfigError(
                f"The segments of world are {self.segments}, and there are {self.stacks} stacks.",
                f"Set `--{_OPTION}.segments` to at most so many.",
            )
        if self.last_year < self.first_year:
            raise ConfigError(
                f"The last_year of world is {self.last_year}, before its first_year.",
                f"Set `--{_OPTION}.last_year` to {self.first_year} or later.",
            )

    def generator(self, stream: int, *numbers: int) -> np.random.Generator:
        """A generator for one purpose, whatever else is drawn."""
        return np.random.default_rng((self.seed, stream, *numbers))

    @property
    def mass_years(self) -> range:
        """The mass years (by the calendar year in which they begin) that layers may need."""
        return range(self.first_year - self.layers - 1, self.last_year + 1)

    def sizes(self) -> list[int]:
        """Number of blocks of each segment."""
        return [len(part) for part in np.array_split(np.arange(self.stacks), self.segments)]


@dataclass(frozen=True)
class Flight:
    """Where and when a segment is flown.

    Attributes:
        name: Name of the segment.
        day: Day of the flight [days since 1970].
        box: Latitudes and longitudes [degrees].
    """

    name: str
    day: float
    box: tuple[float, float, float, float] = _BOX


def flight_names(days: Sequence[float]) -> list[str]:
    """Name segments by day and number, as CReSIS does.

    Example:
        >>> flight_names([0.5, 0.6, 1.5])
        ['19700101_01', '19700101_02', '19700102_01']
    """
    names: list[str] = []
    for day in days:
        date = str(np.datetime64(int(day), "D")).replace("-", "")
        names.append(f"{date}_{sum(name.startswith(date) for name in names) + 1:02}")
    return names


def make_transformers() -> tuple[Any, Any]:
    """From longitude and latitude to MAR's projection [m], and back.

    Raises:
        MissingExtraError: pyproj is not installed.
    """
    pyproj = optional_import("pyproj", "ice", "Generating flights")
    projection = pyproj.CRS.from_user_input(PROJECTIONS["mar"])
    sphere = projection.geodetic_crs
    return (
        pyproj.Transformer.from_crs(sphere, projection, always_xy=True),
        pyproj.Transformer.from_crs(projection, sphere, always_xy=True),
    )


def make_grid(world: World) -> tuple[Array, Array, Array, Array]:
    """Coordinates [m] and positions [degrees] of the grid: x (W,), y (H,), lat and lon (H, W)."""
    forward, inverse = make_transformers()
    south, north, west, east = world.box
    lat, lon = np.meshgrid(np.linspace(south, north, 40), np.linspace(west, east, 40))
    px, py = forward.transform(lon.ravel(), lat.ravel())
    margin, cell = 3 * world.cell, world.cell
    x = np.arange(px.min() - margin, px.max() + margin + cell, cell)
    y = np.arange(py.min() - margin, py.max() + margin + cell, cell)
    lon2, lat2 = inverse.transform(*np.meshgrid(x, y))
    return x, y, np.asarray(lat2), np.asarray(lon2)
