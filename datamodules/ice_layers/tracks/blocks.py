"""Stacks out of flight tracks: blocks of equal spacing, their thickness, and their climate.

Shapes: M raw traces, N traces of a block, K boundaries, L layers, P physical fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from fulgurite.data.exclusions import Exclusion, check_exclude
from fulgurite.datamodules.ice_layers.climate.mar import ClimateRequest, MarClimate, Sample
from fulgurite.datamodules.ice_layers.flights import FlightTrack
from fulgurite.datamodules.ice_layers.stack import (
    EXCLUDE,
    Array,
    Flights,
    LayerStack,
    check_plausible,
)
from fulgurite.datamodules.ice_layers.tracks.firn import RHO_ICE, layer_density
from fulgurite.datamodules.ice_layers.tracks.records import resample_details
from fulgurite.datamodules.ice_layers.tracks.resample import (
    break_at_jumps,
    cut_blocks,
    interpolate_positions,
    is_in_hole,
    measure_track,
    resample,
)
from fulgurite.datamodules.ice_layers.tracks.spans import resample_spans, to_optical_lengths
from fulgurite.datamodules.ice_layers.tracks.travel_time import time_to_thickness
from fulgurite.domains.ice_layers.details import FlightDetails
from fulgurite.domains.ice_layers.spans import ArraySpans
from fulgurite.errors import ConfigError, DataError
from fulgurite.options import check_options, restrict_number

__all__ = ["Blocks", "assemble"]

_YEAR = 365.25  # [days]
_OPTION = "--data.init_args.source.init_args"


if not TYPE_CHECKING:  # in this order: jsonargparse reads blocks of TYPE_CHECKING
    TraceCount = restrict_number("BlockTraces", int, (">=", 2), ("<=", 1_000_000))
    Spacing = restrict_number("BlockSpacing", float, (">=", 1e-3), ("<=", 1e6))
    JumpFactor = restrict_number("JumpFactor", float, (">=", 1.5), ("<=", 1e9))
    Density = restrict_number("FirnDensity", float, (">=", 0.05), ("<=", RHO_ICE))
else:
    TraceCount = int
    Spacing = float
    JumpFactor = float
    Density = float


@dataclass(frozen=True)
class Blocks:
    """How tracks are cut into stacks.

    Attributes:
        traces: N, traces of a stack.
        spacing: Distance of traces [m]; the raw one (median of the track) if None.
        min_traces: Shorter remainders are left out and counted; half of ``traces`` if None.
        jump: A step of more than this times the median one breaks a block.
        density: Density of the layers [g cm⁻³]; None for Herron and Langway's with the climate's
            balance and temperature.

    Raises:
        ConfigError: A number is out of range.
    """

    traces: TraceCount = 256
    spacing: Spacing | None = None
    min_traces: TraceCount | None = None
    jump: JumpFactor = 5.0
    density: Density | None = None

    def __post_init__(self) -> None:
        check_options(self, f"{_OPTION.removeprefix('--')}.blocks")
        if self.min_traces is not None and self.min_traces > self.traces:
            raise ConfigError(
                f"The min_traces of blocks is {self.min_traces}, and blocks have {self.traces}.",
                f"Set `{_OPTION}.blocks.min_traces` to at most that.",
            )

    @property
    def fewest(self) -> int:
        """Fewest traces of a stack."""
        return max(2, self.traces // 2) if self.min_traces is None else self.min_traces


@dataclass
class _TrackBlock:
    track: FlightTrack
    number: int
    pos: Array
    layers: Array
    spans: ArraySpans
    truth: Array | None
    record: FlightDetails


def _cut_tracks(
    tracks: Sequence[FlightTrack], sizes: Blocks, excluded: list[Exclusion]
) -> list[_TrackBlock]:
    """Cut tracks into blocks, and report what was too short."""
    blocks: list[_TrackBlock] = []
    short = jumps = traces = holes = 0
    for track in tracks:
        if len(track.pos) < 2:
            short, traces = short + 1, traces + len(track.pos)
            continue
        distance = measure_track(track.pos)
        runs = break_at_jumps(distance, sizes.jump)
        jumps += len(runs) - 1
        number = 0
        for run_number, run in enumerate(runs):
            part = distance[run] - distance[run][0]
            if len(part) < 2 or part[-1] <= 0:
                short, traces = short + 1, traces + len(part)
                continue
            steps = np.diff(part)
            spacing = sizes.spacing or float(np.median(steps[steps > 0]))
            blocks_of_run = cut_blocks(float(part[-1]), sizes.traces, spacing)
            positions = np.concatenate(blocks_of_run)
            values, spans = resample_spans(part, track.boundaries[run], positions)
            pos = interpolate_positions(part, track.pos[run], positions)
            truth = None if track.truth is None else resample(part, track.truth[run], positions)
            hole = is_in_hole(part, positions)
            record = replace(
                resample_details(track.record, part, run, positions),
                run=run_number,
                flight_distance=float(distance[run][0]) + positions,
            )
            end = 0
            for length in map(len, blocks_of_run):
                rows = slice(end, end := end + length)
                if length < sizes.fewest:
                    short, traces = short + 1, traces + length
                    continue
                holes += int(hole[rows].sum())
                blocks.append(
                    _TrackBlock(
                        track,
                        number,
                        pos[rows],
                        values[rows],
                        spans[rows],
                        None if truth is None else truth[rows],
                        record[rows],
                    )
                )
                number += 1
    if short:
        excluded.append(
            Exclusion("short", f"runs of fewer than {sizes.fewest} traces ({traces} in all)", short)
        )
    if jumps:
        excluded.append(Exclusion("jump", "jumps of the track, at which blocks end", jumps))
    if holes:
        excluded.append(Exclusion("hole", "traces without layers in holes of the track", holes))
    return blocks


def assemble(
    tracks: Sequence[FlightTrack],
    climate: MarClimate | None,
    sizes: Blocks,
    *,
    layer_names: Sequence[str],
    exclude: Sequence[str] = (),
    excluded: Sequence[Exclusion] = (),
    notes: Sequence[str] = (),
    thickest: float | None = None,
) -> Flights:
    """Cut tracks into stacks and give them thickness [m] and physics.

    Args:
        tracks: Tracks of all segments, with L layers each.
        climate: Source of the physical fields; None for none.
        sizes: Sizes of the stacks.
        layer_names: Names of the L layers.
        exclude: ``outside_climate`` leaves such stacks out.
        excluded: What the reader left out already.
        notes: Further lines of the report.
        thickest: Largest plausible median thickness of the layers [m].

    Raises:
        DataError: Nothing is left, traces lie outside the climate grid, or units are wrong.

    Source: docs/papers/ice_layers.md sections 3.2 and 3.3.
    """
    words = check_exclude(exclude, ("outside_climate", "unreadable", "layer_count"), EXCLUDE)
    left_out = list(excluded)
    blocks = _cut_tracks(tracks, sizes, left_out)
    names = climate.physics if climate is not None else ()
    stacks: list[LayerStack] = []
    nearest = outside = 0
    for block, sample in zip(blocks, _sample_climate(blocks, climate), strict=True):
        n, layers = block.layers.shape
        physics, flag = np.zeros((n, layers, 0)), np.zeros(n, np.uint8)
        name = f"{block.track.segment}_{block.number:04}"
        if sample is not None and climate is not None:
            physics, flag = sample.physics, sample.flag
            if (far := sample.away > climate.reach).any():
                if "outside_climate" not in words:
                    raise DataError(
                        f"{int(far.sum())} of {n} traces of stack {name} are up to "
                        f"{sample.away.max() / 1000:.0f} km away from any ice of the climate grid, "
                        f"which reaches {climate.reach / 1000:g} km.",
                        "Check that latitudes and longitudes are right, and "
                        f"`{_OPTION}.climate.init_args.reach` [m], or leave such stacks out: "
                        f"`{_OPTION}.exclude+=outside_climate`.",
                    )
                outside += 1
                continue
            nearest += int(flag.sum())
        thickness, spans, record = block.layers, block.spans, block.record
        if block.track.is_time:
            density = _layer_density(physics, names, block.track.age, sizes)
            thickness = time_to_thickness(thickness, density)
            spans = to_optical_lengths(spans, density)
            record = replace(record, density=density)
        check_plausible(thickness, f"stack {name}")
        distance = measure_track(block.pos)
        stacks.append(
            LayerStack(
                name,
                block.track.segment,
                np.ascontiguousarray(thickness),
                physics.astype(np.float32),
                flag,
                block.pos,
                distance,
                block.truth,
                record=record,
                spans=spans,
                labels=block.track.labels,
            )
        )
    if nearest:
        left_out.append(Exclusion("nearest", "traces with the nearest cell's climate", nearest))
    if outside:
        left_out.append(Exclusion("outside_climate", "stacks outside the climate grid", outside))
    age = tracks[0].age if tracks else np.zeros(len(layer_names))
    return Flights(stacks, names, tuple(layer_names), age, left_out, tuple(notes), thickest)


def _sample_climate(
    blocks: Sequence[_TrackBlock], climate: MarClimate | None
) -> list[Sample | None]:
    """The climate at the traces of each block: one request for each flight."""
    if climate is None or not blocks:
        return [None] * len(blocks)
    flights: dict[int, list[_TrackBlock]] = {}
    for block in blocks:  # in the order of the tracks
        flights.setdefault(id(block.track), []).append(block)
    requests = [
        ClimateRequest(np.concatenate([b.pos for b in group]), _boundary_dates(group[0].track))
        for group in flights.values()
    ]
    samples: list[Sample | None] = []
    for group, sample in zip(flights.values(), climate.sample(requests), strict=True):
        ends = np.cumsum([len(b.pos) for b in group])[:-1]
        fields = (np.split(v, ends) for v in (sample.physics, sample.flag, sample.away))
        samples += [Sample(*parts) for parts in zip(*fields, strict=True)]
    return samples


def _boundary_dates(track: FlightTrack) -> Array:
    """Dates of a track's boundaries, the flight's first [days since 1970]."""
    flight = float(track.time[0]) / 86_400.0
    return flight - np.concatenate([[0.0], track.age]) * _YEAR


def _layer_density(physics: Array, names: Sequence[str], age: Array, sizes: Blocks) -> Array:
    """Density of the layers of a block [g cm⁻³]. Shape: (N, L)."""
    shape = physics.shape[:2]
    if sizes.density is not None:
        return np.full(shape, sizes.density)
    if not {"smb", "st"} <= set(names):
        raise DataError(
            "The density of the layers follows from the climate's smb and st, which are not there.",
            f"Set `{_OPTION}.blocks.density` [g cm⁻³], or give a climate with both.",
        )
    balance = physics[..., names.index("smb")] / 1000.0
    temperature = physics[..., names.index("st")] + 273.15
    refreeze = np.zeros(shape)
    if "refreeze" in names:
        refreeze = physics[..., names.index("refreeze")] * RHO_ICE
    return layer_density(balance, temperature, refreeze, age)
