from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fulgurite.errors import DataError
from fulgurite.models.fedsir import SpectraAccumulator, class_spectra, client_score, similarity
from fulgurite.testing.planted import Planted, closed_form_off_mean, symmetric_noise


def planted_batch(rate=0.3, count=600, dim=48, seed=0):
    labels = torch.arange(count) % 6
    features = Planted.make(6, dim, 0.3, seed=seed).sample(labels, 1.0, seed=seed)
    return features, symmetric_noise(labels, rate, 6, seed=seed)


@pytest.mark.parametrize(("count", "dim"), [(60, 8), (60, 64), (12, 12), (200, 130)])
@pytest.mark.parametrize("streamed", [False, True])
def test_equal_to_the_thin_svd(count, dim, streamed):
    generator = torch.Generator().manual_seed(count)
    features = torch.randn(count, dim, generator=generator).relu() + 0.1
    labels = torch.randint(3, (count,), generator=generator)
    if streamed:
        accumulator = SpectraAccumulator(3, dim)
        for rows, classes in zip(features.split(7), labels.split(7), strict=True):
            accumulator.update(rows, classes)
        spectra = accumulator.compute()
    else:
        spectra = class_spectra(features, labels, 3)
    for c in range(3):
        rows = features[labels == c].double()
        _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
        rank = min(rows.shape)
        assert spectra.counts[c] == len(rows)
        assert spectra.rank[c] == rank
        torch.testing.assert_close(spectra.values[c, :rank], values, rtol=1e-9, atol=1e-7)
        assert not spectra.values[c, rank:].any()
        assert not spectra.vectors[c, rank:].any()
        # random spectra have no repeated values, so each direction is determined up to sign
        cosines = (spectra.vectors[c, :rank] * vectors).sum(1).abs()
        torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=0, atol=1e-6)
        gram = spectra.vectors[c, :rank] @ spectra.vectors[c, :rank].T
        torch.testing.assert_close(gram, torch.eye(rank).double(), rtol=0, atol=1e-6)


def test_rank_is_what_the_features_span():
    features = torch.randn(50, 3) @ torch.randn(3, 20)
    assert class_spectra(features.double(), torch.zeros(50).long(), 1).rank.item() == 3
    dead = torch.cat([features.double(), torch.zeros(50, 20)], 1)  # units that never fire
    assert class_spectra(dead, torch.zeros(50).long(), 1).rank.item() == 3


@pytest.mark.parametrize(
    "rho", [0.4, *(pytest.param(rho, marks=pytest.mark.slow) for rho in (0.2, 0.6))]
)
def test_off_mean_has_its_closed_form(rho):
    labels = torch.arange(5000) % 10
    features = Planted.make(10, 512, rho).sample(labels, 1.0)
    for rate in (0.1, 0.5, 0.7):
        score = client_score(class_spectra(features, symmetric_noise(labels, rate, 10), 10))
        assert abs(score[0].item() - closed_form_off_mean(rho, rate)) <= 0.01


def test_closed_form_is_the_published_table():
    table = {0.2: (0.2, 0.211, 0.248, 0.329, 0.599), 0.6: (0.6, 0.637, 0.732, 0.851, 0.960)}
    for rho, row in table.items():
        for rate, expected in zip((0.0, 0.1, 0.3, 0.5, 0.7), row, strict=True):
            assert closed_form_off_mean(rho, rate) == pytest.approx(expected, abs=6e-4)


def test_a_centred_svd_would_fail_the_closed_form():
    labels = torch.arange(5000) % 10
    features = Planted.make(10, 64, 0.4).sample(labels, 1.0)
    means = torch.stack([features[labels == c].mean(0) for c in range(10)])
    centred = client_score(class_spectra(features - means[labels], labels, 10))
    assert abs(centred[0].item() - closed_form_off_mean(0.4, 0.0)) > 0.1


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e3), rate=st.sampled_from([0.0, 0.5]))
def test_score_does_not_depend_on_what_it_must_not(seed, scale, rate):
    features, labels = planted_batch(rate, seed=seed % 5)
    score = client_score(class_spectra(features, labels, 6))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    rotation = torch.linalg.qr(torch.randn(48, 48, generator=generator).double())[0]
    renamed = torch.randperm(6, generator=generator)[labels]
    for other in (
        class_spectra(features[order], labels[order], 6),
        class_spectra(features @ rotation, labels, 6),
        class_spectra(features * scale, labels, 6),
        class_spectra(-features, labels, 6),
        class_spectra(features, renamed, 6),  # a consistent renaming cannot be seen
    ):
        torch.testing.assert_close(client_score(other), score, rtol=0, atol=1e-5)


def test_score_ignores_the_sign_of_directions():
    spectra = class_spectra(*planted_batch(), 6)
    score = client_score(spectra)
    spectra.vectors[::2] *= -1
    torch.testing.assert_close(client_score(spectra), score, rtol=0, atol=1e-12)


def test_score_rises_with_noise():
    scores = [
        client_score(class_spectra(*planted_batch(rate), 6))[0].item() for rate in (0, 0.2, 0.5)
    ]
    assert all(low + 0.02 < high for low, high in pairwise(scores))


def test_missing_and_small_classes_are_left_out():
    features, labels = planted_batch()
    kept = (labels < 3) | ((labels == 3) & (torch.arange(len(labels)) < 40))
    cosines = similarity(class_spectra(features[kept], labels[kept], 6))
    assert 0 < (labels[kept] == 3).sum() < 20
    assert cosines[:3, :3].isfinite().all()
    assert cosines[3:].isnan().all()
    assert cosines[:, 3:].isnan().all()
    assert torch.equal(cosines[:3, :3].diagonal(), torch.ones(3).double())
    without = client_score(class_spectra(features[labels < 3], labels[labels < 3], 3))
    torch.testing.assert_close(
        client_score(class_spectra(features[kept], labels[kept], 6)), without
    )


def test_all_present_classes_count_where_fewer_than_two_are_large():
    features, labels = planted_batch()
    few = torch.cat([(labels == c).nonzero()[: 30 if c == 0 else 1, 0] for c in range(3)])
    cosines = similarity(class_spectra(features[few], labels[few], 6))
    assert cosines[:3, :3].isfinite().all()
    assert cosines[3:].isnan().all()


@pytest.mark.parametrize("count", [0, 1, 30])
def test_fewer_than_two_classes_have_no_score(count):
    features = torch.randn(count, 5)
    assert client_score(class_spectra(features, torch.zeros(count).long(), 4)).isnan().all()


def test_zero_and_infinite_features_leave_their_class_out():
    features, labels = planted_batch()
    features[labels == 1] = 0
    features[(labels == 2).nonzero()[0]] = torch.nan
    accumulator = SpectraAccumulator(6, 48)
    accumulator.update(features, labels)
    for spectra in (class_spectra(features, labels, 6), accumulator.compute()):
        assert spectra.rank[1] == spectra.rank[2] == 0
        assert spectra.vectors.isfinite().all()
        assert client_score(spectra).isfinite().all()
        assert similarity(spectra)[1:3].isnan().all()


def test_chunks_are_the_whole():
    features, labels = planted_batch()
    accumulator = SpectraAccumulator(6, 48)
    accumulator.update(features, labels)
    chunks = list(accumulator.chunks(max_bytes=2 * 8 * 48 * 48))
    assert [len(chunk.counts) for chunk in chunks] == [2, 2, 2]
    assert torch.equal(torch.cat([c.vectors for c in chunks]), accumulator.compute().vectors)
    assert torch.equal(accumulator.counts, torch.bincount(labels))
    torch.testing.assert_close(
        client_score(accumulator), client_score(class_spectra(features, labels, 6))
    )


@pytest.mark.parametrize(
    ("features", "labels"),
    [
        (torch.zeros(3, 2), torch.tensor([0, 1])),
        (torch.zeros(3, 2, 1), torch.tensor([0, 1, 0])),
        (torch.zeros(2, 2), torch.tensor([0, 4])),
        (torch.zeros(2, 2), torch.tensor([-1, 0])),
    ],
)
def test_inputs_that_do_not_fit_are_refused(features, labels):
    with pytest.raises(DataError):
        class_spectra(features, labels, 4)
    with pytest.raises(DataError):
        SpectraAccumulator(4, 2).update(features, labels)
