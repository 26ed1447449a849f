"""Embeddings of elsewhere through the real command line."""

import csv
from pathlib import Path

import numpy as np
import pytest

CONFIG = "cs_arm_bn/embeddings.yaml"
CLASSES, D = 3, 8


def write_plates(folder):
    """Six plates in three batches; a plate scales and shifts the embeddings of its sites."""
    g = np.random.default_rng(0)
    centres = 2 * g.normal(size=(CLASSES + 1, D))
    rows, values = [], []
    for p in range(6):
        gain, offset = 1 + 2 * g.random(), 5 * g.normal(size=D)
        for w in range(24):
            kind = w % (CLASSES + 1)
            role = "query" if kind < CLASSES else "control"
            label = f"c{kind}" if kind < CLASSES else ""
            name = ("lab", f"b{p // 2}", f"p{p}", f"{'ABCD'[w // 6]}{w % 6 + 1}", "1")
            rows.append((*name, role, label, "no_image.png"))
            values.append(gain * (centres[kind] + 0.3 * g.normal(size=D)) + offset)
    header = ("source", "batch", "plate", "well", "site", "role", "label", "path")
    with open(folder / "plates.csv", "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    keys = {name: [row[k] for row in rows] for k, name in enumerate(header[:5])}
    np.savez(folder / "embeddings.npz", embeddings=np.array(values, np.float32), **keys)


@pytest.mark.slow
def test_embeddings_train_test_and_predict_without_an_image(fit, workdir):
    write_plates(Path())
    own = [
        "--data.init_args.source.init_args.source.init_args.path=plates.csv",
        "--data.init_args.source.init_args.embeddings=embeddings.npz",
        "--model.init_args.optimizer.init_args.lr=0.05",
        "--run.dir=run",
    ]
    cli = fit(*own, "--trainer.max_epochs=10", config=CONFIG)
    assert cli.model.network.head.in_features == D
    cli = fit(*own, "--ckpt_path=best", command="test", config=CONFIG)
    assert cli.trainer.callback_metrics["test/acc"] > 0.9  # chance is 1/3
    fit(*own, "--ckpt_path=best", command="predict", config=CONFIG)
    predictions = np.load("run/predict/predictions.npz")
    assert (predictions["predicted"] == predictions["label"]).mean() > 0.9
    probe = "--model.init_args.method=fulgurite.models.cs_arm_bn.LinearProbe"
    cli = fit(*own[:-1], probe, "--run.dir=probe", "--trainer.max_epochs=10", config=CONFIG)
    adapted = ["--model.init_args.network.init_args.hidden=16", "--run.dir=adapted"]
    adapted.append("--model.init_args.method=fulgurite.models.cs_arm_bn.ControlsOnly")
    cli = fit(*own[:-1], *adapted, "--trainer.max_epochs=10", config=CONFIG)
    assert cli.trainer.callback_metrics["val/acc"] > 0.9
