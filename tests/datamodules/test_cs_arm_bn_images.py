"""16-bit TIFFs and what can be wrong with them, preprocessing, and the store of images."""

import json
import pickle

import numpy as np
import pandas as pd
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fulgurite.data.exclusions import BadImage
from fulgurite.datamodules.cs_arm_bn import PlateTable, Preprocess
from fulgurite.datamodules.cs_arm_bn.images import PlateImages
from fulgurite.datamodules.cs_arm_bn.preprocess import display_max
from fulgurite.datamodules.cs_arm_bn.site_readers import FileReader
from fulgurite.errors import ConfigError, DataError
from fulgurite.testing.files import png16

pytestmark = pytest.mark.usefixtures("cache")


def pixels(seed=0, size=12):
    return np.random.default_rng(seed).integers(0, 5000, (size, size)).astype(np.uint16)


@pytest.mark.parametrize(
    "options",
    [{}, {"compression": "zlib"}, {"byteorder": ">"}, {"bigtiff": True}, {"rowsperstrip": 2}],
)
def test_a_16_bit_tiff_is_read_as_it_was_written(tmp_path, options):
    tifffile.imwrite(tmp_path / "a.tiff", pixels(), photometric="minisblack", **options)
    assert (FileReader(1)([str(tmp_path / "a.tiff")])[0] == pixels()).all()


def spoil(path, kind):
    if kind == "missing":
        return
    arrays = {
        "eight": pixels().astype(np.uint8),
        "float": pixels().astype(np.float32),
        "colour": np.stack([pixels()] * 3, -1),
        "planes": np.stack([pixels()] * 2),
    }
    options = {"photometric": "rgb" if kind == "colour" else "minisblack"}
    if kind == "deflated":
        options["compression"] = "zlib"
    tifffile.imwrite(path, arrays.get(kind, pixels()), **options)
    whole = path.read_bytes()
    cut = {"cut": len(whole) - 20, "header": 10, "empty": 0, "deflated": len(whole) // 2}
    if kind in cut:
        path.write_bytes(whole[: cut[kind]])
    elif kind == "text":
        path.write_text("no image")


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("missing", "no image"),
        ("cut", "truncated"),
        ("deflated", ""),
        ("header", "damaged"),
        ("empty", "damaged"),
        ("text", "damaged"),
        ("eight", "uint8"),
        ("float", "float32"),
        ("colour", "16-bit channel"),
        ("planes", "planes"),
    ],
)
def test_each_bad_tiff_has_one_error_that_names_it(tmp_path, kind, word):
    path = tmp_path / "bad.tiff"
    spoil(path, kind)
    with pytest.raises(DataError, match=r"bad\.tiff") as error:
        FileReader(1)([str(path)])
    assert word in str(error.value)
    assert "--data.init_args.exclude+=unreadable" in error.value.hint
    takes_more = kind in ("eight", "float", "colour", "planes")
    assert ("init_args.files.any_depth=true" in error.value.hint) == takes_more
    assert error.value.kind == "unreadable"


def test_a_damaged_deflate_stream_is_named(tmp_path):
    tifffile.imwrite(tmp_path / "bad.tiff", pixels(size=40), compression="zlib")
    data = bytearray((tmp_path / "bad.tiff").read_bytes())
    with tifffile.TiffFile(tmp_path / "bad.tiff") as file:
        start = file.pages.first.dataoffsets[0]
    data[start : start + 50] = bytes(50)
    (tmp_path / "bad.tiff").write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"bad\.tiff"):
        FileReader(1)([str(tmp_path / "bad.tiff")])


def test_channels_are_stacked_and_must_agree(tmp_path):
    for c in range(3):
        tifffile.imwrite(tmp_path / f"{c}.tiff", pixels(c))
    paths = [str(tmp_path / f"{c}.tiff") for c in range(3)]
    assert (FileReader(3)(paths) == np.stack([pixels(c) for c in range(3)])).all()
    tifffile.imwrite(paths[1], pixels(1, 13))
    with pytest.raises(BadImage, match="differ in size"):
        FileReader(3)(paths)
    with pytest.raises(BadImage, match="not 2 channels"):
        FileReader(2)(paths[:1])


def test_pictures_have_their_channels_first(tmp_path):
    colour = np.random.default_rng(0).integers(0, 255, (6, 7, 3)).astype(np.uint8)
    Image.fromarray(colour).save(tmp_path / "a.png")
    assert (FileReader(3)([str(tmp_path / "a.png")]) == np.moveaxis(colour, 2, 0)).all()
    np.save(tmp_path / "a.npy", np.ones((2, 4, 4), np.float32))
    assert FileReader(2)([str(tmp_path / "a.npy")]).shape == (2, 4, 4)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(BadImage, match=r"a\.png"):
        FileReader(3)([str(tmp_path / "a.png")])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(1.0, 9.0), st.integers(1, 3))
def test_the_percentile_mapping_undoes_a_gain(seed, gain, downscale):
    site = np.random.default_rng(seed).gamma(1.0, 500, (2, 30, 30)).astype(np.float32)
    mapped, stronger = (Preprocess(downscale)(s) for s in (site, site * np.float32(gain)))
    assert mapped.dtype == np.uint8
    assert mapped.max() == 255
    assert np.abs(mapped.astype(int) - stronger).max() <= 1
    side = -(-30 // downscale)
    assert mapped.shape == (2, side, side)


def test_the_brightest_pixels_saturate_and_no_others():
    site = np.arange(1, 40_001, dtype=np.uint16).reshape(1, 200, 200)
    mapped = Preprocess(1)(site)
    assert display_max(site, 1e-4) == 39_997  # the smallest of the top four
    assert (mapped == 255).sum() == 4
    assert mapped.min() == 0
    assert (np.diff(mapped.reshape(-1).astype(int)) >= 0).all()
    assert (Preprocess(1, "full")(site) == site).all()
    for dtype in (np.uint16, np.float64):  # counted and sorted
        random = np.random.default_rng(1).integers(0, 60_000, (1, 200, 200)).astype(dtype)
        expected = np.sort(random, axis=None)[-4]
        assert display_max(random, 1e-4) == expected
        by_hand = np.floor(np.minimum(random * (255.0 / expected) + 1e-3, 255))
        assert np.abs(Preprocess(1)(random) - by_hand).max() == 0


def test_values_far_below_0_are_not_lost():
    site = np.random.default_rng(0).normal(size=(2, 30, 30)).astype(np.float32)
    with pytest.raises(BadImage, match=r"Channel 0 reaches from -.*`intensity: percentile`"):
        Preprocess(1)(site)
    assert (Preprocess(1, "full")(site) == site).all()
    background = site * np.float32(0.01)  # of which the mean was subtracted
    background[:, 10:20, 10:20] += 1
    assert Preprocess(1)(background).min() == 0


@pytest.mark.parametrize(
    ("change", "kind"),
    [(lambda s: s * 0, "constant"), (lambda s: s * 0 + 7, "constant"), (None, "nan")],
)
def test_images_without_content_are_refused(change, kind):
    site = np.random.default_rng(0).gamma(1.0, 500, (2, 8, 8)).astype(np.float32)
    if change is None:
        site[1, 2, 3] = np.nan
    else:
        site[1] = change(site[1])
    for intensity in ("percentile", "full"):
        with pytest.raises(BadImage) as error:
            Preprocess(1, intensity)(site)
        assert error.value.kind == kind
    if kind == "constant":
        assert Preprocess(1, "full", constant="image")(site).shape == site.shape


def test_a_bad_preprocessing_is_a_configuration_error():
    for arguments in ({"downscale": 0}, {"intensity": "log"}, {"saturate": 1.0}):
        with pytest.raises(ConfigError):
            Preprocess(**arguments)


def plates(folder, wells=4, size=12):
    """Two plates with one-channel TIFFs, whose pixels tell the row."""
    rows = []
    for plate in ("a", "b"):
        for w in range(wells):
            path = folder / f"{plate}{w}.tiff"
            tifffile.imwrite(path, pixels(len(rows), size))
            role = "control" if w % 2 else "query"
            rows.append(("lab", "1", plate, f"A0{w}", "1", role, 0, str(path)))
    names = ["source", "batch", "plate", "well", "site", "role", "label", "path"]
    return PlateTable(pd.DataFrame(rows, columns=names), ("only",), ("grey",))


def store(table, *exclude, **options):
    preprocess = Preprocess(1, "full")
    return PlateImages(table, FileReader(1), preprocess, frozenset(exclude), **options)


def test_the_store_gives_the_rows_images_in_any_process(tmp_path):
    table = plates(tmp_path)
    cached, plain = store(table), store(table, cache=False)
    cached.prepare()
    usable, images = cached.drop_unreadable()
    assert usable is table
    copy = pickle.loads(pickle.dumps(images))
    for row in range(len(table)):
        for source in (images, plain, copy):
            assert (source[row] == pixels(row)).all()
    rows = np.array([0, 2, 5])
    both = np.stack([pixels(r) for r in rows]).astype(float)
    for source in (images, plain):
        mean, std = source.moments(rows)
        assert mean == pytest.approx(both.mean())
        assert std == pytest.approx(both.std())
        assert source.unit(0) == 65535


def test_the_store_is_written_once_and_again_when_a_file_changes(tmp_path):
    table = plates(tmp_path)
    store(table).prepare()
    before = sorted((tmp_path / "cache" / "plates").glob("*/images.npy"))
    times = [path.stat().st_mtime_ns for path in before]
    store(table).prepare()
    assert times == [path.stat().st_mtime_ns for path in before]
    tifffile.imwrite(tmp_path / "a0.tiff", pixels(99, 12))
    changed = store(table)
    changed.prepare()
    assert (changed[0] == pixels(99)).all()
    assert len(list((tmp_path / "cache" / "plates").glob("*/images.npy"))) == 3


def test_bad_images_stop_or_are_counted(tmp_path):
    table = plates(tmp_path)
    (tmp_path / "a2.tiff").write_bytes((tmp_path / "a2.tiff").read_bytes()[:-9])
    tifffile.imwrite(tmp_path / "b1.tiff", np.full((12, 12), 7, np.uint16))
    with pytest.raises(DataError, match=r"a2\.tiff is truncated"):
        store(table).prepare()
    with pytest.raises(DataError, match=r"b1\.tiff.*exclude\+=constant"):
        store(table, "unreadable").prepare()
    images = store(table, "unreadable", "constant")
    images.prepare()
    usable, images = images.drop_unreadable()
    assert len(usable) == len(table) - 2
    assert {(e.kind, e.count) for e in usable.excluded} == {("unreadable", 1), ("constant", 1)}
    assert "a2.tiff" in usable.report()
    for row in range(len(usable)):
        assert (images[row] == tifffile.imread(usable.paths()[row][0])).all()
    with pytest.raises(DataError, match="truncated"):  # the cache forgets nothing
        store(table).drop_unreadable()


def test_a_plate_of_which_nothing_is_left_goes_and_others_keep_their_images(tmp_path):
    table = plates(tmp_path)
    for w in range(4):
        (tmp_path / f"a{w}.tiff").write_text("gone")
    images = store(table, "unreadable")
    images.prepare()
    usable, images = images.drop_unreadable()
    assert usable.domains == ("lab|1|b",)
    assert (images[1] == pixels(5)).all()


@pytest.mark.parametrize("odd", [0, 2])
@pytest.mark.parametrize("other", ["size", "type"])
def test_one_plate_has_images_of_one_size_or_leaves_the_few_others_out(tmp_path, odd, other):
    table = plates(tmp_path)
    if other == "size":
        tifffile.imwrite(tmp_path / f"a{odd}.tiff", pixels(2, 13))
    else:
        paths = table.frame["path"].tolist()
        np.save(tmp_path / "odd.npy", pixels().astype(np.float32))
        paths[odd] = str(tmp_path / "odd.npy")
        table = PlateTable(table.frame.assign(path=paths), ("only",), ("grey",))
    with pytest.raises(DataError, match=r"others of its plate .*exclude\+=unreadable"):
        store(table).prepare()
    images = store(table, "unreadable")
    images.prepare()
    usable, images = images.drop_unreadable()
    assert [(e.kind, e.count) for e in usable.excluded] == [("unreadable", 1)]
    expected = [pixels(row) for row in range(len(table)) if row != odd]
    for row, image in enumerate(expected):
        assert (images[row] == image).all()
    assert images.moments(np.arange(3))[0] == pytest.approx(np.mean(expected[:3]))


def test_colour_maps_and_16_bit_colours_are_no_channels_by_accident(tmp_path):
    colours = np.random.default_rng(0).integers(0, 60_000, (6, 7, 3)).astype(np.uint16)
    (tmp_path / "a.png").write_bytes(png16(colours))
    site = FileReader(3)([str(tmp_path / "a.png")])
    assert (site == np.moveaxis(colours, 2, 0)).all()
    lut = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("P")
    lut.putpalette([level for i in range(256) for level in (0, 0, i)])
    lut.save(tmp_path / "b.png")
    with pytest.raises(BadImage, match="colour map"):
        FileReader(1)([str(tmp_path / "b.png")])
    with pytest.raises(BadImage, match="colour map"):
        FileReader(3)([str(tmp_path / "b.png")] * 3)
    indices = FileReader(1, any_depth=True)([str(tmp_path / "b.png")])
    assert (indices.ravel() == np.arange(256)).all()
    Image.fromarray(colours.astype(np.uint8)).convert("RGBA").save(tmp_path / "c.png")
    with pytest.raises(BadImage, match="not 1 channels"):  # and not their brightness
        FileReader(1)([str(tmp_path / "c.png")])


def test_an_interrupted_plate_leaves_nothing_behind(tmp_path, monkeypatch):
    table = plates(tmp_path)
    images = store(table)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(json, "dumps", stop)
    with pytest.raises(KeyboardInterrupt):
        images.prepare()
    monkeypatch.undo()
    monkeypatch.setenv("FULGURITE_CACHE", str(tmp_path / "cache"))
    assert not list((tmp_path / "cache" / "plates").glob("*/images.npy"))
    images.prepare()
    assert (images[3] == pixels(3)).all()


def test_plates_have_one_type_and_say_their_sizes(tmp_path):
    table = plates(tmp_path)
    for w in range(4):
        tifffile.imwrite(tmp_path / f"b{w}.tiff", pixels(w, 14))
    images = store(table)
    images.prepare()
    assert images.drop_unreadable()[1].sizes() == {(12, 12): "lab|1|a", (14, 14): "lab|1|b"}
    paths = [
        path.replace(".tiff", ".npy") if "b" in path[-7:] else path for path in table.frame["path"]
    ]
    for w in range(4):
        np.save(tmp_path / f"b{w}.npy", pixels(w).astype(np.float32))
    images = store(PlateTable(table.frame.assign(path=paths), ("only",), ("grey",)))
    images.prepare()
    with pytest.raises(DataError, match=r"uint16 on lab\|1\|a, float32 on lab\|1\|b"):
        images.drop_unreadable()
