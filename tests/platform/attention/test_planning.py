"""Plans for GPUs, made without one: their costs, their kernels' memory, what is free on them."""

import functools

import numpy as np
import pytest
import torch

from fulgurite.attention import backend, calibration, engine, plan, stream_attention
from fulgurite.attention.budget import parse_budget
from fulgurite.attention.checks import with_index
from fulgurite.attention.device_memory import device_memory
from fulgurite.attention.edges import CACHED_MASKS, edge_bias
from fulgurite.attention.execution_plan import UNHALVED, Halvings
from fulgurite.attention.kernel_buffers import TileSizes, buffer_bytes
from fulgurite.attention.kernel_choice import kernel_names, usual_kernel_names
from fulgurite.attention.kernels import TileKernelNames
from fulgurite.attention.machine_costs import GPU_COSTS, MachineCosts
from fulgurite.attention.planning import make_plan
from fulgurite.attention.request import Placement, PlanRequest
from fulgurite.attention.spec import AttentionSpec, MaskSpec
from fulgurite.attention.steps import column_steps, row_steps
from fulgurite.attention.tiles import Kind, tiles
from fulgurite.attention.visibility import EntryMasks, Visibility

BF16 = torch.bfloat16
GPU = {"costs": GPU_COSTS, "kernels": usual_kernel_names(True, BF16)}
FROM_HOST = Placement(resident=False, tiled=True, ahead=True)
MIB = 2**20


def spec_of(tokens, heads=1, kv_heads=1, size=64, dtype=BF16, mask=None, **masks):
    visible = Visibility.of(tokens, tokens, EntryMasks(**{"is_causal": True} | masks))
    return AttentionSpec(1, heads, kv_heads, size, size, dtype, (visible,), 0.1, mask=mask)


def count_calls(plan, halvings=UNHALVED):
    """Kernel calls that a plan makes, not those that it predicts."""
    spec = plan.spec
    rows, keys = (
        [torch.empty(1, heads, spec.queries, 1, device="meta")]
        for heads in (spec.heads, spec.kv_heads)
    )
    steps = [row_steps(rows, keys, plan, halvings=halvings)]
    if plan.passes == 2:
        steps.append(column_steps(rows, keys, plan, halvings=halvings))
    return sum(step.call is not None for kind in steps for step, _ in kind)


def largest_call(plan, halvings=UNHALVED):
    """Pairs of the largest kernel call of a plan, over all its heads."""
    spec = plan.spec
    rows = [torch.empty(1, spec.heads, spec.queries, 1, device="meta")]
    keys = [torch.empty(1, spec.kv_heads, spec.keys, 1, device="meta")]
    steps = (step for step, _ in row_steps(rows, keys, plan, halvings=halvings))
    sizes = (
        (step.group.heads.stop - step.group.heads.start)
        * (step.call.tile.queries[1] - step.call.tile.queries[0])
        * (step.call.tile.keys[1] - step.call.tile.keys[0])
        for step in steps
    )
    return max(sizes)


@pytest.mark.parametrize("causal", [True, False])
def test_a_million_tokens_on_a_gpu_are_few_calls(causal):
    spec = spec_of(2**20, is_causal=causal)
    budget = 4 * 2**20 * 64 * 2 // 8
    plan = make_plan(spec, PlanRequest(budget, **GPU))
    assert count_calls(plan) <= 300
    assert plan.peak_bytes <= budget
    overhead = count_calls(plan) * GPU_COSTS.call
    assert overhead < 0.02 * plan.cost.seconds
    # with the costs of a CPU's core, the same call was cut into many times as many
    slow = make_plan(spec, PlanRequest(budget, kernels=GPU["kernels"]))
    assert count_calls(slow) > 10 * count_calls(plan)


def test_two_gpus_plan_by_the_costs_of_a_gpu():
    spec = spec_of(131_072, 16, 4)
    plan = make_plan(spec, PlanRequest(8 * 2**30, backward=True, shard=(0, 2), **GPU))
    assert count_calls(plan) + count_calls(plan.gradient) <= 16


CASES = {
    "whole": (spec_of(2**17, 16, 4), {}),
    "rect": (spec_of(2**18), {"budget": 16 * MIB}),
    "full": (spec_of(2**18, is_causal=False), {"budget": 16 * MIB}),
    "heads": (spec_of(2**14, 16, 4, is_causal=False), {"schedule": "heads", "budget": 32 * MIB}),
    "host": (spec_of(2**16), {"budget": 4 * MIB, "placement": FROM_HOST}),
    "gradients": (spec_of(2**16), {"forward": False, "budget": 24 * MIB}),
    "two passes": (spec_of(2**16), {"forward": False, "passes": 2, "budget": 4 * MIB}),
}


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"heads"}))
def test_one_out_of_memory_at_most_doubles_the_calls(name):
    spec, options = CASES[name]
    plan = make_plan(spec, PlanRequest(**GPU, **options))
    calls, halvings = count_calls(plan), UNHALVED
    for _ in range(2):
        halvings = plan.smaller_tiles(halvings)
        more = count_calls(plan, halvings)
        assert calls < more <= 2 * calls + 4 * plan.task_count  # squares on the diagonal
        calls = more


@pytest.mark.parametrize("name", CASES)
def test_after_an_out_of_memory_tiles_really_are_smaller(name):
    """By the plan's own count, with its own setting."""
    spec, options = CASES[name]
    plan = make_plan(spec, PlanRequest(**GPU, **options))
    peak, halvings = plan.cost.peak_bytes, UNHALVED
    area = largest_call(plan)
    for _ in range(3):
        halvings = plan.smaller_tiles(halvings)
        assert plan.peak_of(halvings) < peak
        assert largest_call(plan, halvings) <= 0.6 * area
        peak, area = plan.peak_of(halvings), largest_call(plan, halvings)


def test_tiles_are_halved_until_they_are_small():
    plan = make_plan(spec_of(64), PlanRequest(schedule="rect", **GPU))
    halvings, steps = UNHALVED, []
    while (halvings := plan.smaller_tiles(halvings)) is not None:
        steps.append(halvings)
    assert steps[-1] == Halvings(0, 2, 2)
    assert len(steps) == 3


# --- what kernels allocate -----------------------------------------------------------------------


def test_buffers_of_the_flash_kernel_at_full_size():
    """Sums of the gradient of queries in float32, and gradients of keys for each query head."""
    tokens, flash = 2**20, TileKernelNames(("flash",), ("flash",))
    sizes = TileSizes(1, 16, 4, tokens, tokens, 64, 64, 2)
    held = buffer_bytes(flash, sizes, gradients=True)
    accumulators, expanded, copies = 16 * tokens * 64 * 4, 2 * 16 * tokens * 64 * 2, 2**32
    assert held == accumulators + expanded + copies + 3 * 16 * tokens * 4
    # an H100 has 132 multiprocessors: deterministic sums have a copy for each share of them
    strict = buffer_bytes(flash._replace(processors=132), sizes, gradients=True)
    assert strict - held == 8 * accumulators
    assert buffer_bytes(TileKernelNames(), sizes, gradients=True) == 0


@pytest.mark.parametrize("name", ["flash", "cudnn", "efficient"])
def test_grouped_heads_cost_copies_where_kernels_have_none(name):
    names = TileKernelNames((name,), (name,))
    grouped = TileSizes(2, 8, 2, 256, 512, 64, 64, 2)
    alone = grouped._replace(kv_heads=8)
    more = [
        buffer_bytes(names, grouped, gradients=gradients)
        - buffer_bytes(names, alone, gradients=gradients)
        for gradients in (False, True)
    ]
    expanded = 2 * 2 * 8 * 512 * 64 * 2
    assert more == ([0, expanded] if name == "flash" else [expanded, 2 * expanded])


def test_plans_hold_their_budget_with_what_kernels_allocate():
    spec = spec_of(2**20, 16, 4)
    plan = make_plan(spec, PlanRequest(8 * 2**30, backward=True, **GPU))
    gradient = plan.gradient
    batch, groups = gradient.head_step
    sizes = TileSizes(batch, 4 * groups, groups, *gradient.tile, 64, 64, 2)
    buffers = buffer_bytes(GPU["kernels"], sizes, gradients=True)
    assert buffers > 2**20
    assert gradient.cost.peak_bytes >= buffers
    assert plan.peak_bytes <= 8 * 2**30


@pytest.mark.parametrize("kernels", [("math", "math"), ("flash", "math")])
def test_scores_of_matrix_products_are_counted(kernels):
    """float64 on a GPU, a kernel that failed its comparison, or ``kernel="math"``."""
    names = TileKernelNames(*((name,) for name in kernels))
    mask = MaskSpec(False, False, True, True) if kernels[0] != "math" else None
    spec = spec_of(16_384, 8, 8, dtype=torch.float64 if mask is None else BF16, mask=mask)
    plan = make_plan(spec, PlanRequest(2**30, costs=GPU_COSTS, kernels=names))
    batch, heads = plan.head_step
    wide = 8 if mask is None else 4
    assert batch * heads * plan.tile[0] * plan.tile[1] * wide <= plan.cost.peak_bytes <= 2**30
    unlimited = make_plan(spec, PlanRequest(costs=GPU_COSTS, kernels=names))
    assert unlimited.cost.peak_bytes < 2**28  # not the 16 GiB of one call


def test_kernels_of_a_cpu_and_of_plans_for_any_machine():
    assert kernel_names(torch.device("cpu"), BF16, 64) == TileKernelNames()
    assert kernel_names(torch.device("cpu"), BF16, 64, prefer="math").full == ("math",)
    assert usual_kernel_names(True, torch.float64).full == ("math",)
    assert usual_kernel_names(True, torch.float32).masked == ("efficient",)
    assert usual_kernel_names(False, torch.float64) == TileKernelNames()
    out = stream_attention(*[torch.ones(1, 1, 8, 4)] * 3, kernel="math")
    assert torch.equal(out, torch.ones(1, 1, 8, 4))


# --- measuring -----------------------------------------------------------------------------------


def test_costs_of_a_gpu_are_told_apart():
    """Seconds of a device that obeys the model give the numbers of the model."""
    true = MachineCosts(
        3e14, 2e10, 2e-4, 1e-12, ((128, 60.0), (512, 20.0), (2048, 4.0), (16384, 1.0))
    )

    def timer(tokens, tile):
        calls = -(-tokens[0] // tile[0]) * -(-tokens[1] // tile[1])
        pairs = tile[0] * tile[1] * 4 * 64 / true.flops * true.slowdown(tile[0])
        if tile[1] <= 256:  # done before the host has started the next
            return calls * (true.call + max(0.0, pairs - true.call))
        return calls * (true.call + pairs)

    measured = calibration.estimate_gpu_costs(timer, 64, 2e10)
    assert measured.fills_with_heads
    for name in ("flops", "bandwidth", "call"):
        assert getattr(measured, name) == pytest.approx(getattr(true, name), rel=0.02)
    assert measured.merge * 16384 * 64 < 1e-5
    for (height, factor), (same, expected) in zip(
        measured.short_tiles, true.short_tiles, strict=True
    ):
        assert height == same
        assert factor == pytest.approx(expected, rel=0.02)


def test_many_heads_fill_a_gpu_as_many_queries_do():
    plans = [make_plan(spec_of(2048, heads, heads), PlanRequest(**GPU)) for heads in (1, 8)]
    one, eight = (plan.cost.seconds - plan.cost.calls * GPU_COSTS.call for plan in plans)
    assert eight < 4 * one


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reserved", "allocated", "rests", "fraction", "free"),
    [
        (0, 0, 0, 1.0, 10),
        (60, 20, 0, 1.0, 50),  # 40 are kept by PyTorch, and free for it
        (60, 20, 15, 1.0, 35),  # but for the rests of blocks in use
        (60, 20, 0, 0.5, 20),  # of 40 that this process may take
        (60, 45, 0, 0.5, 0),
    ],
)
def test_what_pytorch_keeps_of_a_gpu_is_free(
    monkeypatch, reserved, allocated, rests, fraction, free
):
    gib = 2**30
    for name, value in {
        "mem_get_info": (10 * gib, 80 * gib),
        "memory_reserved": reserved * gib,
        "memory_allocated": allocated * gib,
        "memory_stats": {"inactive_split_bytes.all.current": rests * gib},
        "get_per_process_memory_fraction": fraction,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert device_memory("cuda:0") == (free * gib, int(80 * fraction) * gib)
    expected = free * gib
    assert expected - expected // 8 <= parse_budget("auto", torch.device("cuda", 0)) <= expected


def test_an_automatic_budget_is_decided_once_for_each_shape(monkeypatch):
    free = [2**30, 2**20, 2**28]
    monkeypatch.setattr("fulgurite.attention.budget.device_memory", lambda device: (free[0], 2**31))
    plans = []
    streamed = backend.Streamed("auto")
    for tokens in (64, 64, 96, 64):
        rows = torch.ones(1, 1, tokens, 8)
        streamed(rows, rows, rows, is_causal=True)
        plans.append(streamed.plan)
        free.append(free.pop(0))
    assert [plan.budget for plan in plans] == [2**30, 2**30, 2**28, 2**30]
    stream_attention(rows, rows, rows, memory_budget="auto", on_plan=plans.append)
    assert plans[-1].budget == free[0]


def test_a_gpu_without_a_number_is_the_current_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert with_index(torch.device("cuda")) == torch.device("cuda", 3)
    assert with_index(torch.device("cuda", 1)) == torch.device("cuda", 1)


# --- masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "masks",
    [
        {"window": 40},
        {"window": (20, 9)},
        {"documents": [0, 30, 31, 70]},
        {"chunk": 25},
        {"is_causal": True, "prefix": 17, "window": 33},
    ],
)
def test_masks_made_on_a_device_are_those_of_the_host(masks):
    visible = Visibility.of(100, 100, EntryMasks(**masks))
    for rows, columns in [((0, 100), (0, 100)), ((13, 64), (5, 90)), ((60, 61), (58, 63))]:
        expected = visible.bias(rows, columns, BF16, torch.device("cpu"))
        made = edge_bias(visible.edge(rows, columns), BF16, torch.device("cpu"))
        assert torch.equal(made, expected)


@pytest.mark.parametrize("side", [64, 512])
def test_the_edge_of_a_window_needs_few_different_masks(side):
    visible = Visibility.of(2**16, 2**16, EntryMasks(is_causal=True, window=4096))
    edges, count = set(), 0
    for top in range(0, 2**16, 2**13):
        rows = top, top + 2**13
        for tile in tiles(rows, (0, 2**16), visible, side):
            if tile.kind is Kind.BIAS:
                count += 1
                edges.add(visible.edge(tile.queries, tile.keys))
    assert len(edges) <= 2 * CACHED_MASKS
    assert count >= 2**16 // side // 2


def test_larger_masked_tiles_cover_the_same_pairs():
    visible = Visibility.of(300, 300, EntryMasks(is_causal=True, window=77))
    for side in (8, 64, 1024):
        seen = np.zeros((300, 300), dtype=int)
        for tile in tiles((0, 300), (0, 300), visible, side):
            rows, columns = slice(*tile.queries), slice(*tile.keys)
            bias = visible.bias(tile.queries, tile.keys, torch.float32, torch.device("cpu"))
            seen[rows, columns] += (bias[0, 0] == 0).numpy()
        row, column = np.indices(seen.shape)
        assert np.array_equal(seen, (column <= row) & (column > row - 77))


def test_gpus_mask_larger_tiles_where_the_budget_allows_it():
    spec = spec_of(2**16, window=1000)
    sides = [
        make_plan(spec, PlanRequest(budget, **GPU)).masked_side
        for budget in (None, 2**26, 2**24, 2**20)
    ]
    assert sides == [2048, 1024, 512, 256]
    assert make_plan(spec, PlanRequest(2**26)).masked_side is None


def test_deterministic_algorithms_plan_by_fixed_costs(monkeypatch):
    """Measured times scatter: the next process would cut and round differently."""
    slow = MachineCosts(flops=1e8, call=1e-7)
    monkeypatch.setattr(engine, "measured_costs", lambda *_: slow)
    query = torch.zeros(1, 2, 256, 8)
    call = functools.partial(plan, query, query, query, memory_budget="64KiB")
    assert call().request.costs == slow
    torch.use_deterministic_algorithms(True)
    try:
        assert call().request.costs == MachineCosts()
    finally:
        torch.use_deterministic_algorithms(False)
