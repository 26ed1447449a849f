"""Errors of completed stacks: which entry counts where, over batches and ranks of any size."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fulgurite.errors import ConfigError, DataError
from fulgurite.models.ice_layers.training.metrics import (
    LEVELS,
    CompletionMetrics,
    MaskedMAE,
    MaskedRMSE,
    Targets,
    absent_layers,
    interval_coverage,
    normal_quantile,
)

L = 4


def make(seed, stacks=3, traces=5):
    g = torch.Generator().manual_seed(seed)
    n = stacks * traces
    truth = torch.rand(n, L, generator=g, dtype=torch.float64) + 0.5
    observed = torch.rand(n, L, generator=g) < 0.5
    observed[:traces, 1] = False  # a wholly absent layer of the first stack
    predicted = truth + 0.1 * torch.randn(n, L, generator=g, dtype=torch.float64)
    std = 0.02 + 0.2 * torch.rand(n, L, generator=g, dtype=torch.float64)
    return predicted, truth, observed, torch.arange(n) // traces, std


def rmse(error):
    return float(error.square().mean().sqrt())


def test_each_group_is_what_its_name_says():
    predicted, truth, observed, stack, std = make(0)
    metrics = CompletionMetrics(L)
    metrics.update(predicted, Targets(truth, observed, stack), std=std)
    found = metrics.compute()
    error, absent = predicted - truth, absent_layers(observed, stack)
    assert absent[:5, 1].all()
    for name, mask in (
        ("missing", ~observed),
        ("gap", ~observed & ~absent),
        ("absent", absent),
        ("visible", observed),
    ):
        assert found[f"{name}_rmse"] == pytest.approx(rmse(error[mask]), rel=1e-12)
        assert found[f"{name}_mae"] == pytest.approx(float(error[mask].abs().mean()), rel=1e-12)
        assert found[f"{name}_bias"] == pytest.approx(float(error[mask].mean()), rel=1e-9)
        inside = error[mask].abs() <= 1.6448536 * std[mask]
        assert found[f"{name}_coverage90"] == pytest.approx(float(inside.double().mean()))
    for k in range(L):
        column = error[:, k][~observed[:, k]]
        assert found[f"layer{k + 1:02d}_rmse"] == pytest.approx(rmse(column), rel=1e-12)
    assert found["top_rmse"] == found["layer01_rmse"]
    assert found["deep_rmse"] == found["layer04_rmse"]
    assert not any(name.startswith(("extra", "heldout")) for name in found)
    assert set(metrics.calibration()) == set(LEVELS)


def test_dropped_picks_leave_the_originally_missing_entries_as_they_are():
    predicted, truth, observed, stack, _ = make(1)
    metrics, with_dropped = CompletionMetrics(L), CompletionMetrics(L)
    metrics.update(predicted, Targets(truth, observed, stack))
    dropped = observed & (torch.arange(len(observed)) % 2 == 0)[:, None]
    dropped[:, 2] = observed[:, 2]  # all picks of a layer: it was not absent before
    with_dropped.update(predicted, Targets(truth, observed & ~dropped, stack, dropped))
    before, after = metrics.compute(), with_dropped.compute()
    for name in ("missing_rmse", "gap_rmse", "absent_rmse", "layer03_rmse"):
        assert after[name] == pytest.approx(before[name], rel=1e-12)
    error = (predicted - truth)[dropped]
    assert after["extra_rmse"] == pytest.approx(rmse(error), rel=1e-12)


def test_held_out_and_dropped_picks_of_real_data_are_scored_against_the_picks():
    predicted, _, observed, stack, std = make(2)
    picks = torch.where(observed, predicted + 0.25, torch.nan)
    held = observed & (torch.arange(len(observed)) % 3 == 0)[:, None]
    dropped = observed & ~held & (torch.arange(len(observed)) % 3 == 1)[:, None]
    unknown = torch.full_like(predicted, torch.nan)
    metrics = CompletionMetrics(L)
    targets = Targets(unknown, observed & ~held & ~dropped, stack, dropped, held, picks)
    metrics.update(predicted, targets, std=std)
    found = metrics.compute()
    for name in ("heldout", "extra", "visible"):
        assert found[f"{name}_rmse"] == pytest.approx(0.25)
        assert found[f"{name}_bias"] == pytest.approx(-0.25)
    assert found["identity_ratio"] == pytest.approx(1.0)
    assert not any(name.startswith(("missing", "gap", "absent", "layer")) for name in found)


def test_a_picks_own_noise_widens_only_intervals_of_picks():
    predicted, truth, observed, stack, std = make(3)
    narrow, wide = CompletionMetrics(L), CompletionMetrics(L)
    narrow.update(predicted, Targets(truth, observed, stack), std=std)
    wide.update(predicted, Targets(truth, observed, stack), std=std, noise=0.5)
    a, b = narrow.compute(), wide.compute()
    assert a["missing_width90"] == b["missing_width90"]
    assert b["visible_width90"] > a["visible_width90"] + 0.5
    assert b["visible_coverage90"] == 1.0


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 14), max_size=4), seed=st.integers(0, 99))
def test_batches_of_any_size_add_up(cuts, seed):
    predicted, truth, observed, _, std = make(seed)
    stack = torch.arange(len(truth))  # a stack of each trace: batches cut none
    whole = CompletionMetrics(L)
    whole.update(predicted, Targets(truth, observed, stack), std=std)
    parts = CompletionMetrics(L)
    bounds = [0, *sorted(set(cuts)), len(truth)]
    for low, high in pairwise(bounds):
        rows = slice(low, high)
        targets = Targets(truth[rows], observed[rows], stack[rows] - low)
        parts.update(predicted[rows], targets, std=std[rows])
    together = whole.compute()
    assert parts.compute() == pytest.approx(together, rel=1e-9)


def test_ranks_add_up_by_sum_and_count():
    """One rank has few entries with large errors: a mean of the ranks' means would be wrong."""
    predicted, truth, observed, stack, std = make(4)
    predicted[:5] += 3
    observed[:5, 1:] = True
    whole, one, other = CompletionMetrics(L), CompletionMetrics(L), CompletionMetrics(L)
    whole.update(predicted, Targets(truth, observed, stack), std=std)
    one.update(predicted[:5], Targets(truth[:5], observed[:5], stack[:5]), std=std[:5])
    other.update(predicted[5:], Targets(truth[5:], observed[5:], stack[5:] - 1), std=std[5:])
    error, missing = predicted - truth, ~observed
    mean = (rmse(error[:5][missing[:5]]) + rmse(error[5:][missing[5:]])) / 2
    one.merge_state(other)
    assert one.compute() == pytest.approx(whole.compute(), rel=1e-9)
    assert abs(mean - whole.compute()["missing_rmse"]) > 0.1


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30, -7.0])
def test_what_stands_at_missing_entries_does_not_count(garbage):
    predicted, truth, observed, stack, _ = make(5)
    clean, dirty = CompletionMetrics(L), CompletionMetrics(L)
    held = observed & (torch.rand(observed.shape) < 0.5)
    picks = torch.where(observed, truth, torch.nan)
    unknown = torch.full_like(truth, torch.nan)
    seen = observed & ~held
    clean.update(predicted, Targets(unknown, seen, stack, held_out=held, measured=picks))
    picks = torch.where(observed, truth, garbage)
    dirty.update(predicted, Targets(unknown, seen, stack, held_out=held, measured=picks))
    assert clean.compute() == dirty.compute()


def test_entries_left_missing_do_not_count():
    predicted, truth, observed, stack, std = make(6)
    left = ~observed & (torch.arange(len(truth)) < 8)[:, None]
    metrics = CompletionMetrics(L)
    metrics.update(
        torch.where(left, torch.nan, predicted),
        Targets(truth, observed, stack),
        std=torch.where(left, torch.nan, std),
    )
    error = (predicted - truth)[~observed & ~left]
    assert metrics.compute()["missing_rmse"] == pytest.approx(rmse(error), rel=1e-12)


def test_calibrated_intervals_are_told_from_narrow_ones():
    g = torch.Generator().manual_seed(0)
    std = 0.1 + torch.rand(4000, L, generator=g, dtype=torch.float64)
    truth = torch.randn(4000, L, generator=g, dtype=torch.float64) * std
    found = {}
    for factor in (1.0, 0.5):
        metrics = CompletionMetrics(L)
        none = torch.zeros(4000, L, dtype=torch.bool)
        zero = torch.zeros(4000, dtype=torch.long)
        metrics.update(truth * 0, Targets(truth, none, zero), std=factor * std)
        found[factor] = metrics.compute()
    assert found[1.0]["missing_coverage90"] == pytest.approx(0.9, abs=0.01)
    assert found[1.0]["missing_calibration"] < 0.01
    assert found[0.5]["missing_coverage90"] == pytest.approx(0.589, abs=0.02)
    assert found[0.5]["missing_calibration"] > 0.15


def test_nothing_counted_is_no_metric():
    metrics = CompletionMetrics(L)
    predicted, *rest = (x[:0] for x in make(0)[:4])
    metrics.update(predicted, Targets(*rest))
    assert metrics.compute() == {}
    assert metrics.by_depth() == metrics.calibration() == {}


def test_bad_sizes_have_one_clear_error():
    predicted, truth, observed, stack, _ = make(0)
    with pytest.raises(ConfigError, match="0 layers"):
        CompletionMetrics(0)
    with pytest.raises(DataError, match="3 layers got arrays"):
        CompletionMetrics(3).update(predicted, Targets(truth, observed, stack))
    with pytest.raises(DataError, match=r"\(15, 1\)"):
        CompletionMetrics(L).update(predicted[:, :1], Targets(truth, observed, stack))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), sizes=st.lists(st.integers(0, 7), min_size=1, max_size=4))
def test_masked_errors_are_those_of_numpy(seed, sizes):
    rng = np.random.default_rng(seed)
    root, mean = MaskedRMSE(), MaskedMAE()
    errors = []
    for n in sizes:
        predicted, truth = rng.normal(size=(2, n, L))
        mask = rng.random((n, L)) < 0.6
        truth[~mask] = np.nan
        errors.append((predicted - truth)[mask])
        for metric in (root, mean):
            metric.update(*(torch.from_numpy(x) for x in (predicted, truth, mask)))
    flat = np.concatenate(errors)
    if len(flat):
        assert float(root.compute()) == pytest.approx(np.sqrt(np.mean(flat**2)))
        assert float(mean.compute()) == pytest.approx(np.mean(np.abs(flat)))
    else:
        assert math.isnan(float(root.compute()))


def test_coverage_and_quantiles():
    from scipy.stats import norm

    for level in (0.1, 0.5, 0.9, 0.99):
        assert normal_quantile(level) == pytest.approx(norm.ppf(0.5 + level / 2), rel=1e-9)
    truth = torch.tensor([0.0, 1.0, 2.0, math.nan])
    assert float(interval_coverage(torch.zeros(4), truth, torch.ones(4), 0.99)) == 1.0
