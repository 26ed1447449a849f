"""Losses of noise-aware local training, as functions of logits.

All are free of data-dependent control flow, so :func:`torch.func.vmap` can map them over clients.

Axes: B mini-batch, C classes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "adjusted_distillation",
    "log_prior",
    "logit_adjusted_cross_entropy",
    "ramp",
    "selective_distillation",
]


def log_prior(counts: Tensor, tau: float = 1.0, *, mask_absent: bool = False) -> Tensor:
    """Offset that makes logits account for how often a client's labels name each class.

    Args:
        counts: Labels per class. Shape: (C,) or (K, C).
        tau: Strength; 0 switches the adjustment off.
        mask_absent: Give absent classes −∞, which takes them out of the softmax (FedNoRo);
            otherwise an absent class counts as one label (FedSIR).

    Returns:
        ``tau · log π``, in the shape of the counts.

    Example:
        >>> log_prior(torch.tensor([3, 0])).exp()
        tensor([0.7500, 0.2500])

    Source: docs/papers/fedsir.md Stage III; ``mask_absent``: FedNoRo, IJCAI 2023.
    """
    frequencies = (counts if mask_absent else counts.clamp(min=1)).to(torch.get_default_dtype())
    if tau == 0:
        return torch.zeros_like(frequencies)  # not 0 · −∞
    return tau * (frequencies / frequencies.sum(-1, keepdim=True)).log()


def _reduce_loss(loss: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum(-1)
    if reduction == "mean":
        return loss.mean(-1)
    raise ValueError(f"reduction {reduction!r} is unknown. Use none, sum or mean.")


def logit_adjusted_cross_entropy(
    logits: Tensor, labels: Tensor, log_prior: Tensor, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy of ``logits + log_prior`` (LA).

    Args:
        logits: Logits of the network. Shape: (B, C).
        labels: Class of each sample. Shape: (B,).
        log_prior: Offsets from :func:`log_prior`. Shape: (C,).
        reduction: Reduction over the batch: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or the loss of each sample for ``"none"``. Shape: () or (B,).

    Example:
        >>> uniform = torch.full((2,), 0.5).log()
        >>> logits, labels = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
        >>> plain = torch.nn.functional.cross_entropy(logits, labels)
        >>> bool(logit_adjusted_cross_entropy(logits, labels, uniform).isclose(plain))
        True

    Source: docs/papers/fedsir.md Stage III, clean clients.
    """
    scores = F.log_softmax(logits + log_prior, dim=-1)
    return _reduce_loss(-scores.gather(-1, labels[..., None]).squeeze(-1), reduction)


def adjusted_distillation(
    logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor,
    weight: float | Tensor,
    *,
    log_prior: Tensor,
    temperature: float = 0.8,
    reduction: str = "mean",
) -> Tensor:
    """Distillation into the prior-adjusted student (LA_KD).

    ``weight · KL(softmax(teacher / T) ‖ softmax(logits + log_prior)) + (1 − weight) · NLL``. The
    student is not scaled by T, and the teacher is not adjusted.

    Args:
        logits: Logits of the student. Shape: (B, C).
        labels: Class of each sample. Shape: (B,).
        teacher_logits: Logits of the frozen global model. Shape: (B, C).
        weight: Weight of the teacher in [0, 1]; see :func:`ramp`.
        log_prior: Offsets from :func:`log_prior`. A class with −∞ adds only a constant to the
            divergence and gets no gradient. Shape: (C,).
        temperature: Temperature T of the teacher; the student is not scaled.
        reduction: Reduction over the batch: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or the loss of each sample for ``"none"``. Shape: () or (B,).

    Example:
        >>> logits, labels = torch.tensor([[2.0, 0.0]]), torch.tensor([1])
        >>> even = torch.zeros(2)
        >>> float(adjusted_distillation(logits, labels, logits, 1, log_prior=even, temperature=1))
        0.0

    Source: docs/papers/fedsir.md Stage III, noisy clients; −∞: FedNoRo, IJCAI 2023.
    """
    student = F.log_softmax(logits + log_prior, dim=-1)
    student = student.masked_fill(log_prior == -torch.inf, 0.0)
    teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
    divergence = (teacher.exp() * (teacher - student)).sum(-1)
    likelihood = -student.gather(-1, labels[..., None]).squeeze(-1)
    return _reduce_loss(weight * divergence + (1 - weight) * likelihood, reduction)


def selective_distillation(
    logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor,
    distil: Tensor,
    *,
    weight: float | Tensor,
    log_prior: Tensor,
    temperature: float = 0.8,
    reduction: str = "mean",
) -> Tensor:
    """LA_KD for the samples marked by ``distil``, LA for the others.

    The mean equals the paper's ``fraction · mean(LA_KD) + (1 − fraction) · mean(LA)``.

    Args:
        logits: Logits of the student. Shape: (B, C).
        labels: Class of each sample. Shape: (B,).
        teacher_logits: Logits of the frozen global model. Shape: (B, C).
        distil: Mask of the samples that learn from the teacher, bool. Shape: (B,).
        weight: Weight of the teacher in [0, 1].
        log_prior: Offsets from :func:`log_prior`. Shape: (C,).
        temperature: Temperature of the teacher.
        reduction: Reduction over the batch: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or the loss of each sample for ``"none"``. Shape: () or (B,).

    Example:
        >>> logits, labels, prior = torch.zeros(2, 3), torch.tensor([0, 1]), torch.zeros(3)
        >>> no = torch.tensor([False, False])
        >>> mixed = selective_distillation(logits, labels, logits, no, weight=0.2, log_prior=prior)
        >>> bool(mixed == logit_adjusted_cross_entropy(logits, labels, prior))
        True

    Source: docs/papers/fedsir.md Stage III, ``kd_on="disagree"``.
    """
    # per sample, LA is LA_KD with weight 0
    sample_weight = weight * distil.to(logits.dtype)
    return adjusted_distillation(
        logits,
        labels,
        teacher_logits,
        sample_weight,
        log_prior=log_prior,
        temperature=temperature,
        reduction=reduction,
    )


def ramp(round: int, begin: int = 2, end: int = 49, height: float = 0.2) -> float:
    """Weight of the teacher in a round: ``height · exp(−5 (1 − u)²)``, u rising from 0 to 1.

    Args:
        round: Index of the round, from 0.
        begin: Last round with u = 0.
        end: First round with u = 1; the weight stays at ``height`` afterwards.
        height: Largest weight, reached in round ``end``.

    Returns:
        The weight, in (0, height].

    Example:
        >>> [round(ramp(r), 4) for r in (0, 20, 49, 99)]
        [0.0013, 0.0298, 0.2, 0.2]

    Source: docs/papers/fedsir.md Stage III; the ramp is FedNoRo's.
    """
    u = min(max((round - begin) / (end - begin), 0.0), 1.0) if end > begin else float(round >= end)
    return height * math.exp(-5 * (1 - u) ** 2)
