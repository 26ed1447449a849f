"""Units of amounts of water and of temperatures, as climate files write them."""

from __future__ import annotations

import re
import unicodedata

__all__ = ["is_temperature", "water_unit"]

_YEAR = 365.25  # [days]
# Units, without blanks, dots and signs of powers: an amount, and the period of a rate [days]
_PERIODS = {"s": 1 / 86_400, "h": 1 / 24, "d": 1.0, "m": _YEAR / 12, "a": _YEAR, "y": _YEAR}
_PERIOD = r"s(?:ec(?:ond)?)?|h(?:r|our)?|d(?:ay)?|mon(?:th)?|a|y(?:r|ear)?"
_AMOUNT = re.compile(
    r"(?:(?P<length>(?:milli|centi)?met(?:er|re)s?|[mc]?m)"
    r"(?:of)?(?:w(?:ater)?eq?(?:uiv(?:alent)?)?|water|h2o)?|kg(?:/m2|m-2))"
    rf"(?:(?:/|per)(?P<per>{_PERIOD})|(?P<inverse>{_PERIOD})-1)?"
)
_TEMPERATURE = re.compile(r"(?:deg(?:ree)?s?|°)?(?:c|k|celsius|kelvin)")


def _squeeze(unit: str) -> str:
    """A unit without what writers differ in."""
    text = unicodedata.normalize("NFKC", unit).lower().replace("\u2212", "-")
    return re.sub(r"[\s._*^()]", "", text)


def water_unit(unit: str) -> tuple[float, float | None] | None:
    """Understand the unit of an amount of water, or of its rate.

    Returns:
        How many mm w.e. it is, and the rate's period [days] or None; None for an unknown unit.

    Example:
        >>> water_unit("mmWE"), water_unit("m w.e."), water_unit("kg m-2 yr-1"), water_unit("Gt")
        ((1.0, None), (1000.0, None), (1.0, 365.25), None)
    """
    match = _AMOUNT.fullmatch(_squeeze(unit))
    if match is None:
        return None
    length, period = match["length"], match["per"] or match["inverse"]
    sizes = {"c": 10.0, "m": 1000.0}  # centimetres, metres
    milli = length is None or length == "mm" or length.startswith("mi")
    return 1.0 if milli else sizes[length[0]], _PERIODS[period[0]] if period else None


def is_temperature(unit: str) -> bool:
    """Whether a unit is one of temperature.

    Example:
        >>> is_temperature("deg C"), is_temperature("mm")
        (True, False)
    """
    return _TEMPERATURE.fullmatch(_squeeze(unit)) is not None
