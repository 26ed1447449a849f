"""What a fit leaves to look at: a table of metrics, curves, figures with integers on their axes."""

import re
from pathlib import Path

import numpy as np
import pytest

from fulgurite.cli import sort_metrics
from fulgurite.plotting import MetricCurves, heatmap, new_figure, use_integer_ticks


def test_ticks_of_rounds_are_integers():
    figure, axes = new_figure()
    axes[0][0].plot(range(4), range(4))
    use_integer_ticks(axes[0][0])
    figure.draw_without_rendering()
    ticks = axes[0][0].get_xticks()
    assert all(tick == round(tick) for tick in ticks)


def test_curves_go_on_after_a_resume():
    titles = {"train/loss": "loss", "val/acc": "accuracy", "absent": "never drawn"}
    first, second = MetricCurves(titles), MetricCurves(titles)
    first.add(0, {"train/loss": 2.0, "val/acc": float("nan"), "other": 1})
    second.load_state_dict(first.state_dict())
    second.add(1, {"train/loss": 1.0, "val/acc": 0.5})
    assert second.values == {"train/loss": {0: 2.0, 1: 1.0}, "val/acc": {1: 0.5}}
    figure = second.figure()
    assert [ax.get_title() for ax in figure.axes] == ["loss", "accuracy"]
    assert MetricCurves(titles).figure() is None


def test_a_confusion_matrix_has_names_and_numbers():
    figure, axes = new_figure()
    values = np.array([[0.75, 0.25], [np.nan, 1.0]])
    heatmap(axes[0][0], values, limits=(0, 1), names=["cat", "dog"])
    figure.draw_without_rendering()
    assert [t.get_text() for t in axes[0][0].get_yticklabels()] == ["cat", "dog"]
    assert [t.get_text() for t in axes[0][0].texts] == ["0.75", "0.25", "1.00"]


def test_rows_are_counted_from_where_they_begin():
    figure, axes = new_figure()
    heatmap(axes[0][0], np.zeros((3, 2)), first_row=1)
    figure.draw_without_rendering()
    assert axes[0][0].get_yticks().tolist() == [1, 2, 3]
    assert axes[0][0].get_ylim() == (3.5, 0.5)


def test_the_monitored_metric_comes_first():
    metrics = {"fed/bytes": 1.0, "val/acc": 2.0, "val/loss": 3.0, "test/acc": 4.0}
    assert [*sort_metrics(metrics, "val/loss")] == ["test/acc", "val/loss", "val/acc", "fed/bytes"]


def test_a_fit_ends_with_its_metrics_and_a_report_begins_with_the_monitored(fit, capsys):
    fit("--trainer.max_epochs=1", "--run.dir=run")
    out = capsys.readouterr().out
    assert re.search(r"^ +val +train", out, re.MULTILINE)
    assert re.search(r"^acc +0\.\d+", out, re.MULTILINE)
    assert re.search(r"^best val/acc: 0\.\d+", out, re.MULTILINE)
    from fulgurite.compare.report import run_summary

    rows = [line for line in run_summary(Path("run")).splitlines() if line.startswith("| ")]
    assert rows[2].startswith("| val/acc | 0.")


def test_a_model_that_logs_nothing_is_said_to_have_run(fulgurite):
    boring = "lightning.pytorch.demos.boring_classes"
    options = (
        f"--model={boring}.BoringModel", f"--data={boring}.BoringDataModule",
        "--trainer.max_epochs=1", "--trainer.limit_val_batches=0",
        "--trainer.enable_progress_bar=false", "--run.dir=run",
    )  # fmt: skip
    status, out, error = fulgurite("fit", *options)
    assert status == 0, error
    assert "fit: recorded in run" in out
    status, out, error = fulgurite("fit", *options, "--ckpt_path=last")
    assert status == 0, error
    assert "nothing left to do" in out


@pytest.mark.slow  # tests/survival draws the figures of whole runs in the default suite
@pytest.mark.figures
@pytest.mark.parametrize(
    "system", ["cs_arm_bn", pytest.param("ice_layers", marks=pytest.mark.slow)]
)
def test_a_fit_draws_its_loss(fit, system):
    fit("--run.dir=run", "--trainer.max_epochs=1", config=f"{system}/smoke.yaml")
    assert Path("run/figures/training.png").stat().st_size > 1000
