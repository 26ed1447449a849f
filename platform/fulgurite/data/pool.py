"""One pool of processes that read files, for all readers; it leaves the run's randomness alone."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from fulgurite.errors import FulguriteError

__all__ = ["FEWEST_JOBS", "run_in_processes"]

_MOST_WORKERS = 16
#: Fewer jobs are done in this process.
FEWEST_JOBS = 3


class _Jobs(Dataset[Any]):
    """Jobs whose errors are returned: what a worker raises would come with its traceback as text.

    Args:
        jobs: ``jobs[k]`` does job k.
    """

    def __init__(self, jobs: Dataset[Any]) -> None:
        self.jobs = jobs

    def __getitem__(self, number: int) -> Any:
        try:
            return self.jobs[number]
        except FulguriteError as error:
            return error


def run_in_processes(jobs: Dataset[Any], count: int, is_parallel: bool = True) -> Iterator[Any]:
    """Do ``jobs[0]``, ``jobs[1]``, … in as many processes as there are cores, and give the results.

    The global random numbers of torch, NumPy and Python stay as they are, however many processes
    there are and however often this is called.

    Args:
        jobs: What a job gives is best a tensor, which goes through shared memory: arrays would go
            through a pipe, on which workers hang for ever if their parent is killed.
        count: Number of jobs.
        is_parallel: Whether the jobs are worth the start of processes.

    Yields:
        What the jobs give, in their order.

    Raises:
        FulguriteError: A job failed with this error.

    Example:
        >>> list(run_in_processes(["a", "b"], 2))
        ['a', 'b']
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        cores = os.cpu_count() or 1
    is_parallel = is_parallel and count >= FEWEST_JOBS and cores > 1
    # processes, since threads are slower than one: small images hold the GIL
    loader: DataLoader[Any] = DataLoader(
        _Jobs(jobs),
        batch_size=None,
        sampler=range(count),
        num_workers=min(cores, count, _MOST_WORKERS) if is_parallel else 0,
        collate_fn=_keep,
        generator=torch.Generator(),  # else each call would draw from the global one
    )
    with warnings.catch_warnings():
        # forked next to threads of others; these workers use none
        warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
        results = iter(loader)
    for result in results:
        if isinstance(result, FulguriteError):
            raise result
        yield result


def _keep(item: Any) -> Any:
    return item
