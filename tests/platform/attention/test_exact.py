"""Every schedule is attention: values, gradients, and which pairs are computed."""

import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fulgurite.attention import plan, stream, stream_attention
from fulgurite.attention import tiles as tiles_module
from fulgurite.attention.cost_model import Cut
from fulgurite.attention.execution_plan import ExecutionPlan
from fulgurite.attention.kernels import AtenCpuFlash, MathKernel, TileInputs
from fulgurite.attention.merging import merge_
from fulgurite.attention.planning import make_plan
from fulgurite.attention.request import PlanRequest
from fulgurite.attention.schedules import cqs_tasks, rect_tasks, recursive_tasks
from fulgurite.attention.spec import AttentionSpec
from fulgurite.attention.stream import StreamCall, StreamedAttention
from fulgurite.attention.tiles import Kind, tiles
from fulgurite.attention.visibility import EntryMasks, Visibility
from fulgurite.errors import ConfigError, DataError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def narrow_bias(monkeypatch):
    """Masked tiles as narrow as the sequences of tests want them."""
    monkeypatch.setattr(tiles_module, "MASKED_SIDE", 8)


def reference(query, key, value, visible, scale):
    """Dense attention and log-sum-exp; query may have more heads."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    whole = (0, visible.queries), (0, visible.keys)
    scores = query @ key.mT * scale + visible.bias(*whole, query.dtype, CPU)
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


def spec_of(batch, heads, kv_heads, size, dtype, visible, scale=1.0):
    return AttentionSpec(batch, heads, kv_heads, size, size, dtype, (visible,), scale)


def fixed_plan(spec, schedule, tile=(0, 0), chunks=0, depth=1, step=None):
    step = step or (spec.batch, spec.kv_heads)
    return ExecutionPlan(spec, Cut(schedule, step, tile, chunks, depth))


def run(plan, *tensors):
    """Out and log-sum-exp of query, key and value."""
    return StreamedAttention.apply(StreamCall(plan), *tensors, None, None)


@st.composite
def visibilities(draw):
    tokens = draw(st.integers(1, 60))
    options = {"is_causal": draw(st.booleans())}
    if draw(st.booleans()):
        options["window"] = draw(st.integers(1, tokens + 3))
    if options["is_causal"] and draw(st.booleans()):
        options["prefix"] = draw(st.integers(0, tokens))
    if draw(st.booleans()):
        starts = draw(st.sets(st.integers(0, tokens - 1), max_size=3))
        options["documents"] = tuple(sorted({0, *starts}))
    return Visibility.of(tokens, tokens, EntryMasks(**options))


def count(found, visible):
    """How often each pair is computed by tiles."""
    counts = torch.zeros(visible.queries, visible.keys, dtype=torch.int)
    for tile in found:
        part = torch.ones(tile.queries[1] - tile.queries[0], tile.keys[1] - tile.keys[0]).int()
        if tile.kind is Kind.CAUSAL:
            part = part.tril()
        elif tile.kind is Kind.BIAS:
            part = (visible.bias(tile.queries, tile.keys, torch.float32, CPU)[0, 0] == 0).int()
        counts[slice(*tile.queries), slice(*tile.keys)] += part
    return counts


@settings(deadline=None, max_examples=60)
@given(visibilities(), st.data())
def test_schedules_compute_each_visible_pair_once(visible, data):
    whole = (0, visible.queries), (0, visible.keys)
    seen = (visible.bias(*whole, torch.float32, CPU)[0, 0] == 0).int()
    assert int(seen.sum()) == visible.pairs()
    side = st.integers(1, visible.queries)
    kind = data.draw(st.sampled_from(["rect", "cqs", "recursive"]))
    if kind == "rect":
        tasks = rect_tasks(visible, data.draw(side), data.draw(side))
    elif kind == "cqs":
        tasks = cqs_tasks(visible, data.draw(st.sampled_from([3, 7, 8, 10, 13, 43])))
    else:
        depth = data.draw(st.integers(1, 3))
        tasks = recursive_tasks(visible, data.draw(st.sampled_from([3, 4])), depth)
    found = [
        tile
        for task in tasks
        for row in task.rows
        for keys in row.keys
        for tile in tiles(row.queries, keys, visible)
    ]
    assert torch.equal(count(found, visible), seen)


def random_case(number):
    rng = random.Random(number)
    tokens, kv_heads = rng.randint(1, 200), rng.choice([1, 2])
    sizes = rng.choice([1, 2]), kv_heads * rng.choice([1, 2, 4]), kv_heads, 16, torch.float64
    options = {"is_causal": rng.random() < 0.6}
    if rng.random() < 0.25:
        options["window"] = rng.randint(1, tokens + 3)
    if options["is_causal"] and rng.random() < 0.25:
        options["prefix"] = rng.randint(0, tokens)
    if rng.random() < 0.25:
        starts = rng.sample(range(tokens), rng.randint(0, min(3, tokens - 1)))
        options["documents"] = tuple(sorted({0, *starts}))
    visible = Visibility.of(tokens, tokens, EntryMasks(**options))
    spec = spec_of(*sizes, visible, rng.choice([0.3, 3.0]) / 4)
    kind = number % 4
    if kind == 0:
        return fixed_plan(spec, "rect", (rng.choice([16, 33, 64]), 16))
    if kind == 1:
        return fixed_plan(spec, "cqs", chunks=rng.choice([3, 7, 8, 13, 21, 31, 43]))
    if kind == 2:
        return fixed_plan(spec, "cqs", chunks=3, depth=rng.choice([2, 3]))
    return fixed_plan(spec, "heads", (tokens, tokens), step=(1, 1))


@pytest.mark.parametrize("number", range(60))
def test_float64_is_exact_forward_and_backward(number):
    chosen = random_case(number)
    shape, tokens = chosen.spec, chosen.spec.queries
    generator = torch.Generator().manual_seed(number)
    make = {"generator": generator, "dtype": torch.float64, "requires_grad": True}
    query = torch.randn(shape.batch, shape.heads, tokens, 16, **make)
    key, value = (torch.randn(shape.batch, shape.kv_heads, tokens, 16, **make) for _ in "kv")
    out, lse = run(chosen, query, key, value)
    expected, expected_lse = reference(query, key, value, shape.visible[0], shape.scale)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-12)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    mine = torch.autograd.grad(out, (query, key, value), grad)
    theirs = torch.autograd.grad(expected, (query, key, value), grad)
    for a, b in zip(mine, theirs, strict=True):
        assert (a - b).norm() <= 1e-12 * max(1.0, float(b.norm()))


@pytest.mark.parametrize(
    ("schedule", "chunks"),
    [("rect", 0), *(pytest.param("cqs", n, marks=pytest.mark.slow) for n in (7, 10))],
)
def test_gradcheck(schedule, chunks):
    visible = Visibility.of(17, 17, EntryMasks(is_causal=True, window=9))
    spec = spec_of(1, 2, 1, 2, torch.float64, visible, 0.5)
    chosen = fixed_plan(spec, schedule, (8, 4), chunks)
    make = {"dtype": torch.float64, "requires_grad": True}
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, 17, 2, **make) for heads in (2, 1, 1)]
    assert torch.autograd.gradcheck(lambda *x: run(chosen, *x)[0], inputs, nondet_tol=0)


# tolerances: docs/papers/stream_cqsa.md section 6.1
LIMITS = {
    torch.float32: (1e-6, 1e-6),
    torch.bfloat16: (4e-3, 6e-3),
    torch.float16: (5e-4, 7e-4),
}


@pytest.mark.parametrize(
    ("schedule", "dtype"),
    [
        ("rect", torch.bfloat16),
        ("cqs", torch.float16),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in itertools.product(("rect", "cqs"), LIMITS)
            if case not in (("rect", torch.bfloat16), ("cqs", torch.float16))
        ),
    ],
)
def test_lower_precisions_are_as_good_as_one_call(dtype, schedule):
    generator = torch.Generator().manual_seed(0)
    exact = [
        torch.randn(1, 2, 1024, 64, generator=generator, dtype=torch.float64) for _ in range(4)
    ]
    exact[:3] = [x.to(dtype).double().requires_grad_() for x in exact[:3]]
    expected = F.scaled_dot_product_attention(*exact[:3], is_causal=True)
    grads = torch.autograd.grad(expected, exact[:3], exact[3])

    def errors(function):
        inputs = [x.detach().to(dtype).requires_grad_() for x in exact[:3]]
        out = function(*inputs)
        found = torch.autograd.grad(out, inputs, exact[3].to(dtype))
        error = [float(((out - expected).norm() / expected.norm()).detach())]
        return error + [float((a - b).norm() / b.norm()) for a, b in zip(found, grads, strict=True)]

    # cqs sums results of half types in float32 beside them, which counts
    budget = "256KiB" if schedule == "rect" else "3MiB"
    mine = errors(
        lambda *x: stream_attention(*x, is_causal=True, memory_budget=budget, schedule=schedule)
    )
    theirs = errors(lambda *x: F.scaled_dot_product_attention(*x, is_causal=True))
    assert mine[0] <= LIMITS[dtype][0]
    assert max(mine[1:]) <= LIMITS[dtype][1]
    assert all(a <= 2 * b for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("schedule", "budget"), [("rect", "64KiB"), ("cqs", "64KiB")])
def test_zero_keys_count_the_keys(schedule, budget, causal):
    """With K = 0, exp(lse) is the number of keys of a row: a missing block would show."""
    query = torch.randn(1, 1, 500, 16, dtype=torch.float64)
    _, lse = stream_attention(
        query, torch.zeros_like(query), query, is_causal=causal, memory_budget=budget,
        schedule=schedule, return_lse=True,
    )  # fmt: skip
    expected = torch.arange(1, 501).double() if causal else torch.full((500,), 500.0).double()
    torch.testing.assert_close(lse.exp()[0, 0], expected, rtol=1e-12, atol=0)


class Auditor(TorchDispatchMode):
    """Counts the pairs of every attention kernel and its longest key range."""

    def __init__(self):
        super().__init__()
        self.pairs = self.largest = self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "flash_attention_for_cpu" in str(func) and "backward" not in str(func):
            rows, keys = args[0].shape[-2], args[1].shape[-2]
            causal = len(args) > 4 and args[4]
            self.pairs += rows * (rows + 1) // 2 if causal else rows * keys
            self.largest = max(self.largest, rows * keys)
            self.calls += 1
        assert "_attention_math" not in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("schedule", ["rect", "cqs"])
def test_no_pair_is_computed_twice_and_no_call_is_whole(schedule, causal):
    tokens = 1024
    query = torch.randn(1, 1, tokens, 16)
    budget = "16KiB" if schedule == "rect" else "96KiB"
    options = {"is_causal": causal, "memory_budget": budget, "schedule": schedule}
    stream_attention(query, query, query, **options)  # measures the machine
    with Auditor() as audit:
        stream_attention(query, query, query, **options)
    assert audit.pairs == (tokens * (tokens + 1) // 2 if causal else tokens * tokens)
    assert audit.largest < tokens * tokens // 4
    assert audit.calls > 4


@pytest.mark.parametrize("chunks", [7, 10, 13, 43])
def test_a_task_reads_only_its_quorum(chunks):
    """All chunks that a task does not load are NaN; merged results are exact all the same."""
    tokens = 100
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 1, tokens, 8, dtype=torch.float64) for _ in range(3))
    visible = Visibility.of(tokens, tokens)
    spec = spec_of(1, 1, 1, 8, torch.float64, visible, 0.3)
    out = torch.zeros_like(query)
    lse = torch.full((1, 1, tokens), -math.inf, dtype=torch.float64)
    for task in cqs_tasks(visible, chunks):
        inside = torch.zeros(tokens, dtype=torch.bool)
        for tokens_range in task.loads:
            inside[slice(*tokens_range)] = True
        poisoned = [x.masked_fill(~inside[:, None], math.nan) for x in (query, key, value)]

        class One(ExecutionPlan):
            def tasks(self, visible, task=task):
                return [task]

        chosen = One(**fixed_plan(spec, "cqs", chunks=chunks).__dict__)
        part, part_lse = run(chosen, *poisoned)
        assert part.isfinite().all()
        merge_(out, lse, part, part_lse)
    expected, expected_lse = reference(query, key, value, visible, 0.3)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", ["rect", "cqs"])
def test_large_scores_do_not_overflow(schedule):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 1, 512, 64, generator=generator) * 6 for _ in range(3))
    out, lse = stream_attention(
        query, key, value, memory_budget="200KiB", schedule=schedule, return_lse=True
    )
    assert lse.max() > 100
    everything = Visibility.of(512, 512)
    exact = reference(query.double(), key.double(), value.double(), everything, 1 / 8)[0]
    assert (out - exact).norm() / exact.norm() <= 1e-4


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_fewer_tokens_than_chunks(tokens):
    query = torch.randn(1, 1, tokens, 8, dtype=torch.float64)
    visible = Visibility.of(tokens, tokens, EntryMasks(is_causal=True))
    chosen = fixed_plan(spec_of(1, 1, 1, 8, torch.float64, visible), "cqs", chunks=13)
    out, _ = run(chosen, query, query, query)
    torch.testing.assert_close(out, reference(query, query, query, visible, 1.0)[0])


def test_merging_in_any_order_and_rows_without_keys():
    torch.manual_seed(0)
    parts = [(torch.randn(5, 4).double(), torch.randn(5).double() * 50) for _ in range(4)]
    parts[1][1][2] = parts[2][1][2] = -math.inf
    results = []
    for order in itertools.permutations(range(4)):
        out, lse = torch.zeros(5, 4).double(), torch.full((5,), -math.inf).double()
        for k in order:
            merge_(out, lse, *parts[k])
        results.append((out, lse))
    weights = torch.stack([lse for _, lse in parts]).softmax(0)
    expected = sum(w[:, None] * o for w, (o, _) in zip(weights, parts, strict=True))
    for out, lse in results:
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(lse, torch.stack([x for _, x in parts]).logsumexp(0))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_both_kernels_agree(dtype, is_causal):
    torch.manual_seed(0)
    query, grad = (torch.randn(2, 4, 20, 8, dtype=dtype) for _ in range(2))
    key, value = (torch.randn(2, 2, 20, 8, dtype=dtype) for _ in range(2))
    bias = torch.zeros(1, 1, 20, 20, dtype=dtype)
    bias[..., 3, :] = bias[..., 5, 4:] = -math.inf
    tolerance = {"rtol": 0, "atol": {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 5e-2)}
    for mask in (None,) if is_causal else (None, bias):
        tile = TileInputs(query, key, value, 0.4, is_causal, mask)
        (out, lse), (out2, lse2) = (k.forward(tile) for k in (AtenCpuFlash(), MathKernel()))
        torch.testing.assert_close(out, out2, **tolerance)
        torch.testing.assert_close(lse, lse2, **tolerance)
        safe = lse.masked_fill(lse == -math.inf, math.inf)
        first, second = (k.backward(tile, grad, out, safe) for k in (AtenCpuFlash(), MathKernel()))
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(a, b, **tolerance)


def test_it_is_called_like_pytorchs():
    torch.manual_seed(0)
    for lead in ((), (2,), (3, 2, 2)):
        query, key, value = (torch.randn(*lead, 40, 16, dtype=torch.float64) for _ in range(3))
        out = stream_attention(query, key, value, None, 0.0, True, 0.2, memory_budget="32KiB")
        expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.2)
        torch.testing.assert_close(out, expected)
    query, key = torch.randn(2, 4, 40, 16), torch.randn(2, 2, 30, 16)
    out = stream_attention(query, key, key, enable_gqa=True, memory_budget="40KiB")
    expected = F.scaled_dot_product_attention(query, key, key, enable_gqa=True)
    torch.testing.assert_close(out, expected)
    assert stream_attention(query[:, :, :0], key, key, enable_gqa=True).shape == (2, 4, 0, 16)


def test_autocast_is_followed():
    query = torch.randn(1, 2, 64, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = stream_attention(query, query, query)
        assert out.dtype == F.scaled_dot_product_attention(query, query, query).dtype


def test_padding_is_not_seen():
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, 2, 30, 8, dtype=torch.float64) for _ in range(3))
    inputs = [x.requires_grad_() for x in (query, key, value)]
    lengths = [30, 7, 0]
    out, lse = stream_attention(
        *inputs, is_causal=True, lengths=lengths, memory_budget="24KiB", return_lse=True
    )
    for b, length in enumerate(lengths):
        own = (x[b : b + 1, :, :length] for x in inputs)
        if length:
            expected = F.scaled_dot_product_attention(*own, is_causal=True)
            torch.testing.assert_close(out[b : b + 1, :, :length], expected)
        assert not out[b, :, length:].any()
        assert (lse[b, :, length:] == -math.inf).all()
    grads = torch.autograd.grad(out.sum(), inputs)
    assert all(not g[1, :, 7:].any() and not g[2].any() for g in grads)
    with pytest.raises(DataError, match="Length 31 of batch entry 0"):
        stream_attention(*inputs, lengths=[31, 1, 1])
    with pytest.raises(DataError, match="2 lengths"):
        stream_attention(*inputs, lengths=[3, 1])


def test_what_is_not_finite_is_named():
    query = torch.randn(2, 3, 20, 8)
    key = query.clone()
    key[1, 2, 13, 0] = math.inf
    with pytest.raises(DataError, match=r"key is not finite at token 13 of .* \(1, 2\)"):
        stream_attention(query, key, query, check_finite=True)


def test_a_device_out_of_memory_gets_smaller_tiles(monkeypatch):
    """A kernel that fails as CUDA's allocator would, in forward and in backward."""
    torch.manual_seed(0)
    inputs = [torch.randn(1, 2, 200, 8, dtype=torch.float64).requires_grad_() for _ in range(3)]
    expected = F.scaled_dot_product_attention(*inputs, is_causal=True)
    largest = {"forward": 100, "backward": 40}
    for name in largest:
        original = getattr(AtenCpuFlash, name)

        def limited(self, tile, *tensors, name=name, original=original):
            if tile.value.shape[2] > largest[name]:
                raise torch.OutOfMemoryError
            return original(self, tile, *tensors)

        monkeypatch.setattr(AtenCpuFlash, name, limited)
    going_on = "ran out of memory; going on with whole, at once 1/2 of the"
    with pytest.warns(UserWarning, match=going_on):
        out = stream_attention(*inputs, is_causal=True)
    with pytest.warns(UserWarning, match=going_on):
        grads = torch.autograd.grad(out.sum(), inputs)
    torch.testing.assert_close(out, expected)
    for a, b in zip(grads, torch.autograd.grad(expected.sum(), inputs), strict=True):
        torch.testing.assert_close(a, b)
    largest["forward"] = 0
    with pytest.warns(UserWarning, match=going_on), pytest.raises(torch.OutOfMemoryError):
        stream_attention(*inputs, is_causal=True)


@pytest.mark.parametrize(
    "schedule",
    [
        "auto",
        pytest.param("heads", marks=pytest.mark.slow),
        pytest.param("rect", marks=pytest.mark.slow),
        "cqs",
    ],
)
@pytest.mark.parametrize("backward", [False, True])
def test_plans_fit_their_budget(schedule, backward):
    visible = Visibility.of(8192, 8192, EntryMasks(is_causal=True))
    spec = spec_of(2, 8, 2, 64, torch.float32, visible)
    for budget in (2**27, 2**25, 2**23):
        try:
            chosen = make_plan(spec, PlanRequest(budget, schedule, backward=backward))
        except ConfigError:
            assert schedule == "heads"
            continue
        assert chosen.peak_bytes <= budget
        assert schedule in (chosen.schedule, "auto")
    assert make_plan(spec).schedule == "whole"


def test_a_plan_explains_itself():
    query = torch.empty(1, 8, 2**20, 64, device="meta", dtype=torch.bfloat16)
    key = torch.empty(1, 2, 2**20, 64, device="meta", dtype=torch.bfloat16)
    text = plan(query, key, is_causal=True, enable_gqa=True, memory_budget="64MiB").explain()
    for part in (
        "1048576 queries",
        "8 heads (2 key/value)",
        "bfloat16",
        "64 MiB",
        "rect",
        "peak",
        "tasks",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_budget": 0}, "0 cannot be read"),
        ({"memory_budget": -5}, "-5 cannot be read"),
        ({"memory_budget": "much"}, "'much' cannot be read"),
        ({"memory_budget": 100}, r"too small .* smallest that works is \d+ bytes"),
        ({"schedule": "rectangle"}, "no schedule 'rectangle' here. Use one of auto, whole"),
        ({"kernel": "cuddn"}, "no attention kernel 'cuddn'"),
        ({"device": "cuda"}, "no device cuda. Give device="),
        ({"device": "gpu"}, "device='gpu' names no device"),
        ({"softcap": 0.0}, "softcap=0.0 caps nothing"),
        ({"scale": math.inf}, "scale=inf gives no scores"),
        ({"query_offset": "left"}, "query_offset='left' is no position"),
        ({"chunk": 0}, "chunk of 0"),
        ({"starts": [1]}, "starts says where"),
        ({"dropout_p": 0.1}, "no dropout"),
        ({"window": 0}, "window of 0"),
        ({"prefix": 3}, "prefix of 3"),
        ({"documents": [1, 4]}, "ascend from 0"),
    ],
)
def test_bad_options_are_one_clear_error(options, message):
    query = torch.randn(1, 1, 8, 8)
    with pytest.raises(ConfigError, match=message):
        stream_attention(query, query, query, **options)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (torch.randn(1, 1, 8, 8).half(), torch.randn(1, 1, 8, 8), "dtypes differ"),
        (torch.randn(1, 1, 8, 8, device="meta"), torch.randn(1, 1, 8, 8), "devices differ"),
        (torch.randn(1, 1, 8, 8), torch.randn(1, 1, 9, 8), "value is"),
        (torch.randn(3, 1, 8, 8), torch.randn(2, 1, 8, 8), "one batch"),
        (torch.randn(8), torch.randn(8), "too few axes"),
        (torch.randn(1, 4, 8, 8), torch.randn(1, 2, 8, 8), "key has 4 heads and value has 2"),
        (torch.randn(1, 1, 8, 8).numpy(), torch.randn(1, 1, 8, 8), "key is of type ndarray"),
        (torch.randn(1, 1, 8, 4), torch.randn(1, 1, 8, 4), "head size"),
        (torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8), "key/value heads"),
    ],
)
def test_tensors_that_do_not_fit_are_one_clear_error(key, value, message):
    with pytest.raises(DataError, match=message):
        stream_attention(torch.randn(1, 2, 8, 8), key, value)


class LiveBytes(TorchDispatchMode):
    """Most bytes of tensors alive at once, of those made meanwhile."""

    def __init__(self, *known):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata in self.known:
                    continue
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return found


@pytest.mark.parametrize(
    ("schedule", "budget", "dtype", "passes", "window"),
    [
        pytest.param("rect", 2**17, torch.float32, 1, None, marks=pytest.mark.slow),
        ("rect", 2**17, torch.float32, 1, 100),
        ("rect", 2**17, torch.bfloat16, 2, None),
        pytest.param("rect", 2**20, torch.bfloat16, 1, None, marks=pytest.mark.slow),
        pytest.param("heads", 2**21, torch.float32, 1, None, marks=pytest.mark.slow),
        ("cqs", 2**18, torch.float32, 1, None),
        pytest.param("cqs", 2**21, torch.bfloat16, 1, None, marks=pytest.mark.slow),
    ],
)
def test_tensors_alive_at_once_fit_the_budget(schedule, budget, dtype, passes, window):
    """Inputs, result and gradients are not counted; all else is, forward and backward."""
    shape = (1, 4, 1024, 32)
    inputs = [torch.randn(shape).to(dtype).requires_grad_() for _ in range(3)]
    grad, plans = torch.randn(shape).to(dtype), []
    call = {"memory_budget": budget, "schedule": schedule, "on_plan": plans.append}
    call |= {"is_causal": True, "window": window}
    stream_attention(*inputs, **call)  # measures the machine
    with LiveBytes(*inputs) as forward:
        out, lse = stream_attention(*inputs, **call, return_lse=True)
    with LiveBytes(*inputs, grad, out, lse) as backward:
        grads = torch.autograd.grad(out, inputs, grad)
    (chosen,) = set(plans)
    assert chosen.gradient.passes == passes
    assert forward.peak - out.nbytes - lse.nbytes <= chosen.peak_bytes <= budget
    assert backward.peak - sum(x.nbytes for x in grads) <= chosen.peak_bytes


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "kind",
    [
        *("softcap", "learned bias", "holes", "padding"),
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in ("bias of heads", "slopes", "sinks", "values", "strides", "few documents")
        ),
    ],
)
def test_tensors_of_masks_and_caps_fit_the_budget_too(kind, dtype):
    """What is cut from the user's own mask counts; the mask and its gradient do not."""
    torch.manual_seed(0)
    shape, budget, options = (2, 4, 512, 32), 2**19, {"is_causal": True}
    inputs = [torch.randn(shape).to(dtype).requires_grad_() for _ in range(3)]
    if kind == "softcap":
        options["softcap"] = 2.0
    elif kind == "learned bias":
        options["attn_mask"] = torch.randn(1, 1, 512, 512).to(dtype).requires_grad_()
    elif kind == "bias of heads":
        options["attn_mask"] = torch.randn(1, 4, 512, 512).to(dtype).requires_grad_()
    elif kind == "holes":
        options["attn_mask"] = torch.rand(2, 1, 512, 512) < 0.5
    elif kind == "slopes":
        options["alibi_slopes"] = torch.rand(4)
    elif kind == "sinks":
        options["sinks"] = torch.randn(4).requires_grad_()
    elif kind == "values":
        inputs[2] = torch.randn(2, 4, 512, 20).to(dtype).requires_grad_()
    elif kind == "strides":
        inputs[1] = torch.randn(2, 4, 32, 512).to(dtype).mT.requires_grad_()
    elif kind == "padding":
        options |= {"lengths": [400, 77], "starts": [112, 400]}
    else:
        options["documents"] = [0, 5, 130, 131, 132, 133, 300]
    extras = [x for x in options.values() if isinstance(x, torch.Tensor)]
    wanted = inputs + [x for x in extras if x.requires_grad]
    plans = []
    call = options | {"memory_budget": budget, "schedule": "rect", "on_plan": plans.append}
    stream_attention(*inputs, **call)  # measures the machine
    with LiveBytes(*inputs, *extras) as forward:
        out, lse = stream_attention(*inputs, **call, return_lse=True)
    grad = torch.randn(out.shape).to(dtype)
    with LiveBytes(*inputs, *extras, grad, out, lse) as backward:
        grads = torch.autograd.grad(out, wanted, grad)
    chosen = plans[-1]
    assert chosen.peak_bytes <= budget
    assert forward.peak - out.nbytes - lse.nbytes <= chosen.peak_bytes
    results = sum(x.nbytes for x in grads)
    assert backward.peak - results <= (budget if "bias" in kind else chosen.peak_bytes)


def test_a_long_call_shows_how_far_it_is(monkeypatch, capsys):
    query = torch.randn(1, 2, 512, 16, requires_grad=True)
    call = {"is_causal": True, "memory_budget": "64KiB", "schedule": "rect"}
    stream_attention(query, query, query, **call).sum().backward()
    assert not capsys.readouterr().err
    monkeypatch.setattr(stream, "LONG", -1.0)
    stream_attention(query, query, query, **call).sum().backward()
    shown = capsys.readouterr().err
    assert shown.count("attention (rect): ") >= 2
    assert " rows" in shown
