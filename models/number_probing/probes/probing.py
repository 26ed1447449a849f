"""Held-out linear probes of n mod T, scored by Cohen's κ.

Axes: N numbers, D embedding width, T period, S seeds, F folds, E = S F models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fulgurite.devices import count_weighted, move
from fulgurite.errors import ConfigError
from fulgurite.models.number_probing.probes.fold_statistics import StandardizedRows
from fulgurite.models.number_probing.probes.lda import lda_scores
from fulgurite.models.number_probing.spectra.fourier import PERIODS
from fulgurite.models.number_probing.tables.checks import check_embeddings, check_periods

__all__ = [
    "ClassifierOptions", "FoldKind", "FoldOptions", "Method", "ProbeResult", "band", "cohen_kappa",
    "make_folds", "probe",
]  # fmt: skip

Method = Literal["lda", "logistic"]
FoldKind = Literal["shuffled", "decade", "contiguous"]


@dataclass(frozen=True)
class ProbeResult:
    """The probe of one period.

    Attributes:
        period: T.
        kappa: Cohen's κ of held-out predictions, mean over seeds [1].
        accuracy: Fraction of right held-out predictions, mean over seeds [1].
        train_kappa: κ on the rows that a model was fitted to; 1 for every T where D ≥ N [1].
        kappa_nonround: κ of a probe that was fitted and held out on the numbers that 5 does not
            divide [1].
        nonround_band: Bound that ``kappa_nonround`` exceeds if it is more than chance [1].
        null_sd: Standard deviation of κ by chance: measured on permuted numbers where at least
            eight were drawn, else 1/√(N(T−1)) [1].
        recall: Fraction of right held-out predictions by residue [1].
        kappas: κ of each seed. Length: S.
        null_kappas: κ of each permutation of the numbers.
        size: N.

    Source: arXiv 2604.20817; folds and null docs/papers/number_probing.md sections 1.5, inferred.
    """

    period: int
    kappa: float
    accuracy: float
    train_kappa: float
    kappa_nonround: float
    nonround_band: float
    null_sd: float
    recall: dict[int, float]
    kappas: tuple[float, ...]
    null_kappas: tuple[float, ...]
    size: int

    @property
    def band(self) -> float:
        """Bound that κ exceeds if it is more than chance [1]; see :func:`band`."""
        return band(self.size, self.null_sd)


class _HeldOutAnswers(NamedTuple):
    labels: Tensor
    predicted: Tensor
    answers: Tensor
    fold: Tensor
    kappas: Tensor


def band(size: int, null_sd: float) -> float:
    """Four standard deviations of κ by chance, and not less than 0.06 for N = 1000.

    Predictions are less independent than the formula of ``null_sd`` assumes, most so where there
    are many classes.

    Example:
        >>> round(band(1000, 1 / 1000**0.5), 3), round(band(1000, 1 / 9000**0.5), 3)
        (0.126, 0.06)

    Source: docs/papers/number_probing.md section 1.5, inferred.
    """
    return max(4 * null_sd, 0.06 * math.sqrt(1000 / size))


def cohen_kappa(
    labels: Tensor, predicted: Tensor, classes: int, weight: Tensor | None = None
) -> Tensor:
    """Cohen's κ: agreement beyond that of independent answers with the same shares.

    Args:
        labels: Right answers. Shape: (N,).
        predicted: Predicted classes, one row for each set of answers. Shape: (S, N).
        classes: T.
        weight: Weight of each answer; by default 1. Shape: (S, N).

    Returns:
        κ of each row, 0 where every label and answer is of one class. Shape: (S,).

    Example:
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> cohen_kappa(labels, torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1], [1, 1, 0, 0]]), 2)
        tensor([ 1.,  0., -1.], dtype=torch.float64)

    Source: Cohen, 1960; arXiv 2604.20817.
    """
    rows = len(predicted)
    row_offset = torch.arange(rows, device=labels.device)[:, None] * classes + labels
    cell = (row_offset * classes + predicted).flatten()
    if weight is None:
        counts = cell.bincount(minlength=rows * classes**2)
    else:
        counts = count_weighted(cell, weight.flatten(), rows * classes**2)
    confusion = counts.view(rows, classes, classes).double()
    confusion = confusion / confusion.sum((1, 2), keepdim=True)
    observed = confusion.diagonal(dim1=1, dim2=2).sum(-1)
    expected = (confusion.sum(1) * confusion.sum(2)).sum(-1)
    certain = expected > 1 - 1e-12
    return torch.where(certain, 0.0, (observed - expected) / (1 - expected).where(~certain, 1.0))


def make_folds(
    numbers: Tensor, period: int, folds: int, kind: FoldKind = "shuffled", *, seed: int = 0
) -> Tensor:
    """The fold in which each number is held out.

    Args:
        numbers: Shape: (N,).
        period: T.
        folds: F.
        kind: ``shuffled``: at random, each residue spread evenly. ``decade``: whole decades n // 10
            at random, so that neighbours are held out together. ``contiguous``: F intervals.
        seed: Seed of the random kinds.

    Returns:
        Folds from 0, int64, on the device of ``numbers``. Shape: (N,).

    Raises:
        ConfigError: The kind is unknown, or there are fewer than two folds.

    Example:
        >>> make_folds(torch.arange(8), 2, 4, "contiguous")
        tensor([0, 0, 1, 1, 2, 2, 3, 3])
        >>> folds = make_folds(torch.arange(40), 2, 5)
        >>> folds[::2].bincount().tolist(), folds[1::2].bincount().tolist()
        ([4, 4, 4, 4, 4], [4, 4, 4, 4, 4])

    Source: docs/papers/number_probing.md section 1.5.
    """
    if folds < 2:
        raise ConfigError(f"folds={folds} is too small.", "Give 2 or more; 5 is usual.")
    n = numbers.cpu()
    order = torch.empty_like(n)
    generator = torch.Generator().manual_seed(seed)
    if kind == "contiguous":
        order[n.argsort()] = torch.arange(len(n))
        fold = order * folds // len(n)
    elif kind == "decade":
        decade = torch.unique(n // 10, return_inverse=True)[1]
        fold = torch.randperm(int(decade.max()) + 1, generator=generator)[decade] % folds
    elif kind == "shuffled":
        shuffled = n % period * len(n) + torch.randperm(len(n), generator=generator)
        fold = order.scatter_(0, shuffled.argsort(), torch.arange(len(n)) % folds)
    else:
        raise ConfigError(f"The folds {kind!r} are unknown.", "Use shuffled, decade or contiguous.")
    return move(fold, numbers.device)


@dataclass(frozen=True)
class FoldOptions:
    """How numbers are held out.

    Args:
        count: F.
        kind: See :func:`make_folds`. With ``shuffled`` a probe sees n−1 and n+1, of another
            residue: embeddings smooth in n then give a negative κ, which the others do not.
        seeds: S. Contiguous folds are all alike and take one.

    Raises:
        ConfigError: There are too few folds or seeds.
    """

    count: int = 5
    kind: FoldKind = "shuffled"
    seeds: int = 2

    def __post_init__(self) -> None:
        if self.count < 2:
            raise ConfigError(f"folds={self.count} is too small.", "Give 2 or more; 5 is usual.")
        if self.seeds < 1:
            raise ConfigError(f"seeds={self.seeds} is out of range.", "Give 1 or more.")
        if self.kind == "contiguous":
            object.__setattr__(self, "seeds", 1)  # the record is frozen

    def make(self, numbers: Tensor, period: int, seeds: range) -> Tensor:
        """Return the folds of some seeds. Shape: (S, N)."""
        return torch.stack(
            [make_folds(numbers, period, self.count, self.kind, seed=seed) for seed in seeds]
        )


@dataclass(frozen=True)
class ClassifierOptions:
    """The linear classifier.

    Args:
        method: ``lda``: shrinkage LDA, equal to scikit-learn's. ``logistic``: multinomial logistic
            regression with an L2 penalty on standardised features, one to two orders slower.
        shrinkage: Shrinkage of LDA: ``auto`` for Ledoit and Wolf's, a weight from 0 to 1, or 0 for
            plain LDA.
        strength: C of logistic regression: weight of the data against the penalty.

    Raises:
        ConfigError: The method is unknown, or the strength is not positive.
    """

    method: Method = "lda"
    shrinkage: float | Literal["auto"] = "auto"
    strength: float = 1.0

    def __post_init__(self) -> None:
        if self.method not in ("lda", "logistic"):
            raise ConfigError(f"The probe {self.method!r} is unknown.", "Use lda or logistic.")
        if self.strength <= 0:
            raise ConfigError(f"strength={self.strength} is out of range.", "Give more than 0.")

    def scores(self, table: StandardizedRows, labels: Tensor, classes: int, fold: Tensor) -> Tensor:
        """Scores of the classes by each model. Shape: (S, F, N, T).

        Args:
            table: The rows.
            labels: Class of each row. Shape: (N,).
            classes: T.
            fold: Fold in which each row is held out. Shape: (S, N).
        """
        if self.method == "lda":
            return lda_scores(table, labels, classes, fold, shrinkage=self.shrinkage)
        from fulgurite.models.number_probing.probes.logistic import logistic_scores

        return logistic_scores(table, labels, classes, fold, strength=self.strength)


@dataclass(frozen=True)
class _Prober:
    """Probes tables of rows."""

    folds: FoldOptions
    classifier: ClassifierOptions

    def answer_held_out(
        self, table: StandardizedRows, n: Tensor, period: int, seeds: range
    ) -> _HeldOutAnswers:
        """Answer numbers held out, with the folds of some seeds."""
        fold = self.folds.make(n, period, seeds)
        residues, labels = torch.unique(n % period, return_inverse=True)
        if len(residues) < 2:
            raise ConfigError(
                f"All numbers are alike mod {period}.", "Probe other numbers or periods."
            )
        scores = self.classifier.scores(table, labels, len(residues), fold)
        answers = scores.max(-1).indices  # several times as fast as argmax; (S, F, N)
        predicted = answers.gather(1, fold[:, None])[:, 0]
        kappas = cohen_kappa(labels, predicted, len(residues))
        return _HeldOutAnswers(labels, predicted, answers, fold, kappas)

    def null_kappas(
        self, table: StandardizedRows, n: Tensor, period: int, draws: int
    ) -> tuple[float, ...]:
        """κ of permuted numbers, one seed each."""
        null = []
        for draw in range(draws):
            # other numbers for the same rows: statistics that all periods share stay valid
            order = torch.randperm(len(n), generator=torch.Generator().manual_seed(10_000 + draw))
            permuted = n[order.to(n.device)]
            answers = self.answer_held_out(table, permuted, period, range(draw, draw + 1))
            null.append(float(answers.kappas))
        return tuple(null)

    def nonround_kappa(
        self, table: StandardizedRows, n: Tensor, period: int
    ) -> tuple[float, float]:
        """κ of the numbers that 5 does not divide by themselves, and its band."""
        part = self.answer_held_out(table, n, period, range(self.folds.seeds))
        size = len(part.labels)
        bound = band(size, (size * int(part.labels.max())) ** -0.5)
        return float(part.kappas.mean()), bound


def _train_kappa(held_out: _HeldOutAnswers, classes: int) -> float:
    """κ on the rows that models were fitted to."""
    labels, _, answers, fold, _ = held_out
    models = torch.arange(answers.shape[1], device=answers.device)  # by the fold held out
    is_fitted = (fold[:, None] != models[:, None]).double()  # (S, F, N)
    repeated = labels.repeat(len(models) * len(fold))
    return float(cohen_kappa(repeated, answers.reshape(1, -1), classes, is_fitted))


def _recall_by_residue(held_out: _HeldOutAnswers, residues: Tensor) -> dict[int, float]:
    """Fraction of right held-out predictions of each residue."""
    labels = held_out.labels
    correct = (held_out.predicted == labels).double()
    sums = correct.new_zeros(len(residues)).index_add_(0, labels, correct.mean(0))
    recall = sums / labels.bincount()
    return dict(zip(residues.tolist(), recall.tolist(), strict=True))


def probe(
    embeddings: Tensor,
    periods: Sequence[int] = PERIODS,
    *,
    numbers: Sequence[int] | Tensor | None = None,
    folds: FoldOptions = FoldOptions(),
    classifier: ClassifierOptions = ClassifierOptions(),
    nonround: bool = True,
    null_draws: int = 0,
    allow_duplicates: bool = False,
) -> dict[int, ProbeResult]:
    """Held-out linear probes of n mod T.

    Each seed deals the folds anew; the predictions of all folds of a seed are pooled into one κ.

    Args:
        embeddings: One row for each number. Shape: (N, D).
        periods: T.
        numbers: The integer of each row; by default 0 … N−1. Shape: (N,).
        folds: How numbers are held out.
        classifier: What is fitted to the others.
        nonround: Probe the numbers that 5 does not divide by themselves as well.
        null_draws: Probe that many random permutations of the numbers as well, one seed each.
        allow_duplicates: As in :func:`check_embeddings`.

    Returns:
        Results by period, ascending.

    Raises:
        ConfigError: A setting is out of range, or a fold leaves too few numbers.
        DataError: See :func:`check_embeddings`; or plain LDA has a singular covariance.

    Example:
        >>> turn = torch.arange(100.0)[:, None] * 2 * torch.pi / 10
        >>> noise = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
        >>> circle = torch.cat([turn.cos(), turn.sin()], 1) + 0.02 * noise
        >>> results = probe(circle, [2, 10])
        >>> results[10].kappa, abs(results[2].kappa) < results[2].band
        (1.0, True)

    Source: arXiv 2604.20817 (linear probe, κ); docs/papers/number_probing.md section 1.5 (folds,
    seeds, probe), inferred.
    """
    if null_draws < 0:
        raise ConfigError(f"null_draws={null_draws} is out of range.", "Give 0 or more.")
    x, n = check_embeddings(embeddings, numbers, allow_duplicates=allow_duplicates)
    if folds.count > len(n):
        raise ConfigError(
            f"folds={folds.count} is more than the {len(n)} numbers.", "Use fewer folds."
        )
    prober, table = _Prober(folds, classifier), StandardizedRows(x)
    is_nonround = n % 5 != 0
    if nonround and not bool(is_nonround.any()):
        raise ConfigError(
            f"5 divides all of the {len(n)} numbers, so that none is left to probe those that it "
            "does not divide.",
            "Set nonround=False, or probe other numbers.",
        )
    nonround_table = StandardizedRows(x[is_nonround]) if nonround else table
    results = {}
    for period in check_periods(periods, len(x)):
        held_out = prober.answer_held_out(table, n, period, range(folds.seeds))
        residues = torch.unique(n % period)
        null = prober.null_kappas(table, n, period, null_draws)
        null_sd = (len(n) * (len(residues) - 1)) ** -0.5
        if null_draws >= 8:
            null_sd = float(torch.tensor(null).std())
        nonround_kappa, nonround_band = math.nan, math.nan
        if nonround:
            nonround_kappa, nonround_band = prober.nonround_kappa(
                nonround_table, n[is_nonround], period
            )
        correct = (held_out.predicted == held_out.labels).double()
        results[period] = ProbeResult(
            period=period, kappa=float(held_out.kappas.mean()), accuracy=float(correct.mean()),
            train_kappa=_train_kappa(held_out, len(residues)), kappa_nonround=nonround_kappa,
            nonround_band=nonround_band, null_sd=null_sd,
            recall=_recall_by_residue(held_out, residues),
            kappas=tuple(held_out.kappas.tolist()), null_kappas=null, size=len(n),
        )  # fmt: skip
    return results
