"""Attention outside the budget is seen however it is written, and nothing else is taken for it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.attention.flex_attention import flex_attention

from fulgurite.attention import Streamed
from fulgurite.strategies.attention_census import take_census


def count(function, model=None):
    """Calls of attention that a function makes, on queries, keys and values (1, 9, 4)."""
    torch.manual_seed(0)
    tensors = torch.randn(3, 1, 9, 4)
    with take_census(model or nn.Linear(4, 4), Streamed()) as census:
        function(*tensors)
    return sum(census.unstreamed.values())


def divide_exponentials(q, k, v):
    scores = q @ k.mT
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return (weights / (1 + weights.sum(-1, keepdim=True))) @ v


@pytest.mark.parametrize(
    "attend",
    [
        lambda q, k, v: (q @ k.mT).softmax(-1) @ v,
        lambda q, k, v: (q @ k.mT).softmax(-1).tril() @ v,
        lambda q, k, v: (q @ k.mT).log_softmax(-1).exp() @ v,
        lambda q, k, v: (q[0] @ k[0].T / 2).softmax(-1) @ v[0],  # one head without a batch
        divide_exponentials,
        lambda q, k, v: (q @ k.mT).sigmoid() @ v,
        lambda q, k, v: flex_attention(q[:, None], k[:, None], v[:, None]),
    ],
)
def test_attention_is_seen_however_it_is_written(attend):
    with torch.no_grad():
        assert count(attend) == 1


@torch.library.custom_op("flash_attn::_flash_attn_forward", mutates_args=())
def flash_attn_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT).softmax(-1) @ v


@torch.library.custom_op("flash_attn::_flash_attn_backward", mutates_args=())
def flash_attn_backward(grad: torch.Tensor) -> torch.Tensor:
    return grad.clone()


def test_kernels_of_other_packages_are_seen():
    assert count(lambda q, k, v: flash_attn_backward(flash_attn_forward(q, k, v))) == 1


def classify(layer):
    """Mean of what classes stand for, by a classifier's probabilities."""
    return lambda q, k, v: layer(q[0]).softmax(-1) @ torch.randn(4, 3)


def route_and_multiply(q, k, v):
    """Weights of experts that are let go, and products of other tensors in their memory."""
    for _ in range(50):
        (q * 1.0).softmax(-1).argmax(-1)
        other = v * 2
        torch.bmm(other, other.mT)


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_other_products_are_not_taken_for_it(precision):
    layer = nn.Linear(4, 4, bias=False)
    experts = nn.ParameterList([torch.randn(1, 4, 8), torch.randn(1, 8, 4)])
    mix = lambda q, k, v: (q @ experts[0]).sigmoid() @ experts[1]  # noqa: E731
    embed = lambda q, k, v: q.softmax(-1) @ layer.weight  # noqa: E731
    for function in (classify(layer), mix, embed, route_and_multiply):
        with torch.no_grad(), torch.autocast("cpu", precision, enabled=precision is not None):
            assert count(function, nn.ModuleList([layer, experts])) == 0


def test_parts_that_are_compiled_as_a_whole_run():
    compiled = torch.compile(nn.GELU(), fullgraph=True, backend="eager")
    assert count(lambda q, k, v: F.scaled_dot_product_attention(compiled(q), k, v)) == 1


@pytest.mark.parametrize("make_bias", [causal_lower_right, causal_upper_left])
def test_causal_biases_of_pytorch_are_made_as_without(make_bias):
    def attend(q, k, v):
        return F.scaled_dot_product_attention(q[:, None, :5], k[:, None], v[:, None], bias(5, 9))

    def bias(queries, keys):
        biases.append(make_bias(queries, keys))
        return biases[-1]

    biases = []
    assert count(attend) == 1
    bias(5, 9)  # the constructor is PyTorch's own again
    first, second = biases
    assert type(first) is type(second)
    assert (first.variant, first.seq_len_q, first.seq_len_kv) == (second.variant, 5, 9)
    assert "__new__" not in vars(type(first))
