"""Counting and skip-gram: equality with plain loops, and embeddings that know what text knows."""

from functools import partial

import numpy as np
import pytest
import torch
from fakes.trainers import quiet_trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningDataModule
from lightning.pytorch.loggers import CSVLogger
from scipy.sparse import csr_matrix
from torch.utils.data import DataLoader

from fulgurite.errors import ConfigError, DataError
from fulgurite.models.number_probing.classical.counting import (
    cooccurrences,
    ppmi,
    save_vectors,
    svd_embeddings,
)
from fulgurite.models.number_probing.classical.module import PPMI, SkipGram


class Parity(LightningDataModule):
    """Numbers 0 … 59 stand beside one of five even or five odd words; tokens 60 … 69."""

    vocab_size = 70

    def __init__(self, batches=20, isolated=False):
        super().__init__()
        rng = np.random.default_rng(0)
        numbers = rng.integers(60, size=(batches, 8, 10))
        words = 60 + numbers % 2 * 5 + rng.integers(5, size=numbers.shape)
        self.tokens = torch.from_numpy(np.stack([words, numbers], -1).reshape(batches, 8, 20))
        self.number_ids = {n: n for n in range(60)}
        self.token_counts = torch.bincount(self.tokens.flatten(), minlength=70)
        self.pieces = (torch.arange(20) // 2).expand(8, 20) if isolated else None

    def train_dataloader(self):
        extra = {} if self.pieces is None else {"documents": self.pieces}
        return DataLoader([{"tokens": x, **extra} for x in self.tokens], batch_size=None)


def trainer(folder, **options):
    logger = CSVLogger(folder, name="", version="run")
    return quiet_trainer(logger=logger, **{"max_epochs": 1, **options})


def parity_gap(embeddings):
    """Cosine of numbers of the same parity minus that of others."""
    x = torch.nn.functional.normalize(embeddings.double() - embeddings.double().mean(0), dim=1)
    cosine, parity = x @ x.T, torch.arange(len(x)) % 2
    same = parity[:, None] == parity
    return float(cosine[same].mean() - cosine[~same].mean())


# --- counting ------------------------------------------------------------------------------------


@given(st.integers(0, 99), st.integers(1, 6), st.booleans())
@settings(max_examples=40, deadline=None)
def test_pairs_equal_a_loop(seed, window, packed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, size=(2, 7))
    documents = rng.integers(2, size=(2, 7)).cumsum(1) if packed else np.zeros((2, 7), int)
    expected = np.zeros((5, 5))
    for row, ids in zip(tokens, documents, strict=True):
        for i in range(7):
            for j in range(7):
                if i != j and abs(i - j) <= window and ids[i] == ids[j]:
                    expected[row[i], row[j]] += 1
    counts = cooccurrences(tokens, 5, window, documents if packed else None)
    assert np.array_equal(counts.toarray(), expected)


def test_information_of_independent_tokens_is_none():
    rows, columns = np.array([1.0, 2.0, 3.0]), np.array([4.0, 1.0])
    counts = csr_matrix(np.outer(rows, columns))
    np.testing.assert_allclose(ppmi(counts, smoothing=1.0).toarray(), 0, atol=1e-12)
    scaled = ppmi(csr_matrix(np.array([[5.0, 1.0], [2.0, 7.0]])))
    again = ppmi(csr_matrix(np.array([[50.0, 10.0], [20.0, 70.0]])))
    np.testing.assert_allclose(scaled.toarray(), again.toarray())


def test_information_equals_its_definition():
    counts = np.array([[5.0, 1.0, 0.0], [2.0, 7.0, 3.0]])
    joint = counts / counts.sum()
    context = counts.sum(0) ** 0.75 / (counts.sum(0) ** 0.75).sum()
    with np.errstate(divide="ignore"):
        information = np.log(joint / joint.sum(1, keepdims=True) / context)
    computed = ppmi(csr_matrix(counts)).toarray()
    np.testing.assert_allclose(computed, np.maximum(information, 0))


def test_directions_keep_products():
    table = np.random.default_rng(0).random((12, 9)) @ np.random.default_rng(1).random((9, 20))
    embeddings = svd_embeddings(csr_matrix(table), 9, power=1.0)
    np.testing.assert_allclose(embeddings @ embeddings.T, table @ table.T, rtol=1e-9)
    assert np.array_equal(embeddings, svd_embeddings(csr_matrix(table), 9, power=1.0))
    for width, matrix in ((12, table), (0, table), (3, 0 * table)):
        with pytest.raises(ConfigError, match="width"):
            svd_embeddings(csr_matrix(matrix), width)


@pytest.mark.parametrize("all_rows", [False, True])
def test_ppmi_finds_parity(tmp_path, all_rows):
    data, model = Parity(isolated=True), PPMI(2, window=2, all_rows=all_rows, vocab_size=70)
    assert not model.counts.nnz
    trainer(tmp_path).fit(model, datamodule=data)
    tokens = data.tokens.flatten(0, 1).numpy()
    expected = cooccurrences(tokens, 70, 2, np.tile(data.pieces.numpy(), (20, 1)))
    assert (model.counts != expected).nnz == 0
    assert parity_gap(model.number_embeddings(range(60))) > 0.9
    with pytest.raises(DataError, match="60"):
        model.number_embeddings([60])
    lines = (tmp_path / "run" / "numbers.txt").read_text().splitlines()
    assert lines[0] == "60 2"
    read = torch.tensor([[float(x) for x in line.split()[1:]] for line in lines[1:]])
    torch.testing.assert_close(read, model.number_embeddings(range(60)).float())


def test_before_any_text_rows_know_nothing_and_differ():
    model = PPMI(4, vocab_size=70)
    model.number_ids = {n: n for n in range(60)}
    rows = model.number_embeddings(range(60))
    assert torch.equal(rows[5:7], model.number_embeddings([5, 6]))
    assert len(rows.unique(dim=0)) == 60
    assert abs(parity_gap(rows)) < 0.1


def test_counts_survive_a_checkpoint(tmp_path):
    model = PPMI(2, vocab_size=70)
    run = trainer(tmp_path)
    run.fit(model, datamodule=Parity())
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = PPMI.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert torch.equal(again.number_embeddings(range(60)), model.number_embeddings(range(60)))


# --- skip-gram -----------------------------------------------------------------------------------


def skipgram(**options):
    torch.manual_seed(0)
    optimizer = partial(torch.optim.Adam, lr=0.02)
    return SkipGram(
        **{"width": 8, "window": 1, "subsample": 0.0, "vocab_size": 70, **options},
        optimizer=optimizer,
    )


def test_skipgram_finds_parity(tmp_path):
    model = skipgram()
    assert abs(parity_gap(model.embedding.weight[:60].detach())) < 0.1
    trainer(tmp_path, max_epochs=15).fit(model, datamodule=Parity(isolated=True))
    assert parity_gap(model.number_embeddings(range(60)).detach()) > 0.5


def test_the_loss_equals_a_loop():
    model = skipgram(window=3, negatives=2)
    torch.nn.init.normal_(model.embedding.weight)
    torch.nn.init.normal_(model.contexts.weight)
    data = Parity(batches=1)
    tokens = data.tokens[0][:2, :6]
    documents = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
    model.log = lambda *_, **__: None
    model.set_token_counts(torch.eye(70)[7])  # the only random token is 7
    expected = weight_sum = 0.0
    center, context = model.embedding.weight, model.contexts.weight
    for row, ids in zip(tokens.tolist(), documents.tolist(), strict=True):
        for i, j in np.ndindex(6, 6):
            if i != j and abs(i - j) <= 3 and ids[i] == ids[j]:
                weight = 1 - (abs(i - j) - 1) / 3
                a = center[row[i]]
                pair_loss = -torch.nn.functional.logsigmoid(a @ context[row[j]])
                pair_loss = pair_loss - 2 * torch.nn.functional.logsigmoid(-(a @ context[7]))
                expected, weight_sum = expected + weight * pair_loss, weight_sum + weight
    loss = model.training_step({"tokens": tokens, "documents": documents}, 0)
    torch.testing.assert_close(loss, expected / weight_sum)


def test_frequent_tokens_are_left_out(tmp_path):
    model = skipgram(subsample=0.02)
    trainer(tmp_path).fit(model, datamodule=Parity())
    assert (
        model.keep_probability[60:] < model.keep_probability[:60].min()
    ).all()  # words occur six times as often
    assert model.keep_probability.max() <= 1


def test_a_step_draws_the_same_again(tmp_path):
    weights = []
    for _ in range(2):
        model = skipgram()
        trainer(tmp_path).fit(model, datamodule=Parity(batches=3))
        torch.rand(1)
        weights.append(model.embedding.weight)
    assert torch.equal(*weights)


def test_skipgram_needs_counts(tmp_path):
    data = Parity()
    data.token_counts = None
    with pytest.raises(DataError, match="NumberTextDataModule"):
        trainer(tmp_path).fit(skipgram(), datamodule=data)


def test_wrong_options_name_their_key():
    for make, named in (
        (lambda: PPMI(width=0), "width"),
        (lambda: PPMI(contexts=0), "contexts"),
        (lambda: skipgram(negatives=0), "negatives"),
        (lambda: skipgram(vocab_size=1), "vocab_size"),
    ):
        with pytest.raises(ConfigError, match=named):
            make()


def test_vectors_are_written_whole(tmp_path):
    embeddings = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    file = save_vectors(tmp_path / "a" / "numbers.txt", [1, 2, 3], embeddings)
    rows = [line.split() for line in file.read_text().splitlines()[1:]]
    assert [int(row[0]) for row in rows] == [1, 2, 3]
    read = torch.tensor([[float(x) for x in row[1:]] for row in rows])
    assert torch.equal(read, embeddings)
