"""Shrinkage LDA of all folds and seeds at once, equal to scikit-learn's fold by fold.

A model's covariance is that of ``LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")``:
for each class Ledoit and Wolf's estimate on features standardised within the class, scaled back,
and averaged by the classes' shares. It does not change when a feature is scaled, so a
``StandardScaler`` before it changes nothing and is left out.

What folds and seeds share is computed once. Up to :data:`DIRECT` dimensions the covariance of each
model is the scatter of the whole class less that of the rows held out, and is factored. Above, no
model's matrix is formed: one Cholesky factor of the scatter of all rows serves every model as the
preconditioner of conjugate gradients, which need few steps since the models differ from it by the
rows held out only.

Axes: N numbers, D embedding width, T classes, R rows of a class (zeros fill up), S seeds, F folds,
E = S F models, C vectors solved for at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import embedding  # several times as fast as x[index]

from fulgurite.errors import ConfigError, DataError

__all__ = ["DIRECT", "Classes", "Table", "lda_scores", "shrinkage_intensity"]

#: Up to this width each model's covariance is formed and factored.
DIRECT = 128

_TOLERANCE = 1e-3  # of conjugate gradients, relative residual
_MAX_STEPS = 500


class Table:
    """Standardised rows, and what every period, fold and seed shares of them.

    Args:
        x: Rows, float64. Shape: (N, D).

    Attributes:
        x: Rows with mean 0 and variance 1 of each feature, and a last row of zeros that stands for
            no row. Shape: (N+1, D).
        size: N.
    """

    def __init__(self, x: Tensor) -> None:
        ones = x.new_full((len(x),), 1 / len(x))
        mean = ones @ x
        x = x - mean
        std = (ones @ x.square()).sqrt()
        varies = std > 1e-12 * mean.abs()  # a constant less its mean is not quite zero
        x = torch.where(varies, x / std.where(varies, 1.0), 0.0)
        self.x = torch.cat([x, x.new_zeros(1, x.shape[1])])
        self.size = len(x)

    @cached_property
    def fast(self) -> Tensor:
        """Rows in the type of intensities, scores and conjugate gradients. Shape: (N+1, D)."""
        # on a CPU, float32 is three times as fast
        return self.x.float() if self.x.device.type == "cpu" else self.x

    @cached_property
    def gram(self) -> Tensor:
        """Scatter of all rows. Shape: (D, D)."""
        return self.fast.mT @ self.fast


@dataclass(frozen=True)
class Classes:
    """Rows sorted by class, and which of them each model is fitted to.

    Attributes:
        table: The rows.
        rows: The rows by class, zeros to fill up. Shape: (T, R, D).
        index: Row numbers by class, N where there is none. Shape: (T, R).
        train: 1 for a row that the model is fitted to, else 0. Shape: (T, E, R).
        held: 1 for a row that is held out, else 0. Shape: (T, E, R).
        count: Rows fitted. Shape: (T, E).
        mean: Of the rows fitted. Shape: (T, E, D).
        variance: Of the rows fitted, biased. Shape: (T, E, D).
        scale2: The variance, or the model's total variance where it is zero. Shape: (T, E, D).
    """

    table: Table
    rows: Tensor
    index: Tensor
    train: Tensor
    held: Tensor
    count: Tensor
    mean: Tensor
    variance: Tensor
    scale2: Tensor

    @classmethod
    def of(cls, table: Table, x: Tensor, labels: Tensor, classes: int, folds: Tensor) -> Classes:
        """Sort rows by class and take the statistics of every model.

        Args:
            table: The rows.
            x: ``table.x`` or ``table.fast``, which gives the type of the statistics.
            labels: Class of each row. Shape: (N,).
            classes: T.
            folds: Fold of each row. Shape: (S, N).

        Raises:
            ConfigError: A fold leaves fewer than two rows of a class to fit.
        """
        size = table.size
        counts = labels.bincount(minlength=classes)
        order = labels.argsort(stable=True)
        place = torch.arange(size, device=x.device) - (counts.cumsum(0) - counts)[labels[order]]
        index = labels.new_full((classes, int(counts.max())), size)
        index[labels[order], place] = order
        padded = torch.cat([folds, folds.new_full((len(folds), 1), -1)], 1)[:, index]
        fold = torch.arange(int(folds.max()) + 1, device=x.device)
        held = (padded[:, None] == fold[:, None, None]).flatten(0, 1).transpose(0, 1)
        train = (index < size)[:, None] & ~held
        count = train.sum(-1)
        if int(count.min()) < 2:
            raise ConfigError(
                f"With {len(fold)} folds, {int(count.min())} numbers of a residue mod {classes} "
                "are left to fit.",
                "Use more numbers, fewer folds, or shorter periods.",
            )
        train, held, count = train.to(x), held.to(x), count.to(x)
        rows = embedding(index, x)
        width = x.shape[1]
        sums = train @ torch.cat([rows, rows.square()], -1) / count[..., None]
        mean = sums[..., :width]
        variance = (sums[..., width:] - mean.square()).clamp(min=0)
        share = (count / count.sum(0))[..., None]
        grand = (share * mean).sum(0)
        total = (share * (variance + (mean - grand).square())).sum(0)
        total = total.where(total > 0, 1.0)
        scale2 = variance.where(variance > torch.finfo(x.dtype).eps ** 0.75 * total, total)
        return cls(table, rows, index, train, held, count, mean, variance, scale2)

    @cached_property
    def share(self) -> Tensor:
        """Share of each class among a model's rows. Shape: (T, E)."""
        return self.count / self.count.sum(0)

    @cached_property
    def grand(self) -> Tensor:
        """Mean of a model's rows. Shape: (E, D)."""
        return (self.share[..., None] * self.mean).sum(0)

    def numbers(self, which: Tensor) -> Tensor:
        """Numbers of the marked rows, N to fill up. Shape: (T, E, R) to (T, E, H)."""
        marked, place = which.topk(int(which.sum(-1).max()), dim=-1)
        index = self.index[:, None].expand(which.shape).gather(-1, place)
        return index.where(marked > 0, self.table.size)


def shrinkage_intensity(fourth: Tensor, norm2: Tensor, trace: Tensor, n: Tensor, d: int) -> Tensor:
    """Ledoit and Wolf's shrinkage towards the scaled identity.

    Args:
        fourth: Σ‖x‖⁴ over centred rows.
        norm2: Squared Frobenius norm of their biased covariance.
        trace: Trace of it.
        n: Number of rows.
        d: Their width.

    Returns:
        The share of the target, 0 to 1.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [0.0, -1.0]])
        >>> c = x.mT @ x / 3
        >>> fourth = x.square().sum(1).square().sum()
        >>> float(shrinkage_intensity(fourth, c.square().sum(), c.trace(), torch.tensor(3), 2))
        1.0

    Source: Ledoit and Wolf, 2004, as scikit-learn's ``ledoit_wolf_shrinkage``.
    """
    spread = (norm2 - trace.square() / d) / d
    noise = torch.minimum((fourth / n - norm2) / (d * n), spread)
    known = spread > 1e-12 * norm2 / d
    return torch.where(known, noise / spread.where(known, 1.0), 0.0).clamp(0, 1)


@contextmanager
def _full_precision() -> Iterator[None]:
    """No TF32 and no bfloat16 in products of float32 matrices."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@_full_precision()
def lda_scores(
    table: Table, labels: Tensor, classes: int, folds: Tensor, shrinkage: float | Literal["auto"]
) -> Tensor:
    """Discriminant scores of every row under every model.

    Args:
        table: The N rows.
        labels: Class of each row. Shape: (N,).
        classes: T.
        folds: Fold of each row, by seed. Shape: (S, N).
        shrinkage: ``auto`` for Ledoit and Wolf's, or a share: of the pooled covariance of
            standardised features towards the scaled identity; 0 is plain LDA.

    Returns:
        Scores under the model that was fitted without fold f. Shape: (S, F, N, T).

    Raises:
        ConfigError: A fold leaves too few rows, or ``shrinkage`` is no share.
        DataError: The covariance is singular, or nearly.

    Example:
        >>> table = Table(torch.tensor([[0.0], [1.0], [5.0], [6.0]]).double().repeat(2, 1))
        >>> labels, folds = torch.tensor([0, 0, 1, 1] * 2), torch.arange(8)[None] // 4
        >>> lda_scores(table, labels, 2, folds, "auto").argmax(-1)[0, 0].tolist()
        [0, 0, 1, 1, 0, 0, 1, 1]

    Source: card section 1.5; equal to scikit-learn's ``LinearDiscriminantAnalysis``.
    """
    if shrinkage != "auto" and not (isinstance(shrinkage, (int, float)) and 0 <= shrinkage <= 1):
        raise ConfigError(f"shrinkage={shrinkage!r} is no share.", "Give auto, or 0 to 1.")
    direct = table.x.shape[1] <= DIRECT or shrinkage == 0
    c = Classes.of(table, table.x if direct else table.fast, labels, classes, folds)
    solve = _direct if direct else _iterative
    # relative to the mean of all, scores change by one number per row, and the shares-weighted
    # sum of the means is zero: the last class follows from the others
    mean = (c.mean - c.grand).permute(1, 2, 0)  # (E, D, T)
    weight = solve(c, *_shrunk(c, shrinkage), mean[..., :-1])
    last = -(weight @ (c.share[:-1] / c.share[-1]).mT[..., None])
    weight = torch.cat([weight, last], -1)
    offset = c.share.mT.log() - ((0.5 * mean + c.grand[..., None]) * weight).sum(1)
    # (E T, N): so laid out, products and maxima are fastest
    scores = weight.mT.flatten(0, 1).to(table.fast) @ table.fast[:-1].mT
    scores = scores.view(len(folds), -1, classes, table.size)
    scores += offset.to(scores).view(len(folds), -1, classes, 1)
    return scores.mT


def _intensity(c: Classes) -> Tensor:
    """Ledoit and Wolf's share of the target for each class and model. Shape: (T, E).

    All models of a class share one Gram matrix of its rows, so they share its unit: the feature's
    std over all rows of the class, where scikit-learn has that over the rows of the model. This
    moves the share by about a hundredth of itself.
    """
    valid = c.index < c.table.size
    size = valid.sum(1)[:, None, None]
    x = c.rows.to(c.table.fast, copy=True)
    x -= x.sum(1, keepdim=True) / size
    if not bool(valid.all()):
        x *= valid[..., None]
    variance = x.square().sum(1, keepdim=True) / size
    x *= variance.where(variance > 1e-12, 1.0).rsqrt()
    gram = x @ x.mT  # (T, R, R)
    train = c.train.to(gram).mT  # (T, R, E)
    count = c.count.to(gram)
    by_row = gram @ train
    diagonal = gram.diagonal(dim1=1, dim2=2).clone()[..., None]
    total = (by_row * train).sum(1)
    norm2 = (gram.square_() @ train).mul_(train).sum(1)
    # of the rows centred by the mean of those that the model has
    norm2 += (total / count).square() - 2 * (by_row.square() * train).sum(1) / count
    square = (diagonal - 2 * by_row / count[:, None] + (total / count.square())[:, None]) * train
    fourth, trace = square.square().sum(1), square.sum(1) / count
    return shrinkage_intensity(fourth, norm2 / count.square(), trace, count, x.shape[-1]).to(c.rows)


def _shrunk(c: Classes, shrinkage: float | Literal["auto"]) -> tuple[Tensor, Tensor]:
    """Weight of each class's scatter, and the diagonal added. Shapes: (T, E), (E, D)."""
    if shrinkage == "auto":
        delta = _intensity(c)
        trace = (c.variance / c.scale2).mean(-1)
        return c.share * (1 - delta), ((c.share * delta * trace)[..., None] * c.scale2).sum(0)
    within = (c.share[..., None] * c.variance).sum(0)
    total = within + (c.share[..., None] * (c.mean - c.grand).square()).sum(0)
    total = total.where(total > 0, 1.0)
    return c.share * (1 - shrinkage), shrinkage * (within / total).mean(-1, keepdim=True) * total


def _direct(c: Classes, weight: Tensor, shift: Tensor, rhs: Tensor) -> Tensor:
    """Solve by one Cholesky factor for each model. Shapes: (E, D, C)."""
    models, width = shift.shape
    scatter = (c.rows.mT @ c.rows).flatten(1)  # of each class, shared by all models
    held = embedding(c.numbers(c.held).transpose(0, 1), c.table.x)  # (E, T, H, D)
    held *= (weight / c.count).sqrt().mT[..., None, None]
    mean = c.mean.transpose(0, 1) * weight.sqrt().mT[..., None]
    out = torch.cat([held.flatten(1, 2), mean], 1)  # what is held out, and the means
    pooled = ((weight / c.count).mT @ scatter).view(models, width, width) + torch.diag_embed(shift)
    pooled.baddbmm_(out.mT, out, alpha=-1)
    root, failed = torch.linalg.cholesky_ex(pooled)
    # what is left of a feature's variance when those before it are known
    rest = root.diagonal(dim1=-2, dim2=-1).square() / pooled.diagonal(dim1=-2, dim2=-1)
    if bool(failed.any()) or not bool((rest > 1e-13).all()):
        raise DataError(
            f"The covariance of {width} dimensions within {len(c.mean)} residues is singular.",
            "Set shrinkage: auto, or keep fewer dimensions.",
        )
    return torch.cholesky_solve(rhs, root)


def _iterative(c: Classes, weight: Tensor, shift: Tensor, rhs: Tensor) -> Tensor:
    """Solve by conjugate gradients that share one preconditioner. Shapes: (E, D, C)."""
    kind = c.table.fast.dtype
    condition = _preconditioner(c, weight.mean(1), shift.mean(0))
    models, width, columns = rhs.shape
    x = c.rows.to(kind).flatten(0, 1)
    row_weight = (c.train * (weight / c.count)[..., None]).to(kind).transpose(0, 1)
    mean = c.mean.transpose(0, 1).to(kind)  # (E, T, D)
    diagonal = shift[:, None].to(kind)

    def apply(v: Tensor) -> Tensor:
        """The covariance of each model times its own vectors. Shape: (E C, D)."""
        each = v.view(models, columns, width)
        u = (v @ x.mT).view(models, columns, *c.index.shape)
        u = u.sub_((each @ mean.mT)[..., None]).mul_(row_weight[:, None])
        return (u.view(len(v), -1) @ x).view_as(each).addcmul_(each, diagonal).view_as(v)

    found = _conjugate_gradients(apply, condition, rhs.mT.flatten(0, 1).to(kind))
    return found.to(rhs).view(models, columns, width).mT


def _preconditioner(c: Classes, weight: Tensor, shift: Tensor) -> Callable[[Tensor], Tensor]:
    """Inverse of about the mean covariance of the models: weights (T,), diagonal (D,)."""
    size = (c.index < c.table.size).sum(1)
    x, diagonal = c.table.fast, shift.to(c.table.fast)
    means = (c.rows.sum(1) / size[:, None]).to(x)
    if x.shape[1] <= c.table.size:
        scatter = c.table.gram - (means * size[:, None]).mT @ means
        scatter = scatter * (float(weight.sum()) / c.table.size)
        root = torch.linalg.cholesky(scatter + torch.diag(diagonal))
        return lambda v: torch.cholesky_solve(v.mT, root).mT
    factor = ((weight / size).sqrt()[:, None] * (c.index < c.table.size)).to(x)
    y = ((c.rows.to(x) - means[:, None]) * factor[..., None]).flatten(0, 1)
    scaled = y / diagonal
    eye = torch.eye(len(y), dtype=y.dtype, device=y.device)
    inner = torch.linalg.cholesky(eye + scaled @ y.mT)

    def woodbury(v: Tensor) -> Tensor:
        v = v / diagonal
        return v - torch.cholesky_solve(y @ v.mT, inner).mT @ scaled

    return woodbury


def _conjugate_gradients(
    apply: Callable[[Tensor], Tensor], condition: Callable[[Tensor], Tensor], rhs: Tensor
) -> Tensor:
    """Solve for each row by itself. Shapes: (C, D).

    Raises:
        DataError: It does not converge.
    """
    x, residual = torch.zeros_like(rhs), rhs.clone()
    z = condition(residual)
    direction, rho = z, torch.linalg.vecdot(residual, z)
    goal = _TOLERANCE**2 * rho
    tiny = torch.finfo(rhs.dtype).tiny
    for _ in range(_MAX_STEPS):
        if bool((rho <= goal).all()):
            return x
        image = apply(direction)
        step = rho / torch.linalg.vecdot(direction, image).clamp(min=tiny)
        step = step.where(rho > goal, 0.0)[:, None]  # a row that is done stays as it is
        x.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        z = condition(residual)
        before, rho = rho, torch.linalg.vecdot(residual, z).where(rho > goal, rho)
        direction = torch.addcmul(z, (rho / before.clamp(min=tiny))[:, None], direction)
    raise DataError(
        "The discriminant of these embeddings did not converge: they are nearly collinear.",
        "Reduce them first (pca: 100), or set shrinkage: 0.1.",
    )
