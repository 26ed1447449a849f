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
from fakes.ice_layers import completion, completion_net, deep_predictor, ice_data
from lightning.pytorch import Trainer, seed_everything

from fulgurite.datamodules.ice_layers import SyntheticFlights, World
from fulgurite.models.ice_layers import (
    BaselineCompletion,
    BaselinePrediction,
    TwoStageLR,
)

pytest.importorskip("torch_geometric")
pytest.importorskip("h5py")
pytest.importorskip("netCDF4")

pytestmark = pytest.mark.slow

EACH_LAYER = {"keep_boundaries": "none"}
ADAMW = partial(torch.optim.AdamW, lr=3e-3, weight_decay=1e-4)
STAGES = partial(TwoStageLR, first=0.3)


def flights(cache, patch, informative=True, **options):
    patch.setenv("FULGURITE_CACHE", str(cache))
    source = {"stacks": 280, "traces": 32, "layers": 8, "segments": 28, **options}
    data = ice_data(SyntheticFlights(World(**source), informative))
    data.prepare_data()
    data.setup()
    return data


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def data(cache):
    with pytest.MonkeyPatch.context() as patch:
        return flights(cache, patch)


def trainer(**options):
    return Trainer(
        logger=False, enable_checkpointing=False, num_sanity_val_steps=0, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0,
        check_val_every_n_epoch=1000, **{"max_epochs": 1000, **options},
    )  # fmt: skip


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
    run = Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, accelerator="cpu",
    )  # fmt: skip
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


def test_physics_carries_information(found, data, cache):
    """Check 12, with the negative control."""
    without = scores(trained(data, net={"use_physics": False}), data)
    assert without["test/missing_rmse"] >= 1.4 * found["test/missing_rmse"]
    with pytest.MonkeyPatch.context() as patch:
        shuffled = flights(cache, patch, informative=False)
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


def test_fewer_picks_cost_little_and_never_help(model, found, data, cache):
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


def test_neighbours_help(cache):
    """Check 14, at full size."""
    with pytest.MonkeyPatch.context() as patch:
        full = flights(cache, patch, **FULL)
    near = scores(trained(full, steps=700), full)
    alone = scores(trained(full, steps=700, net={"graph": "none"}), full)
    assert alone["test/missing_rmse"] >= 1.05 * near["test/missing_rmse"]


def test_a_robust_loss_helps_against_mistracks(cache):
    """Check 19, at full size, with 8 % of the picks on the next boundary."""
    with pytest.MonkeyPatch.context() as patch:
        full = flights(cache, patch, **FULL, mistracks=0.08)
    robust = scores(trained(full, steps=700, loss_kind="huber", delta=0.3), full)
    squared = scores(trained(full, steps=700, loss_kind="mse"), full)
    assert robust["test/missing_rmse"] <= 0.95 * squared["test/missing_rmse"]


def test_our_form_beats_the_papers(found, data):
    model = trained(data, prior="ridge", net={"attention": 2})
    trainer().validate(model, data, verbose=False)  # calibrates
    ours = scores(model, data)
    assert ours["test/missing_rmse"] < 0.9 * found["test/missing_rmse"]
    assert 0.8 < ours["test/missing_coverage90"] < 0.99


def test_pretraining_on_completed_stacks_helps(cache, tmp_path):
    """Check 15, one seed of three: the whole chain, on the entries of deep layers."""
    with pytest.MonkeyPatch.context() as patch:
        whole = flights(cache, patch, traced=0.1)
        completion = trained(whole, prior="ridge", net={"attention": 2})
        completed = flights(cache, patch, traced=0.1)
    with torch.no_grad():  # fill the training stacks where they lie
        for stack, batch in zip(completed.stacks_of("train"), batches_of(completed), strict=True):
            stack.thickness[:] = completion.fill(batch)["thickness"].numpy()
    assert all(stack.observed.all() for stack in completed.stacks_of("train"))
    options = {"kind": deep_predictor, "shallow": 3}
    with pytest.MonkeyPatch.context() as patch:
        traced = ice_data(whole.source, traced=["train"], train_stacks=24)
        patch.setenv("FULGURITE_CACHE", str(cache))
        traced.prepare_data()
        traced.setup()
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
