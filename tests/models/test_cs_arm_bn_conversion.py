"""Conversion of anyone's network: what its layers carry stays, or is refused before any changes."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from fulgurite.errors import ConfigError, DataError
from fulgurite.models.cs_arm_bn import (
    ContextBatchNorm2d,
    SmallResNet,
    adapt,
    context,
    convert_batchnorm,
    revert_batchnorm,
    stored_statistics,
)


def images(count, seed=0, channels=3):
    g = torch.Generator().manual_seed(seed)
    return 1 + 2 * torch.randn(count, channels, 8, 8, generator=g)


class Branches(nn.Module):
    """Two branches that end in one and the same BatchNorm; ``used`` says which are taken."""

    def __init__(self, used="ab"):
        super().__init__()
        shared = nn.BatchNorm2d(3)
        self.a = nn.Sequential(nn.Conv2d(3, 3, 1), shared)
        self.b = nn.Sequential(nn.Conv2d(3, 3, 1), shared)
        self.used = used

    def forward(self, x):
        for branch in self.used:
            x = getattr(self, branch)(x)
        return x


class Auxiliary(nn.Module):
    """A head that the forward pass does not use."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.auxiliary = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x))


def kinds(network):
    return [type(m).__name__ for m in network.modules() if isinstance(m, nn.BatchNorm2d)]


# --- shared, unused and untracked layers ----------------------------------------------------------


def test_a_shared_layer_stays_shared():
    network = Branches("b")
    layer = network.a[1]
    convert_batchnorm(network)
    assert network.a[1] is network.b[1] is layer
    adapt(network, images(6).split(2), "p")
    with torch.no_grad():
        with context(network, "stored", domain="p"):
            stored = network(images(3, 1))
        reverted = revert_batchnorm(network, "p").eval()
        assert network.a[1] is network.b[1] is layer
        torch.testing.assert_close(reverted(images(3, 1)), stored)


@pytest.mark.parametrize("chunks", [1, 3])
def test_a_shared_layer_that_is_used_twice_is_refused_by_name(chunks):
    network = convert_batchnorm(Branches())
    with pytest.raises(ConfigError, match=r"a\.1 is used twice"):
        adapt(network, images(6).chunk(chunks), "p")
    assert not network.a[1].stored
    with context(network, "batch"):  # each use has the statistics of its own rows, as in torch
        ours = network(images(4))
    torch.testing.assert_close(ours, revert_batchnorm(network).train()(images(4)))


def test_layers_that_are_not_used_stay_as_they_are():
    network = convert_batchnorm(Auxiliary().eval())
    before = network.auxiliary.running_var.clone()
    adapt(network, images(4).split(2), "p")
    with torch.no_grad(), context(network, "stored", domain="p"):
        stored = network(images(3, 1))
    revert_batchnorm(network, "p")
    assert kinds(network) == ["BatchNorm2d", "BatchNorm2d"]
    torch.testing.assert_close(network(images(3, 1)), stored)
    assert torch.equal(network.auxiliary.running_var, before)


def test_layers_without_running_statistics_get_those_of_the_plate():
    layer = nn.BatchNorm2d(4, track_running_stats=False)
    network = convert_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 3), layer).eval())
    adapt(network, [images(4)], "p")
    with torch.no_grad(), context(network, "stored", domain="p"):
        stored = network(images(3, 1))
    revert_batchnorm(network, "p")
    torch.testing.assert_close(network(images(3, 1)), stored)
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    other.load_state_dict(network.state_dict())
    torch.testing.assert_close(other.eval()(images(3, 1)), stored)


def test_nothing_is_half_converted_or_half_reverted():
    network = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm3d(3))
    with pytest.raises(ConfigError, match="1 is a BatchNorm3d"):
        convert_batchnorm(network)
    assert type(network[0]) is nn.BatchNorm2d
    network = convert_batchnorm(Auxiliary())
    with pytest.raises(DataError, match="plate 9"):
        revert_batchnorm(network, "plate 9")
    assert kinds(network) == ["ContextBatchNorm2d", "ContextBatchNorm2d"]


def test_conversion_twice_is_conversion_once():
    network = convert_batchnorm(convert_batchnorm(Auxiliary()))
    assert kinds(network) == ["ContextBatchNorm2d", "ContextBatchNorm2d"]
    assert kinds(revert_batchnorm(revert_batchnorm(network))) == ["BatchNorm2d", "BatchNorm2d"]
    assert vars(revert_batchnorm(network).bn).keys() == vars(nn.BatchNorm2d(4)).keys()


# --- half precision -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("source", ["ordinary", "source", "batch", "union", "controls"])
def test_half_precision_weights_follow_full_precision(dtype, source):
    torch.manual_seed(0)
    network = convert_batchnorm(SmallResNet(3, 5, width=8)).eval()
    half = copy.deepcopy(network).to(dtype)
    for weight in (None, 0.3, "adaptive") if source == "union" else (None,):
        with torch.no_grad(), context(network, source, n_query=4, weight=weight):
            full = network(images(12))
        with torch.no_grad(), context(half, source, n_query=4, weight=weight):
            out = half(images(12).to(dtype))
        assert out.dtype == dtype
        assert (out.float() - full).abs().max() < 0.1 * full.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_adapted_and_reverted(dtype):
    torch.manual_seed(0)
    network = convert_batchnorm(SmallResNet(3, 5, width=8)).eval().to(dtype)
    found = adapt(network, images(12).to(dtype).split(5), "p")
    assert {value.dtype for value in found.values()} == {torch.float32}
    with torch.no_grad():
        with context(network, "stored", domain="p"):
            stored = network(images(3, 1).to(dtype))
        plain = revert_batchnorm(network, "p")(images(3, 1).to(dtype))
    assert stored.dtype == plain.dtype == dtype
    assert (plain - stored).abs().max() < 0.05 * stored.abs().max()


def test_half_precision_weights_learn():
    network = convert_batchnorm(SmallResNet(3, 5, width=4)).bfloat16()
    with context(network, "union", n_query=2):
        network(images(6).bfloat16())[:2].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


# --- hooks, parametrisations, subclasses ----------------------------------------------------------


def test_hooks_are_called_before_within_and_after():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    calls = []
    layer = network[1]
    handles = [
        layer.register_forward_pre_hook(lambda *_: calls.append("before")),
        layer.register_forward_hook(lambda *_: calls.append("after")),
        layer.register_full_backward_hook(lambda *_: calls.append("backward")),
        layer.register_state_dict_post_hook(lambda *_: calls.append("state")),
    ]

    def used():
        calls.clear()
        network(images(2)).sum().backward()
        network.state_dict()
        return calls

    every = ["before", "after", "backward", "state"]
    assert used() == every
    convert_batchnorm(network)
    assert used() == every
    handles[1].remove()
    assert used() == ["before", "backward", "state"]
    layer.register_forward_hook(lambda _, __, out: 0 * out)
    assert not revert_batchnorm(network)(images(2)).any()


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def test_parametrised_layers_are_refused_by_name():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    parametrize.register_parametrization(network[1], "weight", Doubled())
    with pytest.raises(ConfigError, match="1 has a parametrisation of its weight"):
        convert_batchnorm(network)
    parametrize.remove_parametrizations(network[1], "weight")
    convert_batchnorm(network)
    parametrize.register_parametrization(network[1], "bias", Doubled())
    with pytest.raises(ConfigError, match="1 has a parametrisation of its bias"):
        revert_batchnorm(network)
    parametrize.remove_parametrizations(network[1], "bias")
    assert kinds(revert_batchnorm(network)) == ["BatchNorm2d"]


class Named(nn.BatchNorm2d):
    """A subclass with an addition that does not concern the forward pass."""

    def __init__(self, features):
        super().__init__(features)
        self.gain = 3.0

    def doubled(self):
        return 2 * self.gain


def test_a_subclass_without_a_forward_pass_keeps_what_it_adds():
    network = convert_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 3), Named(4)))
    assert isinstance(network[1], ContextBatchNorm2d)
    assert isinstance(network[1], Named)
    assert network[1].doubled() == 6
    adapt(network, [images(4)], "p")
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        for net in (network, twin):
            with torch.no_grad(), context(net, "stored", domain="p"):
                out = net(images(3, 1))
            if net is network:
                expected = out
        torch.testing.assert_close(out, expected)
    assert type(revert_batchnorm(twin)[1]) is Named


class Scaled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class ScaledAndActive(nn.BatchNorm2d):
    """Looks like timm's fused layers, and computes something else."""

    def __init__(self, features):
        super().__init__(features)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(2 * super().forward(x))


class OrdinaryInTraining(ScaledAndActive):
    def forward(self, x):
        y = self.act(nn.BatchNorm2d.forward(self, x))
        return y if self.training else 2 * y


@pytest.mark.parametrize("kind", [Scaled, ScaledAndActive, OrdinaryInTraining])
def test_forward_passes_that_are_not_batchnorms_are_refused_with_the_reason(kind):
    with pytest.raises(ConfigError, match=f"1 is a {kind.__name__}: .* forward pass of its own"):
        convert_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 3), kind(4)))


def test_a_replaced_forward_pass_is_refused():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    network[1].forward = lambda x: x
    with pytest.raises(ConfigError, match=r"forward pass of 1 .* was replaced"):
        convert_batchnorm(network)


def test_an_unmaterialised_layer_is_refused_with_a_way_out():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyBatchNorm2d())
    with pytest.raises(ConfigError, match="does not know its channels"):
        convert_batchnorm(network)
    network(images(2))
    assert kinds(convert_batchnorm(network)) == ["ContextBatchNorm2d"]


@pytest.mark.slow
def test_a_compiled_network_notices_the_conversion():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    compiled = torch.compile(network, backend="eager")
    with torch.no_grad():
        plain = compiled(images(4))
        convert_batchnorm(network)
        with context(network, "union", n_query=2):
            adapted, expected = compiled(images(4)), network(images(4))
    torch.testing.assert_close(adapted, expected)
    assert not torch.allclose(adapted, plain)


# --- adapt ----------------------------------------------------------------------------------------


def dropping():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.BatchNorm2d(4), nn.Dropout(0.5)]
    return convert_batchnorm(nn.Sequential(*layers))


@pytest.mark.parametrize("chunks", [1, 3])
def test_adapting_does_without_dropout_and_leaves_each_mode(chunks):
    network = dropping().train()
    network[1].eval()
    modes = [m.training for m in network.modules()]
    first = adapt(network, images(6).chunk(chunks), "p")
    assert [m.training for m in network.modules()] == modes
    second = adapt(network.eval(), images(6).chunk(chunks), "p")
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    third = adapt(network, (images(6)[k : k + 2] for k in (0, 2, 4)), "p")
    torch.testing.assert_close(third, first)


@pytest.mark.parametrize(
    ("controls", "says"),
    [
        (images(4), r"one tensor of shape \(4, 3, 8, 8\), not a sequence"),
        ([*images(4)[:, 0, 0]], "no batch of a network"),
        ([[1.0]], "no batch of a network .list"),
        ([images(2), images(2)[..., :6]], "several shapes"),
        ([images(4), images(4) / 0], "not finite"),
        ([images(4) * torch.nan], "not finite"),
    ],
)
def test_what_is_not_chunks_is_refused_and_changes_nothing(controls, says):
    network = dropping().train()
    before = adapt(network, [images(5)], "p")
    with pytest.raises(DataError, match=says):
        adapt(network, controls, "p")
    torch.testing.assert_close(stored_statistics(network, "p"), before, rtol=0, atol=0)
    assert network[1].training
