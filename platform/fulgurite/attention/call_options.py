"""Options of a call: how scores are made, and how attention is computed.

Axes: B batch, H query heads, M queries, N keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fulgurite.attention.budget import Budget
from fulgurite.attention.checks import check_number, kernel_device
from fulgurite.attention.execution_plan import ExecutionPlan
from fulgurite.attention.request import Schedule, check_schedule
from fulgurite.errors import ConfigError

__all__ = ["Scoring", "StreamOptions"]


@dataclass(frozen=True)
class Scoring:
    """How scores are made of queries and keys.

    Args:
        attn_mask: Boolean, True where a key is seen, or added to the scores, in float32 or the
            type of query; then it may have a gradient. Also a ``CausalBias`` of PyTorch. Shape:
            one that broadcasts to (..., H, M, N).
        scale: Scale of the scores; 1/√D by default.
        enable_gqa: Allow fewer key/value heads than query heads.
        softcap: Scores s become softcap · tanh(s / softcap), before masks and biases.
        sinks: Scores of a key without a value that each query of a head sees; may have a
            gradient. Shape: (H,), (B, H), or (B, H, M) for one of each query.
        alibi_slopes: Each score falls by the slope of its head times the distance of query and
            key. Shape: (H,) or (B, H).

    Raises:
        ConfigError: An option has the wrong type, or is no number that scores can have.
    """

    attn_mask: Tensor | None = None
    scale: float | None = None
    enable_gqa: bool = False
    softcap: float | None = None
    sinks: Tensor | None = None
    alibi_slopes: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.enable_gqa, bool):
            raise ConfigError(f"enable_gqa={self.enable_gqa!r} is no bool.", "Give True or False.")
        for name in ("scale", "softcap"):
            if getattr(self, name) is not None:  # the record is frozen
                object.__setattr__(self, name, check_number(name, getattr(self, name)))
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ConfigError(
                f"softcap={self.softcap} caps nothing.", "Give a positive number, or None."
            )
        if self.scale is not None and not math.isfinite(self.scale):
            raise ConfigError(f"scale={self.scale} gives no scores.", "Give a finite number.")


@dataclass(frozen=True)
class StreamOptions:
    """How attention is computed, whatever it is.

    Args:
        memory_budget: Most that is held at once beside inputs and result: bytes, ``"2GiB"``, a
            fraction of the device, ``"auto"`` for what is free, None for no limit.
        schedule: ``whole``, ``heads``, ``rect`` or ``cqs``; ``auto`` takes the fastest.
        check_finite: Refuse NaN and infinities in the inputs, naming the first.
        device: Where it is computed; where the tensors are by default. Tensors in host memory
            that a GPU computes stay there, as do the result and the gradients.
        kernel: ``math`` for matrix products; on a GPU also which of ``flash``, ``cudnn`` and
            ``efficient`` to try first.
        distributed: Deal the work out to the ranks of torch.distributed, which all give the same
            tensors and all get the whole result and the whole gradients.
        on_plan: Called with the plan before it is run.
        decided: Budgets that ``"auto"`` was found to be, by the sizes of the call. With it they
            are decided once, so that plans do not follow every change of the free memory.

    Raises:
        ConfigError: There is no such schedule, or this machine has no such device.
    """

    memory_budget: Budget = None
    schedule: Schedule = "auto"
    check_finite: bool = False
    device: torch.device | str | None = None
    kernel: str | None = None
    distributed: bool = False
    on_plan: Callable[[ExecutionPlan], None] | None = None
    decided: dict[Any, int | None] | None = None

    def __post_init__(self) -> None:
        check_schedule(self.schedule)
        if self.device is not None:  # the record is frozen
            object.__setattr__(self, "device", kernel_device(self.device))

    def device_for(self, tensor: Tensor) -> torch.device:
        """Return where kernels run on a tensor."""
        return tensor.device if self.device is None else torch.device(self.device)
