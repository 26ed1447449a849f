"""Rotary positions, grouped heads, causality; chunks, checkpoints and backends change nothing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from fulgurite.attention import InCore, Streamed
from fulgurite.attention.backend import backend_slots
from fulgurite.errors import ConfigError
from fulgurite.layers.rotary import apply_rotary, rotary
from fulgurite.layers.transformer import (
    Attention,
    SwiGLU,
    Transformer,
    TransformerConfig,
    in_chunks,
)

TOKENS, WIDTH, LAYERS = 37, 16, 3


@pytest.fixture(autouse=True)
def float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def model(**options):
    torch.manual_seed(1)
    options = {"width": WIDTH, "layers": LAYERS, "heads": 4, "kv_heads": 2, **options}
    is_causal = options.pop("is_causal", True)
    network = Transformer(TransformerConfig(**options), is_causal=is_causal)
    for parameter in network.parameters():  # initial weights are too small to show differences
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return network


def with_backend(network, backend):
    for part in backend_slots(network):
        part.attention_backend = backend
    return network


def gradients(network, x, **options):
    """Output, and gradients of input and weights."""
    x = x.clone().requires_grad_()
    out = network(x, **options)
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    return [out, *torch.autograd.grad((out * weights).sum(), [x, *network.parameters()])]


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_rotary_scores_depend_on_differences_of_positions():
    query, key = torch.randn(2, 8)
    positions = torch.tensor([0, 3, 5, 1000, 1002, 2**20, 2**20 + 2])
    cos, sin = rotary(positions, 8, dtype=torch.float64)
    queries, keys = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
    scores = queries @ keys.T
    torch.testing.assert_close(scores[1, 2], scores[3, 4])
    torch.testing.assert_close(scores[1, 2], scores[5, 6])
    assert not torch.isclose(scores[1, 2], scores[2, 1])
    torch.testing.assert_close(queries.norm(dim=-1), query.norm().expand(7))
    torch.testing.assert_close(queries[0], query)


def test_rotary_keeps_types_and_is_exact_far_out():
    far = torch.tensor([2**24 + 1])
    single, double = rotary(far, 64), rotary(far, 64, dtype=torch.float64)
    for a, b in zip(single, double, strict=True):
        assert (a.dtype, b.dtype) == (torch.float32, torch.float64)
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-6)
    for dtype in (torch.bfloat16, torch.float32):
        assert apply_rotary(torch.ones(1, 64, dtype=dtype), *single).dtype == dtype
    assert apply_rotary(torch.ones(1, 64), *double).dtype == torch.float64


def test_attention_is_that_of_the_formula():
    attention = Attention(WIDTH, heads=4, kv_heads=2)
    assert isinstance(attention.attention_backend, InCore)
    x = torch.randn(2, TOKENS, WIDTH)
    query, key, value = attention.qkv(x).split([16, 8, 8], -1)
    cos, sin = rotary(torch.arange(TOKENS), 4, dtype=torch.float64)
    query, key, value = (
        y.unflatten(-1, (-1, 4)).transpose(1, 2).repeat_interleave(16 // y.shape[-1], 1)
        for y in (query, key, value)  # grouped heads are repeated heads
    )
    scores = apply_rotary(query, cos, sin) @ apply_rotary(key, cos, sin).mT / 2
    scores = scores.masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), -torch.inf)
    expected = attention.out((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x), expected)


def test_grouped_heads_are_repeated_heads():
    few, many = Attention(WIDTH, 4, 2), Attention(WIDTH, 4)
    query, key, value = few.qkv.weight.detach().split([16, 8, 8])
    repeated = (y.unflatten(0, (2, 4)).repeat_interleave(2, 0).flatten(0, 1) for y in (key, value))
    many.load_state_dict(
        {"qkv.weight": torch.cat([query, *repeated]), "out.weight": few.out.weight.detach()}
    )
    x = torch.randn(2, TOKENS, WIDTH)
    torch.testing.assert_close(few(x), many(x))


def seen_by(network, source, **options):
    """Tokens whose output changes with a token."""
    x = torch.randn(1, TOKENS, WIDTH)
    changed = x.clone()
    changed[:, source] += 1
    difference = (network(x, **options) - network(changed, **options)).abs().amax((0, 2))
    return set((difference > 1e-12).nonzero().flatten().tolist())


@pytest.mark.parametrize("chunk", [None, 5])
def test_masks(chunk):
    everything = set(range(TOKENS))
    assert seen_by(model(chunk=chunk), 20) == set(range(20, TOKENS))
    assert seen_by(model(chunk=chunk, is_causal=False), 20) == everything
    streamed = with_backend(model(chunk=chunk), Streamed("32KiB"))
    assert seen_by(streamed, 20) == set(range(20, TOKENS))
    assert seen_by(streamed, 20, documents=[0, 10, 25]) == set(range(20, 25))
    assert seen_by(streamed, 3, prefix=5) == everything
    streamed = with_backend(model(chunk=chunk, window=4, layers=2), Streamed("32KiB"))
    assert seen_by(streamed, 20) == set(range(20, 20 + 2 * 3 + 1))


def test_a_document_is_what_it_is_alone():
    network = with_backend(model(), Streamed())
    x = torch.randn(1, TOKENS, WIDTH)
    together = network(x, documents=[0, 11])
    torch.testing.assert_close(together[:, 11:], network(x[:, 11:]))


@pytest.mark.parametrize("options", [{"chunk": 1}, {"chunk": 8}, {"chunk": 100}])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_chunks_and_checkpoints_change_nothing(options, checkpoint):
    x = torch.randn(2, TOKENS, WIDTH)
    expected = gradients(model(), x)
    found = gradients(model(checkpoint=checkpoint, **options), x)
    assert_same(found, expected)
    with torch.no_grad():
        assert_same([model(checkpoint=checkpoint, **options)(x)], expected[:1])


def test_checkpoint_alone_changes_nothing():
    x = torch.randn(2, TOKENS, WIDTH)
    assert_same(gradients(model(checkpoint=True), x), gradients(model(), x))


def saved(network, tokens=256):
    """Bytes of distinct storages that backward keeps, apart from the weights."""
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = network(torch.randn(1, tokens, WIDTH))
    del out
    return sum(kept.values())


def test_chunks_and_checkpoints_keep_less():
    plain, chunked = saved(model()), saved(model(chunk=16))
    assert chunked < plain / 3
    assert saved(model(checkpoint=True)) < chunked / 2


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ({}, LAYERS),
        ({"chunk": 8}, LAYERS),
        ({"checkpoint": True}, 2 * LAYERS),
        ({"checkpoint": True, "chunk": 8}, 2 * LAYERS),
    ],
)
def test_backends_agree_and_are_called_once_a_layer(options, calls):
    x = torch.randn(2, 64, WIDTH)
    backend = Streamed(memory_budget="32KiB")
    found = gradients(with_backend(model(**options), backend), x)
    assert backend.calls == calls
    assert_same(found, gradients(model(**options), x))


def test_no_gradients_no_recomputation():
    backend = Streamed()
    with torch.no_grad():
        with_backend(model(checkpoint=True), backend)(torch.randn(1, 5, WIDTH))
    assert backend.calls == LAYERS


def test_backends_are_offered():
    slots = list(backend_slots(model()))
    assert len(slots) == LAYERS
    assert all(isinstance(slot.attention_backend, InCore) for slot in slots)
    assert copy.deepcopy(model())(torch.zeros(1, 2, WIDTH)).shape == (1, 2, WIDTH)


def test_in_core_attention_refuses_masks():
    with pytest.raises(ConfigError, match="strategy=stream_cqsa"):
        model(window=3)(torch.randn(1, 5, WIDTH))


@pytest.mark.parametrize("chunk", [None, 8])
def test_low_precision(chunk):
    network = model(chunk=chunk).float()
    x = torch.randn(1, TOKENS, WIDTH, dtype=torch.float32)
    expected = network(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = network(x)
    found.square().sum().backward()
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)
    half = network.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.2)


def test_initial_weights():
    network = Transformer(TransformerConfig(128, layers=8, heads=4))
    block = network.blocks[3]
    for layer in (block.attention.qkv, block.mlp.up):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for layer in (block.attention.out, block.mlp.down):
        assert layer.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    norms = network(torch.randn(1, 10, 128)).square().mean(-1)
    torch.testing.assert_close(norms, torch.ones(1, 10), rtol=0, atol=1e-4)


def test_swiglu():
    mlp = SwiGLU(WIDTH, 24)
    x = torch.randn(3, WIDTH)
    gate, value = mlp.up.weight.split(24)
    torch.testing.assert_close(mlp(x), F.silu(x @ gate.T) * (x @ value.T) @ mlp.down.weight.T)
    assert SwiGLU(256).down.in_features == 704


@pytest.mark.parametrize("grad", [False, True])
def test_in_chunks(grad):
    x, y = torch.randn(2, 7, 3, requires_grad=grad), torch.randn(2, 7)
    starts = []

    def function(start, x, y):
        starts.append(start)
        return x.sin(), (x.sum(-1) + y).unsqueeze(-1)

    for chunk, expected in ((3, [0, 3, 6]), (7, [0]), (None, [0])):
        starts.clear()
        found = in_chunks(function, chunk, x, y)
        assert starts == expected
        torch.testing.assert_close(found, function(0, x, y))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"heads": 3}, "width a multiple of .*heads"),
        ({"heads": 4, "kv_heads": 3}, "kv_heads a divisor"),
        ({"heads": 16, "kv_heads": 16}, "even multiple"),
        ({"heads": 0}, r"transformer\.heads"),
        ({"kv_heads": 0}, r"transformer\.kv_heads"),
        ({"is_causal": False, "window": 4}, r"window .*causal"),
        ({"window": 0}, "window"),
        ({"chunk": 0}, r"transformer\.chunk"),
        ({"layers": 0}, r"transformer\.layers"),
        ({"rope_base": 0.0}, r"transformer\.rope_base"),
    ],
)
def test_wrong_sizes_are_refused(options, named):
    with pytest.raises(ConfigError, match=named):
        model(**options)
