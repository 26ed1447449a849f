"""Copies beside the computation: right numbers, whatever the moment at which they happen."""

from collections import deque

import pytest
import torch

from fulgurite.attention import units as units_module
from fulgurite.attention.cost_model import Cut
from fulgurite.attention.execution_plan import ExecutionPlan
from fulgurite.attention.inputs import AttentionInputs, GradientInputs
from fulgurite.attention.kernels import AtenCpuFlash
from fulgurite.attention.recovery import ran_out_of_memory
from fulgurite.attention.spec import AttentionSpec
from fulgurite.attention.transfers import CudaLanes, Prefetcher, head_copies
from fulgurite.attention.units import gradient_units, units
from fulgurite.attention.visibility import EntryMasks, Visibility

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

    def __init__(self, pins=False):
        self.up, self.down, self.in_flight, self.most = Queue(), Queue(), 0, 0
        self.pins, self.joined = pins, 0

    def pinned(self, size):
        return torch.full((size,), 255, dtype=torch.uint8)  # NaN in all floating types

    def is_pinned(self, tensor):
        return self.pins

    def upload(self, host):
        return self.send(torch.full_like(host, torch.nan), [host])

    def upload_joined(self, views, shape):
        self.joined += 1
        return self.send(torch.full(shape, torch.nan, dtype=views[0].dtype), views)

    def send(self, tensor, views):
        def copy():
            for target, source in head_copies(tensor, views):
                target.copy_(source)

        mark = self.up.put(copy)
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


@pytest.fixture(params=[False, True], ids=["pageable", "pinned"])
def lanes(request, monkeypatch):
    found = LateLanes(request.param)
    monkeypatch.setattr(
        units_module.Prefetcher,
        "between",
        classmethod(lambda cls, source, device: cls(device, found)),
    )
    return found


def example(schedule, **options):
    torch.manual_seed(0)
    tensors = [torch.randn(2, h, 100, 8, dtype=torch.float64) for h in (4, 2, 2)]
    visible = Visibility.of(100, 100, EntryMasks(is_causal=True, **options))
    spec = AttentionSpec(2, 4, 2, 8, 8, torch.float64, (visible,), 0.3)
    tile, chunks = ((32, 16), 0) if schedule == "rect" else ((0, 0), 7)
    return AttentionInputs(*tensors), ExecutionPlan(spec, Cut(schedule, (1, 1), tile, chunks))


@pytest.mark.parametrize("schedule", ["rect", "cqs"])
def test_results_do_not_depend_on_when_copies_happen(lanes, monkeypatch, schedule):
    inputs, plan = example(schedule)
    computed = [(u.number, u.at, u.out.clone(), u.lse.clone()) for u in units(inputs, plan)]
    assert lanes.up.count > 20
    assert bool(lanes.joined) is lanes.pins  # nothing is copied into another pinned tensor
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
    call = GradientInputs(inputs, grad, out, lse), plan
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
    with pytest.warns(UserWarning, match="ran out of memory; going on with rect, at once 1/2"):
        computed = list(units(inputs, plan, done={3}))
    assert [u.number for u in computed] == [u.number for u in expected if u.number != 3]
    for unit in computed:
        wanted = expected[unit.number]
        torch.testing.assert_close(unit.out, wanted.out, rtol=0, atol=1e-12)
        torch.testing.assert_close(unit.lse, wanted.lse, rtol=0, atol=1e-12)
    monkeypatch.setattr(AtenCpuFlash, "forward", raising("other"))
    with pytest.raises(RuntimeError, match="other"):
        list(units(inputs, plan))


def test_results_leave_the_device_in_their_own_type(lanes, monkeypatch):
    torch.manual_seed(0)
    tensors = [torch.randn(1, 2, 64, 8, dtype=torch.bfloat16) for _ in range(3)]
    visible = Visibility.of(64, 64, EntryMasks(is_causal=True))
    spec = AttentionSpec(1, 2, 2, 8, 8, torch.bfloat16, (visible,), 0.3)
    plan = ExecutionPlan(spec, Cut("rect", (1, 1), (32, 16)))
    kept = [u.out.clone() for u in units(AttentionInputs(*tensors), plan)]
    narrow = [
        u.out.clone() for u in units(AttentionInputs(*tensors), plan, narrow_to=torch.bfloat16)
    ]
    assert {x.dtype for x in kept} == {torch.float32}
    for wide, half in zip(kept, narrow, strict=True):
        assert torch.equal(wide.to(torch.bfloat16), half)


def test_memory_that_cannot_be_pinned_is_plain(monkeypatch):
    original = torch.empty

    def empty(*sizes, pin_memory=False, **options):
        if pin_memory:
            raise torch.AcceleratorError("CUDA error: out of memory", 2)
        return original(*sizes, **options)

    monkeypatch.setattr(torch, "empty", empty)
    lanes = CudaLanes.__new__(CudaLanes)  # its streams need a GPU
    lanes.device = torch.device("cuda", 0)
    with pytest.warns(UserWarning, match="64 bytes of host memory cannot be pinned"):
        assert lanes.pinned(64).shape == (64,)


@pytest.mark.parametrize("message", ["CUDA error: out of memory", "DefaultCPUAllocator: no"])
def test_errors_that_mean_too_little_memory(message):
    assert ran_out_of_memory(RuntimeError(message))
    assert not ran_out_of_memory(RuntimeError("CUDA error: an illegal memory access"))


def raising(message):
    def forward(*_, **__):
        raise RuntimeError(message)

    return forward
