"""Completed boundaries written back as CSARP_layer files, at the traces of the files read.

Shapes: M raw traces of a frame, N traces of a stack, K boundaries (the surface first).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fulgurite.datamodules.ice_layers.readers.boundaries import Boundaries
from fulgurite.datamodules.ice_layers.readers.layer_frames import Frame, read_frame, read_mat
from fulgurite.datamodules.ice_layers.tracks.resample import Array
from fulgurite.datamodules.ice_layers.tracks.travel_time import remove_crossed
from fulgurite.domains.ice_layers.details import FlightDetails
from fulgurite.errors import DataError
from fulgurite.io import atomic_write

__all__ = ["SegmentFiles", "Written", "anchor_times", "check_records", "write_segment"]

_AUTOMATIC, _DERIVED = 2, 3  # type of a pick that nobody made, quality of one that is inferred
_GOOD = 1
_LAST_KEPT = 2  # the toolbox keeps the numbers 1 and 2 for surface and bottom
_ADJACENT = 1.5  # steps between the last trace of a stack and the first of the next one


@dataclass(frozen=True)
class SegmentFiles:
    """The files of a segment that were read.

    Attributes:
        paths: Files of the frames.
        boundaries: Boundaries of the segment.
        count: L, number of layers that are used.
        quality: Picks of a worse quality count as missing; None trusts all.
    """

    paths: tuple[Path, ...]
    boundaries: Boundaries
    count: int
    quality: int | None = None


@dataclass(frozen=True)
class Written:
    """Counts of what was written.

    Attributes:
        frames: Number of files.
        filled: Entries that have a value and had none.
        crossing: Entries that would cross a pick of the file, and have none.
        without_surface: Traces within stacks at which the surface is not picked, so that no travel
            time is known.
    """

    frames: int = 0
    filled: int = 0
    crossing: int = 0
    without_surface: int = 0

    def __add__(self, other: Written) -> Written:
        """Add the counts of two."""
        return Written(*(a + b for a, b in zip(self._counts(), other._counts(), strict=True)))

    def _counts(self) -> tuple[int, ...]:
        return self.frames, self.filled, self.crossing, self.without_surface

    def report(self, segments: int, folder: Path) -> str:
        """Report the counts in one line."""
        parts = [
            f"{self.frames} frames of {segments} segments written to {folder}, "
            f"{self.filled} picks added"
        ]
        if self.crossing:
            parts.append(f"{self.crossing} left out that would cross a pick of the file")
        if self.without_surface:
            parts.append(
                f"{self.without_surface} traces without a picked surface left as they were"
            )
        return "; ".join(parts)


def anchor_times(completed: Array, picked: Array) -> Array:
    """Boundaries where they were picked, and completed ones between and below these.

    A completed boundary between two picked ones divides the time between these as it does in the
    completed stack; below the last picked one it keeps its distance from that one.

    Args:
        completed: Time of each boundary below the surface in the completed stack, rising, NaN
            where it is unknown. Shape: (M, K).
        picked: Time of each boundary below the surface where it was picked, NaN elsewhere.
            Shape: (M, K).

    Returns:
        NaN where neither is known. Shape: (M, K).

    Source: inferred.

    Example:
        >>> completed = np.array([[0.0, 1.0, 2.0, 3.0]])
        >>> anchor_times(completed, np.array([[0.0, np.nan, 3.0, np.nan]]))
        array([[0. , 1.5, 3. , 4. ]])
    """
    rows, count = np.arange(len(completed))[:, None], completed.shape[1]
    usable = np.isfinite(completed) & np.isfinite(picked)
    numbers = np.where(usable, np.arange(count), -1)
    above = np.maximum.accumulate(numbers, axis=1)
    below = np.where(usable, np.arange(count), count)[:, ::-1]
    below = np.minimum.accumulate(below, axis=1)[:, ::-1]
    first, last = np.maximum(above, 0), np.minimum(below, count - 1)
    offset = completed - completed[rows, first]
    span = completed[rows, last] - completed[rows, first]
    measured = picked[rows, last] - picked[rows, first]
    factor = np.where((below < count) & (span > 0), measured / np.where(span > 0, span, 1.0), 1.0)
    anchored = np.where(above >= 0, picked[rows, first] + offset * factor, np.nan)
    return np.where(np.isfinite(picked), picked, anchored)


def check_records(segment: str, records: Sequence[FlightDetails | None]) -> None:
    """Refuse a segment whose stacks cannot be found in its files again.

    Args:
        segment: Name of the segment.
        records: Records of its stacks.

    Raises:
        DataError: Times repeat, or are not known.
    """
    for record in records:
        if record is None or record.time is None or (np.diff(record.time) <= 0).any():
            raise DataError(
                f"Times of traces of the segment {segment} repeat, so that completed layers cannot "
                "be brought back to its traces.",
                "Correct gps_time, or leave out the layer files: "
                "`--trainer.callbacks.csarp_layer=false`.",
            )


class _Completed:
    """Completed stacks of a segment, interpolated at times.

    Args:
        stacks: Record of each stack and the times of its boundaries below the surface (N, K) [s].
    """

    def __init__(self, stacks: Sequence[tuple[FlightDetails, Array]]) -> None:
        self.runs: list[tuple[Array, Array, NDArray[np.bool_]]] = []
        runs: dict[int, list[tuple[Array, FlightDetails, Array]]] = {}
        for details, times in stacks:
            assert details.run is not None
            assert details.flight_distance is not None
            runs.setdefault(details.run, []).append((details.flight_distance, details, times))
        for _, run_stacks in sorted(runs.items()):
            run_stacks.sort(key=lambda stack: float(stack[0][0]))
            distance = np.concatenate([along for along, _, _ in run_stacks])
            steps = np.diff(distance)
            time = np.concatenate([d.time for _, d, _ in run_stacks if d.time is not None])
            self.runs.append(
                (
                    time,
                    np.concatenate([times for _, _, times in run_stacks]),
                    steps <= _ADJACENT * np.median(steps),
                )
            )

    def at(self, time: Array, count: int) -> tuple[Array, NDArray[np.bool_]]:
        """Times below the surface at raw traces [s], and which of them lie within a stack.

        Linear between neighbouring traces of one run; nothing is extrapolated.

        Shape: (M,) to (M, count) and (M,).
        """
        at_traces, inside = np.full((len(time), count), np.nan), np.zeros(len(time), np.bool_)
        for moments, times, is_joined in self.runs:
            within = (time >= moments[0]) & (time <= moments[-1])
            rows = np.flatnonzero(within)
            before = np.clip(np.searchsorted(moments, time[rows], side="right") - 1, 0, None)
            before = np.minimum(before, len(moments) - 2)
            weight = (time[rows] - moments[before]) / (moments[before + 1] - moments[before])
            on_trace = (weight <= 0) | (weight >= 1)
            usable = is_joined[before] | on_trace
            rows, before, weight = rows[usable], before[usable], weight[usable][:, None]
            a, b = times[before], times[before + 1]
            between = (1 - weight) * a + weight * b
            at_traces[rows] = np.where(weight <= 0, a, np.where(weight >= 1, b, between))
            inside[rows] = True
        return at_traces, inside


def write_segment(
    folder: Path,
    segment: str,
    files: SegmentFiles,
    stacks: Sequence[tuple[FlightDetails, Array]],
    *,
    names: Sequence[str],
) -> Written:
    """Write the frames of a segment and its companion file, with completed boundaries.

    What was picked stays what it was, to the bit. Completed boundaries are of type 2 (automatic)
    and quality 3 (derived).

    Args:
        folder: Folder to write to; files go to a folder of the segment's name in it.
        segment: Name of the segment.
        files: The files that were read.
        stacks: Record of each completed stack and the times of its boundaries below the surface
            (N, K) [s], NaN where they are unknown.
        names: Names of the L layers.

    Raises:
        DataError: A file has changed and cannot be read.

    Source: the toolbox's ``layerdata``, as docs/papers/ice_layers.md section 3.2 has it.
    """
    completed = _Completed(stacks)
    frames = [read_frame(path) for path in files.paths]
    ids = _boundary_ids(files, frames)
    segment_folder, written, used = Path(folder) / segment, Written(), set()
    for path, frame in zip(files.paths, frames, strict=True):
        content, counts = _complete_frame(frame, completed, ids, files)
        used |= set(content["id"].ravel().astype(int).tolist())
        content["param"] = _read_parameters(path, segment)
        _save(segment_folder / path.name, content)
        written += counts
    named = dict(zip(ids[1:], names, strict=False))
    _save(
        segment_folder / f"layer_{segment}.mat",
        _organizer_content(segment, files, ids, used, names=named),
    )
    return written


def _boundary_ids(files: SegmentFiles, frames: Sequence[Frame]) -> tuple[int, ...]:
    """Number of each of the K boundaries; those that the files do not know get new ones."""
    ids = files.boundaries.ids[: files.count + 1]
    if not ids:
        return ()
    organizer = files.boundaries.organizer
    every = {k for frame in frames for k in frame.ids} | set(organizer.names if organizer else ())
    first = max(every | {_LAST_KEPT}) + 1
    return (*ids, *range(first, first + files.count + 1 - len(ids)))


def _complete_frame(
    frame: Frame, completed: _Completed, ids: Sequence[int], files: SegmentFiles
) -> tuple[dict[str, Any], Written]:
    """The variables of a frame with completed boundaries, and what was filled."""
    column = {k: i for i, k in enumerate(frame.ids)}
    original = np.full((len(frame.time), len(ids)), np.nan)
    trusted = original.copy()
    for i, k in enumerate(ids):
        if k in column:
            original[:, i] = frame.twtt[:, column[k]]
            is_good = files.quality is None or frame.grades[:, column[k]] <= files.quality
            trusted[:, i] = np.where(is_good, original[:, i], np.nan)
    filled, counts = np.full(original.shape, np.nan), Written(frames=1)
    if len(ids):
        trusted, _ = remove_crossed(trusted)
        surface = trusted[:, :1]
        times, inside = completed.at(frame.time, len(ids))
        anchored = surface + anchor_times(times, trusted - surface)
        anchored[np.isfinite(original) | ~inside[:, None]] = np.nan
        crossing = np.isfinite(anchored) & _crosses(anchored, original)
        filled = np.where(crossing, np.nan, anchored)
        unknown = inside & np.isnan(surface[:, 0])
        added = int(np.isfinite(filled).sum())
        counts = Written(1, added, int(crossing.sum()), int(unknown.sum()))
    return _frame_content(frame, ids, filled), counts


def _crosses(anchored: Array, picks: Array) -> NDArray[np.bool_]:
    """Whether a boundary lies on or beyond a pick of one above or below. Shape: (M, K)."""
    low = np.maximum.accumulate(np.where(np.isfinite(picks), picks, -np.inf), axis=1)
    high = np.where(np.isfinite(picks), picks, np.inf)[:, ::-1]
    high = np.minimum.accumulate(high, axis=1)[:, ::-1]
    return (anchored <= low) | (anchored >= high)


def _frame_content(frame: Frame, ids: Sequence[int], filled: Array) -> dict[str, Any]:
    """Variables of a layer file, as MATLAB shows them (K, M)."""
    added = [i for i, k in enumerate(ids) if k not in frame.ids and np.isfinite(filled[:, i]).any()]
    rows = [*frame.ids, *(ids[i] for i in added)]
    shape = (len(frame.time), len(added))
    twtt = np.concatenate([frame.twtt, np.full(shape, np.nan)], 1)
    grade = np.concatenate([frame.grades, np.full(shape, _GOOD)], 1)
    kind = np.concatenate([frame.kinds, np.full(shape, _AUTOMATIC)], 1)
    number = {k: i for i, k in enumerate(ids)}
    for column, k in enumerate(rows):
        if k in number:
            values = filled[:, number[k]]
            new = np.isfinite(values)
            twtt[new, column] = values[new]
            grade[new, column], kind[new, column] = _DERIVED, _AUTOMATIC
    elevation = np.full(len(frame.time), np.nan) if frame.elevation is None else frame.elevation
    return {
        "elev": elevation[None],
        "file_type": "layer",
        "file_version": "1",
        "gps_time": frame.time[None],
        "id": np.array(rows, np.float64)[None] if rows else np.zeros((0, 0)),
        "lat": frame.pos[:, 0][None],
        "lon": frame.pos[:, 1][None],
        "quality": grade.T.astype(np.uint8),
        "twtt": twtt.T,
        "type": kind.T.astype(np.uint8),
    }


def _read_parameters(path: Path, segment: str) -> dict[str, Any]:
    """What a file says of radar and season, and what the toolbox needs of it."""
    param = read_mat(path).get("param")
    parameters: dict[str, Any] = {"day_seg": segment}
    if isinstance(param, Mapping):
        texts = {name: param.get(name) for name in ("radar_name", "season_name")}
        parameters |= {name: text for name, text in texts.items() if isinstance(text, str)}
        offset: Any = param
        for name in ("records", "gps", "time_offset"):
            offset = offset.get(name) if isinstance(offset, Mapping) else None
        if isinstance(offset, np.ndarray | float | int) and np.size(offset) == 1:
            parameters["records"] = {"gps": {"time_offset": float(np.ravel(offset)[0])}}
    return parameters


def _organizer_content(
    segment: str,
    files: SegmentFiles,
    ids: Sequence[int],
    used: set[int],
    *,
    names: Mapping[int, str],
) -> dict[str, Any]:
    """Variables of the companion file: the boundaries of the segment's own, and new ones."""
    boundaries, organizer = files.boundaries, files.boundaries.organizer
    listed = list(organizer.names) if organizer else []
    every = [*listed, *sorted(used - set(listed))]
    ordered = [k for k in (organizer.order if organizer else ()) if k in every]
    ordered += [k for k in (*ids, *every) if k in every and k not in ordered]
    ordered = list(dict.fromkeys(ordered))
    name_of = {k: f"layer_{k}" for k in every} | dict(names) | ({ids[0]: "surface"} if ids else {})
    if _LAST_KEPT not in boundaries.ids:  # the reader has taken it for the bottom
        name_of[_LAST_KEPT] = "bottom"
    name_of |= {k: name for k, name in boundaries.names.items() if name or k in listed}
    content = read_mat(organizer.path) if organizer else {}
    age = organizer.age if organizer else {}
    return {
        "file_type": "layer_organizer",
        "file_version": "1",
        "lyr_age": np.array([[age.get(k, np.nan) for k in every]]),
        "lyr_age_source": _to_cells([""] * len(every)),
        "lyr_desc": _to_cells(_read_texts(content, "lyr_desc", len(listed), len(every))),
        "lyr_group_name": _to_cells(
            _read_texts(content, "lyr_group_name", len(listed), len(every))
        ),
        "lyr_id": np.array([every], np.float64),
        "lyr_name": _to_cells([name_of[k] for k in every]),
        "lyr_order": np.array([[ordered.index(k) + 1.0 for k in every]]),
        "param": _read_parameters(organizer.path, segment) if organizer else {"day_seg": segment},
    }


def _read_texts(content: Mapping[str, Any], name: str, count: int, total: int) -> list[str]:
    """A text for each boundary: what the companion file has, and nothing for new ones."""
    values = content.get(name)
    texts = values if isinstance(values, list) and len(values) == count else [""] * count
    return [v if isinstance(v, str) else "" for v in texts] + [""] * (total - count)


def _to_cells(texts: Sequence[str]) -> NDArray[np.object_]:
    cells = np.empty((1, len(texts)), object)
    cells[0] = texts
    return cells


def _save(path: Path, content: Mapping[str, Any]) -> None:
    """Write a MATLAB file of version 5, whole or not at all."""
    from scipy.io import savemat

    with atomic_write(path) as temporary:
        savemat(
            temporary, dict(sorted(content.items())), appendmat=False, do_compression=True,
            long_field_names=True,
        )  # fmt: skip
