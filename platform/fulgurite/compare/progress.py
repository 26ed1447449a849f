"""Progress of a comparison: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from fulgurite.compare.trial import TrialResult
from fulgurite.compare.worker import Job

__all__ = ["show_progress"]


def show_progress(
    results: Iterator[TrialResult], jobs: Sequence[Job], title: str, done: int
) -> Iterator[TrialResult]:
    """Pass results on, with a bar on a terminal and plain lines elsewhere."""
    from rich.console import Console

    console, start = Console(), time.monotonic()
    by_id, total = {job.id: job for job in jobs}, len(jobs)
    if done:
        console.print(f"{done} of {done + total} cells were run before.", highlight=False)

    def line(result: TrialResult) -> str:
        job, text = by_id[result.id], "done"
        if job.metric:
            text = f"{job.metric} {result.metrics.get(job.metric, float('nan')):.4g}"
        return f"{job.label}: {result.error or text} ({result.seconds:.0f} s)"

    if not console.is_terminal:
        for count, result in enumerate(results, 1):
            remaining = (time.monotonic() - start) / count * (total - count)
            yield result  # recorded before it is told: an interrupt in between loses nothing
            print(f"[{count}/{total}] {line(result)}, {_clock(remaining)} left", flush=True)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    # A wide window: with two cells at a time, the speed of the last few says little.
    with Progress(*columns, console=console, speed_estimate_period=1e9) as progress:
        task = progress.add_task(title, total=total)
        for result in results:
            yield result
            progress.console.print(line(result), highlight=False, markup=False)
            progress.advance(task)


def _clock(seconds: float) -> str:
    """Minutes and seconds.

    >>> _clock(75), _clock(3675)
    ('1:15', '1:01:15')
    """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
