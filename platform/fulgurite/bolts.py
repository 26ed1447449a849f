"""Parts of lightning-bolts 0.7.0 beside today's Lightning, loaded leaf by leaf.

Its pins predate Lightning 2 (``pytorch-lightning<2``, torchvision), so it is no dependency and no
extra: install it with ``pip install --no-deps lightning-bolts==0.7.0``. The package's own
``__init__`` files cannot be imported any more, but its leaf modules can; ``pl_bolts/__init__``
would also write ``numpy.object`` and other removed names back into NumPy, and never runs here.

The class paths ``fulgurite.bolts.LARS`` and ``fulgurite.bolts.LinearWarmupCosineAnnealingLR`` work
in a configuration; help and checks of their arguments work where bolts is absent, too.
"""

from __future__ import annotations

import functools
import importlib
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import ParamsT

from fulgurite.errors import MissingExtraError

__all__ = ["LARS", "LinearWarmupCosineAnnealingLR", "join_classes", "load_bolts"]


def load_bolts(module: str) -> types.ModuleType:
    """Import one leaf module of lightning-bolts without the packages above it.

    Args:
        module: Name below ``pl_bolts``, e.g. ``optimizers.lars`` or ``models.vision.unet``.

    Raises:
        MissingExtraError: lightning-bolts is not installed.
    """
    try:
        root = Path(str(metadata.distribution("lightning-bolts").locate_file("pl_bolts")))
    except metadata.PackageNotFoundError as error:
        raise MissingExtraError(
            f"pl_bolts.{module} needs lightning-bolts, which is not installed.",
            "Run `pip install --no-deps lightning-bolts==0.7.0`.",
        ) from error
    with _quiet():
        parents = [
            f"pl_bolts.{module}".rsplit(".", n)[0] for n in range(module.count(".") + 1, 0, -1)
        ]
        for name in ("pl_bolts", "pl_bolts.utils", *parents):  # hollow: their __init__ never runs
            parent = types.ModuleType(name)
            parent.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
            sys.modules.setdefault(name, parent)
        return importlib.import_module(f"pl_bolts.{module}")


class LARS(Optimizer):
    """SGD with layer-wise learning rates (bolts' ``LARS``).

    Args:
        params: Parameters or groups of them; groups without weight decay are not scaled.
        lr: Learning rate.
        momentum: Momentum factor.
        dampening: Dampening of the momentum.
        weight_decay: L2 penalty; 0 also switches the layer-wise scaling off.
        nesterov: Nesterov's momentum.
        trust_coefficient: Factor of the layer-wise rate.
        eps: Added to the denominator of the layer-wise rate.

    Raises:
        MissingExtraError: lightning-bolts is not installed.

    Source:
        Large batch training of convolutional networks, arXiv 1708.03888, equation 6.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        trust_coefficient: float = 0.001,
        eps: float = 1e-8,
    ) -> None:
        ours: type = type(self)
        self.__class__ = join_classes(ours, "optimizers.lars")
        options = (momentum, dampening, weight_decay, nesterov, trust_coefficient, eps)
        with _quiet():
            super().__init__(params, lr, *options)  # type: ignore[arg-type, call-arg]  # bolts' own


class LinearWarmupCosineAnnealingLR(LRScheduler):
    """A linear rise of the learning rate, then half a cosine (bolts' class of this name).

    Args:
        optimizer: Optimizer whose rates are scheduled.
        warmup_epochs: Steps of the rise; at least 1, and less than ``max_epochs``, for bolts
            divides by the difference after the last step.
        max_epochs: Steps in all.
        warmup_start_lr: Rate of the first step.
        eta_min: Rate after ``max_epochs`` steps; the last of them is still above it.
        last_epoch: Index of the last step done; -1 at the start.

    Raises:
        MissingExtraError: lightning-bolts is not installed.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_epochs: int,
        max_epochs: int,
        *,
        warmup_start_lr: float = 0.0,
        eta_min: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        ours: type = type(self)
        self.__class__ = join_classes(ours, "optimizers.lr_scheduler")
        steps = (warmup_epochs, max_epochs, warmup_start_lr, eta_min, last_epoch)
        with _quiet():
            super().__init__(optimizer, *steps)  # type: ignore[call-arg]  # bolts' own


@functools.cache
def join_classes(ours: type, module: str) -> type:
    """Put our typed class, which the command line reads, over bolts' class of the same name.

    Args:
        ours: The typed class.
        module: Module of bolts, without ``pl_bolts.``.

    Raises:
        MissingExtraError: lightning-bolts is not installed.
    """
    theirs = getattr(load_bolts(module), ours.__name__)
    if issubclass(ours, theirs):  # a copy of an instance
        return ours
    return type(ours.__name__, (ours, theirs), {"__module__": ours.__module__})


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence bolts' ``UnderReviewWarning``: it marks all of bolts, and its last release is final.

    The filters that bolts adds when it is imported are taken back as well.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The feature .* is currently marked under review")
        yield
