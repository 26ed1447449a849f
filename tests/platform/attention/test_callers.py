"""How PyTorch's own machinery calls attention: autocast, torch.func, unusual layouts of tensors."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.func import functional_call, grad, vmap
from torch.nn.attention.bias import causal_lower_right

from fulgurite.attention import Streamed, stream_attention
from fulgurite.attention.calls import AttentionCall
from fulgurite.attention.visibility import EntryMasks, Visibility
from fulgurite.errors import ConfigError, DataError


def tensors(*dtypes):
    torch.manual_seed(0)
    return [torch.randn(1, 2, 9, 4, dtype=dtype).requires_grad_() for dtype in dtypes]


def test_autocast_makes_types_one_as_for_pytorchs_attention():
    """Rotary positions and norms of queries and keys leave float32 beside values in bfloat16."""
    call = tensors(torch.float32, torch.float32, torch.bfloat16)
    visible = (Visibility.of(9, 9, EntryMasks(is_causal=True)),)
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.scaled_dot_product_attention(*call, is_causal=True)
        by_call = Streamed("4KiB").attend(AttentionCall(*call, visible))
        for out in (stream_attention(*call, is_causal=True, memory_budget="4KiB"), by_call):
            torch.testing.assert_close(out, expected, rtol=0, atol=2e-2)
            assert [x.dtype for x in torch.autograd.grad(out.sum(), call)] == [
                x.dtype for x in call
            ]
    with pytest.raises(DataError, match="dtypes differ"):
        Streamed().attend(AttentionCall(*call, visible))


def attend_sum(query):
    return stream_attention(query, query, query).sum()


def push_forward(query):
    with forward_ad.dual_level():
        attend_sum(forward_ad.make_dual(query, torch.ones_like(query)))


def batch_gradients(query):
    query = query.detach().requires_grad_()
    out = stream_attention(query, query, query)
    torch.autograd.grad(out, query, torch.ones(3, *out.shape), is_grads_batched=True)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda x: vmap(attend_sum)(x[None]), "no torch.func"),
        (grad(attend_sum), "no torch.func"),
        (
            lambda x: vmap(lambda p: functional_call(torch.nn.Identity(), p, attend_sum(x + p)))(x),
            "no torch.func",
        ),
        (push_forward, "no derivatives in forward mode"),
        (batch_gradients, "no batched gradients"),
    ],
)
def test_transformations_are_refused_by_name(transform, message):
    with pytest.raises(ConfigError, match=message):
        transform(torch.randn(1, 2, 3, 4))


def test_layouts_without_strides_are_refused_by_name():
    dense = torch.randn(1, 1, 3, 4)
    nested = torch.nested.nested_tensor([torch.randn(2, 5, 8), torch.randn(2, 3, 8)])
    with pytest.raises(ConfigError, match="does not do nested tensors"):
        stream_attention(nested, nested, nested)
    with pytest.raises(ConfigError, match=r"attn_mask is of torch\.sparse_coo"):
        stream_attention(dense, dense, dense, torch.ones(3, 3).to_sparse())


def test_a_causal_bias_of_another_call_is_refused():
    """PyTorch takes it for one of this call, and would align it with the first key."""
    query, key = torch.randn(1, 1, 5, 4), torch.randn(1, 1, 9, 4)
    with pytest.raises(DataError, match=r"causal_lower_right\(7, 7\), and there are 5 queries"):
        stream_attention(query, key, key, causal_lower_right(7, 7))
