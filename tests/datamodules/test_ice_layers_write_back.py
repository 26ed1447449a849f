"""Completed layers written back as layer files: picks stay, the reader reads what was filled."""

import numpy as np
import pytest
from fakes.ice_layers import DENSITY, NAME, ice_data, layer_files, make_flight, write_frame
from hypothesis import given
from hypothesis import strategies as st
from scipy.io import savemat

from fulgurite.datamodules.ice_layers import (
    NpzStacks,
    SyntheticSred,
)
from fulgurite.datamodules.ice_layers.readers.layer_frames import (
    read_frame,
    read_mat,
    read_organizer,
)
from fulgurite.datamodules.ice_layers.readers.write_back import anchor_times
from fulgurite.datamodules.ice_layers.tracks.records import times_below
from fulgurite.datamodules.ice_layers.tracks.travel_time import time_to_thickness
from fulgurite.errors import ConfigError, DataError

LAYERS = 4


def flight(traces=60):
    return make_flight(traces, LAYERS, is_smooth=True)


def with_gaps(recorded):
    """Gaps of single boundaries, of neighbouring ones, below the last pick and of the surface."""
    twtt = recorded["twtt"].copy()
    twtt[1, 5:15] = np.nan
    twtt[2:4, 20:30] = np.nan
    twtt[4, 10:40] = np.nan
    twtt[0, 50] = np.nan
    return recorded | {"twtt": twtt}


def completed(source, recorded, out, choose=lambda stack: True):
    """Write a source's files back, completed by the truth; gives what was written."""
    flights = source.load()
    thickness = time_to_thickness(np.diff(recorded["twtt"], axis=0).T, DENSITY)
    stacks = []
    for stack in flights.stacks:
        first = round(stack.record.flight_distance[0] / 25.0)
        true = thickness[first : first + len(stack.pos)]
        assert np.allclose(true, stack.thickness, equal_nan=True) or np.isnan(stack.thickness).any()
        if choose(stack):
            stacks.append((stack.record, times_below(stack.record, true, stack.known_spans)))
    return source.write_back(out, NAME, stacks)


def filled(stack, usual):
    """A stack with one thickness [m] for each missing layer, as it is written back."""
    thickness = np.where(np.isnan(stack.thickness), usual, stack.thickness)
    return stack.record, times_below(stack.record, thickness, stack.known_spans)


def reader(folder, **options):
    return layer_files([str(folder)], **{"density": DENSITY, "traces": 20} | options)


def picks(folder, number=1):
    return read_frame(folder / NAME / f"Data_{NAME}_{number:03}.mat")


def test_picks_stay_and_what_is_filled_is_read_back(tmp_path):
    recorded = flight()
    for number, rows in ((1, slice(0, 33)), (2, slice(33, 60))):
        write_frame(tmp_path / "in", number, with_gaps(recorded), rows)
    written = completed(reader(tmp_path / "in"), recorded, tmp_path / "out")
    assert written.frames == 2
    assert written.crossing == 0
    assert written.without_surface == 1
    added = 0
    for number in (1, 2):
        old, new = (picks(tmp_path / where, number) for where in ("in", "out"))
        for name in ("time", "pos", "elevation"):
            assert getattr(old, name).tobytes() == getattr(new, name).tobytes(), name
        assert old.ids == new.ids
        had = np.isfinite(old.twtt)
        assert old.twtt[had].tobytes() == new.twtt[had].tobytes()
        np.testing.assert_array_equal(new.grades[had], 2)
        np.testing.assert_array_equal(new.kinds[had], 1)
        is_new = np.isfinite(new.twtt) & ~had
        added += int(is_new.sum())
        np.testing.assert_array_equal(new.grades[is_new], 3)  # derived
        np.testing.assert_array_equal(new.kinds[is_new], 2)  # automatic
    assert written.filled == added == 10 + 20 + 30
    twtt = np.concatenate([picks(tmp_path / "out", k).twtt for k in (1, 2)])
    wanted = recorded["twtt"].T.copy()
    wanted[50, 0] = np.nan  # nobody knows where the surface is
    np.testing.assert_allclose(twtt, wanted, rtol=0, atol=1e-14)
    content = read_mat(tmp_path / "out" / NAME / f"Data_{NAME}_001.mat")
    assert (content["file_type"], content["file_version"]) == ("layer", "1")
    assert content["param"]["day_seg"] == NAME
    # our own reader reads the completed stacks
    again = reader(tmp_path / "out").load()
    truth = time_to_thickness(np.diff(wanted, axis=1), DENSITY)
    np.testing.assert_allclose(
        np.concatenate([s.thickness for s in again.stacks]), truth, rtol=1e-6, equal_nan=True
    )


def test_frames_of_one_trace_or_one_boundary_keep_the_types_of_their_picks(tmp_path):
    recorded = flight()
    for number, rows in ((1, slice(0, 33)), (2, slice(33, 34)), (3, slice(34, 60))):
        write_frame(tmp_path / "in", number, recorded, rows)
    surface = recorded | {"twtt": recorded["twtt"][:1]}
    write_frame(tmp_path / "in", 3, surface, slice(34, 60))
    completed(reader(tmp_path / "in"), recorded, tmp_path / "out")
    for number, columns in ((2, slice(None)), (3, slice(0, 1))):
        old, new = (picks(tmp_path / where, number) for where in ("in", "out"))
        had = np.isfinite(old.twtt)
        assert had.any()
        np.testing.assert_array_equal(new.kinds[:, columns][had], 1)  # manual


def test_absent_boundaries_get_numbers_and_the_companion_names_them(tmp_path):
    recorded = flight()
    some = with_gaps(recorded)
    some["twtt"] = some["twtt"][[0, 1, 3]]
    write_frame(tmp_path / "in", 1, some, slice(None), ids=[1, 7, 4])
    organizer = {
        "lyr_id": [[1.0, 7.0, 9.0, 4.0]], "lyr_age": [[0.0, 1.0, 2.0, 3.0]],
        "lyr_order": [[1.0, 2.0, 3.0, 4.0]],
        "lyr_name": np.array([["surface", "first", "second", "third"]], object),
        "lyr_group_name": np.array([["standard", "years", "", "years"]], object),
    }  # fmt: skip
    savemat(tmp_path / "in" / NAME / f"layer_{NAME}.mat", organizer)
    source = reader(tmp_path / "in", count=4)
    written = completed(source, recorded, tmp_path / "out")
    ages_from = source.load().stacks[0].labels.age_source
    assert ages_from == "of the companion file down to layer 3, a year apart below"
    assert written.filled > 2 * 58
    new = picks(tmp_path / "out")
    assert new.ids == (1, 7, 4, 9, 10)  # the listed one, and one that nobody has heard of
    named = read_organizer(tmp_path / "out" / NAME / f"layer_{NAME}.mat")
    assert named.order == (1, 7, 9, 4, 10)
    assert named.names == {1: "surface", 7: "first", 9: "second", 4: "third", 10: "layer_04"}
    assert named.age == {1: 0.0, 7: 1.0, 9: 2.0, 4: 3.0}  # none is invented
    content = read_mat(named.path)
    assert content["lyr_group_name"] == ["standard", "years", "", "years", ""]
    again = reader(tmp_path / "out", count=4, ages="yearly").load()
    assert again.layer_names == ("first", "second", "third", "layer_04")
    truth = time_to_thickness(np.diff(recorded["twtt"], axis=0).T, DENSITY)
    truth[50] = np.nan
    np.testing.assert_allclose(
        np.concatenate([s.thickness for s in again.stacks]), truth, rtol=1e-6, equal_nan=True
    )


def test_without_a_companion_one_is_made(tmp_path):
    recorded = flight()
    write_frame(tmp_path / "in", 1, with_gaps(recorded), slice(None))
    source = reader(tmp_path / "in")
    completed(source, recorded, tmp_path / "out")
    ages_from = source.load().stacks[0].labels.age_source
    assert ages_from == "layers are taken to be a year apart, whatever they are"
    named = read_organizer(tmp_path / "out" / NAME / f"layer_{NAME}.mat")
    assert named.names == {1: "surface", 2: "layer_01", 3: "layer_02", 4: "layer_03", 5: "layer_04"}
    assert named.age == {}
    assert reader(tmp_path / "out").load().layer_names == tuple(named.names.values())[1:]


def test_nothing_is_written_beyond_stacks(tmp_path):
    """Neither where a stack was not completed, nor in a remainder that is no stack."""
    recorded = flight(traces=66)
    write_frame(tmp_path / "in", 1, with_gaps(recorded), slice(None))
    source = reader(tmp_path / "in", min_traces=10)
    completed(source, recorded, tmp_path / "out", choose=lambda stack: stack.name.endswith("_0001"))
    new, old = picks(tmp_path / "out"), picks(tmp_path / "in")
    rows = np.flatnonzero((np.isfinite(new.twtt) & np.isnan(old.twtt)).any(1))
    assert rows.min() == 20
    assert rows.max() == 39


def test_a_jump_is_not_filled_across(tmp_path):
    recorded = flight()
    gaps = with_gaps(recorded)
    gaps["lat"] = gaps["lat"] + 0.05 * (np.arange(60) >= 25)
    gaps["twtt"][3, 22:28] = np.nan
    write_frame(tmp_path / "in", 1, gaps, slice(None))
    source = reader(tmp_path / "in", traces=25, spacing=50.0, min_traces=2)
    flights = source.load()
    stacks = [filled(s, 0.5) for s in flights.stacks]
    source.write_back(tmp_path / "out", NAME, stacks)
    new, old = picks(tmp_path / "out"), picks(tmp_path / "in")
    ends = [s.record.time[[0, -1]] for s in flights.stacks]
    outside = np.array([not any(a <= t <= b for a, b in ends) for t in new.time])
    assert outside.any()
    np.testing.assert_array_equal(new.twtt[outside], old.twtt[outside])


def test_crossed_and_distrusted_picks_are_kept_and_nothing_crosses_them(tmp_path):
    recorded = flight()
    gaps = with_gaps(recorded)
    gaps["twtt"][[1, 2], 35] = gaps["twtt"][[2, 1], 35]  # crossed
    gaps["twtt"][3, 25] = recorded["twtt"][0, 25] + 1e-9  # of a bad quality, above all others
    quality = np.full((LAYERS + 1, 60), 2, np.uint8)
    quality[3, 25] = 3
    write_frame(tmp_path / "in", 1, gaps, slice(None), quality=quality)
    source = reader(tmp_path / "in", quality=2)
    flights = source.load()
    thickness = time_to_thickness(np.diff(recorded["twtt"], axis=0).T, DENSITY)
    stacks = [
        (s.record, times_below(s.record, thickness[20 * k : 20 * k + 20], s.known_spans))
        for k, s in enumerate(flights.stacks)
    ]
    written = source.write_back(tmp_path / "out", NAME, stacks)
    new, old = picks(tmp_path / "out"), picks(tmp_path / "in")
    had = np.isfinite(old.twtt)
    assert old.twtt[had].tobytes() == new.twtt[had].tobytes()
    assert written.crossing == 1  # the second boundary, which would lie below the third
    assert np.isnan(new.twtt[25, 2])
    assert np.isfinite(new.twtt[26, 2])


def test_old_files_become_new_ones_with_their_names(tmp_path):
    recorded = with_gaps(flight())
    cells = np.empty((1, LAYERS + 1), object)
    for k, row in enumerate(recorded["twtt"]):
        value = np.empty((1, 2), object)
        manual = np.where(np.arange(60) < 20, row, np.nan)
        value[0, 0], value[0, 1] = {"data": manual[None]}, {"data": row[None]}
        name = "surface" if not k else f"Koenig_{k}"
        cells[0, k] = {"value": value, "quality": np.ones((1, 60)), "name": name}
    path = tmp_path / "in" / NAME / f"Data_{NAME}_001.mat"
    path.parent.mkdir(parents=True)
    savemat(
        path,
        {
            "GPS_time": recorded["gps_time"][None], "Latitude": recorded["lat"][None],
            "Longitude": recorded["lon"][None], "Elevation": recorded["elev"][None],
            "layerData": cells,
        },
    )  # fmt: skip
    completed(reader(tmp_path / "in"), flight(), tmp_path / "out")
    new, old = picks(tmp_path / "out"), picks(tmp_path / "in")
    had = np.isfinite(old.twtt)
    assert old.twtt[had].tobytes() == new.twtt[had].tobytes()
    np.testing.assert_array_equal(new.kinds[:20][had[:20]], 1)
    np.testing.assert_array_equal(new.kinds[20:], 2)
    assert new.elevation.tobytes() == recorded["elev"].tobytes()
    names = reader(tmp_path / "out").load().layer_names
    assert names == ("Koenig_1", "Koenig_2", "Koenig_3", "Koenig_4")


@given(st.integers(0, 2**32 - 1))
def test_completed_boundaries_stay_between_picked_ones(seed):
    rng = np.random.default_rng(seed)
    rows, count = 4, 6
    whole, other = (
        np.concatenate([np.zeros((rows, 1)), rng.uniform(0.1, 2, (rows, count - 1)).cumsum(1)], 1)
        for _ in range(2)
    )
    completed_ = np.where(rng.random(whole.shape) < 0.2, np.nan, whole)
    picked = np.where(rng.random(whole.shape) < 0.5, np.nan, other)
    anchored = anchor_times(completed_, picked)
    is_picked = np.isfinite(picked)
    assert anchored[is_picked].tobytes() == picked[is_picked].tobytes()
    usable = is_picked & np.isfinite(completed_)
    above = np.maximum.accumulate(usable, axis=1)
    np.testing.assert_array_equal(
        np.isfinite(anchored), is_picked | (np.isfinite(completed_) & above)
    )
    for k in range(rows):
        used = np.isfinite(anchored[k]) & (usable[k] | ~is_picked[k])
        assert (np.diff(anchored[k, used]) > 0).all()
    # where stack and file agree nothing moves
    same = anchor_times(whole, np.where(is_picked, whole, np.nan))
    known = np.isfinite(same)
    np.testing.assert_allclose(same[known], whole[known], rtol=1e-12)


def data_module(source):
    data = ice_data(source, val=0.0, test=0.0)
    data.setup()
    return data


def test_input_is_never_written_over(tmp_path):
    path = write_frame(tmp_path / "in", 1, flight(), slice(None))
    before = path.read_bytes()
    data = data_module(reader(tmp_path / "in"))
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for folder in (tmp_path / "in", tmp_path / "link", tmp_path / "x" / ".." / "in"):
        with pytest.raises(ConfigError, match="are those that are read"):
            data.check_write_back(folder)
    data.check_write_back(tmp_path / "out")
    assert path.read_bytes() == before


def test_times_that_repeat_are_refused(tmp_path):
    recorded = flight()
    recorded["gps_time"] = np.floor(recorded["gps_time"])
    write_frame(tmp_path / "in", 1, recorded, slice(None))
    with pytest.raises(DataError, match=f"Times of traces of the segment {NAME} repeat"):
        data_module(reader(tmp_path / "in")).check_write_back(tmp_path / "out")


def test_other_sources_have_no_layer_files(tmp_path):
    np.savez(
        tmp_path / "a.npz", thickness=np.ones((5, 2)), distance=np.arange(5) * 10.0,
        pos=np.stack([70 + np.arange(5) * 9e-5, np.full(5, -40.0)], 1),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="NpzStacks reads no CSARP_layer files"):
        data_module(NpzStacks(str(tmp_path))).check_write_back(tmp_path / "out")
    with pytest.raises(ConfigError, match="SyntheticSred reads no CSARP_layer files"):
        SyntheticSred().check_write_back(tmp_path / "out", {})


@pytest.mark.realdata
def test_real_frames_are_written_back_with_every_pick(tmp_path):
    options = {"density": 0.9, "traces": 32, "thickest": 1000.0, "count": 2}
    source = layer_files(["csarp_layer"], **options)
    flights = source.load()
    usual = [235.0, 500.0]  # [m]
    stacks = [filled(s, usual) for s in flights.stacks]
    written = {
        name: source.write_back(tmp_path, name, stacks if name == "20181030_01" else [])
        for name in source.paths()
    }
    assert written["20181030_01"].filled > 0
    assert written["20181103_01"].filled == 0  # no position, no surface: nothing is known
    for name, paths in source.paths().items():
        for path in paths:
            old, new = read_frame(path), read_frame(tmp_path / name / path.name)
            assert old.time.tobytes() == new.time.tobytes()
            assert old.pos.tobytes() == new.pos.tobytes()
            assert old.ids == new.ids[: len(old.ids)]
            had = np.isfinite(old.twtt)
            for values in ("twtt", "kinds", "grades"):
                before, after = getattr(old, values), getattr(new, values)[:, : len(old.ids)]
                assert before[had].tobytes() == after[had].tobytes()
        companion = read_organizer(tmp_path / name / f"layer_{name}.mat")
        original = read_organizer(paths[0].with_name(f"layer_{name}.mat"))
        assert companion.order == original.order
        assert companion.names == original.names
    again = layer_files([str(tmp_path)], **options).load()
    assert again.layer_names == flights.layer_names
    off = [
        np.abs(one.thickness - other.thickness)[other.observed & one.observed]
        for one, other in zip(again.stacks, flights.stacks, strict=True)
    ]
    # a stack's trace between a pick and a filled trace is between both now
    assert np.quantile(np.concatenate(off), 0.95) < 0.05
    added = [
        int((~other.observed & one.observed).sum())
        for one, other in zip(again.stacks, flights.stacks, strict=True)
    ]
    assert sum(added) > 0.9 * sum(int((~s.observed).sum()) for s in flights.stacks)
