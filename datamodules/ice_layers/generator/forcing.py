"""Generated flights over a real climate: daily series at two sites of Greenland.

Shapes: D days, S sites, Y mass years, H W climate grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fulgurite.datamodules.ice_layers.generator.climate import Climate, refreeze_melt
from fulgurite.datamodules.ice_layers.generator.random_fields import gaussian_field
from fulgurite.datamodules.ice_layers.generator.synthetic import GeneratedLayerFiles, write_world
from fulgurite.datamodules.ice_layers.generator.world import (
    Flight,
    World,
    flight_names,
    make_grid,
)
from fulgurite.datamodules.ice_layers.stack import Array
from fulgurite.datamodules.ice_layers.tracks.resample import great_circle_distance
from fulgurite.errors import ConfigError, DataError
from fulgurite.foreign import read_csv, reading
from fulgurite.io import checksum, data_path
from fulgurite.options import PositiveInt

__all__ = ["ClimateSite", "ForcedFlights", "ForcedWorld", "read_site"]

#: Columns of the daily series that are used: accumulation, rain and melt [kg m⁻² per day], skin
#: temperature [K].
_COLUMNS = ("BDOT", "RAIN", "SMELT", "TSKIN")
# Fraction of melt and rain that freezes in the firn, however much there is (inferred): both sites
# keep snow of every year, and less would let the melt of 2012 and 2019 take whole years at 66.5° N
_SEEPS = 0.75
_OPTION = "--data.init_args.source.init_args"


@dataclass(frozen=True)
class ClimateSite:
    """Monthly climate of a site, from a May on.

    Attributes:
        pos: Latitude and longitude [degrees].
        first: Calendar year of the first month, a May.
        months: Accumulation, rain and melt [m w.e. per month], temperature [K]. Shape: (4, T).
    """

    pos: tuple[float, float]
    first: int
    months: Array


def read_site(path: Path) -> ClimateSite:
    """Read a daily series of the Community Firn Model's examples; whole mass years are kept.

    Args:
        path: ``CFM_example_<latitude>_<longitude>.csv``.

    Raises:
        DataError: The file is damaged, lacks a column or days, or its units are not kg m⁻² per day
            and K, as sums of years show.
    """
    hint = f"Point `{_OPTION}.root` to the daily series of the Community Firn Model's examples."
    with reading(path, "The series", hint):
        lat, lon = (float(word) for word in path.stem.split("_")[-2:])
        if not (-90 <= lat <= 90 and -360 <= lon <= 360):
            raise ValueError("its name says no latitude and longitude")
        table = read_csv(path, index_col=0, parse_dates=True)
        if absent := [name for name in _COLUMNS if name not in table.columns]:
            raise DataError(f"The series {path} has no column {absent[0]!r}.", hint)
        values = table[list(_COLUMNS)].to_numpy(np.float64)
        days = table.index.to_numpy().astype("datetime64[D]")
    if len(days) < 366 or (np.diff(days) != np.timedelta64(1, "D")).any():
        raise DataError(f"The series {path} is not one of consecutive days.", hint)
    if not np.isfinite(values).all():
        raise DataError(f"The series {path} has days without a value.", hint)
    years = len(days) / 365.25
    for name, amount, low, high in (
        ("BDOT", values[:, 0].sum() / years, 20.0, 5_000.0),
        ("RAIN", values[:, 1].sum() / years, 0.0, 3_000.0),
        ("SMELT", values[:, 2].sum() / years, 0.0, 5_000.0),
        ("TSKIN", values[:, 3].mean(), 200.0, 280.0),
    ):
        if not low <= amount <= high:
            raise DataError(
                f"The column {name} of {path} is {amount:g} a year, which is not in "
                f"{'K' if name == 'TSKIN' else 'kg m⁻² per day'}.",
                "Convert the column.",
            )
    month = days.astype("datetime64[M]").astype(np.int64)
    numbers, month_index = np.unique(month, return_inverse=True)
    sums = np.stack([np.bincount(month_index, column).astype(np.float64) for column in values.T])
    sums[:3] /= 1000.0
    sums[3] /= np.bincount(month_index)
    start = int(np.argmax(numbers % 12 == 4))
    full_months = (len(numbers) - start) // 12 * 12
    first = 1970 + int(numbers[start]) // 12
    return ClimateSite((lat, lon), first, sums[:, start : start + full_months])


@dataclass(frozen=True)
class ForcedWorld(World):
    """A world of twice as many flight segments, since there are two sites."""

    segments: PositiveInt = 56


class ForcedFlights(GeneratedLayerFiles):
    """Generated flights over real years: daily series of two sites of the ice sheet, 1980 to 2025.

    Around each site, snow, melt, rain and temperature of every month are the site's, times a
    pattern that stays (10 %, 40 km) and one of each year (5 %, 60 km); between the sites one passes
    into the other. Everything else is as in :class:`SyntheticFlights`: snow below the scale of the
    climate model, firn, picks, gaps, the errors of MAR, and files that the readers read back.

    Flights of a site are spread over its years, so that those of the same years share their
    climate: split by ``split.order: name``, ``split.guard`` as many years as there are layers.

    Args:
        root: Folder with ``CFM_example_<latitude>_<longitude>.csv``, absolute or relative to
            ``FULGURITE_DATA``.
        world: What is generated: sizes, gaps, noise and seed; the years and the box are those of
            the series, and segments are in turn at each site.
        informative: False exchanges physics between stacks and layers: a negative control.

    Raises:
        ConfigError: An argument is out of range.

    Source: docs/papers/ice_layers.md section 6.2; the driving by real series is inferred.
    """

    def __init__(
        self,
        root: str = "greenland_forcing",
        world: ForcedWorld = ForcedWorld(),
        informative: bool = True,
    ) -> None:
        self.world = world
        self.informative = informative
        self.files = root

    def paths(self) -> list[Path]:
        """The series, sorted.

        Raises:
            DataError: There is no series.
        """
        files = sorted(data_path(self.files).glob("CFM_example_*.csv"))
        if not files:
            raise DataError(
                f"There is no CFM_example_*.csv in {self.files}.",
                f"Point `{_OPTION}.root` to the daily series.",
            )
        return files

    def key(self) -> str:
        """The content of the series, and how they are used."""
        return " ".join([f"{_SEEPS}", *(checksum(path) for path in self.paths())])

    def write(self, folder: Path) -> None:
        """Write the files into an empty folder."""
        sites = [read_site(path) for path in self.paths()]
        boxes = [
            (lat - 0.9, lat + 0.9, lon - 2.2, lon + 2.2) for lat, lon in (s.pos for s in sites)
        ]
        south, north, west, east = zip(*boxes, strict=True)
        box = (min(south), max(north), min(west), max(east))
        world = replace(self.world, box=box)
        years = min(site.months.shape[1] for site in sites) // 12
        first = max(site.first for site in sites) + world.layers + 1
        last = max(site.first for site in sites) + years
        if first > last:
            raise ConfigError(
                f"The series have {years} years, which is too few for {world.layers} layers.",
                f"Lower `{_OPTION}.world.layers`.",
            )
        generator = world.generator(1, 7)
        rounds = np.arange(world.segments) // len(sites)
        when = np.rint(np.linspace(first, last, int(rounds.max()) + 1)).astype(int)[rounds]
        start = np.array([f"{year}-03-20" for year in when], "datetime64[D]").astype(np.float64)
        days = start + generator.integers(0, 40, world.segments) + 0.6
        order = np.argsort(days, kind="stable")
        names = flight_names(days[order].tolist())
        flights = [
            Flight(name, float(days[k]), boxes[int(k) % len(sites)])
            for name, k in zip(names, order, strict=True)
        ]
        write_world(folder, world, _grid_climate(world, sites, years), flights)


def _grid_climate(world: World, sites: Sequence[ClimateSite], years: int) -> Climate:
    """The sites' months over the grid."""
    x, y, lat, lon = make_grid(world)
    first = max(site.first for site in sites)
    series = np.stack(
        [site.months[:, 12 * (first - site.first) :][:, : 12 * years] for site in sites]
    )
    weights = _blend(lat, lon, [site.pos for site in sites])
    fields = np.einsum("sft,shw->fthw", series, weights)
    generator = world.generator(0)
    size = lat.shape
    stays = 0.10 * gaussian_field((1, *size), 40e3 / world.cell, generator)
    yearly = 0.05 * gaussian_field((years, *size), 60e3 / world.cell, generator)
    snow, rain, melt, temperature = fields
    snow = snow * np.exp(stays + np.repeat(yearly, 12, 0))

    def by_year(field: Array) -> Array:
        return np.repeat(field.reshape(years, 12, *size).sum(1), 12, 0)

    liquid = by_year(melt + rain)
    frozen = refreeze_melt(liquid, by_year(snow), _SEEPS)
    runoff_fraction = 1 - frozen / np.maximum(liquid, 1e-9)
    return Climate(x, y, first, snow, temperature, melt, rain, (melt + rain) * runoff_fraction)


def _blend(lat: Array, lon: Array, sites: Sequence[tuple[float, float]]) -> NDArray[np.float64]:
    """Weight of each site at each cell: one around it, a steep passage between. (S, H, W)."""
    here = np.stack([lat, lon], -1)
    distance = np.stack([great_circle_distance(here, np.asarray(pos)) for pos in sites])
    near = np.exp(-distance / 25e3 + distance.min(0) / 25e3)
    weights: NDArray[np.float64] = near / near.sum(0)
    return weights
