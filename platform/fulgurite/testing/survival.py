"""Does a training survive being killed? For the tests of every system, a plug-in's too.

Each command runs in a fork of this process, which has imported everything already.
"""

from __future__ import annotations

import csv
import functools
import itertools
import json
import os
import random
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fulgurite.run_folders import RUN_DIR_VARIABLE

__all__ = [
    "Ended", "Forked", "Survival", "differing", "find_free_port", "run_forked", "run_ranks",
    "start_call", "start_forked", "unequal",
]  # fmt: skip

_NUMBERS = itertools.count()  # of forks

#: Metrics of time and memory, which no two runs share.
CLOCKS = ("time/", "memory/", "train/tokens_per_s")


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Args:
        status: Exit status; negative for the signal that ended it.
        seconds: Time on the processor [s].
        output: What it printed.
    """

    status: int
    seconds: float
    output: str


def run_forked(
    argv: Sequence[str],
    *,
    limit: float | None = None,
    before: Callable[[], None] | None = None,
) -> Ended:
    """Run a command line of ``fulgurite`` in a fork of this process.

    Args:
        argv: The command line.
        limit: Time on the processor after which the process is killed [s]; None for never.
        before: Called in the fork first, such as to let it fail at a certain point.
    """
    return start_forked(argv, limit=limit, before=before).wait()


@dataclass(frozen=True)
class Forked:
    """A command line that runs in a fork of this process.

    Attributes:
        pid: Process ID of the fork.
        log: File of what it prints.
    """

    pid: int
    log: Path

    def wait(self) -> Ended:
        """Wait for its end."""
        _, ended, usage = os.wait4(self.pid, 0)
        output = self.log.read_text(errors="replace")
        self.log.unlink()
        return Ended(os.waitstatus_to_exitcode(ended), usage.ru_utime + usage.ru_stime, output)


def start_forked(
    argv: Sequence[str],
    *,
    limit: float | None = None,
    before: Callable[[], None] | None = None,
) -> Forked:
    """Start what :func:`run_forked` waits for.

    Args:
        argv: The command line.
        limit: Time on the processor after which the process is killed [s]; None for never.
        before: Called in the fork first, such as to let it fail at a certain point.
    """
    import fulgurite.cli  # noqa: F401  # now, not in each fork

    def run() -> int:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process at once
        if before is not None:
            before()
        if limit is not None:
            signal.setitimer(signal.ITIMER_PROF, limit)
        from fulgurite.__main__ import main

        return main([*argv])

    return start_call(run, Path())


def start_call(work: Callable[[], int | None], folder: Path) -> Forked:
    """Call a function in a fork of this process, which ends with the status that it returns.

    Args:
        work: The function; None stands for 0, and an exception for 70 and its traceback.
        folder: Where what it prints is kept until :meth:`Forked.wait` reads it.
    """
    log = folder.absolute() / f".output-{os.getpid()}-{next(_NUMBERS)}"
    log.touch()
    child = os.fork()
    if child == 0:
        status = 70
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(descriptor, stream)
            sys.stdout, sys.stderr = (open(s, "w", buffering=1, closefd=False) for s in (1, 2))  # noqa: SIM115
            status = work() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    return Forked(child, log)


def find_free_port() -> int:
    """Return a port of this machine that nothing listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def run_ranks(argv: Sequence[str], ranks: int = 2) -> list[Ended]:
    """Run a command line with ``--run.dir`` on several ranks, each a fork of this process.

    Args:
        argv: The command line, with the strategy and ``--trainer.devices``.
        ranks: How many.
    """
    folder = next(x.split("=", 1)[1] for x in argv if x.startswith("--run.dir="))
    run = Path(folder, *([] if argv[0] == "fit" else [argv[0]])).absolute()
    port = find_free_port()

    def join(rank: int) -> None:
        os.environ.update(
            LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )  # fmt: skip
        if rank:  # as a process that the first rank launches
            os.environ[RUN_DIR_VARIABLE] = str(run)

    forks = [start_forked(argv, before=functools.partial(join, rank)) for rank in range(ranks)]
    return [fork.wait() for fork in forks]


class Survival:
    """A training that is not disturbed, and others of it that are killed and resumed.

    Args:
        options: Options of ``fulgurite fit``, without the run folder.
        folder: Where the runs go; an undisturbed one is trained there now.
    """

    def __init__(self, options: Sequence[str], folder: Path) -> None:
        self.options, self.folder = [*options], folder
        ended = self.fit(folder / "whole")
        if ended.status:
            raise RuntimeError(ended.output)
        self.seconds = ended.seconds

    def fit(self, run: Path, **how: Any) -> Ended:
        """Train, or go on, in a folder; ``how`` as for :func:`run_forked`."""
        last = run / "checkpoints" / "last.ckpt"
        resume = ["--ckpt_path=last"] if last.is_file() else []
        return run_forked(["fit", *self.options, f"--run.dir={run}", *resume], **how)

    def kill_and_resume(self, name: str, kills: int, seed: int) -> tuple[int, list[str]]:
        """Kill a training at random moments, each time after resuming it, and let it end.

        Args:
            name: Name of its folder.
            kills: How often.
            seed: Seed of the moments of the kills.

        Returns:
            How often it was killed, and what is different from the undisturbed training.
        """
        run, draw = self.folder / name, random.Random(seed)
        killed = 0
        for _ in range(kills):
            ended = self.fit(run, limit=self.seconds * draw.uniform(0.05, 1.0))
            if ended.status not in (0, -signal.SIGPROF):
                return killed, [ended.output]
            if ended.status == 0:
                break
            killed += 1
        ended = self.fit(run)
        if ended.status:
            return killed, [ended.output]
        return killed, differing(self.folder / "whole", run)


def differing(one: Path, two: Path) -> list[str]:
    """What of two runs that should be the same is not: weights, optimizers, records, figures."""
    differences: list[str] = []
    for name in ("last.ckpt", "best.ckpt"):
        files = [run / "checkpoints" / name for run in (one, two)]
        if [f.is_file() for f in files] == [False, False]:
            continue
        if not all(f.is_file() for f in files):
            differences.append(f"{name} is missing")
            continue
        states = [torch.load(f, weights_only=True) for f in files]
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"):
            differences += [f"{name}: {part}{key}" for key in unequal(*(s[part] for s in states))]
        scores = [
            {k: v.get("best_model_score") for k, v in s["callbacks"].items() if "Checkpoint" in k}
            for s in states
        ]
        differences += [f"{name}: best score {key}" for key in unequal(scores[0], scores[1])]
    rows = [_rows(run / "metrics.csv") for run in (one, two)]
    if len(rows[0]) != len(rows[1]):
        differences.append(f"metrics.csv: {len(rows[0])} and {len(rows[1])} rows")
    for i, (first, second) in enumerate(zip(*rows, strict=False)):
        differences += [f"metrics.csv: row {i}{key}" for key in unequal(first, second)]
    summaries = [_without_clocks(json.loads((r / "summary.json").read_text())) for r in (one, two)]
    differences += [f"summary.json: {key}" for key in unequal(summaries[0], summaries[1])]
    drawn = [sorted(path.name for path in run.glob("figures/*.png")) for run in (one, two)]
    if drawn[0] != drawn[1]:
        differences.append(f"figures: {drawn[0]} and {drawn[1]}")
    else:
        differences += [
            f"figures/{name}"
            for name in drawn[0]
            if name != "attention.png"  # of times
            and (one / "figures" / name).read_bytes() != (two / "figures" / name).read_bytes()
        ]
    return differences


def _without_clocks(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if not k.startswith(CLOCKS)}


def _rows(file: Path) -> list[dict[str, Any]]:
    with file.open(newline="") as opened:
        return [_without_clocks(row) for row in csv.DictReader(opened)]


def unequal(one: Any, two: Any, key: str = "") -> list[str]:
    """Where two nested values differ."""
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        same = one.shape == two.shape and bool(torch.equal(one, two))
        return [] if same or bool(one.isnan().any() and two.isnan().any()) else [key]
    if isinstance(one, dict) and isinstance(two, dict):
        missing = [f"{key}.{name}" for name in one.keys() ^ two.keys()]
        shared = [name for name in one if name in two]
        return missing + [x for n in shared for x in unequal(one[n], two[n], f"{key}.{n}")]
    if isinstance(one, list | tuple) and isinstance(two, list | tuple):
        if len(one) != len(two):
            return [key]
        pairs = enumerate(zip(one, two, strict=True))
        return [x for i, pair in pairs for x in unequal(*pair, f"{key}[{i}]")]
    return [] if one == two or (one != one and two != two) else [key]
