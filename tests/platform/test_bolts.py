"""lightning-bolts, leaf by leaf: with it (CI installs it), and without."""

import copy
import importlib.util
import math
import subprocess
import sys
import warnings
from importlib import metadata

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from fulgurite import bolts
from fulgurite.errors import MissingExtraError

needs_bolts = pytest.mark.skipif(
    importlib.util.find_spec("pl_bolts") is None,
    reason="pip install --no-deps lightning-bolts==0.7.0",
)


class Consumer:
    """Takes an optimizer and a scheduler as the modules of this project do."""

    def __init__(self, optimizer: OptimizerCallable, scheduler: LRSchedulerCallable):
        self.optimizer, self.scheduler = optimizer, scheduler


def parse(*options):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Consumer, "m")
    common = ["--m.optimizer=fulgurite.bolts.LARS", "--m.optimizer.lr=0.5"]
    common += ["--m.scheduler=fulgurite.bolts.LinearWarmupCosineAnnealingLR"]
    common += ["--m.scheduler.warmup_epochs=3", "--m.scheduler.max_epochs=10"]
    config = parser.parse_args([*common, *options])
    return config, parser


def instantiate(parser, config):
    if hasattr(parser, "instantiate"):  # since jsonargparse 4.49
        return parser.instantiate(config).m
    return parser.instantiate_classes(config).m


def steps(schedule, count):
    rates = []
    for _ in range(count):
        rates.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    return rates


@needs_bolts
def test_class_paths_work_from_the_command_line():
    config, parser = parse("--m.optimizer.weight_decay=0.1")
    assert config.m.optimizer.class_path == "fulgurite.bolts.LARS"
    again = parser.parse_string(parser.dump(config))
    made = instantiate(parser, again)
    optimizer = made.optimizer(torch.nn.Linear(2, 2).parameters())
    assert isinstance(optimizer, bolts.LARS)
    assert type(optimizer).__mro__[2].__module__ == "pl_bolts.optimizers.lars"
    assert optimizer.defaults["weight_decay"] == 0.1
    assert isinstance(made.scheduler(optimizer), torch.optim.lr_scheduler.LRScheduler)


@needs_bolts
def test_schedule_is_the_closed_form():
    optimizer = bolts.LARS([torch.nn.Parameter(torch.ones(1))], lr=0.4)
    warmup, total = 3, 10
    schedule = bolts.LinearWarmupCosineAnnealingLR(optimizer, warmup, total)
    expected = [
        0.4 * (e / (warmup - 1) if e < warmup else (1 + math.cos(math.pi * (e - 3) / 7)) / 2)
        for e in range(total)
    ]
    assert steps(schedule, total) == pytest.approx(expected, abs=1e-12)


@needs_bolts
def test_lars_is_the_formula_and_trains():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(4, 3))
    gradient = torch.randn(4, 3)
    weight.grad = gradient.clone()
    before = weight.detach().clone()
    optimizer = bolts.LARS([weight], lr=0.5, weight_decay=0.1, trust_coefficient=0.01)
    optimizer.step()
    norm, slope = before.norm(), gradient.norm()
    local = 0.01 * norm / (slope + 0.1 * norm + 1e-8)
    torch.testing.assert_close(weight.detach(), before - 0.5 * local * (gradient + 0.1 * before))
    with pytest.raises(ValueError, match="learning rate"):
        bolts.LARS([weight], lr=-1.0)


@needs_bolts
def test_state_and_copies_continue_equally():
    def make():
        torch.manual_seed(1)
        net = torch.nn.Linear(3, 1)
        return net, bolts.LARS(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)

    def train(net, optimizer):
        optimizer.zero_grad()
        net(torch.ones(2, 3)).square().mean().backward()
        optimizer.step()

    (net, optimizer), (other, resumed) = make(), make()
    train(net, optimizer)
    other.load_state_dict(net.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert isinstance(copy.deepcopy(optimizer), bolts.LARS)
    train(net, optimizer)
    train(other, resumed)
    assert torch.equal(net.weight, other.weight)


@needs_bolts
@pytest.mark.slow
def test_nothing_is_warned_and_no_filter_is_left():
    code = """
import warnings
import numpy
before, filters = set(vars(numpy)), list(warnings.filters)
warnings.simplefilter("error")
import torch
from fulgurite import bolts
optimizer = bolts.LARS([torch.nn.Parameter(torch.ones(1))], lr=0.1)
bolts.LinearWarmupCosineAnnealingLR(optimizer, 2, 4)
written = {"object", "bool", "int", "float", "complex", "str"} & set(vars(numpy)) - before
assert not written, written
assert not [f for f in warnings.filters if "UnderReview" in str(f)]
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


@needs_bolts
@pytest.mark.parametrize("leaf", ["models.vision.unet", "models.self_supervised.resnets"])
def test_other_leaves_load(leaf):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these files' own escapes and deprecations
        module = bolts.load_bolts(leaf)
    assert module.__name__ == f"pl_bolts.{leaf}"


def test_without_bolts_the_command_line_still_parses(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(bolts.metadata, "distribution", absent)
    bolts.join_classes.cache_clear()
    config, parser = parse()
    made = instantiate(parser, config)
    install = "pip install --no-deps lightning-bolts==0.7.0"
    with pytest.raises(MissingExtraError, match=install):
        made.optimizer(torch.nn.Linear(2, 2).parameters())
    with pytest.raises(MissingExtraError, match=install):
        bolts.load_bolts("optimizers.lars")
    with pytest.raises(Exception, match="Option 'lrr' is not accepted"):
        parse("--m.optimizer.lrr=1")
