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
KINDS = ("read", "refused", "unnamed", "nameless", "crash", "slow")
READ, REFUSED, UNNAMED, NAMELESS, CRASH, SLOW = KINDS
_PROGRESS = struct.Struct("<q6qd")  # input at hand, counts so far, slowest [s]


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


def _work(target, seed, numbers, root, progress, faults):
    """In a child: try inputs, telling before each which it is."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    _limit_memory()
    folder = Path(root) / "fuzzed"
    os.environ["FULGURITE_CACHE"] = str(Path(root) / "cache")
    counts, slowest = Counter(), 0.0
    for number in numbers:
        _PROGRESS.pack_into(progress, 0, number, *(counts[kind] for kind in KINDS), slowest)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        begun = time.perf_counter()
        kind, what = try_input(target, folder, seed, number)
        slowest = max(slowest, time.perf_counter() - begun)
        signal.setitimer(signal.ITIMER_REAL, 0)
        counts[kind] += 1
        if kind not in (READ, REFUSED):
            faults.write(f"{number}\t{kind}\t{what!r}\n")
            faults.flush()
    _PROGRESS.pack_into(progress, 0, -1, *(counts[kind] for kind in KINDS), slowest)


def _start(*arguments):
    """Do :func:`_work` in a child; gives how it ended."""
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, 1)
            os.dup2(devnull, 2)
            _work(*arguments)
            status = 0
        os._exit(status)
    return os.waitpid(child, 0)[1]


def run(target, seed, begin, end, seconds=None, batch=500):
    """Try the inputs ``begin`` to ``end`` of a target in children, one after the other.

    ``seconds`` is about how long that may take.
    """
    outcome = Outcome()
    next_, begun = begin, time.monotonic()
    shared = "/dev/shm" if os.path.isdir("/dev/shm") else None
    while next_ < end and (seconds is None or time.monotonic() - begun < seconds):
        stop = min(end, next_ + batch)
        progress = mmap.mmap(-1, _PROGRESS.size)
        with (
            tempfile.TemporaryDirectory(dir=shared) as root,
            tempfile.TemporaryFile("w+") as faults,
        ):
            status = _start(target, seed, range(next_, stop), root, progress, faults)
            faults.seek(0)
            for line in faults:
                number, kind, what = line.rstrip("\n").split("\t", 2)
                outcome.faults.append((int(number), kind, what))
        number, *counts, slowest = _PROGRESS.unpack(progress)
        outcome.counts.update(dict(zip(KINDS, counts, strict=True)))
        outcome.slowest = max(outcome.slowest, slowest)
        next_ = stop
        if number >= 0:  # where it died
            ended = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
            kind = SLOW if ended else CRASH
            outcome.faults.append((number, kind, f"status {status}"))
            outcome.counts[kind] += 1
            next_ = number + 1
    outcome.counts = +outcome.counts
    return outcome


def report(outcomes, file=None):
    """A line for each format, and the first faults."""
    print(f"{'format':22}{'tried':>9}" + "".join(f"{k:>9}" for k in KINDS) + "  slowest", file=file)
    total = Outcome()
    for name, outcome in outcomes.items():
        numbers = "".join(f"{outcome.counts[k]:9,}" for k in KINDS)
        print(f"{name:22}{outcome.tried:9,}{numbers}{outcome.slowest:8.2f}s", file=file)
        total.counts.update(outcome.counts)
        total.slowest = max(total.slowest, outcome.slowest)
    numbers = "".join(f"{total.counts[k]:9,}" for k in KINDS)
    print(f"{'all':22}{total.tried:9,}{numbers}{total.slowest:8.2f}s", file=file)
    for name, outcome in outcomes.items():
        seen = set()
        for number, kind, what in outcome.faults:
            if (short := what[-60:]) not in seen and len(seen) < 12:
                seen.add(short)
                print(f"{name} --input {number}: {kind}: {what}", file=file)
    return total
