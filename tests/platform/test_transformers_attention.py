"""What transformers hands to its attention: recognised exactly, or refused by name."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fulgurite.attention import Streamed
from fulgurite.errors import ConfigError
from fulgurite.strategies.stream_mask import StreamMask
from fulgurite.strategies.transformers_attention import TransformersAttention
from fulgurite.strategies.transformers_masks import MaskRequest, make_mask

masking = pytest.importorskip("transformers.masking_utils")

LEFT = torch.tensor([[0] * 7 + [1] * 17, [1] * 24, [1] * 24]).bool()
RIGHT = LEFT.flip(1)
HOLES = RIGHT & (torch.arange(24) != 5)
PACKED = torch.tensor([[0] * 9 + [1] * 15, [0] * 24, [0, 1] + [2] * 22])
POSITIONS = torch.cat([torch.arange(9), torch.arange(15)])[None]
FUNCTIONS = {
    "causal": masking.causal_mask_function,
    "bidirectional": masking.bidirectional_mask_function,
    "window": masking.sliding_window_causal_mask_function(5),
    "window of none": masking.sliding_window_causal_mask_function(0),
    "two-sided window": masking.sliding_window_bidirectional_mask_function(5),
    "chunks": masking.chunked_causal_mask_function(7, torch.tensor([7, 0, 0])),
    "documents": masking.and_masks(
        masking.packed_sequence_mask_function(PACKED), masking.causal_mask_function
    ),
    "documents with positions": masking.packed_sequence_compatibility_function(
        masking.sliding_window_causal_mask_function(4),
        POSITIONS.expand(3, -1),
        PACKED[:1].expand(3, -1),
    ),
    "images": masking.or_masks(
        masking.causal_mask_function,
        masking.blockwise_overlay(torch.tensor([[-1] * 4 + [0] * 6 + [-1] * 14] * 3)),
    ),
    "every other": lambda b, h, q, k: (q - k) % 2 == 0,
}
INTERVALS = set(FUNCTIONS) - {"every other"}


def dense(**options):
    return masking.sdpa_mask(
        **options, allow_is_causal_skip=False, allow_is_bidirectional_skip=False
    )


SIZES = [(24, 24, 0, 0), (1, 20, 19, 0), (6, 24, 11, 0), (4, 12, 12, 4), (24, 30, 0, 0)]
# transformers makes masks of packed sequences and of images for whole sequences only
CASES = [
    (name, *sizes)
    for name in FUNCTIONS
    for sizes in SIZES
    if sizes == SIZES[0] or name not in ("documents", "documents with positions", "images")
]


@pytest.mark.parametrize("padding", [None, LEFT, RIGHT, HOLES])
@pytest.mark.parametrize(("name", "queries", "keys", "first_query", "first_key"), CASES)
def test_masks_see_what_transformers_own_see(padding, name, queries, keys, first_query, first_key):
    """Without and with a cache, a window of it, and empty places in it."""
    options = {
        "batch_size": 3, "q_length": queries, "kv_length": keys, "q_offset": first_query,
        "kv_offset": first_key, "mask_function": FUNCTIONS[name], "attention_mask": padding,
    }  # fmt: skip
    mask, expected = make_mask(MaskRequest.of(options)), dense(**options)
    assert (mask.shape, mask.dtype, mask.ndim) == (expected.shape, torch.bool, 4)
    assert torch.equal(mask.source.dense(), expected)
    is_whole = padding is not HOLES or keys < 6
    assert mask.source.is_interval or not (name in INTERVALS and is_whole)
    torch.manual_seed(0)
    query, key = torch.randn(3, 2, queries, 8).double(), torch.randn(3, 2, keys, 8).double()
    attention = TransformersAttention(Streamed("9KiB", "rect"), "streamed")
    out, _ = attention.attend(nn.Module(), query, key, key, mask)
    wanted = F.scaled_dot_product_attention(query, key, key, expected)
    torch.testing.assert_close(out.transpose(1, 2), wanted)


def test_a_part_that_is_not_what_it_is_called_is_not_trusted(monkeypatch):
    """What is recognised by its name is compared with the function in some rows."""

    def sliding_window_overlay(sliding_window):
        def inner_mask(batch_idx, head_idx, q_idx, kv_idx):
            return kv_idx >= q_idx - sliding_window

        return inner_mask

    function = masking.and_masks(sliding_window_overlay(5), masking.causal_mask_function)
    options = {"batch_size": 1, "q_length": 24, "kv_length": 24, "mask_function": function}
    mask = make_mask(MaskRequest.of(options))
    assert (mask.source.visible[0].first(10), mask.source.visible[0].end(10)) == (5, 11)


def test_masks_are_handed_on_cut_and_copied_without_memory():
    mask = make_mask(MaskRequest(2, 6, 9, attention_mask=LEFT[:2, :9]))
    for same in (mask.to("cpu"), mask.contiguous(), mask.detach(), mask[:], mask[:, :, :, :9]):
        assert same.shape == (2, 1, 6, 9)
        assert isinstance(same, StreamMask)
    cut = mask[..., :7]
    assert isinstance(cut, StreamMask)
    assert torch.equal(cut.source.dense(), mask.source.dense()[..., :7])


@pytest.mark.parametrize("is_additive", [False, True])
def test_what_a_model_computes_with_its_mask_is_done_in_full(is_additive):
    """Numbers are those that the implementation before would have given its own code."""
    options = {"batch_size": 2, "q_length": 6, "kv_length": 6, "attention_mask": LEFT[:2, 4:10]}
    mask = make_mask(MaskRequest(**options, dtype=torch.float64, is_additive=is_additive))
    full = dense(**options)
    if is_additive:
        full = torch.zeros(full.shape).double().masked_fill(~full, torch.finfo(torch.float64).min)
    scores = torch.randn(2, 1, 6, 6, dtype=torch.float64)
    assert mask.dtype == full.dtype
    for work in (lambda x: x[:, 0], lambda x: scores + x, lambda x: torch.cat([x, x], -1)):
        with pytest.warns(UserWarning, match="works on its attention mask"):
            result = work(mask)
        assert not isinstance(result, StreamMask)
        assert torch.equal(result, work(full))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"dropout": 0.1}, r"Module drops attention weights \(p = 0.1\)"),
        ({"output_attentions": True}, r"return attention weights \(output_attentions\)"),
        ({"head_mask": torch.ones(2), "cache": 1}, "gives its attention cache, head_mask, which"),
        ({"indices": torch.zeros(1, 4, 2)}, "chooses keys"),
        ({"cu_seq_lens_q": torch.tensor([0, 3])}, "packs sequences"),
        ({"s_aux": torch.ones(1), "sinks": torch.ones(1)}, "both s_aux and sinks"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(keywords, message):
    attention = TransformersAttention(Streamed(), "streamed")
    query = torch.randn(1, 1, 4, 8)
    with pytest.raises(ConfigError, match=message):
        attention.attend(nn.Module(), query, query, query, None, **keywords)
    with pytest.raises(ConfigError, match="describes a mask by head_function"):
        MaskRequest.of({"head_function": len})


def test_windows_without_a_mask_are_those_of_flash_attention():
    attention = TransformersAttention(Streamed(), "streamed")
    query = torch.randn(1, 1, 12, 8)
    distance = torch.arange(12)[:, None] - torch.arange(12)
    for is_causal, seen in ((True, (distance >= 0) & (distance < 4)), (False, distance.abs() < 4)):
        out, _ = attention.attend(
            nn.Module(), query, query, query, None, is_causal=is_causal, sliding_window=4
        )
        expected = F.scaled_dot_product_attention(query, query, query, seen)
        torch.testing.assert_close(out.transpose(1, 2), expected)
    out, _ = attention.attend(
        nn.Module(), query, query, query, None, is_causal=False,
        cu_seq_lens_q=torch.tensor([0, 5, 12]), cu_seq_lens_k=torch.tensor([0, 5, 12]),
    )  # fmt: skip
    ids = (torch.arange(12) >= 5).long()
    expected = F.scaled_dot_product_attention(query, query, query, ids[:, None] == ids)
    torch.testing.assert_close(out.transpose(1, 2), expected)


def test_an_attention_of_the_user_is_refused_by_name():
    from transformers import AttentionInterface, LlamaConfig, LlamaModel

    def relu_attention(module, query, key, value, attention_mask, **options):
        return (query @ key.mT).relu() @ value, None

    AttentionInterface.register("relu_of_a_test", relu_attention)
    config = LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, attn_implementation="relu_of_a_test",
    )  # fmt: skip
    with pytest.raises(ConfigError, match="LlamaConfig asks for the attention 'relu_of_a_test'"):
        TransformersAttention(Streamed(), "test").install(LlamaModel(config))
    assert config._attn_implementation == "relu_of_a_test"


def test_a_causal_mask_of_a_module_that_is_not_causal_is_refused():
    attention, module = TransformersAttention(Streamed(), "streamed"), nn.Module()
    module.is_causal = False
    query = torch.randn(1, 1, 6, 8)
    options = {"batch_size": 1, "q_length": 6, "kv_length": 6}
    with pytest.raises(ConfigError, match=r"is_causal=False, and its model asks for a causal mask"):
        attention.attend(module, query, query, query, make_mask(MaskRequest(**options)))
    # eager attention always follows the mask, and a bidirectional one says the same as the module
    eager = make_mask(MaskRequest(**options, dtype=torch.float32, is_additive=True))
    out, _ = attention.attend(module, query, query, query, eager)
    expected = F.scaled_dot_product_attention(query, query, query, is_causal=True)
    torch.testing.assert_close(out.transpose(1, 2), expected)
    function = masking.bidirectional_mask_function
    both = make_mask(MaskRequest(**options, mask_function=function))
    out, _ = attention.attend(module, query, query, query, both)
    expected = F.scaled_dot_product_attention(query, query, query)
    torch.testing.assert_close(out.transpose(1, 2), expected)
