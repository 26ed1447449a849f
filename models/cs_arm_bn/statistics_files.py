"""Files of the statistics that a prediction took from the controls of each plate.

Axes: S plate statistics.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from torch import Tensor

from fulgurite.io import to_file_name
from fulgurite.tensor_files import read_state_dict

__all__ = ["locate_statistics", "read_statistics"]


def locate_statistics(folder: Path, plate: str) -> Path:
    """Return the path of the statistics of a plate without its ending ``.pt`` or ``.json``.

    It is the plate's name, with a digest where the file of this name is of another plate, such as
    ``a_b`` and ``a/b``.
    """
    path = folder / to_file_name(plate)
    try:
        owner = json.loads(path.with_name(f"{path.name}.json").read_text(encoding="utf-8"))["plate"]
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or no record
        return path
    if owner == plate:
        return path
    return path.with_name(f"{path.name}-{hashlib.sha256(plate.encode()).hexdigest()[:8]}")


def read_statistics(folder: Path, plate: str) -> dict[str, Tensor]:
    """Read the statistics of a plate that a prediction wrote.

    Raises:
        CheckpointError: The file does not exist or cannot be read.
    """
    path = locate_statistics(folder, plate)
    hint = f"There are none of plate {plate}: predict with its controls first."
    tensors: dict[str, Tensor] = read_state_dict(
        path.with_name(f"{path.name}.pt"), "ControlContext.statistics", hint
    )[1]
    return tensors
