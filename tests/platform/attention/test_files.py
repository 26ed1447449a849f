"""Attention in files: exact, within memory, and not undone by a kill."""

import os
import signal
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from fulgurite.attention import attend_files, attend_files_backward, memory_mapped
from fulgurite.attention import files as files_module
from fulgurite.attention import journal as journal_module
from fulgurite.attention import mapped as mapped_module
from fulgurite.errors import CheckpointError, ConfigError, DataError
from fulgurite.testing.survival import start_call


def results(folder, query, dtype=torch.float32):
    out = memory_mapped(folder / "out", query.shape, dtype, create=True)
    return out, memory_mapped(folder / "lse", query.shape[:-1], torch.float32, create=True)


SCRIPT = """
import os, signal, sys
import torch
from fulgurite.attention import attend_files, files, journal, memory_mapped, parts
torch.set_num_threads(1)
folder, schedule, commits, moment = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
tokens, dtype = 400, torch.float32
q, k, v = (memory_mapped(f"{folder}/{n}", (1, 2, tokens, 16), dtype) for n in "qkv")
new = not os.path.exists(f"{folder}/out")
out = memory_mapped(f"{folder}/out", (1, 2, tokens, 16), dtype, create=new)
lse = memory_mapped(f"{folder}/lse", (1, 2, tokens), dtype, create=new)
append, merge, count = journal.append_entry, files.merge_, 0

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def counting(file, entry):
    global count
    count += 1
    if count > commits and moment == "before":
        die()
    append(file, entry)
    if count > commits and moment == "after":
        die()

def half(out, lse, *part):
    merge(out, lse, *part)
    if count >= commits and moment == "half":
        parts.PartWriter.add = lambda part, *_: (part.file.raw.write(b"half"), die())

if moment != "never":
    journal.append_entry, files.merge_ = counting, half
attend_files(
    (q, k, v), (out, lse), is_causal=True, memory_budget="24KiB", schedule=schedule,
    journal=f"{folder}/journal", progress=False,
)
"""


def child(folder, *arguments, script=None):
    """Run a script in a fork of this process, which has imported everything."""
    if script is None:
        script, arguments = SCRIPT, (*arguments, 0, "never")[: max(3, len(arguments))]

    def work():
        sys.argv = ["script", str(folder), *map(str, arguments)]
        exec(compile(script, "script", "exec"), {"__name__": "__main__"})

    return start_call(work, folder).wait()


def committed_units(folder):
    return (folder / "done").stat().st_size // journal_module.ENTRY_SIZE


def write(folder, tokens=400, heads=2, width=16, dtype=torch.float32):
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for name in "qkv":
        tensor = memory_mapped(folder / name, (1, heads, tokens, width), dtype, create=True)
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
        tensors.append(tensor)
    return tensors


@pytest.mark.parametrize(
    ("schedule", "moments"),
    [
        ("rect", ["before"]),
        ("cqs", ["half"]),
        pytest.param("cqs", ["after", "half"], marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, schedule, moments):
    whole = tmp_path / "whole"
    write(whole)
    assert child(whole, schedule).status == 0
    for moment in moments:
        folder = tmp_path / moment
        query, key, value = write(folder)
        committed = 0
        for commits in (2, 3):
            done = child(folder, schedule, commits, moment)
            assert done.status == -signal.SIGKILL, done.output
            now = committed_units(folder / "journal")
            assert now >= committed + 2
            committed = now
        assert child(folder, schedule).status == 0
        for name in ("out", "lse"):
            assert (folder / name).read_bytes() == (whole / name).read_bytes()
        out = memory_mapped(folder / "out", query.shape, query.dtype)
        expected = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        torch.testing.assert_close(out, expected)
        assert not list((folder / "journal").glob("*unit*"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("schedule", ["auto", "rect", "cqs"])
def test_results_are_those_of_attention_in_memory(tmp_path, dtype, schedule):
    query, key, value = write(tmp_path, dtype=dtype)
    wide = torch.float32 if schedule == "cqs" else dtype
    out = memory_mapped(tmp_path / "out", query.shape, wide, create=True)
    lse = memory_mapped(tmp_path / "lse", query.shape[:-1], torch.float32, create=True)
    plan = attend_files(
        (query, key, value), (out, lse), window=100, is_causal=True, memory_budget="32KiB",
        schedule=schedule, progress=True,
    )  # fmt: skip
    assert plan.peak_bytes <= 32 * 1024
    rows = torch.arange(400)[:, None]
    seen = (rows >= rows.mT) & (rows.mT > rows - 100)
    expected = F.scaled_dot_product_attention(*(x.float() for x in (query, key, value)), seen)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=tolerance)


MEMORY = """
import sys
import torch
from fulgurite.attention import attend_files, memory_mapped
torch.set_num_threads(1)

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(l.split()[1]) * 1024 for l in file if l.startswith("RssAnon"))

folder, schedule, budget = sys.argv[1], sys.argv[2], int(sys.argv[3])
shape, dtype = (1, 1, int(sys.argv[4]), int(sys.argv[5])), torch.float32
q, k, v = (memory_mapped(f"{folder}/{n}", shape, dtype) for n in "qkv")
out = memory_mapped(f"{folder}/out", shape, dtype, create=True)
lse = memory_mapped(f"{folder}/lse", shape[:-1], dtype, create=True)
small = torch.zeros(1, 1, 64, 64)
attend_files([small] * 3, (small.clone(), torch.zeros(1, 1, 64)), progress=False)
before, peak = anonymous(), 0
from fulgurite.attention import files
commit = files.commit_
def watching(*args, **kwargs):
    global peak
    peak = max(peak, anonymous())
    commit(*args, **kwargs)
files.commit_ = watching
plan = attend_files(
    (q, k, v), (out, lse), is_causal=True, memory_budget=budget, schedule=schedule, progress=False
)
print(plan.peak_bytes, peak - before)
"""


@pytest.mark.parametrize(
    ("schedule", "tokens", "width"),
    [
        ("cqs", 4096, 256),
        pytest.param("cqs", 16384, 64, marks=pytest.mark.slow),
        pytest.param("rect", 16384, 64, marks=pytest.mark.slow),
    ],
)
def test_memory_stays_within_the_budget(tmp_path, schedule, tokens, width):
    """Tensors of 16 MiB, eight times the budget."""
    budget = 2 * 2**20
    write(tmp_path, tokens=tokens, heads=1, width=width)
    sizes = map(str, (budget, tokens, width))
    command = [sys.executable, "-c", MEMORY, str(tmp_path), schedule, *sizes]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    planned, grown = map(int, done.stdout.split())
    assert 0 < planned <= budget
    assert grown <= budget + 16 * 2**20  # beside it the kernel's own buffers


BACKWARD = """
import os, signal, sys
import torch
from fulgurite.attention import attend_files, attend_files_backward, journal, memory_mapped
torch.set_num_threads(1)
folder, commits = sys.argv[1], int(sys.argv[2])
tokens, dtype = 400, torch.float32
q, k, v, grad = (memory_mapped(f"{folder}/{n}", (1, 2, tokens, 16), dtype) for n in "qkvg")
new = not os.path.exists(f"{folder}/dq")
make = lambda n, *width: memory_mapped(f"{folder}/{n}", (1, 2, tokens, *width), dtype, create=new)
out, lse, dq, dk, dv = make("out", 16), make("lse"), make("dq", 16), make("dk", 16), make("dv", 16)
options = {"is_causal": True, "memory_budget": "24KiB", "progress": False}
attend_files((q, k, v), (out, lse), **options)
append, count = journal.append_entry, 0

def counting(file, entry):
    global count
    count += 1
    append(file, entry)
    if count == commits:
        os.kill(os.getpid(), signal.SIGKILL)

journal.append_entry = counting
attend_files_backward(
    grad, (q, k, v), (out, lse), (dq, dk, dv), journal=f"{folder}/journal", **options
)
"""


def test_gradients_in_files_survive_a_kill(tmp_path):
    tensors = {}
    for name in ("whole", "killed"):
        tensors[name] = write(tmp_path / name)
        grad = memory_mapped(tmp_path / name / "g", (1, 2, 400, 16), torch.float32, create=True)
        grad.copy_(torch.randn(grad.shape, generator=torch.Generator().manual_seed(1)))
    assert child(tmp_path / "whole", 0, script=BACKWARD).status == 0
    for commits in (3, 30):  # the second is in the pass along the keys
        done = child(tmp_path / "killed", commits, script=BACKWARD)
        assert done.status == -signal.SIGKILL, done.output
    assert committed_units(tmp_path / "killed/journal") == 33
    assert child(tmp_path / "killed", 0, script=BACKWARD).status == 0
    inputs = [x.clone().requires_grad_() for x in tensors["whole"]]
    result = F.scaled_dot_product_attention(*inputs, is_causal=True)
    expected = torch.autograd.grad(result, inputs, grad)
    for name, wanted in zip(("dq", "dk", "dv"), expected, strict=True):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        found = memory_mapped(tmp_path / "killed" / name, wanted.shape, torch.float32)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True, "window": 70}, {"is_causal": True, "prefix": 130}]
)
def test_gradients_in_files_are_those_of_attention(tmp_path, options):
    query, key, value = write(tmp_path, dtype=torch.bfloat16)
    shape = query.shape
    grad = torch.randn(shape).bfloat16()
    out, lse = torch.zeros(shape), torch.zeros(shape[:-1])
    grads = [torch.full(shape, torch.nan) for _ in range(3)]
    options |= {"memory_budget": "100KiB", "progress": False, "check_finite": True}
    attend_files((query, key, value), (out, lse), **options)
    plan = attend_files_backward(grad, (query, key, value), (out, lse), grads, **options)
    assert plan.peak_bytes <= 100 * 1024
    assert plan.cost.calls >= 8
    rows = torch.arange(400)[:, None]
    seen = rows >= rows.mT if "is_causal" in options else torch.ones(400, 400, dtype=torch.bool)
    seen |= rows.mT < options.get("prefix", 0)
    seen &= rows.mT > rows - options.get("window", 400)
    inputs = [x.float().clone().requires_grad_() for x in (query, key, value)]
    result = F.scaled_dot_product_attention(*inputs, seen)
    for found, wanted in zip(grads, torch.autograd.grad(result, inputs, grad.float()), strict=True):
        assert (found - wanted).norm() / wanted.norm() <= 6e-3


def test_a_journal_keeps_an_automatic_budget(tmp_path, monkeypatch):
    """Else less free memory on the second run would make it another plan."""
    query, key, value = write(tmp_path)
    out, lse = results(tmp_path, query)
    monkeypatch.setattr(files_module, "parse_budget", lambda *_: 50_000)
    options = {"journal": tmp_path / "journal", "progress": False}
    first = attend_files((query, key, value), (out, lse), **options)
    monkeypatch.setattr(files_module, "parse_budget", lambda *_: 30_000)
    assert attend_files((query, key, value), (out, lse), **options) == first
    with pytest.raises(CheckpointError, match="another plan"):
        attend_files((query, key, value), (out, lse), memory_budget="30KiB", **options)
    (tmp_path / "journal/run.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"run\.json that cannot be read"):
        attend_files((query, key, value), (out, lse), **options)


def test_a_journal_of_other_inputs_is_refused(tmp_path):
    query, key, value = write(tmp_path)
    out, lse = results(tmp_path, query)
    options = {"memory_budget": "32KiB", "journal": tmp_path / "journal", "progress": False}
    attend_files((query, key, value), (out, lse), **options)
    attend_files((query, key, value), (out, lse), **options)  # nothing is left to do
    other = key.clone()
    other.view(torch.int32)[0, 1, 137, 5] ^= 1  # one bit anywhere
    for changed in (other, key.flip(2)):
        with pytest.raises(CheckpointError, match=r"of other tensors \(key differs\)"):
            attend_files((query, changed, value), (out, lse), **options)
    with pytest.raises(CheckpointError, match=r"another plan \(visible\)"):
        attend_files((query, key, value), (out, lse), is_causal=True, **options)
    with pytest.raises(CheckpointError, match=r"another plan \(scale\)"):
        attend_files((query, key, value), (out, lse), scale=0.3, **options)


def test_bad_files_are_one_clear_error(tmp_path, monkeypatch):
    path = tmp_path / "a"
    memory_mapped(path, (4, 4), torch.float32, create=True)
    with pytest.raises(DataError, match="exists already"):
        memory_mapped(path, (4, 4), torch.float32, create=True)
    with pytest.raises(DataError, match=r"a has 64 bytes; \(4, 5\) .* take 80"):
        memory_mapped(path, (4, 5), torch.float32)
    with pytest.raises(DataError, match="cannot be read"):
        memory_mapped(tmp_path / "b", (1,), torch.float32)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mapped_module.os, "posix_fallocate", full)
    with pytest.raises(DataError, match=r"of 64 bytes cannot be made \(No space left"):
        memory_mapped(tmp_path / "c", (4, 4), torch.float32, create=True)
    assert not (tmp_path / "c").exists()


def test_what_is_not_finite_is_named(tmp_path):
    query, key, value = write(tmp_path)
    value[0, 1, 77, 3] = torch.nan
    out, lse = torch.zeros_like(query), torch.zeros(query.shape[:-1])
    with pytest.raises(
        DataError, match=r"value is not finite at token 77 of \(batch, head\) \(0, 1\)"
    ):
        attend_files(
            (query, key, value),
            (out, lse),
            memory_budget="32KiB",
            check_finite=True,
            progress=False,
        )


def test_results_of_the_wrong_kind_are_refused(tmp_path):
    query, key, value = write(tmp_path)
    out, lse = torch.zeros_like(query), torch.zeros(query.shape[:-1])
    with pytest.raises(DataError, match="lse is"):
        attend_files((query, key, value), (out, lse.double()), progress=False)
    with pytest.raises(DataError, match="out is"):
        attend_files(
            (query, key, value), (out.half(), lse), schedule="cqs", memory_budget="32KiB",
            progress=False,
        )  # fmt: skip
    with pytest.raises(ConfigError, match="too small"):
        attend_files((query, key, value), (out, lse), memory_budget=10, progress=False)
