"""Memory that a process may still take: of a GPU, or of a machine under the limits set for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

__all__ = ["device_memory"]


class _Limit(NamedTuple):
    """A limit [bytes] with what may still be taken below it."""

    total: int
    free: int


def device_memory(device: torch.device | str, *, proc: str | Path = "/proc") -> tuple[int, int]:
    """Return the free and the total memory of a device [bytes].

    For a CPU these are the smallest of what the machine has, what each memory control group of
    the process allows (version 1 and 2, up to the root of the hierarchy, as containers and batch
    systems set them), and the limits of the process on its address space and its data. Files that
    a group has read and no longer uses count as free, because the kernel drops them first.

    For a GPU what PyTorch has taken from the driver and not given to a tensor is free too, except
    the rests of blocks that tensors use a part of; and a process may not take more than the
    fraction that ``torch.cuda.set_per_process_memory_fraction`` leaves it.

    Args:
        device: A CPU or a GPU.
        proc: Where the kernel reports about processes; another folder serves tests.

    Example:
        >>> free, total = device_memory("cpu")
        >>> 0 <= free <= total
        True

    Source: docs/papers/stream_cqsa.md section 1.9 asks for the free memory; which limits count:
    inferred from the kernel's documentation of cgroups and ``getrlimit``.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return _gpu_memory(device)
    proc = Path(proc)
    limits = [_machine(proc), *_control_groups(proc), *_process_limits(proc)]
    total = min(limit.total for limit in limits)
    return max(0, min(total, *(limit.free for limit in limits))), total


def _gpu_memory(device: torch.device) -> tuple[int, int]:
    """Free and total memory of a GPU for this process."""
    free, total = torch.cuda.mem_get_info(device)
    used = torch.cuda.memory_allocated(device)
    rests = torch.cuda.memory_stats(device).get("inactive_split_bytes.all.current", 0)
    cached = max(0, torch.cuda.memory_reserved(device) - used - rests)
    allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return max(0, min(free + cached, allowed - used - rests)), min(total, allowed)


def _machine(proc: Path) -> _Limit:
    """Memory of the machine."""
    facts = _facts(proc / "meminfo", 1024)
    try:
        return _Limit(facts["MemTotal"], facts["MemAvailable"])
    except KeyError:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return _Limit(total, total // 2)


def _control_groups(proc: Path) -> Iterator[_Limit]:
    """Limits of the memory control groups that the process is in, from its own up to the root."""
    groups = {}  # controllers -> path within the hierarchy; version 2 has no name
    for line in _lines(proc / "self/cgroup"):
        _, _, entry = line.partition(":")
        controllers, _, path = entry.partition(":")
        groups[controllers] = path
    for line in _lines(proc / "self/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        if kind[0] == "cgroup2" and "" in groups:
            path, read = groups[""], _read_unified_limits
        elif kind[0] == "cgroup" and "memory" in kind[2].split(","):
            names = [name for name in groups if "memory" in name.split(",")]
            if not names:
                continue
            path, read = groups[names[0]], _read_legacy_limits
        else:
            continue
        mount = Path(fields[4].replace("\\040", " "))
        for folder in _ancestors(mount, fields[3], path):
            yield from read(folder)


def _ancestors(mount: Path, root: str, path: str) -> Iterator[Path]:
    """The folder of a group and those of the groups around it, as far as the mount shows them.

    A container often mounts only its own group (``root``), and names it by the path from outside.
    """
    inside = "/" + path.strip("/")
    root = "/" + root.strip("/")
    if root != "/":
        inside = inside.removeprefix(root) if f"{inside}/".startswith(f"{root}/") else "/"
    parts = [part for part in inside.split("/") if part]
    if ".." in parts:  # a group outside the namespace of this process
        parts = []
    for count in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:count])


def _read_unified_limits(folder: Path) -> Iterator[_Limit]:
    """Limits of a group of version 2."""
    used = _number(folder / "memory.current")
    idle = _facts(folder / "memory.stat").get("inactive_file", 0)
    for name in ("memory.max", "memory.high"):
        limit = _number(folder / name)  # none where it says "max"
        if limit is not None:
            yield _Limit(limit, limit - max(0, (used or 0) - idle))


def _read_legacy_limits(folder: Path) -> Iterator[_Limit]:
    """Limits of a group of version 1; a number near 2^63 stands for none, and does no harm."""
    limit = _number(folder / "memory.limit_in_bytes")
    if limit is not None:
        used = _number(folder / "memory.usage_in_bytes") or 0
        idle = _facts(folder / "memory.stat").get("total_inactive_file", 0)
        yield _Limit(limit, limit - max(0, used - idle))


def _process_limits(proc: Path) -> Iterator[_Limit]:
    """Soft limits of the process on its address space and on its private memory."""
    sizes = _facts(proc / "self/status", 1024)
    for line in _lines(proc / "self/limits"):
        for name, size in (("Max address space", "VmSize"), ("Max data size", "VmData")):
            soft = line.removeprefix(name).split()[:1]
            if line.startswith(name) and soft and soft[0].isdigit():
                limit = int(soft[0])
                yield _Limit(limit, limit - sizes.get(size, 0))


def _lines(path: Path) -> list[str]:
    """Lines of a file, none if it cannot be read."""
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


def _facts(path: Path, unit: int = 1) -> dict[str, int]:
    """Numbers of a file with a name and a number in each line."""
    facts = {}
    for line in _lines(path):
        name, *numbers = line.replace(":", " ").split() or [""]
        if numbers and numbers[0].isdigit():
            facts[name] = int(numbers[0]) * unit
    return facts


def _number(path: Path) -> int | None:
    """The number that a file holds, if it holds one."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None
