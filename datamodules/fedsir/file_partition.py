"""A partition from a file.

Shapes: N samples, K clients.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fulgurite.datamodules.fedsir.annotations import AnnotationFile, file_kind, read_indices
from fulgurite.datamodules.fedsir.partition import Partition, number_clients
from fulgurite.datamodules.fedsir.samples import Samples
from fulgurite.errors import DataError
from fulgurite.io import data_path

__all__ = ["FilePartition"]

_OPTION = "--data.init_args.partition.init_args"


class FilePartition(Partition):
    """Assigns images to the clients that a file names.

    The file is a table (``.csv``, ``.tsv``, ``.parquet``) with a column ``client`` and a column
    ``path`` (the image as the source names it) or ``row`` (its number in the source, from 0), a
    list of lines ``path client`` (``.txt``), or the rows of each client as JSON, such as
    ``{"0": [0, 3], "1": [1, 2]}``, as Flower's partitioners give them. The file names
    each training image once. Clients are numbered in the order of their names, numbers by value.

    Args:
        path: The file, absolute or relative to ``FULGURITE_DATA``.
        client: Column with the client.
        path_column: Column with the name of the image.
        row_column: Column with the row of the image.
        unknown: Action for images that the source does not train on: ``error`` or ``ignore``.

    Raises:
        ConfigError: The kind of the file is unknown.
        DataError: The file cannot be read, an image is repeated, missing or unknown, or the number
            of clients is not ``clients``.

    Source: inferred.
    """

    def __init__(
        self,
        path: str,
        client: str = "client",
        path_column: str = "path",
        row_column: str = "row",
        *,
        unknown: Literal["error", "ignore"] = "error",
    ) -> None:
        self.kind = file_kind(path, f"{_OPTION}.path", "table", "list", "json")
        self.path, self.client = path, client
        self.file = AnnotationFile(path, _OPTION, path_column, row_column, unknown)

    def assign(
        self, samples: Samples, clients: int, num_classes: int, generator: torch.Generator
    ) -> Tensor:
        """Return the client of each sample: see :meth:`Partition.assign`."""
        if self.kind == "json":
            by_row = read_indices(data_path(self.path), samples.listing)
        else:
            by_row = self.file.read(samples.listing, self.client)[self.client]
        names = [by_row[row] or "" for row in samples.rows.tolist()]
        if missing := [i for i, name in enumerate(names) if not name]:
            raise DataError(
                f"The file {data_path(self.path)} names no client for "
                f"{samples.describe(torch.tensor(missing))}.",
                "Name one for each training image.",
            )
        all_names = {name for name in by_row if name}
        return number_clients(names, all_names, clients, f"The file {self.path}")
