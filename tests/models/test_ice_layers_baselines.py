"""Baselines of completion: rules, ridge and kriging, alone and as a LightningModule."""

import io
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes.ice_layers import SMALL_WORLD, baseline, first_test_batch, open_flights
from fakes.trainers import quiet_trainer
from hypothesis import given, settings
from hypothesis import strategies as st

from fulgurite.datamodules.ice_layers import (
    LayerEvaluationOptions,
    SyntheticFlights,
    World,
)
from fulgurite.domains.ice_layers.spans import Spans
from fulgurite.errors import CheckpointError, ConfigError, DataError
from fulgurite.models.ice_layers.baselines import covariance
from fulgurite.models.ice_layers.baselines import kriging as kriging_module
from fulgurite.models.ice_layers.baselines.covariance import KrigingStack
from fulgurite.models.ice_layers.baselines.interpolation import (
    Ridge,
    along_then_across,
    along_track,
    fit_ridge,
    layer_means,
    own_layer_mean,
)
from fulgurite.models.ice_layers.baselines.kriging import Kriging
from fulgurite.models.ice_layers.baselines.kriging_fit import DRIFTS, choose_drift, fit_kriging
from fulgurite.models.ice_layers.baselines.options import KrigingFitOptions
from fulgurite.models.ice_layers.training import baseline_module
from fulgurite.models.ice_layers.training.baseline_module import BaselineCompletion
from fulgurite.models.ice_layers.training.options import BaselinePrediction

METHODS = ("mean", "layer_mean", "along", "linear", "ridge", "kriging")
NAN = math.nan


def column(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


def broken(seed, n=12, layers=3, missing=0.4):
    g = torch.Generator().manual_seed(seed)
    thickness = torch.rand(n, layers, generator=g, dtype=torch.float64) + 0.5
    observed = torch.rand(n, layers, generator=g) > missing
    distance = (100 * torch.rand(n, generator=g, dtype=torch.float64) + 1).cumsum(0)
    return torch.where(observed, thickness, NAN), observed, distance


# --- rules ----------------------------------------------------------------------------------------


def test_means_are_of_observed_entries():
    thickness, observed, _ = broken(0)
    observed[:, 2] = False
    means = layer_means(thickness, observed)
    for k in (0, 1):
        assert float(means[k]) == pytest.approx(float(thickness[observed[:, k], k].mean()))
    assert float(means[2]) == pytest.approx(float(thickness[observed].mean()))
    own = own_layer_mean(thickness, observed, torch.tensor([7.0, 8.0, 9.0]))
    torch.testing.assert_close(own[:, :2], means[:2].expand(12, 2))
    assert (own[:, 2] == 9).all()
    with pytest.raises(DataError, match="no observed thickness"):
        layer_means(thickness, torch.zeros_like(observed))


@pytest.mark.parametrize(
    ("gap", "filled"),
    # traces at 0, 20, 70, gap/2, gap-70, gap-20, gap: picks at both ends
    [(300.0, [1, 1, 1, 1, 1, 1, 1]), (301.0, [1, 1, 0, 0, 0, 1, 1])],
)
def test_a_gap_of_300_m_is_crossed_and_a_longer_one_is_not(gap, filled):
    at = torch.tensor([0, 20, 70, gap / 2, gap - 70, gap - 20, gap], dtype=torch.float64)
    thickness = column(1.0, NAN, NAN, NAN, NAN, NAN, 2.0)
    found = along_track(thickness, thickness.isfinite(), at)[:, 0]
    assert found.isfinite().int().tolist() == filled
    line = 1 + at / gap
    torch.testing.assert_close(found[found.isfinite()], line[found.isfinite()])


def test_beyond_the_last_pick_only_60_m_are_filled_and_one_pick_makes_no_line():
    at = torch.tensor([0.0, 100.0, 160.0, 161.0])
    thickness = column(1.0, 2.0, NAN, NAN)
    found = along_track(thickness, thickness.isfinite(), at)[:, 0]
    assert found[:3].tolist() == [1.0, 2.0, 2.0]
    assert found[3].isnan()
    alone = column(NAN, 2.0, NAN, NAN)
    assert along_track(alone, alone.isfinite(), at).isnan().all()


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), missing=st.floats(0.1, 0.95))
def test_lines_are_those_of_numpy(seed, missing):
    thickness, observed, distance = broken(seed, missing=missing)
    lines = along_track(thickness, observed, distance, math.inf, reach=math.inf, fewest=1)
    across = along_then_across(thickness, observed, distance, torch.full((3,), 9.0))
    at = distance.numpy()
    expected = np.full(thickness.shape, np.nan)
    for k in range(3):
        seen = observed[:, k].numpy()
        if seen.any():
            expected[:, k] = np.interp(at, at[seen], thickness[seen, k].numpy())
    np.testing.assert_allclose(lines.numpy(), expected, rtol=1e-12)
    known = np.flatnonzero(~np.isnan(expected[0]))
    for i in range(len(at)):
        row = np.interp(range(3), known, expected[i, known]) if len(known) else np.full(3, 9.0)
        np.testing.assert_allclose(across[i].numpy(), row, rtol=1e-12)


def test_traces_at_one_place_give_numbers():
    thickness = column(1.0, NAN, 3.0)
    found = along_track(thickness, thickness.isfinite(), torch.zeros(3))
    assert found.isfinite().all()


# --- ridge ----------------------------------------------------------------------------------------


def ridge_data(seed=0, n=300, layers=2, fields=3):
    g = torch.Generator().manual_seed(seed)
    physics = torch.rand(n, layers, fields, generator=g, dtype=torch.float64) * 5
    slope = torch.tensor([[0.3, -0.1, 0.2], [0.1, 0.2, 0.0]], dtype=torch.float64)
    thickness = 1 + (physics * slope).sum(-1)
    thickness += 0.05 * torch.randn(n, layers, generator=g, dtype=torch.float64)
    return thickness, torch.rand(n, layers, generator=g) < 0.7, physics


def test_ridge_is_that_of_scikit_learn():
    from sklearn.linear_model import Ridge as Reference

    thickness, observed, physics = ridge_data()
    fit = fit_ridge(thickness, observed, physics, penalty=0.1, robust=math.inf)
    for k in range(2):
        rows = observed[:, k]
        made = ((physics[:, k] - fit.mean) / fit.std).numpy()
        reference = Reference(alpha=0.1 * int(rows.sum()))
        reference.fit(made[rows.numpy()], thickness[rows, k].numpy())
        np.testing.assert_allclose(fit(physics)[:, k].numpy(), reference.predict(made), rtol=1e-6)


@pytest.mark.parametrize("log", [False, True])
def test_mistracks_hardly_move_ridge(log):
    thickness, observed, physics = ridge_data()
    clean = fit_ridge(thickness, observed, physics, log=log)
    wrong = thickness.clone()
    wrong[::12] *= 2
    robust = fit_ridge(wrong, observed, physics, log=log)
    plain = fit_ridge(wrong, observed, physics, log=log, robust=math.inf)
    moved = (robust(physics) - clean(physics)).abs().mean()
    assert moved < 0.2 * (plain(physics) - clean(physics)).abs().mean()


def test_ridge_ignores_what_stands_at_missing_entries_and_constant_fields():
    thickness, observed, physics = ridge_data()
    physics[..., 2] = 4.0
    clean = fit_ridge(thickness, observed, physics)
    for garbage in (NAN, math.inf, -7.0, 1e30):
        dirty = fit_ridge(torch.where(observed, thickness, garbage), observed, physics)
        assert torch.equal(clean.coefficients, dirty.coefficients)
    assert clean(physics).isfinite().all()
    observed[:, 1] = False  # no pick at all: as all layers together
    assert fit_ridge(thickness, observed, physics)(physics).isfinite().all()
    with pytest.raises(DataError, match="0 m or less"):
        fit_ridge(-thickness, observed, physics, log=True)


# --- kriging --------------------------------------------------------------------------------------


def flat(layers=1, fields=1, level=2.0):
    """A drift that is the same everywhere."""
    coefficients = torch.zeros(layers, 1 + fields, dtype=torch.float64)
    coefficients[:, 0] = level
    ones = torch.ones(fields, dtype=torch.float64)
    return Ridge(0 * ones, ones, coefficients, ones[:0], torch.tensor(False))


def parameters(fields=1, **values):
    names = list(covariance.START)
    found = dict.fromkeys(names, 1e-6) | {"tau": 1.0, "length_p": 1.0, "length_y": 1.0, "nu": 1.0}
    found |= values
    theta = torch.tensor([math.log(found[name]) for name in names], dtype=torch.float64)
    theta[-1] = math.log(found["nu"] / (2 - found["nu"]))
    return torch.cat([theta, torch.zeros(2 * (fields + 1), dtype=torch.float64)])


def make_kriging(layers=1, level=2.0, **values):
    return Kriging(flat(layers, level=level), parameters(**values), torch.ones(()).double())


def test_kriging_of_one_layer_is_scikit_learns_gaussian_process():
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern

    thickness, observed, distance = broken(3, n=25, layers=1)
    kriging = make_kriging(p=0.1, length_p=150.0, n=0.05)
    physics = torch.zeros(25, 1, 1)
    mean, std = kriging(KrigingStack(thickness, observed, physics, distance), outlier=math.inf)
    kernel = ConstantKernel(0.2**2) * Matern(150.0, nu=0.5)  # 0.1 of a drift of 2 m
    reference = GaussianProcessRegressor(kernel, alpha=0.05**2, optimizer=None)
    seen = observed[:, 0].numpy()
    at = distance.numpy()[:, None]
    reference.fit(at[seen], thickness[seen, 0].numpy() - 2.0)
    expected, spread = reference.predict(at, return_std=True)
    np.testing.assert_allclose(mean[:, 0], expected + 2.0, atol=1e-6)
    np.testing.assert_allclose(std[:, 0], spread, atol=1e-5)


def test_a_pick_informs_other_layers_through_what_persists_and_no_other_way():
    thickness = torch.full((9, 2), 2.0, dtype=torch.float64)
    thickness[4, 0] = 2.3
    observed = torch.zeros(9, 2, dtype=torch.bool)
    observed[4, 0] = True
    at, physics = 100.0 * torch.arange(9), torch.zeros(9, 2, 1)
    of_topography = make_kriging(2, p=0.1, length_p=200.0, n=0.01)
    of_one_year = make_kriging(2, y=0.1, length_y=200.0, n=0.01)
    for kriging, other in ((of_topography, True), (of_one_year, False)):
        mean, std = kriging(KrigingStack(thickness, observed, physics, at))
        rise = mean - 2.0
        assert float(rise[4, 0]) > 0.28
        assert (rise[:4, 0].diff() > 0).all()  # it fades with distance
        assert (float(rise[4, 1]) > 0.28) == other
        assert float(rise[4, 1].abs()) < 1e-6 or other
        assert float(std[4, 0]) < 0.1 * float(std[0, 0])


def test_boundary_noise_is_shared_with_opposite_sign():
    """Two adjoining layers, one too thick and one too thin: a boundary was picked too deep."""
    thickness = torch.tensor([[2.1, 1.9]], dtype=torch.float64)
    both = torch.ones(1, 2, dtype=torch.bool)
    at, physics = torch.zeros(1), torch.zeros(1, 2, 1)
    shared, _ = make_kriging(2, b=0.02, e=0.05)(KrigingStack(thickness, both, physics, at))
    # each layer's noise has the same variance, but for itself
    alone, _ = make_kriging(2, b=0.02, n=0.05 * 2**0.5)(KrigingStack(thickness, both, physics, at))
    assert float(shared[0, 0] - 2) < 0.9 * float(alone[0, 0] - 2)


def test_without_picks_kriging_is_its_drift_and_with_exact_ones_it_meets_them():
    thickness, observed, distance = broken(5, layers=2)
    physics = torch.zeros(12, 2, 1)
    kriging = make_kriging(2, a=0.1, p=0.1, length_p=100.0, y=0.1, length_y=100.0, n=1e-4)
    none = torch.zeros_like(observed)
    mean, std = kriging(KrigingStack(thickness, none, physics, distance))
    assert (mean == 2.0).all()
    torch.testing.assert_close(std, torch.full_like(std, 2 * 0.1 * 3**0.5))
    mean, _ = kriging(KrigingStack(thickness, observed, physics, distance), outlier=math.inf)
    torch.testing.assert_close(mean[observed], thickness[observed], atol=1e-3, rtol=0)


def test_a_mistracked_pick_is_left_out():
    n = 20
    at, physics = 100.0 * torch.arange(n), torch.zeros(n, 1, 1)
    thickness = 2 + 0.1 * torch.sin(at.double() / 800)[:, None]
    observed = torch.ones(n, 1, dtype=torch.bool)
    kriging = make_kriging(p=0.05, length_p=800.0, nu=1.9, n=0.01)
    clean, _ = kriging(KrigingStack(thickness, observed, physics, at))
    wrong = thickness.clone()
    wrong[10] *= 2
    kept, _ = kriging(KrigingStack(wrong, observed, physics, at), outlier=math.inf)
    left_out, _ = kriging(KrigingStack(wrong, observed, physics, at))
    assert float((left_out - clean).abs().max()) < 0.01
    assert float((kept - clean).abs().max()) > 0.1


@pytest.mark.parametrize("garbage", [NAN, math.inf, 1e30, -7.0])
def test_kriging_ignores_what_stands_at_missing_entries(garbage):
    thickness, observed, distance = broken(6)
    physics = torch.zeros(12, 3, 1)
    kriging = make_kriging(3, p=0.1, length_p=100.0, n=0.05, b=0.1)
    clean = kriging(KrigingStack(thickness, observed, physics, distance))
    dirty = kriging(
        KrigingStack(torch.where(observed, thickness, garbage), observed, physics, distance)
    )
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)


def test_only_what_is_asked_for_is_predicted(monkeypatch):
    thickness, observed, distance = broken(7)
    physics = torch.zeros(12, 3, 1)
    kriging = make_kriging(3, p=0.1, length_p=100.0, n=0.05, b=0.1)
    whole = kriging(KrigingStack(thickness, observed, physics, distance))
    monkeypatch.setattr(kriging_module, "CROSS_COVARIANCE_SIZE", 20)  # in several chunks
    part = kriging(KrigingStack(thickness, observed, physics, distance), mask=~observed)
    for a, b in zip(whole, part, strict=True):
        torch.testing.assert_close(a[~observed], b[~observed])
        assert b[observed].isnan().all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_covariance_is_positive_whatever_its_parameters(seed):
    g = torch.Generator().manual_seed(seed)
    thickness, observed, distance = broken(seed, n=8)
    theta = covariance.initial_parameters(1)
    theta = theta + 2 * torch.randn(theta.shape, generator=g, dtype=torch.float64)
    physics = torch.randn(8, 3, 1, generator=g)
    stack = KrigingStack(thickness, observed, physics, distance)
    known = covariance.measure_geometry(flat(3), stack)
    tables = covariance.make_tables(theta, known)
    matrix = covariance.span_covariance(theta, tables, covariance.ObservedSpans.of(stack.measured))
    assert torch.equal(matrix, matrix.T)
    values = torch.linalg.eigvalsh(matrix)
    assert float(values.min()) > -1e-9 * float(values.max().clamp_min(1e-300))


def draw_stacks(count, seed=0, n=24, layers=6):
    """Stacks from kriging's own model, with known parameters and gaps."""
    g = torch.Generator().manual_seed(seed)
    at = 100.0 * torch.arange(n, dtype=torch.float64)
    theta = parameters(b=0.05, p=0.1, length_p=500.0, y=0.05, length_y=500.0, n=0.01, e=0.02)
    found, truths = [], []
    for _ in range(count):
        physics = torch.rand(n, layers, 1, generator=g, dtype=torch.float64)
        full = torch.ones(n, layers, dtype=torch.bool)
        stack = KrigingStack(torch.zeros(n, layers), full, physics, at)
        tables = covariance.make_tables(theta, covariance.measure_geometry(flat(layers), stack))
        place = full.nonzero(as_tuple=True)
        signal = covariance.signal_covariance(tables, place, place)
        noisy = covariance.span_covariance(
            theta, tables, covariance.ObservedSpans.of(stack.measured)
        )
        eye = 1e-9 * torch.eye(n * layers, dtype=torch.float64)
        draw = torch.randn(2, n * layers, generator=g, dtype=torch.float64)
        truth = torch.linalg.cholesky(signal + eye) @ draw[0]
        picks = truth + torch.linalg.cholesky(noisy - signal + eye) @ draw[1]
        trend = (1 + 0.5 * physics[..., 0]) * 2  # in the logarithm's ridge nearly linear
        observed = torch.rand(n, layers, generator=g) < 0.85
        first = int(torch.randint(n - 8, (), generator=g))
        observed[first : first + 8, layers // 2] = False
        observed[:, -1] &= bool(torch.rand((), generator=g) < 0.5)
        thickness = trend + picks.view(n, layers)
        found.append(KrigingStack(torch.where(observed, thickness, NAN), observed, physics, at))
        truths.append(trend + truth.view(n, layers))
    return found, truths


def test_the_drift_is_chosen_or_given():
    stacks, _ = draw_stacks(6)
    module = baseline("ridge", drift="log")
    module.fit(stacks)
    assert module.ridge is not None
    assert module.ridge.log
    quick = KrigingFitOptions(2, 20, 1)
    drifts = {
        kind: fit_kriging(stacks, drift=kind, fit=quick).drift for kind in ("linear", "log", "auto")
    }
    assert [bool(drift.log) for drift in (drifts["linear"], drifts["log"])] == [False, True]
    chosen = drifts[("linear", "log")[int(drifts["auto"].log)]]
    assert torch.equal(chosen.coefficients, drifts["auto"].coefficients)


def test_the_likelihood_finds_noise_and_intervals_that_hold():
    stacks, truths = draw_stacks(24)
    options = KrigingFitOptions(12, 140, 25)
    kriging = fit_kriging(stacks[:16], fit=options)
    assert kriging.noise == pytest.approx((0.01**2 + 2 * 0.02**2) ** 0.5, rel=0.2)
    inside, count, square = 0, 0, 0.0
    for stack, truth in zip(stacks[16:], truths[16:], strict=True):
        mean, std = kriging(stack)
        error = (mean - truth)[~stack.observed]
        inside += int((error.abs() < 1.6449 * std[~stack.observed]).sum())
        square += float(error.square().sum())
        count += len(error)
    assert 0.82 < inside / count < 0.97
    assert (square / count) ** 0.5 < 0.15  # deviations are 0.24 m


def test_a_fit_of_the_likelihood_repeats_itself():
    stacks, _ = draw_stacks(6)
    one, two = (fit_kriging(stacks, fit=KrigingFitOptions(6, 60, 5)) for _ in range(2))
    assert torch.equal(one.parameters, two.parameters)


@pytest.mark.parametrize("log", [False, True])
def test_validation_flights_choose_the_drift_that_goes_beyond_training(log):
    """Where training flights say little, other flights say which form holds elsewhere."""

    def stacks(low, high, seed):
        g = torch.Generator().manual_seed(seed)
        for _ in range(8):
            x = low + (high - low) * torch.rand(20, 2, 1, generator=g, dtype=torch.float64)
            thickness = torch.exp(0.8 * x[..., 0]) if log else 1 + 1.2 * x[..., 0]
            thickness = thickness + 0.05 * torch.randn(20, 2, generator=g, dtype=torch.float64)
            seen = torch.ones(20, 2, dtype=torch.bool)
            yield KrigingStack(thickness, seen, x, 100.0 * torch.arange(20).double())

    quick = KrigingFitOptions(2, 20, 2)
    kriging = fit_kriging(
        [*stacks(0.0, 0.4, 0)], [*range(8)], validation=[*stacks(1.5, 2.0, 1)], fit=quick
    )
    assert bool(kriging.drift.log) == log


def test_a_drift_is_judged_on_segments_that_it_has_not_seen():
    """Each segment has a physics of its own, which a flexible drift learns by heart."""
    g = torch.Generator().manual_seed(0)
    stacks, groups = [], []
    for group in range(10):
        own = torch.randn(4, generator=g, dtype=torch.float64)  # of the segment, means nothing
        for _ in range(3):
            accumulation = 1 + torch.rand(12, 2, 1, generator=g, dtype=torch.float64)
            physics = torch.cat([accumulation, own.expand(12, 2, 4)], -1)
            thickness = accumulation[..., 0] + 0.3 * float(own.sum().sin())
            seen = torch.ones(12, 2, dtype=torch.bool)
            at = 100.0 * torch.arange(12, dtype=torch.float64)
            stacks.append(KrigingStack(thickness, seen, physics, at))
            groups.append(group)
    drift, others = choose_drift(stacks, groups, DRIFTS, ())
    assert all(others[k] is others[k - k % 3] for k in range(30))  # one for all of a segment

    def error(drifts):
        pairs = zip(drifts, stacks, strict=True)
        return sum(float((d(s.physics) - s.thickness).abs().mean()) for d, s in pairs) / 30

    assert error(others) > 1.3 * error([drift] * 30)  # what kriging takes for deviations
    alone, same = choose_drift(stacks[:3], [0, 0, 0], DRIFTS, ())
    assert all(x is alone for x in same)


@pytest.mark.parametrize("layers", [1, 3])
def test_kriging_works_without_physics_and_with_one_layer(layers):
    stacks = []
    for seed in range(6):
        thickness, observed, distance = broken(seed, n=20, layers=layers)
        stacks.append(KrigingStack(thickness, observed, torch.zeros(20, layers, 0), distance))
    kriging = fit_kriging(stacks, fit=KrigingFitOptions(4, iterations=5))
    mean, std = kriging(stacks[0])
    assert mean.isfinite().all()
    assert (std > 0).all()
    # without physics the drift is a number for each layer
    torch.testing.assert_close(
        kriging.drift(stacks[0].physics)[0], kriging.drift(stacks[1].physics)[3]
    )


def test_kriging_goes_through_a_checkpoint():
    kriging = make_kriging(2, p=0.1, length_p=100.0, n=0.05)
    file = io.BytesIO()
    torch.save(kriging.state(), file)
    file.seek(0)
    again = Kriging.from_state(torch.load(file, weights_only=True))
    thickness, observed, distance = broken(8, layers=2)
    stack = KrigingStack(thickness, observed, torch.zeros(12, 2, 1), distance)
    for a, b in zip(kriging(stack), again(stack), strict=True):
        assert torch.equal(a, b)
    state = kriging.state()
    del state["drift.mean"]
    with pytest.raises(CheckpointError, match=r"lacks 'drift\.mean'"):
        Kriging.from_state(state)
    with pytest.raises(DataError, match="no training stack"):
        fit_kriging([])


# --- the LightningModule --------------------------------------------------------------------------


def make_trainer(folder, **options):
    # clipping as networks need it must not disturb
    options = {"num_sanity_val_steps": 2, **options}
    return quiet_trainer(max_epochs=1, gradient_clip_val=1.0, default_root_dir=folder, **options)


@pytest.fixture(scope="module")
def flights(filled_cache):
    """A small DataModule, read and split once."""
    return open_flights(SyntheticFlights(World(**SMALL_WORLD)))


QUICK = {"fit_stacks": 8, "fit_entries": 120, "iterations": 12}


@pytest.fixture(scope="module")
def fitted(flights, tmp_path_factory):
    """Each method fitted and tested; gives module, metrics and checkpoint."""
    found = {}
    for method in METHODS:
        folder = tmp_path_factory.mktemp(method)
        module, trainer = baseline(method, **QUICK), make_trainer(folder)
        trainer.fit(module, flights)
        held = {k: float(v) for k, v in trainer.callback_metrics.items()}
        trainer.save_checkpoint(folder / "last.ckpt")
        (tested,) = trainer.test(module, flights, verbose=False)
        found[method] = (module, held | tested, folder / "last.ckpt")
    return found


@pytest.mark.parametrize("limit", [1.0, 0])
def test_validation_flights_choose_though_no_epoch_is_validated(
    flights, fitted, tmp_path, monkeypatch, limit
):
    options = {"num_sanity_val_steps": 0, "check_val_every_n_epoch": 10}
    trainer = make_trainer(tmp_path, limit_val_batches=limit, **options)
    module, messages = baseline("kriging", **QUICK), []
    monkeypatch.setattr(baseline_module, "rank_zero_info", messages.append)
    trainer.fit(module, flights)
    (message,) = messages
    counts = {part: len(flights.stacks_of(part)) for part in ("train", "val")}
    if limit:
        assert module.trained_segments == fitted["kriging"][0].trained_segments
        expected, state = fitted["kriging"][0].kriging.state(), module.kriging.state()
        assert all(torch.equal(state[name], value) for name, value in expected.items())
        assert f"chosen on {counts['val']} validation stacks" in message
    else:
        assert set(module.trained_segments) == {s.segment for s in flights.stacks_of("train")}
        assert f"chosen on {counts['train']} training stacks" in message


def test_the_order_of_the_methods_is_that_of_the_card(fitted):
    error = {method: metrics["test/sound_rmse"] for method, (_, metrics, _) in fitted.items()}
    assert error["kriging"] < 0.8 * error["ridge"]  # which has the sums, too
    assert error["ridge"] < 0.9 * error["layer_mean"]
    assert error["layer_mean"] < error["mean"]
    assert fitted["kriging"][1]["val/heldout_rmse"] < fitted["ridge"][1]["val/heldout_rmse"]
    # within gaps lines help; where a layer is absent a mean is all that they have
    gaps = {method: metrics["test/gap_mae"] for method, (_, metrics, _) in fitted.items()}
    assert gaps["linear"] < gaps["layer_mean"] < gaps["mean"]
    # (measured sums, in which other layers take part, make a small difference)
    assert fitted["layer_mean"][1]["test/absent_rmse"] == pytest.approx(
        fitted["mean"][1]["test/absent_rmse"], rel=0.05
    )


def test_kriging_says_how_sure_it_is_and_the_others_do_not(fitted):
    for method, (_, metrics, _) in fitted.items():
        assert ("test/missing_coverage90" in metrics) == (method == "kriging")
    assert 0.8 < fitted["kriging"][1]["test/missing_coverage90"] < 0.999


def test_lines_pass_through_what_is_visible(fitted):
    for method in ("along", "linear"):
        assert fitted[method][1]["test/visible_mae"] < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_predicts_the_same(fitted, flights, method):
    module, _, path = fitted[method]
    batch = first_test_batch(flights)
    again = BaselineCompletion.load_from_checkpoint(path, weights_only=True)
    assert again.trained_segments == module.trained_segments
    seen = {s.segment for s in flights.stacks_of("train")}
    if method == "kriging":  # whose drift validation has chosen
        seen |= {s.segment for s in flights.stacks_of("val")}
    assert set(again.trained_segments) == seen
    spans = Spans.of_batch(batch)
    for a, b in zip(module.predict(batch, spans), again.predict(batch, spans), strict=True):
        assert torch.equal(a.nan_to_num(nan=-1), b.nan_to_num(nan=-1))


@pytest.mark.parametrize("method", METHODS)
def test_what_is_observed_stays_bit_for_bit(fitted, flights, method):
    module = fitted[method][0]
    batch = first_test_batch(flights)
    found = module.predict_step(batch, 0)
    seen = batch.observed
    assert torch.equal(found["thickness"][seen], batch.thickness[seen])
    assert found["thickness"].isfinite().all()
    assert torch.equal(found["provenance"] == 0, seen)
    assert found["std"][seen].isnan().all()
    assert found["std"][~seen].isfinite().all() == (method == "kriging")
    assert torch.equal(found["stack"].unique_consecutive(), batch.stack)


@pytest.mark.parametrize("method", METHODS)
def test_picked_boundaries_come_out_where_they_were_picked(fitted, flights, method):
    module, metrics, _ = fitted[method]
    batch = first_test_batch(flights)
    spans = Spans.of_batch(batch)
    thickness = module.predict_step(batch, 0)["thickness"]
    known = spans.known
    assert int(spans.between.sum()) > 100
    torch.testing.assert_close(
        spans.lengths(thickness)[known], spans.path[known], rtol=1e-9, atol=0
    )
    assert (thickness > 0).all()
    assert metrics["test/moved_rmse"] < 1e-9
    free = BaselineCompletion.load_from_checkpoint(
        fitted[method][2],
        weights_only=True,
        prediction=BaselinePrediction(keep_boundaries="none"),
    )
    (tested,) = make_trainer(None).test(free, flights, verbose=False)
    assert tested["test/moved_rmse"] > 0.02
    assert tested["test/between_rmse"] > metrics["test/between_rmse"]
    if method != "kriging":  # which also learns from sums
        assert tested["test/open_rmse"] == pytest.approx(metrics["test/open_rmse"], rel=1e-9)


def test_a_sum_is_divided_as_a_gaussian_process_divides_it():
    """Against the formula for an exact linear observation, written out for one trace."""
    physics, at = torch.zeros(1, 3, 1), torch.zeros(1)
    kriging = make_kriging(3, a=0.1, c=0.1, tau=2.0, b=0.05, n=1e-6, e=1e-7)
    index = torch.tensor([[1.2, 1.3, 1.4]], dtype=torch.float64)
    spans = Spans(
        torch.tensor([[0, 0, 2]]), torch.tensor([[6.1, 6.1, NAN]], dtype=torch.float64), index
    )
    stack = KrigingStack.of_spans(torch.full((1, 3), NAN).double(), spans, physics, at)
    mean, std = kriging(stack)
    tables = covariance.make_tables(
        kriging.parameters, covariance.measure_geometry(kriging.drift, stack)
    )
    every = (torch.zeros(3, dtype=torch.long), torch.arange(3))
    signal = covariance.signal_covariance(tables, every, every)
    a = torch.tensor([1.2, 1.3, 0.0], dtype=torch.float64)
    gain = signal @ a / (a @ signal @ a)
    expected = 2.0 + gain * (6.1 - a @ torch.full((3,), 2.0, dtype=torch.float64))
    left = (signal - torch.outer(gain, a @ signal)).diagonal()
    torch.testing.assert_close(mean[0], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(std[0] ** 2, left, atol=1e-5, rtol=0)
    assert float(spans.lengths(mean)[0, 0]) == pytest.approx(6.1, rel=1e-12)


def test_sums_inform_other_traces():
    """Two layers whose boundary is missing everywhere: how thick both are together is known."""
    n = 12
    at, physics = 100.0 * torch.arange(n).double(), torch.zeros(n, 2, 1)
    depth = torch.stack([0 * at, torch.full_like(at, NAN), 4 + 0.4 * torch.sin(at / 300)], 1)
    depth[6, 2] = NAN
    spans = Spans(
        torch.tensor([[0, 0]] * n), depth[:, 2:].expand(-1, 2).clone(), torch.ones(n, 2).double()
    )
    spans.start[6, 1] = 1
    stack = KrigingStack.of_spans(torch.full((n, 2), NAN).double(), spans, physics, at)
    mean, _ = make_kriging(2, p=0.1, length_p=800.0, nu=1.9, n=0.001)(stack)
    expected = 4 + 0.4 * math.sin(2.0)
    assert float(mean[6].sum()) == pytest.approx(expected, abs=0.02)


def test_stacks_of_a_batch_do_not_see_each_other(fitted, flights):
    module = fitted["kriging"][0]
    one, two = first_test_batch(flights), SimpleNamespace()
    size = int(one.ptr[1])
    arrays = (
        "thickness",
        "observed",
        "physics",
        "distance",
        "span_start",
        "span_path",
        "refraction",
    )
    for name in arrays:
        setattr(two, name, getattr(one, name)[:size])
    two.ptr, two.stack, two.segment = one.ptr[:2], one.stack[:1], one.segment[:1]
    whole, _ = module.predict(one, Spans.of_batch(one))
    alone, _ = module.predict(two, Spans.of_batch(two))
    assert torch.equal(whole[:size], alone)


def test_long_gaps_are_left_missing_on_request(fitted, flights):
    module, batch = fitted["mean"][0], first_test_batch(flights)
    module.prediction = replace(module.prediction, max_gap=500.0)
    try:
        found = module.predict_step(batch, 0)
    finally:
        module.prediction = replace(module.prediction, max_gap=None)
    left = found["provenance"] == 3
    assert 0 < int(left.sum()) < int((~batch.observed).sum())
    assert torch.equal(found["thickness"].isnan(), left)
    assert not (left & batch.observed).any()


def test_more_missing_picks_never_help_and_the_table_says_how_much(fitted, flights):
    """Check 18 of the paper's page, for kriging."""
    module = BaselineCompletion.load_from_checkpoint(
        fitted["kriging"][2],
        weights_only=True,
        prediction=BaselinePrediction(keep_boundaries="none"),
    )
    errors = []
    for drop in (0.0, 0.3, 0.7):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flights, "evaluation", LayerEvaluationOptions(drop=drop))
            (found,) = make_trainer(None).test(module, flights, verbose=False)
        errors.append(found["test/missing_rmse"])
        assert found.get("test/extra_rmse", 0.0) > 0 or not drop
    assert errors[1] > 0.98 * errors[0]
    assert errors[2] > 0.98 * errors[1]
    assert errors[2] < 0.5 * fitted["mean"][1]["test/missing_rmse"]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"method": "spline"}, "method` to one of mean, layer_mean"),
        ({"drift": "cubic"}, "regression.kind` to one of auto, linear, log"),
        ({"max_length": -1.0}, "lines.max_length` to a float >= 0 or null"),
        ({"reach": NAN}, "lines.reach` to a float >= 0"),
        ({"penalty": -1e-3}, "regression.penalty` to a float >= 0"),
        ({"max_gap": -5.0}, "prediction.max_gap` to a float >= 0 or null"),
        ({"fit_stacks": 0}, "fit.stacks` to an int > 0"),
        ({"iterations": 0}, "fit.iterations` to an int > 0"),
        ({"keep_boundaries": "trusted", "method": "ridge"}, "prediction.keep_boundaries=trusted"),
    ],
)
def test_values_out_of_range_are_named(options, what):
    with pytest.raises(ConfigError, match=f"model.init_args.{what}"):
        baseline(**options)


def test_misuse_has_one_clear_error(fitted, flights):
    batch = first_test_batch(flights)
    with pytest.raises(CheckpointError, match="not fitted"):
        BaselineCompletion("ridge").predict(batch, Spans.of_batch(batch))
    with pytest.raises(CheckpointError, match="method ridge, not linear"):
        BaselineCompletion("linear").on_load_checkpoint({"ice_baseline": {"method": "ridge"}})
    module = BaselineCompletion("mean")
    module.means = torch.ones(3)
    with pytest.raises(DataError, match="8 layers, the training stacks had 3"):
        module.predict(batch, Spans.of_batch(batch))
    with pytest.raises(DataError, match="no training stack"):
        module.fit([])
    lacking = SimpleNamespace(thickness=batch.thickness, observed=batch.observed)
    with pytest.raises(DataError, match="lacks physics, distance, segment, stack, ptr"):
        module.predict(lacking, Spans.of_batch(batch))


def test_a_stack_without_a_pick_is_completed_by_all(fitted):
    stack = KrigingStack(
        torch.full((5, 8), NAN, dtype=torch.float64), torch.zeros(5, 8, dtype=torch.bool),
        torch.ones(5, 8, 5), 100.0 * torch.arange(5, dtype=torch.float64),
    )  # fmt: skip
    for method, (module, _, _) in fitted.items():
        assert module.predict_stack(stack)[0].isfinite().all(), method


@pytest.mark.slow
def test_two_ranks_fit_and_score_as_one(start, fulgurite):
    common = [
        "--config", "ice_layers/smoke.yaml",
        "--model=fulgurite.models.ice_layers.BaselineCompletion",
        "--model.init_args.fit.stacks=6", "--model.init_args.fit.iterations=5",
        "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false",
    ]  # fmt: skip
    import json
    from pathlib import Path

    status, _, error = fulgurite("fit", *common, "--run.dir=one")
    assert status == 0, error
    process = start(
        "fit", *common, "--run.dir=two", "--trainer.strategy=ddp", "--trainer.devices=2",
        "--trainer.accelerator=cpu",
    )  # fmt: skip
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    one, two = (json.loads(Path(run, "summary.json").read_text()) for run in ("one", "two"))
    for key in one:
        if key.startswith("val/"):
            assert two[key] == pytest.approx(one[key], rel=1e-6), key
