"""Decoded data sets on disk: written once, whole or not at all, then memory-mapped.

Shapes: N samples, C channels, H W image.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fulgurite.datamodules.fedsir.sources import ImageArrays
from fulgurite.io import atomic_write, cache_folder, file_lock

__all__ = ["cached_arrays"]


def cached_arrays(key: str, write: Callable[[Path], tuple[str, ...]]) -> ImageArrays:
    """Return a data set from the cache, after filling it if the key is new.

    Args:
        key: Names the content, so that other content gets another key.
        write: Writes ``{train,test}_{images,labels}.npy`` into an empty folder and returns the
            class names. It runs in one process of the machine at a time; if it is killed, the
            cache has no such entry.

    Raises:
        DataError: What was written is inconsistent.
    """
    folder = cache_folder() / key
    if not folder.exists():
        with file_lock(folder.with_name(f"{key}.lock")):
            if not folder.exists():
                for left_over in folder.parent.glob(f".{key}.tmp-*"):
                    shutil.rmtree(left_over, ignore_errors=True)  # of a killed process
                try:
                    with atomic_write(folder) as temporary:
                        temporary.mkdir()
                        names = write(temporary)
                        (temporary / "classes.json").write_text(json.dumps(names))
                        _open(temporary)  # an inconsistent entry must not be kept
                except OSError:
                    if not folder.exists():  # else another rank was faster
                        raise
    return _open(folder)


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
