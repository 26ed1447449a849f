"""Spectral relabeling: references from clean clients, and the labels they suggest.

No function here uses true labels, and the proposed class of a sample does not depend on its given
label.

Axes: N samples, C classes, D feature dim, K clean clients, Q residual rows (12 in the paper).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal, get_args

import torch
from torch import Tensor

from fulgurite.devices import running_sum
from fulgurite.errors import ConfigError, DataError
from fulgurite.models.fedsir.spectra import ClassSpectra, SpectraAccumulator
from fulgurite.models.fedsir.wire import on_wire

__all__ = [
    "ClientReference",
    "References",
    "RelabelMode",
    "Relabeling",
    "aggregate_references",
    "choose_k",
    "client_reference",
    "relabel",
]

RelabelMode = Literal[
    "agree", "sr", "sn", "ratio", "agree_then_sr", "agree_then_sn", "agree_then_ratio"
]

_CHUNK = 8192  # samples scored at once: C·Q float64 projections each
_EPS = 1e-6  # keeps the ratio score finite


def choose_k(values: Tensor, ratio: float = 10.0) -> Tensor:
    """Smallest k ≥ 1 whose leading singular values sum to ``ratio`` times the others.

    Args:
        values: Singular values, descending. Shape: (..., R).
        ratio: Ratio of the leading sum to the remaining one; 10 keeps 10/11 of the nuclear norm.

    Returns:
        k from 1 to R, int64. Shape: (...).

    Example:
        >>> int(choose_k(torch.tensor([10.0] + [1.0] * 20)))
        19

    Source: docs/papers/fedsir.md Stage II, step a.
    """
    head = running_sum(values.double())
    enough = head >= ratio * (head[..., -1:] - head)
    return enough.to(torch.int8).argmax(-1) + 1


@dataclass(frozen=True)
class ClientReference:
    """Class directions and residual subspaces that one clean client sends to the server.

    Attributes:
        counts: Samples per class, int64. Shape: (C,).
        weight: ``N · gap · s1_ratio`` of the singular values, float64; 0 if absent. Shape: (C,).
        direction: Dominant direction, float64; 0 if absent. Shape: (C, D).
        residual: Directions just after the first k, as rows; 0 beyond ``rows``. Shape: (C, Q, D).
        rows: Number of residual rows, int64; 0 if k uses up the rank. Shape: (C,).
    """

    counts: Tensor
    weight: Tensor
    direction: Tensor = field(metadata=on_wire(torch.float32))
    residual: Tensor = field(metadata=on_wire(torch.float32))
    rows: Tensor

    @property
    def valid(self) -> Tensor:
        """Classes with a direction and a residual. Shape: (C,)."""
        return self.rows > 0


@dataclass(frozen=True)
class References:
    """Reference subspaces that all noisy clients use.

    Attributes:
        direction: Unit vectors, float64; 0 where not valid. Shape: (C, D).
        residual: Orthonormal rows, float64; 0 beyond ``rows``. Shape: (C, Q, D).
        rows: Number of residual rows, int64. Shape: (C,).
        valid: Classes that have a reference, bool. Shape: (C,).
    """

    direction: Tensor = field(metadata=on_wire(torch.float32))
    residual: Tensor = field(metadata=on_wire(torch.float32))
    rows: Tensor
    valid: Tensor


def client_reference(
    spectra: ClassSpectra | SpectraAccumulator, *, residual_rows: int = 12, ratio: float = 10.0
) -> ClientReference:
    """Directions and residuals that a clean client sends.

    From an accumulator, the classes are decomposed a few at a time and only these rows are kept.

    Args:
        spectra: Spectra of one client's features under the teacher, grouped by its labels.
        residual_rows: Number of residual rows Q.
        ratio: Argument of :func:`choose_k`.

    Returns:
        Tensors only, of shapes that depend on C, Q and D alone, so ranks can exchange them.

    Example:
        >>> from fulgurite.models.fedsir.spectra import class_spectra
        >>> features = torch.diag(torch.tensor([30.0, 1.0, 0.5]))
        >>> reference = client_reference(class_spectra(features, torch.zeros(3).long(), 2))
        >>> reference.rows.tolist(), reference.valid.tolist()
        ([2, 0], [True, False])

    Source: docs/papers/fedsir.md Stage II, step a; zero rows for an empty residual: inferred.
    """
    if isinstance(spectra, SpectraAccumulator):
        parts = [
            client_reference(part, residual_rows=residual_rows, ratio=ratio)
            for part in spectra.chunks()
        ]
        names = [field.name for field in fields(ClientReference)]
        return ClientReference(*(torch.cat([getattr(p, n) for p in parts]) for n in names))
    values, vectors = spectra.values, spectra.vectors
    leading = choose_k(values, ratio)
    rows = (spectra.rank - leading).clamp(min=0, max=residual_rows)
    offsets = torch.arange(residual_rows, device=values.device)
    index = (leading[:, None] + offsets).clamp(max=values.shape[1] - 1)
    residual = vectors.take_along_dim(index[..., None], dim=1)
    residual = torch.where((offsets < rows[:, None])[..., None], residual, 0.0)
    first = values[:, 0]
    second = values[:, 1] if values.shape[1] > 1 else torch.zeros_like(first)
    # gap · s1_ratio = (S1 − S2)/S1 · S1/ΣS
    quality = (first - second) / values.sum(1).clamp(min=torch.finfo(values.dtype).tiny)
    return ClientReference(
        spectra.counts, spectra.counts * quality, vectors[:, 0].clone(), residual, rows
    )


def _top_singular_rows(stacked: Tensor, max_rows: int) -> tuple[Tensor, Tensor]:
    """Top right singular rows of stacked rows, and all eigenvalues, through the smaller Gram."""
    values, eigenvectors = torch.linalg.eigh(stacked @ stacked.mT)
    values, eigenvectors = values.flip(-1).clamp(min=0), eigenvectors.mT.flip(-2)
    count = min(max_rows, stacked.shape[-2])
    rows = torch.nn.functional.normalize(eigenvectors[..., :count, :] @ stacked, dim=-1)
    return rows, values


def aggregate_references(
    references: Sequence[ClientReference],
    *,
    min_count: int = 100,
    min_fallback: int = 20,
    consensus: float = 0.03,
) -> References:
    """One reference per class from those of the clean clients.

    The direction is the top eigenvector of ``Σ w v vᵀ``, the residual the top Q of ``Σ w PᵀP``,
    over the clients with ``min_count`` samples of the class. Where there is none, or the clients
    disagree (λ1 − λ2 < ``consensus``), the client with most samples stands alone. The residual
    "consensus" is mostly that of the heaviest client.

    A class is valid if its reference rests on at least ``min_fallback`` samples and has a
    residual; :func:`relabel` abstains on the others. (The authors' code raises on a class that is
    missing, and takes an empty residual for a perfect fit.)

    Args:
        references: References of the clean clients, in any order.
        min_count: Samples of a class that let a client take part in the consensus.
        min_fallback: Samples of a class that let a client stand alone.
        consensus: Smallest difference of the two largest eigenvalues, which sum to at most 1.

    Returns:
        The references, on the device of the first.

    Raises:
        DataError: ``references`` is empty, or the references differ in shape.

    Example:
        >>> from fulgurite.models.fedsir.spectra import class_spectra
        >>> features = torch.eye(24) + 3
        >>> spectra = class_spectra(features, torch.zeros(24).long(), 2)
        >>> references = aggregate_references([client_reference(spectra)])
        >>> references.valid.tolist()
        [True, False]

    Source: docs/papers/fedsir.md Stage II, step b; abstention: inferred.
    """
    if not references:
        raise DataError(
            "there is no clean client to take a reference from.",
            "Lower model.init_args.method.init_args.threshold, or skip relabeling.",
        )
    if len({reference.residual.shape for reference in references}) != 1:
        raise DataError(
            "references of different shapes cannot be combined.",
            "Use the same classes, feature size and residual rows for all clients.",
        )
    device = references[0].direction.device
    counts, weight, direction, residual, rows = (
        torch.stack([getattr(reference, field.name).to(device) for reference in references])
        for field in fields(ClientReference)
    )
    clients, classes, max_rows, dim = residual.shape
    # without a residual, or with equal leading values, a client does not contribute
    usable = torch.where((rows > 0) & (weight > 0), counts, 0)
    client_weight = torch.where(usable >= min_count, weight, 0.0)
    client_weight = client_weight / client_weight.sum(0).clamp(
        min=torch.finfo(client_weight.dtype).tiny
    )

    scale = client_weight.sqrt()
    v, v_values = _top_singular_rows((scale[..., None] * direction).movedim(0, 1), 1)
    p, p_values = _top_singular_rows(
        (scale[..., None, None] * residual).movedim(0, 1).reshape(classes, clients * max_rows, dim),
        max_rows,
    )
    lead = v_values[:, 0] - (v_values[:, 1] if clients > 1 else 0.0)
    # the weight of the heaviest client is positive, so at least its rows exist
    p_rows = (p_values[:, :max_rows] > p_values[:, :1] * 1e-12).sum(1)
    agreed = (usable >= min_count).any(0) & (lead >= consensus)

    largest, heaviest = usable.max(0)
    alone = torch.arange(classes, device=device)
    valid = agreed | (largest >= min_fallback)
    rows = torch.where(agreed, p_rows, rows[heaviest, alone]) * valid
    direction = torch.where(agreed[:, None], v[:, 0], direction[heaviest, alone])
    residual = torch.where(agreed[:, None, None], p, residual[heaviest, alone])
    present = torch.arange(max_rows, device=device) < rows[:, None]
    return References(
        direction * valid[:, None], torch.where(present[..., None], residual, 0.0), rows, valid
    )


@dataclass(frozen=True)
class Relabeling:
    """Suggested labels of one client's samples, and the scores behind them.

    Attributes:
        labels: The given labels, replaced where ``accepted``, int64. Shape: (N,).
        accepted: Samples whose label comes from the references, bool; the others keep their given
            label and are the paper's distillation set. Shape: (N,).
        agree: Samples for which both scores name the same class, whatever the given label, bool.
            Shape: (N,).
        proposal: The class that the mode suggests, whatever the given label, int64. Shape: (N,).
        confidence: Confidence of the proposal in [0, 1]: ``1 − ratio(best) / ratio bound of the
            others``, where 0 means that another class fits as well. Shape: (N,).
        by_direction: Class of the largest ``direction_scores``, int64. Shape: (N,).
        by_residual: Class of the smallest ``residual_scores``, int64. Shape: (N,).
        direction_scores: S^r, larger is better, in [0, 1]; −inf for a class without reference.
            Shape: (N, C).
        residual_scores: S^n of unit features, smaller is better; inf for a class without
            reference. Shape: (N, C).
    """

    labels: Tensor
    accepted: Tensor
    agree: Tensor
    proposal: Tensor
    confidence: Tensor
    by_direction: Tensor
    by_residual: Tensor
    direction_scores: Tensor
    residual_scores: Tensor


def _score_features(features: Tensor, references: References) -> tuple[Tensor, Tensor]:
    """S^r and S^n of unit features; NaN features have NaN scores."""
    unit = torch.nn.functional.normalize(features.to(references.direction), dim=1)
    classes, max_rows, dim = references.residual.shape
    fit = (unit @ references.direction.mT).abs()
    projected = (unit @ references.residual.reshape(classes * max_rows, dim).mT).square()
    residual = projected.view(-1, classes, max_rows).sum(-1) / references.rows.clamp(min=1)
    return (
        fit.masked_fill(~references.valid, -torch.inf),
        residual.sqrt().masked_fill(~references.valid, torch.inf),
    )


def _proposal_confidence(fit: Tensor, residual: Tensor, proposal: Tensor) -> Tensor:
    """``1 − (best other S^r / own S^r) · (own S^n / best other S^n)``, clipped to [0, 1]."""
    is_proposal = torch.nn.functional.one_hot(proposal, fit.shape[1]).bool()
    other_fit = fit.masked_fill(is_proposal, -torch.inf).amax(1).clamp(min=0)
    other_residual = residual.masked_fill(is_proposal, torch.inf).amin(1)
    own_fit = fit.gather(1, proposal[:, None])[:, 0]
    own_residual = residual.gather(1, proposal[:, None])[:, 0]
    ratio = other_fit * own_residual / (own_fit * other_residual)
    return torch.nan_to_num(1 - ratio, nan=0.0).clamp(0, 1)


def relabel(
    features: Tensor,
    labels: Tensor,
    references: References,
    *,
    mode: RelabelMode = "agree",
    min_confidence: float = 0.0,
) -> Relabeling:
    """Replace labels by the class whose direction fits and whose residual does not.

    ``S^r = |ẑᵀ v_c|`` is largest, and ``S^n = ‖V_c^n ẑ‖ / √rows`` smallest, for the right class;
    with ``mode="agree"`` a label is replaced where both name the same class. (S^n is computed
    on the unit feature ẑ, which changes no decision and makes the scores comparable between
    samples.)

    The given label stays where the scores cannot decide: for samples *given* a class without
    reference, since a sample of that class could only be moved away from it; for features that
    are zero or not finite; and everywhere if fewer than two classes have a reference. Samples
    given another class can still be moved, but never to a class without reference.

    Args:
        features: Features of the noisy client under the teacher, any floating type.
            Shape: (N, D).
        labels: The given labels, not relabeled ones, so that changes do not accumulate.
            Shape: (N,).
        references: References from :func:`aggregate_references`.
        mode: Rule of the proposal: ``agree`` (paper), or always the class of S^r (``sr``), of S^n
            (``sn``) or of S^n / S^r (``ratio``); ``agree_then_*`` uses the second rule where the
            two disagree.
        min_confidence: Smallest confidence of an accepted proposal. 0 is the paper's rule.

    Returns:
        Labels and scores, on the device of ``features``.

    Raises:
        ConfigError: ``mode`` is unknown.
        DataError: Features and references differ in feature dimension.

    Example:
        >>> eye = torch.eye(4, dtype=torch.float64)
        >>> references = References(
        ...     direction=eye[:2], residual=eye[2:, None], rows=torch.tensor([1, 1]),
        ...     valid=torch.tensor([True, True]),
        ... )
        >>> features = torch.tensor([[1.0, 0.2, 0.0, 0.5], [1.0, 0.2, 0.5, 0.0]])
        >>> result = relabel(features, torch.tensor([1, 1]), references)
        >>> result.labels.tolist(), result.agree.tolist()
        ([0, 1], [True, False])

    Source: docs/papers/fedsir.md Stage II, steps c and d; abstention and confidence: inferred.
    """
    if mode not in get_args(RelabelMode):
        raise ConfigError(
            f"mode {mode!r} of relabeling is unknown.", f"Use one of {get_args(RelabelMode)}."
        )
    if features.ndim != 2 or features.shape[1] != references.direction.shape[1]:
        raise DataError(
            f"features of shape {tuple(features.shape)} do not fit references of dimension "
            f"{references.direction.shape[1]}.",
            "Compute both with the same network.",
        )
    device = features.device
    references = References(
        *(getattr(references, field.name).to(device) for field in fields(References))
    )
    labels = labels.to(device)
    parts = [_score_features(chunk, references) for chunk in torch.split(features.detach(), _CHUNK)]
    fit, residual = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    decidable = features.isfinite().all(1) & (features != 0).any(1)
    decidable &= references.valid.sum() >= 2
    by_direction, by_residual = fit.argmax(1), residual.argmin(1)
    by_ratio = (residual / (fit.clamp(min=0) + _EPS)).argmin(1)
    agree = (by_direction == by_residual) & decidable

    rule = mode.removeprefix("agree_then_")
    proposal = {"sr": by_direction, "sn": by_residual}.get(rule, by_ratio)
    proposal = torch.where(agree, by_direction, proposal)
    confidence = torch.where(decidable, _proposal_confidence(fit, residual, proposal), 0.0)
    accepted = agree if mode == "agree" else decidable
    accepted = accepted & references.valid[labels] & (confidence >= min_confidence)
    return Relabeling(
        labels=torch.where(accepted, proposal, labels),
        accepted=accepted,
        agree=agree,
        proposal=proposal,
        confidence=confidence,
        by_direction=by_direction,
        by_residual=by_residual,
        direction_scores=fit,
        residual_scores=residual,
    )
