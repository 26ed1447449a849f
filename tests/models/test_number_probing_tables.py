"""Tables on disk, the command, and the measured rows of real tables.

Source: docs/papers/number_probing.md sections 4.2 and 5.
"""

import csv
import importlib.util
import json

import numpy as np
import pytest
import torch

from fulgurite.errors import ConfigError, DataError, MissingExtraError
from fulgurite.models.number_probing import (
    ClassifierOptions,
    FoldOptions,
    NumberTable,
    diagnose,
    number_tokens,
    parse_numbers,
    planted,
    probe,
    read_table,
    row_shuffled,
    spectrum,
    spikes,
    tables,
)
from fulgurite.models.number_probing.reports.command import main


def package(name):
    return pytest.mark.skipif(
        importlib.util.find_spec(tables.PACKAGES[name]) is None,
        reason=f"the package of the table '{name}' is not installed",
    )


def vectors(size=40, width=3, seed=0):
    return torch.randn(size, width, generator=torch.Generator().manual_seed(seed))


def write_safetensors(path, tensors):
    """A file in the real format, written by hand: 8 bytes of length, JSON, bytes."""
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
    header, blobs, at = {"__metadata__": {"format": "pt"}}, [], 0
    for key, tensor in tensors.items():
        blob = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        header[key] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + len(blob)],
        }
        at += len(blob)
        blobs.append(blob)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))


@pytest.fixture
def checkpoint(tmp_path):
    """A folder as Hugging Face models have it; number n is token 99 - n, ' n' is 199 - n."""
    weight = vectors(200, 4).to(torch.bfloat16)
    write_safetensors(
        tmp_path / "model.safetensors",
        {"model.norm.weight": torch.ones(4), "model.embed_tokens.weight": weight},
    )
    vocabulary = {str(n): 99 - n for n in range(60)} | {f"Ġ{n}": 199 - n for n in range(80)}
    content = {"model": {"type": "BPE", "vocab": vocabulary}, "added_tokens": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    return tmp_path, weight.float()


# --- checkpoints ----------------------------------------------------------------------------------


def test_a_checkpoint_folder_is_read_row_by_row(checkpoint):
    folder, weight = checkpoint
    table = read_table(folder)
    assert table.numbers == tuple(range(80))  # the spelling that covers more
    assert torch.equal(table.embeddings, weight[[199 - n for n in range(80)]])
    assert "leading space ('Ġ')" in table.note
    bare = read_table(folder, range(10, 50), spelling="bare")
    assert bare.numbers == tuple(range(10, 50))
    assert torch.equal(bare.embeddings, weight[[99 - n for n in range(10, 50)]])


def test_shards_are_found_by_their_index(checkpoint):
    folder, weight = checkpoint
    (folder / "model.safetensors").rename(folder / "model-00002-of-00002.safetensors")
    index = {"weight_map": {"model.embed_tokens.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(read_table(folder, [3], spelling="bare").embeddings, weight[[96]])
    index["weight_map"]["model.embed_tokens.weight"] = "../secret.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="no `weight_map` of files beside it"):
        read_table(folder)


def test_our_reader_agrees_with_the_library(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    weight = vectors(30).half()
    safetensors.save_file({"transformer.wte.weight": weight}, tmp_path / "model.safetensors")
    (tmp_path / "vocab.json").write_text(json.dumps({str(n): n for n in range(30)}))
    assert torch.equal(read_table(tmp_path).embeddings, weight.float())


def test_other_tokenizers(checkpoint):
    folder, weight = checkpoint
    unigram = [["<unk>", 0.0], *([f"▁{n}", -1.0] for n in range(50))]
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    model = {"type": "Unigram", "vocab": unigram, "unk_id": 0}
    content = {"model": model, "pre_tokenizer": metaspace}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert torch.equal(read_table(folder).embeddings, weight[1:51])
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", *map(str, range(25)), "##7"]))
    table = read_table(folder)
    assert torch.equal(table.embeddings, weight[2:27])
    (folder / "vocab.txt").unlink()
    with pytest.raises(DataError, match="no tokenizer in"):
        read_table(folder)


def test_damaged_checkpoints(checkpoint):
    folder, _ = checkpoint
    with pytest.raises(DataError, match=r"10 numbers are missing.*80, 81.*--numbers 0:80"):
        read_table(folder, range(90), spelling="spaced")
    with pytest.raises(DataError, match=r"no tensor 'wte'.*--tensor model.embed_tokens.weight"):
        read_table(folder, tensor="wte")
    with pytest.raises(ConfigError, match="spelling='both' is unknown"):
        read_table(folder, spelling="both")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"] = {str(n): 190 + n for n in range(30)}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"has 200 rows, and the tokenizer asks for row 219"):
        read_table(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="has no vocabulary"):
        read_table(folder)
    content_bytes = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs")
    with pytest.raises(DataError, match=r"cannot be read as safetensors.*Git LFS"):
        read_table(folder)
    (folder / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": {str(n): n for n in range(30)}}})
    )
    (folder / "model.safetensors").write_bytes(content_bytes[:-100])
    with pytest.raises(DataError, match="is no whole matrix"):
        read_table(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"no model.safetensors .*pytorch_model.bin"):
        read_table(folder)


def test_two_candidates_must_be_told_apart(tmp_path):
    weights = {"encoder.embed_tokens.weight": vectors(), "decoder.embed_tokens.weight": vectors()}
    write_safetensors(tmp_path / "model.safetensors", weights)
    (tmp_path / "vocab.txt").write_text("\n".join(map(str, range(40))))
    with pytest.raises(DataError, match=r"2 possible token embeddings.*--tensor encoder.embed"):
        read_table(tmp_path)
    assert len(read_table(tmp_path, tensor="decoder.embed_tokens.weight").numbers) == 40
    write_safetensors(tmp_path / "model.safetensors", weights | {"shared.weight": 2 * vectors()})
    assert torch.equal(read_table(tmp_path).embeddings, 2 * vectors())


def test_integers_are_no_embeddings(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", {"wte.weight": torch.arange(60).view(30, 2)})
    (tmp_path / "vocab.txt").write_text("\n".join(map(str, range(30))))
    with pytest.raises(DataError, match=r"wte.weight of .* holds 'I64', .* from F64, F32"):
        read_table(tmp_path)


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2", "U8", "F4"])
def test_quantised_weights_are_refused_by_the_name_of_their_type(checkpoint, kind):
    folder, _ = checkpoint
    size = 200 * 4
    entry = {"dtype": kind, "shape": [200, 4], "data_offsets": [0, size]}
    text = json.dumps({"model.embed_tokens.weight": entry}).encode()
    (folder / "model.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + b"\x01" * size
    )
    with pytest.raises(DataError, match=rf"holds '{kind}'.*BF16\. Save it in one of these"):
        read_table(folder)


def saved_tokenizer(folder, model, splitter=None):
    """Write the tokenizer.json of a model of the package tokenizers."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(model(tokenizers))
    if splitter is not None:
        tokenizer.pre_tokenizer = splitter(tokenizers)
    tokenizer.save(str(folder / "tokenizer.json"))


def unigram(numbers):
    """Both spellings of numbers, in SentencePiece's way."""
    pieces = [("<unk>", 0.0), ("▁", -3.0), ("a", -3.0), ("(", -3.0), (")", -3.0)]
    pieces += [(f"{sign}{n}", -5.0) for sign in ("", "▁") for n in numbers]
    return lambda t: t.models.Unigram(pieces, unk_id=0)


def test_a_tie_of_spellings_goes_to_what_the_tokenizer_gives(checkpoint):
    """SentencePiece puts a sign before each word: "7" by itself is the token "▁7"."""
    folder, weight = checkpoint
    saved_tokenizer(folder, unigram(range(50)), lambda t: t.pre_tokenizers.Metaspace())
    table = read_table(folder)
    assert torch.equal(table.embeddings, weight[55:105])
    assert "leading space ('▁')" in table.note
    bare = read_table(folder, spelling="bare")  # of "(7)"
    assert torch.equal(bare.embeddings, weight[5:55])


def test_entries_that_a_tokenizer_never_gives_are_not_probed(checkpoint):
    """Digits are split, yet numbers of two digits are in the vocabulary."""
    folder, weight = checkpoint
    vocabulary = {"[UNK]": 0} | {str(n): n + 1 for n in range(60)}
    model = lambda t: t.models.WordLevel(vocabulary, unk_token="[UNK]")  # noqa: E731
    saved_tokenizer(folder, model, lambda t: t.pre_tokenizers.Digits(individual_digits=True))
    with pytest.raises(DataError, match=r"Only 10 numbers .* never gives"):
        read_table(folder)
    with pytest.raises(DataError, match=r"2 numbers are missing .* never gives.*: 10, 11"):
        read_table(folder, range(8, 12))
    assert torch.equal(read_table(folder, range(10)).embeddings, weight[1:11])
    saved_tokenizer(folder, model, lambda t: t.pre_tokenizers.Whitespace())
    assert len(read_table(folder).numbers) == 60


def test_a_tokenizer_that_cannot_be_loaded_is_said(checkpoint):
    assert "by their spelling in the vocabulary alone" in read_table(checkpoint[0]).note


@pytest.mark.parametrize(
    "source", ["gpt2", "meta-llama/Llama-3.1-8B", "sentence-transformers/all-MiniLM-L6-v2"]
)
@pytest.mark.parametrize("data", [True, False])
def test_names_of_the_hub(tmp_path, monkeypatch, source, data):
    monkeypatch.chdir(tmp_path)
    if data:
        monkeypatch.setenv("FULGURITE_DATA", str(tmp_path))
    else:
        monkeypatch.delenv("FULGURITE_DATA", raising=False)
    with pytest.raises(DataError, match=rf"no folder {source} .*not fetched.*download {source}"):
        read_table(source)


def test_spellings_are_never_mixed():
    vocabulary = {"0": 0, "1": 1, "Ġ0": 10, "Ġ1": 11, "Ġ2": 12, "02": 5}
    assert number_tokens(vocabulary, [0, 1]) == ({0: 0, 1: 1}, "")
    assert number_tokens(vocabulary, [0, 1, 2]) == ({0: 10, 1: 11, 2: 12}, "Ġ")
    with pytest.raises(DataError, match="1 numbers are missing in the vocabulary: 2"):
        number_tokens(vocabulary, [0, 1, 2], "bare")
    with pytest.raises(DataError, match="Only 3 numbers from 0 on"):
        number_tokens(vocabulary)


# --- files ----------------------------------------------------------------------------------------


def test_npy_with_and_without_words(tmp_path):
    x = vectors()
    np.save(tmp_path / "a.npy", x.numpy())
    assert torch.equal(read_table(tmp_path / "a.npy").embeddings, x)
    words = tmp_path / "words.txt"
    words.write_text("\n".join(["the", *(str(38 - n) for n in range(39))]))
    table = read_table(tmp_path / "a.npy", words=words)
    assert torch.equal(table.embeddings, x[1:].flip(0))
    words.write_text("the\n0")
    with pytest.raises(DataError, match=r"has 2 words, and .* has 40 rows"):
        read_table(tmp_path / "a.npy", words=words)
    with pytest.raises(DataError, match=r"2 numbers are missing.*40, 41.*--numbers 30:40"):
        read_table(tmp_path / "a.npy", range(30, 42))
    np.save(tmp_path / "b.npy", np.arange(60).reshape(30, 2))
    with pytest.raises(DataError, match="holds int64"):
        read_table(tmp_path / "b.npy")
    np.save(tmp_path / "c.npy", np.array([{}] * 30))
    with pytest.raises(DataError, match=r"cannot be read as .npy .it holds object"):
        read_table(tmp_path / "c.npy")


@pytest.mark.parametrize("header", [True, False])
def test_text_vectors(tmp_path, header):
    x = vectors()
    lines = [f"{n} " + " ".join(repr(float(v)) for v in x[n]) for n in reversed(range(40))]
    lines = ["the 1 2 3", *lines, "1e3 4 5 6"]
    file = tmp_path / "v.txt"
    file.write_text("\n".join(["42 3", *lines] if header else lines) + "\n")
    table = read_table(file)
    assert table.numbers == tuple(range(40))
    torch.testing.assert_close(table.embeddings, x)
    file.write_text("\n".join([*lines, "7 1.0 2.0"]))
    with pytest.raises(DataError, match=r"Line 43 .* holds 2 numbers after '7', not 3"):
        read_table(file)
    file.write_text("\n".join([*lines, "7 1 2 3"]))
    with pytest.raises(DataError, match="'7' comes twice"):
        read_table(file)
    file.write_text("\n".join([*lines[:5], "3 a b c"]))
    with pytest.raises(DataError, match=r"Line 6 .* holds 0 numbers"):
        read_table(file)


@pytest.mark.parametrize("sign", [" ", "\t", "  ", " \t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_tabs_and_marks_of_text_files(tmp_path, sign, encoding):
    x = vectors()
    lines = [sign.join([str(n), *(repr(float(v)) for v in x[n])]) for n in range(40)]
    file = tmp_path / "v.vec"
    for header in ([], [f"40{sign}3"]):
        file.write_text("\n".join([*header, *lines]), encoding=encoding)
        torch.testing.assert_close(read_table(file).embeddings, x)
    np.save(tmp_path / "a.npy", x.numpy())
    words = tmp_path / "w.txt"
    words.write_text("\n".join(map(str, range(40))), encoding=encoding)
    assert torch.equal(read_table(tmp_path / "a.npy", words=words).embeddings, x)


def test_words_with_odd_signs_keep_their_lines(tmp_path):
    """Vocabularies have tokens that Python takes for the end of a line."""
    x = vectors(43)
    np.save(tmp_path / "a.npy", x.numpy())
    odd = ["a\u2028b", "\x85", "\x0c"]
    (tmp_path / "w.txt").write_text("\n".join([*odd, *map(str, range(40))]), encoding="utf-8")
    assert torch.equal(read_table(tmp_path / "a.npy", words=tmp_path / "w.txt").embeddings, x[3:])


@pytest.mark.parametrize("content", ["0,1.0,2.0\n1,2.0,3.0", "\ufeffw 1 2", ""])
def test_text_without_numbers_shows_its_first_line(tmp_path, content):
    file = tmp_path / "v.txt"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"No line .* the first is .*spaces or tabs"):
        read_table(file)
    file.write_text("\n".join(f"{n} 1 2" for n in range(40)), encoding="utf-16")
    with pytest.raises(DataError, match=r"No line .*UTF-8"):
        read_table(file)


def test_what_is_no_table(tmp_path, monkeypatch):
    monkeypatch.delenv("FULGURITE_DATA", raising=False)
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(DataError, match="no table of a known kind"):
        read_table(tmp_path / "a.csv")
    with pytest.raises(DataError, match="no data at"):
        read_table(tmp_path / "none.npy")
    monkeypatch.setitem(tables.PACKAGES, "glove", "no_such_package")
    with pytest.raises(MissingExtraError, match=r"no-such-package.*probing-data"):
        read_table("glove")


def test_numbers_are_parsed():
    assert parse_numbers("0:3,10,8") == (0, 1, 2, 8, 10)
    for text in ("", "a", "1:1", "0:3,2", "-3"):
        with pytest.raises(ConfigError, match="no distinct whole numbers"):
            parse_numbers(text)


# --- command --------------------------------------------------------------------------------------


def test_the_command_reports_a_table(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("circle.npy", planted(torch.arange(200), 10, 16).numpy())
    options = ["circle.npy", "--numbers", "0:200", "--periods", "2,5,10", "--seeds", "1"]
    assert main([*options, "--out", "out"]) == 0
    printed = capsys.readouterr().out
    assert "circle: 200 numbers, 0 to 199, 16 dimensions" in printed
    assert "verdict: geometric\n  T = 10: the line is" in printed
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["verdict"] == "geometric"
    assert [row["period"] for row in report["rows"]] == [2, 5, 10]
    assert report["rows"][2]["kappa"] == 1
    assert len(report["spectrum"]["magnitude"]) == 100
    with open(tmp_path / "out" / "probe.csv") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[2]["kappa_contiguous"]) > 0.9
    assert {row["control"] for row in report["controls"]} == {"rows shuffled", "random"}
    assert all(abs(row["kappa_10"]) < 0.15 for row in report["controls"])
    assert sorted(f.name for f in (tmp_path / "out" / "figures").iterdir()) == [
        "kappa.png", "spectrum.png",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="already holds a report"):
        main([*options, "--out", "out"])
    assert main([*options]) == 0
    assert len(list(tmp_path.glob("runs/number_probing/probe-circle/*/report.json"))) == 1


def test_the_command_answers_a_singular_table(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x = planted(torch.arange(200), 10, 32)
    x[:, 5] = 0
    np.save("zero.npy", x.numpy())
    options = ["zero.npy", "--periods", "2,10", "--seeds", "1", "--permuted", "0"]
    assert main([*options, "--out", "out"]) == 0
    printed = capsys.readouterr().out
    assert "no Fisher values of T = 2, 10: S_W of T = 2 is singular: 32 dimensions" in printed
    assert "verdict: geometric" in printed
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["notes"]
    assert report["rows"][1]["kappa"] > 0.9
    assert report["rows"][1]["cond"] is None
    for extra_options in (["--ridge", "0.01"], ["--pca", "31"]):
        assert main([*options, *extra_options, "--out", f"out{extra_options[0]}"]) == 0
        printed = capsys.readouterr().out
        assert "singular" not in printed
        header = next(line for line in printed.splitlines() if line.startswith("| period"))
        assert {"phi", "cond", "fisher"} <= {cell.strip() for cell in header.split("|")}


def test_bad_options_are_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", vectors().numpy())
    for options, message in (
        ([], "arguments are required: source"),
        (["a.npy", "--folds", "x"], "invalid int value"),
        (["a.npy", "--periods", "2,x"], "--periods 2,x is no list"),
        (["a.npy", "--periods", "11"], r"periods=\[11\] cannot be probed"),
        (["a.npy", "--numbers", "5"], r"spectrum of 1 numbers"),
        (["a.npy", "--numbers", ""], r"--numbers is empty"),
        (["a.npy", "--permuted", "-1"], r"permuted=-1 is negative"),
    ):
        with pytest.raises((ConfigError, DataError), match=message):
            main(options)
    np.save("same.npy", vectors().numpy()[np.arange(80) % 39])
    with pytest.raises(DataError, match="80 numbers have only 39 unique"):
        main(["same.npy"])


# --- real tables ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def glove():
    return read_table("glove", range(1000))


@pytest.fixture(scope="module")
def minilm():
    return read_table("minilm", range(340))


def local_ratios(table: NumberTable, *frequencies):
    table_spectrum = spectrum(table.embeddings)
    return [float(table_spectrum.local_ratio[table_spectrum.bin(v)]) for v in frequencies]


@package("glove")
def test_glove_has_spikes(glove):  # (13)
    assert min(local_ratios(glove, 0.1, 0.2, 0.5)) >= 2.5
    assert max(local_ratios(glove, 1 / 3, 1 / 7)) < 1.2
    assert [t for t, s in spikes(spectrum(glove.embeddings)).items() if s.verdict] == [2, 5, 10]


@package("glove")
def test_glove_knows_parity_and_roundness(glove):  # (13)
    results = probe(glove.embeddings)
    assert 0.15 <= results[2].kappa <= 0.30
    assert 0.18 <= results[5].kappa <= 0.32
    assert 0.18 <= results[10].kappa <= 0.30
    assert results[3].kappa < 0.02
    assert results[7].kappa < 0.02
    assert results[5].kappa_nonround < 0.1
    assert results[10].recall[0] > 0.8
    verdict = diagnose(results, spikes(spectrum(glove.embeddings)))
    assert verdict.verdict == "parity or roundness only"


@package("glove")
def test_shuffled_glove_has_neither(glove):  # (11)
    for seed in range(3):
        x = row_shuffled(glove.embeddings, seed)
        assert float(spectrum(x).normalised.max()) < 2.2
        for result in probe(x, [2, 5, 10], nonround=False).values():
            assert abs(result.kappa) < result.band


@package("glove")
def test_the_frequency_of_glove_explains_its_spikes_only(glove):
    rank = (glove.rank.double() + 1).log()[:, None]
    assert min(float(spectrum(rank).normalised[k - 1]) for k in (100, 200, 500)) > 10
    assert probe(rank, [10], nonround=False)[10].kappa <= 0.06


@package("minilm")
def test_minilm_has_spikes(minilm):  # (14)
    assert minilm.embeddings.shape == (340, 384)
    assert min(local_ratios(minilm, 0.1, 0.2, 0.5)) >= 1.5


@package("minilm")
def test_minilm_is_geometric(minilm):  # (14)
    results = probe(minilm.embeddings, (2, 3, 10))
    assert 0.45 <= results[2].kappa <= 0.65
    assert 0.30 <= results[10].kappa <= 0.50
    assert results[10].kappa_nonround > 0.2
    verdict = diagnose(results, spikes(spectrum(minilm.embeddings)))
    assert verdict.verdict == "geometric"


@package("minilm")
def test_an_in_sample_probe_of_minilm_would_find_thirds(minilm):  # (14)
    result = probe(
        minilm.embeddings, [3], classifier=ClassifierOptions("logistic"),
        folds=FoldOptions(seeds=1), nonround=False,
    )[3]  # fmt: skip
    assert result.train_kappa > 0.95
    assert abs(result.kappa) < 0.12


@package("minilm")
def test_numbers_that_minilm_lacks_are_named():
    with pytest.raises(DataError, match=r"missing in the vocabulary of .*: 342.*--numbers 0:342"):
        read_table("minilm", range(1000))
    assert len(read_table("minilm").numbers) == 342


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("table.npy", {"tensor": "wte"}, "tensor='wte' says nothing of .*leave out --tensor"),
        ("table.npy", {"spelling": "spaced"}, "spelling='spaced' says nothing of .*with words"),
        ("table.txt", {"words": "words.txt"}, "words='words.txt' says nothing of "),
        (".", {"words": "words.txt"}, "words='words.txt' says nothing of "),
    ],
)
def test_an_option_of_another_kind_of_table_is_refused(checkpoint, name, option, message):
    folder, _ = checkpoint
    np.save(folder / "table.npy", vectors().numpy())
    (folder / "table.txt").write_text("".join(f"{n} {n} 1\n" for n in range(40)))
    with pytest.raises(ConfigError, match=message):
        read_table(folder / name, **option)


def test_words_of_a_list_may_be_spelled_with_a_space(tmp_path):
    np.save(tmp_path / "table.npy", vectors().numpy())
    (tmp_path / "words.txt").write_text("".join(f"\u2581{n}\n" for n in range(40)))
    table = read_table(tmp_path / "table.npy", words=tmp_path / "words.txt")
    assert table.numbers == tuple(range(40))
    assert read_table(tmp_path / "table.npy").note == "row n of 40 as the number n"


def test_a_text_file_that_is_cut_off_between_lines_is_refused(tmp_path):
    lines = ["40 2\n", *(f"{n} {n} 1\n" for n in range(40))]
    (tmp_path / "table.vec").write_text("".join(lines))
    assert read_table(tmp_path / "table.vec").numbers == tuple(range(40))
    (tmp_path / "table.vec").write_text("".join(lines[:-5]))
    with pytest.raises(DataError, match="begins with 40 words and ends after 35"):
        read_table(tmp_path / "table.vec")


def test_a_header_must_tell_the_width_and_one_dimension_is_no_header(tmp_path):
    lines = [f"{n} {n}.5 1" for n in range(40)]
    (tmp_path / "table.vec").write_text("\n".join(["40 3", *lines]))
    with pytest.raises(DataError, match=r"Line 2 .* holds 2 numbers after '0', not 3"):
        read_table(tmp_path / "table.vec")
    (tmp_path / "table.vec").write_text("\n".join(line[:-2] for line in lines))
    assert read_table(tmp_path / "table.vec").embeddings[0] == 0.5


@pytest.mark.parametrize("numbers", [[-1, 0], [3, 3], [], [0.5], [True, False], ["7"], [[1], [2]]])
def test_numbers_that_no_row_can_have_are_refused(tmp_path, numbers):
    np.save(tmp_path / "a.npy", vectors().numpy())
    with pytest.raises(ConfigError, match="no distinct whole numbers from 0 on"):
        read_table(tmp_path / "a.npy", numbers)
    assert read_table(tmp_path / "a.npy", torch.tensor([5, 3])).numbers == (3, 5)
