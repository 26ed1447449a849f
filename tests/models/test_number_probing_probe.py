"""The mod-T probe and its verdict; numbers in brackets are rows of card section 5."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fulgurite.errors import ConfigError, DataError
from fulgurite.models.number_probing import (
    cohen_kappa,
    collinear,
    diagnose,
    gaussian,
    histogram,
    make_folds,
    planted,
    probe,
    row_shuffled,
    spectrum,
    spikes,
)
from fulgurite.models.number_probing import lda as lda_module

N = torch.arange(1000)


def normal(size, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, width, generator=generator, dtype=torch.float64)


def kappas(x, periods, **kwargs):
    return {t: found.kappa for t, found in probe(x, periods, nonround=False, **kwargs).items()}


def mixture(width, size=1000, seed=0):
    """A bit of everything: common factors, parity, residues, scales, a dead feature."""
    n = torch.arange(size)
    x = normal(size, width, seed) + 0.5 * normal(size, 20, seed + 1) @ normal(20, width, seed + 2)
    for period, strength in ((2, 0.1), (5, 0.15), (10, 0.15)):
        x = x + strength * normal(period, width, period)[n % period]
    x = x * torch.linspace(0.1, 10, width) + 3
    x[:, 0] = 7.0
    return x


def by_sklearn(x, period, estimator, seeds=2, folds=5):
    """κ of the same folds by scikit-learn."""
    from sklearn.metrics import cohen_kappa_score
    from sklearn.model_selection import PredefinedSplit, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    n = torch.arange(len(x))
    labels = (n % period).numpy()
    found = []
    for seed in range(seeds):
        split = PredefinedSplit(make_folds(n, period, folds, seed=seed).numpy())
        held = cross_val_predict(
            make_pipeline(StandardScaler(), estimator), x.numpy(), labels, cv=split
        )
        found.append(cohen_kappa_score(labels, held))
    return float(np.mean(found))


# --- equal to scikit-learn ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "period"), [(8, 3), (64, 2), (64, 10), (200, 2), (200, 5), (384, 10)]
)
def test_lda_is_scikit_learns(width, period):
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    x = mixture(width)
    expected = by_sklearn(x, period, LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"))
    assert kappas(x, [period])[period] == pytest.approx(expected, abs=0.005)


def test_lda_is_scikit_learns_with_more_dimensions_than_numbers():
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    x = mixture(300, size=200)
    for period in (2, 5):
        expected = by_sklearn(
            x, period, LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"), seeds=1
        )
        found = kappas(x, [period], seeds=1)[period]
        assert found == pytest.approx(expected, abs=2 / 200 * period / (period - 1))  # two answers


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_lda_is_scikit_learns_at_a_given_shrinkage(share):
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    x = mixture(40)
    expected = by_sklearn(x, 5, LinearDiscriminantAnalysis(solver="lsqr", shrinkage=share))
    x = x[:, 1:] if share == 0 else x  # a dead feature leaves no plain covariance to invert
    assert kappas(x, [5], shrinkage=share)[5] == pytest.approx(expected, abs=0.005)


def test_the_shrinkage_intensity_is_ledoit_and_wolfs():
    from sklearn.covariance import ledoit_wolf_shrinkage

    x = (mixture(30, 80)[:, 1:] - 3).numpy()
    x = (x - x.mean(0)) / x.std(0)
    covariance = x.T @ x / len(x)
    found = lda_module.shrinkage_intensity(
        *(torch.tensor(v) for v in (
            ((x**2).sum(1) ** 2).sum(), (covariance**2).sum(), np.trace(covariance), len(x),
        )),
        x.shape[1],
    )  # fmt: skip
    assert float(found) == pytest.approx(ledoit_wolf_shrinkage(x), rel=1e-9)


def test_both_ways_of_solving_agree(monkeypatch):
    monkeypatch.setattr(lda_module, "_TOLERANCE", 1e-5)
    x, folds = mixture(100), make_folds(N, 7, 5)[None]
    table = lda_module.Table(x)
    direct = lda_module.lda_scores(table, N % 7, 7, folds, "auto")
    monkeypatch.setattr(lda_module, "DIRECT", 0)
    iterative = lda_module.lda_scores(table, N % 7, 7, folds, "auto")
    assert float((direct - iterative).abs().max() / direct.abs().max()) < 1e-4
    # and with fewer numbers than dimensions, by the other form of the preconditioner
    few = lda_module.Table(x[:80])
    folds = make_folds(N[:80], 2, 4)[None]
    iterative = lda_module.lda_scores(few, N[:80] % 2, 2, folds, "auto")
    monkeypatch.setattr(lda_module, "DIRECT", 128)
    direct = lda_module.lda_scores(few, N[:80] % 2, 2, folds, "auto")
    assert float((direct - iterative).abs().max() / direct.abs().max()) < 1e-4


@pytest.mark.parametrize("period", [2, 5])
def test_logistic_regression_is_scikit_learns(period):
    from sklearn.linear_model import LogisticRegression

    x = mixture(20, size=400)
    expected = by_sklearn(x, period, LogisticRegression(C=0.1, max_iter=2000), seeds=1)
    found = kappas(x, [period], method="logistic", strength=0.1, seeds=1)[period]
    assert found == pytest.approx(expected, abs=0.01)  # two of 400 answers


def test_logistic_regression_works_where_gradients_are_off():
    x = planted(torch.arange(100), 5, 8)
    with torch.inference_mode():
        found = probe(x, [5], method="logistic", seeds=1, nonround=False)
    assert found[5].kappa == 1


# --- planted tables -------------------------------------------------------------------------------


@pytest.mark.parametrize("period", [2, 5, 7, 10])
def test_a_circle_is_read_perfectly(period):  # (1)
    assert kappas(planted(N, period), [period])[period] >= 0.99


def test_the_fundamental_of_ten_says_nothing_of_its_divisors():  # (2)
    found = [kappas(planted(N, 10, seed=seed), [2, 5]) for seed in range(4)]
    for period in (2, 5):
        assert abs(np.mean([f[period] for f in found])) <= 0.06


def test_all_harmonics_of_ten():  # (3)
    found = kappas(planted(N, 10, harmonics=(1, 2, 3, 4, 5)), [2, 4, 5, 10])
    assert found[2] == found[5] == found[10] == 1
    assert found[4] == pytest.approx(1 / 3, abs=0.05)


def test_ceilings_are_met_from_partial_knowledge():  # (4)
    assert kappas(planted(N, 5), [10])[10] == pytest.approx(0.44, abs=0.04)
    assert kappas(planted(N, 2), [10])[10] == pytest.approx(0.11, abs=0.05)


def test_theorem_1():  # (5), (6), (7)
    assert kappas(collinear(N, 10, 5.0, 0.03), [10])[10] >= 0.95
    assert kappas(collinear(N, 10, 5.0, 31.0), [10])[10] <= 0.05
    apart = torch.stack([5.0 * (N % 10), 31.0 * (N // 10)], 1) + 1.0
    assert kappas(apart, [10])[10] == 1


def test_theorem_1_by_logistic_regression():  # (5), (6)
    near, far = (collinear(N, 10, 5.0, drift) for drift in (0.03, 31.0))
    assert kappas(near, [10], method="logistic", seeds=1)[10] >= 0.95
    assert kappas(far, [10], method="logistic", seeds=1)[10] <= 0.05


def test_a_spike_without_separability():  # (8)
    found = [kappas(planted(N, 10, scatter=5.0, seed=s), [10], seeds=1)[10] for s in range(10)]
    assert np.mean(found) < 0.05
    assert max(found) < 0.08
    assert kappas(planted(N, 10, scatter=0.05), [10])[10] == 1
    assert 0.1 < kappas(planted(N, 10, scatter=1.0), [10])[10] < 0.3


@pytest.mark.parametrize("width", [50, 200])
def test_random_embeddings_stay_within_chance(width):  # (9)
    for seed in range(2):
        for found in probe(normal(1000, width, seed), nonround=False).values():
            assert abs(found.kappa) < found.band


def test_in_sample_scores_are_kept_apart():  # (10)
    x = normal(200, 400)
    found = probe(x, [3], method="logistic", seeds=1, nonround=False)[3]
    assert found.train_kappa == 1
    assert abs(found.kappa) < found.band
    other = row_shuffled(planted(N, 10, 64, noise=0.3))
    for result in probe(other, [2, 5, 10], nonround=False).values():
        assert abs(result.kappa) < result.band


def test_permuted_numbers_give_the_null():
    found = probe(planted(N, 10), [2, 10], null_draws=12, nonround=False)
    for period, result in found.items():
        assert len(result.null_kappas) == 12
        assert abs(np.mean(result.null_kappas)) < 2 * result.null_sd
        assert 0.5 < result.null_sd * (1000 * (period - 1)) ** 0.5 < 2
        assert result.null_sd == pytest.approx(np.std(result.null_kappas, ddof=1))
    assert found[10].kappa == 1


def test_a_histogram_has_no_residues():
    counts = 1e6 / (1 + N) * torch.where(N % 10 == 0, 3.0, 1.0)
    found = kappas(histogram(counts), [5, 10], allow_duplicates=True)
    assert max(found.values()) < 0.3  # no more than roundness
    assert gaussian(planted(N, 10)).std() == pytest.approx(float(planted(N, 10).std()), rel=0.02)


def test_kappa_is_accuracy_beyond_chance():  # (16)
    for noise in (0.05, 0.5, 1.0):
        for t, found in probe(planted(N, 10, noise=noise), [2, 5, 10], nonround=False).items():
            expected = (found.accuracy - 1 / t) / (1 - 1 / t)
            assert abs(found.kappa - expected) < 0.01
            assert np.mean(list(found.recall.values())) == pytest.approx(found.accuracy, abs=1e-9)


def test_plain_lda_is_invariant_under_affine_maps():  # (17)
    x = planted(N, 5, 12, noise=0.6)
    turn = torch.linalg.qr(normal(12, 12))[0]
    expected = kappas(x, [5], shrinkage=0.0)[5]
    assert 0.2 < expected < 0.9
    assert kappas(x @ turn, [5], shrinkage=0.0)[5] == pytest.approx(expected, abs=1e-12)
    assert kappas(100 * x + 3, [5], shrinkage=0.0)[5] == pytest.approx(expected, abs=1e-12)
    # Ledoit and Wolf's standardise features, so that scales do not matter either
    scaled = x * torch.linspace(0.01, 100, 12)
    assert kappas(scaled, [5])[5] == pytest.approx(kappas(x, [5])[5], abs=1e-12)


def test_results_do_not_depend_on_the_global_generator_or_precision():
    x = mixture(150, 300)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = probe(x, [3], null_draws=2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("medium")
    try:
        assert probe(x, [3], null_draws=2) == first
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_smooth_embeddings_are_negative_on_shuffled_folds_only():
    angle = N[:100] * 2 * torch.pi * torch.tensor([[1.0], [3.0]]) / 100
    x = torch.cat([angle.cos(), angle.sin()]).T + 0.001 * normal(100, 4)
    basis = torch.exp(-0.5 * ((x[:, None] - x[None, ::3]) / 0.1).square().sum(-1))
    shuffled, contiguous = (kappas(basis, [2], kind=kind)[2] for kind in ("shuffled", "contiguous"))
    assert shuffled < -0.3
    assert contiguous > shuffled + 0.3


def test_numbers_with_gaps_can_be_probed():
    some = N[N % 5 != 0]
    found = probe(planted(some, 10), [5, 10], numbers=some)
    assert found[10].kappa == found[10].kappa_nonround == 1
    assert sorted(found[10].recall) == [1, 2, 3, 4, 6, 7, 8, 9]


# --- folds and kappa ------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.integers(2, 7), st.integers(60, 200), st.integers(0, 50))
def test_shuffled_folds_are_stratified(period, folds, size, seed):
    n = torch.arange(size)
    found = make_folds(n, period, folds, "shuffled", seed)
    for residue in range(period):
        counts = found[n % period == residue].bincount(minlength=folds)
        assert int(counts.max() - counts.min()) <= 1
    assert int(found.bincount().max() - found.bincount().min()) <= 1
    assert torch.equal(found, make_folds(n, period, folds, "shuffled", seed))


def test_blocked_folds_hold_neighbours_out_together():
    decade = make_folds(N, 7, 5, "decade", 3)
    assert all(len(decade[d == N // 10].unique()) == 1 for d in range(100))
    assert decade.bincount().tolist() == [200] * 5
    contiguous = make_folds(N, 7, 5, "contiguous")
    assert torch.equal(contiguous, N // 200)
    assert torch.equal(make_folds(N.flip(0), 7, 5, "contiguous"), (N // 200).flip(0))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=60))
def test_kappa_is_scikit_learns(pairs):
    from sklearn.metrics import cohen_kappa_score

    true, given_ = (torch.tensor(x) for x in zip(*pairs, strict=True))
    found = float(cohen_kappa(true, given_[None], 5)[0])
    if len(set(true.tolist()) | set(given_.tolist())) == 1:
        assert found == 0
    else:
        assert found == pytest.approx(cohen_kappa_score(true, given_), abs=1e-12)


# --- verdict --------------------------------------------------------------------------------------


def verdict(x, periods=(2, 4, 5, 10), **kwargs):
    return diagnose(probe(x, periods, **kwargs), spikes(spectrum(x), periods))


def test_diagnosis_of_planted_tables():
    circle = verdict(planted(N, 10))
    assert circle.verdict == "geometric"
    assert circle.periods[10].verdict == "geometric"
    everything = verdict(planted(N, 10, harmonics=(1, 2, 3, 4, 5)))
    assert everything.verdict == "geometric"
    assert everything.periods[4].verdict == "parity or roundness only"
    parity = verdict(planted(N, 2))
    assert parity.verdict == "parity or roundness only"
    assert parity.periods[2].verdict == "geometric"
    five = verdict(planted(N, 5))
    assert five.verdict == "geometric"
    assert five.periods[10].verdict == "a divisor only"
    assert "n mod 5" in five.periods[10].reasons[-1]
    scattered = verdict(planted(N, 10, scatter=5.0))
    assert scattered.verdict == "spectral only"
    assert scattered.periods[10].verdict == "spectral only"
    noise = verdict(normal(1000, 20))
    assert noise.verdict == "nothing"


def test_diagnosis_of_roundness():
    endings = torch.where(N % 5 == 0, N % 10 // 5 + 1, 0)
    x = torch.nn.functional.one_hot(endings, 3).double()
    found = verdict(torch.cat([x, normal(1000, 20)], 1) + 0.05 * normal(1000, 23, 1))
    assert found.verdict == "parity or roundness only"
    assert found.periods[5].verdict == found.periods[10].verdict == "parity or roundness only"
    assert any("parity and roundness alone could give" in r for r in found.reasons)


def test_a_period_without_a_spike_verdict_is_an_error():
    x = planted(N, 10)
    with pytest.raises(ConfigError, match=r"no spike verdict for T = 3.*same periods"):
        diagnose(probe(x, [3], nonround=False), spikes(spectrum(x), [2]))


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"method": "svm"}, "probe 'svm' is unknown"),
        ({"kind": "random"}, "folds 'random' are unknown"),
        ({"folds": 1}, "folds=1 is too small"),
        ({"folds": 41}, "folds=41 is more than the 40 numbers"),
        ({"seeds": 0}, "seeds=0"),
        ({"shrinkage": 2.0}, "shrinkage=2.0 is no share"),
        ({"periods": [11]}, r"periods=\[11\] cannot be probed on 40 numbers"),
        ({"periods": []}, "periods="),
    ],
)
def test_settings_out_of_range(change, what):
    with pytest.raises(ConfigError, match=what):
        probe(normal(40, 3), **({"periods": [2]} | change))


def test_a_residue_that_is_left_out_is_an_error():
    n = torch.tensor([*range(0, 80, 2), 1, 3])
    with pytest.raises(ConfigError, match=r"1 numbers of a residue mod 2 are left to fit"):
        probe(normal(len(n), 3), [2], numbers=n, folds=2, nonround=False)


def test_plain_lda_of_a_singular_covariance_is_an_error():
    with pytest.raises(DataError, match=r"200 dimensions within 2 residues is singular.*auto"):
        probe(normal(100, 200), [2], shrinkage=0.0)


def test_equal_rows_are_an_error_in_the_probe_too():  # (15)
    with pytest.raises(DataError, match="1000 numbers have only 39 unique"):
        probe(normal(39, 8)[N % 39], [2])
