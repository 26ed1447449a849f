import pytest
import torch

from fulgurite.errors import ConfigError, DataError
from fulgurite.models.fedsir import class_spectra, client_score, split_clients
from fulgurite.testing.planted import planted_clients, symmetric_noise

SEEDS = range(10)  # the thresholds were chosen on seeds from 1000
MORE_SEEDS = range(20)
RATES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)


def score_clients(seed):
    """Scores of 10 clients at each rate. Shape: (rates, K, 2)."""
    clients = planted_clients(rates=[0.0] * 10, seed=seed)
    return torch.stack(
        [
            torch.stack(
                [
                    client_score(class_spectra(z, symmetric_noise(y, rate, 10, 10 * seed + k), 10))
                    for k, (z, y) in enumerate(zip(clients.features, clients.true, strict=True))
                ]
            )
            for rate in RATES
        ]
    )


@pytest.fixture(scope="module")
def scored():
    """Scores of 10 clients for each seed and rate. Shape: (seeds, rates, K, 2)."""
    return torch.stack([score_clients(seed) for seed in SEEDS])


@pytest.fixture(scope="module")
def scored_more():
    """The same for twice as many seeds, which takes 15 seconds."""
    return torch.stack([score_clients(seed) for seed in MORE_SEEDS])


def mixed(scored, seed, noisy, rate):
    """Scores where ``noisy`` clients, drawn by seed, have that rate; and which they are."""
    chosen = torch.zeros(10, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    chosen[torch.randperm(10, generator=generator)[:noisy]] = True
    clean, corrupt = scored[seed, 0], scored[seed, RATES.index(rate)]
    return torch.where(chosen[:, None], corrupt, clean), chosen


def exact(scored, noisy, rate, seeds=SEEDS, **options):
    results = []
    for seed in seeds:
        scores, chosen = mixed(scored, seed, noisy, rate)
        results.append(bool((~split_clients(scores, **options).clean == chosen).all()))
    return sum(results)


PLANTED = [(6, 0.3), (1, 0.5), (9, 0.5)]  # little noise, one noisy client, one clean client
MORE_PLANTED = [(6, 0.5), (6, 0.7), (6, 0.9), (2, 0.5), (7, 0.5)]


@pytest.mark.parametrize(
    ("noisy", "rate"),
    [*PLANTED, *(pytest.param(*planted, marks=pytest.mark.slow) for planted in MORE_PLANTED)],
)
def test_planted_noise_is_found(scored, noisy, rate):
    assert exact(scored, noisy, rate) >= 9


def test_all_clean_is_seen(scored):
    assert exact(scored, 0, 0.0) >= 9


@pytest.mark.slow
@pytest.mark.parametrize(("noisy", "rate"), [*PLANTED, *MORE_PLANTED, (0, 0.0)])
def test_more_seeds_find_planted_noise(scored_more, noisy, rate):
    assert exact(scored_more, noisy, rate, seeds=MORE_SEEDS) >= 19


@pytest.mark.slow
def test_more_seeds_see_equally_noisy_clients_as_one_group(scored_more):
    components = [split_clients(scores[RATES.index(0.5)]).components for scores in scored_more]
    assert components.count(1) >= 18


def test_equally_noisy_clients_are_one_group(scored):
    components = [split_clients(scored[seed, RATES.index(0.5)]).components for seed in SEEDS]
    assert components.count(1) >= 9
    split = split_clients(scored[1, RATES.index(0.9)], noisy_above=0.8)
    assert split.components == 1
    assert not split.clean.any()
    assert "all noisy" in split.reason


def test_mild_noise_is_not_always_found(scored):
    found = []
    for seed in range(10):
        scores, chosen = mixed(scored, seed, 6, 0.1)
        split = split_clients(scores, force_two=True)
        found.append((~split.clean & chosen).sum().item() / 6)
        assert not (~split.clean & ~chosen).any()
    assert 0.4 < sum(found) / len(found) < 0.95  # 1.0 would mean that labels leak


def test_the_papers_split_always_finds_two(scored):
    assert exact(scored, 0, 0.0, seeds=range(3), force_two=True) == 0


def test_order_of_the_clients_says_nothing(scored):
    for seed in range(3):
        scores, _ = mixed(scored, seed, 4, 0.3)
        order = torch.randperm(10, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(split_clients(scores[order]).clean, split_clients(scores).clean[order])


def test_posterior_and_threshold(scored):
    scores, chosen = mixed(scored, 0, 6, 0.5)
    split = split_clients(scores)
    assert ((split.p_clean >= 0) & (split.p_clean <= 1)).all()
    assert torch.equal(split.clean, split.p_clean >= 0.5)
    assert split.p_clean[~chosen].min() > 0.9 > 0.1 > split.p_clean[chosen].max()
    assert split.reason.startswith("4 of 10 clients are clean")
    again = split_clients(scores)
    assert torch.equal(again.p_clean, split.p_clean)


def test_clients_without_a_score_abstain(scored):
    scores, chosen = mixed(scored, 0, 6, 0.5)
    lone = (~chosen).nonzero()[0, 0]
    scores[lone] = torch.nan
    split = split_clients(scores)
    assert not split.clean[lone]
    assert split.p_clean[lone] == 0
    chosen[lone] = True
    assert torch.equal(~split.clean, chosen)
    assert f"[{lone}]" in split.reason


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_clients(count):
    scores = torch.tensor([[0.30, 0.09], [0.31, 0.10]])[:count]
    split = split_clients(scores)
    assert split.clean.tolist() == [True] * count
    assert split.components == 1
    assert not split_clients(scores * torch.nan).clean.any()


def test_two_clients_far_apart():
    scores = torch.tensor([[0.7, 0.49], [0.3, 0.09]])
    assert split_clients(scores).clean.tolist() == [False, True]


def test_a_mildly_noisy_client_does_not_join_the_clean_ones():
    # the mixture groups .38 with the clean ones, though it is nearer to the noisy ones
    off_mean = torch.tensor([0.290, 0.295, 0.300, 0.305, 0.380, 0.45, 0.47, 0.55, 0.57, 0.66])
    scores = torch.stack([off_mean, off_mean**2], 1)
    assert split_clients(scores, force_two=True).clean.sum() == 5
    assert split_clients(scores).clean.tolist() == [True] * 4 + [False] * 6


def test_clean_clients_may_differ_by_less_than_noise_makes():
    # off_mean as measured on digits, alpha = 0.5: a gap of .10 among the clean, .20 to the noisy
    off_mean = torch.tensor([0.36, 0.46, 0.51, 0.71, 0.73, 0.74, 0.75, 0.76, 0.77, 0.78])
    split = split_clients(torch.stack([off_mean, off_mean**2], 1))
    assert split.clean.tolist() == [True] * 3 + [False] * 7


@pytest.mark.parametrize("force_two", [True, False])
def test_equal_scores_are_all_clean(force_two):
    split = split_clients(torch.full((6, 2), 0.4), force_two=force_two)
    assert split.clean.all()
    assert split.components == 1


def test_many_clients():
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(100, generator=generator).double()
    noisy = torch.arange(100) % 5 < 2
    off_mean = torch.where(noisy, 0.45 + 0.02 * spread, 0.30 + 0.01 * spread)
    split = split_clients(torch.stack([off_mean, off_mean**2], 1))
    assert (split.clean == ~noisy).sum() >= 99
    alike = 0.3 + 0.02 * spread
    assert split_clients(torch.stack([alike, alike**2], 1)).components == 1


def test_bad_options_are_refused():
    with pytest.raises(DataError, match="K, 2"):
        split_clients(torch.zeros(3, 3))
    with pytest.raises(ConfigError, match="threshold"):
        split_clients(torch.zeros(3, 2), threshold=0.0)
    with pytest.raises(ConfigError, match="wide_gap"):
        split_clients(torch.zeros(3, 2), wide_gap=0.0)
