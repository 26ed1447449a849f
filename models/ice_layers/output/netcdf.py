"""Completed stacks as NetCDF-4 by the conventions CF-1.11 and ACDD-1.3.

Axes: N traces, L layers (newest first), K = L + 1 boundaries (the surface first).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fulgurite.domains.ice_layers.codes import METRES, Provenance
from fulgurite.domains.ice_layers.netcdf import name_field_variables, read_details
from fulgurite.errors import ConfigError
from fulgurite.extras import optional_import
from fulgurite.foreign import reading
from fulgurite.hdf5 import NetcdfFile, NetcdfVariable, need_package
from fulgurite.io import atomic_write
from fulgurite.models.ice_layers.output.origin import trace_times
from fulgurite.models.ice_layers.output.stacks import AGAIN, CompletedStack, make_stack

__all__ = ["check_attributes", "read_netcdf", "write_netcdf"]

_EPOCH = "seconds since 1970-01-01 00:00:00"
_FILLED = "gaps filled by a model"
_CONDITIONED = " conditioned on climate physics"
_BOUNDARY = ("picked", "completed", "missing")
# Units that UDUNITS knows, and names for people; a mm of water is a kg on a m².
_FIELDS = {
    "smb": ("kg m-2 year-1", "surface mass balance"),
    "st": ("degC", "surface temperature"),
    "refreeze": ("m", "height change by refreezing"),
    "melt": ("m", "height change by melt"),
    "snowpack": ("m", "height of the snowpack"),
    "density": ("kg m-3", "snow density"),
    "elevation": ("m", "surface elevation"),
}
# Attributes that the writer sets itself
_OWN = {
    "Conventions", "featureType", "title", "summary", "keywords", "source", "history",
    "references", "id", "date_created", "time_coverage_start", "time_coverage_end",
    "geospatial_lat_min", "geospatial_lat_max", "geospatial_lon_min", "geospatial_lon_max",
    "segment", "stack", "trained_segments", "physics_names", "checkpoint", "checkpoint_sha256",
    "climate_files", "time_scale", "unit",
}  # fmt: skip
_TRACE, _LAYER, _BOTH, _BOUNDARIES = (
    ("trace",),
    ("layer",),
    ("trace", "layer"),
    ("trace", "boundary"),
)


def check_attributes(attributes: dict[str, str]) -> dict[str, str]:
    """Return a copy of further attributes of a file, if their names are valid.

    Raises:
        ConfigError: A name is not valid, or is one that the writer sets itself.
    """
    for name, text in attributes.items():
        letters = name.replace("_", "a")
        if not (letters.isascii() and letters.isalnum() and letters[0].isalpha()) or name in _OWN:
            why = "is given by the writer itself" if name in _OWN else "is no name of an attribute"
            raise ConfigError(
                f"CompletionWriter.attributes has {name!r}, which {why}.",
                "Give such as license, institution, creator_name or acknowledgement.",
            )
        if not isinstance(text, str) or not text:
            raise ConfigError(
                f"CompletionWriter.attributes.{name} is {text!r}.", "Give a text for it."
            )
    return dict(attributes)


class _Writer:
    """Puts variables into an open file.

    Args:
        file: The open file.
        stack: The stack to write.
    """

    def __init__(self, file: Any, stack: CompletedStack) -> None:
        self.file, self.stack = file, stack
        is_length = stack.unit == METRES
        self.units, self.unit_note = ("m", "") if is_length else ("1", f" [{stack.unit}]")
        named = ["layer_name"] if stack.layer_names else []
        aged = ["layer_age"] if len(stack.layer_age) else []
        times = [] if stack.details.time is None else ["time"]
        positions = [*times, "latitude", "longitude"]
        self.coordinates = {
            _TRACE: " ".join(positions),
            _BOTH: " ".join([*positions, *named, *aged]),
            _BOUNDARIES: " ".join(
                [*positions, "boundary_name", *(["boundary_age"] if aged else [])]
            ),
        }

    def add(self, name: str, values: Any, dimensions: tuple[str, ...], **attributes: Any) -> None:
        """Add a variable of numbers; NaN are its missing values."""
        kind = values.dtype
        options: dict[str, Any] = {"zlib": True, "complevel": 4}
        if kind.kind == "f":
            # no coordinate of CF may be missing
            is_coordinate = name in " ".join(self.coordinates.values()).split()
            options["fill_value"] = None if is_coordinate else kind.type(np.nan)
        variable = self.file.createVariable(name, kind, dimensions, **options)
        variable.setncatts(attributes)
        variable[...] = values

    def add_data(self, name: str, values: Any, dims: tuple[str, ...], **attributes: Any) -> None:
        """Add a variable with the coordinates of its dimensions."""
        self.add(name, values, dims, coordinates=self.coordinates[dims], **attributes)

    def add_texts(
        self, name: str, values: Sequence[str], dimensions: tuple[str, ...], **attributes: Any
    ) -> None:
        """Add a variable of texts."""
        variable = self.file.createVariable(name, str, dimensions)
        variable.setncatts(attributes)
        for k, value in enumerate(values):
            variable[k] = str(value)

    # --- parts -------------------------------------------------------------------------------

    def add_positions(self) -> None:
        """Time and position of the traces, and where they are in the flight."""
        stack, details = self.stack, self.stack.details
        if details.time is not None:
            is_gps = details.time_scale == "GPS"
            self.add(
                "time", trace_times(details), _TRACE,
                standard_name="time", long_name="time of the trace", units=_EPOCH,
                calendar="standard", axis="T",
                units_metadata=f"leap_seconds: {'none' if is_gps else 'unknown'}",
                comment="UTC: GPS time less the leap seconds since 1980" if is_gps
                else "as in the source, which does not say whether it is UTC or GPS time",
            )  # fmt: skip
        self.add(
            "latitude", stack.pos[:, 0], _TRACE,
            standard_name="latitude", long_name="latitude", units="degrees_north",
        )  # fmt: skip
        self.add(
            "longitude", stack.pos[:, 1], _TRACE,
            standard_name="longitude", long_name="longitude", units="degrees_east",
        )  # fmt: skip
        self.add_data(
            "distance", stack.distance, _TRACE,
            long_name="distance along the track from the first trace of the stack", units="m",
        )  # fmt: skip
        if details.flight_distance is not None:
            self.add_data(
                "flight_distance", details.flight_distance, _TRACE,
                long_name="distance along the track from the first trace of the flight segment",
                units="m",
            )  # fmt: skip
        if details.time is not None and details.time_scale == "GPS":
            self.add_data(
                "gps_time", details.time, _TRACE, units="s",
                long_name="GPS time of the trace, counted from 1970-01-01 without leap seconds",
                comment="gps_time of the layer files, linear between their traces",
            )  # fmt: skip
        if details.elevation is not None:
            self.add_data(
                "elevation", details.elevation, _TRACE, units="m",
                standard_name="height_above_reference_ellipsoid",
                long_name="elevation of the radar, as in the layer files",
            )  # fmt: skip
        if details.frame is not None:
            self.add_texts(
                "frame", details.frame.tolist(), _TRACE, coordinates=self.coordinates[_TRACE],
                long_name="frame with the nearest trace of the layer files",
            )  # fmt: skip
        if details.trace is not None:
            self.add_data(
                "frame_trace", details.trace, _TRACE, units="1",
                long_name="number of the nearest trace in its frame, from 1",
            )  # fmt: skip

    def add_names(self) -> None:
        """Numbers, names and ages of layers and boundaries."""
        stack = self.stack
        layers = stack.observed.shape[1]
        names = stack.layer_names or tuple(f"layer_{k:02}" for k in range(1, layers + 1))
        self.add(
            "layer", np.arange(1, layers + 1, dtype=np.int32), _LAYER,
            long_name="number of the layer, newest first", units="1",
        )  # fmt: skip
        self.add(
            "boundary", np.arange(layers + 1, dtype=np.int32), ("boundary",), units="1",
            long_name="number of the boundary: 0 is the surface, k the lower one of layer k",
        )  # fmt: skip
        if stack.layer_names:
            self.add_texts("layer_name", names, _LAYER, long_name="name of the layer")
        texts = ("surface", *names)
        self.add_texts("boundary_name", texts, ("boundary",), long_name="name of the boundary")
        if len(stack.layer_age):
            comments = {"comment": stack.origin.age_source} if stack.origin.age_source else {}
            self.add(
                "layer_age", stack.layer_age, _LAYER, units="year", **comments,
                long_name="age of the layer's lower boundary at the flight",
            )  # fmt: skip
            self.add(
                "boundary_age", np.concatenate([[0.0], stack.layer_age]), ("boundary",),
                long_name="age of the boundary at the flight", units="year", **comments,
            )  # fmt: skip

    def add_layers(self) -> None:
        """Thickness and what belongs to it."""
        stack = self.stack
        self.add_data(
            "thickness", stack.thickness, _BOTH, units=self.units,
            long_name=f"thickness of the layer as it lies{self.unit_note}",
            ancillary_variables="provenance thickness_standard_deviation observed",
        )  # fmt: skip
        self.add_data(
            "thickness_standard_deviation", stack.std, _BOTH, units=self.units,
            long_name=f"standard deviation of the error of a filled thickness{self.unit_note}",
            comment="missing where the thickness was observed or left missing, and where no "
            "uncertainty was calibrated",
        )  # fmt: skip
        self.add_data(
            "provenance", stack.provenance, _BOTH,
            long_name="where the thickness is from", standard_name="status_flag",
            flag_values=np.array([*Provenance], np.uint8),
            flag_meanings=" ".join(code.meaning for code in Provenance),
        )  # fmt: skip
        self.add_data(
            "observed", stack.observed.astype(np.uint8), _BOTH,
            long_name="whether the thickness was observed", standard_name="status_flag",
            flag_values=np.arange(2, dtype=np.uint8), flag_meanings="missing observed",
            comment="observed values are those of the input at these traces, to which picks at raw "
            "traces were interpolated or averaged where they lie between these",
        )  # fmt: skip
        if stack.details.density is not None:
            self.add_data(
                "density", stack.details.density, _BOTH, units="g cm-3",
                long_name="density with which travel time became thickness",
                comment="the index of refraction is 1 + 0.845 times this number",
            )  # fmt: skip
        variables = name_field_variables(stack.physics_names)
        for k, (name, variable) in enumerate(zip(stack.physics_names, variables, strict=True)):
            units, long_name = _FIELDS.get(name, (None, name))
            attributes = {"units": units} if units else {}
            self.add_data(
                variable, stack.physics[..., k], _BOTH,
                long_name=f"{long_name}, of the climate model", **attributes,
            )  # fmt: skip

    def add_boundaries(self) -> None:
        """Depth and two-way travel time of the boundaries."""
        stack = self.stack
        flag = np.where(stack.picked, 0, np.where(np.isfinite(stack.depth), 1, 2))
        flag[:, 0] = np.where(stack.picked[:, 0], 0, 2)  # nothing completes a surface
        belongs = {"ancillary_variables": "boundary_provenance"}
        self.add_data(
            "depth", stack.depth, _BOUNDARIES, units=self.units, **belongs,
            long_name=f"depth of the boundary below the surface{self.unit_note}",
            comment="missing below the first layer that was left missing",
        )  # fmt: skip
        if stack.details.twtt is not None:
            self.add_data(
                "twtt", stack.details.twtt, _BOUNDARIES, units="s", **belongs,
                long_name="two-way travel time from the radar to the boundary",
                comment="missing where the surface was not picked",
            )  # fmt: skip
        self.add_data(
            "boundary_provenance", flag.astype(np.uint8), _BOUNDARIES,
            long_name="where the boundary is from", standard_name="status_flag",
            flag_values=np.arange(len(_BOUNDARY), dtype=np.uint8),
            flag_meanings=" ".join(_BOUNDARY),
        )  # fmt: skip


def _attributes(stack: CompletedStack) -> dict[str, Any]:
    """Attributes of the file; what is not known is left out."""
    import fulgurite

    now = datetime.now(UTC).isoformat(timespec="seconds")
    origin, details = stack.origin, stack.details
    latitude, longitude = stack.pos.T
    west, east = _longitude_range(longitude)
    filled = _FILLED + (_CONDITIONED if stack.physics_names else "")
    attributes: dict[str, Any] = {
        "Conventions": "CF-1.11, ACDD-1.3",
        "title": "Thickness of ice layers, completed where radar traces are broken",
        "source": "; ".join(part for part in (origin.source, filled) if part),
        "history": f"{now} fulgurite {fulgurite.__version__}: completed",
        "references": "arXiv 2604.20783",
        "id": stack.stack,
        "summary": f"Layers between the reflecting horizons of {len(stack.pos)} radar traces of "
        f"{stack.segment}: each is marked as observed, filled or left missing. Boundary 0 is the "
        "surface, boundary k the lower one of layer k.",
        "keywords": "ice sheet, snow radar, internal layers, layer thickness, accumulation",
        "date_created": now,
        "geospatial_lat_min": float(latitude.min()),
        "geospatial_lat_max": float(latitude.max()),
        "geospatial_lon_min": west,
        "geospatial_lon_max": east,
        "segment": stack.segment,
        "stack": stack.stack,
        "unit": stack.unit,
        # one name a line: CF has no lists of strings, and names may hold commas
        "trained_segments": "\n".join(stack.trained_segments),
        "physics_names": "\n".join(stack.physics_names),
    }
    if details.time is not None:
        attributes |= {"featureType": "trajectory", "time_scale": details.time_scale}
        time = trace_times(details)
        for name, value in (("start", time.min()), ("end", time.max())):
            moment = datetime.fromtimestamp(float(value), UTC)
            attributes[f"time_coverage_{name}"] = moment.isoformat(timespec="milliseconds")
    for name in ("checkpoint", "checkpoint_sha256"):
        if text := getattr(origin, name):
            attributes[name] = text
    if origin.climate_files:
        attributes["climate_files"] = "\n".join(origin.climate_files)
    return attributes | dict(origin.attributes or {})


def _longitude_range(longitude: NDArray[np.float64]) -> tuple[float, float]:
    """Western and eastern end of the traces, also across the date line [degrees].

    Example:
        >>> _longitude_range(np.array([179.5, -179.5]))
        (179.5, -179.5)
    """
    turned = np.where(longitude < 0, longitude + 360.0, longitude)
    if np.ptp(longitude) > 180.0 > np.ptp(turned):
        west, east = longitude[turned.argmin()], longitude[turned.argmax()]
        return float(west), float(east)
    return float(longitude.min()), float(longitude.max())


def write_netcdf(path: str | Path, stack: CompletedStack) -> Path:
    """Write a stack as NetCDF-4 with CF attributes, atomically.

    Args:
        path: The file.
        stack: The stack to write.

    Raises:
        MissingExtraError: netCDF4 is not installed.
    """
    netcdf = optional_import(
        "netCDF4", "ice", "Writing completed stacks as NetCDF", "write npz alone"
    )
    path = Path(path)
    n, layers = stack.observed.shape
    with atomic_write(path) as temporary, netcdf.Dataset(temporary, "w", format="NETCDF4") as file:
        for name, size in (("trace", n), ("layer", layers), ("boundary", layers + 1)):
            file.createDimension(name, size)
        file.setncatts(_attributes(stack))
        writer = _Writer(file, stack)
        writer.add_positions()
        if stack.details.time is not None:
            variable = file.createVariable("trajectory", str)
            variable.setncatts({"cf_role": "trajectory_id", "long_name": "name of the stack"})
            variable[...] = stack.stack
        writer.add_names()
        writer.add_layers()
        writer.add_boundaries()
    return path


def _comment(variables: Mapping[str, NetcdfVariable], name: str) -> str:
    return str(variables[name].attributes.get("comment", "")) if name in variables else ""


def read_netcdf(path: str | Path) -> CompletedStack:
    """Read what :func:`write_netcdf` wrote.

    Raises:
        MissingExtraError: netCDF4 is not installed.
        DataError: The file is damaged, or no completed stack.
    """
    with reading(path, "The completed stack", AGAIN):
        try:
            file = NetcdfFile(path)
        except ImportError as error:
            raise need_package(error, "Reading completed stacks as NetCDF") from error
        with file:
            return make_stack(path, _read_content(file))


def _read_content(file: NetcdfFile) -> dict[str, Any]:
    attributes, variables = file.attributes, file.variables

    def values(name: str) -> NDArray[Any]:
        return file.read(name, is_masked=False)

    def lines(name: str) -> list[str]:
        return [line for line in str(attributes.get(name, "")).split("\n") if line]

    names = str(attributes["physics_names"]).split("\n") if attributes["physics_names"] else []
    physics = [values(variable) for variable in name_field_variables(names)]
    thickness = values("thickness")
    content: dict[str, Any] = {
        "thickness": thickness,
        "provenance": values("provenance"),
        "std": values("thickness_standard_deviation"),
        "observed": values("observed"),
        "physics": np.stack(physics, -1) if physics else np.zeros((*thickness.shape, 0)),
        "pos": np.stack([values("latitude"), values("longitude")], -1),
        "distance": values("distance"),
        "segment": attributes["segment"],
        "stack": attributes["stack"],
        "unit": attributes.get("unit", METRES),
        "trained_segments": lines("trained_segments"),
        "physics_names": names,
        "layer_names": file.read_texts("layer_name") if "layer_name" in variables else (),
        "layer_age": values("layer_age") if "layer_age" in variables else (),
        "climate_files": lines("climate_files"),
        "age_source": _comment(variables, "layer_age"),
        "source": str(attributes.get("source", ""))
        .removesuffix(_CONDITIONED)
        .removesuffix(_FILLED)
        .removesuffix("; "),
    }
    for name in ("checkpoint", "checkpoint_sha256", "time_scale"):
        content[name] = attributes.get(name, "")
    return content | read_details(file)
