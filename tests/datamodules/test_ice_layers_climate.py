"""Climate fields at traces: projection, weights, sums between dates, masks, units; firn; time."""

import cftime
import netCDF4
import numpy as np
import pytest
import scipy.spatial
from fakes.ice_layers import FLIGHT_DAY
from fakes.ice_layers import layer_files as make_reader
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj import CRS, Transformer

from fulgurite.datamodules.ice_layers import MarClimate
from fulgurite.datamodules.ice_layers.climate.files import ClimateFile
from fulgurite.datamodules.ice_layers.climate.grid import PROJECTIONS, interval_weights, step_edges
from fulgurite.datamodules.ice_layers.climate.mar import ClimateRequest
from fulgurite.datamodules.ice_layers.readers.layer_writer import write_layer_file
from fulgurite.datamodules.ice_layers.tracks.firn import (
    herron_langway,
    layer_density,
    smb_to_layers,
)
from fulgurite.datamodules.ice_layers.tracks.resample import (
    break_at_jumps,
    cut_blocks,
    great_circle_distance,
    measure_track,
    resample,
)
from fulgurite.datamodules.ice_layers.tracks.travel_time import (
    remove_crossed,
    thickness_to_time,
    time_to_thickness,
)
from fulgurite.errors import ConfigError, DataError

YEAR = 365.25
EDGES = FLIGHT_DAY - np.arange(3) * YEAR
CRS_OF = {name: CRS.from_user_input(text) for name, text in PROJECTIONS.items()}


def project(pos, name="mar"):
    crs = CRS_OF[name]
    transformer = Transformer.from_crs(crs.geodetic_crs, crs, always_xy=True)
    return np.stack(transformer.transform(pos[:, 1], pos[:, 0]), 1)


def points(count=30, seed=0):
    generator = np.random.default_rng(seed)
    return np.stack([generator.uniform(70, 72, count), generator.uniform(-42, -38, count)], 1)


def plane(x, y):
    """A field that linear interpolation reproduces."""
    return 400.0 + x * 2e-4 - y * 1e-4


def write(folder, years=(2009, 2010, 2011, 2012), name="mar", daily=False, native=False, **changes):
    """MAR files: SMB is a plane a year; options replace or add variables (None removes them)."""
    crs = CRS_OF[name]
    origin = (0.0, 0.0)
    if name != "mar":
        centre = [[71.0, -40.0]] if name == "epsg3413" else [[-75.0, 0.05]]
        origin = tuple(project(np.array(centre), name)[0])
    x = origin[0] + np.arange(-200e3, 201e3, 20e3)
    y = origin[1] + np.arange(-200e3, 241e3, 20e3)
    xs, ys = np.meshgrid(x, y)
    back = Transformer.from_crs(crs, crs.geodetic_crs, always_xy=True)
    lon, lat = back.transform(xs, ys)
    for year in years:
        first = np.datetime64(f"{year}-01-01", "D")
        if daily:
            start = first + np.arange((np.datetime64(f"{year + 1}-01-01", "D") - first).astype(int))
            length = np.ones(len(start))
            middle = start.astype(float) + 0.5
        else:
            months = np.datetime64(f"{year}-01", "M") + np.arange(13)
            edges = months.astype("datetime64[D]").astype(float)
            length, middle = np.diff(edges), (edges[:-1] + edges[1:]) / 2
        share = (length / YEAR)[:, None, None]
        unit = "mmWE/day" if daily else "mmWE/month"
        fields = {
            "SMB": (share * plane(xs, ys), unit),
            "ME": (share * np.full(xs.shape, 91.7), unit),
            "RU": (share * np.full(xs.shape, 0.0), unit),
            "ST": (np.full((len(share), *xs.shape), -20.0), "C"),
            "ZN6": (np.full((len(share), *xs.shape), 1.5), "m"),
        }
        static = {"SRF": (np.full(xs.shape, 4.0), "-")}
        if name == "mar" or native:
            static |= {"LAT": (lat, "degrees"), "LON": (lon, "degrees")}
        for key, change in changes.items():
            group = static if key in ("SRF", "MSK", "LAT", "LON") else fields
            if change is None:
                group.pop(key)
            else:
                old = group.get(key, group.get("ME", (np.zeros(xs.shape), unit)))
                new = change(*old)
                group[key] = new if isinstance(new, tuple) else (new, old[1])
        path = folder / f"MARv3.12-{year}.nc"
        with netCDF4.Dataset(path, "w") as data:
            for key, size in (("x", len(x)), ("y", len(y)), ("TIME", len(share)), ("SECTOR", 2)):
                data.createDimension(key, size)
            scale = 1000.0 if name == "mar" else 1.0
            for key, values in (("x", x / scale), ("y", y / scale)):
                data.createVariable(key, "f8", (key,))[:] = values
            time = data.createVariable("TIME", "f8", ("TIME",))
            time.units = "hours since 1901-01-15 00:00:00"
            offset = np.datetime64("1901-01-15", "D").astype(float)
            time[:] = (middle - offset) * 24
            for key, (values, units) in (fields | static).items():
                dims = {2: ("y", "x"), 3: ("TIME", "y", "x"), 4: ("TIME", "SECTOR", "y", "x")}
                fill = 1e36 if values.dtype.kind == "f" else None
                variable = data.createVariable(key, "f8", dims[values.ndim], fill_value=fill)
                variable.units = units
                variable[:] = values


def sample(folder, pos=None, edges=EDGES, **options):
    pos = points() if pos is None else pos
    climate = MarClimate([str(folder)], **options)
    (found,) = climate.sample([ClimateRequest(pos, edges)])
    return found


@pytest.mark.parametrize("name", ["mar", "epsg3413"])
@pytest.mark.parametrize("daily", [False, True])
def test_sums_between_dates_at_projected_points(tmp_path, name, daily):
    write(tmp_path, name=name, daily=daily)
    found = sample(tmp_path)
    x, y = project(points(), name).T
    for layer in range(2):  # a year is a year, whatever the calendar
        np.testing.assert_allclose(
            found.physics[:, layer, 0], plane(x, y), rtol=1e-9 if daily else 3e-3
        )
    np.testing.assert_allclose(found.physics[..., 1], -20.0)
    np.testing.assert_allclose(found.physics[..., 2], 0.1, rtol=3e-3)  # 91.7 mm w.e. of ice
    np.testing.assert_allclose(found.physics[..., 3], -0.262, rtol=3e-3)
    np.testing.assert_allclose(found.physics[..., 4], 1.5)
    assert not found.flag.any()


def test_days_that_no_file_has_are_as_the_others_of_their_layer(tmp_path, log):
    write(tmp_path, daily=True)
    whole = sample(tmp_path)
    assert not log.text
    end = float(np.datetime64("2013-01-01", "D").astype(int))
    fields = sample(tmp_path, edges=end + 12 - np.arange(3) * YEAR)  # 12 days are missing
    np.testing.assert_allclose(fields.physics, whole.physics, rtol=1e-6)
    assert "lack some days of layers of 1 of 1 flights" in log.text


@pytest.mark.parametrize("native", [False, True])
def test_antarctica_is_in_its_own_projection(tmp_path, native):
    write(tmp_path, name="epsg3031", native=native)
    generator = np.random.default_rng(0)
    pos = np.stack([generator.uniform(-76, -74, 30), generator.uniform(-3, 3, 30)], 1)
    fields = sample(tmp_path, pos)
    x, y = project(pos, "epsg3031").T
    np.testing.assert_allclose(fields.physics[:, 0, 0], plane(x, y), rtol=3e-3)
    assert not fields.flag.any()
    assert fields.away.max() < 20e3
    assert sample(tmp_path, np.array([[-70.5, 140.0], [-75.0, 0.0]])).away[0] > 1e6


@pytest.mark.parametrize(
    ("name", "pos", "words"),
    [
        ("epsg3413", (70.5, -40.0), "are in the north, they are taken to be in EPSG:3413"),
        ("epsg3031", (-75.0, 0.0), "are in the south, they are taken to be in EPSG:3031"),
    ],
)
def test_a_projection_that_no_file_says_is_told(tmp_path, log, name, pos, words):
    write(tmp_path, (2011, 2012), name=name)
    sample(tmp_path, np.array([pos]), EDGES[:2], projection=name)
    assert not log.text
    sample(tmp_path, np.array([pos]), EDGES[:2])
    assert words in log.text
    name_projection(tmp_path, CRS.from_epsg(int(name[4:])).to_cf())
    log.clear()
    sample(tmp_path, np.array([pos]), EDGES[:2])
    assert not log.text


def name_projection(folder, attributes):
    """Give files a grid mapping."""
    for path in folder.glob("*.nc"):
        with netCDF4.Dataset(path, "r+") as data:
            data.createVariable("crs", "i4", ()).setncatts(attributes)


def test_a_grid_mapping_says_where_the_grid_is(tmp_path):
    write(tmp_path, (2011, 2012), name="epsg3031")
    north, edges = np.array([[71.0, -40.0]]), EDGES[:2]
    name_projection(tmp_path, CRS.from_epsg(3031).to_cf())
    south = sample(tmp_path, np.array([[-75.0, 0.05]]), edges)
    x, y = project(np.array([[-75.0, 0.05]]), "epsg3031").T
    np.testing.assert_allclose(south.physics[:, 0, 0], plane(x, y), rtol=3e-3)
    assert sample(tmp_path, north, edges).away[0] > 1e7


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"grid_mapping_name": "polar"}, "cannot be understood"),
        ({"grid_mapping_name": "latitude_longitude"}, "no projection in metres"),
    ],
)
def test_grid_mappings_that_say_no_projection_are_refused(tmp_path, attributes, message):
    write(tmp_path, (2011, 2012), name="epsg3413")
    name_projection(tmp_path, attributes)
    with pytest.raises(DataError, match=message) as error:
        sample(tmp_path, edges=EDGES[:2])
    assert "climate.init_args.projection" in error.value.hint
    assert not sample(tmp_path, edges=EDGES[:2], projection="epsg3413").flag.any()


def test_points_that_do_not_project_are_named(tmp_path):
    write(tmp_path)
    pos = np.array([[71.0, -40.0], [-70.5, 140.0]])  # the antipode of the projection's centre
    with pytest.raises(DataError, match=r"1 of 2 points, such as -70.50 N 140.00 E") as error:
        sample(tmp_path, pos, projection="mar")
    assert "epsg3031" in error.value.hint


def test_coordinates_that_are_no_degrees(tmp_path):
    write(tmp_path, LAT=lambda v, u: v * 111, LON=lambda v, u: v * 37)
    with pytest.raises(DataError, match=r"LAT and LON of .* are no degrees") as error:
        sample(tmp_path)
    assert "climate.init_args.projection" in error.value.hint


def test_constants_and_years_that_are_not_over(tmp_path):
    write(tmp_path)
    whole = sample(tmp_path).physics
    with netCDF4.Dataset(tmp_path / "MARv3.12-constants.nc", "w") as data:
        data.createDimension("x", 3)
        data.createVariable("SH", "f8", ("x",))[:] = 1.0
    with netCDF4.Dataset(tmp_path / "MARv3.12-2012.nc", "r+") as data:
        data["TIME"][8:] = 9.969209968386869e36
        for name in ("SMB", "ME", "RU", "ST", "ZN6"):
            data[name][8:] = 9.969209968386869e36
    np.testing.assert_array_equal(sample(tmp_path).physics, whole)
    for path in tmp_path.glob("*20*.nc"):
        path.unlink()
    with pytest.raises(
        DataError, match=r"constants.nc has no variable for time.* Call the time of"
    ):
        sample(tmp_path)


def add_other_files(folder):
    """A file of constants without steps, and one of another field at one moment."""
    for name, steps in (("constants", (0,)), ("orography", ())):
        with netCDF4.Dataset(folder / f"MARv3.12-{name}.nc", "w") as data:
            data.createDimension("t", 0)
            time = data.createVariable("TIME", "f8", ("t",) if steps else ())
            time.units = "days since 2000-01-01"
            time[...] = np.zeros(steps)
            data.createDimension("x", 3)
            data.createVariable("SH", "f8", ("x",))[:] = 1.0


def test_files_without_steps_and_without_fields_are_left_out(tmp_path):
    write(tmp_path)
    alone = sample(tmp_path).physics
    add_other_files(tmp_path)
    np.testing.assert_array_equal(sample(tmp_path).physics, alone)
    for path in tmp_path.glob("*20*.nc"):
        path.unlink()
    with pytest.raises(DataError, match=r"orography.nc does not say where its cells are"):
        sample(tmp_path)


def test_days_of_a_year_of_360_days(tmp_path):
    write(tmp_path, daily=True)
    expected = sample(tmp_path).physics
    for path in tmp_path.glob("*.nc"):
        year = int(path.stem[-4:])
        with netCDF4.Dataset(path, "r") as data:
            variables = {
                name: (v.dimensions, np.ma.filled(v[:], np.nan), getattr(v, "units", ""))
                for name, v in data.variables.items()
            }
            sizes = {name: len(d) for name, d in data.dimensions.items()}
        path.unlink()
        factor = sizes["TIME"] / 360
        with netCDF4.Dataset(path, "w") as data:
            for name, size in sizes.items():
                data.createDimension(name, 360 if name == "TIME" else size)
            for name, (dims, values, units) in variables.items():
                variable = data.createVariable(name, "f8", dims)
                variable.units = units
                if name == "TIME":
                    variable.units, variable.calendar = f"days since {year}-01-01", "360_day"
                    variable[:] = np.arange(360) + 0.5
                else:
                    is_sum = name in ("SMB", "ME", "RU")
                    variable[:] = (
                        values[:360] * (factor if is_sum else 1) if "TIME" in dims else values
                    )
    np.testing.assert_allclose(sample(tmp_path).physics, expected, rtol=1e-2)


def test_layers_longer_than_a_year_are_sums_by_year(tmp_path):
    write(tmp_path, daily=True)
    yearly = sample(tmp_path).physics[:, 0, 0]
    longer = sample(tmp_path, edges=FLIGHT_DAY - np.array([0.0, 2.5]) * YEAR).physics[:, 0, 0]
    np.testing.assert_allclose(longer, yearly, rtol=1e-9)


def test_each_years_layer_gets_that_year(tmp_path):
    for year in (2009, 2010, 2011, 2012):
        write(tmp_path, (year,), daily=True, ST=lambda v, u, year=year: v * 0 + year - 2030.0)
    found = sample(tmp_path).physics[0, :, 1]
    share = 105 / 365.25  # of 2012 before the flight, roughly
    np.testing.assert_allclose(found, [share * -18 + (1 - share) * -19] - np.arange(2), atol=0.01)


def test_weights_are_computed_once(tmp_path, monkeypatch):
    write(tmp_path)
    calls = []
    original = scipy.spatial.cKDTree
    monkeypatch.setattr(
        scipy.spatial, "cKDTree", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    requests = [ClimateRequest(points(seed=k), EDGES - k * 30) for k in range(4)]
    together = MarClimate([str(tmp_path)]).sample(requests)
    assert len(calls) == 2  # cells of ice, and the grid: for all flights, variables and years
    for request, found in zip(requests, together, strict=True):
        alone = sample(tmp_path, request.pos, request.edges)
        np.testing.assert_array_equal(found.physics, alone.physics)


def test_cells_without_ice_are_not_used(tmp_path):
    def half(values, units):
        ice = np.full(values.shape, 4.0)
        ice[:, :10] = 2.0
        return ice

    def spoil(values, units):
        values[:, :, :10] = 1e36
        return values

    write(tmp_path, SRF=half, SMB=spoil)
    found = sample(tmp_path)
    assert 0 < found.flag.sum() < len(found.flag)
    assert np.isfinite(found.physics).all()
    x = project(points())[:, 0]
    np.testing.assert_array_equal(found.flag == 1, x < 0)  # the first column of ice is x = 0
    assert (found.physics[..., 0] < 500).all()
    np.testing.assert_allclose(found.away[x < -20e3], -x[x < -20e3], atol=10e3)


@pytest.mark.parametrize("fill", [1e36, 999.0, -9999.0, np.nan])
def test_fill_values_are_no_climate(tmp_path, fill):
    def spoil(values, units):
        values[:, :, :10] = fill
        return values

    write(tmp_path, ST=spoil)
    found = sample(tmp_path)
    assert found.flag.any()
    np.testing.assert_allclose(found.physics[..., 1], -20.0)


def test_fill_values_on_ice_of_a_later_month_are_an_error(tmp_path):
    def spoil(values, units):
        values[5] = 1e36
        return values

    write(tmp_path, ME=spoil)
    with pytest.raises(DataError, match=r"ME of .* is missing on ice"):
        sample(tmp_path)


def test_percent_masks_are_masks(tmp_path):
    write(tmp_path, SRF=None, MSK=lambda v, u: np.where(np.arange(21) < 10, 20.0, 95.0) + 0 * v)
    assert sample(tmp_path).flag.any()


def test_sectors_are_combined_by_their_fractions(tmp_path):
    def sectors(values, units):
        return np.stack([values, values * 0 - 5.0], 1)

    def fractions(values, units):
        return np.stack([values * 0 + 75.0, values * 0 + 25.0], 1)

    write(tmp_path, ST=sectors, FRA=fractions)
    np.testing.assert_allclose(sample(tmp_path).physics[..., 1], -20 * 0.75 - 5 * 0.25)
    write(tmp_path, ST=sectors)  # without fractions: the first is ice
    np.testing.assert_allclose(sample(tmp_path).physics[..., 1], -20.0)


def test_refreezing_follows_from_the_water(tmp_path):
    write(tmp_path, RU=lambda v, u: v + 10 / YEAR * 30, RF=lambda v, u: v * 0 + 20 / YEAR * 30)
    made = sample(tmp_path).physics[..., 2]
    np.testing.assert_allclose(
        made, (91.7 + 20 * 12 * 30 / YEAR - 10 * 12 * 30 / YEAR) / 917, rtol=0.01
    )
    write(tmp_path, RZ=lambda v, u: v * 0.5)
    np.testing.assert_allclose(sample(tmp_path).physics[..., 2], 0.05, rtol=3e-3)


def test_units_by_attribute(tmp_path):
    write(tmp_path, SMB=lambda v, u: (v / 1000, "m w.e./month"), ST=lambda v, u: (v + 273.15, "K"))
    found = sample(tmp_path)
    np.testing.assert_allclose(found.physics[:, 0, 0], plane(*project(points()).T), rtol=3e-3)
    np.testing.assert_allclose(found.physics[..., 1], -20.0)
    write(tmp_path, SMB=lambda v, u: (v / 30.4, "mmWE/day"))  # a rate, in steps of months
    rate = sample(tmp_path).physics[:, 0, 0]
    np.testing.assert_allclose(rate, plane(*project(points()).T), rtol=0.02)


def per_step(values, unit):
    """A month's or day's amounts in a unit, of those in mm w.e."""
    first = unit.replace(".", " ").partition(" ")[0]
    amount = {"m": 1e-3, "cm": 0.1}.get(first, 1.0)
    length = {12: YEAR / 12}.get(len(values), 1.0)
    for period, days in (("yr", YEAR), ("a-1", YEAR), ("/year", YEAR), ("day", 1), ("d-1", 1)):
        if period in unit:
            return values * amount / length * days
    if "s-1" in unit or "/s" in unit or "s**-1" in unit:
        return values * amount / length / 86_400
    return values * amount


UNITS = (
    *("", "mmWE", "mm", "cm w.e.", "m w.e.", "m.w.e.", "m of water equivalent"),
    *("kg m-2", "kg/m^2", "mm w.e./yr", "mmWE/year", "kg m-2 a-1", "m w.e. yr-1"),
    *("mm/day", "mm d-1", "kg/m2/s", "kg m**-2 s**-1", "kg m⁻² s⁻¹"),
)
BY_DAY = ("mmWE", "m w.e. yr-1", "mm/day", "kg/m2/s")  # an amount, and a rate of each period


@pytest.mark.parametrize(
    ("unit", "daily"),
    [
        *((unit, False) for unit in UNITS),
        *(
            pytest.param(unit, True, marks=[] if unit in BY_DAY else pytest.mark.slow)
            for unit in UNITS
        ),
    ],
)
def test_amounts_and_rates_of_water(tmp_path, unit, daily):
    plain = unit.replace("⁻¹", "-1")
    names = dict.fromkeys(("SF", "RZ", "SMB", "ME", "RU"), lambda v, u: (per_step(v, plain), unit))
    write(tmp_path, years=(2010, 2011, 2012), daily=daily, ZN6=None, **names)
    found = sample(tmp_path, edges=EDGES[:2]).physics[:, 0]
    expected = np.tile([-20.0, 0.1, -0.262, 0.262], (30, 1))
    np.testing.assert_allclose(found[:, 1:], expected, rtol=0.02)
    np.testing.assert_allclose(found[:, 0], plane(*project(points()).T), rtol=0.02)


@pytest.mark.parametrize(
    "unit",
    [
        *("mm w.e./decade", "degC"),
        *(pytest.param(unit, marks=pytest.mark.slow) for unit in ("Gt", "mm h", "inch", "kg")),
    ],
)
def test_unknown_units_are_refused(tmp_path, unit):
    write(tmp_path, RU=lambda v, u: (v, unit))
    with pytest.raises(DataError, match=rf"unit '{unit}' of the variable RU of .*2010.nc") as error:
        sample(tmp_path)
    assert "scale={RU: ...}" in error.value.hint
    good = sample(tmp_path, scale={"RU": 1.0}).physics
    np.testing.assert_allclose(good[..., 2], 0.1, rtol=3e-3)
    write(tmp_path, ZN6=lambda v, u: (v, "m/day"))
    with pytest.raises(DataError, match="variable ZN6"):
        sample(tmp_path)
    write(tmp_path, ST=lambda v, u: (v, "m"))
    with pytest.raises(DataError, match="variable ST"):
        sample(tmp_path)
    with pytest.raises(ConfigError, match="'smb'"):
        sample(tmp_path, scale={"smb": 1000.0})
    with pytest.raises(ConfigError, match="scale 0 of"):
        sample(tmp_path, scale={"SMB": 0})


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"RU": lambda v, u: v * 0 + 100 / 12, "ME": lambda v, u: v / 1000}, "refreeze"),
        ({"RZ": lambda v, u: v * 1000}, "refreeze"),
        ({"ME": lambda v, u: v * 1000}, "melt"),
        ({"ZN6": lambda v, u: v * 1000}, "snowpack"),
        ({"ZN6": None, "SF": lambda v, u: v / 1000}, "snowpack"),
        ({"ZN6": None, "SF": lambda v, u: v * 1000}, "snowpack"),
    ],
)
def test_heights_are_plausible(tmp_path, changes, field):
    write(tmp_path, **changes)
    with pytest.raises(DataError, match=rf"The {field} of a year is .* not plausible"):
        sample(tmp_path, variables=[field])


def test_unit_mix_ups_are_found_by_what_is_plausible(tmp_path):
    write(tmp_path, SMB=lambda v, u: v / 1000)  # metres that are said to be millimetres
    with pytest.raises(DataError, match=r"as if the files were in m w\.e\..*scale={SMB: 1000}"):
        sample(tmp_path)
    found = sample(tmp_path, scale={"SMB": 1000.0})
    np.testing.assert_allclose(found.physics[:, 0, 0], plane(*project(points()).T), rtol=3e-3)
    write(tmp_path, SMB=lambda v, u: v / 30.4)  # a day's, in each month
    with pytest.raises(DataError, match=r"mm w\.e\. a day.*scale={SMB: 30\.4}"):
        sample(tmp_path)
    write(tmp_path, ST=lambda v, u: v * 10)
    with pytest.raises(DataError, match="neither degC nor K"):
        sample(tmp_path)


def stamp(folder, days, bounds=False):
    """Stamp months otherwise than in their middle."""
    for path in sorted(folder.glob("*.nc")):
        year = int(path.stem[-4:])
        edges = (np.datetime64(f"{year}-01", "M") + np.arange(13)).astype("datetime64[D]")
        edges = (edges - np.datetime64("1901-01-15", "D")).astype(float)
        with netCDF4.Dataset(path, "r+") as data:
            data["TIME"][:] = 24 * days(edges)
            if bounds:
                data.createDimension("nv", 2)
                data["TIME"].bounds = "TIME_bnds"
                variable = data.createVariable("TIME_bnds", "f8", ("TIME", "nv"))
                variable[:] = 24 * np.stack([edges[:-1], edges[1:]], 1)


@pytest.mark.parametrize(
    ("days", "bounds"),
    [
        (lambda edges: edges[:-1], False),  # first day
        (lambda edges: edges[1:] - 0.5, False),  # last day
        (lambda edges: edges[1:], True),  # the end: bounds say which month it is
        (lambda edges: edges[:-1] + 14.0, True),
    ],
)
def test_stamps_of_months(tmp_path, days, bounds):
    def april(values, units):  # 1000 mm more in one month, which the flight of April 14 cuts
        values[3] += 1000.0
        return values

    for year in (2009, 2010, 2011, 2012):
        write(tmp_path, (year,), **({"SMB": april} if year == 2011 else {}))
    middle = sample(tmp_path).physics
    stamp(tmp_path, days, bounds)
    found = sample(tmp_path).physics
    np.testing.assert_allclose(found, middle, atol=25)
    more = found[:, :, 0] - plane(*project(points()).T)[:, None]
    day = FLIGHT_DAY - YEAR - float(np.datetime64("2011-04-01").astype("datetime64[D]").astype(int))
    np.testing.assert_allclose(more, [[1000 * (30 - day) / 30, 1000 * day / 30]] * 30, atol=3)


def rewrite(folder, change):
    """Write files again with other (dimensions, values, attributes) by variable."""
    for path in sorted(folder.glob("*.nc")):
        with netCDF4.Dataset(path) as data:
            variables = {
                name: (v.dimensions, np.ma.filled(v[:], np.nan), vars(v).copy())
                for name, v in data.variables.items()
            }
        path.unlink()
        variables |= change(path, variables) or {}
        with netCDF4.Dataset(path, "w") as data:
            for name, (dims, values, attributes) in variables.items():
                for key, size in zip(dims, values.shape, strict=True):
                    if key not in data.dimensions:
                        data.createDimension(key, size)
                variable = data.createVariable(name, values.dtype, dims)
                variable.setncatts({k: v for k, v in attributes.items() if k != "_FillValue"})
                variable[:] = values


@pytest.mark.parametrize("calendar", ["noleap", "360_day", "all_leap"])
def test_months_of_other_calendars_are_months(tmp_path, calendar):
    """Named by their last day."""
    seasons = 10.0 * np.arange(12)[:, None, None]
    write(tmp_path, (2010, 2011, 2012), SMB=lambda v, u: v + seasons)
    stamp(tmp_path, lambda edges: edges[:-1])
    expected = sample(tmp_path).physics

    def restamp(path, variables):
        dims, _, _ = variables["TIME"]
        year, units = int(path.stem[-4:]), "days since 1950-01-01"
        dates = [cftime.datetime(year, month, 1, calendar=calendar) for month in range(1, 13)]
        values = cftime.date2num([d.replace(day=d.daysinmonth) for d in dates], units, calendar)
        attributes = {"units": units, "calendar": calendar}
        return {"TIME": (dims, values.astype(float), attributes)}

    rewrite(tmp_path, restamp)
    np.testing.assert_allclose(sample(tmp_path).physics, expected, rtol=1e-6)


def test_a_file_of_one_step_is_a_month_in_any_calendar(tmp_path):
    with netCDF4.Dataset(tmp_path / "MAR-2010-03.nc", "w") as data:
        data.createDimension("TIME", 1)
        time = data.createVariable("TIME", "f8", ("TIME",))
        time.units, time.calendar = "days since 2010-01-01", "360_day"
        time[:] = 60.0  # 1 March
    stamps, _ = ClimateFile(tmp_path / "MAR-2010-03.nc").times()
    assert stamps.tolist() == [float(np.datetime64("2010-03-01").astype(int))]


@pytest.mark.parametrize("bounds", [False, True])
def test_the_order_of_steps_in_a_file_changes_nothing(tmp_path, bounds):
    seasons = 10.0 * np.arange(12)[:, None, None]
    write(tmp_path, ST=lambda v, u: v - seasons, SMB=lambda v, u: v + seasons)
    stamp(tmp_path, lambda edges: (edges[:-1] + edges[1:]) / 2, bounds)
    in_order = sample(tmp_path).physics
    rewrite(
        tmp_path,
        lambda path, variables: {
            name: (dims, values[::-1], attributes)
            for name, (dims, values, attributes) in variables.items()
            if dims[:1] == ("TIME",)
        },
    )
    np.testing.assert_array_equal(sample(tmp_path).physics, in_order)


def test_years_of_one_step_each(tmp_path):
    def year_of(day):
        def change(path, variables):
            year = int(path.stem[-4:])
            date = np.datetime64(day.format(year), "D").astype(float)
            epoch = np.datetime64("1901-01-15", "D").astype(float)
            time = np.array([(date - epoch) * 24])
            fields = {
                name: (dims, np.full((1, *values.shape[1:]), value), {"units": unit})
                for name, value, unit in (("SMB", 100.0 * (year - 2000), "mmWE"), ("ME", 9.0, "mm"))
                for dims, values, _ in [variables[name]]
            }
            means = {n: (v[0], v[1][:1], v[2]) for n, v in variables.items() if n in ("ST", "ZN6")}
            fields["RU"] = fields["ME"]
            return fields | means | {"TIME": (("TIME",), time, variables["TIME"][2])}

        return change

    sums = {}
    for day in ("{}-07-02", "{}-01-01", "{}-12-31"):
        folder = tmp_path / day[-5:]
        folder.mkdir()
        write(folder)
        rewrite(folder, year_of(day))
        sums[day] = sample(folder).physics[:, :, 0]
    for fields in sums.values():
        np.testing.assert_allclose(fields, sums["{}-07-02"], atol=2.0)


def test_single_precision_leaves_months_what_they_are(tmp_path):
    def april(values, units):  # 1000 mm more in one month, which the flight of April 14 cuts
        values[3] += 1000.0
        return values

    write(tmp_path, SMB=april)
    stamp(tmp_path, lambda edges: edges[:-1], bounds=False)
    exact = sample(tmp_path).physics

    def in_seconds(path, variables):
        dims, hours, _ = variables["TIME"]
        units = {"units": "seconds since 1901-01-15"}
        return {"TIME": (dims, (hours * 3600 - 60).astype(np.float32), units)}

    rewrite(tmp_path, in_seconds)
    np.testing.assert_allclose(sample(tmp_path).physics, exact, rtol=1e-12)


def test_a_day_that_is_a_fill_value_elsewhere_is_a_day(tmp_path):
    write(tmp_path, daily=True)
    expected = sample(tmp_path).physics
    epoch = (np.datetime64("2011-07-01", "D").astype(int) - 999).astype("datetime64[D]")

    def in_days(path, variables):
        dims, hours, _ = variables["TIME"]
        days = np.floor(hours / 24) - float((epoch - np.datetime64("1901-01-15")).astype(int))
        return {"TIME": (dims, days, {"units": f"days since {epoch}T12:00:00"})}

    rewrite(tmp_path, in_days)
    np.testing.assert_allclose(sample(tmp_path).physics, expected, rtol=1e-9)


def flip(name, variables):
    """Turn an axis of all variables round."""
    return {
        key: (dims, np.flip(values, dims.index(name)), attributes)
        for key, (dims, values, attributes) in variables.items()
        if name in dims
    }


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("change", ["flip", "shift"])
def test_cells_of_all_files_are_the_same(tmp_path, native, change):
    write(tmp_path, name="epsg3413", native=native)
    expected = sample(tmp_path).physics
    rewrite(tmp_path, lambda path, variables: flip("y", variables))
    np.testing.assert_allclose(sample(tmp_path).physics, expected, rtol=1e-4)

    def change_one(path, variables):
        if "2011" not in path.name:
            return {}
        if change == "flip":
            return flip("y", variables)
        name, step = ("LAT", 0.5) if native else ("y", 20e3)
        dims, values, attributes = variables[name]
        return {name: (dims, values + step, attributes)}

    rewrite(tmp_path, change_one)
    name = "LAT" if native else "y"
    with pytest.raises(
        DataError, match=rf"coordinate {name} of .*2011.nc is not that of .*2009.nc"
    ):
        sample(tmp_path)


@pytest.mark.parametrize("native", [False, True])
def test_axes_in_another_order_on_a_square_grid_are_refused(tmp_path, native):
    write(tmp_path, name="epsg3413", native=native)

    def turn(path, variables):
        square = {
            name: (dims, values[..., :21, :] if dims[-2:] == ("y", "x") else values, attributes)
            for name, (dims, values, attributes) in variables.items()
        }
        square["y"] = (("y",), variables["y"][1][:21], variables["y"][2])
        _, values, attributes = square["ST"]
        return square | {"ST": (("TIME", "x", "y"), values.swapaxes(1, 2), attributes)}

    rewrite(tmp_path, turn)
    with pytest.raises(DataError, match=r"ST of .*2009.nc has the axes TIME, x, y, and the grid y"):
        sample(tmp_path)


def test_a_grid_of_latitudes_and_longitudes_of_one_dimension(tmp_path):
    write(tmp_path, name="epsg3413")
    rewrite(
        tmp_path,
        lambda path, variables: {
            "lat": (("y",), np.linspace(69, 73, 23), {}),
            "lon": (("x",), np.linspace(-45, -35, 21), {}),
        },
    )
    for path in tmp_path.glob("*.nc"):
        with netCDF4.Dataset(path, "r+") as data:
            data.renameVariable("x", "i")
    with pytest.raises(DataError, match=r"2009.nc is one of latitudes and longitudes") as error:
        sample(tmp_path)
    assert "setgridtype,curvilinear" in error.value.hint


@pytest.mark.parametrize("hours", [0.0, 365 * 24.0])
def test_bounds_in_units_of_their_own(tmp_path, hours):
    write(tmp_path)
    stamp(tmp_path, lambda edges: edges[:-1] + 14.0, bounds=True)
    expected = sample(tmp_path).physics
    epoch = float((np.datetime64("1990-01-01") - np.datetime64("1901-01-15")).astype(int))

    def in_hours(path, variables):
        dims, values, _ = variables["TIME_bnds"]
        inside = {"units": "hours since 1990-01-01"}
        return {"TIME_bnds": (dims, values - epoch * 24 + hours, inside)}

    rewrite(tmp_path, in_hours)
    if hours:
        with pytest.raises(DataError, match="its bounds TIME_bnds are of other times"):
            sample(tmp_path)
    else:
        np.testing.assert_array_equal(sample(tmp_path).physics, expected)


@pytest.mark.parametrize("how", ["months", "garbage", "none", "number", "missing", "bounds"])
def test_times_that_cannot_be_understood(tmp_path, how):
    write(tmp_path)
    path = tmp_path / "MARv3.12-2010.nc"
    stamp(tmp_path, lambda edges: edges[:-1], bounds=True)
    with netCDF4.Dataset(path, "r+") as data:
        time = data["TIME"]
        if how == "none":
            time.delncattr("units")
        elif how == "missing":
            time[3] = np.nan
        elif how == "bounds":
            data["TIME_bnds"][3] = data["TIME_bnds"][2]
        else:
            time.units = {"months": "months since 1901-01-15", "garbage": "?", "number": 3}[how]
    with pytest.raises(DataError, match=r"time of the climate file .*2010.nc cannot be"):
        sample(tmp_path)


@pytest.mark.parametrize("dims", [("TIME",), ("y", "TIME", "x"), ("TIME", "y", "x")])
def test_fields_of_another_shape_or_type(tmp_path, dims):
    write(tmp_path, SMB=None)
    for path in tmp_path.glob("*.nc"):
        with netCDF4.Dataset(path, "r+") as data:
            data.createVariable("SMB", str if len(dims) == 3 and dims[0] == "TIME" else "f8", dims)
    with pytest.raises(
        DataError, match=r"variable SMB of .*2009.nc (has the shape|cannot be read)"
    ):
        sample(tmp_path)


def test_masks_of_another_grid(tmp_path):
    write(tmp_path, SRF=None)
    for path in tmp_path.glob("*.nc"):
        with netCDF4.Dataset(path, "r+") as data:
            data.createVariable("MSK", "f8", ("y",))[:] = 1.0
    with pytest.raises(DataError, match=r"ice mask of .* has 23 cells, the grid 483"):
        sample(tmp_path)


def test_points_without_position(tmp_path):
    write(tmp_path)
    with pytest.raises(DataError, match="1 of 2 points have no position"):
        sample(tmp_path, np.array([[71.0, -40.0], [np.nan, -40.0]]))


def test_kilometres_and_metres_of_coordinates(tmp_path):
    write(tmp_path, name="epsg3413")
    good = sample(tmp_path).physics
    for path in tmp_path.glob("*.nc"):
        with netCDF4.Dataset(path, "r+") as data:
            for name in "xy":
                data[name][:] = data[name][:] / 1000
    np.testing.assert_allclose(sample(tmp_path).physics, good, rtol=1e-9)
    for path in tmp_path.glob("*.nc"):
        with netCDF4.Dataset(path, "r+") as data:
            data["x"].units = "m"
    with pytest.raises(DataError, match="is said to be in m, but reaches only"):
        sample(tmp_path)


def test_points_outside_get_the_nearest_cell_and_a_flag(tmp_path):
    write(tmp_path)
    pos = np.array([[71.0, -40.0], [70.5, -50.0]])
    found = sample(tmp_path, pos)
    np.testing.assert_array_equal(found.flag, [0, 1])
    assert found.away[1] > 100e3
    assert found.physics[1, 0, 0] == pytest.approx(plane(-200e3, 40e3), rel=0.01)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"ST": None}, {}, r"no variable for the field st \(ST"),
        ({"ZN6": None}, {}, "field snowpack"),
        ({"years": (2011, 2012)}, {}, r"do not cover layer 2, 2010-04-14 to 2011-04-14"),
        ({"SRF": lambda v, u: v * 0}, {}, "No cell of the climate grid is ice"),
    ],
)
def test_unusable_files(tmp_path, changes, options, message):
    write(tmp_path, **changes)
    with pytest.raises(DataError, match=message) as error:
        sample(tmp_path, **options)
    assert error.value.hint


def test_fewer_fields_need_fewer_variables(tmp_path):
    write(tmp_path, ZN6=None, ST=None)
    assert sample(tmp_path, variables=["melt", "smb"]).physics.shape == (30, 2, 2)
    with pytest.raises(ConfigError, match="no physical field snow"):
        MarClimate([str(tmp_path)], variables=["snow"])
    with pytest.raises(ConfigError, match="comes twice in smb, st, smb"):
        MarClimate([str(tmp_path)], variables=["smb", "st", "smb"])
    with pytest.raises(ConfigError, match="reach of the climate grid is -50 m"):
        MarClimate([str(tmp_path)], reach=-50.0)


def test_damaged_and_missing_climate_files(tmp_path):
    with pytest.raises(DataError, match="no climate file"):
        sample(tmp_path)
    write(tmp_path)
    path = tmp_path / "MARv3.12-2011.nc"
    whole = path.read_bytes()
    for size in (1000, len(whole) * 3 // 4):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match="cannot be read"):
            sample(tmp_path)
    path.write_bytes(whole)
    (tmp_path / "again.nc").write_bytes(whole)
    with pytest.raises(DataError, match=r"2011.nc and .*again.nc hold the time step 2011-01-16"):
        sample(tmp_path)
    with netCDF4.Dataset(tmp_path / "again.nc", "r+") as data:
        data["TIME"][:] += 24.0
    with pytest.raises(DataError, match=r"again.nc and .*2011.nc overlap in time"):
        sample(tmp_path)


def layer_files(folder, pos, **options):
    """Picks of two layers of 5 ns along a track, over the climate of :func:`write`."""
    place = folder / "CSARP_layer" / "20120414_01"
    place.mkdir(parents=True)
    times = FLIGHT_DAY * 86_400 + np.arange(len(pos))
    picks = 3e-6 + np.tile([0.0, 5e-9, 1e-8], (len(pos), 1))
    write_layer_file(place / "Data_20120414_01_001.mat", times, pos, picks)
    climate = MarClimate([str(folder / "mar")])
    return make_reader([str(folder / "CSARP_layer")], climate, traces=len(pos), **options)


def test_stacks_have_the_climate_and_the_density_that_follows_from_it(tmp_path):
    (tmp_path / "mar").mkdir()
    write(tmp_path / "mar")
    pos = np.stack([71.0 + np.arange(20) * 1e-3, np.full(20, -40.5)], 1)
    (stack,) = layer_files(tmp_path, pos).load().stacks
    smb = plane(*project(pos).T)
    np.testing.assert_allclose(stack.physics[:, 0, 0], smb, rtol=3e-3)
    assert not stack.physics_flag.any()
    one = np.ones((20, 2))
    density = layer_density(
        one * smb[:, None] / 1000, one * 253.15, one * 0.0917, np.array([1.0, 2.0])
    )
    np.testing.assert_allclose(
        stack.thickness, time_to_thickness(np.array(5e-9), density), rtol=1e-3
    )
    assert (np.diff(stack.thickness, axis=1) < 0).all()  # the older one is denser


def test_stacks_at_and_beyond_the_edge_of_the_climate(tmp_path):
    (tmp_path / "mar").mkdir()
    write(tmp_path / "mar")
    edge = Transformer.from_crs(CRS_OF["mar"], CRS_OF["mar"].geodetic_crs, always_xy=True)
    lon, lat = edge.transform(np.linspace(190e3, 210e3, 20), np.zeros(20))
    pos = np.stack([lat, lon], 1)
    source = layer_files(tmp_path, pos)
    flights = source.load()
    (stack,) = flights.stacks
    assert 5 < stack.physics_flag.sum() < 15
    assert {e.kind: e.count for e in flights.excluded} == {"nearest": stack.physics_flag.sum()}
    source.climate.reach = 5_000.0
    with pytest.raises(DataError, match=r"of 20 traces of stack 20120414_01_0000 .*away") as error:
        source.load()
    assert "exclude+=outside_climate" in error.value.hint
    source.exclude = frozenset(["outside_climate"])
    with pytest.raises(DataError, match=r"no usable stack \(1 stacks outside the climate grid"):
        source.load()


def test_months_may_be_counted_as_mar_counts(tmp_path):
    write(tmp_path)
    good = sample(tmp_path).physics
    for path in tmp_path.glob("*.nc"):
        with netCDF4.Dataset(path, "r+") as data:
            data["TIME"].units = "HOURS since 1901-01-15 00:00:00"
    np.testing.assert_array_equal(sample(tmp_path).physics, good)


@given(
    st.lists(st.floats(0.5, 40), min_size=3, max_size=30),
    st.lists(st.floats(0.3, 5), min_size=1, max_size=4),
)
@settings(max_examples=50, deadline=None)
def test_sums_between_dates_lose_and_add_nothing(lengths, ages):
    ends = np.cumsum(lengths)
    steps = np.stack([ends - lengths, ends], 1)
    edges = ends[-1] - np.concatenate([[0.0], np.cumsum(ages)])
    weights = interval_weights(steps, edges)
    amount = np.asarray(lengths)  # one unit a day
    expected = np.clip(edges[:-1], 0, None) - np.clip(edges[1:], 0, None)
    np.testing.assert_allclose(weights @ amount, expected, atol=1e-9)
    assert ((weights >= 0) & (weights <= 1 + 1e-12)).all()


def test_months_have_their_length():
    edges = (np.datetime64("2011-01", "M") + np.arange(25)).astype("datetime64[D]").astype(float)
    found = step_edges((edges[:-1] + edges[1:]) / 2)
    assert np.abs(found[:, 0] - edges[:-1]).max() < 1.5
    np.testing.assert_array_equal(found[1:, 0], found[:-1, 1])


# tracks


def test_haversine():
    for lat in (0.0, 45.0, 70.0):
        assert great_circle_distance(
            np.array([lat, -40.0]), np.array([lat + 1, -40.0])
        ) == pytest.approx(111_190, abs=10)
    a, b = np.array([70.0, 179.9]), np.array([70.0, -179.9])
    assert great_circle_distance(a, b) == great_circle_distance(b, a) == pytest.approx(7_606, abs=5)
    assert great_circle_distance(a, a) == 0


@given(st.integers(2, 300), st.integers(2, 64))
@settings(max_examples=50, deadline=None)
def test_blocks_hold_every_trace_once(raw, traces):
    distance = np.arange(raw) * 14.7
    blocks = cut_blocks(distance[-1], traces, 14.7)
    np.testing.assert_allclose(np.concatenate(blocks), distance, atol=1e-9)
    assert {len(b) for b in blocks[:-1]} <= {traces}


def test_resampling_at_the_traces_changes_nothing_and_keeps_gaps():
    generator = np.random.default_rng(0)
    distance = np.cumsum(generator.uniform(90, 110, 50))
    values = generator.normal(size=(50, 4))
    values[generator.random(values.shape) < 0.3] = np.nan
    np.testing.assert_array_equal(resample(distance, values, distance), values)
    off = resample(distance, values, distance[:-1] + 1.0)  # one metre on
    np.testing.assert_array_equal(np.isnan(off), np.isnan(values[:-1]))


def test_resampling_to_coarser_traces_takes_means_of_what_is_there():
    distance = np.arange(100.0)
    values = distance.copy()
    values[40:60] = np.nan
    found = resample(distance, values, np.arange(0.0, 100.0, 10.0))
    np.testing.assert_allclose(found[[1, 2, 3, 7, 8]], [9.5, 19.5, 29.5, 69.5, 79.5], atol=0.6)
    assert np.isnan(found[5])


def test_standing_still_is_no_jump():
    pos = np.array([[70.0, -40.0]] * 3 + [[70.0 + k * 1e-4, -40.0] for k in range(1, 20)])
    assert break_at_jumps(measure_track(pos)) == [slice(0, 22)]


# firn and travel time


@given(st.floats(0.05, 5.0), st.floats(0.2, 0.9))
def test_travel_time_is_the_inverse_of_thickness(thickness, density):
    time = thickness_to_time(np.array([thickness]), np.array([density]))
    assert time_to_thickness(time, np.array([density]))[0] == pytest.approx(thickness)
    assert 3e-9 < time[0] / thickness < 2 * 1.8 / 2.9e8  # slower than in air, faster than in ice


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=12))
def test_negative_years_eat_what_is_under_them_and_no_more(balance):
    balance = np.array(balance)
    left = smb_to_layers(balance)
    assert (left >= 0).all()
    assert (left <= np.maximum(balance, 0) + 1e-12).all()
    # from the oldest on, what is there after each year: it cannot be less than nothing
    total = 0.0
    for year in balance[::-1]:
        total = max(total + year, 0.0)
    assert left.sum() == pytest.approx(total, abs=1e-9)


def test_firn_gets_denser_with_age_to_ice():
    age = np.linspace(0, 500, 200)
    density = herron_langway(age, np.array(0.3), np.array(250.0))
    assert (np.diff(density) > 0).all()
    assert density[0] == pytest.approx(0.315)
    assert density[-1] < 0.917
    warm = herron_langway(np.array(10.0), np.array(0.3), np.array(265.0))
    assert warm > herron_langway(np.array(10.0), np.array(0.3), np.array(245.0))


def test_noise_of_a_pick_is_shared_with_opposite_sign():
    generator = np.random.default_rng(0)
    noise = np.arange(12.0) + 0.1 * generator.standard_normal((4000, 12))
    picks, crossed = remove_crossed(noise)
    assert crossed == 0
    off = np.corrcoef(np.diff(picks, axis=1).T)
    # docs/papers/ice_layers.md section 3.2
    assert np.diag(off, 1).mean() == pytest.approx(-0.5, abs=0.02)
