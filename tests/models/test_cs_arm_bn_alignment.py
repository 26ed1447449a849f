"""DANN and DeepCORAL with plates as domains."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fakes.cs_arm_bn import small_classifier

from fulgurite.domains.cs_arm_bn import MIXED, PlateBatch
from fulgurite.errors import ConfigError, DataError
from fulgurite.models.cs_arm_bn import DANN, ERM, DeepCORAL
from fulgurite.models.cs_arm_bn.batchnorm import Context
from fulgurite.models.cs_arm_bn.embedding import embed
from fulgurite.models.cs_arm_bn.methods.alignment import coral_distance, reversal_strength

K, PLATES = 3, 4


def make_module(method):
    module = small_classifier(method, classes=K, channels=2)
    module.method.prepare_domains(PLATES)
    return module


def make_batch(plates=(0, 0, 0, 2, 2, 2, 3, 3, 3)):
    count = len(plates)
    query = torch.randn(count, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    query = query + torch.tensor(plates).view(-1, 1, 1, 1)
    batch = PlateBatch.from_images(query, query[:0], torch.arange(count) % K, MIXED)
    return batch._replace(query_domain=torch.tensor(plates))


def outputs(module, batch, progress=1.0):
    return module.method.training_outputs(module.network, batch, Context("ordinary"), progress)


def test_the_distance_of_covariances_is_its_definition():
    g = np.random.default_rng(0)
    a, b = g.normal(size=(7, 5)), 2 * g.normal(size=(9, 5))
    expected = np.linalg.norm(np.cov(a.T) - np.cov(b.T), "fro") ** 2 / (4 * 5**2)
    ours = coral_distance(torch.from_numpy(a), torch.from_numpy(b))
    assert float(ours) == pytest.approx(expected, rel=1e-5)
    assert float(coral_distance(torch.from_numpy(a), torch.from_numpy(a + 3))) < 1e-10


def test_the_penalty_is_the_mean_over_pairs_of_plates():
    module, batch = make_module(DeepCORAL(weight=0.7)).eval(), make_batch()
    logits, penalty = outputs(module, batch)
    assert torch.equal(logits, module.network(batch.query))
    groups = embed(module.network, batch.query).split(3)
    pairs = [(0, 1), (0, 2), (1, 2)]
    mean = sum(coral_distance(groups[i], groups[j]) for i, j in pairs) / 3
    torch.testing.assert_close(penalty, 0.7 * mean)


def test_covariances_become_alike():
    module, batch = make_module(DeepCORAL(weight=100.0)), make_batch()
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    penalties = []
    for _ in range(15):
        logits, penalty = outputs(module, batch)
        penalties.append(penalty.item())
        optimizer.zero_grad()
        (F.cross_entropy(logits, batch.label) + penalty).backward()
        optimizer.step()
    assert penalties[-1] < 0.3 * penalties[0]


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_the_gradient_is_reversed_before_the_features_and_not_within_the_discriminator(progress):
    module, batch = make_module(DANN(weight=0.5)).eval(), make_batch()
    _, penalty = outputs(module, batch, progress)
    penalty.backward()
    reversed_, own = (
        {n: p.grad.clone() for n, p in part.named_parameters() if p.grad is not None}
        for part in (module.network, module.method.discriminator)
    )
    module.zero_grad()
    features = embed(module.network, batch.query)
    plain = 0.5 * F.cross_entropy(module.method.discriminator(features), batch.query_domain)
    plain.backward()
    torch.testing.assert_close(penalty, plain)
    for name, p in module.method.discriminator.named_parameters():
        torch.testing.assert_close(own[name], p.grad)
    strength = reversal_strength(progress)
    for name, gradient in reversed_.items():
        expected = module.network.get_parameter(name).grad
        torch.testing.assert_close(gradient, -strength * expected, atol=1e-6, rtol=1e-4)


def test_the_strength_follows_the_paper():
    for p in (0.0, 0.1, 0.5, 1.0):
        assert reversal_strength(p) == pytest.approx(np.tanh(5 * p))


def test_a_checkpoint_of_other_plates_can_be_tested():
    trained = make_module(DANN())
    trained.method.prepare_domains(7)
    for count in (None, 2):
        other = make_module(DANN())
        other.method.discriminator = None
        if count:
            other.method.prepare_domains(count)
        other.load_state_dict(trained.state_dict())
        assert other.method.discriminator[2].out_features == 7


@pytest.mark.parametrize("method", [DANN, DeepCORAL])
def test_batches_of_one_plate_are_refused(method):
    module = make_module(method())
    with pytest.raises(DataError, match=r"aligns plates.*plates=4"):
        outputs(module, make_batch((1, 1, 1)))


def test_single_images_of_a_plate_are_refused():
    with pytest.raises(DataError, match="two queries of each plate"):
        outputs(make_module(DeepCORAL()), make_batch((0, 0, 1)))


def test_wrong_settings_are_refused():
    for make in (
        lambda: DANN(weight=-1), lambda: DANN(hidden=0), lambda: DANN(gamma=0),
        lambda: DeepCORAL(weight=-1),
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            make()
    module = make_module(DANN())
    module.method.discriminator = None
    with pytest.raises(ConfigError, match="number of plates"):
        outputs(module, make_batch())


def test_at_test_they_are_ordinary_networks():
    batch, logits = make_batch(), []
    for method in (ERM, DANN, DeepCORAL):
        module = make_module(method()).eval()
        logits.append(module.method.logits(module.network, batch, Context("source")))
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
