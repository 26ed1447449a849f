"""Files of predictions: every kind of output is written exactly, or refused at the first batch."""

import collections
import dataclasses
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from fulgurite.errors import ConfigError
from fulgurite.predictions import PredictionFile, read_predictions

Pair = collections.namedtuple("Pair", "logits feature")


@dataclasses.dataclass
class Box:
    corners: torch.Tensor
    name: str


@pytest.fixture
def write(tmp_path):
    """Write batches, and read them again."""

    def call(*batches, names=None, axes=None, table=True):
        file = PredictionFile(tmp_path / "predictions.npz", names, "Model.predict_step", axes)
        try:
            for batch in batches:
                file.append(batch)
            file.close()
        finally:
            file.discard()
        written = ["predictions.csv", "predictions.npz"] if names and table else ["predictions.npz"]
        assert sorted(p.name for p in tmp_path.iterdir()) in ([], written)
        return read_predictions(file.path) if file.path.exists() else {}

    return call


TENSORS = torch.arange(12.0).view(4, 3), torch.arange(6.0).view(2, 3)
BOXES = torch.arange(8.0).view(2, 4), torch.zeros(0, 4), torch.ones(3, 4)


@pytest.mark.parametrize(
    ("batches", "expected"),
    [
        (TENSORS, {"prediction": torch.cat(TENSORS)}),
        ([{"p": t} for t in TENSORS], {"p": torch.cat(TENSORS)}),
        ([{"a": {"b": t}} for t in TENSORS], {"a.b": torch.cat(TENSORS)}),
        ([(t, t[:, 0]) for t in TENSORS], {"0": torch.cat(TENSORS), "1": torch.cat(TENSORS)[:, 0]}),
        ([Pair(t, t) for t in TENSORS], {k: torch.cat(TENSORS) for k in ("logits", "feature")}),
        ([{"loss": 0.5}, {"loss": 1.5}], {"loss": [0.5, 1.5]}),
        ([torch.tensor(1), torch.tensor(2)], {"prediction": [1, 2]}),
        ([{"n": ["ab", "c"]}, {"n": ["détail"]}], {"n": ["ab", "c", "détail"]}),
        ([{"n": "first"}, {"n": "2nd"}], {"n": ["first", "2nd"]}),
        ([{"n": [1, 2.5]}, {"n": [3.0]}], {"n": [1, 2.5, 3]}),
        ([[[1, 2], [3, 4]], [[5, 6]]], {"prediction": [[1, 2], [3, 4], [5, 6]]}),
        ([{"b": t.bfloat16()} for t in TENSORS], {"b": torch.cat(TENSORS)}),
        ([{"v": np.array([1, 2], np.uint8)}, {"v": np.array([3], np.uint8)}], {"v": [1, 2, 3]}),
        ([{3: TENSORS[0]}], {"3": TENSORS[0]}),
        ([{"b": [BOXES[0]]}, {"b": [BOXES[0]]}], {"b": [BOXES[0], BOXES[0]]}),
    ],
)
def test_rows_of_one_shape_are_one_array(write, batches, expected):
    found = write(*batches)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, list) and isinstance(value[0], torch.Tensor):
            value = torch.stack(value)
        assert found[key].tolist() == np.asarray(value).tolist()


@pytest.mark.parametrize(
    ("batches", "key"),
    [
        ([[*BOXES[:2]], [BOXES[2]]], "prediction"),
        ([{"b": [*BOXES]}], "b"),
        ([[{"b": x} for x in BOXES]], "b"),
        ([{"d": [{"b": x} for x in BOXES[:1]]}, {"d": [{"b": x} for x in BOXES[1:]]}], "d.b"),
        ([[Box(x, "a") for x in BOXES]], "corners"),
        ([[BOXES[0], torch.zeros(0), BOXES[2]]], "prediction"),  # nothing found, without its axes
    ],
)
def test_rows_of_varying_length_are_read_as_they_were(write, batches, key):
    found = write(*batches)[key]
    assert [row.tolist() for row in found] == [box.tolist() for box in BOXES]


def test_rows_that_differ_in_any_axis_are_read_as_they_were(write):
    images = [torch.rand(2, 3), torch.rand(2, 5), torch.rand(4, 1)]
    found = write({"image": images[:1]}, {"image": images[1:]})["image"]
    assert all(np.array_equal(a, b) for a, b in zip(found, images, strict=True))


def test_batches_padded_to_different_widths_keep_their_rows(write):
    found = write({"boxes": torch.zeros(1, 3)}, {"boxes": torch.ones(2, 4)})["boxes"]
    assert [row.shape for row in found] == [(3,), (4,), (4,)]


def test_words_of_varying_number_are_read_as_they_were(write):
    words = [["a", "long word"], [], ["b"]]
    found = write({"words": words[:2]}, {"words": words[2:]})["words"]
    assert [row.tolist() for row in found] == words


def test_codes_get_their_names_beside_them(write):
    names = {"label": ["cat", "dog"], "absent": ["x"]}
    found = write({"label": torch.tensor([1, 0])}, {"label": torch.tensor([-1, 2])}, names=names)
    assert found["label_name"].tolist() == ["dog", "cat", "", ""]
    with pytest.raises(ConfigError, match="float32 values under 'label'"):
        write({"label": torch.tensor([0.5])}, names=names)
    with pytest.raises(ConfigError, match="'label_name' twice"):
        write({"label": torch.tensor([1]), "label_name": ["dog"]}, names=names)


def test_a_table_holds_names_instead_of_codes(write, tmp_path):
    names = {
        "label": ["NA", 'a "b", c'],
        "index": {"plate": ["p1", "p1", "p2"], "well": ["A01", "A02", "A01"]},
        "absent": ["x"],
    }
    axes = {"scores": ["NA", "b"], "none": ["x"]}
    first = {
        "index": torch.tensor([2, 0]),
        "well": torch.tensor([7, 5]),
        "label": torch.tensor([1, -1]),
        "scores": torch.tensor([[0.1, 0.9], [0.25, 0.75]]),
        "map": torch.zeros(2, 3, 3),
    }
    rows = write(first, {key: value[:1] for key, value in first.items()}, names=names, axes=axes)
    lines = [
        "plate,well,index,label,scores.NA,scores.b",
        'p2,A01,2,"a ""b"", c",0.1,0.9',
        "p1,A01,0,,0.25,0.75",
        'p2,A01,2,"a ""b"", c",0.1,0.9',
    ]
    assert (tmp_path / "predictions.csv").read_text().splitlines() == lines
    # the numbers stay in the file
    assert rows["index"].tolist() == [2, 0, 2]
    assert rows["well"].tolist() == [7, 5, 7]
    assert "index_name" not in rows
    with pytest.raises(ConfigError, match=r"2 values in a row of 'scores'.*name 3"):
        write(first, names=names, axes={"scores": ["a", "b", "c"]})
    with pytest.raises(ConfigError, match="float32 values under 'index'"):
        write({"index": torch.tensor([0.5])}, names=names)


@pytest.mark.parametrize(
    "batches",
    [
        [{"label": torch.tensor([0, 1]), "other": torch.tensor([1])}],
        [{"other": torch.tensor([1])}],
        [{"label": [torch.tensor([0, 1]), torch.tensor([1])]}],
    ],
)
def test_where_there_can_be_no_table_an_older_one_does_not_stay(write, tmp_path, batches):
    names = {"label": ["a", "b"]}
    write({"label": torch.tensor([0])}, names=names)
    assert (tmp_path / "predictions.csv").read_text() == "label\na\n"
    write(*batches, names=names, table=False)
    assert not (tmp_path / "predictions.csv").exists()


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (object(), "returns a object"),
        ({"x": {1, 2}}, "under 'x' a set"),
        ({"x": None}, "under 'x' a NoneType"),
        ({"x": [b"raw"]}, "under 'x' a bytes"),
        ({"x": np.array([None])}, "under 'x' object in a ndarray"),
        ({"x": torch.eye(2).to_sparse()}, "under 'x' a torch.sparse_coo"),
        ({"x": [[[1], [2, 3]]]}, "lists that differ in length"),
        ({"x": [[1, "a"]]}, "lists that differ in length or type"),
        ({("a",): 1}, "a key of type tuple"),
        ([{"a": 1}, {"b": 1}], "a list with 'a' and 'b'"),
        ({"a.b": 1, "a": {"b": 2}}, "'a.b' twice"),
        ({"a": 1, "a.lengths": 2}, "'a.lengths' beside 'a'"),
        ({"x": "zero\0"}, "a zero character at the end of a str"),
        ({"x": [2**70]}, "under 'x' object"),
    ],
)
def test_what_cannot_be_written_is_refused_by_name(write, output, words):
    with pytest.raises(ConfigError) as caught:
        write(output)
    assert words in str(caught.value)
    assert str(caught.value).startswith("Model.predict_step returns")


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ({"a": 1}, {"b": 1}, "'b' in batch 1, and 'a' in the first"),
        (None, {"b": 1}, "'b' in batch 1, and nothing in the first"),
        ({"a": 1}, None, "nothing in batch 1, and 'a' in the first"),
        ({"a": ["x"]}, {"a": [1]}, "strings and later int64 values under 'a'"),
        (
            {"a": torch.zeros(2, 3)},
            {"a": torch.zeros(2, 3, 1)},
            "rows with 1 axes and later with 2",
        ),
    ],
)
def test_a_batch_unlike_the_first_is_refused_by_name(write, first, second, words):
    with pytest.raises(ConfigError) as caught:
        write(first, second)
    assert words in str(caught.value)


def test_nothing_is_written_of_nothing(write):
    assert write(None, None) == {}


def test_memory_holds_no_more_than_some_batches(tmp_path):
    file = PredictionFile(tmp_path / "predictions.npz")
    batch = {"p": torch.zeros(256, 1024), "names": ["a name"] * 256}  # 1 MiB
    tracemalloc.start()
    for _ in range(32):
        file.append(batch)
    file.close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert Path(file.path).stat().st_size > 32 * 2**20
    assert peak < 8 * 2**20


OWN = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader


class Data(LightningDataModule):
    prediction_names = {"code": ["even", "odd"]}

    def __init__(self, loaders: int = 1):
        super().__init__()
        self.loaders = loaders

    def predict_dataloader(self):
        loaders = [DataLoader(torch.arange(8.0).view(8, 1), batch_size=4)] * self.loaders
        return loaders if self.loaders > 1 else loaders[0]


class Plain(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 2)

    def forward(self, x):
        return self.layer(x)


class Coded(Plain):
    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return {"code": batch.long().flatten() % 2}


class Refused(Plain):
    def predict_step(self, batch, batch_idx):
        return {"x": object()}


class Dies(Plain):
    def predict_step(self, batch, batch_idx):
        if batch_idx:
            raise KeyError("my own bug")
        return batch


class Silent(Plain):
    def predict_step(self, batch, batch_idx):
        return None
"""


@pytest.fixture
def predict(fulgurite, workdir, monkeypatch):
    """Run ``fulgurite predict`` with a module of the current folder."""
    (workdir / "own_predictions.py").write_text(OWN)
    monkeypatch.delitem(__import__("sys").modules, "own_predictions", raising=False)

    def call(model, *options):
        return fulgurite(
            "predict", f"--model=own_predictions.{model}", "--data=own_predictions.Data",
            "--run.dir=run", "--trainer.enable_progress_bar=false", *options,
        )  # fmt: skip

    return call


def test_predict_writes_what_the_step_returns(predict):
    status, out, error = predict("Plain")
    assert status == 0, error
    assert "predict: recorded in run/predict/predictions.npz" in out
    assert np.load("run/predict/predictions.npz")["prediction"].shape == (8, 2)


def test_predict_writes_a_file_for_each_loader(predict):
    status, _, error = predict("Coded", "--data.loaders=2")
    assert status == 0, error
    for number in range(2):
        found = np.load(f"run/predict/predictions-loader{number}.npz")
        assert found["code_name"].tolist() == ["even", "odd"] * 4
        lines = Path(f"run/predict/predictions-loader{number}.csv").read_text().split()
        assert lines == ["code", *["even", "odd"] * 4]


def test_predict_refuses_at_the_first_batch(predict):
    status, _, error = predict("Refused")
    assert status == 2
    (line,) = [line for line in error.splitlines() if line.startswith("fulgurite: error:")]
    assert "Refused.predict_step returns under 'x' a object" in line
    assert not list(Path("run/predict").rglob("*predictions*"))


def test_a_prediction_that_breaks_off_pretends_nothing(predict):
    with pytest.raises(KeyError, match="my own bug"):
        predict("Dies")
    assert [p.name for p in Path("run/predict").glob("*pred*")] == ["predictions.partial.npz"]
    assert len(np.load("run/predict/predictions.partial.npz")["prediction"]) == 4


def test_a_step_that_returns_nothing_is_said(predict):
    status, out, _ = predict("Silent")
    assert status == 0
    assert "Silent.predict_step returned nothing to write" in out


def test_a_step_that_knows_one_loader_is_refused_several_in_one_line(predict):
    status, _, error = predict("Silent", "--data.loaders=2")
    assert status == 2
    (line,) = [line for line in error.splitlines() if line.startswith("fulgurite: error:")]
    assert "no `dataloader_idx` argument in `Silent.predict_step()`" in line
