"""Chooses how attention is cut so that what it holds at once fits a budget.

Axes: B batch, H query heads, G key/value heads, M queries, N keys.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

from fulgurite.arithmetic import ceil_div
from fulgurite.attention.budget import format_bytes
from fulgurite.attention.cost_model import CostEstimate, Cut, estimate
from fulgurite.attention.execution_plan import SMALLEST_TILE, ExecutionPlan
from fulgurite.attention.quorums import perfect_sizes
from fulgurite.attention.request import PlanRequest
from fulgurite.attention.spec import AttentionSpec
from fulgurite.errors import ConfigError

__all__ = ["make_plan"]

_MOST_CHUNKS = 2500
# What tiles hold whose scores or biases lie in memory, where no budget says more [bytes].
_DENSE_BUDGET = 2**26


@functools.lru_cache(maxsize=512)  # a model asks for the same plan in every layer and step
def make_plan(spec: AttentionSpec, request: PlanRequest = PlanRequest()) -> ExecutionPlan:
    """Choose the fastest way that fits.

    Args:
        spec: What is computed.
        request: What is asked of the plan.

    Raises:
        ConfigError: Nothing fits, or the schedule does not do these sizes.

    Source: docs/papers/stream_cqsa.md section 1.9 (model of memory and time) and 7 (order of the
    choice).
    """
    if spec.is_empty:  # there is nothing to compute, by whatever schedule
        cut = Cut("whole", (max(1, spec.batch), max(1, spec.kv_heads)), (1, 1))
        return ExecutionPlan(spec, cut, request=request, reason="there are no pairs")
    plans: list[ExecutionPlan] = []
    smallest = 0
    directions = [True] * (request.backward or not request.forward) + [False] * request.forward
    for gradients in directions:
        plan, required = _choose(spec, request, gradients=gradients)
        smallest = max(smallest, required)
        if plan is not None:
            plans.append(plan)
    if len(plans) < len(directions):
        raise ConfigError(
            f"A memory budget of {format_bytes(request.budget or 0)} ({request.budget} bytes) is "
            f"too small for schedule={request.schedule!r}; the smallest that works is {smallest} "
            "bytes.",
            "Raise memory_budget.",
        )
    return plans[0] if len(plans) == 1 else replace(plans[1], gradient=plans[0])


def _choose(
    spec: AttentionSpec, request: PlanRequest, *, gradients: bool
) -> tuple[ExecutionPlan | None, int]:
    """The fastest way to compute the result, or the gradients, that fits; and the least budget.

    Raises:
        ConfigError: The schedule does not do these sizes.
    """
    is_dense = request.computes_scores(spec) or spec.has_bias
    limit = _DENSE_BUDGET if request.budget is None and is_dense else request.budget
    fits: list[tuple[Cut, CostEstimate]] = []
    smallest: tuple[Cut, CostEstimate] | None = None
    for cut in _candidates(spec, request, gradients=gradients):
        if gradients and request.passes not in (None, cut.passes):
            continue
        if _task_count(spec, cut) < request.ranks:
            continue  # a rank would have nothing to do
        cost = estimate(spec, cut, request)
        if smallest is None or cost.peak_bytes < smallest[1].peak_bytes:
            smallest = cut, cost
        if limit is None or cost.peak_bytes <= limit:
            fits.append((cut, cost))
            if cut.schedule == "whole" and not is_dense:
                break  # nothing is faster than one call
    if smallest is None:
        raise ConfigError(
            f"schedule={request.schedule!r} does not do {spec.queries} queries and {spec.keys} "
            f"keys on {request.ranks} rank(s).",
            'Use schedule="rect".',
        )
    if not fits and request.budget is None:
        fits = [smallest]
    if not fits:
        return None, smallest[1].peak_bytes
    best = min(fits, key=lambda way: (way[1].seconds, way[1].peak_bytes))
    near = [way for way in fits if way[1].seconds <= 1.005 * best[1].seconds]
    cut, cost = min(near, key=lambda way: way[1].peak_bytes)
    if best[0].schedule == "whole":
        cut, cost = best
    reason = "everything fits at once" if cut.schedule == "whole" else _compare_ways(fits)
    return ExecutionPlan(spec, cut, cost, request, reason), smallest[1].peak_bytes


def _compare_ways(fits: list[tuple[Cut, CostEstimate]]) -> str:
    """Why the way was taken: the fastest time of each schedule."""
    fastest: dict[str, float] = {}
    for cut, predicted in sorted(fits, key=lambda way: way[1].seconds, reverse=True):
        fastest[cut.schedule] = predicted.seconds
    times = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in fastest.items())
    return f"fastest of {len(fits)} ways that fit, or as fast and smaller ({times})"


def _task_count(spec: AttentionSpec, cut: Cut) -> int:
    return cut.chunks if cut.schedule == "cqs" else ceil_div(spec.queries, max(1, cut.tile[0]))


def _candidates(spec: AttentionSpec, request: PlanRequest, *, gradients: bool) -> Iterator[Cut]:
    """Ways to cut a call, the whole first."""
    queries, keys, schedule = spec.queries, spec.keys, request.schedule
    steps = [
        *((b, spec.kv_heads) for b in _halvings(spec.batch)),
        *((1, g) for g in _halvings(spec.kv_heads)[1:]),
    ]
    if schedule in ("auto", "whole"):
        yield Cut("whole", steps[0], (queries, keys), gradients=gradients)
    if schedule in ("auto", "heads"):
        for step in steps[1:] if schedule == "auto" else steps:
            yield Cut("heads", step, (queries, keys), gradients=gradients)
    if schedule in ("auto", "rect"):
        # keys that are read where they lie take no memory, however many
        placement = request.placement
        keys_cost = gradients or placement.packs or not placement.resident
        keys_cost = keys_cost or spec.has_bias or request.computes_scores(spec)
        sides = [] if keys_cost else [(min(side, queries), keys) for side in _sides(queries)]
        if keys_cost or not spec.is_simple:  # edges of masks take memory too
            sides += _tiles(queries, keys)
        tiles = list(dict.fromkeys(sides))
        for step in dict.fromkeys((steps[0], steps[-1])):
            for tile in tiles:
                for passes in (1, 2) if gradients else (1,):
                    yield Cut("rect", step, tile, passes=passes, gradients=gradients)
    if schedule in ("auto", "cqs") and queries == keys and keys > 1:
        for chunks in perfect_sizes(min(keys, _MOST_CHUNKS)) or [keys]:
            for step in dict.fromkeys((steps[0], steps[-1])):
                yield Cut("cqs", step, chunks=chunks, gradients=gradients)


def _halvings(number: int) -> list[int]:
    """The number and its halves, rounded up, down to 1."""
    numbers = [number]
    while numbers[-1] > 1:
        numbers.append(ceil_div(numbers[-1], 2))
    return numbers


def _tiles(queries: int, keys: int) -> Iterator[tuple[int, int]]:
    sides = _sides(max(queries, keys))
    for width in sides:
        for height in sides:
            if height >= width and (height <= queries or height == sides[0]):
                yield min(height, max(queries, 1)), min(width, max(keys, 1))


def _sides(stop: int) -> list[int]:
    """Sides of tiles: powers of two and what lies halfway between them."""
    sides = [SMALLEST_TILE]
    while sides[-1] * 2 <= stop:
        sides += [sides[-1] * 3 // 2, sides[-1] * 2]
    return sides
