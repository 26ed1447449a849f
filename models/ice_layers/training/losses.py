"""The mask-aware robust loss: only observed entries count, and all of a batch count alike.

Axes: any; N traces and L layers in the network.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from fulgurite.errors import ConfigError
from fulgurite.sampling import rank_and_world

__all__ = ["LossKind", "masked_robust_loss"]

LossKind = Literal["huber", "smooth_l1", "mse"]


def masked_robust_loss(
    pred: Tensor,
    target: Tensor,
    mask: Tensor,
    delta: float = 1.0,
    *,
    kind: LossKind = "huber",
    over_ranks: bool = False,
) -> Tensor:
    """Sum of a robust loss over the valid entries, divided by their number.

    What ``target`` holds elsewhere (NaN, infinities) reaches neither loss nor gradient. Without a
    valid entry the loss is exactly 0. The division is by the valid entries of the whole batch, so
    that sparse batches have gradients of the same size and no stack counts more than another.

    Args:
        pred: Shape: (N, L), or any other.
        target: Shape: as ``pred``.
        mask: True where the target is valid. Shape: as ``pred``.
        delta: Error where quadratic turns into linear, in the units of ``pred``.
        kind: ``huber``; ``smooth_l1``, which is Huber's divided by ``delta``; or ``mse``, half the
            squared error.
        over_ranks: Divide by the mean number of valid entries of all ranks, so that the average
            of the ranks' gradients is that of one batch of all their entries.

    Shape: to ().

    Raises:
        ConfigError: ``kind`` is unknown or ``delta`` is not positive.

    Example:
        >>> target = torch.tensor([1.0, float("nan"), 5.0])
        >>> masked_robust_loss(torch.zeros(3), target, target.isfinite(), delta=1.0)
        tensor(2.5000)

    Source: arXiv 2604.20783, abstract (form); docs/papers/ice_layers.md section 1.6, numbers
    inferred.
    """
    if not delta > 0:
        raise ConfigError(f"The loss has delta={delta}.", "Set model.init_args.loss.delta above 0.")
    # selected before any arithmetic: NaN * 0 is NaN, and a gradient passes through `where`
    error = torch.where(mask, pred - torch.where(mask, target, 0.0).to(pred.dtype), 0.0)
    zero = torch.zeros_like(error)
    if kind == "huber":
        total = F.huber_loss(error, zero, delta=delta, reduction="sum")
    elif kind == "smooth_l1":
        total = F.smooth_l1_loss(error, zero, beta=delta, reduction="sum")
    elif kind == "mse":
        total = 0.5 * error.square().sum()
    else:
        raise ConfigError(
            f"model.init_args.loss.kind={kind} is unknown.", "Use huber, smooth_l1 or mse."
        )
    count = mask.sum().to(total.dtype)
    if over_ranks and (world := rank_and_world()[1]) > 1:
        dist.all_reduce(count)
        return total * world / count.clamp_min(1)
    return total / count.clamp_min(1)
