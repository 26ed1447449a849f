"""Embeddings of elsewhere in place of images: matched by name, or refused by name."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from fulgurite.data.exclusions import Exclusion
from fulgurite.datamodules.cs_arm_bn import EmbeddedPlates, HoldOut, PlateDataModule, PlateTable
from fulgurite.datamodules.cs_arm_bn.sources import PlateSource
from fulgurite.errors import CheckpointError, ConfigError, DataError

D = 6


class Table(PlateSource):
    """Six plates of two classes, whose images are nowhere."""

    class_names, channels = ("a", "b"), ("DNA",)

    def load(self):
        frame = pd.DataFrame(
            [
                {
                    "source": "lab", "batch": f"b{p // 2}", "plate": f"p{p}", "well": f"A{w:02}",
                    "site": "1", "role": "control" if w > 4 else "query", "label": w % 2,
                    "path": "nowhere.png",
                }
                for p in range(6) for w in range(1, 9)
            ]
        )  # fmt: skip
        return PlateTable(frame, self.class_names, self.channels)


@pytest.fixture
def keys():
    return Table().load().frame[["plate", "well", "site"]]


@pytest.fixture
def values(keys):
    return np.random.default_rng(0).normal(size=(len(keys), D)).astype(np.float32)


def write(folder, keys, values, kind="npz"):
    path = folder / f"embeddings.{kind.split()[0]}"
    if kind == "npz":
        arrays = {name: keys[name].to_numpy() for name in keys}
        arrays = {k: v.astype(str) if v.dtype == object else v for k, v in arrays.items()}
        np.savez(path, embeddings=values, **arrays)
    elif kind == "parquet of lists":
        keys.assign(embedding=list(values)).to_parquet(path)
    else:
        numbers = {f"f{k}": values[:, k] for k in range(values.shape[1])}
        keys.assign(**numbers).to_parquet(path)
    return path


def make_data(path, **kwargs):
    source = EmbeddedPlates(Table(), str(path), **kwargs.pop("source", {}))
    split, episodes = HoldOut(new_batches=1, val_batches=1), {"queries": 4, "controls": 3}
    return PlateDataModule(source, split, episodes=episodes, **kwargs)


@pytest.mark.parametrize("kind", ["npz", "parquet", "parquet of lists"])
@pytest.mark.parametrize("is_cached", [True, False])
def test_rows_are_matched_by_name_in_any_order(tmp_path, keys, values, kind, is_cached, cache):
    order = np.random.default_rng(1).permutation(len(keys))
    shuffled = keys.iloc[order].assign(site=1)  # a whole number, and wells as others spell them
    shuffled["well"] = shuffled["well"].str.replace("A0", "a")
    data = make_data(write(tmp_path, shuffled, values[order], kind), pixels={"cache": is_cached})
    assert data.in_channels == D
    data.setup()
    for row in (0, 17, 40):
        np.testing.assert_array_equal(data.images[row][:, 0, 0], values[row])
    batch = data.on_after_batch_transfer(data.train_dataloader().dataset[0], 0)
    raw = values[batch.row]
    mean, std = (x.numpy() for x in data.state_dict().values() if hasattr(x, "numpy"))
    np.testing.assert_allclose(batch.query[:, :, 0, 0], (raw - mean) / std, rtol=1e-4)


def test_rows_are_matched_by_number(tmp_path, keys, values):
    order = np.random.default_rng(1).permutation(len(keys))
    path = write(tmp_path, pd.DataFrame({"row": order}), values[order])
    data = make_data(path, pixels={"cache": False})
    data.setup()
    np.testing.assert_array_equal(data.images[17][:, 0, 0], values[17])


@pytest.mark.parametrize("kind", ["parquet", "parquet of lists"])
def test_keys_may_be_the_index_of_pandas(tmp_path, keys, values, kind):
    path = write(tmp_path, keys, values, kind)
    pd.read_parquet(path).set_index(["plate", "well", "site"]).to_parquet(path)
    data = make_data(path, pixels={"cache": False})
    assert data.in_channels == D
    data.setup()
    np.testing.assert_array_equal(data.images[17][:, 0, 0], values[17])


def test_numbers_that_never_vary_in_training_stay_harmless(tmp_path, keys, values):
    values[:, 0], values[:, 1] = 4, 1e-9 * values[:, 2]
    data = make_data(write(tmp_path, keys, values))
    data.setup()
    queries, std = values[data.assignment.train], data.state_dict()["std"].numpy()
    np.testing.assert_allclose(std[1:], queries[:, 1:].std(0, dtype=np.float64), rtol=1e-5)
    assert std[0] == 1  # as scikit-learn scales it: a plate where it does vary is not blown up


@pytest.mark.parametrize("training", [True, False])
def test_a_training_that_goes_on_with_other_data_says_so(tmp_path, keys, values, training, recwarn):
    data = make_data(write(tmp_path, keys, values))
    data.setup()
    state = data.state_dict()
    data.trainer = SimpleNamespace(training=training)
    data.load_state_dict(state)
    assert not recwarn
    other = make_data(write(tmp_path, keys, 2 * values), pixels={"cache": False})
    other.setup()
    other.trainer = SimpleNamespace(training=training)  # a test on other plates is no mistake
    other.load_state_dict(state)
    assert ["goes on with other data" in str(w.message) for w in recwarn] == [True] * training


class TableOfBatches(Table):
    """Each batch has a class of its own, beside a common one."""

    class_names = ("a", "b0", "b1", "b2")

    def load(self):
        frame = super().load().frame
        batch = frame["batch"].str[1:].astype(int)
        frame["label"] = frame["label"].where(frame["label"] <= 0, batch + 1)
        return PlateTable(frame, self.class_names, self.channels)


def test_classes_that_no_training_query_has_are_said(tmp_path, keys, values):
    source = EmbeddedPlates(TableOfBatches(), str(write(tmp_path, keys, values)))
    split = HoldOut(new_batches=["b2"], val_batches=["b0"], in_domain=0)
    data = PlateDataModule(source, split, episodes={"queries": 4, "controls": 3})
    with pytest.warns(
        UserWarning,
        match=r"2 classes have no query for training.*validation \(4 of 8 queries\), new_batch "
        r"\(4 of 8 queries\): 'b0', 'b2'\.",
    ):
        data.setup()


def test_sites_without_an_embedding_are_named_or_left_out(tmp_path, keys, values):
    path = write(tmp_path, keys.drop(index=[9, 10]), np.delete(values, [9, 10], 0))
    with pytest.raises(DataError, match=r"2 of the 48 sites: lab.b0.p1 A02 site 1, .*A03") as error:
        make_data(path, pixels={"cache": False}).setup()
    assert "exclude=[missing_embedding]" in error.value.hint
    data = make_data(path, pixels={"cache": False}, source={"exclude": ["missing_embedding"]})
    data.setup()
    assert len(data.table) == 46
    assert "excluded (missing_embedding), 2 sites" in data.table.report()
    np.testing.assert_array_equal(data.images[9][:, 0, 0], values[11])


def test_rows_of_no_site_are_counted(tmp_path, keys, values):
    more = pd.concat([keys, keys.iloc[:2].assign(plate="elsewhere")])
    path = write(tmp_path, more, np.concatenate([values, values[:2]]))
    assert "2 rows of it are of no site" in "".join(EmbeddedPlates(Table(), path).load().notes)


def changed(name, value):
    return lambda keys, values: (keys.assign(**{name: value}), values)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda k, v: (pd.concat([k, k[:1]]), np.concatenate([v, v[:1]])), "two rows of plate p0"),
        (lambda k, v: (k.drop(columns="site"), v), "no 'site'"),
        (lambda k, v: (k.drop(columns=["plate", "well", "site"]), v), "no 'plate'"),
        (changed("site", 1.5), "fractions"),
        (lambda k, v: (k.assign(plate="x" + k["plate"]), v), "48 of the 48 sites"),
        (lambda k, v: (k[:0], v[:0]), "not .E, D."),
        (lambda k, v: (pd.DataFrame({"row": np.arange(48) + 1}), v), "does not number the 48"),
        (lambda k, v: (pd.DataFrame({"row": np.arange(48) // 2}), v), "two rows of row 0"),
        (lambda k, v: (k, v[:, 0]), "not .E, D."),
        (lambda k, v: (k.assign(row=range(48)), v), "`row` and 'plate' to tell sites by"),
        (lambda k, v: (k, np.where(np.arange(48)[:, None] == 3, np.nan, v)), "not finite"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, keys, values, change, says):
    def use():
        data = make_data(write(tmp_path, *change(keys, values)), pixels={"cache": False})
        data.setup()
        return data.images[3]

    with pytest.raises(DataError, match=says):
        use()


@pytest.mark.parametrize(
    "name", ["label", "Metadata_Concentration", "Unnamed: 0", "ImageNumber", "Batch"]
)
def test_columns_that_are_no_features_are_refused(tmp_path, keys, values, name):
    path = write(tmp_path, keys.assign(**{name: np.arange(48) % 2}), values, "parquet of numbers")
    with pytest.raises(DataError, match=f"columns {name} are no numbers of an embedding"):
        EmbeddedPlates(Table(), str(path)).load()


def test_an_empty_list_is_named(tmp_path, keys, values):
    lists = [None if row == 7 else value for row, value in enumerate(values)]
    keys.assign(embedding=lists).to_parquet(tmp_path / "e.parquet")
    with pytest.raises(DataError, match="`embedding` is empty in row 7"):
        EmbeddedPlates(Table(), str(tmp_path / "e.parquet")).load()


def test_columns_in_another_order_are_other_embeddings(tmp_path, keys, values):
    path = write(tmp_path, keys, values, "parquet of numbers")
    data = make_data(path, pixels={"cache": False})
    data.setup()
    assert data.source.channels == tuple(f"f{k}" for k in range(D))
    state = data.state_dict()
    frame = pd.read_parquet(path)
    frame[frame.columns[::-1]].to_parquet(path)
    with pytest.raises(CheckpointError, match=r"channels f0, f1.*these data have f5, f4"):
        make_data(path).load_state_dict(state)


class Shortened(Table):
    """The plates without their first site."""

    def load(self):
        first = np.arange(48) == 0
        return super().load().drop(first, Exclusion("missing_channel", "no path", 0))


def test_numbers_of_rows_are_those_of_the_whole_table(tmp_path, values):
    path = write(tmp_path, pd.DataFrame({"row": np.arange(47)}), values[:47])
    with pytest.raises(DataError, match="1 are left out, so that others have their numbers"):
        EmbeddedPlates(Shortened(), str(path)).load()


def test_other_files_are_refused(tmp_path):
    for name, content in (("a.csv", b"x"), ("a.npz", b"x"), ("a.parquet", b"x")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            EmbeddedPlates(Table(), str(tmp_path / name)).load()
    with pytest.raises(ConfigError, match="missing_embedding"):
        EmbeddedPlates(Table(), str(tmp_path / "a.npz"), ["missing"])
