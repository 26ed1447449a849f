"""Whatever PyTorch's attention accepts is answered equally, or refused by name.

Random calls, with strides, aliases, broadcast axes, types, masks and biases among what is drawn,
are compared with dense attention in float64: PyTorch's own where it has the mask, a formula where
it has none.
"""

import math
import os
import re
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from fulgurite.attention import stream_attention
from fulgurite.errors import ConfigError

# 10,000 have been run: FULGURITE_CALLS=10000 pytest tests/platform/attention/test_contract.py
CALLS, FEW = int(os.environ.get("FULGURITE_CALLS", "200")), 50
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 5e-3}
LAYOUTS = ("contiguous", "transposed", "sliced", "expanded", "channels", "reversed batch")


def lay_out(tensor, layout):
    """The same numbers with other strides."""
    if layout == "transposed":
        return tensor.mT.contiguous().mT
    if layout == "channels" and tensor.ndim >= 3:  # heads last in memory, as projections give them
        return tensor.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "sliced":
        wide = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1] + 3, dtype=tensor.dtype)
        wide[..., 1 : 2 * tensor.shape[-1] + 1 : 2] = tensor
        return wide[..., 1 : 2 * tensor.shape[-1] + 1 : 2]
    if layout == "expanded" and tensor.shape[-2]:
        return tensor[..., :1, :].expand(tensor.shape)
    if layout == "reversed batch" and tensor.ndim == 4:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    return tensor


@st.composite
def sdpa_calls(draw):
    """Arguments of a call that F.scaled_dot_product_attention accepts."""
    dtype = draw(st.sampled_from([torch.float64, torch.float64, torch.float32, torch.bfloat16]))
    queries, keys = draw(st.integers(0, 40)), draw(st.integers(0, 40))
    size, value_size = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    if draw(st.booleans()):
        keys, value_size = queries, size
    axes = draw(st.integers(2, 5))
    lead = [draw(st.integers(1, 3)) for _ in range(max(0, axes - 3))]
    heads = kv_heads = draw(st.integers(1, 4))
    options = {"is_causal": draw(st.booleans())}
    if draw(st.booleans()) and axes > 3:
        options["enable_gqa"] = True
        heads = kv_heads * draw(st.integers(1, 3))
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from([0.5, 1.0, 3.0, 0.0, -0.7]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))

    def tensor(heads, tokens, width):
        shape = [*(n if draw(st.integers(0, 4)) else 1 for n in lead), heads, tokens, width]
        if "enable_gqa" not in options and axes > 3 and not draw(st.integers(0, 5)):
            shape[-3] = 1  # broadcast over heads
        values = torch.randn(shape[-axes:], generator=generator, dtype=torch.float64).to(dtype)
        return lay_out(values, draw(st.sampled_from(LAYOUTS)))

    query, key = tensor(heads, queries, size), tensor(kv_heads, keys, size)
    value = tensor(kv_heads, keys, value_size)
    if key.shape == value.shape and not draw(st.integers(0, 4)):
        value = key
        query = key if query.shape == key.shape else query
    mask = None
    if not options["is_causal"] and draw(st.booleans()):
        tensors, cut = (query, key), -3 if "enable_gqa" in options else -2
        scores = torch.broadcast_shapes(*(x.shape[:cut] for x in tensors))
        scores += (heads,) if "enable_gqa" in options else ()
        shape = [*scores, queries, keys]
        shape = [n if draw(st.booleans()) else 1 for n in shape]
        shape = shape[draw(st.integers(0, len(shape) - 2)) :]
        kind = draw(st.sampled_from(["bool", "tril", "padding", "float", "min", "inf", "false"]))
        mask = random_mask(kind, shape, dtype, generator)
    needs = [draw(st.booleans()) for _ in range(3)]
    budget = draw(st.sampled_from([None, 1, 4096, 16384]))
    schedule = draw(st.sampled_from(["auto", "auto", "rect", "heads", "cqs", "whole"]))
    return (query, key, value), mask, options, needs, budget, schedule


def random_mask(kind, shape, dtype, generator):
    numbers = torch.rand(shape, generator=generator)
    if kind == "tril":
        return torch.ones(shape, dtype=torch.bool).tril()
    if kind == "padding":
        return (torch.arange(shape[-1]) < shape[-1] // 2).expand(shape)
    if kind == "float":
        return (4 * numbers).to(dtype)
    if kind == "min":  # as Hugging Face models mask, here whole rows too
        mask = torch.zeros(shape, dtype=dtype)
        mask.masked_fill_(numbers < 0.4, torch.finfo(dtype).min)
        mask[..., :2, :] = torch.finfo(dtype).min
        return mask
    if kind == "inf":
        return torch.zeros(shape).masked_fill(numbers < 0.4, -math.inf).to(dtype)
    return numbers < 0.6 if kind == "bool" else numbers < 0


def smallest_budget(error):
    match = re.search(r"smallest that works is (\d+) bytes", str(error))
    assert match, error
    return int(match[1])


def stream(tensors, mask, options, budget, schedule):
    """The call, with the smallest budget that works where that of the case is too small."""
    try:
        return stream_attention(*tensors, mask, memory_budget=budget, schedule=schedule, **options)
    except ConfigError as error:
        if "does not do" in str(error):  # cqs of a rectangle
            assert schedule == "cqs"
            return stream(tensors, mask, options, budget, "auto")
        return stream_attention(
            *tensors, mask, memory_budget=smallest_budget(error), schedule=schedule, **options
        )


def exact_options(tensors, options):
    """What PyTorch gives NaN for although it is defined: causal masks under such scales."""
    if options["is_causal"] and options.get("scale", 1.0) <= 0:
        queries, keys = tensors[0].shape[-2], tensors[1].shape[-2]
        mask = torch.ones(queries, keys, dtype=torch.bool).tril()
        return options | {"is_causal": False, "attn_mask": mask}
    return options


def reference_kernel(mask):
    """PyTorch's own choice, but where a mask has rows of large negative numbers.

    Beside these the flash kernel's log-sum-exp forgets the number of keys, and its gradients are
    wrong by that factor; matrix products are right.
    """
    if mask is not None and mask.is_floating_point():
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


@settings(max_examples=FEW, deadline=None, suppress_health_check=list(HealthCheck))
@given(sdpa_calls())
def test_calls_of_pytorchs_attention_are_answered_as_it_answers_them(case):
    check_call(case)


@pytest.mark.slow
@settings(max_examples=CALLS, deadline=None, suppress_health_check=list(HealthCheck))
@given(sdpa_calls())
def test_many_calls_of_pytorchs_attention_are_answered_as_it_answers_them(case):
    check_call(case)


def check_call(case):
    tensors, mask, options, needs, budget, schedule = case
    dtype = tensors[0].dtype
    tensors = [x.detach().requires_grad_(need) for x, need in zip(tensors, needs, strict=True)]
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]
    exact_mask = mask.double() if mask is not None and mask.is_floating_point() else mask
    call = exact_options(tensors, options)
    with reference_kernel(exact_mask):
        expected = F.scaled_dot_product_attention(*exact, **({"attn_mask": exact_mask} | call))
    out = stream(tensors, mask, options, budget, schedule)
    if 0 in (tensors[0].shape[-2], tensors[1].shape[-2]):  # PyTorch forgets to broadcast these
        expected = expected.sum() * 0 + torch.zeros_like(out, dtype=torch.float64)
    assert (out.shape, out.dtype) == (expected.shape, dtype)
    scale = max(1.0, abs(options.get("scale", 1.0)))
    close = {"rtol": 0, "atol": TOLERANCE[dtype] * scale, "check_dtype": False}
    torch.testing.assert_close(out.double(), expected, **close)
    inputs = [x for x in tensors if x.requires_grad]
    if not inputs:
        assert not out.requires_grad
        return
    grad = torch.linspace(-1, 1, max(1, out.numel()), dtype=torch.float64)[: out.numel()]
    grad = grad.view(out.shape).to(dtype)
    grads = torch.autograd.grad(out, inputs, grad)
    wanted = torch.autograd.grad(
        expected, [x for x in exact if x.requires_grad], grad.double(), allow_unused=True
    )
    for got, right in zip(grads, wanted, strict=True):
        right = torch.zeros_like(got, dtype=torch.float64) if right is None else right
        largest = max(1.0, float(right.abs().max())) if right.numel() else 1.0
        close = {"rtol": 0, "atol": 5 * TOLERANCE[dtype] * scale * largest, "check_dtype": False}
        torch.testing.assert_close(got.double(), right, **close)


def dense(query, key, value, hidden, scale, *, bias=0.0, softcap=None, sinks=None):
    """Attention by the formula, with the log-sum-exp. Shape: (B, H, M, D)."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = (scores + bias).masked_fill(hidden, -math.inf)
    if sinks is not None:
        column = sinks if sinks.ndim == 3 else sinks.reshape(-1, query.shape[1], 1)
        column = column[..., None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp()
    return weights[..., : key.shape[2]] @ value, lse


@st.composite
def masked_calls(draw):
    """A call with masks of our own, and the dense mask that they mean."""
    batch, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    heads = kv_heads * draw(st.integers(1, 2))
    keys = draw(st.integers(1, 40))
    queries = keys if draw(st.booleans()) else draw(st.integers(1, keys))
    offset = keys - queries
    options = {"is_causal": draw(st.booleans()), "enable_gqa": True}
    if queries < keys:
        options["query_offset"] = draw(st.sampled_from(["bottom_right", keys - queries]))
        if draw(st.booleans()):  # a static cache, whose last slots are empty
            offset = options["query_offset"] = draw(st.integers(0, keys - queries))
    positions, columns = torch.arange(queries)[:, None] + offset, torch.arange(keys)
    visible = torch.ones(batch, 1, queries, keys, dtype=torch.bool)
    if options["is_causal"]:
        options["prefix"] = [draw(st.integers(0, keys)) for _ in range(batch)]
        if draw(st.booleans()):
            options["prefix"] = 0
        prefix = torch.tensor(options["prefix"]).view(-1, 1, 1, 1)
        visible = visible & ((columns <= positions) | (columns < prefix))
    if draw(st.booleans()):
        left, right = draw(st.integers(1, keys + 2)), draw(st.integers(0, keys))
        options["window"] = draw(st.sampled_from([left, (left, right), (None, right)]))
        both = options["window"]
        left, right = both if isinstance(both, tuple) else (both, None)
        visible = visible & (columns > positions - (left or keys + queries))
        visible = visible & (columns <= positions + (keys if right is None else right))
    if draw(st.booleans()):
        ids = torch.stack([ids_of(draw, keys) for _ in range(batch)])
        options["documents"] = ids
        if draw(st.booleans()):
            ids = ids[:1].expand(batch, -1)
            options["documents"] = [
                int(x)
                for x in torch.unique_consecutive(ids[0], return_inverse=True)[1]
                .diff(prepend=torch.tensor([-1]))
                .nonzero()
            ]
        query_ids = ids.gather(1, positions.mT.expand(batch, -1))
        visible = visible & (query_ids[:, None, :, None] == ids[:, None, None, :])
    padding = draw(st.sampled_from(["none", "lengths", "starts", "key mask", "holes"]))
    start = torch.zeros(batch, dtype=torch.int64)
    hidden_rows = torch.zeros(batch, 1, queries, 1, dtype=torch.bool)
    if padding in ("lengths", "starts"):
        length = torch.tensor([draw(st.integers(0, keys)) for _ in range(batch)])
        if padding == "starts":
            start = keys - length
            options["starts"] = start
        options["lengths"] = length.tolist()
        ends = start + length
        inside = (columns >= start[:, None]) & (columns < ends[:, None])
        visible = visible & inside[:, None, None]
        hidden_rows = ~(
            (positions >= start.view(-1, 1, 1, 1)) & (positions < ends.view(-1, 1, 1, 1))
        )
    elif padding != "none":
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))
        options["key_mask"] = torch.rand(batch, keys, generator=generator) < 0.7
        if padding == "key mask":
            options["key_mask"] = (
                columns[None] < torch.tensor([draw(st.integers(0, keys))] * batch)[:, None]
            )
        visible = visible & options["key_mask"][:, None, None]
    if draw(st.booleans()):
        options["chunk"] = chunk = draw(st.integers(1, 9))
        begin = start.view(-1, 1, 1, 1)
        same = (columns - begin) // chunk == (positions - begin) // chunk
        visible = visible & same
    hidden = ~visible | hidden_rows
    extras = {}
    if draw(st.booleans()):
        extras["softcap"] = draw(st.sampled_from([0.5, 2.0, 30.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))
    rand = {"generator": generator, "dtype": torch.float64}
    if draw(st.booleans()):
        shape = draw(st.sampled_from([(heads,), (batch, heads), (batch, heads, queries)]))
        extras["sinks"] = torch.randn(shape, **rand).requires_grad_()
    if draw(st.booleans()):
        extras["alibi_slopes"] = torch.rand(
            draw(st.sampled_from([(heads,), (batch, heads)])), **rand
        )
    bias = None
    if draw(st.booleans()):
        shape = [n if draw(st.booleans()) else 1 for n in (batch, heads, queries, keys)]
        bias = torch.randn(shape, **rand).requires_grad_(draw(st.booleans()))
    width, value_width = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    tensors = [
        lay_out(
            torch.randn(batch, h, n, d, **rand), draw(st.sampled_from(LAYOUTS))
        ).requires_grad_()
        for h, n, d in (
            (heads, queries, width),
            (kv_heads, keys, width),
            (kv_heads, keys, value_width),
        )
    ]
    return tensors, bias, options, extras, hidden, positions, draw(st.sampled_from([None, 1, 8192]))


def ids_of(draw, keys):
    starts = draw(st.sets(st.integers(1, max(1, keys - 1)), max_size=4))
    return torch.bucketize(
        torch.arange(keys), torch.tensor(sorted(starts), dtype=torch.int64), right=True
    )


@settings(max_examples=FEW, deadline=None, suppress_health_check=list(HealthCheck))
@given(masked_calls())
def test_masks_of_our_own_are_what_they_say(case):
    check_masks(case)


@pytest.mark.slow
@settings(max_examples=CALLS, deadline=None, suppress_health_check=list(HealthCheck))
@given(masked_calls())
def test_many_masks_of_our_own_are_what_they_say(case):
    check_masks(case)


def check_masks(case):
    tensors, bias, options, extras, hidden, positions, budget = case
    call = options | extras
    sinks, scale = extras.get("sinks"), 0.8
    try:
        out, lse = stream_attention(
            *tensors, bias, scale=scale, memory_budget=budget, return_lse=True, **call
        )
    except ConfigError as error:
        out, lse = stream_attention(
            *tensors,
            bias,
            scale=scale,
            memory_budget=smallest_budget(error),
            return_lse=True,
            **call,
        )
    added = torch.zeros((), dtype=torch.float64) if bias is None else bias
    if "alibi_slopes" in extras:
        slopes = extras["alibi_slopes"].reshape(-1, tensors[0].shape[1], 1, 1)
        added = added - slopes * (positions - torch.arange(tensors[1].shape[2])).abs()
    expected, expected_lse = dense(
        *tensors, hidden, scale, bias=added, softcap=extras.get("softcap"), sinks=sinks
    )
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(lse, expected_lse.detach(), rtol=0, atol=1e-10)
    inputs = [*tensors, *(x for x in (bias, sinks) if x is not None and x.requires_grad)]
    grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grads = torch.autograd.grad(out, inputs, grad)
    for got, right in zip(grads, torch.autograd.grad(expected, inputs, grad), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-9)
