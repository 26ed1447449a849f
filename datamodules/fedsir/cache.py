"""Decoded data sets on disk: written once, whole or not at all, then memory-mapped.

Shapes: N samples, C channels, H W image.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fulgurite.datamodules.fedsir.sources import ImageArrays
from fulgurite.io import cached_folder

__all__ = ["cached_arrays"]


def cached_arrays(key: str, write: Callable[[Path], tuple[str, ...]]) -> ImageArrays:
    """Return a data set from the cache, after filling it if the key is new.

    Args:
        key: Names the content, so that other content gets another key.
        write: Writes ``{train,test}_{images,labels}.npy`` into an empty folder and returns the
            class names. It runs in one process of the machine at a time; if it is killed, the
            cache has no such entry.

    Raises:
        DataError: What was written is inconsistent, or the cache cannot be written.
    """

    def fill(empty: Path) -> None:
        (empty / "classes.json").write_text(json.dumps(write(empty)))
        _open(empty)  # an inconsistent entry must not be kept

    return _open(cached_folder(key, fill))


def _open(folder: Path) -> ImageArrays:
    return ImageArrays(
        _map(folder / "train_images.npy"),
        torch.from_numpy(np.load(folder / "train_labels.npy")),
        _map(folder / "test_images.npy"),
        torch.from_numpy(np.load(folder / "test_labels.npy")),
        tuple(json.loads((folder / "classes.json").read_text())),
    )


def _map(path: Path) -> Tensor:
    # copy on write: torch wants writable memory, the file stays as it is
    return torch.from_numpy(np.load(path, mmap_mode="c"))
