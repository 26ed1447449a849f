"""The statistical checks of docs/papers/ice_layers.md at its size for CI.

That is 8 layers, 32 traces, 200 stacks and 300 steps.

Two need its full size (10 layers, 48 traces, 400 stacks, 700 steps).

The page's bounds are of methods that fill each layer for itself, as the paper does, and so are the
networks and simple rules here. Where picked boundaries are kept (our default) the bounds do not
hold: measured sums decide much of what is missing for a mean, too.
"""

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from fakes.ice_layers import (
    FakeFlights,
    completion,
    completion_net,
    deep_predictor,
    open_flights,
)
from fakes.trainers import quiet_trainer
from lightning.pytorch import seed_everything

from fulgurite.datamodules.ice_layers import IceLayerDataModule, SyntheticFlights, World
from fulgurite.errors import ConfigError
from fulgurite.models.ice_layers import (
    BaselineCompletion,
    BaselinePrediction,
    CompletionInputs,
    IceCompletion,
    TwoStageLR,
)

pytest.importorskip("torch_geometric")
pytest.importorskip("h5py")
pytest.importorskip("netCDF4")

pytestmark = pytest.mark.slow

EACH_LAYER = {"keep_boundaries": "none"}
ADAMW = partial(torch.optim.AdamW, lr=3e-3, weight_decay=1e-4)
STAGES = partial(TwoStageLR, first=0.3)


def flights(informative=True, **options):
    world = {"stacks": 280, "traces": 32, "layers": 8, "segments": 28, **options}
    return open_flights(SyntheticFlights(World(**world), informative))


@pytest.fixture(scope="module")
def data(filled_cache):
    return flights()


def trainer(**options):
    endless = {"max_epochs": 1000, "check_val_every_n_epoch": 1000}
    return quiet_trainer(gradient_clip_val=1.0, **endless | options)


def trained(data, steps=300, seed=0, kind=completion, net=None, save=None, **options):
    seed_everything(seed)
    options = {"optimizer": ADAMW, "scheduler": STAGES, **options}
    if kind is completion:
        options, net = EACH_LAYER | options, {"sums": False, **(net or {})}
    model = kind(network=partial(completion_net, **(net or {})), **options)
    run = trainer(max_steps=steps)
    run.fit(model, data)
    if save:
        run.save_checkpoint(save)
    return model


def scores(model, data):
    return trainer().test(model, data, verbose=False)[0]


def baseline(data, method):
    model = BaselineCompletion(method, prediction=BaselinePrediction(**EACH_LAYER))
    run = quiet_trainer(max_epochs=1)
    run.fit(model, data)
    return run.test(model, data, verbose=False)[0]


@pytest.fixture(scope="module")
def model(data):
    return trained(data)


@pytest.fixture(scope="module")
def found(model, data):
    return scores(model, data)


def test_missing_entries_are_filled_better_than_by_simple_rules(found, data):
    """Check 11, for the paper's form."""
    mean, linear = baseline(data, "mean"), baseline(data, "linear")
    assert found["test/missing_rmse"] <= 0.45 * mean["test/missing_rmse"]
    assert found["test/missing_rmse"] <= 0.75 * linear["test/missing_rmse"]
    assert found["test/absent_rmse"] <= 0.55 * mean["test/absent_rmse"]


def test_physics_carries_information(found, data):
    """Check 12, with the negative control."""
    without = scores(trained(data, net={"use_physics": False}), data)
    assert without["test/missing_rmse"] >= 1.4 * found["test/missing_rmse"]
    shuffled = flights(informative=False)
    useless = scores(trained(shuffled), shuffled)
    blind = scores(trained(shuffled, net={"use_physics": False}), shuffled)
    assert useless["test/missing_rmse"] >= 0.95 * blind["test/missing_rmse"]


@torch.no_grad()
def test_permuted_physics_misleads(model, found, data):
    """Check 12, second part: physics of other entries of the stack."""
    g = torch.Generator().manual_seed(0)
    squares, count = 0.0, 0
    for batch in data.test_dataloader():
        for rows in torch.arange(len(batch.pos)).split(batch.ptr.diff().tolist()):
            flat = batch.physics[rows].flatten(0, 1)
            mixed = flat[torch.randperm(len(flat), generator=g)]
            batch.physics[rows] = mixed.view_as(batch.physics[rows])
        missing = ~batch.observed
        error = (model.fill(batch)["predicted"] - batch.truth)[missing]
        squares, count = squares + float(error.square().sum()), count + len(error)
    assert (squares / count) ** 0.5 >= 1.5 * found["test/missing_rmse"]


@pytest.mark.filterwarnings("ignore:.*learn to copy")
def test_without_hiding_gaps_are_garbage(found, data):
    """Check 13: hiding is what works."""
    copying = trained(data, thickness="observed", trap_ratio=None)
    mean = baseline(data, "mean")
    # the paper's page has 0.9 on its own data; here 0.86 was measured
    assert scores(copying, data)["test/missing_rmse"] >= 0.8 * mean["test/missing_rmse"]
    held = trainer().validate(copying, data, verbose=False)[0]
    assert held["val/identity_ratio"] > 5
    assert found["test/missing_rmse"] < 0.5 * mean["test/missing_rmse"]


@torch.no_grad()
def test_thickness_is_plausible(model, data):
    """Check 17."""
    filled = [(model.fill(batch), batch) for batch in data.test_dataloader()]
    predicted = torch.cat([made["predicted"] for made, _ in filled])
    truth = torch.cat([batch.truth for _, batch in filled])
    assert (predicted > 0).all()
    shrinks, truly = (x[:, -1].mean() / x[:, 0].mean() for x in (predicted, truth))
    assert float(shrinks / truly) == pytest.approx(1, abs=0.1)


def test_fewer_picks_cost_little_and_never_help(model, found, data):
    """Check 18, on the entries that were missing at first."""
    mean = baseline(data, "mean")["test/missing_rmse"]
    errors = [found["test/missing_rmse"]]
    try:
        for drop in (0.1, 0.3, 0.5, 0.7, 0.9):
            data.evaluation = replace(data.evaluation, drop=drop)
            errors.append(scores(model, data)["test/missing_rmse"])
    finally:
        data.evaluation = replace(data.evaluation, drop=0.0)
    assert all(b >= 0.98 * a for a, b in itertools.pairwise(errors))
    assert errors[-1] < 0.5 * mean


FULL = {"traces": 48, "layers": 10, "stacks": 560}


def test_neighbours_help(filled_cache):
    """Check 14, at full size."""
    full = flights(**FULL)
    near = scores(trained(full, steps=700), full)
    alone = scores(trained(full, steps=700, net={"graph": "none"}), full)
    assert alone["test/missing_rmse"] >= 1.05 * near["test/missing_rmse"]


def test_a_robust_loss_helps_against_mistracks(filled_cache):
    """Check 19, at full size, with 8 % of the picks on the next boundary."""
    full = flights(**FULL, mistracks=0.08)
    robust = scores(trained(full, steps=700, loss_kind="huber", delta=0.3), full)
    squared = scores(trained(full, steps=700, loss_kind="mse"), full)
    assert robust["test/missing_rmse"] <= 0.95 * squared["test/missing_rmse"]


def test_our_form_beats_the_papers(found, data):
    model = trained(data, prior="ridge", net={"attention": 2})
    trainer().validate(model, data, verbose=False)  # calibrates
    ours = scores(model, data)
    assert ours["test/missing_rmse"] < 0.9 * found["test/missing_rmse"]
    assert 0.8 < ours["test/missing_coverage90"] < 0.99


def test_pretraining_on_completed_stacks_helps(filled_cache, tmp_path):
    """Check 15, one seed of three: the whole chain, on the entries of deep layers."""
    whole = flights(traced=0.1)
    completion = trained(whole, prior="ridge", net={"attention": 2})
    completed = flights(traced=0.1)
    with torch.no_grad():  # fill the training stacks where they lie
        for stack, batch in zip(completed.stacks_of("train"), batches_of(completed), strict=True):
            stack.thickness[:] = completion.fill(batch)["thickness"].numpy()
    assert all(stack.observed.all() for stack in completed.stacks_of("train"))
    options = {"kind": deep_predictor, "shallow": 3}
    traced = open_flights(whole.source, traced=["train"], train_stacks=24)
    scratch = scores(trained(traced, steps=450, **options), whole)
    pretrained = trained(completed, steps=300, save=tmp_path / "a.ckpt", **options)
    low = partial(torch.optim.AdamW, lr=3e-5, weight_decay=1e-4)
    weights = str(tmp_path / "a.ckpt")
    tuned = trained(traced, steps=150, weights=weights, optimizer=low, **options)
    assert not torch.equal(*(next(m.networks.parameters()) for m in (tuned, pretrained)))
    for model in (pretrained, tuned):
        assert scores(model, whole)["test/rmse"] <= 0.95 * scratch["test/rmse"]


def batches_of(data):
    from torch_geometric.loader.dataloader import Collater

    for item in data.train_dataloader().dataset:
        yield Collater([item])([item])


# --- stacks of which everything is known ---------------------------------------------------------


def fit_fakes(data, steps, **options):
    """A module that is fitted to fake flights without validation, and its trainer."""
    seed_everything(0)
    model = completion(optimizer=partial(torch.optim.AdamW, lr=3e-3), **options)
    run = quiet_trainer(max_epochs=1000, max_steps=steps, limit_val_batches=0)
    run.fit(model, data)
    return model, run


def test_copying_is_detected():
    """Check 13: the identity version stops with what to do, or goes on where that is asked for."""
    data = FakeFlights()
    network = partial(completion_net, width=32, depth=1, graph="none")
    with pytest.warns(UserWarning, match="learn to copy"):
        model, run = fit_fakes(data, 150, network=network, thickness="observed", trap_ratio=None)
    copying = run.test(model, data, verbose=False)[0]
    check = quiet_trainer()
    assert check.validate(model, data, verbose=False)[0]["val/identity_ratio"] > 5
    model.inputs = replace(model.inputs, trap_ratio=5.0)
    with pytest.raises(ConfigError, match=r"copies what it sees.*inputs\.thickness=hidden"):
        check.validate(model, data, verbose=False)
    model, run = fit_fakes(data, 150, network=network, thickness="hidden")
    hiding = run.test(model, data, verbose=False)[0]
    assert hiding["test/missing_rmse"] < 0.7 * copying["test/missing_rmse"]


def test_two_stacks_are_learned_by_heart_from_physics():
    """Check 16."""
    losses = []

    class Recorded(IceCompletion):
        def log(self, name, value, **options):
            losses.append(float(torch.as_tensor(value).detach()))
            super().log(name, value, **options)

    seed_everything(0)
    # validation and test share a flight here, and neither counts
    model = Recorded(
        partial(completion_net, width=32), CompletionInputs(thickness="none"), allow_seen=True,
        optimizer=partial(torch.optim.AdamW, lr=3e-3),
    )  # fmt: skip
    run = quiet_trainer(max_epochs=1000, max_steps=200, limit_val_batches=0)
    run.fit(model, FakeFlights(train=2, batch_size=2))
    assert losses[0] > 5 * losses[-1]


# --- kriging -------------------------------------------------------------------------------------


def test_kriging_is_of_the_class_of_the_card(filled_cache):
    """On 400 stacks docs/papers/ice_layers.md section 4.3 has 0.060 m of 0.288, ridge 0.103."""
    data = IceLayerDataModule()
    metrics_of = {}
    for method in ("mean", "ridge", "kriging"):
        module = BaselineCompletion(method)
        trainer = quiet_trainer(max_epochs=1, gradient_clip_val=1.0)
        trainer.fit(module, data)
        (metrics_of[method],) = trainer.test(module, data, verbose=False)
    error = {method: metrics["test/sound_rmse"] for method, metrics in metrics_of.items()}
    assert error["kriging"] < 0.066
    assert error["kriging"] < 0.25 * error["mean"]
    assert error["kriging"] < 0.6 * error["ridge"]
    assert 0.86 < metrics_of["kriging"]["test/missing_coverage90"] < 0.95
    noise = module.kriging.covariance
    assert noise["e"] == pytest.approx(0.012, rel=0.25)  # of the generator's boundaries
