"""Training and evaluation mode of the parts of a network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["keep_modes"]


@contextmanager
def keep_modes(model: nn.Module) -> Iterator[None]:
    """Restore the training or evaluation mode of each module when the block ends.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 1).eval())
        >>> with keep_modes(model):
        ...     _ = model.train()
        >>> model.training, model[0].training
        (True, False)
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
