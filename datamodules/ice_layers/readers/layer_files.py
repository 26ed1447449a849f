"""Layer files of CReSIS and the Open Polar Radar: CSARP_layer and the older CSARP_layerData.

Shapes: M traces, K boundaries (the surface first), L = K - 1 layers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from fulgurite.data.exclusions import Exclusion, check_exclude, name_some
from fulgurite.data.listing import match_files
from fulgurite.datamodules.ice_layers.climate.mar import MarClimate
from fulgurite.datamodules.ice_layers.flights import (
    FlightTrack,
    StackSource,
    read_or_leave,
    report_dropped_traces,
    report_unreadable,
)
from fulgurite.datamodules.ice_layers.readers.boundaries import (
    AgesFrom,
    Boundaries,
    find_boundaries,
    join_frames,
)
from fulgurite.datamodules.ice_layers.readers.layer_frames import (
    FRAME_NAME,
    Frame,
    read_frame,
    read_organizer,
)
from fulgurite.datamodules.ice_layers.readers.write_back import (
    SegmentFiles,
    Written,
    check_records,
    write_segment,
)
from fulgurite.datamodules.ice_layers.stack import (
    EXCLUDE,
    THICKEST,
    Array,
    Flights,
    check_thickest,
)
from fulgurite.datamodules.ice_layers.tracks.blocks import Blocks, assemble
from fulgurite.domains.ice_layers.details import FlightDetails
from fulgurite.errors import ConfigError, DataError
from fulgurite.options import check_options

__all__ = ["LayerFiles", "PickOptions", "SegmentSelection"]

_OPTION = "--data.init_args.source.init_args"
_Read = TypeVar("_Read")


@dataclass(frozen=True)
class PickOptions:
    """Which picks of layer files count, and how old layers are.

    Attributes:
        quality: Picks of a worse quality (1 good, 2 moderate, 3 derived) count as missing; None
            trusts all.
        ages: Source of the ages of layers: the companion ``files``, or ``yearly``, a year apart.

    Raises:
        ConfigError: A value is unknown.
    """

    quality: Literal[1, 2, 3] | None = None
    ages: AgesFrom = "files"

    def __post_init__(self) -> None:
        check_options(self, f"{_OPTION.removeprefix('--')}.picks")


@dataclass(frozen=True)
class SegmentSelection:
    """Which flight segments are read, and from where.

    Attributes:
        segments: Names of segments to use; all if None.
        prefer: Names of folders, the first one wins, where files of one segment are in several
            folders, such as ``CSARP_layer`` before ``CSARP_layer_old``.

    Raises:
        ConfigError: A value is no list of names.
    """

    segments: tuple[str, ...] | None = None
    prefer: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_options(self, f"{_OPTION.removeprefix('--')}.selection")


class LayerFiles(StackSource):
    """Stacks of picked layers in CSARP_layer (new) or CSARP_layerData (old) files.

    Frames of a segment are put together by time, boundaries by their number, in the companion
    file's order where there is one (see :func:`find_boundaries`); the first is the surface, and a
    boundary called ``bottom`` is left out. Without ages boundaries are taken to be a year apart. A
    file without layers is a track of which every layer is missing.

    Args:
        layers: Folders or glob patterns of ``Data_YYYYMMDD_SS_FFF.mat``, absolute or relative to
            ``FULGURITE_DATA``.
        climate: Source of the physical fields; null for none.
        count: L, number of layers to use, from the surface down; files with fewer lack the deeper
            ones. Null for all, if all files have the same.
        blocks: How tracks are cut into stacks, and the density of their layers.
        picks: Which picks count, and how old layers are.
        selection: Which segments are read, and which folder of several.
        exclude: What to leave out and count instead of stopping: files that are ``unreadable``
            (without its companion, the boundaries of a segment are in the order of their numbers
            and a year apart), stacks ``outside_climate``, files with another ``layer_count``.
        thickest: Largest plausible median of all observed thicknesses [m], above which they are
            taken to be in other units; more than a year's firn for layers of many years.

    Raises:
        ConfigError: An argument is out of range.

    Source: the toolbox's ``layerdata``, as docs/papers/ice_layers.md sections 3.2 and 3.3 have it.
    """

    def __init__(
        self,
        layers: list[str],
        climate: MarClimate | None = None,
        count: int | None = None,
        *,
        blocks: Blocks = Blocks(),
        picks: PickOptions = PickOptions(),
        selection: SegmentSelection = SegmentSelection(),
        exclude: list[str] = [],  # noqa: B006  # copied below
        thickest: float = THICKEST,
    ) -> None:
        self._segments: dict[str, SegmentFiles] = {}
        self._names: tuple[str, ...] = ()
        self.files = list(layers)
        self.climate = climate
        self.count = count
        self.blocks, self.picks, self.selection = blocks, picks, selection
        self.thickest = check_thickest(thickest)
        self.exclude = check_exclude(
            exclude, ("unreadable", "outside_climate", "layer_count"), EXCLUDE
        )

    @property
    def layers(self) -> int | None:
        """Number of layers, if ``count`` says it."""
        return self.count

    @property
    def physics(self) -> tuple[str, ...]:
        """Names of the physical fields."""
        return () if self.climate is None else self.climate.physics

    @property
    def climate_files(self) -> tuple[str, ...]:
        """Names of the files of the climate model."""
        return () if self.climate is None else tuple(path.name for path in self.climate.paths())

    @property
    def description(self) -> str:
        """What the traces are."""
        return "radar layer traces of CSARP_layer files"

    def paths(self) -> dict[str, list[Path]]:
        """Return the files of each segment, sorted.

        Raises:
            ConfigError: No file is in a folder that is preferred.
            DataError: There is no file, a named segment is not there, or a segment is in several
                folders of which none is preferred.
        """
        return {name: files for name, (files, _) in self._choose_files().items()}

    def _choose_files(self) -> dict[str, tuple[list[Path], int]]:
        """Files of each segment, sorted, and how many other folders have files of it."""
        files: dict[str, set[Path]] = {}
        for pattern in self.files:
            for path in match_files(pattern, (".mat",)):
                if match := FRAME_NAME.fullmatch(path.name):
                    files.setdefault(match[1], set()).add(path)
        if self.selection.segments is not None:
            if absent := sorted(set(self.selection.segments) - set(files)):
                raise DataError(
                    f"There is no flight segment {name_some(absent)} (there are "
                    f"{name_some(sorted(files)) or 'none'}).",
                    f"Set `{_OPTION}.selection.segments` to names of folders in CSARP_layer.",
                )
            files = {name: files[name] for name in self.selection.segments}
        if not files:
            raise DataError(
                f"There is no layer file Data_YYYYMMDD_SS_FFF.mat at {name_some(self.files)}.",
                f"Set `{_OPTION}.layers` to folders or glob patterns of such files.",
            )
        self._check_preferred(files.values())
        return {
            name: _choose_folder(name, paths, self.selection.prefer)
            for name, paths in sorted(files.items())
        }

    def _check_preferred(self, files: Iterable[Collection[Path]]) -> None:
        folders = {part for paths in files for path in paths for part in path.parent.parts}
        if unknown := [name for name in self.selection.prefer if name not in folders]:
            raise ConfigError(
                f"No layer file is in a folder called {unknown[0]!r}.",
                f"Set `{_OPTION}.selection.prefer` to folders of the files, such as CSARP_layer.",
            )

    def tracks(self) -> tuple[list[FlightTrack], tuple[str, ...], list[Exclusion], list[str]]:
        """Read all picks: tracks, names of the layers, what was left out, and notes.

        Raises:
            ConfigError: No file is in a folder that is preferred.
            DataError: Files are unusable, or have different numbers of layers.
        """
        read: dict[str, tuple[list[Frame], Boundaries]] = {}
        damaged: list[str] = []

        def usable(read_file: Callable[[Path], _Read], path: Path) -> _Read | None:
            return read_or_leave(read_file, path, self.exclude, damaged)

        not_preferred = 0
        used: dict[str, tuple[Path, ...]] = {}
        for segment, (paths, others) in self._choose_files().items():
            not_preferred += others
            tried = [
                usable(lambda path: read_frame(path, self.picks.quality), path) for path in paths
            ]
            frames = [frame for frame in tried if frame is not None]
            used[segment] = tuple(p for p, f in zip(paths, tried, strict=True) if f is not None)
            if frames:
                companion = paths[0].with_name(f"layer_{segment}.mat")
                organizer = usable(read_organizer, companion) if companion.is_file() else None
                read[segment] = frames, find_boundaries(segment, frames, organizer)
        excluded = report_unreadable(damaged)
        if not_preferred:
            description = "files of segments that a preferred folder has too"
            excluded.append(Exclusion("not_preferred", description, not_preferred))
        count, dropped = self._layer_count({name: b.layers for name, (_, b) in read.items()})
        if dropped:
            description = f"segments with another number of layers ({name_some(dropped)})"
            excluded.append(Exclusion("layer_count", description, len(dropped)))
        used_segments = {name: files for name, files in read.items() if name not in dropped}
        tracks, notes = [], []
        crossed = contradicting = 0
        lost = np.zeros(2, np.int64)
        for segment, (frames, boundaries) in used_segments.items():
            joined = join_frames(segment, frames, boundaries, count, ages=self.picks.ages)
            tracks.append(joined.track)
            crossed, lost = crossed + joined.crossed, lost + joined.lost
            contradicting += joined.contradicting
            if joined.misplaced:
                crossing = f"most picks of {name_some(joined.misplaced)} cross those of others"
                notes.append(f"{segment}: {crossing}, as if lyr_order were not that of depth")
            self._segments[segment] = SegmentFiles(
                used[segment], boundaries, count, self.picks.quality
            )
        excluded += report_dropped_traces(lost, crossed)
        if contradicting:
            description = "picks that differ from those of an overlapping file before"
            excluded.append(Exclusion("contradicting", description, contradicting))
        self._names = _longest_names(used_segments, count)
        for track, (_, boundaries) in zip(tracks, used_segments.values(), strict=True):
            names = boundaries.layer_names(count)[: boundaries.layers]
            track.names = (*names, *self._names[len(names) :])
        return tracks, self._names, excluded, [*notes, *_notes(used_segments, tracks, count)]

    def check_write_back(
        self, folder: Path, records: Mapping[str, Sequence[FlightDetails]]
    ) -> None:
        """Refuse to write layer files where they would not be of use, or in place of those read.

        Args:
            folder: Folder to write to.
            records: Records of the stacks of each segment.

        Raises:
            ConfigError: Files that were read are in this folder.
            DataError: Times of traces repeat.
        """
        for segment, its_records in records.items():
            check_records(segment, its_records)
            read = {path.resolve().parent for path in self._segments[segment].paths}
            if (Path(folder) / segment).resolve() in read:
                raise ConfigError(
                    f"The layer files in {folder} are those that are read.",
                    "Write to another folder: `--trainer.callbacks.folder`, or `--run.dir`.",
                )

    def write_back(
        self, folder: Path, segment: str, stacks: Sequence[tuple[FlightDetails, Array]]
    ) -> Written:
        """Write the files of a segment again, with completed boundaries.

        Args:
            folder: Folder to write to.
            segment: Name of the segment.
            stacks: Record of each completed stack, and the times of its boundaries below the
                surface (N, K) [s], NaN where they are unknown.

        Raises:
            DataError: A file has changed and cannot be read.
        """
        return write_segment(folder, segment, self._segments[segment], stacks, names=self._names)

    def _layer_count(self, counts: dict[str, int]) -> tuple[int, set[str]]:
        """Number of layers, and segments that do not have it and are to be left out."""
        if self.count is not None:
            if self.count < 1:
                raise DataError(
                    f"The number of layers is {self.count}.", f"Set `{_OPTION}.count` to 1 or more."
                )
            return self.count, set()
        if not counts:
            return 1, set()
        counts = {name: layers for name, layers in counts.items() if layers}
        if not counts:
            raise DataError(
                "The layer files have no layer: one boundary encloses none.",
                f"Set `{_OPTION}.layers` to files with internal layers; to complete flights "
                f"without any, set `{_OPTION}.count` to the number of the trained network.",
            )
        values = list(counts.values())
        usual = max(sorted(set(values)), key=values.count)
        other = {name for name, layers in counts.items() if layers != usual}
        if other and "layer_count" not in self.exclude:
            name = sorted(other)[0]
            same = next(n for n, layers in counts.items() if layers == usual)
            raise DataError(
                f"The segment {name} has {counts[name]} layers, {same} has {usual}.",
                f"Set `{_OPTION}.count` to the number to use, or leave such segments out: "
                f"`{_OPTION}.exclude+=layer_count`.",
            )
        return usual, other

    def load(self) -> Flights:
        """Return the stacks.

        Raises:
            DataError: Files are missing or damaged and not to be left out.
            MissingExtraError: h5py, netCDF4 or pyproj is not installed.
        """
        return self.assemble(*self.tracks())

    def assemble(
        self,
        tracks: Sequence[FlightTrack],
        names: Sequence[str],
        excluded: Sequence[Exclusion] = (),
        notes: Sequence[str] = (),
    ) -> Flights:
        """Cut tracks into stacks, with the climate of this source."""
        return assemble(
            tracks,
            self.climate,
            self.blocks,
            layer_names=names,
            exclude=sorted(self.exclude),
            excluded=excluded,
            notes=notes,
            thickest=self.thickest,
        )


def _choose_folder(
    segment: str, paths: Collection[Path], prefer: Sequence[str]
) -> tuple[list[Path], int]:
    """Choose the folder of a segment's files.

    Args:
        segment: Name of the segment.
        paths: All files of that name; links to one file count once.
        prefer: Names of folders, the first one wins.

    Returns:
        The files, sorted, and the number of files in other folders.

    Raises:
        DataError: There are several folders, of which none is preferred.
    """
    files = sorted({path.resolve(): path for path in sorted(paths, reverse=True)}.values())

    def rank(path: Path) -> int:
        return min([k for k, name in enumerate(prefer) if name in path.parts], default=len(prefer))

    best = min(map(rank, files))
    preferred = [path for path in files if rank(path) == best]
    folders = sorted({path.parent for path in preferred})
    if len(folders) > 1:
        first, second = (next(p for p in preferred if p.parent == folder) for folder in folders[:2])
        raise DataError(
            f"Two folders have layer files of the segment {segment}: {first} and {second}.",
            f"Name one of them in `{_OPTION}.layers`, or say which wins by a part of its path: "
            f"`{_OPTION}.selection.prefer=[{_distinct_part(first, second)}]`.",
        )
    return preferred, len(files) - len(preferred)


def _distinct_part(first: Path, second: Path) -> str:
    """A part of the first path that the second has not."""
    parts = [part for part in first.parent.parts if part not in second.parts]
    return parts[0] if parts else first.parent.name


def _longest_names(read: dict[str, tuple[list[Frame], Boundaries]], count: int) -> tuple[str, ...]:
    """Names of the layers in the first segment that has all of them, else in the one with most."""
    boundaries = [boundaries for _, boundaries in read.values()]
    if not boundaries:
        return tuple(f"layer_{k:02}" for k in range(1, count + 1))
    return max(boundaries, key=lambda b: min(b.layers, count)).layer_names(count)


def _notes(
    read: dict[str, tuple[list[Frame], Boundaries]], tracks: Sequence[FlightTrack], count: int
) -> list[str]:
    """What is to be said of the boundaries of all segments."""
    notes = [note for _, boundaries in read.values() for note in boundaries.notes]
    uneven = sum(
        not set(boundaries.ids[: count + 1]) <= set(frame.ids)
        for frames, boundaries in read.values()
        for frame in frames
    )
    if uneven:
        notes.append(f"{uneven} files lack layers that others of their segment have: absent")
    if fewer := sum(boundaries.layers < count for _, boundaries in read.values()):
        notes.append(f"{fewer} segments have fewer than {count} layers: the others are absent")
    if any(not np.array_equal(t.age, tracks[0].age) for t in tracks):
        notes.append("segments differ in the ages of layers")
    if any(t.names != tracks[0].names for t in tracks):
        notes.append("segments differ in the names of layers")
    return notes
