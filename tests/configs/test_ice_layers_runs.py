"""Completion of ice layers through the real command line: ranks, interruption, the paper's size."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fulgurite.datamodules.ice_layers import IceLayerDataModule, SyntheticFlights

NAME = "ice_layers/smoke.yaml"


def state(run):
    return torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True)["state_dict"]


def test_two_processes_train_and_test_as_one(fit, run_two):
    """Prior, loss and calibration are of all ranks; two batches of 4 stacks are one of 8."""
    common = [
        "--model.init_args.inputs=physics",  # what is hidden is drawn by each rank for itself
        "--model.init_args.optimizer=torch.optim.SGD", "--model.init_args.optimizer.lr=0.1",
        "--model.init_args.scheduler=null", "--trainer.max_epochs=2",
    ]  # fmt: skip
    run_two("fit", "--config", NAME, *common, "--run.dir=two", "--data.init_args.batch_size=4")
    fit(*common, "--run.dir=one", "--data.init_args.batch_size=8", config=NAME)
    one, two = state("one"), state("two")
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], atol=1e-5, rtol=1e-4)
    alone, both = (json.loads(Path(run, "summary.json").read_text()) for run in ("one", "two"))
    for key in ("val/heldout_mae", "val/missing_rmse", "val/absent_rmse"):
        assert both[key] == pytest.approx(alone[key], rel=1e-4), key


def test_a_resumed_run_has_the_weights_of_an_uninterrupted_one(fit):
    fit("--run.dir=whole", "--model.init_args.scheduler=null", config=NAME)
    short = ("--run.dir=part", "--model.init_args.scheduler=null")
    fit(*short, "--trainer.max_epochs=1", config=NAME)
    fit(*short, "--ckpt_path=last", config=NAME)
    whole, part = state("whole"), state("part")
    assert all(torch.equal(part[key], whole[key]) for key in whole)


@pytest.mark.slow
def test_the_papers_configuration_fills_files_of_its_layout(fit, tmp_path, monkeypatch):
    """20 layers of 256 traces, in CSARP_layer and MAR files that the generator has written."""
    made = SyntheticFlights(stacks=24, traces=256, layers=20, segments=8)
    IceLayerDataModule(made).prepare_data()
    (folder,) = (path.parent for path in Path(os.environ["FULGURITE_CACHE"]).rglob("CSARP_layer"))
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
