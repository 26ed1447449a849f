"""What the benchmarks share: taking turns, medians, and tables."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback

RESULTS = Path(__file__).parent / "results"


class TakeTurns(Callback):
    """Lets other contestants run a round each between the rounds of a fit.

    A slow moment of the machine then meets all of them. The fit's own time runs from one epoch's
    start to the next, with everything that the Trainer does in between.

    Class attributes, since the command line builds the callback:

    Attributes:
        prepare: Gets the trainer when it starts; gives the contestants, by name.
        seconds: Times of each round, the first left out; the fit's own under ``fit``.
    """

    prepare: ClassVar[Callable[[Any], dict[str, Callable[[], Any]]] | None] = None
    seconds: ClassVar[dict[str, list[float]]] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Build the contestants."""
        prepare = type(self).prepare
        self.others = prepare(trainer) if prepare else {}
        type(self).seconds = {name: [] for name in ("fit", *self.others)}
        self.resumed = 0.0

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """End of the fit's turn, and the turn of each other."""
        if trainer.current_epoch > 1:
            self.seconds["fit"].append(time.perf_counter() - self.resumed)
        for name, run in self.others.items():
            begun = time.perf_counter()
            run()
            if trainer.current_epoch:
                self.seconds[name].append(time.perf_counter() - begun)
        self.resumed = time.perf_counter()


class ExitAtFirstStep(Callback):
    """Ends the process at once after the first local step; for timing it from outside."""

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Hang the end on the federation's first step."""
        pl_module.engine.fed.on_step = lambda: os._exit(0)


def take_turns(
    contestants: dict[str, Callable[[], Any]], repetitions: int
) -> dict[str, list[float]]:
    """Seconds of each contestant, all run once before."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for repetition in range(repetitions + 1):
        for name, run in contestants.items():
            begun = time.perf_counter()
            run()
            if repetition:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Median and quartiles.

    Example:
        >>> spread([1.0, 2.0, 3.0, 4.0, 5.0])
        '3 [2, 4]'
    """
    middle = statistics.median(values)
    if len(values) < 3:
        return f"{middle:.{digits}g}"
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.{digits}g} [{low:.{digits}g}, {high:.{digits}g}]"


def ratios(slow: Sequence[float], fast: Sequence[float]) -> list[float]:
    """Speed of ``fast`` in units of ``slow``, turn by turn."""
    return [s / f for s, f in zip(slow, fast, strict=False)]


def rate_rows(
    seconds: Mapping[str, Sequence[float]], head: str, *, amount: int, things: str, reference: str
) -> list[dict[str, str]]:
    """Rows of how fast contestants were, by their times of the same work.

    Args:
        seconds: Times of each contestant, one for each turn.
        head: Head of the contestants' column.
        amount: How many things are done in a turn.
        things: What these are.
        reference: What the first contestant is called, in whose time the others' are given.

    Example:
        >>> rate_rows({"a": [30.0], "b": [60.0]}, "way", amount=5, things="cells", reference="a")[1]
        {'way': 'b', 'seconds': '60', 'cells per minute': '5.0', 'time, a = 1': '2.00'}
    """
    first = sum(next(iter(seconds.values())))
    return [
        {
            head: name,
            "seconds": ", ".join(f"{t:.0f}" for t in times),
            f"{things} per minute": f"{60 * amount * len(times) / sum(times):.1f}",
            f"time, {reference} = 1": f"{sum(times) / first:.2f}",
        }
        for name, times in seconds.items()
    ]


def machine() -> str:
    """Processor, cores used and versions; nothing that names the machine."""
    model = platform.processor() or "unknown processor"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text().splitlines()
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), model)
    if torch.cuda.is_available():
        model += f", {torch.cuda.get_device_name()}"
    versions = ", ".join(f"{n} {metadata.version(n)}" for n in ("torch", "lightning"))
    return f"{model}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}"


def table(rows: Sequence[dict[str, str]]) -> str:
    """Rows of the same columns as Markdown.

    Example:
        >>> print(table([{"a": "1"}, {"a": "2"}]))
        | a |
        | --- |
        | 1 |
        | 2 |
    """
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def report(name: str, title: str, notes: str, rows: list[dict[str, str]], *, raw: Any) -> None:
    """Print a table and write it as Markdown, and the raw times as JSON."""
    lines = [
        f"# {title}",
        "",
        f"{machine()}. `python -m benchmarks {name}`",
        "",
        table(rows),
        "",
        *notes.strip().splitlines(),
        "",
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text("\n".join(lines), encoding="utf-8")
    (RESULTS / f"{name}.json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines))
