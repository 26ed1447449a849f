"""Episodes and the data module: what a batch promises, evaluation, probes, ranks, checkpoints."""

import shutil
from argparse import ArgumentError

import lightning as L
import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import HalfPrecision

from fulgurite.datamodules.cs_arm_bn import (
    CsvPlates,
    GroupFolds,
    HoldOut,
    PlateDataModule,
    Preprocess,
    SyntheticPlates,
)
from fulgurite.datamodules.cs_arm_bn.draws import (
    draw_shifted_batches,
    mislabel,
    pair_wrong_plates,
    split_into_batches,
)
from fulgurite.datamodules.cs_arm_bn.episodes import EPOCH, EpisodeSampler, PlateSampler
from fulgurite.domains.cs_arm_bn import PlateBatch
from fulgurite.errors import CheckpointError, ConfigError, DataError

SHAPES = {
    "images": (torch.float32, 4),
    "label": (torch.int64, 1),
    "row": (torch.int64, 1),
    "control_row": (torch.int64, 1),
    "control_domain": (torch.int64, 1),
    "well": (torch.int64, 1),
    "query_domain": (torch.int64, 1),
    "counted": (torch.bool, 1),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six plates of 16 queries and 8 controls, 16² pixels, and the cache of this file."""
    root = tmp_path_factory.mktemp("plates")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FULGURITE_CACHE", str(root / "cache"))
        plates(root).prepare()
        yield root


def plates(root):
    return SyntheticPlates(
        world={
            "batches": [5, 1],
            "plates": [1, 2],
            "sites": 1,
            "size": 16,
            "wells_per_class": 2,
            "controls": 8,
        },
        path=str(root / "bucket"),
    )


@pytest.fixture
def make(folder):
    def call(split=None, episodes=None, **options):
        split = split or HoldOut(new_labs=["source_8"], new_batches=2, val_batches=1, in_domain=0.5)
        episodes = {"queries": 6, "controls": 5} | (episodes or {})
        data = PlateDataModule(plates(folder), split, episodes=episodes, **options)
        data.setup()
        return data

    return call


def check(batch, data):
    table = data.table
    moved = data.on_after_batch_transfer(batch, 0)
    for name, (dtype, ndim) in SHAPES.items():
        assert getattr(moved, name).dtype == dtype, name
        assert getattr(moved, name).ndim == ndim, name
    assert batch.images.dtype == torch.from_numpy(data.images[0]).dtype
    assert {*batch._fields} - {"n_query", "domain"} == SHAPES.keys()
    queries, controls = len(batch.query), len(batch.control)
    for name in ("label", "row", "well", "counted"):
        assert len(getattr(batch, name)) == queries
    for name in ("control_row", "control_domain"):
        assert len(getattr(batch, name)) == controls
    index, control = batch.row.numpy(), batch.control_row.numpy()
    assert not table.control[index].any()
    assert (table.label[index] == batch.label.numpy()).all()
    assert (table.well[index] == batch.well.numpy()).all()
    assert (table.domain[control] == batch.control_domain.numpy()).all()
    if batch.domain >= 0:
        assert (table.domain[index] == int(batch.domain)).all()


def equal(one, other):
    return all(getattr(one, name).equal(getattr(other, name)) for name in SHAPES)


def test_training_batches_keep_their_promises(make):
    data = make()
    batches = list(data.train_dataloader())
    assert len(batches) == len(data.assignment.train) // 6
    for batch in batches:
        check(batch, data)
        assert tuple(batch.query.shape) == (6, 5, 16, 16)
        assert tuple(batch.control.shape) == (5, 5, 16, 16)
        assert (batch.control_domain == batch.domain).all()
        assert data.table.control[batch.control_row.numpy()].all()
        assert set(batch.row.tolist()) <= set(data.assignment.train.tolist())
        assert batch.counted.all()
        assert len(set(batch.row.tolist())) == 6  # drawn without replacement


def test_all_plates_are_drawn_about_equally_often(make):
    data = make(episodes={"steps_per_epoch": 300}, pixels={"crop": 1})
    drawn = torch.tensor([batch.domain for batch in data.train_dataloader()])
    counts = torch.bincount(drawn, minlength=len(data.domains))
    train = np.unique(data.table.domain[data.assignment.train])
    assert set(counts.nonzero()[:, 0].tolist()) == set(train.tolist())
    assert counts.max() < 2 * counts[counts > 0].min()


def test_episodes_do_not_depend_on_workers_or_on_the_run_seed(make):
    plain, worked = make(num_workers=0), make(num_workers=2)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = list(plain.train_dataloader())
    assert torch.get_rng_state().equal(state)
    torch.manual_seed(2)
    two = list(worked.train_dataloader())
    assert all(equal(a, b) for a, b in zip(one, two, strict=True))
    other = list(make(seed=7).train_dataloader())
    assert not any(equal(a, b) for a, b in zip(one, other, strict=True))


def test_epochs_differ_and_ranks_share_out_the_same_episodes(make):
    """Lightning wraps the sampler in its DistributedSampler, which forwards the epoch."""
    data = make(episodes={"steps_per_epoch": 5})
    loader = data.train_dataloader()
    episodes, sampler = loader.dataset, loader.sampler
    assert isinstance(sampler, EpisodeSampler)
    seen = {}
    for epoch in (0, 1, 7):
        sampler.set_epoch(epoch)
        numbers = list(sampler)
        assert numbers == [epoch * EPOCH + e for e in range(5)]
        seen[epoch] = [episodes[n].row.tolist() for n in numbers]
        shards = []
        for rank in range(2):
            shard = DistributedSamplerWrapper(
                EpisodeSampler(5), num_replicas=2, rank=rank, shuffle=False
            )
            shard.set_epoch(epoch)
            shards.append(list(shard))
        assert sorted({*shards[0], *shards[1]}) == numbers
        assert len(shards[0]) == len(shards[1]) == 3  # padded, for ranks wait for each other
    assert seen[0] != seen[1] != seen[7]


@pytest.mark.parametrize("plates", [1, 2])
def test_mixed_batches_can_have_equally_many_queries_of_some_plates(make, plates):
    data = make(episodes={"mixed": True, "queries": 13, "steps_per_epoch": 6, "plates": plates})
    batches = list(data.train_dataloader())
    domain = torch.from_numpy(data.table.domain)
    for batch in batches:
        assert torch.equal(batch.query_domain, domain[batch.row])
        counts = batch.query_domain.unique(return_counts=True)[1].tolist()
        assert sorted(counts) == sorted(13 // plates + (i < 13 % plates) for i in range(plates))
        assert not len(batch.control)
    assert len(torch.cat([b.query_domain for b in batches]).unique()) == 2  # all there are


def test_more_plates_than_there_are_cannot_be_mixed(make):
    with pytest.raises(ConfigError, match=r"99 plates, and there are \d+ training"):
        make(episodes={"mixed": True, "queries": 99, "plates": 99}).train_dataloader()
    for wrong in ({"plates": 4}, {"plates": 0, "mixed": True}, {"plates": 9, "mixed": True}):
        with pytest.raises(ConfigError, match="plates"):
            make(episodes={"queries": 8} | wrong)


def test_mixed_batches_come_from_all_plates(make):
    data = make(episodes={"mixed": True, "queries": 40, "steps_per_epoch": 2})
    for batch in data.train_dataloader():
        check(batch, data)
        assert tuple(batch.control.shape) == (0, 5, 16, 16)
        assert int(batch.domain) == -1
        assert len(set(data.table.domain[batch.row.numpy()].tolist())) > 1


def test_too_few_images_are_drawn_again(make):
    data = make(episodes={"queries": 20, "controls": 30})
    batch = next(iter(data.train_dataloader()))
    check(batch, data)
    assert len(batch.query) == 20
    assert len(batch.control) == 30
    assert next(iter(make(episodes={"controls": 0}).train_dataloader())).control.shape[0] == 0


def evaluated(loader):
    batches = list(loader)
    index = torch.cat([batch.row[batch.counted] for batch in batches])
    return batches, index


def test_evaluation_sees_each_query_once_with_its_plates_controls(make):
    data = make()
    assert data.test_sets == ("in_domain", "new_batch", "new_lab")
    loaders = [data.val_dataloader(), *data.test_dataloader()]
    parts = [data.assignment.val, *data.assignment.tests.values()]
    for loader, part in zip(loaders, parts, strict=True):
        batches, index = evaluated(loader)
        assert sorted(index.tolist()) == part.tolist()
        fixed = {}
        for batch in batches:
            check(batch, data)
            assert (batch.control_domain == batch.domain).all()
            assert len(batch.control) == 5
            controls = fixed.setdefault(int(batch.domain), batch.control_row)
            assert controls.equal(batch.control_row)
        again, _ = evaluated(loader)
        assert all(equal(a, b) for a, b in zip(batches, again, strict=True))
    assert {len(batch.query) for batch in batches} == {6}  # 16 = 6 + 6 + 4, filled up
    assert sum(int((~batch.counted).sum()) for batch in batches) == 4  # on two plates


def test_evaluation_sizes(make):
    data = make(evaluation={"queries": 1, "controls": 99, "limit": 3})
    batches, index = evaluated(data.test_dataloader()[2])
    assert len(index) == len(set(index.tolist())) == 6
    assert {(len(b.query), len(b.control)) for b in batches} == {(1, 8)}
    none = make(evaluation={"controls": 0})
    assert {len(b.control) for b in none.test_dataloader()[1]} == {0}
    whole = make(evaluation={"queries": 999})
    assert [len(b.query) for b in whole.test_dataloader()[2]] == [16, 16]


def test_a_plate_has_the_same_chunks_whatever_else_is_tested(make):
    both = make(HoldOut(new_labs=["source_8"], new_batches=2, val_batches=0, in_domain=0))
    alone = make(HoldOut(new_labs=["source_8"], new_batches=0, val_batches=0, in_domain=0))
    one = list(both.test_dataloader()[both.test_sets.index("new_lab")])
    two = list(alone.test_dataloader()[0])
    assert [b.row.tolist() for b in one] == [b.row.tolist() for b in two]
    assert [b.control_row.tolist() for b in one] == [b.control_row.tolist() for b in two]


@pytest.mark.parametrize(
    "size", [pytest.param(1, marks=pytest.mark.slow), 6, pytest.param(24, marks=pytest.mark.slow)]
)
def test_label_shift_changes_batches_alone(make, size):
    """The same images count, in batches of the same size as without it."""
    data, plain = (
        make(evaluation={"label_shift": 1e-4, "queries": size}),
        make(evaluation={"queries": size}),
    )
    for loader, other in zip(data.test_dataloader(), plain.test_dataloader(), strict=True):
        batches, index = evaluated(loader)
        assert sorted(index.tolist()) == sorted(evaluated(other)[1].tolist())
        assert {len(batch.query) for batch in batches} == {size}
        for batch in batches:
            check(batch, data)
        pure = [len(batch.label.unique()) == 1 for batch in batches]
        assert np.mean(pure) > 0.9
        for domain in {int(batch.domain) for batch in batches}:
            own = torch.cat([b.label for b in batches if int(b.domain) == domain])
            assert len(set(own.bincount().tolist())) == 1  # each class equally often
    assert evaluated(data.val_dataloader())[1].equal(evaluated(plain.val_dataloader())[1])


def test_label_shift_of_one_class_is_refused(make):
    data = make(evaluation={"label_shift": 0.1, "limit": 1})
    with pytest.raises(DataError, match=r"1 queries of plate .* are of one class.*`limit`"):
        data.test_dataloader()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(any),
    st.integers(1, 20),
    st.sampled_from([1e-3, 0.1, 1.0, 100.0]),
    st.integers(0, 1000),
)
def test_shifted_chunks_obey_their_laws(counts, size, alpha, seed):
    labels = np.repeat(np.arange(len(counts)), counts)
    batches = draw_shifted_batches(labels, size, alpha, np.random.default_rng(seed))
    assert {len(rows) for rows, _ in batches} == {size}
    drawn = np.concatenate([rows for rows, _ in batches])
    counted = np.concatenate([rows[counts_] for rows, counts_ in batches])
    assert sorted(counted.tolist()) == list(range(len(labels)))
    present = [count for count in counts if count]
    rounds = -(-max(present) // size)
    assert len(batches) == rounds * len(present)
    assert set(np.bincount(labels[drawn])) - {0} == {rounds * size}
    often = np.bincount(drawn, minlength=len(labels))
    for c in np.unique(labels):
        assert np.ptp(often[labels == c]) <= 1
    for start in range(0, len(batches), len(present)):  # one mixture, rotated
        mixtures = [np.bincount(labels[rows], minlength=len(counts)) for rows, _ in batches]
        of_round = {
            tuple(sorted(m[np.array(counts) > 0])) for m in mixtures[start : start + len(present)]
        }
        assert len(of_round) == 1


def test_each_draw_under_label_shift_counts_as_probably_as_the_others():
    """Else images would be scored among their own class more or less often than they are drawn."""
    labels = np.repeat([0, 1, 2, 3], [3, 5, 8, 4])
    among, scored = [], []
    for seed in range(400):
        for rows, counts in draw_shifted_batches(labels, 8, 0.3, np.random.default_rng(seed)):
            own = np.array([(labels[rows] == labels[row]).mean() for row in rows])
            among.append([own[labels[rows] == 0].sum(), (labels[rows] == 0).sum()])
            kept = counts & (labels[rows] == 0)
            scored.append([own[kept].sum(), kept.sum()])
    (total, n), (total_scored, n_scored) = np.sum(among, 0), np.sum(scored, 0)
    assert n_scored == 1200
    assert total_scored / n_scored == pytest.approx(total / n, abs=0.03)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(1, 15), st.integers(0, 1000))
def test_chunks_obey_their_laws(count, size, seed):
    rows = np.arange(100, 100 + count)
    parts = split_into_batches(rows, size, np.random.default_rng(seed))
    kept = [row for part, keep in parts for row in part[keep]]
    assert sorted(kept) == rows.tolist()
    assert {len(part) for part, _ in parts} <= {min(size, count)}
    for part, _ in parts:
        assert len(set(part)) == len(part)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=12))
def test_wrong_plates_are_never_the_own_one(batches):
    names = [str(b) for b in batches]
    pairs = pair_wrong_plates(range(len(names)), names)
    assert sorted(pairs) == sorted(pairs.values()) == list(range(len(names)))
    assert all(one != other for one, other in pairs.items())
    largest = max(names.count(name) for name in names)
    if largest <= len(names) // 2:
        assert all(names[one] != names[other] for one, other in pairs.items())


def test_wrong_controls_come_from_one_other_plate_of_the_test(make):
    data = make(evaluation={"control_plate": "wrong"})
    for batch in data.test_dataloader()[1]:
        check(batch, data)
        (other,) = batch.control_domain.unique().tolist()
        assert other != int(batch.domain)
        tested = data.table.domain[data.assignment.tests["new_batch"]]
        assert other in tested
    assert all((b.control_domain == b.domain).all() for b in data.val_dataloader())
    one = HoldOut(new_batches=["CP_25"], val_batches=1, in_domain=0)
    with pytest.raises(ConfigError, match="control_plate"):
        make(one, evaluation={"control_plate": "wrong"}).test_dataloader()


def test_mislabelled_controls_are_queries_of_the_plate(make):
    data = make(evaluation={"mislabelled_controls": 0.4}, episodes={"controls": 8})
    for batch in data.test_dataloader()[2]:
        control = batch.control_row.numpy()
        assert (~data.table.control[control]).sum() == 3
        assert (data.table.domain[control] == int(batch.domain)).all()
    rows = np.arange(5)
    assert (mislabel(rows, np.array([9]), 0.0, np.random.default_rng(0)) == rows).all()
    assert (mislabel(rows, rows[:0], 1.0, np.random.default_rng(0)) == rows).all()


def test_prediction_brings_all_controls_first_and_each_query_once(make):
    data = make()
    batches = list(data.predict_dataloader())
    order = [int(batch.domain) for batch in batches]
    assert order == sorted(order)
    tested = {"new_batch", "new_lab"}
    rows = np.concatenate([data.assignment.tests[name] for name in tested])
    assert set(order) == set(data.table.domain[rows].tolist())
    for d in set(order):
        own = [batch for batch in batches if int(batch.domain) == d]
        assert own[0].control_row.tolist() == data.table.rows_of(d, True).tolist()
        assert all(len(batch.control) == 0 for batch in own[1:])
        assert all(batch.control.shape[1:] == (5, 16, 16) for batch in own)
        index = torch.cat([batch.row for batch in own])
        assert index.tolist() == data.table.rows_of(d, False).tolist()
        assert all(batch.counted.all() for batch in own)
    everything = make(evaluation={"predict": "all"}).predict_dataloader()
    assert len({int(batch.domain) for batch in everything}) == 7
    train = {int(batch.domain) for batch in data.plate_dataloader("train")}
    assert train == set(data.table.domain[data.assignment.train].tolist())


def test_ranks_predict_whole_plates(make):
    episodes = make(evaluation={"predict": "all"}).predict_dataloader().dataset
    shares = [list(PlateSampler(episodes, (rank, 3))) for rank in range(3)]
    assert sorted(number for share in shares for number in share) == list(range(len(episodes)))
    owners = [{episodes.batches[i].domain for i in share} for share in shares]
    assert not owners[0] & owners[1] | owners[0] & owners[2] | owners[1] & owners[2]


def standardised(data, rows):
    """Images of rows, cropped centrally, as they are on the device."""
    images = data.plan_evaluation(data.assignment.val).crops.read(rows, None)
    domain = torch.from_numpy(data.table.domain[rows])
    batch = PlateBatch.from_images(images, images[:0])._replace(query_domain=domain)
    return data.on_after_batch_transfer(batch, 0).images


def test_training_pixels_have_mean_0_and_deviation_1(make):
    data = make(pixels={"augment": False})
    pixels = standardised(data, data.assignment.train)
    assert pixels.mean((0, 2, 3)).abs().max() < 1e-4
    # of all pixels, as the paper's: not the mean of the images' deviations
    assert pixels.var((0, 2, 3), correction=0) == pytest.approx(np.ones(5), abs=1e-3)
    image = standardised(make(pixels={"normalise": "image"}), data.assignment.train)
    assert image.mean((2, 3)).abs().max() < 1e-4
    plate = make(pixels={"normalise": "plate"})
    for d in range(2):
        pixels = standardised(plate, data.table.rows_of(d, True))
        assert pixels.mean((0, 2, 3)).abs().max() < 1e-4
        assert pixels.var((0, 2, 3), correction=0) == pytest.approx(np.ones(5), abs=1e-3)


def test_half_precision_does_not_round_images_before_they_are_standardised(make, monkeypatch):
    data = make(pixels={"normalise": "image"})
    episodes = data.plan_evaluation(data.assignment.val)
    read = episodes.crops.read

    def read_floats(rows, generator=None):
        return read(rows, generator).float() + 60000  # far from 0, as raw intensities are

    monkeypatch.setattr(type(episodes.crops), "read", lambda self, *rows: read_floats(*rows))
    batch = episodes[0]
    expected = data.on_after_batch_transfer(batch, 0).images
    assert expected.std() == pytest.approx(1, abs=0.01)
    for precision in ("bf16-true", "16-true"):
        converted = HalfPrecision(precision).convert_input(batch)
        assert data.on_after_batch_transfer(converted, 0).images.equal(expected)


def test_given_statistics_are_fractions_of_full_scale(make):
    data = make(pixels={"mean": [0.5] * 5, "std": [0.25] * 5})
    row = int(data.assignment.val[0])
    expected = (data.images[row].astype(np.float32) / 65535 - 0.5) / 0.25
    pixels = standardised(data, np.array([row]))
    assert pixels[0].numpy() == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ConfigError, match="5 channels"):
        make(pixels={"mean": [0.5], "std": [0.5]})


def test_augmentation_crops_and_mirrors_and_changes_nothing_else(make):
    data = make(pixels={"crop": 15}, episodes={"steps_per_epoch": 30})
    assert data.image_size == (15, 15)
    seen = set()
    for batch in data.train_dataloader():
        for image, row in zip(batch.query.float(), batch.row.tolist(), strict=True):
            whole = torch.from_numpy(data.images[row].astype(np.float32))
            found = [
                (top, left, flips)
                for top in (0, 1)
                for left in (0, 1)
                for flips in ((), (1,), (2,), (1, 2))
                if whole[:, top : top + 15, left : left + 15].flip(flips).equal(image)
            ]
            assert len(found) == 1
            seen.add(found[0])
    assert len(seen) == 16
    fixed = make(pixels={"crop": 14})
    row = int(fixed.assignment.val[0])
    (centre,) = fixed.plan_evaluation(fixed.assignment.val).crops.read(np.array([row]), None)
    whole = torch.from_numpy(fixed.images[row].astype(np.float32))[:, 1:15, 1:15]
    assert centre.float().equal(whole)
    with pytest.raises(ConfigError, match="Crops of 17"):
        make(pixels={"crop": 17})


def test_files_and_cache_give_the_same_batches(make):
    pixels = {"preprocess": Preprocess(1, "percentile"), "mean": [0.1] * 5, "std": [0.1] * 5}
    cached, plain = make(pixels=pixels), make(pixels=pixels | {"cache": False})
    assert plain.images[0].dtype == np.uint8
    one, two = (next(iter(data.train_dataloader())) for data in (cached, plain))
    assert equal(one, two)


@pytest.mark.parametrize(
    ("workers", "steps"), [(0, (1, 3, 5)), pytest.param(2, (4,), marks=pytest.mark.slow)]
)
def test_a_resumed_run_sees_the_episodes_of_an_uninterrupted_one(make, tmp_path, workers, steps):
    class Model(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.seen = []

        def training_step(self, batch, _):
            self.seen.append((self.current_epoch, int(batch.domain), batch.row.tolist()))
            return self.weight * batch.query.mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    def fit(path=None, **options):
        model, data = Model(), make(episodes={"steps_per_epoch": 3}, num_workers=workers)
        saved = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = L.Trainer(
            **({"max_epochs": 3} | options),
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
            callbacks=[] if path else [saved],
            enable_checkpointing=path is None,
            default_root_dir=tmp_path,
        )
        trainer.fit(model, data, ckpt_path=path)
        return model.seen, trainer

    whole, _ = fit()
    assert len({str(item[1:]) for item in whole}) == 9  # all different
    for step in steps:  # in the middle of an epoch, and at its end
        path = tmp_path / "saved" / f"step={step}.ckpt"
        state = torch.load(path, weights_only=True)
        assert state["PlateDataModule"]["class_names"][0] == "TC-S-7004"
        rest, _ = fit(path)
        assert whole[:step] + rest == whole
    if workers:
        return
    first, trainer = fit(max_epochs=1)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    rest, _ = fit(tmp_path / "after.ckpt")
    assert first + rest == whole


def unlabelled(folder, channels=5):
    rows = []
    for w in range(6):
        for c in range(channels):
            pixels = np.random.default_rng(w * 9 + c).integers(0, 900, (16, 16), np.uint16)
            tifffile.imwrite(folder / f"{w}-{c}.tiff", pixels)
        paths = {f"path_{c}": f"{w}-{c}.tiff" for c in range(channels)}
        role = "control" if w < 3 else "query"
        base = {"source": "new", "batch": "1", "plate": "p", "well": f"A0{w}", "site": "1"}
        rows.append(base | {"role": role, "label": None} | paths)
    pd.DataFrame(rows).to_csv(folder / "plates.csv", index=False)
    return str(folder / "plates.csv")


def copy_plate(frame, folder):
    """The plate q of copies of the images."""
    other = frame.assign(plate="q").replace(r"^(.*\.tiff)$", r"q\1", regex=True)
    for name in other.filter(like="path").to_numpy().flat:
        shutil.copy(folder / name[1:], folder / name)
    return other


def test_unlabelled_plates_are_predicted_with_the_statistics_of_training(make, tmp_path):
    trained = make()
    path = unlabelled(tmp_path)
    names = [str(c) for c in range(5)]
    source = CsvPlates(path, names, classes=list(trained.class_names), intensity="full")
    data = PlateDataModule(source, HoldOut(new_batches=0, val_batches=0), episodes={"controls": 3})
    data.setup("predict")
    with pytest.raises(DataError, match="ckpt_path"):
        data.predict_dataloader()
    with pytest.raises(DataError, match="training"):
        data.train_dataloader()
    state = trained.state_dict()
    with pytest.raises(CheckpointError, match="channels"):
        data.load_state_dict(state)
    data.load_state_dict(state | {"channels": names})
    (batch,) = data.predict_dataloader()
    assert (batch.label == -1).all()
    assert len(batch.control) == 3
    batch = data.on_after_batch_transfer(batch, 0)
    mean, std = state["mean"] * 65535, state["std"] * 65535
    expected = (torch.from_numpy(data.images[3].astype(np.float32)) - mean[:, None, None]) / std[
        :, None, None
    ]
    assert batch.query[0].allclose(expected, atol=1e-4)


def test_plates_without_controls_stop_or_are_counted(tmp_path):
    path = unlabelled(tmp_path)
    frame = pd.read_csv(path)
    pd.concat([frame, copy_plate(frame[3:], tmp_path)]).to_csv(path, index=False)

    def data(**options):
        source = CsvPlates(path, [str(c) for c in range(5)], classes=["a", "b"])
        split = HoldOut(new_batches=0, val_batches=0)
        episodes = {"controls": 3} | options.pop("episodes", {})
        return PlateDataModule(source, split, episodes=episodes, pixels={"cache": False}, **options)

    with pytest.raises(DataError, match=r"new\|1\|q \(0\).*few_controls"):
        data().setup()
    kept = data(exclude=["few_controls"])
    kept.setup()
    assert kept.domains == ("new|1|p",)
    assert "new|1|q" in kept.table.report()
    free = data(episodes={"min_controls": 0})
    free.setup()
    assert len(free.domains) == 2


def test_bad_images_are_counted_in_the_table(folder, make, tmp_path, cache):
    path = unlabelled(tmp_path)
    whole = (tmp_path / "4-2.tiff").read_bytes()
    (tmp_path / "4-2.tiff").write_bytes(whole[:-30])

    def data(**options):
        source = CsvPlates(path, [str(c) for c in range(5)], classes=["a", "b"])
        split = HoldOut(new_batches=0, val_batches=0)
        return PlateDataModule(
            source,
            split,
            episodes={"controls": 3},
            pixels={"mean": [0] * 5, "std": [1] * 5} | options.pop("pixels", {}),
            **options,
        )

    with pytest.raises(DataError, match=r"4-2\.tiff is truncated"):
        data().prepare_data()
    kept = data(exclude=["unreadable"])
    kept.setup()
    (batch,) = kept.predict_dataloader()
    assert kept.table.frame["well"][batch.row.numpy()].tolist() == ["A03", "A05"]
    assert "1 sites" in kept.table.report()
    with pytest.raises(ConfigError, match="cache=true"):
        data(exclude=["unreadable"], pixels={"cache": False})


def test_plates_that_lose_controls_with_bad_images_are_left_out_too(folder, tmp_path, cache):
    path = unlabelled(tmp_path)
    frame = pd.read_csv(path)
    columns = [name for name in frame.columns if name.startswith("path")]
    other = copy_plate(frame, tmp_path)
    other.loc[other["role"].eq("control").idxmax(), columns[0]] = "half.tiff"
    (tmp_path / "half.tiff").write_bytes((tmp_path / "4-2.tiff").read_bytes()[:-30])
    pd.concat([frame, other]).to_csv(path, index=False)

    def data(*words):
        source = CsvPlates(path, [str(c) for c in range(5)], classes=["a", "b"])
        split = HoldOut(new_batches=0, val_batches=0)
        return PlateDataModule(
            source,
            split,
            episodes={"controls": 3},
            pixels={"mean": [0] * 5, "std": [1] * 5},
            exclude=[*words],
        )

    with pytest.raises(DataError, match=r"new\|1\|q \(2\).*exclude=\[few_controls,unreadable\]"):
        data("unreadable").setup()
    kept = data("few_controls", "unreadable")
    kept.setup()
    assert kept.domains == ("new|1|p",)
    assert [(e.kind, e.count) for e in kept.table.excluded] == [("few_controls", len(other))]
    assert len(kept.images.table) == len(kept.table) == len(frame)


@pytest.mark.parametrize(
    "change",
    [
        {"episodes": {"queries": 0}},
        {"episodes": {"controls": -1}},
        {"evaluation": {"queries": 0}},
        {"evaluation": {"limit": 0}},
        {"episodes": {"steps_per_epoch": 0}},
        {"evaluation": {"label_shift": 0.0}},
        {"evaluation": {"control_plate": "other"}},
        {"evaluation": {"mislabelled_controls": 1.5}},
        {"pixels": {"crop": 0}},
        {"pixels": {"normalise": "batch"}},
        {"pixels": {"mean": [0.1] * 5}},
        {"pixels": {"mean": [0.1] * 5, "std": [0.0] * 5}},
        {"exclude": ["bad"]},
        {"evaluation": {"predict": "none"}},
        {"seed": -1},
    ],
)
def test_wrong_arguments_are_configuration_errors(folder, change):
    ((name, values),) = change.items()
    if isinstance(values, dict):
        name += f".{next(iter(values))}"
    with pytest.raises(
        ConfigError, match=rf"--data.init_args.{name}|`std`|--data.init_args.pixels.std"
    ):
        PlateDataModule(plates(folder), HoldOut(), **change)


def test_the_command_line_can_build_it(folder):
    parser = ArgumentParser()
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    base = "fulgurite.datamodules.cs_arm_bn."
    config = parser.parse_object(
        {
            "data": {
                "class_path": base + "PlateDataModule",
                "init_args": {
                    "source": {
                        "class_path": base + "SyntheticPlates",
                        "init_args": {
                            "world": {"batches": [5, 1], "plates": [1, 2]},
                            "path": str(folder),
                        },
                    },
                    "split": {
                        "class_path": base + "HoldOut",
                        "init_args": {"new_labs": ["source_8"], "new_batches": ["CP_25"]},
                    },
                    "pixels": {"preprocess": {"downscale": 1}},
                    "evaluation": {"label_shift": 0.01},
                },
            }
        }
    )
    data = parser.instantiate(config).data
    assert isinstance(data, PlateDataModule)
    assert data.split.new_batches == ["CP_25"]
    assert data.num_classes == 8
    assert data.preprocess == Preprocess(1)
    assert data.evaluation.label_shift == 0.01
    folds = GroupFolds("lab", 0, 2)
    assert folds.val_group == "batch"


@pytest.mark.parametrize("option", ["queries", "eval_queries", "label_shift", "image_size"])
def test_an_option_outside_its_group_is_refused(option):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    base = "fulgurite.datamodules.cs_arm_bn."
    options = {"source": base + "SyntheticPlates", "split": base + "HoldOut", option: 8}
    with pytest.raises(ArgumentError, match=option):
        parser.parse_object(
            {"data": {"class_path": base + "PlateDataModule", "init_args": options}}
        )
