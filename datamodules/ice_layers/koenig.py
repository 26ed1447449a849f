"""Picks of Koenig et al. (2016): text tables of up to 30 yearly layers.

Shapes: M traces, K = 30 layers of a table, L layers that are used.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import numpy as np

from fulgurite.datamodules.ice_layers.climate import MarClimate
from fulgurite.datamodules.ice_layers.flights import (
    Blocks,
    StackSource,
    Track,
    assemble,
    in_order,
    left_out_files,
    left_out_traces,
    read_or_leave,
)
from fulgurite.datamodules.ice_layers.stack import (
    THICKEST,
    Array,
    Flights,
    check_exclude,
    name_some,
)
from fulgurite.datamodules.ice_layers.travel_time import layer_times
from fulgurite.errors import ConfigError, DataError
from fulgurite.foreign import reading
from fulgurite.io import data_path

__all__ = ["KoenigPicks", "read_picks"]

_OPTION = "--data.init_args.source.init_args"
_HEAD, _PER_LAYER = 6, 5
_DATE = re.compile(r"(?<!\d)((?:19|20)\d{6}_\d{2})(?!\d)")


def read_picks(path: Path, from_bins: bool = False) -> dict[str, tuple[Array, Array, Array]]:
    """Read a table of picks.

    Columns, between white space or commas: file, trace, latitude, longitude, time
    [s since 1970], range-bin step [s], and for each layer the pick [bin], its depth [m], its water
    equivalent, and depth and water equivalent of another density; -1 is missing.

    Args:
        path: ``mapdata*.txt``.
        from_bins: Return two-way travel times from the first bin instead of depths.

    Returns:
        For each segment (the ``YYYYMMDD_SS`` in the file column) the times (M,) [s], positions
        (M, 2) [degrees], and depths (M, K) [m] or times [s], NaN where missing.

    Raises:
        DataError: The table is damaged, or a line has another number of columns.

    Source: arXiv 2604.20783, card section 3.2, item 3.
    """
    rows: dict[str, list[list[float]]] = {}
    columns = 0
    with reading(path, "The picks", f"Set `{_OPTION}.files`."):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        words = re.split(r"[,\s]+", line.strip().strip(","))
        if not line.strip() or line.lstrip()[0] in "#%":
            continue
        if number == 1 and not _DATE.search(words[0]):
            continue  # names of columns
        columns = columns or len(words)
        layers, rest = divmod(columns - _HEAD, _PER_LAYER)
        try:
            date = _DATE.search(words[0])
            if date is None or len(words) != columns or layers < 1 or rest:
                raise ValueError
            values = [float(word) for word in words[1:]]
            if date[1] not in rows:
                _day(date[1])
        except ValueError:
            raise DataError(
                f"The line {number} of {path} is no line of picks ({len(words)} columns).",
                "A line has a file name with YYYYMMDD_SS (of a day that exists), "
                f"{_HEAD - 1} numbers and {_PER_LAYER} for each layer: fetch the table again, or "
                f"leave such tables out: `{_OPTION}.exclude+=unreadable`.",
            ) from None
        rows.setdefault(date[1], []).append(values)
    if not rows:
        raise DataError(
            f"The table {path} holds no picks.",
            f"Set `{_OPTION}.files` to others, or `{_OPTION}.exclude+=unreadable`.",
        )
    found = {}
    for segment, values_ in rows.items():
        table = np.asarray(values_, np.float64)
        picks_of = table[:, _HEAD - 1 :].reshape(len(table), -1, _PER_LAYER)
        bins, depth = picks_of[..., 0], picks_of[..., 1]
        missing = (bins == -1) | (depth == -1) | ~np.isfinite(picks_of[..., :2]).all(-1)
        picks = bins * table[:, 4:5] if from_bins else depth
        found[segment] = table[:, 3], table[:, 1:3], np.where(missing, np.nan, picks)
    return found


class KoenigPicks(StackSource):
    """Stacks out of the picks that Koenig et al. published beside their accumulation map.

    Layers are a year apart. Depths are the published ones, or follow from range bins and the
    density of this project (``thickness: bins``), where the first picked boundary stands for the
    surface.

    Args:
        files: ``mapdata*.txt`` tables, or folders of them, absolute or relative to
            ``FULGURITE_DATA``.
        climate: Where physical fields come from; null for none.
        count: L, number of layers to use, from the surface down.
        thickness: From the published ``depth``, or from range ``bins``.
        traces: N, traces of a stack.
        spacing: Distance of traces [m]; the median one of the track if not given.
        min_traces: Shorter remainders are left out and counted; half of ``traces`` if not given.
        jump: A step of more than this times the median one ends a block.
        density: Of all layers [g cm⁻³], for ``bins``; by the climate if not given.
        exclude: What to leave out and count instead of stopping: tables that are ``unreadable``,
            stacks ``outside_climate``.
        thickest: Largest plausible median of all observed thicknesses [m], above which they are
            taken to be in other units; more than a year's firn for layers of many years.

    Raises:
        ConfigError: An argument is out of range.

    Source: arXiv 2604.20783, card section 3.2, item 3.
    """

    def __init__(
        self,
        files: list[str],
        climate: MarClimate | None = None,
        count: int = 20,
        thickness: Literal["depth", "bins"] = "depth",
        traces: int = 256,
        spacing: float | None = None,
        min_traces: int | None = None,
        jump: float = 5.0,
        density: float | None = None,
        exclude: list[str] = [],  # noqa: B006  # copied below
        thickest: float = THICKEST,
    ) -> None:
        if thickness not in ("depth", "bins") or count < 1:
            raise ConfigError(
                f"There are no {count} layers whose thickness is from {thickness!r}.",
                f"Set `{_OPTION}.count` to 1 or more, `thickness` to depth or bins.",
            )
        self.files = list(files)
        self.climate = climate
        self.count = count
        self.thickness = thickness
        self.blocks = Blocks(traces, spacing, min_traces, jump, density, thickest)
        self.exclude = check_exclude(exclude, ("unreadable", "outside_climate"))

    @property
    def layers(self) -> int:
        """Number of layers."""
        return self.count

    @property
    def physics(self) -> tuple[str, ...]:
        """Names of the physical fields."""
        return () if self.climate is None else self.climate.physics

    def paths(self) -> list[Path]:
        """The tables, sorted.

        Raises:
            DataError: There is none.
        """
        found: set[Path] = set()
        for given in self.files:
            path = data_path(given)
            found |= set(path.glob("**/mapdata*.txt")) if path.is_dir() else {path}
        if not found:
            raise DataError(
                f"There is no table mapdata*.txt at {name_some(self.files)}.",
                f"Set `{_OPTION}.files` to tables of picks or their folder.",
            )
        return sorted(found)

    def load(self) -> Flights:
        """Return the stacks.

        Raises:
            DataError: A table is damaged, has too few layers, or its times are unusable.
        """
        bins = self.thickness == "bins"
        parts: dict[str, list[tuple[Array, Array, Array]]] = {}
        damaged: list[str] = []
        for path in self.paths():
            table = read_or_leave(lambda path: read_picks(path, bins), path, self.exclude, damaged)
            for segment, (time, pos, picks) in (table or {}).items():
                if picks.shape[1] < self.count + bins:
                    raise DataError(
                        f"The table {path} has {picks.shape[1]} layers, not {self.count + bins}.",
                        f"Lower `{_OPTION}.count`.",
                    )
                parts.setdefault(segment, []).append((time, pos, picks[:, : self.count + bins]))
        tracks: list[Track] = []
        crossed, lost = 0, np.zeros(2, np.int64)
        age = np.arange(1.0, self.count + 1)
        for segment in sorted(parts):  # which may be in several tables
            said, pos, picks = map(np.concatenate, zip(*parts[segment], strict=True))
            if not bins:
                picks = np.column_stack([np.zeros(len(picks)), picks])
            start, time = _day(segment), said
            if not abs(float(np.median(said)) - start) < 3 * 86_400:
                # times of 2009 and 2010 are not usable: the name says the day (card, 3.2)
                time = start + 43_200.0 + np.arange(len(said), dtype=np.float64)
            traces, pos, its_lost = in_order(time, pos, said)
            lost += its_lost
            if len(traces):
                layers, its = layer_times(picks[traces])
                crossed += its
                tracks.append(Track(segment, time[traces], pos, layers, age, is_time=bins))
        excluded = [*left_out_files(damaged), *left_out_traces(lost, crossed)]
        names = [f"layer_{k:02}" for k in range(1, self.count + 1)]
        words = sorted(self.exclude)
        return assemble(tracks, self.climate, self.blocks, names, words, excluded)


def _day(segment: str) -> float:
    """The beginning of the day that a segment's name says [s since 1970].

    Raises:
        ValueError: There is no such day.
    """
    day = np.datetime64(f"{segment[:4]}-{segment[4:6]}-{segment[6:8]}", "s")
    return float(day.astype(np.int64))
