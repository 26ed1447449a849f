"""Readers of picked layers: formats of CReSIS, Koenig's tables, npz; and everything bad in them."""

import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from fakes.ice_layers import (
    DENSITY,
    SEGMENT,
    SEGMENT_START,
    count_excluded,
    koenig_picks,
    layer_files,
    write_picks,
)
from scipy.io import savemat

from fulgurite.datamodules.ice_layers import NpzStacks
from fulgurite.datamodules.ice_layers.readers.koenig import read_picks
from fulgurite.datamodules.ice_layers.readers.layer_frames import (
    read_frame,
    read_mat,
    read_organizer,
)
from fulgurite.datamodules.ice_layers.readers.layer_writer import write_layer_file
from fulgurite.datamodules.ice_layers.tracks.blocks import Blocks
from fulgurite.datamodules.ice_layers.tracks.resample import measure_track
from fulgurite.datamodules.ice_layers.tracks.travel_time import thickness_to_time
from fulgurite.errors import ConfigError, DataError
from fulgurite.testing.matlab import string_table, write_strings


def track(traces=40, layers=3, spacing=50.0, seed=0, first=0):
    """Time, positions, thickness [m] and picks [s] of a straight track."""
    generator = np.random.default_rng(seed)
    along = (first + np.arange(traces)) * spacing
    pos = np.stack([72.0 + along / 111_195.0, np.full(traces, -40.0)], 1)
    thickness = generator.uniform(0.5, 1.0, (traces, layers))
    times = thickness_to_time(thickness, np.array(DENSITY))
    picks = 3e-6 + np.concatenate([np.zeros((traces, 1)), times.cumsum(1)], 1)
    return SEGMENT_START + first + np.arange(traces) * 0.5, pos, thickness, picks


def write(folder, *tracks, segment=SEGMENT):
    picked = [(time, pos, picks) for time, pos, _, picks in tracks]
    return write_picks(folder / "CSARP_layer", *picked, segment=segment)


def source(folder, **options):
    options = {"traces": 20, "density": DENSITY} | options
    return layer_files([str(folder / "CSARP_layer")], **options)


def test_both_versions_of_the_new_format_are_one(tmp_path):
    time, pos, _, picks = track()
    picks[5, 2] = np.nan
    write_layer_file(tmp_path / "new.mat", time, pos, picks)
    content = read_mat(tmp_path / "new.mat")
    assert content["twtt"].shape == (4, 40)  # as MATLAB shows it
    assert content["file_type"] == "layer"
    for compress in (False, True):  # versions 5 and 7
        savemat(tmp_path / "old.mat", content, do_compression=compress)
        old, new = read_frame(tmp_path / "old.mat"), read_frame(tmp_path / "new.mat")
        assert old.ids == new.ids == (1, 2, 3, 4)
        for name in ("time", "pos", "twtt"):
            np.testing.assert_array_equal(getattr(old, name), getattr(new, name))
    np.testing.assert_array_equal(new.twtt, picks)
    np.testing.assert_array_equal(new.pos, pos)


def layer_data(picks, manual):
    layers = np.empty(picks.shape[1], object)
    for k in range(picks.shape[1]):
        layers[k] = {
            "value": np.array([{"data": manual[:, k]}, {"data": picks[:, k]}], object),
            "quality": np.ones(len(picks)),
            "name": "surface" if k == 0 else f"layer {k}",
        }
    return layers


def write_layer_data_hdf5(path, time, pos, picks, manual):
    """As MATLAB 7.3 nests cells and structures: by references."""
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, values in (("GPS_time", time), ("Latitude", pos[:, 0]), ("Longitude", pos[:, 1])):
            file.create_dataset(name, data=values[:, None])
        heap = file.create_group("#refs#")
        outer = []
        for k in range(picks.shape[1]):
            layer = heap.create_group(f"layer{k}")
            inner = []
            for j, values in enumerate((manual[:, k], picks[:, k])):
                value = heap.create_group(f"value{k}{j}")
                value.create_dataset("data", data=values[:, None])
                inner.append([value.ref])
            layer.create_dataset("value", data=np.array(inner, h5py.ref_dtype))
            layer.create_dataset("quality", data=np.ones((len(time), 1)))
            outer.append([layer.ref])
        file.create_dataset("layerData", data=np.array(outer, h5py.ref_dtype))


@pytest.mark.parametrize(("version", "none"), [(5, np.nan), (7.3, np.nan), (5, 0.0), (5, -1.0)])
def test_manual_picks_of_the_old_format_win(tmp_path, version, none):
    time, pos, _, picks = track()
    manual = np.full_like(picks, none)
    manual[3, 1] = picks[3, 1] + 1e-9
    picks[7, 2] = np.inf
    path = tmp_path / f"Data_{SEGMENT}_001.mat"
    if version == 5:
        content = {"GPS_time": time, "Latitude": pos[:, 0], "Longitude": pos[:, 1]}
        savemat(path, content | {"layerData": layer_data(picks, manual)})
    else:
        write_layer_data_hdf5(path, time, pos, picks, manual)
    frame = read_frame(path)
    expected = np.where(manual > 0, manual, picks)
    np.testing.assert_array_equal(frame.twtt, np.where(np.isinf(expected), np.nan, expected))
    assert frame.ids == (1, 2, 3, 4)


def test_thickness_survives_the_way_through_a_file(tmp_path):
    made = track(traces=20)
    write(tmp_path, made)
    (stack,) = source(tmp_path).load().stacks
    np.testing.assert_allclose(stack.thickness, made[2], atol=1e-6)
    np.testing.assert_allclose(stack.distance, np.arange(20) * 50.0, atol=0.1)
    assert stack.segment == SEGMENT


def test_frames_of_a_segment_are_one_track(tmp_path):
    first, second = track(traces=25), track(traces=25, first=20, seed=1)
    second = (SEGMENT_START + 10 + np.arange(25) * 0.5, *second[1:])  # 5 traces are in both files
    write(tmp_path, second, first)  # in the wrong order
    flights = source(tmp_path, traces=45).load()
    (stack,) = flights.stacks
    assert stack.thickness.shape == (45, 3)
    np.testing.assert_allclose(stack.distance[-1], 44 * 50.0, rtol=1e-3)


def test_tracks_break_at_jumps_and_short_rests_are_counted(tmp_path):
    far = track(traces=30, first=400, seed=1)
    write(tmp_path, track(traces=40), (far[0] + 400, *far[1:]))
    flights = source(tmp_path, min_traces=12).load()
    assert [s.name for s in flights.stacks] == [f"{SEGMENT}_{k:04}" for k in range(3)]
    assert [len(s.thickness) for s in flights.stacks] == [20, 20, 20]
    assert count_excluded(flights) == {"jump": 1, "short": 1}
    flights = source(tmp_path, min_traces=10).load()
    assert [len(s.thickness) for s in flights.stacks] == [20, 20, 20, 10]


def test_small_holes_of_a_track_are_no_jumps(tmp_path):
    time, pos, thickness, picks = track(traces=80, spacing=20.0)
    kept = ~np.isin(np.arange(80), [41, 42, 43])
    write(tmp_path, (time[kept], pos[kept], thickness[kept], picks[kept]))
    (stack,) = source(tmp_path, traces=27, spacing=60.0).load().stacks
    np.testing.assert_allclose(np.diff(stack.distance), 60.0, rtol=2e-3)  # no position is missing
    assert not stack.observed[14].any()  # at 840 m, in the hole
    assert np.delete(stack.observed, 14, 0).all()
    np.testing.assert_allclose(stack.thickness[1:14], track_means(thickness)[:13], atol=1e-6)


def test_nothing_is_invented_in_holes_of_a_track(tmp_path):
    time, pos, thickness, picks = track(traces=60)
    kept = ~np.isin(np.arange(60), [18, 19, 20, 21, 30, 45, 46, 47])  # one at the end of a block
    write(tmp_path, (time[kept], pos[kept], thickness[kept], picks[kept]))
    flights = source(tmp_path).load()
    observed = np.concatenate([s.observed for s in flights.stacks])
    np.testing.assert_array_equal(observed, np.repeat(kept[:, None], 3, 1))
    found = np.concatenate([s.thickness for s in flights.stacks])
    np.testing.assert_allclose(found[kept], thickness[kept], atol=1e-4)
    np.testing.assert_allclose(np.concatenate([s.pos for s in flights.stacks]), pos, atol=1e-7)
    assert count_excluded(flights) == {"hole": 8}


def test_finer_places_than_raw_traces(tmp_path):
    time, pos, thickness, picks = track(traces=20)
    picks[7] = np.nan
    kept = ~np.isin(np.arange(20), [12, 13])
    write(tmp_path, (time[kept], pos[kept], thickness[kept], picks[kept]))
    flights = source(tmp_path, spacing=5.0, traces=191).load()
    along = np.concatenate([s.pos[:, 0] - 72.0 for s in flights.stacks]) * 111_195.0 / 50.0
    np.testing.assert_allclose(along, np.arange(191) / 10, atol=0.02)
    places = np.arange(191) / 10
    # linear between two picked traces that are neighbours, and on a trace next to a gap
    known = ~((places > 6.06) & (places < 7.94)) & ~((places > 11.06) & (places < 13.94))
    found = np.concatenate([s.thickness for s in flights.stacks])
    np.testing.assert_array_equal(np.isfinite(found), np.repeat(known[:, None], 3, 1))
    linear = np.stack([np.interp(places, np.arange(20), t) for t in thickness.T], 1)
    np.testing.assert_allclose(found[known], linear[known], atol=2e-3)
    assert count_excluded(flights) == {"hole": 29}


def track_means(thickness):
    """Means of three traces around every third one."""
    return np.stack([thickness[3 * k - 1 : 3 * k + 2].mean(0) for k in range(1, 26)])


def test_crossed_picks_take_the_layers_on_both_sides(tmp_path):
    time, pos, thickness, picks = track(traces=20, layers=4)
    picks[4, 2] = picks[4, 1] - 1e-10  # above the boundary before it
    picks[9, 3] = picks[9, 2]  # on it
    write(tmp_path, (time, pos, thickness, picks))
    flights = source(tmp_path).load()
    assert count_excluded(flights)["crossed"] == 2
    (stack,) = flights.stacks
    np.testing.assert_array_equal(stack.observed[4], [False, False, False, True])
    np.testing.assert_array_equal(stack.observed[9], [True, False, False, False])
    assert stack.observed.sum() == 80 - 6
    np.testing.assert_allclose(stack.thickness[stack.observed], thickness[stack.observed], 1e-6)


def test_a_missing_boundary_takes_two_layers(tmp_path):
    time, pos, thickness, picks = track(traces=20)
    picks[4, 2] = np.nan
    write(tmp_path, (time, pos, thickness, picks))
    np.testing.assert_array_equal(
        source(tmp_path).load().stacks[0].observed[4], [True, False, False]
    )


def test_the_companion_names_orders_and_dates_layers(tmp_path):
    time, pos, thickness, picks = track(traces=20)
    place = write(tmp_path, (time, pos, thickness, picks[:, [0, 2, 1, 3]]))
    savemat(
        place / f"layer_{SEGMENT}.mat",
        {
            "lyr_id": [1.0, 3.0, 2.0, 4.0],
            "lyr_name": np.array(["surface", "a", "b", "c"], object),
            "lyr_order": [1.0, 2.0, 3.0, 4.0],
            "lyr_age": [0.0, 1.0, 3.0, 4.0],
        },
    )
    flights = source(tmp_path).load()
    np.testing.assert_allclose(flights.stacks[0].thickness, thickness, atol=1e-6)
    assert flights.layer_names == ("a", "b", "c")
    np.testing.assert_array_equal(flights.layer_age, [1.0, 3.0, 4.0])
    assert read_organizer(place / f"layer_{SEGMENT}.mat").order == (1, 3, 2, 4)


def test_traces_of_one_second_stay_and_repeated_ones_are_counted(tmp_path):
    _, pos, thickness, picks = track(traces=40)
    seconds = SEGMENT_START + np.arange(40) // 4  # as some files have it
    first, second = slice(0, 23), slice(18, 40)  # which overlap
    write(tmp_path, *((seconds[p], pos[p], thickness[p], picks[p]) for p in (first, second)))
    flights = source(tmp_path, traces=40).load()
    (stack,) = flights.stacks
    np.testing.assert_allclose(stack.thickness, thickness, atol=1e-6)
    assert count_excluded(flights) == {"repeated": 5}


@pytest.mark.parametrize(
    "changes",
    [
        {"lat": "text"},
        {"twtt": {"a": 1.0}},
        {"twtt": np.ones((4, 40)) * 1j},
        {"id": np.array([1.0, np.nan, 3.0, 4.0])},
        {"id": np.array([1.0, 2.0, 2.0, 4.0])},
        {"quality": "good"},
        {
            k: np.zeros(s)
            for k, s in {"gps_time": (1, 0), "lat": (1, 0), "lon": (1, 0), "twtt": (4, 0)}.items()
        },
    ],
)
def test_variables_that_are_none(tmp_path, changes):
    place = write(tmp_path, track(), track(first=40, seed=1))
    path = place / f"Data_{SEGMENT}_001.mat"
    savemat(path, read_mat(path) | changes)
    with pytest.raises(DataError, match=r"Data_20120414_01_001.mat") as error:
        source(tmp_path).load()
    assert "exclude+=unreadable" in error.value.hint
    flights = source(tmp_path, exclude=["unreadable"]).load()
    assert count_excluded(flights)["unreadable"] == 1
    assert len(flights.stacks) == 2


def test_a_damaged_companion(tmp_path):
    path = write(tmp_path, track()) / f"layer_{SEGMENT}.mat"
    for content in ({"lyr_id": [1.0, np.nan]}, {"lyr_id": [1.0, 2.0], "lyr_age": "old"}, None):
        if content is None:
            path.write_bytes(b"damaged")
        else:
            savemat(path, content)
        with pytest.raises(DataError, match=path.name):
            source(tmp_path).load()
        flights = source(tmp_path, exclude=["unreadable"]).load()
        assert path.name in flights.report()
        assert len(flights.stacks) == 2


def test_files_of_a_segment_with_fewer_layers_are_reported(tmp_path):
    write(tmp_path, track(layers=3), track(layers=2, first=40))
    flights = source(tmp_path).load()
    assert "1 files lack layers" in flights.report()
    assert not flights.stacks[-1].observed[:, 2].any()


def test_picks_of_bad_quality_can_be_left_out(tmp_path):
    place = write(tmp_path, track(traces=20))
    (path,) = place.glob("Data_*.mat")
    with h5py.File(path, "r+") as file:
        file["quality"][:5, 3] = 3
    assert source(tmp_path).load().stacks[0].observed.all()
    observed = source(tmp_path, quality=2).load().stacks[0].observed
    assert not observed[:5, 2].any()
    assert observed[5:].all()


def spoil(path, how):
    if how == "truncated 7.3":
        path.write_bytes(path.read_bytes()[:5000])
    elif how == "7.3 without HDF5":
        path.write_bytes(path.read_bytes()[:512] + bytes(3000))
    elif how == "no MATLAB":
        path.write_bytes(b"not a file of MATLAB" * 50)
    elif how == "empty":
        path.write_bytes(b"")
    else:
        content = read_mat(path)
        savemat(path, {k: v for k, v in content.items() if k != how})
        if how == "truncated 5":
            path.write_bytes(path.read_bytes()[:2500])
        elif how == "short lat":
            savemat(path, content | {"lat": content["lat"][:, :-1]})
        elif how == "microseconds":
            savemat(path, content | {"twtt": content["twtt"] * 1e6})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated 7.3", "cannot be read as MATLAB"),
        ("truncated 5", "cannot be read as MATLAB"),
        ("7.3 without HDF5", "says that it is MATLAB 7.3"),
        ("no MATLAB", "cannot be read as MATLAB"),
        ("empty", "cannot be read as MATLAB"),
        ("twtt", "no variable 'twtt'"),
        ("gps_time", "no variable 'gps_time'"),
        ("lat", "no variable 'lat'"),
        ("id", "no variable 'id'"),
        ("short lat", "lat .* has 39 values, not 40"),
        ("microseconds", "no aircraft"),
    ],
)
def test_damaged_files_are_errors_or_exclusions(tmp_path, how, message):
    place = write(tmp_path, track())
    write(tmp_path, track(seed=1), segment="20120415_01")
    (path,) = place.glob("Data_*.mat")
    spoil(path, how)
    with pytest.raises(DataError, match=message) as error:
        source(tmp_path).load()
    assert str(path) in str(error.value)
    flights = source(tmp_path, exclude=["unreadable"]).load()
    assert flights.segments == ("20120415_01",)
    assert count_excluded(flights)["unreadable"] == 1
    assert path.name in flights.report()


def test_traces_and_blocks_without_picks_stay(tmp_path):
    time, pos, thickness, picks = track()
    picks[:20] = np.nan
    picks[25:30] = np.nan
    write(tmp_path, (time, pos, thickness, picks))
    flights = source(tmp_path).load()
    empty, stack = flights.stacks
    assert not empty.observed.any()
    assert not stack.observed[5:10].any()
    assert stack.observed.sum() == 15 * 3
    picks[:] = np.nan
    write(tmp_path, (time, pos, thickness, picks))
    assert [s.observed.any() for s in source(tmp_path).load().stacks] == [False, False]


def test_a_single_trace_is_counted_and_alone_an_error(tmp_path):
    write(tmp_path, track(traces=1))
    with pytest.raises(DataError, match=r"fewer than 10 traces \(1 in all\)"):
        source(tmp_path).load()
    write(tmp_path, track(), segment="20120415_01")
    assert count_excluded(source(tmp_path).load()) == {"short": 1}


def test_traces_without_position_are_counted(tmp_path):
    time, pos, thickness, picks = track(traces=23)
    pos[3], time[5], pos[7, 0] = np.nan, np.nan, 400.0
    write(tmp_path, (time, pos, thickness, picks))
    flights = source(tmp_path).load()
    assert count_excluded(flights)["position"] == 3
    assert np.isfinite(flights.stacks[0].pos).all()


def test_mixed_numbers_of_layers(tmp_path):
    write(tmp_path, track(layers=3))
    write(tmp_path, track(layers=3), segment="20120415_01")
    write(tmp_path, track(layers=5), segment="20120416_01")
    with pytest.raises(DataError, match=r"20120416_01 has 5 layers, 20120414_01 has 3.*count"):
        source(tmp_path).load()
    flights = source(tmp_path, exclude=["layer_count"]).load()
    assert flights.segments == ("20120414_01", "20120415_01")
    assert count_excluded(flights)["layer_count"] == 1
    flights = source(tmp_path, count=4).load()  # what is not there is absent
    assert len(flights.segments) == 3
    assert not flights.stacks[0].observed[:, 3].any()
    assert flights.stacks[-1].observed.all()
    assert "2 segments have fewer than 4 layers" in flights.report()


def test_kilometres_are_found(tmp_path):
    time, pos, thickness, picks = track()
    picks = 3e-6 + (picks - 3e-6) / 1000
    write(tmp_path, (time, pos, thickness, picks))
    with pytest.raises(DataError, match="looks like kilometres"):
        source(tmp_path).load()


@pytest.mark.parametrize("factor", [100, 1000])
def test_centimetres_and_millimetres_are_found(tmp_path, factor):
    time, pos, thickness, picks = track()
    write(tmp_path, (time, pos, thickness, 3e-6 + (picks - 3e-6) * factor))
    save(tmp_path, thickness=track(traces=10)[2] * factor)
    lines, _ = koenig_lines(factor=factor)
    (tmp_path / "mapdata.txt").write_text("\n".join(lines))
    for made in (
        lambda **options: source(tmp_path, **options),
        lambda **options: NpzStacks(str(tmp_path), **options),
        lambda **options: koenig_picks([str(tmp_path)], count=4, traces=30, **options),
    ):
        with pytest.raises(DataError, match="millimetres or centimetres") as error:
            made().load()
        assert "source.init_args.thickest` above" in error.value.hint
        assert made(thickest=900.0).load().stacks  # of isochrones of ice
    with pytest.raises(ConfigError, match="median thickness of layers is 0"):
        source(tmp_path, thickest=0)


def test_sources_without_files_say_so(tmp_path):
    (tmp_path / "CSARP_layer").mkdir()
    with pytest.raises(DataError, match="no layer file"):
        source(tmp_path).load()
    write(tmp_path, track())
    with pytest.raises(DataError, match="no flight segment 20130101_01"):
        source(tmp_path, segments=["20130101_01"]).load()
    with pytest.raises(DataError, match="density"):
        source(tmp_path, density=None).load()
    with pytest.raises(ConfigError, match="nothing called 'unreadble'"):
        source(tmp_path, exclude=["unreadble"])
    with pytest.raises(ConfigError, match="traces of blocks is 1"):
        Blocks(traces=1)


# Koenig et al.


def koenig_lines(traces=30, layers=4, missing=(), factor=1.0):
    time, pos, thickness, _ = track(traces, layers)
    depth = thickness.cumsum(1) * factor
    lines = []
    for i in range(traces):
        words = [f"IRSNO1B_{SEGMENT}_015", f"{i}"]
        words += [f"{v:.9f}" for v in (*pos[i], time[i])] + ["2.88567e-10"]
        for k in range(layers):
            pick, deep = (
                (-1, -1) if (i, k) in missing else (100 + depth[i, k] / 0.0323, depth[i, k])
            )
            words += [f"{v:.6f}" for v in (pick, deep, deep * 0.4, deep, deep * 0.4)]
        lines.append(" ".join(words))
    return lines, thickness


def test_koenigs_tables(tmp_path):
    lines, thickness = koenig_lines(missing={(3, 1)})
    (tmp_path / "mapdata2012.txt").write_text("\n".join(lines))
    flights = koenig_picks([str(tmp_path)], count=4, traces=30).load()
    (stack,) = flights.stacks
    assert stack.segment == SEGMENT
    expected = thickness.copy()
    expected[3, 1:3] = np.nan  # -1 takes both layers that it bounds
    np.testing.assert_allclose(stack.thickness, expected, atol=1e-4)
    assert stack.truth is None
    for fill in ("-9999.000000", "0.000000", "nan"):  # what else a missing pick may be
        other = "\n".join(lines).replace("-1.000000", fill)
        (tmp_path / "mapdata2012.txt").write_text(other)
        again = koenig_picks([str(tmp_path)], count=4, traces=30).load()
        np.testing.assert_array_equal(again.stacks[0].thickness, stack.thickness)
        assert "crossed" not in again.report()
    (tmp_path / "mapdata2012.txt").write_text("\n".join(lines))
    options = {"thickness": "bins", "surface": "first_pick", "density": 0.4}
    bins = koenig_picks([str(tmp_path / "mapdata2012.txt")], count=3, traces=30, **options).load()
    step = 2.88567e-10 * 299_792_458 / (2 * (1 + 0.845 * 0.4))
    np.testing.assert_allclose(
        bins.stacks[0].thickness[0], thickness[0, 1:] / 0.0323 * step, rtol=1e-4
    )


def test_times_of_2009_and_2010_are_not_used(tmp_path):
    lines, _ = koenig_lines()
    lines = [line.replace("13343616", "99913343616") for line in lines]
    (tmp_path / "mapdata.txt").write_text("\n".join(lines))
    (stack,) = koenig_picks([str(tmp_path)], count=4, traces=30).load().stacks
    assert len(stack.thickness) == 30


@pytest.mark.parametrize("year", ["2009", "2012"])
def test_tables_of_one_segment_are_one_track(tmp_path, year):
    lines, thickness = koenig_lines(traces=60)
    if year == "2009":  # whose times are not usable
        lines = [line.replace("2012", "2009").replace("13343616", "1") for line in lines]
    (tmp_path / "mapdata1.txt").write_text("\n".join(lines[:31]))
    (tmp_path / "mapdata2.txt").write_text("\n".join(lines[30:]))  # with a line of the other
    flights = koenig_picks([str(tmp_path)], count=4, traces=60).load()
    (stack,) = flights.stacks
    np.testing.assert_allclose(stack.thickness, thickness, atol=1e-4)
    assert count_excluded(flights) == {"repeated": 1}


def test_traces_of_one_second_in_tables(tmp_path):
    words = [line.split() for line in koenig_lines()[0]]
    lines = [
        " ".join([*w[:3], "320.0", f"{SEGMENT_START + k // 4:.0f}", *w[5:]])
        for k, w in enumerate(words)
    ]
    (tmp_path / "mapdata.txt").write_text("\n".join(lines))
    (stack,) = koenig_picks([str(tmp_path)], count=4, traces=30).load().stacks
    assert stack.observed.all()
    np.testing.assert_allclose(stack.pos[:, 1], -40.0, atol=1e-12)  # as other files count


@pytest.mark.parametrize("content", ["", "IRSNO1B_20121399_01_015 1"])
def test_tables_without_picks_or_of_no_day(tmp_path, content):
    lines, _ = koenig_lines()
    (tmp_path / "mapdata1.txt").write_text("\n".join(lines))
    bad = [line.replace(SEGMENT, "20121399_01") for line in lines] if content else []
    (tmp_path / "mapdata2.txt").write_text("\n".join(bad))
    with pytest.raises(DataError, match=r"mapdata2.txt"):
        koenig_picks([str(tmp_path)], count=4, traces=30).load()
    flights = koenig_picks([str(tmp_path)], count=4, traces=30, exclude=["unreadable"]).load()
    assert count_excluded(flights) == {"unreadable": 1}


@pytest.mark.parametrize("spoiled", ["abc", "IRSNO1B_20120414_01_015 1 2 3", "x 1 2 3 4 5"])
def test_damaged_tables(tmp_path, spoiled):
    lines, _ = koenig_lines(traces=4)
    path = tmp_path / "mapdata.txt"
    path.write_text("\n".join([*lines, spoiled]))
    with pytest.raises(DataError, match=r"line 5 of .* is no line of picks"):
        read_picks(path)
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match="has 4 boundaries, not 20"):
        koenig_picks([str(tmp_path)]).load()


# npz


def save(folder, name="a", segment="s", **changes):
    _, pos, thickness, _ = track(traces=10)
    content = {"thickness": thickness, "pos": pos, "physics": np.zeros((10, 3, 2))} | changes
    place = Path(folder) / segment
    place.mkdir(exist_ok=True)
    np.savez(place / f"{name}.npz", **{k: v for k, v in content.items() if v is not None})
    return place / f"{name}.npz"


def test_npz_stacks(tmp_path):
    save(tmp_path, physics_names=np.array(["smb", "st"]), layer_age=np.array([1.0, 2.0, 4.0]))
    save(tmp_path, "b", "t", physics_names=np.array(["smb", "st"]))
    flights = NpzStacks(str(tmp_path)).load()
    assert flights.physics == ("smb", "st")
    assert flights.segments == ("s", "t")
    np.testing.assert_array_equal(flights.layer_age, [1.0, 2.0, 4.0])
    np.testing.assert_allclose(
        flights.stacks[0].distance, measure_track(flights.stacks[0].pos), atol=1e-9
    )
    save(tmp_path, "c", physics_names=np.array(["st", "smb"]))
    with pytest.raises(DataError, match="physical fields st, smb"):
        NpzStacks(str(tmp_path)).load()


def test_entries_that_a_model_filled_are_counted_where_they_are_read_as_picks(tmp_path):
    save(tmp_path, provenance=np.tile([0, 1, 2], (10, 1)))
    save(tmp_path, "b", provenance=np.zeros((10, 3)))
    assert (
        "20 entries that a model filled count as observed" in NpzStacks(str(tmp_path)).load().notes
    )


def negative():
    thickness = track(traces=10)[2]
    thickness[2, 1], thickness[4, 0], thickness[5, 2] = -1.0, 0.0, np.inf
    return thickness


BAD = {
    "negative": ({"thickness": negative()}, "3 thicknesses that are not positive"),
    "kilometres": ({"thickness": track(traces=10)[2] / 1000}, "looks like kilometres"),
    "millimetres": ({"thickness": track(traces=10)[2] * 1e4}, "looks like millimetres"),
    "no thickness": ({"thickness": None}, "no array 'thickness'"),
    "no position": ({"pos": None}, "no array 'pos'"),
    "one trace": (
        {
            k: np.ones((1, *s))
            for k, s in {"thickness": (3,), "pos": (2,), "physics": (3, 2)}.items()
        },
        "has 1 traces",
    ),
    "other physics": ({"physics": np.zeros((10, 3, 4))}, "have shape"),
    "physics with NaN": ({"physics": np.full((10, 3, 2), np.nan)}, "not finite"),
    "off the globe": ({"pos": np.full((10, 2), 1e5)}, "not on the globe"),
    "layers": (
        {"thickness": np.ones((10, 5)), "physics": np.zeros((10, 5, 2))},
        "has 5 layers, others have 3",
    ),
    "objects": ({"extra": np.array([{}], object)}, "cannot be read"),
    **{
        f"text in {name}": ({name: np.full(shape, "a")}, f"array {name} of .* not made of numbers")
        for name, shape in {
            "thickness": (10, 3),
            "pos": (10, 2),
            "physics": (10, 3, 2),
            "physics_flag": (10,),
            "truth": (10, 3),
            "layer_age": (3,),
            "distance": (10,),
        }.items()
    },
    "one dimension": ({"thickness": np.ones(10)}, "thickness of .* not made of"),
    "complex": ({"thickness": np.ones((10, 3)) * 1j}, "thickness of .* not made of"),
    "latitude": ({"pos": np.tile([95.0, -40.0], (10, 1))}, "not on the globe"),
    "distance": ({"distance": np.arange(10) * 0.05}, r"ends at 0.45 m, the positions are 450"),
    "exchanged": ({"pos": np.tile([-40.0, 72.0], (10, 1))}, "are exchanged"),
    "fill value": ({"thickness": np.where(np.eye(10, 3), 9999.0, 1.0)}, "3 layers .* than any ice"),
    "misspelt": ({"layers_age": np.arange(1.0, 4)}, "'layers_age', which is not read"),
    "falling age": ({"layer_age": np.array([3.0, 2.0, 1.0])}, "layer_age of .* does not rise"),
    "no trace": ({"thickness": np.ones((0, 3)), "pos": np.ones((0, 2)), "physics": None}, "have"),
    "a name twice": ({"stack": np.array("a")}, "both called a"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_npz_stacks(tmp_path, case):
    changes, message = BAD[case]
    save(tmp_path), save(tmp_path, "b")
    save(tmp_path, "c", **changes)
    with pytest.raises(DataError, match=message) as error:
        NpzStacks(str(tmp_path)).load()
    assert str(tmp_path / "s" / "c.npz") in error.value.problem
    assert error.value.hint


def test_stacks_of_two_units_are_refused(tmp_path):
    save(tmp_path), save(tmp_path, "b")
    save(tmp_path, "c", thickness=np.full((10, 3), 80.0))  # centimetres
    with pytest.raises(DataError, match=r"stack c is 80 m, that of all .* look like two units"):
        NpzStacks(str(tmp_path)).load()


def test_stacks_that_name_other_layers_are_reported(tmp_path):
    save(tmp_path, layer_names=np.array(["a", "b", "c"]), layer_age=np.arange(1.0, 4))
    save(tmp_path, "b", layer_names=np.array(["c", "b", "a"]), layer_age=np.arange(2.0, 5))
    flights = NpzStacks(str(tmp_path)).load()
    assert flights.layer_names == ("a", "b", "c")
    assert "1 stacks have other names of layers than the first" in flights.report()
    assert "1 stacks have other ages of layers than the first" in flights.report()


def test_a_file_in_place_of_a_folder_is_named(tmp_path):
    (path := tmp_path / "stacks.csv").write_text("lat,lon")
    with pytest.raises(DataError, match=r"stacks.csv is a file, and no folder"):
        NpzStacks(str(path)).load()


def test_a_damaged_first_npz(tmp_path):
    names = np.array(["smb", "st"])
    save(tmp_path, "b", physics_names=names)
    path = save(tmp_path, thickness=None, physics_names=names)
    for damage in (None, b"", b"no npz"):
        if damage is not None:
            path.write_bytes(damage)
        with pytest.raises(DataError, match=r"a\.npz"):
            _ = NpzStacks(str(tmp_path)).physics
        found = NpzStacks(str(tmp_path), exclude=["unreadable"])
        assert found.physics == ("smb", "st")
        assert count_excluded(found.load()) == {"unreadable": 1}


def test_npz_exclusions(tmp_path):
    for name in "ab":
        save(tmp_path, name)
    for name in ("negative", "one trace", "layers", "objects"):
        save(tmp_path, name, **BAD[name][0])
    shutil.copy(tmp_path / "s" / "a.npz", tmp_path / "s" / "cut.npz")
    with open(tmp_path / "s" / "cut.npz", "r+b") as file:
        file.truncate(300)
    save(tmp_path, "void", thickness=np.full((10, 3), np.nan))
    words = ["unreadable", "negative", "short", "layer_count"]
    flights = NpzStacks(str(tmp_path), exclude=words).load()
    assert len(flights.stacks) == 3
    assert count_excluded(flights) == {
        "unreadable": 2,
        "negative": 3,
        "short": 1,
        "layer_count": 1,
        "empty": 1,
    }


@pytest.mark.parametrize("version", ["5", "7.3"])
def test_names_of_the_class_string_are_read(tmp_path, version):
    path = tmp_path / "layer_20120330_01.mat"
    numbers = {"lyr_id": np.arange(1.0, 4), "lyr_order": np.array([1.0, 3.0, 2.0])}
    write_strings(path, numbers, {"lyr_name": ["surface", "bottom", None]}, version)
    companion = read_organizer(path)
    assert companion.names == {1: "surface", 2: "bottom", 3: ""}
    assert companion.order == (1, 3, 2)
    write_strings(path, {"lyr_id": np.array([1.0])}, {"lyr_name": ["surface"]}, version)
    assert read_organizer(path).names == {1: "surface"}
    write_strings(path, numbers, {"lyr_name": ["surface", "bottom"]}, version)
    with pytest.raises(DataError, match="2 names"):
        read_organizer(path)
    write_strings(path, {"lyr_id": np.array([1.0])}, {"lyr_name": ["a"], "lyr_age": ["2"]}, version)
    with pytest.raises(DataError, match=r"lyr_age .* is not made of numbers"):
        read_organizer(path)


@pytest.mark.parametrize("version", ["5", "7.3"])
def test_strings_that_cannot_be_decoded_are_refused_by_name(tmp_path, version):
    path = tmp_path / "layer_20120330_01.mat"
    write_strings(path, {"lyr_id": np.array([1.0])}, {"lyr_name": ["surface"]}, version)
    table = string_table(1).tobytes()
    path.write_bytes(path.read_bytes().replace(table, table.replace(b"string", b"strong")))
    with pytest.raises(DataError, match="lyr_name") as error:
        read_organizer(path)
    assert "cellstr" in str(error.value)
