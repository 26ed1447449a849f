"""Whether travel times and positions of layer files are in seconds and degrees.

Shapes: M traces, K boundaries.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fulgurite.datamodules.ice_layers.stack import Array
from fulgurite.errors import DataError

__all__ = ["check_degrees", "check_seconds"]

_OPTION = "--data.init_args.source.init_args"
_LONGEST = 1e-3  # [s]: no aircraft is 150 km above
_NEAREST = 2e-7  # [s]: none flies 30 m above the first layer


def check_seconds(twtt: Array, path: Path) -> None:
    """Refuse travel times in another unit, from another origin, or with fill values in them.

    Args:
        twtt: Travel time to each boundary as the file has it; what is not positive is missing.
            Shape: (M, K).
        path: The file.

    Raises:
        DataError: The median is not plausible, a pick is not, or the surface is 0 s and the first
            layer too near to be seen from above.

    Source: the limits are inferred.
    """
    is_pick = np.isfinite(twtt) & (twtt > 0)
    if not is_pick.any():
        return
    picks = twtt[is_pick]
    if not 1e-9 < (middle := float(np.median(picks))) < _LONGEST:
        raise DataError(
            f"The median two-way travel time in {path} is {middle:g} s, which no aircraft "
            "measures.",
            "Convert travel times to seconds.",
        )
    if (impossible := picks[picks >= _LONGEST]).size:
        raise DataError(
            f"{impossible.size} travel times in {path} are no picks, such as {impossible[0]:g} s.",
            "Write NaN where nothing is picked.",
        )
    is_zero = (twtt == 0).any(0) & ~is_pick.any(0)
    first = np.where(is_pick, twtt, np.inf).min(1)
    nearest = float(np.median(first[np.isfinite(first)]))
    if is_zero.any() and nearest < _NEAREST:
        raise DataError(
            f"A boundary in {path} is at 0 s in each trace, and the first one below at "
            f"{nearest:g} s: times count from the surface, and 0 means that a pick is missing.",
            "Add the travel time to the surface to all boundaries; if it is not known, 1e-6 s.",
        )


def check_degrees(lat: Array, lon: Array, path: Path) -> None:
    """Refuse radians: as degrees, no ice is so near to where equator and prime meridian meet."""
    finite = np.isfinite(lat) & np.isfinite(lon)
    if finite.any() and (np.abs(lat[finite]) < np.pi / 2).all() and (np.abs(lon[finite]) < 4).all():
        raise DataError(
            f"The positions in {path} are those of radians, such as latitude {lat[finite][0]:g} "
            f"and longitude {lon[finite][0]:g}.",
            "Convert lat and lon to degrees, or leave such files out: "
            f"`{_OPTION}.exclude+=unreadable`.",
        )
