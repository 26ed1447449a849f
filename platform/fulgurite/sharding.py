"""Parameters, gradients and optimizer states divided among ranks (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from fulgurite.errors import ConfigError

__all__ = ["is_sharding", "repeated_blocks", "shard_module"]

_STEPS = ("training_step", "validation_step", "test_step", "predict_step")
_STRATEGY = "--trainer.strategy=fsdp2"


def is_sharding(module: LightningModule) -> bool:
    """Whether the module's trainer divides parameters among ranks."""
    trainer = module._trainer
    return trainer is not None and isinstance(trainer.strategy, ModelParallelStrategy)


def repeated_blocks(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the blocks of a network: the parts of its outermost lists of modules.

    Example:
        >>> body = nn.Sequential(nn.Embedding(3, 2), nn.ModuleList([nn.Linear(2, 2)] * 1))
        >>> [*repeated_blocks(body)]
        [Linear(in_features=2, out_features=2, bias=True)]
    """
    if isinstance(network, nn.ModuleList):
        yield from (part for part in network if any(True for _ in part.parameters()))
        return
    for part in network.children():
        yield from repeated_blocks(part)


def shard_module(
    module: LightningModule, network: nn.Module | None, *, methods: tuple[str, ...] = ()
) -> None:
    """Divide a module's parameters among the ranks, where its trainer's strategy asks for it.

    Each block of the network is a unit that is gathered while it computes, and so is all else that
    the module has. Does nothing under other strategies, or where it has been done.

    Args:
        module: The module, whose steps gather what belongs to no block.
        network: The part of it that has the blocks; None for a module that cannot be divided.
        methods: Further methods that compute with parameters, on all ranks at a time.

    Raises:
        ConfigError: The module cannot be divided, or the strategy divides it in a way that is not
            supported here.

    Source: FSDP2, https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html.
    """
    if not is_sharding(module):
        return
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    if isinstance(module, FSDPModule):
        return
    strategy = cast("ModelParallelStrategy", module.trainer.strategy)
    name = type(module).__name__
    if network is None:
        raise ConfigError(
            f"{name} cannot be divided among ranks by {type(strategy).__name__}.",
            "Use --trainer.strategy=ddp; the language models of stream_cqsa and number_probing "
            "can be.",
        )
    tensor_parallel = strategy.device_mesh["tensor_parallel"].size()
    if tensor_parallel > 1:
        raise ConfigError(
            f"trainer.strategy.init_args.tensor_parallel_size is {tensor_parallel}, and {name} is "
            "divided by data alone: these ranks would all compute the same.",
            f"Give {_STRATEGY}, or tensor_parallel_size=1 and data_parallel_size of all ranks.",
        )
    if strategy._save_distributed_checkpoint:
        raise ConfigError(
            "trainer.strategy.init_args.save_distributed_checkpoint is true, and checkpoints here "
            "are one file with a digest.",
            f"Give {_STRATEGY}, or save_distributed_checkpoint=false.",
        )
    mesh = strategy.device_mesh["data_parallel"]
    for block in repeated_blocks(network):
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for method in (*_STEPS, *methods):
        register_fsdp_forward_method(module, method)
