"""The few things that every system's LightningModule shares."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from types import MappingProxyType
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin
from lightning.pytorch.utilities.parsing import lightning_hasattr
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR, LRScheduler, ReduceLROnPlateau, SequentialLR

from fulgurite.errors import ConfigError
from fulgurite.export.exportable import ExportableNetwork, ExportRequest, no_network_error
from fulgurite.options import list_options
from fulgurite.sharding import shard_module

__all__ = [
    "DATA_SIZES",
    "SystemModule",
    "build_network",
    "check_callbacks",
    "check_head",
    "check_layer_sizes",
    "check_sizes",
    "save_options",
    "scheduled",
]


#: What the data determine of a model: arguments of models, and attributes of DataModules.
DATA_SIZES = {
    "num_classes": "classes",
    "in_channels": "channels",
    "vocab_size": "different tokens",
}


class SystemModule(LightningModule):
    """A LightningModule that says which metric its checkpoints are chosen by.

    Attributes:
        monitor: Logged metric by which ``best.ckpt`` is chosen; None keeps only the last one.
        mode: ``min`` or ``max``.
        export_options: Options of ``fulgurite export`` that :meth:`export_network` reads, with what
            each means.

    Any other LightningModule works with the command line as well; it gets ``last.ckpt`` only,
    unless its configuration adds a ``ModelCheckpoint``.
    """

    monitor: str | None = None
    mode: str = "min"
    export_options: Mapping[str, str] = MappingProxyType({})

    @property
    def shardable_network(self) -> nn.Module | None:
        """The network whose blocks may be divided among ranks (FSDP2); None where it may not."""
        return None

    def configure_model(self) -> None:
        """Divide the parameters among the ranks, where the strategy asks for it.

        Raises:
            ConfigError: The module cannot be divided, or not as the strategy does it.
        """
        shard_module(self, self.shardable_network)

    def export_network(self, request: ExportRequest) -> ExportableNetwork:
        """Hand over the network for ``fulgurite export``, with the weights that are loaded.

        Args:
            request: The data of the run, and the values of :attr:`export_options`.

        Raises:
            ConfigError: The module has no network that could do without it.
        """
        raise no_network_error(self)

    def setup(self, stage: str) -> None:
        """Check that the model was made for the data, and that ranks can share it.

        Raises:
            ConfigError: The sizes of the model and the data differ, or there are several ranks
                and a layer does not know its sizes yet.
        """
        check_sizes(self)
        if self.trainer.world_size > 1:
            check_layer_sizes(self)


def check_sizes(module: LightningModule) -> None:
    """Refuse data of other sizes than the model was made for, before anything is trained.

    The command line gives a model the sizes of its data; from Python they are arguments.

    Raises:
        ConfigError: ``num_classes``, ``in_channels`` or ``vocab_size`` of model and data differ.
    """
    trainer = module._trainer
    data = getattr(trainer, "datamodule", None)
    for name, things in DATA_SIZES.items():
        there = getattr(data, name, None)
        here = module.hparams.get(name, getattr(module, name, None))
        if isinstance(there, int) and isinstance(here, int) and there != here:
            raise ConfigError(
                f"The data have {there} {things}, and the model was made for {here}.",
                f"Make it with {type(module).__name__}({name}=data.{name}), on the command line "
                f"--model.init_args.{name}={there}.",
            )


def check_layer_sizes(network: nn.Module) -> None:
    """Refuse layers that take their sizes from the first batch, such as ``LazyLinear``.

    Ranks cannot share their parameters, and models of clients cannot be averaged.

    Raises:
        ConfigError: A parameter or a buffer has no shape yet.
    """
    for name, layer in network.named_modules():
        tensors = (*layer.parameters(recurse=False), *layer.buffers(recurse=False))
        if any(map(nn.parameter.is_lazy, tensors)):
            raise ConfigError(
                f"{type(network).__name__} has a {type(layer).__name__} ({name}), which does not "
                "know its sizes yet.",
                "Call it on a batch of the data's channels and size where it is made.",
            )


def build_network(
    network: nn.Module | Callable[..., nn.Module], *sizes: int, argument: str = "network"
) -> nn.Module:
    """A network that is given as a module, or as what makes it from the sizes of the data.

    Args:
        network: A module, or a class or function that is called with the sizes.
        sizes: What the data determine, such as channels and classes.
        argument: What errors call it.

    Raises:
        ConfigError: The network is neither, or the call does not return a module.

    Example:
        >>> build_network(nn.Linear, 2, 3), build_network(nn.Flatten(), 2, 3)
        (Linear(in_features=2, out_features=3, bias=True), Flatten(start_dim=1, end_dim=-1))
    """
    if isinstance(network, nn.Module):
        return network
    if not callable(network):
        raise ConfigError(
            f"model.init_args.{argument} is a {type(network).__name__}.",
            "Give a torch.nn.Module, or a class or function that makes one.",
        )
    module: object = network(*sizes)
    if not isinstance(module, nn.Module):
        name = getattr(network, "__name__", type(network).__name__)
        raise ConfigError(
            f"model.init_args.{argument}: {name}{sizes} makes a {type(module).__name__}, which is "
            "no network.",
            "Give a torch.nn.Module, or a class or function that makes one.",
        )
    return module


def check_head(network: nn.Module, num_classes: int) -> None:
    """Refuse a network whose ``head`` gives another number of classes.

    Raises:
        ConfigError: The head gives another number of classes.
    """
    head = getattr(network, "head", None)
    if isinstance(head, nn.Linear) and head.out_features != num_classes:
        raise ConfigError(
            f"The network {type(network).__name__} tells {head.out_features} classes apart, and "
            f"model.init_args.num_classes={num_classes}.",
            "Give one that was made for the classes of the data, or what makes it.",
        )


def check_callbacks(callbacks: Sequence[Callback], module: LightningModule) -> None:
    """Refuse callbacks that would end in the middle of a run.

    Raises:
        ConfigError: ``LearningRateFinder`` finds no learning rate that it could set.
    """
    settable = any(lightning_hasattr(module, name) for name in ("lr", "learning_rate"))
    if any(isinstance(c, LearningRateFinder) for c in callbacks) and not settable:
        raise ConfigError(
            f"LearningRateFinder sets an attribute `lr` or `learning_rate` of the model, and "
            f"{type(module).__name__} has neither: its rate is an option of its optimizer.",
            "Leave it out and set --model.init_args.optimizer.init_args.lr; `tune` in the file of "
            "`fulgurite compare` tries several.",
        )


def save_options(owner: HyperparametersMixin, *objects: str, logger: bool = True) -> None:
    """``save_hyperparameters()`` for constructors that are given objects; call it there.

    The command line records how objects are made, as plain values. Objects given from Python are
    left out: they would make the checkpoint unreadable with ``weights_only=True``, and be copied.
    Records of options are written as mappings; :func:`fulgurite.options.make_options` reads them.

    Args:
        owner: The module or DataModule that is being constructed.
        objects: Arguments that may be objects.
        logger: Whether loggers get the values.
    """
    frame = inspect.currentframe()
    constructor = frame.f_back if frame else None
    owner.save_hyperparameters(ignore=objects, frame=constructor, logger=logger)
    if "_instantiator" in owner.hparams:  # by the command line
        owner.save_hyperparameters(frame=constructor, logger=logger)
    for saved in (owner.hparams, owner._hparams_initial):  # type: ignore[attr-defined]  # a copy
        for name, value in saved.items():
            if is_dataclass(value) and not isinstance(value, type):
                saved[name] = list_options(value)


def scheduled(
    optimizer: Optimizer,
    scheduler: Callable[[Optimizer], LRScheduler | ReduceLROnPlateau] | None,
    interval: Literal["step", "epoch"],
    warmup: int = 0,
) -> Any:
    """What ``configure_optimizers`` returns: the optimizer, with its scheduler if there is one.

    Args:
        optimizer: Made already.
        scheduler: Makes the scheduler, such as a ``LRSchedulerCallable``.
        interval: How often it steps.
        warmup: Intervals in which the rate rises linearly before the scheduler's; 0 for none.

    Raises:
        ConfigError: The scheduler waits for a metric.
    """
    parts: list[LRScheduler] = []
    if warmup:
        parts.append(LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup))
    if scheduler is not None:
        lr_scheduler = scheduler(optimizer)
        if isinstance(lr_scheduler, ReduceLROnPlateau):
            raise ConfigError(
                f"ReduceLROnPlateau waits for a metric, and schedulers step after each {interval}.",
                "Set --model.init_args.scheduler to another one, or to null.",
            )
        parts.append(lr_scheduler)
    if not parts:
        return optimizer
    if len(parts) == 2:
        parts = [SequentialLR(optimizer, parts, [warmup])]
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": parts[0], "interval": interval}}
