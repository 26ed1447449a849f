"""Weights of a local file: what fits is loaded, what does not is told apart."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fulgurite.errors import CheckpointError, ConfigError
from fulgurite.weights import head_name, load_weights


class Net(nn.Module):
    def __init__(self, width=4, classes=3):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))
        self.head = nn.Linear(width, classes)


def prefixed(state, prefix):
    return {f"{prefix}{name}": value for name, value in state.items()}


def write(folder, content, name="a.pt"):
    path = folder / name
    if name.endswith(".safetensors"):
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


def same(one, other, names=None):
    one, other = one.state_dict(), other.state_dict()
    return all(torch.equal(one[name], other[name]) for name in names or one)


@pytest.mark.parametrize("name", ["a.pt", "a.ckpt", "a.safetensors"])
@pytest.mark.parametrize("prefix", ["", "module.", "network.", "model.backbone."])
def test_weights_of_each_kind_of_file_and_prefix(tmp_path, name, prefix):
    source, target = Net(), Net()
    state = prefixed(source.state_dict(), prefix)
    load_weights(
        target, write(tmp_path, {"state_dict": state} if name == "a.ckpt" else state, name)
    )
    assert same(source, target)


def test_what_belongs_to_other_parts_is_left_out_with_a_note(tmp_path, log):
    source, target = Net(), Net()
    state = prefixed(source.state_dict(), "network.") | {"projector.weight": torch.zeros(2)}
    load_weights(target, write(tmp_path, state))
    assert same(source, target)
    assert "1 other tensors are left out (projector.weight)" in log.text


def test_two_networks_that_fit_are_asked_for(tmp_path):
    state = prefixed(Net().state_dict(), "student.") | prefixed(Net().state_dict(), "teacher.")
    with pytest.raises(ConfigError, match=r"2 networks that fit, under student\., teacher\."):
        load_weights(Net(), write(tmp_path, state))


def test_missing_unknown_and_misshapen_tensors_are_told_apart(tmp_path):
    state = Net(width=5).state_dict()
    del state["body.0.bias"]
    state["extra"] = torch.zeros(1)
    target = Net()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    message = (
        r"missing: body\.0\.bias; unknown: extra; of another shape or kind: "
        r"body\.0\.weight \(float32 \(5, 2\), not float32 \(4, 2\)\), .* and 1 more"
    )
    path = write(tmp_path, state)
    with pytest.warns(UserWarning, match="head"), pytest.raises(ConfigError, match=message):
        load_weights(target, path, head="head")
    assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())


@pytest.mark.parametrize("change", ["absent", "size", "deeper"])
def test_only_the_head_may_differ(tmp_path, change):
    source, target = Net(classes=7), Net()
    state = source.state_dict()
    if change != "size":
        state = {name: value for name, value in state.items() if not name.startswith("head")}
    if change == "deeper":
        state["head.2.weight"] = torch.zeros(2, 2)
    path = write(tmp_path, state)
    with pytest.warns(UserWarning, match=r"the head \(head.* starts untrained"):
        load_weights(target, path, head="head")
    body = [name for name in target.state_dict() if name.startswith("body")]
    assert same(source, target, body)
    with pytest.raises(ConfigError, match=r"head\.weight"):
        load_weights(target, path, head="fc")


def test_half_precision_is_read_and_integers_are_no_weights(tmp_path):
    source, target = Net().half(), Net()
    load_weights(target, write(tmp_path, source.state_dict()))
    assert target.body[0].weight.equal(source.body[0].weight.float())
    state = source.state_dict() | {"body.0.weight": torch.ones(4, 2, dtype=torch.int8)}
    with pytest.raises(ConfigError, match=r"body\.0\.weight \(int8"):
        load_weights(target, write(tmp_path, state))
    state = source.state_dict() | {"body.0.bias": torch.tensor([1.0, torch.nan, 0, 0])}
    with pytest.raises(ConfigError, match=r"not finite: body\.0\.bias"):
        load_weights(target, write(tmp_path, state))


@pytest.mark.parametrize("content", [b"", b"\x00" * 40, b"\xff" * 9])
def test_a_damaged_safetensors_is_one_error(tmp_path, content):
    path = tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError, match="is not a file"):
        load_weights(Net(), path)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        load_weights(Net(), path)


def test_the_head_is_known_by_its_name():
    assert head_name(Net()) == "head"
    assert head_name(nn.Linear(1, 1)) == "head"
