"""What readers of completed stacks as NetCDF must know of how they are written.

Shapes: N traces, L layers (newest first), P physical fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fulgurite.domains.ice_layers.codes import METRES
from fulgurite.foreign import reading
from fulgurite.hdf5 import NetcdfFile, need_package

__all__ = ["name_field_variables", "read_details", "read_netcdf_arrays"]


def name_field_variables(names: Sequence[str]) -> list[str]:
    """Names of the variables of physical fields: CF allows letters, digits and underscores.

    Args:
        names: Names of the fields.

    Example:
        >>> name_field_variables(["smb", "Δh", "Δ", "δh"])
        ['climate_smb', 'climate__h', 'climate_2', 'climate__h_3']
    """
    variables: list[str] = []
    for number, name in enumerate(names):
        letters = "".join(c if c.isascii() and (c.isalnum() or c == "_") else "_" for c in name)
        variable = f"climate_{letters}" if letters.strip("_") else f"climate_{number}"
        variables.append(f"{variable}_{number}" if variable in variables else variable)
    return variables


def read_details(file: NetcdfFile) -> dict[str, NDArray[Any]]:
    """Read what an open file says of its traces beside layers, by the names of arrays in npz files.

    Args:
        file: A completed stack; what it does not have is left out.
    """
    is_gps = str(file.attributes.get("time_scale", "")) == "GPS"
    content = {
        name: file.read(variable, is_masked=False)
        for name, variable in {
            "time": "gps_time" if is_gps else "time",
            "elevation": "elevation",
            "flight_distance": "flight_distance",
            "trace": "frame_trace",
            "density": "density",
            "twtt": "twtt",
        }.items()
        if variable in file.variables
    }
    if "frame" in file.variables:
        content["frame"] = np.array(file.read_texts("frame"))
    if "boundary_provenance" in file.variables:
        content["picked"] = file.read("boundary_provenance", is_masked=False) == 0
    return content


def read_netcdf_arrays(path: str | Path, subject: str, hint: str) -> dict[str, NDArray[Any]]:
    """Read what a completed stack says of its layers, by the names of the arrays in npz files.

    Args:
        path: The file.
        subject: What the file is, for the error.
        hint: What to do if it cannot be read.

    Raises:
        DataError: The file is damaged, or no completed stack.
        MissingExtraError: netCDF4 is not installed.
    """
    with reading(path, subject, hint):
        try:
            file = NetcdfFile(path)
        except ImportError as error:
            raise need_package(error, "Reading stacks as NetCDF") from error
        with file:
            attributes = file.attributes
            absent = [
                name
                for name in ("thickness", "provenance", "distance", "latitude", "longitude")
                if name not in file.variables
            ] + [name for name in ("physics_names", "segment", "stack") if name not in attributes]
            if absent:
                raise ValueError(f"it is no completed stack: it has no {', '.join(absent)}")
            names = [name for name in str(attributes["physics_names"]).split("\n") if name]
            content = {
                name: file.read(name, is_masked=False)
                for name in ("thickness", "provenance", "distance", "layer_age")
                if name in file.variables or name != "layer_age"
            }
            position = [file.read(name, is_masked=False) for name in ("latitude", "longitude")]
            fields = [
                file.read(variable, is_masked=False) for variable in name_field_variables(names)
            ]
            shape = (*content["thickness"].shape, 0)
            content["pos"] = np.stack(position, -1)
            content["physics"] = np.stack(fields, -1) if fields else np.zeros(shape)
            content["physics_names"] = np.array(names, np.str_)
            for name in ("segment", "stack"):
                content[name] = np.array(str(attributes[name]))
            content["unit"] = np.array(str(attributes.get("unit", METRES)))
            content |= read_details(file)
            content["time_scale"] = np.array(str(attributes.get("time_scale", "")))
            if "layer_name" in file.variables:
                content["layer_names"] = np.array(file.read_texts("layer_name"), np.str_)
    return content
