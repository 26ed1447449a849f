"""Completed stacks on disk and in figures."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from fakes.ice_layers import START

from fulgurite.domains.ice_layers.details import FlightDetails, LayerLabels
from fulgurite.errors import ConfigError, DataError, MissingExtraError
from fulgurite.models.ice_layers.output import stacks as output
from fulgurite.models.ice_layers.output.figures import (
    boundary_depths,
    calibration_figure,
    depth_figure,
    depth_table,
    layers_figure,
    picked_depths,
)
from fulgurite.models.ice_layers.output.netcdf import check_attributes, read_netcdf, write_netcdf
from fulgurite.models.ice_layers.output.origin import Origin, gps_to_utc
from fulgurite.models.ice_layers.output.stacks import (
    CompletedStack,
    StackMetadata,
    completed_stacks,
    file_name,
    read_npz,
    write_npz,
)


def make(seed=0, n=6, layers=4):
    rng = np.random.default_rng(seed)
    observed = rng.random((n, layers)) < 0.5
    observed[:, 2] = False
    provenance = np.where(observed, 0, 1).astype(np.uint8)
    provenance[:, 2] = 2
    provenance[0, ~observed[0]] = 3
    thickness = rng.random((n, layers)) + 0.3
    thickness[provenance == 3] = np.nan
    filled = (provenance == 1) | (provenance == 2)
    return CompletedStack(
        thickness=thickness,
        provenance=provenance,
        std=np.where(filled, 0.1 * rng.random((n, layers)), np.nan).astype(np.float32),
        observed=observed,
        physics=rng.random((n, layers, 2)).astype(np.float32),
        pos=np.stack([70 + np.arange(n) * 1e-3, np.full(n, -40.0)], 1),
        distance=np.arange(n) * 111.2,
        segment="20120330_01",
        stack="20120330_01/003",
        trained_segments=("20110401_02", "odd, name"),
        physics_names=("smb", "own field [K]"),
        layer_names=tuple(f"{2012 - k}" for k in range(layers)),
        layer_age=np.arange(layers) + 0.5,
    )


def described(seed=0, n=6, layers=4, scale="GPS"):
    """A stack of which everything is known."""
    stack = make(seed, n, layers)
    rng = np.random.default_rng(seed + 100)
    surface = 3e-6 + 1e-9 * rng.random(n)
    surface[1] = np.nan
    details = FlightDetails(
        time=START + 0.37 * np.arange(n), time_scale=scale, elevation=500 + rng.random(n),
        flight_distance=5000 + stack.distance, trace=np.arange(n) + 7,
        frame=np.array(["20120330_01_001"] * 2 + ["20120330_01_002"] * (n - 2)),
        density=0.3 + 0.1 * rng.random((n, layers)), picked=rng.random((n, layers + 1)) < 0.5,
        twtt=surface[:, None] + 1e-8 * np.arange(layers + 1),
    )  # fmt: skip
    climate = ("MAR-2011.nc", "MAR-2012.nc")
    origin = Origin("radar layer traces", "best.ckpt", "0" * 64, "of the companion file", climate)
    return replace(stack, details=details, origin=origin)


def assert_same_stack(a, b):
    for name, value in vars(a).items():
        other = getattr(b, name)
        if isinstance(value, np.ndarray):
            assert value.dtype.kind == other.dtype.kind, name
            assert value.dtype.kind == "U" or value.dtype == other.dtype, name
            assert value.tobytes() == other.tobytes(), name  # bit for bit, NaN too
        elif isinstance(value, FlightDetails | Origin):
            assert_same_stack(value, other)
        elif name != "attributes":
            assert value == other, name


def test_fields_whose_names_differ_in_signs_alone_are_two(tmp_path):
    stack = replace(make(), physics_names=("melt [mm]", "melt (mm)"))
    stack = replace(stack, details=FlightDetails(picked=stack.picked))
    assert_same_stack(stack, read_netcdf(write_netcdf(tmp_path / "a.nc", stack)))


@pytest.mark.parametrize("kind", ["npz", "nc"])
@pytest.mark.parametrize("bare", [False, True])
def test_what_is_written_is_read_again_bit_for_bit(tmp_path, kind, bare):
    """Where nothing is said of picks, NetCDF says what follows from the layers."""
    write, read = {"npz": (write_npz, read_npz), "nc": (write_netcdf, read_netcdf)}[kind]
    stack = make()
    if bare:  # no fields, no names of layers, trained on nothing
        stack = replace(
            stack, physics=stack.physics[..., :0], physics_names=(), layer_names=(),
            layer_age=np.zeros(0), trained_segments=(),
        )  # fmt: skip
    path = write(tmp_path / "deep" / f"a.{kind}", stack)
    if kind == "nc":
        stack = replace(stack, details=FlightDetails(picked=stack.picked))
    assert_same_stack(stack, read(path))
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file is left


@pytest.mark.parametrize("kind", ["npz", "nc"])
@pytest.mark.parametrize("left_out", [None, *FlightDetails().__dataclass_fields__, "scale"])
def test_whatever_is_known_of_the_flight_is_read_again(tmp_path, kind, left_out):
    write, read = {"npz": (write_npz, read_npz), "nc": (write_netcdf, read_netcdf)}[kind]
    stack = described(scale="unknown" if left_out == "scale" else "GPS")
    if left_out == "time":
        stack = replace(stack, details=replace(stack.details, time=None, time_scale=""))
    elif left_out not in (None, "scale", "time_scale"):
        stack = replace(stack, details=replace(stack.details, **{left_out: None}))
    again = read(write(tmp_path / f"a.{kind}", stack))
    if left_out == "picked" and kind == "nc":
        stack = replace(stack, details=replace(stack.details, picked=stack.picked))
    assert_same_stack(stack, again)


def test_npz_holds_no_objects(tmp_path):
    with np.load(write_npz(tmp_path / "a.npz", make()), allow_pickle=False) as content:
        arrays = {name: content[name] for name in content.files}
    assert all(a.dtype.kind in "fuibU" for a in arrays.values())
    assert arrays["provenance"].dtype == np.uint8
    assert list(arrays["trained_segments"]) == ["20110401_02", "odd, name"]


def test_netcdf_says_what_its_values_mean(tmp_path):
    netcdf = pytest.importorskip("netCDF4")
    stack = make()
    with netcdf.Dataset(write_netcdf(tmp_path / "a.nc", stack)) as file:
        assert file.Conventions.startswith("CF-1.")
        assert "fulgurite" in file.history
        import socket

        assert socket.gethostname() not in file.history
        assert str(tmp_path) not in str(file.ncattrs())
        thickness, flag = file["thickness"], file["provenance"]
        assert thickness.units == "m"
        for name in thickness.ancillary_variables.split():
            assert file[name].dimensions == thickness.dimensions
        for name in thickness.coordinates.split():
            assert file[name].dimensions in (("trace",), ("layer",))
        assert thickness.coordinates == "latitude longitude layer_name layer_age"
        assert file["depth"].coordinates == "latitude longitude boundary_name boundary_age"
        # nobody knows when and where in the flight: not invented
        assert "featureType" not in file.ncattrs()
        absent = {"time", "gps_time", "elevation", "twtt", "density", "frame", "frame_trace"}
        assert not absent & {*file.variables}
        assert not {"license", "checkpoint", "time_coverage_start"} & {*file.ncattrs()}
        assert list(flag.flag_values) == [0, 1, 2, 3]
        assert flag.flag_values.dtype == flag.dtype
        assert len(flag.flag_meanings.split()) == 4
        assert file["latitude"].units == "degrees_north"
        assert file["climate_smb"].units == "kg m-2 year-1"  # a mm of water equivalent
        assert file["climate_own_field__K_"].long_name.startswith("own field [K]")
        assert "units" not in file["climate_own_field__K_"].ncattrs()  # unknown: not invented
        # missing values are masked for every reader, observed ones are not
        masked = np.ma.getmaskarray(thickness[:])
        assert (masked == (stack.provenance == 3)).all()
        assert (np.ma.getmaskarray(file["thickness_standard_deviation"][:])[stack.observed]).all()


def test_netcdf_has_times_places_and_boundaries(tmp_path):
    netcdf = pytest.importorskip("netCDF4")
    stack = described()
    stack = replace(stack, origin=replace(stack.origin, attributes={"license": "CC-BY-4.0"}))
    with netcdf.Dataset(write_netcdf(tmp_path / "a.nc", stack)) as file:
        said = {name: file.getncattr(name) for name in file.ncattrs()}
        assert said["featureType"] == "trajectory"
        assert file["trajectory"].cf_role == "trajectory_id"
        assert (said["checkpoint"], said["checkpoint_sha256"]) == ("best.ckpt", "0" * 64)
        assert said["climate_files"].split() == ["MAR-2011.nc", "MAR-2012.nc"]
        assert said["license"] == "CC-BY-4.0"
        assert said["time_coverage_start"] == "2012-03-30T11:59:45.000+00:00"  # 15 leap seconds
        assert (said["geospatial_lat_min"], said["geospatial_lon_max"]) == (70.0, -40.0)
        time = file["time"]
        assert (time.standard_name, time.units, time.calendar) == (
            "time", "seconds since 1970-01-01 00:00:00", "standard",
        )  # fmt: skip
        np.testing.assert_array_equal(time[:], stack.details.time - 15)
        np.testing.assert_array_equal(file["gps_time"][:], stack.details.time)
        assert "UTC" in time.comment
        assert {*file["thickness"].coordinates.split()} == {
            "time", "latitude", "longitude", "layer_name", "layer_age",
        }  # fmt: skip
        assert list(file["boundary"][:]) == [0, 1, 2, 3, 4]
        assert list(file["boundary_name"][:]) == ["surface", "2012", "2011", "2010", "2009"]
        assert file["layer_age"].comment == "of the companion file"
        assert "conditioned on climate physics" in said["source"]
        assert list(file["boundary_age"][:]) == [0, 0.5, 1.5, 2.5, 3.5]
        depth, twtt = file["depth"], file["twtt"]
        known = ~np.ma.getmaskarray(depth[:])
        np.testing.assert_array_equal(known, np.isfinite(stack.depth))
        np.testing.assert_allclose(np.diff(depth[1:]), stack.thickness[1:], rtol=1e-12)
        assert np.ma.getmaskarray(twtt[1]).all()  # its surface was not picked
        flag = file["boundary_provenance"][:]
        np.testing.assert_array_equal(flag == 0, stack.details.picked)
        assert set(flag[:, 0]) == {0, 2}  # a surface is picked or missing, never completed
        assert list(file["flight_distance"][:]) == list(stack.details.flight_distance)
        assert file["elevation"].standard_name == "height_above_reference_ellipsoid"
        assert list(file["frame_trace"][:]) == list(stack.details.trace)
    with netcdf.Dataset(write_netcdf(tmp_path / "b.nc", described(scale="unknown"))) as file:
        assert "does not say whether it is UTC" in file["time"].comment
        np.testing.assert_array_equal(file["time"][:], stack.details.time)


def test_range_bins_are_not_called_metres(tmp_path):
    netcdf = pytest.importorskip("netCDF4")
    stack = replace(make(), unit="range bins")
    for path in (write_npz(tmp_path / "a.npz", stack), write_netcdf(tmp_path / "a.nc", stack)):
        assert (read_npz if path.suffix == ".npz" else read_netcdf)(path).unit == "range bins"
    with netcdf.Dataset(path) as file:
        for name in ("thickness", "depth", "thickness_standard_deviation"):
            assert file[name].units == "1"
            assert "[range bins]" in file[name].long_name
    assert "range bins" in layers_figure(stack).axes[0].get_ylabel()
    with pytest.raises(DataError, match="'feet'"):
        replace(stack, unit="feet")


@pytest.mark.parametrize(
    "stack",
    [
        pytest.param(make(), marks=pytest.mark.slow),
        described(),
        pytest.param(described(scale="unknown"), marks=pytest.mark.slow),
    ],
)
def test_netcdf_keeps_the_rules_of_cf(tmp_path, stack):
    runner = pytest.importorskip("compliance_checker.runner")
    runner.CheckSuite.load_all_available_checkers()
    path, report = write_netcdf(tmp_path / "a.nc", stack), tmp_path / "report.json"
    runner.ComplianceChecker.run_checker(
        str(path), ["cf:1.11"], 0, "strict", output_filename=str(report), output_format="json"
    )
    found = json.loads(report.read_text())["cf:1.11"]
    messages = [m for check in found["all_priorities"] for m in check["msgs"]]
    assert not messages
    assert found["scored_points"] == found["possible_points"] > 100


@pytest.mark.parametrize(
    ("utc", "ahead"),
    [
        ("1975-01-01T00:00:00", 0), ("1980-01-06T00:00:00", 0), ("1981-06-30T23:59:58", 0),
        ("1981-07-01T00:00:00", 1), ("2012-06-30T23:59:59", 15), ("2012-07-01T00:00:00", 16),
        ("2026-01-01T00:00:00", 18),
    ],
)  # fmt: skip
def test_gps_time_is_ahead_by_the_leap_seconds(utc, ahead):
    moment = float(np.datetime64(utc, "s").astype(np.int64))
    assert gps_to_utc(np.array([moment + ahead])) == moment


def test_the_date_line_is_crossed_by_a_range_of_longitudes(tmp_path):
    netcdf = pytest.importorskip("netCDF4")
    pos = np.stack([np.full(6, 70.0), [179.8, 179.9, 180.0, -179.9, -179.8, -179.7]], 1)
    with netcdf.Dataset(write_netcdf(tmp_path / "a.nc", replace(make(), pos=pos))) as file:
        assert (file.geospatial_lon_min, file.geospatial_lon_max) == (179.8, -179.7)


@pytest.mark.parametrize(
    ("attributes", "what"),
    [
        ({"title": "mine"}, "given by the writer itself"),
        ({"two words": "x"}, "no name of an attribute"),
        ({"": "x"}, "no name of an attribute"),
        ({"license": ""}, "license is ''"),
        ({"license": 3}, "license is 3"),
    ],
)
def test_attributes_that_are_none_are_refused(attributes, what):
    with pytest.raises(ConfigError, match=what):
        check_attributes(attributes)


def test_the_data_module_reads_what_is_written(tmp_path):
    from fulgurite.datamodules.ice_layers import CompletedStacks

    stack = described()
    write_npz(tmp_path / f"{file_name(stack.stack)}.npz", stack)
    (read,) = CompletedStacks(str(tmp_path)).load().stacks
    assert (read.name, read.segment) == (stack.stack, stack.segment)
    assert tuple(read.trained_segments) == stack.trained_segments
    np.testing.assert_array_equal(read.thickness, stack.thickness)
    np.testing.assert_array_equal(read.provenance, stack.provenance)
    np.testing.assert_array_equal(read.physics, stack.physics)


@pytest.mark.parametrize("kind", ["npz", "nc"])
def test_damaged_files_have_one_clear_error(tmp_path, kind):
    write, read = {"npz": (write_npz, read_npz), "nc": (write_netcdf, read_netcdf)}[kind]
    path = write(tmp_path / f"a.{kind}", make())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"a\.{kind} cannot be read"):
        read(path)
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path / f"none.{kind}")
    path.write_text("no such format")
    with pytest.raises(DataError, match="cannot be read"):
        read(path)


def test_an_npz_of_something_else_says_what_it_lacks(tmp_path):
    np.savez(tmp_path / "a.npz", thickness=np.ones((2, 2)))
    with pytest.raises(DataError, match="lacks provenance"):
        read_npz(tmp_path / "a.npz")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_npz(tmp_path / "a.npz", make(0))
    before = path.read_bytes()

    def fail(*_, **__):
        raise OSError("no space")

    monkeypatch.setattr(output.np, "savez_compressed", fail)
    with pytest.raises(OSError, match="no space"):
        write_npz(path, make(1))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_without_netcdf4_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "netCDF4", None)
    with pytest.raises(MissingExtraError, match=r"fulgurite\[ice\]"):
        write_netcdf(tmp_path / "a.nc", make())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"pos": np.zeros((6, 3))}, r"pos of shape \(6, 3\)"),
        ({"physics_names": ("smb",)}, "physics of shape"),
        ({"layer_names": ("one",)}, "1 layer_names for 4"),
        ({"provenance": np.ones((6, 4), np.uint8)}, "contradicts what is observed"),
        ({"thickness": np.full((6, 4), np.nan)}, "none where it was filled"),
        ({"details": FlightDetails(time=np.zeros(5))}, r"time of shape \(5,\), not \(6,\)"),
        ({"details": FlightDetails(twtt=np.zeros((6, 4)))}, r"twtt of shape .*, not \(6, 5\)"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, what):
    with pytest.raises(DataError, match=what):
        replace(make(), **change)


def test_batches_are_taken_apart_by_stack():
    from types import SimpleNamespace

    one, two = make(0, n=6), make(1, n=3)
    names = ("observed", "physics", "pos", "distance", "thickness", "provenance", "std")
    joined = {
        k: torch.from_numpy(np.concatenate([getattr(one, k), getattr(two, k)])) for k in names
    }
    batch = SimpleNamespace(
        **{k: joined[k] for k in names[:4]}, ptr=torch.tensor([0, 6, 9]),
        segment=torch.tensor([1, 0]), stack=torch.tensor([2, 0]),
    )  # fmt: skip
    found = completed_stacks(
        batch,
        {k: joined[k] for k in names[4:]},
        StackMetadata(
            ["s0", "s1"], ["a", "b", "c"], one.physics_names, one.layer_names, one.layer_age
        ),
        trained_segments=["s7"],
        labels=lambda number: LayerLabels(
            tuple(f"{number}{k}" for k in range(one.observed.shape[1])), one.layer_age + number, "x"
        ),
    )
    assert [s.layer_names[0] for s in found] == ["20", "00"]
    assert [s.layer_age[0] - one.layer_age[0] for s in found] == [2, 0]
    assert [s.origin.age_source for s in found] == ["x", "x"]
    assert [(s.stack, s.segment) for s in found] == [("c", "s1"), ("a", "s0")]
    for stack, made in zip(found, (one, two), strict=True):
        assert stack.thickness.tobytes() == made.thickness.tobytes()
        assert stack.std.dtype == np.float32
        assert stack.trained_segments == ("s7",)


@pytest.mark.parametrize(
    ("name", "file"), [("a/b", "a_b"), ("2012-03.1+", "2012-03.1+"), ("é ä", "é_ä"), ("", "stack")]
)
def test_names_of_stacks_are_safe_names_of_files(name, file):
    assert file_name(name) == file


# --- figures --------------------------------------------------------------------------------------


def test_the_figure_draws_completed_boundaries_over_picked_ones(tmp_path):
    stack = make(n=12)
    figure = layers_figure(stack, truth=np.nan_to_num(stack.thickness, nan=0.5))
    boundaries, kinds, spread = figure.axes[:3]
    depth, picked = boundary_depths(stack.thickness), picked_depths(stack)

    def drawn(label):
        lines = [line for line in boundaries.lines if line.get_label() == label]
        return lines, np.concatenate([line.get_ydata() for line in lines])

    (black, *_), points = drawn("picked")
    np.testing.assert_array_equal(
        np.sort(points[np.isfinite(points)]), np.sort(picked[np.isfinite(picked)])
    )
    (blue, *_), points = drawn("completed")
    known = depth[np.isnan(picked) & np.isfinite(depth)]
    np.testing.assert_array_equal(np.sort(points[np.isfinite(points)]), np.sort(known))
    assert (black.get_linestyle(), black.get_color()) != (blue.get_linestyle(), blue.get_color())
    labels = {text.get_text() for text in boundaries.get_legend().get_texts()}
    assert labels == {"picked", "completed", "truth", "90 % of the layer's thickness"}
    assert {t.get_text() for t in kinds.get_legend().get_texts()} == {
        "observed", "filled", "whole layer filled", "left missing",
    }  # fmt: skip
    np.testing.assert_array_equal(kinds.images[0].get_array(), stack.provenance.T)
    assert np.isnan(np.ma.filled(spread.images[0].get_array().astype(float), np.nan)).any()
    figure.savefig(tmp_path / "a.png")


@pytest.mark.parametrize("names", [("Koenig_1", "", "layer_03", "Koenig_4"), ()])
def test_layers_are_numbered_from_1_with_their_own_names(names):
    figure = layers_figure(replace(make(n=12), layer_names=names))
    boundaries, *panels = figure.axes[:3]
    wanted = ["1 Koenig_1", "2", "3", "4 Koenig_4"] if names else ["1", "2", "3", "4"]
    for ax in panels:
        assert list(ax.get_yticks()) == [1, 2, 3, 4]
        assert [label.get_text() for label in ax.get_yticklabels()] == wanted
    written = [text.get_text() for text in boundaries.texts]
    assert written == [wanted[k] for k in (0, 1, 3)] or written == wanted
    many = make(n=5, layers=40)
    ticks = layers_figure(replace(many, layer_names=(), layer_age=np.zeros(0))).axes[1].get_yticks()
    assert (ticks == np.round(ticks)).all()
    assert len(ticks) <= 15


def test_without_uncertainty_a_sentence_takes_the_place_of_an_empty_panel():
    stack = make()
    none = np.full_like(stack.std, np.nan)
    figure = layers_figure(replace(stack, std=none))
    assert len(figure.axes) == 2
    assert "no uncertainty was calibrated" in figure.axes[1].get_title()
    every = np.ones_like(stack.observed)
    whole = replace(
        stack, std=none, observed=every, provenance=np.zeros_like(stack.provenance),
        thickness=np.ones_like(stack.thickness),
    )  # fmt: skip
    figure = layers_figure(whole)
    assert len(figure.axes) == 2
    assert "nothing was filled" in figure.axes[1].get_title()
    assert {text.get_text() for text in figure.axes[0].get_legend().get_texts()} == {"picked"}


def test_a_stack_without_anything_is_drawn_too(tmp_path):
    stack = make()
    empty = replace(
        stack, thickness=np.full((6, 4), np.nan), observed=np.zeros((6, 4), bool),
        provenance=np.full((6, 4), 3, np.uint8), std=np.full((6, 4), np.nan, np.float32),
    )  # fmt: skip
    layers_figure(empty).savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 0


def test_depth_and_calibration_are_drawn_for_each_method():
    errors = {"ridge": {1: 0.1, 2: 0.2}, "kriging": {2: 0.05}}
    axes = depth_figure(errors).axes[0]
    assert [list(line.get_ydata()) for line in axes.lines] == [[0.1, 0.2], [0.05]]
    assert "| kriging | – | 0.050 |" in depth_table(errors)
    axes = calibration_figure({"kriging": {0.5: 0.4, 0.9: 0.88}}).axes[0]
    assert list(axes.lines[-1].get_ydata()) == [0.4, 0.88]
