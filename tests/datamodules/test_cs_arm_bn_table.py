"""The plate table: what it refuses, what it counts, what it reports; CSV and RxRx1 readers."""

import os

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fulgurite.data.exclusions import Exclusion
from fulgurite.datamodules.cs_arm_bn import (
    CsvPlates,
    GroupFolds,
    HoldOut,
    OfficialSplit,
    PlateTable,
    RxRx1Plates,
)
from fulgurite.datamodules.cs_arm_bn.sources import check_images, refuse_shared_files
from fulgurite.datamodules.cs_arm_bn.splits import Assignment, check_assignment
from fulgurite.datamodules.cs_arm_bn.table import position_accuracy
from fulgurite.errors import ConfigError, DataError

CLASSES = ("x", "y")


def rows(labs=2, batches=4, plates=2, queries=8, controls=4, shuffle=False):
    """Labs of batches of plates; the class is that of the well unless shuffled."""
    generator = np.random.default_rng(0)
    out = []
    for lab in range(labs):
        for batch in range(batches):
            for plate in range(plates):
                labels = np.arange(queries) % 2
                if shuffle:
                    labels = generator.permutation(labels)
                key = (f"lab{lab}", f"b{batch}", f"{batch}{plate}")
                out += [
                    (*key, f"A{w:02}", "1", "query", labels[w], "q.png") for w in range(queries)
                ]
                out += [(*key, f"B{w:02}", "1", "control", -1, "c.png") for w in range(controls)]
    names = ["source", "batch", "plate", "well", "site", "role", "label", "path"]
    return pd.DataFrame(out, columns=names)


def table(frame=None, **arguments):
    return PlateTable(rows(**arguments) if frame is None else frame, CLASSES, ("grey",))


def test_numbers_and_names_agree_with_the_rows():
    made = table()
    assert len(made.domains) == 16
    assert made.domains[0] == "lab0|b0|00"
    for row in (0, 5, 100, len(made) - 1):
        line = made.frame.iloc[row]
        assert made.domains[made.domain[row]] == f"{line.source}|{line.batch}|{line.plate}"
        assert made.wells[made.well[row]] == f"{made.domains[made.domain[row]]}|{line.well}"
    assert (made.counts() == [8, 4]).all()
    assert made.control.sum() == 64
    assert (made.label[made.control] == -1).all()
    assert (made.frame.loc[made.rows_of(3, control=True), "role"] == "control").all()


def test_a_control_has_no_label_whatever_the_table_says():
    frame = rows()
    frame.loc[frame["role"] == "control", "label"] = 77
    assert (table(frame).label == table().label).all()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda f: f.drop(columns="role"), "'role'"),
        (lambda f: f.drop(columns="batch"), "'batch'"),
        (lambda f: f.drop(columns="path"), "path"),
        (lambda f: f.assign(role="treated"), "treated"),
        (lambda f: f.assign(label=2), "label 2"),
        (lambda f: f.assign(label=0.5), "label 0.5"),
        (lambda f: f.assign(label=-2), "label -2"),
        (lambda f: f.assign(label="x"), "label x"),
        (lambda f: f.assign(label=np.inf), "label inf"),
        (lambda f: f.assign(well="A01"), "twice"),
        (lambda f: f.assign(path=["", *f["path"][1:]]), "no path"),
        (lambda f: f.assign(path=[None, *f["path"][1:]]), "no path"),
        (lambda f: f.assign(plate=[None, *f["plate"][1:]]), "'plate'"),
        (lambda f: f.assign(domain="all"), "'all'|twice|domain all"),
        (lambda f: f.assign(domain=[None, *f["plate"][1:]]), "'domain'"),
        (lambda f: f.assign(lab=[*f["source"][1:], None]), "'lab'"),
        (lambda f: f[:0], "empty"),
    ],
)
def test_each_fault_has_one_error(change, word):
    with pytest.raises(DataError, match=word):
        table(change(rows()))


def test_unknown_labels_are_allowed_and_reported():
    frame = rows()
    frame["label"] = frame["label"].astype(object)
    frame.loc[[0, 1], "label"] = [None, -1]
    made = table(frame)
    assert (made.label[:2] == -1).all()
    assert "2 queries without a label" in made.report()
    assert not set(np.concatenate(list(parts(HoldOut().assign(made)).values()))) & {0, 1}


def test_classes_have_names_of_their_own():
    with pytest.raises(DataError, match="Two classes are called 'x'"):
        PlateTable(rows(), ("x", "x"), ("grey",))
    with pytest.raises(ConfigError, match="'x' comes twice"):
        CsvPlates("p.csv", ["grey"], classes=["x", "y", "x"])
    report = PlateTable(rows(), ("1 µM", "1 \u03bcM"), ("grey",)).report()
    assert "names are alike, and which may be one: '1 \\xb5M' and '1 \\u03bcM'" in report
    assert "alike" not in table().report()


def test_a_file_of_two_sites_is_refused(tmp_path):
    paths = [f"{well}.png" for well in rows(1, 1, 1)["well"]]
    source = CsvPlates(write_csv(tmp_path, path=[*paths[:-1], paths[0]]), ["grey"])
    (tmp_path / "A00.png").touch()
    with pytest.raises(DataError, match=r"A00.png for lab0\|b0\|007 A00 site 1 and for .* B03"):
        check_images(source.load(), source)
    source = CsvPlates(write_csv(tmp_path, path=paths), ["grey"])
    check_images(source.load(), source)


def test_plates_with_few_controls_are_named_or_counted():
    frame = rows()
    gone = (frame["plate"] == "10") & (frame["source"] == "lab1") & (frame["role"] == "control")
    made = table(frame[~gone])
    assert "1 plates without controls: lab1|b1|10" in made.report()
    with pytest.raises(DataError, match=r"1 of 16 plates.*lab1\|b1\|10 \(0\).*few_controls"):
        made.require_controls(3)
    kept = made.require_controls(3, exclude=["few_controls"])
    assert len(kept.domains) == 15
    assert [(e.kind, e.count) for e in kept.excluded] == [("few_controls", 8)]
    assert made.require_controls(0) is made
    with pytest.raises(DataError, match="no site is left"):
        made.require_controls(99, exclude=["few_controls"])


def test_exclusions_add_up():
    made = table()
    for d in range(3):
        made = made.drop(made.domain == 0, Exclusion("few_controls", f"plate {d}", 0))
    assert len(made.domains) == 13
    assert sum(e.count for e in made.excluded) == 36
    assert made.report().count("excluded") == 3


def test_confounding_is_seen_and_its_absence_too():
    told, chance = (
        position_accuracy(t.frame["well"].factorize()[0][q], t.label[q], t.domain[q])
        for t in (table(), table(shuffle=True))
        for q in [~t.control]
    )
    assert told[0] == 1.0
    assert chance[0] < 0.75
    assert "tells the class of 100.0%" in table().report()
    assert "new_wells" in table().report()


def parts(found):
    return {"train": found.train, "val": found.val, **found.tests}


@pytest.mark.parametrize(
    ("split", "names", "group"),
    [
        (HoldOut(new_labs=["lab1"]), {"in_domain", "new_batch", "new_lab"}, "batch"),
        (HoldOut(new_batches=["b2", "lab0|b3"], in_domain=0), {"new_batch"}, "batch"),
        (
            HoldOut(new_batches=1, val_batches=0, val_plates=2, new_plates=2, new_wells=1),
            {"in_domain", "new_wells", "new_plate", "new_batch"},
            "domain",
        ),
        (GroupFolds("lab", 1, 2), {"new_lab"}, "lab"),
        (GroupFolds("batch", 2, 4), {"new_batch"}, "batch"),
        (GroupFolds("batch", 0, 4, val_group="plate", new_wells=1), {"new_batch"}, "batch"),
        (GroupFolds("plate", 0, 4, val_group="plate"), {"new_plate"}, "domain"),
        (GroupFolds("image", 0, 4), {"in_domain"}, None),
    ],
)
def test_splits_keep_groups_whole(split, names, group):
    made = table()
    found = check_assignment(made, split.assign(made))
    assert set(found.tests) == names
    everything = np.concatenate(list(parts(found).values()))
    assert len(set(everything)) == len(everything)
    assert not made.control[everything].any()
    assert len(found.train)
    assert all(len(part) for part in found.tests.values())
    again = split.assign(made)
    for name, part in parts(found).items():
        assert (part == parts(again)[name]).all()
    if group is None:
        return
    value = made.column("lab")
    if group == "batch":
        value = value + made.column("batch")
    elif group == "domain":
        value = made.column("domain")
    own = set(names) - {"in_domain", "new_wells"}
    for name in own:
        assert not set(value[parts(found)[name]]) & set(value[found.train])


def test_new_wells_are_new():
    made = table()
    for split in (HoldOut(new_wells=2, in_domain=0.3), GroupFolds("batch", 0, 4, new_wells=2)):
        found = split.assign(made)
        tested = found.tests.get("new_wells", found.tests.get("new_batch"))
        wells = made.column("well")
        assert not set(wells[tested]) & set(wells[found.train])
        assert {tuple(sorted(made.label[tested]))} == {tuple(sorted([0, 1] * (len(tested) // 2)))}


def test_folds_test_each_query_once():
    made = table()
    tested = np.concatenate(
        [next(iter(GroupFolds("batch", k, 4).assign(made).tests.values())) for k in range(4)]
    )
    assert sorted(tested) == sorted(np.flatnonzero(~made.control))


def test_a_leaking_split_is_refused():
    made = table()
    query = np.flatnonzero(~made.control)
    leak = Assignment(query[:4], query[4:8], {})
    with pytest.raises(DataError, match=r"lab0\|b0\|00 is in train and in val"):
        check_assignment(made, leak)
    with pytest.raises(DataError, match="several parts"):
        check_assignment(made, Assignment(query[:4], tests={"in_domain": query[3:5]}))
    check_assignment(made, Assignment(query[:4], tests={"in_domain": query[4:8]}))


@pytest.mark.parametrize(
    ("make", "error", "word"),
    [
        (lambda: HoldOut(new_labs=["lab7"]).assign(table()), DataError, "lab7"),
        (lambda: HoldOut(new_batches=["b7"]).assign(table()), DataError, "b7"),
        (lambda: HoldOut(new_batches=8).assign(table()), DataError, "new_batches"),
        (lambda: HoldOut(new_wells=4).assign(table()), DataError, "new_wells"),
        (lambda: HoldOut(in_domain=1.0), ConfigError, "in_domain"),
        (lambda: HoldOut(new_batches=-1), ConfigError, "0 or more"),
        (lambda: HoldOut(val_plates=1.5), ConfigError, "whole numbers"),
        (lambda: HoldOut(new_batches=float("nan")), ConfigError, "0 or more"),
        (lambda: HoldOut(new_batches="b3"), ConfigError, "'b3'.*a name alone is no list"),
        (lambda: GroupFolds(fold=5), ConfigError, "fold"),
        (lambda: GroupFolds(val_fraction=1.0), ConfigError, "val_fraction"),
        (lambda: GroupFolds("lab", 0, 3).assign(table()), DataError, "folds"),
        (lambda: GroupFolds("lab", 0, 2).assign(table(batches=1)), DataError, "val_group"),
        (
            lambda: GroupFolds("batch", 0, 4, val_fraction=0.99).assign(table()),
            DataError,
            "validation would leave none.*lower `val_fraction`",
        ),
        (lambda: GroupFolds("image", 0, 999).assign(table()), DataError, "for 999 folds"),
        (lambda: OfficialSplit().assign(table()), DataError, "official"),
        (lambda: OfficialSplit([]), ConfigError, "tests"),
    ],
)
def test_what_cannot_be_split_says_so(make, error, word):
    with pytest.raises(error, match=word):
        make()


# --- CSV -----------------------------------------------------------------------------------------


def write_csv(folder, **columns):
    frame = rows(labs=1, batches=1, plates=1).assign(**columns)
    frame["label"] = frame["label"].map({0: "x", 1: "y", -1: None})
    frame["plate"] = "007"
    frame.to_csv(folder / "plates.csv", index=False)
    return str(folder / "plates.csv")


def test_a_csv_becomes_the_table(tmp_path):
    source = CsvPlates(write_csv(tmp_path), ["grey"])
    assert source.class_names == CLASSES
    assert (source.num_classes, source.in_channels) == (2, 1)
    made = source.load()
    assert made.domains == ("lab0|b0|007",)  # no number
    assert made.label[:8].tolist() == [0, 1] * 4
    assert made.paths()[0] == (str(tmp_path / "q.png"),)
    (elsewhere := tmp_path / "elsewhere").mkdir()
    other = CsvPlates(
        write_csv(tmp_path), ["grey"], classes=["y", "x"], files={"root": str(elsewhere)}
    ).load()
    assert other.label[:8].tolist() == [1, 0] * 4
    assert other.paths()[0] == (str(elsewhere / "q.png"),)


def test_a_csv_with_a_strange_label_stops_or_counts(tmp_path):
    path = write_csv(tmp_path)
    with pytest.raises(DataError, match=r"'y'.*unknown_label"):
        CsvPlates(path, ["grey"], classes=["x"]).load()
    made = CsvPlates(path, ["grey"], classes=["x"], exclude=["unknown_label"]).load()
    assert [(e.kind, e.count) for e in made.excluded] == [("unknown_label", 4)]
    assert set(made.label[~made.control]) == {0}


def test_a_csv_with_a_missing_channel_stops_or_counts(tmp_path):
    path = write_csv(tmp_path, path_a="a.png", path_b=["b.png"] * 11 + [None])
    frame = pd.read_csv(path).drop(columns="path")
    frame.to_csv(path, index=False)
    with pytest.raises(DataError, match=r"first path_b of plate 7, well B03.*missing_channel"):
        CsvPlates(path, ["a", "b"]).load()
    made = CsvPlates(path, ["a", "b"], exclude=["missing_channel"]).load()
    assert len(made) == 11
    with pytest.raises(DataError, match="path_c"):
        CsvPlates(path, ["a", "b", "c"], exclude=["missing_channel"]).load()


def test_a_csv_without_roles_is_refused(tmp_path):
    rows(1, 1, 1).drop(columns="role").to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(DataError, match=r"'role'.*query or control"):
        CsvPlates(str(tmp_path / "a.csv"), ["grey"]).load()
    with pytest.raises(DataError, match="no data"):
        CsvPlates(str(tmp_path / "b.csv"), ["grey"], classes=["x"]).load()
    with pytest.raises(ConfigError, match="typo"):
        CsvPlates(str(tmp_path / "a.csv"), ["grey"], exclude=["typo"])
    with pytest.raises(ConfigError, match="channels"):
        CsvPlates(str(tmp_path / "a.csv"), [])


NAMES = ["NA", "None", "null", "nan", "N/A", "NULL", "#N/A", "<NA>", "NaN", "-nan", "1.#IND", "n/a"]


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".parquet"])
def test_only_an_empty_cell_is_missing(tmp_path, suffix):
    frame = rows(labs=1, batches=1, plates=1, queries=len(NAMES) + 1)
    frame["label"] = [*NAMES, "", *[""] * 4]
    frame[["source", "batch", "plate", "site"]] = "NA"
    path = tmp_path / f"plates{suffix}"
    (frame.to_parquet if suffix == ".parquet" else frame.to_csv)(path, index=False)
    source = CsvPlates(str(path), ["grey"])
    assert source.class_names == tuple(sorted(NAMES))
    made = source.load()
    assert made.domains == ("NA|NA|NA",)
    assert [source.class_names[c] for c in made.label[: len(NAMES)]] == NAMES
    assert made.label[len(NAMES)] == -1


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_rows_without_any_cell_are_none(tmp_path, suffix):
    frame = pd.read_csv(write_csv(tmp_path), dtype=str)
    empty = pd.DataFrame([dict.fromkeys(frame.columns)] * 2)
    path = tmp_path / f"a{suffix}"
    longer = pd.concat([frame, empty])
    (longer.to_parquet if suffix == ".parquet" else longer.to_csv)(path, index=False)
    assert len(CsvPlates(str(path), ["grey"]).load()) == len(frame)


def test_parquet_reads_as_csv_does(tmp_path):
    frame = rows(labs=1, batches=1, plates=1)
    frame = frame.assign(batch=3, site=pd.array([1] * 11 + [None], "Int64"), plate=b"p")
    frame["label"] = pd.Categorical(frame["label"].map({0: "x", 1: "y", -1: None}))
    frame["site"] = frame["site"].fillna(2).astype(float)
    frame.to_parquet(tmp_path / "plates.parquet")
    frame.assign(plate="p").to_csv(tmp_path / "plates.csv", index=False)
    one, two = (CsvPlates(str(tmp_path / f"plates{end}"), ["grey"]) for end in (".parquet", ".csv"))
    assert one.class_names == two.class_names == CLASSES
    assert one.load().frame["plate"].tolist() == two.load().frame["plate"].tolist()
    assert one.load().frame["batch"].tolist() == two.load().frame["batch"].tolist()
    frame.assign(well=[["A01"]] * 12).to_parquet(tmp_path / "lists.parquet")
    with pytest.raises(DataError, match=r"lists\.parquet.*not a name"):
        CsvPlates(str(tmp_path / "lists.parquet"), ["grey"]).load()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PK\x03\x04" + bytes(40), "spreadsheet"),
        (b"\xd0\xcf\x11\xe0" + bytes(40), "spreadsheet"),
        (b"PAR1" + bytes(40), r"parquet"),
        ("role,label\nquery,x\n".encode("utf-16"), "UTF-16"),
        (b"role;label;path\nquery;x;a.png\n", "semicolons"),
        (b"role\tlabel\tpath\nquery\tx\ta.png\n", "tabs"),
        (b"role,label,label\nquery,x,y\n", "two columns 'label'"),
        (b"\xef\xbb\xbfrole,role\nquery,query\n", "two columns 'role'"),
        (b"role,label,path\n", "no site"),
        (b"role,label,path\nquery,x ,a.png\n", "'x ', with a blank"),
        (b'role,label,path\nquery,"x\ny",a.png\n', r"'x\\ny', which is no name"),
        (b"role,label,path\nquery,x\x00,a.png\n", "which is no name"),
        (b'role,label,path\nquery,"x,a.png\nquery,"x,b.png\n', "a quote is not closed"),
        (b"role,label,path,Lab\nquery,x,a.png,y\n", "column 'Lab', which is not read: 'lab'"),
        (b"role,label, path \nquery,x,a.png\n", "column ' path ', which is not read"),
    ],
)
def test_what_is_no_such_table_is_named(tmp_path, content, words):
    (tmp_path / "plates.csv").write_bytes(content)
    with pytest.raises(DataError, match=words):
        CsvPlates(str(tmp_path / "plates.csv"), ["grey"]).load()


def test_parquet_is_read_with_its_index_and_by_the_values_of_its_categories(tmp_path):
    frame = rows().assign(lab="one", site=pd.Categorical(np.ones(len(rows()))))
    frame.assign(label="x", batch=1e22).set_index("lab").to_parquet(tmp_path / "plates.parquet")
    read = CsvPlates(str(tmp_path / "plates.parquet"), ["grey"]).load().frame
    assert {*read["lab"]} == {"one"}
    assert {*read["site"]} == {"1"}
    assert {*read["batch"]} == {"1e+22"}


def test_a_site_and_a_file_have_one_name(tmp_path):
    twice = rows().assign(site=["1", "1.0"] * (len(rows()) // 2))
    twice.loc[1, "well"] = twice.loc[0, "well"]
    with pytest.raises(DataError, match=r"the sites '1' and '1\.0', which are one"):
        table(twice)
    path = write_csv(tmp_path, path_a="i/a.png", path_b=["b.png"] * 10 + ["i/./a.png", "i\\a.png"])
    pd.read_csv(path).drop(columns="path").to_csv(path, index=False)
    with pytest.raises(DataError, match=r"2 sites with one file for two channels, a and b"):
        CsvPlates(path, ["a", "b"]).load()
    frame = rows()
    frame["path"] = [f"i/{k}.png" for k in range(len(frame) - 1)] + ["i/../i//0.png"]
    with pytest.raises(DataError, match="share a file"):
        refuse_shared_files(table(frame))


def test_a_folder_is_no_table(tmp_path):
    with pytest.raises(DataError, match="is a folder, and no table"):
        CsvPlates(str(tmp_path), ["grey"]).load()


def test_other_columns_called_path_are_no_channels(tmp_path):
    masks = [None, *["m.png"] * 11]
    path = write_csv(tmp_path, path_mask=masks)
    assert len(CsvPlates(path, ["grey"], exclude=["missing_channel"]).load()) == 12
    with pytest.raises(DataError, match="'path' and 'path_mask'"):
        CsvPlates(path, ["mask"]).load()
    path = write_csv(tmp_path, path_a="a.png", path_b="b.png", path_mask=masks)
    pd.read_csv(path).drop(columns="path").to_csv(path, index=False)
    made = CsvPlates(path, ["a", "b"], exclude=["missing_channel"]).load()
    assert len(made) == 12
    assert made.excluded == ()


def test_one_file_for_two_channels_stops_or_counts(tmp_path):
    path = write_csv(tmp_path, path_a="a.png", path_b=["b.png"] * 10 + ["a.png"] * 2)
    pd.read_csv(path).drop(columns="path").to_csv(path, index=False)
    with pytest.raises(DataError, match=r"2 sites with one file for two channels, a and b"):
        CsvPlates(path, ["a", "b"]).load()
    made = CsvPlates(path, ["a", "b"], exclude=["same_channel"]).load()
    assert [(e.kind, e.count) for e in made.excluded] == [("same_channel", 2)]


def test_a_hint_adds_to_the_words_in_force(tmp_path):
    path = write_csv(tmp_path, path_a="a.png", path_b=["b.png"] * 10 + ["a.png", None])
    pd.read_csv(path).drop(columns="path").to_csv(path, index=False)
    with pytest.raises(DataError, match=r"exclude=\[missing_channel,unknown_label\]"):
        CsvPlates(path, ["a", "b"], classes=["x"], exclude=["missing_channel"]).load()
    words = ["missing_channel", "unknown_label"]
    with pytest.raises(DataError, match=r"exclude=\[missing_channel,same_channel,unknown_label\]"):
        CsvPlates(path, ["a", "b"], classes=["x"], exclude=words).load()
    assert (
        len(CsvPlates(path, ["a", "b"], classes=["x"], exclude=[*words, "same_channel"]).load())
        == 6
    )
    with pytest.raises(DataError, match=r"exclude=\[constant,few_controls\]"):
        table().require_controls(9, ["constant"])


def test_a_well_has_one_spelling(tmp_path):
    plain = rows()
    short = plain.assign(well=[f"{w[0].lower()}{int(w[1:]) + 1}" for w in plain["well"]])
    spelled = table(short).frame["well"]
    assert table(short).written_wells[:2].tolist() == ["a1", "a2"]  # as predictions name them
    assert spelled[:2].tolist() == ["A01", "A02"]
    # plates may differ in it, one plate may not
    mixed = short.assign(well=short["well"].mask(short["source"] == "lab0", spelled))
    assert table(mixed).frame["well"].equals(spelled)
    mixed.loc[1, ["well", "site"]] = ["a1", "2"]
    with pytest.raises(DataError, match=r"plate lab0\|b0\|00 in two ways: A01 and a1"):
        table(mixed)


def test_paths_of_another_machine_find_the_images(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    names = [f"{well}.png" for well in rows(1, 1, 1)["well"]]
    for name in names:
        (images / name).touch()
    here = {str(images / name) for name in names}
    for start, prefixes in (
        ("/home/someone/plates/", {"/home/someone/plates/": "images/"}),
        ("D:\\plates\\", {"D:\\plates\\": "images\\"}),
        ("images\\", {}),
    ):
        path = write_csv(tmp_path, path=[start + name for name in names])
        source = CsvPlates(path, ["grey"], files={"prefixes": prefixes})
        assert {name for (name,) in source.load().paths()} == here
        check_images(source.load(), source)
    source = CsvPlates(write_csv(tmp_path, path="/home/someone/q.png"), ["grey"])
    with pytest.raises(DataError, match=r"None of the 1 plates.*/home/someone/q.*root.*prefixes"):
        check_images(source.load(), source)


# --- RxRx1 ---------------------------------------------------------------------------------------


@pytest.fixture
def rxrx1(tmp_path):
    """Two training experiments, one for validation, one for the test; 2 plates; a few wells."""
    out = []
    for experiment, part in (("A-1", "train"), ("A-2", "train"), ("B-1", "val"), ("B-2", "test")):
        for plate in (1, 2):
            wells = [("B02", 3), ("B03", 1107), ("B04", 1108), ("B05", 1137), ("B06", 1138)]
            for well, sirna in wells:
                for site in (1, 2):
                    folder = tmp_path / "images" / experiment / f"Plate{plate}"
                    folder.mkdir(parents=True, exist_ok=True)
                    pixels = np.full((8, 8, 3), sirna % 251, np.uint8)
                    pixels[0, 0] = plate
                    Image.fromarray(pixels).save(folder / f"{well}_s{site}.png")
                    cell = "HEPG2" if experiment[0] == "A" else "U2OS"
                    out.append((cell, part, experiment, plate, well, site, sirna))
    names = ["cell_type", "dataset", "experiment", "plate", "well", "site", "sirna_id"]
    pd.DataFrame(out, columns=names).to_csv(tmp_path / "metadata.csv", index=False)
    return str(tmp_path)


def test_rxrx1_as_wilds_ships_it(rxrx1):
    source = RxRx1Plates(rxrx1)
    assert (source.num_classes, source.in_channels) == (1108, 3)
    made = source.load()
    assert len(made.domains) == 8
    assert (made.counts() == [4, 4]).all()
    row = int(np.flatnonzero(made.label == 1107)[0])
    image = source.reader(made.paths()[row])
    assert image.shape == (3, 8, 8)
    assert (image[:, 1:] == 1107 % 251).all()
    found = check_assignment(made, OfficialSplit().assign(made))
    assert set(made.column("site")[found.train]) == {"1"}
    assert set(made.column("site")[found.tests["in_domain"]]) == {"2"}
    assert set(made.column("batch")[found.train]) == {"A-1", "A-2"}
    assert set(made.column("batch")[found.tests["new_batch"]]) == {"B-2"}
    assert "8 plates" in made.report()
    assert "16 sites of controls that are not used" in made.report()


def test_rxrx1_controls_and_domains_can_be_chosen(rxrx1):
    negative = RxRx1Plates(rxrx1, controls="negative", domain="experiment")
    assert negative.num_classes == 1138
    made = negative.load()
    assert len(made.domains) == 4
    assert (made.counts() == [16, 4]).all()
    assert made.label.max() == 1137
    assert (RxRx1Plates(rxrx1, controls="both").load().counts() == [4, 6]).all()
    assert len(RxRx1Plates(rxrx1, cell_types=["U2OS"]).load().domains) == 4


def test_rxrx1_faults_are_named(rxrx1, tmp_path):
    with pytest.raises(DataError, match="K562"):
        RxRx1Plates(rxrx1, cell_types=["K562"]).load()
    with pytest.raises(ConfigError):
        RxRx1Plates(rxrx1, controls="all")
    frame = pd.read_csv(tmp_path / "metadata.csv")
    frame.assign(sirna_id=1139).to_csv(tmp_path / "metadata.csv", index=False)
    with pytest.raises(DataError, match="1139"):
        RxRx1Plates(rxrx1).load()
    frame.drop(columns="well").to_csv(tmp_path / "metadata.csv", index=False)
    with pytest.raises(DataError, match="'well'"):
        RxRx1Plates(rxrx1).load()


def test_raw_rxrx1_is_told_from_that_of_wilds(rxrx1):
    source = RxRx1Plates(rxrx1)
    table = source.load()
    check_images(table, source)
    for (path,) in table.paths():
        os.rename(path, path.replace(".png", "_w1.png"))
    with pytest.raises(DataError, match="as Recursion gives them"):
        check_images(table, source)
