"""The data module: split by segment, statistics, batches, dropping, completed stacks, leakage."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes.ice_layers import SMALL_WORLD, ice_data, open_flights
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from fulgurite.datamodules.ice_layers import (
    CompletedStacks,
    Flights,
    IceLayerDataModule,
    LayerFiles,
    LayerStack,
    MarClimate,
    NpzStacks,
    StackSource,
    SyntheticFlights,
    World,
)
from fulgurite.datamodules.ice_layers.dropping import drop_picks
from fulgurite.datamodules.ice_layers.splits import split_segments
from fulgurite.datamodules.ice_layers.statistics import fit_statistics
from fulgurite.errors import CheckpointError, ConfigError, DataError, MissingExtraError
from fulgurite.models.ice_layers.output.stacks import CompletedStack, write_npz


class ReadFlights(SyntheticFlights):
    """Generated flights whose files were read before."""

    def __init__(self, flights):
        super().__init__(World(**SMALL_WORLD))
        self.flights = flights

    def load(self):
        return self.flights


class Given(StackSource):
    """Stacks that a test has made."""

    def __init__(self, stacks):
        self.stacks = stacks

    @property
    def physics(self):
        return ("smb", "st")

    def load(self):
        layers = self.stacks[0].thickness.shape[1]
        names = tuple(f"layer_{k}" for k in range(layers))
        return Flights(self.stacks, self.physics, names, np.arange(1.0, layers + 1))


def stack(name, segment, traces=10, layers=4, seed=0, missing=0.2, **changes):
    generator = np.random.default_rng(seed)
    thickness = generator.uniform(0.5, 1.5, (traces, layers))
    thickness[generator.random(thickness.shape) < missing] = np.nan
    start = generator.uniform((68, -45), (75, -35))
    fields = {
        "thickness": thickness,
        "physics": generator.normal(size=(traces, layers, 2)).astype(np.float32),
        "physics_flag": np.zeros(traces, np.uint8),
        "pos": start + np.arange(traces)[:, None] * [1e-3, 0.0],
        "distance": np.arange(traces) * 111.0,
    } | changes
    return LayerStack(name, segment, **fields)


def stacks(segments=7, each=3, **options):
    return [
        stack(f"20{10 + s}0401_01_{k:04}", f"20{10 + s}0401_01", seed=100 * s + k, **options)
        for s in range(segments)
        for k in range(each)
    ]


# split


def test_flight_segments_stay_whole(generated):
    data = open_flights(ReadFlights(generated), val=0.25, test=0.25)
    parts = {part: data.stacks_of(part) for part in ("train", "val", "test")}
    segments = {part: {s.segment for s in found} for part, found in parts.items()}
    assert {part: len(found) for part, found in segments.items()} == {
        "train": 6,
        "val": 3,
        "test": 3,
    }
    assert sum(map(len, parts.values())) == 60
    assert not segments["train"] & segments["val"]
    assert not (segments["train"] | segments["val"]) & segments["test"]
    other = open_flights(ReadFlights(generated), val=0.25, test=0.25, seed=7)
    assert {s.segment for s in other.stacks_of("test")} != segments["test"]


@given(
    st.integers(3, 40), st.floats(0, 0.3), st.floats(0, 0.3), st.sampled_from(["random", "name"])
)
@settings(max_examples=60, deadline=None)
def test_a_split_deals_out_everything_once(count, val, test, order):
    names = [f"s{k:03}" for k in range(count)]
    split = split_segments(names, val, test, order, seed=3)
    assert sorted(name for part in split.values() for name in part) == names
    assert (not split["val"]) == (val == 0)
    assert (not split["test"]) == (test == 0)
    assert split["train"]
    if order == "name" and split["test"]:
        assert max(split["train"]) < min(split["test"])


def test_named_segments_and_their_mistakes():
    data = open_flights(Given(stacks()), val=["2012"], test=["20150401_01", "2016"])
    assert {s.segment for s in data.stacks_of("val")} == {"20120401_01"}
    assert {s.segment for s in data.stacks_of("test")} == {"20150401_01", "20160401_01"}
    with pytest.raises(DataError, match="No flight segment is called 2030"):
        open_flights(Given(stacks()), test=["2030"])
    with pytest.raises(DataError, match="20120401_01 is in validation and in test"):
        open_flights(Given(stacks()), val=["2012"], test=["2012"])
    with pytest.raises(ConfigError, match="leaves none for training"):
        open_flights(Given(stacks(segments=2)), val=0.4, test=0.4)
    with pytest.raises(ConfigError, match=r"--data\.init_args\.split\.val` and .*split\.test"):
        ice_data(Given(stacks()), val=0.6, test=0.5)


def test_a_guard_leaves_out_flights_of_the_same_years():
    data = open_flights(Given(stacks(10)), val=0.1, test=0.2, order="name", guard=3)
    assert {s.segment[:4] for s in data.stacks_of("test")} == {"2018", "2019"}
    assert {s.segment[:4] for s in data.stacks_of("val")} == {"2017"}
    assert {s.segment[:4] for s in data.stacks_of("train")} == {
        "2010",
        "2011",
        "2012",
        "2013",
        "2014",
    }
    assert [(e.kind, e.count) for e in data.excluded] == [("guard", 6)]
    odd = [replace(s, segment=f"flight {s.segment}") for s in stacks()]
    with pytest.raises(ConfigError, match="does not begin with a date"):
        open_flights(Given(odd), guard=1)


# batches


def test_batches_are_what_the_contract_says(generated):
    data = open_flights(ReadFlights(generated), batch_size=4)
    batch = next(iter(data.train_dataloader()))
    expected = {
        "thickness": (torch.float64, (128, 8)),
        "observed": (torch.bool, (128, 8)),
        "dropped": (torch.bool, (128, 8)),
        "truth": (torch.float64, (128, 8)),
        "physics": (torch.float32, (128, 8, 5)),
        "physics_flag": (torch.uint8, (128,)),
        "pos": (torch.float64, (128, 2)),
        "distance": (torch.float64, (128,)),
        "segment": (torch.int64, (4,)),
        "stack": (torch.int64, (4,)),
        "batch": (torch.int64, (128,)),
        "ptr": (torch.int64, (5,)),
    }
    for name, (dtype, shape) in expected.items():
        assert batch[name].dtype == dtype, name
        assert tuple(batch[name].shape) == shape, name
    assert torch.equal(batch.observed, batch.thickness.isfinite())
    assert not batch.dropped.any()
    by_name = {s.name: s for part in ("train", "val", "test") for s in data.stacks_of(part)}
    for k in range(4):
        found = by_name[data.stacks[int(batch.stack[k])]]
        assert data.segments[int(batch.segment[k])] == found.segment
        np.testing.assert_array_equal(batch.thickness[batch.batch == k].numpy(), found.thickness)
        np.testing.assert_array_equal(batch.physics[batch.batch == k].numpy(), found.physics)


def test_stacks_of_different_length_share_a_batch():
    sizes = [5, 9, 7, 12]
    given = [stack(f"a{k}", f"s{k}", traces=n) for k, n in enumerate(sizes)]
    data = open_flights(Given(given), val=0.0, test=0.0, batch_size=4)
    batch = next(iter(data.train_dataloader()))
    assert batch.num_nodes == sum(sizes)
    assert sorted(torch.diff(batch.ptr).tolist()) == sorted(sizes)
    assert data.val_dataloader() == data.test_dataloader() == []


def numbers(loader):
    return [int(k) for batch in loader for k in batch.stack]


def test_training_order_changes_by_epoch_and_repeats_itself():
    data, again = (open_flights(Given(stacks()), batch_size=2) for _ in range(2))
    loader, same = data.train_dataloader(), again.train_dataloader()
    first = numbers(loader)
    assert first == numbers(same)
    loader.sampler.set_epoch(1)
    second = numbers(loader)
    assert first != second
    assert sorted(first) == sorted(second)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    numbers(data.train_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("part", ["train", "val", "test", "all"])
def test_every_stack_is_predicted_once(part):
    data = open_flights(Given(stacks()), predict=part, batch_size=4)
    found = numbers(data.predict_dataloader())
    wanted = ("train", "val", "test") if part == "all" else (part,)
    names = [s.name for p in wanted for s in data.stacks_of(p)]
    assert [data.stacks[k] for k in found] == names


@pytest.mark.parametrize(
    "options",
    [
        {"traced": ["train", "val", "test"]},
        {"train_stacks": 2},
        {"order": "name", "guard": 2.5},
        {"traced": ["train"], "train_stacks": 1, "val": 0.0, "test": 0.0},
    ],
)
def test_by_default_all_that_the_source_has_is_predicted(options):
    """Also what no part uses; what is in a part keeps its number."""
    source = [*stacks(), stack("20200401_01_0000", "20200401_01", missing=2.0)]
    traced = stack("20100401_01_9999", "20100401_01", missing=0.0, seed=5)
    data = open_flights(Given([*source, traced]), batch_size=4, **options)
    found = numbers(data.predict_dataloader())
    names = [data.stacks[k] for k in found]
    assert sorted(names) == sorted(s.name for s in [*source, traced])
    in_parts = [s.name for part in ("train", "val", "test") for s in data.stacks_of(part)]
    assert names[: len(in_parts)] == in_parts
    segments = {
        data.stacks[int(item.stack)]: data.segments[int(item.segment)]
        for item in data.predict_dataloader().dataset
    }
    assert segments == {s.name: s.segment for s in [*source, traced]}


def test_ranks_share_evaluation_without_repeating():
    found = []
    for rank in range(3):
        data = open_flights(Given(stacks(each=2)), batch_size=2, predict="all")
        data.trainer = SimpleNamespace(distributed_sampler_kwargs={"rank": rank, "num_replicas": 3})
        found += numbers(data.predict_dataloader())
    assert sorted(found) == list(range(14))


# statistics


def test_statistics_see_only_observed_training_entries():
    given = stacks()
    data = open_flights(Given(given), val=["2012"], test=["2016"])
    other = [
        replace(s, thickness=s.thickness * 3, physics=s.physics + 9, pos=s.pos + 1)
        if s.segment[:4] in ("2012", "2016")
        else s
        for s in given
    ]
    changed = open_flights(Given(other), val=["2012"], test=["2016"])
    for name, value in data.statistics.items():
        assert value.dtype == torch.float64
        assert torch.equal(value, changed.statistics[name]), name
    entries = np.concatenate([s.thickness for s in data.stacks_of("train")])
    np.testing.assert_allclose(data.statistics["thickness_mean"], np.nanmean(entries, 0))
    spread = np.sqrt(np.nanmean((entries - np.nanmean(entries, 0)) ** 2))
    assert float(data.statistics["thickness_std"]) == pytest.approx(spread)
    assert {k: tuple(v.shape) for k, v in data.statistics.items()} == {
        "thickness_mean": (4,),
        "thickness_std": (),
        "physics_mean": (2,),
        "physics_std": (2,),
        "pos_mean": (2,),
        "pos_std": (2,),
    }


def test_statistics_of_constant_and_absent_things():
    absent = np.full((10, 4), 2.0)
    absent[:, 3] = np.nan
    found = fit_statistics([stack("a", "s", thickness=absent, pos=np.ones((10, 2)))])
    assert found["thickness_mean"].tolist() == [2.0] * 4
    assert float(found["thickness_std"]) == 1.0
    assert found["pos_std"].tolist() == [1.0, 1.0]
    with pytest.raises(DataError, match="No thickness is observed"):
        fit_statistics([stack("a", "s", missing=2.0)])


def test_the_checkpoint_brings_the_statistics():
    trained = open_flights(Given(stacks()))
    state = trained.state_dict()
    elsewhere = open_flights(Given(stacks(segments=4)), val=0.0, test=0.25)
    own = elsewhere.statistics["thickness_mean"]
    elsewhere.load_state_dict(state)
    assert torch.equal(elsewhere.statistics["thickness_mean"], trained.statistics["thickness_mean"])
    assert not torch.equal(elsewhere.statistics["thickness_mean"], own)
    with pytest.raises(CheckpointError, match="layers 4, these data have 5"):
        open_flights(Given(stacks(layers=5))).load_state_dict(state)
    with pytest.raises(CheckpointError, match="physical fields"):
        elsewhere.load_state_dict(state | {"physics": ["st", "smb"]})


# which stacks


def test_few_and_fully_traced_training_stacks():
    whole = [replace(s, thickness=np.ones((10, 4))) for s in stacks(each=1, segments=7)]
    given = [*stacks(), *(replace(s, name=f"{s.name}_whole") for s in whole)]
    data = open_flights(Given(given), traced=["train"])
    assert all(s.observed.all() for s in data.stacks_of("train"))
    assert len(data.stacks_of("train")) == 5
    assert len(data.stacks_of("test")) == 4
    few = open_flights(Given(given), train_stacks=3)
    assert len(few.stacks_of("train")) == 3
    assert [s.name for s in open_flights(Given(given), train_stacks=3).stacks_of("train")] == [
        s.name for s in few.stacks_of("train")
    ]
    with pytest.raises(DataError, match="No stack is left"):
        open_flights(Given(stacks(missing=0.5)), traced=["train", "val", "test"])
    with pytest.raises(DataError, match="No stack is left for training"):
        open_flights(Given(stacks(missing=0.5)), traced=["train"]).train_dataloader()


# dropping


@given(st.integers(4, 60), st.integers(1, 12), st.integers(0, 100), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_dropping_is_exact_nested_and_only_of_the_observed(n, layers, seed, share):
    generator = np.random.default_rng(seed)
    observed = generator.random((n, layers)) < 0.6
    dropped = drop_picks(observed, share, np.random.default_rng(seed))
    assert dropped.sum() == round(share * observed.sum())
    assert not (dropped & ~observed).any()
    more = drop_picks(observed, min(1.0, share + 0.2), np.random.default_rng(seed))
    assert not (dropped & ~more).any()


def test_what_is_dropped_comes_in_runs_and_layers():
    generator = np.random.default_rng(0)
    dropped = np.stack([drop_picks(np.ones((48, 10), bool), 0.3, generator) for _ in range(50)])
    assert (dropped[:, 1:] == dropped[:, :-1]).mean() > 0.94  # 0.58 of independent entries
    assert dropped.all(1).any(1).mean() > 0.2  # stacks with a whole layer gone


def test_dropped_entries_are_known_and_not_observed(generated):
    base, data = (open_flights(ReadFlights(generated), drop=drop) for drop in (0.0, 0.3))
    for plain, batch in zip(base.test_dataloader(), data.test_dataloader(), strict=True):
        assert torch.equal(plain.thickness.nan_to_num(-1), batch.thickness.nan_to_num(-1))
        assert torch.equal(batch.observed | batch.dropped, plain.observed)
        assert not (batch.observed & batch.dropped).any()
        assert not (batch.span_path.isfinite() & ~plain.span_path.isfinite()).any()
        # of the picks, each of which takes the layers on both of its sides
        assert 0.3 < float(batch.dropped.sum() / plain.observed.sum()) < 0.6
        assert torch.equal(batch.observed, plain.observed & ~batch.dropped)
    for loader in (data.val_dataloader(), data.train_dataloader(), data.predict_dataloader()):
        assert not any(batch.dropped.any() for batch in loader)
    again = open_flights(ReadFlights(generated), drop=0.3)
    for one, two in zip(data.test_dataloader(), again.test_dataloader(), strict=True):
        assert torch.equal(one.dropped, two.dropped)


# completed stacks


def complete(folder, given, trained, spoil=0):
    folder.mkdir(exist_ok=True)
    for s in given:
        thickness = np.where(s.observed, s.thickness, 1.0)
        if spoil:
            thickness[~s.observed] = -0.1
        np.savez(
            folder / f"{s.name}.npz",
            thickness=thickness,
            provenance=np.where(s.observed, 0, 1).astype(np.uint8),
            std=np.full(thickness.shape, 0.1, np.float32),
            observed=s.observed,
            physics=s.physics,
            physics_names=np.array(["smb", "st"]),
            pos=s.pos,
            distance=s.distance,
            segment=np.array(s.segment),
            stack=np.array(s.name),
            trained_segments=np.array(trained, dtype=str),
        )
    return CompletedStacks(str(folder))


def test_completed_stacks_are_trained_on_and_evaluated_ones_are_not(tmp_path):
    given = stacks()
    source = Given(given)
    plain = open_flights(source, val=["2012"], test=["2016"])
    trained = sorted({s.segment for s in plain.stacks_of("train")})
    data = ice_data(source, complete(tmp_path / "c", given, trained), val=["2012"], test=["2016"])
    data.setup()
    assert {s.segment for s in data.stacks_of("train")} == set(trained)
    assert all(s.observed.all() for s in data.stacks_of("train"))
    assert not all(s.observed.all() for s in data.stacks_of("test"))
    assert [(e.kind, e.count) for e in data.excluded] == [("evaluated", 6)]
    batch = next(iter(data.train_dataloader()))
    assert set(batch.provenance.unique().tolist()) == {0, 1}


def test_a_completing_model_that_has_seen_the_test_is_refused(tmp_path):
    given = stacks()
    everything = sorted({s.segment for s in given})
    data = ice_data(
        Given(given), complete(tmp_path / "c", given, everything), val=["2012"], test=["2016"]
    )
    with pytest.raises(DataError, match=r"was trained on the test segments 20160401_01"):
        data.setup()


def test_completed_stacks_that_cross_an_evaluated_flight_are_dropped(tmp_path):
    given = stacks()
    target = next(s for s in given if s.segment.startswith("2016"))
    crossing = replace(
        given[0], name="crossing", pos=target.pos[5] + np.arange(-5, 5)[:, None] * [0.0, 0.004]
    )
    apart = replace(given[0], name="apart", pos=crossing.pos + np.array([0.02, 0.0]))
    made = complete(tmp_path / "c", [given[0], crossing, apart], ["20100401_01"])
    data = ice_data(Given(given), made, val=["2012"], test=["2016"])
    data.setup()
    assert {s.name for s in data.stacks_of("train")} == {given[0].name, "apart"}
    assert [(e.kind, e.count) for e in data.excluded] == [("overlap", 1)]


def test_impossible_predictions_stay_missing(tmp_path):
    given = stacks(segments=1)
    flights = complete(tmp_path / "c", given, [], spoil=1).load()
    for before, after in zip(given, flights.stacks, strict=True):
        np.testing.assert_array_equal(before.observed, after.observed)
        np.testing.assert_array_equal(after.provenance == 3, ~before.observed)
    assert flights.excluded[0].count == sum((~s.observed).sum() for s in given)


def test_completed_stacks_must_say_where_they_are_from(tmp_path):
    given = stacks(segments=1, each=1)
    complete(tmp_path / "c", given, [])
    (path,) = (tmp_path / "c").iterdir()
    with np.load(path) as content:
        arrays = dict(content)
    for name in ("provenance", "trained_segments"):
        np.savez(path, **{k: v for k, v in arrays.items() if k != name})
        with pytest.raises(DataError, match=f"no array '{name}'"):
            CompletedStacks(str(tmp_path / "c")).load()


def test_what_the_callback_writes_is_read(tmp_path, monkeypatch):
    given = stacks(each=1)
    for s in given:
        filled = np.where(s.observed, s.thickness, 1.25)
        found = CompletedStack(
            thickness=filled,
            provenance=np.where(s.observed, 0, 1).astype(np.uint8),
            std=np.where(s.observed, np.nan, 0.1).astype(np.float32),
            observed=s.observed,
            physics=s.physics,
            pos=s.pos,
            distance=s.distance,
            segment=s.segment,
            stack=s.name,
            trained_segments=("20110401_01",),
            physics_names=("smb", "st"),
        )
        write_npz(tmp_path / "run" / f"{s.name}.npz", found)
    monkeypatch.chdir(tmp_path)  # runs are relative to the working folder
    flights = CompletedStacks("run").load()
    for before, after in zip(given, flights.stacks, strict=True):
        assert (before.name, before.segment) == (after.name, after.segment)
        assert after.trained_segments == ("20110401_01",)
        np.testing.assert_array_equal(
            after.thickness[before.observed], before.thickness[before.observed]
        )
        np.testing.assert_array_equal(after.provenance, np.where(before.observed, 0, 1))
    assert flights.physics == ("smb", "st")


def test_completed_stacks_of_other_data_are_refused(tmp_path):
    made = complete(tmp_path / "c", stacks(layers=6), [])
    with pytest.raises(DataError, match="have the layers 6, the source 4"):
        IceLayerDataModule(Given(stacks()), made).setup()


# configuration


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"num_workers": -1}, "num_workers"),
        ({"eval_batch_size": 0}, "evaluation.batch_size"),
        ({"train_stacks": 0}, "selection.train_stacks"),
        ({"drop": 1.5}, "evaluation.drop"),
        ({"guard": -1.0}, "split.guard"),
        ({"guard": 1e4}, "split.guard"),
        ({"val": 1.0}, "split.val"),
        ({"test": "2012"}, "split.test"),
        ({"order": "date"}, "split.order"),
        ({"overlap": -1.0}, "selection.overlap"),
        ({"traced": ["training"]}, "selection.traced"),
    ],
)
def test_impossible_options(options, option):
    with pytest.raises(ConfigError, match=rf"--data\.init_args\.{option}` to"):
        ice_data(Given(stacks()), **options)


def test_options_outside_their_groups_are_refused():
    with pytest.raises(ConfigError, match=r"split is 0\.2"):
        IceLayerDataModule(Given(stacks()), split=0.2)
    with pytest.raises(ConfigError, match=r"SplitOptions has no option 'drop'.*val, test, order"):
        IceLayerDataModule(Given(stacks()), split={"drop": 0.2})


def test_what_is_known_before_setup(tmp_path):
    data = IceLayerDataModule(SyntheticFlights(World(**SMALL_WORLD)))
    assert data.layers == 8
    assert data.num_physics == 5
    climate = MarClimate([str(tmp_path)], variables=["smb", "st"])
    data = IceLayerDataModule(LayerFiles([str(tmp_path)], climate))
    assert data.physics == ("smb", "st")
    with pytest.raises(ConfigError, match="number of layers is not known"):
        _ = data.layers
    assert IceLayerDataModule(LayerFiles([str(tmp_path)], climate, count=12)).layers == 12
    with pytest.raises(DataError, match="no training stacks"):
        _ = data.statistics


def test_a_configuration_file_can_say_it_all():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(IceLayerDataModule, "data")
    package = "fulgurite.datamodules.ice_layers"
    source = {
        "class_path": f"{package}.LayerFiles",
        "init_args": {
            "layers": ["sred/CSARP_layer"],
            "count": 20,
            "climate": {
                "class_path": f"{package}.MarClimate",
                "init_args": {"files": ["mar/*.nc"], "scale": {"SMB": 1000.0}},
            },
        },
    }
    init = {
        "source": source,
        "split": {"val": 0.2, "test": ["2012"]},
        "selection": {"traced": ["train"]},
        "evaluation": {"drop": 0.1},
    }
    config = parser.parse_object(
        {"data": {"class_path": f"{package}.IceLayerDataModule", "init_args": init}}
    )
    data = parser.instantiate(config).data
    assert data.layers == 20
    assert data.source.climate.scale == {"SMB": 1000.0}
    assert data.split.test == data.hparams.split["test"] == ["2012"]
    assert data.selection.traced == ("train",)
    assert (data.split.val, data.evaluation.drop) == (0.2, 0.1)


@pytest.mark.parametrize("package", ["h5py", "netCDF4", "pyproj"])
def test_missing_packages_name_the_extra(generated, filled_cache, monkeypatch, package):
    source = SyntheticFlights(World(**SMALL_WORLD))
    _ = source.root
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"{package}\..*fulgurite\[ice\]"):
        source.load()


def test_batching_without_pyg_names_the_extra(monkeypatch):
    data = open_flights(Given(stacks()))
    monkeypatch.setitem(sys.modules, "torch_geometric.data", None)
    with pytest.raises(MissingExtraError, match=r"torch-geometric\..*fulgurite\[ice\]"):
        data.train_dataloader()


def test_npz_stacks_through_the_data_module(tmp_path):
    for s in stacks():
        (tmp_path / s.segment).mkdir(exist_ok=True)
        np.savez(
            tmp_path / s.segment / f"{s.name}.npz",
            thickness=s.thickness,
            pos=s.pos,
            physics=s.physics,
            physics_names=np.array(["smb", "st"]),
        )
    data = open_flights(NpzStacks(str(tmp_path)))
    assert len(data.stacks) == 21
    assert data.physics == ("smb", "st")
    assert data.layers == 4
