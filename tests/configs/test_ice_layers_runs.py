"""Completion of ice layers through the real command line: ranks, interruption."""

import json
from pathlib import Path

import pytest
import torch

NAME = "ice_layers/smoke.yaml"


def state(run):
    return torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True)["state_dict"]


def test_two_processes_train_and_test_as_one(fit, start):
    """Prior, loss and calibration are of all ranks; two batches of 4 stacks are one of 8."""
    common = [
        "--model.init_args.inputs=physics",  # what is hidden is drawn by each rank for itself
        "--model.init_args.optimizer=torch.optim.SGD", "--model.init_args.optimizer.lr=0.1",
        "--model.init_args.scheduler=null", "--trainer.max_epochs=2",
    ]  # fmt: skip
    process = start(
        "fit", "--config", NAME, *common, "--run.dir=two", "--data.init_args.batch_size=4",
        "--trainer.strategy=ddp", "--trainer.devices=2", "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
    )  # fmt: skip
    fit(*common, "--run.dir=one", "--data.init_args.batch_size=8", config=NAME)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
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
