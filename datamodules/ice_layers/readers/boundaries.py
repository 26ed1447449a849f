"""Which boundaries a flight segment has, in which order and how old, and its frames as one track.

Shapes: M traces, K boundaries (the surface first), L = K - 1 layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fulgurite.datamodules.ice_layers.flights import FlightTrack, order_traces
from fulgurite.datamodules.ice_layers.readers.layer_frames import Frame, Organizer
from fulgurite.datamodules.ice_layers.stack import Array
from fulgurite.datamodules.ice_layers.tracks.travel_time import remove_crossed
from fulgurite.domains.ice_layers.details import FlightDetails
from fulgurite.errors import DataError

__all__ = ["AgesFrom", "Boundaries", "JoinedTrack", "find_boundaries", "join_frames"]

#: Where ages of layers come from: companion files, or a year for each layer.
AgesFrom = Literal["files", "yearly"]

_OPTION = "--data.init_args.source.init_args"
_SURFACE, _SECOND = 1, 2  # numbers that the toolbox keeps for surface and bottom
_SAME_PICK = 1e-12  # [s]


@dataclass(frozen=True)
class Boundaries:
    """The boundaries of a segment.

    Attributes:
        ids: Numbers of the boundaries from the surface down. Shape: (K,).
        names: Number of a boundary -> its name.
        organizer: The companion file, where there is one.
        notes: Decisions about them, for the report.
    """

    ids: tuple[int, ...]
    names: dict[int, str]
    organizer: Organizer | None
    notes: tuple[str, ...] = ()

    @property
    def layers(self) -> int:
        """Number of layers, 0 where the files hold no boundary."""
        return max(0, len(self.ids) - 1)

    def layer_names(self, count: int) -> tuple[str, ...]:
        """Names of the first ``count`` layers: a layer is called like its lower boundary."""
        named = [self.names.get(k, "") or f"layer_{i:02}" for i, k in enumerate(self.ids[1:], 1)]
        return (*named[:count], *(f"layer_{i:02}" for i in range(len(named) + 1, count + 1)))

    def describe_ages(self, count: int, source: AgesFrom) -> str:
        """Say where the ages that :meth:`layer_ages` gives come from."""
        ages = self.organizer.age if self.organizer is not None and source == "files" else {}
        dated = sum(k in ages for k in self.ids[1 : count + 1])
        if not dated:
            return "layers are taken to be a year apart, whatever they are"
        below = f" down to layer {dated}, a year apart below" if dated < count else ""
        return f"of the companion file{below}"

    def layer_ages(self, count: int, source: AgesFrom) -> NDArray[np.float64]:
        """Return the ages of the lower boundaries of the first ``count`` layers [years].

        A year apart where the companion file has no age of any of them, and below the last one.

        Raises:
            DataError: The companion file has ages of some layers alone, or they do not rise with
                depth, or do not begin at the surface.
        """
        age = np.arange(1, count + 1, dtype=np.float64)
        if self.organizer is None or source == "yearly":
            return age
        ids = self.ids[1 : count + 1]
        ages = np.array([self.organizer.age.get(k, np.nan) for k in ids])
        if not np.isfinite(ages).any():
            return age
        if surface := self.organizer.age.get(self.ids[0], 0.0):
            raise DataError(
                f"The surface is {surface:g} years old by lyr_age in {self.organizer.path}, so "
                "that ages do not count from the flight.",
                "Give ages at the flight, with 0 or NaN for the surface, or set "
                f"`{_OPTION}.picks.ages=yearly` to take layers a year apart.",
            )
        hint = f"Correct lyr_age, or set `{_OPTION}.picks.ages=yearly` to take layers a year apart."
        if not np.isfinite(ages).all():
            unknown = ids[int(np.flatnonzero(~np.isfinite(ages))[0])]
            raise DataError(
                f"The companion file {self.organizer.path} has no age of the boundary "
                f"{self.names.get(unknown) or unknown}, but of others.",
                hint,
            )
        if (np.diff(ages, prepend=0.0) <= 0).any():
            raise DataError(
                f"The ages lyr_age in {self.organizer.path} do not rise with depth "
                f"({', '.join(f'{a:g}' for a in ages[:12])}).",
                hint,
            )
        age[: len(ages)] = ages
        age[len(ages) :] = ages[-1] + np.arange(1, count - len(ages) + 1)
        return age


class JoinedTrack(NamedTuple):
    """The frames of a segment as one track.

    Attributes:
        track: The track.
        crossed: Number of crossed pairs of picks.
        lost: Traces without position or time, and traces that come twice. Shape: (2,).
        contradicting: Picks of a trace that is in two files, and has another pick in the second.
        misplaced: Names of boundaries of which most picks are crossed.
    """

    track: FlightTrack
    crossed: int
    lost: NDArray[np.int64]
    contradicting: int
    misplaced: tuple[str, ...]


def find_boundaries(
    segment: str, frames: Sequence[Frame], organizer: Organizer | None
) -> Boundaries:
    """Find the boundaries of a segment, from the surface down.

    Those of the companion file are there in its order, also one that no file has, as long as a
    deeper one is there: its layer is missing, and the others stay what they are. Boundaries that it
    does not list come last, by their numbers. A boundary called ``bottom`` is left out; so is the
    second one without a name, if it is empty or deeper than all others.

    Args:
        segment: Name of the segment.
        frames: Frames of the segment.
        organizer: The companion file.

    Raises:
        DataError: There is no surface, or one that is called so is not the first.

    Source: the toolbox's ``layerdata``, whose boundaries 1 and 2 are surface and bottom; that one
    above others cannot be the bottom is inferred.
    """
    present = {k for frame in frames for k in frame.ids}
    names = dict(organizer.names) if organizer else {}
    for frame in frames:
        if frame.names is not None:
            names |= {k: n for k, n in zip(frame.ids, frame.names, strict=True) if n}
    bottom = {k for k in names if names[k].lower() == "bottom"}
    notes = []
    if _is_unnamed_bottom(frames, names):
        bottom.add(_SECOND)
        notes.append("the second boundary, which has no name, is taken for the bottom")
    present -= bottom
    listed = [k for k in (organizer.order if organizer else ()) if k not in bottom]
    while listed and listed[-1] not in present:
        listed.pop()
    if absent := [names.get(k) or str(k) for k in listed if k not in present]:
        notes.append(f"no file has the boundary {', '.join(absent)}, which the companion lists")
    ids = (*listed, *sorted(present - set(listed)))
    _check_surface(segment, ids, names)
    return Boundaries(ids, names, organizer, tuple(f"{segment}: {note}" for note in notes))


def _check_surface(segment: str, ids: Sequence[int], names: dict[int, str]) -> None:
    """Refuse a segment without a surface, or with a boundary of this name below another one.

    Raises:
        DataError: The first boundary is not the surface, or a deeper one is called so.
    """
    called = [k for k, name in names.items() if name.strip().lower() == "surface"]
    if ids and ids[0] != _SURFACE and not called:
        raise DataError(
            f"No file of the segment {segment} has the boundary {_SURFACE}, the surface, and no "
            "companion file names another one so.",
            f"Put layer_{segment}.mat beside the files, in which one is called surface, or give "
            f"it the number {_SURFACE}.",
        )
    if ids and (below := [k for k in called if k != ids[0]]):
        first = names.get(ids[0]) or str(ids[0])
        raise DataError(
            f"The boundary {below[0]} of the segment {segment} is called surface, and the first "
            f"one is {first}.",
            f"Correct lyr_order or lyr_name in layer_{segment}.mat.",
        )


def _is_unnamed_bottom(frames: Sequence[Frame], names: dict[int, str]) -> bool:
    """Whether the second boundary has no name, and is empty or deeper than all others."""
    if names.get(_SECOND) or not any(_SECOND in frame.ids for frame in frames):
        return False
    depths: dict[int, float] = {}
    for k in {k for frame in frames for k in frame.ids}:
        picks = [f.twtt[:, f.ids.index(k)] for f in frames if k in f.ids]
        finite = np.concatenate(picks)
        finite = finite[np.isfinite(finite)]
        if finite.size:
            depths[k] = float(np.median(finite))
    if _SECOND not in depths:
        return True
    others = [depth for k, depth in depths.items() if k not in (_SURFACE, _SECOND)]
    return bool(others) and depths[_SECOND] > max(others)


def join_frames(
    segment: str, frames: Sequence[Frame], boundaries: Boundaries, count: int, *, ages: AgesFrom
) -> JoinedTrack:
    """Put the frames of a segment together.

    Args:
        segment: Name of the segment.
        frames: Frames of the segment, in the order of their names.
        boundaries: Boundaries of the segment.
        count: L, number of layers to use, from the surface down.
        ages: Where ages of the layers come from.

    Raises:
        DataError: Ages are unusable, or most picks cross.
    """
    column = {k: i for i, k in enumerate(boundaries.ids[: count + 1])}
    parts: list[Array] = []
    for frame in frames:
        twtt = np.full((len(frame.time), count + 1), np.nan)
        for k, picks in zip(frame.ids, frame.twtt.T, strict=True):
            if k in column:
                twtt[:, column[k]] = picks
        parts.append(twtt)
    is_first, contradicting = _join_overlaps(frames, parts)
    time = np.concatenate([f.time[keep] for f, keep in zip(frames, is_first, strict=True)])
    pos = np.concatenate([f.pos[keep] for f, keep in zip(frames, is_first, strict=True)])
    twtt = np.concatenate([part[keep] for part, keep in zip(parts, is_first, strict=True)])
    traces, pos, lost = order_traces(time, pos)
    lost[1] += sum(int((~keep).sum()) for keep in is_first)
    picks, crossed = remove_crossed(twtt[traces])
    count_before, count_after = (int(np.isfinite(p).sum()) for p in (twtt[traces], picks))
    if 2 * count_after < count_before:
        raise DataError(
            f"{count_before - count_after} of {count_before} picks of the segment {segment} lie "
            "on the wrong side of a neighbour: its boundaries are not in the order of depth.",
            f"Correct lyr_order in layer_{segment}.mat, or the numbers `id` of the files, or name "
            f"the other segments alone: `{_OPTION}.selection.segments`.",
        )
    age = boundaries.layer_ages(count, ages)
    record = _describe_traces(frames, is_first, traces)
    record = replace(record, time=time[traces], time_scale="GPS", surface=picks[:, 0])
    track = FlightTrack(
        segment, time[traces], pos, picks, age, record=record,
        age_source=boundaries.describe_ages(count, ages),
    )  # fmt: skip
    counts = [np.isfinite(p).sum(0) for p in (twtt[traces], picks)]
    misplaced = [boundaries.ids[k] for k in np.flatnonzero(2 * counts[1] < counts[0])]
    names = tuple(boundaries.names.get(k) or str(k) for k in misplaced)
    return JoinedTrack(track, crossed, lost, contradicting, names)


def _describe_traces(
    frames: Sequence[Frame], is_first: Sequence[NDArray[np.bool_]], traces: NDArray[np.int64]
) -> FlightDetails:
    """What frames say of the traces that are used, in their order.

    Args:
        frames: Frames of a segment.
        is_first: For each frame, which of its traces are in no frame before it.
        traces: Numbers of the used traces among these.
    """
    numbers, rows, heights = [], [], []
    for number, (frame, keep) in enumerate(zip(frames, is_first, strict=True)):
        row = np.flatnonzero(keep)
        numbers.append(np.full(len(row), number))
        rows.append(row + 1)
        height = np.full(len(keep), np.nan) if frame.elevation is None else frame.elevation
        heights.append(height[row])
    return FlightDetails(
        elevation=np.concatenate(heights)[traces],
        frame=np.array([frame.name for frame in frames])[np.concatenate(numbers)[traces]],
        trace=np.concatenate(rows)[traces],
    )


def _join_overlaps(
    frames: Sequence[Frame], picks: Sequence[Array]
) -> tuple[list[NDArray[np.bool_]], int]:
    """Give traces that are in two files, or twice in one, the picks of both; the first's win.

    A trace is known by its time, whatever solution of navigation its position is from; in files
    whose times repeat (of whole seconds), by time and position.

    Args:
        frames: The files.
        picks: Picks of each file (M, K) [s]; those of first traces are filled in place.

    Returns:
        For each file, which traces do not come before (M,); and the number of picks that
        contradict each other.
    """
    contradicting = 0
    sources: dict[float, tuple[int, int]] = {}
    is_first = []
    for number, frame in enumerate(frames):
        keep = np.ones(len(frame.time), np.bool_)
        pairs = [((number, first), again) for first, again in _find_repeated(frame)]
        keep[[again for _, again in pairs]] = False
        timed = np.flatnonzero(keep & np.isfinite(frame.time))  # others are left out later
        moments = frame.time[timed]
        if len(np.unique(moments)) == len(timed):
            for trace, moment in zip(timed.tolist(), moments.tolist(), strict=True):
                source = sources.setdefault(moment, (number, trace))
                if source[0] != number:
                    keep[trace] = False
                    pairs.append((source, trace))
        for (file, row), trace in pairs:
            first, second = picks[file][row], picks[number][trace]
            overlap = np.isfinite(first) & np.isfinite(second)
            contradicting += int((np.abs(first - second)[overlap] > _SAME_PICK).sum())
            picks[file][row] = np.where(np.isfinite(first), first, second)
        is_first.append(keep)
    return is_first, contradicting


def _find_repeated(frame: Frame) -> list[tuple[int, int]]:
    """Find traces of a file that come again at one time and place: the first, and another one."""
    rows = np.column_stack([frame.time, frame.pos])
    usable = np.flatnonzero(np.isfinite(rows).all(1))
    _, first, group = np.unique(rows[usable], axis=0, return_index=True, return_inverse=True)
    first_of = usable[first[group.ravel()]]
    again = first_of != usable
    return list(zip(first_of[again].tolist(), usable[again].tolist(), strict=True))
