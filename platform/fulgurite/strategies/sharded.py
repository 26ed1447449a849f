"""Trains models whose parameters are divided among ranks (FSDP2)."""

from __future__ import annotations

from lightning.pytorch.strategies import ModelParallelStrategy

__all__ = ["FullyShardedStrategy"]


class FullyShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all ranks: each holds a part of parameters, gradients and optimizer states.

    Lightning's :class:`~lightning.pytorch.strategies.ModelParallelStrategy` with all ranks in the
    data-parallel dimension, and checkpoints that are one file of whole tensors, which any other
    strategy goes on with.

    Args:
        process_group_backend: ``gloo`` or ``nccl``; by default what fits the devices.

    Source: FSDP2, https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html.
    """

    strategy_name = "fsdp2"

    def __init__(self, process_group_backend: str | None = None) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
        )

    def setup_environment(self) -> None:
        """As the base class, with all ranks in the data-parallel dimension."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
