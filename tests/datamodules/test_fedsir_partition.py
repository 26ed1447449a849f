"""Partitions: disjoint, complete, repeatable, and of the asked kind."""

import pytest
import torch

from fulgurite.datamodules.fedsir import Dirichlet, Iid, Partition, Shards
from fulgurite.datamodules.fedsir.selection import make_generator
from fulgurite.errors import ConfigError, DataError

LABELS = torch.arange(5_000) % 10
ALL = [Iid(), Dirichlet(2.0), Dirichlet(0.5), Dirichlet(5.0, 0.6), Shards(2), Shards(3)]


def counts(parts):
    return torch.stack([torch.bincount(LABELS[part], minlength=10) for part in parts])


@pytest.mark.parametrize("partition", ALL)
@pytest.mark.parametrize("clients", [1, 7, 10])
def test_disjoint_complete_and_repeatable(partition, clients):
    parts = partition(LABELS, clients, 10, make_generator(0))
    assert len(parts) == clients
    assert torch.cat(parts).sort().values.equal(torch.arange(5_000))
    assert all(len(part) and part.equal(part.sort().values) for part in parts)
    again = partition(LABELS, clients, 10, make_generator(0))
    assert all(a.equal(b) for a, b in zip(parts, again, strict=True))
    if clients > 1:
        other = partition(LABELS, clients, 10, make_generator(1))
        assert not all(a.equal(b) for a, b in zip(parts, other, strict=True))


def test_iid_parts_are_equal_and_mixed():
    table = counts(Iid()(LABELS, 7, 10, make_generator(0)))
    assert set(table.sum(1).tolist()) == {714, 715}
    assert table.min() > 40  # 71 expected of each class


def test_dirichlet_shares_have_the_moments_of_the_distribution():
    shares = torch.cat(
        [counts(Dirichlet(2.0)(LABELS, 10, 10, make_generator(s))) / 500.0 for s in range(40)]
    )
    # 10 clients, alpha 2: mean 1/10, variance 0.1 · 0.9 / 21, plus p(1-p)/n of multinomial draws
    assert shares.mean() == pytest.approx(0.1, abs=1e-6)
    assert shares.var().item() == pytest.approx(0.09 / 21 + 0.0859 / 500, rel=0.08)


def test_small_alpha_is_less_even():
    even, uneven = (
        counts(Dirichlet(alpha)(LABELS, 5, 10, make_generator(0))).double().var()
        for alpha in (100.0, 0.3)
    )
    assert uneven > 10 * even


def test_clients_hold_a_class_with_the_given_probability():
    held = torch.stack(
        [
            counts(Dirichlet(20.0, 0.5)(LABELS, 10, 10, make_generator(seed))) > 0
            for seed in range(20)
        ]
    )
    assert held.double().mean().item() == pytest.approx(0.5, abs=0.05)
    assert held.any(1).all()  # every class has a holder
    tiny = Dirichlet(20.0, 0.01)(LABELS, 3, 10, make_generator(0))
    assert sum(map(len, tiny)) == 5_000


def test_shards_limit_the_classes_of_a_client():
    table = counts(Shards(2)(LABELS, 10, 10, make_generator(0)))
    assert (table > 0).sum(1).max() <= 2
    assert table.sum(1).tolist() == [500] * 10


def test_global_random_state_plays_no_part():
    torch.manual_seed(1)
    first = Dirichlet()(LABELS, 4, 10, make_generator(0))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = Dirichlet()(LABELS, 4, 10, make_generator(0))
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))
    assert torch.get_rng_state().equal(state)


def test_more_clients_than_samples():
    with pytest.raises(DataError, match="5 clients but only 3 training samples"):
        Iid()(torch.zeros(3, dtype=torch.int64), 5, 1, make_generator(0))
    with pytest.raises(ConfigError, match="0 clients"):
        Iid()(LABELS, 0, 10, make_generator(0))


def test_an_empty_client_is_named():
    with pytest.raises(DataError, match=r"left client \d+ .* without samples"):
        Dirichlet(0.01)(torch.zeros(50, dtype=torch.int64), 20, 1, make_generator(0))


def test_a_plugin_that_names_a_client_that_is_not_there_is_refused():
    class Wrong(Partition):
        def assign(self, labels, clients, num_classes, generator):
            return torch.arange(len(labels)) % (clients + 1)

    with pytest.raises(DataError, match=r"Correct the `assign`"):
        Wrong()(LABELS, 4, 10, make_generator(0))


@pytest.mark.parametrize("convert", [torch.Tensor.float, torch.Tensor.numpy, torch.Tensor.tolist])
def test_a_plugin_that_gives_no_tensor_of_clients_is_refused(convert):
    class Wrong(Partition):
        def assign(self, labels, clients, num_classes, generator):
            return convert(torch.arange(len(labels)) % clients)

    with pytest.raises(DataError, match=r"returns an int64 tensor"):
        Wrong()(LABELS, 4, 10, make_generator(0))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Dirichlet(0.0), "alpha"),
        (lambda: Dirichlet(-1.0), "alpha"),
        (lambda: Dirichlet(1.0, 0.0), "holding_probability"),
        (lambda: Dirichlet(1.0, 1.1), "holding_probability"),
        (lambda: Shards(0), "shards_per_client"),
    ],
)
def test_arguments_are_checked(make, name):
    with pytest.raises(ConfigError, match=name):
        make()
