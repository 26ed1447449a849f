"""Streamed attention through the real command line: the weights of an in-core run."""

import os
import resource
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch


@pytest.mark.slow  # tests/platform/test_stream_cqsa_strategy.py
def test_streamed_attention_trains_to_the_same_weights(fit, weights):
    name = "stream_cqsa/smoke.yaml"
    cli = fit("--run.dir=streamed", config=name)
    layers, epochs, steps, evaluations = 2, 2, 4, 2
    expected = layers * epochs * (2 * steps + evaluations)  # checkpointing computes each step twice
    assert cli.trainer.strategy.backend.calls == expected
    assert Path("streamed/figures/attention.png").is_file()
    fit("--run.dir=core", "--trainer.strategy=auto", config=name)
    streamed, core = (weights(f"{run}/checkpoints/last.ckpt") for run in ("streamed", "core"))
    for key in core:
        torch.testing.assert_close(streamed[key], core[key], rtol=1e-3, atol=1e-4)
    fit("--run.dir=streamed", "--ckpt_path=best", config=name, command="test")
    assert Path("streamed/test_metrics.json").is_file()


@pytest.mark.slow  # tests/platform/attention/test_ranks.py shares one attention in seconds
def test_ranks_share_streamed_attention_and_train_to_the_same_weights(fit, run_two, weights):
    name = "stream_cqsa/smoke.yaml"
    strategy_option = "--trainer.strategy.class_path=fulgurite.strategies.StreamCQSADDPStrategy"
    budget = "--trainer.strategy.init_args.memory_budget=64KiB"
    run_two("fit", "--config", name, "--run.dir=ranks", strategy_option, strategy=budget)
    fit("--run.dir=alone", config=name)
    alone, ranks = (weights(f"{run}/checkpoints/last.ckpt") for run in ("alone", "ranks"))
    assert alone.keys() == ranks.keys()
    for key in alone:
        torch.testing.assert_close(ranks[key], alone[key], rtol=1e-3, atol=1e-4)


@pytest.mark.slow  # tests/platform/test_stream_cqsa_strategy.py spills activations in seconds
def test_activations_on_disk_train_to_the_same_weights(fit, weights):
    """The configuration for long sequences, short, against the same network in core."""
    name = "stream_cqsa/long.yaml"
    short = (
        "--data.init_args.length=2048", "--model.init_args.network.init_args.transformer.layers=2",
        "--trainer.max_steps=2", "--trainer.limit_val_batches=1",
    )  # fmt: skip
    fit(*short, "--run.dir=disk", config=name)
    fit(*short, "--run.dir=core", "--trainer.strategy=auto", config=name)
    disk, core = (weights(f"{run}/checkpoints/last.ckpt") for run in ("disk", "core"))
    for key in core:
        torch.testing.assert_close(disk[key], core[key], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_a_length_that_in_core_training_cannot_hold(workdir):
    """One limit on the memory of the process, in which only the streamed run goes through."""

    def run(*options, limit=resource.RLIM_INFINITY):
        command = [
            *(sys.executable, "-m", "fulgurite", "fit", "--config", "stream_cqsa/long.yaml"),
            *("--data.init_args.length=8192", "--trainer.max_steps=1", *options),
            # what comes after training (checkpoints, figures) takes memory of its own
            *("--trainer.enable_checkpointing=false", "--trainer.callbacks=null"),
            *("--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false"),
        ]
        process = subprocess.Popen(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
        )  # fmt: skip
        peak = 0
        while process.poll() is None:
            with suppress(OSError, StopIteration):
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                kib = next(int(x.split()[1]) for x in lines if x.startswith("VmData"))
                peak = max(peak, kib * 1024)
            time.sleep(0.01)
        return process.returncode, peak, process.stdout.read()

    status, peak, out = run()
    assert status == 0, out
    limit = peak + 32 * 2**20
    status, _, out = run(limit=limit)
    assert status == 0, out
    status, _, out = run("--trainer.strategy=auto", limit=limit)
    assert status != 0
    assert "can't allocate memory" in out, out
