"""Persistent worker processes that may be killed without losing the comparison."""

from __future__ import annotations

import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
import types
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from fulgurite.compare.devices import VISIBLE
from fulgurite.compare.trial import TrialResult
from fulgurite.compare.worker import STARTED, Job, serve
from fulgurite.compare.workers import Workers
from fulgurite.errors import ConfigError

__all__ = ["WorkerPool", "run_jobs", "set_variables"]

# Threads of BLAS libraries are fixed when they load: the workers must inherit the setting.
_INHERITED = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
_POLL = 1.0  # [s]; a grandchild can hold a dead worker's pipe open, so its process is asked as well


def run_jobs(jobs: Sequence[Job], pool: Workers) -> Generator[TrialResult, None, None]:
    """Run jobs in parallel and yield each result as it comes.

    A worker that crashes or is killed costs its own job only: the job is reported as failed and a
    new worker takes the next one.

    Args:
        jobs: What to run, in this order.
        pool: Workers without a job, which stay for further jobs.

    Raises:
        ConfigError: A worker ended before it could take its first job.
    """
    waiting = list(reversed(jobs))
    while waiting and pool.idle:
        pool.submit(waiting.pop())
    while pool.busy:
        for result in pool.wait():
            if waiting:  # before the yield: the caller's work must not idle the worker
                pool.submit(waiting.pop())
            yield result


class WorkerPool:
    """Worker processes that take one job after the other, each started when it is needed.

    Args:
        workers: Number of processes.
        runner: ``module:function`` that runs a command line.
        visible: Values of ``CUDA_VISIBLE_DEVICES``, which the workers take in turn; empty to leave
            it as it is.
    """

    def __init__(self, workers: int, runner: str, visible: Sequence[str] = ()) -> None:
        self.workers, self.runner = workers, runner
        self._turns = itertools.cycle(visible or [None])
        self._workers: list[_PoolWorker] = []

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            worker.end()

    @property
    def idle(self) -> int:
        """How many workers have no job."""
        return self.workers - self.busy

    @property
    def busy(self) -> int:
        """How many workers have a job."""
        return sum(worker.job is not None for worker in self._workers)

    def submit(self, job: Job) -> None:
        """Give a job to an idle worker."""
        with set_variables(_INHERITED):
            self._idle_worker().start(job)

    def _idle_worker(self) -> _PoolWorker:
        for worker in self._workers:
            if worker.job is None:
                return worker
        self._workers.append(_PoolWorker(self.runner, next(self._turns)))
        return self._workers[-1]

    def wait(self) -> list[TrialResult]:
        """Wait for results, about a second at most; none may have come.

        Raises:
            ConfigError: A worker ended before it could take its first job.
        """
        running = [worker for worker in self._workers if worker.job]
        handles = [h for w in running for h in (w.connection, w.process.sentinel)]
        multiprocessing.connection.wait(handles, timeout=_POLL)
        with set_variables(_INHERITED):
            return [result for worker in running if (result := worker.poll())]


@contextmanager
def set_variables(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for processes that are started meanwhile."""
    before = {key: os.environ.get(key) for key in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


@contextmanager
def _without_main() -> Iterator[None]:
    """Hide the program from a process that is spawned, which would run it a second time.

    Workers need nothing of it; a script that calls ``run`` need not guard itself with
    ``if __name__ == "__main__"``.
    """
    program = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = program


class _PoolWorker:
    """One process, replaced by a new one when it dies."""

    def __init__(self, runner: str, visible: str | None = None) -> None:
        self.runner = runner
        self.visible = visible
        self.job: Job | None = None
        self._spawn()

    def _spawn(self) -> None:
        self.started = False
        # fork would inherit torch's threads and locks
        context = multiprocessing.get_context("spawn")
        self.connection: Any
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, self.runner), daemon=False)
        visible = {} if self.visible is None else {VISIBLE: self.visible}
        with _without_main(), set_variables(visible):
            self.process.start()
        theirs.close()

    def start(self, job: Job) -> None:
        self.job, self.since = job, time.monotonic()
        if not self.process.is_alive():
            self._replace()
        try:
            self.connection.send(job)
        except OSError:
            self._replace()
            self.connection.send(job)

    def poll(self) -> TrialResult | None:
        """The result of the current job, if it has one by now.

        Raises:
            ConfigError: The process ended before it could take a job, so that no other would.
        """
        assert self.job is not None
        alive = self.process.is_alive()  # asked first: a last message before death still counts
        result: TrialResult | None = None
        try:
            while result is None and self.connection.poll():
                message = self.connection.recv()
                self.started = True
                result = None if message == STARTED else message
        except (EOFError, OSError):
            alive = False
        if result is None and not alive and not self.started:
            raise ConfigError(
                f"{self._death().capitalize()} while it started.",
                "Its messages are above; `fulgurite doctor` shows what is installed.",
            )
        if result is None and not alive:
            seconds = time.monotonic() - self.since
            result = TrialResult(self.job.id, error=self._death(), seconds=seconds)
            self._replace()
        if result is not None:
            self.job = None
        return result

    def _death(self) -> str:
        self.process.join(5)
        code = self.process.exitcode
        if code is not None and code < 0:
            return f"the worker process was killed by {signal.Signals(-code).name}"
        return f"the worker process ended with exit status {code}"

    def _replace(self) -> None:
        self._kill()
        self._spawn()

    def _kill(self) -> None:
        pid = self.process.pid
        with suppress(OSError):
            os.killpg(pid, signal.SIGKILL) if pid and hasattr(os, "killpg") else None
        self.process.kill()
        self.process.join(5)
        self.connection.close()

    def end(self) -> None:
        if self.job is None and self.process.is_alive():
            with suppress(OSError):
                self.connection.send(None)
            self.process.join(5)
        self._kill()
