"""Plates of one's own: the template, its check, and a run on generated images."""

import csv
import io
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import tifffile

from fulgurite.datamodules.cs_arm_bn import CsvPlates, HoldOut, PlateDataModule
from fulgurite.datamodules.cs_arm_bn.command import COLUMNS, main, template
from fulgurite.errors import DataError

TABLE = list(csv.DictReader(io.StringIO(template())))
CHANNELS = ["DNA", "Actin"]


def write_images(folder):
    generator = np.random.default_rng(0)
    for row in TABLE:
        for channel in CHANNELS:
            path = folder / row[f"path_{channel}"]
            path.parent.mkdir(parents=True, exist_ok=True)
            light = 400 if row["label"] == "compound-A" else 200
            tifffile.imwrite(path, generator.poisson(light, (16, 16)).astype(np.uint16))


def test_the_template_is_what_the_reader_reads(tmp_path):
    (tmp_path / "plates.csv").write_text(template())
    source = CsvPlates(str(tmp_path / "plates.csv"), CHANNELS)
    assert source.class_names == ("compound-A", "compound-B")
    table = source.load()
    assert table.domains == tuple(f"mylab|batch{k}|P{k}" for k in range(1, 5))
    assert (table.counts() == [7, 4]).all()
    assert (np.bincount(table.label[~table.control] + 1) == [4, 12, 12]).all()
    known = {*COLUMNS, *(f"path_{channel}" for channel in CHANNELS)}
    assert {*TABLE[0]} <= known


def test_a_user_begins_with_the_template_and_trains(fulgurite):
    status, out, told = fulgurite("plates", "template", "--out", "plates.csv")
    assert (status, out) == (0, "")
    assert "role" in told
    assert "own.yaml" in told
    status, out, error = fulgurite("plates", "check", "plates.csv")
    assert status == 2
    assert "44 sites on 4 plates" in out
    assert "88 images" in error
    write_images(Path())
    status, out, _ = fulgurite("plates", "check", "plates.csv")
    assert status == 0
    assert "4 queries without a label" in out
    assert "  compound-B: 12 sites in 12 wells of 4 plates\n" in out
    assert "  (controls): 16 sites in 16 wells of 4 plates\n" in out
    assert "images: all there" in out
    small = (
        "--config=cs_arm_bn/own.yaml",
        "--run.dir=run",
        "--data.init_args.source.init_args.path=plates.csv",
        "--model.init_args.network.init_args.width=4",
        "--trainer.max_epochs=1",
        "--trainer.enable_progress_bar=false",
    )
    assert fulgurite("fit", *small)[0] == 0
    shift = "--data.init_args.evaluation.label_shift=0.1"
    assert fulgurite("test", *small, "--ckpt_path=last", shift)[0] == 0
    assert (
        fulgurite("predict", *small, "--ckpt_path=last", "--data.init_args.evaluation.predict=all")[
            0
        ]
        == 0
    )
    with Path("run/predict/predictions.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    queries = {(r["plate"], r["well"]): r for r in TABLE if r["role"] == "query"}
    assert len(lines) == len(queries) == 28
    for line in lines:
        row = queries[line["plate"], line["well"]]
        for name in ("source", "batch", "site", "label"):
            assert line[name] == row[name]
        assert line["path"] == str(Path(row["path_DNA"]).absolute())
        probabilities = {c: float(line[f"probabilities.{c}"]) for c in ("compound-A", "compound-B")}
        assert line["predicted"] == max(probabilities, key=probabilities.get)
    found = json.loads(Path("run/test_metrics.json").read_text())
    assert (found["test/queries"], found["test/images"]) == (16, 6)
    assert 3 <= found["test/distinct_queries"] <= 6


def test_the_template_is_printed_and_overwrites_nothing(fulgurite):
    status, out, told = fulgurite("plates", "template")
    assert (status, out) == (0, template())
    assert told.startswith("One row for each site.")
    Path("plates.csv").write_text("mine")
    status, _, error = fulgurite("plates", "template", "--out", "plates.csv")
    assert status == 2
    assert "--out" in error
    assert Path("plates.csv").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({"role": "treated"}, (), "'treated'"),
        ({"path_DNA": ""}, (), "`--exclude=[missing_channel]`"),
        ({"label": "C"}, ("--classes=compound-A,compound-B",), "`--exclude=[unknown_label]`"),
        ({"label": "C"}, ("--classes=[a,b]", "--exclude=x"), "nothing called 'x'"),
        ({"path_DNA": "same", "path_Actin": "same"}, (), "DNA and Actin"),
        ({"path": "a.tif"}, (), "--channels"),
        ({"path_DNA": "images/P1/A01_s1_DNA.tif"}, (), "P1 A01 site 1 and for mylab|batch1|P1 A03"),
        ({"well": "A2"}, (), "A02 and A2"),
        ({}, ("--prefixes=images",), "--prefixes"),
        ({}, ("--prefixes={images",), "'{images' is no YAML"),
        ({}, ("--channels=",), "--channels is empty"),
        ({}, ("--colour=red",), "--help"),
    ],
)
def test_what_is_wrong_with_a_table_is_said_in_the_options_of_the_check(
    fulgurite, change, options, words
):
    rows = [dict(row) for row in TABLE]
    for row in rows:
        row |= {name: row.get(name, "") for name in change}
    rows[2] |= change | ({"site": "2"} if "well" in change else {})
    with Path("plates.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)
    status, _, error = fulgurite("plates", "check", "plates.csv", *options)
    assert status == 2
    assert words in error
    assert "init_args" not in error


def test_a_check_says_that_it_does_not_look_for_addresses(workdir, capsys):
    (workdir / "plates.csv").write_text(template().replace("images/", "s3://bucket/"))
    assert main(["check", "plates.csv"]) == 0
    told = capsys.readouterr().out
    assert "88 addresses, which are not looked for" in told
    assert "all there" not in told


def test_a_check_follows_paths_of_another_machine(workdir, capsys):
    write_images(workdir)
    for folder in ("D:\\plates\\", "D://plates//"):  # the latter is no address
        (workdir / "plates.csv").write_text(template().replace("images/", f"{folder}images/"))
        with pytest.raises(DataError, match="88 images of the table"):
            main(["check", "plates.csv"])
        options = [f"--prefixes={{'{folder}': ''}}", "--channels=Actin,DNA"]
        assert main(["check", "plates.csv", *options]) == 0
        assert "channels Actin, DNA" in capsys.readouterr().out


@pytest.mark.parametrize("cache", [True, False])
def test_plates_of_another_scale_are_named(tmp_path, filled_cache, cache):
    generator, rows = np.random.default_rng(0), []
    for row in TABLE:
        scale = 255 if row["plate"] == "P4" else 1
        name = f"{row['plate']}_{row['well']}_{row['site']}.npy"
        np.save(tmp_path / name, scale * generator.random((2, 8, 8), np.float32))
        rows.append({key: row[key] for key in row if not key.startswith("path")} | {"path": name})
    with (tmp_path / "plates.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)

    def set_up(**pixels):
        source = CsvPlates(str(tmp_path / "plates.csv"), CHANNELS, intensity="full", downscale=1)
        split = HoldOut(new_batches=1, val_batches=1, in_domain=0)
        options = {"episodes": {"min_controls": 4}, "pixels": {"cache": cache} | pixels}
        data = PlateDataModule(source, split, **options)
        data.setup()

    with pytest.warns(UserWarning, match=r"3 plates .* scale .*\|P1 \(0\.005\d+ times"):
        set_up()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_up(normalise="plate")
