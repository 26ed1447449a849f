from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from fulgurite.models.fedsir import (
    adjusted_distillation,
    log_prior,
    logit_adjusted_cross_entropy,
    ramp,
    selective_distillation,
)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, 32, 5, generator=generator) * 3
    labels = torch.randint(5, (32,), generator=generator)
    return logits, labels, teacher, log_prior(torch.tensor([10, 5, 1, 84, 0]))


def test_prior_counts_a_missing_class_once():
    prior = log_prior(torch.tensor([8, 0, 1]))
    torch.testing.assert_close(prior.exp(), torch.tensor([0.8, 0.1, 0.1]))
    torch.testing.assert_close(log_prior(torch.tensor([8, 0, 1]), tau=0.5), prior / 2)


def test_a_masked_class_takes_no_part(batch):
    logits, labels, teacher, _ = batch
    labels = labels % 4
    prior = log_prior(torch.tensor([10, 5, 1, 84, 0]), mask_absent=True)
    assert prior[4] == -torch.inf
    assert torch.equal(log_prior(torch.tensor([3, 0]), 0.0, mask_absent=True), torch.zeros(2))
    adjusted = logit_adjusted_cross_entropy(logits, labels, prior)
    torch.testing.assert_close(
        adjusted, logit_adjusted_cross_entropy(logits[:, :4], labels, prior[:4])
    )
    student = logits.clone().requires_grad_()
    loss = adjusted_distillation(student, labels, teacher, 0.7, log_prior=prior)
    loss.backward()
    assert not student.grad[:, 4].any()
    # as if the log-probability of an absent class were 0, as in FedNoRo's code
    q = F.log_softmax(logits[:, :4] + prior[:4], 1)
    p = F.softmax(teacher / 0.8, 1)
    divergence = (p * p.log()).sum(1) - (p[:, :4] * q).sum(1)
    expected = 0.7 * divergence.mean() + 0.3 * F.nll_loss(q, labels)
    torch.testing.assert_close(loss.detach(), expected)


def test_uniform_prior_is_cross_entropy(batch):
    logits, labels, _, _ = batch
    loss = logit_adjusted_cross_entropy(logits, labels, log_prior(torch.full((5,), 7)))
    assert abs(loss - F.cross_entropy(logits, labels)) <= 1e-6


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_adjustment_adds_the_log_prior(batch, reduction):
    logits, labels, _, prior = batch
    torch.testing.assert_close(
        logit_adjusted_cross_entropy(logits, labels, prior, reduction),
        F.cross_entropy(logits + prior, labels, reduction=reduction),
    )


def test_unknown_reduction_is_refused(batch):
    logits, labels, _, prior = batch
    with pytest.raises(ValueError, match="batchmean"):
        logit_adjusted_cross_entropy(logits, labels, prior, "batchmean")


def test_distillation_ends(batch):
    logits, labels, teacher, prior = batch
    without = adjusted_distillation(logits, labels, teacher, 0.0, log_prior=prior)
    torch.testing.assert_close(without, logit_adjusted_cross_entropy(logits, labels, prior))
    only = adjusted_distillation(logits, labels, teacher, 1.0, log_prior=prior)
    expected = F.kl_div(
        F.log_softmax(logits + prior, 1), F.softmax(teacher / 0.8, 1), reduction="batchmean"
    )
    torch.testing.assert_close(only, expected)
    between = adjusted_distillation(logits, labels, teacher, 0.3, log_prior=prior)
    torch.testing.assert_close(between, 0.3 * only + 0.7 * without)


def test_distillation_stays_finite(batch):
    logits, labels, teacher, prior = batch
    loss = adjusted_distillation(logits * 1e3, labels, teacher * 1e4, 0.5, log_prior=prior)
    assert loss.isfinite()


def test_selection_mixes_by_fraction(batch):
    logits, labels, teacher, prior = batch
    chosen = torch.arange(32) < 12
    mixed = selective_distillation(logits, labels, teacher, chosen, weight=0.2, log_prior=prior)
    distilled = adjusted_distillation(logits[:12], labels[:12], teacher[:12], 0.2, log_prior=prior)
    plain = logit_adjusted_cross_entropy(logits[12:], labels[12:], prior)
    torch.testing.assert_close(mixed, 12 / 32 * distilled + 20 / 32 * plain)


def test_losses_map_over_clients(batch):
    logits, labels, teacher, prior = batch

    def gradient(logits, labels, teacher, chosen, weight, prior):
        return torch.func.grad(
            lambda x: selective_distillation(
                x, labels, teacher, chosen, weight=weight, log_prior=prior
            )
        )(logits)

    stacked = (
        torch.stack([logits, logits.flip(0)]),
        torch.stack([labels, labels]),
        torch.stack([teacher, teacher]),
        torch.stack([torch.arange(32) < 12, torch.arange(32) >= 0]),
        torch.tensor([0.2, 0.7]),
        torch.stack([prior, prior.flip(0)]),
    )
    mapped = torch.func.vmap(gradient)(*stacked)
    for k in range(2):
        torch.testing.assert_close(mapped[k], gradient(*(x[k] for x in stacked)))


def test_ramp_has_the_published_values():
    expected = {0: 0.00135, 2: 0.00135, 10: 0.0064, 20: 0.0298, 30: 0.0883, 49: 0.2, 99: 0.2}
    for round_, value in expected.items():
        assert ramp(round_) == pytest.approx(value, abs=1e-4)
    assert all(low <= high for low, high in pairwise(ramp(r) for r in range(100)))
    assert [ramp(r, begin=3, end=3, height=0.5) > 0.1 for r in (2, 3)] == [False, True]
