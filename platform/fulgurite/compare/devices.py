"""Which accelerators the workers of a comparison see."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["VISIBLE", "device_count", "device_groups", "visible_devices"]

VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible_devices(available: int, environ: Mapping[str, str] | None = None) -> list[str]:
    """Names of the GPUs that this process sees, as ``CUDA_VISIBLE_DEVICES`` spells them.

    Args:
        available: How many GPUs torch sees.
        environ: The environment; this process's by default.

    Example:
        >>> visible_devices(2, {}), visible_devices(2, {"CUDA_VISIBLE_DEVICES": "3,MIG-5a"})
        (['0', '1'], ['3', 'MIG-5a'])
        >>> visible_devices(0, {"CUDA_VISIBLE_DEVICES": "3"})
        []
    """
    listed = (os.environ if environ is None else environ).get(VISIBLE)
    if available < 1:
        return []
    if listed is None:
        return [str(number) for number in range(available)]
    names = [
        *itertools.takewhile(
            lambda name: name not in ("", "-1"), listed.replace(" ", "").split(",")
        )
    ]
    # of several MIG devices torch counts one, since a process can use no more
    return names if any(name.startswith("MIG-") for name in names) else names[:available]


def device_groups(names: Sequence[str], size: int = 1) -> list[str]:
    """What each worker is to see, as values of ``CUDA_VISIBLE_DEVICES``.

    Args:
        names: The GPUs.
        size: How many of them each worker needs; 0 for all.

    Example:
        >>> device_groups(["0", "1", "2", "3"], 2), device_groups(["0", "1"], 0)
        (['0,1', '2,3'], ['0,1'])
    """
    if not names:
        return []
    size = min(size, len(names)) or len(names)
    usable = len(names) - len(names) % size
    return [",".join(names[i : i + size]) for i in range(0, usable, size)]


def device_count(configuration: Any) -> int:
    """How many accelerators a resolved configuration takes; 0 for all that are there.

    Example:
        >>> [device_count({"trainer": {"devices": d}}) for d in (1, 3, "2", [0, 3], "auto", -1)]
        [1, 3, 2, 4, 0, 0]
        >>> device_count({"trainer": {"devices": 3, "accelerator": "cpu"}})
        1
    """
    trainer = configuration.get("trainer") if isinstance(configuration, dict) else None
    if not isinstance(trainer, dict) or trainer.get("accelerator") == "cpu":
        return 1
    devices = trainer.get("devices", 1)
    try:
        if isinstance(devices, str) and "," in devices:
            devices = [int(part) for part in devices.split(",") if part.strip()]
        if isinstance(devices, list):  # positions among the devices that are seen
            return max(int(position) for position in devices) + 1
        return max(0, int(devices))
    except (TypeError, ValueError):
        return 0
