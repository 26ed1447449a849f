"""Generated echograms in the layout, and with the gaps, of the Snow Radar Echogram Dataset.

Shapes: S blocks of a segment, N traces, K boundaries (the surface first), L layers (newest first),
P physical fields.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fulgurite.datamodules.ice_layers.generator.climate import (
    Climate,
    make_climate,
    see_as_mar,
    surface_elevation,
)
from fulgurite.datamodules.ice_layers.generator.random_fields import markov_gaps
from fulgurite.datamodules.ice_layers.generator.segments import (
    Snow,
    layer_dates,
    make_snow,
    mistrack,
)
from fulgurite.datamodules.ice_layers.generator.synthetic import GeneratedFlights
from fulgurite.datamodules.ice_layers.generator.world import (
    CLIMATE,
    PICKS,
    TRACK,
    Flight,
    LayerCount,
    StackCount,
    TraceCount,
    TraceSpacing,
    World,
    flight_names,
)
from fulgurite.datamodules.ice_layers.readers.layer_writer import write_matlab73
from fulgurite.datamodules.ice_layers.readers.sred import SredMat
from fulgurite.datamodules.ice_layers.readers.sred_options import SredFolders
from fulgurite.datamodules.ice_layers.stack import Array, Flights
from fulgurite.errors import ConfigError
from fulgurite.options import ClosedUnitInterval

__all__ = ["SredWorld", "SyntheticSred", "write_sred"]

_OPTION = "--data.init_args.source.init_args"
_FOLDER = "train_data"
# Latitudes and longitudes of flights: the published means 74.67 and -43.12 with their deviations of
# 1.57 and 4.64 [degrees]
_BOX = (71.57, 77.77, -52.3, -33.94)
# What brings the snow of docs/papers/ice_layers.md section 6.2 to SRED's means (measured on seeds
# 0 to 4)
_WETNESS = 0.494  # factor on accumulation: a balance of 0.184 m w.e.
_WARMTH = -6.0  # [K]: no layer melts away
_BIN = 0.00793  # depth of a range bin [m]: layers of 56.08
_COMPLETE, _GAPS, _TRUNCATED = range(3)


@dataclass(frozen=True)
class _EchogramRecipe:
    """Parameters of the gaps of SRED.

    Attributes:
        complete: Fraction of stacks without any gap.
        gaps: Fraction of stacks with gaps in some boundaries, of which all are there.
        shallowest: Fewest layers of the other stacks, which lack their deepest ones.
        broken: Fraction of those that have gaps too (inferred).
    """

    complete: float
    gaps: float
    shallowest: int = 3
    broken: float = 0.5


def write_sred(path: Path, boundaries: Array, pos: Array, fields: dict[str, Array]) -> None:
    """Write an echogram of SRED's layout, as MATLAB 7.3.

    Args:
        path: The file, whose name begins with its flight segment.
        boundaries: Cumulative range bins, NaN where missing. Shape: (N, K).
        pos: Latitude and longitude [degrees]. Shape: (N, 2).
        fields: ``Elevation`` (N,), and the physical fields (N, R).

    Source: docs/papers/ice_layers.md section 3.5.
    """
    arrays: dict[str, tuple[str, NDArray[Any]]] = {
        "layers_vector": ("double", boundaries),
        "Latitude": ("double", pos[:, :1]),
        "Longitude": ("double", pos[:, 1:]),
    }
    for name, values in fields.items():
        array = values if values.ndim == 2 else values[:, None]
        arrays[name] = ("single", array.astype(np.float32))
    write_matlab73(path, arrays, {})


def _draw_kinds(world: World, recipe: _EchogramRecipe) -> list[NDArray[np.int64]]:
    """What each block of each segment lacks: exactly so many of each, in random order."""
    complete, gaps = (round(fraction * world.stacks) for fraction in (recipe.complete, recipe.gaps))
    kinds = np.full(world.stacks, _TRUNCATED)
    kinds[:complete] = _COMPLETE
    kinds[complete : complete + gaps] = _GAPS
    shuffled = world.generator(PICKS, world.segments, 0).permutation(kinds)
    return [np.asarray(part) for part in np.split(shuffled, np.cumsum(world.sizes())[:-1])]


def _pick_echogram(
    world: World,
    recipe: _EchogramRecipe,
    truth: Array,
    kind: int,
    *,
    generator: np.random.Generator,
) -> Array:
    """Picks of the boundaries of one block, in whole range bins: (N, K).

    Args:
        world: The recipe of the flights.
        recipe: The recipe of the gaps.
        truth: True thickness [range bins]. Shape: (N, L).
        kind: Kind of the block: complete, with gaps, or truncated.
        generator: Generator of noise and gaps.
    """
    n, layers = truth.shape
    surface = 60.0 + 3.0 * generator.standard_normal()
    exact = surface + np.concatenate([np.zeros((n, 1)), np.cumsum(truth, 1)], 1)
    picks = exact + world.noise / _BIN * generator.standard_normal(exact.shape)
    wrong = generator.random((n, layers - 1)) < world.mistracks
    deep = np.arange(1, layers + 1) / layers
    gap_fraction = np.minimum(world.missing * (0.02 + 0.2 * deep**1.5), 0.95)
    missing = markov_gaps(gap_fraction, generator.uniform(0.1, 0.3, layers) * n, n, generator).T
    first, length = int(generator.integers(n)), max(1, n // 10)
    there = int(generator.integers(recipe.shallowest, layers))
    is_broken = kind == _GAPS or (kind == _TRUNCATED and generator.random() < recipe.broken)
    if kind != _COMPLETE:  # what is complete has been looked at
        picks = mistrack(picks, wrong)
    if is_broken:
        missing[first : first + length, layers // 2] = True  # at least one gap
        picks[:, 1:][missing] = np.nan
    if kind == _TRUNCATED:
        picks = picks[:, : there + 1]
    last = picks[:, -1]  # a deepest boundary that is nowhere picked would be one less
    if np.isnan(last).all():
        picks[:, -1] = np.round(exact[:, picks.shape[1] - 1])
    return _separate_picks(np.round(picks), kind != _COMPLETE)


def _separate_picks(picks: Array, is_removed: bool) -> Array:
    """Remove, or move, picks that noise has put onto or above the one before them: (N, K)."""
    apart = picks.copy()
    deepest = np.full(len(picks), -np.inf)
    for column in apart.T:
        column[column <= deepest] = np.nan if is_removed else deepest[column <= deepest] + 1
        deepest = np.fmax(deepest, column)
    return apart


def _make_fields(
    world: World, modelled: Climate, snow: Snow, number: int, *, flight: Flight
) -> dict[str, Array]:
    """The physical fields of a segment, brought to SRED's published means.

    Returns:
        ``Elevation`` (S, N) and the fields (S, N, L).

    Source: docs/papers/ice_layers.md section 3.5, for means and deviations; how the fields follow
    from balance, temperature and melt is inferred.
    """
    blocks, n, layers = snow.truth.shape
    coarse = {
        name: values.reshape(blocks, n, layers)
        for name, values in modelled.sum_layers(
            snow.points.reshape(-1, 2), layer_dates(world, flight)
        ).items()
    }
    generator = world.generator(CLIMATE, 2, number)
    noise = generator.standard_normal((2, blocks, 1, layers))
    balance = coarse["accumulation"] + coarse["rain"] - coarse["runoff"]
    warmth = 0.7 * (coarse["temperature"] - 247.8)
    frozen = np.maximum(coarse["melt"] - coarse["runoff"], 0.0)
    refreezing = 0.075 * (frozen / 0.0027) ** 1.9  # rare, and much then [mm w.e.]
    height = surface_elevation(snow.pos[..., 0], snow.pos[..., 1])
    return {
        "curr_smb": balance,
        "curr_temp": 244.6 + warmth,
        "curr_RZ_vals": refreezing,
        "curr_SHC_vals": refreezing / 1_000.0 / 0.398,
        "curr_SNHS_vals": 25.64 + 2.0 * (balance - 0.184) + 0.13 * noise[0],
        "curr_dens": 309.7 + 2.2 * warmth + 2.0 * noise[1],
        "Elevation": 3390.9 + 0.9 * (height - 2_908.0),
    }


@dataclass(frozen=True)
class SredWorld(World):
    """A world of SRED's sizes, place and time: 256 traces take 2 km."""

    stacks: StackCount = 280
    traces: TraceCount = 256
    layers: LayerCount = 20
    spacing: TraceSpacing = 7.84
    first_year: int = 2012
    last_year: int = 2012
    box: tuple[float, float, float, float] = _BOX


class SyntheticSred(GeneratedFlights):
    """Generated echograms with the gaps of SRED: most lack their deepest layers.

    The snow is that of :class:`SyntheticFlights`, drier, on lines through the middle of Greenland
    in spring 2012, in 20 layers of 256 traces. Files of SRED's layout are written into the cache
    (``FULGURITE_CACHE``), with whole range bins, and read back by :class:`SredMat`. Splits are by
    flight segment.

    Args:
        world: What is generated: sizes, gaps, noise and seed.
        complete: Fraction of echograms that are complete, as SRED has it.
        gaps: Fraction that have all boundaries, with gaps. All others have fewer boundaries, from 3
            layers up, and gaps in one of two of them (inferred).
        informative: False exchanges physics between stacks and layers: a negative control.

    Raises:
        ConfigError: An argument is out of range.

    Source: docs/papers/ice_layers.md section 3.5 (1659 complete, 1628 with gaps, 10,629 with fewer
    layers; means of the features) and section 6.2.
    """

    def __init__(
        self,
        world: SredWorld = SredWorld(),
        complete: ClosedUnitInterval = 0.12,
        gaps: ClosedUnitInterval = 0.12,
        informative: bool = True,
    ) -> None:
        self.world = world
        if world.layers < _EchogramRecipe(0.0, 0.0).shallowest + 1:
            raise ConfigError(
                f"Of {world.layers} layers none can be missing.",
                f"Set `{_OPTION}.world.layers` to 4 or more.",
            )
        if not (0 <= complete <= 1 and 0 <= gaps <= 1 - complete):
            raise ConfigError(
                f"{complete} of the echograms are complete and {gaps} have gaps.",
                f"Set `{_OPTION}.complete` and `{_OPTION}.gaps` to fractions whose sum is at most "
                "1.",
            )
        self.recipe = _EchogramRecipe(complete, gaps)
        self.informative = informative

    def key(self) -> str:
        """Text that decides the data beside :attr:`world`."""
        return f"1 {self.recipe}"

    @property
    def physics(self) -> tuple[str, ...]:
        """Names of the physical fields."""
        return self._make_reader(Path()).physics

    def _make_reader(self, root: Path) -> SredMat:
        world = self.world
        return SredMat(
            str(root),
            SredFolders((_FOLDER,), (), (), split="segments"),
            count=world.layers,
            traces=world.traces,
        )

    def write(self, folder: Path) -> None:
        """Write the files into an empty folder."""
        world = self.world
        start = float(np.datetime64("2012-03-20", "D").astype(np.int64)) + 0.6
        days = sorted((start + world.generator(TRACK).integers(0, 56, world.segments)).tolist())
        names = flight_names(days)
        climate = make_climate(world, _WETNESS, _WARMTH)
        modelled, _ = see_as_mar(world, climate)
        kinds = _draw_kinds(world, self.recipe)
        (folder / _FOLDER).mkdir(parents=True)
        (folder / "truth").mkdir()
        for number, (name, day) in enumerate(zip(names, days, strict=True)):
            flight = Flight(name, day, world.box)
            snow = make_snow(world, climate, number, len(kinds[number]), flight=flight)
            physics = _make_fields(world, modelled, snow, number, flight=flight)
            generator = world.generator(PICKS, number)
            truth = snow.truth / _BIN
            np.savez(folder / "truth" / f"{name}.npz", thickness=truth)
            for block, kind in enumerate(kinds[number]):
                picks = _pick_echogram(
                    world, self.recipe, truth[block], int(kind), generator=generator
                )
                # the authors' code takes row i + 1 for layer i, and none the first
                fields = {
                    key: values[block]
                    if values.ndim == 2
                    else np.concatenate([values[block, :, :1], values[block]], 1)
                    for key, values in physics.items()
                }
                path = folder / _FOLDER / f"{name}_{block:04}_2km.mat"
                write_sred(path, picks, snow.pos[block], fields)

    def load(self) -> Flights:
        """Return the stacks that the reader makes of the files, with the truth [range bins]."""
        root = self.root
        flights = self._make_reader(root).load()
        truth: dict[str, Array] = {}
        for name in flights.segments:
            with np.load(root / "truth" / f"{name}.npz") as content:
                truth[name] = content["thickness"]
        stacks = [
            replace(s, truth=truth[s.segment][int(s.name.removeprefix(s.segment)[1:5])])
            for s in flights.stacks
        ]
        with_truth = replace(flights, stacks=stacks)
        return with_truth if self.informative else self._shuffle_physics(with_truth)
