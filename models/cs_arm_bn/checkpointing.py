"""Activation checkpointing that restores the context of the first forward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from copy import copy
from typing import Any

from torch import Tensor, nn

from fulgurite.models.cs_arm_bn.batchnorm import Context, find_context_layers

__all__ = ["run_checkpointed"]


def run_checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    """Run a block without keeping its activations; the backward pass computes them again.

    The recomputation uses the context of the first pass, even if that has ended, and does not
    update running statistics.

    Source: docs/papers/cs_arm_bn.md section 7.7.
    """
    from torch.utils.checkpoint import checkpoint

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), _Recomputation(block)

    return checkpoint(block, x, use_reentrant=False, context_fn=contexts)  # type: ignore[no-any-return]


class _Recomputation(AbstractContextManager[None]):
    """Copies of the current contexts of a block's layers, to be set in the recomputation."""

    def __init__(self, block: nn.Module) -> None:
        self.layers = [*find_context_layers(block).values()]
        self.settings = [copy(m.context) or Context("ordinary") for m in self.layers]
        for setting in self.settings:
            setting._again, setting.used = True, []

    def __enter__(self) -> None:
        self.before = [layer.context for layer in self.layers]
        for layer, setting in zip(self.layers, self.settings, strict=True):
            layer.context = setting

    def __exit__(self, *_: object) -> None:
        for layer, setting in zip(self.layers, self.before, strict=True):
            layer.context = setting
