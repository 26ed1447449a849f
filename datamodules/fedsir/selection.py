"""Seeded choices of samples by class, shared by sources, noise and the data module.

Shapes: N samples, C classes, M selected samples.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fulgurite.errors import DataError

__all__ = [
    "check_labels",
    "choose_per_class",
    "class_quota",
    "is_integer_vector",
    "make_generator",
]


def make_generator(seed: int, stream: int = 0) -> torch.Generator:
    """Return a CPU generator for a stream; different streams of one seed are independent.

    Example:
        >>> make_generator(0, 1).initial_seed() == make_generator(0, 2).initial_seed()
        False
    """
    state = np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


def is_integer_vector(values: object, size: int) -> bool:
    """Tell whether what a plug-in returned is a tensor of one whole number for each sample.

    Example:
        >>> is_integer_vector(torch.tensor([1, 0]), 2), is_integer_vector(torch.zeros(2), 2)
        (True, False)
    """
    return (
        isinstance(values, Tensor)
        and values.shape == (size,)
        and values.dtype != torch.bool
        and not (values.is_floating_point() or values.is_complex())
    )


def check_labels(labels: Tensor, num_classes: int, name: str) -> Tensor:
    """Return labels as int64 after checking that they are class numbers.

    Shape:
        - labels: (N,) integers -> (N,) int64.

    Raises:
        DataError: The labels are not a vector of integers, or a label is outside [0, C).

    Example:
        >>> check_labels(torch.tensor([0, 2]), 3, "train").tolist()
        [0, 2]
    """
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        raise DataError(
            f"The {name} labels are {labels.dtype} of shape {tuple(labels.shape)}.",
            "Labels are one integer class number per image.",
        )
    labels = labels.to(torch.int64)
    if labels.numel():
        low, high = (int(value) for value in torch.aminmax(labels))
        if low < 0 or high >= num_classes:
            raise DataError(
                f"The {name} labels run from {low} to {high}, outside 0 to {num_classes - 1}.",
                f"Number the {num_classes} classes from 0.",
            )
    return labels


def class_quota(labels: Tensor, num_classes: int, limit: int) -> Tensor:
    """Return the number of samples per class in a balanced subset of at most ``limit``.

    Shape:
        - labels: (N,) -> (C,) int64.

    Raises:
        DataError: The limit is smaller than the number of classes.

    Example:
        >>> class_quota(torch.tensor([0, 0, 0, 1, 1, 1, 1]), 2, 5).tolist()
        [3, 2]
    """
    if limit < num_classes:
        raise DataError(
            f"A limit of {limit} images is less than one for each of {num_classes} classes.",
            f"Give a limit of at least {num_classes}, or `null`.",
        )
    quota = torch.full((num_classes,), limit // num_classes)
    quota[: limit % num_classes] += 1
    return torch.minimum(quota, torch.bincount(labels, minlength=num_classes))


def choose_per_class(labels: Tensor, counts: Tensor, generator: torch.Generator) -> Tensor:
    """Choose exactly ``counts[c]`` samples of each class c, uniformly, without replacement.

    Shape:
        - labels: (N,) int64; counts: (C,) int64, at most the class sizes.
        - returns: (M,) int64 positions, ascending.

    Example:
        >>> labels = torch.tensor([0, 1, 0, 1, 1])
        >>> chosen = choose_per_class(labels, torch.tensor([1, 2]), make_generator(0))
        >>> labels[chosen].sort().values.tolist()
        [0, 1, 1]
    """
    shuffled = torch.randperm(len(labels), generator=generator)
    order = shuffled[labels[shuffled].argsort(stable=True)]  # by class, random inside each
    sizes = torch.bincount(labels, minlength=len(counts))
    starts = sizes.cumsum(0) - sizes
    rank = torch.arange(len(labels)) - starts[labels[order]]
    return order[rank < counts[labels[order]]].sort().values
