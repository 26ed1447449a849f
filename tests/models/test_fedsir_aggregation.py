import math
from itertools import pairwise

import pytest
import torch

from fulgurite.errors import DataError
from fulgurite.models.fedsir import distance_aware_weights, distance_to_clean, sample_weights
from fulgurite.models.fedsir.federation import exact_average

SPLITS = [6, 3, 1]


def client_distances(states, splits, clean):
    """What each client reports: a clean one 0 of itself, the others to the nearest clean one."""
    return torch.stack([
        distance_to_clean(state, state[None] if mine else states[clean], splits)
        for state, mine in zip(states, clean.tolist(), strict=True)
    ])  # fmt: skip


def average_of(states, weights):
    kept = {k: w for k, w in enumerate(weights.tolist()) if w}
    return exact_average(dict(enumerate(states)), kept, SPLITS, device=states.device)


@pytest.fixture
def clients():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(6, 10, generator=generator)
    clean = torch.tensor([True, False, True, False, False, False])
    return states, torch.tensor([10, 20, 30, 15, 5, 40]), clean


def test_distance_sums_the_norms_of_the_tensors(clients):
    states, _, clean = clients
    distances = client_distances(states, SPLITS, clean)
    for k in range(6):
        expected = min(
            sum(
                (a - b).double().norm()
                for a, b in zip(states[k].split(SPLITS), states[j].split(SPLITS), strict=True)
            )
            for j in (0, 2)
        )
        assert distances[k].item() == pytest.approx(0.0 if clean[k] else float(expected), rel=1e-6)


def test_weights_are_fedavg_times_the_distance(clients):
    states, sizes, clean = clients
    distances = client_distances(states, SPLITS, clean)
    weights = distance_aware_weights(sizes, distances)
    assert weights.dtype == torch.float64
    assert abs(weights.sum().item() - 1) <= 1e-12
    factor = weights / sample_weights(sizes)
    factor = factor / factor[0]
    torch.testing.assert_close(factor[clean], torch.ones(2).double(), rtol=0, atol=1e-12)
    assert factor.min().item() == pytest.approx(math.exp(-1), abs=1e-6)
    assert ((factor[~clean] >= math.exp(-1) - 1e-12) & (factor[~clean] < 1)).all()
    order = distances.argsort()[1:]  # one of the two clean clients, then the noisy ones
    assert all(near > far for near, far in pairwise(factor[order].tolist()))


@pytest.mark.parametrize("clean", [torch.ones(6).bool(), torch.zeros(6).bool()])
def test_all_clean_or_none_is_fedavg(clients, clean):
    states, sizes, _ = clients
    weights = distance_aware_weights(sizes, client_distances(states, SPLITS, clean))
    assert torch.equal(weights, sample_weights(sizes))


def test_identical_models_are_fedavg(clients):
    states, sizes, clean = clients
    same = states[:1].expand(6, -1)
    distances = client_distances(same, SPLITS, clean)
    assert torch.equal(distance_aware_weights(sizes, distances), sample_weights(sizes))


def test_without_floor_distances_keep_their_unit():
    weights = distance_aware_weights(torch.tensor([1, 1]), torch.tensor([0.0, 3.0]), floor=False)
    assert (weights[1] / weights[0]).item() == pytest.approx(math.exp(-3))


def test_average_is_the_explicit_sum(clients):
    states, sizes, clean = clients
    weights = distance_aware_weights(sizes, client_distances(states, SPLITS, clean))
    explicit = sum(w * s.double() for w, s in zip(weights, states, strict=True))
    average = average_of(states, weights)
    assert average.dtype == states.dtype
    torch.testing.assert_close(average.double(), explicit, rtol=0, atol=1e-6)


@pytest.mark.parametrize("diverged", [2, 3])  # a clean client, a noisy one
def test_a_diverged_client_is_left_out(clients, diverged):
    states, sizes, clean = clients
    states[diverged, 2] = torch.nan
    weights = distance_aware_weights(sizes, client_distances(states, SPLITS, clean))
    assert weights[diverged] == 0
    assert (weights > 0).sum() == 5
    assert abs(weights.sum().item() - 1) <= 1e-12
    assert average_of(states, weights).isfinite().all()


def test_impossible_weights_are_refused():
    with pytest.raises(DataError, match="sizes"):
        sample_weights(torch.tensor([0, 0]))
    with pytest.raises(DataError, match="sizes"):
        sample_weights(torch.tensor([2, -1]))
    with pytest.raises(DataError, match="finite"):
        distance_aware_weights(torch.tensor([1, 2]), torch.tensor([math.nan, math.inf]))
