"""Where an entry of a completed stack is from, and the units that thicknesses may have."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["METRES", "RANGE_BINS", "UNITS", "Provenance"]

METRES, RANGE_BINS = "m", "range bins"

UNITS = (METRES, RANGE_BINS)
"""Units that thicknesses may have."""


class Provenance(IntEnum):
    """Where the thickness of an entry is from; the code that files hold, as uint8.

    Source: docs/papers/ice_layers.md section 1.7.

    Example:
        >>> int(Provenance.FILLED), Provenance.WHOLE_LAYER_FILLED.meaning
        (1, 'whole_layer_filled')
    """

    OBSERVED = 0
    FILLED = 1
    WHOLE_LAYER_FILLED = 2
    LEFT_MISSING = 3

    @property
    def meaning(self) -> str:
        """The word for it in NetCDF files and figures."""
        return self.name.lower()
