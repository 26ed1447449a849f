"""What a flight gets does not depend on the flights that are read with it."""

from dataclasses import replace

import netCDF4
import numpy as np
import pytest
from fakes.ice_layers import FLIGHT_DAY
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj import CRS, Transformer

from fulgurite.datamodules.ice_layers import MarClimate
from fulgurite.datamodules.ice_layers.climate.grid import PROJECTIONS, Grid
from fulgurite.datamodules.ice_layers.climate.mar import ClimateRequest
from fulgurite.errors import DataError

EDGES = FLIGHT_DAY - np.arange(4) * 365.25


def rectangles(count=12):
    """Cells that all lie on circles with their neighbours: Delaunay's diagonals are arbitrary."""
    return np.meshgrid(np.arange(count) * 1000.0, np.arange(count + 3) * 1000.0)


def bend(x, y):
    """A curvilinear grid, some of whose cells have no coordinates."""
    x, y = x + 0.05 * y + 1e-6 * y**2, y - 0.04 * x + 2e-6 * x * y
    x[0, :3] = y[0, :3] = np.nan
    return x, y


def scatter(x, y):
    """Cells in no order."""
    order = np.random.default_rng(0).permutation(x.size)
    return x.ravel()[order], y.ravel()[order]


def wind_around_a_pole(x, y):
    """Rows and columns about the south pole, where all corners of a row are one."""
    radius, angle = np.meshgrid(np.arange(15) * 500.0, np.radians(np.arange(0, 361, 30)))
    return radius * np.sin(angle), radius * np.cos(angle)


GRIDS = {
    "rectilinear": lambda x, y: (x, y),
    "falling rows": lambda x, y: (x, y[::-1]),
    "transposed": lambda x, y: (x.T, y.T),
    "curvilinear": bend,
    "pole": wind_around_a_pole,
    "scattered": scatter,
    "shuffled rows and columns": lambda x, y: tuple(v.reshape(x.shape) for v in scatter(x, y)),
}


def make_grid(kind, seed=0, ice_share=0.9):
    x, y = GRIDS[kind](*rectangles())
    ice = np.isfinite(x) & (np.random.default_rng(seed).random(x.shape) < ice_share)
    return x, y, ice


def make_points(x, y, ice, count=60, seed=1):
    """Points in and around a grid; some on cells, edges and diagonals."""
    generator = np.random.default_rng(seed)
    low, high = (np.array([f(x), f(y)]) for f in (np.nanmin, np.nanmax))
    size = high - low
    cells = np.stack([x[ice], y[ice]], 1)
    some = cells[generator.integers(0, len(cells), (count, 2))]
    anywhere = generator.uniform(low - 0.1 * size, high + 0.1 * size, (count, 2))
    return np.concatenate([some[:, 0], some.mean(1), anywhere])


def locate(x, y, ice, points):
    """What a field of random values is at points, and the flags."""
    weights = Grid(x, y, ice).locate(points)
    values = np.random.default_rng(2).normal(size=x.size)
    return np.column_stack([weights(values), weights.flag, weights.away])


@pytest.mark.parametrize("kind", GRIDS)
def test_a_point_has_the_same_climate_alone_and_among_others(kind):
    x, y, ice = make_grid(kind)
    points = make_points(x, y, ice)
    together = locate(x, y, ice, points)
    assert 0 < together[:, 1].mean() < 1
    alone = np.concatenate([locate(x, y, ice, point[None]) for point in points])
    np.testing.assert_array_equal(alone, together)
    np.testing.assert_array_equal(locate(x, y, ice, points[::-1]), together[::-1])


@given(
    st.sampled_from(sorted(GRIDS)),
    st.integers(0, 9),
    st.lists(st.integers(0, 179), min_size=1, max_size=40),
)
@settings(max_examples=30, deadline=None)
def test_any_choice_of_points_has_the_same_climate(kind, seed, chosen):
    x, y, ice = make_grid(kind, seed, 0.5 + 0.05 * seed)
    points = make_points(x, y, ice, seed=seed)
    np.testing.assert_array_equal(
        locate(x, y, ice, points[chosen]), locate(x, y, ice, points)[chosen]
    )


@pytest.mark.parametrize("kind", GRIDS)
def test_a_plane_is_reproduced_between_the_cells(kind):
    x, y, ice = make_grid(kind, ice_share=1.1)
    points = make_points(x, y, ice, 300)
    weights = Grid(x, y, ice).locate(points)
    inside = weights.flag == 0
    assert inside.mean() > 0.8
    assert (weights.weights >= 0).all()
    field = np.nan_to_num(3.0 + 2e-3 * x - 1e-3 * y).ravel()
    expected = 3.0 + points[inside] @ [2e-3, -1e-3]
    np.testing.assert_allclose(weights(field)[inside], expected, atol=1e-8)


def test_diagonals_follow_from_the_numbers_of_the_cells():
    x, y = rectangles()
    middle = np.array([[5500.0, 5500.0]])
    falling, rising = {(5, 5), (6, 6)}, {(5, 6), (6, 5)}
    for hole, used in ((None, falling), ((5, 6), falling), ((5, 5), rising), ((6, 6), rising)):
        ice = np.ones(x.shape, bool)
        if hole is not None:
            ice[hole] = False
        weights = Grid(x, y, ice).locate(middle)
        cells = {divmod(int(c), x.shape[1]) for c in weights.cells[0, weights.weights[0] > 0.1]}
        assert cells == used
        assert not weights.flag.any()


def test_cells_without_weight_are_not_read():
    x, y = rectangles()
    ice = np.ones(x.shape, bool)
    ice[:, 6:] = False
    weights = Grid(x, y, ice).locate(np.array([[5000.0, 3500.0], [5000.0, 3000.0]]))
    assert not weights.flag.any()
    assert ice.ravel()[weights.cells].all()


def write_mar(folder, name="mar", kelvin_year=None, with_degrees=True):
    """Files of three years on a grid of 20 km whose fields are anything but a plane."""
    crs = CRS.from_user_input(PROJECTIONS[name])
    origin = (0.0, -1_000e3 if name == "epsg3413" else 0.0)
    x, y = (o + np.arange(-200e3, 201e3, 20e3) for o in origin)
    xs, ys = np.meshgrid(x, y)
    lon, lat = Transformer.from_crs(crs, crs.geodetic_crs, always_xy=True).transform(xs, ys)
    generator = np.random.default_rng(0)
    for year in range(2009, 2013):
        path = folder / f"MAR-{year}.nc"
        with netCDF4.Dataset(path, "w") as data:
            for key, size in (("x", len(x)), ("y", len(y)), ("time", 12)):
                data.createDimension(key, size)
            time = data.createVariable("time", "f8", ("time",))
            time.units = "days since 1970-01-01"
            months = np.datetime64(f"{year}-01", "M") + np.arange(12)
            time[:] = months.astype("datetime64[D]").astype(float)
            shape = (12, *xs.shape)
            st_ = generator.normal(-25, 5, shape) + 273.15 * (year == kelvin_year)
            fields_ = {"SMB": generator.gamma(4, 8, shape), "ST": st_}
            for key, values, unit in (
                *((k, v, "mmWE" if k == "SMB" else "") for k, v in fields_.items()),
                *((("LAT", lat, "degrees"), ("LON", lon, "degrees")) if with_degrees else ()),
            ):
                dims = ("time", "y", "x")[-values.ndim :]
                data.createVariable(key, "f8", dims)[:] = values
                data[key].units = unit
            if not with_degrees:
                for key, values in (("x", x), ("y", y)):
                    data.createVariable(key, "f8", (key,))[:] = values
                    data[key].units = "m"
    return MarClimate([str(folder)], variables=["smb", "st"])


def make_requests(count=5):
    generator = np.random.default_rng(1)
    requests = []
    for number in range(count):
        size = (1, 2, 3, 17, 40)[number]
        pos = np.stack([generator.uniform(69, 72, size), generator.uniform(-44, -36, size)], 1)
        requests.append(ClimateRequest(pos, EDGES - 20.0 * number))
    return requests


def assert_same(first, second):
    for name in ("physics", "flag", "away"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name)


@pytest.fixture(scope="module")
def climate(tmp_path_factory):
    """A climate."""
    return write_mar(tmp_path_factory.mktemp("mar"))


def test_a_flight_has_the_same_climate_alone_and_among_others(climate):
    requests = make_requests()
    together = climate.sample(requests)
    for order in ([4, 3, 2, 1, 0], [1, 4], [0]):
        for number, sample in zip(order, climate.sample([requests[k] for k in order]), strict=True):
            assert_same(sample, together[number])
    points = [replace(requests[4], pos=requests[4].pos[row : row + 1]) for row in range(40)]
    for row, sample in enumerate(climate.sample(points)):  # and a point as its flight
        np.testing.assert_array_equal(sample.physics[0], together[4].physics[row])


def test_flights_in_the_south_do_not_move_the_grid_of_the_north(climate):
    north, south = make_requests()[-1], ClimateRequest(np.full((90, 2), [-75.0, 10.0]), EDGES)
    (alone,) = climate.sample([north])
    with_others, far = climate.sample([north, south])
    assert_same(with_others, alone)
    assert far.away.min() > 1e6


def test_where_the_grid_does_not_say_it_both_hemispheres_are_refused(tmp_path):
    climate = write_mar(tmp_path, "epsg3413", with_degrees=False)
    north, south = (ClimateRequest(np.array([[lat, -45.0]]), EDGES) for lat in (80.5, -80.5))
    assert climate.sample([north])[0].away[0] < 20e3
    with pytest.raises(DataError, match=r"1 of 2 points are in the south") as error:
        climate.sample([north, south])
    assert "projection" in error.value.hint
    climate.projection = "epsg3413"
    assert_same(climate.sample([north, south])[0], climate.sample([north])[0])


def test_kelvins_are_told_by_the_file(tmp_path):
    (tmp_path / "degrees").mkdir()
    (tmp_path / "mixed").mkdir()
    request = make_requests()[-1]
    (expected,) = write_mar(tmp_path / "degrees").sample([request])
    (mixed,) = write_mar(tmp_path / "mixed", kelvin_year=2010).sample([request])
    np.testing.assert_allclose(mixed.physics, expected.physics, rtol=1e-12)
