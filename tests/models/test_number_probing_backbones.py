"""Backbones: causal, apart by documents, equal to the recurrences they compute in chunks."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fulgurite.attention import InCore, Streamed
from fulgurite.attention.backend import backend_slots
from fulgurite.errors import ConfigError
from fulgurite.models.number_probing.backbones import (
    GatedDeltaNetBackbone,
    LSTMBackbone,
    Mamba2Backbone,
    PositionOptions,
    TransformerBackbone,
)
from fulgurite.models.number_probing.backbones.base import CausalConv
from fulgurite.models.number_probing.backbones.lstm import pack_documents
from fulgurite.models.number_probing.backbones.recurrences import (
    delta_rule,
    delta_rule_by_token,
    linear_recurrence,
    linear_recurrence_by_token,
)

BACKBONES = {
    "rotary": lambda: TransformerBackbone(16, 2, 4, kv_heads=2),
    "learned": lambda: TransformerBackbone(16, 2, 4, positions=PositionOptions("learned", 32)),
    "lstm": lambda: LSTMBackbone(16, 2),
    "plain lstm": lambda: LSTMBackbone(16, 2, residual=False),
    "delta": lambda: GatedDeltaNetBackbone(16, 2, 2, expand=2, chunk=4),
    "mamba": lambda: Mamba2Backbone(16, 2, head_size=8, state_size=4, chunk=4),
}
every = pytest.mark.parametrize("make", BACKBONES.values(), ids=BACKBONES.keys())
DOCUMENTS = torch.tensor([[0] * 3 + [1] * 6 + [2] * 1 + [3] * 3, [0] * 13])


pytestmark = pytest.mark.usefixtures("seeded")


def large(make):
    """A backbone in double precision whose parts all matter."""
    backbone = make().double()
    for name, p in backbone.named_parameters():
        if p.ndim > 1 and "positions" not in name:
            nn.init.normal_(p, std=0.5)
    return backbone


# --- every backbone ------------------------------------------------------------------------------


@every
def test_the_past_does_not_see_the_future(make):
    backbone, x = large(make), torch.randn(2, 13, 16).double()
    other = x.clone()
    other[:, 6] += 1
    difference = (backbone(x) - backbone(other)).abs().amax((0, 2))
    assert (difference[:6] == 0).all()
    assert (difference[6:] > 1e-9).all()


@every
def test_documents_are_as_alone(make):
    """Packed next to each other or each in a sequence of its own: the same hidden states."""
    backbone, x = large(make), torch.randn(2, 13, 16).double()
    packed = backbone(x, DOCUMENTS)
    positions = getattr(backbone, "positions", None)
    for row, first, last in ((0, 0, 3), (0, 3, 9), (0, 9, 10), (0, 10, 13), (1, 0, 13)):
        piece = x[row : row + 1, first:last]
        if positions is not None:  # they run on through the sequence
            piece = piece + positions.weight[first:last] - positions.weight[: last - first]
        torch.testing.assert_close(packed[row : row + 1, first:last], backbone(piece))
    assert not torch.allclose(packed[0, 3:], backbone(x)[0, 3:])


@every
def test_one_document_is_none(make):
    backbone, x = large(make), torch.randn(2, 9, 16).double()
    torch.testing.assert_close(backbone(x, torch.full((2, 9), 7)), backbone(x))


@every
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "packed"])
def test_gradients_reach_everything_that_is_seen(make, documents):
    backbone, x = large(make), torch.randn(2, 13, 16).double().requires_grad_()
    out = backbone(x, documents)
    weights = torch.randn(out.shape).double()  # a plain sum of normed states has no gradient
    (out * weights)[0, -1].sum().backward()
    reached = x.grad[0].abs().amax(1) > 1e-12  # sums of logarithms cancel up to rounding
    assert reached.tolist() == [documents is None] * 10 + [True] * 3
    assert not x.grad[1].any()
    (backbone(x, documents) * weights).sum().backward()
    unused = {name for name, p in backbone.named_parameters() if not p.grad.any()}
    assert not unused


@every
def test_small_changes_give_the_gradient(make):
    backbone = large(make)
    x = torch.randn(1, 5, 16).double().requires_grad_()
    weights = torch.randn(1, 5, 16).double()
    assert torch.autograd.gradcheck(
        lambda y: (backbone(y) * weights).sum(), x, fast_mode=True, atol=1e-4
    )


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: TransformerBackbone(16, heads=3), "heads"),
        (lambda: TransformerBackbone(0), "width"),
        (lambda: LSTMBackbone(16, layers=0), "layers"),
        (lambda: GatedDeltaNetBackbone(16, heads=32), "head_size"),
        (lambda: Mamba2Backbone(16, head_size=5), "head_size"),
        (lambda: Mamba2Backbone(16, head_size=8, conv=0), "conv"),
    ],
)
def test_wrong_sizes_name_their_key(make, named):
    with pytest.raises(ConfigError, match=named):
        make()


# --- Transformer ---------------------------------------------------------------------------------


def test_learned_positions_are_the_only_ones():
    backbone = large(BACKBONES["learned"])
    x = torch.randn(1, 1, 16).double().expand(1, 5, 16)
    assert not torch.allclose(backbone(x)[0, 1], backbone(x)[0, 4])
    nn.init.zeros_(backbone.positions.weight)
    torch.testing.assert_close(backbone(x), backbone(x)[:, :1].expand_as(x))


def test_a_sequence_longer_than_the_learned_positions():
    with pytest.raises(ConfigError, match="max_length=33"):
        BACKBONES["learned"]()(torch.zeros(1, 33, 16))


def test_documents_and_a_strategy_that_streams():
    backbone = BACKBONES["rotary"]()
    x = torch.randn(2, 13, 16)
    plain = backbone(x)
    for slot in backend_slots(backbone):
        slot.attention_backend = Streamed("32KiB")
    torch.testing.assert_close(backbone(x), plain)
    for slot in backend_slots(backbone):
        slot.attention_backend = InCore()
    plain = backbone(x, DOCUMENTS)
    for slot in backend_slots(backbone):
        slot.attention_backend = Streamed("32KiB")
    torch.testing.assert_close(backbone(x, DOCUMENTS), plain)


# --- LSTM ----------------------------------------------------------------------------------------


def test_documents_are_read_side_by_side():
    order, sizes = pack_documents(DOCUMENTS)
    # lengths 13, 6, 3, 3, 1: the longest first, all first tokens before all second ones
    assert sizes.tolist() == [5, 4, 4, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1]
    assert sorted(order.tolist()) == list(range(26))
    assert order[:5].tolist() == [13, 3, 0, 10, 9]


def test_an_lstm_without_shortcuts_is_pytorchs():
    backbone = LSTMBackbone(16, 2, residual=False)
    stacked = nn.LSTM(16, 16, num_layers=2, batch_first=True)
    for i, layer in enumerate(backbone.layers):
        for name, p in layer.named_parameters():
            getattr(stacked, name.replace("l0", f"l{i}")).data.copy_(p)
    x = torch.randn(3, 7, 16)
    torch.testing.assert_close(backbone(x), backbone.norm(stacked(x)[0]))


def test_an_lstm_remembers_at_first():
    bias = LSTMBackbone(8, 1).layers[0]
    total = (bias.bias_ih_l0 + bias.bias_hh_l0).view(4, 8)
    assert total.mean(1).tolist() == [0, 1, 0, 0]


# --- recurrences ---------------------------------------------------------------------------------


def inputs(heads=3, length=37, shared=False):
    def draw(*shape):
        return torch.randn(2, *shape).double().requires_grad_()

    keys = 1 if shared else heads
    query, key, value = draw(keys, length, 5), draw(keys, length, 5), draw(heads, length, 4)
    log_decay = (-torch.rand(2, heads, length).double() * 3).requires_grad_()
    beta = torch.rand(2, heads, length).double().requires_grad_()
    return query, key, value, log_decay, beta


def pieces(length=37):
    return (torch.rand(2, length) < 0.15).cumsum(1)


@pytest.mark.parametrize("chunk", [1, 8, 16, 64])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rule", ["delta", "linear", "shared"])
def test_chunks_equal_the_recurrence(rule, packed, chunk):
    """Forward and backward, with chunks that do not divide the length."""
    query, key, value, log_decay, beta = inputs(shared=rule == "shared")
    documents = pieces() if packed else None
    unit = F.normalize(key, dim=-1)
    if rule == "delta":
        fast = delta_rule(
            query, unit, value, log_decay, beta=beta, documents=documents, chunk=chunk
        )
        slow = delta_rule_by_token(query, unit, value, log_decay, beta=beta, documents=documents)
        leaves = [query, key, value, log_decay, beta]
    else:
        fast = linear_recurrence(query, key, value, log_decay, documents=documents, chunk=chunk)
        slow = linear_recurrence_by_token(query, key, value, log_decay, documents=documents)
        leaves = [query, key, value, log_decay]
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-10)
    weights = torch.randn_like(slow)
    for a, b in zip(
        torch.autograd.grad((fast * weights).sum(), leaves, retain_graph=True),
        torch.autograd.grad((slow * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("rule", ["delta", "linear"])
def test_strong_decay_over_a_chunk_stays_finite(rule):
    """e^-200 per token: quotients of products would be 0/0."""
    query, key, value, log_decay, beta = (x.float().detach() for x in inputs())
    log_decay = (200 * log_decay - 100).requires_grad_()
    beta = beta.requires_grad_()
    unit = F.normalize(key, dim=-1)
    if rule == "delta":
        out = delta_rule(query, unit, value, log_decay, beta=beta)
        gradients = torch.autograd.grad(out.square().sum(), [log_decay, beta])
    else:
        out = linear_recurrence(query, key, value, log_decay)
        gradients = torch.autograd.grad(out.square().sum(), [log_decay])
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in gradients)


def test_the_delta_rule_recalls_what_it_stored_last():
    """With β = 1 and no decay, reading a key gives the value written to it last."""
    key = F.one_hot(torch.tensor([[0, 1, 0, 2, 1, 0]]), 3).double()[:, None]
    value = torch.randn(1, 1, 6, 4).double()
    one = torch.ones(1, 1, 6).double()
    out = delta_rule(key, key, value, 0 * one, beta=one, chunk=4)
    torch.testing.assert_close(out, value)
    earlier = torch.roll(key, -1, 2)  # the next token's key, stored before
    out = delta_rule(earlier, key, value, 0 * one, beta=one, chunk=4)
    torch.testing.assert_close(out[0, 0, 1], value[0, 0, 0])  # key 0
    torch.testing.assert_close(out[0, 0, 4], value[0, 0, 2])  # key 0, written anew
    torch.testing.assert_close(out[0, 0, 3], value[0, 0, 1])  # key 1


def test_a_convolution_equals_pytorchs():
    conv = CausalConv(6, taps=4)
    x = torch.randn(2, 9, 6)
    weight = conv.weight.flip(0).T[:, None]
    expected = F.conv1d(F.pad(x.mT, (3, 0)), weight, groups=6).mT
    torch.testing.assert_close(conv(x), expected)
    torch.testing.assert_close(conv(x[:, :2]), expected[:, :2])


def test_the_chunk_changes_nothing():
    for kind, options in ((GatedDeltaNetBackbone, {}), (Mamba2Backbone, {"head_size": 8})):
        results = []
        for chunk in (3, 64):
            torch.manual_seed(1)
            backbone = kind(16, layers=2, chunk=chunk, **options).double()
            x = torch.linspace(-1, 1, 2 * 11 * 16).double().view(2, 11, 16)
            results.append(backbone(x, DOCUMENTS[:, :11]))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("make", [BACKBONES["delta"], BACKBONES["mamba"], BACKBONES["lstm"]])
def test_half_precision_is_near(make):
    backbone, x = make(), torch.randn(2, 13, 16)
    expected = backbone(x, DOCUMENTS)
    with torch.autocast("cpu", torch.bfloat16):
        half = backbone(x, DOCUMENTS)
    torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.1)
