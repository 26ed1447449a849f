"""Files of strangers: bombs, forgeries and damage are one error, in ten seconds and a gibibyte."""

import bz2
import contextlib
import gzip
import io
import json
import os
import pickle
import resource
import signal
import struct
import tarfile
import zipfile
import zlib
from functools import partial

import h5py
import numpy as np
import pandas as pd
import psutil
import pytest
import tifffile
import torch
from PIL import Image
from scipy.io import loadmat, savemat

from fulgurite.attention.budget import parse_budget
from fulgurite.datamodules.cs_arm_bn.jump import JumpPlates
from fulgurite.datamodules.cs_arm_bn.site_readers import FileReader
from fulgurite.datamodules.cs_arm_bn.table_files import read_table
from fulgurite.datamodules.cs_arm_bn.tables import CsvPlates
from fulgurite.datamodules.fedsir import CifarArchive, ImageFolder, Npz
from fulgurite.datamodules.fedsir.cifar_pickle import interpret_pickle
from fulgurite.datamodules.ice_layers import MarClimate, NpzStacks
from fulgurite.datamodules.ice_layers.climate.mar import ClimateRequest
from fulgurite.datamodules.ice_layers.readers.layer_frames import read_mat
from fulgurite.datamodules.number_probing.corpus import read_documents
from fulgurite.datamodules.number_probing.tokenizers import FileTokenizer
from fulgurite.errors import CheckpointError, ConfigError, DataError, FulguriteError
from fulgurite.foreign import expansion_limit, read_arrays, read_csv, read_json, reading
from fulgurite.hdf5 import NetcdfFile
from fulgurite.models.ice_layers import read_npz
from fulgurite.models.number_probing import parse_numbers
from fulgurite.models.number_probing import read_table as read_embeddings
from fulgurite.models.number_probing.reports.history import find_runs, read_run
from fulgurite.tensor_files import load_plain
from fulgurite.testing.files import python2_pickle, write_cifar_archive
from fulgurite.weights import load_weights

MANY = 80 << 20  # bytes that a small file expands to


@pytest.fixture(scope="module")
def zeros():
    """Deflated zeros, more than a small file may expand to."""
    compressor = zlib.compressobj(1, zlib.DEFLATED, 31)
    block = bytes(1 << 20)
    parts = [compressor.compress(block) for _ in range(MANY >> 20)]
    return b"".join([*parts, compressor.flush()])


def limited(call):
    """The error that a call ends with, in a child with 10 s and 1 GiB; text of a crash else."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), resource.RLIM_INFINITY))
        signal.setitimer(signal.ITIMER_REAL, 10)
        try:
            text = f"nothing was raised: {call()!r}"[:500]
        except FulguriteError as error:
            text = str(error)
        except BaseException as error:
            text = f"unnamed {type(error).__name__}: {error}"
        os.write(writable, text.encode()[:4000])
        os._exit(0)
    os.close(writable)
    with os.fdopen(readable, "rb") as pipe:
        text = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    return text if os.WIFEXITED(status) else f"signal {os.WTERMSIG(status)}"


def npy(array):
    out = io.BytesIO()
    np.save(out, array, allow_pickle=True)
    return out.getvalue()


def header(shape, kind="<f8"):
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        out, {"descr": kind, "fortran_order": False, "shape": shape}
    )
    return out.getvalue()


# --- arrays --------------------------------------------------------------------------------------


def npz_of(path, members, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def encrypt(path):
    """Say in both headers of the only member that it is encrypted."""
    content = bytearray(path.read_bytes())
    content[6] |= 1
    content[content.rfind(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("bomb", "expand to"),
        ("encrypted", "is encrypted"),
        ("odd method", "compressed by method 12"),
        ("npy", "not a zip file"),
        ("long", "out of proportion"),
        ("objects", "neither numbers nor text: write text as `np.array(names"),
        ("empty text", "neither numbers nor text"),
        ("empty axis", "out of proportion"),
        ("negative", "its shape is"),
        ("header", "cannot be read"),
        ("twice", "two members of one name"),
        ("checksum", "Bad CRC-32"),
    ],
)
def test_npz_files_that_are_none(tmp_path, how, words):
    path = tmp_path / "a.npz"
    good = npy(np.ones((4, 2)))
    members = {
        "bomb": {"thickness.npy": header((MANY // 8,)) + bytes(MANY * (how == "bomb"))},
        "long": {"thickness.npy": header((10**12,)) + bytes(64)},
        "objects": {"thickness.npy": npy(np.array([{}]))},
        "empty text": {"thickness.npy": header((10**18,), "<U0")},
        "empty axis": {"thickness.npy": header((10**12, 0))},
        "negative": {"thickness.npy": header((-4, -2)) + bytes(64)},
        "header": {"thickness.npy": header((4, 2)).replace(b"'<f8'", b"'<f8"[:5]) + bytes(64)},
    }.get(how, {"thickness.npy": good, "pos.npy": good})
    method = zipfile.ZIP_BZIP2 if how == "odd method" else zipfile.ZIP_DEFLATED
    npz_of(path, members if how != "encrypted" else {"thickness.npy": good}, method)
    if how == "encrypted":
        encrypt(path)
    if how == "npy":
        path.write_bytes(good)
    if how == "twice":
        with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("pos.npy", good)
    if how == "checksum":
        npz_of(path, members, zipfile.ZIP_STORED)
        content = bytearray(path.read_bytes())
        content[content.index(b"NUMPY") + 140] ^= 1
        path.write_bytes(content)
    for read in (lambda: NpzStacks(str(tmp_path)).load(), lambda: read_npz(path)):
        text = limited(read)
        assert words in text
        assert "a.npz" in text
    assert "a.npz" in limited(lambda: Npz(str(path)).load())


def test_arrays_are_read_as_numpy_reads_them(tmp_path):
    arrays = {
        "a": np.arange(6.0).reshape(2, 3),
        "f": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "big": np.arange(3, dtype=">i4"),
        "text": np.array(["é", "longer"]),
        "none": np.zeros((0, 2)),
        "one": np.float32(3),
        "flag": np.array([True, False]),
    }
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    found = read_arrays(tmp_path / "a.npz")
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == np.asarray(array).dtype.newbyteorder("=")  # for torch


# --- pictures ------------------------------------------------------------------------------------


def test_pictures_that_expand_or_are_others_are_refused(tmp_path, zeros):
    def chunk(kind, content):
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    size = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(png)
    text = limited(lambda: FileReader(3)([str(tmp_path / "a.png")]))
    assert "a.png" in text
    assert "pixels" in text
    # what Ghostscript would be started for, were its content asked
    (tmp_path / "b.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    assert "b.png is damaged or none (it is neither" in limited(
        lambda: FileReader(3)([str(tmp_path / "b.png")])
    )
    for inner, words in ((png, "pixels"), (None, "is encrypted")):
        if inner is None:
            out = io.BytesIO()
            Image.new("RGB", (4, 4)).save(out, "PNG")
            npz_of(tmp_path / "i.zip", {"train/c/0.png": out.getvalue()})
            encrypt(tmp_path / "i.zip")
        else:
            npz_of(tmp_path / "i.zip", {"train/c/0.png": inner})
        assert words in limited(lambda: ImageFolder(str(tmp_path / "i.zip")).image_size)


def test_a_tiff_whose_piece_expands_is_refused(tmp_path, zeros):
    path = tmp_path / "a.tiff"
    tifffile.imwrite(path, np.zeros((8, 8), np.uint16), compression="zlib")
    with tifffile.TiffFile(path) as file:
        tag = file.pages.first.tags
        places = tag["StripOffsets"].valueoffset, tag["StripByteCounts"].valueoffset
    content = bytearray(path.read_bytes())
    bomb = zlib.compress(bytes(MANY), 1)
    for place, value in zip(places, (len(content), len(bomb)), strict=True):
        content[place : place + 4] = struct.pack("<I", value)
    path.write_bytes(content + bomb)
    assert "expands beyond its size" in limited(lambda: FileReader(1)([str(path)]))


def test_tables_name_files_unless_addresses_are_allowed(tmp_path):
    table = tmp_path / "t.csv"
    rows = {"source": "l", "batch": "1", "plate": "p", "site": "1", "well": ["A01", "A02"]}
    rows |= {"role": ["query", "control"], "label": ["x", None]}
    for address in ("http://example.org/a.png", "s3://b/a.png", "memory://a.png", "file:///a.png"):
        pd.DataFrame(rows | {"path": address}).to_csv(table, index=False)
        source = CsvPlates(str(table), ["grey"])
        with pytest.raises(DataError, match=r"names the address .*remote=\[s3") as error:
            source.reader(source.load().paths()[0])
        assert type(error.value) is DataError  # no image that could be left out
    import fsspec

    with fsspec.open("memory://a.npy", "wb") as file:
        file.write(npy(np.ones((4, 4))))
    source = CsvPlates(str(table), ["grey"], files={"remote": ["memory://"]})
    assert source.reader(["memory://a.npy"]).shape == (1, 4, 4)
    assert JumpPlates(str(tmp_path)).reader.remote == ()
    assert JumpPlates(str(tmp_path), files={"prefixes": {}}).reader.remote == (
        "s3://cellpainting-gallery/",
    )
    assert JumpPlates(str(tmp_path), files={"prefixes": {"/a/": "s3://b/"}}).reader.remote == (
        "s3://b/",
    )


def test_pipes_are_refused_instead_of_waited_for(tmp_path):
    for name in ("a.npy", "a.csv", "a.mat", "a.nc", "a.tiff"):
        os.mkfifo(tmp_path / name)
    for read in (
        lambda: FileReader(1)([str(tmp_path / "a.npy")]),
        lambda: FileReader(1)([str(tmp_path / "a.tiff")]),
        lambda: read_mat(tmp_path / "a.mat"),
        lambda: read_embeddings(tmp_path / "a.npy"),
        lambda: MarClimate([str(tmp_path / "a.nc")]).sample([]),
    ):
        assert "no regular file" in limited(read)


# --- tables --------------------------------------------------------------------------------------


def test_tables_that_expand_are_refused(tmp_path, zeros):
    (tmp_path / "a.csv.gz").write_bytes(zeros)
    assert "expands to more than" in limited(lambda: read_table(tmp_path / "a.csv.gz"))
    (tmp_path / "b.csv").write_bytes(b"," * 1_000_000)
    assert "fields" in limited(lambda: read_table(tmp_path / "b.csv"))
    (tmp_path / "c.csv").write_text("a,b\n1,2,3\n")  # its first column would become an index
    assert "more fields than the header" in limited(lambda: read_table(tmp_path / "c.csv"))
    pd.DataFrame({"text": ["x"]}).loc[[0] * 9_000_000].to_parquet(tmp_path / "d.parquet")
    assert "rows" in limited(lambda: read_table(tmp_path / "d.parquet"))
    assert "rows" in limited(lambda: [*read_documents([tmp_path / "d.parquet"])])


def test_histories_that_are_none(tmp_path):
    (tmp_path / "run").mkdir()
    good = "step,period,kappa,verdict\n1,2,0.5,x\n"
    for probes, metrics, words in (
        ("step,period,kappa\n1\n", None, "probe.csv is no table"),
        ("step,period,kappa\n1,2,3,4\n", None, "more fields than the header"),
        ("step,step,kappa\n1,2,3\n", None, "two columns"),
        (f'step,period\n1,"{"x" * 200_000}"\n', None, "probe.csv cannot be read"),
        (good, "step,val/acc\n,0.5\n", "metrics.csv is no table"),
        (good, "step,val/acc\n1,x\n", "metrics.csv is no table"),
    ):
        (tmp_path / "run" / "probe.csv").write_text(probes)
        (tmp_path / "run" / "metrics.csv").write_text(metrics or "step\n")
        with pytest.raises(DataError, match=words):
            read_run(tmp_path / "run")
    (tmp_path / "results").mkdir()
    for record in ("", "[]", "{}", '{"method": 1, "setting": [], "id": 2}', "[" * 100_000):
        (tmp_path / "results" / "a.json").write_text(record)
        with pytest.raises(DataError, match=r"a\.json is none of a comparison"):
            find_runs(tmp_path)


# --- CIFAR ---------------------------------------------------------------------------------------


def reduce(module, name, arguments):
    """A pickle of a field ``data`` that is a call."""
    return (
        b"\x80\x02}U\x04datac" + f"{module}\n{name}\n".encode() + pickle.dumps(arguments, 2)[2:-1]
        + b"Rs."
    )  # fmt: skip


@pytest.mark.parametrize(
    ("content", "words"),
    [
        # an array of objects at an address of the file's choice
        (reduce("numpy", "ndarray", ((), "O", b"A" * 8)), "it calls numpy.ndarray"),
        (reduce("_codecs", "encode", ("a" * 100, "hex")), "it calls _codecs.encode"),
        (reduce("os", "system", ("true",)), "it asks for os.system"),
        (reduce("numpy", "dtype", ("O8", 0, 1)), "its field b'data' holds"),
        (pickle.dumps({"a": [[1]]}, 2), "neither numbers nor text"),
        (pickle.dumps({"a": {"b": 1}}, 2), "holds dict"),
        (pickle.dumps({"a": 1.5}, 2), "opcode BINFLOAT"),
        (pickle.dumps({"a": bytearray(9)}, 5), "holds bytearray"),
        (b"\x80\x02}U\x01aX\xff\xff\xff\x7fabc", ""),
        (b"\x80\x02}q\x00h\x05.", ""),
        (b"\x80\x02]h\x00.", ""),
        (b"", ""),
    ],
)
def test_pickles_of_another_shape_than_cifar_are_refused(tmp_path, content, words):
    path = write_cifar_archive(tmp_path / "c.tar.gz", extra={"data_batch_2": content}, per_class=1)
    text = limited(lambda: CifarArchive(str(path), checksum=None).load())
    assert f"The pickle data_batch_2 of {path} was refused" in text
    assert words in text


@pytest.mark.parametrize("kind", ["u1", "<i8", ">i4", "?"])
@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, "python 2"])
def test_pickles_of_arrays_are_read_bit_for_bit(kind, protocol):
    array = np.arange(6).reshape(2, 3).astype(kind)
    for each in (array, np.asfortranarray(array)):
        content = {b"data": each, b"labels": [1, 2], b"names": [b"\xe9", b"x"]}
        dump = python2_pickle if protocol == "python 2" else lambda v: pickle.dumps(v, protocol)
        found = interpret_pickle(dump(content))
        np.testing.assert_array_equal(found[b"data"], array)
        assert found[b"data"].dtype.newbyteorder("=") == array.dtype.newbyteorder("=")
        assert (found[b"labels"], found[b"names"]) == ([1, 2], [b"\xe9", b"x"])
        found[b"data"][:] = 0  # it owns its memory


def test_archives_that_expand_are_refused(tmp_path, zeros):
    (tmp_path / "a.tar.gz").write_bytes(zeros)
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz", compresslevel=1) as archive:
        member = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        member.size = MANY
        archive.addfile(member, io.BytesIO(bytes(MANY)))
    (tmp_path / "c.tar.gz").write_bytes(bz2.compress(gzip.decompress(zeros), 9))
    for name, words in (("a", "holds no file"), ("b", "expands to more"), ("c", "holds no file")):
        text = limited(
            lambda n=name: CifarArchive(str(tmp_path / f"{n}.tar.gz"), checksum=None).load()
        )
        assert words in text or "expands to more" in text
        assert f"{name}.tar.gz" in text


# --- MATLAB and NetCDF ---------------------------------------------------------------------------


def test_matlab_5_agrees_with_scipy(tmp_path):
    cell = np.empty(3, object)
    cell[:] = [1.0, "ab", np.arange(3)]
    content = {
        "a": np.arange(6.0).reshape(2, 3),
        "small": np.int8([[1, 2]]),
        "text": "hé",
        "cell": cell,
        "both": {"x": 1, "y": {"z": "q"}},
        "many": np.array([(1, "a"), (2, "b")], dtype=[("n", "f8"), ("t", "O")]),
        "complex": np.array([1 + 2j, 3]),
        "flags": np.array([True, False]),
        "none": np.zeros((0, 3)),
    }
    for compress in (False, True):
        savemat(tmp_path / "a.mat", content, do_compression=compress)
        found = read_mat(tmp_path / "a.mat")
        expected = loadmat(tmp_path / "a.mat", simplify_cells=True)
        assert set(found) == set(content)
        for name in ("a", "small", "complex", "flags"):
            np.testing.assert_array_equal(found[name], expected[name])
        assert (found["text"], found["both"]) == (expected["text"], expected["both"])
        assert [row["t"] for row in found["many"]] == ["a", "b"]
        assert found["cell"][1] == "ab"
        assert not found["none"].size


def test_no_byte_of_a_matlab_file_crashes(tmp_path):
    savemat(tmp_path / "a.mat", {"lat": np.arange(9.0), "names": np.array(["a", "b"], object)})
    whole = (tmp_path / "a.mat").read_bytes()
    read = 0
    for at in range(len(whole)):
        path = tmp_path / "b.mat"
        path.write_bytes(whole[:at] + bytes([(0, 255, whole[at] ^ 1)[at % 3]]) + whole[at + 1 :])
        with contextlib.suppress(DataError):
            read_mat(path)
            read += 1
    assert read > 100  # the header's text is free


def test_compressed_matlab_bombs_are_refused(tmp_path):
    bomb = zlib.compress(struct.pack("<II", 14, MANY) + bytes(MANY), 1)
    head = b"MATLAB 5.0".ljust(124) + struct.pack("<H", 256) + b"IM"
    (tmp_path / "a.mat").write_bytes(head + struct.pack("<II", 15, len(bomb)) + bomb)
    assert "a.mat" in (text := limited(lambda: read_mat(tmp_path / "a.mat")))
    assert "expands too much" in text


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("references", "too far"),
        ("external storage", "in another file"),
        ("external link", "may lead to another file"),
        ("soft link", "may lead to another file"),
        ("virtual", "in another file"),
        ("empty chunks", "out of proportion"),
        ("deep", "nested too deeply"),
    ],
)
def test_matlab_73_leads_out_of_itself_or_without_end(tmp_path, how, words):
    secret = tmp_path / "secret"
    secret.write_bytes(b"x" * 80)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["lat"] = np.arange(3.0)
    path = tmp_path / "a.mat"
    with h5py.File(path, "w", userblock_size=512) as file:
        if how == "references":
            file.create_dataset("#refs#/r0", data=np.arange(3.0))
            for k in range(1, 30):
                cells = [[file[f"#refs#/r{k - 1}"].ref] * 4]
                file.create_dataset(f"#refs#/r{k}", data=np.array(cells, h5py.ref_dtype))
            file["lat"] = np.array([[file["#refs#/r29"].ref]], h5py.ref_dtype)
        elif how == "external storage":
            file.create_dataset("lat", (10,), "f8", external=[(str(secret), 0, 80)])
        elif how == "external link":
            file["lat"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "/lat")
        elif how == "soft link":
            file["lat"] = h5py.SoftLink("/lat")
        elif how == "virtual":
            layout = h5py.VirtualLayout((3,), "f8")
            layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "lat", (3,))
            file.create_virtual_dataset("lat", layout)
        elif how == "empty chunks":
            file.create_dataset("lat", (10**6, 10**6), "f8", chunks=(10, 10))
        else:
            group = file
            for _ in range(50):
                group = group.create_group("g")
    with open(path, "r+b") as raw:
        raw.write(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM")
    text = limited(lambda: read_mat(path))
    assert "a.mat" in text
    assert words in text


def test_netcdf_that_leads_elsewhere_or_is_none_is_refused(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"x" * 80)
    with h5py.File(tmp_path / "a.nc", "w") as file:
        file.create_dataset("LAT", (10,), "f8", external=[(str(secret), 0, 80)])
    (tmp_path / "b.nc").write_bytes(b"\x0e\x03\x13\x01" + bytes(200))  # HDF4
    request = ClimateRequest(np.array([[70.0, -40.0]]), np.array([400.0, 0.0]))
    for name, words in (("a", "in another file"), ("b", "no NetCDF")):
        path = str(tmp_path / f"{name}.nc")
        climate = MarClimate([path])
        text = limited(partial(climate.sample, [request]))
        assert words in text
        assert path in text


def test_a_crash_of_the_reading_process_is_an_error_and_the_next_file_is_read(
    tmp_path, monkeypatch
):
    from fulgurite import hdf5

    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = np.arange(3.0)
    assert "x" in NetcdfFile(tmp_path / "a.h5").variables
    (worker,) = (
        child
        for child in psutil.Process().children()
        if child.is_running()
        and child.status() != psutil.STATUS_ZOMBIE
        and "hdf5_worker.py" in str(child.cmdline())
    )
    worker.suspend()  # it has the request when it crashes, and never answers it
    select = hdf5.select.select
    monkeypatch.setattr(hdf5.select, "select", lambda *given: (worker.kill(), select(*given))[1])
    with pytest.raises(ValueError, match=r"reader crashed \(signal 9\)"):
        NetcdfFile(tmp_path / "a.h5")
    monkeypatch.undo()
    np.testing.assert_array_equal(NetcdfFile(tmp_path / "a.h5").read("x"), np.arange(3.0))


# --- checkpoints ---------------------------------------------------------------------------------


def zipped(path, content, change):
    """A file of ``torch.save``, its pickle changed, and zipped again."""
    torch.save(content, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    npz_of(path, {n: change(n, c) for n, c in members.items()}, zipfile.ZIP_STORED)


NO_STATE = (
    [1],
    None,
    {},
    {None: torch.ones(1)},
    {"state_dict": None},
    {"state_dict": {}},
    {"a": 1},
)


@pytest.mark.parametrize("content", [torch.ones(2), *NO_STATE])
def test_weights_that_are_no_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt holds no state dict"):
        load_weights(torch.nn.Linear(2, 2), tmp_path / "a.pt")


def test_damaged_and_inflating_checkpoints_are_refused(tmp_path):
    path = tmp_path / "a.ckpt"

    def read():
        return load_plain(path, "weights")

    torch.save({"a": torch.arange(1000.0), "b": b"bytes"}, path)
    assert read()["b"] == b"bytes"
    content = bytearray(path.read_bytes())
    content[content.index(struct.pack("<f", 700.0))] ^= 1
    path.write_bytes(content)
    assert "does not hold: it is damaged" in limited(read)
    torch.save({"a": torch.zeros(MANY // 4)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    npz_of(path, members)
    assert "are compressed" in limited(read)
    torch.save({"a": torch.zeros(1).expand(10**6, 10**6)}, path)
    assert "expand to" in limited(read)
    # a protocol 2 pickle of encode("…", "hex"), again and again, doubles a text each time
    twice = b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R"
    zipped(path, {}, lambda n, c: b"\x80\x02" + twice + b"." if n.endswith("data.pkl") else c)
    assert "codec hex" in limited(read)


# --- numbers and their tokens --------------------------------------------------------------------


def write_tensors(folder, vocabulary, values, entry=None):
    values = np.asarray(values, np.float32)
    whole = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [0, values.nbytes]}
    text = json.dumps({"wte.weight": entry or whole}).encode()
    content = len(text).to_bytes(8, "little") + text + values.tobytes()
    (folder / "model.safetensors").write_bytes(content)
    text = vocabulary if isinstance(vocabulary, str) else json.dumps(vocabulary)
    (folder / "vocab.json").write_text(text)


VALUES = np.random.default_rng(0).normal(size=(30, 2))
GOOD = {str(n): n for n in range(30)}


@pytest.mark.parametrize(
    ("vocabulary", "values", "entry", "words"),
    [
        (GOOD | {"7": -3}, VALUES, None, "token of the number 7 in .* is -3"),
        (GOOD | {"7": "x"}, VALUES, None, "token of the number 7 in .* is 'x'"),
        (GOOD | {"7": 7.0}, VALUES, None, "token of the number 7 in .* is 7.0"),
        (GOOD | {"7": True}, VALUES, None, "token of the number 7 in .* is True"),
        (GOOD | {"7": 10**30}, VALUES, None, "asks for row"),
        (dict.fromkeys(GOOD, 5), VALUES, None, "0 and 1 in .* have the same token 5"),
        (GOOD, VALUES * np.nan, None, "not finite"),
        (GOOD, VALUES * np.inf, None, "not finite"),
        ('{"0": 0, "0": 1}', VALUES, None, "names '0' twice"),
        ("[" * 100_000, VALUES, None, "nested too deeply"),
        ('{"7": ' + "9" * 5000 + "}", VALUES, None, "cannot be read as JSON"),
        (GOOD, VALUES, {"dtype": "F32", "shape": [30, 2], "data_offsets": [-240, 0]}, "no whole"),
        (GOOD, VALUES, {"dtype": "F32", "shape": [30.0, 2], "data_offsets": [0, 240]}, "no whole"),
        (GOOD, VALUES, {"dtype": ["F32"], "shape": [30, 2], "data_offsets": [0, 240]}, "no whole"),
        (GOOD, VALUES, {"dtype": "F32", "shape": [10**30, 2], "data_offsets": [0, 8]}, "no whole"),
        (GOOD, VALUES, [1], "no whole"),
    ],
)
def test_tables_of_a_checkpoint_that_do_not_fit(tmp_path, vocabulary, values, entry, words):
    write_tensors(tmp_path, vocabulary, values, entry)
    with pytest.raises(DataError, match=words):
        read_embeddings(tmp_path)


def test_numbers_that_come_twice_in_a_list_of_words_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", VALUES)
    (tmp_path / "w.txt").write_text("\n".join([*map(str, range(29)), "7"]))
    with pytest.raises(DataError, match=r"'7' comes twice in .*w\.txt, in lines 8 and 30"):
        read_embeddings(tmp_path / "a.npy", words=tmp_path / "w.txt")


def test_huge_numbers_are_refused_by_name():
    for text in ("0:10000000000", "0:1000,5:2000000", "9" * 400 + ":" + "9" * 401):
        with pytest.raises(ConfigError, match="more than 1,000,000 numbers"):
            parse_numbers(text)
    with pytest.raises(ConfigError, match="no distinct whole numbers"):
        parse_numbers("9" * 5000)
    for budget in (10**400, 10**5000, "9" * 400 + "T", float("inf")):
        with pytest.raises(ConfigError, match=r"memory budget .* cannot be read"):
            parse_budget(budget, torch.device("cpu"))


def test_tokenizers_that_fail_or_inflate(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {str(n): n for n in range(5)} | {"a": 5}
    whole = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    content = json.loads(whole.to_str())

    def written(**changes):
        (tmp_path / "tokenizer.json").write_text(json.dumps(content | changes))
        return FileTokenizer(str(tmp_path))

    with pytest.raises(DataError, match=r"tokenizer.json cannot encode the text .*UNK"):
        written().encode(["b"])
    # a text is neither cut nor filled up
    padding = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None,
               "pad_id": 0, "pad_type_id": 0, "pad_token": "0"}  # fmt: skip
    cut = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    assert written(padding=padding, truncation=cut).encode(["1 2 a"]) == [[1, 2, 5]]
    rule = {"type": "Replace", "pattern": {"String": "a"}, "content": "b" * 10**6}
    with pytest.raises(DataError, match="rules puts 1,000,000 characters"):
        written(normalizer=rule)
    vocabulary = content["model"] | {"vocab": words | {"b": 2**32 - 1}}
    with pytest.raises(DataError, match="one has the number 4,294,967,295"):
        written(model=vocabulary)


# --- the helpers ---------------------------------------------------------------------------------


def test_reading_names_the_file_and_lets_other_errors_pass(tmp_path):
    def fail(error):
        with reading("a.x", "The thing", "Mend it."):
            raise error

    for error in (ValueError("bad"), MemoryError(), RecursionError(), KeyError("x"), OSError()):
        with pytest.raises(DataError, match=r"The thing a\.x cannot be read \(.+\)\. Mend it\."):
            fail(error)
    for error in (ConfigError("mine"), ImportError("none"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            fail(error)
    assert expansion_limit(10**9) == 10**11
    with pytest.raises(ValueError, match="names 'a' twice"):
        read_json(b'{"a": 1, "a": 2}')


def test_only_an_empty_cell_of_a_table_is_missing(tmp_path):
    (tmp_path / "a.csv").write_text("name,count\nNA,1\nNone,\n,nan\n")
    table = read_csv(tmp_path / "a.csv", dtype=str)
    assert table["name"].tolist()[:2] == ["NA", "None"]
    assert table.isna().to_numpy().tolist() == [[False, False], [False, True], [True, False]]
