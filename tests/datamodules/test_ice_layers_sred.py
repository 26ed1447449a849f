"""SRED: files of its layout, its folders as splits, and generated echograms with its gaps."""

import shutil

import numpy as np
import pytest
from fakes.ice_layers import ice_data, sred_mat
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import savemat

from fulgurite.datamodules.ice_layers import IceLayerDataModule, SyntheticSred
from fulgurite.datamodules.ice_layers.generator.sred import SredWorld, write_sred
from fulgurite.datamodules.ice_layers.readers.sred_file import FIELDS, read_sred
from fulgurite.datamodules.ice_layers.readers.sred_parts import count_complete
from fulgurite.errors import CheckpointError, ConfigError, DataError, FulguriteError
from fulgurite.models.ice_layers.data.batches import refuse_seen

N, L = 12, 4
FOLDERS = {
    "train_data": ["20120330_01_0001_2km", "20120330_01_0002_2km", "20120402_02_0001_2km"],
    "val_for_training_data": ["20120405_01_0001_2km"],
    "test_L_files/L1": ["20120411_01_0001_2km"],
    "test_L_files/L2": ["20120411_01_0007_2km"],
    "test_L_files/L3": ["20120412_03_0011_2km"],
}


def echogram(seed=0, boundaries=L + 1, rows=L + 1, traces=N):
    """The variables of a file, as MATLAB shows them."""
    generator = np.random.default_rng(seed)
    steps = generator.integers(30, 80, (boundaries, traces)).astype(float)
    content = {
        "layers_vector": np.cumsum(steps, 0),
        "Latitude": 74 + seed / 100 + np.arange(traces) * 7e-5,
        "Longitude": np.full(traces, -43.0),
        "Elevation": np.full(traces, 3400.0),
    }
    means = {"curr_smb": 0.18, "curr_temp": 244.6, "curr_dens": 309.7, "curr_SNHS_vals": 25.6}
    for name in FIELDS:
        noise = generator.normal(0, 0.01, (rows, traces))
        content[name] = means.get(name, 0.1) * (1 + noise) + np.arange(rows)[:, None] / 1000
    return content


def write(path, content, version="7.3"):
    path.parent.mkdir(parents=True, exist_ok=True)
    if version == "5":
        row = {k: v[None] if v.ndim == 1 else v for k, v in content.items()}
        savemat(path, row, do_compression=True)
        return
    fields = {
        k: v.T for k, v in content.items() if k not in ("layers_vector", "Latitude", "Longitude")
    }
    pos = np.stack([content["Latitude"], content["Longitude"]], 1)
    write_sred(path, content["layers_vector"].T, pos, fields)


@pytest.fixture
def folder(tmp_path):
    """A data set of both versions, one file for each name in FOLDERS."""
    number = 0
    for place, names in FOLDERS.items():
        for name in names:
            number += 1
            content = echogram(number, boundaries=3 if place.endswith("L3") else L + 1)
            write(tmp_path / place / f"{name}.mat", content, "5" if number % 2 else "7.3")
    return tmp_path


def source(folder, **options):
    return sred_mat(str(folder), **{"count": L, "traces": N} | options)


def source_bins(seed):
    return echogram(seed)["layers_vector"]


def replace_file(folder, place="train_data", version="7.3", **changes):
    """Write the first file of a folder anew, with other variables; None leaves one out."""
    path = folder / place / f"{FOLDERS[place][0]}.mat"
    content = echogram(1) | changes
    write(path, {k: v for k, v in content.items() if v is not None}, version)
    return path


@pytest.mark.parametrize("version", ["5", "7.3"])
def test_layers_lie_between_boundaries_and_physics_is_of_the_row_below(tmp_path, version):
    content = echogram()
    content["layers_vector"][2, 5] = np.nan
    write(tmp_path / "a" / "20120330_04_0939_2km.mat", content, version)
    flights = source(tmp_path, train=["a"], val=[], test=[]).load()
    (stack,) = flights.stacks
    assert (stack.name, stack.segment, stack.unit) == (
        "20120330_04_0939_2km", "20120330_04", "range bins",
    )  # fmt: skip
    np.testing.assert_array_equal(stack.thickness, np.diff(content["layers_vector"], axis=0).T)
    assert np.isnan(stack.thickness).sum() == 2  # the layers above and below
    total = content["layers_vector"][3, 5] - content["layers_vector"][1, 5]  # which is known
    np.testing.assert_array_equal(stack.spans.path[5, 1:3], total)
    np.testing.assert_array_equal(stack.spans.start[5], [0, 1, 1, 3])
    assert flights.physics == (*FIELDS, "Elevation")
    for k, name in enumerate(FIELDS):
        np.testing.assert_array_equal(stack.physics[..., k], content[name][1:].T.astype("f4"))
    assert (stack.physics[..., -1] == 3400).all()
    np.testing.assert_array_equal(stack.pos[:, 0], content["Latitude"])
    assert 7 < np.diff(stack.distance).mean() < 8.5
    assert "thickness in range bins" in flights.report()


def test_folders_are_the_split_and_the_report_counts_what_is_complete(folder):
    data = IceLayerDataModule(source(folder))
    data.setup()
    names = {part: [s.name for s in data.stacks_of(part)] for part in ("train", "val", "test")}
    assert names["train"] == FOLDERS["train_data"]
    assert names["val"] == FOLDERS["val_for_training_data"]
    assert names["test"] == [name for k in (1, 2, 3) for name in FOLDERS[f"test_L_files/L{k}"]]
    notes = " ".join(source(folder).load().notes)
    assert "train: 3 complete, 0 with gaps, 0 without their deepest layers" in notes
    assert "test: 2 complete, 0 with gaps, 1 without their deepest layers" in notes
    for option in ({"val": 0.2}, {"test": ["2012"]}, {"order": "name"}):
        with pytest.raises(ConfigError, match="split=segments"):
            ice_data(source(folder), **option).setup()
    other = ice_data(source(folder, split="segments"), val=0.2, test=["20120330"])
    other.setup()
    assert {s.segment for s in other.stacks_of("test")} == {"20120330_01"}


def test_segments_in_several_parts_are_refused_dropped_or_kept(folder):
    write(folder / "train_data" / "20120411_01_0099_2km.mat", echogram(99))
    with pytest.raises(DataError, match=r"1 flight segments \(20120411_01\).*1 training") as error:
        source(folder).load()
    assert "shared=drop" in str(error.value)
    dropped = source(folder, shared="drop").load()
    assert "20120411_01_0099_2km" not in {s.name for s in dropped.stacks}
    assert any(e.kind == "shared" and e.count == 1 for e in dropped.excluded)
    kept = IceLayerDataModule(source(folder, shared="keep"))
    kept.setup()
    assert len(kept.stacks_of("train")) == 4
    assert kept.shared_segments == {"20120411_01"}
    refuse_seen({"20120411_01"}, kept)  # by the user's word
    with pytest.raises(DataError, match="20120412_03"):
        refuse_seen({"20120411_01", "20120412_03"}, kept)
    assert "1 training stacks" in source(folder, shared="keep").load().report()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, L + 1), st.booleans()), min_size=1, max_size=6))
def test_what_is_complete_is_counted_by_the_deepest_pick(stacks):
    boundaries, states = [], [0, 0, 0]
    for depth, has_gap in stacks:
        picks = np.full((N, L + 1), np.nan)
        picks[:, :depth] = 1.0
        if has_gap:
            picks[3, 0] = np.nan
        boundaries.append(picks if has_gap else picks[:, :depth])
        states[2 if depth <= L else int(has_gap)] += 1
    assert count_complete(boundaries, L) == tuple(states)


def test_metres_of_range_bins(folder):
    bins = source(folder).load().stacks[0].thickness
    metres = source(folder, bin_size=0.01).load()
    assert metres.unit == "m"
    np.testing.assert_allclose(metres.stacks[0].thickness, bins * 0.01)
    dense = source(folder, sample_time=1e-10, density=0.4).load().stacks[0]
    np.testing.assert_allclose(dense.thickness, bins * 1e-10 * 299_792_458 / 2 / 1.338)
    own = source(folder, sample_time=1e-10, fields=["curr_smb"]).load()
    assert own.physics == ("curr_smb", "Elevation")
    ratio = own.stacks[0].thickness / dense.thickness
    np.testing.assert_allclose(ratio, 1.338 / (1 + 0.845 * 0.3097), rtol=0.02)
    replace_file(folder, layers_vector=np.where(np.eye(L + 1, N), np.nan, source_bins(1)))
    (stack, *_) = source(folder, sample_time=1e-10).load().stacks
    path = np.where(stack.observed, stack.spans.index * stack.thickness, stack.spans.path)
    bins = source(folder).load().stacks[0].spans
    np.testing.assert_allclose(path, bins.path * 1e-10 * 299_792_458 / 2)
    for options in (
        {"bin_size": 0.01, "sample_time": 1e-10}, {"density": 0.3}, {"bin_size": 30.0},
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            source(folder, **options)


def test_a_checkpoint_of_bins_is_not_used_for_metres(folder):
    bins = IceLayerDataModule(source(folder))
    bins.setup()
    state = bins.state_dict()
    metres = IceLayerDataModule(source(folder, bin_size=0.01))
    metres.load_state_dict(state)
    with pytest.raises(CheckpointError, match="range bins"):
        metres.setup()
    metres = IceLayerDataModule(source(folder, bin_size=0.01))
    metres.setup()
    with pytest.raises(CheckpointError, match="range bins"):
        metres.load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"layers_vector": source_bins(1).T}, "transposed"),
        ({"layers_vector": echogram(1, traces=N + 1)["layers_vector"]}, f"{N} traces"),
        ({"layers_vector": source_bins(1) * 1e-3}, "metres"),
        ({"layers_vector": -source_bins(1)}, "no range bins"),
        ({"layers_vector": np.where(np.eye(L + 1, N), np.inf, 50.0)}, "no range bins"),
        ({"layers_vector": source_bins(1)[::-1]}, "exclude.=crossed"),
        ({"curr_smb": None}, "no variable 'curr_smb'"),
        ({"curr_smb": echogram(1)["curr_smb"].T}, "transposed"),
        ({"curr_smb": echogram(1)["curr_smb"][:3]}, "fields.deeper=repeat"),
        ({"curr_smb": np.full((L + 1, N), np.nan)}, "exclude.=physics"),
        ({"curr_temp": echogram(1)["curr_temp"] - 273.15}, "not in K"),
        ({"curr_dens": echogram(1)["curr_dens"] / 1000}, "not in kg"),
        ({"curr_smb": echogram(1)["curr_smb"] * 1000}, "not in m w.e."),
        ({"Latitude": np.full(N, 99.0)}, "globe"),
        ({"Latitude": np.full(N, -43.0), "Longitude": np.full(N, 74.0)}, "exchanged"),
        ({"Latitude": np.full(N, np.nan)}, "not finite"),
        ({"Latitude": np.full(N + 3, 74.0), "Longitude": np.full(N + 3, -43.0)}, "15 values"),
        ({"Elevation": np.full(N, 3.4e6)}, "no metres"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(folder, change, match):
    path = replace_file(folder, **change)
    with pytest.raises(DataError, match=match) as error:
        source(folder).load()
    assert path.name in str(error.value)


def test_what_is_refused_can_be_left_out_and_is_counted(folder):
    replace_file(folder, curr_smb=None)
    replace_file(folder, "val_for_training_data", curr_smb=np.full((L + 1, N), np.nan))
    replace_file(folder, "test_L_files/L1", layers_vector=source_bins(1)[::-1])
    flights = source(folder, exclude=["unreadable", "physics", "crossed"]).load()
    counts = {e.kind: e.count for e in flights.excluded}
    assert counts["unreadable"] == counts["physics"] == 1
    assert counts["crossed"] > 0
    assert len(flights.stacks) == 5
    with pytest.raises(ConfigError, match="exclude"):
        source(folder, exclude=["negative"])


def test_physics_without_rows_for_deep_layers_is_repeated_on_demand(folder):
    content = echogram(1, rows=3)
    replace_file(folder, **content)
    flights = source(folder, deeper_physics="repeat").load()
    smb = flights.stacks[0].physics[..., 0]
    np.testing.assert_array_equal(smb[:, 2:], smb[:, 1:2].repeat(2, 1))
    assert "1 stacks have the last row of physics in deeper layers" in flights.report()


@pytest.mark.parametrize("name", [FOLDERS["train_data"][0], "20120411_01_0055_2km"])
def test_one_echogram_in_two_places_is_refused_or_kept_where_it_is_tested(folder, name):
    other = folder / "train_data" / f"{FOLDERS['train_data'][0]}.mat"
    copy = folder / "test_L_files" / "L3" / f"{name}.mat"
    shutil.copy(other, copy)
    with pytest.raises(DataError) as error:
        source(folder).load()
    assert str(other) in str(error.value)
    assert str(copy) in str(error.value)
    flights = source(folder, exclude=["duplicate"], shared="keep").load()
    assert flights.split.part[name] == "test"
    assert sum(s.name in (name, other.stem) for s in flights.stacks) == 1


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"train": ["nowhere"]}, "nowhere is not there"),
        ({"train": ["test_L_files"]}, "in the folders of train and of test"),
        ({"train": [], "val": [], "test": []}, "No folder"),
    ],
)
def test_folders_are_checked(folder, options, match):
    with pytest.raises(DataError, match=match):
        source(folder, **options).load()


def test_files_are_named_by_their_segment(folder):
    shutil.copy(next(folder.glob("train_data/*.mat")), folder / "train_data" / "notes.mat")
    with pytest.raises(DataError, match=r"notes\.mat does not begin with a flight segment"):
        source(folder).load()
    assert len(source(folder, exclude=["unreadable"]).load().stacks) == 7


def test_completed_stacks_name_their_source(folder):
    assert "Snow Radar Echogram Dataset" in source(folder).description
    # generated echograms are read by the same reader, and are no measurements
    assert SyntheticSred().description == "generated flights, which nobody measured"


def test_a_stack_without_boundaries_is_predicted_with_its_part(folder):
    replace_file(folder, "test_L_files/L3", layers_vector=np.full((1, N), 60.0))
    data = ice_data(source(folder), predict="test")
    data.setup()
    assert len(data.stacks_of("test")) == 2
    predicted = data.predict_dataloader().dataset
    assert [data.stacks[int(item.stack)] for item in predicted][-1] == "20120412_03_0011_2km"
    assert len(predicted) == 3


@pytest.mark.parametrize("version", ["5", "7.3"])
@pytest.mark.parametrize("name", ["layers_vector", "curr_temp", "Latitude"])
def test_text_in_place_of_numbers_is_refused(tmp_path, name, version):
    path = tmp_path / "20120330_04_0939_2km.mat"
    content = echogram()
    if version == "5":
        savemat(path, content | {name: "text"})
    else:
        content[name] = np.full((2, 2), 1.0)
        write(path, content) if name != "Latitude" else write(path, content | {name: np.zeros(3),
            "Longitude": np.zeros(3)})  # fmt: skip
    with pytest.raises(FulguriteError, match=name):
        read_sred(path, N, FIELDS)


# --- generated echograms --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generated(filled_cache):
    return SyntheticSred(SredWorld(stacks=100, traces=64, segments=20, spacing=31.4)).load()


def test_generated_echograms_lack_what_those_of_sred_lack(generated):
    """1659 complete, 1628 with gaps, 10,629 with fewer layers: 12, 12 and 76 %."""
    assert "12 complete, 12 with gaps, 76 without their deepest layers" in generated.report()
    assert all(s.thickness.shape == s.truth.shape == (64, 20) for s in generated.stacks)
    known = np.concatenate([s.thickness - s.truth for s in generated.stacks])
    assert abs(np.nanmedian(known)) < 0.2  # no bias
    assert np.nanmedian(np.abs(known)) < 2.5  # [range bins]


def test_generated_echograms_have_the_means_of_sred(generated):
    """Thickness within 10 %, other means within half a deviation or 2 %, deviations within 40 %.

    Refreezing is rare and much then: its mean is within a factor of three.
    """
    stacks = generated.stacks
    truth = np.concatenate([s.truth.ravel() for s in stacks])
    assert truth.mean() == pytest.approx(56.08, rel=0.10)
    assert truth.std() == pytest.approx(16.98, rel=0.40)
    physics = np.concatenate([s.physics.reshape(-1, s.physics.shape[-1]) for s in stacks])
    wanted = {
        "curr_smb": (0.184, 0.052), "curr_temp": (244.6, 1.63), "curr_SNHS_vals": (25.64, 0.17),
        "curr_dens": (309.7, 4.12), "Elevation": (3390.9, 259.0),
    }  # fmt: skip
    for name, (mean, std) in wanted.items():
        values = physics[:, generated.physics.index(name)]
        assert abs(values.mean() - mean) < max(0.5 * std, 0.02 * abs(mean)), name
        assert values.std() == pytest.approx(std, rel=0.4), name
    for name, mean in (("curr_RZ_vals", 0.374), ("curr_SHC_vals", 9.4e-4)):
        assert mean / 3 < physics[:, generated.physics.index(name)].mean() < mean * 3, name
    pos = np.concatenate([s.pos for s in stacks])
    np.testing.assert_allclose(pos.mean(0), [74.67, -43.12], atol=1.0)


def test_generated_echograms_depend_on_their_options(cache):
    small = {"stacks": 8, "traces": 16, "segments": 4, "spacing": 100.0, "layers": 5}
    one, again = (SyntheticSred(SredWorld(**small)).load() for _ in range(2))
    for a, b in zip(one.stacks, again.stacks, strict=True):
        np.testing.assert_array_equal(a.thickness, b.thickness)
    whole = SyntheticSred(SredWorld(**small), complete=1.0, gaps=0.0).load()
    assert all(s.observed.all() for s in whole.stacks)
    with pytest.raises(ConfigError):
        SyntheticSred(SredWorld(**small), complete=0.8, gaps=0.3)
    for options in ({"layers": 3}, {"stacks": 0}):
        with pytest.raises(ConfigError):
            SyntheticSred(SredWorld(**small | options))
