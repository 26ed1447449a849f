"""Layer files of generated flights: CSARP_layer and its companion.

Shapes: M traces, K boundaries.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fulgurite.datamodules.ice_layers.stack import Array
from fulgurite.extras import optional_import

__all__ = ["write_layer_file", "write_matlab73", "write_organizer"]

_HEADER = b"MATLAB 7.3 MAT-file, Platform: GLNXA64, Created by: fulgurite HDF5 schema 1.00 ."


def write_matlab73(
    path: Path, arrays: Mapping[str, tuple[str, NDArray[Any]]], texts: Mapping[str, str]
) -> None:
    """Write variables as MATLAB 7.3 does.

    Args:
        path: The file.
        arrays: MATLAB's class and the transpose of what MATLAB shows, by name.
        texts: Text by name.

    Raises:
        MissingExtraError: h5py is not installed.
    """
    h5py = optional_import("h5py", "ice", "Generating layer files")
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, (kind, values) in arrays.items():
            file.create_dataset(name, data=values).attrs["MATLAB_class"] = np.bytes_(kind)
        for name, text in texts.items():
            codes = np.array([[ord(c)] for c in text], np.uint16)
            file.create_dataset(name, data=codes).attrs["MATLAB_class"] = np.bytes_("char")
    with open(path, "r+b") as raw:
        raw.write(_HEADER.ljust(124) + b"\x00\x02IM")


def write_layer_file(path: Path, time: Array, pos: Array, twtt: Array) -> None:
    """Write a CSARP_layer file of version 7.3.

    Shape:
        - time: (M,) [s]; pos: (M, 2) [degrees]; twtt: (M, K) [s], NaN where missing.

    Source: docs/papers/ice_layers.md section 3.2, item 1.
    """
    picked = np.isfinite(twtt)
    arrays: dict[str, tuple[str, NDArray[Any]]] = {
        "gps_time": ("double", time[:, None]),
        "lat": ("double", pos[:, :1]),
        "lon": ("double", pos[:, 1:]),
        "elev": ("double", np.full((len(time), 1), 3500.0)),
        "id": ("double", np.arange(1.0, twtt.shape[1] + 1)[None]),
        "twtt": ("double", twtt),
        "quality": ("uint8", np.where(picked, 1, 3).astype(np.uint8)),
        "type": ("uint8", np.full(twtt.shape, 2, np.uint8)),
    }
    # MATLAB's transpose: traces come first
    write_matlab73(path, arrays, {"file_type": "layer", "file_version": "1"})


def write_organizer(path: Path, layers: int) -> None:
    """Write the companion of a segment, of version 5."""
    from scipy.io import savemat

    count = layers + 1
    names = np.array(["surface", *(f"layer_{k:02}" for k in range(1, count))], object)
    with open(path, "wb") as file:
        savemat(
            file,
            {
                "lyr_id": np.arange(1.0, count + 1),
                "lyr_name": names,
                "lyr_group_name": np.array(["standard"] * count, object),
                "lyr_order": np.arange(1.0, count + 1),
                "lyr_age": np.arange(float(count)),
                "file_type": "layer_organizer",
            },
        )
