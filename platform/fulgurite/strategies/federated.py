"""Clients spread over ranks: DDP's processes without DDP's gradient synchronisation."""

from __future__ import annotations

from datetime import timedelta

from lightning.pytorch.strategies import DDPStrategy

__all__ = ["FederatedStrategy"]


class FederatedStrategy(DDPStrategy):
    """Launches one process per device, as DDP does, and leaves every rank's model alone.

    The model is not wrapped: neither gradients nor BatchNorm buffers are exchanged, because
    the ranks train different clients. What the clients send is exchanged by the rounds engine.

    Args:
        timeout_minutes: How long a rank waits for the others [minutes]; a round of a slow
            client may take longer than torch's default of 30.
        process_group_backend: ``gloo`` or ``nccl``; by default what fits the devices.

    Source: inferred; the paper simulates its clients on one device.
    """

    strategy_name = "federated"

    def __init__(
        self, timeout_minutes: float = 120.0, process_group_backend: str | None = None
    ) -> None:
        super().__init__(
            timeout=timedelta(minutes=timeout_minutes),
            process_group_backend=process_group_backend,
        )

    def configure_ddp(self) -> None:
        """Leave the model unwrapped."""
