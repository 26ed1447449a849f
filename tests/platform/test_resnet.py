import pickle

import pytest
import torch
from torch import nn

from fulgurite.errors import CheckpointError, ConfigError
from fulgurite.layers import ResNet, ResNet18, ResNet34, ResNet50
from fulgurite.layers.resnet import BasicBlock


def tiny(classes=3, stem="cifar", channels=1, weights=None):
    return ResNet(BasicBlock, (1, 1, 1, 1), channels, classes, stem=stem, weights=weights)


@pytest.mark.parametrize(
    ("network", "parameters", "dim"),
    [(ResNet18, 11_689_512, 512), (ResNet34, 21_797_672, 512), (ResNet50, 25_557_032, 2048)],
)
def test_sizes_are_those_of_the_paper(network, parameters, dim):
    model = network(3, 1000)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.head.in_features == dim
    assert model.head is model.fc


def test_parameter_names_are_torchvisions():
    shallow, deep = ResNet18(3, 10).state_dict(), ResNet50(3, 10).state_dict()
    assert len(shallow) == 122
    assert len(deep) == 320
    for name, shape in {
        "conv1.weight": (64, 3, 7, 7),
        "bn1.running_var": (64,),
        "layer1.0.conv2.weight": (64, 64, 3, 3),
        "layer2.0.downsample.0.weight": (128, 64, 1, 1),
        "layer2.0.downsample.1.num_batches_tracked": (),
        "layer4.1.bn2.bias": (512,),
        "fc.weight": (10, 512),
    }.items():
        assert shallow[name].shape == shape
    assert "layer1.0.downsample.0.weight" not in shallow
    assert deep["layer1.0.downsample.0.weight"].shape == (256, 64, 1, 1)
    assert deep["layer3.5.conv3.weight"].shape == (1024, 256, 1, 1)


@pytest.mark.parametrize(("stem", "side"), [("imagenet", 1), ("cifar", 4)])
def test_stem_decides_the_resolution(stem, side):
    model = tiny(stem=stem).eval()
    seen = []
    model.layer4.register_forward_hook(lambda *call: seen.append(call[2].shape))
    x = torch.randn(2, 1, 32, 32)
    features = model.features(x)
    assert seen == [(2, 512, side, side)]
    assert (features >= 0).all()
    torch.testing.assert_close(model(x), model.head(features))


def test_gradients_reach_all_parameters():
    model = ResNet(BasicBlock, (2, 1, 1, 1), 3, 4)
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_unknown_stem_is_refused():
    with pytest.raises(ConfigError, match="mnist"):
        tiny(stem="mnist")


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state}])
def test_weights_are_loaded(tmp_path, wrap):
    source = tiny()
    torch.save(wrap(source.state_dict()), tmp_path / "weights.pt")
    target = tiny(weights=tmp_path / "weights.pt")
    assert all(torch.equal(source.state_dict()[n], v) for n, v in target.state_dict().items())


def test_a_head_of_another_size_is_dropped(tmp_path):
    source = tiny(classes=7)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    with pytest.warns(UserWarning, match=r"fc\.bias, fc\.weight"):
        target = tiny(classes=3, weights=tmp_path / "weights.pt")
    assert target.fc.out_features == 3
    assert torch.equal(target.conv1.weight, source.conv1.weight)


@pytest.mark.parametrize(
    ("other", "named"),
    [({"stem": "imagenet"}, "conv1"), ({"channels": 3}, "conv1")],
)
def test_weights_of_another_network_are_refused(tmp_path, other, named):
    torch.save(tiny(**other).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match=named):
        tiny(weights=tmp_path / "weights.pt")
    state = tiny().state_dict()
    del state["layer1.0.bn1.weight"]
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match=r"layer1\.0\.bn1"):
        tiny(weights=tmp_path / "weights.pt")


class Malicious:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def test_unreadable_weights_are_one_error(tmp_path):
    path = tmp_path / "weights.pt"
    with pytest.raises(CheckpointError, match="is not a file"):
        tiny(weights=path)
    for content in (b"", b"not a checkpoint", pickle.dumps(Malicious(), protocol=2)):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="plain tensors"):
            tiny(weights=path)
    torch.save(Malicious(), path)
    with pytest.raises(
        CheckpointError, match=r"holds builtins\.exec: only tensors and plain types"
    ):
        tiny(weights=path)
    torch.save(tiny().state_dict(), path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="plain tensors"):
        tiny(weights=path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="no state dict"):
        tiny(weights=path)
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(CheckpointError, match=r"holds torch\.nn.*: only tensors and plain types"):
        tiny(weights=path)
