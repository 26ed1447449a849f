"""Statistics of rows that the models of all folds and seeds share.

Axes: N numbers, D embedding width, T classes, R rows of a class (zeros fill up), S seeds, F folds,
E = S F models.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import embedding  # several times as fast as x[index]

from fulgurite.errors import ConfigError

__all__ = ["FoldStatistics", "StandardizedRows", "exceeds_rounding"]

_LOST = 1e8  # squared shift of a mean over the variance, above which a difference loses digits
_EPS = torch.finfo(torch.float64).eps


class StandardizedRows:
    """Standardised rows, and statistics of them that all periods, folds and seeds share.

    Args:
        x: Rows, float64. Shape: (N, D).

    Attributes:
        x: Rows with mean 0 and variance 1 of each feature, and a last row of zeros that stands for
            no row. Shape: (N+1, D).
        size: N.
    """

    def __init__(self, x: Tensor) -> None:
        # by a power of 2, which changes no digit: squares of any float64 stay in range
        power = torch.frexp(x.abs().amax(0)).exponent.clamp(-1000, 1000)
        x = x * torch.ldexp(torch.ones_like(x[0]), -power)
        ones = x.new_full((len(x),), 1 / len(x))
        mean = ones @ x
        x = x - mean
        std = (ones @ x.square()).sqrt()
        varies = std > len(x) * _EPS * mean.abs()  # a constant less its mean is not quite zero
        x = torch.where(varies, x / std.where(varies, 1.0), 0.0)
        self.x = torch.cat([x, x.new_zeros(1, x.shape[1])])
        self.size = len(x)

    @cached_property
    def fast_dtype(self) -> torch.dtype:
        """Type of intensities, and of conjugate gradients where classes are near."""
        # on a CPU, float32 is three times as fast
        return torch.float32 if self.x.device.type == "cpu" else self.x.dtype

    @cached_property
    def fast_x(self) -> Tensor:
        """The rows in the type ``fast_dtype``. Shape: (N+1, D)."""
        return self.x.to(self.fast_dtype)

    @cached_property
    def scatter(self) -> Tensor:
        """Scatter of all rows. Shape: (D, D)."""
        return self.fast_x.mT @ self.fast_x


def exceeds_rounding(variance: Tensor, mean: Tensor, size: Tensor | int) -> Tensor:
    """Whether a variance exceeds the rounding of a constant, as scikit-learn decides it."""
    return variance > (size * _EPS * mean).square()


@dataclass(frozen=True)
class FoldStatistics:
    """Rows sorted by class, and the statistics of the rows that each model is fitted to.

    Attributes:
        table: The rows.
        center: Mean of the whole class. Shape: (T, D).
        rows: The rows by class less its ``center``, zeros to fill up. Shape: (T, R, D).
        index: Row numbers by class, N for padding. Shape: (T, R).
        train: 1 for a row that the model is fitted to, else 0. Shape: (T, E, R).
        held_out: 1 for a row that is held out, else 0. Shape: (T, E, R).
        count: Rows fitted. Shape: (T, E).
        shift: Mean of the rows fitted, less ``center``. Shape: (T, E, D).
        mean: Mean of the rows fitted. Shape: (T, E, D).
        variance: Biased variance of the rows fitted. Shape: (T, E, D).
        class_variance: Variance of the whole class. Shape: (T, D).
        lost_digits: Whether a variance has lost digits because the rows held out have almost all
            of the class's variance; it was computed anew from the rows fitted.
    """

    table: StandardizedRows
    center: Tensor
    rows: Tensor
    index: Tensor
    train: Tensor
    held_out: Tensor
    count: Tensor
    shift: Tensor
    mean: Tensor
    variance: Tensor
    class_variance: Tensor
    lost_digits: bool

    @classmethod
    def from_labels(
        cls, table: StandardizedRows, labels: Tensor, classes: int, folds: Tensor
    ) -> FoldStatistics:
        """Sort rows by class and take the statistics of every model.

        Args:
            table: The rows.
            labels: Class of each row. Shape: (N,).
            classes: T.
            folds: Fold of each row. Shape: (S, N).

        Raises:
            ConfigError: A fold leaves fewer than two rows of a class to fit.
        """
        x, size = table.x, table.size
        counts = labels.bincount(minlength=classes)
        order = labels.argsort(stable=True)
        rank = torch.arange(size, device=x.device) - (counts.cumsum(0) - counts)[labels[order]]
        index = labels.new_full((classes, int(counts.max())), size)
        index[labels[order], rank] = order
        padded = torch.cat([folds, folds.new_full((len(folds), 1), -1)], 1)[:, index]
        fold = torch.arange(int(folds.max()) + 1, device=x.device)
        held_out = (padded[:, None] == fold[:, None, None]).flatten(0, 1).transpose(0, 1)
        valid = index < size
        train = valid[:, None] & ~held_out
        count = train.sum(-1)
        if int(count.min()) < 2:
            raise ConfigError(
                f"With {len(fold)} folds, {int(count.min())} numbers of a residue mod {classes} "
                "are left to fit.",
                "Use more numbers, fewer folds, or shorter periods.",
            )
        train, held_out, count = train.to(x), held_out.to(x), count.to(x)
        rows = embedding(index, x)
        center = rows.sum(1) / counts[:, None]
        rows -= center[:, None]
        if not bool(valid.all()):
            rows *= valid[..., None]
        shift = (train @ rows).div_(count[..., None])
        square = rows.square()
        variance = (train @ square).div_(count[..., None])
        variance.addcmul_(shift, shift, value=-1).clamp_(min=0)
        is_shifted = exceeds_rounding(shift.square(), center[:, None], size)
        lost_digits = _recompute_lost(
            variance, shift.where(is_shifted, 0.0), rows, train=train, count=count
        )
        return cls(
            table, center, rows, index, train, held_out, count, shift, center[:, None] + shift,
            variance, square.sum(1) / counts[:, None], lost_digits,
        )  # fmt: skip

    @cached_property
    def priors(self) -> Tensor:
        """Fraction of each class among a model's rows. Shape: (T, E)."""
        return self.count / self.count.sum(0)

    @cached_property
    def global_mean(self) -> Tensor:
        """Mean of a model's rows. Shape: (E, D)."""
        return (self.priors[..., None] * self.mean).sum(0)

    @cached_property
    def within(self) -> Tensor:
        """Mean variance within classes. Shape: (E, D)."""
        return (self.priors[..., None] * self.variance).sum(0)

    @cached_property
    def total(self) -> Tensor:
        """Variance of a model's rows, 1 where they are constant. Shape: (E, D)."""
        between = (self.priors[..., None] * (self.mean - self.global_mean).square()).sum(0)
        total = self.within + between
        return total.where(exceeds_rounding(total, self.global_mean, self.table.size), 1.0)

    @cached_property
    def fast_rows(self) -> Tensor:
        """The rows in the type ``table.fast_dtype``. Shape: (T, R, D)."""
        return self.rows.to(self.table.fast_dtype)


def _recompute_lost(
    variance: Tensor, shift: Tensor, rows: Tensor, *, train: Tensor, count: Tensor
) -> bool:
    """Recompute variances that lost digits, in place; return whether there were any."""
    has_lost = shift.square() > _LOST * variance
    features = has_lost.flatten(0, 1).any(0).nonzero()[:, 0]
    for model in range(train.shape[1] if len(features) else 0):
        deviation = rows[..., features] - shift[:, model, None, features]
        deviation *= train[:, model, :, None]
        variance[:, model, features] = deviation.square().sum(1) / count[:, model, None]
    return bool(len(features))
