"""Jobs whose tasks are computed apart: by processes that share a folder, or only its files."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from itertools import product

import pytest
import torch

from fulgurite.attention import AttentionJob, memory_mapped, stream_attention
from fulgurite.errors import CheckpointError, ConfigError, DataError

NAMES = ("grad", "query", "key", "value", "out", "lse")


def example(tokens=130, heads=2, kv_heads=2, width=8, dtype=torch.float32, **masks):
    """Inputs and results of a call: grad, query, key, value, out, lse and the three gradients."""
    generator = torch.Generator().manual_seed(0)
    counts = (heads, heads, kv_heads, kv_heads)
    grad, *inputs = (
        torch.randn(1, n, tokens, width, generator=generator).to(dtype) for n in counts
    )
    leaves = [x.clone().requires_grad_() for x in inputs]
    out, lse = stream_attention(*leaves, enable_gqa=True, return_lse=True, **masks)
    grads = torch.autograd.grad(out, leaves, grad)
    return [grad, *inputs, out.detach(), lse], grads


def results(like, names):
    query, key, lse = like[1], like[2], like[5]
    likes = {"out": query, "lse": lse, "dquery": query, "dkey": key, "dvalue": key}
    return [torch.full_like(likes[name], torch.nan) for name in names]


@pytest.mark.parametrize("schedule", ["cqs", "rect"])
@pytest.mark.parametrize("masks", [{}, {"is_causal": True, "window": 30}])
def test_a_job_gives_attention_and_its_gradients(tmp_path, schedule, masks):
    tensors, grads = example(kv_heads=1, dtype=torch.float64, **masks)
    options = {"schedule": schedule, "least_tasks": 6, "enable_gqa": True, **masks}
    job = AttentionJob.create(tmp_path / "f", *tensors[1:4], **options)
    assert job.task_count >= 6
    assert job.run(*tensors[1:4]) == list(range(job.task_count))
    out, lse = results(tensors, ("out", "lse"))
    job.merge(out, lse)
    torch.testing.assert_close(out, tensors[4], rtol=0, atol=1e-13)
    torch.testing.assert_close(lse, tensors[5], rtol=0, atol=1e-13)
    job = AttentionJob.create_backward(tmp_path / "b", *tensors, **options)
    assert job.task_count >= 6
    job.run(*tensors)
    totals = results(tensors, ("dquery", "dkey", "dvalue"))
    job.merge(*totals)
    for total, wanted in zip(totals, grads, strict=True):
        torch.testing.assert_close(total, wanted, rtol=0, atol=1e-13)


def test_a_job_keeps_its_budget_and_explains_itself(tmp_path):
    tensors, grads = example(tokens=400, heads=1, kv_heads=1, dtype=torch.bfloat16)
    job = AttentionJob.create(tmp_path / "f", *tensors[1:4], memory_budget="20KiB")
    assert job.plan.peak_bytes <= 20 * 1024
    backward = AttentionJob.create_backward(tmp_path / "b", *tensors, memory_budget="30KiB")
    assert backward.task_count >= 7
    lines = backward.explain().splitlines()
    assert lines[0] == "job       gradients, cqs"
    assert lines[1].startswith(f"tasks     {backward.task_count}, of which {backward.task_count} ")
    assert lines[2] == "budget    30 KiB for a task"
    backward.run(*tensors)
    totals = [torch.full_like(x, torch.nan, dtype=torch.float32) for x in grads]
    backward.merge(*totals)
    for total, wanted in zip(totals, grads, strict=True):
        assert (total - wanted.float()).norm() / wanted.float().norm() <= 6e-3
    with pytest.raises(ConfigError, match="too small"):
        AttentionJob.create(tmp_path / "x", *tensors[1:4], memory_budget=10)
    with pytest.raises(ConfigError, match=r"hold at most 2 KiB each"):
        AttentionJob.create_backward(tmp_path / "x", *tensors, memory_budget="2KiB")
    with pytest.raises(ConfigError, match="no schedule 'whole' here"):
        AttentionJob.create(tmp_path / "x", *tensors[1:4], schedule="whole")


@pytest.mark.parametrize("backward", [False, True])
def test_machines_with_their_quorum_alone_bring_parts_together(tmp_path, backward):
    """Each has a folder of its own and NaN wherever its task does not read."""
    tensors, grads = example(tokens=100, heads=1, kv_heads=1, dtype=torch.float64)
    make, inputs, wanted = AttentionJob.create, tensors[1:4], tensors[4:]
    if backward:
        make, inputs, wanted = AttentionJob.create_backward, tensors, grads
    job = make(tmp_path / "job", *inputs, least_tasks=13)
    assert job.task_count == 13
    for task in job.tasks():
        inside = torch.zeros(100, dtype=torch.bool)
        for span in task.keys:
            inside[slice(*span)] = True
        assert inside.sum() <= 4 * 8  # chunks of the quorum
        outside = ~inside
        poisoned = [x.clone() for x in inputs]
        for x in poisoned:
            x[:, :, outside] = torch.nan
        folder = tmp_path / f"machine-{task.number}"
        folder.mkdir()
        shutil.copy(tmp_path / "job/job.json", folder)
        machine = AttentionJob.open(folder)
        assert machine.run(*poisoned, shard=(task.number, 13))[0] == task.number
        assert machine.missing() == [n for n in range(13) if n != task.number]
        shutil.copytree(folder / "parts", tmp_path / "job/parts", dirs_exist_ok=True)
    totals = [torch.full_like(x, torch.nan) for x in wanted]
    job.merge(*totals)
    for total, expected in zip(totals, wanted, strict=True):
        torch.testing.assert_close(total, expected, rtol=0, atol=1e-12)


def test_the_same_job_made_twice_is_one(tmp_path, monkeypatch):
    tensors, _ = example()
    for name, shard in (("a", (0, 2)), ("b", (1, 2))):
        job = AttentionJob.create(tmp_path / name, *tensors[1:4], least_tasks=7)
        job.run(*tensors[1:4], shard=shard)
    shutil.copytree(tmp_path / "b/parts", tmp_path / "a/parts", dirs_exist_ok=True)
    AttentionJob.open(tmp_path / "a").merge(*results(tensors, ("out", "lse")))
    AttentionJob.create(tmp_path / "a", *tensors[1:4], least_tasks=7)
    with pytest.raises(CheckpointError, match=r"another job \(of another options"):
        AttentionJob.create(tmp_path / "a", *tensors[1:4], least_tasks=7, is_causal=True)
    with pytest.raises(CheckpointError, match=r"another job \(of another inputs\)"):
        AttentionJob.create(tmp_path / "a", tensors[1], tensors[2] + 1, tensors[3], least_tasks=7)


WORKER = """
import os, sys, time
import torch
from fulgurite.attention import AttentionJob, jobs, memory_mapped, parts
torch.set_num_threads(1)
folder, lease, waits = sys.argv[1], 1.5, sys.argv[2] == "waits"
names = ("grad", "query", "key", "value", "out", "lse")
shape, dtype = (1, 2, 130, 8), torch.float32
tensors = [memory_mapped(f"{folder}/{n}", shape[: 3 if n == "lse" else 4], dtype) for n in names]
compute, publish = jobs.compute_task, parts.publish_file

def slowly(*arguments, **options):
    for result in compute(*arguments, **options):
        yield result
        time.sleep(0.02)

def told(temporary, path, keeps_first):
    publish(temporary, path, keeps_first)
    print("committed", path, flush=True)
    while waits and "/backward/" in str(path) and not os.path.exists(f"{folder}/late"):
        time.sleep(0.02)  # else the late one could come too late

jobs.compute_task, parts.publish_file = slowly, told
for way, inputs in (("forward", tensors[1:4]), ("backward", tensors)):
    AttentionJob.open(f"{folder}/{way}").run(*inputs, lease=lease)
"""


def worker(folder, waits=""):
    command = [sys.executable, "-c", WORKER, str(folder), waits]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


def read_until(process, text, count):
    """Lines of a process up to the last of so many with a text."""
    lines = []
    while sum(text in line for line in lines) < count:
        lines.append(process.stdout.readline())
        assert lines[-1], "the process has ended too early"
    return lines


@pytest.mark.slow
def test_workers_that_are_killed_or_late_change_no_bit(tmp_path):
    tensors, grads = example()
    jobs = {}
    for name, tensor in zip(NAMES, tensors, strict=True):
        memory_mapped(tmp_path / name, tensor.shape, tensor.dtype, create=True).copy_(tensor)
    for way, folder in product(("forward", "backward"), ("", "alone")):
        make = AttentionJob.create if way == "forward" else AttentionJob.create_backward
        inputs = tensors[1:4] if way == "forward" else tensors
        options = {"least_tasks": 26, "memory_budget": "1MiB"}
        jobs[way, folder] = make(tmp_path / folder / way, *inputs, **options)
        if folder:
            jobs[way, folder].run(*inputs)
    chance = random.Random(0)
    workers = [worker(tmp_path), worker(tmp_path), worker(tmp_path, "waits")]
    for process, way in zip(workers[:2], ("forward", "backward"), strict=True):
        commits = chance.randint(1, 2)
        lines = read_until(process, f"/{way}/", commits)
        time.sleep(chance.uniform(0, 0.06))  # into the next task
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert sum(f"/{way}/" in line for line in lines) >= commits
        assert jobs[way, ""].missing(), "the job was complete before the kill"
        if way == "forward":
            workers.append(worker(tmp_path))  # late
    read_until(workers[3], "committed", 1)
    (tmp_path / "late").touch()
    for process in workers[2:]:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert not list(tmp_path.glob("*ward/leases/task*"))
    assert not list(tmp_path.glob("*ward/parts/.*"))
    for way, wanted in (("forward", tensors[4:]), ("backward", grads)):
        totals = [torch.full_like(x, torch.nan) for x in wanted]
        alone = [torch.full_like(x, torch.nan) for x in wanted]
        jobs[way, ""].merge(*totals)
        jobs[way, "alone"].merge(*alone)
        for total, single, expected in zip(totals, alone, wanted, strict=True):
            assert torch.equal(total, single)
            torch.testing.assert_close(total, expected)


def test_claims_of_the_living_are_left_and_those_of_the_dead_are_taken(tmp_path):
    tensors, _ = example()
    job = AttentionJob.create(tmp_path, *tensors[1:4], least_tasks=7)
    (tmp_path / "leases").mkdir()
    (tmp_path / "parts").mkdir()
    for number, age in ((2, 0), (3, 1000)):
        claim = tmp_path / f"leases/task-{number:07d}"
        claim.write_text("elsewhere")
        os.utime(claim, (time.time() - age,) * 2)
    half = tmp_path / "parts/.task-0000003.part.tmp-0123"
    half.write_text("half")
    assert job.run(*tensors[1:4], lease=100, wait=False) == [
        n for n in range(job.task_count) if n != 2
    ]
    assert not half.exists()
    assert job.missing() == [2]
    with pytest.raises(CheckpointError, match=rf"of {job.task_count} tasks 2 is missing"):
        job.merge(*results(tensors, ("out", "lse")))
    begun = time.monotonic()
    assert job.run(*tensors[1:4], lease=0.4) == [2]  # waits until it has run out
    assert time.monotonic() - begun < 30


def test_what_is_damaged_or_of_another_job_is_named(tmp_path):
    tensors, _ = example()
    job = AttentionJob.create(tmp_path / "a", *tensors[1:4], least_tasks=7)
    other = AttentionJob.create(tmp_path / "b", *tensors[1:4], least_tasks=7, scale=0.3)
    for each in (job, other):
        each.run(*tensors[1:4])
    targets = results(tensors, ("out", "lse"))
    job.merge(*targets)
    path = tmp_path / "a/parts/task-0000004.part"
    content = path.read_bytes()

    def refuse(data, match):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=match):
            job.merge(*targets)

    changed = bytearray(content)
    changed[100] ^= 1
    refuse(changed, r"task-0000004\.part is damaged \(out at byte \d+ has changed")
    changed = bytearray(content)
    changed[-60] ^= 1
    refuse(changed, r"task-0000004\.part is damaged \(its index has changed")
    refuse(content[:-1], r"task-0000004\.part is damaged")
    refuse(content[:5], r"task-0000004\.part is damaged \(it does not begin as one")
    refuse((tmp_path / "b/parts/task-0000004.part").read_bytes(), "of another job or task")
    refuse((tmp_path / "a/parts/task-0000003.part").read_bytes(), "of another job or task")
    path.unlink()
    assert job.run(*tensors[1:4]) == [4]
    job.merge(*targets)
    path.unlink()
    with pytest.raises(DataError, match=r"key is not that of the job .* tokens \d+ to \d+ differ"):
        job.run(tensors[1], tensors[2] + 1, tensors[3])
    with pytest.raises(DataError, match=r"query is \(1, 2, 100, 8\)"):
        job.run(tensors[1][:, :, :100], *tensors[2:4])
    with pytest.raises(DataError, match="2 tensors were given for query, key, value"):
        job.run(*tensors[1:3])
    (tmp_path / "a/job.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"job\.json is damaged"):
        AttentionJob.open(tmp_path / "a")
    with pytest.raises(CheckpointError, match="no job in"):
        AttentionJob.open(tmp_path)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_a_job_without_queries_or_keys_is_done_at_once(tmp_path, shape):
    query, key = torch.randn(1, 1, shape[0], 4), torch.randn(1, 1, shape[1], 4)
    job = AttentionJob.create(tmp_path / "f", query, key, key, schedule="rect")
    assert job.run(query, key, key) == []
    out, lse = torch.full_like(query, torch.nan), torch.zeros(query.shape[:-1])
    AttentionJob.open(tmp_path / "f").merge(out, lse)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_a_full_disk_leaves_no_half_part(tmp_path, monkeypatch):
    from fulgurite.attention import parts

    tensors, _ = example()
    job = AttentionJob.create(tmp_path, *tensors[1:4], least_tasks=7)

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(parts.os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"cannot be written \(No space left on device\)"):
            job.run(*tensors[1:4])
    assert not list((tmp_path / "parts").iterdir())
    assert not list((tmp_path / "leases").glob("task*"))
    job.run(*tensors[1:4])
    out, lse = results(tensors, ("out", "lse"))
    job.merge(out, lse)
    torch.testing.assert_close(out, tensors[4])
