"""Free memory under the limits of control groups and of the process."""

import resource

import pytest
import torch

from fulgurite.attention.budget import parse_budget
from fulgurite.attention.device_memory import device_memory
from fulgurite.testing.survival import start_call

GIB = 2**30


def machine(folder, groups="", mounts="", total=64, available=40, limits="", status=""):
    """Write a folder like /proc of a machine with so many GiB."""
    (folder / "self").mkdir(parents=True)
    memory = f"MemTotal: {total * GIB // 1024} kB\nMemAvailable: {available * GIB // 1024} kB\n"
    (folder / "meminfo").write_text(memory)
    (folder / "self/cgroup").write_text(groups)
    (folder / "self/mountinfo").write_text(mounts)
    (folder / "self/limits").write_text(limits)
    (folder / "self/status").write_text(status)
    return folder


def unified(folder, limit, used, idle=0, high="max"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.high").write_text(f"{high}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used - idle}\ninactive_file {idle}\n")


def legacy(folder, limit, used, idle=0):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"inactive_file 1\ntotal_inactive_file {idle}\n")


def test_without_limits_the_machine_counts(tmp_path):
    proc = machine(tmp_path / "proc")
    assert device_memory("cpu", proc=proc) == (40 * GIB, 64 * GIB)
    free, total = device_memory("cpu", proc=tmp_path / "nothing")
    assert 0 < free < total


def test_version_2_counts_what_is_not_reclaimable(tmp_path):
    mount = tmp_path / "sys fs"
    mounts = f"35 24 0:30 / {str(mount).replace(' ', chr(92) + '040')} rw - cgroup2 cgroup2 rw\n"
    proc = machine(tmp_path / "proc", "0::/job\n", mounts)
    unified(mount / "job", 4 * GIB, 3 * GIB, idle=2 * GIB)
    assert device_memory("cpu", proc=proc) == (3 * GIB, 4 * GIB)
    unified(mount / "job", "max", 3 * GIB)
    assert device_memory("cpu", proc=proc) == (40 * GIB, 64 * GIB)
    unified(mount / "job", 4 * GIB, 3 * GIB, high=2 * GIB)  # above it the kernel slows it down
    assert device_memory("cpu", proc=proc) == (0, 2 * GIB)


def test_the_smallest_of_nested_groups_counts(tmp_path):
    mount = tmp_path / "cgroup"
    mounts = f"35 24 0:30 / {mount} rw - cgroup2 cgroup2 rw\n"
    proc = machine(tmp_path / "proc", "0::/slurm/job/step\n", mounts)
    unified(mount / "slurm/job/step", "max", GIB)
    unified(mount / "slurm/job", 8 * GIB, GIB)
    unified(mount / "slurm", 16 * GIB, 12 * GIB)  # others of the group use it up
    assert device_memory("cpu", proc=proc) == (4 * GIB, 8 * GIB)


@pytest.mark.parametrize("root", ["/", "/docker/1", "/elsewhere"])
def test_version_1_in_a_container(tmp_path, root):
    """With the whole hierarchy mounted, or only the own group, from inside or outside."""
    mount = tmp_path / "memory"
    mounts = f"35 24 0:30 {root} {mount} rw,relatime - cgroup cgroup rw,memory\n"
    proc = machine(tmp_path / "proc", "4:cpu:/x\n3:hugetlb,memory:/docker/1\n0::/\n", mounts)
    group = mount / "docker/1" if root == "/" else mount
    legacy(mount, 9223372036854771712, 50 * GIB)  # no limit
    legacy(group, 2 * GIB, GIB, idle=GIB // 2)
    assert device_memory("cpu", proc=proc) == (3 * GIB // 2, 2 * GIB)
    legacy(group, 9223372036854771712, GIB)
    assert device_memory("cpu", proc=proc) == (40 * GIB, 64 * GIB)


def test_a_group_out_of_sight_falls_back_to_the_mount(tmp_path):
    mount = tmp_path / "cgroup"
    mounts = f"35 24 0:30 / {mount} rw - cgroup2 cgroup2 rw\n"
    proc = machine(tmp_path / "proc", "0::/../other\n", mounts)
    unified(mount, 3 * GIB, GIB)
    assert device_memory("cpu", proc=proc) == (2 * GIB, 3 * GIB)


@pytest.mark.parametrize(
    ("name", "size"), [("Max address space", "VmSize"), ("Max data size", "VmData")]
)
def test_limits_of_the_process_count(tmp_path, name, size):
    limits = f"Limit   Soft Limit  Hard Limit  Units\n{name}   {5 * GIB}   unlimited   bytes\n"
    status = f"Name: x\n{size}:\t {GIB // 1024} kB\n"
    proc = machine(tmp_path / "proc", limits=limits, status=status)
    assert device_memory("cpu", proc=proc) == (4 * GIB, 5 * GIB)


def test_an_automatic_budget_knows_a_real_limit(tmp_path):
    """A limit that this machine sets, not a file that looks like one."""

    def parse():
        resource.setrlimit(resource.RLIMIT_AS, (12 * GIB, -1))
        cpu = torch.device("cpu")
        print(parse_budget("auto", cpu), parse_budget(0.5, cpu))

    ended = start_call(parse, tmp_path).wait()
    assert ended.status == 0, ended.output
    free, half = map(int, ended.output.split())
    assert 0 < free < 12 * GIB
    assert half <= 6 * GIB
