"""The recipe of generated flights: what, where and when, and its random streams.

Shapes: H W climate grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fulgurite.datamodules.ice_layers.climate_grid import PROJECTIONS
from fulgurite.datamodules.ice_layers.stack import Array, need_extra
from fulgurite.errors import ConfigError

__all__ = [
    "CLIMATE",
    "PICKS",
    "SHUFFLE",
    "SNOW",
    "TRACK",
    "YEAR",
    "Flight",
    "World",
    "check_world",
    "flight_names",
    "make_grid",
    "make_transformers",
]

#: Random streams of ``seed``.
CLIMATE, TRACK, SNOW, PICKS, SHUFFLE = range(5)

#: Length of a year [days].
YEAR = 365.25

_BOX = (66.0, 79.0, -48.0, -32.0)  # latitudes and longitudes of flights [degrees]


@dataclass(frozen=True)
class World:
    """Parameters that decide every number of generated flights.

    Source: arXiv 2604.20783, card section 6.2; where years and places are correlated over the ice
    sheet instead of drawn for each stack, that is inferred.
    """

    stacks: int = 560
    traces: int = 48
    layers: int = 10
    segments: int = 28
    spacing: float = 100.0
    first_year: int = 2009
    last_year: int = 2017
    mistracks: float = 0.01
    missing: float = 1.0
    noise: float = 0.012
    traced: float = 0.0
    cell: float = 20_000.0
    seed: int = 0
    blocks_per_frame: int = 10
    box: tuple[float, float, float, float] = _BOX

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


def check_world(world: World) -> World:
    """Return the recipe if all of its numbers are in range.

    Raises:
        ConfigError: A number is out of range.
    """
    for name, value, low, high in (
        ("stacks", world.stacks, 1, 1_000_000),
        ("traces", world.traces, 2, 100_000),
        ("layers", world.layers, 2, 60),
        ("segments", world.segments, 1, world.stacks),
        ("spacing", world.spacing, 1.0, 5_000.0),
        ("mistracks", world.mistracks, 0.0, 1.0),
        ("missing", world.missing, 0.0, 2.0),
        ("noise", world.noise, 0.0, 1.0),
        ("traced", world.traced, 0.0, 1.0),
        ("seed", world.seed, 0, 2**63),
    ):
        if not low <= value <= high:
            raise ConfigError(
                f"The {name} of generated flights is {value}.",
                f"Set `--data.init_args.source.init_args.{name}` between {low} and {high}.",
            )
    return world


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
    try:
        from pyproj import CRS, Transformer
    except ImportError as error:
        raise need_extra("pyproj", "Generating flights") from error
    projection = CRS.from_user_input(PROJECTIONS["mar"])
    sphere = projection.geodetic_crs
    return (
        Transformer.from_crs(sphere, projection, always_xy=True),
        Transformer.from_crs(projection, sphere, always_xy=True),
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
