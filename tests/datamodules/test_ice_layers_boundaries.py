"""Flights as the toolbox writes them: boundaries, ages, folders, days, overlaps, the date line."""

import itertools
import shutil
from dataclasses import replace

import numpy as np
import pytest
from fakes.ice_layers import (
    DENSITY,
    SEGMENT,
    SEGMENT_START,
    count_excluded,
    ice_data,
    koenig_picks,
    layer_files,
    write_picks,
)
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.io import savemat

from fulgurite.datamodules.ice_layers import MarClimate
from fulgurite.datamodules.ice_layers.readers.layer_frames import read_frame, read_mat
from fulgurite.datamodules.ice_layers.readers.layer_writer import write_layer_file
from fulgurite.datamodules.ice_layers.statistics import fit_statistics
from fulgurite.datamodules.ice_layers.tracks.resample import (
    great_circle_distance,
    interpolate_positions,
    measure_track,
)
from fulgurite.datamodules.ice_layers.tracks.travel_time import remove_crossed, thickness_to_time
from fulgurite.errors import ConfigError, DataError

THICKNESS = np.array([0.9, 0.8, 0.7, 0.6])  # [m], so that layers can be told apart


def make_track(traces=40, first=0, thickness=THICKNESS, longitude=-40.0):
    """Time, positions and picks [s] of a straight track of four layers."""
    along = (first + np.arange(traces)) * 50.0
    pos = np.stack([72.0 + along / 111_195.0, np.full(traces, longitude)], 1)
    depth = np.concatenate([[0.0], thickness_to_time(thickness, np.array(DENSITY)).cumsum()])
    return SEGMENT_START + first + np.arange(traces) * 0.5, pos, np.tile(3e-6 + depth, (traces, 1))


def change(path, **changes):
    """Write a file again, in version 5, with other variables."""
    savemat(path, read_mat(path) | changes)


def write_organizer(folder, names, ages=None, segment=SEGMENT, **changes):
    content = {
        "lyr_id": np.arange(1.0, len(names) + 1),
        "lyr_name": np.array(names, object),
        "lyr_order": np.arange(1.0, len(names) + 1),
        "lyr_age": np.full(len(names), np.nan) if ages is None else np.array(ages, float),
    }
    savemat(folder / f"layer_{segment}.mat", content | changes)


def load(folder, **options):
    return layer_files([str(folder)], **{"traces": 20, "density": DENSITY} | options).load()


def median_thickness(flights):
    thickness = np.concatenate([stack.thickness for stack in flights.stacks])
    with np.errstate(all="ignore"):
        return [
            float(np.round(np.median(x[np.isfinite(x)]), 3)) if np.isfinite(x).any() else None
            for x in thickness.T
        ]


# --- folders --------------------------------------------------------------------------------------


def test_one_segment_in_two_folders_is_refused_or_decided(tmp_path):
    write_picks(tmp_path / "season/CSARP_layer", make_track())
    other = write_picks(
        tmp_path / "season/CSARP_layer_old", make_track(thickness=THICKNESS[::-1].copy())
    )
    with pytest.raises(DataError) as error:
        load(tmp_path / "season")
    assert "CSARP_layer/20120414_01/Data_20120414_01_001.mat" in str(error.value)
    assert "CSARP_layer_old/20120414_01/Data_20120414_01_001.mat" in str(error.value)
    assert "selection.prefer=[CSARP_layer]" in error.value.hint
    first = load(tmp_path / "season", prefer=["CSARP_layer"])
    assert median_thickness(first) == THICKNESS.tolist()
    assert count_excluded(first) == {"not_preferred": 1}
    second = load(tmp_path / "season", prefer=["CSARP_layer_old", "CSARP_layer"])
    assert median_thickness(second) == THICKNESS[::-1].tolist()
    with pytest.raises(ConfigError, match="CSARP_snow"):
        load(tmp_path / "season", prefer=["CSARP_snow"])
    shutil.rmtree(other)
    other.symlink_to(tmp_path / "season/CSARP_layer" / SEGMENT)  # links to one file are one
    assert median_thickness(load(tmp_path / "season")) == THICKNESS.tolist()


def test_the_order_of_given_files_changes_nothing(tmp_path):
    folder = write_picks(tmp_path, make_track(), make_track(first=40), make_track(first=80))
    write_picks(tmp_path, make_track(), segment="20120415_01")
    for path in (tmp_path / "20120415_01").iterdir():
        change(path, gps_time=read_mat(path)["gps_time"] + 86_400.0)
    paths = [str(p) for p in sorted(folder.iterdir())] + [str(tmp_path / "20120415_01/*.mat")]
    expected = layer_files(paths, traces=20, density=DENSITY).load()
    for order in itertools.permutations(paths):
        flights = layer_files(list(order), traces=20, density=DENSITY).load()
        assert [s.name for s in flights.stacks] == [s.name for s in expected.stacks]
        for one, two in zip(flights.stacks, expected.stacks, strict=True):
            np.testing.assert_array_equal(one.thickness, two.thickness)
            np.testing.assert_array_equal(one.pos, two.pos)


def test_links_to_folders_on_other_disks_are_followed(tmp_path):
    write_picks(tmp_path / "disk", make_track())
    (tmp_path / "season").mkdir()
    (tmp_path / "season" / "link").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "loop").symlink_to(tmp_path / "disk")
    direct, linked = load(tmp_path / "disk"), load(tmp_path / "season")
    assert len(direct.stacks) == len(linked.stacks) == 2
    np.testing.assert_array_equal(direct.stacks[0].thickness, linked.stacks[0].thickness)


def test_patterns_match_folders_and_names_may_have_brackets(tmp_path):
    folder = write_picks(tmp_path / "season [2012]", make_track())
    (file,) = folder.glob("Data_*.mat")
    assert len(load(file).stacks) == 2
    assert len(load(tmp_path / "season*").stacks) == 2
    assert len(load(tmp_path / "*" / "2012*").stacks) == 2
    climate = MarClimate([str(tmp_path / "MAR [v3].nc"), str(tmp_path / "M*")])
    (tmp_path / "MAR [v3].nc").touch()
    (tmp_path / "MAR").mkdir()
    (tmp_path / "MAR" / "2012.nc").touch()
    assert climate.paths() == [tmp_path / "MAR" / "2012.nc", tmp_path / "MAR [v3].nc"]


# --- boundaries -----------------------------------------------------------------------------------


def test_names_are_filled_up_with_blanks_as_matlab_does(tmp_path):
    time, pos, picks = make_track()
    picks = np.insert(picks, 1, picks[:, 0] + 1e-5, 1)
    folder = write_picks(tmp_path, (time, pos, picks))
    names = ["surface", "Bottom ", " a", "b  ", "c", "d"]
    write_organizer(folder, names)
    assert load(tmp_path).layer_names == ("a", "b", "c", "d")
    assert median_thickness(load(tmp_path)) == THICKNESS.tolist()
    write_organizer(folder, names, lyr_name=np.array([name.ljust(9) for name in names]))
    assert load(tmp_path).layer_names == ("a", "b", "c", "d")


def test_boundaries_in_another_order_than_that_of_depth_are_refused(tmp_path):
    time, pos, picks = make_track()
    folder = write_picks(tmp_path, (time, pos, np.c_[picks[:, :1], picks[:, :0:-1]]))
    write_organizer(folder, ["surface", "d", "c", "b", "a"])
    with pytest.raises(DataError, match=r"160 of 200 picks of the segment 20120414_01") as error:
        load(tmp_path)
    assert "lyr_order in layer_20120414_01.mat" in error.value.hint
    write_organizer(folder, ["surface", "d", "c", "b", "a"], lyr_order=np.array([1.0, 5, 4, 3, 2]))
    assert median_thickness(load(tmp_path)) == THICKNESS.tolist()


@pytest.mark.parametrize(
    ("change_picks", "message"),
    [
        (lambda picks: picks - picks[:, :1], "times count from the surface"),
        (lambda picks: np.where(np.eye(40, 5, -3), 9999.0, picks), "5 travel times in .* 9999 s"),
    ],
)
def test_times_that_are_no_picks_are_refused(tmp_path, change_picks, message):
    time, pos, picks = make_track()
    write_picks(tmp_path, (time, pos, picks))
    (path,) = tmp_path.glob("*/Data_*.mat")
    change(path, twtt=change_picks(picks).T)
    with pytest.raises(DataError, match=message) as error:
        load(tmp_path)
    assert path.name in str(error.value)
    change(path, twtt=(picks - picks[:, :1] + 1e-6).T)
    assert median_thickness(load(tmp_path)) == THICKNESS.tolist()


def test_qualities_that_do_not_exist_and_flights_without_picks_are_refused(tmp_path):
    for quality in (0, 5):
        with pytest.raises(ConfigError, match="quality"):
            layer_files([str(tmp_path)], quality=quality)
    time, pos, picks = make_track()
    write_picks(tmp_path, (time, pos, np.where(np.arange(5) > 0, np.nan, picks)))
    source = layer_files([str(tmp_path)], traces=20, density=DENSITY, count=4)
    with pytest.raises(DataError, match=r"No layer is picked in any of 2 stacks") as error:
        ice_data(source).setup("fit")
    assert "predict --input" in error.value.hint


def test_exchanged_positions_are_refused(tmp_path):
    time, pos, picks = make_track()
    write_picks(tmp_path, (time, pos[:, ::-1], picks))
    with pytest.raises(DataError, match=r"stack 20120414_01_0000 are exchanged \(-40, 72\.00"):
        load(tmp_path)
    write_picks(tmp_path, (time, pos - [142.0, -110.0], picks))  # 70 S 70 E, in Antarctica
    assert median_thickness(load(tmp_path)) == THICKNESS.tolist()


def test_a_boundary_that_crosses_others_nearly_everywhere_is_named(tmp_path):
    folder = write_picks(tmp_path, make_track())
    order = np.array([1.0, 2, np.nan, 3, 4])  # the unknown one is last, as in MATLAB
    write_organizer(folder, ["surface", "a", "b", "c", "d"], lyr_order=order)
    report = load(tmp_path).report()
    assert "most picks of d, b cross those of others, as if lyr_order" in report


@pytest.mark.parametrize("absent", [0, 1, 2, 3])
def test_a_boundary_of_the_companion_that_no_file_has_is_missing(tmp_path, absent):
    time, pos, picks = make_track()
    folder = write_picks(tmp_path, (time, pos, picks))
    write_organizer(folder, ["surface", "a", "b", "c", "d"], ages=[0, 1, 3, 4, 6])
    (path,) = folder.glob("Data_*.mat")
    kept = [k for k in range(5) if k != absent]
    change(path, id=np.array(kept) + 1.0, twtt=picks.T[kept], quality=np.ones((4, 40), np.uint8))
    flights = load(tmp_path)
    expected = THICKNESS.tolist()
    for layer in (absent - 1, absent):
        if 0 <= layer < 4:
            expected[layer] = None
    assert median_thickness(flights) == expected
    assert flights.layer_names == ("a", "b", "c", "d")
    assert flights.layer_age.tolist() == [1, 3, 4, 6]
    assert ["surface", "a", "b", "c"][absent] in flights.report()


def test_without_a_surface_and_a_companion_files_are_refused(tmp_path):
    time, pos, picks = make_track()
    folder = write_picks(tmp_path, (time, pos, picks))
    (path,) = folder.glob("Data_*.mat")
    change(path, id=np.arange(2.0, 6), twtt=picks.T[1:], quality=np.ones((4, 40), np.uint8))
    with pytest.raises(DataError, match="no companion file") as error:
        load(tmp_path)
    assert f"layer_{SEGMENT}.mat" in error.value.hint
    # a companion of the layers alone names no surface either
    write_organizer(folder, ["a", "b", "c", "d"], lyr_id=np.arange(2.0, 6))
    with pytest.raises(DataError, match="no companion file names another one so"):
        load(tmp_path)
    write_organizer(folder, ["Surface", "b", "c", "d"], lyr_id=np.arange(2.0, 6))
    assert load(tmp_path).layer_names == ("b", "c", "d")


@pytest.mark.parametrize(
    ("names", "changes"),
    [
        (["surface", "a", "b", "c", "d"], {"lyr_order": np.array([9.0, 1, 2, 3, 4])}),
        (["a", "b", "Surface", "c", "d"], {}),
        (["surface", "a", "surface", "c", "d"], {}),
    ],
)
def test_a_surface_that_is_not_the_first_boundary_is_refused(tmp_path, names, changes):
    folder = write_picks(tmp_path, make_track())
    write_organizer(folder, names, **changes)
    with pytest.raises(DataError, match=r"is called surface.*lyr_order"):
        load(tmp_path)


def test_positions_in_radians_are_refused(tmp_path):
    time, pos, picks = make_track()
    write_picks(tmp_path, (time, np.radians(pos), picks))
    with pytest.raises(DataError, match="radians"):
        load(tmp_path)


@pytest.mark.parametrize("depth", [np.nan, 2e-5])
def test_a_second_boundary_without_name_is_the_bottom(tmp_path, depth):
    time, pos, picks = make_track()
    folder = write_picks(tmp_path, (time, pos, picks))
    (path,) = folder.glob("Data_*.mat")
    with_bottom = np.insert(picks.T, 1, depth, axis=0)
    change(path, id=np.arange(1.0, 7), twtt=with_bottom, quality=np.ones((6, 40), np.uint8))
    flights = load(tmp_path)
    assert median_thickness(flights) == THICKNESS.tolist()
    assert "taken for the bottom" in flights.report()


def test_a_second_boundary_above_others_is_a_layer(tmp_path):
    write_picks(tmp_path, make_track())
    flights = load(tmp_path)
    assert median_thickness(flights) == THICKNESS.tolist()
    assert "bottom" not in flights.report()


def test_the_old_format_with_absent_sets_of_picks(tmp_path):
    time, pos, picks = make_track()
    layers = np.empty(6, object)
    for k, column in enumerate([picks[:, 0], None, *picks.T[1:]]):
        if column is None:  # the bottom, which nobody picked and nobody named
            layers[k] = {"quality": np.ones(40)}
        else:
            layers[k] = {"value": np.array([{"data": column}], object), "quality": np.ones(40)}
    folder = tmp_path / SEGMENT
    folder.mkdir()
    savemat(
        folder / f"Data_{SEGMENT}_001.mat",
        {"GPS_time": time, "Latitude": pos[:, 0], "Longitude": pos[:, 1], "layerData": layers},
    )
    assert median_thickness(load(tmp_path)) == THICKNESS.tolist()


def test_frames_without_layers_are_completed(tmp_path):
    write_picks(tmp_path, make_track(), make_track(first=40))
    empty = write_picks(tmp_path, make_track(), segment="20120415_01")
    nothing = {"id": np.zeros((0, 0)), "twtt": np.zeros((0, 40)), "quality": np.zeros((0, 40))}
    change(tmp_path / SEGMENT / f"Data_{SEGMENT}_002.mat", **nothing)
    (path,) = empty.iterdir()
    change(path, gps_time=read_mat(path)["gps_time"] + 86_400.0, **nothing)
    source = layer_files([str(tmp_path)], traces=20, density=DENSITY)
    assert [s.observed.any() for s in source.load().stacks] == [True, True, *[False] * 4]
    data = ice_data(source, val=0.0, test=0.0, predict="train", batch_size=1)
    data.setup()
    assert len(data.stacks_of("train")) == 2
    names = [data.stacks[int(batch.stack)] for batch in data.predict_dataloader()]
    assert names == [f"{SEGMENT}_{k:04}" for k in range(4)]
    data.evaluation = replace(data.evaluation, predict="all")
    names = [data.stacks[int(batch.stack)] for batch in data.predict_dataloader()]
    assert names == [f"{SEGMENT}_{k:04}" for k in range(4)] + [
        "20120415_01_0000",
        "20120415_01_0001",
    ]
    assert data.statistics["physics_mean"].shape == (0,)  # there is no climate


def test_doubled_boundaries_join_unless_they_contradict(tmp_path):
    time, pos, picks = make_track(traces=4)
    write_layer_file(path := tmp_path / "a.mat", time, pos, picks)
    twtt = picks.T.copy()
    twtt[1, :2], upper = np.nan, twtt[1].copy()
    double = np.concatenate([twtt, upper[None]])
    double[-1, 2:] = np.nan
    change(path, id=np.array([1.0, 2, 3, 4, 5, 2]), twtt=double, quality=np.ones((6, 4), np.uint8))
    frame = read_frame(path)
    assert frame.ids == (1, 2, 3, 4, 5)
    np.testing.assert_array_equal(frame.twtt, picks)
    double[-1, 3] = 1e-6
    change(path, twtt=double)
    with pytest.raises(DataError, match="boundary 2 comes twice"):
        read_frame(path)


def test_unknown_grades_are_good(tmp_path):
    time, pos, picks = make_track(traces=4)
    write_layer_file(path := tmp_path / "a.mat", time, pos, picks)
    grades = np.ones((5, 4))
    grades[:, 1:] = [np.nan, 255, 3]
    change(path, quality=grades)
    observed = np.isfinite(read_frame(path, quality=2).twtt)
    np.testing.assert_array_equal(observed, np.tile([[True], [True], [True], [False]], (1, 5)))


def test_names_that_cannot_be_read_are_refused(tmp_path):
    folder = write_picks(tmp_path, make_track())
    write_organizer(folder, ["surface", "a", "b", "c", "d"], lyr_name=np.zeros((1, 0)))
    with pytest.raises(DataError, match="0 names lyr_name") as error:
        load(tmp_path)
    assert "cellstr" in error.value.hint


@pytest.mark.parametrize(
    ("ages", "message"),
    [
        ([0, 1, np.nan, 4, 5], "no age of the boundary b"),
        ([0, 1, 3, 3, 5], "do not rise"),
        ([0, 4, 3, 2, 1], "do not rise"),
        ([5, 6, 7, 8, 9], "The surface is 5 years old"),
    ],
)
def test_ages_of_some_layers_alone_are_refused(tmp_path, ages, message):
    folder = write_picks(tmp_path, make_track())
    write_organizer(folder, ["surface", "a", "b", "c", "d"], ages)
    with pytest.raises(DataError, match=message) as error:
        load(tmp_path)
    assert "picks.ages=yearly" in error.value.hint
    assert load(tmp_path, ages="yearly").layer_age.tolist() == [1, 2, 3, 4]
    write_organizer(folder, ["surface", "a", "b", "c", "d"])  # none is known
    assert load(tmp_path).layer_age.tolist() == [1, 2, 3, 4]


# --- crossed picks --------------------------------------------------------------------------------


@given(st.lists(st.one_of(st.none(), st.integers(0, 6)), min_size=1, max_size=7))
@example([0, 5, 6, 2, 3, 7])
@example([0, 5, None, 3, 6])
def test_picks_that_stay_rise_and_what_never_crossed_stays(values):
    picks = np.array([[np.nan if v is None else float(v) for v in values]])
    kept, crossed = remove_crossed(picks)
    finite = kept[np.isfinite(kept)]
    assert (np.diff(finite) > 0).all()
    assert np.isin(finite, picks).all()
    rising = picks[np.isfinite(picks)]
    if (np.diff(rising) > 0).all():
        assert crossed == 0
        np.testing.assert_array_equal(kept, picks)
    else:
        assert 0 < crossed <= np.isfinite(picks).sum() - np.isfinite(kept).sum()


# --- days and overlaps ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shift", "hint"), [(-315_964_785.0, "add 315964800 s"), (-3650 * 86_400.0, "since 1970")]
)
def test_times_of_another_day_than_the_name_are_refused(tmp_path, shift, hint):
    time, pos, picks = make_track()
    write_picks(tmp_path, (time + shift, pos, picks))
    with pytest.raises(DataError, match="before the day in its name") as error:
        load(tmp_path)
    assert hint in error.value.hint
    assert f"Data_{SEGMENT}_001.mat" in error.value.problem


def test_a_flight_over_midnight_is_of_its_day(tmp_path):
    time, pos, picks = make_track()
    write_picks(tmp_path, (time + 86_400.0, pos, picks))
    assert len(load(tmp_path).stacks) == 2


def test_traces_of_two_solutions_of_navigation_are_one(tmp_path):
    time, pos, picks = make_track(traces=60)
    moved = pos + np.array([3e-6, 0.0])  # another solution, 0.3 m off
    first = picks.copy()
    first[35:40, 2] = np.nan  # which the second file has
    second = picks.copy()
    second[22:24, 4] += 1e-10  # which contradicts
    write_picks(tmp_path, (time[:40], pos[:40], first[:40]), (time[20:], moved[20:], second[20:]))
    flights = load(tmp_path, traces=60)
    (stack,) = flights.stacks
    assert stack.observed.all()
    assert count_excluded(flights) == {"repeated": 20, "contradicting": 2}
    np.testing.assert_allclose(stack.thickness, np.tile(THICKNESS, (60, 1)), atol=1e-4)


def test_a_trace_that_comes_twice_in_a_file_has_the_picks_of_both(tmp_path):
    time, pos, picks = make_track(traces=60)
    moved = pos + np.array([3e-6, 0.0])
    twice = np.sort([*range(20, 60), 50])
    second = picks[twice]
    second[30, 1:] = np.nan  # the first of both
    first = picks.copy()
    first[35:40, 2] = np.nan
    write_picks(tmp_path, (time[:40], pos[:40], first[:40]), (time[twice], moved[twice], second))
    flights = load(tmp_path, traces=60)
    (stack,) = flights.stacks
    assert stack.observed.all()
    assert count_excluded(flights) == {"repeated": 21}


def test_traces_without_time_do_not_keep_files_from_being_joined(tmp_path):
    time, pos, picks = make_track(traces=60)
    moved = pos + np.array([3e-6, 0.0])
    untimed = time.copy()
    untimed[[50, 53]] = np.nan
    first = picks.copy()
    first[35:40, 2] = np.nan
    write_picks(tmp_path, (time[:40], pos[:40], first[:40]), (untimed[20:], moved[20:], picks[20:]))
    flights = load(tmp_path, traces=60)
    (stack,) = flights.stacks
    assert count_excluded(flights) == {"position": 2, "repeated": 20, "hole": 2}
    assert np.flatnonzero(~stack.observed.all(1)).tolist() == [50, 53]


# --- positions ------------------------------------------------------------------------------------


@given(
    st.floats(-180, 180), st.floats(-85, 85), st.floats(0, 360),
    st.lists(st.floats(20, 30), min_size=5, max_size=30),
)  # fmt: skip
@example(179.9999, -79.0, 90.0, [25.0] * 20)
def test_longitudes_do_not_matter(longitude, latitude, heading, steps):
    """Tracks that are turned around the axis of the Earth are turned, and nothing else."""
    along = np.cumsum(steps) / 111_195.0
    north = latitude + along * np.cos(np.radians(heading)) * 0.5
    east = along * np.sin(np.radians(heading)) / np.cos(np.radians(latitude))
    straight = np.stack([north, east], 1)
    turned = straight + np.array([0.0, longitude])
    turned[:, 1] -= 360.0 * np.round(turned[:, 1] / 360.0)
    distance = measure_track(straight)
    places = np.linspace(0, distance[-1], 50)
    expected = interpolate_positions(distance, straight, places)
    positions = interpolate_positions(measure_track(turned), turned, places)
    assert great_circle_distance(expected + np.array([0.0, longitude]), positions).max() < 1e-2
    assert np.diff(measure_track(positions)).max() < 2 * distance[-1] / 49 + 1e-2
    np.testing.assert_allclose(
        expected[:, 0], np.interp(places, distance, straight[:, 0]), atol=1e-7
    )


def test_a_track_over_the_pole_goes_straight():
    pos = np.array([[89.9, 0.0], [89.9, 180.0]])
    positions = interpolate_positions(
        measure_track(pos), pos, measure_track(pos)[1] * np.array([0.25, 0.5])
    )
    np.testing.assert_allclose(positions[0], [89.95, 0.0], atol=1e-9)
    np.testing.assert_allclose(positions[1, 0], 90.0, atol=1e-9)


def test_a_track_over_the_date_line_is_one(tmp_path):
    time, pos, picks = make_track(traces=60)
    steps = np.cumsum(50 * (1 + 0.1 * np.random.default_rng(0).normal(size=60)))
    pos = np.stack([np.full(60, -79.0), 179.98 + steps / (111_195.0 * np.cos(np.radians(79)))], 1)
    pos[:, 1] -= 360.0 * (pos[:, 1] > 180)
    write_picks(tmp_path, (time, pos, picks))
    (stack,) = load(tmp_path, traces=60, spacing=50.0).stacks
    assert stack.distance[-1] < 60 * 60
    assert np.abs(stack.pos[:, 1]).min() > 179.8
    statistics = fit_statistics([stack])
    assert statistics["pos_std"][1] < 0.3
    offset = (stack.pos[:, 1] - float(statistics["pos_mean"][1]) + 180) % 360 - 180
    assert np.abs(offset).max() < 0.3


# --- Koenig's tables ------------------------------------------------------------------------------


def koenig_table(folder, name, depths, time):
    pos = make_track(traces=len(depths))[1]
    lines = []
    for i, row in enumerate(depths):
        words = [name, f"{i}", f"{pos[i, 0]:.8f}", f"{pos[i, 1]:.8f}", f"{time + i:.2f}"]
        words.append("2.88567e-10")
        for depth in row:
            words += [f"{100 + depth / 0.0323:.6f}", f"{depth:.6f}", "0.1", f"{depth:.6f}", "0.1"]
        lines.append(" ".join(words))
    (folder / "mapdata.txt").write_text("\n".join(lines))


def test_tables_of_2009_are_named_by_the_day(tmp_path):
    koenig_table(tmp_path, "layers_20090331_dec03", np.tile(THICKNESS.cumsum(), (30, 1)), 44.81)
    (stack,) = koenig_picks([str(tmp_path)], count=4, traces=30).load().stacks
    assert stack.segment == "20090331"
    np.testing.assert_allclose(stack.thickness, np.tile(THICKNESS, (30, 1)), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "time"), [("layers_20090331_dec03", 44.0), (f"IRSNO1B_{SEGMENT}_015", SEGMENT_START)]
)
def test_the_order_of_lines_and_tables_changes_nothing(tmp_path, name, time):
    """Five traces share a second, and those of 2009 have no time: their numbers order them."""
    generator = np.random.default_rng(0)
    depths = np.cumsum(THICKNESS * generator.uniform(0.8, 1.2, (40, 4)), 1)
    koenig_table(tmp_path, name, depths, time)
    path = tmp_path / "mapdata.txt"
    lines = [line.split() for line in path.read_text().splitlines()]
    for words in lines:
        words[4] = str(int(time + int(words[1]) // 5))
    generator.shuffle(lines)
    for number, part in ((2, lines[:25]), (10, lines[20:])):  # some lines are in both
        text = "\n".join(" ".join(words) for words in part)
        (tmp_path / f"mapdata{number}.txt").write_text(text)
    path.unlink()
    (stack,) = koenig_picks([str(tmp_path)], count=4, traces=40).load().stacks
    expected = np.diff(depths, axis=1, prepend=0.0)
    np.testing.assert_allclose(stack.thickness, expected, atol=1e-4)


@pytest.mark.parametrize("surface", [None, "first_pick", "zero"])
def test_depths_and_bins_name_the_same_years(tmp_path, surface):
    depths = np.concatenate([[0.05], 0.05 + THICKNESS.cumsum()])  # the first pick is the surface
    koenig_table(tmp_path, f"IRSNO1B_{SEGMENT}_015", np.tile(depths, (30, 1)), SEGMENT_START)
    options = {"count": 4, "traces": 30}
    flights = koenig_picks([str(tmp_path)], surface=surface, **options).load()
    expected = [0.05, *THICKNESS[:3]] if surface == "zero" else THICKNESS
    np.testing.assert_allclose(flights.stacks[0].thickness[0], expected, atol=1e-5)
    bins = koenig_picks([str(tmp_path)], thickness="bins", density=0.4, **options).load()
    step = 2.88567e-10 * 299_792_458 / (2 * (1 + 0.845 * 0.4))
    np.testing.assert_allclose(bins.stacks[0].thickness[0], THICKNESS / 0.0323 * step, rtol=1e-4)
    assert ("surface=first_pick" in flights.report()) == (surface is None)


def test_each_flight_says_what_its_first_pick_is(tmp_path):
    layers = THICKNESS.cumsum()
    depths = {"20110401_01": np.concatenate([[0.05], 0.05 + layers[:3]]), SEGMENT: layers[:4]}
    for number, (segment, its) in enumerate(depths.items()):
        (tmp_path / str(number)).mkdir()
        start = float(
            np.datetime64(f"{segment[:4]}-{segment[4:6]}-{segment[6:8]}T12", "s").astype(int)
        )
        koenig_table(tmp_path / str(number), f"IRSNO1B_{segment}_015", np.tile(its, (30, 1)), start)
    options = {"count": 3, "traces": 30}
    alone = [koenig_picks([str(tmp_path / n)], **options).load() for n in "01"]
    for flights in alone:
        np.testing.assert_allclose(flights.stacks[0].thickness[0], THICKNESS[:3], atol=1e-5)
    with pytest.raises(
        DataError, match=rf"20110401_01 are the surface .* {SEGMENT} are not"
    ) as error:
        koenig_picks([str(tmp_path)], **options).load()
    assert "surface" in error.value.hint


def test_bins_have_no_depth_zero(tmp_path):
    with pytest.raises(ConfigError, match="surface"):
        koenig_picks(["x"], thickness="bins", surface="zero")
    # the first pick is a year's layer, by its depth
    koenig_table(
        tmp_path, f"IRSNO1B_{SEGMENT}_015", np.tile(THICKNESS.cumsum(), (30, 1)), SEGMENT_START
    )
    options = {"count": 3, "traces": 30, "thickness": "bins", "density": 0.4}
    with pytest.raises(DataError, match="not the surface, whose range bin") as error:
        koenig_picks([str(tmp_path)], **options).load()
    assert "thickness=depth" in error.value.hint
    flights = koenig_picks([str(tmp_path)], surface="first_pick", **options).load()
    assert flights.stacks[0].thickness.shape == (30, 3)


# --- real frames ----------------------------------------------------------------------------------


@pytest.mark.realdata
def test_real_frames_with_and_without_layers():
    source = layer_files(["csarp_layer"], density=0.5, count=2, thickest=500.0, traces=64)
    flights = source.load()
    assert flights.segments == ("20181030_01",)  # the other one has no position either
    assert count_excluded(flights)["position"] == 1113
    assert flights.layer_names == ("test", "test1")  # without the bottom
    assert sum(int(stack.observed[:, 0].sum()) for stack in flights.stacks) > 3000
    assert {stack.observed.any() for stack in flights.stacks} == {True, False}
