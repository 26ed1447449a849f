"""The kernels of CUDA without a GPU: shapes under fake tensors, numbers with the operators replaced
by ones of the same demands and habits, and the choice between kernels.
"""

import functools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fulgurite.attention import kernel_checks, kernel_choice, stream_attention
from fulgurite.attention.cuda_kernels import (
    CUDA_KERNELS,
    AtenCudaEfficient,
    AtenCudaFlash,
    AtenCudnn,
    align_rows,
)
from fulgurite.attention.kernel_checks import KernelUse, compare_kernel
from fulgurite.attention.kernel_choice import (
    CheckedKernels,
    cuda_kernel,
    kernel_for,
    prefers_cudnn,
)
from fulgurite.attention.kernels import (
    AtenCpuFlash,
    MathKernel,
    TileInputs,
    accumulator_dtype,
)
from fulgurite.errors import ConfigError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HALF = (torch.float16, torch.bfloat16)
DTYPES = {AtenCudaFlash: HALF, AtenCudnn: HALF, AtenCudaEfficient: (*HALF, torch.float32)}
NAMES = {AtenCudaFlash: "flash", AtenCudnn: "cudnn", AtenCudaEfficient: "efficient"}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}

# B, H, G, M, N, D: one head, grouped heads, sizes that are multiples of nothing, long rows
SIZES = [(1, 1, 1, 64, 64, 64), (2, 4, 2, 37, 50, 20), (1, 6, 1, 33, 7, 5), (2, 3, 3, 5, 70, 72)]


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """No kernel is known to be right or wrong, and cuDNN is a sound one."""
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91501)
    compare_kernel.cache_clear()
    yield
    compare_kernel.cache_clear()


def cases(kernels=tuple(DTYPES)):
    for kernel in kernels:
        for dtype in DTYPES[kernel]:
            for sizes in SIZES:
                kinds = ("full", "causal", "bias")
                for kind in kinds if kernel is AtenCudaEfficient else kinds[:2]:
                    yield pytest.param(kernel, dtype, sizes, kind, id=name_of(kernel, dtype, kind))


def name_of(kernel, dtype, kind):
    return f"{NAMES[kernel]}-{str(dtype)[6:]}-{kind}"


def tile(sizes, dtype, kind, device=CPU):
    """Query, key, value, gradient and bias as tiles are: slices of larger tensors."""
    batch, heads, kv_heads, queries, keys, size = sizes
    keys = queries if kind == "causal" else keys

    def draw(heads, tokens):
        make = functools.partial(torch.empty if device != CPU else torch.randn, dtype=dtype)
        return make(batch, heads, tokens + 3, size, device=device).narrow(2, 1, tokens)

    query, grad = draw(heads, queries), draw(heads, queries)
    key, value = draw(kv_heads, keys), draw(kv_heads, keys)
    bias = None
    if kind == "bias":
        bias = torch.zeros(1, 1, queries, keys, dtype=dtype, device=device)
        if device == CPU:
            bias[..., 2:3, :] = bias[..., 4:, keys // 2 :] = -math.inf
    return query, key, value, grad, bias


@pytest.mark.parametrize(("kernel", "dtype", "sizes", "kind"), [*cases()])
def test_operators_take_what_they_are_given(kernel, dtype, sizes, kind):
    """With the operators' own shape functions, on tensors that say that they are on a GPU."""
    with FakeTensorMode():
        query, key, value, grad, bias = tile(sizes, dtype, kind, CUDA)
        assert query.device.type == "cuda"
        assert kernel().takes(TileInputs(query, key, value, 0.3, kind == "causal", bias))
        options = {"is_causal": kind == "causal", "scale": 0.3, "bias": bias}
        out, lse = kernel().forward(TileInputs(query, key, value, **options))
        grads = kernel().backward(TileInputs(query, key, value, **options), grad, out, lse)
    for result, like in zip((out, *grads), (query, query, key, value), strict=True):
        assert (result.shape, result.dtype, result.device) == (like.shape, dtype, query.device)
    assert (lse.shape, lse.dtype) == (query.shape[:-1], torch.float32)
    assert lse.device == query.device


def refuse_unaligned(*tensors):
    """What kernels that load 16 bytes at once cannot read."""
    for x in tensors:
        steps = [x.storage_offset(), *x.stride()[:-1]]
        if x.stride(-1) != 1 or any(step * x.element_size() % 16 for step in steps):
            raise RuntimeError("misaligned address")


def refuse_types(dtypes, *tensors):
    if any(x.dtype not in dtypes for x in tensors) or len({x.dtype for x in tensors}) > 1:
        raise RuntimeError(f"only {dtypes}")


def exact(query, key, value, is_causal, scale, bias):
    """MathKernel in float32 on the same numbers."""
    bias = None if bias is None else bias.float()
    options = {"is_causal": is_causal, "scale": scale, "bias": bias}
    return tuple(x.float() for x in (query, key, value)), options


class Operators:
    """Stand-ins for the operators: what PyTorch's documentation and sources say of them.

    Where these say nothing, the worst is taken: nan for rows without keys, nan from infinities.
    """

    def __init__(self):
        self.calls = []

    def flash(self, query, key, value, dropout_p, is_causal, return_debug_mask=False, *, scale):
        self.calls.append("flash")
        refuse_types(HALF, query, key, value)
        refuse_unaligned(query, key, value)
        assert dropout_p == 0
        assert query.shape[-1] % 8 == 0
        assert query.shape[-1] <= 256
        assert not is_causal or query.shape[2] == key.shape[2]  # another corner than ours
        inputs, options = exact(query, key, value, is_causal, scale, None)
        out, lse = MathKernel().forward(TileInputs(*inputs, **options))
        return out.to(query.dtype), lse, None, None, 0, 0, None, None, None

    def flash_backward(
        self, grad, query, key, value, out, lse, cum_q, cum_k, max_q, max_k, dropout_p, is_causal,
        seed, offset, *, scale,
    ):  # fmt: skip
        self.calls.append("flash backward")
        refuse_types(HALF, grad, query, key, value, out)
        refuse_unaligned(grad, query, key, value, out)
        assert (max_q, max_k, cum_q, cum_k) == (query.shape[2], key.shape[2], None, None)
        assert isinstance(seed, torch.Tensor)
        assert isinstance(offset, torch.Tensor)
        heads, rows = lse.shape[1:]  # its strides are not looked at
        lse = lse.as_strided(lse.shape, (heads * rows, rows, 1))
        inputs, options = exact(query, key, value, is_causal, scale, None)
        grads = MathKernel().backward(
            TileInputs(*inputs, **options), grad.float(), out.float(), lse
        )
        return tuple(x.to(query.dtype) for x in grads)

    def efficient(
        self, query, key, value, bias, compute_lse, dropout_p=0.0, is_causal=False, *, scale
    ):
        self.calls.append("efficient")
        self._check_efficient(query, key, value, bias)
        assert compute_lse
        inputs, options = exact(query, key, value, is_causal, scale, bias)
        out, lse = MathKernel().forward(TileInputs(*inputs, **options))
        empty = lse == -math.inf
        out, lse = out.masked_fill(empty[..., None], math.nan), lse.masked_fill(empty, 0.0)
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
        lse = F.pad(lse, (0, -lse.shape[-1] % 32), value=math.inf)
        return out.to(query.dtype), lse, None, None

    def efficient_backward(
        self, grad, query, key, value, bias, out, lse, seed, offset, dropout_p, mask,
        is_causal=False, *, scale,
    ):  # fmt: skip
        self.calls.append("efficient backward")
        self._check_efficient(query, key, value, bias)
        refuse_types((query.dtype,), grad, out)
        refuse_unaligned(grad, out)
        assert (dropout_p, mask) == (0.0, [True, True, True, False])
        batch, heads, rows, size = query.shape
        assert lse.shape == (batch, heads, -(-rows // 32) * 32)
        assert lse[..., rows:].eq(math.inf).all()
        if (heads > 1 and lse.stride(1) % 8) or (batch > 1 and lse.stride(0) % 8):
            raise RuntimeError("LSE is not correctly aligned (strideH)")
        # its strides are taken from the sizes
        out = out.as_strided(out.shape, (out.stride(0), out.stride(1), heads * size, 1))
        inputs, options = exact(query, key, value, is_causal, scale, bias)
        grads = MathKernel().backward(
            TileInputs(*inputs, **options), grad.float(), out.float(), lse[..., :rows]
        )
        return *(
            x.to(query.dtype).transpose(1, 2).contiguous().transpose(1, 2) for x in grads
        ), None

    def _check_efficient(self, query, key, value, bias):
        refuse_types((*HALF, torch.float32), query, key, value)
        refuse_unaligned(query, key, value)
        assert query.shape[-1] % 8 == 0
        if query.shape[1] != key.shape[1] or key.shape != value.shape:
            raise RuntimeError("query.size(2) == key.size(2)")
        if bias is not None:
            refuse_types((query.dtype,), bias)
            refuse_unaligned(bias)
            assert bias.shape == (*query.shape[:3], key.shape[2])
            row = -(-key.shape[2] // 8) * 8 * bias.element_size()
            assert bias.untyped_storage().nbytes() <= query.shape[2] * row  # a view for all heads

    def cudnn(
        self, query, key, value, bias, compute_lse, dropout_p=0.0, is_causal=False,
        return_debug_mask=False, *, scale,
    ):  # fmt: skip
        self.calls.append("cudnn")
        self._check_cudnn(query, key, value, bias)
        assert compute_lse
        inputs, options = exact(query, key, value, is_causal, scale, bias)
        out, lse = MathKernel().forward(TileInputs(*inputs, **options))
        empty = lse == -math.inf
        out, lse = out.masked_fill(empty[..., None], math.nan), lse.masked_fill(empty, math.nan)
        return out.to(query.dtype), lse[..., None], None, None, 0, 0, None, None, None

    def cudnn_backward(
        self, grad, query, key, value, out, lse, seed, offset, bias, cum_q, cum_k, max_q, max_k,
        dropout_p, is_causal, *, scale,
    ):  # fmt: skip
        self.calls.append("cudnn backward")
        self._check_cudnn(query, key, value, bias)
        refuse_types(HALF, grad, query, out)
        refuse_unaligned(grad, out)
        assert (max_q, max_k, cum_q, cum_k) == (query.shape[2], key.shape[2], None, None)
        assert lse.shape == (*query.shape[:3], 1)
        assert lse.is_contiguous()
        assert seed.device == offset.device == query.device  # made 64 bit on some devices
        lse = lse[..., 0].masked_fill(lse[..., 0] == math.inf, math.nan)
        inputs, options = exact(query, key, value, is_causal, scale, bias)
        grads = MathKernel().backward(
            TileInputs(*inputs, **options), grad.float(), out.float(), lse
        )
        return tuple(x.to(query.dtype) for x in grads)

    def _check_cudnn(self, query, key, value, bias):
        refuse_types(HALF, query, key, value)
        refuse_unaligned(query, key, value)
        assert query.shape[-1] % 8 == 0
        assert query.shape[-1] <= 128
        assert query.shape[2] > 1
        assert key.shape[2] > 1
        assert bias is None  # its gradients would be wrong


@pytest.fixture
def operators(monkeypatch):
    found = Operators()
    for name in ("flash", "efficient", "cudnn"):
        for end in ("", "_backward"):
            operator = f"_scaled_dot_product_{name}_attention{end}"
            monkeypatch.setattr(torch.ops.aten, operator, getattr(found, name + end))
    return found


@pytest.mark.parametrize(("kernel", "dtype", "sizes", "kind"), [*cases()])
def test_kernels_give_what_matrix_products_give(operators, kernel, dtype, sizes, kind):
    torch.manual_seed(0)
    query, key, value, grad, bias = tile(sizes, dtype, kind)
    options = {"is_causal": kind == "causal", "scale": 0.4, "bias": bias}
    close = functools.partial(torch.testing.assert_close, rtol=0, atol=TOLERANCE[dtype])
    out, lse = kernel().forward(TileInputs(query, key, value, **options))
    expected = MathKernel().forward(TileInputs(query, key, value, **options))
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    close(out, expected[0])
    close(lse, expected[1])
    if kind == "bias":
        assert not out[:, :, 2].any()
        assert (lse[:, :, 2] == -math.inf).all()
    # log-sum-exps over more keys, in tensors of which the tile has some rows
    lse = (lse + 0.5).masked_fill(lse == -math.inf, math.inf)
    lse = F.pad(lse, (2, 3), value=7.0).narrow(-1, 2, query.shape[2])
    out = F.pad(out, (0, 0, 2, 3), value=7.0).narrow(2, 2, query.shape[2])
    grads = kernel().backward(TileInputs(query, key, value, **options), grad, out, lse)
    expected = MathKernel().backward(TileInputs(query, key, value, **options), grad, out, lse)
    for got, right, like in zip(grads, expected, (query, key, value), strict=True):
        assert got.dtype == dtype
        assert got.shape == like.shape
        close(got / right.abs().max(), right / right.abs().max())
    assert operators.calls == [NAMES[kernel], f"{NAMES[kernel]} backward"]


@pytest.mark.parametrize("kernel", DTYPES)
def test_any_memory_layout_will_do(operators, kernel):
    """Token-major memory, memory that begins at an odd place, columns, one vector for all rows."""
    torch.manual_seed(0)
    plain = torch.randn(2, 4, 40, 16, dtype=torch.float16)
    layouts = {
        "token-major": plain.transpose(1, 2).contiguous().transpose(1, 2),
        "odd start": torch.cat([plain.new_zeros(3), plain.flatten()])[3:].view(plain.shape),
        "odd rows": F.pad(plain, (0, 3)).narrow(-1, 0, 16),
        "columns": plain.mT.contiguous().mT,
        "every eighth": torch.randn(2, 4, 40, 128).half()[..., ::8],
        "one vector": plain[:1, :1, :1].expand(plain.shape),
    }
    bias = None
    if kernel is AtenCudaEfficient:
        bias = torch.zeros(1, 1, 40, 45)[..., 5:].masked_fill(torch.rand(40, 40) > 0.8, -math.inf)
    options = {"is_causal": False, "scale": 0.3, "bias": bias}
    for tensor in layouts.values():
        out, lse = kernel().forward(TileInputs(tensor, tensor, tensor, **options))
        expected, expected_lse = MathKernel().forward(TileInputs(tensor, tensor, tensor, **options))
        torch.testing.assert_close(out, expected, rtol=0, atol=2e-3)
        torch.testing.assert_close(lse, expected_lse)
        inputs = TileInputs(tensor, tensor, tensor, **options), tensor, tensor, expected_lse
        grads = kernel().backward(*inputs)
        for got, right in zip(grads, MathKernel().backward(*inputs), strict=True):
            torch.testing.assert_close(got, right, rtol=0, atol=2e-3 * float(right.abs().max()))


def test_what_needs_no_copy_is_not_copied():
    plain = torch.zeros(2, 4, 40, 16, dtype=torch.float16)
    assert align_rows(plain[:, 1:3, 7:20]).data_ptr() == plain[:, 1:3, 7:20].data_ptr()
    bias = torch.zeros(1, 1, 40, 24, dtype=torch.float16)
    plain_21 = plain[:, :, :21]
    taken = AtenCudaEfficient().align_tile(
        TileInputs(plain, plain_21, plain_21, 1.0, False, bias[..., :21])
    )
    assert taken.key.data_ptr() == taken.value.data_ptr() == plain.data_ptr()
    assert taken.bias.data_ptr() == bias.data_ptr()


def test_each_tile_gets_a_kernel_that_takes_it(operators):
    def kernels(dtype, sizes, prefer=None, kinds=("full", "causal", "bias")):
        chosen = kernel_for(CUDA, dtype, prefer=prefer)
        for kind in kinds:
            query, key, value, _, bias = tile(sizes, dtype, kind)
            inputs = TileInputs(query, key, value, 0.3, kind == "causal", bias)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                yield type(chosen.kernel(inputs))

    flash, cudnn, efficient = AtenCudaFlash, AtenCudnn, AtenCudaEfficient
    sizes, long = SIZES[1], (1, 2, 1, 9, 9, 136)
    for dtype in HALF:
        assert list(kernels(dtype, sizes)) == [flash, flash, efficient]
        assert list(kernels(dtype, sizes, "cudnn")) == [cudnn, cudnn, efficient]
        assert list(kernels(dtype, sizes, "efficient")) == [efficient] * 3
        assert list(kernels(dtype, (1, 2, 1, 1, 9, 8))) == [flash, flash, efficient]
        assert list(kernels(dtype, long, "cudnn")) == [flash, flash, efficient]
        assert list(kernels(dtype, (1, 1, 1, 9, 9, 264))) == [efficient] * 3
        query, key = torch.zeros(1, 1, 9, 8, dtype=dtype), torch.zeros(1, 1, 12, 8, dtype=dtype)
        assert not flash().takes(TileInputs(query, key, key, 0.3, True))
    assert list(kernels(torch.float32, sizes)) == [efficient] * 3
    assert list(kernels(torch.float32, sizes, "flash")) == [efficient] * 3
    assert isinstance(kernel_for(CUDA, torch.float64), MathKernel)
    assert isinstance(kernel_for(CUDA, torch.bfloat16, prefer="math"), MathKernel)
    assert isinstance(kernel_for(torch.device("meta"), torch.float32), MathKernel)
    with pytest.raises(ConfigError, match="no attention kernel 'cuddn'"):
        kernel_for(CUDA, torch.bfloat16, prefer="cuddn")
    with pytest.raises(ConfigError, match=r"does not do torch\.int64"):
        kernel_for(CUDA, torch.int64)
    query, key, value, _, bias = tile(sizes, torch.float16, "bias")
    with pytest.raises(ConfigError, match="no bias"):
        flash().forward(TileInputs(query, key, value, 1.0, False, bias))


def test_cudnn_is_not_used_where_order_must_be_fixed(operators):
    query, key, value, *_ = tile(SIZES[1], torch.float16, "full")
    asked = functools.partial(AtenCudnn().takes, TileInputs(query, key, value, 0.3))
    assert asked()
    for warn_only in (True, False):
        torch.use_deterministic_algorithms(True, warn_only=warn_only)
        try:
            assert asked() is warn_only
        finally:
            torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("version", "is_sound"), [(None, False), (91500, False), (91501, True)])
def test_unsound_versions_of_cudnn_are_not_used(monkeypatch, version, is_sound):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    query, key, value, *_ = tile(SIZES[1], torch.bfloat16, "full")
    assert AtenCudnn().takes(TileInputs(query, key, value, 0.3)) is is_sound


def test_cudnn_comes_first_for_large_tiles_where_it_is_the_fastest(operators, monkeypatch):
    def name(tokens, prefer=None):
        rows = torch.empty(1, 1, tokens, 64, dtype=torch.bfloat16, device="meta")
        return cuda_kernel(torch.bfloat16, prefer).kernel_name(TileInputs(rows, rows, rows, 1.0))

    monkeypatch.setattr(kernel_choice, "is_right", lambda *_, **use: True)
    assert [name(4095), name(4096)] == ["flash", "flash"]
    monkeypatch.setattr(kernel_choice, "prefers_cudnn", lambda device: True)
    assert [name(4095), name(4096)] == ["flash", "cudnn"]
    assert [name(64, "flash"), name(8192, "flash")] == ["flash", "flash"]
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91500)
    assert name(8192) == "flash"


@pytest.mark.parametrize("generation", [8, 9, 10, 12])
def test_generations_of_gpus_that_cudnn_is_the_fastest_on(monkeypatch, generation):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (generation, 0))
    prefers_cudnn.cache_clear()
    try:
        assert prefers_cudnn(CUDA) is (generation in (9, 10))
    finally:
        prefers_cudnn.cache_clear()


def test_a_kernel_is_not_compared_while_a_graph_is_captured(monkeypatch):
    """The comparison waits for numbers, and a failure would be remembered."""
    capturing = [True]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(kernel_checks, "find_fault", lambda *_: None)
    ask = functools.partial(compare_kernel, "flash", KernelUse(CUDA, HALF[0], 64))
    with pytest.raises(ConfigError, match="Run the step once before capturing it"):
        ask()
    capturing[0] = False
    assert ask()
    capturing[0] = True
    assert ask()


class HalfFullBlock(MathKernel):
    """Goes wrong as cuDNN does: exp(0 - lse) of padded keys overflows in half of its blocks."""

    def takes(self, tile):
        return True

    def backward(self, tile, grad, out, lse):
        grads = super().backward(tile, grad, out, lse)
        if tile.key.shape[2] % 128 == 64 and float(lse.min()) < -88.7:
            return grads[0] * math.nan, *grads[1:]
        return grads


@pytest.mark.parametrize("kind", ["full", "bias"])
def test_the_comparison_has_small_log_sum_exps_in_half_full_blocks(monkeypatch, kind):
    chosen = chosen_from(monkeypatch, HalfFullBlock())
    query, key, value, _, bias = tile(SIZES[1], torch.bfloat16, kind)
    with pytest.warns(UserWarning, match="its gradient of query is off by nan"):
        kernel = chosen.kernel(TileInputs(query, key, value, 0.3, False, bias))
    assert type(kernel) is MathKernel


def test_cpu_has_its_own_kernel():
    for dtype in (torch.float64, torch.float32, *HALF):
        assert isinstance(kernel_for(CPU, dtype), AtenCpuFlash)
        assert isinstance(kernel_for(CPU, dtype, prefer="cudnn"), AtenCpuFlash)


class Right(MathKernel):
    """Takes everything."""

    def __init__(self):
        self.forwards = 0

    def takes(self, tile):
        return True

    def forward(self, tile):
        self.forwards += 1
        return super().forward(tile)


class Raising(Right):
    def forward(self, tile):
        raise NotImplementedError("No such kernel on this device.\nMore about it.")


class RaisingBackward(Right):
    def backward(self, tile, *rows):
        raise RuntimeError("no engine")


class WrongOut(Right):
    def forward(self, tile):
        out, lse = super().forward(tile)
        out[0, -1, -1, -1] += 0.5  # one number
        return out, lse


class WrongLse(Right):
    def forward(self, tile):
        out, lse = super().forward(tile)
        return out, lse / math.log(2)


class WrongEmptyRows(Right):
    def forward(self, tile):
        out, lse = super().forward(tile)
        return out, lse.nan_to_num(neginf=0.0)


class WrongShape(Right):
    def forward(self, tile):
        out, lse = super().forward(tile)
        return out, lse[..., None]


class WrongBackward(Right):
    def backward(self, tile, *rows):
        dquery, dkey, dvalue = super().backward(tile, *rows)
        return dquery, dkey * 1.1, dvalue


class WrongCausal(Right):
    def forward(self, tile):
        return super().forward(tile._replace(is_causal=False))


class Nan(Right):
    def backward(self, tile, *rows):
        dquery, dkey, dvalue = super().backward(tile, *rows)
        return dquery, dkey, dvalue * math.nan


class OwnLse(Right):
    """Takes the tile's own log-sum-exp for the one over all keys."""

    def backward(self, tile, grad, out, lse):
        _, own = MathKernel().forward(tile)
        return super().backward(tile, grad, out, own)


class OwnOut(Right):
    """Takes the tile's own out for the one over all keys."""

    def backward(self, tile, grad, out, lse):
        own, _ = MathKernel().forward(tile)
        return super().backward(tile, grad, own, lse)


def chosen_from(monkeypatch, *kernels):
    """Chooses from other kernels."""
    named = {f"kernel{i}": kernel for i, kernel in enumerate(kernels)}
    for name, kernel in named.items():
        monkeypatch.setitem(CUDA_KERNELS, name, kernel)
    return CheckedKernels(tuple(named))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(
    ("wrong", "kind", "why"),
    [
        (Raising, "full", r"it raised NotImplementedError: No such kernel on this device\.\.$"),
        (RaisingBackward, "full", "it raised RuntimeError: no engine"),
        (WrongOut, "full", "its out is off by 0.*is allowed"),
        (WrongOut, "bias", "its out is off by 0.*is allowed"),
        (WrongLse, "full", "its log-sum-exp is off by 0.44"),
        (WrongEmptyRows, "bias", "its log-sum-exp is off by inf"),
        (WrongShape, "full", r"its log-sum-exp is \(2, 4, 45, 1\) in torch.float32"),
        (WrongBackward, "full", "its gradient of key is off by 0.1"),
        (WrongCausal, "full", "its out is off by"),
        (Nan, "full", "its gradient of value is off by nan"),
        (OwnLse, "full", "its gradient of query is off by"),
        (OwnOut, "full", "its gradient of query is off by"),
    ],
)
def test_a_wrong_kernel_is_named_and_not_used(monkeypatch, dtype, wrong, kind, why):
    torch.manual_seed(0)
    first, right = wrong(), Right()
    chosen = chosen_from(monkeypatch, first, right)
    query, key, value, grad, bias = tile(SIZES[1], dtype, kind)
    options = {"is_causal": False, "scale": 0.3, "bias": bias}
    under = " under a bias" if kind == "bias" else ""
    message = f"The kernel0 kernel is not used for attention{under} in {str(dtype)[6:]} "
    with pytest.warns(UserWarning, match=message + f"with head size 20 on cpu: {why}"):
        out, lse = chosen.forward(TileInputs(query, key, value, **options))
    assert chosen.kernel(TileInputs(query, key, value, **options)) is right
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        grads = chosen.backward(TileInputs(query, key, value, **options), grad, out, lse)
    expected = MathKernel().forward(TileInputs(query, key, value, **options))
    torch.testing.assert_close((out, lse), expected, rtol=0, atol=0)
    expected = MathKernel().backward(TileInputs(query, key, value, **options), grad, out, lse)
    torch.testing.assert_close(grads, expected, rtol=0, atol=0, equal_nan=True)


def test_without_a_right_kernel_matrix_products_compute(monkeypatch):
    chosen = chosen_from(monkeypatch, Raising(), WrongBackward())
    query, key, value, *_ = tile(SIZES[1], torch.float16, "full")
    with pytest.warns(UserWarning, match="is not used") as warned:
        assert isinstance(chosen.kernel(TileInputs(query, key, value, 0.3)), MathKernel)
    names = [str(warning.message).split()[1] for warning in warned]
    assert names == ["kernel0", "kernel1"]


def test_kernels_are_compared_once_for_each_type_and_head_size(monkeypatch):
    right = Right()
    chosen = chosen_from(monkeypatch, right)
    compared = []
    for size, dtype in ((20, HALF[0]), (20, HALF[0]), (24, HALF[0]), (20, HALF[1])):
        query, key, value, *_ = tile((*SIZES[1][:5], size), dtype, "full")
        before = right.forwards
        chosen.kernel(TileInputs(query, key, value, 0.3))
        compared.append(right.forwards - before)
    assert compared == [3, 0, 3, 3]  # full, causal, and with small log-sum-exps
    bias = torch.zeros(1, 1, 1, key.shape[2], dtype=key.dtype)
    chosen.kernel(TileInputs(query, key, value, 0.3, False, bias))
    assert right.forwards == sum(compared) + 2


def test_memory_that_runs_out_says_nothing_about_a_kernel(monkeypatch):
    class Full(Right):
        def forward(self, tile):
            if self.forwards == 0:
                self.forwards = 1
                raise torch.OutOfMemoryError
            return super().forward(tile)

    kernel = Full()
    chosen = chosen_from(monkeypatch, kernel)
    query, key, value, *_ = tile(SIZES[1], torch.float16, "full")
    with pytest.raises(torch.OutOfMemoryError):
        chosen.kernel(TileInputs(query, key, value, 0.3))
    assert chosen.kernel(TileInputs(query, key, value, 0.3)) is kernel


def test_kernels_are_compared_apart_from_what_goes_on(monkeypatch):
    """Within inference mode, autocast, fake tensors, a counter of operations and a backward."""

    class Counter(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += 1
            return func(*args, **kwargs or {})

    right = Right()
    chosen = chosen_from(monkeypatch, right)
    query, key, value, *_ = tile(SIZES[1], torch.float32, "full")
    ask = functools.partial(chosen.kernel, TileInputs(query, key, value, 0.3))
    state = torch.get_rng_state()
    counter = Counter()
    for mode in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), counter):
        compare_kernel.cache_clear()
        with mode:
            assert ask() is right
    assert counter.count == 0
    compare_kernel.cache_clear()
    with FakeTensorMode() as fake:
        inputs = (fake.from_tensor(x) for x in (query, key, value))
        assert chosen.kernel(TileInputs(*inputs, 0.3)) is right
    compare_kernel.cache_clear()
    found = []
    weight = torch.ones(3, requires_grad=True)
    loss = (weight * 2).sum()
    loss.register_hook(lambda grad: found.append(ask()))
    loss.backward()
    assert found == [right]
    assert torch.equal(torch.get_rng_state(), state)


def test_matrix_products_compute_the_same_under_autocast():
    torch.manual_seed(0)
    query, key, value, grad, _ = tile(SIZES[1], torch.float32, "full")
    options = {"is_causal": False, "scale": 0.3}
    out, lse = MathKernel().forward(TileInputs(query, key, value, **options))
    grads = MathKernel().backward(TileInputs(query, key, value, **options), grad, out, lse)
    with torch.autocast("cpu", torch.bfloat16):
        again = MathKernel().forward(TileInputs(query, key, value, **options))
        grads_again = MathKernel().backward(
            TileInputs(query, key, value, **options), grad, out, lse
        )
    torch.testing.assert_close((out, lse, *grads), (*again, *grads_again), rtol=0, atol=0)


def test_a_compiler_takes_the_comparison_for_a_constant(monkeypatch):
    right = Right()
    chosen = chosen_from(monkeypatch, right)
    query, key, value, *_ = tile(SIZES[1], torch.float16, "full")

    def attend(query, key, value):
        return chosen.forward(TileInputs(query, key, value, 0.3))[0]

    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(query, key, value), attend(query, key, value))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_where_there_is_no_gpu_no_kernel_of_cuda_is_right():
    with FakeTensorMode():
        query, key, value, *_ = tile(SIZES[1], torch.float16, "full", CUDA)
        with pytest.warns(UserWarning, match="is not used .* it raised .*(CUDA|NVIDIA)"):
            kernel = kernel_for(CUDA, torch.float16).kernel(TileInputs(query, key, value, 0.3))
    assert isinstance(kernel, MathKernel)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("kernel", DTYPES)
def test_kernels_are_right_on_this_gpu(kernel):
    device = torch.device("cuda", torch.cuda.current_device())
    for dtype in DTYPES[kernel]:
        for size in (20, 64, 128):
            for biased in (False, True)[: 1 + (kernel is AtenCudaEfficient)]:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    assert compare_kernel(NAMES[kernel], KernelUse(device, dtype, size, biased))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streams_run_on_the_kernels(monkeypatch, operators, dtype):
    """All of streamed attention, as on CUDA, against one call of PyTorch's."""
    chosen = cuda_kernel(dtype)
    for name in ("forward", "backward"):
        monkeypatch.setattr(AtenCpuFlash, name, staticmethod(getattr(chosen, name)))
    torch.manual_seed(0)
    query, grad = (torch.randn(2, 4, 70, 20, dtype=dtype) for _ in range(2))
    key, value = (torch.randn(2, 2, 70, 20, dtype=dtype) for _ in range(2))
    inputs = [x.requires_grad_() for x in (query, key, value)]
    distance = torch.arange(70)[:, None] - torch.arange(70)
    for window in (None, 9):
        seen = (distance >= 0) & (distance < (window or 70))
        out = stream_attention(
            *inputs, is_causal=True, enable_gqa=True, window=window, memory_budget="256KiB",
            schedule="rect",
        )  # fmt: skip
        grads = torch.autograd.grad(out, inputs, grad)
        exact = [x.detach().double().requires_grad_() for x in inputs]
        mask = torch.zeros(70, 70, dtype=torch.float64).masked_fill(~seen, -math.inf)
        expected = F.scaled_dot_product_attention(*exact, attn_mask=mask, enable_gqa=True)
        expected_grads = torch.autograd.grad(expected, exact, grad.double())
        for got, right in zip((out, *grads), (expected, *expected_grads), strict=True):
            right = right.detach()
            torch.testing.assert_close(
                got.double(), right, rtol=0, atol=TOLERANCE[dtype] * float(right.abs().max())
            )
    names = {"efficient"} if dtype == torch.float32 else {"flash", "efficient"}
    assert set(operators.calls) == {name + end for name in names for end in ("", " backward")}
    assert accumulator_dtype(dtype) == torch.float32
