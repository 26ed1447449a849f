"""The worker process of a comparison: it imports once and runs job after job."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fulgurite.compare.trial import TrialResult
from fulgurite.masking import masked_arguments
from fulgurite.run_folders.metrics import read_metrics

__all__ = ["STARTED", "Job", "execute_job", "serve"]

STARTED = "started"
"""A worker's first message."""


@dataclass(frozen=True)
class Job:
    """What a worker does at once: the commands of a trial, of a training or of a validation.

    Args:
        id: Name of what is run.
        commands: Command lines, run one after the other.
        run_dir: Folder of the run, from which the metrics are read.
        log: File that receives the output.
        metric: A metric that must be there in the end; None for none.
        label: What people read.
    """

    id: str
    commands: list[list[str]]
    run_dir: Path
    log: Path = field(kw_only=True)
    metric: str | None = field(kw_only=True)
    label: str = field(default="", kw_only=True)


def serve(connection: Any, runner: str) -> None:
    """Run jobs until None arrives or the other side is gone.

    Args:
        connection: End of a pipe: jobs arrive, results leave.
        runner: ``module:function`` that takes a command line and returns an exit code.
    """
    _leave_with_parent()
    connection.send(STARTED)
    while True:
        try:
            job = connection.recv()
        except (EOFError, OSError):
            return
        if job is None:
            return
        connection.send(execute_job(job, runner))


def execute_job(job: Job, runner: str) -> TrialResult:
    """Run the commands of a job with the output in its log; no exception leaves.

    Args:
        job: The job.
        runner: ``module:function`` that takes a command line and returns an exit code.
    """
    start = time.monotonic()
    error = ""
    metrics: dict[str, float] = {}
    try:
        with _output_in(job.log):
            error, metrics = _run_commands(job, runner)
            if error:
                print(f"failed: {error}", file=sys.stderr, flush=True)
            _tidy()
    except OSError as problem:  # such as a full disk
        error = error or f"its log {job.log} cannot be written ({problem.strerror or problem})"
    return TrialResult(job.id, metrics, error, time.monotonic() - start)


def _run_commands(job: Job, runner: str) -> tuple[str, dict[str, float]]:
    """Why a job failed, empty if it did not, and the metrics of its run.

    Raises:
        OSError: The output cannot be written.
    """
    try:
        module, _, function = runner.partition(":")
        main = getattr(importlib.import_module(module), function)
        _one_thread()
        for command in job.commands:
            print("$ fulgurite", *masked_arguments(command), flush=True)
            code = main(list(command))
            if code:
                error = f"`fulgurite {command[0]}` ended with exit status {code}"
                return error + _last_error(job.log), {}
        metrics = read_metrics(job.run_dir)
        if job.metric and job.metric not in metrics:
            return f"the run has no metric {job.metric!r} (it has: {', '.join(metrics)})", metrics
    except SystemExit as leave:
        return f"the command line ended with exit status {leave.code}", {}
    except BaseException as problem:  # one job must not end the others
        traceback.print_exc()
        return f"{type(problem).__name__}: {problem}", {}
    return "", metrics


def _last_error(log: Path) -> str:
    """The line in which a command said why it failed, after a colon."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    start = "fulgurite: error: "
    messages = [line.removeprefix(start) for line in lines if line.startswith(start)]
    return f": {messages[-1]}" if messages else ""


def _leave_with_parent() -> None:
    """Lead an own process group, and end it when the driver is gone (even by kill -9)."""
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C reaches the driver alone, which ends the group of each worker
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        if hasattr(os, "killpg"):
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _one_thread() -> None:
    """Jobs share the cores by processes; torch's own threads would only be in the way."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def _tidy() -> None:
    if "wandb" in sys.modules:
        with suppress(Exception):
            sys.modules["wandb"].finish()
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
    gc.collect()


@contextmanager
def _output_in(log: Path) -> Iterator[None]:
    """Send file descriptors 1 and 2 to a file, so that child processes write there too."""
    log.parent.mkdir(parents=True, exist_ok=True)
    saved = [(stream, os.dup(stream)) for stream in (1, 2)]
    with log.open("wb", buffering=0) as file:
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            for stream, _ in saved:
                os.dup2(file.fileno(), stream)
            yield
        finally:
            for output in (sys.stdout, sys.stderr):
                with suppress(OSError):  # of a full disk, which the job has met by then
                    output.flush()
            for stream, copy in saved:
                os.dup2(copy, stream)
                os.close(copy)
