"""The strategy that streams attention: exact training, nothing left behind, nothing missed."""

import pytest
import torch
from fakes.trainers import quiet_trainer
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from fulgurite.attention import InCore, Streamed
from fulgurite.attention.backend import backend_slots
from fulgurite.errors import ConfigError, DataError
from fulgurite.strategies import OffloadOptions, StreamCQSAStrategy, offloading
from fulgurite.strategies.interception import streamed_sdpa

TOKENS, WIDTH = 48, 16


class OwnAttention(nn.Module):
    """Speaks the protocol; recomputed in backward."""

    def __init__(self):
        super().__init__()
        self.attention_backend = InCore()
        self.qkv, self.out = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def _heads(self, x):
        q, k, v = self.qkv(x).split([WIDTH, WIDTH // 2, WIDTH // 2], -1)
        q, k, v = (t.unflatten(-1, (-1, 4)).transpose(1, 2) for t in (q, k, v))
        return self.attention_backend(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    def forward(self, x):
        return x + self.out(checkpoint(self._heads, x, use_reentrant=False))


class DirectAttention(OwnAttention):
    """Calls PyTorch's function and knows nothing of backends."""

    def __init__(self):
        super().__init__()
        del self.attention_backend

    def _heads(self, x):
        q, k, v = self.qkv(x).split([WIDTH, WIDTH // 2, WIDTH // 2], -1)
        q, k, v = (t.unflatten(-1, (-1, 4)).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)


class Stock(nn.Module):
    """PyTorch's own layer, causal."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout, batch_first=True)

    def forward(self, x):
        return self.layer(x)


class Model(LightningModule):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.losses = []

    def training_step(self, batch, _):
        loss = (self.layers(batch) - batch.roll(1, dims=1)).square().mean()
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch, _):
        self.log("val/loss", self.training_step(batch, _))

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(1)
        data = torch.randn(24, TOKENS, WIDTH, generator=generator, dtype=self.dtype)
        return DataLoader(list(data), batch_size=2)

    val_dataloader = train_dataloader

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def trained(tmp_path, model, strategy="auto", **options):
    trainer = quiet_trainer(
        max_epochs=1, limit_val_batches=1, strategy=strategy, default_root_dir=tmp_path,
        **({"precision": "64-true"} | options),
    )  # fmt: skip
    trainer.fit(model)
    return torch.stack(model.losses)


@pytest.mark.parametrize(
    ("layer", "options", "calls"),
    [
        pytest.param(
            OwnAttention, {}, 2 * (12 * 2 + 1), marks=pytest.mark.slow
        ),  # layers x (steps, each twice, + validation)
        (DirectAttention, {"intercept_sdpa": True}, 2 * (12 * 2 + 1)),
        (Stock, {"intercept_sdpa": True}, 2 * (12 + 1)),
    ],
)
@pytest.mark.parametrize("schedule", ["rect", "cqs"])
def test_training_is_that_of_attention_in_core(tmp_path, layer, options, calls, schedule):
    losses = []
    strategy = StreamCQSAStrategy("16KiB", schedule, **options)
    original = F.scaled_dot_product_attention
    for chosen in ("auto", strategy):
        seed_everything(0)
        losses.append(trained(tmp_path, Model(layer(), layer()), chosen))
    assert len(losses[0]) == 13
    assert losses[0][11] < losses[0][0]
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-10)
    assert strategy.backend.calls == calls
    assert F.scaled_dot_product_attention is original


def test_the_model_gets_its_own_backends_back(tmp_path):
    model = Model(OwnAttention(), OwnAttention())
    before = [layer.attention_backend for layer in model.layers]
    trained(tmp_path, model, StreamCQSAStrategy(None))
    assert [layer.attention_backend for layer in model.layers] == before
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true"])
def test_the_name_and_other_precisions_work(tmp_path, precision):
    losses = []
    for strategy in ("auto", "stream_cqsa"):
        seed_everything(0)
        model = Model(OwnAttention())
        losses.append(trained(tmp_path, model, strategy, precision=precision))
    torch.testing.assert_close(losses[1].float(), losses[0].float(), rtol=2e-2, atol=2e-2)


def test_attention_out_of_reach_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"finds no attention in Model.*"):
        trained(tmp_path, Model(DirectAttention()), StreamCQSAStrategy())
    with pytest.raises(ConfigError, match="streamed no attention in this step"):
        trained(tmp_path, Model(nn.Linear(WIDTH, WIDTH)), StreamCQSAStrategy(intercept_sdpa=True))
    assert torch.backends.mha.get_fastpath_enabled()


def test_what_cannot_be_streamed_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"drops attention weights \(p = 0.2\)"):
        trained(tmp_path, Model(Stock(0.2)), StreamCQSAStrategy(intercept_sdpa=True))
    query, mask = torch.randn(1, 1, 4, 8), torch.rand(4, 4) > 0.5
    expected = F.scaled_dot_product_attention(query, query, query, mask)
    with streamed_sdpa(Streamed("4KiB")):
        masked = F.scaled_dot_product_attention(query, query, query, mask)
    torch.testing.assert_close(masked, expected)


def test_it_runs_where_the_accelerator_is():
    strategy = StreamCQSAStrategy()
    strategy.parallel_devices = [torch.device("meta")]
    assert strategy.root_device == torch.device("meta")
    with pytest.raises(ConfigError, match="one device, and 2"):
        Trainer(strategy="stream_cqsa", accelerator="cpu", devices=2, logger=False)


@pytest.mark.parametrize("budget", [0, "-1", "lots", "0GiB"])
def test_bad_budgets_are_refused_at_once(budget):
    with pytest.raises(ConfigError, match="cannot be read"):
        StreamCQSAStrategy(budget)


@pytest.mark.parametrize("where", ["host", "disk"])
def test_activations_may_wait_elsewhere(tmp_path, where, monkeypatch):
    monkeypatch.setattr(offloading, "SMALLEST_SIZE", 0)
    written, name = [], {"host": "copy_to_host", "disk": "copy_to_file"}[where]
    move = getattr(offloading, name)
    monkeypatch.setattr(offloading, name, lambda x, *to: written.append(x.shape) or move(x, *to))
    losses = []
    for offload in ("none", where):
        seed_everything(0)
        strategy = StreamCQSAStrategy("16KiB", offload=OffloadOptions(offload))
        losses.append(trained(tmp_path, Model(OwnAttention()), strategy))
    assert torch.equal(*losses)
    assert len(written) > 12
    assert (WIDTH, WIDTH) not in written  # parameters stay where they are
    assert not list(tmp_path.glob(".saved-*"))


def test_what_waits_here_must_not_change_meanwhile():
    x = torch.ones(9, requires_grad=True)
    with offloading.saved_on_host():
        doubled = x.sigmoid().mul_(2).sum()  # a sigmoid's gradient needs its result
        product = torch.eye(3).to_sparse() @ x.view(3, 3)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*\(9,\)"):
        doubled.backward()
    product.sum().backward()
    assert torch.equal(x.grad, torch.ones(9))


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(offloading.os, "posix_fallocate", full)
    x = torch.ones(200, 200, requires_grad=True)
    with (
        offloading.saved_in_files(tmp_path / "new"),
        pytest.raises(ConfigError, match=r"160000 bytes cannot be kept in .*new \(No space"),
    ):
        x * x
    assert not list((tmp_path / "new").iterdir())


def test_multi_head_attention_that_returns_weights_is_reached_too():
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(WIDTH, 2, batch_first=True, dtype=torch.float64)
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(TOKENS, dtype=torch.float64)
    plain, causal = layer(x, x, x)[0], layer(x, x, x, attn_mask=mask, is_causal=True)[0]
    for module in (layer.train(), layer.eval()):
        backend = Streamed("16KiB")
        with streamed_sdpa(backend):
            out, weights = module(x, x, x)
            masked, _ = module(x, x, x, attn_mask=mask, is_causal=True)
        assert weights is None
        assert backend.calls == 2
        torch.testing.assert_close(out, plain, rtol=0, atol=1e-12)
        torch.testing.assert_close(masked, causal, rtol=0, atol=1e-12)


def test_what_is_not_finite_stops_the_run_if_asked(tmp_path):
    model = Model(OwnAttention())
    with torch.no_grad():
        model.layers[0].qkv.bias[WIDTH] = torch.inf
    with pytest.raises(DataError, match="key is not finite at token 0"):
        trained(tmp_path, model, StreamCQSAStrategy("16KiB", check_finite=True))


class ProductAttention(OwnAttention):
    """Matrix products of its own, with dropout that drops nothing."""

    def __init__(self):
        super().__init__()
        del self.attention_backend
        self.dropout = nn.Dropout(0.0)

    def _heads(self, x):
        q, k, v = self.qkv(x).split([WIDTH, WIDTH // 2, WIDTH // 2], -1)
        q, k, v = (t.unflatten(-1, (-1, 4)).transpose(1, 2) for t in (q, k, v))
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        weights = self.dropout((q @ k.mT).softmax(-1))
        return torch.einsum("bhmn,bhnd->bmhd", weights, v).flatten(2)


class Mixture(nn.Module):
    """A softmax that is no attention: weights of experts."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.router = nn.Linear(WIDTH, 2)

    def forward(self, x):
        weights = self.router(x).softmax(-1)
        return sum(weights[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (DirectAttention, "layers.1"),
        (ProductAttention, "layers.1"),
        (Stock, "layers.1.layer.self_attn"),
    ],
)
def test_attention_that_is_not_reached_is_named_with_its_part(tmp_path, layer, name):
    """Whether it calls PyTorch's function, an alias of it, or multiplies matrices itself."""
    with pytest.warns(UserWarning, match=rf"streamed 1 of 2 calls .* those of {name} \(1\)"):
        trained(tmp_path, Model(OwnAttention(), layer(), Mixture()), StreamCQSAStrategy("16KiB"))
    with pytest.raises(ConfigError, match=rf"those of {name} \(1\).*intercept_sdpa=true"):
        trained(tmp_path, Model(OwnAttention(), layer()), StreamCQSAStrategy("16KiB", strict=True))


def test_a_model_that_is_reached_as_a_whole_is_not_warned_of(tmp_path, recwarn):
    model = Model(OwnAttention(), Mixture(), nn.Linear(WIDTH, WIDTH))
    trained(tmp_path, model, StreamCQSAStrategy("16KiB", strict=True))
    model = Model(DirectAttention(), Stock())
    trained(tmp_path, model, StreamCQSAStrategy("16KiB", intercept_sdpa=True, strict=True))
    assert not [warning for warning in recwarn if "streamed" in str(warning.message)]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"schedule": "rectangle"}, "no schedule 'rectangle'"), ({"kernel": "fast"}, "kernel 'fast'")],
)
def test_options_are_refused_before_the_run(options, message):
    with pytest.raises(ConfigError, match=message):
        StreamCQSAStrategy(**options)


class Skipping(Model):
    """Leaves every other batch out."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) if batch_idx % 2 else None

    def validation_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)


def test_batches_may_be_left_out(tmp_path):
    strategy = StreamCQSAStrategy("16KiB")
    assert len(trained(tmp_path, Skipping(OwnAttention()), strategy)) == 6 + 1
    with pytest.raises(ConfigError, match=r"'nonsense'.*offload.activations` to one of none, host"):
        OffloadOptions("nonsense")


class ModuleBackend(nn.Module, InCore):
    """A backend of the user that is a module."""

    def forward(self, query, key, value, **options):
        return InCore()(query, key, value, **options)


def test_a_backend_that_is_a_module_comes_back(tmp_path):
    layer = OwnAttention()
    layer.attention_backend = backend = ModuleBackend()
    strategy = StreamCQSAStrategy("16KiB")
    trained(tmp_path, Model(layer), strategy)
    assert strategy.backend.calls > 0
    assert layer.attention_backend is backend
    assert dict(layer.named_children())["attention_backend"] is backend


class ReluAttention:
    """A backend of the user that is no softmax attention."""

    def __call__(self, query, key, value, *, is_causal):
        return (query @ key.repeat_interleave(2, 1).mT).relu() @ value.repeat_interleave(2, 1)


class ClassBackend(OwnAttention):
    """Has the backend of its class."""

    def __init__(self):
        super().__init__()
        del self.attention_backend

    attention_backend = InCore()


class FixedBackend(nn.Linear):
    @property
    def attention_backend(self):
        return InCore()


def test_other_backends_are_refused_by_name(tmp_path):
    layer = OwnAttention()
    layer.attention_backend = ReluAttention()
    with pytest.raises(ConfigError, match=r"OwnAttention\.attention_backend is ReluAttention"):
        trained(tmp_path, Model(layer), StreamCQSAStrategy("16KiB"))
    layer.attention_backend = "flash"  # as other libraries have it
    assert list(backend_slots(layer)) == []


def test_a_backend_of_a_class_comes_back_and_a_property_is_refused(tmp_path):
    layer, strategy = ClassBackend(), StreamCQSAStrategy("16KiB")
    trained(tmp_path, Model(layer), strategy, max_steps=1)
    assert strategy.backend.calls > 0
    assert "attention_backend" not in vars(layer)
    with pytest.raises(ConfigError, match=r"FixedBackend\.attention_backend cannot be set"):
        trained(tmp_path, Model(FixedBackend(WIDTH, WIDTH)), StreamCQSAStrategy("16KiB"))


def test_a_name_that_was_bound_before_is_told(tmp_path):
    layer, bound_before = OwnAttention(), F.scaled_dot_product_attention
    del layer.attention_backend
    layer._heads = lambda x: bound_before(x[:, None], x[:, None], x[:, None])[:, 0]
    strategy = StreamCQSAStrategy("16KiB", intercept_sdpa=True)
    with pytest.raises(ConfigError, match=r"where another name for it is called") as error:
        trained(tmp_path, Model(layer), strategy)
    assert "intercept_sdpa" not in str(error.value)


def test_each_kind_of_step_is_looked_at(tmp_path):
    class Both(Model):
        def training_step(self, batch, index):
            if self.training:
                batch = batch + (batch @ batch.mT).softmax(-1) @ batch
            return super().training_step(batch, index)

    with pytest.warns(UserWarning, match=r"streamed 1 of 2 calls .* those of the model itself"):
        trained(tmp_path, Both(OwnAttention()), StreamCQSAStrategy("16KiB"), max_steps=1)


def test_a_hint_that_is_not_the_mask_is_not_followed():
    """With weights asked for, as by default, PyTorch looks at the mask alone."""
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(WIDTH, 2, batch_first=True, dtype=torch.float64)
    x = torch.randn(2, 12, WIDTH, dtype=torch.float64)
    mask = torch.ones(12, 12, dtype=torch.bool).triu(4)  # no causal mask
    expected = layer(x, x, x, attn_mask=mask, is_causal=True)[0]
    with streamed_sdpa(Streamed("16KiB")):
        out = layer(x, x, x, attn_mask=mask, is_causal=True)[0]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_hint_without_a_mask_is_refused_as_pytorch_refuses_it(need_weights):
    layer, x = nn.MultiheadAttention(WIDTH, 2, batch_first=True), torch.randn(1, TOKENS, WIDTH)
    with streamed_sdpa(Streamed()), pytest.raises(RuntimeError, match="Need attn_mask"):
        layer(x, x, x, is_causal=True, need_weights=need_weights)
