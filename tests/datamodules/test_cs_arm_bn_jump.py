"""The JUMP reader: both path forms, its traps, its errors; real plate tables; the generator."""

import csv
import gzip
import importlib.util
import io
import os
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
from fakes.cs_arm_bn import TINY_WORLD

from fulgurite.datamodules.cs_arm_bn import (
    JumpPlates,
    Perturbations,
    PlateSelection,
    PlateTable,
    SyntheticPlates,
)
from fulgurite.datamodules.cs_arm_bn.cells import PHENOTYPES, Phenotype, render_cells
from fulgurite.datamodules.cs_arm_bn.effects import LabSetting, blur, draw_effect
from fulgurite.datamodules.cs_arm_bn.jump import CHANNELS
from fulgurite.datamodules.cs_arm_bn.site_readers import FileReader
from fulgurite.datamodules.cs_arm_bn.sources import check_images
from fulgurite.datamodules.cs_arm_bn.synthetic import (
    NEGATIVE_CONTROL,
    class_wells,
    control_wells,
    render_plate,
)
from fulgurite.errors import ConfigError, DataError, MissingExtraError

ELSEWHERE = {"s3://cellpainting-gallery/": "", "/mnt/bucket/": ""}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bucket")
    SyntheticPlates(TINY_WORLD, path=str(folder)).prepare()
    return folder


@pytest.fixture
def bucket(made, tmp_path):
    """A copy that a test may spoil; images are links."""
    root = tmp_path / "bucket"
    for path in made.rglob("*"):
        target = root / path.relative_to(made)
        if path.is_dir():
            target.mkdir(parents=True)
        elif path.suffix.startswith(".tif"):
            target.symlink_to(path)
        else:
            target.write_bytes(path.read_bytes())
    return root


def read(root, **options):
    groups = {"files": {"prefixes": ELSEWHERE}}
    for group, kind in (("selection", PlateSelection), ("perturbations", Perturbations)):
        names = options.keys() & kind.__dataclass_fields__.keys()
        groups[group] = kind(**{name: options.pop(name) for name in names})
    return JumpPlates(str(root), **groups, **options).load()


def load_data(root, source="source_3"):
    return sorted(root.glob(f"cpg0016-jump/{source}/workspace/load_data_csv/*/*/load_data.csv"))


def edit(path, change):
    compressed = path.suffix == ".gz"
    text = gzip.decompress(path.read_bytes()).decode() if compressed else path.read_text()
    frame = change(pd.read_csv(io.StringIO(text), dtype=str))
    text = frame.to_csv(index=False)
    path.write_bytes(gzip.compress(text.encode()) if compressed else text.encode())


def test_what_the_generator_writes_the_reader_reads(made):
    table = read(made)
    assert len(table.domains) == 3
    assert (table.counts() == [8, 4]).all()
    assert table.channels == CHANNELS == ("RNA", "ER", "AGP", "Mito", "DNA")
    assert table.class_names[0] == "TC-S-7004"
    assert table.class_names[7] == "aloxistatin"
    for row in range(len(table)):
        line = table.frame.iloc[row]
        assert (line["role"] == "control") == (line["well"] in control_wells(4))
        if line["role"] == "query":
            jcp = sorted(PHENOTYPES)[line["label"]]
            assert line["well"] in class_wells(1)[jcp]
        site = FileReader(5)(table.paths()[row])
        assert site.shape == (5, 8, 8)
        assert site.dtype == np.uint16
    assert all(Path(path).is_file() for paths in table.paths() for path in paths)
    # a plate's folder of images is not called like the plate
    assert not any(f"/{line}/" in table.paths()[0][0] for line in table.frame["plate"])


def test_both_path_forms_are_there_and_give_the_same_kind_of_path(made):
    forms = {source: load_data(made, source)[0] for source in ("source_3", "source_8")}
    with open(forms["source_3"]) as first, open(forms["source_8"]) as second:
        assert "URL_OrigDNA" in next(csv.reader(first))
        header = next(csv.reader(second))
    assert "FileName_OrigDNA" in header
    assert "PathName_OrigDNA" in header
    assert "URL_OrigDNA" not in header


def test_names_that_look_like_numbers_stay_names(made):
    table = read(made, sources=["source_3"])
    assert all(name.startswith("00") for name in table.frame["plate"])
    assert set(table.frame["site"]) == {"1"}
    assert set(read(made, sources=["source_8"]).frame["site"]) == {"0"}  # some count from 0


@pytest.mark.parametrize("suffix", [".csv.gz", ".parquet"])
def test_tables_may_be_compressed_or_parquet(bucket, suffix):
    before = read(bucket)
    for source in ("source_3", "source_8"):
        for path in load_data(bucket, source):
            if suffix == ".csv.gz":
                path.with_suffix(suffix).write_bytes(gzip.compress(path.read_bytes()))
            else:
                pytest.importorskip("pyarrow")
                frame = pd.read_csv(path, dtype={"Metadata_Plate": str})
                frame["Metadata_Site"] = frame["Metadata_Site"].astype(float)  # as pandas would
                frame.to_parquet(path.with_suffix(suffix))
            path.unlink()
    after = read(bucket)
    assert after.paths() == before.paths()
    assert after.frame[["domain", "well", "site", "role", "label"]].equals(
        before.frame[["domain", "well", "site", "role", "label"]]
    )


def test_parquet_without_pyarrow_names_the_extra(bucket, monkeypatch):
    path = load_data(bucket)[0]
    pd.read_csv(path).to_parquet(path.with_suffix(".parquet"))
    path.unlink()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pyarrow.*fulgurite\[plates\]"):
        read(bucket)


def test_addresses_stay_addresses_when_nothing_is_local(made):
    table = JumpPlates(
        str(made), files={"prefixes": {}}, selection={"sources": ["source_3"]}
    ).load()
    assert table.paths()[0][0].startswith("s3://cellpainting-gallery/cpg0016-jump/source_3/images/")


def test_paths_of_another_machine_name_the_option_with_its_value(made):
    source = JumpPlates(str(made))  # the second laboratory's paths begin with /mnt/bucket/
    check_images(source.load(), source)  # the first one's are there
    alone = JumpPlates(str(made), selection={"sources": ["source_8"]})
    with pytest.raises(DataError, match=r"prefixes=\{'s3://cellpainting-gallery/': '', '/home/U"):
        check_images(alone.load(), alone)


def test_images_are_fetched_through_fsspec(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    pixels = np.arange(16, dtype=np.uint16).reshape(4, 4)
    tifffile.imwrite(tmp_path / "a.tiff", pixels)
    with fsspec.open("memory://plates/a.tiff", "wb") as file:
        file.write((tmp_path / "a.tiff").read_bytes())
    assert (FileReader(2, remote=["memory://"])(["memory://plates/a.tiff"] * 2) == pixels).all()
    with pytest.raises(DataError, match=r"memory://plates/none\.tiff"):
        FileReader(1, remote=["memory://"])(["memory://plates/none.tiff"])


def test_the_bucket_without_s3fs_names_the_extra():
    if importlib.util.find_spec("s3fs"):
        pytest.skip("s3fs is installed")
    with pytest.raises(MissingExtraError, match=r"fulgurite\[plates\]"):
        FileReader(1, remote=["s3://"])(["s3://cellpainting-gallery/cpg0016-jump/a.tiff"])


def test_empty_wells_are_no_controls_and_other_plates_are_not_looked_for(bucket):
    def empty(frame):
        frame.loc[frame["Metadata_Well"] == "A02", "Metadata_JCP2022"] = "JCP2022_999999"
        return frame

    edit(bucket / "metadata" / "well.csv.gz", empty)
    table = read(bucket)
    assert (table.counts() == [8, 3]).all()
    assert "3 sites of empty wells" in table.report()
    with pytest.raises(DataError, match=r"load_data.*T2-1|T2-1"):
        read(bucket, plate_types=["TARGET2"])


@pytest.mark.parametrize(
    "jcp",
    [
        "JCP2022_X",
        pytest.param("", marks=pytest.mark.slow),
        pytest.param("DMSO", marks=pytest.mark.slow),
    ],
)
def test_unknown_identifiers_stop_or_count(bucket, jcp):
    def spoil(frame):
        first = frame["Metadata_Plate"] == frame["Metadata_Plate"].iloc[0]
        frame.loc[first & (frame["Metadata_Well"] == "A02"), "Metadata_JCP2022"] = jcp
        return frame

    edit(bucket / "metadata" / "well.csv.gz", spoil)
    with pytest.raises(DataError, match=r"1 sites with an unknown .*A02.*exclude=\[unknown_id\]"):
        read(bucket)
    table = read(bucket, exclude=["unknown_id"])
    assert len(table) == 35
    assert [(e.kind, e.count) for e in table.excluded] == [("unknown_id", 1)]


def test_unidentified_wells_matter_where_other_perturbations_are_taken(bucket):
    def spoil(frame):
        frame.loc[frame["Metadata_Well"] == "A02", "Metadata_JCP2022"] = "JCP2022_UNKNOWN"
        return frame

    edit(bucket / "metadata" / "well.csv.gz", spoil)
    table = read(bucket)
    assert (table.counts() == [8, 3]).all()
    assert "3 sites of empty wells and other perturbations" in table.report()
    with pytest.raises(DataError, match=r"3 sites with an unknown .*JCP2022_UNKNOWN.*unknown_id"):
        read(bucket, treatments=True)
    assert len(read(bucket, treatments=True, exclude=["unknown_id"])) == 33


def test_tables_of_other_perturbations_alone_are_not_enough(bucket):
    (bucket / "metadata" / "crispr.csv").write_text("Metadata_JCP2022\nJCP2022_800001\n")
    assert len(read(bucket)) == 36  # the classes and controls are known without them

    def treat(frame):
        frame.loc[frame["Metadata_Well"] == "A02", "Metadata_JCP2022"] = "JCP2022_000123"
        return frame

    edit(bucket / "metadata" / "well.csv.gz", treat)
    with pytest.raises(
        DataError, match=r"JCP2022_000123.*no table compound.*Put compound\.csv\.gz"
    ):
        read(bucket, exclude=["unknown_id"])


def test_identifiers_are_checked_against_the_perturbation_tables(bucket):
    def treat(frame):
        frame.loc[frame["Metadata_Well"] == "A02", "Metadata_JCP2022"] = "JCP2022_000123"
        return frame

    edit(bucket / "metadata" / "well.csv.gz", treat)
    assert len(read(bucket)) == 33  # another compound: known form, not used
    compounds = bucket / "metadata" / "compound.csv"
    compounds.write_text("Metadata_JCP2022\nJCP2022_000999\n")
    with pytest.raises(DataError, match="JCP2022_000123"):
        read(bucket)
    compounds.write_text("Metadata_JCP2022\nJCP2022_000123\n")
    table = read(bucket, treatments=True)
    assert ((table.label == -1) & ~table.control).sum() == 3


def test_a_missing_channel_stops_or_counts(bucket):
    def lose(frame):
        frame.loc[3, "URL_OrigMito"] = None
        return frame

    edit(load_data(bucket)[0], lose)
    with pytest.raises(DataError, match=r"first Mito of site.*exclude=\[missing_channel\]"):
        read(bucket)
    table = read(bucket, exclude=["missing_channel"])
    assert len(table) == 35
    assert table.excluded[0].count == 1
    edit(load_data(bucket)[0], lambda frame: frame.drop(columns="URL_OrigMito"))
    with pytest.raises(DataError, match="no channel Mito"):
        read(bucket, exclude=["missing_channel"])
    assert read(bucket, channels=["RNA", "DNA"]).channels == ("RNA", "DNA")


def test_a_plate_without_load_data_stops_or_counts(bucket):
    load_data(bucket)[1].unlink()
    with pytest.raises(DataError, match=r"1 plates without load_data: source_3\|CP_26"):
        read(bucket)
    table = read(bucket, exclude=["missing_plate"])
    assert len(table.domains) == 2
    assert "source_3|CP_26" in table.report()
    for source in ("source_3", "source_8"):
        for path in load_data(bucket, source):
            path.unlink()
    with pytest.raises(DataError, match="None of the 3 plates"):
        read(bucket, exclude=["missing_plate"])


@pytest.mark.parametrize(
    "content",
    [
        "header",
        pytest.param("nothing", marks=pytest.mark.slow),
        pytest.param("blank line", marks=pytest.mark.slow),
        "empty gzip",
        "empty parquet",
    ],
)
def test_an_empty_load_data_stops_or_counts(bucket, content):
    path = load_data(bucket)[1]
    header = path.read_text().splitlines()[0]
    path.write_text({"header": header, "nothing": "", "blank line": "\n"}.get(content, ""))
    if content == "empty gzip":
        path.with_suffix(".csv.gz").write_bytes(gzip.compress(b""))
        path.unlink()
    if content == "empty parquet":
        path.rename(path.with_suffix(".parquet"))
    with pytest.raises(DataError, match=r"1 plates whose load_data is empty.*exclude=\[empty_pl"):
        read(bucket)
    table = read(bucket, exclude=["empty_plate"])
    assert len(table.domains) == 2
    assert [(e.kind, e.count) for e in table.excluded] == [("empty_plate", 0)]
    assert "source_3|CP_26" in table.report()


def test_a_plate_of_another_name_stops_or_counts(bucket):
    path = load_data(bucket)[0]
    plate = path.parent.name
    edit(path, lambda frame: frame.assign(Metadata_Plate=f"{plate}real"))
    with pytest.raises(DataError, match=rf"{plate} names the plate {plate}real.*renamed_plate"):
        read(bucket)
    table = read(bucket, exclude=["renamed_plate"])
    assert len(table.domains) == 2
    assert [(e.kind, e.count) for e in table.excluded] == [("renamed_plate", 12)]


def test_one_file_for_two_channels_stops_or_counts(bucket):
    def copy(frame):
        frame.loc[frame["Metadata_Well"] == "A02", "URL_OrigMito"] = frame["URL_OrigAGP"]
        return frame

    edit(load_data(bucket)[0], copy)
    with pytest.raises(DataError, match=r"1 sites with one file for two channels, first AGP and M"):
        read(bucket)
    table = read(bucket, exclude=["same_channel"])
    assert len(table) == 35
    assert [(e.kind, e.count) for e in table.excluded] == [("same_channel", 1)]


def test_every_oddity_at_once_is_counted_and_hints_lead_there(bucket):
    """Following each hint in turn ends with all words in force and each thing counted."""
    first, second = load_data(bucket)
    first.write_text("")

    def spoil(frame):
        frame.loc[1, "URL_OrigMito"] = frame.loc[1, "URL_OrigAGP"]
        frame.loc[2, "URL_OrigDNA"] = None
        return frame

    edit(second, spoil)
    load_data(bucket, "source_8")[0].unlink()
    words = []
    while True:
        try:
            table = read(bucket, exclude=words)
        except DataError as error:
            longer = re.search(r"exclude=\[(.*?)\]", str(error))[1].split(",")
            assert set(words) < set(longer)
            words = longer
        else:
            break
    assert words == ["empty_plate", "missing_channel", "missing_plate", "same_channel"]
    assert sorted(e.kind for e in table.excluded) == words
    assert len(table) == 10


def test_wells_are_spelled_in_two_ways(bucket):
    before = read(bucket)
    for path in load_data(bucket):
        edit(path, lambda f: f.assign(Metadata_Well=f["Metadata_Well"].str.replace("0", "")))
    after = read(bucket)
    assert after.frame[["domain", "well", "label"]].equals(
        before.frame[["domain", "well", "label"]]
    )


def test_stray_wells_stop_or_count(bucket):
    def stray(frame):
        plate = frame["Metadata_Plate"] == frame["Metadata_Plate"].iloc[0]
        jcp = "JCP2022_085227"
        frame.loc[plate & (frame["Metadata_Well"] == "A02"), "Metadata_JCP2022"] = jcp
        return frame

    edit(bucket / "metadata" / "well.csv.gz", stray)
    assert (read(bucket, sources=["source_3"]).label == 7).sum() == 3
    with pytest.raises(DataError, match=r"A02.*stray_well"):
        read(bucket, sources=["source_3"], stray_rows=1)
    table = read(bucket, sources=["source_3"], stray_rows=1, exclude=["stray_well"])
    assert (table.label == 7).sum() == 2


@pytest.mark.parametrize(
    ("name", "change", "word"),
    [
        ("well.csv.gz", lambda f: f.drop(columns="Metadata_JCP2022"), "Metadata_JCP2022"),
        ("plate.csv.gz", lambda f: f.drop(columns="Metadata_Batch"), "Metadata_Batch"),
        (
            "well.csv.gz",
            lambda f: pd.concat([f, f[:1].assign(Metadata_JCP2022=NEGATIVE_CONTROL)]),
            "two perturbations",
        ),
        (
            "perturbation_control.csv",
            lambda f: f[f["Metadata_Name"] != "AMG900"].assign(Metadata_pert_type="x"),
            "There is no class|no site|column|No plate|empty",
        ),
    ],
)
def test_faulty_tables_are_named(bucket, name, change, word):
    edit(bucket / "metadata" / name, change)
    with pytest.raises(DataError, match=word):
        read(bucket)


def test_wrong_choices_are_named(bucket):
    for options, word in (
        ({"sources": ["source_4"]}, "source_4"),
        ({"plates": ["X"]}, "plate X"),
        ({"skip_batches": ["CP_25", "CP_26", "J1"]}, "No plate"),
        ({"classes": ["JCP2022_000001"]}, "JCP2022_000001"),
    ):
        with pytest.raises(DataError, match=word):
            read(bucket, **options)
    with pytest.raises(ConfigError, match="unknown_ids"):
        read(bucket, exclude=["unknown_ids"])
    (bucket / "metadata" / "well.csv.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match="well"):
        read(bucket)
    edit(load_data(bucket)[0], lambda frame: frame.assign(Metadata_Plate="other"))
    with pytest.raises(DataError, match="names the plate other"):
        read(bucket)


def test_a_perturbation_is_described_once(bucket):
    file = bucket / "metadata" / "perturbation_control.csv"
    edit(file, lambda frame: pd.concat([frame, frame]))
    assert (read(bucket).counts() == [8, 4]).all()
    edit(file, lambda frame: frame.assign(Metadata_Name=None))
    assert all(name.startswith("JCP2022_") for name in read(bucket).class_names)
    edit(file, lambda frame: pd.concat([frame, frame.assign(Metadata_pert_type="poscon")]))
    with pytest.raises(DataError, match="two different rows of JCP2022"):
        read(bucket)


def test_choices_that_choose_nothing_are_reported_and_ambiguous_plates_refused(bucket):
    report = read(bucket, skip_batches=["nowhere"], plate_types=["COMPOUND", "X"]).report()
    assert "skip_batches that no plate has: nowhere" in report
    assert "plate_types that no plate has: X" in report
    with pytest.raises(ConfigError, match="The channels are none"):
        read(bucket, channels=[])
    for options in ({"classes": []}, {"modality": "orf"}):
        with pytest.raises(DataError, match="There is no class"):
            read(bucket, **options)
    with pytest.raises(ConfigError, match="stray_rows"):
        read(bucket, stray_rows=-1)
    again = lambda frame: pd.concat([frame, frame[:1].assign(Metadata_Batch="again")])  # noqa: E731
    edit(next((bucket / "metadata").glob("plate.csv*")), again)
    with pytest.raises(DataError, match="is in two batches"):
        read(bucket)


def test_chosen_classes_are_numbered_by_identifier(bucket):
    table = read(bucket, classes=["JCP2022_037716", "JCP2022_025848"])
    assert table.class_names == ("dexamethasone", "AMG900")
    assert (table.counts() == [2, 4]).all()


# --- real tables ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.realdata
def test_real_plate_tables(tmp_path):
    """The published plate and control tables; wells by JUMP's map, images by name only."""
    published = Path(os.environ["FULGURITE_DATA"]) / "jump_metadata"
    metadata = tmp_path / "metadata"
    metadata.mkdir()
    for name in ("plate.csv.gz", "perturbation_control.csv"):
        (metadata / name).symlink_to((published / name).absolute())
    plates = pd.read_csv(published / "plate.csv.gz", dtype=str)
    skipped = [
        "CP_33_all_Phenix1",
        "CP_34_mix_Phenix1",
        "CP_35_all_Phenix1",
        "CP_36_all_Phenix1",
    ]
    chosen = plates[
        plates["Metadata_Source"].isin(["source_3", "source_8"])
        & (plates["Metadata_PlateType"] == "COMPOUND")
        & ~plates["Metadata_Batch"].isin(skipped)
    ]
    layout = {well: jcp for jcp, wells in class_wells().items() for well in wells}
    layout |= dict.fromkeys(control_wells(), NEGATIVE_CONTROL)
    wells = []
    for source, batch, plate in chosen.iloc[:, :3].itertuples(index=False):
        wells += [(source, plate, well, jcp) for well, jcp in layout.items()]
        place = f"s3://cellpainting-gallery/cpg0016-jump/{source}/images/{batch}/images/{plate}__x"
        lines = [f"Metadata_{k}" for k in ("Source", "Batch", "Plate", "Well", "Site")]
        lines = [",".join([*lines, *(f"URL_Orig{channel}" for channel in CHANNELS)])]
        for well in layout:
            paths = [f"{place}/{well}-{channel}.tiff" for channel in CHANNELS]
            lines.append(",".join([source, batch, plate, well, "1", *paths]))
        folder = tmp_path / f"cpg0016-jump/{source}/workspace/load_data_csv/{batch}/{plate}"
        folder.mkdir(parents=True)
        (folder / "load_data.csv").write_text("\n".join(lines))
    names = [f"Metadata_{k}" for k in ("Source", "Plate", "Well", "JCP2022")]
    pd.DataFrame(wells, columns=names).to_csv(metadata / "well.csv.gz", index=False)
    source = JumpPlates(
        str(tmp_path),
        selection={"sources": ["source_3", "source_8"], "skip_batches": skipped, "stray_rows": 3},
    )
    table = source.load()
    assert table.paths()[0][0].startswith(f"{tmp_path}/cpg0016-jump/source_3/images/")
    # docs/papers/cs_arm_bn.md section 2.1: 9 batches with 172 plates, and 4 with 199
    assert len(table.domains) == 371
    by_source = table.frame.groupby("source")
    assert by_source["batch"].nunique().to_dict() == {"source_3": 9, "source_8": 4}
    assert by_source["domain"].nunique().to_dict() == {"source_3": 172, "source_8": 199}
    assert (table.counts() == 32).all()
    assert table.class_names == (
        "TC-S-7004",
        "dexamethasone",
        "LY2109761",
        "AMG900",
        "FK-866",
        "quinidine",
        "NVS-PAK1-1",
        "aloxistatin",
    )
    assert "tells the class of 100.0%" in table.report()
    crispr = JumpPlates(str(tmp_path), perturbations={"modality": "crispr"})
    assert crispr.class_names == ("PLK1",)


# --- generator -----------------------------------------------------------------------------------


def values(phenotype, sites):
    return {name: np.full(sites, float(getattr(phenotype, name))) for name in Phenotype.names()}


def contents(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_generator_repeats_itself_and_seeds_differ(made, tmp_path, monkeypatch):
    import fulgurite.datamodules.cs_arm_bn.synthetic as module

    # one process instead of several: the same bytes
    monkeypatch.setattr(module, "run_in_processes", lambda jobs, n: (jobs[i] for i in range(n)))
    SyntheticPlates(TINY_WORLD, path=str(tmp_path / "again")).prepare()
    first, again = contents(made), contents(tmp_path / "again")
    assert first.keys() == again.keys()
    assert first == again
    SyntheticPlates(TINY_WORLD, path=str(tmp_path / "other"), seed=1).prepare()
    other = contents(tmp_path / "other")
    assert first.keys() == other.keys()
    changed = [name for name in first if first[name] != other[name]]
    assert len(changed) == sum(name.suffix.startswith(".tif") for name in first)


def test_an_interrupted_generation_goes_on(tmp_path):
    source = SyntheticPlates(TINY_WORLD, path=str(tmp_path / "a"))
    source.prepare()
    before = contents(tmp_path / "a")
    load_data(tmp_path / "a")[0].unlink()  # its plate was not finished
    next((tmp_path / "a").rglob("CP_25/**/*.tiff")).write_bytes(b"half")
    assert isinstance(source.load(), PlateTable)
    assert contents(tmp_path / "a") == before


def test_plates_do_not_depend_on_how_many_there_are():
    for seed in range(3):
        one = draw_effect(seed, 0, 1, 0, setting=LabSetting())
        again = draw_effect(seed, 0, 1, 0, setting=LabSetting())
        assert (one.gain == again.gain).all()
        assert one.blur == again.blur


def test_batch_effects_are_nested():
    """Plates of a batch resemble each other, batches do less."""
    gains = np.log(
        [
            [[draw_effect(s, 0, b, p, setting=LabSetting()).gain for p in (0, 1)] for b in range(6)]
            for s in range(30)
        ]
    )
    assert gains.std() == pytest.approx(0.35, abs=0.03)
    within = gains[:, :, 0] - gains[:, :, 1]
    between = gains[:, :-1, 0] - gains[:, 1:, 0]
    assert within.std() < 0.7 * between.std()
    strong = [draw_effect(s, 1, 0, 0, setting=LabSetting(spread=2.0)).gain for s in range(200)]
    assert np.log(strong).std() == pytest.approx(0.7, abs=0.07)


def test_without_effects_all_plates_are_alike():
    one = draw_effect(0, 0, 0, 0, setting=LabSetting(), strength=0)
    far = LabSetting(spread=2.0, blur=(1.0, 2.0), scale=0.8, haze=0.2)
    assert far.scale_towards(2.0) == far.scale_towards(1.0) == far
    other = draw_effect(5, 1, 3, 1, setting=far.scale_towards(0.0), strength=0)
    for name in one.__dataclass_fields__:
        assert (np.asarray(getattr(one, name)) == np.asarray(getattr(other, name))).all()
    images = np.random.default_rng(0).uniform(0, 1, (2, 5, 8, 8)).astype(np.float32)
    noise = one(images, np.random.default_rng(1)) - blur(images, one.blur)
    assert abs(float(noise.mean())) < 0.01
    assert 0.02 < noise.std() < 0.1


@pytest.mark.slow  # a threshold test of the generator
def test_channel_means_do_not_tell_the_class_on_new_batches():
    """Difficulty: a linear probe stays below 0.6 (docs/papers/cs_arm_bn.md section 6.3)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def probe(strength):
        source = SyntheticPlates(
            world={"batches": [8], "plates": [1], "sites": 1, "strength": strength}, seed=3
        )
        features, labels, standardised = [], [], []
        for plate in source.recipe.list_plates():
            sites, images = render_plate(source.recipe, plate)
            layout = source.recipe.layout(plate)
            jcp = np.array([layout[well] for well, _ in sites])
            means = images.mean((2, 3))
            control = means[jcp == NEGATIVE_CONTROL]
            features.append(means[jcp != NEGATIVE_CONTROL])
            standardised.append((features[-1] - control.mean(0)) / control.std(0))
            labels.append(jcp[jcp != NEGATIVE_CONTROL])
        scores = []
        for values_ in (features, standardised):
            model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
            model.fit(np.concatenate(values_[:5]), np.concatenate(labels[:5]))
            scores.append(model.score(np.concatenate(values_[5:]), np.concatenate(labels[5:])))
        return scores

    raw, by_controls = probe(1.15)
    assert raw < 0.5
    assert by_controls > raw + 0.15  # the plate's controls say what the plate did
    clean, clean_by_controls = probe(0.0)
    assert clean > raw + 0.2
    assert abs(clean - clean_by_controls) < 0.1


@pytest.mark.parametrize("sigma", [0.3, 1.0, 4.0])
def test_blurring_keeps_light_and_is_a_gaussian(sigma):
    image = np.zeros((1, 1, 41, 41), np.float32)
    image[0, 0, 20, 20] = 1
    spot = blur(image, sigma)[0, 0]
    assert spot.sum() == pytest.approx(1, abs=1e-5)
    axis = np.arange(41) - 20
    assert (spot.sum(0) * axis**2).sum() == pytest.approx(
        (np.exp(-(axis**2) / (2 * sigma**2)) * axis**2).sum()
        / np.exp(-(axis**2) / (2 * sigma**2)).sum(),
        rel=0.05,
    )


def test_phenotypes_show_what_they_say():
    def image(phenotype, seed=0, size=32):
        generator = np.random.default_rng(seed)
        return render_cells(values(phenotype, 60), size, 1.0, generator).mean((0, 2, 3))

    rna, er, agp, mito, dna = range(5)
    base = image(Phenotype())
    assert (base > 0.01).all()
    bright = image(PHENOTYPES["JCP2022_050797"]) / base  # quinidine: brightness of ER and RNA only
    assert bright[[rna, er]] == pytest.approx([1.5, 1.5], rel=0.01)
    assert bright[[agp, mito, dna]] == pytest.approx([1, 1, 1], rel=0.01)
    texture = image(PHENOTYPES["JCP2022_085227"]) / base  # aloxistatin: texture only
    assert texture == pytest.approx(np.ones(5), rel=0.1)
    assert image(Phenotype(density=0.5))[dna] == pytest.approx(0.5 * base[dna], rel=0.15)
    assert image(Phenotype(nucleus=2.7))[dna] > 1.4 * base[dna]
    large = image(Phenotype(), size=64)  # four times the cells on four times the area
    assert large == pytest.approx(base, rel=0.1)


def test_controls_may_be_dead_and_wells_anywhere(tmp_path):
    dead = SyntheticPlates(
        TINY_WORLD | {"dead_wells": 1.0, "strength": 0}, path=str(tmp_path / "dead")
    ).load()
    light = np.array([FileReader(5)(paths)[4].mean() for paths in dead.paths()])
    assert light[dead.control].max() < light[~dead.control].mean()
    anywhere = SyntheticPlates(
        TINY_WORLD | {"random_layout": True}, path=str(tmp_path / "any")
    ).load()
    layouts = {
        tuple(anywhere.frame["well"][(anywhere.domain == d) & anywhere.control]) for d in range(3)
    }
    assert len(layouts) > 1
    assert (anywhere.counts() == [8, 4]).all()


@pytest.mark.parametrize(
    "change",
    [
        {"batches": [0]},
        {"batches": [1, 1, 1, 1], "plates": [1, 1, 1, 1]},
        {"plates": [1]},
        {"sites": 0},
        {"controls": 33},
        {"wells_per_class": 5},
        {"strength": -1},
        {"dead_wells": 2},
    ],
)
def test_wrong_sizes_are_configuration_errors(change):
    with pytest.raises(ConfigError, match=f"world.{list(change)[-1]}|`plates`"):
        SyntheticPlates(TINY_WORLD | change)
    with pytest.raises(ConfigError, match="seed"):
        SyntheticPlates(TINY_WORLD, seed=-1)


def test_sizes_are_known_without_files(tmp_path, cache):
    source = SyntheticPlates()
    assert (source.num_classes, source.in_channels) == (8, 5)
    assert source.class_names[3] == "AMG900"
    assert not (tmp_path / "cache").exists()
