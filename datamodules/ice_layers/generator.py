"""Generated flights over a generated climate, written as layer files and MAR files.

Shapes: S blocks of a segment, M or N traces, K boundaries, L layers (newest first), Y mass years
(from May to April), T months, H W climate grid.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fulgurite.data.store import cached_folder
from fulgurite.datamodules.ice_layers.climate import PHYSICS, MarClimate
from fulgurite.datamodules.ice_layers.climate_grid import PROJECTIONS, interval_weights
from fulgurite.datamodules.ice_layers.firn import layer_density, smb_to_layers
from fulgurite.datamodules.ice_layers.flights import StackSource
from fulgurite.datamodules.ice_layers.layer_files import LayerFiles
from fulgurite.datamodules.ice_layers.stack import Array, Flights, need_extra
from fulgurite.datamodules.ice_layers.travel_time import thickness_to_time
from fulgurite.errors import ConfigError, DataError

__all__ = [
    "Climate",
    "Flight",
    "GeneratedFlights",
    "SyntheticFlights",
    "World",
    "gaussian_field",
    "markov_gaps",
    "write_layer_file",
    "write_mar",
    "write_world",
]

_VERSION = 3  # of the code that generates: a change makes other data
_CLIMATE, _TRACK, _SNOW, _PICKS, _SHUFFLE = range(5)  # random streams of `seed`
_YEAR = 365.25  # [days]
_BOX = (66.0, 79.0, -48.0, -32.0)  # latitudes and longitudes of flights [degrees]
# Melt and the warmth of a month; a mass year begins in May
_MELT = np.array([0.02, 0.25, 0.45, 0.25, 0.03, 0, 0, 0, 0, 0, 0, 0])
_WARMTH = 14.0 * np.cos(2 * np.pi * (np.arange(12) - 2) / 12)  # warmest in July [K]
_HEADER = b"MATLAB 7.3 MAT-file, Platform: GLNXA64, Created by: fulgurite HDF5 schema 1.00 ."


def gaussian_field(
    shape: tuple[int, int, int], length: float, generator: np.random.Generator
) -> Array:
    """Smooth random fields of mean 0 and variance 1.

    Args:
        shape: Number of fields, and their size.
        length: Correlation length exp(-d²/2ℓ²) [cells].
        generator: Of the white noise.

    Shape:
        - result (number, H, W).

    Example:
        >>> field = gaussian_field((2, 40, 30), 3.0, np.random.default_rng(0))
        >>> field.shape, bool(0.5 < field.std() < 1.5)
        ((2, 40, 30), True)
    """
    number, height, width = shape
    pad = int(np.ceil(4 * length))  # the noise is periodic, the field must not be
    h, w = height + pad, width + pad
    fy, fx = np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None, :]
    gain = np.exp(-((np.pi * length) ** 2) * (fx**2 + fy**2))
    weight = np.full(gain.shape, 2.0)
    weight[:, 0] = 1.0
    if w % 2 == 0:
        weight[:, -1] = 1.0
    gain /= np.sqrt((weight * gain**2).sum() / (h * w))
    noise = np.fft.rfft2(generator.standard_normal((number, h, w)))
    field: Array = np.fft.irfft2(noise * gain, s=(h, w))[:, :height, :width]
    return field


def _along(count: int, places: Array, length: float, generator: np.random.Generator) -> Array:
    """Gaussian processes along a line: (count, N)."""
    distance = (places[:, None] - places[None, :]) / length
    values, vectors = np.linalg.eigh(np.exp(-0.5 * distance**2))
    root = vectors * np.sqrt(np.clip(values, 0.0, None))
    noise: Array = generator.standard_normal((count, len(places))) @ root.T
    return noise


def markov_gaps(
    share: Array, mean_gap: Array, traces: int, generator: np.random.Generator
) -> NDArray[np.bool_]:
    """Runs of missing picks: a two-state Markov chain along the track for each boundary.

    Args:
        share: Stationary probability of a missing pick.
        mean_gap: Mean length of a gap [traces].
        traces: N.
        generator: Of the chain.

    Shape:
        - share, mean_gap: (K,); result (K, N), true where missing.

    Source: arXiv 2604.20783, card section 6.2.

    Example:
        >>> gaps = markov_gaps(np.array([0.0, 0.5]), np.ones(2) * 10, 2000,
        ...     np.random.default_rng(0))
        >>> gaps.mean(1).round(1)
        array([0. , 0.5])
    """
    leave = np.minimum(1.0 / mean_gap, 1.0)
    enter = np.minimum(leave * share / np.maximum(1 - share, 1e-9), 1.0)
    random = generator.random((traces, len(share)))
    missing = np.zeros((traces, len(share)), np.bool_)
    state = random[0] < share
    missing[0] = state
    for i in range(1, traces):
        state = np.where(state, random[i] >= leave, random[i] < enter)
        missing[i] = state
    return missing.T


@dataclass(frozen=True)
class Climate:
    """A coarse climate on a grid, month by month from a May on: what is true.

    Attributes:
        x: Projected coordinates of columns [m]. Shape: (W,).
        y: Of rows [m]. Shape: (H,).
        first: Calendar year of the first month, a May.
        accumulation: Snow [m w.e.]. Shape: (T, H, W).
        temperature: Mean surface temperature [K]. Shape: (T, H, W).
        melt: [m w.e.]. Shape: (T, H, W).
        rain: [m w.e.]. Shape: (T, H, W).
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

    def layered(self, points: Array, edges: Array) -> dict[str, Array]:
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
                "Set `--data.init_args.source.init_args.layers` lower.",
            )
        column = np.interp(points[:, 0], self.x, np.arange(len(self.x)))
        row = np.interp(points[:, 1], self.y, np.arange(len(self.y)))
        i = np.minimum(row.astype(int), len(self.y) - 2)
        j = np.minimum(column.astype(int), len(self.x) - 2)
        u, v = row - i, column - j
        found = {}
        for name in self.FIELDS:
            share = weights[:, used]
            if name == "temperature":
                share = share * (months[used, 1] - months[used, 0])
                share = share / share.sum(1, keepdims=True)
            field = np.tensordot(share, getattr(self, name)[used], 1)
            found[name] = (
                (1 - u) * (1 - v) * field[:, i, j]
                + (1 - u) * v * field[:, i, j + 1]
                + u * (1 - v) * field[:, i + 1, j]
                + u * v * field[:, i + 1, j + 1]
            ).T
        return found


@dataclass(frozen=True)
class World:
    """What decides every number of generated flights.

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


def _transformers() -> tuple[Any, Any]:
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
    forward, inverse = _transformers()
    south, north, west, east = world.box
    lat, lon = np.meshgrid(np.linspace(south, north, 40), np.linspace(west, east, 40))
    px, py = forward.transform(lon.ravel(), lat.ravel())
    margin, cell = 3 * world.cell, world.cell
    x = np.arange(px.min() - margin, px.max() + margin + cell, cell)
    y = np.arange(py.min() - margin, py.max() + margin + cell, cell)
    lon2, lat2 = inverse.transform(*np.meshgrid(x, y))
    return x, y, np.asarray(lat2), np.asarray(lon2)


def _elevation(lat: Array, lon: Array) -> Array:
    """A dome [m]; its form is inferred."""
    height: Array = 3200.0 - 4.0 * (lat - 72.5) ** 2 - 9.0 * (lon + 40.0) ** 2
    return np.maximum(height, 1200.0)


def make_climate(world: World) -> Climate:
    """The true coarse climate: accumulation, temperature, melt and runoff of each mass year.

    Source: arXiv 2604.20783, card section 6.2; correlation lengths (150 km and 40 km) inferred.
    """
    x, y, lat, lon = make_grid(world)
    generator = world.generator(_CLIMATE)
    years = len(world.mass_years)

    def field(count: int, length: float) -> Array:
        return gaussian_field((count, len(y), len(x)), length / world.cell, generator)

    mean = np.clip(0.30 + 0.035 * (75 - lat) + 0.012 * (-40 - lon), 0.12, 0.9)
    new = np.sqrt(1 - 0.06**2 / 0.2**2) * field(years, 150e3) + 0.3 * field(years, 40e3)
    factor = np.empty_like(new)
    factor[0] = new[0]
    for year in range(1, years):  # years resemble the one before: AR(1), ρ = 0.2
        factor[year] = 0.2 * factor[year - 1] + np.sqrt(1 - 0.2**2) * new[year]
    accumulation = mean * np.exp(0.2 * factor)
    z = _elevation(lat, lon)
    temperature = 269.15 - 0.0068 * (z - 1500) - 0.75 * (lat - 67) + 0.7 * field(years, 150e3)
    temperature = np.minimum(temperature, 268.0)
    warm = 0.30 * np.exp((temperature - 262) / 3) * np.exp(0.3 * field(years, 150e3))
    melt = np.minimum(warm, 1.2)
    runoff = melt - refrozen(melt, accumulation)
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


def _monthly(yearly: Array, shares: Array) -> Array:
    """Deal yearly values (Y, H, W) out to months (12 Y, H, W)."""
    return (yearly[:, None] * shares[None, :, None, None]).reshape(-1, *yearly.shape[1:])


def refrozen(melt: Array, accumulation: Array, least: float = 0.0) -> Array:
    """How much of a year's melt freezes again [m w.e.].

    Args:
        melt: [m w.e.].
        accumulation: [m w.e.].
        least: Share that freezes however much there is, because it seeps into older firn.

    Source: arXiv 2604.20783, card section 6.2.

    Example:
        >>> refrozen(np.array([0.0, 0.4, 4.0]), np.array([0.4, 0.4, 0.4]))
        array([0. , 0.3, 0. ])
    """
    kept: Array = melt * np.clip(1 - 0.25 * melt / np.maximum(accumulation, 1e-3), least, 1.0)
    return kept


def write_mar(folder: Path, world: World, climate: Climate) -> None:
    """Write MAR files of monthly fields, one for each calendar year, with MAR's errors.

    MAR knows the coarse climate only, with a bias that stays, and a year's noise.

    Source: arXiv 2604.20783, card sections 3.3 and 6.2; correlation lengths of errors inferred.
    """
    try:
        import netCDF4
    except ImportError as error:
        raise need_extra("netCDF4", "Generating climate files") from error
    _, _, lat, lon = make_grid(world)
    generator = world.generator(_CLIMATE, 1)
    months = climate.months()
    shape = (len(months) // 12, *lat.shape)

    def noise(size: float, count: int = shape[0]) -> Array:
        """Errors of mass years, as fields of their months."""
        field = gaussian_field((count, *lat.shape), 60e3 / world.cell, generator)
        return size * np.repeat(field, len(months) // count, 0)

    snow = climate.accumulation * np.exp(0.03 + noise(0.05, 1) + noise(0.04))
    melt = climate.melt * np.exp(noise(0.04))
    liquid = climate.melt + climate.rain
    runoff = (melt + climate.rain) * climate.runoff / np.maximum(liquid, 1e-9)
    heights = np.repeat(snow.reshape(-1, 12, *lat.shape).sum(1), 12, 0) / 0.35
    fields: dict[str, tuple[str, Array]] = {
        "SMB": ("mmWE/month", 1000 * (snow + climate.rain - runoff)),
        "ME": ("mmWE/month", 1000 * melt),
        "RU": ("mmWE/month", 1000 * runoff),
        "ST": ("C", climate.temperature - 273.15 + noise(0.5)),
        "ZN6": ("m", heights * np.exp(noise(0.05))),
    }
    if climate.rain.any():
        fields["RF"] = ("mmWE/month", 1000 * climate.rain)
    year_of = climate.calendar().astype("datetime64[Y]").astype(int) + 1970
    folder.mkdir(parents=True, exist_ok=True)
    south, north, west, east = world.box
    surface = np.where(  # tundra at the southern rim, as a real mask has
        (lat > south - 0.4) & (lat < north + 2) & (lon > west - 4) & (lon < east + 4), 4.0, 2.0
    )
    for year in np.unique(year_of):
        part = year_of == year
        path = folder / f"MARv3.12-monthly-synthetic-{year}.nc"
        with netCDF4.Dataset(str(path), "w") as data:
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


def _text(file: Any, name: str, value: str) -> None:
    codes = np.array([[ord(c)] for c in value], np.uint16)
    file.create_dataset(name, data=codes).attrs["MATLAB_class"] = np.bytes_("char")


def write_layer_file(path: Path, time: Array, pos: Array, twtt: Array) -> None:
    """Write a CSARP_layer file of version 7.3.

    Shape:
        - time: (M,) [s]; pos: (M, 2) [degrees]; twtt: (M, K) [s], NaN where missing.

    Source: arXiv 2604.20783, card section 3.2, item 1.
    """
    try:
        import h5py
    except ImportError as error:
        raise need_extra("h5py", "Generating layer files") from error
    picked = np.isfinite(twtt)
    arrays: dict[str, tuple[str, NDArray[Any]]] = {
        "gps_time": ("double", time[:, None]),
        "lat": ("double", pos[:, :1]),
        "lon": ("double", pos[:, 1:]),
        "elev": ("double", np.full((len(time), 1), 3500.0)),
        "id": ("double", np.arange(1.0, twtt.shape[1] + 1)[None]),
        "twtt": ("double", twtt),
        "quality": ("uint8", np.where(picked, 1, 3).astype(np.uint8)),
        "type": ("uint8", np.full(twtt.shape, 2, np.uint8)),
    }
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, (kind, values) in arrays.items():  # MATLAB's transpose: traces come first
            file.create_dataset(name, data=values).attrs["MATLAB_class"] = np.bytes_(kind)
        _text(file, "file_type", "layer")
        _text(file, "file_version", "1")
    with open(path, "r+b") as raw:
        raw.write(_HEADER.ljust(124) + b"\x00\x02IM")


def _write_organizer(path: Path, layers: int) -> None:
    """Write the companion of a segment, of version 5."""
    from scipy.io import savemat

    count = layers + 1
    names = np.array(["surface", *(f"layer_{k:02}" for k in range(1, count))], object)
    with open(path, "wb") as file:
        savemat(
            file,
            {
                "lyr_id": np.arange(1.0, count + 1),
                "lyr_name": names,
                "lyr_group_name": np.array(["standard"] * count, object),
                "lyr_order": np.arange(1.0, count + 1),
                "lyr_age": np.arange(float(count)),
                "file_type": "layer_organizer",
            },
        )


@dataclass(frozen=True)
class Flight:
    """Where and when a segment is flown.

    Attributes:
        name: Of the segment.
        day: [days since 1970].
        box: Latitudes and longitudes [degrees].
    """

    name: str
    day: float
    box: tuple[float, float, float, float] = _BOX


@dataclass
class _Segment:
    """A generated flight segment: pos (S, N, 2), boundaries (S, N, K), truth (S, N, L)."""

    name: str
    time: Array
    pos: Array
    twtt: Array
    truth: Array


def _line(world: World, number: int, blocks: int, box: tuple[float, float, float, float]) -> Array:
    """Projected positions of the traces of a segment: (S, N, 2) [m]."""
    forward, _ = _transformers()
    generator = world.generator(_TRACK, number)
    south, north, west, east = box
    block = (world.traces - 1) * world.spacing
    need = blocks * (block + 8 * world.spacing) + 5 * world.spacing
    start = end = np.zeros(2)
    for _ in range(1000):
        lat, lon = generator.uniform(south, north, 2), generator.uniform(west, east, 2)
        start, end = np.stack(forward.transform(lon, lat), 1)
        if np.linalg.norm(end - start) >= need:
            break
    else:
        raise ConfigError(
            f"A segment of {blocks} blocks of {block / 1000:.1f} km does not fit the region.",
            "Set `--data.init_args.source.init_args.segments` higher, or `spacing` lower.",
        )
    length = float(np.linalg.norm(end - start))
    direction = (end - start) / length
    first = np.linspace(0.0, length - block, blocks) if blocks > 1 else np.zeros(1)
    along = first[:, None] + np.arange(world.traces) * world.spacing
    line: Array = start + along[..., None] * direction
    return line


def _make_segment(
    world: World, climate: Climate, number: int, blocks: int, flight: Flight
) -> _Segment:
    """Snow, firn and picks of one flight segment."""
    _, inverse = _transformers()
    points = _line(world, number, blocks, flight.box)
    n, layers = world.traces, world.layers
    flat = points.reshape(-1, 2)
    lon, lat = inverse.transform(flat[:, 0], flat[:, 1])
    pos = np.stack([lat, lon], 1).reshape(blocks, n, 2)
    coarse = climate.layered(flat, flight.day - np.arange(layers + 1.0) * _YEAR)
    accumulation, temperature, melt, rain, runoff = (
        coarse[name].reshape(blocks, n, layers) for name in Climate.FIELDS
    )
    generator = world.generator(_SNOW, number)
    places = np.arange(float(n)) * world.spacing
    stays = _along(blocks, places, 700.0, generator)  # P: topography
    yearly = _along(blocks * layers, places, 700.0, generator).reshape(blocks, layers, n)
    relief = _along(blocks, places, 4000.0, generator)  # in units of 15 m
    temperature = temperature - 0.0068 * 15.0 * relief[..., None]
    unseen = np.sqrt(0.75) * stays[:, None] + np.sqrt(0.25) * yearly
    accumulation = accumulation * np.exp(0.10 * unseen.transpose(0, 2, 1))
    balance = accumulation + rain - runoff
    water = np.maximum(smb_to_layers(balance), 1e-3)
    age = np.arange(1.0, layers + 1)
    density = layer_density(balance, temperature, melt + rain - runoff, age)
    truth = water / density
    twtt = _pick(world, number, truth, density, melt)
    time = flight.day * 86_400.0 + np.arange(float(blocks * n)).reshape(blocks, n) * 0.8
    return _Segment(flight.name, time, pos, twtt, truth)


def _pick(world: World, number: int, truth: Array, density: Array, melt: Array) -> Array:
    """Picks of the boundaries [s], with noise, mis-tracks and gaps: (S, N, L + 1)."""
    generator = world.generator(_PICKS, number)
    blocks, n, layers = truth.shape
    surface = 3.0e-6 + 2e-9 * generator.standard_normal((blocks, 1, 1))
    times = thickness_to_time(truth, density)
    exact = surface + np.concatenate([np.zeros((blocks, n, 1)), np.cumsum(times, -1)], axis=-1)
    slow = np.concatenate([density[..., :1], density], -1)
    picks = exact + thickness_to_time(world.noise * generator.standard_normal(exact.shape), slow)
    # two reflectors taken for one: a boundary is picked where the next one is, which is not picked
    # drawn always, so that nothing else changes with it
    whole: NDArray[np.bool_] = np.asarray(generator.random(blocks) < world.traced)
    wrong = np.asarray(generator.random((blocks, n, layers - 1)) < world.mistracks)
    wrong &= ~whole[:, None, None]  # what is fully traced has been looked at
    lost = np.concatenate([np.zeros((blocks, n, 1), np.bool_), wrong], -1)
    lost[..., :-1] &= ~wrong
    picks[..., 1:-1] = np.where(wrong, picks[..., 2:], picks[..., 1:-1])
    picks[..., 1:][lost] = np.nan
    deep = np.arange(1, layers + 1) / layers
    for block in range(blocks):
        gap = world.missing * (0.02 + 0.33 * deep**1.5 + 0.12 * melt[block].mean() * deep)
        mean_gap = generator.uniform(0.1, 0.3, layers) * n
        missing = markov_gaps(np.minimum(gap, 0.95), mean_gap, n, generator)
        missing |= (generator.random(layers) < world.missing * 0.25 * deep**2)[:, None]
        dropped, length = generator.random() < 0.2 * world.missing, generator.uniform(0.05, 0.15)
        first = int(generator.integers(n))
        if whole[block]:
            continue
        picks[block, :, 1:][missing.T] = np.nan
        if dropped:
            picks[block, first : first + max(1, int(length * n))] = np.nan
    return np.asarray(picks)


def write_world(folder: Path, world: World, climate: Climate, flights: Sequence[Flight]) -> None:
    """Write the layer files of all segments, the climate's files and the truth.

    Args:
        folder: An empty one.
        world: The recipe.
        climate: The true one.
        flights: One for each segment.
    """
    write_mar(folder / "MAR", world, climate)
    for number, (flight, blocks) in enumerate(zip(flights, world.sizes(), strict=True)):
        made = _make_segment(world, climate, number, blocks, flight)
        name = flight.name
        place = folder / "CSARP_layer" / name
        place.mkdir(parents=True)
        for frame, first in enumerate(range(0, blocks, world.blocks_per_frame), 1):
            part = slice(first, first + world.blocks_per_frame)
            write_layer_file(
                place / f"Data_{name}_{frame:03}.mat",
                made.time[part].ravel(),
                made.pos[part].reshape(-1, 2),
                made.twtt[part].reshape(-1, world.layers + 1),
            )
        _write_organizer(place / f"layer_{name}.mat", world.layers)
        (folder / "truth").mkdir(exist_ok=True)
        np.savez(
            folder / "truth" / f"{name}.npz",
            time=made.time.ravel(),
            thickness=made.truth.reshape(-1, world.layers),
        )


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


class GeneratedFlights(StackSource):
    """What generated flights share: files in the cache, read back by the readers of real ones."""

    world: World
    informative: bool

    @property
    def layers(self) -> int:
        """Number of layers."""
        return self.world.layers

    @property
    def physics(self) -> tuple[str, ...]:
        """Names of the physical fields."""
        return tuple(PHYSICS)

    @property
    def root(self) -> Path:
        """Folder with ``CSARP_layer``, ``MAR`` and ``truth``, written if it is not there."""
        text = json.dumps([_VERSION, type(self).__name__, asdict(self.world), self.key()])
        name = hashlib.sha256(text.encode()).hexdigest()[:24]
        return cached_folder(f"ice-layers-{name}", self.write)

    def key(self) -> str:
        """What decides the data beside :attr:`world`."""
        return ""

    def write(self, folder: Path) -> None:
        """Write the files into an empty folder."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Write the files that are not there."""
        _ = self.root

    def reader(self) -> LayerFiles:
        """The reader of the files, as for real ones."""
        root = self.root
        return LayerFiles(
            [str(root / "CSARP_layer")],
            MarClimate([str(root / "MAR")]),
            count=self.world.layers,
            traces=self.world.traces,
        )

    def load(self) -> Flights:
        """Return the stacks that the readers make of the files, with the truth."""
        reader = self.reader()
        tracks, names, excluded, notes = reader.tracks()
        for track in tracks:
            with np.load(self.root / "truth" / f"{track.segment}.npz") as truth:
                if not np.array_equal(truth["time"], track.time):
                    raise DataError(
                        f"The truth of segment {track.segment} is that of other traces.",
                        f"Remove the folder {self.root}; it is generated again.",
                    )
                track.truth = truth["thickness"]
        flights = reader.assemble(tracks, names, excluded, notes)
        return flights if self.informative else self._uninformed(flights)

    def _uninformed(self, flights: Flights) -> Flights:
        """Exchange physics between stacks and layers: a negative control (card section 6.2)."""
        generator = self.world.generator(_SHUFFLE)
        layers = len(flights.layer_names)
        order = generator.permutation(len(flights.stacks) * layers)
        stacks = []
        for number, stack in enumerate(flights.stacks):
            physics = np.empty_like(stack.physics)
            for layer in range(layers):
                other, its = divmod(int(order[number * layers + layer]), layers)
                values = flights.stacks[other].physics[:, its]
                rows = np.linspace(0, len(values) - 1, len(physics)).round().astype(int)
                physics[:, layer] = values[rows]
            stacks.append(replace(stack, physics=physics))
        return replace(flights, stacks=stacks)


def check_world(world: World) -> World:
    """Return it if all numbers are in range.

    Raises:
        ConfigError: One is not.
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


class SyntheticFlights(GeneratedFlights):
    """Generated flights over a generated ice sheet: the embedded data.

    Accumulation, temperature and melt of each year are random fields; snow varies below the scale
    of the climate model, for ever (topography) and from year to year; firn compacts after Herron
    and Langway; picks have noise, gaps that grow with depth and melt, wholly absent layers,
    drop-outs and mis-tracks. All is written as CSARP_layer and MAR files into the cache
    (``FULGURITE_CACHE``), and read back by :class:`LayerFiles` and :class:`MarClimate`.

    Args:
        stacks: Number of blocks, over all segments.
        traces: N, traces of a block.
        layers: L, layers.
        segments: Flight segments; splits keep them whole.
        spacing: Distance of traces [m].
        mistracks: Fraction of picks that are on the next boundary, which is then not picked: two
            reflectors are taken for one.
        missing: Factor on the rates of gaps, absent layers and drop-outs; 1 has the card's, 0 none.
        noise: Standard deviation of a pick [m].
        traced: Fraction of blocks whose layers are fully traced.
        informative: False exchanges physics between stacks and layers: a negative control.
        seed: Of everything.

    Raises:
        ConfigError: An argument is out of range.

    Source: arXiv 2604.20783, card section 6.2.
    """

    def __init__(
        self,
        stacks: int = 560,
        traces: int = 48,
        layers: int = 10,
        segments: int = 28,
        spacing: float = 100.0,
        mistracks: float = 0.01,
        missing: float = 1.0,
        noise: float = 0.012,
        traced: float = 0.0,
        informative: bool = True,
        seed: int = 0,
    ) -> None:
        self.world = check_world(
            World(
                stacks=stacks,
                traces=traces,
                layers=layers,
                segments=segments,
                spacing=spacing,
                mistracks=mistracks,
                missing=missing,
                noise=noise,
                traced=traced,
                seed=seed,
            )
        )
        self.informative = informative

    def write(self, folder: Path) -> None:
        """Write the files into an empty folder."""
        world = self.world
        generator = world.generator(_TRACK)
        years = generator.integers(world.first_year, world.last_year + 1, world.segments)
        start = np.array([f"{year}-03-20" for year in years], "datetime64[D]").astype(np.float64)
        days = sorted((start + generator.integers(0, 56, world.segments) + 0.6).tolist())
        flights = [Flight(name, day) for name, day in zip(flight_names(days), days, strict=True)]
        write_world(folder, world, make_climate(world), flights)
