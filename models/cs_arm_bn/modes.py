"""Training mode against test mode: whether what is tested is what was trained."""

from __future__ import annotations

import torch

from fulgurite.domains.cs_arm_bn import PlateBatch
from fulgurite.models.cs_arm_bn.methods.base import query_loss
from fulgurite.models.cs_arm_bn.module import PlateClassifier
from fulgurite.modes import keep_modes

__all__ = ["compare_modes"]


@torch.no_grad()
def compare_modes(module: PlateClassifier, batch: PlateBatch) -> tuple[float, float]:
    """Loss of one batch as in training, and of the same batch as at test [nats].

    Parameters, running statistics and the generators of the CPU and of this device are
    unchanged afterwards.

    Args:
        module: The classifier.
        batch: A training batch, on the module's device.

    Source: inferred.
    """
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    losses, context = [], module.context
    devices = [module.device] if module.device.type == "cuda" else []
    with torch.random.fork_rng(devices), keep_modes(module):
        for training in (True, False):
            module.train(training)
            if not training:
                module.method.begin(module.network, (), training=False)
            logits = module.logits(batch, training=training)
            losses.append(float(query_loss(logits, batch.label)))
    module.method.end(module.network)
    module.context = context
    for buffer, value in buffers:
        buffer.copy_(value)
    return losses[0], losses[1]
