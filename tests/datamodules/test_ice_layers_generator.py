"""Generated flights: real files, read by the readers of real ones, with their statistics."""

from itertools import pairwise

import h5py
import netCDF4
import numpy as np
import pandas as pd
import pytest
from fakes.ice_layers import SMALL_WORLD

from fulgurite.datamodules.ice_layers import ForcedFlights, SyntheticFlights, World
from fulgurite.datamodules.ice_layers.generator.forcing import read_site
from fulgurite.datamodules.ice_layers.generator.random_fields import gaussian_field, markov_gaps
from fulgurite.datamodules.ice_layers.tracks.resample import great_circle_distance
from fulgurite.errors import ConfigError, DataError


def stacked(flights, name):
    return np.stack([getattr(stack, name) for stack in flights.stacks])


def test_shapes_and_names(generated):
    assert len(generated.stacks) == 60
    assert len(generated.segments) == 12
    assert generated.physics == ("smb", "st", "refreeze", "melt", "snowpack")
    assert generated.layer_names[:2] == ("layer_01", "layer_02")
    np.testing.assert_array_equal(generated.layer_age, np.arange(1.0, 9.0))
    assert {stack.thickness.shape for stack in generated.stacks} == {(32, 8)}
    assert all(stack.segment[8] == "_" for stack in generated.stacks)


def test_the_files_are_those_of_the_formats(filled_cache):
    root = SyntheticFlights(World(**SMALL_WORLD)).root
    frame = sorted(root.glob("CSARP_layer/*/Data_*_001.mat"))[0]
    assert frame.read_bytes().startswith(b"MATLAB 7.3 MAT-file")
    with h5py.File(frame) as file:
        traces = file["gps_time"].shape[0]
        assert file["twtt"].shape == (traces, 9)  # MATLAB shows the transpose
        assert {"lat", "lon", "elev", "id", "quality", "type", "file_type"} <= set(file)
        assert np.nanmedian(file["twtt"][:]) < 1e-5
    assert frame.with_name(f"layer_{frame.parent.name}.mat").is_file()
    with netCDF4.Dataset(sorted(root.glob("MAR/*.nc"))[3]) as data:
        assert data["SMB"].shape == (12, *data["LAT"].shape)
        assert {"ME", "RU", "ST", "ZN6", "SRF", "LON", "TIME"} <= set(data.variables)
        assert "RZ" not in data.variables  # has to be derived


def test_what_is_read_is_the_truth_and_the_noise_of_picks(generated):
    truth, thickness = stacked(generated, "truth"), stacked(generated, "thickness")
    error = (thickness - truth)[np.isfinite(thickness)]
    # two picks' noise of 12 mm, and mis-tracks beyond
    assert np.median(np.abs(error)) == pytest.approx(0.6745 * 0.012 * np.sqrt(2), rel=0.15)
    assert 0.005 < (np.abs(error) > 0.15).mean() < 0.03
    assert not np.isnan(truth).any()
    assert 0.5 < truth.mean() < 1.3
    assert truth.mean((0, 1))[0] > truth.mean((0, 1))[-1] * 1.15  # compaction


def test_missingness_grows_with_depth_and_is_structured(generated):
    missing = ~np.stack([stack.observed for stack in generated.stacks])
    by_layer = missing.mean((0, 1))
    assert by_layer[0] < 0.12
    assert by_layer[-1] > 0.5
    assert 0.3 < missing.mean() < 0.45  # 38.6 % on the paper's page
    absent = missing.all(1).sum(1).mean()
    assert 0.5 < absent < 2.5
    same = (missing[:, 1:] == missing[:, :-1]).mean()
    assert same > 0.88  # runs: independent entries would agree at 0.55


def test_the_climate_says_half_and_the_neighbours_the_rest(generated):
    smb = np.log(stacked(generated, "physics")[..., 0])
    truth = np.log(stacked(generated, "truth"))
    assert 0.75 < np.corrcoef(smb.ravel(), truth.ravel())[0, 1] < 0.97  # 0.87 there
    # within a block the climate hardly varies, thickness does
    assert truth.std(1).mean() > 4 * smb.std(1).mean()
    rest = truth - truth.mean(1, keepdims=True)
    layers = np.einsum("bni,bnj->ij", rest, rest)
    shared = layers / np.sqrt(np.outer(np.diag(layers), np.diag(layers)))
    assert 0.5 < shared[np.triu_indices(8, 1)].mean() < 0.9  # 0.75 of the variance persists


def test_generation_repeats_itself_and_follows_the_seed(tmp_path, monkeypatch):
    world, made = {"stacks": 8, "traces": 16, "layers": 4, "segments": 4}, []
    for number, seed in enumerate((0, 0, 1)):  # each anew
        monkeypatch.setenv("FULGURITE_CACHE", str(tmp_path / f"{number}"))
        made.append(SyntheticFlights(World(**world, seed=seed)).load())
    one, again, other = made
    np.testing.assert_array_equal(stacked(again, "thickness"), stacked(one, "thickness"))
    np.testing.assert_array_equal(stacked(again, "physics"), stacked(one, "physics"))
    assert not np.array_equal(stacked(other, "truth"), stacked(one, "truth"))


def test_options(generated, filled_cache):
    whole = SyntheticFlights(World(**SMALL_WORLD, missing=0.0, mistracks=0.0, noise=0.0)).load()
    np.testing.assert_allclose(
        stacked(whole, "thickness"), stacked(whole, "truth"), atol=0.04
    )  # but for the density that is not exactly known
    np.testing.assert_array_equal(stacked(whole, "truth"), stacked(generated, "truth"))
    other = SyntheticFlights(World(**SMALL_WORLD, mistracks=0.08, traced=0.5)).load()
    full = np.array([stack.observed.all() for stack in other.stacks])
    assert 15 < full.sum() < 45
    error = np.abs(stacked(other, "thickness") - stacked(other, "truth"))
    assert error[full].max() < 0.15
    wrong = error[~full]
    assert (wrong[np.isfinite(wrong)] > 0.15).mean() > 0.05


def test_physics_that_say_nothing(generated, filled_cache):
    control = SyntheticFlights(World(**SMALL_WORLD), informative=False).load()
    np.testing.assert_array_equal(stacked(control, "thickness"), stacked(generated, "thickness"))
    truth = np.log(stacked(control, "truth")).ravel()
    smb = np.log(stacked(control, "physics")[..., 0])
    assert abs(np.corrcoef(smb.ravel(), truth)[0, 1]) < 0.15
    real = np.log(stacked(generated, "physics")[..., 0])
    np.testing.assert_allclose(np.sort(smb.mean(1).ravel()), np.sort(real.mean(1).ravel()))


def test_blocks_lie_on_lines_and_segments_apart(generated):
    first = generated.stacks[0]
    assert great_circle_distance(first.pos[0], first.pos[-1]) == pytest.approx(
        first.distance[-1], rel=1e-6
    )
    assert first.distance[-1] == pytest.approx(3100, rel=0.01)
    ends = [s.pos[0] for s in generated.stacks if s.segment == first.segment]
    assert min(great_circle_distance(a, b) for a, b in pairwise(ends)) > 3200


@pytest.mark.parametrize(
    "options", [{"stacks": 0}, {"segments": 61}, {"mistracks": 2.0}, {"layers": 1}, {"traces": 1}]
)
def test_impossible_recipes(options):
    with pytest.raises(ConfigError, match=rf"The {next(iter(options))} of world (is|are) "):
        SyntheticFlights(World(**SMALL_WORLD | options))


def test_segments_that_do_not_fit(filled_cache):
    with pytest.raises(ConfigError, match="does not fit the region"):
        SyntheticFlights(World(stacks=600, traces=64, segments=1, layers=2)).load()


def test_gaps_have_their_rate_and_length():
    share, length = np.array([0.3, 0.6]), np.array([8.0, 20.0])
    gaps = markov_gaps(share, length, 40_000, np.random.default_rng(0))
    np.testing.assert_allclose(gaps.mean(1), share, atol=0.04)
    starts = (gaps[:, 1:] & ~gaps[:, :-1]).sum(1)
    np.testing.assert_allclose(gaps.sum(1) / starts, length, rtol=0.12)


@pytest.mark.parametrize("length", [1.0, 2.0, 6.0])
def test_random_fields_have_their_length(length):
    field = gaussian_field((200, 40, 41), length, np.random.default_rng(0))
    assert field.var() == pytest.approx(1, rel=0.1)
    lag = max(1, round(length))
    found = (field[:, lag:] * field[:, :-lag]).mean() / field.var()
    assert found == pytest.approx(np.exp(-((lag / length) ** 2) / 2), abs=0.05)


def write_site(folder, name="CFM_example_66.5_-46.25", years=30, seed=0, **changes):
    """A series in the layout of the Community Firn Model's examples."""
    days = pd.date_range("1980-01-01", periods=int(years * 365.25), freq="D")
    generator = np.random.default_rng(seed)
    season = np.cos(2 * np.pi * (days.day_of_year.to_numpy() - 200) / 365.25)
    yearly = 1 + 0.2 * generator.standard_normal(years + 1)[days.year - 1980]
    table = pd.DataFrame(
        {
            "T2m": 256 + 10 * season,
            "TSKIN": 254 + 10 * season,
            "RAIN": 0.05 * (season > 0.5),
            "BDOT": 1.3 * yearly * generator.exponential(size=len(days)),
            "SMELT": 2.0 * (season > 0.7),
        },
        index=days,
    )
    for key, change in changes.items():
        table[key] = change(table[key])
    table.to_csv(folder / f"{name}.csv")
    return table


def test_flights_over_given_years(tmp_path, filled_cache):
    write_site(tmp_path)
    cold = {"BDOT": lambda v: v * 0.4, "TSKIN": lambda v: v - 10, "SMELT": lambda v: v * 0}
    write_site(tmp_path, "CFM_example_72.5_-38.75", seed=1, **cold)
    flights = ForcedFlights(str(tmp_path), World(**SMALL_WORLD)).load()
    north = np.array([stack.pos[0, 0] > 70 for stack in flights.stacks])
    assert 20 < north.sum() < 40
    physics = stacked(flights, "physics")
    smb, temperature = physics[..., 0].mean((1, 2)), physics[..., 1].mean((1, 2))
    assert smb[north].mean() == pytest.approx(0.4 * 1.3 * 365 + 9, rel=0.35)
    assert smb[~north].mean() > 1.5 * smb[north].mean()
    assert temperature[north].mean() == pytest.approx(temperature[~north].mean() - 10, abs=1)
    truth, thickness = stacked(flights, "truth"), stacked(flights, "thickness")
    assert np.nanmedian(np.abs(thickness - truth)) < 0.02
    # layers of the same year at the same place know of each other
    years = [int(stack.segment[:4]) for stack in flights.stacks]
    assert min(years) >= 1989
    assert max(years) <= 2010


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"BDOT": lambda v: v / 1000}, "BDOT of .* is .* not in kg m⁻² per day"),
        ({"TSKIN": lambda v: v - 273.15}, "TSKIN of .* not in K"),
        ({"SMELT": lambda v: v.mask(v.index == "1990-06-01")}, "days without a value"),
    ],
)
def test_series_of_other_units_or_with_holes(tmp_path, changes, message):
    write_site(tmp_path, **changes)
    with pytest.raises(DataError, match=message):
        read_site(next(tmp_path.glob("*.csv")))


def test_series_that_are_no_series(tmp_path):
    table = write_site(tmp_path)
    path = next(tmp_path.glob("*.csv"))
    table.drop(columns="SMELT").to_csv(path)
    with pytest.raises(DataError, match="SMELT"):
        read_site(path)
    table.drop(table.index[100]).to_csv(path)
    with pytest.raises(DataError, match="consecutive days"):
        read_site(path)
    path.write_bytes(b"\xff\x00broken")
    with pytest.raises(DataError, match=r"cannot be read|no column"):
        read_site(path)
    path.unlink()
    with pytest.raises(DataError, match="no CFM_example"):
        ForcedFlights(str(tmp_path), World(**SMALL_WORLD)).load()


@pytest.mark.realdata
@pytest.mark.slow  # flights over given years, above, are not
def test_flights_over_the_real_years(filled_cache):
    made = ForcedFlights(world=World(stacks=40, traces=32, layers=8, segments=20)).load()
    physics = stacked(made, "physics")
    north = np.array([stack.pos[0, 0] > 70 for stack in made.stacks])
    # sums of the files: 209 kg m⁻² a year and hardly any melt at 72.5° N, much melt at 66.5° N
    assert physics[north][..., 0].mean() == pytest.approx(209, rel=0.15)
    assert np.abs(physics[north][..., 3]).max() < 0.01
    assert physics[~north][..., 3].mean() < -0.3
    truth = stacked(made, "truth")
    assert 0.35 < truth[north].mean() < 0.65
    assert truth.min() > 0.05  # every year has left snow
