"""Accuracy of images, wells and plates from one table of predictions.

Axes: n predictions (rows), K classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from fulgurite.domains.cs_arm_bn import PlateBatch
from fulgurite.sampling import rank_and_world

__all__ = [
    "Predictions",
    "accuracy_by_domain",
    "class_scores",
    "confusion",
    "gather_predictions",
    "join_predictions",
    "scores",
    "select_predictions",
    "sizes",
]


class Predictions(NamedTuple):
    """Predictions of query images, on the CPU.

    Args:
        batch: Fingerprint of the batch of each prediction. Shape: (n,).
        row: Row of the image in the plate table. Shape: (n,).
        domain: Index of the plate. Shape: (n,).
        well: Index of the well, unique over plates. Shape: (n,).
        label: True class. Shape: (n,).
        log_probs: Log-probabilities. Shape: (n, K).
        queries: Number L of queries in the batch, with repeated ones. Shape: (n,).
        distinct: Number of distinct queries in the batch. Shape: (n,).
    """

    batch: Tensor
    row: Tensor
    domain: Tensor
    well: Tensor
    label: Tensor
    log_probs: Tensor
    queries: Tensor
    distinct: Tensor


def select_predictions(batch: PlateBatch, logits: Tensor) -> Predictions:
    """Predictions of the labelled queries of a batch, without padding.

    Args:
        batch: Batch of one plate.
        logits: Logits of the queries. Shape: (L, K).

    Example:
        >>> images = torch.zeros(2, 1, 4, 4)
        >>> batch = PlateBatch.from_images(images, images, torch.tensor([0, -1]))
        >>> select_predictions(batch, torch.zeros(2, 3)).row
        tensor([0])
    """
    counted = (batch.counted & (batch.label >= 0)).cpu()
    row = batch.row.cpu()
    # the same images in the same order: the same batch, repeated by a sampler that pads
    fingerprint = hash(tuple(row.tolist()))
    return Predictions(
        torch.full_like(row, fingerprint)[counted],
        row[counted],
        torch.full_like(row, batch.domain)[counted],
        batch.well.cpu()[counted],
        batch.label.cpu()[counted],
        logits.detach().float().log_softmax(1).cpu()[counted],
        torch.full_like(row, len(row))[counted],
        torch.full_like(row, len(set(row.tolist())))[counted],
    )


def join_predictions(parts: Iterable[Predictions], num_classes: int) -> Predictions:
    """Join predictions in an order that does not depend on the ranks, with repeated batches once.

    An image may be predicted in several different batches; each prediction counts.

    Example:
        >>> i = torch.tensor([1, 2])
        >>> part = Predictions(i * 0, i, i, i, i, torch.zeros(2, 3), i, i)
        >>> len(join_predictions([part, part], 3).row)
        2
    """
    parts = [p for p in parts if len(p.row)]
    if not parts:
        none = torch.zeros(0, dtype=torch.int64)
        return Predictions(none, none, none, none, none, torch.zeros(0, num_classes), none, none)
    table = Predictions(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
    key = torch.stack([table.domain, table.row, table.batch], 1)
    unique, inverse = _unique_rows(key)
    first = torch.full((len(unique),), len(key)).scatter_reduce(
        0, inverse, torch.arange(len(key)), "amin"
    )
    return Predictions(*(column[first] for column in table))


def _unique_rows(key: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted distinct rows, and the index of each row among them. Shape: (n, ...)."""
    unique_rows: tuple[Tensor, Tensor] = torch.unique(key, dim=0, return_inverse=True)
    return unique_rows


def gather_predictions(parts: list[Predictions], num_classes: int) -> Predictions:
    """Join the predictions of all ranks, equally on every rank."""
    world = rank_and_world()[1]
    if world == 1:
        return join_predictions(parts, num_classes)
    everyone: list[list[Predictions]] = [[] for _ in range(world)]
    dist.all_gather_object(everyone, [join_predictions(parts, num_classes)])
    return join_predictions([part for rank_parts in everyone for part in rank_parts], num_classes)


def confusion(label: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """Counts of class i predicted as class j. Shapes: (n,), (n,) to (K, K).

    Example:
        >>> confusion(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), 2)
        tensor([[1, 1],
                [0, 1]])
    """
    counts: Tensor = multiclass_confusion_matrix(predicted, label, num_classes)
    return counts


def _macro_accuracy(counts: Tensor) -> float:
    """Mean accuracy over the classes that occur, from a confusion matrix.

    A class that does not occur but was predicted is not counted, other than by torchmetrics.
    """
    return float(class_scores(counts)["recall"][counts.sum(1) > 0].mean())


def class_scores(counts: Tensor) -> dict[str, Tensor]:
    """Precision, recall and F1 of each class from a confusion matrix.

    Undefined scores are 0, as in scikit-learn: the precision of a class that was never predicted,
    and the recall of one that does not occur.

    Args:
        counts: Confusion matrix. Shape: (K, K).

    Returns:
        ``precision``, ``recall`` and ``f1``. Shapes: (K,) float64.

    Example:
        >>> counts = torch.tensor([[1, 1], [0, 2]])
        >>> class_scores(counts)["recall"].tolist(), class_scores(counts)["f1"][1].item()
        ([0.5, 1.0], 0.8)

    Source: docs/papers/cs_arm_bn.md section 7.4; arXiv 2604.20824 reports them beside the accuracy.
    """
    right = counts.diagonal().double()
    predicted, occurring = counts.sum(0).double(), counts.sum(1).double()
    return {
        "precision": right / predicted.clamp_min(1),
        "recall": right / occurring.clamp_min(1),
        "f1": 2 * right / (predicted + occurring).clamp_min(1),
    }


def _macro_scores(counts: Tensor) -> dict[str, float]:
    """Means over the classes that occur or were predicted, scikit-learn's ``macro``."""
    occurring = (counts.sum(0) + counts.sum(1)) > 0
    return {f"macro_{k}": float(v[occurring].mean()) for k, v in class_scores(counts).items()}


def _score_wells(rows: Predictions) -> tuple[Tensor, Tensor]:
    """Label of each well, and the class that the mean probabilities of its sites predict."""
    key, inverse = _unique_rows(torch.stack([rows.well, rows.label], 1))
    total = torch.zeros(len(key), rows.log_probs.shape[1], dtype=torch.float64)
    total.index_add_(0, inverse, rows.log_probs.double().exp())
    return key[:, 1], total.argmax(1)


def accuracy_by_domain(rows: Predictions) -> dict[int, float]:
    """Accuracy on the images of each plate."""
    right = (rows.log_probs.argmax(1) == rows.label).double()
    return {d: float(right[rows.domain == d].mean()) for d in sorted(set(rows.domain.tolist()))}


def sizes(rows: Predictions) -> dict[str, float]:
    """Sizes of a test.

    Returns:
        ``images``, the number of distinct images; ``queries``, the number L of queries in their
        batches, and ``distinct_queries``, the number of distinct ones (means over images). Empty
        without predictions.

    Example:
        >>> i = torch.tensor([0, 1])
        >>> sizes(Predictions(i, i, i, i, i, torch.zeros(2, 3), i * 0 + 24, i * 0 + 3))
        {'images': 2.0, 'queries': 24.0, 'distinct_queries': 3.0}
    """
    if not len(rows.row):
        return {}
    return {
        "images": float(len(set(rows.row.tolist()))),
        "queries": float(rows.queries.double().mean()),
        "distinct_queries": float(rows.distinct.double().mean()),
    }


def scores(rows: Predictions) -> dict[str, float]:
    """Metrics of images, wells and plates.

    Returns:
        ``loss`` [nats], ``acc`` and ``macro_acc`` of images; ``macro_precision``,
        ``macro_recall`` and ``macro_f1`` of images, means over the classes that occur or were
        predicted; ``well_acc`` and ``well_macro_acc`` of
        wells (mean of their sites' probabilities); ``plate_acc`` and ``worst_plate_acc``, mean and
        minimum over plates of the accuracy on their images. Empty without predictions.

    Example:
        >>> i = torch.tensor([0, 1, 2, 3])
        >>> p = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.6, 0.4]])
        >>> rows = Predictions(i, i, i // 2, i // 2, torch.tensor([0, 0, 1, 1]), p.log(), i, i)
        >>> found = scores(rows)
        >>> found["acc"], found["well_acc"], found["worst_plate_acc"]
        (0.5, 1.0, 0.5)

    Source: docs/papers/cs_arm_bn.md sections 1.4 and 7.4; well and plate level: inferred.
    """
    if not len(rows.row):
        return {}
    right = (rows.log_probs.argmax(1) == rows.label).double()
    plates = [*accuracy_by_domain(rows).values()]
    num_classes = rows.log_probs.shape[1]
    counts = confusion(rows.label, rows.log_probs.argmax(1), num_classes)
    well_label, well_predicted = _score_wells(rows)
    return {
        "loss": float(-rows.log_probs.double().gather(1, rows.label[:, None]).mean()),
        "acc": float(right.mean()),
        "macro_acc": _macro_accuracy(counts),
        **_macro_scores(counts),
        "well_acc": float((well_label == well_predicted).double().mean()),
        "well_macro_acc": _macro_accuracy(confusion(well_label, well_predicted, num_classes)),
        "plate_acc": sum(plates) / len(plates),
        "worst_plate_acc": min(plates),
    }
