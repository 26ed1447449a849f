"""Layer files that are in no split, completed with a trained run."""

import shutil
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import netCDF4
import numpy as np
import pytest
import torch

import fulgurite as package
from fulgurite.datamodules.ice_layers import (
    KoenigPicks,
    LayerFiles,
    SegmentSelection,
    SredMat,
    StackSource,
)
from fulgurite.datamodules.ice_layers.prediction import find_input_stacks
from fulgurite.errors import CheckpointError, DataError

pytest.importorskip("torch_geometric")
pytestmark = pytest.mark.usefixtures("workdir")


WORLD = {"stacks": 24, "traces": 16, "segments": 8}
SMALL = [f"--data.init_args.source.init_args.world.{key}={value}" for key, value in WORLD.items()]


@pytest.fixture(scope="module")
def trained(train_once):
    """A run on generated flights, and its DataModule."""
    cli, folder = train_once(
        "fit", "--config", "ice_layers/smoke.yaml", "--trainer.max_epochs=1", "--run.dir=run",
        "--trainer.callbacks.figures=0", *SMALL,
    )  # fmt: skip
    return folder / "run", cli.datamodule


@pytest.fixture(scope="module")
def segments(trained):
    """Some of the segments, of all parts: the first is the last of all."""
    return trained[1].segments[::-3]


@pytest.fixture(scope="module")
def layer_files(trained, segments, tmp_path_factory):
    """The layer files of these segments, copied."""
    folder = tmp_path_factory.mktemp("files") / "CSARP_layer"
    for segment in segments:
        shutil.copytree(trained[1].source.root / "CSARP_layer" / segment, folder / segment)
    return folder


def names_of(data, segments):
    """Names of the stacks of some segments."""
    stacks = (stack for part in ("train", "val", "test") for stack in data.stacks_of(part))
    return {stack.name for stack in stacks if stack.segment in segments}


@pytest.fixture(scope="module")
def completed(train_once, trained, layer_files):
    """The folder of stacks that were completed of these files."""
    run = trained[0]
    cli, _ = train_once(
        "predict", "--config", str(run / "config.yaml"), f"--run.dir={run}", "--ckpt_path=last",
        f"--input={layer_files}", "--trainer.callbacks.csarp_layer=true",
    )  # fmt: skip
    return cli.folder / "completed"


@pytest.fixture
def fresh():
    """The DataModule of the run, as it is made."""
    return package.load("ice_layers/smoke", data={f"source.world.{k}": v for k, v in WORLD.items()})


def read(folder):
    return {path.name: dict(np.load(path)) for path in Path(folder).glob("*.npz")}


def test_copies_of_some_files_are_completed_as_the_split(trained, segments, completed, fulgurite):
    run, data = trained
    status, _, err = fulgurite(
        "predict", "--config", str(run / "config.yaml"), "--run.dir", str(run), "--ckpt_path=last",
        "--trainer.callbacks.netcdf=false",
    )  # fmt: skip
    assert status == 0, err
    (split,) = (folder for folder in run.glob("predict*/completed") if folder != completed)
    expected, found = read(split), read(completed)
    assert expected.keys() == {f"{name}.npz" for name in data.stacks}
    assert found.keys() == {f"{name}.npz" for name in names_of(data, segments)}
    for name, other in found.items():
        stack = expected[name]
        for key in ("observed", "provenance", "physics", "layer_names", "segment", "pos"):
            assert np.array_equal(stack[key], other[key]), key
        observed = stack["observed"]
        assert np.array_equal(stack["thickness"][observed], other["thickness"][observed])
        assert np.allclose(stack["thickness"], other["thickness"], rtol=1e-5, equal_nan=True)
        for key in ("trained_segments", "checkpoint_sha256"):
            assert np.array_equal(stack[key], other[key]), key


def assert_same_stack(first, second):
    for field in fields(first):
        one, other = getattr(first, field.name), getattr(second, field.name)
        if is_dataclass(one):
            assert_same_stack(one, other)
        else:
            np.testing.assert_array_equal(one, other, err_msg=field.name)


@pytest.mark.parametrize("chosen", [slice(None, None, -1), slice(3, 4), slice(1, None, 3)])
def test_a_segment_is_read_alone_as_among_others(trained, chosen):
    data = trained[1]
    together = {s.name: s for part in ("train", "val", "test") for s in data.stacks_of(part)}
    reader = data.source.reader()
    reader.selection = replace(reader.selection, segments=list(data.segments[chosen]))
    stacks = reader.load().stacks
    assert {stack.name for stack in stacks} == names_of(data, reader.selection.segments)
    for stack in stacks:
        expected = together[stack.name]
        assert_same_stack(replace(stack, truth=expected.truth), expected)


def test_the_files_are_written_back(completed, layer_files):
    written = {path.name for path in (completed / "CSARP_layer").rglob("*.mat")}
    assert written == {path.name for path in layer_files.rglob("*.mat")}


@pytest.mark.parametrize("suffix", [pytest.param(".npz", marks=pytest.mark.slow), ".nc"])
def test_filled_entries_of_completed_stacks_are_missing_again(trained, completed, suffix):
    few = sorted(completed.glob(f"*{suffix}"))[:3]
    Path("stacks").mkdir()
    for path in few:
        shutil.copyfile(path, Path("stacks") / path.name)
    package.predict(trained[0], "stacks", "last")
    newest = max(trained[0].glob("predict*"), key=lambda folder: folder.stat().st_mtime)
    again = read(newest / "completed")
    assert again.keys() == {f"{path.stem}.npz" for path in few}
    for name, stack in again.items():
        before = read(completed)[name]
        assert np.array_equal(stack["observed"], before["observed"])
        observed = before["observed"]
        assert np.array_equal(stack["thickness"][observed], before["thickness"][observed])
        assert np.array_equal(stack["physics"], before["physics"])
        assert np.array_equal(stack["layer_names"], before["layer_names"])
        assert before["picked"][:, 1:][~before["observed"]].any()
        for key in ("picked", "time", "elevation", "frame", "trace", "density"):
            assert np.array_equal(stack[key], before[key]), key
        # picks stay, and the network has seen the same
        np.testing.assert_allclose(stack["thickness"], before["thickness"], rtol=1e-5)
        np.testing.assert_allclose(stack["twtt"], before["twtt"], rtol=1e-9)


def test_layer_files_beside_stacks_are_ambiguous(trained, completed):
    with pytest.raises(DataError, match=r"holds both layer files and stacks as \.npz"):
        package.predict(trained[0], completed, "last")


def test_a_checkpoint_that_says_nothing_leaves_it_to_the_data(
    trained, segments, layer_files, fresh
):
    data = fresh.data
    data.predict_from(layer_files, {})
    state = trained[1].state_dict()
    assert data.statistics.keys() == state["statistics"].keys()
    assert all(torch.equal(v, state["statistics"][k]) for k, v in data.statistics.items())
    data.setup("predict")
    assert {*data.stacks} == names_of(trained[1], segments)
    assert all(not data.stacks_of(part) for part in ("train", "val", "test"))


def write_npz(path, layers, **arrays):
    rows = 4
    pos = np.column_stack([np.linspace(70, 70.01, rows), np.full(rows, -40.0)])
    np.savez(path, thickness=np.full((rows, layers), 0.8), pos=pos, **arrays)
    return Path(path)


def test_stacks_that_do_not_fit_are_refused_by_name(trained, fresh):
    data = fresh.data
    source, state = data.source, trained[1].state_dict()
    names = np.array(state["physics"])
    fields = np.broadcast_to([0.3, -20.0, 0.1, -0.2, 1.0], (4, 8, 5))  # smb in metres
    for arrays, layers, words in (
        ({}, 5, r"five\.npz has 5 layers, and the network was trained on 8"),
        ({}, 8, r"The physical fields .* of .*five\.npz have shape"),
        (
            {"physics": fields},
            8,
            r"five\.npz have physical fields in other units .* balance is 0\.3",
        ),
        (
            {"physics": fields, "physics_names": names[::-1]},
            8,
            r"snowpack, .*, smb of .*five\.npz are not those of others, smb, st",
        ),
        ({"provenance": np.zeros((4, 3))}, 8, r"provenance of the stack .*five\.npz has the shape"),
    ):
        data.source = source
        data.predict_from(write_npz("five.npz", layers, **arrays), state)
        with pytest.raises(DataError, match=words):
            data.setup("predict")


def test_a_missing_climate_is_named(trained, layer_files, fresh):
    data = fresh.data
    data.source = LayerFiles([str(layer_files)])
    with pytest.raises(CheckpointError, match="trained with the physical fields"):
        data.predict_from(layer_files, trained[1].state_dict())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("empty", marks=pytest.mark.slow),
        "other",
        pytest.param("one.txt", marks=pytest.mark.slow),
    ],
)
def test_what_holds_no_layer_file_is_refused(trained, name):
    Path("empty").mkdir()
    Path("other").mkdir()
    Path("other/other.mat").write_bytes(b"none")
    Path("one.txt").write_text("none")
    with pytest.raises(DataError, match=f"--input=.*{name}"):
        package.predict(trained[0], name, "last")


class OwnStacks(StackSource):
    """A source of a user, who reads no files."""

    physics = ("a",)

    def load(self):
        raise NotImplementedError


def test_each_source_reads_its_kind_of_files():
    Path("mapdata1.txt").write_text("none")
    Path("sred").mkdir()
    Path("sred/20120330_04_0939_2km.mat").write_bytes(b"none")

    def find(path, source):
        return find_input_stacks(Path(path), source, layers=7, physics=("a",))

    tables = find("mapdata1.txt", KoenigPicks(["old"], count=7, surface="zero"))
    assert (tables.files, tables.count, tables.surface) == (["mapdata1.txt"], 7, "zero")
    for folder in ("a", "b"):
        Path("season", folder).mkdir(parents=True)
        Path("season", folder, "Data_20120330_01_001.mat").touch()
    selection = SegmentSelection(prefer=("b", "elsewhere"))
    frames = find("season", LayerFiles(["old"], count=7, selection=selection))
    assert frames.paths() == {"20120330_01": [Path("season/b/Data_20120330_01_001.mat").absolute()]}
    sred = find("sred", SredMat("old", count=7, traces=64))
    assert [path.name for path in sred.paths()["train"]] == ["20120330_04_0939_2km.mat"]
    assert (sred.count, sred.traces) == (7, 64)
    with pytest.raises(DataError, match="read by folder"):
        find("sred/20120330_04_0939_2km.mat", SredMat("old"))
    with pytest.raises(DataError, match="--input=sred holds no stack that can be completed"):
        find("sred", OwnStacks())
    write_npz("own.npz", 7)
    with netCDF4.Dataset("climate.nc", "w") as file:
        file.createDimension("TIME", 1)
        file.createVariable("TIME", "f8", ("TIME",))
    with pytest.raises(DataError, match=r"climate.nc .*it is no completed stack: it has no thick"):
        find("climate.nc", OwnStacks()).load()
    assert find("own.npz", OwnStacks()).paths() == [Path("own.npz")]
