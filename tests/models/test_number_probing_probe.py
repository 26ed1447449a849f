"""The mod-T probe and its verdict; numbers in brackets are rows of the source.

Source: docs/papers/number_probing.md section 5.
"""

import numpy as np
import pytest
import torch
from fakes.number_probing import draw_normal
from fakes.options import group
from hypothesis import given, settings
from hypothesis import strategies as st

from fulgurite.errors import ConfigError, DataError
from fulgurite.models.number_probing import (
    ClassifierOptions,
    FoldOptions,
    cohen_kappa,
    collinear,
    diagnose,
    gaussian,
    histogram,
    make_folds,
    planted,
    probe,
    row_shuffled,
    scatter,
    spectrum,
    spikes,
)
from fulgurite.models.number_probing.probes import lda as lda_module
from fulgurite.models.number_probing.probes.fold_statistics import StandardizedRows
from fulgurite.models.number_probing.reports.report import ProbeSettings, measure

N = torch.arange(1000)


def run_probe(x, periods, **options):
    """A probe whose options are named without their records."""
    if "folds" in options:
        options["count"] = options.pop("folds")
    records = {"folds": FoldOptions, "classifier": ClassifierOptions}
    return probe(x, periods, **group(options, **records))


def kappas(x, periods, **options):
    results = run_probe(x, periods, nonround=False, **options)
    return {t: result.kappa for t, result in results.items()}


def mixture(width, size=1000, seed=0):
    """A bit of everything: common factors, parity, residues, scales, a dead feature."""
    n = torch.arange(size)
    factors = draw_normal(size, 20, seed + 1) @ draw_normal(20, width, seed + 2)
    x = draw_normal(size, width, seed) + 0.5 * factors
    for period, strength in ((2, 0.1), (5, 0.15), (10, 0.15)):
        x = x + strength * draw_normal(period, width, period)[n % period]
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
    kappas_by_seed = []
    for seed in range(seeds):
        split = PredefinedSplit(make_folds(n, period, folds, seed=seed).numpy())
        predicted = cross_val_predict(
            make_pipeline(StandardScaler(), estimator), x.numpy(), labels, cv=split
        )
        kappas_by_seed.append(cohen_kappa_score(labels, predicted))
    return float(np.mean(kappas_by_seed))


# --- equal to scikit-learn ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "period"),
    [
        *((8, 3), (64, 2), (64, 10), (200, 2)),
        *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((200, 5), (384, 10))),
    ],
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
        kappa = kappas(x, [period], seeds=1)[period]
        assert kappa == pytest.approx(expected, abs=2 / 200 * period / (period - 1))  # two answers


def answers(x, period, shrinkage="auto", seed=0):
    """Answers to the numbers held out: ours, and scikit-learn's on the same folds."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
    from sklearn.model_selection import PredefinedSplit, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    labels = torch.arange(len(x)) % period
    folds = make_folds(torch.arange(len(x)), period, 5, seed=seed)
    scores = lda_module.lda_scores(
        StandardizedRows(x), labels, period, folds[None], shrinkage=shrinkage
    )
    ours = scores[0, folds, torch.arange(len(x))].argmax(-1)
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage)
    theirs = cross_val_predict(
        make_pipeline(StandardScaler(), model), x.numpy(), labels.numpy(),
        cv=PredefinedSplit(folds.numpy()),
    )  # fmt: skip
    return ours, torch.from_numpy(theirs)


@pytest.mark.parametrize("shrinkage", [0.0, 0.3])
def test_lda_is_scikit_learns_at_a_given_shrinkage(shrinkage):
    x = mixture(40)[:, 1:]  # a dead feature leaves no plain covariance to invert
    ours, theirs = answers(x, 5, shrinkage)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shrinkage", [1e-3, 1e-6])
@pytest.mark.parametrize(("width", "size"), [(100, 300), (150, 300), (200, 100)])
def test_lda_is_scikit_learns_at_a_small_shrinkage(shrinkage, width, size):
    """Also of a table of rank 10, which has no inverse but for the shrinkage."""
    ours, theirs = answers(mixture(width, size), 5, shrinkage)
    assert torch.equal(ours, theirs)
    flat = draw_normal(size, 10) @ draw_normal(10, width, 1)
    ours, theirs = answers(flat, 5, shrinkage)
    assert int((ours != theirs).sum()) <= 1


def tight_circle(period, width, noise, size=300):
    """Residues on a circle with little noise, and loose features of which one has parity."""
    n = torch.arange(size)
    angle = n.double() * 2 * torch.pi / period
    circle = torch.stack([angle.cos(), angle.sin()], 1) + noise * draw_normal(size, 2, 1)
    loose = draw_normal(size, width - 2, 2)
    loose[:, :1] += 1.5 * (n % 2)[:, None]
    return torch.cat([circle, loose], 1)


WIDE = (129, 64, 128, 256, 512, 1024)
WIDTHS = [2, 3, *(pytest.param(w, marks=pytest.mark.slow) for w in WIDE)]


@pytest.mark.parametrize("noise", [1.0, 1e-2, 1e-3, 1e-4, 1e-6])
@pytest.mark.parametrize("width", WIDTHS)
def test_lda_is_scikit_learns_at_any_scale(width, noise):
    ours, theirs = answers(tight_circle(10, width, noise), 10)
    assert int((ours != theirs).sum()) <= 2
    if noise <= 0.01:
        assert torch.equal(ours, torch.arange(300) % 10)


@pytest.mark.parametrize("noise", [0.1, 1e-5, 1e-7])
@pytest.mark.parametrize("width", [3, *(pytest.param(w, marks=pytest.mark.slow) for w in WIDE)])
def test_lda_is_right_at_two_scales_at_once(width, noise):
    """The circle tells n mod 5, a loose feature parity. Below 1e-5 scikit-learn loses parity."""
    ours, _ = answers(tight_circle(5, width, noise), 10)
    _, theirs = answers(tight_circle(5, width, max(noise, 1e-5)), 10)
    assert int((ours != theirs).sum()) <= 3
    assert torch.equal(ours % 5, torch.arange(300) % 5) or noise == 0.1


@pytest.mark.parametrize("width", [12, pytest.param(140, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [
    "dead", "doubled", "one row", "outlier", "class", "tight class", "constant in a class",
    "offset", "units", "rank 5", "heavy tails",
])  # fmt: skip
def test_lda_is_scikit_learns_on_odd_tables(kind, width):
    n = torch.arange(300)
    x = draw_normal(300, width) + width**-0.5 * draw_normal(6, width, 1)[n % 6]
    if kind == "dead":
        x[:, 0] = 0
    elif kind == "doubled":
        x[:, 1] = x[:, 0]
    elif kind == "one row":
        x[:, 0] = n == 7
    elif kind == "outlier":
        x[7, 0] = 1e12
    elif kind == "class":
        x[:, 0] = n % 6 == 1
    elif kind == "tight class":
        x[n % 6 == 1] *= 1e-4
    elif kind == "constant in a class":
        x[n % 6 == 1, 0] = 1.0
    elif kind == "offset":
        x = 1e-8 * x + 1e3
    elif kind == "units":
        x = x * torch.logspace(-12, 12, width).double()
    elif kind == "rank 5":
        x = draw_normal(300, 5) @ draw_normal(5, width, 1)
    elif kind == "heavy tails":
        x = x * draw_normal(300, width, 2).abs().reciprocal()
    ours, theirs = answers(x, 6)
    assert int((ours != theirs).sum()) <= 3


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30, 1e200])
@pytest.mark.parametrize("width", [12, 140])
def test_the_unit_of_a_table_changes_nothing(width, scale):
    """Squares of such values are not finite, or zero."""
    x = planted(N[:200], 5, width, noise=0.3)
    expected = kappas(x, [5], seeds=1)[5]
    assert 0.1 < expected < 0.95
    assert kappas(scale * x, [5], seeds=1)[5] == pytest.approx(expected, abs=1e-9)


def test_the_shrinkage_intensity_is_ledoit_and_wolfs():
    from sklearn.covariance import ledoit_wolf_shrinkage

    x = (mixture(30, 80)[:, 1:] - 3).numpy()
    x = (x - x.mean(0)) / x.std(0)
    covariance = x.T @ x / len(x)
    intensity = lda_module.shrinkage_intensity(
        *(torch.tensor(v) for v in (
            ((x**2).sum(1) ** 2).sum(), (covariance**2).sum(), np.trace(covariance), len(x),
        )),
        d=x.shape[1],
    )  # fmt: skip
    assert float(intensity) == pytest.approx(ledoit_wolf_shrinkage(x), rel=1e-9)


def test_both_ways_of_solving_agree(monkeypatch):
    """Of many numbers, and of fewer than dimensions; classes near, and so far that float64 it is.

    Fits model by model estimate the shrinkage in units of their own, so they differ a little more.
    """
    ways: list[str] = []

    def record(name):
        original = getattr(lda_module, name)
        monkeypatch.setattr(lda_module, name, lambda *args: (ways.append(name), original(*args))[1])

    for name in ("solve_directly", "solve_iteratively", "fit_alone"):
        record(name)
    monkeypatch.setattr(lda_module, "TOLERANCE", 1e-5)
    for size, period, far in ((1000, 7, 0.0), (80, 2, 0.0), (80, 2, 1.0), (1000, 7, 5.0)):
        n = torch.arange(size)
        x = mixture(100, size) + far * draw_normal(period, 100, 9)[n % period]
        table, folds = StandardizedRows(x), make_folds(n, period, 4)[None]
        scores = []
        for direct, near, far_limit in ((128, 10.0, 1e4), (0, 10.0, 1e4), (0, 10.0, 0.0)):
            monkeypatch.setattr(lda_module, "DIRECT", direct)
            monkeypatch.setattr(lda_module, "NEAR", near)
            monkeypatch.setattr(lda_module, "FAR", far_limit)
            computed = lda_module.lda_scores(
                table, n % period, period, folds, shrinkage="auto"
            ).double()
            scores.append(computed - computed.mean(-1, keepdim=True))
        scale = scores[0].abs().max()
        assert float((scores[0] - scores[1]).abs().max() / scale) < 1e-4
        assert float((scores[0] - scores[2]).abs().max() / scale) < 0.05
    assert {*ways} == {"solve_directly", "solve_iteratively", "fit_alone"}


@pytest.mark.parametrize("period", [2, 5])
def test_logistic_regression_is_scikit_learns(period):
    from sklearn.linear_model import LogisticRegression

    x = mixture(20, size=400)
    expected = by_sklearn(x, period, LogisticRegression(C=0.1, max_iter=2000), seeds=1)
    kappa = kappas(x, [period], method="logistic", strength=0.1, seeds=1)[period]
    assert kappa == pytest.approx(expected, abs=0.01)  # two of 400 answers


def test_logistic_regression_works_where_gradients_are_off():
    x = planted(torch.arange(100), 5, 8)
    with torch.inference_mode():
        results = run_probe(x, [5], method="logistic", seeds=1, nonround=False)
    assert results[5].kappa == 1


# --- planted tables -------------------------------------------------------------------------------


@pytest.mark.parametrize("period", [2, 5, 7, 10])
def test_a_circle_is_read_perfectly(period):  # (1)
    assert kappas(planted(N, period), [period])[period] >= 0.99


def test_the_fundamental_of_ten_says_nothing_of_its_divisors():  # (2)
    by_seed = [kappas(planted(N, 10, seed=seed), [2, 5]) for seed in range(4)]
    for period in (2, 5):
        assert abs(np.mean([kappa[period] for kappa in by_seed])) <= 0.06


def test_all_harmonics_of_ten():  # (3)
    kappa = kappas(planted(N, 10, harmonics=(1, 2, 3, 4, 5)), [2, 4, 5, 10])
    assert kappa[2] == kappa[5] == kappa[10] == 1
    assert kappa[4] == pytest.approx(1 / 3, abs=0.05)


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
    kappa = [kappas(planted(N, 10, scatter=5.0, seed=s), [10], seeds=1)[10] for s in range(10)]
    assert np.mean(kappa) < 0.05
    assert max(kappa) < 0.08
    assert kappas(planted(N, 10, scatter=0.05), [10])[10] == 1
    assert 0.1 < kappas(planted(N, 10, scatter=1.0), [10])[10] < 0.3


@pytest.mark.parametrize("width", [50, 200])
def test_random_embeddings_stay_within_chance(width):  # (9)
    for seed in range(2):
        for result in probe(draw_normal(1000, width, seed), nonround=False).values():
            assert abs(result.kappa) < result.band


def test_in_sample_scores_are_kept_apart():  # (10)
    x = draw_normal(200, 400)
    result = run_probe(x, [3], method="logistic", seeds=1, nonround=False)[3]
    assert result.train_kappa == 1
    assert abs(result.kappa) < result.band
    shuffled = row_shuffled(planted(N, 10, 64, noise=0.3))
    for result in probe(shuffled, [2, 5, 10], nonround=False).values():
        assert abs(result.kappa) < result.band


def test_permuted_numbers_give_the_null():
    results = probe(planted(N, 10), [2, 10], null_draws=12, nonround=False)
    for period, result in results.items():
        assert len(result.null_kappas) == 12
        assert abs(np.mean(result.null_kappas)) < 2 * result.null_sd
        assert 0.5 < result.null_sd * (1000 * (period - 1)) ** 0.5 < 2
        assert result.null_sd == pytest.approx(np.std(result.null_kappas, ddof=1))
    assert results[10].kappa == 1


def test_a_histogram_has_no_residues():
    counts = 1e6 / (1 + N) * torch.where(N % 10 == 0, 3.0, 1.0)
    kappa = kappas(histogram(counts), [5, 10], allow_duplicates=True)
    assert max(kappa.values()) < 0.3  # no more than roundness
    assert gaussian(planted(N, 10)).std() == pytest.approx(float(planted(N, 10).std()), rel=0.02)


def test_kappa_is_accuracy_beyond_chance():  # (16)
    for noise in (0.05, 0.5, 1.0):
        for t, result in probe(planted(N, 10, noise=noise), [2, 5, 10], nonround=False).items():
            expected = (result.accuracy - 1 / t) / (1 - 1 / t)
            assert abs(result.kappa - expected) < 0.01
            assert np.mean(list(result.recall.values())) == pytest.approx(result.accuracy, abs=1e-9)


def test_plain_lda_is_invariant_under_affine_maps():  # (17)
    x = planted(N, 5, 12, noise=0.6)
    turn = torch.linalg.qr(draw_normal(12, 12))[0]
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
    x = torch.cat([angle.cos(), angle.sin()]).T + 0.001 * draw_normal(100, 4)
    basis = torch.exp(-0.5 * ((x[:, None] - x[None, ::3]) / 0.1).square().sum(-1))
    shuffled, contiguous = (kappas(basis, [2], kind=kind)[2] for kind in ("shuffled", "contiguous"))
    assert shuffled < -0.3
    assert contiguous > shuffled + 0.3


def test_numbers_with_gaps_can_be_probed():
    nonround = N[N % 5 != 0]
    results = probe(planted(nonround, 10), [5, 10], numbers=nonround)
    assert results[10].kappa == results[10].kappa_nonround == 1
    assert sorted(results[10].recall) == [1, 2, 3, 4, 6, 7, 8, 9]


# --- folds and kappa ------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.integers(2, 7), st.integers(60, 200), st.integers(0, 50))
def test_shuffled_folds_are_stratified(period, folds, size, seed):
    n = torch.arange(size)
    fold = make_folds(n, period, folds, "shuffled", seed=seed)
    for residue in range(period):
        counts = fold[n % period == residue].bincount(minlength=folds)
        assert int(counts.max() - counts.min()) <= 1
    assert int(fold.bincount().max() - fold.bincount().min()) <= 1
    assert torch.equal(fold, make_folds(n, period, folds, "shuffled", seed=seed))


def test_blocked_folds_hold_neighbours_out_together():
    decade = make_folds(N, 7, 5, "decade", seed=3)
    assert all(len(decade[d == N // 10].unique()) == 1 for d in range(100))
    assert decade.bincount().tolist() == [200] * 5
    contiguous = make_folds(N, 7, 5, "contiguous")
    assert torch.equal(contiguous, N // 200)
    assert torch.equal(make_folds(N.flip(0), 7, 5, "contiguous"), (N // 200).flip(0))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=60))
def test_kappa_is_scikit_learns(pairs):
    from sklearn.metrics import cohen_kappa_score

    true, predicted = (torch.tensor(x) for x in zip(*pairs, strict=True))
    kappa = float(cohen_kappa(true, predicted[None], 5)[0])
    if len(set(true.tolist()) | set(predicted.tolist())) == 1:
        assert kappa == 0
    else:
        assert kappa == pytest.approx(cohen_kappa_score(true, predicted), abs=1e-12)


# --- verdict --------------------------------------------------------------------------------------


def verdict(x, periods=(2, 4, 5, 10), **kwargs):
    return diagnose(run_probe(x, periods, **kwargs), spikes(spectrum(x), periods))


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
    noise = verdict(draw_normal(1000, 20))
    assert noise.verdict == "nothing"


def test_diagnosis_of_roundness():
    endings = torch.where(N % 5 == 0, N % 10 // 5 + 1, 0)
    x = torch.nn.functional.one_hot(endings, 3).double()
    diagnosis = verdict(torch.cat([x, draw_normal(1000, 20)], 1) + 0.05 * draw_normal(1000, 23, 1))
    assert diagnosis.verdict == "parity or roundness only"
    assert diagnosis.periods[5].verdict == "parity or roundness only"
    assert diagnosis.periods[10].verdict == "parity or roundness only"
    assert any("parity and roundness alone could give" in r for r in diagnosis.reasons)


def test_a_period_without_a_spike_verdict_is_an_error():
    x = planted(N, 10)
    with pytest.raises(ConfigError, match=r"no spike verdict for T = 3.*same periods"):
        diagnose(probe(x, [3], nonround=False), spikes(spectrum(x), [2]))


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
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
def test_settings_out_of_range(change, message):
    with pytest.raises(ConfigError, match=message):
        run_probe(draw_normal(40, 3), **({"periods": [2]} | change))


def test_a_residue_that_is_left_out_is_an_error():
    n = torch.tensor([*range(0, 80, 2), 1, 3])
    with pytest.raises(ConfigError, match=r"1 numbers of a residue mod 2 are left to fit"):
        run_probe(draw_normal(len(n), 3), [2], numbers=n, folds=2, nonround=False)


def test_plain_lda_of_a_singular_covariance_is_an_error():
    with pytest.raises(DataError, match=r"200 dimensions within 2 residues is singular.*'auto'"):
        run_probe(draw_normal(100, 200), [2], shrinkage=0.0)


def test_equal_rows_are_an_error_in_the_probe_too():  # (15)
    with pytest.raises(DataError, match="1000 numbers have only 39 unique"):
        probe(draw_normal(39, 8)[N % 39], [2])


@pytest.mark.parametrize("periods", [10, [2.5], "2", [None], np.array([2.0])])
def test_periods_that_are_no_whole_numbers_are_refused(periods):
    """A probe of n mod 2.5 would answer something."""
    x = draw_normal(100, 3)
    for function in (probe, lambda x, periods: spikes(spectrum(x), periods)):
        with pytest.raises(ConfigError, match="no whole numbers"):
            function(x, periods)
    with pytest.raises(ConfigError, match="no whole numbers"):
        ProbeSettings(periods)


def test_periods_of_arrays_are_taken_and_too_short_ones_refused():
    x = draw_normal(100, 3)
    assert list(probe(x, np.array([2, 5]), nonround=False)) == [2, 5]
    with pytest.raises(ConfigError, match=r"periods=\[0\] have no lines"):
        spikes(spectrum(x), [0])
    with pytest.raises(ConfigError, match="Give whole numbers from 2 to 25"):
        measure(x, settings=ProbeSettings([0]))


@pytest.mark.parametrize(
    ("embeddings", "numbers", "message"),
    [
        (np.ones((40, 2)), None, "embeddings are of type ndarray"),
        (torch.ones(40, 2).to_sparse(), None, "embeddings are of type torch.sparse_coo"),
        (torch.ones(40, 2), ["a"] * 40, "numbers are of type list and hold no integers"),
        (torch.ones(40, 2), 40, "numbers are of type int and hold no integers"),
    ],
)
def test_what_is_no_table_is_named(embeddings, numbers, message):
    with pytest.raises(DataError, match=message):
        probe(embeddings, [2], numbers=numbers)


def test_numbers_that_5_divides_alone_leave_none_to_probe():
    x, n = draw_normal(100, 3), range(0, 500, 5)
    with pytest.raises(ConfigError, match="5 divides all of the 100 numbers"):
        probe(x, [3], numbers=n)
    assert probe(x, [3], numbers=n, nonround=False)[3].size == 100


def test_a_verdict_says_if_numbers_that_5_does_not_divide_were_not_probed():
    x = planted(N, 7)
    verdict = diagnose(probe(x, [7], nonround=False), spikes(spectrum(x), [7])).periods[7]
    assert verdict.reasons[-1].endswith("5 does not divide were not probed by themselves.")


@pytest.mark.parametrize("ridge", [float("nan"), float("inf"), -1.0])
def test_a_ridge_without_a_size_is_refused(ridge):
    with pytest.raises(ConfigError, match="is out of range"):
        scatter(draw_normal(100, 3), 5, ridge=ridge)
