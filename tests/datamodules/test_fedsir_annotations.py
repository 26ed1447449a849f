"""Clients and labels of users' own files: right by image, or refused by name."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fakes.fedsir import NumberedImages
from fakes.options import group
from hypothesis import given, settings
from hypothesis import strategies as st

from fulgurite.datamodules.fedsir import (
    UNKNOWN,
    CifarArchive,
    Digits,
    FederatedDataModule,
    FileLabels,
    FilePartition,
    Iid,
    ImageFolder,
    LabelColumns,
    SourceLabels,
)
from fulgurite.datamodules.fedsir.options import FederatedEvaluationOptions
from fulgurite.errors import ConfigError, DataError
from fulgurite.testing.files import write_cifar_archive, write_image_files

TOTAL = 40
NAMES, KEY = ("even", "odd"), "im/{} x.png"


def numbered(**options):
    """Images whose pixels are their row, with names."""
    return NumberedImages(TOTAL, **{"names": NAMES, "key": KEY, "writers": 0} | options)


def rows_of(data, client):
    return data.client_images(client)[:, 0, 0, 0].long()


def table(**columns):
    return pd.DataFrame({"path": [KEY.format(row) for row in range(TOTAL)]} | columns)


def write(folder, frame, name="a.csv"):
    path = folder / name
    if name.endswith(".parquet"):
        frame.to_parquet(path)
    elif name.endswith(".txt"):
        path.write_text("".join(f"{a} {b}\n" for a, b in frame.itertuples(index=False)))
    elif name.endswith(".json"):
        path.write_text(json.dumps(frame))
    else:
        frame.to_csv(path, index=False, sep="\t" if ".tsv" in name else ",")
    return str(path)


def build(partition=None, noise=None, source=None, **options):
    data = FederatedDataModule(
        source or numbered(), partition or Iid(), noise, **{"clients": 3} | options
    )
    data.setup()
    return data


CLIENTS = [f"c{(row * 7) % 3}" for row in range(TOTAL)]


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.tsv", "a.parquet", "a.txt"])
@pytest.mark.parametrize("by", ["path", "row"])
def test_each_image_is_at_the_client_that_the_file_names(tmp_path, name, by):
    frame = table(client=CLIENTS)
    if by == "row":
        frame = frame.rename(columns={"path": "row"}).assign(row=range(TOTAL))
    frame = frame.sample(frac=1, random_state=0)  # the order of the file says nothing
    data = build(
        FilePartition(write(tmp_path, frame, name)),
        source=numbered(key=KEY if by == "path" else None),
    )
    for k in range(3):
        assert {CLIENTS[row] for row in rows_of(data, k).tolist()} == {f"c{k}"}


@pytest.mark.parametrize("form", [dict, list])
def test_flowers_partitions_as_json(tmp_path, form):
    parts = [[row for row in range(TOTAL) if row % 3 == k] for k in range(3)]
    content = parts if form is list else {str(k): part for k, part in enumerate(parts)}
    data = build(FilePartition(write(tmp_path, content, "a.json")))
    for k in range(3):
        assert set((rows_of(data, k) % 3).tolist()) == {k}


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 11), min_size=TOTAL, max_size=TOTAL))
def test_clients_are_numbered_by_value(tmp_path_factory, clients):
    path = write(tmp_path_factory.mktemp("a"), table(client=clients))
    every = sorted(set(clients))
    data = build(FilePartition(path), clients=len(every), evaluation=FederatedEvaluationOptions(0))
    for k, name in enumerate(every):
        assert {clients[row] for row in rows_of(data, k).tolist()} == {name}


def changed(frame, action):
    if action == "missing":
        return frame.drop(index=[3, 5])
    if action == "doubled":
        return pd.concat([frame, frame.iloc[[3, 5]]])
    if action == "unknown":
        return pd.concat([frame, frame.iloc[[3]].assign(path="im/999.png")])
    if action == "empty":
        return frame.assign(
            **{frame.columns[-1]: [None if i == 3 else v for i, v in enumerate(frame.iloc[:, -1])]}
        )
    return frame


FAULTS = [
    ("missing", "(names no client|has no label) for 'im/3 x.png', 'im/5 x.png'"),
    ("empty", "(names no client|has no label) for 'im/3 x.png'"),
    ("doubled", "more than one row for 'im/3 x.png', 'im/5 x.png'"),
    ("unknown", "does not train on: 'im/999.png'.*such as im/0 x.png.*init_args.unknown=ignore"),
]


@pytest.mark.parametrize(("action", "message"), FAULTS)
@pytest.mark.parametrize("what", ["client", "label"])
def test_rows_that_are_missing_doubled_or_unknown_are_named(tmp_path, action, message, what):
    frame = table(**{what: [f"c{i % 3}" for i in range(TOTAL)] if what == "client" else NAMES * 20})
    path = write(tmp_path, changed(frame, action))
    reader = {"partition": FilePartition(path)} if what == "client" else {"noise": FileLabels(path)}
    with pytest.raises(DataError, match=message):
        build(**reader, evaluation=FederatedEvaluationOptions(0))


def test_unknown_images_can_be_left_out(tmp_path):
    path = write(tmp_path, changed(table(client=CLIENTS), "unknown"))
    assert build(FilePartition(path, unknown="ignore")).num_samples == 36
    other = table(client=CLIENTS).assign(path="elsewhere")
    with pytest.raises(DataError, match="does not train on: 'elsewhere'"):
        build(FilePartition(write(tmp_path, other, "b.csv"), unknown="ignore"))


def test_limits_leave_the_rows_of_the_file_as_they_are(tmp_path):
    path = write(tmp_path, table(client=CLIENTS, label=[NAMES[row // 20] for row in range(TOTAL)]))
    data = build(
        FilePartition(path),
        FileLabels(path),
        numbered(train_limit=30),
        evaluation=FederatedEvaluationOptions(0),
    )
    for k in range(3):
        rows = rows_of(data, k)
        assert {CLIENTS[row] for row in rows.tolist()} == {f"c{k}"}
        assert data.labels.given[data.client_index(k)].equal(rows // 20)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "it is empty"),
        ("path,client\n", "names no client for"),
        ("path;client\nim/0 x.png;a\n", "separated by semicolons: separate them by commas"),
        ("path\tclient\nim/0 x.png\ta\n", "separated by tabs"),
        ("PK\x03\x04", "a spreadsheet .*, not comma-separated values"),
        ("path,client,client\nim/0 x.png,a,b\n", "two columns 'client'"),
        ("path,client\nim/0 x.png\n", "row 1 has 1 fields and the header 2"),
        ("path,client\nim/0 x.png,a,b\n", "row 1 has 3 fields and the header 2"),
        ("file,client\nim/0 x.png,a\n", "neither of the columns 'path' and 'row'.*path_column"),
        ("path,row,client\nim/0 x.png,0,a\n", "both of the columns 'path' and 'row'"),
        ("row,client\n40,a\n", "does not train on: '40'.*from 0 to 39"),
        ("row,client\n-1,a\n", "does not train on: '-1'"),
        ("row,client\n1.5,a\n", "does not train on: '1.5'"),
        ('path,client\n"im/0 x.png,a\n', "cannot be read"),
    ],
)
def test_tables_that_are_none_are_one_error(tmp_path, content, message):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        build(FilePartition(str(tmp_path / "a.csv")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"0": [0, 40]}, "client '0' has row 40, and the source has rows 0 to 39"),
        ({"0": [0], "1": [0]}, "names 'im/0 x.png' more than once"),
        ({"0": [True]}, "client '0' has row True"),
        ({"0": 3}, "no object of lists"),
        ({"0": list(range(39))}, r"names no client for 'im/39 x.png'\."),
        ({"0": list(range(40))}, r"names 1 clients, and there are to be 3.*clients=1"),
    ],
)
def test_partitions_that_do_not_fit_are_one_error(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        build(
            FilePartition(write(tmp_path, content, "a.json")),
            evaluation=FederatedEvaluationOptions(0),
        )


def test_rows_of_commas_alone_are_none(tmp_path):
    path = write(tmp_path, table(client=CLIENTS))
    with open(path, "a") as file:
        file.write(",\n , \n")
    assert build(FilePartition(path)).num_clients == 3


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(table(client=CLIENTS).to_csv(index=False), encoding="utf-8-sig")
    assert build(FilePartition(str(path))).num_clients == 3


def test_paths_need_a_source_with_names(tmp_path):
    path = write(tmp_path, table(client=CLIENTS))
    with pytest.raises(DataError, match=r"images of the source have no names. Count them from 0"):
        build(FilePartition(path), source=numbered(key=None))
    with pytest.raises(ConfigError, match=r"none of .csv, .tsv, .parquet, .txt, .json by its name"):
        FilePartition("a.xlsx")


# --- labels


GIVEN = [(row // 2) % 2 for row in range(TOTAL)]  # half of them wrong


def check_labels(data, given=GIVEN):
    for k in range(3):
        rows, index = rows_of(data, k), data.client_index(k)
        assert data.labels.given[index].tolist() == [given[row] for row in rows.tolist()]
        if data.evaluation is not None:
            assert data.evaluation.true[index].equal(rows % 2)
            wrong = (data.labels.given != data.evaluation.true)[index].double().mean()
            assert data.evaluation.noise_rates[k] == wrong


def save(folder, name, arrays):
    path = folder / name
    if name.endswith(".npz"):
        np.savez(path, **arrays)
    elif name.endswith(".npy"):
        np.save(path, next(iter(arrays.values())))
    else:
        torch.save(arrays, path)
    return str(path)


@pytest.mark.parametrize("kind", ["names", "numbers"])
@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.txt"])
def test_labels_of_a_table_are_those_of_the_images(tmp_path, name, kind):
    labels = [NAMES[c] for c in GIVEN] if kind == "names" else GIVEN
    path = write(tmp_path, table(label=labels).sample(frac=1, random_state=0), name)
    check_labels(build(noise=FileLabels(path)))


@pytest.mark.parametrize("kind", ["array", "column", "tensor", "text"])
@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.pt"])
def test_labels_of_an_array_are_in_the_order_of_the_source(tmp_path, name, kind):
    labels = np.array(GIVEN, np.uint8)
    if kind == "column":
        labels = labels[:, None]
    if kind == "text":
        labels = np.array(NAMES)[labels]
    if kind == "tensor":
        labels = torch.tensor(GIVEN) if name == "a.pt" else labels.astype(np.int64)
    path = save(tmp_path, name, {"worse_label": labels})
    check_labels(build(noise=FileLabels(path, LabelColumns("worse_label"))))


def old_numpy(path):
    """Rename what NumPy 1 called otherwise, as in files that were saved with it."""
    with zipfile.ZipFile(path) as archive:
        members = {m: archive.read(m) for m in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content.replace(b"numpy._core.multi", b"numpy.core.multi"))


@pytest.mark.parametrize("numpy", ["new", "old"])
def test_a_human_label_set_of_cifar_in_the_order_of_the_archive(tmp_path, numpy, cache):
    source = CifarArchive(
        str(write_cifar_archive(tmp_path / "c.tar.gz", per_class=6)), checksum=None
    )
    clean = source.read().train_labels.numpy()
    worse = np.where(np.arange(60) % 3 == 0, (clean + 1) % 10, clean)
    sets = {"clean_label": clean, "worse_label": worse, "aggre_label": clean}
    path = save(tmp_path, "CIFAR-10_human.pt", sets)
    if numpy == "old":
        old_numpy(path)
    data = build(
        noise=FileLabels(path, LabelColumns("worse_label")),
        source=source,
        evaluation=FederatedEvaluationOptions(0),
    )
    rows = data.samples.rows
    assert data.labels.given.tolist() == worse[rows].tolist()
    assert data.evaluation.true.tolist() == clean[rows].tolist()
    with pytest.raises(
        DataError, match="no labels 'label': it has clean_label, worse_label, aggre"
    ):
        build(noise=FileLabels(path), source=source)
    swapped = save(tmp_path, "b.pt", {"clean_label": clean[::-1].copy(), "worse_label": worse})
    with pytest.raises(
        DataError, match=r"not those of the source for .* of 60 images, such as row"
    ):
        build(noise=FileLabels(swapped, LabelColumns("worse_label")), source=source)


def test_files_that_run_code_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    buffer = io.BytesIO()
    torch.save({"label": Evil()}, buffer)
    (tmp_path / "a.pt").write_bytes(buffer.getvalue())
    np.save(tmp_path / "a.npy", np.array([Evil()], object), allow_pickle=True)
    for name in ("a.pt", "a.npy"):
        with pytest.raises(DataError, match=f"The labels .*{name} cannot be read"):
            build(noise=FileLabels(str(tmp_path / name)))
    torch.save({"label": np.array(["a", None], object)}, tmp_path / "b.pt")
    with pytest.raises(DataError, match="cannot be read"):
        build(noise=FileLabels(str(tmp_path / "b.pt")))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(39, np.int64), "are 39, and the source has 40"),
        (np.full(40, 2), r"give 'im/0 x.png' the class 2 \(40 are like this\)"),
        (np.full(40, -1), "give 'im/0 x.png' the class -1"),
        (np.zeros((40, 2), np.int64), r"are int64 of shape \(40, 2\)"),
        (np.zeros(40), "are float64"),
        (np.array(["cat"] * 40), "no class of the source: 'cat'.*classes are 'even', 'odd'"),
    ],
)
def test_arrays_that_are_no_labels_are_one_error(tmp_path, labels, message):
    with pytest.raises(DataError, match=message):
        build(noise=FileLabels(save(tmp_path, "a.npz", {"label": labels})))


def test_labels_in_another_order_are_told_by_their_agreement(tmp_path, log):
    path = save(tmp_path, "a.npy", {"label": np.arange(TOTAL) % 2})
    build(noise=FileLabels(path))
    assert not log.text
    build(noise=FileLabels(save(tmp_path, "b.npy", {"label": np.repeat([0, 1], 20)})))
    assert "is it in the order of the source?" in log.text


def test_names_that_only_resemble_those_of_the_source_are_told(tmp_path):
    source = numbered(names=("caf\u00e9", "tea"), key="im\u00e9/{}.png")
    frame = pd.DataFrame({"path": [f"ime\u0301/{row}.png" for row in range(TOTAL)]})
    frame = frame.assign(label="tea", client="0")  # as file systems of Apple write letters
    with pytest.raises(DataError, match=r"'ime\\u0301/0.png' and 'im\\xe9/0.png' are not the same"):
        build(FilePartition(write(tmp_path, frame)), source=source, clients=1)
    frame = frame.assign(path=[f"im\u00e9/{row}.png" for row in range(TOTAL)], label="Tea")
    with pytest.raises(DataError, match=r"'Tea' and 'tea' are not the same name"):
        build(noise=FileLabels(write(tmp_path, frame)), source=source)


def test_names_and_numbers_that_differ_are_asked_for(tmp_path):
    source = numbered(names=("1", "0"))
    path = write(tmp_path, table(label=[1 - c for c in GIVEN]))
    with pytest.raises(
        ConfigError, match=r"both names and numbers .*labels_are` to names or numbers"
    ):
        build(noise=FileLabels(path), source=source)
    check_labels(build(noise=FileLabels(path, labels_are="names"), source=source))
    data = build(noise=FileLabels(path, labels_are="numbers"), source=source)
    check_labels(data, [1 - c for c in GIVEN])
    with pytest.raises(DataError, match="no class of the source: 'cat'"):
        build(noise=FileLabels(write(tmp_path, table(label=["cat", *GIVEN[1:]]), "b.csv")))


def test_names_that_pandas_wrote_as_floats_are_names(tmp_path):
    source = numbered(names=("1", "0"))
    path = write(tmp_path, table(label=[float(1 - c) for c in GIVEN]))
    with pytest.raises(ConfigError, match="both names and numbers"):
        build(noise=FileLabels(path), source=source)
    check_labels(build(noise=FileLabels(path, labels_are="names"), source=source))


def test_other_objects_in_a_torch_file_are_one_error_of_ours(tmp_path):
    path = str(tmp_path / "a.pt")
    torch.save({"label": [np.int64(0)] * TOTAL}, path)
    with pytest.raises(DataError, match=r"holds other objects than tensors, arrays of numbers"):
        build(noise=FileLabels(path))


@pytest.mark.parametrize("layout", ["string", "large_string", "string_view"])
def test_text_of_parquet_comes_in_any_layout(tmp_path, layout):
    pa = pytest.importorskip("pyarrow")
    clients = pa.array(CLIENTS).cast(getattr(pa, layout)())
    columns = {"row": pa.array(range(TOTAL)), "client": clients}
    pytest.importorskip("pyarrow.parquet").write_table(pa.table(columns), tmp_path / "a.parquet")
    data = build(FilePartition(str(tmp_path / "a.parquet")), source=numbered(key=None))
    for k in range(3):
        assert {CLIENTS[row] for row in rows_of(data, k).tolist()} == {f"c{k}"}


def test_numbers_of_an_array_that_are_names_too_are_asked_for(tmp_path):
    source = numbered(names=("1", "0"))  # as folders 0 to 10 are sorted: 10 is the third
    path = save(tmp_path, "a.npy", {"label": np.array([1 - c for c in GIVEN])})
    with pytest.raises(ConfigError, match=r"noise\.init_args\.labels_are` to names or numbers"):
        build(noise=FileLabels(path), source=source)
    check_labels(build(noise=FileLabels(path, labels_are="names"), source=source))
    data = build(noise=FileLabels(path, labels_are="numbers"), source=source)
    check_labels(data, [1 - c for c in GIVEN])
    with pytest.raises(DataError, match="no class of the source: '0', '1'"):
        build(noise=FileLabels(path, labels_are="names"))


def test_true_labels_of_minus_one_are_unknown(tmp_path):
    true = [-1 if row % 3 else row % 2 for row in range(TOTAL)]
    columns = LabelColumns(true_label="true_label")
    for name in ("a.csv", "a.parquet"):
        path = write(tmp_path, table(label=GIVEN, true_label=true), name)
        for noise in (FileLabels(path, columns, truth="file"), SourceLabels(path)):
            known = build(noise=noise).evaluation.true != UNKNOWN
            assert 0 < int(known.sum()) < len(known)


def test_true_labels_of_the_file_with_gaps(tmp_path, log):
    true = [None if row % 3 else row % 2 for row in range(TOTAL)]
    path = write(tmp_path, table(label=GIVEN, true_label=true))
    data = build(noise=FileLabels(path, LabelColumns(true_label="true_label"), truth="file"))
    rows = torch.cat([rows_of(data, k) for k in range(3)])
    index = torch.cat([data.client_index(k) for k in range(3)])
    expected = torch.where(rows % 3 == 0, rows % 2, UNKNOWN)
    assert data.evaluation.true[index].equal(expected)
    assert "are unknown" in log.text
    wrong = write(
        tmp_path, table(label=GIVEN, true_label=[1 - row % 2 for row in range(TOTAL)]), "b.csv"
    )
    with pytest.raises(
        DataError, match=r"for 40 of 40 images, such as 'im/0 x.png': 'odd' and 'even'"
    ):
        build(noise=FileLabels(wrong, LabelColumns(true_label="true_label")))
    assert build(noise=FileLabels(path, truth="unknown")).evaluation is None


def test_labels_of_the_source_are_given_ones(tmp_path):
    data = build(noise=SourceLabels())
    assert data.evaluation is None
    for k in range(3):
        assert data.labels.given[data.client_index(k)].equal(rows_of(data, k) % 2)
    frame = table(true_label=[(row // 2) % 2 for row in range(TOTAL)]).iloc[:20]
    known = build(
        noise=SourceLabels(write(tmp_path, frame)), evaluation=FederatedEvaluationOptions(0)
    )
    rows = torch.cat([rows_of(known, k) for k in range(3)])
    index = torch.cat([known.client_index(k) for k in range(3)])
    assert known.evaluation.true[index].equal(torch.where(rows < 20, (rows // 2) % 2, UNKNOWN))


def test_some_clients_have_the_given_labels_and_others_true_ones(tmp_path):
    path = write(tmp_path, table(label=GIVEN))
    data = build(noise=FileLabels(path, noisy_count=1))
    assert int(data.evaluation.noisy_clients.sum()) == 1
    wrong = data.labels.given != data.evaluation.true
    for k in range(3):
        assert bool(wrong[data.client_index(k)].any()) == bool(data.evaluation.noisy_clients[k])
    with pytest.raises(DataError, match="need true ones, and those of 'im/"):
        build(noise=FileLabels(path, truth="unknown", noisy_fraction=0.5))


@pytest.mark.parametrize(
    "arguments",
    [
        {"truth": "file"}, {"truth": "unknown", "true_label": "true_label"}, {"truth": "maybe"},
        {"path": "a.txt", "true_label": "true_label"}, {"path": "a.xlsx"}, {"noisy_fraction": 2.0},
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_config_errors(arguments):
    options = dict(arguments)
    path = options.pop("path", "a.csv")
    with pytest.raises(ConfigError):
        FileLabels(path, **group(options, columns=LabelColumns))


def test_copies_of_an_original_have_its_given_label(tmp_path):
    source = Digits(copies=3)
    labels = source.read().train_labels
    given = torch.where(torch.arange(len(labels)) % 4 == 0, (labels + 1) % 10, labels)
    path = save(tmp_path, "a.npy", {"label": given.numpy()})
    data = build(noise=FileLabels(path), source=source)
    assert data.labels.given.equal(given[data.samples.rows])
    assert data.evaluation.true.equal(labels[data.samples.rows])


def test_images_of_a_folder_are_named_by_path(tmp_path, cache):
    folder = write_image_files(tmp_path / "i.zip", per_class=20)
    source = ImageFolder(str(folder))
    paths = source.read().listing.keys
    frame = pd.DataFrame(
        {"path": paths, "client": [f"c{len(p) % 2}{i % 3}" for i, p in enumerate(paths)]}
    )
    every = sorted(set(frame.client))
    path = write(tmp_path, frame)
    data = build(FilePartition(path), source=source, clients=len(every))
    for k, name in enumerate(every):
        rows = data.samples.rows[data.client_index(k)].tolist()
        assert set(frame.client.iloc[rows]) == {name}
        classes = [paths[row].split("/")[-2] for row in rows]
        labels = data.labels.given[data.client_index(k)].tolist()
        assert [data.class_names[c] for c in labels] == classes
