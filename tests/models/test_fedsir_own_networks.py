"""Networks and methods of one's own: trained as they are, or refused by name."""

from functools import partial

import pytest
import torch
from fakes.fedsir import FakeFederatedData
from torch import nn

from fulgurite.errors import ConfigError
from fulgurite.models.fedsir import FederatedClassifier
from fulgurite.models.fedsir.federation import ClientSide, Federation, FlatState
from fulgurite.models.fedsir.federation.grouping import time_group_sizes
from fulgurite.models.fedsir.method_checks import check_participants, check_weights
from fulgurite.models.fedsir.methods import FederatedMethod
from fulgurite.models.fedsir.network_checks import check_forward
from fulgurite.stateless import call_with_tensors

SGD = partial(torch.optim.SGD, lr=0.1)


class Plain(nn.Module):
    def __init__(self, channels=1, classes=2):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(4 * channels, 3), nn.ReLU())
        self.head = nn.Linear(3, classes)

    def features(self, x):
        return self.body(x)

    def forward(self, x):
        return self.head(self.features(x))


class SharedLayer(Plain):
    """One layer under two names."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.first = nn.Linear(3, 3)
        self.second = self.first

    def features(self, x):
        return self.second(self.first(self.body(x)).relu())


class AssignsBuffer(Plain):
    """A running mean that the forward pass puts in place of the old one."""

    def __init__(self, *sizes, persistent=True):
        super().__init__(*sizes)
        self.register_buffer("mean", torch.zeros(3), persistent=persistent)

    def features(self, x):
        features = self.body(x)
        if self.training:
            self.mean = 0.5 * self.mean + 0.5 * features.detach().mean(0)
        return features - self.mean


class Scaled(Plain):
    """A scalar, and a parameter without numbers."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.scale, self.empty = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.zeros(0))

    def features(self, x):
        return self.body(x) * self.scale


def make_federation(network, vectorize=0):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(20, 1, 2, 2, generator=generator)
    parts = torch.arange(20).split([7, 5, 8])
    labels = torch.randint(0, 2, (20,), generator=generator)
    torch.manual_seed(0)
    return Federation(
        FakeFederatedData(images, labels, parts, 2), network(), SGD, batch_size=4,
        vectorize=vectorize,
    )  # fmt: skip


def train(fed, clients=(0, 1, 2)):
    side = ClientSide()
    objective = side.objective(None, None)
    return fed.train_local(list(clients), lambda _: objective, purpose=0, epochs=2)


NETWORKS = {
    "shared layer": SharedLayer,
    "assigned buffer": AssignsBuffer,
    "buffer in no state dict": partial(AssignsBuffer, persistent=False),
    "scalar": Scaled,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_clients_are_trained_apart_in_any_order_and_in_one_pass(name):
    states = train(make_federation(NETWORKS[name]))
    reversed_order = train(make_federation(NETWORKS[name]), (2, 1, 0))
    group = make_federation(NETWORKS[name], vectorize=3)
    in_one_pass = train(group)
    again = train(group)  # the network is whole after a pass
    for client, state in states.items():
        assert torch.equal(state, reversed_order[client])
        torch.testing.assert_close(in_one_pass[client], state)
        torch.testing.assert_close(again[client], state)


def test_an_assigned_buffer_is_part_of_the_model():
    network = AssignsBuffer()
    state = FlatState(network)
    network(torch.ones(2, 1, 2, 2))
    assert torch.equal(state.read()[:3], network.mean)
    state.write(torch.arange(float(state.size)))
    assert network.mean.tolist() == [0, 1, 2]


def test_one_pass_is_left_out_where_an_operation_has_no_batching_rule():
    def spectral():
        network = Plain()
        nn.utils.parametrizations.spectral_norm(network.body[1])
        return network

    fed = make_federation(spectral)
    assert set(time_group_sizes(fed, (0, 3))) == {0}
    fed.vectorize = 3
    with pytest.raises(ConfigError, match=r"in one pass.*vectorize=0"):
        train(fed)


class Complex(Plain):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.filter = nn.Parameter(torch.zeros(3, dtype=torch.complex64))


class ExtraState(Plain):
    def get_extra_state(self):
        return {"steps": 1}

    def set_extra_state(self, state):
        pass


class Lazy(Plain):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.body[1] = nn.LazyLinear(3)


class Empty(nn.Module):
    def __init__(self, *sizes):
        super().__init__()
        self.head = nn.Identity()

    def features(self, x):
        return x


class Frozen(Plain):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.requires_grad_(False)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Complex, "complex numbers in filter"),
        (ExtraState, "keeps _extra_state, a dict"),
        (Lazy, r"LazyLinear \(body.1\)"),
        (Empty, "no parameters that are trained"),
        (Frozen, "no parameters that are trained"),
        (nn.Bilinear, "no `features` method"),
    ],
)
def test_networks_whose_models_cannot_be_averaged_are_refused(network, message):
    make_network = network if network is not nn.Bilinear else (lambda *_: nn.Linear(1, 2))
    with pytest.raises(ConfigError, match=message):
        FederatedClassifier(make_network, num_classes=2)


class TwoOutputs(Plain):
    def forward(self, x):
        return self.head(self.features(x)), x


class OtherLogits(Plain):
    def forward(self, x):
        return self.head(self.features(x) + 1)


class Maps(Plain):
    def features(self, x):
        return self.body(x)[..., None]

    def forward(self, x):
        return self.head(self.body(x))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (TwoOutputs, "gives a tuple for 2 images"),
        (OtherLogits, "other logits than its `head`"),
        (Maps, r"`features` of the network Maps gives a tensor of shape \(2, 3, 1\)"),
        (partial(Plain, 3), r"cannot take images of \(1, 2, 2\)"),
        (partial(Plain, 1, 5), r"shape \(2, 5\) for 2 images and 2 classes"),
    ],
)
def test_networks_whose_logits_are_not_those_of_the_head_are_refused(network, message):
    with pytest.raises(ConfigError, match=message):
        check_forward(make_federation(network))
    check_forward(make_federation(Plain))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({0: 0.5}, "no entry for client 2, which reported"),
        ({0: 0.5, 2: 0.25, 1: 0.25}, "names client 1, which did not report"),
        ({0: 1.0, 2: 1.0}, "sums to 2"),
        ({0: float("nan"), 2: 0.5}, "is not finite"),
    ],
)
def test_weights_that_would_scale_the_model_are_refused(weights, message):
    method = FederatedMethod()
    with pytest.raises(ConfigError, match=message):
        check_weights(method, weights, [0, 2])
    check_weights(method, {0: 0.0, 2: 1.0}, [0, 2])


@pytest.mark.parametrize(
    ("participants", "message"),
    [([1, 7], "not sampled: 7"), ([1, 1], "more than once"), ([], "names no client")],
)
def test_participants_that_were_not_sampled_are_refused(participants, message):
    with pytest.raises(ConfigError, match=message):
        check_participants(FederatedMethod(), participants, [1, 2])
    check_participants(FederatedMethod(), [2], [1, 2])


def test_a_module_under_two_names_keeps_its_tensors_when_called_with_others():
    layer = nn.Linear(1, 1, bias=False)
    network = nn.Sequential(layer, layer)
    weight = layer.weight
    result, assigned = call_with_tensors(
        network, {"0.weight": torch.tensor([[3.0]])}, torch.ones(1)
    )
    assert result.tolist() == [9]
    assert not assigned
    assert layer.weight is weight
