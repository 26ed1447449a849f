"""Label noise and the choice of noisy clients.

Source: docs/papers/fedsir.md section 5, check 10, and section 2.
"""

import pytest
import torch

from fulgurite.datamodules.fedsir import (
    AsymmetricMap,
    Dirichlet,
    InstanceDependent,
    NoisyClients,
    Pair,
    Symmetric,
)
from fulgurite.datamodules.fedsir.noise import CIFAR10_MAP, LabelNoise
from fulgurite.datamodules.fedsir.noisy_clients import clean_cover_clients
from fulgurite.datamodules.fedsir.selection import make_generator
from fulgurite.errors import ConfigError, DataError

CIFAR_LABELS = torch.arange(50_000) % 10


def uneven_labels():
    """7, 14, ... 70 samples of ten classes, shuffled."""
    labels = torch.repeat_interleave(torch.arange(10), 7 * (torch.arange(10) + 1))
    return labels[torch.randperm(len(labels), generator=make_generator(3))]


def pictures(labels):
    generator = make_generator(5)
    return torch.randint(0, 256, (len(labels), 3, 6, 6), generator=generator, dtype=torch.uint8)


def pairs(labels, noisy):
    wrong = labels != noisy
    return set(zip(labels[wrong].tolist(), noisy[wrong].tolist(), strict=True))


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("noise", [Symmetric(), Pair(), InstanceDependent()])
def test_each_class_has_exactly_the_asked_number_of_wrong_labels(noise, rate):
    labels = uneven_labels()
    noisy = noise(labels, rate, 10, make_generator(0), images=pictures(labels))
    wrong = torch.bincount(labels[noisy != labels], minlength=10).tolist()
    assert wrong == [round(rate * n) for n in torch.bincount(labels).tolist()]
    assert noisy.min() >= 0
    assert noisy.max() <= 9
    assert noisy.dtype == torch.int64


def test_asymmetric_noise_hits_only_the_mapped_classes_exactly():
    labels = uneven_labels()
    noisy = AsymmetricMap()(labels, 0.3, 10, make_generator(0))
    wrong = torch.bincount(labels[noisy != labels], minlength=10).tolist()
    sizes = torch.bincount(labels).tolist()
    assert wrong == [round(0.3 * n) if c in CIFAR10_MAP else 0 for c, n in enumerate(sizes)]


def test_the_pairs_of_true_and_wrong_class():
    generator = make_generator(0)
    assert len(pairs(CIFAR_LABELS, Symmetric()(CIFAR_LABELS, 0.5, 10, generator))) == 90
    asymmetric = AsymmetricMap()(CIFAR_LABELS, 0.4, 10, generator)
    assert pairs(CIFAR_LABELS, asymmetric) == {(9, 1), (2, 0), (3, 5), (5, 3), (4, 7)}
    shifted = Pair()(CIFAR_LABELS, 0.4, 10, generator)
    assert pairs(CIFAR_LABELS, shifted) == {(c, (c + 1) % 10) for c in range(10)}


def test_symmetric_noise_is_uniform_over_the_other_classes():
    for seed in range(3):
        noisy = Symmetric()(CIFAR_LABELS, 0.5, 10, make_generator(seed))
        wrong = noisy != CIFAR_LABELS
        offset = (noisy - CIFAR_LABELS)[wrong] % 10
        table = torch.bincount((CIFAR_LABELS[wrong] * 9 + offset - 1), minlength=90).double()
        expected = 2500 / 9
        statistic = float(((table - expected) ** 2 / expected).sum())
        assert 43.8 < statistic < 128.3  # chi-square, 80 degrees of freedom, 0.0005 on each side


def test_which_samples_are_flipped_is_uniform():
    labels = torch.zeros(100, dtype=torch.int64)
    hits = torch.zeros(100)
    for seed in range(200):
        hits += Pair()(labels, 0.3, 2, make_generator(seed))
    expected = 60
    statistic = float(((hits - expected) ** 2 / (expected * 0.7)).sum())
    assert 56 < statistic < 155  # chi-square, 99 degrees of freedom, 0.0002 on each side


def test_instance_dependent_noise_follows_the_image():
    labels = torch.zeros(400, dtype=torch.int64)
    kinds = pictures(torch.arange(4))  # four images, 100 copies of each
    images = kinds.repeat_interleave(100, 0)
    noisy = InstanceDependent(temperature=0.25)(labels, 0.5, 6, make_generator(0), images=images)
    tables = torch.stack([torch.bincount(n, minlength=6) for n in noisy.split(100)]).double()
    expected = tables.mean(0).clamp_min(0.25)
    assert float(((tables - expected) ** 2 / expected).sum()) > 100  # 15 degrees of freedom
    with pytest.raises(ConfigError, match="no images"):
        InstanceDependent()(labels, 0.5, 6, make_generator(0))


@pytest.mark.parametrize("noise", [Symmetric(), Pair(), AsymmetricMap(), InstanceDependent()])
def test_noise_repeats_and_leaves_its_input_alone(noise):
    labels = uneven_labels()
    before, images = labels.clone(), pictures(labels)
    first = noise(labels, 0.4, 10, make_generator(1), images=images)
    assert first.equal(noise(labels, 0.4, 10, make_generator(1), images=images))
    assert not first.equal(noise(labels, 0.4, 10, make_generator(2), images=images))
    assert labels.equal(before)


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan"), (0.5, 0.2), (0.1, 1.2)])
def test_a_rate_outside_the_unit_interval_is_a_config_error(rate):
    with pytest.raises(ConfigError, match=r"noise rate .*outside \[0, 1\]"):
        NoisyClients(Symmetric(), rate)
    if isinstance(rate, float):
        with pytest.raises(ConfigError, match="noise rate"):
            Symmetric()(CIFAR_LABELS, rate, 10, make_generator(0))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rate": [0.1, 0.2, 0.3]}, "rate is"),
        ({"rate": "0.5"}, "rate is '0.5'"),
        ({"rate": 0.5, "count": 1.5}, "count is 1.5"),
        ({"rate": 0.5, "clean_cover": True}, "clean_cover is True"),
    ],
)
def test_arguments_of_another_type_are_config_errors(arguments, words):
    with pytest.raises(ConfigError, match=words):
        NoisyClients(Symmetric(), **arguments)


def test_maps_that_do_not_fit_are_config_errors():
    with pytest.raises(ConfigError, match="class 'cat', which is no number"):
        AsymmetricMap({"cat": "dog"})
    with pytest.raises(ConfigError, match="class 3 to itself"):
        AsymmetricMap({3: 3})
    with pytest.raises(ConfigError, match="class 5, and there are 5 classes"):
        AsymmetricMap()(CIFAR_LABELS % 5, 0.1, 5, make_generator(0))
    with pytest.raises(ConfigError, match="one class"):
        Symmetric()(torch.zeros(4, dtype=torch.int64), 0.1, 1, make_generator(0))


@pytest.fixture(scope="module")
def parts():
    return Dirichlet(2.0)(CIFAR_LABELS, 10, 10, make_generator(0))


def covered(labels, parts, clean, threshold):
    counts = torch.stack([torch.bincount(labels[part], minlength=10) for part in parts])
    return bool((counts[clean] >= threshold).any(0).all())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("cover", [450, 0.09])
def test_clean_clients_cover_all_classes_and_stay_clean(cover, seed):
    parts = Dirichlet(2.0)(CIFAR_LABELS, 10, 10, make_generator(seed))
    done = NoisyClients(Symmetric(), 0.5, clean_cover=cover)(
        CIFAR_LABELS, parts, 10, make_generator(seed)
    )
    assert covered(CIFAR_LABELS, parts, ~done.noisy, 450)
    assert 1 <= int(done.noisy.sum()) <= 9  # 9 were asked for: clamped to what the cover leaves
    for k, part in enumerate(parts):
        wrong = (done.labels != CIFAR_LABELS)[part]
        truth = CIFAR_LABELS[part]
        asked = [round(0.5 * n) for n in torch.bincount(truth, minlength=10).tolist()]
        found = torch.bincount(truth[wrong], minlength=10).tolist()
        assert found == (asked if done.noisy[k] else [0] * 10)
        assert done.rates[k] == (0.5 if done.noisy[k] else 0)


def test_greedy_cover_takes_the_largest_gain_first_and_no_client_for_nothing():
    counts = torch.tensor([[9, 9, 0, 0], [9, 9, 9, 0], [0, 0, 9, 0], [0, 0, 9, 9], [0, 0, 0, 0]])
    enough = torch.tensor([5, 5, 5, 5])
    assert clean_cover_clients(counts, enough).tolist() == [False, True, False, True, False]
    assert not clean_cover_clients(counts, enough * 100).any()


def test_an_unreachable_cover_warns_and_a_fraction_reaches(log):
    labels = torch.arange(5_000) % 100  # 50 of each class
    parts = Dirichlet(5.0)(labels, 10, 100, make_generator(0))
    done = NoisyClients(Symmetric(), 0.5)(labels, parts, 100, make_generator(0))
    assert "of 100 of 100 classes" in log.text
    assert int(done.noisy.sum()) == 9
    log.clear()
    done = NoisyClients(Symmetric(), 0.5, clean_cover=0.09)(labels, parts, 100, make_generator(0))
    assert "of 100 classes" not in log.text
    counts = torch.stack([torch.bincount(labels[part], minlength=100) for part in parts])
    assert (counts[~done.noisy] >= 5).any(0).all()


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_a_rate_that_rounding_changes_is_warned_of(rate, log):
    """As with CIFAR-100 at 100 clients, of each class of which a client has five samples."""
    labels = torch.arange(1_000) % 100
    parts = list(torch.arange(1_000).split(500))
    noisy = NoisyClients(Symmetric(), rate, fraction=1.0, clean_cover=None)
    done = noisy(labels, parts, 100, make_generator(0))
    wrong_rate = float((done.labels != labels).double().mean())
    assert wrong_rate == round(5 * rate) / 5 != rate
    assert f"{100 * wrong_rate:.1f} % of the labels" in log.text
    assert f"{100 * rate:.1f} % were asked for" in log.text
    log.clear()
    noisy(torch.arange(1_000) % 10, parts, 10, make_generator(0))  # 50 of each class
    assert not log.text


@pytest.mark.parametrize("labels", [torch.zeros(9), torch.zeros(8, dtype=torch.int64), [0] * 9])
def test_a_noise_of_ones_own_that_gives_no_labels_is_refused(labels):
    class Own(LabelNoise):
        def corrupt(self, samples, rate, num_classes, generator, *, images):
            return labels

    with pytest.raises(DataError, match=r"Own gave no label for each of 9 samples"):
        Own()(torch.arange(9) % 3, 0.5, 3, make_generator(0))


@pytest.mark.parametrize("count", [0, 1, 7, 10])
def test_an_exact_number_of_noisy_clients(parts, count):
    noisy = NoisyClients(Symmetric(), 0.5, count=count, clean_cover=None)
    chosen = [noisy.choose(CIFAR_LABELS, parts, 10, make_generator(seed)) for seed in range(8)]
    assert {int(c.sum()) for c in chosen} == {count}
    if count in (1, 7):
        assert len({tuple(c.tolist()) for c in chosen}) > 1


def test_rates_from_a_range(parts):
    noisy = NoisyClients(Symmetric(), (0.2, 0.6), count=10, clean_cover=None)
    done = noisy(CIFAR_LABELS, parts, 10, make_generator(0))
    assert ((done.rates >= 0.2) & (done.rates <= 0.6)).all()
    assert len(done.rates.unique()) == 10
    for k, part in enumerate(parts):
        share = (done.labels != CIFAR_LABELS)[part].double().mean()
        assert abs(share - done.rates[k]) < 0.01


@pytest.mark.parametrize(
    "arguments",
    [{"fraction": 1.5}, {"clean_cover": 0}, {"clean_cover": 1.5}, {"clean_cover": 0.0}],
)
def test_noisy_clients_checks_its_arguments(arguments):
    with pytest.raises(ConfigError):
        NoisyClients(Symmetric(), 0.5, **arguments)


def test_more_noisy_clients_than_clients(parts):
    with pytest.raises(ConfigError, match="11 of 10 clients"):
        NoisyClients(Symmetric(), 0.5, count=11)(CIFAR_LABELS, parts, 10, make_generator(0))
