"""Accuracy of images, wells and plates from one table of predictions.

Axes: n predictions (rows), K classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fulgurite.sampling import rank_and_world

__all__ = [
    "Predictions",
    "by_domain",
    "class_scores",
    "confusion",
    "gather",
    "joined",
    "rows_of",
    "scores",
    "sizes",
]


class Predictions(NamedTuple):
    """Predictions of query images, on the CPU.

    Args:
        batch: Fingerprint of the batch that each was predicted in. Shape: (n,).
        row: Of the image in the plate table. Shape: (n,).
        domain: Plate. Shape: (n,).
        well: Well, unique over plates. Shape: (n,).
        label: True class. Shape: (n,).
        log_probs: Log-probabilities. Shape: (n, K).
        queries: L, how many queries its batch had, repeated ones too. Shape: (n,).
        distinct: How many different ones. Shape: (n,).
    """

    batch: Tensor
    row: Tensor
    domain: Tensor
    well: Tensor
    label: Tensor
    log_probs: Tensor
    queries: Tensor
    distinct: Tensor


def rows_of(batch: dict[str, Tensor], logits: Tensor) -> Predictions:
    """The labelled rows of a batch that do not only pad it.

    Args:
        batch: ``index``, ``domain``, ``well``, ``label`` and ``kept``; see the data contract.
        logits: Of the queries. Shape: (L, K).

    Example:
        >>> one = {"index": torch.tensor([4, 5]), "domain": torch.tensor(1)}
        >>> one |= {"well": torch.tensor([7, 7]), "label": torch.tensor([0, 1])}
        >>> one |= {"kept": torch.tensor([True, False])}
        >>> rows_of(one, torch.zeros(2, 3)).row
        tensor([4])
    """
    own = (batch["kept"] & (batch["label"] >= 0)).cpu()
    index = batch["index"].cpu()
    # the same images in the same order: the same batch, repeated by a sampler that pads
    fingerprint = hash(tuple(index.tolist()))
    return Predictions(
        torch.full_like(index, fingerprint)[own],
        index[own],
        batch["domain"].cpu().expand(len(index))[own],
        batch["well"].cpu()[own],
        batch["label"].cpu()[own],
        logits.detach().float().log_softmax(1).cpu()[own],
        torch.full_like(index, len(index))[own],
        torch.full_like(index, len(set(index.tolist())))[own],
    )


def joined(parts: Iterable[Predictions], num_classes: int) -> Predictions:
    """All predictions in one order that does not depend on the ranks, repeated batches once.

    An image may be predicted in several different batches; each counts.

    Example:
        >>> i = torch.tensor([1, 2])
        >>> part = Predictions(i * 0, i, i, i, i, torch.zeros(2, 3), i, i)
        >>> len(joined([part, part], 3).row)
        2
    """
    parts = [p for p in parts if len(p.row)]
    if not parts:
        none = torch.zeros(0, dtype=torch.int64)
        return Predictions(none, none, none, none, none, torch.zeros(0, num_classes), none, none)
    whole = Predictions(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
    key = torch.stack([whole.domain, whole.row, whole.batch], 1)
    unique, inverse = _unique(key)
    first = torch.full((len(unique),), len(key)).scatter_reduce(
        0, inverse, torch.arange(len(key)), "amin"
    )
    return Predictions(*(column[first] for column in whole))


def _unique(key: Tensor) -> tuple[Tensor, Tensor]:
    """Different rows in order, and which of them each row is. Shape: (n, ...)."""
    found: tuple[Tensor, Tensor] = torch.unique(key, dim=0, return_inverse=True)
    return found


def gather(parts: list[Predictions], num_classes: int) -> Predictions:
    """:func:`joined` over all ranks; every rank gets the same."""
    world = rank_and_world()[1]
    if world == 1:
        return joined(parts, num_classes)
    everyone: list[list[Predictions]] = [[] for _ in range(world)]
    dist.all_gather_object(everyone, [joined(parts, num_classes)])
    return joined([part for own in everyone for part in own], num_classes)


def confusion(label: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """How often class i was predicted as class j. Shapes: (n,), (n,) to (K, K).

    Example:
        >>> confusion(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), 2)
        tensor([[1, 1],
                [0, 1]])
    """
    return torch.bincount(label * num_classes + predicted, minlength=num_classes**2).view(
        num_classes, num_classes
    )


def _macro(label: Tensor, right: Tensor) -> float:
    """Mean over the classes that occur of the share that is right."""
    return float(torch.stack([right[label == k].mean() for k in set(label.tolist())]).mean())


def class_scores(counts: Tensor) -> dict[str, Tensor]:
    """Precision, recall and F1 of each class, from how often class i was predicted as class j.

    What is undefined counts as 0, as in scikit-learn: the precision of a class that was never
    predicted, the recall of one that does not occur.

    Args:
        counts: Sums over all predictions. Shape: (K, K).

    Returns:
        ``precision``, ``recall`` and ``f1``. Shapes: (K,) float64.

    Example:
        >>> counts = torch.tensor([[1, 1], [0, 2]])
        >>> class_scores(counts)["recall"].tolist(), class_scores(counts)["f1"][1].item()
        ([0.5, 1.0], 0.8)

    Source: card section 7.4; arXiv 2604.20824 reports them beside the accuracy.
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
    known = (counts.sum(0) + counts.sum(1)) > 0
    return {f"macro_{k}": float(v[known].mean()) for k, v in class_scores(counts).items()}


def _wells(rows: Predictions) -> tuple[Tensor, Tensor]:
    """Label and whether it was predicted, of each well: mean of its sites' probabilities."""
    key, inverse = _unique(torch.stack([rows.well, rows.label], 1))
    total = torch.zeros(len(key), rows.log_probs.shape[1], dtype=torch.float64)
    total.index_add_(0, inverse, rows.log_probs.double().exp())
    return key[:, 1], (total.argmax(1) == key[:, 1]).double()


def by_domain(rows: Predictions) -> dict[int, float]:
    """Accuracy on the images of each plate."""
    right = (rows.log_probs.argmax(1) == rows.label).double()
    return {d: float(right[rows.domain == d].mean()) for d in sorted(set(rows.domain.tolist()))}


def sizes(rows: Predictions) -> dict[str, float]:
    """What a test was made of.

    Returns:
        ``images``, how many different ones were scored; ``queries``, L of their batches, and
        ``distinct_queries``, how many different images these were (means over images, where batches
        differ). Empty without predictions.

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
    """All metrics.

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

    Source: card sections 1.4 and 7.4; well and plate level: inferred.
    """
    if not len(rows.row):
        return {}
    right = (rows.log_probs.argmax(1) == rows.label).double()
    plates = [*by_domain(rows).values()]
    well_label, well_right = _wells(rows)
    return {
        "loss": float(-rows.log_probs.double().gather(1, rows.label[:, None]).mean()),
        "acc": float(right.mean()),
        "macro_acc": _macro(rows.label, right),
        **_macro_scores(confusion(rows.label, rows.log_probs.argmax(1), rows.log_probs.shape[1])),
        "well_acc": float(well_right.mean()),
        "well_macro_acc": _macro(well_label, well_right),
        "plate_acc": sum(plates) / len(plates),
        "worst_plate_acc": min(plates),
    }
