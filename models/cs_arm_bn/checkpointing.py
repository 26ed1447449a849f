"""Activations that are computed again in the backward pass, under the context of the first time."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from copy import copy
from typing import Any

from torch import Tensor, nn

from fulgurite.models.cs_arm_bn.batchnorm import Context, ContextLayer

__all__ = ["checkpointed"]


def checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    """Run a block without keeping its activations; the backward pass computes them again.

    The second computation sees the context of the first, even if that has ended, and moves no
    running statistics.

    Source: card section 7.7.
    """
    from torch.utils.checkpoint import checkpoint

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), _Recomputation(block)

    return checkpoint(block, x, use_reentrant=False, context_fn=contexts)  # type: ignore[no-any-return]


class _Recomputation(AbstractContextManager[None]):
    """The contexts of a block's layers as they are now, to be entered later."""

    def __init__(self, block: nn.Module) -> None:
        self.layers = [m for m in block.modules() if isinstance(m, ContextLayer)]
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
