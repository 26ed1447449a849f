"""Streamed attention: time against one call, schedules, memory, and what the planner predicts."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import ratios, report, spread, take_turns
from fulgurite.attention import plan, stream_attention
from fulgurite.attention.budget import format_bytes
from fulgurite.attention.calibration import measured_costs
from fulgurite.attention.execution_plan import ExecutionPlan
from fulgurite.attention.inputs import AttentionInputs
from fulgurite.attention.machine_costs import MachineCosts
from fulgurite.attention.planning import make_plan
from fulgurite.attention.request import Placement, PlanRequest
from fulgurite.attention.spec import AttentionSpec
from fulgurite.attention.transfers import Prefetcher
from fulgurite.attention.units import units
from fulgurite.attention.visibility import EntryMasks, Visibility
from fulgurite.errors import ConfigError

WIDTH = 64
GRAD = (False, True)


def tensors(tokens: int, heads: int, grad: bool) -> list[Tensor]:
    """Query, key and value of unit variance."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, heads, tokens, WIDTH)
    return [torch.randn(shape, generator=generator).requires_grad_(grad) for _ in "qkv"]


def one_head(tokens: int, dtype: torch.dtype, causal: bool) -> AttentionSpec:
    """Sizes of a call of one head."""
    visible = Visibility.of(tokens, tokens, EntryMasks(is_causal=causal))
    return AttentionSpec(1, 1, 1, WIDTH, WIDTH, dtype, (visible,), WIDTH**-0.5)


def runner(attention: Callable[..., Tensor], inputs: list[Tensor], **options: Any) -> Any:
    """Forward, and backward where inputs want gradients."""

    def run() -> None:
        out = attention(*inputs, **options)
        if out.requires_grad:
            torch.autograd.grad(out.sum(), inputs)

    return run


def against_one_call(raw: dict[str, Any]) -> list[dict[str, str]]:
    """Times against ``F.scaled_dot_product_attention``, in turns."""
    rows = []
    lengths = (8192, 16384, 32768, 65536)
    for tokens, causal, grad in itertools.product(lengths, GRAD, GRAD):
        if tokens >= 65536 and grad:  # a minute each
            continue
        inputs = tensors(tokens, 1, grad)
        full_bytes = 4 * inputs[0].nbytes
        contestants = {"sdpa": runner(F.scaled_dot_product_attention, inputs, is_causal=causal)}
        plans = {}
        ways = [("rect", 8), ("rect", 32)]
        if tokens < 65536:  # a minute each
            ways += [("cqs", 8)] if grad else [("cqs", 8), ("cqs", 32)]
        for schedule, divisor in ways:
            options = {
                "is_causal": causal, "memory_budget": full_bytes // divisor, "schedule": schedule,
            }  # fmt: skip
            name = f"{schedule} 1/{divisor}"
            costs = measured_costs(torch.device("cpu"), torch.float32, WIDTH)
            try:
                plans[name] = make_plan(
                    one_head(tokens, torch.float32, causal),
                    PlanRequest(full_bytes // divisor, schedule, backward=grad, costs=costs),
                )
            except ConfigError:
                continue  # quorums of so few tokens do not fit
            contestants[name] = runner(stream_attention, inputs, **options)
        seconds = take_turns(contestants, {8192: 5, 16384: 3}.get(tokens, 1))
        raw[f"{tokens} causal={causal} backward={grad}"] = seconds
        for name, call_plan in plans.items():
            cut = (
                f"{call_plan.chunks} chunks"
                if call_plan.chunks
                else "{} x {}".format(*call_plan.tile)
            )
            if call_plan.gradient is not None and call_plan.gradient.tile != call_plan.tile:
                cut += "; {} x {}".format(*call_plan.gradient.tile)
            rows.append({
                "N": str(tokens),
                "causal": "yes" if causal else "no",
                "pass": "forward + backward" if grad else "forward",
                "schedule, budget": name,
                "cut": cut,
                "one call [s]": spread(seconds["sdpa"]),
                "time / one call": spread(ratios(seconds[name], seconds["sdpa"])),
                "predicted / measured": "–" if grad else (
                    f"{call_plan.cost.seconds / (sum(seconds[name]) / len(seconds[name])):.2f}"
                ),
            })  # fmt: skip
    return rows


def schedules(raw: dict[str, Any]) -> list[dict[str, str]]:
    """The three ways to cut at equal budgets."""
    inputs = tensors(8192, 8, False)
    rows = []
    for budget in ("16MiB", "4MiB", "2MiB"):
        contestants, plans = {}, {}
        for schedule in ("heads", "rect", "cqs"):
            options = {"is_causal": True, "memory_budget": budget, "schedule": schedule}
            try:
                plans[schedule] = plan(*inputs[:2], **options)  # type: ignore[arg-type]
            except ConfigError:
                continue  # one head alone is larger
            contestants[schedule] = runner(stream_attention, inputs, **options)
        seconds = take_turns(contestants, 3)
        raw[f"schedules {budget}"] = seconds
        for name, call_plan in plans.items():
            moved = moved_bytes(inputs, call_plan)
            rows.append({
                "budget": budget,
                "schedule": name,
                "peak": format_bytes(call_plan.peak_bytes),
                "bytes moved": format_bytes(moved),
                "predicted / counted": f"{call_plan.cost.moved_bytes / moved:.2f}",
                "seconds": spread(seconds[name]),
            })  # fmt: skip
    return rows


def moved_bytes(inputs: list[Tensor], plan: ExecutionPlan) -> int:
    """Bytes that a run loads and stores; results that are merged are read and written again."""
    moved, prefetch = 0, Prefetcher.prefetch

    def counting(self: Prefetcher, pieces: Any) -> Any:
        def counted() -> Any:
            nonlocal moved
            for item, views in pieces:
                moved += sum(x.nbytes for parts in views for x in parts)
                yield item, views

        return prefetch(self, counted())

    with mock.patch.object(Prefetcher, "prefetch", counting):
        for unit in units(AttentionInputs(*inputs), plan):
            written = unit.out.nbytes + unit.lse.nbytes
            moved += 2 * written if plan.merges else written
    return moved


def masks(raw: dict[str, Any]) -> list[dict[str, str]]:
    """What masks, caps, sinks and biases cost beside a plain call at the same budget."""
    tokens, heads = 2048, 4
    generator = torch.Generator().manual_seed(0)
    position_bias = torch.randn(1, heads, tokens, tokens, generator=generator)
    holes = torch.rand(1, 1, tokens, tokens, generator=generator) < 0.9
    lower = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    ways: dict[str, dict[str, Any]] = {
        "plain": {},
        "is_causal": {"is_causal": True},
        "a causal mask as booleans": {"attn_mask": lower},
        "padding on the left, a quarter": {"lengths": [1536], "starts": [512]},
        "window of 256, causal": {"is_causal": True, "window": 256},
        "8 documents": {"documents": list(range(0, tokens, 256))},
        "booleans with holes": {"attn_mask": holes},
        "bias": {"attn_mask": position_bias},
        "ALiBi": {"alibi_slopes": torch.rand(heads, generator=generator)},
        "sinks": {"sinks": torch.randn(heads, generator=generator)},
        "softcap (matrix products)": {"softcap": 30.0},
        "learned bias": {"attn_mask": position_bias.clone().requires_grad_()},
    }
    rows = []
    for grad in GRAD:
        inputs = tensors(tokens, heads, grad)
        budget = 4 * inputs[0].nbytes // 4
        contestants = {
            name: masked_runner(inputs, budget, options)
            for name, options in ways.items()
            if grad or name != "learned bias"
        }
        seconds = take_turns(contestants, 5)
        raw[f"masks backward={grad}"] = seconds
        rows += [
            {
                "pass": "forward + backward" if grad else "forward",
                "mask": name,
                "seconds": spread(times),
                "time / plain": spread(ratios(times, seconds["plain"])),
            }
            for name, times in seconds.items()
        ]
    return rows


def masked_runner(inputs: list[Tensor], budget: int, options: dict[str, Any]) -> Any:
    """A streamed call with a mask, and its gradients, that of a learned bias included."""
    learned = [x for x in options.values() if isinstance(x, Tensor) and x.requires_grad]

    def run() -> None:
        with torch.set_grad_enabled(inputs[0].requires_grad):
            out = stream_attention(*inputs, memory_budget=budget, **options)
        if out.requires_grad:
            torch.autograd.grad(out.sum(), [*inputs, *learned])

    return run


MEMORY = """
import sys
import torch
from fulgurite.attention import attend_files, files, memory_mapped
torch.set_num_threads(1)
folder, tokens, budget = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(x.split()[1]) * 1024 for x in file if x.startswith("RssAnon"))

shape = (1, 1, tokens, 64)
q, k, v, out = (memory_mapped(f"{folder}/{n}", shape, torch.float32, create=True) for n in "qkvo")
lse = memory_mapped(f"{folder}/l", shape[:-1], torch.float32, create=True)
for x in (q, k, v):
    for at in range(0, tokens, 512):
        x[:, :, at : at + 512] = torch.randn(1, 1, min(512, tokens - at), 64)
small = torch.zeros(1, 1, 64, 64)
files.attend_files([small] * 3, (small.clone(), torch.zeros(1, 1, 64)), progress=False)
commit, before, peak = files.commit_, anonymous(), 0

def watching(*args, **kwargs):
    global peak
    peak = max(peak, anonymous() - before)
    commit(*args, **kwargs)

files.commit_ = watching
plan = attend_files(
    (q, k, v), (out, lse), is_causal=True, memory_budget=budget, schedule="rect", progress=False
)
print(plan.peak_bytes, peak)
"""


def memory(raw: dict[str, Any]) -> list[dict[str, str]]:
    """Memory of memory-mapped runs as the sequence doubles."""
    rows, budget = [], 2**20
    for tokens in (1024 * 2**i for i in range(7)):
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [sys.executable, "-c", MEMORY, folder, str(tokens), str(budget)],
                check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1],
            )  # fmt: skip
        planned, grown = map(int, done.stdout.split())
        raw[f"memory {tokens}"] = [planned, grown]
        rows.append({
            "N": str(tokens),
            "Q, K, V and out": format_bytes(4 * tokens * WIDTH * 4),
            "budget": format_bytes(budget),
            "planned peak": format_bytes(planned),
            "growth of anonymous memory": format_bytes(grown),
        })  # fmt: skip
    return rows


def predictions() -> list[dict[str, str]]:
    """What the planner says of sequences that nobody ran here."""
    costs = MachineCosts(flops=4e14, bandwidth=5e10, call=2e-5, merge=2e-12)
    rows = []
    for tokens in (10**6, 10**7, 10**8, 10**9):
        for budget in (2**30, 8 * 2**30):
            call_plan = make_plan(
                one_head(tokens, torch.bfloat16, True),
                PlanRequest(budget, placement=Placement(resident=False), costs=costs),
            )
            cut = "whole" if call_plan.schedule == "whole" else "{} x {}".format(*call_plan.tile)
            rows.append({
                "N": f"{tokens:.0e}",
                "budget": format_bytes(budget),
                "schedule": f"{call_plan.schedule}, {cut}",
                "peak": format_bytes(call_plan.peak_bytes),
                "moved": format_bytes(call_plan.cost.moved_bytes),
                "hours, predicted": f"{call_plan.cost.seconds / 3600:.3g}",
            })  # fmt: skip
    return rows


def main() -> None:
    """Measure, print and write the tables."""
    torch.set_num_threads(1)
    raw: dict[str, Any] = {}
    for name, title, notes, measure in (
        ("stream_attention", "Streamed attention against one call", NOTES, against_one_call),
        ("stream_schedules", "Ways to cut attention", SCHEDULES, schedules),
        ("stream_masks", "What masks, caps and biases cost", MASK_NOTES, masks),
        ("stream_memory", "Memory of streamed attention", MEMORY_NOTES, memory),
    ):
        raw = {}
        rows = measure(raw)
        report(name, title, notes, rows, raw=raw)
    report("stream_predictions", "Predicted, not measured", PREDICTED, predictions(), raw={})


NOTES = """
One head of 64 numbers, float32, one thread. The budget is a share of the bytes of query, key, value
and out together; all calls take turns, from 32,768 tokens on once. Ratios above 1 are slower than
one call of `F.scaled_dot_product_attention`. The last column is the planner's time, with the
machine's measured costs, over that measured.
"""

SCHEDULES = """
8 heads of 64 numbers, N = 8192, causal, float32, one thread. Bytes moved are those that a device
apart from the tensors would load and store, counted while it runs. `heads` needs a whole head at
once; where it is absent, the smallest budget that it can do is larger.
"""

MASK_NOTES = """
4 heads of 64 numbers, N = 2048, float32, one thread, a quarter of the bytes of query, key, value
and out as budget. Ratios below 1 are masks whose hidden pairs are not computed. Masks that are
tensors are read in full at each call to see whether they are intervals.
"""

MEMORY_NOTES = """
Memory-mapped float32 tensors of one head, causal, `schedule="rect"`, budget 1 MiB. Anonymous memory
includes the buffers of the kernel itself, which the plan does not count.
"""

PREDICTED = """
The planner's figures for one causal head of 64 numbers in bfloat16, with tensors in host memory, on
a device assumed to do 4e14 operations and to copy 5e10 bytes per second. Nothing here was run.
"""

if __name__ == "__main__":
    main()
