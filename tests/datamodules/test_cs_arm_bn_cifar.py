"""Corruptions, and CIFAR-10 whose plates are corruptions."""

import io
import os
import zipfile
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from fulgurite.datamodules.cs_arm_bn import CorruptedCifar, OfficialSplit, PlateDataModule
from fulgurite.datamodules.cs_arm_bn.corruptions import CORRUPTIONS, corrupt
from fulgurite.datamodules.cs_arm_bn.splits import check_assignment
from fulgurite.errors import ConfigError, DataError

FAMILIES = {
    "train": ["gaussian_noise", "fog"],
    "val": ["brightness"],
    "test": ["contrast", "pixelate"],
    "severities": [5],
}
SMALL = {
    "families": FAMILIES,
    "queries": 4,
    "controls": 6,
    "control": "ship",
}
CLASSES = ("cat", "dog", "ship")


pytestmark = pytest.mark.usefixtures("cache")


def picture(seed):
    """A smooth picture with structure at several scales."""
    y, x = np.mgrid[:32, :32] / 32
    g = np.random.default_rng(seed)
    waves = [
        0.5
        + 0.18 * np.sin(2 * np.pi * (g.uniform(0.5, 3) * x + g.uniform(0.5, 3) * y + g.uniform()))
        + 0.18 * np.sin(2 * np.pi * (g.uniform(3, 6) * x + g.uniform()))
        for _ in range(3)
    ]
    return np.rint(np.stack(waves, 2) * 255).astype(np.uint8)


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as file:
        for split, count in (("train", 30), ("test", 12)):
            for c, name in enumerate(CLASSES):
                for i in range(count):
                    data = io.BytesIO()
                    Image.fromarray(picture(c * 1000 + i)).save(data, "PNG")
                    file.writestr(f"{split}/{name}/{i:04}.png", data.getvalue())
    return str(path)


@pytest.mark.parametrize("family", CORRUPTIONS)
def test_each_corruption_changes_the_picture_more_the_severer_it_is(family):
    images = [picture(i) for i in range(6)]
    before = [image.copy() for image in images]
    damage = []
    for severity in range(1, 6):
        total = 0.0
        for i, image in enumerate(images):
            changed = corrupt(image, family, severity, np.random.default_rng(i))
            assert changed.shape == image.shape
            assert changed.dtype == np.uint8
            assert (corrupt(image, family, severity, np.random.default_rng(i)) == changed).all()
            total += float(np.abs(changed.astype(float) - image).mean())
        damage.append(total / len(images))
    assert all((a == b).all() for a, b in zip(images, before, strict=True))
    assert min(damage) > 0.2
    if family == "saturate":  # its first two severities take colour away, the others add some
        damage = damage[2:]
    assert damage[-1] > 1.2 * damage[0]
    assert all(b > 0.8 * a for a, b in pairwise(damage))


def test_corruptions_do_what_they_are_called():
    image = picture(0)

    def after(family, severity=5):
        changed = corrupt(image, family, severity, np.random.default_rng(0))
        return changed.astype(float)

    def detail(array):
        return np.abs(np.diff(array, axis=0)).mean()

    assert (corrupt(image, "clean", 0, np.random.default_rng(0)) == image).all()
    for family in ("gaussian_blur", "defocus_blur", "motion_blur", "zoom_blur", "contrast"):
        assert detail(after(family)) < 0.9 * detail(image.astype(float)), family
    for family in ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "pixelate"):
        assert np.abs(after(family) - image).max() > 20, family
    assert after("brightness").mean() > image.mean() + 40
    assert after("contrast").mean() == pytest.approx(image.mean(), abs=1)
    assert after("contrast").std() == pytest.approx(0.15 * image.std(), rel=0.1)
    grey = after("saturate", 2)
    assert np.ptp(grey, axis=2).mean() < 0.2 * np.ptp(image.astype(float), axis=2).mean()


def test_plates_are_corruptions_and_the_control_class_has_no_label(archive):
    source = CorruptedCifar(archive, **SMALL)
    assert source.class_names == ("cat", "dog")
    assert (source.num_classes, source.in_channels) == (2, 3)
    table = source.load()
    assert {d.split("|")[-1] for d in table.domains} == {
        "clean-0",
        "gaussian_noise-5",
        "fog-5",
        "brightness-5",
        "contrast-5",
        "pixelate-5",
    }
    assert (table.counts() == [8, 6]).all()
    wells = table.column("well")
    assert all(str(w).startswith("ship/") for w in wells[table.control])
    assert not any(str(w).startswith("ship/") for w in wells[~table.control])
    for split in ("train", "test"):  # no picture on two plates
        names = [p[0].split("#")[0] for p in table.paths() if p[0].startswith(split)]
        assert len(set(names)) == len(names)
    found = check_assignment(table, OfficialSplit().assign(table))
    batches = table.column("batch")
    assert set(batches[found.train]) == {"clean", "gaussian_noise", "fog"}
    assert set(batches[found.val]) == {"brightness"}
    assert set(batches[found.tests["new_batch"]]) == {"contrast", "pixelate"}
    assert set(batches[found.tests["in_domain"]]) == {"clean", "gaussian_noise", "fog"}
    assert len(found.tests["in_domain"]) == 3 * 2 * 1  # a fifth of four queries, rounded
    train = {p[0] for p in table.paths(found.train)}
    assert all(path.startswith("train/") for path in train)


def test_batches_hold_the_corrupted_pictures(archive):
    episodes = {"queries": 4, "controls": 6}
    pixels = {"augment": False, "mean": [0] * 3, "std": [1] * 3}
    source = CorruptedCifar(archive, **SMALL)
    data = PlateDataModule(source, OfficialSplit(), episodes=episodes, pixels=pixels)
    data.prepare_data()
    data.setup()
    pixels["cache"] = False
    again = PlateDataModule(source, OfficialSplit(), episodes=episodes, pixels=pixels)
    again.setup()
    for one, two in zip(data.test_dataloader()[1], again.test_dataloader()[1], strict=True):
        assert one.query.equal(two.query)
        assert one.control.equal(two.control)
    for batch in data.train_dataloader():
        batch = data.on_after_batch_transfer(batch, 0)
        for image, row in zip(batch.query, batch.row.tolist(), strict=True):
            member, family, _ = data.table.paths(np.array([row]))[0][0].split("#")
            if family == "clean":
                seed = CLASSES.index(member.split("/")[1]) * 1000 + int(member[-8:-4])
                expected = np.moveaxis(picture(seed), 2, 0) / 255
                assert image.numpy() == pytest.approx(expected, abs=1e-5)


def test_faults_are_named(archive, tmp_path):
    for change, word in (
        ({"train": ["frost"]}, "frost"),
        ({"test": ["fog"]}, "fog is named twice"),
        ({"severities": [6]}, "severities"),
        ({"queries": 0}, "queries"),
        ({"in_domain": 1.0}, "in_domain"),
    ):
        families = {name: change.pop(name) for name in FAMILIES if name in change}
        with pytest.raises(ConfigError, match=word):
            CorruptedCifar(archive, **(SMALL | change | {"families": FAMILIES | families}))
    with pytest.raises(DataError, match="control"):
        CorruptedCifar(archive, **(SMALL | {"control": "horse"})).load()
    with pytest.raises(DataError, match=r"12 test pictures of cat for 2 plates of 7"):
        CorruptedCifar(archive, **(SMALL | {"queries": 7})).load()
    (tmp_path / "broken.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"broken\.zip"):
        CorruptedCifar(str(tmp_path / "broken.zip")).load()
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(tmp_path / "b.zip", "w") as target:
        for name in source.namelist():
            target.writestr(
                name, source.read(name)[: 40 if name.endswith("cat/0003.png") else None]
            )
    data = PlateDataModule(
        CorruptedCifar(str(tmp_path / "b.zip"), **(SMALL | {"queries": 6})),
        OfficialSplit(),
        episodes={"controls": 6, "queries": 4},
    )
    with pytest.raises(DataError, match=r"cat/0003\.png"):
        data.prepare_data()


@pytest.mark.realdata
@pytest.mark.slow  # generated pictures are read above
def test_real_cifar():
    assert os.environ["FULGURITE_DATA"]
    source = CorruptedCifar(queries=3, controls=4, families={"severities": [3]})
    assert source.num_classes == 9
    data = PlateDataModule(source, OfficialSplit(), episodes={"queries": 8, "controls": 4})
    data.setup()
    assert len(data.domains) == 18
    batch = next(iter(data.train_dataloader()))
    assert tuple(batch.query.shape) == (8, 3, 32, 32)
