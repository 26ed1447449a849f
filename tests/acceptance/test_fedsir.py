"""FedSIR end to end on real images, over six seeds: the thresholds of its page.

As there, every method has the same 20 rounds, and Stage I comes on top for FedSIR.
"""

import json
from itertools import pairwise
from pathlib import Path
from statistics import mean

import pytest
from fakes.fedsir import FEDAVG

from fulgurite.callbacks.fedsir import FederatedRounds

SEEDS = range(6)
pytestmark = pytest.mark.slow


@pytest.fixture
def run(fit):
    """Final test accuracy of a run on digits, its rounds, and which clients are noisy."""

    def call(name, seed, rate, *options):
        settings = (
            f"--run.dir={name}", f"--seed_everything={seed}", f"--data.init_args.seed={seed}",
            f"--data.init_args.noise.init_args.rate={rate}", *options,
        )  # fmt: skip
        cli = fit(*settings, config="fedsir/digits.yaml")
        fit(*settings, "--ckpt_path=last", config="fedsir/digits.yaml", command="test")
        (rounds,) = (c for c in cli.trainer.callbacks if isinstance(c, FederatedRounds))
        accuracy = json.loads(Path(name, "test_metrics.json").read_text())["test/acc"]
        return accuracy, rounds, cli.datamodule.evaluation.noisy_clients

    return call


@pytest.mark.parametrize(("rate", "gap", "left"), [(0.3, 0.05, 0.2), (0.5, 0.05, 0.3)])
def test_mild_noise_is_found_and_mended(run, rate, gap, left):
    for seed in SEEDS:
        _, rounds, noisy = run(f"{seed}", seed, rate)
        check_rounds(rounds, noisy, gap, left)


@pytest.mark.parametrize(("rate", "left", "better"), [(0.7, 0.4, 0.02), (0.9, 0.5, 0.04)])
def test_strong_noise_is_found_and_mended_and_beats_fedavg(run, rate, left, better):
    gains, behind = [], []
    for seed in SEEDS:
        accuracy, rounds, noisy = run(f"fedsir{seed}", seed, rate)
        check_rounds(rounds, noisy, 0.15, left)
        average, _, _ = run(f"fedavg{seed}", seed, rate, FEDAVG)
        true = "--data.init_args.reveal_true_labels=true"
        oracle, _, _ = run(f"oracle{seed}", seed, rate, FEDAVG, true)
        gains.append(accuracy - average)
        behind.append(oracle - accuracy)
    assert mean(gains) >= better, gains
    assert mean(behind) <= 0.02, behind


def check_rounds(rounds, noisy, gap, left):
    assert ((~rounds.engine.method.clean) == noisy).all()  # precision and recall are 1
    off_mean = rounds.engine.method.evidence["scores"][:, 0]
    assert off_mean[noisy].min() - off_mean[~noisy].max() >= gap
    sizes = rounds.engine.fed.sizes.double()[noisy]
    shares = [
        float((noise[noisy] * sizes).sum() / sizes.sum())
        for noise in (rounds.engine.fed.sizes.new_tensor(r["noise"], dtype=sizes.dtype)
                      for r in rounds.history)
    ]  # fmt: skip
    refreshed = [shares[r] for r in rounds.engine.method.relabel_rounds]
    assert refreshed[-1] <= left
    assert all(b <= a + 0.01 for a, b in pairwise(refreshed))
