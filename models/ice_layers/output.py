"""Completed stacks on disk: npz for programs, NetCDF with CF attributes for people and tools.

Axes: N traces, L layers (newest first), P physical fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fulgurite.errors import DataError, MissingExtraError
from fulgurite.foreign import read_arrays, reading
from fulgurite.hdf5 import NetcdfFile, need_package
from fulgurite.io import atomic_write

__all__ = [
    "PROVENANCE",
    "CompletedStack",
    "completed_stacks",
    "file_name",
    "read_netcdf",
    "read_npz",
    "write_netcdf",
    "write_npz",
]

PROVENANCE = ("observed", "filled", "whole_layer_filled", "left_missing")
"""Meanings of the values of ``provenance``."""

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
_AGAIN = "Write it again with `fulgurite predict`."
_STRINGS = ("segment", "stack")
_LISTS = ("trained_segments", "physics_names", "layer_names")
_NUMBERS = {
    "thickness": np.float64,
    "provenance": np.uint8,
    "std": np.float32,
    "observed": np.bool_,
    "physics": np.float32,
    "pos": np.float64,
    "distance": np.float64,
    "layer_age": np.float64,
}


@dataclass(frozen=True, eq=False)
class CompletedStack:
    """One stack with every gap filled or marked, and what says where each value is from.

    Args:
        thickness: Completed [m]; NaN where left missing. Shape: (N, L), float64.
        provenance: 0 observed, 1 filled, 2 filled in a wholly absent layer, 3 left missing.
            Shape: (N, L), uint8.
        std: Standard deviation of filled values [m], NaN elsewhere. Shape: (N, L), float32.
        observed: Shape: (N, L), bool.
        physics: Shape: (N, L, P), float32.
        pos: Latitude and longitude [degrees]. Shape: (N, 2), float64.
        distance: Along the track from the first trace [m]. Shape: (N,), float64.
        segment: Name of the flight segment.
        stack: Name of the stack.
        trained_segments: Names of the segments that the completing model was trained on.
        physics_names: Of the fields; P of them.
        layer_names: L of them; numbered if empty.
        layer_age: Age of each layer's lower boundary [years]; empty if unknown. Shape: (L,).

    Raises:
        DataError: Shapes or provenance do not fit together.
    """

    thickness: NDArray[np.float64]
    provenance: NDArray[np.uint8]
    std: NDArray[np.float32]
    observed: NDArray[np.bool_]
    physics: NDArray[np.float32]
    pos: NDArray[np.float64]
    distance: NDArray[np.float64]
    segment: str
    stack: str
    trained_segments: tuple[str, ...]
    physics_names: tuple[str, ...]
    layer_names: tuple[str, ...] = ()
    layer_age: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        n, layers = self.observed.shape
        expected = {"physics": (n, layers, len(self.physics_names)), "pos": (n, 2)}
        expected |= {"thickness": (n, layers), "provenance": (n, layers), "std": (n, layers)}
        expected |= {"distance": (n,)}
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise DataError(
                    f"The completed stack {self.stack} has {name} of shape "
                    f"{getattr(self, name).shape}, not {shape}.",
                    "Give arrays of one number of traces and layers.",
                )
        for name in ("layer_names", "layer_age"):
            if len(getattr(self, name)) not in (0, layers):
                raise DataError(
                    f"The completed stack {self.stack} has {len(getattr(self, name))} {name} for "
                    f"{layers} layers.",
                    "Give one for each layer, or none.",
                )
        if ((self.provenance == 0) != self.observed).any() or (
            self.provenance >= len(PROVENANCE)
        ).any():
            raise DataError(
                f"The provenance of the completed stack {self.stack} contradicts what is observed.",
                "Take it from fulgurite.models.ice_layers.provenance.",
            )
        if (~np.isfinite(self.thickness) != (self.provenance == 3)).any():
            raise DataError(
                f"The completed stack {self.stack} has values where it was left missing, or none "
                "where it was filled.",
                "Take them from fulgurite.models.ice_layers.complete.",
            )


def file_name(name: str) -> str:
    """A stack's name as the name of a file without ending.

    Example:
        >>> file_name("20120330_01/003")
        '20120330_01_003'
    """
    return "".join(c if c.isalnum() or c in "-+._" else "_" for c in name) or "stack"


def _numbers(value: Any) -> NDArray[Any]:
    return np.asarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value)


def completed_stacks(
    batch: Any,
    filled: Any,
    segments: Sequence[str],
    stacks: Sequence[str],
    trained_segments: Sequence[str],
    physics_names: Sequence[str],
    layer_names: Sequence[str] = (),
    layer_age: Any = (),
) -> list[CompletedStack]:
    """Take the stacks of a predicted batch apart.

    Args:
        batch: PyG's, with ``observed``, ``physics``, ``pos``, ``distance``, ``segment``, ``stack``
            and ``ptr``.
        filled: ``thickness``, ``provenance`` and ``std`` of the batch, as ``predict_step`` gives.
        segments: Names of the segments, by number.
        stacks: Names of the stacks, by number.
        trained_segments: Names of the segments that the model was trained on.
        physics_names: P names.
        layer_names: L names.
        layer_age: [years]. Shape: (L,) or (0,).
    """
    arrays = {name: _numbers(filled[name]) for name in ("thickness", "provenance", "std")}
    arrays |= {n: _numbers(getattr(batch, n)) for n in ("observed", "physics", "pos", "distance")}
    arrays = {name: value.astype(_NUMBERS[name]) for name, value in arrays.items()}
    bounds = _numbers(batch.ptr).tolist()
    which = zip(_numbers(batch.segment).tolist(), _numbers(batch.stack).tolist(), strict=True)
    return [
        CompletedStack(
            **{name: value[start:stop] for name, value in arrays.items()},
            segment=segments[segment],
            stack=stacks[stack],
            trained_segments=tuple(trained_segments),
            physics_names=tuple(physics_names),
            layer_names=tuple(layer_names),
            layer_age=np.asarray(layer_age, np.float64),
        )
        for start, stop, (segment, stack) in zip(bounds, bounds[1:], which, strict=False)
    ]


# --- npz ---------------------------------------------------------------------------------------


def write_npz(path: str | Path, stack: CompletedStack) -> Path:
    """Write a stack as arrays of numbers and Unicode, atomically.

    Args:
        path: The file.
        stack: What to write.

    Example:
        >>> import tempfile
        >>> one = np.ones((2, 1))
        >>> stack = CompletedStack(one, np.zeros((2, 1), np.uint8), np.float32(one * np.nan),
        ...     one > 0, np.zeros((2, 1, 0), np.float32), np.zeros((2, 2)), np.arange(2.0),
        ...     "20120330_01", "20120330_01_0000", ("20110401_02",), ())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     read_npz(write_npz(Path(folder) / "a.npz", stack)).trained_segments
        ('20110401_02',)
    """
    path = Path(path)
    content: dict[str, Any] = {name: getattr(stack, name) for name in _NUMBERS}
    content |= {name: np.array(getattr(stack, name)) for name in _STRINGS}
    content |= {name: np.array(getattr(stack, name), dtype=np.str_) for name in _LISTS}
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **content)
    return path


def read_npz(path: str | Path) -> CompletedStack:
    """Read what :func:`write_npz` wrote; nothing in the file is executed.

    Raises:
        DataError: The file is damaged, or no completed stack.
    """
    with reading(path, "The completed stack", _AGAIN):
        return _stack(path, read_arrays(path))


def _stack(path: str | Path, content: dict[str, Any]) -> CompletedStack:
    wanted = [f.name for f in fields(CompletedStack)]
    if missing := [name for name in wanted if name not in content]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    values_of: dict[str, Any] = {
        name: _converted(name, np.asarray(content[name]), kind) for name, kind in _NUMBERS.items()
    }
    values_of |= {name: str(content[name]) for name in _STRINGS}
    values_of |= {name: tuple(str(v) for v in np.atleast_1d(content[name])) for name in _LISTS}
    try:
        return CompletedStack(**values_of)
    except DataError as error:
        raise DataError(f"The file {path} is unusable: {error.what}", error.mend) from error


def _converted(name: str, values: NDArray[Any], kind: type[np.generic]) -> NDArray[Any]:
    """Numbers as the type that a stack has them in, without changing any."""
    if values.dtype.kind not in "biuf" and values.size:
        raise ValueError(f"{name} is not made of numbers")
    with np.errstate(invalid="ignore", over="ignore"):
        converted = values.astype(kind)
    if np.dtype(kind).kind in "bu" and (converted != values).any():
        raise ValueError(f"{name} holds other values than {np.dtype(kind)}")
    return converted


# --- NetCDF ------------------------------------------------------------------------------------


def _netcdf() -> Any:
    try:
        import netCDF4
    except ImportError as error:
        raise MissingExtraError(
            "Completed stacks as NetCDF need netCDF4.",
            "Install it with `pip install 'fulgurite[ice]'`, or write npz alone.",
        ) from error
    return netCDF4


def write_netcdf(path: str | Path, stack: CompletedStack) -> Path:
    """Write a stack as NetCDF-4 with CF attributes, atomically.

    Args:
        path: The file.
        stack: What to write.

    Raises:
        MissingExtraError: netCDF4 is not installed.
    """
    import fulgurite

    netcdf, path = _netcdf(), Path(path)
    n, layers = stack.observed.shape
    with atomic_write(path) as temporary, netcdf.Dataset(temporary, "w", format="NETCDF4") as file:
        file.createDimension("trace", n)
        file.createDimension("layer", layers)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        file.setncatts(
            {
                "Conventions": "CF-1.11",
                "title": "Thickness of ice layers, completed where radar traces are broken",
                "source": "radar layer traces; gaps filled by a model conditioned on climate "
                "physics",
                "history": f"{now} fulgurite {fulgurite.__version__}: completed",
                "references": "arXiv 2604.20783",
                "segment": stack.segment,
                "stack": stack.stack,
                # one name a line: CF has no lists of strings, and names may hold commas
                "trained_segments": "\n".join(stack.trained_segments),
                "physics_names": "\n".join(stack.physics_names),
            }
        )

        def add(name: str, values: Any, dimensions: tuple[str, ...], **attributes: Any) -> None:
            kind = values.dtype
            options: dict[str, Any] = {"zlib": True, "complevel": 4}
            if kind.kind == "f":
                # no coordinate of CF may be missing
                options["fill_value"] = None if len(dimensions) < 2 else kind.type(np.nan)
            made = file.createVariable(name, kind, dimensions, **options)
            made.setncatts(attributes)
            made[...] = values

        def text(name: str, values: Sequence[str], dimension: str, **attributes: Any) -> None:
            made = file.createVariable(name, str, (dimension,))
            made.setncatts(attributes)
            for k, value in enumerate(values):
                made[k] = value

        trace, both = ("trace",), ("trace", "layer")
        places = {"coordinates": "latitude longitude distance"}
        add(
            "latitude", stack.pos[:, 0], trace,
            standard_name="latitude", long_name="latitude", units="degrees_north",
        )  # fmt: skip
        add(
            "longitude", stack.pos[:, 1], trace,
            standard_name="longitude", long_name="longitude", units="degrees_east",
        )  # fmt: skip
        add(
            "distance", stack.distance, trace,
            long_name="distance along the track from the first trace", units="m",
        )  # fmt: skip
        add(
            "layer", np.arange(1, layers + 1, dtype=np.int32), ("layer",),
            long_name="number of the layer, newest first", units="1",
        )  # fmt: skip
        if stack.layer_names:
            text("layer_name", stack.layer_names, "layer", long_name="name of the layer")
        if len(stack.layer_age):
            add(
                "layer_age", stack.layer_age, ("layer",),
                long_name="age of the layer's lower boundary at the flight", units="year",
            )  # fmt: skip
        add(
            "thickness", stack.thickness, both, units="m",
            long_name="thickness of the layer as it lies", **places,
            ancillary_variables="provenance thickness_standard_deviation observed",
        )  # fmt: skip
        add(
            "thickness_standard_deviation", stack.std, both, units="m", **places,
            long_name="standard deviation of the error of a filled thickness",
            comment="missing where the thickness was observed or left missing",
        )  # fmt: skip
        add(
            "provenance", stack.provenance, both, **places,
            long_name="where the thickness is from", standard_name="status_flag",
            flag_values=np.arange(len(PROVENANCE), dtype=np.uint8),
            flag_meanings=" ".join(PROVENANCE),
        )  # fmt: skip
        add(
            "observed", stack.observed.astype(np.uint8), both, **places,
            long_name="whether the thickness was observed", standard_name="status_flag",
            flag_values=np.arange(2, dtype=np.uint8), flag_meanings="missing observed",
        )  # fmt: skip
        for k, name in enumerate(stack.physics_names):
            units, long_name = _FIELDS.get(name, (None, name))
            known = {"units": units} if units else {}
            add(
                _variable(k, name), stack.physics[..., k], both,
                long_name=f"{long_name}, of the climate model", **known, **places,
            )  # fmt: skip
    return path


def _variable(number: int, name: str) -> str:
    """Name of a field's variable: CF allows letters, digits and underscores."""
    letters = "".join(c if c.isascii() and (c.isalnum() or c == "_") else "_" for c in name)
    return f"climate_{letters}" if letters.strip("_") else f"climate_{number}"


def read_netcdf(path: str | Path) -> CompletedStack:
    """Read what :func:`write_netcdf` wrote.

    Raises:
        MissingExtraError: netCDF4 is not installed.
        DataError: The file is damaged, or no completed stack.
    """
    with reading(path, "The completed stack", _AGAIN):
        try:
            file = NetcdfFile(path)
        except ImportError as error:
            raise need_package(error, "Reading completed stacks as NetCDF") from error
        said, variables = file.attributes, file.variables

        def values(name: str) -> NDArray[Any]:
            return file.read(name, is_masked=False)

        names = tuple(name for name in str(said["physics_names"]).split("\n") if name)
        physics = [values(_variable(k, name)) for k, name in enumerate(names)]
        thickness = values("thickness")
        return _stack(
            path,
            {
                "thickness": thickness,
                "provenance": values("provenance"),
                "std": values("thickness_standard_deviation"),
                "observed": values("observed"),
                "physics": np.stack(physics, -1) if physics else np.zeros((*thickness.shape, 0)),
                "pos": np.stack([values("latitude"), values("longitude")], -1),
                "distance": values("distance"),
                "segment": said["segment"],
                "stack": said["stack"],
                "trained_segments": [v for v in str(said["trained_segments"]).split("\n") if v],
                "physics_names": names,
                "layer_names": file.read_texts("layer_name") if "layer_name" in variables else (),
                "layer_age": values("layer_age") if "layer_age" in variables else (),
            },
        )
