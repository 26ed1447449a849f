"""What readers carry of traces beside their layers: time, height, frame, place in the flight."""

from dataclasses import replace

import numpy as np
import pytest
from fakes.ice_layers import (
    NAME,
    START,
    STEP,
    ice_data,
    koenig_picks,
    layer_files,
    make_flight,
    write_frame,
)
from scipy.io import savemat

from fulgurite.datamodules.ice_layers.tracks.records import describe_completed

DAY = 86_400.0


def stacks(folder, **options):
    source = layer_files([str(folder / "CSARP_layer")], density=0.4, **options)
    return source.load().stacks


def test_traces_know_their_time_height_frame_and_place(tmp_path):
    recorded = make_flight()
    write_frame(tmp_path / "CSARP_layer", 1, recorded, slice(0, 35))
    write_frame(tmp_path / "CSARP_layer", 2, recorded, slice(35, 60))
    read_stacks = stacks(tmp_path, traces=20)
    assert len(read_stacks) == 3
    every = [s.record for s in read_stacks]
    for name, wanted in (("time", recorded["gps_time"]), ("elevation", recorded["elev"])):
        values = np.concatenate([getattr(r, name) for r in every])
        np.testing.assert_allclose(values, wanted, rtol=0, atol=1e-4)
    frames = np.concatenate([r.frame for r in every])
    assert list(frames) == [f"{NAME}_001"] * 35 + [f"{NAME}_002"] * 25
    assert list(np.concatenate([r.trace for r in every])) == [*range(1, 36), *range(1, 26)]
    distance = np.concatenate([r.flight_distance for r in every])
    np.testing.assert_allclose(distance, np.arange(60) * STEP, atol=0.1)
    assert {r.time_scale for r in every} == {"GPS"}


def test_travel_times_of_completed_layers_are_those_of_the_picks(tmp_path):
    recorded = make_flight()
    recorded["twtt"][0, 7] = np.nan
    write_frame(tmp_path / "CSARP_layer", 1, recorded, slice(None))
    (stack,) = stacks(tmp_path, traces=60)
    filled = np.where(np.isfinite(stack.thickness), stack.thickness, 0.5)
    known = describe_completed(stack.record, filled, stack.known_spans)
    wanted = recorded["twtt"].T.copy()
    wanted[7] = np.nan  # without a surface nothing is known
    np.testing.assert_allclose(known.twtt, wanted, rtol=0, atol=1e-12)
    assert known.density.shape == stack.thickness.shape
    assert (known.density == 0.4).all()
    assert known.surface is None


def test_picked_boundaries_below_what_is_left_missing_keep_their_times(tmp_path):
    recorded = make_flight()
    recorded["twtt"][1, 20:30] = np.nan  # between two picks: what both layers add up to is known
    recorded["twtt"][2:, 40:50] = np.nan
    write_frame(tmp_path / "CSARP_layer", 1, recorded, slice(None))
    (stack,) = stacks(tmp_path, traces=60)
    known = describe_completed(stack.record, stack.thickness, stack.known_spans)
    np.testing.assert_allclose(known.twtt, recorded["twtt"].T, rtol=0, atol=1e-12)
    # completed so that the sum is another, which no method does: the picks are the measurement
    filled = np.where(np.isnan(stack.thickness), 0.1, stack.thickness)
    times = describe_completed(stack.record, filled, stack.known_spans).twtt
    picked = np.isfinite(recorded["twtt"].T)
    np.testing.assert_allclose(times[picked], recorded["twtt"].T[picked], rtol=0, atol=1e-12)
    data = ice_data(
        layer_files([str(tmp_path / "CSARP_layer")], density=0.4, traces=60), val=0.0, test=0.0
    )
    data.setup()
    np.testing.assert_array_equal(data.describe_traces(0, filled).picked, picked)


def test_height_is_linear_between_traces_and_unknown_beside_unknown_ones(tmp_path):
    recorded = make_flight()
    recorded["elev"] = np.arange(60.0)
    recorded["elev"][30] = np.nan
    write_frame(tmp_path / "CSARP_layer", 1, recorded, slice(None))
    (stack,) = stacks(tmp_path, traces=200, spacing=STEP / 2, min_traces=2)
    values = stack.record.elevation
    wanted = np.arange(len(values)) / 2
    beside, far = np.abs(wanted - 30) < 0.9, np.abs(wanted - 30) > 1.1
    assert np.isnan(values[beside]).all()
    np.testing.assert_allclose(values[far], wanted[far], atol=0.01)


def test_each_segment_has_its_own_names_and_ages(tmp_path):
    folder, other = tmp_path / "CSARP_layer", "20140412_01"
    recorded = make_flight()
    write_frame(folder, 1, recorded, slice(None))
    later = recorded | {"twtt": recorded["twtt"][:3], "gps_time": recorded["gps_time"] + 743 * DAY}
    write_frame(folder, 1, later, slice(None), name=other)
    for name, ages, names in (
        (NAME, [0.0, 1, 2, 4], ["surface", "2011", "2010", "2008"]),
        (other, [0.0, 3, 5], ["surface", "2011b", "2009b"]),
    ):
        content = {"lyr_id": np.arange(1.0, len(ages) + 1), "lyr_age": ages}
        savemat(
            folder / name / f"layer_{name}.mat", content | {"lyr_name": np.array(names, object)}
        )
    source = layer_files([str(folder)], density=0.4, traces=60, count=3)
    data = ice_data(source, val=0.0, test=0.0)
    data.setup()
    first, second = (data.describe_layers(data.stacks.index(f"{n}_0000")) for n in (NAME, other))
    assert (first.names, first.age.tolist()) == (("2011", "2010", "2008"), [1, 2, 4])
    assert (second.names, second.age.tolist()) == (("2011b", "2009b", "2008"), [3, 5, 6])
    assert first.age_source == "of the companion file"
    assert second.age_source == "of the companion file down to layer 2, a year apart below"
    assert "differ in the names of layers" in source.load().report()


def test_a_jump_begins_a_new_run_whose_distance_goes_on(tmp_path):
    recorded = make_flight()
    recorded["lat"] = recorded["lat"] + 0.05 * (np.arange(60) >= 30)
    write_frame(tmp_path / "CSARP_layer", 1, recorded, slice(None))
    first, second = stacks(tmp_path, traces=30)
    assert (first.record.run, second.record.run) == (0, 1)
    gap = second.record.flight_distance[0] - first.record.flight_distance[-1]
    assert gap == pytest.approx(0.05 * 111_195 + STEP, rel=1e-3)


def test_files_without_heights_say_nothing_of_them(tmp_path):
    recorded = make_flight()
    del recorded["elev"]
    write_frame(tmp_path / "CSARP_layer", 1, recorded, slice(None))
    (stack,) = stacks(tmp_path, traces=60)
    assert describe_completed(stack.record, np.ones((60, 3)), stack.known_spans).elevation is None


def test_a_height_of_other_traces_is_refused(tmp_path):
    recorded = make_flight()
    recorded["elev"] = np.zeros(61)
    write_frame(tmp_path / "CSARP_layer", 1, recorded, slice(None))
    with pytest.raises(Exception, match=r"variable elev of .* has 61 values, not 60"):
        stacks(tmp_path, traces=60)


@pytest.mark.parametrize("is_usable", [True, False])
def test_koenigs_times_are_given_where_they_are_usable(tmp_path, is_usable):
    along = np.arange(40) * STEP
    lines = []
    for k, x in enumerate(along):
        time = START + x / 130 if is_usable else k
        picks = " ".join(f"{10 * (j + 1)} {0.8 * (j + 1):.2f} 1 1 1" for j in range(3))
        lines.append(f"layers_{NAME}_dec01 {k} {72 + x / 111_195:.6f} -40.0 {time} 1e-10 {picks}")
    (tmp_path / "mapdata.txt").write_text("\n".join(lines))
    source = koenig_picks(
        [str(tmp_path / "mapdata.txt")], count=3, traces=40, density=0.4, surface="zero"
    )
    (stack,) = source.load().stacks
    known = describe_completed(stack.record, np.ones((40, 3)), stack.known_spans)
    assert (known.time is not None) == is_usable
    assert known.time_scale == ("unknown" if is_usable else "")
    assert not {"twtt", "frame", "elevation", "density"} & known.arrays().keys()


def test_the_data_module_describes_stacks_by_their_numbers(tmp_path, monkeypatch):
    for day in range(3):
        name = f"201204{10 + day}_01"
        recorded = make_flight()
        recorded["gps_time"] = recorded["gps_time"] + (day + 11) * 86_400
        recorded["lat"] = recorded["lat"] + day
        write_frame(tmp_path / "CSARP_layer", 1, recorded, slice(None), name=name)
    source = layer_files([str(tmp_path / "CSARP_layer")], density=0.4, traces=20)
    data = ice_data(source, val=1 / 3, test=1 / 3)
    data.setup()
    for number, name in enumerate(data.stacks):
        known = data.describe_traces(number, np.ones((20, 3)))
        assert known.frame[0].startswith(name.rpartition("_")[0])
    flights = source.load()
    bare = [replace(stack, record=None, spans=None) for stack in flights.stacks]
    monkeypatch.setattr(source, "load", lambda: replace(flights, stacks=bare))
    data = ice_data(source, val=1 / 3, test=1 / 3)
    data.setup()
    for number, _ in enumerate(data.stacks):
        assert data.describe_traces(number, np.ones((20, 3))).arrays() == {}
