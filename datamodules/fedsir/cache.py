"""Decoded data sets on disk: written once, atomically, then memory-mapped.

Shapes: N samples, C channels, H W image.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from fulgurite.data.store import ArrayStore, cached_store
from fulgurite.datamodules.fedsir.sources import ImageArrays

__all__ = ["cached_arrays"]


def cached_arrays(key: str, write: Callable[[Path], tuple[str, ...]]) -> ImageArrays:
    """Return a data set from the cache, which is filled if the key is new.

    Args:
        key: Key of the content; other content must have another key.
        write: Writes ``{train,test}_{images,labels}.npy`` into an empty folder and returns the
            class names. It runs in one process of the machine at a time; if it is killed, the
            cache has no such entry.

    Raises:
        DataError: The written arrays are inconsistent, or the cache cannot be written.
    """

    def write_facts(empty: Path) -> dict[str, tuple[str, ...]]:
        return {"class_names": write(empty)}

    return _load_arrays(cached_store(key, write_facts, check=_load_arrays))


def _load_arrays(store: ArrayStore) -> ImageArrays:
    return ImageArrays(
        torch.from_numpy(store.copy("train_images")),
        torch.from_numpy(np.array(store["train_labels"])),
        torch.from_numpy(store.copy("test_images")),
        torch.from_numpy(np.array(store["test_labels"])),
        tuple(store.facts["class_names"]),
    )
