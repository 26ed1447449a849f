"""Fields of the regional climate model MAR, brought to traces and summed between layer dates.

Shapes: M points, L layers (newest first), P physical fields, T time steps, C grid cells.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fulgurite.data.exclusions import name_some
from fulgurite.data.listing import match_files
from fulgurite.datamodules.ice_layers.climate.fields import (
    MEANS,
    NEEDS,
    PHYSICS,
    SUMS,
    check_field_units,
    derive_fields,
    plan_variables,
    to_celsius,
    unit_factor,
)
from fulgurite.datamodules.ice_layers.climate.files import (
    ClimateFile,
    check_same_grid,
    read_steps,
)
from fulgurite.datamodules.ice_layers.climate.grid import (
    PROJECTIONS,
    Grid,
    Weights,
    decode_projection,
    interval_weights,
    measure_covers,
)
from fulgurite.datamodules.ice_layers.stack import Array
from fulgurite.errors import ConfigError, DataError
from fulgurite.extras import optional_import

__all__ = ["PHYSICS", "ClimateRequest", "MarClimate", "Sample"]

log = logging.getLogger(__name__)

_YEAR = 365.25  # [days]
_OPTION = "--data.init_args.source.init_args.climate.init_args"


@dataclass(frozen=True)
class ClimateRequest:
    """Points of one flight, and the dates of its layer boundaries.

    Attributes:
        pos: Latitude and longitude [degrees]. Shape: (M, 2).
        edges: Dates of boundaries, the flight's first [days since 1970]. Shape: (L + 1,).
    """

    pos: Array
    edges: Array


@dataclass(frozen=True)
class Sample:
    """Physical fields at points.

    Attributes:
        physics: Shape: (M, L, P) float64.
        flag: 0 interpolated, 1 nearest. Shape: (M,) uint8.
        away: Distance to the nearest cell of ice [m]. Shape: (M,).
    """

    physics: Array
    flag: NDArray[np.uint8]
    away: Array


class MarClimate:
    """Fields of MAR over Greenland or Antarctica.

    On its native grid (2-D ``LAT`` and ``LON``), or on a polar stereographic one of ``x`` and ``y``
    (EPSG:3413 in the north, EPSG:3031 in the south).

    Sums and means go from one layer's date to the next, whatever the calendar; steps are those of
    CF bounds of the time, else follow from its stamps (:func:`step_edges`). Points outside the
    grid, or in a triangle with a cell that is not ice, get the nearest cell of ice and a flag.

    Physical fields: ``smb`` [mm w.e./yr], ``st`` surface temperature [degC], ``refreeze`` height of
    refrozen melt [m of ice per layer and year], ``melt`` height lost to melt [m of snow, negative],
    ``snowpack`` height of the snow [m]. ``RZ`` is ``ME + RF - RU`` where it is absent.

    Args:
        files: NetCDF files, folders or glob patterns, absolute or relative to ``FULGURITE_DATA``.
        projection: Projection in which the grid is triangulated; ``auto`` takes EPSG:3031 for
            grids in the south, else MAR's own; where the file has no 2-D ``LAT`` and ``LON``, what
            its grid mapping says, or without any, which a warning tells, EPSG:3031 for flights in
            the south, else EPSG:3413.
        variables: Physical fields to use, in this order.
        scale: MAR variable -> factor that brings the value of a step to mm w.e. (``ZN6`` m, ``ST``
            degC or K), where a file's unit is wrong, missing or unknown. By default the unit says
            it, be it of an amount or a rate; without one it is taken to be mm w.e. a step.
        reach: Points farther than this from any cell of ice are outside [m].

    Raises:
        ConfigError: A physical field or a MAR variable is unknown.

    Source: docs/papers/ice_layers.md section 3.3 (MAR's variables); the heights are inferred.
    """

    def __init__(
        self,
        files: list[str],
        projection: Literal["auto", "mar", "epsg3413", "epsg3031"] = "auto",
        variables: list[str] = list(PHYSICS),  # noqa: B006  # copied below
        scale: dict[str, float] = {},  # noqa: B006  # copied below
        *,
        reach: float = 50_000.0,
    ) -> None:
        unknown = [name for name in variables if name not in NEEDS]
        if unknown or not variables:
            raise ConfigError(
                f"There is no physical field {unknown[0] if unknown else '(none given)'}.",
                f"Set `{_OPTION}.variables` to some of {', '.join(NEEDS)}.",
            )
        mar_variables = [name for group in (*SUMS.values(), *MEANS.values()) for name in group]
        for key, factor in scale.items():
            if key not in mar_variables or not np.isfinite(factor) or factor == 0:
                raise ConfigError(
                    f"There is no scale {factor} of a MAR variable {key!r}.",
                    f"Set `{_OPTION}.scale` to factors of some of {', '.join(mar_variables)}.",
                )
        if len(set(variables)) < len(variables):
            raise ConfigError(
                f"A physical field comes twice in {', '.join(variables)}.",
                f"Set `{_OPTION}.variables` to each once.",
            )
        if not reach > 0:
            raise ConfigError(
                f"The reach of the climate grid is {reach:g} m.",
                f"Set `{_OPTION}.reach` above 0 [m].",
            )
        self.files = list(files)
        self.projection = projection
        self.variables = tuple(variables)
        self.scale = dict(scale)
        self.reach = reach

    @property
    def physics(self) -> tuple[str, ...]:
        """Names of the physical fields."""
        return self.variables

    def paths(self) -> list[Path]:
        """The files, sorted.

        Raises:
            DataError: There is no such file.
        """
        files: set[Path] = set()
        for pattern in self.files:
            files |= set(match_files(pattern, (".nc", ".nc4")))
        if not files:
            raise DataError(
                f"There is no climate file at {name_some(self.files)}.",
                f"Set `{_OPTION}.files` to NetCDF files, folders or glob patterns.",
            )
        return sorted(files)

    def sample(self, requests: Sequence[ClimateRequest]) -> list[Sample]:
        """Return the physical fields at the points of each request.

        The weights are computed once, for all points, variables and years.

        Raises:
            DataError: Files are damaged, lack a variable or a year, or have an implausible unit.
            MissingExtraError: netCDF4 or pyproj is not installed.
        """
        paths = self.paths()
        files = {path: ClimateFile(path) for path in paths}
        names_of_fields = [name for group in (SUMS, MEANS) for n in group.values() for name in n]
        steps, of_file = read_steps(paths, files, names_of_fields)
        pos = np.concatenate([request.pos for request in requests])
        if not np.isfinite(pos).all():
            raise DataError(
                f"{int((~np.isfinite(pos)).any(1).sum())} of {len(pos)} points have no position.",
                "Leave them out: latitudes and longitudes must be finite.",
            )
        with files[paths[0]] as file:
            grid, project = self._grid(file, pos[:, 0])
        points = project(pos)
        if not (on_plane := np.isfinite(points).all(1)).all():
            lost = pos[~on_plane]
            raise DataError(
                f"{len(lost)} of {len(pos)} points, such as {lost[0, 0]:.2f} N {lost[0, 1]:.2f} E, "
                "do not lie in the projection of the climate grid.",
                "Check latitudes and longitudes, or set "
                f"`{_OPTION}.projection` to one of {', '.join(PROJECTIONS)}.",
            )
        located = grid.locate(points)
        layer_fractions = [interval_weights(steps, request.edges) for request in requests]
        every_edges = [request.edges for request in requests]
        covers = measure_covers(steps, every_edges, layer_fractions)
        parts, first = [], 0
        for request in requests:
            part = slice(first, first := first + len(request.pos))
            used, inverse = np.unique(located.cells[part], return_inverse=True)
            cells = inverse.reshape(-1, 3).astype(np.int64)
            local = Weights(cells, located.weights[part], located.flag[part], located.away[part])
            parts.append((used, local))
        sums, names = self._accumulate(
            [files[path] for path in paths],
            of_file,
            steps,
            layer_fractions,
            used=[used for used, _ in parts],
            ice=grid.ice,
        )
        samples = []
        for request, cover, values, (_, local) in zip(requests, covers, sums, parts, strict=True):
            years = -np.diff(request.edges) / _YEAR * cover
            physics = local(derive_fields(self.variables, names, values, years))
            samples.append(Sample(physics, local.flag, local.away))
        check_field_units([sample.physics for sample in samples], self.variables, names)
        return samples

    def _grid(self, file: ClimateFile, latitudes: Array) -> tuple[Grid, Any]:
        pyproj = optional_import("pyproj", "ice", "Projecting climate grids")
        lat, lon = file.find(("LAT", "latitude")), file.find(("LON", "longitude"))
        axes = (lat, lon) if lat is not None and lon is not None else None
        two_d = axes is not None and axes[0].shape == axes[1].shape and axes[0].ndim == 2
        name, mapping = self.projection, None
        if name == "auto":
            # by the grid, as far as it says where it is: other flights do not count
            if not two_d and (mapping := file.grid_mapping) is not None:
                is_south = False  # the file says more
            elif axes is not None and two_d:
                rows = file.read(axes[0])
                is_south = bool(2 * (rows < 0).sum() > np.isfinite(rows).sum())
            else:
                is_south = self._in_south(latitudes, file)
            name = "epsg3031" if is_south else "mar" if two_d else "epsg3413"
            if not two_d and mapping is None:
                log.warning(
                    "%s does not say in which projection its x and y are. Since the flights are "
                    "in the %s, they are taken to be in %s; set %s.projection to say it.",
                    *(file.path, "south" if is_south else "north", PROJECTIONS[name], _OPTION),
                )
        projection = (
            pyproj.CRS.from_user_input(PROJECTIONS[name])
            if mapping is None
            else decode_projection(mapping, file.path)
        )
        to_grid = pyproj.Transformer.from_crs(projection.geodetic_crs, projection, always_xy=True)

        def project(pos: Array) -> Array:
            return np.stack(to_grid.transform(pos[:, 1], pos[:, 0]), 1)

        if axes is not None and two_d:
            flat = np.stack([file.read(axis).ravel() for axis in axes], 1)
            good, shape = np.isfinite(flat).all(1), axes[0].shape
            if not (np.abs(flat[good]) <= (90, 360)).all():
                raise DataError(
                    f"The coordinates {axes[0].name} and {axes[1].name} of {file.path} reach "
                    f"{np.abs(flat[good]).max():g}: they are no degrees.",
                    f"Call coordinates of the projection x and y, and set `{_OPTION}.projection`.",
                )
            points = np.full(flat.shape, np.nan)
            points[good] = project(flat[good])
        else:
            file.check_grid()
            x, y = file.need(("x",), "x"), file.need(("y",), "y")
            xs, ys = np.meshgrid(self._metres(x, file), self._metres(y, file))
            points = np.stack([xs.ravel(), ys.ravel()], 1)
            good, shape = np.ones(len(points), np.bool_), xs.shape
        good &= np.isfinite(points).all(1)
        points[~good] = np.nan
        mask = self._ice(file)
        if mask.shape != good.shape:
            raise DataError(
                f"The ice mask of {file.path} has {mask.size} cells, the grid {good.size}.",
                "Give files whose mask (SRF, MSK or MSK_MAR) is on the grid of the fields.",
            )
        ice = (mask & good & np.isfinite(self._first_step(file, shape)).all(0)).reshape(shape)
        return Grid(points[:, 0].reshape(shape), points[:, 1].reshape(shape), ice), project

    @staticmethod
    def _in_south(latitudes: Array, file: ClimateFile) -> bool:
        """Whether all points are in the south."""
        south = latitudes < 0
        if south.any() and not south.all():
            raise DataError(
                f"{int(south.sum())} of {len(south)} points are in the south, the others in the "
                f"north, and {file.path} has no LAT and LON that say where its grid is.",
                f"Set `{_OPTION}.projection` to that of the grid, epsg3413 or epsg3031.",
            )
        return bool(south.any())

    @staticmethod
    def _metres(variable: Any, file: ClimateFile) -> Array:
        """A projected coordinate [m]; kilometres are told by their size."""
        values = file.read(variable, is_axis=True)
        unit = str(variable.attributes.get("units", "")).strip().lower()
        small = float(np.abs(values).max()) < 20_000  # no part of Greenland is so near both axes
        if unit in ("m", "metre", "meter", "metres", "meters") and small:
            raise DataError(
                f"The coordinate {variable.name} of {file.path} is said to be in m, but reaches "
                f"only {np.abs(values).max():g}, as kilometres do.",
                "Correct the units of the file.",
            )
        if unit in ("km", "kilometre", "kilometer", "kilometres", "kilometers") and not small:
            raise DataError(
                f"The coordinate {variable.name} of {file.path} is said to be in km, but reaches "
                f"{np.abs(values).max():g}, as metres do.",
                "Correct the units of the file.",
            )
        return values * 1000.0 if small else values

    @staticmethod
    def _ice(file: ClimateFile) -> NDArray[np.bool_]:
        """Ice by ``SRF == 4``, else by a mask of fractions or percents.

        Source: docs/papers/ice_layers.md section 3.3.
        """
        surface = file.find(("SRF", "SRF_MAR"))
        if surface is not None:
            first = file.read(surface)
            ice: NDArray[np.bool_] = first.reshape(-1, *first.shape[-2:])[0].ravel() == 4
            return ice
        mask = file.find(("MSK", "MSK_MAR", "ICE", "AIS"))
        if mask is None:
            sized = file.need(("LAT", *(n for group in SUMS.values() for n in group)), "the grid")
            return np.ones(math.prod(sized.shape[-2:]), np.bool_)
        values = np.nan_to_num(file.read(mask))
        values = values.reshape(-1, *values.shape[-2:])[0].ravel()
        covered: NDArray[np.bool_] = values >= (50.0 if values.max() > 1 else 0.5)
        return covered

    def _first_step(self, file: ClimateFile, shape: tuple[int, ...]) -> Array:
        sources = {**SUMS, **MEANS}
        rows = []
        for name in plan_variables(file, self.variables):
            variable = file.need(sources[name], name)
            if variable.shape[-2:] != shape:
                raise DataError(
                    f"The variable {variable.name} of {file.path} has the shape {variable.shape}, "
                    f"which does not end in the grid's {shape}.",
                    "Give fields of time, y and x, or of time, sector, y and x.",
                )
            file.check_axes(variable)
            rows.append(file.read(variable, first=True).reshape(-1, shape[0] * shape[1])[0])
        return np.stack(rows)

    def _accumulate(
        self,
        files: Sequence[ClimateFile],
        of_file: NDArray[np.int64],
        steps: Array,
        layer_fractions: Sequence[Array],
        *,
        used: Sequence[NDArray[np.int64]],
        ice: NDArray[np.bool_],
    ) -> tuple[list[Array], list[str]]:
        """Sums (or means) of each basic field in each layer's interval: (V, C, L) per request."""
        days = steps[:, 1] - steps[:, 0]
        names: list[str] = []
        sums: list[Array] = []
        shape: tuple[int, ...] | None = None
        for number, file in enumerate(files):
            indices, path = np.flatnonzero(of_file == number), file.path
            file_fractions = [fractions[:, indices] for fractions in layer_fractions]
            if not any(part.any() for part in file_fractions):
                continue
            if not names:
                names = plan_variables(file, self.variables)
                sums = [
                    np.zeros((len(names), len(f), len(cells)))
                    for cells, f in zip(used, layer_fractions, strict=True)
                ]
            with file:
                check_same_grid(file, files[0])
                for v, name in enumerate(names):
                    variable = file.need({**SUMS, **MEANS}[name], name)
                    if shape is None:
                        shape = variable.shape[-2:]
                    if variable.shape[-2:] != shape:
                        raise DataError(
                            f"The grid of {path} is {variable.shape[-2:]}, of others {shape}.",
                            f"Set `{_OPTION}.files` to files of one grid.",
                        )
                    file.check_axes(variable)
                    values = file.field(variable)
                    if len(values) != len(indices):
                        raise DataError(
                            f"The variable {variable.name} of {path} has {len(values)} time steps, "
                            f"the time axis {len(indices)}.",
                            "Fetch the file again.",
                        )
                    values = values * unit_factor(
                        name, variable, days[indices], path, scale=self.scale
                    )
                    if name == "ST":
                        values = to_celsius(values, ice)
                    for total, part, cells in zip(sums, file_fractions, used, strict=True):
                        weight = part if name in SUMS else part * days[indices]
                        for layer in np.flatnonzero(part.any(1)):
                            inside = np.flatnonzero(part[layer])
                            amounts = weight[layer, inside, None] * values[np.ix_(inside, cells)]
                            # one by one: a product of matrices rounds by the number of cells
                            total[v, layer] += np.cumsum(amounts, 0)[-1]
                    if not all(np.isfinite(total[v]).all() for total in sums):
                        raise DataError(
                            f"The variable {variable.name} of {path} is missing on ice.",
                            "Fetch the file again, or correct its ice mask.",
                        )
        for total, fractions in zip(sums, layer_fractions, strict=True):
            for v, name in enumerate(names):
                if name in MEANS:
                    total[v] /= (fractions * days).sum(1)[:, None]
        return [total.swapaxes(1, 2) for total in sums], names
