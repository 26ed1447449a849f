"""Thresholds that would catch a fake, on generated plates.

Source: docs/papers/cs_arm_bn.md section 6.4, items 3 to 7 and 9.

Networks of width 8 train for 350 steps on plates of 32x32 pixels; 2 minutes for each seed.
"""

import statistics
from functools import cache

import pytest
import torch
from fakes.trainers import quiet_trainer

from fulgurite.callbacks.cs_arm_bn import ControlContext
from fulgurite.datamodules.cs_arm_bn import HoldOut, PlateDataModule, SyntheticPlates
from fulgurite.models.cs_arm_bn import (
    ARMBN,
    CSARMBN,
    ERM,
    AdaptationOptions,
    AdaptiveWeight,
    ControlsOnly,
    PlateClassifier,
    SmallResNet,
)

pytestmark = pytest.mark.slow

SEEDS = (0, 1, 2)
STEPS, L, N = 350, 24, 48


def plates(seed, strength, mixed=False, **evaluation):
    source = SyntheticPlates(
        world={"batches": [14], "plates": [2], "strength": strength}, seed=seed
    )
    split = HoldOut(new_batches=4, val_batches=1)
    return PlateDataModule(
        source,
        split,
        episodes={"queries": L, "controls": N, "steps_per_epoch": STEPS, "mixed": mixed},
        evaluation=evaluation,
        seed=seed,
    )


@cache
def trained(method, seed, strength=1.0):
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    module = PlateClassifier(
        lambda c, k: SmallResNet(c, k, width=8), method(), lambda p: torch.optim.Adam(p, 3e-3)
    )
    # without batch effects the question is where methods end, not how fast they get there
    epochs = 1 if strength else 3
    trainer = quiet_trainer(max_epochs=epochs, limit_val_batches=0, callbacks=[ControlContext()])
    trainer.fit(module, plates(seed, strength, mixed=method is ERM))
    return module


@cache
def accuracy(training, test, seed, strength=1.0, **settings):
    """Accuracies of one training under one method at test, by test set."""
    module = trained(training, seed, strength)
    before, module.method = module.method, test()
    try:
        data = plates(seed, strength, **settings)
        foreign_controls = settings.get("control_plate") == "wrong"
        module.adaptation = AdaptationOptions(foreign_controls=foreign_controls)
        trainer = quiet_trainer(callbacks=[ControlContext(outlier_above=0)])
        trainer.test(module, data, verbose=False)
        return {
            name: float(trainer.callback_metrics[f"test/{name}/acc"]) for name in data.test_sets
        }
    finally:
        module.method = before


def stopped():
    return ControlsOnly(gradient=False)


def controls():
    return CSARMBN(test_source="controls")


def by_seed(training, test, name="new_batch", **settings):
    return [accuracy(training, test, seed, **settings)[name] for seed in SEEDS]


def check_above(better, worse, least):
    """Better by `least` on every seed, and by more than two standard deviations."""
    differences = [a - b for a, b in zip(better, worse, strict=True)]
    assert min(differences) >= least, differences
    assert statistics.mean(differences) > 2 * statistics.stdev(differences), differences


def test_new_batches_break_erm_and_not_cs_arm_bn():
    inside, new = (by_seed(ERM, ERM, name) for name in ("in_domain", "new_batch"))
    assert all(a - b >= 0.10 for a, b in zip(inside, new, strict=True)), (inside, new)
    ours = by_seed(CSARMBN, CSARMBN)
    check_above(ours, new, 0.20)
    gap = statistics.mean(by_seed(CSARMBN, CSARMBN, "in_domain")) - statistics.mean(ours)
    assert gap <= 0.10


def test_training_without_the_gradient_is_far_behind():
    check_above(by_seed(CSARMBN, controls), by_seed(stopped, stopped), 0.15)


def test_label_shift_breaks_arm_bn_and_not_cs_arm_bn():
    shifted = {"label_shift": 0.01}
    theirs, ours = by_seed(ARMBN, ARMBN, **shifted), by_seed(CSARMBN, CSARMBN, **shifted)
    assert max(theirs) <= 0.35
    check_above(ours, theirs, 0.25)
    for at_shift, uniform in zip(
        by_seed(CSARMBN, controls, **shifted), by_seed(CSARMBN, controls), strict=True
    ):
        assert abs(at_shift - uniform) <= 0.03


def test_one_query_breaks_arm_bn_and_not_cs_arm_bn():
    one = {"queries": 1, "limit": 48}
    assert max(by_seed(ARMBN, ARMBN, **one)) <= 0.20
    for single, many in zip(
        by_seed(CSARMBN, CSARMBN, **one), by_seed(CSARMBN, CSARMBN, limit=48), strict=True
    ):
        assert single >= many - 0.05


def test_more_controls_are_not_worse():
    means = {n: statistics.mean(by_seed(CSARMBN, CSARMBN, controls=n)) for n in (4, 16, 48)}
    assert means[48] >= means[16] - 0.01
    assert means[16] >= means[4] - 0.01
    assert means[4] > statistics.mean(by_seed(ERM, ERM))


def test_the_wrong_plates_controls_cost_accuracy():
    check_above(by_seed(CSARMBN, CSARMBN), by_seed(CSARMBN, CSARMBN, control_plate="wrong"), 0.20)


def test_without_batch_effects_all_methods_agree_and_any_controls_do():
    found = {
        name: statistics.mean(by_seed(training, training, strength=0.0))
        for name, training in (("erm", ERM), ("arm_bn", ARMBN), ("cs_arm_bn", CSARMBN))
    }
    assert max(found.values()) - min(found.values()) <= 0.02, found
    wrong = by_seed(CSARMBN, CSARMBN, strength=0.0, control_plate="wrong")
    assert abs(statistics.mean(wrong) - found["cs_arm_bn"]) <= 0.02


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"label_shift": 1.0}, {"label_shift": 0.1}, {"label_shift": 0.01},
        {"queries": 1, "limit": 48}, {"queries": 4}, {"queries": 8},
        {"controls": 4}, {"controls": 16}, {"controls": 0},
    ],
)  # fmt: skip
def test_the_adaptive_weight_is_never_much_worse_than_the_best_fixed_one(settings):
    ours = statistics.mean(by_seed(CSARMBN, AdaptiveWeight, **settings))
    fixed = {
        w: statistics.mean(by_seed(CSARMBN, weighted(w), **settings))
        for w in (None, 0.0, 0.1, 0.2, 1 / 3, 0.6, 1.0)
        if settings.get("controls") != 0 or w is None
    }
    assert ours >= max(fixed.values()) - 0.01, (ours, fixed)


@cache
def weighted(weight):
    return lambda: CSARMBN(test_weight=weight)
