"""The deep-layer predictor: what it sees, what it is scored on, and where it starts."""

from functools import partial

import pytest
import torch
from fakes.ice_layers import (
    SMALL_NET,
    completion,
    deep_predictor,
    first_test_batch,
    open_flights,
)
from fakes.trainers import quiet_trainer
from lightning.pytorch import seed_everything

from fulgurite.datamodules.ice_layers import SyntheticFlights, World
from fulgurite.errors import ConfigError
from fulgurite.models.ice_layers import DeepLayerPredictor, RobustLossOptions

pytest.importorskip("torch_geometric")
pytest.importorskip("h5py")
pytest.importorskip("netCDF4")

L, K = 6, 2


def predictor(**options):
    adamw = partial(torch.optim.AdamW, lr=3e-3)
    return deep_predictor(**{"network": SMALL_NET, "shallow": K, "optimizer": adamw, **options})


def trainer(steps):
    return quiet_trainer(max_steps=steps, max_epochs=1000)


@pytest.fixture(scope="module")
def data(filled_cache):
    source = SyntheticFlights(World(stacks=40, traces=16, layers=L, segments=8))
    return open_flights(source, val=0.25, test=0.25)


def fitted(data, steps=5, **options):
    seed_everything(0)
    model = predictor(**options)
    run = trainer(steps)
    run.fit(model, data)
    return model, run


@torch.no_grad()
def test_deep_layers_are_targets_only(data):
    model, _ = fitted(data)
    batch = first_test_batch(data)
    before = model(batch)
    batch.thickness[:, K:] += 5
    assert torch.equal(model(batch), before)
    batch.thickness[:, :K] += 0.1
    assert not torch.equal(model(batch), before)


@torch.no_grad()
@pytest.mark.parametrize(("physics", "felt"), [("all", True), ("shallow", False)])
def test_physics_of_deep_layers_is_seen_on_request(data, physics, felt):
    model, _ = fitted(data, physics=physics)
    batch = first_test_batch(data)
    before = model(batch)
    batch.physics[:, K:] += 1
    assert torch.equal(model(batch), before) != felt


def test_it_is_scored_on_deep_layers(data):
    model, run = fitted(data)
    found = run.test(model, data, verbose=False)[0]
    assert {f"test/layer{k:02}_rmse" for k in range(K + 1, L + 1)} <= found.keys()
    assert "test/layer01_rmse" not in found
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in data.test_dataloader():
            error = (model(batch) - batch.truth)[:, K:]
            total, count = total + float(error.square().sum()), count + error.numel()
    assert found["test/rmse"] == pytest.approx((total / count) ** 0.5, rel=1e-5)


def test_fine_tuning_starts_where_pretraining_ended(data, tmp_path):
    model, run = fitted(data, steps=6, prior="ridge")
    run.save_checkpoint(tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", weights_only=True)
    tuned, _ = fitted(
        data, steps=1, prior="ridge", weights=str(tmp_path / "a.ckpt"),
        optimizer=partial(torch.optim.SGD, lr=0.0),
    )  # fmt: skip
    batch = first_test_batch(data)
    with torch.no_grad():
        assert torch.equal(tuned(batch), model(batch))
    # a completion network starts it too: they are the same
    other = completion(SMALL_NET, prior="ridge")
    run = trainer(1)
    run.fit(other, data)
    run.save_checkpoint(tmp_path / "b.ckpt")
    fitted(data, steps=1, prior="ridge", weights=str(tmp_path / "b.ckpt"))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"shallow": 0}, r"init_args\.inputs\.shallow` to an int > 0"),
        ({"physics": "none"}, "physics of inputs is 'none'.*one of all, shallow"),
        ({"physics": "shallow", "prior": "ridge"}, r"inputs\.physics=all"),
        ({"delta": 0.0}, r"init_args\.loss\.delta"),
        ({"members": 0}, r"init_args\.prediction\.members"),
    ],
)
def test_wrong_options_are_refused(options, word):
    with pytest.raises(ConfigError, match=word):
        predictor(**options)


def test_there_must_be_deep_layers(data):
    with pytest.raises(ConfigError, match=f"none of {L} layers"):
        trainer(1).fit(predictor(shallow=L), data)


def test_options_outside_their_groups_are_refused():
    with pytest.raises(ConfigError, match=r"The inputs is 3\. .*options of a DeepInputs"):
        DeepLayerPredictor(SMALL_NET, 3)
    with pytest.raises(ConfigError, match="RobustLossOptions has no option 'entries'"):
        DeepLayerPredictor(SMALL_NET, loss={"entries": "hidden"})
    model = DeepLayerPredictor(SMALL_NET, loss={"kind": "mse"})
    assert model.loss == RobustLossOptions(kind="mse")
