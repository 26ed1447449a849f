"""Shrinkage LDA of all folds and seeds at once, equal to scikit-learn's fold by fold.

A model's covariance is that of ``LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")``:
for each class Ledoit and Wolf's estimate on features standardised within the class, scaled back,
and averaged by the classes' priors. It does not change when a feature is scaled, so a
``StandardScaler`` before it changes nothing and is left out.

There are three ways to the discriminants, all with means, variances and scores in float64:

- Up to :data:`DIRECT` dimensions the covariance of each model is the scatter of the whole class
  less that of the rows held out, and is factored.
- Above, no model's matrix is formed: one Cholesky factor of the scatter of all rows serves every
  model as the preconditioner of conjugate gradients, which need few steps since the models differ
  from it by the rows held out only. They run in float32 on a CPU, and in float64 with as small a
  residual as it takes where classes lie many standard deviations apart.
- Where either could lose digits, each model is fitted by itself to its own rows: at a fixed
  shrinkage above :data:`DIRECT` dimensions, where a feature is tighter within classes than float32
  can tell, where rows held out hold almost all of a feature's variance, and where conjugate
  gradients do not converge.

Axes: N numbers, D embedding width, T classes, R rows of a class (zeros fill up), S seeds, F folds,
E = S F models, C vectors solved for at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import embedding  # several times as fast as x[index]

from fulgurite.errors import ConfigError, DataError
from fulgurite.models.number_probing.probes.fold_statistics import (
    FoldStatistics,
    StandardizedRows,
    exceeds_rounding,
)

__all__ = [
    "DIRECT",
    "FAR",
    "NEAR",
    "TOLERANCE",
    "fit_alone",
    "lda_scores",
    "shrinkage_intensity",
    "solve_directly",
    "solve_iteratively",
]

#: Up to this width each model's covariance is formed and factored.
DIRECT = 128

#: Relative residual of conjugate gradients where classes are near.
TOLERANCE = 1e-3
#: Standard deviations from a class to the mean of all, up to which float32 will do.
NEAR = 10.0
#: The same, up to which conjugate gradients will do.
FAR = 1e4
_TIGHT = 1e3  # total variance over that within classes that one factor in float32 stands
_MAX_STEPS = 200
_STEEP = 1e3  # change of a score over a standard deviation of all features, up to which float32 do


def shrinkage_intensity(
    fourth: Tensor, norm2: Tensor, trace: Tensor, n: Tensor, *, d: int
) -> Tensor:
    """Ledoit and Wolf's shrinkage towards the scaled identity.

    Args:
        fourth: Σ‖x‖⁴ over centred rows.
        norm2: Squared Frobenius norm of their biased covariance.
        trace: Trace of it.
        n: Number of rows.
        d: Their width.

    Returns:
        Weight of the target, 0 to 1.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [0.0, -1.0]])
        >>> c = x.mT @ x / 3
        >>> fourth = x.square().sum(1).square().sum()
        >>> float(shrinkage_intensity(fourth, c.square().sum(), c.trace(), torch.tensor(3), d=2))
        1.0

    Source: Ledoit and Wolf, 2004, as scikit-learn's ``ledoit_wolf_shrinkage``.
    """
    dispersion = (norm2 - trace.square() / d) / d
    noise = torch.minimum((fourth / n - norm2) / (d * n), dispersion)
    is_dispersed = dispersion > 1e-12 * norm2 / d
    return torch.where(is_dispersed, noise / dispersion.where(is_dispersed, 1.0), 0.0).clamp(0, 1)


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
    table: StandardizedRows,
    labels: Tensor,
    classes: int,
    folds: Tensor,
    *,
    shrinkage: float | Literal["auto"],
) -> Tensor:
    """Discriminant scores of every row under every model.

    Args:
        table: The N rows.
        labels: Class of each row. Shape: (N,).
        classes: T.
        folds: Fold of each row, by seed. Shape: (S, N).
        shrinkage: ``auto`` for Ledoit and Wolf's, or a weight from 0 to 1, by which the pooled
            covariance of standardised features is shrunk towards the scaled identity; 0 is plain
            LDA.

    Returns:
        Scores under the model that was fitted without fold f. Shape: (S, F, N, T).

    Raises:
        ConfigError: A fold leaves too few rows, or ``shrinkage`` is outside 0 to 1.
        DataError: The covariance is singular, or nearly.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [5.0], [6.0]]).double().repeat(2, 1)
        >>> table = StandardizedRows(x)
        >>> labels, folds = torch.tensor([0, 0, 1, 1] * 2), torch.arange(8)[None] // 4
        >>> lda_scores(table, labels, 2, folds, shrinkage="auto").argmax(-1)[0, 0].tolist()
        [0, 0, 1, 1, 0, 0, 1, 1]

    Source: docs/papers/number_probing.md section 1.5; equal to scikit-learn's
    ``LinearDiscriminantAnalysis``.
    """
    if shrinkage != "auto" and not (isinstance(shrinkage, (int, float)) and 0 <= shrinkage <= 1):
        raise ConfigError(f"shrinkage={shrinkage!r} is no share.", "Give auto, or 0 to 1.")
    c = FoldStatistics.from_labels(table, labels, classes, folds)
    # relative to the mean of all, scores change by one number per row, and the prior-weighted
    # sum of the means is zero: the last class follows from the others
    mean = (c.mean - c.global_mean).permute(1, 2, 0)  # (E, D, T)
    weight = _solve_discriminants(c, shrinkage, mean[..., :-1])
    last = -(weight @ (c.priors[:-1] / c.priors[-1]).mT[..., None])
    weight = torch.cat([weight, last], -1)
    offset = c.priors.mT.log() - ((0.5 * mean + c.global_mean[..., None]) * weight).sum(1)
    # float32 is right to 1e-4 of a natural logarithm where no discriminant is steep
    steepest = float(weight.abs().sum(1).max())
    x = table.x if steepest > _STEEP else table.fast_x
    # (E T, N): so laid out, products and maxima are fastest
    scores = weight.mT.flatten(0, 1).to(x) @ x[:-1].mT
    scores = scores.view(len(folds), -1, classes, table.size)
    scores += offset.to(x).view(len(folds), -1, classes, 1)
    return scores.mT


def _solve_discriminants(
    c: FoldStatistics, shrinkage: float | Literal["auto"], mean: Tensor
) -> Tensor:
    """The covariance of each model, inverted, times its means. Shapes: (E, D, C)."""
    direct = mean.shape[1] <= DIRECT
    if not c.lost_digits and direct:
        weight, shift = _compute_shrinkage(c, shrinkage)
        return solve_directly(c, weight, shift, mean)
    if not c.lost_digits and shrinkage == "auto":
        within_fraction = c.within / c.total
        if bool((within_fraction > 1 / _TIGHT).logical_or(c.variance.amax(0) == 0).all()):
            solution = solve_iteratively(c, *_compute_shrinkage(c, shrinkage), mean)
            if solution is not None:
                return solution
    return torch.stack([fit_alone(c, model, shrinkage, mean[model]) for model in range(len(mean))])


def _compute_intensities(c: FoldStatistics) -> Tensor:
    """Ledoit and Wolf's weight of the target for each class and model. Shape: (T, E).

    All models of a class share one Gram matrix of its rows, so they share its unit: the feature's
    std over all rows of the class, where scikit-learn has that over the rows of the model. This
    changes the weight by about a hundredth of itself.
    """
    varies = exceeds_rounding(c.class_variance, c.center, c.rows.shape[1])
    unit = c.class_variance.where(varies, 1.0).rsqrt().where(varies, 0.0)
    x = c.fast_rows * unit.to(c.table.fast_dtype)[:, None]
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
    return shrinkage_intensity(fourth, norm2 / count.square(), trace, n=count, d=x.shape[-1]).to(
        c.rows
    )


def _compute_shrinkage(
    c: FoldStatistics, shrinkage: float | Literal["auto"]
) -> tuple[Tensor, Tensor]:
    """Weight of each class's scatter, and the diagonal added. Shapes: (T, E), (E, D)."""
    if shrinkage == "auto":
        delta = _compute_intensities(c)
        # a feature that is constant within a class has the unit that it has in all
        unit_variance = c.variance.where(
            exceeds_rounding(c.variance, c.mean, c.count[..., None]), c.total
        )
        trace = (c.variance / unit_variance).mean(-1)
        shift = ((c.priors * delta * trace)[..., None] * unit_variance).sum(0)
        return c.priors * (1 - delta), shift
    mean = (c.within / c.total).mean(-1, keepdim=True)
    return c.priors * (1 - shrinkage), shrinkage * mean * c.total


def solve_directly(c: FoldStatistics, weight: Tensor, shift: Tensor, rhs: Tensor) -> Tensor:
    """Solve for the coefficients of all models by one Cholesky factor for each.

    Args:
        c: Statistics of all folds.
        weight: Weight of each class's scatter in each model.
        shift: What is added to the diagonal of each model.
        rhs: Means of the classes.

    Shape: (T, E), (E, D) and (E, D, C) to (E, D, C).

    Raises:
        DataError: A covariance is singular, or nearly.
    """
    models, width = shift.shape
    scatter = (c.rows.mT @ c.rows).flatten(1)  # of each class, shared by all models
    is_held_out, index = c.held_out.topk(int(c.held_out.sum(-1).max()), dim=-1)  # others fill up
    index += torch.arange(len(c.rows), device=index.device)[:, None, None] * c.rows.shape[1]
    held_out = embedding(index.transpose(0, 1), c.rows.flatten(0, 1))  # (E, T, H, D)
    held_out *= (is_held_out * (weight / c.count).sqrt()[..., None]).transpose(0, 1)[..., None]
    mean = c.shift.transpose(0, 1) * weight.sqrt().mT[..., None]
    downdate = torch.cat([held_out.flatten(1, 2), mean], 1)  # rows held out, and the means
    pooled = ((weight / c.count).mT @ scatter).view(models, width, width) + torch.diag_embed(shift)
    pooled.baddbmm_(downdate.mT, downdate, alpha=-1)
    return _solve_by_cholesky(pooled, rhs, len(c.mean))


def _solve_by_cholesky(covariance: Tensor, rhs: Tensor, classes: int) -> Tensor:
    """Solve by Cholesky's factor. Shapes: (…, D, D) and (…, D, C) to (…, D, C).

    Raises:
        DataError: A matrix is singular, or nearly.
    """
    root, failed = torch.linalg.cholesky_ex(covariance)
    # a feature's variance when the features before it are known, over its variance
    remaining = root.diagonal(dim1=-2, dim2=-1).square() / covariance.diagonal(dim1=-2, dim2=-1)
    if bool(failed.any()) or not bool((remaining > 1e-13).all()):
        raise DataError(
            f"The covariance of {rhs.shape[-2]} dimensions within {classes} residues is singular.",
            "Pass shrinkage='auto' or a larger share to probe(), or fewer dimensions, for example "
            "principal_components(embeddings, 50).",
        )
    return torch.cholesky_solve(rhs, root)


def fit_alone(
    c: FoldStatistics, model: int, shrinkage: float | Literal["auto"], rhs: Tensor
) -> Tensor:
    """Fit one model to its own rows, in float64.

    Args:
        c: Statistics of all folds.
        model: Number of the model.
        shrinkage: Weight of the target, or ``auto`` for Ledoit and Wolf's.
        rhs: Means of the classes.

    Shape: (D, C) to (D, C).

    Raises:
        DataError: The covariance is singular, or nearly.
    """
    priors, mean, total = c.priors[:, model], c.mean[:, model], c.total[model]
    parts, shift = [], torch.zeros_like(total)
    for t, rows in enumerate(c.rows):
        centred = rows[c.train[t, model] > 0] - c.shift[t, model]
        count, delta = len(centred), 0.0 if shrinkage == "auto" else shrinkage
        variance = c.variance[t, model]
        if shrinkage == "auto":
            varies = exceeds_rounding(variance, mean[t], count)
            unit_variance = variance.where(varies, total)
            delta = float(_compute_intensity(centred * unit_variance.rsqrt()))
            shift += priors[t] * delta * (variance / unit_variance).mean() * unit_variance
        parts.append(centred * (priors[t] * (1 - delta) / count).sqrt())
    if shrinkage != "auto":
        shift = shrinkage * (c.within[model] / total).mean() * total
    rows = torch.cat(parts)
    scale = (rows.square().sum(0) + shift).rsqrt()  # to variances of 1
    scale = scale.where(scale.isfinite(), 0.0)
    rows, shift, rhs = rows * scale, shift * scale.square(), rhs * scale[:, None]
    if len(rows) >= len(scale) or not bool((shift > 0).all()):
        solution = _solve_by_cholesky(rows.mT @ rows + torch.diag(shift), rhs, len(priors))
    else:
        solution = _solve_by_woodbury(rows, shift, rhs)
    return solution * scale[:, None]


def _compute_intensity(x: Tensor) -> Tensor:
    """Ledoit and Wolf's weight of the target for centred rows. Shape: (R, D) to ()."""
    count, width = x.shape
    square = x.square().sum(1)
    product = x.mT @ x if width < count else x @ x.mT
    norm2, trace = product.square().sum() / count**2, square.sum() / count
    return shrinkage_intensity(
        square.square().sum(), norm2, trace, n=torch.tensor(count, device=x.device), d=width
    )


def _solve_by_woodbury(rows: Tensor, diagonal: Tensor, rhs: Tensor) -> Tensor:
    """Solve (rowsᵀ rows + diag) w = rhs with fewer rows than dimensions. Shapes: (D, C).

    Source: Woodbury's identity, and one step of iterative refinement.
    """
    scaled = rows / diagonal
    inner = rows @ scaled.mT
    inner.diagonal().add_(1.0)
    root = torch.linalg.cholesky(inner)  # its eigenvalues are 1 or more

    def apply_inverse(v: Tensor) -> Tensor:
        v = v / diagonal[:, None]
        return v - scaled.mT @ torch.cholesky_solve(rows @ v, root)

    solution = apply_inverse(rhs)
    return solution + apply_inverse(
        rhs - rows.mT @ (rows @ solution) - diagonal[:, None] * solution
    )


def solve_iteratively(
    c: FoldStatistics, weight: Tensor, shift: Tensor, rhs: Tensor
) -> Tensor | None:
    """Solve for the coefficients of all models by conjugate gradients with one preconditioner.

    Args:
        c: Statistics of all folds.
        weight: Weight of each class's scatter in each model.
        shift: What is added to the diagonal of each model.
        rhs: Means of the classes.

    Returns:
        The coefficients; None if they do not converge to what the distances of the classes ask for.

    Shape: (T, E), (E, D) and (E, D, C) to (E, D, C).
    """
    models, width, columns = rhs.shape
    # in units in which the variances are about 1
    scale = ((weight[..., None] * c.variance).sum(0) + shift).mean(0).rsqrt()
    condition = _make_preconditioner(c, weight.mean(1), shift.mean(0), scale)
    if condition is None:
        return None
    b = (rhs.mT * scale).flatten(0, 1)
    dtype = c.table.fast_dtype
    distance = float(torch.linalg.vecdot(b, condition(b)).max().clamp(min=0).sqrt())
    if not distance < FAR:
        return None
    dtype = dtype if distance < NEAR else b.dtype
    tolerance = TOLERANCE * min(1.0, NEAR / distance) ** 2 if distance else TOLERANCE
    x = (c.fast_rows if dtype == c.table.fast_dtype else c.rows).flatten(0, 1) * scale.to(dtype)
    row_weight = (c.train * (weight / c.count)[..., None]).to(dtype).transpose(0, 1)
    mean = (c.shift * scale).transpose(0, 1).to(dtype)  # (E, T, D)
    diagonal = (shift * scale.square())[:, None].to(dtype)

    def apply(v: Tensor) -> Tensor:
        """The covariance of each model times its own vectors. Shape: (E C, D)."""
        vectors = v.view(models, columns, width)
        u = (v @ x.mT).view(models, columns, *c.index.shape)
        u = u.sub_((vectors @ mean.mT)[..., None]).mul_(row_weight[:, None])
        return (u.view(len(v), -1) @ x).view_as(vectors).addcmul_(vectors, diagonal).view_as(v)

    solution = _conjugate_gradients(apply, condition, b.to(dtype), tolerance)
    return None if solution is None else (solution.to(rhs).view_as(rhs.mT) * scale).mT


def _make_preconditioner(
    c: FoldStatistics, weight: Tensor, shift: Tensor, scale: Tensor
) -> Callable[[Tensor], Tensor] | None:
    """Make the inverse of about the models' mean covariance: weights (T,), diagonal (D,).

    None if rounding leaves it without an inverse.
    """
    size = (c.index < c.table.size).sum(1)
    dtype = c.table.fast_dtype
    diagonal = (shift * scale.square()).to(dtype)
    if len(scale) <= c.table.size:
        means = c.center.to(dtype)
        scatter = c.table.scatter - (means * size[:, None]).mT @ means
        scatter *= float(weight.sum()) / c.table.size
        scatter *= scale[:, None] * scale
        root, failed = torch.linalg.cholesky_ex(scatter + torch.diag(diagonal))
        if bool(failed):
            return None
        return lambda v: torch.cholesky_solve(v.mT.to(dtype), root).mT.to(v)
    y = (c.fast_rows * ((weight / size).sqrt()[:, None, None] * scale).to(dtype)).flatten(0, 1)
    scaled = y / diagonal
    inner = y @ scaled.mT
    inner.diagonal().add_(1.0)
    root, failed = torch.linalg.cholesky_ex(inner)
    if bool(failed):
        return None

    def woodbury(v: Tensor) -> Tensor:
        part = v.to(dtype) / diagonal
        return (part - torch.cholesky_solve(y @ part.mT, root).mT @ scaled).to(v)

    return woodbury


def _conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    condition: Callable[[Tensor], Tensor],
    rhs: Tensor,
    tolerance: float,
) -> Tensor | None:
    """Solve for each row by itself; None if one does not converge. Shapes: (C, D)."""
    x, residual = torch.zeros_like(rhs), rhs.clone()
    z = condition(residual)
    direction, rho = z, torch.linalg.vecdot(residual, z)
    goal = tolerance**2 * rho
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
    return None
