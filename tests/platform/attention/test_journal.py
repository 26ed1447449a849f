"""What a journal trusts: its results, its inputs, its own files, and nobody beside it."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from fakes.forks import start_script

from fulgurite.attention import attend_files, attend_files_backward, memory_mapped
from fulgurite.attention import journal as journal_module
from fulgurite.attention import mapped as mapped_module
from fulgurite.attention import parts as parts_module
from fulgurite.errors import CheckpointError, ConfigError, DataError

SHAPE = (1, 2, 300, 8)
OPTIONS = {"memory_budget": "12KiB", "progress": False, "is_causal": True}


def make(folder, name, shape=SHAPE, fill=None, seed=0):
    tensor = memory_mapped(folder / name, shape, torch.float32, create=True)
    if fill is None:
        tensor.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
    else:
        tensor.fill_(fill)
    return tensor


def files(folder):
    """Query, key, value, out and lse in files."""
    folder.mkdir(exist_ok=True)
    inputs = [make(folder, name, seed=i) for i, name in enumerate("qkv")]
    return [*inputs, make(folder, "out", fill=0), make(folder, "lse", SHAPE[:-1], fill=0)]


def again(folder):
    return [
        memory_mapped(folder / name, SHAPE[: 3 if name == "lse" else 4], torch.float32)
        for name in ("q", "k", "v", "out", "lse")
    ]


def stop_after(monkeypatch, count, error=KeyboardInterrupt):
    """End a run behind so many entries of its journal."""
    append, entries = journal_module.append_entry, []

    def counting(file, data):
        append(file, data)
        entries.append(data)
        if len(entries) == count:
            raise error

    monkeypatch.setattr(journal_module, "append_entry", counting)


def half_done(folder, monkeypatch, schedule):
    tensors = files(folder)
    with monkeypatch.context() as patch:
        stop_after(patch, 8)
        with pytest.raises(KeyboardInterrupt):
            attend_files(
                tensors[:3], tensors[3:], schedule=schedule, journal=folder / "journal", **OPTIONS
            )
    return tensors


def expected(tensors):
    return torch.nn.functional.scaled_dot_product_attention(*tensors[:3], is_causal=True)


@pytest.mark.parametrize("schedule", ["rect", "cqs"])
@pytest.mark.parametrize("result", ["out", "lse"])
def test_results_that_are_not_those_of_the_journal_are_refused(
    tmp_path, monkeypatch, schedule, result
):
    half_done(tmp_path, monkeypatch, schedule)
    path = tmp_path / result
    shape, content = SHAPE[: 4 if result == "out" else 3], path.read_bytes()
    options = {"schedule": schedule, "journal": tmp_path / "journal", **OPTIONS}

    def refuse():
        tensors = again(tmp_path)
        with pytest.raises(CheckpointError, match=rf"{result} is not the result .* at tokens"):
            attend_files(tensors[:3], tensors[3:], **options)

    path.unlink()
    make(tmp_path, result, shape, fill=0)  # removed and made anew
    refuse()
    make(tmp_path, "other", shape, seed=5)  # another file in its place
    os.replace(tmp_path / "other", path)
    refuse()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])  # one bit of what is done has changed
    refuse()
    path.write_bytes(content)
    os.truncate(path, len(content) // 2)
    with pytest.raises(DataError, match=f"{result} has {len(content) // 2} bytes"):
        again(tmp_path)
    path.write_bytes(content)
    tensors = again(tmp_path)
    attend_files(tensors[:3], tensors[3:], **options)
    torch.testing.assert_close(again(tmp_path)[3], expected(again(tmp_path)))


@pytest.mark.parametrize("schedule", ["rect", "cqs"])
def test_a_copied_folder_goes_on(tmp_path, monkeypatch, schedule):
    half_done(tmp_path / "a", monkeypatch, schedule)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    tensors = again(tmp_path / "b")
    if schedule == "cqs":  # rows that no unit has written begin anew, whatever is in them
        done = tensors[4].isfinite()
        tensors[4][~done] = 3.0
        tensors[3][~done] = torch.nan
    options = {"schedule": schedule, "journal": tmp_path / "b/journal", **OPTIONS}
    with monkeypatch.context() as patch:
        computed = []
        append = journal_module.append_entry
        patch.setattr(journal_module, "append_entry", lambda *x: (computed.append(1), append(*x)))
        attend_files(tensors[:3], tensors[3:], **options)
    entries = (tmp_path / "b/journal/done").stat().st_size // journal_module.ENTRY_SIZE
    assert entries == len(computed) + 8
    torch.testing.assert_close(tensors[3], expected(tensors))


def test_gradients_that_are_not_those_of_the_journal_are_refused(tmp_path):
    query, key, value, out, lse = files(tmp_path)
    grad = make(tmp_path, "grad", seed=7)
    attend_files((query, key, value), (out, lse), **OPTIONS)
    grads = [make(tmp_path, name, fill=0) for name in ("dq", "dk", "dv")]
    options = {"journal": tmp_path / "journal", **OPTIONS}
    attend_files_backward(grad, (query, key, value), (out, lse), grads, **options)
    attend_files_backward(grad, (query, key, value), (out, lse), grads, **options)
    with pytest.raises(CheckpointError, match="dkey is not the result"):
        attend_files_backward(
            grad, (query, key, value), (out, lse), (grads[0], grads[2], grads[1]), **options
        )
    lse[0, 0, 0] += 1
    with pytest.raises(CheckpointError, match=r"of other tensors \(lse differs\)"):
        attend_files_backward(grad, (query, key, value), (out, lse), grads, **options)


HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write("4711 on elsewhere"); file.flush()
print("locked", flush=True)
time.sleep(100)
"""


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    tensors, journal = files(tmp_path), tmp_path / "journal"
    journal.mkdir()
    command = [sys.executable, "-c", HOLDER, str(journal / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(CheckpointError, match=r"in use by another process \(4711 on else"):
            attend_files(tensors[:3], tensors[3:], journal=journal, **OPTIONS)
        process.kill()
    attend_files(tensors[:3], tensors[3:], journal=journal, **OPTIONS)
    torch.testing.assert_close(tensors[3], expected(tensors))


def test_a_second_run_of_the_same_process_is_refused(tmp_path, monkeypatch):
    tensors, journal = files(tmp_path), tmp_path / "journal"
    append, refused = journal_module.append_entry, []

    def nested(*arguments):
        if not refused:
            with pytest.raises(CheckpointError, match="in use by another process") as error:
                attend_files(tensors[:3], tensors[3:], journal=journal, **OPTIONS)
            refused.append(error)
        append(*arguments)

    monkeypatch.setattr(journal_module, "append_entry", nested)
    attend_files(tensors[:3], tensors[3:], journal=journal, **OPTIONS)
    assert refused


def test_results_in_the_memory_of_others_are_refused(tmp_path):
    query, key, value, out, lse = files(tmp_path)
    twice = memory_mapped(tmp_path / "k", SHAPE, torch.float32)
    read = memory_mapped(tmp_path / "k", SHAPE, torch.float32, mode="r")
    both = torch.zeros(1, 2, 600, 8)
    for first, other, name in [
        (key, out, "key"),
        (query, out, "query"),
        (twice, out, "key"),
        (both[:, :, :300], both[:, :, 299:599], "value"),
        (torch.zeros(1, 2, 300, 9)[..., :8], out, None),
    ]:
        inputs = [query, key, other if name == "value" else value]
        if name is None:
            attend_files(inputs, (first, torch.zeros(SHAPE[:-1])), **OPTIONS)
            continue
        with pytest.raises(ConfigError, match=f"out lies in the same memory or file as {name}"):
            attend_files(inputs, (first, lse), **OPTIONS)
    with pytest.raises(ConfigError, match="out lies in the same memory or file as key"):
        attend_files((query, read, value), (twice, lse), **OPTIONS)
    with pytest.raises(ConfigError, match="lse lies in the same memory or file as out"):
        attend_files((query, key, value), (out, out.view(-1)[:600].view(1, 2, 300)), **OPTIONS)
    with pytest.raises(ConfigError, match="out is a view in which several places are one"):
        attend_files((query, key, value), (out[:, :1].expand(SHAPE), lse), **OPTIONS)
    packed = torch.zeros(1, 2, 300, 24)  # beside each other in one tensor, but never the same
    dquery, dkey, dvalue = packed.split(8, dim=-1)
    attend_files((query, key, value), (out, lse), **OPTIONS)
    attend_files_backward(
        torch.ones(SHAPE), (query, key, value), (out, lse), (dquery, dkey, dvalue), **OPTIONS
    )
    with pytest.raises(ConfigError, match="dvalue lies in the same memory or file as dkey"):
        attend_files_backward(
            torch.ones(SHAPE), (query, key, value), (out, lse), (dquery, dkey, dkey), **OPTIONS
        )


def test_results_that_would_not_outlive_the_process_are_refused(tmp_path):
    query, key, value, out, lse = files(tmp_path)
    options = {"journal": tmp_path / "journal", **OPTIONS}
    private = torch.from_numpy(np.memmap(tmp_path / "out", np.float32, "c", shape=SHAPE))
    for bad, match in [
        (torch.zeros(SHAPE), "out lies in memory of this process alone"),
        (private, r"out lies in a private copy of .*out,"),
    ]:
        with pytest.raises(ConfigError, match=match):
            attend_files((query, key, value), (bad, lse), **options)
    (tmp_path / "out").unlink()
    with pytest.raises(ConfigError, match=r"out lies in .*out, which is deleted"):
        attend_files((query, key, value), (out, lse), **options)
    assert not (tmp_path / "journal").exists()


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_files_that_may_only_be_read_are_inputs_and_no_results(tmp_path, monkeypatch):
    query, key, value, out, lse = files(tmp_path)
    for name in "qkv":
        (tmp_path / name).chmod(0o444)
    opened = mapped_module.open if hasattr(mapped_module, "open") else open

    def without_rights(path, mode):  # as the tests may run with all rights
        if "+" in mode:
            raise PermissionError(13, "Permission denied")
        return opened(path, mode)

    with monkeypatch.context() as patch:
        patch.setattr(mapped_module, "open", without_rights, raising=False)
        inputs = [memory_mapped(tmp_path / name, SHAPE, torch.float32) for name in "qkv"]
        with pytest.raises(DataError, match=r"q cannot be written \(Permission denied\)"):
            memory_mapped(tmp_path / "q", SHAPE, torch.float32, mode="r+")
    attend_files(inputs, (out, lse), journal=tmp_path / "journal", **OPTIONS)
    torch.testing.assert_close(out, expected([query, key, value]))
    with pytest.raises(ConfigError, match=r"out is mapped from .*q to be read only"):
        attend_files((out, key, value), (inputs[0], lse), **OPTIONS)
    numpy = torch.from_numpy(np.memmap(tmp_path / "out", np.float32, "r", shape=SHAPE))
    with pytest.raises(ConfigError, match=r"out is mapped from .*out to be read only"):
        attend_files((query, key, value), (numpy, lse), **OPTIONS)
    with pytest.raises(ConfigError, match="mode='w'"):
        memory_mapped(tmp_path / "q", SHAPE, torch.float32, mode="w")
    script = (
        "import faulthandler, sys, torch; from fulgurite.attention import memory_mapped;"
        "faulthandler.disable();"
        "memory_mapped(sys.argv[1], (4800,), torch.float32, mode='r')[0] = 1"
    )
    ended = start_script(script, tmp_path / "q", folder=tmp_path).wait()
    assert ended.status < 0, ended.output  # never lost in silence


def test_results_without_room_are_refused_before_they_are_computed(tmp_path, monkeypatch):
    query, key, value, out, lse = files(tmp_path)
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", out.numel() * 4)
    sparse = memory_mapped(tmp_path / "sparse", SHAPE, torch.float32)
    attend_files((query, key, value), (sparse, lse), **OPTIONS)
    assert (tmp_path / "sparse").stat().st_blocks * 512 >= out.numel() * 4
    torch.testing.assert_close(sparse, expected([query, key, value]))

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(mapped_module.os, "posix_fallocate", full)
        with pytest.raises(DataError, match=r"no room for out in .*sparse \(No space left"):
            attend_files((query, key, value), (sparse, lse), **OPTIONS)
    os.truncate(tmp_path / "sparse", 100)
    with pytest.raises(DataError, match=r"out is mapped up to byte 19200 of .* which now has 100"):
        attend_files((query, key, value), (sparse, lse), **OPTIONS)
    os.truncate(tmp_path / "k", 100)
    with pytest.raises(DataError, match=r"key is mapped up to byte 19200"):
        attend_files((query, key, value), (out, lse), **OPTIONS)


@pytest.mark.parametrize("schedule", ["rect", "cqs"])
@pytest.mark.parametrize("moment", [0, 3, 8])
def test_a_full_disk_is_one_error_and_undoes_nothing(tmp_path, monkeypatch, schedule, moment):
    whole, tensors = files(tmp_path / "whole"), files(tmp_path / "full")
    options = {"schedule": schedule, **OPTIONS}
    attend_files(whole[:3], whole[3:], journal=tmp_path / "whole/journal", **options)
    journal, count, write = tmp_path / "full/journal", 0, os.fsync

    def full(descriptor):
        nonlocal count
        count += 1
        if count > moment:
            raise OSError(28, "No space left on device")
        write(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(journal_module.os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"journal .* cannot be written \(No space left"):
            attend_files(tensors[:3], tensors[3:], journal=journal, **options)
    assert not list(journal.glob(".*"))
    attend_files(tensors[:3], tensors[3:], journal=journal, **options)
    assert torch.equal(tensors[3], whole[3])
    assert torch.equal(tensors[4], whole[4])


def test_an_entry_that_a_full_disk_cuts_is_no_entry(tmp_path, monkeypatch):
    tensors, journal = files(tmp_path), tmp_path / "journal"
    append, count = journal_module.append_entry, 0

    def cut(file, data):
        nonlocal count
        count += 1
        append(file, data if count < 4 else data[:17])
        if count == 4:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(journal_module, "append_entry", cut)
        with pytest.raises(CheckpointError, match="cannot be written"):
            attend_files(tensors[:3], tensors[3:], journal=journal, **OPTIONS)
    attend_files(tensors[:3], tensors[3:], journal=journal, **OPTIONS)
    assert (journal / "done").stat().st_size % journal_module.ENTRY_SIZE == 0
    torch.testing.assert_close(tensors[3], expected(tensors))


def test_garbage_in_a_journal_is_one_error(tmp_path, monkeypatch):
    tensors, journal = half_done(tmp_path, monkeypatch, "cqs"), tmp_path / "journal"
    options = {"schedule": "cqs", "journal": journal, **OPTIONS}

    def refuse(name, data, match):
        path = journal / name
        before = path.read_bytes() if path.exists() else None
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=match) as error:
            attend_files(tensors[:3], tensors[3:], **options)
        assert "\n" not in str(error.value)
        path.unlink()
        if before is not None:
            path.write_bytes(before)

    entries = (journal / "done").read_bytes()
    refuse("done", entries[:50] + b"x" + entries[51:], "its file `done` has changed at byte 0")
    refuse("unit-5.part", b"garbage", r"unit-5\.part is damaged")
    refuse("unit-5.part", b"", r"unit-5\.part is damaged")
    with parts_module.write_part(tmp_path / "part", {"run": "another", "number": 5}):
        pass
    refuse("unit-5.part", (tmp_path / "part").read_bytes(), r"unit-5\.part is of another run")
    for header in (b"", b"{", b"[]", b"\xff\xfe", b'{"fingerprint": "", "budget": null}'):
        refuse("run.json", header, r"run\.json that cannot be read")
    attend_files(tensors[:3], tensors[3:], **options)
    torch.testing.assert_close(tensors[3], expected(tensors))
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file is a file\. Give the path of a folder"):
        attend_files(tensors[:3], tensors[3:], **{**options, "journal": tmp_path / "file"})
    with pytest.raises(CheckpointError, match=r"cannot be written \(Not a directory\)"):
        attend_files(tensors[:3], tensors[3:], **{**options, "journal": tmp_path / "file/journal"})


def test_nothing_is_kept_for_gradients(tmp_path):
    inputs = [torch.randn(SHAPE, requires_grad=True) for _ in range(3)]
    out, lse = torch.zeros(SHAPE), torch.zeros(SHAPE[:-1])
    attend_files(inputs, (out, lse), schedule="cqs", **OPTIONS)
    grads = [torch.zeros(SHAPE) for _ in range(3)]
    attend_files_backward(torch.ones(SHAPE), inputs, (out, lse), grads, **OPTIONS)
    assert not any(x.requires_grad for x in (out, lse, *grads))


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 2, 3)])
@pytest.mark.parametrize(("queries", "keys"), [(40, 40), (0, 7), (7, 0), (0, 0)])
def test_tensors_of_any_rank_and_length(lead, queries, keys):
    query, key = torch.randn(*lead, queries, 4), torch.randn(*lead, keys, 4)
    value, out, lse = torch.randn_like(key), query.clone(), query[..., 0].clone()
    attend_files((query, key, value), (out, lse), memory_budget="8KiB", progress=False)
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    wanted = torch.nn.functional.scaled_dot_product_attention(*leaves)
    torch.testing.assert_close(out, wanted.detach() if keys else torch.zeros_like(out))
    if not keys:
        assert (lse == -torch.inf).all()
    grads = [torch.full_like(x, torch.nan) for x in (query, key, value)]
    attend_files_backward(
        torch.ones_like(query), (query, key, value), (out, lse), grads, memory_budget="8KiB",
        progress=False,
    )  # fmt: skip
    if queries and keys:
        for grad, expect in zip(grads, torch.autograd.grad(wanted.sum(), leaves), strict=True):
            torch.testing.assert_close(grad, expect)
    else:
        assert all((grad == 0).all() for grad in grads)


def test_strided_results_are_written_and_unjoinable_ones_refused():
    inputs = [torch.randn(2, 3, 40, 4) for _ in range(3)]
    out = torch.zeros(3, 2, 4, 40).permute(1, 0, 3, 2)
    attend_files(inputs, (out, torch.zeros(2, 3, 40)), memory_budget="8KiB", progress=False)
    wanted = torch.nn.functional.scaled_dot_product_attention(*inputs)
    torch.testing.assert_close(out, wanted)
    deep = torch.zeros(2, 2, 3, 40, 4).transpose(0, 1)
    with pytest.raises(DataError, match=r"batch axes of query .* do not join"):
        attend_files((deep, deep, deep), (torch.zeros(2, 2, 3, 40, 4), torch.zeros(2, 2, 3, 40)))


@pytest.mark.parametrize("schedule", ["rect", "cqs"])
def test_transposed_inputs_are_read_right(schedule):
    inputs = [torch.randn(1, 2, 4, 40).mT for _ in range(3)]
    out, lse = torch.zeros(1, 2, 40, 4), torch.zeros(1, 2, 40)
    attend_files(inputs, (out, lse), schedule=schedule, memory_budget="8KiB", progress=False)
    wanted = torch.nn.functional.scaled_dot_product_attention(*inputs)
    torch.testing.assert_close(out, wanted)


def test_what_is_no_tensor_or_device_is_one_clear_error():
    tensor, out, lse = torch.zeros(SHAPE), torch.zeros(SHAPE), torch.zeros(SHAPE[:-1])
    inputs = [tensor, tensor, tensor]
    for bad, match in [
        (np.zeros(SHAPE, np.float32), "key is a ndarray, not a tensor"),
        (torch.zeros(SHAPE, device="meta"), "key is on the device meta"),
        (torch.zeros(8), r"key is \(8,\), which has too few axes"),
    ]:
        with pytest.raises(DataError, match=match):
            attend_files((tensor, bad, tensor), (out, lse), **OPTIONS)
    for device, match in [
        ("cuda:99", "no device cuda:99"),
        ("meta", "no device meta"),
        ("gpu", "device='gpu' names no device"),
    ]:
        with pytest.raises(ConfigError, match=match):
            attend_files(inputs, (out, lse), device=device, **OPTIONS)
        with pytest.raises(ConfigError, match=match):
            attend_files_backward(
                tensor, inputs, (out, lse), torch.zeros(3, *SHAPE), device=device, **OPTIONS
            )
    with pytest.raises(ConfigError, match="no schedule 'rectangle' here"):
        attend_files(inputs, (out, lse), schedule="rectangle", **OPTIONS)
