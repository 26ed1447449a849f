"""The two-stage learning rate."""

from __future__ import annotations

import math
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fulgurite.errors import ConfigError

__all__ = ["TwoStageLR", "two_stage"]


def two_stage(
    step: int,
    total: int,
    warmup: float = 0.1,
    first: float = 0.5,
    *,
    drop: float = 1.0,
    final: float = 0.01,
    decay: Literal["cosine", "constant"] = "cosine",
) -> float:
    """Factor of the learning rate at a step: warm-up and a high rate, then a falling or low one.

    Args:
        step: Number of the step, from 0.
        total: Steps of both stages.
        warmup: Fraction of the steps in which the rate rises linearly from a tenth.
        first: Fraction of the steps of the first stage, warm-up included.
        drop: Factor at the start of the second stage.
        final: Factor at its end, if it decays.
        decay: ``cosine`` from ``drop`` to ``final``, or ``constant`` at ``drop``.

    Example:
        >>> [round(two_stage(s, 100), 3) for s in (0, 5, 10, 49, 50, 75, 99, 500)]
        [0.1, 0.55, 1.0, 1.0, 1.0, 0.505, 0.011, 0.01]

    Source: arXiv 2604.20783 names a two-stage schedule, by a digest; docs/papers/ice_layers.md
    section 1.8, inferred.
    """
    rise, high = warmup * total, first * total
    if step < rise:
        return 0.1 + 0.9 * step / rise
    if step < high:
        return 1.0
    if decay == "constant":
        return drop
    done = min(1.0, (step - high) / max(1e-9, total - high))
    return final + (drop - final) * 0.5 * (1 + math.cos(math.pi * done))


class TwoStageLR(LRScheduler):
    """A scheduler of :func:`two_stage`, stepped after every optimizer step.

    Args:
        optimizer: Optimizer whose rate is set.
        total_steps: Steps of both stages; None takes the steps of the whole training.
        warmup: Fraction of the steps in which the rate rises.
        first: Fraction of the steps of the first stage.
        drop: Factor at the start of the second stage.
        final: Factor at its end.
        decay: ``cosine`` or ``constant``.

    Raises:
        ConfigError: A fraction is out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int | None = None,
        warmup: float = 0.1,
        first: float = 0.5,
        *,
        drop: float = 1.0,
        final: float = 0.01,
        decay: Literal["cosine", "constant"] = "cosine",
    ) -> None:
        prefix = "model.init_args.scheduler.init_args"
        if not 0 <= warmup <= first <= 1:
            raise ConfigError(
                f"{prefix} has warmup={warmup} and first={first}.", "Set 0 <= warmup <= first <= 1."
            )
        if total_steps is not None and total_steps < 1:
            raise ConfigError(f"{prefix}.total_steps={total_steps} is too few.", "Give 1 or more.")
        if decay not in ("cosine", "constant"):
            raise ConfigError(f"{prefix}.decay={decay} is unknown.", "Use cosine or constant.")
        self.total_steps = total_steps
        self.warmup, self.first, self.drop, self.final = warmup, first, drop, final
        self.decay: Literal["cosine", "constant"] = decay
        super().__init__(optimizer)

    def plan(self, steps: int) -> None:
        """Set how long training is, where the configuration did not, and start again."""
        if self.total_steps is None:
            self.total_steps = max(1, steps)
            for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
                group["lr"] = rate
            self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def get_lr(self) -> list[float]:  # type: ignore[override]
        """Rates of this step."""
        if self.total_steps is None:
            return [float(rate) for rate in self.base_lrs]
        factor = two_stage(
            self.last_epoch, self.total_steps, self.warmup, self.first,
            drop=self.drop, final=self.final, decay=self.decay,
        )  # fmt: skip
        return [factor * float(rate) for rate in self.base_lrs]
