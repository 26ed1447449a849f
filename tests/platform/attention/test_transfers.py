"""Copies beside the computation: right numbers, whatever the moment at which they happen."""

from collections import deque

import pytest
import torch

from fulgurite.attention import units as units_module
from fulgurite.attention.cost_model import CostEstimate
from fulgurite.attention.kernels import AtenCpuFlash
from fulgurite.attention.masking import Visibility
from fulgurite.attention.planning import ExecutionPlan
from fulgurite.attention.spec import AttentionSpec
from fulgurite.attention.transfers import Prefetcher
from fulgurite.attention.units import AttentionInputs, gradient_units, units

CPU = torch.device("cpu")


class Queue:
    """Work that is put off until somebody waits for it, as late as a device may do it."""

    def __init__(self):
        self.work, self.count = deque(), 0

    def put(self, work):
        self.work.append(work)
        self.count += 1
        return Moment(self, self.count)

    def run(self, until):
        while self.count - len(self.work) < until:
            self.work.popleft()()


class Moment:
    def __init__(self, queue, number):
        self.queue, self.number = queue, number

    def synchronize(self):
        self.queue.run(self.number)


class LateLanes:
    """A device whose copies happen as late as they may."""

    def __init__(self):
        self.up, self.down, self.in_flight, self.most = Queue(), Queue(), 0, 0

    def pinned(self, size):
        return torch.full((size,), 255, dtype=torch.uint8)  # NaN in all floating types

    def upload(self, host):
        tensor = torch.full_like(host, torch.nan)
        mark = self.up.put(lambda: tensor.copy_(host))
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        return tensor, mark

    def download(self, tensor, host):
        return self.down.put(lambda: host.copy_(tensor))

    def use(self, tensors, mark):
        mark.synchronize()  # of the streams; here there is one that computes at once
        self.in_flight -= len(tensors)

    def mark(self):
        return Moment(self.up, 0)


@pytest.fixture
def lanes(monkeypatch):
    found = LateLanes()
    monkeypatch.setattr(
        units_module.Prefetcher,
        "between",
        classmethod(lambda cls, source, device: cls(device, found)),
    )
    return found


def example(schedule, **options):
    torch.manual_seed(0)
    tensors = [torch.randn(2, h, 100, 8, dtype=torch.float64) for h in (4, 2, 2)]
    visible = Visibility.of(100, 100, is_causal=True, **options)
    spec = AttentionSpec(2, 4, 2, 8, 8, torch.float64, (visible,), 0.3)
    tile, chunks = ((32, 16), 0) if schedule == "rect" else ((0, 0), 7)
    cost = CostEstimate(0, 0, 0, 0.0, 0.0)
    return AttentionInputs(*tensors), ExecutionPlan(spec, schedule, (1, 1), tile, chunks, cost)


@pytest.mark.parametrize("schedule", ["rect", "cqs"])
def test_results_do_not_depend_on_when_copies_happen(lanes, monkeypatch, schedule):
    inputs, plan = example(schedule)
    computed = [(u.number, u.at, u.out.clone(), u.lse.clone()) for u in units(inputs, plan)]
    assert lanes.up.count > 20
    assert lanes.down.count == 2 * len(computed)
    monkeypatch.undo()
    for got, wanted in zip(computed, units(inputs, plan), strict=True):
        assert got[:2] == wanted[:2]
        assert torch.equal(got[2], wanted.out)
        assert torch.equal(got[3], wanted.lse)


def test_gradients_do_not_depend_on_when_copies_happen(lanes, monkeypatch):
    inputs, plan = example("rect", window=40)
    query = inputs.query
    grad = torch.randn_like(query)
    out, lse = torch.zeros_like(query), torch.zeros(query.shape[:-1], dtype=query.dtype)
    for unit in units(inputs, plan):
        out[unit.at], lse[unit.at] = unit.out, unit.lse
    call = (grad, inputs, out, lse, plan)
    found = [(u.number, [g.clone() for g in u.grads]) for u in gradient_units(*call)]
    monkeypatch.undo()
    for (number, grads), wanted in zip(found, gradient_units(*call), strict=True):
        assert number == wanted.number
        for a, b in zip(grads, wanted.grads, strict=True):
            assert torch.equal(a, b)


def test_a_piece_waits_until_the_one_before_the_last_was_used():
    """Else copies would run ahead without end, and fill the device."""
    order = []

    class Lanes(LateLanes):
        def upload(self, host):
            order.append("copy")
            return super().upload(host)

        def mark(self):
            order.append("used")
            number = order.count("used")
            moment = Moment(Queue(), 0)
            moment.synchronize = lambda: order.append(f"waited for {number}")
            return moment

    pieces = ((i, [[torch.full((1, 1, 2, 3), float(i))]]) for i in range(5))
    for i, (tensor,) in Prefetcher(CPU, Lanes()).prefetch(pieces):
        assert torch.equal(tensor, torch.full((1, 1, 2, 3), float(i)))
    assert order == [
        "copy", "used", "copy", "used", "waited for 1", "copy", "used", "waited for 2", "copy",
        "used", "waited for 3", "copy", "used",
    ]  # fmt: skip


def test_units_that_are_left_go_on_in_smaller_tiles(monkeypatch):
    """No unit is given twice, none is missing, and done ones stay done."""
    inputs, plan = example("rect")
    expected = list(units(inputs, plan))
    original, calls = AtenCpuFlash.forward, []

    def limited(self, tile):
        calls.append(tile.query.shape[2])
        if len(calls) > 10 and tile.query.shape[2] > 16:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return original(self, tile)

    monkeypatch.setattr(AtenCpuFlash, "forward", limited)
    with pytest.warns(UserWarning, match="ran out of memory; going on with rect in tiles 1/2 as"):
        computed = list(units(inputs, plan, done={3}))
    assert [u.number for u in computed] == [u.number for u in expected if u.number != 3]
    for unit in computed:
        wanted = expected[unit.number]
        torch.testing.assert_close(unit.out, wanted.out, rtol=0, atol=1e-12)
        torch.testing.assert_close(unit.lse, wanted.lse, rtol=0, atol=1e-12)
    monkeypatch.setattr(AtenCpuFlash, "forward", raising("other"))
    with pytest.raises(RuntimeError, match="other"):
        list(units(inputs, plan))


def raising(message):
    def forward(*_, **__):
        raise RuntimeError(message)

    return forward
