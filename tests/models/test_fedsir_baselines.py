"""Methods on a small federation: detection, losses, state, honesty about labels, resume."""

from __future__ import annotations

import csv
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fakes.fedsir import FakeFederatedData, FakeLabels
from torch import nn

from fulgurite.cli import run
from fulgurite.errors import ConfigError, MissingExtraError
from fulgurite.models.fedsir.federation import Federation, LogitLoss, MiniBatch, Replies
from fulgurite.models.fedsir.losses import adjusted_distillation, log_prior
from fulgurite.models.fedsir.methods import (
    FedCorr,
    FedELC,
    FedLSR,
    FedNoRo,
    FedSIR,
    LocalCleaning,
    RoFL,
    SpectralIdentification,
)  # fmt: skip
from fulgurite.models.fedsir.methods.cleaning import SubsetLoss, find_issues
from fulgurite.models.fedsir.methods.fedcorr import MixupLoss, intrinsic_dimension, upper_group
from fulgurite.models.fedsir.methods.fedelc import SoftLabelLoss
from fulgurite.models.fedsir.methods.fedlsr import jensen_shannon
from fulgurite.models.fedsir.methods.fednoro import class_losses, normalise_losses, vote_clean
from fulgurite.models.fedsir.methods.noise_aware import DistillationLoss
from fulgurite.models.fedsir.methods.options import (
    AggregationOptions,
    ClientLossOptions,
    DistillationOptions,
    RelabelingOptions,
)
from fulgurite.models.fedsir.methods.rofl import CentroidLoss, class_means, merge_centroids

CLASSES, SIDE = 3, 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(SIDE * SIDE, 8)
        self.head = nn.Linear(8, CLASSES)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x.flatten(1)).relu()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


class Data(FakeFederatedData):
    """Six clients with separable images; the last three have 60 % wrong labels."""

    def __init__(self, per_client: int = 60) -> None:
        g = torch.Generator().manual_seed(1)
        count = per_client * 6
        self.true = torch.randint(CLASSES, (count,), generator=g)
        means = torch.randn(CLASSES, 1, SIDE, SIDE, generator=g) * 2
        images = means[self.true] + torch.randn(count, 1, SIDE, SIDE, generator=g)
        given = self.true.clone()
        half = count // 2
        wrong = torch.rand(half, generator=g) < 0.6
        shift = torch.randint(1, CLASSES, (half,), generator=g)
        given[half:] = torch.where(wrong, (given[half:] + shift) % CLASSES, given[half:])
        super().__init__(images, given, torch.arange(count).split(per_client), CLASSES)


NOISY = [False] * 3 + [True] * 3


@pytest.fixture
def data() -> Data:
    return Data()


@pytest.fixture
def fed(data: Data) -> Federation:
    torch.manual_seed(0)
    return Federation(
        data, Net(), lambda p: torch.optim.Adam(p, lr=0.02), seed=3, batch_size=20
    )  # fmt: skip


def play(method, fed: Federation, rounds: range) -> None:
    """The rounds engine in a few lines."""
    if rounds.start == 0:
        method.before_rounds(fed)
    for r in rounds:
        method.before_round(fed, r)
        fed.state.write(fed.global_state)
        play_round(method, fed, r, method.participants(fed, r, range(fed.num_clients)))
        assert torch.equal(fed.state.read(), fed.global_state)  # hooks leave the model as it was


def play_round(method, fed: Federation, round: int, clients: list[int]) -> None:
    """Train some clients, and average their models."""
    requests = {k: method.training_request(fed, k, round) for k in clients}
    replies = fed.exchange(method.client_side, requests)
    weights = method.weights(fed, round, replies)
    assert sum(weights.values()) == pytest.approx(1)
    fed.global_state = fed.average(replies.models, weights)
    fed.state.write(fed.global_state)
    method.after_round(fed, round, replies)


def objective(method, fed: Federation, client: int, round: int):
    """The local loss of a client."""
    request = method.training_request(fed, client, round)
    return method.client_side.objective(fed.clients[client], request)


def count_labels(fed: Federation) -> torch.Tensor:
    """Given labels by client and class."""
    return torch.stack([client.count_labels() for client in fed.clients])


METHODS = {
    "fednoro": lambda: FedNoRo(warmup=3, distillation=DistillationOptions(3, 6, weight=0.8)),
    "fedelc": lambda: FedELC(warmup=3, compatibility=0.1),
    "fedlsr": lambda: FedLSR(ramp_rounds=2),
    "fedcorr": lambda: FedCorr(preprocessing=3, finetuning=2, mixup=0.5),
    "rofl": lambda: RoFL(forget=0.3, ramp_rounds=2, pseudo_from=3),
    "folds": lambda: LocalCleaning(epochs=8),
    "probe": lambda: LocalCleaning("relabel", "probe", warmup=3),
}
needs_cleanlab = {"folds", "probe"}


# None keeps more between rounds than these, which the default suite has.
DEAR = {*METHODS} - {"fedcorr", "fedelc", "rofl"}


@pytest.fixture(
    params=[pytest.param(n, marks=pytest.mark.slow if n in DEAR else []) for n in METHODS]
)
def make(request):
    if request.param in needs_cleanlab:
        pytest.importorskip("cleanlab")
    return METHODS[request.param]


# --- parts -------------------------------------------------------------------------------------


def test_absent_classes_do_not_look_noisy():
    losses = torch.tensor([[0.2, torch.nan], [0.4, 1.0], [1.2, 3.0]])
    scaled = normalise_losses(losses)
    assert scaled[0].tolist() == [0.0, 0.0]
    assert scaled[2].tolist() == [1.0, 1.0]
    assert not normalise_losses(torch.full((3, 2), torch.nan)).any()


def test_vote_finds_planted_noisy_clients_on_every_seed():
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        noisy = torch.rand(10, generator=g).argsort() < 6
        vectors = torch.rand(10, 10, generator=g) * 0.4
        vectors[noisy] += 0.5
        assert torch.equal(vote_clean(vectors), ~noisy)


def test_equal_clients_are_all_clean():
    assert vote_clean(torch.zeros(5, 3)).all()
    assert not upper_group(torch.ones(7)).any()


def test_class_losses_are_means_per_class(fed, data):
    table = class_losses(fed, FedNoRo().client_side)
    index = data.client_index(4)
    with torch.no_grad():
        losses = F.cross_entropy(
            fed.network(data.images[index]), data.labels.given[index], reduction="none"
        )
    for c in range(CLASSES):
        of_class = data.labels.given[index] == c
        assert float(table[4, c]) == pytest.approx(float(losses[of_class].mean()), rel=1e-5)


@pytest.mark.parametrize("dimension", [1, 2, 4])
def test_intrinsic_dimension_of_planted_manifolds(dimension):
    g = torch.Generator().manual_seed(0)
    points = torch.rand(2000, dimension, generator=g) @ torch.randn(dimension, 10, generator=g)
    assert float(intrinsic_dimension(points).median()) == pytest.approx(dimension, rel=0.2)


def test_neighbours_as_close_as_rounding_do_not_decide_a_mean():
    points = torch.rand(200, 25, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    close = 5 + 1e-9 * torch.eye(25, dtype=torch.float64)  # all equally far from each other
    mean = intrinsic_dimension(torch.cat([points, close])).mean()
    assert float(mean) < 1.1 * float(intrinsic_dimension(points).mean())


def test_intrinsic_dimension_of_doubles_and_tiny_clients_is_finite():
    assert intrinsic_dimension(torch.zeros(30, 3)).tolist() == [0.0] * 30
    assert intrinsic_dimension(torch.rand(1, 3)).tolist() == [0.0]
    assert intrinsic_dimension(torch.rand(4, 3)).isfinite().all()


def test_soft_label_step_is_the_gradient_of_the_loss():
    torch.manual_seed(0)
    given, index = torch.tensor([0, 2, 1, 1, 0]), torch.tensor([4, 1, 3])
    start = torch.randn(5, CLASSES)
    network, images = Net(), torch.randn(3, 1, SIDE, SIDE)
    soft = start.clone()
    loss = SoftLabelLoss(soft, given, 0.5, 0.2, rate=7.0)
    value = loss(network, MiniBatch(images, torch.zeros(3, dtype=torch.int64), index))

    y = start[index].requires_grad_()
    p = network(images).softmax(1)
    kl = (p * (p.log() - y.log_softmax(1))).sum(1)
    entropy = -(p * p.log()).sum(1)
    each = (kl + 0.2 * entropy) / CLASSES + 0.5 * F.cross_entropy(y, given[index], reduction="none")
    each.mean().backward()
    torch.testing.assert_close(value, each.mean())
    torch.testing.assert_close(soft[index], start[index] - 7.0 * y.grad)
    assert torch.equal(soft[[0, 2]], start[[0, 2]])


def test_mixup_of_equal_samples_is_the_plain_loss_and_is_keyed():
    network, plain = Net(), LogitLoss()
    image, label = torch.randn(1, 1, SIDE, SIDE), torch.tensor([2])
    same = MiniBatch(image.expand(4, -1, -1, -1), label.expand(4), torch.arange(4))
    torch.testing.assert_close(MixupLoss(plain, 1.0)(network, same), plain(network, same))
    batch = MiniBatch(torch.randn(6, 1, SIDE, SIDE), torch.arange(6) % CLASSES, torch.arange(6))
    values = []
    for _ in range(2):
        torch.manual_seed(5)
        values.append(MixupLoss(plain, 1.0)(network, batch).item())
    assert values[0] == values[1]


def test_two_equal_views_have_no_divergence_and_both_count(fed):
    network, index = fed.network.eval(), torch.tensor([3, 8, 0])
    loss = objective(FedLSR(consistency=2.0, entropy=0.5, ramp_rounds=4), fed, 0, 2)
    assert loss.consistency == 1.0  # half way up
    images, labels = fed.data.images[index], fed.labels.given[index]
    logits = network(images)
    p, soft = logits.softmax(1), (3 * logits).softmax(1)
    entropy = -(soft * soft.log()).sum(1).mean()
    plain = F.nll_loss((p**2 / (p**2).sum(1, keepdim=True)).log(), labels)
    value = loss(network, MiniBatch(images, labels, index))  # nothing is augmented here
    torch.testing.assert_close(value, plain + 0.5 * entropy)
    first, second = (network(x).mul(3).softmax(1) for x in (images, images.flip(0)))
    middle = ((first + second) / 2).log()
    expected = sum(F.kl_div(middle, d, reduction="batchmean") for d in (first, second)) / 2
    torch.testing.assert_close(jensen_shannon(first, second).mean(), expected)


def test_subset_loss_ignores_dropped_samples():
    network = Net()
    images, labels = torch.randn(4, 1, SIDE, SIDE), torch.tensor([0, 1, 2, 0])
    has_loss = torch.tensor([True, False, True, False])
    batch = MiniBatch(images, labels, torch.arange(4))
    expected = F.cross_entropy(network(images[has_loss]), labels[has_loss])
    torch.testing.assert_close(SubsetLoss(has_loss)(network, batch), expected)
    assert float(SubsetLoss(torch.zeros(4, dtype=torch.bool))(network, batch)) == 0


def test_centroids_favour_clients_that_agree_with_the_server():
    before = torch.eye(2)
    clients = torch.stack([torch.eye(2), torch.tensor([[-1.0, 0.0], [1.0, 1.0]])])
    merged = merge_centroids(clients, before)
    assert merged[0].tolist() == [1.0, 0.0]  # an opposite centroid has no say
    assert float(merged[1, 1]) == pytest.approx(1.0)
    empty = merge_centroids(torch.zeros(2, 2, 2), before)
    assert torch.equal(empty, before)


def test_centroid_loss_takes_pseudo_labels_only_where_centroids_disagree():
    network = Net()
    images, labels = torch.randn(4, 1, SIDE, SIDE), torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        features = network.features(images)
        logits = network(images)
    batch = MiniBatch(images, labels, torch.arange(4))
    pseudo = torch.tensor([2, 2, 0, 1])
    centroids = class_means(features, labels, CLASSES)
    nearest = (F.normalize(features, dim=1) @ F.normalize(centroids, dim=1).T).argmax(1)
    used = labels.where(nearest == labels, pseudo)
    loss = CentroidLoss(centroids.clone(), pseudo, forget=0.0, pull=0.0, entropy=0.0)
    torch.testing.assert_close(loss(network, batch), F.cross_entropy(logits, used))
    half = CentroidLoss(centroids.clone(), None, forget=0.5, pull=0.0, entropy=0.0)
    smallest = F.cross_entropy(logits, labels, reduction="none").sort().values[:2]
    torch.testing.assert_close(half(network, batch), smallest.mean())


def test_cleanlab_finds_planted_issues():
    pytest.importorskip("cleanlab")
    g = torch.Generator().manual_seed(0)
    true = torch.randint(3, (300,), generator=g)
    given = true.clone()
    given[:45] = (given[:45] + 1) % 3
    probabilities = 0.9 * F.one_hot(true, 3) + 0.1 * torch.rand(300, 3, generator=g)
    found = find_issues(given, probabilities / probabilities.sum(1, keepdim=True))
    assert found[:45].double().mean() > 0.9
    assert found[45:].double().mean() < 0.05
    assert not find_issues(torch.zeros(4, dtype=torch.int64), torch.eye(4)).any()


def test_missing_cleanlab_is_named_before_training(monkeypatch, fed):
    monkeypatch.setitem(sys.modules, "cleanlab.filter", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'fulgurite\[cleaning\]'"):
        LocalCleaning().before_rounds(fed)


@pytest.mark.parametrize(
    "build",
    [
        lambda: FedNoRo(warmup=0),
        lambda: FedELC(compatibility=-1.0),
        lambda: FedLSR(entropy=-0.1),
        lambda: FedCorr(confidence=1.5),
        lambda: FedCorr(preprocessing=0),
        lambda: RoFL(forget=1.0),
        lambda: RoFL(pull=-1.0),
        lambda: LocalCleaning(folds=1),
    ],
)
def test_bad_arguments_are_refused(build):
    with pytest.raises(ConfigError):
        build()


# --- methods on a small federation -------------------------------------------------------------


@pytest.mark.parametrize("name", ["fednoro", "fedelc", "fedcorr"])
def test_noisy_clients_are_found(name, fed):
    method = METHODS[name]()
    play(method, fed, range(4))
    assert (~method.clean).tolist() == NOISY


def wrong_share(data: Data) -> float:
    return float((data.labels.current != data.true).double().mean())


@pytest.mark.parametrize(
    "name",
    [
        "fedelc",
        pytest.param("fedcorr", marks=pytest.mark.slow),
        pytest.param("probe", marks=pytest.mark.slow),
    ],
)
def test_corrected_labels_move_towards_the_truth(name, fed, data):
    if name in needs_cleanlab:
        pytest.importorskip("cleanlab")
    before = wrong_share(data)
    play(METHODS[name](), fed, range(6))
    assert wrong_share(data) < 0.8 * before


def test_fedcorr_trusts_clean_clients(fed, data):
    method = FedCorr(preprocessing=3, finetuning=2, relabel_ratio=0.0, mixup=0.0)
    play(method, fed, range(3))
    assert torch.equal(data.labels.current, data.labels.given)
    assert method.participants(fed, 3, range(6)) == [0, 1, 2]
    assert method.participants(fed, 5, range(6)) == list(range(6))
    assert len(method.participants(fed, 3, [4, 5])) == 1  # no clean client was sampled
    assert method.level[:3].tolist() == [0, 0, 0]
    assert (method.level[3:] > 0).all()
    play(method, fed, range(3, 5))
    assert torch.equal(data.labels.current, data.labels.given)  # the third stage has not begun
    play(method, fed, range(5, 6))
    changed = data.labels.current != data.labels.given
    assert not changed[:180].any()
    assert changed[180:].double().mean() > 0.3


def test_pruning_drops_wrong_labels_rather_than_right_ones(fed, data):
    pytest.importorskip("cleanlab")
    method = METHODS["folds"]()
    play(method, fed, range(1))
    wrong = data.labels.given != data.true
    trained = torch.cat([client.memory["kept"] for client in fed.clients])  # as clients are dealt
    assert trained[~wrong].double().mean() > trained[wrong].double().mean() + 0.2
    assert method.local_rounds() == 32
    assert LocalCleaning(probabilities="probe").local_rounds() == 0


def test_warmup_has_no_split_and_uses_the_prior(fed):
    method = FedNoRo(warmup=2)
    play(method, fed, range(2))
    assert method.clean is None
    loss = objective(method, fed, 0, 1)
    expected = log_prior(count_labels(fed), mask_absent=True)[0]
    torch.testing.assert_close(loss.log_prior, expected)


def test_a_round_with_some_clients_only(make, data):
    torch.manual_seed(0)
    fed = Federation(data, Net(), lambda p: torch.optim.Adam(p, lr=0.02), batch_size=20)
    method = make()
    method.before_rounds(fed)
    for r in range(6):
        method.before_round(fed, r)
        sampled = [0, 3, 4] if r % 2 else [1, 5]
        clients = method.participants(fed, r, sampled)
        assert clients
        assert set(clients) <= set(sampled)
        play_round(method, fed, r, clients)
    assert fed.global_state.isfinite().all()


def test_resume_is_bit_identical(make, data):
    def start(given: torch.Tensor) -> Federation:
        torch.manual_seed(0)
        data.labels = FakeLabels(given)
        return Federation(data, Net(), lambda p: torch.optim.Adam(p, lr=0.02), batch_size=20)

    given = data.labels.given.clone()
    whole, method = start(given), make()
    play(method, whole, range(7))
    for stop in (2, 4):
        first, before = start(given), make()
        play(before, first, range(stop))
        path = data.path / f"{stop}.pt"
        memories = first.read_memories()
        torch.save([before.state_dict(), first.global_state, data.labels.current, memories], path)
        state, model, current, memories = torch.load(path, weights_only=True)
        second, after = start(given), make()
        second.write_memories(memories)
        after.load_state_dict(state)
        data.labels.current.copy_(current)
        second.global_state = model
        play(after, second, range(stop, 7))
        assert torch.equal(second.global_state, whole.global_state)


@pytest.fixture(autouse=True)
def _path(data: Data, tmp_path: Path) -> None:
    data.path = tmp_path  # type: ignore[attr-defined]


def test_true_labels_are_never_read(make, fed, data):
    del data.true
    play(make(), fed, range(5))
    assert fed.global_state.isfinite().all()


def test_dealing_clients_to_ranks_does_not_matter(make, data, monkeypatch):
    """Train the clients in another order, as ranks do: nothing may depend on it."""

    def outcome(order: int) -> torch.Tensor:
        torch.manual_seed(0)
        data.labels = FakeLabels(data.labels.given)
        fed = Federation(data, Net(), lambda p: torch.optim.Adam(p, lr=0.02), batch_size=20)
        local_clients = fed.local_clients
        monkeypatch.setattr(fed, "local_clients", lambda clients: local_clients(clients)[::order])
        method = make()
        play(method, fed, range(5))
        return fed.global_state

    assert torch.equal(outcome(1), outcome(-1))


def tensors_of(record):
    """All tensors of a message, those of records inside it too."""
    for entry in fields(record):
        value = getattr(record, entry.name)
        if is_dataclass(value):
            yield from tensors_of(value)
        elif isinstance(value, torch.Tensor):
            yield value


@pytest.mark.parametrize("name", [*METHODS, "fedsir"])
def test_messages_hold_no_images_labels_or_vectors_over_samples(name, monkeypatch):
    if name in needs_cleanlab:
        pytest.importorskip("cleanlab")
    samples = 61  # of a client: the size of nothing else
    torch.manual_seed(0)
    fed = Federation(Data(samples), Net(), lambda p: torch.optim.Adam(p, lr=0.02), batch_size=20)
    messages, answer = [], fed.answer

    def record(side, requests):
        replies = answer(side, requests)
        messages.extend([*requests.values(), *replies.values()])
        return replies

    monkeypatch.setattr(fed, "answer", record)
    play(make_fedsir() if name == "fedsir" else METHODS[name](), fed, range(6))
    assert messages
    for message in messages:
        for tensor in tensors_of(message):
            assert not {samples, 6 * samples} & set(tensor.shape), type(message)


def test_costs_are_those_of_the_messages(fed):
    method = FedSIR(SpectralIdentification(epochs=1), RelabelingOptions(every=0))
    method.before_rounds(fed)
    model, clean = fed.state_bytes, int(method.clean.sum())
    assert fed.costs.bytes_down == 6 * model  # the common start
    assert fed.costs.bytes_up == 6 * 2 * 4 + clean * model  # two statistics, and clean models
    before = fed.costs.bytes_down
    play_round(method, fed, 0, [0, 5])
    assert fed.costs.bytes_down - before == 2 * model


# --- FedSIR on the same federation -------------------------------------------------------------


def make_fedsir(**options) -> FedSIR:
    identification = SpectralIdentification(epochs=3, min_count=3, always_split=True)
    relabeling = {"first": 0, "every": 2, "reference_min_count": 5, "residual_rows": 2}
    relabeling |= {k: options.pop(k) for k in ("every", "kept_weight") if k in options}
    return FedSIR(
        identification,
        RelabelingOptions(**relabeling),
        distillation=DistillationOptions(0, 1),
        **options,
    )


def test_noisy_clients_train_every_nth_round(fed):
    method = make_fedsir(noisy_every=3)
    play(method, fed, range(1))
    assert (~method.clean).tolist() == NOISY
    chosen = [method.participants(fed, r, range(6)) for r in range(7)]
    assert [len(c) for c in chosen] == [6, 3, 3, 6, 3, 3, 6]
    assert all(method.clean[k] for k in chosen[1])
    assert method.participants(fed, 1, [4, 5]) == [4, 5]  # no clean one was sampled


def test_weights_follow_the_share_of_decided_labels(fed):
    method = make_fedsir(aggregation=AggregationOptions("size", client_confidence=True))
    play(method, fed, range(1))
    assert method.decided[:3].tolist() == [1, 1, 1]
    for client in (3, 4, 5):
        taken = ~fed.clients[client].memory["distil"]
        assert float(method.decided[client]) == pytest.approx(float(taken.double().mean()))
    method.decided[3], method.decided[4] = 0.0, 0.5
    weights = method.weights(fed, 0, Replies(list(range(6)), {}, fed.device))
    assert sum(weights.values()) == pytest.approx(1)
    assert weights[3] == 0
    assert weights[4] == pytest.approx(weights[0] / 2)
    method.decided[:] = 0.0
    noisy = Replies([3, 4], {}, fed.device)
    assert method.weights(fed, 0, noisy) == fed.size_weights([3, 4])  # never all zero


def batch_loss(loss, network: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 1, 4, 4, generator=generator)
    return loss(network, MiniBatch(images, torch.arange(8) % 3, torch.arange(8)))


@pytest.mark.parametrize("noisy_loss", ["la_kd", "la", "ce_kd", "ce"])
@pytest.mark.parametrize("clean_loss", ["la", "ce"])
def test_clean_and_noisy_clients_have_losses_of_their_own(fed, clean_loss, noisy_loss):
    losses = ClientLossOptions(clean=clean_loss, noisy=noisy_loss)
    method = make_fedsir(losses=losses, every=0)
    method.is_clean = ~torch.tensor(NOISY)
    prior, network = log_prior(count_labels(fed)), fed.network.eval()
    clean = objective(method, fed, 0, 5)
    assert type(clean) is LogitLoss
    assert (clean.log_prior is None) == (clean_loss == "ce")
    noisy = objective(method, fed, 4, 5)
    assert type(noisy) is DistillationLoss
    offset = prior[4] if noisy_loss.startswith("la") else torch.zeros(3)
    weight = method.distillation.weight if noisy_loss.endswith("kd") else 0.0
    teacher = fed.frozen(fed.global_state)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1
    logits = network(torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0)))
    taught = teacher(torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0)))
    expected = adjusted_distillation(logits, torch.arange(8) % 3, taught, weight, log_prior=offset)
    torch.testing.assert_close(batch_loss(noisy, network), expected)


def test_the_state_of_fedsir_holds_everything(fed):
    aggregation = AggregationOptions(client_confidence=True)
    options = {"noisy_every": 2, "aggregation": aggregation, "kept_weight": 0.0}
    whole, method = fed, make_fedsir(**options)
    play(method, whole, range(5))
    torch.manual_seed(0)
    parts = Federation(
        Data(), Net(), lambda p: torch.optim.Adam(p, lr=0.02), seed=3, batch_size=20
    )  # fmt: skip
    first = make_fedsir(**options)
    play(first, parts, range(3))
    second = make_fedsir(**options)
    second.load_state_dict(first.state_dict())
    play(second, parts, range(3, 5))
    assert torch.equal(parts.global_state, whole.global_state)


@pytest.mark.parametrize("options", [{"noisy_every": 0}, {"kept_weight": -1.0}])
def test_bad_arguments_of_fedsir_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        make_fedsir(**options)


# --- through the command line ------------------------------------------------------------------

COMMAND = [
    "fit", "--config", "fedsir/digits.yaml", "--trainer.max_epochs=3",
    "--data.init_args.source.init_args.copies=1",
    "--data.init_args.noise.init_args.clean_cover=0.01",
    "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
]  # fmt: skip
OPTIONS = {
    "FedNoRo": {"warmup": 1, "distillation.begin": 1, "distillation.end": 2},
    "FedELC": {"warmup": 1},
    "FedLSR": {"ramp_rounds": 1},
    "FedCorr": {"preprocessing": 1, "finetuning": 1},
    "RoFL": {"pseudo_from": 1},
    "LocalCleaning": {"folds": 2, "epochs": 1},
}


#: FedNoRo has the options of most others; the rounds of each method run above.
QUICK = ("FedNoRo",)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in OPTIONS]
)
def test_runs_by_command_line(name, tmp_path):
    if name == "LocalCleaning":
        pytest.importorskip("cleanlab")
    method = f"--model.init_args.method=fulgurite.models.fedsir.methods.{name}"
    options = [f"--model.init_args.method.init_args.{k}={v}" for k, v in OPTIONS[name].items()]
    run([*COMMAND, method, *options, f"--run.dir={tmp_path}"])
    with (tmp_path / "metrics.csv").open() as file:
        rows = [r for r in csv.DictReader(file) if r["val/acc"]]
    assert len(rows) == 3
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()
