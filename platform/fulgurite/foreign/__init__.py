"""Files that others wrote: read within bounds, or refused by one error that names the file.

A parser raises nearly any exception on damaged bytes, and a small file can ask for gigabytes. Every
reader of such files does its work inside :func:`reading`, which turns what was raised into one
error of :mod:`fulgurite.errors`; the helpers here keep what is read in proportion to the file, and
raise a plain ``ValueError`` that says why, for :func:`reading` to name the file.

The readers are imported on first use: what only writes files needs no NumPy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulgurite.foreign.reading import describe_error, expansion_limit, reading
from fulgurite.lazy import lazy_attributes

if TYPE_CHECKING:
    from fulgurite.foreign.archives import check_archive, open_archive, read_member
    from fulgurite.foreign.arrays import map_array, read_array, read_array_shape, read_arrays
    from fulgurite.foreign.pictures import check_tiff, open_picture
    from fulgurite.foreign.tables import check_parquet, read_csv
    from fulgurite.foreign.tensors import check_tensor_file, check_tensors
    from fulgurite.foreign.text import BoundedReader, open_compressed, read_json

_MODULES = {
    "archives": ("check_archive", "open_archive", "read_member"),
    "arrays": ("map_array", "read_array", "read_array_shape", "read_arrays"),
    "pictures": ("check_tiff", "open_picture"),
    "tables": ("check_parquet", "read_csv"),
    "tensors": ("check_tensor_file", "check_tensors"),
    "text": ("BoundedReader", "open_compressed", "read_json"),
}

__all__ = [
    "BoundedReader",
    "check_archive",
    "check_parquet",
    "check_tensor_file",
    "check_tensors",
    "check_tiff",
    "describe_error",
    "expansion_limit",
    "map_array",
    "open_archive",
    "open_compressed",
    "open_picture",
    "read_array",
    "read_array_shape",
    "read_arrays",
    "read_csv",
    "read_json",
    "read_member",
    "reading",
]

__getattr__, __dir__ = lazy_attributes(__name__, _MODULES)
