"""Generated flights over a generated climate, written as layer files and MAR files.

Shapes: L layers (newest first).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from fulgurite.data.store import cached_folder
from fulgurite.datamodules.ice_layers.climate.mar import PHYSICS, MarClimate
from fulgurite.datamodules.ice_layers.flights import StackSource
from fulgurite.datamodules.ice_layers.generator.climate import Climate, make_climate, write_mar
from fulgurite.datamodules.ice_layers.generator.segments import make_segment
from fulgurite.datamodules.ice_layers.generator.world import (
    SHUFFLE,
    TRACK,
    Flight,
    World,
    flight_names,
)
from fulgurite.datamodules.ice_layers.readers.layer_files import LayerFiles
from fulgurite.datamodules.ice_layers.readers.layer_writer import write_layer_file, write_organizer
from fulgurite.datamodules.ice_layers.readers.write_back import Written
from fulgurite.datamodules.ice_layers.stack import Array, Flights
from fulgurite.datamodules.ice_layers.tracks.blocks import Blocks
from fulgurite.domains.ice_layers.details import FlightDetails
from fulgurite.errors import DataError

__all__ = ["GeneratedFlights", "GeneratedLayerFiles", "SyntheticFlights", "write_world"]

_VERSION = 3  # of the code that generates: a change makes other data


def write_world(folder: Path, world: World, climate: Climate, flights: Sequence[Flight]) -> None:
    """Write the layer files of all segments, the climate's files and the truth.

    Args:
        folder: An empty folder.
        world: The recipe.
        climate: The true climate.
        flights: Flight of each segment.
    """
    write_mar(folder / "MAR", world, climate)
    for number, (flight, blocks) in enumerate(zip(flights, world.sizes(), strict=True)):
        segment = make_segment(world, climate, number, blocks, flight=flight)
        name = flight.name
        segment_folder = folder / "CSARP_layer" / name
        segment_folder.mkdir(parents=True)
        for frame, first in enumerate(range(0, blocks, world.blocks_per_frame), 1):
            part = slice(first, first + world.blocks_per_frame)
            write_layer_file(
                segment_folder / f"Data_{name}_{frame:03}.mat",
                segment.time[part].ravel(),
                segment.pos[part].reshape(-1, 2),
                segment.twtt[part].reshape(-1, world.layers + 1),
            )
        write_organizer(segment_folder / f"layer_{name}.mat", world.layers)
        (folder / "truth").mkdir(exist_ok=True)
        np.savez(
            folder / "truth" / f"{name}.npz",
            time=segment.time.ravel(),
            thickness=segment.truth.reshape(-1, world.layers),
        )


class GeneratedFlights(StackSource):
    """What generated flights share: files in the cache, read back by the readers of real ones."""

    world: World
    informative: bool

    @property
    def layers(self) -> int:
        """Number of layers."""
        return self.world.layers

    @property
    def description(self) -> str:
        """What the traces are."""
        return "generated flights, which nobody measured"

    @property
    def root(self) -> Path:
        """Folder of the files and of ``truth``, written if it is not there."""
        text = json.dumps([_VERSION, type(self).__name__, asdict(self.world), self.key()])
        name = hashlib.sha256(text.encode()).hexdigest()[:24]
        return cached_folder(f"ice-layers-{name}", self.write)

    def key(self) -> str:
        """Text that decides the data beside :attr:`world`."""
        return ""

    def write(self, folder: Path) -> None:
        """Write the files into an empty folder."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Write the files that are not there."""
        _ = self.root

    def _shuffle_physics(self, flights: Flights) -> Flights:
        """Exchange physics between stacks and layers: a negative control.

        Source: docs/papers/ice_layers.md section 6.2.
        """
        generator = self.world.generator(SHUFFLE)
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


class GeneratedLayerFiles(GeneratedFlights):
    """What generated flights share whose files are CSARP_layer, its companion, and MAR."""

    _reader: LayerFiles | None = None

    @property
    def physics(self) -> tuple[str, ...]:
        """Names of the physical fields."""
        return tuple(PHYSICS)

    def reader(self) -> LayerFiles:
        """The reader of the files, as for real ones."""
        root = self.root
        return LayerFiles(
            [str(root / "CSARP_layer")],
            MarClimate([str(root / "MAR")]),
            count=self.world.layers,
            blocks=Blocks(traces=self.world.traces),
        )

    def load(self) -> Flights:
        """Return the stacks that the readers make of the files, with the truth."""
        reader, truth_folder = self.reader(), self.root / "truth"
        self._reader = reader
        tracks, names, excluded, notes = reader.tracks()
        for track in tracks:
            with np.load(truth_folder / f"{track.segment}.npz") as truth:
                if not np.array_equal(truth["time"], track.time):
                    raise DataError(
                        f"The truth of segment {track.segment} is that of other traces.",
                        f"Remove the folder {self.root}; it is generated again.",
                    )
                track.truth = truth["thickness"]
        flights = reader.assemble(tracks, names, excluded, notes)
        return flights if self.informative else self._shuffle_physics(flights)

    def check_write_back(
        self, folder: Path, records: Mapping[str, Sequence[FlightDetails]]
    ) -> None:
        """See :meth:`LayerFiles.check_write_back`."""
        assert self._reader is not None
        self._reader.check_write_back(folder, records)

    def write_back(
        self, folder: Path, segment: str, stacks: Sequence[tuple[FlightDetails, Array]]
    ) -> Written:
        """See :meth:`LayerFiles.write_back`."""
        assert self._reader is not None
        return self._reader.write_back(folder, segment, stacks)


class SyntheticFlights(GeneratedLayerFiles):
    """Generated flights over a generated ice sheet: the embedded data.

    Accumulation, temperature and melt of each year are random fields; snow varies below the scale
    of the climate model, for ever (topography) and from year to year; firn compacts after Herron
    and Langway; picks have noise, gaps that grow with depth and melt, wholly absent layers,
    drop-outs and mis-tracks. All is written as CSARP_layer and MAR files into the cache
    (``FULGURITE_CACHE``), and read back by :class:`LayerFiles` and :class:`MarClimate`.

    Args:
        world: What is generated: sizes, gaps, noise and seed.
        informative: False exchanges physics between stacks and layers: a negative control.

    Raises:
        ConfigError: An argument is out of range.

    Source: docs/papers/ice_layers.md section 6.2.
    """

    def __init__(self, world: World = World(), informative: bool = True) -> None:
        self.world = world
        self.informative = informative

    def write(self, folder: Path) -> None:
        """Write the files into an empty folder."""
        world = self.world
        generator = world.generator(TRACK)
        years = generator.integers(world.first_year, world.last_year + 1, world.segments)
        start = np.array([f"{year}-03-20" for year in years], "datetime64[D]").astype(np.float64)
        days = sorted((start + generator.integers(0, 56, world.segments) + 0.6).tolist())
        flights = [Flight(name, day) for name, day in zip(flight_names(days), days, strict=True)]
        write_world(folder, world, make_climate(world), flights)
