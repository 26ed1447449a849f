"""Predictions read back."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from fulgurite.errors import DataError
from fulgurite.predictions.columns import Array

__all__ = ["read_predictions"]


def read_predictions(path: str | Path) -> dict[str, Array | list[Array]]:
    """Read a file of predictions: an array for each key, or a list of rows where they differ.

    Raises:
        DataError: The file does not exist, or is damaged.

    Example:
        >>> import tempfile, torch
        >>> from fulgurite.predictions import PredictionFile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = PredictionFile(Path(folder) / "predictions.npz")
        ...     file.append({"boxes": [torch.zeros(2, 4), torch.ones(1, 4)], "name": ["a", "b"]})
        ...     _ = file.close()
        ...     found = read_predictions(file.path)
        >>> [boxes.shape for boxes in found["boxes"]], found["name"].tolist()
        ([(2, 4), (1, 4)], ['a', 'b'])
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(
            f"The predictions {path} cannot be read ({error}).",
            "Name a file that `fulgurite predict` wrote.",
        ) from error
    rows: dict[str, Array | list[Array]] = {}
    for key, array in arrays.items():
        base, _, suffix = key.rpartition(".")
        if suffix in ("lengths", "shapes") and base in arrays:
            continue
        if (lengths := arrays.get(f"{key}.lengths")) is not None:
            rows[key] = np.split(array, np.cumsum(lengths))[:-1]
        elif (shapes := arrays.get(f"{key}.shapes")) is not None:
            parts = np.split(array, np.cumsum(shapes.prod(1)))[:-1]
            rows[key] = [p.reshape(s) for p, s in zip(parts, shapes, strict=True)]
        else:
            rows[key] = array
    return rows
