"""MuonAdamW: which parameters go where, equality with the two of PyTorch, and life in Lightning."""

import copy
import io

import pytest
import torch
from torch import nn

from fulgurite.errors import ConfigError
from fulgurite.models.number_probing.backbones import (
    LSTMBackbone,
    PositionOptions,
    TransformerBackbone,
)
from fulgurite.models.number_probing.language_models.optimizer import (
    AdamWOptions,
    MuonAdamW,
    MuonOptions,
    parameter_groups,
)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.backbone = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))

    def forward(self):
        x = self.embedding.weight
        return (self.backbone(x) - x.roll(1, 0)).square().sum()


pytestmark = pytest.mark.usefixtures("seeded")


def names(module, groups):
    of = {id(p): name for name, p in module.named_parameters()}
    return {group["name"]: {of[id(p)] for p in group["params"]} for group in groups}


def optimizer_of(model, **options):
    return MuonAdamW(parameter_groups(model, model.backbone), **options)


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()


# --- groups --------------------------------------------------------------------------------------


def test_every_parameter_is_in_one_group():
    for backbone in (
        TransformerBackbone(8, 1, 2, positions=PositionOptions("learned", 5)),
        LSTMBackbone(8, 1),
    ):
        model = nn.ModuleDict({"embedding": nn.Embedding(11, 8), "backbone": backbone})
        groups = names(model, parameter_groups(model, backbone))
        assert sum(map(len, groups.values())) == len([*model.parameters()])
        assert groups["tables"] >= {"embedding.weight"}
        assert all("embedding" not in name for name in groups["hidden"])
        shapes = dict(model.named_parameters())
        assert all(shapes[name].ndim == 2 for name in groups["hidden"])
        assert all(shapes[name].ndim < 2 for name in groups["vectors"])
    assert groups["hidden"] == {f"backbone.layers.0.weight_{of}_l0" for of in ("ih", "hh")}


def test_positions_and_tied_weights_are_not_hidden():
    """By identity: a linear layer inside the backbone that shares the embedding is no exception."""
    backbone = TransformerBackbone(8, 1, 2, positions=PositionOptions("learned", 5))
    model = nn.ModuleDict({"embedding": nn.Embedding(11, 8), "backbone": backbone})
    groups = names(model, parameter_groups(model, backbone))
    assert groups["tables"] == {"embedding.weight", "backbone.positions.weight"}
    backbone.tied = nn.Linear(8, 11, bias=False)
    backbone.tied.weight = model["embedding"].weight
    (head,) = (p for n, p in backbone.named_parameters() if n == "tied.weight")
    groups = parameter_groups(model, backbone)
    assert not any(p is head for p in groups[0]["params"])
    assert sum(p is head for group in groups for p in group["params"]) == 1


def test_frozen_parameters_are_left_out():
    model = Model()
    model.embedding.weight.requires_grad_(False)
    assert "tables" not in names(model, parameter_groups(model, model.backbone))


def test_plain_optimizers_take_the_groups():
    model = Model()
    for kind in (torch.optim.AdamW, torch.optim.SGD):
        optimizer = kind(parameter_groups(model, model.backbone), lr=0.1, weight_decay=0.5)
        assert [g["weight_decay"] for g in optimizer.param_groups] == [0.5, 0.5, 0.0]
        train(model, optimizer, 1)


# --- steps ---------------------------------------------------------------------------------------


def test_it_steps_as_the_two_do():
    one = Model()
    two = copy.deepcopy(one)
    combined = optimizer_of(one, lr=0.02, adamw=AdamWOptions(lr=0.01), weight_decay=0.3)
    hidden, tables, vectors = (g["params"] for g in parameter_groups(two, two.backbone))
    muon = torch.optim.Muon(hidden, lr=0.02, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [{"params": tables, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}],
        lr=0.01, betas=(0.9, 0.95),
    )  # fmt: skip
    for _ in range(5):
        for model, optimizers in ((one, [combined]), (two, [muon, adamw])):
            model.zero_grad()
            model().backward()
            for optimizer in optimizers:
                optimizer.step()
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


def test_hidden_steps_are_orthogonal_and_embeddings_are_not():
    model = Model()
    before = copy.deepcopy(model)
    train(model, optimizer_of(model, lr=0.01, weight_decay=0.0), 1)
    step = (model.backbone[0].weight - before.backbone[0].weight).detach()
    values = torch.linalg.svdvals(step)
    assert values.max() / values.min() < 2  # Newton and Schulz stop within a factor
    step = (model.embedding.weight - before.embedding.weight).detach()
    torch.testing.assert_close(step.abs(), torch.full_like(step, 0.01), rtol=1e-3, atol=0)


def test_a_schedule_reaches_both():
    model = Model()
    optimizer = optimizer_of(model, lr=0.1, adamw=AdamWOptions(lr=0.01))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 1 else 0.0)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.01, 0.01]
    train(model, optimizer, 1)
    schedule.step()
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, 1)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_closure_is_called_once_with_gradients():
    model = Model()
    optimizer = optimizer_of(model)
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = model()
        loss.backward()
        calls.append(loss.item())
        return loss

    assert optimizer.step(closure).item() == calls[0]
    assert len(calls) == 1


def test_a_loaded_state_goes_on_bit_for_bit():
    model = Model()
    optimizer = optimizer_of(model, lr=0.02)
    train(model, optimizer, 3)
    resumed = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    train(model, optimizer, 3)
    file.seek(0)
    again = optimizer_of(resumed, lr=0.5)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert again.param_groups[0]["lr"] == 0.02
    train(resumed, again, 3)
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_deep_copy_steps_its_own_parameters():
    model = Model()
    pair = {"model": model, "optimizer": optimizer_of(model)}
    other = copy.deepcopy(pair)
    before = copy.deepcopy(model.state_dict())
    train(other["model"], other["optimizer"], 1)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    changed = other["model"].state_dict()
    assert all(not torch.equal(before[key], value) for key, value in changed.items())


def test_parameters_without_gradient_stay():
    model = Model()
    optimizer = optimizer_of(model)
    before = copy.deepcopy(model.state_dict())
    model.backbone[0].weight.sum().backward()
    optimizer.step()
    moved = {k for k, v in model.state_dict().items() if not torch.equal(before[k], v)}
    assert moved == {"backbone.0.weight"}


@pytest.mark.parametrize("frozen", ["embedding", "backbone"])
def test_either_may_be_empty(frozen):
    model = Model()
    getattr(model, frozen).requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer_of(model), 1)
    moved = {
        k.split(".")[0] for k, v in model.state_dict().items() if not torch.equal(before[k], v)
    }
    assert moved == {"embedding", "backbone"} - {frozen}


def test_a_group_can_be_added():
    model = Model()
    optimizer = optimizer_of(model)
    extra = nn.Parameter(torch.ones(3, 3))
    optimizer.add_param_group({**optimizer.param_groups[0], "params": [extra]})
    extra.grad = torch.eye(3)
    optimizer.step()
    assert not torch.equal(extra, torch.ones(3, 3))


def test_it_refuses_to_guess():
    model = Model()
    with pytest.raises(ConfigError, match="hidden"):
        MuonAdamW(model.parameters())
    with pytest.raises(ConfigError, match="hidden"):
        MuonAdamW([])
    with pytest.raises(ConfigError, match="2D"):
        MuonAdamW([{"params": [*model.parameters()], "hidden": True}])
    with pytest.raises(ConfigError, match="none is not supported"):
        optimizer_of(model, muon=MuonOptions(adjust_lr_fn="none"))
    with pytest.raises(ConfigError, match="beta"):
        optimizer_of(model, adamw=AdamWOptions(betas=(2.0, 0.5)))
