"""Runs on a user's own clients and labels: what needs true labels is left out where unknown."""

import csv
from pathlib import Path

import pandas as pd
import pytest

from fulgurite.datamodules.fedsir import Digits

DATA = "fulgurite.datamodules.fedsir"


@pytest.fixture
def config(workdir):
    """A configuration with clients and labels of a file, of which every third true one is known."""
    labels = Digits(copies=1).read().train_labels.tolist()
    rows = range(len(labels))
    frame = pd.DataFrame(
        {
            "row": rows,
            "client": [f"lab {row % 4}" for row in rows],
            "label": [(c + 1) % 10 if row % 4 < 2 else c for row, c in enumerate(labels)],
            "truth": [c if row % 3 == 0 else None for row, c in enumerate(labels)],
        }
    )
    frame.to_csv("labels.csv", index=False)
    Path("own.yaml").write_text(
        f"""
data:
  class_path: {DATA}.FederatedDataModule
  init_args:
    source: {{class_path: {DATA}.Digits, init_args: {{copies: 1}}}}
    partition: {{class_path: {DATA}.FilePartition, init_args: {{path: labels.csv}}}}
    noise:
      class_path: {DATA}.FileLabels
      init_args: {{path: labels.csv, columns: {{true_label: truth}}, truth: file}}
    clients: 4
"""
    )
    return ("--config=own.yaml", "--run.dir=run", "--trainer.max_epochs=1")


def logged():
    with open("run/metrics.csv") as file:
        return {name: value for row in csv.DictReader(file) for name, value in row.items() if value}


def test_partial_truth_measures_noise_where_it_is_known(fit, config, log):
    fit(*config)
    values = logged()
    assert float(values["fed/label_noise"]) == pytest.approx(0.5, abs=0.05)
    assert not [name for name in values if name.startswith("identify/")]
    assert "precision and recall of noisy clients are left out" in log.text


@pytest.mark.slow  # partial truth does above
def test_unknown_truth_measures_no_noise(fit, config, log):
    noise = "--data.init_args.noise="
    fit(*config, f"{noise}{DATA}.SourceLabels")
    names = [name for name in logged() if name.startswith(("identify/", "fed/label_noise"))]
    assert not names
    assert "true labels of 1294 of 1294 training samples are unknown" in log.text
