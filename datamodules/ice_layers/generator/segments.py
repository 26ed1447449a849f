"""Segments of generated flights: snow, firn and picks along a line.

Shapes: S blocks of a segment, N traces, L layers (newest first).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fulgurite.datamodules.ice_layers.generator.climate import Climate
from fulgurite.datamodules.ice_layers.generator.random_fields import along_line, markov_gaps
from fulgurite.datamodules.ice_layers.generator.world import (
    PICKS,
    SNOW,
    TRACK,
    YEAR,
    Flight,
    World,
    make_transformers,
)
from fulgurite.datamodules.ice_layers.stack import Array
from fulgurite.datamodules.ice_layers.tracks.firn import layer_density, smb_to_layers
from fulgurite.datamodules.ice_layers.tracks.travel_time import thickness_to_time
from fulgurite.errors import ConfigError

__all__ = ["Segment", "Snow", "layer_dates", "make_segment", "make_snow", "mistrack"]


@dataclass(frozen=True)
class Snow:
    """Snow and firn along a generated flight segment.

    Attributes:
        points: Projected positions [m]. Shape: (S, N, 2).
        pos: Latitude and longitude [degrees]. Shape: (S, N, 2).
        truth: Thickness of the layers [m]. Shape: (S, N, L).
        density: Density of the layers [g cm⁻³]. Shape: (S, N, L).
        melt: Melt of each layer's year [m w.e.]. Shape: (S, N, L).
    """

    points: Array
    pos: Array
    truth: Array
    density: Array
    melt: Array


@dataclass
class Segment:
    """A generated flight segment: pos (S, N, 2), boundaries (S, N, K), truth (S, N, L)."""

    name: str
    time: Array
    pos: Array
    twtt: Array
    truth: Array


def _draw_line(
    world: World, number: int, blocks: int, box: tuple[float, float, float, float]
) -> Array:
    """Projected positions of the traces of a segment: (S, N, 2) [m]."""
    forward, _ = make_transformers()
    generator = world.generator(TRACK, number)
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
            "Set `--data.init_args.source.init_args.world.segments` higher, or `spacing` lower.",
        )
    length = float(np.linalg.norm(end - start))
    direction = (end - start) / length
    first = np.linspace(0.0, length - block, blocks) if blocks > 1 else np.zeros(1)
    along = first[:, None] + np.arange(world.traces) * world.spacing
    line: Array = start + along[..., None] * direction
    return line


def make_segment(
    world: World, climate: Climate, number: int, blocks: int, *, flight: Flight
) -> Segment:
    """Snow, firn and picks of one flight segment."""
    snow = make_snow(world, climate, number, blocks, flight=flight)
    twtt = _pick_boundaries(world, number, snow.truth, snow.density, melt=snow.melt)
    traces = np.arange(float(blocks * world.traces)).reshape(blocks, world.traces)
    time = flight.day * 86_400.0 + traces * 0.8
    return Segment(flight.name, time, snow.pos, twtt, snow.truth)


def layer_dates(world: World, flight: Flight) -> Array:
    """Dates of the boundaries, the flight's first [days since 1970]. Shape: (L + 1,)."""
    dates: Array = flight.day - np.arange(world.layers + 1.0) * YEAR
    return dates


def make_snow(world: World, climate: Climate, number: int, blocks: int, *, flight: Flight) -> Snow:
    """Snow and firn of one flight segment.

    Args:
        world: The recipe.
        climate: The true coarse climate.
        number: Number of the segment.
        blocks: Number of blocks, S.
        flight: Name, day and region of the flight.

    Source: docs/papers/ice_layers.md section 6.2.
    """
    _, inverse = make_transformers()
    points = _draw_line(world, number, blocks, flight.box)
    n, layers = world.traces, world.layers
    flat = points.reshape(-1, 2)
    lon, lat = inverse.transform(flat[:, 0], flat[:, 1])
    pos = np.stack([lat, lon], 1).reshape(blocks, n, 2)
    coarse = climate.sum_layers(flat, layer_dates(world, flight))
    accumulation, temperature, melt, rain, runoff = (
        coarse[name].reshape(blocks, n, layers) for name in Climate.FIELDS
    )
    generator = world.generator(SNOW, number)
    positions = np.arange(float(n)) * world.spacing
    stays = along_line(blocks, positions, 700.0, generator)  # P: topography
    yearly = along_line(blocks * layers, positions, 700.0, generator).reshape(blocks, layers, n)
    relief = along_line(blocks, positions, 4000.0, generator)  # in units of 15 m
    temperature = temperature - 0.0068 * 15.0 * relief[..., None]
    unseen = np.sqrt(0.75) * stays[:, None] + np.sqrt(0.25) * yearly
    accumulation = accumulation * np.exp(0.10 * unseen.transpose(0, 2, 1))
    balance = accumulation + rain - runoff
    water = np.maximum(smb_to_layers(balance), 1e-3)
    age = np.arange(1.0, layers + 1)
    density = layer_density(balance, temperature, melt + rain - runoff, age)
    return Snow(points, pos, water / density, density, melt)


def mistrack(picks: Array, wrong: NDArray[np.bool_]) -> Array:
    """Take two reflectors for one: a boundary is picked where the next one is, which is not picked.

    Args:
        picks: Boundaries from the surface down. Shape: (..., K).
        wrong: Whether each boundary but the first and the last is picked so. Shape: (..., K - 2).

    Returns:
        The picks, NaN where there is none any more. Shape: (..., K).

    Example:
        >>> mistrack(np.array([0.0, 1.0, 2.0, 3.0]), np.array([True, False]))
        array([ 0.,  2., nan,  3.])
    """
    picks = picks.copy()
    lost = np.concatenate([np.zeros_like(wrong[..., :1]), wrong], -1)
    lost[..., :-1] &= ~wrong
    picks[..., 1:-1] = np.where(wrong, picks[..., 2:], picks[..., 1:-1])
    picks[..., 1:][lost] = np.nan
    return picks


def _pick_boundaries(
    world: World, number: int, truth: Array, density: Array, *, melt: Array
) -> Array:
    """Picks of the boundaries [s], with noise, mis-tracks and gaps: (S, N, L + 1)."""
    generator = world.generator(PICKS, number)
    blocks, n, layers = truth.shape
    surface = 3.0e-6 + 2e-9 * generator.standard_normal((blocks, 1, 1))
    times = thickness_to_time(truth, density)
    exact = surface + np.concatenate([np.zeros((blocks, n, 1)), np.cumsum(times, -1)], axis=-1)
    slow = np.concatenate([density[..., :1], density], -1)
    picks = exact + thickness_to_time(world.noise * generator.standard_normal(exact.shape), slow)
    # drawn always, so that nothing else changes with it
    is_traced: NDArray[np.bool_] = np.asarray(generator.random(blocks) < world.traced)
    wrong = np.asarray(generator.random((blocks, n, layers - 1)) < world.mistracks)
    wrong &= ~is_traced[:, None, None]  # what is fully traced has been looked at
    picks = mistrack(picks, wrong)
    deep = np.arange(1, layers + 1) / layers
    for block in range(blocks):
        gap = world.missing * (0.02 + 0.33 * deep**1.5 + 0.12 * melt[block].mean() * deep)
        mean_gap = generator.uniform(0.1, 0.3, layers) * n
        missing = markov_gaps(np.minimum(gap, 0.95), mean_gap, n, generator)
        missing |= (generator.random(layers) < world.missing * 0.25 * deep**2)[:, None]
        dropped, length = generator.random() < 0.2 * world.missing, generator.uniform(0.05, 0.15)
        first = int(generator.integers(n))
        if is_traced[block]:
            continue
        picks[block, :, 1:][missing.T] = np.nan
        if dropped:
            picks[block, first : first + max(1, int(length * n))] = np.nan
    return np.asarray(picks)
