"""Records of options: one annotation is what the parser, --help and Python callers check."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pydoc import locate
from typing import Literal

import numpy as np
import pytest
import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from lightning import LightningDataModule

from fulgurite.base import save_options
from fulgurite.errors import ConfigError
from fulgurite.options import (
    ClosedUnitInterval,
    IntAboveOne,
    NonNegativeInt,
    PositiveInt,
    check_arguments,
    check_options,
    list_options,
    make_options,
)


@dataclass(frozen=True)
class Crop:
    """How images are cropped.

    Args:
        size: Side of the crop [pixels].
    """

    size: PositiveInt | None = None

    def __post_init__(self):
        check_options(self, "data.init_args.evaluation.crop")


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation shows.

    Args:
        queries: Number of queries.
        fraction: Fraction of them.
        word: What is shown.
        sizes: Several sizes.
        pair: Two numbers.
        crop: The crop.
    """

    queries: PositiveInt = 64
    fraction: ClosedUnitInterval = 0.5
    word: Literal["all", "some"] = "all"
    sizes: list[IntAboveOne] | None = None
    pair: tuple[int, float] = (1, 2.0)
    crop: Crop = Crop()

    def __post_init__(self):
        check_options(self, "data.init_args.evaluation")


class Data(LightningDataModule):
    """Data.

    Args:
        evaluation: What an evaluation shows.
        workers: Number of processes.
    """

    def __init__(self, evaluation: Evaluation = Evaluation(), workers: NonNegativeInt = 0):
        super().__init__()
        check_arguments(Data.__init__, locals(), "data.init_args")
        save_options(self)
        self.evaluation = make_options(Evaluation, evaluation)
        self.workers = workers


def parse(*argv):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    return parser, parser.parse_args([f"--data={__name__}.Data", *argv])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"queries": 0}, r"The queries of evaluation is 0\. Set `--data\.init_args\.evaluation"),
        ({"queries": 0}, r"\.queries` to an int > 0\."),
        ({"queries": 1.5}, "to an int"),
        ({"queries": True}, "is True"),
        ({"queries": None}, "is None"),
        ({"fraction": 1.1}, r"to a float >= 0 and <= 1\."),
        ({"fraction": float("nan")}, "is nan"),
        ({"fraction": "1"}, "to a float"),
        ({"word": "none"}, "to one of all, some"),
        ({"sizes": [2, 1]}, "a list, each value an int > 1 or null"),
        ({"sizes": 3}, "to a list or null"),
        ({"pair": (1,)}, "to a list of 2 values"),
        ({"crop": 3}, "to the options of a Crop"),
        ({"crop": {"size": -1}}, r"The size of crop is -1\. .*crop\.size` to an int > 0 or null"),
        ({"crop": {"sizes": 1}}, "Crop has no option 'sizes'. It has: size"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(values, words):
    with pytest.raises(ConfigError, match=words):
        Evaluation(**values)


def test_values_become_plain():
    record = Evaluation(np.int64(3), np.float32(0.5), crop={"size": np.int32(2)}, pair=[1, 2])
    assert record == Evaluation(3, 0.5, crop=Crop(2), pair=(1, 2.0))
    kinds = [type(v) for v in (record.queries, record.fraction, record.crop.size, record.pair[1])]
    assert kinds == [int, float, int, float]
    assert make_options(Evaluation, list_options(record)) == record


def test_the_parser_nests_records_and_gives_plain_values():
    parser, config = parse("--data.evaluation.queries=8", "--data.evaluation.crop.size=3")
    text = parser.dump(config)
    options = yaml.safe_load(text)["data"]["init_args"]
    assert options["evaluation"]["queries"] == 8
    assert options["evaluation"]["crop"] == {"size": 3}
    data = parser.instantiate(parser.parse_string(text)).data
    assert data.evaluation == Evaluation(8, crop=Crop(3))
    assert type(data.evaluation.queries) is type(data.workers) is int


@pytest.mark.parametrize(
    "argument", ["queries=0", "fraction=2", "word=none", "crop.size=-1", "sizes=[1]", "other=1"]
)
def test_the_parser_refuses_what_the_annotations_do_not_allow(argument):
    with pytest.raises(Exception, match=argument.split("=")[0].split(".")[0]):
        parse(f"--data.evaluation.{argument}")


def test_help_shows_ranges(capsys):
    with pytest.raises(SystemExit):
        parse(f"--data.help={__name__}.Data")
    printed = capsys.readouterr().out
    assert "--data.evaluation.queries" in printed
    assert "PositiveInt" in printed


@pytest.mark.parametrize(
    ("record", "argument", "kind"),
    [
        ("cs_arm_bn.synthetic.PlateWorld", "size=7", "ImageSide"),
        ("ice_layers.generator.world.World", "stacks=0", "StackCount"),
        ("ice_layers.options.SplitOptions", "guard=1001", "Years"),
        ("ice_layers.readers.sred_options.SredBins", "size=0", "BinSize"),
        ("ice_layers.tracks.blocks.Blocks", "traces=1", "BlockTraces"),
    ],
)
def test_the_parser_knows_the_ranges_that_a_module_defines(record, argument, kind):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(locate(f"fulgurite.datamodules.{record}"))
    with pytest.raises(ArgumentError, match=f"Not of type {kind}"):
        parser.parse_args([f"--{argument}"])


def test_arguments_of_a_constructor():
    with pytest.raises(ConfigError, match=r"The workers is -1\. Set `--data.init_args.workers`"):
        Data(workers=-1)
    with pytest.raises(ConfigError, match="int"):
        Data(workers=0.5)


def test_saved_options_are_plain():
    data = Data(Evaluation(7, crop=Crop(2)))
    assert data.hparams["evaluation"] == list_options(Evaluation(7, crop=Crop(2)))
    assert data.hparams_initial == data.hparams
    assert Data(**data.hparams).evaluation == data.evaluation
    assert isinstance(pickle.dumps(dict(data.hparams)), bytes)


def test_checkpoints_of_options_are_read_safely(tmp_path):
    torch.save(dict(Data(Evaluation(7)).hparams), tmp_path / "options.pt")
    saved = torch.load(tmp_path / "options.pt", weights_only=True)
    assert saved["evaluation"]["queries"] == 7
