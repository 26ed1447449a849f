"""Attention in files: what checksums, a journal and separate tasks cost against a plain run."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import ratios, report, spread
from fulgurite.attention import AttentionJob, attend_files, memory_mapped
from fulgurite.attention.fingerprint import digest_tensor

TOKENS, WIDTH, BUDGET, TURNS = 32768, 64, 4 * 2**20, 5


def mapped(folder: Path) -> tuple[list[Tensor], list[Tensor]]:
    """Query, key and value of unit variance, and results, in files."""
    generator, shape = torch.Generator().manual_seed(0), (1, 1, TOKENS, WIDTH)
    sizes = {**dict.fromkeys(("query", "key", "value", "out"), shape), "lse": shape[:-1]}
    tensors = [memory_mapped(folder / n, s, torch.float32, create=True) for n, s in sizes.items()]
    for tensor in tensors[:3]:
        tensor.copy_(torch.randn(shape, generator=generator))
    return tensors[:3], tensors[3:]


def measure(
    schedule: Any, inputs: list[Tensor], results: list[Tensor], folder: Path
) -> dict[str, list[float]]:
    """Seconds of each way, in turns, with [s] of the processor beside those of the clock."""
    seconds: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], object], counts: bool) -> None:
        begun, processor = time.perf_counter(), time.process_time()
        work()
        if counts:
            seconds.setdefault(name, []).append(time.perf_counter() - begun)
            seconds.setdefault(f"{name}, processor", []).append(time.process_time() - processor)

    options: dict[str, Any] = {"schedule": schedule, "memory_budget": BUDGET, "progress": False}
    for turn in range(TURNS + 1):
        for name in ("journal", "job"):
            shutil.rmtree(folder / name, ignore_errors=True)
        counts = turn > 0
        journalled = {**options, "journal": folder / "journal"}
        timed("plain", lambda: attend_files(inputs, results, **options), counts)
        timed(
            "journal",
            lambda journalled=journalled: attend_files(inputs, results, **journalled),
            counts,
        )
        timed(
            "resume",
            lambda journalled=journalled: attend_files(inputs, results, **journalled),
            counts,
        )
        timed("create", lambda: AttentionJob.create(folder / "job", *inputs, **options), counts)
        job = AttentionJob.open(folder / "job")
        timed("run", lambda job=job: job.run(*inputs), counts)
        timed("merge", lambda job=job: job.merge(*results), counts)
    return seconds


def main() -> None:
    """Write the table."""
    torch.set_num_threads(1)
    raw: dict[str, Any] = {}
    rows = []
    data = torch.randn(2**25)
    speeds = []
    for turn in range(TURNS + 1):
        begun = time.perf_counter()
        digest_tensor(data)
        if turn:
            speeds.append(data.nbytes / (time.perf_counter() - begun) / 1e9)
    raw["checksum GB/s"] = speeds
    for schedule in ("rect", "cqs"):
        with tempfile.TemporaryDirectory() as folder:
            seconds = measure(schedule, *mapped(Path(folder)), Path(folder))
        raw[schedule] = seconds
        for name in ("plain", "journal", "resume", "create", "run", "merge"):
            against = ratios(seconds[f"{name}, processor"], seconds["plain, processor"])
            rows.append(
                {
                    "schedule": schedule,
                    "way": name,
                    "s": spread(seconds[name]),
                    "s of the processor": spread(seconds[f"{name}, processor"]),
                    "processor, against plain": spread(against),
                }
            )
    report(
        "stream_files",
        "Attention in files",
        f"""
{TOKENS} queries and keys of {WIDTH} numbers in float32, one head, not causal, budget
{BUDGET >> 20} MiB; medians and quartiles of {TURNS} turns. `plain` keeps no journal; `resume` finds
all done, so it is what checking inputs and results takes. `create`, `run` and `merge` are those of
a job whose tasks one process computes. Times of the clock have waits for the disk in them, since
each commit is brought to it. Checksums: {spread(speeds)} GB/s on one thread.
""",
        rows,
        raw=raw,
    )


if __name__ == "__main__":
    main()
