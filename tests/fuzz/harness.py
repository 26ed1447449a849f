"""Runs readers on damaged files in processes of their own, and says what came of each.

A file must be read, or refused by an error of the project that names it, within ten seconds and one
gibibyte. A process that dies is known by the input it was at.
"""

import contextlib
import logging
import mmap
import os
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .mutations import mutate

SECONDS, MEMORY = 10, 1 << 30
READ, REFUSED, UNNAMED, NAMELESS, CRASH, SLOW = (
    *("read", "refused", "unnamed", "nameless", "crash", "slow"),
)


@dataclass
class Outcome:
    """What came of the inputs of one format."""

    counts: Counter = field(default_factory=Counter)
    slowest: float = 0.0
    faults: list = field(default_factory=list)  # (number, kind, what)

    @property
    def tried(self):
        return sum(self.counts.values())


def make_input(target, seed, number):
    """The files of an input: one of a seed's damaged, or none for the first of each seed."""
    rng = np.random.default_rng([seed, zlib.crc32(target.name.encode()), number])
    files = dict(target.seeds[number % len(target.seeds)])
    if number >= len(target.seeds):
        names = [name for name in files if name in target.damaged] if target.damaged else [*files]
        name = names[rng.integers(len(names))]
        others = target.seeds[rng.integers(len(target.seeds))]
        files[name] = mutate(files[name], others.get(name, files[name]), rng)
    return files


def try_input(target, folder, seed, number):
    """The kind of outcome of an input, and what there is to say about it."""
    from fulgurite.errors import FulguriteError

    shutil.rmtree(folder, ignore_errors=True)
    for name, content in make_input(target, seed, number).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    try:
        target.read(folder)
    except FulguriteError as error:
        if folder.name in str(error) or not target.is_named:
            return REFUSED, ""
        return NAMELESS, str(error)[:300]
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        place = traceback.extract_tb(error.__traceback__)
        ours = [
            f"{Path(f.filename).name}:{f.lineno}"
            for f in place
            if "fulgurite" in f.filename or "datamodules" in f.filename or "models" in f.filename
        ]
        return UNNAMED, f"{type(error).__name__}: {str(error)[:200]} at {' '.join(ours[-3:])}"
    return READ, ""


def _limit_memory():
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _work(target, seed, numbers, root, progress, results):
    """In a child: try inputs, telling before each which it is."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    _limit_memory()
    folder = Path(root) / "fuzzed"
    os.environ["FULGURITE_CACHE"] = str(Path(root) / "cache")
    counts, slowest = Counter(), 0.0
    for number in numbers:
        progress[:8] = struct.pack("<q", number)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        begun = time.perf_counter()
        kind, what = try_input(target, folder, seed, number)
        slowest = max(slowest, time.perf_counter() - begun)
        signal.setitimer(signal.ITIMER_REAL, 0)
        counts[kind] += 1
        if kind not in (READ, REFUSED):
            results.write(f"{number}\t{kind}\t{what!r}\n")
            results.flush()
    results.write(f"end\t{slowest}\t{dict(counts)!r}\n")
    results.flush()


def run(target, seed, begin, end, seconds=None, batch=2000):
    """Try the inputs ``begin`` to ``end`` of a target in children, one after the other.

    ``seconds`` is about how long that may take.
    """
    outcome = Outcome()
    next_, begun = begin, time.monotonic()
    while next_ < end and (seconds is None or time.monotonic() - begun < seconds):
        stop = min(end, next_ + batch)
        progress = mmap.mmap(-1, 8)
        shared = "/dev/shm" if os.path.isdir("/dev/shm") else None
        with (
            tempfile.TemporaryDirectory(dir=shared) as root,
            tempfile.TemporaryFile("w+") as results,
        ):
            child = os.fork()
            if child == 0:
                status = 1
                with contextlib.suppress(BaseException):
                    devnull = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(devnull, 1)
                    os.dup2(devnull, 2)
                    _work(target, seed, range(next_, stop), root, progress, results)
                    status = 0
                os._exit(status)
            _, status = os.waitpid(child, 0)
            results.seek(0)
            lines = [line.rstrip("\n").split("\t", 2) for line in results]
        for line in lines:
            if line[0] != "end":
                outcome.faults.append((int(line[0]), line[1], line[2]))
        if lines and lines[-1][0] == "end":
            outcome.slowest = max(outcome.slowest, float(lines[-1][1]))
            outcome.counts.update(eval(lines[-1][2]))  # ours: written by the child above
            next_ = stop
            continue
        (number,) = struct.unpack("<q", progress[:8])  # where it died
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM:
            kind, what = SLOW, f"more than {SECONDS} s"
        else:
            kind, what = CRASH, f"status {status}"
        outcome.faults.append((number, kind, what))
        outcome.counts[kind] += 1
        for line in lines:
            outcome.counts[line[1]] += 1
        outcome.counts[REFUSED] += (
            number - next_ - len(lines)
        )  # before it, by one outcome or the other
        next_ = number + 1
    return outcome


def report(outcomes, file=sys.stdout):
    """A line for each format, and the first faults."""
    kinds = (READ, REFUSED, UNNAMED, NAMELESS, CRASH, SLOW)
    print(f"{'format':22}{'tried':>9}" + "".join(f"{k:>9}" for k in kinds) + "  slowest", file=file)
    total = Outcome()
    for name, outcome in outcomes.items():
        numbers = "".join(f"{outcome.counts[k]:9,}" for k in kinds)
        print(f"{name:22}{outcome.tried:9,}{numbers}{outcome.slowest:8.2f}s", file=file)
        total.counts.update(outcome.counts)
        total.slowest = max(total.slowest, outcome.slowest)
    numbers = "".join(f"{total.counts[k]:9,}" for k in kinds)
    print(f"{'all':22}{total.tried:9,}{numbers}{total.slowest:8.2f}s", file=file)
    for name, outcome in outcomes.items():
        seen = set()
        for number, kind, what in outcome.faults:
            if (short := what[-60:]) not in seen and len(seen) < 12:
                seen.add(short)
                print(f"{name} --input {number}: {kind}: {what}", file=file)
    return total
