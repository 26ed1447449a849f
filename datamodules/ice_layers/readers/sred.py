"""Stacks of the Snow Radar Echogram Dataset (SRED), split as its folders are.

Shapes: N traces, K boundaries (the surface first), L = K - 1 layers (newest first), P physical
fields.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fulgurite.data.exclusions import Exclusion, check_exclude
from fulgurite.data.listing import list_files
from fulgurite.data.splits import check_min
from fulgurite.datamodules.ice_layers.flights import StackSource, read_or_leave, report_unreadable
from fulgurite.datamodules.ice_layers.readers.sred_file import SredFile, read_sred
from fulgurite.datamodules.ice_layers.readers.sred_options import SredBins, SredFields, SredFolders
from fulgurite.datamodules.ice_layers.readers.sred_parts import (
    Echogram,
    describe_parts,
    keep_each_once,
    settle_shared,
)
from fulgurite.datamodules.ice_layers.splits import PARTS
from fulgurite.datamodules.ice_layers.stack import (
    EXCLUDE,
    Array,
    Flights,
    LayerStack,
    OwnSplit,
    check_thickest,
)
from fulgurite.datamodules.ice_layers.tracks.resample import measure_track
from fulgurite.datamodules.ice_layers.tracks.spans import to_optical_lengths
from fulgurite.datamodules.ice_layers.tracks.travel_time import remove_crossed, time_to_thickness
from fulgurite.domains.ice_layers.spans import Spans
from fulgurite.errors import DataError
from fulgurite.io import data_path
from fulgurite.options import IntAboveOne, PositiveInt

__all__ = ["SredMat"]

_OPTION = "--data.init_args.source.init_args"
_KINDS = ("unreadable", "crossed", "physics", "duplicate")
_ELEVATION = "Elevation"
_DENSITY = "curr_dens"


class SredMat(StackSource):
    """Stacks in the ``.mat`` files of SRED: boundaries in range bins, with physical fields.

    A file is an echogram of 256 traces: ``layers_vector`` (boundaries × traces), cumulative range
    bins, NaN where missing; ``Latitude``, ``Longitude``, ``Elevation`` (traces);
    ``curr_smb``, ``curr_temp``, ``curr_RZ_vals``, ``curr_SHC_vals``, ``curr_SNHS_vals``,
    ``curr_dens`` (rows × traces). Layer i lies between boundaries i and i + 1; a file with fewer
    boundaries than ``count`` + 1 has no deeper layers, which are missing. Its name begins with its
    flight segment, ``20120330_04_0939_2km.mat``.

    The physical fields keep the names that they have in the files, because those do not say their
    units. By their published means they are balance in m of water, K, refreezing in mm of water,
    height change in m, snowpack in m and kg m⁻³ (inferred). ``Elevation`` is the same for all
    layers; whether it is the aircraft's or the snow's is not said.

    Args:
        root: Folder of the data set, absolute or relative to ``FULGURITE_DATA``.
        folders: The folders of each part, and the split.
        count: L, number of layers to use, from the surface down.
        traces: N, traces of every file.
        fields: The physical fields to use, and their rows.
        bins: How long a range bin is, where thickness shall be in metres.
        exclude: What to leave out and count instead of stopping: files that are ``unreadable``,
            ``crossed`` boundaries, files without finite ``physics``, files with a ``duplicate``
            in an evaluated part, or of another name.
        thickest: Largest plausible median of all observed thicknesses, in their unit; 15 m or 500
            range bins if not given.

    Raises:
        ConfigError: An argument is out of range.

    Source: docs/papers/ice_layers.md section 3.5, for keys, shapes and folders. That layers are a
    year apart, metres of range bins and all units are inferred.
    """

    def __init__(
        self,
        root: str,
        folders: SredFolders = SredFolders(),
        count: PositiveInt = 20,
        traces: IntAboveOne = 256,
        *,
        fields: SredFields = SredFields(),
        bins: SredBins = SredBins(),
        exclude: list[str] = [],  # noqa: B006  # copied below
        thickest: float | None = None,
    ) -> None:
        check_min("source.init_args.count", count, 1)
        check_min("source.init_args.traces", traces, 2)
        self.root = root
        self.folders, self.fields, self.bins = folders, fields, bins
        self.count, self.traces = count, traces
        self.exclude = check_exclude(exclude, _KINDS, EXCLUDE)
        self.thickest = None if thickest is None else check_thickest(thickest, self.unit)

    @property
    def unit(self) -> str:
        """Unit of thicknesses."""
        return self.bins.unit

    @property
    def layers(self) -> int:
        """Number of layers."""
        return self.count

    @property
    def physics(self) -> tuple[str, ...]:
        """Names of the physical fields."""
        return (*self.fields.names, *([_ELEVATION] if self.fields.elevation else []))

    @property
    def description(self) -> str:
        """What the traces are."""
        return "radar layer traces of the Snow Radar Echogram Dataset (SRED)"

    def paths(self) -> dict[str, list[Path]]:
        """Return the files of each part, sorted.

        Raises:
            DataError: A folder is not there or has no file, or a file is in two parts.
        """
        root = data_path(self.root)
        part_of: dict[Path, str] = {}
        for part in PARTS:
            for name in getattr(self.folders, part):
                folder = root / name
                is_there = folder.is_dir()
                paths = [path for _, path in list_files(folder, (".mat",))] if is_there else []
                if not paths:
                    problem = "has no .mat file" if is_there else "is not there"
                    raise DataError(
                        f"The folder {folder} {problem}.",
                        f"Set `{_OPTION}.root`, and `{_OPTION}.folders.{part}` to folders in "
                        "it (may be empty: []).",
                    )
                for path in paths:
                    if part_of.setdefault(path, part) != part:
                        raise DataError(
                            f"The file {path} is in the folders of {part_of[path]} and of {part}.",
                            f"Set `{_OPTION}.folders.train`, `val`, `test` to different folders.",
                        )
        if not part_of:
            raise DataError(
                "No folder of SRED is given.",
                f"Set `{_OPTION}.folders.train`, `val` or `test` to folders in `root`.",
            )
        return {part: sorted(p for p, its in part_of.items() if its == part) for part in PARTS}

    def load(self) -> Flights:
        """Return the stacks.

        Raises:
            DataError: A file is unusable and not to be left out, two are the same, or a flight
                segment is in several parts.
        """
        damaged: list[str] = []
        echograms: list[Echogram] = []
        names = self.fields.names
        if self.bins.time is not None and self.bins.density is None:
            names = tuple(dict.fromkeys((*names, _DENSITY)))
        for part, paths in self.paths().items():
            for path in paths:
                file = read_or_leave(
                    lambda path: read_sred(path, self.traces, names), path, self.exclude, damaged
                )
                if file is not None:
                    echograms.append(Echogram(file, part))
        excluded = report_unreadable(damaged)
        echograms = keep_each_once(echograms, excluded, "duplicate" in self.exclude)
        shared: frozenset[str] = frozenset()
        notes: list[str] = []
        if self.folders.split == "folders":
            echograms, shared = settle_shared(echograms, self.folders.shared, excluded, notes)
        stacks, part_of = self._stacks(echograms, excluded, notes)
        notes += describe_parts(echograms, self.count, self.folders.split == "folders")
        return Flights(
            stacks,
            self.physics,
            tuple(f"layer_{k:02}" for k in range(1, self.count + 1)),
            np.arange(1.0, self.count + 1),
            excluded,
            notes,
            self.thickest,
            OwnSplit(part_of, shared) if self.folders.split == "folders" else None,
        )

    def _stacks(
        self, echograms: Iterable[Echogram], excluded: list[Exclusion], notes: list[str]
    ) -> tuple[list[LayerStack], dict[str, str]]:
        """The stacks of files, and the part of each."""
        stacks: list[LayerStack] = []
        part_of: dict[str, str] = {}
        without_physics = crossed = repeated = deeper = 0
        for echogram in echograms:
            file = echogram.file
            try:
                physics, repeats = file.physics(
                    self.count, self.fields.first_row, self.fields.deeper == "repeat"
                )
            except DataError:
                if "physics" not in self.exclude:
                    raise
                without_physics += 1
                continue
            boundaries, pairs = remove_crossed(file.boundaries)
            if pairs and "crossed" not in self.exclude:
                raise DataError(
                    f"The layers_vector of {file.path} has {pairs} boundaries that do not lie "
                    "below the one above.",
                    "Give cumulative range bins that grow with depth, NaN where a boundary is "
                    f"missing, or remove both of each pair: `{_OPTION}.exclude+=crossed`.",
                )
            crossed += pairs
            repeated += repeats > 0
            deeper += file.boundaries.shape[1] > self.count + 1
            stacks.append(self._stack(file, boundaries, physics))
            part_of[file.path.stem] = echogram.part
        for kind, description, number in (
            ("physics", "files without finite physics of all layers", without_physics),
            ("crossed", "crossed boundaries", crossed),
        ):
            if number:
                excluded.append(Exclusion(kind, description, number))
        if repeated:
            notes.append(f"{repeated} stacks have the last row of physics in deeper layers")
        if deeper:
            notes.append(f"{deeper} stacks have more than {self.count + 1} boundaries")
        return stacks, part_of

    def _stack(self, file: SredFile, boundaries: Array, physics: NDArray[np.float32]) -> LayerStack:
        layers = self.count
        padded = np.full((self.traces, layers + 1), np.nan)
        available = min(layers + 1, boundaries.shape[1])
        padded[:, :available] = boundaries[:, :available]
        if self.bins.size is not None:
            padded = padded * self.bins.size
        thickness, spans = np.diff(padded, axis=1), Spans.of_depth(padded)
        if (time := self.bins.time) is not None:
            density = np.full(thickness.shape, self.bins.density)
            if self.bins.density is None:
                density = physics[..., list(file.fields).index(_DENSITY)] / np.float64(1_000.0)
            thickness = time_to_thickness(thickness * time, density)
            times = replace(spans, path=spans.path * time)
            spans = to_optical_lengths(times, density)
        used = [physics[..., list(file.fields).index(name)] for name in self.fields.names]
        if self.fields.elevation:
            used.append(np.broadcast_to(file.elevation[:, None], thickness.shape))
        fields = np.stack(used, -1) if used else np.zeros((*thickness.shape, 0))
        return LayerStack(
            file.path.stem,
            file.segment,
            thickness,
            fields.astype(np.float32),
            np.zeros(self.traces, np.uint8),
            file.pos,
            measure_track(file.pos),
            unit=self.unit,
            spans=spans,
        )
