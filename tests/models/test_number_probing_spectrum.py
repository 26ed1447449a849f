"""Spectrum, Φ_T, scatter and Fisher values; numbers in brackets are rows of the source.

Source: docs/papers/number_probing.md section 5.
"""

import math

import numpy as np
import pytest
import torch
from fakes.number_probing import draw_normal
from hypothesis import given, settings
from hypothesis import strategies as st

from fulgurite.errors import ConfigError, DataError
from fulgurite.models.number_probing import (
    ceiling,
    check_embeddings,
    collinear,
    period_power,
    planted,
    probe,
    scatter,
    spectrum,
    spikes,
)
from fulgurite.models.number_probing.reports.report import ProbeSettings, measure
from fulgurite.models.number_probing.spectra.fisher import describe_singular

N = torch.arange(1000)


@pytest.mark.parametrize(("period", "fraction"), [(2, 0.75), (5, 0.75), (7, 0.75), (10, 0.75)])
def test_a_circle_has_its_power_in_one_line(period, fraction):  # (1)
    circle = spectrum(planted(N, period))
    power = circle.magnitude.square() * torch.where(circle.frequency < 0.5, 2.0, 1.0)
    at = round(1000 / period)
    assert int(power.argmax()) + 1 == at
    assert float(power[at - 1] / power.sum()) >= fraction
    assert [t for t, s in spikes(circle, (2, 3, 5, 7, 10)).items() if s.verdict] == [period]


def test_the_magnitudes_are_those_of_a_unitary_dft():
    x = draw_normal(60, 3)
    expected = np.linalg.norm(np.fft.fft(x.numpy(), axis=0, norm="ortho"), axis=1)
    s = spectrum(x)
    np.testing.assert_allclose(s.magnitude.numpy(), expected[1:31], rtol=1e-10)
    np.testing.assert_allclose(s.frequency.numpy(), np.arange(1, 31) / 60)
    np.testing.assert_allclose(
        s.normalised.numpy(), expected[1:31] / np.sort(expected[1:31])[14], rtol=1e-10
    )


def test_the_local_ratio_leaves_out_its_own_line():
    x = draw_normal(1000, 8) + 50 * torch.cos(2 * math.pi * 0.25 * N)[:, None]
    s = spectrum(x)
    at = s.bin(0.25)
    around = [i for i in range(at - 20, at + 21) if abs(i - at) > 2]
    expected = s.magnitude[at] / s.magnitude[around].sort().values[len(around) // 2 - 1]
    assert float(s.local_ratio[at]) == pytest.approx(float(expected))
    assert float(s.local_ratio[at + 10]) < 1.5  # one line does not lift the others' floor


def line(size, at, height, phase=0.7):
    """A wave of exactly one bin, by its number from 1."""
    angle = 2 * math.pi * at * torch.arange(size).double() / size
    return height * torch.cos(angle + phase)[:, None]


@settings(max_examples=60, deadline=None)
@given(st.integers(20, 400), st.data())
def test_a_line_is_no_part_of_its_own_surroundings(size, data):
    """Nor are the two bins beside it: the ratio grows with the line, to the last digit."""
    at = data.draw(st.integers(1, size // 2))
    x = draw_normal(size, 3)
    surroundings = []
    for distance in (0, 0, 1, 2, -1, -2):
        height = data.draw(st.floats(0.5, 1e3))
        inside = 1 <= at + distance <= size // 2
        s = spectrum(x + line(size, at + distance, height) if inside else x)
        surroundings.append(float(s.magnitude[at - 1] / s.local_ratio[at - 1]))
    assert surroundings == pytest.approx(surroundings[:1] * 6, rel=1e-8)


@pytest.mark.parametrize("size", [20, 21, 37, 100, 249, 250, 299, 300, 1000])
def test_the_surroundings_of_every_bin(size):
    """Bins 3 to N/50 away, or 3 to 5 in short spectra; their lower median."""
    s = spectrum(draw_normal(size, 2, size))
    magnitude = s.magnitude.tolist()
    for at, value in enumerate(magnitude):
        around = sorted(
            other
            for index, other in enumerate(magnitude)
            if 3 <= abs(index - at) <= max(0.02 * size, 5)
        )
        expected = value / around[(len(around) - 1) // 2]
        assert float(s.local_ratio[at]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("size", [60, 500])
def test_a_line_is_no_part_of_the_floor_either(size):
    """The floor is that of the bins more than two off every line; 3/10 is a line of T = 10."""
    x = draw_normal(size, 8) + line(size, 3 * size // 10, 40.0)
    s = spectrum(x)
    at = 3 * size // 10 - 1
    lines = {size // 10 - 1, at}
    off = [
        i
        for i in range(len(s.frequency))
        if s.frequency[i] >= 0.09 and all(abs(i - other) > 2 for other in lines)
    ]
    spike = spikes(s, [10])[10]
    assert spike.floor == float(s.local_ratio[off].max())
    assert spike.local_ratio == float(s.local_ratio[at])
    assert spike.verdict


def test_the_fundamental_alone_leaves_no_power_in_its_divisors():  # (2)
    x = planted(N, 10)
    assert all(period_power(x, t) < 1e-3 * period_power(x, 10) for t in (2, 5))


def test_noise_has_no_spike():
    for seed in range(5):
        by_period = spikes(spectrum(draw_normal(1000, 50, seed)))
        assert not any(s.verdict for s in by_period.values())


@pytest.mark.parametrize(("drift", "fisher"), [(0.03, 275.03), (31.0, 2.6e-4)])
def test_the_counter_example_has_the_same_power_whatever_its_drift(drift, fisher):  # (5), (6)
    x = collinear(N, 10, 5.0, drift)
    assert period_power(x, 10) == pytest.approx(206250, rel=1e-6)
    statistics = scatter(x, 10)
    assert float(statistics.fisher[0]) == pytest.approx(fisher, rel=0.02)
    assert statistics.condition == 1


def test_scattered_circles_have_a_large_spike():  # (8)
    peaks = [
        float(spectrum(planted(N, 10, scatter=5.0, seed=seed)).normalised[99]) for seed in range(10)
    ]
    assert min(peaks) > 2


def test_random_embeddings_have_the_power_of_their_variance():  # (9)
    x = 0.3 * draw_normal(1000, 1024)
    for period in (2, 3, 5, 7, 10):
        ratio = period_power(x, period) / ((period - 1) * 1024 * 0.09)
        assert 0.85 < ratio < 1.15


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 10), st.integers(0, 9), st.integers(1, 6), st.integers(0, 1000))
def test_power_is_the_trace_of_the_scatter_between_and_bounds_hold(period, extra, width, seed):
    """(12), and for N that the period does not divide."""
    size = 6 * period + min(extra, period - 1)
    x = draw_normal(size, width, seed) * (1 + torch.arange(width)) + torch.arange(size)[:, None] % 3
    statistics = scatter(x, period)
    cut_size = size // period * period
    trace = float(statistics.between.trace())
    assert abs(trace - statistics.phi / cut_size) < 1e-10 * trace
    lines = torch.fft.fft(x[:cut_size], dim=0, norm="ortho")[:: cut_size // period][1:]
    assert statistics.phi == pytest.approx(float(lines.abs().square().sum()), rel=1e-9)
    low, high = statistics.bounds
    largest = float(statistics.fisher[0])
    assert low <= largest * (1 + 1e-9)
    assert largest <= high * (1 + 1e-9)
    assert low == pytest.approx(
        statistics.phi
        / ((period - 1) * statistics.condition * cut_size * float(_smallest(statistics.within)))
    )
    assert 0 <= statistics.eta2 <= 1


def _smallest(matrix):
    return torch.linalg.eigvalsh(matrix)[0]


def test_fisher_values_are_generalised_eigenvalues():
    from scipy.linalg import eigh

    x = planted(N, 5, 12, noise=0.5, harmonics=(1, 2))
    for ridge in (0.0, 0.1):
        statistics = scatter(x, 5, ridge=ridge)
        within = statistics.within + ridge * statistics.within.trace() / 12 * torch.eye(12)
        expected = eigh(statistics.between.numpy(), within.numpy(), eigvals_only=True)[::-1][:4]
        np.testing.assert_allclose(statistics.fisher.numpy(), expected, rtol=1e-8)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.01, 100), st.integers(0, 100))
def test_power_is_invariant_under_rotation_and_quadratic_in_scale(scale, seed):  # (17)
    x = planted(torch.arange(100), 5, 6, noise=0.3, seed=seed)
    turn = torch.linalg.qr(draw_normal(6, 6, seed))[0]
    assert period_power(x @ turn, 5) == pytest.approx(period_power(x, 5), rel=1e-9)
    assert period_power(scale * x, 5) == pytest.approx(scale**2 * period_power(x, 5), rel=1e-9)
    assert scatter(scale * x @ turn, 5).eta2 == pytest.approx(scatter(x, 5).eta2, rel=1e-9)


def test_more_dimensions_than_numbers_need_a_ridge_or_pca():
    x = draw_normal(100, 200)
    with pytest.raises(DataError, match=r"T = 5 is singular: 200 dim.*--ridge 0.01.*--pca 95"):
        scatter(x, 5)
    assert scatter(x, 5, ridge=0.01).condition < 1e5
    assert scatter(x, 5, pca=20).within.shape == (20, 20)
    assert scatter(x, 5, pca=20).phi == pytest.approx(scatter(x, 5, ridge=0.01).phi)


@pytest.mark.parametrize("kind", ["dead", "doubled", "rank 8", "more dimensions than numbers"])
def test_singular_tables_are_measured_but_for_their_fisher_values(kind):
    x = draw_normal(100, 12)
    if kind == "dead":
        x[:, 5] = 0
    elif kind == "doubled":
        x[:, 5] = x[:, 4]
    elif kind == "rank 8":
        x = draw_normal(100, 8) @ draw_normal(8, 12, 1)
    else:
        x = draw_normal(100, 120)
    report = measure(x, settings=ProbeSettings([2, 5], pca=None, permuted=0, blocked=()))
    kappas = probe(x, [2, 5])
    for row in report.rows:
        assert row["kappa"] == kappas[row["period"]].kappa
        assert row["phi"] == pytest.approx(period_power(x, row["period"]))
        assert 0 < row["eta2"] < 1
        assert [row[name] for name in ("fisher", "cond", "bound_low", "bound_high")] == [None] * 4
    assert "probe/fisher_2" not in report.metrics()
    rank = {"rank 8": 8, "more dimensions than numbers": 95}.get(kind, 11)
    (sentence,) = report.notes
    assert sentence.startswith("no Fisher values of T = 2, 5: S_W of T = ")
    assert f"vary in {rank} of them" in sentence
    assert f"`--pca {rank}`" in sentence
    for options in (ProbeSettings([2], pca=min(rank, 25)), ProbeSettings([2], ridge=0.01)):
        report = measure(x, settings=options)
        assert report.notes == ()
        assert math.isfinite(report.rows[0]["cond"])
    statistics = scatter(x, 2, allow_singular=True)
    assert statistics.is_singular
    assert statistics.fisher.isnan().all()


@pytest.mark.parametrize(("radius", "components"), [(0.1, 8), (9.0, 0)])
def test_the_hint_about_a_singular_table_names_components_that_help(radius, components):
    noise = draw_normal(100, 8).reshape(20, 5, 8)
    circle = radius * planted(torch.arange(100), 5, 2, noise=0.0)  # does not vary within residues
    x = torch.cat([(noise - noise.mean(0)).reshape(100, 8), circle], 1)
    statistics = scatter(x, 5, allow_singular=True)
    assert statistics.regular == components
    _, hint = describe_singular(statistics)
    assert "--ridge 0.01" in hint
    assert ("--pca 8" in hint) == bool(components)
    assert scatter(x, 5, pca=8, allow_singular=True).is_singular != bool(components)


def test_traps_are_errors():  # (15)
    x = draw_normal(40, 3)
    same = x.clone()
    same[7] = same[30]
    none = x.clone()
    none[5] = 0
    broken = x.clone()
    broken[3, 1] = math.inf
    for table, numbers, message in (
        (same, None, "40 numbers have only 39 unique embeddings"),
        (none, None, "embeddings of 5 are all zero"),
        (broken, None, "embeddings of 3 are not finite"),
        (x, range(39), "40 embeddings and torch.int64 numbers of shape"),
        (x, [*range(39), 0], "numbers 0 come more than once"),
        (x[:, 0], None, r"of shape \(40,\)"),
        (x.long(), None, "torch.int64 of shape"),
    ):
        with pytest.raises(DataError, match=message):
            check_embeddings(table, numbers)
    assert len(check_embeddings(same, allow_duplicates=True)[0]) == 40
    with pytest.raises(DataError, match=r"21 follows 19.*up to 19"):
        spectrum(x[:30], [*range(20), *range(21, 31)])
    with pytest.raises(ConfigError, match=r"periods=\[11\] cannot be probed on 40 numbers"):
        period_power(x, 11)


def test_half_precision_is_read_as_it_is():
    x = planted(N, 10).to(torch.bfloat16)
    assert spectrum(x).magnitude.dtype == torch.float64
    assert period_power(x, 10) == pytest.approx(period_power(x.double(), 10))


def test_numbers_need_not_begin_at_zero():
    assert period_power(planted(N, 5), 5) == pytest.approx(
        period_power(planted(N + 3, 5), 5, N + 3), rel=0.01
    )


@pytest.mark.parametrize(
    ("period", "divisor", "kappa"),
    [(4, 2, 1 / 3), (6, 2, 0.2), (8, 2, 1 / 7), (10, 2, 1 / 9), (10, 5, 4 / 9), (5, 2, 0.0)],
)
def test_ceilings_of_divisors(period, divisor, kappa):
    assert ceiling(period, lambda n: n % divisor) == pytest.approx(kappa)


def test_ceilings_of_roundness():
    endings = {t: ceiling(t, lambda n: torch.where(n % 5 == 0, n % 10, -1)) for t in (3, 5, 10)}
    assert endings == pytest.approx({3: 0.0, 5: 0.25, 10: 2 / 9})
    assert ceiling(10, lambda n: n % 2, lambda n: n % 5 != 0) == pytest.approx(1 / 7)
