"""The climate of generated flights, and the MAR files of it.

Shapes: M points, L layers (newest first), Y mass years (from May to April), T months, H W climate
grid.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fulgurite.datamodules.ice_layers.climate.grid import interval_weights
from fulgurite.datamodules.ice_layers.generator.random_fields import gaussian_field
from fulgurite.datamodules.ice_layers.generator.world import CLIMATE, World, make_grid
from fulgurite.datamodules.ice_layers.stack import Array
from fulgurite.errors import DataError
from fulgurite.extras import optional_import

__all__ = [
    "Climate",
    "make_climate",
    "refreeze_melt",
    "see_as_mar",
    "surface_elevation",
    "write_mar",
]

# Melt and the warmth of a month; a mass year begins in May
_MELT = np.array([0.02, 0.25, 0.45, 0.25, 0.03, 0, 0, 0, 0, 0, 0, 0])
_WARMTH = 14.0 * np.cos(2 * np.pi * (np.arange(12) - 2) / 12)  # warmest in July [K]


@dataclass(frozen=True)
class Climate:
    """A coarse climate on a grid, month by month from a May on: the truth of generated flights.

    Attributes:
        x: Projected coordinates of columns [m]. Shape: (W,).
        y: Projected coordinates of rows [m]. Shape: (H,).
        first: Calendar year of the first month, a May.
        accumulation: Snow [m w.e.]. Shape: (T, H, W).
        temperature: Mean surface temperature [K]. Shape: (T, H, W).
        melt: Melt [m w.e.]. Shape: (T, H, W).
        rain: Rain [m w.e.]. Shape: (T, H, W).
        runoff: Melt and rain that do not freeze [m w.e.]. Shape: (T, H, W).
    """

    x: Array
    y: Array
    first: int
    accumulation: Array
    temperature: Array
    melt: Array
    rain: Array
    runoff: Array

    FIELDS = ("accumulation", "temperature", "melt", "rain", "runoff")

    def calendar(self) -> NDArray[Any]:
        """The months as datetime64. Shape: (T,)."""
        months: NDArray[Any] = np.datetime64(f"{self.first}-05", "M") + np.arange(
            len(self.accumulation)
        )
        return months

    def months(self) -> Array:
        """Start and end of each month [days since 1970]. Shape: (T, 2)."""
        start = self.calendar()
        edges = np.append(start, start[-1] + 1).astype("datetime64[D]").astype(np.float64)
        return np.stack([edges[:-1], edges[1:]], 1)

    def sum_layers(self, points: Array, edges: Array) -> dict[str, Array]:
        """Sums between dates at points, and the mean temperature.

        Shape:
            - points: (M, 2) [m]; edges: (L + 1,) falling [days since 1970]; results (M, L).
        """
        months = self.months()
        weights = interval_weights(months, edges)
        used = weights.any(0)
        if (weights @ (months[:, 1] - months[:, 0]) < -np.diff(edges) - 1).any():
            raise DataError(
                "The climate does not cover the oldest layer.",
                "Set `--data.init_args.source.init_args.world.layers` lower.",
            )
        column = np.interp(points[:, 0], self.x, np.arange(len(self.x)))
        row = np.interp(points[:, 1], self.y, np.arange(len(self.y)))
        i = np.minimum(row.astype(int), len(self.y) - 2)
        j = np.minimum(column.astype(int), len(self.x) - 2)
        u, v = row - i, column - j
        sums = {}
        for name in self.FIELDS:
            weight = weights[:, used]
            if name == "temperature":
                weight = weight * (months[used, 1] - months[used, 0])
                weight = weight / weight.sum(1, keepdims=True)
            field = np.tensordot(weight, getattr(self, name)[used], 1)
            sums[name] = (
                (1 - u) * (1 - v) * field[:, i, j]
                + (1 - u) * v * field[:, i, j + 1]
                + u * (1 - v) * field[:, i + 1, j]
                + u * v * field[:, i + 1, j + 1]
            ).T
        return sums


def surface_elevation(lat: Array, lon: Array) -> Array:
    """A dome [m]; its form is inferred."""
    height: Array = 3200.0 - 4.0 * (lat - 72.5) ** 2 - 9.0 * (lon + 40.0) ** 2
    return np.maximum(height, 1200.0)


def make_climate(world: World, wetness: float = 1.0, warmth: float = 0.0) -> Climate:
    """The true coarse climate: accumulation, temperature, melt and runoff of each mass year.

    Args:
        world: The recipe.
        wetness: Factor on the accumulation.
        warmth: Offset of the temperature [K].

    Source: docs/papers/ice_layers.md section 6.2; correlation lengths (150 km and 40 km) inferred.
    """
    x, y, lat, lon = make_grid(world)
    generator = world.generator(CLIMATE)
    years = len(world.mass_years)

    def field(count: int, length: float) -> Array:
        return gaussian_field((count, len(y), len(x)), length / world.cell, generator)

    mean = np.clip(0.30 + 0.035 * (75 - lat) + 0.012 * (-40 - lon), 0.12, 0.9)
    new = np.sqrt(1 - 0.06**2 / 0.2**2) * field(years, 150e3) + 0.3 * field(years, 40e3)
    factor = np.empty_like(new)
    factor[0] = new[0]
    for year in range(1, years):  # years resemble the one before: AR(1), ρ = 0.2
        factor[year] = 0.2 * factor[year - 1] + np.sqrt(1 - 0.2**2) * new[year]
    accumulation = wetness * mean * np.exp(0.2 * factor)
    z = surface_elevation(lat, lon)
    temperature = 269.15 - 0.0068 * (z - 1500) - 0.75 * (lat - 67) + 0.7 * field(years, 150e3)
    temperature = np.minimum(temperature + warmth, 268.0)
    warm = 0.30 * np.exp((temperature - 262) / 3) * np.exp(0.3 * field(years, 150e3))
    melt = np.minimum(warm, 1.2)
    runoff = melt - refreeze_melt(melt, accumulation)
    even, month = np.full(12, 1 / 12), (slice(None), None, None)
    return Climate(
        x,
        y,
        world.mass_years[0],
        _monthly(accumulation, even),
        _monthly(temperature, np.ones(12)) + np.tile(_WARMTH, years)[month],
        _monthly(melt, _MELT),
        np.zeros((12 * years, *melt.shape[1:])),
        _monthly(runoff, _MELT),
    )


def _monthly(yearly: Array, fractions: Array) -> Array:
    """Deal yearly values (Y, H, W) out to months (12 Y, H, W)."""
    return (yearly[:, None] * fractions[None, :, None, None]).reshape(-1, *yearly.shape[1:])


def refreeze_melt(melt: Array, accumulation: Array, min_fraction: float = 0.0) -> Array:
    """How much of a year's melt freezes again [m w.e.].

    Args:
        melt: Melt of the year [m w.e.].
        accumulation: Accumulation of the year [m w.e.].
        min_fraction: Fraction that freezes however much there is, because it seeps into older firn.

    Source: docs/papers/ice_layers.md section 6.2.

    Example:
        >>> refreeze_melt(np.array([0.0, 0.4, 4.0]), np.array([0.4, 0.4, 0.4]))
        array([0. , 0.3, 0. ])
    """
    frozen: Array = melt * np.clip(
        1 - 0.25 * melt / np.maximum(accumulation, 1e-3), min_fraction, 1.0
    )
    return frozen


def see_as_mar(world: World, climate: Climate) -> tuple[Climate, Array]:
    """The climate with MAR's errors, and the height of each mass year's snowpack [m].

    MAR knows the coarse climate only, with a bias that stays, and a year's noise.

    Shape:
        - heights: (T, H, W).

    Source: docs/papers/ice_layers.md section 6.2; correlation lengths of errors inferred.
    """
    generator = world.generator(CLIMATE, 1)
    months = climate.months()
    shape = climate.melt.shape[1:]
    years = len(months) // 12

    def noise(size: float, count: int = years) -> Array:
        """Errors of mass years, as fields of their months."""
        field = gaussian_field((count, *shape), 60e3 / world.cell, generator)
        return size * np.repeat(field, len(months) // count, 0)

    snow = climate.accumulation * np.exp(0.03 + noise(0.05, 1) + noise(0.04))
    melt = climate.melt * np.exp(noise(0.04))
    liquid = climate.melt + climate.rain
    runoff = (melt + climate.rain) * climate.runoff / np.maximum(liquid, 1e-9)
    heights = np.repeat(snow.reshape(-1, 12, *shape).sum(1), 12, 0) / 0.35
    temperature = climate.temperature + noise(0.5)
    modelled = replace(
        climate, accumulation=snow, temperature=temperature, melt=melt, runoff=runoff
    )
    return modelled, heights * np.exp(noise(0.05))


def write_mar(folder: Path, world: World, climate: Climate) -> None:
    """Write MAR files of monthly fields, one for each calendar year, with MAR's errors.

    Source: docs/papers/ice_layers.md sections 3.3 and 6.2.
    """
    netcdf = optional_import("netCDF4", "ice", "Generating climate files")
    _, _, lat, lon = make_grid(world)
    months = climate.months()
    modelled, heights = see_as_mar(world, climate)
    fields: dict[str, tuple[str, Array]] = {
        "SMB": ("mmWE/month", 1000 * (modelled.accumulation + modelled.rain - modelled.runoff)),
        "ME": ("mmWE/month", 1000 * modelled.melt),
        "RU": ("mmWE/month", 1000 * modelled.runoff),
        "ST": ("C", modelled.temperature - 273.15),
        "ZN6": ("m", heights),
    }
    if modelled.rain.any():
        fields["RF"] = ("mmWE/month", 1000 * modelled.rain)
    year_of = climate.calendar().astype("datetime64[Y]").astype(int) + 1970
    folder.mkdir(parents=True, exist_ok=True)
    south, north, west, east = world.box
    surface = np.where(  # tundra at the southern rim, as a real mask has
        (lat > south - 0.4) & (lat < north + 2) & (lon > west - 4) & (lon < east + 4), 4.0, 2.0
    )
    for year in np.unique(year_of):
        part = year_of == year
        path = folder / f"MARv3.12-monthly-synthetic-{year}.nc"
        with netcdf.Dataset(str(path), "w") as data:
            data.setncatts({"title": "Generated climate in the layout of MAR"})
            sizes = {"x": len(climate.x), "y": len(climate.y), "TIME": int(part.sum())}
            for name, size in sizes.items():
                data.createDimension(name, size)
            for name, dims, units, values in (
                ("x", ("x",), "km", climate.x / 1000),
                ("y", ("y",), "km", climate.y / 1000),
                ("LAT", ("y", "x"), "degrees", lat),
                ("LON", ("y", "x"), "degrees", lon),
                ("SRF", ("y", "x"), "-", surface),
                ("TIME", ("TIME",), "days since 1970-01-01", months[part].mean(1)),
            ):
                variable = data.createVariable(name, "f8", dims)
                variable.units = units
                variable[:] = values
            for name, (units, values) in fields.items():
                variable = data.createVariable(
                    name, "f4", ("TIME", "y", "x"), fill_value=np.float32(1e36)
                )
                variable.units = units
                variable[:] = np.where(surface == 4, values[part], 1e36).astype(np.float32)
