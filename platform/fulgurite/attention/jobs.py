"""Attention by processes that do not talk to each other: they share a folder, or only its files.

Axes: B batch, H query heads, G key/value heads, M queries, N keys, D head size.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor

from fulgurite.attention.checks import (
    GRADIENTS,
    INPUTS,
    RESULTS,
    SAVED,
    check_beside,
    host_tensors,
    kernel_device,
    name_tensors,
)
from fulgurite.attention.execution_plan import ExecutionPlan
from fulgurite.attention.fingerprint import digest_blocks
from fulgurite.attention.job_costs import explain_job
from fulgurite.attention.job_header import BY_KEYS, JobHeader, input_blocks, plain_masks
from fulgurite.attention.job_merge import merge_parts
from fulgurite.attention.job_tasks import JobTask, compute_task, job_tasks, overlapping_blocks
from fulgurite.attention.kernels import accumulator_dtype
from fulgurite.attention.keywords import JobKeywords, check_keywords, make_record
from fulgurite.attention.leases import Leases
from fulgurite.attention.locks import writing
from fulgurite.attention.mapped import check_targets
from fulgurite.attention.masks import Masking
from fulgurite.attention.parts import temporary_files, write_part
from fulgurite.attention.progress import bar
from fulgurite.errors import ConfigError, DataError

__all__ = ["AttentionJob"]


class AttentionJob:
    """A call that any number of processes or machines compute without communication.

    A folder holds the job. Whoever sees it takes tasks that nobody has computed, each of which
    reads only the tokens that it needs, and writes their partial results into a file each. When
    all files are in one folder, written there or copied together, they are merged in the order
    of the tasks, so the bits of the result do not depend on who computed what and when (as far as
    the machines compute alike).

    Made by :meth:`create`, :meth:`create_backward` or :meth:`open`.

    Args:
        folder: Folder of the job.
        header: What ``job.json`` holds.
        plan: How the call is cut.

    Example:
        >>> import tempfile
        >>> q, k, v = torch.randn(3, 1, 2, 100, 16, generator=torch.Generator().manual_seed(0))
        >>> out, lse = torch.empty_like(q), torch.empty(1, 2, 100)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     job = AttentionJob.create(folder, q, k, v, least_tasks=7)
        ...     first = AttentionJob.open(folder).run(q, k, v, shard=(0, 2))
        ...     second = AttentionJob.open(folder).run(q, k, v, shard=(1, 2))
        ...     job.merge(out, lse)
        >>> wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        >>> torch.testing.assert_close(out, wanted)
        >>> len(first), len(second)
        (7, 7)

    Source: docs/papers/stream_cqsa.md sections 0 ("execution across devices without inter-device
    communication"), 1.1, 1.6 and 1.7; claims and files: inferred.
    """

    def __init__(self, folder: Path, header: JobHeader, plan: ExecutionPlan) -> None:
        self.folder, self.plan = folder, plan
        self._header = header
        self._names = tuple(header.inputs)
        self._identity = header.identity
        self._blocks = input_blocks(plan, self._names)

    @classmethod
    def create(
        cls,
        folder: str | Path,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        progress: bool = True,
        **options: Unpack[JobKeywords],
    ) -> AttentionJob:
        """Write a job into a folder, or open it if the same is there.

        All inputs are read once, to note a checksum of each range of tokens that tasks read. Where
        the sizes, numbers, options and the budget in bytes are the same, so is the job: machines
        may create it in a folder each and bring their files together.

        Args:
            folder: Folder of the job; made if it is not there.
            query: Shape: (B, H, M, D), or with fewer or more axes before the heads.
            key: Shape: (B, G, N, D).
            value: Shape: (B, G, N, D).
            progress: Show a bar while long inputs are read.
            options: Any of the keywords below, and ``is_causal`` and the other masks that are
                intervals, but for ``key_mask``; see
                :class:`~fulgurite.attention.masks.Masking`.

        Keyword Args:
            scale: Scale of the scores; this and the other options are those of
                :func:`~fulgurite.attention.stream_attention`.
            enable_gqa: Allow fewer key/value heads.
            softcap: Cap of the scores.
            memory_budget: Most that a task holds at once; ``"auto"`` by default.
            schedule: ``cqs``, the default (a task reads the chunks of a quorum), or ``rect`` (a
                task reads a range of queries and all keys that they see).
            least_tasks: Least number of tasks, that is of processes with something to do.
            device: Where kernels run.
            kernel: On a GPU, which kernel to try first.

        Raises:
            ConfigError: An option is not supported, or the budget is too small.
            DataError: Shapes or types do not fit.
            CheckpointError: The folder holds another job, or cannot be written.
        """
        return cls._create(folder, name_tensors(INPUTS, (query, key, value)), options, progress)

    @classmethod
    def create_backward(
        cls,
        folder: str | Path,
        *inputs: Tensor,
        progress: bool = True,
        **options: Unpack[JobKeywords],
    ) -> AttentionJob:
        """Write a job that computes gradients, or open it if the same is there.

        Args:
            folder: Folder of the job; another one than that of the forward pass.
            inputs: The gradient of the result (B, H, M, D); query, key and value; and the result
                (B, H, M, D) and its log-sum-exp (B, H, M) over all keys.
            progress: Show a bar while long inputs are read.
            options: The keywords of :meth:`create`. With the schedule ``cqs`` the gradients of all
                inputs add up over tasks; with ``rect`` a task gives the whole gradients of some
                queries, or of some keys and values, and the scores are computed twice.

        Raises:
            ConfigError: An option is not supported, or the budget is too small.
            DataError: Shapes or types do not fit.
            CheckpointError: The folder holds another job, or cannot be written.
        """
        return cls._create(folder, name_tensors(SAVED, inputs), options, progress)

    @classmethod
    def _create(
        cls,
        folder: str | Path,
        inputs: dict[str, Tensor],
        options: JobKeywords,
        progress: bool,
    ) -> AttentionJob:
        """Write the header of a job of either pass, or open it."""
        check_keywords("AttentionJob.create", options, JobKeywords)
        facts = {
            "masks": plain_masks(make_record(Masking, options)),
            "enable_gqa": options.get("enable_gqa", False), "softcap": options.get("softcap"),
            "schedule": options.get("schedule", "cqs"),
            "least_tasks": options.get("least_tasks", 1), "kernel": options.get("kernel"),
        }  # fmt: skip
        header, plan = JobHeader.create(
            Path(folder), host_tensors(inputs), facts, scale=options.get("scale"),
            budget=options.get("memory_budget", "auto"),
            device=kernel_device(options.get("device")), progress=progress,
        )  # fmt: skip
        return cls(Path(folder), header, plan)

    @classmethod
    def open(cls, folder: str | Path) -> AttentionJob:
        """Open the job of a folder; the inputs are not needed for that.

        Raises:
            CheckpointError: There is no job, it is damaged, or this version would cut it otherwise.
        """
        return cls(Path(folder), *JobHeader.read(Path(folder)))

    @property
    def is_backward(self) -> bool:
        """Whether it computes gradients."""
        return self._header.is_backward

    @property
    def task_count(self) -> int:
        """Number of tasks."""
        return self._header.tasks

    def missing(self) -> list[int]:
        """Return the numbers of the tasks that have no file in the folder yet."""
        return [n for n in range(self.task_count) if not self._path(n).exists()]

    def tasks(self) -> Iterator[JobTask]:
        """Yield the tasks, with the ranges of tokens that each reads."""
        return job_tasks(self.plan, self.is_backward)

    @torch.no_grad()
    def run(
        self,
        *inputs: Tensor,
        shard: tuple[int, int] | None = None,
        lease: float = 60.0,
        wait: bool = True,
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> list[int]:
        """Compute tasks that nobody has computed.

        Before a task is computed the tokens that it reads are compared with the checksums of the
        job; all others may be missing (any numbers).

        Args:
            inputs: Query, key and value, or all inputs of :meth:`create_backward`.
            shard: Index of the shard to compute, and number of equal shards, without claims; by
                default whatever nobody else who sees the folder has claimed.
            lease: How long a claim lasts without a sign of life of its process [s]; then others
                take the task over.
            wait: Whether to wait for the tasks that others have claimed, so that all are done at
                the end, by whomever.
            device: Where kernels run.
            progress: Show a bar.

        Returns:
            Numbers of the tasks that were computed.

        Raises:
            ConfigError: The shard is not among its number of shards, or the lease is not positive.
            DataError: The inputs are not those of the job.
            CheckpointError: The folder cannot be written.
        """
        if shard is not None and not 0 <= shard[0] < shard[1]:
            raise ConfigError(
                f"There is no shard {shard[0]} of {shard[1]}.", "Count shards from 0."
            )
        if lease <= 0:
            raise ConfigError(f"A lease of {lease} s is not positive.", "Give a positive time.")
        tensors, compute_device = self._name_inputs(inputs), kernel_device(device)
        leases, computed = Leases(self.folder / "leases", lease), list[int]()
        checked = set[tuple[str, int]]()
        with bar("tasks", self.task_count, show=progress) as advance:
            while True:
                waiting = False
                for task in self.tasks():
                    path = self._path(task.number)
                    if path.exists() or (shard and _owner(task.number, shard[1]) != shard[0]):
                        continue
                    if shard is not None:
                        self._compute(task, tensors, compute_device, checked)
                    else:
                        clean = partial(_clean, path)
                        with leases.claimed(path.stem, path.exists, clean) as is_mine:
                            if is_mine:
                                self._compute(task, tensors, compute_device, checked)
                    if not path.exists():
                        waiting = True
                    elif shard is not None or is_mine:
                        computed.append(task.number)
                        advance(sum(stop - start for start, stop in task.queries))
                if not waiting or not wait:
                    return computed
                time.sleep(min(lease / 4, 1.0))

    @torch.no_grad()
    def run_task(
        self, number: int, *inputs: Tensor, device: torch.device | str | None = None
    ) -> None:
        """Compute one task, unless its file is there already; for whoever deals the tasks out.

        Nothing is claimed: two processes that compute a task at once write the same file, which is
        there as a whole or not at all.

        Args:
            number: Number of the task.
            inputs: As those of :meth:`run`.
            device: Where kernels run.

        Raises:
            ConfigError: There is no such task.
            DataError: The inputs are not those of the job.
            CheckpointError: The folder cannot be written.
        """
        if not 0 <= number < self.task_count:
            raise ConfigError(
                f"The job {self.folder} has no task {number}.",
                f"Its tasks are 0 to {self.task_count - 1}." if self.task_count else "It has none.",
            )
        path = self._path(number)
        if path.exists():
            return
        tensors, compute_device = self._name_inputs(inputs), kernel_device(device)
        _clean(path)
        task = next(islice(self.tasks(), number, None))
        self._compute(task, tensors, compute_device, set())

    def _compute(
        self,
        task: JobTask,
        tensors: Mapping[str, Tensor],
        device: torch.device,
        checked: set[tuple[str, int]],
    ) -> None:
        """Compute a task and write its file."""
        self._check(task, tensors, checked)
        path = self._path(task.number)
        with writing(f"job {self.folder}"):
            path.parent.mkdir(parents=True, exist_ok=True)
        facts = {"job": self._identity, "task": task.number}
        results = compute_task(task, list(tensors.values()), self.plan, device=device)
        with writing(f"job {self.folder}"), write_part(path, facts, keeps_first=True) as part:
            for name, at, values in results:
                part.add(name, at, values)

    def _check(
        self, task: JobTask, tensors: Mapping[str, Tensor], checked: set[tuple[str, int]]
    ) -> None:
        """Compare the tokens that a task reads with the checksums of the job.

        Raises:
            DataError: The tokens differ from those of the job.
        """
        for name, tensor in tensors.items():
            blocks = self._blocks[name]
            indices = overlapping_blocks(blocks, task.keys if name in BY_KEYS else task.queries)
            new = [i for i in indices if (name, i) not in checked]
            digests = digest_blocks(tensor, [blocks[i] for i in new])
            for i, digest in zip(new, digests, strict=True):
                if digest != self._header.inputs[name]["sha256"][i]:
                    start, stop = blocks[i]
                    raise DataError(
                        f"{name} is not that of the job {self.folder}: tokens {start} to {stop} "
                        f"differ, which task {task.number} reads.",
                        "Give the tensors that the job was made with, unchanged.",
                    )
                checked.add((name, i))

    @torch.no_grad()
    def merge(self, *targets: Tensor, progress: bool = False) -> None:
        """Bring the partial results of all tasks together, in the order of the tasks.

        At most two parts of a range of tokens are in memory at once. A merge that is interrupted
        is begun again.

        Args:
            targets: Out and lse, or the gradients of query, key and value, overwritten; in any
                floating type but for ``lse``. Shape: as the inputs.
            progress: Show a bar.

        Raises:
            CheckpointError: Tasks are missing, or a file is damaged or of another job; the
                results are not complete then.
            ConfigError: Results share memory, or are read-only.
            DataError: Shapes or types do not fit.
        """
        shapes = self.result_shapes()
        results = host_tensors(name_tensors(tuple(shapes), targets))
        wide = accumulator_dtype(getattr(torch, self._header.inputs["query"]["dtype"]))
        for name, target in results.items():
            check_beside(name, target, shapes[name], wide if name == "lse" else None)
        check_targets(results, {})
        paths = [self._path(n) for n in range(self.task_count)]
        merge_parts(self.folder, self._identity, paths, results, progress=progress)

    def result_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each result by its name: those that :meth:`merge` takes, in order."""
        facts = self._header.inputs
        query, key, value = (tuple(facts[name]["shape"]) for name in INPUTS)
        if self.is_backward:
            return dict(zip(GRADIENTS, (query, key, value), strict=True))
        return dict(zip(RESULTS, ((*query[:-1], value[-1]), query[:-1]), strict=True))

    def explain(self) -> str:
        """Return what the tasks are, what each reads and writes, and how long they take."""
        return explain_job(self._header, self.plan, len(self.missing()))

    def _path(self, number: int) -> Path:
        return self.folder / "parts" / f"task-{number:07d}.part"

    def _name_inputs(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """Views of the inputs by name.

        Raises:
            DataError: The number, a size or a type of the inputs is not that of the job.
        """
        tensors = host_tensors(name_tensors(self._names, inputs))
        for name, tensor in tensors.items():
            fact = self._header.inputs[name]
            check_beside(name, tensor, fact["shape"], getattr(torch, fact["dtype"]))
        return tensors


def _owner(number: int, shards: int) -> int:
    """The shard of a task, in boustrophedon order, since causal rows grow along the sequence."""
    turn, index = divmod(number, shards)
    return index if turn % 2 == 0 else shards - 1 - index


def _clean(path: Path) -> None:
    """Remove what a dead process has left of a task."""
    for half in temporary_files(path):
        half.unlink(missing_ok=True)
