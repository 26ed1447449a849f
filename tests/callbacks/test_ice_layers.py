"""Completed stacks through the command line: files, flags, figures, and pretraining on them."""

import itertools
import shutil
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fulgurite.callbacks.ice_layers import CompletionWriter, DrawnStack, choose_drawn_stacks
from fulgurite.datamodules.ice_layers import Blocks, LayerFiles
from fulgurite.datamodules.ice_layers.readers.layer_frames import read_frame
from fulgurite.datamodules.ice_layers.tracks.records import describe_completed
from fulgurite.errors import ConfigError
from fulgurite.io import checksum
from fulgurite.models.ice_layers import read_netcdf, read_npz

pytest.importorskip("torch_geometric")
pytest.importorskip("h5py")
pytest.importorskip("netCDF4")

CONFIGS = resources.files("fulgurite.configs.ice_layers")
SMOKE = str(CONFIGS / "smoke.yaml")
SMALL = [
    f"--data.init_args.source.init_args.world.{key}={value}"
    for key, value in {"stacks": 32, "traces": 16, "layers": 6, "segments": 8}.items()
]
PLAIN = ["--trainer.callbacks.figures=0"]
NET = ["--model.init_args.network.init_args.width=8", "--trainer.max_epochs=1"]


@pytest.fixture(scope="module")
def fitted(train_once):
    """A folder with a run that was fitted once for all."""
    _, folder = train_once("fit", "--config", SMOKE, "--run.dir=run", *SMALL, *NET)
    return folder


@pytest.fixture
def again(fitted, fit):
    """Goes on with a copy of that run: a command with further options."""
    shutil.copytree(fitted / "run", "run")

    def call(command, *options):
        return fit(
            "--run.dir=run", "--ckpt_path=last", *SMALL, *NET, *options, config=SMOKE,
            command=command,
        )  # fmt: skip

    return call


def test_every_stack_is_written_with_where_values_are_from(again):
    cli = again("predict", "--trainer.callbacks.figures=2")
    folder = Path("run/predict/completed")
    stacks = sorted(folder.glob("*.npz"))
    data = cli.datamodule
    originals = {s.name: s for part in ("train", "val", "test") for s in data.stacks_of(part)}
    assert len(stacks) == len(originals) > len(data.stacks_of("test")) > 0
    files = (data.source.root / "CSARP_layer").rglob("Data_*.mat")
    frames = {frame.name: frame for frame in map(read_frame, sorted(files))}
    digest = checksum("run/checkpoints/last.ckpt")
    trained = {s.segment for part in ("train", "val") for s in data.stacks_of(part)}
    for path in stacks:
        stack = read_npz(path)
        original = originals[stack.stack]
        seen = original.observed
        assert np.array_equal(stack.thickness[seen], original.thickness[seen])
        assert np.isfinite(stack.thickness).all()
        assert np.array_equal(stack.provenance == 0, seen)
        assert set(stack.trained_segments) == trained
        details = stack.details
        raw = np.full(details.twtt.shape, np.nan)
        for row, (frame, trace) in enumerate(zip(details.frame, details.trace, strict=True)):
            raw[row] = frames[frame].twtt[trace - 1]
        picked = details.picked & np.isfinite(details.twtt)
        np.testing.assert_allclose(details.twtt[picked], raw[picked], rtol=0, atol=1e-12)
        assert (np.isfinite(raw) & ~details.picked).mean() < 0.01  # crossed picks are none
        assert set(details.arrays()) >= {"time", "frame", "trace", "flight_distance", "twtt"}
        assert set(details.frame) <= {f"{stack.segment}_{k:03}" for k in range(1, 9)}
        on_flight = np.diff(details.flight_distance)
        np.testing.assert_allclose(on_flight, np.diff(stack.distance), rtol=1e-3)
        assert stack.origin.checkpoint == "last.ckpt"
        assert stack.origin.checkpoint_sha256 == digest
        assert path.with_suffix(".nc").is_file()
        if path not in stacks[:3]:
            continue
        again = read_netcdf(path.with_suffix(".nc"))
        assert np.array_equal(again.details.twtt, details.twtt, equal_nan=True)
        assert np.array_equal(again.thickness, stack.thickness)
        assert np.array_equal(again.provenance, stack.provenance)
    drawn = {path.stem for path in Path("run/predict/figures").glob("completed_*.png")}
    by_missing = sorted(originals.values(), key=lambda s: (-(~s.observed).sum(), s.name))
    assert drawn == {f"completed_{s.name}" for s in by_missing[:2]}
    arrays = np.load("run/predict/predictions.npz")
    assert {"thickness", "provenance", "std", "stack"} <= set(arrays.files)


@pytest.mark.slow  # tests/models/test_ice_layers_module.py leaves long gaps, too
def test_long_gaps_stay_missing(again):
    again(
        "predict",
        "--model.init_args.prediction.max_gap=300",
        "--trainer.callbacks.netcdf=false",
        *PLAIN,
    )
    folder = Path("run/predict/completed")
    assert not list(folder.glob("*.nc"))
    stacks = [read_npz(path) for path in folder.glob("*.npz")]
    left = sum(int((s.provenance == 3).sum()) for s in stacks)
    assert left == sum(int(np.isnan(s.thickness).sum()) for s in stacks) > 0


def test_completed_layers_go_back_into_layer_files(again):
    options = ["--trainer.callbacks.csarp_layer=true", "--trainer.callbacks.netcdf=false"]
    cli = again("predict", *options, *PLAIN)
    folder, data = Path("run/predict/completed"), cli.datamodule
    read = sorted((data.source.root / "CSARP_layer").glob("*/*.mat"))
    assert [path.name for path in sorted((folder / "CSARP_layer").glob("*/*.mat"))] == [
        path.name for path in read
    ]
    blocks = Blocks(traces=16, density=0.4)
    found = LayerFiles([str(folder / "CSARP_layer")], count=6, blocks=blocks).load().stacks
    assert {s.name for s in found} == {path.stem for path in folder.glob("*.npz")}
    for stack in found:  # all of it is where it was completed
        twtt = read_npz(folder / f"{stack.name}.npz").details.twtt
        times = describe_completed(stack.record, stack.thickness, stack.known_spans).twtt
        np.testing.assert_allclose(times, twtt, rtol=0, atol=1e-12)
    for stack in found:  # where no surface was picked no travel time is known
        np.testing.assert_array_equal(stack.observed.all(1), np.isfinite(stack.record.surface))


@pytest.mark.slow  # two processes
def test_two_processes_write_what_one_writes(again, run_two):
    """Layer files hold the stacks of both, and figures are of the same stacks."""
    options = ["--trainer.callbacks.csarp_layer=true", "--trainer.callbacks.figures=2"]
    again("predict", *options)
    common = ["--run.dir=run", "--ckpt_path=last", *SMALL, *NET, *options]
    run_two("predict", "--config", SMOKE, *common)
    one, two = Path("run/predict"), Path("run/predict-2")
    for pattern in ("completed/*.npz", "completed/CSARP_layer/*/*.mat", "figures/*.png"):
        names = [
            sorted(p.relative_to(folder) for p in folder.glob(pattern)) for folder in (one, two)
        ]
        assert names[0] == names[1] != []
    for path in (one / "completed").rglob("Data_*.mat"):
        frames = [read_frame(p) for p in (path, two / path.relative_to(one))]
        np.testing.assert_allclose(frames[0].twtt, frames[1].twtt, rtol=0, atol=1e-12)


def test_layer_files_need_what_they_are_made_of():
    with pytest.raises(ConfigError, match="npz=false, of which layer files are made"):
        CompletionWriter(csarp_layer=True, npz=False)


def test_a_test_draws_errors_by_depth_and_coverage(again):
    again("test")
    figures = {path.name for path in Path("run/test/figures").glob("*.png")}
    assert figures == {"test_depth.png", "test_calibration.png"}


@pytest.mark.slow  # tests/models/test_ice_layers_deep.py pretrains one in seconds
def test_a_deep_layer_predictor_is_pretrained_on_completed_stacks(again, fit):
    again("predict", "--trainer.callbacks.netcdf=false", *PLAIN)
    deep = str(CONFIGS / "deep_pretrain.yaml")
    small = [*SMALL, *NET, "--model.init_args.inputs.shallow=2"]
    root = Path("run/predict/completed").absolute()
    here = f"--data.init_args.completed.init_args.root={root}"
    cli = fit("--run.dir=deep", here, *small, config=deep)
    state = torch.load("deep/checkpoints/last.ckpt", weights_only=True)
    assert state["ice_segments"]
    # of all that was completed, training has that of training segments alone
    data = cli.datamodule
    of_part = {part: data.stacks_of(part) for part in ("train", "val", "test")}
    evaluated = {s.segment for part in ("val", "test") for s in of_part[part]}
    completed = [read_npz(path) for path in sorted(root.glob("*.npz"))]
    assert evaluated < {s.segment for s in completed}
    assert not evaluated & {s.segment for s in of_part["train"]}
    assert of_part["train"]
    assert all(s.trained_segments for s in of_part["train"])
    # stacks of test segments that the completing network has seen are refused
    with pytest.raises(Exception, match="trained on the test segments"):
        fit("--run.dir=leak", here, *small, "--data.init_args.seed=5", config=deep)


@pytest.mark.slow  # the network, above, does in the default suite
def test_a_baseline_writes_the_same_files(fit):
    config = str(CONFIGS / "baseline.yaml")
    options = [
        *SMALL,
        "--model.init_args.method=ridge",
        "--data.init_args.evaluation.predict=test",
        *PLAIN,
    ]
    fit("--run.dir=run", *options, config=config)
    with pytest.warns(UserWarning, match="ridge knows no uncertainty") as said:
        fit("--run.dir=run", "--ckpt_path=last", *options, config=config, command="predict")
    assert sum("uncertainty" in str(w.message) for w in said) == 1
    stacks = [read_npz(path) for path in Path("run/predict/completed").glob("*.npz")]
    assert stacks
    assert all(s.trained_segments for s in stacks)
    assert not list(Path("run/predict/figures").glob("*"))


def test_the_stacks_that_lack_most_are_drawn_whatever_their_order():
    def one(name, missing):
        observed = np.arange(6).reshape(3, 2) >= missing
        return DrawnStack(SimpleNamespace(stack=name, observed=observed), None)

    some = [one("c", 2), one("b", 2), one("whole", 0), one("empty", 6), one("most", 5)]
    wanted = ["most", "b", "c", "whole", "empty"]  # without a pick there is nothing to compare
    for order in itertools.permutations(some):
        assert [d.stack.stack for d in choose_drawn_stacks(order, 5)] == wanted
    assert [d.stack.stack for d in choose_drawn_stacks(some, 1)] == ["most"]


def test_a_wrong_writer_is_refused(fit):
    with pytest.raises(ConfigError, match="figures=-1"):
        CompletionWriter(figures=-1)


@pytest.mark.slow  # a process that imports everything anew
def test_a_process_of_its_own_predicts(again, start):
    """Lightning makes the loader of a prediction anew; what is imported when decides if it can."""
    options = ["--run.dir=run", "--ckpt_path=last", *SMALL, *NET, *PLAIN]
    process = start("predict", "--config", SMOKE, *options)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert list(Path("run/predict/completed").glob("*.nc"))
