"""Options of the modules of ice layers: inputs, loss, and what is predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fulgurite.errors import ConfigError
from fulgurite.models.ice_layers.data.batches import KeptBoundaries
from fulgurite.models.ice_layers.data.hiding import StructuredHiding
from fulgurite.models.ice_layers.training.losses import LossKind
from fulgurite.options import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    check_options,
)

__all__ = [
    "BaselinePrediction",
    "CompletionInputs",
    "CompletionLoss",
    "CompletionPrediction",
    "DeepInputs",
    "NetworkInputs",
    "PredictionOptions",
    "RobustLossOptions",
]

_KEY = "model.init_args"


@dataclass(frozen=True)
class NetworkInputs:
    """What networks are shown.

    Args:
        outlier: Picks that differ from their neighbours along the track by more than so many
            standard deviations of thickness, or typical deviations from the prior, are neither
            shown to the network nor asked for in training; null trusts all.

    Raises:
        ConfigError: ``outlier`` is not above 0.
    """

    outlier: PositiveFloat | None = None

    def __post_init__(self) -> None:
        check_options(self, f"{_KEY}.inputs")


@dataclass(frozen=True)
class CompletionInputs(NetworkInputs):
    """What networks of completion are shown, and what training hides from them.

    Args:
        outlier: Picks that differ from their neighbours along the track by more than so many
            standard deviations of thickness, or typical deviations from the prior, are neither
            shown to the network nor asked for in training; null trusts all.
        thickness: ``hidden``: observed thickness, a part of it hidden in training. ``none``: none
            of it, but physics and position. ``observed``: all of it, which teaches the network to
            copy.
        hiding: What training hides; by default as measured on real gaps.
        trap_ratio: Stop when the held-out error is so many times that of visible entries, and,
            unless ``thickness=observed``, no better than about that of each layer's mean; null
            never stops.

    Raises:
        ConfigError: A number is out of range, a word is unknown, or thickness is to be hidden and
            nothing is.

    Source: arXiv 2604.20783, abstract (readings); docs/papers/ice_layers.md section 1.5.
    """

    thickness: Literal["hidden", "none", "observed"] = "hidden"
    hiding: StructuredHiding = StructuredHiding()
    trap_ratio: PositiveFloat | None = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.thickness == "hidden" and not self.hiding.hides:
            raise ConfigError(
                f"{_KEY}.inputs.hiding hides nothing, so that the network would learn to copy.",
                f"Raise {_KEY}.inputs.hiding.layer and segment, or ask for it with "
                f"{_KEY}.inputs.thickness=observed.",
            )


@dataclass(frozen=True)
class DeepInputs(NetworkInputs):
    """What networks that predict deep layers are shown.

    Args:
        outlier: Picks that differ from their neighbours along the track by more than so many
            standard deviations of thickness, or typical deviations from the prior, are neither
            shown to the network nor asked for in training; null trusts all.
        shallow: Number of shallow layers, K.
        physics: ``all`` gives the physics of all layers, ``shallow`` that of the K shallow ones.

    Raises:
        ConfigError: A number is out of range or a word is unknown.

    Source: arXiv 2604.20783, docs/papers/ice_layers.md section 2. The authors' predictors see the
        physics of shallow layers; ``all`` is inferred, since climate models know all years.
    """

    shallow: PositiveInt = 5
    physics: Literal["all", "shallow"] = "all"


@dataclass(frozen=True)
class RobustLossOptions:
    """The robust loss.

    Args:
        kind: Kind of :func:`~fulgurite.models.ice_layers.training.losses.masked_robust_loss`.
        delta: Error at which the loss becomes linear, in standard deviations of thickness.

    Raises:
        ConfigError: ``kind`` is unknown, or ``delta`` is not above 0.
    """

    kind: LossKind = "huber"
    delta: PositiveFloat = 1.0

    def __post_init__(self) -> None:
        check_options(self, f"{_KEY}.loss")


@dataclass(frozen=True)
class CompletionLoss(RobustLossOptions):
    """The robust loss of completion, and the entries that it counts.

    Args:
        kind: Kind of :func:`~fulgurite.models.ice_layers.training.losses.masked_robust_loss`.
        delta: Error at which the loss becomes linear, in standard deviations of thickness.
        entries: ``observed`` counts all observed entries, ``hidden`` only those not seen.

    Raises:
        ConfigError: A word is unknown, or ``delta`` is not above 0.
    """

    entries: Literal["observed", "hidden"] = "observed"


@dataclass(frozen=True)
class PredictionOptions:
    """What networks predict, and how many of them.

    Args:
        prior: The network predicts what a ridge regression on physics leaves, see
            :class:`~fulgurite.models.ice_layers.networks.features.PhysicsPrior`; ``none`` as in
            the paper.
        members: Networks of an ensemble, trained side by side.

    Raises:
        ConfigError: A number is out of range or a word is unknown.
    """

    prior: Literal["none", "ridge", "relative", "log"] = "none"
    members: PositiveInt = 1

    def __post_init__(self) -> None:
        check_options(self, f"{_KEY}.prediction")


@dataclass(frozen=True)
class CompletionPrediction(PredictionOptions):
    """What networks of completion predict, and what becomes of it.

    Args:
        prior: The network predicts what a ridge regression on physics leaves, see
            :class:`~fulgurite.models.ice_layers.networks.features.PhysicsPrior`; ``none`` as in
            the paper.
        members: Networks of an ensemble, trained side by side.
        mc_samples: Predictions with dropout at evaluation; 0 for one without.
        keep_boundaries: Which picked boundaries come out where they were picked: where layers are
            missing between two of them, what they add up to is known, and they share it in the
            proportions that the network predicts. ``all``; ``trusted``, all but those that
            ``inputs.outlier`` finds contradicted; or ``none``, which fills each layer for itself,
            as the paper does, so that picks below a gap are moved.
        max_gap: Leave gaps missing that are longer [m], wholly absent layers among them.
        compile: Compile the networks before they test or predict (``torch.compile``), which takes
            a C++ compiler and half a minute, and leaves about two thirds of the time of a stack.

    Raises:
        ConfigError: A number is out of range or a word is unknown.

    Source: arXiv 2604.20783; docs/papers/ice_layers.md sections 1 and 7.
    """

    mc_samples: NonNegativeInt = 0
    keep_boundaries: KeptBoundaries = "all"
    max_gap: NonNegativeFloat | None = None
    compile: bool = False


@dataclass(frozen=True)
class BaselinePrediction:
    """What becomes of what a baseline predicts.

    Args:
        keep_boundaries: Which picked boundaries come out where they were picked, so that layers
            that are missing between two of them add up to what was measured: ``all`` of them, or
            ``none``, which fills each layer for itself; ``trusted`` leaves out those that
            ``kriging`` finds contradicted by all others, such as picks of another boundary.
            ``kriging`` learns from these sums, and divides what is left of them by its covariance;
            all others divide them in the proportions that they predict.
        max_gap: Leave gaps missing that are longer [m], wholly absent layers among them.

    Raises:
        ConfigError: A number is out of range or a word is unknown.
    """

    keep_boundaries: KeptBoundaries = "all"
    max_gap: NonNegativeFloat | None = None

    def __post_init__(self) -> None:
        check_options(self, f"{_KEY}.prediction")
