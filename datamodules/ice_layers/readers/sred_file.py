"""One file of the Snow Radar Echogram Dataset (SRED): boundaries in range bins, physical fields.

Shapes: N traces, K boundaries (the surface first), L layers (newest first), P physical fields.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fulgurite.data.exclusions import name_some
from fulgurite.datamodules.ice_layers.readers.layer_frames import parse_day, read_mat
from fulgurite.datamodules.ice_layers.stack import Array
from fulgurite.domains.ice_layers.geodesy import is_in_greenland
from fulgurite.errors import DataError

__all__ = ["FIELDS", "SredFile", "read_sred", "segment_of"]

#: Physical fields of each layer, in the order of the features that they become: balance, surface
#: temperature, refreezing, height change, snowpack, density.
FIELDS = (
    "curr_smb",
    "curr_temp",
    "curr_RZ_vals",
    "curr_SHC_vals",
    "curr_SNHS_vals",
    "curr_dens",
)

#: Name of a file: the flight segment ``YYYYMMDD_SS``, then what tells its echograms apart.
_NAME = re.compile(r"(\d{8}_\d{2})_.+\.mat")

_OPTION = "--data.init_args.source.init_args"
_LEAVE = f"or leave such files out: `{_OPTION}.exclude+=unreadable`."
_LAYOUT = f"Give files of SRED's layout, {_LEAVE}"

# Medians of layers in range bins: less are metres or travel times (inferred)
_BINS = (2.0, 5_000.0)
# What medians of the fields can be, where another unit is plain: m w.e. (the published mean is
# 0.184), K, and kg m⁻³ (inferred)
_UNITS = {
    "curr_smb": ("m w.e.", -10.0, 10.0),
    "curr_temp": ("K", 180.0, 290.0),
    "curr_dens": ("kg m⁻³", 50.0, 950.0),
}


@dataclass(frozen=True, eq=False)
class SredFile:
    """The content of a file.

    Attributes:
        path: The file.
        segment: Name of the flight segment, from the file's name.
        boundaries: Cumulative range bins, NaN where missing. Shape: (N, K).
        fields: Rows of the requested physical fields, as they are stored, by name.
            Shape of each: (N, R) float32, with R rows.
        pos: Latitude and longitude from -180 to 180 [degrees]. Shape: (N, 2).
        elevation: Elevation [m]. Shape: (N,).
    """

    path: Path
    segment: str
    boundaries: Array
    fields: dict[str, NDArray[np.float32]]
    pos: Array
    elevation: Array

    def physics(
        self, layers: int, first_row: int, is_repeated: bool
    ) -> tuple[NDArray[np.float32], int]:
        """Physical fields of the layers.

        Args:
            layers: Number of layers, L.
            first_row: Row of the first layer, counted from 0.
            is_repeated: Whether layers below the last row have that row's values again.

        Returns:
            The fields (N, L, P), and the number of layers that have another one's row.

        Raises:
            DataError: There are too few rows, or a value is not finite.
        """
        values, repeated = [], 0
        for name, rows in self.fields.items():
            there = rows.shape[1] - first_row
            if there < 1 or (there < layers and not is_repeated):
                raise DataError(
                    f"The field {name} of {self.path} has {rows.shape[1]} rows, which say nothing "
                    f"of layers {max(there, 0) + 1} to {layers} (row {first_row} is the first "
                    "layer's, counted from 0).",
                    f"Set `{_OPTION}.fields.deeper=repeat` to give deeper layers the last row "
                    f"again, `{_OPTION}.fields.first_row`, a smaller `count`, or leave such "
                    f"files out: `{_OPTION}.exclude+=physics`.",
                )
            repeated = max(repeated, layers - there)
            numbers = np.minimum(first_row + np.arange(layers), rows.shape[1] - 1)
            values.append(rows[:, numbers])
        nothing = np.zeros((len(self.pos), layers, 0), np.float32)
        physics = np.stack(values, -1) if values else nothing
        if not np.isfinite(physics).all():
            names = [
                name for k, name in enumerate(self.fields) if not np.isfinite(physics[..., k]).all()
            ]
            raise DataError(
                f"The fields {name_some(names)} of {self.path} have values that are not finite.",
                "Fill them before, leave the fields out of "
                f"`{_OPTION}.fields.names`, or such files: `{_OPTION}.exclude+=physics`.",
            )
        return physics, repeated


def segment_of(path: Path) -> str:
    """Return the flight segment that a file's name begins with.

    Raises:
        DataError: The name does not begin with a flight segment.

    Example:
        >>> segment_of(Path("20120330_04_0939_2km.mat"))
        '20120330_04'
    """
    match = _NAME.fullmatch(path.name)
    try:
        parse_day(match[1] if match else "")
    except ValueError:
        match = None
    if match is None:
        raise DataError(
            f"The name of {path} does not begin with a flight segment.",
            f"Call it as 20120330_04_0939_2km.mat (YYYYMMDD_SS_…), {_LEAVE}",
        )
    return match[1]


def read_sred(path: Path, traces: int, fields: Sequence[str]) -> SredFile:
    """Read a file of the layout that SRED has.

    Args:
        path: A MATLAB file, of version 5 to 7.3, whose name begins with its flight segment.
        traces: N, traces that every file has.
        fields: Names of the physical fields to read.

    Raises:
        DataError: The file is damaged, lacks a variable, or a variable is not what it should be: of
            another shape, transposed, not made of numbers, in other units, or off the globe.
        MissingExtraError: The file is of version 7.3 and h5py is not installed.

    Source: docs/papers/ice_layers.md section 3.5 (keys and shapes); limits of plausible values are
    inferred.
    """
    segment = segment_of(path)
    content = read_mat(path)
    boundaries = _read_rows(content, "layers_vector", traces, path)
    _check_bins(boundaries, path)
    pos = np.stack(
        [_read_vector(content, name, traces, path) for name in ("Latitude", "Longitude")], 1
    )
    pos = pos - [0.0, 360.0] * (pos[:, 1:] > 180)
    _check_positions(pos, path)
    values = {name: _read_rows(content, name, traces, path) for name in fields}
    for name, rows in values.items():
        _check_unit(rows, name, path)
    elevation = _read_vector(content, "Elevation", traces, path)
    if not ((elevation > -1_000) & (elevation < 20_000)).all():
        raise DataError(
            f"The Elevation of {path} goes from {np.min(elevation):g} to {np.max(elevation):g}, "
            "which are no metres.",
            f"Convert it to metres, {_LEAVE}",
        )
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and refused
        stored = {name: rows.astype(np.float32) for name, rows in values.items()}
    return SredFile(path, segment, boundaries, stored, pos, elevation)


def _read_array(content: dict[str, Any], name: str, path: Path) -> Array:
    """A variable as an array of real numbers, axes of length one dropped."""
    if name not in content:
        raise DataError(
            f"The file {path} has no variable {name!r} (it has {name_some(sorted(content), 12)}).",
            _LAYOUT,
        )
    value = content[name]
    if not isinstance(value, np.ndarray | np.generic | int | float) or (
        np.asarray(value).dtype.kind not in "biuf"
    ):
        raise DataError(f"The variable {name} of {path} is not made of real numbers.", _LAYOUT)
    return np.squeeze(np.asarray(value, np.float64))


def _read_rows(content: dict[str, Any], name: str, traces: int, path: Path) -> Array:
    """A variable of (rows × traces) as (N, rows); a single row has lost its axis."""
    array = _read_array(content, name, path)
    if not array.size and name == "layers_vector":
        return np.zeros((traces, 0))
    array = np.atleast_2d(array)
    if array.ndim != 2 or array.shape[1] != traces:
        shape = " × ".join(str(length) for length in array.shape)
        transposed = array.ndim == 2 and array.shape[0] == traces
        raise DataError(
            f"The variable {name} of {path} is {shape}, not rows × {traces} traces"
            f"{': it is transposed' if transposed else ''}.",
            (
                f"Save {name}' as MATLAB shows it, one row for each boundary or layer, {_LEAVE}"
                if transposed
                else f"Set `{_OPTION}.traces` to the number of traces that all files have, {_LEAVE}"
            ),
        )
    return array.T


def _read_vector(content: dict[str, Any], name: str, traces: int, path: Path) -> Array:
    """A variable of one finite number for each trace."""
    array = _read_array(content, name, path)
    if array.shape != (traces,):
        raise DataError(
            f"The variable {name} of {path} has {array.size} values for {traces} traces.", _LAYOUT
        )
    if not np.isfinite(array).all():
        raise DataError(
            f"The variable {name} of {path} has {int((~np.isfinite(array)).sum())} values that are "
            "not finite.",
            _LAYOUT,
        )
    return array


def _check_bins(boundaries: Array, path: Path) -> None:
    """Refuse boundaries that are no cumulative range bins."""
    finite = boundaries[~np.isnan(boundaries)]
    if np.isinf(finite).any() or (finite < 0).any():
        bad = finite[np.isinf(finite) | (finite < 0)]
        raise DataError(
            f"The layers_vector of {path} has {bad.size} values that are no range bins, such as "
            f"{bad[0]:g}.",
            f"Give NaN where a boundary is missing, {_LEAVE}",
        )
    steps = np.diff(boundaries, axis=1)
    steps = steps[np.isfinite(steps)]
    low, high = _BINS
    if steps.size and not low <= (middle := float(np.median(np.abs(steps)))) <= high:
        raise DataError(
            f"The median step of layers_vector of {path} is {middle:g}, which looks like "
            f"{'metres or travel times' if middle < low else 'another unit'} instead of range "
            "bins.",
            f"Convert it to range bins, counted from the top of the echogram, {_LEAVE}",
        )


def _check_positions(pos: Array, path: Path) -> None:
    if not (np.abs(pos) <= (90, 180)).all():
        raise DataError(
            f"A position of {path} is not on the globe.",
            f"Give Latitude and Longitude in degrees, {_LEAVE}",
        )
    latitude, longitude = (float(value) for value in np.median(pos, 0))
    if not is_in_greenland(latitude, longitude) and is_in_greenland(longitude, latitude):
        raise DataError(
            f"Latitude and Longitude of {path} are exchanged ({latitude:g}, {longitude:g}).",
            f"Exchange them, {_LEAVE}",
        )


def _check_unit(rows: Array, name: str, path: Path) -> None:
    """Refuse a field whose median is plainly in another unit."""
    finite = rows[np.isfinite(rows)]
    if name not in _UNITS or not finite.size:
        return
    unit, low, high = _UNITS[name]
    if not low <= (middle := float(np.median(finite))) <= high:
        raise DataError(
            f"The median of {name} in {path} is {middle:g}, which is not in {unit}.",
            f"Convert it to {unit}, {_LEAVE}",
        )
