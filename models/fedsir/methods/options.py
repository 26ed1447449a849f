"""Options that methods share, by subject."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fulgurite.models.fedsir.relabeling import RelabelMode
from fulgurite.options import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    check_options,
)

__all__ = ["AggregationOptions", "ClientLossOptions", "DistillationOptions", "RelabelingOptions"]

_METHOD = "model.init_args.method.init_args"


@dataclass(frozen=True)
class DistillationOptions:
    """Distillation from the global model on noisy clients.

    Args:
        begin: Last round in which the teacher has its smallest weight.
        end: First round in which the teacher has its largest weight.
        weight: Largest weight of the teacher.
        temperature: Temperature of the teacher.

    Raises:
        ConfigError: A number is out of range.

    Source: FedNoRo (IJCAI 2023) stage 2; docs/papers/fedsir.md Stage III.
    """

    begin: int = 2
    end: int = 49
    weight: ClosedUnitInterval = 0.2
    temperature: PositiveFloat = 0.8

    def __post_init__(self) -> None:
        check_options(self, f"{_METHOD}.distillation")


@dataclass(frozen=True)
class ClientLossOptions:
    """Losses of clean and of noisy clients.

    Args:
        tau: Strength of the logit adjustment; 0 gives plain cross-entropy.
        prior: Labels whose frequencies adjust the logits: those ``given`` (paper) or the
            ``current`` ones.
        clean: Loss of clean clients: logit-adjusted (``la``, paper) or plain (``ce``)
            cross-entropy.
        noisy: Loss of noisy clients: the same with (``la_kd``, paper; ``ce_kd``) or without
            (``la``, ``ce``) distillation from the global model.

    Raises:
        ConfigError: A word is unknown.

    Source: docs/papers/fedsir.md Stage III.
    """

    tau: float = 1.0
    prior: Literal["given", "current"] = "given"
    clean: Literal["la", "ce"] = "la"
    noisy: Literal["la_kd", "la", "ce_kd", "ce"] = "la_kd"

    def __post_init__(self) -> None:
        check_options(self, f"{_METHOD}.losses")


@dataclass(frozen=True)
class AggregationOptions:
    """Weights of the clients' models in the global one.

    Args:
        rule: Aggregation rule, ``distance`` (DaAgg) or ``size`` (FedAvg).
        floor: Scale distances so that the farthest client keeps e⁻¹ of its weight (paper).
        client_confidence: Multiply the weight of a noisy client by the fraction of its samples
            whose label the last relabeling decided.

    Raises:
        ConfigError: The rule is unknown.

    Source: docs/papers/fedsir.md Stage III; ``floor=False``, ``client_confidence``: ours.
    """

    rule: Literal["distance", "size"] = "distance"
    floor: bool = True
    client_confidence: bool = False

    def __post_init__(self) -> None:
        check_options(self, f"{_METHOD}.aggregation")


@dataclass(frozen=True)
class RelabelingOptions:
    """When noisy clients relabel their samples, by what, and what follows for training.

    Args:
        every: Number of rounds R between relabelings; 0 for never.
        first: First round with relabeling; R by default (paper).
        mode: Rule by which the two spectral scores decide; see
            :func:`~fulgurite.models.fedsir.relabeling.relabel`.
        min_confidence: Smallest confidence of an accepted proposal. 0 is the paper's rule.
        residual_rows: Number of residual directions of a class in the references.
        reference_min_count: Smallest class of a clean client that enters the references.
        teacher: Model whose features are used: the average of the ``clean`` clients' models of the
            previous round (paper), or the ``global`` model.
        distil_on: Samples of noisy clients that learn from the global model: those whose label was
            not decided since the scores ``disagree`` (paper; all before the first relabeling),
            ``all``, or ``none``.
        confidence_weighting: Weight the loss of relabeled samples by their confidence, and that
            of samples which kept their label by ``kept_weight``.
        kept_weight: Weight of the samples of noisy clients whose label no reference supports,
            after the first relabeling.

    Raises:
        ConfigError: A number is out of range, or a word unknown.

    Source: docs/papers/fedsir.md Stage II; weights, ``min_confidence``: ours.
    """

    every: NonNegativeInt = 20
    first: int | None = None
    mode: RelabelMode = "agree"
    min_confidence: float = 0.0
    residual_rows: PositiveInt = 12
    reference_min_count: int = 100
    teacher: Literal["clean", "global"] = "clean"
    distil_on: Literal["disagree", "all", "none"] = "disagree"
    confidence_weighting: bool = False
    kept_weight: NonNegativeFloat = 1.0

    def __post_init__(self) -> None:
        check_options(self, f"{_METHOD}.relabeling")

    def is_due(self, round: int) -> bool:
        """Whether a round is one of those in which noisy clients relabel."""
        return self.has_begun(round) and (round - self._start) % self.every == 0

    def has_begun(self, round: int) -> bool:
        """Whether relabeling is on, and a round not before its first."""
        return bool(self.every) and round >= self._start

    @property
    def _start(self) -> int:
        return self.every if self.first is None else self.first
