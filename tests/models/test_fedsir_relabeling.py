from dataclasses import fields, replace

import pytest
import torch

from fulgurite.errors import ConfigError, DataError
from fulgurite.models.fedsir import (
    SpectraAccumulator,
    aggregate_references,
    choose_k,
    class_spectra,
    client_reference,
    relabel,
)
from fulgurite.testing.planted import Planted, symmetric_noise

CLASSES = 10


def reference_of(planted, sigma, counts, seed):
    """Reference of a clean client with so many samples of each class."""
    labels = torch.arange(CLASSES).repeat_interleave(torch.as_tensor(counts).expand(CLASSES))
    features = planted.sample(labels, sigma, seed=seed)
    return client_reference(class_spectra(features, labels, CLASSES))


def references_of(planted, sigma, counts=300, clients=3):
    return aggregate_references(
        [reference_of(planted, sigma, counts, 100 + k) for k in range(clients)]
    )


@pytest.fixture(scope="module")
def anisotropic():
    planted = Planted.make(CLASSES, 64, 0.5, subspace=8)
    true = torch.arange(3000) % CLASSES
    return planted, references_of(planted, 1.0), planted.sample(true, 1.0, seed=200), true


@pytest.fixture(scope="module")
def isotropic():
    planted = Planted.make(CLASSES, 64, 0.2)
    true = torch.arange(3000) % CLASSES
    return planted, references_of(planted, 1.0), planted.sample(true, 1.0, seed=200), true


def accuracy(labels, true):
    return (labels == true).double().mean().item()


@pytest.mark.parametrize(
    ("values", "k"),
    [
        ([100] + [1] * 400, 356),
        ([10] + [1] * 20, 19),
        ([1] * 12, 11),
        ([1] * 5, 5),
        ([7], 1),
        ([1, 0, 0], 1),
    ],
)
def test_choose_k(values, k):
    values = torch.tensor(values, dtype=torch.float64)
    assert choose_k(values) == k
    assert choose_k(torch.stack([values, values])).tolist() == [k, k]


def test_client_reference_is_the_definition():
    features = torch.randn(80, 24, generator=torch.Generator().manual_seed(0)).double().relu() + 0.2
    labels = torch.arange(80) % 2
    spectra = class_spectra(features, labels, 3)
    reference = client_reference(spectra)
    for c in range(2):
        _, s, v = torch.linalg.svd(features[labels == c], full_matrices=False)
        k = int(choose_k(s))
        rows = v[k : k + 12]
        assert reference.rows[c] == len(rows)
        projector = rows.T @ rows
        own = reference.residual[c, : len(rows)]
        torch.testing.assert_close(own.T @ own, projector, rtol=0, atol=1e-8)
        assert abs(reference.direction[c] @ v[0]).item() == pytest.approx(1)
        quality = (s[0] - s[1]) / s[0] * s[0] / s.sum()
        assert reference.weight[c].item() == pytest.approx(40 * quality.item())
    assert not reference.valid[2]
    assert reference.weight[2] == 0

    accumulator = SpectraAccumulator(3, 24)
    accumulator.update(features, labels)
    streamed = client_reference(accumulator)
    torch.testing.assert_close(streamed.weight, reference.weight)
    assert torch.equal(streamed.rows, reference.rows)


def test_consensus_is_the_eigenvectors_of_the_projector_means():
    planted = Planted.make(CLASSES, 32, 0.3)
    clients = [reference_of(planted, 1.0, n, seed) for seed, n in enumerate((300, 200, 150))]
    references = aggregate_references(clients)
    for c in (0, 7):
        weight = torch.stack([r.weight[c] for r in clients])
        weight = weight / weight.sum()
        direct = sum(
            w * torch.outer(r.direction[c], r.direction[c])
            for w, r in zip(weight, clients, strict=True)
        )
        top = torch.linalg.eigh(direct).eigenvectors[:, -1]
        assert abs(top @ references.direction[c]).item() == pytest.approx(1)
        direct = sum(
            w * r.residual[c].T @ r.residual[c] for w, r in zip(weight, clients, strict=True)
        )
        top = torch.linalg.eigh(direct).eigenvectors[:, -12:]
        own = references.residual[c]
        assert references.rows[c] == 12
        torch.testing.assert_close(own.T @ own, top @ top.T, rtol=0, atol=1e-6)
    # the order of the clients says nothing
    other = aggregate_references(clients[::-1])
    torch.testing.assert_close(
        other.residual.mT @ other.residual, references.residual.mT @ references.residual
    )


def test_without_a_large_client_the_largest_stands_alone():
    planted = Planted.make(CLASSES, 32, 0.3)
    clients = [reference_of(planted, 1.0, n, seed) for seed, n in enumerate((60, 90))]
    references = aggregate_references(clients)
    assert references.valid.all()
    assert torch.equal(references.direction, clients[1].direction)
    assert torch.equal(references.residual, clients[1].residual)


def test_clients_that_disagree_leave_it_to_the_largest():
    clients = [reference_of(Planted.make(CLASSES, 32, 0.3), 1.0, n, 0) for n in (120, 130)]
    turned = replace(clients[0], direction=clients[0].direction.roll(1, 0))
    equal = [replace(r, weight=torch.ones_like(r.weight)) for r in (turned, clients[1])]
    merged = aggregate_references(equal, consensus=0.03)
    alone = aggregate_references(equal, consensus=1.1)
    assert torch.equal(alone.direction, clients[1].direction)
    # cosine .3 leaves λ1 − λ2 = .3
    assert not torch.allclose(merged.direction.abs(), clients[1].direction.abs(), atol=1e-3)


@pytest.mark.parametrize("rate", [0.3, 0.6, 0.9])
def test_relabel_mends_classes_with_their_own_subspace(anisotropic, rate):
    _, references, features, true = anisotropic
    given = symmetric_noise(true, rate, CLASSES)
    result = relabel(features, given, references)
    assert accuracy(given, true) == pytest.approx(1 - rate, abs=1e-6)
    assert accuracy(result.labels, true) >= 0.99
    assert accuracy(result.labels[result.agree], true[result.agree]) >= 0.99
    assert torch.equal(result.accepted, result.agree)
    assert torch.equal(result.labels[~result.agree], given[~result.agree])
    assert ((result.labels == given) | (result.labels == result.by_direction)).all()


def test_agreement_abstains_where_there_is_no_subspace(isotropic):
    _, references, features, true = isotropic
    given = symmetric_noise(true, 0.6, CLASSES)
    assert 0.65 <= accuracy(relabel(features, given, references).labels, true) <= 0.76
    assert accuracy(relabel(features, given, references, mode="sr").labels, true) >= 0.99


def test_references_of_the_wrong_classes_do_harm(anisotropic):
    _, references, features, true = anisotropic
    given = symmetric_noise(true, 0.3, CLASSES)
    deranged = replace(
        references,
        direction=references.direction.roll(1, 0),
        residual=references.residual.roll(1, 0),
    )
    assert accuracy(relabel(features, given, deranged).labels, true) < accuracy(given, true)


@pytest.mark.parametrize("mode", ["agree", "sr", "sn", "ratio", "agree_then_ratio"])
def test_decision_does_not_see_the_labels(isotropic, mode):
    _, references, features, true = isotropic
    generator = torch.Generator().manual_seed(0)
    first = relabel(features, symmetric_noise(true, 0.5, CLASSES), references, mode=mode)
    other = relabel(
        features, torch.randint(CLASSES, true.shape, generator=generator), references, mode=mode
    )
    for name in {field.name for field in fields(first)} - {"labels"}:
        assert torch.equal(getattr(first, name), getattr(other, name)), name
    assert torch.equal(first.labels[first.accepted], other.labels[other.accepted])


def test_modes_name_the_class_they_say(isotropic):
    _, references, features, true = isotropic
    given = symmetric_noise(true, 0.5, CLASSES)
    run = {m: relabel(features, given, references, mode=m) for m in ("sr", "sn", "ratio", "agree")}
    assert torch.equal(run["sr"].labels, run["sr"].by_direction)
    assert torch.equal(run["sn"].labels, run["sn"].by_residual)
    ratio = run["ratio"].residual_scores / (run["ratio"].direction_scores + 1e-6)
    assert torch.equal(run["ratio"].labels, ratio.argmin(1))
    for rule in ("sr", "sn", "ratio"):
        result = relabel(features, given, references, mode=f"agree_then_{rule}")
        agree = result.agree
        assert torch.equal(result.labels[agree], run["agree"].labels[agree])
        assert torch.equal(result.labels[~agree], run[rule].labels[~agree])
    with pytest.raises(ConfigError, match="spectral"):
        relabel(features, given, references, mode="spectral")


def test_scores_are_their_definition(isotropic):
    _, references, features, true = isotropic
    result = relabel(features, true, references)
    unit = features[5] / features[5].norm()
    for c in (0, 4):
        assert result.direction_scores[5, c].item() == pytest.approx(
            abs(unit @ references.direction[c]).item()
        )
        rows = references.residual[c, : references.rows[c]]
        assert result.residual_scores[5, c].item() == pytest.approx(
            ((rows @ unit).norm() / len(rows) ** 0.5).item()
        )
    scaled = relabel(features * 37, true, references)
    torch.testing.assert_close(scaled.confidence, result.confidence)


def test_confidence_ranks_proposals():
    planted = Planted.make(CLASSES, 64, 0.5)
    true = torch.arange(3000) % CLASSES
    features = planted.sample(true, 2.0, seed=3)
    result = relabel(features, true, references_of(planted, 2.0), mode="sr")
    right = result.proposal == true
    assert 0.8 < right.double().mean() < 0.95
    assert ((result.confidence >= 0) & (result.confidence <= 1)).all()
    order = result.confidence.argsort()
    assert right[order[-1000:]].double().mean() > right[order[:1000]].double().mean() + 0.1
    sure = relabel(features, 9 - true, references_of(planted, 2.0), mode="sr", min_confidence=0.3)
    assert torch.equal(sure.accepted, result.confidence >= 0.3)
    assert torch.equal(sure.labels[~sure.accepted], (9 - true)[~sure.accepted])


def test_a_class_without_reference_abstains(anisotropic):
    planted, _, features, true = anisotropic
    counts = torch.full((CLASSES,), 300)
    counts[4] = 0
    references = references_of(planted, 1.0, counts)
    assert references.valid.tolist() == [c != 4 for c in range(CLASSES)]
    given = symmetric_noise(true, 0.5, CLASSES)
    result = relabel(features, given, references)
    assert torch.equal(result.labels[given == 4], given[given == 4])
    assert not result.accepted[given == 4].any()
    assert not ((result.labels == 4) & (given != 4)).any()
    # nothing that was right has been made wrong
    assert (result.labels == true)[given == true].double().mean() >= 0.99
    assert (
        accuracy(result.labels[(true != 4) & (given != 4)], true[(true != 4) & (given != 4)]) > 0.99
    )


@pytest.mark.parametrize("count", [1, 2, 5, 12, 19])
def test_a_tiny_class_abstains(anisotropic, count):
    planted, _, features, true = anisotropic
    counts = torch.full((CLASSES,), 300)
    counts[0] = count
    references = references_of(planted, 1.0, counts, clients=1)
    assert references.valid.tolist() == [c != 0 for c in range(CLASSES)]
    given = symmetric_noise(true, 0.5, CLASSES)
    result = relabel(features, given, references)
    others = (true != 0) & (given != 0)
    # an empty residual would fit perfectly and draw all samples to class 0
    assert (result.by_residual != 0).all()
    assert accuracy(result.labels[others], true[others]) >= 0.99


def test_an_empty_residual_abstains_however_many_samples():
    features = torch.tensor([[1.0, 2.0, 3.0]]).repeat(200, 1)  # rank 1
    reference = client_reference(class_spectra(features, torch.zeros(200).long(), 2))
    assert reference.rows.tolist() == [0, 0]
    references = aggregate_references([reference])
    assert not references.valid.any()
    given = torch.arange(6) % 2
    result = relabel(torch.randn(6, 3), given, references)
    assert torch.equal(result.labels, given)
    assert not result.agree.any()


def test_features_that_say_nothing_keep_their_label(anisotropic):
    _, references, features, true = anisotropic
    features = features[:20].clone()
    features[3] = 0
    features[4, 0] = torch.nan
    features[5, 0] = torch.inf
    given = (true[:20] + 1) % CLASSES
    for mode in ("agree", "sr", "ratio"):
        result = relabel(features, given, references, mode=mode)
        assert torch.equal(result.labels[3:6], given[3:6])
        assert not result.agree[3:6].any()
        assert not result.confidence[3:6].any()


def test_no_samples(anisotropic):
    _, references, features, _ = anisotropic
    result = relabel(features[:0], torch.zeros(0).long(), references)
    assert result.labels.shape == (0,)


def test_what_does_not_fit_is_refused(anisotropic):
    planted, references, features, true = anisotropic
    with pytest.raises(DataError, match="clean client"):
        aggregate_references([])
    with pytest.raises(DataError, match="dimension"):
        relabel(features[:, 1:], true, references)
    other = client_reference(class_spectra(features[:, 1:], true, CLASSES))
    with pytest.raises(DataError, match="shapes"):
        aggregate_references([other, reference_of(planted, 1.0, 30, 0)])
