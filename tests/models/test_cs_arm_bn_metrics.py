"""Metrics of images, wells and plates, on one rank and on several."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import precision_recall_fscore_support

from fulgurite.domains.cs_arm_bn import PlateBatch
from fulgurite.models.cs_arm_bn.metrics import (
    Predictions,
    accuracy_by_domain,
    class_scores,
    confusion,
    join_predictions,
    scores,
    select_predictions,
)

K = 3


def make_batch(index, domain, counted=None):
    index = torch.as_tensor(index)
    images = torch.zeros(len(index), 1, 1, 1)
    batch = PlateBatch.from_images(images, images[:0], index // 2 % K, domain)
    batch = batch._replace(row=index, well=10 * domain + index // 2)
    return batch if counted is None else batch._replace(counted=torch.tensor(counted))


def logits(n, seed):
    return torch.randn(n, K, generator=torch.Generator().manual_seed(seed))


def test_batches_repeated_by_a_sampler_count_once():
    """Two ranks, three batches: the sampler gives the second rank the first batch again."""
    batches = [make_batch(range(4 * i, 4 * i + 4), i % 2) for i in range(3)]
    parts = [select_predictions(b, logits(4, i)) for i, b in enumerate(batches)]
    ranks = [[parts[0], parts[2]], [parts[1], parts[0]]]
    alone = join_predictions(parts, K)
    for order in (ranks, ranks[::-1]):
        both = join_predictions([part for rank in order for part in rank], K)
        for ours, theirs in zip(both, alone, strict=True):
            assert torch.equal(ours, theirs)  # so every metric is equal to the last bit
    assert len(alone.row) == 12
    assert scores(alone)["acc"] == pytest.approx(
        float(torch.cat([p.log_probs.argmax(1) == p.label for p in parts]).float().mean())
    )


def test_an_image_of_two_different_batches_counts_twice():
    first, second = make_batch([1, 2, 3], 0), make_batch([3, 2, 7], 0)
    parts = [select_predictions(first, logits(3, 0)), select_predictions(second, logits(3, 1))]
    both = join_predictions(parts, K)
    assert sorted(both.row.tolist()) == [1, 2, 2, 3, 3, 7]


def test_padding_and_unknown_labels_do_not_count():
    batch = make_batch([1, 2, 3, 1], 0, counted=[True, True, True, False])
    batch.label[1] = -1
    assert select_predictions(batch, logits(4, 0)).row.tolist() == [1, 3]


def predictions(label, predicted, domain=None, well=None):
    label, predicted = torch.tensor(label), torch.tensor(predicted)
    n = torch.arange(len(label))
    log_probs = torch.full((len(n), K), 0.1).scatter(1, predicted[:, None], 0.8).log()
    domain = n * 0 if domain is None else torch.tensor(domain)
    well = n if well is None else torch.tensor(well)
    return Predictions(n, n, domain, well, label, log_probs, n * 0 + 4, n * 0 + 4)


def test_macro_counts_classes_alike_and_the_worst_plate_shows():
    rows = predictions([0, 0, 0, 1], [0, 0, 0, 2], domain=[0, 0, 1, 1])
    found = scores(rows)
    assert found["acc"] == 0.75
    assert found["macro_acc"] == 0.5
    assert accuracy_by_domain(rows) == {0: 1.0, 1: 0.5}
    assert (found["plate_acc"], found["worst_plate_acc"]) == (0.75, 0.5)
    assert found["loss"] == pytest.approx(
        -(3 * torch.tensor(0.8).log() + torch.tensor(0.1).log()) / 4
    )


def test_a_well_is_decided_by_all_its_sites():
    rows = predictions([0, 0, 0, 1, 1, 1], [0, 0, 2, 2, 2, 1], well=[5, 5, 5, 9, 9, 9])
    found = scores(rows)
    assert found["acc"] == 0.5
    assert found["well_acc"] == found["well_macro_acc"] == 0.5
    unsure = rows._replace(
        log_probs=torch.tensor(
            [[0.4, 0.6, 0], [0.4, 0.6, 0], [0.9, 0.1, 0]] + [[0, 1.0, 0]] * 3
        ).log()
    )
    assert scores(unsure)["well_acc"] == 1.0  # probabilities are averaged, not votes


def test_confusion_adds_up():
    g = torch.Generator().manual_seed(0)
    label, predicted = torch.randint(K, (2, 50), generator=g)
    counts = confusion(label, predicted, K)
    assert counts.sum() == 50
    assert counts.diag().sum() == (label == predicted).sum()
    assert torch.equal(counts.sum(1), torch.bincount(label, minlength=K))


def test_nothing_predicted_is_no_metric():
    assert scores(join_predictions([], K)) == {}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40))
def test_scores_of_classes_are_those_of_scikit_learn(pairs):
    label, predicted = torch.tensor(pairs).T
    counts = confusion(label, predicted, 5)
    expected = precision_recall_fscore_support(
        label, predicted, labels=range(5), average=None, zero_division=0
    )
    for ours, theirs in zip(class_scores(counts).values(), expected[:3], strict=True):
        assert ours.tolist() == pytest.approx(theirs.tolist())
    index = torch.arange(len(label))
    rows = Predictions(*[index] * 4, label, 9.0 * torch.eye(5)[predicted], index, index)
    macro = precision_recall_fscore_support(label, predicted, average="macro", zero_division=0)
    names = ("macro_precision", "macro_recall", "macro_f1")
    assert [scores(rows)[name] for name in names] == pytest.approx(macro[:3])
