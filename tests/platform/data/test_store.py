"""The cache of arrays, and the processes that fill it."""

import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import platformdirs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fulgurite.data.pool import FEWEST_JOBS, run_in_processes
from fulgurite.data.store import ArrayStore, ArrayStream, cache_folder, cached_folder, cached_store
from fulgurite.errors import DataError


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("FULGURITE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("FULGURITE_CACHE")
    assert cache_folder() == platformdirs.user_cache_path("fulgurite")
    assert cache_folder().name == "fulgurite"


def write(folder):
    np.save(folder / "a.npy", np.arange(6).reshape(2, 3))
    return {"names": ["x", "ü"]}


def test_a_store_is_written_once_and_sent_by_name(cache):
    store = cached_store("kind/key", write)
    assert store.folder == cache / "kind" / "key"
    again = cached_store("kind/key", pytest.fail)
    sent = pickle.dumps(store)
    assert len(sent) < 1_000
    for other in (store, again, pickle.loads(sent)):
        assert (other["a"] == [[0, 1, 2], [3, 4, 5]]).all()
        assert other.facts == {"names": ["x", "ü"]}
    with pytest.raises(ValueError, match="read-only"):
        store["a"][0, 0] = 9
    copy = store.copy("a")
    copy[:] = 9
    assert (ArrayStore(store.folder)["a"] == store["a"]).all()


def test_what_fails_leaves_no_entry(cache):
    def refuse(_):
        raise DataError("no")

    for broken, check in ((refuse, None), (write, refuse)):
        with pytest.raises(DataError, match="no"):
            cached_store("key", broken, check=check)
        assert [path for path in cache.iterdir() if path.is_dir()] == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FULGURITE_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="Set FULGURITE_CACHE to a folder with 12 free bytes"):
        cached_store("kind/key", write, size=12)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 4000), max_size=6), st.sampled_from(["u1", "<u2", "<i8"]))
def test_a_stream_is_the_array_of_its_pieces(tmp_path_factory, sizes, kind):
    path = tmp_path_factory.mktemp("stream") / "a.npy"
    pieces = [np.random.default_rng(size).integers(0, 200, size) for size in sizes]
    with ArrayStream(path, kind) as stream:
        for piece in pieces:
            stream.append(piece)
    expected = np.concatenate([np.zeros(0, int), *pieces]).astype(kind)
    (path.parent / "facts.json").write_text("{}")
    array = ArrayStore(path.parent)["a"]
    assert array.dtype == expected.dtype
    assert array.tolist() == expected.tolist()


class Squares:
    def __getitem__(self, number):
        if number == 5:
            raise DataError(f"Job {number} fails.", "Leave it out.")
        return torch.tensor(number**2)


def random_states():
    name, keys, *rest = np.random.get_state()  # noqa: NPY002  # others may draw from it
    return torch.get_rng_state().tolist(), (name, keys.tolist(), rest), random.getstate()


@pytest.mark.parametrize("count", [0, 1, FEWEST_JOBS + 1])
@pytest.mark.parametrize("cores", [1, 2])
def test_jobs_are_done_in_order_and_leave_random_numbers_alone(monkeypatch, count, cores):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)), raising=False)
    torch.manual_seed(3)
    before = random_states()
    assert [int(x) for x in run_in_processes(Squares(), count)] == [k**2 for k in range(count)]
    assert random_states() == before


@pytest.mark.parametrize("is_parallel", [False, True])
def test_an_error_of_a_job_is_raised_as_it_is(monkeypatch, is_parallel):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)
    with pytest.raises(DataError) as error:
        list(run_in_processes(Squares(), 8, is_parallel))
    assert str(error.value) == "Job 5 fails. Leave it out."


def test_the_folder_of_a_key_is_in_the_cache(cache):
    assert Path(cached_store("a", write).folder).parent == cache


def test_a_full_disk_is_named_where_hdf5_gives_no_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("FULGURITE_CACHE", str(tmp_path))

    def write(folder):
        raise RuntimeError("NetCDF: HDF error")

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**40))
    with pytest.raises(RuntimeError, match="HDF error"):
        cached_folder("a", write)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4096))
    with pytest.raises(DataError, match=r"cache .* \(No space left on device\)"):
        cached_folder("a", write)
    assert [path.name for path in tmp_path.iterdir()] == ["a.lock"]
