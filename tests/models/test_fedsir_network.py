import pytest
import torch

import fulgurite.models.fedsir as fedsir
from fulgurite.models.fedsir import DigitsNet, ResNet18, SmallCNN


@pytest.mark.parametrize(
    ("make", "shape", "dim"),
    [
        (lambda: DigitsNet(1, 7), (4, 1, 8, 8), 64),
        (lambda: DigitsNet(3, 7, image_size=6, hidden=16, width=12), (4, 3, 6, 6), 12),
        (lambda: SmallCNN(1, 7, width=4), (4, 1, 8, 8), 16),
        (lambda: SmallCNN(3, 7, width=8), (4, 3, 33, 20), 32),
        (lambda: ResNet18(1, 7, stem="cifar"), (4, 1, 8, 8), 512),
    ],
)
def test_networks_expose_their_features(make, shape, dim):
    network = make().eval()
    x = torch.randn(shape)
    features = network.features(x)
    assert features.shape == (4, dim)
    assert (features >= 0).all()  # the score relies on a shared positive mean
    assert network.head.out_features == 7
    torch.testing.assert_close(network(x), network.head(features))
    network.train()
    network(x).sum().backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("make", [lambda: DigitsNet(1, 3), lambda: SmallCNN(1, 3, width=4)])
def test_networks_map_over_clients(make):
    networks = [make() for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(networks)
    x = torch.randn(3, 5, 1, 8, 8)

    def loss(parameters, buffers, x):
        return torch.func.functional_call(networks[0], (parameters, buffers), (x,)).square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss))(parameters, buffers, x)
    networks[2](x[2]).square().sum().backward()
    torch.testing.assert_close(gradients["head.weight"][2], networks[2].head.weight.grad)


def test_public_names_exist():
    for name in fedsir.__all__:
        assert getattr(fedsir, name).__name__ == name
    assert set(fedsir.__all__) <= set(dir(fedsir))
    with pytest.raises(AttributeError, match="split_samples"):
        _ = fedsir.split_samples
