"""Masks as intervals: what is seen, which tiles compute it, and what is recognised in tensors."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.utils._python_dispatch import TorchDispatchMode

from fulgurite.attention import plan, stream_attention
from fulgurite.attention import tiles as tiles_module
from fulgurite.attention.biases import ScoreBlock, SelectedKeys
from fulgurite.attention.bounds import Bound
from fulgurite.attention.tiles import Kind, tiles
from fulgurite.attention.visibility import EntryMasks, Visibility
from fulgurite.errors import ConfigError, DataError

CPU = torch.device("cpu")


def dense(visible):
    """The mask in full. Shape: (M, N)."""
    rows = np.arange(visible.queries)
    first, end = visible.first.at(rows)[:, None], visible.end.at(rows)[:, None]
    columns = np.arange(visible.keys)
    return (columns >= first) & (columns < end)


@st.composite
def masks(draw):
    """Options of a visibility, and the mask that they mean."""
    keys = draw(st.integers(1, 24))
    queries = draw(st.sampled_from([keys, draw(st.integers(1, 24))]))
    offset = draw(st.sampled_from([0, keys - queries, draw(st.integers(-3, 5))]))
    rows, columns = np.arange(queries)[:, None], np.arange(keys)
    positions = rows + offset
    options, mask = {"is_causal": draw(st.booleans())}, np.ones((queries, keys), bool)
    if options["is_causal"]:
        options["prefix"] = draw(st.integers(0, keys))
        mask &= (columns <= positions) | (columns < options["prefix"])
    if draw(st.booleans()):
        left, right = draw(st.integers(1, keys + 1)), draw(st.integers(0, keys))
        options["window"] = draw(st.sampled_from([left, (left, right), (None, right)]))
        both = options["window"]
        left, right = both if isinstance(both, tuple) else (both, None)
        mask &= columns > positions - (left or 99)
        mask &= columns <= positions + (99 if right is None else right)
    if 0 <= offset <= keys - queries:
        if draw(st.booleans()):
            starts = draw(st.sets(st.integers(0, keys - 1), max_size=4))
            options["documents"] = sorted({0, *starts})
            ids = np.searchsorted(options["documents"], np.arange(99), side="right")
            mask &= ids[positions] == ids[columns]
        if draw(st.booleans()):
            size, begin = draw(st.integers(1, 8)), draw(st.integers(0, 9))
            options |= {"chunk": size, "chunk_start": begin}
            mask &= (columns - begin) // size == (positions - begin) // size
    for name, stop, axis in (("key_range", keys, columns), ("query_range", queries, rows)):
        if draw(st.booleans()):
            low = draw(st.integers(0, stop))
            options[name] = low, draw(st.integers(low, stop))
            mask &= (axis >= options[name][0]) & (axis < options[name][1])
    return Visibility.of(queries, keys, EntryMasks(offset=offset, **options)), mask


@settings(deadline=None, max_examples=300)
@given(masks(), st.sampled_from([2, 4, 8]))
def test_each_visible_pair_is_in_one_tile(case, side):
    visible, mask = case
    assert (dense(visible) == mask).all()
    assert visible.pairs() == mask.sum()
    assert not visible.is_full or mask.all()
    counts = np.zeros(mask.shape, int)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles_module, "MASKED_SIDE", side)
        for tile in tiles((0, visible.queries), (0, visible.keys), visible):
            part = np.ones([stop - start for start, stop in (tile.queries, tile.keys)], int)
            if tile.kind is Kind.CAUSAL:
                part = np.tril(part)
            elif tile.kind is Kind.BIAS:
                bias = visible.bias(tile.queries, tile.keys, torch.float32, CPU)
                part = (bias[0, 0] == 0).int().numpy()
            counts[slice(*tile.queries), slice(*tile.keys)] += part
    assert (counts == mask).all()


@settings(deadline=None, max_examples=200)
@given(masks())
def test_intervals_of_rows_are_recognised(case):
    visible, mask = case
    first = np.where(mask.any(1), mask.argmax(1), 3)
    end = np.where(mask.any(1), mask.shape[1] - mask[:, ::-1].argmax(1), 0)
    seen = Visibility.from_intervals(visible.keys, first, end)
    if seen is None:  # a row without keys between rows whose keys overlap has no ascending ends
        assert not mask.any(1).all()
    else:
        assert (dense(seen) == mask).all()


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 5))
def test_bounds_are_their_values(steps, begin):
    values = np.cumsum([begin, *steps])
    bound = Bound.from_values(values)
    queries = np.arange(len(values))
    assert (bound.at(queries) == values).all()
    assert [bound(int(query)) for query in queries] == values.tolist()
    assert Bound.from_values(bound.at(queries)) == bound


def test_a_billion_tokens_are_planned_without_their_rows():
    visible = Visibility.of(
        10**9, 10**9, EntryMasks(is_causal=True, window=4096, documents=[0, 10**6])
    )
    assert visible.pairs() == 2 * (4096 * 4097 // 2) + (10**9 - 2 * 4096) * 4096
    assert 4096 <= visible.reach(2048) <= 4096 + 2048


class Kernels(TorchDispatchMode):
    """Counts calls of the flash kernel, and those under a mask."""

    def __init__(self):
        super().__init__()
        self.calls = self.masked = self.pairs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "flash_attention_for_cpu" in str(func) and "backward" not in str(func):
            self.calls += 1
            self.masked += (kwargs or {}).get("attn_mask") is not None
            rows, keys = args[0].shape[-2], args[1].shape[-2]
            pairs = rows * (rows + 1) // 2 if len(args) > 4 and args[4] else rows * keys
            self.pairs += len(args[0]) * pairs
        return func(*args, **(kwargs or {}))


def test_masks_that_are_intervals_run_without_a_mask():
    """However they are said: nothing is added to scores, and hidden pairs are not computed."""
    query = torch.randn(2, 1, 600, 8)
    causal = torch.ones(600, 600, dtype=torch.bool).tril()
    additive = torch.zeros(600, 600).masked_fill(~causal, -torch.inf)
    padded = causal & (torch.arange(600) >= 100)
    for mask, pairs in (
        (causal, 600 * 601),
        (additive, 600 * 601),
        (causal_upper_left(600, 600), 600 * 601),
        (padded, 500 * 501),
        (torch.arange(600)[None] < 400, 2 * 600 * 400),
    ):
        with Kernels() as kernels:
            out = stream_attention(query, query, query, mask)
        assert (kernels.masked, kernels.pairs) == (0, pairs)
        expected = F.scaled_dot_product_attention(query, query, query, mask)
        torch.testing.assert_close(out, expected)


def test_pytorchs_own_biases_say_where_they_are_aligned():
    query, key = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 9, 8)
    for bias in (causal_lower_right(5, 9), causal_upper_left(5, 9)):
        expected = F.scaled_dot_product_attention(query, key, key, bias)
        torch.testing.assert_close(stream_attention(query, key, key, bias), expected)
    lower = stream_attention(query, key, key, is_causal=True, query_offset="bottom_right")
    expected = F.scaled_dot_product_attention(query, key, key, causal_lower_right(5, 9))
    torch.testing.assert_close(lower, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_of_large_negative_numbers_are_the_plain_mean(dtype):
    """As PyTorch has it, and whatever the tiles: beside such numbers scores have no digits."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 1, 90, 8).to(dtype).requires_grad_() for _ in range(3))
    mask = torch.zeros(90, 90, dtype=dtype)
    mask[:7] = torch.finfo(dtype).min
    mask[:, 50:] = torch.finfo(dtype).min
    with sdpa_kernel(SDPBackend.MATH):  # the flash kernel's own gradients are wrong there
        expected = F.scaled_dot_product_attention(query, key, value, mask)
    out = stream_attention(query, key, value, mask, schedule="rect", memory_budget="100KiB")
    tolerance = {"rtol": 0, "atol": {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)}
    torch.testing.assert_close(out, expected, **tolerance)
    torch.testing.assert_close(out[0, 0, 3], value.mean(2)[0, 0], **tolerance)
    grads = torch.autograd.grad(out.sum(), (query, key, value))
    wanted = torch.autograd.grad(expected.sum(), (query, key, value))
    for got, right in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, right, rtol=0, atol=10 * tolerance["atol"])


def test_ids_of_documents_side_by_side():
    query = torch.randn(2, 1, 6, 4, dtype=torch.float64)
    ids = torch.tensor([[0, 0, 3, 3, 3, 4], [1, 1, 1, 1, 1, 1]])
    mask = (ids[:, :, None] == ids[:, None, :])[:, None]
    expected = F.scaled_dot_product_attention(query, query, query, mask)
    torch.testing.assert_close(stream_attention(query, query, query, documents=ids), expected)
    lists = stream_attention(query, query, query, documents=[[0, 2, 5], [0]])
    torch.testing.assert_close(lists, expected)
    with pytest.raises(DataError, match="comes back after another"):
        stream_attention(query, query, query, documents=torch.tensor([[0, 0, 1, 1, 0, 0]]))
    with pytest.raises(DataError, match=r"Ids of documents are of torch\.float32"):
        stream_attention(query, query, query, documents=torch.full((2, 6), torch.nan))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"window": 3}, ConfigError, "2 queries and 6 keys.*Give query_offset"),
        ({"alibi_slopes": torch.ones(1)}, ConfigError, "2 queries and 6 keys, and alibi_slopes"),
        ({"lengths": [3]}, DataError, "lengths are those of sequences that attend to themselves"),
        ({"window": (0, 3), "query_offset": 0}, ConfigError, r"A window of \(0, 3\)"),
        ({"query_offset": 5, "chunk": 2}, ConfigError, "Queries 5 to 7 are not among the 6 keys"),
        ({"key_mask": torch.ones(1, 5).bool()}, DataError, r"key_mask is \(1, 5\)"),
        ({"key_mask": torch.ones(1, 6)}, DataError, "of torch.float32"),
        ({"key_mask": torch.ones(3, 6).bool()}, DataError, "3 rows for 1 batch"),
        ({"sinks": torch.ones(3)}, DataError, r"sinks is \(3,\) for 1 batch entries of 1 heads"),
        ({"sinks": torch.ones(1, 1, 3)}, DataError, r"sinks are \(1, 1, 3\)"),
        ({"alibi_slopes": torch.ones(1, requires_grad=True), "query_offset": 0}, ConfigError,
         "require gradients"),
        ({"attn_mask": torch.ones(3, 6)}, DataError, r"attn_mask is \(3, 6\), and scores are"),
        ({"attn_mask": torch.ones(6)}, DataError, "with an axis of queries and one of keys"),
        ({"attn_mask": torch.ones(2, 6).double()}, DataError, "of torch.float64, query of"),
        ({"attn_mask": torch.ones(2, 6).long()}, DataError, "Give booleans"),
        ({"prefix": [1, 2], "is_causal": True}, DataError, "2 numbers in prefix for 1 batch"),
        ({"documents": [[0], [0]], "query_offset": 0}, DataError, "of 2 batch entries, of 1"),
    ],
)  # fmt: skip
def test_masks_that_do_not_fit_are_one_clear_error(options, kind, message):
    query, key = torch.randn(1, 1, 2, 8), torch.randn(1, 1, 6, 8)
    with pytest.raises(kind, match=message):
        stream_attention(query, key, key, **options)


def test_tensors_without_numbers_have_a_plan_and_a_result():
    query = torch.empty(2, 4, 4096, 16, device="meta", requires_grad=True)
    key = torch.empty(2, 2, 4096, 24, device="meta")
    plans = []
    out = stream_attention(
        query, key[..., :16], key, enable_gqa=True, window=64, memory_budget="1MiB",
        on_plan=plans.append,
    )  # fmt: skip
    assert (out.shape, out.device.type) == ((2, 4, 4096, 24), "meta")
    assert torch.autograd.grad(out.sum(), query)[0].shape == query.shape
    assert plans[0].peak_bytes <= 2**20
    planned = plan(query, key[..., :16], key, enable_gqa=True, window=64, memory_budget="1MiB")
    assert planned.spec == plans[0].spec
    with FakeTensorMode():
        fake = torch.empty(1, 2, 100, 8)
        assert stream_attention(fake, fake, fake, is_causal=True).shape == fake.shape


def test_gradients_of_gradients_are_refused():
    query = torch.randn(1, 1, 9, 4, dtype=torch.float64, requires_grad=True)
    for schedule in ("whole", "cqs"):
        out = stream_attention(query, query, query, schedule=schedule)
        with pytest.raises(ConfigError, match="no gradients of its gradients"):
            torch.autograd.grad(out.square().sum(), query, create_graph=True)


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_keys_that_are_selected_are_cut_into_tiles(data):
    """Of keys and of blocks, of all heads and of groups of them."""
    heads, sharing, block = data.draw(st.sampled_from([(4, 4, 1), (4, 2, 1), (6, 3, 4), (2, 2, 5)]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    groups, queries, keys = heads // sharing, 7, 23
    indices = torch.randint(-1, -(-keys // block), (2, groups, queries, 3), generator=generator)
    chosen = (torch.arange(keys) // block)[:, None] == indices[..., None, :]
    expected = chosen.any(-1).repeat_interleave(sharing, 1)
    selected = SelectedKeys(indices, heads, block)
    cut = [sorted(data.draw(st.sets(st.integers(0, n), min_size=2, max_size=2)))
           for n in (2, heads, queries, keys)]  # fmt: skip
    batch, head, rows, columns = cut
    tile = selected.tile(ScoreBlock(slice(*batch), slice(*head), tuple(rows), tuple(columns)))
    wanted = expected[tuple(slice(*bounds) for bounds in cut)]
    assert torch.equal(tile.expand(wanted.shape), wanted)


@pytest.mark.parametrize("name", ["attn_mask", "additive", "key_mask", "alibi_slopes"])
def test_a_mask_that_changes_before_the_gradients_is_refused(name):
    """As autograd refuses it; else the gradients would be those of another mask."""
    query = torch.randn(1, 2, 9, 4, dtype=torch.float64, requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    masks = {
        "attn_mask": torch.rand(9, 9, generator=generator) < 0.6,
        "additive": torch.randn(9, 9, generator=generator).double(),
        "key_mask": torch.tensor([[True, False, True, True, False, True, True, True, True]]),
        "alibi_slopes": torch.rand(2, generator=generator).double(),
    }
    mask = masks[name]
    out = stream_attention(query, query, query, **{name.replace("additive", "attn_mask"): mask})
    mask.zero_()
    with pytest.raises(DataError, match="changed in place between the forward pass"):
        out.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_masks_of_half_queries_are_not_rounded(dtype):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 60, 16).to(dtype) for _ in range(3))
    mask = 50 * torch.randn(60, 60)
    mask[5] = torch.finfo(torch.float32).min  # no number of the half type
    exact = [x.double() for x in (query, key, value)]
    expected = F.scaled_dot_product_attention(*exact, mask.double())
    out = stream_attention(query, key, value, mask, memory_budget="64KiB", schedule="rect")
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-2)


def test_sinks_beside_hidden_and_missing_keys():
    query = torch.randn(1, 2, 6, 4, requires_grad=True)
    sinks = torch.tensor([1.5, -torch.inf], requires_grad=True)
    mask = torch.zeros(6, 6)
    mask[0] = torch.finfo(torch.float32).min
    out, lse = stream_attention(query, query, query, mask, sinks=sinks, return_lse=True)
    assert lse[0, 0, 0] == 1.5
    assert not out[0, 0, 0].any()
    hidden = torch.zeros(1, 6, dtype=torch.bool)
    out = stream_attention(query, query, query, key_mask=hidden, sinks=sinks)
    assert not out.any()
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), (query, sinks)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"is_causal": "false"}, "is_causal='false' is no bool"),
        ({"window": 5.9}, "window=5.9 is no whole number"),
        ({"lengths": [2.5]}, "lengths=2.5 is no whole number"),
        ({"chunk": True}, "chunk=True is no whole number"),
        ({"documents": 3}, "documents=3 is no list of numbers"),
        ({"scale": torch.ones((), requires_grad=True)}, "scale is tensor.*learned"),
        ({"softcap": torch.ones(())}, "softcap is tensor"),
        ({"lengths": torch.zeros(1, device="meta").long()}, "lengths has no numbers"),
    ],
)
def test_options_of_another_kind_are_refused(options, message):
    query = torch.randn(1, 1, 6, 4)
    with pytest.raises(ConfigError, match=message):
        stream_attention(query, query, query, **options)
    with pytest.raises(DataError, match="attn_mask is of type list"):
        stream_attention(query, query, query, [[True]])


def test_whole_numbers_of_other_libraries_are_taken():
    query = torch.randn(1, 1, 6, 4)
    expected = stream_attention(query, query, query, window=3, documents=[0, 2], lengths=[5])
    out = stream_attention(
        query, query, query, window=np.int64(3), documents=np.array([0, 2]),
        lengths=torch.tensor([5]),
    )  # fmt: skip
    assert torch.equal(out, expected)


def test_no_program_is_traced_with_a_result_without_numbers():
    class Model(torch.nn.Module):
        def forward(self, x):
            return stream_attention(x, x, x, is_causal=True)

    with pytest.raises(Exception, match="cannot be traced"):
        torch.export.export(Model(), (torch.randn(1, 1, 6, 4),), strict=False)
