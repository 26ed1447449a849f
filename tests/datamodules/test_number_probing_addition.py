"""Addition: the sums are right, the parts are apart, and draws depend on their number only."""

import itertools

import numpy as np
import pytest
import torch
from fakes.options import group
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, Trainer

from fulgurite.datamodules.number_probing import AdditionDataModule, AdditionOptions, PairSplit
from fulgurite.datamodules.number_probing.addition import AdditionTask, PairList, PairStream
from fulgurite.datamodules.number_probing.draws import draw_below, hash_integers
from fulgurite.errors import ConfigError, DataError
from fulgurite.sampling import DrawSampler

tasks = st.builds(
    AdditionTask,
    base=st.sampled_from([2, 7, 10, 1000]),
    tokens=st.integers(1, 4),
    order=st.sampled_from(["msb", "lsb"]),
    carry=st.booleans(),
    overflow=st.just("wrap"),
)


PARTS = ("train", "val", "test")


def listed(data):
    """The pairs of a list."""
    return [*zip(data.a.tolist(), data.b.tolist(), strict=True)]


def values(task, digits):
    """Numbers from digits in the order of the task. Shape: (I, K) to (I,)."""
    digits = digits if task.order == "lsb" else digits.flip(1)
    return (digits * task.base ** torch.arange(task.tokens)).sum(1)


def parts(task, batch):
    """Operands and answer of sequences, as digits."""
    k = task.tokens
    sequences = torch.cat([batch["tokens"], batch["targets"][:, -1:]], 1)
    assert (sequences[:, k] == task.base).all()
    assert (sequences[:, 2 * k + 1] == task.base + 1).all()
    return sequences[:, :k], sequences[:, k + 1 : 2 * k + 1], sequences[:, 2 * k + 2 :]


# --- sums ----------------------------------------------------------------------------------------


@given(task=tasks, seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_each_digit_of_the_answer(task, seed):
    """c_i = (a_i + b_i + carry) mod base, the carry from the digit below."""
    batch = PairStream(task, "train", seed, 9).__getitems__([*range(9)])
    a, b, c = parts(task, batch)
    lowest_first = range(task.tokens) if task.order == "lsb" else reversed(range(task.tokens))
    carry = torch.zeros(9, dtype=torch.int64)
    for i in lowest_first:
        total = a[:, i] + b[:, i] + carry
        assert torch.equal(c[:, i], total % task.base)
        carry = total // task.base if task.carry else carry
    assert torch.equal(values(task, a) < task.size, torch.ones(9, dtype=torch.bool))


def test_only_the_answer_has_targets():
    task = AdditionTask(base=10, tokens=3)
    batch = task.encode(np.array([123]), np.array([989]))
    assert batch["tokens"].tolist() == [[1, 2, 3, 10, 9, 8, 9, 11, 1, 1]]
    assert batch["targets"].tolist() == [[-100] * 7 + [1, 1, 2]]
    assert batch["tokens"].shape[1] == task.sequence_length


def test_one_token_has_only_sums_below_the_base():
    task = AdditionTask(base=30, tokens=1)
    pairs = sorted(pair for part in PARTS for pair in listed(PairList(task, part, None)))
    assert pairs == [(a, b) for a, b in itertools.product(range(30), repeat=2) if a + b < 30]


def test_bounded_pairs_of_several_tokens_have_such_sums():
    task = AdditionTask(base=10, tokens=4, overflow="bound")
    a, b = PairStream(task, "train", 0, 0).pairs([*range(2000)])
    assert (a + b < task.size).all()
    assert 0.45 < (a < b).mean() < 0.55
    assert (a + b > task.size * 0.7).mean() == pytest.approx(1 - 0.49, abs=0.05)  # of a triangle


# --- parts ---------------------------------------------------------------------------------------


def test_the_share_for_training():
    task = AdditionTask(base=200, tokens=1, mirrored=False)
    sizes = np.array([len(PairList(task, part, None)) for part in PARTS])
    assert sizes.sum() == 200 * 201 // 2
    assert sizes / sizes.sum() == pytest.approx([0.6, 0.2, 0.2], abs=0.01)


@settings(max_examples=40, deadline=None)
@given(
    base=st.integers(2, 60),
    tokens=st.integers(1, 2),
    fraction=st.floats(0.05, 0.95),
    mirrored=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_pair_is_in_one_part(base, tokens, fraction, mirrored, seed):
    task = AdditionTask(
        base, tokens, overflow="wrap", train_fraction=fraction, mirrored=mirrored, seed=seed
    )
    a, b = draw_below(task.size, 1, np.arange(400)), draw_below(task.size, 2, np.arange(400))
    membership = np.stack([task.is_in_part(part, a, b) for part in PARTS])
    assert (membership.sum(0) == 1).all()
    assert np.array_equal(membership[0], task.is_training(a, b))
    if mirrored:
        turned = np.stack([task.is_in_part(part, b, a) for part in PARTS])
        assert np.array_equal(membership, turned)


@pytest.mark.parametrize("options", [
    {"base": 100}, {"base": 10, "tokens": 2}, {"base": 50, "tokens": 2}, {"base": 1000},
])  # fmt: skip
def test_what_is_validated_is_not_tested(options):
    """Lists and streams, as the loaders give them; as a + b or as b + a."""
    data = module(**options, batch_size=512, val_size=2048, test_size=8192)
    pairs = []
    for loader in (data.val_dataloader(), data.test_dataloader()):
        tokens = torch.cat([batch["tokens"] for batch in loader])
        a, b, _ = parts(data.task, {"tokens": tokens, "targets": tokens})
        a, b = values(data.task, a), values(data.task, b)
        assert not data.task.is_training(a.numpy(), b.numpy()).any()
        pairs.append({*zip(*torch.sort(torch.stack([a, b]), 0).values.tolist(), strict=True)})
    val, test = pairs
    assert len(val) > 100
    assert len(test) > 100
    assert not val & test


@pytest.mark.parametrize("mirrored", [True, False])
def test_mirrored_pairs(mirrored):
    task = AdditionTask(base=50, tokens=2, mirrored=mirrored)
    a, b = draw_below(2500, 1, np.arange(500)), draw_below(2500, 2, np.arange(500))
    same = task.is_training(a, b) == task.is_training(b, a)
    assert same.all() == mirrored


def test_streams_keep_to_their_part():
    task = AdditionTask(base=100, tokens=2)
    for part in PARTS:
        a, b = PairStream(task, part, 5, 0).pairs([*range(3000)])
        assert task.is_in_part(part, a, b).all()
        assert len({*zip(a.tolist(), b.tolist(), strict=True)}) > 2990
        counts = np.bincount(a // 1000, minlength=10)
        assert counts.min() > 230  # 300 expected, sd 16


def test_other_seeds_split_otherwise():
    a, b = draw_below(100, 1, np.arange(500)), draw_below(100, 2, np.arange(500))
    splits = [AdditionTask(base=100, tokens=1, seed=seed).is_training(a, b) for seed in (0, 1)]
    assert 0.3 < (splits[0] == splits[1]).mean() < 0.7


# --- draws ---------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=20))
@settings(max_examples=30, deadline=None)
def test_a_draw_depends_on_its_number_only(numbers):
    task = AdditionTask(base=10, tokens=1)
    for data in (PairList(task, "train", 3), PairStream(AdditionTask(), "train", 3, 0)):
        together = data.__getitems__(numbers)
        for row, number in enumerate(numbers):
            alone = data[number]
            assert torch.equal(alone["tokens"], together["tokens"][row])
            assert torch.equal(alone["targets"], together["targets"][row])


def test_each_pass_has_all_pairs_in_an_order_of_its_own():
    data = PairList(AdditionTask(base=20, tokens=1), "train", 0)
    size = len(data)
    passes = [data.rows([*range(i * size, (i + 1) * size)]) for i in range(3)]
    for places in passes:
        assert sorted(places.tolist()) == [*range(size)]
    assert not np.array_equal(passes[0], passes[1])
    mixed = data.rows([size - 1, size, size - 1])  # across passes, in any order
    assert mixed.tolist() == [passes[0][-1], passes[1][0], passes[0][-1]]


def test_hashes_are_even_and_apart():
    numbers = np.arange(20_000)
    counts = np.bincount(draw_below(100, 3, numbers), minlength=100)
    chi2 = ((counts - 200) ** 2 / 200).sum()
    assert 50 < chi2 < 160  # 99 degrees of freedom, sd 14
    assert len(np.unique(hash_integers(3, numbers))) == len(numbers)
    draws = draw_below(1000, 3, numbers), draw_below(1000, 3, numbers + 1)
    assert abs(np.corrcoef(*draws)[0, 1]) < 0.03
    assert not np.array_equal(hash_integers(3, numbers), hash_integers(numbers, 3))


# --- DataModule ----------------------------------------------------------------------------------


def addition(options):
    return AdditionDataModule(**group(options, task=AdditionOptions, split=PairSplit))


def module(**options):
    small = {"base": 10, "tokens": 1, "batch_size": 4, "steps_per_epoch": 3, "val_size": 8}
    data = addition({**small, **options})
    data.setup()
    return data


@pytest.mark.parametrize("tokens", [1, 3])
def test_batches(tokens):
    data = module(tokens=tokens, test_size=0)
    assert data.vocab_size == 12
    assert data.number_ids == {n: n for n in range(10)}
    batches = [*data.train_dataloader()]
    assert len(batches) == 3
    for batch in batches:
        assert batch["tokens"].shape == batch["targets"].shape == (4, data.sequence_length)
        assert batch["tokens"].dtype == batch["targets"].dtype == torch.int64
    assert sum(len(batch["tokens"]) for batch in data.val_dataloader()) == 8
    assert data.test_dataloader() == []


def test_ranks_never_repeat_a_draw():
    drawn = []
    for rank, epoch in itertools.product(range(3), range(2)):
        sampler = DrawSampler(4, (rank, 3))
        sampler.set_epoch(epoch)
        drawn += [*sampler]
    assert sorted(drawn) == [*range(24)]


class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["tokens"].clone())
        return self.weight * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Save(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 5:
            trainer.save_checkpoint("part.ckpt")


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_resumed_run_sees_what_an_uninterrupted_one_does(workdir, tokens):
    runs = []
    for path, callbacks in ((None, [Save()]), ("part.ckpt", [])):
        recorder = Recorder()
        trainer = Trainer(
            accelerator="cpu", devices=1, max_epochs=3, logger=False, callbacks=callbacks,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        )  # fmt: skip
        data = module(tokens=tokens)
        trainer.fit(recorder, datamodule=data, ckpt_path=path, weights_only=True)
        runs.append(torch.stack(recorder.seen))
    uninterrupted, resumed = runs
    assert len(uninterrupted) == 9
    assert torch.equal(resumed, uninterrupted[5:])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"base": 1}, "base"),
        ({"tokens": 0}, "tokens"),
        ({"base": 1000, "tokens": 7}, "tokens"),
        ({"train_fraction": 1.0}, "train_fraction"),
        ({"order": "middle"}, "order"),
        ({"overflow": "none"}, "overflow"),
        ({"carry": False, "tokens": 1}, "overflow=wrap"),
        ({"batch_size": 0}, "batch_size"),
        ({"seed": -1}, "seed"),
    ],
)
def test_wrong_options_name_their_key(options, named):
    with pytest.raises(ConfigError, match=named):
        addition(options)


@pytest.mark.parametrize(
    ("fraction", "part"), [(0.01, "training"), (0.99, "validation"), (0.99, "test")]
)
def test_a_part_without_pairs(fraction, part):
    with pytest.raises(DataError, match=f"none is for {part}.*train_fraction"):
        module(base=2, train_fraction=fraction, val_size=8 * (part != "test"))
    if part == "test":  # what is not asked for may be empty
        assert module(base=2, train_fraction=0.99, val_size=0, test_size=0).test_dataloader() == []


def test_the_training_pairs_are_those_that_they_always_were():
    few, many = (PairList(AdditionTask(base=12, tokens=1), "train", 0), AdditionTask())
    assert listed(few)[:6] == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (0, 6)]
    drawn = PairStream(many, "train", 0, 0).pairs([*range(4)])
    assert [x.tolist() for x in drawn] == [[5949, 8197, 6288, 2036], [1409, 6917, 1436, 8558]]
