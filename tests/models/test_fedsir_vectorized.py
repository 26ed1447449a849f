"""Training in one pass equals training one after the other."""

import dataclasses
from functools import partial

import pytest
import torch
from fakes.fedsir import FakeFederatedData
from torch import nn

from fulgurite.errors import ConfigError
from fulgurite.models.fedsir.engine import RoundEngine
from fulgurite.models.fedsir.federation import ClientSide, Federation, LogitLoss, TrainRequest
from fulgurite.models.fedsir.federation.grouping import time_group_sizes
from fulgurite.models.fedsir.federation.vectorized import train_group, vectorizable
from fulgurite.models.fedsir.methods import FedProx
from fulgurite.models.fedsir.network import DigitsNet, SmallCNN

SIZES = (9, 23, 8, 5, 1, 23, 16)  # of 8: joined tails, plain tails, no tail, one sample


class Data(FakeFederatedData):
    """Random images; augmentation adds noise from the batch's generator."""

    def __init__(self, size, dtype, sizes=SIZES):
        generator = torch.Generator().manual_seed(5)
        images = torch.randint(
            0, 256, (sum(sizes), 1, size, size), dtype=torch.uint8, generator=generator
        )
        labels = torch.randint(0, 4, (sum(sizes),), generator=generator)
        parts = torch.randperm(sum(sizes), generator=generator).split(list(sizes))
        super().__init__(images, labels, parts, num_classes=4)
        self.dtype = dtype

    def augment_batch(self, images, generator):
        noise = torch.randn(images.shape, generator=generator)
        return self.plain_batch(images) + 0.1 * noise.to(self.dtype)

    def plain_batch(self, images):
        return images.to(self.dtype) / 128 - 1


class Adjusted(ClientSide):
    """A log-prior per client on every second client."""

    def objective(self, client, request):
        if client.number % 2:
            return LogitLoss(client.count_labels().clamp_min(1).log())
        return LogitLoss()


class Both(ClientSide):
    """A prior and a proximal term to an anchor of each client's own."""

    def objective(self, client, request):
        k, frozen = client.number, client.frozen(request.model)
        anchor = {n: p.detach() + 0.01 * k for n, p in frozen.named_parameters()}
        return LogitLoss(torch.arange(4.0) - k, proximal=0.3 * (k % 3), anchor=anchor)


NETWORKS = {"digits": lambda: DigitsNet(1, 4, 6, 16, width=8), "cnn": lambda: SmallCNN(1, 4, 4)}
SIDES = {
    "fedavg": ClientSide,
    "fedprox": lambda: FedProx().client_side,
    "adjusted": Adjusted,
    "both": Both,
}
# A large eps: Adam divides rounding errors by themselves where the true gradient is zero, as it is
# for biases before BatchNorm and behind dead units.
ADAM = partial(torch.optim.Adam, lr=3e-3, weight_decay=5e-4, eps=1e-4)


def federation(network, dtype=torch.float64, optimizer=ADAM, vectorize=0, **changes):
    torch.manual_seed(0)
    return Federation(
        Data(6, dtype), network().to(dtype), optimizer, batch_size=8, vectorize=vectorize, **changes
    )


def objective(side, fed, client):
    return side.objective(fed.clients[client], TrainRequest(model=fed.global_state, round=0))


def train(fed, side=None, epochs=3, clients=tuple(range(7)), **kwargs):
    side = side or ClientSide()
    return fed.train_local(
        list(clients), lambda k: objective(side, fed, k), purpose=0, epochs=epochs, **kwargs
    )


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max(float((one[k] - other[k]).abs().max()) for k in one)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("network", NETWORKS)
def test_equals_the_loop(network, side):
    loop, group = (federation(NETWORKS[network], vectorize=v) for v in (0, len(SIZES)))
    calls = {"loop": 0, "group": 0}
    for fed, name in ((loop, "loop"), (group, "group")):
        fed.on_step = lambda name=name: calls.update({name: calls[name] + 1})
    expected, found = (train(fed, SIDES[side]()) for fed in (loop, group))
    moved = min(float((s - loop.global_state).abs().max()) for s in expected.values())
    assert moved > 1e-3  # every client's model, running statistics among it, has changed
    assert largest_difference(expected, found) < 1e-11
    torch.testing.assert_close(group.loss_sum, loop.loss_sum)
    assert calls["group"] == calls["loop"] > 0
    assert group.state.read().equal(group.global_state)


@pytest.mark.parametrize("network", NETWORKS)
def test_equals_the_loop_in_single_precision(network):
    sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    loop, group = (federation(NETWORKS[network], torch.float32, sgd, v) for v in (0, 7))
    assert largest_difference(train(loop), train(group)) < 1e-4


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
        partial(torch.optim.AdamW, lr=3e-3, fused=True),
        partial(torch.optim.RMSprop, lr=1e-3, centered=True),
        partial(torch.optim.Rprop, lr=1e-3),
        partial(torch.optim.NAdam, lr=1e-3),
        partial(torch.optim.Adagrad, lr=1e-2),
        partial(torch.optim.ASGD, lr=1e-2),
    ],
    ids=lambda o: o.func.__name__,
)
def test_optimizers_keep_each_client_apart(optimizer):
    def smooth():  # every parameter has a gradient well above rounding
        first = nn.Linear(36, 8, bias=False)
        return nn.Sequential(nn.Flatten(), first, nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))

    loop, group = (federation(smooth, optimizer=optimizer, vectorize=v) for v in (0, 7))
    assert largest_difference(train(loop, epochs=2), train(group, epochs=2)) < 1e-11


def test_optimizers_that_mix_entries_train_one_by_one():
    class Normalised(torch.optim.SGD):
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                p.grad /= p.grad.norm()
            return super().step(closure)

    optimizer = partial(Normalised, lr=0.01)
    loop, group = (federation(NETWORKS["cnn"], optimizer=optimizer, vectorize=v) for v in (0, 7))
    assert largest_difference(train(loop, epochs=1), train(group, epochs=1)) == 0


def test_groups_of_any_size_and_any_clients():
    loop, group = (federation(NETWORKS["digits"], vectorize=v) for v in (0, 3))
    chosen = [6, 1, 4, 5]
    assert largest_difference(train(loop, clients=chosen), train(group, clients=chosen)) < 1e-11
    group.batch_size = loop.batch_size = 1  # BatchNorm stays in evaluation mode
    assert largest_difference(train(loop, epochs=1), train(group, epochs=1)) < 1e-11


def test_own_start_and_optimizer():
    loop, group = (federation(NETWORKS["digits"], vectorize=v) for v in (0, 7))
    choice = {"start": loop.global_state + 0.1, "optimizer": partial(torch.optim.SGD, lr=0.1)}
    assert largest_difference(train(loop, **choice), train(group, **choice)) < 1e-11


def test_a_network_of_other_layers():
    def network():
        return nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8, momentum=0.3), nn.GELU(), nn.AvgPool2d(2),
            nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(32, 6), nn.BatchNorm1d(6, affine=False),
            nn.Linear(6, 4),
        )  # fmt: skip

    def part_frozen():
        built = network()
        built[0].weight.requires_grad_(False)  # a frozen layer stays as it was
        return built

    loop, group = (federation(part_frozen, vectorize=v) for v in (0, 7))
    expected, found = train(loop), train(group)
    assert largest_difference(expected, found) < 1e-11
    frozen = loop.state.splits[0]
    assert found[0][:frozen].equal(loop.global_state[:frozen])


def test_tied_parameters():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(36, 36), nn.Linear(36, 4)
            self.second = nn.Linear(36, 36)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.head(self.second(self.first(x.flatten(1)).relu()).relu())

    loop, group = (federation(Tied, vectorize=v) for v in (0, 7))
    assert largest_difference(train(loop), train(group)) < 1e-11


def test_dropout_draws_as_in_the_loop():
    def network():
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Dropout(0.5), nn.Linear(8, 4))

    loop, group = (federation(network, vectorize=v) for v in (0, 7))
    assert largest_difference(train(loop), train(group)) == 0


def test_other_losses_train_one_by_one():
    class Other(ClientSide):
        def objective(self, client, request):
            plain = LogitLoss()
            return plain if client.number % 2 else lambda network, batch: 2 * plain(network, batch)

    loop, group = (federation(NETWORKS["digits"], vectorize=v) for v in (0, 7))
    assert not vectorizable(objective(Other(), loop, 0))
    expected, found = train(loop, Other()), train(group, Other())
    assert largest_difference(expected, found) < 1e-11
    assert expected[0].equal(found[0])


class Noisy(nn.Module):
    """Adds noise that cannot be mapped over clients."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(36, 4)

    def forward(self, x):
        return self.head(x.flatten(1) + torch.randn(x.flatten(1).shape, dtype=x.dtype))


def test_randomness_that_cannot_be_mapped_is_named():
    with pytest.raises(ConfigError, match="vectorize=0"):
        train(federation(Noisy, vectorize=7))


def test_a_subclass_of_the_loss_is_not_taken_for_it():
    class Smoothed(LogitLoss):
        def of_logits(self, logits, labels):
            return nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)

    assert vectorizable(LogitLoss())
    assert not vectorizable(Smoothed())
    fed = federation(NETWORKS["digits"])
    with pytest.raises(AssertionError, match="not vectorizable"):
        train_group(
            fed,
            [0, 1],
            lambda k: Smoothed(),
            0,
            start=fed.global_state,
            epochs=1,
            make_optimizer=ADAM,
        )


# --- vectorize: auto -----------------------------------------------------------------------------


def test_timing_changes_nothing_that_a_run_depends_on():
    fed = federation(NETWORKS["cnn"], vectorize=3)
    costs, random = dataclasses.replace(fed.costs), torch.get_rng_state()
    states = {name: tensor.clone() for name, tensor in fed.network.state_dict().items()}
    seconds = time_group_sizes(fed, (0, 4, 7))
    assert list(seconds) == [0, 4, 7]
    assert min(seconds.values()) > 0
    assert fed.vectorize == 3
    assert fed.costs == costs
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(fed.network.state_dict()[name], states[name]) for name in states)
    assert fed.network.training


def test_what_cannot_be_mapped_is_timed_one_by_one_alone():
    assert list(time_group_sizes(federation(Noisy), (0, 7))) == [0]


@pytest.mark.parametrize(
    ("seconds", "groups"),
    [pytest.param({0: 1.0, 4: 0.3}, 1, marks=pytest.mark.slow), ({0: 1.0, 4: 0.95}, 4)],
)
def test_auto_takes_the_faster_way_and_says_it(fulgurite, log, monkeypatch, seconds, groups):
    calls, sizes, trained = [], [], []

    def time_sizes(federation, candidates):
        calls.append([*candidates])
        return seconds

    def train(trainer, clients, *args, **kwargs):
        sizes.append(len(clients))
        return train_group(trainer, clients, *args, **kwargs)

    def train_clients(engine, group):
        trained.append(group)
        return train_one_group(engine, group)

    train_one_group = RoundEngine.train_group
    monkeypatch.setattr("fulgurite.models.fedsir.federation.grouping.time_group_sizes", time_sizes)
    monkeypatch.setattr("fulgurite.models.fedsir.federation.federation.train_group", train)
    monkeypatch.setattr(RoundEngine, "train_group", train_clients)
    options = ("--config", "fedsir/smoke.yaml", "--run.dir=run", "--model.local.vectorize=auto")
    method = "--model.method=fulgurite.models.fedsir.methods.FedAvg"
    assert fulgurite("fit", *options, method, "--trainer.max_epochs=1")[0] == 0
    assert calls == [[0, 4]]  # of the four clients of the configuration
    choice = "4 in one pass where" if groups == 1 else "one by one"
    assert f"vectorize: auto trains clients {choice}" in log.text
    assert trained == [*range(groups)]
    assert sizes == ([4] if groups == 1 else [])
    again = ("fit", "--config", "run/config.yaml", "--ckpt_path=last", "--trainer.max_epochs=2")
    monkeypatch.setitem(seconds, 4, 1.3 - seconds[4])  # would choose the other way
    status, _, err = fulgurite(*again)
    assert status == 0, err
    assert calls == [[0, 4]]  # what the checkpoint says is kept
    assert trained == [*range(groups), *range(groups)]
