"""Every point of every packaged sweep parses through the real command line."""

from importlib import resources
from pathlib import Path

import pytest
import yaml

from fulgurite.errors import ConfigError
from fulgurite.testing.sweeps import agent_commands, sweep_points

CONFIGS = Path(str(resources.files("fulgurite.configs")))
SWEEPS = sorted(CONFIGS.glob("*/sweep.yaml"))


def value_at(config, key):
    """The value of a dotted key, through nested namespaces and plain dictionaries."""
    for part in key.split("."):
        config = config[part]
    return config


def test_there_is_a_sweep():
    assert CONFIGS / "fedsir" / "sweep.yaml" in SWEEPS


@pytest.mark.parametrize("values", ["some", pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.parent.name)
def test_every_value_parses_and_arrives(path, values):
    """The first point that has each value, or the first and the last of these, which is quicker."""
    sweep = yaml.safe_load(path.read_text())
    points = list(sweep_points(sweep))
    assert len(points) == len({str(point) for point in points}) > 1
    commands = [*zip(points, agent_commands(path), strict=True)]
    seen, new = set(), []
    for point, command in commands:
        if not seen >= (pairs := {(key, str(value)) for key, value in point.items()}):
            new.append((point, command))
        seen |= pairs
    for number, (point, command) in enumerate(new if values == "all" else (new[0], new[-1])):
        check_point(sweep, point, command, in_order=number % 2 == 1)


def check_point(sweep, point, command, *, in_order):
    """Check that a command has the values of its point; the agent promises no order of them."""
    from fulgurite.cli import parse

    assert command[0] == "fulgurite"
    head = len(sweep["command"]) - 2  # all but ${env} and ${args}
    options = command[head:]
    config = parse([*command[1:head], *(options if in_order else reversed(options))])
    for key, value in point.items():
        if key != "trainer.logger":
            assert value_at(config, key) == value, key
    assert config.trainer.logger.class_path.endswith("WandbLogger")


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.parent.name)
def test_expansion_is_the_agents_own(path):
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    sweep = yaml.safe_load(path.read_text())
    for point, command in zip(sweep_points(sweep), agent_commands(path), strict=True):
        theirs = utils.create_sweep_command_args(
            {"args": {k: {"value": v} for k, v in point.items()}}
        )
        assert command[-len(point) :] == theirs["args"]


@pytest.mark.parametrize(
    "command",
    [[], ["fulgurite", "fit"], ["${env}", "${interpreter}", "fulgurite", "${args}"]],
)
def test_a_command_that_the_agent_would_run_otherwise_is_refused(command):
    with pytest.raises(ConfigError, match="command"):
        list(agent_commands({"command": command, "parameters": {"a": {"value": 1}}}))


def test_a_parameter_without_values_is_refused():
    with pytest.raises(ConfigError, match="'lr' has no values"):
        list(sweep_points({"parameters": {"lr": {"distribution": "normal"}}}))
