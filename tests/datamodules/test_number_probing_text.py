"""Text with numbers: tokens, the cache, windows, and what perturbations keep and take away."""

import codecs
import gzip
import json
import multiprocessing
import os
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes.options import group
from hypothesis import given, settings
from hypothesis import strategies as st

from fulgurite.data.listing import find_files
from fulgurite.data.text import read_documents
from fulgurite.data.text_options import TextSplit
from fulgurite.datamodules.number_probing import (
    DigitTokenizer,
    NumberTextDataModule,
    NumberTextOptions,
    TokenizerOptions,
    WordTokenizer,
)
from fulgurite.datamodules.number_probing import corpus as corpora
from fulgurite.datamodules.number_probing.corpus import cached_tokens
from fulgurite.datamodules.number_probing.perturbations import (
    block_ids,
    context_starts,
    isolate_starts,
    parse_perturbations,
    replacement,
)
from fulgurite.datamodules.number_probing.tokenizers import FileTokenizer, number_of, number_tokens
from fulgurite.errors import ConfigError, DataError

VOCABULARY = 1100


def files_in(folder, suffix=".txt"):
    return [path for _, path in find_files([str(folder)], [suffix])]


def write_corpus(folder, documents=40, seed=0):
    """Sentences in which numbers follow words and each other."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(documents):
        lines = []
        for _ in range(30):
            n = int(rng.integers(900))
            lines.append(f"the {'even' if n % 2 == 0 else 'odd'} number {n} comes before {n + 1} .")
        (folder / f"{i:03}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture
def corpus(workdir):
    return write_corpus(workdir / "corpus")


def text_module(options):
    records = {"text": NumberTextOptions, "tokenizer": TokenizerOptions, "split": TextSplit}
    return NumberTextDataModule(**group(options, **records))


def module(corpus, **options):
    options = {
        "paths": str(corpus), "vocab_size": VOCABULARY, "length": 32, "batch_size": 4, **options
    }  # fmt: skip
    data = text_module(options)
    data.prepare_data()
    data.setup()
    return data


def numbers_in(data, tokens):
    """The numbers among tokens, in order."""
    number_of = data.tokenizer.numbers
    return [number_of[t] for t in np.asarray(tokens).tolist() if t in number_of]


def part_text(data, split="train"):
    windows = getattr(data, f"{split}_dataloader")().dataset
    return windows.text(windows.part.start, len(windows.part))


# --- tokens --------------------------------------------------------------------------------------


@given(st.integers(0, 10_000))
def test_each_small_number_is_one_token(n):
    tokenizer = WordTokenizer(VOCABULARY)
    (tokens,) = tokenizer.encode([f"({n})"])
    assert len(tokens) == 3
    expected = n if n < 1000 else None
    assert tokenizer.numbers.get(tokens[1]) == expected
    assert number_of(str(n)) == expected
    assert number_of(f"0{n}") is None


def test_frequent_words_have_tokens():
    tokenizer = WordTokenizer(1006)
    tokenizer.learn(["b b b, a a c c c d", "007 is 1234, not 12 34"])
    assert tokenizer.state() == {"words": ["b", "c", ","]}  # at equal counts by the alphabet
    long, unknown = tokenizer.special["<number>"], tokenizer.special["<unknown>"]
    (tokens,) = tokenizer.encode(["B 007 1234 999 word 0"])
    three = len(tokenizer.special)
    assert tokens == [three + 1000, long, long, three + 999, unknown, three]
    again = WordTokenizer(1006)
    again.restore(json.loads(json.dumps(tokenizer.state())))
    assert again.encode(["c b 5"]) == tokenizer.encode(["c b 5"])


@given(st.integers(0, 100_000))
def test_each_digit_is_one_token(n):
    tokenizer = DigitTokenizer(20)
    (tokens,) = tokenizer.encode([f"({n})"])
    assert [tokenizer.numbers.get(token) for token in tokens] == [None, *map(int, str(n)), None]


def test_tokenizers_of_numbers_and_of_digits_see_the_same_words(corpus):
    """One corpus, two ways to write its numbers; the caches are apart."""
    words, digits = (module(corpus, name=kind) for kind in ("words", "digits"))
    assert words.number_pieces[42] == (words.number_ids[42],)
    assert digits.number_pieces[42] == (digits.number_ids[4], digits.number_ids[2])
    assert [*digits.number_ids] == [*range(10)]
    assert {*words.tokenizer.state()["words"]} == {*digits.tokenizer.state()["words"]}
    text = [
        [data.tokenizer.numbers.get(token) for token in data.cache.tokens[:400].tolist()]
        for data in (words, digits)
    ]
    spelled = "".join(str(n) for n in text[0] if n is not None)
    assert spelled.startswith("".join(str(n) for n in text[1] if n is not None))


@pytest.fixture
def tokenizer_file(workdir):
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<unk>", "</s>", "word", *map(str, range(10)), *(f"▁{n}" for n in range(5, 12))]
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.save("tokenizer.json")
    return workdir / "tokenizer.json"


def test_a_tokenizer_file(tokenizer_file):
    tokenizer = FileTokenizer(str(tokenizer_file))
    assert tokenizer.encode(["word 7 other 11"]) == [[2, 15, 0, 19]]
    assert (tokenizer.end, tokenizer.vocab_size) == (1, 20)
    assert tokenizer.numbers[10] == tokenizer.numbers[15] == 7
    counts = np.ones(20, int)
    alone = number_tokens(tokenizer, counts)  # ten of them against seven
    assert alone == {n: n + 3 for n in range(10)}
    counts[13:] = 9
    spaced = number_tokens(tokenizer, counts)
    assert spaced == {n: n + 8 for n in range(5, 12)}
    del tokenizer.numbers[13]  # three digits alone, which occur within all numbers
    tokenizer.numbers = {token: n for token, n in tokenizer.numbers.items() if not 6 <= token < 13}
    counts[:13] = 100
    assert number_tokens(tokenizer, counts) == {n: n + 8 for n in range(6, 12)}


def test_numbers_that_a_tokenizer_file_never_gives_are_no_numbers_of_the_data(workdir):
    tokenizers = pytest.importorskip("tokenizers")
    words = {str(n): n for n in range(30)} | {"<unk>": 30}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save("whole.json")
    assert FileTokenizer("whole.json").numbers == {n: n for n in range(30)}
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    tokenizer.save("split.json")
    assert FileTokenizer("split.json").numbers == {n: n for n in range(10)}


def test_a_tokenizer_file_makes_the_data(corpus, tokenizer_file):
    data = module(corpus, name=str(tokenizer_file), perturb="unigram")
    assert data.vocab_size == 20
    assert next(iter(data.train_dataloader()))["tokens"].max() < 20


def test_no_tokenizer_file(workdir):
    (workdir / "tokenizer.json").write_text("{}")
    for path in ("none.json", "."):
        with pytest.raises(DataError):
            FileTokenizer(str(workdir / path))


# --- files ---------------------------------------------------------------------------------------


def test_parquet_is_read_as_text_is(workdir):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    texts = [f"document {i} of 600" for i in range(600)]  # several row groups
    table = pa.table({"id": [*range(600)], "text": texts})
    pq.write_table(table, "a.parquet", row_group_size=100)
    (file,) = files_in(workdir, ".parquet")
    assert [*corpora.read_documents([file])] == texts
    with pytest.raises(DataError, match="column 'body'"):
        [*corpora.read_documents([file], "body")]
    with pytest.raises(DataError, match="int64"):
        [*corpora.read_documents([file], "id")]
    (workdir / "b.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(DataError, match=r"b\.parquet"):
        [*corpora.read_documents([workdir / "b.parquet"])]


# --- the cache -----------------------------------------------------------------------------------


def test_the_cache_holds_the_text(corpus):
    files = files_in(corpus)
    tokenizer = WordTokenizer(VOCABULARY)
    cache = cached_tokens(files, tokenizer)
    documents = tokenizer.encode([file.read_text() for file in files])
    assert cache.tokens.tolist() == [t for document in documents for t in [*document, 1]]
    lengths = [len(document) + 1 for document in documents]
    assert cache.starts.tolist() == [0, *np.cumsum(lengths)[:-1].tolist()]
    numbers = [i for i, t in enumerate(cache.tokens.tolist()) if t in tokenizer.numbers]
    assert cache.positions.tolist() == numbers
    assert cache.counts.tolist() == np.bincount(cache.tokens, minlength=VOCABULARY).tolist()


def test_the_cache_is_written_once_per_content(corpus, monkeypatch):
    files = files_in(corpus)
    first = WordTokenizer(VOCABULARY)
    cache = cached_tokens(files, first)
    with monkeypatch.context() as patched:
        patched.setattr(corpora.np, "save", None)  # writing would fail
        again = WordTokenizer(VOCABULARY)
        assert cached_tokens(files, again).folder == cache.folder
        assert again.state() == first.state()
    assert cached_tokens(files, WordTokenizer(VOCABULARY + 1)).folder != cache.folder
    files[0].write_text("other")
    assert cached_tokens(files, WordTokenizer(VOCABULARY)).folder != cache.folder


def test_a_killed_writer_leaves_no_entry(corpus, own_cache, monkeypatch):
    files = files_in(corpus)

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(corpora.np, "save", die)
        with pytest.raises(KeyboardInterrupt):
            cached_tokens(files, WordTokenizer(VOCABULARY))
    assert [p.suffix for p in own_cache.iterdir()] == [".lock"]
    assert len(cached_tokens(files, WordTokenizer(VOCABULARY))) > 0


def _fill(folder):
    return str(cached_tokens(files_in(folder), WordTokenizer(VOCABULARY)).folder)


@pytest.mark.slow  # both import everything anew
def test_processes_write_it_together(corpus):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        folders = pool.map(_fill, [str(corpus)] * 4)
    assert len({*folders}) == 1


@pytest.mark.parametrize("change", [codecs.BOM_UTF8.__add__, lambda b: b.replace(b"\n", b"\r\n")])
def test_marks_and_ends_of_lines_of_other_systems_change_nothing(tmp_path, change):
    text = "Room 12 of 345.\nCafé 6.\n".encode()
    for name, content in (("a.txt", text), ("b.txt", change(text))):
        (tmp_path / name).write_bytes(content)
    one, other = (
        cached_tokens([tmp_path / name], WordTokenizer(VOCABULARY)) for name in ("a.txt", "b.txt")
    )
    np.testing.assert_array_equal(one.tokens, other.tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.encode("utf-16"), "text in UTF-16, not text in UTF-8"),
        (lambda text: text.encode("utf-16-le"), "zero bytes, as text in UTF-16"),
        (lambda text: text.encode("utf-32-be"), "zero bytes"),
        (lambda text: text.encode("latin-1"), "'utf-8' codec can't decode byte 0xe9"),
        (lambda text: gzip.compress(text.encode()), "compressed by gzip, not text"),
        (lambda text: b"%PDF-1.7 12", "a PDF, not text"),
    ],
)
def test_what_is_no_text_in_utf_8_is_refused_and_not_read_as_other_numbers(
    tmp_path, change, message
):
    (tmp_path / "a.txt").write_bytes(change("Room 12 of 345, café 6. " * 9))
    with pytest.raises(DataError, match=message) as error:
        cached_tokens([tmp_path / "a.txt"], WordTokenizer(VOCABULARY))
    assert "Save it as text in UTF-8" in error.value.hint


@pytest.mark.parametrize("layout", ["large_string", "string_view", "dictionary"])
def test_text_of_parquet_comes_in_any_layout(tmp_path, layout):
    pa = pytest.importorskip("pyarrow")
    texts = pa.array(["one 1", "two 22", "two 22"])
    other = texts.dictionary_encode() if layout == "dictionary" else texts.cast(layout)
    table = pa.table({"text": other})
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "b.parquet")
    assert [*read_documents([tmp_path / "b.parquet"])] == ["one 1", "two 22", "two 22"]


def test_nothing_to_read(workdir):
    (workdir / "a.txt").write_text("  \n")
    with pytest.raises(DataError, match="no text"):
        cached_tokens([workdir / "a.txt"], WordTokenizer(VOCABULARY))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_room_for_the_cache(corpus, own_cache):
    own_cache.mkdir(mode=0o500)
    with pytest.raises(DataError, match="FULGURITE_CACHE"):
        module(corpus)


# --- windows -------------------------------------------------------------------------------------


def test_windows_are_text_and_its_next_tokens(corpus):
    data = module(corpus, steps_per_epoch=5, val_sequences=3)
    text = data.cache.tokens.tolist()
    lines = {tuple(text[i : i + 33]) for i in range(len(data.parts[0]) - 32)}
    batches = [*data.train_dataloader()]
    assert len(batches) == 5
    for batch in batches:
        assert "documents" not in batch
        for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
            assert (*tokens.tolist(), int(targets[-1])) in lines
            assert torch.equal(tokens[1:], targets[:-1])
    assert sum(len(b["tokens"]) for b in data.val_dataloader()) == 3
    test = torch.cat([b["targets"].flatten() for b in data.test_dataloader()])
    part = data.parts[2]
    assert test.tolist() == text[part.start + 1 : part.start + 1 + len(test)]
    assert len(part) - len(test) <= 33


def test_documents_are_kept_apart(corpus):
    data = module(corpus, documents=True, length=256)
    batch = next(iter(data.train_dataloader()))
    ends = batch["tokens"] == data.tokenizer.end
    assert ends.any()
    changes = batch["documents"][:, 1:] != batch["documents"][:, :-1]
    assert torch.equal(changes, ends[:, :-1])
    assert (batch["targets"][ends] == -100).all()
    assert (batch["targets"][~ends] != -100).all()


def test_splits_without_text(corpus):
    with pytest.raises(DataError, match="validation"):
        module(corpus, length=5000)
    data = module(corpus, length=5000, val_fraction=0.0, test_fraction=0.0)
    assert data.val_dataloader() == []


# --- perturbations: pure functions ---------------------------------------------------------------

flags = st.lists(st.lists(st.booleans(), min_size=12, max_size=12), min_size=1, max_size=3).map(
    np.array
)


@given(flags, st.integers(1, 4))
def test_pieces_hold_at_most_k_numbers_and_no_fewer_than_needed(is_number, k):
    starts = isolate_starts(is_number, k)
    blocks = block_ids(starts)
    for row, ids in zip(is_number, blocks, strict=True):
        counts = np.bincount(ids, weights=row)
        assert counts.max() <= k
        assert (counts[:-1] == k).all()
        assert (np.diff(ids) >= 0).all()


@given(st.integers(1, 20), st.integers(1, 20))
def test_contexts_are_as_long_as_asked(length, context):
    blocks = block_ids(context_starts((2, length), context))
    assert (np.bincount(blocks[0])[:-1] == context).all()
    assert np.array_equal(blocks[0], np.arange(length) // context)


@given(st.integers(1, 500), st.integers(0, 9))
@settings(max_examples=50)
def test_swapped_numbers_go_on_as_they_did(count, seed):
    """A shift of the whole sequence: every number once, every n-gram as often as before."""
    indices = replacement("swap", np.arange(count), count, seed)
    assert sorted(indices.tolist()) == [*range(count)]
    assert (np.diff(indices) % count == 1 % count).all()
    if count > 3:
        distance = (indices - np.arange(count)) % count
        assert ((distance >= count // 4) & (distance <= count - count // 4)).all()


def test_perturbations_by_name():
    assert parse_perturbations(None) == parse_perturbations([])
    assert parse_perturbations("context:8").context == 8
    for wrong in ("context", "context:0", "isolate:x", "swap:1", "shuffle", ["swap", "unigram"]):
        with pytest.raises(ConfigError, match="perturb"):
            parse_perturbations(wrong)


# --- perturbations: of a corpus ------------------------------------------------------------------


def test_swap_keeps_text_and_number_sequences_and_breaks_their_bond(corpus):
    plain, swapped = module(corpus), module(corpus, perturb="swap")
    before, after = part_text(plain), part_text(swapped)
    is_number = np.isin(before, [*plain.tokenizer.numbers])
    assert np.array_equal(before[~is_number], after[~is_number])
    assert np.isin(after[is_number], [*plain.tokenizer.numbers]).all()
    a, b = numbers_in(plain, before), numbers_in(plain, after)
    for n in (1, 2, 3):
        grams = [
            Counter(zip(*((s + s[: n - 1])[i:] for i in range(n)), strict=False)) for s in (a, b)
        ]
        common = (grams[0] & grams[1]).total()
        assert common >= len(a) - 2 * n
    bond = [parity_known(plain, tokens) for tokens in (before, after)]
    assert bond[0] == 1
    assert 0.4 < bond[1] < 0.6


def parity_known(data, tokens):
    """How often the word before "number n" tells the parity of n."""
    even, odd = (data.tokenizer.words[word] for word in ("even", "odd"))
    number_of = data.tokenizer.numbers
    pairs = zip(tokens[:-2].tolist(), tokens[2:].tolist(), strict=True)
    right = [
        (a == even) == (number_of[b] % 2 == 0)
        for a, b in pairs
        if a in (even, odd) and b in number_of
    ]
    assert len(right) > 500
    return np.mean(right)


def test_unigram_keeps_the_marginal_and_destroys_bigrams(corpus):
    plain, drawn = module(corpus), module(corpus, perturb="unigram")
    before, after = part_text(plain), part_text(drawn)
    is_number = np.isin(before, [*plain.tokenizer.numbers])
    assert np.array_equal(before[~is_number], after[~is_number])
    a, b = (np.array(numbers_in(plain, tokens)) for tokens in (before, after))
    expected, counts = (np.bincount(x // 10, minlength=91)[:90] for x in (a, b))
    chi2 = ((counts - expected) ** 2 / np.maximum(expected, 1)).sum()
    assert chi2 < 90 + 4 * np.sqrt(2 * 90)
    follows = [np.mean(np.diff(x)[::2] == 1) for x in (a, b)]
    assert follows[0] > 0.9
    assert follows[1] < 0.02
    assert 0.4 < parity_known(plain, after) < 0.6


@pytest.mark.parametrize("perturb", ["swap", "unigram"])
def test_a_window_is_perturbed_as_the_whole_text_is(corpus, perturb):
    data = module(corpus, perturb=perturb)
    text = part_text(data)
    windows = data.train_dataloader().dataset
    for begin in (0, 7, 500):
        assert np.array_equal(windows.text(begin, 40), text[begin : begin + 40])
    same = module(corpus, perturb=perturb)
    assert np.array_equal(part_text(same), text)
    other = module(corpus, perturb=perturb, seed=1)
    assert not np.array_equal(part_text(other), text)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_numbers_stay_in_their_split(corpus, split):
    plain, swapped = module(corpus), module(corpus, perturb="swap")
    a, b = (sorted(numbers_in(plain, part_text(data, split))) for data in (plain, swapped))
    assert a == b


@pytest.mark.parametrize("k", [1, 3])
def test_isolated_pieces(corpus, k):
    """At most k numbers see each other, those that are only predicted included."""
    data = module(corpus, perturb=f"isolate:{k}", length=64)
    batch = next(iter(data.train_dataloader()))
    is_number = torch.zeros(VOCABULARY, dtype=torch.bool)
    is_number[[*data.tokenizer.numbers]] = True
    for tokens, targets, ids in zip(
        *(batch[x] for x in ("tokens", "targets", "documents")), strict=True
    ):
        for piece in ids.unique():
            inside = ids == piece
            count = int(is_number[tokens[inside]].sum())
            last = targets[inside][-1]
            assert count + int(last >= 0 and bool(is_number[last])) <= k
    assert (batch["targets"] == -100).any()


def test_short_contexts_keep_all_targets(corpus):
    data = module(corpus, perturb="context:8")
    batch = next(iter(data.train_dataloader()))
    assert torch.equal(batch["documents"], (torch.arange(32) // 8).expand(4, 32))
    assert (batch["targets"] >= 0).all()


def test_several_at_once(corpus):
    data = module(corpus, perturb=["unigram", "isolate:2", "context:8"], documents=True)
    batch = next(iter(data.train_dataloader()))
    ids = batch["documents"]
    assert (ids[:, 8::8] != ids[:, 7:-1:8]).all()
    assert all(int(torch.bincount(row).max()) <= 8 for row in ids)


def test_the_counts_are_those_of_the_text(corpus):
    data = module(corpus, perturb="swap")
    assert data.token_counts.sum() == len(data.cache)
    assert data.token_counts.shape == (VOCABULARY,)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"vocab_size": 1003}, "vocab_size"),
        ({"length": 0}, "length"),
        ({"val_fraction": 0.7, "test_fraction": 0.3}, "val_fraction"),
        ({"perturb": "swap:3"}, "perturb"),
        ({"steps_per_epoch": 0}, "steps_per_epoch"),
    ],
)
def test_wrong_options_name_their_key(options, named):
    with pytest.raises(ConfigError, match=named):
        text_module(options)


@pytest.mark.parametrize("training", [True, False])
def test_a_training_that_goes_on_with_another_text_says_so(corpus, tmp_path, training, recwarn):
    data = module(corpus)
    state = data.state_dict()
    file = files_in(corpus)[0]
    file.write_text(file.read_text().replace("1", "2"))  # numbers have tokens in any text
    other = module(corpus)
    other.trainer = SimpleNamespace(training=training)
    other.load_state_dict(other.state_dict())
    assert not recwarn
    other.load_state_dict(state)
    assert ["another text" in str(w.message) for w in recwarn] == [True] * training
