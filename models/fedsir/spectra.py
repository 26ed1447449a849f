"""Spectra of class features, and the two scores of a client.

The paper takes a thin SVD of the uncentred features of each class. Here the same singular values
and right singular vectors come from the eigenvectors of a float64 Gram matrix: of ``ZᵀZ``, which
can be summed batch by batch, or of the smaller ``ZZᵀ`` where a class has fewer samples than
dimensions.

Axes: N samples, B mini-batch, C classes, D feature dim, R kept rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fulgurite.errors import DataError
from fulgurite.models.fedsir.eigen import eigh

__all__ = [
    "ClassSpectra",
    "SpectraAccumulator",
    "class_spectra",
    "client_score",
    "similarity",
]

_FLUSH_ROWS = 4096  # rows buffered before Gram matrices are updated
_CHUNK_BYTES = 1 << 28  # eigenvectors in memory at once in `SpectraAccumulator.chunks`


@dataclass(frozen=True)
class ClassSpectra:
    """Singular values and right singular vectors of each class, largest first.

    Rows beyond ``rank`` are zero, since the samples do not span them. A class that is absent, or
    whose features are all zero or not finite, has rank 0.

    Attributes:
        counts: Samples per class, int64. Shape: (C,).
        rank: Number of directions, at most ``min(count, D)``, int64. Shape: (C,).
        values: Singular values, float64, descending, zero beyond the rank. Shape: (C, R).
        vectors: Right singular vectors as rows, float64. Shape: (C, R, D).
    """

    counts: Tensor
    rank: Tensor
    values: Tensor
    vectors: Tensor

    @property
    def direction(self) -> Tensor:
        """Dominant direction of each class, zero where there is none. Shape: (C, D)."""
        return self.vectors[:, 0]


def _check_labelled_features(features: Tensor, labels: Tensor, num_classes: int) -> None:
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise DataError(
            f"features of shape {tuple(features.shape)} and labels of shape "
            f"{tuple(labels.shape)} do not belong together.",
            "Pass features (N, D) and labels (N,).",
        )
    if labels.numel() and not (int(labels.min()) >= 0 and int(labels.max()) < num_classes):
        raise DataError(
            f"labels lie in [{int(labels.min())}, {int(labels.max())}], "
            f"outside the {num_classes} classes.",
            f"Pass labels from 0 to {num_classes - 1}.",
        )


def _group_by_class(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, ...]:
    """Rows of each class, as views of one sorted copy."""
    counts = torch.bincount(labels, minlength=num_classes).tolist()
    return tuple(torch.split(features[labels.argsort(stable=True)], counts))


def _eigh_descending(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, largest first, and eigenvectors as rows; a matrix that is not finite is 0."""
    gram = torch.where(gram.isfinite().all(-1).all(-1)[..., None, None], gram, 0.0)
    values, vectors = eigh(gram)
    return values.flip(-1), vectors.mT.flip(-2)


def _truncate(values: Tensor, vectors: Tensor, max_rank: Tensor, size: int) -> tuple[Tensor, ...]:
    """Rank, singular values and vectors from eigenpairs; values below rounding error are zero."""
    floor = values[:, :1] * size * torch.finfo(values.dtype).eps
    index = torch.arange(values.shape[1], device=values.device)
    keep = (values > floor) & (values > 0) & (index < max_rank[:, None])
    singular = torch.where(keep, values, 0.0).sqrt()
    return keep.sum(1), singular, torch.where(keep[..., None], vectors, 0.0)


class SpectraAccumulator:
    """Class spectra of features that arrive in batches, without storing the features.

    Holds one D×D float64 Gram matrix per class: 21 MB for C=10, D=512. :meth:`chunks` yields the
    spectra of a few classes at a time, for callers that keep only part of the C×D×D vectors.

    Args:
        num_classes: Number of classes C.
        dim: Feature dimension D.
        device: Device of the Gram matrices.

    Example:
        >>> features = torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.0, 1.0]])
        >>> accumulator = SpectraAccumulator(2, 2)
        >>> accumulator.update(features[:2], torch.tensor([0, 1]))
        >>> accumulator.update(features[2:], torch.tensor([0]))
        >>> accumulator.compute().values.tolist()
        [[3.0, 1.0], [2.0, 0.0]]

    Source: docs/papers/fedsir.md Stage I, step 4; accumulation inferred.
    """

    def __init__(
        self, num_classes: int, dim: int, device: torch.device | str | None = None
    ) -> None:
        self._gram = torch.zeros(num_classes, dim, dim, dtype=torch.float64, device=device)
        self._counts = torch.zeros(num_classes, dtype=torch.int64, device=device)
        self._buffer: list[tuple[Tensor, Tensor]] = []

    @property
    def counts(self) -> Tensor:
        """Number of samples per class. Shape: (C,)."""
        self._flush()
        return self._counts

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            features: Features of any floating type. Shape: (B, D).
            labels: Class of each row, int64. Shape: (B,).

        Raises:
            DataError: The shapes do not fit, or a label is outside 0 to C − 1.
        """
        features, labels = features.detach(), labels.to(features.device)
        _check_labelled_features(features, labels, len(self._counts))
        self._buffer.append((features, labels))
        if sum(len(rows) for rows, _ in self._buffer) >= _FLUSH_ROWS:
            self._flush()

    def _flush(self) -> None:
        if not self._buffer:
            return
        features = torch.cat([rows for rows, _ in self._buffer]).to(self._gram)
        labels = torch.cat([classes for _, classes in self._buffer]).to(self._counts.device)
        self._buffer.clear()
        self._counts += torch.bincount(labels, minlength=len(self._counts))
        for gram, rows in zip(
            self._gram, _group_by_class(features, labels, len(self._counts)), strict=True
        ):
            if len(rows):
                gram.addmm_(rows.mT, rows)

    def chunks(self, max_bytes: int = _CHUNK_BYTES) -> Iterator[ClassSpectra]:
        """Spectra of consecutive classes, each chunk at most ``max_bytes`` of vectors."""
        self._flush()
        dim = self._gram.shape[-1]
        step = max(1, max_bytes // (8 * dim * dim))
        for gram, counts in zip(
            torch.split(self._gram, step), torch.split(self._counts, step), strict=True
        ):
            yield ClassSpectra(counts, *_truncate(*_eigh_descending(gram), counts, dim))

    def compute(self) -> ClassSpectra:
        """Spectra of all classes, with all D rows."""
        return _concatenate_spectra(list(self.chunks()))


def _concatenate_spectra(parts: list[ClassSpectra]) -> ClassSpectra:
    if len(parts) == 1:
        return parts[0]
    names = ("counts", "rank", "values", "vectors")
    return ClassSpectra(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def class_spectra(features: Tensor, labels: Tensor, num_classes: int) -> ClassSpectra:
    """Singular values and right singular vectors of the uncentred features of each class.

    Equal to the thin SVD of each class's rows, in float64. Keeps ``R = min(D, largest class)``
    rows.

    Args:
        features: Penultimate features, any floating type. Shape: (N, D).
        labels: Given labels of the samples, int64. Shape: (N,).
        num_classes: Number of classes C.

    Returns:
        The spectra, on the device of ``features``.

    Raises:
        DataError: The shapes do not fit, or a label is outside 0 to C − 1.

    Example:
        >>> spectra = class_spectra(torch.tensor([[3.0, 4.0], [6.0, 8.0]]), torch.tensor([1, 1]), 2)
        >>> spectra.counts.tolist(), spectra.rank.tolist()
        ([0, 2], [0, 1])
        >>> [round(v, 4) for v in spectra.direction[1].abs().tolist()]
        [0.6, 0.8]

    Source: docs/papers/fedsir.md Stage I, step 4.
    """
    labels = labels.to(features.device)
    _check_labelled_features(features, labels, num_classes)
    groups = _group_by_class(features.detach().double(), labels, num_classes)
    counts = torch.tensor([len(rows) for rows in groups], device=features.device)
    dim = features.shape[1]
    keep = max(1, min(dim, max(len(rows) for rows in groups)))
    rank = torch.zeros_like(counts)
    values = features.new_zeros(num_classes, keep, dtype=torch.float64)
    vectors = features.new_zeros(num_classes, keep, dim, dtype=torch.float64)

    wide = [c for c, rows in enumerate(groups) if len(rows) >= dim]
    if wide:  # one call: the CPU has several threads for it, a GPU its batches
        gram = torch.stack([groups[c].mT @ groups[c] for c in wide])
        rank[wide], values[wide], vectors[wide] = _truncate(
            *_eigh_descending(gram), counts[wide], dim
        )
    for c, rows in enumerate(groups):
        if not 0 < len(rows) < dim:
            continue
        left_values, left_vectors = _eigh_descending(rows @ rows.mT)
        # right singular vectors, normalised here so that rounding in the values does no harm
        right_vectors = torch.nn.functional.normalize(left_vectors @ torch.nan_to_num(rows), dim=1)
        n = len(rows)
        rank[c], values[c, :n], vectors[c, :n] = (
            x[0] for x in _truncate(left_values[None], right_vectors[None], counts[c : c + 1], dim)
        )
    return ClassSpectra(counts, rank, values, vectors)


def similarity(spectra: ClassSpectra | SpectraAccumulator, min_count: int = 20) -> Tensor:
    """Absolute cosines between the dominant directions of the classes.

    Args:
        spectra: Class spectra of one client.
        min_count: Smallest number of samples of a class that counts, unless fewer than two
            classes would remain.

    Returns:
        Symmetric float64 matrix of diagonal 1, with NaN in the rows and columns of the classes
        left out. Shape: (C, C).

    Example:
        >>> features = torch.tensor([[2.0, 0.0], [0.6, 0.8]])
        >>> similarity(class_spectra(features, torch.tensor([0, 2]), 3)).round(decimals=3).tolist()
        [[1.0, nan, 0.6], [nan, nan, nan], [0.6, nan, 1.0]]

    Source: docs/papers/fedsir.md Stage I, steps 3 and 5.
    """
    if isinstance(spectra, SpectraAccumulator):
        parts = [(s.counts, s.rank, s.direction.clone()) for s in spectra.chunks()]
        counts, rank, direction = (torch.cat(x) for x in zip(*parts, strict=True))
    else:
        counts, rank, direction = spectra.counts, spectra.rank, spectra.direction
    included = (counts >= min_count) & (rank > 0)
    if int(included.sum()) < 2:
        included = rank > 0
    cosines = (direction @ direction.mT).abs().fill_diagonal_(1.0)
    return cosines.where(included[:, None] & included, torch.nan)


def client_score(spectra: ClassSpectra | SpectraAccumulator, min_count: int = 20) -> Tensor:
    """Mean and mean square of the cosines between different classes.

    Mixed labels pull the dominant direction of every class towards the common mean, so a client
    with noisy labels scores higher. A consistent renaming of the classes leaves the score
    unchanged: a client whose labels are permuted cannot be told from a clean one.

    Args:
        spectra: Class spectra of one client.
        min_count: Smallest number of samples of a class, as in :func:`similarity`.

    Returns:
        ``(off_mean, off_energy)``, float64; NaN if fewer than two classes have a direction.
        Shape: (2,).

    Example:
        >>> features = torch.tensor([[2.0, 0.0], [0.6, 0.8]])
        >>> client_score(class_spectra(features, torch.tensor([0, 1]), 2)).round(decimals=3)
        tensor([0.6000, 0.3600], dtype=torch.float64)

    Source: docs/papers/fedsir.md Stage I, step 6.
    """
    cosines = similarity(spectra, min_count)
    off = cosines.masked_fill(
        torch.eye(len(cosines), dtype=torch.bool, device=cosines.device), torch.nan
    )
    return torch.stack([off.nanmean(), off.square().nanmean()])
