"""The label store: overrides, reset, state."""

import io

import pytest
import torch

from fulgurite.datamodules.fedsir import LabelStore
from fulgurite.errors import CheckpointError, DataError


@pytest.fixture
def store():
    return LabelStore(torch.tensor([0, 1, 2, 1]), 3)


def test_write_and_reset(store):
    store.write(torch.tensor([3, 0]), torch.tensor([2, 1]))
    assert store.current.tolist() == [1, 1, 2, 2]
    assert store.given.tolist() == [0, 1, 2, 1]
    assert (store.changed, len(store)) == (2, 4)
    store.reset()
    assert store.current.equal(store.given)
    assert store.changed == 0


def test_the_store_shares_no_memory_with_its_surroundings():
    labels = torch.tensor([0, 1])
    store = LabelStore(labels, 2)
    labels[0] = 1
    store.given[1] = 0
    assert store.given.tolist() == [0, 1]
    state = store.state_dict()
    store.write(torch.tensor([0]), torch.tensor([1]))
    assert state["current"].tolist() == [0, 1]


def test_state_survives_a_file_and_other_data_is_refused(store):
    store.write(torch.tensor([1]), torch.tensor([2]))
    file = io.BytesIO()
    torch.save(store.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = LabelStore(store.given, 3)
    other.load_state_dict(state)
    assert other.current.tolist() == [0, 2, 2, 1]
    for given in ([0, 1, 2, 2], [0, 1, 2]):
        with pytest.raises(CheckpointError, match="4 given labels"):
            LabelStore(torch.tensor(given), 3).load_state_dict(state)


@pytest.mark.parametrize(
    ("index", "labels"),
    [([0], [3]), ([0], [-1]), ([4], [0]), ([-1], [0]), ([0, 1], [0]), ([0], [0.5])],
)
def test_bad_writes_change_nothing(store, index, labels):
    with pytest.raises(DataError):
        store.write(torch.tensor(index), torch.tensor(labels))
    assert store.changed == 0


@pytest.mark.parametrize("given", [[0, 5], [-1, 0], [0.0, 1.0], [[0, 1]]])
def test_bad_labels_are_refused(given):
    with pytest.raises(DataError, match="given labels"):
        LabelStore(torch.tensor(given), 3)
