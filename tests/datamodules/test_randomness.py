"""Reading data leaves a run's random numbers alone, on every rank, with and without a cache."""

import pytest
import torch
from fakes.cs_arm_bn import TINY_WORLD

from fulgurite.data.text_options import TextOptions
from fulgurite.datamodules.cs_arm_bn import GroupFolds, PlateDataModule, SyntheticPlates
from fulgurite.datamodules.fedsir import FederatedDataModule, Iid, ImageFolder
from fulgurite.datamodules.number_probing import (
    NumberTextDataModule,
    NumberTextOptions,
    TokenizerOptions,
)
from fulgurite.datamodules.stream_cqsa import ByteTextDataModule
from fulgurite.testing.files import write_image_files


def plates(folder, **options):
    world = TINY_WORLD | {"plates": [2, 1]}
    source = SyntheticPlates(world, path=str(folder / "plates"))
    return PlateDataModule(
        source,
        GroupFolds(group="image", folds=2),
        episodes={"queries": 4, "controls": 4, "min_controls": 1},
        **options,
    )


def images(folder):
    write_image_files(folder / "i", per_class=12)
    return FederatedDataModule(ImageFolder(str(folder / "i")), Iid(), clients=2)


def byte_text(folder):
    (folder / "a.txt").write_text("words and 12 numbers " * 200)
    return ByteTextDataModule(TextOptions([str(folder)]), length=16)


def number_text(folder):
    (folder / "a.txt").write_text("words and 12 numbers " * 200)
    return NumberTextDataModule(
        NumberTextOptions([str(folder)]), tokenizer=TokenizerOptions(vocab_size=1100), length=16
    )


def draw_after(make, folder, is_first_rank, **options):
    torch.manual_seed(0)
    data = make(folder, **options)
    if is_first_rank:
        data.prepare_data()
    data.setup("fit")
    return torch.rand(3).tolist()


@pytest.mark.parametrize("make", [plates, images, byte_text, number_text])
def test_every_rank_draws_the_same_numbers_after_reading(tmp_path, make, cache):
    torch.manual_seed(0)
    expected = torch.rand(3).tolist()
    assert draw_after(make, tmp_path, True) == expected  # fills the cache
    assert draw_after(make, tmp_path, True) == expected
    assert draw_after(make, tmp_path, False) == expected  # as ranks but the first
    if make is plates:
        assert draw_after(make, tmp_path, True, pixels={"cache": False}) == expected
