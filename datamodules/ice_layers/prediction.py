"""Stacks of a user that are in no split, read by the readers of a training.

Shapes: N traces, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fulgurite.data.listing import list_files
from fulgurite.datamodules.ice_layers.climate.fields import PHYSICS, check_field_units
from fulgurite.datamodules.ice_layers.flights import StackSource
from fulgurite.datamodules.ice_layers.generator.synthetic import GeneratedLayerFiles
from fulgurite.datamodules.ice_layers.readers.koenig import KoenigPicks
from fulgurite.datamodules.ice_layers.readers.layer_files import LayerFiles, SegmentSelection
from fulgurite.datamodules.ice_layers.readers.layer_frames import FRAME_NAME
from fulgurite.datamodules.ice_layers.readers.npz import NpzStacks
from fulgurite.datamodules.ice_layers.readers.sred import SredMat
from fulgurite.datamodules.ice_layers.readers.sred_options import SredFolders
from fulgurite.datamodules.ice_layers.stack import Flights
from fulgurite.datamodules.ice_layers.tracks.spans import find_completed_spans
from fulgurite.domains.ice_layers.codes import Provenance
from fulgurite.domains.ice_layers.details import FlightDetails
from fulgurite.domains.ice_layers.netcdf import read_netcdf_arrays
from fulgurite.domains.ice_layers.npz import DETAIL_ARRAYS, convert
from fulgurite.errors import DataError
from fulgurite.predictions import list_input_files

__all__ = ["InputStacks", "find_input_stacks"]


_SUFFIXES = (".npz", ".nc")
# what each reader reads
_FILES = {
    LayerFiles: "layer file Data_YYYYMMDD_SS_FFF.mat",
    KoenigPicks: "table mapdata*.txt",
    SredMat: "file of SRED",
}
_KINDS = "stacks as .npz, or completed stacks as .nc"


class InputStacks(NpzStacks):
    """Stacks in npz files or completed ones in NetCDF, of which only what was observed counts.

    In completed stacks, which ``fulgurite predict`` wrote, filled entries are missing again, picked
    boundaries stay where they were picked, and what is known of the flight is kept. Of a stack in
    both formats the npz file is read.

    Args:
        path: A file, or a folder of files.
        layers: Layers of the training, which all stacks have.
        physics: Names of the physical fields of the training.
        exclude: What to leave out and count, as in training.
        thickest: Largest plausible median thickness, as in training.
        is_climate: Whether the physical fields are those of a climate model, in its units.
    """

    def __init__(
        self,
        path: Path,
        layers: int,
        physics: Sequence[str],
        *,
        exclude: Sequence[str] = (),
        thickest: float | None = None,
        is_climate: bool = False,
    ) -> None:
        super().__init__(str(path), layers, list(physics), list(exclude), thickest=thickest)
        self.path, self.needed, self.is_climate = path, layers, is_climate

    def paths(self) -> list[Path]:
        """The files, sorted."""
        files = {path for _, path in list_input_files(self.path, _SUFFIXES)}
        return sorted(f for f in files if f.suffix == ".npz" or f.with_suffix(".npz") not in files)

    def _read_arrays(self, path: Path) -> dict[str, Any]:
        if path.suffix == ".npz":
            return super()._read_arrays(path)
        return read_netcdf_arrays(path, "The stack", "Give one that `fulgurite predict` wrote.")

    def _contents(self) -> Iterator[tuple[Path, dict[str, Any] | None]]:
        for path, content in super()._contents():
            if content is not None:
                self._check_layers(path, content)
                self._hide_filled(path, content)
            yield path, content

    def load(self) -> Flights:
        """Return the stacks.

        Raises:
            DataError: A file is unusable and not to be left out, or a field is in another unit than
                that of the climate in training.
        """
        flights = super().load()
        if self.is_climate:
            try:
                samples = [stack.physics.astype(np.float64) for stack in flights.stacks]
                check_field_units(samples, self.physics, ("ZN6",))
            except DataError as error:
                units = [f"{name} [{PHYSICS[name]}]" for name in self.physics if name in PHYSICS]
                raise DataError(
                    f"The stacks at {self.path} have physical fields in other units than those of "
                    f"the training: {error.problem}",
                    f"Give {', '.join(units)}.",
                ) from error
        return flights

    def _check_layers(self, path: Path, content: dict[str, Any]) -> None:
        layers = (
            content["thickness"].shape[1]
            if "thickness" in content
            else content["boundary"].shape[1] - 1
        )
        if layers != self.needed and "layer_count" not in self.exclude:
            raise DataError(
                f"The stack {path} has {layers} layers, and the network was trained on "
                f"{self.needed}.",
                f"Give stacks of {self.needed} layers, NaN where one is missing.",
            )

    def _extra(self, content: dict[str, Any]) -> dict[str, Any]:
        """Also what was measured of a completed stack, and what is known of its traces."""
        if not {"provenance", "picked"} <= content.keys():
            return super()._extra(content)
        traces, layers = content["thickness"].shape
        try:
            arrays: dict[str, Any] = {
                name: convert(name, content[name]) for name in DETAIL_ARRAYS if name in content
            }
        except ValueError as error:
            raise DataError(f"An array cannot be read: {error}.", "Write it again.") from error
        details = FlightDetails(time_scale=str(content.get("time_scale", "")), **arrays)
        details.check(str(content.get("stack", "")), traces, layers)
        spans = find_completed_spans(
            content["completed"], arrays["picked"], details.density, details.twtt
        )
        surface = None if details.twtt is None else details.twtt[:, 0]
        record = replace(details, picked=None, twtt=None, surface=surface)
        return super()._extra(content) | {"spans": spans, "record": record}

    @staticmethod
    def _hide_filled(path: Path, content: dict[str, Any]) -> None:
        if "provenance" not in content or "thickness" not in content:
            return
        thickness, provenance = content["thickness"], content["provenance"]
        if thickness.shape != provenance.shape:
            raise DataError(
                f"The provenance of the stack {path} has the shape {provenance.shape}, its "
                f"thickness {thickness.shape}.",
                "Give both for each trace and layer.",
            )
        content["completed"] = thickness
        content["thickness"] = np.where(provenance == Provenance.OBSERVED, thickness, np.nan)


def find_input_stacks(
    path: Path, source: StackSource, *, layers: int, physics: Sequence[str]
) -> StackSource:
    """Return the source of the files that ``--input`` names.

    It is of the training's kind, with its options and its climate; or stacks in npz files and
    completed ones, whatever the training read.

    Args:
        path: A file or folder.
        source: The training source.
        layers: Number of layers of the training.
        physics: Names of the physical fields of the training.

    Raises:
        DataError: There is no file of such a kind at the path.
    """
    if isinstance(source, GeneratedLayerFiles):
        source = source.reader()
    files = list_files(path) if path.is_dir() else [(path.name, path)]
    names = [name.rpartition("/")[2] for name, _ in files]
    exclude = sorted(getattr(source, "exclude", ()))
    if isinstance(source, LayerFiles) and any(map(FRAME_NAME.fullmatch, names)):
        if any(name.endswith(".npz") for name in names):
            raise DataError(
                f"--input={path} holds both layer files and stacks as .npz.",
                "Name the folder of one kind.",
            )
        folders = {part for _, file in files for part in file.parent.parts}
        prefer = tuple(name for name in source.selection.prefer if name in folders)
        return LayerFiles(
            [str(path)], source.climate, layers, blocks=source.blocks, picks=source.picks,
            selection=SegmentSelection(prefer=prefer), exclude=exclude, thickest=source.thickest,
        )  # fmt: skip
    if isinstance(source, KoenigPicks) and any(name.endswith(".txt") for name in names):
        return KoenigPicks(
            [str(path)], source.climate, layers, source.thickness, blocks=source.blocks,
            exclude=exclude, thickest=source.thickest, surface=source.surface,
        )  # fmt: skip
    if isinstance(source, SredMat) and any(name.endswith(".mat") for name in names):
        if not path.is_dir():
            raise DataError(
                f"--input={path} is a file, and files of SRED are read by folder.",
                "Name their folder.",
            )
        return SredMat(
            str(path), SredFolders(train=(".",), val=(), test=(), split="segments"), layers,
            source.traces, fields=source.fields, bins=source.bins, exclude=exclude,
            thickest=source.thickest,
        )  # fmt: skip
    if any(name.endswith(_SUFFIXES) for name in names):
        if not isinstance(source, NpzStacks):
            is_climate = isinstance(source, LayerFiles | KoenigPicks)
            return InputStacks(path, layers, physics, is_climate=is_climate)
        return InputStacks(path, layers, physics, exclude=exclude, thickest=source.thickest)
    kind = _FILES.get(type(source))
    raise DataError(
        f"--input={path} holds no {kind or 'stack'} that can be completed.",
        f"Give {'such files, ' if kind else ''}{_KINDS}.",
    )
