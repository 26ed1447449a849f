"""Bytes of real files as sequences, their cache, and needles in a haystack."""

import pickle
import time
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from fakes.forks import start_script
from fakes.options import group
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F

from fulgurite.cli.arguments import prepare_arguments
from fulgurite.data.listing import find_files
from fulgurite.data.splits import split_ranges
from fulgurite.data.text_options import TextOptions, TextSplit
from fulgurite.datamodules.stream_cqsa import (
    ByteTextDataModule,
    NeedleDataModule,
    NeedleOptions,
    NeedleSizes,
    NeedleTask,
    cached_text,
    text,
)
from fulgurite.datamodules.stream_cqsa.needle import IGNORED, MARK, QUERY, place_needles
from fulgurite.errors import ConfigError, DataError
from fulgurite.sampling import DrawSampler

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch):
    monkeypatch.delenv("FULGURITE_DATA", raising=False)


@pytest.fixture
def corpus(tmp_path):
    """Three files of known random bytes, and files that are not text."""
    folder = tmp_path / "corpus"
    (folder / "inner").mkdir(parents=True)
    (folder / ".git").mkdir()
    generator = np.random.default_rng(0)
    for name, size in (("a.txt", 700), ("inner/b.md", 500), ("z.txt", 800)):
        (folder / name).write_bytes(generator.bytes(size))
    (folder / "empty.txt").touch()
    for name in ("image.png", ".hidden.txt", ".git/c.txt"):
        (folder / name).write_bytes(b"no")
    return folder


@pytest.fixture
def text_bytes(corpus):
    return b"".join((corpus / name).read_bytes() for name in ("a.txt", "inner/b.md", "z.txt"))


def text_module(**arguments):
    return ByteTextDataModule(**group(arguments, text=TextOptions, split=TextSplit))


def needle_module(**arguments):
    sizes = {name: arguments.pop(f"{name}_size") for name in ("train", "val", "test")
             if f"{name}_size" in arguments}  # fmt: skip
    if sizes:
        arguments["sizes"] = NeedleSizes(**sizes)
    return NeedleDataModule(**group(arguments, task=NeedleOptions))


def made(corpus, **arguments):
    arguments = {
        "length": 20,
        "batch_size": 4,
        "val_fraction": 0.1,
        "test_fraction": 0.2,
    } | arguments
    data = text_module(paths=[str(corpus)], **arguments)
    data.prepare_data()
    data.setup()
    return data


def rows(loader, name="tokens"):
    return torch.cat([batch[name] for batch in loader])


def entries(cache):
    files = cache.iterdir() if cache.exists() else []
    return sorted(path.name for path in files if path.suffix != ".lock")


# --- finding files


def test_files_of_folders_patterns_and_names(corpus, monkeypatch):
    def names(*paths, suffixes=(".txt", ".md")):
        return [name for name, _ in find_files([str(path) for path in paths], suffixes)]

    assert names(corpus) == ["a.txt", "empty.txt", "inner/b.md", "z.txt"]
    assert names(corpus, suffixes=(".md",)) == ["inner/b.md"]
    assert names(corpus / "image.png") == ["image.png"]  # named, so whatever its suffix
    assert names(corpus / "?.txt") == ["a.txt", "z.txt"]
    assert names(corpus / "inn*") == ["b.md"]
    assert names(corpus / "**" / "*.md") == ["b.md"]
    assert names(corpus / "z.txt", corpus) == ["z.txt", "a.txt", "empty.txt", "inner/b.md"]
    with pytest.raises(DataError, match="FULGURITE_DATA"):
        names("corpus")
    monkeypatch.setenv("FULGURITE_DATA", str(corpus.parent))
    assert names("corpus/inner", "corpus/z*") == ["b.md", "z.txt"]
    odd = corpus / "odd[1].txt"
    odd.touch()
    assert names(odd) == ["odd[1].txt"]  # a file, though it looks like a pattern


def test_what_is_not_there_is_named(corpus):
    with pytest.raises(DataError, match=r"no file at .*\.cpp"):
        find_files([str(corpus)], [".cpp"])
    with pytest.raises(DataError, match="no file at"):
        find_files([str(corpus / "*.none")], [".txt"])
    with pytest.raises(DataError, match=r"no data at .*missing"):
        find_files([str(corpus / "missing")], [".txt"])
    with pytest.raises(DataError, match="paths"):
        find_files([], [".txt"])
    (corpus / "broken.txt").symlink_to(corpus / "nowhere")
    with pytest.raises(DataError, match=r"broken\.txt leads nowhere"):
        made(corpus)


def test_the_standard_library_is_real_text():
    files = find_files(["stdlib"], [".txt"])
    names = {name for name, _ in files}
    assert {"abc.py", "json/decoder.py"} <= names
    assert not [name for name in names if {"test", "site-packages"} & set(name.split("/"))]
    assert sum(path.stat().st_size for _, path in files) > 5_000_000
    assert TextOptions().all_paths == TextOptions("stdlib").all_paths == ["stdlib"]


# --- the cache


def test_the_cache_holds_all_bytes_and_is_reused(corpus, text_bytes, cache, monkeypatch):
    files = find_files([str(corpus)], [".txt", ".md"])
    first = cached_text(files)
    assert bytes(first.read(0, len(first)).tolist()) == text_bytes
    assert first.starts.tolist() == [0, 700, 1200]  # the empty file begins nowhere
    (entry,) = entries(cache)
    written = (cache / entry / "bytes.npy").stat().st_mtime_ns

    moved = corpus.rename(corpus.with_name("elsewhere"))
    with monkeypatch.context() as patch:
        patch.setattr(text.np, "save", None)  # writing would fail
        again = cached_text(find_files([str(moved)], [".txt", ".md"]))
    assert again.folder == first.folder
    assert (cache / entry / "bytes.npy").stat().st_mtime_ns == written

    (moved / "a.txt").write_bytes(b"x" * 700)  # same name and size
    assert bytes(cached_text(find_files([str(moved)], [".txt", ".md"])).read(0, 700).tolist()) == (
        b"x" * 700
    )
    (moved / "a.txt").rename(moved / "aa.txt")
    cached_text(find_files([str(moved)], [".txt", ".md"]))
    assert len(entries(cache)) == 3


def test_an_interrupted_write_leaves_nothing(corpus, cache, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(text.np, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            made(corpus)
    assert entries(cache) == []
    assert len(made(corpus).text) == 2000


def test_a_killed_writer_is_cleaned_up(corpus, cache, tmp_path):
    code = """
import os, sys
from fulgurite.datamodules.stream_cqsa import cached_text, text
from fulgurite.data.listing import find_files
text.np.save = lambda *_: os.kill(os.getpid(), 9)
cached_text(find_files([sys.argv[1]], [".txt", ".md"]))
"""
    assert start_script(code, corpus, folder=tmp_path).wait().status == -9
    (left_over,) = entries(cache)
    assert ".tmp-" in left_over
    data = made(corpus)
    assert entries(cache) == [data.text.folder.name]


def test_a_file_that_changes_meanwhile_is_refused(corpus, cache, monkeypatch):
    open_stream = text.ArrayStream

    def late(*arguments):
        (corpus / "a.txt").write_bytes(b"other")
        return open_stream(*arguments)

    monkeypatch.setattr(text, "ArrayStream", late)
    with pytest.raises(DataError, match=r"a\.txt changed"):
        made(corpus)
    assert entries(cache) == []


def test_a_cache_that_cannot_be_written_is_named(corpus, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FULGURITE_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="Set FULGURITE_CACHE to a folder with 2,000 free"):
        made(corpus)


def test_ranks_write_once(corpus, cache, tmp_path):
    """Several processes ask at once; one writes, the others wait for it."""
    code = """
import sys, time
from fulgurite.datamodules.stream_cqsa import cached_text, text
from fulgurite.data.listing import find_files
open_stream = text.ArrayStream
def slow(*arguments):
    print("written")
    time.sleep(0.5)
    return open_stream(*arguments)
text.ArrayStream = slow
print(len(cached_text(find_files([sys.argv[1]], [".txt", ".md"]))))
"""
    ranks = [start_script(code, corpus, folder=tmp_path) for _ in range(2)]
    printed = "".join(rank.wait().output for rank in ranks)
    assert sorted(printed.split()) == ["2000", "2000", "written"]


def test_a_text_is_sent_as_its_name(corpus):
    data = made(corpus)
    sent = pickle.dumps(data.text)
    assert len(sent) < 500
    assert pickle.loads(sent).read(690, 20).equal(data.text.read(690, 20))


# --- windows


def test_windows_are_bytes_of_the_files_and_splits_are_apart(corpus, text_bytes):
    data = made(corpus, steps_per_epoch=50)
    for loader, part in zip(
        (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()),
        (range(1400), range(1400, 1600), range(1600, 2000)),
        strict=True,
    ):
        inside = text_bytes[part.start : part.stop]
        tokens, targets = rows(loader), rows(loader, "targets")
        assert tokens.dtype == targets.dtype == torch.int64
        for row, target in zip(tokens.tolist(), targets.tolist(), strict=True):
            assert row[1:] == target[:-1]
            assert bytes([*row, target[-1]]) in inside  # random bytes: found only where they are
    assert sum(len(part) for part in data.parts) == 2000


def test_evaluation_windows_follow_each_other(corpus, text_bytes):
    data = made(corpus)
    test = rows(data.test_dataloader())
    assert len(test) == 19  # 399 // 20: the last target has to be inside too
    assert bytes(test.flatten().tolist()) == text_bytes[1600 : 1600 + 380]
    assert rows(data.predict_dataloader()).equal(test)
    val = rows(data.val_dataloader())
    assert len(val) == 9
    few = rows(made(corpus, val_sequences=3).val_dataloader())
    assert few.equal(val[[0, 3, 6]])
    assert rows(made(corpus, val_sequences=100).val_dataloader()).equal(val)


def test_training_windows_reach_the_whole_part(corpus, text_bytes):
    alone = {"val_fraction": 0, "test_fraction": 0}
    data = made(corpus, length=1990, batch_size=1, steps_per_epoch=100, **alone)
    begins = {text_bytes.index(bytes(row)) for row in rows(data.train_dataloader()).tolist()}
    assert begins == set(range(10))  # at 9 the last target is the last byte


def test_training_windows_repeat_and_differ_by_epoch_and_seed(corpus):
    loader = made(corpus, steps_per_epoch=2).train_dataloader()
    first = rows(loader)
    assert len(loader) == 2
    assert rows(loader).equal(first)
    assert rows(made(corpus, steps_per_epoch=2).train_dataloader()).equal(first)
    assert not rows(made(corpus, steps_per_epoch=2, seed=1).train_dataloader()).equal(first)
    loader.sampler.set_epoch(1)
    second = rows(loader)
    assert not second.equal(first)
    twice = rows(made(corpus, steps_per_epoch=4).train_dataloader())
    assert torch.cat([first, second]).equal(twice)


def test_batches_do_not_depend_on_workers(corpus):
    torch.manual_seed(0)
    plain = rows(made(corpus, steps_per_epoch=3).train_dataloader())
    state = torch.get_rng_state()
    worked = rows(made(corpus, steps_per_epoch=3, num_workers=2).train_dataloader())
    assert plain.equal(worked)
    assert torch.get_rng_state().equal(state)  # the run's own randomness is left alone


def test_an_epoch_covers_the_text_about_once(corpus):
    assert len(made(corpus).train_dataloader()) == 1400 // 80
    assert len(made(corpus, length=1000, val_fraction=0, test_fraction=0).train_dataloader()) == 1


def test_ranks_draw_other_windows(corpus, monkeypatch):
    one = made(corpus, steps_per_epoch=4).train_dataloader()
    shares = []
    for rank in range(2):
        monkeypatch.setattr("fulgurite.sampling.rank_and_world", lambda rank=rank: (rank, 2))
        sampler = DrawSampler(8)
        sampler.set_epoch(1)
        assert len(sampler) == len(list(sampler)) == 8
        shares.append(list(sampler))
    assert sorted(shares[0] + shares[1]) == list(range(16, 32))
    assert list(one.sampler) == list(range(16))


# --- documents


def test_documents_begin_where_files_begin(corpus, text_bytes):
    data = made(corpus, length=50, batch_size=1, documents=True, steps_per_epoch=300)
    borders = {0, 700, 1200}
    border_ends = set()
    for batch in data.train_dataloader():
        tokens, targets, documents = batch["tokens"], batch["targets"], batch["documents"]
        assert tokens.shape == targets.shape == (1, 50)
        begin = text_bytes.index(bytes(tokens[0].tolist()))
        inside = sorted({0} | {border - begin for border in borders if 0 < border - begin < 50})
        assert documents == tuple(inside)
        assert all(type(first) is int for first in documents)
        for i, target in enumerate(targets[0].tolist()):
            position = begin + i + 1
            assert target == (IGNORED if position in borders else text_bytes[position])
            if position in borders:
                border_ends.add(i == 49)
    assert len(made(corpus).train_dataloader().dataset[0]) == 2


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(lambda s: sum(s) > 1),
    draws=st.data(),
)
def test_documents_of_any_window(tmp_path_factory, sizes, draws):
    folder = tmp_path_factory.mktemp("any")
    files = []
    for number, size in enumerate(sizes):
        path = folder / str(number)
        path.write_bytes(bytes([number]) * size)
        files.append((path.name, path))
    text_ = cached_text(files)
    begin = draws.draw(st.integers(0, len(text_) - 2))
    length = draws.draw(st.integers(1, len(text_) - 1 - begin))
    item = text.cut_window(text_, begin, length, documents=True)
    owner = np.repeat(np.arange(len(sizes)), sizes)[begin : begin + length + 1]
    changes = np.flatnonzero(np.diff(owner)) + 1
    assert item["tokens"].tolist() == owner[:-1].tolist()
    expected = owner[1:].copy()
    expected[changes - 1] = IGNORED
    assert item["targets"].tolist() == expected.tolist()
    assert item["documents"] == (0, *(change for change in changes.tolist() if change < length))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**12), st.floats(0, 0.5), st.floats(0, 0.49))
def test_split_ranges_cover_all_once(total, val, test):
    parts = split_ranges(total, val, test)
    assert parts[0].start == 0
    assert parts[2].stop == total
    assert parts[0].stop == parts[1].start
    assert parts[1].stop == parts[2].start
    assert all(part.start <= part.stop for part in parts)


# --- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 0}, r"--data\.init_args\.length"),
        ({"batch_size": 0}, "batch_size"),
        ({"num_workers": -1}, "num_workers"),
        ({"seed": -1}, "seed"),
        ({"steps_per_epoch": 0}, "steps_per_epoch"),
        ({"val_sequences": 0}, "val_sequences"),
        ({"val_fraction": -0.1}, "val_fraction"),
        ({"test_fraction": float("nan")}, "test_fraction"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "below 1 together"),
        ({"documents": True}, r"batch_size=1"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ConfigError, match=message):
        text_module(**arguments)


def test_too_little_text_is_named(corpus):
    with pytest.raises(
        DataError,
        match=r"validation has 200 bytes, .*200 tokens needs 201 .*1,400 \+ 200 \+ 400 for",
    ):
        made(corpus, length=200)
    assert len(made(corpus, length=199).val_dataloader()) == 1
    assert made(corpus, length=200, val_fraction=0).val_dataloader() == []
    assert made(corpus, test_fraction=0).test_dataloader() == []
    with pytest.raises(DataError, match="training has 2,000 bytes"):
        made(corpus, length=2000, val_fraction=0, test_fraction=0)
    with pytest.raises(DataError, match=r"All 1 files of text are empty.*empty\.txt"):
        text_module(paths=str(corpus / "empty.txt")).prepare_data()


# --- needles


@settings(max_examples=100, deadline=None)
@given(
    needles=st.integers(1, 6),
    spare=st.integers(0, 20),
    more_keys=st.integers(0, 4),
    seed=st.integers(0, 2**32),
    next_token=st.booleans(),
)
def test_the_answer_is_at_its_place(needles, spare, more_keys, seed, next_token):
    length = 3 * needles + 2 + spare
    options = NeedleOptions(needles + more_keys, 5, 7, needles, next_token)
    task = NeedleTask(length, options)
    tokens, targets, depth = task.make(np.random.default_rng(seed))
    assert tokens.shape == targets.shape == (length,)
    assert tokens.dtype == targets.dtype == torch.int64
    assert tokens.min() >= 0
    assert tokens.max() < task.vocab_size
    marks = (tokens == MARK).nonzero()[:, 0]
    keys, values = tokens[marks + 1], tokens[marks + 2]
    assert len(marks) == len(keys.unique()) == needles
    assert ((keys >= 2) & (keys < 2 + options.keys)).all()
    assert ((values >= 2 + options.keys) & (values < 7 + options.keys)).all()
    hay = torch.ones(length, dtype=torch.bool)
    for offset in range(3):
        hay[marks + offset] = False
    hay[-2:] = False
    assert hay.sum() == spare
    assert (tokens[hay] >= 7 + options.keys).all()
    assert (tokens == QUERY).nonzero().tolist() == [[length - 2]]
    (query,) = (keys == tokens[-1]).nonzero()[0].tolist()
    assert targets[-1] == values[query]
    if next_token:
        assert targets[:-1].equal(tokens[1:])
    else:
        assert (targets[:-1] == IGNORED).all()
    assert 0 <= depth <= 1
    assert depth.dtype == torch.float32
    if length > 5:
        assert float(depth) == pytest.approx(int(marks[query]) / (length - 5))


def test_needles_lie_anywhere_equally_often():
    generator = np.random.default_rng(0)
    placements = [tuple(place_needles(8, 2, generator).tolist()) for _ in range(6000)]
    expected = [(0, 3), (0, 4), (0, 5), (1, 4), (1, 5), (2, 5)]
    counts = [placements.count(places) for places in expected]
    assert sum(counts) == 6000
    assert max(abs(count - 1000) for count in counts) < 5 * 29  # five standard deviations


def test_needle_batches_repeat_and_splits_differ():
    def data(**arguments):
        return needle_module(
            **{"length": 30, "train_size": 10, "val_size": 6, "test_size": 5, "batch_size": 4}
            | {"needles": 3}
            | arguments
        )

    first, again = data(), data()
    train = rows(first.train_dataloader())
    assert train.shape == (10, 30)
    assert rows(again.train_dataloader()).equal(train)
    worked = data(num_workers=2)
    assert rows(worked.train_dataloader()).equal(train)
    loader = first.train_dataloader()
    loader.sampler.set_epoch(1)
    other = rows(loader)
    assert not other.equal(train)
    assert sorted(other.tolist()) == sorted(train.tolist())
    val, test = rows(first.val_dataloader()), rows(first.test_dataloader())
    assert (len(val), len(test)) == (6, 5)
    assert len({tuple(row) for row in [*train.tolist(), *val.tolist(), *test.tolist()]}) == 21
    assert rows(first.predict_dataloader()).equal(test)
    assert not rows(data(seed=1).test_dataloader()).equal(test)
    assert rows(data(test_size=7).test_dataloader())[:5].equal(test)  # by number alone
    batch = next(iter(first.test_dataloader()))
    assert batch["depth"].shape == (4,)
    assert batch["depth"].dtype == torch.float32
    assert first.vocab_size == 2 + 16 + 16 + 64
    assert data(val_size=0).val_dataloader() == data(test_size=0).test_dataloader() == []


def test_a_million_tokens_are_made_quickly():
    task = NeedleTask(1_000_000, NeedleOptions(keys=1000, needles=1000))
    start = time.perf_counter()
    tokens, _, _ = task.make(np.random.default_rng(0))
    assert time.perf_counter() - start < 2
    assert int((tokens == MARK).sum()) == 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 4}, r"need 5 tokens .* length of 4.*init_args\.length` to 5"),
        ({"length": 30, "needles": 10}, "need 32 tokens"),
        ({"needles": 17}, r"16 keys.*keys` to 17"),
        ({"keys": 0}, "keys"),
        ({"values": 0}, "values"),
        ({"filler": 0}, "filler"),
        ({"needles": 0}, "needles"),
        ({"length": 0}, "length"),
        ({"train_size": 0}, "sizes.train"),
        ({"val_size": -1}, "sizes.val"),
        ({"batch_size": 0}, "batch_size"),
        ({"seed": -1}, "seed"),
    ],
)
def test_needles_that_do_not_fit(arguments, message):
    with pytest.raises(ConfigError, match=message):
        needle_module(**arguments)


# --- in a run


class Bigrams(L.LightningModule):
    """Remembers what it was given."""

    def __init__(self, vocab_size):
        super().__init__()
        self.table = torch.nn.Embedding(vocab_size, vocab_size)
        self.seen = []

    def training_step(self, batch):
        self.seen.append(batch["tokens"].clone())
        logits = self.table(batch["tokens"]).flatten(0, 1)
        return F.cross_entropy(logits, batch["targets"].flatten(), ignore_index=IGNORED)

    def validation_step(self, batch):
        return batch["targets"][:, -1]

    test_step = predict_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("kind", ["text", "documents", "needles"])
def test_lightning_trains_on_them(corpus, tmp_path, kind):
    if kind == "needles":
        data = needle_module(length=20, train_size=4, val_size=3, test_size=3, batch_size=2)
    else:
        more = {"documents": True, "batch_size": 1} if kind == "documents" else {}
        data = made(corpus, steps_per_epoch=2, **more)
    model = Bigrams(data.vocab_size)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        log_every_n_steps=1,
    )
    trainer.fit(model, data)
    trainer.test(model, data, verbose=False)
    trainer.predict(model, data)
    assert len(model.seen) == 4
    assert not torch.stack(model.seen[:2]).equal(torch.stack(model.seen[2:]))  # epochs differ
    (path,) = Path(tmp_path, "checkpoints").glob("*.ckpt")
    saved = torch.load(path, weights_only=True)["datamodule_hyper_parameters"]
    assert type(data)(**{k: v for k, v in saved.items() if k != "_instantiator"}).length == 20


@pytest.mark.parametrize(
    ("argument", "paths"),
    [
        ("null", ["stdlib"]),
        ("stdlib", ["stdlib"]),
        ("/a/*.txt", ["/a/*.txt"]),
        ("[b, c]", ["b", "c"]),
    ],
)
def test_paths_on_the_command_line(argument, paths):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    name = f"{ByteTextDataModule.__module__}.ByteTextDataModule"
    options = [
        f"--data={name}",
        f"--data.init_args.text.paths={argument}",
        "--data.init_args.length=7",
    ]
    data = parser.instantiate(parser.parse_args(prepare_arguments(options))).data
    assert data.text_options.all_paths == paths
    assert data.length == 7
    assert data.text_options.suffixes == [".txt", ".md", ".rst", ".py"]


# --- restarts


@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize("kind", ["text", "needles"])
def test_a_resumed_run_sees_the_batches_of_an_uninterrupted_one(corpus, tmp_path, kind, steps):
    class Model(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.seen = []

        def training_step(self, batch, _):
            self.seen.append((self.current_epoch, batch["tokens"].sum(1).tolist()))
            return self.weight * batch["tokens"].float().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    def fit(path=None):
        model = Model()
        data = (
            made(corpus, steps_per_epoch=3)
            if kind == "text"
            else needle_module(length=64, train_size=12, batch_size=4, val_size=0)
        )
        saved = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = L.Trainer(
            max_epochs=3, logger=False, enable_progress_bar=False, enable_model_summary=False,
            accelerator="cpu", callbacks=[] if path else [saved], limit_val_batches=0,
            enable_checkpointing=path is None, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(model, data, ckpt_path=path)
        return model.seen

    uninterrupted = fit()
    assert len({str(sums) for _, sums in uninterrupted}) == 9  # no batch comes twice
    assert fit(tmp_path / "saved" / f"step={steps}.ckpt") == uninterrupted[steps:]
