"""The completion module: training, checkpoints, the identity trap, uncertainty."""

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from fakes.ice_layers import SMALL_NET, FakeFlights, completion, completion_net, first_test_batch
from fakes.trainers import quiet_trainer
from lightning.pytorch import LightningDataModule, seed_everything
from torch import nn

from fulgurite.errors import CheckpointError, ConfigError, DataError
from fulgurite.models.ice_layers import (
    Calibration,
    CompletionInputs,
    CompletionPrediction,
    IceCompletion,
    StructuredHiding,
    Track,
    coverage,
    measure_gaps,
)
from fulgurite.models.ice_layers.data.normalise import Normaliser, to_positive
from fulgurite.models.ice_layers.training.schedule import TwoStageLR
from fulgurite.models.ice_layers.training.uncertainty import Z90, entry_features, mean_and_std

pytest.importorskip("torch_geometric")
from torch_geometric.loader.dataloader import Collater

L, P = FakeFlights.layers, len(FakeFlights.physics)
NAN = math.nan


ADAMW = partial(torch.optim.AdamW, lr=3e-3)


def module(**options):
    return completion(**{"network": SMALL_NET, "optimizer": ADAMW, **options})


def trainer(steps=0, **options):
    limit = {"max_epochs": 1000, "max_steps": steps} if steps else {"max_epochs": 2}
    return quiet_trainer(**limit, **options)


def fitted(data=None, steps=40, seed=0, limit_val_batches=1.0, **options):
    seed_everything(seed)
    model = module(**options)
    run = trainer(steps, limit_val_batches=limit_val_batches)
    data = data or FakeFlights()
    run.fit(model, data)
    return model, data, run


@pytest.fixture(scope="module")
def trained():
    return fitted(steps=150, scheduler=partial(TwoStageLR, first=0.3), prior="ridge")


def test_it_learns_to_fill(trained):
    model, data, run = trained
    found = run.test(model, data, verbose=False)[0]
    truth = torch.cat([d.truth for d in data.parts["test"]])
    missing = ~torch.cat([d.observed for d in data.parts["test"]])
    mean = (data.statistics["thickness_mean"] - truth)[missing].square().mean().sqrt()
    assert found["test/missing_rmse"] < 0.45 * float(mean)
    assert {"test/gap_rmse", "test/absent_rmse", "test/layer05_rmse"} <= found.keys()
    assert 0.8 < found["test/missing_coverage90"] <= 1
    held = run.validate(model, data, verbose=False)[0]
    assert held["val/identity_ratio"] < 5
    assert {"val/heldout_mae", "val/visible_mae"} <= held.keys()


@torch.no_grad()
def test_what_was_observed_keeps_every_bit(trained):
    """Check 1, through the module."""
    model, data, _ = trained
    batch = first_test_batch(data)
    filled = model.fill(batch)
    seen = batch.observed
    assert filled["thickness"].dtype == torch.float64
    assert torch.equal(filled["thickness"][seen], batch.thickness[seen])
    assert filled["thickness"].isfinite().all()
    assert (filled["thickness"] > 0).all()
    absent = measure_gaps(seen, batch.distance, Track.from_ptr(batch.ptr)).absent
    assert torch.equal(filled["provenance"] == 0, seen)
    assert torch.equal(filled["provenance"] == 2, absent)
    assert torch.equal(filled["std"].isnan(), seen)
    assert (filled["std"][~seen] > 0).all()


@torch.no_grad()
def test_what_is_missing_may_be_anything(trained):
    """Checks 2 and 8, through the module."""
    model, data, _ = trained
    batch = first_test_batch(data)
    before = model.fill(batch)
    for value in (-1.0, math.inf, 1e30):
        batch.thickness = batch.thickness.where(batch.observed, value)
        after = model.fill(batch)
        assert torch.equal(after["predicted"], before["predicted"])
        assert torch.equal(after["thickness"], before["thickness"])


@torch.no_grad()
def test_long_gaps_are_left(trained):
    model, data, _ = trained
    batch = first_test_batch(data)
    model.prediction = replace(model.prediction, max_gap=300.0)
    try:
        filled = model.fill(batch)
    finally:
        model.prediction = replace(model.prediction, max_gap=None)
    length = measure_gaps(batch.observed, batch.distance, Track.from_ptr(batch.ptr)).length
    left = length > 300
    assert left.any()
    assert (~left & ~batch.observed).any()
    assert torch.equal(filled["provenance"] == 3, left)
    assert torch.equal(filled["thickness"].isnan(), left)
    assert torch.equal(filled["std"].isnan(), left | batch.observed)


@torch.no_grad()
def test_stacks_are_completed_alone_as_in_a_batch(trained):
    model, data, _ = trained
    batch = first_test_batch(data)
    together = model.fill(batch)["predicted"].split(batch.ptr.diff().tolist())
    for item, there in zip(data.parts["test"], together, strict=False):
        alone = model.fill(Collater([item])([item]))["predicted"]
        torch.testing.assert_close(alone, there, atol=1e-5, rtol=0)


def compile_and_test(trained):
    """Errors of the test set by compiled networks, and by the same as they are."""
    model, data, _ = trained
    [plain] = quiet_trainer().test(model, datamodule=data, verbose=False)
    networks, model.networks = model.networks, copy.deepcopy(model.networks)
    model.prediction = replace(model.prediction, compile=True)
    try:
        [compiled] = quiet_trainer().test(model, datamodule=data, verbose=False)
    finally:
        model.networks = networks
        model.prediction = replace(model.prediction, compile=False)
    return compiled, plain


@pytest.mark.slow  # half a minute of a compiler
def test_compiled_networks_predict_the_same(trained):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled, plain = compile_and_test(trained)
    assert compiled == pytest.approx(plain, rel=1e-4, abs=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_a_missing_compiler_is_named(trained, monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    torch.compiler.reset()
    with pytest.raises(ConfigError, match=r"compile=true.* could not be compiled"):
        compile_and_test(trained)


def test_a_step_does_not_see_what_it_hides():
    """Check 8: a hidden pick reaches the loss, and not the prediction."""
    model, data, _ = fitted(steps=1)
    batch = next(iter(data.train_dataloader()))
    seen = []

    class Spy(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, thickness, visible, *rest):
            out = self.network(thickness, visible, *rest)
            seen.append((visible, out.detach()))
            return out

    model.networks[0] = Spy(model.networks[0])
    model.log = lambda *a, **k: None
    base = model.training_step(batch, 0)
    visible, out = seen[0]
    hidden = batch.observed & ~visible
    assert 0.1 < float(hidden.sum() / batch.observed.sum()) < 0.5
    batch.thickness = torch.where(hidden, batch.thickness + 1, batch.thickness)
    changed = model.training_step(batch, 0)
    assert torch.equal(seen[1][1], out)
    assert changed != base
    model.training_step(batch, 1)
    assert not torch.equal(seen[2][0], visible)  # another batch hides something else


@pytest.mark.parametrize(
    "prior",
    [
        pytest.param("none", marks=pytest.mark.slow),
        "relative",
        pytest.param("log", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_holds_all_that_predicts(tmp_path, prior):
    model, data, run = fitted(prior=prior, members=2, steps=6)
    run.validate(model, data, verbose=False)
    run.save_checkpoint(tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", weights_only=True)
    again = IceCompletion.load_from_checkpoint(
        tmp_path / "a.ckpt", network=SMALL_NET, weights_only=True
    )
    model.eval(), again.eval()
    batch = first_test_batch(data)
    with torch.no_grad():
        here, there = model.fill(batch), again.fill(batch)
    for name, value in here.items():
        torch.testing.assert_close(there[name], value, rtol=0, atol=0, equal_nan=True)
    assert again.trained_segments == model.trained_segments
    assert set(model.trained_segments) == {data.segments[i] for i in range(8)}
    # other data do not change what the checkpoint normalises by
    other = module(weights=str(tmp_path / "a.ckpt"), prior=prior, members=2)
    shifted = FakeFlights()
    shifted.statistics = {k: v + 1 for k, v in data.statistics.items()}
    trainer(1).fit(other, shifted)
    assert torch.equal(other.normaliser.thickness_mean, data.statistics["thickness_mean"])
    assert set(other.trained_segments) >= set(model.trained_segments)


def test_a_contradicted_pick_is_neither_shown_nor_asked_for():
    model, data, _ = fitted(steps=1, prior="relative", outlier=3.0)
    batch = first_test_batch(data)
    batch.thickness[5, 0] = 3 * batch.truth[5, 0]
    batch.observed[3:8, 0] = True
    batch.thickness[[3, 4, 6, 7], 0] = batch.truth[[3, 4, 6, 7], 0]
    with torch.no_grad():
        x, there = model.normalise(batch), model(batch)
        assert not model.mask_outliers(x, x.observed)[5, 0]
        loss = model.objective(torch.zeros_like(x.thickness), x, x.observed)
        batch.thickness[5, 0] *= 2
        assert torch.equal(model(batch), there)
        x = model.normalise(batch)
        assert model.objective(torch.zeros_like(x.thickness), x, x.observed) == loss


def test_interrupted_training_goes_on_bit_for_bit(tmp_path):
    options = {"scheduler": partial(TwoStageLR, total_steps=16), "prior": "ridge"}
    whole, *_ = fitted(steps=16, **options)
    _, data, run = fitted(steps=8, **options)
    run.save_checkpoint(tmp_path / "half.ckpt")
    seed_everything(0)
    rest = module(**options)
    trainer(16).fit(rest, data, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    for a, b in zip(whole.parameters(), rest.parameters(), strict=True):
        assert torch.equal(a, b)


def test_statistics_are_those_of_the_data():
    """Check 9 is the DataModule's; the module takes what it is given and no other."""
    data = FakeFlights()
    normaliser = Normaliser(L, P)
    normaliser.set_statistics(data.statistics)
    batch = next(iter(data.train_dataloader()))
    x = normaliser(batch)
    back = normaliser.metres(x.thickness)
    seen = batch.observed
    torch.testing.assert_close(back[seen], batch.thickness[seen], atol=1e-5, rtol=0)
    with pytest.raises(DataError, match="pos_std"):
        normaliser.set_statistics({k: v for k, v in data.statistics.items() if k != "pos_std"})
    assert (to_positive(normaliser.metres(torch.full((1, L), -1000.0))) > 0).all()
    torch.testing.assert_close(to_positive(torch.tensor([0.1, 3.0])), torch.tensor([0.1, 3.0]))


# --- the identity trap ---------------------------------------------------------------------------


def test_hiding_is_on_unless_copying_is_asked_for():
    with pytest.raises(ConfigError, match=r"hides nothing.*inputs\.thickness=observed"):
        module(hiding=StructuredHiding(layer=0, segment=0))
    assert module().inputs.hiding.hides


def test_copying_is_detected_where_a_prior_fills_gaps(trained):
    """The prior's error is below a mean's, whatever the network does."""
    model, data, run = trained
    ratio = run.validate(model, data, verbose=False)[0]["val/identity_ratio"]
    before, model.inputs = model.inputs, replace(model.inputs, trap_ratio=ratio / 2)
    try:
        run.validate(model, data, verbose=False)  # it hides: a high ratio alone is no fault
        model.inputs = replace(model.inputs, thickness="observed")
        with pytest.raises(ConfigError, match="copies what it sees"):
            run.validate(model, data, verbose=False)
    finally:
        model.inputs = before


def test_segments_of_the_test_must_not_have_been_seen(tmp_path):
    model, data, run = fitted(steps=2, limit_val_batches=0)
    run.test(model, data, verbose=False)
    run.save_checkpoint(tmp_path / "a.ckpt")
    weights = str(tmp_path / "a.ckpt")
    other = FakeFlights()
    other.parts = {**other.parts, "test": other.parts["train"]}
    with pytest.raises(DataError, match=r"segments of the test: 20120000_01.*allow_seen=true"):
        run.test(model, other, verbose=False)
    with pytest.raises(DataError, match="segments of the test"):
        fitted(other, steps=1, limit_val_batches=0, weights=weights)
    tuned, _, run = fitted(other, 1, limit_val_batches=0, weights=weights, allow_seen=True)
    run.test(tuned, other, verbose=False)
    # a checkpoint of the run itself is enough to test it
    run.save_checkpoint(tmp_path / "b.ckpt")
    (tmp_path / "a.ckpt").unlink()
    again = module(weights=weights, allow_seen=True)
    run.test(again, other, ckpt_path=str(tmp_path / "b.ckpt"), verbose=False, weights_only=True)
    assert torch.equal(*(next(m.networks.parameters()) for m in (again, tuned)))


def test_what_cannot_be_known_is_said():
    model, data, run = fitted(steps=2, limit_val_batches=0)
    with pytest.warns(
        UserWarning, match=r"uncertainty of what it fills is NaN.*init_args\.split\.val"
    ):
        model.on_predict_start()
    for item in data.parts["test"]:
        del item.truth
    with pytest.warns(UserWarning, match=r"data\.init_args\.evaluation\.drop=0\.3"):
        run.test(model, data, verbose=False)


def test_physics_alone_sees_no_thickness():
    model, data, _ = fitted(thickness="none", steps=3)
    batch = first_test_batch(data)
    with torch.no_grad():
        before = model(batch)
        batch.thickness = batch.thickness + 5
        assert torch.equal(model(batch), before)


# --- uncertainty ---------------------------------------------------------------------------------


def test_members_differ_and_their_spread_is_given():
    model, data, _ = fitted(members=3, steps=5)
    batch = first_test_batch(data)
    with torch.no_grad():
        x = model.normalise(batch)
        mean, spread = model.predict(x, x.spans)
        shared = model.shared(x, x.spans)
        outs = [model.forward_member(n, x, x.observed, shared) for n in model.networks]
        each = torch.stack([x.spans.constrain(model.metres(out, x)) for out in outs])
    torch.testing.assert_close(mean, each.mean(0))
    torch.testing.assert_close(spread, each.std(0))
    assert (spread > 0).all()
    assert torch.equal(mean_and_std(each[:1])[1], torch.zeros_like(mean))


def test_dropout_is_drawn_at_evaluation_and_the_same_each_time():
    network = partial(completion_net, width=16, heads=2, depth=1, dropout=0.2)
    model, data, _ = fitted(network=network, mc_samples=4, steps=5)
    model.eval()
    batch = first_test_batch(data)
    with torch.no_grad():
        x = model.normalise(batch)
        state = torch.random.get_rng_state()
        first, second = model.predict(x, x.spans), model.predict(x, x.spans)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert (first[1] > 0).any()
    assert not any(m.training for m in model.modules())
    plain, data, _ = fitted(steps=1)
    plain.prediction = replace(plain.prediction, mc_samples=2)
    with pytest.raises(ConfigError, match="no dropout"):
        plain.fill(first_test_batch(data))


@pytest.mark.parametrize("seed", range(3))
def test_calibrated_intervals_cover_what_they_promise(seed):
    """On errors whose size depends on depth, distance and spread, with mis-tracks among them."""
    g = torch.Generator().manual_seed(seed)
    n, layers = 600, 6
    observed = torch.rand(n, layers, generator=g) < 0.4
    observed[:, 4] = False
    found = measure_gaps(observed, 100.0 * torch.arange(n), Track.of([60] * 10))
    spread = 0.02 * torch.rand(n, layers, generator=g).double() + 0.005
    features = entry_features(found, spread, observed & False)
    true = 0.02 + 0.05 * features[..., 2] + 0.02 * features[..., 3] + spread
    error = true * torch.randn(n, layers, generator=g)
    wild = torch.rand(n, layers, generator=g) < 0.01
    train = torch.rand(n, layers, generator=g) < 0.5
    calibration = Calibration()
    assert calibration(features).isnan().all()
    calibration.fit((error + wild * 0.8)[train], features[train])
    std = calibration(features)
    assert float(coverage(error[~train], std[~train])) == pytest.approx(0.9, abs=0.04)
    ratio = (std / true).log().flatten()
    assert float(ratio.std()) < 0.25  # it knows where errors are large
    assert float(coverage(error, torch.full_like(std, 1e9))) == 1
    assert pytest.approx(1.644854, abs=1e-6) == Z90


def test_too_few_residuals_leave_it_uncalibrated():
    calibration = Calibration()
    calibration.fit(torch.randn(10), torch.rand(10, 5))
    assert not calibration.fitted


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"thickness": "all"}, "inputs.thickness` to one of hidden, none, observed"),
        ({"trap_ratio": 0.0}, "inputs.trap_ratio` to a float > 0 or null"),
        ({"outlier": 0.0}, "inputs.outlier` to a float > 0 or null"),
        ({"loss_kind": "l1"}, "loss.kind` to one of huber, smooth_l1, mse"),
        ({"delta": 0.0}, "loss.delta` to a float > 0"),
        ({"entries": "some"}, "loss.entries` to one of observed, hidden"),
        ({"prior": "spline"}, "prediction.prior` to one of none, ridge"),
        ({"members": 0}, "prediction.members` to an int > 0"),
        ({"mc_samples": -1}, "prediction.mc_samples` to an int >= 0"),
        ({"max_gap": -5.0}, "prediction.max_gap` to a float >= 0 or null"),
        ({"entries": "hidden", "thickness": "none"}, "loss.entries=observed"),
    ],
)
def test_wrong_options_are_refused(options, word):
    with pytest.raises(ConfigError, match=f"model.init_args.{word}"):
        module(**options)


class OwnNet(nn.Module):
    """A user's network, which may forget what is not visible, or a shape."""

    def __init__(self, layers, physics, is_masked=True, is_flat=True):
        super().__init__()
        self.linear = nn.Linear(physics + 1, 1)
        self.is_masked, self.is_flat = is_masked, is_flat

    def forward(self, thickness, visible, physics, pos, degrees, distance, track):
        visible_thickness = torch.where(visible, thickness, 0.0) if self.is_masked else thickness
        out = self.linear(torch.cat([visible_thickness[..., None], physics], -1))
        return out.squeeze(-1) if self.is_flat else out


def test_networks_of_users_are_held_to_shapes_and_finite_numbers():
    data = FakeFlights()
    trainer(2).fit(module(network=OwnNet), data)
    with pytest.raises(ConfigError, match=r"OwnNet gives \(\d+, 5, 1\) for \(\d+, 5\) traces"):
        trainer(2).fit(module(network=partial(OwnNet, is_flat=False)), data)
    blind = module(network=partial(OwnNet, is_masked=False))
    with pytest.raises(ConfigError, match=r"OwnNet gives .* not finite"):
        trainer(2).validate(blind, data, verbose=False)
    with pytest.raises(ConfigError, match=r"OwnNet gives .* not finite"):
        blind.fill(first_test_batch(data))


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_precisions_that_convert_statistics_are_refused(precision):
    with pytest.raises(ConfigError, match=f"precision={precision} converts the statistics"):
        trainer(2, precision=precision).fit(module(), FakeFlights())


def test_options_outside_their_groups_are_refused():
    with pytest.raises(ConfigError, match="The inputs is 'none'"):
        IceCompletion(SMALL_NET, inputs="none")
    with pytest.raises(ConfigError, match="CompletionInputs has no option 'prior'"):
        IceCompletion(SMALL_NET, inputs={"prior": "ridge"})


def test_records_go_through_checkpoints_as_plain_values(tmp_path):
    model, _, run = fitted(steps=1, prior="ridge", outlier=3.0, hiding=StructuredHiding(layer=0.3))
    run.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"]
    assert saved["inputs"]["hiding"]["layer"] == 0.3
    again = IceCompletion.load_from_checkpoint(
        tmp_path / "a.ckpt", network=SMALL_NET, weights_only=True
    )
    assert again.inputs == model.inputs
    assert again.inputs == CompletionInputs(3.0, hiding=StructuredHiding(layer=0.3))
    assert again.prediction == CompletionPrediction("ridge")


def test_other_data_are_refused(tmp_path):
    model, data, run = fitted(steps=1)
    batch = first_test_batch(data)
    del batch.distance
    with pytest.raises(DataError, match="lacks distance"):
        model.fill(batch)
    deeper = FakeFlights()
    deeper.layers = L + 1
    with pytest.raises(DataError, match=f"have {L + 1} layers"):
        trainer(1).fit(model, deeper)
    with pytest.raises(ConfigError, match="IceLayerDataModule"):
        trainer(1).fit(module(), LightningDataModule())
    run.save_checkpoint(tmp_path / "a.ckpt")
    wide = module(weights=str(tmp_path / "a.ckpt"), network=partial(completion_net, width=8))
    with pytest.raises(CheckpointError, match="does not fit"):
        trainer(1).fit(wide, data)
    with pytest.raises(CheckpointError, match="no network of ice layers"):
        module().on_load_checkpoint({})
