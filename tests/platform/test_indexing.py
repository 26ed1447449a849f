"""Arguments that are looked up by name are those that jsonargparse itself would find."""

from contextlib import nullcontext

import pytest
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace, _subcommands

from fulgurite.cli import lightning_cli, parse
from fulgurite.indexing import indexing_arguments


def parser_of(*names):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile)
    for name in names:
        parser.add_argument(name, type=int, default=0)
    return parser


def test_a_configuration_parses_to_the_same(monkeypatch):
    fast = parse(["fit", "--config", "fedsir/smoke.yaml", "--trainer.max_epochs=3"])
    monkeypatch.setattr(lightning_cli, "indexing_arguments", nullcontext)
    assert fast == parse(["fit", "--config", "fedsir/smoke.yaml", "--trainer.max_epochs=3"])


def test_arguments_that_are_added_later_are_found():
    parser = parser_of("--a", "--b.c")
    with indexing_arguments():
        assert parser.parse_object({"a": 1, "b": {"c": 2}}).b.c == 2
        with pytest.raises(ArgumentError, match="d"):
            parser.parse_object({"d": 3})
        parser.add_argument("--d", type=int)
        assert parser.parse_object({"d": 3}).d == 3


def test_other_names_and_subcommands_are_found():
    parser = ArgumentParser(exit_on_error=False)
    inner = parser_of("--x")
    inner.add_argument("-l", "--lr", "--learning_rate", type=float)
    parser.add_subcommands().add_subcommand("fit", inner)
    with indexing_arguments():
        assert parser.parse_args(["fit", "--x=4", "--learning_rate=0.5"]).fit.lr == 0.5
        assert inner.parse_object({"learning_rate": 0.5}).lr == 0.5


def test_nothing_is_left_of_it():
    find, split = _subcommands.find_action_and_subcommand, Namespace._parse_key
    with indexing_arguments(), indexing_arguments():
        assert _subcommands.find_action_and_subcommand is not find
        for key in ("", "a b", 5):
            with pytest.raises(KeyError):
                Namespace()[key]
    assert (_subcommands.find_action_and_subcommand, Namespace._parse_key) == (find, split)


def test_versions_that_are_built_in_another_way_are_left_alone(monkeypatch):
    find = _subcommands.find_action_and_subcommand
    monkeypatch.delattr("jsonargparse._namespace.add_clash_mark")
    with indexing_arguments():
        assert _subcommands.find_action_and_subcommand is find
