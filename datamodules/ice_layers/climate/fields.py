"""Physical fields out of the variables of MAR: names, units, formulas and plausible values.

Shapes: M points, L layers (newest first), P physical fields, V fields of MAR, T time steps,
C grid cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fulgurite.datamodules.ice_layers.climate.files import ClimateFile
from fulgurite.datamodules.ice_layers.climate.units import is_temperature, water_unit
from fulgurite.datamodules.ice_layers.stack import Array
from fulgurite.errors import DataError
from fulgurite.hdf5 import NetcdfVariable

__all__ = [
    "MEANS",
    "NEEDS",
    "PHYSICS",
    "SUMS",
    "check_field_units",
    "derive_fields",
    "plan_variables",
    "to_celsius",
    "unit_factor",
]

#: The physical fields of the paper, with their units. Source: docs/papers/ice_layers.md section 1.1
#: (names), the annual units are inferred.
PHYSICS = {
    "smb": "mm w.e./yr",
    "st": "degC",
    "refreeze": "m",
    "melt": "m",
    "snowpack": "m",
}

# Density of ice and of the snow that melts [kg m⁻³]: heights from water equivalents (inferred)
_ICE, _SNOW = 917.0, 350.0
# Physical field -> the sets of MAR variables that it can be made of, the first found is used
SUMS = {
    "SMB": ("SMB", "SMBcorr", "SMB2"),
    "ME": ("ME", "MEcorr"),
    "RU": ("RU", "RUcorr", "RU2corr"),
    "RF": ("RF", "RFcorr"),
    "RZ": ("RZ",),
    "SF": ("SF",),
    "SU": ("SU",),
}
MEANS = {"ST": ("ST", "STcorr", "ST2", "TT"), "ZN6": ("ZN6",)}
NEEDS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "smb": (("SMB",),),
    "st": (("ST",),),
    "refreeze": (("RZ",), ("ME", "RF", "RU"), ("ME", "RU")),
    "melt": (("ME",),),
    "snowpack": (("ZN6",), ("SF", "SU"), ("SF",)),
}
# What lies between the 5 % and 95 % quantiles of physical fields, within generous bounds (inferred)
_HEIGHTS = {
    "refreeze": (-0.03, 5.0, "ME, RF, RU or RZ"),
    "melt": (-30.0, 0.01, "ME"),
    "snowpack": (-100.0, 100.0, "ZN6"),
}
_OPTION = "--data.init_args.source.init_args.climate.init_args"


def plan_variables(file: ClimateFile, fields: Sequence[str]) -> list[str]:
    """Return the names of the MAR fields that physical fields are made of.

    Args:
        file: A climate file.
        fields: Names of physical fields.

    Raises:
        DataError: The file lacks a variable.
    """
    plan: list[str] = []
    sources = {**SUMS, **MEANS}
    for name in fields:
        for option in NEEDS[name]:
            if all(file.find(sources[basic]) is not None for basic in option):
                plan += [basic for basic in option if basic not in plan]
                break
        else:
            file.need([sources[b][0] for b in NEEDS[name][0]], f"the field {name}")
    return plan


def unit_factor(
    name: str, variable: NetcdfVariable, days: Array, path: Path, *, scale: Mapping[str, float]
) -> Array:
    """Return the factor of a variable's steps to mm w.e. per step, m or degC. Shape: (T, 1).

    Args:
        name: Name of the MAR field.
        variable: The variable, whose unit says it.
        days: Length of each step [days]. Shape: (T,).
        path: The file.
        scale: Factors that replace those of units, by variable or field.

    Raises:
        DataError: The unit is unknown.
    """
    one = np.ones((len(days), 1))
    if variable.name in scale or name in scale:
        return one * scale.get(variable.name, scale.get(name, 1.0))
    unit = str(variable.attributes.get("units", "")).strip()
    if not unit or (name == "ST" and is_temperature(unit)):
        return one
    amount = water_unit(unit)
    if amount is None or name == "ST" or (name in MEANS and amount[1]):
        target_unit = {"ST": "degC or K", "ZN6": "m"}.get(name, "mm w.e. a step")
        raise DataError(
            f"The unit {unit!r} of the variable {variable.name} of the climate file {path} is "
            "not known.",
            f"Set `{_OPTION}.scale={{{variable.name}: ...}}` to the factor to {target_unit}.",
        )
    size, period = amount
    if name in MEANS:
        return one * (size / 1000.0)  # heights in metres
    if period is None:
        return one * size
    # a rate; a month's or a year's in steps of this length is the step's amount
    steps = days[:, None] / period
    return size * np.where(np.abs(steps - 1) < 0.1, 1.0, steps)


def to_celsius(temperature: Array, ice: NDArray[np.bool_]) -> Array:
    """Convert a file's temperatures [degC or K], told apart by its median over ice, to degC.

    Shape:
        - temperature: (T, C); ice: (C,); result (T, C).

    Example:
        >>> to_celsius(np.array([[250.0, 290.0]]), np.array([True, False])).round(2)
        array([[-23.15,  16.85]])
    """
    known = temperature[0, ice & np.isfinite(temperature[0])]
    middle = float(np.median(known)) if known.size else 0.0
    return temperature - 273.15 if 150 <= middle <= 300 else temperature


def derive_fields(
    fields: Sequence[str], names: Sequence[str], values: Array, years: Array
) -> Array:
    """Return physical fields (C, L, P) of MAR fields (V, C, L).

    Args:
        fields: Names of the physical fields.
        names: Names of the V MAR fields.
        values: Sums or means of the MAR fields in each layer's interval.
        years: Length of these intervals [years]. Shape: (L,).
    """
    basic = dict(zip(names, values, strict=True))
    if "RZ" not in basic and "ME" in basic and "RU" in basic:
        basic["RZ"] = basic["ME"] + basic.get("RF", 0.0) - basic["RU"]
    formulas = {
        "smb": lambda: basic["SMB"] / years,
        "st": lambda: basic["ST"],
        "refreeze": lambda: basic["RZ"] / _ICE / years,
        "melt": lambda: -basic["ME"] / _SNOW / years,
        "snowpack": lambda: (
            basic["ZN6"] if "ZN6" in basic else (basic["SF"] - basic.get("SU", 0.0)) / _SNOW / years
        ),
    }
    return np.stack([formulas[name]() for name in fields], -1)


def check_field_units(
    physics: Sequence[Array], fields: Sequence[str], names: Sequence[str]
) -> None:
    """Find unit mix-ups by what is plausible on an ice sheet.

    Args:
        physics: Physical fields of each request. Shape of each: (M, L, P).
        fields: Names of the P physical fields.
        names: Names of the MAR fields that they were made of.

    Raises:
        DataError: The values of a field are not plausible in its unit.
    """
    for p, name in enumerate(fields):
        values = np.concatenate([sample[..., p].ravel() for sample in physics])
        middle = float(np.median(values)) if values.size else 0.0
        if name == "st":
            if not -90 <= middle <= 15:
                raise DataError(
                    f"The median surface temperature is {middle:g} degC, as if it were in "
                    "neither degC nor K.",
                    f"Correct the files, or set `{_OPTION}.scale`.",
                )
        elif name == "smb" and values.size and not 15 <= (middle := abs(middle)) <= 20_000:
            guess, factor = "m w.e.", "1000"
            if middle == 0:
                raise DataError(
                    "The surface mass balance is 0 at most points, as outside of what was "
                    "computed.",
                    "Give files with an ice mask (SRF, MSK or MSK_MAR), or NaN where they have no "
                    "values.",
                )
            if middle >= 2:
                guess, factor = "mm w.e. a day, and each step had a month of them", "30.4"
            if middle >= 15:
                guess, factor = "another unit than mm w.e., or had fill values unnamed", "..."
            raise DataError(
                f"The median surface mass balance is {middle:g} mm w.e. a year, as if the "
                f"files were in {guess}.",
                f"Set `{_OPTION}.scale={{SMB: {factor}}}` (and those of ME, RU, RF, RZ) to the "
                "factor to mm w.e. a step.",
            )
        elif name in _HEIGHTS and values.size:
            low, high, made_of = _HEIGHTS[name]
            if name == "snowpack" and "ZN6" not in names:
                low, made_of = 0.02, "SF or SU"
            lowest, highest = np.quantile(values, (0.05, 0.95))
            if lowest < low or highest > high:
                raise DataError(
                    f"The {name} of a year is from {lowest:g} to {highest:g} m at most points, "
                    f"which is not plausible: {made_of} may be in another unit than it says.",
                    f"Set `{_OPTION}.scale` to its factor to mm w.e. a step (ZN6: m), or leave "
                    f"{name} out of `{_OPTION}.variables`.",
                )
