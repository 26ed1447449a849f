"""Every format that the project reads: small valid files, and the reader that users reach."""

import csv
import io
import json
import pickle
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Target:
    """A format.

    Attributes:
        name: Of the format.
        seeds: Valid sets of files, content by path.
        read: Reads the files in a folder.
        damaged: Names of the files to be damaged; all if empty.
        is_named: Whether errors must name the folder.
    """

    name: str
    seeds: list
    read: object
    damaged: tuple = ()
    is_named: bool = True


def _made(write):
    """The files that ``write(folder)`` leaves."""
    with tempfile.TemporaryDirectory() as root:
        write(Path(root))
        return {
            str(path.relative_to(root)): path.read_bytes()
            for path in sorted(Path(root).rglob("*"))
            if path.is_file()
        }


def _cifar():
    from fulgurite.datamodules.fedsir import archives
    from fulgurite.testing.files import python2_pickle, write_cifar_archive

    layout = archives.VARIANTS["cifar10"]

    def read_archive(folder):
        members = archives.read_members(folder / "c.tar.gz", layout)
        archives.write_arrays(members, layout, str(folder / "c.tar.gz"), folder)

    archive = _made(lambda f: write_cifar_archive(f / "c.tar.gz", per_class=1))
    yield Target("cifar-archive", [archive], read_archive)
    images = np.random.default_rng(0).integers(0, 256, (2, 3072), dtype=np.uint8)
    content = {b"data": images, b"labels": [3, 4], b"filenames": [b"a", b"b"], b"batch_label": b"1"}
    names = {b"label_names": [b"class %d" % k for k in range(10)]}

    def seed(dump):
        batches = {f"data_batch_{k}": dump(content) for k in range(1, 6)}
        return batches | {"test_batch": dump(content), "batches.meta": dump(names)}

    def read_pickles(folder):
        members = {path.name: path.read_bytes() for path in folder.iterdir()}
        archives.write_arrays(members, layout, str(folder), folder)

    dumps = [python2_pickle, *(lambda v, p=p: pickle.dumps(v, p) for p in (1, 2, 4, 5))]
    yield Target("cifar-pickle", [seed(dump) for dump in dumps], read_pickles)


def _image_embeddings():
    import pandas as pd

    from fulgurite.datamodules.cs_arm_bn.embeddings import read_embeddings

    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    keys = {"plate": ["p", "p"], "well": ["A01", "A02"], "site": ["1", "1"]}
    columns = {f"f{k}": values[:, k] for k in range(3)}

    def write_lists(folder):
        pd.DataFrame(keys).assign(embedding=list(values)).to_parquet(folder / "e.parquet")

    def read(folder):
        (path,) = folder.iterdir()
        read_embeddings(path)

    seeds = [
        _made(lambda f: np.savez(f / "e.npz", embeddings=values, **keys)),
        _made(lambda f: np.savez_compressed(f / "e.npz", embeddings=values, row=np.arange(2))),
        _made(lambda f: pd.DataFrame(keys).assign(**columns).to_parquet(f / "e.parquet")),
        _made(write_lists),
    ]
    yield Target("embeddings", seeds, read)


def _pictures():
    import tifffile
    from PIL import Image

    from fulgurite.datamodules.cs_arm_bn.site_readers import FileReader
    from fulgurite.datamodules.fedsir.folders import ImageFolder
    from fulgurite.testing.files import png16, write_image_files

    def read_folder(folder):
        (folder / "out").mkdir()
        ImageFolder(str(folder / "i.zip")).write_arrays(folder / "out")

    zips = [
        _made(lambda f, s=s: write_image_files(f / "i.zip", per_class=2, classes=2, suffix=s))
        for s in ("png", "jpg")
    ]
    yield Target("image-zip", zips, read_folder)
    colours = np.random.default_rng(0).integers(0, 256, (9, 8, 3), dtype=np.uint8)

    def site(channels, path, **options):
        FileReader(channels, **options).read_file(str(path), is_channel=False)

    def encode(image, kind, **options):
        out = io.BytesIO()
        image.save(out, kind, **options)
        return out.getvalue()

    def picture(array, kind, **options):
        return {f"a.{kind.lower()}": encode(Image.fromarray(array), kind, **options)}

    for kind, options in (
        ("PNG", [{}, {"optimize": True}]),
        ("JPEG", [{}, {"progressive": True}]),
    ):
        arrays = [colours, colours[..., 0], colours[..., :1].astype(np.uint16)[..., 0] * 256]
        seeds = [
            picture(a, kind, **o) for a in arrays[: 3 if kind == "PNG" else 2] for o in options
        ]
        if kind == "PNG":
            seeds += [picture(array, "PNG") for array in (colours[..., 0] > 99,)]
            indices = Image.fromarray(colours[..., 0]).quantize(16)
            seeds += [{"a.png": encode(indices, "PNG")}, {"a.png": png16(colours)}]
        yield Target(
            kind.lower(),
            seeds,
            lambda f, k=kind: site(3, f / f"a.{k.lower()}"),
        )

    def tiff(array, **options):
        out = io.BytesIO()
        tifffile.imwrite(out, array, **options)
        return {"a.tiff": out.getvalue()}

    grey = np.arange(16 * 16, dtype=np.uint16).reshape(16, 16)
    plain = [tiff(grey), tiff(grey, bigtiff=True), tiff(grey, byteorder=">", rowsperstrip=4)]
    yield Target("tiff", plain, lambda f: FileReader(1)([str(f / "a.tiff")]))
    deep = [tiff(np.stack([grey] * 3), photometric="minisblack"), tiff(colours), tiff(grey * 0.5)]
    deep += [tiff(np.stack([grey] * 3), ome=True, metadata={"axes": "CYX"})]
    deep += [tiff(grey, compression="zlib"), tiff(grey, imagej=True)]
    yield Target(
        "tiff-any-depth",
        deep,
        lambda f: site(3, f / "a.tiff", any_depth=True),
    )

    def npy(array):
        out = io.BytesIO()
        np.save(out, array)
        return {"a.npy": out.getvalue()}

    arrays = [npy(np.zeros((3, 4, 4), np.uint8)), npy(np.asfortranarray(np.ones((4, 4))))]
    yield Target("npy-image", arrays, lambda f: site(3, f / "a.npy"))


def _arrays():
    from fulgurite.datamodules.fedsir import Npz
    from fulgurite.datamodules.ice_layers import CompletedStacks, NpzStacks
    from fulgurite.domains.ice_layers.details import FlightDetails
    from fulgurite.models.ice_layers.output import netcdf
    from fulgurite.models.ice_layers.output import stacks as output
    from fulgurite.testing.files import write_npz

    images = [
        _made(lambda f, c=c: write_npz(f / "a.npz", per_class=1, size=4, channels=c))
        for c in (1, 3)
    ]

    def read_images(folder):
        source = Npz(str(folder / "a.npz"))
        _ = source.num_classes, source.image_size
        source.load()

    yield Target("npz-images", images, read_images)

    def stack(write):
        n, layers = 6, 3
        observed = np.random.default_rng(1).random((n, layers)) < 0.7
        observed[0] = True
        pos = np.stack([np.linspace(70, 70.01, n), np.full(n, -40.0)], 1)
        provenance = np.where(observed, 0, 1).astype(np.uint8)
        thickness = np.full((n, layers), 0.7)
        std = np.full((n, layers), 0.1, np.float32)
        physics = np.ones((n, layers, 2), np.float32)
        made = output.CompletedStack(
            thickness, provenance, std, observed, physics, pos, np.linspace(0, 1113.0, n),
            "20120330_01", "s_0000", ("a", "b"), ("smb", "st"), ("l1", "l2", "l3"),
            np.arange(1.0, 4),
            details=FlightDetails(
                time=1.33e9 + np.arange(n), time_scale="GPS", elevation=np.full(n, 500.0),
                flight_distance=np.linspace(0, 1113.0, n), frame=np.array(["20120330_01_001"] * n),
                trace=np.arange(1, n + 1), density=np.full((n, layers), 0.4),
                twtt=3e-6 + 1e-8 * np.ones((n, layers + 1)), picked=np.ones((n, layers + 1), bool),
            ),
        )  # fmt: skip
        return _made(lambda f: write(f / "a", made))

    npz = stack(lambda path, s: output.write_npz(path.with_suffix(".npz"), s))
    yield Target("npz-stacks", [npz], lambda f: NpzStacks(str(f)).load())
    yield Target("npz-completed", [npz], lambda f: CompletedStacks(str(f)).load())
    yield Target("npz-output", [npz], lambda f: output.read_npz(f / "a.npz"))
    written = stack(lambda path, s: netcdf.write_netcdf(path.with_suffix(".nc"), s))
    yield Target("netcdf-output", [written], lambda f: netcdf.read_netcdf(f / "a.nc"))


def _call_tensors():
    import torch
    from safetensors.torch import save_file

    from fulgurite.attention.call_files import map_tensors

    array = np.arange(40, dtype=np.float32).reshape(1, 1, 5, 8)
    npy = _made(lambda f: np.save(f / "query.npy", array))
    yield Target("npy-tensors", [npy], lambda f: map_tensors(f, ["query"])["query"].sum())
    tensors = {"query": torch.from_numpy(array)}
    safe = _made(lambda f: save_file(tensors, f / "a.safetensors"))
    yield Target(
        "safetensors-tensors",
        [safe],
        lambda f: map_tensors(f / "a.safetensors", ["query"])["query"].sum(),
    )


def _annotations():
    import pandas as pd
    import torch
    from PIL import Image

    from fulgurite.datamodules.fedsir import (
        FileLabels,
        FilePartition,
        ImageList,
        ImageLists,
        Leaf,
        LeafPixels,
        Listing,
        Parquet,
        ParquetFiles,
    )
    from fulgurite.datamodules.fedsir.samples import Samples
    from fulgurite.testing.files import write_image_parquet

    labels = torch.tensor([0, 1, 0, 1])
    listing = Listing(4, ("a.png", "b.png", "c.png", "d.png"))
    samples = Samples(labels, labels, torch.arange(4), listing, ("cat", "dog"))
    columns = {"path": listing.keys, "client": ["x", "y", "x", "y"], "label": ["cat", "dog"] * 2}
    rows = pd.DataFrame(columns)

    def read_partition(path):
        FilePartition(str(path))(samples, 2, 2, torch.Generator())

    def read_labels(path):
        FileLabels(str(path)).annotate(samples)

    for suffix, write in (
        (".csv", lambda path: rows.to_csv(path, index=False)),
        (".csv.gz", lambda path: rows.to_csv(path, index=False)),
        (".parquet", lambda path: rows.to_parquet(path)),
    ):
        for name, read in (("clients", read_partition), ("labels", read_labels)):
            seed = _made(lambda f, s=suffix, w=write: w(f / f"a{s}"))
            yield Target(f"{name}{suffix}", [seed], lambda f, s=suffix, r=read: r(f / f"a{s}"))
    text = "a.png cat\nb.png dog\nc.png cat\nd.png dog\n"
    yield Target("labels.txt", [{"a.txt": text.encode()}], lambda f: read_labels(f / "a.txt"))
    indices = [
        {"a.json": content} for content in (b'{"0": [0, 3], "1": [1, 2]}', b"[[0, 3], [1, 2]]")
    ]
    yield Target("clients.json", indices, lambda f: read_partition(f / "a.json"))

    data = {f"u{k}": {"x": [[0.0, 1, 0.5, 1.0]] * 2, "y": [0, 1]} for k in range(2)}
    users = {"users": [*data], "num_samples": [2, 2], "user_data": data}
    leaf = {"a.json": json.dumps(users).encode()}

    def read_leaf(folder):
        path = str(folder / "a.json")
        Leaf(path, path, pixels=LeafPixels((1, 2, 2))).load()

    yield Target("leaf", [leaf], read_leaf)
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 2, 2), dtype=np.uint8)
    table = _made(lambda f: write_image_parquet(f / "a.parquet", images, [0, 1, 0, 1]))

    def read_images(folder):
        path = str(folder / "a.parquet")
        source = Parquet(ParquetFiles(path, path))
        _ = source.num_classes, source.image_size
        source.load()

    yield Target("parquet-images", [table], read_images)

    def read_list(folder):
        paths = {name: str(folder / f"{name}.txt") for name in ("train", "test", "labels", "names")}
        source = ImageList(
            ImageLists(
                paths["train"],
                paths["test"],
                train_labels=paths["labels"],
                test_labels=paths["labels"],
                class_names=paths["names"],
            )
        )
        _ = source.num_classes, source.image_size
        source.load()

    listed = {"train.txt": b"0.png\n./1.png\n", "test.txt": b"2.png\n", "names.txt": b"cat\ndog\n"}
    listed["labels.txt"] = b"0.png 0\n1.png 1\n2.png 1\n3.png 0\n"
    for number, image in enumerate(images[:3]):
        out = io.BytesIO()
        Image.fromarray(image.transpose(1, 2, 0)).save(out, "PNG")
        listed[f"{number}.png"] = out.getvalue()
    yield Target("image-list", [listed], read_list)

    def saved(content):
        out = io.BytesIO()
        torch.save(content, out)
        return {"a.pt": out.getvalue()}

    seeds = [saved({"label": value}) for value in (labels, labels.numpy(), labels.tolist())]
    yield Target("labels.pt", [*seeds, saved(labels)], lambda f: read_labels(f / "a.pt"))


def _layer_files():
    from scipy.io import savemat

    from fulgurite.datamodules.ice_layers import Blocks, LayerFiles
    from fulgurite.datamodules.ice_layers.readers.layer_frames import read_frame, read_organizer
    from fulgurite.datamodules.ice_layers.readers.layer_writer import write_layer_file
    from fulgurite.datamodules.ice_layers.tracks.records import times_below
    from fulgurite.testing.matlab import write_strings

    n = 5
    rng = np.random.default_rng(0)
    time = 1.3e9 + np.arange(float(n))
    pos = np.stack([np.linspace(70, 70.1, n), np.full(n, -40.0)], 1)
    twtt = 1e-6 * (1 + np.arange(4)) + rng.normal(0, 1e-9, (n, 4))
    new = _made(lambda f: write_layer_file(f / "a.mat", time, pos, twtt))

    def old(compress, values):
        out = io.BytesIO()
        savemat(out, values, do_compression=compress)
        return {"a.mat": out.getvalue()}

    common = {"gps_time": time, "lat": pos[:, 0], "lon": pos[:, 1], "elev": pos[:, 0]}
    layer = {"twtt": twtt.T, "id": np.arange(1.0, 5), "quality": np.ones((4, n), np.uint8)}
    sets = np.empty(4, object)
    for k in range(4):
        value = np.empty(2, object)
        value[:] = [{"data": np.full(n, np.nan)}, {"data": twtt[:, k]}]
        sets[k] = {"name": f"layer {k}", "quality": np.ones(n), "value": value}
    legacy = {"GPS_time": time, "Latitude": pos[:, 0], "Longitude": pos[:, 1], "layerData": sets}
    v5 = [old(c, v) for c in (False, True) for v in (common | layer, legacy)]
    names = np.array(["surface", "one", "two"], object)
    numbers = np.arange(1.0, 4)
    organizers = [
        old(c, {"lyr_id": numbers, "lyr_name": names, "lyr_order": numbers, "lyr_age": numbers})
        for c in (False, True)
    ]
    written = {"lyr_id": numbers, "lyr_order": numbers, "lyr_age": numbers}
    strings = {
        version: _made(
            lambda f, v=version: write_strings(f / "a.mat", written, {"lyr_name": list(names)}, v)
        )
        for version in ("5", "7.3")
    }
    organizers.append(strings["5"])
    yield Target("mat-7.3-organizer", [strings["7.3"]], lambda f: read_organizer(f / "a.mat"))
    yield Target("mat-5", v5, lambda f: read_frame(f / "a.mat"))
    yield Target("mat-5-organizer", organizers, lambda f: read_organizer(f / "a.mat"))
    yield Target("mat-7.3", [new], lambda f: read_frame(f / "a.mat"))
    name = "Data_20110313_01_001.mat"

    def write_back(folder):
        source = LayerFiles([str(folder / name)], blocks=Blocks(n, density=0.4), thickest=1000.0)
        for stack in source.load().stacks:
            thickness = np.where(stack.observed, stack.thickness, 100.0)
            times = times_below(stack.record, thickness, stack.known_spans)
            source.write_back(folder / "back", stack.segment, [(stack.record, times)])

    frames = [{name: content} for seed in (*v5, new) for content in seed.values()]
    yield Target("mat-written-back", frames, write_back)
    yield from _echograms()


def _echograms():
    from scipy.io import savemat

    from fulgurite.datamodules.ice_layers import SredFolders, SredMat
    from fulgurite.datamodules.ice_layers.generator.sred import write_sred
    from fulgurite.datamodules.ice_layers.readers.sred_file import FIELDS

    n, layers = 5, 3
    bins = np.cumsum(np.full((layers + 1, n), 50.0), 0)
    bins[2, 1] = np.nan
    pos = np.stack([np.linspace(74, 74.01, n), np.full(n, -43.0)], 1)
    fields = {name: np.ones((n, layers + 1)) for name in FIELDS}
    fields |= {"curr_temp": np.full((n, layers + 1), 245.0), "Elevation": np.full(n, 3400.0)}
    fields["curr_dens"] = np.full((n, layers + 1), 310.0)
    name = "a/20120330_04_0939_2km.mat"

    def old(compress):
        out = io.BytesIO()
        values = {key: value.T for key, value in fields.items()}
        values |= {"layers_vector": bins, "Latitude": pos[:, 0], "Longitude": pos[:, 1]}
        savemat(out, values, do_compression=compress)
        return {name: out.getvalue()}

    def new(folder):
        (folder / "a").mkdir()
        write_sred(folder / name, bins.T, pos, fields)

    def read(folder):
        SredMat(str(folder), SredFolders(("a",), (), ()), layers, n).load()

    yield Target("mat-5-sred", [old(c) for c in (False, True)], read)
    yield Target("mat-7.3-sred", [_made(new)], read)


def _climate():
    import netCDF4

    from fulgurite.datamodules.ice_layers.climate.mar import ClimateRequest, MarClimate

    def write(path, form):
        with netCDF4.Dataset(str(path), "w", format=form) as data:
            for name, size in (("TIME", 12), ("y", 4), ("x", 4)):
                data.createDimension(name, size)
            xs = np.linspace(-40.3, -39.7, 4)
            lat, lon = np.meshgrid(np.linspace(69.8, 70.2, 4), xs, indexing="ij")
            for name, dims, units, values in (
                ("LAT", ("y", "x"), "degrees", lat),
                ("LON", ("y", "x"), "degrees", lon),
                ("SRF", ("y", "x"), "-", np.full((4, 4), 4.0)),
                ("TIME", ("TIME",), "days since 2011-01-01", 15.0 + 30.4 * np.arange(12)),
                ("SMB", ("TIME", "y", "x"), "mmWE/month", np.full((12, 4, 4), 30.0)),
                ("ST", ("TIME", "y", "x"), "C", np.full((12, 4, 4), -20.0)),
            ):
                made = data.createVariable(name, "f8", dims)
                made.units = units
                made[:] = values

    start = int(np.datetime64("2011-02-01", "D").astype(int))
    request = ClimateRequest(
        np.array([[70.0, -40.0], [70.01, -40.0]]), np.array([start + 200.0, start])
    )

    def read(folder):
        MarClimate([str(folder / "a.nc")], variables=["smb", "st"]).sample([request])

    for name, form in (("netcdf-4", "NETCDF4"), ("netcdf-3", "NETCDF3_64BIT_OFFSET")):
        seed = _made(lambda f, form=form: write(f / "a.nc", form))
        # some errors are of all files together, and name the option
        yield Target(name, [seed], read, is_named=False)


def _tables():
    import pandas as pd

    from fulgurite.datamodules.cs_arm_bn.tables import CsvPlates, RxRx1Plates
    from fulgurite.datamodules.ice_layers.generator.forcing import read_site
    from fulgurite.datamodules.ice_layers.readers.koenig import read_picks

    rows = pd.DataFrame(
        {
            "source": "lab", "batch": "1", "plate": ["p", "p", "q", "q"], "site": "1",
            "well": ["A01", "A02"] * 2, "role": ["query", "control"] * 2,
            "label": ["x", None, "y", None], "path": ["a.png", "b.png", "c.png", "d.png"],
        }
    )  # fmt: skip

    def plates(suffix, write):
        return _made(lambda f: write(f / f"t{suffix}"))

    for suffix, write in (
        (".csv", lambda path: rows.to_csv(path, index=False)),
        (".csv.gz", lambda path: rows.to_csv(path, index=False)),
        (".parquet", lambda path: rows.to_parquet(path)),
    ):
        yield Target(
            f"plates{suffix}",
            [plates(suffix, write)],
            lambda f, s=suffix: CsvPlates(str(f / f"t{s}"), ["c"]).load(),
            is_named=False,  # what a table says is named by plate and well
        )
    metadata = pd.DataFrame(
        {
            "cell_type": "HEPG2", "dataset": ["train", "test"], "experiment": ["HEPG2-01"] * 2,
            "plate": [1, 2], "well": "B02", "site": [1, 2], "sirna_id": [5, 1138],
        }
    )  # fmt: skip
    yield Target(
        "rxrx1",
        [_made(lambda f: metadata.to_csv(f / "metadata.csv", index=False))],
        lambda f: RxRx1Plates(str(f)).load(),
        is_named=False,
    )
    days = pd.date_range("1980-01-01", periods=800)
    series = pd.DataFrame({"BDOT": 1.0, "RAIN": 0.1, "SMELT": 0.2, "TSKIN": 250.0}, index=days)
    name = "CFM_example_66.5_-46.25.csv"
    yield Target(
        "forcing", [_made(lambda f: series.to_csv(f / name))], lambda f: read_site(f / name)
    )
    line = " ".join(["IR_20110401_03.mat", "1", "70.0", "-40.0", "1301650000.0", "1e-10"])
    text = "\n".join([line + " 100 1.5 0.6 1.4 0.5 200 3.0 1.2 2.9 1.1"] * 4) + "\n"
    yield Target("picks", [{"mapdata.txt": text.encode()}], lambda f: read_picks(f / "mapdata.txt"))


def _texts():
    import pyarrow as pa
    import pyarrow.parquet as pq
    from tokenizers import Tokenizer, models, pre_tokenizers

    from fulgurite.datamodules.number_probing.corpus import read_documents
    from fulgurite.datamodules.number_probing.tokenizers import FileTokenizer, WordTokenizer

    texts = pa.table({"text": ["one 1", "two 22 and 333", ""], "id": [1, 2, 3]})

    def parquet(**options):
        return _made(lambda f: pq.write_table(texts, f / "a.parquet", **options))

    seeds = [parquet(), parquet(compression="NONE", use_dictionary=False), parquet(version="1.0")]
    yield Target("parquet-text", seeds, lambda f: [*read_documents([f / "a.parquet"])])

    def encode(folder):
        tokenizer = WordTokenizer(1100)
        found = [*read_documents([folder / "a.txt"])]
        tokenizer.learn(found)
        tokenizer.encode(found)

    yield Target("text", [{"a.txt": "Room 7 of 10, 007: x²".encode()}], encode)

    def tokenizer(model):
        whole = Tokenizer(model)
        whole.pre_tokenizer = pre_tokenizers.Whitespace()
        return {"tokenizer.json": whole.to_str().encode()}

    words = {"[UNK]": 0, **{str(n): n + 1 for n in range(12)}, "a": 13, "b": 14, "ab": 15}
    seeds = [tokenizer(models.WordLevel(words, unk_token="[UNK]"))]
    seeds += [tokenizer(models.BPE(words, [("a", "b")], unk_token="[UNK]"))]
    seeds += [tokenizer(models.WordPiece(words, unk_token="[UNK]"))]
    seeds += [tokenizer(models.Unigram([("[UNK]", 0.0), ("a", -1.0), ("1", -2.0)], 0, False))]

    def read_tokenizer(folder):
        found = FileTokenizer(str(folder))
        found.encode(["a b 7 11 x", "é"])
        [found.spaced(token) for token in found.numbers]

    yield Target("tokenizer", seeds, read_tokenizer)


def _embeddings():
    from fulgurite.models.number_probing import read_table

    size, width = 24, 3
    values = np.random.default_rng(0).normal(size=(size, width)).astype(np.float32)

    def array(content, **options):
        out = io.BytesIO()
        np.save(out, content, **options)
        return out.getvalue()

    words = "\n".join(map(str, range(size))).encode()
    npy = {"a.npy": array(values), "w.txt": words}
    yield Target("npy-table", [npy], lambda f: read_table(f / "a.npy", words=f / "w.txt"))
    yield Target("npy-rows", [npy], lambda f: read_table(f / "a.npy"), ("a.npy",))
    lines = [f"{n} " + " ".join(f"{x:.4f}" for x in values[n]) for n in range(size)]
    glove = {"a.txt": "\n".join(lines).encode()}
    word2vec = {"a.txt": "\n".join([f"{size} {width}", *lines]).encode()}
    yield Target("vectors", [glove, word2vec], lambda f: read_table(f / "a.txt"))
    entry = {"dtype": "F32", "shape": [size, width], "data_offsets": [0, values.nbytes]}
    header = json.dumps({"wte.weight": entry}).encode()
    weights = len(header).to_bytes(8, "little") + header + values.tobytes()
    vocabulary = {str(n): n for n in range(size)}
    full = json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}).encode()
    pairs = json.dumps({"model": {"vocab": [[str(n), 0.0] for n in range(size)]}}).encode()
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "0"}
    splitter = {"type": "Whitespace"}
    loadable = json.dumps({"version": "1.0", "model": model, "pre_tokenizer": splitter}).encode()
    index = json.dumps({"weight_map": {"wte.weight": "one.safetensors"}}).encode()
    seeds = [
        {"model.safetensors": weights, "tokenizer.json": full},
        {"model.safetensors": weights, "tokenizer.json": pairs},
        {"model.safetensors": weights, "tokenizer.json": loadable},
        {"model.safetensors": weights, "vocab.json": json.dumps(vocabulary).encode()},
        {"model.safetensors": weights, "vocab.txt": words},
        {"model.safetensors.index.json": index, "one.safetensors": weights, "vocab.txt": words},
    ]
    # tokens that do not fit are named by number
    yield Target("checkpoint-table", seeds, read_table, is_named=False)


def _histories():
    from fulgurite.models.number_probing.reports.history import find_runs, read_run, summary

    def table(rows):
        out = io.StringIO()
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue().encode()

    probes = table(
        [
            {"step": s, "period": p, "kappa": 0.5, "local_ratio": 2.0, "verdict": "yes"}
            for s in (1, 5)
            for p in (2, 10)
        ]
    )
    metrics = table([{"step": s, "val/acc": 0.1 * s, "train/loss": ""} for s in range(3)])
    record = json.dumps({"method": "m", "setting": {"a": 1}, "id": "x-0"}).encode()
    seeds = [
        {"run/probe.csv": probes, "run/metrics.csv": metrics},
        {
            "results/x-0.json": record,
            "cells/x-0/probe.csv": probes,
            "cells/x-0/metrics.csv": metrics,
        },
    ]

    def read(folder):
        runs = {k: [read_run(f) for f in found] for k, found in find_runs(folder).items()}
        summary(runs, [2, 5, 10])

    yield Target("history", seeds, read)


def _checkpoints():
    import torch
    from torch import nn

    from fulgurite.models.cs_arm_bn import convert_batchnorm
    from fulgurite.models.cs_arm_bn.references import load_reference
    from fulgurite.models.cs_arm_bn.weights import load_network
    from fulgurite.weights import load_weights

    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))

    def saved(content, **options):
        out = io.BytesIO()
        torch.save(content, out, **options)
        return {"a.ckpt": out.getvalue()}

    state = network.state_dict()
    whole = {"state_dict": state, "epoch": 3, "loops": {"a": [1, 2.0, None, "x"]}, "b": b"bytes"}
    own = {f"network.{name}": value for name, value in state.items()}
    reference = {"1": [torch.ones(1), torch.ones(1), *(torch.ones(2) for _ in range(5))]}
    contents = [state, whole, {"state_dict": own, "context_reference": reference}]
    seeds = [saved(content) for content in contents]
    seeds += [saved(state, _use_new_zipfile_serialization=False)]
    converted = convert_batchnorm(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)))
    load_reference(converted, {})
    yield Target("weights", [*seeds[:2], seeds[3]], lambda f: load_weights(network, f / "a.ckpt"))
    from safetensors.torch import save

    safe = {"a.safetensors": save({name: value.contiguous() for name, value in state.items()})}
    yield Target(
        "weights.safetensors", [safe], lambda f: load_weights(network, f / "a.safetensors")
    )
    # a reference that does not fit is named by layer
    yield Target(
        "checkpoint", seeds, lambda f: load_network(converted, str(f / "a.ckpt")), is_named=False
    )


_GROUPS = (
    *(
        _cifar,
        _image_embeddings,
        _pictures,
        _arrays,
        _annotations,
        _layer_files,
        _climate,
        _tables,
        _texts,
        _embeddings,
    ),
    *(_histories, _checkpoints, _call_tensors),
)


def make_targets():
    """All formats, by name."""
    targets: dict[str, Target] = {}
    for target in (target for group in _GROUPS for target in group()):
        if target.name in targets:  # the second would be tried in the place of the first
            raise ValueError(f"two formats are called {target.name}")
        targets[target.name] = target
    return targets
