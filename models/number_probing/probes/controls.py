"""Control embeddings whose verdict is known in advance.

Axes: N numbers, D embedding width, T period.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["ceiling", "collinear", "gaussian", "histogram", "planted", "row_shuffled"]


def row_shuffled(embeddings: Tensor, seed: int = 0) -> Tensor:
    """The same rows for other numbers: no period remains. Shape: (N, D).

    Example:
        >>> sorted(row_shuffled(torch.arange(3.0)[:, None]).flatten().tolist())
        [0.0, 1.0, 2.0]

    Source: docs/papers/number_probing.md section 1.7.
    """
    order = torch.randperm(len(embeddings), generator=torch.Generator().manual_seed(seed))
    return embeddings[order.to(embeddings.device)]


def gaussian(embeddings: Tensor, seed: int = 0) -> Tensor:
    """Independent normal entries of the same shape and variance, as a model starts. Shape: (N, D).

    Example:
        >>> gaussian(torch.randn(4, 3)).shape
        torch.Size([4, 3])

    Source: docs/papers/number_probing.md section 1.7.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(embeddings.shape, generator=generator, dtype=torch.float64)
    return noise.to(embeddings.device) * embeddings.detach().double().std()


def histogram(counts: Tensor) -> Tensor:
    """One-dimensional "embedding" of how often each number occurs: log(1 + count). Shape: (N, 1).

    Example:
        >>> histogram(torch.tensor([0, 1]))
        tensor([[0.0000],
                [0.6931]], dtype=torch.float64)

    Source: arXiv 2604.20817 (token distribution); the logarithm inferred,
    docs/papers/number_probing.md section 1.7.
    """
    return counts.double().log1p()[:, None]


def planted(
    numbers: Tensor,
    period: int,
    width: int = 64,
    *,
    harmonics: Sequence[int] = (1,),
    noise: float = 0.05,
    scatter: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """A circle for each harmonic of a period, in random orthogonal planes. Shape: (N, D).

    Args:
        numbers: Shape: (N,).
        period: T.
        width: D.
        harmonics: h of the frequencies h/T.
        noise: Standard deviation of independent noise in all dimensions, for radius 1.
        scatter: The same within the planes only.
        seed: Seed of planes and noise.

    Example:
        >>> planted(torch.arange(3), 10, 8, noise=0.0).norm(dim=1).round(decimals=3)
        tensor([1., 1., 1.], dtype=torch.float64)

    Source: docs/papers/number_probing.md section 5, rows 1 to 4 and 8.
    """
    generator = torch.Generator().manual_seed(seed)
    angle = 2 * math.pi / period * numbers.double()[:, None] * torch.tensor(harmonics).double()
    circles = torch.cat([angle.cos(), angle.sin()], 1)
    circles += scatter * torch.randn(circles.shape, generator=generator, dtype=torch.float64)
    plane = torch.randn(width, circles.shape[1], generator=generator, dtype=torch.float64)
    x: Tensor = circles @ torch.linalg.qr(plane)[0].mT
    return x + noise * torch.randn(x.shape, generator=generator, dtype=torch.float64)


def collinear(numbers: Tensor, period: int, step: float, drift: float) -> Tensor:
    """The counter-example of Theorem 1: A r + B m on a line, for n = r + m T. Shape: (N, 1).

    Φ_T = N A² (T² − 1) / 12 whatever B is, and a large B mixes the residues.

    Args:
        numbers: Shape: (N,).
        period: T.
        step: A.
        drift: B.

    Example:
        >>> collinear(torch.tensor([0, 1, 10]), 10, 5.0, 31.0).flatten()
        tensor([ 0.,  5., 31.], dtype=torch.float64)

    Source: arXiv 2604.20817, Theorem 1; one dimension as in its figure,
    docs/papers/number_probing.md section 1.4.
    """
    n = numbers.double()
    return (step * (n % period) + drift * (n // period))[:, None]


def ceiling(
    period: int,
    feature: Callable[[Tensor], Tensor],
    subset: Callable[[Tensor], Tensor] | None = None,
) -> float:
    """κ of the best guess of n mod T from a feature of n alone [1].

    Args:
        period: T.
        feature: Function of n that the guess may use; it may depend on n modulo 10 and modulo T.
        subset: Predicate; only numbers for which it is true count.

    Example:
        >>> round(ceiling(10, lambda n: n % 2), 3), round(ceiling(10, lambda n: n % 5), 3)
        (0.111, 0.444)
        >>> round(ceiling(5, lambda n: torch.where(n % 5 == 0, n % 10, -1)), 3)
        0.25

    Source: docs/papers/number_probing.md section 1.6.
    """
    n = torch.arange(10 * period)
    if subset is not None:
        n = n[subset(n)]
    key, residue = feature(n), n % period
    best = sum(int(residue[key == k].bincount().max()) for k in torch.unique(key).tolist())
    chance = 1 / len(torch.unique(residue))
    return (best / len(n) - chance) / (1 - chance)
