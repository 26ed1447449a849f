"""Networks of one's own: classified as they are, or refused by name."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fulgurite.domains.cs_arm_bn import PlateBatch
from fulgurite.errors import ConfigError
from fulgurite.models.cs_arm_bn import ARMLL, CSARMBN, TENT, LinearProbe, PlateClassifier


class Network(nn.Module):
    """A layer under two names, and a BatchNorm that the forward pass does not use."""

    def __init__(self, channels, classes, affine=True):
        super().__init__()
        self.norm, self.unused = nn.BatchNorm2d(channels, affine=affine), nn.BatchNorm2d(channels)
        self.first = nn.Linear(channels, channels)
        self.second = self.first
        self.head = nn.Linear(channels, classes)
        self.unused.requires_grad_(affine)

    def forward(self, x):
        return self.head(self.second(self.first(self.norm(x).square().mean((2, 3))).tanh()))


class TwoOutputs(Network):
    def forward(self, x):
        return super().forward(x), x


class ManyOutputs(Network):
    def __init__(self, channels, classes):
        super().__init__(channels, classes)
        self.head = nn.Sequential(nn.Linear(channels, classes + 2))


def make_batch():
    generator = torch.Generator().manual_seed(0)
    query, control = torch.randn(2, 6, 3, 4, 4, generator=generator)
    return PlateBatch.from_images(query, control, torch.arange(6) % 4, 0)


def predict(module):
    module.eval().method.begin(module.network, (), training=False)
    logits = module.logits(make_batch())
    module.method.end(module.network)
    return logits


@pytest.mark.parametrize("method", [ARMLL, TENT, CSARMBN])
def test_networks_with_shared_and_unused_layers_keep_their_parameters(method):
    module = PlateClassifier(Network, method=method(), num_classes=4, in_channels=3)
    parameters = list(module.network.parameters())
    assert predict(module).shape == (6, 4)
    assert all(a is b for a, b in zip(parameters, module.network.parameters(), strict=True))
    torch.testing.assert_close(predict(module), predict(module), rtol=0, atol=0)


@pytest.mark.parametrize(("network", "kind"), [(TwoOutputs, "tuple"), (ManyOutputs, r"\(6, 6\)")])
def test_outputs_that_are_no_logits_are_refused(network, kind):
    module = PlateClassifier(network, method=CSARMBN(), num_classes=4, in_channels=3)
    with pytest.raises(ConfigError, match=f"gives no logits of 6 images and 4 classes.*{kind}"):
        predict(module)


def test_a_network_of_which_nothing_is_trained_is_refused():
    network = Network(3, 4).requires_grad_(False)
    with pytest.raises(
        ConfigError, match="No parameter of the network Network is trained by CSARMBN"
    ):
        PlateClassifier(
            network, method=CSARMBN(), num_classes=4, in_channels=3
        ).configure_optimizers()
    probed = PlateClassifier(network, method=LinearProbe(), num_classes=4, in_channels=3)
    assert probed.configure_optimizers() is not None


def test_tent_says_that_nothing_can_be_trained():
    module = PlateClassifier(
        lambda *sizes: Network(*sizes, affine=False), method=TENT(), num_classes=4, in_channels=3
    )
    with pytest.raises(ConfigError, match="none that can be trained"):
        predict(module)


class Lazy(nn.Sequential):
    def __init__(self, channels, classes):
        super().__init__(nn.BatchNorm2d(channels), nn.Flatten(), nn.LazyLinear(classes))


def test_layers_without_sizes_are_refused_where_ranks_would_share_them():
    module = PlateClassifier(Lazy, num_classes=4, in_channels=3)
    module.trainer = SimpleNamespace(world_size=2)
    with pytest.raises(ConfigError, match=r"LazyLinear \(network\.2\), which does not know its"):
        module.setup("fit")
