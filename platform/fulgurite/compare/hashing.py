"""The hash by which trials, trainings and their data are known."""

from __future__ import annotations

import hashlib
import json

__all__ = ["digest"]


def digest(defining: object) -> str:
    """Hash of plain data.

    >>> digest({"a": 1}) == digest({"a": 1}) != digest({"a": 2})
    True
    """
    text = json.dumps(defining, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
