"""What a plate classifier refuses of trainers and batches.

Axes: L queries, K classes.
"""

from __future__ import annotations

from lightning.pytorch import Trainer
from torch import Tensor, nn

from fulgurite.errors import ConfigError, DataError
from fulgurite.models.cs_arm_bn.methods.base import Method

__all__ = ["check_labels", "check_logits", "check_trainer"]


def check_trainer(trainer: Trainer, module: nn.Module, method: Method) -> None:
    """Refuse a trainer that would change what the method computes.

    Args:
        trainer: The trainer.
        module: The classifier.
        method: Its method.

    Raises:
        ConfigError: The ranks would mix their plates, or the precision would lose the method's own
            gradients.
    """
    synced = getattr(trainer.strategy, "_layer_sync", None) is not None
    if synced or any(isinstance(m, nn.SyncBatchNorm) for m in module.modules()):
        raise ConfigError(
            "SyncBatchNorm would mix the plates of the ranks.",
            "Leave out --trainer.sync_batchnorm.",
        )
    if method.own_gradients and str(trainer.precision).startswith("16-"):
        raise ConfigError(
            f"{type(method).__name__} takes gradients of its own, which are lost in "
            f"--trainer.precision={trainer.precision}: nothing scales them.",
            "Use bf16-mixed or 32-true.",
        )


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Refuse labels outside the classes; those on a device were checked before the move.

    Args:
        labels: Shape: (L,) int64.
        num_classes: Number of classes.

    Raises:
        DataError: A label is of no class.
    """
    if labels.device.type != "cpu":
        return
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise DataError(
            f"A training batch has labels from {int(labels.min())} to {int(labels.max())}.",
            f"Give labels from 0 to {num_classes - 1}.",
        )


def check_logits(logits: object, network: nn.Module, n_query: int, num_classes: int) -> None:
    """Refuse what is no row of logits for each query.

    Args:
        logits: What a method gives. Shape: (L, K).
        network: The network, for the error.
        n_query: L.
        num_classes: K.

    Raises:
        ConfigError: It is no tensor, or has another shape.
    """
    if isinstance(logits, Tensor) and logits.shape == (n_query, num_classes):
        return
    kind = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
    raise ConfigError(
        f"The network {type(network).__name__} gives no logits of {n_query} images and "
        f"{num_classes} classes ({kind}).",
        "Let its `forward` return the logits alone, made for the classes of the data; Backbone "
        "takes them from networks of other libraries.",
    )
