"""Language models on addition, which they must learn."""

import pytest

pytestmark = pytest.mark.slow

SMOKE = "number_probing/smoke.yaml"


def test_it_learns_to_add(fit):
    """Two-token operands in base 20, and pairs that were never trained on."""
    options = {
        "model.init_args.backbone.init_args.width": 64,
        "model.init_args.backbone.init_args.layers": 2,
        "model.init_args.backbone.init_args.heads": 4,
        "model.init_args.backbone.init_args.positions.kind": "learned",
        "model.init_args.optimizer.init_args.lr": 5e-3,
        "model.init_args.optimizer.init_args.adamw.lr": 2e-3,
        "data.init_args.task.base": 20,
        "data.init_args.batch_size": 256,
        "data.init_args.steps_per_epoch": 500,
        "trainer.max_epochs": 1,
        "trainer.callbacks": "null",
    }
    cli = fit(*(f"--{key}={value}" for key, value in options.items()), config=SMOKE)
    assert cli.trainer.callback_metrics["val/exact"] > 0.95
