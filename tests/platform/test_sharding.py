"""Parameters divided among ranks (FSDP2): the weights of one rank, from the same batches."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from fulgurite.base import SystemModule
from fulgurite.callbacks.number_probing import ModularProbe
from fulgurite.errors import ConfigError
from fulgurite.layers.transformer import TransformerConfig
from fulgurite.models.number_probing import NumberLM
from fulgurite.models.number_probing.backbones import TransformerBackbone
from fulgurite.models.stream_cqsa import Decoder, LanguageModel
from fulgurite.sharding import repeated_blocks
from fulgurite.strategies import FullyShardedStrategy, StreamCQSAFullyShardedStrategy

SCRIPT = """
import functools, os, sys
import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from torch.utils.data import DataLoader
from fulgurite import strategies
from fulgurite.layers.transformer import TransformerConfig
from fulgurite.models.number_probing import MuonAdamW, NumberLM
from fulgurite.models.number_probing.backbones import TransformerBackbone
from fulgurite.models.stream_cqsa import Decoder, LanguageModel

torch.set_num_threads(1)
folder, world = sys.argv[1], int(os.environ.get("WORLD_SIZE", 1))
tokens = torch.randint(0, 50, (24, 33), generator=torch.Generator().manual_seed(0))
data = [{"tokens": row[:-1], "targets": row[1:]} for row in tokens]
adamw = functools.partial(torch.optim.AdamW, lr=1e-2)

class Data(LightningDataModule):
    def train_dataloader(self):
        rank = self.trainer.global_rank
        return DataLoader(data[rank::world], batch_size=8 // world)

def decoder():
    config = TransformerConfig(32, layers=2, heads=4, kv_heads=2, chunk=16, checkpoint=True)
    return LanguageModel(Decoder(50, config), optimizer=adamw, loss_chunk=16)

def numbers(optimizer):
    return NumberLM(TransformerBackbone(32, layers=2), optimizer=optimizer, vocab_size=50)

MODELS = {
    "streamed": (decoder, "StreamCQSAFullyShardedStrategy"),
    "adamw": (lambda: numbers(adamw), "FullyShardedStrategy"),
    "muon": (lambda: numbers(functools.partial(MuonAdamW, lr=1e-3)), "FullyShardedStrategy"),
}

def fit(name, epochs, out, resumed=None):
    make, strategy = MODELS[name]
    seed_everything(0, verbose=False)
    strategy = getattr(strategies, strategy)() if world > 1 else "auto"
    trainer = Trainer(
        accelerator="cpu", devices=world, strategy=strategy, max_epochs=epochs, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        gradient_clip_val=0.1, use_distributed_sampler=False,
    )
    checkpoint = None if resumed is None else f"{folder}/{resumed}.ckpt"
    module = make()
    trainer.fit(module, datamodule=Data(), ckpt_path=checkpoint, weights_only=True)
    if world > 1:
        local = sum(p.to_local().numel() for p in module.parameters())
        whole = sum(p.numel() for p in module.parameters())
        assert local <= 0.51 * whole, (local, whole)
    trainer.save_checkpoint(f"{folder}/{out}.ckpt")

for name in MODELS:
    fit(name, 2, f"{name}-{world}")
    if world > 1:
        fit(name, 1, f"{name}-half")
        fit(name, 2, f"{name}-resumed", f"{name}-half")
    else:
        fit(name, 2, f"{name}-back", f"{name}-half")  # of two ranks
"""


def run(folder, *words):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, *words, str(folder / "script.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def difference(folder, first, second):
    """Largest difference of weights, and the names of both."""
    a, b = (
        torch.load(folder / f"{name}.ckpt", weights_only=True)["state_dict"]
        for name in (first, second)
    )
    assert a.keys() == b.keys()
    assert not any("metrics" in name for name in a)
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.slow
def test_two_ranks_train_to_the_weights_of_one_and_go_on_from_checkpoints(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    run(tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    run(tmp_path)
    # Muon's iterations are in bfloat16, whose rounding follows any change of a gradient
    for name, tolerance in (("streamed", 2e-5), ("adamw", 2e-5), ("muon", 5e-4)):
        assert difference(tmp_path, f"{name}-1", f"{name}-2") <= tolerance
        assert difference(tmp_path, f"{name}-2", f"{name}-half") > 4 * tolerance
        assert difference(tmp_path, f"{name}-2", f"{name}-resumed") == 0
        assert difference(tmp_path, f"{name}-2", f"{name}-back") <= tolerance


def test_blocks_are_the_parts_of_the_outermost_lists():
    config = TransformerConfig(16, layers=3, heads=2)
    decoder = Decoder(50, config)
    assert [*repeated_blocks(decoder)] == [*decoder.transformer.blocks]
    backbone = TransformerBackbone(16, layers=2, heads=2)
    module = NumberLM(backbone, vocab_size=9)
    assert [*repeated_blocks(module.shardable_network)] == [*backbone.transformer.blocks]
    assert [*repeated_blocks(nn.Linear(2, 2))] == []


def sharded(module, size=1, saves_one_file=True):
    """A module in the hands of a strategy whose processes are not started."""
    strategy = FullyShardedStrategy()
    mesh = {name: SimpleNamespace(size=lambda n=n: n)
            for name, n in (("tensor_parallel", size), ("data_parallel", 2))}  # fmt: skip
    strategy._device_mesh = mesh
    strategy._save_distributed_checkpoint = not saves_one_file
    module.trainer = SimpleNamespace(strategy=strategy)
    return module


def test_what_cannot_be_divided_is_refused_by_name():
    model = LanguageModel(Decoder(50, TransformerConfig(16, layers=1, heads=2)))
    model.configure_model()  # without a trainer nothing is divided
    with pytest.raises(ConfigError, match="tensor_parallel_size is 2, and LanguageModel is div"):
        sharded(model, size=2).configure_model()
    with pytest.raises(ConfigError, match="save_distributed_checkpoint is true"):
        sharded(model, saves_one_file=False).configure_model()
    with pytest.raises(ConfigError, match="SystemModule cannot be divided among ranks by FullySh"):
        sharded(SystemModule()).configure_model()
    number_model = sharded(NumberLM(TransformerBackbone(16, layers=1, heads=2), vocab_size=9))
    with pytest.raises(ConfigError, match="ModularProbe reads the embedding on the first rank"):
        ModularProbe().setup(number_model.trainer, number_model, "fit")


def test_strategies_are_known_by_name():
    for name, kind in (
        ("fsdp2", FullyShardedStrategy),
        ("stream_cqsa_fsdp2", StreamCQSAFullyShardedStrategy),
    ):
        trainer = Trainer(accelerator="cpu", strategy=name, logger=False)
        assert type(trainer.strategy) is kind
