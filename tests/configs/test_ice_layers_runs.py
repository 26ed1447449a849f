"""Completion of ice layers through the real command line: ranks, interruption, the paper's size."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes.runs import read_weights
from scipy.io import savemat

from fulgurite.datamodules.ice_layers import IceLayerDataModule, SredMat, SyntheticFlights, World
from fulgurite.datamodules.ice_layers.generator.sred import write_sred
from fulgurite.datamodules.ice_layers.readers.layer_writer import write_layer_file
from fulgurite.datamodules.ice_layers.readers.sred_file import FIELDS

NAME = "ice_layers/smoke.yaml"


def write_flights(folder):
    """Seven flights of four layers, with gaps; the last file of each has no layer."""
    generator = np.random.default_rng(0)
    for day in range(7):
        name = f"201204{10 + day}_01"
        (folder / name).mkdir(parents=True)
        start = np.datetime64(f"2012-04-{10 + day}T12", "s").astype(float)
        for number in range(3):
            along = (number * 40 + np.arange(40)) * 25.0
            pos = np.stack([72.0 + day / 10 + along / 111_195.0, np.full(40, -40.0)], 1)
            steps = (
                5e-9
                * generator.uniform(0.8, 1.2, (1, 4))
                * (1 + 0.1 * np.sin(along / 200))[:, None]
            )
            picks = 3e-6 + np.concatenate([np.zeros((40, 1)), steps.cumsum(1)], 1)
            picks[10:20, 2] = np.nan
            if number == 2:
                picks = picks[:, :0]
            time = start + number * 20 + np.arange(40) * 0.5
            write_layer_file(folder / name / f"Data_{name}_{number + 1:03}.mat", time, pos, picks)


@pytest.mark.parametrize(
    ("config", "option"),
    [
        (NAME, "prediction.prior=ridge"),
        *(
            pytest.param(NAME, f"prediction.prior={p}", marks=pytest.mark.slow)
            for p in ("log", "relative", "none")
        ),
        *(
            pytest.param("ice_layers/baseline.yaml", f"method={method}", marks=pytest.mark.slow)
            for method in ("mean", "layer_mean", "along", "linear", "ridge", "kriging")
        ),
    ],
)
def test_flights_without_climate_are_completed(fit, workdir, config, option):
    write_flights(workdir / "flights")
    source = "fulgurite.datamodules.ice_layers.LayerFiles"
    options = [
        f"--data.init_args.source={source}", "--data.init_args.source.layers=[flights]",
        "--data.init_args.source.count=4", "--data.init_args.source.blocks.density=0.4",
        "--data.init_args.source.blocks.traces=40",
        "--trainer.max_epochs=1", "--run.dir=run", f"--model.init_args.{option}",
    ]  # fmt: skip
    fit(*options, config=config)
    fit(*options, "--ckpt_path=last", config=config, command="predict")
    stacks = sorted(Path("run/predict/completed").glob("*.npz"))
    assert len(stacks) == 21
    for path in stacks:
        with np.load(path) as stack:
            assert np.isfinite(stack["thickness"]).all()
            assert (stack["thickness"] > 0).all()


@pytest.mark.slow  # tests/callbacks/test_fedsir_rounds.py has two ranks in the default suite
def test_two_processes_train_and_test_as_one(fit, run_two):
    """Prior, loss and calibration are of all ranks; two batches of 4 stacks are one of 8."""
    common = [
        # what is hidden is drawn by each rank for itself
        "--model.init_args.inputs.thickness=none",
        "--model.init_args.optimizer=torch.optim.SGD", "--model.init_args.optimizer.lr=0.1",
        "--model.init_args.scheduler=null", "--trainer.max_epochs=2",
    ]  # fmt: skip
    run_two("fit", "--config", NAME, *common, "--run.dir=two", "--data.init_args.batch_size=4")
    fit(*common, "--run.dir=one", "--data.init_args.batch_size=8", config=NAME)
    one, two = read_weights("one"), read_weights("two")
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], atol=1e-5, rtol=1e-4)
    alone, both = (json.loads(Path(run, "summary.json").read_text()) for run in ("one", "two"))
    for key in ("val/heldout_mae", "val/missing_rmse", "val/absent_rmse"):
        assert both[key] == pytest.approx(alone[key], rel=1e-4), key


@pytest.mark.slow  # tests/survival does it in the default suite, by kills
def test_a_resumed_run_has_the_weights_of_an_uninterrupted_one(fit):
    fit("--run.dir=whole", "--model.init_args.scheduler=null", config=NAME)
    short = ("--run.dir=part", "--model.init_args.scheduler=null")
    fit(*short, "--trainer.max_epochs=1", config=NAME)
    fit(*short, "--ckpt_path=last", config=NAME)
    whole, part = read_weights("whole"), read_weights("part")
    assert all(torch.equal(part[key], whole[key]) for key in whole)


def write_sred_folders(folder):
    """SRED's folders, whose files are of MATLAB 7.3 and 5: 20 layers of 256 traces."""
    generator = np.random.default_rng(0)
    places = ["train_data", "train_data", "val_for_training_data"]
    places += [f"test_L_files/L{k}" for k in (1, 2, 3)]
    for day, place in enumerate(places):
        pos = np.stack([74 + day / 10 + np.arange(256) * 7e-5, np.full(256, -43.0)], 1)
        rows = 12 if place.endswith("L3") else 21
        bins = 40 + np.cumsum(generator.integers(30, 80, (256, rows)).astype(float), 1)
        bins[20:60, 5] = np.nan
        fields = {name: generator.normal(1, 0.1, (256, 21)) for name in FIELDS}
        fields["curr_temp"], fields["curr_dens"] = (
            244 * fields["curr_temp"],
            np.full((256, 21), 310.0),
        )
        fields["Elevation"] = np.full(256, 3400.0)
        path = folder / place / f"201204{10 + day}_01_{day:04}_2km.mat"
        path.parent.mkdir(parents=True, exist_ok=True)
        if day % 2:
            values = {name: value.T for name, value in fields.items()}
            values |= {"layers_vector": bins.T, "Latitude": pos[:, 0], "Longitude": pos[:, 1]}
            savemat(path, values)
        else:
            write_sred(path, bins, pos, fields)


@pytest.mark.slow  # its parts: tests/datamodules/test_ice_layers_sred.py
def test_sred_is_fitted_tested_and_completed_by_its_own_split(fit, workdir, monkeypatch):
    write_sred_folders(workdir / "SR_Dataset_v1")
    monkeypatch.setenv("FULGURITE_DATA", str(workdir))
    options = [
        "--data.init_args.num_workers=0", "--trainer.max_epochs=1", "--run.dir=run",
        "--model.init_args.network.init_args.width=8", "--data.init_args.batch_size=2",
        "--model.init_args.network.init_args.transformer.depth=1",
        "--data.init_args.evaluation.predict=all",
    ]  # fmt: skip
    name = "ice_layers/sred.yaml"
    fit(*options, config=name)
    fit(*options, "--ckpt_path=last", config=name, command="test")
    fit(*options, "--ckpt_path=last", config=name, command="predict")
    stacks = sorted(Path("run/predict/completed").glob("*.npz"))
    assert len(stacks) == 6
    with np.load(stacks[-1]) as stack:  # of L3, without its deepest layers
        assert stack["thickness"].shape == (256, 20)
        assert np.isfinite(stack["thickness"]).all()
        assert (stack["provenance"][:, 11:] == 2).all()
        assert str(stack["unit"]) == "range bins"
        assert "SRED" in str(stack["source"])
        measured = SredMat("SR_Dataset_v1").load().stacks[-1].spans
        between = stack["thickness"][20:60, 4:6].sum(1)  # two picked boundaries
        np.testing.assert_allclose(between, measured.path[20:60, 4], rtol=1e-6)


@pytest.mark.slow
def test_the_papers_configuration_fills_files_of_its_layout(fit, own_cache, monkeypatch):
    """20 layers of 256 traces, in CSARP_layer and MAR files that the generator has written."""
    made = SyntheticFlights(World(stacks=24, traces=256, layers=20, segments=8))
    IceLayerDataModule(made).prepare_data()
    (folder,) = (path.parent for path in own_cache.rglob("CSARP_layer"))
    monkeypatch.setenv("FULGURITE_DATA", str(folder))
    common = ("--run.dir=run", "--data.init_args.num_workers=0", "--trainer.max_epochs=1")
    name = "ice_layers/paper.yaml"
    fit(*common, config=name)
    fit(*common, "--ckpt_path=last", config=name, command="predict")
    stacks = sorted(Path("run/predict/completed").glob("*.npz"))
    assert stacks
    with np.load(stacks[0]) as stack:
        assert stack["thickness"].shape == (256, 20)
        assert np.isfinite(stack["thickness"]).all()
        assert {0, 1} <= {*stack["provenance"].ravel().tolist()}
