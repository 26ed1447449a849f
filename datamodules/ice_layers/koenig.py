"""Picks of Koenig et al. (2016): text tables of up to 30 yearly layers.

Shapes: M traces, K = 30 layers of a table, L layers that are used.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from fulgurite.datamodules.ice_layers.climate import MarClimate
from fulgurite.datamodules.ice_layers.flights import Blocks, StackSource, Track, assemble
from fulgurite.datamodules.ice_layers.stack import (
    Array,
    Exclusion,
    Flights,
    check_exclude,
    name_some,
)
from fulgurite.datamodules.ice_layers.travel_time import layer_times
from fulgurite.errors import ConfigError, DataError
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
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise DataError(
            f"The picks {path} cannot be read ({error.strerror}).", f"Set `{_OPTION}.files`."
        ) from error
    for number, line in enumerate(lines, 1):
        words = re.split(r"[,\s]+", line.strip().strip(","))
        if not line.strip() or line.lstrip()[0] in "#%":
            continue
        if number == 1 and not _DATE.search(words[0]):
            continue  # names of columns
        columns = columns or len(words)
        try:
            date = _DATE.search(words[0])
            if date is None or len(words) != columns or (columns - _HEAD) % _PER_LAYER:
                raise ValueError
            values = [float(word) for word in words[1:]]
        except ValueError:
            raise DataError(
                f"The line {number} of {path} is no line of picks ({len(words)} columns).",
                f"A line has a file name with YYYYMMDD_SS, {_HEAD - 1} numbers and "
                f"{_PER_LAYER} for each layer: fetch the table again.",
            ) from None
        rows.setdefault(date[1], []).append(values)
    found = {}
    for segment, values_ in rows.items():
        table = np.asarray(values_, np.float64)
        layers = table[:, _HEAD - 1 :].reshape(len(table), -1, _PER_LAYER)
        bins, depth = layers[..., 0], layers[..., 1]
        missing = (bins == -1) | (depth == -1) | ~np.isfinite(layers[..., :2]).all(-1)
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
        exclude: What to leave out and count instead of stopping: stacks ``outside_climate``.

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
        self.blocks = Blocks(traces, spacing, min_traces, jump, density)
        self.exclude = check_exclude(exclude, ("outside_climate",))

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
        tracks: list[Track] = []
        crossed = lost = 0
        for path in self.paths():
            for segment, (time, pos, picks) in read_picks(path, bins).items():
                if picks.shape[1] < self.count + bins:
                    raise DataError(
                        f"The table {path} has {picks.shape[1]} layers, not {self.count + bins}.",
                        f"Lower `{_OPTION}.count`.",
                    )
                picks = picks[:, : self.count + bins]
                if not bins:
                    picks = np.column_stack([np.zeros(len(picks)), picks])
                flight = np.datetime64(f"{segment[:4]}-{segment[4:6]}-{segment[6:8]}", "s")
                start = float(flight.astype(np.int64))
                if not abs(float(np.median(time)) - start) < 3 * 86_400:
                    # times of 2009 and 2010 are not usable: the name says the day (card, 3.2)
                    time = start + 43_200.0 + np.arange(len(time), dtype=np.float64)
                known = np.isfinite(time) & (np.abs(pos) <= (90, 360)).all(1)
                lost += int((~known).sum())
                if not known.any():
                    continue
                times, first = np.unique(time[known], return_index=True)
                layers, its = layer_times(picks[known][first])
                crossed += its
                age = np.arange(1.0, self.count + 1)
                tracks.append(Track(segment, times, pos[known][first], layers, age, is_time=bins))
        excluded = [
            Exclusion(kind, what, number)
            for kind, what, number in (
                ("crossed", "crossed picks", crossed),
                ("position", "traces without position or time", lost),
            )
            if number
        ]
        names = [f"layer_{k:02}" for k in range(1, self.count + 1)]
        return assemble(
            _join(tracks), self.climate, self.blocks, names, sorted(self.exclude), excluded
        )


def _join(tracks: Sequence[Track]) -> list[Track]:
    """Put parts of one segment (in several tables) together, by time."""
    joined: list[Track] = []
    for segment in sorted({track.segment for track in tracks}):
        parts = [track for track in tracks if track.segment == segment]
        time, first = np.unique(np.concatenate([t.time for t in parts]), return_index=True)
        pos = np.concatenate([t.pos for t in parts])[first]
        layers = np.concatenate([t.layers for t in parts])[first]
        joined.append(Track(segment, time, pos, layers, parts[0].age, parts[0].is_time))
    return joined
