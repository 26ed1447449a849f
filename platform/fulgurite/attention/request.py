"""What is asked of a plan: what it may hold, what it computes, and on which machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from fulgurite.attention.edges import CACHED_MASKS
from fulgurite.attention.kernel_choice import usual_kernel_names
from fulgurite.attention.kernels import TileKernelNames
from fulgurite.attention.machine_costs import MachineCosts, usual_costs
from fulgurite.attention.spec import AttentionSpec
from fulgurite.attention.tiles import GPU_MASKED_SIDE, MASKED_SIDE
from fulgurite.errors import ConfigError

__all__ = ["SCHEDULES", "Placement", "PlanRequest", "Schedule", "check_schedule"]

Schedule = Literal["auto", "whole", "heads", "rect", "cqs"]

#: What ``schedule`` may be.
SCHEDULES = ("auto", "whole", "heads", "rect", "cqs")


def check_schedule(schedule: str, allowed: Sequence[str] = SCHEDULES) -> None:
    """Check the name of a schedule.

    Args:
        schedule: As the user gave it.
        allowed: Names that may be given.

    Raises:
        ConfigError: The schedule is not among the allowed ones.
    """
    if schedule not in allowed:
        raise ConfigError(
            f"There is no schedule {schedule!r} here.", f"Use one of {', '.join(allowed)}."
        )


@dataclass(frozen=True)
class Placement:
    """Where the tensors of a call lie, and how tiles of them come to the device.

    Args:
        resident: Whether the tensors lie on the device, so that tiles are views of them.
        packs: Whether tiles are copied although they lie there, since their last stride is not 1.
        tiled: Write the result tile by tile, even with ``schedule="whole"``.
        ahead: Whether the next tile is copied to the device while one is computed.
    """

    resident: bool = True
    packs: bool = False
    tiled: bool = False
    ahead: bool = False


@dataclass(frozen=True)
class PlanRequest:
    """What is asked of a plan; by default the result, without limit, of tensors on one CPU.

    Args:
        budget: Bytes that may be held at once; None for no limit.
        schedule: Consider only this one.
        forward: Whether the result is computed; else the plan is that of gradients alone.
        backward: Whether gradients are computed too, and must fit.
        passes: Consider only gradients in so many passes.
        placement: Where the tensors lie.
        shard: Rank and number of ranks among which tasks are dealt out.
        kernel: Which kernel to prefer.
        kernels: Which compute the tiles.
        costs: Measured costs of the machine.

    Raises:
        ConfigError: There is no such schedule.
    """

    budget: int | None = None
    schedule: Schedule = "auto"
    forward: bool = True
    backward: bool = False
    passes: int | None = None
    placement: Placement = Placement()
    shard: tuple[int, int] = (0, 1)
    kernel: str | None = None
    kernels: TileKernelNames = TileKernelNames()
    costs: MachineCosts = MachineCosts()

    def __post_init__(self) -> None:
        check_schedule(self.schedule)

    @classmethod
    def from_host(cls, dtype: torch.dtype, *, on_gpu: bool, kernel: str | None) -> PlanRequest:
        """Return the request for tensors in host memory or in files, written tile by tile.

        Nothing in it is measured, so it is the same on all machines, and a run can go on.

        Args:
            dtype: Data type of query, key and value.
            on_gpu: Whether a GPU computes.
            kernel: Which kernel to prefer.
        """
        return cls(
            placement=Placement(resident=False, tiled=True, ahead=on_gpu),
            kernel=kernel,
            kernels=usual_kernel_names(on_gpu, dtype, kernel),
            costs=usual_costs(on_gpu),
        )

    @property
    def ranks(self) -> int:
        """How many share the tasks."""
        return self.shard[1]

    @property
    def cached_masks(self) -> int:
        """How many additive masks of edges are kept on the device."""
        return CACHED_MASKS if "efficient" in self.kernels.masked else 0

    def computes_scores(self, spec: AttentionSpec) -> bool:
        """Whether the scores of whole tiles lie in memory."""
        names = self.kernels.masked if spec.has_bias else self.kernels.full
        return spec.needs_math or "math" in names

    def masked_side(self, spec: AttentionSpec) -> int | None:
        """Return the side of the largest tiles under a mask's edge; None for that of CPUs.

        On a GPU it is the largest that leaves most of the budget. What is kept counts too, and
        what their making takes.
        """
        if "efficient" not in self.kernels.masked:
            return None
        side = GPU_MASKED_SIDE
        bytes_of_pair = spec.dtype.itemsize * (1 + CACHED_MASKS) + 2
        budget = self.budget
        while budget is not None and side > MASKED_SIDE and 4 * side**2 * bytes_of_pair > budget:
            side //= 2
        return side
