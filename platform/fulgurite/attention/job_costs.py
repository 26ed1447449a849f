"""What the tasks of a job read, write and take.

Axes: B batch, H query heads, G key/value heads, M queries, N keys, D head size.
"""

from __future__ import annotations

import torch

from fulgurite.attention.budget import format_bytes
from fulgurite.attention.calibration import measured_costs
from fulgurite.attention.cost_model import BACKWARD_FLOPS
from fulgurite.attention.execution_plan import ExecutionPlan
from fulgurite.attention.job_header import BY_KEYS, JobHeader
from fulgurite.attention.job_tasks import JobTask, job_tasks
from fulgurite.attention.kernels import accumulator_dtype

__all__ = ["explain_job", "read_bytes", "written_bytes"]

_WIDTHS = {"out": "value", "dquery": "query", "dkey": "key", "dvalue": "value"}
_MERGE_SPEED = 3e8  # bytes of parts that are read, checked and merged by a CPU thread [1/s]


def explain_job(header: JobHeader, plan: ExecutionPlan, missing: int) -> str:
    """Return what the tasks are, what each reads and writes, and how long they take.

    Args:
        header: Header of the job.
        plan: How the call is cut.
        missing: Number of tasks without a file.
    """
    reads, writes = [], []
    for task in job_tasks(plan, header.is_backward):
        reads.append(read_bytes(header, task))
        writes.append(written_bytes(header, task))
    query = header.inputs["query"]
    costs = measured_costs(
        torch.device("cpu"), getattr(torch, query["dtype"]), max(1, query["shape"][-1])
    )
    factor = 1.0
    if header.is_backward and plan.merges:  # else the plan is that of the gradients
        factor = BACKWARD_FLOPS
    seconds = plan.cost.flops / costs.flops + plan.cost.calls * costs.call
    seconds *= factor / max(1, header.tasks)
    budget = "none" if header.budget is None else format_bytes(header.budget)
    return "\n".join(
        [
            f"job       {'gradients' if header.is_backward else 'attention'}, {plan.schedule}",
            f"tasks     {header.tasks}, of which {missing} have no file",
            f"budget    {budget} for a task",
            f"read      {_extent(reads)} by a task",
            f"written   {_extent(writes)} by a task, {format_bytes(sum(writes))} in all",
            f"time      {seconds:.3g} s a task on average by a CPU thread, "
            f"{sum(writes) / _MERGE_SPEED:.3g} s for the merge, predicted",
        ]
    )


def read_bytes(header: JobHeader, task: JobTask) -> int:
    """Return how many bytes of the inputs a task reads."""
    total = 0
    batch, heads, kv_heads = (s.stop - s.start for s in task.group[:3])
    for name, fact in header.inputs.items():
        spans, count = (task.keys, kv_heads) if name in BY_KEYS else (task.queries, heads)
        width = 1 if name == "lse" else int(fact["shape"][-1])
        tokens = sum(stop - start for start, stop in spans)
        total += batch * count * tokens * width * _itemsize(fact["dtype"])
    return total


def written_bytes(header: JobHeader, task: JobTask) -> int:
    """Return how many bytes of numbers a task writes at most; rows without keys are left out."""
    query = header.inputs["query"]
    wide = accumulator_dtype(getattr(torch, query["dtype"])).itemsize
    batch, heads, kv_heads = (s.stop - s.start for s in task.group[:3])
    total = 0
    for name in task.gives:
        by_keys = name in ("dkey", "dvalue")
        spans, count = (task.keys, kv_heads) if by_keys else (task.queries, heads)
        width = 1 if name == "lse" else int(header.inputs[_WIDTHS[name]]["shape"][-1])
        total += batch * count * sum(stop - start for start, stop in spans) * width * wide
    return total


def _itemsize(name: str) -> int:
    dtype: torch.dtype = getattr(torch, name)
    return dtype.itemsize


def _extent(sizes: list[int]) -> str:
    smallest, largest = min(sizes, default=0), max(sizes, default=0)
    return f"{format_bytes(smallest)} to {format_bytes(largest)}"
